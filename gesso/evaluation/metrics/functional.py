"""Moments, Frechet and kernel distance, inception score, class agreement, nearest images: no network, no files.

N samples, D features; moments and distances in float64 on the CPU.
"""

import torch
from torch import Tensor

from gesso import rng
from gesso.errors import RunError, UsageError


class Moments:
    """Streaming mean and unbiased covariance: the same for every way to cut the samples into batches.

    Batches are joined by Chan, Golub and LeVeque (1979), on centred sums, so that a large mean does not
    cancel a small covariance.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D), sum of (x - mean)(x - mean)^T

    @classmethod
    def from_mean_cov(cls, mean: Tensor, cov: Tensor, n: int = 2) -> "Moments":
        """Of a mean (D,) and an unbiased covariance (D, D) of n samples; where n is not known they serve alone."""
        moments = cls()
        moments.n, moments._mean, moments._scatter = n, mean.double(), cov.double() * (n - 1)
        return moments

    def update(self, features: Tensor) -> None:
        """Add features (N, D), N >= 0. Raises RunError on NaN or infinity, UsageError on another shape or D."""
        x = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if x.ndim != 2:
            raise UsageError(f"Moments takes features of shape (N, D); got {tuple(x.shape)}")
        bad = int((~x.isfinite()).any(dim=1).sum())
        if bad:
            raise RunError(
                f"{bad} of {len(x)} feature vectors hold NaN or infinity (after {self.n} good ones): "
                f"the images or the feature network that made them diverged"
            )
        if len(x):
            mean = x.mean(dim=0)
            centred = x - mean
            self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Add all samples of `other`, which stays as it is. Raises UsageError when D differs."""
        if other._mean is not None and other._scatter is not None:
            self._merge(other.n, other._mean, other._scatter)

    @property
    def mean(self) -> Tensor:
        """(D,) float64. Raises RunError before the first sample."""
        if self._mean is None:
            raise RunError("no mean: no features were added")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """(D, D) float64, divided by n - 1. Raises RunError below two samples."""
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


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), squared 2-Wasserstein distance of two Gaussians.

    Dowson and Landau (1982). Means (D,), covariances (D, D) of any rank. Raises RunError on NaN or infinity,
    UsageError on shapes that do not fit together.
    """
    m1, c1, m2, c2 = (torch.as_tensor(t).detach().to("cpu", torch.float64) for t in (mean1, cov1, mean2, cov2))
    d = m1.shape[0] if m1.ndim == 1 else 0
    if d == 0 or m2.shape != (d,) or c1.shape != (d, d) or c2.shape != (d, d):
        shapes = ", ".join(str(tuple(t.shape)) for t in (m1, c1, m2, c2))
        raise UsageError(f"frechet_distance takes means (D,) and covariances (D, D); got {shapes}")
    for what, tensor in {"mean1": m1, "cov1": c1, "mean2": m2, "cov2": c2}.items():
        if not tensor.isfinite().all():
            raise RunError(f"no Frechet distance: {what} holds NaN or infinity")
    # tr (C1 C2)^(1/2) sums the roots of the eigenvalues of S1 C2 S1 = (S1 S2)(S1 S2)^T with S = C^(1/2):
    # the singular values of S1 S2. Taken there, a rank-deficient C costs an error of eps, not of sqrt(eps).
    trace_root = torch.linalg.svdvals(_sqrtm_psd(c1) @ _sqrtm_psd(c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * trace_root
    return max(float(distance), 0.0)


def _sqrtm_psd(cov: Tensor) -> Tensor:
    """Symmetric square root (D, D). Eigenvalues within rounding of zero, or below it, count as zero."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    rounding = len(values) * torch.finfo(cov.dtype).eps * values[-1].clamp(min=0)
    roots = torch.where(values > rounding, values, 0).sqrt()
    return (vectors * roots) @ vectors.T


KID_SUBSET_SIZE = 1000
"""samples of a subset of KID (Binkowski et al. 2018)"""


