"""Samplers as pure functions of (denoise, x, levels, alpha); in every process (x - D)/s is the derivative.

Legend: x (B, C, H, W) the state at levels[0]; levels (steps + 1,) float64, decreasing; alpha(s) the signal scale of
the process, sigma = s/alpha(s); a prime, in code `_next`, marks the level that a step goes to. `noise(i)` returns the
standard normal noise of step i, shaped like x; `callback(i, x, D)` is called after step i with the new state and the
step's first denoised estimate. Samplers raise ValueError for levels that do not decrease.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gesso import config
from gesso.diffusion import schedules
from gesso.diffusion.guidance import DenoiseFn, GuidanceInterval
from gesso.diffusion.process import Process

AlphaFn = Callable[[Tensor], Tensor]
NoiseFn = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


class Churn(NamedTuple):
    """Stochasticity of EDM's Algorithm 2; S_min and S_max bound sigma.

    `raise_sigma(s, factor)` returns the level whose sigma is `factor` times that of s; `max_level` caps it.
    """

    raise_sigma: Callable[[Tensor, float], Tensor]
    max_level: float
    S_churn: float
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


def sample(
    cfg: config.SampleConfig,
    process: Process,
    denoise: DenoiseFn,
    initial_noise: Tensor,
    noise: NoiseFn,
    callback: Callback | None = None,
) -> Tensor:
    """Return samples (B, C, H, W) of standard deviation process.sigma_data.

    Args:
        cfg: Settings `sample.*`.
        process: Diffusion process of the denoiser.
        denoise: Denoiser, guided if so desired.
        initial_noise: Standard normal noise (B, C, H, W) in the dtype of the sampling state.
        noise: Returns the noise of a step; called when a step needs it.
        callback: Called after each step.

    Raises:
        UsageError: The process does not have the levels that cfg selects.
    """
    levels = schedules.levels_from_config(process, cfg)
    x = process.initial_state(initial_noise, levels[0])
    if cfg.variance != "small":
        return ancestral(denoise, x, levels, process.alpha, noise, cfg.variance, callback)
    if cfg.sampler == "euler":
        return euler(denoise, x, levels, process.alpha, cfg.eta, noise, callback)
    if cfg.sampler == "dpm++2m":
        return dpmpp_2m(denoise, x, levels, process.alpha, callback, cfg.multistep)
    S_max = math.inf if cfg.S_max is None else cfg.S_max
    churn = Churn(process.scale_sigma, max_churn_level(process, cfg.S_cap), cfg.S_churn, cfg.S_min, S_max, cfg.S_noise)
    return heun(denoise, x, levels, process.alpha, churn, noise, callback)


def euler(
    denoise: DenoiseFn,
    x: Tensor,
    levels: Tensor,
    alpha: AlphaFn,
    eta: float = 0.0,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Return x after Euler steps x + (s' - s) (x - D)/s: first order, one evaluation per step; DDIM under VP.

    `eta` is the share of DDPM's noise in a step (DDIM Eq. 16); 1 is DDPM's sampler.
    """
    _check_levels(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = denoise(x, s)
        if eta == 0:
            x = x + float((s_next - s) / s) * (x - D)
        else:
            a, a_next = float(alpha(s)), float(alpha(s_next))
            # x' = a' D + sqrt(s'^2 - up^2) (x - a D)/s + up n; at a = 0 all noise is new.
            up = eta * float(s_next) * math.sqrt(1 - (float(s_next) * a / (float(s) * a_next)) ** 2)
            x = a_next * D + math.sqrt(float(s_next) ** 2 - up**2) / float(s) * (x - a * D)
            if up > 0:
                x = x + up * _required(noise)(i)
        if callback:
            callback(i, x, D)
    return x


def ancestral(
    denoise: DenoiseFn,
    x: Tensor,
    levels: Tensor,
    alpha: AlphaFn,
    noise: NoiseFn,
    variance: Literal["large", "learned"],
    callback: Callback | None = None,
) -> Tensor:
    """Return x after DDPM steps with the large or a learned variance (iDDPM Eq. 15); `euler` with eta=1 has the small.

    The mean is that of the posterior. The log variance is interpolated by v between the posterior's (small, v = -1)
    and beta (large, v = 1). For variance="learned", `denoise` returns (B, 2 C, H, W): x0, then v of each value. The
    step to 0 adds no noise.
    """
    _check_levels(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        out = denoise(x, s)
        D, v = out.chunk(2, dim=1) if variance == "learned" else (out, 1.0)
        a, a_next = float(alpha(s)), float(alpha(s_next))
        sd, sd_next = float(s), float(s_next)
        old_noise = (sd_next * a / (sd * a_next)) ** 2  # share of the noise variance that carries over
        small = sd_next**2 * (1 - old_noise)
        x = a_next * D + sd_next * math.sqrt(old_noise) / sd * (x - a * D)
        if small > 0:
            # beta = 1 - abar/abar' in DDPM's coordinates, where x has variance 1; here it has a^2 + s^2.
            size = a_next**2 + sd_next**2
            large = size * (1 - (a / a_next) ** 2 * size / (a**2 + sd**2))
            x = x + math.sqrt(small) * (large / small) ** ((v + 1) / 4) * noise(i)
        if callback:
            callback(i, x, D)
    return x


def max_churn_level(process: Process, sigma: float | None) -> float:
    """Return the level that churn does not exceed: that of `sigma`, and max_level where it is the process's last."""
    cap = process.max_level if process.has_max_level else math.inf
    if sigma is None:
        return cap
    # alpha = 1 - s gives sigma = s/(1 - s).
    is_straight_path = float(process.alpha(torch.tensor(0.5, dtype=torch.float64))) != 1
    return min(cap, sigma / (1 + sigma) if is_straight_path else sigma)


def heun(
    denoise: DenoiseFn,
    x: Tensor,
    levels: Tensor,
    alpha: AlphaFn,
    churn: Churn | None = None,
    noise: NoiseFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Return x after EDM's Algorithm 1, or 2 with churn: second order, two evaluations per step; Euler to 0."""
    _check_levels(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        step_denoise = denoise.for_step(s) if isinstance(denoise, GuidanceInterval) else denoise
        if churn and churn.S_churn > 0:
            x, s = _add_churn(x, s, alpha, churn, len(levels) - 1, _required(noise), i)
        D = step_denoise(x, s)
        d = (x - D) / float(s)
        h = float(s_next - s)
        x_next = x + h * d
        if s_next > 0:
            d_next = (x_next - step_denoise(x_next, s_next)) / float(s_next)
            x_next = x + h * 0.5 * (d + d_next)
        x = x_next
        if callback:
            callback(i, x, D)
    return x


def _add_churn(
    x: Tensor, s: Tensor, alpha: AlphaFn, churn: Churn, steps: int, noise: NoiseFn, i: int
) -> tuple[Tensor, Tensor]:
    """Return the state and its level with noise added (EDM Algorithm 2, lines 4-6, for any alpha).

    x^ = (a^/a) x + sqrt(s^^2 - (s a^/a)^2) S_noise n, where s^ has 1 + gamma times the sigma of s.
    """
    a = alpha(s)
    if not churn.S_min <= float(s / a) <= churn.S_max:
        return x, s
    gamma = min(churn.S_churn / steps, math.sqrt(2) - 1)
    up = churn.raise_sigma(s, 1 + gamma).clamp(max=churn.max_level)
    if up <= s:
        return x, s
    ratio = float(alpha(up) / a)
    return ratio * x + math.sqrt(float(up) ** 2 - (float(s) * ratio) ** 2) * churn.S_noise * noise(i), up


def dpmpp_2m(
    denoise: DenoiseFn,
    x: Tensor,
    levels: Tensor,
    alpha: AlphaFn,
    callback: Callback | None = None,
    multistep: Literal["log_snr", "log_s"] = "log_snr",
) -> Tensor:
    """Return x after DPM-Solver++(2M) steps (Lu et al. 2022, Algorithm 2): second order, one evaluation per step.

    With lambda = ln(alpha/s) and h the step in lambda, x' = (s'/s) x + (1 - s'/s) (D + (D - D_old) h/(2 h_old)). The
    first step is of first order, as are the second if the first level has no signal (h_old is infinite) and the step
    to 0. multistep="log_s" measures h in -ln s, which is finite at s = 1, as k-diffusion and SD3.5's code do.
    """
    _check_levels(levels)

    def time(s: Tensor) -> Tensor:
        return (alpha(s) / s).log() if multistep == "log_snr" else -s.log()

    h_old, D_old = math.inf, x  # D_old is unused while h_old is infinite
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = estimate = denoise(x, s)
        h = float(time(s_next) - time(s))
        if s_next > 0 and math.isfinite(h_old):
            estimate = D + h / (2 * h_old) * (D - D_old)
        ratio = float(s_next / s)
        x = ratio * x + (1 - ratio) * estimate
        h_old, D_old = h, D
        if callback:
            callback(i, x, D)
    return x


def _check_levels(levels: Tensor) -> None:
    decreasing = bool((torch.diff(levels) < 0).all())
    if len(levels) < 2 or not decreasing or float(levels[-1]) < 0:
        raise ValueError(f"noise levels must decrease and not be negative: {levels.tolist()}")


def _required(noise: NoiseFn | None) -> NoiseFn:
    if noise is None:
        raise ValueError("a stochastic sampler needs the argument `noise`")
    return noise
