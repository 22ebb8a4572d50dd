"""Claims as functions of one seed's numbers, and the verdict over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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


def improves(column: str, rows: Sequence[str]) -> Gain:
    """Of the rows that there are, the last is better than the first: the difference."""

    def gain(table: Table, values: Values) -> float | None:
        there = [row for row in rows if (row, column) in values]
        return better((there[-1], column), (there[0], column))(table, values) if len(there) > 1 else None

    return gain


def helps_more(column: str, than: str, base: str) -> Gain:
    """The best row of a column is better than its row `base` by a larger share than that of another column."""

    def gain(table: Table, values: Values) -> float | None:
        shares = [_share(table, values, name, base) for name in (column, than)]
        return None if None in shares else shares[0] - shares[1]

    return gain


def _share(table: Table, values: Values, column: str, base: str) -> float | None:
    others = [v for (r, c), v in values.items() if c == column and r != base]
    if (base, column) not in values or not others:
        return None
    start = values[base, column]
    return (start - min(others) if table.lower(column) else max(others) - start) / start


def sharper(column: str, than: str) -> Gain:
    """A curve rises more around its optimum than another: the difference of their mean shares above it."""

    def gain(table: Table, values: Values) -> float | None:
        curves = [[value for _, value in table.curve(values, name)] for name in (column, than)]
        if min(map(len, curves)) < 3:
            return None
        tops = [_best(table, column, curve) for curve in curves]
        ours, theirs = (
            statistics.mean(abs(v - top) for v in curve) / top for curve, top in zip(curves, tops, strict=True)
        )
        return None if math.isinf(ours) or math.isinf(theirs) else ours - theirs

    return gain


def bests_within(columns: Sequence[str], share: float) -> Gain:
    """The best numbers of columns lie within a share of one another: what is left of it."""

    def gain(table: Table, values: Values) -> float | None:
        spread = _spread(table, values, columns, None)
        return None if spread is None else share - spread

    return gain


def steadier(columns: Sequence[str], row: str) -> Gain:
    """The best numbers of columns, each at a row of its own, differ by a smaller share than those of one row."""

    def gain(table: Table, values: Values) -> float | None:
        own, fixed = (_spread(table, values, columns, at) for at in (None, row))
        return None if own is None or fixed is None else _difference(fixed, own)

    return gain


def _spread(table: Table, values: Values, columns: Sequence[str], row: str | None) -> float | None:
    """By what share the worst column exceeds the best; of their best numbers, or those of a row."""
    found = []
    for column in columns:
        some = [v for (r, c), v in values.items() if c == column and row in (None, r)]
        if not some:
            return None
        found.append(_best(table, column, some))
    return max(found) / min(found) - 1


def cheaper(cost: str, column: str, than: str, times: float) -> Gain:
    """What is best of one column is beaten by another at so many times less cost: the factor over `times`, less 1."""

    def gain(table: Table, values: Values) -> float | None:
        ours, theirs = (
            [(v, values.get((r, cost))) for (r, c), v in values.items() if c == name] for name in (column, than)
        )
        if not ours or not theirs or any(price is None for _, price in (*ours, *theirs)):
            return None
        sign = 1 if table.lower(column) else -1
        record, price = min(theirs, key=lambda point: sign * point[0])
        better = [p for value, p in ours if sign * value < sign * record]
        return price / min(better) / times - 1 if better else -1.0

    return gain


def follows(given: Mapping[str, float], power: float, within: float) -> Gain:
    """The best x of columns goes as a power of what is given of each: `within` less the error of the fitted exponent."""

    def gain(table: Table, values: Values) -> float | None:
        optima = {column: _optimum(table, values, column) for column in given}
        if None in optima.values():
            return None
        return within - abs(_slope([(given[c], x) for c, x in optima.items()]) - power)

    return gain


def falls_as(column: str, power: float, within: float) -> Gain:
    """A curve goes as a power of x: `within` less the error of the fitted exponent."""

    def gain(table: Table, values: Values) -> float | None:
        curve = list(table.curve(values, column))
        return within - abs(_slope(curve) - power) if len(curve) > 2 else None

    return gain


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares of ln y over ln x."""
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _best(table: Table, column: str, values: Sequence[float]) -> float:
    return min(values) if table.lower(column) else max(values)


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
