"""Figures of Karras et al. 2024 on the length of averages: 4, 5a to 5c, 6, 11b, 13, 14, 24, and a claim of Section 4."""

from collections.abc import Callable

from gesso.papers.edm2.setups import (  # fmt: skip
    LADDER_COST,
    ONE_COST,
    PAPER,
    SIGMA_RELS,
    TRAINING_FRACTIONS,
    Setup,
    at_ema,
    at_fraction,
    percent,
    resolve_training,
    rows_of,
    scales,
    sweep_ema,
    with_settings,
)
from gesso.recipes.edm2 import DINO_512, FID_512, FIGURE_5B, LADDER_CONFIGS
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Table, Training


def figure_5a() -> Table:
    names = {step: f"CONFIG {step}" for step in LADDER_CONFIGS}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return tuple(
            g.metric_group(
                {name: g.metric}, {percent(length): g.at_ema(step, length) for length in g.sigma_rels_of(step)}
            )
            for step, name in names.items()
        )

    known = {(names[step], LADDER_CONFIGS[step].sigma_rel): LADDER_CONFIGS[step].fid for step in "ABG"}
    return Table(
        name="edm2/fig5a",
        title="FID over EMA length",
        source="Karras et al. 2024, Figure 5a",
        columns=tuple(Column(name) for name in names.values()),
        rows=rows_of(SIGMA_RELS, known),
        x="EMA length",
        scales=scales(parts, LADDER_COST),
        claims=(
            Claim("The best length of B is shorter than that of G", claims.optimum_earlier("CONFIG B", "CONFIG G")),
            Claim("The optimum of G is narrower than that of B", claims.narrower("CONFIG G", "CONFIG B")),
            Claim("The best length of G lies inside what was swept", claims.optimum_inside("CONFIG G")),
        ),
        notes="Published: the points that the text tells. A has one at the paper's scale, its traditional average of about 3.4 %.",
    )


MARGIN = "all alike"
TINY_LAYERS = (
    "enc-64x64-block0-affine", "enc-64x64-block0-conv0", "enc-64x64-block0-conv1", "enc-64x64-conv",
    "enc-32x32-block0-conv0", "enc-32x32-block0-skip", "dec-32x32-block0-conv1", "dec-32x32-block0-skip",
    "dec-64x64-block0-conv1", "dec-64x64-block0-skip", "dec-64x64-up-affine", "map-label", "map-layer0",
)  # fmt: skip
"""those of Figure 5b that a network of two levels with one block has"""


def figure_5b() -> Table:
    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        layers, found = FIGURE_5B if g is PAPER else TINY_LAYERS, []
        for step, best in g.optima.items():
            column = {f"CONFIG {step}": g.metric}
            found.append(g.metric_group(column, {MARGIN: g.at_ema(step, best)}))
            for length in (length for length in g.sigma_rels if length != best):
                alone = {
                    layer: Measurement(g.configs[step], (*at_ema(best), f"tensor={layer}={length:g}"))
                    for layer in layers
                }
                found.append(g.metric_group(column, alone, best=True)._replace(method="tensors"))
        return tuple(found)

    known = {f"CONFIG {step}": LADDER_CONFIGS[step].fid for step in PAPER.optima}
    return Table(
        name="edm2/fig5b",
        title="One weight at its own EMA length",
        source="Karras et al. 2024, Figure 5b, layers of Appendix D.6",
        columns=tuple(Column(f"CONFIG {step}") for step in PAPER.optima),
        rows=(Row(MARGIN, known), *(Row(layer) for layer in FIGURE_5B)),
        scales=scales(parts, ONE_COST, {"tiny": "The digits; networks of two levels have 13 of the layers."}),
        claims=(
            Claim("A weight's own length helps CONFIG B more than G", claims.helps_more("CONFIG B", "CONFIG G", MARGIN)),
        ),
        notes="Each row: the best of its lengths while all other weights stay at the best common one. The paper: up to 10 % for B, "
        "nothing significant for G. Of the thirty lines of D.6 one stands twice and one names no layer.",
    )  # fmt: skip


