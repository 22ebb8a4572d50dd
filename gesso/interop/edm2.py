"""Weights of EDM2's published U-Nets (facts about the state dicts of NVlabs/edm2).

Published names are `unet.enc.{R}x{R}_{conv|down|blockN}`, `unet.dec.{R}x{R}_{in0|in1|up|blockN}`; gesso numbers encoder
and decoder blocks. Published q, k and v are interleaved per channel, gesso's are concatenated.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from gesso.config import EDM2Config, EDM2LadderConfig, EDMConfig, InputSpec
from gesso.errors import UsageError
from gesso.interop.mapping import ImportedModel

TOP_LEVEL_NAMES = {
    "unet.out_gain": "out_gain",
    "unet.emb_fourier.freqs": "emb_fourier.freqs",
    "unet.emb_fourier.phases": "emb_fourier.phases",
    "unet.emb_noise.weight": "emb_noise.weight",
    "unet.emb_label.weight": "emb_label.weight",
    "unet.out_conv.weight": "conv_out.weight",
}
BLOCK_NAMES = {
    "emb_gain": "emb_gain",
    "emb_linear.weight": "emb_linear.weight",
    "conv_res0.weight": "conv_res0.weight",
    "conv_res1.weight": "conv_res1.weight",
    "conv_skip.weight": "conv_skip.weight",
    "attn_qkv.weight": "attention.qkv.weight",
    "attn_proj.weight": "attention.proj.weight",
}
PAPER_LAYER_NAMES = {"affine": "emb_linear", "conv0": "conv_res0", "conv1": "conv_res1", "skip": "conv_skip"}
EXPORT_RMS = 1024.0
"""Rms of exported rows, a power of two, so that the product is exact."""
UNCERTAINTY_PREFIX = "logvar_"  # unused in sampling


def matches(keys: set[str]) -> bool:
    """Return True if these are the tensor names of this format."""
    return "unet.out_gain" in keys and "unet.emb_noise.weight" in keys


def infer_config(state: Mapping[str, Tensor]) -> tuple[EDM2Config, InputSpec]:
    """Return the network's settings, from names and shapes."""
    resolutions = sorted({int(m[1]) for k in state if (m := re.match(r"unet\.enc\.(\d+)x", k))}, reverse=True)
    blocks = len([k for k in state if re.match(rf"unet\.enc\.{resolutions[0]}x\d+_block\d+\.conv_res0", k)])
    widths = [state[f"unet.enc.{r}x{r}_block0.conv_res1.weight"].shape[0] for r in resolutions]
    c = math.gcd(*widths)  # the base width or a multiple of it; only products of width and multiplier matter
    embedding = state["unet.emb_noise.weight"].shape[0]
    if embedding != max(widths):
        raise UsageError(
            f"the embedding of this EDM2 network has {embedding} channels (channel_mult_emb), its widest level "
            f"{max(widths)}; gesso has only the published default, where both are equal"
        )
    attention = [i for i, r in enumerate(resolutions) if f"unet.enc.{r}x{r}_block0.attn_qkv.weight" in state]
    label = state.get("unet.emb_label.weight")
    cfg = EDM2Config(
        channels=c, channel_mult=tuple(w // c for w in widths), num_blocks=blocks, attention_levels=tuple(attention)
    )
    classes = 0 if label is None else label.shape[1]
    return cfg, InputSpec(state["unet.out_conv.weight"].shape[0], resolutions[0], classes)


def published_names(cfg: EDM2Config | EDM2LadderConfig, inputs: InputSpec) -> dict[str, str]:
    """Return the map of published names to gesso's names for every tensor; all CONFIGS have CONFIG G's names."""
    levels = len(cfg.channel_mult)
    resolutions = [inputs.resolution >> level for level in range(levels)]
    encoder, decoder = [], []
    for level, r in enumerate(resolutions):
        encoder += [f"unet.enc.{r}x{r}_down"] if level else []
        encoder += [f"unet.enc.{r}x{r}_block{i}" for i in range(cfg.num_blocks)]
    for level, r in reversed(list(enumerate(resolutions))):
        first = ["in0", "in1"] if level == levels - 1 else ["up"]
        decoder += [f"unet.dec.{r}x{r}_{name}" for name in [*first, *(f"block{i}" for i in range(cfg.num_blocks + 1))]]
    table = dict(TOP_LEVEL_NAMES)
    table[f"unet.enc.{resolutions[0]}x{resolutions[0]}_conv.weight"] = "conv_in.weight"
    for side, blocks in (("encoder", encoder), ("decoder", decoder)):
        for i, block in enumerate(blocks):
            table |= {f"{block}.{foreign}": f"{side}.{i}.{name}" for foreign, name in BLOCK_NAMES.items()}
    return table


def name_of_paper_layer(name: str, cfg: EDM2Config | EDM2LadderConfig, inputs: InputSpec) -> str | None:
    """Return gesso's name of a weight in the notation of Appendix D.6 (enc-64x64-block0-conv0), or None."""
    if name in ("map-label", "map-layer0"):
        return {"map-label": "emb_label.weight", "map-layer0": "emb_noise.weight"}[name]
    side, _, rest = name.partition("-")
    block, _, part = rest.replace("-", "_", 1).partition("-")
    published = (
        f"unet.{side}.{block}.{PAPER_LAYER_NAMES.get(part, part)}.weight" if part else f"unet.{side}.{block}.weight"
    )
    return published_names(cfg, inputs).get(published)


def import_weights(state: Mapping[str, Tensor], num_heads: int | None) -> ImportedModel:
    """Return the imported model, with weights as the published forward pass uses them.

    The published code divides a weight by 1e-4 + RMS in every forward pass, this function once. The rows are normalized
    again only when the network is trained.
    """
    if num_heads is not None:
        raise UsageError("EDM2's heads are 64 channels wide; remove num_heads=")
    cfg, inputs = infer_config(state)
    table = published_names(cfg, inputs)
    weights = {}
    for name, tensor in state.items():
        if name.startswith(UNCERTAINTY_PREFIX):
            continue
        tensor = tensor.float()
        if name.endswith("attn_qkv.weight"):
            tensor = tensor.unflatten(0, (-1, cfg.channels_per_head, 3)).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
        if tensor.ndim > 1:
            rms = tensor.flatten(1).square().mean(1).sqrt()
            tensor = tensor / (1e-4 + rms).reshape(-1, *[1] * (tensor.ndim - 1))
        weights[table.get(name, name)] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    notes = {
        "source": "EDM2 (NVlabs/edm2)",
        "process": "EDM, sigma_data 0.5",
        "c_noise": "ln(sigma)/4",
        "adapted": "weights normalized once with eps 1e-4; q, k, v regrouped; uncertainty function ignored",
        "latents": "SD VAE, input in [0, 1], mean (5.81, 3.25, 0.12, -2.15), std (4.17, 4.62, 3.71, 3.28) when 4 "
        "channels",
    }
    return ImportedModel(cfg, inputs, weights, notes, EDMConfig())


def export_state(weights: Mapping[str, Tensor], cfg: EDM2Config, inputs: InputSpec) -> dict[str, Tensor]:
    """Return weights whose rows have rms 1 under the published names, in the published layout.

    The published forward pass divides a weight by 1e-4 + rms. Weights are multiplied by EXPORT_RMS, so that this
    changes them by less than the rounding of float32. The uncertainty function, unused in sampling, is left out.

    Raises:
        UsageError: The network has control variables or balances that the published one does not have.
    """
    published = EDM2Config()
    balances = ("residual_balance", "attention_balance", "label_balance", "concat_balance")
    changed = [
        f"net.{name}={getattr(cfg, name)}" for name in balances if getattr(cfg, name) != getattr(published, name)
    ]
    changed += ["control variables"] if inputs.control.num_high + inputs.control.num_low else []
    if changed:
        raise UsageError(f"EDM2's state dict cannot represent {', '.join(changed)}: use --format diffusers")
    table = {name: foreign for foreign, name in published_names(cfg, inputs).items()}
    exported = {}
    for name, tensor in weights.items():
        tensor = tensor.float()
        if name.endswith("attention.qkv.weight"):
            tensor = tensor.unflatten(0, (3, -1, cfg.channels_per_head)).permute(1, 2, 0, 3, 4, 5).flatten(0, 2)
        if tensor.ndim > 1:
            tensor = tensor * EXPORT_RMS
        is_gain = name.rsplit(".", 1)[-1] in ("out_gain", "emb_gain")
        exported[table[name]] = tensor.reshape(()) if is_gain else tensor
    return exported
