"""Monitoring of a run: noise levels, validation, magnitudes, speed and trackers, none of which changes training."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.images import copy_with_truncated, open_on_the_fly
from helpers.network_cases import (
    INPUT_SPECS,
    NETWORKS,
    NetworkCase,
    example_batch,
    initialized_net,
    randomize_constants_,
)
from helpers.run_factory import image_run, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gesso import config, ema, models, recipes, snapshot
from gesso import rng as keyed
from gesso.config import InputSpec, MDTConfig
from gesso.data.cache.read import CachedDataset
from gesso.data.samplers import BucketSampler, EpochShuffle, ExcludeIndices, ShardWindowShuffle, select_validation
from gesso.diffusion import loss_bins
from gesso.diffusion import process as processes
from gesso.errors import UsageError
from gesso.evaluation import protocols, results, runner, validation
from gesso.evaluation.metrics.validation_loss import mean_losses
from gesso.evaluation.tasks import EvalContext
from gesso.models import flops as count
from gesso.models import mp
from gesso.training import checkpoint, loop, throughput, trackers
from gesso.training import monitor as watching
from gesso.training.logging import HARDWARE_KEYS, read_log
from gesso.training.magnitudes import Magnitudes
from gesso.training.ranks import Ranks
from gesso.training.run_folder import open_dataset_for_run, start_training

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


# Loss by noise level.


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60))
def test_bins_against_brute_force(seed, n):
    rng = np.random.default_rng(seed)
    losses, u, counts = rng.normal(size=n), rng.uniform(size=n), rng.uniform(size=n) < 0.8
    u[0] = (1 - 2.0**-33) if seed % 2 else 2.0**-33  # the ends of what is drawn
    total, number = [0.0] * loss_bins.NUM_BINS, [0] * loss_bins.NUM_BINS
    for loss, place, counted in zip(losses, u, counts, strict=True):
        if counted:
            total[int(place * loss_bins.NUM_BINS)] += loss
            number[int(place * loss_bins.NUM_BINS)] += 1
    actual = loss_bins.bin_sums(torch.tensor(losses), torch.tensor(u), torch.tensor(counts))
    torch.testing.assert_close(actual, torch.tensor([*total, *number], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    for mean, t, k in zip(loss_bins.bin_means(actual), total, number, strict=True):
        assert mean is None if k == 0 else mean == pytest.approx(t / k, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", ["edm", "vp", "rf"])
def test_places_in_the_draw_are_progress(name):
    """Bins of the uniform number that a level is drawn from are bins of the level's progress."""
    run = recipes.resolve("digits", [f"process.name={name}"])[0]
    process = processes.build_process(run.process)
    u = keyed.uniform(0, torch.arange(4000), "noise level")[:, 0]
    progress = process.progress(process.icdf(u))
    bins, actual = (u * 10).long(), (progress * 10 + 1e-6).long()
    assert (bins == actual).float().mean() > 0.999 and (progress - u).abs().max() < 2e-3


def test_the_log_has_the_losses_of_the_steps(tmp_path):
    """Bins times their counts is the loss of the line; a bin is the mean over the samples that fell in it."""
    run, dataset = open_dataset_for_run(tiny_run(**{"train.log_every": 64}), QUIET)
    trainer = loop.Trainer(run, dataset)
    seen = []
    passes = trainer.forward_backward

    def record_note(*arguments):
        actual = passes(*arguments)
        seen.append(actual)
        return actual

    trainer.forward_backward = record_note
    trainer.step()
    trainer.step()
    line = trainer.pop_log_line()
    losses, u = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert line["loss"] == pytest.approx(float(losses.mean()), rel=1e-6) and len(losses) == 64
    for b, mean in enumerate(line["loss_by_noise"]):
        inside = losses[(u * 10).long() == b]
        assert mean is None if not len(inside) else mean == pytest.approx(float(inside.mean()), rel=1e-5)
    assert trainer.pop_log_line()["loss_by_noise"] == [None] * 10


# Held-out images.


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), data=st.data(), seed=st.integers(0, 5))
def test_orders_never_come_to_held_out_images(n, data, seed):
    held = select_validation(n, data.draw(st.integers(1, n - 1)))
    stored = sorted(set(range(n)) - set(held.tolist()))
    order = ExcludeIndices(EpochShuffle(len(stored), seed), held)
    epoch = order(torch.arange(len(stored)))
    assert sorted(epoch.tolist()) == stored
    # Without gaps, in the same order, as if there were no others.
    assert epoch.equal(torch.tensor(stored)[EpochShuffle(len(stored), seed)(torch.arange(len(stored)))])


