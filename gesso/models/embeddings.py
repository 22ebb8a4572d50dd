"""Embeddings of time, class, text, control variables and position.

Legend: B batch, D width, S semantic tokens, h w rows and columns of the token grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import ControlSpec, InputSpec
from gesso.models.layers import autocast_disabled
from gesso.models.mp import MPLinear, mp_silu


def sinusoidal_embedding(values: Tensor, n: int, max_period: float = 1e4) -> Tensor:
    """Return (B, n) for values (B,): cosines, then sines, of value * max_period^(-i/(n/2))."""
    half = n // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=values.device, dtype=values.dtype))
    angle = values[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Embedding (B, D) of c_noise (B,): 256 sinusoids, then Linear-SiLU-Linear."""

    def __init__(self, width: int):
        super().__init__()
        first, second = nn.Linear(256, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Return the embedding (B, D)."""
        with autocast_disabled(c_noise):
            return self.mlp(sinusoidal_embedding(c_noise, 256))


def sincos_pos_embed_2d(width: int, h: int, w: int, last_coordinate: tuple[float, float]) -> Tensor:
    """Return 2-D sine-cosine positions, (1, h*w, D) float32, from 0 at the first row and column to `last_coordinate`.

    The first half of D encodes the column, the second the row; each half has sines, then cosines, of coordinate *
    omega with omega = 1e4^(-i/(D/4)).
    """
    rows = torch.linspace(0, last_coordinate[0], h, dtype=torch.float64)
    columns = torch.linspace(0, last_coordinate[1], w, dtype=torch.float64)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    omega = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for coordinate in (column, row):
        angle = coordinate.flatten()[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()[None]


class SinCosPosEmbed(nn.Module):
    """Sine-cosine positions, (1, h*w, D): a constant for the training grid, computed on demand for other grids.

    The modes differ in the step between neighboring tokens of a grid of n tokens per side. base is the side of
    `base_grid`, the training grid unless weights come from another resolution.
    resampled: base/(n-1), from 0 to base (Berrada et al., Pseudocode 1); with `source_grid`, base/(source-1) on every
    grid, the step of the source (Section 3.4, extrapolation).
    extrapolated: 1, as in DiT and in the commented-out line of Pseudocode 1.
    interpolated: the extrapolated table of the base grid, resized bicubically (Section 2.2, references 2 and 47); with
    `source_grid`, the resampled table of the source.
    proportional: base/n, as in PixArt and diffusers.
    """

    table: Tensor

    def __init__(
        self,
        width: int,
        base_grid: tuple[int, int],
        mode: str,
        grid: tuple[int, int] | None = None,
        source_grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.width, self.mode = width, mode
        self.base_grid, self.grid, self.source_grid = base_grid, grid or base_grid, source_grid
        self.register_buffer("table", self.compute(*self.grid), persistent=False)

    def compute(self, h: int, w: int) -> Tensor:
        """Return the positions of a grid of h x w tokens, (1, h*w, D) float32."""
        base, source = self.base_grid, self.source_grid
        last: tuple[float, float] = (h - 1, w - 1)
        if self.mode == "interpolated":
            if (h, w) != (source or base):
                return self._interpolate(h, w)
            last = base if source else last
        elif self.mode == "proportional":
            last = base[0] * (h - 1) / h, base[1] * (w - 1) / w
        elif self.mode == "resampled" and source is None:
            last = base
        elif self.mode == "resampled" and source is not None:
            last = base[0] / max(source[0] - 1, 1) * (h - 1), base[1] / max(source[1] - 1, 1) * (w - 1)
        return sincos_pos_embed_2d(self.width, h, w, last)

    def _interpolate(self, h: int, w: int) -> Tensor:
        """Return the table of the source grid, resized bicubically."""
        grid = self.source_grid or self.base_grid
        last = self.base_grid if self.source_grid else (grid[0] - 1, grid[1] - 1)
        square = sincos_pos_embed_2d(self.width, *grid, last).unflatten(1, grid).permute(0, 3, 1, 2)  # 1 D h w
        return F.interpolate(square, size=(h, w), mode="bicubic").flatten(2).transpose(1, 2)

    def forward(self, h: int, w: int) -> Tensor:
        """Return the positions of a grid of h x w tokens, (1, h*w, D)."""
        return self.table if (h, w) == self.grid else self.compute(h, w).to(self.table)


def build_pos_embed(inputs: InputSpec, width: int, patch_size: int, mode: str) -> SinCosPosEmbed:
    """Return the position embedding of a network for images of inputs.resolution."""
    grid, base = (side // patch_size for side in (inputs.resolution, inputs.pos_embed_base or inputs.resolution))
    source = inputs.pos_embed_span // patch_size if inputs.pos_embed_span else None
    return SinCosPosEmbed(width, (base, base), mode, (grid, grid), (source, source) if source else None)


class SemanticEmbedding(nn.Module):
    """Semantic tokens for attention: the class as one token, or the text.

    The projection of a class is "table" (its row of the table) or "mlp" (Linear-activation-Linear after it), that of
    text "mlp" (text_dim -> D -> D), "linear" or "none". A withheld class is the last row of the table; withheld text
    is zero.
    """

    def __init__(self, inputs: InputSpec, width: int, projection: str, activation: nn.Module):
        super().__init__()
        self.num_classes = inputs.num_classes
        if self.num_classes:
            self.table = nn.Embedding(self.num_classes + 1, width)
            nn.init.normal_(self.table.weight, std=0.02)
        n_in = width if self.num_classes else inputs.text_dim
        self.mlp: nn.Module
        if projection == "mlp":
            self.mlp = nn.Sequential(nn.Linear(n_in, width), activation, nn.Linear(width, width))
        elif projection == "linear":
            self.mlp = nn.Linear(n_in, width)
        else:
            self.mlp = nn.Identity()

    def forward(self, cond: Cond, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens (B, S, D) and their attention mask (B, S), None for all; x is any tensor of the batch."""
        if self.num_classes:
            with autocast_disabled(x):
                return self.mlp(self.table(labels_or_null(cond, self.num_classes, x))[:, None]), None
        text, mask = text_or_zero(cond, x)
        return self.mlp(text), mask


def text_or_zero(cond: Cond, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return text tokens (B, S, D) in the dtype of x, zero where withheld, and the mask (B, S) of tokens to attend to.

    Raises:
        ValueError: Cond.text is None, so that its length is unknown.
    """
    text = cond.text_or_zero()
    if text is None:
        raise ValueError("a network built for text needs Cond.text; withhold it by has_semantic, not by leaving it out")
    return text.to(x.dtype), cond.attention_mask()


def pooled_or_zero(cond: Cond, x: Tensor) -> Tensor:
    """Return pooled text (B, D) in the dtype of x, zero where withheld.

    Raises:
        ValueError: Cond.pooled is None.
    """
    pooled = cond.pooled_or_zero()
    if pooled is None:
        raise ValueError("a network built for pooled text needs Cond.pooled; withhold it by has_semantic instead")
    return pooled.to(x.dtype)


def labels_or_null(cond: Cond, num_classes: int, x: Tensor) -> Tensor:
    """Return labels (B,), the null class where there is no label; x is any tensor of the batch."""
    label = cond.label_or_null(num_classes)
    return torch.full((x.shape[0],), num_classes, device=x.device) if label is None else label


def gamma_c(control: ControlSpec, progress: Tensor) -> Tensor:
    """Return the weight of low-level control at progress t, 1 at clean (Berrada et al. Section 2.1, Table A6)."""
    match control.schedule:
        case "cosine":
            return (1 - torch.cos(math.pi * (1 - progress) ** control.alpha)) / 2
        case "linear":
            return 1 - progress
        case "step":
            return (progress <= control.step_threshold).to(progress.dtype)
        case "zero":
            return torch.zeros_like(progress)
        case _:
            return torch.ones_like(progress)


def control_features(values: Tensor) -> Tensor:
    """Return 256 sinusoids of each control variable, (B, 256 n) for (B, n), as SDXL embeds sizes."""
    return sinusoidal_embedding(values.flatten(), 256).unflatten(0, values.shape).flatten(1)


def control_groups(control: ControlSpec) -> dict[str, int]:
    """Return the number of variables of each embedding: "high" and "low", or "all"."""
    parts = {"high": control.num_high, "low": control.num_low}
    if control.mlp == "joint":
        parts = {"all": control.num_high + control.num_low}
    return {name: count for name, count in parts.items() if count}


class ControlEmbedding(nn.Module):
    """Control embedding c_emb = E_h(phi_h) + gamma_c(t) E_l(phi_l) (Berrada et al. Eq. 1).

    E_h and E_l are sinusoids and a 2-layer SiLU MLP, zero at initialization. Absent control contributes exactly zero.
    """

    def __init__(self, control: ControlSpec, width: int):
        super().__init__()
        self.control = control
        self.mlps = nn.ModuleDict()
        for name, count in control_groups(control).items():
            first, second = nn.Linear(256 * count, width), nn.Linear(width, width)
            nn.init.zeros_(second.weight)
            nn.init.zeros_(second.bias)
            self.mlps[name] = nn.Sequential(first, nn.SiLU(), second)

    def add(self, c: Tensor, cond: Cond, progress: Tensor) -> Tensor:
        """Return c + c_emb for c (B, D) and progress (B,)."""
        if cond.control_high is None and cond.control_low is None:
            return c
        total = torch.zeros_like(c)
        with autocast_disabled(c):
            for name, mlp in self.mlps.items():
                part = mlp(control_features(control_values(cond, name).to(c.dtype)))
                total = total + (gamma_c(self.control, progress)[:, None] * part if name == "low" else part)
        return c + mask_control(total, cond)


class MPControlEmbedding(nn.Module):
    """Magnitude-preserving control embedding c' = (c + g c_emb) / sqrt(1 + g^2) with a learned gain g, initially 0."""

    def __init__(self, control: ControlSpec, width: int):
        super().__init__()
        self.control = control
        groups = control_groups(control)
        self.first = nn.ModuleDict({name: MPLinear(256 * count, width) for name, count in groups.items()})
        self.second = nn.ModuleDict({k: MPLinear(width, width) for k in self.first})
        self.gain = nn.Parameter(torch.zeros(1)) if self.first else None

    def add(self, c: Tensor, cond: Cond, progress: Tensor) -> Tensor:
        """Return c', (B, D), for c (B, D) and progress (B,)."""
        if self.gain is None or (cond.control_high is None and cond.control_low is None):
            return c
        total = torch.zeros_like(c)
        with autocast_disabled(c):
            for name, first in self.first.items():
                features = math.sqrt(2) * control_features(control_values(cond, name).to(c.dtype))
                part = self.second[name](mp_silu(first(features)))
                total = total + (gamma_c(self.control, progress)[:, None] * part if name == "low" else part)
        gain = mask_control(self.gain.expand(c.shape[0], 1), cond)
        return (c + gain * total) / torch.sqrt(1 + gain**2)


def control_values(cond: Cond, name: str) -> Tensor:
    """Return the control variables (B, n) of a level ("high", "low") or of both ("all")."""
    if name == "all":
        return torch.cat([v for v in (cond.control_high, cond.control_low) if v is not None], dim=1)
    values = cond.control_high if name == "high" else cond.control_low
    if values is None:
        raise ValueError(f"a network built for control needs Cond.control_{name}; withhold it by has_control")
    return values


def mask_control(total: Tensor, cond: Cond) -> Tensor:
    """Return `total` (B, n), zero where the control of a sample is withheld."""
    return total if cond.has_control is None else torch.where(cond.has_control[:, None], total, 0)
