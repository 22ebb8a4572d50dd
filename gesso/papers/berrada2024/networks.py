"""Tables of Berrada et al. 2024 on networks and whole recipes: 1, A1, A4."""

from collections.abc import Mapping

from gesso.papers.berrada2024.common_settings import (
    CC12M_VAL,
    COCO,
    DIGITS,
    IMAGES_100K,
    SHAPES_SMALL,
    SMALL,
    SMALL_UNET,
    UNGUIDED,
    WORDS,
    column_group,
    size_group,
)
from gesso.papers.berrada2024.paper_scale import cc12m, in1k
from gesso.recipes.berrada import CC12M_RESULTS as PUBLISHED_CC12M
from gesso.recipes.imagenet import CC12M_ROWS as OTHER_TEXT
from gesso.recipes.imagenet import CONTROL, IN1K_ROWS
from gesso.reproduce import claims
from gesso.reproduce.schema import DIVERGED, Claim, Column, ColumnGroup, Row, Scale, Table, Training

CLASSES = ("FID, ImageNet 256", "FID, ImageNet 512")
AT_256 = {"FID": "FID, CC12M 256", "CLIP": "CLIP, CC12M 256"}
AT_512 = {"FID": "FID, CC12M 512", "FID on COCO": "FID on COCO, CC12M 512", "CLIP": "CLIP, CC12M 512"}
TEXT = tuple(Column(name, lower_is_better="CLIP" not in name) for name in (*AT_256.values(), *AT_512.values()))


def text_published(name: str) -> dict[str, float]:
    """CC12M's numbers of a column of Table A4."""
    columns = {256: AT_256, 512: AT_512}
    return {
        columns[size][k]: v for (n, size), numbers in PUBLISHED_CC12M.items() if n == name for k, v in numbers.items()
    }


def text_parts(rows: Mapping[str, str]) -> tuple[ColumnGroup, ...]:
    """CC12M's five columns, by row the name of the training."""
    low, high = ({row: cc12m(name, size) for row, name in rows.items()} for size in (256, 512))
    return (
        column_group({AT_256["FID"]: "fid"}, low, CC12M_VAL, "berrada"),
        column_group({AT_256["CLIP"]: "clip"}, low, COCO, "berrada-coco"),
        column_group({AT_512["FID"]: "fid"}, high, CC12M_VAL, "berrada"),
        column_group({AT_512["FID on COCO"]: "fid", AT_512["CLIP"]: "clip"}, high, COCO, "berrada-coco"),
    )


def published_1(net: str) -> dict[str, float]:
    at = zip(CLASSES, IN1K_ROWS[net].published, strict=True)
    numbers = {column: DIVERGED if value is None else value for column, value in at}
    named = {"unet": "sdxl", "mmdit": "sd3", "berrada": "berrada"}
    if net in named:
        return numbers | text_published(named[net])
    return numbers | (dict.fromkeys((column.name for column in TEXT), DIVERGED) if net in OTHER_TEXT else {})


WITH_TEXT = {"unet": "sdxl", **{net: net for net in OTHER_TEXT}, "berrada": "berrada"}
"""of Table 1's networks those that take words, and the trainings on CC12M"""


