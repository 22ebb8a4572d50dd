"""Tables of our own: the question that EDM2 leaves open, and both papers on one network."""

from collections.abc import Callable

from gesso.papers.berrada2024.common_settings import AT_64, DIGITS, LARGE, MIXED_RESOLUTION, SHAPES_SMALL
from gesso.papers.edm2.setups import TINY_LENGTHS, at_ema
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Settings, Table, Training

MP, PLAIN, CONV, ADALN = "mp-mmDiT++", "mmDiT++", "EDM2", "DiT"
# Images at which the multiply-accumulates of all trainings are equal.
SMALL_IMAGES = {MP: 3_000_000, PLAIN: 3_000_000, CONV: 2_775_000, ADALN: 3_000_000}
SHAPES = (
    *AT_64,
    "train.batch_size=256",
    "train.precision=bfloat16",
    "train.checkpoint_every=500k",
    "optim.warmup_images=50k",
)
TOKENS = (*LARGE, "net.patch_size=4")
WIDE_TRANSFORMER = {
    MP: ("net.name=mp-mmdit++", *TOKENS, "optim.lr=1e-2"),
    PLAIN: (*TOKENS, "optim.lr=5e-4"),
    CONV: (
        "net.name=edm2",
        "net.channels=64",
        "net.num_blocks=1",
        "net.channels_per_head=32",
        "optim.lr=1e-2",
        "loss.reduction=sum",
    ),
    ADALN: ("net.name=dit", *TOKENS, "optim.lr=5e-4"),
}
RECIPES = {MP: "digits-mp-mmdit++", PLAIN: "digits", CONV: "digits-edm2", ADALN: "digits-dit"}


FASHION_RECIPES = {MP: "fashion-mp-mmdit++", PLAIN: "fashion", ADALN: "fashion-dit"}
FASHION_LR = {MP: "1e-2", PLAIN: "1e-3", ADALN: "1e-3"}
"""Best of five learning rates by held-out loss (docs/results/sweep-*.md)."""
FASHION_SIGMA_RELS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)


def equal_compute(images: int) -> Settings:
    """Return settings shared by all networks: 20 snapshots and a learning rate that falls after a fifth of the training."""
    return (
        f"train.total_images={images}", f"train.snapshot_every={images // 20}", f"optim.ref_images={images // 5}",
        "loss.weighting=uncertainty",
    )  # fmt: skip


def table_equal() -> Table:
    tiny = {row: Training(recipe, (f"optim.lr={FASHION_LR[row]}",)) for row, recipe in FASHION_RECIPES.items()}
    small = {
        row: Training("shapes-class", (*SHAPES, *WIDE_TRANSFORMER[row], *equal_compute(n)))
        for row, n in SMALL_IMAGES.items()
    }

    def metric_groups(
        trainings: dict[str, Training], columns: dict[str, str], settings: Settings, sigma_rels: tuple[float, ...]
    ) -> tuple[ColumnGroup, ...]:
        return tuple(
            ColumnGroup(
                columns,
                {row: Measurement(t, at_ema(sigma_rel)) for row, t in trainings.items()},
                settings=(*settings, "sample.guidance=1"),
                best="least" if len(sigma_rels) > 1 else None,
            )
            for sigma_rel in sigma_rels
        )

    def count_group(trainings: dict[str, Training]) -> ColumnGroup:
        costs = {"Mparams": "params", "Gflops": "gmacs", "Training, Zflops": "training"}
        return ColumnGroup(costs, {row: Measurement(t) for row, t in trainings.items()}, method="counts")

    fashion_samples = ("eval.metrics=fd_fashion,class_accuracy", "eval.num_samples=2000")
    return Table(
        name="gesso/equal",
        title="A magnitude-preserving transformer compared with others, at equal compute",
        source="gesso",
        columns=(Column("held-out loss"), Column("FD"), Column("errors"), *(Column(name, None) for name in ("Mparams", "Gflops", "Training, Zflops"))),
        rows=tuple(Row(row) for row in RECIPES),
        scales={
            "tiny": Scale((*metric_groups(tiny, {"held-out loss": "loss"}, ("eval.metrics=loss",), FASHION_SIGMA_RELS),
                           *metric_groups(tiny, {"FD": "fd_fashion", "errors": "1-class_accuracy"}, fashion_samples, (0.1,)), count_group(tiny)), "4 minutes",
                          "Fashion-MNIST; held-out loss on 10,000 test images; FD is the Frechet distance in features of a classifier of clothes, "
                          "errors the share of samples that it does not assign to their class. EDM2's U-Net costs 12 times as much per image there."),
            "small": Scale((*metric_groups(small, {"FD": "fd_shapes", "errors": "1-all"}, SHAPES_SMALL, TINY_LENGTHS[1:]), count_group(small)), "an hour",
                           "Drawn shapes at 64x64; FD is the Frechet distance in features of shapes, errors what is not one shape of its class."),
        },
        claims=(
            Claim("Magnitude-preserving layers help mmDiT++", claims.improves_on((MP, "held-out loss"), (PLAIN, "held-out loss"))),
            Claim("The magnitude-preserving mmDiT++ is better than DiT", claims.improves_on((MP, "held-out loss"), (ADALN, "held-out loss"))),
            Claim("mmDiT++ is better than DiT", claims.improves_on((PLAIN, "held-out loss"), (ADALN, "held-out loss"))),
            Claim("The magnitude-preserving mmDiT++ is better than EDM2's U-Net", claims.improves_on((MP, "FD"), (CONV, "FD"))),
        ),
        notes="Section 5 of Karras et al. 2024 asks whether its methods serve other architectures. Equal multiply-accumulates in "
        "training, learned uncertainty and learning-rate decay in all, a searched learning rate for each; without guidance, each at its best EMA length.",
    )  # fmt: skip


