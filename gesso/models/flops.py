"""Parameters and FLOPs of a network, counted on the meta device without memory or arithmetic.

There are two conventions. `macs` are multiply-accumulates of convolutions and matrix products, including attention,
which the papers of DiT and EDM2 call flops. `table_a1_flops` follow the rule of Table A1 of Berrada et al. 2024,
inferred from its numbers: 2 per multiply-accumulate, 1 per element of a GELU or SiLU, 4 per element of a LayerNorm
without affine, 5 per element of a LayerNorm or GroupNorm with affine, 1 per element of a convolution with bias.
"""

import json
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import config, models
from gesso.conditioning import Cond
from gesso.config import InputSpec, MDTConfig, NetConfig
from gesso.errors import UsageError
from gesso.models.published import PUBLISHED_MODELS, PublishedModel, PublishedNumber

aten = torch.ops.aten

ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
"""Operations of scaled_dot_product_attention; on the meta device it is decomposed into matrix products instead."""


class FlopCounter(TorchDispatchMode):
    """Counter of `macs`, of `conv_macs` among them, and of the `elementwise` FLOPs of Table A1's rule."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.conv_macs = self.elementwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in (aten.mm, aten.bmm, aten.mv, aten.dot):
            self.macs += out.numel() * args[0].shape[-1]
        elif op in (aten.addmm, aten.baddbmm, aten.addmv):
            self.macs += out.numel() * args[1].shape[-1]
        elif op is aten.convolution:
            # Each output pixel uses one row of the weight; in a transposed convolution each input pixel does.
            weight, transposed = args[1], args[6]
            macs = (args[0] if transposed else out).numel() * weight[0].numel()
            self.macs, self.conv_macs = self.macs + macs, self.conv_macs + macs
            self.elementwise += out.numel() if args[2] is not None else 0
        elif op.__name__ in ATTENTION_OPS:
            q, k, v = args[:3]  # (..., T, d), (..., S, d), (..., S, e)
            self.macs += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        elif "scaled_dot_product" in op.__name__:
            raise NotImplementedError(f"FLOPs of {op} are not implemented")
        elif op in (aten.gelu, aten.silu):
            self.elementwise += out.numel()
        elif op is aten.native_layer_norm:
            self.elementwise += (4 if args[2] is None else 5) * args[0].numel()
        elif op is aten.native_group_norm:
            self.elementwise += (4 if args[1] is None else 5) * args[0].numel()
        return out


class ModelCost(NamedTuple):
    """Cost of a forward pass of one image."""

    parameters: int
    macs: int
    conv_macs: int
    elementwise: int

    @property
    def table_a1_flops(self) -> int:
        """FLOPs by the rule of Table A1: 2 macs + elementwise."""
        return 2 * self.macs + self.elementwise


def dummy_cond(inputs: InputSpec, num_text_tokens: int) -> Cond:
    """Return all conditions of `inputs` for one image, on torch's default device."""
    control = inputs.control
    return Cond(
        label=torch.zeros(1, dtype=torch.int64) if inputs.num_classes else None,
        text=torch.zeros(1, num_text_tokens, inputs.text_dim) if inputs.text_dim else None,
        pooled=torch.zeros(1, inputs.pooled_dim) if inputs.pooled_dim else None,
        control_high=torch.zeros(1, control.num_high) if control.num_high else None,
        control_low=torch.zeros(1, control.num_low) if control.num_low else None,
    )


def count_flops(cfg: NetConfig, inputs: InputSpec, num_text_tokens: int = 77) -> ModelCost:
    """Return parameters and FLOPs of a network for one image of `inputs.resolution`; errors as for `build_network`."""
    with torch.device("meta"), torch.no_grad():
        net = models.build_network(cfg, inputs).eval()
        x = torch.zeros(1, inputs.channels, inputs.resolution, inputs.resolution)
        with FlopCounter() as counter:
            net(x, torch.zeros(1), torch.zeros(1), dummy_cond(inputs, num_text_tokens))
    parameters = sum(p.numel() for p in net.parameters())
    return ModelCost(parameters, counter.macs, counter.conv_macs, counter.elementwise)


