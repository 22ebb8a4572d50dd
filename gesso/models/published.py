"""Published sizes of networks: settings, parameters, FLOPs, source and trust.

Sources: EDM2 is Karras et al. 2024, Table A1 that of Berrada et al. 2024, "public code" a count of the published
implementation or checkpoint.
"""

from typing import Literal, NamedTuple

from gesso import config
from gesso.config import (
    ControlSpec,
    DiTAttConfig,
    DiTConfig,
    EDM2LadderConfig,
    InputSpec,
    MDTConfig,
    MMDiTConfig,
    NetConfig,
    PixArtConfig,
    UNetConfig,
)
from gesso.published import read_paper, read_table
from gesso.published.edm2 import COST_512

Quantity = Literal["parameters", "macs", "table_a1_flops", "conv_macs"]
Trust = Literal["exact", "high", "medium", "low"]

TOLERANCE: dict[Trust, dict[str, float]] = {
    "exact": {"parameters": 0.0, "flops": 0.001},
    "high": {"parameters": 0.001, "flops": 0.005},
    "medium": {"parameters": 0.01, "flops": 0.01},
    "low": {"parameters": 0.01, "flops": 0.01},
}
"""Allowed deviation from 1 of the ratio computed / published."""


class PublishedNumber(NamedTuple):
    """Published number of a network.

    `quantity` is "parameters", "macs" (multiply-accumulates, the flops of DiT's and EDM2's papers), "table_a1_flops"
    (the rule of Table A1) or "conv_macs" (multiply-accumulates of convolutions). `pixels` is the side of the image,
    8 times that of the latents. `allowed_ratio` bounds computed / published; None is 1 +- TOLERANCE of the trust.
    `rounding` is half a unit of the last printed digit, where it matters.
    """

    quantity: Quantity
    pixels: int
    value: float
    trust: Trust
    source: str
    allowed_ratio: tuple[float, float] | None = None
    rounding: float = 0.0
    note: str = ""

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Return the bounds (low, high) of computed / published."""
        tolerance = TOLERANCE[self.trust]["parameters" if self.quantity == "parameters" else "flops"]
        return self.allowed_ratio or (1 - tolerance, 1 + tolerance)


class PublishedModel(NamedTuple):
    """Published model: its settings in gesso and its published numbers.

    `num_text_tokens` is the number of text tokens of an image. `extra_parameters` are parameters of the published count
    that gesso's network does not have (negative: that only gesso's has), by description.
    """

    name: str
    net: NetConfig
    inputs: InputSpec
    numbers: tuple[PublishedNumber, ...]
    num_text_tokens: int = 0
    extra_parameters: dict[str, int] = {}


PUBLIC_CODE = "public code, counted"
DIT_XL_MACS = read_table("edm2", "table_2")["DiT-XL/2"]["Gflops"] * 1e9
XXL_CONVOLUTION_GFLOPS: float = read_paper("edm2")["xxl_convolution_gflops"]


def edm2_model(size: str) -> PublishedModel:
    """Return an EDM2 model; its published Gflops include weight normalization, about 3 operations per parameter."""
    parameters = read_table("edm2", "public_code")[size]["parameters"]
    numbers = [PublishedNumber("parameters", 512, parameters, "exact", PUBLIC_CODE)]
    if size in COST_512:
        note = "the published number includes weight normalization and elementwise operations, 0.9 to 1.4 %"
        macs = round(COST_512[size].gflops) * 1e9
        numbers.append(PublishedNumber("macs", 512, macs, "high", "EDM2 Table 2", (0.986, 0.991), 0.5e9, note))
    if size == "XXL":
        numbers.append(PublishedNumber("conv_macs", 512, XXL_CONVOLUTION_GFLOPS * 1e9, "exact", "EDM2 D.5"))
    return PublishedModel(
        f"edm2-{size.lower()}",
        config.edm2_config(size),
        InputSpec(4, 64, 1000),
        tuple(numbers),
        0,
        {"uncertainty function": 128},
    )


def ladder_model(config_letter: str) -> PublishedModel:
    """Return a row of EDM2's Table 1; CONFIGS A to C do not normalize weights."""
    row, counted = read_table("edm2", "table_1")[config_letter], read_table("edm2", "public_code").get(config_letter)
    levels = (1, 2, 3) if config_letter == "A" else (2, 3)
    parameters = (
        PublishedNumber("parameters", 512, counted["parameters"], "exact", PUBLIC_CODE)
        if counted
        else PublishedNumber("parameters", 512, row["Mparams"] * 1e6, "high", "EDM2 Table 1")
    )
    macs = PublishedNumber("macs", 512, row["Gflops"] * 1e9, "high", "EDM2 Table 1", (0.98, 1.0), 0.05e9)
    net = EDM2LadderConfig(config=config_letter, attention_levels=levels)
    return PublishedModel(f"edm2-config-{config_letter.lower()}", net, InputSpec(4, 64, 1000), (parameters, macs))


