"""Claims as expressions over the numbers of one seed, and the verdict over seeds (docs/tables.md, "How a verdict is made").

An expression takes the numbers of one seed and returns the effects of its parts: positive where a part holds. A number that is
missing raises MissingCell, which `judge` catches.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import permutations
from typing import NamedTuple, TypeVar

from gesso.tables.student import seeds_for_sign_test, sign_p_value, t_quantile
from gesso.tables.table import Cell, Claim, Table, Values

LEVEL = 0.05
"""the largest probability of a wrong "reproduced", and of a wrong "contradicted\""""


class MissingCell(LookupError):
    """A number that an expression needs is not measured."""


class Seed(NamedTuple):
    """Numbers of one seed, by cell. rows: by column the rows that any seed has; others: the other seeds, on which the best of
    several rows is chosen."""

    table: Table
    values: Values
    rows: Mapping[str, Sequence[str]]
    others: tuple["Seed", ...] = ()

    def __getitem__(self, cell: Cell) -> float:
        if cell not in self.values:
            raise MissingCell(cell)
        return self.values[cell]

    def finite(self, cell: Cell) -> float:
        """For ratios and logarithms, which are undefined where a training diverged."""
        if not math.isfinite(self[cell]):
            raise MissingCell(cell)
        return self[cell]

    def score(self, cell: Cell) -> float:
        """The number with the sign that makes larger better."""
        return -self[cell] if self.table.lower(cell[1]) else self[cell]

    def rows_of(self, column: str, at_least: int = 1) -> Sequence[str]:
        rows = self.rows.get(column, ())
        if len(rows) < at_least:
            raise MissingCell(column)
        return rows

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(x, number), sorted by row. Raises MissingCell where another seed has a point more."""
        for row in self.rows_of(column):
            self[row, column]
        return list(self.table.curve(self.values, column))


class Effect(NamedTuple):
    """by_sign: only its sign counts, as it is not normally distributed: the sign test."""

    value: float
    by_sign: bool = False


class Parts(NamedTuple):
    """holds: the claim holds if all of these are positive; contradicted_by: it does not if all effects of any one of these
    groups are positive."""

    holds: tuple[Effect, ...]
    contradicted_by: tuple[tuple[Effect, ...], ...]


Expression = Callable[[Seed], Parts]
Option = TypeVar("Option")
OtherOption = TypeVar("OtherOption")


def _parts(*effects: float, by_sign: bool = False) -> Parts:
    """Parts each of which contradicts the claim where it is negative."""
    return Parts(
        tuple(Effect(value, by_sign) for value in effects), tuple((Effect(-value, by_sign),) for value in effects)
    )


def _difference(a: float, b: float) -> float:
    """Zero for two trainings that both diverged."""
    return 0.0 if a == b else a - b


def all_of(*expressions: Expression) -> Expression:
    """All of them hold."""

    def parts(seed: Seed) -> Parts:
        each = [expression(seed) for expression in expressions]
        return Parts(sum((p.holds for p in each), ()), sum((p.contradicted_by for p in each), ()))

    return parts


def improves_on(cell: Cell, baseline: Cell) -> Expression:
    """The number at (row, column) `cell` is better than that at `baseline`."""
    return lambda seed: _parts(
        _difference(seed[baseline], seed[cell]) * (1 if seed.table.lower(cell[1]) else -1),
    )


def improves_by(cell: Cell, baseline: Cell, share: float) -> Expression:
    """A number is lower than `baseline` by more than a share of it."""
    return lambda seed: _parts(_difference((1 - share) * seed[baseline], seed[cell]))


def at_most(cell: Cell, baseline: Cell, margin: float) -> Expression:
    """A number exceeds `baseline` by less than a share `margin` of it: one-sided equivalence."""
    return lambda seed: _parts(_difference((1 + margin) * seed[baseline], seed[cell]))


def at_least(cell: Cell, baseline: Cell, share: float) -> Expression:
    """A number is larger than a share of another."""
    return lambda seed: _parts(_difference(seed[cell], share * seed[baseline]))


def within(cell: Cell, other: Cell, margin: float) -> Expression:
    """Two positive numbers differ by less than a share `margin` of their mean: two one-sided tests.

    In the form margin (a+b)/2 -+ (a-b), which is linear in the numbers, so that no ratio is tested.
    """

    def parts(seed: Seed) -> Parts:
        a, b = seed[cell], seed[other]
        if math.isinf(a) or math.isinf(b):
            return _parts(0.0 if a == b else -math.inf)
        room = margin * (a + b) / 2
        return _parts(room - (a - b), room + (a - b))

    return parts


def near(cell: Cell, level: float, margin: float) -> Expression:
    """A number differs from `level` by less than a share `margin` of it: two one-sided tests."""
    return lambda seed: _parts((1 + margin) * level - seed[cell], seed[cell] - (1 - margin) * level)


def greater_than(cell: Cell, level: float) -> Expression:
    """A number is larger than `level`."""
    return lambda seed: _parts(seed[cell] - level)


def matches_published(cells: Sequence[Cell], margin: float) -> Expression:
    """Numbers differ from the published ones by less than a share of those."""

    def parts(seed: Seed) -> Parts:
        published = seed.table.published()
        return all_of(*(near(cell, published[cell], margin) for cell in cells))(seed)

    return parts


def is_best(row: str, column: str) -> Expression:
    """A row is better than each of the others of its column."""

    def parts(seed: Seed) -> Parts:
        others = [other for other in seed.rows_of(column, 2) if other != row]
        return all_of(*(improves_on((row, column), (other, column)) for other in others))(seed)

    return parts


def each_improves(column: str, rows: Sequence[str]) -> Expression:
    """Of the rows that are measured, each is better than the one before."""

    def parts(seed: Seed) -> Parts:
        measured = [row for row in rows if row in seed.rows_of(column, 2)]
        if len(measured) < 2:
            raise MissingCell(column)
        pairs = zip(measured, measured[1:], strict=False)
        return all_of(*(improves_on((after, column), (before, column)) for before, after in pairs))(seed)

    return parts


def _chosen(seed: Seed, options: Sequence[Option], value: Callable[[Seed, Option], float]) -> Option:
    """The option of the largest value over the other seeds, so that its number in this one is not a selected one."""
    return max(options, key=lambda option: sum(value(other, option) for other in seed.others or (seed,)))


def _maximum_exceeds(
    seed: Seed,
    options: Sequence[Option],
    value: Callable[[Seed, Option], float],
    others: Sequence[OtherOption],
    other_value: Callable[[Seed, OtherOption], float],
) -> Parts:
    """The largest mean of `options` exceeds the largest of `others`.

    Holds if an option chosen on the other seeds exceeds every one of `others`; contradicted if one of those, chosen alike,
    exceeds every option. Neither side takes a maximum over noise.
    """
    ours = value(seed, _chosen(seed, options, value))
    theirs = other_value(seed, _chosen(seed, others, other_value))
    return Parts(
        tuple(Effect(_difference(ours, other_value(seed, other))) for other in others),
        (tuple(Effect(_difference(theirs, value(seed, option))) for option in options),),
    )


def best_of(column: str, than: str) -> Expression:
    """The best row of a column is better than the best of another."""

    def parts(seed: Seed) -> Parts:
        def score(name: str) -> Callable[[Seed, str], float]:
            return lambda one, row: one.score((row, name))

        return _maximum_exceeds(seed, seed.rows_of(column), score(column), seed.rows_of(than), score(than))

    return parts


def optimum_inside(column: str, ends: tuple[str, ...] | None = None, rows: Sequence[str] | None = None) -> Expression:
    """Some row between the ends of a curve is better than both; `rows` limits the curve, `ends` names one end or both."""

    def parts(seed: Seed) -> Parts:
        curve = [row for row in seed.rows_of(column, 3) if rows is None or row in rows]
        outer = ends or (curve[0], curve[-1])
        inner = [row for row in curve if row not in outer]
        if not inner or not set(outer) <= set(curve):
            raise MissingCell(column)

        def score(one: Seed, row: str) -> float:
            return one.score((row, column))

        best = score(seed, _chosen(seed, inner, score))
        return Parts(
            tuple(Effect(_difference(best, score(seed, end))) for end in outer),
            tuple(tuple(Effect(_difference(score(seed, end), score(seed, row))) for row in inner) for end in outer),
        )

    return parts


def optimum_earlier(column: str, than: str) -> Expression:
    """In most trainings the best point of a curve lies at a smaller x than that of another."""
    return lambda seed: _parts(_optimum(seed, than) - _optimum(seed, column), by_sign=True)


def optimum_follows(given: Mapping[str, float], power: float, margin: float) -> Expression:
    """In most trainings the best x of columns goes as a power of what is given of each, but for `margin` in the exponent."""

    def parts(seed: Seed) -> Parts:
        slope = _slope([(value, _optimum(seed, column)) for column, value in given.items()])
        return _parts(margin - abs(slope - power), by_sign=True)

    return parts


def _optimum(seed: Seed, column: str) -> float:
    curve = [point for point in seed.curve(column) if math.isfinite(point[1])]
    if not curve:
        raise MissingCell(column)
    choose = min if seed.table.lower(column) else max
    return choose(curve, key=lambda point: point[1])[0]


def power_law(column: str, power: float, margin: float) -> Expression:
    """A curve goes as a power of x, but for `margin` in the fitted exponent: two one-sided tests."""

    def parts(seed: Seed) -> Parts:
        seed.rows_of(column, 3)
        slope = _slope(seed.curve(column))
        return _parts(margin - (slope - power), margin + (slope - power))

    return parts


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares of ln y over ln x."""
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def helps_more(column: str, than: str, base: str) -> Expression:
    """The best row of a column is better than its row `base` by a larger share than that of another column."""

    def parts(seed: Seed) -> Parts:
        def share(name: str) -> Callable[[Seed, str], float]:
            sign = 1 if seed.table.lower(name) else -1
            return lambda one, row: sign * (1 - one.finite((row, name)) / one.finite((base, name)))

        rows = [[row for row in seed.rows_of(name, 2) if row != base] for name in (column, than)]
        return _maximum_exceeds(seed, rows[0], share(column), rows[1], share(than))

    return parts


