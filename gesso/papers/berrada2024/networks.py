"""Tables 1, A1, A4 and Figure A5 of Berrada et al. 2024: networks and complete recipes."""

from collections.abc import Mapping

from gesso.papers.berrada2024.common_settings import (
    CC12M_VAL,
    CLASS_SHARE_NOTE,
    COCO,
    DIGITS_METRICS,
    IMAGES_100K,
    POSITION_SHARE_NOTE,
    SMALL_SHAPES_METRICS,
    SMALL_TRANSFORMER,
    SMALL_UNET,
    TEXT_CONDITION,
    UNGUIDED,
    column_group,
    sample_group,
)
from gesso.papers.berrada2024.paper_scale import cc12m_training, in1k_training, published_rows
from gesso.published import read_table
from gesso.recipes.imagenet import CC12M_ROWS, CONTROL, IN1K_ROWS
from gesso.reproduce.claims import all_of, equals, improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Row, Scale, Settings, Table, Training

CLASS_COLUMNS = ("FID, ImageNet 256", "FID, ImageNet 512")
COLUMNS_256 = {"FID": "FID, CC12M 256", "CLIP": "CLIP, CC12M 256"}
COLUMNS_512 = {"FID": "FID, CC12M 512", "FID on COCO": "FID on COCO, CC12M 512", "CLIP": "CLIP, CC12M 512"}
TEXT_COLUMNS = tuple(
    Column(name, lower_is_better="CLIP" not in name) for name in (*COLUMNS_256.values(), *COLUMNS_512.values())
)
TEXT_NETWORKS = {"unet": "sdxl", **{net: net for net in CC12M_ROWS}, "berrada": "berrada"}
"""Name of the recipes on CC12M by row of Table 1."""


def text_groups(nets: Mapping[str, str]) -> tuple[ColumnGroup, ...]:
    """Return the five columns of CC12M; `nets` is the name of the recipes by row."""
    low, high = ({row: cc12m_training(net, size) for row, net in nets.items()} for size in (256, 512))
    coco_512 = {COLUMNS_512["FID on COCO"]: "fid", COLUMNS_512["CLIP"]: "clip"}
    return (
        column_group({COLUMNS_256["FID"]: "fid"}, low, CC12M_VAL, "berrada"),
        column_group({COLUMNS_256["CLIP"]: "clip"}, low, COCO, "berrada-coco"),
        column_group({COLUMNS_512["FID"]: "fid"}, high, CC12M_VAL, "berrada"),
        column_group(coco_512, high, COCO, "berrada-coco"),
    )


def by_title(trainings: Mapping[str, Training]) -> dict[str, Training]:
    """Return the trainings of networks by row of Table 1."""
    return {IN1K_ROWS[net].title: training for net, training in trainings.items()}


def table_1_scales() -> dict[str, Scale]:
    """Return the scales of Table 1."""
    fid, clip, unguided = COLUMNS_256["FID"], COLUMNS_256["CLIP"], (*DIGITS_METRICS, *UNGUIDED)
    classes = {
        net: Training("digits", IMAGES_100K) if net == "berrada" else Training(f"digits-{net}") for net in IN1K_ROWS
    }
    text: dict[str, Training] = {}
    for net in TEXT_NETWORKS:
        recipe, settings, _ = classes[net]
        padding = ("semantic.padding=noisy",) if net == "berrada" else ()
        text[net] = Training(recipe, (*settings, *TEXT_CONDITION, *padding))
    small: dict[str, Settings] = {net: (*SMALL_TRANSFORMER, f"net.name={net}") for net in IN1K_ROWS}
    small |= {"unet": SMALL_UNET, "berrada": SMALL_TRANSFORMER}
    small_class = {net: Training("shapes-class", settings) for net, settings in small.items()}
    small_text = {net: Training("shapes", small[net]) for net in TEXT_NETWORKS}
    return {
        "tiny": Scale(
            (
                column_group({CLASS_COLUMNS[0]: "fd_digits"}, by_title(classes), unguided),
                column_group({fid: "fd_digits", clip: "class_accuracy"}, by_title(text), unguided),
            ),
            "4 minutes",
            f"Digits by class and by caption, unguided, because guidance narrows their classes. {CLASS_SHARE_NOTE}",
        ),
        "small": Scale(
            (
                column_group({CLASS_COLUMNS[0]: "fd_shapes"}, by_title(small_class), SMALL_SHAPES_METRICS),
                column_group({fid: "fd_shapes", clip: "place"}, by_title(small_text), SMALL_SHAPES_METRICS),
            ),
            "two hours",
            f"Shapes by class and by caption. {POSITION_SHARE_NOTE}",
        ),
        "paper": Scale(
            (
                *(
                    column_group(
                        {column: "fid"},
                        by_title({net: in1k_training(net, size) for net in IN1K_ROWS}),
                        protocol="berrada",
                    )
                    for column, size in zip(CLASS_COLUMNS, (256, 512), strict=True)
                ),
                *text_groups({IN1K_ROWS[net].title: recipe for net, recipe in TEXT_NETWORKS.items()}),
            ),
            "three weeks on 16 A100",
        ),
    }


