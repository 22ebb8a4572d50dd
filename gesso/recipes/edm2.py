r"""Recipes of EDM2's published networks and of CONFIGS A to G (Karras et al. 2024, Tables 1, 2, 3, 6).

Values come from Table 6 and the text of the paper; values that are only in its figures, or not published, are marked
"our choice". Training is as in Appendix D.2: matrix products in FP16, a constant loss scale, nonfinite gradients set to
0, the loss summed over channels and pixels, snapshots stored in FP16 (C.5). Sampling uses FP16, as in Table 6. The loss
scale of each CONFIG is in the boxes of Figures 16 to 22, which the paper's text lacks: the recipes use the published
code's default, 1, and for CONFIG A, whose hyperparameters are those of EDM's ImageNet-64 (B.1), that run's 100. On a
CPU, where FP16 is slow, or a device without FP16, use

    gesso train edm2-img64-s train.precision=full sample.precision=full

and for CONFIG A also train.loss_scale=1. The paper's runs took 32 A100 GPUs.

Recipes img512 and ladder train on 64x64x4 latents of ImageNet at 512x512, cached once with

    gesso cache /path/to/imagenet caches/imagenet-512 --resolution 512 --vae stabilityai/sd-vae-ft-mse \
        --convention edm2 --dtype float32 --resize adm
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gesso.config import (
    DataConfig,
    Dropout,
    EDM2Config,
    EDM2LadderConfig,
    EDMConfig,
    EmaConfig,
    LatentConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    SemanticConfig,
    TrainConfig,
)
from gesso.published import edm2 as published
from gesso.published import read_paper, read_table
from gesso.published.edm2 import MI_IMAGES, BestResult, Cost, TrainingPreset

BATCH_SIZE = 2048
# XXS and the XS of ImageNet-64 are presets of the published code: channels, lr and its decay from there; the rest is
# our choice, as for the next larger size.
PRESETS_512 = {"XXS": TrainingPreset(64, 2048 * MI_IMAGES, 0.0, 0.0170, 70_000, 0.135), **published.PRESETS_512}
PRESETS_64 = {"XS": TrainingPreset(128, 1024 * MI_IMAGES, 0.0, 0.0120, 35_000, 0.075), **published.PRESETS_64}


def imagenet64_pixels() -> dict[str, Any]:
    """Return the data settings of ImageNet at 64x64: no flips, ADM's resizing (D.3), pixels scaled to [-1, 1]."""
    pixels = dict(mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))  # x0 = pixel / 127.5 - 1, with sigma_data = .5
    return dict(data=DataConfig(source="", resolution=64, channels=3, flip=False, resize="adm", **pixels))


def imagenet512_latents() -> dict[str, Any]:
    """Return the data settings of 64x64x4 latents of ImageNet at 512x512, with the VAE of the published code."""
    vae = LatentConfig(vae="stabilityai/sd-vae-ft-mse", convention="edm2", channels=4, downsample_factor=8)
    return dict(data=DataConfig(source="", resolution=512, channels=3, flip=False, resize="adm"), latent=vae)


def adam(lr: float, **changes: Any) -> OptimConfig:
    """Return Adam without weight decay, with the 10M-image warm-up of the published code (not in the paper)."""
    defaults = dict(lr=lr, betas=(0.9, 0.99), eps=1e-8, warmup_images=10_000_000, base_batch_size=BATCH_SIZE)
    return OptimConfig(**defaults | changes)


def train_settings(images: int, batch: int = BATCH_SIZE, loss_scale: float = 1.0) -> TrainConfig:
    """Return snapshots every 8M images (Appendix C) and FP16 (D.2); checkpoint and log intervals are our choice."""
    return TrainConfig(
        total_images=images,
        batch_size=batch,
        snapshot_every=8 * MI_IMAGES,
        checkpoint_every=8 * MI_IMAGES,
        log_every=MI_IMAGES // 8,
        precision="float16",
        loss_scale=loss_scale,
        on_nonfinite="zero",
    )


def ema(**lengths: Any) -> EmaConfig:
    """Return two power profiles, or the given lengths, stored in 16 bits (Appendix C)."""
    return EmaConfig(**{"sigma_rels": (0.05, 0.10)} | lengths, snapshot_dtype="float16")


