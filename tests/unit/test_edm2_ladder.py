"""CONFIGS A to G: published sizes, CONFIG G against gesso.models.edm2, the others against a slow reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.network_cases import randomize_constants_

from gesso import config
from gesso.conditioning import Cond
from gesso.config import EDM2Config, EDM2LadderConfig, EDMConfig, InputSpec
from gesso.diffusion import process
from gesso.diffusion.denoiser import Denoiser, Uncertainty, loss
from gesso.models import mp
from gesso.models.edm2 import EDM2
from gesso.models.edm2_ladder import Block, EDM2Ladder, UnnormalizedLayer, normalize_rows
from gesso.recipes import edm2 as recipes

CONFIGS = "ABCDEFG"
SHAPE = dict(channels=32, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,), channels_per_head=16)


def ladder(step, classes=5, seed=0, wake=True, dtype=torch.float32, **shape):
    torch.manual_seed(seed)
    net = EDM2Ladder(EDM2LadderConfig(config=step, **(SHAPE | shape)), InputSpec(3, 8, classes))
    net = (randomize_constants_(net) if wake else net).to(dtype)
    mp.normalize_weights_(mp.sphere_weights(net))  # to the precision of dtype
    return net


def example_batch(dtype=torch.float32, size=(8, 8), n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, *size, generator=g, dtype=dtype)
    progress = torch.rand(n, generator=g, dtype=dtype)
    return x, 2 * progress - 1, progress, Cond(label=torch.arange(n) % 5)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


# A and B as published, without the uncertainty function; G's published count has its 128 weights. F is G without
# its 37 gains. C to E: Table 1 prints 277.8.
@pytest.mark.parametrize(
    "step, published",
    [("A", 295_902_724), ("B", 291_757_828), ("C", 277_816_512), ("D", 277_816_512), ("E", 277_816_512),
     ("F", 280_212_837 - 128 - 37), ("G", 280_212_837 - 128)],
)  # fmt: skip
def test_parameter_counts_are_exact(step, published):
    with torch.device("meta"):
        cfg = EDM2LadderConfig(config=step, attention_levels=(1, 2, 3) if step == "A" else (2, 3))
        net = EDM2Ladder(cfg, InputSpec(4, 64, 1000))
    assert count(net) == published
    assert round(published / 1e6, 1) == dict(A=295.9, B=291.8, C=277.8, D=277.8, E=277.8, F=280.2, G=280.2)[step]


@pytest.mark.parametrize("classes", [0, 5])
def test_ladder_config_g_equals_edm2(classes):
    """Names, outputs and gradients are equal."""
    shape = dict(channels=16, channel_mult=(1, 2, 3), num_blocks=2, attention_levels=(1, 2), channels_per_head=8)
    rung = ladder("G", classes, dtype=torch.float64, **shape)
    clean = EDM2(EDM2Config(**shape), InputSpec(3, 8, classes)).double()
    clean.load_state_dict(rung.state_dict())
    assert list(clean.state_dict()) and len(mp.sphere_weights(rung)) == len(mp.sphere_weights(clean))
    for size in [(8, 8), (4, 12)]:
        x, c_noise, progress, cond = example_batch(torch.float64, size)
        cond = Cond(label=torch.tensor([0, 5, 4])) if classes else Cond()  # 5: no class
        outputs, gradients = [], []
        for net in (rung, clean):
            net.zero_grad()
            leaf = x.clone().requires_grad_()
            out = net(leaf, c_noise, progress, cond)
            out.sin().sum().backward()
            outputs.append(out)
            gradients.append({"x": leaf.grad, **{n: p.grad for n, p in net.named_parameters()}})
        assert outputs[0].std() > 1e-2
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-10, atol=1e-12)


# A second, slow reading of Appendix B, on the names of the weights alone.


def reference_layer(p, name, x, step):
    w = p[name + ".weight"]
    if step >= "D":
        w = w / (w.flatten(1).norm(dim=1) + (1e-4 if step == "D" else 0)).view(-1, *[1] * (w.ndim - 1))
    if w.ndim == 2:
        out = torch.einsum("bi,oi->bo", x, w)
    else:
        k, (h, wd) = w.shape[-1], x.shape[2:]
        padded = F.pad(x, [k // 2] * 4)
        out = sum(
            torch.einsum("bchw,oc->bohw", padded[:, :, i : i + h, j : j + wd], w[:, :, i, j])
            for i in range(k)
            for j in range(k)
        )
    bias = p.get(name + ".bias")
    return out if bias is None else out + bias.view(1, -1, *[1] * (out.ndim - 2))


def reference_norm(p, name, x, step):
    if step >= "F":
        return x
    b, c, h, w = x.shape
    g = x.reshape(b, c // 32, 32, h, w)
    if step >= "C":
        return (g / (g.pow(2).mean((2, 3, 4), keepdim=True) + 1e-4).sqrt()).reshape(x.shape)  # Eq. 29
    g = (g - g.mean((2, 3, 4), keepdim=True)) / (g.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return g.reshape(x.shape) * p[name + ".weight"].view(1, -1, 1, 1) + p[name + ".bias"].view(1, -1, 1, 1)


def reference_silu(x):
    return x / (1 + torch.exp(-x))


def reference_pixel_norm(x, dim):
    return x / (1e-4 + x.pow(2).mean(dim, keepdim=True).sqrt())


def reference_attention(p, name, x, step, width):
    b, c, h, w = x.shape
    y = x if step >= "C" else reference_norm(p, name + ".norm", x, step)
    q, k, v = reference_layer(p, name + ".qkv", y, step).reshape(b, 3, c // width, width, h * w).unbind(1)
    if step >= "C":
        q, k, v = (reference_pixel_norm(t, 2) for t in (q, k, v))
    weights = torch.einsum("bnci,bncj->bnij", q, k / math.sqrt(width)).softmax(-1)
    y = torch.einsum("bnij,bncj->bnci", weights, v).reshape(b, c, h, w)
    return x + reference_layer(p, name + ".proj", y, step)


def reference_resample(x, mode):
    b, c, h, w = x.shape
    if mode == "down":
        return x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if mode == "up" else x


def reference_block(p, name, x, emb, step, mode, width):
    def skip(x):
        return reference_layer(p, name + ".conv_skip", x, step) if name + ".conv_skip.weight" in p else x

    if step >= "F":
        x = reference_resample(x, mode)
        if name.startswith("encoder"):
            x = reference_pixel_norm(skip(x), 1)
        y = reference_silu(x)
    else:
        y = reference_resample(reference_silu(reference_norm(p, name + ".norm0", x, step)), mode)
    y = reference_norm(p, name + ".norm1", reference_layer(p, name + ".conv_res0", y, step), step)
    m = reference_layer(p, name + ".emb_linear", emb, step)[:, :, None, None]
    scale, offset = (m, 0) if step >= "C" else (m[:, : m.shape[1] // 2], m[:, m.shape[1] // 2 :])
    y = reference_layer(p, name + ".conv_res1", reference_silu(y * (1 + scale) + offset), step)
    if step < "F":
        x = skip(reference_resample(x, mode))
    elif name.startswith("decoder"):
        x = skip(x)
    x = x + y
    return reference_attention(p, name + ".attention", x, step, width) if name + ".attention.qkv.weight" in p else x


def reference_forward(p, x, c_noise, label, step, classes=5, width=16):
    """Compute a network with two levels of one block each."""
    one_hot = F.one_hot(label, classes + 1)[:, :classes].to(x.dtype)
    if step >= "C":
        one_hot = one_hot * math.sqrt(classes)
        emb = torch.cos(c_noise[:, None] * p["emb_fourier.freqs"] + p["emb_fourier.phases"])
    else:
        half = p["emb_noise.weight"].shape[1] // 2
        angle = c_noise[:, None] * torch.tensor([1e4 ** (-i / half) for i in range(half)], dtype=x.dtype)
        emb = torch.cat([angle.cos(), angle.sin()], 1)
    emb = reference_layer(p, "emb_noise", emb, step)
    if step < "F":
        emb = reference_layer(p, "emb_second", reference_silu(emb), step)
    emb = reference_silu(emb + reference_layer(p, "emb_label", one_hot, step))
    if step >= "C":
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    x = reference_layer(p, "conv_in", x, step)
    skips = [x]
    for i, mode in enumerate(["keep", "down", "keep"]):
        x = reference_block(p, f"encoder.{i}", x, emb, step, mode, width)
        skips.append(x)
    for i, mode in enumerate(["keep", "keep", "skip", "skip", "up", "skip", "skip"]):
        x = torch.cat([x, skips.pop()], 1) if mode == "skip" else x
        x = reference_block(p, f"decoder.{i}", x, emb, step, mode, width)
    if step < "F":
        x = reference_silu(reference_norm(p, "out_norm", x, step))
    return reference_layer(p, "conv_out", x, step)


@pytest.mark.parametrize("step", "ABCDEF")
def test_ladder_configs_match_the_reference(step):
    net = ladder(step, dtype=torch.float64)
    x, c_noise, progress, _ = example_batch(torch.float64, (8, 12))
    label = torch.tensor([0, 5, 4])
    out = net(x, c_noise, progress, Cond(label=label))
    assert out.std() > 1e-2
    torch.testing.assert_close(
        out, reference_forward(net.state_dict(), x, c_noise, label, step), rtol=1e-10, atol=1e-11
    )


def test_config_e_applies_weights_unchanged():
    x, c_noise, progress, cond = example_batch(torch.float64)
    net = ladder("E", dtype=torch.float64)
    with torch.no_grad():  # off the sphere: E applies weights as they are, D normalizes them
        net.conv_in.weight.mul_(2)
    out = net(x, c_noise, progress, cond)
    assert (out - reference_forward(net.state_dict(), x, c_noise, cond.label, "E")).abs().max() > 1e-3


def test_configs_d_and_e_are_the_same_function():
    """E's weights in D's layers differ by the epsilon of Eq. 47 only; only E's are on the sphere."""
    d, e = ladder("D", dtype=torch.float64), ladder("E", dtype=torch.float64)
    d.load_state_dict(e.state_dict())
    args = example_batch(torch.float64)
    torch.testing.assert_close(d(*args), e(*args), rtol=1e-3, atol=1e-3)
    assert mp.sphere_weights(d) == [] and len(mp.sphere_weights(e)) == len(list(e.parameters()))


