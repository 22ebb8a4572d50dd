"""Weights of PixArt-alpha: diffusers' PixArtTransformer2DModel and the original names (facts).

The model for 1024 pixels is rejected: its positions have half steps, and it embeds height, width and aspect ratio.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import InputSpec, PixArtConfig
from gesso.errors import UsageError
from gesso.interop.dit import diffusers_block_mappings, original_block_mappings
from gesso.interop.mapping import (
    ADM_PROCESS,
    NOTE_ASSUMED_RESOLUTION,
    NOTE_PROPORTIONAL,
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

DIFFUSERS_KEY = "adaln_single.linear.weight"
DIFFUSERS_NAMES = {
    "pos_embed.proj": "trunk.patch_embed.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "trunk.time.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "trunk.time.mlp.2",
    "adaln_single.linear": "ada.linear",
    "caption_projection.linear_1": "semantic.mlp.0",
    "caption_projection.linear_2": "semantic.mlp.2",
    "proj_out": "trunk.final",
    "proj_out.variance": "trunk.variance",
}
ORIGINAL_NAMES = {
    "x_embedder.proj": "trunk.patch_embed.proj",
    "t_embedder.mlp.0": "trunk.time.mlp.0",
    "t_embedder.mlp.2": "trunk.time.mlp.2",
    "t_block.1": "ada.linear",
    "y_embedder.y_proj.fc1": "semantic.mlp.0",
    "y_embedder.y_proj.fc2": "semantic.mlp.2",
    "final_layer.linear": "trunk.final",
    "final_layer.linear.variance": "trunk.variance",
}
POSITION_TABLES = ("pos_embed", "pos_embed.pos_embed")
"""Names of the position table: in the original weights, and in those of some versions of diffusers."""
NULL_CAPTIONS = ("y_embedder.y_embedding", "caption_projection.y_embedding")
SIZE_EMBEDDERS = ("csize_embedder.", "ar_embedder.", "adaln_single.emb.resolution_embedder.")


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    diffusers_keys = {DIFFUSERS_KEY, "scale_shift_table", "caption_projection.linear_1.weight"}
    original_keys = {"t_block.1.weight", "final_layer.scale_shift_table", "y_embedder.y_proj.fc1.weight"}
    return keys >= diffusers_keys or keys >= original_keys


def diffusers_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of diffusers' model."""
    mappings = [*map_layers(DIFFUSERS_NAMES), TensorMapping("final_table", ("scale_shift_table",))]
    for i in range(depth):
        foreign, name = f"transformer_blocks.{i}", f"blocks.{i}"
        mappings += diffusers_block_mappings(foreign, name)
        mappings.append(TensorMapping(f"{name}.table", (f"{foreign}.scale_shift_table",)))
        mappings += map_layers(
            {f"{foreign}.attn2.to_q": f"{name}.cross.q", f"{foreign}.attn2.to_out.0": f"{name}.cross.out"}
        )
        mappings += map_stacked([f"{foreign}.attn2.to_{x}" for x in "kv"], f"{name}.cross.kv")
    return mappings


