"""Averages of both kinds against brute force, others rebuilt from them, and their way through snapshots and sampling."""

import json
import shutil

import mpmath
import numpy as np
import pytest
import torch
from conftest import tiny_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from written import QUIET, changed, small, written

from gesso import config, ema, generate, recipes, snapshot
from gesso.ema import Density, Power, Raw, Traditional, combine
from gesso.evaluate import score
from gesso.train import loop
from gesso.train.start import start


@pytest.mark.parametrize(
    "sigma_rel, gamma",
    [(0.05, 16.972198602303447), (0.10, 6.937203937601809), (0.15, 3.5578687748994646), (0.25, 0.71982395800071)],
)
def test_exponents(sigma_rel, gamma):
    assert ema.sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(sigma_rel=st.floats(0.01, 0.288))
def test_exponent_gives_back_the_length(sigma_rel):
    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)  # Eq. 123


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_lengths_without_a_profile(sigma_rel):
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        ema.Power(sigma_rel)


@pytest.mark.parametrize("halflife", [0, -5, float("nan")])
def test_half_lives_that_are_none(halflife):
    with pytest.raises(ValueError, match="above 0"):
        Traditional(halflife)


def test_published_beta():
    assert Power(0.05).beta(20_480_000 - 2048, 20_480_000) == pytest.approx(0.9982043044666998, rel=1e-12)


def test_config_a_in_steps():
    """A half-life of 50M images is 12k steps of 4096, and sigma_rel .034 at the end of 2^31 images (B.1)."""
    profile = Traditional(50_000_000)
    assert profile.beta(0, 4096) ** 12_207 == pytest.approx(0.5, abs=1e-4)
    assert round(1 / profile.k / 2**31, 3) == 0.034  # a long exponential's standard deviation is 1/k


PROFILES = [Power(0.05), Power(0.1), Power(0.2), Traditional(7), Traditional(2000), Traditional(10**9)]


