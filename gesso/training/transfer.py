"""Transfer weights to another data set, condition or resolution (Berrada et al. Sections 2.2, 3.4).

Tensors are matched by name and shape: equal ones are copied, counterparts of another size are adapted, the others keep
their initialization. A report lists each group.

    class tables      one row per class, matched by name, index or a map; the null class stays the null class. A class
                      without counterpart starts as the null class: the network then generates it like an image of
                      unknown class, whereas a random row would be an unseen input. EDM2's null class is a zero vector,
                      which cannot be normalized: there, new classes are random.
    class <-> text    layers that read the class or the tokens are initialized, the following ones copied.
    channels          first and last layer are initialized, the last with F = 0 as in a new network.
    control           the part of Eq. 1 with other variables is initialized, and contributes nothing at the start.
    resolution        k times that of the source. Sine-cosine positions: net.pos_embed_base and net.pos_embed_span.
                      Tables of positions: resampled. Noise: process.resolution_scale (Proposition 1). Guidance:
                      sample.guidance_base_resolution (Proposition 2).

Legend: k ratio of latent resolutions, g side of the source's token grid, n of the new one, D width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
"""Tensors that are copied together or not at all; all others are grouped by layer."""
CONDITION_INPUT_LAYERS = r"semantic\.mlp\.0$|semantic\.mlp$|text\.linear$"
"""Layers that read the class table or the tokens."""


@dataclass
class TransferReport:
    """Result for every tensor: (names, number of parameters, note) by kind."""

    copied: list[tuple[list[str], int, str]] = field(default_factory=list)
    adapted: list[tuple[list[str], int, str]] = field(default_factory=list)
    initialized: list[tuple[list[str], int, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """of the source"""

    def lines(self) -> list[str]:
        """Return the report as lines."""
        lines = []
        for kind in ("copied", "adapted", "initialized"):
            entries = getattr(self, kind)
            tensors, numbers = sum(len(names) for names, _, _ in entries), sum(n for _, n, _ in entries)
            what = list(dict.fromkeys(note for _, _, note in entries))
            counts = f"{tensors} tensor{'s' * (tensors != 1)}, {numbers:,} parameters: " if what else "none"
            lines.append(f"  {kind:13}{counts}{'; '.join(what)}")
        if self.unused:
            names = list(dict.fromkeys(_strip_block_numbers(name) for name in self.unused))
            lines.append(
                f"  unused       {len(self.unused)} tensor{'s' * (len(self.unused) != 1)} of the source: "
                f"{', '.join(names)}"
            )
        return lines


def init_from_source(run: RunConfig, source: InitSource) -> tuple[RunConfig, Denoiser, list[str]]:
    """Return the run with its source's settings recorded, the denoiser with transferred weights, and the report.

    Raises:
        UsageError: Settings or recorded values contradict the source.
    """
    run, setting_lines = apply_source_settings(run, source)
    torch.manual_seed(rng.derive_seed(run.train.seed, 0, "initial weights"))
    denoiser = diffusion.build_denoiser(run).to(getattr(torch, run.train.dtype))
    account = transfer_weights(denoiser.net, source, run)
    assert account.copied, "a network of the same settings shares its blocks"
    notes = [f"  note         {note}" for note in source.notes]
    if run.loss.learns_uncertainty:
        notes.append("  note         the uncertainty u(s) of the loss is learned anew")
    return run, denoiser, [f"weights from {source.description}", *account.lines(), *setting_lines, *notes]


@torch.no_grad()
def transfer_weights(net: nn.Module, source: InitSource, run: RunConfig) -> TransferReport:
    """Copy the source's weights into the new network of `run` in place; normalize those on the sphere."""
    new, old, account = net.state_dict(), source.weights, TransferReport()
    used: set[str] = set()
    for unit, names in _group_tensors(new).items():
        numbers = sum(new[name].numel() for name in names)
        reason = _incompatibility(unit, run, source)
        there = reason is None and all(name in old for name in names)
        if there and (how := _adapt(names, new, source, run)):
            account.adapted.append((names, numbers, f"{_strip_block_numbers(unit)} ({how})"))
        elif there and all(new[name].shape == old[name].shape for name in names):
            for name in names:
                new[name].copy_(old[name])
            account.copied.append((names, numbers, _top_level_module(unit)))
        else:
            account.initialized.append(
                (names, numbers, f"{_strip_block_numbers(unit)} ({reason or _mismatch_reason(names, new, old)})")
            )
            continue
        used.update(names)
    account.unused = sorted(old.keys() - used)
    mp.normalize_weights_(mp.sphere_weights(net))
    return account


