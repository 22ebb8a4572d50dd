"""Folders of image files: with class sub-folders, flat, or with captions.

Legend: N images.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gesso import untrusted
from gesso.data.sources.base import (
    IMAGE_SUFFIXES,
    FileStamps,
    Listing,
    Source,
    StringArray,
    cached_listing,
    caption_notes,
    decode_text,
    file_stamp,
    format_names,
    labels_from_folders,
    replace_surrogates,
)
from gesso.data.sources.parquet import read_column
from gesso.errors import UnreadableImageError, UsageError

CAPTION_FILES = ("captions.jsonl", "captions.parquet", "metadata.jsonl", "metadata.parquet")
FILE_COLUMNS, TEXT_COLUMNS = ("file", "file_name", "path"), ("text", "caption")
CAPTION_CHUNK = 1000
"""captions that one thread reads at a time"""


class FolderSource(Source):
    """Image files in a folder; built by `open_folder` and `open_captioned_folder`.

    Without a caption file, the caption of an image is the .txt next to it, or the name of its class.
    """

    def __init__(
        self, uri: str, listing: Listing, indices: np.ndarray, labels: np.ndarray, class_names: Sequence[str],
        notes: Sequence[str], caption_texts: StringArray | None = None,
    ):  # fmt: skip
        super().__init__(uri, labels, class_names, notes)
        self.listing, self.indices, self.caption_texts = listing, indices, caption_texts

    def name(self, i: int) -> str:
        """Return the path relative to the folder."""
        return self.listing["names"][self.indices[i]]

    def encoded_size(self, i: int) -> int:
        """Return the size of the file."""
        return int(self.listing["sizes"][self.indices[i]])

    def path(self, i: int) -> str:
        """Return the path of the file."""
        return os.path.join(self.uri, self.name(i))

    def read(self, i: int) -> bytes:
        """Return the bytes of the file."""
        try:
            return untrusted.read_bytes(Path(self.path(i)), untrusted.MAX_ITEM_BYTES)
        except ValueError as error:
            raise UnreadableImageError("", str(error)) from None

    def caption(self, i: int) -> str:
        """Return the caption of one image."""
        known = self.caption_texts if self._captions is None else self._captions
        return self._read_caption(i)[0] if known is None else known[i]

    def _read_caption(self, i: int) -> tuple[str, bool]:
        """Return the caption, and whether it is UTF-8."""
        if self.listing["has_caption_file"][self.indices[i]]:
            try:
                return decode_text(untrusted.read_bytes(self._caption_path(i), untrusted.MAX_CAPTION_BYTES))
            except ValueError as error:
                raise UnreadableImageError("", f"its caption cannot be read: {error}") from None
        return self.class_names[self.labels[i]] if self.class_names else "", True

    def _caption_path(self, i: int) -> Path:
        return Path(self.path(i)).with_suffix(".txt")

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


def open_folder(uri: str) -> FolderSource:
    """Open a folder whose sub-folders, if any, are the classes. Raises UsageError if one has no images."""
    listing = _list_folder(uri)
    return FolderSource(uri, listing, *labels_from_folders(uri, listing["top_folders"], listing["folders"]))


def open_captioned_folder(uri: str, captions_file: str) -> FolderSource:
    """Open a folder with a file of captions: every line is a sample, in that order; sub-folders are not classes.

    Raises:
        UsageError: The file cannot be read, or names missing images.
    """
    listing = _list_folder(uri)
    pairs, not_utf8 = (_read_jsonl if captions_file.endswith(".jsonl") else _read_parquet)(
        os.path.join(uri, captions_file)
    )
    index = {name: i for i, name in enumerate(listing["names"])}
    files = [os.path.normpath(file) for file, _ in pairs]
    missing = [file for file in files if file not in index]
    if missing:
        raise UsageError(
            f"data.source={uri}: {len(missing)} of the {len(files)} images that {captions_file} names are not there: "
            f"{format_names(missing)}"
        )
    if not files:
        raise UsageError(f"data.source={uri}: {captions_file} names no image")
    notes = caption_notes(uri, len(files), sum(not text for _, text in pairs), not_utf8)
    left = len(index) - len(set(files))
    if left:
        notes.append(f"{left} images in {uri} are left out: {captions_file} does not name them")
    chosen, texts = np.array([index[file] for file in files]), StringArray.from_strings(text for _, text in pairs)
    return FolderSource(uri, listing, chosen, np.zeros(len(files), np.int64), (), notes, texts)


def _read_jsonl(path: str) -> tuple[list[tuple[str, str]], int]:
    """Return (file, caption) of every line of a .jsonl, and the number of lines that are not UTF-8."""
    pairs, wrong, not_utf8 = [], [], 0
    try:
        content = untrusted.read_bytes(Path(path), untrusted.MAX_ITEM_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from None
    for number, raw in enumerate(content.splitlines(), start=1):
        line, utf8 = decode_text(raw)
        if not line:
            continue
        not_utf8 += not utf8
        try:
            row = untrusted.parse_json(line)
            file = next(row[key] for key in FILE_COLUMNS if key in row)
            text = next(row[key] for key in TEXT_COLUMNS if key in row)
            pairs.append((file + "", replace_surrogates(text or "")))
        except (ValueError, TypeError, AttributeError, StopIteration):
            wrong.append(f"line {number}")
    if wrong:
        raise UsageError(
            f'{path}: {len(wrong)} lines are not like {{"file": "a.png", "text": "a caption"}}: {format_names(wrong)}'
        )
    return pairs, not_utf8


def _read_parquet(path: str) -> tuple[list[tuple[str, str]], int]:
    """Return (file, caption) of every row of a .parquet."""
    files, texts = read_column(path, FILE_COLUMNS), read_column(path, TEXT_COLUMNS)
    if len(files) != len(texts):
        raise UsageError(f"{path} is damaged: it has {len(files)} files and {len(texts)} captions")
    if not all(isinstance(file, str) and isinstance(text, str | None) for file, text in zip(files, texts, strict=True)):
        raise UsageError(f"{path}: its columns of files and captions must hold texts, with no file missing")
    return [(file, replace_surrogates(text or "")) for file, text in zip(files, texts, strict=True)], 0


def _list_folder(uri: str) -> Listing:
    return cached_listing(uri, "folder", lambda stamps: _scan_tree(uri, stamps))


def _scan_tree(uri: str, stamps: FileStamps) -> Listing:
    """List every image below a folder, sorted: name, size, whether it has a .txt, and its top-level folder (or -1)."""
    images, folders, waiting = [], [], [""]
    while waiting:
        inside = waiting.pop()
        folder = os.path.join(uri, inside)
        try:
            stamps[os.path.abspath(folder)] = file_stamp(folder)
            with os.scandir(folder) as listed:
                entries = list(listed)
        except OSError as error:
            raise UsageError(
                f"data.source={uri}: {format_names([folder])} cannot be listed ({error.strerror})"
            ) from None
        texts = {entry.name[:-4] for entry in entries if entry.name.endswith(".txt")}
        for entry in entries:
            if entry.name.startswith(".") and (not inside or not entry.is_dir()):
                continue
            if entry.is_dir(follow_symlinks=not inside):  # of links to folders only those at the top are followed
                waiting.append(f"{inside}{entry.name}/")
                folders += [entry.name] if not inside else []
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (entry.is_file() or _file_size(entry) < 0):
                images.append(
                    (f"{inside}{entry.name}".split("/"), _file_size(entry), os.path.splitext(entry.name)[0] in texts)
                )
    images.sort()
    index = {name: i for i, name in enumerate(sorted(folders))}
    return {
        "names": StringArray.from_strings("/".join(parts) for parts, _, _ in images),
        "sizes": np.array([size for _, size, _ in images], np.int64),
        "has_caption_file": np.array([has_caption for _, _, has_caption in images], bool),
        "top_folders": np.array([index[parts[0]] if len(parts) > 1 else -1 for parts, _, _ in images], np.int64),
        "folders": StringArray.from_strings(sorted(folders)),
    }


def _file_size(entry: os.DirEntry) -> int:
    """Return the size of a file, -1 for a dangling link, which reading reports."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1
