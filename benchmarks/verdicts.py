"""Error rates and power of verdicts by simulation, for every kind of claim in gesso/reproduce/claims.py.

    python benchmarks/verdicts.py [--draws 4000] [--num-seeds 3 5 10]

Numbers of a seed are means plus noise of standard deviation 1; half of its variance is common to all cells of a seed.
Each kind has cases at the boundary between true and false, where wrong verdicts are most frequent, among them all ties
between rows that favour a selected minimum. At the boundary "reproduced" and "contradicted" are both wrong. Power is
measured at means two standard deviations of a paired difference on either side.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gesso.reproduce import claims
from gesso.reproduce.claims import Statement, TableValues, Verdict, all_of, close, equals
from gesso.reproduce.schema import Claim, Column, Row, Table

ROWS = ("r1", "r2", "r3", "r4", "r5")
TABLE = Table(
    "t", "", "", (Column("a"), Column("b"), Column("c")), tuple(Row(r, x=2.0**i) for i, r in enumerate(ROWS)), {}
)
BASE_VALUE = 100.0
"""Mean of the numbers, so large that ratios are approximately normal."""
LARGE_DIFFERENCE = 20.0
"""Distance of a mean that is never the best."""
EFFECT = 2.0
Means = Mapping[str, Sequence[float | None]]
"""Means of each row, by column."""
Expression = Callable[[TableValues], Statement]


class Case(NamedTuple):
    """A simulated claim. `truth` is None at the boundary, else whether the claim holds."""

    kind: str
    name: str
    expression: Expression
    means: Means
    truth: bool | None = None


def column(*values: float) -> list[float]:
    """Return the means of a column."""
    return [BASE_VALUE + value for value in values]


def cell(name: str, row: int = 1) -> tuple[str, str]:
    """Return a cell of a column."""
    return f"r{row}", name


def comparisons() -> Iterator[Case]:
    """Yield comparisons of two cells, and of a cell with a number."""
    a, b = cell("a"), cell("b")
    for truth, shift in ((None, 0.0), (True, EFFECT), (False, -EFFECT)):
        yield Case("<", "", lambda v: v[a] < v[b], {"a": column(-shift), "b": column(0)}, truth)
        yield Case("> number", "", lambda v: v[a] > BASE_VALUE, {"a": column(shift)}, truth)
        yield Case("< multiple", "", lambda v: v[a] < 1.05 * v[b], {"a": column(5 - shift), "b": column(0)}, truth)
        yield Case("> multiple", "", lambda v: v[a] > 0.5 * v[b], {"a": column(shift - 50), "b": column(0)}, truth)
        # Margins of 4 and of .1, so that one side and both sides of an equivalence are near.
        for margin in (0.04, 0.001) if truth is None else (0.04,):
            edge = BASE_VALUE * margin
            offset = edge if truth is None else 0.0 if truth else edge + EFFECT
            name = f"margin {edge:g}"
            yield Case("equals", name, equals_base(margin), {"a": column(offset)}, truth)
            means = {"a": column(offset / (1 - margin / 2)), "b": column(0)}
            yield Case("close", name, close_pair(margin), means, truth)


def equals_base(margin: float) -> Expression:
    """Return the claim that a cell equals BASE_VALUE within a margin."""
    return lambda v: equals(v[cell("a")], BASE_VALUE, margin)


def close_pair(margin: float) -> Expression:
    """Return the claim that two cells are equal within a margin."""
    return lambda v: close(v[cell("a")], v[cell("b")], margin)


def conjunctions() -> Iterator[Case]:
    """Yield claims of four parts."""

    def every(v: TableValues) -> Statement:
        return all_of(v.improves(cell("a", i), cell("b", i)) for i in (1, 2, 3, 4))

    def best(v: TableValues) -> Statement:
        return v.is_best("r1", "a")

    def chain(v: TableValues) -> Statement:
        return v.each_improves("a", ROWS)

    rows = column(0, 0, 0, 0)
    yield Case("all_of", "no effect", every, {"a": rows, "b": rows})
    yield Case(
        "all_of",
        "one part without effect",
        every,
        {"a": rows, "b": column(0, LARGE_DIFFERENCE, LARGE_DIFFERENCE, LARGE_DIFFERENCE)},
    )
    yield Case("all_of", "", every, {"a": rows, "b": column(*[EFFECT] * 4)}, True)
    yield Case(
        "all_of",
        "",
        every,
        {"a": rows, "b": column(-EFFECT, LARGE_DIFFERENCE, LARGE_DIFFERENCE, LARGE_DIFFERENCE)},
        False,
    )
    yield Case("is_best", "no effect", best, {"a": column(0, 0, 0, 0, 0)})
    yield Case("is_best", "one rival", best, {"a": column(0, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE, LARGE_DIFFERENCE)})
    yield Case("is_best", "", best, {"a": column(0, *[EFFECT] * 4)}, True)
    yield Case(
        "is_best", "", best, {"a": column(0, -EFFECT, LARGE_DIFFERENCE, LARGE_DIFFERENCE, LARGE_DIFFERENCE)}, False
    )
    yield Case("each_improves", "no effect", chain, {"a": column(0, 0, 0, 0, 0)})
    yield Case(
        "each_improves",
        "one step without effect",
        chain,
        {"a": column(0, -LARGE_DIFFERENCE, -2 * LARGE_DIFFERENCE, -3 * LARGE_DIFFERENCE, -3 * LARGE_DIFFERENCE)},
    )
    yield Case("each_improves", "", chain, {"a": column(*(-EFFECT * i for i in range(5)))}, True)
    yield Case(
        "each_improves",
        "",
        chain,
        {
            "a": column(
                0, -LARGE_DIFFERENCE, -2 * LARGE_DIFFERENCE, -3 * LARGE_DIFFERENCE, EFFECT - 3 * LARGE_DIFFERENCE
            )
        },
        False,
    )


SHAPES: dict[str, tuple[float, ...]] = {
    "flat": (0, 0, 0, 0, 0),
    "one": (LARGE_DIFFERENCE, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE),
    "two": (LARGE_DIFFERENCE, 0, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE),
    "near": (2, 1, 0, 1, 2),
}
"""Curves whose smallest mean is 0."""


def optima() -> Iterator[Case]:
    """Yield claims on the best numbers of columns."""

    def best(v: TableValues) -> Statement:
        return v.best_improves("a", "b")

    def inside(v: TableValues) -> Statement:
        return v.optimum_inside("a")

    def within_margin(v: TableValues) -> Statement:
        return all_of(v.best(a) < v.best(b) * 1.05 for a in "abc" for b in "abc" if a != b)

    for a, curve_a in SHAPES.items():
        for b, curve_b in SHAPES.items():
            yield Case("best_improves", f"{a} against {b}", best, {"a": column(*curve_a), "b": column(*curve_b)})
    near = SHAPES["near"]
    for truth in (True, False):
        shift = EFFECT if truth else -EFFECT
        yield Case("best_improves", "", best, {"a": column(*near), "b": column(*(v + shift for v in near))}, truth)
        yield Case("optimum_inside", "", inside, {"a": column(shift, 1, 0, 1, shift)}, truth)
    ties: dict[str, tuple[float, ...]] = {
        "flat": (0, 0, 0, 0, 0),
        "an end as good as one": (0, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE),
        "an end as good as all": (0, 0, 0, 0, LARGE_DIFFERENCE),
        "both ends as good as one": (0, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, 0),
    }
    for name, curve in ties.items():
        yield Case("optimum_inside", name, inside, {"a": column(*curve)})
    for a, curve_a in SHAPES.items():
        for b, curve_b in SHAPES.items():
            worse = [BASE_VALUE * 1.05 + v for v in curve_b]
            yield Case(
                "best < multiple",
                f"{a} against {b}",
                within_margin,
                {"a": column(*curve_a), "b": worse, "c": column(*(v + 2.5 for v in curve_a))},
            )
    for truth, offset in ((True, 0.0), (False, 5 + EFFECT)):
        yield Case(
            "best < multiple",
            "",
            within_margin,
            {"a": column(*near), "b": column(*(v + offset for v in near)), "c": column(*near)},
            truth,
        )


def ratios() -> Iterator[Case]:
    """Yield claims on ratios, at a noise of 1 % of the numbers."""

    def improves_more(v: TableValues) -> Statement:
        return v.improves_more("a", "b", "r1")

    def narrower(v: TableValues) -> Statement:
        return v.is_narrower("a", "b")

    def spread(v: TableValues) -> Statement:
        return v.spreads_less(["a", "b", "c"], "r3")

    def cheaper(v: TableValues) -> Statement:
        return v.is_cheaper("c", "a", "b", 2)

    for name, curve in {"flat": (0, -5, -5, -5, -5), "one": (0, -5, 0, 0, 0)}.items():
        for other, curve_b in {"flat": (0, -5, -5, -5, -5), "one": (0, -5, 0, 0, 0)}.items():
            yield Case(
                "improves_more", f"{name} against {other}", improves_more, {"a": column(*curve), "b": column(*curve_b)}
            )
    yield Case("improves_more", "", improves_more, {"a": column(0, -2, -8, -2, 0), "b": column(0, -2, -4, -2, 0)}, True)
    yield Case(
        "improves_more", "", improves_more, {"a": column(0, -2, -4, -2, 0), "b": column(0, -2, -8, -2, 0)}, False
    )
    for name, curve in {"wide": (10, 0, 0, 0, 10), "narrow": (5, 5, 0, 5, 5)}.items():
        for other, curve_b in {"wide": (10, 0, 0, 0, 10), "narrow": (5, 5, 0, 5, 5)}.items():
            yield Case("is_narrower", f"{name} against {other}", narrower, {"a": column(*curve), "b": column(*curve_b)})
    yield Case("is_narrower", "", narrower, {"a": column(10, 5, 0, 5, 10), "b": column(5, 2, 0, 2, 5)}, True)
    yield Case("is_narrower", "", narrower, {"a": column(5, 2, 0, 2, 5), "b": column(10, 5, 0, 5, 10)}, False)
    for name in ("flat", "one"):
        curve = SHAPES[name]
        rising = {"a": column(*curve), "b": column(*(v + 3 for v in curve)), "c": column(*(v + 6 for v in curve))}
        yield Case("spreads_less", f"{name}, three columns", spread, rising)
        yield Case("spreads_less", f"{name}, all alike", spread, {c: column(*curve) for c in "abc"})
    apart = {"a": column(0, 3, 6, 9, 12), "b": column(6, 3, 0, 3, 6), "c": column(12, 9, 6, 3, 0)}
    yield Case("spreads_less", "", spread, apart, True)
    yield Case(
        "spreads_less",
        "",
        spread,
        {"a": column(0, 9, 6, 9, 9), "b": column(9, 9, 6, 9, 9), "c": column(9, 9, 6, 9, 9)},
        False,
    )
    for name, costly in (("flat", 0.0), ("one", LARGE_DIFFERENCE)):
        yield Case(
            "is_cheaper",
            name,
            cheaper,
            {"a": column(0, costly, costly), "b": column(LARGE_DIFFERENCE, LARGE_DIFFERENCE, 0), "c": [1.0, 1.0, 2.0]},
        )
    for truth, shift in ((True, EFFECT), (False, -EFFECT)):
        yield Case(
            "is_cheaper",
            "",
            cheaper,
            {"a": column(0, 1), "b": column(LARGE_DIFFERENCE, LARGE_DIFFERENCE, shift), "c": [1.0, 1.0, 2.0]},
            truth,
        )


def optimum_positions() -> Iterator[Case]:
    """Yield claims on the x of optima, and on exponents."""

    def earlier(v: TableValues) -> Statement:
        return v.optimum("a") < v.optimum("b")

    def follows(v: TableValues) -> Statement:
        return v.optimum_follows({"a": 1.0, "b": 2.0, "c": 4.0}, 1.0, 0.25)

    def law(v: TableValues) -> Statement:
        return v.power_law("a", -1.0, 0.02)

    for name, curve in SHAPES.items():
        yield Case("optimum <", name, earlier, {"a": column(*curve), "b": column(*curve)})
    yield Case("optimum <", "", earlier, {"a": column(2, 0, 2, 4, 6), "b": column(6, 4, 2, 0, 2)}, True)
    yield Case("optimum <", "", earlier, {"a": column(6, 4, 2, 0, 2), "b": column(2, 0, 2, 4, 6)}, False)
    straight = {"a": column(2, 0, 2, 4, 6), "b": column(4, 2, 0, 2, 4), "c": column(6, 4, 2, 0, 2)}
    yield Case("optimum_follows", "", follows, straight, True)
    yield Case("optimum_follows", "", follows, dict(zip("cba", straight.values(), strict=True)), False)
    for truth, slope in ((None, -0.98), (True, -1.0), (False, -0.95)):
        yield Case("power_law", "", law, {"a": [BASE_VALUE * 2 ** (i * slope) for i in range(5)]}, truth)


def cases() -> list[Case]:
    """Return all cases."""
    return [*comparisons(), *conjunctions(), *optima(), *ratios(), *optimum_positions()]


def sample_values(case: Case, rng: random.Random) -> dict[tuple[str, str], float]:
    """Return the numbers of one seed. Costs have no noise, and numbers of a power law 1 %."""
    common = rng.gauss(0, 1)
    values = {}
    for name, means in case.means.items():
        for row, mean in zip(ROWS, means, strict=False):
            if mean is not None:
                noise = math.sqrt(0.5) * (common + rng.gauss(0, 1))
                if case.kind == "is_cheaper" and name == "c":
                    noise = 0.0
                values[row, name] = mean * (1 + 0.01 * noise) if case.kind == "power_law" else mean + noise
    return values


def verdict_rates(case: Case, num_seeds: int, draws: int, rng: random.Random | None = None) -> tuple[float, float]:
    """Return the fractions of "reproduced" and of "contradicted"."""
    rng, claim = rng or random.Random(0), Claim(case.kind, case.expression)
    verdicts = [
        claims.judge(TABLE, claim, [sample_values(case, rng) for _ in range(num_seeds)]).verdict for _ in range(draws)
    ]
    return verdicts.count(Verdict.REPRODUCED) / draws, verdicts.count(Verdict.CONTRADICTED) / draws


def print_table(draws: int, seed_counts: Sequence[int], log: Callable[[str], None]) -> None:
    """Print a line for each kind: the worst error at the boundary and the power, at each number of seeds."""
    kinds = list(dict.fromkeys(case.kind for case in cases()))
    names = [f"{n} seeds: {name}" for n in seed_counts for name in ("wrong R", "wrong C", "power R", "power C")]
    log("| kind | " + " | ".join(names) + " |")
    log("|---|" + "--:|" * len(names))
    for kind in kinds:
        texts = []
        for n in seed_counts:
            results = [(case, *verdict_rates(case, n, draws)) for case in cases() if case.kind == kind]
            edge = [(r, c) for case, r, c in results if case.truth is None] or [(math.nan, math.nan)]
            wrong_r = max([r for r, _ in edge] + [r for case, r, _ in results if case.truth is False])
            wrong_c = max([c for _, c in edge] + [c for case, _, c in results if case.truth is True])
            power_r = max((r for case, r, _ in results if case.truth is True), default=math.nan)
            power_c = max((c for case, _, c in results if case.truth is False), default=math.nan)
            texts += [f"{100 * value:.1f}" for value in (wrong_r, wrong_c, power_r, power_c)]
        log(f"| `{kind}` | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--num-seeds", type=int, nargs="+", default=[3, 5, 10])
    options = parser.parse_args()
    print_table(options.draws, options.num_seeds, lambda line: print(line, flush=True))
