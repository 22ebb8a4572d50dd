"""Table A4 of Berrada et al. 2024: the paradigms of SD-XL, SD3 and the paper, each as one column of settings.

Where each row's formula lives:
  schedule, forward process, target, loss scaling, timestep sampling   config/process.py, diffusion/process.py
  guidance mechanism                                                   diffusion/guidance.py: terms
  gamma_c(t), control conditioning                                     nets/embed.py: gamma_c, ControlEmbed
  text token padding                                                   cond.py: pad
  noise schedule resampling                                            process.scale, diffusion/process.py: rescaled
  positional embedding                                                 net.positions, nets/embed.py: sincos_2d
  guidance scale at another resolution                                 sample.tuned_at, diffusion/guidance.py: scaled
  optimizer                                                            config/run.py: Optim

Table A4 pairs SD3's x = t x0 + (1-t) eps with v = eps - x0, which have opposite signs; here t is noise (x = (1-t) x0
+ t eps). Its resampling formula needs the denominator s' + (s - s') t. Its optimizer's row "Schedule" repeats the betas
of the noise. "Low res. pretrain. crop scale" is data.crop_scale, and that of the cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from gesso.config import (
    RF,
    VP,
    Controls,
    Data,
    Latent,
    MMDiT,
    MMDiTpp,
    Optim,
    Run,
    Sample,
    Semantic,
    Train,
    UNet,
    mmditpp,
)
from gesso.recipes.digits import digits

DDIM = dict(sampler="euler", steps=50)


def sdxl() -> dict[str, Any]:
    """Column SD-XL: U-Net, cross-attention, size and crop as joint control that guidance keeps, Adam."""
    return dict(
        process=VP(),
        semantic=Semantic(kind="text", padding="zero"),
        control=Controls(variables=("crop", "size"), mlp="joint", schedule="uniform"),
        optim=Optim(name="adam", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        sample=Sample(**DDIM, guidance=1.5, keep_control=True),
    )


def sd3() -> dict[str, Any]:
    """Column SD3: mmDiT under rectified flow, logit-normal draw with m = 0 and s = 1, AdamW; no control."""
    return dict(
        process=RF(mean=0.0, std=1.0),
        semantic=Semantic(kind="text", padding="zero"),
        optim=Optim(name="adamw", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),  # weight decay N/A in the table
        sample=Sample(**DDIM, guidance=1.5),
    )


def ours() -> dict[str, Any]:
    """Column Ours: mmDiT++, flip, crop and size by level with gamma_c, noisy replicate padding, Eq. 2's guidance."""
    return dict(
        process=VP(),
        semantic=Semantic(kind="text", padding="noisy", noise=0.02),
        control=Controls(variables=("flip", "crop", "size"), mlp="split", schedule="cosine", alpha=8.0),
        optim=Optim(name="adamw", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.03),
        sample=Sample(**DDIM, guidance=1.5, control_guidance=1.375),
    )


def on_digits(name: str, column: dict[str, Any], net: UNet | MMDiT | MMDiTpp, lr: float) -> Run:
    """A column at the scale of the digits, every second of which lacks detail: words, 100k images, a rate of their own.

    Of the control variables size alone: digits are neither mirrored nor cropped, and at rates such as these a variable
    that never changes kills the embedding (docs/log.md).
    """
    run, control = digits(), column.get("control", Controls())
    varying = tuple(variable for variable in control.variables if variable == "size")
    optim = column["optim"].model_copy(
        update=dict(lr=lr, schedule="inverse_sqrt", ref_images=100_000, warmup_images=2_000)
    )
    sample = column["sample"].model_copy(update=dict(sigma_rel=0.075, tuned_at=8))
    train = dict(total_images=100_000, snapshot_images=10_000, state_images=10_000)
    data = Data(source="digits-coarse", resolution=8, channels=1)
    changes = dict(recipe=name, net=net, data=data, control=control.model_copy(update={"variables": varying}))
    return run.model_copy(
        update=column | changes | dict(optim=optim, sample=sample, train=run.train.model_copy(update=train))
    )


