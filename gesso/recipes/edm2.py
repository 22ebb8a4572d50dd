"""EDM2's published networks and the ladder of CONFIGS A to G (Karras et al. 2024, Tables 1, 2, 3, 6).

Sources: "Table 6" and the text of the paper; what only its figures hold, or neither, is marked "our choice".
The training is the paper's (D.2): products in FP16, a constant loss scale, gradients that are NaN or infinite set to 0, the
loss summed over channels and pixels, snapshots stored in FP16 (C.5); samples are drawn in FP16 too, as those of Table 6.
The constant of each CONFIG stands in the boxes of Figures 16 to 22, which the paper's text lacks: ours is the published
code's default, 1, and for CONFIG A, whose hyperparameters are those of EDM's ImageNet-64 (B.1), that run's 100. A device
without FP16, or a processor, where it is slow, is served by

    gesso train edm2-img64-s train.precision=full sample.precision=full

and CONFIG A with train.loss_scale=1 too. The paper's runs took 32 A100 GPUs.

Those named img512 and ladder train on 64x64x4 latents of ImageNet at 512x512, made once by

    gesso cache /path/to/imagenet caches/imagenet-512 --resolution 512 --vae stabilityai/sd-vae-ft-mse --convention edm2 --dtype float32 --resize adm
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gesso.config import EDM, EDM2, Data, Dropout, EDM2Ladder, Ema, Latent, Loss, Optim, Run, Sample, Semantic, Train

M = 2**20  # The durations of Table 6 are whole numbers of 2^20 images: 2147.5M = 2048 * 2^20.
BATCH = 2048


class Best(NamedTuple):
    """A Frechet distance of Table 6 and the sampling that gave it. guidance 1 is none."""

    distance: float
    sigma_rel: float
    guidance: float = 1.0


class Preset(NamedTuple):
    """One column of Table 6, what it trains with; sigma_rel: the EMA length of its unguided FID."""

    channels: int
    images: int
    dropout: float
    lr: float
    t_ref: int
    sigma_rel: float
    days: float | None = None


IMG512 = {
    # XXS is a preset of the published code: width, rate and decay from there; the rest is our choice (as XS).
    "XXS": Preset(64, 2048 * M, 0.0, 0.0170, 70_000, 0.135),
    "XS": Preset(128, 2048 * M, 0.0, 0.0120, 70_000, 0.135, 3.0),
    "S": Preset(192, 2048 * M, 0.0, 0.0100, 70_000, 0.130, 5.3),
    "M": Preset(256, 2048 * M, 0.1, 0.0090, 70_000, 0.100, 7.8),
    "L": Preset(320, 1792 * M, 0.1, 0.0080, 70_000, 0.085, 10.2),
    "XL": Preset(384, 1280 * M, 0.1, 0.0070, 70_000, 0.085, 9.7),
    "XXL": Preset(448, 896 * M, 0.1, 0.0065, 70_000, 0.070, 9.1),
}
IMG64 = {
    # XS is a preset of the published code: width, rate and decay from there; the rest is our choice (as S).
    "XS": Preset(128, 1024 * M, 0.0, 0.0120, 35_000, 0.075),
    "S": Preset(192, 1024 * M, 0.0, 0.0100, 35_000, 0.075, 2.6),
    "M": Preset(256, 2048 * M, 0.1, 0.0090, 35_000, 0.060, 7.8),
    "L": Preset(320, 1024 * M, 0.1, 0.0080, 35_000, 0.040, 5.8),
    "XL": Preset(384, 640 * M, 0.1, 0.0070, 35_000, 0.040, 4.9),
}

# Sampling by metric (Table 6). The unconditional XS guides all sizes, averaged over the same length.
FID_512 = {
    "XS": (Best(3.53, 0.135), Best(2.91, 0.045, 1.4)),
    "S": (Best(2.56, 0.130), Best(2.23, 0.025, 1.4)),
    "M": (Best(2.25, 0.100), Best(2.01, 0.030, 1.2)),
    "L": (Best(2.06, 0.085), Best(1.88, 0.015, 1.2)),
    "XL": (Best(1.96, 0.085), Best(1.85, 0.020, 1.2)),
    "XXL": (Best(1.91, 0.070), Best(1.81, 0.015, 1.2)),
}
DINO_512 = {
    "XS": (Best(103.39, 0.200), Best(79.94, 0.150, 1.7)),
    "S": (Best(68.64, 0.190), Best(52.32, 0.085, 1.9)),
    "M": (Best(58.44, 0.155), Best(41.98, 0.015, 2.0)),
    "L": (Best(52.25, 0.155), Best(38.20, 0.035, 1.7)),
    "XL": (Best(45.96, 0.155), Best(35.67, 0.030, 1.7)),
    "XXL": (Best(42.84, 0.150), Best(33.09, 0.015, 1.7)),
}
FID_64 = {"S": Best(1.58, 0.075), "M": Best(1.43, 0.060), "L": Best(1.33, 0.040), "XL": Best(1.33, 0.040)}
# Table 4, by the size of the network without labels that guides XXL; Gparams and teraflops of both together.
GUIDES = {
    "XS": (Best(1.81, 0.015, 1.2), 1.65, 38.9),
    "S": (Best(1.80, 0.015, 1.2), 1.80, 42.5),
    "M": (Best(1.80, 0.015, 1.2), 2.02, 47.4),
    "L": (Best(1.86, 0.020, 1.2), 2.30, 53.8),
    "XL": (Best(1.82, 0.020, 1.2), 2.64, 61.6),
    "XXL": (Best(1.85, 0.020, 1.2), 3.05, 70.8),
}


class Cost(NamedTuple):
    """Table 6, and Tables 1 to 3 to fewer digits. M parameters; gigaflops (multiply-accumulates) of an evaluation; zettaflops
    of training, three evaluations an image; teraflops of a sample, 63 evaluations and the VAE's decoder, and guided."""

    params: float
    gflops: float
    training: float | None = None
    sampling: float | None = None
    guided: float | None = None