def table_1() -> Table:
    """Return Table 1."""
    published = read_table("berrada2024", "table_1")
    title = {net: row.title for net, row in IN1K_ROWS.items()}
    best, mmdit, fid, clip = title["berrada"], title["mmdit"], COLUMNS_256["FID"], COLUMNS_256["CLIP"]
    return Table(
        name="berrada/1",
        title="Networks under one setting, and the paper's network",
        source="Berrada et al. 2024, Table 1",
        columns=(*map(Column, CLASS_COLUMNS), *TEXT_COLUMNS),
        rows=tuple(Row(title[net], published[net]) for net in IN1K_ROWS),
        scales=table_1_scales(),
        claims=(
            *(
                improvement(f"The paper's network is better than mmDiT: {column}", (best, column), (mmdit, column))
                for column in (*CLASS_COLUMNS, fid, clip, COLUMNS_512["FID"])
            ),
            improvement(
                "With text, joint attention is better than cross-attention", (mmdit, fid), (title["pixart"], fid)
            ),
            improvement("With text, mmDiT has a lower FID than the U-Net", (mmdit, fid), (title["unet"], fid)),
            improvement(
                "A class in attention is better than in the norms",
                (title["dit-att"], CLASS_COLUMNS[0]),
                (title["dit"], CLASS_COLUMNS[0]),
            ),
        ),
        notes="The first block, numbers of other papers, is omitted. The introduction has FID 8.64 on CC12M at 512 "
        "where the table has 6.27. Control and pooled text are readings: UNet (SDXL) has control (Table A4), the "
        "others of the second block have none (Tables A3, A4), and no network has pooled text (the sizes of Table A1 "
        f"include none). The sizes of Table A1 include control in all but mDT: that reading is {' '.join(CONTROL)} "
        "added to a recipe; SD3's pooled text is net.pooled_mlp=separate.",
    )


TABLE_A1_RECIPES = {
    "UNet, text": "cc12m-{}-sdxl",
    "PixArt, text": "cc12m-{}-pixart",
    "mmDiT, text": "cc12m-{}-mmdit",
    "DiT w/ Att, text": "cc12m-{}-dit-att",
    "UNet, class": "in1k-{}-unet",
    "PixArt, class": "in1k-{}-pixart",
    "mmDiT, class": "in1k-{}-mmdit",
    "DiT w/ Att, class": "in1k-{}-dit-att",
    "mDT, class": "in1k-{}-mdt",
    "DiT, class": "in1k-{}-dit",
}


