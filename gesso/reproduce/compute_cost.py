"""Cost of a network and of its use, counted without training it (EDM2 Appendix D.5, Berrada et al. Table A1)."""

from typing import Any

from gesso import config
from gesso.reproduce import estimates
from gesso.reproduce.plan import MeasurementJob


def measure_counts(job: MeasurementJob) -> dict[str, Any]:
    """Return counts of the network that a run builds, without training it.

    params (millions), gmacs (10^9 multiply-accumulates per evaluation, EDM2's gigaflops), gflops (10^9, as Berrada et al.
    count), nfe, training (zettaflops, 10^21, up to eval.nimg), sampling (teraflops of an image, guided as
    sample.guidance says), params_both (10^9, with the guide's).
    """
    assert job.training is not None
    run, _ = config.resolve(config.to_dict(job.training.run), job.overrides)
    run, guide = estimates.resolved_config(run), job.guide and estimates.resolved_config(job.guide.run)
    net = estimates.count_macs(run.net, run.input_spec, run.semantic.max_tokens)
    other = estimates.count_macs(guide.net, guide.input_spec, guide.semantic.max_tokens).parameters if guide else 0
    passes = estimates.forward_passes(run.net, run.input_spec, run.semantic.max_tokens)
    counts = {
        "params": net.parameters / 1e6,
        "gmacs": net.macs / 1e9,
        "gflops": net.table_a1_flops / 1e9,
        "nfe": estimates.evaluations_per_sample(run),
        "training": 3 * passes * (run.eval.nimg or run.train.total_images) / 1e21,
        "sampling": estimates.macs_per_sample(run, guide) / 1e12,
        "params_both": (net.parameters + other) / 1e9,
    }
    return {"values": counts}
