"""Precision, recall, density and coverage: counts of samples among the nearest neighbours of others.

Legend: N real and M generated samples, D features. The ball of a sample reaches to its k-th nearest neighbour in its
own set.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso.errors import UsageError
from gesso.evaluation.metrics.base import MetricInputs

MAX_NEIGHBOUR_SAMPLES = 10_000
"""Reference images that are compared with all samples for precision and recall, as in ADM's evaluator; density and
coverage use this many of each set (Naeem et al. 2020)."""


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return precision and recall (k = 3), density and coverage (k = 5)."""
    device = _float64_device(inputs.network)
    real, generated = (shuffle(stats.features).to(device) for stats in (inputs.reference, inputs.samples))
    real = real[:MAX_NEIGHBOUR_SAMPLES]
    at_3 = precision_recall(real, generated, 3)
    at_5 = precision_recall(real, generated[:MAX_NEIGHBOUR_SAMPLES], 5)
    suffix = name.removeprefix("pr")
    return {
        f"precision{suffix}": at_3.precision, f"recall{suffix}": at_3.recall,
        f"density{suffix}": at_5.density, f"coverage{suffix}": at_5.coverage,
    }  # fmt: skip


class PrecisionRecall(NamedTuple):
    """Counts of samples in balls, as shares.

    Attributes:
        precision: Share of generated samples inside the ball of a real one (Kynkaanniemi et al. 2019).
        recall: Share of real samples inside the ball of a generated one.
        density: Mean number of real balls that a generated sample is in, over k (Naeem et al. 2020).
        coverage: Share of real balls with a generated sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, chunk_size: int = 1024) -> PrecisionRecall:
    """Return precision, recall, density and coverage. Memory grows with chunk_size * (N + M).

    Args:
        real: Features (N, D), N > k.
        generated: Features (M, D), M > k.
        k: Number of neighbours; the papers have 3 for precision and recall, 5 for density and coverage.
        chunk_size: Rows of a block of distances.

    Raises:
        UsageError: A set has k samples or fewer.
    """
    if min(len(real), len(generated)) <= k:
        raise UsageError(f"neighbours at k={k} need more samples than {min(len(real), len(generated))}")
    real, generated = real.double(), generated.double().to(real.device)
    radius_real, radius_generated = _knn_radii(real, k, chunk_size), _knn_radii(generated, k, chunk_size)
    recalled, covered = [], []
    num_balls = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    for start, distances in _squared_distances(real, generated, chunk_size):
        inside = distances <= radius_real[start : start + len(distances), None]  # (n, M)
        num_balls += inside.sum(dim=0)
        recalled.append((distances <= radius_generated).any(dim=1))
        covered.append(inside.any(dim=1))
    recall, coverage = (float(torch.cat(parts).double().mean()) for parts in (recalled, covered))
    precision, density = float((num_balls > 0).double().mean()), float(num_balls.double().mean() / k)
    return PrecisionRecall(precision, recall, density, coverage)


def shuffle(features: Tensor) -> Tensor:
    """Return features in a fixed random order, as sets are often sorted by class."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]


def _float64_device(network: nn.Module | None) -> torch.device:
    """Return the device of a network if it supports float64, else the CPU."""
    parameters = network.parameters() if network else iter(())
    device = next((p.device for p in parameters), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device


def _knn_radii(x: Tensor, k: int, chunk_size: int) -> Tensor:
    """Return the squared distance (N,) of each sample to its k-th nearest other sample."""
    radii = []
    for start, distances in _squared_distances(x, x, chunk_size):
        diagonal = torch.arange(len(distances), device=x.device)
        distances[diagonal, start + diagonal] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, squared distances (n, M)) of blocks of rows."""
    for start in range(0, len(a), chunk_size):
        rows = a[start : start + chunk_size]
        squared = rows.square().sum(dim=1)[:, None] - 2 * rows @ b.T + b.square().sum(dim=1)
        yield start, squared.clamp(min=0)
