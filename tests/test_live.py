"""Data sets that are decoded as training goes: crops, flips, latents; batches fetched ahead; sampling through a VAE."""

import io
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import folder_of_images
from PIL import Image
from rich.console import Console
from test_encoders import write_vae

from gesso import conditions, config, generate, keyed, recipes, snapshot
from gesso.config import Data, Latent
from gesso.config.cache import Plan
from gesso.data import caching, crops, dataset, examine
from gesso.data.batches import Batches
from gesso.data.cache import Cache
from gesso.data.dataset import described, open_dataset
from gesso.data.images import Images
from gesso.data.live import Live
from gesso.data.samples import Samples, latent_moments, pixel_moments
from gesso.data.sources import open_source
from gesso.data.space import Space
from gesso.data.vae import EDM2_MEAN, EDM2_STD, VAE
from gesso.errors import RunError, UsageError
from gesso.evaluate import score
from gesso.generate import Asked
from gesso.train import loop
from gesso.train.start import opened, start

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of oblong pictures whose pixels tell where they are: red grows to the right, green downwards."""
    root = tmp_path_factory.mktemp("photos")
    for name, (width, height), count in (("wide", (96, 48), 9), ("tall", (40, 64), 7)):
        (root / name).mkdir()
        for i in range(count):
            x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
            Image.fromarray(np.stack([x, y, 20.0 * i + 0 * x], 2).round().astype(np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "4", 4)


def live(photos, seed=0, **settings) -> Live:
    found = open_dataset(Data(source=str(photos), resolution=16, crop_scale=(0.4, 0.6), **settings), seed=seed)
    assert isinstance(found, Live)
    return found


def tiny(source, **settings) -> config.Run:
    """A run on 16x16 pixels, or 2x2 latents, of a few steps."""
    said = {
        "data.source": source, "data.resolution": 16, "data.channels": 3, "net.width": 32, "net.depth": 1, "net.heads": 2,
        "net.patch": 1, "train.total_images": 64, "train.batch_size": 8, "train.snapshot_images": 32,
        "train.state_images": 16, "train.log_images": 32, "train.threads": 1, "sample.steps": 3, "eval.features": "none",
    }  # fmt: skip
    return recipes.resolve("digits", [f"{k}={v}" for k, v in (said | settings).items()])[0]


def test_which_data_set_is_opened(photos, vae):
    data = Data(source=str(photos), resolution=16)
    assert isinstance(open_dataset(data), Images)
    assert isinstance(open_dataset(data, Latent(vae=str(vae))), Live)
    assert isinstance(open_dataset(data.model_copy(update={"crop_scale": (0.9, 1.0)})), Live)


def test_too_large_for_memory_is_decoded_as_it_goes_to_the_same_pixels(photos, monkeypatch):
    data = Data(source=str(photos), resolution=16, flip=True)
    held = open_dataset(data, seed=3)
    monkeypatch.setattr(dataset, "IN_MEMORY", 100)
    straight = open_dataset(data, seed=3)
    assert isinstance(straight, Live)
    index = torch.arange(16)
    assert held.pictures(index).equal(straight.pictures(index))
    plain = Data(source=str(photos), resolution=16)
    for one, other in zip(open_dataset(plain).take(index, index), held.take(index, index), strict=True):
        assert one is None or one.shape == other.shape
    ours, theirs = open_dataset(plain).take(index, index), Live(straight.source, plain).take(index, index)
    for name in ("x", "sizes", "boxes", "flips", "tone", "labels", "index"):
        assert getattr(ours, name).equal(getattr(theirs, name)), name
    torch.testing.assert_close(held.moments()[0], pixel_moments(held.pixels)[0])


def test_every_sample_is_the_crop_that_its_counter_draws(photos):
    """Against one picture at a time, cropped and resized by hand."""
    some = live(photos, seed=5, flip=True)
    counter = torch.arange(100, 148)
    index = some.order(5, 8)(counter)
    samples = some.take(index, counter)
    u = keyed.uniform(5, counter, "view", crops.UNIFORMS)
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
        torch.testing.assert_close(samples.boxes[b], box, atol=1e-6, rtol=0)
        assert bool(samples.flips[b]) == bool(u[b, 3] < 0.5) and samples.sizes[b].tolist() == [height, width]
        area = (box[2] - box[0]) * height * (box[3] - box[1]) * width / fits**2
        assert 0.4 <= area <= 0.6
    assert 0.3 < samples.flips.float().mean() < 0.7


def test_control_says_what_the_crop_shows(photos):
    """The picture's red and green are places: the mean of the view is the middle of its box."""
    some = live(photos)
    samples = some.take(torch.arange(16), torch.arange(16))
    columns = samples.columns()
    red, green = (samples.x[:, c].float().mean((1, 2)) for c in (0, 1))
    torch.testing.assert_close(red, 0.2550 / 2 * (columns["crop_left"] + columns["crop_right"]), atol=2.0, rtol=0)
    torch.testing.assert_close(green, 0.2550 / 2 * (columns["crop_top"] + columns["crop_bottom"]), atol=2.0, rtol=0)
    assert columns["aspect"].unique().tolist() == [625.0, 2000.0]


