"""scikit-learn's handwritten digits: 1,797 real 8x8 scans in ten classes, on a laptop, without download."""

from collections.abc import Callable
from functools import partial

from gesso.config import (
    EDM,
    EDM2,
    MDT,
    Data,
    DiT,
    DiTAtt,
    Eval,
    Loss,
    MMDiT,
    MMDiTpp,
    MPDiT,
    MPMMDiTpp,
    Net,
    Optim,
    PixArt,
    Run,
    Sample,
    Train,
    UNet,
    Watch,
)


def digits() -> Run:
    """mmDiT++ (0.8 M parameters) on the digits.

    gesso train digits            2-3 minutes on two CPU cores
    """
    return Run(
        recipe="digits",
        data=Data(source="digits", resolution=8, channels=1),
        net=MMDiTpp(width=96, depth=4, heads=3, patch=2),
        process=EDM(sigma_min=0.01, sigma_max=40),  # 8-bit pixels show nothing below .01
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=100_000, warmup_images=2_000),
        train=Train(total_images=160_000, batch_size=128, snapshot_images=16_000, state_images=16_000),
        sample=Sample(sampler="euler", steps=20, guidance=1.5, sigma_rel=0.075),
        eval=Eval(features="digits"),
        watch=Watch(sample_images=40_000),
    )


def digits_edm2() -> Run:
    """EDM2's CONFIG G with two levels on the digits, with its uncertainty weighting, summed loss and schedule.

    gesso train digits-edm2       about 3 minutes on two CPU cores
    """
    run = digits()
    return run.model_copy(
        update=dict(
            recipe="digits-edm2",
            net=EDM2(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), channels_per_head=32),
            loss=Loss(weighting="uncertainty", reduction="sum"),
            optim=Optim(lr=1e-2, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=50_000, warmup_images=2_000),
            train=Train(total_images=120_000, batch_size=128, snapshot_images=12_000, state_images=12_000),
        )
    )


def family(net: Net, lr: float) -> Run:
    """Another network under `digits`' recipe: all else equal but the learning rate."""
    run = digits()
    return run.model_copy(
        update=dict(
            recipe=f"digits-{net.name}",
            net=net,
            optim=run.optim.model_copy(update={"lr": lr}),
            train=run.train.model_copy(
                update={"total_images": 100_000, "snapshot_images": 10_000, "state_images": 10_000}
            ),
        )
    )


RECIPES: dict[str, Callable[[], Run]] = {"digits": digits, "digits-edm2": digits_edm2}
shape = dict(width=96, depth=4, heads=3, patch=2)
for net, lr in (
    (UNet(channels=32, multipliers=(1, 2), transformer_depth=(0, 1), blocks=1, head_width=32, groups=8), 1e-3),
    (DiT(**shape), 2e-3),
    (DiTAtt(**shape), 2e-3),
    (PixArt(**shape), 2e-3),
    (MDT(**shape, decoder=2), 2e-3),
    (MMDiT(**shape), 2e-3),
    (MPDiT(**shape), 2e-2),
    (MPMMDiTpp(**shape), 2e-2),
):
    recipe = partial(family, net, lr)
    recipe.__doc__ = (
        f"{net.name} on the digits, as `digits` in all else.\n\n    gesso train digits-{net.name}   1-3 minutes"
    )
    RECIPES[f"digits-{net.name}"] = recipe
