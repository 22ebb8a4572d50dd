"""One model of settings per network, told apart by `name`. Each says as data what it accepts."""

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gesso.config.base import Settings

Fraction = Annotated[float, Field(ge=0, le=1)]


class Control(NamedTuple):
    """How many control variables there are and how their embedding enters (Berrada et al. Eq. 1, Table A6).

    high and low count the variables of each level. mlp "split": E_h + gamma_c(t) E_l; "joint": one MLP over
    all of them, as SDXL has it, gamma_c = 1. schedule: gamma_c as a function of progress t, "cosine"
    (1-cos(pi (1-t)^alpha))/2, "uniform" 1, "zero" 0, "linear" 1-t, "step" 1 where t <= edge.
    """

    high: int = 0
    low: int = 0
    mlp: Literal["split", "joint"] = "split"
    schedule: Literal["cosine", "uniform", "zero", "linear", "step"] = "cosine"
    alpha: float = 8.0
    edge: float = 0.5


class Inputs(NamedTuple):
    """What a network is built for besides its own settings.

    channels and resolution (height and width in training) of x; num_classes 0: no classes; text_width
    channels of a text token, 0: no text; pooled_width of the pooled text. Classes and text exclude each other.
    positions_at: height and width of the x whose grid of tokens positions are counted on; None: resolution.
    positions_span: the same of the x whose grid spans that one; None: any.
    """

    channels: int
    resolution: int
    num_classes: int = 0
    text_width: int = 0
    pooled_width: int = 0
    control: Control = Control()
    positions_at: int | None = None
    positions_span: int | None = None

    @property
    def semantic(self) -> bool:
        return bool(self.num_classes or self.text_width)


class EDM2(Settings):
    """EDM2's CONFIG G U-Net (Karras et al. 2024, Figure 22)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})
    embedding: ClassVar[str] = "fourier"

    name: Literal["edm2"] = "edm2"
    channels: PositiveInt = 192
    """c: channels at the highest resolution (S has 192)"""
    multipliers: tuple[PositiveInt, ...] = (1, 2, 3, 4)
    """channels of each level, in units of c; each level halves the resolution"""
    blocks: PositiveInt = 3
    """residual blocks per level in the encoder; the decoder has one more"""
    attention_levels: tuple[int, ...] = (2, 3)
    """levels with self-attention, 0 being the highest resolution"""
    channels_per_head: PositiveInt = 64
    residual_balance: Fraction = 0.3
    """t of the MP-sum that adds a residual branch (Eq. 88)"""
    attention_balance: Fraction = 0.3
    """t of the MP-sum that adds self-attention (Eq. 88)"""
    label_balance: Fraction = 0.5
    """t of the MP-sum of noise level and class (Eq. 88)"""
    concat_balance: Fraction = 0.5
    """t of the MP-cat of a skip connection (Eq. 103)"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _levels(self) -> "EDM2":
        if not self.multipliers:
            raise ValueError("multipliers needs at least one level")
        for level in self.attention_levels:
            if not 0 <= level < len(self.multipliers):
                raise ValueError(
                    f"attention_levels has level {level}, but there are levels 0 to {len(self.multipliers) - 1}"
                )
        for level in {*self.attention_levels, len(self.multipliers) - 1}:  # the lowest always has one attention
            width = self.channels * self.multipliers[level]
            if width % self.channels_per_head:
                raise ValueError(
                    f"level {level} has {width} channels, not a multiple of channels_per_head={self.channels_per_head}"
                )
        return self

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest resolution down."""
        return [self.channels * m for m in self.multipliers]

    @property
    def embedding_width(self) -> int:
        """Channels of the embedding: those of the widest level, as in the published network."""
        return max(self.widths)


class EDM2Ladder(Settings):
    """CONFIGS A to G of EDM2 as cumulative steps (Karras et al. 2024, Figures 16-22)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label"})
    embedding: ClassVar[str] = "fourier"

    name: Literal["edm2-ladder"] = "edm2-ladder"
    step: Literal["A", "B", "C", "D", "E", "F", "G"] = "G"
    channels: PositiveInt = 192
    multipliers: tuple[PositiveInt, ...] = (1, 2, 3, 4)
    blocks: PositiveInt = 3
    attention_levels: tuple[int, ...] = (2, 3)
    """CONFIG A has (1, 2, 3)"""
    channels_per_head: PositiveInt = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """CONFIGS A to F have .10"""

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest resolution down."""
        return [self.channels * m for m in self.multipliers]

    @property
    def embedding_width(self) -> int:
        """Channels of the embedding: those of the widest level. Our choice for CONFIGS A to F at other multipliers than
        the published ones, so that the ladder changes nothing else."""
        return max(self.widths)


class Transformer(Settings):
    """What all transformers have: the shape of the DiT family."""

    embedding: ClassVar[str] = "sinusoidal"
    dropout: ClassVar[float] = 0.0

    width: PositiveInt = 384
    """D: channels of a token (S has 384)"""
    depth: PositiveInt = 12
    heads: PositiveInt = 6
    patch: PositiveInt = 2
    """side of the square of pixels or latents that becomes one token"""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    positions: Literal["resampled", "extrapolated", "interpolated", "proportional"] = "resampled"
    """sine-cosine positions of a grid of n tokens a side: resampled, from 0 to the training grid's side g whatever the
    grid, step g/(n-1) (Berrada et al., Pseudocode 1); extrapolated, step 1 (DiT); interpolated, DiT's table of the
    training grid, resized bicubically; proportional, step g/n (PixArt, diffusers)"""
    positions_at: PositiveInt | None = None
    """resolution in pixels whose grid stands for the training grid in `positions`: where weights were moved from there
    to data.resolution, base_size = grid_size / scale (Pseudocode 1). null: data.resolution"""
    positions_span: PositiveInt | None = None
    """resolution whose grid spans positions_at: resampled positions keep its step, interpolated ones resize its table. Set
    where resampled weights were moved. null: the grid at hand"""

    @model_validator(mode="after")
    def _widths(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.width % 4:
            raise ValueError(f"width={self.width} is not a multiple of 4, which the 2-D sincos positions need")
        if self.positions_span is not None and self.positions not in ("resampled", "interpolated"):
            raise ValueError(f"positions_span is not for positions={self.positions}; leave it out")
        return self

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch


class DiT(Transformer):
    """DiT with the class in adaLN (Peebles and Xie 2023): "DiT w/ LN"."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})

    name: Literal["dit"] = "dit"
    qk_norm: bool = False
    """RMSNorm of queries and keys"""
    learned_variance: bool = False
    """a second last layer estimates the variance of ancestral steps (sample.variance=learned); no loss trains it: it is for
    imported weights of DiT, MDT and PixArt, and keeps its values in training"""


