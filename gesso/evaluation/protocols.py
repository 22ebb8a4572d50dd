"""Ways of measuring, named after the papers that used them: settings that `gesso evaluate RUN --protocol NAME` lays over a run.

What a paper does not say is our choice and is marked so. Everywhere: the run's EMA length; Berrada et al. have an EMA and do not
say which: their distances are taken of both readings, the run's length (.10 of the training) and the decay of .9999 per step of
the code that they build on. Decoded latents become 8-bit pixels as their convention says (data/encoders/vae.py).
"""

from collections.abc import Callable
from pathlib import Path

from gesso import config
from gesso.config import RunConfig
from gesso.config.base import halflife_of
from gesso.errors import UsageError

OVERRIDABLE_SETTINGS = ("sample.", "eval.")
UNCONSTRAINED_SETTINGS = (
    "eval.weights_dir", "eval.dinov2", "eval.clip", "eval.rank_timeout_s", "eval.reference", "eval.prompts", "eval.seed",
    "eval.metrics", "eval.nimg", "sample.batch_size", "sample.sigma_rel", "sample.halflife", "sample.guide_run", "sample.guide_sigma_rel",
    "sample.rampup", "sample.precision",
)  # fmt: skip
"""settings that a protocol leaves to the run or the machine"""


def adm(run: RunConfig) -> list[str]:
    """Dhariwal and Nichol 2021: 50k samples of random classes, 250 ancestral steps, beside the training set; precision and
    recall of all samples beside 10k of the reference. Variance of the steps: learned where the network estimates it. Samples
    in pixels are truncated to 8 bits, as its script does."""
    return [
        "eval.metrics=fid,is,pr",
        "eval.labels=random",
        "eval.resize=adm",
        *ancestral_settings(run, 250),
        "sample.to_uint8=truncate",
    ]


def dit(run: RunConfig) -> list[str]:
    """Peebles and Xie 2023: as adm, by its evaluator, with guidance 1.5, which its code applies to 3 of the 4 channels; pixels are
    rounded."""
    guidance = ["sample.guidance=1.5", "sample.guidance_base_resolution=null", *_guide_three_channels(run)]
    return [*adm(run), "sample.to_uint8=round", *guidance]


def mdt(run: RunConfig) -> list[str]:
    """Gao et al. 2023: as dit, with power-cosine guidance of strength 3.8 and power 4, the defaults of its sampling script, which
    truncates pixels as ADM's."""
    power = ["sample.guidance_schedule=power_cosine", "sample.guidance_power=4"]
    return [
        *adm(run),
        "sample.guidance=3.8",
        "sample.guidance_base_resolution=null",
        *power,
        *_guide_three_channels(run),
    ]


def edm2(run: RunConfig) -> list[str]:
    """Karras et al. 2024, D.4 and A.5: 50k samples of random classes beside the whole training set; FID the least of three, the
    distance in DINOv2's features once; 32 steps of Heun, 63 evaluations (guided ones count once). Its detector is NVIDIA's."""
    return [
        "eval.metrics=fid,fd_dinov2", "eval.inception=nvidia", "eval.labels=random", "eval.num_repeats=3", "eval.repeated=fid",
        "eval.resize=adm",
        "sample.sampler=heun", "sample.steps=32", "sample.S_churn=0",
    ]  # fmt: skip


def berrada(run: RunConfig) -> list[str]:
    """Berrada et al. 2024, Section 3.1, Appendix C: 50k samples, 250 steps of DDIM, beside the full training set; guidance
    1.5 at 256, 2.0 at 512 by the scale law. Classes in turn: our choice."""
    return ["eval.metrics=fid", *add_traditional_ema(run), *ddim_settings(250), *BERRADA_GUIDANCE]


def berrada_val(run: RunConfig) -> list[str]:
    """Figures 8 and A2: as berrada, in 50 steps, beside the validation set, which eval.reference names."""
    return [
        "eval.metrics=fid",
        *add_traditional_ema(run),
        *ddim_settings(50),
        *BERRADA_GUIDANCE,
        *_require_reference(run, "the validation set"),
    ]


def berrada_in22k(run: RunConfig) -> list[str]:
    """Appendix C: 50k samples beside 200k training images. Which ones the paper does not say: the user's eval.reference."""
    return [
        "eval.metrics=fid",
        *add_traditional_ema(run),
        *ddim_settings(250),
        *BERRADA_GUIDANCE,
        *_require_reference(run, "200k training images"),
    ]


def berrada_coco(run: RunConfig) -> list[str]:
    """Section 3.1: Frechet distance and CLIPScore beside COCO's validation set of 2014, 40,504 pictures with a caption
    each, which eval.reference names; a sample for each; 25 steps, guidance 5."""
    return ["eval.metrics=fid,clip", *add_traditional_ema(run), *_coco_settings(run)]


def berrada_lpips(run: RunConfig) -> list[str]:
    """Section 3.1: conditional diversity, 10k prompts, samples of one seed and noise told five sizes (Table 2a). Sampler and
    guidance as for the Frechet distance: our choice."""
    return ["eval.metrics=lpips", *ddim_settings(250), *BERRADA_GUIDANCE]


