"""SD1.5's and SDXL's U-Net, of diffusers' UNet2DConditionModel, as ours."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gesso.config import Control, Inputs, UNet
from gesso.errors import UsageError
from gesso.interop.found import Found, count, shape

PARTS = {
    "norm1": "norm0", "conv1": "conv0", "time_emb_proj": "emb", "norm2": "norm1", "conv2": "conv1",
    "conv_shortcut": "skip",
}  # fmt: skip
BLOCK_PARTS = {
    "norm1": "norm_self", "attn1": "self_attention", "norm2": "norm_cross", "attn2": "cross_attention",
    "norm3": "norm_mlp",
}  # fmt: skip
EMBEDDINGS = {"time_embedding": "time", "add_embedding": "pooled.mlp", "class_embedding": "control.mlps.all"}
SIZES = Control(high=4, low=2, mlp="joint")
"""SDXL's six numbers: original size and top left of the crop, then target size."""


def matches(keys: set[str]) -> bool:
    own = {"conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"}
    return keys >= own and any(key.endswith(".attn2.to_k.weight") for key in keys)


def our_name(key: str, levels: int) -> str:
    """The place of their tensor in UNetNet, q, k and v still apart; the key itself where it has none."""
    if match := re.fullmatch(r"(time|add|class)_embedding\.linear_([12])\.(\w+)", key):
        return f"{EMBEDDINGS[match[1] + '_embedding']}.{2 * int(match[2]) - 2}.{match[3]}"
    if match := re.fullmatch(r"(conv_in|conv_norm_out|conv_out)\.(\w+)", key):
        place = {
            "conv_in": "ways_in.0",
            "conv_norm_out": f"ways_out.{levels - 1}.0",
            "conv_out": f"ways_out.{levels - 1}.2",
        }
        return f"{place[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", key):
        return f"ways_in.{int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", key):
        return f"ways_out.{match[1]}.1.{match[2]}"
    match = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key)
    if match is None:
        return key
    place, kind, i, rest = match.groups()
    place = place.replace("down_blocks", "down").replace("up_blocks", "up").replace("mid_block", "middle")
    if kind == "resnets":
        part, _, tensor = rest.partition(".")
        return f"{place}.{i}.residual.{PARTS[part]}.{tensor}" if part in PARTS else key
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(\w+)\.(.+)", rest):
        j, part, tensor = match.groups()
        if part == "ff":
            inner = "mlp." + tensor.replace("net.0.proj", "expand").replace("net.2", "out")
        elif part in BLOCK_PARTS:
            tensor = tensor.replace("to_out.0", "out")
            tensor = tensor.replace("to_q", "q") if part == "attn2" else tensor
            inner = f"{BLOCK_PARTS[part]}.{tensor}"
        else:
            return key
        return f"{place}.{i}.transformer.blocks.{j}.{inner}"
    return f"{place}.{i}.transformer.{rest}"


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under UNetNet's names. SD1.5's 1x1 convolutions around a transformer are our linear layers."""
    named = {our_name(key, count(state, "down_blocks")): value for key, value in state.items()}
    ours = {}
    for name, value in named.items():
        if re.search(r"\.proj_(in|out)\.weight$", name) and value.ndim == 4:
            value = value[:, :, 0, 0]
        ours[name] = value
    for name in named:
        if match := re.fullmatch(r"(.+\.(self|cross)_attention)\.to_k\.weight", name):
            letters = "qkv" if match[2] == "self" else "kv"
            parts = [f"{match[1]}.to_{x}.weight" for x in letters]
            if all(part in ours for part in parts):
                ours[f"{match[1]}.{letters}.weight"] = torch.cat([ours.pop(part) for part in parts])
    return ours


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[UNet, Inputs]:
    """The network's configuration, from names and shapes.

    Linear layers around a transformer: SDXL, whose heads are 64 channels wide; convolutions: SD1.5, which
    has 8 heads. The groups of its norms are in no shape: 32, as in both. `heads`: at every level.
    Raises UsageError where a level's width is not a multiple of the first, or heads do not divide one.
    """
    channels, image_channels, *_ = shape(state, "conv_in.weight")
    levels = count(state, "down_blocks")
    widths = [shape(state, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    depths = tuple(count(state, f"down_blocks.{i}.attentions.0.transformer_blocks") for i in range(levels))
    projections = [value for name, value in state.items() if name.endswith(".proj_in.weight")]
    linear = all(value.ndim == 2 for value in projections)
    if heads is None and not linear:
        heads = 8
    if any(width % channels for width in widths) or (heads and any(width % heads for width in widths)):
        raise UsageError(f"levels of {widths} channels fit neither conv_in's {channels} nor heads={heads}")
    pooled = 0
    if "add_embedding.linear_1.weight" in state:
        pooled = state["add_embedding.linear_1.weight"].shape[1] - 256 * (SIZES.high + SIZES.low)
        if pooled <= 0:
            raise UsageError("add_embedding takes less than SDXL's six sizes; this U-Net is none that gesso knows")
    cfg = UNet(
        channels=channels, multipliers=tuple(width // channels for width in widths), transformer_depth=depths,
        blocks=count(state, "down_blocks.0.resnets"), heads=heads, text_embed="none",
        middle_depth=count(state, "mid_block.attentions.0.transformer_blocks"),
        pooled_mlp="shared" if pooled else "own",
    )  # fmt: skip
    text_width = next(value.shape[1] for name, value in state.items() if name.endswith(".attn2.to_k.weight"))
    control = SIZES if pooled else Control()
    return cfg, Inputs(image_channels, 32, text_width=text_width, pooled_width=pooled, control=control)


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    weights = {name: tensor.float() for name, tensor in from_diffusers(state).items()}
    notes = {
        "source": "SDXL's U-Net (diffusers)" if inputs.pooled_width else "SD1.5's U-Net (diffusers)",
        "process": "VP, 1000 steps, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012), epsilon",
        "c_noise": "timestep index 0..999",
        "heads": f"{cfg.heads} at every level" if cfg.heads else f"{cfg.head_width} channels wide",
        "latents": f"VAE times {0.13025 if inputs.pooled_width else 0.18215}",
    }
    if inputs.pooled_width:
        notes["control"] = "high: original height, width, crop's top, left; low: target height, width"
    return Found(cfg, inputs, weights, notes)