def shares(profile: ema.Profile, edges: np.ndarray) -> np.ndarray:
    """Weights of theta(0) and of the theta of each interval between the edges, 0 to t, by the primitive of p."""
    t = edges[-1]
    if isinstance(profile, Power):
        cdf = (edges / t) ** (profile.gamma + 1)
    else:
        cdf = 2.0 ** (-(t - edges) / profile.halflife)
    return np.diff(cdf, prepend=0.0)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(1, 5000), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_tracking_equals_the_integral_at_any_interval(steps, seed):
    """theta_hat(t) = int p(t) theta(t) dt + m theta(0), theta piecewise constant (Eq. 112-120), updates any distance apart."""
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
        wanted = torch.from_numpy(shares(profile, np.array(times, np.float64))) @ torch.stack(values)
        torch.testing.assert_close(average.averages[profile]["w"], wanted, rtol=1e-9, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(gamma=st.floats(0.05, 500), exponent=st.floats(-8, 5))
def test_kummers_function(gamma, exponent):
    """M(1, gamma+2, -z) = e^-z M(gamma+1, gamma+2, z), in 40 digits."""
    z = 10**exponent
    with mpmath.workdps(40):
        wanted = mpmath.hyp1f1(1, mpmath.mpf(gamma) + 2, -mpmath.mpf(z), maxterms=10**6)
        assert float(abs(ema.kummer(np.float64(gamma), np.float64(z)) / wanted - 1)) < 1e-13


def test_kummers_closed_cases():
    assert ema.kummer(np.array([3.0, 0.0]), np.array([0.0, 0.0])).tolist() == [1, 1]
    assert ema.kummer(np.float64(0), np.float64(1e-9)) == pytest.approx(1 - 0.5e-9, rel=1e-15)
    for z in (0.3, 40.0):  # the quadrature goes over into the closed forms
        assert ema.kummer(np.float64(1e-13), np.float64(z)) == pytest.approx(-np.expm1(-z) / z, rel=1e-12)
    assert ema.kummer(np.float64(5), np.float64(1e-13)) == pytest.approx(1, rel=1e-12)


def curve(kind: str, t: float, length: float) -> Density:
    """One density: gamma or the half-life given."""
    return Density(*np.float64((t, length, 0.0) if kind == "power" else (t, 0.0, np.log(2) / length)))


def integral(*curves: Density) -> mpmath.mpf:
    """Of the product of densities, by quadrature in 25 digits on pieces that are short where it is steep."""
    with mpmath.workdps(25):
        T = min(mpmath.mpf(float(c.t)) for c in curves)
        rate = sum(mpmath.mpf(float(c.k)) + (float(c.gamma) + 1) / T for c in curves)

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


curves = st.one_of(
    st.builds(lambda t, length: curve("power", t, length), st.floats(0.01, 1), st.floats(0.1, 60)),
    st.builds(lambda t, x: curve("traditional", t, 10**x), st.floats(0.01, 1), st.floats(-4, 2)),
)


@settings(max_examples=60, deadline=None)
@given(a=curves, b=curves)
def test_inner_products_equal_integrals(a, b):
    """Gamma from .1 to 60, half-lives from 1e-4 to 100 of the time, in any pair, at any two times."""
    ours = float(ema.inner_products(a, b))
    assert ours == float(ema.inner_products(b, a)) and np.isfinite(ours)
    assume(ours > 1e-280)
    assert float(abs(ours / integral(a, b) - 1)) < 1e-10


@settings(max_examples=20, deadline=None)
@given(a=curves)
def test_all_weights_sum_to_1(a):
    assert float(integral(a)) + float(a.initial()) == pytest.approx(1, rel=1e-12)


def test_inner_products_of_two_power_profiles_are_eq_151():
    a, b = curve("power", 0.6, 3.0), curve("power", 1.0, 7.0)
    assert float(ema.inner_products(a, b)) == pytest.approx(4 * 8 * 0.6**7 / 11, rel=1e-14)


def test_far_ends_overflow_nowhere():
    t = [1, 10**4, 10**6, 2 * 10**9]
    profiles = [Power(1e-3), Power(0.2886), Traditional(1), Traditional(10**15)]
    row = ema.densities([time for time in t for _ in profiles], profiles * len(t), 2e9)
    products = ema.inner_products(Density(*(values[:, None] for values in row)), row)
    assert np.isfinite(products).all() and (products >= 0).all() and (products.diagonal() > 0).all()
    assert products == pytest.approx(products.T, rel=1e-13)


N = 2048
FAR = 10.0
"""theta(0) lies far from all that follows: what it spoils is seen"""


def walk(n=N, size=16):
    """A random walk of weights, and its brute-force average of any profile at any time."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(n, size, generator=g, dtype=torch.float64).cumsum(0) / n**0.5
    theta = torch.cat([FAR * torch.randn(1, size, generator=g, dtype=torch.float64), theta])

    def average(profile, end=n):
        return torch.from_numpy(shares(profile, np.arange(end + 1, dtype=np.float64))) @ theta[: end + 1]

    return theta, average


class Memory:
    def __init__(self, tensor):
        self.tensor = tensor

    def like(self, name):
        return self.tensor.to("meta")

    def part(self, name, start, stop):
        return self.tensor.reshape(-1)[start:stop]


def summed(readers, x):
    return ema.combined(readers, x[:, None], "w")[0]


def kept(profiles, snapshots=32, n=N, end=None):
    """Times and profiles of what a run stores up to `end`."""
    pairs = [(n * (i + 1) // snapshots, p) for i in range(snapshots) for p in profiles]
    times, kinds = zip(*[(t, p) for t, p in pairs if t <= (end or n)], strict=True)
    return times, kinds


TWO = (Power(0.05), Power(0.1))


def rebuilt(average, target, profiles=TWO, end=None, dtype=torch.float64, **how):
    times, kinds = kept(profiles, end=end, **how)
    fit = ema.solve(times, kinds, end or N, target)
    assert fit.x.sum() == pytest.approx(1)
    readers = [Memory(average(p, t).to(dtype)) for t, p in zip(times, kinds, strict=True)]
    return summed(readers, fit.x), fit


def distance(ours, wanted):
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "sigma_rel, bound",
    [(0.03, 5e-3), (0.075, 5e-3), (0.15, 5e-3), (0.2, 5e-3), (0.25, 1e-2)],  # MATH: slower convergence at .25
)
def test_other_lengths_from_snapshots(sigma_rel, bound):
    _, average = walk()
    ours, fit = rebuilt(average, Power(sigma_rel))
    wanted = average(Power(sigma_rel))
    assert distance(ours, wanted) < bound
    assert fit.error < (1e-3 if sigma_rel <= 0.2 else 2e-3) and fit.initial == 0
    # It is not merely one of the stored ones.
    assert min((average(Power(s)) - wanted).norm() for s in (0.05, 0.1)) > 5 * (ours - wanted).norm()


MIXED = (Power(0.05), Power(0.1), Traditional(N // 20), Traditional(10 * N))


@pytest.mark.parametrize("target", MIXED, ids=str)
@pytest.mark.parametrize("end", [N, N // 2])
def test_what_is_stored_comes_out_as_stored(target, end):
    _, average = walk()
    ours, fit = rebuilt(average, target, MIXED, end=end)
    assert ours.equal(average(target, end)) and fit.error == 0 and (fit.x != 0).sum() == 1
    assert fit.initial == pytest.approx(shares(target, np.array([0.0, end]))[0])


def test_a_past_time():
    _, average = walk()
    ours, _ = rebuilt(average, Power(0.15), end=1024)
    assert distance(ours, average(Power(0.15), 1024)) < 5e-3
    with pytest.raises(ValueError, match="nothing is stored"):
        ema.solve([100], [Power(0.1)], 50, Power(0.1))
    with pytest.raises(ValueError, match="nothing is stored"):
        ema.solve([], [], 50, Power(0.1))


@pytest.mark.parametrize(
    "profiles, target, slope",
    [
        ((Power(0.05), Power(0.1)), Power(0.075), -4),  # MATH: squared error of the profile ~ 1/n^4 with two profiles
        ((Traditional(500),), Power(0.1), -2),  # 1/n^2 with one
        ((Traditional(10**4),), Power(0.1), -2),
        ((Traditional(50), Traditional(500)), Power(0.1), -4),
        ((Power(0.1), Traditional(500)), Power(0.15), -4),
        ((Power(0.05), Power(0.1)), Traditional(100), -4),
    ],
    ids=str,
)
def test_errors_fall_with_the_number_of_snapshots(profiles, target, slope):
    errors = [ema.solve(*kept(profiles, n), N, target).error for n in (16, 32, 64, 128)]
    assert np.diff(np.log2(errors)).mean() == pytest.approx(slope, abs=0.5)


def test_other_profiles_from_one_half_life():
    """Power targets, and other half-lives, from many traditional snapshots: as in theory, so of weights."""
    _, average = walk()
    for target in (Power(0.05), Power(0.1), Power(0.2), Traditional(150)):
        far, near = (rebuilt(average, target, (Traditional(100),), snapshots=n) for n in (16, 128))
        assert near[1].error < far[1].error / 20 and near[1].error < 2e-3
        assert distance(near[0], average(target)) < 5e-3
        assert distance(near[0], average(target)) < distance(far[0], average(target))


@pytest.mark.parametrize("target", [Power(0.02), Power(0.15), Power(0.25), Traditional(300)], ids=str)
@pytest.mark.parametrize("profiles", [MIXED, (Traditional(100),), (Power(0.1), Traditional(N))], ids=str)
def test_a_combination_of_averages_is_that_of_profiles(profiles, target):
    """Averages that a tracker made of a random trajectory, against the integral of sum_i x_i p_i, and m."""
    n = 256
    theta = torch.randn(n + 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    live = theta[0].clone()
    tracker = ema.Tracker({"w": live}, profiles)
    times, kinds = kept(profiles, 8, n)
    readers, last = [], 0
    for t in range(1, n + 1):
        live.copy_(theta[t])
        tracker.update(last, t)
        last = t
        if t in times:
            readers += [Memory(tracker.averages[p]["w"].clone()) for p in profiles]
    fit = ema.solve(times, kinds, n, target)
    fine = 4000  # midpoints in every step
    tau = (np.arange(n * fine) + 0.5) / fine
    stored = ema.densities(times, kinds)
    p = np.zeros_like(tau)
    for i, x in enumerate(fit.x):
        inside = tau <= times[i]
        p[inside] += x * Density(*(v[i] for v in stored)).at(tau[inside])
    weights = np.r_[fit.initial, p.reshape(n, fine).mean(1)]
    ours = summed(readers, fit.x)
    torch.testing.assert_close(ours, torch.from_numpy(weights) @ theta, rtol=1e-5, atol=1e-5)
    # The error told is that of the profile; theta(0) counts as the weights of the first snapshot's time before 0.
    wanted = Density(*(v[0] for v in ema.densities([n], [target])))
    gap = ((p - wanted.at(tau)) ** 2).mean() * n + (fit.initial - wanted.initial()) ** 2 / times[0]
    norm = (wanted.at(tau) ** 2).mean() * n + wanted.initial() ** 2 / times[0]
    assert fit.error == pytest.approx(gap / norm, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("halflife", [100, N, 10 * N, 1000 * N])
@pytest.mark.parametrize("beside", [(), (Power(0.034), Power(0.05))], ids=str)
@pytest.mark.parametrize("sigma_rel", [0.1, 0.25])
def test_initial_weights_stay_out_of_power_targets(halflife, beside, sigma_rel):
    """Even where the stored averages are theta(0) almost alone, in a run much shorter than the half-life.

    Least squares between the densities alone has theta(0) at a weight of .9 here, and results 10 lengths away.
    """
    _, average = walk()
    profiles = (*beside, Traditional(halflife))
    ours, fit = rebuilt(average, Power(sigma_rel), profiles, snapshots=128)
    assert abs(fit.initial) < 2e-4 and fit.error < 1e-3
    assert distance(ours, average(Power(sigma_rel))) < 5e-3


def test_the_weight_of_theta_0_is_told():
    """Half of this target is theta(0), which power profiles hold nothing of."""
    target = Traditional(N)
    without = ema.solve(*kept((Power(0.05), Power(0.1))), N, target)
    assert without.initial == 0 and without.error > 0.5 and "initial" not in str(without)
    within = ema.solve(*kept((Power(0.05), Power(0.1), Traditional(5 * N))), N, target)
    assert within.initial == pytest.approx(0.5, abs=1e-2) and within.error < 1e-3
    assert "weight of the initial weights 0.5" in str(within)


def test_one_snapshot_stands_for_all():
    fit = ema.solve([100], [Traditional(50)], 100, Power(0.1))
    assert fit.x.tolist() == [1] and fit.initial == 0.25


@pytest.mark.parametrize(
    "profiles, bound",
    [
        ((Power(0.034), Power(0.05), Traditional(round(0.0233 * N))), 2e-5),  # CONFIG A: all about alike at the end
        ((Power(0.05), Power(0.1), Traditional(2 * N)), 2e-5),
        ((Traditional(100 * N), Traditional(101 * N)), 1e-3),  # less than 1% of them is not theta(0)
        ((Power(0.1), Power(0.1)), 2e-6),
    ],
    ids=str,
)
def test_averages_that_nearly_coincide(profiles, bound):
    """Coefficients stay small, so that float32 averages give what float64 ones would."""
    _, average = walk()
    for target in (Power(0.07), Power(0.15), Traditional(100)):
        exact, _ = rebuilt(average, target, profiles, snapshots=256)
        rounded, _ = rebuilt(average, target, profiles, snapshots=256, dtype=torch.float32)
        assert distance(rounded.double(), exact) < bound
        assert distance(exact, average(target)) < 2e-3


def test_several_targets_in_one_pass():
    readers = [Memory(torch.randn(2, 3)) for _ in range(4)]
    x = np.random.default_rng(0).normal(size=(4, 2))
    together = ema.combined(readers, x, "w")
    for j in range(2):
        torch.testing.assert_close(together[j], summed(readers, x[:, j]))


# Snapshots, settings, sampling.

HALF = {"ema.halflives": "[1000]"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with sigma_rel .05, .1 and a half-life of 1000 at image 640; their weights differ."""
    path = tmp_path_factory.mktemp("half") / "run"
    written(path, **HALF)
    return path


@pytest.fixture
def gesso(gesso):
    """Type a command; returns (exit code, all it says on one line)."""

    def type_in(*words: object) -> tuple[int, str]:
        code, out, err = gesso(*words)
        return code, " ".join((out + err).split())

    return type_in


def test_snapshots_know_their_profile(folder):
    found = snapshot.stored(folder)
    assert [s.path.name for s in found] == [
        f"nimg000000000640-{name}.safetensors" for name in ("ema0.0500", "ema0.1000", "halflife1000")
    ]
    assert [s.profile for s in found] == [Power(0.05), Power(0.1), Traditional(1000)]
    for one in found:
        tensors, _, meta = snapshot.read(one.path)
        (made,), _, time, (fit,) = snapshot.synthesize(folder, [one.profile])
        assert meta == one and time == 640 and fit.error == 0
        assert all(made[k].equal(tensors[k]) for k in tensors)
    assert fit.initial == pytest.approx(2**-0.64)


def test_snapshots_of_before_half_lives(tmp_path):
    run = small()
    tree = config.as_tree(run)
    del tree["ema"]["halflives"], tree["sample"]["halflife"]
    description = {"format": "gesso snapshot 1", "nimg": 640, "sigma_rel": 0.05, "run": tree}
    path = tmp_path / "snapshots" / "nimg000000000640-ema0.0500.safetensors"
    path.parent.mkdir()
    save_file({"w": torch.ones(3)}, path, {"gesso": json.dumps(description)})
    assert snapshot.read(path)[1] == run
    assert snapshot.stored(tmp_path) == [snapshot.Snapshot(path, 640, Power(0.05))]
    # The files of power profiles are still written under this name, with these keys in this order.
    assert snapshot.path_for(path.parent, 640, Power(0.05)) == path
    snapshot.write(path, {"w": torch.ones(3)}, 640, Power(0.05), run)
    assert list(snapshot._description(path)) == list(description)


def test_training_resumes_bit_equal_and_samples(tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    run = small(**HALF, **{"ema.sigma_rels": "[]", "sample.halflife": 1000})
    start(run, out, False, QUIET, print)
    shutil.copytree(out, again)
    shutil.rmtree(again / "state" / max(p.name for p in (again / "state").iterdir()))
    shutil.rmtree(again / "snapshots")
    start(run, again, True, QUIET, print)
    last = snapshot.stored(out)[-1].path
    assert last.name == "nimg000000000048-halflife1000.safetensors"
    assert last.read_bytes() == (again / "snapshots" / last.name).read_bytes()
    recorded = config.read(out / "run.yaml")
    lines = generate.draw(out, recorded, generate.Asked(seeds="0-1"), tmp_path / "made")
    assert "half-life 1,000, image 48" in lines[-1] and "weight of the initial weights 0.97" in lines[-1]


def test_a_trained_average_is_the_sum_over_its_steps(monkeypatch, tmp_path):
    """theta_hat = 2^(-t/h) theta(0) + sum of (1 - beta) beta^(steps after it) theta, from the weights of every step."""
    run = small(**HALF)
    seen = []
    step = loop.Trainer.step

    def stepping(self):
        before = {k: v.clone() for k, v in self.ema.live.items()}
        loss = step(self)
        seen.extend([before] if not seen else [])
        seen.append({k: v.clone() for k, v in self.ema.live.items()})
        return loss

    monkeypatch.setattr(loop.Trainer, "step", stepping)
    start(run, tmp_path / "run", False, QUIET, print)
    tensors, _, meta = snapshot.read(snapshot.stored(tmp_path / "run")[-1].path)
    assert meta.profile == Traditional(1000) and len(seen) == 4
    beta = 2 ** (-16 / 1000)
    for name, tensor in tensors.items():
        wanted = beta**3 * seen[0][name] + sum((1 - beta) * beta ** (2 - i) * seen[i + 1][name] for i in range(3))
        torch.testing.assert_close(tensor, wanted)


def pictures(path):
    return [p.read_bytes() for p in sorted(path.glob("seed*.png"))]


def test_sampling_on_the_command_line(gesso, folder, tmp_path):
    code, said = gesso("sample", folder, "sample.halflife=1k", "--seeds", "0-2", "--out", tmp_path / "half")
    assert (
        code == 0 and "half-life 1,000, image 640 (relative error of the profile 0.0e+00, weight of the initial" in said
    )
    assert gesso("sample", folder, "--seeds", "0-2", "--out", tmp_path / "power")[0] == 0
    code, said = gesso("sample", folder, "sample.halflife=700", "--seeds", "0-2", "--out", tmp_path / "made")
    assert code == 0 and "half-life 700" in said
    half, power, made = (pictures(tmp_path / name) for name in ("half", "power", "made"))
    assert len(half) == 3 and half != power and half != made
    # What was drawn is what the stored file says.
    tensors, run, _ = snapshot.read(folder / "snapshots" / "nimg000000000640-halflife1000.safetensors")
    drawn = changed(run, **{"sample.halflife": 1000})
    direct = snapshot.denoiser(tensors, drawn)
    cond, _ = generate.conditions.build(drawn, range(3), None, [0, 1, 2])
    for seed, image in enumerate(torch.cat(list(generate.generate(direct, drawn, range(3), cond)))):
        generate.save_png(generate.picture(image), tmp_path / "direct" / f"seed{seed:06d}.png")
    assert half == pictures(tmp_path / "direct")
    names = {p.name for p in (folder / "samples").iterdir()} if (folder / "samples").exists() else set()
    assert gesso("sample", folder, "sample.halflife=1000", "--seeds", "0")[0] == 0
    assert {p.name for p in (folder / "samples").iterdir()} - names == {"halflife-1000"}


def test_other_averages_on_the_command_line(gesso, folder, tmp_path):
    code, said = gesso("ema", folder, "--halflife", "1k", "--halflife", "300", "--sigma-rel", "0.07", "--out", tmp_path)
    assert code == 0 and "half-life 300 at image 640" in said and "sigma_rel 0.07 at image 640" in said
    assert "sample.halflife=300" in said
    made = {p.name: snapshot.read(p)[2].profile for p in tmp_path.iterdir()}
    assert sorted(map(str, made.values())) == ["half-life 1,000", "half-life 300", "sigma_rel 0.07"]
    assert "nimg000000000640-halflife300.safetensors" in made


@pytest.mark.parametrize(
    "words, said",
    [
        (["ema", "--halflife", "soon"], "write a number of images above 0"),
        (["ema", "--halflife", "0"], "write a number of images above 0"),
        (["ema"], "say --sigma-rel or --halflife"),
        (["ema", "--halflife", "50M", "--nimg", "10"], "no snapshot up to image 10"),
        (["sample", "sample.halflife=0"], "greater than 0"),
        (["sample", "sample.halflife=-1"], "sample.halflife"),
        (["sample", "sample.halflife=1.5"], "sample.halflife"),
        (["sample", "sample.halflife=1000", "--nimg", "10"], "no snapshot up to image 10"),
        (["sample", "ema.halflives=[5]"], "settled by training"),
    ],
)
def test_refused_on_the_command_line(gesso, folder, words, said, tmp_path):
    code, told = gesso(words[0], folder, *words[1:], "--out", tmp_path / "out")
    assert code == 2 and said in told and "Traceback" not in told and not (tmp_path / "out").exists()


def test_a_length_beside_a_half_life_is_not_passed_over_in_silence(gesso, tmp_path):
    written(tmp_path / "run", **HALF, **{"sample.halflife": 1000})
    assert "sample.sigma_rel=0.1 sample.halflife=null" in gesso("ema", tmp_path / "run", "--sigma-rel", "0.1")[1]
    code, said = gesso("sample", tmp_path / "run", "sample.sigma_rel=0.1")
    assert code == 2 and "no effect" in said and "sample.halflife=null" in said
    code, said = gesso("sample", tmp_path / "run", "sample.sigma_rel=0.1", "sample.halflife=null", "--seeds", "0")
    assert code == 0 and "sigma_rel 0.1" in said


def test_guided_by_a_half_life(folder, tmp_path, monkeypatch):
    """A guiding network stands at its own run's half-life; self at another length."""
    other = tmp_path / "other"
    written(other, **HALF, **{"sample.halflife": 1000})
    run = config.read(folder / "run.yaml")
    asked = []
    synthesize = snapshot.synthesize
    monkeypatch.setattr(snapshot, "synthesize", lambda *a: asked.append((a[0], a[1])) or synthesize(*a))
    guide = {"sample.guidance": 3, "sample.guide": other}
    generate.guide_of(folder, changed(run, **guide))
    generate.guide_of(folder, changed(run, **guide, **{"sample.guide_sigma_rel": 0.1}))
    assert asked == [(other, [Traditional(1000)]), (other, [Power(0.1)])]
    weak = {"sample.guidance": 3, "sample.guide": "self", "sample.guide_sigma_rel": 0.05}
    with pytest.raises(Exception, match="is the same network"):
        generate.guide_of(folder, changed(run, **weak))
    assert generate.guide_of(folder, changed(run, **weak, **{"sample.halflife": 1000})) is not None


def test_evaluation_takes_the_half_life(folder, monkeypatch):
    class Enough(Exception):
        pass

    def asked(place, profiles, nimg=None):
        raise Enough(profiles)

    monkeypatch.setattr(snapshot, "synthesize", asked)
    run = changed(config.read(folder / "run.yaml"), **{"sample.halflife": 1000, "eval.sweep": "[0.07]"})
    with pytest.raises(Enough) as caught:
        score.evaluate_folder(folder, run, lambda done, total: None)
    assert caught.value.args[0] == [Traditional(1000), Power(0.07)]


@pytest.mark.parametrize(
    "given, said",
    [
        (["ema.sigma_rels=[]"], "at least one length"),
        (["ema.halflives=[5,5]"], "each once"),
        (["ema.halflives=[0]"], "greater than 0"),
        (["ema.halflives=[1.5]"], "fractional part"),
    ],
)
def test_settings_that_are_refused(given, said):
    with pytest.raises(Exception, match=said):
        recipes.resolve("digits", given)


def test_config_a():
    """B.1: a half-life of 50M images, with the ramp-up of EDM's framework; the other steps have power profiles."""
    run = recipes.resolve("edm2-ladder-a", [])[0]
    assert ema.chosen(run.sample) == Traditional(50_000_000, 0.05) in ema.tracked(run.ema)
    rest = [recipes.resolve(f"edm2-ladder-{step}", [])[0] for step in "bcdefg"]
    assert all(r.ema.halflives == () and isinstance(ema.chosen(r.sample), Power) for r in rest)
    assert recipes.resolve("digits", ['ema.halflives=["50M","200k"]'])[0].ema.halflives == (50_000_000, 200_000)


# Raw weights, tensors of any kind.


def test_raw_weights_stand_for_the_times_around_them():
    """Their coefficients are what the target's profile integrates to, from midpoint to midpoint."""
    times = [100, 200, 400, 800]
    edges = np.array([0, 150, 300, 600, 1000.0])
    for target in (Power(0.05), Power(0.2), Traditional(300)):
        fit = ema.solve(times, [Raw()] * 4, 1000, target)
        wanted = shares(target, edges)[1:]
        assert fit.x == pytest.approx(wanted / wanted.sum(), rel=1e-9, abs=1e-12) and fit.initial == 0
    # Weights of time 0 are theta(0): they take its share too.
    fit = ema.solve([0, *times], [Raw()] * 5, 1000, Traditional(300))
    wanted = shares(Traditional(300), np.array([0, 50, *edges[1:]]))
    assert fit.x == pytest.approx(np.r_[wanted[0] + wanted[1], wanted[2:]], rel=1e-9)
    assert fit.initial == pytest.approx(fit.x[0])


@pytest.mark.parametrize("target", [Power(0.05), Power(0.1), Traditional(200)], ids=str)
def test_averages_of_raw_weights_converge(target):
    """A smooth path of weights: the error falls as the square of the distance in time."""
    n = 4096

    def path(t):
        return torch.as_tensor(3 * np.asarray(t) / n).sin()[..., None]

    edges = np.arange(n + 1.0)
    weights = shares(target, edges)
    wanted = torch.from_numpy(weights[1:]) @ path(edges[1:] - 0.5) + weights[0] * path(0.0)
    errors = []
    for snapshots in (32, 64, 128):
        times = [n * (i + 1) // snapshots for i in range(snapshots)]
        fit = ema.solve(times, [Raw()] * snapshots, n, target)
        errors.append(abs(float(summed([Memory(path(float(t))) for t in times], fit.x) - wanted)))
    assert errors[2] < errors[1] / 3 < errors[0] / 9 and errors[2] < 1e-3


@pytest.mark.parametrize("target", [Power(0.03), Power(0.15), Traditional(300)], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_raw_weights_beside_averages(target, zero):
    """The error told is that of the densities, by brute force; no other combination does better."""
    times, kinds = kept((Power(0.1), Traditional(700), Raw()), 6, 600)
    if zero:
        times, kinds = (0, *times), (Raw(), *kinds)
    fit = ema.solve(times, kinds, 600, target)
    t_1, fine = 100, 400
    tau = (np.arange(-t_1 * fine, 600 * fine) + 0.5) / fine
    raw = [t for t, p in zip(times, kinds, strict=True) if p == Raw()]
    middle = [(a + b) / 2 for a, b in zip(raw, raw[1:], strict=False)]
    starts, ends = [-t_1 if zero else 0, *middle], [*middle, 600]

    def density(t, p):
        if p == Raw():
            start, end = starts[raw.index(t)], ends[raw.index(t)]
            return ((tau > start) & (tau <= end)) / (end - start)
        d = Density(*(v[0] for v in ema.densities([t], [p])))
        inside = np.where((tau > 0) & (tau <= t), d.at(np.clip(tau, 1e-9, t)), 0)
        return inside + np.where(tau <= 0, d.initial() / t_1, 0)

    P = np.stack([density(t, p) for t, p in zip(times, kinds, strict=True)], 1)
    wanted = density(600, target)

    def error(x):
        return float(((P @ (x / x.sum()) - wanted) ** 2).sum() / (wanted**2).sum())

    assert fit.error == pytest.approx(error(fit.x), rel=2e-3, abs=1e-9)
    free = np.linalg.lstsq(P, wanted, rcond=None)[0]
    assert fit.error <= error(free) * 1.01 + 1e-9
    assert fit.error < ema.solve(*kept((Raw(),), 6, 600), 600, target).error


def test_a_profile_per_tensor():
    both = ema.PerTensor(Power(0.1), (("enc.*.weight", Power(0.05)), ("enc.*", Traditional(7))))
    names = {"enc.0.weight": Power(0.05), "enc.0.bias": Traditional(7), "dec.weight": Power(0.1)}
    assert {name: both.of(name) for name in names} == names
    assert both.profiles == [Power(0.1), Power(0.05), Traditional(7)]


def test_tensors_of_every_kind_are_tracked():
    """Averages of 16-bit weights are kept in 32; whole numbers are copied; what has moved is followed."""
    live = {"w": torch.zeros(3, dtype=torch.bfloat16), "n": torch.tensor(0), "ok": torch.tensor([True, False])}
    tracker = ema.Tracker(live, [Power(0.1), Raw()])
    for step in range(1, 101):
        live["w"].fill_(1)
        live["n"].add_(1)
        tracker.update(10 * step, 10 * step + 10)
    average = tracker.averages[Power(0.1)]
    assert average["w"].dtype == torch.float32 and average["n"] == 100 and average["ok"].tolist() == [True, False]
    # 16 bits of bfloat16 would stand still at 1 - 2^-8
    assert float(average["w"][0]) == pytest.approx(1 - (10 / 1010) ** (Power(0.1).gamma + 1), abs=1e-6)
    assert tracker.averages[Raw()]["w"].eq(1).all()
    tracker.follow({k: v.clone() for k, v in live.items()} | {"w": torch.full((3,), 2.0)})
    tracker.update(1010, 10**9)
    assert average["w"].tolist() == pytest.approx([2, 2, 2])


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 200), max_size=3), files=st.integers(1, 40), seed=st.integers(0, 9))
def test_sums_by_parts(shape, files, seed):
    """Every cut into chunks and blocks of files is the plain sum in float64."""
    g = torch.Generator().manual_seed(seed)
    thetas = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(files)]
    x = np.random.default_rng(seed).normal(size=(files, 3)) * np.array([1, 40, 0.1])
    ours = ema.combined([Memory(theta) for theta in thetas], x, "w")
    wanted = torch.einsum("fm,f...->m...", torch.from_numpy(x), torch.stack(thetas))
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-10)
    # Of 32-bit weights, u = 2^-24 (Higham, "Accuracy and Stability", Eq. 3.5): rounding of each coefficient and difference and
    # of a sum of up to BLOCK products, all relative to the sum of magnitudes; then that of the result.
    stored = [theta.float() for theta in thetas]
    single = ema.combined([Memory(theta) for theta in stored], x, "w")
    whole = torch.stack(stored).double()
    wanted = torch.einsum("fm,f...->m...", torch.from_numpy(x), whole)
    magnitudes = torch.einsum("fm,f...->m...", torch.from_numpy(abs(x)), (whole - whole[-1]).abs())
    bound = (min(files, combine.BLOCK) + 3) * 2**-24 * magnitudes + 1.01 * 2**-24 * wanted.abs()
    assert single.dtype == torch.float32 and (single - wanted).abs().le(bound + 1e-40).all()


