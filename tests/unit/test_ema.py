"""Both kinds of EMA against brute force, reconstruction of others, and their use in snapshots and sampling."""

import json
import shutil

import mpmath
import numpy as np
import pytest
import torch
from helpers.reference_ema import interval_weights
from helpers.run_factory import QUIET_CONSOLE, small_run, tiny_run, with_settings, write_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from gesso import config, ema, recipes, sample_files, sampling, snapshot
from gesso.ema import Density, PowerProfile, RawProfile, TraditionalProfile
from gesso.ema.combine import TENSORS_PER_BLOCK
from gesso.evaluation import runner
from gesso.safetensors_io import read_metadata
from gesso.training import loop
from gesso.training.run_folder import start_training


@pytest.mark.parametrize(
    "sigma_rel, gamma",
    [(0.05, 16.972198602303447), (0.10, 6.937203937601809), (0.15, 3.5578687748994646), (0.25, 0.71982395800071)],
)
def test_exponents(sigma_rel, gamma):
    assert ema.sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(sigma_rel=st.floats(0.01, 0.288))
def test_exponent_inverts_to_sigma_rel(sigma_rel):
    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)  # Eq. 123


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_invalid_sigma_rel(sigma_rel):
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        ema.PowerProfile(sigma_rel)


@pytest.mark.parametrize("halflife", [0, -5, float("nan")])
def test_invalid_halflives(halflife):
    with pytest.raises(ValueError, match="above 0"):
        TraditionalProfile(halflife)


def test_published_beta():
    assert PowerProfile(0.05).beta(20_480_000 - 2048, 20_480_000) == pytest.approx(0.9982043044666998, rel=1e-12)


def test_config_a_in_steps():
    """A half-life of 50M images is 12k steps of 4096, and sigma_rel .034 at the end of 2^31 images (B.1)."""
    profile = TraditionalProfile(50_000_000)
    assert profile.beta(0, 4096) ** 12_207 == pytest.approx(0.5, abs=1e-4)
    assert round(1 / profile.decay_rate / 2**31, 3) == 0.034  # a long exponential's standard deviation is 1/k


PROFILES = [
    PowerProfile(0.05),
    PowerProfile(0.1),
    PowerProfile(0.2),
    TraditionalProfile(7),
    TraditionalProfile(2000),
    TraditionalProfile(10**9),
]


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(1, 5000), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_tracker_matches_the_integral_at_any_update_interval(steps, seed):
    """theta_hat(t) = int p(t) theta(t) dt + m theta(0) for piecewise constant theta (Eq. 112-120), any intervals."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(3, generator=g, dtype=torch.float64)
    average = ema.Tracker({"w": theta}, PROFILES)
    times, values = [0], [theta.clone()]
    for dt in steps:
        theta.copy_(torch.randn(3, generator=g, dtype=torch.float64))
        average.update(times[-1], times[-1] + dt)
        times.append(times[-1] + dt)
        values.append(theta.clone())
    for profile in PROFILES:
        expected = torch.from_numpy(interval_weights(profile, np.array(times, np.float64))) @ torch.stack(values)
        torch.testing.assert_close(average.averages[profile]["w"], expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(gamma=st.floats(0.05, 500), exponent=st.floats(-8, 5))
def test_kummers_function(gamma, exponent):
    """M(1, gamma+2, -z) = e^-z M(gamma+1, gamma+2, z), in 40 digits."""
    z = 10**exponent
    with mpmath.workdps(40):
        expected = mpmath.hyp1f1(1, mpmath.mpf(gamma) + 2, -mpmath.mpf(z), maxterms=10**6)
        assert float(abs(ema.kummer(np.float64(gamma), np.float64(z)) / expected - 1)) < 1e-13


def test_kummers_closed_cases():
    assert ema.kummer(np.array([3.0, 0.0]), np.array([0.0, 0.0])).tolist() == [1, 1]
    assert ema.kummer(np.float64(0), np.float64(1e-9)) == pytest.approx(1 - 0.5e-9, rel=1e-15)
    for z in (0.3, 40.0):  # the quadrature goes over into the closed forms
        assert ema.kummer(np.float64(1e-13), np.float64(z)) == pytest.approx(-np.expm1(-z) / z, rel=1e-12)
    assert ema.kummer(np.float64(5), np.float64(1e-13)) == pytest.approx(1, rel=1e-12)


def make_density(kind: str, t: float, length: float) -> Density:
    """One density: gamma or the half-life given."""
    return Density(*np.float64((t, length, 0.0) if kind == "power" else (t, 0.0, np.log(2) / length)))


def integrate_product(*curves: Density) -> mpmath.mpf:
    """Of the product of densities, by quadrature in 25 digits on pieces that are short where it is steep."""
    with mpmath.workdps(25):
        T = min(mpmath.mpf(float(c.t)) for c in curves)
        rate = sum(mpmath.mpf(float(c.decay_rate)) + (float(c.gamma) + 1) / T for c in curves)

        def product(tau):
            value = mpmath.mpf(1)
            for c in curves:
                t, gamma, k = (mpmath.mpf(float(v)) for v in c)
                value *= k * mpmath.exp(-k * (t - tau)) if k else (gamma + 1) / t * (tau / t) ** gamma
            return value

        largest = product(T)  # mpmath's error is absolute: integrate what is 1 at T
        ends = [T - 4 * i / rate for i in range(20)]
        pieces = [mpmath.mpf(0), T / 10**9, T / 10**5, *sorted(end for end in ends if end > T / 100)]
        return largest * mpmath.quad(lambda tau: product(tau) / largest, pieces)


densities = st.one_of(
    st.builds(lambda t, length: make_density("power", t, length), st.floats(0.01, 1), st.floats(0.1, 60)),
    st.builds(lambda t, x: make_density("traditional", t, 10**x), st.floats(0.01, 1), st.floats(-4, 2)),
)


@settings(max_examples=60, deadline=None)
@given(a=densities, b=densities)
def test_inner_products_equal_integrals(a, b):
    """Gamma from .1 to 60, half-lives from 1e-4 to 100 of the time, in any pair, at any two times."""
    actual = float(ema.inner_products(a, b))
    assert actual == float(ema.inner_products(b, a)) and np.isfinite(actual)
    assume(actual > 1e-280)
    assert float(abs(actual / integrate_product(a, b) - 1)) < 1e-10


@settings(max_examples=20, deadline=None)
@given(a=densities)
def test_all_weights_sum_to_1(a):
    assert float(integrate_product(a)) + float(a.initial_weight()) == pytest.approx(1, rel=1e-12)


def test_inner_products_of_two_power_profiles_are_eq_151():
    a, b = make_density("power", 0.6, 3.0), make_density("power", 1.0, 7.0)
    assert float(ema.inner_products(a, b)) == pytest.approx(4 * 8 * 0.6**7 / 11, rel=1e-14)


def test_inner_products_do_not_overflow():
    t = [1, 10**4, 10**6, 2 * 10**9]
    profiles = [PowerProfile(1e-3), PowerProfile(0.2886), TraditionalProfile(1), TraditionalProfile(10**15)]
    row = ema.densities([time for time in t for _ in profiles], profiles * len(t), 2e9)
    products = ema.inner_products(Density(*(values[:, None] for values in row)), row)
    assert np.isfinite(products).all() and (products >= 0).all() and (products.diagonal() > 0).all()
    assert products == pytest.approx(products.T, rel=1e-13)


N = 2048
INITIAL_DISTANCE = 10.0
"""theta(0) lies far from all that follows: what it spoils is seen"""


def random_walk(n=N, size=16):
    """A random walk of weights, and its brute-force average of any profile at any time."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(n, size, generator=g, dtype=torch.float64).cumsum(0) / n**0.5
    theta = torch.cat([INITIAL_DISTANCE * torch.randn(1, size, generator=g, dtype=torch.float64), theta])

    def average(profile, end=n):
        return torch.from_numpy(interval_weights(profile, np.arange(end + 1, dtype=np.float64))) @ theta[: end + 1]

    return theta, average


