"""Weights of the U-Net of SD1.5 and SDXL: diffusers' UNet2DConditionModel and CompVis' names (facts)."""

import re
from collections.abc import Mapping

from torch import Tensor

from gesso.config import ControlSpec, InputSpec, UNetConfig, VPConfig
from gesso.errors import UsageError
from gesso.interop.mapping import (
    NOTE_ASSUMED_RESOLUTION,
    ImportedModel,
    TensorMapping,
    check_exportable,
    count_layers,
    export_tensors,
    import_tensors,
    map_layers,
    num_control,
    tensor_shape,
)

RESIDUAL_NAMES = {
    "norm1": "norm0", "conv1": "conv0", "time_emb_proj": "emb", "norm2": "norm1", "conv2": "conv1",
    "conv_shortcut": "skip",
}  # fmt: skip
TRANSFORMER_NAMES = {
    "norm1": "norm_self", "attn1.to_out.0": "self_attention.out", "norm2": "norm_cross",
    "attn2.to_out.0": "cross_attention.out", "norm3": "norm_mlp", "ff.net.0.proj": "mlp.expand",
    "ff.net.2": "mlp.out",
}  # fmt: skip
EMBEDDING_NAMES = {"time_embedding": "time", "add_embedding": "pooled.mlp", "class_embedding": "control.mlps.all"}
SDXL_CONTROL = ControlSpec(num_high=4, num_low=2, mlp="joint")
"""Six numbers of SDXL: original size and top left of the crop, then target size."""
COMPVIS_KEY = "input_blocks.0.0.weight"
COMPVIS_NAMES = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}  # fmt: skip
COMPVIS_RESIDUAL_NAMES = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    required = {"conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"}
    known = keys >= required or keys >= {COMPVIS_KEY, "time_embed.0.weight", "middle_block.0.in_layers.0.weight"}
    return known and any(key.endswith(".attn2.to_k.weight") for key in keys)


def transformer_mappings(foreign: str, name: str, depth: int) -> list[TensorMapping]:
    """Return the mappings of a transformer."""
    mappings = map_layers({f"{foreign}.{part}": f"{name}.{part}" for part in ("norm", "proj_in", "proj_out")})
    for j in range(depth):
        a, b = f"{foreign}.transformer_blocks.{j}", f"{name}.blocks.{j}"
        mappings += map_layers({f"{a}.{part}": f"{b}.{inner}" for part, inner in TRANSFORMER_NAMES.items()})
        mappings.append(TensorMapping(f"{b}.cross_attention.q.weight", (f"{a}.attn2.to_q.weight",)))
        for attention, inner, letters in (("attn1", "self", "qkv"), ("attn2", "cross", "kv")):
            names = tuple(f"{a}.{attention}.to_{x}.weight" for x in letters)
            mappings.append(TensorMapping(f"{b}.{inner}_attention.{letters}.weight", names))
    return mappings


def diffusers_mappings(levels: int, blocks: int, depth: int) -> list[TensorMapping]:
    """Return the mappings of every tensor; depth: largest number of transformer blocks after a residual block."""
    last = f"upsamplers.{levels - 1}"
    mappings = map_layers({"conv_in": "downsamplers.0", "conv_norm_out": f"{last}.0", "conv_out": f"{last}.2"})
    for foreign, name in EMBEDDING_NAMES.items():
        mappings += map_layers({f"{foreign}.linear_{n}": f"{name}.{i}" for n, i in ((1, 0), (2, 2))})
    stages = [("mid_block", "middle", 2)]
    for level in range(levels):
        mappings += map_layers({f"down_blocks.{level}.downsamplers.0.conv": f"downsamplers.{level + 1}"})
        mappings += map_layers({f"up_blocks.{level}.upsamplers.0.conv": f"upsamplers.{level}.1"})
        stages += [(f"down_blocks.{level}", f"down.{level}", blocks), (f"up_blocks.{level}", f"up.{level}", blocks + 1)]
    for foreign, name, n in stages:
        for i in range(n):
            parts = {f"{foreign}.resnets.{i}.{a}": f"{name}.{i}.residual.{b}" for a, b in RESIDUAL_NAMES.items()}
            mappings += map_layers(parts) + transformer_mappings(
                f"{foreign}.attentions.{i}", f"{name}.{i}.transformer", depth
            )
    return mappings


