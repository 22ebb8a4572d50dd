"""Validation loss, and its mean by noise level."""

import torch
from torch import Tensor

from gesso.diffusion import loss_bins
from gesso.evaluation.metrics.base import MetricInputs


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the mean loss, and by tenths of the training draw from clean to noise: loss_0_10, ..., loss_90_100.

    The two columns are the losses and the positions in the training draw of `validation.ValidationLoss`.
    """
    losses, positions = inputs.samples.features.unbind(dim=1)
    mean, by_level = mean_losses(losses, positions)
    width = 100 // len(by_level)
    named = {f"{name}_{width * i}_{width * (i + 1)}": value for i, value in enumerate(by_level)}
    return {name: mean} | {key: value for key, value in named.items() if value is not None}


def mean_losses(losses: Tensor, positions: Tensor) -> tuple[float, list[float | None]]:
    """Return the mean of losses (n,), and of those in each bin of positions (n,) in [0, 1), to six digits."""
    by_level = loss_bins.bin_sums(losses, positions, torch.ones_like(losses, dtype=torch.bool))
    return float(f"{float(losses.mean()):.6g}"), loss_bins.bin_means(by_level)
