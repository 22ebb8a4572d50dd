"""What a network and its use cost, counted without training it (EDM2 Appendix D.5, Berrada et al. Table A1)."""

from typing import Any

from gesso import config
from gesso.tables import estimates
from gesso.tables.plan import Job


def counts(job: Job) -> dict[str, Any]:
    """Counts of the network as a run builds it, without training it.

    params (millions), gmacs (multiply-accumulates of an evaluation, 10^9, which EDM2 calls gigaflops), gflops (as Berrada et al.
    count, 10^9), nfe, training (zettaflops, 10^21, up to eval.nimg), sampling (teraflops of an image, guided as
    sample.guidance says), params_both (10^9, with the guide's).
    """
    assert job.trained is not None
    run, _ = config.resolve(config.as_tree(job.trained.run), job.asked)
    run, guide = estimates.completed(run), job.guide and estimates.completed(job.guide.run)
    net = estimates.counted(run.net, run.inputs, run.semantic.tokens)
    other = estimates.counted(guide.net, guide.inputs, guide.semantic.tokens).parameters if guide else 0
    passes = estimates.forward_passes(run.net, run.inputs, run.semantic.tokens)
    found = {
        "params": net.parameters / 1e6,
        "gmacs": net.macs / 1e9,
        "gflops": net.paper / 1e9,
        "nfe": estimates.evaluations(run),
        "training": 3 * passes * (run.eval.nimg or run.train.total_images) / 1e21,
        "sampling": estimates.of_sample(run, guide) / 1e12,
        "params_both": (net.parameters + other) / 1e9,
    }
    return {"found": found}
