"""Measurement methods: metrics of samples, values that training logged, counts of the network, analytic values."""

import math
from collections.abc import Callable
from typing import Any

from gesso import ema
from gesso.config import EDM2Config, EDM2LadderConfig, RunConfig
from gesso.errors import UsageError
from gesso.evaluation import protocols, runner
from gesso.interop import edm2
from gesso.reproduce import analytic, attention_probe, compute_cost, sample_grids
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.schema import Method
from gesso.sampling import run_device
from gesso.snapshot import TargetProfile
from gesso.training import logging


def measure_metrics(job: MeasurementJob) -> dict[str, Any]:
    """Return eval.metrics of samples, the best over eval.num_repeats as EDM2 reports them, with their protocol."""
    return _evaluate_metrics(job)


def _evaluate_metrics(
    job: MeasurementJob, ema_target: Callable[[RunConfig], TargetProfile] | None = None
) -> dict[str, Any]:
    assert job.training is not None
    run = protocols.apply_protocol(job.training.folder, job.group.protocol, job.overrides)
    context = runner.EvalContext(
        job.training.folder, run, run_device(run), ema_target=ema_target(run) if ema_target else None
    )
    evaluation = runner.evaluate_metrics(context, lambda done, total: None)
    assert evaluation is not None  # it is None on ranks above 0 only
    return {"values": evaluation.best(), "protocol": evaluation.protocol}


EDM2_LATENT_RESOLUTION = 64
"""Size of EDM2's latents: Figure 5b names the layers of the highest level 64x64, whatever the resolution."""


def measure_tensors(job: MeasurementJob) -> dict[str, Any]:
    """Return metrics with one weight tensor at another EMA length than all others.

    Parameter tensor=LAYER=LENGTH: the layer by its name in Appendix D.6 (the highest level is 64x64 at any resolution).
    """
    assert job.training is not None
    folder = job.training.folder
    name, _, length = job.params["tensor"].rpartition("=")

    def ema_target(run: RunConfig) -> TargetProfile:
        if not isinstance(run.net, EDM2Config | EDM2LadderConfig):
            raise UsageError(f"{folder}: layers of Appendix D.6 are those of net.name=edm2 and edm2-ladder")
        tensor = edm2.name_of_paper_layer(name, run.net, run.input_spec._replace(resolution=EDM2_LATENT_RESOLUTION))
        if tensor is None:
            raise UsageError(f"{folder} has no layer {name}")
        return ema.PerTensorProfile(ema.sampling_profile(run.sample), ((tensor, ema.PowerProfile(float(length))),))

    return _evaluate_metrics(job, ema_target)


def measure_growth(job: MeasurementJob) -> dict[str, Any]:
    """Return the growth of magnitudes during training, from the log.

    The ratio of the last value to the first (suffix _late: to the one half-way), as the geometric mean over the levels
    of the network, for the largest (_max) and the mean feature (EDM2 Figures 3 and 15).
    """
    assert job.training is not None
    path = job.training.folder / "log.jsonl"
    lines = [line for line in logging.read_log(path) if "magnitudes" in line]
    if len(lines) < 3:
        raise UsageError(
            f"{path} has magnitudes at {len(lines)} times: set monitor.magnitude_every lower and train again"
        )
    half = min(lines, key=lambda line: abs(line["nimg"] - lines[-1]["nimg"] / 2))
    growth = {}
    for kind in ("activations", "main_path", "weights"):
        for i, statistic in enumerate(("max", "mean")):
            for since, suffix in ((lines[0], ""), (half, "_late")):
                ratios = [
                    values[i] / since["magnitudes"][kind][level][i]
                    for level, values in lines[-1]["magnitudes"][kind].items()
                ]
                growth[f"{kind}_{statistic}{suffix}"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"values": growth}


MEASUREMENT_METHODS: dict[Method, Callable[[MeasurementJob], dict[str, Any]]] = {
    "metrics": measure_metrics,
    "tensors": measure_tensors,
    "gradients": attention_probe.measure_padding_gradients,
    "attention": attention_probe.measure_padding_attention,
    "growth": measure_growth,
    "counts": compute_cost.measure_counts,
    "noise_levels": analytic.noise_levels,
    "responses": analytic.ema_responses,
    "reconstruction": analytic.ema_reconstruction,
    "step_sizes": analytic.step_sizes,
    "sample_grid": sample_grids.save_sample_grid,
}
