"""Name maps between weights of other projects and gesso, in both directions, and inference of settings."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gesso.config import DiTConfig, InputSpec, NetConfig, PixArtConfig, VPConfig
from gesso.config.process import ProcessConfig
from gesso.errors import RunError, UsageError
from gesso.models.embeddings import sincos_pos_embed_2d

KNOWN_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16, (1536, 24): 24}
"""Attention heads by width and depth: S, B, L and XL of the DiT family, SD3 medium."""
PARAMETERS = ("weight", "bias")
NOTE_UNIT_STEP = "step 1 per token on every grid, as in the source at its training resolution"
NOTE_PROPORTIONAL = "step base/n on a grid of n tokens, as in the source"
NOTE_UNKNOWN_BASE = (
    "step 1 on every grid, as in the source at its training resolution; on other grids the source has step base/n: "
    "pass resolution="
)
ADM_PROCESS = VPConfig(betas="linear")
"""Process of ADM, DiT, MDT and PixArt: 1000 betas from 1e-4 to .02."""
NOTE_ASSUMED_RESOLUTION = "32 x 32, assumed: it cannot be inferred from the weights"


class ImportedModel(NamedTuple):
    """Settings inferred from names and shapes, tensors under gesso's names, and notes.

    `notes` name the source, its process, its convention of c_noise and the adaptations. `process` is the process that
    the weights were trained under; its distribution of training noise is the published one where it is known.
    """

    cfg: NetConfig
    inputs: InputSpec
    weights: Mapping[str, Tensor]
    notes: dict[str, str]
    process: ProcessConfig


class TensorMapping(NamedTuple):
    """A tensor of gesso and its foreign counterparts; a list of them is a map in both directions.

    Layouts: "rows": gesso's tensor is the concatenation of the foreign ones; "copies": each foreign tensor equals it;
    "swapped": the foreign tensor is (scale, shift), gesso's (shift, scale); "square": the foreign tensor has shape
    (1, n^2, D), gesso's (1, n, n, D).
    """

    name: str
    foreign_names: tuple[str, ...]
    layout: Literal["rows", "copies", "swapped", "square"] = "rows"


def map_layers(pairs: Mapping[str, str], layout: Literal["rows", "swapped"] = "rows") -> list[TensorMapping]:
    """Return the mappings of weight and bias of layers, given foreign name -> gesso's name."""
    return [
        TensorMapping(f"{name}.{part}", (f"{foreign}.{part}",), layout)
        for foreign, name in pairs.items()
        for part in PARAMETERS
    ]


def map_stacked(foreign: Iterable[str], prefix: str) -> list[TensorMapping]:
    """Return the mappings of several foreign layers that form one layer of gesso, concatenated by rows."""
    names = list(foreign)
    return [TensorMapping(f"{prefix}.{part}", tuple(f"{name}.{part}" for name in names)) for part in PARAMETERS]


def import_tensors(state: Mapping[str, Tensor], mappings: Iterable[TensorMapping]) -> dict[str, Tensor]:
    """Return the tensors under gesso's names.

    Unknown tensors keep their name and missing ones are left out; `models.state_dict_mismatch` lists both.

    Raises:
        RunError: Tensors that must be copies differ.
    """
    remaining, imported = dict(state), {}
    for mapping in mappings:
        if all(name in remaining for name in mapping.foreign_names):
            imported[mapping.name] = merge_tensors(mapping, [remaining.pop(name) for name in mapping.foreign_names])
    return imported | remaining


def export_tensors(weights: Mapping[str, Tensor], mappings: Iterable[TensorMapping]) -> dict[str, Tensor]:
    """Return the tensors under foreign names, none sharing memory with another."""
    remaining, exported = dict(weights), dict[str, Tensor]()
    for mapping in mappings:
        if mapping.name in remaining:
            parts = split_tensor(mapping, remaining.pop(mapping.name))
            exported |= {name: part.clone() for name, part in zip(mapping.foreign_names, parts, strict=True)}
    assert not remaining, f"no mapping for {sorted(remaining)[:4]}"
    return exported


def merge_tensors(mapping: TensorMapping, parts: list[Tensor]) -> Tensor:
    """Return gesso's tensor from its foreign parts."""
    match mapping.layout:
        case "copies":
            if not all(part.equal(parts[0]) for part in parts):
                raise RunError(f"{mapping.foreign_names[0]} differs between blocks; gesso has one for all blocks")
            return parts[0]
        case "swapped":
            return torch.cat(parts[0].chunk(2)[::-1])
        case "square":
            side = grid_side(mapping.foreign_names[0], parts[0])
            return parts[0].unflatten(1, (side, side))
        case _:
            return torch.cat(parts) if len(parts) > 1 else parts[0]


