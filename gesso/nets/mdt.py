"""MDTv2 (Gao et al. 2023): DiT with long skips, relative position bias and a masked branch in training.

    encoder  n in-blocks, n out-blocks; out-block j takes the output of in-block n-1-j as its skip
    middle   plain pass: + decoder positions; masked pass: the side-interpolater
    decoder  blocks that each take the position-embedded input tokens as their skip

One training step costs two passes with the same x0 and noise level and independent noise,
loss = full + masked, both over all tokens (`MDTNet.forward`, `MDTNet.masked`; `keep_ids` says what the
encoder of the masked one sees). Weighting of the original: min(SNR, 5) / SNR.

Grids other than the trained one span the same area, corners on corners, as the sincos positions of the
other networks do: learned positions and the table of the relative bias are read bilinearly.

Legend: B batch, C channels, H W height and width, D width, h heads, T tokens, K kept tokens, G rows of
the trained grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso import keyed
from gesso.cond import Cond
from gesso.config import MDT, Inputs
from gesso.nets.embed import ControlEmbed, SemanticTokens, TimeEmbed, sincos_2d
from gesso.nets.layers import AdaLN, Mlp, PatchEmbed, linear, modulate, split_heads, unpatchify, variance_head


def keep_ids(seed: int, sample: Tensor, nimg: int, tokens: int, ratio_range: tuple[float, float]) -> Tensor:
    """Ids of the tokens that the masked branch keeps, ascending, (B, K) int64.

    sample (B,) int64: sample counters. nimg: images seen before this step. The share of hidden tokens is
    uniform in ratio_range and keyed to (seed, nimg), so that K is one number for the whole step on all
    ranks; which ones is keyed to (seed, sample). At least one token is kept.
    """
    low, high = ratio_range
    ratio = low + (high - low) * float(keyed.uniform(seed, torch.tensor([nimg]), "mask ratio"))
    kept = max(1, int(tokens * (1 - ratio)))
    order = keyed.words(seed, sample, "mask", tokens).argsort(dim=1, stable=True)
    return order[:, :kept].sort(dim=1).values


def relative_index(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """(T, T) int64: where a table of all offsets (query less key) of an h x w grid has each pair, row by row."""
    token = torch.arange(h * w, device=device)
    row, column = token // w, token % w
    rows = row[:, None] - row[None, :] + h - 1
    columns = column[:, None] - column[None, :] + w - 1
    return rows * (2 * w - 1) + columns


def hats(coordinate: Tensor, n: int) -> Tensor:
    """Linear interpolation as a matrix (m, n): coordinate (m,) in units of the n knots 0, 1, ..., n-1."""
    return (1 - (coordinate[:, None] - torch.arange(n)).abs()).clamp(min=0)


class Layout(NamedTuple):
    """Where the tokens of one pass are.

    index (T, T) of `relative_index`; resample: None on the trained grid, else the interpolation of the
    table's rows (2h-1, 2G-1) and columns (2w-1, 2G-1); keep (B, K), None: all.
    """

    index: Tensor
    resample: tuple[Tensor, Tensor] | None
    keep: Tensor | None = None


class LearnedPosition(nn.Module):
    """Positions of the trained grid as a parameter, sincos at start with step 1, (1, T, D)."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(sincos_2d(width, grid, grid, (grid - 1, grid - 1)))

    def forward(self, h: int, w: int) -> Tensor:
        if h == w == self.grid:
            return self.table
        spans = [torch.linspace(0, self.grid - 1, n, dtype=torch.float64) for n in (h, w)]
        rows, columns = (hats(span, self.grid).to(self.table) for span in spans)
        square = self.table.unflatten(1, (self.grid, self.grid))
        return torch.einsum("yi,bijd,xj->byxd", rows, square, columns).flatten(1, 2)


