"""Images in zips and tars: an index of offsets, then reads by offset. Nothing is unpacked.

Legend: N images.
"""

import functools
import io
import os
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gesso import untrusted
from gesso.data.sources import decode, layout
from gesso.data.sources.base import (
    IMAGE_SUFFIXES,
    MAX_LABEL,
    FileStamps,
    Listing,
    RawImage,
    Source,
    StringArray,
    cached_listing,
    caption_notes,
    decode_text,
    file_stamp,
    format_names,
    hash_stamps,
    numbered_class_names,
    relative_names,
)
from gesso.data.sources.metadata import json_caption
from gesso.errors import UnreadableImageError, UsageError

MAX_OPEN_FILES = 64
"""Maximum number of open files per source."""
TAR_BLOCK = 512
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags of open: Windows has no O_CLOEXEC, and reads text without O_BINARY."""


class FileHandle:
    """A file that any thread can read at any offset; closed with the last reference."""

    def __init__(self, descriptor: int):
        self.descriptor, self.lock = descriptor, threading.Lock()

    def __del__(self):
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`. Raises UnreadableImageError if the file is shorter or they are too many."""
        if size > untrusted.MAX_ITEM_BYTES:
            raise UnreadableImageError("", f"it has more than {untrusted.MAX_ITEM_BYTES / 2**20:g} MiB")
        if offset < 0:
            data = b""
        elif hasattr(os, "pread"):
            data = os.pread(self.descriptor, size, offset)
        else:  # Windows
            with self.lock:
                os.lseek(self.descriptor, offset, os.SEEK_SET)
                data = os.read(self.descriptor, size)
        if len(data) < size:
            raise UnreadableImageError("", "its file is shorter than when it was listed")
        return data


def make_handle_cache():
    """Return a function path -> FileHandle that keeps the latest files open."""
    return functools.lru_cache(MAX_OPEN_FILES)(lambda path: FileHandle(os.open(path, READ_FLAGS)))


