"""Tables and figures of Berrada et al. 2024 on going on at a higher resolution: Table 4c, Figures 8, A1."""

from gesso.papers.berrada2024.common_settings import (
    GLOBAL,
    IMAGENET_VAL,
    LARGE,
    LOCAL,
    LONG,
    MIX,
    SHAPES,
    SHAPES_FD,
    SHAPES_SMALL,
    SMALL,
    SMALL_UNET,
    UNET,
    UNGUIDED,
    column_group,
)
from gesso.papers.berrada2024.paper_scale import SNAPSHOTS_EVERY_10K, cc12m, in1k
from gesso.recipes.imagenet import IN1K_ROWS, TABLE_CELLS
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Settings, Table, Training


def total_images(images: str) -> Settings:
    return (f"train.total_images={images}",)


# Shapes of one kind, 32x32 from 16x16; the recipe's noise is tuned at 32.
SMALLER = ("data.source=shapes-class:5000", "net.hidden_size=96", "net.depth=3", "net.num_heads=3", "train.batch_size=32", "train.snapshot_every=200",
           "train.checkpoint_every=20k")  # fmt: skip
TINY_UNET = ("data.source=shapes-class:5000", "net.name=unet", "net.channels=16", "net.channel_mult=1,2,2", "net.num_blocks=1",
             "net.transformer_depth=0,1,1", "net.channels_per_head=16", "net.norm_num_groups=8", "train.batch_size=32", "train.snapshot_every=1k",
             "train.checkpoint_every=20k")  # fmt: skip
TINY_MMDIT = (*SMALLER, "net.name=mmdit")
AT_16 = ("data.resolution=16", "process.resolution_scale=.5")
AT_32, UNET_AT_32 = (*LARGE, *LONG), (*UNET, *LONG)
"""half of small scale's resolution"""
KEEP_NOISE = ("init.noise_levels=keep",)


def tiny_after(settings: Settings, images: str, crops: Settings = (), how: Settings = ()) -> Training:
    low = Training("shapes-class", (*settings, *AT_16, *crops, *total_images("40k"), "train.snapshot_every=4k"))
    return Training("shapes-class", (*settings, *total_images(images), *how), low)


def small_after(settings: Settings, images: str, crops: Settings = (), how: Settings = ()) -> Training:
    """settings: those at 32; at 64 noise is scaled by init."""
    low = Training("shapes-class", (*settings, *crops))
    return Training(
        "shapes-class", (*settings, "data.resolution=64", *total_images(images), "train.snapshot_every=10k", *how), low
    )


