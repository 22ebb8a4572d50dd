"""Samplers that map sample indices to image indices: pure functions of (seed, epoch, position in the epoch).

    EpochShuffle        shuffles all images
    ShardWindowShuffle  shuffles within a few shards of a cache at a time, for shards at an address
    BucketSampler       makes batches of images of one bucket, for images of several sizes
    ExcludeIndices      applies one of these to all images except the validation images

All take sample indices (B,) int64, which may span epochs, and return image indices (B,). They are thread-safe.

Legend: n images, B samples, S shards.
"""

import abc
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gesso import rng
from gesso.errors import UsageError

MAX_STORED_PERMUTATION = 2**22
"""Number of images above which the permutation is computed per position instead of stored."""
FEISTEL_ROUNDS = 6
"""Number of rounds; after 4, few pairs cannot distinguish it from a random permutation (Luby and Rackoff 1988)."""


class KeyedPermutations:
    """Permutations of 0..n-1 keyed to (seed, purpose); the last `max_stored` of them stay in memory."""

    def __init__(self, seed: int, max_stored: int = 2):
        self.seed = seed
        self._stored = functools.lru_cache(maxsize=max_stored)(self._compute)

    def __call__(self, n: int, purpose: str, position: Tensor) -> Tensor:
        """Return the elements (B,) at `position` (B,) of the permutation of 0..n-1."""
        if n > MAX_STORED_PERMUTATION:
            return feistel_permutation(n, self.seed, purpose, position)
        return self._stored(n, purpose)[position]

    def _compute(self, n: int, purpose: str) -> Tensor:
        # Sort random 64-bit keys; in a tie (probability n^2 / 2^64) the lower index comes first.
        high, low = rng.random_bits(self.seed, torch.arange(n), purpose, 2).unbind(1)
        return ((high << 32) | low).argsort(stable=True)


