"""EDM2 and mmDiT++: sizes, parity with the paper's equations, and shared layers."""

import pytest
import torch
from helpers.network_cases import edm2_and_reference, randomize_constants_

from gesso import config, models
from gesso.conditioning import Cond
from gesso.config import EDMConfig, InputSpec, MMDiTppConfig
from gesso.diffusion import process
from gesso.diffusion.denoiser import Uncertainty
from gesso.models import layers, mp
from gesso.models.embeddings import sincos_pos_embed_2d, sinusoidal_embedding


def count_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "size, published",
    [("XXS", 31_309_029), ("XS", 124_713_253), ("S", 280_212_837), ("M", 497_807_781), ("L", 777_498_085),
     ("XL", 1_119_283_749), ("XXL", 1_523_164_773)],
)  # fmt: skip
def test_edm2_parameter_counts_are_exact(size, published):
    """The published count includes the uncertainty function."""
    with torch.device("meta"):
        net = models.build_network(config.edm2_config(size), InputSpec(4, 64, 1000))
        total = count_parameters(net) + count_parameters(Uncertainty(process.EDM(EDMConfig())))
    assert total == published


def test_edm2_state_has_the_published_number_of_tensors():
    with torch.device("meta"):
        net = models.build_network(config.edm2_config("XS"), InputSpec(4, 64, 1000))
    # 203 published, less the weight, frequencies and phases of the uncertainty function.
    assert len(net.state_dict()) == 203 - 3


def test_mmditpp_parameters_of_the_paper():
    """Table A1's text cell, 791.64 M, less text MLP and control, plus class table (architectures.md)."""
    with torch.device("meta"):
        net = models.build_network(config.mmditpp_config("XL/2"), InputSpec(4, 32, 1000))
    d = 1152
    text_mlp, control, table = (768 * d + d) + (d * d + d), 1536 * d + d + d * d + d, 1001 * d
    # That count also holds DiT's position table at 64x64 latents, which is a constant here.
    positions = 1024 * d
    assert count_parameters(net) - table + text_mlp + control + positions == pytest.approx(791.64e6, rel=1e-5)


def test_edm2_matches_the_reference():
    net, x, c_noise, label, reference = edm2_and_reference()
    out = net(x, c_noise, c_noise, Cond(label=label))
    expected = reference(net.state_dict())
    assert out.std() > 1e-2
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_edm2_reference_detects_a_wrong_balance():
    net, x, c_noise, label, reference = edm2_and_reference()
    net.concat_balance = 0.51
    out = net(x, c_noise, c_noise, Cond(label=label))
    assert (out - reference(net.state_dict())).abs().max() > 1e-4


def example_batch(channels=3, size=8, batch=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=g, dtype=dtype)
    progress = torch.rand(batch, generator=g, dtype=dtype)
    return x, 1000 * progress, progress, Cond(label=torch.arange(batch) % 5)


def test_timestep_sinusoids():
    a = torch.tensor([0.0, 7.0], dtype=torch.float64)
    out = sinusoidal_embedding(a, 256)
    i = 5
    assert out[1, i] == pytest.approx(torch.cos(torch.tensor(7 * 1e4 ** (-i / 128), dtype=torch.float64)).item())
    assert out[1, 128 + i] == pytest.approx(torch.sin(torch.tensor(7 * 1e4 ** (-i / 128), dtype=torch.float64)).item())
    assert out[0, :128].eq(1).all() and out[0, 128:].eq(0).all()


def test_resampled_positions_keep_their_range():
    """Pseudocode 1: every resolution spans 0 to base, so the corners agree."""
    small, large = sincos_pos_embed_2d(32, 4, 4, (4, 4))[0], sincos_pos_embed_2d(32, 8, 8, (4, 4))[0]
    for corner_small, corner_large in [(0, 0), (3, 7), (12, 56), (15, 63)]:
        torch.testing.assert_close(small[corner_small], large[corner_large])
    # Column in the first half, row in the second: moving along a row leaves the second half as it is.
    assert small[0, 16:].equal(small[1, 16:]) and not small[0, :16].equal(small[1, :16])


def test_patchify_round_trip():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 8)
    patch = 2
    tokens = torch.nn.functional.unfold(x, patch, stride=patch).transpose(1, 2)  # (B, T, C p p)
    tokens = tokens.unflatten(2, (3, patch * patch)).transpose(2, 3).flatten(2)  # (B, T, p p C)
    assert layers.unpatchify(tokens, 3, 4, patch).equal(x)


def test_text_weights_differ_only_in_the_semantic_stream():
    """If the semantic weights equal the image's, 'all' and 'qkv' are the same function up to the qkv bias."""
    torch.manual_seed(0)
    shared = randomize_constants_(
        models.build_network(MMDiTppConfig(hidden_size=32, depth=3, num_heads=2), InputSpec(3, 8, 5))
    ).double()
    separate = models.build_network(
        MMDiTppConfig(hidden_size=32, depth=3, num_heads=2, separate_text_weights="all"), InputSpec(3, 8, 5)
    ).double()
    separate.load_state_dict(shared.state_dict(), strict=False)
    with torch.no_grad():
        for block, source in zip(separate.blocks, shared.blocks, strict=True):
            block.text_qkv.linear.bias.zero_()
            if block.is_last:
                block.text.linear.weight.copy_(source.image.ada.linear.weight[: 2 * 32])
                block.text.linear.bias.copy_(source.image.ada.linear.bias[: 2 * 32])
            else:
                block.text.load_state_dict(source.image.state_dict())
    args = example_batch(dtype=torch.float64)
    torch.testing.assert_close(separate(*args), shared(*args), rtol=1e-10, atol=1e-12)


def test_mp_silu_keeps_the_magnitude_of_a_normal():
    torch.manual_seed(0)
    x = torch.randn(200_000, dtype=torch.float64)
    assert mp.mp_silu(x).square().mean().sqrt() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_mp_sum_and_cat_keep_magnitudes(t):
    torch.manual_seed(0)
    a, b = torch.randn(4, 300, 20, 20), torch.randn(4, 100, 20, 20)
    assert mp.mp_sum(a[:, :100], b, t).std() == pytest.approx(1, abs=0.02)
    both = mp.mp_cat(a, b, t)
    assert both.square().mean().sqrt() == pytest.approx(1, abs=0.02)
    # Eq. 92: at t = 1/2 both parts carry the same energy.
    if t == 0.5:
        assert both[:, :300].square().sum() == pytest.approx(float(both[:, 300:].square().sum()), rel=0.02)


def test_fourier_features_have_unit_magnitude():
    torch.manual_seed(0)
    features = mp.MPFourier(4096)(torch.linspace(-3, 3, 7))
    assert features.square().mean().sqrt() == pytest.approx(1, abs=0.02)
