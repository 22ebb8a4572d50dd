"""From a folder to a cache to a run, by the command line: pixels, latents with tokens, buckets, object storage."""

import shutil

import fsspec
import pytest
import torch
from helpers.cli import run_cli
from helpers.encoders import write_clip
from helpers.images import sample_sizes
from helpers.run_factory import image_run
from rich.console import Console

from gesso import config, sample_files, snapshot
from gesso.config import addresses
from gesso.data.batching import Batcher
from gesso.data.cache.read import CachedDataset
from gesso.data.samplers import BucketSampler, ShardWindowShuffle
from gesso.errors import UsageError
from gesso.evaluation import runner
from gesso.sample_files import SampleArgs
from gesso.training.run_folder import open_dataset_for_run, start_training

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def trained(source, out, **settings) -> config.RunConfig:
    start_training(image_run(source, **settings), out, False, QUIET, lambda text: None)
    return config.load_config(out / "run.yaml")


def captioned(photos, folder):
    folder.mkdir()
    for i, file in enumerate(sorted(photos.glob("*/*.*"))):
        shutil.copy(file, folder / f"{i:02d}{file.suffix}")
        (folder / f"{i:02d}.txt").write_text(["a cat", "a red cat", "", "two dogs run"][i % 4])
    return folder


def test_two_commands_from_a_folder_to_a_run(photos, tmp_path):
    output = run_cli(
        "cache", photos, tmp_path / "c", "--resolution", 16, "--views", 2, "--crop-scale", ".5,1", "--flip"
    )
    assert f"gesso train RECIPE data.source={tmp_path / 'c'}" in output
    run = trained(tmp_path / "c", tmp_path / "run", **{"data.resolution": 32, "control.variables": "flip,crop,size"})
    assert run.data.resolution == 16 and run.data.flip and run.data.crop_scale == (0.5, 1.0)  # as the cache holds
    assert run.data.num_images == 16 and run.data.class_names == ("tall", "wide") and len(run.data.mean) == 3
    sample_files.sample_to_folder(tmp_path / "run", run, SampleArgs(seeds="0-1", label="wide"), tmp_path / "made")
    assert sample_sizes(tmp_path / "made") == [(16, 16)] * 2
    runner.evaluate_run(tmp_path / "run", run, lambda done, total: None)
    assert run_cli("cache", "--check", tmp_path / "c")


def test_settings_that_contradict_the_cache_are_reported(photos, tmp_path):
    run_cli("cache", photos, tmp_path / "c", "--resolution", 16)
    console = Console(record=True, width=400)
    open_dataset_for_run(image_run(tmp_path / "c", **{"data.resolution": 32, "data.flip": "true"}), console)
    output = console.export_text()
    assert f"data.resolution=16 (not 32), as in {tmp_path / 'c'}" in output and "data.flip=False (not True)" in output


def test_latents_and_tokens_need_neither_vae_nor_encoder_in_training(photos, vae, tmp_path):
    clip = write_clip(tmp_path / "clip")
    run_cli(
        "cache", captioned(photos, tmp_path / "s"), tmp_path / "c", "--resolution", 32, "--vae", vae, "--convention",
        "edm2",
        "--text", clip, "--max-tokens", 8,
    )  # fmt: skip
    text = {"semantic.kind": "text", "semantic.encoder": clip, "semantic.max_tokens": 8, "semantic.padding": "noisy"}
    run, actual = open_dataset_for_run(image_run(tmp_path / "c", **text), QUIET)
    with_encoder, other = open_dataset_for_run(image_run(tmp_path / "c", **text), QUIET)
    other.text_config = None
    counter = torch.arange(12)
    x0, cond = Batcher(actual, run, 0.5, CPU)(counter)
    y0, same = Batcher(other, with_encoder, 0.5, CPU)(counter)
    assert x0.equal(y0) and x0.shape == (12, 4, 4, 4)
    torch.testing.assert_close(cond.text, same.text, atol=2e-3, rtol=1e-3)  # stored in 16 bits
    shutil.move(clip, tmp_path / "away")
    shutil.move(vae, tmp_path / "vae away")
    try:
        done = trained(tmp_path / "c", tmp_path / "run", **text)
        assert (
            done.semantic.embed_dim == cond.text.shape[2]
            and done.latent.convention == "edm2"
            and done.data.mean[0] == 5.81
        )
        with pytest.raises(UsageError, match=r"the VAE .*: there is no such folder"):
            sample_files.sample_to_folder(tmp_path / "run", done, SampleArgs(seeds="0"), None)
    finally:
        shutil.move(tmp_path / "vae away", vae)
    shutil.move(tmp_path / "away", clip)
    sample_files.sample_to_folder(
        tmp_path / "run", done, SampleArgs(seeds="0", prompts=["a red cat"]), tmp_path / "made"
    )
    assert sample_sizes(tmp_path / "made") == [(32, 32)]


