"""Small cases of every network with every kind of condition that it takes.

Legend: B = 3 samples, C = 3 channels, S = 6 text tokens.
"""

from typing import NamedTuple

import torch
from helpers.reference_edm2 import forward as reference_forward
from torch import Tensor, nn

from gesso import models
from gesso.conditioning import Cond
from gesso.config import (
    ControlSpec,
    DiTAttConfig,
    DiTConfig,
    EDM2Config,
    EDM2LadderConfig,
    InputSpec,
    MDTConfig,
    MMDiTConfig,
    MMDiTppConfig,
    MPDiTConfig,
    MPMMDiTppConfig,
    NetConfig,
    PixArtConfig,
    UNetConfig,
)
from gesso.models import mp

SPLIT_CONTROL, JOINT_CONTROL = ControlSpec(num_high=3, num_low=2), ControlSpec(num_high=3, num_low=2, mlp="joint")
NUM_CLASSES = 2

INPUT_SPECS = {
    "none": InputSpec(3, 8),
    "class": InputSpec(3, 8, NUM_CLASSES),
    "control": InputSpec(3, 8, control=SPLIT_CONTROL),
    "class control": InputSpec(3, 8, NUM_CLASSES, control=SPLIT_CONTROL),
    "class joint": InputSpec(3, 8, NUM_CLASSES, control=JOINT_CONTROL),
    "text": InputSpec(3, 8, text_dim=12),
    "text control": InputSpec(3, 8, text_dim=12, control=SPLIT_CONTROL),
    "pooled": InputSpec(3, 8, text_dim=12, pooled_dim=10),
    "pooled control": InputSpec(3, 8, text_dim=12, pooled_dim=10, control=SPLIT_CONTROL),
    "pooled joint": InputSpec(3, 8, text_dim=12, pooled_dim=10, control=JOINT_CONTROL),
}

LABEL_INPUTS = ("none", "class")
LABEL_CONTROL_INPUTS = (*LABEL_INPUTS, "control", "class control")
TEXT_INPUTS = (*LABEL_CONTROL_INPUTS, "text", "text control")
POOLED_INPUTS = (*TEXT_INPUTS, "pooled", "pooled control")

TRANSFORMER_SHAPE = dict(hidden_size=32, depth=2, num_heads=2)
LADDER_SHAPE = dict(channels=32, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,), channels_per_head=16)
UNET_SHAPE = dict(
    channels=16, channel_mult=(1, 2), num_blocks=1, transformer_depth=(0, 1), channels_per_head=8, norm_num_groups=8
)

# name: (settings, conditions that it takes); other conditions must be rejected.
NETWORKS: dict[str, tuple[NetConfig, tuple[str, ...]]] = {
    "edm2": (EDM2Config(**LADDER_SHAPE | dict(channels=16)), LABEL_CONTROL_INPUTS),
    **{f"ladder {step}": (EDM2LadderConfig(config=step, **LADDER_SHAPE), LABEL_INPUTS) for step in "ABCDEFG"},
    "unet": (UNetConfig(**UNET_SHAPE, context_dim=24), POOLED_INPUTS),
    "dit": (DiTConfig(**TRANSFORMER_SHAPE), LABEL_CONTROL_INPUTS),
    "dit-att": (DiTAttConfig(**TRANSFORMER_SHAPE), TEXT_INPUTS),
    "pixart": (PixArtConfig(**TRANSFORMER_SHAPE), TEXT_INPUTS),
    "mdt": (MDTConfig(**TRANSFORMER_SHAPE | dict(depth=3), decoder_layers=1), LABEL_CONTROL_INPUTS),
    "mmdit": (MMDiTConfig(**TRANSFORMER_SHAPE), POOLED_INPUTS),
    "mmdit all": (MMDiTConfig(**TRANSFORMER_SHAPE, separate_text_weights="all"), POOLED_INPUTS),
    "mmdit++": (MMDiTppConfig(**TRANSFORMER_SHAPE), TEXT_INPUTS),
    "mmdit++ all": (MMDiTppConfig(**TRANSFORMER_SHAPE, separate_text_weights="all"), TEXT_INPUTS),
    "mp-dit": (MPDiTConfig(**TRANSFORMER_SHAPE), LABEL_CONTROL_INPUTS),
    "mp-mmdit++": (MPMMDiTppConfig(**TRANSFORMER_SHAPE), TEXT_INPUTS),
}

# Other settings, under some of the conditions.
VARIANTS: dict[str, tuple[NetConfig, tuple[str, ...]]] = {
    "unet, shared MLP": (UNetConfig(**UNET_SHAPE, text_projection="none", pooled_mlp="shared"), ("pooled joint",)),
    "unet, heads": (UNetConfig(**UNET_SHAPE, context_dim=24, num_heads=2), ("class joint",)),
    "dit, qk-norm": (DiTConfig(**TRANSFORMER_SHAPE, qk_norm=True), ("class joint",)),
    "dit-att, no qk-norm": (DiTAttConfig(**TRANSFORMER_SHAPE, qk_norm=False), ("class", "text")),
    "pixart, qk-norm": (PixArtConfig(**TRANSFORMER_SHAPE, qk_norm=True), ("text",)),
    "mdt, masked": (MDTConfig(**TRANSFORMER_SHAPE | dict(depth=3), decoder_layers=1), ("none", "class control")),
    "mdt, class table": (
        MDTConfig(**TRANSFORMER_SHAPE | dict(depth=3), decoder_layers=1, class_embed="table"),
        ("class",),
    ),
    "mmdit, joint": (MMDiTConfig(**TRANSFORMER_SHAPE), ("class joint",)),
    "mmdit all, SD3": (
        MMDiTConfig(**TRANSFORMER_SHAPE, separate_text_weights="all", qk_norm=False, pos_embed_max_size=10),
        ("pooled",),
    ),
    "mmdit all, SD3.5": (
        MMDiTConfig(**TRANSFORMER_SHAPE, separate_text_weights="all", pos_embed_max_size=10, dual_attention_layers=1),
        ("pooled",),
    ),
}


