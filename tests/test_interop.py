"""Other people's weights: names, layouts and the function that they stand for."""

import pytest
import reference_edm2
import torch

from gesso import interop
from gesso.cond import Cond
from gesso.errors import RunError, UsageError


def published_edm2(c=64, classes=7, channels=3):
    """A random state dict with the names and shapes of a published EDM2 model: 16x16, two levels, one block."""
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(shape, generator=g) * 1.7  # noqa: E731
    state = {
        "unet.out_gain": torch.tensor(0.8), "unet.emb_fourier.freqs": r(c), "unet.emb_fourier.phases": r(c),
        "unet.emb_noise.weight": r(4 * c, c), "unet.emb_label.weight": r(4 * c, classes),
        "unet.enc.16x16_conv.weight": r(c, channels + 1, 3, 3), "unet.out_conv.weight": r(channels, c, 3, 3),
        "logvar_fourier.freqs": r(128), "logvar_fourier.phases": r(128), "logvar_linear.weight": r(1, 128),
    }  # fmt: skip

    def block(name, n_in, n_out, first, attention):
        state[f"{name}.emb_gain"] = torch.randn((), generator=g)
        state[f"{name}.emb_linear.weight"] = r(n_out, 4 * c)
        state[f"{name}.conv_res0.weight"] = r(n_out, first, 3, 3)
        state[f"{name}.conv_res1.weight"] = r(n_out, n_out, 3, 3)
        if n_in != n_out:
            state[f"{name}.conv_skip.weight"] = r(n_out, n_in, 1, 1)
        if attention:
            state[f"{name}.attn_qkv.weight"] = r(3 * n_out, n_out, 1, 1)
            state[f"{name}.attn_proj.weight"] = r(n_out, n_out, 1, 1)

    block("unet.enc.16x16_block0", c, c, c, False)
    block("unet.enc.8x8_down", c, c, c, False)
    block("unet.enc.8x8_block0", c, 2 * c, 2 * c, True)
    block("unet.dec.8x8_in0", 2 * c, 2 * c, 2 * c, True)
    block("unet.dec.8x8_in1", 2 * c, 2 * c, 2 * c, False)
    block("unet.dec.8x8_block0", 4 * c, 2 * c, 4 * c, True)
    block("unet.dec.8x8_block1", 3 * c, 2 * c, 3 * c, True)
    block("unet.dec.16x16_up", 2 * c, 2 * c, 2 * c, False)
    block("unet.dec.16x16_block0", 3 * c, c, 3 * c, False)
    block("unet.dec.16x16_block1", 2 * c, c, 2 * c, False)
    return state


ORDER = {
    "encoder": ["enc.16x16_block0", "enc.8x8_down", "enc.8x8_block0"],
    "decoder": ["dec.8x8_in0", "dec.8x8_in1", "dec.8x8_block0", "dec.8x8_block1", "dec.16x16_up", "dec.16x16_block0", "dec.16x16_block1"],
}  # fmt: skip


def test_edm2_published_weights_give_the_published_function(monkeypatch):
    """The paper's equations on the published layout: normalization with eps 1e-4, q, k, v interleaved per head."""
    state = published_edm2()
    net, notes = interop.load(state)

    def rows(w):
        norm = w.reshape(len(w), -1).norm(dim=1)
        n = w[0].numel()
        return w / (1e-4 + norm / n**0.5).reshape(-1, *[1] * (w.ndim - 1)) / n**0.5

    def attention(p, x, head):
        b, c, h, w = x.shape
        qkv = reference_edm2.conv(x, p["qkv.weight"]).reshape(b, c // head, head, 3, h * w)
        q, k, v = (reference_edm2.pixel_norm(t, 2) for t in qkv.unbind(3))
        weights = torch.einsum("bnci,bncj->bnij", q, k / head**0.5).softmax(-1)
        y = torch.einsum("bnij,bncj->bnci", weights, v).reshape(b, c, h, w)
        return reference_edm2.mix(x, reference_edm2.conv(y, p["proj.weight"]), 0.3)

    monkeypatch.setattr(reference_edm2, "unit_rows", rows)
    monkeypatch.setattr(reference_edm2, "attention", attention)
    top = {
        "out_gain": "unet.out_gain", "emb_fourier.freqs": "unet.emb_fourier.freqs", "emb_fourier.phases": "unet.emb_fourier.phases",
        "emb_noise.weight": "unet.emb_noise.weight", "emb_label.weight": "unet.emb_label.weight",
        "conv_in.weight": "unet.enc.16x16_conv.weight", "conv_out.weight": "unet.out_conv.weight",
    }  # fmt: skip
    theirs = {ours: state[name].double() for ours, name in top.items()}
    for side, blocks in ORDER.items():
        for i, block in enumerate(blocks):
            for name, tensor in state.items():
                if name.startswith(f"unet.{block}."):
                    inner = name.removeprefix(f"unet.{block}.").replace("attn_", "attention.")
                    theirs[f"{side}.{i}.{inner}"] = tensor.double()
    g = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64), torch.randn(2, generator=g).double()
    one_hot = torch.eye(7, dtype=torch.float64)[[2, 5]]
    wanted = reference_edm2.forward(theirs, x, c_noise, one_hot, levels=2, blocks=1, head_width=64)
    ours = net.double()(x, c_noise, c_noise, Cond(label=torch.tensor([2, 5])))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)  # the weights passed through float32
    assert notes["process"].startswith("EDM") and notes["c_noise"] == "ln(sigma)/4"


def test_missing_and_unknown_tensors_are_listed():
    state = published_edm2()
    del state["unet.dec.8x8_in1.conv_res1.weight"]
    state["unet.surprise.weight"] = torch.zeros(3, 3)
    with pytest.raises(RunError, match=r"1 missing \(decoder.1.conv_res1.weight\); 1 unknown \(unet.surprise.weight\)"):
        interop.load(state)


def test_unknown_weights():
    with pytest.raises(UsageError, match="no project that gesso knows"):
        interop.load({"model.layer.weight": torch.zeros(1)})
