"""Images in zips and tars: an index of offsets, then reads by offset. Nothing is unpacked.

Legend: N images.
"""

import functools
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gesso import untrusted
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
    labels_from_folders,
    numbered_class_names,
    replace_surrogates,
    validate_labels,
)
from gesso.errors import UnreadableImageError, UsageError

MAX_OPEN_FILES = 64
"""Maximum number of open files per source."""
TAR_BLOCK = 512


class FileHandle:
    """A file that any thread can read at any offset; closed with the last reference."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`. Raises UnreadableImageError if the file is shorter or they are too many."""
        if size > untrusted.MAX_ITEM_BYTES:
            raise UnreadableImageError("", f"it has more than {untrusted.MAX_ITEM_BYTES / 2**20:g} MiB")
        data = os.pread(self.descriptor, size, offset) if offset >= 0 else b""
        if len(data) < size:
            raise UnreadableImageError("", "its file is shorter than when it was listed")
        return data


def make_handle_cache():
    """Return a function path -> FileHandle that keeps the latest files open."""
    return functools.lru_cache(MAX_OPEN_FILES)(lambda path: FileHandle(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))


class ZipSource(Source):
    """Images, or latents as EDM2 stores them, in a zip, with or without dataset.json.

    dataset.json {"labels": [[name, int], ...] or null} defines the classes; without it, the top-level folders do.
    Entries may be deflated.

    Raises:
        UsageError: It is no zip, has no images or unsafe names, or labels are invalid.
    """

    def __init__(self, uri: str):
        listing = cached_listing(uri, "zip", lambda stamps: _list_zip(uri, stamps))
        super().__init__(uri, listing["labels"], listing["classes"], listing["notes"])
        self.names, self.locations, self.caption_is_class = (
            listing["names"],
            listing["places"],
            bool(listing["own_names"]),
        )
        self.has_latents = self.names[0].endswith(".npy")
        self.open_handle = make_handle_cache()

    def name(self, i: int) -> str:
        """Return the name of the entry."""
        return self.names[i]

    def encoded_size(self, i: int) -> int:
        """Return the size of the entry."""
        return int(self.locations[i, 2])

    def read_captions(self) -> Sequence[str]:
        """Return the captions: class names if top-level folders define the classes."""
        return [self.class_names[label] if self.caption_is_class else "" for label in self.labels]

    def read(self, i: int) -> RawImage:
        """Return the encoded image, or latents."""
        offset, packed, size, method, crc = self.locations[i].tolist()
        if size > untrusted.MAX_ITEM_BYTES:
            raise UnreadableImageError("", f"it has more than {untrusted.MAX_ITEM_BYTES / 2**20:g} MiB")
        handle = self.open_handle(self.uri)
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
        return _parse_latents(data) if self.has_latents else data


def _parse_latents(data: bytes) -> np.ndarray:
    """Return latents (2C, h, w) float32."""
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # whatever a damaged header leads to
        raise UnreadableImageError("", f"no numpy array: {' '.join(str(error).split())}") from error
    if values.ndim != 3 or len(values) % 2 or values.dtype != np.float32 or not np.isfinite(values).all():
        raise UnreadableImageError("", f"not finite float32 (2C, h, w): {values.dtype} {values.shape}")
    return values


def _list_zip(uri: str, stamps: FileStamps) -> Listing:
    stamps[os.path.abspath(uri)] = file_stamp(uri)
    try:
        with untrusted.open_zip(uri) as archive:
            entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            described = None
            if "dataset.json" in entries:
                described = untrusted.read_member(archive, "dataset.json", untrusted.MAX_TEXT_BYTES)
            total = sum(not entry.is_dir() for entry in archive.infolist())
    except (OSError, *untrusted.ZIP_ERRORS) as error:
        raise UsageError(f"data.source={uri}: no zip that can be read, or one cut short ({error})") from None
    hostile = [n for n in entries if n.startswith("/") or "\\" in n or ":" in n[:2] or ".." in n.split("/")]
    if hostile:
        raise UsageError(
            f"data.source={uri}: refused, for names in it point outside of it ({format_names(hostile)}): "
            "make the zip anew from within its folder"
        )
    if total > len(entries):
        raise UsageError(f"data.source={uri}: {total - len(entries)} names are in it twice; make the zip anew")
    images, latents = (
        sorted(filter(_is_image, entries), key=lambda n: n.split("/")),
        sorted(filter(_is_latents, entries)),
    )
    names = images or latents
    if not names:
        raise UsageError(
            f"data.source={uri}: no images in the zip ({', '.join(IMAGE_SUFFIXES)}), and no img-mean-std-*.npy"
        )
    if images and latents:
        raise UsageError(f"data.source={uri}: {len(images)} images and {len(latents)} latents in one zip; make it two")
    odd = [n for n in names if entries[n].compress_type not in (0, zipfile.ZIP_DEFLATED) or entries[n].flag_bits & 1]
    if odd:
        raise UsageError(f"data.source={uri}: encrypted, or not packed by deflate: {format_names(odd)}; use zip -0")
    selected, labels, classes, notes = _zip_labels(uri, names, described)
    chosen = [entries[names[i]] for i in selected]
    places = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in chosen]
    return {
        "names": StringArray.from_strings(e.filename for e in chosen),
        "places": np.array(places, np.int64),
        "labels": labels,
        "classes": StringArray.from_strings(classes),
        "notes": StringArray.from_strings(notes),
        "own_names": np.array(described is None and len(classes)),
    }


