"""Plots as SVG, half as wide as a page, so that they can be read on a phone too."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gesso.report.load import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT_COLOR, ACCENT_COLOR, MUTED_COLOR, GRID_COLOR = "#2b2a27", "#b4532a", "#8a8578", "#e6e0d4"
COLORS = ("#b4532a", "#2f5d7c", "#7a9a3a", "#8c5a9e", "#d9a21b", "#3c8f86", "#4a4740", "#d77fa1")
"""Colors of curves. They differ in lightness and are combined with LINE_STYLES, for readers with color blindness."""
LINE_STYLES = ("-", "--", "-.", ":")
FIGURE_SIZE = (5.6, 3.5)

LineStyle = tuple[str, Any]
"""Color and matplotlib line style of a curve."""


def line_style(index: int) -> LineStyle:
    """Return the color and line style of a curve by its position."""
    dash = LINE_STYLES[index % len(LINE_STYLES)] if index < 2 * len(COLORS) else "-"
    return COLORS[index % len(COLORS)], dash


def plot_curves(
    curves: Mapping[str, Points],
    ylabel: str,
    *,
    scale: str = "linear",
    from_zero: bool = False,
    styles: Mapping[str, LineStyle] | None = None,
) -> str:
    """Plot curves over images seen, with a legend if there are several.

    Args:
        curves: Points by name.
        ylabel: Label of the y axis.
        scale: Scale of the y axis, "linear" or "log".
        from_zero: Start the y axis at 0.
        styles: Line styles by name; `line_style` of the position by default.

    Returns:
        SVG; empty if no curve has two points.
    """
    curves = {name: points for name, points in curves.items() if points[0]}
    if all(len(x) < 2 for x, _ in curves.values()):
        return ""
    figure, axes = new_figure()
    unit, suffix = image_unit(max(points[0][-1] for points in curves.values()))
    for i, (name, (x, y)) in enumerate(curves.items()):
        color, dash = (styles or {}).get(name) or line_style(i)
        marker = "o" if len(x) < 12 else None
        axes.plot([value / unit for value in x], y, dash, color=color, lw=1.6, marker=marker, ms=3.5, label=name)
    axes.set_xlabel(f"images seen{suffix}", color=TEXT_COLOR)
    axes.set_ylabel(ylabel, color=TEXT_COLOR)
    axes.set_yscale(scale)
    if scale == "log":
        set_plain_ticks(axes)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(max(y) for _, y in curves.values()) or 1)
    if len(curves) > 1:
        add_legend(figure, axes)
    return to_svg(figure)


def plot_loss_by_noise(curves: Mapping[int, Points], ylabel: str) -> str:
    """Plot a loss over images seen, one curve per noise bin, colored from clean to noise.

    Args:
        curves: Points by bin of progress.
        ylabel: Label of the y axis.

    Returns:
        SVG; empty if no curve has two points.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    if all(len(x) < 2 for x, _ in curves.values()):
        return ""
    figure, axes = new_figure()
    n, colors = len(curves), colormaps["viridis"]
    unit, suffix = image_unit(max(points[0][-1] for points in curves.values() if points[0]))
    for b, (x, y) in curves.items():
        axes.plot([value / unit for value in x], y, color=colors(0.92 * b / (n - 1)), lw=1.3)
    axes.set_xlabel(f"images seen{suffix}", color=TEXT_COLOR)
    axes.set_ylabel(ylabel, color=TEXT_COLOR)
    axes.set_yscale("log")
    set_plain_ticks(axes)
    norm = BoundaryNorm([i / n for i in range(n + 1)], 256, extend="neither")
    mappable = ScalarMappable(norm, colors.resampled(256))
    bar = figure.colorbar(mappable, ax=axes, aspect=28, pad=0.02, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["clean", "progress", "noise"], fontsize=9, color=TEXT_COLOR)
    bar.ax.tick_params(length=0, which="both")
    return to_svg(figure)


def plot_loss_over_noise(curves: Mapping[str, Sequence[float | None] | None], ylabel: str) -> str:
    """Plot losses over the noise level, one curve per name; return SVG, empty without values.

    Args:
        curves: Loss of each bin of progress by name; None where a bin has no loss.
        ylabel: Label of the y axis.
    """
    points = {
        name: [((b + 0.5) / len(values), value) for b, value in enumerate(values) if value is not None]
        for name, values in curves.items()
        if values
    }
    points = {name: pairs for name, pairs in points.items() if pairs}
    if not points:
        return ""
    figure, axes = new_figure()
    for i, (name, pairs) in enumerate(points.items()):
        color, dash = line_style(i)
        x, y = zip(*pairs, strict=True)
        axes.plot(x, y, dash, color=color, lw=1.6, marker="o", ms=3.5, label=name)
    axes.set(xlim=(0, 1))
    axes.set_xlabel("progress: 0 clean, 1 noise", color=TEXT_COLOR)
    axes.set_ylabel(ylabel, color=TEXT_COLOR)
    axes.set_yscale("log")
    set_plain_ticks(axes)
    if len(points) > 1:
        add_legend(figure, axes)
    return to_svg(figure)


def plot_ema_sweep(rows: Sequence[Mapping[str, float]], reference: float) -> str:
    """Plot the Frechet distance over the EMA length, with its standard deviation; return SVG.

    Args:
        rows: Points with `sigma_rel`, `frechet_distance` and `frechet_distance_std`.
        reference: Frechet distance of real images, drawn as a line.
    """
    x, y = [r["sigma_rel"] for r in rows], [r["frechet_distance"] for r in rows]
    spread = [r["frechet_distance_std"] for r in rows]
    figure, axes = new_figure()
    low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=ACCENT_COLOR, alpha=0.15, lw=0)
    axes.plot(x, y, "o-", color=ACCENT_COLOR, lw=1.6, ms=5, label="samples")
    axes.axhline(reference, color=MUTED_COLOR, ls="--", lw=1, label="floor, real against real")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("EMA length sigma_rel", color=TEXT_COLOR)
    axes.set_ylabel("Frechet distance", color=TEXT_COLOR)
    add_legend(figure, axes)
    return to_svg(figure)


def new_figure(size: tuple[float, float] = FIGURE_SIZE) -> "tuple[Figure, Axes]":
    """Return a new figure and its axes in the style of the pages; size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=9)
    axes.grid(axis="y", color=GRID_COLOR, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """Add a legend above the axes, with as many columns as the names allow."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(len(names), 62 // (max(map(len, names)) + 7)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=2.4)


def set_plain_ticks(axes: "Axes") -> None:
    """Label a logarithmic y axis of less than three decades with plain numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    if high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 5 else MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def image_unit(largest: float) -> tuple[float, str]:
    """Return the unit of an axis of images seen, and its suffix in the axis label."""
    return (1e6, " (millions)") if largest >= 2e6 else (1e3, " (thousands)") if largest >= 2e3 else (1, "")


def to_svg(figure: "Figure") -> str:
    """Return a figure as an <svg> element. Equal figures give equal bytes."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "gesso"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
