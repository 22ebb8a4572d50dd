"""Weights of SD3: diffusers' SD3Transformer2DModel and Stability's names (facts).

Where adaLN gives two vectors (last layer, last text block), diffusers has (scale, shift), Stability and gesso (shift,
scale). The queries of the last block's text reach no output: gesso has their rows of qkv, but not their norm. The first
blocks of SD3.5 medium have a second attention among image tokens and nine vectors of adaLN, in the same order.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gesso.config import InputSpec, MMDiTConfig, RFConfig
from gesso.interop.mapping import (
    ImportedModel,
    TensorMapping,
    check_exportable,
    count_layers,
    export_tensors,
    grid_side,
    import_tensors,
    infer_num_heads,
    map_layers,
    map_stacked,
    num_control,
    tensor_shape,
)

DIFFUSERS_KEY = "transformer_blocks.0.attn.add_k_proj.weight"
ORIGINAL_KEY = "joint_blocks.0.x_block.attn.qkv.weight"


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    return (DIFFUSERS_KEY in keys and "time_text_embed.text_embedder.linear_1.weight" in keys) or ORIGINAL_KEY in keys


def diffusers_block_mappings(foreign: str, name: str, is_last: bool) -> list[TensorMapping]:
    """Return the mappings of a block of diffusers' model."""
    mappings = [
        *map_stacked([f"{foreign}.attn.to_{x}" for x in "qkv"], f"{name}.image_qkv.linear"),
        *map_stacked([f"{foreign}.attn2.to_{x}" for x in "qkv"], f"{name}.image.second_qkv.linear"),
        *map_stacked([f"{foreign}.attn.add_{x}_proj" for x in "qkv"], f"{name}.text_qkv.linear"),
    ]
    for x in "qk":
        mappings.append(TensorMapping(f"{name}.image_qkv.{x}_norm.weight", (f"{foreign}.attn.norm_{x}.weight",)))
        mappings.append(
            TensorMapping(f"{name}.image.second_qkv.{x}_norm.weight", (f"{foreign}.attn2.norm_{x}.weight",))
        )
        mappings.append(TensorMapping(f"{name}.text_qkv.{x}_norm.weight", (f"{foreign}.attn.norm_added_{x}.weight",)))
    image = {"norm1.linear": "ada.linear", "attn.to_out.0": "out", "attn2.to_out.0": "second_out"}
    image |= {"ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
    mappings += map_layers({f"{foreign}.{a}": f"{name}.image.{b}" for a, b in image.items()})
    if is_last:
        return mappings + map_layers({f"{foreign}.norm1_context.linear": f"{name}.text.linear"}, "swapped")
    text = {"norm1_context.linear": "ada.linear", "attn.to_add_out": "out"}
    text |= {"ff_context.net.0.proj": "mlp.0", "ff_context.net.2": "mlp.2"}
    return mappings + map_layers({f"{foreign}.{a}": f"{name}.text.{b}" for a, b in text.items()})


def diffusers_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of diffusers' model."""
    mappings = [TensorMapping("position.table", ("pos_embed.pos_embed",), "square")]
    mappings += map_layers(
        {"pos_embed.proj": "patch_embed.proj", "context_embedder": "semantic.mlp", "proj_out": "final"}
    )
    for foreign, name in (("timestep_embedder", "time.mlp"), ("text_embedder", "pooled")):
        mappings += map_layers({f"time_text_embed.{foreign}.linear_{n}": f"{name}.{i}" for n, i in ((1, 0), (2, 2))})
    mappings += map_layers({"norm_out.linear": "final_ada.linear"}, "swapped")
    for i in range(depth):
        mappings += diffusers_block_mappings(f"transformer_blocks.{i}", f"blocks.{i}", is_last=i == depth - 1)
    return mappings


def original_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of Stability's model."""
    mappings = [TensorMapping("position.table", ("pos_embed",), "square")]
    mappings += map_layers({"x_embedder.proj": "patch_embed.proj", "context_embedder": "semantic.mlp"})
    mappings += map_layers({"final_layer.linear": "final", "final_layer.adaLN_modulation.1": "final_ada.linear"})
    for i in (0, 2):
        mappings += map_layers({f"t_embedder.mlp.{i}": f"time.mlp.{i}", f"y_embedder.mlp.{i}": f"pooled.{i}"})
    for i in range(depth):
        for kind, name in (("x_block", "image"), ("context_block", "text")):
            foreign, stream = f"joint_blocks.{i}.{kind}", f"blocks.{i}.{name}"
            attentions = {"attn": f"{stream}_qkv", "attn2": f"{stream}.second_qkv"}
            for attention, qkv in attentions.items():
                mappings += map_layers({f"{foreign}.{attention}.qkv": f"{qkv}.linear"})
                mappings += [
                    TensorMapping(f"{qkv}.{x}_norm.weight", (f"{foreign}.{attention}.ln_{x}.weight",)) for x in "qk"
                ]
            last_text = kind == "context_block" and i == depth - 1
            inner = {"attn.proj": "out", "attn2.proj": "second_out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
            inner["adaLN_modulation.1"] = "linear" if last_text else "ada.linear"
            mappings += map_layers({f"{foreign}.{a}": f"{stream}.{b}" for a, b in inner.items()})
    return mappings


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return diffusers' tensors under gesso's names."""
    depth, state_dict = count_layers(state, "transformer_blocks"), dict(state)
    state_dict.pop(unused_norm_name(depth), None)
    return import_tensors(state_dict, diffusers_mappings(depth))


def unused_norm_name(depth: int) -> str:
    """Return diffusers' name of the norm of the last block's text queries."""
    return f"transformer_blocks.{depth - 1}.attn.norm_added_q.weight"


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Stability's tensors under gesso's names."""
    depth, state_dict = count_layers(state, "joint_blocks"), dict(state)
    state_dict.pop(f"joint_blocks.{depth - 1}.context_block.attn.ln_q.weight", None)
    return import_tensors(state_dict, original_mappings(depth))


def infer_training_grid(table: Tensor) -> int:
    """Return the number of tokens per side in training, from the position table (1, side^2, D).

    Neighboring tokens are base/side apart; the first channel of a column is the sine and channel D/4 the cosine, so
    that the angle between columns 0 and 1 is that step.
    """
    side = math.isqrt(table.shape[1])
    if side == 1:
        return 1
    quarter = table.shape[2] // 4
    first, second = (math.atan2(float(table[0, i, 0]), float(table[0, i, quarter])) for i in (0, 1))
    return min(max(round((second - first) % (2 * math.pi) * side), 1), side)


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[MMDiTConfig, InputSpec]:
    """Return the network's settings, from names, shapes and the step of the position table."""
    is_diffusers = DIFFUSERS_KEY in state
    blocks = "transformer_blocks" if is_diffusers else "joint_blocks"
    width, channels, patch, _ = tensor_shape(
        state, "pos_embed.proj.weight" if is_diffusers else "x_embedder.proj.weight"
    )
    depth = count_layers(state, blocks)
    norm = state.get(f"{blocks}.0.attn.norm_q.weight" if is_diffusers else f"{blocks}.0.x_block.attn.ln_q.weight")
    head_width = None if norm is None else len(norm)
    mlp = "ff.net.0.proj.weight" if is_diffusers else "x_block.mlp.fc1.weight"
    second = "attn2.to_out.0.weight" if is_diffusers else "x_block.attn2.proj.weight"
    positions = "pos_embed.pos_embed" if is_diffusers else "pos_embed"
    tensor_shape(state, positions)
    table = state[positions]
    cfg = MMDiTConfig(
        hidden_size=width,
        depth=depth,
        num_heads=infer_num_heads(width, depth, num_heads, head_width),
        patch_size=patch,
        mlp_ratio=tensor_shape(state, f"{blocks}.0.{mlp}")[0] / width,
        qk_norm=norm is not None,
        separate_text_weights="all",
        pos_embed_max_size=grid_side(positions, table),
        dual_attention_layers=sum(f"{blocks}.{i}.{second}" in state for i in range(depth)),
    )
    pooled = "time_text_embed.text_embedder.linear_1.weight" if is_diffusers else "y_embedder.mlp.0.weight"
    text_width, pooled_width = tensor_shape(state, "context_embedder.weight")[1], tensor_shape(state, pooled)[1]
    return cfg, InputSpec(channels, patch * infer_training_grid(table), text_dim=text_width, pooled_dim=pooled_width)


def import_weights(state: Mapping[str, Tensor], num_heads: int | None) -> ImportedModel:
    """Return the imported model of a state dict in this format."""
    cfg, inputs = infer_config(state, num_heads)
    is_diffusers = DIFFUSERS_KEY in state
    name = "SD3.5" if cfg.qk_norm else "SD3"
    notes = {
        "source": f"{name} (diffusers)" if is_diffusers else f"{name} (Stability)",
        "process": "RF, x_s = (1 - s) x_0 + s noise, velocity noise - x_0",
        "c_noise": "1000*s",
        "latents": "(SD3 VAE - 0.0609) times 1.5305 when 16 channels",
    }
    weights = from_diffusers(state) if is_diffusers else from_original(state)
    return ImportedModel(cfg, inputs, weights, notes, RFConfig())


def to_diffusers(
    weights: Mapping[str, Tensor], cfg: MMDiTConfig, inputs: InputSpec
) -> tuple[str, dict, dict[str, Tensor]]:
    """Return class name, configuration and weights. Raises UsageError for settings that the class does not have."""
    class_name = "SD3Transformer2DModel"
    check_exportable(
        class_name,
        {
            f"net.separate_text_weights={cfg.separate_text_weights} (only all)": cfg.separate_text_weights != "all",
            f"net.pos_embed={cfg.pos_embed} without net.pos_embed_max_size": cfg.pos_embed_max_size is None,
            f"net.mlp_ratio={cfg.mlp_ratio} (only 4)": cfg.mlp_ratio != 4,
            "a network without text": not inputs.text_dim,
            "a network without pooled text": not inputs.pooled_dim,
            "control": num_control(inputs) > 0,
        },
    )
    config = {
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.hidden_size // cfg.num_heads,
        "num_layers": cfg.depth,
        "in_channels": inputs.channels,
        "out_channels": inputs.channels,
        "sample_size": inputs.resolution,
        "patch_size": cfg.patch_size,
        "joint_attention_dim": inputs.text_dim,
        "caption_projection_dim": cfg.hidden_size,
        "pooled_projection_dim": inputs.pooled_dim,
        "pos_embed_max_size": cfg.pos_embed_max_size,
        "dual_attention_layers": tuple(range(cfg.dual_attention_layers)),
        "qk_norm": "rms_norm" if cfg.qk_norm else None,
    }
    exported = export_tensors(weights, diffusers_mappings(cfg.depth))
    if cfg.qk_norm:
        exported[unused_norm_name(cfg.depth)] = torch.ones_like(weights["blocks.0.image_qkv.q_norm.weight"])
    return class_name, config, exported
