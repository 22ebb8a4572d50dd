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
"""Heads by width and depth: S, B, L and XL of the DiT family, SD3 medium."""
PARAMETERS = ("weight", "bias")
NOTE_UNIT_STEP = "one step per token on every grid here; theirs at the original's resolution"
NOTE_PROPORTIONAL = "step base/n on a grid of n tokens, as theirs"
NOTE_UNKNOWN_BASE = (
    "step 1 on every grid, theirs at the original's resolution; on others theirs is base/n: say that resolution"
)
ADM_PROCESS = VPConfig(betas="linear")
"""the process of ADM, DiT, MDT and PixArt: 1000 betas from 1e-4 to .02"""
NOTE_ASSUMED_RESOLUTION = "32 x 32, assumed: neither names nor shapes tell it"


class ImportedModel(NamedTuple):
    """Settings inferred from names and shapes, tensors under gesso's names, and notes.

    notes: source, process, c_noise convention, adaptations. process: the process the weights were trained under; of its
    noise distribution in training, the published one at most.
    """

    cfg: NetConfig
    inputs: InputSpec
    weights: Mapping[str, Tensor]
    notes: dict[str, str]
    process: ProcessConfig


class TensorMapping(NamedTuple):
    """One tensor of gesso and its foreign counterparts; a list of them is a map in both directions.

    layout: "rows": the foreign tensors concatenated; "copies": each foreign tensor equals gesso's; "swapped": foreign
    scale, shift is gesso's shift, scale; "square": foreign (1, n^2, D) is gesso's (1, n, n, D).
    """

    name: str
    foreign_names: tuple[str, ...]
    layout: Literal["rows", "copies", "swapped", "square"] = "rows"


def map_layers(pairs: Mapping[str, str], layout: Literal["rows", "swapped"] = "rows") -> list[TensorMapping]:
    """Return the mappings of weight and bias of layers, given foreign name -> gesso's name."""
    return [
        TensorMapping(f"{ours}.{part}", (f"{foreign}.{part}",), layout)
        for foreign, ours in pairs.items()
        for part in PARAMETERS
    ]


def map_stacked(foreign: Iterable[str], prefix: str) -> list[TensorMapping]:
    """Return the mappings of several foreign layers that form one layer of gesso, concatenated by rows."""
    names = list(foreign)
    return [TensorMapping(f"{prefix}.{part}", tuple(f"{name}.{part}" for name in names)) for part in PARAMETERS]


def import_tensors(state: Mapping[str, Tensor], mappings: Iterable[TensorMapping]) -> dict[str, Tensor]:
    """Return the tensors under gesso's names. Raises RunError if copies differ.

    Unknown tensors keep their name and missing ones are left out; `models.state_dict_mismatch` lists both.
    """
    rest, ours = dict(state), {}
    for tie in mappings:
        if all(name in rest for name in tie.foreign_names):
            ours[tie.name] = merge_tensors(tie, [rest.pop(name) for name in tie.foreign_names])
    return ours | rest


def export_tensors(weights: Mapping[str, Tensor], mappings: Iterable[TensorMapping]) -> dict[str, Tensor]:
    """Return the tensors under foreign names, none sharing memory with another."""
    rest, exported = dict(weights), dict[str, Tensor]()
    for tie in mappings:
        if tie.name in rest:
            parts = split_tensor(tie, rest.pop(tie.name))
            exported |= {name: part.clone() for name, part in zip(tie.foreign_names, parts, strict=True)}
    assert not rest, f"no place for {sorted(rest)[:4]}"
    return exported


