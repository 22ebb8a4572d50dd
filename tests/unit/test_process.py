"""Processes, preconditioning and loss weightings against closed forms and diffusers' training formulas."""

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso import config
from gesso.conditioning import Cond
from gesso.diffusion import denoiser, guidance, process
from gesso.errors import UsageError
from gesso.models import mp

F64 = torch.float64
PROCESSES = {
    "edm": process.build_process(config.EDMConfig()),
    "vp": process.build_process(config.VPConfig()),
    "vp-v": process.build_process(config.VPConfig(prediction="v")),
    "vp-v-zero": process.build_process(config.VPConfig(prediction="v", zero_terminal_snr=True)),
    "rf": process.build_process(config.RFConfig()),
}
PROCESS_NAMES = sorted(PROCESSES)


@pytest.fixture(params=PROCESS_NAMES)
def proc(request):
    return PROCESSES[request.param]


def columns(values):
    return values[:, None, None, None]


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def perfect_prediction(proc, x0, eps, s):
    """Return the network's target from the papers, without c_skip and c_out."""
    if isinstance(proc, process.EDM):  # EDM Eq. 8 with x = x0 + s eps written out
        return (s * x0 - proc.sigma_data**2 * eps) / (proc.sigma_data * (s**2 + proc.sigma_data**2).sqrt())
    if isinstance(proc, process.VP):
        return eps
    if isinstance(proc, process.VPv):  # v = sqrt(abar) eps - sqrt(1-abar) x0 (Salimans and Ho 2022)
        sigma = s / (1 - s)
        abar = 1 / (1 + sigma**2)
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return eps - x0


class ConstantNet(torch.nn.Module):
    """A network whose output is given; it stores its inputs."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x, c_noise, progress, cond):
        self.inputs = x, c_noise, progress
        return self.out


def test_perfect_networks_return_the_image(proc):
    s = proc.icdf(torch.linspace(0.001, 0.999, 64, dtype=F64))
    x0, eps = normals(0, 64, 3, 4, 4), normals(1, 64, 3, 4, 4)
    D = denoiser.Denoiser(ConstantNet(perfect_prediction(proc, x0, eps, columns(s))), proc, "fourier")
    x = proc.alpha(columns(s)) * x0 + columns(s) * eps
    torch.testing.assert_close(D(x, s, Cond()), x0, rtol=1e-10, atol=1e-10)


def test_native_loss_is_the_mse_of_the_network_target(proc):
    """w |D - x0|^2 = |F - target|^2 holds for any network output F."""
    s = proc.icdf(torch.rand(6, generator=torch.Generator().manual_seed(4), dtype=F64))
    x0, eps, out = normals(5, 3, 6, 3, 4, 4)
    D = denoiser.Denoiser(ConstantNet(out), proc, "fourier")
    actual = denoiser.loss(D, proc, x0, s, eps, Cond())
    target = perfect_prediction(proc, x0, eps, columns(s))
    torch.testing.assert_close(actual, (out - target).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
    uniform = denoiser.loss(D, proc, x0, s, eps, Cond(), "uniform")
    torch.testing.assert_close(uniform * proc.weight(s), actual)
    snr = (proc.alpha(s) * proc.sigma_data / s) ** 2
    min_snr = denoiser.loss(D, proc, x0, s, eps, Cond(), "min-snr")
    torch.testing.assert_close(min_snr, uniform * torch.minimum(snr, torch.full_like(snr, 5.0)))


@pytest.mark.parametrize("name", ["vp-v-zero", "rf"])
def test_min_snr_is_zero_where_there_is_no_signal(name):
    proc, (x0, eps, out) = PROCESSES[name], normals(5, 3, 1, 3, 4, 4)
    D = denoiser.Denoiser(ConstantNet(out), proc, "fourier")
    max_level = torch.ones(1, dtype=F64)
    assert denoiser.loss(D, proc, x0, max_level, eps, Cond(), "min-snr").item() == 0
    assert denoiser.loss(D, proc, x0, max_level, eps, Cond()).isfinite().all()


def test_preconditioning_has_unit_variance(proc):
    """c_in x and the target have standard deviation 1; RF's, by choice, sqrt((1-s)^2 + s^2) and sqrt(2)."""
    x0, eps = proc.sigma_data * normals(5, 200_000), normals(6, 200_000)
    for s in proc.icdf(torch.tensor([0.05, 0.5, 0.95], dtype=F64)):
        c_skip, c_out, c_in = proc.precondition(s)
        x = proc.alpha(s) * x0 + s * eps
        rf = isinstance(proc, process.RF)
        expected = math.hypot(1 - s, s), math.sqrt(2)
        assert (c_in * x).std() == pytest.approx(expected[0] if rf else 1, abs=0.01)
        assert ((x0 - c_skip * x) / c_out).std() == pytest.approx(expected[1] if rf else 1, abs=0.01)


