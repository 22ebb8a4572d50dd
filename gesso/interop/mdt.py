"""MDTv2's weights (facts about the names of sail-sg/MDT) as ours.

Its class enters as the table's row, without the MLP that Table A1's size has. Positions and relative biases are
parameters there as here; the table's three rows for a class token travel with it.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import MDT, Inputs
from gesso.errors import UsageError
from gesso.interop.found import (
    ADM_PROCESS,
    Found,
    Tie,
    count,
    has_variance,
    layers,
    shape,
    side_of,
    split_variance,
    take,
    variance_note,
)

BLOCKS = {"en_inblocks": "in_blocks", "en_outblocks": "out_blocks", "de_blocks": "decoder"}
INNER = {
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "ada.linear",
    "skip_linear": "skip",
}
BIAS = "attn.rel_pos_bias.relative_position_bias_table"
INDEX = ".relative_position_index"  # a constant that follows from the grid


def matches(keys: set[str]) -> bool:
    return {"en_inblocks.0.attn.qkv.weight", "decoder_pos_embed", "y_embedder.embedding_table.weight"} <= keys


def block_ties(theirs: str, ours: str) -> list[Tie]:
    return [
        *layers({f"{theirs}.{a}": f"{ours}.{b}" for a, b in INNER.items()}),
        Tie(f"{ours}.bias.table", (f"{theirs}.{BIAS}",)),
    ]


def original_ties(halves: int, decoder: int) -> list[Tie]:
    ties = layers(
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time.mlp.0",
            "t_embedder.mlp.2": "time.mlp.2",
            "final_layer.adaLN_modulation.1": "final_ada.linear",
            "final_layer.linear": "final",
            "final_layer.linear.variance": "variance",
        }
    )
    ties += [
        Tie("semantic.table.weight", ("y_embedder.embedding_table.weight",)),
        Tie("position.table", ("pos_embed",)),
        Tie("decoder_position.table", ("decoder_pos_embed",)),
        Tie("side.mask_token", ("mask_token",)),
    ]
    for theirs, ours in BLOCKS.items():
        for i in range(decoder if ours == "decoder" else halves):
            ties += block_ties(f"{theirs}.{i}", f"{ours}.{i}")
    return ties + block_ties("sideblocks.0", "side.block")


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[MDT, Inputs]:
    """The network's configuration, from names and shapes: the relative biases tell the heads."""
    width, channels, patch, _ = shape(state, "x_embedder.proj.weight")
    halves, decoder = count(state, "en_inblocks"), count(state, "de_blocks")
    found = shape(state, f"en_inblocks.0.{BIAS}")[1]
    if heads not in (None, found):
        raise UsageError(f"heads={heads} does not fit the network: its relative biases say {found}")
    cfg = MDT(
        width=width, depth=2 * halves + decoder, heads=found, patch=patch, decoder=decoder, class_embed="table",
        mlp_ratio=shape(state, "en_inblocks.0.mlp.fc1.weight")[0] / width,
        learned_variance=has_variance(shape(state, "final_layer.linear.weight")[0], patch, channels),
    )  # fmt: skip
    shape(state, "pos_embed")
    resolution = patch * side_of("pos_embed", state["pos_embed"])
    return cfg, Inputs(channels, resolution, shape(state, "y_embedder.embedding_table.weight")[0] - 1)


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    notes = {
        "source": "MDTv2 (sail-sg/MDT)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "latents": "SD VAE times 0.18215 when 4 channels",
    }
    notes |= variance_note(cfg.learned_variance)
    kept = split_variance(state, "final_layer.linear", cfg.patch, inputs.channels)
    kept = {name: tensor for name, tensor in kept.items() if not name.endswith(INDEX)}
    weights = take(kept, original_ties((cfg.depth - cfg.decoder) // 2, cfg.decoder))
    return Found(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes, ADM_PROCESS)
