"""Averages of any trainer: kept by PostHocEMA, as a traditional EMA, or raw; made into others through files."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reference_ema import interval_weights
from helpers.run_factory import small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from gesso import ema, snapshot
from gesso.ema import PerTensorProfile, PowerProfile, RawProfile, TraditionalProfile
from gesso.errors import RunError, UsageError
from gesso.evaluation import ema_export
from gesso.safetensors_io import read_metadata, read_tensors, stream_writer, write_tensors
from gesso.snapshot import PostHocEMA


def make_module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def train_random_walk(net: nn.Module, folder: Path, ends: list[int], save_every: int, seed: int = 0, **options):
    """Move the weights at random at each of `ends`, average them and save at times; return all weights."""
    g = torch.Generator().manual_seed(seed)
    stored = PostHocEMA(net, **options)
    history = [{k: v.clone() for k, v in net.state_dict().items()}]
    for i, end in enumerate(ends, 1):
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64)
            net[1].num_batches_tracked += 1
        stored.update(end)
        history.append({k: v.clone() for k, v in net.state_dict().items()})
        if i % save_every == 0:
            stored.save(folder)
    return stored, history


@settings(max_examples=8, deadline=None)
@given(steps=st.lists(st.integers(1, 400), min_size=8, max_size=60), sigma_rel=st.sampled_from([0.05, 0.1, 0.2]))
def test_matches_the_continuous_profile_at_any_update_interval(tmp_path_factory, steps, sigma_rel):
    """Kept in three lines, through files: int p(tau) theta(tau) dtau with theta constant between updates."""
    folder = tmp_path_factory.mktemp("any")
    ends = np.cumsum(steps).tolist()
    _, history = train_random_walk(make_module(), folder, ends, len(ends), sigma_rels=(sigma_rel,), halflives=(300,))
    exact = {PowerProfile(sigma_rel): PostHocEMA.reconstruct(folder, sigma_rel)}
    exact[TraditionalProfile(300)] = snapshot.reconstruct(
        snapshot.plan_reconstruction(snapshot.list_snapshots(folder), [TraditionalProfile(300)])
    )[0]
    for profile, weights in exact.items():
        part = torch.from_numpy(interval_weights(profile, np.r_[0.0, ends]))
        for name, value in weights.items():
            if value.is_floating_point():
                expected = torch.einsum("t,t...->...", part, torch.stack([state[name] for state in history]))
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert exact[TraditionalProfile(300)]["1.num_batches_tracked"] == len(ends)


def test_other_lengths_and_earlier_times(tmp_path):
    net = make_module()
    ends = list(range(10, 6401, 10))
    _, history = train_random_walk(net, tmp_path, ends, 20)
    for sigma_rel, until in ((0.03, 6400), (0.075, 6400), (0.2, 6400), (0.15, 3200)):
        actual = PostHocEMA.reconstruct(tmp_path, sigma_rel, until)
        edges = np.r_[0.0, [end for end in ends if end <= until]]
        part = torch.from_numpy(interval_weights(PowerProfile(sigma_rel), edges))
        for name in ("0.weight", "2.bias"):
            expected = torch.einsum("t,t...->...", part, torch.stack([state[name] for state in history[: len(edges)]]))
            assert float((actual[name] - expected).norm() / expected.norm()) < 1e-2, (sigma_rel, name)
    net.load_state_dict(actual)


def test_resume_from_state_dict(tmp_path):
    ends = [10, 30, 60, 100]
    full, _ = train_random_walk(make_module(), tmp_path / "a", ends, 4)
    net = make_module()
    half, _ = train_random_walk(net, tmp_path / "b", ends[:2], 4)
    state = {"net": net.state_dict(), "ema": half.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = PostHocEMA(net)
    again.load_state_dict(state["ema"])
    assert again.nimg == 30 and again.run_id == half.run_id
    for profile, average in again.tracker.averages.items():
        assert all(value.equal(half.tracker.averages[profile][name]) for name, value in average.items())
    with pytest.raises(UsageError, match="of other tensors or lengths"):
        PostHocEMA(net, sigma_rels=(0.2,)).load_state_dict(state["ema"])
    assert full.nimg == 100


def test_tracks_reassigned_parameters():
    net = make_module()
    stored = PostHocEMA(net, sigma_rels=(0.1,))
    net.load_state_dict({k: v.clone() + 1 for k, v in net.state_dict().items()}, assign=True)
    stored.update(10)
    assert stored.tracker.averages[PowerProfile(0.1)]["0.weight"].equal(net[0].weight.detach())


def test_time_must_increase(tmp_path):
    stored = PostHocEMA(make_module())
    with pytest.raises(UsageError, match="no update yet"):
        stored.save(tmp_path)
    stored.update(10)
    with pytest.raises(UsageError, match="no EMA to track"):
        PostHocEMA(make_module(), sigma_rels=())
    for nimg in (10, 5):
        with pytest.raises(UsageError, match="the last update was at image 10"):
            stored.update(nimg)


SHARDED_SCRIPT = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
from gesso.snapshot import PostHocEMA
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3), nn.Linear(3, 1)).double()
plain, net = build(), build()
for part in net: fully_shard(part)
fully_shard(net)
one, parts = PostHocEMA(plain, halflives=(50,)), PostHocEMA(net, halflives=(50,))
held = [a.to_local().numel() for a in parts.tracker.averages[list(parts.tracker.averages)[0]].values()]
# Uneven: 7 rows are 4 and 3, and the one row of the last layer lies on the first rank.
assert held == ([16, 4, 14, 2, 3, 1] if rank == 0 else [12, 3, 7, 1, 0, 0]), held
optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, net)]
g, nimg = torch.Generator().manual_seed(1), 0
for step in (3, 40, 1, 500, 7):
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    for m, o in zip((plain, net), optimizers):
        o.zero_grad(); m(x).square().mean().backward(); o.step()
    nimg += step
    one.update(nimg); parts.update(nimg)
for profile, average in one.tracker.averages.items():
    for name, value in average.items():
        got = parts.tracker.averages[profile][name].full_tensor()
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
parts.save(folder / "parts")
if rank == 0:
    one.save(folder / "one")
dist.barrier(); dist.destroy_process_group()
"""


