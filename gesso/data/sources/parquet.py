"""Images in parquet files, as data sets on the Hugging Face hub have them.

Legend: N images. A row group is the unit of reading; files for training should have small ones.
"""

import contextlib
import functools
import io
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gesso import untrusted
from gesso.data.sources.base import (
    Source,
    StringArray,
    caption_notes,
    file_stamp,
    format_names,
    hash_stamps,
    numbered_class_names,
    relative_names,
    replace_surrogates,
    validate_labels,
)
from gesso.errors import UnreadableImageError, UsageError, install_command

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
"""columns preferred, in this order, where several hold bytes"""
CAPTION_COLUMNS = ("caption", "text", "prompt")
MAX_CACHED_ROW_GROUPS = 4
"""row groups held in memory"""
MAX_ROWS = 2**26
"""Maximum number of rows of a source."""
MAX_ROW_GROUP_BYTES = 2**30
"""Maximum size of the images and captions of a row group, unpacked."""
MAX_TEXT_COLUMN_BYTES = 2**30
"""Maximum size of a column of texts of a file."""
TEXT_ROWS = 1024
"""Rows of texts read at a time."""


def import_pyarrow():
    """Return pyarrow and its parquet reader. Raises UsageError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"parquet files are read with pyarrow: {install_command('parquet')}") from None
    return pyarrow, pyarrow.parquet


def read_column(path: str, names: Sequence[str], raw: bytes | None = None, required: bool = True) -> list | None:
    """Return the first of the columns `names` that a file has.

    Args:
        path: The file.
        names: Names of columns.
        raw: Content of the file, if it is in memory.
        required: False returns None if the file has none of the columns.

    Raises:
        UsageError: A required column is missing, or the file is damaged.
    """
    try:
        with open_parquet(path, raw=raw) as file:
            there = file.schema_arrow.names
            column = next((name for name in names if name in there), None)
        if column is None:
            if not required:
                return None
            raise UsageError(f"{path} has no column {' or '.join(names)}; there are: {format_names(there, 12)}")
        values, num_bytes = [], 0
        with open_parquet(path, keep_dictionaries=True, raw=raw) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"it has more than {MAX_ROWS:,} rows")
            for batch in file.iter_batches(TEXT_ROWS, columns=[column]):
                rows = batch.column(0).to_pylist()
                num_bytes += sum(len(row) for row in rows if isinstance(row, str | bytes))
                if num_bytes > MAX_TEXT_COLUMN_BYTES:
                    raise ValueError(f"column {column} has more than {MAX_TEXT_COLUMN_BYTES / 2**20:g} MiB")
                values += rows
        return values
    except ValueError as error:
        raise _damaged_error(path, path, error) from None


@contextlib.contextmanager
def open_parquet(path: str, keep_dictionaries: bool = False, raw: bytes | None = None) -> Iterator[Any]:
    """Yield an open parquet file.

    Args:
        path: The file.
        keep_dictionaries: Hold texts and bytes as dictionaries in memory, since a small file may repeat a large value a
            billion times.
        raw: Content of the file, if it is in memory.

    Raises:
        ValueError: The file is damaged or cannot be read, also in the body.
    """
    pa, pq = import_pyarrow()
    try:
        if raw is None:
            os.close(untrusted.open_regular(Path(path)))  # pyarrow waits for pipes
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(pq.ParquetFile(path if raw is None else io.BytesIO(raw)))
            if keep_dictionaries:
                leaves = [file.schema.column(j) for j in range(file.metadata.num_columns)]
                names = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
                source = path if raw is None else io.BytesIO(raw)
                file = stack.enter_context(pq.ParquetFile(source, metadata=file.metadata, read_dictionary=names))
            yield file
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, RuntimeError, MemoryError) as error:
        raise ValueError(_one_line(error)) from None


class ParquetSource(Source):
    """Rows with encoded images: bytes, or a struct with bytes as Hugging Face stores an Image.

    Classes come from an integer column `label` (with names if Hugging Face's metadata have them), captions from the
    first of CAPTIONS. The name of an image is its file and row, since names in rows need not be unique.

    Raises:
        UsageError: A file is damaged, has no images or other columns than the first file, or labels are invalid.
    """

    def __init__(self, uri: str, paths: Sequence[str], more_notes: Sequence[str] = ()):
        pa, _ = import_pyarrow()
        self.row_groups: list[tuple[str, int, int, int]] = []  # file, row group, its bytes, rows of the file before it
        labels, starts = [], [0]
        for path in paths:
            try:
                with open_parquet(path) as file:
                    if path == paths[0]:
                        self.image_column, self.label_column, self.caption_column, names, notes = _select_columns(
                            uri, file.schema_arrow, pa.types
                        )
                    missing = {*filter(None, (self.image_column, self.label_column, self.caption_column))} - {
                        *file.schema_arrow.names
                    }
                    if missing:
                        raise UsageError(f"data.source={uri}: {path} has no column {min(missing)}, as {paths[0]} has")
                    before = starts[-1]
                    for g in range(file.num_row_groups):
                        about = file.metadata.row_group(g)
                        self.row_groups.append((path, g, about.total_byte_size, starts[-1] - before))
                        starts.append(starts[-1] + about.num_rows)
                    if starts[-1] > MAX_ROWS:
                        raise ValueError(f"the source has more than {MAX_ROWS:,} rows")
                    if self.label_column:
                        labels += file.read(columns=[self.label_column]).column(0).to_pylist()
            except ValueError as error:
                raise _damaged_error(uri, path, error) from None
        if not starts[-1]:
            raise UsageError(f"data.source={uri}: no rows in {format_names(paths)}")
        self.paths, self.starts = paths, np.array(starts)
        self.file_names = dict(zip(paths, relative_names(paths), strict=True))
        if self.label_column:
            label_array = validate_labels(uri, labels, self.name, len(names) or None)
            names = names or numbered_class_names(label_array)
        else:
            label_array = np.zeros(starts[-1], np.int64)
        super().__init__(uri, label_array, names, [*notes, *more_notes])
        self._cached_row_group = functools.lru_cache(MAX_CACHED_ROW_GROUPS)(self._read_row_group)
        self._read_lock = threading.Lock()  # of many threads in one row group the first reads it

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the row group and the row in it."""
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        return group, i - int(self.starts[group])

    def name(self, i: int) -> str:
        """Return the file and row."""
        group, row = self._locate(i)
        path, _, _, before = self.row_groups[group]
        return f"{self.file_names[path]}:{before + row}"

    def encoded_size(self, i: int) -> int:
        """Return the size of the row group: that of one image is not known before it is read."""
        return self.row_groups[self._locate(i)[0]][2]

    def stamp(self) -> str:
        """Return a hash of size and modification time of every file."""
        return hash_stamps((self.file_names[path], file_stamp(path)) for path in self.paths)

    def _read_row_group(self, group: int):
        path, g, _, _ = self.row_groups[group]
        columns = [c for c in (self.image_column, self.caption_column) if c]
        try:
            with open_parquet(path, keep_dictionaries=True) as file:
                about = file.metadata.row_group(g)
                parts = [about.column(j) for j in range(about.num_columns)]
                used = [part for part in parts if part.path_in_schema.split(".")[0] in columns]
                if sum(part.total_uncompressed_size for part in used) > MAX_ROW_GROUP_BYTES:
                    raise ValueError(f"it has more than {MAX_ROW_GROUP_BYTES / 2**20:g} MiB; write smaller row groups")
                return file.read_row_group(g, columns=columns)
        except ValueError as error:
            raise UnreadableImageError("", f"its row group cannot be read: {error}") from error

    def _cell(self, i: int, column: str):
        group, row = self._locate(i)
        with self._read_lock:
            rows = self._cached_row_group(group)
        try:
            return rows.column(column)[row].as_py()
        except (ValueError, LookupError) as error:  # a damaged dictionary or text
            raise UnreadableImageError("", f"its row cannot be read: {_one_line(error)}") from error

    def read(self, i: int) -> bytes:
        """Return the encoded image."""
        cell = self._cell(i, self.image_column)
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise UnreadableImageError("", "its row has no bytes")
        return data

    def caption(self, i: int) -> str:
        """Return the caption of one row."""
        return replace_surrogates(self._cell(i, self.caption_column) or "") if self.caption_column else ""

    def read_captions(self) -> Sequence[str]:
        """Return all captions."""
        if not self.caption_column:
            return [""] * len(self)
        texts = StringArray.from_strings(
            replace_surrogates(text or "")
            for path in self.paths
            for text in read_column(path, [self.caption_column]) or ()
        )
        self.notes += caption_notes(self.uri, len(self), sum(not text for text in texts), 0)
        return texts


def _select_columns(uri: str, schema, types) -> tuple[str, str | None, str | None, tuple[str, ...], list[str]]:
    """Return the columns of images, labels and captions, the class names, and notes."""

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    preferred = [name for name in IMAGE_COLUMNS if name in images] or images
    if not preferred or (len(images) > 1 and preferred == images):
        raise UsageError(
            f"data.source={uri}: {'several columns hold' if images else 'no column holds'} bytes of images; "
            f"one named image is expected, there are: {format_names(schema.names, 12)}"
        )
    label = "label" if "label" in schema.names else None
    text = next((name for name in CAPTION_COLUMNS if name in schema.names), None)
    notes = []
    if label and not types.is_integer(schema.field(label).type):
        notes.append(f"column label of {uri} holds {schema.field(label).type}, not integers: training without classes")
        label = None
    if text and not (types.is_string(schema.field(text).type) or types.is_large_string(schema.field(text).type)):
        notes.append(f"column {text} of {uri} holds {schema.field(text).type}, not texts: there are no captions")
        text = None
    return preferred[0], label, text, _class_names(schema.metadata or {}) if label else (), notes


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Return the class names in the metadata of the datasets library."""
    try:
        names = untrusted.parse_json(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _damaged_error(uri: str, path: str, error: Exception) -> UsageError:
    return UsageError(f"data.source={uri}: {path} is no parquet file that can be read ({_one_line(error)})")
