"""DiT's weights, of diffusers' DiTTransformer2DModel and of facebookresearch/DiT (facts about its names), and ours.

Both stack (patch, patch, channels) in the last layer and shift, scale, gate of attention, then MLP, in adaLN:
so do we. diffusers keeps a copy of the time and class embedders in every block.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import DiT, Inputs
from gesso.interop.found import (
    ADM_PROCESS,
    ASSUMED,
    NATIVE,
    PROPORTIONAL,
    STEPS,
    Found,
    Tie,
    controls,
    count,
    from_another_grid,
    give,
    has_variance,
    heads_of,
    join_variance,
    layers,
    refuse,
    shape,
    split_variance,
    stack,
    stepped_side,
    take,
    variance_note,
)

PEER = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"
OWN = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "trunk.time.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "trunk.time.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "trunk.time.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "trunk.time.mlp.2.bias",
    "class_embedder.embedding_table.weight": "table.weight",
}
SPACING = "diffusers spaces its time frequencies with downscale_freq_shift=1, we as DiT does: outputs 2 % off"


def matches(keys: set[str]) -> bool:
    return PEER in keys or (keys >= OWN and "blocks.0.attn.qkv.weight" in keys)


def block_ties(theirs: str, ours: str) -> list[Tie]:
    """Self-attention and MLP of a diffusers block, which its DiT and PixArt name alike."""
    names = {"attn1.to_out.0": "out", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
    inner = layers({f"{theirs}.{a}": f"{ours}.branches.{b}" for a, b in names.items()})
    return inner + stack([f"{theirs}.attn1.to_{x}" for x in "qkv"], f"{ours}.branches.qkv.linear")


def own_block_ties(theirs: str, ours: str) -> list[Tie]:
    """The same where qkv is stacked as ours is: DiT's and PixArt's own names."""
    names = {"attn.qkv": "qkv.linear", "attn.proj": "out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    return layers({f"{theirs}.{a}": f"{ours}.branches.{b}" for a, b in names.items()})


def diffusers_ties(depth: int) -> list[Tie]:
    ties = layers({"pos_embed.proj": "trunk.patch_embed.proj", "proj_out_1": "final_ada.linear"})
    ties += layers({"proj_out_2": "trunk.final", "proj_out_2.variance": "trunk.variance"})
    for theirs, ours in EMBEDDERS.items():
        ties.append(Tie(ours, tuple(f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)), "copies"))
    for i in range(depth):
        ties += block_ties(f"transformer_blocks.{i}", f"blocks.{i}")
        ties += layers({f"transformer_blocks.{i}.norm1.linear": f"blocks.{i}.ada.linear"})
    return ties


def original_ties(depth: int) -> list[Tie]:
    ties = layers(
        {
            "x_embedder.proj": "trunk.patch_embed.proj",
            "t_embedder.mlp.0": "trunk.time.mlp.0",
            "t_embedder.mlp.2": "trunk.time.mlp.2",
            "final_layer.adaLN_modulation.1": "final_ada.linear",
            "final_layer.linear": "trunk.final",
            "final_layer.linear.variance": "trunk.variance",
        }
    )
    ties.append(Tie("table.weight", ("y_embedder.embedding_table.weight",)))
    for i in range(depth):
        ties += own_block_ties(f"blocks.{i}", f"blocks.{i}")
        ties += layers({f"blocks.{i}.adaLN_modulation.1": f"blocks.{i}.ada.linear"})
    return ties


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under DiTNet's names. Raises RunError where its copies of the embedders differ."""
    _, channels, patch, _ = shape(state, "pos_embed.proj.weight")
    state = split_variance(state, "proj_out_2", patch, channels)
    return take(state, diffusers_ties(count(state, "transformer_blocks")))


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch/DiT's tensors under DiTNet's names; its position table is made, not carried."""
    _, channels, patch, _ = shape(state, "x_embedder.proj.weight")
    kept = split_variance(state, "final_layer.linear", patch, channels)
    kept.pop("pos_embed", None)
    return take(kept, original_ties(count(state, "blocks")))


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[DiT, Inputs]:
    """The network's configuration, from names and shapes. One row of the class table is the null class."""
    if PEER in state:
        patches, blocks, fc, last = "pos_embed.proj.weight", "transformer_blocks", "ff.net.0.proj.weight", "proj_out_2"
        table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    else:
        patches, blocks, fc, last = "x_embedder.proj.weight", "blocks", "mlp.fc1.weight", "final_layer.linear"
        table = "y_embedder.embedding_table.weight"
    width, channels, patch, _ = shape(state, patches)
    depth = count(state, blocks)
    stored = state.get("pos_embed")
    resolution = 32 if stored is None else patch * stepped_side("pos_embed", stored, width)
    cfg = DiT(
        width=width, depth=depth, heads=heads_of(width, depth, heads), patch=patch,
        mlp_ratio=shape(state, f"{blocks}.0.{fc}")[0] / width, positions="proportional" if PEER in state and stored is not None else "extrapolated",
        learned_variance=has_variance(shape(state, f"{last}.weight")[0], patch, channels),
    )  # fmt: skip
    return cfg, Inputs(channels, resolution, shape(state, table)[0] - 1)


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    peer = PEER in state
    weights = from_diffusers(state) if peer else from_original(state)
    notes = {
        "source": "DiT (diffusers)" if peer else "DiT (facebookresearch/DiT)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": STEPS if not peer else PROPORTIONAL if "pos_embed" in state else NATIVE,
        "latents": "SD VAE times 0.18215 when 4 channels",
    }
    if "pos_embed" not in state:
        notes["resolution"] = ASSUMED
    if peer:
        notes["time"] = SPACING
    else:
        notes["process"] += " (SiT has the same names, and a process of its own)"
    notes |= variance_note(cfg.learned_variance)
    return Found(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes, ADM_PROCESS)


def to_diffusers(weights: Mapping[str, Tensor], cfg: DiT, inputs: Inputs) -> tuple[str, dict, dict[str, Tensor]]:
    """Class name, configuration and weights. Raises UsageError where the class has no place for a setting."""
    peer = "DiTTransformer2DModel"
    refuse(
        peer,
        {
            "net.positions=resampled (proportional it holds)": cfg.positions == "resampled",
            f"net.positions={cfg.positions} from another grid": from_another_grid(cfg, inputs),
            "net.qk_norm=true": cfg.qk_norm,
            f"net.mlp_ratio={cfg.mlp_ratio} (its own is 4)": cfg.mlp_ratio != 4,
            "a network without classes": not inputs.num_classes,
            "control": controls(inputs) > 0,
        },
    )
    config = {
        "num_attention_heads": cfg.heads, "attention_head_dim": cfg.width // cfg.heads, "num_layers": cfg.depth,
        "in_channels": inputs.channels, "sample_size": inputs.resolution,
        "out_channels": inputs.channels * (2 if cfg.learned_variance else 1),
        "patch_size": cfg.patch, "num_embeds_ada_norm": inputs.num_classes, "norm_eps": 1e-6,
    }  # fmt: skip
    theirs = give(weights, diffusers_ties(cfg.depth))
    return peer, config, join_variance(theirs, "proj_out_2", cfg.patch, inputs.channels)
