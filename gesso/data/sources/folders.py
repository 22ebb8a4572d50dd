"""Folders of image files, or of latents: with class sub-folders, splits, captions, or a metadata file.

Legend: N images.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gesso import untrusted
from gesso.data.sources import layout
from gesso.data.sources.archives import parse_latents
from gesso.data.sources.base import (
    RawImage,
    Source,
    StringArray,
    caption_notes,
    decode_text,
    format_names,
    hash_stamps,
)
from gesso.data.sources.layout import FileTree
from gesso.data.sources.metadata import json_caption
from gesso.errors import UnreadableImageError, UsageError

CAPTION_CHUNK = 1000
"""captions that one thread reads at a time"""
LIST_THREADS = 16
"""Threads that list folders: on a network disk each file takes a round trip."""
Stamp = tuple[int, int]
"""Size and modification time (ns) of a file; -1, -1 for a link to nothing, which reading reports."""


class FolderScan(NamedTuple):
    """Files below a folder, sorted by the parts of their names, with their stamps; sub-folders; notes on the rest."""

    names: list[str]
    stamps: list[Stamp]
    folders: list[str]
    notes: list[str]


class FolderSource(Source):
    """Image files or latents in a folder, arranged as `layout.find_layout` describes.

    Without a metadata file, the caption of an image is the .txt or .json next to it, or the name of its class.

    Args:
        uri: The setting, PATH or PATH#PART.
        path: The folder.
        scan: Its files.
        part: One of layout.PARTS.

    Raises:
        UsageError: There are no images, or a metadata file cannot be read or contradicts them.
    """

    def __init__(self, uri: str, path: str, scan: FolderScan, part: str | None = None):
        arranged = layout.find_layout(folder_tree(uri, path, scan), part)
        super().__init__(uri, arranged.labels, arranged.class_names, arranged.notes)
        stamps = dict(zip(scan.names, scan.stamps, strict=True))
        self.path, self.has_latents, self.held_out = path, arranged.has_latents, arranged.held_out
        self.names = StringArray.from_strings(arranged.names)
        self.stamps = np.array([stamps[name] for name in arranged.names], np.int64).reshape(-1, 2)
        self.caption_files = StringArray.from_strings(arranged.caption_files)
        self.caption_texts = None if arranged.captions is None else StringArray.from_strings(arranged.captions)
        self.folder_classes = arranged.folder_classes

    def name(self, i: int) -> str:
        """Return the path relative to the folder."""
        return self.names[i]

    def encoded_size(self, i: int) -> int:
        """Return the size of the file."""
        return int(self.stamps[i, 0])

    def read(self, i: int) -> RawImage:
        """Return the bytes of the file, or latents."""
        try:
            data = untrusted.read_bytes(Path(self.path, self.name(i)), untrusted.MAX_ITEM_BYTES)
        except ValueError as error:
            raise UnreadableImageError("", str(error)) from None
        return parse_latents(data) if self.has_latents else data

    def stamp(self) -> str:
        """Return a hash of the size and modification time of every image."""
        return hash_stamps(zip(self.names, self.stamps.tolist(), strict=True))

    def caption(self, i: int) -> str:
        """Return the caption of one image."""
        known = self.caption_texts if self._captions is None else self._captions
        return self._read_caption(i)[0] if known is None else known[i]

    def _read_caption(self, i: int) -> tuple[str, bool]:
        """Return the caption, and whether it is UTF-8."""
        class_name = self.class_names[self.labels[i]] if self.folder_classes else ""
        if not self.caption_files[i]:
            return class_name, True
        path = self._caption_path(i)
        try:
            raw = untrusted.read_bytes(path, untrusted.MAX_CAPTION_BYTES)
        except ValueError as error:
            raise UnreadableImageError("", f"its caption cannot be read: {error}") from None
        if path.suffix == ".txt":
            return decode_text(raw)
        caption, utf8, _ = json_caption(raw)
        return caption or class_name, utf8

    def _caption_path(self, i: int) -> Path:
        return Path(self.path, self.caption_files[i])

    def _read_caption_chunk(self, start: int) -> list[tuple[str, bool]]:
        captions = []
        for i in range(start, min(start + CAPTION_CHUNK, len(self))):
            try:
                captions.append(self._read_caption(i))
            except (OSError, UnreadableImageError) as error:
                file = format_names([str(self._caption_path(i))])
                reason = error.strerror if isinstance(error, OSError) else error.reason
                raise UsageError(f"data.source={self.uri}: caption {file} cannot be read ({reason})") from None
        return captions

    def read_captions(self) -> Sequence[str]:
        """Return all captions."""
        if self.caption_texts is not None:
            return self.caption_texts
        with ThreadPoolExecutor() as pool:
            read = [
                pair
                for chunk in pool.map(self._read_caption_chunk, range(0, len(self), CAPTION_CHUNK))
                for pair in chunk
            ]
        missing, not_utf8 = sum(not text for text, _ in read), sum(not utf8 for _, utf8 in read)
        self.notes += caption_notes(self.uri, len(self), missing, not_utf8)
        return StringArray.from_strings(text for text, _ in read)


def folder_tree(uri: str, path: str, scan: FolderScan) -> FileTree:
    """Return the files of a folder for `layout.find_layout`."""

    def read(name: str, count: int) -> bytes:
        file = os.path.join(path, name)
        if not os.path.isfile(file):  # reading a pipe would wait
            return b""
        with open(file, "rb", buffering=0) as handle:
            return handle.read(count)

    return FileTree(uri, scan.names, scan.folders, read, scan.notes)


def scan_folder(uri: str, path: str) -> FolderScan:
    """List all files below a folder; linked folders are followed once, hidden and system files are left out.

    The listing is not stored between commands: a folder's modification time does not change with its files.

    Raises:
        UsageError: A folder cannot be listed.
    """
    files: list[tuple[str, Stamp]] = []
    folders, hidden, other, again = list[str](), list[str](), list[str](), list[str]()
    seen: set[tuple[int, int]] = set()
    wave, links = [""], list[str]()
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        while wave or links:
            # Links come last: a folder that can be reached without a link is read under its own name.
            wave, inside_wave = [], wave or [links.pop(0)]
            for inside, listed in zip(
                inside_wave, pool.map(lambda name: _list_folder(uri, path, name), inside_wave), strict=True
            ):
                if listed.identity in seen:
                    again.append(inside[:-1])
                    continue
                seen.add(listed.identity)
                folders += [inside[:-1]] if inside else []
                files += listed.files
                hidden += listed.hidden
                other += listed.other
                wave += listed.folders
                links += listed.links
    files.sort(key=lambda file: layout.parts_key(file[0]))
    notes = layout.hidden_notes(uri, sorted(hidden))
    if again:
        notes.append(
            f"{len(again)} linked folders in {uri} lead to folders that are read already: {format_names(again)}"
        )
    if other:
        notes.append(f"{len(other)} pipes, sockets or devices in {uri} are not read: {format_names(sorted(other))}")
    return FolderScan([name for name, _ in files], [stamp for _, stamp in files], sorted(folders), notes)


class _ListedFolder(NamedTuple):
    """Device and inode of a folder, and what it holds, by paths relative to the source; folders end in "/"."""

    identity: tuple[int, int]
    files: list[tuple[str, Stamp]]
    folders: list[str]
    links: list[str]
    hidden: list[str]
    other: list[str]


def _list_folder(uri: str, path: str, inside: str) -> _ListedFolder:
    """List the folder `inside`, "" or a path that ends in "/", of the folder `path`."""
    folder = os.path.join(path, inside)
    try:
        status = os.stat(folder)
        listed = _ListedFolder((status.st_dev, status.st_ino), [], [], [], [], [])
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = inside + entry.name
                if layout.is_hidden(entry.name):
                    listed.hidden.append(f"{name}/" if entry.is_dir() else name)
                elif entry.is_dir():
                    (listed.links if entry.is_symlink() else listed.folders).append(f"{name}/")
                elif (stamp := _stamp(entry))[0] < 0 or entry.is_file():
                    listed.files.append((name, stamp))
                else:
                    listed.other.append(name)
    except OSError as error:
        raise UsageError(f"data.source={uri}: {format_names([folder])} cannot be listed ({error.strerror})") from None
    return listed


def _stamp(entry: os.DirEntry) -> Stamp:
    try:
        status = entry.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
