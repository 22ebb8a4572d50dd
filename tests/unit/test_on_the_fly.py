"""Data sets that are decoded during training: crops, flips, latents; prefetched batches; sampling through a VAE."""

import threading

import numpy as np
import pytest
import torch
from helpers.encoders import write_vae
from helpers.images import copy_with_truncated, open_on_the_fly, sample_sizes, write_image_folders
from helpers.run_factory import image_run
from PIL import Image
from rich.console import Console

from gesso import config, recipes, sample_files, sampling, snapshot
from gesso import rng as keyed
from gesso.config import DataConfig, LatentConfig
from gesso.data import crops, factory, inspect
from gesso.data.base import SampleBatch, latent_channel_stats, pixel_channel_stats
from gesso.data.batching import Batcher
from gesso.data.cache import write
from gesso.data.cache.plan import CachePlan
from gesso.data.cache.read import CachedDataset
from gesso.data.encoders.vae import EDM2_MEAN, EDM2_STD, VAE
from gesso.data.factory import open_dataset, with_dataset_info
from gesso.data.in_memory import InMemoryDataset
from gesso.data.normalization import Normalizer
from gesso.data.on_the_fly import OnTheFlyDataset
from gesso.data.sources import open_source
from gesso.errors import RunError, UsageError
from gesso.evaluation import runner
from gesso.sample_files import SampleArgs
from gesso.training import loop
from gesso.training.run_folder import open_dataset_for_run, start_training

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def test_which_data_set_is_opened(photos, vae):
    data = DataConfig(source=str(photos), resolution=16)
    assert isinstance(open_dataset(data), InMemoryDataset)
    assert isinstance(open_dataset(data, LatentConfig(vae=str(vae))), OnTheFlyDataset)
    assert isinstance(open_dataset(data.model_copy(update={"crop_scale": (0.9, 1.0)})), OnTheFlyDataset)


def test_too_large_for_memory_is_decoded_as_it_goes_to_the_same_pixels(photos, monkeypatch):
    data = DataConfig(source=str(photos), resolution=16, flip=True)
    in_memory = open_dataset(data, seed=3)
    monkeypatch.setattr(factory, "MAX_IN_MEMORY_BYTES", 100)
    straight = open_dataset(data, seed=3)
    assert isinstance(straight, OnTheFlyDataset)
    index = torch.arange(16)
    assert in_memory.reference_images(index).equal(straight.reference_images(index))
    plain = DataConfig(source=str(photos), resolution=16)
    for one, other in zip(open_dataset(plain).get(index, index), in_memory.get(index, index), strict=True):
        assert one is None or one.shape == other.shape
    actual_view, reference = (
        open_dataset(plain).get(index, index),
        OnTheFlyDataset(straight.source, plain).get(index, index),
    )
    for name in ("x", "original_sizes", "crop_boxes", "flips", "pixel_stats", "labels", "indices"):
        assert getattr(actual_view, name).equal(getattr(reference, name)), name
    torch.testing.assert_close(in_memory.channel_stats()[0], pixel_channel_stats(in_memory.pixels)[0])


