"""Images that a recipe at the papers' scale needs, and the command that prepares them."""

from pathlib import Path
from typing import NamedTuple

from gesso.config import RunConfig

IMAGENET, IMAGENET_22K, CC12M = "/path/to/imagenet", "imagenet-22k", "cc12m"


class DataRequirement(NamedTuple):
    """Value of data.source, and the command that writes it; empty if the images are used directly."""

    folder: str
    command: str


def images(run: RunConfig) -> str:
    """Return the image source of a run without data.source.

    CC12M for text, ImageNet-22k for recipes named in22k, otherwise ImageNet.
    """
    return CC12M if run.semantic.kind == "text" else IMAGENET_22K if run.recipe.startswith("in22k") else IMAGENET


def data_requirement(run: RunConfig) -> DataRequirement:
    """Return the data of a run without data.source: a cache of `images` with the latents that its settings need."""
    data, text, source = run.data, run.semantic.kind == "text", images(run)
    if not run.latent.vae:
        return DataRequirement(source, "")
    settings = f"--resolution {data.resolution} --vae {run.latent.vae}" + f" --resize {data.resize}" * (
        data.resize != "lanczos"
    )
    if run.latent.convention == "edm2":
        folder = f"caches/{Path(source).name}-{data.resolution}"
        return DataRequirement(folder, f"gesso cache {source} {folder} {settings} --convention edm2 --dtype float32")
    low, high = data.crop_scale or (1, 1)
    folder = f"caches/{Path(source).name}-{data.resolution}-{low:g}-{high:g}" + "-flip" * data.flip
    tokens = f" --text {run.semantic.encoder} --max-tokens {run.semantic.max_tokens}" if text else ""
    crops = f" --views 4 --crop-scale {low:g},{high:g}{' --flip' * data.flip} --blur-faces"
    return DataRequirement(folder, f"gesso cache {source} {folder} {settings}{tokens}{crops}")
