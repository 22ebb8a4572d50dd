"""Evaluation protocols, named after the papers that used them: settings for `gesso evaluate RUN --protocol NAME`.

What a paper does not state is our choice, and docstrings say so. Every protocol uses the run's EMA length. Berrada et
al. use an EMA without stating which: their distances are computed at two, the run's length (0.10 of the training) and
the decay of 0.9999 per step of the code that they build on. Decoded latents become 8-bit pixels by the convention of
the VAE (data/encoders/vae.py).
"""

from collections.abc import Callable
from pathlib import Path

from gesso import config
from gesso.config import RunConfig
from gesso.config.base import halflife_of
from gesso.errors import UsageError

OVERRIDABLE_SETTINGS = ("sample.", "eval.", "data.source")
UNCONSTRAINED_SETTINGS = (
    "eval.weights_dir", "eval.dinov2", "eval.clip", "eval.rank_timeout_s", "eval.reference", "eval.prompts",
    "eval.seed", "eval.metrics", "eval.nimg", "sample.batch_size", "sample.sigma_rel", "sample.halflife",
    "sample.guide_run", "sample.guide_sigma_rel", "sample.rampup", "sample.precision", "data.source",
)  # fmt: skip
"""Settings that a protocol leaves to the run or the machine."""


def adm(run: RunConfig) -> list[str]:
    """Return the protocol of Dhariwal and Nichol 2021.

    50k samples of random classes in 250 ancestral steps, compared with the training set; precision and recall compare
    all samples with 10k of the reference. The variance of the steps is learned if the network estimates it. Samples in
    pixel space are truncated to 8 bits, as in its script.
    """
    return [
        "eval.metrics=fid,is,pr",
        "eval.labels=random",
        "eval.resize=adm",
        *ancestral_settings(run, 250),
        "sample.to_uint8=truncate",
    ]


def dit(run: RunConfig) -> list[str]:
    """Return the protocol of Peebles and Xie 2023.

    As adm, whose evaluator it uses, with guidance 1.5 on 3 of the 4 channels as in its code; pixels are rounded.
    """
    guidance = ["sample.guidance=1.5", "sample.guidance_base_resolution=null", *_guide_three_channels(run)]
    return [*adm(run), "sample.to_uint8=round", *guidance]


def mdt(run: RunConfig) -> list[str]:
    """Return the protocol of Gao et al. 2023.

    As dit, with power-cosine guidance of scale 3.8 and power 4, the defaults of its sampling script, which truncates
    pixels as ADM.
    """
    power = ["sample.guidance_schedule=power_cosine", "sample.guidance_power=4"]
    return [
        *adm(run),
        "sample.guidance=3.8",
        "sample.guidance_base_resolution=null",
        *power,
        *_guide_three_channels(run),
    ]


def edm2(run: RunConfig) -> list[str]:
    """Return the protocol of Karras et al. 2024, D.4 and A.5.

    50k samples of random classes, compared with the full training set: FID is the best of three, FD-DINOv2 is computed
    once. 32 steps of Heun are 63 evaluations (a guided one counts once). The Inception network is NVIDIA's.
    """
    return [
        "eval.metrics=fid,fd_dinov2", "eval.inception=nvidia", "eval.labels=random", "eval.num_repeats=3",
        "eval.repeated=fid", "eval.resize=adm",
        "sample.sampler=heun", "sample.steps=32", "sample.S_churn=0",
    ]  # fmt: skip


def berrada(run: RunConfig) -> list[str]:
    """Return the protocol of Berrada et al. 2024, Section 3.1 and Appendix C.

    50k samples in 250 steps of DDIM, compared with the full training set; guidance 1.5 at 256 pixels, 2.0 at 512 by the
    scale law. Labels cycle through the classes: our choice.
    """
    return ["eval.metrics=fid", *add_traditional_ema(run), *ddim_settings(250), *BERRADA_GUIDANCE]


def berrada_val(run: RunConfig) -> list[str]:
    """Return the protocol of Figures 8 and A2: as berrada in 50 steps, with the validation set as eval.reference."""
    return [
        "eval.metrics=fid",
        *add_traditional_ema(run),
        *ddim_settings(50),
        *BERRADA_GUIDANCE,
        *_require_reference(run, "the validation set"),
    ]


def berrada_in22k(run: RunConfig) -> list[str]:
    """Return the protocol of Appendix C for ImageNet-22k: 50k samples compared with 200k training images.

    The paper does not state which images: eval.reference names them.
    """
    return [
        "eval.metrics=fid",
        *add_traditional_ema(run),
        *ddim_settings(250),
        *BERRADA_GUIDANCE,
        *_require_reference(run, "200k training images"),
    ]


def berrada_coco(run: RunConfig) -> list[str]:
    """Return the protocol of Section 3.1 for COCO: FID and CLIPScore in 25 steps with guidance 5.

    eval.reference names COCO's validation set of 2014, 40,504 images with captions; there is one sample for each.
    """
    return ["eval.metrics=fid,clip", *add_traditional_ema(run), *_coco_settings(run)]


