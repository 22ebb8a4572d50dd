"""Frechet distance of samples to random halves of the training images, for small data sets.

Its floor is the distance between the halves: the value that perfect samples would reach at this number of images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gesso import rng
from gesso.config import EvalConfig
from gesso.evaluation.feature_stats import Moments, features_to_stats
from gesso.evaluation.metrics.base import MetricInputs
from gesso.evaluation.metrics.frechet import frechet_distance


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the mean and standard deviation of the distance over eval.num_splits random halves."""
    samples, real = inputs.samples, inputs.reference.features
    moments = features_to_stats([samples.features]).moments
    halves = _random_halves(real, len(samples.features), inputs.config)
    return _mean_std(name, [(moments, second) for _, second in halves])


def floor(name: str, real: Tensor, num_samples: int, cfg: EvalConfig) -> dict[str, float]:
    """Return the mean and standard deviation of the distance between halves of features (N, D)."""
    return _mean_std(name, list(_random_halves(real, num_samples, cfg)))


def _random_halves(real: Tensor, num_samples: int, cfg: EvalConfig) -> Iterator[tuple[Moments, Moments]]:
    """Yield the moments of two disjoint sets of `num_samples` rows for each split."""
    for split in range(cfg.num_splits):
        bits = rng.random_bits(cfg.seed, torch.arange(len(real)), f"evaluation split {split}", 1)[:, 0]
        order = bits.argsort(stable=True)
        first, second = real[order[:num_samples]], real[order[num_samples : 2 * num_samples]]
        yield features_to_stats([first]).moments, features_to_stats([second]).moments


def _mean_std(name: str, pairs: list[tuple[Moments, Moments]]) -> dict[str, float]:
    values = [frechet_distance(a.mean, a.cov, b.mean, b.cov) for a, b in pairs]
    distances = torch.tensor(values, dtype=torch.float64)
    return {name: float(distances.mean()), f"{name}_std": float(distances.std(correction=0))}
