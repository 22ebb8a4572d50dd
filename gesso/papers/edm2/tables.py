"""Tables 1 to 6 of Karras et al. 2024."""

from collections.abc import Callable

from gesso.papers.edm2.setups import LADDER_COST, PAPER_SETUP, SIZES_COST, Setup, at_ema, make_scales
from gesso.published import read_table
from gesso.published.edm2 import COST_64, COST_512, DINO_512, FID_64, FID_512, TABLE_4, Cost
from gesso.recipes.edm2 import LADDER_CONFIGS
from gesso.reproduce.claims import close, improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Table, Training

SIZE_COLUMNS = (Column("Mparams", None), Column("Gflops", None), Column("NFE", None))
SIZE_VALUES = {"Mparams": "params", "Gflops": "gmacs", "NFE": "nfe"}
MACS_NOTE = (
    "Gflops are multiply-accumulates; our count leaves out weight normalization and elementwise operations, .9 to 1.4 "
    "%."
)
NUM_EVALUATIONS = 63
"""Evaluations of a sample: 32 steps of Heun's method."""
CONFIG_NAMES = {config: f"CONFIG {config}" for config in LADDER_CONFIGS}
PAPER_ROWS = [f"EDM2-{size}" for size in FID_512]


def size_rows(setup: Setup) -> dict[str, str]:
    """Return the sizes of EDM2 by row."""
    return {f"EDM2-{size}": size for size in setup.sizes}


def distance_groups(setup: Setup, column: str, use_second_metric: bool = False) -> tuple[ColumnGroup, ...]:
    """Return the metric of all sizes without and with guidance, each at its best EMA length."""
    metric = setup.second_metric if use_second_metric else setup.metric
    groups: list[ColumnGroup] = []
    for guided in (False, True):
        options = {
            row: [
                setup.measure_guided(setup.sizes[size], sigma_rel, w)
                for sigma_rel, w in setup.candidates(size, guided, use_second_metric)
            ]
            for row, size in size_rows(setup).items()
        }
        groups += setup.best_of_groups({f"{column}, guided" if guided else column: metric}, options)
    return tuple(groups)


def count_group(setup: Setup) -> ColumnGroup:
    """Return the counts of all sizes."""
    rows = {row: Measurement(setup.sizes[size]) for row, size in size_rows(setup).items()}
    return ColumnGroup(SIZE_VALUES, rows, method="counts")


def published_size(cost: Cost) -> dict[str, float]:
    """Return the published counts of a network."""
    return {"Mparams": cost.params, "Gflops": cost.gflops, "NFE": NUM_EVALUATIONS}


def table_1() -> Table:
    """Return Table 1."""

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        options = {
            name: [setup.at_ema(config, sigma_rel) for sigma_rel in setup.sigma_rels_of(config)]
            for config, name in CONFIG_NAMES.items()
        }
        costs = {name: Measurement(setup.configs[config]) for config, name in CONFIG_NAMES.items()}
        return (
            *setup.best_of_groups({"FID": setup.metric}, options),
            ColumnGroup({"Mparams": "params", "Gflops": "gmacs"}, costs, method="counts"),
        )

    def step(config: str, previous: str, text: str) -> Claim:
        cell, baseline = (CONFIG_NAMES[config], "FID"), (CONFIG_NAMES[previous], "FID")
        return improvement(f"{text} ({config} after {previous})", cell, baseline)

    return Table(
        name="edm2/1",
        title="From the baseline to EDM2, change by change",
        source="Karras et al. 2024, Table 1",
        columns=(Column("FID"), *SIZE_COLUMNS[:2]),
        rows=tuple(
            Row(CONFIG_NAMES[config], {"FID": c.fid, "Mparams": c.cost.params, "Gflops": c.cost.gflops})
            for config, c in LADDER_CONFIGS.items()
        ),
        scales=make_scales(groups, LADDER_COST),
        claims=(
            step("B", "A", "Tuned hyperparameters and the learned uncertainty help"),
            step("C", "B", "A streamlined architecture helps"),
            step("D", "C", "Magnitude-preserving layers help"),
            step("E", "D", "A controlled effective learning rate helps"),
            step("F", "E", "Removing group normalizations helps"),
            step("G", "F", "Magnitude-preserving fixed functions help"),
            improvement("All changes together help", ("CONFIG G", "FID"), ("CONFIG A", "FID")),
        ),
        notes="Each at the best of the EMA lengths of edm2/fig5a; A at paper scale at its traditional EMA. "
        + MACS_NOTE,
    )


