"""One small example of every network with every kind of condition that it takes, as data.

Legend: B = 3 samples, C = 3 channels, S = 6 text tokens.
"""

from typing import NamedTuple

import torch
from conftest import awake
from torch import Tensor, nn

from gesso import nets
from gesso.cond import Cond
from gesso.config import (
    EDM2,
    MDT,
    Control,
    DiT,
    DiTAtt,
    EDM2Ladder,
    Inputs,
    MMDiT,
    MMDiTpp,
    MPDiT,
    MPMMDiTpp,
    Net,
    PixArt,
    UNet,
)

SPLIT, JOINT = Control(high=3, low=2), Control(high=3, low=2, mlp="joint")
CLASSES = 2

CONDITIONS = {
    "none": Inputs(3, 8),
    "class": Inputs(3, 8, CLASSES),
    "control": Inputs(3, 8, control=SPLIT),
    "class control": Inputs(3, 8, CLASSES, control=SPLIT),
    "class joint": Inputs(3, 8, CLASSES, control=JOINT),
    "text": Inputs(3, 8, text_width=12),
    "text control": Inputs(3, 8, text_width=12, control=SPLIT),
    "pooled": Inputs(3, 8, text_width=12, pooled_width=10),
    "pooled control": Inputs(3, 8, text_width=12, pooled_width=10, control=SPLIT),
    "pooled joint": Inputs(3, 8, text_width=12, pooled_width=10, control=JOINT),
}

LABEL = ("none", "class")
LABEL_CONTROL = (*LABEL, "control", "class control")
TEXT = (*LABEL_CONTROL, "text", "text control")
POOLED = (*TEXT, "pooled", "pooled control")

TRANSFORMER = dict(width=32, depth=2, heads=2)
LADDER = dict(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), channels_per_head=16)
UNET = dict(channels=16, multipliers=(1, 2), blocks=1, transformer_depth=(0, 1), head_width=8, groups=8)

# name: settings, all that it takes. What is not listed must be refused.
NETWORKS: dict[str, tuple[Net, tuple[str, ...]]] = {
    "edm2": (EDM2(**LADDER | dict(channels=16)), LABEL_CONTROL),
    **{f"ladder {step}": (EDM2Ladder(step=step, **LADDER), LABEL) for step in "ABCDEFG"},
    "unet": (UNet(**UNET, context=24), POOLED),
    "dit": (DiT(**TRANSFORMER), LABEL_CONTROL),
    "dit-att": (DiTAtt(**TRANSFORMER), TEXT),
    "pixart": (PixArt(**TRANSFORMER), TEXT),
    "mdt": (MDT(**TRANSFORMER | dict(depth=3), decoder=1), LABEL_CONTROL),
    "mmdit": (MMDiT(**TRANSFORMER), POOLED),
    "mmdit all": (MMDiT(**TRANSFORMER, text_weights="all"), POOLED),
    "mmdit++": (MMDiTpp(**TRANSFORMER), TEXT),
    "mmdit++ all": (MMDiTpp(**TRANSFORMER, text_weights="all"), TEXT),
    "mp-dit": (MPDiT(**TRANSFORMER), LABEL_CONTROL),
    "mp-mmdit++": (MPMMDiTpp(**TRANSFORMER), TEXT),
}

# Other settings of the same, under some conditions.
VARIANTS: dict[str, tuple[Net, tuple[str, ...]]] = {
    "unet, shared MLP": (UNet(**UNET, text_embed="none", pooled_mlp="shared"), ("pooled joint",)),
    "unet, heads": (UNet(**UNET, context=24, heads=2), ("class joint",)),
    "dit, qk-norm": (DiT(**TRANSFORMER, qk_norm=True), ("class joint",)),
    "dit-att, no qk-norm": (DiTAtt(**TRANSFORMER, qk_norm=False), ("class", "text")),
    "pixart, qk-norm": (PixArt(**TRANSFORMER, qk_norm=True), ("text",)),
    "mdt, masked": (MDT(**TRANSFORMER | dict(depth=3), decoder=1), ("none", "class control")),
    "mdt, class table": (MDT(**TRANSFORMER | dict(depth=3), decoder=1, class_embed="table"), ("class",)),
    "mmdit, joint": (MMDiT(**TRANSFORMER), ("class joint",)),
    "mmdit all, SD3": (MMDiT(**TRANSFORMER, text_weights="all", qk_norm=False, max_grid=10), ("pooled",)),
    "mmdit all, SD3.5": (MMDiT(**TRANSFORMER, text_weights="all", max_grid=10, dual_blocks=1), ("pooled",)),
}


