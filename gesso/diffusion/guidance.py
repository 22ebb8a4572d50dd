"""Guidance is a weighted sum of denoisers whose weights sum to 1; the same in D, eps and v."""

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
    is what their Table A4 repeats.
    """
    if guide_sees == "all":
        weaker = cond
    else:
        weaker = cond.without(semantic=True, control=not keep_control)
    return [
        Term(guidance * control_guidance, denoiser, cond),
        Term(guidance * (1 - control_guidance), denoiser, cond.without(control=True)),
        Term(1 - guidance, denoiser if guide is None else guide, weaker),
    ]


def scaled(guidance: float, k: float) -> float:
    """The scale law l'(k) = 1 + k (l - 1) for k times the resolution (Berrada et al. Prop. 2, Eq. 15)."""
    return 1 + k * (guidance - 1)


def within(inside: Denoise, outside: Denoise, alpha: Callable[[Tensor], Tensor], interval: tuple[float, float]):
    """`inside` where sigma = s/alpha(s) lies in the interval, `outside` elsewhere (Kynkaanniemi et al. 2024)."""

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        low, high = interval
        return (inside if low <= float(s / alpha(s)) <= high else outside)(x, s)

    return denoise


def combine(terms: list[Term]) -> Denoise:
    """The weighted sum as one denoiser. Terms of one network run as one batch; weight 0 costs nothing.

    Raises ValueError when the weights do not sum to 1.
    """
    total = sum(t.weight for t in terms)
    if abs(total - 1) > 1e-9:
        raise ValueError(f"the weights of a guided denoiser must sum to 1, not {total}")
    groups: dict[nn.Module, list[Term]] = {}
    for term in terms:
        if term.weight != 0:
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
                part = term.weight * D
                result = part if result is None else result + part
        return result

    return torch.no_grad()(denoise)