PRIOR_WORK_512, PRIOR_WORK_64 = read_table("edm2", "table_2"), read_table("edm2", "table_3")


def table_2() -> Table:
    """Return Table 2."""
    published = [
        Row(f"EDM2-{size}", {"FID": plain.distance, "FID, guided": guided.distance, **published_size(COST_512[size])})
        for size, (plain, guided) in FID_512.items()
    ]
    return Table(
        name="edm2/2",
        title="Sizes of EDM2 on ImageNet-512",
        source="Karras et al. 2024, Table 2",
        columns=(Column("FID"), Column("FID, guided"), *SIZE_COLUMNS),
        rows=(*(Row(name, numbers) for name, numbers in PRIOR_WORK_512.items()), *published),
        scales=make_scales(
            lambda setup: (*distance_groups(setup, "FID"), count_group(setup)),
            {"tiny": "4 minutes", "small": "an hour", "paper": "3 to 10 days on 32 A100"},
        ),
        claims=(
            Claim("Larger networks are better without guidance", lambda v: v.each_improves("FID", PAPER_ROWS)),
            Claim("Larger networks are better with guidance", lambda v: v.each_improves("FID, guided", PAPER_ROWS)),
            improvement(
                "Guidance by a small network without labels helps", ("EDM2-S", "FID, guided"), ("EDM2-S", "FID")
            ),
            improvement("EDM2-S without guidance is better than all prior work", ("EDM2-S", "FID"), ("VDM++", "FID")),
        ),
        notes="Guided by EDM2-XS without labels, at the same EMA length. Some sizes of VDM++, U-ViT and StyleGAN-XL "
        f"are the paper's estimates. {MACS_NOTE}",
    )


def table_3() -> Table:
    """Return Table 3."""
    columns = (
        Column("FID"),
        Column("NFE", None),
        Column("FID, stochastic"),
        Column("NFE, stochastic", None),
        *SIZE_COLUMNS[:2],
    )
    published = [
        Row(f"EDM2-{size}", {"FID": best.distance, **published_size(COST_64[size])}) for size, best in FID_64.items()
    ]

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        if setup is PAPER_SETUP:
            trainings = {size: Training(f"edm2-img64-{size.lower()}") for size in FID_64}
            sigma_rels: dict[str, tuple[float, ...]] = {size: (best.sigma_rel,) for size, best in FID_64.items()}
        else:
            trainings = {size: setup.sizes[size] for size in setup.sizes if size in FID_64}
            sigma_rels = dict.fromkeys(trainings, setup.sigma_rels)
        options = {
            f"EDM2-{size}": [Measurement(training, at_ema(sigma_rel)) for sigma_rel in sigma_rels[size]]
            for size, training in trainings.items()
        }
        rows = {f"EDM2-{size}": Measurement(training) for size, training in trainings.items()}
        return (
            *setup.best_of_groups({"FID": setup.metric}, options),
            ColumnGroup(SIZE_VALUES, rows, method="counts"),
        )

    return Table(
        name="edm2/3",
        title="Sizes of EDM2 on ImageNet-64, in pixels",
        source="Karras et al. 2024, Table 3",
        columns=columns,
        rows=(*(Row(name, numbers) for name, numbers in PRIOR_WORK_64.items()), *published),
        scales=make_scales(groups, {"tiny": "2 minutes", "paper": "3 to 8 days on 32 A100"}),
        claims=(
            Claim(
                "Larger networks are better, up to L",
                lambda v: v.each_improves("FID", [f"EDM2-{size}" for size in FID_64 if size != "XL"]),
            ),
            improvement(
                "EDM2-S is better than prior work with deterministic samplers",
                ("EDM2-S", "FID"),
                ("ADM + EDM training", "FID"),
            ),
            Claim(
                "L saturates the data set: XL is no better",
                lambda v: close(v["EDM2-XL", "FID"], v["EDM2-L", "FID"], 0.05),
            ),
        ),
        notes="At the tiny scale these are the sizes of edm2/2: the digits are pixels too.",
    )


