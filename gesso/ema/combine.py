"""Linear combinations of stored weights, tensor by tensor, in one pass over the files."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class TensorReader(Protocol):
    """Interface of one stored set of weights."""

    def meta_tensor(self, name: str) -> Tensor:
        """Return the shape and dtype of a tensor as a meta tensor."""

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values start to stop of the flattened tensor."""


CHUNK_ELEMENTS, FILES_PER_BLOCK = 2**14, 32
"""elements of a tensor, and files, that are summed at once: 2 MB, which a processor's cache holds"""


def linear_combination(
    readers: Sequence[TensorReader], coefficients: np.ndarray, name: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Return sum_i x_i theta_i of one tensor for M targets, (M, *shape) on the CPU; each file is read once.

    The sum is theta_N sum_i x_i + sum_i x_i (theta_i - theta_N): at short lengths the coefficients are large and of
    both signs, while differences between weights of one run are small. Up to FILES_PER_BLOCK products are summed in the
    precision of the weights (32 bits at least), the rest in float64. A target that is one of the files is returned bit
    by bit. Files with coefficients 0 are not read. Integer tensors are those of the last file that is.

    Args:
        readers: The stored weights.
        coefficients: (readers, M).
        name: Name of the tensor.
        device: Device of the sum.
    """
    x = np.asarray(coefficients, np.float64)
    used = np.flatnonzero(x.any(axis=1)).tolist()
    readers, x = [readers[i] for i in used], x[used].T
    others, last = readers[:-1], readers[-1]
    like = last.meta_tensor(name)
    n = like.numel()
    if not like.is_floating_point():
        return last.read_slice(name, 0, n).view(like.shape).expand(len(x), *like.shape).clone()
    working, chunk = (
        torch.promote_types(like.dtype, torch.float32),
        CHUNK_ELEMENTS if torch.device(device).type == "cpu" else 64 * CHUNK_ELEMENTS,
    )
    products = torch.tensor(x, dtype=working, device=device)
    sums = torch.tensor(x.sum(axis=1, keepdims=True), device=device)
    result = torch.empty(len(x), n, dtype=like.dtype)
    difference = torch.empty(FILES_PER_BLOCK, min(n, chunk), dtype=working, device=device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        anchor = last.read_slice(name, start, stop).to(device, working)
        total = sums * anchor.double()
        for first in range(0, len(others), FILES_PER_BLOCK):
            block = others[first : first + FILES_PER_BLOCK]
            for row, reader in zip(difference, block, strict=False):
                torch.sub(reader.read_slice(name, start, stop).to(device), anchor, out=row[: stop - start])
            total += products[:, first : first + len(block)] @ difference[: len(block), : stop - start]
        result[:, start:stop] = total
    for target, row in zip(result, x, strict=True):
        if np.count_nonzero(row) == 1 and row.sum() == 1:
            target.copy_(readers[int(row.argmax())].read_slice(name, 0, n))
    return result.view(len(x), *like.shape)
