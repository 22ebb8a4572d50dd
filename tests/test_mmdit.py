"""mmDiT and mmDiT++: parity with diffusers' SD3 transformer, counts of the papers, and what the two differ in."""

import pytest
import torch
from conftest import awake
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed as PeerPatchEmbed
from networks import ROWS, batch, fresh, trained
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import Control, Inputs, MMDiT, MMDiTpp
from gesso.interop.sd3 import from_diffusers
from gesso.nets.embed import sinusoids
from gesso.nets.mmdit import CroppedPosition, MMDiTNet, MMDiTppNet


def build(cfg: MMDiT | MMDiTpp, inputs: Inputs) -> nn.Module:
    return {MMDiT: MMDiTNet, MMDiTpp: MMDiTppNet}[type(cfg)](cfg, inputs)


# --- parity with diffusers ---


class Float64Sinusoids(nn.Module):
    """The peer's time_proj computes in float32 whatever its weights are; this is the same in their dtype."""

    def forward(self, timestep: Tensor) -> Tensor:
        return sinusoids(timestep, 256)


def pair(dtype: torch.dtype, qk_norm: str | None, depth: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    peer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=depth, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=6, qk_norm=qk_norm,
    )  # fmt: skip
    peer = awake(peer).to(dtype).eval()
    cfg = MMDiT(width=32, depth=depth, heads=4, text_weights="all", qk_norm=qk_norm is not None, max_grid=6)
    ours = MMDiTNet(cfg, Inputs(4, 8, text_width=20, pooled_width=12)).to(dtype)
    ours.load_state_dict(from_diffusers(peer.state_dict()))  # strict
    return ours, peer


def both(ours: nn.Module, peer: nn.Module, dtype: torch.dtype, height: int, width: int, time: float, batch: int = 2):
    """Outputs and the gradients of x, text and pooled, of both."""
    results = []
    for which in ("ours", "peer"):
        g = torch.Generator().manual_seed(3)
        x, text, pooled, weight = (
            torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in [(batch, 4, height, width), (batch, 5, 20), (batch, 12), (batch, 4, height, width)]
        )
        t = (time * torch.rand(batch, generator=g, dtype=torch.float64)).to(dtype)
        if which == "ours":
            out = ours(x, t, t, Cond(text=text, pooled=pooled))
        else:
            out = peer(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]
        results.append((out, *torch.autograd.grad((out * weight).sum(), [x, text, pooled])))
    assert results[0][0].std() > 1e-2
    return results


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12), (12, 6), (2, 10)])
def test_sd3_in_float64(height, width):
    """Its time sinusoids, computed in float32, replaced: nothing else of the peer is below float64."""
    ours, peer = pair(torch.float64, None)
    peer.time_text_embed.time_proj = Float64Sinusoids()
    for mine, theirs in zip(*both(ours, peer, torch.float64, height, width, time=1000), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12)])
