"""Host, process and exit reason of every rank, in the key-value store of torch.distributed."""

import contextlib
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

REPORT_TIMEOUT_S = 10.0
"""Seconds that a rank waits for the reports of the others."""
EXITED_SILENTLY = "is gone: it exited without an error message (probably killed or out of memory)"
GLOO_MESSAGES = ("gloo/transport", "caused pair closure")
"""Parts of the messages of gloo's errors, which have no class of their own."""


def is_peer_failure(error: BaseException) -> bool:
    """Return True if torch.distributed raised `error` because another rank failed or did not answer in time."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in GLOO_MESSAGES)
    )


class RankRegistry:
    """Identify the ranks that made a run fail.

    Every rank stores its host and process, and when it exits the reason, which is empty if another rank made it exit.
    The store ends with the process that holds it: rank 0, or torchrun.
    """

    def __init__(self, rank: int, world_size: int):
        self.rank, self.peers, self.store = rank, {*range(world_size)} - {rank}, _get_default_store()
        for key in ("exit", "acknowledged"):  # of an earlier run in the same processes
            self.store.delete_key(f"gesso {key} {rank}")
        self.store.set(f"gesso process {rank}", f"{socket.gethostname()} {os.getpid()}")
        self.processes = [self.store.get(f"gesso process {r}").decode().split() for r in range(world_size)]

    def describe(self, rank: int) -> str:
        """Return the rank with its host and process, such as "rank 1 of 4 (node7, process 123)"."""
        host, process = self.processes[rank]
        return f"rank {rank} of {len(self.processes)} ({host}, process {process})"

    def report_exit(self, reason: str) -> None:
        """Store the reason why this rank exits."""
        with contextlib.suppress(RuntimeError):  # rank 0 may have exited, and the store with it
            self.store.set(f"gesso exit {self.rank}", reason)
            if reason:
                self.store.set(f"gesso acknowledged {self.rank}", "")

    def failed_ranks(self) -> str:
        """Return a text that names the ranks that made the run fail, and why.

        These are the ranks that stored a reason or have no process; without any, the ranks that do not answer.
        """
        try:
            failures: list[str] = []
            silent = self._collect_reports("exit", failures)
            self.store.set(f"gesso acknowledged {self.rank}", "")
            if self.rank == 0:  # the store may end with rank 0, so it waits until all have read it
                self._collect_reports("acknowledged", [])
        except RuntimeError:
            return f"{self.describe(0)} {EXITED_SILENTLY}"
        return "; ".join(failures or [f"{self.describe(rank)} does not answer" for rank in sorted(silent)])

    def _collect_reports(self, key: str, failures: list[str]) -> set[int]:
        """Wait until every other rank has stored `key`; append failures, and return the ranks that did not answer."""
        waiting, deadline = set(self.peers), time.monotonic() + REPORT_TIMEOUT_S
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                exited = self._has_exited(rank)  # before the key is read, as a rank stores its reason before it exits
                if self.store.check([f"gesso {key} {rank}"]):
                    if reason := self.store.get(f"gesso {key} {rank}").decode():
                        failures.append(f"{self.describe(rank)} ended: {reason}")
                elif exited:
                    failures.append(f"{self.describe(rank)} {EXITED_SILENTLY}")
                else:
                    continue
                waiting.discard(rank)
            time.sleep(0.05)
        return waiting

    def _has_exited(self, rank: int) -> bool:
        """Return True if a rank on this machine has no process any more; always False for other machines."""
        host, process = self.processes[rank]
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
