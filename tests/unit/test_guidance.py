"""Guidance as a sum of denoisers: Eq. 2 of Berrada et al., the number of evaluations, and incompatible guides.

Legend: l = lambda, b = beta; c control, s semantic, 0 neither.
"""

import math

import pytest
import torch
from helpers.run_factory import small_run, with_settings, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gesso import ema, rng, sample_files, sampling, snapshot
from gesso.conditioning import Cond
from gesso.config import EDMConfig, RFConfig, VPConfig
from gesso.data.normalization import Normalizer
from gesso.diffusion import guidance, process, samplers
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError

F64 = torch.float64
TOLERANCE = dict(rtol=0, atol=1e-12)
guidance_weights = st.floats(-3, 8)
LABEL, CONTROL = torch.tensor([0, 4, 7]), torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
COND = Cond(label=LABEL, control_low=CONTROL)
X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
ONE = torch.tensor(1.0, dtype=F64)


class CountingDenoiser(nn.Module):
    """Denoiser that returns its conditions (-1 for none) and counts batches and samples."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift, self.num_calls, self.num_samples = shift, 0, 0

    def forward(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        assert s.ndim == 0 or s.shape == (len(x),)
        self.num_calls, self.num_samples = self.num_calls + 1, self.num_samples + len(x)
        has_s = torch.ones(len(x), dtype=torch.bool) if cond.has_semantic is None else cond.has_semantic
        has_c = torch.ones(len(x), dtype=torch.bool) if cond.has_control is None else cond.has_control
        return self.predict(x, torch.where(has_s, cond.label, -1), torch.where(has_c, cond.control_low[:, 0], -1))

    def predict(self, x: Tensor, label: Tensor | float, control: Tensor | float) -> Tensor:
        label, control = (torch.as_tensor(v, dtype=F64).expand(len(x))[:, None, None, None] for v in (label, control))
        return torch.tanh(x + 0.3 * label + self.shift) * (1 + control / 5)


def expected_output(net: CountingDenoiser, semantic: bool, control: bool) -> Tensor:
    return net.predict(X, LABEL if semantic else -1.0, CONTROL[:, 0] if control else -1.0)


@settings(max_examples=40, deadline=None)
@given(
    l=guidance_weights,
    b=guidance_weights,
    keep=st.booleans(),
    has_guide=st.booleans(),
    sees=st.sampled_from(["none", "all"]),
)
def test_weights_sum_to_one(l, b, keep, has_guide, sees):  # noqa: E741
    net, guide = CountingDenoiser(), CountingDenoiser(0.1) if has_guide else None
    parts = guidance.guidance_terms(net, COND, l, b, keep_control=keep, guide=guide, guide_conditioning=sees)
    assert math.isclose(sum(t.weight for t in parts), 1, abs_tol=1e-9)
    guidance.combine_terms(parts)  # which checks it too


@settings(max_examples=40, deadline=None)
@given(l=guidance_weights, b=guidance_weights)
def test_equation_2(l, b):  # noqa: E741
    net = CountingDenoiser()
    expected = l * (b * expected_output(net, True, True) + (1 - b) * expected_output(net, True, False)) + (
        1 - l
    ) * expected_output(net, False, False)
    torch.testing.assert_close(
        guidance.combine_terms(guidance.guidance_terms(net, COND, l, b))(X, ONE), expected, **TOLERANCE
    )


@settings(max_examples=20, deadline=None)
@given(l=guidance_weights, b=guidance_weights)
def test_keep_control_and_other_networks(l, b):  # noqa: E741
    net, guide = CountingDenoiser(), CountingDenoiser(0.4)
    near = l * (b * expected_output(net, True, True) + (1 - b) * expected_output(net, True, False))
    for changes, far in [
        (dict(keep_control=True), expected_output(net, False, True)),
        (dict(guide=guide), expected_output(guide, False, False)),
        (dict(guide=guide, keep_control=True), expected_output(guide, False, True)),
        (dict(guide=guide, guide_conditioning="all"), expected_output(guide, True, True)),
    ]:
        out = guidance.combine_terms(guidance.guidance_terms(net, COND, l, b, **changes))(X, ONE)
        torch.testing.assert_close(out, near + (1 - l) * far, **TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(
    l=guidance_weights, b=guidance_weights, u=st.floats(0.02, 0.98), name=st.sampled_from(["edm", "vp", "vp-v", "rf"])
)
def test_guidance_is_equal_in_d_eps_and_v(l, b, u, name):  # noqa: E741
    """eps = (x - alpha D)/s, v = (eps - x0 on the straight path) = (x - D)/s, DDPM's v, and the network's F."""
    cfg = {"edm": EDMConfig(), "vp": VPConfig(), "vp-v": VPConfig(prediction="v"), "rf": RFConfig()}[name]
    proc, net = process.build_process(cfg), CountingDenoiser()
    s = proc.icdf(torch.tensor(u, dtype=F64))
    a, sigma = proc.alpha(s), s / proc.alpha(s)
    abar_root = 1 / (1 + sigma**2).sqrt()
    c_skip, c_out, _ = proc.precondition(s)
    D = guidance.combine_terms(guidance.guidance_terms(net, COND, l, b))(X, s)
    coordinates = {
        "eps": lambda D: (X - a * D) / s,
        "flow": lambda D: (X - D) / s,
        "v": lambda D: abar_root * (X - a * D) / s - sigma * abar_root * D,
        "F": lambda D: (D - c_skip * X) / c_out,
    }
    for of in coordinates.values():
        expected = sum(t.weight * of(net(X, s, t.cond)) for t in guidance.guidance_terms(net, COND, l, b))
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(of(D) / scale, expected / scale, **TOLERANCE)


# What is computed.


@pytest.mark.parametrize(
    "l, b, rows",
    [(1, 1, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (2, 1, 6), (1, 1.5, 6), (2, 0, 6), (2, 1.5, 9), (0.5, 0.5, 9)],
)
def test_terms_of_weight_zero_are_not_computed(l, b, rows):  # noqa: E741
    net = CountingDenoiser()
    guidance.combine_terms(guidance.guidance_terms(net, COND, l, b))(X, ONE)
    assert (net.num_calls, net.num_samples) == (1, rows)


def test_guide_network_runs_in_a_separate_batch():
    net, guide = CountingDenoiser(), CountingDenoiser(0.4)
    guidance.combine_terms(guidance.guidance_terms(net, COND, 2.0, 1.5, guide=guide))(X, ONE)
    assert (net.num_calls, net.num_samples, guide.num_calls, guide.num_samples) == (1, 6, 1, 3)
    guidance.combine_terms(guidance.guidance_terms(net, COND, 1.0, 1.5, guide=guide, guide_conditioning="all"))(X, ONE)
    assert (net.num_calls, net.num_samples, guide.num_calls) == (2, 12, 1)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(0.05, 2), width=st.floats(0.1, 5), sigma=st.floats(0.01, 20), flow=st.booleans())
def test_interval_is_in_sigma_and_keeps_control_guidance_outside(low, width, sigma, flow):
    proc = process.build_process(RFConfig() if flow else EDMConfig())
    s = torch.tensor(sigma / (1 + sigma) if flow else sigma, dtype=F64)
    sigma = float(s / proc.alpha(s))
    net, limits = CountingDenoiser(), (low, low + width)
    inside, outside = (guidance.combine_terms(guidance.guidance_terms(net, COND, x, 1.5)) for x in (3.0, 1.0))
    out = guidance.GuidanceInterval(inside, outside, proc.alpha, limits)(X, s)
    is_in = low <= sigma <= low + width
    assert net.num_samples == (9 if is_in else 6)
    torch.testing.assert_close(out, (inside if is_in else outside)(X, s), **TOLERANCE)


def test_interval_at_pure_noise():
    """sigma of rectified flow's first level is infinite."""
    net, proc = CountingDenoiser(), process.build_process(RFConfig())
    inside, outside = (guidance.combine_terms(guidance.guidance_terms(net, COND, x)) for x in (3.0, 1.0))
    guidance.GuidanceInterval(inside, outside, proc.alpha, (0.0, 1e9))(X, ONE)
    assert net.num_samples == 3


