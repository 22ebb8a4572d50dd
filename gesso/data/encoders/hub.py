"""Pretrained models in a folder or on the Hugging Face hub: find, open and identify their files.

Weights are read from safetensors only: a pickle could execute code.
"""

import contextlib
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gesso.errors import GessoError, RunError, UsageError, error_summary, install_command
from gesso.untrusted import read_json_object


def import_names(package: str, extra: str, names: Sequence[str]) -> list[Any]:
    """Import names of a package that belongs to an extra of gesso; raise UsageError if it is missing or broken."""
    try:
        module = importlib.import_module(package)
        return [getattr(module, name) for name in names]
    except (ImportError, RuntimeError, AttributeError) as error:  # a broken torchvision raises any of these
        if isinstance(error, ModuleNotFoundError) and error.name and package.startswith(error.name):
            raise UsageError(f"this needs {package}: {install_command(extra)}") from None
        raise UsageError(
            f"{package} is installed but cannot be imported ({error_summary(error)}); run gesso doctor"
        ) from None


def model_folder(model_id: str, label: str, subfolders: Sequence[str], names: Sequence[str]) -> Path:
    """Return the folder of a model: `model_id`, or the sub-folder of a pipeline.

    Args:
        model_id: A folder, or a hub id, of which the files `names` are downloaded.
        label: Name of the model in errors.
        subfolders: Sub-folders of a pipeline, the model's first.
        names: Patterns of the files.

    Raises:
        UsageError: There is no such folder or id.
    """
    model_id = model_id.removeprefix("hub:")
    root = Path(model_id).expanduser()
    if not root.is_dir():
        root = _download(model_id, label, subfolders, names)
    inner = root / subfolders[0]
    return inner if inner.is_dir() else root


def _download(model_id: str, label: str, subfolders: Sequence[str], names: Sequence[str]) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_id):
        raise UsageError(f"{label}: there is no such folder, and it is not a hub id such as OWNER/NAME")
    (download,) = import_names("huggingface_hub", "text", ["snapshot_download"])
    try:
        root = Path(download(model_id, allow_patterns=["model_index.json", "config.json"]))
        is_pipeline = (root / "model_index.json").is_file()
        patterns = [f"{part}/{name}" for part in subfolders for name in names] if is_pipeline else list(names)
        return Path(download(model_id, allow_patterns=patterns))
    except Exception as error:  # of the hub's client, of its HTTP library, or of the disk
        raise UsageError(
            f"{label}: there is no such folder, and the download from the hub failed ({error_summary(error)})"
        ) from None


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """Return config.json of a model; raise UsageError if it is missing or invalid."""
    try:
        return read_json_object(folder / "config.json")
    except FileNotFoundError:
        raise UsageError(f"{label}: {folder} is not a model, as it has no config.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{label}: {folder / 'config.json'} cannot be read ({error_summary(error)})") from None


def weight_files(folder: Path, stem: str, label: str) -> list[Path]:
    """Return STEM.safetensors or its shards, in order; raise UsageError if there are none."""
    pattern = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors")
    shards = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_file())
    if not shards:
        raise UsageError(
            f"{label}: no {stem}.safetensors in {folder}; weights in pickles (.bin, .ckpt) are not read, as they can "
            "execute code: convert them to safetensors"
        )
    return shards


def model_file_patterns(stem: str) -> tuple[str, ...]:
    """Return the file patterns of a model, for `model_folder`."""
    return ("config.json", f"{stem}.safetensors", f"{stem}-*.safetensors", f"{stem}.safetensors.index.json")


def load_model(model_class: Any, package: str, folder: Path, label: str) -> Any:
    """Return the frozen network of a folder, loaded by from_pretrained of `model_class`.

    Raises:
        UsageError: The library raises an error, or a tensor is missing in the file.
    """
    # transformers replaces torch.linspace while it loads a model, and torch.device(...) records the functions that it
    # overrides once, at its first use: it must record the original one.
    with torch.device("cpu"):
        torch.empty(0)
    with quiet_logging(package):
        try:
            network, info = model_class.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except Exception as error:  # damaged files, settings of another version, or wrong shapes raise any error
            raise UsageError(f"{label} cannot be opened: {error_summary(error)}") from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise UsageError(f"{label}: its weights have no tensor {missing[0]}{more}")
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def model_errors(label: str) -> Iterator[None]:
    """Turn errors of a foreign model in the body into a RunError: its settings may contradict its weights."""
    try:
        yield
    except (GessoError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of torch, of the model's library, or of its tokenizer
        raise RunError(
            f"{label} failed ({error_summary(error)}): its files are damaged or do not fit together"
        ) from error


@contextlib.contextmanager
def quiet_logging(package: str) -> Iterator[None]:
    """Suppress the library's progress bars and tables of unused tensors."""
    logging = importlib.import_module(f"{package}.utils.logging")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def sha256_files(files: Iterable[Path]) -> str:
    """Return the SHA-256 of concatenated files."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def sha256_config(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of config.json without the fields that describe its origin."""
    relevant = {name: value for name, value in settings.items() if name[0] != "_" or name == "_class_name"}
    relevant.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