class DiTAtt(Transformer):
    """DiT with the semantic condition in attention: "DiT w/ Att"."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})

    name: Literal["dit-att"] = "dit-att"
    qk_norm: bool = True
    """without it the paper's runs diverge (Table 1)"""


class PixArt(Transformer):
    """PixArt-alpha: one adaLN for all blocks, cross-attention without norm or gate."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})

    name: Literal["pixart"] = "pixart"
    qk_norm: bool = False
    learned_variance: bool = False
    """a second last layer estimates the variance of ancestral steps (sample.variance=learned); no loss trains it: it is for
    imported weights of DiT, MDT and PixArt, and keeps its values in training"""


class MDT(Transformer):
    """MDTv2: DiT with long skips, relative position bias and a masked branch in training."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})

    name: Literal["mdt"] = "mdt"
    decoder: PositiveInt = 4
    """decoder blocks, of `depth` in all; the others are halved into in- and out-blocks"""
    mask_ratio: tuple[Fraction, Fraction] = (0.3, 0.5)
    """the share of tokens that the masked branch hides is uniform between these, drawn per step"""
    class_embed: Literal["mlp", "table"] = "mlp"
    """what time is added to: an MLP of the class table (the size of Table A1) or the table itself (MDTv2's code)"""
    learned_variance: bool = False
    """a second last layer estimates the variance of ancestral steps (sample.variance=learned); no loss trains it: it is for
    imported weights of DiT, MDT and PixArt, and keeps its values in training"""

    @model_validator(mode="after")
    def _halves(self) -> "MDT":
        if self.positions != "resampled":
            raise ValueError(f"positions={self.positions} is not for mdt, which learns its positions; leave it out")
        if self.positions_at is not None or self.positions_span is not None:
            raise ValueError("positions_at is not for mdt, which learns its positions; leave it out")
        if self.mask_ratio[0] > self.mask_ratio[1] or self.mask_ratio[1] == 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must rise and stay below 1")
        if self.depth <= self.decoder or (self.depth - self.decoder) % 2:
            raise ValueError(f"depth={self.depth} less decoder={self.decoder} must be even and above 0")
        return self