def test_sharded_averages_equal_unsharded_ones(tmp_path):
    """Two gloo ranks under FSDP2: every rank moves its own part on; what is saved is whole."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED_SCRIPT, str(r), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    output = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], output
    for path in sorted((tmp_path / "one" / "snapshots").iterdir()):
        actual, expected = load_file(tmp_path / "parts" / "snapshots" / path.name), load_file(path)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)


# Files.

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_files_match_safetensors(tmp_path_factory, shapes, seed):
    g, folder = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("files")
    tensors = {
        f"t{i}": (3 * torch.randn(shape, generator=g)).to(DTYPES[(i + seed) % len(DTYPES)])
        for i, shape in enumerate(shapes)
    }
    save_file(tensors, folder / "theirs", {"k": "v"})
    with stream_writer(folder / "ours", tensors, lambda checksums: {"k": "v"}) as put:
        for name in reversed(tensors):
            put(name, tensors[name])
    again = load_file(folder / "ours")
    for path in ("theirs", "ours"):
        stored = read_tensors(folder / path)
        assert stored.keys() == tensors.keys() and read_metadata(folder / path) == {"k": "v"}
        for name, value in tensors.items():
            assert stored[name].equal(value) and again[name].equal(value)


def test_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    full = path.read_bytes()
    for content in (
        b"",
        b"ab",
        full[:20],
        full[:-4],
        full + b"1234",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match="damaged"):
            read_tensors(path)
        with pytest.raises(RunError, match="damaged"):
            read_metadata(path)
    with pytest.raises(RunError, match="damaged or not a safetensors"):
        read_tensors(tmp_path / "none")


def write_snapshots(folder: Path, seed: int = 0, **options) -> Path:
    train_random_walk(make_module(seed), folder, list(range(10, 801, 10)), 10, seed, **options)
    return folder


class CountingTensors(dict):
    """Tensors of a file that count how often each is accessed."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.counts = Counter()

    def __getitem__(self, name):
        self.counts[name] += 1
        return super().__getitem__(name)


def test_every_tensor_is_read_once_for_all_targets(tmp_path, monkeypatch):
    files = []
    monkeypatch.setattr(
        snapshot, "read_tensors", lambda path: files.append(CountingTensors(read_tensors(path))) or files[-1]
    )
    available = snapshot.list_snapshots(write_snapshots(tmp_path))
    targets = [PowerProfile(s) for s in np.geomspace(0.03, 0.2, 8)]
    snapshot.reconstruct(snapshot.plan_reconstruction(available, targets))
    assert len(files) == len(available)
    assert all(set(file.counts.values()) == {1} and file.counts.keys() == file.keys() for file in files)


