"""SD3's weights, of diffusers' SD3Transformer2DModel and under Stability's own names (facts), and ours.

Where adaLN gives two vectors (last layer, last text block), diffusers has scale, shift; Stability and we shift, scale.
The queries of the last block's text reach no output: their rows travel in our qkv, their norm has no counterpart.
SD3.5 medium's first blocks have a second attention, of the image alone, and nine vectors of adaLN in one order.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gesso.config import RF, Inputs, MMDiT
from gesso.interop.found import Found, Tie, controls, count, give, heads_of, layers, refuse, shape, side_of, stack, take

PEER = "transformer_blocks.0.attn.add_k_proj.weight"
OWN = "joint_blocks.0.x_block.attn.qkv.weight"


def matches(keys: set[str]) -> bool:
    return (PEER in keys and "time_text_embed.text_embedder.linear_1.weight" in keys) or OWN in keys


def diffusers_block_ties(theirs: str, ours: str, last: bool) -> list[Tie]:
    ties = [
        *stack([f"{theirs}.attn.to_{x}" for x in "qkv"], f"{ours}.image_qkv.linear"),
        *stack([f"{theirs}.attn2.to_{x}" for x in "qkv"], f"{ours}.image.second_qkv.linear"),
        *stack([f"{theirs}.attn.add_{x}_proj" for x in "qkv"], f"{ours}.text_qkv.linear"),
    ]
    for x in "qk":
        ties.append(Tie(f"{ours}.image_qkv.{x}_norm.weight", (f"{theirs}.attn.norm_{x}.weight",)))
        ties.append(Tie(f"{ours}.image.second_qkv.{x}_norm.weight", (f"{theirs}.attn2.norm_{x}.weight",)))
        ties.append(Tie(f"{ours}.text_qkv.{x}_norm.weight", (f"{theirs}.attn.norm_added_{x}.weight",)))
    image = {"norm1.linear": "ada.linear", "attn.to_out.0": "out", "attn2.to_out.0": "second_out"}
    image |= {"ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
    ties += layers({f"{theirs}.{a}": f"{ours}.image.{b}" for a, b in image.items()})
    if last:
        return ties + layers({f"{theirs}.norm1_context.linear": f"{ours}.text.linear"}, "swapped")
    text = {"norm1_context.linear": "ada.linear", "attn.to_add_out": "out"}
    text |= {"ff_context.net.0.proj": "mlp.0", "ff_context.net.2": "mlp.2"}
    return ties + layers({f"{theirs}.{a}": f"{ours}.text.{b}" for a, b in text.items()})


def diffusers_ties(depth: int) -> list[Tie]:
    ties = [Tie("position.table", ("pos_embed.pos_embed",), "square")]
    ties += layers({"pos_embed.proj": "patch_embed.proj", "context_embedder": "semantic.mlp", "proj_out": "final"})
    for theirs, ours in (("timestep_embedder", "time.mlp"), ("text_embedder", "pooled")):
        ties += layers({f"time_text_embed.{theirs}.linear_{n}": f"{ours}.{i}" for n, i in ((1, 0), (2, 2))})
    ties += layers({"norm_out.linear": "final_ada.linear"}, "swapped")
    for i in range(depth):
        ties += diffusers_block_ties(f"transformer_blocks.{i}", f"blocks.{i}", last=i == depth - 1)
    return ties


def original_ties(depth: int) -> list[Tie]:
    ties = [Tie("position.table", ("pos_embed",), "square")]
    ties += layers({"x_embedder.proj": "patch_embed.proj", "context_embedder": "semantic.mlp"})
    ties += layers({"final_layer.linear": "final", "final_layer.adaLN_modulation.1": "final_ada.linear"})
    for i in (0, 2):
        ties += layers({f"t_embedder.mlp.{i}": f"time.mlp.{i}", f"y_embedder.mlp.{i}": f"pooled.{i}"})
    for i in range(depth):
        for kind, ours in (("x_block", "image"), ("context_block", "text")):
            theirs, stream = f"joint_blocks.{i}.{kind}", f"blocks.{i}.{ours}"
            attentions = {"attn": f"{stream}_qkv", "attn2": f"{stream}.second_qkv"}
            for attention, qkv in attentions.items():
                ties += layers({f"{theirs}.{attention}.qkv": f"{qkv}.linear"})
                ties += [Tie(f"{qkv}.{x}_norm.weight", (f"{theirs}.{attention}.ln_{x}.weight",)) for x in "qk"]
            last_text = kind == "context_block" and i == depth - 1
            inner = {"attn.proj": "out", "attn2.proj": "second_out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
            inner["adaLN_modulation.1"] = "linear" if last_text else "ada.linear"
            ties += layers({f"{theirs}.{a}": f"{stream}.{b}" for a, b in inner.items()})
    return ties


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under MMDiTNet's names."""
    depth, kept = count(state, "transformer_blocks"), dict(state)
    kept.pop(unused_norm(depth), None)
    return take(kept, diffusers_ties(depth))