class ZipSource(Source):
    """Images, or latents as EDM2 stores them, in a zip, arranged as `layout.find_layout` describes.

    dataset.json {"labels": [[name, int], ...] or null} defines the classes; without it, the top-level folders do.
    Entries may be deflated.

    Args:
        uri: The setting, PATH or PATH#PART.
        path: The zip.
        part: One of layout.PARTS.

    Raises:
        UsageError: It is no zip, has no images or unsafe names, or labels are invalid.
    """

    def __init__(self, uri: str, path: str, part: str | None = None):
        kind = f"zip {uri} {decode.has_heif()}"
        listing = cached_listing(path, kind, lambda stamps: _list_zip(uri, path, part, stamps))
        super().__init__(uri, listing["labels"], listing["classes"], listing["notes"])
        self.path, self.names, self.locations = path, listing["names"], listing["places"]
        self.texts, self.held_out = listing["captions"], tuple(listing["held_out"])
        self.has_latents = self.names[0].endswith(".npy")
        self.open_handle = make_handle_cache()

    def name(self, i: int) -> str:
        """Return the name of the entry."""
        return self.names[i]

    def encoded_size(self, i: int) -> int:
        """Return the size of the entry."""
        return int(self.locations[i, 2])

    def stamp(self) -> str:
        """Return a hash of size and modification time of the zip."""
        return hash_stamps([("zip", file_stamp(self.path))])

    def read_captions(self) -> Sequence[str]:
        """Return all captions."""
        return self.texts

    def read(self, i: int) -> RawImage:
        """Return the encoded image, or latents."""
        offset, packed, size, method, crc = self.locations[i].tolist()
        if size > untrusted.MAX_ITEM_BYTES:
            raise UnreadableImageError("", f"it has more than {untrusted.MAX_ITEM_BYTES / 2**20:g} MiB")
        handle = self.open_handle(self.path)
        head = handle.read(offset, 30)
        if head[:4] != b"PK\3\4":
            raise UnreadableImageError("", "no entry of the zip begins where its list says")
        data = handle.read(offset + 30 + sum(struct.unpack("<2H", head[26:30])), packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error as error:
                raise UnreadableImageError("", f"damaged in the zip: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise UnreadableImageError("", "damaged in the zip: its checksum is another")
        return parse_latents(data) if self.has_latents else data


def parse_latents(data: bytes) -> np.ndarray:
    """Return latents (2C, h, w) float32."""
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # whatever a damaged header leads to
        raise UnreadableImageError("", f"no numpy array: {' '.join(str(error).split())}") from error
    if values.ndim != 3 or len(values) % 2 or values.dtype != np.float32 or not np.isfinite(values).all():
        raise UnreadableImageError("", f"not finite float32 (2C, h, w): {values.dtype} {values.shape}")
    return values


def _list_zip(uri: str, path: str, part: str | None, stamps: FileStamps) -> Listing:
    stamps[os.path.abspath(path)] = file_stamp(path)
    try:
        with untrusted.open_zip(path) as archive:
            infos = archive.infolist()
            entries = {entry.filename: entry for entry in infos if not entry.is_dir()}
            _check_entries(uri, entries, sum(not entry.is_dir() for entry in infos))
            arranged = layout.find_layout(_zip_tree(uri, archive, infos), part)
            odd = [n for n in arranged.names if entries[n].compress_type not in PACKINGS or entries[n].flag_bits & 1]
            if odd:
                raise UsageError(
                    f"data.source={uri}: encrypted, or not packed by deflate: {format_names(odd)}; use zip -0"
                )
            captions, notes = _zip_captions(uri, archive, arranged)
    except (OSError, *untrusted.ZIP_ERRORS) as error:
        raise UsageError(f"data.source={uri}: no zip that can be read, or one cut short ({error})") from None
    chosen = [entries[name] for name in arranged.names]
    places = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in chosen]
    return {
        "names": StringArray.from_strings(arranged.names),
        "places": np.array(places, np.int64),
        "labels": arranged.labels,
        "classes": StringArray.from_strings(arranged.class_names),
        "captions": StringArray.from_strings(captions),
        "held_out": StringArray.from_strings(arranged.held_out),
        "notes": StringArray.from_strings(arranged.notes + notes),
    }


def _check_entries(uri: str, entries: Iterable[str], total: int) -> None:
    """Raise UsageError for names that point outside of the zip or are in it twice; `total` counts all files."""
    names = list(entries)
    hostile = [n for n in names if n.startswith("/") or "\\" in n or ":" in n[:2] or ".." in n.split("/")]
    if hostile:
        raise UsageError(
            f"data.source={uri}: refused, for names in it point outside of it ({format_names(hostile)}): "
            "make the zip anew from within its folder"
        )
    if total > len(names):
        raise UsageError(f"data.source={uri}: {total - len(names)} names are in it twice; make the zip anew")


def _zip_tree(uri: str, archive: zipfile.ZipFile, infos: Iterable[zipfile.ZipInfo]) -> layout.FileTree:
    """Return the files of a zip without hidden and system files."""
    names, hidden, folders = list[str](), set[str](), set[str]()
    for info in infos:
        parts = info.filename.rstrip("/").split("/")
        first = next((n for n, part in enumerate(parts) if layout.is_hidden(part)), None)
        if first is not None:
            is_folder = first < len(parts) - 1 or info.is_dir()
            hidden.add("/".join(parts[: first + 1]) + "/" * is_folder)
            continue
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + info.is_dir()))
        names += [] if info.is_dir() else [info.filename]

    def read(name: str, count: int) -> bytes:
        with archive.open(name) as file:
            return file.read(count)

    names.sort(key=layout.parts_key)
    return layout.FileTree(uri, names, sorted(folders), read, layout.hidden_notes(uri, sorted(hidden)), is_archive=True)


def _zip_captions(uri: str, archive: zipfile.ZipFile, arranged: layout.Layout) -> tuple[list[str], list[str]]:
    """Return the caption of every image, and notes on them."""
    if arranged.captions is not None:
        return arranged.captions, []
    class_names = [arranged.class_names[label] if arranged.folder_classes else "" for label in arranged.labels]
    texts, not_utf8 = list[str](), 0
    for file, class_name in zip(arranged.caption_files, class_names, strict=True):
        text, utf8 = class_name, True
        if file:
            with archive.open(file) as handle:
                raw = handle.read(untrusted.MAX_CAPTION_BYTES)  # a packed file may be far larger than it looks
            if file.endswith(".txt"):
                text, utf8 = decode_text(raw)
            else:
                caption, utf8, _ = json_caption(raw)
                text = caption or class_name
        texts.append(text)
        not_utf8 += not utf8
    return texts, caption_notes(uri, len(texts), sum(not text for text in texts), not_utf8)


