"""Tables and figures of Berrada et al. 2024 on conditioning: 2a."""

from gesso.recipes.imagenet import ROWS
from gesso.tables import claims
from gesso.tables.table import Claim, Column, How, Part, Row, Scale, Table, Training

SCHEDULES = {  # by row, as the recipe table-2a's cells
    "not told": ("control.variables=[]",),
    "uniform": ("control.schedule=uniform",),
    **{f"cosine, alpha = {alpha}": (f"control.alpha={alpha}",) for alpha in (1, 2, 4, 8)},
}
TOLD = ("uniform", *(name for name in SCHEDULES if name.startswith("cosine")))
COARSE = ("data.source=digits-coarse", "control.variables=size", "train.total_images=100k", "train.snapshot_images=10k",
          "train.state_images=50k")  # fmt: skip
DIGITS = ("eval.scores=fd_digits,agreement", "eval.images=2000")


def table_2a() -> Table:
    trained = {row: Training("table-2a", said) for row, said in SCHEDULES.items()}
    tiny = {row: Training("digits", (*COARSE, *said)) for row, said in SCHEDULES.items()}
    return Table(
        name="berrada/2a",
        title="Size as control, by its weight over time",
        source="Berrada et al. 2024, Table 2a",
        columns=(Column("FID"), Column("LPIPS"), Column("LPIPS/HR")),
        rows=tuple(
            Row(name, {c: cell.published[k] for c, k in (("FID", "fid"), ("LPIPS", "lpips"), ("LPIPS/HR", "lpips_hr")) if k in cell.published})
            for name, cell in zip(SCHEDULES, ROWS["table-2a"], strict=True)
        ),
        scales={
            "tiny": Scale(
                (
                    Part({"FID": "fd_digits"}, {row: How(t) for row, t in tiny.items()}, measure=DIGITS),
                    Part(
                        {"LPIPS": "told_digits"},
                        {row: How(tiny[row]) for row in TOLD},
                        measure=("eval.scores=told_digits", "eval.diversity_seeds=1000"),
                    ),
                ),
                cost="2 minutes",
                notes="Digits of which every second was shrunk to 4x4; told sizes 4x4 and 8x8.",
            ),
            "paper": Scale(
                (
                    Part({"FID": "fid"}, {row: How(t) for row, t in trained.items()}, protocol="berrada"),
                    Part({"LPIPS": "lpips", "LPIPS/HR": "lpips_hr"}, {row: How(trained[row]) for row in TOLD}, protocol="berrada-lpips"),
                ),
                cost="a day on 16 A100",
            ),
        },
        claims=(
            Claim("A cosine weight keeps what is shown when the size changes",
                  claims.better(("cosine, alpha = 8", "LPIPS"), ("uniform", "LPIPS"))),
            Claim("The later, the more", claims.better(("cosine, alpha = 4", "LPIPS"), ("cosine, alpha = 1", "LPIPS"))),
            Claim("Being told the size helps", claims.better(("uniform", "FID"), ("not told", "FID"))),
            Claim("The cosine costs no quality", claims.better(("cosine, alpha = 8", "FID"), ("uniform", "FID"))),
        ),
    )  # fmt: skip


TABLES = (table_2a,)