class Row(NamedTuple):
    cfg: Net
    inputs: Inputs
    masked: bool


ROWS = {
    f"{name}: {condition}": Row(cfg, CONDITIONS[condition], name.endswith("masked"))
    for name, (cfg, conditions) in {**NETWORKS, **VARIANTS}.items()
    for condition in conditions
}


class Masked(nn.Module):
    """MDT's training pass, which keeps half of the tokens; which ones is the sample's own, as in training."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        tokens = x.shape[2] * x.shape[3] // 4
        keep = x.flatten(1)[:, :tokens].argsort(dim=1)[:, : -(-tokens // 2)]
        return self.net.masked(x, c_noise, progress, cond, keep)


def fresh(row: Row, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nets.build(row.cfg, row.inputs)
    return Masked(net) if row.masked else net


def trained(row: Row) -> nn.Module:
    """With no tensor left at zero, in float64."""
    return awake(fresh(row)).double()


def batch(row: Row, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float64):
    """x, c_noise, progress and cond, the arguments of forward. Captions of 6, 2 and 1 tokens, padded with noise."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    progress = torch.tensor([0.05, 0.4, 0.8], dtype=dtype)
    inputs, fields = row.inputs, {}
    if inputs.num_classes:
        fields["label"] = torch.tensor([0, 1, 1])
    if inputs.text_width:
        fields["text"] = randn(3, 6, inputs.text_width)
        fields["text_mask"] = torch.arange(6) < torch.tensor([[6], [2], [1]])
    if inputs.pooled_width:
        fields["pooled"] = randn(3, inputs.pooled_width)
    if inputs.control.high:
        fields["control_high"] = 4 * randn(3, inputs.control.high).abs()
        fields["control_low"] = 4 * randn(3, inputs.control.low).abs()
    c_noise = 2 * progress - 1 if row.cfg.embedding == "fourier" else 1000 * progress
    return randn(3, inputs.channels, *size), c_noise, progress, Cond(**fields)


class Silent(NamedTuple):
    """Rows first/of to last/of of the parameters that match have no gradient in the rows of the table that match."""

    rows: str
    parameter: str
    first: int
    last: int
    of: int


ONE_CLASS = r"^(unet|pixart).*: class"
SILENT = (
    # Without qk-norm a softmax does not see what is added to all of its keys.
    Silent(r"^(ladder [AB]|dit|pixart|mdt|mdt, .*|.* no qk-norm): ", r"(?<!text_)qkv\.(linear\.)?bias$", 1, 2, 3),
    Silent(r"^(pixart|.* no qk-norm): text", r"cross\.kv\.bias$", 0, 1, 2),
    # A softmax over one key, the class token, is 1.
    Silent(ONE_CLASS, r"norm_cross\.|cross(_attention)?\.q\.", 0, 1, 1),
    Silent(ONE_CLASS, r"cross(_attention)?\.kv\.", 0, 1, 2),
    # Of the semantic tokens in the last block only keys and values count, not queries, nor the gate on what they attend to.
    Silent(r"^mmdit", r"blocks\.1\.text_qkv\.linear\.", 0, 1, 3),
    Silent(r"^dit-att.*: class", r"blocks\.1\.ada\.", 5, 6, 9),
    # The side block works in the masked pass only.
    Silent(r"^mdt(?!, masked)", r"^side\.", 0, 1, 1),
)
