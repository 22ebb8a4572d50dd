"""The loop: exact resume after any crash, stops on request, never a NaN in what it keeps."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.images import write_image_folders
from helpers.run_factory import tiny_run
from rich.console import Console
from safetensors.torch import load_file

from gesso import atomic_io, config, recipes, snapshot
from gesso.diffusion.denoiser import build_denoiser
from gesso.errors import RunError, StoppedError, UsageError
from gesso.training import checkpoint, loop, optimizer
from gesso.training.logging import HARDWARE_KEYS, read_log
from gesso.training.run_folder import open_dataset_for_run, start_training

QUIET = Console(quiet=True)
TINY = [
    "net.hidden_size=32", "net.depth=1", "net.num_heads=2", "net.patch_size=2", "data.resolution=8",
    "train.total_images=640",
    "train.batch_size=32", "train.snapshot_every=160", "train.checkpoint_every=96", "train.log_every=128",
    "train.num_threads=1", "optim.warmup_images=64", "optim.lr=1e-3",
]  # fmt: skip


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_image_folders(root, {"a": 30, "b": 20})
    return root


@pytest.fixture(scope="session")
def straight(photos, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    command(photos, out)
    return out


def arguments(photos: Path, out: Path, *settings: str) -> list[str]:
    return ["train", f"folder:{photos}", *TINY, *settings, "--out", str(out), "--resume"]


def command(photos, out, *settings, prelude="", check=True, **popen):
    """Train in another process, after some Python of the test's own."""
    words = ["gesso", *arguments(photos, out, *settings)]
    code = f"import sys\nsys.argv = {words!r}\n{prelude}\nfrom gesso.cli import main\nmain()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], check=check, env=environment, capture_output=True, text=True, **popen
    )


def everything(out: Path) -> dict:
    """All tensors of the last state, all snapshots, all log lines but their speed."""
    last = checkpoint.list_checkpoints(out / "state")[-1]
    tensors = {f"{last.name}/{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}
    snapshots = {p.name: p.read_bytes() for p in sorted((out / "snapshots").glob("*.safetensors"))}
    lines = [{k: v for k, v in line.items() if k not in HARDWARE_KEYS} for line in read_log(out / "log.jsonl")]
    return {"tensors": tensors, "snapshots": snapshots, "log": lines}


def assert_same(a: Path, b: Path) -> None:
    first, second = everything(a), everything(b)
    assert first["tensors"].keys() == second["tensors"].keys() and len(first["tensors"]) > 50
    assert [k for k in first["tensors"] if not first["tensors"][k].equal(second["tensors"][k])] == []
    assert first["snapshots"].keys() == second["snapshots"].keys() and len(first["snapshots"]) == 8
    assert [k for k in first["snapshots"] if first["snapshots"][k] != second["snapshots"][k]] == []
    assert first["log"] == second["log"] and len(first["log"]) == 5


def killed_at_random(photos: Path, out: Path, rng: random.Random) -> bool:
    """Start or resume, kill -9 some time after training began; whether it was alive then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "gesso", *arguments(photos, out)]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for output in process.stdout:
            if b"training in" in output:
                break
        time.sleep(rng.uniform(0.0, 0.6))
        alive = process.poll() is None
        process.kill()
    return alive


def test_killed_at_random_instants(photos, straight, tmp_path):
    rng = random.Random(0)
    out = tmp_path / "run"
    assert sum(killed_at_random(photos, out, rng) for _ in range(3)) > 0
    command(photos, out)
    assert_same(straight, out)


@pytest.mark.slow
def test_killed_a_hundred_times(photos, straight, tmp_path):
    rng = random.Random(1)
    kills = 0
    for i in range(100):
        out = tmp_path / f"run{i}"
        while killed_at_random(photos, out, rng):
            kills += 1
            if rng.random() < 0.5:
                break
        command(photos, out)
        assert_same(straight, out)
    assert kills >= 100


KILL_AT = """
import os, signal
from gesso import atomic_io
count = 0
def counted(function):
    def call(*a, **k):
        global count
        count += 1
        if count == {n}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*a, **k)
    return call
