"""Tables of EDM2 and gesso: published numbers, claims, shared trainings, costs, closed forms."""

import functools
import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.run_factory import write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from gesso import config, ema, models, recipes
from gesso.data.synthetic import with_synthetic_data
from gesso.diffusion import denoiser, process
from gesso.errors import UsageError
from gesso.evaluation import results
from gesso.evaluation.results import Evaluation
from gesso.interop import edm2 as interop
from gesso.models import flops
from gesso.models.published import PUBLISHED_MODELS
from gesso.papers import TABLES
from gesso.papers.berrada2024.common_settings import MIXED_RESOLUTION
from gesso.papers.edm2 import setups
from gesso.papers.edm2.ema import TINY_LAYERS
from gesso.papers.edm2.setups import PAPER_SETUP, SMALL_SETUP, TINY_SETUP
from gesso.papers.gesso import tables
from gesso.published.edm2 import COST_512, FIGURE_5B_LAYERS, PRESETS_512
from gesso.recipes.edm2 import LADDER_CONFIGS
from gesso.reproduce import analytic, claims, compute_cost, measurements, plan, runner
from gesso.reproduce.schema import (
    DIVERGED,
    SCALES,
    UNTRAINED_METHODS,
    Column,
    ColumnGroup,
    Measurement,
    Row,
    Scale,
    Table,
    Training,
)

NAMES = [name for name in TABLES if name.startswith(("edm2/", "gesso/"))]
TABLE_SCALES = [(name, scale) for name in NAMES for scale in TABLES[name]().scales]
OUT = Path("nowhere")


@functools.cache
def jobs(name, scale):
    return plan.plan_jobs(TABLES[name](), scale, (0,), OUT)


@functools.cache
def keys(name, scale):
    return {one.key for one in plan.unique_trainings(jobs(name, scale))}


def job(*settings, trained=None, guide=None):
    return plan.MeasurementJob("r", ColumnGroup({}, {}), 0, trained, guide, settings, OUT)


def test_all_requested_tables_exist():
    figures = ("1", "3", "4", "5a", "5b", "5c", "6", "8", "9", "10", "11a", "11b", "12", "13", "14", "23", "24")
    names = (*"123456", *(f"fig{n}" for n in figures), "rates", "lambda", "fp16", "mpcat")
    assert {f"edm2/{name}" for name in names} | {"gesso/equal", "gesso/both"} == set(NAMES)


@pytest.mark.parametrize(
    "table, row, column, value",
    [
        ("1", "CONFIG A", "FID", 8.00), ("1", "CONFIG D", "FID", 3.75), ("1", "CONFIG F", "Gflops", 102.1),
        ("1", "CONFIG C", "Mparams", 277.8), ("2", "ADM-U", "FID, guided", 3.85), ("2", "RIN", "NFE", 1000),
        ("2", "EDM2-XXL", "FID, guided", 1.81), ("2", "EDM2-M", "FID", 2.25), ("2", "U-ViT, L", "Gflops", 555),
        ("3", "EDM2-L", "FID", 1.33), ("3", "ADM + EDM sampling", "FID, stochastic", 1.57),
        ("3", "ADM + EDM training", "NFE", 79),
        ("4", "L", "FID", 1.86), ("4", "XXL", "Tflops", 70.8), ("4", "S", "Gparams", 1.80),
        ("5", "EDM2-S", "FD", 68.64), ("5", "EDM2-XL", "FD, guided", 35.67),
        ("6", "512 L", "Training, Zflops", 1.59), ("6", "512 M", "Guided, Tflops", 15.52),
        ("6", "64 XL", "Sampling, Tflops", 25.57),
        ("6", "512 XS", "FD of DINOv2, guided", 79.94), ("6", "64 M", "FID", 1.43),
        ("fig9", "DiT-XL/2", "teraflops of a sample", 250 * 0.525 + 1.2609), ("fig5a", "3.4 %", "CONFIG A", 8.00),
        ("fig5a", "9 %", "CONFIG B", 7.24), ("fig6", "2.5 %", "guidance 1.4", 2.23),
        ("fig14", "19 %", "FD, CONFIG G", 68.64),
        ("fig8", "EDM2-XXL, guided", "billions of parameters", 1.5232 + 0.1247),
        ("fig10", "EDM2-S, 100 %", "EDM2-S", 2.56),
    ],
)  # fmt: skip
def test_published_numbers(table, row, column, value):
    assert TABLES[f"edm2/{table}"]().published()[row, column] == pytest.approx(value, rel=1e-12)


