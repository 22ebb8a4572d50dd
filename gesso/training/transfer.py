"""Transfer weights to another data set, condition or resolution (Berrada et al. Sections 2.2, 3.4).

Tensors are matched by name and shape: equal shapes are copied, tensors of another size are adapted, and the others keep
their initialization. A report lists each group.

    class tables      One row per class, matched by name, index or a mapping; the null class stays the null class. A
                      class without counterpart starts as the null class: the network then generates it like an image
                      of unknown class, whereas a random row would be an unseen input. EDM2's null class is a zero
                      vector, which cannot be normalized: its new classes are random.
    class <-> text    Layers that read the class or the tokens are initialized, the following ones copied.
    channels          First and last layer are initialized, the last with F = 0 as in a new network.
    control           The part of Eq. 1 with other variables is initialized, and contributes nothing at the start.
    resolution        k times that of the source. Sine-cosine positions: net.pos_embed_base and net.pos_embed_span.
                      Tables of positions: resampled. Noise: process.resolution_scale (Proposition 1). Guidance:
                      sample.guidance_base_resolution (Proposition 2).

Legend: k ratio of latent resolutions, g side of the source's token grid, n of the new one, D width.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso import rng
from gesso.config import DiTAttConfig, EDM2LadderConfig, MDTConfig, MMDiTConfig, RunConfig, UNetConfig
from gesso.config.net import TransformerConfig
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion.denoiser import Denoiser
from gesso.models import mp
from gesso.models.mdt import linear_interp_matrix
from gesso.training.init_source import InitSource
from gesso.training.transfer_config import apply_source_settings, class_mapping

CLASS_TABLES = {"table.weight": 0, "semantic.table.weight": 0, "label.linear.weight": 1, "emb_label.weight": 1}
"""Class tables and their class dimension; the last row is the null class, except in EDM2."""
TENSOR_GROUPS = {
    "first layer": r"patch_embed\.|conv_in\.|downsamplers\.0\.",
    "last layer": r"final\.|conv_out\.|out\.weight$|out_gain$|upsamplers\.\d+\.2\.",
    "control, both levels": r"(emb_)?control\.(first|second|gain)|control\.mlps\.all\.",
    "control, high level": r"control\.mlps\.high\.",
    "control, low level": r"control\.mlps\.low\.",
    "pooled text": r"pooled\.",
}
"""Names and patterns of tensors that are copied together or not at all; all others are grouped by layer."""
CONDITION_INPUT_LAYERS = r"semantic\.mlp\.0$|semantic\.mlp$|text\.linear$"
"""Layers that read the class table or the tokens."""


class TensorGroup(NamedTuple):
    """Tensors of the new network that are transferred together or not at all, and a note for the report."""

    names: list[str]
    num_parameters: int
    note: str


class TransferReport:
    """Groups of tensors by what became of them, and the names of unused tensors of the source."""

    def __init__(self) -> None:
        self.groups: dict[str, list[TensorGroup]] = {"copied": [], "adapted": [], "initialized": []}
        self.unused: list[str] = []

    def lines(self) -> list[str]:
        """Return the report as lines."""
        lines = []
        for kind, groups in self.groups.items():
            num_tensors, num_parameters = sum(len(g.names) for g in groups), sum(g.num_parameters for g in groups)
            notes = "; ".join(dict.fromkeys(group.note for group in groups))
            counts = f"{num_tensors} tensor{'s' * (num_tensors != 1)}, {num_parameters:,} parameters: {notes}"
            lines.append(f"  {kind:13}{counts if groups else 'none'}")
        if self.unused:
            names = ", ".join(dict.fromkeys(_strip_block_numbers(name) for name in self.unused))
            plural = "s" * (len(self.unused) != 1)
            lines.append(f"  unused       {len(self.unused)} tensor{plural} of the source: {names}")
        return lines


def init_from_source(run: RunConfig, source: InitSource) -> tuple[RunConfig, Denoiser, list[str]]:
    """Return the run with its source's settings recorded, the denoiser with transferred weights, and a report.

    Raises:
        UsageError: Settings or recorded values contradict the source.
    """
    run, setting_lines = apply_source_settings(run, source)
    torch.manual_seed(rng.derive_seed(run.train.seed, 0, "initial weights"))
    denoiser = diffusion.build_denoiser(run).to(getattr(torch, run.train.dtype))
    report = transfer_weights(denoiser.net, source, run)
    assert report.groups["copied"], "networks of equal settings have blocks of equal shapes"
    notes = [f"  note         {note}" for note in source.notes]
    if run.loss.learns_uncertainty:
        notes.append("  note         the uncertainty u(s) of the loss is initialized")
    return run, denoiser, [f"weights from {source.description}", *report.lines(), *setting_lines, *notes]


@torch.no_grad()
def transfer_weights(net: nn.Module, source: InitSource, run: RunConfig) -> TransferReport:
    """Copy the source's weights into the new network of `run` in place; normalize those on the sphere."""
    new, old, report = net.state_dict(), source.weights, TransferReport()
    used: set[str] = set()
    for group, names in _group_tensors(new).items():
        reason = _incompatibility(group, run, source)
        in_source = reason is None and all(name in old for name in names)
        if in_source and (adaptation := _adapt(names, new, source, run)):
            kind, note = "adapted", f"{_strip_block_numbers(group)} ({adaptation})"
        elif in_source and all(new[name].shape == old[name].shape for name in names):
            for name in names:
                new[name].copy_(old[name])
            kind, note = "copied", _top_level_module(group)
        else:
            reason = reason or _mismatch_reason(names, new, old)
            kind, note = "initialized", f"{_strip_block_numbers(group)} ({reason})"
        if kind != "initialized":
            used.update(names)
        report.groups[kind].append(TensorGroup(names, sum(new[name].numel() for name in names), note))
    report.unused = sorted(old.keys() - used)
    mp.normalize_weights_(mp.sphere_weights(net))
    return report