# At 8x8 the paper's alpha = 8 lets the size in too late to be of use (berrada/2a).
ALPHA = ("control.alpha=4",)
BOTH: dict[str, Settings] = {
    "neither": ("control.variables=[]",),
    "control": ALPHA,
    "uncertainty": ("control.variables=[]", "loss.weighting=uncertainty"),
    "post-hoc EMA": ("control.variables=[]",),
    "all": (*ALPHA, "loss.weighting=uncertainty"),
}
FIXED = 0.1
"""EMA length where it is not chosen afterwards"""


def table_both() -> Table:
    columns = {"FID": "fd_digits", "errors": "1-class_accuracy"}
    trained = {row: Training("digits", (*MIXED_RESOLUTION, *said)) for row, said in BOTH.items()}
    afterwards = ("post-hoc EMA", "all")
    fixed = {row: Measurement(t, at_ema(FIXED)) for row, t in trained.items() if row not in afterwards}
    swept = tuple(
        ColumnGroup(
            columns,
            {row: Measurement(trained[row], at_ema(length)) for row in afterwards},
            settings=DIGITS,
            best="least",
        )
        for length in TINY_LENGTHS
    )
    return Table(
        name="gesso/both",
        title="Both papers on one network",
        source="gesso",
        columns=(Column("FID"), Column("errors")),
        rows=tuple(Row(row) for row in BOTH),
        scales={
            "tiny": Scale((ColumnGroup(columns, fixed, settings=DIGITS), *swept), "2 minutes",
                          "Digits of which every second was shrunk to 4x4; FID is the Frechet distance in digit features."),
        },
        claims=(
            *(Claim(f"{row[0].upper()}{row[1:]} alone helps", claims.improves_on((row, "FID"), ("neither", "FID"))) for row in list(BOTH)[1:3]),
            # The best of several lengths is never worse than one of them: only a gain of some size is a claim.
            Claim("Post-hoc EMA alone lowers FID by more than a tenth", claims.improves_by(("post-hoc EMA", "FID"), ("neither", "FID"), 0.1)),
            Claim("All three together are best", claims.is_best("all", "FID")),
        ),
        notes="mmDiT++ with Berrada's disentangled control, EDM2's learned uncertainty and EDM2's averages of any length, each alone "
        "and all; without the last the EMA length is 10 %. The best of six lengths is chosen on the score itself.",
    )  # fmt: skip


TABLES: tuple[Callable[[], Table], ...] = (table_equal, table_both)
