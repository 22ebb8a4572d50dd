"""Interface of image sources, and the listings of their files, stored between runs.

Legend: N images. `uri` is the setting as typed, a path or a name; names of images are relative to it.
"""

import abc
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gesso import atomic_io
from gesso.config import Resize
from gesso.data.sources import decode
from gesso.errors import GessoError, UnreadableImageError, UsageError

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jpe", ".jfif", ".avif", ".jp2",
    ".j2k",
)  # fmt: skip
MAX_LABEL = 999_999
WITHOUT_CLASSES = "training without classes"
"""End of a note, which matters to training only."""
MAX_HASHED_IMAGES = 1024
"""Number of images whose bytes tell whether the images of a source were replaced."""
LISTING_VERSION = 3
"""Version of stored listings; others are rebuilt."""
MIN_AGE_NS = 2 * 10**9
"""Nanoseconds: a newer file may change again within one clock tick, so its listing is not stored."""

RawImage = bytes | np.ndarray
FileStamps = dict[str, tuple[int, int]]


class SourceItem(NamedTuple):
    """One image of a source.

    image         an encoded file; or (H, W, C) uint8 (digits, shapes); or (2C, h, w) float32, mean and std of latents
    label         0 without classes
    caption       empty if there is none
    original_size height and width of the original, if `image` does not tell them
    """

    name: str
    image: RawImage
    label: int
    caption: str
    original_size: tuple[int, int] | None = None

    def decode(
        self, channels: int, min_edge: int | None = None, resize: Resize = "lanczos"
    ) -> tuple[Image.Image, tuple[int, int]]:
        """Decode as `decode.decode_image` for the filter `resize`; errors contain the name.

        Only lanczos uses reduced JPEG decoding: adm and bicubic are defined on the full image.
        """
        try:
            return decode.decode_image(
                self.image, channels, min_edge if resize == "lanczos" else None, upright=resize != "adm"
            )
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name, error.reason) from error


class Source(abc.ABC):
    """Undecoded images by index. `item` is thread-safe.

    labels: (N,) int64. class_names: empty without classes. notes: messages for the user; reading captions may add some.
    has_latents: items are latents. held_out: sources of the validation and test splits beside the training images.
    """

    has_latents = False
    held_out: tuple[str, ...] = ()

    def __init__(self, uri: str, labels: np.ndarray, class_names: Sequence[str] = (), notes: Iterable[str] = ()):
        self.uri, self.labels, self.class_names = uri, labels, tuple(class_names)
        self.notes = list(notes)
        self._captions: Sequence[str] | None = None
        self._caption_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Return the name as it is on the disk, which need not be valid Unicode."""

    @abc.abstractmethod
    def encoded_size(self, i: int) -> int:
        """Return the size of the encoded image, or another number that changes with it, without reading it."""

    @abc.abstractmethod
    def read(self, i: int) -> RawImage:
        """Return the image. Raises OSError or UnreadableImageError."""

    @abc.abstractmethod
    def read_captions(self) -> Sequence[str]:
        """Return all N captions."""

    def captions(self) -> Sequence[str]:
        """Return all N captions, empty if there is none; read once, without the images."""
        with self._caption_lock:
            if self._captions is None:
                self._captions = self.read_captions()
            return self._captions

    def caption(self, i: int) -> str:
        """Return one caption."""
        return self.captions()[i]

    def original_size(self, i: int) -> tuple[int, int] | None:
        """Return height and width of the original if the encoded image does not tell them, else None."""
        return None

    def item(self, i: int) -> SourceItem:
        """Return one image. Raises UnreadableImageError for a damaged one, IndexError outside of 0 to N - 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        name = self.name(i).encode("utf-8", "backslashreplace").decode()
        try:
            return SourceItem(name, self.read(i), int(self.labels[i]), self.caption(i), self.original_size(i))
        except UnreadableImageError as error:
            raise UnreadableImageError(name, error.reason) from error
        except OSError as error:
            raise UnreadableImageError(name, error.strerror or " ".join(str(error).split())) from error

    def stamp(self) -> str:
        """Return text that changes with the size or modification time of any file; "" if `fingerprint` has the pixels.

        Copies of the same images have other stamps: it is a key of caches, not the identity of the images.
        """
        return ""

    def content_hash(self) -> str:
        """Return 16 hex digits of the bytes of MAX_HASHED_IMAGES images, spread evenly; "" if `stamp` is empty."""
        if not self.stamp():
            return ""
        digest, count = hashlib.sha256(), min(len(self), MAX_HASHED_IMAGES)
        with ThreadPoolExecutor() as pool:
            for part in pool.map(self._hash_image, ((2 * k + 1) * len(self) // (2 * count) for k in range(count))):
                digest.update(part)
        return digest.hexdigest()[:16]

    def _hash_image(self, i: int) -> bytes:
        try:
            image = self.read(i)
            return hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).digest()
        except (OSError, UnreadableImageError):
            return bytes(32)

    def fingerprint(self) -> str:
        """Return 16 hex digits of names, sizes, labels, classes and captions, not of pixels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, np.int64).tobytes())
        digest.update(json.dumps(self.class_names).encode())
        for i, caption in enumerate(self.captions()):
            digest.update(json.dumps([self.name(i), self.encoded_size(i), self.original_size(i), caption]).encode())
        return digest.hexdigest()[:16]


class StringArray(Sequence[str]):
    """Sequence of strings in two arrays: millions of them take little memory and are saved and loaded quickly."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> "StringArray":
        """Build the array from strings."""
        parts = [text.encode("utf-8", "surrogatepass") for text in strings]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return self.blob[start : self.ends[i]].tobytes().decode("utf-8", "surrogatepass")


Listing = dict[str, Any]
"""Arrays (np.ndarray) and strings (StringArray) by name."""


def file_stamp(path: str) -> tuple[int, int]:
    """Return size and modification time of a file."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def cached_listing(uri: str, kind: str, build: Callable[[FileStamps], Listing]) -> Listing:
    """Return the listing of `uri` that `build` makes, or the stored one if nothing has changed since.

    `build` adds the stamp of every file and folder that its listing depends on to its argument, before it reads them.
    Listings are stored in $XDG_CACHE_HOME/gesso or ~/.cache/gesso; if that is not writable, they are built each time.
    """
    key = json.dumps([LISTING_VERSION, kind, os.path.abspath(uri)])
    file = atomic_io.cache_dir("lists") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    stored = _read_cached_listing(file)
    if stored is not None:
        return stored
    started, stamps = time.time_ns(), FileStamps()
    lists = build(stamps)
    if started - max(changed for _, changed in stamps.values()) > MIN_AGE_NS:
        _write_cached_listing(file, lists, stamps)
    return lists


def _read_cached_listing(file: Path) -> Listing | None:
    """Return the stored listing if it is still valid."""
    try:
        with open(file, "rb") as handle, np.load(handle, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        stamps = arrays.pop("stamps")
        ends = [name.removesuffix(".ends") for name in arrays if name.endswith(".ends")]
        lists: Listing = {
            name: StringArray(arrays.pop(f"{name}.blob"), arrays.pop(f"{name}.ends")) for name in ends
        } | arrays
        paths = lists.pop("paths")
        if all(file_stamp(path) == tuple(then) for path, then in zip(paths, stamps.tolist(), strict=True)):
            return lists
    except Exception:  # no list, a damaged one, or what it lists is gone: it is made anew
        pass
    return None


def _write_cached_listing(file: Path, listing: Listing, stamps: FileStamps) -> None:
    arrays: dict[str, Any] = {}
    for name, values in (listing | {"paths": StringArray.from_strings(stamps)}).items():
        if isinstance(values, StringArray):
            arrays |= {f"{name}.blob": values.blob, f"{name}.ends": values.ends}
        else:
            arrays[name] = values
    try:
        with atomic_io.atomic_file(file) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, stamps=np.array(list(stamps.values()), np.int64), **arrays)
    except (GessoError, OSError):
        pass  # read-only or full: the list is made again next time


def format_names(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first few names on one line, and the number of others."""
    line = ", ".join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
        for name in names[:max_names]
    )
    return f"{line} and {len(names) - max_names} more" if len(names) > max_names else line


