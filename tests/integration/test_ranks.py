"""One network on several ranks: gloo processes that torchrun starts."""

import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.distributed import (
    BATCH_SIZE,
    FLOAT64_TRAINING,
    MMDIT_SETTINGS,
    NUM_STEPS,
    free_port,
    launch,
    launch_torchrun,
    load_last_checkpoint,
    logged_losses,
    max_weight_difference,
    snapshot_weights,
)
from helpers.run_factory import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gesso import atomic_io
from gesso.errors import UsageError
from gesso.training import checkpoint, ranks
from gesso.training.logging import HARDWARE_KEYS, read_log
from gesso.training.ranks import Ranks

# A network of each kind: joint attention and control; the sphere and learned uncertainty; a masked second pass; dropout
# of nothing but conditions everywhere, so that ranks share no draw that depends on their number.
NETS = {
    "mmdit++": MMDIT_SETTINGS,
    "edm2": {
        "net.name": "edm2", "net.channels": 16, "net.channel_mult": "[1,2]", "net.num_blocks": 1,
        "net.attention_levels": "[1]",
        "net.channels_per_head": 16, "loss.weighting": "uncertainty",
    },
    "mdt": {"net.name": "mdt", "net.hidden_size": 32, "net.num_heads": 2, "net.depth": 3, "net.decoder_layers": 1,
    "net.patch_size": 2},
    "unet": {
        "net.name": "unet", "net.num_heads": "null", "net.channels": 16, "net.channel_mult": "[1,2]",
        "net.transformer_depth": "[0,1]", "net.num_blocks": 1,
        "net.channels_per_head": 16, "net.norm_num_groups": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def single_rank_runs(tmp_path_factory) -> Path:
    """Every network trained by one rank."""
    root = tmp_path_factory.mktemp("alone")
    launch(1, [{"out": str(root / name), "settings": FLOAT64_TRAINING | net} for name, net in NETS.items()])
    return root


@pytest.mark.parametrize(
    "world, names",
    [
        (2, ["edm2", "mdt"]),
        pytest.param(2, NETS, marks=pytest.mark.slow),
        pytest.param(3, NETS, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_shards_and_passes_do_not_matter(single_rank_runs, tmp_path, world, names):
    """float64 weights to 1e-10 after 50 steps: replicated and sharded, in one pass and in passes of 1 and 2 samples."""
    jobs = []
    for name, net in ((name, NETS[name]) for name in names):
        for sharding, micro in (("ddp", 1), ("fsdp", 2)) if world == 2 else (("fsdp", None), ("ddp", 2)):
            options = {"train.sharding": sharding} | ({"train.micro_batch_size": micro} if micro else {})
            jobs.append({"out": str(tmp_path / f"{name}-{sharding}"), "settings": FLOAT64_TRAINING | net | options})
    launch(world, jobs)
    for job in jobs:
        name = Path(job["out"]).name.rsplit("-", 1)[0]
        assert max_weight_difference(single_rank_runs / name, job["out"]) < 1e-10, job
        assert logged_losses(job["out"]) == pytest.approx(logged_losses(single_rank_runs / name), rel=1e-10)
        assert len(logged_losses(job["out"])) == NUM_STEPS


def test_passes_of_one_rank_and_recomputing(single_rank_runs, tmp_path):
    variants = [
        {"train.micro_batch_size": 3},
        {"train.activation_checkpointing": "true"},
        {"train.micro_batch_size": 2, "train.activation_checkpointing": "true"},
    ]
    jobs = [
        {"out": str(tmp_path / f"{i}"), "settings": FLOAT64_TRAINING | NETS["mmdit++"] | settings_}
        for i, settings_ in enumerate(variants)
    ]
    jobs.append({"out": str(tmp_path / "edm2"), "settings": FLOAT64_TRAINING | NETS["edm2"] | variants[1]})
    launch(1, jobs)
    for job in jobs[:3]:
        assert max_weight_difference(single_rank_runs / "mmdit++", job["out"]) < 1e-10
    assert max_weight_difference(single_rank_runs / "edm2", tmp_path / "edm2") < 1e-10


KEY_BIAS = r"blocks\.\d+\.branches\.qkv\.linear\.bias"
"""Without qk-norm it adds the same to all scores of a query: its gradient is zero, up to rounding, which Adam scales up
like any gradient."""


def test_in_single_precision(tmp_path):
    """Losses to 1e-6, weights to 1e-5, but for the bias of DiT's keys, whose exact gradient is zero."""
    width = 32
    dit = {"net.name": "dit", "net.hidden_size": width, "net.num_heads": 2, "net.depth": 2, "net.patch_size": 2}
    variants = {
        "1": {}, "1, 4 passes": {"train.micro_batch_size": 2}, "2": {"train.micro_batch_size": 1},
        "2, fsdp": {"train.sharding": "fsdp"}, "3": {"train.micro_batch_size": 2},
    }  # fmt: skip
    for world in (1, 2, 3):
        selected = {name: options for name, options in variants.items() if name.startswith(str(world))}
        single = FLOAT64_TRAINING | dit | {"train.dtype": "float32"}
        launch(
            world, [{"out": str(tmp_path / name), "settings": single | options} for name, options in selected.items()]
        )
    one = snapshot_weights(tmp_path / "1")
    for name in list(variants)[1:]:
        assert logged_losses(tmp_path / name) == pytest.approx(logged_losses(tmp_path / "1"), rel=0, abs=1e-6)
        drifted = 0
        for key, weights in snapshot_weights(tmp_path / name).items():
            difference = (one[key] - weights).abs()
            if re.fullmatch(KEY_BIAS, key.split(":")[1]):
                drifted = max(drifted, float(difference[width : 2 * width].max()))
                difference[width : 2 * width] = 0
            assert difference.max() < 1e-5, (name, key)
        assert drifted > 1e-5  # or it would not have to be named


def test_resumed_on_other_numbers_of_ranks_and_shards(single_rank_runs, tmp_path):
    """3 ranks, sharded; then 1; then 2, replicated; stopped in the middle of an epoch and between states."""
    out, net = str(tmp_path / "run"), NETS["edm2"]
    interrupted = {
        "out": out,
        "settings": FLOAT64_TRAINING | net | {"train.sharding": "fsdp"},
        "stop_at": 15 * BATCH_SIZE,
    }
    launch(3, [interrupted])
    assert checkpoint.list_checkpoints(tmp_path / "run" / "state")[-1].name == f"nimg{10 * BATCH_SIZE:012d}"
    launch(1, [{"out": out, "settings": FLOAT64_TRAINING | net, "resume": True, "stop_at": 33 * BATCH_SIZE}])
    result = launch(2, [{"out": out, "settings": FLOAT64_TRAINING | net, "resume": True}])
    assert "ranks 3 -> 2: the result will agree closely" in result.output
    assert max_weight_difference(single_rank_runs / "edm2", out) < 1e-10
    assert (
        logged_losses(out) == pytest.approx(logged_losses(single_rank_runs / "edm2"), rel=1e-10)
        and len(logged_losses(out)) == NUM_STEPS
    )


def test_a_state_of_two_ranks_is_bit_equal_on_two_ranks(tmp_path):
    job = {"out": str(tmp_path / "whole"), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS | {"train.sharding": "fsdp"}}
    parts = job | {"out": str(tmp_path / "parts")}
    launch(2, [job, parts | {"stop_at": 25 * BATCH_SIZE}, parts | {"resume": True}])
    assert max_weight_difference(tmp_path / "whole", tmp_path / "parts") == 0
    a, b = (load_last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert len({name.split(":")[0] for name in a}) == 2  # each rank wrote its share


def test_a_rank_that_dies_takes_the_others_along_by_name(single_rank_runs, tmp_path):
    out = tmp_path / "run"
    start = time.monotonic()
    process = launch_torchrun(
        2, [{"out": str(out), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS, "kill": [34 * BATCH_SIZE, 1]}]
    )
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert re.search(r"rank +: 1 ", process.stderr) and "SIGKILL" in process.stderr  # torchrun names it
    assert re.search(r"gesso: rank 1 of 2 \(\S+, process \d+\) is gone", process.stderr)  # and so does the other
    # The state of step 30 may still have been on its way; that of step 20 was waited for.
    assert checkpoint.list_checkpoints(out / "state")[-1].name in (
        f"nimg{20 * BATCH_SIZE:012d}",
        f"nimg{30 * BATCH_SIZE:012d}",
    )
    launch(2, [{"out": str(out), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS, "resume": True}])
    assert max_weight_difference(single_rank_runs / "mmdit++", out) < 1e-10
    assert not list(out.rglob("*.tmp"))


def test_a_signal_to_one_rank_stops_all_with_the_state_saved(single_rank_runs, tmp_path):
    out = tmp_path / "run"
    result = launch(
        2,
        [{"out": str(out), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS, "signal": [14 * BATCH_SIZE, 1]}],
        check=False,
    )
    assert result.codes == [143, 143] and "SIGTERM at image" in result.output
    stopped = int(checkpoint.list_checkpoints(out / "state")[-1].name.removeprefix("nimg"))
    assert 14 * BATCH_SIZE < stopped <= 16 * BATCH_SIZE
    launch(1, [{"out": str(out), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS, "resume": True}])
    assert max_weight_difference(single_rank_runs / "mmdit++", out) < 1e-10


@settings(max_examples=200, deadline=None)
@given(first=st.integers(0, 10**12), size=st.integers(1, 300), world=st.integers(1, 40))
def test_shares_are_the_batch(first, size, world):
    shares = [Ranks(rank, world).shard_batch(first, size) for rank in range(world)]
    assert len({len(counter) for counter, _ in shares}) == 1  # all keep step
    combined = torch.cat([counter[counts] for counter, counts in shares])
    assert combined.equal(torch.arange(first, first + size))
    assert all(first <= int(k) < first + size for counter, _ in shares for k in counter)
    assert len(shares[0][0]) == math.ceil(size / world)


def test_more_ranks_than_samples(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UsageError, match=r"8 ranks, but train.batch_size=4"),
        ranks.init_distributed(tiny_run(**{"train.batch_size": 4})),
    ):
        pass


PRINT_MESH = """
from gesso.training.ranks import Ranks
build_mesh = Ranks.build_mesh
def build_and_print(*args):
    result = build_mesh(*args)
    print("mesh", tuple(result.shape), flush=True)
    return result
Ranks.build_mesh = build_and_print
"""


@pytest.mark.parametrize(
    "world, per_node, names",
    [
        (4, 2, ["mmdit++"]),
        pytest.param(4, 2, ["edm2", "mdt", "unet"], marks=pytest.mark.slow),
        pytest.param(2, 1, ["edm2"], marks=pytest.mark.slow),  # whole weights on every rank
        pytest.param(2, 2, ["edm2"], marks=pytest.mark.slow),  # one node
    ],
)
def test_shared_within_a_node_and_replicated_over_nodes(single_rank_runs, tmp_path, world, per_node, names):
    """train.sharding=hsdp; batches of 7 are uneven on 4 ranks."""
    jobs = []
    for name in names:
        for micro in (1, 4):
            options = {"train.sharding": "hsdp", "train.micro_batch_size": micro}
            job = {"out": str(tmp_path / f"{name}-{micro}"), "settings": FLOAT64_TRAINING | NETS[name] | options}
            jobs.append(job | {"prelude": PRINT_MESH if not jobs else ""})
    assert f"mesh ({world // per_node}, {per_node})" in launch(world, jobs, per_node=per_node).output
    for job in jobs:
        name = Path(job["out"]).name.rsplit("-", 1)[0]
        assert max_weight_difference(single_rank_runs / name, job["out"]) < 1e-10, job
        assert logged_losses(job["out"]) == pytest.approx(logged_losses(single_rank_runs / name), rel=1e-10)


@pytest.mark.slow
def test_two_nodes_by_torchrun(single_rank_runs, tmp_path):
    """Two agents on one machine, with what docs/cluster.md types."""
    job = {"out": str(tmp_path / "run"), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS | {"train.sharding": "hsdp"}}
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=1", f"--rdzv-endpoint=localhost:{free_port()}"]
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(launch_torchrun, 1, [job], *meeting) for _ in range(2)]
    assert [node.result().returncode for node in nodes] == [0, 0], nodes[0].result().stderr[-3000:]
    assert max_weight_difference(single_rank_runs / "mmdit++", tmp_path / "run") < 1e-10


SLEEPS = """
import os, time
from gesso.{module} import {owner}
method = {owner}.{name}
def sleeping(self, *a):
    time.sleep(0.1 if os.environ["RANK"] == "1" else 0)
    return method(self, *a)
{owner}.{name} = sleeping
"""


@pytest.mark.parametrize(
    "phase, sharding",
    [(("models.mmdit", "JointTransformer", "forward"), "ddp"), (("data.batching", "Batcher", "to_device"), "fsdp"),
     pytest.param(("models.mmdit", "JointBlock", "forward"), "fsdp", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_slow_rank_is_named(tmp_path, phase, sharding):
    """Held up by its data, or by its own computing."""
    few = {"train.total_images": 10 * BATCH_SIZE, "train.log_every": 5 * BATCH_SIZE, "train.sharding": sharding}
    prelude = SLEEPS.format(module=phase[0], owner=phase[1], name=phase[2])
    launch(2, [{"out": str(tmp_path / "run"), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS | few, "prelude": prelude}])
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    for line in lines:
        ((name, times),) = line["slow_ranks"].items()
        assert re.fullmatch(r"rank 1 of 2 \(\S+, process \d+\)", name) and times > 1.5


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_schedulers_signals_reach_all_ranks(tmp_path, number):
    """As Slurm sends them, to every process at once."""
    out = tmp_path / "run"
    job = {
        "out": str(out),
        "settings": FLOAT64_TRAINING | MMDIT_SETTINGS,
        "signal": [10 * BATCH_SIZE, None],
        "number": int(number),
    }
    result = launch(2, [job], check=False)
    assert result.codes == [128 + number] * 2 and f"{signal.Signals(number).name} at image 77" in result.output
    assert checkpoint.list_checkpoints(out / "state")[-1].name == f"nimg{77:012d}"


def test_two_runs_in_one_folder(tmp_path):
    with atomic_io.lock_dir(tmp_path / "run"):
        result = launch(2, [{"out": str(tmp_path / "run"), "settings": FLOAT64_TRAINING | MMDIT_SETTINGS}], check=False)
    assert sorted(result.codes) == [1, 2] and "another process is training in" in result.output


def test_clocks_that_jump(single_rank_runs, tmp_path):
    """Back by a year, at each look, on one rank."""
    jumping = "import time, itertools\ntimes = itertools.count(2e9, -3e7)\ntime.time = lambda: next(times)"
    out = tmp_path / "run"
    settings = FLOAT64_TRAINING | NETS["mmdit++"] | {"train.checkpoint_every": 5 * BATCH_SIZE}
    launch(1, [{"out": str(out), "settings": settings, "prelude": jumping, "stop_at": 22 * BATCH_SIZE}])
    for file in out.rglob("*"):
        os.utime(file, (4e9, 4e9))
    launch(1, [{"out": str(out), "settings": settings, "prelude": jumping, "resume": True}])
    assert max_weight_difference(single_rank_runs / "mmdit++", out) == 0 and logged_losses(out) == logged_losses(
        single_rank_runs / "mmdit++"
    )


def test_what_is_seen_does_not_depend_on_the_ranks(tmp_path):
    """Bins, validation, magnitudes and metrics agree to 1e-5 (of six digits), images up to rounding of the last bit."""
    watched = {
        "train.total_images": 8 * BATCH_SIZE, "data.num_validation": 20, "monitor.validate_every": 2 * BATCH_SIZE,
        "monitor.validation_pairs": 70,
        "monitor.magnitude_every": 4 * BATCH_SIZE, "monitor.magnitude_samples": 20,
        "monitor.sample_every": 4 * BATCH_SIZE, "monitor.num_samples": 5,
        "monitor.evaluate_every": 8 * BATCH_SIZE, "sample.steps": 2,
    }  # fmt: skip
    settings = FLOAT64_TRAINING | NETS["edm2"] | watched
    launch(1, [{"out": str(tmp_path / "one"), "settings": settings}])
    launch(
        2,
        [
            {"out": str(tmp_path / sharding), "settings": settings | {"train.sharding": sharding}}
            for sharding in ("ddp", "fsdp")
        ],
    )
    due = flat(tmp_path / "one")
    assert {"validation", "magnitudes", "metrics", "loss_by_noise"} <= {key[1] for key in due}
    for sharding in ("ddp", "fsdp"):
        actual = flat(tmp_path / sharding)
        assert actual.keys() == due.keys()
        for key, value in due.items():
            assert actual[key] == pytest.approx(value, rel=2e-5, abs=1e-9), key
        pictures = sorted((tmp_path / sharding / "sheets").iterdir())
        assert len(pictures) == 2
        for picture in pictures:
            a, b = (np.asarray(Image.open(f), dtype=int) for f in (picture, tmp_path / "one" / "sheets" / picture.name))
            assert np.abs(a - b).max() <= 1


def flat(out) -> dict[tuple, float]:
    """Numbers of a log by time and path, without what the machine decides."""

    def walk(value, path):
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(inner, (*path, key))
        elif value is not None:
            yield path, value

    lines = [{k: v for k, v in line.items() if k not in HARDWARE_KEYS} for line in read_log(Path(out) / "log.jsonl")]
    return {path: value for line in lines for path, value in walk(line, (line["nimg"],))}