def narrower(column: str, than: str) -> Expression:
    """A curve rises more around its optimum than another: by the mean of its points over the optimum."""

    def parts(seed: Seed) -> Parts:
        def rise(name: str) -> Callable[[Seed, str], float]:
            rows, sign = seed.rows_of(name, 3), 1 if seed.table.lower(name) else -1
            return lambda one, row: (
                sign * (statistics.mean(one.finite((r, name)) for r in rows) / one.finite((row, name)) - 1)
            )

        return _maximum_exceeds(seed, seed.rows_of(column, 3), rise(column), seed.rows_of(than, 3), rise(than))

    return parts


def bests_within(columns: Sequence[str], margin: float) -> Expression:
    """The best (lowest) numbers of columns exceed one another by less than a share `margin`."""

    def parts(seed: Seed) -> Parts:
        def below(name: str, factor: float) -> Callable[[Seed, str], float]:
            return lambda one, row: -factor * one[row, name]

        each = [
            _maximum_exceeds(seed, seed.rows_of(a), below(a, 1.0), seed.rows_of(b), below(b, 1 + margin))
            for a, b in permutations(columns, 2)
        ]
        return all_of(*(lambda _, p=p: p for p in each))(seed)

    return parts


def less_spread(columns: Sequence[str], row: str) -> Expression:
    """The best (lowest) numbers of columns, each at a row of its own, differ by a smaller factor than those of one row."""

    def parts(seed: Seed) -> Parts:
        def at_row(one: Seed, pair: tuple[str, str]) -> float:
            return math.log(one.finite((row, pair[0]))) - math.log(one.finite((row, pair[1])))

        def log_of(name: str) -> Callable[[Seed, str], float]:
            return lambda one, r: -math.log(one.finite((r, name)))

        def best(one: Seed, name: str) -> float:
            return max(log_of(name)(one, r) for r in seed.rows_of(name))

        def apart(one: Seed, pair: tuple[str, str]) -> float:
            return best(one, pair[1]) - best(one, pair[0])

        pairs, low = list(permutations(columns, 2)), {}
        for name in columns:
            low[name] = log_of(name)(seed, _chosen(seed, seed.rows_of(name), log_of(name)))
        fixed = at_row(seed, _chosen(seed, pairs, at_row))
        a, b = _chosen(seed, pairs, apart)
        return Parts(
            tuple(Effect(fixed + low[c] - log_of(d)(seed, r)) for c, d in pairs for r in seed.rows_of(d)),
            (
                tuple(
                    Effect(low[b] - log_of(a)(seed, r) - at_row(seed, pair)) for r in seed.rows_of(a) for pair in pairs
                ),
            ),
        )

    return parts


