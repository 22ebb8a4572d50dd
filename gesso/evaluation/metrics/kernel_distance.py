"""Kernel distance of two sets of features (KID)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gesso import rng
from gesso.config import EvalConfig
from gesso.errors import UsageError
from gesso.evaluation.metrics.base import Metric, MetricInputs

PUBLISHED_SUBSET_SIZE = 1000
"""Samples in a subset of KID (Binkowski et al. 2018)."""


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the kernel distance between samples and reference, and its standard deviation over subsets."""
    mean, std = kernel_distance(
        inputs.reference.features, inputs.samples.features, subset_size=inputs.config.kid_subset
    )
    return {name: mean, f"{name}_std": std}


def kernel_distance(
    real: Tensor, generated: Tensor, num_subsets: int = 100, subset_size: int = PUBLISHED_SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Return the mean and standard deviation over random subsets of the unbiased squared MMD.

    The kernel is (x.y/D + 1)^3 (KID, Binkowski et al. 2018). The value may be below zero.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        num_subsets: Number of subsets.
        subset_size: Samples of each set in a subset.
        seed: Seed of the subsets.

    Raises:
        UsageError: A set has fewer samples than a subset, or subsets have fewer than 2.
    """
    n = subset_size
    if n < 2 or min(len(real), len(generated)) < n:
        raise UsageError(
            f"kernel_distance takes subsets of 2 samples or more, and sets of at least that size; got subsets of {n}, "
            f"{len(real)} and {len(generated)} samples"
        )
    x, y = (torch.as_tensor(t).to("cpu", torch.float64) for t in (real, generated))
    distances = []
    for i in range(num_subsets):
        a, b = (
            t[
                rng.random_bits(seed, torch.arange(len(t)), f"kernel distance {label} {i}", 1)[:, 0].argsort(
                    stable=True
                )[:n]
            ]
            for label, t in (("real", x), ("made", y))
        )
        aa, bb, ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1))
        distances.append(float(within - 2 * ab.mean()))
    values = torch.tensor(distances, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def subset_size_note(metrics: Iterable[Metric], cfg: EvalConfig) -> list[str]:
    """Return a note if a kernel distance is computed with subsets of another size than published ones."""
    if cfg.kid_subset == PUBLISHED_SUBSET_SIZE or not any(metric.compute is compute for metric in metrics):
        return []
    return [f"note: kernel distances over subsets of {cfg.kid_subset:,}; published ones have {PUBLISHED_SUBSET_SIZE:,}"]


def check_subset_size(metrics: Iterable[Metric], cfg: EvalConfig, set_sizes: Sequence[int]) -> None:
    """Raise UsageError for a kernel distance of sets that are smaller than a subset."""
    names = [metric.name for metric in metrics if metric.compute is compute]
    if names and min(set_sizes) < cfg.kid_subset:
        raise UsageError(
            f"{names[0]} is a mean over subsets of {cfg.kid_subset:,} images, but one set has {min(set_sizes):,}: use "
            f"more images, or set eval.kid_subset (--kid-subset) to {min(set_sizes)} or less, which does not compare "
            "with published numbers"
        )
