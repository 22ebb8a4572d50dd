"""What a network and its use cost, counted without training it (EDM2 Appendix D.5, Berrada et al. Table A1)."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from gesso import config
from gesso.config import Run
from gesso.data.imagined import imagined, is_there
from gesso.nets import count
from gesso.recipes.edm2 import DECODER
from gesso.tables.plan import Job, Trained
from gesso.train import start


def counts(job: Job) -> dict[str, Any]:
    """params (millions), gmacs (multiply-accumulates of an evaluation, 10^9, which EDM2 calls gigaflops), gflops (as Berrada et
    al. count, 10^9), nfe, training (zettaflops, 10^21, up to eval.nimg), sampling (teraflops of an image, guided as
    sample.guidance says), params_both (10^9, with the guide's)."""
    assert job.trained is not None
    run = _completed(job.trained, job.settings)
    net = count.count(run.net, run.inputs, run.semantic.tokens)
    guide, guided = None, run.sample.guidance != 1
    if job.guide:
        other = _completed(job.guide)
        guide = count.count(other.net, other.inputs, other.semantic.tokens)
    nfe = evaluations(run)
    macs = net.macs + (guide or net).macs * guided
    images = run.eval.nimg or run.train.total_images
    # Decoding images of another size than 512x512 in proportion: our choice.
    decoder = DECODER * 1e9 * (run.data.resolution / 512) ** 2 if run.latent.vae else 0
    found = {
        "params": net.parameters / 1e6,
        "gmacs": net.macs / 1e9,
        "gflops": net.paper / 1e9,
        "nfe": nfe,
        "training": 3 * count.training_macs(run.net, run.inputs, run.semantic.tokens) * images / 1e21,
        "sampling": (nfe * macs + decoder) / 1e12,
        "params_both": (net.parameters + (guide.parameters if guide else 0)) / 1e9,
    }
    return {"found": found}


def evaluations(run: Run) -> int:
    """Of the denoiser for one sample; a guided one counts once (EDM2 D.1)."""
    return 2 * run.sample.steps - 1 if run.sample.sampler == "heun" else run.sample.steps


def _completed(trained: Trained, settings: Sequence[str] = ()) -> Run:
    """The run with what its images tell, or usual ones would, where they are not there."""
    run, _ = config.resolve(config.as_tree(trained.run), list(settings))
    return start.opened(run, Console(quiet=True))[0] if is_there(run.data.source) else imagined(run)[0]