def cheaper(cost: str, column: str, than: str, times: float) -> Expression:
    """The best number of one column is beaten by another at so many times less cost."""

    def parts(seed: Seed) -> Parts:
        def score(name: str) -> Callable[[Seed, str], float]:
            return lambda one, row: one.score((row, name))

        # Which row is the record decides only what it costs: chosen on all seeds, so that it is the same for each.
        pooled = seed._replace(others=(seed, *seed.others))
        record = _chosen(pooled, seed.rows_of(than), score(than))
        rows = [r for r in seed.rows_of(column) if seed[r, cost] * times <= seed[record, cost]]
        if not rows:
            return _parts(-math.inf)
        return _maximum_exceeds(seed, rows, score(column), seed.rows_of(than), score(than))

    return parts


class Verdict(StrEnum):
    """What the numbers say of a claim."""

    REPRODUCED = "reproduced"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    TOO_FEW_SEEDS = "too few seeds"
    NOT_MEASURED = "not measured"
    EXACT = "exact check"
    FAILED = "exact check failed"


class Judgement(NamedTuple):
    """effect, low: of the part that is least sure, its mean over seeds and the bound that decides "reproduced"; high: the bound
    that decides "contradicted"; None where the sign test decides."""

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


def _bound(effects: Sequence[Effect], level: float) -> _Bound:
    values = [effect.value for effect in effects]
    n = len(values)
    mean = sum(values) / n
    spread = statistics.stdev(values) if n > 1 and all(map(math.isfinite, values)) else math.nan
    if any(effect.by_sign for effect in effects) or not spread > 1e-12 * abs(mean):
        positive = sum(value > 0 for value in values)
        return _Bound(mean, None, sign_p_value(positive, n) <= level)
    low = mean - t_quantile(1 - level, n - 1) * spread / math.sqrt(n)
    return _Bound(mean, low, low > 0)


