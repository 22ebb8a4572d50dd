"""What a source of images is, and lists of what sources hold, kept between runs.

Legend: N images. `where` is what the user wrote, a path or a name; names of images are relative to it.
"""

import abc
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from gesso import atomic_io
from gesso.config import Resize
from gesso.data.sources import decode
from gesso.errors import GessoError, UnreadableImageError, UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_LABEL = 999_999
LISTING_VERSION = 2
"""of the kept lists; another one is made anew"""
MIN_AGE_NS = 2 * 10**9
"""nanoseconds: what changed this recently may change again within one tick of its clock, so its list is not kept"""

RawImage = bytes | np.ndarray
FileStamps = dict[str, tuple[int, int]]


class SourceItem(NamedTuple):
    """One image as its source has it.

    image   an encoded file; or (H, W, C) uint8 (digits, shapes); or (2C, h, w) float32, the mean and std of latents
    label   0 where there are no classes
    caption empty where there is none
    size    height and width of the original, where `image` does not tell them
    """

    name: str
    image: RawImage
    label: int
    caption: str
    original_size: tuple[int, int] | None = None

    def decode(
        self, channels: int, min_edge: int | None = None, resize: Resize = "lanczos"
    ) -> tuple[Image.Image, tuple[int, int]]:
        """As pixels.decode, for the filter `resize`; what cannot be read has the name.

        Only lanczos takes JPEGs that the decoder reduced: adm and bicubic are defined on the full picture.
        """
        try:
            return decode.decode_image(
                self.image, channels, min_edge if resize == "lanczos" else None, upright=resize != "adm"
            )
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name, error.reason) from error


class Source(abc.ABC):
    """Images by index; nothing is decoded. Any thread may call `item` at any time.

    labels (N,) int64; class_names empty when there are no classes; notes are for the user, and captions may add to
    them when they are read; latents: items are latents.
    """

    has_latents = False

    def __init__(self, uri: str, labels: np.ndarray, class_names: Sequence[str] = (), notes: Iterable[str] = ()):
        self.uri, self.labels, self.class_names = uri, labels, tuple(class_names)
        self.notes = list(notes)
        self._captions: Sequence[str] | None = None
        self._caption_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """As it is on the disk, which need not be valid Unicode."""

    @abc.abstractmethod
    def encoded_size(self, i: int) -> int:
        """Size of the encoded image, or another number that changes with it. Does not read it."""

    @abc.abstractmethod
    def read(self, i: int) -> RawImage:
        """May raise OSError or Unreadable."""

    @abc.abstractmethod
    def read_captions(self) -> Sequence[str]:
        """All N."""

    def captions(self) -> Sequence[str]:
        """All N, empty where there is none; read once, without the images."""
        with self._caption_lock:
            if self._captions is None:
                self._captions = self.read_captions()
            return self._captions

    def caption(self, i: int) -> str:
        return self.captions()[i]

    def original_size(self, i: int) -> tuple[int, int] | None:
        return None

    def item(self, i: int) -> SourceItem:
        """Raises Unreadable for what is damaged, IndexError outside of 0 to N - 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        name = self.name(i).encode("utf-8", "backslashreplace").decode()
        try:
            return SourceItem(name, self.read(i), int(self.labels[i]), self.caption(i), self.original_size(i))
        except UnreadableImageError as error:
            raise UnreadableImageError(name, error.reason) from error
        except OSError as error:
            raise UnreadableImageError(name, error.strerror or " ".join(str(error).split())) from error

    def fingerprint(self) -> str:
        """16 hex digits of names, sizes, labels, classes and captions, not of pixels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, np.int64).tobytes())
        digest.update(json.dumps(self.class_names).encode())
        for i, caption in enumerate(self.captions()):
            digest.update(json.dumps([self.name(i), self.encoded_size(i), self.original_size(i), caption]).encode())
        return digest.hexdigest()[:16]


class StringArray(Sequence[str]):
    """Strings in two arrays: millions of them take little memory, and save and load at once."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> "StringArray":
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


Listing = dict[str, np.ndarray | StringArray]


def file_stamp(path: str) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def cached_listing(uri: str, kind: str, build: Callable[[FileStamps], Listing]) -> Listing:
    """What `make` lists at `where`, from the last time if nothing changed since.

    `make` puts the stamp of every file and folder that its list depends on into its argument, each before it looks
    inside. Lists lie in $XDG_CACHE_HOME/gesso, or ~/.cache/gesso; where that cannot be written they are made each time.
    """
    key = json.dumps([LISTING_VERSION, kind, os.path.abspath(uri)])
    file = atomic_io.cache_dir("lists") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    kept = _read_cached_listing(file)
    if kept is not None:
        return kept
    started, stamps = time.time_ns(), {}
    lists = build(stamps)
    if started - max(changed for _, changed in stamps.values()) > MIN_AGE_NS:
        _write_cached_listing(file, lists, stamps)
    return lists


def _read_cached_listing(file: Path) -> Listing | None:
    """The list of last time, if it still holds."""
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
    arrays = {}
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
    """The first few on one line, and how many more."""
    line = ", ".join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
        for name in names[:max_names]
    )
    return f"{line} and {len(names) - max_names} more" if len(names) > max_names else line


def decode_text(raw: bytes) -> tuple[str, bool]:
    """Text without white space around it, and whether it was UTF-8; what is not is replaced."""
    try:
        return raw.decode("utf-8-sig").strip(), True
    except UnicodeDecodeError:
        return raw.decode("utf-8-sig", "replace").strip(), False


def replace_surrogates(text: str) -> str:
    """JSON may escape halves of characters, which no file can hold."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").strip()


def caption_notes(uri: str, total: int, missing: int, not_utf8: int) -> list[str]:
    """`missing` of all: a source without captions, which needs no note."""
    notes = []
    if 0 < missing < total:
        notes.append(f"{missing} of {total} images in {uri} have no caption: theirs is empty")
    if not_utf8:
        notes.append(f"{not_utf8} of {total} captions in {uri} are not UTF-8: their odd bytes are replaced")
    return notes


def validate_labels(
    uri: str, values: Sequence, name: Callable[[int], str], num_classes: int | None = None
) -> np.ndarray:
    """(N,) int64. Raises UsageError when one is no whole number from 0, or beyond the named classes."""
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
    """Names of classes that have none."""
    return tuple(str(i) for i in range(int(labels.max()) + 1))


def labels_from_folders(
    uri: str, top_folder: np.ndarray, folders: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], list[str]]:
    """Which images are kept, their labels, class names and notes, where sub-folders are the classes.

    tops (N,) is the index in `folders` of the one that an image is in, at whatever depth; -1 is in none.
    """
    loose = int((top_folder < 0).sum())
    if not len(folders):
        if not loose:
            raise UsageError(f"data.source={uri}: no images there ({', '.join(IMAGE_SUFFIXES)}), and no sub-folders")
        return (
            np.arange(loose),
            np.zeros(loose, np.int64),
            (),
            [f"{uri} has no sub-folders: training without classes"],
        )
    counts = np.bincount(top_folder[top_folder >= 0], minlength=len(folders))
    empty = [name for name, count in zip(folders, counts, strict=True) if not count]
    if empty:
        raise UsageError(f"data.source={uri}: no image in class folder {format_names(empty, 5)}; fill it or remove it")
    kept = np.flatnonzero(top_folder >= 0)
    notes = [f"{loose} images beside the class folders of {uri} are left out"] if loose else []
    return kept, top_folder[kept], tuple(folders), notes
