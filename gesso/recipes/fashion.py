"""Recipes for Fashion-MNIST: 60,000 grey 28x28 photographs of clothes in ten classes (Xiao et al. 2017, MIT licence).

    mkdir -p data/fashion-mnist && cd data/fashion-mnist
    for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
      curl -LO https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/$f-ubyte.gz
    done

Debian's package dataset-fashion-mnist has the same files. data.source names another folder.
"""

from collections.abc import Callable
from functools import partial

from gesso.config import (
    DataConfig,
    DiTConfig,
    EDM2Config,
    EDMConfig,
    EvalConfig,
    LossConfig,
    MMDiTppConfig,
    MonitorConfig,
    MPMMDiTppConfig,
    NetConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
)

FASHION_MNIST = "data/fashion-mnist"
TEST_IMAGES = f"{FASHION_MNIST}/t10k-images-idx3-ubyte.gz"
TRANSFORMER = dict(hidden_size=64, depth=4, num_heads=2, patch_size=4)


def fashion(net: NetConfig | None = None, lr: float = 8e-3, name: str = "fashion") -> RunConfig:
    """Train mmDiT++ (0.4 M parameters) on Fashion-MNIST; the 10,000 test images give the validation loss.

    gesso train fashion           about 3 minutes on one CPU core
    """
    sums_loss = isinstance(net, EDM2Config)
    return RunConfig(
        recipe=name,
        data=DataConfig(source=FASHION_MNIST, resolution=28, channels=1),
        net=net or MMDiTppConfig(**TRANSFORMER),
        process=EDMConfig(sigma_min=0.01, sigma_max=40),
        loss=LossConfig(weighting="uncertainty", reduction="sum" if sums_loss else "mean"),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=12_800, warmup_images=1_600),
        train=TrainConfig(total_images=64_000, batch_size=16, snapshot_every=3_200, checkpoint_every=32_000),
        sample=SampleConfig(sampler="heun", steps=16, guidance=1.0, sigma_rel=0.1),
        eval=EvalConfig(num_samples=5_000, metrics=("loss",)),
        monitor=MonitorConfig(validation_source=TEST_IMAGES, validate_every=16_000, magnitude_every=None),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"fashion": fashion}
NETWORKS: tuple[tuple[NetConfig, float, str], ...] = (
    (
        EDM2Config(channels=24, channel_mult=(1, 2, 2), num_blocks=1, attention_levels=(2,), channels_per_head=24),
        1e-2,
        "half an hour",
    ),
    (
        UNetConfig(
            channels=32,
            channel_mult=(1, 2, 2),
            transformer_depth=(0, 0, 1),
            num_blocks=1,
            channels_per_head=32,
            norm_num_groups=8,
        ),
        1e-3,
        "an hour",
    ),
    (DiTConfig(**TRANSFORMER), 1e-3, "3 minutes"),
    (MPMMDiTppConfig(**TRANSFORMER), 4e-2, "4 minutes"),
)
for net, lr, duration in NETWORKS:
    name = f"fashion-{net.name}"
    recipe = partial(fashion, net, lr, name)
    recipe.__doc__ = (
        f"Train {net.name} on Fashion-MNIST with the settings of `fashion`.\n\n"
        f"    gesso train {name}   about {duration} on one CPU core"
    )
    RECIPES[name] = recipe
