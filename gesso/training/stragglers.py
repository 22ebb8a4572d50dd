"""Detection of slow ranks, by the time that each spends waiting for data and computing."""

import statistics
import time

import torch
from torch import nn

from gesso import models
from gesso.training.trainer import Trainer

SLOWDOWN_THRESHOLD, MIN_TIME_SHARE = 1.5, 0.05
"""Thresholds of a slow rank: its busy time relative to the median, and the difference relative to the interval."""


class StragglerDetector:
    """Find ranks that were slower than the others since the last call.

    The busy time of a rank is the time that it waits for data and in forward passes, where it does not wait for other
    ranks. Forward passes are those of the network under DDP, and those of its middle block under FSDP, which gathers
    weights before each block. Compiled blocks are not measured.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.ranks, cfg = trainer, trainer.ranks, trainer.run.train
        self.pass_times: list[tuple] = []
        self.last_time, self.last_data_wait_s = time.perf_counter(), trainer.data_wait_s
        self.is_cuda = trainer.device.type == "cuda"
        if self.ranks.world_size == 1:
            return
        net = trainer.denoiser.net
        blocks = [*models.list_blocks(net)]
        module = net if cfg.sharding == "ddp" else blocks[len(blocks) // 2]
        if cfg.sharding == "ddp" or not cfg.compile:
            module.register_forward_pre_hook(self._on_forward_start)
            module.register_forward_hook(self._on_forward_end)

    def _timestamp(self) -> "float | torch.cuda.Event":
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _on_forward_start(self, module: nn.Module, arguments: object) -> None:
        self.pass_start = self._timestamp()

    def _on_forward_end(self, module: nn.Module, arguments: object, result: object) -> None:
        self.pass_times.append((self.pass_start, self._timestamp()))

    def __call__(self) -> dict[str, float]:
        """Return the busy time relative to the median of each slow rank, by name. All ranks must call it."""
        if self.ranks.world_size == 1:
            return {}
        elapsed = time.perf_counter() - self.last_time
        forward_s = sum(a.elapsed_time(b) / 1000 if self.is_cuda else b - a for a, b in self.pass_times)
        data_wait_s = self.trainer.data_wait_s - self.last_data_wait_s
        busy_seconds = self.ranks.all_gather(forward_s + data_wait_s, self.trainer.device)
        self.pass_times.clear()
        self.last_time, self.last_data_wait_s = time.perf_counter(), self.trainer.data_wait_s
        median = statistics.median_low(busy_seconds)
        return {
            name: round(seconds / median, 2)
            for name, seconds in zip(self.ranks.names, busy_seconds, strict=True)
            if seconds > SLOWDOWN_THRESHOLD * median > 0 and seconds - median > MIN_TIME_SHARE * elapsed
        }
