"""gesso train RECIPE --estimate: what it says is what training takes, and it leaves nothing behind."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers.run_factory import tiny_run
from rich.console import Console

from gesso import recipes
from gesso.data.base import SampleBatch
from gesso.data.synthetic import with_synthetic_data
from gesso.errors import UsageError
from gesso.training import estimate, loop
from gesso.training.estimate import StepMeasurements, format_bytes, format_duration
from gesso.training.run_folder import open_dataset_for_run, start_training

QUIET = Console(quiet=True)


def test_parts_are_what_a_trainer_holds():
    for settings in ({}, {"ema.halflives": "[5000]"}, {"train.dtype": "float64"}):
        run, dataset = open_dataset_for_run(tiny_run(**settings), QUIET)
        trainer = loop.Trainer(run, dataset)
        trainer.step()
        measured, counted = estimate.memory_by_category(trainer), estimate.static_memory(run)
        buffers = sum(b.nbytes for b in trainer.modules.buffers())
        assert measured["weights"] == counted["weights"] + buffers
        gradients = sum(p.grad.nbytes for p in trainer.modules.parameters() if p.grad is not None)
        assert gradients <= measured["gradients"] == counted["gradients"]
        steps = 4 * len(list(trainer.modules.parameters()))
        assert measured["optimizer"] == counted["optimizer"] + steps
        assert measured["averages"] == counted["averages"]
        assert counted["averages"] == (3 if settings.get("ema.halflives") else 2) * counted["weights"]


def test_disk_is_what_a_run_writes(tmp_path):
    """Counts exactly, sizes but for the headers of the files."""
    settings = {"train.total_images": 700, "train.keep_checkpoints": 2, "train.milestone_every": 192}
    run = tiny_run(**settings)
    start_training(run, tmp_path / "run", False, QUIET, lambda text: None)
    lines = estimate.estimate(run, QUIET, seconds=2)
    line = lines[-1]
    snapshots, size = re.search(r"([\d,]+) snapshots of ([\d.]+ .B)", line).groups()
    states, state = re.search(r"(\d+) checkpoints of ([\d.]+ .B)", line).groups()
    files = list((tmp_path / "run" / "snapshots").glob("*.safetensors"))
    assert int(snapshots) == len(files)
    folders = list((tmp_path / "run" / "state").glob("nimg*"))
    assert int(states) >= len(folders) >= 2  # milestones that are among the last are counted twice
    room = {"kB": 1e3, "MB": 1e6}
    for output, path in ((size, files[0]), (state, folders[0])):
        num_bytes = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())
        number, unit = output.split()
        assert float(number) * room[unit] == pytest.approx(num_bytes, rel=0.15)


def test_time_of_a_full_batch():
    """Passes take their time for every image, the update takes it once."""
    measured = StepMeasurements(batch_size=4, step_seconds=[3.0, 5.0], pass_seconds=[2.0, 3.0])
    assert measured.scaled_step_seconds(4) == [3.0, 5.0]
    assert measured.scaled_step_seconds(40) == [1 + 20, 2 + 30]


def test_memory_of_more_at_once():
    measured = StepMeasurements(peak_bytes={1: 100, 2: 110, 4: 130})
    assert measured.predict_peak(0, 2) == 110 and measured.predict_peak(0, 8) == 170
    assert StepMeasurements(peak_bytes={4: 130}).predict_peak(90, 8) == 170  # what is held, and four times ten
    assert StepMeasurements(peak_bytes={2: 100, 4: 100}).predict_peak(0, 64) == 100


@pytest.mark.parametrize(
    "peaks, micro_batch, peak, expected",
    [
        ({1: 100_000}, 8, 100_000, ["at least 100 kB", "8 samples per pass (extrapolated from 1)",
                                    "too small to measure",
                                    "with 1 sample per pass", "more samples per pass than 1 were not measured"]),
        ({1: 150_000}, 8, 500_000, ["at least 500 kB", "activations and the rest 400 kB", "than 1 were not measured"]),
        ({4: 100_000, 8: 100_000}, 8, 100_000, ["at least 100 kB", "too small to measure with 8 samples"]),
    ],
)  # fmt: skip
def test_memory_that_was_not_measured_is_a_bound(peaks, micro_batch, peak, expected):
    trial = estimate.TrialResult(StepMeasurements(peak_bytes=peaks), {"weights": 100_000}, peak, micro_batch, 1, 1)
    text = estimate.memory_lines(trial, torch.device("cpu"))[0]
    assert all(part in text for part in expected) and "activations and the rest 0 B" not in text, text


def test_measured_memory_is_no_bound():
    trial = estimate.TrialResult(StepMeasurements(peak_bytes={1: 120, 2: 140}), {"weights": 100}, 260, 8, 1, 1)
    text = estimate.memory_lines(trial, torch.device("cpu"))[0]
    assert "260 B per rank with 8 samples per pass (extrapolated from 1, 2): weights 100 B" in text
    assert "at least" not in text and "activations and the rest 160 B" in text


def test_estimate_output():
    assert [format_bytes(n) for n in (0, 999, 1000, 12_345, 7.5e9, 25e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 kB",
        "7.5 GB",
        "25 TB",
    ]
    assert [format_duration(s) for s in (1, 600, 7200, 90 * 86400)] == ["1 min", "10 min", "2.0 hours", "90.0 days"]


def test_it_leaves_nothing_and_says_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head, memory, speed, time, disk = estimate.estimate(tiny_run(), QUIET, seconds=5)
    assert os.listdir(tmp_path) == [] and "snapshots" in disk
    assert re.match(r"digits on cpu, 1 rank: \d+ steps of 32 images$", head)
    assert re.search(r"memory +(at least )?[\d.]+ [kM]B per rank with 32 samples per pass: weights .*averages", memory)
    assert re.search(r"images/s \([\d.e+,]+ to [\d.e+,]+ in 80 %", speed)
    assert "for 640 images, 20 steps" in time


@pytest.mark.parametrize(
    "recipe",
    ["in1k-256-dit", "cc12m-256-berrada", "cc12m-256-sdxl", "edm2-img512-xs", "folder"],
)
def test_a_source_that_is_not_there_yet(recipe):
    """Samples of the shape that the real ones would have, so that the network takes them."""
    small = {
        "in1k-256-dit": ["net.hidden_size=32", "net.depth=1", "net.num_heads=2"],
        "folder": ["net.hidden_size=32", "net.depth=1"],
        "cc12m-256-berrada": ["net.hidden_size=32", "net.depth=1", "net.num_heads=2"],
        "cc12m-256-sdxl": ["net.channels=32", "net.transformer_depth=[1,0,0,0]", "net.num_heads=2"],
        "edm2-img512-xs": ["net.channels=16", "net.channels_per_head=16", "train.precision=full"],
    }[recipe]  # fmt: skip
    run = recipes.resolve(recipe, [*small, "train.batch_size=2", "train.total_images=64", "data.source=not/there"])[0]
    _, dataset = with_synthetic_data(run)
    samples = dataset.get(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert isinstance(samples, SampleBatch) and samples.x.shape[0] == 2
    assert samples.x.shape[1] == run.x0_channels * (2 if run.latent.vae else 1)
    assert samples.x.shape[2:] == (run.input_spec.resolution,) * 2
    lines = estimate.estimate(run, QUIET, seconds=2)
    assert "images of random values, as data.source=not/there does not exist" in lines[0]


def test_more_than_there_is_is_not_tried(monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1e9)
    lines = estimate.estimate(recipes.resolve("cc12m-256-berrada", [])[0], QUIET)
    assert (
        "not measured, as a rank needs 22" in lines[0] and "weights 3.17 GB" in lines[1] and "optimizer 6.3" in lines[1]
    )
    assert "snapshots of 3.17 GB" in lines[2]


def test_errors_are_those_of_training():
    with pytest.raises(UsageError, match="matches no parameter"):
        estimate.estimate(recipes.resolve("digits", ['optim.param_groups=[{"match":"x.*"}]'])[0], QUIET)


SCRIPT = """
import atexit, os, sys
from pathlib import Path
from gesso import cli

def print_threads():
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    print("gloo threads at exit:", sum("gloo" in name for name in names), flush=True)

atexit.register(print_threads)
cli.main()
"""


def test_two_ranks(tmp_path):
    """The estimate is printed once, nothing is written, and no gloo thread outlives the process group.

    A gloo thread that waits for the GIL while the interpreter ends aborts the process.
    """
    script, cwd = tmp_path / "script.py", tmp_path / "cwd"
    script.write_text(SCRIPT)
    cwd.mkdir()
    settings = ["net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.batch_size=8", "train.total_images=64"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.run(
        [*command, "train", "digits", "--estimate", *settings],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("on cpu, 2 ranks:") == 1 and "4 samples per pass" in process.stdout
    assert process.stdout.count("gloo threads at exit: 0") == 2
    assert list(cwd.iterdir()) == []
