"""mp-dit and mp-mmdit++: magnitudes, the sphere, the equations written out."""

import math

import pytest
import torch
from helpers.network_cases import randomize_constants_
from torch.func import functional_call

from gesso.conditioning import Cond
from gesso.config import ControlSpec, InputSpec, MPDiTConfig, MPMMDiTppConfig
from gesso.config.net import TRANSFORMER_SHAPES
from gesso.models import mp
from gesso.models.mp_transformer import MPDiT, MPMMDiTpp, mp_gelu

CONTROL = ControlSpec(num_high=2, num_low=3)
KINDS = {  # network, settings, what it is conditioned on
    "mp-dit": (MPDiT, MPDiTConfig, dict(num_classes=5)),
    "mp-mmdit++ class": (MPMMDiTpp, MPMMDiTppConfig, dict(num_classes=5)),
    "mp-mmdit++ text": (MPMMDiTpp, MPMMDiTppConfig, dict(text_dim=12)),
}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def build_net(kind: str, seed: int = 0, resolution: int = 8, control: ControlSpec = CONTROL, conditional=True, **shape):
    network, settings, semantic = KINDS[kind]
    torch.manual_seed(seed)
    cfg = settings(**dict(dict(hidden_size=32, depth=2, num_heads=2, patch_size=2), **shape))
    return network(cfg, InputSpec(3, resolution, control=control, **(semantic if conditional else {})))


def example_batch(kind: str, size=(8, 8), batch: int = 3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=g, dtype=dtype)
    c_noise = torch.linspace(-1.5, 1.1, batch, dtype=dtype)  # ln(sigma)/4 for sigma from .0025 to 80
    progress = torch.rand(batch, generator=g, dtype=dtype)
    high = torch.rand(batch, 2, generator=g, dtype=dtype) * 8
    low = torch.rand(batch, 3, generator=g, dtype=dtype) * 8
    if kind == "mp-mmdit++ text":
        text = torch.randn(batch, 6, 12, generator=g, dtype=dtype)
        mask = torch.arange(6)[None] < torch.tensor([6, 2, 4, 5, 1])[:batch, None]
        return x, c_noise, progress, Cond(text=text, text_mask=mask, control_high=high, control_low=low)
    return x, c_noise, progress, Cond(label=torch.arange(batch) % 5, control_high=high, control_low=low)


def magnitudes(net, *args) -> list[float]:
    """Return the rms of the patch tokens and of the output of every block."""
    out = []
    hooks = [m.register_forward_hook(lambda m, i, o: out.append(o.detach())) for m in [net.patch_embed, *net.blocks]]
    with torch.no_grad():
        net(*args)
    for hook in hooks:
        hook.remove()
    return [o.square().mean().sqrt().item() for o in out]


