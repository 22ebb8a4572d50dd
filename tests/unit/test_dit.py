"""DiT, DiT with attention conditioning and PixArt: the paper's counts, parity with diffusers, their blocks."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from helpers.network_cases import randomize_constants_
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import ControlSpec, DiTAttConfig, DiTConfig, InputSpec, PixArtConfig
from gesso.errors import RunError
from gesso.interop import dit, pixart
from gesso.models.dit import DiT, DiTAtt, PixArt
from gesso.models.embeddings import sinusoidal_embedding

NETS = {DiTConfig: DiT, DiTAttConfig: DiTAtt, PixArtConfig: PixArt}


# --- Table A1 -------------------------------------------------------------------------------------------------------

XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2}
SDXL_CONTROL = ControlSpec(num_high=3, num_low=3, mlp="joint", schedule="uniform")
CLASS, TEXT = {"num_classes": 1000}, {"text_dim": 768}


@pytest.mark.parametrize(
    "cfg, semantic, positions, published, rel",
    [
        # positions: tokens whose position table the figure counts as parameters; here it is a constant.
        (DiTConfig, CLASS, 1024, 679.09e6, 1e-5),
        (DiTAttConfig, CLASS, 256, 792.44e6, 1e-5),
        (DiTAttConfig, TEXT, 1024, 940.49e6, 2e-5),
        (PixArtConfig, CLASS, 0, 611.7e6, 1e-5),
        (PixArtConfig, TEXT, 0, 610.12e6, 1e-4),
    ],
)
def test_parameters_of_table_a1(cfg, semantic, positions, published, rel):
    with torch.device("meta"):
        net = NETS[cfg](cfg(**XL), InputSpec(4, 64, control=SDXL_CONTROL, **semantic))
    count = sum(p.numel() for p in net.parameters())
    assert count + positions * 1152 == pytest.approx(published, rel=rel)


@pytest.mark.parametrize(
    "cfg, semantic, exact",
    [
        (DiTConfig, CLASS, 677_915_152),
        (PixArtConfig, CLASS, 611_698_192),
        (PixArtConfig, TEXT, 610_102_672),
        # less qk-norm: 2 (self-attention) and 4 (with cross-attention) weights of 72 per block
        (DiTAttConfig, CLASS, 792_440_080 - 256 * 1152 + 28 * 2 * 72),
        (DiTAttConfig, TEXT, 940_493_968 - 1024 * 1152 + 28 * 4 * 72),
    ],
)
def test_parameter_counts_are_exact(cfg, semantic, exact):
    with torch.device("meta"):
        net = NETS[cfg](cfg(**XL), InputSpec(4, 64, control=SDXL_CONTROL, **semantic))
    assert sum(p.numel() for p in net.parameters()) == exact


# --- Parity with diffusers ------------------------------------------------------------------------------------------


class DiffusersPosEmbed(nn.Module):
    """Diffusers' positions are arange, not the resampled grid of Berrada et al. (Pseudocode 1)."""

    def __init__(self, peer):
        super().__init__()
        self.width, self.base = peer.pos_embed.pos_embed.shape[2], peer.pos_embed.base_size

    def forward(self, h: int, w: int) -> Tensor:
        return get_2d_sincos_pos_embed(self.width, (h, w), base_size=self.base).float()[None]


class Sinusoids(nn.Module):
    """gesso's sinusoids replace those of diffusers, which use float32 (and, in DiT, downscale_freq_shift=1, not 0)."""

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(t, 256)


SHAPE = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8, "in_channels": 4}


def diffusers_model(kind: type, dtype: torch.dtype, **settings):
    """Return a diffusers model with random weights, none of them zero."""
    torch.manual_seed(0)
    peer = randomize_constants_(kind(**SHAPE, out_channels=4, **settings)).to(dtype).eval()
    assert all(p.abs().min() < p.abs().max() for p in peer.parameters())
    return peer