def _group_tensors(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of tensors that are copied together or not at all, by group."""
    groups: dict[str, list[str]] = {}
    for name in state:
        bare_name = name.removeprefix("trunk.")
        group = next((group for group, pattern in TENSOR_GROUPS.items() if re.match(pattern, bare_name)), None)
        layer = name if name in CLASS_TABLES else name.rpartition(".")[0]
        groups.setdefault(group or layer or name, []).append(name)
    return groups


def _strip_block_numbers(name: str) -> str:
    """Replace block numbers by *, so that equal layers of all blocks share a name."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _top_level_module(group: str) -> str:
    """Return the top-level module that contains a group."""
    parts = group.split(".")
    return ".".join(parts[:2]) if parts[0] == "trunk" else parts[0]


def _mismatch_reason(names: list[str], new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> str:
    for name in names:
        if name in old and old[name].shape != new[name].shape:
            return f"{'x'.join(map(str, new[name].shape))}, in the source {'x'.join(map(str, old[name].shape))}"
    return "not in the source"


def _incompatibility(group: str, run: RunConfig, source: InitSource) -> str | None:
    """Return why a group cannot be copied even if its shapes are equal; None if it can.

    The reason is that it reads another input in the source.
    """
    new, old = run.input_spec, source.input_spec
    if re.match(CONDITION_INPUT_LAYERS, group) and new.has_semantic and old.has_semantic:
        if new.num_classes and not old.num_classes:
            return "reads classes, in the source text"
        if old.num_classes and not new.num_classes:
            return "reads text, in the source classes"
    if not source.run or not (group.startswith("control") or group == "pooled text"):
        return None
    if group == "pooled text" and not (isinstance(run.net, UNetConfig) and run.net.pooled_mlp == "shared"):
        return None
    levels = {"control, high level": ("high",), "control, low level": ("low",)}
    for level in levels.get(group, ("high", "low")):
        variables, source_variables = run.control.column_names(level), source.run.control.column_names(level)
        if variables != source_variables:
            return f"variables {','.join(variables) or 'none'}, in the source {','.join(source_variables) or 'none'}"
    return None


def _adapt(names: list[str], new: Mapping[str, Tensor], source: InitSource, run: RunConfig) -> str | None:
    """Fill a group from tensors of another size or meaning; return a note, None if that does not apply."""
    old, cfg, name = source.weights, run.net, names[0]
    if name in CLASS_TABLES:
        class_dim = CLASS_TABLES[name]
        if new[name].numel() // new[name].shape[class_dim] != old[name].numel() // old[name].shape[class_dim]:
            return None  # networks of different widths
        return _adapt_class_table(name, new[name], old[name], run, source)
    inputs, source_inputs = ((bool(i.num_classes), bool(i.text_dim)) for i in (run.input_spec, source.input_spec))
    if isinstance(cfg, DiTAttConfig) and re.match(r"blocks\.\d+\.ada\.linear\.", name) and inputs != source_inputs:
        # Shift, scale, gate of attention come first and of the MLP last; between them those of the condition.
        for name in names:
            for rows in (slice(3 * cfg.hidden_size), slice(-3 * cfg.hidden_size, None)):
                new[name][rows] = old[name][rows].to(new[name])
        return "attention and MLP copied, the condition's modulation initialized"
    patch_size = cfg.patch_size if isinstance(cfg, TransformerConfig) else 1
    g, n, method = source.resolution // patch_size, run.input_spec.resolution // patch_size, run.init.pos_embed
    if isinstance(cfg, MDTConfig) and re.search(r"position\.table$|bias\.table$", name) and g != n:
        resize = resize_relative_bias if name.endswith("bias.table") else resize_pos_embed
        new[name].copy_(resize(old[name], new[name], g, n, method))
        return f"{method}, {g}x{g} -> {n}x{n} tokens"
    if isinstance(cfg, MMDiTConfig) and name == "position.table" and (g != n or old[name].shape != new[name].shape):
        new[name].copy_(resize_cropped_pos_embed(old[name], new[name].shape[1], g, n, method))
        return f"{method}, {g}x{g} -> {n}x{n} tokens"
    return None


def _adapt_class_table(name: str, new: Tensor, old: Tensor, run: RunConfig, source: InitSource) -> str | None:
    """Fill a class table row by row; return a note, None if it can be copied unchanged."""
    mapping = class_mapping(run, source)
    assert mapping is not None
    if new.shape == old.shape and mapping == tuple(range(len(mapping))):
        return None
    class_dim, has_null_row = CLASS_TABLES[name], name != "emb_label.weight"
    config = run.net.config if isinstance(run.net, EDM2LadderConfig) else None
    table, target = old.to(new).movedim(class_dim, 0), new.movedim(class_dim, 0)
    if config == "C":
        table = table * (len(table) / len(target)) ** 0.5  # CONFIG C multiplies by the root of the number of classes
    known = [i for i, source_class in enumerate(mapping) if source_class is not None]
    unknown = [i for i, source_class in enumerate(mapping) if source_class is None]
    target[known] = table[[mapping[i] for i in known]]
    if has_null_row:
        target[-1] = table[-1]
    starts_as_null = has_null_row and run.init.labels != "random"
    if starts_as_null:
        target[unknown] = table[-1]
    note = f"{len(known)} of {len(mapping)} classes copied" + ", and the null class" * has_null_row
    if unknown:
        names = [str(run.data.class_names[i]) if run.data.class_names else str(i) for i in unknown[:4]]
        more = ", ..." * (len(unknown) > 4)
        note += f", {len(unknown)} {'as the null class' if starts_as_null else 'random'}: {', '.join(names)}{more}"
    if class_dim == 1 and (config is None or config >= "D"):
        factor = 1 / new.square().mean(1).sqrt()
        note += f"; rows times {float(factor.min()):.3g} to {float(factor.max()):.3g}, normalized"
    return note


def resize_pos_embed(old: Tensor, new: Tensor, g: int, n: int, method: str) -> Tensor:
    """Return learned positions (1, g^2, D) for n^2 tokens, (1, n^2, D).

    "resampled" interpolates so that the corners of both grids coincide; "extrapolated" keeps the source's tokens and
    takes the others from `new`.
    """
    square, resized = old.unflatten(1, (g, g)), new.clone().unflatten(1, (n, n))
    if method == "extrapolated":
        m = min(g, n)
        resized[:, :m, :m] = square[:, :m, :m]
        return resized.flatten(1, 2)
    weights = linear_interp_matrix(torch.linspace(0, g - 1, n, dtype=torch.float64), g).to(square)
    return torch.einsum("yi,bijd,xj->byxd", weights, square, weights).flatten(1, 2)


def resize_relative_bias(old: Tensor, new: Tensor, g: int, n: int, method: str) -> Tensor:
    """Return relative biases ((2g-1)^2 + 3, h) for n^2 tokens, ((2n-1)^2 + 3, h), with h heads.

    "resampled" interpolates so that the largest offsets of both grids coincide; "extrapolated" copies equal offsets.
    """
    old_side, side = 2 * g - 1, 2 * n - 1
    square, resized = old[: old_side**2].unflatten(0, (old_side, old_side)), new[: side**2].clone()
    if method == "extrapolated":
        m, resized = min(g, n), resized.unflatten(0, (side, side))
        resized[n - m : n + m - 1, n - m : n + m - 1] = square[g - m : g + m - 1, g - m : g + m - 1]
        resized = resized.flatten(0, 1)
    else:
        weights = linear_interp_matrix(torch.linspace(0, old_side - 1, side, dtype=torch.float64), old_side).to(square)
        resized = torch.einsum("yi,ijh,xj->yxh", weights, square, weights).flatten(0, 1)
    return torch.cat([resized, old[old_side**2 :].to(resized)])


def resize_cropped_pos_embed(old: Tensor, side: int, g: int, n: int, method: str) -> Tensor:
    """Return SD3's positions (1, m, m, D) as (1, side, side, D); a grid of tokens uses their center.

    "resampled" interpolates so that the corners of the new training grid and the source's coincide; "extrapolated"
    keeps the source's spacing. Positions beyond the source's table repeat its edge.
    """
    m, index = old.shape[1], torch.arange(side, dtype=torch.float64)
    coords = index + (m - side) // 2
    if method == "resampled":
        coords = (m - g) // 2 + (index - (side - n) // 2) * ((g - 1) / max(n - 1, 1))
    weights = linear_interp_matrix(coords.clamp(0, m - 1), m).to(old)
    return torch.einsum("yi,bijd,xj->byxd", weights, old, weights)
