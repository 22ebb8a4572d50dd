"""Embeddings of time, class, text, control variables and position.

Legend: B batch, D width, S semantic tokens, h w rows and columns of the token grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import Control, Inputs
from gesso.nets.layers import unrounded
from gesso.nets.mp import MPLinear, mp_silu


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
        with unrounded(c_noise):
            return self.mlp(sinusoids(c_noise, 256))


def sincos_2d(width: int, h: int, w: int, last: tuple[float, float]) -> Tensor:
    """2-D sine-cosine positions, (1, h*w, D) float32, the last token of a column or row being at `last`, the first at 0.

    First half of D from the column, second from the row; in each half sines, then cosines, of
    omega = 1e4^(-i/(D/4)).
    """
    rows = torch.linspace(0, last[0], h, dtype=torch.float64)
    columns = torch.linspace(0, last[1], w, dtype=torch.float64)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    omega = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for coordinate in (column, row):
        angle = coordinate.flatten()[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()[None]


class GridPosition(nn.Module):
    """Sine-cosine positions, (1, h*w, D): those of the training grid a constant, others made when seen.

    They are counted on the grid `base`, which is the training grid but where weights came from another resolution.
    resampled: n tokens from 0 to base, step base/(n-1) on every grid (Berrada et al., Pseudocode 1); with `span`, step
    base/(span-1) on every grid, that of a source of `span` tokens (Section 3.4, extrapolation).
    extrapolated: step 1 on every grid, as DiT has it and Pseudocode 1 in its commented-out line.
    interpolated: the extrapolated table of that grid, resized bicubically (Section 2.2, its references 2 and 47); with
    `span`, the resampled table of a source of `span` tokens.
    proportional: step base/n on every grid, as PixArt and diffusers have it.
    """

    def __init__(
        self,
        width: int,
        base: tuple[int, int],
        positions: str,
        grid: tuple[int, int] | None = None,
        span: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.width, self.base, self.positions, self.grid, self.span = width, base, positions, grid or base, span
        self.register_buffer("table", self.made(*self.grid), persistent=False)

    def made(self, h: int, w: int) -> Tensor:
        sides = (h, w)
        match self.positions:
            case "resampled" if self.span is None:
                last = self.base
            case "resampled":
                steps = (base / max(span - 1, 1) for base, span in zip(self.base, self.span, strict=True))
                last = tuple(step * (n - 1) for step, n in zip(steps, sides, strict=True))
            case "proportional":
                last = tuple(base * (n - 1) / n for base, n in zip(self.base, sides, strict=True))
            case "interpolated" if sides != (self.span or self.base):
                return self._resized(h, w)
            case "interpolated" if self.span:
                last = self.base
            case _:
                last = h - 1, w - 1
        return sincos_2d(self.width, h, w, last)

    def _resized(self, h: int, w: int) -> Tensor:
        """Return the table of the source's grid, resized bicubically."""
        grid = self.span or self.base
        last = self.base if self.span else (grid[0] - 1, grid[1] - 1)
        square = sincos_2d(self.width, *grid, last).unflatten(1, grid).permute(0, 3, 1, 2)  # 1 D h w
        return F.interpolate(square, size=(h, w), mode="bicubic").flatten(2).transpose(1, 2)

    def forward(self, h: int, w: int) -> Tensor:
        return self.table if (h, w) == self.grid else self.made(h, w).to(self.table)


