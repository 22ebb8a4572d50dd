"""Settings of the networks, one class per network, selected by `name`."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from gesso.config.base import Depth, Settings, Width

Fraction = Annotated[float, Field(ge=0, le=1)]
LevelWidths = Annotated[tuple[Width, ...], Field(max_length=16)]
OptionalDepth = Annotated[int, Field(ge=0, le=1_000)]


class ControlSpec(NamedTuple):
    """Number of control variables and how their embedding enters the network (Berrada et al. Eq. 1, Table A6).

    num_high, num_low: number of control values of each level.
    mlp: "split" is E_h + gamma_c(t) E_l; "joint" is one MLP over all of them with gamma_c = 1 (SDXL).
    schedule: gamma_c as a function of progress t: "cosine" (1-cos(pi (1-t)^alpha))/2, "uniform" 1, "zero" 0,
        "linear" 1-t, "step" 1 where t <= step_threshold.
    """

    num_high: int = 0
    num_low: int = 0
    mlp: Literal["split", "joint"] = "split"
    schedule: Literal["cosine", "uniform", "zero", "linear", "step"] = "cosine"
    alpha: float = 8.0
    step_threshold: float = 0.5


class InputSpec(NamedTuple):
    """Shapes of a network's inputs, which its own settings do not contain.

    channels, resolution: channels of x, and its height and width in training.
    num_classes: number of classes; 0: no class condition. Excludes text_dim.
    text_dim: channels of a text token; 0: no text condition.
    pooled_dim: channels of the pooled text embedding; 0: none.
    pos_embed_base: height and width of the x whose token grid position embeddings refer to; None: resolution.
    pos_embed_span: height and width of the x whose token grid spans that one; None: any.
    """

    channels: int
    resolution: int
    num_classes: int = 0
    text_dim: int = 0
    pooled_dim: int = 0
    control: ControlSpec = ControlSpec()
    pos_embed_base: int | None = None
    pos_embed_span: int | None = None

    @property
    def has_semantic(self) -> bool:
        """True if the network takes a class or text."""
        return bool(self.num_classes or self.text_dim)


class EDM2Config(Settings):
    """U-Net of EDM2, CONFIG G (Karras et al. 2024, Figure 22)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})
    noise_embedding: ClassVar[Literal["fourier", "sinusoidal"]] = "fourier"

    name: Literal["edm2"] = "edm2"
    channels: Width = 192
    """channels c at the highest resolution (EDM2-S: 192)"""
    channel_mult: LevelWidths = (1, 2, 3, 4)
    """channels of each level as multiples of net.channels; each level halves the resolution"""
    num_blocks: Depth = 3
    """number of residual blocks per level in the encoder; the decoder has one more"""
    attention_levels: Annotated[tuple[int, ...], Field(max_length=16)] = (2, 3)
    """levels with self-attention; 0 is the highest resolution"""
    channels_per_head: Width = 64
    """channels of an attention head"""
    residual_balance: Fraction = 0.3
    """weight t of the residual branch in its magnitude-preserving sum (EDM2 Eq. 88)"""
    attention_balance: Fraction = 0.3
    """weight t of self-attention in its magnitude-preserving sum (EDM2 Eq. 88)"""
    label_balance: Fraction = 0.5
    """weight t of the class in its magnitude-preserving sum with the noise level (EDM2 Eq. 88)"""
    concat_balance: Fraction = 0.5
    """weight t of the skip connection in its magnitude-preserving concatenation (EDM2 Eq. 103)"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout probability of activations in residual blocks"""

    @model_validator(mode="after")
    def _check_levels(self) -> "EDM2Config":
        if not self.channel_mult:
            raise ValueError("net.channel_mult is empty: give a multiplier for at least one level, such as [1,2]")
        for level in self.attention_levels:
            if not 0 <= level < len(self.channel_mult):
                last = len(self.channel_mult) - 1
                raise ValueError(f"net.attention_levels has level {level}, but net.channel_mult has levels 0 to {last}")
        for level in {*self.attention_levels, len(self.channel_mult) - 1}:  # the lowest resolution always has attention
            width = self.channels * self.channel_mult[level]
            if width % self.channels_per_head:
                unit = f"net.channels_per_head={self.channels_per_head}"
                raise ValueError(f"level {level} has {width} channels, not a multiple of {unit}")
        return self

    @property
    def size_multiple(self) -> int:
        """Height and width of x must be multiples of this number."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest resolution to the lowest."""
        return [self.channels * m for m in self.channel_mult]

    @property
    def embedding_width(self) -> int:
        """Channels of the embedding: those of the widest level, as in the published network."""
        return max(self.widths)