def test_short_lengths_from_32_bits():
    """Coefficients of norm 42 (MATH.md) on weights that lie near one another lose less than a step of 32 bits."""
    g = torch.Generator().manual_seed(0)
    base, n = torch.randn(4000, generator=g, dtype=torch.float64), 128
    thetas = [(base + 0.01 * torch.randn(4000, generator=g, dtype=torch.float64)).float() for _ in range(n)]
    x = np.random.default_rng(0).normal(size=n)
    x *= 42 / np.linalg.norm(x)
    x[-1] += 1 - x.sum()
    ours = summed([Memory(theta) for theta in thetas], x).double()
    wanted = torch.einsum("f,fk->k", torch.from_numpy(x), torch.stack(thetas).double())
    assert float((ours - wanted).norm() / wanted.norm()) < 2**-23
    # Not by the sum as it stands: in 32 bits that is ten times worse.
    plain = torch.einsum("f,fk->k", torch.from_numpy(x).float(), torch.stack(thetas)).double()
    assert float((plain - wanted).norm()) > 5 * float((ours - wanted).norm())


def test_a_stored_target_among_others_is_bit_equal():
    thetas = [torch.randn(50) for _ in range(5)]
    x = np.eye(5)[:, [1, 4]] + np.array([[0.0, 0.0]] * 5)
    x = np.c_[x, np.full(5, 0.2)]
    ours = ema.combined([Memory(theta) for theta in thetas], x, "w")
    assert ours[0].equal(thetas[1]) and ours[1].equal(thetas[4])


