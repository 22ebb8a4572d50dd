"""Identity of the ranks of a run, and which of them have failed, stored in torch.distributed's key-value store."""

import contextlib
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

REPORT_TIMEOUT_S = 10.0
"""Seconds that a rank waits for the reports of the others."""
EXITED_SILENTLY = "is gone (killed, or out of memory, where it said nothing)"


def is_peer_failure(error: BaseException) -> bool:
    """Return True if torch.distributed raised `error` because another rank is gone or late."""
    gloo = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in gloo)
    )


class RankRegistry:
    """Host and process of every rank, and the reason of each rank that ends; empty if it ended because of another rank.

    The store ends with the process that holds it: rank 0, or torchrun.
    """

    def __init__(self, rank: int, world_size: int):
        self.rank, self.peers, self.store = rank, {*range(world_size)} - {rank}, _get_default_store()
        for what in ("end", "read"):  # of a run before this one in the same processes
            self.store.delete_key(f"gesso {what} {rank}")
        self.store.set(f"gesso at {rank}", f"{socket.gethostname()} {os.getpid()}")
        self.processes = [self.store.get(f"gesso at {other}").decode().split() for other in range(world_size)]

    def describe(self, rank: int) -> str:
        """Return the rank with its host and process, such as "rank 1 of 4 (node7, process 123)"."""
        host, process = self.processes[rank]
        return f"rank {rank} of {len(self.processes)} ({host}, process {process})"

    def report_exit(self, reason: str) -> None:
        """Store the reason for which this rank ends."""
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self.store.set(f"gesso end {self.rank}", reason)
            if reason:
                self.store.set(f"gesso read {self.rank}", "")

    def failed_ranks(self) -> str:
        """Return which ranks ended the run and why.

        Those with a reason or without a process are named, otherwise those that do not answer.
        """
        try:
            reasons: list[str] = []
            silent = self._collect_reports("end", reasons)
            self.store.set(f"gesso read {self.rank}", "")
            if self.rank == 0:  # with which the store may end
                self._collect_reports("read", [])
        except RuntimeError:
            return f"{self.describe(0)} {EXITED_SILENTLY}"
        return "; ".join(reasons or [f"{self.describe(rank)} does not answer" for rank in sorted(silent)])

    def _collect_reports(self, key: str, messages: list[str]) -> set[int]:
        """Wait for the report of every other rank; return those that did not answer in time."""
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
        """Return True if a rank on this machine has no process any more; always False for other machines."""
        host, process = self.processes[rank]
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