def test_mp_gelu_keeps_the_magnitude_of_a_normal():
    """Trapezoidal quadrature of E[gelu(x)^2] under N(0,1), as for the constant of Eq. 81."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(mp_gelu(x) ** 2 * density, x).sqrt().item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("depth, width", [(4, 64), (12, 96), (28, 64), (28, 128)])
def test_magnitudes_at_initialization(kind, depth, width):
    net = build_net(kind, depth=depth, hidden_size=width, num_heads=4, resolution=16)
    out = magnitudes(net, *example_batch(kind, (16, 16), 5))
    assert len(out) == depth + 1
    assert min(out) > 0.8 and max(out) < 1.25, out


@pytest.mark.parametrize("gain", [1.0, 10.0])
def test_magnitudes_with_all_gains(kind, gain):
    """A branch grows by 1 + gain at most, and the next norm removes it: no growth with depth."""
    net = build_net(kind, depth=28, hidden_size=64, num_heads=4, resolution=16)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, gain)
    out = magnitudes(net, *example_batch(kind, (16, 16), 5))
    assert min(out) > 0.7 and max(out) < 1 + gain, out
    assert max(out[14:]) < 1.3 * max(out[1:14]), out


def test_tokens_stay_distinct_in_a_deep_network():
    """After L blocks a token has (1 + (t/(1-t))^2)^(-2L) of the energy of its input.

    Attention and the positive mean of GELU add the same to all tokens, so with EDM2's t = .3, meant for
    a U-Net with skips, 28 blocks leave tokens almost equal; with t = 1/(1 + sqrt(2L)) 1/e remains.
    """
    difference = {}
    for t in (0.3, 1 / (1 + math.sqrt(2 * 28))):
        net = build_net("mp-dit", depth=28, hidden_size=64, num_heads=4, resolution=16, residual_balance=t)
        out = []
        net.blocks[-1].register_forward_hook(lambda m, i, o, out=out: out.append(o.detach()))
        net(*example_batch("mp-dit", (16, 16), 5))
        difference[t] = ((out[0] - out[0].mean(1, keepdim=True)).square().mean() / out[0].square().mean()).item()
    deep, scaled = difference.values()
    assert deep < 0.05 and scaled > 0.25, difference


def test_only_gains_are_not_normalized(kind):
    net = build_net(kind)
    on_sphere = {id(w) for w in mp.sphere_weights(net)}
    for name, parameter in net.named_parameters():
        if id(parameter) in on_sphere:
            rms = parameter.detach().double().flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-6)
        else:
            assert name.endswith("gain") and parameter.shape == (1,) and parameter.item() == 0, name


def test_adam_steps_equal_in_forward_normalization(kind):
    """Projection and normalization equal EDM2's Algorithm 1 on raw weights."""
    net = randomize_constants_(build_net(kind)).double()
    sphere = mp.sphere_weights(net)
    mp.normalize_weights_(sphere)
    args = example_batch(kind, dtype=torch.float64)
    target = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    names = dict(net.named_parameters())
    on_sphere = {k for k, p in names.items() if any(p is w for w in sphere)}
    twins = {k: p.detach().clone().requires_grad_(True) for k, p in names.items()}
    start = {k: p.detach().clone() for k, p in names.items()}
    actual = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    expected = torch.optim.Adam(twins.values(), lr=1e-2, betas=(0.9, 0.99))

    def in_forward(k):  # a plain differentiable normalization, not mp.normalized
        rows = twins[k].flatten(1)
        return (rows / rows.square().mean(1, keepdim=True).sqrt()).view_as(twins[k])

    for _ in range(5):
        actual.zero_grad()
        (net(*args) - target).square().mean().backward()
        mp.project_gradients(sphere)

        expected.zero_grad()
        with torch.no_grad():
            for k in on_sphere:
                twins[k].copy_(in_forward(k))
        weights = {k: in_forward(k) if k in on_sphere else twin for k, twin in twins.items()}
        (functional_call(net, weights, args) - target).square().mean().backward()
        for k, p in names.items():
            torch.testing.assert_close(p.grad, twins[k].grad, rtol=0, atol=1e-10)
        actual.step()
        mp.normalize_weights_(sphere)
        expected.step()
    for k, p in names.items():
        twin = in_forward(k) if k in on_sphere else twins[k]
        torch.testing.assert_close(p.detach(), twin.detach(), rtol=0, atol=1e-10)
        assert (p.detach() - start[k]).abs().max() > 1e-4, k


