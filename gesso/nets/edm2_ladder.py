"""CONFIGS A to G of EDM2 (Karras et al. 2024, Table 1, Appendix B): from ADM to CONFIG G in cumulative steps.

`Steps` is the list of changes; everything else reads as one U-Net with a switch per change. CONFIG B
changes no more than cfg.attention_levels and the training. CONFIG G is gesso.nets.edm2 with the same
names of weights. Most of Figures 16-22 is not in the paper's text; where it is silent, "our choice" says so.

Legend: B batch, C channels, H W height and width, E embedding width, N fan-in. E is the width of the widest level, as in
CONFIG G. A to F as published have E = 4 c = that width too; at other multipliers it is our choice.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import EDM2Ladder, Inputs
from gesso.nets import mp
from gesso.nets.embed import null_filled, sinusoids
from gesso.nets.layers import check_size, unrounded


@dataclasses.dataclass(frozen=True)
class Steps:
    """One boolean per change: C to G each keep what the letters before them changed."""

    # C: architectural streamlining (B.3)
    no_biases: bool  # of layers, norms and the modulation; a channel of ones in the input instead
    simple_group_norm: bool  # neither mean nor scale (Eq. 29)
    cosine_attention: bool  # pixel norm of q, k, v instead of a group norm before them (Eq. 30)
    one_init: bool  # zero-initialised layers and class embeddings as all others
    fourier: bool  # random Fourier features of the noise level (Eq. 35-36)
    # D: magnitude-preserving learned layers (B.4)
    weight_norm: bool  # Eq. 47, on weights ~ N(0, 1)
    # E: forced weight normalization (B.5)
    sphere: bool  # Eq. 66, in the training step: gesso.nets.mp
    # F: removing group normalizations (B.6)
    pixel_norm: bool  # on the main path of the encoder, and no group norm anywhere
    main_path_resampling: bool  # once, at the start of the block
    early_skip: bool  # 1x1 convolution at the start of the encoder's main path
    bare_output: bool  # no SiLU in the output block
    short_embedding: bool  # no second linear layer
    # G: magnitude-preserving fixed-function layers (B.7)
    mp_fixed: bool  # MP-Fourier, MP-SiLU, MP-Sum, MP-Cat (Eq. 75, 81, 88, 103)
    gains: bool  # learned, at the output and on the modulation (Eq. 104)

    @classmethod
    def up_to(cls, step: str) -> "Steps":
        c, d, e, f, g = (step >= letter for letter in "CDEFG")
        return cls(
            no_biases=c, simple_group_norm=c, cosine_attention=c, one_init=c, fourier=c,
            weight_norm=d, sphere=e,
            pixel_norm=f, main_path_resampling=f, early_skip=f, bare_output=f, short_embedding=f,
            mp_fixed=g, gains=g,
        )  # fmt: skip


RESIDUAL, EMBEDDING, CONCAT = 0.3, 0.5, 0.5  # balances t of CONFIG G (B.7)


class FreeLayer(nn.Module):
    """Linear or convolutional layer of CONFIGS A to D; shape (C_out, C_in) or (C_out, C_in, k, k).

    A to C: weight and bias ~ U(-N^-1/2, N^-1/2), the He-uniform variant that is torch's default and ADM's
    (our choice: the paper gives no gain, and of the variants only this one also fits its "biases from the same
    distribution"). D: w ~ N(0, 1), each row divided by its norm on every use. No part of `mp.sphere_weights`.
    """

    def __init__(self, steps: Steps, *shape: int, init: str = "uniform", bias: bool = True):
        super().__init__()
        self.weight_norm = steps.weight_norm
        init = "normal" if steps.weight_norm else "uniform" if steps.one_init else init
        self.weight = nn.Parameter(initial(init, shape, shape))
        self.bias = nn.Parameter(initial(init, shape[:1], shape)) if bias and not steps.no_biases else None

    def forward(self, x: Tensor) -> Tensor:
        weight = (unit_rows(self.weight) if self.weight_norm else self.weight).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def initial(init: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> Tensor:
    """Initial values of a tensor of a layer with this weight shape."""
    if init == "zero":
        return torch.zeros(shape)
    if init == "normal":
        return torch.randn(shape)
    return (2 * torch.rand(shape) - 1) / math.sqrt(math.prod(weight[1:]))


def unit_rows(weight: Tensor, eps: float = 1e-4) -> Tensor:
    """w / (|w| + eps) of each row, differentiable (Eq. 47); the norm in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True, dtype=dtype)
    return weight / (norm + eps).to(weight.dtype)


def linear(steps: Steps, n_in: int, n_out: int, init: str = "uniform", bias: bool = True) -> nn.Module:
    return mp.MPLinear(n_in, n_out) if steps.sphere else FreeLayer(steps, n_out, n_in, init=init, bias=bias)


def conv(steps: Steps, c_in: int, c_out: int, kernel: int, init: str = "uniform") -> nn.Module:
    return mp.MPConv(c_in, c_out, kernel) if steps.sphere else FreeLayer(steps, c_out, c_in, kernel, kernel, init=init)


