"""PixArt-alpha's weights, of diffusers' PixArtTransformer2DModel and under their own names (facts), and ours.

The model of 1024 pixels counts its positions in halves and embeds height, width and aspect ratio: it is refused.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.config import Inputs, PixArt
from gesso.errors import UsageError
from gesso.interop.dit import block_ties, own_block_ties
from gesso.interop.found import (
    ADM_PROCESS,
    ASSUMED,
    NATIVE,
    PROPORTIONAL,
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

TOP = {
    "pos_embed.proj": "trunk.patch_embed.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "trunk.time.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "trunk.time.mlp.2",
    "adaln_single.linear": "ada.linear",
    "caption_projection.linear_1": "semantic.mlp.0",
    "caption_projection.linear_2": "semantic.mlp.2",
    "proj_out": "trunk.final",
    "proj_out.variance": "trunk.variance",
}
OWN_TOP = {
    "x_embedder.proj": "trunk.patch_embed.proj",
    "t_embedder.mlp.0": "trunk.time.mlp.0",
    "t_embedder.mlp.2": "trunk.time.mlp.2",
    "t_block.1": "ada.linear",
    "y_embedder.y_proj.fc1": "semantic.mlp.0",
    "y_embedder.y_proj.fc2": "semantic.mlp.2",
    "final_layer.linear": "trunk.final",
    "final_layer.linear.variance": "trunk.variance",
}
TABLES = ("pos_embed", "pos_embed.pos_embed")
"""Where the position table is: in PixArt's own weights, in those of some versions of diffusers."""
NULLS = ("y_embedder.y_embedding", "caption_projection.y_embedding")
SIZES = ("csize_embedder.", "ar_embedder.", "adaln_single.emb.resolution_embedder.")


def matches(keys: set[str]) -> bool:
    peer = {"adaln_single.linear.weight", "scale_shift_table", "caption_projection.linear_1.weight"}
    own = {"t_block.1.weight", "final_layer.scale_shift_table", "y_embedder.y_proj.fc1.weight"}
    return keys >= peer or keys >= own


def is_peer(state: Mapping[str, Tensor]) -> bool:
    return "adaln_single.linear.weight" in state


def diffusers_ties(depth: int) -> list[Tie]:
    ties = [*layers(TOP), Tie("final_table", ("scale_shift_table",))]
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        ties += block_ties(theirs, ours)
        ties.append(Tie(f"{ours}.table", (f"{theirs}.scale_shift_table",)))
        ties += layers({f"{theirs}.attn2.to_q": f"{ours}.cross.q", f"{theirs}.attn2.to_out.0": f"{ours}.cross.out"})
        ties += stack([f"{theirs}.attn2.to_{x}" for x in "kv"], f"{ours}.cross.kv")
    return ties


def original_ties(depth: int) -> list[Tie]:
    ties = [*layers(OWN_TOP), Tie("final_table", ("final_layer.scale_shift_table",))]
    for i in range(depth):
        block = f"blocks.{i}"
        ties += own_block_ties(block, block)
        ties.append(Tie(f"{block}.table", (f"{block}.scale_shift_table",)))
        names = {"q_linear": "q", "kv_linear": "kv", "proj": "out"}
        ties += layers({f"{block}.cross_attn.{a}": f"{block}.cross.{b}" for a, b in names.items()})
    return ties


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of PixArtNet with text."""
    _, channels, patch, _ = shape(state, "pos_embed.proj.weight")
    kept = split_variance(state, "proj_out", patch, channels)
    return take(carried(kept), diffusers_ties(count(state, "transformer_blocks")))


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PixArt's own tensors under the names of PixArtNet with text. Its kv is stacked as ours is."""
    _, channels, patch, _ = shape(state, "x_embedder.proj.weight")
    kept = split_variance(state, "final_layer.linear", patch, channels)
    return take(carried(kept), original_ties(count(state, "blocks")))


