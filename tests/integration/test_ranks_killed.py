"""Ranks that are killed at random instants, disks that refuse at random instants, and what becomes of the run."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.distributed import (
    MMDIT_SETTINGS,
    LaunchResult,
    launch,
    load_last_checkpoint,
    logged_losses,
    max_weight_difference,
)
from safetensors.torch import load_file

from gesso.training import checkpoint
from gesso.training.logging import read_log

STEPS, BATCH = 40, 7
SETTINGS = MMDIT_SETTINGS | {
    "train.dtype": "float64", "train.batch_size": BATCH, "train.total_images": STEPS * BATCH, "train.log_every": BATCH,
    "train.snapshot_every": 5 * BATCH, "train.checkpoint_every": 3 * BATCH, "train.num_threads": 1,
    "optim.warmup_images": 0,
}  # fmt: skip
# On one rank, after some seconds of its life. Files that grow beyond a few bytes are refused by the kernel itself.
FULL = """
import resource, threading
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
threading.Timer({after}, resource.setrlimit, (resource.RLIMIT_FSIZE, (5000, hard))).start()
"""
READ_ONLY = """
import errno, os, threading
def refuse(*a, **k):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
def become():
    os.replace = os.mkdir = refuse
threading.Timer({after}, become).start()
"""


def on(rank: int, prelude: str) -> str:
    return f"import os\nif os.environ.get('RANK', '0') == '{rank}':\n" + re.sub("^", "    ", prelude, flags=re.M)


def job(out: Path, prelude: str = "", **settings) -> dict:
    return {"out": str(out), "settings": SETTINGS | settings, "resume": True, "prelude": prelude}


def read_complete_files(out: Path) -> dict[str, int]:
    """Every file that a run may read by now, found whole: snapshots by their size, the newest state by its time."""
    actual = {}
    for path in (out / "snapshots").glob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())
        actual[path.name] = path.stat().st_size
    states = checkpoint.list_checkpoints(out / "state")
    for state in states:
        description = json.loads((state / "state.json").read_text())
        assert description["files"] and all(
            (state / name).stat().st_size == size for name, size in description["files"].items()
        )
    return actual | {"newest": max((int(state.name[4:]) for state in states), default=0)}


def life(out: Path, world: int, rng: random.Random, harm: str = "kill", **settings) -> LaunchResult:
    """Start or resume, and kill or stop one rank, or all, some time after training began. All end within a minute."""
    victims = [*range(world)] if rng.random() < 0.3 else [rng.randrange(world)]
    after, harmed = rng.uniform(0.0, 1.0), []

    def watch(pids: list[int], log: Path) -> None:
        started = time.monotonic()
        while "training in" not in log.read_text() and time.monotonic() - started < 60:
            time.sleep(0.01)
        time.sleep(after)
        harmed.append(time.monotonic())
        for rank in victims:
            signal.pidfd_send_signal(os.pidfd_open(pids[rank]), signal.SIGKILL)

    before = read_complete_files(out) if out.exists() else {"newest": 0}
    if harm == "kill":
        result = launch(world, [job(out, **settings)], check=False, on_start=watch)
        assert time.monotonic() - harmed[0] < 60
    else:
        prelude = {"full": FULL, "read-only": READ_ONLY}[harm].format(after=2 * after)
        result = launch(world, [job(out, on(victims[0], prelude), **settings)], check=False)
    now = read_complete_files(out)
    assert before.items() - {("newest", before["newest"])} <= now.items() and now["newest"] >= before["newest"]
    check_failure_messages(result, world, victims, harm)
    assert 0 not in result.codes or now["newest"] == STEPS * BATCH  # killed at the very end
    return result


def check_failure_messages(result: LaunchResult, world: int, victims: list[int], harm: str) -> None:
    """What the others say."""
    assert "Traceback" not in result.output, result.output
    for rank, code in enumerate(result.codes):
        assert code in (0, 1, -signal.SIGKILL), (rank, result)
    if harm == "kill" and 1 in result.codes and len(victims) < world:
        (victim,) = victims
        assert re.search(rf"rank {victim} of {world} \(\S+, process \d+\) is gone", result.output), result
    if harm == "full" and any(result.codes):
        assert "no space left" in result.output
    if harm == "read-only" and any(result.codes):
        assert "Read-only file system" in result.output


def finished(out: Path, world: int, **settings) -> None:
    launch(world, [job(out, **settings)])
    assert not list(out.rglob("*.tmp"))


def assert_equal(first: Path, second: Path, exactly: bool) -> None:
    if exactly:
        a, b = load_last_checkpoint(first), load_last_checkpoint(second)
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
        assert max_weight_difference(first, second) == 0 and logged_losses(first) == logged_losses(second)
    else:
        assert max_weight_difference(first, second) < 1e-10
        assert logged_losses(first) == pytest.approx(logged_losses(second), rel=1e-10)
    times = [line["nimg"] for line in read_log(first / "log.jsonl") if "loss" in line]
    assert times == [BATCH * (i + 1) for i in range(STEPS)]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> dict[tuple[int, str], Path]:
    """By number of ranks and sharding."""
    root, created = tmp_path_factory.mktemp("uninterrupted"), {}

    class RecordingDict(dict):
        def __missing__(self, key: tuple[int, str]) -> Path:
            world, sharding = key
            self[key] = root / f"{world}{sharding}"
            finished(self[key], world, **{"train.sharding": sharding})
            return self[key]

    created = RecordingDict()
    return created


def test_killed_and_resumed_on_other_numbers_of_ranks(uninterrupted, tmp_path):
    rng, out = random.Random(3), tmp_path / "run"
    for world in (2, 1, 2):
        life(out, world, rng)
    finished(out, 1)
    assert_equal(out, uninterrupted[1, "ddp"], exactly=False)


@pytest.mark.parametrize("harm", ["full", "read-only"])
def test_a_disk_that_refuses_one_rank(uninterrupted, tmp_path, harm):
    rng, out = random.Random(5), tmp_path / "run"
    life(out, 2, rng, harm)
    finished(out, 2)
    assert_equal(out, uninterrupted[2, "ddp"], exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_a_hundred_times(uninterrupted, tmp_path, seed):
    """25 of them for each seed."""
    rng, kills, runs = random.Random(seed), 0, 0
    while kills < 25:
        out, runs = tmp_path / f"run{runs}", runs + 1
        constant = rng.random() < 0.5
        world, sharding = rng.choice([1, 2]), rng.choice(["ddp", "fsdp"])
        while rng.random() < 0.75:
            now = world if constant else rng.choice([1, 2])
            options = {"train.sharding": sharding if constant else rng.choice(["ddp", "fsdp"])}
            result = life(out, now, rng, rng.choice(["kill", "kill", "kill", "full", "read-only"]), **options)
            kills += -signal.SIGKILL in result.codes
        finished(out, world, **{"train.sharding": sharding})
        assert_equal(out, uninterrupted[world, sharding], exactly=constant)
    assert runs > 2


@pytest.mark.slow
def test_a_rank_that_hangs(tmp_path):
    """It is named once train.rank_timeout_s is over."""

    def stop(pids: list[int], log: Path) -> None:
        started = time.monotonic()
        while "training in" not in log.read_text():
            time.sleep(0.01)
        handle = os.pidfd_open(pids[1])
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        while "gesso: rank" not in log.read_text() and time.monotonic() - started < 60:
            time.sleep(0.1)
        signal.pidfd_send_signal(handle, signal.SIGKILL)

    long = {"train.total_images": 10**6, "train.rank_timeout_s": 5}
    result = launch(2, [job(tmp_path / "run", **long)], check=False, on_start=stop)
    assert result.codes == [1, -signal.SIGKILL]
    assert re.search(r"gesso: rank 1 of 2 \(\S+, process \d+\) does not answer", result.output)


BEFORE_MEETING = """
import os, signal
from gesso.training.ranks import Ranks
wait = Ranks.barrier
def waiting(self):
    wait(self)
    if self.rank == 1 and __import__("sys")._getframe(1).f_code.co_name == "new_gloo_group":
        os.kill(os.getpid(), signal.SIGKILL)
Ranks.barrier = waiting
import datetime
from gesso.training import ranks
ranks.RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=2)
"""


def test_a_rank_that_dies_before_it_meets_the_others_in_a_group(tmp_path):
    """No connection breaks: the others wait for a key of the store, for RENDEZVOUS_TIMEOUT at most."""
    result = launch(2, [job(tmp_path / "run", BEFORE_MEETING)], check=False)
    assert result.codes == [1, -signal.SIGKILL] and re.search(
        r"gesso: rank 1 of 2 \(\S+, process \d+\) is gone", result.output
    )
