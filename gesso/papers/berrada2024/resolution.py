"""Table 4c and Figures 8 and A1 of Berrada et al. 2024: training at a higher resolution after a lower one."""

from collections.abc import Mapping

from gesso.papers.berrada2024.common_settings import (
    DIT_S,
    GLOBAL_CROPS,
    IMAGENET_VAL,
    LOCAL_CROPS,
    MIXED_CROPS,
    SMALL_SCHEDULE,
    SMALL_SHAPES_METRICS,
    SMALL_TRANSFORMER,
    SMALL_UNET,
    SMALL_UNET_NET,
    TINY_SHAPES_FD,
    TINY_SHAPES_METRICS,
    UNGUIDED,
    column_group,
    total_images,
)
from gesso.papers.berrada2024.paper_scale import SNAPSHOTS_EVERY_10K, cc12m_training, in1k_training, published_rows
from gesso.published import read_table
from gesso.recipes.imagenet import TABLE_SETTINGS
from gesso.reproduce.claims import Statement, TableValues, all_of, improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Settings, Table, Training

# Tiny scale: shapes of one kind at 32x32 after 16x16; the noise levels of the recipe are tuned at 32.
TINY_TRANSFORMER = (
    "data.source=shapes-class:5000",
    "net.hidden_size=96",
    "net.depth=3",
    "net.num_heads=3",
    "train.batch_size=32",
    "train.snapshot_every=200",
    "train.checkpoint_every=20k",
)
TINY_UNET = (
    "data.source=shapes-class:5000",
    "net.name=unet",
    "net.channels=16",
    "net.channel_mult=1,2,2",
    "net.num_blocks=1",
    "net.transformer_depth=0,1,1",
    "net.channels_per_head=16",
    "net.norm_num_groups=8",
    "train.batch_size=32",
    "train.snapshot_every=1k",
    "train.checkpoint_every=20k",
)
TINY_MMDIT = (*TINY_TRANSFORMER, "net.name=mmdit")
AT_16 = ("data.resolution=16", "process.resolution_scale=.5")
# Small scale: 64x64 after 32x32.
TRANSFORMER_AT_32, UNET_AT_32 = (*DIT_S, *SMALL_SCHEDULE), (*SMALL_UNET_NET, *SMALL_SCHEDULE)
KEEP_NOISE_LEVELS = ("init.noise_levels=keep",)


def tiny_transfer(settings: Settings, images: str, crops: Settings = (), init_settings: Settings = ()) -> Training:
    """Return a training at 32x32 that starts from 40k images at 16x16."""
    low = Training("shapes-class", (*settings, *AT_16, *crops, *total_images("40k"), "train.snapshot_every=4k"))
    return Training("shapes-class", (*settings, *total_images(images), *init_settings), low)


def small_transfer(settings: Settings, images: str, crops: Settings = (), init_settings: Settings = ()) -> Training:
    """Return a training at 64x64 that starts from one at 32x32.

    The settings are those at 32x32; init= scales the noise levels.
    """
    low = Training("shapes-class", (*settings, *crops))
    high = (*settings, "data.resolution=64", *total_images(images), "train.snapshot_every=10k", *init_settings)
    return Training("shapes-class", high, low)