DECODER = 1260.9
"""gigaflops of decoding one image of 512x512 from its latents (Figure 9)"""
COST_512 = {
    "XS": Cost(124.7, 45.5, 0.29, 4.13, 6.99),
    "S": Cost(280.2, 102.2, 0.66, 7.70, 10.57),
    "M": Cost(497.8, 180.8, 1.16, 12.65, 15.52),
    "L": Cost(777.5, 282.2, 1.59, 19.04, 21.91),
    "XL": Cost(1119.3, 405.9, 1.63, 26.83, 29.70),
    "XXL": Cost(1523.2, 552.1, 1.56, 36.04, 38.91),
}
COST_64 = {
    "S": Cost(280.2, 101.9, 0.33, 6.42),
    "M": Cost(497.8, 180.8, 1.16, 11.39),
    "L": Cost(777.5, 282.1, 0.91, 17.77),
    "XL": Cost(1119.3, 405.9, 0.82, 25.57),
}

# Layers of Figure 5b by D.6, whose list has two lines more: enc-8x8-block2-conv0 stands twice, dec-8x8-block0-conv names none.
FIGURE_5B = (
    "enc-64x64-block0-affine", "enc-64x64-block0-conv0", "enc-64x64-block0-conv1", "enc-64x64-conv",
    "enc-32x32-block0-conv0", "enc-32x32-block0-skip", "enc-16x16-block0-affine", "enc-16x16-block0-conv0",
    "enc-16x16-block2-conv0", "enc-8x8-block0-affine", "enc-8x8-block0-skip", "enc-8x8-block1-conv0",
    "enc-8x8-block2-conv0", "dec-8x8-block0-conv0", "dec-8x8-block2-skip", "dec-8x8-in0-affine",
    "dec-16x16-block0-affine", "dec-16x16-block0-conv1", "dec-16x16-block0-skip", "dec-32x32-block0-conv1",
    "dec-32x32-block0-skip", "dec-32x32-up-affine", "dec-64x64-block0-conv1", "dec-64x64-block0-skip",
    "dec-64x64-block3-skip", "dec-64x64-up-affine", "map-label", "map-layer0",
)  # fmt: skip


def pixels() -> dict[str, Any]:
    """ImageNet at 64x64, class folders or a cache. No flips, ADM's resizing: D.3. Pixels become [-1, 1] and are not standardized."""
    pixels = dict(mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))  # x0 = pixel / 127.5 - 1, with sigma_data = .5
    return dict(data=Data(source="", resolution=64, channels=3, flip=False, resize="adm", **pixels))


def latents() -> dict[str, Any]:
    """64x64x4 latents of ImageNet at 512x512, cached. Which VAE: the published code (Stability's, fine-tuned on MSE)."""
    vae = Latent(vae="stabilityai/sd-vae-ft-mse", convention="edm2", channels=4, factor=8)
    return dict(data=Data(source="", resolution=512, channels=3, flip=False, resize="adm"), latent=vae)


def optim(lr: float, **changes: Any) -> Optim:
    """Adam without decay; a 10-million-image warm-up, which the published code has and the paper does not mention."""
    kept = dict(lr=lr, betas=(0.9, 0.99), eps=1e-8, warmup_images=10_000_000, tuned_at_batch=BATCH)
    return Optim(**kept | changes)


