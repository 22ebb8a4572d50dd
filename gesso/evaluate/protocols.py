"""Ways of measuring, named after the papers that used them: settings that `gesso evaluate RUN --protocol NAME` lays over a run.

What a paper does not say is our choice and is marked so. Everywhere: the run's EMA length; Berrada et al. have an EMA and do not
say which: their distances are taken of both readings, the run's length (.10 of the training) and the decay of .9999 per step of
the code that they build on. Decoded latents become 8-bit pixels as their convention says (data/vae.py).
"""

from collections.abc import Callable
from pathlib import Path

from gesso import config
from gesso.config import Run
from gesso.config.base import halflife_of
from gesso.errors import UsageError
from gesso.evaluate import compare, score

CHANGEABLE = ("sample.", "eval.")
FREE = (
    "eval.weights", "eval.dinov2", "eval.clip", "eval.patience", "eval.reference", "eval.prompts", "eval.seed",
    "eval.scores", "eval.nimg", "sample.batch_size", "sample.sigma_rel", "sample.halflife", "sample.guide", "sample.guide_sigma_rel",
    "sample.rampup", "sample.precision",
)  # fmt: skip
"""settings that a protocol leaves to the run or the machine"""


def adm(run: Run) -> list[str]:
    """Dhariwal and Nichol 2021: 50k samples of random classes, 250 ancestral steps, beside the training set; precision and
    recall of all samples beside 10k of the reference. Variance of the steps: learned where the network estimates it. Samples
    in pixels are truncated to 8 bits, as its script does."""
    return [
        "eval.scores=fid,is,pr",
        "eval.labels=random",
        "eval.resize=adm",
        *ancestral(run, 250),
        "sample.to_uint8=truncate",
    ]


def dit(run: Run) -> list[str]:
    """Peebles and Xie 2023: as adm, by its evaluator, with guidance 1.5, which its code applies to 3 of the 4 channels; pixels are
    rounded."""
    guidance = ["sample.guidance=1.5", "sample.tuned_at=null", *_three_channels(run)]
    return [*adm(run), "sample.to_uint8=round", *guidance]


def mdt(run: Run) -> list[str]:
    """Gao et al. 2023: as dit, with power-cosine guidance of strength 3.8 and power 4, the defaults of its sampling script, which
    truncates pixels as ADM's."""
    power = ["sample.guidance_schedule=power_cosine", "sample.guidance_power=4"]
    return [*adm(run), "sample.guidance=3.8", "sample.tuned_at=null", *power, *_three_channels(run)]


def edm2(run: Run) -> list[str]:
    """Karras et al. 2024, D.4 and A.5: 50k samples of random classes beside the whole training set; FID the least of three, the
    distance in DINOv2's features once; 32 steps of Heun, 63 evaluations (guided ones count once). Its detector is NVIDIA's."""
    return [
        "eval.scores=fid,fd_dinov2", "eval.inception=nvidia", "eval.labels=random", "eval.repeats=3", "eval.repeated=fid",
        "eval.resize=adm",
        "sample.sampler=heun", "sample.steps=32", "sample.S_churn=0",
    ]  # fmt: skip


def berrada(run: Run) -> list[str]:
    """Berrada et al. 2024, Section 3.1, Appendix C: 50k samples, 250 steps of DDIM, beside the full training set; guidance
    1.5 at 256, 2.0 at 512 by the scale law. Classes in turn: our choice."""
    return ["eval.scores=fid", *both_averages(run), *ddim(250), *GUIDED]


def berrada_val(run: Run) -> list[str]:
    """Figures 8 and A2: as berrada, in 50 steps, beside the validation set, which eval.reference names."""
    return ["eval.scores=fid", *both_averages(run), *ddim(50), *GUIDED, *_reference(run, "the validation set")]


def berrada_in22k(run: Run) -> list[str]:
    """Appendix C: 50k samples beside 200k training images. Which ones the paper does not say: the user's eval.reference."""
    return ["eval.scores=fid", *both_averages(run), *ddim(250), *GUIDED, *_reference(run, "200k training images")]


def berrada_coco(run: Run) -> list[str]:
    """Section 3.1: Frechet distance and CLIPScore beside COCO's validation set of 2014, 40,504 pictures with a caption
    each, which eval.reference names; a sample for each; 25 steps, guidance 5."""
    return ["eval.scores=fid,clip", *both_averages(run), *_coco(run)]


def berrada_lpips(run: Run) -> list[str]:
    """Section 3.1: conditional diversity, 10k prompts, samples of one seed and noise told five sizes (Table 2a). Sampler and
    guidance as for the Frechet distance: our choice."""
    return ["eval.scores=lpips", *ddim(250), *GUIDED]