atomic_io.fsync = counted(atomic_io.fsync)
atomic_io.os.replace = counted(os.replace)
atomic_io.remove_dir = counted(atomic_io.remove_dir)
"""


@pytest.mark.parametrize("n", [2, 9, 13, 21, 35])
def test_killed_inside_a_save(photos, straight, tmp_path, n):
    """The n-th flush, rename or removal never returns: before run.yaml, inside snapshots, inside states."""
    out = tmp_path / "run"
    assert command(photos, out, prelude=KILL_AT.format(n=n), check=False).returncode == -signal.SIGKILL
    command(photos, out)
    assert_same(straight, out)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_killed_inside_every_save(photos, straight, tmp_path):
    n = 0
    while True:
        n += 1
        out = tmp_path / f"run{n}"
        if command(photos, out, prelude=KILL_AT.format(n=n), check=False).returncode == 0:
            break
        command(photos, out)
        assert_same(straight, out)
    assert n > 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(photos, straight, tmp_path, number):
    out = tmp_path / "run"
    at_step = f"""
import os
from gesso.training import loop
step = loop.Trainer.step
def stepping(self):
    if self.nimg == 224:
        os.kill(os.getpid(), {int(number)})
    return step(self)
loop.Trainer.step = stepping
"""
    process = command(photos, out, prelude=at_step, check=False)
    assert process.returncode == 128 + number
    assert (
        "a checkpoint is written" in process.stderr
        and "--resume" in process.stderr
        and "Traceback" not in process.stderr
    )
    assert checkpoint.list_checkpoints(out / "state")[-1].name == "nimg000000000256"
    command(photos, out)
    assert_same(straight, out)


def trained(tmp_path, **settings) -> Path:
    out = tmp_path / "run"
    start_training(tiny_run(**settings), out, False, QUIET, lambda text: None)
    return out


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("digits"))


def test_same_seed_same_numbers_other_seed_others(digits_run, tmp_path):
    again = trained(tmp_path / "again")
    other = trained(tmp_path / "other", **{"train.seed": 1})
    name = snapshot.list_snapshots(digits_run)[-1].path.name
    same, different = ((d / "snapshots" / name).read_bytes() for d in (again, other))
    assert (digits_run / "snapshots" / name).read_bytes() == same != different


def test_a_run_folder_is_not_overwritten(digits_run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in digits_run.rglob("*")}
    with pytest.raises(UsageError, match="already contains a run"):
        start_training(tiny_run(), digits_run, False, QUIET, print)
    with pytest.raises(UsageError, match="already contains a run"):
        start_training(tiny_run(**{"train.seed": 5}), digits_run, False, QUIET, print)
    with pytest.raises(UsageError, match=r"train\.seed: recorded 0, now 5"):
        start_training(tiny_run(**{"train.seed": 5}), digits_run, True, QUIET, print)
    assert {p: p.stat().st_mtime_ns for p in digits_run.rglob("*") if p.name != ".lock"}.items() <= before.items()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"contains other files \(thesis.tex\)"):
        start_training(tiny_run(), tmp_path, True, QUIET, print)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="cannot write"):
        trained(tmp_path)


def test_two_processes_on_one_folder(tmp_path):
    with atomic_io.lock_dir(tmp_path), pytest.raises(UsageError, match="another process"), atomic_io.lock_dir(tmp_path):
        pass


def test_changed_images_are_noticed(photos, tmp_path):
    write_image_folders(tmp_path / "images", {"a": 5, "b": 5})
    run = recipes.resolve(f"folder:{tmp_path / 'images'}", TINY)[0]
    out = tmp_path / "run"
    start_training(run, out, False, QUIET, print)
    (tmp_path / "images" / "a" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"data\.num_images: recorded 10, now 9"):
        start_training(run, out, True, QUIET, print)


def test_run_yaml_repeats_the_run(digits_run, tmp_path):
    repeated = recipes.resolve(str(digits_run / "run.yaml"), [])[0]
    out = tmp_path / "repeat"
    start_training(repeated, out, False, QUIET, print)
    for stored in snapshot.list_snapshots(digits_run):
        a, b = (load_file(d / "snapshots" / stored.path.name) for d in (digits_run, out))
        assert all(a[k].equal(b[k]) for k in a)


def copy_of(run: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize("harm", ["truncate", "remove", "garble"])
def test_a_damaged_state_is_passed_over(digits_run, tmp_path, harm):
    """The state before it leads to the same weights."""
    out = copy_of(digits_run, tmp_path)
    last = checkpoint.list_checkpoints(out / "state")[-1]
    shard = next(last.glob("*.safetensors"))
    if harm == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm == "remove":
        shard.unlink()
    else:
        (last / "state.json").write_text("{")
    warned = []
    trainer = loop.Trainer(*open_dataset_for_run(config.load_config(out / "run.yaml"), QUIET))
    assert checkpoint.load_latest(out / "state", trainer.state_tensors(), warned.append) < 640
    assert "damaged" in warned[0]
    start_training(tiny_run(), out, True, QUIET, print)
    for stored in snapshot.list_snapshots(digits_run):
        assert stored.path.read_bytes() == (out / "snapshots" / stored.path.name).read_bytes()


def test_all_states_damaged(digits_run, tmp_path):
    out = copy_of(digits_run, tmp_path)
    for state in checkpoint.list_checkpoints(out / "state"):
        next(state.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(RunError, match="all checkpoints are damaged"):
        start_training(tiny_run(), out, True, QUIET, print)


def test_the_state_of_another_network(digits_run, tmp_path):
    other_trainer = loop.Trainer(*open_dataset_for_run(tiny_run(**{"net.depth": 2}), QUIET))
    with pytest.raises(RunError, match=r"checkpoint of another network: missing \['ema"):
        checkpoint.load_latest(digits_run / "state", other_trainer.state_tensors(), print)


@pytest.mark.parametrize("when", [0, 160])
def test_nan_stops_the_run_and_reaches_nothing(tmp_path, monkeypatch, when):
    step = loop.Trainer.step

    def poisoned(self):
        if self.nimg == when:
            self.batcher.normalizer.std = self.batcher.normalizer.std * float("nan")
        return step(self)

    monkeypatch.setattr(loop.Trainer, "step", poisoned)
    with pytest.raises(RunError) as caught:
        trained(tmp_path)
    output = str(caught.value)
    assert f"not finite at image {when}" in output and "noise levels" in output and "optim.lr" in output
    assert ("nimg000000000096" in output) if when else ("no checkpoint was written" in output)
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values())


def test_a_full_disk_loses_nothing(photos, straight, tmp_path, monkeypatch):
    out = tmp_path / "run"
    full = """
