"""What every network must do under every condition that it takes: one row of tests/networks.py after the other."""

import copy
import dataclasses
import re
from functools import cache

import pytest
import safetensors.torch
import torch
from networks import CLASSES, CONDITIONS, NETWORKS, ROWS, SILENT, batch, fresh, trained
from torch import Tensor, nn

from gesso import nets
from gesso.cond import Cond
from gesso.config import Control, Data, Run

EXACT = dict(rtol=1e-11, atol=1e-12)
NONE = torch.zeros(3, dtype=torch.bool)
SEMANTIC = [name for name, row in ROWS.items() if row.inputs.semantic]
CLASS = [name for name, row in ROWS.items() if row.inputs.num_classes]
TEXT = [name for name, row in ROWS.items() if row.inputs.text_width]
CONTROL = [name for name, row in ROWS.items() if row.inputs.control.high]
# Every network under its fullest conditions, of which the others are parts: a trace takes as long as all other tests.
PARTS = [name for name in ROWS if f"{name} control" in ROWS or name.replace("text", "pooled") in ROWS.keys() - {name}]
ALIKE = re.compile(r": (none|control|class joint)$|qk-norm|class table")
FULLEST = [name for name in ROWS if name not in PARTS and not ALIKE.search(name)]
every = pytest.mark.parametrize("name", ROWS)


@cache
def example(name: str) -> tuple[nn.Module, tuple]:
    """Network and arguments of a row in float64. No test changes them."""
    return trained(ROWS[name]), batch(ROWS[name])


def call(name: str, **changes: Tensor | None) -> Tensor:
    """The output with some fields of the condition changed."""
    net, (*args, cond) = example(name)
    with torch.no_grad():
        return net(*args, dataclasses.replace(cond, **changes))


def apart(a: Tensor, b: Tensor) -> Tensor:
    """(B,) largest difference of each sample."""
    return (a - b).flatten(1).abs().amax(1)


def test_the_table_has_every_network():
    assert {type(cfg) for cfg, _ in NETWORKS.values()} == set(nets.NETS)


@every
def test_fresh_networks_return_zero(name):
    """All but CONFIGS C to F, which have neither zero-initialised layers nor an output gain."""
    with torch.no_grad():
        out = fresh(ROWS[name])(*batch(ROWS[name], dtype=torch.float32))
    assert (out.abs().max() == 0) == (re.match("ladder [CDEF]", name) is None)


