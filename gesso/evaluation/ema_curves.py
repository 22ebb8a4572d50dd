"""Curves of a metric over EMA length: text table, optimum and plot.

A curve has a point, with the values of its repeats and their spread, for each sigma_rel.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gesso import atomic_io
from gesso.sampling import MAX_PROFILE_ERROR

CURVE_COLORS = ("#b4532a", "#2f5d7c", "#6a8f3c", "#8a5a96", "#c39a2e", "#4d4a45", "#3f9c93")
FIT_HALF_WIDTH = math.log(2)
"""Half the width in ln sigma_rel of the range that the parabola is fitted to."""


class CurvePoint(NamedTuple):
    """One length: the value of each repeat, half the height of its band, and the error of the reconstruction."""

    values: tuple[float, ...]
    spread: float
    profile_error: float

    @property
    def mean(self) -> float:
        """Mean over repeats."""
        return sum(self.values) / len(self.values)


Curve = dict[float, CurvePoint]


def accurate_points(curve: Curve) -> Curve:
    """Return the points whose profile error is at most MAX_PROFILE_ERROR, or all if there are none."""
    return {s: point for s, point in curve.items() if point.profile_error <= MAX_PROFILE_ERROR} or curve


def build_curves(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Curve]:
    """Return curves by guidance scale and, if only some tensors were varied, by their name.

    Args:
        rows: Points as `ema_sweep.curve_row` returns them.
        key: Name of the value.
    """
    grouped: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in sorted(rows, key=lambda r: (r["tensors"] or "", r["guidance"], r["sigma_rel"], r["repeat"])):
        name = f"guidance {row['guidance']:g}" + (
            f", {row['tensors']} with the rest at {row['rest']}" if row["tensors"] else ""
        )
        grouped.setdefault(name, {}).setdefault(row["sigma_rel"], []).append(row)
    return {
        name: {sigma_rel: _build_point(repeats, key) for sigma_rel, repeats in points.items()}
        for name, points in grouped.items()
    }


def _build_point(rows: Sequence[Mapping[str, Any]], key: str) -> CurvePoint:
    values = tuple(row[key] for row in rows)
    spread = (max(values) - min(values)) / 2 if len(values) > 1 else rows[0].get(f"{key}_std", 0.0)
    return CurvePoint(values, spread, rows[0]["profile_error"] ** 0.5)


class Optimum(NamedTuple):
    """Optimum of a curve.

    Attributes:
        sigma_rel: Length at the vertex of the parabola, or of the best point if there is no vertex.
        value: Value at that length.
        low: Length one standard error below.
        high: Length one standard error above.
        note: How it was found.
    """

    sigma_rel: float
    value: float
    low: float | None
    high: float | None
    note: str

    def __str__(self) -> str:
        interval = f" ({self.low:.3g} to {self.high:.3g})" if self.low and self.high else ""
        return f"best {self.value:.4g} at sigma_rel {self.sigma_rel:.3g}{interval}; {self.note}"


def find_optimum(curve: Curve, lower_is_better: bool) -> Optimum:
    """Return the vertex of a parabola in ln sigma_rel, fitted to five or more points around the best one.

    Lengths that were not reconstructed accurately are ignored. The points lie within a factor of 2 of the best one.
    The standard error is that of the vertices of the repeats. With a single repeat it follows from the residuals
    (delta method) and does not include the effect of other seeds. A curve without an inner optimum has its best
    point instead.
    """
    sign, curve = 1 if lower_is_better else -1, accurate_points(curve)
    lengths = sorted(curve)
    position = min(range(len(lengths)), key=lambda i: sign * curve[lengths[i]].mean)
    best = lengths[position]
    measured = Optimum(best, curve[best].mean, None, None, "")
    if len({curve[s].mean for s in lengths}) == 1:
        return measured._replace(note="all lengths have the same value")
    if position in (0, len(lengths) - 1):
        return measured._replace(
            note=f"at the end of the sweep: the optimum may lie {'below' if position == 0 else 'above'}"
        )
    near = [s for s in lengths if abs(math.log(s / best)) <= FIT_HALF_WIDTH]
    if len(near) < 5:
        near = sorted(sorted(lengths, key=lambda s: abs(math.log(s / best)))[:5])
    x = np.array([math.log(s / best) for s in near])
    repeats = min(len(curve[s].values) for s in near)
    values = sign * np.array([curve[s].values[:repeats] for s in near])
    fit = _fit_vertex(x, values.mean(axis=1))
    if fit is None:
        return measured._replace(note="no parabola fits: the curve is flat or too noisy")
    vertex, value, error = fit
    note = "one standard error of the fit at these seeds; --num-repeats estimates the effect of other seeds"
    if repeats > 1:
        vertices = [result[0] for column in values.T if (result := _fit_vertex(x, column))]
        error = float(np.std(vertices, ddof=1)) / math.sqrt(repeats) if len(vertices) == repeats else None
        note = f"one standard error over {repeats} repeats" if error else "no error known: some repeats have no optimum"
    elif error is None:
        note = "a parabola through three lengths: no error known"
    low, high = (None, None) if error is None else (best * math.exp(vertex - error), best * math.exp(vertex + error))
    return Optimum(best * math.exp(vertex), sign * value, low, high, note)


def _fit_vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float | None] | None:
    """Return position, value and standard error of the minimum of a parabola; None if it has none in the range of x."""
    X = np.stack([np.ones_like(x), x, x**2], 1)
    coefficients = np.linalg.lstsq(X, y, rcond=None)[0]
    a, b, c = coefficients.tolist()
    if not (c > 0 and x.min() <= -b / (2 * c) <= x.max()):
        return None
    error = None
    if len(x) > 3:
        variance = float(((y - X @ coefficients) ** 2).sum()) / (len(x) - 3)
        slope = np.array([0, -1 / (2 * c), b / (2 * c**2)])
        error = math.sqrt(max(variance * float(slope @ np.linalg.inv(X.T @ X) @ slope), 0.0))
    return -b / (2 * c), a - b * b / (4 * c), error


def curve_table(curves: Mapping[str, Curve], lower_is_better: bool) -> list[str]:
    """Return a text table with a row for each length and a column for each curve.

    * marks the best accurate point, and ! a profile error above MAX_PROFILE_ERROR.
    """
    lengths = sorted({s for curve in curves.values() for s in curve})
    best = {
        name: (min if lower_is_better else max)(point.mean for point in accurate_points(curve).values())
        for name, curve in curves.items()
    }
    widths = {name: max(18, len(name) + 2) for name in curves}
    lines = ["sigma_rel  profile error" + "".join(name.rjust(widths[name]) for name in curves)]
    for s in lengths:
        error = next(curve[s].profile_error for curve in curves.values() if s in curve)
        cells = []
        for name, curve in curves.items():
            point = curve.get(s)
            text = (
                ""
                if point is None
                else f"{point.mean:.4g} +- {point.spread:.2g}"
                + ("*" if point.mean == best[name] and s in accurate_points(curve) else " ")
            )
            cells.append(text.rjust(widths[name]))
        lines.append(f"{s:9.4f}  {error:12.1e}{'!' if error > MAX_PROFILE_ERROR else ' '}" + "".join(cells))
    return lines


def plot_curves(
    curves: Mapping[str, Curve], optima: Mapping[str, Optimum], title: str, reference_value: float | None, path: Path
) -> Path:
    """Write a plot of curves over EMA length and return its path. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, curve) in enumerate(curves.items()):
        color, x = CURVE_COLORS[i % len(CURVE_COLORS)], list(curve)
        y, spread = np.array([p.mean for p in curve.values()]), np.array([p.spread for p in curve.values()])
        axes.fill_between(x, y - spread, y + spread, color=color, alpha=0.13, lw=0)
        axes.plot(x, y, color=color, lw=1.6, label=name)
        poor = np.array([p.profile_error > MAX_PROFILE_ERROR for p in curve.values()])
        axes.plot(np.array(x)[~poor], y[~poor], "o", color=color, ms=4)
        axes.plot(np.array(x)[poor], y[poor], "o", mfc="white", mec=color, ms=4)
        best = optima[name]
        span = [best.low or best.sigma_rel, best.high or best.sigma_rel]
        axes.plot(span, [best.value] * 2, color=color, lw=4, alpha=0.5, solid_capstyle="butt")
        axes.plot(best.sigma_rel, best.value, "v", color=color, ms=9, mec="white")
    if reference_value is not None:
        axes.axhline(reference_value, color="#8a8578", ls="--", lw=1, label="real images")
    axes.set_xscale("log")
    ticks = [s for s in (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25) if _tick_in_range(s, curves)]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{100 * s:g}%"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="EMA length (relative standard deviation)", ylabel=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e0d4", lw=0.6)
    axes.legend(frameon=False, fontsize=9)
    with atomic_io.atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path


def _tick_in_range(s: float, curves: Mapping[str, Curve]) -> bool:
    lengths = [length for curve in curves.values() for length in curve]
    return min(lengths) * 0.95 <= s <= max(lengths) * 1.05
