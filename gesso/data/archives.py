"""Images inside of zips and tars: one list of where each lies, then reads by offset. Nothing is unpacked.

Legend: N images.
"""

import functools
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from gesso.data.listing import (
    LARGEST_LABEL,
    SUFFIXES,
    Lists,
    Pixels,
    Source,
    Stamps,
    Texts,
    by_folder,
    caption_notes,
    checked_labels,
    numbered,
    remembered,
    shown,
    sound,
    stamp,
    text_of,
)
from gesso.errors import Unreadable, UsageError

OPEN_FILES = 64
"""of one source at a time, whatever the number of its tars"""
BLOCK = 512


class Handle:
    """A file that any thread reads at any offset; it is closed with the last reference to it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        if len(data) < size:
            raise Unreadable("", "its file is shorter than when it was listed")
        return data


def handles():
    """path -> Handle, the latest of them kept open."""
    return functools.lru_cache(OPEN_FILES)(lambda path: Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))


class Zip(Source):
    """Images, or latents as EDM2 stores them, in a zip, with or without dataset.json.

    dataset.json {"labels": [[name, int], ...] or null} decides on classes; without it the top folders do. Entries may
    be deflated. Raises UsageError when it is no zip, holds no images or hostile names, or labels are wrong.
    """

    def __init__(self, where: str):
        found = remembered(where, "zip", lambda stamps: _zip_list(where, stamps))
        super().__init__(where, found["labels"], found["classes"], found["notes"])
        self.names, self.places, self.own_names = found["names"], found["places"], bool(found["own_names"])
        self.latents = self.names[0].endswith(".npy")
        self.open = handles()

    def name(self, i: int) -> str:
        return self.names[i]

    def bytes_of(self, i: int) -> int:
        return int(self.places[i, 2])

    def read_captions(self) -> Sequence[str]:
        return [self.class_names[label] if self.own_names else "" for label in self.labels]

    def read(self, i: int) -> Pixels:
        offset, packed, size, method, crc = self.places[i].tolist()
        handle = self.open(self.where)
        head = handle.read(offset, 30)
        if head[:4] != b"PK\3\4":
            raise Unreadable("", "no entry of the zip begins where its list says")
        data = handle.read(offset + 30 + sum(struct.unpack("<2H", head[26:30])), packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error as error:
                raise Unreadable("", f"damaged in the zip: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise Unreadable("", "damaged in the zip: its checksum is another")
        return _latents(data) if self.latents else data


def _latents(data: bytes) -> np.ndarray:
    """(2C, h, w) float32"""
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # whatever a damaged header leads to
        raise Unreadable("", f"no numpy array: {' '.join(str(error).split())}") from error
    if values.ndim != 3 or len(values) % 2 or values.dtype != np.float32 or not np.isfinite(values).all():
        raise Unreadable("", f"not finite float32 (2C, h, w): {values.dtype} {values.shape}")
    return values


def _zip_list(where: str, stamps: Stamps) -> Lists:
    stamps[os.path.abspath(where)] = stamp(where)
    try:
        with zipfile.ZipFile(where) as archive:
            entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            described = archive.read("dataset.json") if "dataset.json" in entries else None
            total = sum(not entry.is_dir() for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:
        raise UsageError(f"data.source={where}: no zip that can be read, or one cut short ({error})") from None
    hostile = [n for n in entries if n.startswith("/") or "\\" in n or ":" in n[:2] or ".." in n.split("/")]
    if hostile:
        raise UsageError(
            f"data.source={where}: refused, for names in it point outside of it ({shown(hostile)}): "
            "make the zip anew from within its folder"
        )
    if total > len(entries):
        raise UsageError(f"data.source={where}: {total - len(entries)} names are in it twice; make the zip anew")
    images, latents = (
        sorted(filter(_is_image, entries), key=lambda n: n.split("/")),
        sorted(filter(_is_latents, entries)),
    )
    names = images or latents
    if not names:
        raise UsageError(
            f"data.source={where}: no images in the zip ({', '.join(SUFFIXES)}), and no img-mean-std-*.npy"
        )
    if images and latents:
        raise UsageError(
            f"data.source={where}: {len(images)} images and {len(latents)} latents in one zip; make it two"
        )
    odd = [n for n in names if entries[n].compress_type not in (0, zipfile.ZIP_DEFLATED) or entries[n].flag_bits & 1]
    if odd:
        raise UsageError(f"data.source={where}: encrypted, or not packed by deflate: {shown(odd)}; use zip -0")
    kept, labels, classes, notes = _zip_labels(where, names, described)
    chosen = [entries[names[i]] for i in kept]
    places = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in chosen]
    return {
        "names": Texts.of(e.filename for e in chosen), "places": np.array(places, np.int64), "labels": labels,
        "classes": Texts.of(classes), "notes": Texts.of(notes), "own_names": np.array(described is None and len(classes)),
    }  # fmt: skip


def _is_image(name: str) -> bool:
    hidden = name.startswith(".") or name.rpartition("/")[2].startswith(".")
    return name.lower().endswith(SUFFIXES) and not hidden


def _is_latents(name: str) -> bool:
    return name.rpartition("/")[2].startswith("img-mean-std-") and name.endswith(".npy")


def _zip_labels(where: str, names: list[str], described: bytes | None):
    """As `by_folder`."""
    if described is None:
        tops = [name.partition("/")[0] if "/" in name else "" for name in names]
        if len(set(tops)) == 1 and tops[0]:  # the folder that was packed, not a class
            tops = [name.split("/")[1] if name.count("/") > 1 else "" for name in names]
        folders = sorted(set(tops) - {""})
        index = {folder: i for i, folder in enumerate(folders)} | {"": -1}
        return by_folder(where, np.array([index[top] for top in tops]), folders)
    try:
        pairs = json.loads(described)["labels"]
        given = None if pairs is None else {str(name): label for name, label in pairs}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f'data.source={where}: its dataset.json is not {{"labels": [[name, class], ...]}} or {{"labels": null}}'
        ) from None
    everything, there = np.arange(len(names)), set(names)
    if given is None:
        return everything, np.zeros(len(names), np.int64), (), [f"{where} has no labels: training without classes"]
    if len(given) < len(pairs):
        raise UsageError(f"data.source={where}: dataset.json names {len(pairs) - len(given)} files twice")
    unknown, without = [n for n in given if n not in there], [n for n in names if n not in given]
    for wrong, what in ((unknown, "labels files that are not there"), (without, "has no label for")):
        if wrong:
            raise UsageError(f"data.source={where}: dataset.json {what}: {shown(wrong)}")
    labels = checked_labels(where, [given[name] for name in names], names.__getitem__)
    return everything, labels, numbered(labels), []


class Tars(Source):
    """Images in webdataset tars: the files of one key (the name up to its first dot) are a sample.

    Its image is the first with an image's suffix, its caption .txt or else "caption" of .json, its class .cls. Of a tar
    that ends early all that lies before the end is used. Raises UsageError when there are no images, or labels are wrong.
    """

    def __init__(self, where: str, paths: Sequence[str]):
        lists = [remembered(path, "tar", lambda stamps, path=path: _tar_list(path, stamps)) for path in paths]
        self.paths, self.lists = paths, lists
        self.starts = np.cumsum([0] + [len(found["names"]) for found in lists])
        total = int(self.starts[-1])
        if not total:
            raise UsageError(f"data.source={where}: no images in {shown(paths)} ({', '.join(SUFFIXES)})")
        labels = np.concatenate([found["labels"] for found in lists])
        without = np.flatnonzero(labels < 0)
        if 0 < len(without) < total:
            first = shown([self.name(i) for i in without[:3]])
            raise UsageError(f"data.source={where}: {len(without)} of {total} samples have no .cls ({first})")
        classes = () if len(without) else numbered(labels)
        super().__init__(where, np.maximum(labels, 0), classes, self._notes(where, total))
        self.open = handles()

    def _notes(self, where: str, total: int) -> list[str]:
        counts = np.stack([found["counts"] for found in self.lists])
        skipped, repeated, missing, not_utf8, bad_json, cut = counts.sum(0).tolist()
        notes = caption_notes(where, total, missing, not_utf8)
        if skipped:
            notes.append(f"{skipped} keys in {where} have no image: left out")
        if repeated:
            notes.append(f"{repeated} keys in {where} are there twice: the first is used")
        if bad_json:
            notes.append(f"{bad_json} .json in {where} cannot be read: their captions are empty")
        if cut:
            ends = [
                f"{os.path.basename(path)} after {len(found['names'])} images"
                for path, found in zip(self.paths, self.lists, strict=True)
                if found["counts"][-1]
            ]
            notes.append(f"{cut} of {len(self.paths)} tars end early: {shown(ends)}; what lies before is used")
        return notes

    def _place(self, i: int) -> tuple[int, int]:
        """Which tar, and which of its images."""
        tar = int(np.searchsorted(self.starts, i, "right")) - 1
        return tar, i - int(self.starts[tar])

    def name(self, i: int) -> str:
        tar, j = self._place(i)
        inside = self.lists[tar]["names"][j]
        return inside if len(self.paths) == 1 else f"{os.path.basename(self.paths[tar])}/{inside}"

    def bytes_of(self, i: int) -> int:
        tar, j = self._place(i)
        return int(self.lists[tar]["places"][j, 1])

    def caption(self, i: int) -> str:
        tar, j = self._place(i)
        return self.lists[tar]["captions"][j]

    def read_captions(self) -> Sequence[str]:
        return [caption for found in self.lists for caption in found["captions"]]

    def read(self, i: int) -> bytes:
        tar, j = self._place(i)
        return self.open(self.paths[tar]).read(*self.lists[tar]["places"][j].tolist())


def _tar_list(path: str, stamps: Stamps) -> Lists:
    size, _ = stamps[os.path.abspath(path)] = stamp(path)
    samples, repeated, cut = _samples(path, size)
    handle = Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    names, places, captions, labels, counts = [], [], [], [], np.zeros(6, np.int64)
    for key, parts in samples.items():
        image = next((suffix for suffix in parts if f".{suffix}" in SUFFIXES), None)
        if image is None:
            counts[0] += 1
            continue
        caption, utf8, known = "", True, True
        if "txt" in parts:
            caption, utf8 = text_of(handle.read(*parts["txt"]))
        elif "json" in parts:
            caption, utf8, known = _json_caption(handle.read(*parts["json"]))
        counts[2:5] += (not caption, not utf8, not known)
        names.append(f"{key}.{image}")
        places.append(parts[image])
        captions.append(caption)
        labels.append(_class(path, key, handle.read(*parts["cls"])) if "cls" in parts else -1)
    counts[1], counts[5] = repeated, cut
    return {
        "names": Texts.of(names), "places": np.array(places, np.int64).reshape(-1, 2), "captions": Texts.of(captions),
        "labels": np.array(labels, np.int64), "counts": counts,
    }  # fmt: skip


def _samples(path: str, size: int) -> tuple[dict[str, dict[str, tuple[int, int]]], int, bool]:
    """{key: {suffix: (offset, size)}}, how many keys were there twice, and whether the tar ends before its end mark."""
    samples, repeated, end = {}, set(), 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                after = member.offset_data + -(-member.size // BLOCK) * BLOCK
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
    except tarfile.TarError as error:
        if size and not samples:
            raise UsageError(
                f"data.source={path}: no tar that can be read ({error}); a packed one must be unpacked"
            ) from None
    with open(path, "rb") as file:  # tarfile ends without a word at a damaged header too
        file.seek(end)
        return samples, len(repeated), file.read(BLOCK) != bytes(BLOCK)


def _json_caption(raw: bytes) -> tuple[str, bool, bool]:
    """Caption, whether it is UTF-8, and whether it could be read at all."""
    text, utf8 = text_of(raw)
    try:
        caption = json.loads(text).get("caption")
    except (ValueError, AttributeError, RecursionError):
        return "", utf8, False
    return (sound(caption), utf8, True) if isinstance(caption, str) else ("", utf8, caption is None)


def _class(path: str, key: str, raw: bytes) -> int:
    text = text_of(raw)[0]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= LARGEST_LABEL):
        raise UsageError(
            f"data.source={path}: {shown([key])}.cls holds {text[:20]!r}; a class is a whole number from 0 to {LARGEST_LABEL}"
        )
    return int(text)