def unused_norm(depth: int) -> str:
    """Of the queries of the last block's text, in diffusers."""
    return f"transformer_blocks.{depth - 1}.attn.norm_added_q.weight"


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stability's tensors under MMDiTNet's names."""
    depth, kept = count(state, "joint_blocks"), dict(state)
    kept.pop(f"joint_blocks.{depth - 1}.context_block.attn.ln_q.weight", None)
    return take(kept, original_ties(depth))


def training_grid(table: Tensor) -> int:
    """Tokens on a side in training, from the table (1, side^2, D).

    One token is base/side apart from the next; of the column, the first channel is the sine and channel D/4 the
    cosine, so the angle between columns 0 and 1 is that step.
    """
    side = math.isqrt(table.shape[1])
    if side == 1:
        return 1
    quarter = table.shape[2] // 4
    first, second = (math.atan2(float(table[0, i, 0]), float(table[0, i, quarter])) for i in (0, 1))
    return min(max(round((second - first) % (2 * math.pi) * side), 1), side)


def settings(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[MMDiT, Inputs]:
    """The network's configuration, from names, shapes and the step of the position table."""
    peer = PEER in state
    blocks = "transformer_blocks" if peer else "joint_blocks"
    width, channels, patch, _ = shape(state, "pos_embed.proj.weight" if peer else "x_embedder.proj.weight")
    depth = count(state, blocks)
    norm = state.get(f"{blocks}.0.attn.norm_q.weight" if peer else f"{blocks}.0.x_block.attn.ln_q.weight")
    head_width = None if norm is None else len(norm)
    mlp = "ff.net.0.proj.weight" if peer else "x_block.mlp.fc1.weight"
    second = "attn2.to_out.0.weight" if peer else "x_block.attn2.proj.weight"
    positions = "pos_embed.pos_embed" if peer else "pos_embed"
    shape(state, positions)
    table = state[positions]
    cfg = MMDiT(
        width=width, depth=depth, heads=heads_of(width, depth, heads, head_width), patch=patch,
        mlp_ratio=shape(state, f"{blocks}.0.{mlp}")[0] / width, qk_norm=norm is not None, text_weights="all",
        max_grid=side_of(positions, table), dual_blocks=sum(f"{blocks}.{i}.{second}" in state for i in range(depth)),
    )  # fmt: skip
    pooled = "time_text_embed.text_embedder.linear_1.weight" if peer else "y_embedder.mlp.0.weight"
    text_width, pooled_width = shape(state, "context_embedder.weight")[1], shape(state, pooled)[1]
    return cfg, Inputs(channels, patch * training_grid(table), text_width=text_width, pooled_width=pooled_width)


def convert(state: Mapping[str, Tensor], heads: int | None) -> Found:
    cfg, inputs = settings(state, heads)
    peer = PEER in state
    name = "SD3.5" if cfg.qk_norm else "SD3"
    notes = {
        "source": f"{name} (diffusers)" if peer else f"{name} (Stability)",
        "process": "RF, x_s = (1 - s) x_0 + s noise, velocity noise - x_0",
        "c_noise": "1000*s",
        "latents": "(SD3 VAE - 0.0609) times 1.5305 when 16 channels",
    }
    weights = from_diffusers(state) if peer else from_original(state)
    return Found(cfg, inputs, {name: tensor.float() for name, tensor in weights.items()}, notes, RF())


def to_diffusers(weights: Mapping[str, Tensor], cfg: MMDiT, inputs: Inputs) -> tuple[str, dict, dict[str, Tensor]]:
    """Class name, configuration and weights. Raises UsageError where the class has no place for a setting."""
    peer = "SD3Transformer2DModel"
    refuse(
        peer,
        {
            f"net.text_weights={cfg.text_weights} (all it holds)": cfg.text_weights != "all",
            f"net.positions={cfg.positions} without net.max_grid": cfg.max_grid is None,
            f"net.mlp_ratio={cfg.mlp_ratio} (its own is 4)": cfg.mlp_ratio != 4,
            "a network without text": not inputs.text_width,
            "a network without pooled text": not inputs.pooled_width,
            "control": controls(inputs) > 0,
        },
    )
    config = {
        "num_attention_heads": cfg.heads, "attention_head_dim": cfg.width // cfg.heads, "num_layers": cfg.depth,
        "in_channels": inputs.channels, "out_channels": inputs.channels, "sample_size": inputs.resolution,
        "patch_size": cfg.patch, "joint_attention_dim": inputs.text_width, "caption_projection_dim": cfg.width,
        "pooled_projection_dim": inputs.pooled_width, "pos_embed_max_size": cfg.max_grid,
        "dual_attention_layers": tuple(range(cfg.dual_blocks)), "qk_norm": "rms_norm" if cfg.qk_norm else None,
    }  # fmt: skip
    theirs = give(weights, diffusers_ties(cfg.depth))
    if cfg.qk_norm:
        theirs[unused_norm(cfg.depth)] = torch.ones_like(weights["blocks.0.image_qkv.q_norm.weight"])
    return peer, config, theirs
