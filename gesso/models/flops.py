"""Parameters and FLOPs of a network, counted on the meta device without memory or arithmetic.

There are two conventions. `macs` are multiply-accumulates of convolutions and matrix products, including attention,
which the papers of DiT and EDM2 call flops. `table_a1_flops` follow the rule of Table A1 of Berrada et al. 2024,
inferred from its numbers: 2 per multiply-accumulate, 1 per element of a GELU or SiLU, 4 per element of a LayerNorm
without affine, 5 per element of a LayerNorm or GroupNorm with affine, 1 per element of a convolution with bias.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gesso import config, models
from gesso.conditioning import Cond
from gesso.config import InputSpec, MDTConfig, NetConfig
from gesso.errors import UsageError
from gesso.models.published import PUBLISHED_MODELS, PublishedModel, PublishedNumber

aten = torch.ops.aten


def _activation_flops(x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return x.numel()


def _layer_norm_flops(
    x: torch.Size, normalized: list[int], weight: torch.Size | None, *args: Any, **kwargs: Any
) -> int:
    return (4 if weight is None else 5) * x.numel()


def _group_norm_flops(x: torch.Size, weight: torch.Size | None, *args: Any, **kwargs: Any) -> int:
    return (4 if weight is None else 5) * x.numel()


def _conv_bias_flops(
    x: torch.Size, weight: torch.Size, bias: torch.Size | None, *args: Any, out_shape: torch.Size, **kwargs: Any
) -> int:
    return 0 if bias is None else out_shape.numel()


TABLE_A1_ELEMENTWISE = {
    aten.gelu: _activation_flops,
    aten.silu: _activation_flops,
    aten.native_layer_norm: _layer_norm_flops,
    aten.native_group_norm: _group_norm_flops,
    aten.convolution: _conv_bias_flops,
}
"""FLOPs of an operation besides its multiply-accumulates by the rule of Table A1, from the shapes of its arguments."""


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


def _dummy_inputs(inputs: InputSpec, num_text_tokens: int) -> tuple[Tensor, Tensor, Tensor, Cond]:
    """Return x, c_noise, progress and all conditions of `inputs` for one image, on torch's default device."""
    control = inputs.control
    cond = Cond(
        label=torch.zeros(1, dtype=torch.int64) if inputs.num_classes else None,
        text=torch.zeros(1, num_text_tokens, inputs.text_dim) if inputs.text_dim else None,
        pooled=torch.zeros(1, inputs.pooled_dim) if inputs.pooled_dim else None,
        control_high=torch.zeros(1, control.num_high) if control.num_high else None,
        control_low=torch.zeros(1, control.num_low) if control.num_low else None,
    )
    return torch.zeros(1, inputs.channels, inputs.resolution, inputs.resolution), torch.zeros(1), torch.zeros(1), cond


def count_flops(cfg: NetConfig, inputs: InputSpec, num_text_tokens: int = 77) -> ModelCost:
    """Return parameters and FLOPs of a network for one image of `inputs.resolution`; errors as for `build_network`."""
    with torch.device("meta"):
        net = models.build_network(cfg, inputs).eval()
        macs, conv_macs, elementwise = count_operations(net, *_dummy_inputs(inputs, num_text_tokens))
    return ModelCost(sum(p.numel() for p in net.parameters()), macs, conv_macs, elementwise)


def training_macs(cfg: NetConfig, inputs: InputSpec, num_text_tokens: int = 77) -> int:
    """Return the multiply-accumulates of the forward passes of one training image, including MDT's masked pass."""
    macs = count_flops(cfg, inputs, num_text_tokens).macs
    if isinstance(cfg, MDTConfig):
        num_visible = round((inputs.resolution // cfg.patch_size) ** 2 * (1 - sum(cfg.mask_ratio) / 2))
        with torch.device("meta"):
            net, keep_ids = models.MDT(cfg, inputs), torch.zeros(1, max(1, num_visible), dtype=torch.int64)
            macs += count_operations(net.forward_masked, *_dummy_inputs(inputs, num_text_tokens), keep_ids)[0]
    return macs


@torch.no_grad()
def count_operations(function: Callable[..., Tensor], *args: Tensor | Cond) -> tuple[int, int, int]:
    """Return `macs`, those of convolutions among them, and the elementwise FLOPs of Table A1, of `function(*args)`."""
    products = FlopCounterMode(display=False)  # counts 2 per multiply-accumulate, and nothing else
    table_a1 = FlopCounterMode(display=False, custom_mapping=TABLE_A1_ELEMENTWISE)
    with products, table_a1:
        function(*args)
    conv_flops = products.get_flop_counts().get("Global", {}).get(aten.convolution, 0)
    counts = table_a1.get_flop_counts().get("Global", {})
    elementwise = sum(count for op, count in counts.items() if op in TABLE_A1_ELEMENTWISE)
    return products.get_total_flops() // 2, conv_flops // 2, elementwise


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
