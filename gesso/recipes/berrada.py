"""Recipes of Table A4 of Berrada et al. 2024: SD-XL, SD3 and the paper's model, one function per column.

Implementation of each row:
  schedule, forward process, target, loss scaling, timestep sampling   config/process.py, diffusion/process.py
  guidance mechanism                                                   diffusion/guidance.py
  gamma_c(t), control conditioning                                     models/embeddings.py
  text token padding                                                   conditioning.py
  noise schedule resampling                                            process.resolution_scale
  positional embedding                                                 net.pos_embed, models/embeddings.py
  guidance scale at another resolution                                 sample.guidance_base_resolution
  optimizer                                                            config/train.py

Deviations from the table: it pairs SD3's x = t x0 + (1-t) eps with v = eps - x0, which have opposite signs; here t is
the noise level, x = (1-t) x0 + t eps. Its resampling formula needs the denominator s' + (s - s') t. Its optimizer row
"Schedule" repeats the betas of the noise. "Low res. pretrain. crop scale" is data.crop_scale, also of the cache.

The paper does not say how often training drops conditions. Here (config/conditioning.py, Dropout) all conditions are
dropped in 10 % of the samples and control variables alone in 5 %, the two branches that Eq. 2 evaluates; column SD-XL,
whose guidance keeps the control variables, also drops the text alone in 5 %.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from gesso.config import (
    ControlConfig,
    DataConfig,
    DiTAttConfig,
    DiTConfig,
    Dropout,
    EmaConfig,
    LatentConfig,
    MMDiTConfig,
    MMDiTppConfig,
    OptimConfig,
    RFConfig,
    RunConfig,
    SampleConfig,
    SemanticConfig,
    TrainConfig,
    UNetConfig,
    VPConfig,
    mmditpp_config,
)
from gesso.config.base import halflife_of
from gesso.published import read_table
from gesso.recipes.data_requirements import data_requirement, images
from gesso.recipes.digits import digits

DDIM_SETTINGS = dict(sampler="euler", steps=50)


def sdxl() -> dict[str, Any]:
    """Return column SD-XL: U-Net, cross-attention, Adam, size and crop as joint control that guidance keeps."""
    return dict(
        process=VPConfig(),
        semantic=SemanticConfig(kind="text", padding="zero"),
        control=ControlConfig(variables=("crop", "size"), mlp="joint", schedule="uniform"),
        dropout=Dropout(semantic=0.05),  # trains (control, none), which keep_control evaluates
        optim=OptimConfig(name="adam", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        sample=SampleConfig(**DDIM_SETTINGS, guidance=1.5, keep_control=True),
    )


def sd3() -> dict[str, Any]:
    """Return column SD3: mmDiT, rectified flow with logit-normal noise levels (m = 0, s = 1), AdamW, no control.

    The paper does not name the sampling levels; they are those of SD3's code.
    """
    return dict(
        process=RFConfig(logit_mean=0.0, logit_std=1.0),
        semantic=SemanticConfig(kind="text", padding="zero"),
        optim=OptimConfig(
            name="adamw", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0
        ),  # weight decay is N/A in the table
        sample=SampleConfig(**DDIM_SETTINGS, schedule="sd3", guidance=1.5),
    )


def berrada_best() -> dict[str, Any]:
    """Return column Ours: mmDiT++, split control of flip, crop and size with gamma_c, noisy padding, Eq. 2 guidance."""
    return dict(
        process=VPConfig(),
        semantic=SemanticConfig(kind="text", padding="noisy", padding_noise=0.02),
        control=ControlConfig(variables=("flip", "crop", "size"), mlp="split", schedule="cosine", alpha=8.0),
        optim=OptimConfig(name="adamw", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.03),
        sample=SampleConfig(**DDIM_SETTINGS, guidance=1.5, control_guidance=1.375),
    )


def digits_scale_run(
    name: str, column: dict[str, Any], net: UNetConfig | MMDiTConfig | MMDiTppConfig, lr: float
) -> RunConfig:
    """Return a column at the scale of the digits: captions, half of the images at low resolution, 100k images.

    Only size is a control variable: digits are neither mirrored nor cropped, and at this learning rate a variable that
    never changes destroys its embedding (docs/negative-results.md).
    """
    run, control = digits(), column.get("control", ControlConfig())
    varying = tuple(variable for variable in control.variables if variable == "size")
    optim = column["optim"].model_copy(
        update=dict(lr=lr, schedule="inverse_sqrt", ref_images=100_000, warmup_images=2_000)
    )
    sample = column["sample"].model_copy(update=dict(sigma_rel=0.075, guidance_base_resolution=8))
    train = dict(total_images=100_000, snapshot_every=10_000, checkpoint_every=10_000)
    data = DataConfig(source="digits-mixed-resolution", resolution=8, channels=1)
    changes = dict(recipe=name, net=net, data=data, control=control.model_copy(update={"variables": varying}))
    return run.model_copy(
        update=column | changes | dict(optim=optim, sample=sample, train=run.train.model_copy(update=train))
    )


def digits_sdxl() -> RunConfig:
    """Train Table A4's column SD-XL on the digits: U-Net with captions and size.

    gesso train digits-sdxl        1-3 minutes on two CPU cores
    """
    net = UNetConfig(
        channels=32,
        channel_mult=(1, 2),
        transformer_depth=(0, 1),
        num_blocks=1,
        channels_per_head=32,
        norm_num_groups=8,
    )
    return digits_scale_run("digits-sdxl", sdxl(), net, 1e-3)


def digits_sd3() -> RunConfig:
    """Train Table A4's column SD3 on the digits: mmDiT with captions and rectified flow.

    gesso train digits-sd3         1-3 minutes on two CPU cores
    """
    return digits_scale_run(
        "digits-sd3",
        sd3(),
        MMDiTConfig(hidden_size=96, depth=4, num_heads=3, patch_size=2, pos_embed="interpolated"),
        2e-3,
    )


def digits_berrada() -> RunConfig:
    """Train Table A4's column Ours on the digits: mmDiT++ with captions, split control and control guidance.

    gesso train digits-berrada        1-3 minutes on two CPU cores
    """
    return digits_scale_run(
        "digits-berrada", berrada_best(), MMDiTppConfig(hidden_size=96, depth=4, num_heads=3, patch_size=2), 2e-3
    )


SD_VAE = "stabilityai/sd-vae-ft-mse"
"""VAE of DiT; the paper does not name its VAE."""
CLIP_SETTINGS = dict(encoder="openai/clip-vit-large-patch14", max_tokens=77)
TEXT_UNET = UNetConfig(
    channels=320, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), num_heads=8, pooled_mlp="none"
)
"""U-Net with the parameter count of Table A1's text cell, 864 M."""
XL_SHAPE = dict(hidden_size=1152, depth=28, num_heads=16, patch_size=2)
PRETRAIN_CROP_SCALE = {"sdxl": (0.9, 1.0), "sd3": (0.9, 1.0), "berrada": (0.4, 0.6)}
"""Crop scales of training at 256x256 (Table A4). At 512x512 all use 0.9 to 1 (our choice; the paper gives 256 only)."""
GUIDANCE = {256: 1.5, 512: 2.0}
"""Guidance scale of the published FID by resolution (Appendix C)."""
BATCH_SIZE = {256: 2048, 512: 384}
IMAGES_8M = 2**23


