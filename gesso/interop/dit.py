"""Weights of DiT: diffusers' DiTTransformer2DModel and facebookresearch/DiT (facts about its names).

Both order the last layer as (patch, patch, channels) and adaLN as shift, scale, gate of attention, then of the MLP; so
does gesso. diffusers has a copy of the time and class embedders in every block.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import DiTConfig, InputSpec
from gesso.interop.mapping import (
    ADM_PROCESS,
    NOTE_ASSUMED_RESOLUTION,
    NOTE_PROPORTIONAL,
    NOTE_UNIT_STEP,
    NOTE_UNKNOWN_BASE,
    ImportedModel,
    TensorMapping,
    check_exportable,
    count_layers,
    export_tensors,
    has_other_base_grid,
    has_variance,
    import_tensors,
    infer_num_heads,
    join_variance,
    map_layers,
    map_stacked,
    num_control,
    split_variance,
    tensor_shape,
    unit_step_grid_side,
    variance_note,
)

DIFFUSERS_KEY = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"
ORIGINAL_KEYS = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
EMBEDDER_NAMES = {
    "timestep_embedder.linear_1.weight": "trunk.time.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "trunk.time.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "trunk.time.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "trunk.time.mlp.2.bias",
    "class_embedder.embedding_table.weight": "table.weight",
}
NOTE_TIME_FREQUENCIES = (
    "diffusers spaces its time frequencies with downscale_freq_shift=1, gesso as DiT does: outputs differ by 2 %"
)


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    return DIFFUSERS_KEY in keys or (keys >= ORIGINAL_KEYS and "blocks.0.attn.qkv.weight" in keys)


def diffusers_block_mappings(foreign: str, name: str) -> list[TensorMapping]:
    """Return the mappings of self-attention and MLP of a diffusers block, equal in DiT and PixArt."""
    names = {"attn1.to_out.0": "out", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
    inner = map_layers({f"{foreign}.{a}": f"{name}.branches.{b}" for a, b in names.items()})
    return inner + map_stacked([f"{foreign}.attn1.to_{x}" for x in "qkv"], f"{name}.branches.qkv.linear")


def original_block_mappings(foreign: str, name: str) -> list[TensorMapping]:
    """Return the mappings of a block of the original DiT and PixArt, whose qkv is stacked."""
    names = {"attn.qkv": "qkv.linear", "attn.proj": "out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    return map_layers({f"{foreign}.{a}": f"{name}.branches.{b}" for a, b in names.items()})


def diffusers_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of diffusers' model."""
    mappings = map_layers({"pos_embed.proj": "trunk.patch_embed.proj", "proj_out_1": "final_ada.linear"})
    mappings += map_layers({"proj_out_2": "trunk.final", "proj_out_2.variance": "trunk.variance"})
    for foreign, name in EMBEDDER_NAMES.items():
        mappings.append(
            TensorMapping(name, tuple(f"transformer_blocks.{i}.norm1.emb.{foreign}" for i in range(depth)), "copies")
        )
    for i in range(depth):
        mappings += diffusers_block_mappings(f"transformer_blocks.{i}", f"blocks.{i}")
        mappings += map_layers({f"transformer_blocks.{i}.norm1.linear": f"blocks.{i}.ada.linear"})
    return mappings


