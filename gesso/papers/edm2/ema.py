"""Figures of Karras et al. 2024 on EMA lengths: 4, 5a to 5c, 6, 11b, 13, 14, 24, and a claim of Section 4."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial

from gesso.papers.edm2.setups import (
    LADDER_COST,
    ONE_TRAINING_COST,
    PAPER_SETUP,
    SIGMA_RELS,
    TRAINING_COST,
    TRAINING_FRACTIONS,
    Setup,
    at_ema,
    at_fraction,
    format_percent,
    fraction_rows,
    make_scales,
    resolve_training,
    with_settings,
)
from gesso.papers.edm2.tables import CONFIG_NAMES
from gesso.published.edm2 import DINO_512, FID_512, FIGURE_5B_LAYERS
from gesso.recipes.edm2 import LADDER_CONFIGS
from gesso.reproduce.claims import all_of, improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Table, Training


def measure_at_ema(training: Training, sigma_rel: float) -> Measurement:
    """Return the measurement of a training at an EMA length."""
    return Measurement(training, at_ema(sigma_rel))


def shorter_optimum(text: str, column: str, than: str) -> Claim:
    """Return the claim that the best EMA length of a curve is shorter than that of another."""
    return Claim(text, lambda v: v.optimum(column) < v.optimum(than))


def best_improvement(text: str, column: str, baseline: str) -> Claim:
    """Return the claim that the best row of a column is better than that of another column."""
    return Claim(text, lambda v: v.best_improves(column, baseline))


def figure_5a() -> Table:
    """Return Figure 5a."""

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        return tuple(
            setup.metric_group(
                {name: setup.metric},
                {format_percent(s): setup.at_ema(config, s) for s in setup.sigma_rels_of(config)},
            )
            for config, name in CONFIG_NAMES.items()
        )

    published = {
        (CONFIG_NAMES[config], LADDER_CONFIGS[config].sigma_rel): LADDER_CONFIGS[config].fid for config in "ABG"
    }
    return Table(
        name="edm2/fig5a",
        title="FID over EMA length",
        source="Karras et al. 2024, Figure 5a",
        columns=tuple(map(Column, CONFIG_NAMES.values())),
        rows=fraction_rows(sorted({*SIGMA_RELS, *PAPER_SETUP.sigma_rels_of("A")}), published),
        x_axis="EMA length",
        scales=make_scales(groups, LADDER_COST),
        claims=(
            shorter_optimum("The best EMA length of B is shorter than that of G", "CONFIG B", "CONFIG G"),
            Claim("The optimum of G is narrower than that of B", lambda v: v.is_narrower("CONFIG G", than="CONFIG B")),
            Claim("The best EMA length of G lies inside the sweep", lambda v: v.optimum_inside("CONFIG G")),
        ),
        notes="Published: the points of the text. A has one point at paper scale, its traditional EMA of about 3.4 %.",
    )


ALL_TENSORS = "one length for all"
TINY_LAYERS = (
    "enc-64x64-block0-affine",
    "enc-64x64-block0-conv0",
    "enc-64x64-block0-conv1",
    "enc-64x64-conv",
    "enc-32x32-block0-conv0",
    "enc-32x32-block0-skip",
    "dec-32x32-block0-conv1",
    "dec-32x32-block0-skip",
    "dec-64x64-block0-conv1",
    "dec-64x64-block0-skip",
    "dec-64x64-up-affine",
    "map-label",
    "map-layer0",
)
"""Layers of Figure 5b that a network of two levels with one block has."""


def figure_5b() -> Table:
    """Return Figure 5b."""

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        layers = FIGURE_5B_LAYERS if setup is PAPER_SETUP else TINY_LAYERS
        result = []
        for config, best in setup.optimal_sigma_rels.items():
            column = {CONFIG_NAMES[config]: setup.metric}
            result.append(setup.metric_group(column, {ALL_TENSORS: setup.at_ema(config, best)}))
            for sigma_rel in (s for s in setup.sigma_rels if s != best):
                rows = {
                    layer: Measurement(setup.configs[config], (*at_ema(best), f"tensor={layer}={sigma_rel:g}"))
                    for layer in layers
                }
                result.append(setup.metric_group(column, rows, select_min=True)._replace(method="tensors"))
        return tuple(result)

    published = {CONFIG_NAMES[config]: LADDER_CONFIGS[config].fid for config in PAPER_SETUP.optimal_sigma_rels}
    return Table(
        name="edm2/fig5b",
        title="One weight at a separate EMA length",
        source="Karras et al. 2024, Figure 5b, layers of Appendix D.6",
        columns=tuple(Column(CONFIG_NAMES[config]) for config in PAPER_SETUP.optimal_sigma_rels),
        rows=(Row(ALL_TENSORS, published), *map(Row, FIGURE_5B_LAYERS)),
        scales=make_scales(
            groups, ONE_TRAINING_COST, {"tiny": "The digits; networks of two levels have 13 of the layers."}
        ),
        claims=(
            Claim(
                "A separate length of one weight helps CONFIG B more than G",
                lambda v: v.improves_more("CONFIG B", than="CONFIG G", base=ALL_TENSORS),
            ),
        ),
        notes="Each row: the best of the lengths of one weight, with all other weights at the best common length. The "
        "paper: up to 10 % for B, nothing significant for G. One of the thirty lines of D.6 occurs twice and one names "
        "no layer.",
    )


def figure_5c() -> Table:
    """Return Figure 5c."""
    names = {fraction: f"after {format_percent(fraction)}" for fraction in TRAINING_FRACTIONS}

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        training = setup.configs["G"]

        def at(fraction: Fraction) -> Callable[[float], Measurement]:
            nimg = at_fraction(training, fraction)
            return lambda sigma_rel: Measurement(training, (*at_ema(sigma_rel), *nimg))

        return setup.ema_sweep({name: at(fraction) for fraction, name in names.items()})

    first, last = names[TRAINING_FRACTIONS[0]], names[TRAINING_FRACTIONS[-1]]
    return Table(
        name="edm2/fig5c",
        title="FID over EMA length during training, CONFIG G",
        source="Karras et al. 2024, Figure 5c",
        columns=tuple(map(Column, names.values())),
        rows=fraction_rows(SIGMA_RELS, {(last, LADDER_CONFIGS["G"].sigma_rel): LADDER_CONFIGS["G"].fid}),
        x_axis="EMA length",
        scales=make_scales(groups, ONE_TRAINING_COST),
        claims=(
            shorter_optimum("The best EMA length, relative to training, rises with training", first, last),
            best_improvement("FID falls with training", last, first),
        ),
        notes="The text does not give the times of the figure: quarters are our choice.",
    )


def figure_6() -> Table:
    """Return Figure 6."""
    names = {w: f"guidance {w:g}" for w in PAPER_SETUP.guidances}

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        network = setup.sizes["S"]
        return setup.ema_sweep({names[w]: partial(setup.measure_guided, network, guidance=w) for w in setup.guidances})

    published = {(names[best.guidance], best.sigma_rel): best.distance for best in FID_512["S"]}
    return Table(
        name="edm2/fig6",
        title="EMA length and guidance, EDM2-S",
        source="Karras et al. 2024, Figure 6",
        columns=tuple(map(Column, names.values())),
        rows=fraction_rows(SIGMA_RELS, published),
        x_axis="EMA length",
        scales=make_scales(groups, ONE_TRAINING_COST),
        claims=(
            shorter_optimum("The more guidance, the shorter the best EMA length", "guidance 1.4", "guidance 1"),
            best_improvement("Guidance of 1.4 helps", "guidance 1.4", "guidance 1"),
            best_improvement("Guidance of 1.9 is too much for FID", "guidance 1.4", "guidance 1.9"),
        ),
        notes="Guided by EDM2-XS without labels, at the same EMA length. Published: the two points of Table 6.",
    )


def figure_11b() -> Table:
    """Return Figures 11b and 11c."""
    metrics = {"IS": ("is", False), "KID": ("kid", True), "Recall": ("recall", False)}
    configs = ("B", "G")

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        return tuple(
            setup.metric_group(
                {f"{name}, CONFIG {config}": value for name, (value, _) in metrics.items()},
                {format_percent(s): setup.at_ema(config, s) for s in setup.sigma_rels},
            )._replace(settings=("eval.metrics=is,kid,pr",))
            for config in configs
        )

    return Table(
        name="edm2/fig11b",
        title="Other metrics over EMA length",
        source="Karras et al. 2024, Figures 11b and 11c",
        columns=tuple(
            Column(f"{name}, CONFIG {config}", lower_is_better)
            for name, (_, lower_is_better) in metrics.items()
            for config in configs
        ),
        rows=fraction_rows(SIGMA_RELS),
        x_axis="EMA length",
        scales=make_scales(groups, {"paper": "hours of 8 A100 after the training"}),
        claims=tuple(
            best_improvement(f"{name} too is better for G than for B", f"{name}, CONFIG G", f"{name}, CONFIG B")
            for name in metrics
        ),
        notes="Needs Inception's weights. The text does not say which two of the three metrics the figure shows; the "
        "two CONFIGS are our choice.",
    )


EDM2_S_T_REF = 70_000
T_REFS = (30_000, 45_000, EDM2_S_T_REF, 110_000, 160_000)
"""Learning-rate decays in steps; the paper's text has the first, the third and the last."""
FIXED_SIGMA_REL = 0.13
"""EMA length at which the decays are compared (A.4)."""


