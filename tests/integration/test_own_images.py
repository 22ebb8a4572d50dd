"""A new user's folder of photographs, in three commands that say what they used; held-out splits; replaced images."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import assert_refused
from PIL import Image

from gesso import config
from gesso.data.sources import decode
from gesso.evaluation import feature_stats
from gesso.evaluation.image_sets import open_image_set
from gesso.training.logging import read_log

RNG = np.random.default_rng(0)
TINY = [
    "net.hidden_size=32", "net.depth=1", "net.num_heads=2", "data.resolution=8", "train.total_images=32",
    "train.batch_size=16", "train.checkpoint_every=16", "train.snapshot_every=16", "train.num_threads=1",
    "sample.steps=2",
]  # fmt: skip


def picture(format: str = "JPEG", size: tuple[int, int] = (20, 28)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(autouse=True)
def temporary_folders(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)


def test_mixed_photos_in_three_commands(gesso, tmp_path, monkeypatch):
    """40 photographs with captions, HEIC, a corrupt file and one sub-folder: trained, sampled and evaluated."""
    monkeypatch.setattr(decode, "has_heif", lambda: False)
    files = {f"IMG_{i:02d}.jpg": picture() for i in range(20)} | {f"IMG_{i:02d}.txt": b"a photo" for i in range(15)}
    files |= {f"scan{i}.png": picture("PNG") for i in range(6)} | {f"new{i}.avif": picture("AVIF") for i in range(2)}
    files |= {f"phone{i}.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64) for i in range(4)}
    files |= {f"holiday/{i}.jpg": picture() for i in range(7)} | {"corrupt.jpg": picture()[:300]}
    files |= {"movie.mov": b"x", ".ipynb_checkpoints/IMG_00.jpg": picture(), "holiday/@eaDir/0.jpg": picture()}
    write(tmp_path / "my photos", files)

    refused = gesso("train", "folder:my photos", *TINY, "--out", "run")
    assert_refused(refused, "To train without them, add data.max_unreadable=0.03", code=1)
    command = ("train", "folder:my photos", *TINY, "data.max_unreadable=0.03", "--out", "run")
    code, out, err = gesso(*command)
    assert code == 0, err
    photos = f"{tmp_path}/my photos"
    used_and_not = [
        f"29 images of {photos} lie beside its sub-folders (holiday): all 36 are read, without classes",
        f"4 HEIC images in {photos} are not read: phone0.HEIC, phone1.HEIC, phone2.HEIC and 1 more; pip install",
        f"2 hidden or system folders in {photos} are not read: .ipynb_checkpoints/, holiday/@eaDir/",
        f"1 other files in {photos} are not read (1 .mov), such as 'movie.mov'",
        f"21 of 36 images in {photos} have no caption",
    ]
    for words in used_and_not:
        assert words in out, words
    assert "left out: corrupt.jpg" in out
    assert "training on" in out and ": 35 images, no classes, 15 captions, 1 unreadable files left out" in out
    assert "the captions are not used with semantic.kind=label; to train on them, add semantic.kind=text" in out

    code, out, err = gesso("sample", "run", "--seeds", "0-3")
    assert code == 0, err
    code, out, err = gesso("evaluate", "run")
    assert code == 0, err
    assert f"training images: 35 of {photos}" in out and "corrupt.jpg" in out
    for words in used_and_not:
        assert words in out, words

    code, out, err = gesso(*command[:-1], "text", "semantic.kind=text")
    assert code == 0 and "are not used" not in out, err


def split_photos(root: Path) -> Path:
    files = {f"train/{c}/{i}.png": picture("PNG") for c in ("cat", "dog") for i in range(8)}
    return write(root, files | {f"val/dog/{i}.png": picture("PNG") for i in range(3)})


def test_validation_on_a_held_out_split(gesso, tmp_path):
    """data.num_validation takes images of the split, none of training; the split can also be named."""
    photos = split_photos(tmp_path / "photos")
    monitor = ("monitor.validate_every=16", "monitor.validation_pairs=8")
    code, out, err = gesso("train", "folder:photos", *TINY, "data.num_validation=2", *monitor, "--out", "a")
    assert code == 0, err
    assert f"{photos} has splits: train is read (16 images); val (3) is held out" in out
    run = config.load_config(tmp_path / "a" / "run.yaml")
    assert run.data.num_images == 16 and run.data.class_names == ("cat", "dog")
    losses = [line["validation"]["weights"] for line in read_log(tmp_path / "a" / "log.jsonl") if "validation" in line]
    assert len(losses) >= 1 and np.isfinite(losses).all()
    named = (*TINY, "monitor.validation_source=photos#val", *monitor, "--out", "b")
    assert gesso("train", "folder:photos", *named)[0] == 0
    assert config.load_config(tmp_path / "b" / "run.yaml").monitor.validation_source == f"{photos}#val"
    for folder in ("a", "b"):
        code, out, err = gesso("evaluate", folder, "eval.metrics=loss", "eval.validation_pairs=8")
        assert code == 0, err
    code, out, err = gesso("train", "folder:photos#val", *TINY, "--out", "c")
    assert code == 0 and config.load_config(tmp_path / "c" / "run.yaml").data.num_images == 3, err
    assert gesso("train", "c", "--resume")[0] == 0


def overwrite(path: Path, data: bytes) -> None:
    """Write other bytes of the same size; the folder's own time stays."""
    assert len(data) == path.stat().st_size
    before = path.parent.stat()
    path.write_bytes(data)
    os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("crops", [(), ("data.crop_scale=.4,1",)])
def test_a_run_over_replaced_images_is_not_resumed(gesso, tmp_path, crops):
    """In memory and decoded during training; a copy with other modification times is the same images."""
    photos = write(tmp_path / "photos", {f"{i}.bmp": picture("BMP") for i in range(6)})
    for path in photos.iterdir():
        os.utime(path, (1e9, 1e9))
    assert gesso("train", "folder:photos", *TINY, *crops, "--out", "run")[0] == 0
    for path in photos.iterdir():
        os.utime(path)
    assert gesso("train", "run", "--resume")[0] == 0
    overwrite(photos / "3.bmp", picture("BMP"))
    code, _, err = gesso("train", "run", "train.total_images=64", "--resume")
    assert code == 2 and "contains another run" in err and "data.fingerprint" in err
    assert_refused(gesso("evaluate", "run"), "are not those that run was trained on")


def test_replaced_images_have_other_reference_statistics(tmp_path):
    """An FID against statistics of images that were overwritten in place was 691 where 0 is right."""
    photos = write(tmp_path / "photos", {f"{i}.bmp": picture("BMP") for i in range(4)})
    network = torch.nn.Linear(2, 2)
    network.name = "linear"

    def cache_path() -> Path:
        return feature_stats.reference_cache_path(open_image_set(str(photos)), network, False)

    first = cache_path()
    assert cache_path() == first
    overwrite(photos / "2.bmp", picture("BMP"))
    assert cache_path() != first


def test_unreadable_reference_images(tmp_path):
    """Of the run's own images some may be unreadable; of a named reference none."""
    files = {f"{i}.png": picture("PNG") for i in range(4)} | {"1.png": b"\x89PNG\r\n\x1a\n damaged"}
    images = open_image_set(str(write(tmp_path, files)), 8, max_unreadable=0.25)
    (batch,) = images.batches(4)
    assert len(batch) == 4 and batch[1].equal(batch[2]) and not batch[0].equal(batch[1])
    assert "1 unreadable images of" in images.notes()[-1] and "1.png" in images.notes()[-1]
