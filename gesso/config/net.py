"""One model of settings per network, told apart by `name`. Each says as data what it accepts."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from gesso.config.base import Settings

Fraction = Annotated[float, Field(ge=0, le=1)]


class EDM2(Settings):
    """EDM2's CONFIG G U-Net (Karras et al. 2024, Figure 22)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label"})
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


class MMDiTpp(Settings):
    """mmDiT++ (Berrada et al. 2024): semantic condition through joint attention only, adaLN from time."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label"})
    embedding: ClassVar[str] = "sinusoidal"

    name: Literal["mmdit++"] = "mmdit++"
    width: PositiveInt = 384
    """D: channels of a token (S has 384)"""
    depth: PositiveInt = 12
    heads: PositiveInt = 6
    patch: PositiveInt = 2
    """side of the square of pixels or latents that becomes one token"""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    text_weights: Literal["qkv", "all"] = "qkv"
    """which weights the semantic tokens have of their own: qkv (the size of Table A1), all (SD3's block)"""

    @model_validator(mode="after")
    def _widths(self) -> "MMDiTpp":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.width % 4:
            raise ValueError(f"width={self.width} is not a multiple of 4, which the 2-D sincos positions need")
        return self

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch


Net = Annotated[EDM2 | MMDiTpp, Field(discriminator="name")]

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
