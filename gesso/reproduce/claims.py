"""Claims as expressions over the numbers of one seed, and the verdict over seeds.

An expression returns two trees of effects: those that are positive if the claim holds, and those that are positive if it
fails. A missing number raises MissingCell, which `judge` catches. docs/reproduction.md explains how a verdict is made.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import permutations
from typing import NamedTuple

from gesso.reproduce.schema import Cell, Claim, Table, Values
from gesso.reproduce.significance import seeds_for_sign_test, sign_p_value, t_quantile

LEVEL = 0.05
"""the largest probability of a wrong "reproduced", and of a wrong "contradicted\""""


class MissingCell(LookupError):
    """A number that an expression needs is not measured."""


class Seed(NamedTuple):
    """Numbers of one seed, by cell. rows: by column the rows that any seed has."""

    table: Table
    values: Values
    rows: Mapping[str, Sequence[str]]

    def __getitem__(self, cell: Cell) -> float:
        if cell not in self.values:
            raise MissingCell(cell)
        return self.values[cell]

    def finite(self, cell: Cell) -> float:
        """Return a number for ratios and logarithms; a diverged training counts as missing."""
        if not math.isfinite(self[cell]):
            raise MissingCell(cell)
        return self[cell]

    def score(self, cell: Cell) -> float:
        """Return the number with the sign that makes larger better."""
        return -self[cell] if self.table.is_lower_better(cell[1]) else self[cell]

    def rows_of(self, column: str, at_least: int = 1) -> Sequence[str]:
        """Return the rows that any seed has in a column. Raises MissingCell for fewer than `at_least`."""
        rows = self.rows.get(column, ())
        if len(rows) < at_least:
            raise MissingCell(column)
        return rows

    def curve(self, column: str) -> list[tuple[float, float]]:
        """Return (x, number) by row. Raises MissingCell if another seed has more points."""
        for row in self.rows_of(column):
            self[row, column]
        return list(self.table.curve(self.values, column))


class Effect(NamedTuple):
    """by_sign: only its sign counts, as it is not normally distributed: the sign test."""

    value: float
    by_sign: bool = False


class All(NamedTuple):
    """All are positive: each is tested at the level of the whole (intersection-union test)."""

    parts: tuple["Test", ...]


class Any(NamedTuple):
    """Some is positive: each is tested at its share of the level (Bonferroni)."""

    parts: tuple["Test", ...]


Test = Effect | All | Any


class Tests(NamedTuple):
    """Effects that show that a claim holds, and effects that show that it fails."""

    holds: Test
    fails: Test


Expression = Callable[[Seed], Tests]
Value = Callable[[Seed, str], float]


def _tests(*effects: float, by_sign: bool = False) -> Tests:
    """Return the tests of parts, each of which contradicts the claim if it is negative."""
    return Tests(
        All(tuple(Effect(value, by_sign) for value in effects)),
        Any(tuple(Effect(-value, by_sign) for value in effects)),
    )


def _all_of(each: Sequence[Tests]) -> Tests:
    return Tests(All(tuple(one.holds for one in each)), Any(tuple(one.fails for one in each)))


def _difference(a: float, b: float) -> float:
    """Zero for two trainings that both diverged."""
    return 0.0 if a == b else a - b


def all_of(*expressions: Expression) -> Expression:
    """All of them hold."""
    return lambda seed: _all_of([expression(seed) for expression in expressions])


def improves_on(cell: Cell, baseline: Cell) -> Expression:
    """The number at (row, column) `cell` is better than that at `baseline`."""
    return lambda seed: _tests(
        _difference(seed[baseline], seed[cell]) * (1 if seed.table.is_lower_better(cell[1]) else -1),
    )


def improves_by(cell: Cell, baseline: Cell, share: float) -> Expression:
    """A number is lower than `baseline` by more than a share of it."""
    return lambda seed: _tests(_difference((1 - share) * seed[baseline], seed[cell]))


def at_most(cell: Cell, baseline: Cell, margin: float) -> Expression:
    """A number exceeds `baseline` by less than a share `margin` of it: one-sided equivalence."""
    return lambda seed: _tests(_difference((1 + margin) * seed[baseline], seed[cell]))


def at_least(cell: Cell, baseline: Cell, share: float) -> Expression:
    """A number is larger than a share of another."""
    return lambda seed: _tests(_difference(seed[cell], share * seed[baseline]))


