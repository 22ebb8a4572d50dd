"""Table A2 and Figure A2 of Berrada et al. 2024: learning rate, batch size and momentum."""

from collections.abc import Sequence

from gesso.papers.berrada2024.common_settings import DIGITS_METRICS, IMAGENET_VAL, UNGUIDED, column_group
from gesso.papers.berrada2024.paper_scale import published_rows
from gesso.recipes.imagenet import table_a2_settings
from gesso.reproduce.claims import all_of, improvement
from gesso.reproduce.schema import Claim, Column, Row, Scale, Table, Training

LEARNING_RATES = ("1e-3", "5e-4", "1e-4", "1e-5", "1e-6")
TINY_LEARNING_RATES = dict(zip(LEARNING_RATES, ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5"), strict=True))
TINY_BATCH_SIZES = {64: 16, 512: 64, 2048: 256}
"""Batch sizes at the tiny scale by those of the paper."""
NUM_STEPS = 400
NETS = ("UNet", "DiT")


def training_at_rate(net: str, batch_size: int, lr: str, *settings: str) -> Training:
    """Return a training on digits of NUM_STEPS steps at a constant learning rate, without EMA."""
    total = NUM_STEPS * batch_size
    length = tuple(f"train.{name}={total}" for name in ("total_images", "snapshot_every", "checkpoint_every"))
    no_ema = ("ema.sigma_rels=[]", "ema.halflives=[1]", "sample.halflife=1")
    optim = (f"optim.lr={lr}", "optim.schedule=constant", "optim.warmup_images=0")
    return Training(f"digits-{net.lower()}", (f"train.batch_size={batch_size}", *length, *no_ema, *optim, *settings))


def paper_trainings(rows: Sequence[Row], lr: str) -> dict[str, Training]:
    """Return the trainings of Table A2 with a published number at a learning rate."""
    return {row.name: Training("table-a2", table_a2_settings(row.name, lr)) for row in rows if lr in row.published}


def table_a2() -> Table:
    """Return Table A2."""
    rows = published_rows("table_a2")
    tiny = {
        f"{net}, batch {batch_size}": (net, tiny_size)
        for net in NETS
        for batch_size, tiny_size in TINY_BATCH_SIZES.items()
    }

    return Table(
        name="berrada/A2",
        title="Learning rate and batch size, after equal steps",
        source="Berrada et al. 2024, Table A2",
        columns=tuple(map(Column, LEARNING_RATES)),
        rows=rows,
        scales={
            "tiny": Scale(
                tuple(
                    column_group(
                        {column: "fd_digits"},
                        {row: training_at_rate(net, batch_size, lr) for row, (net, batch_size) in tiny.items()},
                        (*DIGITS_METRICS, *UNGUIDED),
                    )
                    for column, lr in TINY_LEARNING_RATES.items()
                ),
                "4 minutes",
                f"{NUM_STEPS} steps; batches of 16, 64 and 256 for 64, 512 and 2048, learning rates of 1e-1 to 1e-5 "
                "for 1e-3 to 1e-6.",
            ),
            "paper": Scale(
                tuple(
                    column_group({lr: "fid"}, paper_trainings(rows, lr), protocol="berrada") for lr in LEARNING_RATES
                ),
                "3 days on 16 A100 for the largest batch",
            ),
        },
        claims=(
            Claim(
                "A larger batch is better after equal steps",
                lambda v: all_of(v[f"{net}, batch 2048", "1e-4"] < v[f"{net}, batch 64", "1e-4"] for net in NETS),
            ),
            Claim(
                "The highest learning rate is too high",
                lambda v: all_of(v[f"{net}, batch 2048", "5e-4"] < v[f"{net}, batch 2048", "1e-3"] for net in NETS),
            ),
            Claim(
                "The highest learning rate that does not diverge is the best at a large batch",
                lambda v: all_of(
                    v[f"{net}, batch 2048", "5e-4"] < v[f"{net}, batch 2048", lr]
                    for net in NETS
                    for lr in ("1e-4", "1e-5")
                ),
            ),
            improvement(
                "A small batch tolerates less: DiT at the second learning rate",
                ("DiT, batch 2048", "5e-4"),
                ("DiT, batch 64", "5e-4"),
            ),
        ),
        notes="Weights without EMA. The text gives two learning rates for Table 1, 1e-4 and 10 x 1e-4; every run of "
        "this table diverges at the second.",
    )


def figure_a2() -> Table:
    """Return Figure A2."""
    rows = published_rows("figure_a2")
    betas = {row.name: f"optim.betas={row.name.replace(' ', '')}" for row in rows}
    tiny = {row: training_at_rate("UNet", 256, "1e-3", setting) for row, setting in betas.items()}
    settings = table_a2_settings("UNet, batch 2048", "1e-4")
    paper = {row: Training("table-a2", (*settings, setting)) for row, setting in betas.items()}
    return Table(
        name="berrada/figA2",
        title="Adam's momentum",
        source="Berrada et al. 2024, Figure A2",
        columns=(Column("FID"),),
        rows=rows,
        scales={
            "tiny": Scale(
                (column_group({"FID": "fd_digits"}, tiny, (*DIGITS_METRICS, *UNGUIDED)),),
                "2 minutes",
                "The U-Net of Table A2 at its largest batch and third learning rate.",
            ),
            "paper": Scale(
                (column_group({"FID": "fid"}, paper, IMAGENET_VAL, "berrada-val"),),
                "a day on 16 A100",
            ),
        },
        claims=(improvement("(.9, .95) is better than (.9, .999)", ("0.9, 0.95", "FID"), ("0.9, 0.999", "FID")),),
        notes="The text has two numbers of the grid. Learning rate, batch size and weights without EMA are those of "
        "Table A2: our choice.",
    )


TABLES = (table_a2, figure_a2)