def table_1() -> Table:
    row = {net: IN1K_ROWS[net].title for net in IN1K_ROWS}
    classes = {
        net: Training("digits", IMAGES_100K) if net == "berrada" else Training(f"digits-{net}") for net in IN1K_ROWS
    }
    words = {
        net: Training(t.recipe, (*t.settings, *WORDS, *(("semantic.padding=noisy",) if net == "berrada" else ())))
        for net, t in classes.items()
        if net in WITH_TEXT
    }
    small = {
        net: SMALL_UNET if net == "unet" else SMALL if net == "berrada" else (*SMALL, f"net.name={net}")
        for net in IN1K_ROWS
    }
    first, fid, clip = CLASSES[0], AT_256["FID"], AT_256["CLIP"]
    ours, mmdit, unguided = row["berrada"], row["mmdit"], (*DIGITS, *UNGUIDED)

    def of(trained: Mapping[str, Training]) -> dict[str, Training]:
        return {row[net]: training for net, training in trained.items()}

    return Table(
        name="berrada/1",
        title="Networks under one setting, and ours",
        source="Berrada et al. 2024, Table 1",
        columns=(*map(Column, CLASSES), *TEXT),
        rows=tuple(Row(what, published_1(net)) for net, what in row.items()),
        scales={
            "tiny": Scale(
                (column_group({first: "fd_digits"}, of(classes), unguided), column_group({fid: "fd_digits", clip: "class_accuracy"}, of(words), unguided)),
                "4 minutes", "Digits by class and by word, unguided: guidance narrows their classes. CLIP: the share read as what they were to be.",
            ),
            "small": Scale(
                (
                    column_group({first: "fd_shapes"}, of({net: Training("shapes-class", said) for net, said in small.items()}), SHAPES_SMALL),
                    column_group({fid: "fd_shapes", clip: "place"}, of({net: Training("shapes", small[net]) for net in WITH_TEXT}), SHAPES_SMALL),
                ),
                "two hours", "Shapes by class and by caption. CLIP: the share whose shapes stand where the caption says.",
            ),
            "paper": Scale(
                (
                    column_group({CLASSES[0]: "fid"}, of({net: in1k(net, 256) for net in IN1K_ROWS}), protocol="berrada"),
                    column_group({CLASSES[1]: "fid"}, of({net: in1k(net, 512) for net in IN1K_ROWS}), protocol="berrada"),
                    *text_parts(of(WITH_TEXT)),
                ),
                "three weeks on 16 A100",
            ),
        },
        claims=(
            *(Claim(f"Ours is better than mmDiT: {c}", claims.improves_on((ours, c), (mmdit, c))) for c in (first, CLASSES[1], fid, clip, AT_512["FID"])),
            Claim("With words joint attention is better than cross-attention", claims.improves_on((mmdit, fid), (row["pixart"], fid))),
            Claim("With words mmDiT has a lower FID than the U-Net", claims.improves_on((mmdit, fid), (row["unet"], fid))),
            Claim("A class in attention is better than in the norms", claims.improves_on((row["dit-att"], first), (row["dit"], first))),
        ),
        notes="Its first block, numbers of other papers, is left out. The introduction has FID 8.64 on CC12M at 512 where the table has 6.27. "
        "Control and pooled text are readings: UNet (SDXL) has control (Table A4), the others of the second block have none (Tables A3, A4), and "
        "no network sees the pooled text (Table A1's sizes hold none). Table A1's sizes hold control in all but mDT: that other reading is "
        f"{' '.join(CONTROL)} over a recipe; SD3's pooled text is net.pooled_mlp=own.",
    )  # fmt: skip


SIZES = {  # Table A1: by row the recipe's end, FLOPs at 256 and 512 in 10^9, parameters in 10^6
    "UNet, words": ("cc12m-{}-sdxl", (189.78, 819.56, 864.31)),
    "PixArt, words": ("cc12m-{}-pixart", (314.68, 1140, 610.12)),
    "mmDiT, words": ("cc12m-{}-mmdit", (397.06, 1260, 791.64)),
    "DiT w/ Att, words": ("cc12m-{}-dit-att", (407.88, 1500, 940.49)),
    "UNet, classes": ("in1k-{}-unet", (95.38, 390, 401.75)),
    "PixArt, classes": ("in1k-{}-pixart", (275.14, 1200, 611.7)),
    "mmDiT, classes": ("in1k-{}-mmdit", (237.93, 1050, 679.09)),
    "DiT w/ Att, classes": ("in1k-{}-dit-att", (237.93, 1050, 792.44)),
    "mDT, classes": ("in1k-{}-mdt", (259.08, 1140, 748.07)),
    "DiT, classes": ("in1k-{}-dit", (237.4, 1050, 679.09)),
}  # fmt: skip


