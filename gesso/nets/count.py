"""Parameters and FLOPs of a network, on the meta device: no memory, no arithmetic.

Two conventions. macs: multiply-accumulates of convolutions and matrix products, those of attention
included, which DiT's and EDM2's papers call flops. paper: the rule behind Table A1 of Berrada et al. 2024,
2 per multiply-accumulate + 1 per element of a GELU or SiLU + 4 per element of a LayerNorm without affine,
which its transformers give away, + 5 per element of a LayerNorm or GroupNorm with affine + 1 per element that
a convolution adds a bias to, without which its U-Nets stay .06 % short.
"""

import json
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import config, nets
from gesso.cond import Cond
from gesso.config import MDT, Inputs, Net
from gesso.errors import UsageError
from gesso.nets.published import PUBLISHED, Figure, Published

aten = torch.ops.aten

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
"""What scaled_dot_product_attention becomes where it stays one operation. Elsewhere, as on the meta device,
its two matrix products are seen as such."""


class FlopCounter(TorchDispatchMode):
    """Counts what is run under it: `macs`, of them `convolutions`, and `elementwise` FLOPs of Table A1's rule."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.convolutions = self.elementwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in (aten.mm, aten.bmm, aten.mv, aten.dot):
            self.macs += out.numel() * args[0].shape[-1]
        elif op in (aten.addmm, aten.baddbmm, aten.addmv):
            self.macs += out.numel() * args[1].shape[-1]
        elif op is aten.convolution:
            # One output pixel takes a row of the weight; transposed, one input pixel gives to a row.
            weight, transposed = args[1], args[6]
            macs = (args[0] if transposed else out).numel() * weight[0].numel()
            self.macs, self.convolutions = self.macs + macs, self.convolutions + macs
            self.elementwise += out.numel() if args[2] is not None else 0
        elif op.__name__ in ATTENTION:
            q, k, v = args[:3]  # (..., T, d), (..., S, d), (..., S, e)
            self.macs += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        elif "scaled_dot_product" in op.__name__:
            raise NotImplementedError(f"the FLOPs of {op} are not counted yet")
        elif op in (aten.gelu, aten.silu):
            self.elementwise += out.numel()
        elif op is aten.native_layer_norm:
            self.elementwise += (4 if args[2] is None else 5) * args[0].numel()
        elif op is aten.native_group_norm:
            self.elementwise += (4 if args[1] is None else 5) * args[0].numel()
        return out


class Count(NamedTuple):
    """One forward pass of one image. paper = 2 macs + elementwise."""

    parameters: int
    macs: int
    convolutions: int
    elementwise: int

    @property
    def paper(self) -> int:
        return 2 * self.macs + self.elementwise


def conditions(inputs: Inputs, tokens: int) -> Cond:
    """All the conditions that `inputs` promises, for one image on the current default device."""
    control = inputs.control
    return Cond(
        label=torch.zeros(1, dtype=torch.int64) if inputs.num_classes else None,
        text=torch.zeros(1, tokens, inputs.text_width) if inputs.text_width else None,
        pooled=torch.zeros(1, inputs.pooled_width) if inputs.pooled_width else None,
        control_high=torch.zeros(1, control.high) if control.high else None,
        control_low=torch.zeros(1, control.low) if control.low else None,
    )


def count(cfg: Net, inputs: Inputs, tokens: int = 77) -> Count:
    """Parameters and FLOPs of a network on one image of `inputs.resolution`, with `tokens` text tokens.

    Raises ValueError as `gesso.nets.build` does.
    """
    with torch.device("meta"), torch.no_grad():
        net = nets.build(cfg, inputs).eval()
        x = torch.zeros(1, inputs.channels, inputs.resolution, inputs.resolution)
        with FlopCounter() as counter:
            net(x, torch.zeros(1), torch.zeros(1), conditions(inputs, tokens))
    parameters = sum(p.numel() for p in net.parameters())
    return Count(parameters, counter.macs, counter.convolutions, counter.elementwise)


def training_macs(cfg: Net, inputs: Inputs, tokens: int = 77) -> int:
    """Multiply-accumulates of the forward passes of one image in training: MDT has a second one, which keeps some tokens."""
    with torch.device("meta"), torch.no_grad():
        net = nets.build(cfg, inputs)
        x = torch.zeros(1, inputs.channels, inputs.resolution, inputs.resolution)
        given = (x, torch.zeros(1), torch.zeros(1), conditions(inputs, tokens))
        with FlopCounter() as counter:
            net(*given)
            if isinstance(cfg, MDT):
                kept = round((inputs.resolution // cfg.patch) ** 2 * (1 - sum(cfg.mask_ratio) / 2))
                net.masked(*given, torch.zeros(1, max(1, kept), dtype=torch.int64))
    return counter.macs


class Row(NamedTuple):
    """One published number beside ours. met: low <= ours / published <= high. ours is None where not built."""

    model: str
    net: str
    pixels: int
    quantity: str
    ours: int | None
    published: float
    ratio: float | None
    low: float
    high: float
    met: bool
    trust: str
    source: str
    note: str


def table(names: list[str] | None = None) -> list[Row]:
    """The rows of the published models whose names start with one of `names`; all of them by default.

    Raises UsageError when a name fits none.
    """
    known = [p.name for p in PUBLISHED]
    for name in names or ():
        if not any(k.startswith(name) for k in known):
            raise UsageError(f"no published model is named {name}; {config.nearest(name, known)}")
    chosen = [p for p in PUBLISHED if not names or p.name.startswith(tuple(names))]
    return [row for published in chosen for row in rows_of(published)]


def rows_of(published: Published) -> list[Row]:
    counts: dict[int, Count | None] = {}
    # Latents have an eighth of the image's side.
    for pixels in dict.fromkeys(figure.pixels for figure in published.figures):
        inputs = published.inputs._replace(resolution=pixels // 8)
        built = type(published.net) in nets.NETS
        counts[pixels] = count(published.net, inputs, published.tokens) if built else None
    return [row_of(published, figure, counts[figure.pixels]) for figure in published.figures]


def row_of(published: Published, figure: Figure, counted: Count | None) -> Row:
    notes = [figure.note] if figure.note else []
    if figure.quantity == "parameters":
        notes += [f"{'with' if n > 0 else 'less'} {abs(n):,}: {what}" for what, n in published.elsewhere.items()]
    low, high = figure.bounds
    if counted is None:
        ours, ratio, met, notes = None, None, False, ["not built"]
    else:
        ours = getattr(counted, figure.quantity)
        if figure.quantity == "parameters":
            ours += sum(published.elsewhere.values())
        ratio = ours / figure.value
        met = ours >= low * (figure.value - figure.rounding) and ours <= high * (figure.value + figure.rounding)
    return Row(
        published.name, published.net.name, figure.pixels, figure.quantity, ours, figure.value, ratio, low, high,
        met, figure.trust, figure.source, "; ".join(notes),
    )  # fmt: skip


UNITS = {"parameters": (1e6, "M parameters"), "macs": (1e9, "G macs"), "paper": (1e9, "G flops"),
         "convolutions": (1e9, "G macs, conv.")}  # fmt: skip


def render(rows: list[Row], as_json: bool = False) -> str:
    """The table as plain text, notes below it; or as JSON."""
    if as_json:
        return json.dumps([row._asdict() for row in rows], indent=1)
    cells = [("model", "pixels", "quantity", "ours", "published", "ratio", "met", "trust", "source", "note")]
    notes: dict[str, int] = {}
    last = ""
    for row in rows:
        scale, unit = UNITS[row.quantity]
        ours = "-" if row.ours is None else f"{row.ours / scale:.3f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.4f}"
        met = "-" if row.ours is None else "yes" if row.met else "NO"
        note = f"[{notes.setdefault(row.note, len(notes) + 1)}]" if row.note else ""
        name = row.model if row.model != last else ""
        published = f"{row.published / scale:.3f}"
        cells.append((name, str(row.pixels), unit, ours, published, ratio, met, row.trust, row.source, note))
        last = row.model
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = {1, 3, 4, 5}
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    built = [row for row in rows if row.ours is not None]
    missed = [row for row in built if not row.met]
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
