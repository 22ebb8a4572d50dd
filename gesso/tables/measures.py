"""How numbers are found on a training: scores of samples, what training logged, counts of the network (costs.py), and what
needs no training (closed.py)."""

import math
from collections.abc import Callable
from typing import Any

from gesso import ema
from gesso.config import Run
from gesso.errors import UsageError
from gesso.evaluate import measure, protocols
from gesso.generate import device_of
from gesso.interop import edm2
from gesso.snapshot import Target
from gesso.tables import closed, costs, grids, inside
from gesso.tables.plan import Job
from gesso.tables.table import By
from gesso.train import log


def scores(job: Job) -> dict[str, Any]:
    """eval.scores of samples, the best over eval.repeats as EDM2 reports them; the protocol with them."""
    return _scored(job)


def _scored(job: Job, average: Callable[[Run], Target] | None = None) -> dict[str, Any]:
    assert job.trained is not None
    run = protocols.measured(job.trained.folder, job.part.protocol, job.asked)
    work = measure.Work(job.trained.folder, run, device_of(run), average=average(run) if average else None)
    result, _ = measure.scores_of(work, lambda done, total: None)
    return {"found": {name: each["best"] for name, each in result["scores"].items()}, "protocol": result["protocol"]}


SIDE = 64
"""positions of a latent along an edge, after which Figure 5b calls the highest level of its networks 64x64"""


def tensors(job: Job) -> dict[str, Any]:
    """Scores with one weight at another EMA length than all others.

    tensor=LAYER=LENGTH says which, a layer as Appendix D.6 calls it (the highest level 64x64, whatever its size).
    """
    name, _, length = job.told["tensor"].rpartition("=")

    def average(run: Run) -> Target:
        ours = edm2.layer(name, run.net, run.inputs._replace(resolution=SIDE))
        if ours is None:
            raise UsageError(f"{job.trained.folder} has no layer {name}")
        return ema.PerTensor(ema.chosen(run.sample), ((ours, ema.Power(float(length))),))

    return _scored(job, average)


def growth(job: Job) -> dict[str, Any]:
    """Growth of magnitudes in training, as its log has them.

    At the end over when first measured, and over half-way (_late): the geometric mean over a network's levels, of their
    largest (_max) and mean feature (EDM2 Figures 3 and 15).
    """
    assert job.trained is not None
    path = job.trained.folder / "log.jsonl"
    lines = [line for line in log.read(path) if "magnitudes" in line]
    if len(lines) < 3:
        raise UsageError(f"{path} has magnitudes at {len(lines)} times: train with watch.magnitude_images set lower")
    half = min(lines, key=lambda line: abs(line["nimg"] - lines[-1]["nimg"] / 2))
    found = {}
    for kind in ("activations", "main_path", "weights"):
        for i, which in enumerate(("max", "mean")):
            for since, suffix in ((lines[0], ""), (half, "_late")):
                ratios = [
                    values[i] / since["magnitudes"][kind][place][i]
                    for place, values in lines[-1]["magnitudes"][kind].items()
                ]
                found[f"{kind}_{which}{suffix}"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"found": found}


FOUND: dict[By, Callable[[Job], dict[str, Any]]] = {
    "scores": scores,
    "tensors": tensors,
    "gradients": inside.gradients,
    "attention": inside.attention,
    "growth": growth,
    "counts": costs.counts,
    "noise_levels": closed.noise_levels,
    "responses": closed.responses,
    "reconstruction": closed.reconstruction,
    "step_sizes": closed.step_sizes,
    "pictures": grids.pictures,
}
