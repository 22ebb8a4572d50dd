"""MDTv2 (Gao et al. 2023): DiT with long skips, relative position bias and a masked branch in training.

    encoder  n in-blocks, n out-blocks; out-block j takes the output of in-block n-1-j as its skip
    middle   plain pass: + decoder positions; masked pass: the side-interpolater
    decoder  blocks that each take the position-embedded input tokens as their skip

A training step runs two passes with the same x0 and noise level and independent noise (`MDT.forward` and
`MDT.forward_masked`); the loss is the sum of both over all tokens. `sample_keep_ids` selects the tokens that the
encoder of the masked pass sees. The original weighting is min(SNR, 5) / SNR.

Other grids than that of training cover the same area, with aligned corners: learned positions and the table of the
relative bias are interpolated bilinearly.

Legend: B batch, C channels, H W height and width, D width, h heads, T tokens, K visible tokens, G rows of the training
grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso import rng
from gesso.conditioning import Cond
from gesso.config import InputSpec, MDTConfig
from gesso.models.embeddings import ControlEmbedding, SemanticEmbedding, TimestepEmbedding, sincos_pos_embed_2d
from gesso.models.layers import AdaLN, Mlp, PatchEmbed, build_variance_head, linear, modulate, split_heads, unpatchify


def sample_keep_ids(
    seed: int, sample_index: Tensor, nimg: int, num_tokens: int, ratio_range: tuple[float, float]
) -> Tensor:
    """Return the ids of the tokens that the masked pass sees, ascending, (B, K) int64 with K >= 1.

    The share of hidden tokens is uniform in ratio_range and keyed to (seed, nimg), so that K is the same for all
    samples and ranks of a step. The choice of tokens is keyed to (seed, sample index).

    Args:
        seed: Seed of the run.
        sample_index: Sample indices, (B,) int64.
        nimg: Number of training images before this step.
        num_tokens: Number of tokens T.
        ratio_range: Lowest and highest share of hidden tokens.
    """
    low, high = ratio_range
    ratio = low + (high - low) * float(rng.uniform(seed, torch.tensor([nimg]), "mask ratio"))
    num_visible = max(1, int(num_tokens * (1 - ratio)))
    order = rng.random_bits(seed, sample_index, "mask", num_tokens).argsort(dim=1, stable=True)
    return order[:, :num_visible].sort(dim=1).values


def relative_position_index(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Return the index (T, T) int64 of each query-key pair in a table of all offsets of an h x w grid."""
    token = torch.arange(h * w, device=device)
    row, column = token // w, token % w
    rows = row[:, None] - row[None, :] + h - 1
    columns = column[:, None] - column[None, :] + w - 1
    return rows * (2 * w - 1) + columns


def linear_interp_matrix(coordinate: Tensor, n: int) -> Tensor:
    """Return the matrix (m, n) of linear interpolation at `coordinate` (m,) between n values at 0, 1, ..., n-1."""
    return (1 - (coordinate[:, None] - torch.arange(n)).abs()).clamp(min=0)


class TokenLayout(NamedTuple):
    """Positions of the tokens of a pass.

    `bias_index` (T, T) is that of `relative_position_index`. `bias_interp` interpolates the rows (2h-1, 2G-1) and
    columns (2w-1, 2G-1) of the bias table; None on the training grid. `keep_ids` (B, K) are the visible tokens, None
    for all.
    """

    bias_index: Tensor
    bias_interp: tuple[Tensor, Tensor] | None
    keep_ids: Tensor | None = None


