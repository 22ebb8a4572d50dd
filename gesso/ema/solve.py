"""Least-squares combination of stored EMAs for a target profile (EDM2 Appendix C.5).

Legend: as in profiles.py; A inner products of the stored profiles, b those with the target profile, x coefficients.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gesso.ema.profiles import Profile, RawProfile, TraditionalProfile


class Density(NamedTuple):
    """Densities p(tau) ~ tau^gamma e^(k tau) on (0, t], as arrays that broadcast; either k or gamma is 0."""

    t: np.ndarray
    gamma: np.ndarray
    decay_rate: np.ndarray

    def pdf(self, tau: np.ndarray) -> np.ndarray:
        """Return p(tau) for tau up to t, computed as p(t) times ratios that cannot overflow."""
        p_t = np.where(self.decay_rate > 0, self.decay_rate, (self.gamma + 1) / self.t)
        return p_t * (tau / self.t) ** self.gamma * np.exp(-self.decay_rate * (self.t - tau))

    def initial_weight(self) -> np.ndarray:
        """Return m, the weight of theta(0)."""
        return np.where(self.decay_rate > 0, np.exp(-self.decay_rate * self.t), 0.0)

    def cdf(self, tau: np.ndarray) -> np.ndarray:
        """Return the weight of theta(0) and of all theta up to tau; 0 for tau < 0."""
        tau = np.minimum(tau, self.t)
        power = np.maximum(tau / self.t, 0) ** (self.gamma + 1)
        exponential = np.exp(-self.decay_rate * (self.t - tau))
        return np.where(tau < 0, 0.0, np.where(self.decay_rate > 0, exponential, power))


def density_components(t: float, profile: Profile) -> "list[tuple[float, float, DensityProfile]]":
    """Return a profile at time t as a sum of two-parameter densities: (factor, time, profile) of each.

    With a ramp-up the half-life h is reached at s = h/rampup. Until s the profile is a power profile of exponent
    ln 2/rampup - 1. After s, with c = e^(-k (t-s)), it is the exponential of time t, minus c times that of time s (its
    part before s), plus c times the power profile of time s. The weights of theta(0) cancel.
    """
    if not isinstance(profile, TraditionalProfile) or profile.rampup is None:
        return [(1.0, t, profile)]
    rampup = profile.rampup
    end, power = profile.halflife / rampup, _PowerDensity(math.log(2) / rampup - 1)
    if t <= end:
        return [(1.0, t, power)]
    decay, plain = math.exp(-profile.decay_rate * (t - end)), TraditionalProfile(profile.halflife)
    return [(1.0, t, plain), (-decay, end, plain), (decay, end, power)]


class _PowerDensity(NamedTuple):
    """Density ~ tau^gamma of any exponent above -1."""

    gamma: float
    decay_rate: float = 0.0


DensityProfile = Profile | _PowerDensity


class Mixture(NamedTuple):
    """N profiles as sums of M densities with factors (N, M)."""

    density: Density
    factors: np.ndarray

    def inner_products(self, other: "Mixture") -> np.ndarray:
        """Return <p_a, p_b>, (N, N')."""
        column = Density(*(values[:, None] for values in self.density))
        return self.factors @ inner_products(column, other.density) @ other.factors.T

    def initial_weight(self) -> np.ndarray:
        """Return m, the weight of theta(0), (N,)."""
        return self.factors @ self.density.initial_weight()

    def cdf(self, tau: np.ndarray) -> np.ndarray:
        """Return the weight of theta(0) and of all theta up to tau (K,), (N, K)."""
        column = Density(*(values[:, None] for values in self.density))
        return self.factors @ column.cdf(tau)


def build_mixture(t: Sequence[float], profiles: Sequence[Profile], unit: float) -> Mixture:
    """Return profiles at times t as a mixture, in units of `unit` images."""
    parts = [density_components(time, profile) for time, profile in zip(t, profiles, strict=True)]
    flat = [component for components in parts for component in components]
    factors = np.zeros((len(parts), len(flat)))
    start = 0
    for row, components in zip(factors, parts, strict=True):
        row[start : start + len(components)] = [factor for factor, _, _ in components]
        start += len(components)
    return Mixture(densities([time for _, time, _ in flat], [profile for _, _, profile in flat], unit), factors)


def densities(t: Sequence[float], profiles: Sequence[DensityProfile], unit: float = 1.0) -> Density:
    """Return the densities (N,) of profiles at times t, in units of `unit` images."""
    rows = [(time / unit, profile.gamma, profile.decay_rate * unit) for time, profile in zip(t, profiles, strict=True)]
    return Density(*np.array(rows, np.float64).T)


def inner_products(a: Density, b: Density) -> np.ndarray:
    """Return <p_a, p_b> = int_0^T p_a p_b dtau, T = min(t_a, t_b), of any two profiles; the arguments broadcast.

    p_a p_b also has the form tau^gamma e^(k tau), so that the integral is T times its value at T times the integral of
    u^gamma e^(-k T (1-u)) over u = tau/T from 0 to 1. For two power profiles this is Eq. 151.
    """
    T, gamma, k = np.minimum(a.t, b.t), a.gamma + b.gamma, a.decay_rate + b.decay_rate
    return a.pdf(T) * b.pdf(T) * T / (gamma + 1) * kummer(gamma, k * T)


# Nodes and weights of the trapezoidal rule for int_0^inf f(y) dy with y = exp(x - e^-x): the double exponential rule of
# Takahasi and Mori for an f that falls like e^-y. 61 nodes give `kummer` to 1e-14 for gamma .01 to 1000, z 0 to 1e5.
_STEP = 0.2
_X = _STEP * np.arange(-20, 41)
QUADRATURE_NODES = np.exp(_X - np.exp(-_X))
QUADRATURE_WEIGHTS = _STEP * QUADRATURE_NODES * (1 + np.exp(-_X))


def kummer(gamma: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return Kummer's function M(1, gamma+2, -z) = (gamma+1) int_0^1 u^gamma e^(-z(1-u)) du, in (0, 1]; gamma, z >= 0.

    For gamma = 0 or z = 0 it has a closed form. Otherwise it is computed by quadrature in y = (gamma+1+z) v with
    u = e^-v, where the integrand starts as e^-y.
    """
    gamma, z = np.broadcast_arrays(gamma, z)
    result = np.ones(z.shape)
    exponential = (gamma == 0) & (z > 0)
    result[exponential] = -np.expm1(-z[exponential]) / z[exponential]
    mixed = (gamma != 0) & (z > 0)
    g, z = gamma[mixed] + 1, z[mixed]
    result[mixed] = 0
    for y, weight in zip(QUADRATURE_NODES, QUADRATURE_WEIGHTS, strict=True):
        v = y / (g + z)
        result[mixed] += weight * g / (g + z) * np.exp(-g * v + z * np.expm1(-v))
    return result


RIDGE = 1e-12
"""Number that is added to the unit diagonal of the scaled inner products. It limits the coefficients of parts below
1e-6 of an EMA, which float32 stores only roughly."""


class Fit(NamedTuple):
    """Combination of stored EMAs: coefficients (N,) of sum 1, the relative error of its profile, weight of theta(0)."""

    coefficients: np.ndarray
    squared_error: float
    initial_weight: float

    def __str__(self) -> str:
        share = f", weight of the initial weights {self.initial_weight:.2g}" if abs(self.initial_weight) > 1e-6 else ""
        return f"relative error of the profile {self.squared_error**0.5:.1e}{share}"


def raw_intervals(t: np.ndarray, end: float, before: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals (start (N,), end (N,)) that raw weights at rising times represent, midpoint to midpoint.

    The first begins at 0 and the last ends at `end`. Weights of time 0 also represent the times from -before to 0.
    """
    middle = (t[1:] + t[:-1]) / 2
    return np.r_[-before if t[0] == 0 else 0.0, middle], np.r_[middle, max(end, t[-1])]


def fit_profile(t: Sequence[float], profiles: Sequence[Profile], t_target: float, target: Profile) -> Fit:
    """Return the combination of stored EMAs, of `profiles` at times t, that is closest to the target at t_target.

    The coefficients are the least squares solution between profiles (Eq. 141), rescaled to sum to 1 as in the published
    code. A target that is stored is returned exactly. `squared_error` is |p* - p|^2 / |p|^2 after rescaling.

    The weight m of theta(0) is part of the profile: p integrates to 1 - m, so that all weights sum to 1. A point mass
    has no square integral; m counts as the density m / t_1 on (-t_1, 0], where t_1 is the time of the first snapshot.
    Without this, the solution would use EMAs that are mostly theta(0) for their small remainder. If the stored EMAs
    cannot give the target's m, `initial_weight` is the weight in the result.

    Raw weights count as a constant density on their interval. If only raw weights are stored, their coefficients are
    the integrals of the target's profile over the intervals. EMAs that nearly coincide share their coefficient instead
    of having large ones of opposite signs (RIDGE).

    Raises:
        ValueError: Nothing is stored up to t_target.
    """
    if not len(t) or min(t) > t_target or t_target <= 0:
        raise ValueError(f"nothing is stored up to image {t_target:,.0f}")
    pairs = list(zip(t, profiles, strict=True))
    A, b, norm, initial = _normal_equations(pairs, t_target, target)
    if (t_target, target) in pairs:
        i = pairs.index((t_target, target))
        return Fit(np.eye(len(pairs))[i], 0.0, float(initial[i]))
    scale = A.diagonal() ** -0.5
    x = scale * np.linalg.solve(scale[:, None] * A * scale + RIDGE * np.eye(len(b)), scale * b)
    x = x / x.sum()
    return Fit(x, float(max(x @ A @ x - 2 * x @ b + norm, 0.0) / norm), float(x @ initial))


def _normal_equations(
    pairs: Sequence[tuple[float, Profile]], t_target: float, target: Profile
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Return <p_i, p_j> (N, N), <p_i, p> (N,), <p, p>, and the weight of theta(0) in each (N,)."""
    # Times are in units of the target time, so that the products are near 1 for any length of training.
    t_1 = min((time for time, _ in pairs if time > 0), default=t_target) / t_target
    raw = np.array([isinstance(profile, RawProfile) for _, profile in pairs])
    emas = [pair for pair, is_raw in zip(pairs, raw, strict=True) if not is_raw]
    stored = build_mixture([time for time, _ in emas], [profile for _, profile in emas], t_target) if emas else None
    target_mixture = build_mixture([t_target], [target], t_target)
    m_target, initial = target_mixture.initial_weight(), np.zeros(len(pairs))
    A, b = np.zeros((len(pairs), len(pairs))), np.zeros(len(pairs))
    if stored:
        m = initial[~raw] = stored.initial_weight()
        A[np.ix_(~raw, ~raw)] = stored.inner_products(stored) + m[:, None] * m / t_1
        b[~raw] = stored.inner_products(target_mixture)[:, 0] + m * m_target / t_1
    if raw.any():
        times = np.array([time for (time, _), is_raw in zip(pairs, raw, strict=True) if is_raw]) / t_target
        start, end = raw_intervals(times, 1.0, t_1)
        A[raw, raw] = 1 / (end - start)
        b[raw] = (target_mixture.cdf(end) - target_mixture.cdf(start))[0] / (end - start)
        initial[raw] = times == 0
        if stored:
            mean_density = (stored.cdf(end) - stored.cdf(start)) / (end - start)
            A[np.ix_(~raw, raw)], A[np.ix_(raw, ~raw)] = mean_density, mean_density.T
    norm = target_mixture.inner_products(target_mixture)[0, 0] + m_target[0] ** 2 / t_1
    return A, b, float(norm), initial
