"""Keyed random numbers: Philox4x32-10 of (seed, sample index, purpose), the same on any device and in any batch.

A random number depends on its key only: not on the batch, the rank or previous calls. Words and uniforms are integer
arithmetic, equal on every machine. Normals use log and cosine in float64 and are rounded once, so that devices agree
to the last bit or nearly so.

Legend: B samples, n numbers per sample.
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
    """Return four int64 tensors of 32-bit words: ten rounds of Philox4x32 on four that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product overflows, but its 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def random_bits(seed: int, sample_index: Tensor, purpose: str, n: int) -> Tensor:
    """Return uniform 32-bit words, (B, n) int64, of sample indices (B,) int64 and a seed below 2^64."""
    blocks = -(-n // 4)
    sample_index = sample_index.to(torch.int64)[:, None]
    block = torch.arange(blocks, device=sample_index.device)[None, :]
    stream = torch.full_like(block, zlib.crc32(purpose.encode()))
    counter = [block, stream, sample_index & _MASK, sample_index >> 32 & _MASK]
    out = philox([c.expand(len(sample_index), blocks) for c in counter], (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(out, dim=-1).flatten(1)[:, :n]


def uniform(seed: int, sample_index: Tensor, purpose: str, n: int = 1) -> Tensor:
    """Return uniform numbers in (0, 1), (B, n) float64: the centers of 2^32 equal intervals."""
    return (random_bits(seed, sample_index, purpose, n).double() + 0.5) * 2.0**-32


def normal(
    seed: int, sample_index: Tensor, purpose: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return standard normal numbers (Box-Muller), (B, *shape), on the device of `sample_index`; do not compile."""
    n = math.prod(shape)
    u1, u2 = uniform(seed, sample_index, purpose, n + n % 2).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(u1)), (2 * math.pi) * u2
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :n].to(dtype).unflatten(1, shape)


def derive_seed(seed: int, sample_index: int, purpose: str) -> int:
    """Return a 32-bit seed for a torch generator; a CPU generator does not use more bits."""
    return int(random_bits(seed, torch.tensor([sample_index]), purpose, 1))