class RelativeBias(nn.Module):
    """A learned number per head and offset between query and key, added to the logits of attention.

    table ((2G-1)^2 + 3, h). The last three rows are the published layout's, which kept them for a class
    token; no such token exists and they are never read. They stay for the sake of published weights.
    """

    def __init__(self, heads: int, grid: int):
        super().__init__()
        self.side = 2 * grid - 1
        self.table = nn.Parameter(torch.empty(self.side**2 + 3, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, layout: Layout) -> Tensor:
        """(1, h, T, T), or (B, h, K, K) of the kept tokens."""
        table = self.table[: self.side**2]
        if layout.resample is not None:
            rows, columns = layout.resample
            square = table.unflatten(0, (self.side, self.side))
            table = torch.einsum("yi,ijh,xj->yxh", rows, square, columns).flatten(0, 1)
        bias = table[layout.index].permute(2, 0, 1)
        if layout.keep is None:
            return bias[None]
        return bias[:, layout.keep[:, :, None], layout.keep[:, None, :]].transpose(0, 1)


class Block(nn.Module):
    """DiT's block with relative position bias; with `skip`, x = Linear([x, skip]) comes first."""

    def __init__(self, cfg: MDT, grid: int, skip: bool):
        super().__init__()
        self.heads = cfg.heads
        self.skip = linear(2 * cfg.width, cfg.width) if skip else None
        self.ada = AdaLN(cfg.width, 6)
        self.qkv = linear(cfg.width, 3 * cfg.width)
        self.bias = RelativeBias(cfg.heads, grid)
        self.out = linear(cfg.width, cfg.width)
        self.mlp = Mlp(cfg.width, int(cfg.width * cfg.mlp_ratio))

    def attend(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        bias = self.bias(layout).to(q.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, c: Tensor, layout: Layout, skip: Tensor | None = None) -> Tensor:
        """x, skip (B, T or K, D), c (B, D)."""
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=2))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.ada(c)
        x = torch.addcmul(x, gate, self.attend(modulate(x, shift, scale), layout))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class SideInterpolater(nn.Module):
    """Predicts the hidden tokens from the kept ones: mask tokens, positions, one block over all tokens."""

    def __init__(self, cfg: MDT, grid: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.block = Block(cfg, grid, skip=False)

    def forward(self, x: Tensor, position: Tensor, c: Tensor, layout: Layout) -> Tensor:
        """x (B, K, D) kept tokens in the order of layout.keep, position (1, T, D) -> (B, T, D) in grid order."""
        place = layout.keep[:, :, None]
        hidden = torch.ones(len(x), position.shape[1], 1, dtype=torch.bool, device=x.device).scatter(1, place, False)
        filled = self.mask_token.to(x.dtype).expand(len(x), position.shape[1], -1)
        filled = filled.scatter(1, place.expand(-1, -1, x.shape[2]), x) + position
        return torch.where(hidden, self.block(filled, c, layout._replace(keep=None)), filled)


class MDTNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W).

    c, which modulates every block, is time + class + control. The plain pass does not use
    `self.side`, whose parameters get a gradient from `masked` alone.
    """

    def __init__(self, cfg: MDT, inputs: Inputs):
        super().__init__()
        self.patch, self.grid = cfg.patch, inputs.resolution // cfg.patch
        half = (cfg.depth - cfg.decoder) // 2
        self.patch_embed = PatchEmbed(inputs.channels, cfg.width, cfg.patch)
        self.position = LearnedPosition(cfg.width, self.grid)
        self.decoder_position = LearnedPosition(cfg.width, self.grid)
        self.register_buffer("index", relative_index(self.grid, self.grid), persistent=False)
        self.time = TimeEmbed(cfg.width)
        self.control = ControlEmbed(inputs.control, cfg.width)
        self.semantic = SemanticTokens(inputs, cfg.width, cfg.class_embed, nn.SiLU()) if inputs.num_classes else None
        self.in_blocks = nn.ModuleList(Block(cfg, self.grid, skip=False) for _ in range(half))
        self.out_blocks = nn.ModuleList(Block(cfg, self.grid, skip=True) for _ in range(half))
        self.side = SideInterpolater(cfg, self.grid)
        self.decoder = nn.ModuleList(Block(cfg, self.grid, skip=True) for _ in range(cfg.decoder))
        self.final_ada = AdaLN(cfg.width, 2)
        self.final = linear(cfg.width, cfg.patch**2 * inputs.channels, zero=True)
        self.learned_variance = cfg.learned_variance
        self.variance = variance_head(cfg.width, cfg.patch, inputs.channels) if cfg.learned_variance else None

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, variance: bool = False) -> Tensor:
        """The network as it is sampled from; with the learned variance (B, 2 C, H, W), the variance after the image."""
        tokens, c, layout, h, w = self._begin(x, c_noise, progress, cond)
        decoded = self._encode(tokens, c, layout) + self.decoder_position(h, w).to(tokens.dtype)
        return self._decode(decoded, tokens, c, layout, h, w, variance)

    def masked(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, keep: Tensor) -> Tensor:
        """The pass whose encoder sees the tokens `keep` (B, K) int64 alone, in any order, each at most once.

        Returns F at all positions. With all tokens kept it equals `forward`.
        """
        tokens, c, layout, h, w = self._begin(x, c_noise, progress, cond)
        layout = layout._replace(keep=keep)
        kept = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        position = self.decoder_position(h, w).to(tokens.dtype)
        filled = self.side(self._encode(kept, c, layout), position, c, layout)
        return self._decode(filled, tokens, c, layout._replace(keep=None), h, w)

    def _begin(
        self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond
    ) -> tuple[Tensor, Tensor, Layout, int, int]:
        """Position-embedded tokens (B, T, D), c (B, D), the layout of all tokens and its rows and columns."""
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.patch_embed(x)
        tokens = tokens + self.position(h, w).to(tokens.dtype)
        c = self.time(c_noise)
        if self.semantic:
            c = c + self.semantic(cond, x)[0][:, 0]
        return tokens, self.control.add(c, cond, progress), self._layout(h, w), h, w

    def _layout(self, h: int, w: int) -> Layout:
        if h == w == self.grid:
            return Layout(self.index, None)
        # Offset -(n-1)..(n-1) of the grid at hand stands for -(G-1)..(G-1) of the trained one.
        offsets = [torch.arange(1 - n, n, dtype=torch.float64) / max(n - 1, 1) for n in (h, w)]
        like = self.position.table
        rows, columns = (hats((self.grid - 1) * (1 + o), 2 * self.grid - 1).to(like) for o in offsets)
        return Layout(relative_index(h, w, self.index.device), (rows, columns))

    def _encode(self, x: Tensor, c: Tensor, layout: Layout) -> Tensor:
        skips = []
        for block in self.in_blocks:
            x = block(x, c, layout)
            skips.append(x)
        for block, skip in zip(self.out_blocks, reversed(skips), strict=True):
            x = block(x, c, layout, skip)
        return x

    def _decode(
        self, x: Tensor, tokens: Tensor, c: Tensor, layout: Layout, h: int, w: int, variance: bool = False
    ) -> Tensor:
        for block in self.decoder:
            x = block(x, c, layout, tokens)
        shift, scale = self.final_ada(c)
        x = modulate(x, shift, scale)
        layers = (self.final, self.variance) if variance else (self.final,)
        images = [unpatchify(layer(x), h, w, self.patch) for layer in layers]
        return torch.cat(images, dim=1) if variance else images[0]
