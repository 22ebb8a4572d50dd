"""The command line: output, files and error messages."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.cli import assert_refused
from helpers.images import write_image_folders
from helpers.run_factory import tiny_run
from PIL import Image
from rich.console import Console

from gesso import recipes, sampling, snapshot
from gesso.ema import PowerProfile
from gesso.errors import UsageError
from gesso.evaluation import results
from gesso.training.run_folder import start_training


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    start_training(
        tiny_run(**{"sample.steps": 4, "eval.sweep_sigma_rels": "[0.03,0.1]", "eval.sweep_steps": 2}),
        out,
        False,
        Console(quiet=True),
        print,
    )
    return out


def test_recipes(gesso):
    code, out, _ = gesso("recipes")
    assert code == 0 and all(name in out for name in recipes.RECIPES)


def test_config_prints_yaml_that_can_be_trained(gesso, tmp_path):
    code, out, _ = gesso("config", "digits", "train.seed=4")
    assert code == 0 and yaml.safe_load(out)["train"]["seed"] == 4
    (tmp_path / "mine.yaml").write_text(out)
    assert recipes.resolve(str(tmp_path / "mine.yaml"), [])[0] == recipes.resolve("digits", ["train.seed=4"])[0]


def test_diff(gesso, run):
    code, out, _ = gesso("diff", "digits", "digits-edm2")
    assert code == 0 and "net.name: 'mmdit++' -> 'edm2'" in out
    assert "train.total_images" in gesso("diff", "digits", run)[1]
    assert "no difference" in gesso("diff", run, run)[1]


@pytest.mark.parametrize("arguments", [("train", "digit"), ("config", "digit"), ("diff", "digit", "digits")])
def test_unknown_recipe(gesso, arguments):
    assert_refused(gesso(*arguments), "did you mean digits?")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("train", "digits", "net.hiden_size=3"), "did you mean net.hidden_size?"),
        (("train", "digits", "train.batch_size=none"), "whole number"),
        (("train", "digits", "train.device=cuda:7"), "train.device=cuda:7 cannot be used here"),
        (
            ("evaluate", "--images", "digits", "--ref", "digits", "--metrics", "fd_digits", "--device", "gpu"),
            "--device gpu: no such device; use auto, cpu",
        ),
        (("train", "folder:/nowhere"), "no such folder"),
        (("train", "folder"), "which images?"),
        (("train", "runs/none/run.yaml"), "there is no file"),
        (("sample", "runs/none"), "no run folder"),
        (("evaluate", "runs/none"), "no run folder"),
        (("ema", "runs/none", "--sigma-rel", "0.1"), "no snapshots"),
        (("ema", "runs/none", "--sigma-rel", "0.3"), "between 0 and 0.2887"),
        (("report", "runs/none"), "no trained run"),
        (("inspect", "digits", "--resize", "nearest"), "--resize nearest: no such filter; use lanczos, adm, bicubic"),
    ],
)
def test_invalid_commands_write_nothing(gesso, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(gesso(*arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--label", "10x"), "--label"),
        (("--label", "11"), "out of range"),
        (("--label", "cat"), "no such class"),
        (("--seeds", "5-2"), "--seeds"),
        (("--seeds", "a"), "--seeds"),
        (("--nimg", "10"), "no snapshot up to image 10"),
        (("--nimg", "soon"), "--nimg"),
        (("sample.steps=0",), "greater than 0"),
        (("sample.sigma_rel=0.3",), "less than"),
        (("net.hidden_size=64",), "fixed by training"),
        (("sample.stepz=3",), "did you mean sample.steps?"),
    ],
)
def test_invalid_sample_arguments_write_nothing(gesso, run, arguments, message, tmp_path):
    assert_refused(gesso("sample", run, *arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(gesso):
    code, _, err = gesso("--debug", "config", "digit")
    assert code == 2 and "Traceback" in err and "did you mean digits?" in err


def test_sample(gesso, run, tmp_path):
    code, out, _ = gesso("sample", run, "--label", "7", "--seeds", "0-3,9", "--out", tmp_path / "out")
    assert code == 0 and "5 images" in out
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"seed{s:06d}.png" for s in (0, 1, 2, 3, 9)]
    assert pixels(tmp_path / "out" / "seed000009.png").shape == (8, 8)
    assert pixels(tmp_path / "out-sheet.png").shape[1] > 100


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_image_depends_only_on_seed_and_settings(gesso, run, tmp_path):
    strong = "sample.guidance=200"  # makes the label visible after a short training
    gesso("sample", run, strong, "--label", "7", "--seeds", "0-7", "--out", tmp_path / "many")
    gesso("sample", run, strong, "--label", "7", "--seeds", "5", "sample.batch_size=1", "--out", tmp_path / "single")
    gesso("sample", run, strong, "--label", "3", "--seeds", "5", "--out", tmp_path / "other")
    many, single, other_seed = (pixels(tmp_path / d / "seed000005.png") for d in ("many", "single", "other"))
    assert np.abs(many - single).max() <= 1
    assert np.abs(single - other_seed).max() > 1
    assert np.abs(single - pixels(tmp_path / "many" / "seed000006.png")).max() > 50


def test_ema_writes_a_snapshot_of_any_length(gesso, run):
    code, out, _ = gesso("ema", run, "--sigma-rel", "0.15", "--sigma-rel", "0.05")
    assert code == 0 and "sigma_rel 0.15" in out and "relative error" in out
    actual, _, meta = snapshot.read(run / "ema" / "nimg000000000640-ema0.0500.safetensors")
    expected, _, _ = snapshot.read(run / "snapshots" / "nimg000000000640-ema0.0500.safetensors")
    assert meta.profile == PowerProfile(0.05) and all(
        torch.allclose(actual[k], expected[k], atol=1e-6) for k in expected
    )
    assert len(snapshot.list_snapshots(run)) == 8  # reconstructed snapshots are not listed as tracked ones


def test_evaluate_and_report(gesso, run):
    code, out, _ = gesso("evaluate", run)
    assert code == 0 and "class accuracy" in out
    guided, unguided, *curve = results.read_evaluations(run).values()
    values, floor = guided.best(), guided.reference_metrics
    assert 0 <= values["class_accuracy"] <= 1 and values["frechet_distance"] > floor["frechet_distance"] > 0
    assert guided.protocol["networks"]["digits"] == "digits-cnn-v1" and guided.protocol["num_samples"] == 898
    assert unguided.protocol["guidance"] == 1 and unguided.protocol["series"] == "unguided"
    assert [point.protocol["sigma_rel"] for point in curve] == [0.03, 0.1]
    assert {"by_class.png", "nearest.png"} <= {p.name for p in (run / "sheets").iterdir()}
    assert floor["class_accuracy"] > 0.99

    code, out, _ = gesso("report", run)
    page = (run / "report.html").read_text()
    assert code == 0 and "report.html" in out
    assert page.count("data:image/png;base64") == 2 and page.count("<svg") >= 6
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)  # no external resources
    assert "digits-cnn-v1" in page and "total_images: 640" in page and "commit" in page


def test_report_before_evaluation(gesso, run, tmp_path):
    empty_run = tmp_path / "run"
    empty_run.mkdir()
    for name in ("run.yaml", "log.jsonl"):
        (empty_run / name).write_text((run / name).read_text())
    assert gesso("report", empty_run)[0] == 0
    assert "gesso evaluate" in (empty_run / "report.html").read_text()


def test_damaged_snapshot_is_named(gesso, run, tmp_path):
    import shutil

    damaged = shutil.copytree(run, tmp_path / "run")
    path = snapshot.list_snapshots(damaged)[0].path
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(gesso("sample", damaged), path.name, code=1)
    path.write_bytes(b"")
    assert_refused(gesso("sample", damaged), path.name, code=1)


def test_weights_of_another_network_are_rejected(run):
    tensors, stored, _ = snapshot.read(snapshot.list_snapshots(run)[-1].path)
    changed = stored.model_copy(update={"net": stored.net.model_copy(update={"depth": 2})})
    with pytest.raises(Exception, match=r"the weights belong to another network: \d+ missing \(blocks"):
        snapshot.denoiser_from_weights(tensors, changed)


def test_other_safetensors_file_is_no_snapshot(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="is not a snapshot of gesso"):
        snapshot.read(tmp_path / "x.safetensors")


def test_training_never_overwrites_a_run(gesso, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.total_images=64", "train.batch_size=32"]
    code, out, _ = gesso("train", "digits", *tiny)
    assert code == 0 and "training in runs/digits" in out and "gesso sample runs/digits" in out
    assert_refused(gesso("train", "digits", *tiny), "already contains a run: add --resume")
    assert gesso("train", "runs/digits/run.yaml")[0] == 0  # repeats it in another folder
    names = sorted(p.name for p in Path("runs").iterdir())
    assert names == ["digits", "digits-2"]
    a, b = (snapshot.read(snapshot.list_snapshots(Path("runs") / n)[-1].path)[0] for n in names)
    assert all(a[k].equal(b[k]) for k in a)
    assert gesso("train", "runs/digits", "--resume")[0] == 0


def test_flat_folder_needs_no_labels(gesso, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image_folders(tmp_path / "photos", {".": 4})
    tiny = [
        "net.hidden_size=32",
        "net.depth=1",
        "net.num_heads=2",
        "data.resolution=8",
        "train.total_images=64",
        "sample.steps=2",
    ]
    code, out, _ = gesso("train", "folder:photos", *tiny)
    assert code == 0 and "training without classes" in out and "sample runs/photos\n" in out
    assert gesso("sample", "runs/photos")[0] == 0
    assert_refused(gesso("sample", "runs/photos", "--label", "0"), "takes no label")
    code, out, _ = gesso("evaluate", "runs/photos")
    assert code == 0 and "no eval.metrics are set, so this makes: sheets of samples" in out
    assert gesso("report", "runs/photos")[0] == 0


def test_grid_places_images_row_by_row():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 1, 8, 8) * 10
    array = np.asarray(sampling.image_grid(images, 3, min_tile_size=8))
    assert array[5, [5, 15, 25]].tolist() == [0, 10, 20] and array[15, [5, 15, 25]].tolist() == [30, 40, 50]


def test_python_dash_m():
    import subprocess

    result = subprocess.run([sys.executable, "-m", "gesso", "recipes"], capture_output=True, text=True, check=True)
    assert "digits-edm2" in result.stdout