def test_repeated_numbers_agree():
    """The counts of Tables 1 and 2 agree with those of models/published.py."""
    known = {p.name: {f.quantity: f.value for f in p.numbers} for p in PUBLISHED_MODELS}
    for step, ladder_config in LADDER_CONFIGS.items():
        layers = known[f"edm2-config-{step.lower()}"]
        assert layers["macs"] == pytest.approx(ladder_config.cost.gflops * 1e9) and layers[
            "parameters"
        ] / 1e6 == pytest.approx(ladder_config.cost.params, abs=0.06)
    for size, cost in COST_512.items():
        layers = known[f"edm2-{size.lower()}"]
        assert round(cost.gflops) == pytest.approx(layers["macs"] / 1e9, abs=1) and layers[
            "parameters"
        ] / 1e6 == pytest.approx(cost.params, abs=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_claims_hold_on_the_published_numbers(name):
    table = TABLES[name]()
    columns = {column.name for column in table.columns}
    assert all(set(row.published) <= columns for row in table.rows) and table.claims
    effects = [claims.compute_effect(table, claim, table.published()) for claim in table.claims]
    assert all(effect is None or effect > 0 for effect in effects), list(
        zip([c.text for c in table.claims], effects, strict=True)
    )
    if name in ("edm2/1", "edm2/2", "edm2/3", "edm2/4", "edm2/5", "edm2/6", "edm2/fig1", "edm2/fig8", "edm2/fig9"):
        assert None not in effects


@pytest.mark.parametrize("name, scale", TABLE_SCALES)
def test_every_job_is_valid(name, scale):
    """All settings are valid, and every row and column of a group is one of the table."""
    table = TABLES[name]()
    planned_jobs, seen = jobs(name, scale), set()
    assert planned_jobs and scale in SCALES
    rows, columns = {row.name for row in table.rows}, {column.name for column in table.columns}
    filled_cells = [(one.row, column) for one in planned_jobs for column in one.group.columns]
    assert {row for row, _ in filled_cells} <= rows and {column for _, column in filled_cells} <= columns
    twice = {cell for cell in filled_cells if filled_cells.count(cell) > 1} if len(filled_cells) < 200 else set()
    assert all(one.group.select for one in planned_jobs for column in one.group.columns if (one.row, column) in twice)
    for one in planned_jobs:
        assert one.group.method in measurements.MEASUREMENT_METHODS
        overrides = tuple(one.overrides)
        if one.training and (one.training.run.recipe, overrides) not in seen:
            seen.add((one.training.run.recipe, overrides))
            run = config.resolve(config.to_dict(one.training.run), list(overrides))[0]
            assert (
                not run.eval.metrics
                or one.group.method in UNTRAINED_METHODS
                or one.group.method in ("metrics", "tensors")
            )
            measured = set(one.group.columns.values())
            if one.group.method in ("metrics", "tensors") and one.group.protocol is None:
                scores = {
                    "fd_digits": {"fd_digits"},
                    "fd_fashion": {"fd_fashion"},
                    "loss": {"loss"},
                    "class_accuracy": {"1-class_accuracy"},
                    "fd_shapes": {"fd_shapes"},
                    "shape_accuracy": {"1-all"},
                }
                assert measured <= set().union(*(scores[s] for s in run.eval.metrics))


@pytest.mark.parametrize(
    "scale", ["tiny", pytest.param("small", marks=pytest.mark.slow), pytest.param("paper", marks=pytest.mark.slow)]
)
def test_every_network_can_be_built(scale):
    built = set()
    for name in NAMES:
        for one in plan.unique_trainings(jobs(name, scale)) if scale in TABLES[name]().scales else ():
            run = with_synthetic_data(one.run)[0]
            if (run.net, run.input_spec) not in built:
                built.add((run.net, run.input_spec))
                with torch.device("meta"):
                    models.build_network(run.net, run.input_spec)
            assert run.train.total_images >= run.train.snapshot_every * 10
    assert len(built) >= 10


def test_trainings_are_shared():
    for scale in ("tiny", "small"):
        assert (
            keys("edm2/1", scale) == keys("edm2/fig5a", scale) == keys("edm2/fig11a", scale) > keys("edm2/fig3", scale)
        )
    for scale in ("tiny", "paper"):
        # edm2/1 and the figure have the same measurements, except counts.
        table, figure = (
            {one.path for one in jobs(n, scale) if one.group.method == "metrics"} for n in ("edm2/1", "edm2/fig5a")
        )
        assert table == figure
        assert keys("edm2/fig5b", scale) < keys("edm2/1", scale) and keys("edm2/fig5c", scale) < keys("edm2/1", scale)
        assert (
            keys("edm2/2", scale)
            == keys("edm2/5", scale)
            == keys("edm2/fig1", scale)
            == keys("edm2/fig9", scale)
            <= keys("edm2/6", scale)
        )
        assert keys("edm2/fig6", scale) < keys("edm2/2", scale) and keys("edm2/fig10", scale) < keys("edm2/2", scale)
        assert len(keys("edm2/fig13", scale) & keys("edm2/rates", scale)) == 3  # the recipe, 30k and 160k
        assert keys("edm2/fig13", scale) & keys("edm2/1", scale) and keys("edm2/lambda", scale) & keys("edm2/1", scale)
        assert keys("edm2/fig12", scale) & keys("edm2/2", scale) and keys("edm2/fig14", scale) <= keys(
            "edm2/1", scale
        ) | keys("edm2/2", scale)
    # CONFIG G is EDM2-S.
    assert (
        TINY_SETUP.sizes["S"] == TINY_SETUP.configs["G"]
        and PAPER_SETUP.sizes["S"] == PAPER_SETUP.configs["G"] == PAPER_SETUP.edm2_s
    )
    every = {
        key
        for name in NAMES
        if name.startswith("edm2/") and "tiny" in TABLES[name]().scales
        for key in keys(name, "tiny")
    }
    # The ladder 7, sizes 2, guides 3, decays 4, rates 2, dropout, lambda, balances 5.
    assert len(every) == 25


@pytest.mark.parametrize("setup", [TINY_SETUP, SMALL_SETUP, PAPER_SETUP], ids=["tiny", "small", "paper"])
def test_setups(setup):
    """The ladder is that of the paper, one change after another; times are those of snapshots."""
    runs = {step: recipes.resolve(t.recipe, list(t.settings))[0] for step, t in setup.configs.items()}
    for step, run in runs.items():
        assert step in (getattr(run.net, "config", "G"),)
        assert (run.optim.schedule == "inverse_sqrt") == (step in "EFG") and (run.net.dropout > 0) == (step != "G")
        assert (run.loss.weighting == "native") == (step == "A") and run.sample.guidance == 1
        assert run.monitor.magnitude_every <= run.train.total_images / 10
    assert runs["A"].process.P_mean < runs["B"].process.P_mean == runs["G"].process.P_mean
    guide = setup.guides["XS"]
    run = recipes.resolve(guide.recipe, list(guide.settings))[0]
    assert run.semantic.kind == "none" and run.net.channels < runs["G"].net.channels
    plain = recipes.resolve(setup.edm2_s.recipe, list(setup.edm2_s.settings))[0]
    assert plain.net.name == "edm2" and plain.net.channels == runs["G"].net.channels and plain.optim == runs["G"].optim
    for t in (*setup.configs.values(), *setup.sizes.values()):
        train = recipes.resolve(t.recipe, list(t.settings))[0].train
        for share in (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)):
            nimg = int(setups.at_fraction(t, share)[0].partition("=")[2])
            assert nimg % train.batch_size == 0
            # A snapshot is written if a multiple of snapshot_every lies in the step that ends at nimg.
            assert nimg // train.snapshot_every > (nimg - train.batch_size) // train.snapshot_every
    assert setups.at_fraction(setup.configs["G"], Fraction(1)) == ()


