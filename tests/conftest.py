"""Fixtures of several test modules, and settings of all: one thread per process, repeatable examples."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers.images import write_gradient_images, write_latent_zip
from hypothesis import settings
from rich.console import Console

torch.set_num_threads(1)
# The same examples on every machine; HYPOTHESIS_PROFILE=default generates new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


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


@pytest.fixture
def gesso_text(gesso):
    """Return a function that runs a command and returns (exit code, all output on one line)."""

    def run_command(*arguments: object) -> tuple[int, str]:
        code, out, err = gesso(*arguments)
        return code, " ".join((out + err).split())

    return run_command


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Return a folder of 16 oblong images of two classes, whose pixels show their position."""
    root = tmp_path_factory.mktemp("photos")
    write_gradient_images(root)
    return root


@pytest.fixture(scope="module")
def latent_zip(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """Return EDM2's zip of 12 latents, and their means and deviations."""
    path = tmp_path_factory.mktemp("zip") / "latents.zip"
    return path, write_latent_zip(path)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """Return the folder of a small VAE of 4 latent channels."""
    from helpers.encoders import write_vae  # imports diffusers

    return write_vae(tmp_path_factory.mktemp("vae") / "4", 4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Return the folder of a small CLIP text encoder."""
    from helpers.encoders import write_clip

    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clean_extensions(monkeypatch):
    """Restore the networks, data sets, losses and control variables of the process after a test."""
    from gesso import extensions
    from gesso.config import CONTROL_VARIABLES

    for table in (extensions.NETWORKS, extensions.DATASETS, extensions.LOSSES, CONTROL_VARIABLES, extensions._sources):
        for name, value in dict(table).items():
            monkeypatch.setitem(table, name, value)
    known = {id(t): set(t) for t in (extensions.NETWORKS, extensions.DATASETS, extensions.LOSSES, CONTROL_VARIABLES)}
    monkeypatch.setattr(extensions, "_loaded", [])
    monkeypatch.setattr(extensions, "_sources", {})
    yield
    for table in (extensions.NETWORKS, extensions.DATASETS, extensions.LOSSES, CONTROL_VARIABLES):
        for name in set(table) - known[id(table)]:
            del table[name]
