"""Measurements by a formula or a small simulation, without images and training.

Parameters are given as name=value in Measurement.settings or ColumnGroup.settings.
"""

import math
from typing import Any

import numpy as np
import torch

from gesso import config, ema
from gesso.diffusion import process as processes
from gesso.models import mp
from gesso.reproduce.plan import MeasurementJob

SNAPSHOT_INTERVAL = 2**23
"""Images between snapshots (EDM2 Section 3.2)."""


def noise_levels(job: MeasurementJob) -> dict[str, Any]:
    """Return the signal's fraction of the variance, alpha^2 / (alpha^2 + s^2), at a time of the process.

    Parameter `t`: progress from clean (0) to noise (1) under the training distribution of the run's process.
    """
    assert job.training is not None
    run, _ = config.resolve(config.to_dict(job.training.run), job.overrides)
    process = processes.build_process(run.process)
    s = process.icdf(torch.tensor([float(job.params["t"])], dtype=torch.float64))
    signal = process.alpha(s) ** 2
    return {"values": {"alpha_bar": float(signal / (signal + s**2))}}


def ema_responses(job: MeasurementJob) -> dict[str, Any]:
    """Return the density of a power profile at a time of the training (EDM2 Eq. 121).

    Parameters: `sigma_rel`; `time`, a fraction of the training.
    """
    params = job.params
    profile = ema.densities([1.0], [ema.PowerProfile(float(params["sigma_rel"]))])
    return {"values": {"response": float(profile.pdf(np.array(float(params["time"])))[0])}}


def ema_reconstruction(job: MeasurementJob) -> dict[str, Any]:
    """Return the squared relative error of a reconstructed EMA profile (EDM2 Appendix C.5).

    Parameters: EMA length `target`; tracked EMA lengths `sigma_rels`; number of `snapshots`.
    """
    params = job.params
    profiles = [ema.PowerProfile(float(sigma_rel)) for sigma_rel in params["sigma_rels"].split(",")]
    num_snapshots = int(params["snapshots"])
    times = [SNAPSHOT_INTERVAL * (i + 1) for i in range(num_snapshots) for _ in profiles]
    fit = ema.fit_profile(times, profiles * num_snapshots, times[-1], ema.PowerProfile(float(params["target"])))
    return {"values": {"error": fit.squared_error}}


NUM_ROWS, NUM_INPUTS, NUM_STEPS, LR, BETA2 = 32, 128, 1500, 1e-3, 0.99


def step_sizes(job: MeasurementJob) -> dict[str, Any]:
    """Return the size of Adam's updates along the sphere relative to the learning rate (EDM2 Figure 23).

    Gradients are Gaussian noise of standard deviation 1 in each direction of the tangent plane. Along the weight they
    have `normal_ratio` times the length of the tangent part; project_gradients=yes removes that part (Eq. 46). Weights
    are normalized after each step (Eq. 66). Without momentum, as in the figure.
    """
    params = job.params
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(mp.unit_rms(torch.randn(NUM_ROWS, NUM_INPUTS, generator=g, dtype=torch.float64)))
    adam, squares = torch.optim.Adam([weight], lr=LR, betas=(0.0, BETA2)), []
    for _ in range(NUM_STEPS):
        noise = torch.randn(NUM_ROWS, NUM_INPUTS, generator=g, dtype=torch.float64)
        along = torch.randn(NUM_ROWS, 1, generator=g, dtype=torch.float64)
        before = weight.detach().clone()
        weight.grad = noise
        mp.project_gradients([weight])
        # Rows of the weight have norm sqrt(NUM_INPUTS), as the noise.
        weight.grad += float(params["normal_ratio"]) * along * before
        if params["project_gradients"] == "yes":
            mp.project_gradients([weight])
        adam.step()
        mp.normalize_weights_([weight])
        squares.append(float((weight.detach() - before).square().mean()))
    late = squares[NUM_STEPS // 3 :]
    return {"values": {"update": math.sqrt(sum(late) / len(late)) / LR}}
