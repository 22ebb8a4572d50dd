"""Claims about the numbers of a table, and the verdict on a claim over training seeds.

A claim is an expression over the cells of a table:

    Claim("Post-hoc EMA helps", lambda v: v["CONFIG G", "FID"] < v["CONFIG F", "FID"])

`v` is a `TableValues`, `v[row, column]` a `Quantity`: one number for each seed. Comparing two quantities gives a
`Statement`, whose margin (larger minus smaller side) is tested over paired seeds. docs/reproduction.md explains the
verdicts.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise, permutations
from typing import Any, NamedTuple

from gesso.reproduce.schema import Cell, Claim, Table, Values
from gesso.reproduce.significance import seeds_for_sign_test, sign_p_value, t_quantile

SIGNIFICANCE_LEVEL = 0.05
"""Largest probability of a wrong "reproduced", and of a wrong "contradicted"."""
MISSING = math.nan
"""Value of a quantity for a seed in which a cell is not measured."""


class MissingCellError(LookupError):
    """A number that a claim needs is not measured in any seed. Raised by `TableValues`, caught by `evaluate_claim`."""


class Quantity:
    """A number for each seed: a cell, or a formula of cells.

    The largest of several quantities is not computed, because the maximum of noisy numbers is biased. It is stored in
    `maxima` as (sign, options), which means "plus sign times the largest option"; tests compare the options separately.

    Attributes:
        values: number of each seed; MISSING where a cell of the formula is not measured.
        maxima: further terms of the sum.
        sign_test: True if the numbers are not normally distributed, so that only their signs are tested.
        sizes: for each seed, the largest magnitude in the sum, to which an effect is relative.
    """

    __slots__ = ("maxima", "sign_test", "sizes", "values")

    def __init__(
        self,
        values: tuple[float, ...],
        maxima: tuple[tuple[int, tuple["Quantity", ...]], ...] = (),
        sign_test: bool = False,
        sizes: tuple[float, ...] = (),
    ):
        self.values = values
        self.maxima = maxima
        self.sign_test = sign_test
        self.sizes = sizes or tuple(map(abs, values))

    def _constant(self, value: float) -> "Quantity":
        return Quantity((value,) * len(self.values))

    def _map(self, function: Callable[..., float], *others: "Quantity") -> "Quantity":
        """Apply a function to the numbers of each seed. Quantities with maxima are not supported."""
        quantities = (self, *others)
        assert not any(q.maxima for q in quantities), "a function of a maximum is not defined"
        values = tuple(map(function, *(q.values for q in quantities)))
        return Quantity(values, sign_test=any(q.sign_test for q in quantities))

    def __add__(self, other: "Quantity | float") -> "Quantity":
        if not isinstance(other, Quantity):
            other = self._constant(other)
        values = tuple(map(_add, self.values, other.values))
        sizes = tuple(map(max, self.sizes, other.sizes))
        return Quantity(values, self.maxima + other.maxima, self.sign_test or other.sign_test, sizes)

    def __neg__(self) -> "Quantity":
        maxima = tuple((-sign, options) for sign, options in self.maxima)
        return Quantity(tuple(-value for value in self.values), maxima, self.sign_test, self.sizes)

    def __sub__(self, other: "Quantity | float") -> "Quantity":
        return self + -other

    def __rsub__(self, other: float) -> "Quantity":
        return -self + other

    def __mul__(self, factor: float) -> "Quantity":
        """Multiply by a positive constant."""
        assert factor > 0
        maxima = tuple((sign, tuple(option * factor for option in options)) for sign, options in self.maxima)
        values, sizes = (tuple(factor * value for value in values) for values in (self.values, self.sizes))
        return Quantity(values, maxima, self.sign_test, sizes)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: "Quantity") -> "Quantity":
        """Divide. A seed in which a training diverged counts as missing, because its ratio says nothing."""
        return self._map(lambda a, b: a / b if math.isfinite(a) and math.isfinite(b) else MISSING, other)

    def __abs__(self) -> "Quantity":
        return self._map(abs)

    def __gt__(self, other: "Quantity | float") -> "Statement":
        return Statement((self - other,))

    def __lt__(self, other: "Quantity | float") -> "Statement":
        return Statement((-self + other,))

    def log(self) -> "Quantity":
        """Return the natural logarithm. A seed in which a training diverged counts as missing.

        A difference of logarithms is relative already: its size is 1.
        """
        logs = self._map(lambda a: math.log(a) if math.isfinite(a) else MISSING)
        return Quantity(logs.values, sign_test=logs.sign_test, sizes=(1.0,) * len(logs.values))


def _add(a: float, b: float) -> float:
    """Add; the difference of two trainings that both diverged is zero."""
    return 0.0 if a == -b else a + b


class Statement(NamedTuple):
    """A statement that is true if all of its margins are positive."""

    margins: tuple[Quantity, ...]

    def __and__(self, other: "Statement") -> "Statement":
        return Statement(self.margins + other.margins)


def all_of(statements: Iterable[Statement]) -> Statement:
    """Return the statement that all of `statements` are true."""
    return Statement(tuple(margin for statement in statements for margin in statement.margins))


def largest(options: Sequence[Quantity]) -> Quantity:
    """Return the largest of several quantities. Raises MissingCellError if there is none."""
    if not options:
        raise MissingCellError("no row has a number")
    return Quantity((0.0,) * len(options[0].values), ((1, tuple(options)),))


def smallest(options: Sequence[Quantity]) -> Quantity:
    """Return the smallest of several quantities. Raises MissingCellError if there is none."""
    return -largest([-option for option in options])


def mean(quantities: Sequence[Quantity]) -> Quantity:
    """Return the mean of several quantities, by seed."""
    return quantities[0]._map(lambda *values: statistics.mean(values), *quantities[1:])


def log_slope(x: Sequence[float], y: Sequence[Quantity]) -> Quantity:
    """Return the exponent of the power law y ~ x^slope: least squares of ln y over ln x, by seed."""
    log_x = [math.log(value) for value in x]
    mean_x = statistics.mean(log_x)
    variance = sum((a - mean_x) ** 2 for a in log_x)

    def slope(*values: float) -> float:
        log_y = [math.log(value) for value in values]
        mean_y = statistics.mean(log_y)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True)) / variance

    return y[0]._map(slope, *y[1:])


def within(difference: Quantity, margin: Quantity | float) -> Statement:
    """State that a difference lies between -margin and margin: two one-sided tests."""
    return (-difference + margin > 0.0) & (difference + margin > 0.0)


def close(a: Quantity, b: Quantity, margin: float) -> Statement:
    """State that two positive numbers differ by less than a fraction `margin` of their mean: two one-sided tests.

    The form margin (a + b) / 2 -+ (a - b) is linear in the numbers, so that no ratio is tested. If a training diverged,
    the numbers are close only if both did.
    """
    tolerance = ((a + b) * (margin / 2))._map(lambda value: 0.0 if math.isinf(value) else value)
    return within(a - b, tolerance)


def equals(a: Quantity, target: float, margin: float) -> Statement:
    """State that a number differs from `target` by less than a fraction `margin` of it: two one-sided tests."""
    return (a < (1 + margin) * target) & (a > (1 - margin) * target)


class TableValues:
    """Numbers of a table over seeds."""

    def __init__(self, table: Table, seeds: Sequence[Values]):
        self.table = table
        self.seeds = seeds
        self._measured = {cell for values in seeds for cell in values}

    def __getitem__(self, cell: Cell) -> Quantity:
        """Return the numbers at (row, column). Raises MissingCellError if no seed has one."""
        if cell not in self._measured:
            raise MissingCellError(cell)
        return Quantity(tuple(values.get(cell, MISSING) for values in self.seeds))

    def score(self, row: str, column: str) -> Quantity:
        """Return the numbers of a cell with the sign that makes larger better."""
        return -self[row, column] if self.table.is_lower_better(column) else self[row, column]

    def rows(self, column: str, min_rows: int = 1) -> list[str]:
        """Return the rows that any seed has in a column. Raises MissingCellError for fewer than `min_rows`."""
        rows = [row.name for row in self.table.rows if (row.name, column) in self._measured]
        if len(rows) < min_rows:
            raise MissingCellError(column)
        return rows

    def best(self, column: str) -> Quantity:
        """Return the best number of a column: the smallest if lower is better, else the largest."""
        numbers = [self[row, column] for row in self.rows(column)]
        return smallest(numbers) if self.table.is_lower_better(column) else largest(numbers)

    def best_score(self, column: str, rows: Sequence[str]) -> Quantity:
        """Return the largest score of several rows."""
        return largest([self.score(row, column) for row in rows])

    def optimum(self, column: str) -> Quantity:
        """Return the x of the best point of a curve. Positions are not normally distributed: sign test."""
        rows = self.rows(column)
        choose = min if self.table.is_lower_better(column) else max

        def position(values: Values) -> float:
            points = [point for point in self.table.curve(values, column) if math.isfinite(point[1])]
            if not points or any((row, column) not in values for row in rows):
                return MISSING
            return choose(points, key=lambda point: point[1])[0]

        return Quantity(tuple(map(position, self.seeds)), sign_test=True)

    def improves(self, cell: Cell, baseline: Cell) -> Statement:
        """State that one cell is better than another."""
        return self.score(*cell) > self.score(*baseline)

    def is_best(self, row: str, column: str) -> Statement:
        """State that a row is better than each other row of a column."""
        others = [other for other in self.rows(column, 2) if other != row]
        return all_of(self.improves((row, column), (other, column)) for other in others)

    def each_improves(self, column: str, rows: Sequence[str]) -> Statement:
        """State that each measured row is better than the one before it."""
        measured = [row for row in rows if row in self.rows(column, 2)]
        if len(measured) < 2:
            raise MissingCellError(column)
        return all_of(self.improves((after, column), (before, column)) for before, after in pairwise(measured))

    def best_improves(self, column: str, baseline: str) -> Statement:
        """State that the best row of a column is better than the best row of another column."""
        return self.best_score(column, self.rows(column)) > self.best_score(baseline, self.rows(baseline))

    def optimum_inside(self, column: str, ends: Sequence[str] = (), rows: Sequence[str] = ()) -> Statement:
        """State that some row between the ends of a curve is better than the ends.

        Args:
            column: the curve.
            ends: names of the ends, one or both; by default the first and the last row.
            rows: limits the curve to these rows.
        """
        curve = [row for row in self.rows(column, 3) if not rows or row in rows]
        ends = ends or (curve[0], curve[-1])
        inner = [row for row in curve if row not in ends]
        if not inner or not set(ends) <= set(curve):
            raise MissingCellError(column)
        return self.best_score(column, inner) > self.best_score(column, ends)

    def power_law(self, column: str, power: float, margin: float) -> Statement:
        """State that a curve follows a power of x, within `margin` of the fitted exponent: two one-sided tests."""
        x = {row.name: row.x for row in self.table.rows if row.x is not None}
        rows = self.rows(column, 3)
        return within(log_slope([x[row] for row in rows], [self[row, column] for row in rows]) - power, margin)

    def improves_more(self, column: str, than: str, base: str) -> Statement:
        """State that the best row improves on row `base` by a larger fraction in one column than in another."""

        def gain(name: str) -> Quantity:
            gains = [1 - self[row, name] / self[base, name] for row in self.rows(name, 2) if row != base]
            return largest(gains if self.table.is_lower_better(name) else [-gain for gain in gains])

        return gain(column) > gain(than)

    def is_narrower(self, column: str, than: str) -> Statement:
        """State that a curve rises more around its optimum than another, by its mean relative to the optimum."""

        def rise(name: str) -> Quantity:
            numbers = [self[row, name] for row in self.rows(name, 3)]
            rises = [mean(numbers) / number - 1 for number in numbers]
            return largest(rises if self.table.is_lower_better(name) else [-rise for rise in rises])

        return rise(column) > rise(than)

    def optimum_follows(self, x: Mapping[str, float], power: float, margin: float) -> Statement:
        """State that the best x of each column follows a power of the value of `x`, within `margin` in the exponent."""
        return abs(log_slope(list(x.values()), [self.optimum(column) for column in x]) - power) < margin

    def spreads_less(self, columns: Sequence[str], row: str) -> Statement:
        """State that columns, each at its best (lowest) row, differ by a smaller factor than in one row."""
        best = {column: smallest([self[other, column].log() for other in self.rows(column)]) for column in columns}
        fixed = {column: self[row, column].log() for column in columns}
        pairs = list(permutations(columns, 2))
        return largest([fixed[a] - fixed[b] for a, b in pairs]) > largest([best[a] - best[b] for a, b in pairs])

    def is_cheaper(self, cost: str, column: str, than: str, factor: float) -> Statement:
        """State that the best number of column `than` is surpassed in another column at `factor` times less cost.

        A row of `column` that is cheap enough must be better than all rows of `than`.
        """

        def average(quantity: Quantity) -> float:
            return statistics.mean(value for value in quantity.values if not math.isnan(value))

        record = max(self.rows(than), key=lambda row: average(self.score(row, than)))
        budget = average(self[record, cost])
        rows = [row for row in self.rows(column) if average(self[row, cost]) * factor <= budget]
        if not rows:
            return Statement((Quantity((-math.inf,) * len(self.seeds)),))
        return self.best_score(column, rows) > self.best_score(than, self.rows(than))


def improvement(text: str, cell: Cell, baseline: Cell) -> Claim:
    """Return the claim that the number at (row, column) `cell` is better than that at `baseline`."""
    return Claim(text, lambda v: v.improves(cell, baseline))


class Verdict(StrEnum):
    """Verdict on a claim."""

    REPRODUCED = "reproduced"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    TOO_FEW_SEEDS = "needs more seeds"
    NOT_MEASURED = "not measured"
    EXACT = "exact check"
    FAILED = "exact check failed"


class Judgement(NamedTuple):
    """Verdict on a claim with its evidence.

    Attributes:
        text: the claim.
        verdict: the verdict.
        effect: smallest margin of the claim, from means over seeds.
        low: bound that decides "reproduced"; None if the sign test decides.
        high: bound that decides "contradicted"; None if the sign test decides.
        num_seeds: seeds that have all numbers of the claim.
        num_parts: number of comparisons.
        relative: effect, low and high as fractions of the largest compared number; None where this is not defined.
    """

    text: str
    verdict: Verdict
    effect: float
    low: float | None
    high: float | None
    num_seeds: int
    num_parts: int
    relative: tuple[float | None, float | None, float | None] = (None, None, None)


class _Bound(NamedTuple):
    """Lower bound of a margin over seeds.

    effect is the estimate of the margin; mean, low and size belong to the comparison that decides (low None: sign
    test). Sizes are means over seeds.
    """

    effect: float
    effect_size: float
    mean: float
    low: float | None
    size: float
    is_positive: bool

    @property
    def relative_effect(self) -> float | None:
        return _relative(self.effect, self.effect_size)

    @property
    def relative_low(self) -> float | None:
        return None if self.low is None else _relative(self.low, self.size)

    def sort_key(self) -> tuple[bool, float]:
        return self.is_positive, self.mean if self.low is None else self.low


def _relative(value: float, size: float) -> float | None:
    return value / size if size and math.isfinite(size) else None


def _lower_bound(margin: Quantity, seeds: Sequence[int], level: float) -> _Bound:
    """Test at a level whether a margin is positive.

    "The largest option is positive" holds if some option is: each is tested at its share of the level (Bonferroni).
    "Minus the largest option is positive" holds if that is true of every option: each is tested at the full level
    (intersection-union test). Maxima that are added are expanded first.
    """
    if not margin.maxima:
        return _comparison_bound(margin, seeds, level)
    index = next((i for i, (sign, _) in enumerate(margin.maxima) if sign > 0), 0)
    sign, options = margin.maxima[index]
    rest = Quantity(margin.values, margin.maxima[:index] + margin.maxima[index + 1 :], margin.sign_test, margin.sizes)
    if sign > 0:
        return _select([_lower_bound(rest + option, seeds, level / len(options)) for option in options], max)
    return _select([_lower_bound(rest - option, seeds, level) for option in options], min)


def _select(bounds: Sequence[_Bound], choose: Callable[..., Any]) -> _Bound:
    """Return the bound that decides, with the smallest or largest effect."""
    effect = choose(bounds, key=lambda bound: bound.effect)
    return choose(bounds, key=_Bound.sort_key)._replace(effect=effect.effect, effect_size=effect.effect_size)


def _comparison_bound(margin: Quantity, seeds: Sequence[int], level: float) -> _Bound:
    """Test one comparison by Student's t, or by the sign test where t is not defined."""
    values, size = [margin.values[i] for i in seeds], statistics.fmean(margin.sizes[i] for i in seeds)
    n = len(values)
    average = sum(values) / n
    finite = n > 1 and math.isfinite(average)
    std = math.sqrt(sum((value - average) ** 2 for value in values) / (n - 1)) if finite else math.nan
    if margin.sign_test or not std > 1e-12 * abs(average):
        is_positive = sign_p_value(sum(value > 0 for value in values), n) <= level
        return _Bound(average, size, average, None, size, is_positive)
    low = average - t_quantile(1 - level, n - 1) * std / math.sqrt(n)
    return _Bound(average, size, average, low, size, low > 0)