def relative_names(paths: Sequence[str]) -> list[str]:
    """Return the names of files in one folder, or their paths relative to the folder that holds all."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.relpath(os.path.abspath(path), folder) for path in paths]


def decode_text(raw: bytes) -> tuple[str, bool]:
    """Return text without surrounding white space, and whether it is UTF-8; invalid bytes are replaced."""
    try:
        return raw.decode("utf-8-sig").strip(), True
    except UnicodeDecodeError:
        return raw.decode("utf-8-sig", "replace").strip(), False


def hash_stamps(stamps: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Return 16 hex digits of the names, sizes and modification times (ns) of files."""
    digest = hashlib.sha256()
    for name, stamp in stamps:
        digest.update(json.dumps([name, *stamp]).encode())
    return digest.hexdigest()[:16]


def replace_surrogates(text: str) -> str:
    """Return text without surrogates, which JSON may contain and no file can hold."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").strip()


def caption_notes(uri: str, total: int, missing: int, not_utf8: int) -> list[str]:
    """Return notes on missing and invalid captions; none if all are missing."""
    notes = []
    if 0 < missing < total:
        notes.append(f"{missing} of {total} images in {uri} have no caption: theirs is empty")
    if not_utf8:
        notes.append(f"{not_utf8} of {total} captions in {uri} are not UTF-8: their odd bytes are replaced")
    return notes


def validate_labels(
    uri: str, values: Sequence, name: Callable[[int], str], num_classes: int | None = None
) -> np.ndarray:
    """Return labels (N,) int64. Raises UsageError unless all are integers from 0, within the named classes."""
    largest = MAX_LABEL if num_classes is None else num_classes - 1
    wrong = [i for i, value in enumerate(values) if type(value) is not int or not 0 <= value <= largest]
    if wrong:
        first = format_names([f"{values[i]!r} of {name(i)}" for i in wrong])
        raise UsageError(
            f"data.source={uri}: {len(wrong)} of {len(values)} labels are wrong ({first}); "
            f"a label is a whole number from 0 to {largest}"
        )
    return np.array(values, np.int64)


def numbered_class_names(labels: np.ndarray) -> tuple[str, ...]:
    """Return the class numbers as names."""
    return tuple(str(i) for i in range(int(labels.max()) + 1))
