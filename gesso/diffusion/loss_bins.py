"""Loss by noise level: mean loss in equal bins of progress.

Progress is uniform in training, so all bins receive equally many samples. Legend: B samples.
"""

import torch
from torch import Tensor

NUM_BINS = 10


def bin_sums(losses: Tensor, progress: Tensor, valid: Tensor) -> Tensor:
    """Return the sum of losses and the number of samples of each bin, (2 NUM_BINS,), from clean to noise.

    Args:
        losses: Loss of each sample, (B,); the result has its dtype and device.
        progress: Progress of each sample, (B,) in (0, 1), on the CPU.
        valid: Samples to count, (B,) bool, on the CPU.
    """
    # index_add would sum in a nondeterministic order on a GPU.
    inside = ((progress * NUM_BINS).long().clamp(max=NUM_BINS - 1) == torch.arange(NUM_BINS)[:, None]) & valid
    number = inside.sum(dim=1).to(losses)
    inside = inside.to(losses.device, non_blocking=True)
    return torch.cat([torch.where(inside, losses, 0).sum(dim=1), number])


def bin_means(sums: Tensor) -> list[float | None]:
    """Return the mean loss of each bin from `sums` (2 NUM_BINS,), to six digits; None for an empty bin."""
    pairs = zip(sums[:NUM_BINS].tolist(), sums[NUM_BINS:].tolist(), strict=True)
    return [float(f"{total / number:.6g}") if number else None for total, number in pairs]
