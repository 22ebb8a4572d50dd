"""Figures of Karras et al. 2024 on training: 3, 11a, 12, 23, and claims that only its text makes."""

from collections.abc import Callable, Mapping
from fractions import Fraction

from gesso.papers.edm2.setups import (
    LADDER_COST,
    PAPER,
    TRAINING_FRACTIONS,
    Setup,
    at_ema,
    at_fraction,
    percent,
    rows_of,
    scales,
    with_settings,
)
from gesso.recipes.edm2 import FID_512, LADDER_CONFIGS
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Table, Training

STEADY_MARGIN = 0.1
"""growth or decay of a magnitude that counts as none"""


def figure_3() -> Table:
    measures = {
        f"{what}, {which}": f"{kind}_{short}"
        for which, short in (("largest", "max"), ("mean", "mean"))
        for what, kind in (("Activations", "activations"), ("Weights", "weights"))
    } | {"Activations, late": "activations_max_late", "Weights, late": "weights_max_late"}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return (
            ColumnGroup(
                measures,
                {f"CONFIG {s}": Measurement(g.configs[s]) for s in LADDER_CONFIGS if s != "A"},
                method="growth",
            ),
        )

    def grows(step: str, column: str, text: str) -> Claim:
        return Claim(text, claims.greater_than((f"CONFIG {step}", column), 1.0))

    def constant(step: str, column: str, text: str) -> Claim:
        return Claim(
            f"{text}, within {STEADY_MARGIN:.0%}".replace("%", " %"),
            claims.equals((f"CONFIG {step}", column), 1.0, STEADY_MARGIN),
        )

    return Table(
        name="edm2/fig3",
        title="Growth of activations and weights",
        source="Karras et al. 2024, Figures 3 and 15",
        columns=tuple(Column(name) for name in measures),
        rows=tuple(Row(f"CONFIG {step}") for step in LADDER_CONFIGS if step != "A"),
        scales=scales(parts, LADDER_COST, {"tiny": "The digits, 60k images.", "small": "Drawn shapes, 3M images."}),
        claims=(
            grows("C", "Activations, largest", "Activations of C grow"),
            grows("C", "Weights, largest", "Weights of C grow"),
            constant("D", "Activations, largest", "Magnitude-preserving layers: activations of D do not grow"),
            constant("D", "Activations, mean", "In the mean activations of D do not grow"),
            grows("D", "Weights, largest", "Weights of D still grow"),
            constant("E", "Activations, largest", "Activations of E do not grow"),
            constant("E", "Weights, largest", "Forced normalization: weights of E do not grow"),
            grows("C", "Activations, late", "Activations of C still grow in the second half"),
            grows("D", "Weights, late", "Weights of D still grow in the second half"),
        ),
        notes="Magnitude at the end over that when first measured (late: half-way), the geometric mean over the network's levels; "
        "of the average next to sample.sigma_rel, before it is put back on the sphere. The figure has no numbers: 10 % is our margin for what does not grow.",
    )  # fmt: skip


def figure_11a() -> Table:
    names = {step: f"CONFIG {step}" for step in LADDER_CONFIGS}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        own = g is PAPER  # the length of each recipe
        return tuple(
            g.metric_group(
                {name: g.metric},
                {
                    percent(share): Measurement(
                        g.configs[step], (*(() if own else at_ema(0.1)), *at_fraction(g.configs[step], share))
                    )
                    for share in TRAINING_FRACTIONS
                },
            )
            for step, name in names.items()
        )

    return Table(
        name="edm2/fig11a",
        title="Convergence of CONFIGS A to G",
        source="Karras et al. 2024, Figure 11a",
        columns=tuple(Column(name) for name in names.values()),
        rows=rows_of(TRAINING_FRACTIONS, {(names[s], 1): LADDER_CONFIGS[s].fid for s in LADDER_CONFIGS}),
        x="share of the training",
        scales=scales(parts, LADDER_COST),
        claims=(
            Claim("B converges better than A", claims.improves_on((percent(TRAINING_FRACTIONS[0]), "CONFIG B"), (percent(TRAINING_FRACTIONS[0]), "CONFIG A"))),
        ),
        notes="Over images seen, of which all see as many; the paper's axis is hours. At the paper's scale at each recipe's length, else at 10 %.",
    )  # fmt: skip


