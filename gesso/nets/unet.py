"""SDXL's base U-Net (Podell et al. 2024), which at other settings is the one of SD1.5 and LDM.

Legend: B batch, C channels, H W height and width, T = HW image tokens, S semantic tokens, E = 4 channels
embedding width, h heads, d = C/h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import Control, Inputs, UNet
from gesso.nets.embed import (
    ControlEmbed,
    SemanticTokens,
    control_features,
    control_values,
    pooled_filled,
    present,
    sinusoids,
)
from gesso.nets.layers import attention, check_size, linear, split_heads, unrounded

CLASS_CONTEXT = 1024
"""Channels of the class token where the settings name none (Table A1's class cell)."""


class Residual(nn.Module):
    """x + zero-Conv(SiLU(GN(Conv(SiLU(GN(x))) + Linear(SiLU(emb))))), x through a 1x1 where C changes."""

    def __init__(self, c_in: int, c_out: int, emb: int, groups: int):
        super().__init__()
        self.norm0 = nn.GroupNorm(groups, c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, c_out)
        self.norm1 = nn.GroupNorm(groups, c_out)
        self.conv1 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E)."""
        y = self.conv0(F.silu(self.norm0(x)))
        y = y + self.emb(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv1(F.silu(self.norm1(y)))


class SelfAttention(nn.Module):
    """Self-attention of tokens (B, T, C), the way out with bias."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.out(attention(q, k, v))


class CrossAttention(nn.Module):
    """Image tokens (B, T, C) attend to the context (B, S, D).

    With one context token, a class, the softmax is 1 whatever q and k are: they then get a gradient of
    zero, and stand here because Table A1 and the published class U-Nets count them.
    """

    def __init__(self, channels: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # B h T d
        k, v = split_heads(self.kv(context), 2, self.heads)
        return self.out(attention(q, k, v, mask))


class GEGLU(nn.Module):
    """Linear(GELU(gate) * value), hidden width 4C (Shazeer 2020), exact GELU."""

    def __init__(self, channels: int):
        super().__init__()
        self.expand = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=2)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """LN + self-attention, LN + cross-attention (where there is a context), LN + GEGLU."""

    def __init__(self, channels: int, heads: int, context: int):
        super().__init__()
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, heads)
        if context:
            self.norm_cross = nn.LayerNorm(channels)
            self.cross_attention = CrossAttention(channels, heads, context)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = GEGLU(channels)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.norm_self(x))
        if context is not None:
            x = x + self.cross_attention(self.norm_cross(x), context, mask)
        return x + self.mlp(self.norm_mlp(x))


class SpatialTransformer(nn.Module):
    """x + zero-Linear(blocks(Linear(GN(x)))) over the pixels as tokens. The 1x1 convolutions of SD1.5 are the same."""

    def __init__(self, cfg: UNet, channels: int, depth: int, context: int):
        super().__init__()
        heads = cfg.heads or channels // cfg.head_width
        self.norm = nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context) for _ in range(depth))
        self.proj_out = linear(channels, channels, zero=True)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Module):
    """A residual block and, where depth is above 0, a transformer after it."""

    def __init__(self, cfg: UNet, c_in: int, c_out: int, depth: int, context: int):
        super().__init__()
        self.residual = Residual(c_in, c_out, 4 * cfg.channels, cfg.groups)
        self.transformer = SpatialTransformer(cfg, c_out, depth, context) if depth else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.residual(x, emb)
        return x if self.transformer is None else self.transformer(x, context, mask)


class PooledEmbed(nn.Module):
    """MLP of the pooled text, or of pooled text and the sinusoids of `controls` variables concatenated (SDXL).

    What is withheld is zero before the MLP, as is absent control. In the concatenation the control variables are in
    the order high, low; SDXL's own is original size, top left of the crop, target size.
    """

    def __init__(self, pooled: int, controls: int, width: int):
        super().__init__()
        self.controls = controls
        self.mlp = mlp(pooled + 256 * controls, width)

    def add(self, c: Tensor, cond: Cond) -> Tensor:
        """c (B, E) + the embedding."""
        features = pooled_filled(cond, c)
        if self.controls:
            if cond.control_high is None and cond.control_low is None:
                sizes = c.new_zeros(len(c), 256 * self.controls)
            else:
                sizes = present(control_features(control_values(cond, "all").to(c.dtype)), cond)
            features = torch.cat([features, sizes], dim=1)
        return c + self.mlp(features)


class UNetNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W); zero at initialization.

    The class is one token of the cross-attention, text its tokens; without either there is no
    cross-attention. Time, control and pooled text are summed into the embedding of every residual block.

    Raises ValueError when text tokens of one width are to be a context of another without an MLP, or when
    pooled text and control are to share an MLP that is split.
    """

    def __init__(self, cfg: UNet, inputs: Inputs):
        super().__init__()
        self.channels, self.multiple = cfg.channels, cfg.multiple
        E = 4 * cfg.channels
        self.time = mlp(cfg.channels, E)
        self.pooled, self.control = added_conditions(cfg, inputs, E)
        context = context_width(cfg, inputs)
        embed = cfg.text_embed if inputs.text_width else "mlp"
        self.semantic = SemanticTokens(inputs, context, embed, nn.SiLU()) if inputs.semantic else None

        widths = [cfg.channels * m for m in cfg.multipliers]
        # ways_in[l] leads into level l on the way down, ways_out[i] out of the i-th level of the way up.
        self.ways_in, self.down = nn.ModuleList(), nn.ModuleList()
        skips, c = [], inputs.channels
        for level, (width, depth) in enumerate(zip(widths, cfg.transformer_depth, strict=True)):
            self.ways_in.append(nn.Conv2d(c, c if level else width, 3, stride=2 if level else 1, padding=1))
            ins = [c if level else width] + [width] * cfg.blocks
            self.down.append(nn.ModuleList(Block(cfg, c_in, width, depth, context) for c_in in ins[:-1]))
            skips, c = skips + ins, width
        self.middle = nn.ModuleList(Block(cfg, c, c, depth, context) for depth in (cfg.middle_depth, 0))
        self.ways_out, self.up = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, depth = widths[level], cfg.transformer_depth[level]
            ins = [c + skips.pop()] + [width + skips.pop() for _ in range(cfg.blocks)]
            self.up.append(nn.ModuleList(Block(cfg, c_in, width, depth, context) for c_in in ins))
            if level > 0:
                way_out = [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
            else:
                last = zero(nn.Conv2d(width, inputs.channels, 3, padding=1))
                way_out = [nn.GroupNorm(cfg.groups, width), nn.SiLU(), last]
            self.ways_out.append(nn.Sequential(*way_out))
            c = width

    def embed(self, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """(B, E) embedding of noise level, control and pooled text."""
        emb = self.control.add(self.time(sinusoids(c_noise, self.channels)), cond, progress)
        return emb if self.pooled is None else self.pooled.add(emb, cond)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        check_size(x, self.multiple)
        with unrounded(x):
            emb = self.embed(c_noise, progress, cond)
        context, mask = self.semantic(cond, x) if self.semantic else (None, None)
        skips = []
        for way_in, blocks in zip(self.ways_in, self.down, strict=True):
            x = way_in(x)
            skips.append(x)
            for block in blocks:
                x = block(x, emb, context, mask)
                skips.append(x)
        for block in self.middle:
            x = block(x, emb, context, mask)
        for blocks, way_out in zip(self.up, self.ways_out, strict=True):
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            x = way_out(x)
        return x


def context_width(cfg: UNet, inputs: Inputs) -> int:
    """Channels of the tokens that cross-attention sees; 0 where there are none."""
    if not inputs.semantic:
        return 0
    width = cfg.context or (CLASS_CONTEXT if inputs.num_classes else inputs.text_width)
    if inputs.text_width and cfg.text_embed == "none" and width != inputs.text_width:
        raise ValueError(
            f"context={width}, but the text tokens have {inputs.text_width} channels and text_embed=none leaves them "
            f"as they are; set context={inputs.text_width} or text_embed=mlp"
        )
    return width


def added_conditions(cfg: UNet, inputs: Inputs, width: int) -> tuple[PooledEmbed | None, ControlEmbed]:
    """The embeddings of pooled text and of control. Control is empty where it shares the pooled text's MLP."""
    if not inputs.pooled_width:
        return None, ControlEmbed(inputs.control, width)
    if cfg.pooled_mlp == "own":
        return PooledEmbed(inputs.pooled_width, 0, width), ControlEmbed(inputs.control, width)
    controls = inputs.control.high + inputs.control.low
    if controls and inputs.control.mlp == "split":
        raise ValueError("pooled_mlp=shared puts control into the pooled text's one MLP: set the control's mlp=joint")
    return PooledEmbed(inputs.pooled_width, controls, width), ControlEmbed(Control(), width)


def mlp(n_in: int, width: int) -> nn.Sequential:
    """Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), nn.Linear(width, width))


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all weights zero: the last of a branch."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