@given(l=guidance_weights, k=st.floats(0.25, 8), j=st.floats(0.25, 8))
def test_scale_law(l, k, j):  # noqa: E741
    """l' - 1 = k (l - 1): at the tuned resolution unchanged, guidance 1 everywhere 1, steps multiply."""
    assert guidance.scale_guidance(l, 1) == pytest.approx(l, abs=1e-12) and guidance.scale_guidance(1, k) == 1
    assert guidance.scale_guidance(l, k) - 1 == pytest.approx(k * (l - 1), abs=1e-9)
    assert guidance.scale_guidance(guidance.scale_guidance(l, k), j) == pytest.approx(
        guidance.scale_guidance(l, k * j), abs=1e-9
    )


def test_guidance_scale_at_another_resolution():
    run = small_run(**{"sample.guidance": 1.5, "sample.guidance_base_resolution": 8})
    assert sampling.guidance_scale(run) == 1.5
    assert sampling.guidance_scale(with_settings(run, **{"sample.resolution": 16})) == 2.0  # 1.5 at 256, 2.0 at 512
    assert "guidance 2 (1.5 at 8 pixels, by the scale law)" in sampling.describe_sampling(
        with_settings(run, **{"sample.resolution": 16})
    )
    assert (
        sampling.guidance_scale(
            with_settings(run, **{"sample.resolution": 16, "sample.guidance_base_resolution": "null"})
        )
        == 1.5
    )


