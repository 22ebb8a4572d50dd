"""Simulate the error rates and the power of verdicts for every kind of claim in gesso/reproduce/claims.py.

    python benchmarks/verdicts.py [--draws 4000] [--seeds 3 5 10]

Values of a seed are means plus noise of standard deviation 1; half of its variance is shared by all cells of the seed.
Each kind has cases at the boundary between true and false, where wrong verdicts are most frequent, including every
arrangement of ties between rows that favours a selected minimum. At the boundary both "reproduced" and "contradicted"
are wrong. Power is measured at means two standard deviations of a paired difference on either side.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gesso.reproduce import claims
from gesso.reproduce.claims import Expression, Verdict
from gesso.reproduce.schema import Claim, Column, Row, Table

ROWS = ("r1", "r2", "r3", "r4", "r5")
TABLE = Table(
    "t", "", "", (Column("a"), Column("b"), Column("c")), tuple(Row(r, x=2.0**i) for i, r in enumerate(ROWS)), {}
)
BASE_VALUE = 100.0  # added to all means, so that ratios of values are nearly normal
LARGE_DIFFERENCE = 20.0  # a mean this much above the best is never the best
EFFECT = 2.0
Means = Mapping[str, Sequence[float | None]]
"""means of all rows by column"""


class Case(NamedTuple):
    """A claim and the means of its values; truth is None at the boundary, otherwise whether the claim is true."""

    kind: str
    name: str
    expression: Expression
    means: Means
    truth: bool | None = None


def column(*values: float) -> list[float]:
    """Return values plus BASE_VALUE."""
    return [BASE_VALUE + value for value in values]


def cell(name: str, row: int = 1) -> tuple[str, str]:
    """Return the address of a cell."""
    return f"r{row}", name


def comparisons() -> Iterator[Case]:
    """Yield claims on two cells, and on a cell and a number."""
    for truth, shift in ((None, 0.0), (True, EFFECT), (False, -EFFECT)):
        pair = {"a": column(-shift), "b": column(0)}
        yield Case("improves_on", "", claims.improves_on(cell("a"), cell("b")), pair, truth)
        yield Case("greater_than", "", claims.greater_than(cell("a"), BASE_VALUE), {"a": column(shift)}, truth)
        yield Case(
            "at_most", "", claims.at_most(cell("a"), cell("b"), 0.05), {"a": column(5 - shift), "b": column(0)}, truth
        )
        yield Case(
            "improves_by",
            "",
            claims.improves_by(cell("a"), cell("b"), 0.1),
            {"a": column(-10 - shift), "b": column(0)},
            truth,
        )
        yield Case(
            "at_least", "", claims.at_least(cell("a"), cell("b"), 0.5), {"a": column(shift - 50), "b": column(0)}, truth
        )
        # With the margin of 4 one bound of the equivalence is near, with the margin of .1 both are.
        for margin in (0.04, 0.001) if truth is None else (0.04,):
            edge = BASE_VALUE * margin
            off = edge if truth is None else 0.0 if truth else edge + EFFECT
            name = f"margin {edge:g}"
            yield Case("equals", name, claims.equals(cell("a"), BASE_VALUE, margin), {"a": column(off)}, truth)
            other = {"a": column(off / (1 - margin / 2)), "b": column(0)}
            yield Case("within", name, claims.within(cell("a"), cell("b"), margin), other, truth)


def conjunctions() -> Iterator[Case]:
    """Yield claims of four parts."""
    every = claims.all_of(*(claims.improves_on(cell("a", i), cell("b", i)) for i in (1, 2, 3, 4)))
    best, chain = claims.is_best("r1", "a"), claims.each_improves("a", ROWS)
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


CURVES = {  # by shape; the least mean is 0
    "flat": (0, 0, 0, 0, 0),
    "one": (LARGE_DIFFERENCE, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE),
    "two": (LARGE_DIFFERENCE, 0, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE),
    "near": (2, 1, 0, 1, 2),
}


def optima() -> Iterator[Case]:
    """Yield claims on the best values of columns."""
    best, inside = claims.best_of("a", "b"), claims.optimum_inside("a")
    for a, curve_a in CURVES.items():
        for b, curve_b in CURVES.items():
            yield Case("best_of", f"{a} against {b}", best, {"a": column(*curve_a), "b": column(*curve_b)})
    near = CURVES["near"]
    for truth in (True, False):
        shift = EFFECT if truth else -EFFECT
        yield Case("best_of", "", best, {"a": column(*near), "b": column(*(v + shift for v in near))}, truth)
        yield Case("optimum_inside", "", inside, {"a": column(shift, 1, 0, 1, shift)}, truth)
    for name, curve in {
        "flat": (0, 0, 0, 0, 0),
        "an end as good as one": (0, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE),
        "an end as good as all": (0, 0, 0, 0, LARGE_DIFFERENCE),
        "both ends as good as one": (0, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, 0),
    }.items():
        yield Case("optimum_inside", name, inside, {"a": column(*curve)})
    margin = claims.bests_within(["a", "b", "c"], 0.05)
    for a, curve_a in CURVES.items():
        for b, curve_b in CURVES.items():
            worse = [BASE_VALUE * 1.05 + v for v in curve_b]
            yield Case(
                "bests_within",
                f"{a} against {b}",
                margin,
                {"a": column(*curve_a), "b": worse, "c": column(*(v + 2.5 for v in curve_a))},
            )
    for truth, off in ((True, 0.0), (False, 5 + EFFECT)):
        yield Case(
            "bests_within",
            "",
            margin,
            {"a": column(*near), "b": column(*(v + off for v in near)), "c": column(*near)},
            truth,
        )


def ratios() -> Iterator[Case]:
    """Yield claims on ratios, with noise of 1 % of the values."""
    helps, narrow = claims.helps_more("a", "b", "r1"), claims.narrower("a", "b")
    for name, curve in {"flat": (0, -5, -5, -5, -5), "one": (0, -5, 0, 0, 0)}.items():
        for other, curve_b in {"flat": (0, -5, -5, -5, -5), "one": (0, -5, 0, 0, 0)}.items():
            yield Case("helps_more", f"{name} against {other}", helps, {"a": column(*curve), "b": column(*curve_b)})
    yield Case("helps_more", "", helps, {"a": column(0, -2, -8, -2, 0), "b": column(0, -2, -4, -2, 0)}, True)
    yield Case("helps_more", "", helps, {"a": column(0, -2, -4, -2, 0), "b": column(0, -2, -8, -2, 0)}, False)
    for name, curve in {"wide": (10, 0, 0, 0, 10), "narrow": (5, 5, 0, 5, 5)}.items():
        for other, curve_b in {"wide": (10, 0, 0, 0, 10), "narrow": (5, 5, 0, 5, 5)}.items():
            yield Case("narrower", f"{name} against {other}", narrow, {"a": column(*curve), "b": column(*curve_b)})
    yield Case("narrower", "", narrow, {"a": column(10, 5, 0, 5, 10), "b": column(5, 2, 0, 2, 5)}, True)
    yield Case("narrower", "", narrow, {"a": column(5, 2, 0, 2, 5), "b": column(10, 5, 0, 5, 10)}, False)
    spread = claims.less_spread(["a", "b", "c"], "r3")
    flat, one = (0, 0, 0, 0, 0), (LARGE_DIFFERENCE, LARGE_DIFFERENCE, 0, LARGE_DIFFERENCE, LARGE_DIFFERENCE)
    for name, curve in {"flat": flat, "one": one}.items():
        rising = {"a": column(*curve), "b": column(*(v + 3 for v in curve)), "c": column(*(v + 6 for v in curve))}
        yield Case("less_spread", f"{name}, three columns", spread, rising)
        yield Case("less_spread", f"{name}, all alike", spread, {c: column(*curve) for c in "abc"})
    apart = {"a": column(0, 3, 6, 9, 12), "b": column(6, 3, 0, 3, 6), "c": column(12, 9, 6, 3, 0)}
    yield Case("less_spread", "", spread, apart, True)
    yield Case(
        "less_spread",
        "",
        spread,
        {"a": column(0, 9, 6, 9, 9), "b": column(9, 9, 6, 9, 9), "c": column(9, 9, 6, 9, 9)},
        False,
    )
    cheap = claims.cheaper("c", "a", "b", 2)
    for name, curve in {"flat": (0, 0, 0), "one": (0, LARGE_DIFFERENCE, LARGE_DIFFERENCE)}.items():
        yield Case(
            "cheaper",
            name,
            cheap,
            {"a": column(*curve), "b": column(LARGE_DIFFERENCE, LARGE_DIFFERENCE, 0), "c": [1.0, 1.0, 2.0]},
        )
    for truth, shift in ((True, EFFECT), (False, -EFFECT)):
        yield Case(
            "cheaper",
            "",
            cheap,
            {"a": column(0, 1), "b": column(LARGE_DIFFERENCE, LARGE_DIFFERENCE, shift), "c": [1.0, 1.0, 2.0]},
            truth,
        )


def optimum_positions() -> Iterator[Case]:
    """Yield claims on the x of optima and on exponents."""
    early = claims.optimum_earlier("a", "b")
    for name, curve in CURVES.items():
        yield Case("optimum_earlier", name, early, {"a": column(*curve), "b": column(*curve)})
    yield Case("optimum_earlier", "", early, {"a": column(2, 0, 2, 4, 6), "b": column(6, 4, 2, 0, 2)}, True)
    yield Case("optimum_earlier", "", early, {"a": column(6, 4, 2, 0, 2), "b": column(2, 0, 2, 4, 6)}, False)
    follows = claims.optimum_follows({"a": 1.0, "b": 2.0, "c": 4.0}, 1.0, 0.25)
    straight = {"a": column(2, 0, 2, 4, 6), "b": column(4, 2, 0, 2, 4), "c": column(6, 4, 2, 0, 2)}
    yield Case("optimum_follows", "", follows, straight, True)
    yield Case("optimum_follows", "", follows, dict(zip("cba", straight.values(), strict=True)), False)
    law = claims.power_law("a", -1.0, 0.02)
    for truth, slope in ((None, -0.98), (True, -1.0), (False, -0.95)):
        yield Case("power_law", "", law, {"a": [BASE_VALUE * 2 ** (i * slope) for i in range(5)]}, truth)


def cases() -> list[Case]:
    """Return all cases."""
    return [*comparisons(), *conjunctions(), *optima(), *ratios(), *optimum_positions()]


def sample_values(case: Case, rng: random.Random) -> dict[tuple[str, str], float]:
    """Return the values of one seed; costs have no noise, values of a power law have noise of 1 %."""
    common = rng.gauss(0, 1)
    values = {}
    for name, means in case.means.items():
        for row, mean in zip(ROWS, means, strict=False):
            if mean is not None:
                noise = math.sqrt(0.5) * (common + rng.gauss(0, 1))
                if case.kind == "cheaper" and name == "c":
                    noise = 0.0
                values[row, name] = mean * (1 + 0.01 * noise) if case.kind == "power_law" else mean + noise
    return values


def verdict_rates(case: Case, num_seeds: int, num_draws: int, rng: random.Random | None = None) -> tuple[float, float]:
    """Return the shares of "reproduced" and of "contradicted" over simulated tables of `num_seeds` seeds."""
    rng, claim = rng or random.Random(0), Claim(case.kind, case.expression)
    verdicts = [
        claims.judge(TABLE, claim, [sample_values(case, rng) for _ in range(num_seeds)]).verdict
        for _ in range(num_draws)
    ]
    return verdicts.count(Verdict.REPRODUCED) / num_draws, verdicts.count(Verdict.CONTRADICTED) / num_draws


def print_table(num_draws: int, seed_counts: Sequence[int], log: Callable[[str], None]) -> None:
    """Print the table of docs/tables.md: for each kind the worst error rate and the power, at each number of seeds."""
    kinds = list(dict.fromkeys(case.kind for case in cases()))
    names = [f"{n} seeds: {name}" for n in seed_counts for name in ("wrong R", "wrong C", "power R", "power C")]
    log("| kind | " + " | ".join(names) + " |")
    log("|---|" + "--:|" * len(names))
    for kind in kinds:
        texts = []
        for n in seed_counts:
            results = [(case, *verdict_rates(case, n, num_draws)) for case in cases() if case.kind == kind]
            boundary = [(r, c) for case, r, c in results if case.truth is None] or [(math.nan, math.nan)]
            wrong_r = max([r for r, _ in boundary] + [r for case, r, _ in results if case.truth is False])
            wrong_c = max([c for _, c in boundary] + [c for case, _, c in results if case.truth is True])
            power_r = max((r for case, r, _ in results if case.truth is True), default=math.nan)
            power_c = max((c for case, _, c in results if case.truth is False), default=math.nan)
            texts += [f"{100 * value:.1f}" for value in (wrong_r, wrong_c, power_r, power_c)]
        log(f"| `{kind}` | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10])
    args = parser.parse_args()
    print_table(args.draws, args.seeds, lambda line: print(line, flush=True))