def test_config_d_is_invariant_to_weight_scale():
    net = ladder("D", dtype=torch.float64)
    args = example_batch(torch.float64)
    before = net(*args)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    torch.testing.assert_close(net(*args), before, rtol=1e-3, atol=1e-3)


def test_config_d_gradients_are_tangent():
    """Eq. 59, up to epsilon."""
    torch.manual_seed(0)
    weight = torch.randn(7, 30, dtype=torch.float64, requires_grad=True)
    (normalize_rows(weight, eps=0.0) * torch.randn(7, 30, dtype=torch.float64)).sum().backward()
    assert (weight * weight.grad).sum(1).abs().max() < 1e-12 < weight.grad.abs().max()


@pytest.mark.parametrize("step", "ABCD")
def test_initial_values(step):
    """A, B: U(+-N^-1/2) but for N(0, 1) classes and zeros; C: all the former; D: N(0, 1)."""
    net = ladder(step, wake=False, classes=40)
    for name, module in net.named_modules():
        if not isinstance(module, UnnormalizedLayer):
            continue
        w, N = module.weight.detach(), module.weight[0].numel()
        zero = name.endswith(("conv_res1", "proj", "conv_out"))
        if step == "D" or (step < "C" and name == "emb_label"):
            assert w.std().item() == pytest.approx(1, abs=0.1)
        elif step < "C" and zero:
            assert not w.any() and not module.bias.any()
        else:
            assert 0.9 * N**-0.5 < w.abs().max() <= N**-0.5 * (1 + 1e-6)
            assert (module.bias is None) == (step == "C" or name == "emb_label")