def test_evaluations_of_a_full_trajectory():
    """Euler, 8 levels: lambda inside the interval alone, beta everywhere, by run.sample."""
    run = small_run(
        **{"data.source": "digits-mixed-resolution", "control.variables": "size", "sample.control_guidance": 1.375,
           "sample.guidance_interval": "[0.1,2]", "sample.steps": 8}
    )  # fmt: skip
    net, proc = CountingDenoiser(), process.build_process(run.process)
    wrapped = Denoiser(nn.Identity(), proc, "sinusoidal")
    wrapped.forward = net.forward
    denoise = sampling.guided_denoiser(wrapped, run, COND, None)
    calls = []

    def spy(x: Tensor, s: Tensor) -> Tensor:
        calls.append(float(s))
        return denoise(x, s)

    samplers.sample(run.sample, proc, spy, X, lambda i: X)
    inside = sum(0.1 <= s <= 2 for s in calls)
    assert len(calls) == net.num_calls == 8 and 0 < inside < 8
    assert net.num_samples == 3 * (2 * 8 + inside)


def test_guidance_interval_applies_to_full_heun_steps():
    """Both evaluations of a step depend on the level that it starts from, with and without churn, as published."""
    levels = torch.tensor([10.0, 4.0, 2.0, 0.5, 0.1, 0.0], dtype=F64)
    calls = []

    def named(name):
        def denoise(x: Tensor, s: Tensor) -> Tensor:
            calls.append((name, float(s)))
            return x * 0.3

        return denoise

    proc = process.build_process(EDMConfig())
    denoise = guidance.GuidanceInterval(named("in"), named("out"), proc.alpha, (0.4, 2.5))
    samplers.heun(denoise, X, levels, proc.alpha)
    assert calls == [
        ("out", 10), ("out", 4), ("out", 4), ("out", 2), ("in", 2), ("in", 0.5), ("in", 0.5), ("in", 0.1), ("out", 0.1),
    ]  # fmt: skip
    calls.clear()
    churn = samplers.Churn(
        proc.scale_sigma, math.inf, S_churn=2.0
    )  # 2 is raised to 2.8, out of the interval, and stays guided
    samplers.heun(denoise, X, levels, proc.alpha, churn, lambda i: X)
    assert [name for name, _ in calls] == ["out"] * 4 + ["in"] * 4 + ["out"] and calls[4][1] == pytest.approx(2.8)


# Guides from run folders.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder of runs by name: a plain one and possible guides."""
    root = tmp_path_factory.mktemp("guides")
    control = {"data.source": "digits-mixed-resolution", "control.variables": "size"}
    kinds = {
        "plain": {},
        "unconditional": {"semantic.kind": "none"},
        "coarse": {"data.source": "digits-mixed-resolution"},
        "flow": {"process.name": "rf"},
        "always": {"dropout.both": 0, "sample.guidance": 1},
        "words": {"semantic.kind": "text"},
        "sized": control,
        "flipped": control | {"control.variables": "flip,size"},
        "always sized": control | {"dropout.both": 0, "dropout.semantic": 0.1, "sample.keep_control": "true"},
    }
    for name, update in kinds.items():
        write_run(root / name, **update)
    return root


def load_run(folder, **sample: object):
    return with_settings(
        snapshot.read(snapshot.list_snapshots(folder)[0].path)[1], **{f"sample.{k}": v for k, v in sample.items()}
    )


def sample_images(folder, run, label="3", seeds="0-3"):
    """Return the images of `gesso sample` as one tensor."""
    cond = Cond(label=torch.full((4,), int(label)))
    weights = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)])[0][0]
    denoiser = snapshot.denoiser_from_weights(weights, run)
    return torch.cat(list(sampling.generate(denoiser, run, range(4), cond, sampling.load_guide(folder, run))))