XL_WIDTH = 1152
XL_SHAPE: dict[str, int] = {"hidden_size": XL_WIDTH, "depth": 28, "num_heads": 16, "patch_size": 2}

SDXL_CONTROL = ControlSpec(num_high=4, num_low=2, mlp="joint")
"""Control of Table A1: one SDXL-style MLP over 6 scalars."""
CLASS_INPUTS = InputSpec(4, 64, 1000)
CLASS_CONTROL_INPUTS = InputSpec(4, 64, 1000, control=SDXL_CONTROL)
TEXT_INPUTS = InputSpec(4, 64, text_dim=768)
TEXT_CONTROL_INPUTS = InputSpec(4, 64, text_dim=768, control=SDXL_CONTROL)

POSITIONS_256 = {"position table of 16x16 tokens, a constant in gesso": 256 * XL_WIDTH}
POSITIONS_512 = {"position table of 32x32 tokens, a constant in gesso": 1024 * XL_WIDTH}
LEARNED_SIGMA = {"rows of the last layer for the learned sigma, not in gesso": 4 * 2 * 2 * (XL_WIDTH + 1)}
NO_CLASS_MLP = {"MLP on the class table, only in gesso": -2 * (XL_WIDTH * XL_WIDTH + XL_WIDTH)}


def table_a1_numbers(
    row: str, trusts: tuple[Trust, Trust, Trust], notes: dict[str, str] | None = None
) -> tuple[PublishedNumber, ...]:
    """Return a row of Table A1.

    Args:
        row: name of the row.
        trusts: trust in the parameters and in the FLOPs at 256 and 512 pixels.
        notes: notes by column.
    """
    numbers, notes = read_table("berrada2024", "table_a1")[row], notes or {}
    columns: tuple[tuple[str, Quantity, int, float], ...] = (
        ("parameters", "parameters", 512, 1e6),
        ("FLOPs, 256", "table_a1_flops", 256, 1e9),
        ("FLOPs, 512", "table_a1_flops", 512, 1e9),
    )
    return tuple(
        PublishedNumber(quantity, pixels, numbers[column] * unit, trust, "Table A1", note=notes.get(column, ""))
        for (column, quantity, pixels, unit), trust in zip(columns, trusts, strict=True)
    )


FLOPS_COLUMNS = ("FLOPs, 256", "FLOPs, 512")
NOTE_COPIED_CELL = "low trust: the parameters equal DiT's and the FLOPs Att-DiT's, probably a copied cell"
NOTE_COUNTED_TWICE = "the published number results if the cross-attention is counted twice"
NOTE_NO_TEXT_MLP = "the published number results from 7 D^2 per text token and block, without its MLP; gesso's has 12"

