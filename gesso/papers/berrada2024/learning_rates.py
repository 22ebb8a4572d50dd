"""Tables and figures of Berrada et al. 2024 on the optimizer: Tables A2, Figure A2."""

from gesso.papers.berrada2024.common_settings import DIGITS, IMAGENET_VAL, UNGUIDED, column_group
from gesso.recipes.imagenet import RATES_A2, TABLE_A2, table_a2_settings
from gesso.reproduce import claims
from gesso.reproduce.schema import DIVERGED, Claim, Column, Row, Scale, Table, Training

BATCHES = {"UNet": ("unet", (64, 512, 1024, 2048, 4096)), "DiT": ("dit", (64, 256, 512, 1024, 2048))}
TINY_BATCH = {64: 16, 512: 64, 2048: 256}
"""what stands for the paper's at tiny scale; the five rates are 1e-1 to 1e-5 there"""
STEPS = 400


def training_at_rate(net: str, batch: int, rate: str, *said: str) -> Training:
    """Digits in STEPS steps at a constant rate, the weights themselves."""
    total = STEPS * batch
    every = (
        f"train.batch_size={batch}",
        *(f"train.{name}={total}" for name in ("total_images", "snapshot_every", "checkpoint_every")),
    )
    weights = ("ema.sigma_rels=[]", "ema.halflives=[1]", "sample.halflife=1")
    return Training(
        f"digits-{net}",
        (*every, *weights, f"optim.lr={rate}", "optim.schedule=constant", "optim.warmup_images=0", *said),
    )


def numbers_a2(net: str, batch: int) -> dict[str, float]:
    read = {rate: value for rate, value in zip(RATES_A2, TABLE_A2[net, batch].split(), strict=True) if value != "-"}
    return {rate: DIVERGED if value == "x" else float(value) for rate, value in read.items()}


def table_a2() -> Table:
    cells = {f"{name}, batch {batch}": (net, batch) for name, (net, batches) in BATCHES.items() for batch in batches}
    rates = dict(zip(RATES_A2, ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5"), strict=True))
    tiny = {row: (net, TINY_BATCH[batch]) for row, (net, batch) in cells.items() if batch in TINY_BATCH}
    at = {(net, rate): (f"{net}, batch 2048", rate) for net in BATCHES for rate in RATES_A2}
    few = {net: f"{net}, batch 64" for net in BATCHES}

    def full(rate: str) -> dict[str, Training]:
        return {
            row: Training("table-a2", table_a2_settings(*cell, rate))
            for row, cell in cells.items()
            if rate in numbers_a2(*cell)
        }

    return Table(
        name="berrada/A2",
        title="Learning rate and batch size, after equal steps",
        source="Berrada et al. 2024, Table A2",
        columns=tuple(Column(rate) for rate in RATES_A2),
        rows=tuple(Row(row, numbers_a2(*cell)) for row, cell in cells.items()),
        scales={
            "tiny": Scale(
                tuple(
                    column_group({column: "fd_digits"}, {row: training_at_rate(*cell, rate) for row, cell in tiny.items()}, (*DIGITS, *UNGUIDED))
                    for column, rate in rates.items()
                ),
                "4 minutes", f"{STEPS} steps; batches of 16, 64 and 256 for 64, 512 and 2048, rates of 1e-1 to 1e-5 for 1e-3 to 1e-6.",
            ),
            "paper": Scale(
                tuple(column_group({rate: "fid"}, full(rate), protocol="berrada") for rate in RATES_A2),
                "3 days on 16 A100 for the largest batch",
            ),
        },
        claims=(
            Claim("A larger batch is better after equal steps",
                  claims.all_of(*(claims.improves_on(at[net, "1e-4"], (few[net], "1e-4")) for net in BATCHES))),
            Claim("The highest rate is too high", claims.all_of(*(claims.improves_on(at[net, "5e-4"], at[net, "1e-3"]) for net in BATCHES))),
            Claim("The highest rate that does not diverge is the best at a large batch",
                  claims.all_of(*(claims.improves_on(at[net, "5e-4"], at[net, rate]) for net in BATCHES for rate in ("1e-4", "1e-5")))),
            Claim("A small batch bears less: DiT at the second rate", claims.improves_on(at["DiT", "5e-4"], (few["DiT"], "5e-4"))),
        ),
        notes="Weights without EMA. The text's rate for Table 1 is both 1e-4 and 10 x 1e-4, at which every run here diverges.",
    )  # fmt: skip


def figure_a2() -> Table:
    published = {"0.9, 0.999": 26.43, "0.9, 0.99": None, "0.9, 0.95": 26.43 - 4.78}
    betas = {row: f"optim.betas={row.replace(' ', '')}" for row in published}
    full = table_a2_settings("unet", 2048, "1e-4")
    return Table(
        name="berrada/figA2",
        title="Adam's momentum",
        source="Berrada et al. 2024, Figure A2",
        columns=(Column("FID"),),
        rows=tuple(Row(row, {"FID": fid} if fid else {}) for row, fid in published.items()),
        scales={
            "tiny": Scale(
                (column_group({"FID": "fd_digits"}, {row: training_at_rate("unet", 256, "1e-3", said) for row, said in betas.items()}, (*DIGITS, *UNGUIDED)),),
                "2 minutes", "As Table A2's U-Net at its largest batch and third rate.",
            ),
            "paper": Scale(
                (column_group({"FID": "fid"}, {row: Training("table-a2", (*full, said)) for row, said in betas.items()}, IMAGENET_VAL, "berrada-val"),),
                "a day on 16 A100",
            ),
        },
        claims=(Claim("(.9, .95) is better than (.9, .999)", claims.improves_on(("0.9, 0.95", "FID"), ("0.9, 0.999", "FID"))),),
        notes="The text has two numbers of the grid. Rate, batch and weights without EMA are those of Table A2: our choice.",
    )  # fmt: skip


TABLES = (table_a2, figure_a2)
