"""IDX files, the format of MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST): gzip or plain."""

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gesso import untrusted
from gesso.data.sources.base import Source, format_names, numbered_class_names
from gesso.errors import UsageError

IMAGE_FILE = re.compile(r"(?P<split>.*?)-?images[.-]idx3-ubyte(\.gz)?")
MAX_BYTES = 2**31
"""Maximum number of bytes of the pixels of one file."""
FASHION_MNIST_LABELS = (
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
)
"""SHA-256 of the labels (N,) uint8 of its training and test set, by which class names are known."""
FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class IdxSource(Source):
    """Grey images of one IDX file, (H, W, 1) uint8, held in memory; labels are read from the file beside it.

    Args:
        uri: The images file (train-images-idx3-ubyte.gz), or a folder with one. In a folder with several, the training
            images are read and the others reported.

    Raises:
        UsageError: A file is missing, damaged, too large, or not IDX, or labels and images do not match.
    """

    def __init__(self, uri: str):
        path, notes = _choose_file(uri) if os.path.isdir(uri) else (uri, [])
        self.pixels = read_idx(uri, path, 3)
        labels_path = _labels_path(uri, path)
        if labels_path is None:
            labels = np.zeros(len(self.pixels), np.int64)
            class_names: tuple[str, ...] = ()
            notes.append(f"no labels file beside {path}: training without classes")
        else:
            raw = read_idx(uri, labels_path, 1)
            if len(raw) != len(self.pixels):
                raise UsageError(
                    f"data.source={uri}: {len(self.pixels)} images in {path}, but {len(raw)} labels in {labels_path}"
                )
            labels = raw.astype(np.int64)
            is_fashion = hashlib.sha256(raw.tobytes()).hexdigest() in FASHION_MNIST_LABELS
            class_names = FASHION_MNIST_CLASSES if is_fashion else numbered_class_names(labels)
        super().__init__(uri, labels, class_names, notes)

    def name(self, i: int) -> str:
        """Return the index as text."""
        return str(i)

    def encoded_size(self, i: int) -> int:
        """Return the CRC-32 of the pixels, which are as many for every image."""
        return zlib.crc32(self.pixels[i].tobytes())

    def read(self, i: int) -> np.ndarray:
        """Return the pixels (H, W, 1) uint8."""
        return self.pixels[i, :, :, None]

    def read_captions(self) -> Sequence[str]:
        """Return the class names as captions, empty without classes."""
        return [self.class_names[label] if self.class_names else "" for label in self.labels]


def idx_files(names: Sequence[str]) -> list[str]:
    """Return the names that are IDX image files."""
    return [name for name in names if IMAGE_FILE.fullmatch(name)]


def read_idx(uri: str, path: str, num_dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzip.

    Args:
        uri: The source, for messages.
        path: The file.
        num_dims: Expected number of dimensions; 3 for images (N, H, W), 1 for labels (N,).
    """
    try:
        with open(untrusted.open_regular(Path(path)), "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else open(path, "rb") as file:
            header = file.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims or header[:4] != bytes([0, 0, 8, num_dims]):
                raise UsageError(
                    f"data.source={uri}: {path} is not an IDX file of unsigned bytes with {num_dims} dimensions"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            size = int(np.prod(shape, dtype=object))
            if not 0 < size <= MAX_BYTES:
                raise UsageError(f"data.source={uri}: {path} declares {size:,} bytes; the limit is {MAX_BYTES:,}")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(f"data.source={uri}: {path} cannot be read ({error}); download it again") from None
    if len(data) != size:
        raise UsageError(f"data.source={uri}: {path} is damaged: its header declares {size:,} bytes; download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _choose_file(folder: str) -> tuple[str, list[str]]:
    """Return the file of training images in a folder, and a note on the others."""
    names = idx_files(sorted(os.listdir(folder)))
    training = [name for name in names if name.startswith("train")] or names
    if len(training) > 1 and not names[0].startswith("train"):
        raise UsageError(f"data.source={folder}: name one of its files: {format_names(training, 5)}")
    others = [name for name in names if name != training[0]]
    notes = []
    if others:
        notes = [f"{folder}: not read: {format_names(others)}; use as monitor.validation_source={folder}/{others[0]}"]
    return os.path.join(folder, training[0]), notes


def _labels_path(uri: str, path: str) -> str | None:
    """Return the labels file of an images file, None if there is none."""
    folder, name = os.path.split(path)
    if not IMAGE_FILE.fullmatch(name):
        raise UsageError(f"data.source={uri}: an IDX file of images is named like train-images-idx3-ubyte.gz")
    labels = re.sub(r"images([.-])idx3", r"labels\1idx1", name).removesuffix(".gz")
    paths = [os.path.join(folder, labels + suffix) for suffix in (".gz", "")]
    return next((path for path in paths if os.path.isfile(path)), None)