def sd3(run: RunConfig) -> list[str]:
    """Esser et al. 2024, Section 5.1: CLIPScore, and the Frechet distance in CLIP ViT-L/14's features of images, beside COCO's
    validation set of 2014, which eval.reference names; 25 steps, guidance 5. Embeddings as they are, not of length 1, and
    a sample for each of its 40,504 pictures, by one caption: our choice."""
    grid = ["sample.schedule=sd3"] if run.process.name == "rf" else []  # its published levels
    return ["eval.metrics=fd_clip,clip", *_coco_settings(run), *grid]


def _coco_settings(run: RunConfig) -> list[str]:
    where = _require_reference(run, "COCO's validation pictures with captions")
    if run.eval.prompts is None:
        where.append(f"eval.prompts={run.eval.reference}")
    return [
        f"eval.num_samples={COCO_NUM_IMAGES}",
        *ddim_settings(25),
        "sample.guidance=5",
        "sample.guidance_base_resolution=null",
        *where,
    ]


def add_traditional_ema(run: RunConfig) -> list[str]:
    """Return the setting that measures the average of decay .9999 too, unless the run is sampled with a traditional one."""
    return [] if run.sample.halflife else [f"eval.halflives=[{halflife_of(0.9999, run.train.batch_size)}]"]


def ddim_settings(steps: int) -> list[str]:
    return ["sample.sampler=euler", f"sample.steps={steps}", "sample.eta=0"]


COCO_NUM_IMAGES = 40_504
"""pictures of COCO's validation set of 2014"""


def ancestral_settings(run: RunConfig, steps: int) -> list[str]:
    """DDPM's steps at the indices that ADM's code takes, with the variance that the network has learned, or the posterior's; pixels
    clipped, as there."""
    learned = "learned" if getattr(run.net, "learned_variance", False) else "small"
    clip = "false" if run.latent.vae else "true"
    grid = ["sample.schedule=respaced"] if run.process.name == "vp" else []
    return [*ddim_settings(steps), "sample.eta=1", f"sample.variance={learned}", f"sample.clip={clip}", *grid]


def _guide_three_channels(run: RunConfig) -> list[str]:
    return ["sample.guided_channels=3"] if run.x0_channels > 3 else []


DEFAULT_SAMPLE_SETTINGS = [
    "sample.schedule=null", "sample.final_level=zero", "sample.eta=0", "sample.variance=small", "sample.S_churn=0", "sample.guidance_interval=null",
    "sample.guidance_schedule=constant", "sample.guided_channels=null", "sample.clip=false", "sample.multistep=log_snr",
]  # fmt: skip
"""laid over a run before a protocol's own settings: what a run samples otherwise is no part of the protocol"""
BERRADA_GUIDANCE = ["sample.guidance=1.5", "sample.guidance_base_resolution=256"]
PROTOCOLS: dict[str, Callable[[RunConfig], list[str]]] = {
    "adm": adm, "dit": dit, "mdt": mdt, "edm2": edm2, "berrada": berrada, "berrada-val": berrada_val,
    "sd3": sd3, "berrada-in22k": berrada_in22k, "berrada-coco": berrada_coco, "berrada-lpips": berrada_lpips,
}  # fmt: skip


def _require_reference(run: RunConfig, description: str) -> list[str]:
    if run.eval.reference is None:
        raise UsageError(f"this protocol compares with {description}: name them by eval.reference=DIR")
    return []


def protocol_settings(name: str, run: RunConfig) -> list[str]:
    """What the protocol `name` lays over a run. Raises UsageError for one that there is not, or that needs to be told more."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol {name!r}; {config.suggest(name, list(PROTOCOLS))}")
    return [f"eval.protocol={name}", "eval.num_samples=50000", *DEFAULT_SAMPLE_SETTINGS, *PROTOCOLS[name](run)]


def apply_protocol(folder: Path, name: str | None, overrides: list[str]) -> RunConfig:
    """The run of a folder as it is to be measured: by the protocol `name`, and as the user said otherwise.

    What departs from the protocol is recorded as such in eval.protocol. Raises UsageError for a protocol that there is not,
    or that needs to be told more.
    """
    run = config.load_with_overrides(folder, overrides, OVERRIDABLE_SETTINGS)
    if name is None:
        return run
    own = protocol_settings(name, run)
    exact = config.load_with_overrides(
        folder, [*own, f"eval.reference={run.eval.reference or 'null'}"], OVERRIDABLE_SETTINGS
    )
    run = config.load_with_overrides(folder, [*own, *overrides], OVERRIDABLE_SETTINGS)
    other = sorted({path for path, _, _ in config.differences(exact, run) if path not in UNCONSTRAINED_SETTINGS})
    return (
        run
        if not other
        else config.load_with_overrides(
            folder, [*own, *overrides, f"eval.protocol={name}, but {' '.join(other)}"], OVERRIDABLE_SETTINGS
        )
    )