def _is_image(name: str) -> bool:
    hidden = name.startswith(".") or name.rpartition("/")[2].startswith(".")
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden


def _is_latents(name: str) -> bool:
    return name.rpartition("/")[2].startswith("img-mean-std-") and name.endswith(".npy")


def _zip_labels(uri: str, names: list[str], dataset_json: bytes | None):
    """Return selected entries, labels, class names and notes, as `labels_from_folders`."""
    if dataset_json is None:
        tops = [name.partition("/")[0] if "/" in name else "" for name in names]
        if len(set(tops)) == 1 and tops[0]:  # the folder that was packed, not a class
            tops = [name.split("/")[1] if name.count("/") > 1 else "" for name in names]
        folders = sorted(set(tops) - {""})
        index = {folder: i for i, folder in enumerate(folders)} | {"": -1}
        return labels_from_folders(uri, np.array([index[top] for top in tops]), folders)
    try:
        pairs = untrusted.parse_json(dataset_json)["labels"]
        given = None if pairs is None else {str(name): label for name, label in pairs}
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f'data.source={uri}: its dataset.json is not {{"labels": [[name, class], ...]}} or {{"labels": null}}'
        ) from None
    everything, there = np.arange(len(names)), set(names)
    if given is None:
        return everything, np.zeros(len(names), np.int64), (), [f"{uri} has no labels: training without classes"]
    if len(given) < len(pairs):
        raise UsageError(f"data.source={uri}: dataset.json names {len(pairs) - len(given)} files twice")
    unknown, without = [n for n in given if n not in there], [n for n in names if n not in given]
    for wrong, what in ((unknown, "labels files that are not there"), (without, "has no label for")):
        if wrong:
            raise UsageError(f"data.source={uri}: dataset.json {what}: {format_names(wrong)}")
    labels = validate_labels(uri, [given[name] for name in names], names.__getitem__)
    return everything, labels, numbered_class_names(labels), []


