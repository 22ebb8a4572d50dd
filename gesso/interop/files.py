"""Read files of weights without running code in them, and describe what they hold."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gesso import models, untrusted
from gesso.config import InputSpec, NetConfig
from gesso.errors import RunError, UsageError
from gesso.interop import detect_format
from gesso.interop.inert_pickle import Record, read_pickle, state_dict_of
from gesso.interop.mapping import NOTE_ASSUMED_RESOLUTION, ImportedModel
from gesso.safetensors_io import read_metadata, read_tensors, write_tensors

CHECKPOINT_KEYS = ("ema", "state_dict", "model")
"""Keys of the weights in a PyTorch checkpoint, EMA weights first."""
EDM2_KEYS = ("ema", "net")
"""Keys of the network in EDM2's pickles."""
EDM2_NAME = re.compile(r"-(\d+)-(0\.\d+)\.pkl$")
"""End of the names of EDM2's pickles: thousands of images and relative EMA length."""


class StateFile(NamedTuple):
    """Tensors of a file under its own names, and notes by topic."""

    tensors: Mapping[str, Tensor]
    notes: dict[str, str]


def read_state(path: Path, label: str) -> StateFile:
    """Return the tensors of a .safetensors file, a PyTorch checkpoint or a pickle of EDM2 (.pkl).

    No code in the file runs: checkpoints are read by torch with weights_only=True, pickles by
    `gesso.interop.inert_pickle`.

    Args:
        path: The file.
        label: Name of the file in errors.

    Raises:
        RunError: The file is damaged or has anything but weights.
        UsageError: It has no named weights.
    """
    try:
        os.close(untrusted.open_regular(path))
    except (OSError, ValueError) as error:
        raise RunError(f"{label} cannot be read ({error})") from None
    if path.suffix == ".safetensors":
        return StateFile(read_tensors(path), {})
    state = _read_edm2_pickle(path, label) if path.suffix == ".pkl" else _read_checkpoint(path, label)
    if not state.tensors:
        raise UsageError(f"{label} contains no named weights")
    for name, tensor in state.tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise RunError(f"{label}: {name} is sparse, quantized or complex, which no weights are")
        if tensor.nbytes > tensor.untyped_storage().nbytes() or tensor.nbytes > path.stat().st_size:
            raise RunError(f"{label}: {name} of shape {tuple(tensor.shape)} is larger than what the file stores")
    return state


def _read_edm2_pickle(path: Path, label: str) -> StateFile:
    with open(path, "rb") as file:
        content = read_pickle(file, label)
    entries = content.items if isinstance(content, Record) else content
    key = next((key for key in EDM2_KEYS if isinstance(entries, dict) and entries.get(key) is not None), None)
    if key is None:
        raise UsageError(f"{label} is no pickle of EDM2: it has none of {', '.join(EDM2_KEYS)}")
    notes = {"network": f"{key!r} of the pickle, class {entries[key].kind}"} if isinstance(entries[key], Record) else {}
    if stored := EDM2_NAME.search(path.name):
        notes["EMA"] = f"sigma_rel {float(stored[2]):g} at {int(stored[1]):,} thousand images, by the name of the file"
    return StateFile(state_dict_of(entries[key], label), notes)


def _read_checkpoint(path: Path, label: str) -> StateFile:
    _check_unpacked_size(path, label)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise various errors
        raise RunError(
            f"{label} is damaged, is no weight file, or contains code, which gesso never runs "
            f"({type(error).__name__}); if you trust the file, convert it to safetensors"
        ) from None
    notes: dict[str, str] = {}
    for name in CHECKPOINT_KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded, notes = loaded[name], {"checkpoint": f"only {name!r} of the file was read"}
            break
    items = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}
    return StateFile(tensors, notes)


def _check_unpacked_size(path: Path, label: str) -> None:
    """Raise RunError if a zip file unpacks to more than its size; torch.save does not compress."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with untrusted.open_zip(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, *untrusted.ZIP_ERRORS) as error:
        raise RunError(f"{label} is damaged ({error})") from None
    if unpacked > path.stat().st_size:
        raise RunError(f"{label} unpacks to {unpacked:,} bytes, more than its size; torch.save does not compress")


def import_file(path: Path, out: Path | None, num_heads: int | None) -> list[str]:
    """Return lines that describe a file of weights; write its tensors to `out` as safetensors, if given.

    Raises:
        UsageError: There is no such file, or its weights belong to no known project.
        RunError: The file is damaged or has anything but weights.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    if path.suffix == ".safetensors" and "gesso" in read_metadata(path):
        raise UsageError(f"{path} is a snapshot of gesso, which init.source reads as it is")
    state = read_state(path, str(path))
    imported = detect_format(state.tensors, num_heads)
    with torch.device("meta"):
        net = models.build_network(imported.cfg, imported.inputs)
    if mismatch := models.state_dict_mismatch(net, imported.weights):
        raise RunError(f"{path} ({imported.notes['source']}): {mismatch}")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    notes = {k: v for k, v in (state.notes | imported.notes).items() if k not in ("source", "resolution")}
    lines = [
        f"format: {imported.notes['source']}, {path.stat().st_size / 1e6:.1f} MB",
        f"network: {describe_network(imported.cfg)}",
        f"parameters: {parameters / 1e6:.2f} M",
        f"inputs: {describe_inputs(imported)}",
        *(f"{name}: {text}" for name, text in notes.items()),
    ]  # fmt: skip
    if out is not None:
        write_tensors(out, {name: tensor.clone() for name, tensor in state.tensors.items()}, {"format": "pt"})
        lines.append(f"wrote {out}")
    return [*lines, f"next:\n  gesso train RECIPE init.source={out or path}"]


def describe_network(cfg: NetConfig) -> str:
    """Return the settings of a network as typed, except those with default values."""
    changed = {name: value for name, value in cfg.model_dump().items() if value != type(cfg).model_fields[name].default}
    texts = (f"net.{name}={list(v) if isinstance(v, tuple) else v}".replace(" ", "") for name, v in changed.items())
    return " ".join([f"net.name={cfg.name}", *(text for text in texts if not text.startswith("net.name="))])


def describe_inputs(imported: ImportedModel) -> str:
    """Return channels, resolution and conditions of an imported network, in words."""
    inputs: InputSpec = imported.inputs
    assumed = imported.notes.get("resolution") == NOTE_ASSUMED_RESOLUTION
    size = "a size that the weights do not determine" if assumed else f"{inputs.resolution} x {inputs.resolution}"
    parts = [f"{inputs.channels} channels of {size}"]
    parts += [f"{inputs.num_classes} classes"] if inputs.num_classes else []
    parts += [f"text tokens of {inputs.text_dim} channels"] if inputs.text_dim else []
    parts += [f"pooled text of {inputs.pooled_dim} channels"] if inputs.pooled_dim else []
    return ", ".join(parts)