def compvis_block_names(levels: int, blocks: int) -> dict[str, str]:
    """Return the map of CompVis' block names to diffusers' names; CompVis counts downsampling layers as blocks."""
    names = dict(COMPVIS_NAMES)
    for level in range(levels):
        for i in range(blocks):
            n = 1 + level * (blocks + 1) + i
            names[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{i}"
            names[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
        names[f"input_blocks.{(level + 1) * (blocks + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for i in range(blocks + 1):
            n = level * (blocks + 1) + i
            names[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{i}"
            names[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{i}"
            for index in (1, 2):  # 2 after a transformer
                names[f"output_blocks.{n}.{index}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def compvis_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CompVis' tensors (SD1.5, or SDXL in one file) under diffusers' names; unknown ones keep their name."""
    downs = [int(m[1]) for name in state if (m := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))]
    blocks = min(downs, default=count_layers(state, "input_blocks")) - 1
    names = compvis_block_names(len(downs) + 1, blocks)

    def diffusers_name(name: str) -> str:
        parts = name.split(".")
        for n in range(len(parts) - 1, 0, -1):
            if (block := names.get(".".join(parts[:n]))) is not None:
                rest = ".".join(parts[n:])
                inner = next((a for a in COMPVIS_RESIDUAL_NAMES if rest.startswith(f"{a}.")), None)
                if inner and ".resnets." in block:
                    rest = COMPVIS_RESIDUAL_NAMES[inner] + rest.removeprefix(inner)
                return f"{block}.{rest}"
        return name

    return {diffusers_name(name): tensor for name, tensor in state.items()}


def transformer_depths(state: Mapping[str, Tensor]) -> list[int]:
    """Return the number of transformer blocks after a residual block, by level."""
    levels = range(count_layers(state, "down_blocks"))
    return [count_layers(state, f"down_blocks.{level}.attentions.0.transformer_blocks") for level in levels]


def middle_transformer_depth(state: Mapping[str, Tensor]) -> int:
    """Return the number of transformer blocks in the middle."""
    return count_layers(state, "mid_block.attentions.0.transformer_blocks")


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under gesso's names. SD1.5's 1x1 convolutions around a transformer become linear layers."""
    state_dict = dict(state)
    for name, value in state_dict.items():
        if re.search(r"\.proj_(in|out)\.weight$", name) and value.ndim == 4:
            state_dict[name] = value[:, :, 0, 0]
    levels, blocks = count_layers(state, "down_blocks"), count_layers(state, "down_blocks.0.resnets")
    return import_tensors(
        state_dict,
        diffusers_mappings(levels, blocks, max([*transformer_depths(state), middle_transformer_depth(state)])),
    )


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[UNetConfig, InputSpec]:
    """Return the network's settings, from names and shapes.

    Linear layers around a transformer mean SDXL, with heads of 64 channels; convolutions mean SD1.5, with 8 heads. The
    norms have 32 groups, as in both. `num_heads` is the number at every level.

    Raises:
        UsageError: The width of a level is not a multiple of the first, or is not divisible by the heads.
    """
    channels, image_channels, *_ = tensor_shape(state, "conv_in.weight")
    levels = count_layers(state, "down_blocks")
    widths = [tensor_shape(state, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    projections = [value for name, value in state.items() if name.endswith(".proj_in.weight")]
    linear = all(value.ndim == 2 for value in projections)
    if num_heads is None and not linear:
        num_heads = 8
    if any(width % channels for width in widths) or (num_heads and any(width % num_heads for width in widths)):
        raise UsageError(f"levels of {widths} channels do not fit conv_in's {channels} or num_heads={num_heads}")
    pooled = 0
    if "add_embedding.linear_1.weight" in state:
        pooled = state["add_embedding.linear_1.weight"].shape[1] - 256 * num_control(
            InputSpec(0, 0, control=SDXL_CONTROL)
        )
        if pooled <= 0:
            raise UsageError("add_embedding has fewer inputs than SDXL's six sizes; gesso does not know this U-Net")
    cfg = UNetConfig(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        transformer_depth=tuple(transformer_depths(state)),
        num_blocks=count_layers(state, "down_blocks.0.resnets"),
        num_heads=num_heads,
        text_projection="none",
        transformer_depth_middle=middle_transformer_depth(state),
        pooled_mlp="shared" if pooled else "separate",
    )
    text_width = next(value.shape[1] for name, value in state.items() if name.endswith(".attn2.to_k.weight"))
    control = SDXL_CONTROL if pooled else ControlSpec()
    return cfg, InputSpec(image_channels, 32, text_dim=text_width, pooled_dim=pooled, control=control)


def import_weights(state: Mapping[str, Tensor], num_heads: int | None) -> ImportedModel:
    """Return the imported model of a state dict in this format."""
    origin = "CompVis" if COMPVIS_KEY in state else "diffusers"
    if COMPVIS_KEY in state:
        state = compvis_to_diffusers(state)
    cfg, inputs = infer_config(state, num_heads)
    weights = from_diffusers(state)
    notes = {
        "source": f"{'SDXL' if inputs.pooled_dim else 'SD1.5'}'s U-Net ({origin})",
        "process": "VP, 1000 steps, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012), epsilon",
        "c_noise": "timestep index 0..999",
        "heads": f"{cfg.num_heads} at every level" if cfg.num_heads else f"{cfg.channels_per_head} channels wide",
        "latents": f"VAE times {0.13025 if inputs.pooled_dim else 0.18215}",
        "resolution": NOTE_ASSUMED_RESOLUTION,
    }
    if inputs.pooled_dim:
        notes["control"] = "high: original height, width, crop's top, left; low: target height, width"
    return ImportedModel(cfg, inputs, weights, notes, VPConfig())


def to_diffusers(
    weights: Mapping[str, Tensor], cfg: UNetConfig, inputs: InputSpec
) -> tuple[str, dict, dict[str, Tensor]]:
    """Return class name, configuration and weights. Raises UsageError for settings that the class does not have."""
    class_name, n = "UNet2DConditionModel", num_control(inputs)
    deepest = cfg.transformer_depth[-1]
    check_exportable(
        class_name,
        {
            "a network without text": not inputs.text_dim,
            f"net.text_projection={cfg.text_projection} (only none)": bool(inputs.text_dim)
            and cfg.text_projection != "none",
            "control without pooled text": n > 0 and not inputs.pooled_dim,
            "pooled text without control": n == 0 and inputs.pooled_dim > 0,
            f"net.pooled_mlp={cfg.pooled_mlp} (only shared)": inputs.pooled_dim > 0 and cfg.pooled_mlp != "shared",
            f"net.transformer_depth_middle={cfg.transformer_depth_middle} (only that of the lowest level, "
            f"{deepest})": cfg.transformer_depth_middle == 0 or deepest not in (0, cfg.transformer_depth_middle),
        },
    )
    widths = [cfg.channels * multiplier for multiplier in cfg.channel_mult]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.transformer_depth]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.transformer_depth)]
    config = {
        "in_channels": inputs.channels,
        "out_channels": inputs.channels,
        "sample_size": inputs.resolution,
        "block_out_channels": tuple(widths),
        "layers_per_block": cfg.num_blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "norm_num_groups": cfg.norm_num_groups,
        "use_linear_projection": True,
        # attention_head_dim of this class is the number of heads.
        "attention_head_dim": tuple(cfg.num_heads or max(width // cfg.channels_per_head, 1) for width in widths),
        "transformer_layers_per_block": (
            *(max(depth, 1) for depth in cfg.transformer_depth[:-1]),
            cfg.transformer_depth_middle,
        ),
        "cross_attention_dim": inputs.text_dim,
    }
    if inputs.pooled_dim:
        config |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": inputs.pooled_dim + 256 * n,
        }  # fmt: skip
    mappings = diffusers_mappings(
        len(widths), cfg.num_blocks, max([*cfg.transformer_depth, cfg.transformer_depth_middle])
    )
    return class_name, config, export_tensors(weights, mappings)
