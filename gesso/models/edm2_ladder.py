"""CONFIGS A to G of EDM2 (Karras et al. 2024, Table 1, Appendix B): from ADM to CONFIG G in cumulative steps.

`LadderFeatures` lists the changes, each a switch of one U-Net. CONFIG B changes only cfg.attention_levels and the
training. CONFIG G equals gesso.models.edm2, with the same parameter names. Details that the paper's text does not give
are marked "not in the paper".

Legend: B batch, C channels, H W height and width, E embedding width (that of the widest level), N fan-in. Published
CONFIGS A to F have E = 4 c, which is the same width; at other multipliers E is not in the paper.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import EDM2LadderConfig, InputSpec
from gesso.models import mp
from gesso.models.embeddings import labels_or_null, sinusoidal_embedding
from gesso.models.layers import autocast_disabled, check_size_multiple


@dataclasses.dataclass(frozen=True)
class LadderFeatures:
    """Switch of each change; each of C to G includes the changes of the letters before it."""

    # C: architectural streamlining (B.3)
    no_biases: bool  # in layers, norms and modulation; the input has a channel of ones instead
    simple_group_norm: bool  # without mean and scale (Eq. 29)
    cosine_attention: bool  # pixel norm of q, k, v instead of a group norm before them (Eq. 30)
    uniform_init: bool  # also for zero-initialized layers and class embeddings
    fourier_features: bool  # random Fourier features of the noise level (Eq. 35-36)
    # D: magnitude-preserving learned layers (B.4)
    weight_norm: bool  # Eq. 47, on weights ~ N(0, 1)
    # E: forced weight normalization (B.5)
    forced_weight_norm: bool  # Eq. 66, in the training step: gesso.models.mp
    # F: removing group normalizations (B.6)
    pixel_norm: bool  # on the main path of the encoder; no group norm
    main_path_resampling: bool  # once, at the start of the block
    encoder_skip_first: bool  # 1x1 convolution at the start of the encoder's main path
    no_output_silu: bool  # no SiLU in the output block
    single_layer_embedding: bool  # no second linear layer
    # G: magnitude-preserving fixed-function layers (B.7)
    mp_fixed_functions: bool  # MP-Fourier, MP-SiLU, MP-Sum, MP-Cat (Eq. 75, 81, 88, 103)
    learned_gains: bool  # at the output and on the modulation (Eq. 104)

    @classmethod
    def for_config(cls, config: str) -> "LadderFeatures":
        """Return the switches of a CONFIG, "A" to "G"."""
        c, d, e, f, g = (config >= letter for letter in "CDEFG")
        return cls(
            no_biases=c, simple_group_norm=c, cosine_attention=c, uniform_init=c, fourier_features=c,
            weight_norm=d, forced_weight_norm=e,
            pixel_norm=f, main_path_resampling=f, encoder_skip_first=f, no_output_silu=f, single_layer_embedding=f,
            mp_fixed_functions=g, learned_gains=g,
        )  # fmt: skip


RESIDUAL_BALANCE, EMBEDDING_BALANCE, CONCAT_BALANCE = 0.3, 0.5, 0.5  # balances t of CONFIG G (B.7)


class UnnormalizedLayer(nn.Module):
    """Linear or convolutional layer of CONFIGS A to D; shape (C_out, C_in) or (C_out, C_in, k, k).

    A to C: weight and bias ~ U(-N^-1/2, N^-1/2), the default of torch and ADM. The gain is not in the paper; only this
    one fits its "biases from the same distribution". D: w ~ N(0, 1), each row divided by its norm on every use. The
    weights are not among `mp.sphere_weights`.
    """

    def __init__(self, features: LadderFeatures, *shape: int, init: str = "uniform", bias: bool = True):
        super().__init__()
        self.weight_norm = features.weight_norm
        init = "normal" if features.weight_norm else "uniform" if features.uniform_init else init
        self.weight = nn.Parameter(initial_values(init, shape, shape))
        self.bias = nn.Parameter(initial_values(init, shape[:1], shape)) if bias and not features.no_biases else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C_out) for x (B, C_in), or (B, C_out, H, W) for x (B, C_in, H, W)."""
        weight = (normalize_rows(self.weight) if self.weight_norm else self.weight).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def initial_values(init: str, shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> Tensor:
    """Return initial values of a parameter of a layer whose weight has shape `weight_shape`."""
    if init == "zero":
        return torch.zeros(shape)
    if init == "normal":
        return torch.randn(shape)
    return (2 * torch.rand(shape) - 1) / math.sqrt(math.prod(weight_shape[1:]))


def normalize_rows(weight: Tensor, eps: float = 1e-4) -> Tensor:
    """Return w / (|w| + eps) of each row, differentiable (Eq. 47), with the norm in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True, dtype=dtype)
    return weight / (norm + eps).to(weight.dtype)


def build_linear(
    features: LadderFeatures, n_in: int, n_out: int, init: str = "uniform", bias: bool = True
) -> nn.Module:
    """Return the linear layer of a CONFIG."""
    if features.forced_weight_norm:
        return mp.MPLinear(n_in, n_out)
    return UnnormalizedLayer(features, n_out, n_in, init=init, bias=bias)


def build_conv(features: LadderFeatures, c_in: int, c_out: int, kernel: int, init: str = "uniform") -> nn.Module:
    """Return the convolution of a CONFIG."""
    if features.forced_weight_norm:
        return mp.MPConv(c_in, c_out, kernel)
    return UnnormalizedLayer(features, c_out, c_in, kernel, kernel, init=init)


class GroupRMSNorm(nn.Module):
    """Group norm that divides each group by its rms over its channels and all pixels (Eq. 29)."""

    def __init__(self, width: int, eps: float = 1e-4):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x, (B, C, H, W)."""
        groups = x.unflatten(1, (-1, self.width))
        wide = groups.to(torch.promote_types(x.dtype, torch.float32))
        rms = (wide.square().mean(dim=(2, 3, 4), keepdim=True) + self.eps).sqrt()
        return (groups / rms.to(x.dtype)).flatten(1, 2)


def build_group_norm(features: LadderFeatures, channels: int) -> nn.Module:
    """Return the group norm of a CONFIG with 32 channels per group, or fewer where 32 does not divide `channels`.

    Fewer are not in the paper; no published size needs them. A and B have scale and bias per channel, as the published
    parameter counts imply, not per group as in the paper's text.
    """
    if features.pixel_norm:
        return nn.Identity()
    width = math.gcd(channels, 32)
    return GroupRMSNorm(width) if features.simple_group_norm else nn.GroupNorm(channels // width, channels)


def silu_function(features: LadderFeatures) -> Callable[[Tensor], Tensor]:
    """Return the SiLU of a CONFIG."""
    return mp.mp_silu if features.mp_fixed_functions else F.silu


def plain_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return a + b; t is unused, for the signature of `mp.mp_sum`."""
    return a + b


def plain_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return a and b concatenated along the channels; t is unused, for the signature of `mp.mp_cat`."""
    return torch.cat([a, b], dim=1)


def resample_2x(x: Tensor, mode: str) -> Tensor:
    """Return x resampled by a 2x2 box filter: mode "down", "up" or "keep"."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if mode == "up" else x


class Attention(nn.Module):
    """Self-attention added to the main path (Eq. 10-12); from C on cosine attention (Eq. 30-34)."""

    def __init__(self, features: LadderFeatures, channels: int, channels_per_head: int):
        super().__init__()
        self.heads = channels // channels_per_head
        self.cosine = features.cosine_attention
        self.sum = mp.mp_sum if features.mp_fixed_functions else plain_sum
        self.norm = nn.Identity() if features.cosine_attention else build_group_norm(features, channels)
        self.qkv = build_conv(features, channels, 3 * channels, 1)
        self.proj = build_conv(features, channels, channels, 1, init="zero")

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of x and its attention, (B, C, H, W)."""
        y = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(4)  # B 3 heads channels HW
        y = cosine_attention(y) if self.cosine else float32_attention(y)  # B heads HW channels
        y = self.proj(y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))
        return self.sum(x, y, RESIDUAL_BALANCE)


def cosine_attention(qkv: Tensor) -> Tensor:
    """Return attention with q, k and v pixel-normalized per head, as in CONFIG G; for C to F not in the paper."""
    q, k, v = mp.pixel_norm(qkv, dim=3).transpose(3, 4).unbind(1)
    return F.scaled_dot_product_attention(q, k, v)


def float32_attention(qkv: Tensor) -> Tensor:
    """Return attention in float32 or better: logits grow with the square of the weights and overflow fp16 (B.1)."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with autocast_disabled(qkv):
        q, k, v = qkv.to(wide).transpose(3, 4).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).to(qkv.dtype)


class Block(nn.Module):
    """Block of the encoder or decoder: residual branch, main path, attention.

    A to E: the branch is norm, SiLU, resampling, conv, norm, modulation, SiLU, dropout, conv; the main path resampling
    and 1x1 convolution. From F on: resampling first, no group norm; in the encoder 1x1 convolution and pixel norm
    precede the branch.
    """

    def __init__(
        self, cfg: EDM2LadderConfig, features: LadderFeatures, flavour: str, c_in: int, c_out: int, *,
        resample: str = "keep", attention: bool = False,
    ):  # fmt: skip
        super().__init__()
        early = features.encoder_skip_first and flavour == "encoder"
        self.skip_first = early
        self.pixel_norm = features.pixel_norm and flavour == "encoder"
        self.resample_first = resample if features.main_path_resampling else "keep"
        self.resample_inside = "keep" if features.main_path_resampling else resample
        self.has_offset, self.dropout = not features.no_biases, cfg.dropout
        self.silu, self.sum = silu_function(features), mp.mp_sum if features.mp_fixed_functions else plain_sum
        self.emb_gain = nn.Parameter(torch.zeros(1)) if features.learned_gains else None
        self.emb_linear = build_linear(features, cfg.embedding_width, 2 * c_out if self.has_offset else c_out)
        self.norm0 = build_group_norm(features, c_in)
        self.conv_res0 = build_conv(features, c_out if early else c_in, c_out, 3)
        self.norm1 = build_group_norm(features, c_out)
        self.conv_res1 = build_conv(features, c_out, c_out, 3, init="zero")
        self.conv_skip = build_conv(features, c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(features, c_out, cfg.channels_per_head) if attention else nn.Identity()

    def modulate(self, y: Tensor, emb: Tensor) -> Tensor:
        """Return y (1 + scale), in A and B + offset; the 1 is that of CONFIG G and ADM, for C to F not in the paper."""
        with autocast_disabled(emb):
            scale = self.emb_linear(emb) if self.emb_gain is None else self.emb_linear(emb, gain=self.emb_gain)
        scale = scale[:, :, None, None]
        if self.has_offset:
            scale, offset = scale.chunk(2, dim=1)
            return torch.addcmul(offset.to(y.dtype), y, (1 + scale).to(y.dtype))
        return y * (1 + scale).to(y.dtype)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return features (B, C_out, H', W') for x (B, C_in, H, W) and the embedding (B, E)."""
        x = resample_2x(x, self.resample_first)
        if self.skip_first:
            x = self.conv_skip(x)
        if self.pixel_norm:
            x = mp.pixel_norm(x)
        y = self.conv_res0(resample_2x(self.silu(self.norm0(x)), self.resample_inside))
        y = self.silu(self.modulate(self.norm1(y), emb))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if not self.skip_first:
            x = self.conv_skip(resample_2x(x, self.resample_inside))
        x = self.attention(self.sum(x, y, RESIDUAL_BALANCE))
        return x.clip(-256, 256)  # in all runs (D.2)


class EDM2Ladder(nn.Module):
    """Network of a CONFIG, F = net(x, c_noise, progress, cond), x and F (B, C, H, W).

    A, B and G are zero at initialization. A withheld label adds nothing to the embedding; in G it is a zero vector
    before the MP-sum.
    """

    def __init__(self, cfg: EDM2LadderConfig, inputs: InputSpec):
        super().__init__()
        self.features = features = LadderFeatures.for_config(cfg.config)
        self.num_classes, self.size_multiple = inputs.num_classes, cfg.size_multiple
        self.silu = silu_function(features)
        self.sum = mp.mp_sum if features.mp_fixed_functions else plain_sum
        self.cat = mp.mp_cat if features.mp_fixed_functions else plain_cat
        self._build_embedding(cfg, features)
        widths = cfg.widths
        self.conv_in = build_conv(features, inputs.channels + features.no_biases, widths[0], 3)
        c, skips = self._build_encoder(cfg, features, widths)
        c = self._build_decoder(cfg, features, widths, c, skips)
        self.out_norm = build_group_norm(features, c)
        self.conv_out = build_conv(features, c, inputs.channels, 3, init="zero")
        self.out_gain = nn.Parameter(torch.zeros(1)) if features.learned_gains else None

    def _build_embedding(self, cfg: EDM2LadderConfig, features: LadderFeatures) -> None:
        self.num_sinusoids, E = cfg.widths[0], cfg.embedding_width
        self.emb_fourier = mp.MPFourier(self.num_sinusoids) if features.fourier_features else None
        self.fourier_scale = 1.0 if features.mp_fixed_functions else 0.5**0.5  # MPFourier includes Eq. 75's sqrt(2)
        self.emb_noise = build_linear(features, self.num_sinusoids, E)
        self.emb_second = None if features.single_layer_embedding else build_linear(features, E, E)
        if self.num_classes:
            # A and B: a table ~ N(0, 1). From C on: a linear layer of one-hot vectors of unit variance (B.3).
            self.emb_label = build_linear(features, self.num_classes, E, init="normal", bias=False)
            self.one_hot_scale = self.num_classes**0.5 if features.uniform_init else 1.0

    def _build_encoder(
        self, cfg: EDM2LadderConfig, features: LadderFeatures, widths: list[int]
    ) -> tuple[int, list[int]]:
        """Build the encoder; return its output channels and those of each skip connection."""
        self.encoder = nn.ModuleList()
        skips, c = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                self.encoder.append(Block(cfg, features, "encoder", c, c, resample="down"))
                skips.append(c)
            for _ in range(cfg.num_blocks):
                attention = level in cfg.attention_levels
                self.encoder.append(Block(cfg, features, "encoder", c, width, attention=attention))
                c = width
                skips.append(c)
        return c, skips

    def _build_decoder(
        self, cfg: EDM2LadderConfig, features: LadderFeatures, widths: list[int], c: int, skips: list[int]
    ) -> int:
        """Build the decoder; return its output channels."""
        self.decoder = nn.ModuleList()
        self.takes_skip: list[bool] = []
        for level, width in reversed(list(enumerate(widths))):
            if level == len(widths) - 1:
                self.decoder.append(Block(cfg, features, "decoder", c, c, attention=True))
                self.decoder.append(Block(cfg, features, "decoder", c, c))
                self.takes_skip += [False, False]
            else:
                self.decoder.append(Block(cfg, features, "decoder", c, c, resample="up"))
                self.takes_skip.append(False)
            for _ in range(cfg.num_blocks + 1):
                attention = level in cfg.attention_levels
                self.decoder.append(Block(cfg, features, "decoder", c + skips.pop(), width, attention=attention))
                self.takes_skip.append(True)
                c = width
        return c

    def embed(self, c_noise: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """Return the embedding (B, E) of noise level and class, after its last nonlinearity."""
        if self.emb_fourier is None:
            emb = sinusoidal_embedding(c_noise, self.num_sinusoids)
        else:
            emb = self.emb_fourier(c_noise) * self.fourier_scale
        emb = self.emb_noise(emb)
        if self.emb_second is not None:
            emb = self.emb_second(self.silu(emb))
        if self.num_classes:
            label = labels_or_null(cond, self.num_classes, emb)
            one_hot = F.one_hot(label, self.num_classes + 1)[:, :-1].to(emb.dtype)
            emb = self.sum(emb, self.emb_label(one_hot * self.one_hot_scale), EMBEDDING_BALANCE)
        return self.silu(emb).to(dtype)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        check_size_multiple(x, self.size_multiple)
        with autocast_disabled(x):
            emb = self.embed(c_noise, cond, x.dtype)
        if self.features.no_biases:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.conv_in(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            x = block(self.cat(x, skips.pop(), CONCAT_BALANCE) if takes_skip else x, emb)
        if not self.features.no_output_silu:
            x = self.silu(self.out_norm(x))
        return self.conv_out(x) if self.out_gain is None else self.conv_out(x, gain=self.out_gain)
