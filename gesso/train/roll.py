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


def of_others(error: BaseException) -> bool:
    """Whether torch.distributed raised it because another rank is gone or late. gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class Roll:
    """Host and process of every rank, and the last word of each that ends: why, or nothing where it lost the others too."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.store = rank, world, _get_default_store()
        self.store.set(f"gesso at {rank}", f"{socket.gethostname()} {os.getpid()}")
        self.store.delete_key(f"gesso end {rank}")  # of a run before this one in the same processes
        self.at = [self.store.get(f"gesso at {other}").decode().split() for other in range(world)]

    def name(self, rank: int) -> str:
        host, process = self.at[rank]
        return f"rank {rank} of {self.world} ({host}, process {process})"

    def leave(self, why: str) -> None:
        """Where the store is gone there is nobody to tell."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"gesso end {self.rank}", why)

    def missing(self) -> str:
        """Which ranks ended the run, and why: those that gave a reason, that are no more, or that stay silent."""
        waiting, said = {*range(self.world)} - {self.rank}, []
        until = time.monotonic() + WAIT
        while waiting and time.monotonic() < until:
            for rank in sorted(waiting):
                gone = self._dead(rank)  # asked first: one that ends says its word before
                if (word := self._word(rank)) is not None:
                    said += [f"{self.name(rank)} ended: {word}"] if word else []
                elif gone:
                    said.append(f"{self.name(rank)} is gone: killed, or out of memory")
                else:
                    continue
                waiting.discard(rank)
            time.sleep(0.05)
        return "; ".join(said or [f"{self.name(rank)} does not answer" for rank in sorted(waiting)])

    def _word(self, rank: int) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self.store.check([f"gesso end {rank}"]):
                return self.store.get(f"gesso end {rank}").decode()
        return None

    def _dead(self, rank: int) -> bool:
        """Told of processes of this machine alone."""
        host, process = self.at[rank]
        status = Path("/proc", process, "stat")
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            return status.read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
