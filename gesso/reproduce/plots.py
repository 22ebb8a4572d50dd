"""Plots of a figure: columns as curves over the x of the rows, with their spread over seeds, or grids of samples."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gesso.data.sources import decode
from gesso.errors import RunError, UnreadableImageError
from gesso.report import plotting
from gesso.reproduce import labels, sample_grids
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.results import CellNumbers, TableResult
from gesso.reproduce.schema import Row
from gesso.untrusted import read_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_AXIS_RATIO = 30
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
CURVES_CAPTION = "Mean over seeds; the band is their standard deviation, a cross at the upper edge where all diverged."


class Plot(NamedTuple):
    """A matplotlib figure and its caption."""

    figure: "Figure"
    caption: str


def make_plots(result: TableResult, jobs: Sequence[MeasurementJob]) -> list[Plot]:
    """Return the plots of a result: curves, then the sample grids of the first seed."""
    grids = [
        (sample_grids.grid_path(job), job.row)
        for job in jobs
        if job.group.method == "sample_grid" and job.seed == result.seeds[0]
    ]
    return [*curve_plots(result), *(Plot(_image_figure(path), row) for path, row in grids if path.is_file())]


def _image_figure(path: Path) -> "Figure":
    try:
        image, _ = decode.decode_image(read_bytes(path, follow_links=False), channels=3, upright=False)
    except (OSError, ValueError, UnreadableImageError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it, and run the same command again") from None
    pixels = np.asarray(image)
    width = plotting.FIGURE_SIZE[0]
    figure, axes = plotting.new_figure((width, width * pixels.shape[0] / pixels.shape[1]))
    axes.imshow(pixels, interpolation="none")
    axes.set_axis_off()
    return figure


def curve_plots(result: TableResult) -> list[Plot]:
    """Return one plot for each measured value; none for a table, or if no curve has two points."""
    if not result.table.x_axis:
        return []
    columns_of: dict[str, list[str]] = {}
    for column, label in result.columns.items():
        columns_of.setdefault(label.value, []).append(column)
    caption = CURVES_CAPTION if len(result.seeds) > 1 else ""
    figures = [
        _curve_figure(result, columns, labels.SHORT_LABELS.get(value) or labels.MEASURED_NAMES.get(value) or value)
        for value, columns in columns_of.items()
    ]
    return [Plot(figure, caption) for figure in figures if figure is not None]


def _curve_figure(result: TableResult, columns: Sequence[str], label: str) -> "Figure | None":
    """Plot columns over x; None if no curve has two points."""
    rows = [(x, row.name) for row in result.table.rows if (x := _x_position(result, row)) is not None]
    curves = {
        c: [(x, result.cells[row, c]) for x, row in rows if result.cells[row, c].by_seed]
        for c in columns
        if c != result.table.x_axis
    }
    curves = {c: sorted(points, key=lambda point: point[0]) for c, points in curves.items() if points}
    if all(sum(math.isfinite(cell.mean) for _, cell in points) < 2 for points in curves.values()):
        return None
    figure, axes = plotting.new_figure()
    for i, (column, points) in enumerate(curves.items()):
        _plot_curve(axes, points, result.columns[column].title, *plotting.line_style(i))
    if needs_log_axis([x for points in curves.values() for x, _ in points]):
        axes.set_xscale("log")
    if needs_log_axis([cell.mean for points in curves.values() for _, cell in points if math.isfinite(cell.mean)]):
        axes.set_yscale("log")
        plotting.set_plain_ticks(axes)
    axes.set_xlabel(result.table.x_axis, color=plotting.TEXT_COLOR)
    name = result.columns[next(iter(curves))].title if len(curves) == 1 else label.replace("_", " ")
    axes.set_ylabel(name, color=plotting.TEXT_COLOR)
    if len(curves) > 1:
        plotting.add_legend(figure, axes)
    return figure


def _plot_curve(axes: "Axes", points: Sequence[tuple[float, CellNumbers]], name: str, color: str, dash: str) -> None:
    """Plot means with a band of one standard deviation, and a cross at the upper edge where all seeds diverged."""
    x = [x for x, _ in points]
    mean = [cell.mean if math.isfinite(cell.mean) else math.nan for _, cell in points]
    std = [cell.std if cell.std is not None else math.nan for _, cell in points]
    axes.plot(x, mean, dash, color=color, lw=1.6, marker="o" if len(x) < 16 else None, ms=3.5, label=name)
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    diverged = [x for x, cell in points if math.isinf(cell.mean)]
    transform = axes.get_xaxis_transform()
    axes.plot(diverged, [1.0] * len(diverged), "x", color=color, ms=6, transform=transform, clip_on=False)


def _x_position(result: TableResult, row: Row) -> float | None:
    """Return the x of a row, or its number in the column that is the x axis."""
    if row.x is not None:
        return row.x
    cell = result.cells.get((row.name, result.table.x_axis))
    return cell.mean if cell and cell.finite_values else None


def needs_log_axis(values: Sequence[float]) -> bool:
    """Return True if the values of an axis are positive and differ by at least LOG_AXIS_RATIO."""
    return min(values) > 0 and max(values) / min(values) >= LOG_AXIS_RATIO


def save_png(figure: "Figure", path: Path) -> None:
    """Save a figure as a PNG file."""
    figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})