class GroupRMS(nn.Module):
    """Divide each group by its rms over its channels and all pixels (Eq. 29)."""

    def __init__(self, width: int, eps: float = 1e-4):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, self.width))
        wide = groups.to(torch.promote_types(x.dtype, torch.float32))
        rms = (wide.square().mean(dim=(2, 3, 4), keepdim=True) + self.eps).sqrt()
        return (groups / rms.to(x.dtype)).flatten(1, 2)


def group_norm(steps: Steps, channels: int) -> nn.Module:
    """Groups of 32 channels; of fewer where 32 does not divide them, which no published size needs (our choice).

    A and B: scale and bias per channel. The text says per group; the published parameter counts say channel.
    """
    if steps.pixel_norm:
        return nn.Identity()
    width = math.gcd(channels, 32)
    return GroupRMS(width) if steps.simple_group_norm else nn.GroupNorm(channels // width, channels)


def silu(steps: Steps) -> Callable[[Tensor], Tensor]:
    return mp.mp_silu if steps.mp_fixed else F.silu


def plain_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a + b


def plain_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    return torch.cat([a, b], dim=1)


def resampled(x: Tensor, how: str) -> Tensor:
    """2x2 box filter."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


class Attention(nn.Module):
    """Self-attention added to the main path (Eq. 10-12; C: cosine attention, Eq. 30-34)."""

    def __init__(self, steps: Steps, channels: int, channels_per_head: int):
        super().__init__()
        self.heads = channels // channels_per_head
        self.cosine = steps.cosine_attention
        self.sum = mp.mp_sum if steps.mp_fixed else plain_sum
        self.norm = nn.Identity() if steps.cosine_attention else group_norm(steps, channels)
        self.qkv = conv(steps, channels, 3 * channels, 1)
        self.proj = conv(steps, channels, channels, 1, init="zero")

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(4)  # B 3 heads channels HW
        y = cosine_attention(y) if self.cosine else float32_attention(y)  # B heads HW channels
        y = self.proj(y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))
        return self.sum(x, y, RESIDUAL)


def cosine_attention(qkv: Tensor) -> Tensor:
    """All three normalized over the channels of a head, as in CONFIG G (our choice for C to F)."""
    q, k, v = mp.pixel_norm(qkv, dim=3).transpose(3, 4).unbind(1)
    return F.scaled_dot_product_attention(q, k, v)


def float32_attention(qkv: Tensor) -> Tensor:
    """In 32 bits or more: logits grow with the square of the weights and overflow 16 (B.1)."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with unrounded(qkv):
        q, k, v = qkv.to(wide).transpose(3, 4).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).to(qkv.dtype)