def with_decay(training: Training, t_ref: int, lr_multiplier: float = 1.0) -> Training:
    """Return a training with its decay and learning rate changed in proportion to those of EDM2-S."""
    optim = resolve_training(training).optim
    ref_images = round(optim.ref_images * t_ref / EDM2_S_T_REF)
    decay = () if t_ref == EDM2_S_T_REF else (f"optim.ref_images={ref_images}",)
    lr = () if lr_multiplier == 1 else (f"optim.lr={optim.lr * lr_multiplier:g}",)
    return with_settings(training, *decay, *lr)


def figure_13() -> Table:
    """Return Figure 13."""
    names = {t_ref: f"t_ref {t_ref // 1000}k" for t_ref in T_REFS}
    columns = list(names.values())

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        setup = setup._replace(sigma_rels=tuple(sorted({*setup.sigma_rels, FIXED_SIGMA_REL})))
        return setup.ema_sweep({names[t]: partial(measure_at_ema, with_decay(setup.sizes["S"], t)) for t in T_REFS})

    best = FID_512["S"][0]
    return Table(
        name="edm2/fig13",
        title="EMA length and decay of the learning rate, EDM2-S",
        source="Karras et al. 2024, Figure 13",
        columns=tuple(map(Column, columns)),
        rows=fraction_rows(SIGMA_RELS, {(names[EDM2_S_T_REF], best.sigma_rel): best.distance}),
        x_axis="EMA length",
        scales=make_scales(groups, TRAINING_COST),
        claims=(
            Claim(
                "Each at its best EMA length, every decay is within 10 % of the best",
                lambda v: all_of(v.best(a) < v.best(b) * (1 + 0.10) for a in columns for b in columns if a != b),
            ),
            Claim(
                "At one fixed EMA length decays differ more",
                lambda v: v.spreads_less(columns, format_percent(FIXED_SIGMA_REL)),
            ),
            shorter_optimum("The later the decay, the shorter the best EMA length", names[160_000], names[30_000]),
        ),
        notes="Decays besides 30k, 70k and 160k are our choice; below paper scale in proportion to the recipe's. The "
        "fixed length is the paper's, 13 %.",
    )


