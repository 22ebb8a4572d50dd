"""MDTv2: a slow reference written from its description, its size, and properties of its two passes."""

import itertools
import math

import pytest
import torch
from helpers.network_cases import randomize_constants_
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gesso import config
from gesso.conditioning import Cond
from gesso.config import ControlSpec, InputSpec, MDTConfig
from gesso.models.embeddings import sincos_pos_embed_2d
from gesso.models.mdt import MDT, linear_interp_matrix, relative_position_index, sample_keep_ids

CFG = MDTConfig(hidden_size=32, depth=6, num_heads=2, patch_size=2, decoder_layers=2)
CONTROL = ControlSpec(num_high=2, num_low=1)
GRID = 4  # rows of the trained grid


def small_mdt(classes=5, control=CONTROL, dtype=torch.float32, cfg=CFG) -> MDT:
    torch.manual_seed(0)
    return randomize_constants_(MDT(cfg, InputSpec(3, cfg.patch_size * GRID, classes, control=control))).to(dtype)


def example_batch(n=3, h=8, w=8, dtype=torch.float32):
    """Return x, c_noise, progress and cond of n samples."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, h, w, generator=g, dtype=dtype)
    progress = torch.rand(n, generator=g, dtype=dtype)
    high, low = torch.rand(n, 2, generator=g, dtype=dtype) * 100, torch.rand(n, 1, generator=g, dtype=dtype) * 100
    return x, 1000 * progress, progress, Cond(label=torch.arange(n) % 5, control_high=high, control_low=low)


def random_keep_ids(n=3, tokens=16, num_visible=9):
    """Return ids of visible tokens, (n, num_visible), in random order."""
    g = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(tokens, generator=g)[:num_visible] for _ in range(n)])


# The reference: one sample at a time, weights by name, no module of gesso.


def dense(w, name, x):
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def reference_modulate(x, shift, scale):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift


def reference_sinusoids(value):
    """Return 256 sinusoids of a scalar, cosines first."""
    angles = [value * math.exp(-math.log(1e4) * i / 128) for i in range(128)]
    return torch.stack([torch.cos(a) for a in angles] + [torch.sin(a) for a in angles])


def reference_mlp(w, name, x):
    return dense(w, f"{name}.2", silu(dense(w, f"{name}.0", x)))


def bilinear(square, y, x):
    """Interpolate square (rows, columns, n) bilinearly at (y, x)."""
    y0, x0 = min(int(y), square.shape[0] - 1), min(int(x), square.shape[1] - 1)
    y1, x1 = min(y0 + 1, square.shape[0] - 1), min(x0 + 1, square.shape[1] - 1)
    top = square[y0, x0] + (x - x0) * (square[y0, x1] - square[y0, x0])
    bottom = square[y1, x0] + (x - x0) * (square[y1, x1] - square[y1, x0])
    return top + (y - y0) * (bottom - top)


def reference_positions(table, h, w):
    square = table[0].reshape(GRID, GRID, -1)
    places = itertools.product(range(h), range(w))
    return torch.stack([bilinear(square, r * (GRID - 1) / (h - 1), c * (GRID - 1) / (w - 1)) for r, c in places])


def logit_bias(table, places, h, w):
    """Return the bias (heads, n, n) of tokens at [(row, column)], by the scaled offset of query less key."""
    side = 2 * GRID - 1
    square = table[: side * side].reshape(side, side, -1)
    memo = {}
    for dr, dc in itertools.product(range(1 - h, h), range(1 - w, w)):
        memo[dr, dc] = bilinear(square, GRID - 1 + dr * (GRID - 1) / (h - 1), GRID - 1 + dc * (GRID - 1) / (w - 1))
    rows = [torch.stack([memo[qr - kr, qc - kc] for kr, kc in places]) for qr, qc in places]
    return torch.stack(rows).permute(2, 0, 1)


def reference_block(w, name, x, c, places, h, width, skip=None):
    if skip is not None:
        x = dense(w, f"{name}.skip", torch.cat([x, skip], dim=1))
    ada = dense(w, f"{name}.ada.linear", silu(c)).reshape(6, -1)
    qkv = dense(w, f"{name}.qkv", reference_modulate(x, ada[0], ada[1])).reshape(len(x), 3, CFG.num_heads, -1)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    logits = logits + logit_bias(w[f"{name}.bias.table"], places, h, width)
    weights = torch.exp(logits) / torch.exp(logits).sum(2, keepdim=True)
    attended = torch.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
    x = x + ada[2] * dense(w, f"{name}.out", attended)
    inner = gelu(dense(w, f"{name}.mlp.0", reference_modulate(x, ada[3], ada[4])))
    return x + ada[5] * dense(w, f"{name}.mlp.2", inner)


def reference_condition(w, c_noise, progress, cond):
    c = reference_mlp(w, "time.mlp", reference_sinusoids(c_noise))
    c = c + reference_mlp(w, "semantic.mlp", w["semantic.table.weight"][int(cond.label)])
    gamma = (1 - math.cos(math.pi * (1 - float(progress)) ** 8)) / 2
    high = reference_mlp(w, "control.mlps.high", torch.cat([reference_sinusoids(v) for v in cond.control_high]))
    return c + high + gamma * reference_mlp(w, "control.mlps.low", reference_sinusoids(cond.control_low[0]))


def reference_one(w, x, c_noise, progress, cond, keep):
    """Return F (C, H, W) of one sample; keep is None or the list of visible tokens."""
    p = CFG.patch_size
    h, width = x.shape[1] // p, x.shape[2] // p
    everywhere = list(itertools.product(range(h), range(width)))
    patches = [x[:, r * p : r * p + p, s * p : s * p + p] for r, s in everywhere]
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    tokens = torch.stack([torch.einsum("dcij,cij->d", kernel, patch) + bias for patch in patches])
    tokens = tokens + reference_positions(w["position.table"], h, width)
    c = reference_condition(w, c_noise, progress, cond)
    ids = list(range(len(tokens))) if keep is None else keep

    t, visible, half = tokens[ids], [everywhere[i] for i in ids], (CFG.depth - CFG.decoder_layers) // 2
    stored = []
    for i in range(half):
        t = reference_block(w, f"in_blocks.{i}", t, c, visible, h, width)
        stored.append(t)
    for i in range(half):
        t = reference_block(w, f"out_blocks.{i}", t, c, visible, h, width, skip=stored[half - 1 - i])

    decoder_position = reference_positions(w["decoder_position.table"], h, width)
    full = [w["side.mask_token"][0, 0]] * len(tokens)
    for place, i in enumerate(ids):
        full[i] = t[place]
    t = torch.stack(full) + decoder_position
    if keep is not None:
        guess = reference_block(w, "side.block", t, c, everywhere, h, width)
        t = torch.stack([t[i] if i in ids else guess[i] for i in range(len(tokens))])
    for i in range(CFG.decoder_layers):
        t = reference_block(w, f"decoder.{i}", t, c, everywhere, h, width, skip=tokens)

    ada = dense(w, "final_ada.linear", silu(c)).reshape(2, -1)
    out = dense(w, "final", reference_modulate(t, ada[0], ada[1]))
    image = torch.zeros_like(x)
    for (r, s), values in zip(everywhere, out, strict=True):
        image[:, r * p : r * p + p, s * p : s * p + p] = values.reshape(p, p, -1).permute(2, 0, 1)
    return image


def reference(net, x, c_noise, progress, cond, keep=None):
    w = dict(net.named_parameters())
    keeps = [None] * len(x) if keep is None else keep.tolist()
    return torch.stack([reference_one(w, x[i], c_noise[i], progress[i], cond[i], keeps[i]) for i in range(len(x))])


SIZES = [(8, 8), (12, 6)]  # trained; another, not square


@pytest.mark.parametrize("branch", ["plain", "masked"])
@pytest.mark.parametrize("h, w", SIZES)
def test_equals_the_reference(branch, h, w):
    """Outputs and gradients of the input and every parameter agree in fp64."""
    net = small_mdt(dtype=torch.float64)
    x, *inputs = example_batch(2, h, w, torch.float64)
    keep = random_keep_ids(2, h * w // 4) if branch == "masked" else None
    calls = []
    for run in (net.forward if keep is None else net.forward_masked, lambda *a: reference(net, *a)):
        x_ = x.clone().requires_grad_()
        out = run(x_, *inputs) if keep is None else run(x_, *inputs, keep)
        net.zero_grad()
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
        grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        calls.append((out.detach(), {"x": x_.grad, **grads}))
    (out, grads), (expected, wanted_grads) = calls
    assert out.std() > 1e-2
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-10 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("branch", ["plain", "masked"])
def test_fp32_is_near_the_reference(branch):
    net, args = small_mdt(), example_batch(2)
    keep = [random_keep_ids(2)] if branch == "masked" else []
    out = (net.forward_masked if keep else net)(*args, *keep)
    x, c_noise, progress, cond = example_batch(2)
    wide = Cond(label=cond.label, control_high=cond.control_high.double(), control_low=cond.control_low.double())
    expected = reference(net.double(), x.double(), c_noise.double(), progress.double(), wide, *keep)
    assert (out - expected).norm() / expected.norm() < 1e-5


def transposed_bias(net):
    net.index.copy_(net.index.T.clone())


def swapped_halves(net):
    weight = net.out_blocks[1].skip.weight.data
    weight.copy_(weight.roll(CFG.hidden_size, 1))


def other_decoder_positions(net):
    net.decoder_position.table.data.add_(0.01 * torch.arange(CFG.hidden_size))


@pytest.mark.parametrize("spoil", [transposed_bias, swapped_halves, other_decoder_positions])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_detects_changes(spoil, masked):
    net, args = small_mdt(dtype=torch.float64), example_batch(2, dtype=torch.float64)
    keep = [random_keep_ids(2)] if masked else []
    expected = reference(net, *args, *keep)
    with torch.no_grad():
        spoil(net)
        assert ((net.forward_masked if masked else net)(*args, *keep) - expected).abs().max() > 1e-4


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def mdt_xl(latents: int) -> MDT:
    width, depth, heads = config.net.TRANSFORMER_SHAPES["XL"]
    with torch.device("meta"):
        return MDT(MDTConfig(hidden_size=width, depth=depth, num_heads=heads), InputSpec(4, latents, 1000))


def test_parameters_of_table_a1():
    """748.067 M at 64x64 latents, class MLP d^3 in, no control, C channels out."""
    assert count(mdt_xl(64)) == 748_067_152
    assert count(mdt_xl(64)) == pytest.approx(748.067e6, rel=1e-6)


def test_parameters_of_the_public_code():
    """742.26 M at 32x32 latents: without the class MLP, and with 2 C channels out (learned variance)."""
    net = mdt_xl(32)
    d, outputs = 1152, net.final.out_features
    public = count(net) - count(net.semantic.mlp) + outputs * (d + 1)
    assert public == 742_263_904
    assert round((public - outputs * (d + 1)) / 1e6, 2) == 742.25  # C channels out would print otherwise


@pytest.mark.parametrize("latents, published, digits", [(32, 259.08e9, 0.005e9), (64, 1136e9, 0.5e9)])
def test_flops_of_table_a1(latents, published, digits):
    """The plain pass has 2 per multiply-accumulate, 1 per element of GELU or SiLU, 4 of LayerNorm."""
    x, level = torch.empty(1, 4, latents, latents, device="meta"), torch.empty(1, device="meta")
    net, tokens, d = mdt_xl(latents), (latents // 2) ** 2, 1152
    with FlopCounterMode(display=False) as counter:
        net(x, level, level, Cond(label=torch.empty(1, dtype=torch.int64, device="meta")))
    activations = 28 * (4 * tokens * d + d) + 3 * d  # MLP and adaLN of each block; time, class, final adaLN
    norms = (2 * 28 + 1) * tokens * d
    assert counter.get_total_flops() + activations + 4 * norms == pytest.approx(published, abs=digits)


def test_table_of_the_relative_bias():
    torch.manual_seed(0)
    table = MDT(CFG, InputSpec(3, 8, 5)).in_blocks[0].bias.table
    assert table.shape == ((2 * GRID - 1) ** 2 + 3, CFG.num_heads)
    assert 0.014 < float(table.detach().std()) < 0.026
    index = relative_position_index(2, 3)
    # Token 5 (row 1, column 2) as query, 0 as key: offset (1, 2), the last entry of a 3 x 5 table.
    assert index[5, 0] == 14 and index[0, 5] == 0 and index.diagonal().eq(7).all()


def test_class_token_rows_are_unused():
    net = small_mdt()
    (net(*example_batch()) + net.forward_masked(*example_batch(), random_keep_ids())).square().sum().backward()
    for name, p in net.named_parameters():
        if name.endswith("bias.table"):
            assert p.grad[-3:].eq(0).all() and p.grad[:-3].ne(0).any(dim=1).all()


def test_positions_start_as_sincos_with_step_one():
    torch.manual_seed(0)
    net = MDT(CFG, InputSpec(3, 8, 5))
    expected = sincos_pos_embed_2d(32, 4, 4, (3, 3))
    for position in (net.position, net.decoder_position):
        assert position.table.requires_grad and position.table.equal(expected)
    assert float(net.position.table[0, 1, 0].detach()) == pytest.approx(math.sin(1))  # column 1, omega 1


def test_positions_of_other_grids():
    """Corners are aligned; a grid of 2G-1 has the trained values at its even positions."""
    net = small_mdt(dtype=torch.float64)
    table = net.position.table.unflatten(1, (GRID, GRID))
    torch.testing.assert_close(net.position(7, 7).unflatten(1, (7, 7))[:, ::2, ::2], table)
    positions = net.position(3, 9).unflatten(1, (3, 9))
    torch.testing.assert_close(positions[:, [0, -1]][:, :, [0, -1]], table[:, [0, -1]][:, :, [0, -1]])
    assert net.position(1, 1).equal(table[:, :1, 0])


def test_bias_of_other_grids():
    """Offset 0 and the largest offsets keep their values; a grid of 2G-1 contains the trained table."""
    net = small_mdt(dtype=torch.float64)
    bias = net.in_blocks[0].bias
    trained = bias(net._token_layout(GRID, GRID))[0].unflatten(1, (GRID, GRID)).unflatten(3, (GRID, GRID))
    finer = bias(net._token_layout(7, 7))[0].unflatten(1, (7, 7)).unflatten(3, (7, 7))
    torch.testing.assert_close(finer[:, ::2, ::2, ::2, ::2], trained)
    line = bias(net._token_layout(1, 9))[0]
    torch.testing.assert_close(line[:, 0, 0], trained[:, 0, 0, 0, 0])
    torch.testing.assert_close(line[:, 0, 8], trained[:, 0, 0, 0, GRID - 1])


def test_linear_interp_matrix():
    knots = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64)
    at = torch.tensor([0.0, 0.5, 1.25, 2.0], dtype=torch.float64)
    torch.testing.assert_close(linear_interp_matrix(at, 3) @ knots, torch.tensor([3, 4, 4.75, 4], dtype=torch.float64))


# The two passes.


def test_masked_pass_with_all_tokens_equals_forward():
    """No position is hidden, so the output of the side block is unused, in any order of ids."""
    net, args = small_mdt(dtype=torch.float64), example_batch(dtype=torch.float64)
    plain = net(*args)
    torch.testing.assert_close(net.forward_masked(*args, torch.arange(16).expand(3, 16)), plain, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        net.forward_masked(*args, random_keep_ids(num_visible=16)), plain, rtol=1e-11, atol=1e-12
    )


def test_order_of_keep_ids_does_not_matter():
    net, args, keep = small_mdt(dtype=torch.float64), example_batch(dtype=torch.float64), random_keep_ids()
    out = net.forward_masked(*args, keep)
    torch.testing.assert_close(out, net.forward_masked(*args, keep.sort(dim=1).values), rtol=1e-11, atol=1e-12)
    assert (out - net(*args)).abs().max() > 1e-3


def test_encoder_sees_only_visible_tokens():
    """Hidden pixels change the output only through the decoder's skips; visible ones always do."""
    net, (x, *inputs), keep = small_mdt(dtype=torch.float64), example_batch(dtype=torch.float64), random_keep_ids()
    hidden = torch.ones(3, 16).scatter(1, keep, 0).reshape(3, 1, 4, 4)
    pixels = hidden.repeat_interleave(2, 2).repeat_interleave(2, 3)
    other_hidden, other_visible = x + pixels, x + (1 - pixels)
    with torch.no_grad():
        assert (
            net.forward_masked(other_hidden, *inputs, keep) - net.forward_masked(x, *inputs, keep)
        ).abs().max() > 1e-3
        for block_ in net.decoder:
            block_.skip.weight[:, CFG.hidden_size :] = 0
        torch.testing.assert_close(
            net.forward_masked(other_hidden, *inputs, keep), net.forward_masked(x, *inputs, keep), rtol=0, atol=0
        )
        assert (
            net.forward_masked(other_visible, *inputs, keep) - net.forward_masked(x, *inputs, keep)
        ).abs().max() > 1e-3
        assert (net(other_hidden, *inputs) - net(x, *inputs)).abs().max() > 1e-3


