"""Averages of weights: tracked in training, any other rebuilt from them afterwards (EDM2 Section 3, Appendix C).

An average at time t is int_0^t p(tau) theta(tau) dtau + m theta(0), where p integrates to 1 - m.

Legend: t, tau times in images, theta weights, p density of a profile on (0, t], m weight of the initial theta(0).
Power profile: p ~ tau^gamma, m = 0, sigma_rel its relative standard deviation. Traditional profile: p ~ e^(k tau),
m = e^(-k t), k = ln 2 / h, h its half-life.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gesso import config


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent of the power profile of a relative length (EDM2 Eq. 126, Algorithm 2).

    Raises ValueError outside (0, 12^-1/2), where no profile with gamma > 0 exists.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"an EMA length sigma_rel lies between 0 and {12**-0.5:.4f}, not {sigma_rel}")
    t = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


@dataclass(frozen=True)
class Power:
    """Profile of a relative length, which stretches with training (Eq. 121). theta(0) has no part in it.

    Raises ValueError for a sigma_rel outside (0, 12^-1/2).
    """

    sigma_rel: float
    k = 0.0

    def __post_init__(self):
        sigma_rel_to_gamma(self.sigma_rel)

    @cached_property
    def gamma(self) -> float:
        return sigma_rel_to_gamma(self.sigma_rel)

    @property
    def key(self) -> str:
        """Its name among the averages of a run."""
        return repr(self.sigma_rel)

    def __str__(self) -> str:
        return f"sigma_rel {self.sigma_rel:g}"

    def beta(self, t: float, t_next: float) -> float:
        """Weight that the old average keeps when time goes from t to t_next, any step apart (Eq. 127)."""
        return (t / t_next) ** (self.gamma + 1)


@dataclass(frozen=True)
class Traditional:
    """Profile of a fixed half-life in images (Eq. 110): CONFIG A of EDM2 has 50M (B.1), about sigma_rel .034 at its end.

    The half-life is the same from the first image on: Appendix B.1 and C.2 of the paper mention no ramp-up (EDM's
    published code has one). The mass of times before 0 is deposited at 0 (C.2), as an average that starts at theta(0)
    does: theta(0) has weight 2^(-t/h), most of the average until t = h. Raises ValueError for a half-life that is
    not above 0.
    """

    halflife: int
    gamma = 0.0

    def __post_init__(self):
        if not self.halflife > 0:
            raise ValueError(f"a half-life is a number of images above 0, not {self.halflife}")

    @property
    def k(self) -> float:
        return math.log(2) / self.halflife

    @property
    def key(self) -> str:
        """Its name among the averages of a run."""
        return f"halflife{self.halflife}"

    def __str__(self) -> str:
        return f"half-life {self.halflife:,}"

    def beta(self, t: float, t_next: float) -> float:
        """Weight that the old average keeps when time goes from t to t_next, any step apart (Eq. 120)."""
        return 2.0 ** (-(t_next - t) / self.halflife)


Profile = Power | Traditional


def tracked(cfg: config.Ema) -> list[Profile]:
    """The averages that a run tracks."""
    return [*map(Power, cfg.sigma_rels), *map(Traditional, cfg.halflives)]


def chosen(cfg: config.Sample) -> Profile:
    """The average that a run samples with."""
    return Traditional(cfg.halflife) if cfg.halflife else Power(cfg.sigma_rel)


class Tracker:
    """Averages of named tensors, one for each profile, held beside them and updated in place.

    Usable in any training loop: after each optimizer step, or every few, call `update(t, t_next)` with
    the images seen at the last call and now. Averages start at the weights given, theta(0).
    """

    def __init__(self, tensors: dict[str, Tensor], profiles: Sequence[Profile]):
        self.live = {k: v.detach() for k, v in tensors.items()}
        self.averages = {profile: {k: v.clone() for k, v in self.live.items()} for profile in profiles}

    @torch.no_grad()
    def update(self, t: int, t_next: int) -> None:
        """Move every average on from t to t_next images, with the live weights as they are now (Eq. 119)."""
        live = list(self.live.values())
        for profile, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), live, 1 - profile.beta(t, t_next))


class Density(NamedTuple):
    """Densities p(tau) ~ tau^gamma e^(k tau) on (0, t]; arrays that broadcast. Of power profiles k is 0, else gamma."""

    t: np.ndarray
    gamma: np.ndarray
    k: np.ndarray

    def at(self, tau: np.ndarray) -> np.ndarray:
        """p(tau) for tau up to t: p(t), at most which it is, times ratios that cannot overflow."""
        end = np.where(self.k > 0, self.k, (self.gamma + 1) / self.t)
        return end * (tau / self.t) ** self.gamma * np.exp(-self.k * (self.t - tau))

    def initial(self) -> np.ndarray:
        """m, the weight of theta(0)."""
        return np.where(self.k > 0, np.exp(-self.k * self.t), 0.0)


def densities(t: Sequence[float], profiles: Sequence[Profile], unit: float = 1.0) -> Density:
    """Of N profiles at times t, in units of `unit` images; arrays (N,)."""
    rows = [(time / unit, profile.gamma, profile.k * unit) for time, profile in zip(t, profiles, strict=True)]
    return Density(*np.array(rows, np.float64).T)


def inner_products(a: Density, b: Density) -> np.ndarray:
    """<p_a, p_b> = int_0^T p_a p_b dtau, T = min(t_a, t_b), of any two profiles; the arguments broadcast.

    p_a p_b is again of the form tau^gamma e^(k tau), so that the integral is its value at T times the integral
    of u^gamma e^(-k T (1-u)) over u = tau/T from 0 to 1. For two power profiles this is Eq. 151.
    """
    T, gamma, k = np.minimum(a.t, b.t), a.gamma + b.gamma, a.k + b.k
    return a.at(T) * b.at(T) * T / (gamma + 1) * kummer(gamma, k * T)


# Nodes and weights of the trapezoidal rule for int_0^inf f(y) dy under y = exp(x - e^-x), the double exponential rule
# of Takahasi and Mori for an f that falls like e^-y. 61 nodes give `kummer` to 1e-14 for gamma .01 to 1000, z 0 to 1e5.
_STEP = 0.2
_X = _STEP * np.arange(-20, 41)
NODES = np.exp(_X - np.exp(-_X))
WEIGHTS = _STEP * NODES * (1 + np.exp(-_X))


def kummer(gamma: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(gamma+1) int_0^1 u^gamma e^(-z(1-u)) du = M(1, gamma+2, -z), Kummer's function; between 0 and 1. gamma, z >= 0.

    Closed for gamma = 0 or z = 0. Otherwise by quadrature in y = (gamma+1+z) v with u = e^-v, where the integrand
    starts as e^-y.
    """
    gamma, z = np.broadcast_arrays(gamma, z)
    result = np.ones(z.shape)
    plain = (gamma == 0) & (z > 0)
    result[plain] = -np.expm1(-z[plain]) / z[plain]
    mixed = (gamma != 0) & (z > 0)
    g, z = gamma[mixed] + 1, z[mixed]
    result[mixed] = 0
    for y, weight in zip(NODES, WEIGHTS, strict=True):
        v = y / (g + z)
        result[mixed] += weight * g / (g + z) * np.exp(-g * v + z * np.expm1(-v))
    return result


