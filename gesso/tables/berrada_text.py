"""Tables and figures of Berrada et al. 2024 on the padding of text: Table 3, Figures A3, A4."""

from collections.abc import Callable, Iterable

from gesso.tables import claims
from gesso.tables.paper import cc12m, rows_of
from gesso.tables.settings import CC12M_VAL, COCO, DIGITS, SHAPES_SMALL, UNGUIDED, part, shapes_small, words
from gesso.tables.table import By, Claim, Column, Row, Scale, Settings, Table, Training

NOISES = ("0.02", "0.05", "0.1", "0.2")
PADDINGS: dict[str, Settings] = {  # by row, as the recipe table-3's cells
    "zero": ("semantic.padding=zero",),
    "replicate": ("semantic.padding=replicate",),
    "noisy, 0.02": (),
    **{f"noisy, {noise}": (f"semantic.noise={noise}",) for noise in NOISES[1:]},
}
THREE = ("zero", "replicate", "noisy, 0.02")


def trained(made: Callable[..., Training], rows: Iterable[str] = tuple(PADDINGS)) -> dict[str, Training]:
    return {row: made(*PADDINGS[row]) for row in rows}


def full(*said: str) -> Training:
    return cc12m("ours", 256, *said)


def table_3() -> Table:
    digits, drawn = {"FID": "fd_digits", "CLIP": "class_agreement"}, {"FID": "fd_shapes", "CLIP": "place"}
    read = "Digits by word, captions of 1, 3 and 6 words in 16 tokens, unguided. CLIP: the share read as what they were to be."
    stand = "Shapes by caption. CLIP: the share whose shapes stand where the caption says."
    best = "noisy, 0.02"
    return Table(
        name="berrada/3",
        title="Padding of text",
        source="Berrada et al. 2024, Table 3",
        columns=(Column("FID"), Column("CLIP", lower=False)),
        rows=rows_of("table-3", PADDINGS),
        scales={
            "tiny": Scale((part(digits, trained(words), (*DIGITS, *UNGUIDED)),), "2 minutes", read),
            "small": Scale((part(drawn, trained(shapes_small), SHAPES_SMALL),), "an hour", stand),
            "paper": Scale(
                (
                    part({"FID": "fid"}, trained(full), CC12M_VAL, "berrada"),
                    part({"CLIP": "clip"}, trained(full), COCO, "berrada-coco"),
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


def at_padding(
    number: str, title: str, columns: dict[str, str], by: By, claims: tuple[Claim, ...], notes: str
) -> Table:
    """What networks do with the tokens after the caption, by the padding that they were trained with."""

    def scale(made: Callable[..., Training], cost: str) -> Scale:
        return Scale((part(columns, trained(made, THREE), by=by),), cost)

    return Table(
        name=f"berrada/fig{number}",
        title=title,
        source=f"Berrada et al. 2024, Figure {number}",
        columns=tuple(Column(name, lower=None) for name in columns),
        rows=tuple(Row(row) for row in THREE),
        scales={
            "tiny": scale(words, "2 minutes"),
            "small": scale(shapes_small, "an hour"),
            "paper": scale(full, "a week on 16 A100"),
        },
        claims=claims,
        notes=notes,
    )


def figure_a3() -> Table:
    share = "gradient at padding"
    return at_padding(
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
    return at_padding(
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