def test_tokens_of_another_encoder_are_left_aside_with_a_note(photos, tmp_path):
    run_cli(
        "cache",
        captioned(photos, tmp_path / "s"),
        tmp_path / "c",
        "--resolution",
        16,
        "--text",
        "words",
        "--max-tokens",
        4,
    )
    console = Console(record=True, width=400)
    run, actual = open_dataset_for_run(
        image_run(tmp_path / "c", **{"semantic.kind": "text", "semantic.max_tokens": 6}), console
    )
    assert actual.text_config is None and "set semantic.encoder=words semantic.max_tokens=4" in console.export_text()
    _, cond = Batcher(actual, run, 0.5, CPU)(torch.arange(4))
    assert cond.text.shape[1] == 6


def test_buckets_train_and_sample(photos, tmp_path):
    run_cli("cache", photos, tmp_path / "c", "--resolution", 16, "--buckets", 3, "bucket_multiple=4")
    settings = {
        "train.batch_size": 4,
        "control.variables": "size,aspect",
        "net.patch_size": 2,
        "train.micro_batch_size": 3,
    }
    run = trained(tmp_path / "c", tmp_path / "run", **settings)
    assert run.data.buckets and len(run.data.buckets) == 3
    actual = CachedDataset(tmp_path / "c")
    batches = Batcher(actual, run, 0.5, CPU)
    assert isinstance(batches.sample_order, BucketSampler)
    shapes = {tuple(batches(torch.arange(k, k + 4))[0].shape[2:]) for k in range(0, 40, 4)}
    assert len(shapes) > 1 and shapes <= set(run.data.buckets)
    wide, _ = config.resolve(config.to_dict(run), ["sample.aspect=2:1"])
    height, width = wide.sample_size
    assert width > height and wide.sample_size in run.data.buckets
    sample_files.sample_to_folder(tmp_path / "run", wide, SampleArgs(seeds="0-1"), tmp_path / "made")
    assert sample_sizes(tmp_path / "made") == [(width, height)] * 2
    runner.evaluate_run(tmp_path / "run", wide, lambda done, total: None)
    with pytest.raises(UsageError, match="no bucket fills a batch"):
        start_training(
            image_run(tmp_path / "c", **settings | {"train.batch_size": 100}), tmp_path / "other", False, QUIET, print
        )


def test_an_address_gives_the_same_batches_and_keeps_two_windows(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(addresses, "ADDRESS_SCHEMES", ("memory",))
    run_cli("cache", photos, tmp_path / "c", "--resolution", 16, "--images-per-shard", 2)
    storage = fsspec.filesystem("memory")
    storage.put(str(tmp_path / "c"), "/far", recursive=True)
    settings = {"data.shuffle_window_shards": 2, "control.variables": "size"}
    run, near = open_dataset_for_run(image_run(tmp_path / "c", **settings), QUIET)
    away, far = open_dataset_for_run(image_run("memory://far", **settings), QUIET)
    assert away.data.fingerprint == run.data.fingerprint and away.data.mean == run.data.mean
    here, there = Batcher(near, run, 0.5, CPU), Batcher(far, away, 0.5, CPU)
    assert isinstance(there.sample_order, ShardWindowShuffle)
    copies = []
    for k in range(0, 48, 4):  # three epochs
        counter = torch.arange(k, k + 4)
        (x0, cond), (y0, other) = here(counter), there(counter)
        assert x0.equal(y0) and cond.label.equal(other.label) and cond.control_low.equal(other.control_low)
        copies.append(len(list((tmp_path / "home").glob("gesso/shards/*/shard-*.safetensors"))))
    assert max(copies) <= 4 < len(near.manifest.files)
    done = trained("memory://far", tmp_path / "run", **settings)
    assert snapshot.list_snapshots(tmp_path / "run") and done.data.source == "memory://far"


def test_drawings_in_a_cache_are_read_back(tmp_path):
    run_cli("cache", "shapes:60", tmp_path / "c", "--resolution", 32)
    settings = {"semantic.kind": "text", "eval.toy_metrics": "shapes", "net.patch_size": 4, "data.resolution": 32}
    run = trained(tmp_path / "c", tmp_path / "run", **settings)
    output = runner.evaluate_run(tmp_path / "run", run, lambda done, total: None)
    assert any("training images" in line and "100.0%" in line for line in output)
    with pytest.raises(UsageError, match="is a cache already: train on it"):
        run_cli("cache", tmp_path / "c", tmp_path / "d", "--resolution", 32)


def test_captions_that_are_no_shapes_are_refused_before_any_picture(photos, tmp_path):
    folder = captioned(photos, tmp_path / "s")
    run = trained(folder, tmp_path / "run", **{"semantic.kind": "text", "eval.toy_metrics": "shapes"})
    with pytest.raises(UsageError, match="caption 'a cat': not one or two shapes"):
        runner.evaluate_run(tmp_path / "run", run, lambda done, total: pytest.fail("a picture was made"))
