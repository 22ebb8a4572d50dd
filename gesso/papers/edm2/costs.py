"""Quality against cost: Figures 1, 8, 9 and 10 of Karras et al. 2024."""

from collections.abc import Callable, Mapping
from fractions import Fraction

from gesso.papers.edm2.setups import PAPER, TRAINING_FRACTIONS, Setup, at_ema, at_fraction, percent, scales
from gesso.papers.edm2.tables import MACS, PRIOR_512, distance_groups
from gesso.recipes.edm2 import COST_512, DECODER_GFLOPS, FID_512
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Table

OURS, GUIDED, EARLIER, EARLIER_GUIDED = "EDM2", "EDM2, guided", "earlier", "earlier, guided"
Price = Mapping[str, float]


def cost_figure(
    name: str, figure: str, axis: str, found: str, ours: Price, guided: Price, earlier: Price, both: bool = True
) -> Table:
    """FID over a cost, by size; guided samples have a row of their own where they cost more. earlier: also with guidance where
    `both`."""

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        of = {f"EDM2-{size}": size for size in g.sizes}
        scored = [
            part._replace(rows={f"{row}, guided": how for row, how in part.rows.items()})
            if GUIDED in part.columns
            else part
            for part in distance_groups(g, OURS)
        ]
        rows = {row: Measurement(g.sizes[size]) for row, size in of.items()}
        rows |= {f"{row}, guided": g.guided(g.sizes[size], 0.1, 1.2) for row, size in of.items()}
        if found == "gmacs":  # of the network alone
            rows = {row: Measurement(how.training) for row, how in rows.items()}
        return (*scored, ColumnGroup({axis: found}, rows, method="counts"))

    rows = []
    for other, price in sorted(earlier.items(), key=lambda item: item[1]):
        plain, with_guidance = PRIOR_512[other][:2]
        known = {EARLIER: plain, EARLIER_GUIDED: with_guidance if both else None}
        if fids := {column: fid for column, fid in known.items() if fid is not None}:
            rows.append(Row(other, {axis: price, **fids}))
    rows += [Row(f"EDM2-{size}", {axis: ours[size], OURS: FID_512[size][0].distance}) for size in FID_512]
    rows += [Row(f"EDM2-{size}, guided", {axis: guided[size], GUIDED: FID_512[size][1].distance}) for size in FID_512]
    return Table(
        name=name,
        title=f"FID over {axis}",
        source=f"Karras et al. 2024, {figure}",
        columns=(Column(axis, None), *(Column(c) for c in (OURS, GUIDED, EARLIER, *((EARLIER_GUIDED,) if both else ())))),
        rows=tuple(rows),
        x=axis,
        scales=scales(parts, {"tiny": "4 minutes", "paper": "3 to 10 days on 32 A100"}),
        claims=(
            Claim("Larger networks are better without guidance", claims.each_improves(OURS, [f"EDM2-{size}" for size in FID_512])),
            Claim("Larger networks are better with guidance", claims.each_improves(GUIDED, [f"EDM2-{size}, guided" for size in FID_512])),
            Claim("What was best before is beaten at a fifth of its cost", claims.cheaper(axis, OURS, EARLIER, 5)),
        ),
        notes=MACS,
    )  # fmt: skip


def figure_1() -> Table:
    flops = {size: cost.gflops for size, cost in COST_512.items()}
    earlier = {name: values[3] for name, values in PRIOR_512.items()}
    return cost_figure("edm2/fig1", "Figure 1", "gigaflops of an evaluation", "gmacs", flops, flops, earlier)


def figure_8() -> Table:
    """With guidance those of the network that guides count too."""
    params = {size: cost.params / 1000 for size, cost in COST_512.items()}
    guided = {size: count + params["XS"] for size, count in params.items()}
    earlier = {name: values[2] / 1000 for name, values in PRIOR_512.items()}
    return cost_figure("edm2/fig8", "Figure 8", "billions of parameters", "params_both", params, guided, earlier)


def figure_9() -> Table:
    """Of earlier methods evaluations times gigaflops; DiT, too, decodes. What guidance costs them the paper does not say."""
    sampling = {size: cost.sampling for size, cost in COST_512.items()}
    guided = {size: cost.guided for size, cost in COST_512.items()}
    earlier = {
        name: (flops * nfe + (DECODER_GFLOPS if name == "DiT-XL/2" else 0)) / 1000
        for name, (_, _, _, flops, nfe) in PRIOR_512.items()
    }
    return cost_figure(
        "edm2/fig9", "Figure 9", "teraflops of a sample", "sampling", sampling, guided, earlier, both=False
    )


def figure_10() -> Table:
    axis, names = "zettaflops of training", {size: f"EDM2-{size}" for size in FID_512}

    def at(g: Setup, size: str, share: Fraction) -> Measurement:
        length = FID_512[size][0].sigma_rel if g is PAPER else 0.1
        return Measurement(g.sizes[size], (*at_ema(length), *at_fraction(g.sizes[size], share)))

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        rows = {
            size: {f"{names[size]}, {percent(share)}": at(g, size, share) for share in TRAINING_FRACTIONS}
            for size in g.sizes
        }
        every = {row: how for some in rows.values() for row, how in some.items()}
        return (
            *(g.metric_group({names[size]: g.metric}, some) for size, some in rows.items()),
            ColumnGroup({axis: "training"}, every, method="counts"),
        )

    return Table(
        name="edm2/fig10",
        title=f"FID over {axis}",
        source="Karras et al. 2024, Figure 10",
        columns=(Column(axis, None), *(Column(name) for name in names.values())),
        rows=tuple(
            Row(
                f"{name}, {percent(share)}",
                {axis: COST_512[size].training, name: FID_512[size][0].distance} if share == 1 else {},
            )
            for size, name in names.items()
            for share in TRAINING_FRACTIONS
        ),
        x=axis,
        scales=scales(parts, {"tiny": "2 minutes", "paper": "3 to 10 days on 32 A100"}),
        claims=(
            Claim("M ends better than XS", claims.improves_on(("EDM2-M, 100 %", "EDM2-M"), ("EDM2-XS, 100 %", "EDM2-XS"))),
            Claim("XXL ends better than S", claims.improves_on(("EDM2-XXL, 100 %", "EDM2-XXL"), ("EDM2-S, 100 %", "EDM2-S"))),
        ),
        notes=f"At quarters of the training, each size at one length; with and without dropout: edm2/fig12. {MACS}",
    )  # fmt: skip


TABLES: tuple[Callable[[], Table], ...] = (figure_1, figure_8, figure_9, figure_10)