def _terms(quantity: Quantity) -> Iterator[Quantity]:
    """Yield a quantity and, recursively, the options of its maxima."""
    yield quantity
    for _, options in quantity.maxima:
        for option in options:
            yield from _terms(option)


def _num_comparisons(quantity: Quantity) -> int:
    return math.prod(sum(map(_num_comparisons, options)) for _, options in quantity.maxima)


class Evaluation(NamedTuple):
    """A claim over seeds: its margins, and the indices of the seeds that have all of its numbers."""

    margins: tuple[Quantity, ...]
    seeds: list[int]

    def holds(self) -> _Bound:
        """Test whether all margins are positive."""
        return _select([_lower_bound(margin, self.seeds, SIGNIFICANCE_LEVEL) for margin in self.margins], min)

    def fails(self) -> _Bound:
        """Test whether some margin is negative."""
        level = SIGNIFICANCE_LEVEL / len(self.margins)
        return _select([_lower_bound(-margin, self.seeds, level) for margin in self.margins], max)


def evaluate_claim(table: Table, claim: Claim, values: Sequence[Values]) -> Evaluation | None:
    """Evaluate the expression of a claim; None if no seed has all of its numbers."""
    try:
        margins = claim.holds(TableValues(table, values)).margins
    except MissingCellError:
        return None
    terms = [term for margin in margins for term in _terms(margin)]
    seeds = [i for i in range(len(values)) if not any(math.isnan(term.values[i]) for term in terms)]
    return Evaluation(margins, seeds) if seeds else None