def carried(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the position table, which is made, and the null caption, which is no part of our network."""
    return {name: tensor for name, tensor in state.items() if name not in TABLES + NULLS}


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[PixArt, Inputs]:
    """The network's configuration, from names and shapes; a stored position table tells the resolution, else 32.

    Raises UsageError for the model of 1024 pixels.
    """
    if any(name.startswith(SIZES) for name in state):
        raise UsageError(
            "PixArt-alpha of 1024 pixels embeds sizes and counts positions in halves, which net.name=pixart does not; "
            "take the model of 256 or 512"
        )
    peer = is_peer(state)
    blocks, fc = ("transformer_blocks", "ff.net.0.proj.weight") if peer else ("blocks", "mlp.fc1.weight")
    caption = "caption_projection.linear_1.weight" if peer else "y_embedder.y_proj.fc1.weight"
    width, channels, patch, _ = shape(state, "pos_embed.proj.weight" if peer else "x_embedder.proj.weight")
    depth, last = count(state, blocks), "proj_out" if peer else "final_layer.linear"
    stored = [patch * stepped_side(name, state[name], width) for name in TABLES if name in state]
    cfg = PixArt(
        width=width, depth=depth, heads=heads_of(width, depth, heads), patch=patch,
        mlp_ratio=shape(state, f"{blocks}.0.{fc}")[0] / width,
        positions="proportional" if stored else "extrapolated",
        learned_variance=has_variance(shape(state, f"{last}.weight")[0], patch, channels),
    )  # fmt: skip
    return cfg, Inputs(channels, stored[0] if stored else 32, text_width=shape(state, caption)[1])


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    peer = is_peer(state)
    stored = any(name in state for name in TABLES)
    notes = {
        "source": "PixArt-alpha (diffusers)" if peer else "PixArt-alpha (PixArt-alpha/PixArt-alpha)",
        "process": "VP, 1000 steps, beta linear from 1e-4 to 0.02, epsilon",
        "c_noise": "timestep index 0..999",
        "positions": PROPORTIONAL if stored else f"{NATIVE} (256 or 512 pixels, interpolation_scale 1)",
        "latents": "SD VAE times 0.18215 when 4 channels (PixArt-sigma has the same names, and SDXL's VAE)",
    }
    if not stored:
        notes["resolution"] = ASSUMED
    if any(name in state for name in NULLS):
        notes["null"] = "the original's null caption is left behind; withheld text is zeros here"
    notes |= variance_note(cfg.learned_variance)
    weights = from_diffusers(state) if peer else from_original(state)
    return Found(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes, ADM_PROCESS)


def to_diffusers(weights: Mapping[str, Tensor], cfg: PixArt, inputs: Inputs) -> tuple[str, dict, dict[str, Tensor]]:
    """Class name, configuration and weights. Raises UsageError where the class has no place for a setting."""
    peer = "PixArtTransformer2DModel"
    refuse(
        peer,
        {
            "net.positions=resampled (proportional it holds)": cfg.positions == "resampled",
            f"net.positions={cfg.positions} from another grid": from_another_grid(cfg, inputs),
            "net.qk_norm=true": cfg.qk_norm,
            f"net.mlp_ratio={cfg.mlp_ratio} (its own is 4)": cfg.mlp_ratio != 4,
            "a network without text": not inputs.text_width,
            "control": controls(inputs) > 0,
        },
    )
    config = {
        "num_attention_heads": cfg.heads, "attention_head_dim": cfg.width // cfg.heads, "num_layers": cfg.depth,
        "in_channels": inputs.channels, "sample_size": inputs.resolution,
        "out_channels": inputs.channels * (2 if cfg.learned_variance else 1),
        "patch_size": cfg.patch, "cross_attention_dim": cfg.width, "caption_channels": inputs.text_width,
        "norm_eps": 1e-6, "interpolation_scale": 1, "use_additional_conditions": False,
    }  # fmt: skip
    theirs = give(weights, diffusers_ties(cfg.depth))
    return peer, config, join_variance(theirs, "proj_out", cfg.patch, inputs.channels)