def figure_14() -> Table:
    """Return Figure 14."""
    curves = {"CONFIG B": ("B", 1.0), "CONFIG G": ("G", 1.0), "guidance 1.4": ("G", 1.4), "guidance 1.9": ("G", 1.9)}

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        return tuple(
            setup.metric_group(
                {f"FID, {name}": setup.metric, f"FD, {name}": setup.second_metric},
                {format_percent(s): setup.measure_guided(setup.configs[config], s, w) for s in setup.sigma_rels},
            )
            for name, (config, w) in curves.items()
        )

    fid, dino, b = FID_512["S"], DINO_512["S"], LADDER_CONFIGS["B"]
    published = {
        ("FID, CONFIG B", b.sigma_rel): b.fid,
        ("FID, CONFIG G", fid[0].sigma_rel): fid[0].distance,
        ("FD, CONFIG G", dino[0].sigma_rel): dino[0].distance,
        ("FID, guidance 1.4", fid[1].sigma_rel): fid[1].distance,
        ("FD, guidance 1.9", dino[1].sigma_rel): dino[1].distance,
    }
    return Table(
        name="edm2/fig14",
        title="FID and FD over EMA length, EDM2-S",
        source="Karras et al. 2024, Figure 14",
        columns=tuple(Column(f"{metric}, {name}") for metric in ("FID", "FD") for name in curves),
        rows=fraction_rows(SIGMA_RELS, published),
        x_axis="EMA length",
        scales=make_scales(
            groups,
            ONE_TRAINING_COST,
            {"tiny": "The digits; FD is the share of samples that a classifier does not assign to their class."},
        ),
        claims=(
            shorter_optimum("FD prefers longer EMA than FID", "FID, CONFIG G", "FD, CONFIG G"),
            shorter_optimum("FD prefers longer EMA than FID with guidance", "FID, guidance 1.4", "FD, guidance 1.4"),
            best_improvement("FID prefers the weaker guidance", "FID, guidance 1.4", "FID, guidance 1.9"),
            best_improvement("FD prefers the stronger guidance", "FD, guidance 1.9", "FD, guidance 1.4"),
            best_improvement("CONFIG G is better than B by FD too", "FD, CONFIG G", "FD, CONFIG B"),
        ),
        notes="FD: Frechet distance of DINOv2's features. Published: the points of Tables 1 and 6.",
    )