def test_sd35_in_float64(height, width):
    """qk_norm: the peer's RMSNorm takes its mean square in float32."""
    ours, peer = pair(torch.float64, "rms_norm")
    peer.time_text_embed.time_proj = Float64Sinusoids()
    for mine, theirs in zip(*both(ours, peer, torch.float64, height, width, time=1000), strict=True):
        assert (mine - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_sd3_with_the_peers_own_time_sinusoids():
    """Unreplaced float32 sinusoids, at times below 1: 1e-6."""
    ours, peer = pair(torch.float64, None)
    for mine, theirs in zip(*both(ours, peer, torch.float64, 8, 12, time=1), strict=True):
        assert (mine - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_sd3_in_float32(qk_norm):
    ours, peer = pair(torch.float32, qk_norm)
    for mine, theirs in zip(*both(ours, peer, torch.float32, 6, 8, time=1000), strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_sd3_gradients_of_weights():
    ours, peer = pair(torch.float64, None, depth=2)
    peer.time_text_embed.time_proj = Float64Sinusoids()
    g = torch.Generator().manual_seed(4)
    x, text, pooled = (torch.randn(s, generator=g, dtype=torch.float64) for s in [(2, 4, 8, 6), (2, 3, 20), (2, 12)])
    t = torch.tensor([10.0, 900.0], dtype=torch.float64)
    ours(x, t, t, Cond(text=text, pooled=pooled)).square().sum().backward()
    peer(x, text, pooled, t, return_dict=False)[0].square().sum().backward()
    zero = {"pos_embed.pos_embed": peer.pos_embed.pos_embed}
    theirs = from_diffusers(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in peer.named_parameters()} | zero
    )
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-9, atol=1e-9, msg=name)


def test_sd3_mapping_keeps_the_name_of_what_it_cannot_take():
    _, peer = pair(torch.float32, None)
    attn2 = "transformer_blocks.0.attn2.to_q.weight"
    assert attn2 in from_diffusers(peer.state_dict() | {attn2: torch.zeros(1)})


@pytest.mark.parametrize("max_grid, base", [(12, 4), (7, 6), (5, 5)])
def test_cropped_position_is_the_peers_table(max_grid, base):
    peer = PeerPatchEmbed(2 * base, 2 * base, 2, 4, 16, pos_embed_max_size=max_grid)
    ours = CroppedPosition(16, max_grid, base)
    torch.testing.assert_close(ours.table.flatten(1, 2), peer.pos_embed, rtol=0, atol=2e-6)  # theirs: float32 angles
    for h, w in [(max_grid, max_grid), (3, 4), (2, 5), (1, 1)]:
        torch.testing.assert_close(ours(h, w), peer.cropped_pos_embed(2 * h, 2 * w), rtol=0, atol=2e-6)


def test_cropped_position_refuses_a_grid_beyond_its_table():
    with pytest.raises(ValueError, match=r"3 x 7 tokens exceeds net\.max_grid=6"):
        CroppedPosition(16, 6, 4)(3, 7)
    with pytest.raises(ValueError, match="max_grid=6 is less than the 8 x 8"):
        CroppedPosition(16, 6, 8)


# --- counts ---

SIX = Control(high=4, low=2, mlp="joint")


def count(cfg: MMDiT | MMDiTpp, inputs: Inputs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(cfg, inputs).parameters())


def test_mmdit_parameters_of_table_a1():
    """Text cell, with the position table of 64x64 latents, a constant here. No pooled text: one text MLP in all."""
    total = count(MMDiT(width=1152, depth=28, heads=16), Inputs(4, 64, text_width=768, control=SIX))
    assert total + 1024 * 1152 == pytest.approx(791.64e6, rel=1e-5)


def test_mmditpp_text_has_the_size_of_mmdit():
    inputs = Inputs(4, 64, text_width=768, control=SIX)
    shape = {"width": 1152, "depth": 28, "heads": 16}
    assert count(MMDiTpp(**shape), inputs) == count(MMDiT(**shape), inputs)


def test_literal_two_stream_mmdit():
    """SD3's block at XL/2: 4 latent channels, CLIP-L tokens and pooled text of 768, qk-norm: 1328.85 M."""
    cfg = MMDiT(width=1152, depth=28, heads=16, text_weights="all")
    inputs = Inputs(4, 64, text_width=768, pooled_width=768)
    assert count(cfg, inputs) == 1_328_851_528
    with torch.device("meta"):
        peer = SD3Transformer2DModel(
            num_layers=28, attention_head_dim=72, num_attention_heads=16, in_channels=4, out_channels=4,
            joint_attention_dim=768, pooled_projection_dim=768, qk_norm="rms_norm",
        )  # fmt: skip
    # The peer also has a norm for the queries of the last block's text, which reach no output.
    assert peer.num_parameters() == count(cfg, inputs) + 72


def test_sd3_medium_parameters():
    cfg = MMDiT(width=1536, depth=24, heads=24, text_weights="all", qk_norm=False, max_grid=192)
    inputs = Inputs(16, 128, text_width=4096, pooled_width=2048)
    assert count(cfg, inputs) == pytest.approx(2028.3e6, abs=0.05e6)
    with torch.device("meta"):
        peer = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
        ours = build(cfg, inputs)
    assert peer.num_parameters() == count(cfg, inputs)
    ours.load_state_dict(from_diffusers(peer.state_dict()), assign=True)


# --- what the two differ in ---


def modulating(net: nn.Module, args) -> Tensor:
    """c, the input of the final adaLN."""
    seen = []
    handle = net.final_ada.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(*args)
    handle.remove()
    return seen[0]


def test_c_holds_the_class_and_the_pooled_text_in_mmdit_and_nothing_semantic_in_mmditpp():
    for case, semantic in [
        ("mmdit: class", True), ("mmdit: pooled control", True), ("mmdit all: pooled", True),
        ("mmdit: text", False), ("mmdit++: text control", False),
    ]:  # fmt: skip
        net, (x, c_noise, progress, cond) = trained(ROWS[case]), batch(ROWS[case])
        given = modulating(net, (x, c_noise, progress, cond))
        withheld = modulating(net, (x, c_noise, progress, cond.without(semantic=True)))
        assert (not given.equal(withheld)) == semantic, case


def test_the_class_in_c_is_the_class_token():
    net, args = trained(ROWS["mmdit: class"]), batch(ROWS["mmdit: class"])
    wanted = net.time(args[1]) + net.semantic.table(args[3].label)
    torch.testing.assert_close(modulating(net, args), wanted)


def test_mmdit_without_pooled_text_is_mmditpp():
    """On equal weights, text in the tokens alone: one function."""
    ours, theirs = trained(ROWS["mmdit: text"]), fresh(ROWS["mmdit++: text"]).double()
    theirs.load_state_dict(ours.state_dict())
    args = batch(ROWS["mmdit: text"])
    assert ours(*args).equal(theirs(*args))


def test_all_has_a_block_of_its_own_for_text_and_qkv_only_qkv():
    shared, own = (fresh(ROWS[case]).blocks[0] for case in ("mmdit: text", "mmdit all: pooled"))
    assert {n for n, _ in shared.named_parameters() if n.startswith("text")} == {
        "text_qkv.linear.weight", "text_qkv.q_norm.weight", "text_qkv.k_norm.weight"
    }  # fmt: skip
    image = sum(p.numel() for n, p in own.named_parameters() if n.startswith("image"))
    assert sum(p.numel() for n, p in own.named_parameters() if n.startswith("text")) == image
