"""Claims: what their expressions compute, the tests that judge them, and the error rates of verdicts by simulation."""

import importlib.util
import itertools
import math
import random
import statistics
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from gesso.papers import TABLES
from gesso.reproduce import claims, significance
from gesso.reproduce.claims import Verdict, all_of, close, equals
from gesso.reproduce.schema import DIVERGED, Claim, Column, Row, Table

ROWS = tuple(Row(name, x=x) for x, name in enumerate("rstu", 1))
COLUMNS = (Column("a"), Column("b", False), Column("c"), Column("d"), Column("p", None))
TABLE = Table("t", "", "", COLUMNS, ROWS, {})


def values_of(**columns):
    return {
        (row, name): value for name, numbers in columns.items() for row, value in zip("rstu", numbers, strict=False)
    }


def judge(expression, *seeds):
    return claims.judge(TABLE, Claim("x", expression), list(seeds)).verdict


def test_students_t():
    for dof, probability in itertools.product([*range(1, 31), 100], (0.6, 0.95, 0.975, 0.99, 0.9999)):
        assert significance.t_quantile(probability, dof) == pytest.approx(scipy.stats.t.ppf(probability, dof), rel=1e-9)
        assert significance.t_cdf(-1.5, dof) == pytest.approx(scipy.stats.t.cdf(-1.5, dof), rel=1e-12)
    for positive, n in ((0, 4), (3, 4), (5, 5), (9, 11)):
        p_value = scipy.stats.binomtest(positive, n, alternative="greater").pvalue
        assert significance.sign_p_value(positive, n) == pytest.approx(p_value, rel=1e-12)
    assert significance.seeds_for_sign_test(0.05) == 5


REAL = st.floats(-5, 5, allow_subnormal=False)


@given(st.lists(REAL, min_size=2, max_size=20))
def test_verdicts_are_the_test_of_scipy(effects):
    claim = Claim("x", lambda v: v["r", "a"] > 0)
    result = claims.judge(TABLE, claim, [{("r", "a"): effect} for effect in effects])
    if statistics.stdev(effects) < 1e-9:
        return
    above, below = (scipy.stats.ttest_1samp(effects, 0, alternative=side).pvalue for side in ("greater", "less"))
    if min(abs(above - 0.05), abs(below - 0.05)) > 1e-9:
        expected = Verdict.REPRODUCED if above < 0.05 else Verdict.CONTRADICTED if below < 0.05 else Verdict.UNDECIDED
        assert result.verdict == expected
    assert (result.low > 0, result.high < 0) == (
        result.verdict == Verdict.REPRODUCED, result.verdict == Verdict.CONTRADICTED,
    )  # fmt: skip
    assert result.num_seeds == len(effects) and result.effect == pytest.approx(statistics.mean(effects), abs=1e-12)


def test_relative_effects():
    """An effect is divided by the mean of the largest compared number; a difference of logarithms is not divided."""

    def relative(expression, *seeds):
        return claims.judge(TABLE, Claim("x", expression), list(seeds)).relative

    seeds = [values_of(a=(8, 10), b=(4, 1)), values_of(a=(6, 10), b=(4, 1))]
    effect, low, high = relative(lambda v: v["r", "a"] < v["s", "a"], *seeds)
    absolute = claims.judge(TABLE, Claim("x", lambda v: v["r", "a"] < v["s", "a"]), seeds)
    assert effect == pytest.approx(0.3) and (low, high) == pytest.approx((absolute.low / 10, absolute.high / 10))
    assert relative(lambda v: v["r", "a"] < 2 * v["s", "a"], *seeds)[0] == pytest.approx(13 / 20)
    assert relative(lambda v: v["r", "a"].log() < v["s", "a"].log(), seeds[0])[0] == pytest.approx(math.log(10 / 8))
    # The smallest margin is reported with its size: b of r over s is 3 of 4, a of s over r is 2 of 10.
    both = relative(lambda v: (v["r", "b"] > v["s", "b"]) & (v["r", "a"] < v["s", "a"]), seeds[0])
    assert both == (pytest.approx(0.2), None, None)
    assert relative(lambda v: v.best("a") < 20, seeds[0])[0] == pytest.approx(12 / 20)
    assert relative(lambda v: v["r", "a"] < v["s", "a"], values_of(a=(3, DIVERGED)))[0] is None
    claim = Claim("x", lambda v: v["r", "a"] < v["s", "a"])
    assert claims.compute_relative_effect(TABLE, claim, seeds[0]) == pytest.approx(0.2)
    assert claims.compute_relative_effect(TABLE, claim, {}) is None


