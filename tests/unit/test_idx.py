"""IDX files of the MNIST family, plain and gzip."""

import gzip
import os

import numpy as np
import pytest
from helpers.idx import FASHION_MNIST, IMAGES, LABELS, write_idx

from gesso.config import DataConfig
from gesso.data.factory import open_dataset
from gesso.data.sources.idx import FASHION_MNIST_CLASSES
from gesso.data.sources.registry import open_source
from gesso.errors import UsageError


@pytest.mark.parametrize("gz", [False, True])
def test_pixels_and_labels_are_those_of_the_file(tmp_path, gz):
    source = open_source(write_idx(tmp_path / "a", gz=gz))
    assert len(source) == 7 and source.labels.tolist() == LABELS.tolist() and source.class_names == ("0", "1", "2")
    assert all(np.array_equal(source.item(i).image[..., 0], IMAGES[i]) for i in range(7)) and source.notes == []
    dataset = open_dataset(DataConfig(source=str(tmp_path / "a"), resolution=28, channels=1))
    assert np.array_equal(dataset.pixels[:, 0].numpy(), IMAGES)


def test_a_folder_with_test_images_reads_the_training_images(tmp_path):
    folder = write_idx(tmp_path / "a")
    write_idx(folder, "t10k", images=IMAGES[:3], labels=LABELS[:3])
    source = open_source(folder)
    assert len(source) == 7 and len(source.notes) == 1
    assert f"monitor.validation_source={folder}/t10k-images-idx3-ubyte" in source.notes[0]
    test = open_source(f"{folder}/t10k-images-idx3-ubyte")
    assert len(test) == 3 and test.fingerprint() != source.fingerprint()


def test_changed_pixels_change_the_fingerprint(tmp_path):
    changed = IMAGES.copy()
    changed[3, 4, 5] ^= 1
    first, second = write_idx(tmp_path / "a"), write_idx(tmp_path / "b", images=changed)
    assert open_source(first).fingerprint() != open_source(second).fingerprint()


def test_without_labels_there_are_no_classes(tmp_path):
    folder = write_idx(tmp_path / "a")
    os.remove(folder / "train-labels-idx1-ubyte")
    source = open_source(folder)
    assert source.class_names == () and "without classes" in source.notes[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw[:-1], "is damaged"),
        (lambda raw: raw + b"x", "is damaged"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "not an IDX file of unsigned bytes"),
        (lambda raw: raw[:6], "not an IDX file"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "the limit is"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message):
    folder = write_idx(tmp_path / "a")
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match=message) as caught:
        open_source(folder)
    assert str(path) in str(caught.value)


def test_numbers_of_images_and_labels_must_match(tmp_path):
    with pytest.raises(UsageError, match=r"7 images in .* but 6 labels"):
        open_source(write_idx(tmp_path / "a", labels=LABELS[:6]))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Fashion-MNIST beside the repository")
def test_fashion_mnist():
    source = open_source(FASHION_MNIST)
    assert len(source) == 60_000 and source.class_names == FASHION_MNIST_CLASSES
    assert np.bincount(source.labels).tolist() == [6000] * 10 and source.caption(0) == "ankle boot"
    assert len(open_source(FASHION_MNIST / "t10k-images-idx3-ubyte.gz")) == 10_000
