"""Sources of images: what is read, what is refused, and that a sample depends on its counter alone."""

import numpy as np
import pytest
import torch
from helpers.images import write_image_folders
from helpers.run_factory import tiny_run
from PIL import Image

from gesso.config import DataConfig, LatentConfig
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset, with_dataset_info
from gesso.data.normalization import Normalizer
from gesso.errors import RunError, UsageError


def load(path, **settings):
    return open_dataset(DataConfig(source=str(path), resolution=8, **settings))


def test_digits():
    loaded = open_dataset(DataConfig(source="digits", resolution=8, channels=1))
    assert loaded.pixels.shape == (1797, 1, 8, 8) and loaded.pixels.dtype == torch.uint8
    assert loaded.class_names == tuple("0123456789")
    assert loaded.pixels.max() == 255 and loaded.pixels.min() == 0
    assert torch.bincount(loaded.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_of_another_shape():
    for resolution, channels in ((4, 1), (8, 3)):
        with pytest.raises(UsageError, match="grey 8x8"):
            open_dataset(DataConfig(source="digits", resolution=resolution, channels=channels))
    assert open_dataset(DataConfig(source="digits", resolution=16, channels=1)).pixels.shape == (
        1797,
        1,
        16,
        16,
    )  # enlarged


def test_folder_is_sorted_and_labelled(tmp_path):
    write_image_folders(tmp_path, {"b": 3, "a": 2})
    loaded = load(tmp_path)
    assert loaded.class_names == ("a", "b")
    assert loaded.labels.tolist() == [0, 0, 1, 1, 1]
    assert loaded.pixels.shape == (5, 3, 8, 8)
    again = load(tmp_path)
    assert again.fingerprint() == loaded.fingerprint()


def test_fingerprint_sees_pixels_and_labels(tmp_path):
    write_image_folders(tmp_path, {"a": 2, "b": 2})
    before = load(tmp_path).fingerprint()
    (tmp_path / "a" / "0.png").rename(tmp_path / "b" / "9.png")
    assert load(tmp_path).fingerprint() != before


def test_flat_folder_trains_without_classes(tmp_path):
    write_image_folders(tmp_path, {".": 3})
    loaded = load(tmp_path)
    assert loaded.class_names == () and "without classes" in loaded.notes[0]


def test_images_outside_class_folders_are_reported(tmp_path):
    write_image_folders(tmp_path, {"a": 2, ".": 1})
    loaded = load(tmp_path)
    assert len(loaded) == 3 and loaded.class_names == ()
    assert "1 images of" in loaded.notes[0] and f"data.source={tmp_path}#classes reads" in loaded.notes[0]
    classes = load(f"{tmp_path}#classes")
    assert len(classes) == 2 and classes.class_names == ("a",)
    assert "1 images beside the class folders" in classes.notes[0]


def test_nested_and_odd_names(tmp_path):
    write_image_folders(tmp_path, {"cats/deep/er": 2, "déjà vu [x]": 1})
    assert load(tmp_path).class_names == ("cats", "déjà vu [x]")
    assert len(load(tmp_path)) == 3


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda p: None, "no images there"),
        (lambda p: (p / "a").mkdir(), "its sub-folders are empty: a"),
        (lambda p: (p / "notes.txt").write_text("x"), "no images there"),
    ],
)
def test_folders_without_images(tmp_path, prepare, words):
    prepare(tmp_path)
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


def test_no_folder():
    with pytest.raises(UsageError, match="there is no such folder"):
        load("/nowhere/at/all")
    with pytest.raises(UsageError, match="which images"):
        load("")


