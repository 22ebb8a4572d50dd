"""Sampling schedules: the noise levels that a sampler visits.

Legend: s level in the coordinates of the process, sigma = s/alpha(s), T number of VP's timesteps.
"""

import numpy as np
import torch
from torch import Tensor

from gesso.config import SampleConfig
from gesso.diffusion.process import VP, Process, VPv
from gesso.errors import UsageError


def levels(
    process: Process, steps: int, schedule: str | None = None, shift: float = 1.0, final_level: str = "zero"
) -> Tensor:
    """Return sampling levels, (steps + 1,) float64, decreasing.

    Levels above the largest of the process raise an error instead of being capped: the network was not trained on
    them, and several equal levels would be steps that do nothing.

    Args:
        process: Diffusion process.
        steps: Number of steps, at least 1.
        schedule: None for the first of `process.schedules`, or one of
            karras: s^(1/rho) uniform from the largest to the smallest level, on s in every process (EDM Eq. 5);
            linear: s uniform from 1 to 0, then shifted to the resolution of the process;
            sd3: s uniform from 1 to the shifted 1/1000, then shifted, then 0 (SD3's published code, diffusers);
            linspace, trailing, leading: timesteps of the table (Lin et al. 2024, Table 2), leading with offset 1;
            respaced: timesteps T-1 to 0 at a fractional stride, rounded (ADM, DiT, MDT);
            ddim: every n-th timestep from 0 up, for example 980, 960, ..., 0 (ddimN of ADM and DiT).
        shift: Factor on the sigma of every level; for RF it is SD3's shift s -> k s/(1 + (k-1) s).
        final_level: "zero", or "sigma_min" for the level of timestep 0 (set_alpha_to_one=False in diffusers).

    Raises:
        UsageError: The process does not have this schedule, final level, number of steps or shift.
    """
    schedule = schedule or process.schedules[0]
    if schedule not in process.schedules:
        raise UsageError(f"sample.schedule={schedule}: this process has {', '.join(process.schedules)}")
    if steps < 1:
        raise UsageError(f"sample.steps={steps}: set at least 1")
    if schedule == "karras":
        s = _karras(process, steps)
    elif schedule == "linear":
        s = process.scale_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], process.resolution_scale)
    elif schedule == "sd3":
        s = process.scale_sigma(_sd3(process, steps, process.resolution_scale * shift), process.resolution_scale)
    else:
        assert isinstance(process, VP | VPv)  # the only processes with a schedule of timesteps
        s = process.level_table[_table_indices(schedule, len(process.level_table), steps)]
    s = torch.cat([s, s.new_tensor([_final_level(process, s, final_level)])])
    if shift != 1:
        s = process.scale_sigma(s, shift)
    if float(s[0]) > process.max_level:
        raise UsageError(
            f"sample.shift={shift:g}: the first level would be {float(s[0]):.4g}, above {process.max_level:.4g}, the "
            "largest of this process; a shift above 1 is for process.name=rf"
        )
    return s


def levels_from_config(process: Process, cfg: SampleConfig) -> Tensor:
    """Return the sampling levels of the settings `sample.*`; errors as for `levels`."""
    return levels(process, cfg.steps, cfg.schedule, cfg.shift, cfg.final_level)


def _karras(process: Process, steps: int) -> Tensor:
    i = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = (s ** (1 / process.rho) for s in (process.max_level, process.min_level))
    s = (high + i * (low - high)) ** process.rho
    s[-1] = process.min_level  # both ends exact, without rounding errors
    s[0] = process.max_level
    return s


def _sd3(process: Process, steps: int, shift: float) -> Tensor:
    """Return levels (steps,) before the shift: uniform from 1 to the shifted 1/1000, the lowest of SD3's 1000."""
    low = float(process.scale_sigma(torch.tensor(1e-3, dtype=torch.float64), shift))
    return 1 + torch.linspace(0, 1, steps, dtype=torch.float64) * (low - 1)


def _table_indices(schedule: str, T: int, steps: int) -> Tensor:
    """Return decreasing timesteps (steps,) by diffusers' formulas, in numpy so that halves round as in diffusers."""
    max_steps = T - 1 if schedule == "leading" else T
    if steps > max_steps:
        raise UsageError(f"sample.steps={steps}: sample.schedule={schedule} allows at most {max_steps} steps")
    index: np.ndarray
    if schedule == "leading":
        index = np.arange(steps)[::-1] * (T // steps) + 1  # steps_offset=1
    elif schedule == "trailing":
        index = np.arange(T, 0, -T / steps)[:steps].round() - 1  # arange may return one more
    elif schedule == "ddim":
        index = _ddim_indices(T, steps)
    elif schedule == "respaced":
        index = _respaced_indices(T, steps)
    else:
        index = np.linspace(0, T - 1, steps).round()[::-1] if steps > 1 else np.array([T - 1])
    return torch.from_numpy(index.astype(np.int64))


def _ddim_indices(T: int, steps: int) -> np.ndarray:
    """Return decreasing timesteps (steps,) of the smallest integer stride from 0 that gives this number of steps."""
    stride = next((stride for stride in range(1, T) if -(-T // stride) == steps), None)
    if stride is None:
        near = sorted({-(-T // stride) for stride in range(1, T)}, key=lambda n: abs(n - steps))[:2]
        raise UsageError(
            f"sample.steps={steps}: sample.schedule=ddim uses every n-th of {T} timesteps, and no n gives {steps}; "
            f"set sample.steps={near[0]} or {near[1]}, or sample.schedule=linspace"
        )
    return np.arange(0, T, stride)[::-1].copy()


def _respaced_indices(T: int, steps: int) -> np.ndarray:
    """Return decreasing timesteps (steps,); a running sum of the stride decides how halves round, as published."""
    index, position = [], 0.0
    for _ in range(steps):
        index.append(round(position))
        position += (T - 1) / max(steps - 1, 1)
    return np.array(index[::-1] if steps > 1 else [T - 1])  # a single step starts from noise


def _final_level(process: Process, s: Tensor, final_level: str) -> float:
    """Return the level after the last of s."""
    if final_level == "zero":
        return 0.0
    if not isinstance(process, VP | VPv):
        raise UsageError(
            "sample.final_level=sigma_min: only process.name=vp has a lowest level above 0; set sample.final_level=zero"
        )
    if float(s[-1]) <= process.min_level:
        raise UsageError(
            "sample.final_level=sigma_min: this schedule reaches the lowest level before its last step; "
            "set sample.schedule=leading or trailing, fewer steps, or sample.final_level=zero"
        )
    return process.min_level