@pytest.mark.parametrize("path", ["live", "in memory", "cache", "sheet"])
def test_the_box_of_a_mirrored_view_is_stated_in_the_frame_that_is_shown(photos, path, tmp_path):
    """Red is the place from the left, of a mirrored view from the right: the mean of the view is the middle of its box."""
    settings = {"flip": True, "crop_scale": (0.4, 0.6)}
    counter = torch.arange(64)
    if path == "live":
        some = live(photos, flip=True)
        samples = some.take(counter % len(some), counter)
    elif path == "cache":
        caching.write(Plan(data=Data(source=str(photos), resolution=16, **settings), views=3), tmp_path / "c")
        some = Cache(tmp_path / "c")
        samples = some.take(counter % len(some), counter)
    elif path == "sheet":
        asked = examine.Asked(rows=4, views=4, crop_scale=(0.4, 0.6), flip=True, resolution=16)
        found, _ = examine.source_rows(open_source(str(photos)), np.array([[16, 16]]), asked)
        shown = [row.views for row in found]
        samples = Samples(*(torch.cat(parts) for parts in zip(*(view[:7] for view in shown), strict=True)))
    else:  # boxes off the centre, which the centred ones of training are not
        some = open_dataset(Data(source=str(photos), resolution=16, flip=True))
        boxes = [
            crops.drawn(Data(crop_scale=(0.4, 0.6)), h, w, [i / 16, 0.1, 0.2, 1])
            for i, (h, w) in enumerate(some.sizes.tolist())
        ]
        files = sorted(photos.glob("*/*.png"))
        some.boxes = torch.tensor([box[:4] for box in boxes])
        some.pixels = torch.stack(
            [torch.from_numpy(crops.taken(Image.open(f), box, 16, 16)) for f, box in zip(files, boxes, strict=True)]
        )
        samples = some.take(counter % len(some), counter)
    columns = samples.columns()
    left, right = (columns[f"crop_{edge}"] / 1000 for edge in ("left", "right"))
    assert 0 < int(samples.flips.sum()) < len(samples.flips)
    assert ((left >= -1e-6) & (left < right) & (right <= 1 + 1e-6)).all()
    # Of red, which rises from left to right in the stored picture and falls in the mirrored one.
    place = samples.x[:, 0].float().mean((1, 2)) / 255
    place = torch.where(samples.flips, 1 - place, place)
    torch.testing.assert_close(place, (left + right) / 2, atol=0.01, rtol=0)
    apart = (samples.boxes[:, 1] + samples.boxes[:, 3]) / 2 - (left + right) / 2
    assert (apart[~samples.flips].abs() < 1e-6).all() and apart[samples.flips].abs().max() > 0.05


def test_a_sample_depends_on_its_counter_alone(photos):
    run = tiny(
        photos, **{"data.flip": "true", "data.crop_scale": "[0.4,1]", "control.variables": "flip,crop,size,brightness"}
    )
    run, found = opened(run, QUIET)
    batches = Batches(found, run, 0.5, CPU)
    counter = torch.arange(10, 50)  # over three epochs
    x0, cond = batches(counter)
    for ranks in (2, 3):
        for rank in range(ranks):
            mine = counter[rank::ranks]
            y0, other = batches(mine)
            assert y0.equal(x0[mine - 10])
            for name in ("label", "has_semantic", "control_high", "control_low", "has_control"):
                assert getattr(other, name).equal(getattr(cond, name)[mine - 10]), name
    assert not batches(counter + 16)[0].equal(x0)


