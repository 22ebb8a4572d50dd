"""mmDiT and mmDiT++: parity with diffusers' SD3 transformer, published sizes, and their differences."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed as PeerPatchEmbed
from helpers.network_cases import CASES, example_batch, initialized_net, randomize_constants_, randomized_net
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import ControlSpec, InputSpec, MMDiTConfig, MMDiTppConfig
from gesso.interop.sd3 import from_diffusers
from gesso.models.embeddings import sinusoidal_embedding
from gesso.models.mmdit import CroppedPosEmbed, MMDiT, MMDiTpp


def build(cfg: MMDiTConfig | MMDiTppConfig, inputs: InputSpec) -> nn.Module:
    return {MMDiTConfig: MMDiT, MMDiTppConfig: MMDiTpp}[type(cfg)](cfg, inputs)


# --- parity with diffusers ---


class Float64Sinusoids(nn.Module):
    """Diffusers' time_proj computes in float32; this is the same in the dtype of the weights."""

    def forward(self, timestep: Tensor) -> Tensor:
        return sinusoidal_embedding(timestep, 256)


def pair(dtype: torch.dtype, qk_norm: str | None, depth: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    peer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=depth, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=6, qk_norm=qk_norm,
    )  # fmt: skip
    peer = randomize_constants_(peer).to(dtype).eval()
    cfg = MMDiTConfig(
        hidden_size=32,
        depth=depth,
        num_heads=4,
        separate_text_weights="all",
        qk_norm=qk_norm is not None,
        pos_embed_max_size=6,
    )
    actual = MMDiT(cfg, InputSpec(4, 8, text_dim=20, pooled_dim=12)).to(dtype)
    actual.load_state_dict(from_diffusers(peer.state_dict()))  # strict
    return actual, peer


def run_both(net: nn.Module, peer: nn.Module, dtype: torch.dtype, height: int, width: int, time: float, batch: int = 2):
    """Return outputs and the gradients of x, text and pooled of both networks."""
    results = []
    for which in ("ours", "peer"):
        g = torch.Generator().manual_seed(3)
        x, text, pooled, weight = (
            torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in [(batch, 4, height, width), (batch, 5, 20), (batch, 12), (batch, 4, height, width)]
        )
        t = (time * torch.rand(batch, generator=g, dtype=torch.float64)).to(dtype)
        if which == "ours":
            out = net(x, t, t, Cond(text=text, pooled=pooled))
        else:
            out = peer(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]
        results.append((out, *torch.autograd.grad((out * weight).sum(), [x, text, pooled])))
    assert results[0][0].std() > 1e-2
    return results


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12), (12, 6), (2, 10)])
def test_sd3_in_float64(height, width):
    """The time sinusoids, the only part of diffusers below float64, are replaced."""
    actual, peer = pair(torch.float64, None)
    peer.time_text_embed.time_proj = Float64Sinusoids()
    for output, expected in zip(*run_both(actual, peer, torch.float64, height, width, time=1000), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12)])
def test_sd35_in_float64(height, width):
    """Diffusers' RMSNorm of qk_norm takes its mean square in float32."""
    actual, peer = pair(torch.float64, "rms_norm")
    peer.time_text_embed.time_proj = Float64Sinusoids()
    for output, expected in zip(*run_both(actual, peer, torch.float64, height, width, time=1000), strict=True):
        assert (output - expected).abs().max() < 1e-6 * expected.abs().max()


def test_sd3_with_diffusers_time_embedding():
    """Unreplaced float32 sinusoids, at times below 1: 1e-6."""
    actual, peer = pair(torch.float64, None)
    for output, expected in zip(*run_both(actual, peer, torch.float64, 8, 12, time=1), strict=True):
        assert (output - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_sd3_in_float32(qk_norm):
    actual, peer = pair(torch.float32, qk_norm)
    for output, expected in zip(*run_both(actual, peer, torch.float32, 6, 8, time=1000), strict=True):
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sd3_gradients_of_weights():
    actual, peer = pair(torch.float64, None, depth=2)
    peer.time_text_embed.time_proj = Float64Sinusoids()
    g = torch.Generator().manual_seed(4)
    x, text, pooled = (torch.randn(s, generator=g, dtype=torch.float64) for s in [(2, 4, 8, 6), (2, 3, 20), (2, 12)])
    t = torch.tensor([10.0, 900.0], dtype=torch.float64)
    actual(x, t, t, Cond(text=text, pooled=pooled)).square().sum().backward()
    peer(x, text, pooled, t, return_dict=False)[0].square().sum().backward()
    zero = {"pos_embed.pos_embed": peer.pos_embed.pos_embed}
    expected = from_diffusers(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in peer.named_parameters()} | zero
    )
    for name, parameter in actual.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_sd3_import_keeps_unknown_names():
    _, peer = pair(torch.float32, None)
    attn2 = "transformer_blocks.0.attn2.to_q.weight"
    assert attn2 in from_diffusers(peer.state_dict() | {attn2: torch.zeros(1)})


@pytest.mark.parametrize("max_grid, base", [(12, 4), (7, 6), (5, 5)])
def test_cropped_pos_embed_equals_diffusers(max_grid, base):
    peer = PeerPatchEmbed(2 * base, 2 * base, 2, 4, 16, pos_embed_max_size=max_grid)
    actual = CroppedPosEmbed(16, max_grid, base)
    torch.testing.assert_close(
        actual.table.flatten(1, 2), peer.pos_embed, rtol=0, atol=2e-6
    )  # diffusers has float32 angles
    for h, w in [(max_grid, max_grid), (3, 4), (2, 5), (1, 1)]:
        torch.testing.assert_close(actual(h, w), peer.cropped_pos_embed(2 * h, 2 * w), rtol=0, atol=2e-6)


