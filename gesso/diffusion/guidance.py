"""Guidance is a weighted sum of denoisers whose weights sum to 1; the same in D, eps and v."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso.cond import Cond, concat

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, s) -> x0_hat, with the conditions bound: what a sampler sees."""


class Term(NamedTuple):
    weight: float
    denoiser: nn.Module
    cond: Cond
    unguided: float | None = None
    """weight in channels that are not guided; None: `weight` there too"""


def terms(
    denoiser: nn.Module,
    cond: Cond,
    guidance: float = 1.0,
    control_guidance: float = 1.0,
    *,
    keep_control: bool = False,
    guide: nn.Module | None = None,
    guide_sees: str = "nothing",
) -> list[Term]:
    """Guidance of strength l = guidance and b = control_guidance (Berrada et al. Eq. 2).

    l b on (control, semantic), l (1-b) on (none, semantic), 1-l on the guide: this network with nothing, or with
    the control variables only (keep_control, SDXL's way); another network with nothing (EDM2 Eq. 152) or with
    all (autoguidance, guide_sees="all"). Eq. 9 of Berrada et al. derives (control, none) for the second; Eq. 2
    is what their Table A4 repeats. Unguided channels have l = 1.
    """
    if guide_sees == "all":
        weaker = cond
    else:
        weaker = cond.without(semantic=True, control=not keep_control)
    return [
        Term(guidance * control_guidance, denoiser, cond, control_guidance),
        Term(guidance * (1 - control_guidance), denoiser, cond.without(control=True), 1 - control_guidance),
        Term(1 - guidance, denoiser if guide is None else guide, weaker, 0.0),
    ]


def scaled(guidance: float, k: float) -> float:
    """The scale law l'(k) = 1 + k (l - 1) for k times the resolution (Berrada et al. Prop. 2, Eq. 15)."""
    return 1 + k * (guidance - 1)


class Within:
    """`inside` where sigma = s/alpha(s) lies in the interval, `outside` elsewhere (Kynkaanniemi et al. 2024).

    A sampler that evaluates twice a step takes `at(s)`, whose choice holds for the step that starts at s, as in the
    published code: the correction of a Heun step is guided if the step is.
    """

    def __init__(
        self, inside: Denoise, outside: Denoise, alpha: Callable[[Tensor], Tensor], interval: tuple[float, float]
    ):
        self.inside, self.outside, self.alpha, self.interval = inside, outside, alpha, interval

    def at(self, s: Tensor) -> Denoise:
        """The denoiser of the step that starts at level s."""
        low, high = self.interval
        return self.inside if low <= float(s / self.alpha(s)) <= high else self.outside

    def __call__(self, x: Tensor, s: Tensor) -> Tensor:
        return self.at(s)(x, s)


def power_cosine(guidance: float, progress: float, power: float) -> float:
    """MDT's lambda at `progress` t: 1 + (lambda - 1) (1 - cos(pi (1 - t)^power)) / 2, 1 at noise, lambda at clean."""
    return 1 + (guidance - 1) * (1 - math.cos(math.pi * (1 - progress) ** power)) / 2


def varying(at: Callable[[float], Denoise], guidance: Callable[[Tensor], float]) -> Denoise:
    """The denoiser `at(lambda)` with lambda = guidance(s) of each level."""

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        return at(guidance(s))(x, s)

    return denoise


def clipped(denoise: Denoise, low: Tensor, high: Tensor) -> Denoise:
    """`denoise` with its estimate of x0 kept between low and high, (C, 1, 1); a learned variance after it stays as it is."""

    def inner(x: Tensor, s: Tensor) -> Tensor:
        out = denoise(x, s)
        D = torch.minimum(torch.maximum(out[:, : len(low)], low.to(out)), high.to(out))
        return torch.cat([D, out[:, len(low) :]], dim=1)

    return inner


def combine(terms: list[Term], channels: int | None = None) -> Denoise:
    """The weighted sum as one denoiser. Terms of one network run as one batch; weight 0 costs nothing.

    channels: the first so many channels have `weight`, the others `unguided` (DiT guides 3 of 4); None: all have `weight`.
    Raises ValueError when the weights do not sum to 1.
    """
    for total in (sum(t.weight for t in terms), sum(_unguided(t) for t in terms)):
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the weights of a guided denoiser must sum to 1, not {total}")
    groups: dict[nn.Module, list[Term]] = {}
    for term in terms:
        if term.weight != 0 or (channels is not None and _unguided(term) != 0):
            groups.setdefault(term.denoiser, []).append(term)

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        result = None
        for network, group in groups.items():
            if len(group) == 1:
                outputs = [network(x, s, group[0].cond)]
            else:
                n = len(group)
                s_all = s.expand(len(x)).repeat(n)
                outputs = network(x.repeat(n, 1, 1, 1), s_all, concat([t.cond for t in group])).chunk(n)
            for term, D in zip(group, outputs, strict=True):
                if channels is None:
                    part = term.weight * D
                else:
                    part = torch.cat([term.weight * D[:, :channels], _unguided(term) * D[:, channels:]], dim=1)
                result = part if result is None else result + part
        return result

    return torch.no_grad()(denoise)


def _unguided(term: Term) -> float:
    return term.weight if term.unguided is None else term.unguided