class MMDiT(Transformer):
    """mmDiT (SD3): two streams of tokens in one attention, pooled text or class in adaLN."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "pooled", "control"})

    name: Literal["mmdit"] = "mmdit"
    qk_norm: bool = True
    """RMSNorm of queries and keys (SD3.5 has it, SD3 medium not)"""
    text_weights: Literal["qkv", "all"] = "qkv"
    """which weights the semantic tokens have of their own: qkv (the size of Table A1), all (SD3's block)"""
    pooled_mlp: Literal["own", "none"] = "own"
    """the pooled text's MLP, which adds it to adaLN (SD3), or none: the network does not see it (the size of Table A1)"""
    max_grid: PositiveInt | None = None
    """SD3's positions: rows and columns of their table, cropped at its centre (SD3 medium has 192); None: as
    `positions` says"""
    dual_blocks: NonNegativeInt = 0
    """the first so many blocks have a second attention, of the image tokens alone (SD3.5 medium has 13)"""

    @model_validator(mode="after")
    def _of_sd3(self) -> "MMDiT":
        if self.max_grid is not None and self.positions != "resampled":
            raise ValueError(f"max_grid={self.max_grid} has positions of its own, not {self.positions}; leave one out")
        for name in ("positions_at", "positions_span"):
            if self.max_grid is not None and getattr(self, name) is not None:
                raise ValueError(f"max_grid={self.max_grid} keeps its positions with the weights; leave {name} out")
        if self.dual_blocks and self.text_weights != "all":
            raise ValueError(f"dual_blocks={self.dual_blocks} is SD3.5's and needs text_weights=all, its block")
        if self.dual_blocks > self.depth:
            raise ValueError(f"dual_blocks={self.dual_blocks} is more than depth={self.depth}")
        return self


class MMDiTpp(Transformer):
    """mmDiT++ (Berrada et al. 2024): semantic condition through joint attention only, adaLN from time and control."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})

    name: Literal["mmdit++"] = "mmdit++"
    text_weights: Literal["qkv", "all"] = "qkv"
    """which weights the semantic tokens have of their own: qkv (the size of Table A1), all (SD3's block)"""


class MPDiT(Transformer):
    """DiT with all layers magnitude-preserving and on the sphere."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "control"})
    embedding: ClassVar[str] = "fourier"

    name: Literal["mp-dit"] = "mp-dit"
    residual_balance: Fraction | None = None
    """t of the MP-sum that adds a branch (EDM2 Eq. 88); None: 1 / (1 + sqrt(2 depth)), which keeps 1/e of the input"""


class MPMMDiTpp(Transformer):
    """mmDiT++ with all layers magnitude-preserving and on the sphere."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "control"})
    embedding: ClassVar[str] = "fourier"

    name: Literal["mp-mmdit++"] = "mp-mmdit++"
    residual_balance: Fraction | None = None
    """t of the MP-sum that adds a branch (EDM2 Eq. 88); None: 1 / (1 + sqrt(2 depth)), which keeps 1/e of the input"""


class UNet(Settings):
    """SDXL's base U-Net (Podell et al. 2024)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "text", "pooled", "control"})
    embedding: ClassVar[str] = "sinusoidal"
    dropout: ClassVar[float] = 0.0

    name: Literal["unet"] = "unet"
    channels: PositiveInt = 256
    multipliers: tuple[PositiveInt, ...] = (1, 2, 4)
    blocks: PositiveInt = 2
    """residual blocks per level on the way down; one more on the way up"""
    transformer_depth: tuple[NonNegativeInt, ...] = (0, 1, 1)
    """transformer blocks after each residual block of a level; 0: none"""
    middle_depth: NonNegativeInt = 1
    """transformer blocks between the two residual blocks at the bottom (SDXL has 10)"""
    head_width: PositiveInt = 64
    """channels of an attention head"""
    heads: PositiveInt | None = None
    """heads at every level, whatever its width (SD1.5 has 8); None: as many as head_width gives"""
    context: PositiveInt | None = None
    """channels of the tokens that cross-attention sees; None: 1024 for a class, text_width for text"""
    text_embed: Literal["mlp", "none"] = "mlp"
    """what text tokens pass before cross-attention: Linear-SiLU-Linear, or nothing (SD1.5, SDXL)"""
    pooled_mlp: Literal["own", "shared", "none"] = "own"
    """the pooled text's MLP: its own; one over pooled text and control variables concatenated (SDXL); or none: the
    network does not see it (the size of Table A1)"""
    groups: PositiveInt = 32
    """groups of GroupNorm"""

    @model_validator(mode="after")
    def _levels(self) -> "UNet":
        if not self.multipliers or len(self.transformer_depth) != len(self.multipliers):
            raise ValueError("transformer_depth and multipliers need one value per level each")
        if self.channels % 2:
            raise ValueError(f"channels={self.channels} is odd, but half of the time embedding's sinusoids are cosines")
        depths = [*self.transformer_depth, self.middle_depth]
        for multiplier, depth in zip([*self.multipliers, self.multipliers[-1]], depths, strict=True):
            width = self.channels * multiplier
            if width % self.groups:
                raise ValueError(f"a level of {width} channels is not a multiple of groups={self.groups}")
            name, unit = ("head_width", self.head_width) if self.heads is None else ("heads", self.heads)
            if depth and width % unit:
                raise ValueError(f"a level of {width} channels is not a multiple of {name}={unit}")
        return self

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


Net = Annotated[
    EDM2 | EDM2Ladder | UNet | DiT | DiTAtt | PixArt | MDT | MMDiT | MMDiTpp | MPDiT | MPMMDiTpp,
    Field(discriminator="name"),
]

EDM2_CHANNELS = {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}
"""EDM2 Table 6; XXS is a preset of the published code."""

TRANSFORMER_SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of the DiT family."""


def edm2(size: str) -> EDM2:
    """EDM2 at a published size: XXS, XS, S, M, L, XL or XXL."""
    return EDM2(channels=EDM2_CHANNELS[size])


def mmditpp(size: str) -> MMDiTpp:
    """mmDiT++ at a size of the DiT family, such as S/2 or XL/2 (the number is the patch)."""
    letters, patch = size.split("/")
    width, depth, heads = TRANSFORMER_SHAPES[letters]
    return MMDiTpp(width=width, depth=depth, heads=heads, patch=int(patch))
