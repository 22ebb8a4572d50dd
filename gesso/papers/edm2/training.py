"""Figures 3, 11a, 12 and 23 of Karras et al. 2024 on training, and claims that are only in its text."""

from collections.abc import Callable, Mapping
from fractions import Fraction

from gesso.papers.edm2.setups import (
    LADDER_COST,
    PAPER_SETUP,
    TRAINING_COST,
    TRAINING_FRACTIONS,
    Setup,
    at_ema,
    at_fraction,
    format_percent,
    fraction_rows,
    make_scales,
    with_settings,
)
from gesso.papers.edm2.tables import CONFIG_NAMES
from gesso.published.edm2 import FID_512
from gesso.recipes.edm2 import LADDER_CONFIGS
from gesso.reproduce.claims import close, equals, improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Settings, Table, Training

STEADY_MARGIN = 0.1
"""Growth or decay of a magnitude that counts as none."""


def grows(config: str, column: str, text: str) -> Claim:
    """Return the claim that a magnitude grows."""
    return Claim(text, lambda v: v[CONFIG_NAMES[config], column] > 1.0)


def is_constant(config: str, column: str, text: str) -> Claim:
    """Return the claim that a magnitude is constant within STEADY_MARGIN."""
    text = f"{text}, within {format_percent(STEADY_MARGIN)}"
    return Claim(text, lambda v: equals(v[CONFIG_NAMES[config], column], 1.0, STEADY_MARGIN))


def figure_3() -> Table:
    """Return Figure 3."""
    magnitudes = {
        "Activations, largest": "activations_max",
        "Weights, largest": "weights_max",
        "Activations, mean": "activations_mean",
        "Weights, mean": "weights_mean",
        "Activations, late": "activations_max_late",
        "Weights, late": "weights_max_late",
    }
    rows = {config: name for config, name in CONFIG_NAMES.items() if config != "A"}

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        measurements = {name: Measurement(setup.configs[config]) for config, name in rows.items()}
        return (ColumnGroup(magnitudes, measurements, method="growth"),)

    return Table(
        name="edm2/fig3",
        title="Growth of activations and weights",
        source="Karras et al. 2024, Figures 3 and 15",
        columns=tuple(map(Column, magnitudes)),
        rows=tuple(map(Row, rows.values())),
        scales=make_scales(
            groups,
            LADDER_COST,
            {"tiny": "The digits, 64k images in batches of 16.", "small": "Drawn shapes, 3M images."},
        ),
        claims=(
            grows("C", "Activations, largest", "Activations of C grow"),
            grows("C", "Weights, largest", "Weights of C grow"),
            is_constant("D", "Activations, largest", "Magnitude-preserving layers: activations of D do not grow"),
            is_constant("D", "Activations, mean", "In the mean activations of D do not grow"),
            grows("D", "Weights, largest", "Weights of D still grow"),
            is_constant("E", "Activations, largest", "Activations of E do not grow"),
            is_constant("E", "Weights, largest", "Forced normalization: weights of E do not grow"),
            grows("C", "Activations, late", "Activations of C still grow in the second half"),
            grows("D", "Weights, late", "Weights of D still grow in the second half"),
        ),
        notes="Magnitude at the end divided by that at the first measurement (late: half-way), as the geometric mean "
        "over the levels of the network; for the EMA next to sample.sigma_rel, before weights are normalized. The "
        "figure has no numbers: 10 % is our margin for no growth.",
    )


def figure_11a() -> Table:
    """Return Figure 11a."""

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        ema: Settings = () if setup is PAPER_SETUP else at_ema(0.1)  # at paper scale the EMA length of each recipe

        def measure(config: str, fraction: Fraction) -> Measurement:
            training = setup.configs[config]
            return Measurement(training, (*ema, *at_fraction(training, fraction)))

        return tuple(
            setup.metric_group(
                {name: setup.metric}, {format_percent(x): measure(config, x) for x in TRAINING_FRACTIONS}
            )
            for config, name in CONFIG_NAMES.items()
        )

    first = format_percent(TRAINING_FRACTIONS[0])
    published: dict[tuple[str, float], float] = {
        (name, 1): LADDER_CONFIGS[config].fid for config, name in CONFIG_NAMES.items()
    }
    return Table(
        name="edm2/fig11a",
        title="Convergence of CONFIGS A to G",
        source="Karras et al. 2024, Figure 11a",
        columns=tuple(map(Column, CONFIG_NAMES.values())),
        rows=fraction_rows(TRAINING_FRACTIONS, published),
        x_axis="share of the training",
        scales=make_scales(groups, LADDER_COST),
        claims=(improvement("B converges better than A", (first, "CONFIG B"), (first, "CONFIG A")),),
        notes="Over images, of which all trainings use the same number; the axis of the paper is hours. At paper scale "
        "at the EMA length of each recipe, else at 10 %.",
    )


