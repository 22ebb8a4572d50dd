"""Averages beside EDM2's published phema.py: buffers that are copied, and the ramp-up of traditional averages."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gesso import config, ema, recipes, snapshot
from gesso.ema import PowerProfile, RawProfile, TraditionalProfile
from gesso.errors import UsageError
from gesso.snapshot import PostHocEMA

# TraditionalEMA.get() after k = 1, 2, 10, 50, 250, 400 steps of 8 images of `walk`, half-life 100 images, by ramp-up.
PUBLISHED_STEPS = (1, 2, 10, 50, 250, 400)
PUBLISHED = {
    None: [[0.9752028245837102, 0.04904964302933754], [0.9001501496347674, 0.005580082296214782],
           [0.5048730665288292, 0.02846311067868615], [0.07685803757580766, -0.02802797875687106],
           [-0.04047311461797611, 0.0021798193851760178], [-0.057742221817354354, 0.03280724912181234]],
    0.05: [[0.540302744270024, 0.9092965596520798], [-0.41521280375337566, -0.7551754454495688],
           [-0.8073727533913844, 0.5318971696738906], [0.12473630938092724, -0.13794097838319197],
           [-0.04056251546920437, 0.0022187555283831595], [-0.057742243643734044, 0.03280725862770668]],
    0.09: [[0.5405101293399628, 0.9088863450417726], [-0.3958060672850122, -0.7213860465993356],
           [-0.6552199947213002, 0.29356254460443576], [0.05504259898323973, -0.078865026612018],
           [-0.04047462142472315, 0.002179557047865152], [-0.05774222218522708, 0.03280724905776515]],
}  # fmt: skip
# PowerFunctionEMA.get() after 400 steps.
POWER = {0.05: [-0.04681617468002284, 0.026577512927894675], 0.1: [-0.020677961167930293, 0.011730722976069065]}


class Module(nn.Module):
    """A parameter, a buffer of floats and one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("b", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))
        self.move(0)

    @torch.no_grad()
    def move(self, k: int) -> None:
        self.w.copy_(torch.tensor([math.cos(k), math.sin(2 * k)], dtype=torch.float64))
        self.b.fill_(math.sin(k))
        self.n.fill_(k)


def walk(folder=None, save_every=0, steps=400, **options):
    """PostHocEMA over the steps; averages after each."""
    module = Module()
    tracked = PostHocEMA(module, **options)
    history = []
    for k in range(1, steps + 1):
        module.move(k)
        tracked.update(8 * k)
        history.append([{n: v.clone() for n, v in average.items()} for average in tracked.tracker.averages.values()])
        if save_every and k % save_every == 0:
            tracked.save(folder)
    return history


@pytest.mark.parametrize("rampup", PUBLISHED)
def test_traditional_ema_equals_published(rampup):
    history = walk(sigma_rels=(), halflives=(100,), rampup=rampup)
    for k, expected in zip(PUBLISHED_STEPS, PUBLISHED[rampup], strict=True):
        (average,) = history[k - 1]
        assert average["w"].tolist() == pytest.approx(expected, rel=1e-12)
        assert float(average["b"]) == math.sin(k) and int(average["n"]) == k


def test_power_ema_equals_published():
    for average, expected in zip(walk()[-1], POWER.values(), strict=True):
        assert average["w"].tolist() == pytest.approx(expected, rel=1e-12)
        assert float(average["b"]) == math.sin(400) and int(average["n"]) == 400


def test_buffers_are_copied_from_the_last_snapshot(tmp_path):
    """At any length and time, and in files that are made of files."""
    walk(tmp_path, 10)
    for until, k in ((3200, 400), (1600, 200)):
        weights = PostHocEMA.reconstruct(tmp_path, 0.15, until)
        assert float(weights["b"]) == math.sin(k) and int(weights["n"]) == k
        assert abs(float(weights["w"][0])) < 0.2  # of a cosine the mean, not the last value
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(tmp_path), [PowerProfile(0.08), PowerProfile(0.1)])
    for path in snapshot.reconstruct_to_files(plan, tmp_path / "made"):
        assert snapshot.read_header(path).buffers == ("b", "n")
    again = PostHocEMA.reconstruct(tmp_path / "made", 0.08)
    assert float(again["b"]) == math.sin(400)