def test_batches_fetched_ahead_are_the_same(photos):
    run, found = opened(tiny(photos, **{"data.crop_scale": "[0.4,1]"}), QUIET)
    batches = Batches(found, run, 0.5, CPU)
    counters = [torch.arange(k, k + 8) for k in range(0, 40, 8)]
    ahead = list(batches.ahead(iter(counters)))
    assert len(ahead) == 5
    for counter, (same, x0, cond) in zip(counters, ahead, strict=True):
        y0, other = batches(counter)
        assert same is counter and x0.equal(y0) and cond.label.equal(other.label)
    before = threading.active_count()
    stream = batches.ahead(iter(counters))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def spoiled(photos, folder, names):
    for file in photos.glob("*/*.png"):
        (folder / file.parent.name).mkdir(exist_ok=True, parents=True)
        content = file.read_bytes()
        (folder / file.parent.name / file.name).write_bytes(content[:90] if file.name in names else content)
    return folder


def test_an_unreadable_image_gives_way_to_the_next(photos, tmp_path):
    folder = spoiled(
        photos, tmp_path / "s", {"6.png", "8.png"}
    )  # tall/6 (the last of its class), wide/6, wide/8 (the last)
    some = live(folder, max_unreadable=0.2)
    index = torch.tensor([6, 13, 15, 0])
    samples = some.take(index, torch.arange(4))
    assert samples.index.tolist() == [7, 14, 0, 0] and samples.labels.tolist() == [1, 1, 0, 0]
    some.take(index, torch.arange(4))
    assert sorted(name for name, _ in some.unreadable) == ["tall/6.png", "wide/6.png", "wide/8.png"]
    strict = live(folder, max_unreadable=0.1)
    strict.take(torch.tensor([6]), torch.arange(1))
    with pytest.raises(RunError, match=r"2 of 16 images .* are unreadable, over the 10.0%"):
        strict.take(torch.tensor([13]), torch.arange(1))


def test_captions_follow_the_image_that_is_shown(photos, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, file in enumerate(sorted(photos.glob("wide/*.png"))):
        content = file.read_bytes()
        (folder / f"{i}.png").write_bytes(content[:90] if i == 4 else content)
        (folder / f"{i}.txt").write_text(f"picture {i}")
    run = tiny(
        folder,
        **{"semantic.kind": "text", "data.crop_scale": "[0.9,1]", "data.max_unreadable": 0.2, "eval.features": "none"},
    )
    run, found = opened(run, QUIET)
    batches = Batches(found, run, 0.5, CPU)
    counter = torch.arange(9)
    place = batches.order(counter).tolist().index(4)
    _, cond = batches(counter)
    due = batches.texts.encoder(["picture 5"])
    length = int(due.lengths[0])
    assert cond.text[place, :length].equal(due.tokens[0, :length])
    batches.texts.kept = None  # as for captions too many to keep: the same tokens
    assert batches(counter)[1].text.equal(cond.text)


def test_an_unreadable_image_stops_training_with_its_name(photos, tmp_path):
    folder = spoiled(photos, tmp_path / "s", {"3.png"})
    run = tiny(folder, **{"data.crop_scale": "[0.4,1]", "data.mean": "[0,0,0]", "data.std": "[1,1,1]"})
    with pytest.raises(RunError, match=r"(wide|tall)/3.png"):
        start(run, tmp_path / "run", False, QUIET, lambda text: None)


# Latents.


@pytest.fixture(scope="module")
def latent_zip(tmp_path_factory):
    """EDM2's zip: 12 latents of 3 channels, 2x2, with labels."""
    path = tmp_path_factory.mktemp("zip") / "latents.zip"
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(12, 8, 2, 2)).astype(np.float32)
    moments[:, 4:] = np.exp(moments[:, 4:])
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(12)]
        for name, one in zip(names, moments, strict=True):
            raw = io.BytesIO()
            np.save(raw, one)
            archive.writestr(name, raw.getvalue())
        archive.writestr(
            "dataset.json", '{"labels": [' + ",".join(f'["{n}", {i % 3}]' for i, n in enumerate(names)) + "]}"
        )
    return path, torch.from_numpy(moments)