def figure_4() -> Table:
    """Return Figure 4."""
    curves = {
        f"{stored}, {format_percent(target)}": (sigma_rels, target)
        for target in (0.07, 0.15)
        for stored, sigma_rels in (("two EMAs", ".05,.1"), ("one EMA", ".1"))
    }
    counts = (8, 16, 32, 64, 128, 256)
    groups = tuple(
        ColumnGroup(
            {name: "error"},
            {str(n): Measurement(settings=(f"snapshots={n}",)) for n in counts},
            method="reconstruction",
            settings=(f"sigma_rels={sigma_rels}", f"target={target:g}"),
        )
        for name, (sigma_rels, target) in curves.items()
    )
    return Table(
        name="edm2/fig4",
        title="Error of a post-hoc EMA, by the number of snapshots",
        source="Karras et al. 2024, Figure 4",
        columns=tuple(map(Column, curves)),
        rows=tuple(Row(str(n), x=n) for n in counts),
        x_axis="snapshots",
        scales={"tiny": Scale(groups, "a second", "No training: the least squares of Appendix C.5.")},
        claims=(
            *(
                power_law_claim(f"With two EMAs in a snapshot the error falls as 1/n^4: to {target}", target)
                for target in ("7 %", "15 %")
            ),
            improvement("One EMA in a snapshot is much worse", ("32", "two EMAs, 15 %"), ("32", "one EMA, 15 %")),
        ),
        notes="Squared error of the profile divided by its square; EMA lengths of 5 and 10 % are stored, or 10 % "
        "alone. The figure shows 8 snapshots.",
    )


