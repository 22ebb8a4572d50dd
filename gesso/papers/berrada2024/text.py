"""Tables and figures of Berrada et al. 2024 on the padding of text: Table 3, Figures A3, A4."""

from collections.abc import Callable, Iterable

from gesso.papers.berrada2024.common_settings import (
    CC12M_VAL,
    COCO,
    DIGITS,
    SHAPES_SMALL,
    UNGUIDED,
    column_group,
    shapes_training_small,
    word_training,
)
from gesso.papers.berrada2024.paper_scale import cc12m, rows_of
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, Method, Row, Scale, Settings, Table, Training

NOISES = ("0.02", "0.05", "0.1", "0.2")
PADDINGS: dict[str, Settings] = {  # by row, as the recipe table-3's cells
    "zero": ("semantic.padding=zero",),
    "replicate": ("semantic.padding=replicate",),
    "noisy, 0.02": (),
    **{f"noisy, {noise}": (f"semantic.padding_noise={noise}",) for noise in NOISES[1:]},
}
THREE_SEEDS = ("zero", "replicate", "noisy, 0.02")


def training_of_padding(made: Callable[..., Training], rows: Iterable[str] = tuple(PADDINGS)) -> dict[str, Training]:
    return {row: made(*PADDINGS[row]) for row in rows}


def paper_training(*said: str) -> Training:
    return cc12m("berrada", 256, *said)


def table_3() -> Table:
    digits, drawn = {"FID": "fd_digits", "CLIP": "class_accuracy"}, {"FID": "fd_shapes", "CLIP": "place"}
    read = "Digits by word, captions of 1, 3 and 6 words in 16 tokens, unguided. CLIP: the share read as what they were to be."
    stand = "Shapes by caption. CLIP: the share whose shapes stand where the caption says."
    best = "noisy, 0.02"
    return Table(
        name="berrada/3",
        title="Padding of text",
        source="Berrada et al. 2024, Table 3",
        columns=(Column("FID"), Column("CLIP", lower_is_better=False)),
        rows=rows_of("table-3", PADDINGS),
        scales={
            "tiny": Scale((column_group(digits, training_of_padding(word_training), (*DIGITS, *UNGUIDED)),), "2 minutes", read),
            "small": Scale((column_group(drawn, training_of_padding(shapes_training_small), SHAPES_SMALL),), "an hour", stand),
            "paper": Scale(
                (
                    column_group({"FID": "fid"}, training_of_padding(paper_training), CC12M_VAL, "berrada"),
                    column_group({"CLIP": "clip"}, training_of_padding(paper_training), COCO, "berrada-coco"),
                ),
                "a week on 16 A100",
            ),
        },
        claims=(
            Claim("Noisy copies in the padding lower FID", claims.improves_on((best, "FID"), ("zero", "FID"))),
            Claim("Noisy copies in the padding raise CLIP", claims.improves_on((best, "CLIP"), ("zero", "CLIP"))),
            Claim("Copies alone are better than zeros",
                  claims.all_of(claims.improves_on(("replicate", "FID"), ("zero", "FID")), claims.improves_on(("replicate", "CLIP"), ("zero", "CLIP")))),
            Claim("A little noise is better than none",
                  claims.all_of(claims.improves_on((best, "FID"), ("replicate", "FID")), claims.improves_on((best, "CLIP"), ("replicate", "CLIP")))),
            Claim("A little noise is better than much", claims.improves_on((best, "FID"), ("noisy, 0.2", "FID"))),
        ),
        notes="Noise is a factor on the standard deviation of each channel; the paper calls it a variance, and Eq. 7 leaves it out. "
        "Crops of .9 to 1 are our choice.",
    )  # fmt: skip


def padding_figure(
    number: str, title: str, columns: dict[str, str], method: Method, claims: tuple[Claim, ...], notes: str
) -> Table:
    """What networks do with the tokens after the caption, by the padding that they were trained with."""

    def scale(made: Callable[..., Training], cost: str) -> Scale:
        return Scale((column_group(columns, training_of_padding(made, THREE_SEEDS), method=method),), cost)

    return Table(
        name=f"berrada/fig{number}",
        title=title,
        source=f"Berrada et al. 2024, Figure {number}",
        columns=tuple(Column(name, lower_is_better=None) for name in columns),
        rows=tuple(Row(row) for row in THREE_SEEDS),
        scales={
            "tiny": scale(word_training, "2 minutes"),
            "small": scale(shapes_training_small, "an hour"),
            "paper": scale(paper_training, "a week on 16 A100"),
        },
        claims=claims,
        notes=notes,
    )


def figure_a3() -> Table:
    share = "gradient at padding"
    return padding_figure(
        "A3",
        "Gradients at padding tokens",
        {share: "padding_share"},
        "gradients",
        (
            Claim(
                "With zeros more than a tenth of the gradient is on padding", claims.greater_than(("zero", share), 0.1)
            ),
        ),
        "A picture of one prompt in the paper. Here the share of the gradient's norm that falls behind the end of captions, of the "
        "trainings of Table 3. The paper says that the output depends on padding; a tenth is our choice.",
    )


def figure_a4() -> Table:
    share, alike = "attention on padding", "alike"
    return padding_figure(
        "A4",
        "Attention under three paddings",
        {share: "padding_share", "entropy": "entropy", alike: "alike"},
        "attention",
        (
            Claim(
                "With zeros more than a tenth of the attention is on padding", claims.greater_than(("zero", share), 0.1)
            ),
        ),
        "Pictures in the paper, which speaks of a significant part; a tenth is our choice. Of the attention of images to text, of the "
        "trainings of Table 3; alike: the cosine of tokens and their copies, which without noise is 1 and with noise less, by construction: no claim.",
    )


TABLES = (table_3, figure_a3, figure_a4)
