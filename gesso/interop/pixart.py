"""PixArt-alpha's weights, of diffusers' PixArtTransformer2DModel, as ours."""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import Inputs, PixArt
from gesso.interop.dit import block_to_ours
from gesso.interop.found import STEPS, Found, Move, count, heads_of, shape, sigma_note

TOP = {
    "pos_embed.proj": "trunk.patch_embed.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "trunk.time.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "trunk.time.mlp.2",
    "adaln_single.linear": "ada.linear",
    "caption_projection.linear_1": "semantic.mlp.0",
    "caption_projection.linear_2": "semantic.mlp.2",
}


def matches(keys: set[str]) -> bool:
    return keys >= {"adaln_single.linear.weight", "scale_shift_table", "caption_projection.linear_1.weight"}


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of PixArtNet with text."""
    move = Move(state)
    _, channels, patch, _ = shape(state, "pos_embed.proj.weight")
    move.drop("pos_embed.pos_embed")  # a constant, which some versions store
    move.layers(TOP)
    move.last("proj_out", "trunk.final", patch, channels)
    move.tensor("scale_shift_table", "final_table")
    for i in range(count(state, "transformer_blocks")):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        block_to_ours(move, theirs, ours)
        move.tensor(f"{theirs}.scale_shift_table", f"{ours}.table")
        move.layers({f"{theirs}.attn2.to_q": f"{ours}.cross.q", f"{theirs}.attn2.to_out.0": f"{ours}.cross.out"})
        move.stack([f"{theirs}.attn2.to_{x}" for x in "kv"], f"{ours}.cross.kv")
    return move.done()


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[PixArt, Inputs]:
    """The network's configuration, from names and shapes; the resolution is in none of them."""
    width, channels, patch, _ = shape(state, "pos_embed.proj.weight")
    depth = count(state, "transformer_blocks")
    ratio = shape(state, "transformer_blocks.0.ff.net.0.proj.weight")[0] / width
    cfg = PixArt(width=width, depth=depth, heads=heads_of(width, depth, heads), patch=patch, mlp_ratio=ratio)
    return cfg, Inputs(channels, 32, text_width=shape(state, "caption_projection.linear_1.weight")[1])


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    notes = {
        "source": "PixArt-alpha (diffusers)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": f"of 32 x 32 inputs, assumed; {STEPS}",
        "latents": "SD VAE times 0.18215 when 4 channels",
    }
    notes |= sigma_note(shape(state, "proj_out.weight")[0], cfg.patch, inputs.channels)
    weights = {name: tensor.float() for name, tensor in from_diffusers(state).items()}
    return Found(cfg, inputs, weights, notes)