def test_batch_norm(tmp_path):
    """Statistics and count are those of the module when it was last averaged."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    tracked = PostHocEMA(net)
    for k in range(1, 30):
        net(torch.randn(8, 3) * k)
        with torch.no_grad():
            net[0].weight += 1
        tracked.update(8 * k)
    tracked.save(tmp_path)
    weights = PostHocEMA.reconstruct(tmp_path, 0.1)
    for name, value in net.named_buffers():
        assert weights[name].equal(value)
    assert not weights["0.weight"].equal(net[0].weight)
    nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).load_state_dict(weights)


# Densities of averages with a ramp-up.


def density(profile: TraditionalProfile, t: float, tau: np.ndarray) -> np.ndarray:
    """By its definition: rate(tau) exp(-int_tau^t rate), rate = ln 2 / min(h, r tau)."""
    h, r = profile.halflife, profile.rampup
    end, c = h / r, math.log(2) / r
    early = np.minimum(tau, end)
    late = math.log(2) / h * (max(t, end) - np.maximum(tau, end))
    decay = (early / min(t, end)) ** c * np.exp(-late if t > end else 0)
    return np.where(tau <= t, math.log(2) / np.minimum(h, r * tau) * decay, 0)


@pytest.mark.parametrize("t, u", [(300.0, 500.0), (900.0, 2500.0), (3000.0, 2500.0), (2000.0, 2000.0)])
@pytest.mark.parametrize(
    "profile",
    [PowerProfile(0.1), TraditionalProfile(200, 0.2), TraditionalProfile(150), TraditionalProfile(100, 0.05)],
    ids=str,
)
def test_inner_products_of_a_ramp_up(t, u, profile):
    """Ramps end at 1,000 and 2,000 images."""
    ramped = TraditionalProfile(100, 0.1)
    a, b = ema.build_mixture([t], [ramped], 1.0), ema.build_mixture([u], [profile], 1.0)
    # Midpoints; both densities are smooth but where a ramp ends, which lies between two of them.
    n = 2_000_000
    tau = (np.arange(n) + 0.5) * (min(t, u) / n)
    if isinstance(profile, PowerProfile):
        reference = (profile.gamma + 1) / u * (tau / u) ** profile.gamma
    elif profile.rampup is None:
        reference = profile.decay_rate * np.exp(-profile.decay_rate * (u - tau))
    else:
        reference = density(profile, u, tau)
    expected = float((density(ramped, t, tau) * reference).mean() * min(t, u))
    assert float(a.inner_products(b)[0, 0]) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    # All weight is on images seen, none on the initial weights.
    assert a.initial_weight() == pytest.approx([0.0], abs=1e-15) and a.cdf(np.array([t])) == pytest.approx(
        np.ones((1, 1))
    )
    half = float(density(ramped, t, (np.arange(n) + 0.5) * (t / 2 / n)).mean() * t / 2)
    assert float(a.cdf(np.array([t / 2]))[0, 0]) == pytest.approx(half, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("target", [PowerProfile(0.15), TraditionalProfile(120), TraditionalProfile(300, 0.1)], ids=str)
@pytest.mark.parametrize(
    "stored", [(TraditionalProfile(150, 0.05),), (PowerProfile(0.1), TraditionalProfile(150, 0.05))], ids=str
)
def test_other_lengths_from_a_ramp_up(target, stored):
    """Errors fall with the number of snapshots, as without a ramp-up.

    A target without a ramp-up keeps 2^-27 of the initial weights, of which the stored averages have nothing.
    """
    errors = []
    for n in (16, 32, 64, 128):
        pairs = [(3200 * (i + 1) / n, profile) for i in range(n) for profile in stored]
        errors.append(ema.fit_profile(*zip(*pairs, strict=True), 3200, target).squared_error)
    assert np.diff(np.log2(errors)).mean() < -1.5 and errors[-1] < 3e-3


def test_raw_weights_make_a_ramp_up():
    """Their coefficients are what its density integrates to."""
    target, times = TraditionalProfile(100, 0.1), list(range(20, 2001, 20))
    fit = ema.fit_profile(times, [RawProfile()] * len(times), 2000, target)
    edges = np.r_[0, np.arange(30, 2000, 20), 2000]
    tau = (np.arange(2_000_000) + 0.5) / 1000
    parts = np.histogram(tau, edges, weights=density(target, 2000, tau) / 1000)[0]
    np.testing.assert_allclose(fit.coefficients, parts, rtol=1e-5, atol=1e-9)


def test_a_ramp_up_in_files_and_settings(tmp_path):
    walk(tmp_path, 40, halflives=(100,), rampup=0.05)
    actual = {s.profile for s in snapshot.list_snapshots(tmp_path)}
    assert actual == {PowerProfile(0.05), PowerProfile(0.1), TraditionalProfile(100, 0.05)}
    assert any("halflife100-rampup0.05" in path.name for path in (tmp_path / "snapshots").iterdir())
    (weights,) = snapshot.reconstruct(
        snapshot.plan_reconstruction(snapshot.list_snapshots(tmp_path), [TraditionalProfile(100, 0.05)])
    )
    assert weights["w"].tolist() == pytest.approx(PUBLISHED[0.05][-1], rel=1e-12)  # what is stored comes out as stored
    run = recipes.resolve(
        "digits", ["ema.halflives=[1000]", "ema.rampup=.09", "sample.halflife=1000", "sample.rampup=.09"]
    )[0]
    assert ema.sampling_profile(run.sample) == TraditionalProfile(1000, 0.09) == ema.tracked_profiles(run.ema)[-1]
    assert "ramp-up 0.09" in str(ema.sampling_profile(run.sample))
    with pytest.raises(UsageError, match="rampup"):
        recipes.resolve("digits", ["ema.rampup=.9"])
    with pytest.raises(ValueError, match=r"between 0 and ln 2"):
        TraditionalProfile(10, 1.0)
    assert config.EmaConfig().rampup is None
