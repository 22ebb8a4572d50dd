"""Samplers and schedules against closed forms and diffusers' schedulers."""

import math

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso import config, models, recipes, sampling
from gesso.conditioning import Cond
from gesso.diffusion import denoiser, process, samplers, schedules
from gesso.errors import UsageError

F64 = torch.float64
PROCESSES = {
    "edm": process.build_process(config.EDMConfig()),
    "edm x2": process.build_process(config.EDMConfig(resolution_scale=2)),
    "vp": process.build_process(config.VPConfig()),
    "vp x2": process.build_process(config.VPConfig(resolution_scale=2)),
    "vp-v": process.build_process(config.VPConfig(prediction="v")),
    "vp-v-zero": process.build_process(config.VPConfig(prediction="v", zero_terminal_snr=True)),
    "rf": process.build_process(config.RFConfig()),
    "rf x2": process.build_process(config.RFConfig(resolution_scale=2)),
}
EDM, VP, VPV, ZERO, RF = (PROCESSES[name] for name in ("edm", "vp", "vp-v", "vp-v-zero", "rf"))
SAMPLERS = ("euler", "heun", "dpm++2m")


def as_float64(x):
    return torch.as_tensor(x, dtype=F64)


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def no_noise(i):
    raise AssertionError("nothing random was asked for")


def run_sampler(name, denoise, x, levels, alpha, callback=None):
    function = {"euler": samplers.euler, "heun": samplers.heun, "dpm++2m": samplers.dpmpp_2m}[name]
    return function(denoise, x, levels, alpha, callback=callback)


class GaussianMixtureDenoiser:
    """Exact denoiser of x0 ~ sum_k w_k N(mean_k, cov_k) in n dimensions under x = alpha x0 + s eps."""

    def __init__(self, alpha, weights, means, covs):
        self.alpha, self.weights, self.means, self.covs, self.calls = alpha, weights, means, covs, 0

    def __call__(self, x, s):
        self.calls += 1
        a, s, flat = self.alpha(as_float64(s)), as_float64(s), x.flatten(1)
        total, parts = [], []
        for w, mean, cov in zip(self.weights, self.means, self.covs, strict=True):
            noisy_cov = a**2 * cov + s**2 * torch.eye(len(mean), dtype=F64)
            away = flat - a * mean
            solved = torch.linalg.solve(noisy_cov, away.T).T
            total.append(math.log(w) - 0.5 * (away * solved).sum(1) - 0.5 * torch.logdet(noisy_cov))
            parts.append(mean + a * solved @ cov)
        share = torch.stack(total).softmax(0)[:, :, None]
        return (share * torch.stack(parts)).sum(0).view_as(x)

    def moments(self):
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        square = sum(w * (c + torch.outer(m, m)) for w, m, c in zip(self.weights, self.means, self.covs, strict=True))
        return mean, square - torch.outer(mean, mean)

    def cdf(self, x, s):
        """Return the distribution function at level s, in one dimension."""
        a, s = self.alpha(as_float64(s)), as_float64(s)
        return sum(
            w * torch.special.ndtr((x - a * m[0]) / (a**2 * c[0, 0] + s**2).sqrt())
            for w, m, c in zip(self.weights, self.means, self.covs, strict=True)
        )

    def flow(self, x, s, s_next):
        """Return the exact flow in one dimension, which preserves quantiles, F_s'(x') = F_s(x); by bisection."""
        expected, low, high = self.cdf(x, s), torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, s_next) < expected
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def gaussian(alpha, sd=0.7):
    root = normals(0, 4, 4) * sd / 2
    return GaussianMixtureDenoiser(
        alpha, [1.0], [as_float64([0.3, -0.2, 0.1, 0.5])], [root @ root.T + 0.05 * torch.eye(4, dtype=F64)]
    )


def flow_of_gaussian(model, x, s, s_next):
    """x - alpha mean scales by sqrt((alpha'^2 l + s'^2)/(alpha^2 l + s^2)) along each eigenvector of the covariance."""
    a, a_next = model.alpha(as_float64(s)), model.alpha(as_float64(s_next))
    values, vectors = torch.linalg.eigh(model.covs[0])
    along = (x.flatten(1) - a * model.means[0]) @ vectors
    along = along * ((a_next**2 * values + s_next**2) / (a**2 * values + s**2)).sqrt()
    return (a_next * model.means[0] + along @ vectors.T).view_as(x)


def two_peaks(alpha, dimensions=1):
    unit = torch.ones(dimensions, dtype=F64)
    eye = torch.eye(dimensions, dtype=F64)
    return GaussianMixtureDenoiser(alpha, [0.3, 0.7], [-0.8 * unit, 0.6 * unit], [0.04 * eye, 0.16 * eye])


def log_spaced_levels(proc, high, low, steps):
    """Return levels uniform in ln sigma from one interior level to another."""
    factor = (low / proc.alpha(as_float64(low))) / (high / proc.alpha(as_float64(high)))
    return torch.stack([proc.scale_sigma(as_float64(high), float(factor ** (i / steps))) for i in range(steps + 1)])