def figure_5c() -> Table:
    names = {share: f"after {percent(share)}" for share in TRAINING_FRACTIONS}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        trained = g.configs["G"]
        how = {
            name: lambda length, share=share: Measurement(trained, (*at_ema(length), *at_fraction(trained, share)))
            for share, name in names.items()
        }
        return sweep_ema(g, how)

    first, last = names[TRAINING_FRACTIONS[0]], names[TRAINING_FRACTIONS[-1]]
    return Table(
        name="edm2/fig5c",
        title="FID over EMA length in the course of training, CONFIG G",
        source="Karras et al. 2024, Figure 5c",
        columns=tuple(Column(name) for name in names.values()),
        rows=rows_of(SIGMA_RELS, {(last, LADDER_CONFIGS["G"].sigma_rel): LADDER_CONFIGS["G"].fid}),
        x="EMA length",
        scales=scales(parts, ONE_COST),
        claims=(
            Claim("The best length, relative to training, rises with training", claims.optimum_earlier(first, last)),
            Claim("FID falls with training", claims.best_of(last, than=first)),
        ),
        notes="Which times the figure shows its text does not say: quarters are our choice.",
    )


def figure_6() -> Table:
    names = {w: f"guidance {w:g}" for w in PAPER.guidances}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        network = g.sizes["S"]
        return sweep_ema(g, {names[w]: lambda length, w=w: g.guided(network, length, w) for w in g.guidances})

    known = {(names[best.guidance], best.sigma_rel): best.distance for best in FID_512["S"]}
    return Table(
        name="edm2/fig6",
        title="EMA length and guidance, EDM2-S",
        source="Karras et al. 2024, Figure 6",
        columns=tuple(Column(name) for name in names.values()),
        rows=rows_of(SIGMA_RELS, known),
        x="EMA length",
        scales=scales(parts, ONE_COST),
        claims=(
            Claim("The more guidance, the shorter the best length", claims.optimum_earlier(names[1.4], names[1.0])),
            Claim("Guidance of 1.4 helps", claims.best_of(names[1.4], than=names[1.0])),
            Claim("Guidance of 1.9 is too much for FID", claims.best_of(names[1.4], than=names[1.9])),
        ),
        notes="Guided by EDM2-XS without labels, at the same length. Published: the two points of Table 6.",
    )


def figure_11b() -> Table:
    measures = {"IS": ("is", False), "KID": ("kid", True), "Recall": ("recall", False)}
    steps = ("B", "G")

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return tuple(
            g.metric_group(
                {f"{name}, CONFIG {step}": found for name, (found, _) in measures.items()},
                {percent(length): g.at_ema(step, length) for length in g.sigma_rels},
            )._replace(settings=("eval.metrics=is,kid,pr",))
            for step in steps
        )

    return Table(
        name="edm2/fig11b",
        title="Other metrics over EMA length",
        source="Karras et al. 2024, Figures 11b and 11c",
        columns=tuple(Column(f"{name}, CONFIG {step}", lower) for name, (_, lower) in measures.items() for step in steps),
        rows=rows_of(SIGMA_RELS),
        x="EMA length",
        scales=scales(parts, {"paper": "hours of 8 A100 once trained"}),
        claims=tuple(
            Claim(f"{name} too is better in G than in B", claims.best_of(f"{name}, CONFIG G", than=f"{name}, CONFIG B"))
            for name in measures
        ),
        notes="Needs Inception's weights. Which two of the three metrics the figure shows its text does not say; of the CONFIGS two "
        "are our choice.",
    )  # fmt: skip


T_REFS = (30_000, 45_000, 70_000, 110_000, 160_000)
"""decay in steps; the paper's text has the first, the third and the last"""
FIXED_LENGTH = 0.13
"""at which the decays are compared (A.4)"""


def decay_variants(trained: Training, t_ref: int, rate: float = 1.0) -> Training:
    """With a decay and a rate in proportion to EDM2-S's 70,000 and its own."""
    optim = resolve_training(trained).optim
    said = () if t_ref == 70_000 else (f"optim.ref_images={round(optim.ref_images * t_ref / 70_000)}",)
    return with_settings(trained, *said, *(() if rate == 1 else (f"optim.lr={optim.lr * rate:g}",)))