def table_4() -> Table:
    """Return Table 4."""

    def groups(setup: Setup) -> tuple[ColumnGroup, ...]:
        network, w = setup.sizes[setup.largest], setup.guidances[1]
        sigma_rels = {
            size: (TABLE_4[size].best.sigma_rel,) if setup is PAPER_SETUP else setup.sigma_rels[::2]
            for size in setup.guides
        }
        options = {
            size: [setup.measure_guided(network, sigma_rel, w, size) for sigma_rel in sigma_rels[size]]
            for size in setup.guides
        }
        costs = {size: measurements[0] for size, measurements in options.items()}
        values = {"Gparams": "params_with_guide", "Tflops": "sampling_macs"}
        return (*setup.best_of_groups({"FID": setup.metric}, options), ColumnGroup(values, costs, method="counts"))

    return Table(
        name="edm2/4",
        title="Size of the network that guides",
        source="Karras et al. 2024, Table 4",
        columns=(Column("FID"), Column("Gparams", None), Column("Tflops", None)),
        rows=tuple(
            Row(size, {"FID": result.best.distance, "Gparams": result.gparams, "Tflops": result.tflops})
            for size, result in TABLE_4.items()
        ),
        scales=make_scales(
            groups,
            {"tiny": "3 minutes", "paper": "3 to 10 days on 32 A100"},
            {"tiny": "The digits; guides of 16, 32 and 48 channels for a network of 48, guidance 1.2."},
        ),
        claims=(
            Claim(
                "A larger network without labels guides no better: S",
                lambda v: close(v["XS", "FID"], v["S", "FID"], 0.05),
            ),
            Claim(
                "A larger network without labels guides no better: M",
                lambda v: close(v["XS", "FID"], v["M", "FID"], 0.05),
            ),
            improvement("A guide of the network's size is worse than XS", ("XS", "FID"), ("XXL", "FID")),
        ),
        notes="Guidance 1.2; EMA length of both networks 1.5 % with XS, S and M, 2 % with the others, as published.",
    )


def table_5() -> Table:
    """Return Table 5."""
    return Table(
        name="edm2/5",
        title="Sizes of EDM2 on ImageNet-512, by DINOv2's features",
        source="Karras et al. 2024, Table 5",
        columns=(Column("FD"), Column("FD, guided"), *SIZE_COLUMNS),
        rows=tuple(
            Row(f"EDM2-{size}", {"FD": plain.distance, "FD, guided": guided.distance, **published_size(COST_512[size])})
            for size, (plain, guided) in DINO_512.items()
        ),
        scales=make_scales(
            lambda setup: (*distance_groups(setup, "FD", use_second_metric=True), count_group(setup)),
            SIZES_COST,
            {"tiny": "The digits; FD is the share of samples that a classifier does not assign to their class."},
        ),
        claims=(
            Claim("Larger networks are better without guidance", lambda v: v.each_improves("FD", PAPER_ROWS)),
            Claim("Larger networks are better with guidance", lambda v: v.each_improves("FD, guided", PAPER_ROWS)),
            improvement("Guidance helps", ("EDM2-S", "FD, guided"), ("EDM2-S", "FD")),
        ),
        notes="EMA lengths and guidance differ from those of FID (Table 6).",
    )


