"""Step grids: which noise levels a sampler visits.

Legend: s a level in the process's own coordinates, sigma = s/alpha(s), T the number of VP's indices.
"""

import numpy as np
import torch
from torch import Tensor

from gesso.config import Sample
from gesso.diffusion.process import VP, Process, VPv
from gesso.errors import UsageError


def levels(process: Process, steps: int, grid: str | None = None, shift: float = 1.0, last: str = "zero") -> Tensor:
    """Sampling levels, (steps + 1,) float64, falling.

    grid None: the process's own, the first of `process.grids`.
        karras: s^(1/rho) even from the largest to the smallest level, on s itself in every process (EDM Eq. 5)
        linear: s even from 1 to 0 before the process's own shift to its resolution
        sd3: s even from 1 to the shifted 1/1000, then shifted, then 0 (SD3's published code and diffusers)
        linspace, trailing, leading: indices of the table (Lin et al. 2024, Table 2), leading one index up
        respaced: indices from T-1 to 0 at a fractional stride, rounded (ADM, DiT, MDT); linspace but for its rounding
        ddim: every (T/N)-th index from 0 up, 980, 960, ..., 0 for 50 of 1000 steps (ADM's and DiT's ddimN)
    shift: factor on sigma of every level; SD3's shift s -> k s/(1+(k-1)s) in RF.
    last: zero, or first: the level of index 0, where diffusers' set_alpha_to_one=False ends.

    Raises UsageError for a grid, a last level or a number of steps that the process does not have, and for a
    shift beyond its largest level. Such levels are not capped: a network never saw them, and as several equal
    levels they would be steps that do nothing.
    """
    grid = grid or process.grids[0]
    if grid not in process.grids:
        raise UsageError(f"sample.grid={grid}: this process has {', '.join(process.grids)}")
    if steps < 1:
        raise UsageError(f"sample.steps={steps}: there is at least 1")
    if grid == "karras":
        s = _karras(process, steps)
    elif grid == "linear":
        s = process.rescaled(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], process.k)
    elif grid == "sd3":
        s = process.rescaled(_sd3(process, steps, process.k * shift), process.k)
    else:
        s = process.table[_indices(grid, len(process.table), steps)]
    s = torch.cat([s, s.new_tensor([_end(process, s, last)])])
    if shift != 1:
        s = process.rescaled(s, shift)
    if float(s[0]) > process.largest:
        raise UsageError(
            f"sample.shift={shift:g}: the first level would be {float(s[0]):.4g}, above {process.largest:.4g}, the largest "
            "of this process; a shift above 1 is for process.name=rf"
        )
    return s


def asked(process: Process, cfg: Sample) -> Tensor:
    """`levels` by sampling settings."""
    return levels(process, cfg.steps, cfg.grid, cfg.shift, cfg.last)


def _karras(process: Process, steps: int) -> Tensor:
    i = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = (s ** (1 / process.rho) for s in (process.largest, process.smallest))
    s = (high + i * (low - high)) ** process.rho
    s[-1] = process.smallest  # the ends exactly, not a rounding beside them
    s[0] = process.largest
    return s


def _sd3(process: Process, steps: int, shift: float) -> Tensor:
    """Levels (steps,) before the shift: even from 1 to what the shift makes of 1/1000, the lowest of SD3's 1000 levels."""
    low = float(process.rescaled(torch.tensor(1e-3, dtype=torch.float64), shift))
    return 1 + torch.linspace(0, 1, steps, dtype=torch.float64) * (low - 1)


def _indices(grid: str, T: int, steps: int) -> Tensor:
    """Indices (steps,), falling, by diffusers' formulas, in numpy as there: its floats decide which way halves round."""
    most = T - 1 if grid == "leading" else T
    if steps > most:
        raise UsageError(f"sample.steps={steps}: under grid={grid} this process has {most} levels to step from")
    if grid == "leading":
        index = np.arange(steps)[::-1] * (T // steps) + 1  # steps_offset=1
    elif grid == "trailing":
        index = np.arange(T, 0, -T / steps)[:steps].round() - 1  # arange may give one more
    elif grid == "ddim":
        index = _strided(T, steps)
    elif grid == "respaced":
        index = _respaced(T, steps)
    else:
        index = np.linspace(0, T - 1, steps).round()[::-1] if steps > 1 else np.array([T - 1])
    return torch.from_numpy(index.astype(np.int64))


def _strided(T: int, steps: int) -> np.ndarray:
    """Indices (steps,), falling, of the smallest whole stride from 0 that gives so many. Raises UsageError where none does."""
    stride = next((stride for stride in range(1, T) if -(-T // stride) == steps), None)
    if stride is None:
        near = sorted({-(-T // stride) for stride in range(1, T)}, key=lambda n: abs(n - steps))[:2]
        raise UsageError(
            f"sample.steps={steps}: sample.grid=ddim takes every n-th of {T} indices, which gives no {steps} of them: set "
            f"sample.steps={near[0]} or {near[1]}, or sample.grid=linspace"
        )
    return np.arange(0, T, stride)[::-1].copy()


def _respaced(T: int, steps: int) -> np.ndarray:
    """Indices (steps,), falling; a running sum of the stride decides which way halves round, as published."""
    index, position = [], 0.0
    for _ in range(steps):
        index.append(round(position))
        position += (T - 1) / max(steps - 1, 1)
    return np.array(index[::-1] if steps > 1 else [T - 1])  # one step starts from noise


def _end(process: Process, s: Tensor, last: str) -> float:
    """The level after the last of s."""
    if last == "zero":
        return 0.0
    if not isinstance(process, VP | VPv):
        raise UsageError("sample.last=first: only process.name=vp has a first level above 0; set sample.last=zero")
    if float(s[-1]) <= process.smallest:
        raise UsageError(
            "sample.last=first: this grid already steps from the first level, so there is nothing left to step to; "
            "set sample.grid=leading or trailing, fewer steps, or sample.last=zero"
        )
    return process.smallest