def test_a_claim_of_several_parts_is_their_intersection():
    """Each part is tested at the full level; one part contradicts at its share of the level."""

    def both(v):
        return (v["r", "a"] > 0) & (v["s", "a"] > 0)

    sure, unsure, not_so = (1.0, 1.1, 0.9), (1.0, 3.0, -0.5), (-1.0, -1.1, -0.9)

    def of(first, second):
        return judge(both, *({("r", "a"): x, ("s", "a"): y} for x, y in zip(first, second, strict=True)))

    assert of(sure, sure) == Verdict.REPRODUCED and of(sure, unsure) == Verdict.UNDECIDED
    assert of(sure, not_so) == of(unsure, not_so) == Verdict.CONTRADICTED
    below = (-1.0, -2.2, -0.4)  # one-sided p-value between .025 and .1
    p_value = scipy.stats.ttest_1samp(below, 0, alternative="less").pvalue
    assert 0.025 < p_value < 0.1 and of(sure, below) == Verdict.UNDECIDED


def test_the_mean_of_minima_is_not_what_is_tested():
    """Without an effect the least of four parts lies below 0 in the mean: undecided, not contradicted."""
    rng = random.Random(0)

    def every(v):
        return all_of(v[row, "a"] > 0 for row in "rstu")

    verdicts = [judge(every, *(values_of(a=[rng.gauss(0, 1) for _ in range(4)]) for _ in range(3))) for _ in range(300)]
    assert verdicts.count(Verdict.CONTRADICTED) < 0.05 * 300 + 4 * math.sqrt(0.05 * 0.95 * 300)


def test_verdicts_at_the_edges():
    def of(*numbers):
        return judge(
            lambda v: v["r", "a"] > 0, *({("r", "a"): number} if number is not None else {} for number in numbers)
        )

    assert of() == of(None) == Verdict.NOT_MEASURED and of(1.0) == of(1.0, None) == Verdict.TOO_FEW_SEEDS
    # A diverged training has no t statistic; the sign test is significant from five seeds on.
    assert of(math.inf, math.inf) == of(math.inf, 1.0, 2.0) == Verdict.UNDECIDED
    assert of(math.inf, 1.0, 2.0, 3.0, 1.0) == Verdict.REPRODUCED and of(*[-math.inf] * 5) == Verdict.CONTRADICTED
    assert of(math.inf, 1.0, 2.0, 3.0, -1.0) == of(math.inf, -math.inf, 1.0) == Verdict.UNDECIDED
    # Nor have equal numbers.
    assert of(1.0, 1.0, 1.0) == of(0.0, 0.0, 0.0, 0.0, 0.0) == Verdict.UNDECIDED
    both = {("r", "a"): DIVERGED, ("s", "a"): DIVERGED}
    assert claims.compute_effect(TABLE, Claim("x", lambda v: v["r", "a"] < v["s", "a"]), both) == 0


def test_places_of_optima_need_five_seeds():
    def earlier(v):
        return v.optimum("a") < v.optimum("c")

    seed = values_of(a=(1, 2, 3), c=(3, 2, 1))
    assert judge(earlier, *[seed] * 4) == Verdict.TOO_FEW_SEEDS and judge(earlier, *[seed] * 5) == Verdict.REPRODUCED
    assert judge(lambda v: v.optimum("c") < v.optimum("a"), *[seed] * 5) == Verdict.CONTRADICTED


def test_a_row_that_one_seed_lacks_leaves_that_seed_out():
    seed = values_of(a=(1, 2), c=(3, 4))
    assert judge(lambda v: v.best_improves("a", "c"), seed, values_of(a=(1,), c=(3, 4))) == Verdict.TOO_FEW_SEEDS