def table_a1() -> Table:
    columns = ("FLOPs, 256", "FLOPs, 512", "parameters")

    def trained(size: int) -> dict[str, Training]:
        told = {row: () if "mDT" in row else CONTROL for row in SIZES}
        tokens = {row: ("semantic.max_tokens=256",) if "words" in row else () for row in SIZES}
        return {row: Training(recipe.format(size), (*told[row], *tokens[row])) for row, (recipe, _) in SIZES.items()}

    copied = "mmDiT, classes"
    classes = [row for row in SIZES if "classes" in row and row != copied]
    return Table(
        name="berrada/A1",
        title="Parameters (10^6) and FLOPs (10^9) of an image",
        source="Berrada et al. 2024, Table A1",
        columns=tuple(Column(name, lower_is_better=None) for name in columns),
        rows=tuple(Row(row, dict(zip(columns, numbers, strict=True))) for row, (_, numbers) in SIZES.items()),
        scales={
            "paper": Scale(
                (
                    column_group({columns[0]: "gflops", columns[2]: "params"}, trained(256), method="counts"),
                    column_group({columns[1]: "gflops"}, trained(512), method="counts"),
                ),
                "seconds", "Counted, not trained; `gesso models` has every cell with what the two counts hold.",
            )
        },
        claims=(
            Claim("Parameters are those of the paper", claims.matches_published([(row, columns[2]) for row in SIZES if row != copied], 0.02)),
            Claim("FLOPs with classes are those of the paper", claims.matches_published([(row, c) for row in classes for c in columns[:2]], 0.01)),
        ),
        notes="The cell of mmDiT with classes repeats DiT's parameters and DiT w/ Att's FLOPs, likely by mistake: left out of the claims. "
        "FLOPs count 256 tokens of text, and of words most are not reproduced. Control is laid over Table 1's recipes here: its sizes hold "
        "one MLP over six variables, and no pooled text, as those recipes have it.",
    )  # fmt: skip


def table_a4() -> Table:
    rows = {"SD-XL": "sdxl", "SD3": "sd3", "Ours": "berrada"}
    columns, digits = (
        (*AT_256.values(), *AT_512.values()),
        {row: Training(f"digits-{name}") for row, name in rows.items()},
    )
    return Table(
        name="berrada/A4",
        title="Three recipes side by side",
        source="Berrada et al. 2024, Tables A4 and 1",
        columns=TEXT,
        rows=tuple(Row(row, text_published(name)) for row, name in rows.items()),
        scales={
            "tiny": Scale(
                (column_group({columns[0]: "fd_digits", columns[1]: "class_accuracy"}, digits, DIGITS),),
                "2 minutes", "Coarse digits by word, each recipe with its own process and guidance. CLIP: the share read as what they were to be.",
            ),
            "paper": Scale(text_parts(rows), "two weeks on 16 A100"),
        },
        claims=tuple(Claim(f"Ours is the best: {column}", claims.is_best("Ours", column)) for column in columns),
        notes="Numbers are those of Table 1. Table A4 pairs SD3's x = t x0 + (1-t) eps with v = eps - x0, of opposite signs, and its shift "
        "needs the denominator s' + (s - s') t.",
    )  # fmt: skip


def figure_a5() -> Table:
    row, ddim = "mmDiT-XL/2, ours", ("sample.sampler=euler", "sample.steps=50", "sample.eta=0")
    drawn = (*ddim, "sample.guidance=5", "sample.guidance_base_resolution=null")
    return Table(
        name="berrada/figA5",
        title="Samples of ours on ImageNet-1k at 512",
        source="Berrada et al. 2024, Figure A5",
        columns=(Column("samples", lower_is_better=None),),
        rows=(Row(row),),
        scales={
            "tiny": Scale((size_group({row: Training("digits", IMAGES_100K)}, (*drawn, "eval.num_samples=100")),), "4 minutes", "Digits, a column for each class."),
            "small": Scale(
                (size_group({row: Training("shapes-class", SMALL)}, (*drawn, "eval.num_samples=36")),),
                "two hours", "Shapes by class, a column for each.",
            ),
            "paper": Scale((size_group({row: in1k("berrada", 512)}, (*drawn, "eval.num_samples=24", "eval.labels=random")),), "three weeks on 16 A100"),
        },
        notes="50 steps of DDIM, guidance 5. Which classes and seeds the paper shows it does not say.",
    )  # fmt: skip


TABLES = (table_1, table_a1, table_a4, figure_a5)