def test_a_stored_ema_is_read_from_its_file_alone(tmp_path):
    available = snapshot.list_snapshots(write_snapshots(tmp_path))
    expected = read_tensors(available[-1].path)
    for s in available[:-1]:
        write_tensors(s.path, {k: v * float("nan") for k, v in read_tensors(s.path).items()}, read_metadata(s.path))
    (actual,) = snapshot.reconstruct(snapshot.plan_reconstruction(available, [available[-1].profile]))
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())


MEMORY_SCRIPT = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from gesso import snapshot
from gesso.ema import PowerProfile
torch.set_num_threads(1)
folder = Path(sys.argv[1])
def write(at, n):
    for i in range(12):
        nimg, profile = 100 * (i + 1), PowerProfile(0.1)
        path = snapshot.snapshot_path(at / "snapshots", nimg, profile)
        snapshot.write(path, {f"w{j}": torch.ones(n) for j in range(32)}, nimg, profile, "any")
targets = [PowerProfile(0.05 + 0.01 * i) for i in range(8)]
write(folder / "small", 1000); write(folder / "large", 2**18)
def held():  # in kB, without the pages of files, which the system takes back when it needs them
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
peak = []
def reconstruct(name, out):
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(folder / name), targets)
    return snapshot.reconstruct_to_files(plan, folder / out)
reconstruct("small", "a")
before, sums = held(), snapshot._reconstruct_tensors
def watch(*a):
    for one in sums(*a):
        peak.append(held())
        yield one