def paper_scale_run(
    name: str, resolution: int, steps: int, crop: tuple[float, float], flip: bool, **settings: Any
) -> RunConfig:
    """Return a run on cached latents with the settings of Section 3.1 and Appendix C.

    bfloat16, batch size 2048 at 256x256 and 384 at 512x512, 250 DDIM steps. The learning rate is 1e-4 (in
    settings["optim"]); the paper also gives 10 x 1e-4, at which every run of its Table A2 diverges. Our choice: views
    per image, the resizing filter (data.resize=lanczos), and the intervals of snapshots and checkpoints. The paper does
    not specify its EMA: besides power-function EMAs the run tracks the one of decay 0.9999 per step, that of the code
    that the paper builds on, and protocol berrada evaluates both.

    Args:
        name: name of the recipe.
        resolution: 256 or 512, in pixels.
        steps: number of optimizer steps.
        crop: range of data.crop_scale.
        flip: data.flip.
        settings: the other blocks of RunConfig.
    """
    batch = BATCH_SIZE[resolution]
    sampling = dict(steps=250, guidance=GUIDANCE[resolution], guidance_base_resolution=resolution)
    changes = dict(
        optim=settings["optim"].model_copy(update={"base_batch_size": batch}),
        sample=settings["sample"].model_copy(update=sampling),
    )
    return RunConfig(
        recipe=name,
        **settings | changes,
        data=DataConfig(source="", resolution=resolution, flip=flip, crop_scale=crop),
        latent=LatentConfig(vae=SD_VAE),
        ema=EmaConfig(halflives=(halflife_of(0.9999, batch),)),
        train=TrainConfig(
            total_images=steps * batch,
            batch_size=batch,
            precision="bfloat16",
            snapshot_every=IMAGES_8M if resolution == 256 else IMAGES_8M // 4,
            checkpoint_every=IMAGES_8M if resolution == 256 else IMAGES_8M // 4,
            log_every=batch * 50,
        ),
    )


