"""Two and three equal commands at once: all end well, and the work is done once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.run_factory import SHORT_TRAINING, SMALL_TRANSFORMER

from gesso.data.cache.format import verify_cache
from gesso.evaluation.results import read_evaluations
from gesso.training.logging import read_log

DRIVER = """
import importlib, json, os, sys, time
sys.path[:0] = json.loads(sys.argv[4])
import torch
from gesso import cli
from gesso.reproduce import runner
torch.set_num_threads(1)
arguments, count, (place, name) = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(":")
module = importlib.import_module(place)
work = getattr(module, name)

def others_wait():
    texts = [open(f"output{i}").read() if os.path.exists(f"output{i}") else "" for i in range(count)]
    return sum("waiting for another process" in text for text in texts) == count - 1

def counted(*args, **options):
    os.write(calls, b"x")
    while arguments[0] == "evaluate" and not others_wait():
        time.sleep(0.05)
    return work(*args, **options)

setattr(module, name, counted)
runner.POLL_INTERVAL_S = 0.05
if arguments[0] == "reproduce":
    import test_reproduce
    from gesso.papers import TABLES
    TABLES["test/1"] = test_reproduce.fake
    runner.measurements.MEASUREMENT_METHODS["counts"] = lambda job: {"values": {"parameters": 17.0}}
calls = os.open("calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
begin, release = os.pipe()
children = []
for i in range(count):
    child = os.fork()
    if not child:
        os.close(release)
        os.read(begin, 1)  # until all have started
        output = os.open(f"output{i}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["gesso", *arguments]
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    children.append(child)
os.close(release)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


def run_at_once(folder: Path, count: int, work: str, *arguments: object) -> tuple[list[int], list[str], int]:
    """Run a command in several processes at once.

    Args:
        folder: Working folder.
        count: Number of processes.
        work: MODULE:FUNCTION of the work, whose calls are counted. That of an evaluation begins when the other
            processes wait: one that begins later would repeat it.
        arguments: Command line.

    Returns:
        Exit codes, outputs, and the number of calls of all processes together.
    """
    for path in folder.glob("output*"):
        path.unlink()
    (folder / "calls").unlink(missing_ok=True)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", DRIVER, json.dumps([*map(str, arguments)]), str(count), work, json.dumps(paths)]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    outputs = [" ".join((folder / f"output{i}").read_text().split()) for i in range(count)]
    assert not any("Traceback" in output for output in outputs), outputs
    return json.loads(process.stdout), outputs, (folder / "calls").stat().st_size


SETTINGS = [f"{name}={value}" for name, value in (SMALL_TRANSFORMER | SHORT_TRAINING).items()]
VALIDATION = ["data.num_validation=100", "monitor.validate_every=null", "eval.validation_pairs=64"]


def test_trainings_and_evaluations(tmp_path):
    """One process trains, and the others say so. All evaluations have the result of the one that computes."""
    arguments = ("train", "digits", *SETTINGS, "--out", "run")
    codes, outputs, _ = run_at_once(tmp_path, 3, "gesso.training.loop:Trainer", *arguments)
    assert sorted(codes) == [0, 2, 2]
    assert all("another process is training in run" in outputs[i] for i in range(3) if codes[i])
    assert [line["nimg"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [16, 32, 48]
    assert not list((tmp_path / "run").rglob("*.tmp"))

    work = "gesso.evaluation.toy_evaluation:_generate"
    codes, outputs, calls = run_at_once(tmp_path, 3, work, "evaluate", "run", "eval.sweep_sigma_rels=[0.05]")
    assert codes == [0, 0, 0], outputs
    assert calls == len(read_evaluations(tmp_path / "run")) > 1
    tables = [output[output.index("Frechet") : output.index("wrote")] for output in outputs]
    assert len(set(tables)) == 1 and sum("waiting for another process" in output for output in outputs) == 2


@pytest.mark.parametrize("count", [2, 3])
def test_evaluations_of_metrics(tmp_path, count):
    arguments = ("train", "digits", *SETTINGS, *VALIDATION, "--out", "run")
    assert run_at_once(tmp_path, 1, "gesso.training.loop:Trainer", *arguments)[0] == [0]
    work = "gesso.evaluation.runner:_compute_evaluation"
    arguments = ("evaluate", "run", "eval.metrics=loss")
    codes, outputs, calls = run_at_once(tmp_path, count, work, *arguments)
    assert codes == [0] * count, outputs
    assert calls == 1 and len(read_evaluations(tmp_path / "run")) == 1
    assert not list((tmp_path / "run" / "evaluation").glob("[!.]*"))


def test_caches(tmp_path, photos):
    arguments = ("cache", photos, "cache", "--resolution", "16", "--images-per-shard", "4")
    codes, outputs, calls = run_at_once(tmp_path, 3, "gesso.data.cache.write:save_file", *arguments)
    assert 0 in codes and set(codes) <= {0, 2}
    assert all("another process is writing cache" in outputs[i] for i in range(3) if codes[i])
    assert calls == len(list((tmp_path / "cache" / "shards").glob("*.safetensors")))
    assert verify_cache(tmp_path / "cache") == []


def test_sweeps(tmp_path):
    arguments = ("sweep", "digits", *SETTINGS, *VALIDATION, "--over", "optim.lr=1e-3,2e-3", "--out", "sweep")
    codes, _, calls = run_at_once(tmp_path, 3, "gesso.reproduce.runner:start_training", *arguments)
    assert codes == [0, 0, 0] and calls == 2
    assert len(list((tmp_path / "sweep" / "runs").glob("*/run.yaml"))) == 2


def test_reproductions(tmp_path):
    arguments = ("reproduce", "test/1", "--scale", "tiny", "--num-seeds", "1", "--out", "tables")
    codes, outputs, calls = run_at_once(tmp_path, 2, "gesso.reproduce.runner:start_training", *arguments)
    assert codes == [0, 0], outputs
    assert calls == 2 and len(list((tmp_path / "tables" / "runs").glob("*/run.yaml"))) == 2
