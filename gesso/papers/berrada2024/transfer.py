"""Tables of Berrada et al. 2024 on training on one data set after another: 4a, 4b."""

from gesso.papers.berrada2024.common_settings import (
    CC12M_VAL,
    COCO,
    DIGITS,
    IN22K,
    SHAPES_SMALL,
    SMALL,
    UNGUIDED,
    WORDS,
    column_group,
)
from gesso.papers.berrada2024.paper_scale import cc12m, in1k
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, Row, Scale, Settings, Table, Training

FINE_TUNE = ("train.snapshot_every=2k", "train.checkpoint_every=10k")
"""of short trainings on digits"""


def total_images(images: str) -> Settings:
    return (f"train.total_images={images}",)


def digits_training(images: str, after: Training | None = None) -> Training:
    """mmDiT on digits by word."""
    return Training("digits-mmdit", (*WORDS, *total_images(images), *FINE_TUNE), after)


def small_words(images: str, after: Training | None = None) -> Training:
    return Training("shapes", (*SMALL, "net.name=mmdit", *total_images(images)), after)


def small_classes(images: str) -> Training:
    return Training("shapes-class", (*SMALL, "net.name=mmdit", *total_images(images)))


def at_steps(recipe: str, thousands: int, after: Training | None = None) -> Training:
    """At full scale: so many steps of 2048 at 256, of 384 at 512."""
    batch = 384 if "-512-" in recipe else 2048
    return Training(recipe, total_images(f"{thousands * 1000 * batch}"), after)


TABLE_4A: dict[str, tuple[float, ...]] = {
    "IN22k (375k)": (5.80,),
    "IN1k, IN22k (80k)": (5.29,),
    "IN1k, IN22k (110k)": (4.67,),
    "CC12M (600k)": (7.54, 24.78),
    "IN1k, CC12M (60k)": (7.59, 25.09),
    "IN1k, CC12M (100k)": (7.27, 25.62),
    "IN1k, CC12M (120k)": (7.25, 25.69),
}


def table_4a() -> Table:
    images, text = list(TABLE_4A)[:3], list(TABLE_4A)[3:]
    few, many, full = Training("digits-mmdit"), small_classes("2M"), in1k("mmdit", 256)
    tiny = (digits_training("200k"), *(digits_training(n, few) for n in ("20k", "33k", "40k")))
    small = (small_words("2M"), *(small_words(n, many) for n in ("200k", "333k", "400k")))
    paper = (cc12m("mmdit", 256), *(at_steps("cc12m-256-mmdit", k, full) for k in (60, 100, 120)))
    larger = (Training("in22k-256-mmdit"), *(at_steps("in22k-256-mmdit", k, full) for k in (80, 110)))
    tiny, small, paper = (dict(zip(text, some, strict=True)) for some in (tiny, small, paper))
    return Table(
        name="berrada/4a",
        title="Pre-training on another data set",
        source="Berrada et al. 2024, Table 4a",
        columns=(Column("FID"), Column("CLIP", lower_is_better=False)),
        rows=tuple(Row(row, dict(zip(("FID", "CLIP"), numbers, strict=False))) for row, numbers in TABLE_4A.items()),
        scales={
            "tiny": Scale(
                (column_group({"FID": "fd_digits", "CLIP": "class_accuracy"}, tiny, (*DIGITS, *UNGUIDED)),), "1 to 3 minutes",
                "100k digits by class, then digits by word; a third of the paper's steps are thousands of images. CLIP: the share read as said.",
            ),
            "small": Scale(
                (column_group({"FID": "fd_shapes", "CLIP": "place"}, small, SHAPES_SMALL),), "half an hour",
                "Shapes by class, then by caption. CLIP: the share whose shapes stand where the caption says.",
            ),
            "paper": Scale(
                (
                    column_group({"FID": "fid"}, dict(zip(images, larger, strict=True)), IN22K, "berrada-in22k"),
                    column_group({"FID": "fid"}, paper, CC12M_VAL, "berrada"), column_group({"CLIP": "clip"}, paper, COCO, "berrada-coco"),
                ),
                "1 to 9 days on 16 A100",
            ),
        },
        claims=(
            Claim("Pre-trained, a sixth of the steps lowers FID", claims.improves_on((text[2], "FID"), (text[0], "FID"))),
            Claim("Pre-trained, a sixth of the steps raises CLIP", claims.improves_on((text[2], "CLIP"), (text[0], "CLIP"))),
            Claim("On ImageNet-22k it lowers FID in a fifth of the steps", claims.improves_on((images[1], "FID"), (images[0], "FID"))),
            Claim("More fine-tuning lowers FID further", claims.improves_on((text[3], "FID"), (text[1], "FID"))),
        ),
        notes="The network is Table 1's mmDiT, whose 7.54 stands here: our choice. The caption says 256, the text of ImageNet-22k and CC12M "
        "512; the caption is followed.",
    )  # fmt: skip


