"""Plots as SVG, half the width of a page, so that they can be read on a phone too; legends stand above the axes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from gesso.report.folder import Points

INK, ACCENT, SOFT, GRID = "#2b2a27", "#b4532a", "#8a8578", "#e6e0d4"
COLOURS = ("#b4532a", "#2f5d7c", "#7a9a3a", "#8c5a9e", "#d9a21b", "#3c8f86", "#4a4740", "#d77fa1")
"""told apart with any kind of colour vision by their lightness, or by the strokes that go with them"""
STROKES = ("-", "--", "-.", ":")
SIZE = (5.6, 3.5)


def stroke(i: int) -> tuple[str, Any]:
    """Colour and stroke of the i-th curve."""
    return COLOURS[i % len(COLOURS)], STROKES[i % len(STROKES)] if i < 2 * len(COLOURS) else "-"


def lines(
    curves: Mapping[str, Points],
    ylabel: str,
    *,
    scale: str = "linear",
    from_zero: bool = False,
    styles: Mapping[str, tuple[str, Any]] | None = None,
) -> str:
    """Curves over images seen, named in a legend where there are several. Empty where none has two points."""
    curves = {name: points for name, points in curves.items() if points[0]}
    if all(len(x) < 2 for x, _ in curves.values()):
        return ""
    figure, axes = started()
    unit, word = unit_of(max(points[0][-1] for points in curves.values()))
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour, dash = (styles or {}).get(name) or stroke(i)
        marker = "o" if len(x) < 12 else None
        axes.plot([value / unit for value in x], y, dash, color=colour, lw=1.6, marker=marker, ms=3.5, label=name)
    axes.set_xlabel(f"images seen{word}", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_yscale(scale)
    if scale == "log":
        plain_ticks(axes)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(max(y) for _, y in curves.values()) or 1)
    if len(curves) > 1:
        legend(figure, axes)
    return svg(figure)


def by_noise(curves: Mapping[int, Points], ylabel: str) -> str:
    """A curve for each bin of noise levels, coloured from clean to noise. Empty where none has two points."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    if all(len(x) < 2 for x, _ in curves.values()):
        return ""
    figure, axes = started()
    n, colours = len(curves), colormaps["viridis"]
    unit, word = unit_of(max(points[0][-1] for points in curves.values() if points[0]))
    for b, (x, y) in curves.items():
        axes.plot([value / unit for value in x], y, color=colours(0.92 * b / (n - 1)), lw=1.3)
    axes.set_xlabel(f"images seen{word}", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_yscale("log")
    plain_ticks(axes)
    norm = BoundaryNorm([i / n for i in range(n + 1)], 256, extend="neither")
    shades = colours.resampled(256)
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=axes, aspect=28, pad=0.02, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["clean", "progress", "noise"], fontsize=9, color=INK)
    bar.ax.tick_params(length=0, which="both")
    return svg(figure)


def over_bins(curves: Mapping[str, Sequence[float | None]], ylabel: str) -> str:
    """Loss over noise level at one time, a curve for each name. Empty where there is none."""
    curves = {name: values for name, values in curves.items() if values and any(v is not None for v in values)}
    if not curves:
        return ""
    figure, axes = started()
    for i, (name, values) in enumerate(curves.items()):
        colour, dash = stroke(i)
        x = [(b + 0.5) / len(values) for b, value in enumerate(values) if value is not None]
        axes.plot(x, [v for v in values if v is not None], dash, color=colour, lw=1.6, marker="o", ms=3.5, label=name)
    axes.set(xlim=(0, 1))
    axes.set_xlabel("progress: 0 clean, 1 noise", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_yscale("log")
    plain_ticks(axes)
    if len(curves) > 1:
        legend(figure, axes)
    return svg(figure)


def lengths(rows: Sequence[Mapping[str, float]], floor: float) -> str:
    """Frechet distance over EMA length, with its spread and its floor."""
    x, y = [r["sigma_rel"] for r in rows], [r["frechet_distance"] for r in rows]
    spread = [r["frechet_distance_std"] for r in rows]
    figure, axes = started()
    low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=ACCENT, alpha=0.15, lw=0)
    axes.plot(x, y, "o-", color=ACCENT, lw=1.6, ms=5, label="samples")
    axes.axhline(floor, color=SOFT, ls="--", lw=1, label="floor, real against real")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("EMA length sigma_rel", color=INK)
    axes.set_ylabel("Frechet distance", color=INK)
    legend(figure, axes)
    return svg(figure)


def started(size: tuple[float, float] = SIZE):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def legend(figure, axes) -> None:
    """Above the axes, where it covers nothing; in columns as wide as the names allow."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(len(names), 62 // (max(map(len, names)) + 7)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=2.4)


def plain_ticks(axes) -> None:
    """Numbers, not powers of ten, on a logarithmic axis of few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    if high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 5 else MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def unit_of(largest: float) -> tuple[float, str]:
    return (1e6, " (millions)") if largest >= 2e6 else (1e3, " (thousands)") if largest >= 2e3 else (1, "")


def svg(figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "gesso"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
