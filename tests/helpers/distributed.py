"""Run training jobs on several ranks through tests/helpers/ranks_driver.py, and read their results."""

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
    "train.log_every": BATCH_SIZE, "train.snapshot_every": NUM_STEPS * BATCH_SIZE,
    "train.checkpoint_every": 10 * BATCH_SIZE,
    "optim.warmup_images": 0, "train.num_threads": 1,
}  # fmt: skip
MMDIT_SETTINGS = {"net.hidden_size": 32, "net.depth": 1, "net.num_heads": 2}
DRIVER = Path(__file__).with_name("ranks_driver.py")


class LaunchResult(NamedTuple):
    """Exit codes of the ranks, negative for the signal that killed a rank, and the output of all ranks."""

    codes: list[int]
    output: str


@functools.cache
def start_driver() -> subprocess.Popen:
    """Start the driver once per test process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(
        [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(driver.stdin.close)
    return driver


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def launch(
    world_size: int,
    jobs: list[dict],
    check: bool = True,
    per_node: int | None = None,
    on_start: Callable[[list[int], Path], None] = lambda pids, log: None,
) -> LaunchResult:
    """Run jobs one after another on `world_size` ranks.

    Args:
        world_size: Number of ranks.
        jobs: Jobs in the format of ranks_driver.py.
        check: Whether every rank must exit with code 0.
        per_node: Ranks of a node (LOCAL_WORLD_SIZE); all by default.
        on_start: Called with the process ids and the log file after the start, for example to kill a rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        request = {"world": world_size, "per_node": per_node, "port": free_port(), "log": str(log), "jobs": jobs}
        driver = start_driver()
        driver.stdin.write(json.dumps(request) + "\n")
        driver.stdin.flush()
        on_start(json.loads(driver.stdout.readline()), log)
        result = LaunchResult(json.loads(driver.stdout.readline()), log.read_text())
    assert not check or not any(result.codes), result
    return result


def launch_torchrun(world_size: int, jobs: list[dict], *options: str) -> subprocess.CompletedProcess:
    """Run jobs on `world_size` ranks that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *(options or ["--standalone"])]
    command = [*torchrun, f"--nproc-per-node={world_size}", str(DRIVER), json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def snapshot_weights(out: Path | str) -> dict[str, torch.Tensor]:
    """Return the weights of all snapshots of a run, by file and tensor name."""
    weights = {}
    for stored in snapshot.list_snapshots(Path(out)):
        weights |= {f"{stored.path.name}:{k}": v for k, v in snapshot.read(stored.path)[0].items()}
    return weights


def load_last_checkpoint(out: Path | str) -> dict[str, torch.Tensor]:
    """Return the tensors of the last checkpoint of a run, by file and tensor name."""
    last = checkpoint.list_checkpoints(Path(out) / "state")[-1]
    return {f"{f.name}:{k}": t for f in sorted(last.glob("*.safetensors")) for k, t in load_file(f).items()}


def max_weight_difference(first: Path | str, second: Path | str) -> float:
    """Return the largest difference between the snapshot weights of two runs."""
    a, b = snapshot_weights(first), snapshot_weights(second)
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def logged_losses(out: Path | str) -> list[float]:
    """Return the training losses of a run's log."""
    return [line["loss"] for line in read_log(Path(out) / "log.jsonl") if "loss" in line]