class EDM2LadderConfig(Settings):
    """U-Nets of EDM2, CONFIGS A to G (Karras et al. 2024, Figures 16-22)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label"})
    noise_embedding: ClassVar[Literal["fourier", "sinusoidal"]] = "fourier"

    name: Literal["edm2-ladder"] = "edm2-ladder"
    config: Literal["A", "B", "C", "D", "E", "F", "G"] = "G"
    """configuration; each adds one change to the one before"""
    channels: Width = 192
    """channels c at the highest resolution"""
    channel_mult: LevelWidths = (1, 2, 3, 4)
    """channels of each level as multiples of net.channels; each level halves the resolution"""
    num_blocks: Depth = 3
    """number of residual blocks per level in the encoder; the decoder has one more"""
    attention_levels: Annotated[tuple[int, ...], Field(max_length=16)] = (2, 3)
    """levels with self-attention; 0 is the highest resolution (CONFIG A: 1, 2, 3)"""
    channels_per_head: Width = 64
    """channels of an attention head"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout probability of activations in residual blocks (CONFIGS A to F: 0.10)"""

    @property
    def size_multiple(self) -> int:
        """Height and width of x must be multiples of this number."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest resolution to the lowest."""
        return [self.channels * m for m in self.channel_mult]

    @property
    def embedding_width(self) -> int:
        """Channels of the embedding: those of the widest level.

        For CONFIGS A to F with a channel_mult that is not published this is our choice; it keeps the width equal in
        all configurations.
        """
        return max(self.widths)


