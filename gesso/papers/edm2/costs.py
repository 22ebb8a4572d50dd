"""Figures 1, 8, 9 and 10 of Karras et al. 2024: quality against cost."""

from collections.abc import Callable, Mapping
from fractions import Fraction

from gesso.papers.edm2.setups import (
    PAPER_SETUP,
    SIZES_COST,
    TRAINING_FRACTIONS,
    Setup,
    at_ema,
    at_fraction,
    format_percent,
    make_scales,
)
from gesso.papers.edm2.tables import MACS_NOTE, PAPER_ROWS, PRIOR_WORK_512, distance_groups
from gesso.published.edm2 import COST_512, DECODER_GFLOPS, FID_512
from gesso.reproduce.claims import improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Table

UNGUIDED, GUIDED, PRIOR, PRIOR_GUIDED = "EDM2", "EDM2, guided", "earlier", "earlier, guided"
CostByName = Mapping[str, float]


def cost_groups(setup: Setup, axis: str, cost_value: str) -> tuple[ColumnGroup, ...]:
    """Return FID and cost of all sizes; guided samples are separate rows."""
    distances = [
        group._replace(rows={f"{row}, guided": m for row, m in group.rows.items()})
        if GUIDED in group.columns
        else group
        for group in distance_groups(setup, UNGUIDED)
    ]
    rows: dict[str, Measurement] = {}
    for size, training in setup.sizes.items():
        guided = setup.measure_guided(training, 0.1, 1.2)
        rows[f"EDM2-{size}"] = Measurement(training)
        # The multiply-accumulates of an evaluation do not include the guide.
        rows[f"EDM2-{size}, guided"] = Measurement(training) if cost_value == "gmacs" else guided
    return (*distances, ColumnGroup({axis: cost_value}, rows, method="counts"))


def cost_figure(
    number: str,
    axis: str,
    cost_value: str,
    cost: CostByName,
    guided_cost: CostByName,
    prior_cost: CostByName,
    has_guided_prior: bool = True,
) -> Table:
    """Return a figure of FID over a cost.

    Args:
        number: number of the figure.
        axis: title of the x axis.
        cost_value: name of the counted value.
        cost: published cost by size.
        guided_cost: the same with guidance.
        prior_cost: published cost of earlier methods.
        has_guided_prior: whether earlier methods with guidance are shown at the same cost.
    """
    rows = []
    for name, value in sorted(prior_cost.items(), key=lambda item: item[1]):
        numbers = PRIOR_WORK_512[name]
        fids = {PRIOR: numbers.get("FID"), PRIOR_GUIDED: numbers.get("FID, guided") if has_guided_prior else None}
        if known := {column: fid for column, fid in fids.items() if fid is not None}:
            rows.append(Row(name, {axis: value, **known}))
    rows += [Row(f"EDM2-{size}", {axis: cost[size], UNGUIDED: fid.distance}) for size, (fid, _) in FID_512.items()]
    rows += [
        Row(f"EDM2-{size}, guided", {axis: guided_cost[size], GUIDED: fid.distance})
        for size, (_, fid) in FID_512.items()
    ]
    curves = (UNGUIDED, GUIDED, PRIOR, PRIOR_GUIDED)[: 4 if has_guided_prior else 3]
    return Table(
        name=f"edm2/fig{number}",
        title=f"FID over {axis}",
        source=f"Karras et al. 2024, Figure {number}",
        columns=(Column(axis, None), *map(Column, curves)),
        rows=tuple(rows),
        x_axis=axis,
        scales=make_scales(lambda setup: cost_groups(setup, axis, cost_value), SIZES_COST),
        claims=(
            Claim("Larger networks are better without guidance", lambda v: v.each_improves(UNGUIDED, PAPER_ROWS)),
            Claim(
                "Larger networks are better with guidance",
                lambda v: v.each_improves(GUIDED, [f"{row}, guided" for row in PAPER_ROWS]),
            ),
            Claim(
                "The best earlier method is surpassed at a fifth of its cost",
                lambda v: v.is_cheaper(axis, UNGUIDED, PRIOR, 5),
            ),
        ),
        notes=MACS_NOTE,
    )