def berrada_lpips(run: RunConfig) -> list[str]:
    """Return the protocol of Section 3.1 and Table 2a for conditional diversity: 10k prompts, five sizes each.

    Sampler and guidance as for FID: our choice.
    """
    return ["eval.metrics=lpips", *ddim_settings(250), *BERRADA_GUIDANCE]


def sd3(run: RunConfig) -> list[str]:
    """Return the protocol of Esser et al. 2024, Section 5.1.

    CLIPScore, and the Frechet distance of CLIP ViT-L/14's image features, in 25 steps with guidance 5. eval.reference
    names COCO's validation set of 2014. Embeddings that are not normalized, and one sample for each of its 40,504
    images by one caption: our choice.
    """
    grid = ["sample.schedule=sd3"] if run.process.name == "rf" else []  # its published levels
    return ["eval.metrics=fd_clip,clip", *_coco_settings(run), *grid]


def _coco_settings(run: RunConfig) -> list[str]:
    prompts = _require_reference(run, "COCO's validation images with captions")
    if run.eval.prompts is None:
        prompts.append(f"eval.prompts={run.eval.reference}")
    return [
        f"eval.num_samples={COCO_NUM_IMAGES}",
        *ddim_settings(25),
        "sample.guidance=5",
        "sample.guidance_base_resolution=null",
        *prompts,
    ]


def add_traditional_ema(run: RunConfig) -> list[str]:
    """Return the setting that also evaluates the EMA of decay 0.9999, unless the run samples with a traditional EMA."""
    return [] if run.sample.halflife else [f"eval.halflives=[{halflife_of(0.9999, run.train.batch_size)}]"]


def ddim_settings(steps: int) -> list[str]:
    """Return the settings of DDIM."""
    return ["sample.sampler=euler", f"sample.steps={steps}", "sample.eta=0"]


COCO_NUM_IMAGES = 40_504
"""Number of images in COCO's validation set of 2014."""


def ancestral_settings(run: RunConfig, steps: int) -> list[str]:
    """Return the settings of DDPM's steps at the indices of ADM's code.

    The variance is the learned one of the network or the posterior's; estimates of pixels are clipped.
    """
    learned = "learned" if getattr(run.net, "learned_variance", False) else "small"
    clip = "false" if run.latent.vae else "true"
    grid = ["sample.schedule=respaced"] if run.process.name == "vp" else []
    return [*ddim_settings(steps), "sample.eta=1", f"sample.variance={learned}", f"sample.clip={clip}", *grid]


def _guide_three_channels(run: RunConfig) -> list[str]:
    return ["sample.guided_channels=3"] if run.x0_channels > 3 else []


DEFAULT_SAMPLE_SETTINGS = [
    "sample.schedule=null", "sample.final_level=zero", "sample.eta=0", "sample.variance=small", "sample.S_churn=0",
    "sample.guidance_interval=null", "sample.guidance_schedule=constant", "sample.guided_channels=null",
    "sample.clip=false", "sample.multistep=log_snr",
]  # fmt: skip
"""Settings of every protocol before its own: the sampling settings of a run are no part of a protocol."""
BERRADA_GUIDANCE = ["sample.guidance=1.5", "sample.guidance_base_resolution=256"]
PROTOCOLS: dict[str, Callable[[RunConfig], list[str]]] = {
    "adm": adm, "dit": dit, "mdt": mdt, "edm2": edm2, "berrada": berrada, "berrada-val": berrada_val,
    "sd3": sd3, "berrada-in22k": berrada_in22k, "berrada-coco": berrada_coco, "berrada-lpips": berrada_lpips,
}  # fmt: skip


def _require_reference(run: RunConfig, description: str) -> list[str]:
    """Raise UsageError if eval.reference is not set; returns no settings."""
    if run.eval.reference is None:
        raise UsageError(f"this protocol compares samples with {description}: set eval.reference=DIR")
    return []


def protocol_settings(name: str, run: RunConfig) -> list[str]:
    """Return the settings of a protocol for a run. Raises UsageError if it does not exist or needs another setting."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol {name!r}; {config.suggest(name, list(PROTOCOLS))}")
    return [f"eval.protocol={name}", "eval.num_samples=50000", *DEFAULT_SAMPLE_SETTINGS, *PROTOCOLS[name](run)]


def apply_protocol(folder: Path, name: str | None, overrides: list[str]) -> RunConfig:
    """Return the run of a folder with the settings of a protocol and the user's overrides.

    eval.protocol records the protocol and the settings that differ from it.

    Raises:
        UsageError: The protocol does not exist, or needs another setting.
    """
    run = config.load_with_overrides(folder, overrides, OVERRIDABLE_SETTINGS)
    if name is None:
        return run
    settings = protocol_settings(name, run)
    reference = f"eval.reference={run.eval.reference or 'null'}"
    exact = config.load_with_overrides(folder, [*settings, reference], OVERRIDABLE_SETTINGS)
    run = config.load_with_overrides(folder, [*settings, *overrides], OVERRIDABLE_SETTINGS)
    changed = sorted({path for path, _, _ in config.differences(exact, run) if path not in UNCONSTRAINED_SETTINGS})
    if not changed:
        return run
    label = f"eval.protocol={name}, but {' '.join(changed)}"
    return config.load_with_overrides(folder, [*settings, *overrides, label], OVERRIDABLE_SETTINGS)