def test_a_corrupt_image_is_left_out_and_named(tmp_path):
    write_image_folders(tmp_path, {"a": 150})
    full = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(full[: len(full) // 2])
    loaded = load(tmp_path)
    assert len(loaded) == 149
    assert loaded.unreadable[0][0] == "a/0.png"


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_too_many_unreadable(tmp_path, content):
    write_image_folders(tmp_path, {"a": 20})
    (tmp_path / "a" / "broken.png").write_bytes(content)
    with pytest.raises(RunError, match=r"1 of 21 images .* over the 1.0%") as caught:
        load(tmp_path)
    assert "a/broken.png" in str(caught.value)
    assert len(load(tmp_path, max_unreadable=0.05)) == 20


def test_one_flat_colour(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x.png")
    loaded = load(tmp_path)
    with pytest.raises(RunError, match="channel 0 of 3 has one value in all 1 images"):
        with_dataset_info(DataConfig(source=str(tmp_path)), loaded)


def save(array, path, mode=None):
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)


def test_colour_modes(tmp_path):
    """Grey, palette, alpha, 16 bit and CMYK give the colours that a viewer shows."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(rgb)
    picture.save(tmp_path / "0rgb.png")
    picture.quantize(256).save(tmp_path / "1palette.png")
    grey = picture.convert("L")
    grey.save(tmp_path / "2grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "3sixteen.png")
    alpha = np.dstack([rgb, np.zeros((8, 8), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "4alpha.png")
    loaded = load(tmp_path).pixels
    assert loaded[0].permute(1, 2, 0).numpy().tolist() == rgb.tolist()
    assert (loaded[1].int() - loaded[0].int()).abs().max() <= 1
    assert loaded[2].equal(loaded[3])
    assert loaded[2][0].numpy().tolist() == np.asarray(grey).tolist()
    assert loaded[4].eq(255).all()  # transparent shows white
    assert load(tmp_path, channels=1).pixels.shape == (5, 1, 8, 8)


def test_exif_rotation(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(rgb).save(tmp_path / "x.png", exif=exif)
    upright = load(tmp_path).pixels[0].permute(1, 2, 0).numpy()
    assert upright.tolist() == np.rot90(rgb, k=-1).tolist()


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 40), (5, 7), (8, 8), (3000, 17)])
def test_centre_crop_after_resize_of_the_shorter_edge(tmp_path, size):
    """A horizontal ramp stays centred: the crop's mean is the middle grey."""
    width, height = size
    ramp = np.tile(np.linspace(0, 255, width)[None, :, None], (height, 1, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    pixels = load(tmp_path).pixels
    assert pixels.shape == (1, 3, 8, 8)
    assert abs(pixels.double().mean().item() - 127) < 6


def test_standardized_and_back(tmp_path):
    write_image_folders(tmp_path, {"a": 30})
    loaded = load(tmp_path)
    data = with_dataset_info(DataConfig(source=str(tmp_path), resolution=8), loaded)
    for sd in (0.5, 1.0):
        space = Normalizer(data, LatentConfig(), sd, "cpu")
        x0 = space.to_x0(loaded.pixels, 0, torch.arange(30), torch.float64)
        assert x0.mean((0, 2, 3)).abs().max() < 1e-9
        torch.testing.assert_close(x0.std((0, 2, 3), correction=0), torch.full((3,), sd, dtype=torch.float64))
        assert space.x0_to_pixels(x0).equal(loaded.pixels)
        assert space.x0_to_pixels(x0 * 100).float().isfinite().all()


def batches(flip=False, seed=0):
    run = tiny_run(**{"data.flip": str(flip).lower(), "train.seed": seed})
    loaded = open_dataset(run.data)
    run = run.model_copy(update={"data": with_dataset_info(run.data, loaded)})
    return Batcher(loaded, run, 0.5, torch.device("cpu")), loaded


def test_a_sample_depends_on_its_counter_alone():
    make, _ = batches(flip=True)
    counter = torch.arange(1700, 1900)  # across the end of an epoch
    x0, cond = make(counter)
    for part in counter.split(37):
        y0, other = make(part)
        at = part - 1700
        assert (
            y0.equal(x0[at]) and other.label.equal(cond.label[at]) and other.has_semantic.equal(cond.has_semantic[at])
        )


def test_an_epoch_sees_every_image_once():
    make, loaded = batches()
    x0, cond = make(torch.arange(1797))
    key = lambda t: sorted(t.flatten(1).sum(1).tolist())  # noqa: E731
    assert key(x0) == key(make.normalizer.to_x0(loaded.pixels, 0, torch.arange(1797)))
    assert torch.bincount(cond.label).equal(torch.bincount(loaded.labels))


def test_flips_and_dropped_labels_have_their_rates():
    make, _ = batches(flip=True)
    counter = torch.arange(5000)
    x0, cond = make(counter)
    straight, _ = batches()[0](counter)
    flipped = (x0 != straight).flatten(1).any(1)
    assert x0[flipped].equal(straight[flipped].flip(3))
    assert abs(flipped.double().mean() - 0.5) < 0.03
    assert abs((~cond.has_semantic).double().mean() - 0.1) < 0.02