def table_4c() -> Table:
    """Return Table 4c."""
    in1k = read_table("berrada2024", "table_1")
    transferred = {"UNet, 750k, then 250k": "unet", "mmDiT, 350k, then 150k": "mmdit"}
    rows = (
        *published_rows("table_4c"),
        *(Row(row, {"FID": in1k[net]["FID, ImageNet 512"]}) for row, net in transferred.items()),
    )

    def by_row(*trainings: Training) -> dict[str, Training]:
        return dict(zip((row.name for row in rows), trainings, strict=True))

    tiny = by_row(
        Training("shapes-class", (*TINY_UNET, *total_images("15k"))),
        Training("shapes-class", (*TINY_MMDIT, *total_images("15k"))),
        tiny_transfer(TINY_UNET, "5k", init_settings=KEEP_NOISE_LEVELS),
        tiny_transfer(TINY_MMDIT, "5k", init_settings=KEEP_NOISE_LEVELS),
    )
    small = by_row(
        Training("shapes-class", (*SMALL_UNET, *total_images("500k"))),
        Training("shapes-class", (*SMALL_TRANSFORMER, "net.name=mmdit", *total_images("500k"))),
        small_transfer(UNET_AT_32, "150k", init_settings=KEEP_NOISE_LEVELS),
        small_transfer((*TRANSFORMER_AT_32, "net.name=mmdit"), "150k", init_settings=KEEP_NOISE_LEVELS),
    )
    paper = by_row(
        *(Training("table-4c", TABLE_SETTINGS["table-4c"][row.name]) for row in rows[:2]),
        *(in1k_training(net, 512) for net in transferred.values()),
    )
    return Table(
        name="berrada/4c",
        title="Pre-training at half the resolution",
        source="Berrada et al. 2024, Table 4c",
        columns=(Column("FID"),),
        rows=rows,
        scales={
            "tiny": Scale(
                (column_group({"FID": "fd_shapes"}, tiny, (*TINY_SHAPES_METRICS, *UNGUIDED)),),
                "2 to 5 minutes",
                "Shapes by class: 15k images at 32x32, or 40k at 16x16 and 5k at 32x32, about the paper's proportion.",
            ),
            "small": Scale(
                (column_group({"FID": "fd_shapes"}, small, (*SMALL_SHAPES_METRICS, *UNGUIDED)),),
                "an hour",
                "Shapes by class: 500k images at 64x64, or 2M at 32x32 and 150k at 64x64.",
            ),
            "paper": Scale((column_group({"FID": "fid"}, paper, protocol="berrada"),), "2 to 6 days on 16 A100"),
        },
        claims=tuple(
            improvement(
                f"Pre-training at half the resolution is better: {pretrained.partition(',')[0]}",
                (pretrained, "FID"),
                (scratch, "FID"),
            )
            for scratch, pretrained in zip(("UNet, 1000k", "mmDiT, 500k"), transferred, strict=True)
        ),
        notes="The numbers of steps are equal, those of images are not: a batch has 2048 images at 256 and 384 at 512. "
        "Noise levels are not rescaled, as in Table 1.",
    )


BERRADA_BEST, EXTRAPOLATED, NOISE_NOT_RESCALED = "all improvements", "positions extrapolated", "noise not rescaled"
INTERPOLATED = "positions interpolated"
AFTER_FULL_CROPS, AFTER_MIXED_CROPS = "crops of .9 to 1", "crops of .4 to 1"
VARIANTS: dict[str, tuple[Settings, Settings]] = {
    BERRADA_BEST: (LOCAL_CROPS, ()),
    EXTRAPOLATED: (LOCAL_CROPS, ("init.pos_embed=extrapolated",)),
    INTERPOLATED: (LOCAL_CROPS, ("net.pos_embed=interpolated",)),
    NOISE_NOT_RESCALED: (LOCAL_CROPS, KEEP_NOISE_LEVELS),
    AFTER_FULL_CROPS: (GLOBAL_CROPS, ()),
    AFTER_MIXED_CROPS: (MIXED_CROPS, ()),
}
"""Crops of the pre-training and settings of the training at 512, by curve of Figure 8."""
KSTEPS = (10, 40, 50, 130)
"""Thousands of steps at 512."""
BEFORE = "before, at 256"


def figure_8_groups(
    trainings: Mapping[str, Training],
    images_per_kstep: int,
    metric: str,
    settings: tuple[Settings, Settings],
    protocol: str | None = None,
) -> tuple[ColumnGroup, ...]:
    """Return the points of Figure 8: each pre-training, and a curve over steps for each training.

    Args:
        trainings: training by curve.
        images_per_kstep: images of a thousand steps.
        metric: the measured value.
        settings: settings of the measurements of the pre-training and of the curves.
        protocol: evaluation protocol.
    """
    before, after = settings
    pretrained = (BERRADA_BEST, AFTER_FULL_CROPS, AFTER_MIXED_CROPS)  # one curve of each pre-training
    parents = {curve: parent for curve in pretrained if (parent := trainings[curve].parent)}
    rows: dict[str, Settings] = {f"{k}k": (f"eval.nimg={k * images_per_kstep}",) for k in KSTEPS}
    return (
        *(column_group({curve: metric}, {BEFORE: parent}, before, protocol) for curve, parent in parents.items()),
        *(
            ColumnGroup(
                {curve: metric},
                {row: Measurement(training, nimg) for row, nimg in rows.items()},
                settings=after,
                protocol=protocol,
            )
            for curve, training in trainings.items()
        ),
    )


def paper_variant(crops: Settings, init_settings: Settings) -> Training:
    """Return the last row of Table 1 on ImageNet-1k at 512, after crops at 256."""
    scale = ("process.resolution_scale=1",) if init_settings == KEEP_NOISE_LEVELS else ()
    pretraining = Training("in1k-256-berrada", crops)
    return Training("in1k-512-berrada", (*SNAPSHOTS_EVERY_10K, *scale, *init_settings), pretraining)