EDM2_LATENTS = {"latent.vae": "no/such", "latent.convention": "edm2", "control.variables": "[]"}


def test_latents_are_drawn_afresh_at_each_visit_and_keyed_to_it(latent_zip):
    path, moments = latent_zip
    run, found = opened(tiny(path, **EDM2_LATENTS), QUIET)  # the VAE itself is not needed
    assert (
        run.data.mean == EDM2_MEAN
        and run.data.std == EDM2_STD
        and run.inputs.channels == 4
        and run.inputs.resolution == 2
    )
    batches = Batches(found, run, 0.5, CPU)
    counter = torch.arange(24)
    x0, cond = batches(counter)
    index = batches.order(counter)
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
    data, latent = Data(source=str(path), resolution=16), Latent(vae="x/y", constants="measured")
    found = open_dataset(data, latent)
    measured = described(data, found, latent)
    many = moments[:, :4] + moments[:, 4:] * torch.randn(
        20_000, 12, 4, 2, 2, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(torch.tensor(measured.mean), many.mean((0, 1, 3, 4)), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(measured.std), many.transpose(0, 2).flatten(1).std(1), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"latent.vae": "null"}, "holds latents: say which VAE made them"),
        ({"data.flip": "true"}, "cannot be mirrored or cropped: set data.flip=false"),
        ({"data.crop_scale": "[0.4,0.6]"}, "cannot be mirrored or cropped"),
        (
            {"data.resolution": 32},
            "of 4 channels, 2x2, where latent.channels=4, latent.factor=8, data.resolution=32 make 4, 4x4",
        ),
        ({"latent.convention": "dit", "latent.channels": 16}, "of 4 channels, 2x2, where latent.channels=16"),
    ],
)
def test_latents_that_do_not_fit(latent_zip, settings, said):
    with pytest.raises(UsageError, match=said):
        opened(tiny(latent_zip[0], **EDM2_LATENTS | settings), QUIET)


def test_a_vae_sees_rgb():
    with pytest.raises(UsageError, match=r"data.channels=1, but latent.vae sees RGB"):
        tiny("digits", **{"latent.vae": "a/b", "data.channels": 1, "data.resolution": 8})


