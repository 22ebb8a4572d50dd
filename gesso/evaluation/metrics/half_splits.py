"""Frechet distance of samples to random halves of the training images, for small data sets.

Its floor is the distance between the halves: the value that perfect samples would reach at this number of images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gesso import rng
from gesso.config import EvalConfig
from gesso.evaluation.feature_stats import Moments
from gesso.evaluation.metrics.base import MetricInputs
from gesso.evaluation.metrics.frechet import frechet_distance


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the mean and standard deviation of the distance over eval.num_splits random halves."""
    samples, real = inputs.samples.rows, inputs.reference_stats.rows
    moments = _moments(samples)
    halves = _random_halves(real, len(samples), inputs.config)
    return _mean_std(name, [_distance(moments, second) for _, second in halves])


def floor(name: str, real: Tensor, num_samples: int, cfg: EvalConfig) -> dict[str, float]:
    """Return the mean and standard deviation of the distance between halves of features (N, D)."""
    return _mean_std(name, [_distance(*halves) for halves in _random_halves(real, num_samples, cfg)])


def _random_halves(real: Tensor, num_samples: int, cfg: EvalConfig) -> Iterator[tuple[Moments, Moments]]:
    """Yield the moments of two disjoint sets of `num_samples` rows for each split."""
    for split in range(cfg.num_splits):
        bits = rng.random_bits(cfg.seed, torch.arange(len(real)), f"evaluation split {split}", 1)[:, 0]
        order = bits.argsort(stable=True)
        yield _moments(real[order[:num_samples]]), _moments(real[order[num_samples : 2 * num_samples]])


def _moments(features: Tensor) -> Moments:
    moments = Moments()
    moments.update(features)
    return moments


def _distance(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def _mean_std(name: str, distances: list[float]) -> dict[str, float]:
    values = torch.tensor(distances, dtype=torch.float64)
    return {name: float(values.mean()), f"{name}_std": float(values.std(correction=0))}
