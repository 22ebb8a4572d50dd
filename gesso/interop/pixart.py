"""Weights of PixArt-alpha: diffusers' PixArtTransformer2DModel and the original names (facts).

The model for 1024 pixels, whose positions have half steps and which embeds height, width and aspect ratio, is refused.
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
"""Where the position table is: in PixArt's own weights, in those of some versions of diffusers."""
NULL_CAPTIONS = ("y_embedder.y_embedding", "caption_projection.y_embedding")
SIZE_EMBEDDERS = ("csize_embedder.", "ar_embedder.", "adaln_single.emb.resolution_embedder.")


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    peer = {"adaln_single.linear.weight", "scale_shift_table", "caption_projection.linear_1.weight"}
    required = {"t_block.1.weight", "final_layer.scale_shift_table", "y_embedder.y_proj.fc1.weight"}
    return keys >= peer or keys >= required


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Return True for diffusers' names, False for the original ones."""
    return "adaln_single.linear.weight" in state


def diffusers_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of diffusers' model."""
    ties = [*map_layers(DIFFUSERS_NAMES), TensorMapping("final_table", ("scale_shift_table",))]
    for i in range(depth):
        foreign, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        ties += diffusers_block_mappings(foreign, ours)
        ties.append(TensorMapping(f"{ours}.table", (f"{foreign}.scale_shift_table",)))
        ties += map_layers(
            {f"{foreign}.attn2.to_q": f"{ours}.cross.q", f"{foreign}.attn2.to_out.0": f"{ours}.cross.out"}
        )
        ties += map_stacked([f"{foreign}.attn2.to_{x}" for x in "kv"], f"{ours}.cross.kv")
    return ties


def original_mappings(depth: int) -> list[TensorMapping]:
    """Return the mappings of all tensors of the original model."""
    ties = [*map_layers(ORIGINAL_NAMES), TensorMapping("final_table", ("final_layer.scale_shift_table",))]
    for i in range(depth):
        block = f"blocks.{i}"
        ties += original_block_mappings(block, block)
        ties.append(TensorMapping(f"{block}.table", (f"{block}.scale_shift_table",)))
        names = {"q_linear": "q", "kv_linear": "kv", "proj": "out"}
        ties += map_layers({f"{block}.cross_attn.{a}": f"{block}.cross.{b}" for a, b in names.items()})
    return ties


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
    """Return the network's settings, from names and shapes; a stored position table tells the resolution, otherwise 32.

    Raises:
        UsageError: The model is the one for 1024 pixels.
    """
    if any(name.startswith(SIZE_EMBEDDERS) for name in state):
        raise UsageError(
            "PixArt-alpha of 1024 pixels embeds sizes and counts positions in halves, which net.name=pixart does not; "
            "take the model of 256 or 512"
        )
    peer = is_diffusers(state)
    blocks, fc = ("transformer_blocks", "ff.net.0.proj.weight") if peer else ("blocks", "mlp.fc1.weight")
    caption = "caption_projection.linear_1.weight" if peer else "y_embedder.y_proj.fc1.weight"
    width, channels, patch, _ = tensor_shape(state, "pos_embed.proj.weight" if peer else "x_embedder.proj.weight")
    depth, last = count_layers(state, blocks), "proj_out" if peer else "final_layer.linear"
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
    peer = is_diffusers(state)
    stored = any(name in state for name in POSITION_TABLES)
    notes = {
        "source": "PixArt-alpha (diffusers)" if peer else "PixArt-alpha (PixArt-alpha/PixArt-alpha)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": NOTE_PROPORTIONAL if stored else f"{NOTE_UNKNOWN_BASE} (256 or 512 pixels, interpolation_scale 1)",
        "latents": "SD VAE times 0.18215 when 4 channels (PixArt-sigma has the same names, and SDXL's VAE)",
    }
    if not stored:
        notes["resolution"] = NOTE_ASSUMED_RESOLUTION
    if any(name in state for name in NULL_CAPTIONS):
        notes["null"] = "the original's null caption is left behind; withheld text is zeros here"
    notes |= variance_note(cfg.learned_variance)
    weights = from_diffusers(state) if peer else from_original(state)
    return ImportedModel(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes, ADM_PROCESS)


def to_diffusers(
    weights: Mapping[str, Tensor], cfg: PixArtConfig, inputs: InputSpec
) -> tuple[str, dict, dict[str, Tensor]]:
    """Return class name, configuration and weights. Raises UsageError for settings that the class does not have."""
    peer = "PixArtTransformer2DModel"
    check_exportable(
        peer,
        {
            "net.pos_embed=resampled (proportional it holds)": cfg.pos_embed == "resampled",
            f"net.pos_embed={cfg.pos_embed} from another grid": has_other_base_grid(cfg, inputs),
            "net.qk_norm=true": cfg.qk_norm,
            f"net.mlp_ratio={cfg.mlp_ratio} (its own is 4)": cfg.mlp_ratio != 4,
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
    return peer, config, join_variance(exported, "proj_out", cfg.patch_size, inputs.channels)
