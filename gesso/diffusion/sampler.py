"""Samplers: pure functions of (denoise, x, levels). In every process (x - D)/s is the derivative.

Legend: x (B, C, H, W) the state at levels[0]; levels (steps + 1,) float64, falling; `watch(i, x, D)`
is called after step i with the new state and the step's first denoised estimate.
"""

from collections.abc import Callable

from torch import Tensor

from gesso.diffusion.guidance import Denoise

Watch = Callable[[int, Tensor, Tensor], None]


def _check(levels: Tensor) -> None:
    if len(levels) < 2 or not bool((levels[1:] < levels[:-1]).all()) or float(levels[-1]) < 0:
        raise ValueError(f"noise levels must fall from step to step and stay at or above 0: {levels.tolist()}")


def euler(denoise: Denoise, x: Tensor, levels: Tensor, watch: Watch | None = None) -> Tensor:
    """x + (s' - s) (x - D)/s: first order; DDIM under VP. One evaluation a step."""
    _check(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = denoise(x, s)
        x = x + float((s_next - s) / s) * (x - D)
        if watch:
            watch(i, x, D)
    return x


def heun(denoise: Denoise, x: Tensor, levels: Tensor, watch: Watch | None = None) -> Tensor:
    """EDM's Algorithm 1 without churn: second order; Euler on the step to 0. Two evaluations a step."""
    _check(levels)
    for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        D = denoise(x, s)
        d = (x - D) / float(s)
        h = float(s_next - s)
        x_next = x + h * d
        if s_next > 0:
            d_next = (x_next - denoise(x_next, s_next)) / float(s_next)
            x_next = x + h * 0.5 * (d + d_next)
        x = x_next
        if watch:
            watch(i, x, D)
    return x


SAMPLERS: dict[str, Callable[[Denoise, Tensor, Tensor, Watch | None], Tensor]] = {"euler": euler, "heun": heun}