def compute_effect(table: Table, claim: Claim, values: Values) -> float | None:
    """Return the smallest margin of a claim in the numbers of one seed; None if one is missing."""
    evaluation = evaluate_claim(table, claim, [values])
    return evaluation.holds().effect if evaluation else None


def compute_relative_effect(table: Table, claim: Claim, values: Values) -> float | None:
    """Return `compute_effect` as a fraction of the largest compared number; None where this is not defined."""
    evaluation = evaluate_claim(table, claim, [values])
    return evaluation.holds().relative_effect if evaluation else None


def judge(table: Table, claim: Claim, values: Sequence[Values]) -> Judgement:
    """Judge a claim over seeds.

    Reproduced: every margin is significantly positive. Contradicted: one is significantly negative. Each of the two
    verdicts is wrong in at most 5 % of cases.
    """
    evaluation = evaluate_claim(table, claim, values)
    if evaluation is None:
        return Judgement(claim.text, Verdict.NOT_MEASURED, math.nan, None, None, 0, 0)
    holds, fails, n = evaluation.holds(), evaluation.fails(), len(evaluation.seeds)
    num_parts = sum(map(_num_comparisons, evaluation.margins))
    if n < 2:
        single = (holds.relative_effect, None, None)
        return Judgement(claim.text, Verdict.TOO_FEW_SEEDS, holds.effect, None, None, n, num_parts, single)
    verdict = Verdict.UNDECIDED
    if holds.is_positive != fails.is_positive:
        verdict = Verdict.REPRODUCED if holds.is_positive else Verdict.CONTRADICTED
    elif n < seeds_for_sign_test(SIGNIFICANCE_LEVEL) and any(
        term.sign_test for margin in evaluation.margins for term in _terms(margin)
    ):
        verdict = Verdict.TOO_FEW_SEEDS
    high = None if fails.low is None else -fails.low
    relative_high = None if fails.relative_low is None else -fails.relative_low
    relative = (holds.relative_effect, holds.relative_low, relative_high)
    return Judgement(claim.text, verdict, holds.effect, holds.low, high, n, num_parts, relative)


def judge_exact(claim: Claim, effects: Sequence[float]) -> Judgement:
    """Judge a claim on numbers that no training decides, from its effect in each seed."""
    verdict = Verdict.EXACT if min(effects) > 0 else Verdict.FAILED
    return Judgement(claim.text, verdict, min(effects), None, None, len(effects), 1)
