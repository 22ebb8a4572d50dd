"""Draws that belong to a sample: Philox4x32-10 from (seed, sample, purpose), on any device, in any batch.

A draw depends on nothing but its key: not on the batch it is in, the rank that makes it, or what
was drawn before. Words and uniforms are integer arithmetic, equal on every machine; normals pass
through log and cosine in float64 and are rounded once, so that devices agree to the last bit or
nearly so.

Legend: B samples, N draws for each.
"""

import math
import zlib

import torch
from torch import Tensor

# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": multipliers and Weyl constants.
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32. `counter` holds four int64 tensors of 32-bit words that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps, but its 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def words(seed: int, sample: Tensor, purpose: str, n: int) -> Tensor:
    """Uniform 32-bit words as int64, shape (B, n). `sample` (B,) int64, below 2^63; seed below 2^64."""
    blocks = -(-n // 4)
    sample = sample.to(torch.int64)[:, None]
    block = torch.arange(blocks, device=sample.device)[None, :]
    stream = torch.full_like(block, zlib.crc32(purpose.encode()))
    counter = [block, stream, sample & _MASK, sample >> 32 & _MASK]
    out = philox([c.expand(len(sample), blocks) for c in counter], (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(out, dim=-1).flatten(1)[:, :n]


def uniform(seed: int, sample: Tensor, purpose: str, n: int = 1) -> Tensor:
    """Uniform on (0, 1), float64, shape (B, n): the centres of 2^32 equal intervals."""
    return (words(seed, sample, purpose, n).double() + 0.5) * 2.0**-32


def normal(
    seed: int, sample: Tensor, purpose: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal (Box-Muller), shape (B, *shape), on the device of `sample`. Not to be compiled."""
    n = math.prod(shape)
    u1, u2 = uniform(seed, sample, purpose, n + n % 2).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(u1)), (2 * math.pi) * u2
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :n].to(dtype).unflatten(1, shape)


def number(seed: int, sample: int, purpose: str) -> int:
    """One 32-bit word, to seed a torch generator (a CPU generator uses no more bits than that)."""
    return int(words(seed, torch.tensor([sample]), purpose, 1))
