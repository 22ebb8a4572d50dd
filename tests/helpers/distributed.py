"""Starts ranks of gesso for a test, through tests/helpers/ranks_driver.py, and looks at what they wrote."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from gesso import snapshot
from gesso.training import checkpoint
from gesso.training.logging import read_log

NUM_STEPS, BATCH_SIZE = 50, 7  # 7 is divisible by neither 2 nor 3
FLOAT64_TRAINING = {
    "train.dtype": "float64", "train.batch_size": BATCH_SIZE, "train.total_images": NUM_STEPS * BATCH_SIZE,
    "train.log_every": BATCH_SIZE, "train.snapshot_every": NUM_STEPS * BATCH_SIZE, "train.checkpoint_every": 10 * BATCH_SIZE,
    "optim.warmup_images": 0, "train.num_threads": 1,
}  # fmt: skip
MMDIT_SETTINGS = {"net.hidden_size": 32, "net.depth": 1, "net.num_heads": 2}
DRIVER = Path(__file__).with_name("ranks_driver.py")


class LaunchResult(NamedTuple):
    """Exit codes of the ranks, minus the signal of one that was killed, and what all of them said."""

    codes: list[int]
    output: str


@functools.cache
def start_driver() -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(started.stdin.close)
    return started


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("localhost", 0))
        return some.getsockname()[1]


def launch(
    world_size: int,
    jobs: list[dict],
    check: bool = True,
    per_node: int | None = None,
    on_start: Callable[[list[int], Path], None] = lambda pids, log: None,
) -> LaunchResult:
    """Run the jobs one after the other on `world` ranks. watch(process ids, log) may kill some."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        request = {"world": world_size, "per_node": per_node, "port": free_port(), "log": str(log), "jobs": jobs}
        start_driver().stdin.write(json.dumps(request) + "\n")
        start_driver().stdin.flush()
        on_start(json.loads(start_driver().stdout.readline()), log)
        done = LaunchResult(json.loads(start_driver().stdout.readline()), log.read_text())
    assert not check or not any(done.codes), done
    return done


def launch_torchrun(world_size: int, jobs: list[dict], *options: str) -> subprocess.CompletedProcess:
    """As `launch`, by torchrun itself."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *(options or ["--standalone"]), f"--nproc-per-node={world_size}", str(DRIVER), json.dumps(jobs)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def snapshot_weights(out: Path | str) -> dict[str, torch.Tensor]:
    """All averages of all snapshots."""
    actual = {}
    for stored in snapshot.list_snapshots(Path(out)):
        actual |= {f"{stored.path.name}:{k}": v for k, v in snapshot.read(stored.path)[0].items()}
    return actual


def load_last_checkpoint(out: Path | str) -> dict[str, torch.Tensor]:
    """The files of the last state, one or more for each rank, by the names of file and tensor."""
    last = checkpoint.list_checkpoints(Path(out) / "state")[-1]
    return {f"{f.name}:{k}": t for f in sorted(last.glob("*.safetensors")) for k, t in load_file(f).items()}


def max_weight_difference(first: Path | str, second: Path | str) -> float:
    """The largest difference between the snapshots of two runs."""
    a, b = snapshot_weights(first), snapshot_weights(second)
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def logged_losses(out: Path | str) -> list[float]:
    return [line["loss"] for line in read_log(Path(out) / "log.jsonl") if "loss" in line]
