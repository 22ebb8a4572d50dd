"""Numbers of figures that follow from formulas or a small simulation: no images, no training.

What a row asks for stands in How.measure or Part.measure as name=value beside settings of a run.
"""

import math
from typing import Any

import numpy as np
import torch

from gesso import config, ema
from gesso.diffusion import process as processes
from gesso.nets import mp
from gesso.tables.plan import Job

EVERY = 2**23
"""images between snapshots (EDM2 Section 3.2)"""


def noise_levels(job: Job) -> dict[str, Any]:
    """Share of the signal's variance at a time of the process.

    alpha^2 / (alpha^2 + s^2) at `t` of the way from clean to noise, by the training draw of a run's process.
    """
    assert job.trained is not None
    run, _ = config.resolve(config.as_tree(job.trained.run), job.asked)
    process = processes.build(run.process)
    s = process.quantile(torch.tensor([float(job.told["t"])], dtype=torch.float64))
    signal = process.alpha(s) ** 2
    return {"found": {"alpha_bar": float(signal / (signal + s**2))}}


def responses(job: Job) -> dict[str, Any]:
    """Density of a power profile, in units of the time trained.

    Of length `sigma_rel` at `at` of that time (EDM2 Eq. 121).
    """
    said = job.told
    profile = ema.densities([1.0], [ema.Power(float(said["sigma_rel"]))])
    return {"found": {"response": float(profile.at(np.float64(said["at"]))[0])}}


def reconstruction(job: Job) -> dict[str, Any]:
    """Squared relative error of a profile made of stored averages.

    Of length `target`, from lengths `averages` at `snapshots` times (EDM2 Appendix C.5).
    """
    said = job.told
    lengths = [ema.Power(float(length)) for length in said["averages"].split(",")]
    times = [EVERY * (i + 1) for i in range(int(said["snapshots"])) for _ in lengths]
    fit = ema.solve(times, lengths * int(said["snapshots"]), times[-1], ema.Power(float(said["target"])))
    return {"found": {"error": fit.error}}


ROWS, INPUTS, STEPS, RATE, BETA2 = 32, 128, 1500, 1e-3, 0.99


def step_sizes(job: Job) -> dict[str, Any]:
    """Size of Adam's updates along the sphere over that intended, the rate (EDM2 Figure 23).

    Gradients are normal noise: 1 along each direction of the tangent plane, and along the weight `normal` times as long
    as all of that. projected=yes: without that part, as Eq. 46 has it; both are put back on the sphere (Eq. 66). Momentum is
    left out, as in the figure.
    """
    said = job.told
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(mp.normalized(torch.randn(ROWS, INPUTS, generator=g, dtype=torch.float64)))
    adam, found = torch.optim.Adam([weight], lr=RATE, betas=(0.0, BETA2)), []
    for _ in range(STEPS):
        noise = torch.randn(ROWS, INPUTS, generator=g, dtype=torch.float64)
        along = torch.randn(ROWS, 1, generator=g, dtype=torch.float64)
        before = weight.detach().clone()
        weight.grad = noise
        mp.project_gradients([weight])
        # Rows of the weight have length sqrt(INPUTS), as the noise.
        weight.grad += float(said["normal"]) * along * before
        if said["projected"] == "yes":
            mp.project_gradients([weight])
        adam.step()
        mp.put_on_sphere([weight])
        found.append(float((weight.detach() - before).square().mean()))
    late = found[STEPS // 3 :]
    return {"found": {"update": math.sqrt(sum(late) / len(late)) / RATE}}