def kernel_distance(
    real: Tensor, generated: Tensor, num_subsets: int = 100, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): the squared maximum mean discrepancy under the kernel (x.y/D + 1)^3, unbiased.

    real (N, D), made (M, D) -> mean and standard deviation over `subsets` random ones of `size` samples. May be below zero.
    Raises UsageError for fewer samples than a subset has, and for subsets of one.
    """
    n = subset_size
    if n < 2 or min(len(real), len(generated)) < n:
        raise UsageError(
            f"kernel_distance takes subsets of 2 samples or more, and as many of each set; got subsets of {n}, {len(real)} and "
            f"{len(generated)} samples"
        )
    x, y = (torch.as_tensor(t).to("cpu", torch.float64) for t in (real, generated))
    found = []
    for i in range(num_subsets):
        a, b = (
            t[
                rng.random_bits(seed, torch.arange(len(t)), f"kernel distance {what} {i}", 1)[:, 0].argsort(
                    stable=True
                )[:n]
            ]
            for what, t in (("real", x), ("made", y))
        )
        aa, bb, ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1))
        found.append(float(within - 2 * ab.mean()))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(probabilities: Tensor, num_splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016). (N, K) -> mean and standard deviation over `splits` runs of samples.

    Samples are to be in random order. Raises UsageError for fewer samples than splits.
    """
    if len(probabilities) < num_splits:
        raise UsageError(
            f"inception_score takes at least one sample for each of {num_splits} splits; got {len(probabilities)}"
        )
    p = probabilities.to("cpu", torch.float64)
    parts = [p[len(p) * i // num_splits : len(p) * (i + 1) // num_splits] for i in range(num_splits)]
    scores = []
    for part in parts:
        # KL(p || m) = sum p log p - sum p log m, with 0 log 0 = 0.
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(dim=0))
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose most likely class is the one asked for, 0 to 1. Logits (N, K), labels (N,), N >= 1.

    Raises RunError on NaN, UsageError on other shapes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise UsageError(
            f"class_agreement takes logits (N, K) and labels (N,), N >= 1; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.isnan().any():
        bad = int(logits.isnan().any(dim=1).sum())
        raise RunError(f"no class agreement: the logits of {bad} of {len(logits)} images hold NaN")
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


def nearest_images(images: Tensor, reference: Tensor, chunk_size: int = 1024) -> Tensor:
    """Index of the reference image nearest to each image in pixel L2, the first one among equals.

    Images uint8 (N, ...), reference uint8 (M, ...) of the same image shape, M >= 1 -> int64 (N,), on the
    device of `images`, which must know float64. Memory grows with chunk^2 and chunk * pixels.
    Raises UsageError on other dtypes or shapes.
    """
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8:
        raise UsageError(f"nearest compares uint8 pixels; got {images.dtype} and {reference.dtype}")
    if images.shape[1:] != reference.shape[1:] or len(reference) == 0:
        raise UsageError(f"nearest: {tuple(images.shape)} images do not compare with {tuple(reference.shape)}")
    # |a - b|^2 = |a|^2 - 2ab + |b|^2 is a sum of integers: exact in float64, so equal images stay equal.
    indices = [
        _nearest_in_chunks(a.flatten(1).double(), reference, chunk_size) for a in images.split(chunk_size) if len(a)
    ]
    return torch.cat(indices) if indices else torch.empty(0, dtype=torch.int64, device=images.device)


def _nearest_in_chunks(a: Tensor, reference: Tensor, chunk_size: int) -> Tensor:
    """a (N, P) float64 -> (N,) int64."""
    best = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    for start in range(0, len(reference), chunk_size):
        b = reference[start : start + chunk_size].to(a.device).flatten(1).double()
        distances = b.square().sum(dim=1) - 2 * a @ b.T  # |a|^2 is the same for every b
        value = distances.min(dim=1).values
        # argmax of a mask of 0 and 1: min() on its own does not promise the first of equals.
        first = (distances == value[:, None]).byte().argmax(dim=1) + start
        closer = value < best
        best, index = torch.where(closer, value, best), torch.where(closer, first, index)
    return index
