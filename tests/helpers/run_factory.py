"""Run folders with snapshots of random weights, for tests of sampling without training."""

from pathlib import Path

import torch
from helpers.network_cases import randomize_constants_
from rich.console import Console

from gesso import config, ema, recipes, snapshot
from gesso.config import RunConfig
from gesso.training.loop import Trainer
from gesso.training.run_folder import open_dataset_for_run

QUIET_CONSOLE = Console(quiet=True)
SMALL_TRANSFORMER = {"net.hidden_size": 32, "net.depth": 2, "net.num_heads": 2}
SMALL_UNET = {"net.channels": 16, "net.num_blocks": 1}
SMALL_NETS = {
    "digits": SMALL_TRANSFORMER,
    "digits-dit": SMALL_TRANSFORMER,
    "digits-dit-att": SMALL_TRANSFORMER,
    "digits-pixart": SMALL_TRANSFORMER,
    "digits-mdt": SMALL_TRANSFORMER | {"net.depth": 3, "net.decoder_layers": 1},
    "digits-mmdit": SMALL_TRANSFORMER,
    "digits-mp-dit": SMALL_TRANSFORMER,
    "digits-mp-mmdit++": SMALL_TRANSFORMER,
    "digits-unet": SMALL_UNET | {"net.channels_per_head": 8, "net.context_dim": 24},
    "digits-edm2": SMALL_UNET | {"net.channels_per_head": 16},
    "shapes": SMALL_TRANSFORMER | {"data.source": "shapes:64"},
    "shapes-class": SMALL_TRANSFORMER | {"data.source": "shapes-class:64"},
}
SHORT_TRAINING = {
    "train.total_images": 48, "train.batch_size": 16, "train.snapshot_every": 16, "train.checkpoint_every": 16,
    "train.log_every": 16, "train.num_threads": 1, "optim.warmup_images": 16,
    "sample.steps": 3, "sample.sigma_rel": 0.05,
}  # fmt: skip


def tiny_run(**update: object) -> RunConfig:
    """Return a digits run that trains in seconds, with settings changed by `update`."""
    settings = [
        "net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.total_images=640", "train.batch_size=32",
        "train.snapshot_every=160", "train.checkpoint_every=96", "train.log_every=128", "train.num_threads=1",
        "optim.warmup_images=64",
    ]  # fmt: skip
    return recipes.resolve("digits", settings + [f"{k}={v}" for k, v in update.items()])[0]


def image_run(source: Path | str, **settings: object) -> RunConfig:
    """Return a short run of a small network on 16x16 pixels, or 2x2 latents, of a folder, archive or cache."""
    defaults = {
        "data.source": source, "data.resolution": 16, "data.channels": 3, "net.hidden_size": 32, "net.depth": 1,
        "net.num_heads": 2,
        "net.patch_size": 1, "train.total_images": 64, "train.batch_size": 8, "train.snapshot_every": 32,
        "train.checkpoint_every": 16, "train.log_every": 32, "train.num_threads": 1, "sample.steps": 3,
        "eval.toy_metrics": "none",
    }  # fmt: skip
    return recipes.resolve("digits", [f"{name}={value}" for name, value in (defaults | settings).items()])[0]


def small_run(recipe: str = "digits", **settings: object) -> RunConfig:
    """Return a recipe's run with a small network and short training, changed by settings as a user types them."""
    values = SMALL_NETS[recipe] | SHORT_TRAINING | settings
    return recipes.resolve(recipe, [f"{name}={value}" for name, value in values.items()])[0]


def write_run(folder: Path, recipe: str = "digits", **settings: object) -> RunConfig:
    """Write a run folder with snapshots of EMA lengths .05 and .1, with different nonzero weights; return the run."""
    return write_snapshots(folder, small_run(recipe, **settings))


def write_snapshots(folder: Path, run: RunConfig) -> RunConfig:
    """Write a run folder with snapshots of random weights, without training; return the run as it is recorded."""
    run, dataset = open_dataset_for_run(run, QUIET_CONSOLE)
    trainer = Trainer(run, dataset)
    weights = randomize_constants_(trainer.denoiser.net).state_dict()
    generator = torch.Generator().manual_seed(1)
    for profile in ema.tracked_profiles(run.ema):
        path = snapshot.snapshot_path(folder / "snapshots", 640, profile)
        snapshot.write(path, weights, 640, profile, run, trainer.control_rows)
        weights = {
            k: v + 0.2 * v.std(correction=0) * torch.randn(v.shape, generator=generator) for k, v in weights.items()
        }
    config.save_config(run, folder / "run.yaml")
    return run


def with_settings(run: RunConfig, **settings: object) -> RunConfig:
    """Return the run with changed settings, as `gesso sample` does."""
    return config.resolve(config.to_dict(run), [f"{name}={value}" for name, value in settings.items()])[0]