class LearnedPosEmbed(nn.Module):
    """Learned positions of the training grid, (1, T, D), initially sine-cosine with step 1."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(sincos_pos_embed_2d(width, grid, grid, (grid - 1, grid - 1)))

    def forward(self, h: int, w: int) -> Tensor:
        """Return the positions of a grid of h x w tokens, (1, h*w, D)."""
        if h == w == self.grid:
            return self.table
        spans = [torch.linspace(0, self.grid - 1, n, dtype=torch.float64) for n in (h, w)]
        rows, columns = (linear_interp_matrix(span, self.grid).to(self.table) for span in spans)
        square = self.table.unflatten(1, (self.grid, self.grid))
        return torch.einsum("yi,bijd,xj->byxd", rows, square, columns).flatten(1, 2)


class RelativePositionBias(nn.Module):
    """Learned bias of attention logits per head and offset between query and key.

    The table is ((2G-1)^2 + 3, h). Its last three rows, for a class token, are unused; they keep the layout of the
    published weights.
    """

    def __init__(self, heads: int, grid: int):
        super().__init__()
        self.side = 2 * grid - 1
        self.table = nn.Parameter(torch.empty(self.side**2 + 3, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, layout: TokenLayout) -> Tensor:
        """Return the bias (1, h, T, T), or (B, h, K, K) of the visible tokens."""
        table = self.table[: self.side**2]
        if layout.bias_interp is not None:
            rows, columns = layout.bias_interp
            square = table.unflatten(0, (self.side, self.side))
            table = torch.einsum("yi,ijh,xj->yxh", rows, square, columns).flatten(0, 1)
        bias = table[layout.bias_index].permute(2, 0, 1)
        if layout.keep_ids is None:
            return bias[None]
        return bias[:, layout.keep_ids[:, :, None], layout.keep_ids[:, None, :]].transpose(0, 1)


class Block(nn.Module):
    """Block of DiT with relative position bias; with `skip`, x = Linear([x, skip]) comes first."""

    def __init__(self, cfg: MDTConfig, grid: int, skip: bool):
        super().__init__()
        self.heads = cfg.num_heads
        self.skip = linear(2 * cfg.hidden_size, cfg.hidden_size) if skip else None
        self.ada = AdaLN(cfg.hidden_size, 6)
        self.qkv = linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.bias = RelativePositionBias(cfg.num_heads, grid)
        self.out = linear(cfg.hidden_size, cfg.hidden_size)
        self.mlp = Mlp(cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio))

    def attend(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Return self-attention with relative position bias, of the shape of x (B, T or K, D)."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        bias = self.bias(layout).to(q.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, c: Tensor, layout: TokenLayout, skip: Tensor | None = None) -> Tensor:
        """Return tokens of the shape of x and skip, (B, T or K, D); c (B, D)."""
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=2))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.ada(c)
        x = torch.addcmul(x, gate, self.attend(modulate(x, shift, scale), layout))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class SideInterpolater(nn.Module):
    """Side-interpolater: predicts the hidden tokens from the visible ones with mask tokens and one block."""

    def __init__(self, cfg: MDTConfig, grid: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.hidden_size))
        nn.init.normal_(self.mask_token, std=0.02)
        self.block = Block(cfg, grid, skip=False)

    def forward(self, x: Tensor, position: Tensor, c: Tensor, layout: TokenLayout) -> Tensor:
        """Return all tokens (B, T, D) in grid order from visible tokens x (B, K, D) and positions (1, T, D)."""
        assert layout.keep_ids is not None
        ids = layout.keep_ids[:, :, None]
        hidden = torch.ones(len(x), position.shape[1], 1, dtype=torch.bool, device=x.device).scatter(1, ids, False)
        filled = self.mask_token.to(x.dtype).expand(len(x), position.shape[1], -1)
        filled = filled.scatter(1, ids.expand(-1, -1, x.shape[2]), x) + position
        return torch.where(hidden, self.block(filled, c, layout._replace(keep_ids=None)), filled)


class MDT(nn.Module):
    """MDTv2 F = net(x, c_noise, progress, cond), x and F (B, C, H, W).

    c = time + class + control modulates every block. The plain pass does not use `side`, whose parameters get their
    gradient from `forward_masked` only.
    """

    index: Tensor

    def __init__(self, cfg: MDTConfig, inputs: InputSpec):
        super().__init__()
        self.patch_size, self.grid = cfg.patch_size, inputs.resolution // cfg.patch_size
        half = (cfg.depth - cfg.decoder_layers) // 2
        self.patch_embed = PatchEmbed(inputs.channels, cfg.hidden_size, cfg.patch_size)
        self.position = LearnedPosEmbed(cfg.hidden_size, self.grid)
        self.decoder_position = LearnedPosEmbed(cfg.hidden_size, self.grid)
        self.register_buffer("index", relative_position_index(self.grid, self.grid), persistent=False)
        self.time = TimestepEmbedding(cfg.hidden_size)
        self.control = ControlEmbedding(inputs.control, cfg.hidden_size)
        embed = SemanticEmbedding(inputs, cfg.hidden_size, cfg.class_embed, nn.SiLU()) if inputs.num_classes else None
        self.semantic = embed
        self.in_blocks = nn.ModuleList(Block(cfg, self.grid, skip=False) for _ in range(half))
        self.out_blocks = nn.ModuleList(Block(cfg, self.grid, skip=True) for _ in range(half))
        self.side = SideInterpolater(cfg, self.grid)
        self.decoder = nn.ModuleList(Block(cfg, self.grid, skip=True) for _ in range(cfg.decoder_layers))
        self.final_ada = AdaLN(cfg.hidden_size, 2)
        self.final = linear(cfg.hidden_size, cfg.patch_size**2 * inputs.channels, zero_init=True)
        self.learned_variance = cfg.learned_variance
        head = build_variance_head(cfg.hidden_size, cfg.patch_size, inputs.channels) if cfg.learned_variance else None
        self.variance = head

    def forward(
        self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, return_variance: bool = False
    ) -> Tensor:
        """Return F, (B, C, H, W), or with the learned variance (B, 2 C, H, W); see `gesso.models` for the arguments."""
        tokens, c, layout, h, w = self._embed_inputs(x, c_noise, progress, cond)
        decoded = self._encode(tokens, c, layout) + self.decoder_position(h, w).to(tokens.dtype)
        return self._decode(decoded, tokens, c, layout, h, w, return_variance)

    def forward_masked(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, keep_ids: Tensor) -> Tensor:
        """Return F at all positions from an encoder that sees the tokens `keep_ids` only; with all ids it is `forward`.

        keep_ids (B, K) int64 are distinct, in any order.
        """
        tokens, c, layout, h, w = self._embed_inputs(x, c_noise, progress, cond)
        layout = layout._replace(keep_ids=keep_ids)
        visible = tokens.gather(1, keep_ids[:, :, None].expand(-1, -1, tokens.shape[2]))
        position = self.decoder_position(h, w).to(tokens.dtype)
        filled = self.side(self._encode(visible, c, layout), position, c, layout)
        return self._decode(filled, tokens, c, layout._replace(keep_ids=None), h, w)

    def _embed_inputs(
        self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond
    ) -> tuple[Tensor, Tensor, TokenLayout, int, int]:
        """Return tokens with positions (B, T, D), c (B, D), the layout of all tokens and its rows and columns."""
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        tokens = self.patch_embed(x)
        tokens = tokens + self.position(h, w).to(tokens.dtype)
        c = self.time(c_noise)
        if self.semantic:
            c = c + self.semantic(cond, x)[0][:, 0]
        return tokens, self.control.add(c, cond, progress), self._token_layout(h, w), h, w

    def _token_layout(self, h: int, w: int) -> TokenLayout:
        if h == w == self.grid:
            return TokenLayout(self.index, None)
        # Offsets -(n-1)..(n-1) of this grid correspond to -(G-1)..(G-1) of the training grid.
        offsets = [torch.arange(1 - n, n, dtype=torch.float64) / max(n - 1, 1) for n in (h, w)]
        like = self.position.table
        rows, columns = (linear_interp_matrix((self.grid - 1) * (1 + o), 2 * self.grid - 1).to(like) for o in offsets)
        return TokenLayout(relative_position_index(h, w, self.index.device), (rows, columns))

    def _encode(self, x: Tensor, c: Tensor, layout: TokenLayout) -> Tensor:
        skips = []
        for block in self.in_blocks:
            x = block(x, c, layout)
            skips.append(x)
        for block, skip in zip(self.out_blocks, reversed(skips), strict=True):
            x = block(x, c, layout, skip)
        return x

    def _decode(
        self, x: Tensor, tokens: Tensor, c: Tensor, layout: TokenLayout, h: int, w: int, return_variance: bool = False
    ) -> Tensor:
        for block in self.decoder:
            x = block(x, c, layout, tokens)
        shift, scale = self.final_ada(c)
        x = modulate(x, shift, scale)
        image = unpatchify(self.final(x), h, w, self.patch_size)
        if not return_variance:
            return image
        if self.variance is None:
            raise ValueError("this network learns no variance; set net.learned_variance=true")
        return torch.cat([image, unpatchify(self.variance(x), h, w, self.patch_size)], dim=1)
