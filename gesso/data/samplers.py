"""Which image a sample counter stands for: pure functions of (seed, epoch, position in the epoch).

    Order      any image after any other
    Windowed   only the images of a few shards of a cache at a time, for shards that are fetched from afar
    Grouped    batches of one group each, for pictures of several sizes
    Without    one of these over all images but those that are held out

All take counters (B,) int64, which may lie in several epochs, and return indices (B,). Any thread may call them.

Legend: n images, B counters, G groups.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gesso import rng
from gesso.errors import UsageError

MAX_STORED_PERMUTATION = 2**22
"""images; the permutation of more of them is not held in memory"""
FEISTEL_ROUNDS = 6
"""Luby and Rackoff 1988: 4 make a permutation that no test of few pairs tells from a random one"""


class KeyedPermutations:
    """Permutations of 0..n-1 keyed to (seed, purpose). The last `kept` that were sorted stay in memory."""

    def __init__(self, seed: int, cache_size: int = 2):
        self.seed = seed
        self._cached = functools.lru_cache(maxsize=cache_size)(self._compute)

    def __call__(self, n: int, purpose: str, position: Tensor) -> Tensor:
        """What stands at `position` (B,) of the permutation of 0..n-1."""
        if n > MAX_STORED_PERMUTATION:
            return feistel_permutation(n, self.seed, purpose, position)
        return self._cached(n, purpose)[position]

    def _compute(self, n: int, purpose: str) -> Tensor:
        # Sorting random 64-bit keys; a tie (n^2 / 2^64) falls to the lower index.
        high, low = rng.random_bits(self.seed, torch.arange(n), purpose, 2).unbind(1)
        return ((high << 32) | low).argsort(stable=True)


def feistel_permutation(n: int, seed: int, purpose: str, position: Tensor) -> Tensor:
    """As `Permutations`, computed for these positions alone; n from a few hundred to 2^61.

    A Feistel network on pairs (left, right) of an a x b rectangle of at least n places, with addition modulo a and b for
    exclusive or; what falls outside of 0..n-1 goes through it again (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains": generalized Feistel, cycle walking).
    """
    root = math.isqrt(n - 1) + 1
    a = min(
        range(root, root + 64), key=lambda a: -n % a
    )  # few places outside: a second turn takes as long as the first
    b = -(-n // a)
    place, outside = position, torch.ones_like(position, dtype=torch.bool)
    while outside.any():
        left, right = place[outside] // b, place[outside] % b
        for r in range(0, FEISTEL_ROUNDS, 2):
            left = (left + _feistel_round(a, seed, purpose, r, right)) % a
            right = (right + _feistel_round(b, seed, purpose, r + 1, left)) % b
        place = place.masked_scatter(outside, left * b + right)
        outside = place >= n
    return place


def _feistel_round(m: int, seed: int, purpose: str, r: int, half: Tensor) -> Tensor:
    """Uniform on 0..m-1 but for m / 2^32, a function of `half`; m below 2^31."""
    return rng.random_bits(seed, half | r << 32, purpose, 1)[:, 0] * m >> 32


class EpochShuffle:
    """Every epoch a permutation of 0..n-1."""

    def __init__(self, n: int, seed: int):
        self.n = n
        self._permutation = KeyedPermutations(seed)

    def __call__(self, sample_index: Tensor) -> Tensor:
        epoch, position = sample_index // self.n, sample_index % self.n
        out = torch.empty_like(sample_index)
        for e in epoch.unique().tolist():
            here = epoch == e
            out[here] = self._permutation(self.n, f"order of epoch {e}", position[here])
        return out


class ShardWindowShuffle:
    """Every epoch a permutation of 0..n-1 that needs few shards at a time.

    counts: images of each shard, in order. An epoch permutes the shards, takes `window` of them after another, and
    permutes the images of these together. Where a shard holds few classes, a batch has those of a window.

    span: images of the largest window there can be, so that `shards(k, k + span)` ends in the window after that of k.
    """

    def __init__(self, shard_sizes: Sequence[int], window: int, seed: int):
        self.shard_sizes = torch.as_tensor(shard_sizes, dtype=torch.int64)
        self.window = min(window, len(self.shard_sizes))
        self.n = int(self.shard_sizes.sum())
        self.max_window_size = int(self.shard_sizes.sort(descending=True).values[: self.window].sum())
        self._shard_start = self.shard_sizes.cumsum(0) - self.shard_sizes  # image of each shard
        self._permutation = KeyedPermutations(seed)
        self._epoch_plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def _plan_epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shards as the epoch comes to them, (S,); where each of them and where each window ends in the epoch."""
        number = len(self.shard_sizes)
        shard = self._permutation(number, f"shards of epoch {epoch}", torch.arange(number))
        end = self.shard_sizes[shard].cumsum(0)
        return shard, end, torch.cat([end[self.window - 1 : -1 : self.window], end[-1:]])

    def __call__(self, sample_index: Tensor) -> Tensor:
        epoch, position = sample_index // self.n, sample_index % self.n
        out = torch.empty_like(sample_index)
        for e in epoch.unique().tolist():
            shard, end, window_end = self._epoch_plan(e)
            window = torch.searchsorted(window_end, position, right=True)
            for w in window[epoch == e].unique().tolist():
                here = (epoch == e) & (window == w)
                start = int(window_end[w - 1]) if w else 0
                size = int(window_end[w]) - start
                # The place in the epoch were only shards permuted, not images.
                place = start + self._permutation(size, f"order of epoch {e}, window {w}", position[here] - start)
                slot = torch.searchsorted(end, place, right=True)
                out[here] = self._shard_start[shard[slot]] + place - (end[slot] - self.shard_sizes[shard[slot]])
        return out

    def shards_for(self, first: int, stop: int) -> list[int]:
        """Shards of the windows in which the samples first..stop-1 lie, those of the earlier windows first."""
        found: dict[int, None] = {}
        while first < stop:
            epoch, position = divmod(first, self.n)
            shard, _, window_end = self._epoch_plan(epoch)
            w = int(torch.searchsorted(window_end, position, right=True))
            found |= dict.fromkeys(shard[w * self.window : (w + 1) * self.window].tolist())
            first = epoch * self.n + int(window_end[w])
        return list(found)


class BucketSampler:
    """Batches of one group each: the counters j * batch_size ... (j + 1) * batch_size - 1 are images of one group.

    group: (N,) int, the group of each image. An epoch permutes each group, cuts it into whole batches, and permutes the
    batches of all. What is less than a batch sits out the epoch, other images each time.

    n: samples of an epoch. left_out: group -> its images, of the groups that never fill a batch.

    Raises UsageError when no group fills a batch.
    """

    def __init__(self, bucket: Tensor | Sequence[int], batch_size: int, seed: int):
        bucket = torch.as_tensor(bucket, dtype=torch.int64)
        sizes = bucket.bincount()
        self.left_out = {g: size for g, size in enumerate(sizes.tolist()) if 0 < size < batch_size}
        if sizes.max() < batch_size:
            raise UsageError(
                f"no bucket fills a batch: train.batch_size={batch_size}, and the largest has {int(sizes.max())} images; "
                "choose smaller batches, or fewer buckets"
            )
        self.batch_size = batch_size
        self._members = bucket.argsort(stable=True).split(sizes.tolist())
        self._batch_end = (sizes // batch_size).cumsum(0)
        self.num_batches = int(self._batch_end[-1])
        self.n = self.num_batches * batch_size
        # Every group comes in turn, so each keeps its permutation of this epoch and the next.
        self._permutation = KeyedPermutations(seed, cache_size=2 * len(sizes) + 2)

    def __call__(self, sample_index: Tensor) -> Tensor:
        epoch, batch = sample_index // self.n, sample_index % self.n // self.batch_size
        out = torch.empty_like(sample_index)
        for e in epoch.unique().tolist():
            now = epoch == e
            drawn = self._permutation(self.num_batches, f"batches of epoch {e}", batch[now])
            group = torch.searchsorted(self._batch_end, drawn, right=True)
            before = torch.cat([torch.zeros_like(self._batch_end[:1]), self._batch_end])[group]
            position = (drawn - before) * self.batch_size + sample_index[now] % self.batch_size
            image = torch.empty_like(position)
            for g in group.unique().tolist():
                members, here = self._members[g], group == g
                image[here] = members[self._permutation(len(members), f"order of epoch {e}, group {g}", position[here])]
            out[now] = image
        return out


def select_validation(n: int, count: int) -> Tensor:
    """(count,) int64, rising: which of n images are kept from training, whatever its seed."""
    return KeyedPermutations(0)(n, "held out", torch.arange(count)).sort().values


class ExcludeIndices:
    """An order of n - k images as one of all n without those that are held (k,), rising."""

    def __init__(self, base: EpochShuffle | ShardWindowShuffle | BucketSampler, excluded: Tensor):
        self.base = base
        self._shift_thresholds = excluded - torch.arange(len(excluded))

    def __call__(self, sample_index: Tensor) -> Tensor:
        place = self.base(sample_index)
        return place + torch.searchsorted(self._shift_thresholds, place, right=True)