def run_from_preset(name: str, preset: TrainingPreset, data: dict[str, Any], process: EDMConfig) -> RunConfig:
    """Return a run with the settings of a preset, data settings and a process."""
    return RunConfig(
        recipe=name,
        **data,
        net=EDM2Config(channels=preset.channels, dropout=preset.dropout),
        process=process,
        dropout=Dropout(both=0, control=0),  # guidance uses a separate unconditional network
        loss=LossConfig(weighting="uncertainty", reduction="sum"),
        optim=adam(preset.lr, schedule="inverse_sqrt", ref_images=preset.t_ref * BATCH_SIZE),
        train=train_settings(preset.total_images),
        ema=ema(),
        sample=SampleConfig(sampler="heun", steps=32, guidance=1, sigma_rel=preset.sigma_rel, precision="float16"),
    )


def img64(size: str) -> RunConfig:
    """Train EDM2 on ImageNet at 64x64 pixels; size is XS, S, M, L or XL."""
    return run_from_preset(
        f"edm2-img64-{size.lower()}", PRESETS_64[size], imagenet64_pixels(), EDMConfig(P_mean=-0.8, P_std=1.6)
    )


def img512(size: str) -> RunConfig:
    """Train EDM2 on 64x64x4 latents of ImageNet-512; size is XXS, XS, S, M, L, XL or XXL."""
    return run_from_preset(
        f"edm2-img512-{size.lower()}", PRESETS_512[size], imagenet512_latents(), EDMConfig(P_mean=-0.4, P_std=1.0)
    )


def img512_unconditional(size: str) -> RunConfig:
    """Train a network without labels, which guides XXL in Table 4, and as XS all sizes in Table 2.

    Its training is not published; it is that of the network of the same size with labels (our choice).
    """
    run = run_from_preset(
        f"edm2-img512-{size.lower()}-uncond",
        PRESETS_512[size],
        imagenet512_latents(),
        EDMConfig(P_mean=-0.4, P_std=1.0),
    )
    return run.model_copy(update={"semantic": SemanticConfig(kind="none")})


class LadderConfig(NamedTuple):
    """Training settings of a CONFIG, its FID and cost (Table 1), and the EMA length for sampling."""

    fid: float
    cost: Cost
    sigma_rel: float
    batch_size: int
    lr: float
    beta2: float
    t_ref: int | None
    dropout: float
    loss_scale: float


# EMA lengths of C to F are in Figure 5a, which the paper's text lacks: 0.10 is our choice, to be replaced by the best
# of a sweep. A samples its traditional EMA, of relative length 0.034 at the end (B.1).
CONFIG_A_HALFLIFE: int = read_paper("edm2")["config_a_halflife"]
RAMPUP: float = read_paper("edm2")["config_a_rampup"]
LADDER_CONFIGS = {
    config: LadderConfig(
        fid=row["FID"],
        cost=Cost(row["Mparams"], row["Gflops"]),
        sigma_rel=row.get("sigma_rel", 0.10),
        batch_size=int(row["batch_size"]),
        lr=row["lr"],
        beta2=row["beta2"],
        t_ref=int(row["t_ref"]) if "t_ref" in row else None,
        dropout=row["dropout"],
        loss_scale=100 if config == "A" else 1,
    )
    for config, row in read_table("edm2", "table_1").items()
}