@pytest.mark.parametrize("sees", ["none", "all"])
def test_self_guidance_at_another_ema_length(folders, sees):
    folder = folders / "plain"
    run = load_run(folder, guide_run="self", guide_sigma_rel=0.1, guide_conditioning=sees, guidance=3, steps=4)
    (strong, weak), _, _, _ = snapshot.reconstruct_from_run(folder, [ema.PowerProfile(0.05), ema.PowerProfile(0.1)])
    strong, weak = snapshot.denoiser_from_weights(strong, run), snapshot.denoiser_from_weights(weak, run)
    label = torch.full((4,), 3)

    def by_hand(x: Tensor, s: Tensor) -> Tensor:
        far = weak(x, s, Cond(label=label if sees == "all" else torch.full((4,), 10)))
        return 3 * strong(x, s, Cond(label=label)) - 2 * far

    first = rng.normal(0, torch.arange(4), "first noise", (1, 8, 8))
    with torch.no_grad():
        x = samplers.sample(run.sample, strong.process, by_hand, first, lambda i: first)
    images = sample_images(folder, run)
    assert (
        images.int() - Normalizer(run.data, run.latent, strong.process.sigma_data, "cpu").x0_to_pixels(x).int()
    ).abs().max() <= 1
    unlike = sample_images(folder, load_run(folder, guidance=3, steps=4))
    assert (images.int() - unlike.int()).abs().max() > 10
    lines = sample_files.sample_to_folder(
        folder, run, sample_files.SampleArgs(label="3", seeds="0-1"), folder / f"drawn {sees}"
    )
    assert f"guided by self, which sees {sees}" in lines[-1]


def test_a_small_unconditional_network_guides(folders):
    folder = folders / "plain"
    run = load_run(folder, guide_run=folders / "unconditional", guidance=2)
    guide = sampling.load_guide(folder, run)
    assert guide.net.semantic is None and len(sample_images(folder, run)) == 4
    assert sampling.load_guide(folder, load_run(folder, guide_run=folders / "unconditional", guidance=1)) is None


def test_an_unconditional_network_is_guided_by_a_weaker_one(folders):
    folder = folders / "unconditional"
    run = load_run(folder, guide_run="self", guide_sigma_rel=0.1, guide_conditioning="all", guidance=3)
    plain = sample_images(folder, load_run(folder))
    assert (sample_images(folder, run).int() - plain.int()).abs().max() > 10


@pytest.mark.parametrize(
    "folder, sample, message",
    [
        ("plain", dict(guide_run="self"), "is the same network"),
        ("plain", dict(guide_run="self", guide_conditioning="all"), "is the same network"),
        ("plain", dict(guide_run="self", guide_sigma_rel=0.05), "is the same network"),
        ("plain", dict(guide_run="coarse"), "does not fit: data.mean"),
        ("plain", dict(guide_run="flow"), "process.name is rf in it and edm in this run"),
        ("plain", dict(guide_run="nowhere"), "holds no snapshots"),
        ("plain", dict(guide_run="unconditional", guide_nimg=5), "no snapshot up to image 5"),
        ("plain", dict(guide_run="always"), "was not trained without conditions: its dropout.both is 0"),
        ("plain", dict(guide_run="words"), "semantic.kind is text in it and label in this run"),
        (
            "plain",
            dict(guide_run="unconditional", guide_conditioning="all"),
            "semantic.kind is none in it and label in this run",
        ),
        ("sized", dict(guide_run="flipped"), "control.variables is ['flip', 'size'] in it and ['size'] in this run"),
        ("sized", dict(guide_run="always sized"), "its dropout.both is 0"),
        ("always sized", dict(guide_run="sized", keep_control=True), "its dropout.semantic is 0"),
        (
            "sized",
            dict(guide_run="coarse", guide_conditioning="all"),
            "control.variables is [] in it and ['size'] in this run",
        ),
    ],
)
def test_incompatible_guides(folders, folder, sample, message):
    if sample["guide_run"] != "self":
        sample = sample | {"guide_run": folders / sample["guide_run"]}
    run = load_run(folders / folder, **{"guidance": 2} | sample)
    with pytest.raises(UsageError) as refused:
        sampling.load_guide(folders / folder, run)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "folder, sample",
    [
        ("plain", dict(guide_run="always", guide_conditioning="all")),
        ("sized", dict(guide_run="coarse")),
        ("sized", dict(guide_run="always sized", keep_control="true")),
        ("coarse", dict(guide_run="sized")),
        ("words", dict(guide_run="plain")),
    ],
)
def test_compatible_guides(folders, folder, sample, tmp_path):
    place = folders / folder
    run = load_run(place, **sample | {"guide_run": folders / sample["guide_run"], "guidance": 2})
    phrase = "3" if run.semantic.kind == "label" else None
    args = sample_files.SampleArgs(label=phrase, seeds="0-1")
    assert "guided by" in sample_files.sample_to_folder(place, run, args, tmp_path / "out")[-1]
