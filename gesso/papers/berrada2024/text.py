"""Tables and figures of Berrada et al. 2024 on the padding of text: Table 3, Figures A3, A4."""

from collections.abc import Callable, Iterable

from gesso.papers.berrada2024.common_settings import (
    CC12M_VAL,
    CLASS_SHARE_NOTE,
    COCO,
    DIGITS_METRICS,
    POSITION_SHARE_NOTE,
    SMALL_SHAPES_METRICS,
    UNGUIDED,
    column_group,
    shapes_training_small,
    text_training,
)
from gesso.papers.berrada2024.paper_scale import cc12m_training, published_rows
from gesso.recipes.imagenet import TABLE_SETTINGS
from gesso.reproduce.claims import improvement
from gesso.reproduce.schema import Claim, Column, Method, Row, Scale, Table, Training

PADDINGS = TABLE_SETTINGS["table-3"]
THREE_PADDINGS = ("zero", "replicate", "noisy, 0.02")


def padding_trainings(
    make_training: Callable[..., Training], rows: Iterable[str] = tuple(PADDINGS)
) -> dict[str, Training]:
    """Return one training for each padding."""
    return {row: make_training(*PADDINGS[row]) for row in rows}


def paper_training(*settings: str) -> Training:
    """Return the training of Table 3 at paper scale."""
    return cc12m_training("berrada", 256, *settings)


def table_3() -> Table:
    """Return Table 3."""
    noisy = "noisy, 0.02"
    paper = padding_trainings(paper_training)
    return Table(
        name="berrada/3",
        title="Padding of text",
        source="Berrada et al. 2024, Table 3",
        columns=(Column("FID"), Column("CLIP", lower_is_better=False)),
        rows=published_rows("table_3"),
        scales={
            "tiny": Scale(
                (
                    column_group(
                        {"FID": "fd_digits", "CLIP": "class_accuracy"},
                        padding_trainings(text_training),
                        (*DIGITS_METRICS, *UNGUIDED),
                    ),
                ),
                "2 minutes",
                f"Digits by captions of 1, 3 and 6 words in 16 tokens, unguided. {CLASS_SHARE_NOTE}",
            ),
            "small": Scale(
                (
                    column_group(
                        {"FID": "fd_shapes", "CLIP": "place"},
                        padding_trainings(shapes_training_small),
                        SMALL_SHAPES_METRICS,
                    ),
                ),
                "an hour",
                f"Shapes by caption. {POSITION_SHARE_NOTE}",
            ),
            "paper": Scale(
                (
                    column_group({"FID": "fid"}, paper, CC12M_VAL, "berrada"),
                    column_group({"CLIP": "clip"}, paper, COCO, "berrada-coco"),
                ),
                "a week on 16 A100",
            ),
        },
        claims=(
            Claim("Noisy copies in the padding help by FID", lambda v: v[noisy, "FID"] < v["zero", "FID"]),
            Claim("Noisy copies in the padding help by CLIP", lambda v: v[noisy, "CLIP"] > v["zero", "CLIP"]),
            Claim(
                "Copies alone are better than zeros",
                lambda v: (v["replicate", "FID"] < v["zero", "FID"]) & (v["replicate", "CLIP"] > v["zero", "CLIP"]),
            ),
            Claim(
                "A little noise is better than none",
                lambda v: (v[noisy, "FID"] < v["replicate", "FID"]) & (v[noisy, "CLIP"] > v["replicate", "CLIP"]),
            ),
            improvement("A little noise is better than much", (noisy, "FID"), ("noisy, 0.2", "FID")),
        ),
        notes="Noise is a factor on the standard deviation of each channel; the paper calls it a variance, and Eq. 7 "
        "omits it. Crops of .9 to 1 are our choice.",
    )


def padding_figure(
    number: str, title: str, columns: dict[str, str], method: Method, table_claims: tuple[Claim, ...], notes: str
) -> Table:
    """Return a figure on the use of padding tokens, by the padding of training."""

    def scale(make_training: Callable[..., Training], cost: str) -> Scale:
        trainings = padding_trainings(make_training, THREE_PADDINGS)
        return Scale((column_group(columns, trainings, method=method),), cost)

    return Table(
        name=f"berrada/fig{number}",
        title=title,
        source=f"Berrada et al. 2024, Figure {number}",
        columns=tuple(Column(name, lower_is_better=None) for name in columns),
        rows=tuple(map(Row, THREE_PADDINGS)),
        scales={
            "tiny": scale(text_training, "2 minutes"),
            "small": scale(shapes_training_small, "an hour"),
            "paper": scale(paper_training, "a week on 16 A100"),
        },
        claims=table_claims,
        notes=notes,
    )


def figure_a3() -> Table:
    """Return Figure A3."""
    share = "gradient at padding"
    return padding_figure(
        "A3",
        "Gradients at padding tokens",
        {share: "padding_fraction"},
        "gradients",
        (Claim("With zeros more than a tenth of the gradient is on padding", lambda v: v["zero", share] > 0.1),),
        "The paper shows one prompt. Here: the share of the gradient's norm after the end of captions, for the "
        "trainings of Table 3. The paper says that the output depends on padding; a tenth is our choice.",
    )


def figure_a4() -> Table:
    """Return Figure A4."""
    share = "attention on padding"
    return padding_figure(
        "A4",
        "Attention under three paddings",
        {share: "padding_fraction", "entropy": "entropy", "copy similarity": "copy_similarity"},
        "attention",
        (Claim("With zeros more than a tenth of the attention is on padding", lambda v: v["zero", share] > 0.1),),
        "The paper shows images and speaks of a significant part; a tenth is our choice. Attention of image tokens to "
        "text tokens, for the trainings of Table 3. The cosine similarity of tokens and their copies is 1 without "
        "noise and smaller with noise by construction: no claim.",
    )


TABLES = (table_3, figure_a3, figure_a4)
