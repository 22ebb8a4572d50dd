"""The published size of every network here, as data: settings, parameters, FLOPs, where from, how far to trust.

Sources: EDM2 is Karras et al. 2024, Table A1 is of Berrada et al. 2024, "public code" is a count of the
published implementation or checkpoint.
"""

from typing import Literal, NamedTuple

from gesso import config
from gesso.config import MDT, Control, DiT, DiTAtt, EDM2Ladder, Inputs, MMDiT, Net, PixArt, UNet

Quantity = Literal["parameters", "macs", "paper", "convolutions"]
Trust = Literal["exact", "high", "medium", "low"]

TOLERANCE: dict[Trust, dict[str, float]] = {
    "exact": {"parameters": 0.0, "flops": 0.001},
    "high": {"parameters": 0.001, "flops": 0.005},
    "medium": {"parameters": 0.01, "flops": 0.01},
    "low": {"parameters": 0.01, "flops": 0.01},
}
"""How far from 1 the ratio ours / published may be."""


class Figure(NamedTuple):
    """One published number.

    quantity: "parameters"; "macs", multiply-accumulates, which DiT's and EDM2's papers call flops; "paper",
    Table A1's rule; "convolutions", the macs of convolutions alone. pixels: side of the image, 8 times that
    of the latents. allowed: (low, high) of ours / published, where that is not 1 +- TOLERANCE of the trust.
    rounding: half a unit of the last printed digit, where it matters.
    """

    quantity: Quantity
    pixels: int
    value: float
    trust: Trust
    source: str
    allowed: tuple[float, float] | None = None
    rounding: float = 0.0
    note: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of ours / published."""
        tolerance = TOLERANCE[self.trust]["parameters" if self.quantity == "parameters" else "flops"]
        return self.allowed or (1 - tolerance, 1 + tolerance)


class Published(NamedTuple):
    """A published model: our settings for it and what is known of it.

    tokens: text tokens of one image. elsewhere: parameters that the published count holds and ours does not
    (negative: the other way round), by what they are.
    """

    name: str
    net: Net
    inputs: Inputs
    figures: tuple[Figure, ...]
    tokens: int = 0
    elsewhere: dict[str, int] = {}


FACTS = "public code, counted"


def edm2(size: str, parameters: int, gflops: float = 0, convolutions: float = 0) -> Published:
    """EDM2's published Gflops hold weight normalization inside the forward pass, about 3 operations per parameter."""
    figures = [Figure("parameters", 512, parameters, "exact", FACTS)]
    if gflops:
        note = "theirs also hold weight normalization and elementwise operations, 0.9 to 1.4 % in all"
        figures.append(Figure("macs", 512, gflops * 1e9, "high", "EDM2 Table 2", (0.986, 0.991), 0.5e9, note))
    if convolutions:
        figures.append(Figure("convolutions", 512, convolutions * 1e9, "exact", "EDM2 D.5"))
    return Published(
        f"edm2-{size.lower()}", config.edm2(size), Inputs(4, 64, 1000), tuple(figures), 0, {"uncertainty function": 128}
    )


def ladder(step: str, parameters: float, gflops: float, trust: Trust = "high") -> Published:
    """A row of EDM2's Table 1. A to C normalize no weights."""
    levels = (1, 2, 3) if step == "A" else (2, 3)
    figures = (
        Figure("parameters", 512, parameters, trust, FACTS if trust == "exact" else "EDM2 Table 1"),
        Figure("macs", 512, gflops * 1e9, "high", "EDM2 Table 1", (0.98, 1.0), 0.05e9),
    )
    net = EDM2Ladder(step=step, attention_levels=levels)
    return Published(f"edm2-config-{step.lower()}", net, Inputs(4, 64, 1000), figures)


D = 1152
XL: dict[str, int] = {"width": D, "depth": 28, "heads": 16, "patch": 2}

SIX = Control(high=4, low=2, mlp="joint")
"""Table A1's control: one SDXL-style MLP over 6 scalars."""
CLASSES = Inputs(4, 64, 1000)
CLASSES_CONTROL = Inputs(4, 64, 1000, control=SIX)
TEXT = Inputs(4, 64, text_width=768)
TEXT_CONTROL = Inputs(4, 64, text_width=768, control=SIX)

POSITIONS_256 = {"position table of 16x16 tokens, a constant here": 256 * D}
POSITIONS_512 = {"position table of 32x32 tokens, a constant here": 1024 * D}
LEARNED_SIGMA = {"last layer's rows for the learned sigma, none here": 4 * 2 * 2 * (D + 1)}
NO_CLASS_MLP = {"MLP on the class table, here only": -2 * (D * D + D)}


def table_a1(parameters: float, at_256: float, at_512: float, trusts: str, notes: dict[int, str]) -> tuple[Figure, ...]:
    """A cell of Table A1: M parameters, GFLOPs at 256 and 512 pixels. trusts: their trust in this order."""
    of_parameters, of_256, of_512 = trusts.split()
    source = "Table A1"
    return (
        Figure("parameters", 512, parameters * 1e6, of_parameters, source, note=notes.get(0, "")),
        Figure("paper", 256, at_256 * 1e9, of_256, source, note=notes.get(256, "")),
        Figure("paper", 512, at_512 * 1e9, of_512, source, note=notes.get(512, "")),
    )


