"""Claims as functions of one seed's numbers, and the verdict over seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gesso.tables.table import Cell, Claim, Table, Values

Gain = Callable[[Table, Values], float | None]


def better(cell: Cell, than: Cell) -> Gain:
    """The number at (row, column) `cell` is better than that at `than`: the difference."""

    def gain(table: Table, values: Values) -> float | None:
        if cell not in values or than not in values:
            return None
        sign = 1 if table.lower(cell[1]) else -1
        return _difference(values[than], values[cell]) * sign

    return gain


def alike(cell: Cell, other: Cell, within: float) -> Gain:
    """Two numbers differ by less than a share `within` of their mean: what is left of it."""

    def gain(table: Table, values: Values) -> float | None:
        if cell not in values or other not in values:
            return None
        a, b = values[cell], values[other]
        return within - abs(_difference(a, b)) / max((abs(a) + abs(b)) / 2, 1e-12)

    return gain


def best(column: str, than: str) -> Gain:
    """The best number of a column over all rows is better than that of another."""

    def gain(table: Table, values: Values) -> float | None:
        ours, theirs = ([v for (_, c), v in values.items() if c == name] for name in (column, than))
        if not ours or not theirs:
            return None
        lower = table.lower(column)
        return _difference(min(theirs), min(ours)) if lower else _difference(max(ours), max(theirs))

    return gain


def every(*gains: Gain) -> Gain:
    """All of them hold: the least of their gains."""

    def gain(table: Table, values: Values) -> float | None:
        found = [one(table, values) for one in gains]
        return None if None in found else min(found)

    return gain


def above(cell: Cell, level: float) -> Gain:
    """A number is larger than `level`: by how much."""

    def gain(table: Table, values: Values) -> float | None:
        return values[cell] - level if cell in values else None

    return gain


def as_published(cells: Sequence[Cell], within: float) -> Gain:
    """Numbers differ from the published ones by less than a share `within` of those: what is left of it at the farthest."""

    def gain(table: Table, values: Values) -> float | None:
        published = table.published()
        if any(cell not in values for cell in cells):
            return None
        return within - max(abs(values[cell] / published[cell] - 1) for cell in cells)

    return gain


def optimum_below(column: str, than: str) -> Gain:
    """The best point of a curve lies at a smaller x than that of another: the difference of their x."""

    def gain(table: Table, values: Values) -> float | None:
        left, right = _optimum(table, values, column), _optimum(table, values, than)
        return None if left is None or right is None else right - left

    return gain


def optimum_inside(column: str) -> Gain:
    """The best point of a curve is neither its first nor its last: how much better it is than the better of those."""

    def gain(table: Table, values: Values) -> float | None:
        curve = [value for _, value in table.curve(values, column)]
        if len(curve) < 3:
            return None
        sign = 1 if table.lower(column) else -1
        curve = [sign * value for value in curve]
        return _difference(min(curve[0], curve[-1]), min(curve[1:-1]))

    return gain


def best_at(row: str, column: str) -> Gain:
    """A row is the best of its column: how much better it is than the best of the others."""

    def gain(table: Table, values: Values) -> float | None:
        others = [v for (r, c), v in values.items() if c == column and r != row]
        if (row, column) not in values or not others:
            return None
        ours = values[row, column]
        return _difference(min(others), ours) if table.lower(column) else _difference(ours, max(others))

    return gain


def _optimum(table: Table, values: Values, column: str) -> float | None:
    curve = list(table.curve(values, column))
    if not curve:
        return None
    choose = min if table.lower(column) else max
    return choose(curve, key=lambda point: point[1])[0]


def _difference(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # two that diverged are alike


REPRODUCED, NOT, NOISY, FEW, OPEN = "reproduced", "not reproduced", "too noisy to say", "too few seeds", "not measured"
# Student's t, one side, 95 %, by degrees of freedom.
T95 = (math.inf, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)


class Verdict(NamedTuple):
    """mean of the gain over seeds, and its standard error (NaN for one seed)."""

    says: str
    verdict: str
    mean: float
    error: float
    seeds: int


def judged(table: Table, claim: Claim, seeds: Sequence[Values]) -> Verdict:
    """Reproduced where the mean gain over seeds is above 0 at 95 % (Student's t, one side); not where it is so below."""
    gains = [g for g in (claim.gain(table, values) for values in seeds) if g is not None]
    if not gains:
        return Verdict(claim.says, OPEN, math.nan, math.nan, 0)
    mean = statistics.mean(gains)
    if len(gains) < 2:
        return Verdict(claim.says, FEW, mean, math.nan, 1)
    if all(math.isinf(g) for g in gains) and len(set(gains)) == 1:
        return Verdict(claim.says, REPRODUCED if mean > 0 else NOT, mean, 0.0, len(gains))
    if any(math.isinf(g) for g in gains):
        return Verdict(claim.says, NOISY, mean, math.nan, len(gains))
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    t = T95[min(len(gains) - 1, len(T95) - 1)]
    sure = abs(mean) > t * error
    return Verdict(claim.says, (REPRODUCED if mean > 0 else NOT) if sure else NOISY, mean, error, len(gains))
