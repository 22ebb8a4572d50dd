"""Control variables: gamma_c, embeddings, measured values, rows in snapshots, and every network with them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.run_factory import QUIET_CONSOLE, SMALL_NETS, small_run, with_settings, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gesso import cli, recipes, sample_files, snapshot
from gesso.conditioning import Cond
from gesso.config import CONTROL_VARIABLES, ControlConfig, ControlSpec
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset
from gesso.diffusion import denoiser, process
from gesso.ema import PowerProfile
from gesso.models.embeddings import ControlEmbedding, MPControlEmbedding, control_features, gamma_c
from gesso.training.loop import Trainer
from gesso.training.run_folder import open_dataset_for_run, start_training

F64 = torch.float64
DIGITS = [recipe for recipe in SMALL_NETS if recipe.startswith("digits")]
ALL_VARIABLES = "flip,crop,aspect,size,brightness,contrast"
progress = st.floats(0, 1)


def gamma_at(t: float | list[float], **cfg: object) -> Tensor:
    return gamma_c(ControlSpec(**cfg), torch.as_tensor(t, dtype=F64))


# gamma_c (Section 2.1, Table A6).


@given(t=progress, alpha=st.floats(0.1, 64))
def test_cosine_falls_from_1_at_clean_to_0_at_noise(t, alpha):
    rows = gamma_at([0.0, t, min(1.0, t + 0.05), 1.0], alpha=alpha)
    assert rows[0] == 1 and rows[3] == 0
    assert 0 <= rows[2] <= rows[1] <= 1
    assert float(rows[1]) == pytest.approx((1 - math.cos(math.pi * (1 - t) ** alpha)) / 2, abs=1e-12)


@given(alpha=st.floats(0.1, 64))
def test_cosine_is_half_where_the_power_is_half(alpha):
    assert float(gamma_at(1 - 0.5 ** (1 / alpha), alpha=alpha)) == pytest.approx(0.5, abs=1e-9)


@given(t=progress, low=st.floats(0.1, 30), factor=st.floats(1.01, 4))
def test_larger_alpha_reduces_detail_weight(t, low, factor):
    assert gamma_at(t, alpha=low * factor) <= gamma_at(t, alpha=low) + 1e-15


def test_alpha_8_is_half_at_083():
    assert float(gamma_at(0.083)) == pytest.approx(0.5, abs=2e-3)


@given(t=progress, edge=progress)
def test_other_control_schedules(t, edge):
    assert gamma_at(t, schedule="zero") == 0 and gamma_at(t, schedule="uniform") == 1
    assert gamma_at(t, schedule="linear") == 1 - t
    assert gamma_at(t, schedule="step", step_threshold=edge) == (t <= edge)
    assert gamma_at(edge, schedule="step", step_threshold=edge) == 1


PROCESSES = ["edm", "vp", "vp-v", "rf"]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(PROCESSES), edge=st.floats(0.06, 12), scale=st.sampled_from([1, 2]), dtype=st.booleans())
def test_step_switches_at_its_sigma_in_every_process(name, edge, scale, dtype):
    """build_denoiser converts step_sigma to progress: low-level control is on where sigma <= step_sigma only.

    Edges among VP's levels, the lowest of which is .029 k: below it progress does not go.
    """
    chosen = {"process.name": name[:2] if name != "edm" else name, "process.resolution_scale": scale}
    chosen |= {"process.prediction": "v"} if name == "vp-v" else {}
    control = {"control.variables": "size", "control.schedule": "step", "control.step_sigma": edge}
    run = small_run("digits", **chosen, **control, **{"net.depth": 1})
    built = denoiser.build_denoiser(with_settings(run, **{"data.num_classes": 10}))
    proc, cfg = built.process, built.net.control.control
    dtype = F64 if dtype else torch.float32
    sigma = torch.tensor([edge * (1 - 1e-4), edge * (1 + 1e-4), edge / 3, 2 * edge], dtype=F64)
    flow = name in ("vp-v", "rf")
    s = sigma / (1 + sigma) if flow else sigma
    torch.testing.assert_close(s / proc.alpha(s), sigma, rtol=1e-12, atol=0)
    on = gamma_c(cfg, proc.progress(s).to(dtype))
    assert on.tolist() == [1, 0, 1, 0]
    exact = torch.tensor(edge, dtype=F64)
    exact = exact / (1 + exact) if flow else exact
    assert gamma_c(cfg, proc.progress(exact)) == 1


def test_step_schedule_of_table_a6_reaches_the_network():
    for edge in (1.0, 2.0, 6.0):
        run = small_run(
            "digits", **{"control.variables": "size", "control.schedule": "step", "control.step_sigma": edge}
        )
        built = denoiser.build_denoiser(with_settings(run, **{"data.num_classes": 10}))
        proc = process.build_process(run.process)
        assert built.net.control.control.step_threshold == pytest.approx(
            float(proc.progress(torch.tensor(edge, dtype=F64)))
        )


# The embeddings (Eq. 1).

EXAMPLE_COND = Cond(
    control_high=torch.tensor([[0.0], [1000.0], [0.0]], dtype=F64),
    control_low=torch.tensor([[8.0, 8.0], [4.0, 4.0], [512.0, 768.0]], dtype=F64),
)
T = torch.tensor([0.02, 0.3, 0.7], dtype=F64)


def randomize_constants_(module: torch.nn.Module) -> torch.nn.Module:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.1 if p.ndim > 1 else 0.7))
    return module.double()


def control_embedding(cfg: ControlSpec, kind=ControlEmbedding) -> torch.nn.Module:
    torch.manual_seed(0)
    module = kind(cfg, 16)
    if kind is MPControlEmbedding:  # on its sphere from the start, but for the gain
        module.gain.data.fill_(0.7)
        return module.double()
    return randomize_constants_(module)


def two_layer_reference(mlp, values: Tensor) -> Tensor:
    """Compute the MLP of the sinusoids cos, sin of value * 1e4^(-i/128)."""
    omega = 10_000.0 ** (-torch.arange(128, dtype=F64) / 128)
    angle = values[:, :, None] * omega
    features = torch.cat([angle.cos(), angle.sin()], dim=2).flatten(1)
    hidden = features @ mlp[0].weight.T + mlp[0].bias
    return (hidden * torch.sigmoid(hidden)) @ mlp[2].weight.T + mlp[2].bias


@pytest.mark.parametrize("schedule", ["cosine", "uniform", "zero", "linear", "step"])
def test_equation_1(schedule):
    cfg = ControlSpec(1, 2, schedule=schedule, alpha=3.0, step_threshold=0.3)
    net, c = control_embedding(cfg), torch.ones(3, 16, dtype=F64)
    high, low = (
        two_layer_reference(net.mlps["high"], EXAMPLE_COND.control_high),
        two_layer_reference(net.mlps["low"], EXAMPLE_COND.control_low),
    )
    expected = c + high + gamma_c(cfg, T)[:, None] * low
    torch.testing.assert_close(net.add(c, EXAMPLE_COND, T), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(t=progress, alpha=st.floats(0.2, 30))
def test_low_level_control_is_weighted_by_gamma(t, alpha):
    cfg = ControlSpec(1, 2, alpha=alpha)
    net, zero = control_embedding(cfg), torch.zeros(3, 16, dtype=F64)
    at = lambda t: net.add(zero, EXAMPLE_COND, torch.full((3,), t, dtype=F64))  # noqa: E731
    high = at(1.0)  # gamma_c = 0
    torch.testing.assert_close(at(t) - high, float(gamma_at(t, alpha=alpha)) * (at(0.0) - high), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [ControlEmbedding, MPControlEmbedding])
def test_joint_control_is_one_mlp_without_gamma(kind):
    cfg = ControlSpec(1, 2, mlp="joint")
    net, c = control_embedding(cfg, kind), torch.ones(3, 16, dtype=F64)
    out = net.add(c, EXAMPLE_COND, T)
    assert out.equal(net.add(c, EXAMPLE_COND, 1 - T))
    names = [name for name, _ in net.named_parameters()]
    assert any("all" in name for name in names) and not any("high" in name or "low" in name for name in names)
    if kind is ControlEmbedding:
        both = torch.cat([EXAMPLE_COND.control_high, EXAMPLE_COND.control_low], dim=1)
        torch.testing.assert_close(out, c + two_layer_reference(net.mlps["all"], both), rtol=1e-10, atol=1e-10)
    moved = dataclasses.replace(EXAMPLE_COND, control_high=EXAMPLE_COND.control_high + 1)
    assert (net.add(c, moved, T) - out).abs().amax(1).min() > 1e-3


def test_mp_control_weights_low_level_by_gamma():
    cfg = ControlSpec(1, 2, alpha=3.0)
    net, c = control_embedding(cfg, MPControlEmbedding), torch.zeros(3, 16, dtype=F64)
    high, at = net.add(c, EXAMPLE_COND, T * 0 + 1), net.add(c, EXAMPLE_COND, T)
    torch.testing.assert_close(at - high, gamma_c(cfg, T)[:, None] * (net.add(c, EXAMPLE_COND, T * 0) - high))


@pytest.mark.parametrize("kind", [ControlEmbedding, MPControlEmbedding])
@pytest.mark.parametrize("mlp", ["split", "joint"])
def test_control_is_zero_at_initialization_and_when_withheld(kind, mlp):
    cfg, c = ControlSpec(1, 2, mlp=mlp), torch.randn(3, 16, dtype=F64)
    assert kind(cfg, 16).double().add(c, EXAMPLE_COND, T).equal(c)
    net = control_embedding(cfg, kind)
    partial = dataclasses.replace(EXAMPLE_COND, has_control=torch.tensor([True, False, True]))
    changed = (net.add(c, partial, T) != c).any(1)
    assert changed.tolist() == [True, False, True]
    assert net.add(c, Cond(), T).equal(c) and net.add(c, EXAMPLE_COND.without(control=True), T).equal(c)


@given(value=st.floats(0, 5000), step=st.sampled_from([1.0, 2.0, 10.0]))
def test_sinusoids_resolve_one_unit(value, step):
    """Thousandths and pixels are the units."""
    a, b = control_features(torch.tensor([[value], [value + step]], dtype=F64))
    assert (a - b).norm() > 0.5


# What is measured.


def write_images_of_size(root, sizes, mode="RGB"):
    """Write oblong images that are brighter to the right and to the bottom, with ordered names."""
    (root / "a").mkdir(parents=True)
    for i, (h, w) in enumerate(sizes):
        y, x = np.mgrid[0:h, 0:w]
        ramp = np.stack([255 * x / w, 255 * y / h, 127 * x / w], axis=2).round().astype(np.uint8)
        Image.fromarray(ramp).convert(mode).save(root / "a" / f"{i:02}.png")


SIZES = [(16, 16), (16, 48), (64, 16), (40, 30), (17, 23)]


def batcher_for(run):
    run, loaded = open_dataset_for_run(run, QUIET_CONSOLE)
    return Batcher(loaded, run, 0.5, torch.device("cpu")), loaded


def test_control_column_order():
    run = small_run("digits-dit", **{"control.variables": "contrast,size,flip,brightness,aspect,crop"})
    assert ",".join(run.control.variables) == ALL_VARIABLES
    assert run.control.column_names("high") == ("flip", "crop_top", "crop_left", "crop_bottom", "crop_right", "aspect")
    assert run.control.column_names("low") == ("height", "width", "brightness", "contrast")
    assert small_run("digits", **{"control.variables": "[size,flip,size]"}).control.variables == ("flip", "size")
    assert sorted(CONTROL_VARIABLES) == sorted(ALL_VARIABLES.split(","))


def test_control_rows_of_non_square_images(tmp_path):
    """The size is that of the full image; the crop box is the visible part, to half a pixel of the image."""
    write_images_of_size(tmp_path, SIZES)
    run = small_run("digits-dit", **{"data.source": tmp_path, "data.resolution": 16, "data.channels": 3,
                                 "control.variables": ALL_VARIABLES, "eval.toy_metrics": "none"})  # fmt: skip
    batches, loaded = batcher_for(run)
    rows = batches.control_rows(torch.arange(5))
    at = {name: rows[:, i] for i, name in enumerate(batches.control_names)}
    index = batches.sample_order(torch.arange(5))
    for i, (h, w) in zip(range(5), [SIZES[j] for j in index.tolist()], strict=True):
        assert (at["height"][i], at["width"][i]) == (h, w)
        assert float(at["aspect"][i]) == pytest.approx(1000 * w / h)
        pixels = loaded.pixels[index[i]].double()
        assert float(at["brightness"][i]) == pytest.approx(float(pixels.mean()), rel=1e-6)
        assert float(at["contrast"][i]) == pytest.approx(float(pixels.std(correction=0)), rel=1e-5)
        # The ramps read off where the crop begins and ends.
        horizontal, vertical = pixels[0].mean(0) / 255, pixels[1].mean(1) / 255
        box = [float(at[f"crop_{edge}"][i]) / 1000 for edge in ("top", "left", "bottom", "right")]
        for ramp, low, high in ((vertical, box[0], box[2]), (horizontal, box[1], box[3])):
            middle = (ramp[7] + ramp[8]) / 2 + 0.5 / (h if ramp is vertical else w)
            assert float(middle) == pytest.approx((low + high) / 2, abs=0.03)
            slope = float(ramp[12] - ramp[3]) / 9 * 16
            assert slope == pytest.approx(high - low, abs=0.06)
        side = min(h, w)
        assert box[2] - box[0] == pytest.approx(side / h) and box[3] - box[1] == pytest.approx(side / w)


def test_flip_column_matches_the_pixels():
    run = small_run("digits", **{"data.flip": "true", "control.variables": "flip,size"})
    batches, loaded = batcher_for(run)
    counter = torch.arange(600)
    x0, cond = batches(counter)
    straight = batches.normalizer.to_x0(loaded.pixels[batches.sample_order(counter)], 0, counter)
    flip = cond.control_high[:, 0]
    assert set(flip.tolist()) == {0.0, 1000.0} and 0.4 < float((flip > 0).float().mean()) < 0.6
    mirrored = flip > 0
    assert x0[mirrored].equal(straight[mirrored].flip(3)) and x0[~mirrored].equal(straight[~mirrored])
    assert not batcher_for(small_run("digits", **{"control.variables": "flip"}))[0].control_rows(counter).any()


def test_mixed_resolution_digits_match_their_size_column():
    loaded = open_dataset(small_run("digits", **{"data.source": "digits-mixed-resolution"}).data)
    plain = open_dataset(small_run("digits").data)
    assert loaded.original_sizes[0::2].unique().tolist() == [8] and loaded.original_sizes[1::2].unique().tolist() == [4]
    assert loaded.pixels[0::2].equal(plain.pixels[0::2])
    detail = lambda p: (p[:, :, :, 1:].float() - p[:, :, :, :-1].float()).abs().mean()  # noqa: E731
    assert detail(loaded.pixels[1::2]) < 0.7 * detail(plain.pixels[1::2])


# Dropout.


@pytest.mark.parametrize(
    "both, control, semantic", [(0.1, 0.05, 0), (0.2, 0, 0.3), (0, 0.5, 0.2), (1, 0, 0), (0.3, 0.4, 0.3)]
)
@pytest.mark.parametrize("kind", ["label", "text"])
def test_condition_dropout_proportions(both, control, semantic, kind):
    """The four branches of guidance are as frequent as the settings require, to 4 standard deviations."""
    run = small_run(
        **{
            "control.variables": "size",
            "semantic.kind": kind,
            "dropout.both": both,
            "dropout.control": control,
            "dropout.semantic": semantic,
            "sample.guidance": 1,
        }
    )
    batches, _ = batcher_for(run)
    n = 6000
    cond = batches(torch.arange(n))[1]
    shares = {(False, False): both, (True, False): control, (False, True): semantic}
    shares[True, True] = max(1 - sum(shares.values()), 0)
    for (has_s, has_c), p in shares.items():
        share = float(((cond.has_semantic == has_s) & (cond.has_control == has_c)).double().mean())
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n) + 1e-9
    subset = torch.tensor([7, 5999, 0, 123])
    few = batches(subset)[1]
    assert few.has_semantic.equal(cond.has_semantic[subset]) and few.has_control.equal(cond.has_control[subset])


def test_dropout_with_one_kind_of_condition():
    n = 6000
    share = lambda present: 1 - float(present.double().mean())  # noqa: E731
    cond = batcher_for(small_run(**{"dropout.both": 0.2}))[0](torch.arange(n))[1]
    assert cond.has_control is None and share(cond.has_semantic) == pytest.approx(0.2, abs=0.02)
    run = small_run(**{"semantic.kind": "none", "control.variables": "size", "dropout.both": 0.2, "sample.guidance": 1})
    cond = batcher_for(run)[0](torch.arange(n))[1]
    assert cond.has_semantic is None and share(cond.has_control) == pytest.approx(0.25, abs=0.023)


@pytest.mark.parametrize("recipe", DIGITS)
def test_withheld_conditions_do_not_reach_the_network(recipe):
    """The loss of a training batch does not change with the labels and rows of samples that withhold them."""
    run = small_run(
        recipe,
        **{"control.variables": "flip,size", "dropout.both": 0.25, "dropout.control": 0.25, "dropout.semantic": 0.25},
    )
    trainer = Trainer(*open_dataset_for_run(run, QUIET_CONSOLE))
    net = randomize_constants_(trainer.denoiser.net.float())
    x0, cond = trainer.batcher(torch.arange(12))
    x0 = x0.double()
    cond = dataclasses.replace(cond, control_high=cond.control_high.double(), control_low=cond.control_low.double())
    changed = dataclasses.replace(
        cond,
        label=torch.where(cond.has_semantic, cond.label, 9 - cond.label),
        control_high=torch.where(cond.has_control[:, None], cond.control_high, 1000 - cond.control_high),
        control_low=torch.where(cond.has_control[:, None], cond.control_low, cond.control_low + 5),
    )
    combinations = {(a, b) for a, b in zip(cond.has_semantic.tolist(), cond.has_control.tolist(), strict=True)}
    assert len(combinations) == 4
    call = lambda c: denoiser.Denoiser(net, trainer.process, run.net.noise_embedding)(x0, torch.full((12,), 0.5), c)  # noqa: E731
    with torch.no_grad():
        assert call(cond).equal(call(changed))
        conditions = dataclasses.replace(changed, has_control=torch.ones_like(cond.has_control))
        assert not call(conditions).equal(call(dataclasses.replace(cond, has_control=conditions.has_control)))


# The snapshot's rows.


def test_control_rows_survive_the_ema_command(tmp_path, monkeypatch):
    run = small_run(**{"data.source": "digits-mixed-resolution", "data.flip": "true", "control.variables": "flip,size"})
    start_training(run, tmp_path / "run", False, QUIET_CONSOLE, print)
    rows = snapshot.load_control_rows(tmp_path / "run")
    assert (
        rows.shape == (48, 3) and set(rows[:, 1].tolist()) == {4.0, 8.0} and set(rows[:, 0].tolist()) == {0.0, 1000.0}
    )
    batches, _ = batcher_for(run)
    assert rows.equal(batches.control_rows(torch.arange(48)))
    weights, _, _, _ = snapshot.reconstruct_from_run(tmp_path / "run", [PowerProfile(0.07)])
    assert snapshot.CONTROL_ROWS not in weights[0]
    assert snapshot.CONTROL_ROWS not in snapshot.read(snapshot.list_snapshots(tmp_path / "run")[0].path)[0]
    typed = ["gesso", "ema", tmp_path / "run", "--sigma-rel", 0.07, "--out", tmp_path / "made" / "snapshots"]
    monkeypatch.setattr("sys.argv", [str(word) for word in typed])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert snapshot.load_control_rows(tmp_path / "made").equal(rows)


def test_snapshots_store_at_most_4096_control_rows():
    trainer = Trainer(
        *open_dataset_for_run(small_run(**{"control.variables": "size", "train.total_images": 20_000}), QUIET_CONSOLE)
    )
    assert trainer.control_rows.shape == (4096, 2)
    assert Trainer(*open_dataset_for_run(small_run(), QUIET_CONSOLE)).control_rows is None


# Every network.


@pytest.mark.parametrize("recipe", DIGITS)
def test_every_network_trains_and_samples_with_control(recipe, tmp_path):
    run = small_run(
        recipe,
        **{
            "data.source": "digits-mixed-resolution",
            "data.flip": "true",
            "control.variables": ALL_VARIABLES,
            "sample.control_guidance": 1.375,
        },
    )
    out = tmp_path / "run"
    start_training(run, out, False, QUIET_CONSOLE, print)
    trained = snapshot.read(snapshot.list_snapshots(out)[-1].path)[1]
    args = sample_files.SampleArgs(label="3", seeds="0-1", control={"size": "4x4"})
    assert "control guidance 1.375" in sample_files.sample_to_folder(out, trained, args, tmp_path / "made")[-1]
    assert len(list((tmp_path / "made").glob("seed*.png"))) == 2


@pytest.mark.parametrize("recipe", ["digits-edm2", "digits-mp-dit", "digits-unet"])
def test_every_network_accepts_joint_control(recipe, tmp_path):
    run = write_run(tmp_path, recipe, **{"control.variables": "flip,size", "control.mlp": "joint",
                                       "control.schedule": "uniform"})  # fmt: skip
    args = sample_files.SampleArgs(label="3", seeds="0-1", control={"size": "4x4"})
    lines = sample_files.sample_to_folder(tmp_path, run, args, tmp_path / "made")
    assert any(line.startswith("wrote 2 images") for line in lines)


def test_joint_has_no_schedule():
    with pytest.raises(ValueError, match=r"control\.schedule=cosine weights the low level"):
        ControlConfig(variables=("size",), mlp="joint")
    assert ControlConfig(variables=("size",), mlp="joint", schedule="uniform").mlp == "joint"


def test_the_published_columns_resolve():
    for name in ("digits-sdxl", "digits-sd3", "digits-berrada"):
        recipes.resolve(name, [])