def test_side_block_writes_only_hidden_positions():
    net, keep = small_mdt(), random_keep_ids()
    visible, position, c = torch.randn(3, 9, 32), net.decoder_position(4, 4), torch.randn(3, 32)
    layout = net._token_layout(4, 4)._replace(keep_ids=keep)
    out = net.side(visible, position, c, layout)
    for i in range(3):
        assert out[i, keep[i]].equal(visible[i] + position[0, keep[i]])
        removed = [t for t in range(16) if t not in keep[i].tolist()]
        assert (out[i, removed] - net.side.mask_token[0] - position[0, removed]).abs().amax(1).min() > 1e-2


# The keyed mask.


def test_keep_ids_depend_only_on_the_sample():
    sample = torch.arange(100, 108)
    full = sample_keep_ids(7, sample, 100, 64, (0.3, 0.5))
    assert full.dtype == torch.int64 and torch.cat(
        [sample_keep_ids(7, s, 100, 64, (0.3, 0.5)) for s in sample.split(3)]
    ).equal(full)
    assert full.diff(dim=1).gt(0).all() and full.min() >= 0 and full.max() < 64
    assert len({tuple(row) for row in full.tolist()}) == 8
    # The ratio hangs on nimg alone, the order of the ids on the sample alone: sets are nested.
    fixed = sample_keep_ids(7, sample, 100, 64, (0.5, 0.5))
    assert fixed.shape == (8, 32) and fixed.equal(sample_keep_ids(7, sample, 3, 64, (0.5, 0.5)))
    assert all(set(a) <= set(b) for a, b in zip(fixed.tolist(), full.tolist(), strict=True))
    assert not fixed.equal(sample_keep_ids(8, sample, 100, 64, (0.5, 0.5)))


def test_keep_ids_are_uniform():
    counts = torch.tensor(
        [sample_keep_ids(0, torch.tensor([0]), n, 1000, (0.3, 0.5)).shape[1] for n in range(400)]
    ).double()
    assert 500 <= counts.min() < 510 and 690 < counts.max() <= 700
    assert counts.mean() == pytest.approx(600, abs=5 * 200 / math.sqrt(12 * 400))
    often = sample_keep_ids(0, torch.arange(4000), 0, 16, (0.5, 0.5)).flatten().bincount(minlength=16) / 4000
    assert (often - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4000)


def test_keep_ids_keep_at_least_one():
    assert sample_keep_ids(0, torch.arange(3), 0, 4, (0.99, 1.0)).shape == (3, 1)
    assert sample_keep_ids(0, torch.arange(2), 0, 4, (0.0, 0.0)).equal(torch.arange(4).expand(2, 4))
