"""Student's t distribution and the sign test, exact for any number of seeds and without SciPy."""

import functools
import math


def t_cdf(t: float, dof: int) -> float:
    """Return the probability that Student's t with `dof` degrees of freedom is at most `t`.

    Finite series for integer degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    theta = math.atan2(t, math.sqrt(dof))
    sin, cos2 = math.sin(theta), math.cos(theta) ** 2
    if dof % 2:
        term = math.cos(theta) if dof > 1 else 0.0
        total = term
        for k in range(3, dof - 1, 2):
            term *= cos2 * (k - 1) / k
            total += term
        within = 2 / math.pi * (theta + sin * total)
    else:
        term = total = 1.0
        for k in range(2, dof - 1, 2):
            term *= cos2 * (k - 1) / k
            total += term
        within = sin * total
    return (1 + within) / 2


@functools.cache
def t_quantile(probability: float, dof: int) -> float:
    """Return the quantile of Student's t for a probability of at least .5, by bisection of `t_cdf`."""
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        high *= 2
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return high


@functools.cache
def sign_p_value(positive: int, n: int) -> float:
    """Return the probability of at least `positive` heads among `n` tosses of a fair coin."""
    return sum(math.comb(n, k) for k in range(positive, n + 1)) / 2**n


@functools.cache
def seeds_for_sign_test(level: float) -> int:
    """Return the smallest number of seeds at which a unanimous sign test is significant at `level`: 5 at 5 %."""
    return math.ceil(-math.log2(level) - 1e-12)