def dit_pair(dtype: torch.dtype):
    # norm_eps: diffusers' default, 1e-5, is not DiT's. num_embeds_ada_norm: the table has one more row, the null class.
    peer = diffusers_model(DiTTransformer2DModel, dtype, num_embeds_ada_norm=5, norm_eps=1e-6)
    first = peer.transformer_blocks[0].norm1.emb
    for block in peer.transformer_blocks:  # it duplicates the embedders of time and class in every block
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj = Sinusoids()
    net = DiT(DiTConfig(hidden_size=32, depth=3, num_heads=2), InputSpec(4, 8, 5)).to(dtype)
    net.load_state_dict(dit.from_diffusers(peer.state_dict()))
    net.trunk.position = DiffusersPosEmbed(peer)
    return net, peer


def pixart_pair(dtype: torch.dtype):
    peer = diffusers_model(PixArtTransformer2DModel, dtype, cross_attention_dim=32, caption_channels=12, norm_eps=1e-6)
    if dtype == torch.float64:
        peer.adaln_single.emb.time_proj = Sinusoids()
    net = PixArt(PixArtConfig(hidden_size=32, depth=3, num_heads=2), InputSpec(4, 8, text_dim=12)).to(dtype)
    net.load_state_dict(pixart.from_diffusers(peer.state_dict()))
    net.trunk.position = DiffusersPosEmbed(peer)
    return net, peer


def assert_equal_outputs(net: Tensor, reference: Tensor, inputs: list[Tensor], dtype: torch.dtype):
    """Compare outputs and input gradients of a random projection, to 1e-10 (fp64) or 1e-5 of the largest (fp32)."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    weight = torch.randn(net.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
    pairs = [(net, reference)]
    pairs += zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (net, reference)), strict=True)
    for a, b in pairs:
        assert a.isfinite().all() and b.abs().max() > 1e-3
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [8, 12])  # diffusers' unpatchify supports square images only
def test_dit_equals_diffusers(size, dtype):
    net, peer = dit_pair(dtype)
    x = torch.randn(3, 4, size, size, dtype=dtype, requires_grad=True)
    t, label = torch.tensor([0, 431, 999]).to(dtype), torch.tensor([1, 4, 5])  # 5: no class
    expected = peer(x, timestep=t, class_labels=label).sample
    assert_equal_outputs(net(x, t, t / 1000, Cond(label=label)), expected, [x], dtype)


def test_dit_parity_detects_other_time_frequencies():
    """Diffusers' default downscale_freq_shift=1 gives another function of the same weights."""
    net, peer = dit_pair(torch.float32)
    untouched = diffusers_model(DiTTransformer2DModel, torch.float32, num_embeds_ada_norm=5, norm_eps=1e-6)
    untouched.load_state_dict(peer.state_dict())
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([431.0, 999.0]), torch.tensor([1, 4])
    actual, expected = net(x, t, t / 1000, Cond(label=label)), untouched(x, timestep=t, class_labels=label).sample
    assert (actual - expected).abs().max() > 1e-3 * expected.abs().max()