def power_law_claim(text: str, target: str) -> Claim:
    """Return a claim of Figure 4 on the power law of the error, within .4 in the exponent."""
    return Claim(text, lambda v: v.power_law(f"two EMAs, {target}", -4, 0.4))


def figure_24() -> Table:
    """Return Figure 24."""
    sigma_rels, times = (0.05, 0.10, 0.15, 0.20, 0.25), tuple(k / 20 for k in range(21))
    names = {sigma_rel: f"sigma_rel {format_percent(sigma_rel)}" for sigma_rel in sigma_rels}
    groups = tuple(
        ColumnGroup(
            {name: "response"},
            {format_percent(time): Measurement(settings=(f"time={time:g}",)) for time in times},
            method="responses",
            settings=(f"sigma_rel={sigma_rel:g}",),
        )
        for sigma_rel, name in names.items()
    )
    short, long = names[sigma_rels[0]], names[sigma_rels[-1]]
    return Table(
        name="edm2/fig24",
        title="Weight of each time in an EMA",
        source="Karras et al. 2024, Figure 24",
        columns=tuple(Column(name, None) for name in names.values()),
        rows=fraction_rows(times),
        x_axis="share of the training",
        scales={"tiny": Scale(groups, "a second", "No training: Equation 121.")},
        claims=(
            Claim("A longer EMA has more weight half-way", lambda v: v["50 %", long] > v["50 %", short]),
            Claim("A longer EMA has less weight at the end", lambda v: v["100 %", long] < v["100 %", short]),
        ),
        notes="Density in units of the training time. The text does not give the lengths of the figure.",
    )


RATE_VARIANTS = {
    "half the rate": (0.5, 70_000), "as EDM2-S": (1.0, 70_000), "twice the rate": (2.0, 70_000),
    "decay from 30k": (1.0, 30_000), "decay from 160k": (1.0, 160_000),
}  # fmt: skip
"""Multiplier of the learning rate and t_ref, by curve."""


def learning_rates() -> Table:
    """Return the claim of Section 4 that the best EMA length goes as 1 / (alpha_ref^2 t_ref)."""
    strength = {name: rate**2 * t_ref / EDM2_S_T_REF for name, (rate, t_ref) in RATE_VARIANTS.items()}

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        columns: dict[str, Callable[[float], Measurement]] = {
            name: partial(measure_at_ema, with_decay(setup.sizes["S"], t_ref, rate))
            for name, (rate, t_ref) in RATE_VARIANTS.items()
        }
        return setup.ema_sweep(columns)

    best = FID_512["S"][0]
    return Table(
        name="edm2/rates",
        title="EMA length and learning rate, EDM2-S",
        source="Karras et al. 2024, Section 4, Post-hoc EMA observations",
        columns=tuple(map(Column, RATE_VARIANTS)),
        rows=fraction_rows(SIGMA_RELS, {("as EDM2-S", best.sigma_rel): best.distance}),
        x_axis="EMA length",
        scales=make_scales(groups, TRAINING_COST),
        claims=(
            shorter_optimum(
                "The higher the learning rate, the shorter the best EMA length", "twice the rate", "half the rate"
            ),
            shorter_optimum(
                "The later the decay, the shorter the best EMA length", "decay from 160k", "decay from 30k"
            ),
            Claim(
                "The best EMA length goes about as 1 / (alpha_ref^2 t_ref)",
                lambda v: v.optimum_follows(strength, -1, 0.5),
            ),
        ),
        notes="The paper gives no numbers; factors are our choice. About: an exponent of -1.5 to -.5.",
    )


TABLES: tuple[Callable[[], Table], ...] = (
    figure_4,
    figure_5a,
    figure_5b,
    figure_5c,
    figure_6,
    figure_11b,
    figure_13,
    figure_14,
    figure_24,
    learning_rates,
)
