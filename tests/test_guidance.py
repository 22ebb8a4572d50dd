"""Guidance as a sum of denoisers: Eq. 2 of Berrada et al. term by term, what is computed, which guides are refused.

Legend: l = lambda, b = beta; c control, s semantic, 0 neither.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from written import changed, small, written

from gesso import ema, generate, keyed, snapshot
from gesso.cond import Cond
from gesso.config import EDM, RF, VP
from gesso.data.space import Space
from gesso.diffusion import guidance, process, sampler
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError

F64 = torch.float64
EXACT = dict(rtol=0, atol=1e-12)
strength = st.floats(-3, 8)
LABEL, CONTROL = torch.tensor([0, 4, 7]), torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
COND = Cond(label=LABEL, control_low=CONTROL)
X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
ONE = torch.tensor(1.0, dtype=F64)


class Counted(nn.Module):
    """A denoiser that tells what it is told, and counts batches and samples. Nothing is -1 of either."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift, self.calls, self.rows = shift, 0, 0

    def forward(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        assert s.ndim == 0 or s.shape == (len(x),)
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        has_s = torch.ones(len(x), dtype=torch.bool) if cond.has_semantic is None else cond.has_semantic
        has_c = torch.ones(len(x), dtype=torch.bool) if cond.has_control is None else cond.has_control
        return self.told(x, torch.where(has_s, cond.label, -1), torch.where(has_c, cond.control_low[:, 0], -1))

    def told(self, x: Tensor, label: Tensor | float, control: Tensor | float) -> Tensor:
        label, control = (torch.as_tensor(v, dtype=F64).expand(len(x))[:, None, None, None] for v in (label, control))
        return torch.tanh(x + 0.3 * label + self.shift) * (1 + control / 5)


def by_hand(net: Counted, sees_s: bool, sees_c: bool) -> Tensor:
    return net.told(X, LABEL if sees_s else -1.0, CONTROL[:, 0] if sees_c else -1.0)


@settings(max_examples=40, deadline=None)
@given(l=strength, b=strength, keep=st.booleans(), other=st.booleans(), sees=st.sampled_from(["nothing", "all"]))
def test_weights_sum_to_one(l, b, keep, other, sees):  # noqa: E741
    net, guide = Counted(), Counted(0.1) if other else None
    parts = guidance.terms(net, COND, l, b, keep_control=keep, guide=guide, guide_sees=sees)
    assert math.isclose(sum(t.weight for t in parts), 1, abs_tol=1e-9)
    guidance.combine(parts)  # which checks it too


@settings(max_examples=40, deadline=None)
@given(l=strength, b=strength)
def test_equation_2(l, b):  # noqa: E741
    net = Counted()
    wanted = l * (b * by_hand(net, True, True) + (1 - b) * by_hand(net, True, False)) + (1 - l) * by_hand(
        net, False, False
    )
    torch.testing.assert_close(guidance.combine(guidance.terms(net, COND, l, b))(X, ONE), wanted, **EXACT)


@settings(max_examples=20, deadline=None)
@given(l=strength, b=strength)
def test_keep_control_and_other_networks(l, b):  # noqa: E741
    net, guide = Counted(), Counted(0.4)
    near = l * (b * by_hand(net, True, True) + (1 - b) * by_hand(net, True, False))
    for changes, far in [
        (dict(keep_control=True), by_hand(net, False, True)),
        (dict(guide=guide), by_hand(guide, False, False)),
        (dict(guide=guide, keep_control=True), by_hand(guide, False, True)),
        (dict(guide=guide, guide_sees="all"), by_hand(guide, True, True)),
    ]:
        out = guidance.combine(guidance.terms(net, COND, l, b, **changes))(X, ONE)
        torch.testing.assert_close(out, near + (1 - l) * far, **EXACT)


@settings(max_examples=40, deadline=None)
@given(l=strength, b=strength, u=st.floats(0.02, 0.98), name=st.sampled_from(["edm", "vp", "vp-v", "rf"]))
def test_the_same_in_d_eps_and_v(l, b, u, name):  # noqa: E741
    """eps = (x - alpha D)/s, v = (eps - x0 on the straight path) = (x - D)/s, DDPM's v, and the network's own F."""
    cfg = {"edm": EDM(), "vp": VP(), "vp-v": VP(prediction="v"), "rf": RF()}[name]
    proc, net = process.build(cfg), Counted()
    s = proc.quantile(torch.tensor(u, dtype=F64))
    a, sigma = proc.alpha(s), s / proc.alpha(s)
    abar_root = 1 / (1 + sigma**2).sqrt()
    c_skip, c_out, _ = proc.precondition(s)
    D = guidance.combine(guidance.terms(net, COND, l, b))(X, s)
    ways = {
        "eps": lambda D: (X - a * D) / s,
        "flow": lambda D: (X - D) / s,
        "v": lambda D: abar_root * (X - a * D) / s - sigma * abar_root * D,
        "F": lambda D: (D - c_skip * X) / c_out,
    }
    for of in ways.values():
        wanted = sum(t.weight * of(net(X, s, t.cond)) for t in guidance.terms(net, COND, l, b))
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(of(D) / scale, wanted / scale, **EXACT)


# What is computed.


@pytest.mark.parametrize(
    "l, b, rows",
    [(1, 1, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (2, 1, 6), (1, 1.5, 6), (2, 0, 6), (2, 1.5, 9), (0.5, 0.5, 9)],
)
def test_terms_of_weight_zero_are_not_computed(l, b, rows):  # noqa: E741
    net = Counted()
    guidance.combine(guidance.terms(net, COND, l, b))(X, ONE)
    assert (net.calls, net.rows) == (1, rows)


def test_another_network_is_called_apart():
    net, guide = Counted(), Counted(0.4)
    guidance.combine(guidance.terms(net, COND, 2.0, 1.5, guide=guide))(X, ONE)
    assert (net.calls, net.rows, guide.calls, guide.rows) == (1, 6, 1, 3)
    guidance.combine(guidance.terms(net, COND, 1.0, 1.5, guide=guide, guide_sees="all"))(X, ONE)
    assert (net.calls, net.rows, guide.calls) == (2, 12, 1)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(0.05, 2), width=st.floats(0.1, 5), sigma=st.floats(0.01, 20), flow=st.booleans())
def test_interval_is_in_sigma_and_outside_it_beta_stays(low, width, sigma, flow):
    proc = process.build(RF() if flow else EDM())
    s = torch.tensor(sigma / (1 + sigma) if flow else sigma, dtype=F64)
    sigma = float(s / proc.alpha(s))
    net, limits = Counted(), (low, low + width)
    inside, outside = (guidance.combine(guidance.terms(net, COND, x, 1.5)) for x in (3.0, 1.0))
    out = guidance.Within(inside, outside, proc.alpha, limits)(X, s)
    is_in = low <= sigma <= low + width
    assert net.rows == (9 if is_in else 6)
    torch.testing.assert_close(out, (inside if is_in else outside)(X, s), **EXACT)


def test_interval_at_pure_noise():
    """sigma of rectified flow's first level is infinite."""
    net, proc = Counted(), process.build(RF())
    inside, outside = (guidance.combine(guidance.terms(net, COND, x)) for x in (3.0, 1.0))
    guidance.Within(inside, outside, proc.alpha, (0.0, 1e9))(X, ONE)
    assert net.rows == 3


@given(l=strength, k=st.floats(0.25, 8), j=st.floats(0.25, 8))
def test_scale_law(l, k, j):  # noqa: E741
    """l' - 1 = k (l - 1): at the tuned resolution unchanged, guidance 1 everywhere 1, steps multiply."""
    assert guidance.scaled(l, 1) == pytest.approx(l, abs=1e-12) and guidance.scaled(1, k) == 1
    assert guidance.scaled(l, k) - 1 == pytest.approx(k * (l - 1), abs=1e-9)
    assert guidance.scaled(guidance.scaled(l, k), j) == pytest.approx(guidance.scaled(l, k * j), abs=1e-9)


def test_strength_at_another_resolution_and_said_so():
    run = small(**{"sample.guidance": 1.5, "sample.tuned_at": 8})
    assert generate.strength(run) == 1.5
    assert generate.strength(changed(run, **{"sample.resolution": 16})) == 2.0  # 1.5 at 256, 2.0 at 512
    assert "guidance 2 (1.5 at 8 pixels, by the scale law)" in generate.described(
        changed(run, **{"sample.resolution": 16})
    )
    assert generate.strength(changed(run, **{"sample.resolution": 16, "sample.tuned_at": "null"})) == 1.5


def test_evaluations_of_a_whole_trajectory():
    """Euler, 8 levels: lambda inside the interval alone, beta everywhere, by run.sample."""
    run = small(
        **{"data.source": "digits-coarse", "control.variables": "size", "sample.control_guidance": 1.375,
           "sample.interval": "[0.1,2]", "sample.steps": 8}
    )  # fmt: skip
    net, proc = Counted(), process.build(run.process)
    wrapped = Denoiser(nn.Identity(), proc, "sinusoidal")
    wrapped.forward = net.forward
    denoise = generate.guided(wrapped, run, COND, None)
    seen = []

    def spy(x: Tensor, s: Tensor) -> Tensor:
        seen.append(float(s))
        return denoise(x, s)

    sampler.draw(run.sample, proc, spy, X, lambda i: X)
    inside = sum(0.1 <= s <= 2 for s in seen)
    assert len(seen) == net.calls == 8 and 0 < inside < 8
    assert net.rows == 3 * (2 * 8 + inside)


def test_a_heun_step_is_guided_or_not_as_one():
    """Both evaluations of a step, churned or not, follow the level that the step starts from, as the published code does."""
    levels = torch.tensor([10.0, 4.0, 2.0, 0.5, 0.1, 0.0], dtype=F64)
    calls = []

    def named(name):
        def denoise(x: Tensor, s: Tensor) -> Tensor:
            calls.append((name, float(s)))
            return x * 0.3

        return denoise

    proc = process.build(EDM())
    denoise = guidance.Within(named("in"), named("out"), proc.alpha, (0.4, 2.5))
    sampler.heun(denoise, X, levels, proc.alpha)
    assert calls == [
        ("out", 10), ("out", 4), ("out", 4), ("out", 2), ("in", 2), ("in", 0.5), ("in", 0.5), ("in", 0.1), ("out", 0.1),
    ]  # fmt: skip
    calls.clear()
    churn = sampler.Churn(
        proc.rescaled, math.inf, S_churn=2.0
    )  # 2 is raised to 2.8, out of the interval, and stays guided
    sampler.heun(denoise, X, levels, proc.alpha, churn, lambda i: X)
    assert [name for name, _ in calls] == ["out"] * 4 + ["in"] * 4 + ["out"] and calls[4][1] == pytest.approx(2.8)


# Guides from run folders.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs by name: the plain one and what may guide it."""
    root = tmp_path_factory.mktemp("guides")
    control = {"data.source": "digits-coarse", "control.variables": "size"}
    kinds = {
        "plain": {},
        "unconditional": {"semantic.kind": "none"},
        "coarse": {"data.source": "digits-coarse"},
        "flow": {"process.name": "rf"},
        "always": {"dropout.both": 0, "sample.guidance": 1},
        "words": {"semantic.kind": "text"},
        "sized": control,
        "flipped": control | {"control.variables": "flip,size"},
        "always sized": control | {"dropout.both": 0, "dropout.semantic": 0.1, "sample.keep_control": "true"},
    }
    for name, update in kinds.items():
        written(root / name, **update)
    return root


def run_of(folder, **sample: object):
    return changed(snapshot.read(snapshot.stored(folder)[0].path)[1], **{f"sample.{k}": v for k, v in sample.items()})


def images(folder, run, label="3", seeds="0-3"):
    """What `gesso sample` would write, as one tensor."""
    cond = Cond(label=torch.full((4,), int(label)))
    weights = snapshot.synthesize(folder, [ema.chosen(run.sample)])[0][0]
    denoiser = snapshot.denoiser(weights, run)
    return torch.cat(list(generate.generate(denoiser, run, range(4), cond, generate.guide_of(folder, run))))


@pytest.mark.parametrize("sees", ["nothing", "all"])
def test_self_at_another_length_end_to_end(folders, sees):
    folder = folders / "plain"
    run = run_of(folder, guide="self", guide_sigma_rel=0.1, guide_sees=sees, guidance=3, steps=4)
    (strong, weak), _, _, _ = snapshot.synthesize(folder, [ema.Power(0.05), ema.Power(0.1)])
    strong, weak = snapshot.denoiser(strong, run), snapshot.denoiser(weak, run)
    label = torch.full((4,), 3)

    def by_hand(x: Tensor, s: Tensor) -> Tensor:
        far = weak(x, s, Cond(label=label if sees == "all" else torch.full((4,), 10)))
        return 3 * strong(x, s, Cond(label=label)) - 2 * far

    first = keyed.normal(0, torch.arange(4), "first noise", (1, 8, 8))
    with torch.no_grad():
        x = sampler.draw(run.sample, strong.process, by_hand, first, lambda i: first)
    made = images(folder, run)
    assert (made.int() - Space(run.data, run.latent, strong.process.sd, "cpu").pixels(x).int()).abs().max() <= 1
    unlike = images(folder, run_of(folder, guidance=3, steps=4))
    assert (made.int() - unlike.int()).abs().max() > 10
    lines = generate.draw(folder, run, generate.Asked(label="3", seeds="0-1"), folder / f"drawn {sees}")
    assert f"guided by self, which sees {sees}" in lines[-1]


def test_a_small_unconditional_network_guides(folders):
    folder = folders / "plain"
    run = run_of(folder, guide=folders / "unconditional", guidance=2)
    guide = generate.guide_of(folder, run)
    assert guide.net.semantic is None and len(images(folder, run)) == 4
    assert generate.guide_of(folder, run_of(folder, guide=folders / "unconditional", guidance=1)) is None


def test_an_unconditional_network_is_guided_by_a_weaker_one(folders):
    folder = folders / "unconditional"
    run = run_of(folder, guide="self", guide_sigma_rel=0.1, guide_sees="all", guidance=3)
    plain = images(folder, run_of(folder))
    assert (images(folder, run).int() - plain.int()).abs().max() > 10


@pytest.mark.parametrize(
    "folder, sample, said",
    [
        ("plain", dict(guide="self"), "is the same network"),
        ("plain", dict(guide="self", guide_sees="all"), "is the same network"),
        ("plain", dict(guide="self", guide_sigma_rel=0.05), "is the same network"),
        ("plain", dict(guide="coarse"), "trained otherwise: data.mean"),
        ("plain", dict(guide="flow"), "trained otherwise: process.name is rf there, edm here"),
        ("plain", dict(guide="nowhere"), "holds no snapshots"),
        ("plain", dict(guide="unconditional", guide_nimg=5), "no snapshot up to image 5"),
        ("plain", dict(guide="always"), "never learned to see nothing: dropout.both is 0 there"),
        ("plain", dict(guide="words"), "semantic.kind is text there, label here"),
        ("plain", dict(guide="unconditional", guide_sees="all"), "semantic.kind is none there, label here"),
        ("sized", dict(guide="flipped"), "control.variables is ['flip', 'size'] there, ['size'] here"),
        ("sized", dict(guide="always sized"), "dropout.both is 0 there"),
        ("always sized", dict(guide="sized", keep_control=True), "dropout.semantic is 0 there"),
        ("sized", dict(guide="coarse", guide_sees="all"), "control.variables is [] there, ['size'] here"),
    ],
)
def test_guides_that_do_not_fit(folders, folder, sample, said):
    if sample["guide"] != "self":
        sample = sample | {"guide": folders / sample["guide"]}
    run = run_of(folders / folder, **{"guidance": 2} | sample)
    with pytest.raises(UsageError) as refused:
        generate.guide_of(folders / folder, run)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "folder, sample",
    [
        ("plain", dict(guide="always", guide_sees="all")),
        ("sized", dict(guide="coarse")),
        ("sized", dict(guide="always sized", keep_control="true")),
        ("coarse", dict(guide="sized")),
        ("words", dict(guide="plain")),
    ],
)
def test_guides_that_fit(folders, folder, sample):
    place = folders / folder
    run = run_of(place, **sample | {"guide": folders / sample["guide"], "guidance": 2})
    words = "3" if run.semantic.kind == "label" else None
    asked = generate.Asked(label=words, seeds="0-1")
    assert "guided by" in generate.draw(place, run, asked, place / "fits")[-1]