@pytest.mark.parametrize(
    "expression, values, effect",
    [
        (lambda v: v["s", "a"] < v["r", "a"], values_of(a=(3, 1)), 2),
        (lambda v: v["s", "b"] > v["r", "b"], values_of(b=(3, 1)), -2),
        (lambda v: v["s", "a"] < v["u", "a"], values_of(a=(3, 1)), None),
        (lambda v: v.improves(("s", "a"), ("r", "a")), values_of(a=(3, 1)), 2),
        (lambda v: v.improves(("s", "b"), ("r", "b")), values_of(b=(3, 1)), -2),
        (lambda v: v["s", "a"] < 0.9 * v["r", "a"], values_of(a=(10, 8)), 1),
        (lambda v: v["s", "a"] < 1.1 * v["r", "a"], values_of(a=(10, 12)), -1),
        (lambda v: v["s", "b"] > 0.5 * v["r", "b"], values_of(b=(10, 4)), -1),
        (lambda v: close(v["r", "a"], v["s", "a"], 0.5), values_of(a=(1, 2)), 0.75 - 1),
        (lambda v: close(v["r", "a"], v["s", "a"], 0.5), values_of(a=(1, math.inf)), -math.inf),
        (lambda v: close(v["r", "a"], v["s", "a"], 0.5), values_of(a=(math.inf, math.inf)), 0),
        (lambda v: equals(v["r", "a"], 1.0, 0.1), values_of(a=(1.07,)), 0.03),
        (lambda v: equals(v["r", "a"], 1.0, 0.1), values_of(a=(0.8,)), -0.1),
        (lambda v: v.is_best("s", "a"), values_of(a=(3, 1, 2)), 1),
        (lambda v: v.is_best("r", "b"), values_of(b=(0, 9, 7)), -9),
        (lambda v: v.best_improves("a", "c"), values_of(a=(3, 1, 2), c=(5, 4, 2)), 1),
        (lambda v: v.each_improves("a", ["r", "x", "s", "t"]), values_of(a=(5, 9, 3)), -4),
        (lambda v: v.each_improves("a", ["r", "x", "t"]), values_of(a=(5, 9, 3)), 2),
        (lambda v: v.each_improves("a", ["r", "x"]), values_of(a=(5,)), None),
        (lambda v: v.optimum("a") < v.optimum("c"), values_of(a=(3, 1, 2), c=(5, 4, 2)), 1),
        (lambda v: v.optimum_inside("a"), values_of(a=(3, 1, 2)), 1),
        (lambda v: v.optimum_inside("c"), values_of(c=(5, 4, 2)), -2),
        (lambda v: v.optimum_inside("a", rows=["s", "t", "u"]), values_of(a=(9, 1, 2, 3)), -1),
        (lambda v: v.optimum_inside("a", ends=("t",)), values_of(a=(1, 2, 3)), 2),
        (lambda v: v.improves_more("a", "c", "r"), values_of(a=(10, 8, 9), c=(4, 4, 3)), 0.2 - 0.25),
        (lambda v: v.improves_more("a", "c", "r"), values_of(a=(10, 8), c=(4,)), None),
        (lambda v: v.is_narrower("a", "c"), values_of(a=(2, 1, 3), c=(4, 4, 5)), 1 - 1 / 12),
        (lambda v: v.is_narrower("a", "c"), values_of(a=(2, 1, 3), c=(4, 4, math.inf)), None),
        (lambda v: v.best("a") < 1.5 * v.best("c"), values_of(a=(2, 9, 9), c=(5, 2.5, 9)), 1.5 * 2.5 - 2),
        (lambda v: v.best("a") < 1.5 * v.best("c"), values_of(a=(2,)), None),
        (lambda v: v.best("b") > v.best("a"), values_of(a=(2, 9), b=(5, 2.5)), 3),
        (lambda v: v.spreads_less(["a", "c"], "r"), values_of(a=(2, 9, 9), c=(5, 2.5, 9)),
        math.log(2.5) - math.log(1.25)),
        (lambda v: v.spreads_less(["a", "c"], "t"), values_of(a=(2, 9), c=(5, 2.5)), None),
        (lambda v: v.optimum_follows({"a": 1, "c": 2, "d": 3}, 1, 0.1),
        values_of(a=(1, 2, 3), c=(2, 1, 3), d=(2, 2, 1)), 0.1),
        (lambda v: v.power_law("a", -2, 0.1), values_of(a=(1, 1 / 4, 1 / 9)), 0.1),
        (lambda v: v.power_law("a", -2, 0.1), values_of(a=(1, 1 / 4)), None),
        (lambda v: v.is_cheaper("p", "a", "c", 2), values_of(p=(1, 3, 12), a=(5, 3), c=(9, 9, 4)), 1),
        (lambda v: v.is_cheaper("p", "a", "c", 5), values_of(p=(1, 3, 12), a=(5, 3), c=(9, 9, 4)), -1),
        (lambda v: v.is_cheaper("p", "a", "c", 20), values_of(p=(1, 3, 12), a=(5, 3), c=(9, 9, 4)), -math.inf),
        (lambda v: v.is_cheaper("p", "a", "c", 2), values_of(a=(5, 3), c=(9, 9, 4)), None),
        (lambda v: v.is_best("s", "a") & (v["r", "b"] > 5), values_of(a=(3, 1), b=(5.5,)), 0.5),
    ],
)  # fmt: skip
def test_kinds_of_claim(expression, values, effect):
    result = claims.compute_effect(TABLE, Claim("", expression), values)
    assert result is None if effect is None else result == pytest.approx(effect)


