"""Properties of every network under every condition that it takes (tests/helpers/network_cases.py)."""

import copy
import dataclasses
import re
from functools import cache

import pytest
import safetensors.torch
import torch
from helpers.network_cases import (
    CASES,
    INPUT_SPECS,
    NETWORKS,
    NUM_CLASSES,
    ZERO_GRADIENT_ROWS,
    example_batch,
    initialized_net,
    randomized_net,
)
from torch import Tensor, nn

from gesso import models
from gesso.conditioning import Cond
from gesso.config import ControlSpec, DataConfig, RunConfig

TOLERANCE = dict(rtol=1e-11, atol=1e-12)
ALL_WITHHELD = torch.zeros(3, dtype=torch.bool)
SEMANTIC_CASES = [name for name, row in CASES.items() if row.inputs.has_semantic]
CLASS_CASES = [name for name, row in CASES.items() if row.inputs.num_classes]
TEXT_CASES = [name for name, row in CASES.items() if row.inputs.text_dim]
CONTROL_CASES = [name for name, row in CASES.items() if row.inputs.control.num_high]
# Every network under its fullest conditions, of which the others are parts: a trace takes as long as all other tests.
SUBSET_CASES = [
    name for name in CASES if f"{name} control" in CASES or name.replace("text", "pooled") in CASES.keys() - {name}
]
REDUNDANT = re.compile(r": (none|control|class joint)$|qk-norm|class table")
FULLEST_CASES = [name for name in CASES if name not in SUBSET_CASES and not REDUNDANT.search(name)]
every_case = pytest.mark.parametrize("name", CASES)


@cache
def build_example(name: str) -> tuple[nn.Module, tuple]:
    """Return the network and arguments of a case in float64; tests do not change them."""
    return randomized_net(CASES[name]), example_batch(CASES[name])


def call(name: str, **changes: Tensor | None) -> Tensor:
    """Return the output with some fields of the condition changed."""
    net, (*args, cond) = build_example(name)
    with torch.no_grad():
        return net(*args, dataclasses.replace(cond, **changes))


