"""Samplers: pure functions of (denoise, x, levels, alpha). In every process (x - D)/s is the derivative.

Legend: x (B, C, H, W) the state at levels[0]; levels (steps + 1,) float64, falling; alpha(s) the process's
signal scale, sigma = s/alpha(s); a prime, in code `_next`, marks the level that a step goes to. `noise(i)`
gives step i's standard normal noise, shaped like x; `watch(i, x, D)` is called after step i with the new
state and the step's first denoised estimate.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gesso import config
from gesso.diffusion import schedule
from gesso.diffusion.guidance import Denoise, Within
from gesso.diffusion.process import Process

Alpha = Callable[[Tensor], Tensor]
Noise = Callable[[int], Tensor]
Watch = Callable[[int, Tensor, Tensor], None]


class Churn(NamedTuple):
    """EDM's Algorithm 2. S_min and S_max bound sigma; `raised(s, factor)` is the level of factor times the sigma."""

    raised: Callable[[Tensor, float], Tensor]
    cap: float
    """level that none is raised above; infinite without a cap"""
    S_churn: float
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


def draw(
    cfg: config.Sample, process: Process, denoise: Denoise, first: Tensor, noise: Noise, watch: Watch | None = None
) -> Tensor:
    """Samples (B, C, H, W) of standard deviation process.sd, by the settings of cfg.

    first: standard normal noise, in the dtype that the state is to have; noise: that of a step, on demand.
    Raises UsageError for levels that the process does not have.
    """
    levels = schedule.asked(process, cfg)
    x = process.prior(first, levels[0])
    if cfg.variance != "small":
        return ancestral(denoise, x, levels, process.alpha, noise, cfg.variance, watch)
    if cfg.sampler == "euler":
        return euler(denoise, x, levels, process.alpha, cfg.eta, noise, watch)
    if cfg.sampler == "dpm++2m":
        return dpmpp(denoise, x, levels, process.alpha, watch, cfg.multistep)
    S_max = math.inf if cfg.S_max is None else cfg.S_max
    churn = Churn(process.rescaled, churn_cap(process, cfg.S_cap), cfg.S_churn, cfg.S_min, S_max, cfg.S_noise)
    return heun(denoise, x, levels, process.alpha, churn, noise, watch)


