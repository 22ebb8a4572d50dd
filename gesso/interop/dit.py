"""DiT's weights, of diffusers' DiTTransformer2DModel and of facebookresearch/DiT (facts about its names), as ours.

Both stack (patch, patch, channels) in the last layer and shift, scale, gate of attention, then MLP, in adaLN:
so do we. diffusers keeps a copy of the time and class embedders in every block.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import DiT, Inputs
from gesso.errors import RunError
from gesso.interop.found import STEPS, Found, Move, count, heads_of, shape, sigma_note

PEER = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"
OWN = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "trunk.time.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "trunk.time.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "trunk.time.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "trunk.time.mlp.2.bias",
    "class_embedder.embedding_table.weight": "table.weight",
}


def matches(keys: set[str]) -> bool:
    return PEER in keys or (keys >= OWN and "blocks.0.attn.qkv.weight" in keys)


def block_to_ours(move: Move, theirs: str, ours: str) -> None:
    """Self-attention and MLP of a diffusers block, which its DiT and PixArt name alike."""
    layers = {"attn1.to_out.0": "out", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
    move.layers({f"{theirs}.{a}": f"{ours}.branches.{b}" for a, b in layers.items()})
    move.stack([f"{theirs}.attn1.to_{x}" for x in "qkv"], f"{ours}.branches.qkv.linear")


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under DiTNet's names. Raises RunError where its copies of the embedders differ."""
    move, depth = Move(state), count(state, "transformer_blocks")
    _, channels, patch, _ = shape(state, "pos_embed.proj.weight")
    move.layers({"pos_embed.proj": "trunk.patch_embed.proj", "proj_out_1": "final_ada.linear"})
    move.last("proj_out_2", "trunk.final", patch, channels)
    for theirs, ours in EMBEDDERS.items():
        names = [f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)]
        move.tensor(names[0], ours)
        for name in names[1:]:
            if name in move.rest and ours in move.ours and not move.rest.pop(name).equal(move.ours[ours]):
                raise RunError(f"{theirs} differs between blocks; DiT has one embedder for all of them")
    for i in range(depth):
        block_to_ours(move, f"transformer_blocks.{i}", f"blocks.{i}")
        move.layers({f"transformer_blocks.{i}.norm1.linear": f"blocks.{i}.ada.linear"})
    return move.done()


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch/DiT's tensors under DiTNet's names. Its qkv is stacked as ours is."""
    move = Move(state)
    width, channels, patch, _ = shape(state, "x_embedder.proj.weight")
    table = move.rest.get("pos_embed")
    if table is not None and (
        table.ndim != 3 or table.shape[2] != width or round(table.shape[1] ** 0.5) ** 2 != table.shape[1]
    ):
        raise RunError(f"pos_embed of shape {tuple(table.shape)} is no table (1, side^2, {width})")
    move.drop("pos_embed")
    move.layers(
        {
            "x_embedder.proj": "trunk.patch_embed.proj",
            "t_embedder.mlp.0": "trunk.time.mlp.0",
            "t_embedder.mlp.2": "trunk.time.mlp.2",
            "final_layer.adaLN_modulation.1": "final_ada.linear",
        }
    )
    move.tensor("y_embedder.embedding_table.weight", "table.weight")
    move.last("final_layer.linear", "trunk.final", patch, channels)
    inner = {"attn.qkv": "branches.qkv.linear", "attn.proj": "branches.out", "adaLN_modulation.1": "ada.linear"}
    inner |= {"mlp.fc1": "branches.mlp.0", "mlp.fc2": "branches.mlp.2"}
    for i in range(count(state, "blocks")):
        move.layers({f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in inner.items()})
    return move.done()


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[DiT, Inputs]:
    """The network's configuration, from names and shapes. One row of the class table is the null class."""
    if PEER in state:
        patches, blocks, fc = "pos_embed.proj.weight", "transformer_blocks", "ff.net.0.proj.weight"
        table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    else:
        patches, blocks, fc = "x_embedder.proj.weight", "blocks", "mlp.fc1.weight"
        table = "y_embedder.embedding_table.weight"
    width, channels, patch, _ = shape(state, patches)
    depth = count(state, blocks)
    resolution = patch * round(state["pos_embed"].shape[1] ** 0.5) if "pos_embed" in state else 32
    ratio = shape(state, f"{blocks}.0.{fc}")[0] / width
    cfg = DiT(width=width, depth=depth, heads=heads_of(width, depth, heads), patch=patch, mlp_ratio=ratio)
    return cfg, Inputs(channels, resolution, shape(state, table)[0] - 1)


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    peer = PEER in state
    weights = from_diffusers(state) if peer else from_original(state)
    notes = {
        "source": "DiT (diffusers)" if peer else "DiT (facebookresearch/DiT)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": STEPS,
        "latents": "SD VAE times 0.18215 when 4 channels",
    }
    if peer:
        notes["time"] = (
            "diffusers spaces its time frequencies with downscale_freq_shift=1, we as DiT does: outputs 2 % off"
        )
    else:
        notes["process"] += " (SiT has the same names, and a process of its own)"
    last = shape(state, "proj_out_2.weight" if peer else "final_layer.linear.weight")[0]
    notes |= sigma_note(last, cfg.patch, inputs.channels)
    return Found(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes)
