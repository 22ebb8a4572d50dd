"""Requirements of a table on this machine: which are available, and how to get the others. Nothing is downloaded."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gesso.config import RunConfig
from gesso.data.encoders import vae
from gesso.data.synthetic import source_exists
from gesso.errors import install_command
from gesso.evaluation.metrics import select_metrics
from gesso.evaluation.networks import NETWORKS, clip_dino, downloads
from gesso.recipes import data_requirements


class Requirement(NamedTuple):
    """A file, package or data set that a table needs. `fix` is the command or setting that provides it."""

    label: str
    available: bool
    fix: str = ""


def training_requirements(run: RunConfig) -> Iterator[Requirement]:
    """Yield the images or latents, the VAE and the text encoder of a run."""
    source, cache = run.data.source, data_requirements.data_requirement(run)
    if source_exists(source):
        yield Requirement(source, True)
        if source.startswith("digits"):
            yield package_requirement("sklearn", "scikit-learn", "demo")
    elif source == cache.folder and cache.command:
        yield Requirement(f"the cache {source}", False, f"{cache.command}    (docs/data.md)")
    else:
        yield Requirement(f"the images {source}", False, "set data.source=DIR")
    if run.latent.vae:
        yield package_requirement("diffusers", "diffusers", "vae")
        yield hub_requirement(run.latent.vae, vae.WEIGHTS_STEM, "the VAE", "latent.vae=DIR")
    if run.semantic.kind == "text" and run.semantic.encoder != "words":
        yield package_requirement("transformers", "transformers", "text")
        yield hub_requirement(run.semantic.encoder, "model", "the text encoder", "semantic.encoder=DIR")


def measurement_requirements(run: RunConfig) -> Iterator[Requirement]:
    """Yield the feature networks of eval.metrics and the images that they compare with."""
    networks = dict.fromkeys(
        metric.network for metric in select_metrics(run.eval.metrics) if metric.network in NETWORKS
    )
    for name in networks:
        for file in NETWORKS[name].weight_files(run.eval):
            path = downloads.local_path(file, Path(run.eval.weights_dir) if run.eval.weights_dir else None)
            yield Requirement(str(path), path.is_file(), f"downloaded at first use, or download {file.url}")
        if setting := NETWORKS[name].hub_setting:
            yield package_requirement("transformers", "transformers", "text")
            yield hub_requirement(getattr(run.eval, setting), clip_dino.WEIGHTS_STEM, setting, f"eval.{setting}=DIR")
    for setting, uri in (("reference", run.eval.reference), ("prompts", run.eval.prompts)):
        if uri:
            yield Requirement(f"eval.{setting}={uri}", source_exists(uri), f"set eval.{setting}=DIR")


def hub_requirement(model_id: str, file_stem: str, description: str, setting: str) -> Requirement:
    """Return the requirement of a model: a local folder, or a Hugging Face hub id in the local cache."""
    label = f"{description} {model_id}"
    if os.path.isdir(os.path.expanduser(model_id)):
        return Requirement(label, True)
    names = [
        f"{part}{file_stem}{end}"
        for part in ("", "vae/", "text_encoder/")
        for end in (".safetensors", ".safetensors.index.json")
    ]
    return Requirement(
        label,
        any(is_in_hub_cache(model_id, name) for name in names),
        f"downloaded from the hub at first use, or set {setting}",
    )


def is_in_hub_cache(model_id: str, file_name: str) -> bool:
    """Return True if a file of a hub id is in the local hub cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model_id, file_name), str)
    except HFValidationError:  # not of the form OWNER/NAME
        return False


def package_requirement(module: str, package: str, extra: str) -> Requirement:
    """Return the requirement of an installed Python package."""
    return Requirement(package, importlib.util.find_spec(module) is not None, install_command(extra))
