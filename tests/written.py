"""Run folders with snapshots of random weights: what sampling needs, without a training."""

from pathlib import Path

import torch
from conftest import awake
from rich.console import Console

from gesso import config, ema, recipes, snapshot
from gesso.config import Run
from gesso.train.loop import Trainer
from gesso.train.start import opened

QUIET = Console(quiet=True)
TRANSFORMER = {"net.width": 32, "net.depth": 2, "net.heads": 2}
U_NET = {"net.channels": 16, "net.blocks": 1}
SMALL = {
    "digits": TRANSFORMER,
    "digits-dit": TRANSFORMER,
    "digits-dit-att": TRANSFORMER,
    "digits-pixart": TRANSFORMER,
    "digits-mdt": TRANSFORMER | {"net.depth": 3, "net.decoder": 1},
    "digits-mmdit": TRANSFORMER,
    "digits-mp-dit": TRANSFORMER,
    "digits-mp-mmdit++": TRANSFORMER,
    "digits-unet": U_NET | {"net.head_width": 8, "net.context": 24},
    "digits-edm2": U_NET | {"net.channels_per_head": 16},
    "shapes": TRANSFORMER | {"data.source": "shapes:64"},
    "shapes-class": TRANSFORMER | {"data.source": "shapes-class:64"},
}
TRAIN = {
    "train.total_images": 48, "train.batch_size": 16, "train.snapshot_images": 16, "train.state_images": 16,
    "train.log_images": 16, "train.threads": 1, "optim.warmup_images": 16,
    "sample.steps": 3, "sample.sigma_rel": 0.05,
}  # fmt: skip


def small(recipe: str = "digits", **settings: object) -> Run:
    """A recipe's run with a small network, by settings as a user types them."""
    laid = SMALL[recipe] | TRAIN | settings
    return recipes.resolve(recipe, [f"{name}={value}" for name, value in laid.items()])[0]


def written(folder: Path, recipe: str = "digits", **settings: object) -> Run:
    """A run folder with one time and two lengths, .05 and .1, whose weights differ; none of them is zero."""
    run, images = opened(small(recipe, **settings), QUIET)
    trainer = Trainer(run, images)
    weights = awake(trainer.denoiser.net).state_dict()
    g = torch.Generator().manual_seed(1)
    for profile in ema.tracked(run.ema):
        path = snapshot.path_for(folder / "snapshots", 640, profile)
        snapshot.write(path, weights, 640, profile, run, trainer.rows)
        weights = {k: v + 0.2 * v.std(correction=0) * torch.randn(v.shape, generator=g) for k, v in weights.items()}
    config.write(run, folder / "run.yaml")
    return run


def changed(run: Run, **settings: object) -> Run:
    """The run with settings laid over it, as `gesso sample` does."""
    return config.resolve(config.as_tree(run), [f"{name}={value}" for name, value in settings.items()])[0]
