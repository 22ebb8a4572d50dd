"""U-Net of SDXL base (Podell et al. 2024); with other settings that of SD1.5 and LDM.

Legend: B batch, C channels, H W height and width, T = HW image tokens, S semantic tokens, E = 4 channels
embedding width, h heads, d = C/h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import ControlSpec, InputSpec, UNetConfig
from gesso.models.embeddings import (
    ControlEmbedding,
    SemanticEmbedding,
    control_features,
    control_values,
    mask_control,
    pooled_or_zero,
    sinusoidal_embedding,
)
from gesso.models.layers import attention, autocast_disabled, check_size_multiple, linear, split_heads

CLASS_CONTEXT_DIM = 1024
"""Channels of the class token for net.context_dim=null (the class U-Net of Table A1)."""


class ResidualBlock(nn.Module):
    """Residual block x + Conv(SiLU(GN(Conv(SiLU(GN(x))) + Linear(SiLU(emb))))), zero branch at initialization.

    A 1x1 convolution maps x where the number of channels changes.
    """

    def __init__(self, c_in: int, c_out: int, emb: int, groups: int):
        super().__init__()
        self.norm0 = nn.GroupNorm(groups, c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, c_out)
        self.norm1 = nn.GroupNorm(groups, c_out)
        self.conv1 = zero_init_(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return features (B, C_out, H, W) for x (B, C_in, H, W) and emb (B, E)."""
        y = self.conv0(F.silu(self.norm0(x)))
        y = y + self.emb(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv1(F.silu(self.norm1(y)))


class SelfAttention(nn.Module):
    """Self-attention of tokens (B, T, C), with a bias in the output layer only."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return attended values (B, T, C)."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.out(attention(q, k, v))


class CrossAttention(nn.Module):
    """Cross-attention of image tokens (B, T, C) to the context (B, S, D).

    With a class as the only context token, the softmax is 1 for any q and k, whose gradients are then zero. They exist
    because Table A1 and the published class U-Nets count them.
    """

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Return attended values (B, T, C); mask (B, S) selects context tokens, None all."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # B h T d
        k, v = split_heads(self.kv(context), 2, self.heads)
        return self.out(attention(q, k, v, mask))


class GEGLU(nn.Module):
    """Gated MLP Linear(GELU(gate) * value) with hidden width 4C and the exact GELU (Shazeer 2020)."""

    def __init__(self, channels: int):
        super().__init__()
        self.expand = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) for x (B, T, C)."""
        value, gate = self.expand(x).chunk(2, dim=2)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Transformer block: self-attention, cross-attention (if there is a context) and GEGLU, each after a LayerNorm."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, heads)
        if context_dim:
            self.norm_cross = nn.LayerNorm(channels)
            self.cross_attention = CrossAttention(channels, heads, context_dim)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = GEGLU(channels)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return tokens (B, T, C) for x (B, T, C), context (B, S, D) and mask (B, S)."""
        x = x + self.self_attention(self.norm_self(x))
        if context is not None:
            x = x + self.cross_attention(self.norm_cross(x), context, mask)
        return x + self.mlp(self.norm_mlp(x))


class SpatialTransformer(nn.Module):
    """Transformer over pixels as tokens, x + Linear(blocks(Linear(GN(x)))); the 1x1 convolutions of SD1.5 are equal."""

    def __init__(self, cfg: UNetConfig, channels: int, depth: int, context_dim: int):
        super().__init__()
        heads = cfg.num_heads or channels // cfg.channels_per_head
        self.norm = nn.GroupNorm(cfg.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = linear(channels, channels, zero_init=True)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return features (B, C, H, W) for x (B, C, H, W), context (B, S, D) and mask (B, S)."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Module):
    """Residual block, followed by a transformer of `depth` blocks if depth > 0."""

    def __init__(self, cfg: UNetConfig, c_in: int, c_out: int, depth: int, context_dim: int):
        super().__init__()
        self.residual = ResidualBlock(c_in, c_out, 4 * cfg.channels, cfg.norm_num_groups)
        self.transformer = SpatialTransformer(cfg, c_out, depth, context_dim) if depth else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return features (B, C_out, H, W) for x (B, C_in, H, W), emb (B, E), context (B, S, D) and mask (B, S)."""
        x = self.residual(x, emb)
        return x if self.transformer is None else self.transformer(x, context, mask)


class PooledEmbedding(nn.Module):
    """MLP of the pooled text, concatenated with the sinusoids of `num_control` control variables (SDXL).

    Withheld conditions and absent control are zero before the MLP. The control variables are in the order high, low;
    SDXL's order is original size, top left of the crop, target size.
    """

    def __init__(self, pooled_dim: int, num_control: int, width: int):
        super().__init__()
        self.num_control = num_control
        self.mlp = build_mlp(pooled_dim + 256 * num_control, width)

    def add(self, c: Tensor, cond: Cond) -> Tensor:
        """Return c plus the embedding, (B, E)."""
        features = pooled_or_zero(cond, c)
        if self.num_control:
            if cond.control_high is None and cond.control_low is None:
                sizes = c.new_zeros(c.shape[0], 256 * self.num_control)
            else:
                sizes = mask_control(control_features(control_values(cond, "all").to(c.dtype)), cond)
            features = torch.cat([features, sizes], dim=1)
        return c + self.mlp(features)


class UNet(nn.Module):
    """U-Net F = net(x, c_noise, progress, cond), x and F (B, C, H, W); zero at initialization.

    The cross-attention sees the class as one token, or the text tokens; without either there is no cross-attention.
    The sum of time, control and pooled text is the embedding of every residual block.

    Raises:
        ValueError: The width of text tokens differs from net.context_dim without a projection, or pooled text shares an
            MLP with control variables whose MLPs are split.
    """

    def __init__(self, cfg: UNetConfig, inputs: InputSpec):
        super().__init__()
        self.channels, self.size_multiple = cfg.channels, cfg.size_multiple
        E = 4 * cfg.channels
        self.time = build_mlp(cfg.channels, E)
        self.pooled, self.control = build_added_embeddings(cfg, inputs, E)
        context = infer_context_dim(cfg, inputs)
        embed = cfg.text_projection if inputs.text_dim else "mlp"
        self.semantic = SemanticEmbedding(inputs, context, embed, nn.SiLU()) if inputs.has_semantic else None

        widths = [cfg.channels * m for m in cfg.channel_mult]
        # downsamplers[l] leads into level l of the encoder, upsamplers[i] out of the i-th level of the decoder.
        self.downsamplers, self.down = nn.ModuleList(), nn.ModuleList()
        skips: list[int] = []
        c = inputs.channels
        for level, (width, depth) in enumerate(zip(widths, cfg.transformer_depth, strict=True)):
            self.downsamplers.append(nn.Conv2d(c, c if level else width, 3, stride=2 if level else 1, padding=1))
            ins = [c if level else width] + [width] * cfg.num_blocks
            self.down.append(nn.ModuleList(Block(cfg, c_in, width, depth, context) for c_in in ins[:-1]))
            skips, c = skips + ins, width
        self.middle = nn.ModuleList(Block(cfg, c, c, depth, context) for depth in (cfg.transformer_depth_middle, 0))
        self.upsamplers, self.up = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, depth = widths[level], cfg.transformer_depth[level]
            ins = [c + skips.pop()] + [width + skips.pop() for _ in range(cfg.num_blocks)]
            self.up.append(nn.ModuleList(Block(cfg, c_in, width, depth, context) for c_in in ins))
            if level > 0:
                conv = nn.Conv2d(width, width, 3, padding=1)
                output = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), conv)
            else:
                conv = zero_init_(nn.Conv2d(width, inputs.channels, 3, padding=1))
                output = nn.Sequential(nn.GroupNorm(cfg.norm_num_groups, width), nn.SiLU(), conv)
            self.upsamplers.append(output)
            c = width

    def embed(self, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return the embedding (B, E) of noise level, control and pooled text."""
        emb = self.control.add(self.time(sinusoidal_embedding(c_noise, self.channels)), cond, progress)
        return emb if self.pooled is None else self.pooled.add(emb, cond)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        check_size_multiple(x, self.size_multiple)
        with autocast_disabled(x):
            emb = self.embed(c_noise, progress, cond)
        context, mask = self.semantic(cond, x) if self.semantic else (None, None)
        skips = []
        for downsampler, blocks in zip(self.downsamplers, self.down, strict=True):
            x = downsampler(x)
            skips.append(x)
            for block in blocks:  # type: ignore[attr-defined]  # ModuleList of ModuleLists
                x = block(x, emb, context, mask)
                skips.append(x)
        for block in self.middle:
            x = block(x, emb, context, mask)
        for blocks, upsampler in zip(self.up, self.upsamplers, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            x = upsampler(x)
        return x


def infer_context_dim(cfg: UNetConfig, inputs: InputSpec) -> int:
    """Return the channels of the context tokens; 0 without context."""
    if not inputs.has_semantic:
        return 0
    width = cfg.context_dim or (CLASS_CONTEXT_DIM if inputs.num_classes else inputs.text_dim)
    if inputs.text_dim and cfg.text_projection == "none" and width != inputs.text_dim:
        raise ValueError(
            f"net.context_dim={width}, but the text tokens have {inputs.text_dim} channels and "
            f"net.text_projection=none; set net.context_dim={inputs.text_dim} or net.text_projection=mlp"
        )
    return width


def build_added_embeddings(
    cfg: UNetConfig, inputs: InputSpec, width: int
) -> tuple[PooledEmbedding | None, ControlEmbedding]:
    """Return the embeddings of pooled text and of control; the latter is empty if they share an MLP."""
    if not inputs.pooled_dim:
        return None, ControlEmbedding(inputs.control, width)
    if cfg.pooled_mlp == "separate":
        return PooledEmbedding(inputs.pooled_dim, 0, width), ControlEmbedding(inputs.control, width)
    controls = inputs.control.num_high + inputs.control.num_low
    if controls and inputs.control.mlp == "split":
        raise ValueError("net.pooled_mlp=shared needs one MLP for all control variables: set control.mlp=joint")
    return PooledEmbedding(inputs.pooled_dim, controls, width), ControlEmbedding(ControlSpec(), width)


def build_mlp(n_in: int, width: int) -> nn.Sequential:
    """Return Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), nn.Linear(width, width))


def zero_init_(layer: nn.Conv2d) -> nn.Conv2d:
    """Set all weights of the last layer of a branch to zero and return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
