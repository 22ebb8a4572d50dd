"""Features of image sets: moments and, where a metric needs them, the features of every image.

Statistics of reference images are cached by the fingerprint of the images and of the network's weights.

Legend: B images in a batch, N images in a set, D features.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso import atomic_io
from gesso.errors import RunError, UsageError
from gesso.evaluation.image_sets import ImageSet
from gesso.evaluation.networks.base import FeatureNetwork, SampleConditions
from gesso.evaluation.networks.clip_dino import CLIPScore
from gesso.safetensors_io import read_tensors

ProgressCallback = Callable[[int, int], None]
"""Receives (images done, images in total)."""


class Moments:
    """Streaming mean and unbiased covariance, which do not depend on how samples are cut into batches.

    Batches are merged on centered sums (Chan, Golub and LeVeque 1979), so that a large mean does not cancel a small
    covariance.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D), sum of (x - mean)(x - mean)^T

    @classmethod
    def from_mean_cov(cls, mean: Tensor, cov: Tensor, n: int = 2) -> "Moments":
        """Return the moments of n samples with a mean (D,) and an unbiased covariance (D, D).

        The default of n is for an unknown number of samples; such moments cannot be merged.
        """
        moments = cls()
        moments.n, moments._mean, moments._scatter = n, mean.double(), cov.double() * (n - 1)
        return moments

    def update(self, features: Tensor) -> None:
        """Add features (N, D), N >= 0.

        Raises:
            RunError: A feature is NaN or infinite.
            UsageError: The shape is not (N, D), or D differs from that of earlier features.
        """
        x = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if x.ndim != 2:
            raise UsageError(f"Moments takes features of shape (N, D); got {tuple(x.shape)}")
        num_bad = int((~x.isfinite()).any(dim=1).sum())
        if num_bad:
            raise RunError(
                f"{num_bad} of {len(x)} feature vectors have NaN or infinity (after {self.n} finite ones): "
                "the images or the feature network diverged"
            )
        if len(x):
            mean = x.mean(dim=0)
            centered = x - mean
            self._merge(len(x), mean, centered.T @ centered)

    def merge(self, other: "Moments") -> None:
        """Add all samples of `other`. Raises UsageError if D differs."""
        if other._mean is not None and other._scatter is not None:
            self._merge(other.n, other._mean, other._scatter)

    @property
    def mean(self) -> Tensor:
        """Mean (D,) float64. Raises RunError before the first sample."""
        if self._mean is None:
            raise RunError("no mean: no features were added")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (D, D) float64. Raises RunError below two samples."""
        if self._scatter is None or self.n < 2:
            raise RunError(f"no covariance: it takes at least 2 samples, and {self.n} were added")
        return self._scatter / (self.n - 1)

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.n, self._mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise UsageError(f"features of width {len(mean)} added to Moments of width {len(self._mean)}")
        total = self.n + n
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.n = total


class FeatureStats(NamedTuple):
    """Statistics of the features of an image set: moments, and features (N, D) float32; (0,) if they are not kept."""

    moments: Moments
    features: Tensor = torch.empty(0)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the stored file; the covariance of a single image is 0."""
        mean, n = self.moments.mean, self.moments.n
        cov = self.moments.cov if n > 1 else mean.new_zeros(len(mean), len(mean))
        tensors = {"mean": mean, "cov": cov, "n": torch.tensor(n)}
        return tensors | {"rows": self.features} if len(self.features) else tensors


def features_to_stats(parts: Iterable[Tensor]) -> FeatureStats:
    """Return the statistics of features in parts (n, D)."""
    moments, features = Moments(), list(parts)
    for part in features:
        moments.update(part)
    return FeatureStats(moments, torch.cat(features))


def load_stats(path: Path) -> FeatureStats:
    """Return statistics from a file. Raises RunError if it is damaged."""
    try:
        tensors = read_tensors(path)
        moments = Moments.from_mean_cov(tensors["mean"], tensors["cov"], int(tensors["n"]))
        return FeatureStats(moments, tensors.get("rows", torch.empty(0)))
    except (RunError, LookupError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it and run again") from None


def merge_stats(parts: Iterable[FeatureStats]) -> FeatureStats:
    """Return the statistics of all sets together, in order."""
    moments, features = Moments(), []
    for part in parts:
        moments.merge(part.moments)
        features.append(part.features)
    return FeatureStats(moments, torch.cat(features))


class Progress:
    """Count images over several sets for a progress callback."""

    def __init__(self, callback: ProgressCallback, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, n: int) -> None:
        """Add n images."""
        self.done += n
        self.callback(self.done, self.total)


@torch.no_grad()
def compute_stats(
    images: ImageSet,
    network: FeatureNetwork,
    batch_size: int,
    keep_features: bool,
    device: torch.device | str,
    progress: Callable[[int], None],
    indices: range | None = None,
) -> FeatureStats:
    """Return the statistics of all images, or of a range of them. Raises RunError if features are not finite."""
    indices = range(images.num_images) if indices is None else indices
    moments, features, start = Moments(), [], indices.start
    captions = images.captions() if isinstance(network, CLIPScore) else None
    for batch in images.batches(batch_size, indices.start, indices.stop):
        stop = start + len(batch)
        rows = network.extract_features(batch.to(device), SampleConditions(None, captions and captions[start:stop]))
        moments.update(rows)
        start = stop
        if keep_features:
            features.append(rows)
        progress(len(batch))
    return FeatureStats(moments, torch.cat(features) if keep_features else torch.empty(0))


def save_stats(path: Path, stats: FeatureStats) -> None:
    """Write statistics to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_io.atomic_file(path) as temporary:
        save_file(stats.to_tensors(), temporary)


def reference_cache_path(reference: ImageSet, network: FeatureNetwork, needs_features: bool) -> Path:
    """Return the cache file of a reference under a network; `needs_features`: with the features of every image."""
    identity = {"pictures": reference.fingerprint, "network": network.name, "weights": _weights_digest(network)}
    if stamp := reference.source.stamp():  # replaced files have other statistics, though their names and sizes agree
        identity["stamp"] = stamp
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return atomic_io.cache_dir("statistics") / f"{key}{'-rows' if needs_features else ''}.safetensors"


def reference_stats(
    reference: ImageSet,
    network: FeatureNetwork,
    needs_features: bool,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], None],
) -> FeatureStats:
    """Return the statistics of a reference, from the cache if they are there."""
    path = reference_cache_path(reference, network, needs_features)
    if path.is_file():
        progress(reference.num_images)
        return load_stats(path)
    stats = compute_stats(reference, network, batch_size, needs_features, device, progress)
    save_stats(path, stats)
    return stats


def _weights_digest(network: nn.Module) -> str:
    """Return a hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