TABLE_A1_MODELS = (
    PublishedModel(
        "a1-unet-class",
        UNetConfig(channels=256, channel_mult=(1, 2, 4), transformer_depth=(0, 1, 1)),
        CLASS_CONTROL_INPUTS,
        table_a1_numbers("UNet, class", ("high", "high", "high")),
    ),
    PublishedModel(
        "a1-unet-text",
        UNetConfig(channels=320, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), num_heads=8),
        TEXT_CONTROL_INPUTS,
        table_a1_numbers("UNet, text", ("high", "high", "high")),
        256,
    ),
    PublishedModel(
        "a1-pixart-class",
        PixArtConfig(**XL_SHAPE),
        CLASS_CONTROL_INPUTS,
        table_a1_numbers("PixArt, class", ("high", "high", "high")),
    ),
    PublishedModel(
        "a1-pixart-text",
        PixArtConfig(**XL_SHAPE),
        TEXT_CONTROL_INPUTS,
        table_a1_numbers("PixArt, text", ("medium", "low", "low"), dict.fromkeys(FLOPS_COLUMNS, "never reproduced")),
        256,
    ),
    PublishedModel(
        "a1-dit-class",
        DiTConfig(**XL_SHAPE),
        CLASS_CONTROL_INPUTS,
        table_a1_numbers("DiT, class", ("high", "high", "high")),
        extra_parameters=POSITIONS_512,
    ),
    PublishedModel(
        "a1-mdt-class",
        MDTConfig(**XL_SHAPE),
        CLASS_INPUTS,
        table_a1_numbers("mDT, class", ("medium", "medium", "medium")),
    ),
    PublishedModel(
        "a1-dit-att-class",
        DiTAttConfig(**XL_SHAPE),
        CLASS_CONTROL_INPUTS,
        table_a1_numbers("DiT w/ Att, class", ("medium", "medium", "medium")),
        extra_parameters=POSITIONS_256,
    ),
    PublishedModel(
        "a1-dit-att-text",
        DiTAttConfig(**XL_SHAPE),
        TEXT_CONTROL_INPUTS,
        table_a1_numbers(
            "DiT w/ Att, text", ("medium", "low", "low"), dict.fromkeys(FLOPS_COLUMNS, NOTE_COUNTED_TWICE)
        ),
        256,
        POSITIONS_512,
    ),
    PublishedModel(
        "a1-mmdit-text",
        MMDiTConfig(**XL_SHAPE),
        TEXT_CONTROL_INPUTS,
        table_a1_numbers("mmDiT, text", ("high", "high", "high"), dict.fromkeys(FLOPS_COLUMNS, NOTE_NO_TEXT_MLP)),
        256,
        POSITIONS_512,
    ),
    PublishedModel(
        "a1-mmdit-class",
        MMDiTConfig(**XL_SHAPE),
        CLASS_CONTROL_INPUTS,
        table_a1_numbers(
            "mmDiT, class", ("low", "low", "low"), dict.fromkeys(("parameters", *FLOPS_COLUMNS), NOTE_COPIED_CELL)
        ),
        extra_parameters=POSITIONS_512,
    ),
)


def checkpoint_size(millions: float, pixels: int = 512, note: str = "") -> PublishedNumber:
    """Return the number of parameters of a published checkpoint, in millions."""
    return PublishedNumber("parameters", pixels, millions * 1e6, "high", "public code", note=note)


CHECKPOINT_MODELS = (
    PublishedModel(
        "dit-xl/2",
        DiTConfig(**XL_SHAPE),
        CLASS_INPUTS,
        (checkpoint_size(675.13, 256), PublishedNumber("macs", 512, DIT_XL_MACS, "high", "EDM2 Table 2")),
        extra_parameters=POSITIONS_256 | LEARNED_SIGMA,
    ),
    PublishedModel(
        "mdtv2-xl/2",
        MDTConfig(**XL_SHAPE),
        CLASS_INPUTS,
        (checkpoint_size(742.26, 256),),
        extra_parameters=LEARNED_SIGMA | NO_CLASS_MLP,
    ),
    PublishedModel(
        "pixart-alpha-xl/2",
        PixArtConfig(**XL_SHAPE),
        InputSpec(4, 64, text_dim=4096),
        (checkpoint_size(610.86),),
        120,
        LEARNED_SIGMA,
    ),
    PublishedModel(
        "sd3-medium",
        MMDiTConfig(
            hidden_size=1536,
            depth=24,
            num_heads=24,
            patch_size=2,
            qk_norm=False,
            separate_text_weights="all",
            pos_embed_max_size=192,
        ),
        InputSpec(16, 128, text_dim=4096, pooled_dim=2048),
        (checkpoint_size(2028.3, 1024),),
        333,
    ),
    PublishedModel(
        "sdxl-base",
        UNetConfig(
            channels=320,
            channel_mult=(1, 2, 4),
            transformer_depth=(0, 2, 10),
            transformer_depth_middle=10,
            text_projection="none",
            pooled_mlp="shared",
        ),
        InputSpec(4, 128, text_dim=2048, pooled_dim=1280, control=SDXL_CONTROL),
        (checkpoint_size(2567.5, 1024),),
        77,
    ),
    PublishedModel(
        "sd1.5",
        UNetConfig(
            channels=320, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), num_heads=8, text_projection="none"
        ),
        InputSpec(4, 64, text_dim=768),
        (checkpoint_size(859.52),),
        77,
    ),
)

EDM2_MODELS = tuple(edm2_model(size) for size in ("XXS", "XS", "S", "M", "L", "XL", "XXL"))
LADDER_MODELS = tuple(map(ladder_model, "ABCDEFG"))

PUBLISHED_MODELS: tuple[PublishedModel, ...] = (*EDM2_MODELS, *LADDER_MODELS, *TABLE_A1_MODELS, *CHECKPOINT_MODELS)