# --- orders ---


def convergence_orders(errors):
    return [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]


@pytest.mark.parametrize("proc, high, low", [(EDM, 80, 0.002), (VP, 14.6, 0.03), (VPV, 0.93, 0.03), (RF, 0.98, 0.02)])
@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpm++2m", 2)])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_orders_between_interior_levels(proc, high, low, name, order, data):
    """Halving the step divides the error against the exact flow by 2^order."""
    spread = math.hypot(float(proc.alpha(as_float64(high))), high)
    if data == "gaussian":
        model, x = gaussian(proc.alpha), spread * normals(1, 8, 4, 1, 1)
        expected = flow_of_gaussian(model, x, high, low)
    else:
        model, x = two_peaks(proc.alpha), spread * torch.linspace(-1.5, 1.5, 12, dtype=F64).view(-1, 1, 1, 1)
        expected = model.flow(x, high, low)
    errors = []
    for steps in (160, 320, 640):
        levels = log_spaced_levels(proc, high, low, steps)
        errors.append((run_sampler(name, model, x, levels, proc.alpha) - expected).abs().max().item())
    assert convergence_orders(errors)[-1] == pytest.approx(order, abs=0.1), errors


@pytest.mark.parametrize("proc", [RF, ZERO], ids=["rf", "vp-v-zero"])
@pytest.mark.parametrize("name, minimum", [("euler", 0.98), ("heun", 1.95), ("dpm++2m", 1.65)])
def test_orders_at_the_end_points(proc, name, minimum):
    """ln(alpha/s) is infinite from s = 1 to 0: DPM++(2M) has less than order 2, and no value diverges."""
    model, x = gaussian(proc.alpha), normals(1, 8, 4, 1, 1)
    expected = flow_of_gaussian(model, x, 1.0, 0.0)
    errors = []
    for steps in (160, 320, 640):
        levels = torch.linspace(1, 0, steps + 1, dtype=F64)
        errors.append((run_sampler(name, model, x, levels, proc.alpha) - expected).abs().max().item())
    assert min(convergence_orders(errors)) > minimum, errors
    assert errors[-1] < 5e-3


@pytest.mark.parametrize("proc", [VP, VPV], ids=["vp", "vp-v"])
def test_dpmpp_2m_matches_algorithm_2(proc):
    """Lu et al. 2022, Algorithm 2, as published: in DDPM's coordinates, with r = h_old/h and e^-h; on uneven steps.

    The order would not tell a wrong r: its errors cancel from step to step.
    """
    index = torch.tensor([999, 998, 700, 650, 640, 300, 299, 40, 0])
    levels = proc.level_table[index]
    a = 1 / (1 + VP.level_table[index] ** 2).sqrt()
    b = VP.level_table[index] * a
    model, exact, outputs = two_peaks(proc.alpha), two_peaks(VP.alpha), []
    x = normals(15, 6, 1, 1, 1)
    size = (proc.alpha(levels) ** 2 + levels**2).sqrt()  # x over this is DDPM's
    samplers.dpmpp_2m(model, size[0] * x, levels, proc.alpha, callback=lambda i, x, D: outputs.append(x))
    lam, D_old = (a / b).log(), None
    for i in range(len(index) - 1):
        h = lam[i + 1] - lam[i]
        D = exact(x / a[i], b[i] / a[i])
        r = None if i == 0 else (lam[i] - lam[i - 1]) / h
        mixed = D if i == 0 else (1 + 1 / (2 * r)) * D - 1 / (2 * r) * D_old
        x, D_old = b[i + 1] / b[i] * x - a[i + 1] * ((-h).exp() - 1) * mixed, D
        torch.testing.assert_close(outputs[i] / size[i + 1], x, rtol=1e-9, atol=1e-9)


def test_dpmpp_2m_first_order_steps():
    """The first step, the second from a level without signal, and the step to 0 are Euler's."""
    for levels, euler_steps in [([0.9, 0.5, 0.3, 0.0], {0, 2}), ([1.0, 0.5, 0.3, 0.1, 0.0], {0, 1, 3})]:
        model, x = two_peaks(RF.alpha), normals(2, 5, 1, 1, 1)
        states = [x]
        samplers.dpmpp_2m(
            model, x, as_float64(levels), RF.alpha, callback=lambda i, x, D, states=states: states.append(x)
        )
        equal = {
            i
            for i, (s, s_next) in enumerate(zip(levels[:-1], levels[1:], strict=True))
            if torch.allclose(
                states[i + 1], samplers.euler(model, states[i], as_float64([s, s_next]), RF.alpha), rtol=0, atol=1e-12
            )
        }
        assert equal == euler_steps


# --- the data's distribution ---


