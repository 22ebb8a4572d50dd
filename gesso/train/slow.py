"""Ranks that hold the others up, by name: what each waits for data and computes by itself, compared."""

import statistics
import time

import torch
from torch import nn

from gesso import nets
from gesso.train.trainer import Trainer

SLOW, SHARE = 1.5, 0.05
"""times the median rank, and share of the time between two lines of the log, from which a rank is named"""


class Slow:
    """Names ranks that took longer than others since it was last asked.

    A rank's own time is that of data it waited for and of forward passes, in which it waits for nobody: those of the
    network under DDP, those of its middle block where weights are gathered for each block. (Not measured of compiled blocks.)
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.ranks, cfg = trainer, trainer.ranks, trainer.run.train
        self.passes: list[tuple] = []
        self.since, self.waited = time.perf_counter(), trainer.waited
        self.cuda = trainer.device.type == "cuda"
        if self.ranks.world == 1:
            return
        net = trainer.denoiser.net
        blocks = [*nets.blocks(net)]
        module = net if cfg.sharding == "ddp" else blocks[len(blocks) // 2]
        if cfg.sharding == "ddp" or not cfg.compile:
            module.register_forward_pre_hook(self._begins)
            module.register_forward_hook(self._ends)

    def _now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begins(self, module: nn.Module, arguments: object) -> None:
        self.began = self._now()

    def _ends(self, module: nn.Module, arguments: object, result: object) -> None:
        self.passes.append((self.began, self._now()))

    def __call__(self) -> dict[str, float]:
        """Times the median by the name of the rank. All ranks take part."""
        if self.ranks.world == 1:
            return {}
        elapsed = time.perf_counter() - self.since
        computed = sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.passes)
        own = self.ranks.gathered(computed + self.trainer.waited - self.waited, self.trainer.device)
        self.passes.clear()
        self.since, self.waited = time.perf_counter(), self.trainer.waited
        median = statistics.median_low(own)
        return {
            name: round(seconds / median, 2)
            for name, seconds in zip(self.ranks.names, own, strict=True)
            if seconds > SLOW * median > 0 and seconds - median > SHARE * elapsed
        }
