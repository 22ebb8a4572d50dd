"""Which image a sample counter stands for, and the batch that a run of counters makes.

The counter k = 0, 1, 2, ... counts samples since the beginning of training, over all ranks. Everything
about sample k is a function of (seed, k): order, flip, dropped label, and in the loop noise level and
noise. The state of the data is therefore one integer, `nimg`.
"""

import functools

import torch
from torch import Tensor

from gesso import keyed
from gesso.cond import Cond
from gesso.config import Run
from gesso.data.images import Images, to_float


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


class Batches:
    """x0 and conditions for any run of sample counters, on `device`; x0 of standard deviation sd."""

    def __init__(self, images: Images, run: Run, sd: float, device: torch.device):
        self.images, self.run, self.sd, self.device = images, run, sd, device
        self.dtype = getattr(torch, run.train.dtype)
        self.order = Order(len(images), run.train.seed)

    def __call__(self, counter: Tensor) -> tuple[Tensor, Cond]:
        """x0 (B, C, R, R) and the conditions of the samples `counter` (B,)."""
        seed, data = self.run.train.seed, self.run.data
        index = self.order(counter)
        pixels = self.images.pixels[index]
        if data.flip:
            mirrored = keyed.uniform(seed, counter, "flip")[:, 0] < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        x0 = to_float(pixels.to(self.device, non_blocking=True), data, self.sd, self.dtype)
        if not data.num_classes:
            return x0, Cond()
        kept = keyed.uniform(seed, counter, "label dropout")[:, 0] >= self.run.loss.label_dropout
        return x0, Cond(label=self.images.labels[index], has_semantic=kept).to(self.device)