def within(cell: Cell, other: Cell, margin: float) -> Expression:
    """Two positive numbers differ by less than a share `margin` of their mean: two one-sided tests.

    In the form margin (a+b)/2 -+ (a-b), which is linear in the numbers, so that no ratio is tested.
    """

    def tests(seed: Seed) -> Tests:
        a, b = seed[cell], seed[other]
        if math.isinf(a) or math.isinf(b):
            return _tests(0.0 if a == b else -math.inf)
        room = margin * (a + b) / 2
        return _tests(room - (a - b), room + (a - b))

    return tests


def equals(cell: Cell, level: float, margin: float) -> Expression:
    """A number differs from `level` by less than a share `margin` of it: two one-sided tests."""
    return lambda seed: _tests((1 + margin) * level - seed[cell], seed[cell] - (1 - margin) * level)


def greater_than(cell: Cell, level: float) -> Expression:
    """A number is larger than `level`."""
    return lambda seed: _tests(seed[cell] - level)


def matches_published(cells: Sequence[Cell], margin: float) -> Expression:
    """Numbers differ from the published ones by less than a share of those."""

    def tests(seed: Seed) -> Tests:
        published = seed.table.published()
        return all_of(*(equals(cell, published[cell], margin) for cell in cells))(seed)

    return tests


def is_best(row: str, column: str) -> Expression:
    """A row is better than each of the others of its column."""

    def tests(seed: Seed) -> Tests:
        others = [other for other in seed.rows_of(column, 2) if other != row]
        return all_of(*(improves_on((row, column), (other, column)) for other in others))(seed)

    return tests


def each_improves(column: str, rows: Sequence[str]) -> Expression:
    """Each measured row is better than the one before it."""

    def tests(seed: Seed) -> Tests:
        measured = [row for row in rows if row in seed.rows_of(column, 2)]
        if len(measured) < 2:
            raise MissingCell(column)
        pairs = zip(measured, measured[1:], strict=False)
        return all_of(*(improves_on((after, column), (before, column)) for before, after in pairs))(seed)

    return tests


def _maximum_exceeds(
    seed: Seed, options: Sequence[str], value: Value, others: Sequence[str], other_value: Value
) -> Tests:
    """The largest mean of `options` exceeds the largest mean of `others`.

    Holds if some option exceeds every one of `others`; fails if one of `others` exceeds every option. Neither side takes
    the maximum of noisy numbers.
    """
    left, right = [value(seed, option) for option in options], [other_value(seed, other) for other in others]
    return Tests(
        Any(tuple(All(tuple(Effect(_difference(a, b)) for b in right)) for a in left)),
        Any(tuple(All(tuple(Effect(_difference(b, a)) for a in left)) for b in right)),
    )


def best_of(column: str, than: str) -> Expression:
    """The best row of a column is better than the best of another."""

    def tests(seed: Seed) -> Tests:
        def score(name: str) -> Value:
            return lambda seed, row: seed.score((row, name))

        return _maximum_exceeds(seed, seed.rows_of(column), score(column), seed.rows_of(than), score(than))

    return tests


def optimum_inside(column: str, ends: tuple[str, ...] | None = None, rows: Sequence[str] | None = None) -> Expression:
    """Some row between the ends of a curve is better than both.

    rows: limits the curve; ends: names one end or both.
    """

    def tests(seed: Seed) -> Tests:
        curve = [row for row in seed.rows_of(column, 3) if rows is None or row in rows]
        outer = ends or (curve[0], curve[-1])
        inner = [row for row in curve if row not in outer]
        if not inner or not set(outer) <= set(curve):
            raise MissingCell(column)

        def beats(row: str, other: str) -> Effect:
            return Effect(_difference(seed.score((row, column)), seed.score((other, column))))

        return Tests(
            Any(tuple(All(tuple(beats(row, end) for end in outer)) for row in inner)),
            Any(tuple(All(tuple(beats(end, row) for row in inner)) for end in outer)),
        )

    return tests


def optimum_earlier(column: str, than: str) -> Expression:
    """The best point of a curve lies at a smaller x than that of another in most trainings."""
    return lambda seed: _tests(_optimum(seed, than) - _optimum(seed, column), by_sign=True)


def optimum_follows(given: Mapping[str, float], power: float, margin: float) -> Expression:
    """The best x of each column follows a power of the value given for it, within `margin` in the exponent."""

    def tests(seed: Seed) -> Tests:
        slope = _slope([(value, _optimum(seed, column)) for column, value in given.items()])
        return _tests(margin - abs(slope - power), by_sign=True)

    return tests


def _optimum(seed: Seed, column: str) -> float:
    curve = [point for point in seed.curve(column) if math.isfinite(point[1])]
    if not curve:
        raise MissingCell(column)
    choose = min if seed.table.is_lower_better(column) else max
    return choose(curve, key=lambda point: point[1])[0]