def original_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of the original model."""
    mappings = [*map_layers(ORIGINAL_NAMES), TensorMapping("final_table", ("final_layer.scale_shift_table",))]
    for i in range(depth):
        block = f"blocks.{i}"
        mappings += original_block_mappings(block, block)
        mappings.append(TensorMapping(f"{block}.table", (f"{block}.scale_shift_table",)))
        names = {"q_linear": "q", "kv_linear": "kv", "proj": "out"}
        mappings += map_layers({f"{block}.cross_attn.{a}": f"{block}.cross.{b}" for a, b in names.items()})
    return mappings


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return diffusers' tensors under gesso's names."""
    _, channels, patch, _ = tensor_shape(state, "pos_embed.proj.weight")
    state_dict = split_variance(state, "proj_out", patch, channels)
    return import_tensors(
        drop_unused_tensors(state_dict), diffusers_mappings(count_layers(state, "transformer_blocks"))
    )


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the original tensors under gesso's names. The original kv is stacked as gesso's."""
    _, channels, patch, _ = tensor_shape(state, "x_embedder.proj.weight")
    state_dict = split_variance(state, "final_layer.linear", patch, channels)
    return import_tensors(drop_unused_tensors(state_dict), original_mappings(count_layers(state, "blocks")))


def drop_unused_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the position table, which is computed, and the null caption, which is unused."""
    return {name: tensor for name, tensor in state.items() if name not in POSITION_TABLES + NULL_CAPTIONS}


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[PixArtConfig, InputSpec]:
    """Return the network's settings, from names and shapes.

    The resolution is that of the stored position table, or 32 without one.

    Raises:
        UsageError: The model is the one for 1024 pixels.
    """
    if any(name.startswith(SIZE_EMBEDDERS) for name in state):
        raise UsageError(
            "PixArt-alpha of 1024 pixels embeds sizes and has positions in half steps, which net.name=pixart does not; "
            "use the model of 256 or 512 pixels"
        )
    is_diffusers = DIFFUSERS_KEY in state
    blocks, fc = ("transformer_blocks", "ff.net.0.proj.weight") if is_diffusers else ("blocks", "mlp.fc1.weight")
    caption = "caption_projection.linear_1.weight" if is_diffusers else "y_embedder.y_proj.fc1.weight"
    width, channels, patch, _ = tensor_shape(
        state, "pos_embed.proj.weight" if is_diffusers else "x_embedder.proj.weight"
    )
    depth, last = count_layers(state, blocks), "proj_out" if is_diffusers else "final_layer.linear"
    stored = [patch * unit_step_grid_side(name, state[name], width) for name in POSITION_TABLES if name in state]
    cfg = PixArtConfig(
        hidden_size=width, depth=depth, num_heads=infer_num_heads(width, depth, num_heads), patch_size=patch,
        mlp_ratio=tensor_shape(state, f"{blocks}.0.{fc}")[0] / width,
        pos_embed="proportional" if stored else "extrapolated",
        learned_variance=has_variance(tensor_shape(state, f"{last}.weight")[0], patch, channels),
    )  # fmt: skip
    return cfg, InputSpec(channels, stored[0] if stored else 32, text_dim=tensor_shape(state, caption)[1])


def import_weights(state: Mapping[str, Tensor], num_heads: int | None) -> ImportedModel:
    """Return the imported model of a state dict in this format."""
    cfg, inputs = infer_config(state, num_heads)
    is_diffusers = DIFFUSERS_KEY in state
    stored = any(name in state for name in POSITION_TABLES)
    notes = {
        "source": "PixArt-alpha (diffusers)" if is_diffusers else "PixArt-alpha (PixArt-alpha/PixArt-alpha)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": NOTE_PROPORTIONAL if stored else f"{NOTE_UNKNOWN_BASE} (256 or 512 pixels, interpolation_scale 1)",
        "latents": "SD VAE times 0.18215 when 4 channels (PixArt-sigma has the same names, and SDXL's VAE)",
    }
    if not stored:
        notes["resolution"] = NOTE_ASSUMED_RESOLUTION
    if any(name in state for name in NULL_CAPTIONS):
        notes["null"] = "the null caption of the source is ignored; in gesso withheld text is zeros"
    notes |= variance_note(cfg.learned_variance)
    weights = from_diffusers(state) if is_diffusers else from_original(state)
    return ImportedModel(cfg, inputs, weights, notes, ADM_PROCESS)


def to_diffusers(
    weights: Mapping[str, Tensor], cfg: PixArtConfig, inputs: InputSpec
) -> tuple[str, dict, dict[str, Tensor]]:
    """Return class name, configuration and weights. Raises UsageError for settings that the class does not have."""
    class_name = "PixArtTransformer2DModel"
    check_exportable(
        class_name,
        {
            "net.pos_embed=resampled (only proportional)": cfg.pos_embed == "resampled",
            f"net.pos_embed={cfg.pos_embed} from another grid": has_other_base_grid(cfg, inputs),
            "net.qk_norm=true": cfg.qk_norm,
            f"net.mlp_ratio={cfg.mlp_ratio} (only 4)": cfg.mlp_ratio != 4,
            "a network without text": not inputs.text_dim,
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
        "cross_attention_dim": cfg.hidden_size,
        "caption_channels": inputs.text_dim,
        "norm_eps": 1e-6,
        "interpolation_scale": 1,
        "use_additional_conditions": False,
    }
    exported = export_tensors(weights, diffusers_mappings(cfg.depth))
    return class_name, config, join_variance(exported, "proj_out", cfg.patch_size, inputs.channels)
