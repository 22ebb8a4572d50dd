"""A run is its images, not a spelling of their path; a finished run can be trained longer."""

import shutil
from pathlib import Path

import pytest
from helpers.cli import assert_refused
from helpers.images import write_image_folders
from helpers.run_factory import QUIET_CONSOLE, small_run

from gesso import config, snapshot
from gesso.training.logging import HARDWARE_KEYS, read_log
from gesso.training.run_folder import start_training, with_absolute_paths

TINY = [
    "net.hidden_size=32", "net.depth=1", "net.num_heads=2", "data.resolution=8", "train.total_images=32",
    "train.batch_size=16", "train.checkpoint_every=16", "train.snapshot_every=16", "train.num_threads=1",
    "sample.steps=2",
]  # fmt: skip


@pytest.fixture
def trained(gesso, tmp_path, monkeypatch) -> Path:
    """Return a folder with photos/ and a run on them, trained from that folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_image_folders(tmp_path / "work" / "photos", {"a": 4, "b": 4})
    assert gesso("train", "folder:photos", *TINY, "--out", "run")[0] == 0
    return tmp_path / "work"


def recorded_source(folder: Path) -> str:
    return config.load_config(folder / "run.yaml").data.source


def test_equal_spellings_of_a_path_resume_one_run(gesso, trained):
    assert recorded_source(Path("run")) == str(trained / "photos")
    for spelling in ("./photos", "photos/", "../work/photos", trained / "photos"):
        code, _, err = gesso("train", f"folder:{spelling}", *TINY, "--out", "run", "--resume")
        assert code == 0, err
        assert recorded_source(Path("run")) == str(trained / "photos")


def test_run_works_from_another_folder(gesso, trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    assert gesso("evaluate", "work/run")[0] == 0
    assert gesso("train", "work/run", "--resume")[0] == 0


def test_moved_images_belong_to_the_run(gesso, trained):
    shutil.move("photos", "elsewhere")
    assert_refused(gesso("evaluate", "run"), "there is no such folder")
    assert gesso("evaluate", "run", "data.source=elsewhere")[0] == 0
    assert recorded_source(Path("run")) == str(trained / "photos")  # evaluation changes nothing
    assert gesso("train", "run", "data.source=elsewhere", "--resume")[0] == 0
    assert recorded_source(Path("run")) == str(trained / "elsewhere")
    assert gesso("evaluate", "run")[0] == 0


def test_other_images_do_not(gesso, trained):
    write_image_folders(trained / "other", {"a": 4, "b": 5})
    before = Path("run/run.yaml").read_bytes()
    refused = gesso("train", "run", "data.source=other", "--resume")
    assert refused[0] == 2 and "contains another run" in refused[2] and "data.fingerprint" in refused[2]
    assert_refused(gesso("evaluate", "run", "data.source=other"), "name a copy with data.source=PATH")
    metrics = ("eval.metrics=loss", "eval.validation_source=photos", "eval.validation_pairs=16")
    assert_refused(gesso("evaluate", "run", "data.source=other", *metrics), "holds other images than the run")
    assert gesso("evaluate", "run", "data.source=photos/", *metrics)[0] == 0
    assert Path("run/run.yaml").read_bytes() == before


def test_paths_become_absolute_where_they_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    (tmp_path / "digits").mkdir()
    (tmp_path / "ref").mkdir()
    run = with_absolute_paths(small_run(**{"eval.reference": "ref", "eval.prompts": "missing"}))
    assert run.eval.reference == str(tmp_path / "ref") and run.eval.prompts == "missing"
    assert run.data.source == "digits" and run.semantic.encoder == "words"  # keywords, not these folders
    again = with_absolute_paths(small_run(**{"init.source": "x@0.1"}), small_run(**{"init.source": tmp_path / "x@0.1"}))
    assert again.init.source == str(tmp_path / "x@0.1")  # the recorded one, although it no longer exists


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_finished_run_is_trained_longer(schedule, tmp_path):
    """The weights, averages and log equal those of one training of the final length."""
    short, long = (small_run(**{"train.total_images": n, "optim.schedule": schedule}) for n in (48, 96))
    start_training(short, tmp_path / "grown", False, QUIET_CONSOLE, print)
    recorded = start_training(long, tmp_path / "grown", True, QUIET_CONSOLE, print)
    assert recorded.train.total_images == 96
    assert config.load_config(tmp_path / "grown" / "run.yaml").train.total_images == 96
    start_training(long, tmp_path / "one", False, QUIET_CONSOLE, print)
    for grown, one in zip(*(snapshot.list_snapshots(tmp_path / name)[-2:] for name in ("grown", "one")), strict=True):
        a, b = (snapshot.read(s.path)[0] for s in (grown, one))
        assert grown.nimg == one.nimg == 96 and all(a[name].equal(b[name]) for name in b)
    logs = [
        [{k: v for k, v in line.items() if k not in HARDWARE_KEYS} for line in read_log(tmp_path / name / "log.jsonl")]
        for name in ("grown", "one")
    ]
    assert logs[0] == logs[1]
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(tmp_path / "grown"), [snapshot.PowerProfile(0.07)])
    assert len(plan.sources) == 12  # snapshots of both parts


def test_lengths_that_cannot_be_resumed(gesso, tmp_path):
    run = small_run(**{"optim.schedule": "cosine"})
    start_training(run, tmp_path / "a run", False, QUIET_CONSOLE, print)
    before = (tmp_path / "a run" / "run.yaml").read_bytes()
    refused = gesso("train", tmp_path / "a run", "train.total_images=96", "--resume")
    assert_refused(refused, "cannot be trained longer: optim.schedule=cosine decays to 0 at train.total_images=48")
    assert f"init='{tmp_path}/a run'" in refused[2]
    assert_refused(gesso("train", tmp_path / "a run", "train.total_images=32", "--resume"), "32 is less")
    assert (tmp_path / "a run" / "run.yaml").read_bytes() == before
    assert gesso("train", tmp_path / "a run", "--resume")[0] == 0


def test_finished_run_says_how_to_go_on(gesso, tmp_path):
    start_training(small_run(), tmp_path / "run", False, QUIET_CONSOLE, print)
    code, out, _ = gesso("train", tmp_path / "run", "--resume")
    assert code == 0 and "the run is finished; train.total_images=96" in out