@every
def test_every_row_of_every_parameter_gets_a_gradient(name):
    """But for the rows in SILENT, whose gradient is zero up to rounding."""
    net, (*args, cond) = example(name)
    if name in SEMANTIC:
        cond = dataclasses.replace(cond, has_semantic=torch.tensor([True, True, False]))
    out = net(*args, cond)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
    assert out.shape == args[0].shape and out.std() > 1e-2
    wrong = []
    for parameter, grad in zip(names, grads, strict=True):
        size = grad.flatten(1).abs().amax(1) if grad.ndim > 1 else grad.abs()
        if parameter.endswith("bias.table"):  # MDT's offsets between tokens: test_mdt says which rows are read
            size = size.max()[None]
        wanted = torch.ones(len(size), dtype=torch.bool)
        for silent in SILENT:
            if re.search(silent.rows, name) and re.search(silent.parameter, parameter):
                wanted[silent.first * len(size) // silent.of : silent.last * len(size) // silent.of] = False
        if not (size > 1e-9 * size.max().clamp(min=1e-3)).equal(wanted):
            wrong.append(parameter)
    assert wrong == []


@every
def test_output_does_not_depend_on_neighbours(name):
    """Sample 1 without control and sample 2 without semantic condition, where there are such."""
    net, args = example(name)
    has_semantic = torch.tensor([True, True, False]) if name in SEMANTIC else None
    has_control = torch.tensor([True, False, True]) if name in CONTROL else None
    whole = call(name, has_semantic=has_semantic, has_control=has_control)
    for i in range(3):
        *one, cond = (a[i : i + 1] for a in args)
        alone = net(*one, cond.without(semantic=i == 2, control=i == 1))
        torch.testing.assert_close(alone[0], whole[i], **EXACT)


def absent_semantic(cond: Cond) -> list[dict[str, Tensor | None]]:
    """What withheld must equal: the null class or no label; zero tokens, all of them seen, and zero pooled text."""
    if cond.label is not None:
        return [{"label": torch.full((3,), CLASSES)}, {"label": None}]
    zeros = {f: torch.zeros_like(v) for f in ("text", "pooled") if (v := getattr(cond, f)) is not None}
    return [{**zeros, "text_mask": torch.ones_like(cond.text_mask)}]


def other_semantic(cond: Cond) -> dict[str, Tensor]:
    """Another label, or other text of other lengths."""
    if cond.label is not None:
        return {"label": (cond.label + 1) % CLASSES}
    others = {f: 1 - v for f in ("text", "pooled") if (v := getattr(cond, f)) is not None}
    return {**others, "text_mask": cond.text_mask.flip(0)}


@pytest.mark.parametrize("name", SEMANTIC)
def test_withheld_semantic_condition_is_none_and_does_not_leak(name):
    cond = example(name)[1][3]
    withheld = call(name, has_semantic=NONE)
    for absent in absent_semantic(cond):
        assert call(name, **absent).equal(withheld)
    assert call(name, has_semantic=NONE, **other_semantic(cond)).equal(withheld)
    assert apart(call(name), withheld).min() > 1e-4


@pytest.mark.parametrize("name", CONTROL)
def test_withheld_control_contributes_exactly_zero_and_does_not_leak(name):
    net, (*args, cond) = example(name)
    control = {"control_high": cond.control_high, "control_low": cond.control_low}
    withheld = call(name, has_control=NONE)
    assert call(name, **dict.fromkeys(control)).equal(withheld)
    assert call(name, has_control=NONE, **{f: 9 - v for f, v in control.items()}).equal(withheld)
    # It is not the value 0.
    for given in (call(name), call(name, **{f: 0 * v for f, v in control.items()})):
        assert apart(given, withheld).min() > 1e-4
    if "shared MLP" in name:  # the pooled text's first layer, which is wider with control
        return
    row = ROWS[name]
    without = fresh(row._replace(inputs=row.inputs._replace(control=Control())), seed=1).double()
    without.load_state_dict({k: v for k, v in net.state_dict().items() if "control." not in k})
    with torch.no_grad():  # as in `call`: with gradients attention may have another kernel
        assert without(*args, cond).equal(withheld)


@every
def test_every_condition_matters(name):
    cond = example(name)[1][3]
    given = call(name)
    for field in ("control_high", "control_low", "pooled"):
        value = getattr(cond, field)
        if value is not None:
            assert apart(call(name, **{field: value + 1}), given).max() > 1e-3, field
    if name in SEMANTIC:
        assert apart(call(name, **other_semantic(cond) | {"pooled": cond.pooled}), given).min() > 1e-4


@pytest.mark.parametrize("name", TEXT)
def test_masked_padding_is_not_seen_and_zero_padding_is(name):
    net, (*args, cond) = example(name)
    text, mask = cond.text, cond.text_mask
    wanted = call(name)
    torch.testing.assert_close(call(name, text=torch.where(mask[..., None], text, 1e3)), wanted, **EXACT)
    # Longer padding is no different, nor is a caption alone, without padding and mask.
    longer = call(name, text=torch.cat([text, text], 1), text_mask=torch.cat([mask, torch.zeros_like(mask)], 1))
    torch.testing.assert_close(longer, wanted, **EXACT)
    *one, first = (a[1:2] for a in (*args, cond))
    alone = net(*one, dataclasses.replace(first, text=first.text[:, :2], text_mask=None))
    torch.testing.assert_close(alone[0], wanted[1], **EXACT)
    zeros = apart(call(name, text=torch.where(mask[..., None], text, 0), text_mask=None), wanted)
    assert zeros[0] < 1e-12 and zeros[1:].min() > 1e-4  # the first caption has no padding
    leaf = text.clone().requires_grad_()
    net(*args, dataclasses.replace(cond, text=leaf)).square().sum().backward()
    assert leaf.grad[~mask].abs().max() == 0 and leaf.grad[mask].abs().amax(1).min() > 0


@pytest.mark.parametrize("name", TEXT)
def test_a_text_without_real_tokens_is_finite(name):
    net, (*args, cond) = example(name)
    leaf = cond.text.clone().requires_grad_()
    out = net(*args, dataclasses.replace(cond, text=leaf, text_mask=torch.zeros_like(cond.text_mask)))
    grads = torch.autograd.grad(out.square().sum(), [leaf, *net.parameters()], allow_unused=True)
    assert out.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)