def test_overfitting_is_at_537m_images():
    trained = PAPER_SETUP.sizes["XXL"]
    assert (
        setups.at_fraction(trained, Fraction(4, 7)) == (f"eval.nimg={512 * 2**20}",)
        and PRESETS_512["XXL"].total_images == 896 * 2**20
    )


# Costs.


LARGER = [pytest.param(size, marks=pytest.mark.slow) for size in COST_512 if size != "XS"]


@pytest.mark.parametrize("size", ["XS", *LARGER])
def test_counts_are_table_6s(size):
    """The paper's count is 1 % larger (weight normalization, elementwise operations)."""
    table = TABLES["edm2/6"]()
    actual = {}
    for one in jobs("edm2/6", "paper"):
        if one.group.method == "counts" and one.row == f"512 {size}":
            numbers = compute_cost.measure_counts(one)["values"]
            actual |= {column: numbers[name] for column, name in one.group.columns.items()}
    published = next(row for row in table.rows if row.name == f"512 {size}").published
    assert actual["Mparams"] == pytest.approx(published["Mparams"], abs=0.06)
    for column in ("Gflops", "Training, Zflops", "Sampling, Tflops", "Guided, Tflops"):
        assert 0.984 < actual[column] / published[column] < 1.0, column


def test_costs_by_their_rules():
    """Costs are 63 evaluations, three forward passes per image, the decoder and a guide; training up to eval.nimg."""
    network = plan.plan_training(PAPER_SETUP.sizes["XS"], 0, OUT)
    guide = plan.plan_training(PAPER_SETUP.guides["XS"], 0, OUT)
    guided = ("sample.guidance=1.4", "sample.guide_run=somewhere")
    plain, both, half_cost, alone = (
        compute_cost.measure_counts(job(*overrides, trained=network, guide=by))["values"]
        for overrides, by in (
            ((), None), (guided, guide), (("eval.nimg=512M",), None), (("sample.guidance=2", "dropout.both=.1"), None)
        )
    )  # fmt: skip
    assert plain["nfe"] == 63 and plain["sampling_macs"] == pytest.approx((63 * plain["gmacs"] + 1260.9) / 1000)
    assert plain["training_macs"] == pytest.approx(3 * plain["gmacs"] * 1e9 * 2**31 / 1e21)
    assert half_cost["training_macs"] / plain["training_macs"] == pytest.approx(512e6 / 2**31)
    xs = compute_cost.measure_counts(job(trained=guide))["values"]
    assert both["sampling_macs"] == pytest.approx(plain["sampling_macs"] + 63 * xs["gmacs"] / 1000)
    assert both["params_with_guide"] == pytest.approx((plain["params"] + xs["params"]) / 1000)
    assert alone["sampling_macs"] == pytest.approx(
        plain["sampling_macs"] + 63 * plain["gmacs"] / 1000
    )  # guidance without a guide: two evaluations
    run = with_synthetic_data(network.run)[0]
    assert plain["gflops"] == flops.count_flops(run.net, run.input_spec).table_a1_flops / 1e9
    digits = compute_cost.measure_counts(job(trained=plan.plan_training(TINY_SETUP.sizes["S"], 0, OUT)))["values"]
    assert digits["sampling_macs"] == pytest.approx(20 * digits["gmacs"] / 1000)  # Euler, pixels
    with_ten = models.build_network(
        *(lambda r: (r.net, r.input_spec._replace(num_classes=10)))(
            plan.plan_training(TINY_SETUP.sizes["S"], 0, OUT).run
        )
    )
    assert digits["params"] * 1e6 == sum(p.numel() for p in with_ten.parameters())


