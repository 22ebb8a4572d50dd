"""Who the ranks of a run are, and who of them is gone: kept in torch.distributed's store."""

import contextlib
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

REPORT_TIMEOUT_S = 10.0
"""seconds in which a rank that lost the others hears from each that is there"""
EXITED_SILENTLY = "is gone (killed, or out of memory, where it said nothing)"


def is_peer_failure(error: BaseException) -> bool:
    """Whether torch.distributed raised it because another rank is gone or late. gloo's errors have no class of their own."""
    gloo = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in gloo)
    )


class RankRegistry:
    """Host and process of every rank, and the last word of each that ends: why, or nothing where it lost the others too.

    The store ends with the process that keeps it: rank 0, or torchrun.
    """

    def __init__(self, rank: int, world_size: int):
        self.rank, self.peers, self.store = rank, {*range(world_size)} - {rank}, _get_default_store()
        for what in ("end", "read"):  # of a run before this one in the same processes
            self.store.delete_key(f"gesso {what} {rank}")
        self.store.set(f"gesso at {rank}", f"{socket.gethostname()} {os.getpid()}")
        self.processes = [self.store.get(f"gesso at {other}").decode().split() for other in range(world_size)]

    def describe(self, rank: int) -> str:
        host, process = self.processes[rank]
        return f"rank {rank} of {len(self.processes)} ({host}, process {process})"

    def report_exit(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self.store.set(f"gesso end {self.rank}", reason)
            if reason:
                self.store.set(f"gesso read {self.rank}", "")

    def failed_ranks(self) -> str:
        """Which ranks ended the run, and why: those that gave a reason, or are no more; else those that stay silent."""
        try:
            said: list[str] = []
            silent = self._collect_reports("end", said)
            self.store.set(f"gesso read {self.rank}", "")
            if self.rank == 0:  # with which the store may end
                self._collect_reports("read", [])
        except RuntimeError:
            return f"{self.describe(0)} {EXITED_SILENTLY}"
        return "; ".join(said or [f"{self.describe(rank)} does not answer" for rank in sorted(silent)])

    def _collect_reports(self, key: str, messages: list[str]) -> set[int]:
        """Wait for the word of each other rank. Returns those of which nothing was heard in time."""
        waiting, end = set(self.peers), time.monotonic() + REPORT_TIMEOUT_S
        while waiting and time.monotonic() < end:
            for rank in sorted(waiting):
                gone = self._has_exited(rank)  # asked first: one that ends gives its word before
                if self.store.check([f"gesso {key} {rank}"]):
                    if why := self.store.get(f"gesso {key} {rank}").decode():
                        messages.append(f"{self.describe(rank)} ended: {why}")
                elif gone:
                    messages.append(f"{self.describe(rank)} {EXITED_SILENTLY}")
                else:
                    continue
                waiting.discard(rank)
            time.sleep(0.05)
        return waiting

    def _has_exited(self, rank: int) -> bool:
        """Told of processes of this machine alone."""
        host, process = self.processes[rank]
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