def euler(
    denoise: Denoise,
    x: Tensor,
    levels: Tensor,
    alpha: Alpha,
    eta: float = 0.0,
    noise: Noise | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """x + (s' - s) (x - D)/s: first order; DDIM under VP, in any of its coordinates. One evaluation a step.

    eta: share of DDPM's noise in a step (DDIM Eq. 16); 1 is DDPM's sampler.
    """
    _check(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = denoise(x, s)
        if eta == 0:
            x = x + float((s_next - s) / s) * (x - D)
        else:
            a, a_next = float(alpha(s)), float(alpha(s_next))
            # x' = a' D + sqrt(s'^2 - up^2) (x - a D)/s + up n; at a = 0 no part of the noise is kept from s
            up = eta * float(s_next) * math.sqrt(1 - (float(s_next) * a / (float(s) * a_next)) ** 2)
            x = a_next * D + math.sqrt(float(s_next) ** 2 - up**2) / float(s) * (x - a * D)
            if up > 0:
                x = x + up * noise(i)
        if watch:
            watch(i, x, D)
    return x


def ancestral(
    denoise: Denoise,
    x: Tensor,
    levels: Tensor,
    alpha: Alpha,
    noise: Noise,
    variance: Literal["large", "learned"],
    watch: Watch | None = None,
) -> Tensor:
    """DDPM's steps with a variance other than the posterior's (iDDPM Eq. 15); with that one they are `euler` at eta = 1.

    The mean is the posterior's. Log variances are interpolated: v = -1 is the posterior's, small, 1 is beta, large.
    learned: `denoise` returns (B, 2 C, H, W), the denoised image, then v of each of its values. No noise on the step to 0.
    """
    _check(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = denoise(x, s)
        D, v = D.chunk(2, dim=1) if variance == "learned" else (D, 1.0)
        a, a_next = float(alpha(s)), float(alpha(s_next))
        s, s_next = float(s), float(s_next)
        kept = (s_next * a / (s * a_next)) ** 2
        small = s_next**2 * (1 - kept)
        x = a_next * D + s_next * math.sqrt(kept) / s * (x - a * D)
        if small > 0:
            # beta = 1 - abar/abar' in DDPM's coordinates, where x has variance 1; here it has a^2 + s^2.
            size = a_next**2 + s_next**2
            large = size * (1 - (a / a_next) ** 2 * size / (a**2 + s**2))
            x = x + math.sqrt(small) * (large / small) ** ((v + 1) / 4) * noise(i)
        if watch:
            watch(i, x, D)
    return x


def churn_cap(process: Process, sigma: float | None) -> float:
    """The level that churn does not go above: that of `sigma`, and the largest where the process has none above it."""
    cap = process.largest if process.bounded else math.inf
    if sigma is None:
        return cap
    straight = float(process.alpha(torch.tensor(0.5, dtype=torch.float64))) != 1  # alpha = 1 - s, sigma = s/(1 - s)
    return min(cap, sigma / (1 + sigma) if straight else sigma)


def heun(
    denoise: Denoise,
    x: Tensor,
    levels: Tensor,
    alpha: Alpha,
    churn: Churn | None = None,
    noise: Noise | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """EDM's Algorithm 1, with churn its Algorithm 2: second order; Euler on the step to 0. Two evaluations a step."""
    _check(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        of_step = denoise.at(s) if isinstance(denoise, Within) else denoise
        if churn and churn.S_churn > 0:
            x, s = _churned(x, s, alpha, churn, len(levels) - 1, noise, i)
        D = of_step(x, s)
        d = (x - D) / float(s)
        h = float(s_next - s)
        x_next = x + h * d
        if s_next > 0:
            d_next = (x_next - of_step(x_next, s_next)) / float(s_next)
            x_next = x + h * 0.5 * (d + d_next)
        x = x_next
        if watch:
            watch(i, x, D)
    return x


def _churned(
    x: Tensor, s: Tensor, alpha: Alpha, churn: Churn, steps: int, noise: Noise, i: int
) -> tuple[Tensor, Tensor]:
    """The state and its level with noise added (EDM Algorithm 2, lines 4-6, for any alpha).

    x^ = (a^/a) x + sqrt(s^^2 - (s a^/a)^2) S_noise n, where s^ has 1 + gamma times the sigma of s.
    """
    a = alpha(s)
    if not churn.S_min <= float(s / a) <= churn.S_max:
        return x, s
    gamma = min(churn.S_churn / steps, math.sqrt(2) - 1)
    up = churn.raised(s, 1 + gamma).clamp(max=churn.cap)
    if up <= s:
        return x, s
    ratio = float(alpha(up) / a)
    return ratio * x + math.sqrt(float(up) ** 2 - (float(s) * ratio) ** 2) * churn.S_noise * noise(i), up


def dpmpp(
    denoise: Denoise,
    x: Tensor,
    levels: Tensor,
    alpha: Alpha,
    watch: Watch | None = None,
    multistep: Literal["log_snr", "log_s"] = "log_snr",
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order from one evaluation a step.

    With lambda = ln(alpha/s) and h the step in it, x' = (s'/s) x + (1 - s'/s) (D + (D - D_old) h/(2 h_old)).
    First order on the first step, on the second where the first level has no signal (h_old infinite), and to 0.
    multistep: log_s measures h in -ln s instead, as k-diffusion and SD3.5's code do: finite at s = 1.
    """
    _check(levels)

    def length(s: Tensor) -> Tensor:
        return (alpha(s) / s).log() if multistep == "log_snr" else -s.log()

    h_old, D_old = math.inf, None
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = estimate = denoise(x, s)
        h = float(length(s_next) - length(s))
        if s_next > 0 and math.isfinite(h_old):
            estimate = D + h / (2 * h_old) * (D - D_old)
        ratio = float(s_next / s)
        x = ratio * x + (1 - ratio) * estimate
        h_old, D_old = h, D
        if watch:
            watch(i, x, D)
    return x


def _check(levels: Tensor) -> None:
    falling = bool((torch.diff(levels) < 0).all())
    if len(levels) < 2 or not falling or float(levels[-1]) < 0:
        raise ValueError(f"noise levels must fall from step to step and stay at or above 0: {levels.tolist()}")