def table_4c() -> Table:
    mmdit, unet = TABLE_CELLS["table-4c"]
    published = {
        "UNet, 1000k": unet.published["fid"], "mmDiT, 500k": mmdit.published["fid"],
        "UNet, 750k, then 250k": IN1K_ROWS["unet"].published[1], "mmDiT, 350k, then 150k": IN1K_ROWS["mmdit"].published[1],
    }  # fmt: skip
    large_mmdit = (*AT_32, "net.name=mmdit")
    tiny = (
        Training("shapes-class", (*TINY_UNET, *total_images("15k"))), Training("shapes-class", (*TINY_MMDIT, *total_images("15k"))),
        tiny_after(TINY_UNET, "5k", how=KEEP_NOISE), tiny_after(TINY_MMDIT, "5k", how=KEEP_NOISE),
    )  # fmt: skip
    small = (
        Training("shapes-class", (*SMALL_UNET, *total_images("500k"))), Training("shapes-class", (*SMALL, "net.name=mmdit", *total_images("500k"))),
        small_after(UNET_AT_32, "150k", how=KEEP_NOISE), small_after(large_mmdit, "150k", how=KEEP_NOISE),
    )  # fmt: skip
    paper = (*(Training("table-4c", cell.settings) for cell in (unet, mmdit)), in1k("unet", 512), in1k("mmdit", 512))
    tiny, small, paper = (dict(zip(published, some, strict=True)) for some in (tiny, small, paper))
    return Table(
        name="berrada/4c",
        title="Pre-training at half the resolution",
        source="Berrada et al. 2024, Table 4c",
        columns=(Column("FID"),),
        rows=tuple(Row(row, {"FID": fid}) for row, fid in published.items()),
        scales={
            "tiny": Scale(
                (column_group({"FID": "fd_shapes"}, tiny, (*SHAPES, *UNGUIDED)),), "2 to 5 minutes",
                "Shapes by class: 15k at 32x32, or 40k at 16x16 and 5k at 32x32, about the paper's proportion in images.",
            ),
            "small": Scale(
                (column_group({"FID": "fd_shapes"}, small, (*SHAPES_SMALL, *UNGUIDED)),), "an hour",
                "Shapes by class: 500k at 64x64, or 2M at 32x32 and 150k at 64x64.",
            ),
            "paper": Scale((column_group({"FID": "fid"}, paper, protocol="berrada"),), "2 to 6 days on 16 A100"),
        },
        claims=tuple(
            Claim(f"Pre-training at half the resolution is better: {net}", claims.improves_on((after, "FID"), (nothing, "FID")))
            for net, nothing, after in (("UNet", "UNet, 1000k", "UNet, 750k, then 250k"), ("mmDiT", "mmDiT, 500k", "mmDiT, 350k, then 150k"))
        ),
        notes="Steps are equal and images are not: a batch is 2048 at 256 and 384 at 512. Noise levels are not rescaled, as in Table 1.",
    )  # fmt: skip


OURS, EXTRAPOLATED, NOISE_KEPT = "ours", "positions extrapolated", "noise kept"
INTERPOLATED = "positions interpolated"
WHOLE, MIXED = "crops of .9 to 1", "crops of .4 to 1"
VARIANTS: dict[str, tuple[Settings, Settings]] = {  # by curve: crops of the pre-training, how it goes on
    OURS: (LOCAL, ()),
    EXTRAPOLATED: (LOCAL, ("init.pos_embed=extrapolated",)),
    INTERPOLATED: (LOCAL, ("net.pos_embed=interpolated",)),
    NOISE_KEPT: (LOCAL, KEEP_NOISE),
    WHOLE: (GLOBAL, ()),
    MIXED: (MIX, ()),
}
THOUSANDS = (10, 40, 50, 130)
"""steps at 512"""


def groups_over_time(
    trained: dict[str, Training], images: int, score: str, measure: Settings, protocol: str | None = None
) -> tuple[ColumnGroup, ...]:
    """A curve for each training; images: that a thousand steps see."""
    at = {f"{k}k": (f"eval.nimg={k * images}",) for k in THOUSANDS}
    return tuple(
        ColumnGroup(
            {curve: score}, {row: Measurement(t, said) for row, said in at.items()}, settings=measure, protocol=protocol
        )
        for curve, t in trained.items()
    )


def paper_variant(crops: Settings, how: Settings) -> Training:
    """Table 1's last row on ImageNet-1k at 512, after crops, moved in some way."""
    scale = ("process.resolution_scale=1",) if how == KEEP_NOISE else ()
    return Training("in1k-512-berrada", (*SNAPSHOTS_EVERY_10K, *scale, *how), Training("in1k-256-berrada", crops))