OVERFIT = Fraction(4, 7)
"""of XXL's training are 537M images, after which it overfits without dropout"""


def figure_12() -> Table:
    names = {0.0: "no dropout", 0.1: "dropout 10 %"}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        shares = sorted({*TRAINING_FRACTIONS, OVERFIT}) if g is PAPER else TRAINING_FRACTIONS
        found: list[ColumnGroup] = []
        for dropout, name in names.items():
            trained = with_settings(g.sizes[g.largest], f"net.dropout={dropout:g}")
            ways = {
                percent(share): [
                    Measurement(trained, (*at_ema(length), *at_fraction(trained, share)))
                    for length in (0.05, 0.075, 0.1)
                ]
                for share in shares
            }
            found += g.alternatives({name: g.metric}, ways)
        return tuple(found)

    return Table(
        name="edm2/fig12",
        title="Dropout in the course of training, the largest network",
        source="Karras et al. 2024, Figure 12",
        columns=tuple(Column(name) for name in names.values()),
        rows=rows_of(sorted({*TRAINING_FRACTIONS, OVERFIT}), {(names[0.1], 1): FID_512["XXL"][0].distance}),
        x="share of the training",
        scales=scales(parts, {"tiny": "3 minutes", "paper": "9 days on 32 A100"}),
        claims=(
            Claim("Without dropout FID is best before the end", claims.optimum_inside(names[0.0], ends=(percent(TRAINING_FRACTIONS[-1]),))),
            Claim("With dropout progress lasts longer", claims.optimum_earlier(names[0.0], names[0.1])),
            Claim("With dropout the result is better", claims.best_of(names[0.1], than=names[0.0])),
        ),
        notes="XXL without dropout overfits after 537M images, 57 % of the training. Each point at the best of 5, 7.5 and 10 %.",
    )  # fmt: skip


def figure_23() -> Table:
    shares = (0, 0.5, 1, 2, 4, 8)
    names = {"no": "forced normalization alone", "yes": "with the projection"}
    parts = tuple(
        ColumnGroup(
            {name: "update"},
            {f"{share:g}": Measurement(settings=(f"normal={share:g}",)) for share in shares},
            method="step_sizes",
            settings=(f"projected={projected}",),
        )
        for projected, name in names.items()
    )
    alone, both = names["no"], names["yes"]
    return Table(
        name="edm2/fig23",
        title="Why weights are normalized twice: size of Adam's updates over that intended",
        source="Karras et al. 2024, Figure 23",
        columns=tuple(Column(name, None) for name in names.values()),
        rows=tuple(Row(f"{share:g}", x=share) for share in shares),
        x="normal part of the gradient over its tangent part",
        scales={"tiny": Scale(parts, "seconds", "No training: 32 weight vectors of 128 under random gradients.")},
        claims=(
            Claim("Without the projection updates are smaller than intended", claims.improves_on(("2", alone), ("2", both))),
            Claim("How much smaller depends on the gradient", claims.improves_on(("8", alone), ("0.5", alone))),
            Claim("With it they do not depend on the normal part", claims.within(("8", both), ("0", both), 0.01)),
        ),
        notes="The figure is a drawing of one step; this is a simulation with our own layers. Adam divides each weight by a size of its "
        "own, so that even a gradient that is all normal moves the weights, by .6 of what is intended.",
    )  # fmt: skip


EDM2_S = FID_512["S"][0].distance


def tuned_variants(g: Setup, trained: Mapping[str, Training]) -> tuple[ColumnGroup, ...]:
    """Variants of EDM2-S at its best length, or each at its own."""
    lengths = [length for length, _ in g.tuned("S", False, False)]
    return g.alternatives(
        {"FID": g.metric}, {row: [Measurement(t, at_ema(s)) for s in lengths] for row, t in trained.items()}
    )


