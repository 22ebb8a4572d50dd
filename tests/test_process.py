"""Processes and samplers against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso import config
from gesso.cond import Cond
from gesso.diffusion import denoiser, guidance, process, sampler

PROCESSES = {"edm": process.EDM(config.EDM()), "vp": process.VP(config.VP())}
F64 = torch.float64


@pytest.fixture(params=list(PROCESSES))
def proc(request):
    return PROCESSES[request.param]


class Gaussian(torch.nn.Module):
    """The exact denoiser of x0 ~ N(mean, cov) per pixel channel: D = mean + cov (cov + s^2)^-1 (x - mean), alpha = 1."""

    def __init__(self, mean, cov):
        super().__init__()
        self.mean, self.cov = mean, cov
        self.calls = []

    def forward(self, x, s, cond=None):
        self.calls.append(len(x))
        s = torch.as_tensor(s, dtype=F64).expand(len(x))
        eye = torch.eye(len(self.mean), dtype=F64)
        gain = self.cov @ torch.linalg.inv(self.cov + s[:, None, None] ** 2 * eye)
        flat = x.flatten(1) - self.mean
        return (self.mean + torch.einsum("bij,bj->bi", gain, flat)).view_as(x)


def gaussian(sd=0.7):
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g, dtype=F64) * sd / 2
    return Gaussian(torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=F64), root @ root.T + 0.05 * torch.eye(4, dtype=F64))


def exact_flow(model, x, s_from, s_to):
    """Solution of dx/ds = (x - D)/s: in the eigenbasis x - mean scales by sqrt((l + s'^2)/(l + s^2))."""
    values, vectors = torch.linalg.eigh(model.cov)
    coordinates = (x.flatten(1) - model.mean) @ vectors
    coordinates = coordinates * ((values + s_to**2) / (values + s_from**2)).sqrt()
    return (model.mean + coordinates @ vectors.T).view_as(x)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
def test_samplers_converge_at_their_order(name, order):
    model = gaussian()
    x = torch.randn(8, 4, 1, 1, generator=torch.Generator().manual_seed(1), dtype=F64) * 10
    wanted = exact_flow(model, x, 10.0, 0.05)
    errors = []
    for steps in (40, 80, 160):
        levels = torch.logspace(1, math.log10(0.05), steps + 1, dtype=F64)
        levels[0], levels[-1] = 10.0, 0.05
        errors.append((sampler.SAMPLERS[name](model, x, levels, None) - wanted).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert slopes[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_samplers_reach_the_data(proc, name):
    """Mean and covariance of the data, from the process's own prior and levels."""
    model = gaussian()
    levels = proc.levels(200)
    z = torch.randn(20_000, 4, 1, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    z = z - z.mean(0)  # exact moments in, so that no sampling error hides a bias
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.flatten(1).T)), z.flatten(1).T, upper=False)
    x = sampler.SAMPLERS[name](model, proc.prior(z.T.reshape(-1, 4, 1, 1), levels[0]), levels, None).flatten(1)
    # The prior has mean 0 where the data at s0 have theirs: that leaves mean * sd / s0, 4e-3 for EDM (s0 = 80)
    # and 2e-2 for VP (14.6). Euler adds an error of order 1/steps.
    tolerance = 0.03 if name == "euler" or isinstance(proc, process.VP) else 5e-3
    torch.testing.assert_close(x.mean(0), model.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.cov(x.T), model.cov, rtol=0, atol=tolerance)


def test_euler_is_ddim_under_vp():
    """DDIM in its own coordinates x' = x / sqrt(1 + s^2) with eps-prediction (Song et al. Eq. 12)."""
    proc, model = PROCESSES["vp"], gaussian()
    levels = proc.levels(50)
    x = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(3), dtype=F64) * 15
    ours = sampler.euler(model, x, levels)
    abar = 1 / (1 + levels**2)
    theirs = x * abar[0].sqrt()
    for i in range(50):
        eps = (theirs / abar[i].sqrt() - model(theirs / abar[i].sqrt(), levels[i])) / levels[i]
        x0 = (theirs - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
        theirs = abar[i + 1].sqrt() * x0 + (1 - abar[i + 1]).sqrt() * eps
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_heun_counts_its_evaluations():
    model = gaussian()
    sampler.heun(model, torch.randn(2, 4, 1, 1, dtype=F64), PROCESSES["edm"].levels(32))
    assert len(model.calls) == 2 * 32 - 1  # EDM2's 63


@pytest.mark.parametrize("levels", [[1.0, 1.0, 0.0], [1.0, 2.0], [1.0], [1.0, -0.5]])
def test_levels_must_fall(levels):
    with pytest.raises(ValueError, match="must fall"):
        sampler.euler(gaussian(), torch.zeros(1, 4, 1, 1, dtype=F64), torch.tensor(levels, dtype=F64))


def test_native_loss_is_the_mse_of_the_networks_target(proc):
    """For any network output F, w |D - x0|^2 = |F - target|^2."""
    g = torch.Generator().manual_seed(4)
    s = proc.quantile(torch.rand(6, generator=g, dtype=F64))
    x0, eps, out = (torch.randn(6, 3, 4, 4, generator=g, dtype=F64) for _ in range(3))

    class Net(torch.nn.Module):
        def forward(self, x, c_noise, progress, cond):
            return out

    D = denoiser.Denoiser(Net(), proc, "fourier")
    ours = denoiser.loss(D, proc, x0, s, eps, Cond())
    c_skip, c_out, _ = (c[:, None, None, None] for c in proc.precondition(s))
    target = (x0 - c_skip * (x0 + s[:, None, None, None] * eps)) / c_out
    torch.testing.assert_close(ours, (out - target).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
    if isinstance(proc, process.VP):
        torch.testing.assert_close(target, eps, rtol=1e-9, atol=1e-9)  # eps-prediction
    uniform = denoiser.loss(D, proc, x0, s, eps, Cond(), "uniform")
    torch.testing.assert_close(uniform * proc.weight(s), ours)


def test_preconditioning_has_unit_variance(proc):
    """c_in x and, where the target is a mixture, EDM's target have standard deviation 1."""
    g = torch.Generator().manual_seed(5)
    x0 = proc.sd * torch.randn(200_000, generator=g, dtype=F64)
    eps = torch.randn(200_000, generator=g, dtype=F64)
    for s in (0.05, 0.5, 5.0):
        c_skip, c_out, c_in = proc.precondition(torch.tensor(s, dtype=F64))
        x = x0 + s * eps
        assert (c_in * x).std() == pytest.approx(1, abs=0.01)
        assert ((x0 - c_skip * x) / c_out).std() == pytest.approx(1, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(u=st.floats(1e-4, 1 - 1e-4), name=st.sampled_from(["edm", "vp"]))
def test_progress_is_the_cdf_of_the_training_draw(u, name):
    proc = PROCESSES[name]
    s = proc.quantile(torch.tensor([u], dtype=F64))
    # VP has 1000 levels: the CDF at a level is the share below it.
    assert float(proc.progress(s)) == pytest.approx(u, abs=1e-9 if name == "edm" else 1e-3 + 1e-9)


def test_edm_draw_is_log_normal():
    u = (torch.arange(10_000, dtype=F64) + 0.5) / 10_000
    log = PROCESSES["edm"].quantile(u).log()
    assert float(log.mean()) == pytest.approx(-0.4, abs=1e-3)
    assert float(log.std()) == pytest.approx(1.0, abs=1e-3)


def test_vp_table():
    """MATH: s runs from .029167 to 14.6146; abar of the quadratic betas .00085 to .012."""
    vp = PROCESSES["vp"]
    assert float(vp.table[0]) == pytest.approx(0.029167, abs=1e-6)
    assert float(vp.table[-1]) == pytest.approx(14.6146, abs=1e-4)
    index = torch.tensor([0.0, 1.0, 250.0, 999.0], dtype=F64)
    torch.testing.assert_close(vp.index(vp.table[index.long()]), index, rtol=0, atol=1e-9)
    between = (vp.table[10] * vp.table[11]).sqrt()
    assert float(vp.index(between)) == pytest.approx(10.5)
    assert vp.c_noise(vp.table[7:8], "sinusoidal").item() == pytest.approx(7)
    levels = vp.levels(1000)
    torch.testing.assert_close(levels[:-1], vp.table.flip(0))
    with pytest.raises(ValueError, match="1000 levels"):
        vp.levels(1001)


def test_edm_levels():
    levels = PROCESSES["edm"].levels(32)
    assert len(levels) == 33 and float(levels[0]) == pytest.approx(80) and float(levels[-2]) == pytest.approx(0.002)
    i, rho = 13, 7
    wanted = (80 ** (1 / rho) + i / 31 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    assert float(levels[13]) == pytest.approx(wanted)
    assert len(PROCESSES["edm"].levels(1)) == 2


class Labelled(torch.nn.Module):
    """D = label where it is given, -1 where it is withheld; counts rows."""

    rows = 0
    calls = 0

    def forward(self, x, s, cond):
        self.calls += 1
        self.rows += len(x)
        kept = torch.ones(len(x), dtype=torch.bool) if cond.has_semantic is None else cond.has_semantic
        value = torch.where(kept, cond.label.double(), -1.0)
        return value[:, None, None, None].expand_as(x)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-3, 8))
def test_guidance_is_the_weighted_sum_in_one_batch(scale):
    net, x = Labelled(), torch.zeros(3, 1, 2, 2, dtype=F64)
    cond = Cond(label=torch.tensor([0, 4, 7]))
    out = guidance.combine(guidance.cfg_terms(net, cond, scale))(x, torch.tensor(1.0))
    wanted = scale * cond.label.double() - (1 - scale)
    torch.testing.assert_close(out[:, 0, 0, 0], wanted, rtol=0, atol=1e-12)
    assert net.calls == 1
    assert net.rows == (3 if scale in (0.0, 1.0) else 6)


def test_guidance_one_costs_one_network():
    net, x = Labelled(), torch.zeros(3, 1, 2, 2, dtype=F64)
    guidance.combine(guidance.cfg_terms(net, Cond(label=torch.tensor([0, 4, 7])), 1.0))(x, torch.tensor(1.0))
    assert net.rows == 3


def test_weights_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        guidance.combine([guidance.Term(0.7, Labelled(), Cond())])


def test_uncertainty_learns_the_log_of_the_loss(proc):
    """u(s) converges to ln of the weighted loss at each level (EDM2 Eq. 26), on a Gaussian's exact denoiser."""
    torch.manual_seed(0)
    u = denoiser.Uncertainty(proc).double()
    from gesso.nets import mp

    sphere = mp.sphere_weights(u)
    mp.put_on_sphere(sphere)
    # One weight of 128 on a sphere cannot hold any scale: u ranges within sqrt(128) * rms of features.
    optimizer = torch.optim.Adam(u.parameters(), lr=0.02, betas=(0.9, 0.99))
    g = torch.Generator().manual_seed(1)
    wanted = lambda s: 1 + 0.5 * torch.sin(proc.c_noise(s, "fourier") * 4)  # noqa: E731
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 1500)
        s = proc.quantile(torch.rand(256, generator=g, dtype=F64))
        value = u(s)
        (wanted(s) / value.exp() + value).mean().backward()
        mp.project_gradients(sphere)
        optimizer.step()
        optimizer.zero_grad()
        mp.put_on_sphere(sphere)
    s = proc.quantile(torch.linspace(0.05, 0.95, 50, dtype=F64))
    assert (u(s) - wanted(s).log()).abs().max() < 0.1
