"""Test images, their folders on disk, and datasets that are decoded during training."""

import io
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from gesso.config import DataConfig
from gesso.data.factory import open_dataset
from gesso.data.on_the_fly import OnTheFlyDataset

PORTRAIT = f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"
"""in the public domain, installed with matplotlib"""


def write_image_folders(root: Path, counts: dict[str, int], size: int = 8) -> None:
    """Write random RGB images to sub-folders of `root`: {name: number of images}."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


def portrait(width: int = 256, height: int = 300, mode: str = "RGB") -> Image.Image:
    """Return a photo of one face."""
    return Image.open(PORTRAIT).convert(mode).resize((width, height))


def write_gradient_images(root: Path) -> None:
    """Write 7 tall and 9 wide images. Red grows to the right and green downwards: pixels show their position."""
    for name, (width, height), count in (("wide", (96, 48), 9), ("tall", (40, 64), 7)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
            pixels = np.stack([x, y, 20.0 * i + 0 * x], 2).round().astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def copy_with_truncated(source: Path, folder: Path, truncated: set[str]) -> Path:
    """Copy class folders of PNG files, with the files of some names cut after 90 bytes; return the copy."""
    for file in source.glob("*/*.png"):
        (folder / file.parent.name).mkdir(exist_ok=True, parents=True)
        content = file.read_bytes()
        (folder / file.parent.name / file.name).write_bytes(content[:90] if file.name in truncated else content)
    return folder


def write_latent_zip(path: Path) -> torch.Tensor:
    """Write EDM2's zip of 12 latents (4 channels, 2x2) with 3 labels; return means and deviations (12, 8, 2, 2)."""
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(12, 8, 2, 2)).astype(np.float32)
    moments[:, 4:] = np.exp(moments[:, 4:])
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(12)]
        for name, latent in zip(names, moments, strict=True):
            raw = io.BytesIO()
            np.save(raw, latent)
            archive.writestr(name, raw.getvalue())
        labels = ",".join(f'["{name}", {i % 3}]' for i, name in enumerate(names))
        archive.writestr("dataset.json", f'{{"labels": [{labels}]}}')
    return torch.from_numpy(moments)


def open_on_the_fly(source: Path, seed: int = 0, **settings: object) -> OnTheFlyDataset:
    """Return a dataset of random 16x16 crops of a folder."""
    dataset = open_dataset(DataConfig(source=str(source), resolution=16, crop_scale=(0.4, 0.6), **settings), seed=seed)
    assert isinstance(dataset, OnTheFlyDataset)
    return dataset


def sample_sizes(folder: Path) -> list[tuple[int, int]]:
    """Return (width, height) of every sample that was written to a folder."""
    sizes = []
    for file in sorted(folder.glob("seed*.png")):
        with Image.open(file) as image:
            sizes.append(image.size)
    return sizes