def test_whole_numbers_and_unused_files_in_sums():
    counts = [Memory(torch.tensor([i, 10 * i])) for i in range(3)]
    assert ema.combined(counts, np.array([[0.3], [0.7], [0.0]]), "w").tolist() == [[1, 10]]
    unused = Memory(torch.full((4,), float("nan")))
    assert ema.combined([unused, Memory(torch.ones(4))], np.array([[0.0], [1.0]]), "w").equal(torch.ones(1, 4))


# Averages in the host's memory, snapshots in 16 bits.


def trained_with(tmp_path, name: str, **settings):
    run = tiny_run(**{"train.total_images": 640, "train.snapshot_images": 64} | settings)
    start(run, tmp_path / name, False, QUIET, lambda text: None)
    return tmp_path / name


def test_averages_in_the_hosts_memory_are_the_same(tmp_path):
    """On a CPU that is where they are; state and snapshots have the same bytes."""
    plain, host = trained_with(tmp_path, "plain"), trained_with(tmp_path, "host", **{"ema.device": "cpu"})
    for path in sorted((plain / "snapshots").glob("*.safetensors")):
        a, b = (snapshot.read(folder / "snapshots" / path.name)[0] for folder in (plain, host))
        assert all(a[name].equal(b[name]) for name in a)


