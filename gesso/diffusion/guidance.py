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


def cfg_terms(denoiser: nn.Module, cond: Cond, guidance: float) -> list[Term]:
    """Classifier-free guidance: l on the condition, 1 - l on nothing (Berrada et al. Eq. 2 at beta = 1)."""
    return [
        Term(guidance, denoiser, cond),
        Term(1 - guidance, denoiser, cond.without(semantic=True, control=True)),
    ]


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