def figure_1() -> Table:
    """Return Figure 1."""
    gflops = {size: cost.gflops for size, cost in COST_512.items()}
    prior = {name: numbers["Gflops"] for name, numbers in PRIOR_WORK_512.items()}
    return cost_figure("1", "gigaflops of an evaluation", "gmacs", gflops, gflops, prior)


def figure_8() -> Table:
    """Return Figure 8. With guidance, the parameters of the guide count too."""
    params = {size: cost.params / 1000 for size, cost in COST_512.items()}
    guided = {size: count + params["XS"] for size, count in params.items()}
    prior = {name: numbers["Mparams"] / 1000 for name, numbers in PRIOR_WORK_512.items()}
    return cost_figure("8", "billions of parameters", "params_with_guide", params, guided, prior)


def figure_9() -> Table:
    """Return Figure 9.

    The cost of earlier methods is evaluations times gigaflops, for DiT plus the decoder; that of their guidance is not
    published.
    """
    sampling = {size: cost.sampling for size, cost in COST_512.items() if cost.sampling is not None}
    guided = {size: cost.guided_sampling for size, cost in COST_512.items() if cost.guided_sampling is not None}
    prior = {
        name: (numbers["Gflops"] * numbers["NFE"] + (DECODER_GFLOPS if name == "DiT-XL/2" else 0)) / 1000
        for name, numbers in PRIOR_WORK_512.items()
    }
    return cost_figure("9", "teraflops of a sample", "sampling_macs", sampling, guided, prior, has_guided_prior=False)


def figure_10() -> Table:
    """Return Figure 10."""
    axis, names = "zettaflops of training", {size: f"EDM2-{size}" for size in FID_512}

    def measure(setup: Setup, size: str, fraction: Fraction) -> Measurement:
        sigma_rel = FID_512[size][0].sigma_rel if setup is PAPER_SETUP else 0.1
        return Measurement(setup.sizes[size], (*at_ema(sigma_rel), *at_fraction(setup.sizes[size], fraction)))

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        rows = {
            size: {f"{names[size]}, {format_percent(x)}": measure(setup, size, x) for x in TRAINING_FRACTIONS}
            for size in setup.sizes
        }
        all_rows = {row: measurement for points in rows.values() for row, measurement in points.items()}
        return (
            *(setup.metric_group({names[size]: setup.metric}, points) for size, points in rows.items()),
            ColumnGroup({axis: "training_macs"}, all_rows, method="counts"),
        )

    def published(size: str) -> dict[str, float]:
        training = COST_512[size].training
        assert training is not None
        return {axis: training, names[size]: FID_512[size][0].distance}

    return Table(
        name="edm2/fig10",
        title=f"FID over {axis}",
        source="Karras et al. 2024, Figure 10",
        columns=(Column(axis, None), *(Column(name) for name in names.values())),
        rows=tuple(
            Row(f"{name}, {format_percent(x)}", published(size) if x == 1 else {})
            for size, name in names.items()
            for x in TRAINING_FRACTIONS
        ),
        x_axis=axis,
        scales=make_scales(groups, {"tiny": "2 minutes", "paper": "3 to 10 days on 32 A100"}),
        claims=(
            improvement("M ends better than XS", ("EDM2-M, 100 %", "EDM2-M"), ("EDM2-XS, 100 %", "EDM2-XS")),
            improvement("XXL ends better than S", ("EDM2-XXL, 100 %", "EDM2-XXL"), ("EDM2-S, 100 %", "EDM2-S")),
        ),
        notes="At quarters of the training, each size at one EMA length; with and without dropout: edm2/fig12. "
        f"{MACS_NOTE}",
    )


TABLES: tuple[Callable[[], Table], ...] = (figure_1, figure_8, figure_9, figure_10)
