"""Folders of image files: with class sub-folders, flat, or with captions.

Legend: N images.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gesso.data.listing import (
    SUFFIXES,
    Lists,
    Source,
    Stamps,
    Texts,
    by_folder,
    caption_notes,
    remembered,
    shown,
    sound,
    stamp,
    text_of,
)
from gesso.data.parquet import column
from gesso.errors import UsageError

CAPTION_FILES = ("captions.jsonl", "captions.parquet", "metadata.jsonl", "metadata.parquet")
FILE_COLUMNS, TEXT_COLUMNS = ("file", "file_name", "path"), ("text", "caption")
CHUNK = 1000
"""captions that one thread reads at a time"""


class Folder(Source):
    """Image files below a folder, `chosen` (N,) of the list `found` of all; made by `folder` and `captioned`.

    Without `texts` an image's caption is the .txt beside it, or else the name of its class.
    """

    def __init__(
        self, where: str, found: Lists, chosen: np.ndarray, labels: np.ndarray, classes: Sequence[str],
        notes: Sequence[str], texts: Texts | None = None,
    ):  # fmt: skip
        super().__init__(where, labels, classes, notes)
        self.found, self.chosen, self.texts = found, chosen, texts

    def name(self, i: int) -> str:
        return self.found["names"][self.chosen[i]]

    def bytes_of(self, i: int) -> int:
        return int(self.found["sizes"][self.chosen[i]])

    def path(self, i: int) -> str:
        return os.path.join(self.where, self.name(i))

    def read(self, i: int) -> bytes:
        with open(self.path(i), "rb", buffering=0) as file:
            return file.read()

    def caption(self, i: int) -> str:
        known = self.texts if self._captions is None else self._captions
        return self._text(i)[0] if known is None else known[i]

    def _text(self, i: int) -> tuple[str, bool]:
        """Caption, and whether it is UTF-8."""
        if self.found["beside"][self.chosen[i]]:
            return text_of(Path(self.path(i)).with_suffix(".txt").read_bytes())
        return self.class_names[self.labels[i]] if self.class_names else "", True

    def _texts(self, start: int) -> list[tuple[str, bool]]:
        try:
            return [self._text(i) for i in range(start, min(start + CHUNK, len(self)))]
        except OSError as error:
            file = shown([str(error.filename)])
            raise UsageError(f"data.source={self.where}: caption {file} cannot be read ({error.strerror})") from None

    def read_captions(self) -> Sequence[str]:
        if self.texts is not None:
            return self.texts
        with ThreadPoolExecutor() as pool:
            read = [pair for chunk in pool.map(self._texts, range(0, len(self), CHUNK)) for pair in chunk]
        missing, not_utf8 = sum(not text for text, _ in read), sum(not utf8 for _, utf8 in read)
        self.notes += caption_notes(self.where, len(self), missing, not_utf8)
        return Texts.of(text for text, _ in read)


def folder(where: str) -> Folder:
    """A folder whose sub-folders, if there are any, are the classes. Raises UsageError when one is without images."""
    found = _listed(where)
    return Folder(where, found, *by_folder(where, found["tops"], found["folders"]))


def captioned(where: str, captions: str) -> Folder:
    """A folder with a file of captions: every line is a sample, in that order. Sub-folders are no classes.

    Raises UsageError when the file cannot be read, or names files that are not there.
    """
    found = _listed(where)
    pairs, not_utf8 = (_lines if captions.endswith(".jsonl") else _rows)(os.path.join(where, captions))
    index = {name: i for i, name in enumerate(found["names"])}
    files = [os.path.normpath(file) for file, _ in pairs]
    missing = [file for file in files if file not in index]
    if missing:
        raise UsageError(
            f"data.source={where}: {len(missing)} of the {len(files)} images that {captions} names are not there: "
            f"{shown(missing)}"
        )
    if not files:
        raise UsageError(f"data.source={where}: {captions} names no image")
    notes = caption_notes(where, len(files), sum(not text for _, text in pairs), not_utf8)
    left = len(index) - len(set(files))
    if left:
        notes.append(f"{left} images in {where} are left out: {captions} does not name them")
    chosen, texts = np.array([index[file] for file in files]), Texts.of(text for _, text in pairs)
    return Folder(where, found, chosen, np.zeros(len(files), np.int64), (), notes, texts)


def _lines(path: str) -> tuple[list[tuple[str, str]], int]:
    """(file, caption) of every line of a .jsonl, and how many lines are not UTF-8."""
    pairs, wrong, not_utf8 = [], [], 0
    for number, raw in enumerate(Path(path).read_bytes().splitlines(), start=1):
        line, utf8 = text_of(raw)
        if not line:
            continue
        not_utf8 += not utf8
        try:
            row = json.loads(line)
            file = next(row[key] for key in FILE_COLUMNS if key in row)
            text = next(row[key] for key in TEXT_COLUMNS if key in row)
            pairs.append((file + "", sound(text or "")))
        except (ValueError, TypeError, AttributeError, StopIteration, RecursionError):
            wrong.append(f"line {number}")
    if wrong:
        raise UsageError(
            f'{path}: {len(wrong)} lines are not like {{"file": "a.png", "text": "a caption"}}: {shown(wrong)}'
        )
    return pairs, not_utf8


def _rows(path: str) -> tuple[list[tuple[str, str]], int]:
    """(file, caption) of every row of a .parquet."""
    files, texts = column(path, FILE_COLUMNS), column(path, TEXT_COLUMNS)
    if not all(isinstance(file, str) and isinstance(text, str | None) for file, text in zip(files, texts, strict=True)):
        raise UsageError(f"{path}: its columns of files and captions must hold texts, with no file missing")
    return [(file, sound(text or "")) for file, text in zip(files, texts, strict=True)], 0


def _listed(where: str) -> Lists:
    return remembered(where, "folder", lambda stamps: _tree(where, stamps))


def _tree(where: str, stamps: Stamps) -> Lists:
    """Every image below a folder, sorted: name, size, whether a .txt is beside it, its folder at the top (or -1)."""
    found, folders, waiting = [], [], [""]
    while waiting:
        inside = waiting.pop()
        folder = os.path.join(where, inside)
        try:
            stamps[os.path.abspath(folder)] = stamp(folder)
            with os.scandir(folder) as entries:
                entries = list(entries)
        except OSError as error:
            raise UsageError(f"data.source={where}: {shown([folder])} cannot be listed ({error.strerror})") from None
        texts = {entry.name[:-4] for entry in entries if entry.name.endswith(".txt")}
        for entry in entries:
            if entry.name.startswith(".") and (not inside or not entry.is_dir()):
                continue
            if entry.is_dir(follow_symlinks=not inside):  # of links to folders only those at the top are followed
                waiting.append(f"{inside}{entry.name}/")
                folders += [entry.name] if not inside else []
            elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or _bytes(entry) < 0):
                found.append(
                    (f"{inside}{entry.name}".split("/"), _bytes(entry), os.path.splitext(entry.name)[0] in texts)
                )
    found.sort()
    index = {name: i for i, name in enumerate(sorted(folders))}
    return {
        "names": Texts.of("/".join(parts) for parts, _, _ in found),
        "sizes": np.array([size for _, size, _ in found], np.int64),
        "beside": np.array([beside for _, _, beside in found], bool),
        "tops": np.array([index[parts[0]] if len(parts) > 1 else -1 for parts, _, _ in found], np.int64),
        "folders": Texts.of(sorted(folders)),
    }


def _bytes(entry: os.DirEntry) -> int:
    """-1 for a link to nothing: reading it will say so."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1