def test_gesso_networks_have_equal_compute():
    for scale in ("tiny", "small"):
        compute = {}
        for one in plan.unique_trainings(jobs("gesso/equal", scale)):
            run = with_synthetic_data(one.run)[0]
            run = run.model_copy(
                update={"data": run.data.model_copy(update={"num_classes": 10 if scale == "tiny" else 6})}
            )
            compute[run.net.name] = flops.training_macs(run.net, run.input_spec) * run.train.total_images
            assert run.loss.weighting == "uncertainty" and run.optim.ref_images == run.train.total_images // 5
        assert len(compute) == {"tiny": 3, "small": 4}[scale] and max(compute.values()) / min(compute.values()) < 1.05
    assert set(tables.SMALL_IMAGES) == set(tables.SMALL_NETWORKS)


def test_combinations_differ_by_their_settings():
    runs = {
        row: recipes.resolve("digits", [*MIXED_RESOLUTION, *overrides])[0]
        for row, overrides in tables.COMBINATIONS.items()
    }
    assert runs["baseline"] == runs["post-hoc EMA"]
    changed = {row: {path for path, _, _ in config.differences(runs["baseline"], run)} for row, run in runs.items()}
    assert changed["control"] == {"control.variables", "control.alpha"} and changed["uncertainty"] == {"loss.weighting"}
    assert changed["all"] == changed["control"] | changed["uncertainty"]
    lengths = {one.row: sorted(s for s in one.settings if "sigma_rel" in s) for one in jobs("gesso/both", "tiny")}
    assert lengths["baseline"] == lengths["control"] == ["sample.sigma_rel=0.1"]
    assert sum(one.row == "all" for one in jobs("gesso/both", "tiny")) == 6


