"""Which image a sample counter stands for, and the batch that a run of counters makes.

The counter k = 0, 1, 2, ... counts samples since the beginning of training, over all ranks. Everything
about sample k is a function of (seed, k): order, flip, dropped label, noise level, noise. The state of
the data is therefore one integer, `nimg`.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from gesso import keyed
from gesso.cond import Cond
from gesso.config import Run
from gesso.data.images import Images, to_float
from gesso.diffusion.process import Process


class Order:
    """Every epoch a permutation of 0..n-1: a pure function of (seed, epoch, position)."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._make)

    def _make(self, epoch: int) -> Tensor:
        # Sorting random 64-bit keys; a tie (n^2 / 2^64) falls to the lower index.
        high, low = keyed.words(self.seed, torch.arange(self.n), f"order of epoch {epoch}", 2).unbind(1)
        return ((high << 32) | low).argsort(stable=True)

    def __call__(self, counter: Tensor) -> Tensor:
        """(B,) counters -> (B,) indices into the data set."""
        epoch, position = counter // self.n, counter % self.n
        out = torch.empty_like(counter)
        for e in epoch.unique().tolist():
            here = epoch == e
            out[here] = self._permutation(e)[position[here]]
        return out


class Batch(NamedTuple):
    """x0 and eps (B, C, R, R), x0 of standard deviation sd; s (B,) noise levels; cond of B samples."""

    x0: Tensor
    s: Tensor
    eps: Tensor
    cond: Cond


class Batches:
    """The batch for any run of sample counters, on `device`."""

    def __init__(self, images: Images, run: Run, process: Process, device: torch.device):
        self.images, self.run, self.process, self.device = images, run, process, device
        self.dtype = getattr(torch, run.train.dtype)
        self.order = Order(len(images), run.train.seed)

    def __call__(self, first: int, count: int) -> Batch:
        """Samples first, first + 1, ..., first + count - 1."""
        seed, data = self.run.train.seed, self.run.data
        counter = torch.arange(first, first + count)
        index = self.order(counter)
        pixels = self.images.pixels[index]
        if data.flip:
            mirrored = keyed.uniform(seed, counter, "flip")[:, 0] < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        x0 = to_float(pixels.to(self.device, non_blocking=True), data, self.process.sd, self.dtype)
        s = self.process.quantile(keyed.uniform(seed, counter, "noise level")[:, 0])
        eps = keyed.normal(seed, counter.to(self.device), "noise", x0.shape[1:], self.dtype)
        cond = Cond()
        if data.num_classes:
            kept = keyed.uniform(seed, counter, "label dropout")[:, 0] >= self.run.loss.label_dropout
            cond = Cond(label=self.images.labels[index], has_semantic=kept).to(self.device)
        return Batch(x0, s.to(self.device, self.dtype), eps, cond)
