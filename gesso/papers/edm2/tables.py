"""Tables 1 to 6 of Karras et al. 2024."""

from collections.abc import Callable

from gesso.papers.edm2.setups import PAPER, Setup, at_ema, scales
from gesso.recipes.edm2 import COST_64, COST_512, DINO_512, FID_64, FID_512, LADDER_CONFIGS, TABLE_4, Cost
from gesso.reproduce import claims
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Table, Training

SIZE = (Column("Mparams", None), Column("Gflops", None), Column("NFE", None))
COUNTED = {"Mparams": "params", "Gflops": "gmacs", "NFE": "nfe"}
MACS = "Gflops are multiply-accumulates; ours leave out normalizing weights and what is done element by element, .9 to 1.4 %."


def size_groups(g: Setup) -> dict[str, str]:
    """EDM2-XS and larger, by row."""
    return {f"EDM2-{size}": size for size in g.sizes}


def distance_groups(g: Setup, column: str, second: bool = False) -> tuple[ColumnGroup, ...]:
    """Of all sizes without guidance and with, each at its best length."""
    name = g.second_metric if second else g.metric
    parts: list[ColumnGroup] = []
    for guided in (False, True):
        ways = {
            row: [g.guided(g.sizes[size], length, w) for length, w in g.tuned(size, guided, second)]
            for row, size in size_groups(g).items()
        }
        parts += g.alternatives({f"{column}, guided" if guided else column: name}, ways)
    return tuple(parts)


def count_groups(g: Setup) -> ColumnGroup:
    return ColumnGroup(
        COUNTED, {row: Measurement(g.sizes[size]) for row, size in size_groups(g).items()}, method="counts"
    )


def size_of(cost: Cost) -> dict[str, float]:
    return {"Mparams": cost.params, "Gflops": cost.gflops, "NFE": 63}


