"""Slow reference of EDM2's CONFIG G as in the paper, with weight normalization in the forward pass.

A function of named weights, in the dtype they come in, with eps = 0 for weights (Eq. 46) and 1e-4 for
activations. Shares no code with gesso but the names of the weights.
"""

import math

import torch


def unit_rows(w):
    """Return the weight with each row of unit length (Eq. 46)."""
    return w / w.reshape(len(w), -1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1))


def conv(x, w, gain=1.0):
    """Compute a convolution as a sum over kernel positions."""
    w = unit_rows(w) * gain
    k = w.shape[-1]
    padded = torch.nn.functional.pad(x, [k // 2] * 4)
    out = 0
    for i in range(k):
        for j in range(k):
            window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            out = out + torch.einsum("bchw,oc->bohw", window, w[:, :, i, j])
    return out


def mp_silu(x):
    return x / (1 + torch.exp(-x)) / 0.596  # Eq. 81


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)  # Eq. 88


def mp_cat(a, b, t):
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))  # Eq. 103
    return torch.cat([c * (1 - t) / math.sqrt(n_a) * a, c * t / math.sqrt(n_b) * b], 1)


def pixel_norm(x, dim=1):
    return x / (1e-4 + x.pow(2).mean(dim, keepdim=True).sqrt())


def attention(p, x, head_width):
    b, c, h, w = x.shape
    qkv = conv(x, p["qkv.weight"]).reshape(b, 3, c // head_width, head_width, h * w)
    q, k, v = (pixel_norm(t, 2) for t in qkv.unbind(1))
    weights = torch.einsum("bnci,bncj->bnij", q, k / math.sqrt(head_width)).softmax(-1)  # Eq. 10-12
    y = torch.einsum("bnij,bncj->bnci", weights, v).reshape(b, c, h, w)
    return mp_sum(x, conv(y, p["proj.weight"]), 0.3)


def strip_prefix(p, prefix):
    return {k[len(prefix) :]: v for k, v in p.items() if k.startswith(prefix)}


def block(p, x, emb, encoder, resample, head_width):
    if resample == "down":
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
    if resample == "up":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if encoder:
        if "conv_skip.weight" in p:
            x = conv(x, p["conv_skip.weight"])
        x = pixel_norm(x)
    y = conv(mp_silu(x), p["conv_res0.weight"])
    scale = emb @ (unit_rows(p["emb_linear.weight"]) * p["emb_gain"]).T + 1
    y = conv(mp_silu(y * scale[:, :, None, None]), p["conv_res1.weight"])
    if not encoder and "conv_skip.weight" in p:
        x = conv(x, p["conv_skip.weight"])
    x = mp_sum(x, y, 0.3)
    if "attention.qkv.weight" in p:
        x = attention(strip_prefix(p, "attention."), x, head_width)
    return x.clamp(-256, 256)


def forward(p, x, c_noise, one_hot, levels, blocks, head_width):
    """Compute F from named weights and buffers p; one_hot (B, classes) has a zero row for no class."""
    fourier = math.sqrt(2) * torch.cos(c_noise[:, None] * p["emb_fourier.freqs"] + p["emb_fourier.phases"])
    emb = fourier @ unit_rows(p["emb_noise.weight"]).T
    label = (one_hot * math.sqrt(one_hot.shape[1])) @ unit_rows(p["emb_label.weight"]).T
    emb = mp_silu(mp_sum(emb, label, 0.5))
    x = conv(torch.cat([x, torch.ones_like(x[:, :1])], 1), p["conv_in.weight"])
    skips, i = [x], 0
    for level in range(levels):
        for kind in (["down"] if level else []) + ["keep"] * blocks:
            x = block(strip_prefix(p, f"encoder.{i}."), x, emb, True, kind, head_width)
            skips.append(x)
            i += 1
    i = 0
    for level in reversed(range(levels)):
        for _ in range(2 if level == levels - 1 else 1):
            kind = "keep" if level == levels - 1 else "up"
            x = block(strip_prefix(p, f"decoder.{i}."), x, emb, False, kind, head_width)
            i += 1
        for _ in range(blocks + 1):
            x = block(strip_prefix(p, f"decoder.{i}."), mp_cat(x, skips.pop(), 0.5), emb, False, "keep", head_width)
            i += 1
    return conv(x, p["conv_out.weight"], p["out_gain"])