def cc12m(name: str, resolution: int) -> RunConfig:
    """Return a column of Table A4 on CC12M. At 512x512 noise levels and positions follow the column.

    Steps: 300k to 500k (Section 3.1); here 400k at 256x256 and 100k at 512x512 (our choice). SD3's 600k at 256x256 are
    those of Table 4a, which has the FID 7.54 of Table 1.
    """
    columns: dict[str, tuple[dict[str, Any], UNetConfig | MMDiTConfig | MMDiTppConfig]] = {
        "sdxl": (sdxl(), TEXT_UNET),
        "sd3": (sd3(), MMDiTConfig(**XL_SHAPE, pos_embed="interpolated", pooled_mlp="none")),
        "berrada": (berrada_best(), mmditpp_config("XL/2")),
    }
    column, net = columns[name]
    k = resolution // 256
    process = column["process"] if name == "sdxl" else column["process"].model_copy(update={"resolution_scale": k})
    changes = dict(process=process, net=net, semantic=column["semantic"].model_copy(update=CLIP_SETTINGS))
    crop = PRETRAIN_CROP_SCALE[name] if resolution == 256 else (0.9, 1.0)
    steps = 100_000 if resolution == 512 else 600_000 if name == "sd3" else 400_000
    return paper_scale_run(
        f"cc12m-{resolution}-{name}", resolution, steps, crop, flip=name == "berrada", **column | changes
    )


def init_settings_512(run: RunConfig) -> tuple[str, ...]:
    """Return the settings with which a run at 512x512 starts from one at 256x256, as in the network's own paper."""
    noise = ("init.noise_levels=keep",) if run.process.resolution_scale == 1 else ()
    extrapolated = isinstance(run.net, DiTConfig | DiTAttConfig) and run.net.pos_embed == "extrapolated"
    return (*noise, "init.pos_embed=extrapolated") if extrapolated else noise


def cache_and_train_commands(run: RunConfig, init_recipe: str, result: str) -> str:
    """Return the commands that cache the data and train, for a recipe's docstring.

    Args:
        run: the run of the recipe.
        init_recipe: recipe at 256x256 that a run at 512x512 starts from; empty: random weights.
        result: text on the published result.
    """
    required = data_requirement(run)
    init = " ".join(["", f"init=runs/{init_recipe}", *init_settings_512(run)]) if init_recipe else ""
    train = f"torchrun --nproc-per-node 8 -m gesso train {run.recipe} data.source={{}}{init}"
    encoders = "the VAE and the text encoder" if run.semantic.kind == "text" else "the VAE"
    return (
        f"    {required.command}\n    {train.format(required.folder)}\n\n"
        f"    Without a cache, {encoders} run during training on a new crop per visit; faces are not blurred:\n"
        f"    {train.format(images(run))}\n\n"
        f"    The paper uses 16 A100 GPUs and does not give the time. {result}\n"
    )


def document(
    recipe: Callable[[], RunConfig], summary: str, result: str, init_recipe: str = ""
) -> Callable[[], RunConfig]:
    """Return a recipe with a docstring: summary, commands, published result."""
    documented = partial(recipe)
    documented.__doc__ = f"{summary}\n\n{cache_and_train_commands(recipe(), init_recipe, result)}"
    return documented


def cc12m_numbers(net: str, resolution: int) -> dict[str, float]:
    """Return the numbers of Table 1 on CC12M: FID on the validation set, CLIP score on COCO, at 512x512 FID on COCO."""
    suffix = f", CC12M {resolution}"
    row = read_table("berrada2024", "table_1")[net]
    return {column.removesuffix(suffix): value for column, value in row.items() if column.endswith(suffix)}


def published_result(numbers: dict[str, float]) -> str:
    """Return published numbers as a sentence."""
    if not all(map(math.isfinite, numbers.values())):
        return "Published: the run diverged."
    return "Published: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers.items()) + "."


TABLE_1_ROWS = {"sdxl": "unet", "sd3": "mmdit", "berrada": "berrada"}
"""Row of Table 1 by column of Table A4."""
TITLES = {"sdxl": "SD-XL", "sd3": "SD3", "berrada": "Berrada"}


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits-sdxl": digits_sdxl,
    "digits-sd3": digits_sd3,
    "digits-berrada": digits_berrada,
    **{
        f"cc12m-{size}-{name}": document(
            partial(cc12m, name, size),
            f"Train Table A4's column {TITLES[name]} on CC12M at {size}x{size}.",
            published_result(cc12m_numbers(TABLE_1_ROWS[name], size)),
            init_recipe=f"cc12m-256-{name}" if size == 512 else "",
        )
        for size in (256, 512)
        for name in TITLES
    },
}