snapshot._reconstruct_tensors = watch
paths = reconstruct("large", "b")
assert len(peak) == 32
print(max(peak) - before, sum(p.stat().st_size for p in paths) // 1024)
"""


def test_memory_is_bounded(tmp_path):
    """Eight averages of 32 MB from twelve files of 32 MB: memory for one tensor of 1 MB for each, not 256 MB."""
    created = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, tmp_path], capture_output=True, text=True, timeout=180
    )
    assert created.returncode == 0, created.stderr
    grown, size = map(int, created.stdout.split())
    assert size > 256 * 1024 and grown < 80 * 1024


def test_per_tensor_lengths(tmp_path):
    """The tensors that a glob names are those of the other length; the rest stay."""
    available = snapshot.list_snapshots(write_snapshots(tmp_path))
    target = PerTensorProfile(PowerProfile(0.15), (("0.*", PowerProfile(0.03)), ("*.bias", PowerProfile(0.2))))
    plan = snapshot.plan_reconstruction(available, [target, PowerProfile(0.15), PowerProfile(0.03), PowerProfile(0.2)])
    mixed, others, first, biases = snapshot.reconstruct(plan)
    for name, value in mixed.items():
        expected = first if name.startswith("0.") else biases if name.endswith("bias") else others
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-14)
    assert not mixed["0.weight"].equal(others["0.weight"])
    assert plan.worst_fit(target) == max((plan.fits[p] for p in target.profiles), key=lambda fit: fit.squared_error)
    (path,) = snapshot.reconstruct_to_files(snapshot.plan_reconstruction(available, [target]), tmp_path / "out")
    for name, value in load_file(path).items():
        torch.testing.assert_close(value, mixed[name], rtol=1e-13, atol=1e-14)
    described = json.loads(read_metadata(path)["gesso"])
    assert described["tensors"] == {"0.*": {"sigma_rel": 0.03}, "*.bias": {"sigma_rel": 0.2}}
    assert path != snapshot.snapshot_path(tmp_path / "out", plan.nimg, PowerProfile(0.15))


# Runs of other trainers.


def write_raw_snapshots(folder: Path, every: int = 100) -> list[dict[str, torch.Tensor]]:
    """Raw weights of a smooth path at steps of 8 images, and all of them."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=g, dtype=torch.float64)
    path = [{"w": (a * np.sin(step / 2000) + b * step / 3000)} for step in range(4001)]
    for step in range(every, 4001, every):
        (folder / f"step-{step}").mkdir(parents=True)
        save_file(path[step], folder / f"step-{step}" / "model.safetensors")
    return path


def test_revisiting_raw_checkpoints(gesso_text, tmp_path):
    path = write_raw_snapshots(tmp_path / "theirs")
    files = ["--files", "step-{step}/model.safetensors", "--batch-size", "8"]
    code, output = gesso_text("ema", tmp_path / "theirs", "--sigma-rel", "0.1", "--sigma-rel", "0.2", *files)
    assert code == 0 and "sigma_rel 0.1 at image 32,000" in output and "load_file" in output, output
    for sigma_rel in (0.1, 0.2):
        created = load_file(tmp_path / "theirs" / "ema" / f"nimg000000032000-ema{sigma_rel:.4f}.safetensors")
        part = torch.from_numpy(interval_weights(PowerProfile(sigma_rel), np.arange(4001.0)))
        expected = torch.einsum("t,t...->...", part, torch.stack([state["w"] for state in path]))
        assert float((created["w"] - expected).norm() / expected.norm()) < 1e-3
    # A past time, in images; the same file named by its time.
    code, output = gesso_text("ema", tmp_path / "theirs", "--sigma-rel", "0.1", "--nimg", "16k", *files)
    assert code == 0 and "at image 16,000" in output
    code, output = gesso_text(
        "ema", tmp_path / "theirs", "--sigma-rel", ".1", "--files", "step-100/model.safetensors=5k"
    )
    assert code == 0 and "at image 5,000" in output and "cannot reconstruct" in output
    assert load_file(tmp_path / "theirs" / "ema" / "nimg000000005000-ema0.1000.safetensors")["w"].equal(path[100]["w"])


def test_revisiting_a_traditional_ema(tmp_path):
    """Another trainer's EMA, decay .99 a step of 8 images: any length from its files."""
    path = write_raw_snapshots(tmp_path / "raw")
    average = path[0]["w"].clone()
    for step in range(1, 4001):
        average.lerp_(path[step]["w"], 0.01)
        if step % 50 == 0:
            save_file({"w": average}, tmp_path / f"ema_{8 * step}.safetensors")
    requested = ema_export.EmaArgs((0.1,), files=["ema_{nimg}.safetensors"], batch_size=8, decay=0.99)
    lines = ema_export.export_ema(tmp_path, requested, tmp_path / "out", {})
    created = load_file(tmp_path / "out" / "nimg000000032000-ema0.1000.safetensors")["w"]
    part = torch.from_numpy(interval_weights(PowerProfile(0.1), np.arange(4001.0)))
    expected = torch.einsum("t,t...->...", part, torch.stack([state["w"] for state in path]))
    assert float((created - expected).norm() / expected.norm()) < 1e-3, lines
    (stored,) = {
        s.profile
        for s in ema_export.external_snapshots(tmp_path, ["ema_{nimg}.safetensors"], None, TraditionalProfile(552))
    }
    assert stored == TraditionalProfile(552)  # 8 ln 2 / -ln .99


def test_snapshots_of_any_trainer_on_the_command_line(gesso_text, tmp_path):
    folder = write_snapshots(tmp_path / "mine")
    code, output = gesso_text("ema", folder, "--sigma-rel", "0.07", "--tensors", "0.*=0.15")
    assert code == 0 and "module.load_state_dict(safetensors.torch.load_file(" in output
    code, output = gesso_text("ema", folder / "snapshots", "--sigma-rel", "0.07", "--out", tmp_path / "out")
    created = load_file(tmp_path / "out" / "nimg000000000800-ema0.0700.safetensors")
    expected = PostHocEMA.reconstruct(folder, 0.07)
    assert code == 0 and created.keys() == expected.keys() and all(created[k].equal(expected[k]) for k in created)
    make_module().load_state_dict(created)
    code, output = gesso_text("ema", folder, "--sweep", ".05:.2:3")
    assert code == 2 and "no run.yaml: EMA weights can be written (--sigma-rel), but not evaluated" in output
    with pytest.raises(UsageError, match="written by another trainer"):
        snapshot.reconstruct_from_run(folder, [PowerProfile(0.1)])
    with pytest.raises(UsageError, match="written by another trainer"):
        snapshot.read(next((folder / "snapshots").iterdir()))


# What is refused.


@pytest.mark.parametrize(
    "words, output",
    [
        (["--sigma-rel", "0.1", "--nimg", "801"], "image 801 lies after the last snapshot"),
        (["--sigma-rel", "0.1", "--nimg", "99"], "no snapshot up to image 99; the first is"),
        (["--sigma-rel", "0.1", "--nimg", "soon"], "--nimg soon: write a number of images"),
        (["--sigma-rel", "0.3"], "write a length between 0 and 0.2887"),
        (["--sigma-rel", "0.1", "--tensors", "7.*=0.1"], "no tensor is named 7.*; there are: 0.bias"),
        (["--sigma-rel", "0.1", "--tensors", "0.*"], "write GLOB=LENGTH"),
        (["--sigma-rel", "0.1", "--tensors", "0.*=long"], "write GLOB=LENGTH"),
        (["--sigma-rel", "0.1", "--tensors", "0.*=0.5"], "write a length between 0 and 0.2887"),
        (["--sigma-rel", "0.1", "--metric", "fd"], "--metric has no effect without --sweep"),
        (["--sigma-rel", "0.1", "sample.steps=3"], "a.b=c has no effect without --sweep"),
        (["--sigma-rel", "0.1", "--decay", "0.9"], "name them with --files"),
        (["--sigma-rel", "0.1", "--files", "a.safetensors"], "in place of the time"),
        (["--sigma-rel", "0.1", "--files", "a-{step}.safetensors"], "set --batch-size, the images per step"),
        (["--sigma-rel", "0.1", "--files", "a-{nimg}.safetensors"], "matches no safetensors file in"),
        (["--sigma-rel", "0.1", "--files", "a.safetensors=7"], "write FILE=IMAGES"),
        (
            ["--sigma-rel", "0.1", "--files", "{nimg}", "--decay", "2", "--batch-size", "1"],
            "write a number between 0 and 1",
        ),
    ],
)
def test_invalid_arguments(gesso_text, tmp_path, words, output):
    folder = write_snapshots(tmp_path / "mine")
    code, recorded = gesso_text("ema", folder, *words, "--out", tmp_path / "out")
    assert code == 2 and output in recorded and "Traceback" not in recorded and not (tmp_path / "out").exists()


def test_two_files_of_one_time(tmp_path):
    for name in ("a-1k", "b-1000"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="are both at image 1,000"):
        ema_export.external_snapshots(tmp_path, ["a-{nimg}.safetensors", "b-{nimg}.safetensors"])


def test_inaccurate_lengths_warn(gesso_text, tmp_path):
    code, output = gesso_text("ema", write_snapshots(tmp_path), "--sigma-rel", "0.002")
    assert (
        code == 0 and "warning: the snapshots cannot reconstruct sigma_rel 0.002 accurately: relative error" in output
    )
    assert "accurate are sigma_rel" in output


def corrupt_snapshot(folder: Path, change) -> Path:
    """One of many snapshots, changed."""
    path = snapshot.list_snapshots(write_snapshots(folder))[3].path
    header = json.loads(read_metadata(path)["gesso"]) | {"crc32": {}}
    write_tensors(path, change(read_tensors(path)), {"gesso": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "change, output",
    [
        (lambda t: {k: v for k, v in t.items() if k != "0.bias"}, r"holds other tensors than .*: missing \['0.bias'\]"),
        (lambda t: t | {"more": torch.ones(1)}, r"unknown \['more'\]"),
        (lambda t: t | {"0.bias": torch.ones(6).double()}, r"0.bias has shape \(6,\) in .*, \(5,\) in"),
        (lambda t: t | {"0.bias": torch.full((5,), float("nan")).double()}, "holds NaN or infinity in 0.bias"),
    ],
)
def test_incompatible_snapshot(tmp_path, change, output):
    path = corrupt_snapshot(tmp_path, change)
    for function in (snapshot.reconstruct, lambda plan: snapshot.reconstruct_to_files(plan, tmp_path / "out")):
        with pytest.raises(RunError, match=output) as caught:
            function(snapshot.plan_reconstruction(snapshot.list_snapshots(tmp_path), [PowerProfile(0.07)]))
        assert str(path) in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_snapshots_of_another_run(tmp_path):
    write_snapshots(tmp_path / "a")
    write_snapshots(tmp_path / "b", seed=1)
    strange = tmp_path / "a" / "snapshots" / "strange.safetensors"
    snapshot.list_snapshots(tmp_path / "b")[0].path.rename(strange)
    with pytest.raises(RunError, match="belong to different runs"):
        PostHocEMA.reconstruct(tmp_path / "a", 0.07)
    # Of gesso's own runs the setting is named.
    for i, (name, seed) in enumerate((("a", 0), ("b", 0), ("c", 5))):
        run = small_run(**{"train.seed": seed, "sample.steps": 3 + i})
        snapshot.write(tmp_path / "c" / f"{name}.safetensors", {"w": torch.ones(2)}, 10 + i, PowerProfile(0.1), run)
    available = snapshot.list_snapshots(tmp_path / "c")
    assert (
        snapshot.plan_reconstruction(available, [PowerProfile(0.07)], 11).nimg == 11
    )  # how samples are drawn is no other run
    with pytest.raises(RunError, match=r"a.safetensors belongs to another run than .*: train.seed is 0, not 5"):
        snapshot.plan_reconstruction(available, [PowerProfile(0.07)])


def test_raw_snapshots_of_a_tracker(tmp_path):
    snapshot.write(tmp_path / "x.safetensors", {"w": torch.ones(2)}, 10, RawProfile(), "any")
    assert [s.profile for s in snapshot.list_snapshots(tmp_path)] == [RawProfile()]


def test_the_example_runs(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "any_trainer.py"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, script, tmp_path], env=env, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr
    rows = dict(line.split("%")[0].rsplit(maxsplit=1) for line in process.stdout.splitlines())
    assert float(rows["sigma_rel 0.15"]) < float(rows["last weights"])
    assert ema.PowerProfile(0.15) not in {s.profile for s in snapshot.list_snapshots(tmp_path)}


# What would fail at reconstruction fails before.


class WithBuffer(torch.nn.Linear):
    """A layer with a buffer of any dtype."""

    def __init__(self, dtype: torch.dtype, persistent: bool = True):
        super().__init__(2, 2)
        self.register_buffer("freqs", torch.ones(3, dtype=dtype), persistent=persistent)


def test_complex_buffers_are_refused_at_construction():
    with pytest.raises(UsageError, match=r"freqs is torch.complex64, which snapshots cannot hold: .*persistent=False"):
        PostHocEMA(WithBuffer(torch.complex64))
    with pytest.raises(UsageError, match=r"weight is torch.complex64"):
        PostHocEMA(torch.nn.Linear(2, 2, dtype=torch.complex64))
    PostHocEMA(WithBuffer(torch.complex64, persistent=False))
    PostHocEMA(WithBuffer(torch.int64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_wrapped_modules_are_refused(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"_orig_mod\.0\.weight: the names of a compiled module do not fit"):
        PostHocEMA(torch.compile(module, backend="eager"))
    tracked = PostHocEMA(module)
    module[1] = torch.compile(module[1], backend="eager")
    with pytest.raises(UsageError, match="other tensors than at construction"):
        tracked.update(1)
    with pytest.raises(UsageError, match=r"1\._orig_mod\.bias|1\._orig_mod\.weight"):
        PostHocEMA(module)
    in_place = torch.nn.Linear(2, 2)
    in_place.compile(backend="eager")
    tracked = PostHocEMA(in_place)
    tracked.update(1)
    tracked.save(tmp_path)
    torch.nn.Linear(2, 2).load_state_dict(PostHocEMA.reconstruct(tmp_path, 0.07))


def test_distributed_wrapper_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        with pytest.raises(UsageError, match=r"pass ddp\.module"):
            PostHocEMA(wrapped)
        PostHocEMA(wrapped.module)
    finally:
        torch.distributed.destroy_process_group()


def test_folder_of_another_run_is_refused_at_save(tmp_path):
    first, second = (PostHocEMA(torch.nn.Linear(2, 2)) for _ in range(2))
    for tracked in (first, second):
        tracked.update(10)
    paths = first.save(tmp_path)
    stored = [path.read_bytes() for path in paths]
    with pytest.raises(UsageError, match="holds snapshots of another run, such as nimg") as refused:
        second.save(tmp_path)
    assert "delete" not in str(refused.value) and [path.read_bytes() for path in paths] == stored
    second.load_state_dict(first.state_dict())  # the same run, resumed
    second.update(20)
    second.save(tmp_path)
    assert len(PostHocEMA.reconstruct(tmp_path, 0.07)) == 2


def test_no_message_advises_to_delete_sound_files(tmp_path):
    """A reconstruction that overflows names the tensor, and not a file."""
    tracked = PostHocEMA(torch.nn.Linear(2, 2))
    for nimg in (10, 11):
        tracked.module.weight.data.fill_(1.6e38 * (-1) ** nimg)
        tracked.update(nimg)
        tracked.save(tmp_path)
    with pytest.raises(RunError, match=r"weight at sigma_rel 0\.02 exceeds the range of torch\.float32") as refused:
        PostHocEMA.reconstruct(tmp_path, 0.02)
    assert "delete" not in str(refused.value) and "though no file is at fault" in str(refused.value)
