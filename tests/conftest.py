"""Shared by the tests: one thread each (they run two at a time), and small networks with nothing left at zero."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from rich.console import Console

from gesso import config, nets
from gesso.config import EDM2, Inputs, MMDiTpp

torch.set_num_threads(1)
# The same examples on every machine; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SMALL = {
    "edm2": EDM2(channels=16, multipliers=(1, 2), blocks=1, attention_levels=(1,), channels_per_head=16),
    "mmdit++": MMDiTpp(width=32, depth=2, heads=2, patch=2),
    "mmdit++ all": MMDiTpp(width=32, depth=3, heads=2, patch=2, text_weights="all"),
}


def awake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Make every tensor that starts at zero (or at one) random: a parity test on zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.unique().numel() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return module


def small_net(name: str, classes: int = 5, channels: int = 3, resolution: int = 8, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return awake(nets.build(SMALL[name], Inputs(channels, resolution, classes)))


@pytest.fixture(params=list(SMALL))
def net_name(request) -> str:
    return request.param


def tiny_run(**update) -> config.Run:
    """A digits run small enough to train in seconds."""
    from gesso import recipes

    settings = [
        "net.width=32", "net.depth=1", "net.heads=2", "train.total_images=640", "train.batch_size=32",
        "train.snapshot_images=160", "train.state_images=96", "train.log_images=128", "train.threads=1",
        "optim.warmup_images=64",
    ]  # fmt: skip
    return recipes.resolve("digits", settings + [f"{k}={v}" for k, v in update.items()])[0]


def folder_of_images(root, counts: dict[str, int], size: int = 8) -> None:
    """Random RGB images in sub-folders of `root`."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture
def gesso(monkeypatch, capsys):
    """Type a command; returns (exit code, stdout, stderr)."""

    from gesso import __main__ as cli

    def type_in(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gesso", *map(str, words)])
        monkeypatch.setattr(cli, "console", Console(width=200))
        monkeypatch.setattr(cli, "errors", Console(stderr=True, width=200))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return type_in