class Block(nn.Module):
    """Residual branch, main path, attention.

    A to E: norm-SiLU-resample-conv, norm, modulation, SiLU, dropout, conv beside resample, 1x1. F: resample
    first, no group norm; the encoder's main path passes 1x1 and pixel norm before the branch leaves it.
    """

    def __init__(
        self, cfg: EDM2Ladder, steps: Steps, flavour: str, c_in: int, c_out: int, *,
        resample: str = "keep", attention: bool = False,
    ):  # fmt: skip
        super().__init__()
        early = steps.early_skip and flavour == "encoder"
        self.early_skip = early
        self.pixel_norm = steps.pixel_norm and flavour == "encoder"
        self.resample_first = resample if steps.main_path_resampling else "keep"
        self.resample_both = "keep" if steps.main_path_resampling else resample
        self.offset, self.dropout = not steps.no_biases, cfg.dropout
        self.silu, self.sum = silu(steps), mp.mp_sum if steps.mp_fixed else plain_sum
        self.emb_gain = nn.Parameter(torch.zeros(1)) if steps.gains else None
        self.emb_linear = linear(steps, cfg.embedding_width, 2 * c_out if self.offset else c_out)
        self.norm0 = group_norm(steps, c_in)
        self.conv_res0 = conv(steps, c_out if early else c_in, c_out, 3)
        self.norm1 = group_norm(steps, c_out)
        self.conv_res1 = conv(steps, c_out, c_out, 3, init="zero")
        self.conv_skip = conv(steps, c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(steps, c_out, cfg.channels_per_head) if attention else nn.Identity()

    def modulated(self, y: Tensor, emb: Tensor) -> Tensor:
        """y (1 + scale), in A and B + offset. The 1 is CONFIG G's and ADM's (our choice for C to F)."""
        with unrounded(emb):
            scale = self.emb_linear(emb) if self.emb_gain is None else self.emb_linear(emb, gain=self.emb_gain)
        scale = scale[:, :, None, None]
        if self.offset:
            scale, offset = scale.chunk(2, dim=1)
            return torch.addcmul(offset.to(y.dtype), y, (1 + scale).to(y.dtype))
        return y * (1 + scale).to(y.dtype)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resampled(x, self.resample_first)
        if self.early_skip:
            x = self.conv_skip(x)
        if self.pixel_norm:
            x = mp.pixel_norm(x)
        y = self.conv_res0(resampled(self.silu(self.norm0(x)), self.resample_both))
        y = self.silu(self.modulated(self.norm1(y), emb))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if not self.early_skip:
            x = self.conv_skip(resampled(x, self.resample_both))
        x = self.attention(self.sum(x, y, RESIDUAL))
        return x.clip(-256, 256)  # D.2 says it of all runs


class EDM2LadderNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W). A, B and G return zero at initialization.

    A withheld label adds nothing to the embedding; in G it is a zero vector before the MP-sum.
    """

    def __init__(self, cfg: EDM2Ladder, inputs: Inputs):
        super().__init__()
        self.steps = steps = Steps.up_to(cfg.step)
        self.num_classes, self.multiple = inputs.num_classes, cfg.multiple
        self.silu = silu(steps)
        self.sum = mp.mp_sum if steps.mp_fixed else plain_sum
        self.cat = mp.mp_cat if steps.mp_fixed else plain_cat
        self._embedding(cfg, steps)
        widths = cfg.widths
        self.conv_in = conv(steps, inputs.channels + steps.no_biases, widths[0], 3)
        c, skips = self._encoder(cfg, steps, widths)
        c = self._decoder(cfg, steps, widths, c, skips)
        self.out_norm = group_norm(steps, c)
        self.conv_out = conv(steps, c, inputs.channels, 3, init="zero")
        self.out_gain = nn.Parameter(torch.zeros(1)) if steps.gains else None

    def _embedding(self, cfg: EDM2Ladder, steps: Steps) -> None:
        self.positions, E = cfg.widths[0], cfg.embedding_width
        self.emb_fourier = mp.MPFourier(self.positions) if steps.fourier else None
        self.fourier_scale = 1.0 if steps.mp_fixed else 0.5**0.5  # MPFourier holds Eq. 75's sqrt(2)
        self.emb_noise = linear(steps, self.positions, E)
        self.emb_second = None if steps.short_embedding else linear(steps, E, E)
        if self.num_classes:
            # A and B: a table ~ N(0, 1). C: a layer like any other, of one-hot vectors with unit variance (B.3).
            self.emb_label = linear(steps, self.num_classes, E, init="normal", bias=False)
            self.one_hot_scale = self.num_classes**0.5 if steps.one_init else 1.0

    def _encoder(self, cfg: EDM2Ladder, steps: Steps, widths: list[int]) -> tuple[int, list[int]]:
        """Channels at the end, and of each skip connection."""
        self.encoder = nn.ModuleList()
        skips, c = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                self.encoder.append(Block(cfg, steps, "encoder", c, c, resample="down"))
                skips.append(c)
            for _ in range(cfg.blocks):
                attention = level in cfg.attention_levels
                self.encoder.append(Block(cfg, steps, "encoder", c, width, attention=attention))
                c = width
                skips.append(c)
        return c, skips

    def _decoder(self, cfg: EDM2Ladder, steps: Steps, widths: list[int], c: int, skips: list[int]) -> int:
        self.decoder = nn.ModuleList()
        self.takes_skip: list[bool] = []
        for level, width in reversed(list(enumerate(widths))):
            if level == len(widths) - 1:
                self.decoder.append(Block(cfg, steps, "decoder", c, c, attention=True))
                self.decoder.append(Block(cfg, steps, "decoder", c, c))
                self.takes_skip += [False, False]
            else:
                self.decoder.append(Block(cfg, steps, "decoder", c, c, resample="up"))
                self.takes_skip.append(False)
            for _ in range(cfg.blocks + 1):
                attention = level in cfg.attention_levels
                self.decoder.append(Block(cfg, steps, "decoder", c + skips.pop(), width, attention=attention))
                self.takes_skip.append(True)
                c = width
        return c

    def embed(self, c_noise: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """(B, E) embedding of noise level and class, through its last nonlinearity."""
        if self.emb_fourier is None:
            emb = sinusoids(c_noise, self.positions)
        else:
            emb = self.emb_fourier(c_noise) * self.fourier_scale
        emb = self.emb_noise(emb)
        if self.emb_second is not None:
            emb = self.emb_second(self.silu(emb))
        if self.num_classes:
            label = null_filled(cond, self.num_classes, emb)
            one_hot = F.one_hot(label, self.num_classes + 1)[:, :-1].to(emb.dtype)
            emb = self.sum(emb, self.emb_label(one_hot * self.one_hot_scale), EMBEDDING)
        return self.silu(emb).to(dtype)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        check_size(x, self.multiple)
        with unrounded(x):
            emb = self.embed(c_noise, cond, x.dtype)
        if self.steps.no_biases:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.conv_in(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            x = block(self.cat(x, skips.pop(), CONCAT) if takes_skip else x, emb)
        if not self.steps.bare_output:
            x = self.silu(self.out_norm(x))
        return self.conv_out(x) if self.out_gain is None else self.conv_out(x, gain=self.out_gain)