def test_dit_weights_with_different_embedders_raise():
    peer = diffusers_model(DiTTransformer2DModel, torch.float32, num_embeds_ada_norm=5)
    with pytest.raises(RunError, match="differs between blocks"):
        dit.from_diffusers(peer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_pixart_equals_diffusers(size, masked, dtype):
    net, peer = pixart_pair(dtype)
    x = torch.randn(3, 4, *size, dtype=dtype, requires_grad=True)
    text = torch.randn(3, 6, 12, dtype=dtype, requires_grad=True)
    # An empty text: diffusers adds -10000 to all of its scores, so that it attends to all tokens, as gesso does.
    # In fp32 that addition rounds the scores to 1e-3, so there the last text has one token.
    last = 0 if dtype == torch.float64 else 1
    mask = torch.arange(6) < torch.tensor([[6], [2], [last]]) if masked else None
    t = torch.tensor([0, 431, 999]).to(dtype)
    actual = net(x, t, t / 1000, Cond(text=text, text_mask=mask))
    expected = peer(x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask).sample
    assert_equal_outputs(actual, expected, [x, text], dtype)


def test_pixart_parity_without_text():
    """Withheld text is zero tokens, which both pass through the caption MLP."""
    net, peer = pixart_pair(torch.float64)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    text, t = torch.randn(2, 6, 12, dtype=torch.float64), torch.tensor([5.0, 700.0], dtype=torch.float64)
    actual = net(x, t, t / 1000, Cond(text=text).without(semantic=True))
    assert_equal_outputs(actual, peer(x, encoder_hidden_states=0 * text, timestep=t).sample, [x], torch.float64)


# --- The blocks of DiT with attention -------------------------------------------------------------------------------


def dit_att_block(**semantic) -> nn.Module:
    torch.manual_seed(0)
    return DiTAtt(DiTAttConfig(hidden_size=32, depth=2, num_heads=2), InputSpec(3, 8, **semantic))


def test_class_token_shares_the_block_weights():
    """Table A1's class cell: beyond DiT's block only the adaLN grows, by 3 (D^2 + D)."""
    D = 32
    token, plain = (net.blocks[0] for net in (dit_att_block(num_classes=5), dit_att_block()))
    size = [sum(p.numel() for p in block.parameters()) for block in (token, plain)]
    assert size[0] - size[1] == 3 * (D * D + D)


def test_class_token_attends_as_one_image_token_would():
    """The block is self-attention over [class; image], modulated token by token: 3:6 the class, 0:3 the image."""
    block = randomize_constants_(dit_att_block(num_classes=5)).double().blocks[0]
    x, text, c = torch.randn(2, 6, 32).double(), torch.randn(2, 1, 32).double(), torch.randn(2, 32).double()
    ada = block.ada(c)
    each = tuple(torch.cat([ada[3 + i], ada[i].expand(-1, 6, -1)], dim=1) for i in range(3))
    both = block.branches.attend(torch.cat([text, x], dim=1), each)
    image, token = block(x, text, c, None)
    torch.testing.assert_close(token, both[:, :1])
    torch.testing.assert_close(image, block.branches.apply_mlp(both[:, 1:], ada[6:]))


def test_text_block_equals_its_equations():
    """x += g1 SA(m1 x); x += g2 CA(m2 x, text); x += g3 MLP(m3 x), each m an affine of LN(x), written out by hand."""
    block = randomize_constants_(dit_att_block(text_dim=12)).double().blocks[0]
    x, text, c = torch.randn(2, 6, 32).double(), torch.randn(2, 4, 32).double(), torch.randn(2, 32).double()
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    w = dict(block.named_parameters())

    def affine(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v, gain):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{gain}.weight"]

    def attend(q, k, v, gains, see):
        heads = []
        for h in (slice(0, 16), slice(16, 32)):
            score = norm(q[..., h], f"{gains}.q_norm") @ norm(k[..., h], f"{gains}.k_norm").mT / 4
            heads.append(score.masked_fill(~see[:, None], -torch.inf).softmax(-1) @ v[..., h])
        return torch.cat(heads, -1)

    ada = affine("ada.linear", c * c.sigmoid())[:, None].split(32, dim=2)

    def modulated(i):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + ada[i + 1]) + ada[i]

    out, _ = block(x, text, c, mask)
    qkv = affine("branches.qkv.linear", modulated(0)).split(32, dim=2)
    full_mask = torch.ones(2, 6, dtype=torch.bool)
    x = x + ada[2] * affine("branches.out", attend(*qkv, "branches.qkv", full_mask))
    kv = affine("cross.kv", text).split(32, dim=2)
    x = x + ada[5] * affine("cross.out", attend(affine("cross.q", modulated(3)), *kv, "cross", mask))
    hidden = nn.functional.gelu(affine("branches.mlp.0", modulated(6)), approximate="tanh")
    x = x + ada[8] * affine("branches.mlp.2", hidden)
    torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)