# Weights of Figure 5b.


@pytest.mark.parametrize("step", ["B", "G"])
def test_the_layers_of_figure_5b(step):
    """Published names match parameters of the networks; TINY_LAYERS are those of the tiny networks."""
    for setup, expected in ((PAPER_SETUP, FIGURE_5B_LAYERS), (TINY_SETUP, TINY_LAYERS)):
        training = setup.configs[step]
        run = with_synthetic_data(recipes.resolve(training.recipe, [*training.settings, "data.source=x"])[0])[0]
        with torch.device("meta"):
            shapes = {
                name: tuple(p.shape) for name, p in models.build_network(run.net, run.input_spec).named_parameters()
            }
        inputs = run.input_spec._replace(resolution=measurements.EDM2_LATENT_RESOLUTION)
        table = {name: interop.name_of_paper_layer(name, run.net, inputs) for name in FIGURE_5B_LAYERS}
        layers = {name: layer_name for name, layer_name in table.items() if layer_name in shapes}
        assert tuple(layers) == expected and len(set(layers.values())) == len(layers)
        c, E = run.net.channels, run.net.embedding_width
        kernel = {"conv0": 3, "conv1": 3, "skip": 1}
        assert c * (4 if setup is PAPER_SETUP else 2) == E
        for name, layer_name in layers.items():
            shape, part = shapes[layer_name], name.split("-")[-1]
            if part in kernel:
                assert shape[2:] == (kernel[part],) * 2
            assert part != "affine" or (len(shape) == 2 and shape[1] == E)
        assert shapes[layers["enc-64x64-conv"]][0] == c and shapes[layers["map-label"]] == (E, 1000)
        if setup is PAPER_SETUP:
            assert shapes[layers["enc-8x8-block0-skip"]] == (4 * c, 3 * c, 1, 1)
            assert shapes[layers["dec-8x8-in0-affine"]][0] == 4 * c * (2 if step == "B" else 1)  # B has offsets too


def test_one_weight_has_a_separate_length(tmp_path, monkeypatch):
    run = write_run(tmp_path, "digits-edm2")
    calls = {}

    def scores_of(work, tick):
        calls["average"], calls["run"] = work.ema_target, work.run
        return Evaluation({"nimg": 1}, {}, {"fd_digits": {"best": 1.0, "values": [2.0, 1.0], "mean": 1.5}})

    monkeypatch.setattr(measurements.runner, "evaluate_metrics", scores_of)
    trained = SimpleNamespace(folder=tmp_path, key="")
    one = job("eval.metrics=fd_digits", "sample.sigma_rel=0.1", "tensor=enc-32x32-block0-skip=0.05", trained=trained)
    assert measurements.measure_tensors(one)["values"] == {"fd_digits": 1.0}
    assert calls["average"] == ema.PerTensorProfile(
        ema.PowerProfile(0.1), (("encoder.2.conv_skip.weight", ema.PowerProfile(0.05)),)
    )
    assert calls["run"].eval.metrics == ("fd_digits",) and calls["run"].net == run.net
    with pytest.raises(UsageError, match="no layer enc-8x8-block0-skip"):
        measurements.measure_tensors(job("tensor=enc-8x8-block0-skip=0.05", trained=trained))