def table_1() -> Table:
    names = {step: f"CONFIG {step}" for step in LADDER_CONFIGS}

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        ways = {name: [g.at_ema(step, length) for length in g.sigma_rels_of(step)] for step, name in names.items()}
        costs = {name: Measurement(g.configs[step]) for step, name in names.items()}
        return (
            *g.alternatives({"FID": g.metric}, ways),
            ColumnGroup({"Mparams": "params", "Gflops": "gmacs"}, costs, method="counts"),
        )

    def step(ours: str, before: str, says: str) -> Claim:
        return Claim(
            f"{says} ({ours} after {before})", claims.improves_on((names[ours], "FID"), (names[before], "FID"))
        )

    return Table(
        name="edm2/1",
        title="From the baseline to EDM2, change by change",
        source="Karras et al. 2024, Table 1",
        columns=(Column("FID"), *SIZE[:2]),
        rows=tuple(
            Row(name, {"FID": LADDER_CONFIGS[s].fid, "Mparams": LADDER_CONFIGS[s].cost.params, "Gflops": LADDER_CONFIGS[s].cost.gflops})
            for s, name in names.items()
        ),
        scales=scales(parts, {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100 and more"}),
        claims=(
            step("B", "A", "Tuned hyperparameters and the learned uncertainty help"),
            step("C", "B", "A streamlined architecture helps"),
            step("D", "C", "Magnitude-preserving layers help"),
            step("E", "D", "A controlled effective learning rate helps"),
            step("F", "E", "Removing group normalizations helps"),
            step("G", "F", "Magnitude-preserving fixed functions help"),
            Claim("All changes together help", claims.improves_on((names["G"], "FID"), (names["A"], "FID"))),
        ),
        notes=f"Each at the best of the EMA lengths of edm2/fig5a; A at the paper's scale at its traditional average. {MACS}",
    )  # fmt: skip


PRIOR_512 = {  # FID without and with guidance, M parameters, gigaflops, evaluations
    "ADM": (23.24, 7.72, 559, 1983, 250),
    "DiT-XL/2": (12.03, 3.04, 675, 525, 250),
    "ADM-U": (9.96, 3.85, 730, 2813, 250),
    "RIN": (3.95, None, 320, 415, 1000),
    "U-ViT, L": (3.54, 3.02, 2455, 555, 256),
    "VDM++": (2.99, 2.65, 2455, 555, 256),
    "StyleGAN-XL": (None, 2.41, 168, 2067, 1),
}


def table_2() -> Table:
    columns = (Column("FID"), Column("FID, guided"), *SIZE)
    names = [column.name for column in columns]
    prior = [
        Row(name, {c: v for c, v in zip(names, values, strict=True) if v is not None})
        for name, values in PRIOR_512.items()
    ]
    ours = [
        Row(f"EDM2-{size}", {"FID": plain.distance, "FID, guided": guided.distance, **size_of(COST_512[size])})
        for size, (plain, guided) in FID_512.items()
    ]
    return Table(
        name="edm2/2",
        title="Sizes of EDM2 on ImageNet-512",
        source="Karras et al. 2024, Table 2",
        columns=columns,
        rows=(*prior, *ours),
        scales=scales(lambda g: (*distance_groups(g, "FID"), count_groups(g)), {"tiny": "4 minutes", "small": "an hour", "paper": "3 to 10 days on 32 A100"}),
        claims=(
            Claim("Larger networks are better without guidance", claims.each_improves("FID", list(size_groups(PAPER)))),
            Claim("Larger networks are better with guidance", claims.each_improves("FID, guided", list(size_groups(PAPER)))),
            Claim("Guidance by a small network without labels helps", claims.improves_on(("EDM2-S", "FID, guided"), ("EDM2-S", "FID"))),
            Claim("EDM2-S without guidance beats all that came before", claims.improves_on(("EDM2-S", "FID"), ("VDM++", "FID"))),
        ),
        notes=f"Guided by EDM2-XS without labels, at its length. Of VDM++, U-ViT and StyleGAN-XL some sizes are the paper's estimates. {MACS}",
    )  # fmt: skip


PRIOR_64 = {  # FID and evaluations, deterministic and stochastic; M parameters, gigaflops
    "ADM": (None, None, 2.07, 250, 296, 110),
    "ADM + EDM sampling": (2.66, 79, 1.57, 511, 296, 110),
    "ADM + EDM training": (2.22, 79, 1.36, 511, 296, 110),
    "VDM++": (None, None, 1.43, 511, 296, 110),
    "RIN": (None, None, 1.23, 1000, 281, 106),
}


def table_3() -> Table:
    columns = (
        Column("FID"),
        Column("NFE", None),
        Column("FID, stochastic"),
        Column("NFE, stochastic", None),
        *SIZE[:2],
    )
    names = [column.name for column in columns]
    prior = [
        Row(name, {c: v for c, v in zip(names, values, strict=True) if v is not None})
        for name, values in PRIOR_64.items()
    ]

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        if g is PAPER:
            trained = {size: Training(f"edm2-img64-{size.lower()}") for size in FID_64}
            ways = {f"EDM2-{size}": [Measurement(trained[size], at_ema(FID_64[size].sigma_rel))] for size in FID_64}
        else:
            trained = {size: g.sizes[size] for size in g.sizes if size in FID_64}
            ways = {
                f"EDM2-{size}": [Measurement(t, at_ema(length)) for length in g.sigma_rels]
                for size, t in trained.items()
            }
        rows = {f"EDM2-{size}": Measurement(t) for size, t in trained.items()}
        return (*g.alternatives({"FID": g.metric}, ways), ColumnGroup(COUNTED, rows, method="counts"))

    return Table(
        name="edm2/3",
        title="Sizes of EDM2 on ImageNet-64, in pixels",
        source="Karras et al. 2024, Table 3",
        columns=columns,
        rows=(*prior, *(Row(f"EDM2-{size}", {"FID": best.distance, **size_of(COST_64[size])}) for size, best in FID_64.items())),
        scales=scales(parts, {"tiny": "2 minutes", "paper": "3 to 8 days on 32 A100"}),
        claims=(
            Claim("Larger networks are better, up to L", claims.each_improves("FID", [f"EDM2-{size}" for size in FID_64 if size != "XL"])),
            Claim("EDM2-S beats what came before among deterministic samplers", claims.improves_on(("EDM2-S", "FID"), ("ADM + EDM training", "FID"))),
            Claim("L saturates the data set: XL is no better", claims.within(("EDM2-XL", "FID"), ("EDM2-L", "FID"), 0.05)),
        ),
        notes="At the tiny scale these are edm2/2's sizes: the digits are pixels too.",
    )  # fmt: skip


def table_4() -> Table:
    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        network, w = g.sizes[g.largest], g.guidances[1]
        lengths = {size: (TABLE_4[size][0].sigma_rel,) if g is PAPER else g.sigma_rels[::2] for size in g.guides}
        ways = {size: [g.guided(network, length, w, by=size) for length in lengths[size]] for size in g.guides}
        costs = {size: g.guided(network, lengths[size][0], w, by=size) for size in g.guides}
        return (
            *g.alternatives({"FID": g.metric}, ways),
            ColumnGroup({"Gparams": "params_both", "Tflops": "sampling"}, costs, method="counts"),
        )

    return Table(
        name="edm2/4",
        title="Size of the network that guides",
        source="Karras et al. 2024, Table 4",
        columns=(Column("FID"), Column("Gparams", None), Column("Tflops", None)),
        rows=tuple(
            Row(size, {"FID": best.distance, "Gparams": params, "Tflops": flops})
            for size, (best, params, flops) in TABLE_4.items()
        ),
        scales=scales(parts, {"tiny": "3 minutes", "paper": "3 to 10 days on 32 A100"}, {"tiny": "The digits; guides of 16, 32 and 48 channels for a network of 48, guidance 1.25."}),
        claims=(
            Claim("A larger network without labels guides no better: S", claims.within(("XS", "FID"), ("S", "FID"), 0.05)),
            Claim("A larger network without labels guides no better: M", claims.within(("XS", "FID"), ("M", "FID"), 0.05)),
            Claim("A guide of its own size is worse than XS", claims.improves_on(("XS", "FID"), ("XXL", "FID"))),
        ),
        notes="Guidance 1.2; EMA length of both networks 1.5 % with XS, S and M, 2 % with the others, as published.",
    )  # fmt: skip


def table_5() -> Table:
    return Table(
        name="edm2/5",
        title="Sizes of EDM2 on ImageNet-512, by DINOv2's features",
        source="Karras et al. 2024, Table 5",
        columns=(Column("FD"), Column("FD, guided"), *SIZE),
        rows=tuple(
            Row(f"EDM2-{size}", {"FD": plain.distance, "FD, guided": guided.distance, **size_of(COST_512[size])})
            for size, (plain, guided) in DINO_512.items()
        ),
        scales=scales(
            lambda g: (*distance_groups(g, "FD", second=True), count_groups(g)),
            {"tiny": "4 minutes", "paper": "3 to 10 days on 32 A100"},
            {"tiny": "The digits; in the place of a second space of features the share that is read as another digit."},
        ),
        claims=(
            Claim("Larger networks are better without guidance", claims.each_improves("FD", list(size_groups(PAPER)))),
            Claim("Larger networks are better with guidance", claims.each_improves("FD, guided", list(size_groups(PAPER)))),
            Claim("Guidance helps", claims.improves_on(("EDM2-S", "FD, guided"), ("EDM2-S", "FD"))),
        ),
        notes="Lengths and guidance are other ones than FID's (Table 6).",
    )  # fmt: skip


def table_6() -> Table:
    """Both data sets; of ImageNet-64 the paper has neither guidance nor DINOv2's distance."""
    cost_512 = {"Mparams": "params", "Gflops": "gmacs", "Training, Zflops": "training", "Sampling, Tflops": "sampling"}
    titles = [*cost_512, "Guided, Tflops"]

    def renamed(part: ColumnGroup) -> ColumnGroup:
        return part._replace(rows={row.replace("EDM2-", "512 "): how for row, how in part.rows.items()})

    def parts(g: Setup) -> tuple[ColumnGroup, ...]:
        scored = [
            renamed(part) for part in (*distance_groups(g, "FID"), *distance_groups(g, "FD of DINOv2", second=True))
        ]
        rows = {f"512 {size}": Measurement(g.sizes[size]) for size in g.sizes}
        guided = {f"512 {size}": g.guided(g.sizes[size], 0.1, 1.2) for size in g.sizes}
        found = [
            *scored,
            ColumnGroup(cost_512, rows, method="counts"),
            ColumnGroup({"Guided, Tflops": "sampling"}, guided, method="counts"),
        ]
        if g is PAPER:
            trained = {size: Training(f"edm2-img64-{size.lower()}") for size in FID_64}
            lengths = {f"64 {size}": Measurement(t, at_ema(FID_64[size].sigma_rel)) for size, t in trained.items()}
            found += [
                g.metric_group({"FID": g.metric}, lengths),
                ColumnGroup(cost_512, {f"64 {s}": Measurement(t) for s, t in trained.items()}, method="counts"),
            ]
        return tuple(found)

    def costs(cost: Cost) -> dict[str, float]:
        return {title: value for title, value in zip(titles, cost, strict=True) if value is not None}

    large = [
        Row(
            f"512 {s}",
            {
                **costs(COST_512[s]),
                "FID": FID_512[s][0].distance,
                "FID, guided": FID_512[s][1].distance,
                "FD of DINOv2": DINO_512[s][0].distance,
                "FD of DINOv2, guided": DINO_512[s][1].distance,
            },
        )
        for s in FID_512
    ]
    small = [Row(f"64 {s}", {**costs(COST_64[s]), "FID": FID_64[s].distance}) for s in FID_64]
    scored = [Column(name) for name in ("FID", "FID, guided", "FD of DINOv2", "FD of DINOv2, guided")]
    return Table(
        name="edm2/6",
        title="Costs and results of all sizes",
        source="Karras et al. 2024, Table 6",
        columns=(*(Column(title, None) for title in titles), *scored),
        rows=(*large, *small),
        scales=scales(parts, {"tiny": "5 minutes", "paper": "3 to 10 days on 32 A100"}),
        claims=(
            Claim("Larger networks are better", claims.each_improves("FID", [row.name for row in large])),
            Claim("Larger networks are better by DINOv2", claims.each_improves("FD of DINOv2", [row.name for row in large])),
            Claim("Guidance helps", claims.improves_on(("512 S", "FID, guided"), ("512 S", "FID"))),
            Claim("Guidance helps by DINOv2", claims.improves_on(("512 S", "FD of DINOv2, guided"), ("512 S", "FD of DINOv2"))),
        ),
        notes=f"Of its rows those that a network and its results decide; speed and energy: gesso train --estimate. {MACS}",
    )  # fmt: skip


TABLES: tuple[Callable[[], Table], ...] = (table_1, table_2, table_3, table_4, table_5, table_6)
