"""Sums of stored weights, tensor by tensor and part by part, in one pass over the files."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class TensorReader(Protocol):
    """One stored average."""

    def meta_tensor(self, name: str) -> Tensor:
        """Shape and dtype of a tensor, without its values."""

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Some of its values, in order (stop - start,)."""


CHUNK_ELEMENTS, FILES_PER_BLOCK = 2**14, 32
"""elements of a tensor, and files, that are summed at once: 2 MB, which a processor's cache holds"""


def linear_combination(
    readers: Sequence[TensorReader], coefficients: np.ndarray, name: str, device: torch.device | str = "cpu"
) -> Tensor:
    """sum_i x_i theta_i of one tensor for M targets, (M, *shape) on the CPU; each file is read once.

    coefficients (readers, M). The sum is theta_N sum_i x_i + sum_i x_i (theta_i - theta_N): at short lengths the
    coefficients are large and of both signs, and differences between weights of one run are small. Products of up to
    BLOCK differences are summed in the precision of the weights (32 bits at least), all else in float64. A target that
    is one of the files is that file's, bit by bit. Files whose coefficients are 0 are not read. Whole numbers are those
    of the last file that is.
    """
    x = np.asarray(coefficients, np.float64)
    used = np.flatnonzero(x.any(axis=1))
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
