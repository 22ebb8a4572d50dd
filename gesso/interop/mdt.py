"""Weights of MDTv2 (facts about the names of sail-sg/MDT).

The class embedding is a row of the table, without the MLP that the size of Table A1 includes. Positions and relative
biases are parameters; the bias table includes three rows for a class token.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import InputSpec, MDTConfig
from gesso.errors import UsageError
from gesso.interop.mapping import (
    ADM_PROCESS,
    ImportedModel,
    TensorMapping,
    count_layers,
    grid_side,
    has_variance,
    import_tensors,
    map_layers,
    split_variance,
    tensor_shape,
    variance_note,
)

BLOCK_LIST_NAMES = {"en_inblocks": "in_blocks", "en_outblocks": "out_blocks", "de_blocks": "decoder"}
BLOCK_NAMES = {
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "ada.linear",
    "skip_linear": "skip",
}
BIAS_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
INDEX_SUFFIX = ".relative_position_index"  # a constant that follows from the grid


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    return {"en_inblocks.0.attn.qkv.weight", "decoder_pos_embed", "y_embedder.embedding_table.weight"} <= keys


def block_mappings(foreign: str, name: str) -> list[TensorMapping]:
    """Return the mappings of a block."""
    return [
        *map_layers({f"{foreign}.{a}": f"{name}.{b}" for a, b in BLOCK_NAMES.items()}),
        TensorMapping(f"{name}.bias.table", (f"{foreign}.{BIAS_TABLE}",)),
    ]


def original_mappings(encoder_layers: int, decoder_layers: int) -> list[TensorMapping]:
    """Return the mappings of all tensors."""
    mappings = map_layers(
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time.mlp.0",
            "t_embedder.mlp.2": "time.mlp.2",
            "final_layer.adaLN_modulation.1": "final_ada.linear",
            "final_layer.linear": "final",
            "final_layer.linear.variance": "variance",
        }
    )
    mappings += [
        TensorMapping("semantic.table.weight", ("y_embedder.embedding_table.weight",)),
        TensorMapping("position.table", ("pos_embed",)),
        TensorMapping("decoder_position.table", ("decoder_pos_embed",)),
        TensorMapping("side.mask_token", ("mask_token",)),
    ]
    for foreign, name in BLOCK_LIST_NAMES.items():
        for i in range(decoder_layers if name == "decoder" else encoder_layers):
            mappings += block_mappings(f"{foreign}.{i}", f"{name}.{i}")
    return mappings + block_mappings("sideblocks.0", "side.block")


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[MDTConfig, InputSpec]:
    """Return the network's settings, from names and shapes; the relative biases give the number of heads."""
    width, channels, patch, _ = tensor_shape(state, "x_embedder.proj.weight")
    halves, decoder = count_layers(state, "en_inblocks"), count_layers(state, "de_blocks")
    bias_heads = tensor_shape(state, f"en_inblocks.0.{BIAS_TABLE}")[1]
    if num_heads not in (None, bias_heads):
        raise UsageError(f"num_heads={num_heads} does not fit the network: by its relative biases it has {bias_heads}")
    cfg = MDTConfig(
        hidden_size=width,
        depth=2 * halves + decoder,
        num_heads=bias_heads,
        patch_size=patch,
        decoder_layers=decoder,
        class_embed="table",
        mlp_ratio=tensor_shape(state, "en_inblocks.0.mlp.fc1.weight")[0] / width,
        learned_variance=has_variance(tensor_shape(state, "final_layer.linear.weight")[0], patch, channels),
    )
    tensor_shape(state, "pos_embed")
    resolution = patch * grid_side("pos_embed", state["pos_embed"])
    return cfg, InputSpec(channels, resolution, tensor_shape(state, "y_embedder.embedding_table.weight")[0] - 1)


def import_weights(state: Mapping[str, Tensor], num_heads: int | None) -> ImportedModel:
    """Return the imported model of a state dict in this format."""
    cfg, inputs = infer_config(state, num_heads)
    notes = {
        "source": "MDTv2 (sail-sg/MDT)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "latents": "SD VAE times 0.18215 when 4 channels",
    }
    notes |= variance_note(cfg.learned_variance)
    state_dict = split_variance(state, "final_layer.linear", cfg.patch_size, inputs.channels)
    state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith(INDEX_SUFFIX)}
    weights = import_tensors(state_dict, original_mappings((cfg.depth - cfg.decoder_layers) // 2, cfg.decoder_layers))
    return ImportedModel(cfg, inputs, weights, notes, ADM_PROCESS)
