"""Loss by noise level: means in equal bins of progress, which is uniform in training, so that bins are equally full.

Legend: B samples.
"""

import torch
from torch import Tensor

BINS = 10


def sums(losses: Tensor, progress: Tensor, counts: Tensor) -> Tensor:
    """(2 BINS,) in the dtype of `losses`: sum of losses and number of samples in each bin, from clean to noise.

    losses (B,); progress (B,) in (0, 1), counts (B,) bool: which samples count; both on the CPU.
    """
    # Not index_add, whose order of summation on a GPU is anybody's guess.
    inside = ((progress * BINS).long().clamp(max=BINS - 1) == torch.arange(BINS)[:, None]) & counts
    number = inside.sum(dim=1).to(losses)
    inside = inside.to(losses.device, non_blocking=True)
    return torch.cat([torch.where(inside, losses, 0).sum(dim=1), number])


def means(total: Tensor) -> list[float | None]:
    """Mean loss of each bin, of sums (2 BINS,), to six digits; None where no sample fell."""
    found = zip(total[:BINS].tolist(), total[BINS:].tolist(), strict=True)
    return [float(f"{value / n:.6g}") if n else None for value, n in found]