def exact_moments(cfg, proc, model):
    """Return mean and covariance of a sampler's output, without sampling.

    Under a Gaussian's denoiser every sampler is affine in the first noise and in that of its steps: the rows
    of one batch are the constant and the response to each unit of noise.
    """
    rows = 1 + 4 * (cfg.steps + 1)
    basis = torch.eye(rows, dtype=F64)[:, 1:].view(rows, cfg.steps + 1, 4, 1, 1)
    out = samplers.sample(cfg, proc, model, basis[:, 0], lambda i: basis[:, i + 1]).flatten(1)
    each = out[1:] - out[0]
    return out[0], each.T @ each


@pytest.mark.parametrize("proc", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name, steps, bias", [("euler", 1000, 8e-3), ("heun", 400, 1e-3), ("dpm++2m", 400, 2e-3)])
def test_samplers_reach_the_data_distribution(proc, name, steps, bias):
    """Mean and covariance of Gaussian data are exact for the prior and levels of each process."""
    model, high = gaussian(proc.alpha), schedules.levels(proc, 1)[0]
    mean_estimate = exact_moments(config.SampleConfig(sampler=name, steps=steps), proc, model)
    # Where the first level leaves signal, the prior is not the marginal: the mean is off by up to
    # mean sqrt(l)/sigma in an eigendirection of variance l, and all is at most half that of sigma itself here.
    bias += 0.5 * float(proc.alpha(high) / high)
    for actual, expected in zip(mean_estimate, model.moments(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=bias)


every_process = pytest.mark.parametrize("proc", [EDM, VP, VPV, ZERO, RF], ids=["edm", "vp", "vp-v", "vp-v-zero", "rf"])


@every_process
@pytest.mark.parametrize(
    "options",
    [{"sampler": "euler", "eta": 0.5}, {"sampler": "euler", "eta": 1.0}, {"sampler": "heun", "S_churn": 40.0}],
    ids=["eta .5", "eta 1", "churn"],
)
def test_step_noise_keeps_the_data_distribution(proc, options):
    """The error of mean and covariance of trajectories halves with the step, towards zero.

    VP's prior and its last step, from .029 to 0, leave .0033 without any noise in the steps.
    """
    model, errors, covs = gaussian(proc.alpha), [], []
    mean, cov = model.moments()
    for steps in (200, 400):
        mean_estimate, cov_estimate = exact_moments(config.SampleConfig(steps=steps, **options), proc, model)
        covs.append(cov_estimate)
        errors.append((cov_estimate - cov).abs().max())
    assert errors[1] < 0.6 * errors[0]
    torch.testing.assert_close(2 * covs[1] - covs[0], cov, rtol=0, atol=5e-3)
    torch.testing.assert_close(mean_estimate, mean, rtol=0, atol=8e-3)


@every_process
@pytest.mark.parametrize(
    "options",
    [{"sampler": n} for n in SAMPLERS] + [{"sampler": "euler", "eta": 1.0}, {"sampler": "heun", "S_churn": 40.0}],
    ids=str,
)
def test_samplers_reach_a_mixture(proc, options):
    """Quantiles of two peaks: the distribution function of the samples, at 20,000 of them."""
    n, model = 20_000, two_peaks(proc.alpha)
    cfg = config.SampleConfig(steps=100, **options)
    first = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n).view(-1, 1, 1, 1)
    x = samplers.sample(cfg, proc, model, first, lambda i: normals(100 + i, n, 1, 1, 1)).flatten().sort().values
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    away = (model.cdf(x, 0.0) - u).abs().max()
    # Kolmogorov's distance of n independent samples is below 1.95/sqrt(n) = .0138 in 99.9 % of cases; finite
    # steps add up to .0094 (Euler at eta = 0, where the samples are quantiles and no chance enters).
    assert away < (1.95 / math.sqrt(n) if "eta" in options or "S_churn" in options else 0) + 0.01


def assert_moments(x, mean, cov):
    """Within 5 standard errors: of the mean sqrt(c_ii/n), of a covariance sqrt((c_ii c_jj + c_ij^2)/n)."""
    n, variance = len(x), cov.diagonal()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    error = ((torch.outer(variance, variance) + cov**2) / n).sqrt()
    assert ((torch.cov(x.T) - cov).abs() < 5 * error).all()


@every_process
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_churn_keeps_the_marginal(proc, share):
    """A state at s, churned, is one at s^: alpha^ mean, alpha^2 C + s^^2, and sigma^ = (1 + gamma) sigma or the cap."""
    n, model = 100_000, gaussian(proc.alpha)
    s = proc.icdf(as_float64([share]))[0] if proc is not EDM else as_float64(80 * share)
    root = torch.linalg.cholesky(model.covs[0])
    x = proc.alpha(s) * (model.means[0] + normals(4, n, 4) @ root.T) + s * normals(5, n, 4)
    cap = samplers.max_churn_level(proc, None)
    churn = samplers.Churn(proc.scale_sigma, cap, S_churn=60.0)
    up_x, up = samplers._add_churn(x, s, proc.alpha, churn, 200, lambda i: normals(6, n, 4), 0)
    a = proc.alpha(up)
    assert float(up) == pytest.approx(min(float(proc.scale_sigma(s, 1.3)), cap))
    assert_moments(up_x, a * model.means[0], a**2 * model.covs[0] + up**2 * torch.eye(4, dtype=F64))


def test_churn_respects_its_bounds():
    x, s, noise = torch.zeros(2, 1, 1, 1, dtype=F64), as_float64(0.5), lambda i: torch.ones(2, 1, 1, 1, dtype=F64)

    def raised(proc=RF, s=s, cap=None, **options):
        churn = samplers.Churn(proc.scale_sigma, samplers.max_churn_level(proc, cap), **{"S_churn": 1e9, **options})
        return [float(v.max()) for v in samplers._add_churn(x, s, proc.alpha, churn, 10, noise, 0)]

    high = math.sqrt(2) / (1 + math.sqrt(2))  # the odds of .5, times EDM's highest factor sqrt(2)
    assert raised()[1] == pytest.approx(high)
    assert raised(S_churn=1.0)[1] == pytest.approx(1.1 / 2.1)
    assert raised(S_noise=2.0)[0] == pytest.approx(2 * raised()[0])
    assert raised(S_min=1.01) == raised(S_max=0.99) == [0, 0.5]  # bounds are in sigma, which is 1
    assert raised(s=as_float64(1.0)) == [0, 1] and raised(proc=VP, s=VP.level_table[-1])[1] == VP.max_level
    assert raised(proc=VP, s=VP.level_table[-2])[1] == VP.max_level
    assert raised(proc=EDM, s=as_float64(80.0))[1] == pytest.approx(80 * math.sqrt(2))  # above sigma_max, as published
    assert (
        raised(proc=EDM, s=as_float64(80.0), cap=80) == [0, 80]
        and raised(proc=EDM, s=as_float64(70.0), cap=80)[1] == 80
    )
    assert raised(cap=1.2)[1] == pytest.approx(1.2 / 2.2) and raised(proc=VP, s=as_float64(2.0), cap=2.5)[1] == 2.5


@every_process
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_keeps_the_marginal(proc, eta):
    """A step with the true x0 takes alpha x0 + s eps to alpha' x0 + s' (a unit vector of eps and new noise)."""
    x0, eps, n = normals(7, 3, 5, 2, 4, 4)
    s, s_next = schedules.levels(proc, 12)[[0, 5]]
    x = proc.alpha(s) * x0 + s * eps
    moved = samplers.euler(lambda x, s: x0, x, torch.stack([s, s_next]), proc.alpha, eta, lambda i: n)
    noise = (moved - proc.alpha(s_next) * x0) / s_next
    # sqrt(1 - (s'/q)^2), q = s alpha'/alpha: the share of DDPM's noise
    fresh = eta * (1 - (s_next / proc.alpha(s_next) / (s / proc.alpha(s))) ** 2).sqrt()
    torch.testing.assert_close(noise, (1 - fresh**2).sqrt() * eps + fresh * n, rtol=1e-9, atol=1e-9)


def test_deterministic_samplers_draw_no_noise():
    for options in ({"sampler": "euler"}, {"sampler": "heun", "S_max": 0.5, "S_noise": 1.1}, {"sampler": "dpm++2m"}):
        samplers.sample(
            config.SampleConfig(steps=5, **options), RF, gaussian(RF.alpha), normals(9, 2, 4, 1, 1), no_noise
        )


# --- DDIM and diffusers ---


def test_euler_is_ddim_in_every_coordinate_system():
    """DDIM in DDPM's own coordinates (Song et al. Eq. 12), Euler in sigma, Euler on the straight path."""
    at = slice(None), None, None, None
    sigma = schedules.levels(VP, 50)
    z = normals(10, 4, 4, 1, 1)
    ve, straight = gaussian(VP.alpha), gaussian(VPV.alpha)
    abar = 1 / (1 + sigma**2)
    expected = [z]
    for i in range(50):  # alpha = sqrt(abar), v-prediction: v = sqrt(abar) eps - sqrt(1-abar) x0
        x, a, b = expected[-1], abar[i].sqrt(), (1 - abar[i]).sqrt()
        D = ve(x / a, sigma[i])
        v = (a * x - D) / b
        x0, eps = a * x - b * v, b * x + a * v
        expected.append(abar[i + 1].sqrt() * x0 + (1 - abar[i + 1]).sqrt() * eps)
    expected = torch.stack(expected[1:])
    for proc, model in ((VP, ve), (VPV, straight)):
        levels, states = schedules.levels(proc, 50), []
        x = proc.initial_state(z, levels[0])
        samplers.euler(model, x, levels, proc.alpha, callback=lambda i, x, D, states=states: states.append(x))
        size = (proc.alpha(levels[1:]) ** 2 + levels[1:] ** 2).sqrt()  # x over this is DDPM's
        torch.testing.assert_close(torch.stack(states) / size[at][..., None], expected, rtol=1e-10, atol=1e-10)


class WavyNet(torch.nn.Module):
    """Smooth arbitrary network of DDPM's x and the timestep."""

    def forward(self, x, c_noise, progress, cond):
        return torch.tanh(1.3 * x + 0.2 * x.flip(1)) + 0.1 * torch.cos(c_noise / 100)[:, None, None, None]


def diffusers_scheduler(name, spacing, one_last):
    """diffusers' DDIMScheduler on the same betas with its tables in float64."""
    prediction = "epsilon" if name == "vp" else "v_prediction"
    expected = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        steps_offset=1,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=name == "vp-v-zero",
        clip_sample=False,
        set_alpha_to_one=one_last,
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    betas = rescale_zero_terminal_snr(betas) if name == "vp-v-zero" else betas
    exact = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(exact, expected.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    expected.alphas_cumprod = exact
    expected.final_alpha_cumprod = as_float64(1.0) if one_last else exact[0]
    return expected


@pytest.mark.parametrize("name", ["vp", "vp-v", "vp-v-zero"])
@pytest.mark.parametrize("spacing, last", [("leading", "sigma_min"), ("leading", "zero"), ("trailing", "zero")])
@pytest.mark.parametrize("eta", [0.0, 0.4, 0.999])  # at 1 from zero terminal SNR diffusers takes the root of -1e-17
def test_steps_agree_with_diffusers_ddim(name, spacing, last, eta):
    """The same network under both, step by step, with the same noise."""
    proc, net, steps = PROCESSES[name], WavyNet(), 25
    expected = diffusers_scheduler(name, spacing, last == "zero")
    expected.set_timesteps(steps)
    wrapped = denoiser.Denoiser(net, proc, "sinusoidal")
    z, noise, states = normals(11, 2, 3, 4, 4), lambda i: normals(50 + i, 2, 3, 4, 4), []
    cfg = config.SampleConfig(sampler="euler", steps=steps, schedule=spacing, final_level=last, eta=eta)
    levels = schedules.levels(proc, steps, spacing, 1.0, last)
    samplers.sample(cfg, proc, lambda x, s: wrapped(x, s, Cond()), z, noise, lambda i, x, D: states.append(x))
    x = z
    for i, t in enumerate(expected.timesteps):
        out = net(x, as_float64([float(t)]), None, None)
        x = expected.step(out, int(t), x, eta=eta, variance_noise=noise(i) if eta else None).prev_sample
        size = (proc.alpha(levels[i + 1]) ** 2 + levels[i + 1] ** 2).sqrt()
        torch.testing.assert_close(states[i] / size, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_agree_with_diffusers_flow_matching(shift):
    """SD3's scheduler, by sample.shift and by process.resolution_scale; it computes in float32."""
    steps, z = 20, normals(12, 2, 3, 4, 4)
    expected = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    expected.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    for proc, cfg in [
        (RF, config.SampleConfig(sampler="euler", steps=steps, shift=shift)),
        (
            process.build_process(config.RFConfig(resolution_scale=shift)),
            config.SampleConfig(sampler="euler", steps=steps),
        ),
    ]:
        levels, states = schedules.levels(proc, steps, shift=cfg.shift), []
        torch.testing.assert_close(levels, expected.sigmas.double(), rtol=0, atol=1e-6)
        wrapped = denoiser.Denoiser(WavyNet(), proc, "sinusoidal")
        samplers.sample(
            cfg,
            proc,
            lambda x, s, w=wrapped: w(x, s, Cond()),
            z,
            no_noise,
            lambda i, x, D, states=states: states.append(x),
        )
        expected._step_index, x = 0, z
        for i, t in enumerate(expected.timesteps):
            x = expected.step(WavyNet()(x, t.double()[None], None, None), t, x).prev_sample
            torch.testing.assert_close(states[i], x, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28, 50])
def test_sd3_schedule_equals_diffusers(shift, steps):
    """Levels equal those of FlowMatchEulerDiscreteScheduler (float32), by sample.shift and resolution_scale."""
    expected = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    expected.set_timesteps(steps)
    for proc, extra_shift in ((RF, shift), (process.build_process(config.RFConfig(resolution_scale=shift)), 1.0)):
        levels = schedules.levels(proc, steps, "sd3", extra_shift)
        torch.testing.assert_close(levels, expected.sigmas.double(), rtol=0, atol=6e-8)
    if steps > 1:  # MATH: linear from 1 to the shifted 1/1000, then shifted
        moved = lambda s: shift * s / (1 + (shift - 1) * s)  # noqa: E731
        even = torch.tensor([1 + i / (steps - 1) * (moved(0.001) - 1) for i in range(steps)], dtype=F64)
        torch.testing.assert_close(levels, torch.cat([moved(even), as_float64([0.0])]), rtol=1e-12, atol=0)


def test_published_levels_of_sd35():
    """Four of the levels that the published SD3.5 code (get_sigmas, shift 3, 28 steps) gives, in float32."""
    levels = schedules.levels(RF, 28, "sd3", 3.0)
    torch.testing.assert_close(
        levels[[0, 1, 14, 27, 28]], as_float64([1.0, 0.987380683, 0.737055898, 0.00892857183, 0.0]), rtol=0, atol=2e-7
    )


@pytest.mark.parametrize(
    "options", [{"sampler": n} for n in SAMPLERS] + [{"sampler": "heun", "S_churn": 20.0}], ids=str
)
def test_samplers_reach_the_data_on_the_sd3_schedule(options):
    """Its last step, from the shifted 1/1000 to 0, is an Euler step; churn does not leave s = 1."""
    model, errors = gaussian(RF.alpha), []
    for steps in (100, 200):
        cfg = config.SampleConfig(steps=steps, schedule="sd3", shift=3.0, **options)
        mean_estimate, cov = exact_moments(cfg, RF, model)
        errors.append(float((cov - model.moments()[1]).abs().max()))
    assert errors[-1] < (2e-2 if options["sampler"] == "euler" else 5e-3) and errors[1] < 0.75 * errors[0]
    torch.testing.assert_close(mean_estimate, model.moments()[0], rtol=0, atol=5e-3)


# --- EDM2's published sampler ---


def formula_denoiser(x, s):
    return 0.25 / (0.25 + s * s) * x + 0.1 * torch.tanh(x / (1 + s)) * torch.cos(s)


def formula_guide(x, s):
    return 0.2 / (0.25 + s * s) * x - 0.05 * torch.sin(x / (1 + s))


def formula_noise(i):
    j = torch.arange(6, dtype=F64)
    return (math.sqrt(2) * torch.sin(1.7 * j + 0.9 * (i + 1) + 0.3 * torch.cos(2.3 * j))).view(1, 6, 1, 1)


EDM_SAMPLER = [  # settings, then the samples that edm_sampler of NVlabs/edm2 gives in float64 under the functions above
    (
        {"steps": 32},
        1,
        [
            0.401851740969429,
            1.20587139418923,
            -0.305302511666672,
            -1.01004637408353,
            0.304778923554116,
            0.897288545832221,
        ],
    ),
    (
        {"steps": 32},
        1.4,
        [
            0.964964662977412,
            2.44911010071165,
            -0.748758136166987,
            -2.12074848746687,
            0.747554042354498,
            1.92524606481247,
        ],
    ),
    (
        {"steps": 18, "S_churn": 40.0},
        1,
        [
            -0.885174186232112,
            -0.533626873192003,
            0.870656644693104,
            -0.109797089410376,
            -0.870567698344975,
            0.262797795942652,
        ],
    ),
    (
        {"steps": 32, "S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003},
        1,
        [
            0.210974366692033,
            0.105563268153182,
            -0.208111638418184,
            0.0395470743934704,
            0.208093265515002,
            -0.0723222637654002,
        ],
    ),
    (
        {"steps": 32, "S_churn": 5.0, "S_min": 0.05, "S_noise": 1.007},
        2.1,
        [
            0.391682423846262,
            2.07745405985666,
            -0.198493403404254,
            -1.93285824538369,
            0.197453659592633,
            1.7897562644975,
        ],
    ),
    (
        {"steps": 5, "S_churn": 200.0},
        1.4,
        [24.9352632544098, -10.0604384930206, -25.4557229785476, 23.6537873858098, 25.458250556268, -24.8293752871721],
    ),
    (
        {"steps": 2, "S_churn": 1.0},
        1,
        [320.019714841202, 375.965567118573, -303.823900711189, -250.679366864922, 303.73068300196, 186.887134691285],
    ),
]


@pytest.mark.parametrize("options, guided, expected", EDM_SAMPLER)
def test_heun_equals_the_published_edm2_sampler(options, guided, expected):
    """Cases: churn above sigma_max from the first level, its bounds, S_noise, guidance, uncorrected last step."""

    def denoise(x, s):
        D = formula_denoiser(x, s)
        return guided * D + (1 - guided) * formula_guide(x, s) if guided != 1 else D

    cfg = config.SampleConfig(sampler="heun", **options)
    x = samplers.sample(cfg, EDM, denoise, formula_noise(-1), formula_noise).flatten()
    torch.testing.assert_close(x, as_float64(expected), rtol=1e-12, atol=1e-12)
    if options.get("S_churn") and "S_max" not in options:
        capped = samplers.sample(
            config.SampleConfig(sampler="heun", S_cap=80, **options), EDM, denoise, formula_noise(-1), formula_noise
        )
        assert (capped.flatten() - as_float64(expected)).abs().max() > 1e-6


def test_dpmpp_2m_of_sd35():
    """Results equal sample_dpmpp_2m of the published SD3.5 code, in float64, on 12 of its levels."""
    expected = as_float64(
        [
            0.329174274480947,
            1.0686712997849,
            -0.248766990581656,
            -0.875321611795585,
            0.248334135997193,
            0.767961060383587,
        ]
    )
    cfg = config.SampleConfig(sampler="dpm++2m", steps=12, schedule="sd3", shift=3.0, multistep="log_s")
    x = samplers.sample(cfg, RF, formula_denoiser, formula_noise(-1), no_noise).flatten()
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    lu = samplers.sample(
        cfg.model_copy(update={"multistep": "log_snr"}), RF, formula_denoiser, formula_noise(-1), no_noise
    )
    assert (lu.flatten() - expected).abs().max() > 1e-2
    for proc in (EDM, VP):  # where alpha = 1 the two are one
        outputs = [
            samplers.sample(
                config.SampleConfig(sampler="dpm++2m", steps=9, multistep=m),
                proc,
                formula_denoiser,
                formula_noise(-1),
                no_noise,
            )
            for m in ("log_s", "log_snr")
        ]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


# --- step grids ---


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T", [10, 37, 50, 1000])
def test_table_indices_equal_diffusers(spacing, T):
    """This holds at every number of steps except three that are bugs in diffusers."""
    expected = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=1)
    proc = process.build_process(config.VPConfig(timesteps=T))
    for steps in range(1, T + 1):
        expected.set_timesteps(steps)
        wanted = expected.timesteps
        if (spacing, steps) == ("linspace", 1):
            wanted = torch.tensor([T - 1])  # diffusers uses pure noise as the first level
        if spacing == "trailing" and len(wanted) == steps + 1:
            assert wanted[-1] == -1  # a rounding of arange
            wanted = wanted[:-1]
        if spacing == "leading" and steps == T:
            assert wanted[0] == T  # outside of the table
            with pytest.raises(UsageError, match=f"at most {T - 1} steps"):
                schedules.levels(proc, steps, spacing)
            continue
        levels = schedules.levels(proc, steps, spacing)
        assert len(levels) == steps + 1 and levels[-1] == 0
        assert (levels[:-1] == proc.level_table[wanted]).all(), steps


def test_default_schedule_of_each_process():
    edm = schedules.levels(EDM, 32)
    i, rho = 13, 7
    expected = (80 ** (1 / rho) + i / 31 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho  # EDM Eq. 5
    assert (float(edm[0]), float(edm[-2])) == (80, 0.002) and float(edm[13]) == pytest.approx(expected)
    torch.testing.assert_close(schedules.levels(PROCESSES["edm x2"], 32), 2 * edm)
    torch.testing.assert_close(schedules.levels(RF, 10), torch.linspace(1, 0, 11, dtype=F64))
    torch.testing.assert_close(schedules.levels(VP, 1000)[:-1], VP.level_table.flip(0))
    torch.testing.assert_close(schedules.levels(VP, 20), schedules.levels(VP, 20, "linspace"))
    rf = schedules.levels(RF, 9, "karras")
    torch.testing.assert_close(rf[:-1] ** (1 / 7), torch.linspace(1, 0.001 ** (1 / 7), 9, dtype=F64))
    assert schedules.levels(ZERO, 30)[0] == schedules.levels(ZERO, 30, "karras")[0] == 1
    assert [len(schedules.levels(proc, 1)) for proc in PROCESSES.values()] == [2] * len(PROCESSES)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(PROCESSES)),
    grid=st.sampled_from([None, "karras", "trailing", "leading", "linspace", "respaced", "ddim", "linear", "sd3"]),
    steps=st.integers(1, 600),
    shift=st.floats(0.2, 5),
    last=st.sampled_from(["zero", "sigma_min"]),
)
def test_levels_decrease_or_raise(name, grid, steps, shift, last):
    proc = PROCESSES[name]
    try:
        levels = schedules.levels(proc, steps, grid, shift, last)
    except UsageError as error:
        assert str(error).startswith(("sample.schedule", "sample.shift", "sample.final_level", "sample.steps"))
        return
    assert levels.dtype == F64 and levels.shape == (steps + 1,)
    assert (levels.diff() < 0).all() and levels[0] <= proc.max_level
    if grid == "sd3":  # whose lowest level before the shift depends on it
        return
    plain = schedules.levels(proc, steps, grid, 1.0, last)
    sigma, shifted = (levels_ / proc.alpha(levels_) for levels_ in (plain, levels))
    torch.testing.assert_close(shifted, shift * sigma, rtol=1e-9, atol=0)
    assert (plain[-1] == 0) if last == "zero" else (plain[-1] == proc.min_level)


@pytest.mark.parametrize(
    "proc, options, message",
    [
        (EDM, {"schedule": "trailing"}, "sample.schedule=trailing: this process has karras"),
        (RF, {"schedule": "linspace"}, "this process has linear, sd3, karras"),
        (VP, {"schedule": "linear"}, "this process has linspace, respaced, ddim, trailing, leading, karras"),
        (VP, {"steps": 1001}, "allows at most 1000 steps"),
        (VP, {"steps": 0}, "set at least 1"),
        (EDM, {"steps": -1, "schedule": "karras"}, "set at least 1"),
        (EDM, {"shift": 2.0}, "the first level would be 160, above 80"),
        (VPV, {"shift": 1.1}, "a shift above 1 is for process.name=rf"),
        (RF, {"final_level": "sigma_min"}, "only process.name=vp"),
        (VP, {"final_level": "sigma_min"}, "sample.schedule=leading or trailing"),
        (VP, {"final_level": "sigma_min", "schedule": "karras"}, "sample.schedule=leading or trailing"),
    ],
)
def test_invalid_schedules(proc, options, message):
    with pytest.raises(UsageError, match=message):
        schedules.levels(proc, **{"steps": 20, **options})


@pytest.mark.parametrize("levels", [[1.0, 1.0, 0.0], [1.0, 2.0], [1.0], [1.0, -0.5]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_must_decrease(levels, name):
    with pytest.raises(ValueError, match="must decrease"):
        run_sampler(name, gaussian(EDM.alpha), torch.zeros(1, 4, 1, 1, dtype=F64), as_float64(levels), EDM.alpha)


# --- settings and images ---


def test_evaluations():
    for name, count in [("euler", 32), ("heun", 2 * 32 - 1), ("dpm++2m", 32)]:  # EDM2's 63
        model = gaussian(EDM.alpha)
        samplers.sample(config.SampleConfig(sampler=name, steps=32), EDM, model, normals(13, 2, 4, 1, 1), no_noise)
        assert model.calls == count


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "heun", "eta": 0.5}, "sample.eta=0.5 is euler's noise.*sample.sampler=euler or sample.eta=0"),
        ({"sampler": "dpm++2m", "eta": 0.5}, "sample.eta=0.5 is euler's noise"),
        ({"sampler": "euler", "S_churn": 40}, "sample.S_churn=40 is heun's noise.*sample.S_churn=0"),
        ({"S_min": 2, "S_max": 1}, "sample.S_min=2 is above sample.S_max=1"),
        ({"eta": 1.5}, "sample.eta"),
        ({"schedule": "cosine"}, "sample.schedule"),
    ],
)
def test_contradictory_sampler_settings(options, message):
    with pytest.raises(UsageError, match=message):
        config.validate({"net": {"name": "dit"}, "sample": options})


