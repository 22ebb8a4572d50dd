"""Names and shapes of a small network of NVlabs/edm2, and random weights under them."""

import torch


def published_shapes(c=64, classes=7, channels=3, multipliers=(1, 2), resolution=16, attention=(8,)):
    """Return names and shapes of a published EDM2 state with one block per level.

    in0 always has attention, and the embedding has the width of the widest level.
    """
    widths = [c * m for m in multipliers]
    E, side = max(widths), {i: f"{resolution >> i}x{resolution >> i}" for i in range(len(widths))}
    shapes = {
        "unet.out_gain": (), "unet.emb_fourier.freqs": (c,), "unet.emb_fourier.phases": (c,),
        "unet.emb_noise.weight": (E, c),
        "unet.emb_label.weight": (E, classes), f"unet.enc.{side[0]}_conv.weight": (c, channels + 1, 3, 3),
        "unet.out_conv.weight": (channels, c, 3, 3), "logvar_fourier.freqs": (128,), "logvar_fourier.phases": (128,),
        "logvar_linear.weight": (1, 128),
    }  # fmt: skip

    def block(name, n_in, n_out, attends=False):
        first = n_out if name.startswith("enc") else n_in
        inner = {"emb_gain": (), "emb_linear.weight": (n_out, E), "conv_res0.weight": (n_out, first, 3, 3),
                 "conv_res1.weight": (n_out, n_out, 3, 3)}  # fmt: skip
        if n_in != n_out:
            inner["conv_skip.weight"] = (n_out, n_in, 1, 1)
        if attends:
            inner |= {"attn_qkv.weight": (3 * n_out, n_out, 1, 1), "attn_proj.weight": (n_out, n_out, 1, 1)}
        shapes.update({f"unet.{name}.{key}": shape for key, shape in inner.items()})

    at, skips = c, [c]
    for i, width in enumerate(widths):
        if i:
            block(f"enc.{side[i]}_down", at, at)
            skips.append(at)
        block(f"enc.{side[i]}_block0", at, width, resolution >> i in attention)
        at = width
        skips.append(at)
    for i, width in reversed(list(enumerate(widths))):
        lowest = i == len(widths) - 1
        for name in ("in0", "in1") if lowest else ("up",):
            block(f"dec.{side[i]}_{name}", at, at, name == "in0")
        for k in range(2):
            block(f"dec.{side[i]}_block{k}", at + skips.pop(), width, resolution >> i in attention)
            at = width
    return shapes


def published_edm2_weights():
    """A random state dict with the names and shapes of a published EDM2 model: 16x16, two levels, one block."""
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=g) * 1.7 for name, shape in published_shapes().items()}
    return state | {"unet.out_gain": torch.tensor(0.8)}