def outputs_differ(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest difference of each sample, (B,)."""
    return (a - b).flatten(1).abs().amax(1)


def test_cases_cover_every_network():
    assert {type(cfg) for cfg, _ in NETWORKS.values()} == set(models.NETWORKS)


@every_case
def test_fresh_networks_return_zero(name):
    """Exceptions are CONFIGS C to F, which have neither zero-initialized layers nor an output gain."""
    with torch.no_grad():
        out = initialized_net(CASES[name])(*example_batch(CASES[name], dtype=torch.float32))
    assert (out.abs().max() == 0) == (re.match("ladder [CDEF]", name) is None)


@every_case
def test_every_row_of_every_parameter_gets_a_gradient(name):
    """Exceptions are ZERO_GRADIENT_ROWS, whose gradient is zero up to rounding."""
    net, (*args, cond) = build_example(name)
    if name in SEMANTIC_CASES:
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
        expected = torch.ones(len(size), dtype=torch.bool)
        for silent in ZERO_GRADIENT_ROWS:
            if re.search(silent.cases, name) and re.search(silent.parameter, parameter):
                expected[silent.first * len(size) // silent.total : silent.last * len(size) // silent.total] = False
        if not (size > 1e-9 * size.max().clamp(min=1e-3)).equal(expected):
            wrong.append(parameter)
    assert wrong == []


@every_case
def test_output_does_not_depend_on_neighbours(name):
    """Sample 1 has no control and sample 2 no semantic condition, if the network takes them."""
    net, args = build_example(name)
    has_semantic = torch.tensor([True, True, False]) if name in SEMANTIC_CASES else None
    has_control = torch.tensor([True, False, True]) if name in CONTROL_CASES else None
    full_batch = call(name, has_semantic=has_semantic, has_control=has_control)
    for i in range(3):
        *sample, cond = (a[i : i + 1] for a in args)
        single = net(*sample, cond.without(semantic=i == 2, control=i == 1))
        torch.testing.assert_close(single[0], full_batch[i], **TOLERANCE)


def without_semantic(cond: Cond) -> list[dict[str, Tensor | None]]:
    """Return conditions equal to withheld ones: the null class or no label; zero unmasked text, zero pooled text."""
    if cond.label is not None:
        return [{"label": torch.full((3,), NUM_CLASSES)}, {"label": None}]
    zeros = {f: torch.zeros_like(v) for f in ("text", "pooled") if (v := getattr(cond, f)) is not None}
    return [{**zeros, "text_mask": torch.ones_like(cond.text_mask)}]


def other_semantic(cond: Cond) -> dict[str, Tensor]:
    """Return another label, or other text of other lengths."""
    if cond.label is not None:
        return {"label": (cond.label + 1) % NUM_CLASSES}
    others = {f: 1 - v for f in ("text", "pooled") if (v := getattr(cond, f)) is not None}
    return {**others, "text_mask": cond.text_mask.flip(0)}


@pytest.mark.parametrize("name", SEMANTIC_CASES)
def test_withheld_semantic_condition_is_none_and_does_not_leak(name):
    cond = build_example(name)[1][3]
    withheld = call(name, has_semantic=ALL_WITHHELD)
    for absent in without_semantic(cond):
        assert call(name, **absent).equal(withheld)
    assert call(name, has_semantic=ALL_WITHHELD, **other_semantic(cond)).equal(withheld)
    assert outputs_differ(call(name), withheld).min() > 1e-4


@pytest.mark.parametrize("name", CONTROL_CASES)
def test_withheld_control_contributes_exactly_zero_and_does_not_leak(name):
    net, (*args, cond) = build_example(name)
    control = {"control_high": cond.control_high, "control_low": cond.control_low}
    withheld = call(name, has_control=ALL_WITHHELD)
    assert call(name, **dict.fromkeys(control)).equal(withheld)
    assert call(name, has_control=ALL_WITHHELD, **{f: 9 - v for f, v in control.items()}).equal(withheld)
    # It is not the value 0.
    for output in (call(name), call(name, **{f: 0 * v for f, v in control.items()})):
        assert outputs_differ(output, withheld).min() > 1e-4
    if "shared MLP" in name:  # the pooled text's first layer, which is wider with control
        return
    row = CASES[name]
    without = initialized_net(row._replace(inputs=row.inputs._replace(control=ControlSpec())), seed=1).double()
    without.load_state_dict({k: v for k, v in net.state_dict().items() if "control." not in k})
    with torch.no_grad():  # as in `call`: with gradients attention may have another kernel
        assert without(*args, cond).equal(withheld)


@every_case
def test_every_condition_matters(name):
    cond = build_example(name)[1][3]
    conditional = call(name)
    for field in ("control_high", "control_low", "pooled"):
        value = getattr(cond, field)
        if value is not None:
            assert outputs_differ(call(name, **{field: value + 1}), conditional).max() > 1e-3, field
    if name in SEMANTIC_CASES:
        assert outputs_differ(call(name, **other_semantic(cond) | {"pooled": cond.pooled}), conditional).min() > 1e-4


@pytest.mark.parametrize("name", TEXT_CASES)
def test_masked_padding_is_ignored_and_zero_padding_is_not(name):
    net, (*args, cond) = build_example(name)
    text, mask = cond.text, cond.text_mask
    expected = call(name)
    torch.testing.assert_close(call(name, text=torch.where(mask[..., None], text, 1e3)), expected, **TOLERANCE)
    # Longer padding is no different, nor is a caption alone, without padding and mask.
    longer = call(name, text=torch.cat([text, text], 1), text_mask=torch.cat([mask, torch.zeros_like(mask)], 1))
    torch.testing.assert_close(longer, expected, **TOLERANCE)
    *sample, first = (a[1:2] for a in (*args, cond))
    single = net(*sample, dataclasses.replace(first, text=first.text[:, :2], text_mask=None))
    torch.testing.assert_close(single[0], expected[1], **TOLERANCE)
    zeros = outputs_differ(call(name, text=torch.where(mask[..., None], text, 0), text_mask=None), expected)
    assert zeros[0] < 1e-12 and zeros[1:].min() > 1e-4  # the first caption has no padding
    leaf = text.clone().requires_grad_()
    net(*args, dataclasses.replace(cond, text=leaf)).square().sum().backward()
    assert leaf.grad[~mask].abs().max() == 0 and leaf.grad[mask].abs().amax(1).min() > 0


@pytest.mark.parametrize("name", TEXT_CASES)
def test_a_text_without_real_tokens_is_finite(name):
    net, (*args, cond) = build_example(name)
    leaf = cond.text.clone().requires_grad_()
    out = net(*args, dataclasses.replace(cond, text=leaf, text_mask=torch.zeros_like(cond.text_mask)))
    grads = torch.autograd.grad(out.square().sum(), [leaf, *net.parameters()], allow_unused=True)
    assert out.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)


@every_case
def test_sizes_other_than_trained(name):
    for size in [(4, 12), (14, 6), (2, 2), (16, 16)]:
        net, (x, *inputs) = build_example(name)[0], example_batch(CASES[name], size)
        with torch.no_grad():
            out = net(x, *inputs)
        assert out.shape == x.shape and out.isfinite().all()


@every_case
def test_state_dict_round_trip(name):
    net, args = build_example(name)
    loaded = initialized_net(CASES[name], seed=1).double()
    with torch.no_grad():
        assert outputs_differ(loaded(*args), call(name)).min() > 1e-3
        loaded.load_state_dict(safetensors.torch.load(safetensors.torch.save(net.state_dict())))
        assert loaded(*args).equal(call(name))


@pytest.mark.parametrize("name", FULLEST_CASES)
def test_torch_compile_traces_the_full_graph(name):
    """Classes run on the training grid; text and MDT's masked pass on another, with positions computed in forward."""
    torch.compiler.reset()  # rows share one forward, of which torch keeps 8 traces
    net = build_example(name)[0]
    args = example_batch(CASES[name], (8, 12) if name in TEXT_CASES or CASES[name].masked else (8, 8))
    out = torch.compile(net, fullgraph=True, backend="eager")(*args)
    torch.testing.assert_close(out, net(*args), **TOLERANCE)


@every_case
def test_float32_and_bf16_autocast_are_near_float64(name):
    exact, size = build_example(name)[0], (8, 12)
    net, args = copy.deepcopy(exact).float(), example_batch(CASES[name], size, torch.float32)
    with torch.no_grad():
        expected = exact(*example_batch(CASES[name], size))
    out = net(*args)
    assert (out - expected).norm() < 1e-5 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*args)
        out.float().square().sum().backward()
    assert out.isfinite().all() and (out - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# What is refused.


@pytest.mark.parametrize("network", NETWORKS)
def test_unsupported_conditions(network):
    cfg, supported = NETWORKS[network]
    for condition in ("class", "control", "text", "pooled"):
        if condition not in supported:
            with pytest.raises(ValueError, match=rf"^{re.escape(cfg.name)} takes no .*; it takes: .*label"):
                models.build_network(cfg, INPUT_SPECS[condition])
    if "text" in supported:
        with pytest.raises(ValueError, match="classes or text, not both"):
            models.build_network(cfg, INPUT_SPECS["text"]._replace(num_classes=NUM_CLASSES))


@pytest.mark.parametrize("name", [name for name in TEXT_CASES if name.endswith(": text")])
def test_missing_text_raises(name):
    with pytest.raises(ValueError, match=r"needs Cond\.text; withhold it by has_semantic"):
        call(name, text=None, has_semantic=ALL_WITHHELD)


@pytest.mark.parametrize("network", NETWORKS)
def test_unsupported_resolutions(network):
    cfg = NETWORKS[network][0]
    with pytest.raises(
        ValueError, match=rf"resolution=9 is not a multiple of 2, which net\.name={re.escape(cfg.name)}"
    ):
        RunConfig(data=DataConfig(resolution=9), net=cfg)