def split_tensor(mapping: TensorMapping, tensor: Tensor) -> list[Tensor]:
    """Return the foreign parts of a tensor of gesso."""
    match mapping.layout:
        case "copies":
            return [tensor] * len(mapping.foreign_names)
        case "swapped":
            return [torch.cat(tensor.chunk(2)[::-1])]
        case "square":
            return [tensor.flatten(1, 2)]
        case _:
            return list(tensor.chunk(len(mapping.foreign_names)))


def tensor_shape(state: Mapping[str, Tensor], name: str) -> torch.Size:
    """Return the shape of a tensor that defines the size of the network. Raises RunError if it is missing."""
    if name not in state:
        raise RunError(f"{name} is missing, so that the network's settings cannot be inferred")
    return state[name].shape


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return 1 plus the largest N in the names `prefix.N.`, 0 without such names."""
    numbers = [int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in state if name.startswith(f"{prefix}.")]
    return 1 + max(numbers, default=-1)


def infer_num_heads(width: int, depth: int, num_heads: int | None, head_width: int | None = None) -> int:
    """Return `num_heads`, or for None the number by the width of qk-norm or of a known size.

    Raises:
        UsageError: The number cannot be inferred, or `num_heads` does not fit.
    """
    inferred = width // head_width if head_width else KNOWN_HEADS.get((width, depth))
    if num_heads is None and inferred is None:
        raise UsageError(
            f"the attention heads of a network of width {width} and depth {depth} cannot be inferred from its weights; "
            "pass num_heads="
        )
    if num_heads is None:
        assert inferred is not None
        return inferred
    if width % num_heads or (head_width and num_heads != inferred):
        reason = f"by the norms of its queries it has {inferred}" if head_width else f"its width is {width}"
        raise UsageError(f"num_heads={num_heads} does not fit the network: {reason}")
    return num_heads


def grid_side(name: str, table: Tensor) -> int:
    """Return n of a position table (1, n^2, D). Raises RunError if it is not square."""
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if side == 0 or side**2 != table.shape[1]:
        raise RunError(f"{name} has shape {tuple(table.shape)}, not (1, side^2, width)")
    return side


def unit_step_grid_side(name: str, table: Tensor, width: int) -> int:
    """Return n of a sine-cosine table (1, n^2, width) with one step per token.

    Raises:
        RunError: The table has other values, which cannot be computed from n.
    """
    side = grid_side(name, table)
    expected = sincos_pos_embed_2d(width, side, side, (side - 1, side - 1))
    # Half precision rounds the table's values by up to 4e-3.
    if table.shape != expected.shape or (table.float().cpu() - expected).abs().max() > 1e-2:
        raise RunError(f"{name} of shape {tuple(table.shape)} is not the sines and cosines of one step per token")
    return side


def split_variance(state: Mapping[str, Tensor], last: str, patch: int, channels: int) -> dict[str, Tensor]:
    """Split a last layer of patch x patch x 2 channels into `last` for the image and `last`.variance."""
    result = dict(state)
    for part in PARAMETERS:
        rows = result.get(f"{last}.{part}")
        if rows is not None and has_variance(len(rows), patch, channels):
            image, variance = rows.unflatten(0, (patch**2, 2, channels)).unbind(1)
            result |= {f"{last}.{part}": image.flatten(0, 1), f"{last}.variance.{part}": variance.flatten(0, 1)}
    return result


def join_variance(state: Mapping[str, Tensor], last: str, patch: int, channels: int) -> dict[str, Tensor]:
    """Join the two layers that `split_variance` returns."""
    result = dict(state)
    for part in PARAMETERS:
        variance = result.pop(f"{last}.variance.{part}", None)
        if variance is not None:
            both = [t.unflatten(0, (patch**2, channels)) for t in (result[f"{last}.{part}"], variance)]
            result[f"{last}.{part}"] = torch.stack(both, dim=1).flatten(0, 2)
    return result


def has_variance(rows: int, patch: int, channels: int) -> bool:
    """Return True if a last layer with this number of rows also predicts a variance."""
    return rows == patch**2 * 2 * channels


def variance_note(learned: bool) -> dict[str, str]:
    """Return the note on a learned variance."""
    return {"variance": "variance of ancestral steps, which sample.variance=learned uses"} if learned else {}


def check_exportable(class_name: str, settings: Mapping[str, bool]) -> None:
    """Raise UsageError that names the settings (keys that are true) that a class of diffusers does not support."""
    if unsupported := [setting for setting, is_set in settings.items() if is_set]:
        raise UsageError(f"diffusers' {class_name} does not support {', '.join(unsupported)}")


def has_other_base_grid(cfg: DiTConfig | PixArtConfig, inputs: InputSpec) -> bool:
    """Return True if positions refer to another grid than the training grid, for which diffusers has no setting."""
    has_base = cfg.pos_embed in ("interpolated", "proportional")
    other_base = has_base and inputs.pos_embed_base not in (None, inputs.resolution)
    return other_base or inputs.pos_embed_span is not None


def num_control(inputs: InputSpec) -> int:
    """Return the number of control variables."""
    return inputs.control.num_high + inputs.control.num_low