def test_quantities_are_formulas_of_the_cells_of_a_seed():
    v = claims.TableValues(TABLE, [values_of(a=(2, 4), c=(1, 8)), values_of(a=(3, math.inf), c=(5,))])
    a, c, other = v["r", "a"], v["r", "c"], v["s", "a"]
    assert (2 * a - c + 1).values == (4, 2) and (1 - abs(c - a)).values == (0, -1)
    assert math.isnan((a / other).values[1]) and math.isnan(other.log().values[1]), "a diverged training has no ratio"
    assert (other - other).values == (0, 0), "two trainings that both diverged are equal"
    assert math.isnan(v["s", "c"].values[1]), "not measured in the second seed"
    with pytest.raises(claims.MissingCellError):
        v["t", "a"]


@pytest.mark.parametrize("name", ["berrada/2a", "berrada/A6", "berrada/fig2", "berrada/2b"])
def test_a_schedule_that_ignores_the_size_is_not_reproduced(name):
    """It changes nothing with the size, so that it passes every comparison; its detail is that of no size, 1."""
    table = TABLES[name]()
    tested = [claim for claim in table.claims if "size" in claim.text and "use" in claim.text]
    for claim in tested:
        for detail, holds in ((1.0, False), (3.0, True)):
            values = {(row.name, c.name): 0.0 for row in table.rows for c in table.columns}
            values |= {(row.name, "LPIPS"): 1.0 for row in table.rows if not row.name.startswith("cosine")}
            values |= {("cosine, alpha = 1", "LPIPS"): 0.5, ("step at sigma = 6", "LPIPS"): 2.0}
            values |= {(row.name, "uniform"): 1.0 for row in table.rows}
            values |= {(row.name, c.name): detail for row in table.rows for c in table.columns if "detail" in c.name}
            values |= {(row.name, "detail, uniform"): 3.7 for row in table.rows} | {("uniform", "detail"): 3.7}
            assert (claims.compute_effect(table, claim, values) > 0) == holds, claim.text
    assert tested


def test_growth_is_compared_with_one():
    """edm2/fig3: a configuration that grows as much as all others is not one that does not grow."""
    table = TABLES["edm2/fig3"]()
    grown = {(row.name, c.name): 2.0 for row in table.rows for c in table.columns}
    no_growth = dict.fromkeys(grown, 1.0)
    for claim in table.claims:
        constant = "not grow" in claim.text
        assert (claims.compute_effect(table, claim, grown) > 0) != constant
        assert (claims.compute_effect(table, claim, no_growth) > 0) == constant


def test_the_best_beta_is_not_none_at_all():
    """berrada/fig7: an optimum at beta = 1, which is no control guidance, is not one inside."""
    table = TABLES["berrada/fig7"]()
    claim = table.claims[2]
    bowl = {(row.name, "beta"): abs(row.x - 1.0) for row in table.rows}
    assert claims.compute_effect(table, claim, bowl) < 0
    assert claims.compute_effect(table, claim, {cell: abs(float(cell[0]) - 1.5) for cell in bowl}) > 0


def simulation():
    path = Path(__file__).parents[2] / "benchmarks" / "verdicts.py"
    spec = importlib.util.spec_from_file_location("verdicts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIMULATION = simulation()
DRAWS = 120


def simulated(case):
    many = case.kind in ("best < multiple", "spreads_less", "is_narrower", "best_improves")  # hundreds of comparisons
    marks = [pytest.mark.slow] if many and case.name not in ("", "flat against one", "one against one") else []
    return pytest.param(case, marks=marks)


@pytest.mark.parametrize(
    "case",
    [simulated(case) for case in SIMULATION.cases()],
    ids=lambda case: f"{case.kind} {case.name} {case.truth}".replace("  ", " "),
)
def test_error_rates(case):
    """At most 5 % wrong, within four standard errors of so many draws; benchmarks/verdicts.py has more draws."""
    reproduced, contradicted = SIMULATION.verdict_rates(case, 3, DRAWS, random.Random(1))
    limit = 0.05 + 4 * math.sqrt(0.05 * 0.95 / DRAWS)
    assert case.truth is True or reproduced < limit
    assert case.truth is False or contradicted < limit


def test_every_kind_of_claim_is_simulated():
    """All methods of TableValues and functions that return a statement."""
    kinds = {
        name
        for namespace in (claims, claims.TableValues)
        for name, value in vars(namespace).items()
        if getattr(value, "__annotations__", {}).get("return") is claims.Statement
    }
    basic = {"within", "improves"}  # parts of others
    assert kinds - basic <= {case.kind for case in SIMULATION.cases()}