@every
def test_other_sizes_than_trained(name):
    for size in [(4, 12), (14, 6), (2, 2), (16, 16)]:
        net, (x, *rest) = example(name)[0], batch(ROWS[name], size)
        with torch.no_grad():
            out = net(x, *rest)
        assert out.shape == x.shape and out.isfinite().all()


@every
def test_state_dict_round_trip(name):
    net, args = example(name)
    other = fresh(ROWS[name], seed=1).double()
    with torch.no_grad():
        assert apart(other(*args), call(name)).min() > 1e-3
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(net.state_dict())))
        assert other(*args).equal(call(name))


@pytest.mark.parametrize("name", FULLEST)
def test_torch_compile_traces_the_whole(name):
    """Classes on the trained grid; text and MDT's masked pass on another, whose positions are made in forward."""
    torch.compiler.reset()  # rows share one forward, of which torch keeps 8 traces
    net = example(name)[0]
    args = batch(ROWS[name], (8, 12) if name in TEXT or ROWS[name].masked else (8, 8))
    out = torch.compile(net, fullgraph=True, backend="eager")(*args)
    torch.testing.assert_close(out, net(*args), **EXACT)


@every
def test_float32_and_bf16_autocast_are_near_float64(name):
    exact, size = example(name)[0], (8, 12)
    net, args = copy.deepcopy(exact).float(), batch(ROWS[name], size, torch.float32)
    with torch.no_grad():
        wanted = exact(*batch(ROWS[name], size))
    out = net(*args)
    assert (out - wanted).norm() < 1e-5 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*args)
        out.float().square().sum().backward()
    assert out.isfinite().all() and (out - wanted).norm() < 0.05 * wanted.norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# What is refused.


@pytest.mark.parametrize("network", NETWORKS)
def test_conditions_that_a_network_does_not_take(network):
    cfg, taken = NETWORKS[network]
    for condition in ("class", "control", "text", "pooled"):
        if condition not in taken:
            with pytest.raises(ValueError, match=rf"^{re.escape(cfg.name)} takes no .*; it takes: .*label"):
                nets.build(cfg, CONDITIONS[condition])
    if "text" in taken:
        with pytest.raises(ValueError, match="on classes or on text, not on both"):
            nets.build(cfg, CONDITIONS["text"]._replace(num_classes=CLASSES))


@pytest.mark.parametrize("name", [name for name in TEXT if name.endswith(": text")])
def test_text_left_out_instead_of_withheld(name):
    with pytest.raises(ValueError, match=r"needs Cond\.text; withhold it by has_semantic"):
        call(name, text=None, has_semantic=NONE)


@pytest.mark.parametrize("network", NETWORKS)
def test_resolutions_that_a_network_cannot_have(network):
    cfg = NETWORKS[network][0]
    with pytest.raises(
        ValueError, match=rf"resolution=9 is not a multiple of 2, which net\.name={re.escape(cfg.name)}"
    ):
        Run(data=Data(resolution=9), net=cfg)