def process_named(name, scale=1.0, m=0.0, std=1.0):
    images = {
        "edm": lambda: config.EDMConfig(resolution_scale=scale, P_mean=m, P_std=std),
        "vp": lambda: config.VPConfig(resolution_scale=scale),
        "vp-v": lambda: config.VPConfig(prediction="v", resolution_scale=scale),
        "vp-v-zero": lambda: config.VPConfig(prediction="v", zero_terminal_snr=True, resolution_scale=scale),
        "rf": lambda: config.RFConfig(resolution_scale=scale, logit_mean=m, logit_std=std),
    }
    return process.build_process(images[name]())


@settings(max_examples=150, deadline=None)
@given(
    u=st.floats(1e-4, 1 - 1e-4),
    name=st.sampled_from(PROCESS_NAMES),
    scale=st.floats(0.25, 8),
    m=st.floats(-2, 2),
    std=st.floats(0.3, 2),
)
def test_progress_is_the_cdf_of_the_training_draw(u, name, scale, m, std):
    proc = process_named(name, scale, m, std)
    s = proc.icdf(torch.tensor([u], dtype=F64))
    # VP has 1000 levels: the CDF at a level is the share below it.
    assert float(proc.progress(s)) == pytest.approx(u, abs=1e-3 + 1e-9 if "vp" in name else 1e-9)