def combine(tensors, x):
    return ema.linear_combination(tensors, x[:, None])[0]


def snapshot_times(profiles, snapshots=32, n=N, end=None):
    """Times and profiles of what a run stores up to `end`."""
    pairs = [(n * (i + 1) // snapshots, p) for i in range(snapshots) for p in profiles]
    times, kinds = zip(*[(t, p) for t, p in pairs if t <= (end or n)], strict=True)
    return times, kinds


TWO_POWER_PROFILES = (PowerProfile(0.05), PowerProfile(0.1))


def reconstruct(average, target, profiles=TWO_POWER_PROFILES, end=None, dtype=torch.float64, **options):
    times, kinds = snapshot_times(profiles, end=end, **options)
    fit = ema.fit_profile(times, kinds, end or N, target)
    assert fit.coefficients.sum() == pytest.approx(1)
    tensors = [average(p, t).to(dtype) for t, p in zip(times, kinds, strict=True)]
    return combine(tensors, fit.coefficients), fit


def relative_distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "sigma_rel, bound",
    [(0.03, 5e-3), (0.075, 5e-3), (0.15, 5e-3), (0.2, 5e-3), (0.25, 1e-2)],  # MATH: slower convergence at .25
)
def test_other_lengths_from_snapshots(sigma_rel, bound):
    _, average = random_walk()
    weights, fit = reconstruct(average, PowerProfile(sigma_rel))
    expected = average(PowerProfile(sigma_rel))
    assert relative_distance(weights, expected) < bound
    assert fit.squared_error < (1e-3 if sigma_rel <= 0.2 else 2e-3) and fit.initial_weight == 0
    # It is not merely one of the stored ones.
    assert min((average(PowerProfile(s)) - expected).norm() for s in (0.05, 0.1)) > 5 * (weights - expected).norm()


MIXED = (PowerProfile(0.05), PowerProfile(0.1), TraditionalProfile(N // 20), TraditionalProfile(10 * N))


@pytest.mark.parametrize("target", MIXED, ids=str)
@pytest.mark.parametrize("end", [N, N // 2])
def test_stored_profiles_are_reconstructed_exactly(target, end):
    _, average = random_walk()
    weights, fit = reconstruct(average, target, MIXED, end=end)
    assert weights.equal(average(target, end)) and fit.squared_error == 0 and (fit.coefficients != 0).sum() == 1
    assert fit.initial_weight == pytest.approx(interval_weights(target, np.array([0.0, end]))[0])


def test_reconstruction_at_an_earlier_time():
    _, average = random_walk()
    weights, _ = reconstruct(average, PowerProfile(0.15), end=1024)
    assert relative_distance(weights, average(PowerProfile(0.15), 1024)) < 5e-3
    with pytest.raises(ValueError, match="nothing is stored"):
        ema.fit_profile([100], [PowerProfile(0.1)], 50, PowerProfile(0.1))
    with pytest.raises(ValueError, match="nothing is stored"):
        ema.fit_profile([], [], 50, PowerProfile(0.1))


@pytest.mark.parametrize(
    "profiles, target, slope",
    [
        (
            (PowerProfile(0.05), PowerProfile(0.1)),
            PowerProfile(0.075),
            -4,
        ),  # MATH: squared error of the profile ~ 1/n^4 with two profiles
        ((TraditionalProfile(500),), PowerProfile(0.1), -2),  # 1/n^2 with one
        ((TraditionalProfile(10**4),), PowerProfile(0.1), -2),
        ((TraditionalProfile(50), TraditionalProfile(500)), PowerProfile(0.1), -4),
        ((PowerProfile(0.1), TraditionalProfile(500)), PowerProfile(0.15), -4),
        ((PowerProfile(0.05), PowerProfile(0.1)), TraditionalProfile(100), -4),
    ],
    ids=str,
)
def test_errors_fall_with_the_number_of_snapshots(profiles, target, slope):
    errors = [ema.fit_profile(*snapshot_times(profiles, n), N, target).squared_error for n in (16, 32, 64, 128)]
    assert np.diff(np.log2(errors)).mean() == pytest.approx(slope, abs=0.5)


def test_other_profiles_from_one_halflife():
    """Power targets, and other half-lives, from many traditional snapshots: as in theory, so of weights."""
    _, average = random_walk()
    for target in (PowerProfile(0.05), PowerProfile(0.1), PowerProfile(0.2), TraditionalProfile(150)):
        far, near = (reconstruct(average, target, (TraditionalProfile(100),), snapshots=n) for n in (16, 128))
        assert near[1].squared_error < far[1].squared_error / 20 and near[1].squared_error < 2e-3
        assert relative_distance(near[0], average(target)) < 5e-3
        assert relative_distance(near[0], average(target)) < relative_distance(far[0], average(target))


@pytest.mark.parametrize(
    "target", [PowerProfile(0.02), PowerProfile(0.15), PowerProfile(0.25), TraditionalProfile(300)], ids=str
)
@pytest.mark.parametrize(
    "profiles", [MIXED, (TraditionalProfile(100),), (PowerProfile(0.1), TraditionalProfile(N))], ids=str
)
def test_combined_averages_match_combined_profiles(profiles, target):
    """Averages that a tracker made of a random trajectory, against the integral of sum_i x_i p_i, and m."""
    n = 256
    theta = torch.randn(n + 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    live = theta[0].clone()
    tracker = ema.Tracker({"w": live}, profiles)
    times, kinds = snapshot_times(profiles, 8, n)
    tensors, last = [], 0
    for t in range(1, n + 1):
        live.copy_(theta[t])
        tracker.update(last, t)
        last = t
        if t in times:
            tensors += [tracker.averages[p]["w"].clone() for p in profiles]
    fit = ema.fit_profile(times, kinds, n, target)
    fine = 4000  # midpoints in every step
    tau = (np.arange(n * fine) + 0.5) / fine
    stored = ema.densities(times, kinds)
    p = np.zeros_like(tau)
    for i, x in enumerate(fit.coefficients):
        inside = tau <= times[i]
        p[inside] += x * Density(*(v[i] for v in stored)).pdf(tau[inside])
    weights = np.r_[fit.initial_weight, p.reshape(n, fine).mean(1)]
    actual = combine(tensors, fit.coefficients)
    torch.testing.assert_close(actual, torch.from_numpy(weights) @ theta, rtol=1e-5, atol=1e-5)
    # The error told is that of the profile; theta(0) counts as the weights of the first snapshot's time before 0.
    expected = Density(*(v[0] for v in ema.densities([n], [target])))
    gap = ((p - expected.pdf(tau)) ** 2).mean() * n + (fit.initial_weight - expected.initial_weight()) ** 2 / times[0]
    norm = (expected.pdf(tau) ** 2).mean() * n + expected.initial_weight() ** 2 / times[0]
    assert fit.squared_error == pytest.approx(gap / norm, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("halflife", [100, N, 10 * N, 1000 * N])
@pytest.mark.parametrize("other_profiles", [(), (PowerProfile(0.034), PowerProfile(0.05))], ids=str)
@pytest.mark.parametrize("sigma_rel", [0.1, 0.25])
def test_initial_weights_have_no_share_in_power_targets(halflife, other_profiles, sigma_rel):
    """Even where the stored averages are theta(0) almost alone, in a run much shorter than the half-life.

    Least squares between the densities alone has theta(0) at a weight of .9 here, and results 10 lengths away.
    """
    _, average = random_walk()
    profiles = (*other_profiles, TraditionalProfile(halflife))
    weights, fit = reconstruct(average, PowerProfile(sigma_rel), profiles, snapshots=128)
    assert abs(fit.initial_weight) < 2e-4 and fit.squared_error < 1e-3
    assert relative_distance(weights, average(PowerProfile(sigma_rel))) < 5e-3


def test_fit_reports_the_weight_of_initial_weights():
    """Half of this target is theta(0), which power profiles hold nothing of."""
    target = TraditionalProfile(N)
    without = ema.fit_profile(*snapshot_times((PowerProfile(0.05), PowerProfile(0.1))), N, target)
    assert without.initial_weight == 0 and without.squared_error > 0.5 and "initial" not in str(without)
    within = ema.fit_profile(
        *snapshot_times((PowerProfile(0.05), PowerProfile(0.1), TraditionalProfile(5 * N))), N, target
    )
    assert within.initial_weight == pytest.approx(0.5, abs=1e-2) and within.squared_error < 1e-3
    assert "weight of the initial weights 0.5" in str(within)


def test_single_snapshot_reconstructs_every_target():
    fit = ema.fit_profile([100], [TraditionalProfile(50)], 100, PowerProfile(0.1))
    assert fit.coefficients.tolist() == [1] and fit.initial_weight == 0.25


@pytest.mark.parametrize(
    "profiles, bound",
    [
        (
            (PowerProfile(0.034), PowerProfile(0.05), TraditionalProfile(round(0.0233 * N))),
            2e-5,
        ),  # CONFIG A: all about alike at the end
        ((PowerProfile(0.05), PowerProfile(0.1), TraditionalProfile(2 * N)), 2e-5),
        ((TraditionalProfile(100 * N), TraditionalProfile(101 * N)), 1e-3),  # less than 1% of them is not theta(0)
        ((PowerProfile(0.1), PowerProfile(0.1)), 2e-6),
    ],
    ids=str,
)
def test_nearly_identical_snapshots(profiles, bound):
    """Coefficients stay small, so that float32 averages give what float64 ones would."""
    _, average = random_walk()
    for target in (PowerProfile(0.07), PowerProfile(0.15), TraditionalProfile(100)):
        exact, _ = reconstruct(average, target, profiles, snapshots=256)
        rounded, _ = reconstruct(average, target, profiles, snapshots=256, dtype=torch.float32)
        assert relative_distance(rounded.double(), exact) < bound
        assert relative_distance(exact, average(target)) < 2e-3


def test_several_targets_in_one_pass():
    tensors = [torch.randn(2, 3) for _ in range(4)]
    x = np.random.default_rng(0).normal(size=(4, 2))
    combined = ema.linear_combination(tensors, x)
    for j in range(2):
        torch.testing.assert_close(combined[j], combine(tensors, x[:, j]))


# Snapshots, settings, sampling.

HALFLIFE_SETTINGS = {"ema.halflives": "[1000]"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with sigma_rel .05, .1 and a half-life of 1000 at image 640; their weights differ."""
    path = tmp_path_factory.mktemp("half") / "run"
    write_run(path, **HALFLIFE_SETTINGS)
    return path


def test_snapshots_know_their_profile(folder):
    actual = snapshot.list_snapshots(folder)
    assert [s.path.name for s in actual] == [
        f"nimg000000000640-{name}.safetensors" for name in ("ema0.0500", "ema0.1000", "halflife1000")
    ]
    assert [s.profile for s in actual] == [PowerProfile(0.05), PowerProfile(0.1), TraditionalProfile(1000)]
    for stored in actual:
        tensors, _, meta = snapshot.read(stored.path)
        (created,), _, time, (fit,) = snapshot.reconstruct_from_run(folder, [stored.profile])
        assert meta == stored and time == 640 and fit.squared_error == 0
        assert all(created[k].equal(tensors[k]) for k in tensors)
    assert fit.initial_weight == pytest.approx(2**-0.64)


def test_snapshots_without_halflife_metadata(tmp_path):
    run = small_run()
    tree = config.to_dict(run)
    del tree["ema"]["halflives"], tree["sample"]["halflife"]
    description = {"format": "gesso snapshot 1", "nimg": 640, "sigma_rel": 0.05, "run": tree}
    path = tmp_path / "snapshots" / "nimg000000000640-ema0.0500.safetensors"
    path.parent.mkdir()
    save_file({"w": torch.ones(3)}, path, {"gesso": json.dumps(description)})
    assert snapshot.read(path)[1] == run
    assert snapshot.list_snapshots(tmp_path) == [snapshot.Snapshot(path, 640, PowerProfile(0.05))]
    # The files of power profiles are still written under this name, with these keys in this order.
    assert snapshot.snapshot_path(path.parent, 640, PowerProfile(0.05)) == path
    snapshot.write(path, {"w": torch.ones(3)}, 640, PowerProfile(0.05), run)
    assert list(json.loads(read_metadata(path)["gesso"])) == [*description, "crc32"]


def test_training_resumes_bit_equal_and_samples(tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    run = small_run(**HALFLIFE_SETTINGS, **{"ema.sigma_rels": "[]", "sample.halflife": 1000})
    start_training(run, out, False, QUIET_CONSOLE, print)
    shutil.copytree(out, again)
    shutil.rmtree(again / "state" / max(p.name for p in (again / "state").iterdir()))
    shutil.rmtree(again / "snapshots")
    start_training(run, again, True, QUIET_CONSOLE, print)
    last = snapshot.list_snapshots(out)[-1].path
    assert last.name == "nimg000000000048-halflife1000.safetensors"
    assert last.read_bytes() == (again / "snapshots" / last.name).read_bytes()
    recorded = config.load_config(out / "run.yaml")
    lines = sample_files.sample_to_folder(out, recorded, sample_files.SampleArgs(seeds="0-1"), tmp_path / "made")
    assert "half-life 1,000, image 48" in lines[-1] and "weight of the initial weights 0.97" in lines[-1]


def test_trained_average_is_the_sum_over_steps(monkeypatch, tmp_path):
    """theta_hat = 2^(-t/h) theta(0) + sum of (1 - beta) beta^(steps after it) theta, from the weights of every step."""
    run = small_run(**HALFLIFE_SETTINGS)
    history = []
    step = loop.Trainer.step

    def stepping(self):
        before = {k: v.clone() for k, v in self.ema.tensors.items()}
        loss = step(self)
        history.extend([before] if not history else [])
        history.append({k: v.clone() for k, v in self.ema.tensors.items()})
        return loss

    monkeypatch.setattr(loop.Trainer, "step", stepping)
    start_training(run, tmp_path / "run", False, QUIET_CONSOLE, print)
    tensors, _, meta = snapshot.read(snapshot.list_snapshots(tmp_path / "run")[-1].path)
    assert meta.profile == TraditionalProfile(1000) and len(history) == 4
    beta = 2 ** (-16 / 1000)
    for name, tensor in tensors.items():
        expected = beta**3 * history[0][name] + sum(
            (1 - beta) * beta ** (2 - i) * history[i + 1][name] for i in range(3)
        )
        torch.testing.assert_close(tensor, expected)


def image_to_array(path):
    with Image.open(path) as image:
        return np.asarray(image)


def read_images(path):
    return [image_to_array(p).tolist() for p in sorted(path.glob("seed*.png"))]


def test_sample_command_with_other_lengths(gesso_text, folder, tmp_path):
    code, output = gesso_text("sample", folder, "sample.halflife=1k", "--seeds", "0-2", "--out", tmp_path / "half")
    assert (
        code == 0
        and "half-life 1,000, image 640 (relative error of the profile 0.0e+00, weight of the initial" in output
    )
    assert gesso_text("sample", folder, "--seeds", "0-2", "--out", tmp_path / "power")[0] == 0
    code, output = gesso_text("sample", folder, "sample.halflife=700", "--seeds", "0-2", "--out", tmp_path / "made")
    assert code == 0 and "half-life 700" in output
    half, power, created = (read_images(tmp_path / name) for name in ("half", "power", "made"))
    assert len(half) == 3 and half != power and half != created
    # What was drawn is what the stored file says.
    tensors, run, _ = snapshot.read(folder / "snapshots" / "nimg000000000640-halflife1000.safetensors")
    halflife_run = with_settings(run, **{"sample.halflife": 1000})
    direct = snapshot.denoiser_from_weights(tensors, halflife_run)
    cond, _ = sampling.build_cond(halflife_run, range(3), None, [0, 1, 2])
    for seed, image in enumerate(torch.cat(list(sampling.generate(direct, halflife_run, range(3), cond)))):
        sampling.save_png(sampling.to_pil(image), tmp_path / "direct" / f"seed{seed:06d}.png")
    assert half == read_images(tmp_path / "direct")
    names = {p.name for p in (folder / "samples").iterdir()} if (folder / "samples").exists() else set()
    assert gesso_text("sample", folder, "sample.halflife=1000", "--seeds", "0")[0] == 0
    assert {p.name for p in (folder / "samples").iterdir()} - names == {"halflife-1000-nimg640"}


def test_ema_command_writes_other_lengths(gesso_text, folder, tmp_path):
    code, output = gesso_text(
        "ema", folder, "--halflife", "1k", "--halflife", "300", "--sigma-rel", "0.07", "--out", tmp_path
    )
    assert code == 0 and "half-life 300 at image 640" in output and "sigma_rel 0.07 at image 640" in output
    assert "sample.halflife=300" in output
    created = {p.name: snapshot.read(p)[2].profile for p in tmp_path.iterdir()}
    assert sorted(map(str, created.values())) == ["half-life 1,000", "half-life 300", "sigma_rel 0.07"]
    assert "nimg000000000640-halflife300.safetensors" in created


@pytest.mark.parametrize(
    "words, output",
    [
        (["ema", "--halflife", "soon"], "write a number of images above 0"),
        (["ema", "--halflife", "0"], "write a number of images above 0"),
        (["ema"], "set --sigma-rel or --halflife"),
        (["ema", "--halflife", "50M", "--nimg", "10"], "no snapshot up to image 10"),
        (["sample", "sample.halflife=0"], "greater than 0"),
        (["sample", "sample.halflife=-1"], "sample.halflife"),
        (["sample", "sample.halflife=1.5"], "sample.halflife"),
        (["sample", "sample.halflife=1000", "--nimg", "10"], "no snapshot up to image 10"),
        (["sample", "ema.halflives=[5]"], "fixed by training"),
    ],
)
def test_ema_command_errors(gesso_text, folder, words, output, tmp_path):
    code, recorded = gesso_text(words[0], folder, *words[1:], "--out", tmp_path / "out")
    assert code == 2 and output in recorded and "Traceback" not in recorded and not (tmp_path / "out").exists()


def test_sigma_rel_with_halflife_is_an_error(gesso_text, tmp_path):
    write_run(tmp_path / "run", **HALFLIFE_SETTINGS, **{"sample.halflife": 1000})
    assert "sample.sigma_rel=0.1 sample.halflife=null" in gesso_text("ema", tmp_path / "run", "--sigma-rel", "0.1")[1]
    code, output = gesso_text("sample", tmp_path / "run", "sample.sigma_rel=0.1")
    assert code == 2 and "no effect" in output and "sample.halflife=null" in output
    code, output = gesso_text(
        "sample", tmp_path / "run", "sample.sigma_rel=0.1", "sample.halflife=null", "--seeds", "0"
    )
    assert code == 0 and "sigma_rel 0.1" in output


def test_guide_with_halflife(folder, tmp_path, monkeypatch):
    """A guiding network stands at its own run's half-life; self at another length."""
    guide_folder = tmp_path / "other"
    write_run(guide_folder, **HALFLIFE_SETTINGS, **{"sample.halflife": 1000})
    run = config.load_config(folder / "run.yaml")
    requested = []
    synthesize = snapshot.reconstruct_from_run
    monkeypatch.setattr(snapshot, "reconstruct_from_run", lambda *a: requested.append((a[0], a[1])) or synthesize(*a))
    guide = {"sample.guidance": 3, "sample.guide_run": guide_folder}
    sampling.load_guide(folder, with_settings(run, **guide))
    sampling.load_guide(folder, with_settings(run, **guide, **{"sample.guide_sigma_rel": 0.1}))
    assert requested == [(guide_folder, [TraditionalProfile(1000)]), (guide_folder, [PowerProfile(0.1)])]
    weak = {"sample.guidance": 3, "sample.guide_run": "self", "sample.guide_sigma_rel": 0.05}
    with pytest.raises(Exception, match="is the same network"):
        sampling.load_guide(folder, with_settings(run, **weak))
    assert sampling.load_guide(folder, with_settings(run, **weak, **{"sample.halflife": 1000})) is not None


def test_evaluation_uses_the_halflife(folder, monkeypatch):
    class Enough(Exception):
        pass

    def plan(snapshots, targets, nimg=None):
        raise Enough(targets)

    monkeypatch.setattr(snapshot, "plan_reconstruction", plan)
    run = with_settings(
        config.load_config(folder / "run.yaml"), **{"sample.halflife": 1000, "eval.sweep_sigma_rels": "[0.07]"}
    )
    with pytest.raises(Enough) as caught:
        runner.evaluate_run(folder, run, lambda done, total: None)
    assert caught.value.args[0] == [TraditionalProfile(1000), PowerProfile(0.07)]


@pytest.mark.parametrize(
    "overrides, output",
    [
        (["ema.sigma_rels=[]"], "at least one length"),
        (["ema.halflives=[5,5]"], "need at least one length and no duplicates"),
        (["ema.halflives=[0]"], "greater than 0"),
        (["ema.halflives=[1.5]"], "fractional part"),
    ],
)
def test_invalid_ema_settings(overrides, output):
    with pytest.raises(Exception, match=output):
        recipes.resolve("digits", overrides)


def test_config_a():
    """B.1: a half-life of 50M images, with the ramp-up of EDM's framework; the other steps have power profiles."""
    run = recipes.resolve("edm2-ladder-a", [])[0]
    assert ema.sampling_profile(run.sample) == TraditionalProfile(50_000_000, 0.05) in ema.tracked_profiles(run.ema)
    others = [recipes.resolve(f"edm2-ladder-{step}", [])[0] for step in "bcdefg"]
    assert all(r.ema.halflives == () and isinstance(ema.sampling_profile(r.sample), PowerProfile) for r in others)
    assert recipes.resolve("digits", ['ema.halflives=["50M","200k"]'])[0].ema.halflives == (50_000_000, 200_000)


# Raw weights, tensors of any kind.


def test_raw_weights_represent_surrounding_times():
    """Their coefficients are what the target's profile integrates to, from midpoint to midpoint."""
    times = [100, 200, 400, 800]
    edges = np.array([0, 150, 300, 600, 1000.0])
    for target in (PowerProfile(0.05), PowerProfile(0.2), TraditionalProfile(300)):
        fit = ema.fit_profile(times, [RawProfile()] * 4, 1000, target)
        expected = interval_weights(target, edges)[1:]
        assert (
            fit.coefficients == pytest.approx(expected / expected.sum(), rel=1e-9, abs=1e-12)
            and fit.initial_weight == 0
        )
    # Weights of time 0 are theta(0): they take its share too.
    fit = ema.fit_profile([0, *times], [RawProfile()] * 5, 1000, TraditionalProfile(300))
    expected = interval_weights(TraditionalProfile(300), np.array([0, 50, *edges[1:]]))
    assert fit.coefficients == pytest.approx(np.r_[expected[0] + expected[1], expected[2:]], rel=1e-9)
    assert fit.initial_weight == pytest.approx(fit.coefficients[0])


@pytest.mark.parametrize("target", [PowerProfile(0.05), PowerProfile(0.1), TraditionalProfile(200)], ids=str)
def test_averages_of_raw_weights_converge(target):
    """A smooth path of weights: the error falls as the square of the distance in time."""
    n = 4096

    def path(t):
        return torch.as_tensor(3 * np.asarray(t) / n).sin()[..., None]

    edges = np.arange(n + 1.0)
    weights = interval_weights(target, edges)
    expected = torch.from_numpy(weights[1:]) @ path(edges[1:] - 0.5) + weights[0] * path(0.0)
    errors = []
    for snapshots in (32, 64, 128):
        times = [n * (i + 1) // snapshots for i in range(snapshots)]
        fit = ema.fit_profile(times, [RawProfile()] * snapshots, n, target)
        errors.append(abs(float(combine([path(float(t)) for t in times], fit.coefficients) - expected)))
    assert errors[2] < errors[1] / 3 < errors[0] / 9 and errors[2] < 1e-3


@pytest.mark.parametrize("target", [PowerProfile(0.03), PowerProfile(0.15), TraditionalProfile(300)], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_raw_weights_combined_with_averages(target, zero):
    """The error told is that of the densities, by brute force; no other combination does better."""
    times, kinds = snapshot_times((PowerProfile(0.1), TraditionalProfile(700), RawProfile()), 6, 600)
    if zero:
        times, kinds = (0, *times), (RawProfile(), *kinds)
    fit = ema.fit_profile(times, kinds, 600, target)
    t_1, fine = 100, 400
    tau = (np.arange(-t_1 * fine, 600 * fine) + 0.5) / fine
    raw = [t for t, p in zip(times, kinds, strict=True) if p == RawProfile()]
    middle = [(a + b) / 2 for a, b in zip(raw, raw[1:], strict=False)]
    starts, ends = [-t_1 if zero else 0, *middle], [*middle, 600]

    def density(t, p):
        if p == RawProfile():
            start, end = starts[raw.index(t)], ends[raw.index(t)]
            return ((tau > start) & (tau <= end)) / (end - start)
        d = Density(*(v[0] for v in ema.densities([t], [p])))
        inside = np.where((tau > 0) & (tau <= t), d.pdf(np.clip(tau, 1e-9, t)), 0)
        return inside + np.where(tau <= 0, d.initial_weight() / t_1, 0)

    P = np.stack([density(t, p) for t, p in zip(times, kinds, strict=True)], 1)
    expected = density(600, target)

    def error(x):
        return float(((P @ (x / x.sum()) - expected) ** 2).sum() / (expected**2).sum())

    assert fit.squared_error == pytest.approx(error(fit.coefficients), rel=2e-3, abs=1e-9)
    free = np.linalg.lstsq(P, expected, rcond=None)[0]
    assert fit.squared_error <= error(free) * 1.01 + 1e-9
    assert fit.squared_error < ema.fit_profile(*snapshot_times((RawProfile(),), 6, 600), 600, target).squared_error


def test_per_tensor_profiles():
    both = ema.PerTensorProfile(
        PowerProfile(0.1), (("enc.*.weight", PowerProfile(0.05)), ("enc.*", TraditionalProfile(7)))
    )
    names = {"enc.0.weight": PowerProfile(0.05), "enc.0.bias": TraditionalProfile(7), "dec.weight": PowerProfile(0.1)}
    assert {name: both.profile_for(name) for name in names} == names
    assert both.profiles == [PowerProfile(0.1), PowerProfile(0.05), TraditionalProfile(7)]


def test_tracker_handles_every_dtype():
    """Averages of 16-bit weights are kept in 32; whole numbers are copied; what has moved is followed."""
    live = {"w": torch.zeros(3, dtype=torch.bfloat16), "n": torch.tensor(0), "ok": torch.tensor([True, False])}
    tracker = ema.Tracker(live, [PowerProfile(0.1), RawProfile()])
    for step in range(1, 101):
        live["w"].fill_(1)
        live["n"].add_(1)
        tracker.update(10 * step, 10 * step + 10)
    average = tracker.averages[PowerProfile(0.1)]
    assert average["w"].dtype == torch.float32 and average["n"] == 100 and average["ok"].tolist() == [True, False]
    # 16 bits of bfloat16 would stand still at 1 - 2^-8
    assert float(average["w"][0]) == pytest.approx(1 - (10 / 1010) ** (PowerProfile(0.1).gamma + 1), abs=1e-6)
    assert tracker.averages[RawProfile()]["w"].eq(1).all()
    tracker.rebind({k: v.clone() for k, v in live.items()} | {"w": torch.full((3,), 2.0)})
    tracker.update(1010, 10**9)
    assert average["w"].tolist() == pytest.approx([2, 2, 2])


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 200), max_size=3), files=st.integers(1, 40), seed=st.integers(0, 9))
def test_linear_combination_in_chunks(shape, files, seed):
    """Every cut into chunks and blocks of files is the plain sum in float64."""
    g = torch.Generator().manual_seed(seed)
    thetas = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(files)]
    x = np.random.default_rng(seed).normal(size=(files, 3)) * np.array([1, 40, 0.1])
    actual = ema.linear_combination(thetas, x)
    expected = torch.einsum("fm,f...->m...", torch.from_numpy(x), torch.stack(thetas))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)
    # Of 32-bit weights, u = 2^-24 (Higham, "Accuracy and Stability", Eq. 3.5): rounding of each coefficient and
    # difference and of a sum of up to BLOCK products, all relative to the sum of magnitudes; then that of the result.
    stored = [theta.float() for theta in thetas]
    single = ema.linear_combination(stored, x)
    full = torch.stack(stored).double()
    expected = torch.einsum("fm,f...->m...", torch.from_numpy(x), full)
    magnitudes = torch.einsum("fm,f...->m...", torch.from_numpy(abs(x)), (full - full[-1]).abs())
    bound = (min(files, TENSORS_PER_BLOCK) + 3) * 2**-24 * magnitudes + 1.01 * 2**-24 * expected.abs()
    assert single.dtype == torch.float32 and (single - expected).abs().le(bound + 1e-40).all()


def test_short_lengths_from_float32_snapshots():
    """Coefficients of norm 42 (MATH.md) on weights that lie near one another lose less than a step of 32 bits."""
    g = torch.Generator().manual_seed(0)
    base, n = torch.randn(4000, generator=g, dtype=torch.float64), 128
    thetas = [(base + 0.01 * torch.randn(4000, generator=g, dtype=torch.float64)).float() for _ in range(n)]
    x = np.random.default_rng(0).normal(size=n)
    x *= 42 / np.linalg.norm(x)
    x[-1] += 1 - x.sum()
    actual = combine(thetas, x).double()
    expected = torch.einsum("f,fk->k", torch.from_numpy(x), torch.stack(thetas).double())
    assert float((actual - expected).norm() / expected.norm()) < 2**-23
    # Not by the sum as it stands: in 32 bits that is ten times worse.
    plain = torch.einsum("f,fk->k", torch.from_numpy(x).float(), torch.stack(thetas)).double()
    assert float((plain - expected).norm()) > 5 * float((actual - expected).norm())


def test_stored_target_among_others_is_bit_equal():
    thetas = [torch.randn(50) for _ in range(5)]
    x = np.eye(5)[:, [1, 4]] + np.array([[0.0, 0.0]] * 5)
    x = np.c_[x, np.full(5, 0.2)]
    actual = ema.linear_combination(thetas, x)
    assert actual[0].equal(thetas[1]) and actual[1].equal(thetas[4])


def test_integer_tensors_and_unused_files():
    counts = [torch.tensor([i, 10 * i]) for i in range(3)]
    assert ema.linear_combination(counts, np.array([[0.3], [0.7], [0.0]])).tolist() == [[1, 10]]
    unused = torch.full((4,), float("nan"))
    assert ema.linear_combination([unused, torch.ones(4)], np.array([[0.0], [1.0]])).equal(torch.ones(1, 4))


# Averages in the host's memory, snapshots in 16 bits.


def train_run(tmp_path, name: str, **settings):
    run = tiny_run(**{"train.total_images": 640, "train.snapshot_every": 64} | settings)
    start_training(run, tmp_path / name, False, QUIET_CONSOLE, lambda text: None)
    return tmp_path / name


def test_averages_in_host_memory_are_identical(tmp_path):
    """On a CPU that is where they are; state and snapshots have the same bytes."""
    plain, host = train_run(tmp_path, "plain"), train_run(tmp_path, "host", **{"ema.device": "cpu"})
    for path in sorted((plain / "snapshots").glob("*.safetensors")):
        a, b = (snapshot.read(folder / "snapshots" / path.name)[0] for folder in (plain, host))
        assert all(a[name].equal(b[name]) for name in a)


def test_float16_snapshots(tmp_path):
    """Half the size, constants untouched, other lengths made from them to float16's rounding; samples are drawn."""
    wide, narrow = train_run(tmp_path, "wide"), train_run(tmp_path, "narrow", **{"ema.snapshot_dtype": "float16"})
    files = [sorted((folder / "snapshots").glob("*.safetensors")) for folder in (wide, narrow)]
    assert files[1][-1].stat().st_size < 0.6 * files[0][-1].stat().st_size
    for a, b in zip(*files, strict=True):
        a, b = snapshot.read(a)[0], snapshot.read(b)[0]
        assert all(b[name].equal(a[name].half()) for name in a)
    targets = [ema.PowerProfile(s) for s in (0.05, 0.075, 0.15)]
    (exact, *_), (created, run, *_) = (snapshot.reconstruct_from_run(folder, targets) for folder in (wide, narrow))
    for a, b in zip(exact, created, strict=True):
        error = sum(float((a[n].float() - b[n].float()).square().sum()) for n in a) ** 0.5
        assert error < 2e-3 * sum(float(v.float().square().sum()) for v in a.values()) ** 0.5
    assert next(snapshot.denoiser_from_weights(created[0], run).parameters()).dtype == torch.float32


def test_values_beyond_float16():
    from gesso.errors import RunError
    from gesso.training.loop import _to_cpu

    with pytest.raises(RunError, match="w has values above 65,504"):
        _to_cpu(torch.tensor([1.0, 7e4]), "w", "float16")
    assert _to_cpu(torch.tensor([7e4]), "w", "same").tolist() == [7e4]


def test_float16_average_would_not_move():
    """There is no float16 EMA: with 1 - beta = 1e-4 a hundredth of the weight is a step below half of the last bit."""
    average, weight = torch.tensor([1.0]).half(), torch.tensor([1.01])
    for _ in range(1000):
        average = average.float().lerp(weight, 1e-4).half()
    assert average.item() == 1.0
