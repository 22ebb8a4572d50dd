"""Precision, recall, density and coverage: where samples lie among the nearest neighbours of others.

Legend: N real and M made samples, D features. A sample's ball reaches to its k-th nearest neighbour of its own kind.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.errors import UsageError


class PrecisionRecall(NamedTuple):
    """precision, recall: share of made (real) samples inside a ball of a real (made) one (Kynkaanniemi et al. 2019);
    density: real balls that a made sample is in, over k; coverage: share of real balls with a made sample (Naeem et al.
    2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, chunk_size: int = 1024) -> PrecisionRecall:
    """real (N, D), made (M, D), both with more than k samples. Memory grows with chunk * (N + M).

    The papers have k = 3 for precision and recall, k = 5 for density and coverage. Raises UsageError for k or fewer.
    """
    if min(len(real), len(generated)) <= k:
        raise UsageError(f"neighbours at k={k} need more samples than {min(len(real), len(generated))}")
    real, generated = real.double(), generated.double().to(real.device)
    radius_real, radius_made = _knn_radii(real, k, chunk_size), _knn_radii(generated, k, chunk_size)
    inside, covered = [], []
    per_made = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    for start, distances in _squared_distances(real, generated, chunk_size):
        balls = distances <= radius_real[start : start + len(distances), None]  # (n, M)
        per_made += balls.sum(dim=0)
        inside.append((distances <= radius_made).any(dim=1))
        covered.append(balls.any(dim=1))
    recall, coverage = (float(torch.cat(found).double().mean()) for found in (inside, covered))
    return PrecisionRecall(float((per_made > 0).double().mean()), recall, float(per_made.double().mean() / k), coverage)


def _knn_radii(x: Tensor, k: int, chunk_size: int) -> Tensor:
    """(N,) squared distance of each to its k-th nearest other."""
    found = []
    for start, distances in _squared_distances(x, x, chunk_size):
        own = torch.arange(len(distances), device=x.device)
        distances[own, start + own] = torch.inf
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _squared_distances(a: Tensor, b: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances (n, M)) of a few rows at a time."""
    for start in range(0, len(a), chunk_size):
        some = a[start : start + chunk_size]
        squared = some.square().sum(dim=1)[:, None] - 2 * some @ b.T + b.square().sum(dim=1)
        yield start, squared.clamp(min=0)
