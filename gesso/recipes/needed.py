"""The images that a recipe at the papers' scale needs, and the command that makes them ready."""

from pathlib import Path
from typing import NamedTuple

from gesso.config import Run

IMAGENET, IMAGENET_22K, CC12M = "/path/to/imagenet", "imagenet-22k", "cc12m"


class Cache(NamedTuple):
    """folder: what data.source names; command: what writes it, empty where the images are used as they are."""

    folder: str
    command: str


def images(run: Run) -> str:
    """Return where the images of a run are whose data.source is not named: CC12M where it has words, ImageNet-22k where its
    recipe is named so, else ImageNet."""
    return CC12M if run.semantic.kind == "text" else IMAGENET_22K if run.recipe.startswith("in22k") else IMAGENET


def cache(run: Run) -> Cache:
    """Of a run whose data.source is not said: latents of what its settings say, of `images`."""
    d, text, source = run.data, run.semantic.kind == "text", images(run)
    if not run.latent.vae:
        return Cache(source, "")
    settings = f"--resolution {d.resolution} --vae {run.latent.vae}" + f" --resize {d.resize}" * (d.resize != "lanczos")
    if run.latent.convention == "edm2":
        folder = f"caches/{Path(source).name}-{d.resolution}"
        return Cache(folder, f"gesso cache {source} {folder} {settings} --convention edm2 --dtype float32")
    low, high = d.crop_scale or (1, 1)
    folder = f"caches/{Path(source).name}-{d.resolution}-{low:g}-{high:g}" + "-flip" * d.flip
    tokens = f" --text {run.semantic.encoder} --tokens {run.semantic.tokens}" if text else ""
    crops = f" --views 4 --crop-scale {low:g},{high:g}{' --flip' * d.flip} --blur-faces"
    return Cache(folder, f"gesso cache {source} {folder} {settings}{tokens}{crops}")
