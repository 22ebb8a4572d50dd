"""SD3's weights, of diffusers' SD3Transformer2DModel and under Stability's own names (facts), as ours.

Where adaLN gives two vectors (last layer, last text block), diffusers has scale, shift; Stability and we shift, scale.
The queries of the last block's text reach no output: their rows travel in our qkv, their norm has no counterpart.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from gesso.config import Inputs, MMDiT
from gesso.errors import RunError
from gesso.interop.found import Found, Move, count, heads_of, shape

PEER = "transformer_blocks.0.attn.add_k_proj.weight"
OWN = "joint_blocks.0.x_block.attn.qkv.weight"


def matches(keys: set[str]) -> bool:
    return (PEER in keys and "time_text_embed.text_embedder.linear_1.weight" in keys) or OWN in keys


def square(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The position table (1, side^2, D) as (1, side, side, D)."""
    tokens = shape(state, name)[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise RunError(f"{name} has {tokens} positions, not a square")
    return state[name].unflatten(1, (side, side))


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under MMDiTNet's names. SD3.5 medium's second attention has no place there."""
    move, depth = Move(state), count(state, "transformer_blocks")
    move.ours["position.table"] = square(move.rest, "pos_embed.pos_embed")
    move.drop("pos_embed.pos_embed")
    move.layers({"pos_embed.proj": "patch_embed.proj", "context_embedder": "semantic.mlp", "proj_out": "final"})
    for theirs, ours in (("timestep_embedder", "time.mlp"), ("text_embedder", "pooled")):
        move.layers({f"time_text_embed.{theirs}.linear_{n}": f"{ours}.{i}" for n, i in ((1, 0), (2, 2))})
    move.swapped("norm_out.linear", "final_ada.linear")

    def stream(block: str, names: tuple[str, str, str], ours: str) -> None:
        out, ff, ada = names
        move.layers({f"{block}.{ada}.linear": f"{ours}.ada.linear", f"{block}.attn.{out}": f"{ours}.out"})
        move.layers({f"{block}.{ff}.net.0.proj": f"{ours}.mlp.0", f"{block}.{ff}.net.2": f"{ours}.mlp.2"})

    for i in range(depth):
        theirs, ours, last = f"transformer_blocks.{i}", f"blocks.{i}", i == depth - 1
        move.stack([f"{theirs}.attn.to_{x}" for x in "qkv"], f"{ours}.image_qkv.linear")
        move.stack([f"{theirs}.attn.add_{x}_proj" for x in "qkv"], f"{ours}.text_qkv.linear")
        if last:
            move.drop(f"{theirs}.attn.norm_added_q.weight")
        for x in "qk":
            move.tensor(f"{theirs}.attn.norm_{x}.weight", f"{ours}.image_qkv.{x}_norm.weight")
            move.tensor(f"{theirs}.attn.norm_added_{x}.weight", f"{ours}.text_qkv.{x}_norm.weight")
        stream(theirs, ("to_out.0", "ff", "norm1"), f"{ours}.image")
        if last:
            move.swapped(f"{theirs}.norm1_context.linear", f"{ours}.text.linear")
        else:
            stream(theirs, ("to_add_out", "ff_context", "norm1_context"), f"{ours}.text")
    return move.done()


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stability's tensors under MMDiTNet's names."""
    move, depth = Move(state), count(state, "joint_blocks")
    move.ours["position.table"] = square(move.rest, "pos_embed")
    move.drop("pos_embed")
    move.layers({"x_embedder.proj": "patch_embed.proj", "context_embedder": "semantic.mlp"})
    move.layers({"final_layer.linear": "final", "final_layer.adaLN_modulation.1": "final_ada.linear"})
    for i in (0, 2):
        move.layers({f"t_embedder.mlp.{i}": f"time.mlp.{i}", f"y_embedder.mlp.{i}": f"pooled.{i}"})
    for i in range(depth):
        for kind, ours in (("x_block", "image"), ("context_block", "text")):
            theirs, short = f"joint_blocks.{i}.{kind}", kind == "context_block" and i == depth - 1
            if short:
                move.drop(f"{theirs}.attn.ln_q.weight")
            for x in "qk":
                move.tensor(f"{theirs}.attn.ln_{x}.weight", f"blocks.{i}.{ours}_qkv.{x}_norm.weight")
            ada = f"blocks.{i}.{ours}.linear" if short else f"blocks.{i}.{ours}.ada.linear"
            move.layers(
                {
                    f"{theirs}.attn.qkv": f"blocks.{i}.{ours}_qkv.linear",
                    f"{theirs}.attn.proj": f"blocks.{i}.{ours}.out",
                    f"{theirs}.mlp.fc1": f"blocks.{i}.{ours}.mlp.0",
                    f"{theirs}.mlp.fc2": f"blocks.{i}.{ours}.mlp.2",
                    f"{theirs}.adaLN_modulation.1": ada,
                }
            )
    return move.done()


def training_grid(table: Tensor) -> int:
    """Tokens on a side in training, from the table (1, side, side, D).

    One token is base/side apart from the next, and the first channel is the sine of the column: column 1
    has sin(base/side), and base <= side keeps it below pi/2.
    """
    side = table.shape[1]
    step = math.asin(min(max(float(table[0, 0, 1, 0]), 0.0), 1.0)) if side > 1 else 1.0
    return min(max(round(step * side), 1), side)


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[MMDiT, Inputs]:
    """The network's configuration, from names, shapes and the step of the position table."""
    peer = PEER in state
    blocks = "transformer_blocks" if peer else "joint_blocks"
    width, channels, patch, _ = shape(state, "pos_embed.proj.weight" if peer else "x_embedder.proj.weight")
    depth = count(state, blocks)
    norm = state.get(f"{blocks}.0.attn.norm_q.weight" if peer else f"{blocks}.0.x_block.attn.ln_q.weight")
    head_width = None if norm is None else len(norm)
    mlp = "ff.net.0.proj.weight" if peer else "x_block.mlp.fc1.weight"
    table = square(state, "pos_embed.pos_embed" if peer else "pos_embed")
    cfg = MMDiT(
        width=width, depth=depth, heads=heads_of(width, depth, heads, head_width), patch=patch,
        mlp_ratio=shape(state, f"{blocks}.0.{mlp}")[0] / width, qk_norm=norm is not None, text_weights="all",
        max_grid=table.shape[1],
    )  # fmt: skip
    pooled = "time_text_embed.text_embedder.linear_1.weight" if peer else "y_embedder.mlp.0.weight"
    text_width, pooled_width = shape(state, "context_embedder.weight")[1], shape(state, pooled)[1]
    return cfg, Inputs(channels, patch * training_grid(table), text_width=text_width, pooled_width=pooled_width)


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    peer = PEER in state
    notes = {
        "source": "SD3 (diffusers)" if peer else "SD3 (Stability)",
        "process": "RF, x_s = (1 - s) x_0 + s noise, velocity noise - x_0",
        "c_noise": "1000*s",
        "latents": "(SD3 VAE - 0.0609) times 1.5305 when 16 channels",
    }
    weights = from_diffusers(state) if peer else from_original(state)
    return Found(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes)