def ladder(config: str) -> RunConfig:
    """Train CONFIG A to G of Table 1 at 192 channels; each adds one change to the one before.

    Training takes 2^31 images. CONFIG A samples its traditional EMA; it also tracks power profiles of 0.034 (the
    relative length of that EMA at the end) and 0.05 (our choice), so that other lengths can be sampled with
    sample.halflife=null sample.sigma_rel=0.1. The warm-up of A to F is that of G (our choice). Noise levels are for
    latents; for pixels Table 6 has process.P_mean=-0.8, process.P_std=1.6.
    """
    cfg, is_a = LADDER_CONFIGS[config], config == "A"
    decay = {"schedule": "inverse_sqrt", "ref_images": cfg.t_ref * cfg.batch_size} if cfg.t_ref else {}
    return RunConfig(
        recipe=f"edm2-ladder-{config.lower()}",
        **imagenet512_latents(),
        net=EDM2LadderConfig(config=config, attention_levels=(1, 2, 3) if is_a else (2, 3), dropout=cfg.dropout),
        process=EDMConfig(P_mean=-1.2, P_std=1.2) if is_a else EDMConfig(P_mean=-0.4, P_std=1.0),
        dropout=Dropout(both=0, control=0),
        loss=LossConfig(weighting="native" if is_a else "uncertainty", reduction="sum"),
        optim=adam(cfg.lr, betas=(0.9, cfg.beta2), base_batch_size=cfg.batch_size, **decay),
        train=train_settings(2048 * MI_IMAGES, cfg.batch_size, cfg.loss_scale),
        ema=ema(sigma_rels=(cfg.sigma_rel, 0.05), halflives=(CONFIG_A_HALFLIFE,), rampup=RAMPUP) if is_a else ema(),
        sample=SampleConfig(
            sampler="heun",
            steps=32,
            guidance=1,
            sigma_rel=cfg.sigma_rel,
            halflife=CONFIG_A_HALFLIFE if is_a else None,
            rampup=RAMPUP if is_a else None,
            precision="float16",
        ),
    )


def document(
    recipe: Callable[[str], RunConfig], key: str, name: str, summary: str, result: str
) -> dict[str, Callable[[], RunConfig]]:
    """Return {name: recipe} for a size or configuration `key`, with summary, command and result as docstring."""
    documented = partial(recipe, key)
    source = "/path/to/imagenet" if recipe is img64 else "caches/imagenet-512"
    documented.__doc__ = f"{summary}.\n\n    gesso train {name} data.source={source}    {result}\n"
    return {name: documented}


def guided_command(name: str, best: BestResult, metric: str) -> str:
    """Return the command that samples a guided result of Table 6."""
    return (
        f"    gesso sample runs/{name} sample.guide_run=runs/edm2-img512-xs-uncond sample.guidance={best.guidance} "
        f"sample.sigma_rel={best.sigma_rel} sample.guide_sigma_rel={best.sigma_rel}    {metric} {best.distance}\n"
    )


PIXELS_TITLE, LATENTS_TITLE = "ImageNet at 64x64 pixels", "ImageNet-512's latents"
UNPUBLISHED = "cost and FID are not published"

RECIPES: dict[str, Callable[[], RunConfig]] = {}
for size, p in PRESETS_64.items():
    cost = (
        f"{p.days} days on 32 A100; FID {published.FID_64[size].distance} (Table 6)"
        if size in published.FID_64
        else UNPUBLISHED
    )
    RECIPES |= document(img64, size, f"edm2-img64-{size.lower()}", f"Train EDM2-{size} on {PIXELS_TITLE}", cost)
for size, p in PRESETS_512.items():
    name, cost = f"edm2-img512-{size.lower()}", UNPUBLISHED
    if size in published.FID_512:
        cost = f"{p.days} days on 32 A100; FID {published.FID_512[size][0].distance} (Table 6)\n"
        cost += (
            guided_command(name, published.FID_512[size][1], "FID")
            + guided_command(name, published.DINO_512[size][1], "FD_DINOv2").rstrip()
        )
    RECIPES |= document(img512, size, name, f"Train EDM2-{size} on {LATENTS_TITLE}", cost)
for size in published.TABLE_4:
    name = f"edm2-img512-{size.lower()}-uncond"
    fid = published.TABLE_4[size].best.distance
    days = f"about {PRESETS_512[size].days} days on 32 A100; guides EDM2-XXL to FID {fid:.2f} (Table 4)"
    summary = f"Train EDM2-{size} without labels on {LATENTS_TITLE}"
    RECIPES |= document(img512_unconditional, size, name, summary, days)
for size, cfg in LADDER_CONFIGS.items():
    name, summary = f"edm2-ladder-{size.lower()}", f"Train CONFIG {size} of EDM2 on {LATENTS_TITLE}"
    RECIPES |= document(ladder, size, name, summary, f"FID {cfg.fid:.2f} (Table 1)")