def sd3(run: Run) -> list[str]:
    """Esser et al. 2024, Section 5.1: CLIPScore, and the Frechet distance in CLIP ViT-L/14's features of images, beside COCO's
    validation set of 2014, which eval.reference names; 25 steps, guidance 5. Embeddings as they are, not of length 1, and
    a sample for each of its 40,504 pictures, by one caption: our choice."""
    grid = ["sample.grid=sd3"] if run.process.name == "rf" else []  # its published levels
    return ["eval.scores=fd_clip,clip", *_coco(run), *grid]


def _coco(run: Run) -> list[str]:
    where = _reference(run, "COCO's validation pictures with captions")
    if run.eval.prompts is None:
        where.append(f"eval.prompts={run.eval.reference}")
    return [f"eval.images={COCO}", *ddim(25), "sample.guidance=5", "sample.tuned_at=null", *where]


def both_averages(run: Run) -> list[str]:
    """Return the setting that measures the average of decay .9999 too, unless the run is sampled with a traditional one."""
    return [] if run.sample.halflife else [f"eval.halflives=[{halflife_of(0.9999, run.train.batch_size)}]"]


def ddim(steps: int) -> list[str]:
    return ["sample.sampler=euler", f"sample.steps={steps}", "sample.eta=0"]


COCO = 40_504
"""pictures of COCO's validation set of 2014"""


def ancestral(run: Run, steps: int) -> list[str]:
    """DDPM's steps at the indices that ADM's code takes, with the variance that the network has learned, or the posterior's; pixels
    clipped, as there."""
    learned = "learned" if getattr(run.net, "learned_variance", False) else "small"
    clip = "false" if run.latent.vae else "true"
    grid = ["sample.grid=respaced"] if run.process.name == "vp" else []
    return [*ddim(steps), "sample.eta=1", f"sample.variance={learned}", f"sample.clip={clip}", *grid]


def _three_channels(run: Run) -> list[str]:
    return ["sample.guided_channels=3"] if run.channels > 3 else []


PLAIN = [
    "sample.grid=null", "sample.last=zero", "sample.eta=0", "sample.variance=small", "sample.S_churn=0", "sample.interval=null",
    "sample.guidance_schedule=constant", "sample.guided_channels=null", "sample.clip=false", "sample.multistep=log_snr",
]  # fmt: skip
"""laid over a run before a protocol's own settings: what a run samples otherwise is no part of the protocol"""
GUIDED = ["sample.guidance=1.5", "sample.tuned_at=256"]
PROTOCOLS: dict[str, Callable[[Run], list[str]]] = {
    "adm": adm, "dit": dit, "mdt": mdt, "edm2": edm2, "berrada": berrada, "berrada-val": berrada_val,
    "sd3": sd3, "berrada-in22k": berrada_in22k, "berrada-coco": berrada_coco, "berrada-lpips": berrada_lpips,
}  # fmt: skip


def _reference(run: Run, what: str) -> list[str]:
    if run.eval.reference is None:
        raise UsageError(f"this protocol compares with {what}: name them by eval.reference=DIR")
    return []


def settings_of(name: str, run: Run) -> list[str]:
    """What the protocol `name` lays over a run. Raises UsageError for one that there is not, or that needs to be told more."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol {name!r}; {config.nearest(name, list(PROTOCOLS))}")
    return [f"eval.protocol={name}", "eval.images=50000", *PLAIN, *PROTOCOLS[name](run)]


def measured(folder: Path, name: str | None, said: list[str]) -> Run:
    """The run of a folder as it is to be measured: by the protocol `name`, and as the user said otherwise.

    What departs from the protocol is recorded as such in eval.protocol. Raises UsageError for a protocol that there is not,
    or that needs to be told more.
    """
    run = config.recorded(folder, said, CHANGEABLE)
    if name is None:
        return run
    own = settings_of(name, run)
    exact = config.recorded(folder, [*own, f"eval.reference={run.eval.reference or 'null'}"], CHANGEABLE)
    run = config.recorded(folder, [*own, *said], CHANGEABLE)
    other = sorted({path for path, _, _ in config.differences(exact, run) if path not in FREE})
    return (
        run
        if not other
        else config.recorded(folder, [*own, *said, f"eval.protocol={name}, but {' '.join(other)}"], CHANGEABLE)
    )


def evaluate(
    folder: Path | None, protocol: str | None, settings: list[str], told: dict[str, object], tick: compare.Tick
) -> list[str]:
    """`gesso evaluate`: a run's folder with settings, or pictures with the flags `told`. Returns the lines to show."""
    if asked := compare.asked(folder, settings, told):
        return compare.write(asked, tick)
    run = measured(folder, protocol, settings)
    lines = score.evaluate_folder(folder, run, tick)
    wrote = folder / ("scores.json" if run.eval.scores else "metrics.json")
    return [*lines, f"wrote {wrote}\nnext:\n  gesso report {folder}"]
