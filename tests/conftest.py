"""Fixtures and helpers of the tests: one thread per process, small networks without constant tensors, the CLI."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from rich.console import Console

from gesso import config, models
from gesso.config import EDM2Config, InputSpec, MMDiTppConfig

torch.set_num_threads(1)
# The same examples on every machine; HYPOTHESIS_PROFILE=default generates new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SMALL_NETS = {
    "edm2": EDM2Config(channels=16, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,), channels_per_head=16),
    "mmdit++": MMDiTppConfig(hidden_size=32, depth=2, num_heads=2, patch_size=2),
    "mmdit++ all": MMDiTppConfig(hidden_size=32, depth=3, num_heads=2, patch_size=2, separate_text_weights="all"),
}


def randomize_constants_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Add noise to every constant parameter, such as zeros or ones, so that comparisons of networks can fail."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.unique().numel() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return module


def small_net(name: str, classes: int = 5, channels: int = 3, resolution: int = 8, seed: int = 0) -> torch.nn.Module:
    """Return a network of SMALL_NETS with random weights."""
    torch.manual_seed(seed)
    return randomize_constants_(models.build_network(SMALL_NETS[name], InputSpec(channels, resolution, classes)))


@pytest.fixture(params=list(SMALL_NETS))
def net_name(request) -> str:
    return request.param


def tiny_run(**update: object) -> config.RunConfig:
    """Return a digits run that trains in seconds, with settings changed by `update`."""
    from gesso import recipes

    settings = [
        "net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.total_images=640", "train.batch_size=32",
        "train.snapshot_every=160", "train.checkpoint_every=96", "train.log_every=128", "train.num_threads=1",
        "optim.warmup_images=64",
    ]  # fmt: skip
    return recipes.resolve("digits", settings + [f"{k}={v}" for k, v in update.items()])[0]


def write_image_folders(root, counts: dict[str, int], size: int = 8) -> None:
    """Write random RGB images to sub-folders of `root`: {name: number of images}."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture
def gesso(monkeypatch, capsys):
    """Return a function that runs a command and returns (exit code, stdout, stderr)."""
    from gesso import cli

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gesso", *map(str, arguments)])
        monkeypatch.setattr(cli, "console", Console(width=200))
        monkeypatch.setattr(cli, "errors", Console(stderr=True, width=200))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run_command
