"""EMA profiles (EDM2 Section 3.1, Appendix C).

An EMA at time t is int_0^t p(tau) theta(tau) dtau + m theta(0), where p integrates to 1 - m.

Legend: t, tau times in images, theta weights, p density of a profile on (0, t], m weight of the initial theta(0).
Power profile: p ~ tau^gamma, m = 0; sigma_rel is its relative standard deviation.
Traditional profile: p ~ e^(k tau), m = e^(-k t), k = ln 2 / h, h half-life; with a ramp-up, first a power profile.
Raw weights are not averaged: each represents the times nearest to its time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from gesso import config


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Return the exponent of the power profile of a relative length (EDM2 Eq. 126, Algorithm 2).

    Raises:
        ValueError: sigma_rel is outside (0, 12^-1/2), where no profile with gamma > 0 exists.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"an EMA length sigma_rel must lie between 0 and {12**-0.5:.4f}, not {sigma_rel}")
    t = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class UniformProfile:
    """Interface of `PerTensorProfile` for a profile that all tensors have."""

    overrides: ClassVar[tuple[tuple[str, "Profile"], ...]] = ()

    @property
    def default(self) -> Self:
        """The profile."""
        return self

    @property
    def profiles(self) -> list[Self]:
        """The profile alone."""
        return [self]

    def profile_for(self, name: str) -> Self:
        """Return the profile of a tensor."""
        return self


@dataclass(frozen=True)
class PowerProfile(UniformProfile):
    """Power-function profile of a relative length, which scales with training time (Eq. 121); theta(0) has no weight.

    Raises:
        ValueError: sigma_rel is outside (0, 12^-1/2).
    """

    sigma_rel: float
    decay_rate = 0.0

    def __post_init__(self):
        sigma_rel_to_gamma(self.sigma_rel)

    @cached_property
    def gamma(self) -> float:
        """Exponent of the profile."""
        return sigma_rel_to_gamma(self.sigma_rel)

    @property
    def key(self) -> str:
        """Name among the EMAs of a run."""
        return repr(self.sigma_rel)

    def __str__(self) -> str:
        return f"sigma_rel {self.sigma_rel:g}"

    def beta(self, t: float, t_next: float) -> float:
        """Return the weight of the previous EMA when time advances from t to t_next (Eq. 127)."""
        return (t / t_next) ** (self.gamma + 1)


@dataclass(frozen=True)
class TraditionalProfile(UniformProfile):
    """Exponential profile of a fixed half-life in images (Eq. 110).

    CONFIG A of EDM2 has 50M (B.1), about sigma_rel .034 at its end. The mass of times before 0 is placed at 0 (C.2), as
    in an EMA that starts at theta(0): theta(0) has weight 2^(-t/h), which is most of the EMA until t = h.

    `rampup` limits the half-life to this share of the images seen (EDM's ema_rampup_ratio: .05 by default in EDM, .09
    in EDM2's TraditionalEMA); None is a constant half-life. Until t = h/rampup the EMA is a power profile of exponent
    ln 2/rampup - 1, in which theta(0) has no weight; afterwards that part decays exponentially. `beta` uses the
    half-life at the end of a step, as the published loops do.

    Raises:
        ValueError: The half-life is not above 0, or the ramp-up is outside (0, ln 2).
    """

    halflife: int
    rampup: float | None = None
    gamma = 0.0

    def __post_init__(self):
        if not self.halflife > 0:
            raise ValueError(f"a half-life must be a number of images above 0, not {self.halflife}")
        if self.rampup is not None and not 0 < self.rampup < math.log(2):
            raise ValueError(f"a ramp-up must lie between 0 and ln 2 = .693, not {self.rampup}")

    @property
    def decay_rate(self) -> float:
        """Decay rate k = ln 2 / h."""
        return math.log(2) / self.halflife

    @property
    def key(self) -> str:
        """Name among the EMAs of a run."""
        return f"halflife{self.halflife}" + ("" if self.rampup is None else f"-rampup{self.rampup:g}")

    def __str__(self) -> str:
        return f"half-life {self.halflife:,}" + ("" if self.rampup is None else f" with ramp-up {self.rampup:g}")

    def beta(self, t: float, t_next: float) -> float:
        """Return the weight of the previous EMA when time advances from t to t_next (Eq. 120)."""
        halflife = self.halflife if self.rampup is None else min(self.halflife, self.rampup * t_next)
        return 2.0 ** (-(t_next - t) / halflife)


@dataclass(frozen=True)
class RawProfile(UniformProfile):
    """The weights without averaging; they represent all times that are nearer to theirs than to that of others."""

    key = "raw"
    gamma = decay_rate = 0.0

    def __str__(self) -> str:
        return "raw weights"

    def beta(self, t: float, t_next: float) -> float:
        """Return 0: previous weights are discarded."""
        return 0.0


Profile = PowerProfile | TraditionalProfile | RawProfile


@dataclass(frozen=True)
class PerTensorProfile:
    """Default profile, and other profiles for tensors that match a glob; the first match decides (EDM2 Figure 5b)."""

    default: Profile
    overrides: tuple[tuple[str, Profile], ...]

    def __str__(self) -> str:
        return ", ".join([str(self.default), *(f"{glob} {profile}" for glob, profile in self.overrides)])

    @property
    def profiles(self) -> Sequence[Profile]:
        """All profiles, the default first."""
        return list(dict.fromkeys([self.default, *(profile for _, profile in self.overrides)]))

    def profile_for(self, name: str) -> Profile:
        """Return the profile of a tensor."""
        return next((profile for glob, profile in self.overrides if fnmatchcase(name, glob)), self.default)


def tracked_profiles(cfg: config.EmaConfig) -> list[Profile]:
    """Return the profiles that a run tracks."""
    return [
        *map(PowerProfile, cfg.sigma_rels),
        *(TraditionalProfile(halflife, cfg.rampup) for halflife in cfg.halflives),
    ]


def sampling_profile(cfg: config.SampleConfig) -> Profile:
    """Return the profile that a run samples with."""
    return TraditionalProfile(cfg.halflife, cfg.rampup) if cfg.halflife else PowerProfile(cfg.sigma_rel)