@pytest.mark.parametrize("step", CONFIGS)
def test_every_ladder_config_trains(step):
    """Train a few steps on one batch at fixed noise, with the weight treatment of the CONFIG."""
    edm = process.build_process(EDMConfig())
    net = ladder(step, wake=False, dropout=0.1)
    torch.manual_seed(0)
    denoiser, uncertainty = Denoiser(net, edm, "fourier"), Uncertainty(edm)
    weights = mp.sphere_weights(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3 if step < "D" else 1e-2, betas=(0.9, 0.99))
    x0, eps = 0.5 * torch.randn(8, 3, 1, 1).expand(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    s, cond = torch.linspace(0.2, 2, 8), Cond(label=torch.arange(8) % 5)
    values = []
    for _ in range(12):
        value = loss(denoiser, edm, x0, s, eps, cond).mean()
        optimizer.zero_grad()
        value.backward()
        mp.project_gradients(weights)
        optimizer.step()
        mp.normalize_weights_(weights)
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]
    assert loss(denoiser, edm, x0, s, eps, cond, "uncertainty", uncertainty).isfinite().all()


def magnitudes(step, seed=0):
    """Return the rms after each block of a fresh network for standardized input."""
    net = ladder(
        step, wake=False, seed=seed, channels=64, channel_mult=(1, 2, 3), attention_levels=(2,), channels_per_head=64
    )
    result = []
    for module in net.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, __, out: result.append(out.square().mean().sqrt().item()))
    with torch.no_grad():
        net(*example_batch(size=(16, 16), n=2))
    return result