def test_every_sample_is_the_crop_that_its_counter_draws(photos):
    """Compare with images that are cropped and resized one at a time."""
    dataset = open_on_the_fly(photos, seed=5, flip=True)
    counter = torch.arange(100, 148)
    index = dataset.sample_order(5, 8)(counter)
    samples = dataset.get(index, counter)
    u = keyed.uniform(5, counter, "view", crops.UNIFORMS_PER_VIEW)
    files = sorted(photos.glob("*/*.png"))
    for b, i in enumerate(index.tolist()):
        picture = Image.open(files[i])
        width, height = picture.size
        fits = min(width, height)
        side = fits * float(0.4 + 0.2 * u[b, 0]) ** 0.5
        top, left = float(u[b, 1]) * (height - side), float(u[b, 2]) * (width - side)
        crop = picture.resize((16, 16), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        due = np.asarray(crop).transpose(2, 0, 1)
        due = due[:, :, ::-1] if u[b, 3] < 0.5 else due
        assert np.abs(samples.x[b].numpy().astype(int) - due.astype(int)).max() <= 1
        box = torch.tensor([top / height, left / width, (top + side) / height, (left + side) / width])
        torch.testing.assert_close(samples.crop_boxes[b], box, atol=1e-6, rtol=0)
        assert bool(samples.flips[b]) == bool(u[b, 3] < 0.5) and samples.original_sizes[b].tolist() == [height, width]
        area = (box[2] - box[0]) * height * (box[3] - box[1]) * width / fits**2
        assert 0.4 <= area <= 0.6
    assert 0.3 < samples.flips.float().mean() < 0.7


def test_control_says_what_the_crop_shows(photos):
    """Red and green of the image are positions: the mean of the view is the center of its box."""
    dataset = open_on_the_fly(photos)
    samples = dataset.get(torch.arange(16), torch.arange(16))
    columns = samples.control_columns()
    red, green = (samples.x[:, c].float().mean((1, 2)) for c in (0, 1))
    torch.testing.assert_close(red, 0.2550 / 2 * (columns["crop_left"] + columns["crop_right"]), atol=2.0, rtol=0)
    torch.testing.assert_close(green, 0.2550 / 2 * (columns["crop_top"] + columns["crop_bottom"]), atol=2.0, rtol=0)
    assert columns["aspect"].unique().tolist() == [625.0, 2000.0]


@pytest.mark.parametrize("path", ["live", "in memory", "cache", "sheet"])
def test_the_box_of_a_mirrored_view_is_stated_in_the_frame_that_is_shown(photos, path, tmp_path):
    """Red is the distance from the left, in a mirrored view from the right: its mean is the center of the box."""
    settings = {"flip": True, "crop_scale": (0.4, 0.6)}
    counter = torch.arange(64)
    if path == "live":
        dataset = open_on_the_fly(photos, flip=True)
        samples = dataset.get(counter % len(dataset), counter)
    elif path == "cache":
        write.write_cache(
            CachePlan(data=DataConfig(source=str(photos), resolution=16, **settings), views=3), tmp_path / "c"
        )
        dataset = CachedDataset(tmp_path / "c")
        samples = dataset.get(counter % len(dataset), counter)
    elif path == "sheet":
        requested = inspect.InspectArgs(num_rows=4, num_views=4, crop_scale=(0.4, 0.6), flip=True, resolution=16)
        actual, _ = inspect.source_rows(open_source(str(photos)), np.array([[16, 16]]), requested)
        shown = [row.views for row in actual]
        samples = SampleBatch(*(torch.cat(parts) for parts in zip(*(view[:7] for view in shown), strict=True)))
    else:  # boxes off the centre, which the centred ones of training are not
        dataset = open_dataset(DataConfig(source=str(photos), resolution=16, flip=True))
        boxes = [
            crops.random_view(DataConfig(crop_scale=(0.4, 0.6)), h, w, [i / 16, 0.1, 0.2, 1])
            for i, (h, w) in enumerate(dataset.original_sizes.tolist())
        ]
        files = sorted(photos.glob("*/*.png"))
        dataset.crop_boxes = torch.tensor([box[:4] for box in boxes])
        dataset.pixels = torch.stack(
            [
                torch.from_numpy(crops.crop_resize(Image.open(f), box, 16, 16))
                for f, box in zip(files, boxes, strict=True)
            ]
        )
        samples = dataset.get(counter % len(dataset), counter)
    columns = samples.control_columns()
    left, right = (columns[f"crop_{edge}"] / 1000 for edge in ("left", "right"))
    assert 0 < int(samples.flips.sum()) < len(samples.flips)
    assert ((left >= -1e-6) & (left < right) & (right <= 1 + 1e-6)).all()
    # Of red, which rises from left to right in the stored picture and falls in the mirrored one.
    place = samples.x[:, 0].float().mean((1, 2)) / 255
    place = torch.where(samples.flips, 1 - place, place)
    torch.testing.assert_close(place, (left + right) / 2, atol=0.01, rtol=0)
    apart = (samples.crop_boxes[:, 1] + samples.crop_boxes[:, 3]) / 2 - (left + right) / 2
    assert (apart[~samples.flips].abs() < 1e-6).all() and apart[samples.flips].abs().max() > 0.05


def test_a_sample_depends_on_its_counter_alone(photos):
    run = image_run(
        photos, **{"data.flip": "true", "data.crop_scale": "[0.4,1]", "control.variables": "flip,crop,size,brightness"}
    )
    run, actual = open_dataset_for_run(run, QUIET)
    batches = Batcher(actual, run, 0.5, CPU)
    counter = torch.arange(10, 50)  # over three epochs
    x0, cond = batches(counter)
    for ranks in (2, 3):
        for rank in range(ranks):
            rank_counter = counter[rank::ranks]
            y0, other = batches(rank_counter)
            assert y0.equal(x0[rank_counter - 10])
            for name in ("label", "has_semantic", "control_high", "control_low", "has_control"):
                assert getattr(other, name).equal(getattr(cond, name)[rank_counter - 10]), name
    assert not batches(counter + 16)[0].equal(x0)


def test_batches_fetched_ahead_are_the_same(photos):
    run, actual = open_dataset_for_run(image_run(photos, **{"data.crop_scale": "[0.4,1]"}), QUIET)
    batches = Batcher(actual, run, 0.5, CPU)
    counters = [torch.arange(k, k + 8) for k in range(0, 40, 8)]
    ahead = list(batches.prefetch(iter(counters)))
    assert len(ahead) == 5
    for counter, (same, x0, cond) in zip(counters, ahead, strict=True):
        y0, other = batches(counter)
        assert same is counter and x0.equal(y0) and cond.label.equal(other.label)
    before = threading.active_count()
    stream = batches.prefetch(iter(counters))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_unreadable_image_gives_way_to_the_next(photos, tmp_path):
    folder = copy_with_truncated(
        photos, tmp_path / "s", {"6.png", "8.png"}
    )  # tall/6 (the last of its class), wide/6, wide/8 (the last)
    dataset = open_on_the_fly(folder, max_unreadable=0.2)
    index = torch.tensor([6, 13, 15, 0])
    samples = dataset.get(index, torch.arange(4))
    assert samples.indices.tolist() == [7, 14, 0, 0] and samples.labels.tolist() == [1, 1, 0, 0]
    dataset.get(index, torch.arange(4))
    assert sorted(name for name, _ in dataset.unreadable) == ["tall/6.png", "wide/6.png", "wide/8.png"]
    strict = open_on_the_fly(folder, max_unreadable=0.1)
    strict.get(torch.tensor([6]), torch.arange(1))
    with pytest.raises(RunError, match=r"2 of 16 images .* are unreadable, over the 10.0%"):
        strict.get(torch.tensor([13]), torch.arange(1))


def test_captions_follow_the_image_that_is_shown(photos, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, file in enumerate(sorted(photos.glob("wide/*.png"))):
        content = file.read_bytes()
        (folder / f"{i}.png").write_bytes(content[:90] if i == 4 else content)
        (folder / f"{i}.txt").write_text(f"picture {i}")
    run = image_run(
        folder,
        **{
            "semantic.kind": "text",
            "data.crop_scale": "[0.9,1]",
            "data.max_unreadable": 0.2,
            "eval.toy_metrics": "none",
        },
    )
    run, actual = open_dataset_for_run(run, QUIET)
    batches = Batcher(actual, run, 0.5, CPU)
    counter = torch.arange(9)
    place = batches.sample_order(counter).tolist().index(4)
    _, cond = batches(counter)
    due = batches.caption_encoder.encoder(["picture 5"])
    length = int(due.lengths[0])
    assert cond.text[place, :length].equal(due.tokens[0, :length])
    batches.caption_encoder.encoded = None  # as with too many captions for the memory: the same tokens
    assert batches(counter)[1].text.equal(cond.text)


def test_an_unreadable_image_stops_training_with_its_name(photos, tmp_path):
    folder = copy_with_truncated(photos, tmp_path / "s", {"3.png"})
    run = image_run(folder, **{"data.crop_scale": "[0.4,1]", "data.mean": "[0,0,0]", "data.std": "[1,1,1]"})
    with pytest.raises(RunError, match=r"(wide|tall)/3.png"):
        start_training(run, tmp_path / "run", False, QUIET, lambda text: None)


# Latents.


EDM2_LATENTS = {"latent.vae": "no/such", "latent.convention": "edm2", "control.variables": "[]"}


def test_latents_are_drawn_afresh_at_each_visit_and_keyed_to_it(latent_zip):
    path, moments = latent_zip
    run, actual = open_dataset_for_run(image_run(path, **EDM2_LATENTS), QUIET)  # the VAE itself is not needed
    assert (
        run.data.mean == EDM2_MEAN
        and run.data.std == EDM2_STD
        and run.input_spec.channels == 4
        and run.input_spec.resolution == 2
    )
    batches = Batcher(actual, run, 0.5, CPU)
    counter = torch.arange(24)
    x0, cond = batches(counter)
    index = batches.sample_order(counter)
    eps = keyed.normal(run.train.seed, counter, "latent", (4, 2, 2))
    mean, std = (torch.tensor(v)[:, None, None] for v in (EDM2_MEAN, EDM2_STD))
    due = (moments[index, :4] + moments[index, 4:] * eps - mean) * 0.5 / std
    torch.testing.assert_close(x0, due)
    assert cond.label.equal(index % 3)
    twice = x0[torch.cat([torch.where(index == 7)[0]])]
    assert len(twice) == 2 and not twice[0].equal(twice[1])
    assert torch.cat([batches(part)[0] for part in counter.split(5)]).equal(x0)


def test_moments_of_latents(latent_zip):
    path, moments = latent_zip
    data, latent = DataConfig(source=str(path), resolution=16), LatentConfig(vae="x/y", normalization="measured")
    actual = open_dataset(data, latent)
    measured = with_dataset_info(data, actual, latent)
    many = moments[:, :4] + moments[:, 4:] * torch.randn(
        20_000, 12, 4, 2, 2, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(torch.tensor(measured.mean), many.mean((0, 1, 3, 4)), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(measured.std), many.transpose(0, 2).flatten(1).std(1), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "settings, output",
    [
        ({"latent.vae": "null"}, "contains latents: set the VAE that encoded them"),
        ({"data.flip": "true"}, "cannot be mirrored or cropped: set data.flip=false"),
        ({"data.crop_scale": "[0.4,0.6]"}, "cannot be mirrored or cropped"),
        (
            {"data.resolution": 32},
            "of 4 channels, 2x2, but latent.channels=4, latent.downsample_factor=8 and data.resolution=32 "
            "mean 4 channels, 4x4",
        ),
        ({"latent.convention": "dit", "latent.channels": 16}, "of 4 channels, 2x2, but latent.channels=16"),
    ],
)
def test_latents_that_do_not_fit(latent_zip, settings, output):
    with pytest.raises(UsageError, match=output):
        open_dataset_for_run(image_run(latent_zip[0], **EDM2_LATENTS | settings), QUIET)


def test_a_vae_sees_rgb():
    with pytest.raises(UsageError, match=r"data.channels=1, but latent.vae needs RGB"):
        image_run("digits", **{"latent.vae": "a/b", "data.channels": 1, "data.resolution": 8})


@pytest.mark.parametrize("convention", ["dit", "edm2"])
def test_pixels_are_encoded_as_training_comes_to_them(photos, vae, convention):
    run, actual = open_dataset_for_run(
        image_run(photos, **{"latent.vae": vae, "latent.convention": convention, "data.crop_scale": "[0.4,1]"}), QUIET
    )
    loaded_vae = VAE(str(vae), convention=convention)
    mean, std = loaded_vae.channel_stats()
    assert (run.data.mean, run.data.std) == (mean, std)
    batches = Batcher(actual, run, 0.5, CPU)
    counter = torch.arange(6)
    x0, _ = batches(counter)
    means, stds = loaded_vae.encode(actual.get(batches.sample_order(counter), counter).x)
    z = means + stds * keyed.normal(run.train.seed, counter, "latent", (4, 2, 2))
    torch.testing.assert_close(x0, (z - torch.tensor(mean)[:, None, None]) * 0.5 / torch.tensor(std)[:, None, None])
    assert batches.normalizer.x0_to_pixels(x0).equal(
        loaded_vae.decode((x0 / 0.5) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
    )


def test_measured_constants_of_encoded_pixels(photos, vae):
    run, actual = open_dataset_for_run(
        image_run(photos, **{"latent.vae": vae, "latent.normalization": "measured"}), QUIET
    )
    parts = VAE(str(vae)).encode(actual.reference_images(torch.arange(16)))
    mean, std = latent_channel_stats(torch.cat(parts, dim=1))
    torch.testing.assert_close(torch.tensor(run.data.mean, dtype=torch.float64), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(run.data.std, dtype=torch.float64), std, rtol=1e-4, atol=1e-5)


def test_a_vae_of_other_channels_is_refused_before_training(photos, tmp_path, vae):
    latents_16 = write_vae(tmp_path / "16", 16)
    with pytest.raises(UsageError, match=r"latent.channels=4, but latent.vae=.* has 16: set latent.channels=16"):
        open_dataset_for_run(image_run(photos, **{"latent.vae": latents_16}), QUIET)
    with pytest.raises(UsageError, match=r"latent.downsample_factor=4, but latent.vae=.* has 8"):
        open_dataset_for_run(image_run(photos, **{"latent.vae": vae, "latent.downsample_factor": 4}), QUIET)


def test_trains_on_latents_resumes_bit_equal_samples_and_evaluates(photos, vae, tmp_path, monkeypatch):
    settings = {
        "latent.vae": vae,
        "data.crop_scale": "[0.4,1]",
        "data.flip": "true",
        "control.variables": "flip,crop,size",
    }
    run = image_run(photos, **settings)
    start_training(run, tmp_path / "whole", False, QUIET, lambda text: None)
    step = loop.Trainer.step

    def interrupted(self):
        if self.nimg == 24:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_training(run, tmp_path / "parts", False, QUIET, lambda text: None)
    monkeypatch.setattr(loop.Trainer, "step", step)
    start_training(run, tmp_path / "parts", True, QUIET, lambda text: None)
    full, parts = (snapshot.read(snapshot.list_snapshots(tmp_path / name)[-1].path)[0] for name in ("whole", "parts"))
    assert all(full[name].equal(parts[name]) for name in full)

    done = config.load_config(tmp_path / "whole" / "run.yaml")
    sample_files.sample_to_folder(
        tmp_path / "whole", done, SampleArgs(seeds="0-2", control={"crop": "0,0,1,.5"}), tmp_path / "made"
    )
    assert sample_sizes(tmp_path / "made") == [(16, 16)] * 3
    runner.evaluate_run(tmp_path / "whole", done, lambda done, total: None)
    assert (tmp_path / "whole" / "sheets" / "nearest.png").exists()


def test_a_vae_that_is_gone_is_missed_before_any_work(photos, vae, tmp_path):
    copy = write_vae(tmp_path / "vae", 4)
    start_training(image_run(photos, **{"latent.vae": copy}), tmp_path / "run", False, QUIET, lambda text: None)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match="the VAE"):
        sample_files.sample_to_folder(
            tmp_path / "run", config.load_config(tmp_path / "run" / "run.yaml"), SampleArgs(), None
        )


def test_sampling_at_another_resolution_counts_pixels(photos, vae, tmp_path):
    start_training(image_run(photos, **{"latent.vae": vae}), tmp_path / "run", False, QUIET, lambda text: None)
    run, _ = config.resolve(config.to_dict(config.load_config(tmp_path / "run" / "run.yaml")), ["sample.resolution=32"])
    sample_files.sample_to_folder(tmp_path / "run", run, SampleArgs(seeds="0"), tmp_path / "made")
    assert sample_sizes(tmp_path / "made") == [(32, 32)]
    with pytest.raises(UsageError, match=r"sample.resolution=20 is not a multiple of 8"):
        config.resolve(config.to_dict(run), ["sample.resolution=20"])


def test_space_is_the_identity_on_pixels():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    space = Normalizer(DataConfig(mean=(-0.3,), std=(0.7,), channels=1), LatentConfig(), 0.5, "cpu")
    assert space.x0_to_pixels(space.to_x0(pixels, 0, torch.arange(1))).equal(pixels)


def test_pixels_become_8_bits_as_the_papers_scripts_have_it():
    """EDM2 truncates 127.5 x + 128, which is rounding; ADM truncates 127.5 (x + 1). Inputs are pixel / 127.5 - 1."""
    run = recipes.RECIPES["edm2-img64-s"]()
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256)[..., None].contiguous()
    space = Normalizer(run.data, run.latent, 0.5, "cpu")
    assert torch.equal(space.to_x0(pixels, 0, torch.arange(1)), pixels.float() / 127.5 - 1)
    x0 = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.4 - 1.2
    assert torch.equal(space.x0_to_pixels(x0), (x0 * 127.5 + 128).clip(0, 255).to(torch.uint8))
    adm = Normalizer(run.data, run.latent, 0.5, "cpu", "truncate")
    assert torch.equal(adm.x0_to_pixels(x0), ((x0 + 1) * 127.5).clip(0, 255).to(torch.uint8))
    assert 0.3 < (space.x0_to_pixels(x0) != adm.x0_to_pixels(x0)).float().mean() < 0.6
    run = config.resolve(config.to_dict(run), ["sample.to_uint8=truncate", "data.source=x"])[0]
    assert sampling.open_decoder(run).to_uint8 == "truncate"


@pytest.mark.parametrize("name", ["in1k-256-berrada", "cc12m-256-berrada"])
def test_a_recipe_at_scale_on_images_has_fresh_crops_at_each_visit(photos, vae, tmp_path, name):
    """The docstring of a recipe names its command without a cache, where images are encoded during training."""
    docstring = recipes.RECIPES[name].__doc__
    images = "cc12m" if name.startswith("cc12m") else "/path/to/imagenet"
    assert (
        f"gesso train {name} data.source={images}\n" in docstring
        and f"gesso train {name} data.source=caches/" in docstring
    )
    settings = ["data.resolution=16", f"latent.vae={vae}", "semantic.kind=label", "semantic.encoder=words"]
    run = recipes.resolve(name, [f"data.source={photos}", *settings, "sample.guidance_base_resolution=null"])[0]
    run, some = open_dataset_for_run(run, QUIET)
    assert isinstance(some, OnTheFlyDataset)
    visits = torch.arange(64)
    samples = some.get(torch.full((64,), 3), visits)
    assert len(samples.crop_boxes.unique(dim=0)) == 64 and samples.flips.any()
    low, high = run.data.crop_scale
    height, width = samples.original_sizes[0].tolist()
    area = (samples.crop_boxes[:, 2:] - samples.crop_boxes[:, :2]).prod(1) * height * width / min(height, width) ** 2
    assert low - 1e-5 <= area.min() and area.max() <= high + 1e-5


def test_a_larger_folder_than_memory_trains(tmp_path, monkeypatch):
    write_image_folders(tmp_path / "images", {"a": 10, "b": 10}, size=20)
    monkeypatch.setattr(factory, "MAX_IN_MEMORY_BYTES", 0)
    start_training(
        image_run(tmp_path / "images", **{"data.flip": "true"}), tmp_path / "run", False, QUIET, lambda text: None
    )
    assert snapshot.list_snapshots(tmp_path / "run")


# Other aspects.


@pytest.mark.parametrize("aspect, size", [("1:1", (16, 16)), ("2:1", (22, 12)), ("1:2", (12, 22)), ("16:9", (22, 12))])
def test_samples_of_another_aspect_have_as_many_pixels(photos, tmp_path, aspect, size):
    run = image_run(photos, **{"net.patch_size": 2, "train.total_images": 8, "control.variables": "size,aspect"})
    start_training(run, tmp_path / "run", False, QUIET, lambda text: None)
    run, _ = config.resolve(
        config.to_dict(config.load_config(tmp_path / "run" / "run.yaml")), [f"sample.aspect={aspect}"]
    )
    assert run.sample_size == size[::-1]
    sample_files.sample_to_folder(tmp_path / "run", run, SampleArgs(seeds="0-1"), tmp_path / "made")
    assert sample_sizes(tmp_path / "made") == [size] * 2


def test_rows_of_control_are_of_pictures_of_that_aspect(photos):
    run, _ = open_dataset_for_run(image_run(photos, **{"control.variables": "size", "sample.aspect": "2:1"}), QUIET)
    rows = torch.tensor([[64.0, 40.0], [48.0, 96.0], [64.0, 40.0], [48.0, 100.0]])
    cond, _ = sampling.build_cond(run, range(40), rows, labels=[0] * 40)
    assert {tuple(row) for row in cond.control_low.tolist()} == {(48.0, 96.0), (48.0, 100.0)}
    cond, _ = sampling.build_cond(run, range(40), rows[::2], labels=[0] * 40)  # none is: any
    assert cond.control_low.unique(dim=0).tolist() == [[64.0, 40.0]]


def test_the_bucket_that_is_nearest():
    run = image_run("digits", **{"data.buckets": "[[16,16],[12,20],[20,12]]", "sample.aspect": "3:2"})
    assert run.sample_size == (12, 20)
    with pytest.raises(UsageError, match=r"sample.aspect=wide: write width:height"):
        image_run("digits", **{"sample.aspect": "wide"})