@pytest.mark.parametrize("convention", ["dit", "edm2"])
def test_pixels_are_encoded_as_training_comes_to_them(photos, vae, convention):
    run, found = opened(
        tiny(photos, **{"latent.vae": vae, "latent.convention": convention, "data.crop_scale": "[0.4,1]"}), QUIET
    )
    ours = VAE(str(vae), convention=convention)
    mean, std = ours.constants()
    assert (run.data.mean, run.data.std) == (mean, std)
    batches = Batches(found, run, 0.5, CPU)
    counter = torch.arange(6)
    x0, _ = batches(counter)
    means, stds = ours.encode(found.take(batches.order(counter), counter).x)
    z = means + stds * keyed.normal(run.train.seed, counter, "latent", (4, 2, 2))
    torch.testing.assert_close(x0, (z - torch.tensor(mean)[:, None, None]) * 0.5 / torch.tensor(std)[:, None, None])
    assert batches.space.pixels(x0).equal(
        ours.decode((x0 / 0.5) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
    )


def test_measured_constants_of_encoded_pixels(photos, vae):
    run, found = opened(tiny(photos, **{"latent.vae": vae, "latent.constants": "measured"}), QUIET)
    parts = VAE(str(vae)).encode(found.pictures(torch.arange(16)))
    mean, std = latent_moments(torch.cat(parts, dim=1))
    torch.testing.assert_close(torch.tensor(run.data.mean, dtype=torch.float64), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(run.data.std, dtype=torch.float64), std, rtol=1e-4, atol=1e-5)


def test_a_vae_of_other_channels_is_refused_before_training(photos, tmp_path, vae):
    sixteen = write_vae(tmp_path / "16", 16)
    with pytest.raises(UsageError, match=r"latent.channels=4, but latent.vae=.* has 16: set latent.channels=16"):
        opened(tiny(photos, **{"latent.vae": sixteen}), QUIET)
    with pytest.raises(UsageError, match=r"latent.factor=4, but latent.vae=.* has 8"):
        opened(tiny(photos, **{"latent.vae": vae, "latent.factor": 4}), QUIET)


def test_trains_on_latents_resumes_bit_equal_samples_and_evaluates(photos, vae, tmp_path, monkeypatch):
    settings = {
        "latent.vae": vae,
        "data.crop_scale": "[0.4,1]",
        "data.flip": "true",
        "control.variables": "flip,crop,size",
    }
    run = tiny(photos, **settings)
    start(run, tmp_path / "whole", False, QUIET, lambda text: None)
    step = loop.Trainer.step

    def interrupted(self):
        if self.nimg == 24:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(run, tmp_path / "parts", False, QUIET, lambda text: None)
    monkeypatch.setattr(loop.Trainer, "step", step)
    start(run, tmp_path / "parts", True, QUIET, lambda text: None)
    whole, parts = (snapshot.read(snapshot.stored(tmp_path / name)[-1].path)[0] for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)

    done = config.read(tmp_path / "whole" / "run.yaml")
    generate.draw(tmp_path / "whole", done, Asked(seeds="0-2", control={"crop": "0,0,1,.5"}), tmp_path / "made")
    assert sizes_of(tmp_path / "made") == [(16, 16)] * 3
    score.evaluate_folder(tmp_path / "whole", done, lambda done, total: None)
    assert (tmp_path / "whole" / "samples" / "nearest.png").exists()


def sizes_of(folder):
    sizes = []
    for file in sorted(folder.glob("seed*.png")):
        with Image.open(file) as picture:
            sizes.append(picture.size)
    return sizes


def test_a_vae_that_is_gone_is_missed_before_any_work(photos, vae, tmp_path):
    copy = write_vae(tmp_path / "vae", 4)
    start(tiny(photos, **{"latent.vae": copy}), tmp_path / "run", False, QUIET, lambda text: None)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match="the VAE"):
        generate.draw(tmp_path / "run", config.read(tmp_path / "run" / "run.yaml"), Asked(), None)


def test_sampling_at_another_resolution_counts_pixels(photos, vae, tmp_path):
    start(tiny(photos, **{"latent.vae": vae}), tmp_path / "run", False, QUIET, lambda text: None)
    run, _ = config.resolve(config.as_tree(config.read(tmp_path / "run" / "run.yaml")), ["sample.resolution=32"])
    generate.draw(tmp_path / "run", run, Asked(seeds="0"), tmp_path / "made")
    assert sizes_of(tmp_path / "made") == [(32, 32)]
    with pytest.raises(UsageError, match=r"sample.resolution=20 is not a multiple of 8"):
        config.resolve(config.as_tree(run), ["sample.resolution=20"])


def test_space_is_the_identity_on_pixels():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    space = Space(Data(mean=(-0.3,), std=(0.7,), channels=1), Latent(), 0.5, "cpu")
    assert space.pixels(space.x0(pixels, 0, torch.arange(1))).equal(pixels)


def test_pixels_become_8_bits_as_the_papers_scripts_have_it():
    """EDM2: (127.5 x + 128) cut down, which is rounding; ADM: 127.5 (x + 1) cut down. Its img64: x0 = pixel / 127.5 - 1."""
    run = recipes.RECIPES["edm2-img64-s"]()
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256)[..., None].contiguous()
    space = Space(run.data, run.latent, 0.5, "cpu")
    assert torch.equal(space.x0(pixels, 0, torch.arange(1)), pixels.float() / 127.5 - 1)
    x0 = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.4 - 1.2
    assert torch.equal(space.pixels(x0), (x0 * 127.5 + 128).clip(0, 255).to(torch.uint8))
    adm = Space(run.data, run.latent, 0.5, "cpu", "truncate")
    assert torch.equal(adm.pixels(x0), ((x0 + 1) * 127.5).clip(0, 255).to(torch.uint8))
    assert 0.3 < (space.pixels(x0) != adm.pixels(x0)).float().mean() < 0.6
    run = config.resolve(config.as_tree(run), ["sample.to_uint8=truncate", "data.source=x"])[0]
    assert generate.opened_space(run).to_uint8 == "truncate"