def table_a1() -> Table:
    """Return Table A1."""
    columns = ("FLOPs, 256", "FLOPs, 512", "parameters")

    def trainings(size: int) -> dict[str, Training]:
        control = {row: () if "mDT" in row else CONTROL for row in TABLE_A1_RECIPES}
        tokens = {row: ("semantic.max_tokens=256",) if row.endswith("text") else () for row in TABLE_A1_RECIPES}
        return {
            row: Training(recipe.format(size), (*control[row], *tokens[row]))
            for row, recipe in TABLE_A1_RECIPES.items()
        }

    published = read_table("berrada2024", "table_a1")
    checked = [row for row in TABLE_A1_RECIPES if row != "mmDiT, class"]
    classes = [row for row in checked if row.endswith("class")]
    return Table(
        name="berrada/A1",
        title="Parameters (10^6) and FLOPs (10^9) of an image",
        source="Berrada et al. 2024, Table A1",
        columns=tuple(Column(name, lower_is_better=None) for name in columns),
        rows=published_rows("table_a1"),
        scales={
            "paper": Scale(
                (
                    column_group({columns[0]: "gflops", columns[2]: "params"}, trainings(256), method="counts"),
                    column_group({columns[1]: "gflops"}, trainings(512), method="counts"),
                ),
                "seconds",
                "Counted, not trained; `gesso models` explains every cell.",
            )
        },
        claims=(
            Claim(
                "Parameters are those of the paper",
                lambda v: all_of(equals(v[row, "parameters"], published[row]["parameters"], 0.02) for row in checked),
            ),
            Claim(
                "FLOPs with classes are those of the paper",
                lambda v: all_of(
                    equals(v[row, column], published[row][column], 0.01) for row in classes for column in columns[:2]
                ),
            ),
        ),
        notes="The cell of mmDiT with classes repeats DiT's parameters and the FLOPs of DiT w/ Att, probably by "
        "mistake: not part of the claims. FLOPs count 256 text tokens, and most of those with text are not reproduced. "
        "Control is added to the recipes of Table 1 here: the published sizes include one MLP over six variables, and "
        "no pooled text.",
    )


def table_a4() -> Table:
    """Return Table A4."""
    nets, table_1_rows = {"SD-XL": "sdxl", "SD3": "sd3", "Berrada": "berrada"}, ("unet", "mmdit", "berrada")
    columns = [column.name for column in TEXT_COLUMNS]
    published = read_table("berrada2024", "table_1")
    digits = {row: Training(f"digits-{net}") for row, net in nets.items()}
    return Table(
        name="berrada/A4",
        title="Three recipes compared",
        source="Berrada et al. 2024, Tables A4 and 1",
        columns=TEXT_COLUMNS,
        rows=tuple(
            Row(row, {column: published[net][column] for column in columns})
            for row, net in zip(nets, table_1_rows, strict=True)
        ),
        scales={
            "tiny": Scale(
                (column_group({columns[0]: "fd_digits", columns[1]: "class_accuracy"}, digits, DIGITS_METRICS),),
                "2 minutes",
                "Digits of mixed resolution by caption, each recipe with its own process and guidance. "
                + CLASS_SHARE_NOTE,
            ),
            "paper": Scale(text_groups(nets), "two weeks on 16 A100"),
        },
        claims=tuple(is_best_claim("Berrada", column) for column in columns),
        notes="Numbers are those of Table 1. Table A4 pairs SD3's x = t x0 + (1-t) eps with v = eps - x0, of opposite "
        "signs, and its shift needs the denominator s' + (s - s') t.",
    )


def is_best_claim(row: str, column: str) -> Claim:
    """Return the claim that a row of Table A4 is the best of a column."""
    return Claim(f"The paper's recipe is the best: {column}", lambda v: v.is_best(row, column))


def figure_a5() -> Table:
    """Return Figure A5."""
    row = "mmDiT-XL/2 (Berrada)"
    ddim = ("sample.sampler=euler", "sample.steps=50", "sample.eta=0")
    settings = (*ddim, "sample.guidance=5", "sample.guidance_base_resolution=null")

    def scale(training: Training, num_samples: int, cost: str, notes: str = "", *more: str) -> Scale:
        group = sample_group({row: training}, (*settings, f"eval.num_samples={num_samples}", *more))
        return Scale((group,), cost, notes)

    return Table(
        name="berrada/figA5",
        title="Samples of the paper's network on ImageNet-1k at 512",
        source="Berrada et al. 2024, Figure A5",
        columns=(Column("samples", lower_is_better=None),),
        rows=(Row(row),),
        scales={
            "tiny": scale(Training("digits", IMAGES_100K), 100, "4 minutes", "Digits, a column for each class."),
            "small": scale(
                Training("shapes-class", SMALL_TRANSFORMER), 36, "two hours", "Shapes by class, a column for each."
            ),
            "paper": scale(in1k_training("berrada", 512), 24, "three weeks on 16 A100", "", "eval.labels=random"),
        },
        notes="50 steps of DDIM, guidance 5. The paper does not give its classes and seeds.",
    )


TABLES = (table_1, table_a1, table_a4, figure_a5)
