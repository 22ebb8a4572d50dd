"""Quality against EMA length: what is measured, kept, fitted, plotted and refused."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.run_factory import with_settings, write_run
from PIL import Image

from gesso import config, models, recipes, sampling, snapshot
from gesso.ema import PerTensorProfile, PowerProfile
from gesso.errors import RunError, UsageError
from gesso.evaluation import ema_curves, ema_sweep, results, toy_evaluation
from gesso.evaluation.ema_curves import CurvePoint
from gesso.evaluation.results import Evaluation
from gesso.interop import edm2
from gesso.published.edm2 import FIGURE_5B_LAYERS

QUICK = ["sample.steps=2", "sample.sampler=euler"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "run"
    write_run(path)
    return path


@pytest.fixture
def folder(run_folder):
    for name in ("metrics.json", "ema_sweep.png"):
        (run_folder / name).unlink(missing_ok=True)
    return run_folder


def record(folder):
    """The recorded points, by length and repeat."""
    rows = [ema_sweep.curve_row(evaluation) for evaluation in results.read_evaluations(folder).values()]
    return sorted(rows, key=lambda row: (row["sigma_rel"], row["repeat"]))


def test_points_are_measured_once(gesso_text, folder, monkeypatch):
    drawn = []
    real = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *a: drawn.append(a[1].sample.guidance) or real(*a))
    code, output = gesso_text("ema", folder, "--sweep", ".05:.2:3", *QUICK)
    assert code == 0 and "Frechet distance" in output and drawn == [1.5] * 3, output
    rows = record(folder)
    assert [row["sigma_rel"] for row in rows] == [0.05, 0.1, 0.2]
    assert {row["guidance"] for row in rows} == {1.5} and "best" in output
    # The value is that of the weights, drawn and scored by hand.
    run = with_settings(config.load_config(folder / "run.yaml"), **dict(s.split("=") for s in QUICK))
    weights = snapshot.reconstruct_from_run(folder, [PowerProfile(0.1)])[0][0]
    evaluator = toy_evaluation.open_toy_evaluator(folder, run)
    images = torch.cat(list(real(snapshot.denoiser_from_weights(weights, run), run, range(898), evaluator.cond)))
    assert rows[1].items() >= evaluator.values(images).items() and "frechet_distance" in evaluator.values(images)
    # Again: nothing is drawn. Another guidance, another length: these alone.
    before = (folder / "metrics.json").read_text()
    drawn.clear()
    code, output = gesso_text("ema", folder, "--sweep", ".05:.2:3", "--metric", "class_accuracy", *QUICK)
    assert code == 0 and drawn == [] and "assigns to their class" in output and "3 points evaluated before" in output
    assert "sample.guidance=1.5 sample.sigma_rel=" in output
    assert (folder / "metrics.json").read_text() == before
    gesso_text("ema", folder, "--sweep", ".05:.2:3", "--guidance", "1,1.5", *QUICK)
    assert drawn == [1.0] * 3
    gesso_text("ema", folder, "--sweep", ".05:.2:5", *QUICK)
    assert drawn == [1.0] * 3 + [1.5] * 2 and len(record(folder)) == 8
    # Another protocol begins anew and leaves the old one.
    gesso_text("ema", folder, "--sweep", ".05:.2:3", "sample.steps=3", "sample.sampler=euler")
    assert len(record(folder)) == 11
    with Image.open(folder / "ema_sweep.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_stopped_and_gone_on(gesso_text, folder, monkeypatch):
    real, calls = sampling.generate, []

    def stops(*a):
        calls.append(a)
        if len(calls) == 3:
            raise RunError("stopped")
        return real(*a)

    monkeypatch.setattr(sampling, "generate", stops)
    assert gesso_text("ema", folder, "--sweep", ".05:.2:4", *QUICK)[0] == 1
    assert len(record(folder)) == 2
    assert gesso_text("ema", folder, "--sweep", ".05:.2:4", *QUICK)[0] == 0
    assert len(calls) == 5 and len(record(folder)) == 4


def test_repetitions_have_other_seeds(gesso_text, folder):
    code, _ = gesso_text("ema", folder, "--sweep", ".05:.2:3", "--num-repeats", "2", *QUICK)
    rows = record(folder)
    assert code == 0 and [(r["sigma_rel"], r["repeat"]) for r in rows] == [
        (s, i) for s in (0.05, 0.1, 0.2) for i in (0, 1)
    ]
    assert all(a["frechet_distance"] != b["frechet_distance"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_some_tensors_alone(gesso_text, folder, monkeypatch):
    requested = []
    plan = snapshot.plan_reconstruction
    monkeypatch.setattr(snapshot, "plan_reconstruction", lambda *a: requested.append(a[1]) or plan(*a))
    names = [name for name in snapshot.read(snapshot.list_snapshots(folder)[0].path)[0] if name.endswith("weight")]
    glob = names[0].rsplit(".", 1)[0] + ".*"
    code, output = gesso_text(
        "ema", folder, "--sweep", ".05:.2:3", "--tensors", glob, "--tensors", "*bias", "--sigma-rel", "0.09", *QUICK
    )
    assert code == 0, output
    assert requested == [
        [
            PerTensorProfile(PowerProfile(0.09), ((g, PowerProfile(s)),))
            for g in (glob, "*bias")
            for s in (0.05, 0.1, 0.2)
        ]
    ]
    rows = record(folder)
    assert {(r["tensors"], r["rest"]) for r in rows} == {(glob, "sigma_rel 0.09"), ("*bias", "sigma_rel 0.09")}
    assert f"guidance 1.5, {glob} with the rest at sigma_rel 0.09: best" in output and "next:" not in output
    assert len({r["frechet_distance"] for r in rows}) == 6


def test_shapes_are_read_back(gesso_text, tmp_path):
    write_run(tmp_path / "run", "shapes-class")
    code, output = gesso_text("ema", tmp_path / "run", "--sweep", ".05:.2:3", "--metric", "kind", "sample.steps=1")
    assert code == 0 and "share of drawn shapes whose kind matches" in output, output
    assert all({"kind", "all"} <= row.keys() for row in record(tmp_path / "run"))
    code, output = gesso_text("ema", tmp_path / "run", "--sweep", ".05:.2:3", "--metric", "place")
    assert code == 2 and "has all, kind, border" in output


@pytest.mark.parametrize("text",
["", "1", ".02:.25", "a:b:c", ".02:.25:2", ".25:.02:5", "0:.2:5", ".02:.3:5", ".02:.25:5.5",
                                  ".1:.1001:9", "nan:.2:5"])  # fmt: skip
def test_malformed_sweeps(text):
    with pytest.raises(UsageError, match="--sweep"):
        ema_sweep.parse_sweep(text)


def test_lengths_lie_at_equal_ratios():
    grid = ema_sweep.parse_sweep(".02:.25:12")
    assert len(grid) == 12 and grid[0] == 0.02 and grid[-1] == 0.25
    assert np.diff(np.log(grid)) == pytest.approx(np.full(11, math.log(12.5) / 11), abs=0.005)


@pytest.mark.parametrize(
    "words, output",
    [
        (["--sweep", ".02-.25"], "write LOW:HIGH:COUNT"),
        (["--sweep", ".05:.2:3", "--metric", "fid"], "eval.toy_metrics=digits has frechet_distance, class_accuracy"),
        (["--sweep", ".05:.2:3", "--guidance", "1;2"], "write numbers such as 1,1.5,2"),
        (["--sweep", ".05:.2:3", "--tensors", "a=0.1"], "write the GLOB alone"),
        (["--sweep", ".05:.2:3", "--tensors", "nothing*"], "no tensor is named nothing*"),
        (["--sweep", ".05:.2:3", "--sigma-rel", "0.1"], "is the length of the tensors that --tensors does not name"),
        (["--sweep", ".05:.2:3", "--tensors", "*", "--sigma-rel", "0.1", "--sigma-rel", "0.2"], "give only one"),
        (["--sweep", ".05:.2:3", "--nimg", "10"], "no snapshot up to image 10"),
        (["--sweep", ".05:.2:3", "train.seed=3"], "fixed by training"),
        (["--sweep", ".05:.2:3", "eval.toy_metrics=none"], "has no metric for --sweep"),
        (["--sweep", ".05:.2:3", "--files", "{nimg}"], "--files has no effect with --sweep"),
    ],
)
def test_refused(gesso_text, folder, words, output):
    code, recorded = gesso_text("ema", folder, *words)
    assert code == 2 and output in recorded and "Traceback" not in recorded and not (folder / "metrics.json").exists()


def test_a_strange_record_is_left_alone(gesso_text, folder):
    for text in ("{}", "[", '{"format": "x", "evaluations": {}}'):
        (folder / "metrics.json").write_text(text)
        code, output = gesso_text("ema", folder, "--sweep", ".05:.2:3", *QUICK)
        assert code == 1 and "was not written by this version of gesso evaluate" in output
        assert (folder / "metrics.json").read_text() == text


def test_two_sweeps_at_once_lose_no_row(gesso_text, folder, monkeypatch):
    """While one measures its first point, another begins and ends."""
    real, nested = sampling.generate, []

    def during(*a, **k):
        if not nested:
            nested.append(True)
            nested.append(gesso_text("ema", folder, "--sweep", ".04:.1:3", *QUICK))
        return real(*a, **k)

    monkeypatch.setattr(sampling, "generate", during)
    code, output = gesso_text("ema", folder, "--sweep", ".05:.2:3", *QUICK)
    assert code == 0 and nested[1][0] == 0, output
    assert [row["sigma_rel"] for row in record(folder)] == [0.04, 0.05, 0.0632, 0.1, 0.2]  # .1 of both, once
    assert "(2 points evaluated before)" in output


def test_processes_that_write_one_record(tmp_path):
    def add(worker: int) -> None:
        for i in range(10):
            results.record_evaluation(tmp_path, Evaluation({"worker": worker, "point": i}))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    assert len(results.read_evaluations(tmp_path)) == 60


def test_the_layers_of_figure_5b_by_name(gesso_text, folder):
    run = recipes.resolve("edm2-img512-s", ["data.num_classes=1000"])[0]
    with torch.device("meta"):
        net = models.build_network(run.net, run.input_spec)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    layers = {name: edm2.name_of_paper_layer(name, run.net, run.input_spec) for name in FIGURE_5B_LAYERS}
    assert len(set(layers.values())) == 28 and set(layers.values()) <= shapes.keys()
    c = run.net.channels
    assert shapes[layers["enc-64x64-conv"]] == (c, 5, 3, 3) and shapes[layers["enc-8x8-block0-skip"]] == (
        4 * c,
        3 * c,
        1,
        1,
    )
    assert shapes[layers["dec-64x64-up-affine"]] == (2 * c, 4 * c) and shapes[layers["map-label"]] == (4 * c, 1000)
    assert edm2.name_of_paper_layer("dec-8x8-block0-conv", run.net, run.input_spec) is None
    wanted = ema_sweep.sweep_points([run], ema_sweep.EmaSweepArgs(".05:.2:3", tensors=["figure5b"], sigma_rels=[0.13]))
    assert len(wanted) == 28 * 3
    assert wanted[3].extra == {"tensors": "enc-64x64-block0-conv0", "rest": "sigma_rel 0.13"}
    assert wanted[3].run.sample.sigma_rel == 0.05
    assert wanted[3].target == PerTensorProfile(
        PowerProfile(0.13), (("encoder.0.conv_res0.weight", PowerProfile(0.05)),)
    )
    code, output = gesso_text("ema", folder, "--sweep", ".05:.2:3", "--tensors", "figure5b", *QUICK)
    assert code == 2 and "layers of EDM2's U-Net" in output


# The optimum.

GRID = np.geomspace(0.02, 0.25, 12)


def curve(f, repeats=1, noise=0.0, shift=0.0, seed=0):
    """f of ln sigma_rel, with noise of each point, and a shift along it of each repetition."""
    rng = np.random.default_rng(seed)
    shifts = shift * rng.normal(size=repeats)
    return {
        float(s): CurvePoint(tuple(f(math.log(s) - d) + noise * rng.normal() for d in shifts), 0.0, 0.0) for s in GRID
    }  # fmt: skip


@pytest.mark.parametrize("at", [0.03, 0.0777, 0.13])
@pytest.mark.parametrize("sign", [1, -1])
def test_parabola_is_fitted_exactly(at, sign):
    actual = ema_curves.find_optimum(
        curve(lambda x: sign * (3 + 2 * (x - math.log(at)) ** 2)), lower_is_better=sign == 1
    )
    assert actual.sigma_rel == pytest.approx(at, rel=1e-9) and actual.value == pytest.approx(sign * 3)
    assert actual.low == pytest.approx(at, rel=1e-6) and actual.high == pytest.approx(at, rel=1e-6)


@pytest.mark.parametrize("repeats, noise, shift", [(1, 0.02, 0.0), (4, 0.0, 0.1), (4, 0.02, 0.05)])
def test_the_error_is_as_large_as_it_says(repeats, noise, shift):
    """One standard error holds the truth in about two of three cases, the estimate being of few numbers."""
    at, inside = 0.075, []
    for seed in range(300):
        actual = ema_curves.find_optimum(
            curve(lambda x: 3 + (x - math.log(at)) ** 2, repeats, noise, shift, seed), lower_is_better=True
        )
        if actual.low and actual.high:
            inside.append(actual.low <= at <= actual.high)
    assert len(inside) > 250 and 0.5 < np.mean(inside) < 0.75, np.mean(inside)


def test_where_there_is_no_inner_optimum():
    assert "may lie below" in ema_curves.find_optimum(curve(lambda x: x), True).note
    assert "may lie above" in ema_curves.find_optimum(curve(lambda x: x), False).note
    assert "same value" in ema_curves.find_optimum(curve(lambda x: 1.0), True).note
    values = [3, 3, 1, 3, 3.0, 2, 1.1, 2, 3, 3, 3, 3]
    spiky = {float(s): CurvePoint((v,), 0.0, 0.0) for s, v in zip(GRID, [1.0, 0.0, 0.9, -0.5, *[0.9] * 8], strict=True)}
    assert ema_curves.find_optimum(spiky, True).sigma_rel == pytest.approx(GRID[3], rel=0.2)
    narrow = {float(s): CurvePoint((v,), 0.0, 0.0) for s, v in zip(GRID[:3], values[1:4], strict=True)}
    assert "no error known" in ema_curves.find_optimum(narrow, True).note


def test_inaccurate_lengths_are_not_the_best():
    points = curve(lambda x: 3 + (x - math.log(0.08)) ** 2)
    first = min(points)
    points[first] = CurvePoint((0.0,), 0.0, 0.32)  # by far the best value, of weights that are not of this length
    best = ema_curves.find_optimum(points, True)
    assert best.sigma_rel == pytest.approx(0.08, rel=1e-6) and best.value == pytest.approx(3)
    lines = ema_curves.curve_table({"guidance 1": points}, lower_is_better=True)
    assert "3.2e-01!" in lines[1] and "*" not in lines[1] and sum(line.count("*") for line in lines) == 1
    only = {s: point._replace(profile_error=0.5) for s, point in points.items()}
    assert ema_curves.find_optimum(only, True).sigma_rel == first  # nothing else to compare


def test_sweep_warns_of_inaccurate_lengths(gesso_text, folder):
    code, output = gesso_text("ema", folder, "--sweep", ".005:.1:3", *QUICK)
    assert code == 0 and "warning: the snapshots cannot reconstruct sigma_rel 0.005" in output
    assert "so the optimum ignores" in output and "accurate are sigma_rel" in output


def test_the_table_marks_the_best():
    actual = {"guidance 1": curve(lambda x: (x - math.log(GRID[4])) ** 2), "guidance 2": curve(lambda x: -x)}
    lines = ema_curves.curve_table(actual, lower_is_better=True)
    assert len(lines) == 13 and lines[5].count("*") == 1 and lines[12].count("*") == 1