def test_another_ema_gives_another_metric_and_is_not_recorded(tmp_path):
    """If all weights have one length, the metric is that of the length; metrics.json has only metrics of the run."""
    write_run(tmp_path, "digits-edm2")
    overrides = ("eval.metrics=fd_digits", "eval.num_samples=24", "sample.guidance=1")
    trained = SimpleNamespace(folder=tmp_path)
    plain = measurements.measure_metrics(job(*overrides, "sample.sigma_rel=0.05", trained=trained))
    before = (tmp_path / "metrics.json").read_text()
    same = measurements.measure_tensors(
        job(*overrides, "sample.sigma_rel=0.05", "tensor=enc-64x64-conv=0.05", trained=trained)
    )
    other = measurements.measure_tensors(
        job(*overrides, "sample.sigma_rel=0.05", "tensor=enc-64x64-conv=0.1", trained=trained)
    )
    assert same["values"] == plain["values"] != other["values"]
    assert same["protocol"]["ema_target"] == "sigma_rel 0.05, conv_in.weight sigma_rel 0.05"
    assert (tmp_path / "metrics.json").read_text() == before and len(results.read_evaluations(tmp_path)) == 1


# Logged magnitudes.


def test_growth(tmp_path):
    def line(nimg, *factors):
        kinds = zip(("activations", "main_path", "weights"), factors, strict=True)
        buckets = {kind: {"enc 8x8": [4.0 * f, 1.0 * f], "dec 8x8": [2.0, 0.5 * f]} for kind, f in kinds}
        return {"nimg": nimg, "magnitudes": buckets}

    lines = [line(10, 1, 1, 1), {"nimg": 20, "loss": 1.0}, line(50, 2, 1, 1), line(100, 4, 1, 9)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    one = job(trained=SimpleNamespace(folder=tmp_path))
    actual = measurements.measure_growth(one)["values"]
    assert actual["activations_max"] == pytest.approx(2.0)  # one level 4 times, one level not: their geometric mean
    assert actual["activations_mean"] == pytest.approx(4.0) and actual["activations_mean_late"] == pytest.approx(2.0)
    assert actual["weights_max"] == pytest.approx(3.0) and actual["main_path_mean"] == 1.0
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UsageError, match=r"set monitor\.magnitude_every lower"):
        measurements.measure_growth(one)


# Closed forms.


@given(sigma_rel=st.floats(0.02, 0.28))
@settings(max_examples=25)
def test_responses_are_densities_of_their_length(sigma_rel):
    def response(time):
        return analytic.ema_responses(job(f"sigma_rel={sigma_rel!r}", f"time={time!r}"))["values"]["response"]

    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    assert response(0.9) == pytest.approx((gamma + 1) * 0.9**gamma, rel=1e-9) and response(1.0) == pytest.approx(
        gamma + 1
    )
    moments = [integrate.quad(lambda x, k=k: x**k * response(x), 0, 1, limit=200)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1, abs=1e-6)
    assert math.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("n, target", [(4, 0.15), (8, 0.07)])
