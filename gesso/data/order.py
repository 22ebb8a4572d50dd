"""Which image a sample counter stands for."""

import functools

import torch
from torch import Tensor

from gesso import keyed


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
