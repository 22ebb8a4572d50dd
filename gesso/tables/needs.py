"""What must be on a machine before a table can be made there, whether it is, and how to get it. Nothing is fetched."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gesso.config import Run
from gesso.data import vae
from gesso.data.imagined import is_there
from gesso.evaluate import compare, embed, lpips, weights
from gesso.recipes import needed


class Need(NamedTuple):
    """how: to get it, where it is not there."""

    what: str
    there: bool
    how: str = ""


HUB = {"dinov2": "dinov2", "clip": "clip", "clip_images": "clip"}
"""of feature networks, by the names of compare.METRICS: the settings that name a folder or hub id"""


def of_training(run: Run) -> Iterator[Need]:
    """Images, latents, the VAE and the text encoder."""
    source, made = run.data.source, needed.cache(run)
    if is_there(source):
        yield Need(source, True)
        if source.startswith("digits"):
            yield package("sklearn", "scikit-learn", "demo")
    elif source == made.folder and made.command:
        yield Need(f"the cache {source}", False, f"{made.command}    (docs/data.md)")
    else:
        yield Need(f"the images {source}", False, "name yours by data.source=DIR")
    if run.latent.vae:
        yield package("diffusers", "diffusers", "vae")
        yield hub(run.latent.vae, vae.STEM, "the VAE", "latent.vae=DIR")
    if run.semantic.kind == "text" and run.semantic.encoder != "words":
        yield package("transformers", "transformers", "text")
        yield hub(run.semantic.encoder, "model", "the text encoder", "semantic.encoder=DIR")


def of_measuring(run: Run) -> Iterator[Need]:
    """Feature networks of eval.scores, and the pictures that they compare with."""
    for name in dict.fromkeys(compare.METRICS[score] for score in run.eval.scores):
        for file in files_of(name, run):
            path = weights.place(file, Path(run.eval.weights) if run.eval.weights else None)
            yield Need(str(path), path.is_file(), f"fetched when first used, or download {file.url}")
        if name in HUB:
            yield package("transformers", "transformers", "text")
            yield hub(getattr(run.eval, HUB[name]), embed.STEM, HUB[name], f"eval.{HUB[name]}=DIR")
    for setting, where in (("reference", run.eval.reference), ("prompts", run.eval.prompts)):
        if where:
            yield Need(f"eval.{setting}={where}", is_there(where), "name yours by that setting")


def files_of(name: str, run: Run) -> tuple[weights.File, ...]:
    """Public files of a feature network."""
    if name == "inception":
        return (weights.INCEPTION[run.eval.inception],)
    return lpips.NETWORKS[run.eval.lpips][1:] if name == "lpips" else ()


def hub(where: str, stem: str, what: str, setting: str) -> Need:
    """A folder, or a model of the Hugging Face hub that was fetched before."""
    said = f"{what} {where}"
    if os.path.isdir(os.path.expanduser(where)):
        return Need(said, True)
    names = [
        f"{part}{stem}{end}"
        for part in ("", "vae/", "text_encoder/")
        for end in (".safetensors", ".safetensors.index.json")
    ]
    return Need(
        said, any(fetched(where, name) for name in names), f"fetched from the hub when first used, or {setting}"
    )


def fetched(where: str, name: str) -> bool:
    """Whether a file of a hub id is in the hub's cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(where, name), str)
    except HFValidationError:  # no OWNER/NAME
        return False


def package(module: str, name: str, extra: str) -> Need:
    return Need(name, importlib.util.find_spec(module) is not None, f"pip install 'gesso[{extra}]'")