def grid_position(inputs: Inputs, width: int, patch: int, positions: str) -> GridPosition:
    """That of a network for x of inputs.resolution."""
    grid, base = (side // patch for side in (inputs.resolution, inputs.positions_at or inputs.resolution))
    span = inputs.positions_span and (inputs.positions_span // patch,) * 2
    return GridPosition(width, (base, base), positions, (grid, grid), span)


class SemanticTokens(nn.Module):
    """The class or the text as tokens for attention. A class is one token.

    embed "table": the class table's row as it is; "mlp": Linear-act-Linear after it. Text goes through
    "mlp" (text_width -> D -> D) or "linear". A withheld class is the table's last row; withheld text is
    zeros.
    """

    def __init__(self, inputs: Inputs, width: int, embed: str, activation: nn.Module):
        super().__init__()
        self.num_classes = inputs.num_classes
        if self.num_classes:
            self.table = nn.Embedding(self.num_classes + 1, width)
            nn.init.normal_(self.table.weight, std=0.02)
        n_in = width if self.num_classes else inputs.text_width
        if embed == "mlp":
            self.mlp = nn.Sequential(nn.Linear(n_in, width), activation, nn.Linear(width, width))
        elif embed == "linear":
            self.mlp = nn.Linear(n_in, width)
        else:
            self.mlp = nn.Identity()

    def forward(self, cond: Cond, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, S, D) and mask (B, S) of those to attend to, None: all. x is any tensor of the batch."""
        if self.num_classes:
            with unrounded(x):
                return self.mlp(self.table(null_filled(cond, self.num_classes, x))[:, None]), None
        text, mask = text_filled(cond, x)
        return self.mlp(text), mask


def text_filled(cond: Cond, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text tokens (B, S, D) in the dtype of x, zeros where withheld, and the mask (B, S) of those to attend to.

    Raises ValueError when there is no text at all: its length would be unknown.
    """
    text = cond.text_or_null()
    if text is None:
        raise ValueError("a network built for text needs Cond.text; withhold it by has_semantic, not by leaving it out")
    return text.to(x.dtype), cond.mask_or_null()


def pooled_filled(cond: Cond, x: Tensor) -> Tensor:
    """Pooled text (B, D) in the dtype of x, zero where withheld.

    Raises ValueError when there is none at all, which would not be the zeros that the network was trained with.
    """
    pooled = cond.pooled_or_null()
    if pooled is None:
        raise ValueError("a network built for pooled text needs Cond.pooled; withhold it by has_semantic instead")
    return pooled.to(x.dtype)


def null_filled(cond: Cond, num_classes: int, x: Tensor) -> Tensor:
    """(B,) labels; the null class where there is none. x is any tensor of the batch."""
    label = cond.label_or_null(num_classes)
    return torch.full((len(x),), num_classes, device=x.device) if label is None else label


def gamma_c(control: Control, progress: Tensor) -> Tensor:
    """Weight of the low-level control at progress t, 1 at clean (Berrada et al. Section 2.1, Table A6)."""
    match control.schedule:
        case "cosine":
            return (1 - torch.cos(math.pi * (1 - progress) ** control.alpha)) / 2
        case "linear":
            return 1 - progress
        case "step":
            return (progress <= control.edge).to(progress.dtype)
        case "zero":
            return torch.zeros_like(progress)
        case _:
            return torch.ones_like(progress)


def control_features(values: Tensor) -> Tensor:
    """(B, n) control variables -> (B, 256 n): sinusoids of each, as SDXL embeds sizes in pixels."""
    return sinusoids(values.flatten(), 256).unflatten(0, values.shape).flatten(1)


def control_parts(control: Control) -> dict[str, int]:
    """The embeddings that there are, with the number of variables in each: high and low, or all in one."""
    parts = {"high": control.high, "low": control.low}
    if control.mlp == "joint":
        parts = {"all": control.high + control.low}
    return {name: count for name, count in parts.items() if count}


class ControlEmbed(nn.Module):
    """c_emb = E_h(phi_h) + gamma_c(t) E_l(phi_l), each sinusoids and a 2-layer SiLU MLP, zero at start (Eq. 1).

    Absent control contributes exactly zero. `add(c, cond, progress)` returns c + c_emb.
    """

    def __init__(self, control: Control, width: int):
        super().__init__()
        self.control = control
        self.mlps = nn.ModuleDict()
        for name, count in control_parts(control).items():
            mlp = nn.Sequential(nn.Linear(256 * count, width), nn.SiLU(), nn.Linear(width, width))
            nn.init.zeros_(mlp[2].weight)
            nn.init.zeros_(mlp[2].bias)
            self.mlps[name] = mlp

    def add(self, c: Tensor, cond: Cond, progress: Tensor) -> Tensor:
        """c (B, D), progress (B,)."""
        if cond.control_high is None and cond.control_low is None:
            return c
        total = torch.zeros_like(c)
        with unrounded(c):
            for name, mlp in self.mlps.items():
                part = mlp(control_features(control_values(cond, name).to(c.dtype)))
                total = total + (gamma_c(self.control, progress)[:, None] * part if name == "low" else part)
        return c + present(total, cond)


class MPControl(nn.Module):
    """The same on the sphere: c' = (c + g e) / sqrt(1 + g^2) with a learned g, 0 at start, so that magnitudes stay."""

    def __init__(self, control: Control, width: int):
        super().__init__()
        self.control = control
        parts = control_parts(control)
        self.first = nn.ModuleDict({name: MPLinear(256 * count, width) for name, count in parts.items()})
        self.second = nn.ModuleDict({k: MPLinear(width, width) for k in self.first})
        self.gain = nn.Parameter(torch.zeros(1)) if self.first else None

    def add(self, c: Tensor, cond: Cond, progress: Tensor) -> Tensor:
        """c (B, D), progress (B,)."""
        if self.gain is None or (cond.control_high is None and cond.control_low is None):
            return c
        total = torch.zeros_like(c)
        with unrounded(c):
            for name, first in self.first.items():
                features = math.sqrt(2) * control_features(control_values(cond, name).to(c.dtype))
                part = self.second[name](mp_silu(first(features)))
                total = total + (gamma_c(self.control, progress)[:, None] * part if name == "low" else part)
        gain = present(self.gain.expand(len(c), 1), cond)
        return (c + gain * total) / torch.sqrt(1 + gain**2)


def control_values(cond: Cond, name: str) -> Tensor:
    """(B, n) control variables of one level, or of both."""
    if name == "all":
        return torch.cat([v for v in (cond.control_high, cond.control_low) if v is not None], dim=1)
    return cond.control_high if name == "high" else cond.control_low


def present(total: Tensor, cond: Cond) -> Tensor:
    """Zero (B, ...) where the control of a sample is withheld."""
    return total if cond.has_control is None else torch.where(cond.has_control[:, None], total, 0)