OVERFITTING_FRACTION = Fraction(4, 7)
"""537M images of XXL's training, after which it overfits without dropout."""


def figure_12() -> Table:
    """Return Figure 12."""
    names = {0.0: "no dropout", 0.1: "dropout 10 %"}
    paper_fractions = sorted({*TRAINING_FRACTIONS, OVERFITTING_FRACTION})

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        fractions = paper_fractions if setup is PAPER_SETUP else TRAINING_FRACTIONS
        result: list[ColumnGroup] = []
        for dropout, name in names.items():
            training = with_settings(setup.sizes[setup.largest], f"net.dropout={dropout:g}")
            options = {
                format_percent(x): [
                    Measurement(training, (*at_ema(sigma_rel), *at_fraction(training, x)))
                    for sigma_rel in (0.05, 0.075, 0.1)
                ]
                for x in fractions
            }
            result += setup.best_of_groups({name: setup.metric}, options)
        return tuple(result)

    last = format_percent(TRAINING_FRACTIONS[-1])
    return Table(
        name="edm2/fig12",
        title="Dropout during training, the largest network",
        source="Karras et al. 2024, Figure 12",
        columns=tuple(map(Column, names.values())),
        rows=fraction_rows(paper_fractions, {(names[0.1], 1): FID_512["XXL"][0].distance}),
        x_axis="share of the training",
        scales=make_scales(groups, {"tiny": "3 minutes", "paper": "9 days on 32 A100"}),
        claims=(
            Claim("Without dropout FID is best before the end", lambda v: v.optimum_inside("no dropout", ends=(last,))),
            Claim("With dropout progress lasts longer", lambda v: v.optimum("no dropout") < v.optimum("dropout 10 %")),
            Claim("With dropout the result is better", lambda v: v.best_improves("dropout 10 %", "no dropout")),
        ),
        notes="XXL without dropout overfits after 537M images, 57 % of the training. Each point at the best of the EMA "
        "lengths 5, 7.5 and 10 %.",
    )


def figure_23() -> Table:
    """Return Figure 23."""
    ratios = (0, 0.5, 1, 2, 4, 8)
    alone, projected = "forced normalization alone", "with the projection"
    groups = tuple(
        ColumnGroup(
            {name: "update"},
            {f"{ratio:g}": Measurement(settings=(f"normal_ratio={ratio:g}",)) for ratio in ratios},
            method="step_sizes",
            settings=(f"project_gradients={value}",),
        )
        for name, value in ((alone, "no"), (projected, "yes"))
    )
    return Table(
        name="edm2/fig23",
        title="Effect of gradient projection: size of Adam's updates relative to the intended size",
        source="Karras et al. 2024, Figure 23",
        columns=(Column(alone, None), Column(projected, None)),
        rows=tuple(Row(f"{ratio:g}", x=ratio) for ratio in ratios),
        x_axis="normal part of the gradient over its tangent part",
        scales={"tiny": Scale(groups, "seconds", "No training: 32 weight vectors of 128 under random gradients.")},
        claims=(
            Claim(
                "Without the projection updates are smaller than intended", lambda v: v["2", alone] < v["2", projected]
            ),
            Claim("The difference depends on the gradient", lambda v: v["8", alone] < v["0.5", alone]),
            Claim(
                "With the projection updates do not depend on the normal part",
                lambda v: close(v["8", projected], v["0", projected], 0.01),
            ),
        ),
        notes="The figure is a drawing of one step; this is a simulation with gesso's layers. Adam divides each "
        "weight's gradient by its own scale, so that even a gradient that is only normal moves the weights, by .6 of "
        "the intended size.",
    )


EDM2_S_FID = FID_512["S"][0].distance


def tuned_groups(setup: Setup, trainings: Mapping[str, Training]) -> tuple[ColumnGroup, ...]:
    """Return variants of EDM2-S at its best EMA length, or each at its best below paper scale."""
    sigma_rels = [sigma_rel for sigma_rel, _ in setup.candidates("S", guided=False)]
    options = {row: [Measurement(t, at_ema(s)) for s in sigma_rels] for row, t in trainings.items()}
    return setup.best_of_groups({"FID": setup.metric}, options)