def test_magnitudes_of_config_g_stay_near_1():
    result = magnitudes("G")
    assert len(result) == 5 + 10 and min(result) > 0.8 and max(result) < 1.25


def test_magnitudes_of_config_e_grow():
    """Residual sums without MP-sum grow, so that the test above can fail."""
    assert max(magnitudes("E")) > 2


def test_dropout_is_in_training_only():
    net = ladder("B", dropout=0.5)
    args = example_batch()
    assert not net(*args).equal(net(*args))
    net.eval()
    assert net(*args).equal(net(*args))


@pytest.mark.parametrize("step", "AC")
def test_widths_that_32_does_not_divide(step):
    net = ladder(step, channels=24, channels_per_head=24)
    assert net(*example_batch()).isfinite().all()


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_recipes_are_complete(name):
    run = recipes.RECIPES[name]()
    assert run.recipe == name and f"gesso train {name} " in recipes.RECIPES[name].__doc__
    assert config.validate(config.to_dict(run)) == run
    assert run.data.resolution % run.net.size_multiple == 0
    if run.optim.schedule == "inverse_sqrt":
        assert run.optim.ref_images in (70_000 * 2048, 35_000 * 2048)


def test_presets_of_table_6():
    """Durations in millions of images, as printed."""
    printed = {"XS": 2147.5, "S": 2147.5, "M": 2147.5, "L": 1879.0, "XL": 1342.2, "XXL": 939.5}
    for size, millions in printed.items():
        run = recipes.img512(size)
        assert run.train.total_images / 1e6 == pytest.approx(millions, abs=0.05)
        assert run.net.channels == config.edm2_config(size).channels
    for size, millions in {"S": 1073.7, "M": 2147.5, "L": 1073.7, "XL": 671.1}.items():
        assert recipes.img64(size).train.total_images / 1e6 == pytest.approx(millions, abs=0.05)