def figure_13() -> Table:
    names = {t_ref: f"t_ref {t_ref // 1000}k" for t_ref in T_REFS}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        trained = {t_ref: decay_variants(g.sizes["S"], t_ref) for t_ref in T_REFS}
        g = g._replace(sigma_rels=tuple(sorted({*g.sigma_rels, FIXED_LENGTH})))
        return sweep_ema(g, {names[t]: lambda length, t=t: Measurement(trained[t], at_ema(length)) for t in T_REFS})

    return Table(
        name="edm2/fig13",
        title="EMA length and decay of the learning rate, EDM2-S",
        source="Karras et al. 2024, Figure 13",
        columns=tuple(Column(name) for name in names.values()),
        rows=rows_of(SIGMA_RELS, {(names[70_000], FID_512["S"][0].sigma_rel): FID_512["S"][0].distance}),
        x="EMA length",
        scales=scales(parts, {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100"}),
        claims=(
            Claim("At its own best length every decay is within 10 % of the best", claims.bests_within(list(names.values()), 0.10)),
            Claim("At one fixed length decays differ more", claims.less_spread(list(names.values()), percent(FIXED_LENGTH))),
            Claim("The later the decay, the shorter the best length", claims.optimum_earlier(names[160_000], names[30_000])),
        ),
        notes="Decays beside 30k, 70k and 160k are our choice; below the paper's scale in proportion to the recipe's. The fixed length is "
        "the paper's, 13 %.",
    )  # fmt: skip


def figure_14() -> Table:
    curves = {"CONFIG B": ("B", 1.0), "CONFIG G": ("G", 1.0), "guidance 1.4": ("G", 1.4), "guidance 1.9": ("G", 1.9)}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return tuple(
            g.metric_group(
                {f"FID, {name}": g.metric, f"FD, {name}": g.second_metric},
                {percent(length): g.guided(g.configs[step], length, w) for length in g.sigma_rels},
            )
            for name, (step, w) in curves.items()
        )

    s, d = FID_512["S"], DINO_512["S"]
    known = {
        ("FID, CONFIG B", LADDER_CONFIGS["B"].sigma_rel): LADDER_CONFIGS["B"].fid, ("FID, CONFIG G", s[0].sigma_rel): s[0].distance,
        ("FD, CONFIG G", d[0].sigma_rel): d[0].distance, ("FID, guidance 1.4", s[1].sigma_rel): s[1].distance,
        ("FD, guidance 1.9", d[1].sigma_rel): d[1].distance,
    }  # fmt: skip
    return Table(
        name="edm2/fig14",
        title="FID and DINOv2's distance over EMA length, EDM2-S",
        source="Karras et al. 2024, Figure 14",
        columns=tuple(Column(f"{metric}, {name}") for metric in ("FID", "FD") for name in curves),
        rows=rows_of(SIGMA_RELS, known),
        x="EMA length",
        scales=scales(parts, ONE_COST, {"tiny": "The digits; FD is the share that is read as another digit."}),
        claims=(
            Claim("DINOv2 prefers longer averages", claims.optimum_earlier("FID, CONFIG G", "FD, CONFIG G")),
            Claim("DINOv2 prefers longer averages with guidance", claims.optimum_earlier("FID, guidance 1.4", "FD, guidance 1.4")),
            Claim("FID prefers the weaker guidance", claims.best_of("FID, guidance 1.4", than="FID, guidance 1.9")),
            Claim("DINOv2 prefers the stronger guidance", claims.best_of("FD, guidance 1.9", than="FD, guidance 1.4")),
            Claim("CONFIG G is better than B by DINOv2 too", claims.best_of("FD, CONFIG G", than="FD, CONFIG B")),
        ),
        notes="Published: the points of Tables 1 and 6.",
    )  # fmt: skip


def figure_4() -> Table:
    curves = {
        f"{words}, {percent(to)}": (lengths, to)
        for to in (0.07, 0.15)
        for words, lengths in (("two stored", ".05,.1"), ("one stored", ".1"))
    }
    counts = (8, 16, 32, 64, 128, 256)
    parts = tuple(
        ColumnGroup(
            {name: "error"},
            {str(n): Measurement(settings=(f"snapshots={n}",)) for n in counts},
            method="reconstruction",
            settings=(f"averages={lengths}", f"target={to:g}"),
        )
        for name, (lengths, to) in curves.items()
    )
    two = "two stored, 15 %"
    return Table(
        name="edm2/fig4",
        title="Error of an average made afterwards, by the number of snapshots",
        source="Karras et al. 2024, Figure 4",
        columns=tuple(Column(name) for name in curves),
        rows=tuple(Row(str(n), x=n) for n in counts),
        x="snapshots",
        scales={"tiny": Scale(parts, "a second", "No training: the least squares of Appendix C.5.")},
        claims=(
            Claim("With two averages at each time the error falls as 1/n^4: to 7 %", claims.power_law("two stored, 7 %", -4, 0.4)),
            Claim("With two averages at each time the error falls as 1/n^4: to 15 %", claims.power_law(two, -4, 0.4)),
            Claim("One average at each time is much worse", claims.improves_on(("32", two), ("32", "one stored, 15 %"))),
        ),
        notes="Squared error of the profile over its square; lengths of 5 and 10 % are stored, 10 % alone. The figure shows 8.",
    )  # fmt: skip


def figure_24() -> Table:
    lengths, places = (0.05, 0.10, 0.15, 0.20, 0.25), tuple(k / 20 for k in range(21))
    names = {length: f"sigma_rel {percent(length)}" for length in lengths}
    parts = tuple(
        ColumnGroup(
            {name: "response"},
            {percent(at): Measurement(settings=(f"at={at:g}",)) for at in places},
            method="responses",
            settings=(f"sigma_rel={length:g}",),
        )
        for length, name in names.items()
    )
    short, long = names[lengths[0]], names[lengths[-1]]
    return Table(
        name="edm2/fig24",
        title="What an average takes from each time",
        source="Karras et al. 2024, Figure 24",
        columns=tuple(Column(name, None) for name in names.values()),
        rows=rows_of(places),
        x="share of the training",
        scales={"tiny": Scale(parts, "a second", "No training: Equation 121.")},
        claims=(
            Claim("A longer average takes more from half-way", claims.improves_on(("50 %", short), ("50 %", long))),
            Claim("A longer average takes less from the end", claims.improves_on(("100 %", long), ("100 %", short))),
        ),
        notes="Density in units of the time trained. Which lengths the figure shows its text does not say.",
    )  # fmt: skip


def responses_figure() -> Table:
    """Section 4: the best length goes as 1 / (alpha_ref^2 t_ref)."""
    named = {
        "half the rate": (0.5, 70_000), "as EDM2-S": (1.0, 70_000), "twice the rate": (2.0, 70_000),
        "decay from 30k": (1.0, 30_000), "decay from 160k": (1.0, 160_000),
    }  # fmt: skip
    given = {name: rate**2 * t_ref / 70_000 for name, (rate, t_ref) in named.items()}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        trained = {name: decay_variants(g.sizes["S"], t_ref, rate) for name, (rate, t_ref) in named.items()}
        return sweep_ema(
            g, {name: lambda length, name=name: Measurement(trained[name], at_ema(length)) for name in named}
        )

    return Table(
        name="edm2/rates",
        title="EMA length and learning rate, EDM2-S",
        source="Karras et al. 2024, Section 4, Post-hoc EMA observations",
        columns=tuple(Column(name) for name in named),
        rows=rows_of(SIGMA_RELS, {("as EDM2-S", FID_512["S"][0].sigma_rel): FID_512["S"][0].distance}),
        x="EMA length",
        scales=scales(parts, {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100"}),
        claims=(
            Claim("The higher the rate, the shorter the best length", claims.optimum_earlier("twice the rate", "half the rate")),
            Claim("The later the decay, the shorter the best length", claims.optimum_earlier("decay from 160k", "decay from 30k")),
            Claim("The best length goes about as 1 / (alpha_ref^2 t_ref)", claims.optimum_follows(given, -1, 0.5)),
        ),
        notes="Said without numbers; factors are our choice. About: an exponent of -1.5 to -.5.",
    )  # fmt: skip


TABLES: tuple[Callable[[], Table], ...] = (
    figure_4, figure_5a, figure_5b, figure_5c, figure_6, figure_11b, figure_13, figure_14, figure_24, responses_figure,
)  # fmt: skip
