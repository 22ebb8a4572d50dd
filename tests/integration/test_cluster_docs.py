"""docs/cluster.md: every command parses, and the Slurm script runs with substitutes for Slurm's commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser

from gesso import cli, recipes
from gesso.training import checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
README = (Path(__file__).parents[2] / "README.md").read_text()
LINES = re.findall(r"^torchrun .*-m gesso train.*$", PAGE + README, re.M)
(SCRIPT,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.S | re.M)
COMMANDS = typer.main.get_command(cli.app).commands


def check_command(line: str) -> None:
    """Parse a command line with torchrun and gesso, and resolve its settings."""
    launch = get_args_parser().parse_args(shlex.split(line, comments=True)[1:])
    assert launch.module and launch.training_script == "gesso"
    command, *arguments = launch.training_script_args
    params = COMMANDS[command].make_context(command, arguments).params
    recipes.resolve(params["recipe"], params["settings"] or [])


@pytest.mark.parametrize("line", LINES)
def test_command_parses(line):
    check_command(line)


def test_script_parses():
    assert len(LINES) >= 5
    command = re.search(r"^srun (torchrun .*?) &$", SCRIPT.replace("\\\n", " "), re.S | re.M)[1]
    line = command.replace('"$SLURM_NNODES"', "4").replace('"$(scontrol show hostnames | head -n 1):29500"', "a:29500")
    check_command(line)
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=False).returncode == 0
    minutes = int(re.search(r"--signal=B:USR1@(\d+)", SCRIPT)[1])
    assert minutes > int(re.search(r"--shutdown-timeout=(\d+)", SCRIPT)[1])


def test_documented_error_messages():
    source = "".join(p.read_text() for p in (Path(__file__).parents[2] / "gesso" / "training").glob("*.py"))
    for message in ("does not answer", "ended: ", "is gone", "slow_ranks"):
        assert message in PAGE and message in source
    assert {128 + int(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)} == {143, 138, 130}


SUBSTITUTES = {
    "srun": 'echo $$ > "$TEST/step"; exec "$@"',
    "scancel": 'kill "${1/--signal=/-}" "$(cat "$TEST/step")"',
    "scontrol": 'if [ "$1" = requeue ]; then touch "$TEST/requeued"; else echo localhost; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
TINY = (
    "net.hidden_size=32 net.depth=1 net.num_heads=2 train.total_images=3000 train.batch_size=4 "
    "train.snapshot_every=1500 train.checkpoint_every=400 train.log_every=400 train.num_threads=1"
)


@pytest.mark.slow
def test_script_saves_requeues_and_resumes(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, body in SUBSTITUTES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    small = SCRIPT.replace("--nproc-per-node=8", "--nproc-per-node=2").replace(
        "edm2-img512-s data.source=caches/imagenet-512-edm2", f"digits {TINY}"
    )
    (tmp_path / "job.sh").write_text(small)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "TEST": str(tmp_path),
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "1",
    }
    run = tmp_path / "runs" / "s"
    with subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as first:
        started = time.monotonic()
        while not (run / "state").is_dir() and time.monotonic() - started < 120:
            time.sleep(0.1)
        first.send_signal(signal.SIGUSR1)
        output = first.stderr.read().decode()
    assert (tmp_path / "requeued").exists() and "SIGTERM at image" in output, output
    stopped = int(checkpoint.list_checkpoints(run / "state")[-1].name.removeprefix("nimg"))
    assert 0 < stopped < 3000
    second = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=environment | {"SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True
    )
    assert second.returncode == 0 and f"resumed at image {stopped:,}" in second.stdout, second.stdout + second.stderr