def original_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of the original model."""
    mappings = map_layers(
        {
            "x_embedder.proj": "trunk.patch_embed.proj",
            "t_embedder.mlp.0": "trunk.time.mlp.0",
            "t_embedder.mlp.2": "trunk.time.mlp.2",
            "final_layer.adaLN_modulation.1": "final_ada.linear",
            "final_layer.linear": "trunk.final",
            "final_layer.linear.variance": "trunk.variance",
        }
    )
    mappings.append(TensorMapping("table.weight", ("y_embedder.embedding_table.weight",)))
    for i in range(depth):
        mappings += original_block_mappings(f"blocks.{i}", f"blocks.{i}")
        mappings += map_layers({f"blocks.{i}.adaLN_modulation.1": f"blocks.{i}.ada.linear"})
    return mappings


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under gesso's names. Raises RunError if the copies of the embedders differ."""
    _, channels, patch, _ = tensor_shape(state, "pos_embed.proj.weight")
    state = split_variance(state, "proj_out_2", patch, channels)
    return import_tensors(state, diffusers_mappings(count_layers(state, "transformer_blocks")))


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return facebookresearch/DiT's tensors under gesso's names, without the position table, which is computed."""
    _, channels, patch, _ = tensor_shape(state, "x_embedder.proj.weight")
    state_dict = split_variance(state, "final_layer.linear", patch, channels)
    state_dict.pop("pos_embed", None)
    return import_tensors(state_dict, original_mappings(count_layers(state, "blocks")))


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[DiTConfig, InputSpec]:
    """Return the network's settings, from names and shapes. The last row of the class table is the null class."""
    if DIFFUSERS_KEY in state:
        patches, blocks, fc, last = "pos_embed.proj.weight", "transformer_blocks", "ff.net.0.proj.weight", "proj_out_2"
        table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    else:
        patches, blocks, fc, last = "x_embedder.proj.weight", "blocks", "mlp.fc1.weight", "final_layer.linear"
        table = "y_embedder.embedding_table.weight"
    width, channels, patch, _ = tensor_shape(state, patches)
    depth = count_layers(state, blocks)
    stored = state.get("pos_embed")
    resolution = 32 if stored is None else patch * unit_step_grid_side("pos_embed", stored, width)
    cfg = DiTConfig(
        hidden_size=width,
        depth=depth,
        num_heads=infer_num_heads(width, depth, num_heads),
        patch_size=patch,
        mlp_ratio=tensor_shape(state, f"{blocks}.0.{fc}")[0] / width,
        pos_embed="proportional" if DIFFUSERS_KEY in state and stored is not None else "extrapolated",
        learned_variance=has_variance(tensor_shape(state, f"{last}.weight")[0], patch, channels),
    )
    return cfg, InputSpec(channels, resolution, tensor_shape(state, table)[0] - 1)


def import_weights(state: Mapping[str, Tensor], num_heads: int | None) -> ImportedModel:
    """Return the imported model of a state dict in this format."""
    cfg, inputs = infer_config(state, num_heads)
    is_diffusers = DIFFUSERS_KEY in state
    weights = from_diffusers(state) if is_diffusers else from_original(state)
    notes = {
        "source": "DiT (diffusers)" if is_diffusers else "DiT (facebookresearch/DiT)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": NOTE_PROPORTIONAL if "pos_embed" in state else NOTE_UNKNOWN_BASE,
        "latents": "SD VAE times 0.18215 when 4 channels",
    }
    if "pos_embed" not in state:
        notes["resolution"] = NOTE_ASSUMED_RESOLUTION
    if is_diffusers:
        notes["time"] = NOTE_TIME_FREQUENCIES
    else:
        notes["positions"] = NOTE_UNIT_STEP
        notes["process"] += " (SiT has the same names, but another process)"
    notes |= variance_note(cfg.learned_variance)
    return ImportedModel(cfg, inputs, weights, notes, ADM_PROCESS)


def to_diffusers(
    weights: Mapping[str, Tensor], cfg: DiTConfig, inputs: InputSpec
) -> tuple[str, dict, dict[str, Tensor]]:
    """Return class name, configuration and weights. Raises UsageError for settings that the class does not have."""
    class_name = "DiTTransformer2DModel"
    check_exportable(
        class_name,
        {
            "net.pos_embed=resampled (only proportional)": cfg.pos_embed == "resampled",
            f"net.pos_embed={cfg.pos_embed} from another grid": has_other_base_grid(cfg, inputs),
            "net.qk_norm=true": cfg.qk_norm,
            f"net.mlp_ratio={cfg.mlp_ratio} (only 4)": cfg.mlp_ratio != 4,
            "a network without classes": not inputs.num_classes,
            "control": num_control(inputs) > 0,
        },
    )
    config = {
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.hidden_size // cfg.num_heads,
        "num_layers": cfg.depth,
        "in_channels": inputs.channels,
        "sample_size": inputs.resolution,
        "out_channels": inputs.channels * (2 if cfg.learned_variance else 1),
        "patch_size": cfg.patch_size,
        "num_embeds_ada_norm": inputs.num_classes,
        "norm_eps": 1e-6,
    }
    exported = export_tensors(weights, diffusers_mappings(cfg.depth))
    return class_name, config, join_variance(exported, "proj_out_2", cfg.patch_size, inputs.channels)