def feistel_permutation(n: int, seed: int, purpose: str, position: Tensor) -> Tensor:
    """Return the elements (B,) at `position` (B,) of a permutation of 0..n-1 without storing it.

    A Feistel network on pairs (left, right) in a x b >= n, with addition modulo a and b in place of exclusive or.
    Values outside 0..n-1 pass through it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains":
    generalized Feistel, cycle walking). n is from a few hundred to 2^61.
    """
    root = math.isqrt(n - 1) + 1
    a = min(range(root, root + 64), key=lambda a: -n % a)  # few values outside, as each needs another pass
    b = -(-n // a)
    value, outside = position, torch.ones_like(position, dtype=torch.bool)
    while outside.any():
        left, right = value[outside] // b, value[outside] % b
        for r in range(0, FEISTEL_ROUNDS, 2):
            left = (left + _feistel_round(a, seed, purpose, r, right)) % a
            right = (right + _feistel_round(b, seed, purpose, r + 1, left)) % b
        value = value.masked_scatter(outside, left * b + right)
        outside = value >= n
    return value


def _feistel_round(m: int, seed: int, purpose: str, r: int, half: Tensor) -> Tensor:
    """Return a keyed function of `half`, uniform on 0..m-1 up to a bias of m / 2^32; m < 2^31."""
    return rng.random_bits(seed, half | r << 32, purpose, 1)[:, 0] * m >> 32


class EpochSampler(abc.ABC):
    """Sampler with epochs of `n` samples."""

    n: int

    def __call__(self, sample_index: Tensor) -> Tensor:
        """Map sample indices (B,) to image indices (B,)."""
        epoch, position = sample_index // self.n, sample_index % self.n
        out = torch.empty_like(sample_index)
        for e in epoch.unique().tolist():
            mask = epoch == e
            out[mask] = self.epoch_images(e, position[mask])
        return out

    @abc.abstractmethod
    def epoch_images(self, epoch: int, position: Tensor) -> Tensor:
        """Return the image indices (B,) at `position` (B,), 0..n-1, of an epoch."""


class EpochShuffle(EpochSampler):
    """Shuffle in which every epoch is a new permutation of 0..n-1."""

    def __init__(self, n: int, seed: int):
        self.n = n
        self._permutation = KeyedPermutations(seed)

    def epoch_images(self, epoch: int, position: Tensor) -> Tensor:
        """Return the image indices (B,) at `position` (B,) of an epoch."""
        return self._permutation(self.n, f"order of epoch {epoch}", position)


class ShardWindowShuffle(EpochSampler):
    """Shuffle in which every epoch is a permutation of 0..n-1 that needs few shards at a time.

    An epoch permutes the shards, divides them into windows, and permutes the images within each window. If a shard
    contains few classes, so do the batches of a window.

    Args:
        shard_sizes: Number of images of each shard, in order.
        window: Number of shards of a window.
        seed: Seed of the shuffle.

    Attributes:
        max_window_size: Images of the largest possible window: `shards_for(k, k + max_window_size)` includes at least
            the start of the window after that of sample k.
    """

    def __init__(self, shard_sizes: Sequence[int], window: int, seed: int):
        self.shard_sizes = torch.as_tensor(shard_sizes, dtype=torch.int64)
        self.window = min(window, len(self.shard_sizes))
        self.n = int(self.shard_sizes.sum())
        self.max_window_size = int(self.shard_sizes.sort(descending=True).values[: self.window].sum())
        self._shard_start = self.shard_sizes.cumsum(0) - self.shard_sizes  # index of the first image of each shard
        self._permutation = KeyedPermutations(seed)
        self._epoch_plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def _plan_epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the order of the shards (S,), and the positions at which each shard and each window ends."""
        S = len(self.shard_sizes)
        shard = self._permutation(S, f"shards of epoch {epoch}", torch.arange(S))
        end = self.shard_sizes[shard].cumsum(0)
        return shard, end, torch.cat([end[self.window - 1 : -1 : self.window], end[-1:]])

    def epoch_images(self, epoch: int, position: Tensor) -> Tensor:
        """Return the image indices (B,) at `position` (B,) of an epoch."""
        shard, end, window_end = self._epoch_plan(epoch)
        window = torch.searchsorted(window_end, position, right=True)
        out = torch.empty_like(position)
        for w in window.unique().tolist():
            mask = window == w
            start = int(window_end[w - 1]) if w else 0
            purpose = f"order of epoch {epoch}, window {w}"
            # Position in the epoch before the images are permuted within the window.
            unshuffled = start + self._permutation(int(window_end[w]) - start, purpose, position[mask] - start)
            slot = torch.searchsorted(end, unshuffled, right=True)
            start_in_epoch = end[slot] - self.shard_sizes[shard[slot]]
            out[mask] = self._shard_start[shard[slot]] + unshuffled - start_in_epoch
        return out

    def shards_for(self, first: int, stop: int) -> list[int]:
        """Return the shards of the windows that contain the samples first..stop-1, in order of use."""
        shards: dict[int, None] = {}
        while first < stop:
            epoch, position = divmod(first, self.n)
            shard, _, window_end = self._epoch_plan(epoch)
            w = int(torch.searchsorted(window_end, position, right=True))
            shards |= dict.fromkeys(shard[w * self.window : (w + 1) * self.window].tolist())
            first = epoch * self.n + int(window_end[w])
        return list(shards)


class BucketSampler(EpochSampler):
    """Sampler whose batches, samples j * batch_size to (j + 1) * batch_size - 1, are images of one bucket.

    An epoch shuffles each bucket, cuts it into full batches, and shuffles all batches. The remainder of a bucket is
    skipped in this epoch; it differs between epochs.

    Args:
        bucket: (n,) int, the bucket of each image.
        batch_size: Samples of a batch.
        seed: Seed of the shuffle.

    Attributes:
        n: Number of samples of an epoch.
        unused: Number of images by bucket, for buckets smaller than a batch.

    Raises:
        UsageError: No bucket fills a batch.
    """

    def __init__(self, bucket: Tensor | Sequence[int], batch_size: int, seed: int):
        bucket = torch.as_tensor(bucket, dtype=torch.int64)
        sizes = bucket.bincount()
        self.unused = {g: size for g, size in enumerate(sizes.tolist()) if 0 < size < batch_size}
        if sizes.max() < batch_size:
            raise UsageError(
                f"no bucket fills a batch: train.batch_size={batch_size}, and the largest bucket has "
                f"{int(sizes.max())} images; set a smaller train.batch_size, or write a cache with fewer buckets"
            )
        self.batch_size = batch_size
        self._members = bucket.argsort(stable=True).split(sizes.tolist())
        self._batch_end = (sizes // batch_size).cumsum(0)
        self.num_batches = int(self._batch_end[-1])
        self.n = self.num_batches * batch_size
        # Batches alternate between buckets: store the permutations of two epochs for each.
        self._permutation = KeyedPermutations(seed, max_stored=2 * len(sizes) + 2)

    def epoch_images(self, epoch: int, position: Tensor) -> Tensor:
        """Return the image indices (B,) at `position` (B,) of an epoch."""
        batch = self._permutation(self.num_batches, f"batches of epoch {epoch}", position // self.batch_size)
        bucket = torch.searchsorted(self._batch_end, batch, right=True)
        batch_start = torch.cat([torch.zeros_like(self._batch_end[:1]), self._batch_end])[bucket]
        position = (batch - batch_start) * self.batch_size + position % self.batch_size  # within the bucket
        out = torch.empty_like(position)
        for g in bucket.unique().tolist():
            members, mask = self._members[g], bucket == g
            out[mask] = members[self._permutation(len(members), f"order of epoch {epoch}, group {g}", position[mask])]
        return out


def select_validation(n: int, count: int) -> Tensor:
    """Return the `count` of n images that form the validation set, int64, ascending; independent of the seed."""
    return KeyedPermutations(0)(n, "held out", torch.arange(count)).sort().values


class ExcludeIndices:
    """Sampler that applies `base`, over n - k images, to all n images except `excluded` (k,), ascending."""

    def __init__(self, base: EpochSampler, excluded: Tensor):
        self.base = base
        self._shift_thresholds = excluded - torch.arange(len(excluded))

    def __call__(self, sample_index: Tensor) -> Tensor:
        """Map sample indices (B,) to image indices (B,)."""
        index = self.base(sample_index)
        return index + torch.searchsorted(self._shift_thresholds, index, right=True)


SampleOrder = EpochSampler | ExcludeIndices