def table_4b() -> Table:
    """The last row is ours: what the paper's summary (Table A5) compares with."""
    early, late, nothing = "200k, then 150k", "300k, then 50k", "CC12M alone, 350k (our row)"
    published = {early: (5.80, 7.15, 25.79), late: (5.41, 7.79, 25.30), nothing: ()}
    before, fid, clip = "FID, ImageNet-22k", "FID, CC12M", "CLIP, CC12M"

    tiny = tuple(Training("digits-mmdit", (*total_images(n), *FINE_TUNE)) for n in ("40k", "60k"))
    small = small_classes("1.2M"), small_classes("1.8M")
    paper = at_steps("in22k-512-mmdit", 200), at_steps("in22k-512-mmdit", 300)
    tiny_text = digits_training("30k", tiny[0]), digits_training("10k", tiny[1]), digits_training("70k")
    small_text = small_words("900k", small[0]), small_words("300k", small[1]), small_words("2.1M")
    text = (
        *(at_steps("cc12m-512-mmdit", k, start) for k, start in zip((150, 50), paper, strict=True)),
        at_steps("cc12m-512-mmdit", 350),
    )
    tiny, tiny_text, small, small_text, paper, text = (
        dict(zip(published, some, strict=False)) for some in (tiny, tiny_text, small, small_text, paper, text)
    )
    unguided = (*DIGITS, *UNGUIDED)
    return Table(
        name="berrada/4b",
        title="How long to pre-train on as many other images",
        source="Berrada et al. 2024, Table 4b",
        columns=(Column(before), Column(fid), Column(clip, lower_is_better=False)),
        rows=tuple(Row(row, dict(zip((before, fid, clip), numbers, strict=False))) for row, numbers in published.items()),
        scales={
            "tiny": Scale(
                (column_group({before: "fd_digits"}, tiny, unguided), column_group({fid: "fd_digits", clip: "class_accuracy"}, tiny_text, unguided)),
                "2 minutes",
                "40k and 60k digits by class, then 30k and 10k by word. CLIP: the share read as said.",
            ),
            "small": Scale(
                (column_group({before: "fd_shapes"}, small, SHAPES_SMALL), column_group({fid: "fd_shapes", clip: "place"}, small_text, SHAPES_SMALL)),
                "an hour",
                "Shapes by class, then by caption. CLIP: the share whose shapes stand where the caption says.",
            ),
            "paper": Scale(
                (
                    column_group({before: "fid"}, paper, IN22K, "berrada-in22k"), column_group({fid: "fid"}, text, CC12M_VAL, "berrada"),
                    column_group({clip: "clip"}, text, COCO, "berrada-coco"),
                ),
                "3 days on 16 A100",
            ),
        },
        claims=(
            Claim("Most of the gain comes early: less pre-training and more fine-tuning is better",
                  claims.all_of(claims.improves_on((early, fid), (late, fid)), claims.improves_on((early, clip), (late, clip)))),
            Claim("Pre-training goes on to help its own data", claims.improves_on((late, before), (early, before))),
            Claim("Pre-training on as many other images helps at equal steps", claims.improves_on((early, fid), (nothing, fid))),
        ),
        notes="Pre-training is at 512, from nothing, of mmDiT: our reading; its 5.80 is that of 256 in Table 4a. The paper has no row of "
        "CC12M alone at equal steps, which its summary needs.",
    )  # fmt: skip


TABLES = (table_4a, table_4b)