class TarSource(Source):
    """Images in webdataset tars: the files of one key (the name up to its first dot) form a sample.

    Its image is the first with an image's suffix, its caption .txt or "caption" of .json, its class .cls. If no sample
    of a key has an image, its files are grouped by their names up to the last dot. Without .cls and captions, folders
    in the tars are the classes. Of a truncated tar, all complete samples are used.

    Args:
        uri: The setting.
        paths: The tars.
        notes: Notes on files that are not read.

    Raises:
        UsageError: There are no images, or labels are invalid.
    """

    def __init__(self, uri: str, paths: Sequence[str], notes: Sequence[str] = ()):
        kind = f"tar {decode.has_heif()}"
        lists = [cached_listing(path, kind, functools.partial(_list_tar, path)) for path in paths]
        self.paths, self.listings = paths, lists
        self.tar_names = relative_names(paths)
        self.starts = np.cumsum([0] + [len(listing["names"]) for listing in lists])
        total = int(self.starts[-1])
        if not total:
            raise UsageError(f"data.source={uri}: no images in {format_names(paths)} ({', '.join(IMAGE_SUFFIXES)})")
        labels = np.concatenate([listing["labels"] for listing in lists])
        without = np.flatnonzero(labels < 0)
        if 0 < len(without) < total:
            first = format_names([self.name(i) for i in without[:3]])
            raise UsageError(f"data.source={uri}: {len(without)} of {total} samples have no .cls ({first})")
        classes: tuple[str, ...] = () if len(without) else numbered_class_names(labels)
        labels = np.maximum(labels, 0)
        if not classes and not any(any(listing["captions"]) for listing in lists):
            labels, classes = self._folder_classes()
        self.has_cls = not len(without)
        super().__init__(uri, labels, classes, [*self._notes(uri, total), *notes])
        self.open_handle = make_handle_cache()

    def _notes(self, uri: str, total: int) -> list[str]:
        counts = np.stack([listing["counts"] for listing in self.listings])
        skipped, repeated, missing, not_utf8, bad_json, extra, hidden, cut = counts.sum(0).tolist()
        notes = caption_notes(uri, total, missing, not_utf8)
        if skipped:
            notes.append(f"{skipped} keys in {uri} have no image: left out")
        if repeated:
            notes.append(f"{repeated} keys in {uri} are there twice: the first is used")
        if extra:
            notes.append(f"{extra} images in {uri} are second images of their keys, such as a.mask.png: not read")
        if hidden:
            notes.append(f"{hidden} hidden or system files in {uri} are not read")
        if bad_json:
            notes.append(f"{bad_json} captions in {uri} cannot be read or are above 1 MiB: they are empty")
        if cut:
            ends = [
                f"{name} after {len(listing['names'])} images"
                for name, listing in zip(self.tar_names, self.listings, strict=True)
                if listing["counts"][-1]
            ]
            notes.append(f"{cut} of {len(self.paths)} tars end early: {format_names(ends)}; what lies before is used")
        return notes

    def _folder_classes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return labels and names of classes by the folders in the tars; no classes if images lie beside folders.

        A single folder that holds everything was packed, and is no class; nor is one in each tar with the tar's name.
        """
        stems = [os.path.splitext(os.path.basename(path))[0] for path in self.paths]
        names = [
            name[len(stem) + 1 :] if name.startswith(f"{stem}/") else name
            for stem, listing in zip(stems, self.listings, strict=True)
            for name in listing["names"]
        ]
        tops = [layout.top_folder(name, "") for name in names]
        if len(set(tops)) == 1 and tops[0]:
            tops = [layout.top_folder(name, f"{tops[0]}/") for name in names]
        if "" in tops:
            return np.zeros(len(names), np.int64), ()
        classes = tuple(sorted(set(tops)))
        index = {name: i for i, name in enumerate(classes)}
        return np.array([index[top] for top in tops], np.int64), classes

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the index of the tar and of the image in it."""
        tar = int(np.searchsorted(self.starts, i, "right")) - 1
        return tar, i - int(self.starts[tar])

    def name(self, i: int) -> str:
        """Return the key of the sample with its tar."""
        tar, j = self._locate(i)
        inside = self.listings[tar]["names"][j]
        return inside if len(self.paths) == 1 else f"{self.tar_names[tar]}/{inside}"

    def encoded_size(self, i: int) -> int:
        """Return the size of the encoded image."""
        tar, j = self._locate(i)
        return int(self.listings[tar]["places"][j, 1])

    def stamp(self) -> str:
        """Return a hash of size and modification time of every tar."""
        return hash_stamps((name, file_stamp(path)) for name, path in zip(self.tar_names, self.paths, strict=True))

    def read_captions(self) -> Sequence[str]:
        """Return all captions: the names of the classes if those are folders."""
        texts = [caption for listing in self.listings for caption in listing["captions"]]
        if self.class_names and not any(texts) and not self.has_cls:
            return [self.class_names[label] for label in self.labels]
        return texts

    def read(self, i: int) -> bytes:
        """Return the encoded image."""
        tar, j = self._locate(i)
        return self.open_handle(self.paths[tar]).read(*self.listings[tar]["places"][j].tolist())