def figure_8() -> Table:
    """Return Figure 8."""
    tiny = {curve: tiny_transfer(TINY_TRANSFORMER, "5200", *variant) for curve, variant in VARIANTS.items()}
    small = {curve: small_transfer(TRANSFORMER_AT_32, "130k", *variant) for curve, variant in VARIANTS.items()}
    paper = {curve: paper_variant(*variant) for curve, variant in VARIANTS.items()}
    tiny_settings = ((*TINY_SHAPES_FD, *UNGUIDED), (*TINY_SHAPES_METRICS, *UNGUIDED))
    small_settings = (*SMALL_SHAPES_METRICS, *UNGUIDED)
    return Table(
        name="berrada/fig8",
        title="Positions, noise levels and crops when training at 512",
        source="Berrada et al. 2024, Figure 8",
        columns=tuple(map(Column, VARIANTS)),
        rows=(*published_rows("figure_8"), *(Row(f"{k}k", x=k) for k in KSTEPS)),
        x_axis="thousands of steps at 512",
        scales={
            "tiny": Scale(
                figure_8_groups(tiny, 40, "fd_shapes", tiny_settings),
                "2 minutes",
                "Shapes by class: 40k images at 16x16, then 32x32, where 40 images stand for a thousand steps.",
            ),
            "small": Scale(
                figure_8_groups(small, 1000, "fd_shapes", (small_settings, small_settings)),
                "an hour",
                "Shapes by class: 2M images at 32x32, then 64x64, where a thousand images stand for a thousand steps.",
            ),
            "paper": Scale(
                figure_8_groups(paper, 384_000, "fid", (IMAGENET_VAL, IMAGENET_VAL), "berrada-val"),
                "a week on 16 A100",
            ),
        },
        claims=(
            improvement(
                "Resampled positions are better than extrapolated ones", ("130k", BERRADA_BEST), ("130k", EXTRAPOLATED)
            ),
            improvement(
                "Rescaled noise is better than the noise levels of 256",
                ("40k", BERRADA_BEST),
                ("40k", NOISE_NOT_RESCALED),
            ),
            improvement(
                "Local crops in pre-training are better than full images",
                ("50k", BERRADA_BEST),
                ("50k", AFTER_FULL_CROPS),
            ),
            Claim(
                "At 256 full images are best",
                lambda v: all_of(
                    v[BEFORE, AFTER_FULL_CROPS] < v[BEFORE, curve] for curve in (BERRADA_BEST, AFTER_MIXED_CROPS)
                ),
            ),
        ),
        notes="The paper plots the curves without numbers. Section 3.4 has 2.36, 245.55 and 2.21 at 256 for local, "
        "global and mixed crops, and says in the same sentence that local crops fail and full images are best there: "
        "the numbers are assigned accordingly. Bicubically interpolated positions are in Section 2.2 and Figure 4, but "
        "not among the paper's curves: an additional curve.",
    )


TIMES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def equation_3(v: TableValues) -> Statement:
    """State that the signal at twice the resolution is that of Eq. 3, up to rounding."""
    pairs = [(v[f"t = {t:g}", "s = 1"], v[f"t = {t:g}", "s = 2"]) for t in TIMES]
    return all_of(abs(high - low / (4 - 3 * low)) < 1e-9 for low, high in pairs)


def figure_a1() -> Table:
    """Return Figure A1."""
    scales: dict[str, Settings] = {"s = 1": (), "s = 2": ("process.resolution_scale=2",)}

    def group(name: str, settings: Settings) -> ColumnGroup:
        rows = {f"t = {t:g}": Measurement(cc12m_training("berrada", 256), (f"t={t:g}", *settings)) for t in TIMES}
        return ColumnGroup({name: "alpha_bar"}, rows, method="noise_levels")

    return Table(
        name="berrada/figA1",
        title="Noise levels at twice the resolution",
        source="Berrada et al. 2024, Figure A1",
        columns=tuple(Column(name, lower_is_better=None) for name in scales),
        rows=tuple(Row(f"t = {t:g}", x=t) for t in TIMES),
        x_axis="t",
        scales={
            "paper": Scale(
                tuple(group(name, settings) for name, settings in scales.items()),
                "seconds",
                "Computed, not trained: the share of the signal's variance.",
            )
        },
        claims=(
            Claim(
                "At twice the resolution there is more noise at every time",
                lambda v: all_of(v[f"t = {t:g}", "s = 2"] < v[f"t = {t:g}", "s = 1"] for t in TIMES),
            ),
            Claim("Eq. 3 holds", equation_3),
        ),
    )


TABLES = (table_4c, figure_8, figure_a1)
