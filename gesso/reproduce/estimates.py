"""Estimate the cost of trainings and measurements from multiply-accumulates, counted on the meta device.

Hours are those of an A100 at a fraction of its peak in the precision of the matrix products: 16 bits, TF32, float32 or
float64. Training on an image costs three forward passes; a sampler step costs one pass for each guidance term; decoding
is counted as in EDM2's Figure 9.
"""

import functools
from typing import NamedTuple

from gesso import config, sampling
from gesso.config import InputSpec, NetConfig, RunConfig
from gesso.data import synthetic
from gesso.data.sources import NAMED_SOURCES, open_source
from gesso.evaluation import protocols
from gesso.evaluation.metrics import select_metrics
from gesso.evaluation.runner import metric_num_repeats
from gesso.models import flops
from gesso.published import edm2
from gesso.reproduce.plan import MeasurementJob
from gesso.training import estimate
from gesso.training.estimate import DiskUsage

A100_PEAK_FLOPS = {"float16": 312e12, "bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 19.5e12}
"""Peak FLOP/s (2 per multiply-accumulate) by precision: tensor cores, float32 without them."""
FLOPS_UTILIZATION = 0.4
"""Fraction of the peak that is reached: EDM2-XXL reached .40 in 16 bits, XS .23 (Table 6)."""
PUBLISHED_PRESETS = {
    f"edm2-{name}-{size.lower()}": preset
    for name, sizes in (("img512", edm2.PRESETS_512), ("img64", edm2.PRESETS_64))
    for size, preset in sizes.items()
}
EDM2_NUM_GPUS = 32
"""Number of A100 GPUs of EDM2's trainings (Table 6)."""


class CostEstimate(NamedTuple):
    """Cost of a training in hours of one A100; `published_gpu_hours` is None if the paper does not give them."""

    parameters: int
    gpu_hours: float
    published_gpu_hours: float | None
    disk_bytes: DiskUsage


def training_cost(run: RunConfig) -> CostEstimate:
    """Return the cost of a training. Raises UsageError or ValueError if the settings define no network."""
    run = with_dataset_info(run)
    memory = estimate.static_memory(run)
    macs = training_forward_macs(run.net, run.input_spec, run.semantic.max_tokens)
    preset = PUBLISHED_PRESETS.get(run.recipe)
    days = preset.days if preset and preset.total_images == run.train.total_images else None
    return CostEstimate(
        count_model(run.net, run.input_spec, run.semantic.max_tokens).parameters,
        gpu_hours(3 * macs * run.train.total_images, training_precision(run)),
        days and 24 * EDM2_NUM_GPUS * days,
        estimate.estimate_disk(run, memory["weights"], sum(memory.values()) - memory["gradients"]),
    )


def measurement_hours(job: MeasurementJob) -> float:
    """Return the A100 hours for generating the samples of eval.metrics."""
    run = with_dataset_info(evaluation_config(job))
    cfg = run.eval
    metrics = select_metrics(cfg.metrics)
    repeats = [
        metric_num_repeats(metric, cfg) for metric in metrics if not metric.sizes and "validation" not in metric.needs
    ]
    num_sizes = sum(len(metric.sizes) for metric in metrics)
    images = cfg.num_samples * max(repeats, default=0) + cfg.diversity_prompts * num_sizes
    guide = with_dataset_info(job.guide.run) if job.guide else None
    return gpu_hours(images * macs_per_sample(run, guide), sampling_precision(run))


def macs_per_sample(run: RunConfig, guide: RunConfig | None) -> float:
    """Return the multiply-accumulates of generating one image; decoding is proportional to the number of pixels."""
    macs = count_model(run.net, run.input_spec, run.semantic.max_tokens).macs
    guide_macs = count_model(guide.net, guide.input_spec, guide.semantic.max_tokens).macs if guide else macs
    lam, beta = sampling.guidance_scale(run), run.sample.control_guidance
    step = macs * ((lam * beta != 0) + (lam * (1 - beta) != 0)) + guide_macs * (lam != 1)
    decoding = 1e9 * edm2.DECODER_GFLOPS * run.sample_size[0] * run.sample_size[1] / 512**2 if run.latent.vae else 0
    return evaluations_per_sample(run) * step + decoding


def evaluations_per_sample(run: RunConfig) -> int:
    """Return the denoiser evaluations per sample; a guided evaluation counts once (EDM2 D.1)."""
    return 2 * run.sample.steps - 1 if run.sample.sampler == "heun" else run.sample.steps


def evaluation_config(job: MeasurementJob) -> RunConfig:
    """Return the configuration of a measurement. Raises UsageError if a setting of its protocol is missing."""
    assert job.training is not None
    overrides, run = job.overrides, job.training.run
    if job.group.protocol:
        overridden = config.resolve(config.to_dict(run), overrides)[0]
        overrides = [*protocols.protocol_settings(job.group.protocol, overridden), *overrides]
    run, _ = config.resolve(config.to_dict(run), overrides)
    sampling.check_sampling(run)
    return run


def with_dataset_info(run: RunConfig) -> RunConfig:
    """Return the configuration with the number of classes and other facts of its data set, without opening the data.

    Data sets that are not available count as ImageNet.
    """
    name, source = run.data.source.partition(":")[0], run.data.source
    run, _ = synthetic.with_synthetic_data(run)
    if name not in NAMED_SOURCES or run.semantic.kind != "label":
        return run
    classes = len(open_source(source if name.startswith("digits") else f"{name}:1").class_names)
    return run.model_copy(update={"data": run.data.model_copy(update={"num_classes": classes})})


@functools.cache
def count_model(net: NetConfig, inputs: InputSpec, num_text_tokens: int) -> flops.ModelCost:
    """Return the cost of a network (cached)."""
    return flops.count_flops(net, inputs, num_text_tokens)


@functools.cache
def training_forward_macs(net: NetConfig, inputs: InputSpec, num_text_tokens: int) -> int:
    """Return the multiply-accumulates of the forward passes of one image in training."""
    return flops.training_macs(net, inputs, num_text_tokens)


def training_precision(run: RunConfig) -> str:
    """Return the precision of matrix products in training, a key of A100_PEAK_FLOPS."""
    cfg = run.train
    if cfg.precision != "full":
        return cfg.precision
    return "tf32" if cfg.tf32 and cfg.dtype == "float32" else cfg.dtype


def sampling_precision(run: RunConfig) -> str:
    """Return the precision of matrix products in sampling, a key of A100_PEAK_FLOPS."""
    return run.train.dtype if run.sample.precision == "full" else run.sample.precision


def gpu_hours(macs: float, precision: str) -> float:
    """Return the A100 hours of a number of multiply-accumulates."""
    return 2 * macs / (FLOPS_UTILIZATION * A100_PEAK_FLOPS[precision]) / 3600
