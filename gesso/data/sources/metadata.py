"""Files that describe the images beside them: captions and classes by file name, and the labels of EDM2's dataset.json.

Legend: N rows.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gesso import untrusted
from gesso.data.sources.base import (
    decode_text,
    format_names,
    numbered_class_names,
    replace_surrogates,
    validate_labels,
)
from gesso.data.sources.parquet import read_column
from gesso.errors import UsageError

METADATA_FILES = (
    "captions.jsonl", "captions.parquet", "captions.csv", "metadata.jsonl", "metadata.parquet", "metadata.csv",
)  # fmt: skip
"""File names, of which the first that a folder has is read; metadata.* is the imagefolder of Hugging Face."""
FILE_COLUMNS, TEXT_COLUMNS, LABEL_COLUMN = ("file", "file_name", "path"), ("text", "caption"), "label"
LabelValue = int | str | None


class MetadataRow(NamedTuple):
    """Image of a metadata file: its path relative to that file, its caption and its class; None: has no such column."""

    file: str
    text: str | None
    label: LabelValue


class Metadata(NamedTuple):
    """Rows of a metadata file, and the number of those that are not UTF-8."""

    rows: list[MetadataRow]
    not_utf8: int


def read_metadata(path: str, raw: bytes) -> Metadata:
    """Read a metadata file; its suffix tells the format.

    Args:
        path: Name for messages.
        raw: Content of the file.

    Raises:
        UsageError: The file cannot be read, or rows have no file name, or neither a caption nor a label.
    """
    if path.endswith(".parquet"):
        return Metadata(_read_parquet(path, raw), 0)
    return _read_lines(path, raw, _csv_rows if path.endswith(".csv") else _json_rows)


def _json_rows(raw: bytes) -> Iterator[tuple[str, Any, bool]]:
    """Yield (place, row, is UTF-8) for every line that is not empty; the row is None if it is no JSON."""
    for number, line in enumerate(raw.splitlines(), start=1):
        text, utf8 = decode_text(line)
        if text:
            try:
                row = untrusted.parse_json(text)
            except ValueError:
                row = None
            yield f"line {number}", row, utf8


def _csv_rows(raw: bytes) -> Iterator[tuple[str, Any, bool]]:
    """Yield (place, row, is UTF-8) for every row of a table with a header."""
    text, utf8 = decode_text(raw)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = iter(reader)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield f"line {reader.line_num}", None, utf8
            continue
        yield f"line {reader.line_num}", row, utf8
        utf8 = True  # counted once: rows are not decoded one by one


def _read_lines(path: str, raw: bytes, read: Callable[[bytes], Iterator[tuple[str, Any, bool]]]) -> Metadata:
    rows, wrong, not_utf8 = list[MetadataRow](), list[str](), 0
    for place, row, utf8 in read(raw):
        not_utf8 += not utf8
        try:
            file = next(row[key] for key in FILE_COLUMNS if key in row)
            text = next((row[key] for key in TEXT_COLUMNS if key in row), None)
            label = row.get(LABEL_COLUMN)
            has_text = any(key in row for key in TEXT_COLUMNS)
            if not (has_text or LABEL_COLUMN in row) or not isinstance(label, LabelValue) or isinstance(label, bool):
                raise ValueError
            rows.append(MetadataRow(file + "", replace_surrogates(text or "") if has_text else None, label))
        except (ValueError, TypeError, AttributeError, StopIteration):
            wrong.append(place)
    if wrong:
        raise UsageError(
            f'{path}: {len(wrong)} lines are not like {{"file": "a.png", "text": "a caption"}} '
            f"(or file_name, and caption or label): {format_names(wrong)}"
        )
    return Metadata(rows, not_utf8)


def _read_parquet(path: str, raw: bytes) -> list[MetadataRow]:
    files = read_column(path, FILE_COLUMNS, raw)
    labels = read_column(path, (LABEL_COLUMN,), raw, required=False)
    texts = read_column(path, TEXT_COLUMNS, raw, required=labels is None)
    no_values = [None] * len(files or ())
    rows = list(zip(files or (), texts or no_values, labels or no_values, strict=True))
    if not all(isinstance(file, str) and isinstance(text, str | None) for file, text, _ in rows):
        raise UsageError(f"{path}: its columns of files and captions must hold texts, with no file missing")
    return [
        MetadataRow(file, replace_surrogates(text or "") if texts is not None else None, label)
        for file, text, label in rows
    ]


def metadata_labels(
    uri: str, labels: Sequence[LabelValue], name: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """Return labels (N,) int64, class names and notes for the label column of a metadata file.

    Numbers are classes, texts are class names in alphabetical order; without labels there are no classes.

    Raises:
        UsageError: A number is no class.
    """
    missing = sum(label is None or label == "" for label in labels)
    if missing:
        notes = [f"{missing} of {len(labels)} images of {uri} have no label: training without classes"]
        return np.zeros(len(labels), np.int64), (), notes if missing < len(labels) else []
    texts = [str(label).strip() for label in labels]
    if all(text.isascii() and text.isdigit() for text in texts):
        numbers = validate_labels(uri, [int(text) for text in texts], name)
        return numbers, numbered_class_names(numbers), []
    if all(isinstance(label, int) for label in labels):
        return validate_labels(uri, labels, name), (), []
    names = tuple(sorted(set(texts)))
    index = {text: i for i, text in enumerate(names)}
    return np.array([index[text] for text in texts], np.int64), names, []


def parse_dataset_json(raw: bytes) -> list[tuple[str, Any]] | None:
    """Return [(name, label), ...] of EDM2's dataset.json, None for {"labels": null}.

    Raises:
        ValueError: It has another form.
    """
    try:
        pairs = untrusted.parse_json(raw)["labels"]
        return None if pairs is None else [(str(name), label) for name, label in pairs]
    except (ValueError, KeyError, TypeError):
        raise ValueError('it is not {"labels": [[name, class], ...]} or {"labels": null}') from None


def json_caption(raw: bytes) -> tuple[str, bool, bool]:
    """Return "caption" of a JSON object, whether it is UTF-8, and whether it is readable."""
    text, utf8 = decode_text(raw)
    try:
        caption = untrusted.parse_json(text).get("caption")
    except (ValueError, AttributeError):
        return "", utf8, False
    return (replace_surrogates(caption), utf8, True) if isinstance(caption, str) else ("", utf8, caption is None)
