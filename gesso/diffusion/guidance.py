"""Guidance: a weighted sum of denoisers whose weights sum to 1. The sum is the same in D, eps and v."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso.conditioning import Cond, concat_conds

DenoiseFn = Callable[[Tensor, Tensor], Tensor]
"""Denoiser with bound conditions, (x, s) -> x0_hat, as samplers call it."""


class GuidanceTerm(NamedTuple):
    """One term of the weighted sum: weight * denoiser(x, s, cond).

    `unguided_weight` is the weight in channels that are not guided.
    """

    weight: float
    denoiser: nn.Module
    cond: Cond
    unguided_weight: float


def guidance_terms(
    denoiser: nn.Module,
    cond: Cond,
    guidance: float = 1.0,
    control_guidance: float = 1.0,
    *,
    keep_control: bool = False,
    guide: nn.Module | None = None,
    guide_conditioning: str = "none",
) -> list[GuidanceTerm]:
    """Return the terms of guidance of strength l = guidance, b = control_guidance (Berrada et al. Eq. 2).

    The weights are l b on (control, semantic), l (1-b) on (no control, semantic) and 1-l on the guide. Unguided
    channels have l = 1. Eq. 9 of Berrada et al. derives (control, no semantic) for the second term; their Table A4
    repeats Eq. 2, which is used here.

    Args:
        denoiser: The denoiser to guide.
        cond: Conditions of the batch.
        guidance: Strength l; 1 is no guidance.
        control_guidance: Strength b of the control variables; 1 is no guidance.
        keep_control: Give the guide the control variables but no semantic condition (as SDXL does).
        guide: The guiding network; None uses `denoiser` (classifier-free guidance).
        guide_conditioning: "none" withholds the conditions from the guide (EDM2 Eq. 152); "all" keeps them
            (autoguidance).
    """
    guide_cond = cond if guide_conditioning == "all" else cond.without(semantic=True, control=not keep_control)
    return [
        GuidanceTerm(guidance * control_guidance, denoiser, cond, control_guidance),
        GuidanceTerm(guidance * (1 - control_guidance), denoiser, cond.without(control=True), 1 - control_guidance),
        GuidanceTerm(1 - guidance, denoiser if guide is None else guide, guide_cond, 0.0),
    ]


def scale_guidance(guidance: float, resolution_ratio: float) -> float:
    """Return the guidance 1 + k (l - 1) at k times the resolution that l was tuned at (Berrada et al. Eq. 15)."""
    return 1 + resolution_ratio * (guidance - 1)


class GuidanceInterval:
    """Denoiser that is guided in an interval of sigma = s/alpha(s) alone (Kynkaanniemi et al. 2024).

    It calls `inside` where sigma lies in the interval and `outside` elsewhere. Samplers that evaluate twice per step
    use `for_step(s)`, which chooses once for the step that starts at s, as in the published code.
    """

    def __init__(
        self, inside: DenoiseFn, outside: DenoiseFn, alpha: Callable[[Tensor], Tensor], interval: tuple[float, float]
    ):
        self.inside, self.outside, self.alpha, self.interval = inside, outside, alpha, interval

    def for_step(self, s: Tensor) -> DenoiseFn:
        """Return the denoiser of the step that starts at level s."""
        low, high = self.interval
        return self.inside if low <= float(s / self.alpha(s)) <= high else self.outside

    def __call__(self, x: Tensor, s: Tensor) -> Tensor:
        """Return x0_hat, guided if s lies in the interval."""
        return self.for_step(s)(x, s)


def power_cosine(guidance: float, progress: float, power: float) -> float:
    """Return MDT's guidance at `progress` t: 1 + (guidance - 1) (1 - cos(pi (1 - t)^power)) / 2; 1 at noise."""
    return 1 + (guidance - 1) * (1 - math.cos(math.pi * (1 - progress) ** power)) / 2


def scheduled_guidance(denoise_at: Callable[[float], DenoiseFn], guidance: Callable[[Tensor], float]) -> DenoiseFn:
    """Return the denoiser that is `denoise_at(guidance(s))` at each level s."""

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        return denoise_at(guidance(s))(x, s)

    return denoise


def clip_x0(denoise: DenoiseFn, low: Tensor, high: Tensor) -> DenoiseFn:
    """Return `denoise` with x0 clipped to [low, high], each (C, 1, 1); a learned variance after x0 is unchanged."""

    def clipped(x: Tensor, s: Tensor) -> Tensor:
        out = denoise(x, s)
        D = torch.minimum(torch.maximum(out[:, : len(low)], low.to(out)), high.to(out))
        return torch.cat([D, out[:, len(low) :]], dim=1)

    return clipped


def combine_terms(terms: list[GuidanceTerm], guided_channels: int | None = None) -> DenoiseFn:
    """Return the weighted sum as one denoiser.

    Terms of the same network run as one batch. Terms of weight 0 are not evaluated.

    Args:
        terms: The terms; their weights sum to 1.
        guided_channels: Number of leading channels that use `weight`; the others use `unguided_weight` (DiT guides
            3 of 4). None guides all channels.

    Raises:
        ValueError: The weights do not sum to 1.
    """
    for total in (sum(t.weight for t in terms), sum(t.unguided_weight for t in terms)):
        if abs(total - 1) > 1e-9:
            raise ValueError(f"guidance weights must sum to 1, but sum to {total}")
    groups: dict[nn.Module, list[GuidanceTerm]] = {}
    for term in terms:
        if term.weight != 0 or (guided_channels is not None and term.unguided_weight != 0):
            groups.setdefault(term.denoiser, []).append(term)

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        parts = []
        for network, group in groups.items():
            if len(group) == 1:
                outputs = [network(x, s, group[0].cond)]
            else:
                n = len(group)
                s_all = s.expand(len(x)).repeat(n)
                outputs = network(x.repeat(n, 1, 1, 1), s_all, concat_conds([t.cond for t in group])).chunk(n)
            parts += [_scale(term, D, guided_channels) for term, D in zip(group, outputs, strict=True)]
        return functools.reduce(torch.add, parts)

    return torch.no_grad()(denoise)


def _scale(term: GuidanceTerm, D: Tensor, guided_channels: int | None) -> Tensor:
    if guided_channels is None:
        return term.weight * D
    guided, unguided = D[:, :guided_channels], D[:, guided_channels:]
    return torch.cat([term.weight * guided, term.unguided_weight * unguided], dim=1)