def weighting_table() -> Table:
    """Return the claim of Appendix B.2 on lambda = 1 instead of Equation 15."""
    variants: dict[str, Settings] = {"Eq. 15": (), "1": ("loss.weighting=uncertainty-uniform",)}

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        trainings = {row: with_settings(setup.sizes["S"], *settings) for row, settings in variants.items()}
        return tuned_groups(setup, trainings)

    return Table(
        name="edm2/lambda",
        title="lambda(sigma) with a learned uncertainty, EDM2-S",
        source="Karras et al. 2024, Appendix B.2",
        columns=(Column("FID"),),
        rows=(Row("Eq. 15", {"FID": EDM2_S_FID}), Row("1")),
        scales=make_scales(groups, TRAINING_COST),
        claims=(
            Claim(
                "lambda = 1 gives the same FID within 5 %",
                lambda v: close(v["1", "FID"], v["Eq. 15", "FID"], 0.05),
            ),
        ),
        notes='"Virtually no impact", without numbers: 5 % is our reading.',
    )


def precision_table() -> Table:
    """Return the claim of Appendix D.2 on 16-bit floating point with a constant loss scale."""
    variants: dict[str, Settings] = {
        "FP32": ("train.precision=full",),
        "FP16": ("train.precision=float16", "train.loss_scale=1", "train.on_nonfinite=zero"),
        "bfloat16": ("train.precision=bfloat16",),
    }

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        trainings = {row: with_settings(setup.sizes["S"], *settings) for row, settings in variants.items()}
        return tuned_groups(setup, trainings)

    def as_good_as_fp32(row: str) -> Claim:
        return Claim(
            f"{row} trains as well as FP32, within 5 %", lambda v: close(v[row, "FID"], v["FP32", "FID"], 0.05)
        )

    return Table(
        name="edm2/fp16",
        title="Precision of training, EDM2-S",
        source="Karras et al. 2024, Appendix D.2",
        columns=(Column("FID"),),
        rows=(Row("FP32"), Row("FP16", {"FID": EDM2_S_FID}), Row("bfloat16")),
        scales=make_scales(groups, {"small": "an hour", "paper": "5 days on 32 A100"}),
        claims=(as_good_as_fp32("FP16"), as_good_as_fp32("bfloat16")),
        notes="Loss scale 1 on the summed loss, the default of the published code; the paper's constant is in Figure "
        "22, which its text lacks. Not defined at the tiny scale, because 16 bits behave differently on a CPU; "
        "bfloat16 is our addition.",
    )


def balances_table() -> Table:
    """Return the claims of Appendix B.7 on t of MP-Cat and of the residual sum."""
    variants = {
        **{f"MP-Cat t {t}": f"net.concat_balance={t}" for t in (0.3, 0.5, 0.7)},
        **{f"residual t {t}": f"net.residual_balance={t}" for t in (0.1, 0.3, 0.5)},
    }
    best = ("MP-Cat t 0.5", "residual t 0.3")

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        return tuned_groups(setup, {row: with_settings(setup.edm2_s, setting) for row, setting in variants.items()})

    def better(row: str, than: str) -> Claim:
        return improvement(f"{row} is better than {than.split()[-1]}", (row, "FID"), (than, "FID"))

    return Table(
        name="edm2/mpcat",
        title="Balances of skip connections and of residual branches, EDM2-S",
        source="Karras et al. 2024, Appendix B.7",
        columns=(Column("FID"),),
        rows=tuple(Row(row, {"FID": EDM2_S_FID} if row in best else {}) for row in variants),
        scales=make_scales(groups, TRAINING_COST),
        claims=(
            better("MP-Cat t 0.5", "MP-Cat t 0.3"),
            better("MP-Cat t 0.5", "MP-Cat t 0.7"),
            better("residual t 0.3", "residual t 0.1"),
            better("residual t 0.3", "residual t 0.5"),
        ),
        notes="The best values of the paper, which gives no numbers for others; the other values are our choice.",
    )


TABLES: tuple[Callable[[], Table], ...] = (
    figure_3,
    figure_11a,
    figure_12,
    figure_23,
    weighting_table,
    precision_table,
    balances_table,
)