class TarSource(Source):
    """Images in webdataset tars: the files of one key (the name up to its first dot) form a sample.

    Its image is the first with an image's suffix, its caption .txt or "caption" of .json, its class .cls. Of a
    truncated tar, all complete samples are used.

    Raises:
        UsageError: There are no images, or labels are invalid.
    """

    def __init__(self, uri: str, paths: Sequence[str]):
        lists = [cached_listing(path, "tar", functools.partial(_list_tar, path)) for path in paths]
        self.paths, self.listings = paths, lists
        self.starts = np.cumsum([0] + [len(listing["names"]) for listing in lists])
        total = int(self.starts[-1])
        if not total:
            raise UsageError(f"data.source={uri}: no images in {format_names(paths)} ({', '.join(IMAGE_SUFFIXES)})")
        labels = np.concatenate([listing["labels"] for listing in lists])
        without = np.flatnonzero(labels < 0)
        if 0 < len(without) < total:
            first = format_names([self.name(i) for i in without[:3]])
            raise UsageError(f"data.source={uri}: {len(without)} of {total} samples have no .cls ({first})")
        classes = () if len(without) else numbered_class_names(labels)
        super().__init__(uri, np.maximum(labels, 0), classes, self._notes(uri, total))
        self.open_handle = make_handle_cache()

    def _notes(self, uri: str, total: int) -> list[str]:
        counts = np.stack([listing["counts"] for listing in self.listings])
        skipped, repeated, missing, not_utf8, bad_json, cut = counts.sum(0).tolist()
        notes = caption_notes(uri, total, missing, not_utf8)
        if skipped:
            notes.append(f"{skipped} keys in {uri} have no image: left out")
        if repeated:
            notes.append(f"{repeated} keys in {uri} are there twice: the first is used")
        if bad_json:
            notes.append(f"{bad_json} captions in {uri} cannot be read or are above 1 MiB: they are empty")
        if cut:
            ends = [
                f"{os.path.basename(path)} after {len(listing['names'])} images"
                for path, listing in zip(self.paths, self.listings, strict=True)
                if listing["counts"][-1]
            ]
            notes.append(f"{cut} of {len(self.paths)} tars end early: {format_names(ends)}; what lies before is used")
        return notes

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the index of the tar and of the image in it."""
        tar = int(np.searchsorted(self.starts, i, "right")) - 1
        return tar, i - int(self.starts[tar])

    def name(self, i: int) -> str:
        """Return the key of the sample with its tar."""
        tar, j = self._locate(i)
        inside = self.listings[tar]["names"][j]
        return inside if len(self.paths) == 1 else f"{os.path.basename(self.paths[tar])}/{inside}"

    def encoded_size(self, i: int) -> int:
        """Return the size of the encoded image."""
        tar, j = self._locate(i)
        return int(self.listings[tar]["places"][j, 1])

    def caption(self, i: int) -> str:
        """Return the caption of one sample."""
        tar, j = self._locate(i)
        return self.listings[tar]["captions"][j]

    def read_captions(self) -> Sequence[str]:
        """Return all captions."""
        return [caption for listing in self.listings for caption in listing["captions"]]

    def read(self, i: int) -> bytes:
        """Return the encoded image."""
        tar, j = self._locate(i)
        return self.open_handle(self.paths[tar]).read(*self.listings[tar]["places"][j].tolist())


def _list_tar(path: str, stamps: FileStamps) -> Listing:
    size, _ = stamps[os.path.abspath(path)] = file_stamp(path)
    try:
        handle = FileHandle(untrusted.open_regular(Path(path)))
    except ValueError as error:
        raise UsageError(f"data.source={path}: cannot be read ({error})") from None
    samples, repeated, cut = _read_members(path, size)
    names, places, captions, labels, counts = [], [], [], [], np.zeros(6, np.int64)
    for key, parts in samples.items():
        image = next((suffix for suffix in parts if f".{suffix}" in IMAGE_SUFFIXES), None)
        if image is None:
            counts[0] += 1
            continue
        caption, utf8, known = _read_tar_caption(handle, parts)
        counts[2:5] += (not caption, not utf8, not known)
        names.append(f"{key}.{image}")
        places.append(parts[image])
        captions.append(caption)
        labels.append(_parse_class(path, key, _read_start(handle, *parts["cls"])) if "cls" in parts else -1)
    counts[1], counts[5] = repeated, cut
    return {
        "names": StringArray.from_strings(names),
        "places": np.array(places, np.int64).reshape(-1, 2),
        "captions": StringArray.from_strings(captions),
        "labels": np.array(labels, np.int64),
        "counts": counts,
    }


def _read_tar_caption(handle: FileHandle, parts: dict[str, tuple[int, int]]) -> tuple[str, bool, bool]:
    """Return the caption of a sample, whether it is UTF-8, and whether it is readable."""
    offset, size = parts.get("txt") or parts.get("json") or (0, 0)
    if size > untrusted.MAX_CAPTION_BYTES:
        return "", True, False
    raw = handle.read(offset, size)
    return (*decode_text(raw), True) if "txt" in parts or "json" not in parts else _json_caption(raw)


def _read_start(handle: FileHandle, offset: int, size: int, max_bytes: int = 64) -> bytes:
    """Return the first bytes of a member."""
    return handle.read(offset, min(size, max_bytes))


def _read_members(path: str, size: int) -> tuple[dict[str, dict[str, tuple[int, int]]], int, bool]:
    """Return {key: {suffix: (offset, size)}}, the number of duplicate keys, and whether the tar is truncated."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    repeated, end = set(), 0
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
                if not (member.isreg() and not member.issparse() and key and dot):
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
        return samples, len(repeated), file.read(TAR_BLOCK) != bytes(TAR_BLOCK)


def _json_caption(raw: bytes) -> tuple[str, bool, bool]:
    """Return the caption, whether it is UTF-8, and whether it is readable."""
    text, utf8 = decode_text(raw)
    try:
        caption = untrusted.parse_json(text).get("caption")
    except (ValueError, AttributeError):
        return "", utf8, False
    return (replace_surrogates(caption), utf8, True) if isinstance(caption, str) else ("", utf8, caption is None)


def _parse_class(path: str, key: str, raw: bytes) -> int:
    text = decode_text(raw)[0]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= MAX_LABEL):
        raise UsageError(
            f"data.source={path}: {format_names([key])}.cls holds {text[:20]!r}; a class is a whole number from 0 to "
            f"{MAX_LABEL}"
        )
    return int(text)
