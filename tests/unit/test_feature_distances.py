"""Distances of sets of features against loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.errors import UsageError
from gesso.evaluation.metrics.inception_score import inception_score
from gesso.evaluation.metrics.kernel_distance import kernel_distance
from gesso.evaluation.metrics.precision_recall import precision_recall


def samples(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    d = x.shape[1]

    def k(a, b):
        return (float(a @ b) / d + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = samples(12, 5, 0), samples(12, 5, 1, 0.7)
    # Subsets as large as the sets: every one is the whole.
    mean, std = kernel_distance(x, y, num_subsets=3, subset_size=12)
    assert mean == pytest.approx(slow_kernel_distance(x.numpy(), y.numpy()), rel=1e-10) and std < 1e-10
    # Sets may be unequal; which samples of them is keyed to the seed. Subsets are never filled up or cut short.
    with pytest.raises(UsageError, match="got subsets of 10, 12 and 9 samples"):
        kernel_distance(x, y[:9], 3, 10)
    assert kernel_distance(x, y[:9], 3, 9)[1] > 0 and kernel_distance(x, y, 3, 6, 1) != kernel_distance(x, y, 3, 6, 2)
    assert kernel_distance(x, y, 3, 6, 1) == kernel_distance(x, y, 3, 6, 1)


def test_kernel_distance_of_equal_laws_is_zero_on_average():
    """Unbiased: around 0, below it too; and at a distance the closed form (1 + s^2)^3 - ... of one dimension."""
    values = torch.tensor([kernel_distance(samples(40, 3, i), samples(40, 3, 1000 + i), 1, 40)[0] for i in range(200)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(200) and float(values.min()) < 0
    # E (xy + 1)^3 with x, y of mean m: 1 + 3 m^2 + 3 (1 + m^2)^2 + (m^3 + 3 m)^2; across means 0, m: 1 + 3 (1 + m^2).
    m = 0.8
    exact = (1 + 3 + 0) + (1 + 3 * m**2 + 3 * (1 + m**2) ** 2 + (m**3 + 3 * m) ** 2) - 2 * (1 + 3 * (1 + m**2))
    values = torch.tensor(
        [kernel_distance(samples(60, 1, i), samples(60, 1, 900 + i, m), 1, 60)[0] for i in range(300)]
    )
    assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / math.sqrt(300))


def test_inception_score_of_known_answers():
    K = 7
    certain = torch.eye(K).repeat(20, 1)
    assert inception_score(certain, 10)[0] == pytest.approx(K)  # every class, each certain
    assert inception_score(torch.full((50, K), 1 / K), 5) == pytest.approx((1, 0))
    assert inception_score(torch.eye(K)[:1].repeat(50, 1), 5)[0] == pytest.approx(1)
    p = torch.rand(30, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p /= p.sum(dim=1, keepdim=True)
    parts = [part.numpy() for part in p.split(10)]
    slow = [math.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part])) for part in parts]
    assert inception_score(p, 3) == pytest.approx((np.mean(slow), np.std(slow)), rel=1e-10)
    with pytest.raises(UsageError, match="at least one sample for each of 10"):
        inception_score(certain[:9])


def slow_manifold(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, ...]:
    def radius(x):
        return [sorted(np.linalg.norm(x - a, axis=1))[k] for a in x]  # place 0 is the sample itself

    rr, rm = radius(real), radius(generated)
    D = [[np.linalg.norm(a - b) for b in generated] for a in real]
    N, M = len(real), len(generated)
    precision = np.mean([any(D[i][j] <= rr[i] for i in range(N)) for j in range(M)])
    recall = np.mean([any(D[i][j] <= rm[j] for j in range(M)) for i in range(N)])
    density = sum(D[i][j] <= rr[i] for i in range(N) for j in range(M)) / (k * M)
    coverage = np.mean([any(D[i][j] <= rr[i] for j in range(M)) for i in range(N)])
    return precision, recall, density, coverage


@settings(max_examples=15, deadline=None)
@given(
    st.integers(6, 30), st.integers(6, 30), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(0, 99)
)
def test_manifold_counts_balls(n, m, k, d, chunk, seed):
    real, created = samples(n, d, seed), samples(m, d, seed + 1, 0.5)
    assert precision_recall(real, created, k, chunk) == pytest.approx(slow_manifold(real.numpy(), created.numpy(), k))


def test_manifold_of_equal_and_of_distant_sets():
    x = samples(50, 4, 0)
    same, apart = precision_recall(x, x), precision_recall(x, x + 1e3)
    assert same.precision == same.recall == same.coverage == 1 and same.density > 1
    assert apart == (0, 0, 0, 0)
    with pytest.raises(UsageError, match="need more samples than 3"):
        precision_recall(x, x[:3])
