"""Linear combinations of stored weights, tensor by tensor, in one pass over the files."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK_ELEMENTS, TENSORS_PER_BLOCK = 2**14, 32
"""Elements of a tensor, and number of tensors, that are summed at a time: 2 MB, which fit into a processor's cache."""


def linear_combination(
    tensors: Sequence[Tensor], coefficients: np.ndarray, device: torch.device | str = "cpu"
) -> Tensor:
    """Return sum_i x_i theta_i of N stored tensors for M targets, (M, *shape), on the CPU; each is read once.

    The sum is theta_N sum_i x_i + sum_i x_i (theta_i - theta_N): at short lengths the coefficients are large and of
    both signs, while differences between weights of one run are small. Up to TENSORS_PER_BLOCK products are summed in
    the precision of the weights (32 bits at least), the rest in float64. A target that is one of the tensors is
    returned bit for bit. Tensors with coefficients 0 are not read. Of integer tensors the last is returned.

    Args:
        tensors: The stored tensors (N), which may be mapped into memory.
        coefficients: The coefficients x, (N, M).
        device: Device that computes the sum.
    """
    x = np.asarray(coefficients, np.float64)
    used = np.flatnonzero(x.any(axis=1)).tolist()
    flat, x = [tensors[i].flatten() for i in used], x[used].T
    others, last = flat[:-1], flat[-1]
    shape, n = tensors[used[-1]].shape, last.numel()
    if not last.is_floating_point():
        return last.view(shape).expand(len(x), *shape).clone()
    dtype = torch.promote_types(last.dtype, torch.float32)
    chunk = CHUNK_ELEMENTS if torch.device(device).type == "cpu" else 64 * CHUNK_ELEMENTS
    products = torch.tensor(x, dtype=dtype, device=device)
    sums = torch.tensor(x.sum(axis=1, keepdims=True), device=device)
    result = torch.empty(len(x), n, dtype=last.dtype)
    difference = torch.empty(TENSORS_PER_BLOCK, min(n, chunk), dtype=dtype, device=device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        anchor = last[start:stop].to(device, dtype)
        total = sums * anchor.double()
        for first in range(0, len(others), TENSORS_PER_BLOCK):
            block = others[first : first + TENSORS_PER_BLOCK]
            for row, tensor in zip(difference, block, strict=False):
                torch.sub(tensor[start:stop].to(device), anchor, out=row[: stop - start])
            total += products[:, first : first + len(block)] @ difference[: len(block), : stop - start]
        result[:, start:stop] = total
    for target, row in zip(result, x, strict=True):
        if np.count_nonzero(row) == 1 and row.sum() == 1:
            target.copy_(flat[int(row.argmax())])
    return result.view(len(x), *shape)
