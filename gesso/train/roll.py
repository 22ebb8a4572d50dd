"""Who the ranks of a run are, and who of them is gone: kept in torch.distributed's store."""

import contextlib
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

WAIT = 10.0
"""seconds in which a rank that lost the others hears from each that is there"""
GONE = "is gone (killed, or out of memory, where it said nothing)"


def of_others(error: BaseException) -> bool:
    """Whether torch.distributed raised it because another rank is gone or late. gloo's errors have no class of their own."""
    gloo = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in gloo)
    )


class Roll:
    """Host and process of every rank, and the last word of each that ends: why, or nothing where it lost the others too.

    The store ends with the process that keeps it: rank 0, or torchrun.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.others, self.store = rank, {*range(world)} - {rank}, _get_default_store()
        for what in ("end", "read"):  # of a run before this one in the same processes
            self.store.delete_key(f"gesso {what} {rank}")
        self.store.set(f"gesso at {rank}", f"{socket.gethostname()} {os.getpid()}")
        self.at = [self.store.get(f"gesso at {other}").decode().split() for other in range(world)]

    def name(self, rank: int) -> str:
        host, process = self.at[rank]
        return f"rank {rank} of {len(self.at)} ({host}, process {process})"

    def leave(self, why: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self.store.set(f"gesso end {self.rank}", why)
            if why:
                self.store.set(f"gesso read {self.rank}", "")

    def missing(self) -> str:
        """Which ranks ended the run, and why: those that gave a reason, or are no more; else those that stay silent."""
        try:
            said: list[str] = []
            silent = self._until("end", said)
            self.store.set(f"gesso read {self.rank}", "")
            if self.rank == 0:  # with which the store may end
                self._until("read", [])
        except RuntimeError:
            return f"{self.name(0)} {GONE}"
        return "; ".join(said or [f"{self.name(rank)} does not answer" for rank in sorted(silent)])

    def _until(self, what: str, said: list[str]) -> set[int]:
        """Wait for the word of each other rank. Returns those of which nothing was heard in time."""
        waiting, end = set(self.others), time.monotonic() + WAIT
        while waiting and time.monotonic() < end:
            for rank in sorted(waiting):
                gone = self._dead(rank)  # asked first: one that ends gives its word before
                if self.store.check([f"gesso {what} {rank}"]):
                    if why := self.store.get(f"gesso {what} {rank}").decode():
                        said.append(f"{self.name(rank)} ended: {why}")
                elif gone:
                    said.append(f"{self.name(rank)} {GONE}")
                else:
                    continue
                waiting.discard(rank)
            time.sleep(0.05)
        return waiting

    def _dead(self, rank: int) -> bool:
        """Told of processes of this machine alone."""
        host, process = self.at[rank]
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
