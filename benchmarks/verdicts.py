"""Error rates and power of verdicts, by simulation: every kind of claim in gesso/reproduce/claims.py.

    python benchmarks/verdicts.py [--draws 4000] [--seeds 3 5 10]

Numbers of a seed are means plus noise of standard deviation 1, half of whose variance is common to all cells of the seed.
Each kind has cases at the boundary between true and false, where a wrong verdict is most frequent: among them every
arrangement of ties between rows that favours a selected minimum. At the boundary "reproduced" and "contradicted" are both
wrong. Power is at means that lie two standard deviations of a paired difference on either side.
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
LEVEL, FAR = 100.0, 20.0
"""of means, so that ratios are of normal numbers; a mean that never is the best"""
EFFECT = 2.0
Means = Mapping[str, Sequence[float | None]]
"""by column, of each row"""


class Case(NamedTuple):
    """truth: None at the boundary, else whether the claim holds."""

    kind: str
    name: str
    expression: Expression
    means: Means
    truth: bool | None = None


def column(*values: float) -> list[float]:
    return [LEVEL + value for value in values]


def cell(name: str, row: int = 1) -> tuple[str, str]:
    return f"r{row}", name


def comparisons() -> Iterator[Case]:
    """Of two cells, and of a cell with a number."""
    for truth, shift in ((None, 0.0), (True, EFFECT), (False, -EFFECT)):
        pair = {"a": column(-shift), "b": column(0)}
        yield Case("improves_on", "", claims.improves_on(cell("a"), cell("b")), pair, truth)
        yield Case("greater_than", "", claims.greater_than(cell("a"), LEVEL), {"a": column(shift)}, truth)
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
        # Margins of 4 and of .1, so that one side and both sides of an equivalence are near.
        for margin in (0.04, 0.001) if truth is None else (0.04,):
            edge = LEVEL * margin
            off = edge if truth is None else 0.0 if truth else edge + EFFECT
            name = f"margin {edge:g}"
            yield Case("equals", name, claims.equals(cell("a"), LEVEL, margin), {"a": column(off)}, truth)
            other = {"a": column(off / (1 - margin / 2)), "b": column(0)}
            yield Case("within", name, claims.within(cell("a"), cell("b"), margin), other, truth)


def conjunctions() -> Iterator[Case]:
    """Claims of four parts."""
    every = claims.all_of(*(claims.improves_on(cell("a", i), cell("b", i)) for i in (1, 2, 3, 4)))
    best, chain = claims.is_best("r1", "a"), claims.each_improves("a", ROWS)
    rows = column(0, 0, 0, 0)
    yield Case("all_of", "no effect", every, {"a": rows, "b": rows})
    yield Case("all_of", "one part without effect", every, {"a": rows, "b": column(0, FAR, FAR, FAR)})
    yield Case("all_of", "", every, {"a": rows, "b": column(*[EFFECT] * 4)}, True)
    yield Case("all_of", "", every, {"a": rows, "b": column(-EFFECT, FAR, FAR, FAR)}, False)
    yield Case("is_best", "no effect", best, {"a": column(0, 0, 0, 0, 0)})
    yield Case("is_best", "one rival", best, {"a": column(0, 0, FAR, FAR, FAR)})
    yield Case("is_best", "", best, {"a": column(0, *[EFFECT] * 4)}, True)
    yield Case("is_best", "", best, {"a": column(0, -EFFECT, FAR, FAR, FAR)}, False)
    yield Case("each_improves", "no effect", chain, {"a": column(0, 0, 0, 0, 0)})
    yield Case("each_improves", "one step without effect", chain, {"a": column(0, -FAR, -2 * FAR, -3 * FAR, -3 * FAR)})
    yield Case("each_improves", "", chain, {"a": column(*(-EFFECT * i for i in range(5)))}, True)
    yield Case("each_improves", "", chain, {"a": column(0, -FAR, -2 * FAR, -3 * FAR, EFFECT - 3 * FAR)}, False)


SHAPES = {  # curves whose least mean is 0
    "flat": (0, 0, 0, 0, 0), "one": (FAR, FAR, 0, FAR, FAR), "two": (FAR, 0, 0, FAR, FAR), "near": (2, 1, 0, 1, 2),
}  # fmt: skip


def optima() -> Iterator[Case]:
    """Best numbers of columns."""
    best, inside = claims.best_of("a", "b"), claims.optimum_inside("a")
    for a, ours in SHAPES.items():
        for b, reference in SHAPES.items():
            yield Case("best_of", f"{a} against {b}", best, {"a": column(*ours), "b": column(*reference)})
    near = SHAPES["near"]
    for truth in (True, False):
        shift = EFFECT if truth else -EFFECT
        yield Case("best_of", "", best, {"a": column(*near), "b": column(*(v + shift for v in near))}, truth)
        yield Case("optimum_inside", "", inside, {"a": column(shift, 1, 0, 1, shift)}, truth)
    for name, curve in {
        "flat": (0, 0, 0, 0, 0), "an end as good as one": (0, FAR, 0, FAR, FAR), "an end as good as all": (0, 0, 0, 0, FAR),
        "both ends as good as one": (0, FAR, 0, FAR, 0),
    }.items():  # fmt: skip
        yield Case("optimum_inside", name, inside, {"a": column(*curve)})
    margin = claims.bests_within(["a", "b", "c"], 0.05)
    for a, ours in SHAPES.items():
        for b, reference in SHAPES.items():
            worse = [LEVEL * 1.05 + v for v in reference]
            yield Case(
                "bests_within",
                f"{a} against {b}",
                margin,
                {"a": column(*ours), "b": worse, "c": column(*(v + 2.5 for v in ours))},
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
    """Shares and factors, at a noise of 1 % of the numbers."""
    helps, narrow = claims.helps_more("a", "b", "r1"), claims.narrower("a", "b")
    for name, curve in {"flat": (0, -5, -5, -5, -5), "one": (0, -5, 0, 0, 0)}.items():
        for other, reference in {"flat": (0, -5, -5, -5, -5), "one": (0, -5, 0, 0, 0)}.items():
            yield Case("helps_more", f"{name} against {other}", helps, {"a": column(*curve), "b": column(*reference)})
    yield Case("helps_more", "", helps, {"a": column(0, -2, -8, -2, 0), "b": column(0, -2, -4, -2, 0)}, True)
    yield Case("helps_more", "", helps, {"a": column(0, -2, -4, -2, 0), "b": column(0, -2, -8, -2, 0)}, False)
    for name, curve in {"wide": (10, 0, 0, 0, 10), "narrow": (5, 5, 0, 5, 5)}.items():
        for other, reference in {"wide": (10, 0, 0, 0, 10), "narrow": (5, 5, 0, 5, 5)}.items():
            yield Case("narrower", f"{name} against {other}", narrow, {"a": column(*curve), "b": column(*reference)})
    yield Case("narrower", "", narrow, {"a": column(10, 5, 0, 5, 10), "b": column(5, 2, 0, 2, 5)}, True)
    yield Case("narrower", "", narrow, {"a": column(5, 2, 0, 2, 5), "b": column(10, 5, 0, 5, 10)}, False)
    spread = claims.less_spread(["a", "b", "c"], "r3")
    flat, one = (0, 0, 0, 0, 0), (FAR, FAR, 0, FAR, FAR)
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
    for name, curve in {"flat": (0, 0, 0), "one": (0, FAR, FAR)}.items():
        yield Case("cheaper", name, cheap, {"a": column(*curve), "b": column(FAR, FAR, 0), "c": [1.0, 1.0, 2.0]})
    for truth, shift in ((True, EFFECT), (False, -EFFECT)):
        yield Case("cheaper", "", cheap, {"a": column(0, 1), "b": column(FAR, FAR, shift), "c": [1.0, 1.0, 2.0]}, truth)


def places() -> Iterator[Case]:
    """x of optima, and exponents."""
    early = claims.optimum_earlier("a", "b")
    for name, curve in SHAPES.items():
        yield Case("optimum_earlier", name, early, {"a": column(*curve), "b": column(*curve)})
    yield Case("optimum_earlier", "", early, {"a": column(2, 0, 2, 4, 6), "b": column(6, 4, 2, 0, 2)}, True)
    yield Case("optimum_earlier", "", early, {"a": column(6, 4, 2, 0, 2), "b": column(2, 0, 2, 4, 6)}, False)
    follows = claims.optimum_follows({"a": 1.0, "b": 2.0, "c": 4.0}, 1.0, 0.25)
    straight = {"a": column(2, 0, 2, 4, 6), "b": column(4, 2, 0, 2, 4), "c": column(6, 4, 2, 0, 2)}
    yield Case("optimum_follows", "", follows, straight, True)
    yield Case("optimum_follows", "", follows, dict(zip("cba", straight.values(), strict=True)), False)
    law = claims.power_law("a", -1.0, 0.02)
    for truth, slope in ((None, -0.98), (True, -1.0), (False, -0.95)):
        yield Case("power_law", "", law, {"a": [LEVEL * 2 ** (i * slope) for i in range(5)]}, truth)


def cases() -> list[Case]:
    return [*comparisons(), *conjunctions(), *optima(), *ratios(), *places()]


def draw(case: Case, rng: random.Random) -> dict[tuple[str, str], float]:
    """The numbers of one seed. Costs have no noise, and those of a power law 1 %."""
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


def rates(case: Case, seeds: int, draws: int, rng: random.Random | None = None) -> tuple[float, float]:
    """Share of "reproduced" and of "contradicted"."""
    rng, claim = rng or random.Random(0), Claim(case.kind, case.expression)
    verdicts = [claims.judge(TABLE, claim, [draw(case, rng) for _ in range(seeds)]).verdict for _ in range(draws)]
    return verdicts.count(Verdict.REPRODUCED) / draws, verdicts.count(Verdict.CONTRADICTED) / draws


def table(draws: int, seeds: Sequence[int], say: Callable[[str], None]) -> None:
    """A line for each kind, as in docs/tables.md: the worst error at the boundary and the power, at each number of seeds."""
    kinds = list(dict.fromkeys(case.kind for case in cases()))
    names = [f"{n} seeds: {name}" for n in seeds for name in ("wrong R", "wrong C", "power R", "power C")]
    say("| kind | " + " | ".join(names) + " |")
    say("|---|" + "--:|" * len(names))
    for kind in kinds:
        texts = []
        for n in seeds:
            actual = [(case, *rates(case, n, draws)) for case in cases() if case.kind == kind]
            edge = [(r, c) for case, r, c in actual if case.truth is None] or [(math.nan, math.nan)]
            wrong_r = max([r for r, _ in edge] + [r for case, r, _ in actual if case.truth is False])
            wrong_c = max([c for _, c in edge] + [c for case, _, c in actual if case.truth is True])
            power_r = max((r for case, r, _ in actual if case.truth is True), default=math.nan)
            power_c = max((c for case, _, c in actual if case.truth is False), default=math.nan)
            texts += [f"{100 * value:.1f}" for value in (wrong_r, wrong_c, power_r, power_c)]
        say(f"| `{kind}` | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10])
    options = parser.parse_args()
    table(options.draws, options.seeds, lambda line: print(line, flush=True))
