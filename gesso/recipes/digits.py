"""Recipes for scikit-learn's handwritten digits: 1,797 real 8x8 scans in ten classes, without download."""

from collections.abc import Callable
from functools import partial

from gesso.config import (
    DataConfig,
    DiTAttConfig,
    DiTConfig,
    EDM2Config,
    EDMConfig,
    EvalConfig,
    LossConfig,
    MDTConfig,
    MMDiTConfig,
    MMDiTppConfig,
    MonitorConfig,
    MPDiTConfig,
    MPMMDiTppConfig,
    NetConfig,
    OptimConfig,
    PixArtConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
)


def digits() -> RunConfig:
    """Train mmDiT++ (0.8 M parameters) on the digits.

    gesso train digits            2-3 minutes on two CPU cores
    """
    return RunConfig(
        recipe="digits",
        data=DataConfig(source="digits", resolution=8, channels=1),
        net=MMDiTppConfig(hidden_size=96, depth=4, num_heads=3, patch_size=2),
        process=EDMConfig(sigma_min=0.01, sigma_max=40),  # below 0.01 noise is invisible in 8-bit pixels
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=100_000, warmup_images=2_000),
        train=TrainConfig(total_images=160_000, batch_size=128, snapshot_every=16_000, checkpoint_every=16_000),
        sample=SampleConfig(sampler="euler", steps=20, guidance=1.5, sigma_rel=0.075),
        eval=EvalConfig(toy_metrics="digits"),
        monitor=MonitorConfig(sample_every=40_000),
    )


def digits_edm2() -> RunConfig:
    """Train EDM2's CONFIG G with two levels on the digits, with its uncertainty weighting, summed loss and schedule.

    gesso train digits-edm2       about 3 minutes on two CPU cores
    """
    run = digits()
    return run.model_copy(
        update=dict(
            recipe="digits-edm2",
            net=EDM2Config(channels=32, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,), channels_per_head=32),
            loss=LossConfig(weighting="uncertainty", reduction="sum"),
            optim=OptimConfig(
                lr=1e-2, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=50_000, warmup_images=2_000
            ),
            train=TrainConfig(total_images=120_000, batch_size=128, snapshot_every=12_000, checkpoint_every=12_000),
        )
    )


def digits_variant(net: NetConfig, lr: float) -> RunConfig:
    """Return the recipe `digits` with another network and learning rate, and 100k images."""
    run = digits()
    return run.model_copy(
        update=dict(
            recipe=f"digits-{net.name}",
            net=net,
            optim=run.optim.model_copy(update={"lr": lr}),
            train=run.train.model_copy(
                update={"total_images": 100_000, "snapshot_every": 10_000, "checkpoint_every": 10_000}
            ),
        )
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"digits": digits, "digits-edm2": digits_edm2}
TINY_SHAPE = dict(hidden_size=96, depth=4, num_heads=3, patch_size=2)
for net, lr in (
    (
        UNetConfig(
            channels=32,
            channel_mult=(1, 2),
            transformer_depth=(0, 1),
            num_blocks=1,
            channels_per_head=32,
            norm_num_groups=8,
        ),
        1e-3,
    ),
    (DiTConfig(**TINY_SHAPE), 2e-3),
    (DiTAttConfig(**TINY_SHAPE), 2e-3),
    (PixArtConfig(**TINY_SHAPE), 2e-3),
    (MDTConfig(**TINY_SHAPE, decoder_layers=2), 2e-3),
    (MMDiTConfig(**TINY_SHAPE), 2e-3),
    (MPDiTConfig(**TINY_SHAPE), 2e-2),
    (MPMMDiTppConfig(**TINY_SHAPE), 2e-2),
):
    recipe = partial(digits_variant, net, lr)
    recipe.__doc__ = (
        f"Train {net.name} on the digits with the settings of `digits`.\n\n"
        f"    gesso train digits-{net.name}   1-3 minutes on two CPU cores"
    )
    RECIPES[f"digits-{net.name}"] = recipe