@pytest.mark.parametrize("name", ["in1k-256-ours", "cc12m-256-ours"])
def test_a_recipe_at_scale_on_images_has_fresh_crops_at_each_visit(photos, vae, tmp_path, name):
    """Its docstring names the command without a cache: the same recipe on the images, which go through the VAE as they come."""
    says = recipes.RECIPES[name].__doc__
    images = "cc12m" if name.startswith("cc12m") else "/path/to/imagenet"
    assert f"gesso train {name} data.source={images}\n" in says and f"gesso train {name} data.source=caches/" in says
    settings = ["data.resolution=16", f"latent.vae={vae}", "semantic.kind=label", "semantic.encoder=words"]
    run = recipes.resolve(name, [f"data.source={photos}", *settings, "sample.tuned_at=null"])[0]
    run, some = opened(run, QUIET)
    assert isinstance(some, Live)
    visits = torch.arange(64)
    samples = some.take(torch.full((64,), 3), visits)
    assert len(samples.boxes.unique(dim=0)) == 64 and samples.flips.any()
    low, high = run.data.crop_scale
    height, width = samples.sizes[0].tolist()
    area = (samples.boxes[:, 2:] - samples.boxes[:, :2]).prod(1) * height * width / min(height, width) ** 2
    assert low - 1e-5 <= area.min() and area.max() <= high + 1e-5


def test_a_larger_folder_than_memory_trains(tmp_path, monkeypatch):
    folder_of_images(tmp_path / "images", {"a": 10, "b": 10}, size=20)
    monkeypatch.setattr(dataset, "IN_MEMORY", 0)
    start(tiny(tmp_path / "images", **{"data.flip": "true"}), tmp_path / "run", False, QUIET, lambda text: None)
    assert snapshot.stored(tmp_path / "run")


# Other aspects.


@pytest.mark.parametrize("aspect, size", [("1:1", (16, 16)), ("2:1", (22, 12)), ("1:2", (12, 22)), ("16:9", (22, 12))])
def test_samples_of_another_aspect_have_as_many_pixels(photos, tmp_path, aspect, size):
    run = tiny(photos, **{"net.patch": 2, "train.total_images": 8, "control.variables": "size,aspect"})
    start(run, tmp_path / "run", False, QUIET, lambda text: None)
    run, _ = config.resolve(config.as_tree(config.read(tmp_path / "run" / "run.yaml")), [f"sample.aspect={aspect}"])
    assert run.canvas == size[::-1]
    generate.draw(tmp_path / "run", run, Asked(seeds="0-1"), tmp_path / "made")
    assert sizes_of(tmp_path / "made") == [size] * 2


def test_rows_of_control_are_of_pictures_of_that_aspect(photos):
    run, _ = opened(tiny(photos, **{"control.variables": "size", "sample.aspect": "2:1"}), QUIET)
    rows = torch.tensor([[64.0, 40.0], [48.0, 96.0], [64.0, 40.0], [48.0, 100.0]])
    cond, _ = conditions.build(run, range(40), rows, labels=[0] * 40)
    assert {tuple(row) for row in cond.control_low.tolist()} == {(48.0, 96.0), (48.0, 100.0)}
    cond, _ = conditions.build(run, range(40), rows[::2], labels=[0] * 40)  # none is: any
    assert cond.control_low.unique(dim=0).tolist() == [[64.0, 40.0]]


def test_the_bucket_that_is_nearest():
    run = tiny("digits", **{"data.buckets": "[[16,16],[12,20],[20,12]]", "sample.aspect": "3:2"})
    assert run.canvas == (12, 20)
    with pytest.raises(UsageError, match=r"sample.aspect=wide: write width:height"):
        tiny("digits", **{"sample.aspect": "wide"})