def test_snapshots_in_sixteen_bits(tmp_path):
    """Half the size, constants untouched, other lengths made from them to float16's rounding; samples are drawn."""
    wide, narrow = trained_with(tmp_path, "wide"), trained_with(tmp_path, "narrow", **{"ema.snapshots": "float16"})
    files = [sorted((folder / "snapshots").glob("*.safetensors")) for folder in (wide, narrow)]
    assert files[1][-1].stat().st_size < 0.6 * files[0][-1].stat().st_size
    for a, b in zip(*files, strict=True):
        a, b = snapshot.read(a)[0], snapshot.read(b)[0]
        assert all(b[name].equal(a[name].half()) for name in a)
    targets = [ema.Power(s) for s in (0.05, 0.075, 0.15)]
    (exact, *_), (made, run, *_) = (snapshot.synthesize(folder, targets) for folder in (wide, narrow))
    for a, b in zip(exact, made, strict=True):
        error = sum(float((a[n].float() - b[n].float()).square().sum()) for n in a) ** 0.5
        assert error < 2e-3 * sum(float(v.float().square().sum()) for v in a.values()) ** 0.5
    assert next(snapshot.denoiser(made[0], run).parameters()).dtype == torch.float32


def test_numbers_that_sixteen_bits_do_not_hold():
    from gesso.errors import RunError
    from gesso.train.loop import _narrowed

    with pytest.raises(RunError, match="w has numbers above 65,504"):
        _narrowed(torch.tensor([1.0, 7e4]), "w", "float16")
    assert _narrowed(torch.tensor([7e4]), "w", "same").tolist() == [7e4]


def test_a_float16_average_would_stand_still():
    """Why there is no such setting: with 1 - beta of 1e-4 a hundredth of the weight is a step below half of the last bit."""
    average, weight = torch.tensor([1.0]).half(), torch.tensor([1.01])
    for _ in range(1000):
        average = average.float().lerp(weight, 1e-4).half()
    assert average.item() == 1.0