def test_which_are_held_out_does_not_depend_on_the_seed():
    assert (
        select_validation(1000, 100).equal(select_validation(1000, 100))
        and select_validation(1000, 100).unique().numel() == 100
    )
    assert set(select_validation(1000, 10).tolist()) < set(select_validation(1000, 100).tolist())
    runs = [
        open_dataset_for_run(
            tiny_run(**{"data.num_validation": 50, "train.seed": seed, "monitor.validate_every": 64}), QUIET
        )[1]
        for seed in (0, 1)
    ]
    assert runs[0].validation_indices.equal(runs[1].validation_indices) and len(runs[0].validation_indices) == 50


@pytest.mark.parametrize("how", [{"window": 2}, {"buckets": 3}, {}])
def test_held_out_of_a_cache(photos, tmp_path, how):
    more = ["--buckets", 3, "bucket_multiple=4"] if "buckets" in how else []
    run_cli("cache", photos, tmp_path / "c", "--resolution", 16, "--images-per-shard", 2, "--views", 2, "--flip", *more)
    cache = CachedDataset(tmp_path / "c", 0, how.get("window"))
    cache.hold_out_validation(4)
    order = cache.sample_order(3, 2)
    inner = {"window": ShardWindowShuffle, "buckets": BucketSampler}.get(next(iter(how), ""), EpochShuffle)
    assert isinstance(order, ExcludeIndices) and isinstance(order.base, inner)
    n = order.base.n
    seen = [set(order(torch.arange(n * e, n * (e + 1))).tolist()) for e in range(6)]
    stored = set(range(len(cache))) - set(cache.validation_indices.tolist())
    assert len(stored) == len(cache) - 4 and set.union(*seen) == stored
    if "buckets" in how:
        for k in range(0, 2 * n, 2):  # of one size, which `take` asserts
            cache.get(order(torch.arange(k, k + 2)), torch.arange(k, k + 2))
    else:
        assert all(epoch == stored for epoch in seen)
    for i in cache.validation_indices.tolist():
        samples = cache.get_unaugmented(torch.tensor([i]))
        assert samples.x.equal(cache.reference_images(torch.tensor([i]))) and not samples.flips.any()