def test_the_error_of_an_average_by_brute_force(n, target):
    """Compare with least squares of densities on a fine grid of times."""
    actual = analytic.ema_reconstruction(job("sigma_rels=.05,.1", f"snapshots={n}", f"target={target}"))["values"][
        "error"
    ]
    grid = (np.arange(200_000) + 0.5) / 200_000

    def density(length, t):
        gamma = ema.sigma_rel_to_gamma(length)
        return np.where(grid <= t, (gamma + 1) / t * (grid / t) ** gamma, 0.0)

    stored = np.stack([density(s, (i + 1) / n) for i in range(n) for s in (0.05, 0.1)], axis=1)
    expected = density(target, 1.0)
    x = np.linalg.lstsq(stored, expected, rcond=None)[0]
    x /= x.sum()
    assert actual == pytest.approx(((stored @ x - expected) ** 2).sum() / (expected**2).sum(), rel=0.01)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_noise_levels_of_ddpm(k):
    """The noise level of each index is multiplied by k (Berrada et al. Prop. 1)."""
    trained = plan.plan_training(Training("cc12m-256-berrada", (f"process.resolution_scale={k}",)), 0, OUT)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)
    for t in (0.0, 0.25, 0.5, 0.9995):
        sigma2 = k**2 * (1 - bar[int(t * 1000)]) / bar[int(t * 1000)]
        actual = analytic.noise_levels(job(f"t={t}", trained=trained))["values"]["alpha_bar"]
        assert actual == pytest.approx(1 / (1 + sigma2), rel=1e-9)
    flow = plan.plan_training(Training("digits", ("process.name=rf",)), 0, OUT)
    s = special.expit(special.ndtri(0.3))
    actual = analytic.noise_levels(job("t=0.3", trained=flow))["values"]["alpha_bar"]
    assert actual == pytest.approx((1 - s) ** 2 / ((1 - s) ** 2 + s**2))


@pytest.mark.parametrize("normal", [0, 1, 8])
def test_step_sizes(normal):
    """The size of Adam's steps on the sphere agrees with an integral.

    Adam's update has rms 1 in every weight; the part along the weights w ~ N(0, 1) is lost on the sphere, which is E[n
    w^2 / sqrt(1 + n^2 w^2)] for a normal part n times as long as the tangent part.
    """
    lost = integrate.quad(lambda w: normal * w**2 / math.sqrt(1 + (normal * w) ** 2) * math.exp(-w * w / 2), -12, 12)[
        0
    ] / math.sqrt(2 * math.pi)
    actual = {
        p: analytic.step_sizes(job(f"normal_ratio={normal}", f"project_gradients={p}"))["values"]["update"]
        for p in ("no", "yes")
    }
    assert actual["no"] == pytest.approx(math.sqrt(1 - lost**2), rel=0.05) and actual["yes"] == pytest.approx(
        1, rel=0.01
    )


def test_lambda_1_under_the_learned_uncertainty():
    """The loss is Equation 21 with lambda = 1."""
    proc = process.build_process(config.EDMConfig())
    uncertainty = denoiser.Uncertainty(proc)
    g = torch.Generator().manual_seed(0)
    x0, eps, s = (
        torch.randn(4, 1, 3, 3, generator=g),
        torch.randn(4, 1, 3, 3, generator=g),
        torch.tensor([0.1, 0.5, 1, 9]),
    )
    net = lambda x, s, cond, keep: 0.3 * x  # noqa: E731
    u = uncertainty(s)
    error = (0.3 * (x0 + s[:, None, None, None] * eps) - x0).square().mean(dim=(1, 2, 3))
    for weighting, factor in (("uncertainty-uniform", 1.0), ("uncertainty", proc.weight(s))):
        actual = denoiser.loss(net, proc, x0, s, eps, None, weighting, uncertainty)
        assert torch.allclose(actual, factor * error / u.exp() + u)
        assert (
            config.LossConfig(weighting=weighting).learns_uncertainty
            and not config.LossConfig(weighting="uniform").learns_uncertainty
        )


# Column groups and jobs.


COLUMNS, ROWS = (Column("a"), Column("b", False)), (Row("r", x=1), Row("s", x=2), Row("t", x=3))


def small(*parts, x="", columns=COLUMNS, rows=ROWS):
    return Table("test/1", "", "", columns, rows, {"tiny": Scale(parts, "")}, x_axis=x)