def digits_sdxl() -> Run:
    """Table A4's column SD-XL on the digits: U-Net with words and size.

    gesso train digits-sdxl        1-3 minutes
    """
    net = UNet(channels=32, multipliers=(1, 2), transformer_depth=(0, 1), blocks=1, head_width=32, groups=8)
    return on_digits("digits-sdxl", sdxl(), net, 1e-3)


def digits_sd3() -> Run:
    """Table A4's column SD3 on the digits: mmDiT with words under rectified flow.

    gesso train digits-sd3         1-3 minutes
    """
    return on_digits("digits-sd3", sd3(), MMDiT(width=96, depth=4, heads=3, patch=2, positions="interpolated"), 2e-3)


def digits_ours() -> Run:
    """Table A4's column Ours on the digits: mmDiT++ with words, disentangled control and control guidance.

    gesso train digits-ours        1-3 minutes
    """
    return on_digits("digits-ours", ours(), MMDiTpp(width=96, depth=4, heads=3, patch=2), 2e-3)


CLIP = dict(encoder="openai/clip-vit-large-patch14", tokens=77)
CROPS = {"sdxl": (0.9, 1.0), "sd3": (0.9, 1.0), "ours": (0.4, 0.6)}
"""low resolution's crop scale"""


def on_cc12m(name: str, column: dict[str, Any], net: UNet | MMDiT | MMDiTpp) -> Run:
    """A column of Table A4 on CC12M at 256x256: latents, CLIP ViT-L/14, batches of 2048, a constant 1e-4.

    The paper also says a rate of 10 x 1e-4, at which its Table A2 has every run diverge. Which VAE it does not say; ours
    is Stability's, fine-tuned on MSE. Iterations: 300k to 500k, here 400k. Views per image are our choice.
    """
    low, high = CROPS[name]
    data = Data(source="", resolution=256, flip=name == "ours", crop_scale=(low, high))
    sample = column["sample"].model_copy(update=dict(steps=250, tuned_at=256))
    return Run(
        recipe=f"cc12m-256-{name}",
        **column | dict(semantic=column["semantic"].model_copy(update=CLIP), sample=sample),
        data=data,
        latent=Latent(vae="stabilityai/sd-vae-ft-mse"),
        net=net,
        train=Train(
            total_images=400_000 * 2048, batch_size=2048, snapshot_images=M8, state_images=M8, log_images=2048 * 50
        ),
    )


M8 = 2**23
CACHE = (
    "gesso cache cc12m caches/{cache} --resolution 256 --vae stabilityai/sd-vae-ft-mse --text openai/clip-vit-large-patch14 "
    "--tokens 77 --views 4 --crop-scale {crop}{flip}"
)


def cc12m(name: str) -> Run:
    """One column of Table A4 at full scale; its command stands in RECIPES."""
    columns: dict[str, tuple[dict[str, Any], UNet | MMDiT | MMDiTpp]] = {
        "sdxl": (sdxl(), UNet()),
        "sd3": (sd3(), MMDiT(width=1152, depth=28, heads=16, patch=2, positions="interpolated")),
        "ours": (ours(), mmditpp("XL/2")),
    }
    return on_cc12m(name, *columns[name])


def described(name: str, what: str) -> Callable[[], Run]:
    """A recipe of `cc12m` with a docstring of its own."""
    recipe = partial(cc12m, name)
    cache = f"cc12m-256-{CROPS[name][0]:g}-{CROPS[name][1]:g}" + ("-flip" if name == "ours" else "")
    made = CACHE.format(cache=cache, crop=",".join(f"{s:g}" for s in CROPS[name]), flip=" --flip" * (name == "ours"))
    recipe.__doc__ = (
        f"Table A4's column {what} on CC12M at 256x256.\n\n    {made}\n"
        f"    gesso train cc12m-256-{name} data.source=caches/{cache}    16 A100; days not in the paper\n"
    )
    return recipe


RECIPES: dict[str, Callable[[], Run]] = {
    "digits-sdxl": digits_sdxl,
    "digits-sd3": digits_sd3,
    "digits-ours": digits_ours,
    "cc12m-256-sdxl": described("sdxl", "SD-XL"),
    "cc12m-256-sd3": described("sd3", "SD3"),
    "cc12m-256-ours": described("ours", "Ours"),
}