def train(images: int, batch: int = BATCH, loss_scale: float = 1.0) -> Train:
    """Snapshots every 8M images (Appendix C); mixed precision of D.2; intervals of states and of the log are our choice."""
    return Train(
        total_images=images,
        batch_size=batch,
        snapshot_images=8 * M,
        state_images=8 * M,
        log_images=M // 8,
        precision="float16",
        loss_scale=loss_scale,
        nonfinite="zero",
    )


def ema(**lengths: Any) -> Ema:
    """Two power profiles, or those given, stored in 16 bits (Appendix C)."""
    return Ema(**{"sigma_rels": (0.05, 0.10)} | lengths, snapshots="float16")


def preset(name: str, p: Preset, data: dict[str, Any], process: EDM) -> Run:
    return Run(
        recipe=name,
        **data,
        net=EDM2(channels=p.channels, dropout=p.dropout),
        process=process,
        dropout=Dropout(both=0, control=0),  # the unconditional network is a separate one
        loss=Loss(weighting="uncertainty", reduction="sum"),
        optim=optim(p.lr, schedule="inverse_sqrt", ref_images=p.t_ref * BATCH),
        train=train(p.images),
        ema=ema(),
        sample=Sample(sampler="heun", steps=32, guidance=1, sigma_rel=p.sigma_rel, precision="float16"),
    )


def img64(size: str) -> Run:
    """EDM2 on ImageNet at 64x64 pixels; size is XS, S, M, L or XL.

    gesso train edm2-img64-s data.source=/path/to/imagenet     2.6 days on 32 A100 (Table 6); FID 1.58
    gesso train edm2-img64-xl data.source=/path/to/imagenet    4.9 days on 32 A100; FID 1.33
    """
    return preset(f"edm2-img64-{size.lower()}", IMG64[size], pixels(), EDM(P_mean=-0.8, P_std=1.6))


def img512(size: str) -> Run:
    """EDM2 on 64x64x4 latents of ImageNet-512; size is XXS, XS, S, M, L, XL or XXL.

    gesso train edm2-img512-s data.source=caches/imagenet-512    5.3 days on 32 A100 (Table 6); FID 2.56
    gesso train edm2-img512-xxl data.source=caches/imagenet-512  9.1 days on 32 A100; FID 1.91
    """
    return preset(f"edm2-img512-{size.lower()}", IMG512[size], latents(), EDM(P_mean=-0.4, P_std=1.0))


def img512_unconditional(size: str) -> Run:
    """A network without labels that guides XXL in Table 4, and as XS all sizes in Table 2. How it was trained is our choice:
    as the one of its size with labels."""
    run = preset(f"edm2-img512-{size.lower()}-uncond", IMG512[size], latents(), EDM(P_mean=-0.4, P_std=1.0))
    return run.model_copy(update={"semantic": Semantic(kind="none")})


class Rung(NamedTuple):
    """What one CONFIG trains with. fid, cost: Table 1. sigma_rel: the EMA length to sample at."""

    fid: float
    cost: Cost
    sigma_rel: float
    batch: int = BATCH
    lr: float = 0.0002
    beta2: float = 0.99
    t_ref: int | None = None
    dropout: float = 0.10
    loss_scale: float = 1.0


# Lengths of C to F are read from Figure 5a in the paper, which its text lacks: .10 is our choice, to be replaced by the
# best of a sweep; the caption has B's. A samples HALFLIFE instead; .034 is its relative length at the end (B.1).
HALFLIFE = 50_000_000  # images, of A's traditional EMA (B.1)
RAMPUP = 0.05  # of that half-life: the default of EDM's framework, in which A is implemented (B.1)
RUNGS = {
    "A": Rung(8.00, Cost(295.9, 110.4), 0.034, batch=4096, lr=0.0001, beta2=0.999, loss_scale=100),
    "B": Rung(7.24, Cost(291.8, 100.4), 0.09),
    "C": Rung(6.96, Cost(277.8, 100.3), 0.10),
    "D": Rung(3.75, Cost(277.8, 101.2), 0.10, lr=0.0100),
    "E": Rung(3.02, Cost(277.8, 101.2), 0.10, lr=0.0100, t_ref=70_000),
    "F": Rung(2.71, Cost(280.2, 102.1), 0.10, lr=0.0100, t_ref=70_000),
    "G": Rung(2.56, COST_512["S"], 0.130, lr=0.0100, t_ref=70_000, dropout=0.0),
}