def figure_8() -> Table:
    tiny = {curve: tiny_after(SMALLER, "5200", crops, how) for curve, (crops, how) in VARIANTS.items()}
    small = {curve: small_after(AT_32, "130k", crops, how) for curve, (crops, how) in VARIANTS.items()}
    paper = {curve: paper_variant(crops, how) for curve, (crops, how) in VARIANTS.items()}
    before = "before, at 256"

    def starts(
        trained: dict[str, Training], score: str, measure: Settings, protocol: str | None = None
    ) -> tuple[ColumnGroup, ...]:
        """Those that curves begin with, each once."""
        return tuple(
            column_group({curve: score}, {before: trained[curve].parent}, measure, protocol)
            for curve in (OURS, WHOLE, MIXED)
        )

    return Table(
        name="berrada/fig8",
        title="Positions, noise levels and crops on the way to 512",
        source="Berrada et al. 2024, Figure 8",
        columns=tuple(map(Column, VARIANTS)),
        rows=(Row(before, {WHOLE: 2.21, OURS: 245.55, MIXED: 2.36}), *(Row(f"{k}k", x=k) for k in THOUSANDS)),
        x="thousands of steps at 512",
        scales={
            "tiny": Scale(
                (*starts(tiny, "fd_shapes", (*SHAPES_FD, *UNGUIDED)), *groups_over_time(tiny, 40, "fd_shapes", (*SHAPES, *UNGUIDED))), "2 minutes",
                "Shapes by class: 40k at 16x16, then 32x32, where 40 images stand for a thousand steps.",
            ),
            "small": Scale(
                (*starts(small, "fd_shapes", (*SHAPES_SMALL, *UNGUIDED)), *groups_over_time(small, 1000, "fd_shapes", (*SHAPES_SMALL, *UNGUIDED))), "an hour",
                "Shapes by class: 2M at 32x32, then 64x64, where a thousand images stand for a thousand steps.",
            ),
            "paper": Scale(
                (
                    *starts(paper, "fid", IMAGENET_VAL, "berrada-val"),
                    *groups_over_time(paper, 384_000, "fid", IMAGENET_VAL, "berrada-val"),
                ),
                "a week on 16 A100",
            ),
        },
        claims=(
            Claim("Resampled positions are better than extrapolated ones", claims.improves_on(("130k", OURS), ("130k", EXTRAPOLATED))),
            Claim("Rescaled noise is better than that of 256", claims.improves_on(("40k", OURS), ("40k", NOISE_KEPT))),
            Claim("Local crops before are better than whole images", claims.improves_on(("50k", OURS), ("50k", WHOLE))),
            Claim("At 256 itself whole images are the best", claims.all_of(*(claims.improves_on((before, WHOLE), (before, other)) for other in (OURS, MIXED)))),
        ),
        notes="Curves are in a picture alone. Section 3.4 has 2.36, 245.55 and 2.21 at 256 for local, global and mixed crops, and says in the "
        "same breath that local crops fail and whole images are best there: read so here. Ours has all three improvements. "
        "Bicubically interpolated positions are in Section 2.2 and Figure 4, not among the paper's curves: our row.",
    )  # fmt: skip


TIMES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def figure_a1() -> Table:
    scales = {"s = 1": (), "s = 2": ("process.resolution_scale=2",)}

    def equation_3(seed: claims.Seed) -> claims.Tests:
        pairs = [(seed[f"t = {t:g}", "s = 1"], seed[f"t = {t:g}", "s = 2"]) for t in TIMES]
        error = max(abs(high - low / (4 - 3 * low)) for low, high in pairs)
        return claims.Tests(claims.Effect(1e-9 - error), claims.Effect(error - 1e-9))

    return Table(
        name="berrada/figA1",
        title="Noise levels at twice the resolution",
        source="Berrada et al. 2024, Figure A1",
        columns=tuple(Column(name, lower_is_better=None) for name in scales),
        rows=tuple(Row(f"t = {t:g}", x=t) for t in TIMES),
        x="t",
        scales={
            "paper": Scale(
                tuple(
                    ColumnGroup({name: "alpha_bar"}, {f"t = {t:g}": Measurement(cc12m("berrada", 256), (f"t={t:g}", *said)) for t in TIMES}, method="noise_levels")
                    for name, said in scales.items()
                ),
                "seconds",
                "Computed, not trained: the share of the signal's variance.",
            )
        },
        claims=(
            Claim("At twice the resolution there is more noise at every time",
                  claims.all_of(*(claims.improves_on((f"t = {t:g}", "s = 2"), (f"t = {t:g}", "s = 1")) for t in TIMES))),
            Claim("Eq. 3 holds", equation_3),
        ),
    )  # fmt: skip


TABLES = (table_4c, figure_8, figure_a1)