class TinyNet(torch.nn.Module):
    """Float32 network of the process's target, for the effect of the dtype of the state."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, c_noise, progress, cond):
        return torch.tanh(self.layer(x))


@every_process
@pytest.mark.parametrize("options", [{"sampler": n} for n in SAMPLERS] + [{"sampler": "euler", "eta": 1.0}], ids=str)
def test_a_float64_state_changes_little(proc, options):
    torch.manual_seed(0)
    wrapped = denoiser.Denoiser(TinyNet(), proc, "fourier").requires_grad_(False)
    z, outputs = normals(14, 2, 3, 4, 4), []
    for dtype in (torch.float32, torch.float64):
        outputs.append(
            samplers.sample(
                config.SampleConfig(steps=20, **options), proc, lambda x, s: wrapped(x, s, Cond()), z.to(dtype),
                lambda i, dtype=dtype: normals(60 + i, 2, 3, 4, 4).to(dtype),
            )
        )  # fmt: skip
        assert outputs[-1].dtype == dtype
    assert 0 < (outputs[0] - outputs[1]).abs().max() < 2e-5 * outputs[1].abs().max()


@pytest.mark.parametrize(
    "options",
    [
        ["sample.sampler=euler", "sample.eta=1", "process.name=rf", "sample.shift=3"],
        ["sample.sampler=heun", "sample.S_churn=10", "sample.state_dtype=float64"],
        ["sample.sampler=dpm++2m", "process.name=vp", "sample.schedule=trailing", "process.prediction=v"],
    ],
    ids=["rf", "edm", "vp"],
)
def test_an_image_depends_on_its_seed_only(options):
    """The noise of the steps is keyed to the sample as well, not to the batch."""
    arguments = [
        "sample.steps=4",
        "sample.guidance=1",
        "data.num_classes=10",
        "data.mean=[0.0]",
        "data.std=[0.5]",
        *options,
    ]
    run, _ = recipes.resolve("digits", arguments)
    torch.manual_seed(0)
    net = models.build_network(run.net, run.input_spec)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    wrapped = (
        denoiser.Denoiser(net, process.build_process(run.process), run.net.noise_embedding).eval().requires_grad_(False)
    )

    def images(seeds, batch_size):
        sample = run.sample.model_copy(update={"batch_size": batch_size})
        return torch.cat(
            list(
                sampling.generate(
                    wrapped, run.model_copy(update={"sample": sample}), seeds, Cond(label=torch.full((len(seeds),), 3))
                )
            )
        )

    full_batch = images([5, 1, 2, 9], 4)
    parts = images([9, 1], 1)
    assert (full_batch[[3, 1]].int() - parts.int()).abs().max() <= 1  # a rounding to 8 bits
    assert (full_batch[0].int() - full_batch[1].int()).abs().max() > 20