COPIED = "low trust: parameters printed equal to DiT's and FLOPs to Att-DiT's, likely a copied cell"
TWICE = "theirs come out if the cross-attention is counted twice"
SEVEN = "theirs come out at 7 D^2 per text token and block: own qkv 3, 4 more, and no MLP; ours have 12"

TABLE_A1 = (
    Published(
        "a1-unet-class",
        UNet(channels=256, multipliers=(1, 2, 4), transformer_depth=(0, 1, 1)),
        CLASSES_CONTROL,
        table_a1(401.75, 95.38, 390, "high high high", {}),
    ),
    Published(
        "a1-unet-text",
        UNet(channels=320, multipliers=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), heads=8),
        TEXT_CONTROL,
        table_a1(864.31, 189.78, 819.56, "high high high", {}),
        256,
    ),
    Published(
        "a1-pixart-class",
        PixArt(**XL),
        CLASSES_CONTROL,
        table_a1(611.70, 275.14, 1200, "high high high", {}),
    ),
    Published(
        "a1-pixart-text",
        PixArt(**XL),
        TEXT_CONTROL,
        table_a1(610.12, 314.68, 1140, "medium low low", dict.fromkeys((256, 512), "never reproduced")),
        256,
    ),
    Published(
        "a1-dit-class",
        DiT(**XL),
        CLASSES_CONTROL,
        table_a1(679.09, 237.40, 1050, "high high high", {}),
        elsewhere=POSITIONS_512,
    ),
    Published(
        "a1-mdt-class",
        MDT(**XL),
        CLASSES,
        table_a1(748.07, 259.08, 1140, "medium medium medium", {}),
    ),
    Published(
        "a1-dit-att-class",
        DiTAtt(**XL),
        CLASSES_CONTROL,
        table_a1(792.44, 237.93, 1050, "medium medium medium", {}),
        elsewhere=POSITIONS_256,
    ),
    Published(
        "a1-dit-att-text",
        DiTAtt(**XL),
        TEXT_CONTROL,
        table_a1(940.49, 407.88, 1500, "medium low low", {256: TWICE, 512: TWICE}),
        256,
        POSITIONS_512,
    ),
    Published(
        "a1-mmdit-text",
        MMDiT(**XL),
        TEXT_CONTROL,
        table_a1(791.64, 397.06, 1260, "high high high", {256: SEVEN, 512: SEVEN}),
        256,
        POSITIONS_512,
    ),
    Published(
        "a1-mmdit-class",
        MMDiT(**XL),
        CLASSES_CONTROL,
        table_a1(679.09, 237.93, 1050, "low low low", dict.fromkeys((0, 256, 512), COPIED)),
        elsewhere=POSITIONS_512,
    ),
)


def checkpoint(millions: float, pixels: int = 512, note: str = "") -> Figure:
    return Figure("parameters", pixels, millions * 1e6, "high", "public code", note=note)


CHECKPOINTS = (
    Published(
        "dit-xl/2",
        DiT(**XL),
        CLASSES,
        (checkpoint(675.13, 256), Figure("macs", 512, 525e9, "high", "EDM2 Table 2")),
        elsewhere=POSITIONS_256 | LEARNED_SIGMA,
    ),
    Published(
        "mdtv2-xl/2",
        MDT(**XL),
        CLASSES,
        (checkpoint(742.26, 256),),
        elsewhere=LEARNED_SIGMA | NO_CLASS_MLP,
    ),
    Published(
        "pixart-alpha-xl/2",
        PixArt(**XL),
        Inputs(4, 64, text_width=4096),
        (checkpoint(610.86),),
        120,
        LEARNED_SIGMA,
    ),
    Published(
        "sd3-medium",
        MMDiT(width=1536, depth=24, heads=24, patch=2, qk_norm=False, text_weights="all", max_grid=192),
        Inputs(16, 128, text_width=4096, pooled_width=2048),
        (checkpoint(2028.3, 1024),),
        333,
    ),
    Published(
        "sdxl-base",
        UNet(
            channels=320,
            multipliers=(1, 2, 4),
            transformer_depth=(0, 2, 10),
            middle_depth=10,
            text_embed="none",
            pooled_mlp="shared",
        ),
        Inputs(4, 128, text_width=2048, pooled_width=1280, control=SIX),
        (checkpoint(2567.5, 1024),),
        77,
    ),
    Published(
        "sd1.5",
        UNet(channels=320, multipliers=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), heads=8, text_embed="none"),
        Inputs(4, 64, text_width=768),
        (checkpoint(859.52),),
        77,
    ),
)

EDM2S = (
    edm2("XXS", 31_309_029),
    edm2("XS", 124_713_253, 46),
    edm2("S", 280_212_837, 102),
    edm2("M", 497_807_781, 181),
    edm2("L", 777_498_085, 282),
    edm2("XL", 1_119_283_749, 406),
    edm2("XXL", 1_523_164_773, 552, 545.50),
)

LADDER = (
    ladder("A", 295_902_724, 110.4, "exact"),
    ladder("B", 291_757_828, 100.4, "exact"),
    ladder("C", 277.8e6, 100.3),
    ladder("D", 277.8e6, 101.2),
    ladder("E", 277.8e6, 101.2),
    ladder("F", 280.2e6, 102.1),
    ladder("G", 280.2e6, 102.2),
)

PUBLISHED: tuple[Published, ...] = (*EDM2S, *LADDER, *TABLE_A1, *CHECKPOINTS)