def test_a_cell_is_the_best_of_its_groups(tmp_path):
    lengths = (0.05, 0.1)
    how = Measurement(Training("digits"))
    parts = [
        ColumnGroup({"a": "fd", "b": "1-share"}, {"r": how}, settings=setups.at_ema(s), select="min") for s in lengths
    ]
    counted = ColumnGroup({"b": "n"}, {"s": how}, method="counts")
    planned_jobs = plan.plan_jobs(small(*parts, counted), "tiny", (0, 1), tmp_path)
    assert [one.row for one in planned_jobs] == ["r", "r", "s", "r", "r"] and len(
        plan.unique_trainings(planned_jobs)
    ) == 2
    assert [len(one.trainings) for one in planned_jobs] == [1, 1, 0, 1, 1]
    numbers = [(3.0, 0.25), (2.0, 0.5), None, (math.nan, 0.75), (4.0, 0.125)]
    for one, values in zip(planned_jobs, numbers, strict=True):
        one.path.parent.mkdir(exist_ok=True)
        actual = (
            {"n": 7} if values is None else {"fd": None if math.isnan(values[0]) else values[0], "share": values[1]}
        )
        one.path.write_text(json.dumps({"values": actual}))
    assert runner.collect_values(planned_jobs) == {
        0: {("r", "a"): 2.0, ("r", "b"): 0.5, ("s", "b"): 7},
        1: {("r", "a"): 4.0, ("r", "b"): 0.25, ("s", "b"): 7},
    }
    planned_jobs[1].path.write_text(json.dumps({"diverged": "at once"}))
    assert runner.collect_values(planned_jobs)[0]["r", "a"] == 3.0
    planned_jobs[0].path.write_text(json.dumps({"diverged": "at once"}))
    assert (
        runner.collect_values(planned_jobs)[0]["r", "a"] == DIVERGED == runner.collect_values(planned_jobs)[0]["r", "b"]
    )
    ambiguous = plan.plan_jobs(small(*(part._replace(select=None) for part in parts)), "tiny", (0,), tmp_path)
    with pytest.raises(AssertionError, match="two column groups fill r"):
        runner.collect_values(ambiguous)


def test_untrained_methods_do_not_train(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "start_training", lambda *a: pytest.fail("trained"))
    planned_jobs = plan.plan_jobs(
        small(ColumnGroup({"a": "gmacs"}, {"r": Measurement(Training("digits-edm2"))}, method="counts")),
        "tiny",
        (0, 1, 2),
        tmp_path,
    )
    assert len(planned_jobs) == 1 and plan.unique_trainings(planned_jobs) == []
    assert list(runner.run_jobs(planned_jobs, None, lambda text: None)) == planned_jobs
    record = json.loads(planned_jobs[0].path.read_text())
    assert record["training_commands"] == [] and record["values"]["gmacs"] == pytest.approx(0.0190, abs=1e-4)
    assert runner.collect_values(planned_jobs)[0] == {("r", "a"): record["values"]["gmacs"]}


def test_a_figure_over_one_of_its_columns():
    table = small(x="a", rows=(Row("r"), Row("s"), Row("t")))
    values = {("r", "a"): 10.0, ("s", "a"): 20.0, ("r", "b"): 1.0, ("s", "b"): 2.0, ("t", "b"): 3.0}
    assert list(table.curve(values, "b")) == [(10.0, 1.0), (20.0, 2.0)] and list(table.curve(values, "a")) == []
    figure = TABLES["edm2/fig8"]()
    assert next(figure.curve(figure.published(), "EDM2")) == (pytest.approx(0.1247), 3.53)


def test_figure_13_compares_decays_at_the_papers_length():
    """A.4 fixes 13 %: it is measured at every scale and used by the claim."""
    table = TABLES["edm2/fig13"]()
    for name, scale in table.scales.items():
        for part in scale.groups:
            assert "13 %" in part.rows and part.rows["13 %"].settings == ("sample.sigma_rel=0.13",), name
    (claim,) = (claim for claim in table.claims if "fixed EMA length" in claim.text)
    columns = [column.name for column in table.columns]
    values = {(row, c): 10.0 for row in ("10 %", "13 %") for c in columns}
    values |= {("13 %", columns[0]): 17.2, ("10 %", columns[0]): 11.0}
    # Best numbers within 10 %, 72 % apart at 13 %; at 10 % there would be no difference.
    assert claims.compute_effect(table, claim, values) == pytest.approx(math.log(1.72) - math.log(1.1))