def seeds_of(table: Table, values: Sequence[Values]) -> Iterator[Seed]:
    """Views of the numbers of each seed, which know the rows of all."""
    measured = {cell for one in values for cell in one}
    rows = {
        column.name: [row.name for row in table.rows if (row.name, column.name) in measured] for column in table.columns
    }
    return (Seed(table, one, rows) for one in values)


def _complete(claim: Claim, seeds: Sequence[Seed]) -> list[Seed]:
    """Those that have every number that the claim needs, each with the others."""
    complete = []
    for seed in seeds:
        try:
            claim.parts(seed)
        except MissingCell:
            continue
        complete.append(seed)
    return [seed._replace(others=tuple(one for one in complete if one is not seed)) for seed in complete]


def effect_of(table: Table, claim: Claim, values: Values) -> float | None:
    """The smallest effect of a claim's parts among the numbers of one seed; None where one is missing."""
    try:
        return min(effect.value for effect in claim.parts(next(seeds_of(table, [values]))).holds)
    except MissingCell:
        return None


def judge(table: Table, claim: Claim, values: Sequence[Values]) -> Judgement:
    """Reproduced if every part is significantly positive, contradicted if the opposite is shown; each wrong in at most 5 %."""
    seeds = _complete(claim, list(seeds_of(table, values)))
    if not seeds:
        return Judgement(claim.text, Verdict.NOT_MEASURED, math.nan, None, None, 0, 0)
    each = [claim.parts(seed) for seed in seeds]
    holds = [_bound(effects, LEVEL) for effects in zip(*(parts.holds for parts in each), strict=True)]
    weakest = min(holds, key=lambda bound: (bound.positive, bound.mean if bound.low is None else bound.low))
    if len(seeds) < 2:
        return Judgement(claim.text, Verdict.TOO_FEW_SEEDS, weakest.mean, None, None, 1, len(holds))
    groups = list(zip(*(parts.contradicted_by for parts in each), strict=True))
    against = [[_bound(effects, LEVEL / len(groups)) for effects in zip(*group, strict=True)] for group in groups]
    reproduced = all(bound.positive for bound in holds)
    contradicted = any(all(bound.positive for bound in group) for group in against)
    verdict = Verdict.UNDECIDED
    if reproduced != contradicted:
        verdict = Verdict.REPRODUCED if reproduced else Verdict.CONTRADICTED
    elif len(seeds) < seeds_for_sign_test(LEVEL) and any(effect.by_sign for effect in each[0].holds):
        verdict = Verdict.TOO_FEW_SEEDS
    low = None if any(bound.low is None for bound in holds) else weakest.low
    lows = [[bound.low for bound in group] for group in against]
    high = None if any(None in group for group in lows) else -max(min(group) for group in lows)
    return Judgement(claim.text, verdict, weakest.mean, low, high, len(seeds), len(holds))


def check(table: Table, claim: Claim, values: Sequence[Values]) -> Judgement:
    """The verdict on numbers that no training decides: they are as claimed, or not."""
    effect = min(effect_of(table, claim, one) for one in values)
    verdict = Verdict.EXACT if effect > 0 else Verdict.FAILED
    return Judgement(claim.text, verdict, effect, None, None, len(values), 1)
