"""Pictures of a figure: its columns as curves over the rows' x, with their spread over seeds; samples where it shows some."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gesso.report import figures
from gesso.tables import grids, words
from gesso.tables.plan import Job
from gesso.tables.results import Result
from gesso.tables.table import Row

WIDE = 30
"""ratio of the largest to the smallest, above which an axis is logarithmic"""


class Drawn(NamedTuple):
    """A matplotlib figure, and what it shows."""

    figure: Any
    caption: str


CAPTION = "Mean over seeds; the band is their standard deviation, a cross at the upper edge where all diverged."


def pictures(result: Result, todo: Sequence[Job]) -> list[Drawn]:
    """Curves, then samples."""
    caption = CAPTION if len(result.seeds) > 1 else ""
    return [*(Drawn(figure, caption) for figure in curves(result, todo)), *samples(result, todo)]


def samples(result: Result, todo: Sequence[Job]) -> list[Drawn]:
    """Of the first seed, where a figure shows some."""
    shown = [job for job in todo if job.part.by == "pictures" and job.seed == result.seeds[0]]
    return [Drawn(_image(grids.grid_of(job)), job.row) for job in shown if grids.grid_of(job).is_file()]


def _image(path: Path) -> Any:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    figure, axes = figures.started((figures.SIZE[0], figures.SIZE[0] * pixels.shape[0] / pixels.shape[1]))
    axes.imshow(pixels, interpolation="none")
    axes.set_axis_off()
    return figure


def curves(result: Result, todo: Sequence[Job]) -> list[Any]:
    """One matplotlib figure for each measure among the columns; none for a table, or where no curve has two points."""
    if not result.table.x:
        return []
    groups: dict[str, dict[str, str]] = {}
    for job in todo:
        for column, name in job.part.columns.items():
            groups.setdefault(name if job.part.by == "scores" else job.part.by, {})[column] = name
    drawn = [_drawn(result, list(columns), _label(by, columns.values())) for by, columns in groups.items()]
    return [figure for figure in drawn if figure is not None]


def _label(by: str, names: Iterable[str]) -> str:
    """What the columns of a measure are, where they are one number."""
    one = set(names)
    said = one.pop() if len(one) == 1 else by
    return words.SHORT.get(said, said.replace("_", " "))


def _drawn(result: Result, columns: Sequence[str], label: str) -> Any | None:
    """Numbers as they are; a cross at the upper edge where all seeds diverged."""
    rows = [(x, row.name) for row in result.table.rows if (x := _place(result, row)) is not None]
    curves = {
        c: [(x, result.cells[row, c]) for x, row in rows if result.cells[row, c].seeds]
        for c in columns
        if c != result.table.x
    }
    curves = {c: sorted(points, key=lambda point: point[0]) for c, points in curves.items() if points}
    if all(sum(math.isfinite(cell.mean) for _, cell in points) < 2 for points in curves.values()):
        return None
    figure, axes = figures.started()
    for i, (column, points) in enumerate(curves.items()):
        colour, dash = figures.stroke(i)
        x, mean = [x for x, _ in points], [cell.mean if math.isfinite(cell.mean) else math.nan for _, cell in points]
        reach = [cell.spread if cell.spread is not None else math.nan for _, cell in points]
        axes.plot(x, mean, dash, color=colour, lw=1.6, marker="o" if len(x) < 16 else None, ms=3.5, label=column)
        low, high = ([m + sign * r for m, r in zip(mean, reach, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        gone = [x for x, cell in points if math.isinf(cell.mean)]
        axes.plot(gone, [1.0] * len(gone), "x", color=colour, ms=6, transform=axes.get_xaxis_transform(), clip_on=False)
    if wide([x for points in curves.values() for x, _ in points]):
        axes.set_xscale("log")
    if wide([cell.mean for points in curves.values() for _, cell in points if math.isfinite(cell.mean)]):
        axes.set_yscale("log")
        figures.plain_ticks(axes)
    axes.set_xlabel(result.table.x, color=figures.INK)
    axes.set_ylabel(columns[0] if len(curves) == 1 else label, color=figures.INK)
    if len(curves) > 1:
        figures.legend(figure, axes)
    return figure


def _place(result: Result, row: Row) -> float | None:
    """Its x, or its number in the column that is the axis."""
    if row.x is not None:
        return row.x
    cell = result.cells.get((row.name, result.table.x))
    return cell.mean if cell and cell.finite else None


def wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= WIDE


def png(figure: Any, path: Any) -> None:
    figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})