@settings(max_examples=100, deadline=None)
@given(u=st.floats(1e-3, 1 - 1e-3), name=st.sampled_from(PROCESS_NAMES), scale=st.floats(0.25, 8))
def test_resolution_scale_multiplies_sigma_and_keeps_c_noise(u, name, scale):
    """sigma = s/alpha of training levels, both ends and `scale_sigma` is k times as high; only RF changes c_noise."""
    base, proc, u = process_named(name), process_named(name, scale), torch.tensor([u], dtype=F64)
    s, s_k = base.icdf(u), proc.icdf(u)
    if s_k < 1 or "v" not in name:  # sigma of zero terminal SNR is infinite
        torch.testing.assert_close(s_k / proc.alpha(s_k), scale * s / base.alpha(s), rtol=1e-9, atol=0)
    torch.testing.assert_close(base.scale_sigma(s, scale), s_k, rtol=1e-12, atol=0)
    for end in ("min_level", "max_level"):
        expected = base.scale_sigma(torch.tensor(getattr(base, end), dtype=F64), scale)
        assert getattr(proc, end) == pytest.approx(float(expected), rel=1e-12)
    assert float(proc.progress(s_k)) == pytest.approx(float(base.progress(s)), abs=1e-9)
    for embedding in ("sinusoidal", "fourier"):
        conditions, c_noise_k = base.c_noise(s, embedding), proc.c_noise(s_k, embedding)
        if name == "rf":
            conditions = base.c_noise(base.scale_sigma(s, scale), embedding)
        torch.testing.assert_close(c_noise_k, conditions, rtol=1e-9, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(s=st.floats(0, 1), k=st.floats(0.1, 10))
def test_rf_shift_equals_sd3(s, k):
    actual = PROCESSES["rf"].scale_sigma(torch.tensor(s, dtype=F64), k)
    assert float(actual) == pytest.approx(k * s / (1 + (k - 1) * s), rel=1e-12, abs=1e-300)
    assert float(PROCESSES["rf"].scale_sigma(torch.tensor(1.0, dtype=F64), k)) == 1


def test_draws_are_log_and_logit_normal():
    u = (torch.arange(10_000, dtype=F64) + 0.5) / 10_000
    log = PROCESSES["edm"].icdf(u).log()
    assert float(log.mean()) == pytest.approx(-0.4, abs=1e-3) and float(log.std()) == pytest.approx(1.0, abs=1e-3)
    logit = process.build_process(config.RFConfig(logit_mean=0.3, logit_std=0.7)).icdf(u).logit()
    assert float(logit.mean()) == pytest.approx(0.3, abs=1e-3) and float(logit.std()) == pytest.approx(0.7, abs=1e-3)


def test_rf_c_noise_is_the_shifted_level():
    rf = PROCESSES["rf"]
    s = torch.tensor([0.0, 1e-9, 0.2, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(rf.c_noise(s, "sinusoidal"), 1000 * s)
    expected = torch.tensor([-3, -3, math.log(0.25) / 4, 0, 3], dtype=F64)
    torch.testing.assert_close(rf.c_noise(s, "fourier"), expected)


def test_initial_state_has_the_std_of_the_first_level():
    """It is sqrt(alpha^2 + s^2) for data of standard deviation 1, s for EDM, 1 where no signal is left."""
    z = normals(7, 2, 1, 4, 4)
    for name, s, expected in [
        ("edm", 80.0, 80.0),
        ("vp", 14.6, math.hypot(1, 14.6)),
        ("vp-v", 0.9, math.hypot(0.1, 0.9)),
        ("rf", 1.0, 1.0),
        ("vp-v-zero", 1.0, 1.0),
    ]:
        torch.testing.assert_close(PROCESSES[name].initial_state(z, torch.tensor(s, dtype=F64)), expected * z)


def test_vp_level_table():
    """MATH: s runs from .029167 to 14.6146; abar of the quadratic betas .00085 to .012."""
    vp = PROCESSES["vp"]
    assert float(vp.level_table[0]) == pytest.approx(0.029167, abs=1e-6)
    assert float(vp.level_table[-1]) == pytest.approx(14.6146, abs=1e-4)
    assert (vp.min_level, vp.max_level) == (float(vp.level_table[0]), float(vp.level_table[-1]))
    between = (vp.level_table[10] * vp.level_table[11]).sqrt()
    assert float(vp.timestep(between)) == pytest.approx(10.5)
    torch.testing.assert_close(PROCESSES["vp-v"].level_table, vp.level_table / (1 + vp.level_table), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["vp", "vp-v", "vp-v-zero"])
def test_timestep_inverts_the_level_table(name):
    proc, index = PROCESSES[name], torch.arange(1000, dtype=F64)
    torch.testing.assert_close(proc.timestep(proc.level_table), index, rtol=0, atol=1e-7)
    torch.testing.assert_close(proc.c_noise(proc.level_table, "sinusoidal"), proc.timestep(proc.level_table))
    assert (proc.timestep(proc.level_table.float()) - index).abs().max() < 0.01  # training draws are cast to fp32
    between = proc.timestep(torch.linspace(proc.min_level, proc.max_level, 20_000, dtype=F64))
    assert (between.diff() > 0).all() and between[0] == 0 and between[-1] == 999
    sigma, v = PROCESSES["vp"].level_table[300] * 1.01, PROCESSES["vp-v"]
    assert float(v.timestep(sigma / (1 + sigma))) == pytest.approx(float(PROCESSES["vp"].timestep(sigma)))


def alpha_bar(proc):
    s = proc.level_table
    return proc.alpha(s) ** 2 / (proc.alpha(s) ** 2 + s**2)


@settings(max_examples=30, deadline=None)
@given(s=st.floats(0.25, 4), ratio=st.floats(0.25, 8), name=st.sampled_from(["vp", "vp-v", "vp-v-zero"]))
def test_scaled_betas_follow_proposition_1(s, ratio, name):
    """Berrada et al. Eq. 3 from scale s to s', and Eq. 22, to 1e-12."""
    s_new = s * ratio
    old, new = process_named(name, s), process_named(name, s_new)
    abar, abar_new = (torch.cumprod(1 - process.betas(p), 0) for p in (old, new))
    eq3 = s**2 * abar / (s_new**2 + abar * (s**2 - s_new**2))
    torch.testing.assert_close(abar_new, eq3, rtol=0, atol=1e-12)
    signal = abar[:-1] if name == "vp-v-zero" else abar
    n = len(signal)
    odds, odds_new = (1 - signal) / signal, (1 - abar_new[:n]) / abar_new[:n]
    torch.testing.assert_close(odds / odds_new, torch.full_like(odds, (s / s_new) ** 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(alpha_bar(new), abar_new, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "vp-v", "vp-v-zero"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_diffusers_accepts_exported_betas(name, scale):
    """The sigma table of DDIMScheduler(trained_betas=ours); it computes in float32, which the tolerance allows for."""
    proc = process_named(name, scale)
    expected = diffusers.DDIMScheduler(trained_betas=process.betas(proc).tolist()).alphas_cumprod.double()
    torch.testing.assert_close(expected, alpha_bar(proc), rtol=1e-4, atol=1e-9)
    sigma = ((1 - expected) / expected).sqrt()[:-1]
    torch.testing.assert_close(sigma, (proc.level_table / proc.alpha(proc.level_table))[:-1], rtol=2e-4, atol=0)
    if scale == 1:
        published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        peer = diffusers.DDIMScheduler(**published, rescale_betas_zero_snr=name == "vp-v-zero")
        torch.testing.assert_close(peer.alphas_cumprod.double(), alpha_bar(proc), rtol=1e-4, atol=1e-7)


def test_zero_terminal_snr():
    """Lin et al. 2024, Algorithm 1: the last signal 0, the first unchanged, the shape preserved."""
    plain, zero = (alpha_bar(PROCESSES[name]).sqrt() for name in ("vp-v", "vp-v-zero"))
    assert zero[-1] == 0 and float(zero[0]) == pytest.approx(float(plain[0]), rel=1e-12)
    torch.testing.assert_close(zero / zero[0], (plain - plain[-1]) / (plain[0] - plain[-1]), rtol=0, atol=1e-12)
    assert PROCESSES["vp-v-zero"].max_level == 1
    with pytest.raises(UsageError, match=r"leaves no signal at the last level.*process.prediction=v"):
        config.validate({"net": {"name": "dit"}, "process": {"name": "vp", "zero_terminal_snr": True}})


@pytest.mark.parametrize("name", ["vp", "vp-v", "vp-v-zero"])
def test_training_agrees_with_diffusers_ddim(name):
    """add_noise is the network's input, get_velocity its target under v-prediction."""
    proc, index = PROCESSES[name], torch.tensor([0, 1, 17, 500, 998, 999])
    scheduler = diffusers.DDIMScheduler()
    scheduler.alphas_cumprod = alpha_bar(proc)  # their float32 table was compared above
    x0, eps = normals(8, 2, 6, 3, 4, 4)
    s = proc.level_table[index]
    D = denoiser.Denoiser(ConstantNet(torch.zeros_like(x0)), proc, "sinusoidal")
    native = denoiser.loss(D, proc, x0, s, eps, Cond())
    torch.testing.assert_close(D.net.inputs[0], scheduler.add_noise(x0, eps, index), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(D.net.inputs[1], index.double(), rtol=0, atol=1e-7)
    target = eps if name == "vp" else scheduler.get_velocity(x0, eps, index)
    torch.testing.assert_close(native, target.square().mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_training_agrees_with_diffusers_flow_matching():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = torch.tensor([0, 1, 300, 998, 999])
    x0, eps = normals(9, 2, 5, 3, 4, 4)
    rf = PROCESSES["rf"]
    s = rf.scale_sigma((1000 - index.double()) / 1000, 3.0)
    torch.testing.assert_close(s, scheduler.sigmas[index].double(), rtol=1e-6, atol=0)
    D = denoiser.Denoiser(ConstantNet(torch.zeros_like(x0)), rf, "sinusoidal")
    native = denoiser.loss(D, rf, x0, s, eps, Cond())
    expected = scheduler.scale_noise(x0, scheduler.timesteps[index], eps)
    torch.testing.assert_close(D.net.inputs[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(D.net.inputs[1], scheduler.timesteps[index].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(native, (eps - x0).square().mean((1, 2, 3)), rtol=1e-9, atol=0)


class Linear(torch.nn.Module):
    """Float32 network that records the dtypes of its inputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Conv2d(2, 2, 1), set()

    def forward(self, x, c_noise, progress, cond):
        self.seen |= {x.dtype, c_noise.dtype, progress.dtype}
        return self.layer(x)


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_computes_in_its_parameter_dtype(proc, net_dtype, dtype):
    net = Linear().to(net_dtype)
    s = proc.icdf(torch.tensor(0.4, dtype=F64))
    with torch.no_grad():
        D = denoiser.Denoiser(net, proc, "fourier")(torch.ones(3, 2, 4, 4, dtype=dtype), s, Cond())
    assert D.dtype == dtype and net.seen == {net_dtype}


class CountingDenoiser(torch.nn.Module):
    """D = label, -1 where it is withheld; counts samples and calls."""

    num_samples = 0
    num_calls = 0

    def forward(self, x, s, cond):
        self.num_calls += 1
        self.num_samples += len(x)
        has_label = torch.ones(len(x), dtype=torch.bool) if cond.has_semantic is None else cond.has_semantic
        value = torch.where(has_label, cond.label.double(), -1.0)
        return value[:, None, None, None].expand_as(x)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-3, 8))
def test_guidance_is_the_weighted_sum_in_one_batch(scale):
    net, x = CountingDenoiser(), torch.zeros(3, 1, 2, 2, dtype=F64)
    cond = Cond(label=torch.tensor([0, 4, 7]))
    out = guidance.combine_terms(guidance.guidance_terms(net, cond, scale))(x, torch.tensor(1.0))
    expected = scale * cond.label.double() - (1 - scale)
    torch.testing.assert_close(out[:, 0, 0, 0], expected, rtol=0, atol=1e-12)
    assert net.num_calls == 1
    assert net.num_samples == (3 if scale in (0.0, 1.0) else 6)


def test_guidance_one_needs_one_evaluation():
    net, x = CountingDenoiser(), torch.zeros(3, 1, 2, 2, dtype=F64)
    guidance.combine_terms(guidance.guidance_terms(net, Cond(label=torch.tensor([0, 4, 7])), 1.0))(x, torch.tensor(1.0))
    assert net.num_samples == 3


def test_weights_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        guidance.combine_terms([guidance.GuidanceTerm(0.7, CountingDenoiser(), Cond(), 0.7)])


class PosteriorDenoiser(torch.nn.Module):
    """The exact denoiser of x0 ~ N(0, d^2): its squared error is d^2 s^2 / (alpha^2 d^2 + s^2)."""

    def __init__(self, proc, d):
        super().__init__()
        self.proc, self.d = proc, d

    def forward(self, x, s, cond, keep_ids=None):
        a, s = self.proc.alpha(columns(s)), columns(s)
        return a * self.d**2 / (a**2 * self.d**2 + s**2) * x

    def error(self, s):
        return self.d**2 * s**2 / (self.proc.alpha(s) ** 2 * self.d**2 + s**2)


@pytest.mark.parametrize("name", ["edm", "vp", "vp-v", "rf"])
def test_uncertainty_learns_the_log_of_the_loss(name):
    """u(s) converges to ln of the weighted loss at each level (EDM2 Eq. 26), on a Gaussian's exact denoiser."""
    proc = PROCESSES[name]
    exact = PosteriorDenoiser(proc, 0.6 * proc.sigma_data)
    torch.manual_seed(0)
    u = denoiser.Uncertainty(proc).double()
    sphere = mp.sphere_weights(u)
    mp.normalize_weights_(sphere)
    optimizer = torch.optim.Adam(u.parameters(), lr=0.05, betas=(0.9, 0.99))
    g = torch.Generator().manual_seed(1)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 1500)
        s = proc.icdf(torch.rand(256, generator=g, dtype=F64))
        x0, eps = (torch.randn(256, 1, 4, 4, generator=g, dtype=F64) for _ in range(2))
        denoiser.loss(exact, proc, exact.d * x0, s, eps, Cond(), "uncertainty", u).mean().backward()
        mp.project_gradients(sphere)
        optimizer.step()
        optimizer.zero_grad()
        mp.normalize_weights_(sphere)
    s = proc.icdf(torch.linspace(0.05, 0.95, 50, dtype=F64))
    with torch.no_grad():
        expected = (proc.weight(s) * exact.error(s)).log()
        assert (u(s) - expected).abs().max() < 0.05 < 0.1 * (expected.max() - expected.min())