def test_cropped_pos_embed_rejects_larger_grids():
    with pytest.raises(ValueError, match=r"3 x 7 tokens exceeds net\.pos_embed_max_size=6"):
        CroppedPosEmbed(16, 6, 4)(3, 7)
    with pytest.raises(ValueError, match="max_size=6 is less than the 8 x 8"):
        CroppedPosEmbed(16, 6, 8)


# --- counts ---

SDXL_CONTROL = ControlSpec(num_high=4, num_low=2, mlp="joint")


def count(cfg: MMDiTConfig | MMDiTppConfig, inputs: InputSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(cfg, inputs).parameters())


def test_mmdit_parameters_of_table_a1():
    """Text cell, with the position table of 64x64 latents, a constant here. No pooled text: one text MLP in all."""
    total = count(
        MMDiTConfig(hidden_size=1152, depth=28, num_heads=16), InputSpec(4, 64, text_dim=768, control=SDXL_CONTROL)
    )
    assert total + 1024 * 1152 == pytest.approx(791.64e6, rel=1e-5)


def test_mmditpp_text_has_the_size_of_mmdit():
    inputs = InputSpec(4, 64, text_dim=768, control=SDXL_CONTROL)
    shape = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
    assert count(MMDiTppConfig(**shape), inputs) == count(MMDiTConfig(**shape), inputs)


def test_literal_two_stream_mmdit():
    """SD3's block at XL/2: 4 latent channels, CLIP-L tokens and pooled text of 768, qk-norm: 1328.85 M."""
    cfg = MMDiTConfig(hidden_size=1152, depth=28, num_heads=16, separate_text_weights="all")
    inputs = InputSpec(4, 64, text_dim=768, pooled_dim=768)
    assert count(cfg, inputs) == 1_328_851_528
    with torch.device("meta"):
        peer = SD3Transformer2DModel(
            num_layers=28, attention_head_dim=72, num_attention_heads=16, in_channels=4, out_channels=4,
            joint_attention_dim=768, pooled_projection_dim=768, qk_norm="rms_norm",
        )  # fmt: skip
    # The peer also has a norm for the queries of the last block's text, which reach no output.
    assert peer.num_parameters() == count(cfg, inputs) + 72


def test_sd3_medium_parameters():
    cfg = MMDiTConfig(
        hidden_size=1536, depth=24, num_heads=24, separate_text_weights="all", qk_norm=False, pos_embed_max_size=192
    )
    inputs = InputSpec(16, 128, text_dim=4096, pooled_dim=2048)
    assert count(cfg, inputs) == pytest.approx(2028.3e6, abs=0.05e6)
    with torch.device("meta"):
        peer = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
        actual = build(cfg, inputs)
    assert peer.num_parameters() == count(cfg, inputs)
    actual.load_state_dict(from_diffusers(peer.state_dict()), assign=True)


# --- what the two differ in ---


def modulation_vectors(net: nn.Module, args) -> Tensor:
    """Return c, the input of the final adaLN."""
    vectors = []
    handle = net.final_ada.register_forward_pre_hook(lambda _, inputs: vectors.append(inputs[0]))
    net(*args)
    handle.remove()
    return vectors[0]


def test_modulation_includes_semantics_in_mmdit_only():
    for case, semantic in [
        ("mmdit: class", True), ("mmdit: pooled control", True), ("mmdit all: pooled", True),
        ("mmdit: text", False), ("mmdit++: text control", False),
    ]:  # fmt: skip
        net, (x, c_noise, progress, cond) = randomized_net(CASES[case]), example_batch(CASES[case])
        conditional = modulation_vectors(net, (x, c_noise, progress, cond))
        withheld = modulation_vectors(net, (x, c_noise, progress, cond.without(semantic=True)))
        assert (not conditional.equal(withheld)) == semantic, case


def test_class_modulation_is_the_class_token():
    net, args = randomized_net(CASES["mmdit: class"]), example_batch(CASES["mmdit: class"])
    expected = net.time(args[1]) + net.semantic.table(args[3].label)
    torch.testing.assert_close(modulation_vectors(net, args), expected)


def test_mmdit_without_pooled_text_is_mmditpp():
    """They are the same function on equal weights with text in the tokens only."""
    actual, expected = randomized_net(CASES["mmdit: text"]), initialized_net(CASES["mmdit++: text"]).double()
    expected.load_state_dict(actual.state_dict())
    args = example_batch(CASES["mmdit: text"])
    assert actual(*args).equal(expected(*args))


def test_separate_text_weights():
    shared, separate = (initialized_net(CASES[case]).blocks[0] for case in ("mmdit: text", "mmdit all: pooled"))
    assert {n for n, _ in shared.named_parameters() if n.startswith("text")} == {
        "text_qkv.linear.weight", "text_qkv.q_norm.weight", "text_qkv.k_norm.weight"
    }  # fmt: skip
    image = sum(p.numel() for n, p in separate.named_parameters() if n.startswith("image"))
    assert sum(p.numel() for n, p in separate.named_parameters() if n.startswith("text")) == image
