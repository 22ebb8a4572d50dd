"""Power-function averages against brute force, and other lengths rebuilt from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso import ema


@pytest.mark.parametrize(
    "sigma_rel, gamma",
    [(0.05, 16.972198602303447), (0.10, 6.937203937601809), (0.15, 3.5578687748994646), (0.25, 0.71982395800071)],
)
def test_exponents(sigma_rel, gamma):
    assert ema.sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(sigma_rel=st.floats(0.01, 0.288))
def test_exponent_gives_back_the_length(sigma_rel):
    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)  # Eq. 123


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_lengths_without_a_profile(sigma_rel):
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        ema.sigma_rel_to_gamma(sigma_rel)


def test_published_beta():
    beta = ema.power_beta(ema.sigma_rel_to_gamma(0.05), 20_480_000 - 2048, 20_480_000)
    assert beta == pytest.approx(0.9982043044666998, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    sigma_rel=st.sampled_from([0.05, 0.1, 0.2]),
    seed=st.integers(0, 1000),
)
def test_tracking_equals_the_integral_at_any_interval(steps, sigma_rel, seed):
    """theta_hat(t) = int p(t) theta(t) dt with theta piecewise constant (Eq. 112-119), updates any distance apart."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.zeros(3, dtype=torch.float64)
    average = ema.PowerEMA({"w": theta}, [sigma_rel])
    times, values, t = [0], [], 0
    for dt in steps:
        theta.copy_(torch.randn(3, generator=g, dtype=torch.float64))
        average.update(t, t + dt)
        t += dt
        times.append(t)
        values.append(theta.clone())
    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    cdf = (torch.tensor(times, dtype=torch.float64) / t) ** (gamma + 1)  # primitive of p
    wanted = (cdf.diff()[:, None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(average.averages[sigma_rel]["w"], wanted, rtol=1e-9, atol=1e-12)


def test_inner_products_equal_integrals():
    t = np.linspace(0, 1, 2_000_001)[1:]
    for (t_a, g_a), (t_b, g_b) in [((0.6, 3.0), (1.0, 7.0)), ((1.0, 7.0), (0.6, 3.0)), ((0.5, 2.0), (0.5, 6.0))]:
        p = [(g + 1) * t**g / end ** (g + 1) * (t <= end) for end, g in ((t_a, g_a), (t_b, g_b))]
        numeric = (p[0] * p[1]).sum() * (t[1] - t[0])
        ours = ema.inner_products(np.float64(t_a), np.float64(g_a), np.float64(t_b), np.float64(g_b))
        assert float(ours) == pytest.approx(numeric, rel=1e-5)


def walk(n=2048, size=16):
    """A random walk of weights, and its brute-force average at any length."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(n, size, generator=g, dtype=torch.float64).cumsum(0) / n**0.5

    def average(sigma_rel, end=n):
        gamma = ema.sigma_rel_to_gamma(sigma_rel)
        cdf = (torch.arange(end + 1, dtype=torch.float64) / end) ** (gamma + 1)
        return (cdf.diff()[:, None] * theta[:end]).sum(0)

    return theta, average


class Memory:
    def __init__(self, tensor):
        self.tensor = tensor

    def keys(self):
        return ["w"]

    def get_tensor(self, name):
        return self.tensor


def rebuilt(average, sigma_rel, n=2048, snapshots=32, end=None):
    stored = [(n * (i + 1) // snapshots, s) for i in range(snapshots) for s in (0.05, 0.10)]
    stored = [(t, s) for t, s in stored if end is None or t <= end]
    gammas = [ema.sigma_rel_to_gamma(s) for _, s in stored]
    x, error = ema.solve([t for t, _ in stored], gammas, end or n, ema.sigma_rel_to_gamma(sigma_rel))
    assert x.sum() == pytest.approx(1)
    return dict(ema.combine([Memory(average(s, t)) for t, s in stored], x))["w"], error


@pytest.mark.parametrize(
    "sigma_rel, bound",
    [(0.03, 5e-3), (0.075, 5e-3), (0.15, 5e-3), (0.2, 5e-3), (0.25, 1e-2)],  # MATH: slower convergence at .25
)
def test_other_lengths_from_snapshots(sigma_rel, bound):
    _, average = walk()
    ours, error = rebuilt(average, sigma_rel)
    wanted = average(sigma_rel)
    assert (ours - wanted).norm() / wanted.norm() < bound
    assert error < (1e-3 if sigma_rel <= 0.2 else 2e-3)
    # It is not merely one of the stored ones.
    assert min((average(s) - wanted).norm() for s in (0.05, 0.1)) > 5 * (ours - wanted).norm()


def test_stored_lengths_come_out_as_stored():
    _, average = walk()
    for s in (0.05, 0.10):
        torch.testing.assert_close(rebuilt(average, s)[0], average(s), rtol=1e-8, atol=1e-8)


def test_a_past_time():
    _, average = walk()
    ours, _ = rebuilt(average, 0.15, end=1024)
    wanted = average(0.15, 1024)
    assert (ours - wanted).norm() / wanted.norm() < 5e-3
    with pytest.raises(ValueError, match="nothing is stored"):
        ema.solve([100], [6.9], 50, 6.9)


def test_error_falls_as_the_fourth_power_of_the_snapshots():
    """MATH: squared error of the profile ~ 1/n^4 with two profiles."""
    errors = []
    for n in (16, 32, 64):
        t = [i + 1 for i in range(n) for _ in range(2)]
        gammas = [ema.sigma_rel_to_gamma(s) for _ in range(n) for s in (0.05, 0.10)]
        errors.append(ema.solve(t, gammas, n, ema.sigma_rel_to_gamma(0.075))[1])
    slopes = np.diff(np.log2(errors))
    assert slopes == pytest.approx(-4, abs=0.5)


def test_several_targets_in_one_pass():
    readers = [Memory(torch.randn(2, 3)) for _ in range(4)]
    x = np.random.default_rng(0).normal(size=(4, 2))
    together = dict(ema.combine(readers, x))["w"]
    for j in range(2):
        torch.testing.assert_close(together[j], dict(ema.combine(readers, x[:, j]))["w"])