def reference(w, x, c_noise, one_hot, tokens, heads: int, depth: int, t: float, position):
    """Compute the two networks (no control, no mask) from a state dict, without their layers."""

    def linear(name, a):
        return a @ (w[name + ".linear.weight"] if name + ".linear.weight" in w else w[name + ".weight"]).T

    def mp_linear(name, a):
        return linear(name, a) / math.sqrt(a.shape[-1])

    def norm(a):
        return a / (a.square().mean(-1, keepdim=True).sqrt() + 1e-4)

    def mp_sum(a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    B, C, H, W = x.shape
    emb = mp_linear(
        "noise", math.sqrt(2) * torch.cos(c_noise[:, None] * w["noise.fourier.freqs"] + w["noise.fourier.phases"])
    )
    if tokens is None:
        emb = mp_sum(emb, mp_linear("label", one_hot * math.sqrt(one_hot.shape[1])), 0.5)
    emb = emb * emb.sigmoid() / 0.596
    z = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(B, H * W // 4, 4 * C)
    z = mp_linear("patch_embed", torch.cat([z, torch.ones(B, H * W // 4, 1, dtype=x.dtype)], 2))
    z = mp_sum(z, math.sqrt(2) * position, 0.5)
    n = 0
    if tokens is not None:
        z, n = torch.cat([tokens(mp_linear), z], 1), tokens(mp_linear).shape[1]

    def modulated(name, a):
        return a * (1 + w[name + ".gain"] * mp_linear(name, emb))[:, None]

    for i in range(depth):
        b, last = f"blocks.{i}.", n and i == depth - 1
        z = norm(z)
        y = modulated(b + "scale", z)
        d = z.shape[2] // heads
        image = mp_linear(b + "qkv", y[:, n:])
        D = z.shape[2]
        if n:
            text = mp_linear(b + "semantic_qkv", y[:, :n])
            if last:  # keys and values only
                text = torch.cat([torch.zeros(B, n, D, dtype=x.dtype), text], 2)
            image = torch.cat([text, image], 1)
        q, k, v = (norm(part.unflatten(2, (heads, d))).transpose(1, 2) for part in image.split(D, 2))
        y = ((q @ k.mT / math.sqrt(d)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        if last:
            y, z = y[:, n:], z[:, n:]
        z = norm(mp_sum(z, mp_linear(b + "proj", modulated(b + "gate", y)), t))
        y = modulated(b + "mlp_scale", mp_linear(b + "mlp_in", z))
        y = y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2 / 0.652
        z = mp_sum(z, mp_linear(b + "mlp_out", y), t)
    out = w["out_gain"] * mp_linear("out", z)
    return out.view(B, H // 2, W // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


def test_matches_the_reference(kind):
    net = randomize_constants_(build_net(kind, control=ControlSpec(), resolution=12)).double()
    mp.normalize_weights_(mp.sphere_weights(net))
    x, c_noise, progress, cond = example_batch(kind, (8, 12), dtype=torch.float64)
    x.requires_grad_(True)
    one_hot = torch.eye(6, dtype=torch.float64)[torch.tensor([0, 5, 2])]
    tokens = None
    cond = Cond(label=torch.tensor([0, 5, 2])) if cond.text is None else Cond(text=cond.text)
    if kind == "mp-mmdit++ class":
        tokens = lambda linear: linear("label", one_hot * math.sqrt(6))[:, None]  # noqa: E731
    elif cond.text is not None:
        unit = cond.text / (cond.text.square().mean(-1, keepdim=True).sqrt() + 1e-4)
        with_one = torch.cat([unit, torch.ones(3, 6, 1, dtype=torch.float64)], 2)
        with_one = with_one / (with_one.square().mean(-1, keepdim=True).sqrt() + 1e-4)
        tokens = lambda linear: linear("text", with_one)  # noqa: E731
    position = net.patch_embed.position(4, 6).double()
    out = net(x, c_noise, progress, cond)
    balance = 1 / (1 + math.sqrt(2 * 2))  # the default at depth 2
    wanted = reference(net.state_dict(), x, c_noise, one_hot, tokens, 2, 2, balance, position)
    assert out.std() > 1e-2
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)
    direction = torch.randn_like(out)
    actual, expected = (torch.autograd.grad((o * direction).sum(), x)[0] for o in (out, wanted))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_withheld_text_is_a_learned_token_of_magnitude_one():
    net = randomize_constants_(build_net("mp-mmdit++ text"))
    x, c_noise, progress, cond = example_batch("mp-mmdit++ text")
    torch.testing.assert_close(
        net.text(torch.zeros(1, 1, 12))[0, 0], net.text.linear.weight[:, -1], rtol=5e-4, atol=1e-5
    )
    net(x, c_noise, progress, cond.without(semantic=True)).square().sum().backward()
    assert net.text.linear.weight.grad[:, -1].abs().max() > 0
    assert max(p.grad.abs().max() for p in net.parameters()) < 1e4


def test_control_is_zero_at_initialization(kind):
    """The gain is 0 at initialization."""
    net = randomize_constants_(build_net(kind))
    x, c_noise, progress, cond = example_batch(kind)
    torch.nn.init.zeros_(net.control.gain)
    assert net(x, c_noise, progress, cond).equal(net(x, c_noise, progress, cond.without(control=True)))


@pytest.mark.parametrize("size", ["S", "XL"])
def test_parameters(size):
    """Per block 18 D^2 + 3: adaLN's 6, qkv and proj 4, MLP 8; semantic qkv 3, in the last block 2."""
    width, depth, heads = TRANSFORMER_SHAPES[size]
    shape = dict(hidden_size=width, depth=depth, num_heads=heads)
    ends = 17 * width + width**2 + 16 * width + 1  # patches, noise level, output and its gain
    counts = {}
    with torch.device("meta"):
        for name, net in {
            "dit": MPDiT(MPDiTConfig(**shape), InputSpec(4, 32, 1000)),
            "class": MPMMDiTpp(MPMMDiTppConfig(**shape), InputSpec(4, 32, 1000)),
            "text": MPMMDiTpp(MPMMDiTppConfig(**shape), InputSpec(4, 32, text_dim=768)),
        }.items():
            counts[name] = sum(p.numel() for p in net.parameters())
    blocks = depth * (18 * width**2 + 3)
    semantic = (3 * depth - 1) * width**2
    assert counts["dit"] == ends + blocks + 1001 * width
    assert counts["class"] == ends + blocks + 1001 * width + semantic
    assert counts["text"] == ends + blocks + 769 * width + semantic
