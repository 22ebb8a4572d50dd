"""Size and cost of a network, counted without training it (EDM2 Appendix D.5, Berrada et al. Table A1)."""

from typing import Any

from gesso import config
from gesso.reproduce import estimates
from gesso.reproduce.plan import MeasurementJob


def measure_counts(job: MeasurementJob) -> dict[str, Any]:
    """Return counts of the network of a run, without training it.

    params (10^6), gmacs (10^9 multiply-accumulates per evaluation, EDM2's gigaflops), gflops (10^9, as Berrada et al.
    count), nfe, training_macs (10^21, up to eval.nimg), sampling_macs (10^12 per image, guided as sample.guidance),
    params_with_guide (10^9).
    """
    assert job.training is not None
    run, _ = config.resolve(config.to_dict(job.training.run), job.overrides)
    run = estimates.with_dataset_info(run)
    guide = estimates.with_dataset_info(job.guide.run) if job.guide else None
    cost = estimates.count_model(run.net, run.input_spec, run.semantic.max_tokens)
    guide_params = (
        estimates.count_model(guide.net, guide.input_spec, guide.semantic.max_tokens).parameters if guide else 0
    )
    macs_per_image = 3 * estimates.training_forward_macs(run.net, run.input_spec, run.semantic.max_tokens)
    counts = {
        "params": cost.parameters / 1e6,
        "gmacs": cost.macs / 1e9,
        "gflops": cost.table_a1_flops / 1e9,
        "nfe": estimates.evaluations_per_sample(run),
        "training_macs": macs_per_image * (run.eval.nimg or run.train.total_images) / 1e21,
        "sampling_macs": estimates.macs_per_sample(run, guide) / 1e12,
        "params_with_guide": (cost.parameters + guide_params) / 1e9,
    }
    return {"values": counts}