class TransformerConfig(Settings):
    """Settings shared by all transformers: the shape of the DiT family."""

    noise_embedding: ClassVar[Literal["fourier", "sinusoidal"]] = "sinusoidal"
    dropout: ClassVar[float] = 0.0

    hidden_size: Width = 384
    """channels D of a token (size S: 384)"""
    depth: Depth = 12
    """number of transformer blocks"""
    num_heads: Width = 6
    """number of attention heads"""
    patch_size: Width = 2
    """height and width, in positions of x, of the patch that becomes one token"""
    mlp_ratio: Annotated[float, Field(ge=0.01, le=100)] = 4.0
    """hidden channels of the MLP divided by net.hidden_size"""
    pos_embed: Literal["resampled", "extrapolated", "interpolated", "proportional"] = "resampled"
    """2-D sine-cosine position embedding of a grid with n tokens per side, where g is the side of the training grid:
    resampled has positions from 0 to g with step g/(n-1) (Berrada et al. Pseudocode 1); extrapolated has step 1 (DiT);
    interpolated resizes DiT's table of the training grid bicubically; proportional has step g/n (PixArt, diffusers)"""
    pos_embed_base: Width | None = None
    """resolution in pixels whose token grid is the training grid of net.pos_embed. Set when weights are transferred to
    another data.resolution: base_size = grid_size / scale (Berrada et al. Pseudocode 1). null: data.resolution"""
    pos_embed_span: Width | None = None
    """resolution in pixels whose token grid spans that of net.pos_embed_base: resampled keeps its step, interpolated
    resizes its table. Set when weights with resampled positions are transferred. null: the current grid"""

    @model_validator(mode="after")
    def _check_widths(self) -> "TransformerConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"net.hidden_size={self.hidden_size} is not a multiple of net.num_heads={self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(
                f"net.hidden_size={self.hidden_size} is not a multiple of 4, which 2-D sine-cosine positions need"
            )
        if self.pos_embed_span is not None and self.pos_embed not in ("resampled", "interpolated"):
            raise ValueError(f"net.pos_embed_span is not for net.pos_embed={self.pos_embed}: set it to null")
        return self

    @property
    def size_multiple(self) -> int:
        """Height and width of x must be multiples of this number."""
        return self.patch_size


class DiTConfig(TransformerConfig):
    """DiT with the class in adaLN (Peebles and Xie 2023), "DiT w/ LN" of Berrada et al."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})

    name: Literal["dit"] = "dit"
    qk_norm: bool = False
    """apply RMSNorm to queries and keys"""
    learned_variance: bool = False
    """add an output layer for the variance of ancestral steps (sample.variance=learned). No loss trains it: it is for
    imported weights of DiT, MDT and PixArt, and training leaves it unchanged"""


class DiTAttConfig(TransformerConfig):
    """DiT with the semantic condition in self-attention, "DiT w/ Att" of Berrada et al."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})

    name: Literal["dit-att"] = "dit-att"
    qk_norm: bool = True
    """apply RMSNorm to queries and keys; without it the runs of Berrada et al. diverge (Table 1)"""


class PixArtConfig(TransformerConfig):
    """PixArt-alpha with one adaLN for all blocks and cross-attention without norm or gate."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})

    name: Literal["pixart"] = "pixart"
    qk_norm: bool = False
    """apply RMSNorm to queries and keys"""
    learned_variance: bool = False
    """add an output layer for the variance of ancestral steps (sample.variance=learned). No loss trains it: it is for
    imported weights of DiT, MDT and PixArt, and training leaves it unchanged"""


class MDTConfig(TransformerConfig):
    """MDTv2, a DiT with long skip connections, relative position bias and a masked branch in training."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})

    name: Literal["mdt"] = "mdt"
    decoder_layers: Depth = 4
    """number of decoder blocks among net.depth; half of the other blocks are in-blocks, half out-blocks"""
    mask_ratio: tuple[Fraction, Fraction] = (0.3, 0.5)
    """range of the share of tokens that the masked branch hides; drawn uniformly at every step"""
    class_embed: Literal["mlp", "table"] = "mlp"
    """class embedding: an MLP of the class table (parameter count of Berrada et al. Table A1) or the table (MDTv2's
    code)"""
    learned_variance: bool = False
    """add an output layer for the variance of ancestral steps (sample.variance=learned). No loss trains it: it is for
    imported weights of DiT, MDT and PixArt, and training leaves it unchanged"""

    @model_validator(mode="after")
    def _check_depth(self) -> "MDTConfig":
        if self.pos_embed != "resampled":
            raise ValueError(f"net.pos_embed={self.pos_embed} is not for mdt, which learns its positions: leave it out")
        if self.pos_embed_base is not None or self.pos_embed_span is not None:
            raise ValueError(
                "net.pos_embed_base and net.pos_embed_span are not for mdt, which learns its positions: leave them out"
            )
        if self.mask_ratio[0] > self.mask_ratio[1] or self.mask_ratio[1] == 1:
            raise ValueError(f"net.mask_ratio={self.mask_ratio} must be in ascending order and below 1")
        if self.depth <= self.decoder_layers or (self.depth - self.decoder_layers) % 2:
            raise ValueError(
                f"net.depth={self.depth} minus net.decoder_layers={self.decoder_layers} must be even and above 0"
            )
        return self


class MMDiTConfig(TransformerConfig):
    """MM-DiT of SD3 with image and text tokens in joint attention, and pooled text or class in adaLN."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "pooled", "control"})

    name: Literal["mmdit"] = "mmdit"
    qk_norm: bool = True
    """apply RMSNorm to queries and keys (SD3.5: true, SD3 medium: false)"""
    separate_text_weights: Literal["qkv", "all"] = "qkv"
    """weights that text tokens do not share with image tokens: qkv (parameter count of Berrada et al. Table A1) or all
    (SD3's block)"""
    pooled_mlp: Literal["separate", "none"] = "separate"
    """separate: an MLP adds the pooled text to adaLN (SD3); none: pooled text is not used (parameter count of
    Berrada et al. Table A1)"""
    pos_embed_max_size: Width | None = None
    """rows and columns of SD3's position table, from which the central crop is used (SD3 medium: 192); null: positions
    as set by net.pos_embed"""
    dual_attention_layers: OptionalDepth = 0
    """number of first blocks with a second attention over the image tokens only (SD3.5 medium: 13)"""

    @model_validator(mode="after")
    def _check_sd3_options(self) -> "MMDiTConfig":
        size, dual = self.pos_embed_max_size, self.dual_attention_layers
        if size is not None and self.pos_embed != "resampled":
            raise ValueError(
                f"net.pos_embed_max_size={size} uses SD3's position table, net.pos_embed={self.pos_embed} another: "
                "set one of them"
            )
        for name in ("pos_embed_base", "pos_embed_span"):
            if size is not None and getattr(self, name) is not None:
                raise ValueError(f"net.pos_embed_max_size={size} uses SD3's position table: leave {name} out")
        if dual and self.separate_text_weights != "all":
            raise ValueError(
                f"net.dual_attention_layers={dual} is for SD3.5's block: set net.separate_text_weights=all"
            )
        if dual > self.depth:
            raise ValueError(f"net.dual_attention_layers={dual} is more than net.depth={self.depth}")
        return self


class MMDiTppConfig(TransformerConfig):
    """mmDiT++ with the semantic condition in joint attention only, and adaLN from time and control.

    See Berrada et al. 2024.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})

    name: Literal["mmdit++"] = "mmdit++"
    separate_text_weights: Literal["qkv", "all"] = "qkv"
    """weights that text tokens do not share with image tokens: qkv (parameter count of Berrada et al. Table A1) or all
    (SD3's block)"""


class MPDiTConfig(TransformerConfig):
    """DiT with magnitude-preserving layers and normalized weights."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})
    noise_embedding: ClassVar[Literal["fourier", "sinusoidal"]] = "fourier"

    name: Literal["mp-dit"] = "mp-dit"
    residual_balance: Fraction | None = None
    """weight t of a residual branch in its magnitude-preserving sum (EDM2 Eq. 88); null: 1 / (1 + sqrt(2 depth)), which
    leaves a share 1/e of the input after all blocks"""


class MPMMDiTppConfig(TransformerConfig):
    """mmDiT++ with magnitude-preserving layers and normalized weights."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})
    noise_embedding: ClassVar[Literal["fourier", "sinusoidal"]] = "fourier"

    name: Literal["mp-mmdit++"] = "mp-mmdit++"
    residual_balance: Fraction | None = None
    """weight t of a residual branch in its magnitude-preserving sum (EDM2 Eq. 88); null: 1 / (1 + sqrt(2 depth)), which
    leaves a share 1/e of the input after all blocks"""


class UNetConfig(Settings):
    """U-Net of SDXL (Podell et al. 2024), SD1.5 and LDM."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "pooled", "control"})
    noise_embedding: ClassVar[Literal["fourier", "sinusoidal"]] = "sinusoidal"
    dropout: ClassVar[float] = 0.0

    name: Literal["unet"] = "unet"
    channels: Width = 256
    """channels at the highest resolution"""
    channel_mult: LevelWidths = (1, 2, 4)
    """channels of each level as multiples of net.channels; each level halves the resolution"""
    num_blocks: Depth = 2
    """number of residual blocks per level in the encoder; the decoder has one more"""
    transformer_depth: Annotated[tuple[OptionalDepth, ...], Field(max_length=16)] = (0, 1, 1)
    """number of transformer blocks after each residual block of a level"""
    transformer_depth_middle: OptionalDepth = 1
    """number of transformer blocks between the two residual blocks of the middle (SDXL: 10)"""
    channels_per_head: Width = 64
    """channels of an attention head"""
    num_heads: Width | None = None
    """number of heads at every level (SD1.5: 8); null: channels of the level / net.channels_per_head"""
    context_dim: Width | None = None
    """channels of the tokens of cross-attention; null: 1024 for a class, those of a text token for text"""
    text_projection: Literal["mlp", "none"] = "mlp"
    """projection of text tokens before cross-attention: mlp (Linear-SiLU-Linear) or none (SD1.5, SDXL)"""
    pooled_mlp: Literal["separate", "shared", "none"] = "separate"
    """MLP of the pooled text: separate; shared, one MLP over pooled text and control variables concatenated (SDXL); or
    none, pooled text is not used (parameter count of Berrada et al. Table A1)"""
    norm_num_groups: Width = 32
    """number of groups of GroupNorm"""

    @model_validator(mode="after")
    def _check_levels(self) -> "UNetConfig":
        if not self.channel_mult or len(self.transformer_depth) != len(self.channel_mult):
            raise ValueError("net.transformer_depth and net.channel_mult need one value per level each")
        if self.channels % 2:
            raise ValueError(f"net.channels={self.channels} is odd: the sinusoidal time embedding needs an even number")
        head_setting = "channels_per_head" if self.num_heads is None else "num_heads"
        unit = self.num_heads or self.channels_per_head
        depths = [*self.transformer_depth, self.transformer_depth_middle]
        for multiplier, depth in zip([*self.channel_mult, self.channel_mult[-1]], depths, strict=True):
            width = self.channels * multiplier
            if width % self.norm_num_groups:
                raise ValueError(
                    f"a level of {width} channels is not a multiple of net.norm_num_groups={self.norm_num_groups}"
                )
            if depth and width % unit:
                raise ValueError(f"a level of {width} channels is not a multiple of net.{head_setting}={unit}")
        return self

    @property
    def size_multiple(self) -> int:
        """Height and width of x must be multiples of this number."""
        return 2 ** (len(self.channel_mult) - 1)


def _freeze(value: Any) -> Any:
    """Return lists as tuples and mappings as sorted tuples of pairs, recursively, so that settings can be hashed."""
    if isinstance(value, dict):
        return tuple(sorted((str(name), _freeze(part)) for name, part in value.items()))
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


class CustomNetConfig(Settings):
    """Network of the user (gesso.extend)."""

    name: Literal["custom"] = "custom"
    network: str
    """name that gesso.extend(networks=...) gave to the network"""
    options: Annotated[tuple[tuple[str, Any], ...], BeforeValidator(_freeze), PlainSerializer(dict)] = ()
    """arguments of the network besides its InputSpec, such as {"width": 64}; lists arrive as tuples"""
    accepts: tuple[Literal["label", "text", "pooled", "control"], ...] = ("label",)
    """conditions that the network reads from Cond"""
    noise_embedding: Literal["fourier", "sinusoidal"] = "sinusoidal"
    """c_noise: sinusoidal is the timestep, up to 1000; fourier is ln(sigma) / 4"""
    size_multiple: Width = 1
    """height and width of x must be multiples of this number"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """any value above 0 makes training seed torch before each step, so that dropout layers are reproducible"""


NetConfig = Annotated[
    EDM2Config
    | EDM2LadderConfig
    | UNetConfig
    | DiTConfig
    | DiTAttConfig
    | PixArtConfig
    | MDTConfig
    | MMDiTConfig
    | MMDiTppConfig
    | MPDiTConfig
    | MPMMDiTppConfig
    | CustomNetConfig,
    Field(discriminator="name"),
]

EDM2_CHANNELS = {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}
"""Channels by model size (EDM2 Table 6); XXS is a preset of the published code."""

TRANSFORMER_SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""hidden_size, depth and num_heads by model size of the DiT family."""


def edm2_config(size: str) -> EDM2Config:
    """Return EDM2 at a published size: XXS, XS, S, M, L, XL or XXL."""
    return EDM2Config(channels=EDM2_CHANNELS[size])


def mmditpp_config(size: str) -> MMDiTppConfig:
    """Return mmDiT++ at a size of the DiT family, such as S/2 or XL/2 (the number is the patch size)."""
    letters, patch = size.split("/")
    width, depth, heads = TRANSFORMER_SHAPES[letters]
    return MMDiTppConfig(hidden_size=width, depth=depth, num_heads=heads, patch_size=int(patch))