def test_an_unreadable_image_gives_way_to_one_of_its_side(photos, tmp_path):
    files = sorted(path.name for path in photos.glob("*/*.png"))
    folder = copy_with_truncated(photos, tmp_path / "s", set(files[:1]))
    data = open_on_the_fly(folder, max_unreadable=1.0)
    data.hold_out_validation(len(data) // 2)
    held = set(data.validation_indices.tolist())
    for i in range(len(data)):
        actual = data.get(torch.tensor([i]), torch.tensor([i])).indices.item()
        assert (actual in held) == (i in held)
    assert {
        k: data.get_unaugmented(data.validation_indices).indices.tolist()[j] in held
        for j, k in enumerate(data.validation_indices.tolist())
    }.values()


def test_nothing_left_to_train_on():
    with pytest.raises(UsageError, match=r"data.num_validation=1797 leaves no training images, as digits has 1797"):
        open_dataset_for_run(tiny_run(**{"data.num_validation": 1797, "monitor.validate_every": 64}), QUIET)


# Validation.


class Known(torch.nn.Module):
    """Denoiser whose estimate of every image is half of its input."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, s, cond, keep=None):
        assert cond.label is None or bool(cond.has_semantic.all())  # nothing is withheld
        return x / 2


def of_held(run, dataset) -> validation.ValidationLoss:
    return validation.ValidationLoss(
        run, *validation.open_validation_set(run, dataset), CPU, run.monitor.validation_pairs
    )


def losses(validation_data: validation.ValidationLoss, denoiser, rank: int = 0, world: int = 1) -> torch.Tensor:
    passes = validation_data.split(torch.arange(len(validation_data.positions)))[rank::world]
    return validation_data.losses(denoiser, map(validation_data.load_batch, passes))


def validated(**settings) -> validation.ValidationLoss:
    output = {
        "data.num_validation": 70,
        "monitor.validate_every": 160,
        "monitor.validation_pairs": 150,
        "dropout.both": 0.5,
    }
    run, dataset = open_dataset_for_run(tiny_run(**output | settings), QUIET)
    return of_held(run, dataset)


def test_validation_of_a_known_network_against_a_slow_loop():
    actual = validated()
    run, dataset = actual.run, actual.batcher.dataset
    process = processes.build_process(run.process)
    mean, by_level = mean_losses(losses(actual, Known(process)), actual.positions)
    assert sorted((actual.positions * 150).long().tolist()) == list(range(150))  # one pair in each stratum
    expected, places = [], []
    for j in range(150):
        i = int(dataset.validation_indices[j % 70])
        x0 = (dataset.pixels[i].double() / 127.5 - 1 - run.data.mean[0]) * 0.5 / run.data.std[0]
        s = float(process.icdf(actual.positions[j]))
        eps = keyed.normal(0, torch.tensor([j]), "validation noise", (1, 8, 8))[0].double()
        error = float(((x0 + s * eps) / 2 - x0).square().mean())
        expected.append(error * (s**2 + 0.25) / (0.5 * s) ** 2)
        places.append(int(float(actual.positions[j]) * 10))
    assert mean == pytest.approx(np.mean(expected), rel=1e-5)
    for b in range(10):
        assert by_level[b] == pytest.approx(
            np.mean([x for x, p in zip(expected, places, strict=True) if p == b]), rel=1e-5
        )


def test_validation_is_the_same_over_seeds_batches_and_ranks():
    run = validated().run
    net = randomize_constants_(initialized_net(NetworkCase(NETWORKS["mmdit++"][0], InputSpec(1, 8, 10), False)))
    from gesso.diffusion.denoiser import Denoiser

    denoiser = Denoiser(net.eval(), processes.build_process(run.process), run.net.noise_embedding)
    expected = losses(validated(), denoiser)
    for settings_ in ({"train.seed": 7}, {"train.batch_size": 9}, {"train.micro_batch_size": 5, "dropout.both": 0.1}):
        assert losses(validated(**settings_), denoiser).equal(expected)
    actual = validated()
    parts = [losses(actual, denoiser, rank, 3) for rank in range(3)]
    assert all((part == 0).any() for part in parts) and (expected > 0).all()
    assert sum(parts).equal(expected)  # to the last bit: passes are of the same pairs


def test_another_source_to_validate_on(photos, tmp_path):
    run, dataset = open_dataset_for_run(
        image_run(photos, **{"monitor.validation_source": photos, "monitor.validate_every": 32}), QUIET
    )
    other, index = validation.open_validation_set(run, dataset)
    assert len(index) == len(other) == len(dataset) and not len(dataset.validation_indices)
    (tmp_path / "one" / "cats").mkdir(parents=True)
    (tmp_path / "one" / "cats" / "a.png").write_bytes(next(photos.glob("*/*.png")).read_bytes())
    run = config.resolve(config.to_dict(run), [f"monitor.validation_source={tmp_path / 'one'}"])[0]
    with pytest.raises(UsageError, match=r"has the classes cats, \.\.\., not those of"):
        validation.open_validation_set(run, dataset)


def test_missing_source_is_reported_before_the_run_folder_exists(tmp_path):
    run = tiny_run(**{"monitor.validation_source": tmp_path / "none", "monitor.validate_every": 64})
    with pytest.raises(UsageError, match=r"^monitor.validation_source=.*/none: there is no such folder"):
        start_training(run, tmp_path / "run", False, QUIET, print)
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_validation_over_buckets_takes_pictures_of_one_size_together(photos, tmp_path):
    run_cli("cache", photos, tmp_path / "c", "--resolution", 16, "--buckets", 3, "bucket_multiple=4")
    settings_ = {
        "train.batch_size": 2,
        "net.patch_size": 2,
        "data.num_validation": 6,
        "monitor.validate_every": 32,
        "monitor.validation_pairs": 30,
    }
    run, dataset = open_dataset_for_run(image_run(tmp_path / "c", **settings_), QUIET)
    actual = of_held(run, dataset)
    assert sorted(j for part in actual.split(torch.arange(30)) for j in part.tolist()) == list(range(30))
    assert losses(actual, Known(processes.build_process(run.process))).isfinite().all()


def test_validation_that_would_never_be(tmp_path):
    with pytest.raises(UsageError, match=r"monitor.validate_every=250000 is above train.total_images=640"):
        tiny_run(**{"data.num_validation": 5})
    with pytest.raises(UsageError, match=r"exclude each other"):
        tiny_run(**{"data.num_validation": 5, "monitor.validate_every": 64, "monitor.validation_source": "digits"})
    with pytest.raises(
        UsageError, match=r"monitor.evaluate_every=64 measures what eval.toy_metrics says, which is none"
    ):
        tiny_run(**{"monitor.evaluate_every": 64, "eval.toy_metrics": "none"})


# Magnitudes.

ALL = {name: NetworkCase(cfg, INPUT_SPECS[kinds[-1]], False) for name, (cfg, kinds) in NETWORKS.items()}


def run_once(row: NetworkCase, net: torch.nn.Module, counts=None, rows=slice(None)):
    x, c_noise, progress, cond = example_batch(row, dtype=torch.float32)
    with Magnitudes(net, 8) as actual, torch.no_grad():
        actual.valid = counts
        net(x[rows], c_noise[rows], progress[rows], cond[rows])
    return actual


def small(row: NetworkCase) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize_constants_(models.build_network(row.cfg, row.inputs)).eval()


UNUSED = (".table", "mask_token", "semantic_qkv", "text_qkv")


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_of_the_blocks_is_measured(name):
    """Constant weights have constant magnitudes; only tables and parameters without rows or use are left out."""
    row = ALL[name]
    net = small(row)
    actual = run_once(row, net)
    measured = {f"{layer}.weight" for layer in actual._layer_sums}
    prefixes = tuple(f"{block}." for block in actual.blocks)
    rows = {n for n, p in net.named_parameters() if p.ndim > 1 and n.startswith(prefixes)}
    left_out = {n for n in rows - measured if not n.startswith("side.")}
    assert all(n.endswith(".table") or "_qkv" in n for n in left_out), left_out
    assert measured <= rows and len(measured) > 5
    tensors = {n: torch.full_like(p, -3.0) for n, p in net.state_dict().items()}
    assert all(pair == [3.0, 3.0] for pair in actual.weights(tensors).values())
    expected = {"enc 8x8", "enc 4x4", "dec 8x8", "dec 4x4"} if name.startswith(("edm2", "ladder", "unet")) else None
    buckets = set(actual.weights(tensors))
    if expected:
        assert buckets == expected | ({"mid 4x4"} if name == "unet" else set())
    else:
        assert all(b.startswith("block") for b in buckets) and 2 <= len(buckets) <= 3
    assert actual.activations().keys() == buckets


@pytest.mark.parametrize("name", ["dit", "mmdit all", "unet", "edm2", "ladder B"])
def test_activations_against_brute_force(name):
    """Record every product within the blocks where torch computes it; compare the rms by feature and sample."""
    row = ALL[name]
    net = small(row)
    actual = run_once(row, net)
    place = actual._bucket_names()
    outs: dict[str, list[float]] = {}
    handles = []
    for block, bucket in place.items():
        for _, layer in net.get_submodule(block).named_modules():
            weight = layer._parameters.get("weight")
            if weight is None or weight.ndim < 2:
                continue

            def note(module, inputs, out, bucket=bucket):
                by_feature = out.double().movedim(1 if module.weight.ndim == 4 else -1, 0)  # N B ...
                for feature in by_feature:
                    share = getattr(module, "branch_weight", 1)  # the coefficient of an MP-sum is no part of an output
                    magnitudes = [float(sample.square().mean() ** 0.5) / share for sample in feature]
                    outs.setdefault(bucket, []).append(sum(magnitudes) / len(magnitudes))

            handles.append(layer.register_forward_hook(note))
    x, c_noise, progress, cond = example_batch(row, dtype=torch.float32)
    with torch.no_grad():
        net(x, c_noise, progress, cond)
    expected = {bucket: [max(values), sum(values) / len(values)] for bucket, values in outs.items()}
    measured = actual.activations()
    twice = {n for n, s in actual._layer_sums.items() if s[-1] > 3}  # layers that text and image share run twice
    assert measured.keys() == expected.keys()
    for bucket, (largest, mean) in expected.items():
        if not twice:
            assert measured[bucket] == pytest.approx([largest, mean], rel=1e-4)
        else:
            assert measured[bucket][0] <= largest * 1.0001


def test_normal_activations_have_magnitude_one():
    """Eq. 3 is scaled so that unit-normal activations and weights have an expected magnitude of 1."""
    layer = mp.MPLinear(64, 128)
    weights = torch.randn(128, 64)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Module()])
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    net = Net()
    with Magnitudes(net, 8) as actual:
        actual.blocks, actual.layers = {"layer": layer}, {"layer": layer}
        hook = layer.register_forward_hook(actual._layer_hook("layer"))
        net(torch.randn(50, 200, 64))
        hook.remove()
    actual._block_buckets = {"layer": None}
    (largest, mean), (_, row_mean) = (
        actual.activations()["block 1"],
        actual.weights({"layer.weight": weights})["block 1"],
    )
    assert abs(mean - 1) < 0.02 and 1 <= largest < 1.1 and abs(row_mean - 1) < 0.02


@pytest.mark.parametrize("name", ["dit", "mmdit++", "unet"])
def test_the_main_path_is_what_blocks_put_out(name):
    row = ALL[name]
    net = small(row)
    actual, outs = run_once(row, net), {}
    for block, bucket in actual._bucket_names().items():
        net.get_submodule(block).register_forward_hook(
            lambda m, i, out, bucket=bucket: outs.setdefault(bucket, []).append(
                out[0] if isinstance(out, tuple) else out
            )
        )
    x, c_noise, progress, cond = example_batch(row, dtype=torch.float32)
    with torch.no_grad():
        net(x, c_noise, progress, cond)
    for bucket, parts in outs.items():
        magnitudes = [
            p.double().movedim(1 if p.ndim == 4 else -1, 0).flatten(2).square().mean(2).sqrt().mean(1) for p in parts
        ]
        expected = torch.cat(magnitudes)
        assert actual.main_path()[bucket] == pytest.approx([float(expected.max()), float(expected.mean())], rel=1e-4)


def test_samples_that_do_not_count_and_ranks_in_parts():
    row = ALL["dit"]
    net = small(row)
    part = run_once(row, net, torch.tensor([True, False, True]))
    alone = run_once(row, net, None, torch.tensor([0, 2]))
    for bucket, pair in part.activations().items():
        assert pair == pytest.approx(alone.activations()[bucket], rel=1e-4)
    first, second = run_once(row, net, None, slice(0, 1)), run_once(row, net, None, slice(1, 3))

    class Two(Ranks):
        def all_reduce(self, values):
            return values + torch.cat([second._layer_sums[n] for n in first._layer_sums])

    for bucket, pair in run_once(row, net).activations().items():
        assert pair == pytest.approx(first.activations(Two())[bucket], rel=1e-4)


# A run with everything on.

ALL_ON = {
    "monitor.validate_every": 96, "monitor.validation_pairs": 30, "monitor.magnitude_every": 128,
    "monitor.magnitude_samples": 50,
    "monitor.sample_every": 160, "monitor.num_samples": 4, "monitor.evaluate_every": 320, "sample.steps": 2,
    "data.num_validation": 40,
}  # fmt: skip
OFF = {
    "data.num_validation": 40,
    "sample.steps": 2,
    "monitor.validate_every": "null",
    "monitor.magnitude_every": "null",
}
DROPOUT = {
    "net.name": "edm2", "net.channels": 16, "net.channel_mult": "[1,2]", "net.num_blocks": 1,
    "net.attention_levels": "[1]",
    "net.channels_per_head": 16, "net.dropout": 0.3, "loss.weighting": "uncertainty",
}  # fmt: skip


def edm2_run(**update) -> config.RunConfig:
    output = {k: v for k, v in update.items()} | DROPOUT
    base = ["train.total_images=640", "train.batch_size=32", "train.snapshot_every=160", "train.checkpoint_every=96",
            "train.log_every=128", "train.num_threads=1", "optim.warmup_images=64"]  # fmt: skip
    return recipes.resolve("digits", base + [f"{k}={v}" for k, v in output.items()])[0]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("seen") / "run"
    start_training(edm2_run(**ALL_ON), out, False, QUIET, lambda text: None)
    return out


def last_state(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        k: v
        for f in sorted(checkpoint.list_checkpoints(out / "state")[-1].glob("*.safetensors"))
        for k, v in load_file(f).items()
    }


def without_speed(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in HARDWARE_KEYS} for line in read_log(out / "log.jsonl")]


def test_a_watched_run_ends_with_the_same_bits(seen, tmp_path):
    start_training(edm2_run(**OFF), tmp_path / "run", False, QUIET, lambda text: None)
    one, other = last_state(seen), last_state(tmp_path / "run")
    assert one.keys() == other.keys() and len(one) > 50
    assert [k for k in one if not one[k].equal(other[k])] == []
    lines = [[line for line in without_speed(out) if "loss" in line] for out in (seen, tmp_path / "run")]
    assert lines[0] == lines[1] and len(lines[0]) == 5


def test_what_a_watched_run_leaves(seen):
    lines = read_log(seen / "log.jsonl")
    at = lambda key: [line["nimg"] for line in lines if key in line]  # noqa: E731
    assert at("validation") == [96, 192, 288, 384, 480, 576] and at("magnitudes") == [128, 256, 384, 512, 640]
    assert at("metrics") == [320, 640] and at("loss") == [128, 256, 384, 512, 640]
    assert sorted(p.name for p in (seen / "sheets").glob("nimg*")) == [
        f"nimg{n:012d}.png" for n in (160, 320, 480, 640)
    ]
    validated_ = next(line for line in lines if "validation" in line)
    assert set(validated_["validation"]) == {"weights", "ema0.05", "ema0.1"}
    measured = next(line for line in lines if "magnitudes" in line)["magnitudes"]
    assert set(measured) == {"activations", "main_path", "weights"} and set(measured["weights"]) == {
        "enc 8x8",
        "enc 4x4",
        "dec 4x4",
        "dec 8x8",
    }
    # An average of weights on the sphere lies inside it.
    assert all(0.5 < mean <= largest < 1 + 1e-6 for largest, mean in measured["weights"].values())
    speed = next(line for line in lines if "loss" in line)
    assert 0 <= speed["data_wait_fraction"] < 1 and 0 < speed["mfu"] < 1.5 and speed["matmul_tflops"] > 0
    assert not (seen / "metrics.json").exists()
    assert max(len(text) for text in (seen / "log.jsonl").read_text().splitlines()) < 800


def test_validation_in_the_log_is_that_of_the_stored_average(seen):
    """Compare the line of the last common time with the snapshot and a network built for sampling."""
    run = config.load_config(seen / "run.yaml")
    line = next(line for line in read_log(seen / "log.jsonl") if line["nimg"] == 480 and "validation" in line)
    run, dataset = open_dataset_for_run(run, QUIET)
    actual = of_held(run, dataset)
    for sigma_rel in (0.05, 0.1):
        weights, _, _, _ = snapshot.reconstruct_from_run(seen, [ema.PowerProfile(sigma_rel)], 480)
        mean, by_level = mean_losses(losses(actual, snapshot.denoiser_from_weights(weights[0], run)), actual.positions)
        assert line["validation"][f"ema{sigma_rel}"] == pytest.approx(mean, rel=1e-4)
        assert line["validation_by_noise"][f"ema{sigma_rel}"] == pytest.approx(by_level, rel=1e-3)


def test_loss_in_the_log_is_that_of_evaluate(seen):
    """Compare at the tracked EMA length and the time of the line, with as many pairs, also by tenths."""
    line = next(line for line in read_log(seen / "log.jsonl") if line["nimg"] == 480 and "validation" in line)
    n = config.load_config(seen / "run.yaml").monitor.validation_pairs
    run = protocols.apply_protocol(
        seen, None, ["eval.metrics=loss", f"eval.validation_pairs={n}", "eval.nimg=480", "sample.sigma_rel=.1"]
    )
    result = runner.evaluate_metrics(EvalContext(seen, run, CPU), lambda done, total: None)
    lines = results.format_evaluation(result)
    actual = {name: each["mean"] for name, each in result.metrics.items()}
    assert actual.pop("loss") == pytest.approx(line["validation"]["ema0.1"], rel=1e-4)
    by_noise = line["validation_by_noise"]["ema0.1"]
    assert list(actual) == [f"loss_{10 * i}_{10 * (i + 1)}" for i in range(10)]
    assert list(actual.values()) == pytest.approx(by_noise, rel=1e-3) and min(by_noise) < 0.9 * max(by_noise)
    assert result.protocol["validation"] == "digits, held out" and result.protocol["reference"] is None
    assert (
        len(lines) == 3 and lines[0].startswith("loss") and f"{n:,} pairs of an image of digits, held out" in lines[2]
    )


def test_scores_in_the_log_are_those_of_evaluate(seen, tmp_path):
    near = watching.nearest_tracked_profile(config.load_config(seen / "run.yaml"))  # .075 is asked for
    assert near == ema.PowerProfile(0.1)
    run = config.load_with_overrides(seen, ["sample.sigma_rel=0.1"], ("sample.", "eval."))
    run = run.model_copy(update={"eval": run.eval.model_copy(update={"sweep_sigma_rels": ()})})
    runner.evaluate_run(seen, run, lambda done, total: None)
    expected = next(e.best() for e in results.read_evaluations(seen).values() if "series" in e.protocol)
    (seen / "metrics.json").unlink()
    line = [line for line in read_log(seen / "log.jsonl") if "metrics" in line][-1]
    assert line["metrics"]["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=2e-3)
    assert abs(line["metrics"]["class_accuracy"] - expected["class_accuracy"]) < 0.01


@pytest.mark.parametrize("stop", [320, 416])
def test_a_resumed_run_has_the_same_log_and_pictures(seen, tmp_path, monkeypatch, stop):
    step, out = loop.Trainer.step, tmp_path / "run"

    def stopping(self):
        if self.nimg == stop:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        start_training(edm2_run(**ALL_ON), out, False, QUIET, lambda text: None)
    monkeypatch.setattr(loop.Trainer, "step", step)
    start_training(edm2_run(**ALL_ON), out, True, QUIET, lambda text: None)
    assert without_speed(out) == without_speed(seen)
    for picture in (seen / "sheets").glob("nimg*.png"):
        assert (out / "sheets" / picture.name).read_bytes() == picture.read_bytes()
    one, other = last_state(seen), last_state(out)
    assert [k for k in one if not one[k].equal(other[k])] == []


def test_watching_may_change_on_resume_and_holding_out_may_not(seen, tmp_path, monkeypatch):
    import shutil

    out = Path(shutil.copytree(seen, tmp_path / "run"))
    with pytest.raises(UsageError, match=r"data.num_validation: recorded 40, now 30"):
        start_training(edm2_run(**ALL_ON | {"data.num_validation": 30}), out, True, QUIET, lambda text: None)
    start_training(edm2_run(**OFF), out, True, QUIET, lambda text: None)  # nothing left to do
    assert without_speed(out) == without_speed(seen)


def test_the_average_next_to_that_of_samples():
    def of(**output):
        return watching.nearest_tracked_profile(tiny_run(**{f"{k.replace('__', '.')}": v for k, v in output.items()}))

    assert of(sample__sigma_rel=0.07) == ema.PowerProfile(0.05) and of(sample__sigma_rel=0.08) == ema.PowerProfile(0.1)
    assert of(ema__halflives="[100,5000]", sample__halflife=900) == ema.TraditionalProfile(5000)
    assert of(sample__halflife=900) == ema.PowerProfile(0.05)


# Pace.


def test_training_takes_the_forward_passes_of_its_loss():
    row = ALL["dit"]
    assert count.training_macs(row.cfg, row.inputs) == count.count_flops(row.cfg, row.inputs).macs
    mdt = MDTConfig(hidden_size=32, depth=3, num_heads=2, decoder_layers=1)
    twice = count.training_macs(mdt, INPUT_SPECS["class"]) / count.count_flops(mdt, INPUT_SPECS["class"]).macs
    assert 1.6 < twice < 2.2  # fewer tokens, and one block more


def test_mfu(monkeypatch):
    run, _ = open_dataset_for_run(tiny_run(), QUIET)
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "measure_matmul_flops", lambda run, device: 1e9)
    speed = throughput.ThroughputMeter(run, Ranks(0, 2), CPU, 1000)
    now[0] = 104.0
    line = speed(3000, 1.0)
    flops = 500 * 6 * count.count_flops(run.net, run.input_spec).macs
    assert line["images_per_second"] == 500 and line["data_wait_fraction"] == 0.25 and line["matmul_tflops"] == 0.001
    assert line["mfu"] == pytest.approx(flops / 2e9, abs=1e-4)
    now[0] = 105.0
    assert speed(3100, 1.5) | {"mfu": 0} == {
        "images_per_second": 100.0,
        "data_wait_fraction": 0.5,
        "mfu": 0,
        "matmul_tflops": 0.001,
    }
    monkeypatch.undo()
    assert throughput.measure_matmul_flops(run, CPU) > 1e8


# TensorBoard, Weights & Biases.


def test_numbers_of_a_line():
    line = {"loss": 1, "by": [2.0, None], "deep": {"a": {"b": [3]}}, "word": "x", "names": [["a", "b"]]}
    assert dict(trackers.flatten_numbers(line)) == {"loss": 1.0, "by/0": 2.0, "deep/a/b/0": 3.0}


@pytest.mark.parametrize(
    "name, setting", [("tensorboard", "monitor.tensorboard=true"), ("wandb", "monitor.wandb=offline")]
)
def test_missing_library_is_reported_before_any_work(tmp_path, monkeypatch, name, setting):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda wanted: None)
    key, _, value = setting.partition("=")
    with pytest.raises(UsageError, match=rf"monitor.{name} needs {name}: pip install 'gesso-diffusion\[log\]'"):
        start_training(tiny_run(**{key: value}), tmp_path / "run", False, QUIET, print)
    assert not (tmp_path / "run" / "run.yaml").exists()


SHORT = {
    "train.total_images": 320,
    "train.log_every": 32,
    "monitor.sample_every": 160,
    "monitor.num_samples": 4,
    "sample.steps": 2,
}


def stopped_and_resumed(out: Path, monkeypatch, **settings_) -> list[dict]:
    step = loop.Trainer.step

    def stopping(self):
        if self.nimg == 256:  # past the state at 192
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        start_training(tiny_run(**SHORT | settings_), out, False, QUIET, lambda text: None)
    monkeypatch.setattr(loop.Trainer, "step", step)
    start_training(tiny_run(**SHORT | settings_), out, True, QUIET, lambda text: None)
    return [line for line in read_log(out / "log.jsonl") if "loss" in line]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_each_value_once(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = stopped_and_resumed(tmp_path / "run", monkeypatch, **{"monitor.tensorboard": "true"})
    actual = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    actual.Reload()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2  # two processes
    assert [(e.step, e.value) for e in actual.Scalars("loss")] == [
        (line["nimg"], pytest.approx(line["loss"], rel=1e-6)) for line in lines
    ]
    assert [e.step for e in actual.Scalars("loss_by_noise/9")] == [line["nimg"] for line in lines]
    assert [e.step for e in actual.Images("samples")] == [160, 320]


def records(file: bytes):
    """Yield the records of a .wandb file.

    It has seven bytes, then LevelDB's log format: blocks of 32 KiB, records as checksum, length, kind, data.
    """
    at, part = 7, b""
    while at + 7 <= len(file):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        part = (part if kind in (3, 4) else b"") + file[at + 7 : at + 7 + length]
        if kind in (1, 4):
            yield part
        at += 7 + length


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_has_each_value_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    lines = stopped_and_resumed(tmp_path / "run", monkeypatch, **{"monitor.wandb": "offline"})
    deadline = time.monotonic() + 60
    while True:  # a process of its own writes the files, which may end after the run
        actual = []
        for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
            for data in records(path.read_bytes()):
                actual.append(wandb_internal_pb2.Record())
                actual[-1].ParseFromString(data)
        if sum(record.HasField("exit") for record in actual) == 2 or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    histories = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item} for r in actual]
    values = [(items["_step"], items["loss"]) for items in histories if "loss" in items]
    assert values == [(line["nimg"], line["loss"]) for line in lines]
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert {record.run.run_id for record in actual} - {""} == {known["id"]} and known["nimg"] == 320


def test_config_g_reports_the_same_as_edm2_and_as_ladder():
    """Compare at equal seeds, fresh and after steps, up to coefficients of MP-sums that one folds into weights."""
    actual = []
    for name in (["net.name=edm2"], ["net.name=edm2-ladder", "net.config=G"]):
        settings = [
            "net.channels=16",
            "net.channels_per_head=16",
            "dropout.both=0",
            "dropout.control=0",
            "sample.guidance=1",
        ]
        run = recipes.resolve("digits-edm2", [*name, *settings, "train.batch_size=16", "optim.warmup_images=0"])[0]
        trainer = loop.Trainer(*open_dataset_for_run(run, QUIET))
        for steps in (0, 4):
            [trainer.step() for _ in range(steps)]
            x0, cond = trainer.batcher(torch.arange(16))
            s = torch.linspace(0.1, 3, 16)
            net = trainer.denoiser.net.eval()
            with Magnitudes(net, 8) as magnitudes, torch.no_grad():
                trainer.denoiser(x0 + s[:, None, None, None], s, cond)
            weights = magnitudes.weights(dict(net.state_dict()))
            actual.append((magnitudes.activations(), magnitudes.main_path(), weights, set(magnitudes._layer_sums)))
            net.train()
    for measured, reference in zip(actual[:2], actual[2:], strict=True):
        assert measured[3] == reference[3] and any(name.endswith("attention.proj") for name in measured[3])
        for a, b in zip(measured[:3], reference[:3], strict=True):
            assert a.keys() == b.keys()
            for bucket in a:
                assert a[bucket] == pytest.approx(b[bucket], rel=1e-4)