COST_VALUES = {
    "Mparams": "params",
    "Gflops": "gmacs",
    "Training, Zflops": "training_macs",
    "Sampling, Tflops": "sampling_macs",
}
GUIDED_COST = "Guided, Tflops"


def table_6_groups(setup: Setup) -> tuple[ColumnGroup, ...]:
    """Return the measurements of Table 6."""
    distances = (
        *distance_groups(setup, "FID"),
        *distance_groups(setup, "FD of DINOv2", use_second_metric=True),
    )
    plain = {f"512 {size}": Measurement(training) for size, training in setup.sizes.items()}
    guided = {f"512 {size}": setup.measure_guided(training, 0.1, 1.2) for size, training in setup.sizes.items()}
    groups = [
        *(
            group._replace(rows={row.replace("EDM2-", "512 "): m for row, m in group.rows.items()})
            for group in distances
        ),
        ColumnGroup(COST_VALUES, plain, method="counts"),
        ColumnGroup({GUIDED_COST: "sampling_macs"}, guided, method="counts"),
    ]
    if setup is PAPER_SETUP:
        trainings = {size: Training(f"edm2-img64-{size.lower()}") for size in FID_64}
        at_best = {f"64 {size}": Measurement(t, at_ema(FID_64[size].sigma_rel)) for size, t in trainings.items()}
        groups += [
            setup.metric_group({"FID": setup.metric}, at_best),
            ColumnGroup(COST_VALUES, {f"64 {s}": Measurement(t) for s, t in trainings.items()}, method="counts"),
        ]
    return tuple(groups)


def table_6() -> Table:
    """Return Table 6, both data sets; for ImageNet-64 the paper has neither guidance nor the distance of DINOv2."""
    titles = [*COST_VALUES, GUIDED_COST]

    def costs(cost: Cost) -> dict[str, float]:
        return {title: value for title, value in zip(titles, cost, strict=True) if value is not None}

    rows_512 = [
        Row(
            f"512 {size}",
            {
                **costs(COST_512[size]),
                "FID": fid.distance,
                "FID, guided": guided_fid.distance,
                "FD of DINOv2": DINO_512[size][0].distance,
                "FD of DINOv2, guided": DINO_512[size][1].distance,
            },
        )
        for size, (fid, guided_fid) in FID_512.items()
    ]
    rows_64 = [Row(f"64 {size}", {**costs(COST_64[size]), "FID": fid.distance}) for size, fid in FID_64.items()]
    sizes = [row.name for row in rows_512]
    distances = [Column(name) for name in ("FID", "FID, guided", "FD of DINOv2", "FD of DINOv2, guided")]
    return Table(
        name="edm2/6",
        title="Costs and results of all sizes",
        source="Karras et al. 2024, Table 6",
        columns=(*(Column(title, None) for title in titles), *distances),
        rows=(*rows_512, *rows_64),
        scales=make_scales(table_6_groups, {"tiny": "5 minutes", "paper": "3 to 10 days on 32 A100"}),
        claims=(
            Claim("Larger networks are better", lambda v: v.each_improves("FID", sizes)),
            Claim("Larger networks are better by FD of DINOv2", lambda v: v.each_improves("FD of DINOv2", sizes)),
            improvement("Guidance helps", ("512 S", "FID, guided"), ("512 S", "FID")),
            improvement("Guidance helps by FD of DINOv2", ("512 S", "FD of DINOv2, guided"), ("512 S", "FD of DINOv2")),
        ),
        notes="Rows of the table that follow from a network and its results; for speed and energy see "
        f"gesso train --estimate. {MACS_NOTE}",
    )


TABLES: tuple[Callable[[], Table], ...] = (table_1, table_2, table_3, table_4, table_5, table_6)