def weighting_table() -> Table:
    """Appendix B.2: lambda = 1 in the place of Equation 15."""
    said = {"Eq. 15": (), "1": ("loss.weighting=uncertainty-uniform",)}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return tuned_variants(g, {row: with_settings(g.sizes["S"], *settings) for row, settings in said.items()})

    return Table(
        name="edm2/lambda",
        title="lambda(sigma) beside a learned uncertainty, EDM2-S",
        source="Karras et al. 2024, Appendix B.2",
        columns=(Column("FID"),),
        rows=(Row("Eq. 15", {"FID": EDM2_S}), Row("1")),
        scales=scales(parts, {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100"}),
        claims=(Claim("lambda = 1 gives the same FID within 5 %", claims.within(("1", "FID"), ("Eq. 15", "FID"), 0.05)),),
        notes='"Virtually no impact", without numbers: 5 % is our reading.',
    )  # fmt: skip


def precision_table() -> Table:
    """Appendix D.2: 16-bit floating point with a constant loss scale."""
    half = "train.precision=float16", "train.loss_scale=1", "train.on_nonfinite=zero"
    said = {"FP32": ("train.precision=full",), "FP16": half, "bfloat16": ("train.precision=bfloat16",)}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return tuned_variants(g, {row: with_settings(g.sizes["S"], *settings) for row, settings in said.items()})

    return Table(
        name="edm2/fp16",
        title="Precision of training, EDM2-S",
        source="Karras et al. 2024, Appendix D.2",
        columns=(Column("FID"),),
        rows=(Row("FP32"), Row("FP16", {"FID": EDM2_S}), Row("bfloat16")),
        scales=scales(parts, {"small": "an hour", "paper": "5 days on 32 A100"}),
        claims=(
            Claim("FP16 trains as well as FP32, within 5 %", claims.within(("FP16", "FID"), ("FP32", "FID"), 0.05)),
            Claim("bfloat16 trains as well as FP32, within 5 %", claims.within(("bfloat16", "FID"), ("FP32", "FID"), 0.05)),
        ),
        notes="Loss scale 1 on the summed loss, the published code's default; the paper's own constant stands in Figure 22, which its text lacks. Not made at the tiny scale, as 16 bits are another thing on a processor; bfloat16 is our addition.",
    )  # fmt: skip


def balances_table() -> Table:
    """Appendix B.7: t of MP-Cat and of the residual sum."""
    said = {f"{what} {t:g}": (f"net.{name}={t:g}",) for what, name, values in (
        ("MP-Cat t", "concat_balance", (0.3, 0.5, 0.7)), ("residual t", "residual_balance", (0.1, 0.3, 0.5))) for t in values}  # fmt: skip

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        return tuned_variants(g, {row: with_settings(g.edm2_s, *settings) for row, settings in said.items()})

    def best(ours: str, than: str) -> Claim:
        return Claim(f"{ours} is better than {than.split()[-1]}", claims.improves_on((ours, "FID"), (than, "FID")))

    return Table(
        name="edm2/mpcat",
        title="Balances of skip connections and of residual branches, EDM2-S",
        source="Karras et al. 2024, Appendix B.7",
        columns=(Column("FID"),),
        rows=tuple(Row(row, {"FID": EDM2_S} if row in ("MP-Cat t 0.5", "residual t 0.3") else {}) for row in said),
        scales=scales(parts, {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100"}),
        claims=(
            best("MP-Cat t 0.5", "MP-Cat t 0.3"), best("MP-Cat t 0.5", "MP-Cat t 0.7"),
            best("residual t 0.3", "residual t 0.1"), best("residual t 0.3", "residual t 0.5"),
        ),
        notes="Found best in the paper, without numbers of others, which are our choice.",
    )  # fmt: skip


TABLES: tuple[Callable[[], Table], ...] = (
    figure_3, figure_11a, figure_12, figure_23, weighting_table, precision_table, balances_table,
)  # fmt: skip