def power_law(column: str, power: float, margin: float) -> Expression:
    """A curve goes as a power of x, but for `margin` in the fitted exponent: two one-sided tests."""

    def tests(seed: Seed) -> Tests:
        seed.rows_of(column, 3)
        slope = _slope(seed.curve(column))
        return _tests(margin - (slope - power), margin + (slope - power))

    return tests


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares of ln y over ln x."""
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def helps_more(column: str, than: str, base: str) -> Expression:
    """The best row of a column is better than its row `base` by a larger share than that of another column."""

    def tests(seed: Seed) -> Tests:
        def share(name: str) -> Value:
            sign = 1 if seed.table.is_lower_better(name) else -1
            return lambda one, row: sign * (1 - one.finite((row, name)) / one.finite((base, name)))

        rows = [[row for row in seed.rows_of(name, 2) if row != base] for name in (column, than)]
        return _maximum_exceeds(seed, rows[0], share(column), rows[1], share(than))

    return tests


def narrower(column: str, than: str) -> Expression:
    """A curve rises more around its optimum than another: by the mean of its points over the optimum."""

    def tests(seed: Seed) -> Tests:
        def rise(name: str) -> Value:
            rows, sign = seed.rows_of(name, 3), 1 if seed.table.is_lower_better(name) else -1
            return lambda one, row: (
                sign * (statistics.mean(one.finite((r, name)) for r in rows) / one.finite((row, name)) - 1)
            )

        return _maximum_exceeds(seed, seed.rows_of(column, 3), rise(column), seed.rows_of(than, 3), rise(than))

    return tests


def bests_within(columns: Sequence[str], margin: float) -> Expression:
    """The best (lowest) numbers of columns exceed one another by less than a share `margin`."""

    def tests(seed: Seed) -> Tests:
        def below(name: str, factor: float) -> Value:
            return lambda one, row: -factor * one[row, name]

        each = [
            _maximum_exceeds(seed, seed.rows_of(a), below(a, 1.0), seed.rows_of(b), below(b, 1 + margin))
            for a, b in permutations(columns, 2)
        ]
        return _all_of(each)

    return tests


def less_spread(columns: Sequence[str], row: str) -> Expression:
    """The lowest numbers of columns, each at its own best row, differ by a smaller factor than those of one row."""

    def tests(seed: Seed) -> Tests:
        logs = {c: {r: math.log(seed.finite((r, c))) for r in seed.rows_of(c)} for c in columns}
        if any(row not in numbers for numbers in logs.values()):
            raise MissingCell(row)
        pairs = list(permutations(columns, 2))
        fixed = [logs[a][row] - logs[b][row] for a, b in pairs]

        def closer(a: str, b: str, factor: float) -> Any:
            """The best of a exceeds the best of b by less than `factor`."""
            each = (All(tuple(Effect(factor + y - x) for y in logs[b].values())) for x in logs[a].values())
            return Any(tuple(each))

        apart = (
            All(tuple(Effect(x - y - factor) for x in logs[a].values() for factor in fixed))
            for a, b in pairs
            for y in logs[b].values()
        )
        return Tests(Any(tuple(All(tuple(closer(a, b, f) for a, b in pairs)) for f in fixed)), Any(tuple(apart)))

    return tests


def cheaper(cost: str, column: str, than: str, times: float) -> Expression:
    """The best number of a column is beaten by another column at so many times less cost.

    Some row of `column` that is cheap enough is better than all of `than`, whose best row must be the same in every seed.
    """

    def tests(seed: Seed) -> Tests:
        def score(name: str) -> Value:
            return lambda seed, row: seed.score((row, name))

        record = max(seed.rows_of(than), key=lambda row: seed.score((row, than)))
        rows = [row for row in seed.rows_of(column) if seed[row, cost] * times <= seed[record, cost]]
        if not rows:
            return _tests(-math.inf)
        return _maximum_exceeds(seed, rows, score(column), seed.rows_of(than), score(than))

    return tests


class Verdict(StrEnum):
    """Verdict on a claim."""

    REPRODUCED = "reproduced"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    TOO_FEW_SEEDS = "too few seeds"
    NOT_MEASURED = "not measured"
    EXACT = "exact check"
    FAILED = "exact check failed"


class Judgement(NamedTuple):
    """Verdict on a claim with its evidence.

    effect: of the whole claim, from the means over seeds; low, high: the bounds that decide "reproduced" and
    "contradicted", None if the sign test decides; parts: number of comparisons.
    """

    text: str
    verdict: Verdict
    effect: float
    low: float | None
    high: float | None
    seeds: int
    parts: int


class _Bound(NamedTuple):
    """The mean of an effect over seeds, its lower bound (None: sign test), and whether it is significantly positive."""

    mean: float
    low: float | None
    positive: bool

    def order(self) -> tuple[bool, float]:
        return self.positive, self.mean if self.low is None else self.low


def _one_sided_bound(tests: Sequence[Test], level: float) -> _Bound:
    """One test over seeds. Its bound is that of the part that decides."""
    first = tests[0]
    if isinstance(first, Effect):
        return _bound(tests, level)
    share = level if isinstance(first, All) else level / len(first.parts)
    bounds = [_one_sided_bound(part, share) for part in zip(*(test.parts for test in tests), strict=True)]
    return (min if isinstance(first, All) else max)(bounds, key=_Bound.order)


def _estimate(tests: Sequence[Test]) -> float:
    """The effect of the whole by the means over seeds."""
    first = tests[0]
    if isinstance(first, Effect):
        return sum(test.value for test in tests) / len(tests)
    parts = (_estimate(part) for part in zip(*(test.parts for test in tests), strict=True))
    return min(parts) if isinstance(first, All) else max(parts)


def _bound(effects: Sequence[Effect], level: float) -> _Bound:
    values = [effect.value for effect in effects]
    n = len(values)
    mean = sum(values) / n
    finite = n > 1 and math.isfinite(mean)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1)) if finite else math.nan
    if any(effect.by_sign for effect in effects) or not spread > 1e-12 * abs(mean):
        positive = sum(value > 0 for value in values)
        return _Bound(mean, None, sign_p_value(positive, n) <= level)
    low = mean - t_quantile(1 - level, n - 1) * spread / math.sqrt(n)
    return _Bound(mean, low, low > 0)


def _leaves(test: Test) -> Iterator[Effect]:
    if isinstance(test, Effect):
        yield test
    else:
        for part in test.parts:
            yield from _leaves(part)


def to_seeds(table: Table, values: Sequence[Values]) -> list[Seed]:
    """Views of the numbers of each seed, which know the rows of all."""
    measured = {cell for one in values for cell in one}
    rows = {
        column.name: [row.name for row in table.rows if (row.name, column.name) in measured] for column in table.columns
    }
    return [Seed(table, numbers, rows) for numbers in values]


def _expressions_of_seeds(claim: Claim, seeds: Sequence[Seed]) -> list[Tests]:
    """Return the tests of the seeds that have every number that the claim needs."""
    complete = []
    for seed in seeds:
        try:
            complete.append(claim.tests(seed))
        except MissingCell:
            continue
    return complete


def effect_of(table: Table, claim: Claim, values: Values) -> float | None:
    """Return by how much a claim holds in the numbers of one seed; None if one is missing."""
    complete = _expressions_of_seeds(claim, to_seeds(table, [values]))
    return _estimate([complete[0].holds]) if complete else None


def judge(table: Table, claim: Claim, values: Sequence[Values]) -> Judgement:
    """Judge a claim: reproduced if every part is significantly positive, contradicted if the opposite is shown.

    Each of the two verdicts is wrong in at most 5 % of cases.
    """
    each = _expressions_of_seeds(claim, to_seeds(table, values))
    if not each:
        return Judgement(claim.text, Verdict.NOT_MEASURED, math.nan, None, None, 0, 0)
    holds, fails = (_one_sided_bound([tests[i] for tests in each], LEVEL) for i in (0, 1))
    estimate, leaves = _estimate([tests.holds for tests in each]), list(_leaves(each[0].holds))
    verdict = Verdict.UNDECIDED
    if len(each) < 2:
        return Judgement(claim.text, Verdict.TOO_FEW_SEEDS, estimate, None, None, 1, len(leaves))
    if holds.positive != fails.positive:
        verdict = Verdict.REPRODUCED if holds.positive else Verdict.CONTRADICTED
    elif len(each) < seeds_for_sign_test(LEVEL) and any(effect.by_sign for effect in leaves):
        verdict = Verdict.TOO_FEW_SEEDS
    high = None if fails.low is None else -fails.low
    return Judgement(claim.text, verdict, estimate, holds.low, high, len(each), len(leaves))


def check(table: Table, claim: Claim, values: Sequence[Values]) -> Judgement:
    """Judge a claim on numbers that no training decides: an exact check."""
    effect = min(effect_of(table, claim, numbers) for numbers in values)
    verdict = Verdict.EXACT if effect > 0 else Verdict.FAILED
    return Judgement(claim.text, verdict, effect, None, None, len(values), 1)
