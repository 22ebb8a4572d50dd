"""Images inside of parquet files, as datasets on the Hub have them.

Legend: N images. A row group is what parquet reads at once; files for training should have small ones.
"""

import functools
import json
import os
import threading
from collections.abc import Sequence

import numpy as np

from gesso.data.listing import Source, Texts, caption_notes, checked_labels, numbered, shown, sound
from gesso.errors import Unreadable, UsageError

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
"""columns preferred, in this order, where several hold bytes"""
CAPTIONS = ("caption", "text", "prompt")
OPEN_GROUPS = 4
"""row groups held in memory"""


def pyarrow():
    """pyarrow and its reader of parquet. Raises UsageError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("parquet files are read with pyarrow: pip install 'gesso[parquet]'") from None
    return pyarrow, pyarrow.parquet


def column(path: str, names: Sequence[str]) -> list:
    """Values of the first of `names` that is a column of a file. Raises UsageError when none is, or it is damaged."""
    pa, pq = pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            found = next((name for name in names if name in there), None)
            if found is None:
                raise UsageError(f"{path} has no column {' or '.join(names)}; there are: {shown(there, 12)}")
            return file.read(columns=[found]).column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, path, error) from None


class Parquet(Source):
    """Rows with encoded images: bytes, or a struct with bytes as Hugging Face stores an Image.

    Classes from a column `label` of integers (their names where Hugging Face's metadata tell them), captions from the
    first of CAPTIONS. An image's name is its file and row, as what rows say of names need not be unique.

    Raises UsageError when a file is damaged, has no images or not the columns of the first file, or labels are wrong.
    """

    def __init__(self, where: str, paths: Sequence[str]):
        pa, pq = pyarrow()
        self.groups: list[tuple[str, int, int, int]] = []  # file, row group, its bytes, rows of the file before it
        labels, starts = [], [0]
        for path in paths:
            try:
                with pq.ParquetFile(path) as file:
                    if path == paths[0]:
                        self.image, self.label, self.text, names, notes = _columns(where, file.schema_arrow, pa.types)
                    missing = {*filter(None, (self.image, self.label, self.text))} - {*file.schema_arrow.names}
                    if missing:
                        raise UsageError(f"data.source={where}: {path} has no column {min(missing)}, as {paths[0]} has")
                    before = starts[-1]
                    for g in range(file.num_row_groups):
                        about = file.metadata.row_group(g)
                        self.groups.append((path, g, about.total_byte_size, starts[-1] - before))
                        starts.append(starts[-1] + about.num_rows)
                    if self.label:
                        labels += file.read(columns=[self.label]).column(0).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise _damaged(where, path, error) from None
        if not starts[-1]:
            raise UsageError(f"data.source={where}: no rows in {shown(paths)}")
        self.paths, self.starts = paths, np.array(starts)
        if self.label:
            labels = checked_labels(where, labels, self.name, len(names) or None)
            names = names or numbered(labels)
        super().__init__(where, labels if self.label else np.zeros(starts[-1], np.int64), names, notes)
        self._group = functools.lru_cache(OPEN_GROUPS)(self._read_group)
        self._one_at_a_time = threading.Lock()  # of many threads in one row group the first reads it

    def _place(self, i: int) -> tuple[int, int]:
        """Which row group, and which of its rows."""
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        return group, i - int(self.starts[group])

    def name(self, i: int) -> str:
        group, row = self._place(i)
        path, _, _, before = self.groups[group]
        return f"{os.path.basename(path)}:{before + row}"

    def bytes_of(self, i: int) -> int:
        """Of its row group: those of one image are not known before it is read."""
        return self.groups[self._place(i)[0]][2]

    def _read_group(self, group: int):
        pa, pq = pyarrow()
        path, g, _, _ = self.groups[group]
        try:
            with pq.ParquetFile(path) as file:
                return file.read_row_group(g, columns=[c for c in (self.image, self.text) if c])
        except pa.ArrowException as error:
            raise Unreadable("", f"its row group is damaged: {_line(error)}") from error

    def _cell(self, i: int, column: str):
        group, row = self._place(i)
        with self._one_at_a_time:
            rows = self._group(group)
        return rows.column(column)[row].as_py()

    def read(self, i: int) -> bytes:
        cell = self._cell(i, self.image)
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise Unreadable("", "its row has no bytes")
        return data

    def caption(self, i: int) -> str:
        return sound(self._cell(i, self.text) or "") if self.text else ""

    def read_captions(self) -> Sequence[str]:
        if not self.text:
            return [""] * len(self)
        texts = Texts.of(sound(text or "") for path in self.paths for text in column(path, [self.text]))
        self.notes += caption_notes(self.where, len(self), sum(not text for text in texts), 0)
        return texts


def _columns(where: str, schema, types) -> tuple[str, str | None, str | None, tuple[str, ...], list[str]]:
    """Columns of the images, labels and captions; names of classes; notes."""

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    preferred = [name for name in IMAGES if name in images] or images
    if not preferred or (len(images) > 1 and preferred == images):
        raise UsageError(
            f"data.source={where}: {'several columns hold' if images else 'no column holds'} bytes of images; "
            f"one named image is expected, there are: {shown(schema.names, 12)}"
        )
    label = "label" if "label" in schema.names else None
    text = next((name for name in CAPTIONS if name in schema.names), None)
    notes = []
    if label and not types.is_integer(schema.field(label).type):
        notes.append(
            f"column label of {where} holds {schema.field(label).type}, not integers: training without classes"
        )
        label = None
    if text and not (types.is_string(schema.field(text).type) or types.is_large_string(schema.field(text).type)):
        notes.append(f"column {text} of {where} holds {schema.field(text).type}, not texts: there are no captions")
        text = None
    return preferred[0], label, text, _class_names(schema.metadata or {}) if label else (), notes


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """As the datasets library records them."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _damaged(where: str, path: str, error: Exception) -> UsageError:
    return UsageError(f"data.source={where}: {path} is no parquet file that can be read ({_line(error)})")
