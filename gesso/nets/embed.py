"""Embeddings of time, class and position for the transformers.

Legend: B batch, D width, h w rows and columns of the token grid.
"""

import math

import torch
from torch import Tensor, nn


def sinusoids(a: Tensor, n: int, longest: float = 1e4) -> Tensor:
    """(B,) -> (B, n): cosines, then sines, of a * longest^(-i/(n/2))."""
    half = n // 2
    frequencies = torch.exp(-math.log(longest) / half * torch.arange(half, device=a.device, dtype=a.dtype))
    angle = a[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbed(nn.Module):
    """256 sinusoids of c_noise, then Linear-SiLU-Linear. (B,) -> (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, c_noise: Tensor) -> Tensor:
        return self.mlp(sinusoids(c_noise, 256))


def sincos_2d(width: int, h: int, w: int, base: tuple[int, int]) -> Tensor:
    """2-D sine-cosine positions on the resampled grid, (1, h*w, D) float32.

    The grid runs from 0 to `base` whatever h and w are (Berrada et al., Pseudocode 1, which at
    h = base steps by h/(h-1), not by 1). First half of D from the column, second from the row; in each
    half sines, then cosines, of omega = 1e4^(-i/(D/4)).
    """
    rows = torch.linspace(0, base[0], h, dtype=torch.float64)
    columns = torch.linspace(0, base[1], w, dtype=torch.float64)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    omega = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for coordinate in (column, row):
        angle = coordinate.flatten()[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()[None]


class GridPosition(nn.Module):
    """Positions of the training grid as a constant, other grids made when first seen."""

    def __init__(self, width: int, base: tuple[int, int]):
        super().__init__()
        self.width, self.base = width, base
        self.register_buffer("table", sincos_2d(width, *base, base), persistent=False)

    def forward(self, h: int, w: int) -> Tensor:
        if (h, w) == self.base:
            return self.table
        return sincos_2d(self.width, h, w, self.base).to(self.table)