def merge_tensors(mapping: TensorMapping, parts: list[Tensor]) -> Tensor:
    """Return gesso's tensor from its foreign parts."""
    match mapping.layout:
        case "copies":
            if not all(part.equal(parts[0]) for part in parts):
                raise RunError(f"{mapping.foreign_names[0]} differs between blocks; ours is one for all of them")
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
        raise RunError(f"{name} is missing, and with it the network's settings")
    return state[name].shape


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of N in `prefix.N.`, from 0 to the largest."""
    numbers = [int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in state if name.startswith(f"{prefix}.")]
    return 1 + max(numbers, default=-1)


def infer_num_heads(width: int, depth: int, num_heads: int | None, head_width: int | None = None) -> int:
    """Return the number of heads: as given, by the width of qk-norm, or of a known size.

    Raises:
        UsageError: The number must be given, or the given one does not fit.
    """
    inferred = width // head_width if head_width else KNOWN_HEADS.get((width, depth))
    if num_heads is None and inferred is None:
        raise UsageError(
            f"the heads of a network of width {width} and depth {depth} are not in its weights; say heads="
        )
    if num_heads is None:
        assert inferred is not None
        return inferred
    if width % num_heads or (head_width and num_heads != inferred):
        reason = f"the norms of its queries say {inferred}" if head_width else f"its width is {width}"
        raise UsageError(f"heads={num_heads} does not fit the network: {reason}")
    return num_heads


def grid_side(name: str, table: Tensor) -> int:
    """Return n of a position table (1, n^2, D). Raises RunError if it is not square."""
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if side == 0 or side**2 != table.shape[1]:
        raise RunError(f"{name} of shape {tuple(table.shape)} is no table (1, side^2, width)")
    return side


def unit_step_grid_side(name: str, table: Tensor, width: int) -> int:
    """Return n of a sine-cosine table (1, n^2, width) with one step per token.

    Raises:
        RunError: The table has other values, which cannot be computed from n.
    """
    side = grid_side(name, table)
    wanted = sincos_pos_embed_2d(width, side, side, (side - 1, side - 1))
    # Half precision rounds the table's values by up to 4e-3.
    if table.shape != wanted.shape or (table.float().cpu() - wanted).abs().max() > 1e-2:
        raise RunError(f"{name} of shape {tuple(table.shape)} is not the sines and cosines of one step per token")
    return side


def split_variance(state: Mapping[str, Tensor], last: str, patch: int, channels: int) -> dict[str, Tensor]:
    """Split a last layer of patch x patch x 2 channels into `last` for the image and `last`.variance."""
    split = dict(state)
    for part in PARAMETERS:
        rows = split.get(f"{last}.{part}")
        if rows is not None and has_variance(len(rows), patch, channels):
            image, variance = rows.unflatten(0, (patch**2, 2, channels)).unbind(1)
            split |= {f"{last}.{part}": image.flatten(0, 1), f"{last}.variance.{part}": variance.flatten(0, 1)}
    return split


def join_variance(state: Mapping[str, Tensor], last: str, patch: int, channels: int) -> dict[str, Tensor]:
    """Invert `split_variance`."""
    joined = dict(state)
    for part in PARAMETERS:
        variance = joined.pop(f"{last}.variance.{part}", None)
        if variance is not None:
            both = [t.unflatten(0, (patch**2, channels)) for t in (joined[f"{last}.{part}"], variance)]
            joined[f"{last}.{part}"] = torch.stack(both, dim=1).flatten(0, 2)
    return joined


def has_variance(rows: int, patch: int, channels: int) -> bool:
    """Return True if a last layer with this number of rows also predicts a variance."""
    return rows == patch**2 * 2 * channels


def variance_note(learned: bool) -> dict[str, str]:
    """Return the note on a learned variance."""
    return {"variance": "of ancestral steps, kept: sample.variance=learned uses it"} if learned else {}


def check_exportable(class_name: str, reasons: Mapping[str, bool]) -> None:
    """Raise UsageError that names the settings that a class of diffusers does not have."""
    if wrong := [reason for reason, true in reasons.items() if true]:
        raise UsageError(f"diffusers' {class_name} cannot hold {', '.join(wrong)}")


def has_other_base_grid(cfg: DiTConfig | PixArtConfig, inputs: InputSpec) -> bool:
    """Return True if positions refer to another grid than the training grid, for which diffusers has no setting."""
    counted = cfg.pos_embed in ("interpolated", "proportional") and inputs.pos_embed_base not in (
        None,
        inputs.resolution,
    )
    return counted or inputs.pos_embed_span is not None


def num_control(inputs: InputSpec) -> int:
    """Return the number of control variables."""
    return inputs.control.num_high + inputs.control.num_low