def ladder(step: str) -> Run:
    """CONFIG A to G of Table 1 at 192 channels: each what the one before was, and one change more.

    gesso train edm2-ladder-a data.source=caches/imagenet-512    32 A100, days not published; FID 8.00
    gesso train edm2-ladder-g data.source=caches/imagenet-512    5.3 days on 32 A100; FID 2.56

    Each sees 2^31 images. A samples its traditional EMA; the power profiles tracked beside it, .034 (its relative
    length at the end) and .05, are our choice, so that other lengths can be had of A too, by sample.halflife=null
    sample.sigma_rel=0.1. Warm-up in A to F, as in G, is our choice. Noise levels are those for latents; for pixels
    Table 6 has process.P_mean=-0.8, process.P_std=1.6.
    """
    rung, is_a = RUNGS[step], step == "A"
    decay = {"schedule": "inverse_sqrt", "ref_images": rung.t_ref * rung.batch} if rung.t_ref else {}
    return Run(
        recipe=f"edm2-ladder-{step.lower()}",
        **latents(),
        net=EDM2Ladder(step=step, attention_levels=(1, 2, 3) if is_a else (2, 3), dropout=rung.dropout),
        process=EDM(P_mean=-1.2, P_std=1.2) if is_a else EDM(P_mean=-0.4, P_std=1.0),
        dropout=Dropout(both=0, control=0),
        loss=Loss(weighting="native" if is_a else "uncertainty", reduction="sum"),
        optim=optim(rung.lr, betas=(0.9, rung.beta2), tuned_at_batch=rung.batch, **decay),
        train=train(2048 * M, rung.batch, rung.loss_scale),
        ema=ema(sigma_rels=(0.034, 0.05), halflives=(HALFLIFE,), rampup=RAMPUP) if is_a else ema(),
        sample=Sample(
            sampler="heun",
            steps=32,
            guidance=1,
            sigma_rel=rung.sigma_rel,
            halflife=HALFLIFE if is_a else None,
            rampup=RAMPUP if is_a else None,
            precision="float16",
        ),
    )


def described(make: Callable[[str], Run], key: str, name: str, what: str, result: str) -> dict[str, Callable[[], Run]]:
    """One size or step as a recipe under `name`, with a docstring of its own."""
    recipe = partial(make, key)
    where = "/path/to/imagenet" if make is img64 else "caches/imagenet-512"
    recipe.__doc__ = f"{what}.\n\n    gesso train {name} data.source={where}    {result}\n"
    return {name: recipe}


def guided(name: str, best: Best, metric: str) -> str:
    """How to sample what Table 6 measured, with guidance."""
    return (
        f"    gesso sample runs/{name} sample.guide=runs/edm2-img512-xs-uncond sample.guidance={best.guidance} "
        f"sample.sigma_rel={best.sigma_rel} sample.guide_sigma_rel={best.sigma_rel}    {metric} {best.distance}\n"
    )


PIXELS, LATENTS = "ImageNet at 64x64 pixels", "ImageNet-512's latents"
UNPUBLISHED = "cost and FID not in the paper"

RECIPES: dict[str, Callable[[], Run]] = {}
for size, p in IMG64.items():
    cost = f"{p.days} days on 32 A100; FID {FID_64[size].distance} (Table 6)" if size in FID_64 else UNPUBLISHED
    RECIPES |= described(img64, size, f"edm2-img64-{size.lower()}", f"EDM2-{size} on {PIXELS}", cost)
for size, p in IMG512.items():
    name, cost = f"edm2-img512-{size.lower()}", UNPUBLISHED
    if size in FID_512:
        cost = f"{p.days} days on 32 A100; FID {FID_512[size][0].distance} (Table 6)\n"
        cost += guided(name, FID_512[size][1], "FID") + guided(name, DINO_512[size][1], "FD of DINOv2").rstrip()
    RECIPES |= described(img512, size, name, f"EDM2-{size} on {LATENTS}", cost)
for size in GUIDES:
    name, what = f"edm2-img512-{size.lower()}-uncond", f"EDM2-{size} without labels on {LATENTS}"
    days = f"about {IMG512[size].days} days on 32 A100; guides EDM2-XXL to FID {GUIDES[size][0].distance:.2f} (Table 4)"
    RECIPES |= described(img512_unconditional, size, name, what, days)
for size, rung in RUNGS.items():
    name, what = f"edm2-ladder-{size.lower()}", f"CONFIG {size} of EDM2 on {LATENTS}"
    RECIPES |= described(ladder, size, name, what, f"FID {rung.fid:.2f} (Table 1)")