def training_macs(cfg: NetConfig, inputs: InputSpec, num_text_tokens: int = 77) -> int:
    """Return the multiply-accumulates of the forward passes of one training image, including MDT's masked pass."""
    with torch.device("meta"), torch.no_grad():
        net = models.build_network(cfg, inputs)
        x = torch.zeros(1, inputs.channels, inputs.resolution, inputs.resolution)
        args = (x, torch.zeros(1), torch.zeros(1), dummy_cond(inputs, num_text_tokens))
        with FlopCounter() as counter:
            net(*args)
            if isinstance(cfg, MDTConfig) and isinstance(net, models.MDT):
                num_visible = round((inputs.resolution // cfg.patch_size) ** 2 * (1 - sum(cfg.mask_ratio) / 2))
                net.forward_masked(*args, torch.zeros(1, max(1, num_visible), dtype=torch.int64))
    return counter.macs


class SizeRow(NamedTuple):
    """Published number and the computed one, which is None for networks that gesso does not have.

    `within_tolerance` is low <= computed / published <= high.
    """

    model: str
    net: str
    pixels: int
    quantity: str
    computed: int | None
    published: float
    ratio: float | None
    low: float
    high: float
    within_tolerance: bool
    trust: str
    source: str
    note: str


def size_table(names: list[str] | None = None) -> list[SizeRow]:
    """Return the rows of the published models whose names start with one of `names`, by default of all.

    Raises:
        UsageError: No model's name starts with one of `names`.
    """
    known = [p.name for p in PUBLISHED_MODELS]
    for name in names or ():
        if not any(k.startswith(name) for k in known):
            raise UsageError(f"no published model is named {name}; {config.suggest(name, known)}")
    chosen = [p for p in PUBLISHED_MODELS if not names or p.name.startswith(tuple(names))]
    return [row for published in chosen for row in model_rows(published)]


def model_rows(published: PublishedModel) -> list[SizeRow]:
    """Return a row for each published number of a model."""
    costs: dict[int, ModelCost | None] = {}
    for pixels in dict.fromkeys(number.pixels for number in published.numbers):
        inputs = published.inputs._replace(resolution=pixels // 8)  # latents
        built = type(published.net) in models.NETWORKS
        costs[pixels] = count_flops(published.net, inputs, published.num_text_tokens) if built else None
    return [number_row(published, number, costs[number.pixels]) for number in published.numbers]


def number_row(published: PublishedModel, number: PublishedNumber, cost: ModelCost | None) -> SizeRow:
    """Return the row of a published number; `cost` is None for a network that gesso does not have."""
    notes = [number.note] if number.note else []
    if number.quantity == "parameters":
        notes += [
            f"{'with' if n > 0 else 'less'} {abs(n):,}: {label}" for label, n in published.extra_parameters.items()
        ]
    low, high = number.ratio_bounds
    computed, ratio, within = None, None, False
    if cost is None:
        notes = ["not built"]
    else:
        extra = sum(published.extra_parameters.values()) if number.quantity == "parameters" else 0
        computed = getattr(cost, number.quantity) + extra
        ratio = computed / number.value
        within = low * (number.value - number.rounding) <= computed <= high * (number.value + number.rounding)
    return SizeRow(
        published.name, published.net.name, number.pixels, number.quantity, computed, number.value, ratio, low, high,
        within, number.trust, number.source, "; ".join(notes),
    )  # fmt: skip


UNITS = {"parameters": (1e6, "M parameters"), "macs": (1e9, "G macs"), "table_a1_flops": (1e9, "G flops"),
         "conv_macs": (1e9, "G macs, conv.")}  # fmt: skip


def render_table(rows: list[SizeRow], as_json: bool = False) -> str:
    """Return the table as text with its notes, or as JSON."""
    if as_json:
        return json.dumps([row._asdict() for row in rows], indent=1)
    cells = [("model", "pixels", "quantity", "gesso", "published", "ratio", "met", "trust", "source", "note")]
    notes: dict[str, int] = {}
    last = ""
    for row in rows:
        scale, unit = UNITS[row.quantity]
        computed = "-" if row.computed is None else f"{row.computed / scale:.3f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.4f}"
        met = "-" if row.computed is None else "yes" if row.within_tolerance else "NO"
        note = f"[{notes.setdefault(row.note, len(notes) + 1)}]" if row.note else ""
        name = row.model if row.model != last else ""
        published = f"{row.published / scale:.3f}"
        cells.append((name, str(row.pixels), unit, computed, published, ratio, met, row.trust, row.source, note))
        last = row.model
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = {1, 3, 4, 5}
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    built = [row for row in rows if row.computed is not None]
    missed = [row for row in built if not row.within_tolerance]
    lines += [""] + [f"[{n}] {note}" for note, n in notes.items()]
    lines += [
        f"{len(built) - len(missed)} of {len(built)} met"
        + (f"; {len(rows) - len(built)} not built" if len(rows) > len(built) else "")
    ]
    lines += [
        f"not met: {row.model} {row.pixels} {row.quantity}: ratio {row.ratio:.4f}, "
        f"{row.low:.4g} to {row.high:.4g} allowed ({row.trust} trust)"
        for row in missed
    ]
    return "\n".join(line.rstrip() for line in lines)