def _group_tensors(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return groups of tensors that are copied together or not at all."""
    groups: dict[str, list[str]] = {}
    for name in state:
        bare = name.removeprefix("trunk.")
        named = next((unit for unit, pattern in TENSOR_GROUPS.items() if re.match(pattern, bare)), None)
        layer = name if name in CLASS_TABLES else name.rpartition(".")[0]
        groups.setdefault(named or layer or name, []).append(name)
    return groups


def _strip_block_numbers(name: str) -> str:
    """Replace block numbers by *, so that equal layers share a name."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _top_level_module(group: str) -> str:
    """Return the top-level module that contains a group."""
    parts = group.split(".")
    return ".".join(parts[:2]) if parts[0] == "trunk" else parts[0]


def _mismatch_reason(tensor_names: list[str], new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> str:
    for name in tensor_names:
        if name in old and old[name].shape != new[name].shape:
            return f"{'x'.join(map(str, old[name].shape))} there, {'x'.join(map(str, new[name].shape))} here"
    return "not there"


def _incompatibility(group: str, run: RunConfig, source: InitSource) -> str | None:
    """Return why a group cannot be copied even if its shape fits (it reads another input); None if it can."""
    here, there = run.input_spec, source.input_spec
    classes = bool(here.num_classes) != bool(there.num_classes)
    if re.match(CONDITION_INPUT_LAYERS, group) and classes and here.has_semantic and there.has_semantic:
        return "reads text here, classes there" if here.text_dim else "reads classes here, text there"
    shared = isinstance(run.net, UNetConfig) and run.net.pooled_mlp == "shared"
    levels = {"control, high level": ("high",), "control, low level": ("low",)}
    if source.run and (group.startswith("control") or group == "pooled text"):
        for level in levels.get(group, ("high", "low")):
            new, old = run.control.column_names(level), source.run.control.column_names(level)
            if new != old and (group != "pooled text" or shared):
                return f"variables {','.join(new) or 'none'} here, {','.join(old) or 'none'} there"
    return None


def _adapt(tensor_names: list[str], new: Mapping[str, Tensor], source: InitSource, run: RunConfig) -> str | None:
    """Fill a group from counterparts of another size or meaning; return a note, None if that does not apply."""
    old, cfg, name = source.weights, run.net, tensor_names[0]
    if name in CLASS_TABLES:
        if (
            new[name].numel() // new[name].shape[CLASS_TABLES[name]]
            != old[name].numel() // old[name].shape[CLASS_TABLES[name]]
        ):
            return None  # of another width
        return _adapt_class_table(name, new[name], old[name], run, source)
    kinds = [(bool(i.num_classes), bool(i.text_dim)) for i in (run.input_spec, source.input_spec)]
    if isinstance(cfg, DiTAttConfig) and re.match(r"blocks\.\d+\.ada\.linear\.", name) and kinds[0] != kinds[1]:
        # Shift, scale, gate of attention first and of the MLP last; between them those of the semantic condition.
        for name in tensor_names:
            for rows in (slice(3 * cfg.hidden_size), slice(-3 * cfg.hidden_size, None)):
                new[name][rows] = old[name][rows].to(new[name])
        return "attention and MLP copied, the condition's modulation initialized"
    g, n = (
        r // cfg.patch_size if isinstance(cfg, TransformerConfig) else r
        for r in (source.resolution, run.input_spec.resolution)
    )
    if isinstance(cfg, MDTConfig) and re.search(r"position\.table$|bias\.table$", name) and g != n:
        grid = resize_bias_table if name.endswith("bias.table") else resize_position_table
        new[name].copy_(grid(old[name], new[name], g, n, run.init.pos_embed))
        return f"{run.init.pos_embed}, {g}x{g} -> {n}x{n} tokens"
    if isinstance(cfg, MMDiTConfig) and name == "position.table" and (g != n or old[name].shape != new[name].shape):
        new[name].copy_(resize_cropped_position_table(old[name], new[name].shape[1], g, n, run.init.pos_embed))
        return f"{run.init.pos_embed}, {g}x{g} -> {n}x{n} tokens"
    return None


def _adapt_class_table(name: str, new: Tensor, old: Tensor, run: RunConfig, source: InitSource) -> str | None:
    """Fill a class table row by row; return a note, None if it can be copied unchanged."""
    rows = class_mapping(run, source)
    assert rows is not None
    if new.shape == old.shape and rows == tuple(range(len(rows))):
        return None
    axis, null = CLASS_TABLES[name], name != "emb_label.weight"
    table, target = old.to(new).movedim(axis, 0), new.movedim(axis, 0)
    if isinstance(run.net, EDM2LadderConfig) and run.net.config == "C":
        table = table * (len(table) / len(target)) ** 0.5  # CONFIG C multiplies by the root of their number
    known = [i for i, row in enumerate(rows) if row is not None]
    unknown = [i for i, row in enumerate(rows) if row is None]
    target[known] = table[[rows[i] for i in known]]
    like_null = null and run.init.labels != "random"
    if null:
        target[-1] = table[-1]
    if like_null:
        target[unknown] = table[-1]
    note = f"{len(known)} of {len(rows)} classes copied" + ", and the null class" * null
    if unknown:
        names = [str(run.data.class_names[i]) if run.data.class_names else str(i) for i in unknown[:4]]
        more = ", ..." * (len(unknown) > 4)
        note += f", {len(unknown)} {'as the null class' if like_null else 'random'}: {', '.join(names)}{more}"
    if axis == 1 and not (isinstance(run.net, EDM2LadderConfig) and run.net.config < "D"):
        factor = 1 / new.square().mean(1).sqrt()
        note += f"; rows times {float(factor.min()):.3g} to {float(factor.max()):.3g}, back on the sphere"
    return note


def resize_position_table(old: Tensor, new: Tensor, g: int, n: int, method: str) -> Tensor:
    """Resize learned positions (1, g^2, D) to (1, n^2, D): corners on corners, or the source's tokens extended."""
    square, resized = old.unflatten(1, (g, g)), new.clone().unflatten(1, (n, n))
    if method == "extrapolated":
        m = min(g, n)
        resized[:, :m, :m] = square[:, :m, :m]
        return resized.flatten(1, 2)
    at = linear_interp_matrix(torch.linspace(0, g - 1, n, dtype=torch.float64), g).to(square)
    return torch.einsum("yi,bijd,xj->byxd", at, square, at).flatten(1, 2)


def resize_bias_table(old: Tensor, new: Tensor, g: int, n: int, method: str) -> Tensor:
    """Resize relative biases ((2g-1)^2 + 3, h) to ((2n-1)^2 + 3, h): largest offset on largest, or equal offsets."""
    old_side, side = 2 * g - 1, 2 * n - 1
    square, resized = old[: old_side**2].unflatten(0, (old_side, old_side)), new[: side**2].clone()
    if method == "extrapolated":
        m, resized = min(g, n), resized.unflatten(0, (side, side))
        resized[n - m : n + m - 1, n - m : n + m - 1] = square[g - m : g + m - 1, g - m : g + m - 1]
        resized = resized.flatten(0, 1)
    else:
        at = linear_interp_matrix(torch.linspace(0, old_side - 1, side, dtype=torch.float64), old_side).to(square)
        resized = torch.einsum("yi,ijh,xj->yxh", at, square, at).flatten(0, 1)
    return torch.cat([resized, old[old_side**2 :].to(resized)])


def resize_cropped_position_table(old: Tensor, side: int, g: int, n: int, method: str) -> Tensor:
    """Resize SD3's positions (1, m, m, D) to (1, side, side, D), of which a grid takes the center.

    Resampled: corners of the new training grid on those of the source. Extrapolated: the step of the source. Positions
    beyond the source's table take its edge.
    """
    m, to = old.shape[1], torch.arange(side, dtype=torch.float64)
    at = to + (m - side) // 2
    if method == "resampled":
        at = (m - g) // 2 + (to - (side - n) // 2) * ((g - 1) / max(n - 1, 1))
    weights = linear_interp_matrix(at.clamp(0, m - 1), m).to(old)
    return torch.einsum("yi,bijd,xj->byxd", weights, old, weights)