class NetworkCase(NamedTuple):
    """A network, its inputs, and whether MDT's masked pass is used."""

    cfg: NetConfig
    inputs: InputSpec
    masked: bool


CASES = {
    f"{name}: {condition}": NetworkCase(cfg, INPUT_SPECS[condition], name.endswith("masked"))
    for name, (cfg, conditions) in {**NETWORKS, **VARIANTS}.items()
    for condition in conditions
}


def randomize_constants_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every constant parameter, such as zeros or ones, so that comparisons of networks can fail."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.unique().numel() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return module


class MaskedPass(nn.Module):
    """MDT's masked pass on half of the tokens, chosen by the pixels of each sample."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        tokens = x.shape[2] * x.shape[3] // 4
        keep = x.flatten(1)[:, :tokens].argsort(dim=1)[:, : -(-tokens // 2)]
        return self.net.forward_masked(x, c_noise, progress, cond, keep)


def initialized_net(case: NetworkCase, seed: int = 0) -> nn.Module:
    """Return the network with its initial weights."""
    torch.manual_seed(seed)
    net = models.build_network(case.cfg, case.inputs)
    return MaskedPass(net) if case.masked else net


def randomized_net(case: NetworkCase) -> nn.Module:
    """Return the network in float64 with no tensor at zero."""
    return randomize_constants_(initialized_net(case)).double()


def example_batch(case: NetworkCase, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float64):
    """Return x, c_noise, progress and cond; captions have 6, 2 and 1 tokens, padded with noise."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    progress = torch.tensor([0.05, 0.4, 0.8], dtype=dtype)
    inputs, fields = case.inputs, {}
    if inputs.num_classes:
        fields["label"] = torch.tensor([0, 1, 1])
    if inputs.text_dim:
        fields["text"] = randn(3, 6, inputs.text_dim)
        fields["text_mask"] = torch.arange(6) < torch.tensor([[6], [2], [1]])
    if inputs.pooled_dim:
        fields["pooled"] = randn(3, inputs.pooled_dim)
    if inputs.control.num_high:
        fields["control_high"] = 4 * randn(3, inputs.control.num_high).abs()
        fields["control_low"] = 4 * randn(3, inputs.control.num_low).abs()
    c_noise = 2 * progress - 1 if case.cfg.noise_embedding == "fourier" else 1000 * progress
    return randn(3, inputs.channels, *size), c_noise, progress, Cond(**fields)


def edm2_and_reference(dtype: torch.dtype = torch.float64):
    """Return an EDM2 network, its inputs x, c_noise and label, and the reference as a function of a state dict."""
    torch.manual_seed(0)
    cfg = EDM2Config(channels=16, channel_mult=(1, 2, 3), num_blocks=2, attention_levels=(1, 2), channels_per_head=8)
    net = randomize_constants_(models.build_network(cfg, InputSpec(3, 16, 5))).to(dtype)
    mp.normalize_weights_(mp.sphere_weights(net))
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    c_noise = torch.randn(4, dtype=dtype)
    label = torch.tensor([0, 3, 5, 4])  # 5: no class

    def reference(weights):
        one_hot = torch.nn.functional.one_hot(label, 6)[:, :5].to(dtype)
        return reference_forward(weights, x, c_noise, one_hot, levels=3, blocks=2, head_width=8)

    return net, x, c_noise, label, reference


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return numbers in (-1.7, 1.7), float64, that depend only on a name and a position (scrambled 32-bit integers)."""
    i = torch.arange(torch.Size(shape).numel())
    key = sum((k + 1) * ord(letter) for k, letter in enumerate(name)) % 65521
    h = (i * i * 2654435761 + i * 40503 + key * 2246822519) % 2**32
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    h = h ^ (h >> 13)
    return ((h.double() / 2**32 * 2 - 1) * 1.7).reshape(shape)


class ZeroGradientRows(NamedTuple):
    """Rows first/total to last/total of matching parameters have no gradient in matching cases."""

    cases: str
    parameter: str
    first: int
    last: int
    total: int


ONE_CLASS = r"^(unet|pixart).*: class"
ZERO_GRADIENT_ROWS = (
    # Without qk-norm a softmax does not depend on a constant added to all keys.
    ZeroGradientRows(
        r"^(ladder [AB]|dit|pixart|mdt|mdt, .*|.* no qk-norm): ", r"(?<!text_)qkv\.(linear\.)?bias$", 1, 2, 3
    ),
    ZeroGradientRows(r"^(pixart|.* no qk-norm): text", r"cross\.kv\.bias$", 0, 1, 2),
    # A softmax over one key, the class token, is 1.
    ZeroGradientRows(ONE_CLASS, r"norm_cross\.|cross(_attention)?\.q\.", 0, 1, 1),
    ZeroGradientRows(ONE_CLASS, r"cross(_attention)?\.kv\.", 0, 1, 2),
    # The last block uses only keys and values of the semantic tokens, not their queries and gate.
    ZeroGradientRows(r"^mmdit", r"blocks\.1\.text_qkv\.linear\.", 0, 1, 3),
    ZeroGradientRows(r"^dit-att.*: class", r"blocks\.1\.ada\.", 5, 6, 9),
    # The side block is used in the masked pass only.
    ZeroGradientRows(r"^mdt(?!, masked)", r"^side\.", 0, 1, 1),
)
