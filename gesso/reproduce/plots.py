"""Pictures of a figure: its columns as curves over the rows' x, with their spread over seeds; samples where it shows some."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gesso.report import figures
from gesso.reproduce import labels, sample_grids
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.results import TableResult
from gesso.reproduce.schema import Row

LOG_AXIS_RATIO = 30
"""ratio of the largest to the smallest, above which an axis is logarithmic"""


class Plot(NamedTuple):
    """A matplotlib figure, and what it shows."""

    figure: Any
    caption: str


CAPTION = "Mean over seeds; the band is their standard deviation, a cross at the upper edge where all diverged."


def make_plots(result: TableResult, jobs: Sequence[MeasurementJob]) -> list[Plot]:
    """Return the plots of a result: curves, then samples."""
    caption = CAPTION if len(result.seeds) > 1 else ""
    return [*(Plot(figure, caption) for figure in curve_plots(result, jobs)), *sample_plots(result, jobs)]


def sample_plots(result: TableResult, jobs: Sequence[MeasurementJob]) -> list[Plot]:
    """Return the sample grids of the first seed."""
    shown = [job for job in jobs if job.group.method == "sample_grid" and job.seed == result.seeds[0]]
    return [
        Plot(_image(sample_grids.sample_grid(job)), job.row) for job in shown if sample_grids.sample_grid(job).is_file()
    ]


def _image(path: Path) -> Any:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    figure, axes = figures.started((figures.SIZE[0], figures.SIZE[0] * pixels.shape[0] / pixels.shape[1]))
    axes.imshow(pixels, interpolation="none")
    axes.set_axis_off()
    return figure


def curve_plots(result: TableResult, jobs: Sequence[MeasurementJob]) -> list[Any]:
    """Return one matplotlib figure per measure; none for a table, or if no curve has two points."""
    if not result.table.x_axis:
        return []
    groups: dict[str, dict[str, str]] = {}
    for job in jobs:
        for column, name in job.group.columns.items():
            groups.setdefault(name if job.group.method == "metrics" else job.group.method, {})[column] = name
    plots = [
        _plotted_points(result, list(columns), _label(measure, columns.values())) for measure, columns in groups.items()
    ]
    return [figure for figure in plots if figure is not None]


def _label(measure: str, names: Iterable[str]) -> str:
    """Return the axis label of a measure: the value's name if all columns show the same value."""
    distinct = set(names)
    name = distinct.pop() if len(distinct) == 1 else measure
    return labels.SHORT_LABELS.get(name, name.replace("_", " "))


def _plotted_points(result: TableResult, columns: Sequence[str], label: str) -> Any | None:
    """Numbers as they are; a cross at the upper edge where all seeds diverged."""
    rows = [(x, row.name) for row in result.table.rows if (x := _x_position(result, row)) is not None]
    curves = {
        c: [(x, result.cells[row, c]) for x, row in rows if result.cells[row, c].by_seed]
        for c in columns
        if c != result.table.x_axis
    }
    curves = {c: sorted(points, key=lambda point: point[0]) for c, points in curves.items() if points}
    if all(sum(math.isfinite(cell.mean) for _, cell in points) < 2 for points in curves.values()):
        return None
    figure, axes = figures.started()
    for i, (column, points) in enumerate(curves.items()):
        colour, dash = figures.stroke(i)
        xs, mean = [x for x, _ in points], [cell.mean if math.isfinite(cell.mean) else math.nan for _, cell in points]
        reach = [cell.std if cell.std is not None else math.nan for _, cell in points]
        axes.plot(xs, mean, dash, color=colour, lw=1.6, marker="o" if len(xs) < 16 else None, ms=3.5, label=column)
        low, high = ([m + sign * r for m, r in zip(mean, reach, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
        gone = [x for x, cell in points if math.isinf(cell.mean)]
        axes.plot(gone, [1.0] * len(gone), "x", color=colour, ms=6, transform=axes.get_xaxis_transform(), clip_on=False)
    if needs_log_axis([x for points in curves.values() for x, _ in points]):
        axes.set_xscale("log")
    if needs_log_axis([cell.mean for points in curves.values() for _, cell in points if math.isfinite(cell.mean)]):
        axes.set_yscale("log")
        figures.plain_ticks(axes)
    axes.set_xlabel(result.table.x_axis, color=figures.INK)
    axes.set_ylabel(columns[0] if len(curves) == 1 else label, color=figures.INK)
    if len(curves) > 1:
        figures.legend(figure, axes)
    return figure


def _x_position(result: TableResult, row: Row) -> float | None:
    """Its x, or its number in the column that is the axis."""
    if row.x is not None:
        return row.x
    cell = result.cells.get((row.name, result.table.x_axis))
    return cell.mean if cell and cell.finite_values else None


def needs_log_axis(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_AXIS_RATIO


def save_png(figure: Any, path: Any) -> None:
    figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})