import errno
from gesso import safetensors_io
save = safetensors_io.save_file
count = 0
def full(tensors, path, metadata):
    global count
    count += 1
    if count == 5:
        open(path, "wb").write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    return save(tensors, path, metadata)
safetensors_io.save_file = full
"""
    process = command(photos, out, prelude=full, check=False)
    assert process.returncode == 1 and "no space left" in process.stderr and "Traceback" not in process.stderr
    assert len(list((out / "snapshots").iterdir())) == 4
    command(photos, out)
    assert_same(straight, out)


def test_learning_rates():
    train = config.TrainConfig(total_images=1000)
    edm2 = config.OptimConfig(lr=0.01, schedule="inverse_sqrt", ref_images=400, warmup_images=100)
    rate = lambda o, n: optimizer.learning_rate(o, train, n)  # noqa: E731
    assert rate(edm2, 0) == 0 and rate(edm2, 50) == pytest.approx(0.005) and rate(edm2, 400) == pytest.approx(0.01)
    assert rate(edm2, 1600) == pytest.approx(0.005)
    cosine = config.OptimConfig(lr=0.01, schedule="cosine")
    assert (
        rate(cosine, 0) == 0.01 and rate(cosine, 500) == pytest.approx(0.005) and rate(cosine, 1000) == pytest.approx(0)
    )
    assert rate(config.OptimConfig(lr=0.3), 10**9) == 0.3


def test_decay_spares_the_sphere_gains_and_norms():
    run = recipes.resolve("digits-edm2", ["optim.weight_decay=0.1", "optim.name=adamw"])[0]
    trainer = loop.Trainer(*open_dataset_for_run(run, QUIET))
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not decayed  # all matrices of EDM2 are on the sphere
    trainer = loop.Trainer(*open_dataset_for_run(tiny_run(**{"optim.weight_decay": 0.1}), QUIET))
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in trainer.modules.parameters() if p.ndim > 1}


def test_gradient_clipping(tmp_path):
    clipped = loop.Trainer(*open_dataset_for_run(tiny_run(**{"optim.max_grad_norm": 1e-3}), QUIET))
    clipped.step()
    total = torch.nn.utils.get_total_norm([p.grad for p in clipped.modules.parameters()])
    assert clipped.grad_norm > 1e-2 and float(total) == pytest.approx(1e-3, rel=1e-3)


def test_trained_weights_stay_on_the_sphere_and_averages_are_put_back(tmp_path):
    from gesso.models import mp

    settings = [
        "net.channels=16",
        "net.channel_mult=[1,2]",
        "net.num_blocks=1",
        "net.channels_per_head=16",
        "train.total_images=320",
        "optim.warmup_images=0",
        "optim.lr=0.1",
    ]
    run = recipes.resolve("digits-edm2", [*settings, "train.batch_size=32", "train.snapshot_every=160"])[0]
    start_training(run, tmp_path / "run", False, QUIET, print)
    tensors, run, _ = snapshot.read(snapshot.list_snapshots(tmp_path / "run")[-1].path)
    raw = tensors["conv_in.weight"].flatten(1).square().mean(1)
    assert (raw < 0.9999).any()  # an average lies inside the sphere
    layers = [m for m in snapshot.denoiser_from_weights(tensors, run).modules() if isinstance(m, mp.MPWeight)]
    for layer, fresh in zip(
        layers, (m for m in build_denoiser(run).modules() if isinstance(m, mp.MPWeight)), strict=True
    ):
        rms = layer.weight.flatten(1).square().mean(1).sqrt()  # on the sphere, with the constants folded in
        torch.testing.assert_close(rms, torch.full_like(rms, fresh.scale), rtol=1e-5, atol=0)
        assert layer.scale == 1


def test_dropout_is_keyed_to_the_step(tmp_path):
    settings = [
        "net.channels=16",
        "net.channel_mult=[1,2]",
        "net.num_blocks=1",
        "net.channels_per_head=16",
        "net.dropout=0.3",
    ]
    losses = []
    for disturb in (False, True):
        trainer = loop.Trainer(
            *open_dataset_for_run(recipes.resolve("digits-edm2", [*settings, "train.batch_size=8"])[0], QUIET)
        )
        torch.manual_seed(99 if disturb else 1)
        losses.append([trainer.step() for _ in range(4)])
    assert losses[0] == losses[1]


def test_stopped_carries_the_shells_exit_code():
    assert StoppedError("x", signal.SIGTERM).exit_code == 143 and StoppedError("x", signal.SIGINT).exit_code == 130


def test_log_without_its_torn_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"nimg": 1}\n{"nimg": 2, "lo')
    assert read_log(path) == [{"nimg": 1}]
    assert json.loads(path.read_text().splitlines()[0]) == {"nimg": 1}
