"""Tables A3 and A5 of Berrada et al. 2024: the effect of each change, and the recommendations."""

from collections.abc import Mapping
from itertools import pairwise

from gesso.papers.berrada2024.common_settings import CC12M_VAL, COCO
from gesso.papers.berrada2024.networks import CLASS_COLUMNS, COLUMNS_256, COLUMNS_512
from gesso.papers.berrada2024.paper_scale import cc12m_training, in1k_training, published_rows
from gesso.recipes.imagenet import CONTROL
from gesso.reproduce.claims import improvement
from gesso.reproduce.schema import (
    SCALES,
    ChecklistItem,
    Column,
    ColumnGroup,
    Measurement,
    Scale,
    Settings,
    Table,
    Training,
)


def table_a3_groups(ablation_256: list[str], ablation_512: list[str]) -> tuple[ColumnGroup, ...]:
    """Return the measurements of Table A3; the arguments are its rows at 256 and at 512."""
    dit, mmdit, best = (in1k_training(net, 256) for net in ("dit", "mmdit", "berrada"))
    classes = dict(zip(ablation_256, (dit, mmdit, Training("in1k-256-mmdit", CONTROL), best, best), strict=False))
    disentangled = cc12m_training("berrada", 256, "semantic.padding=zero", "control.variables=[crop,size]")
    flips, noisy = cc12m_training("berrada", 256, "semantic.padding=zero"), cc12m_training("berrada", 256)
    text = dict(zip(ablation_256[3:], (disentangled, disentangled, flips, noisy), strict=True))
    keep_noise, extrapolate = ("process.resolution_scale=1", "init.noise_levels=keep"), "init.pos_embed=extrapolated"
    local = Training("cc12m-256-berrada")
    trainings_512 = (
        Training("cc12m-512-berrada", keep_noise[:1]),
        Training("cc12m-512-berrada", (*keep_noise, extrapolate), noisy),
        Training("cc12m-512-berrada", (*keep_noise, extrapolate), local),
        Training("cc12m-512-berrada", keep_noise, local),
        cc12m_training("berrada", 512),
    )
    text_512 = dict(zip(ablation_512, trainings_512, strict=True))
    without_control_guidance = ablation_256[3]

    def group(
        column: str, metric: str, trainings: Mapping[str, Training], settings: Settings, protocol: str
    ) -> ColumnGroup:
        rows = {
            row: Measurement(t, ("sample.control_guidance=1",) if row == without_control_guidance else ())
            for row, t in trainings.items()
        }
        return ColumnGroup({column: metric}, rows, settings=settings, protocol=protocol)

    return (
        group(CLASS_COLUMNS[0], "fid", classes, (), "berrada"),
        group(COLUMNS_256["FID"], "fid", text, CC12M_VAL, "berrada"),
        group(COLUMNS_256["CLIP"], "clip", text, COCO, "berrada-coco"),
        group(COLUMNS_512["FID"], "fid", text_512, CC12M_VAL, "berrada"),
        group(COLUMNS_512["CLIP"], "clip", text_512, COCO, "berrada-coco"),
    )


def table_a3() -> Table:
    """Return Table A3."""
    rows_256, rows_512 = published_rows("table_a3_256"), published_rows("table_a3_512")
    ablation_256, ablation_512 = ([row.name for row in rows] for rows in (rows_256, rows_512))
    fid_columns = (CLASS_COLUMNS[0], COLUMNS_256["FID"], COLUMNS_512["FID"])
    clip_columns = (COLUMNS_256["CLIP"], COLUMNS_512["CLIP"])
    names = (CLASS_COLUMNS[0], fid_columns[1], clip_columns[0], fid_columns[2], clip_columns[1])
    return Table(
        name="berrada/A3",
        title="Each change, on top of those above it",
        source="Berrada et al. 2024, Table A3",
        columns=tuple(Column(name, lower_is_better=name not in clip_columns) for name in names),
        rows=(*rows_256, *rows_512),
        scales={"paper": Scale(table_a3_groups(ablation_256, ablation_512), "two weeks on 16 A100")},
        claims=tuple(
            improvement(f"Adding {after.removeprefix('+ ')} lowers {column}", (after, column), (before, column))
            for rows, column in zip((ablation_256[:5], ablation_256[3:], ablation_512), fid_columns, strict=True)
            for before, after in pairwise(rows)
        ),
        notes="mmDiT's FID is 1.71 in Table 1 and 1.81 here; CLIP at equal FID differs from that of Table 1 too; 7.25 "
        "is the number of Table 4a at 256. At other scales each change has its own table.",
    )


def table_a5() -> Table:
    """Return Table A5."""
    items = (
        ChecklistItem("How to condition on text?", "self-attention over both", "berrada/1", 5),
        ChecklistItem("Use control conditioning?", "yes", "berrada/2a", 2),
        ChecklistItem("Weight it by a power cosine?", "yes", "berrada/2a", 0),
        ChecklistItem("A separate guidance scale for control?", "yes", "berrada/fig7", 1),
        ChecklistItem("Noisy copies in the padding of text?", "yes", "berrada/3", 0),
        ChecklistItem("Pre-train on smaller data sets?", "yes", "berrada/4a", 0),
        ChecklistItem("Pre-train on data of the same size and another distribution?", "yes", "berrada/4b", 2),
        ChecklistItem("Pre-train until convergence?", "diminishing returns after a while", "berrada/4b", 0),
        ChecklistItem("Rescale the noise levels?", "yes", "berrada/fig8", 1),
        ChecklistItem("Resample the grid of positions?", "yes", "berrada/fig8", 0),
        ChecklistItem("Pre-train at smaller resolution?", "yes", "berrada/4c", 1),
        ChecklistItem("Crop more at the smaller resolution?", "yes", "berrada/fig8", 2),
    )
    return Table(
        name="berrada/A5",
        title="Recommendations of the paper, with verdicts",
        source="Berrada et al. 2024, Table A5",
        columns=(),
        rows=(),
        scales={scale: Scale((), "no cost of its own") for scale in SCALES},
        checklist=items,
        notes="The verdicts are those of claims of other tables, as far as these are measured at this scale.",
    )


TABLES = (table_a3, table_a5)
