"""Starts ranks of gesso for a test, through tests/ranks_driver.py, and looks at what they wrote."""

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
from gesso.train import checkpoint
from gesso.train.log import read as read_log

DRIVER = Path(__file__).with_name("ranks_driver.py")


class Done(NamedTuple):
    """Exit codes of the ranks, minus the signal of one that was killed, and what all of them said."""

    codes: list[int]
    said: str


@functools.cache
def driver() -> subprocess.Popen:
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
    world: int,
    jobs: list[dict],
    check: bool = True,
    per_node: int | None = None,
    watch: Callable[[list[int], Path], None] = lambda pids, log: None,
) -> Done:
    """Run the jobs one after the other on `world` ranks. watch(process ids, log) may kill some."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        request = {"world": world, "per_node": per_node, "port": free_port(), "log": str(log), "jobs": jobs}
        driver().stdin.write(json.dumps(request) + "\n")
        driver().stdin.flush()
        watch(json.loads(driver().stdout.readline()), log)
        done = Done(json.loads(driver().stdout.readline()), log.read_text())
    assert not check or not any(done.codes), done
    return done


def torchrun(world: int, jobs: list[dict], *how: str) -> subprocess.CompletedProcess:
    """As `launch`, by torchrun itself."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *(how or ["--standalone"]), f"--nproc-per-node={world}", str(DRIVER), json.dumps(jobs)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def weights(out: Path | str) -> dict[str, torch.Tensor]:
    """All averages of all snapshots."""
    found = {}
    for stored in snapshot.stored(Path(out)):
        found |= {f"{stored.path.name}:{k}": v for k, v in snapshot.read(stored.path)[0].items()}
    return found


def last_state(out: Path | str) -> dict[str, torch.Tensor]:
    """The files of the last state, one or more for each rank, by the names of file and tensor."""
    last = checkpoint.stored(Path(out) / "state")[-1]
    return {f"{f.name}:{k}": t for f in sorted(last.glob("*.safetensors")) for k, t in load_file(f).items()}


def furthest(one: Path | str, other: Path | str) -> float:
    """The largest difference between the snapshots of two runs."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def losses(out: Path | str) -> list[float]:
    return [line["loss"] for line in read_log(Path(out) / "log.jsonl") if "loss" in line]