RIDGE = 1e-12
"""Added to the unit diagonal of the scaled products: a part of 1e-6 of an average, of which float32 leaves little
beside rounding, is not worth a large coefficient"""


class Fit(NamedTuple):
    """An average as a combination of stored ones.

    x: (N,) its coefficients, of sum 1; error: squared relative error of its profile; initial: weight of theta(0) in it.
    """

    x: np.ndarray
    error: float
    initial: float

    def __str__(self) -> str:
        share = f", weight of the initial weights {self.initial:.2g}" if abs(self.initial) > 1e-6 else ""
        return f"relative error of the profile {self.error**0.5:.1e}{share}"


def solve(t: Sequence[float], profiles: Sequence[Profile], t_target: float, target: Profile) -> Fit:
    """The combination of stored averages, of `profiles` at times t, that comes nearest to the target at t_target.

    Least squares between profiles (Eq. 141), then rescaled to sum to 1, as the published code does. A target that is
    stored comes out as stored.

    The weight of theta(0) is a part of the profile: p integrates to 1 - m, so that all weights sum to 1. A point mass
    has no square integral; m counts as the density m / t_1 on (-t_1, 0], as if theta had stayed at theta(0) for as
    long as until the first snapshot t_1. Without this, averages that are mostly theta(0) would enter for the
    sake of their small remainder, and theta(0) with them. Where the stored averages cannot give the target's m,
    `initial` tells what the result has instead.

    Averages that nearly coincide (RIDGE) share their coefficient, rather than have large ones of either sign.
    error is |p* - p|^2 / |p|^2 after rescaling. Raises ValueError when nothing is stored up to t_target.
    """
    if not len(t) or min(t) > t_target:
        raise ValueError(f"nothing is stored up to image {t_target:,.0f}")
    # Times in units of the target time: the products then lie near 1, whatever the length of training.
    stored, wanted = densities(t, profiles, t_target), densities([t_target], [target], t_target)
    m, m_wanted, t_1 = stored.initial(), wanted.initial(), stored.t.min()
    pairs = list(zip(t, profiles, strict=True))
    if (t_target, target) in pairs:
        return Fit(np.eye(len(pairs))[pairs.index((t_target, target))], 0.0, float(m_wanted[0]))
    column = Density(*(values[:, None] for values in stored))
    A = inner_products(column, stored) + m[:, None] * m / t_1
    b = inner_products(stored, wanted) + m * m_wanted / t_1
    norm = float(inner_products(wanted, wanted)[0] + m_wanted[0] ** 2 / t_1)
    scale = A.diagonal() ** -0.5
    x = scale * np.linalg.solve(scale[:, None] * A * scale + RIDGE * np.eye(len(b)), scale * b)
    x = x / x.sum()
    return Fit(x, float(max(x @ A @ x - 2 * x @ b + norm, 0.0) / norm), float(x @ m))


class Reader(Protocol):
    """One stored average: an open safetensors file."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...


def combine(
    readers: Sequence[Reader], coefficients: np.ndarray, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """sum_i x_i theta_i, tensor by tensor: memory for two tensors, one pass over the files.

    coefficients (readers,) or (readers, targets); with targets each tensor has a leading dimension. names: of
    the tensors to combine, all when None.
    Sums run in float64: at short lengths the coefficients are large and of both signs.
    """
    coefficients = torch.as_tensor(np.asarray(coefficients, np.float64))
    for name in list(readers[0].keys() if names is None else names):
        total = None
        for reader, x in zip(readers, coefficients, strict=True):
            theta = reader.get_tensor(name)
            part = x.reshape(*x.shape, *[1] * theta.ndim) * theta.double()
            total = part if total is None else total.add_(part)
        yield name, total.to(theta.dtype)
