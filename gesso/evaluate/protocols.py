"""Ways of measuring, named after the papers that used them: settings that `gesso evaluate RUN --protocol NAME` lays over a run.

What a paper does not say is our choice and is marked so. Everywhere: rounding to uint8, Inception's own resize, the run's
EMA length.
"""

from collections.abc import Callable
from pathlib import Path

from gesso import config
from gesso.config import Run
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
    """Dhariwal and Nichol 2021: 50k samples of random classes, 250 ancestral steps, beside the training set."""
    return ["eval.scores=fid,is,pr", "eval.labels=random", *ddim(250), "sample.eta=1"]


def dit(run: Run) -> list[str]:
    """Peebles and Xie 2023: as adm, by its evaluator, with guidance 1.5."""
    return [*adm(run), "sample.guidance=1.5", "sample.tuned_at=null"]


def edm2(run: Run) -> list[str]:
    """Karras et al. 2024, Appendix C: 50k samples of random classes beside the whole training set, the least of three;
    32 steps of Heun, 63 evaluations (guided ones count once). Its detector is NVIDIA's."""
    return [
        "eval.scores=fid,fd_dinov2", "eval.inception=nvidia", "eval.labels=random", "eval.repeats=3",
        "sample.sampler=heun", "sample.steps=32", "sample.S_churn=0",
    ]  # fmt: skip


def berrada(run: Run) -> list[str]:
    """Berrada et al. 2024, Section 3.1, Appendix C: 50k samples, 250 steps of DDIM, beside the full training set; guidance
    1.5 at 256, 2.0 at 512 by the scale law. Classes in turn: our choice."""
    return ["eval.scores=fid", *ddim(250), *GUIDED]


def berrada_val(run: Run) -> list[str]:
    """Figures 8 and A2: as berrada, in 50 steps, beside the validation set, which eval.reference names."""
    return ["eval.scores=fid", *ddim(50), *GUIDED, *_reference(run, "the validation set")]


def berrada_in22k(run: Run) -> list[str]:
    """Appendix C: 50k samples beside 200k training images. Which ones the paper does not say: the user's eval.reference."""
    return ["eval.scores=fid", *ddim(250), *GUIDED, *_reference(run, "200k training images")]


def berrada_coco(run: Run) -> list[str]:
    """Section 3.1: Frechet distance and CLIPScore beside COCO's validation set, about 40k pictures with captions, which
    eval.reference names; 25 steps, guidance 5. Each caption once."""
    return ["eval.scores=fid,clip", *_coco(run)]


def berrada_lpips(run: Run) -> list[str]:
    """Section 3.1: conditional diversity, 10k prompts, samples of one seed and noise told five sizes (Table 2a). Sampler and
    guidance as for the Frechet distance: our choice."""
    return ["eval.scores=lpips", *ddim(250), *GUIDED]


def sd3(run: Run) -> list[str]:
    """Esser et al. 2024, Section 5.1: CLIPScore, and the Frechet distance in CLIP ViT-L/14's features of images, beside COCO's
    validation set of 2014, which eval.reference names; 25 steps, guidance 5. Embeddings as they are, not of length 1, each
    caption once, and as many samples as everywhere: our choice."""
    return ["eval.scores=fd_clip,clip", *_coco(run)]


def _coco(run: Run) -> list[str]:
    where = _reference(run, "COCO's validation pictures with captions")
    if run.eval.prompts is None:
        where.append(f"eval.prompts={run.eval.reference}")
    return [*ddim(25), "sample.guidance=5", "sample.tuned_at=null", *where]


def ddim(steps: int) -> list[str]:
    return ["sample.sampler=euler", f"sample.steps={steps}", "sample.eta=0"]


GUIDED = ["sample.guidance=1.5", "sample.tuned_at=256"]
PROTOCOLS: dict[str, Callable[[Run], list[str]]] = {
    "adm": adm, "dit": dit, "edm2": edm2, "berrada": berrada, "berrada-val": berrada_val,
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
    return [f"eval.protocol={name}", "eval.images=50000", *PROTOCOLS[name](run)]


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