def _list_tar(path: str, stamps: FileStamps) -> Listing:
    size, _ = stamps[os.path.abspath(path)] = file_stamp(path)
    members = _read_members(path, size)
    samples, extra = _group_samples(members.samples)
    suffixes = (*IMAGE_SUFFIXES, *(layout.HEIF_SUFFIXES if decode.has_heif() else ()))
    try:
        handle = FileHandle(untrusted.open_regular(Path(path)))
    except ValueError as error:
        raise UsageError(f"data.source={path}: cannot be read ({error})") from None
    names, places, captions, labels, counts = [], [], [], [], np.zeros(8, np.int64)
    for key, parts in samples.items():
        image = next((suffix for suffix in parts if f".{suffix}" in suffixes), None)
        if image is None:
            counts[0] += 1
            continue
        caption, utf8, known = _read_tar_caption(handle, parts)
        counts[2:5] += (not caption, not utf8, not known)
        names.append(f"{key}.{image}")
        places.append(parts[image])
        captions.append(caption)
        labels.append(_parse_class(path, key, _read_start(handle, *parts["cls"])) if "cls" in parts else -1)
    counts[1], counts[5:] = members.repeated, (extra, members.hidden, members.is_cut)
    return {
        "names": StringArray.from_strings(names),
        "places": np.array(places, np.int64).reshape(-1, 2),
        "captions": StringArray.from_strings(captions),
        "labels": np.array(labels, np.int64),
        "counts": counts,
    }


Samples = dict[str, dict[str, tuple[int, int]]]
"""{key: {suffix: (offset, size)}}"""


class _Members(NamedTuple):
    """Files of a tar by key, the numbers of keys that are there twice and of hidden files, whether the tar is cut."""

    samples: Samples
    repeated: int
    hidden: int
    is_cut: bool


def _group_samples(samples: Samples) -> tuple[Samples, int]:
    """Return samples by key, and the number of images that are not the image of a key.

    A key without an image whose files have further dots, such as photo.v2.png, is cut at the last dot instead.
    """
    grouped, extra = Samples(), 0
    for key, parts in samples.items():
        dotted = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES and "." in suffix]
        if not dotted or any(f".{suffix}" in IMAGE_SUFFIXES for suffix in parts):
            grouped[key] = parts
            extra += len(dotted)
            continue
        for suffix, place in parts.items():
            more, dot, last = suffix.rpartition(".")
            grouped.setdefault(f"{key}.{more}" if dot else key, {})[last] = place
    return grouped, extra


def _read_tar_caption(handle: FileHandle, parts: dict[str, tuple[int, int]]) -> tuple[str, bool, bool]:
    """Return the caption of a sample, whether it is UTF-8, and whether it is readable."""
    offset, size = parts.get("txt") or parts.get("json") or (0, 0)
    if size > untrusted.MAX_CAPTION_BYTES:
        return "", True, False
    raw = handle.read(offset, size)
    return (*decode_text(raw), True) if "txt" in parts or "json" not in parts else json_caption(raw)


def _read_start(handle: FileHandle, offset: int, size: int, max_bytes: int = 64) -> bytes:
    """Return the first bytes of a member."""
    return handle.read(offset, min(size, max_bytes))


def _read_members(path: str, size: int) -> _Members:
    """Return the files of a tar. Raises UsageError if it is none."""
    samples: Samples = {}
    repeated, end, hidden = set(), 0, 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would hold all of them
                after = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
                if not 0 <= member.size <= size - member.offset_data:
                    break
                end = after
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                key, dot, suffix = base.partition(".")
                if not (member.isreg() and not member.issparse()):
                    continue
                if not key or any(layout.is_hidden(part) for part in folder.split("/")):
                    hidden += 1
                    continue
                if not dot:
                    continue
                key, suffix = folder + slash + key, suffix.lower()
                parts = samples.setdefault(key, {})
                if suffix in parts:
                    repeated.add(key)
                parts.setdefault(suffix, (member.offset_data, member.size))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, OSError) as error:
        if size and not samples:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"data.source={path}: no tar that can be read ({reason}); a packed one must be unpacked"
            ) from None
    with open(path, "rb") as file:  # tarfile ends without a word at a damaged header too
        file.seek(end)
        return _Members(samples, len(repeated), hidden, file.read(TAR_BLOCK) != bytes(TAR_BLOCK))


def _parse_class(path: str, key: str, raw: bytes) -> int:
    text = decode_text(raw)[0]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= MAX_LABEL):
        raise UsageError(
            f"data.source={path}: {format_names([key])}.cls holds {text[:20]!r}; a class is a whole number from 0 to "
            f"{MAX_LABEL}"
        )
    return int(text)
