"""Open a source of images: a named toy source, a folder, a zip, webdataset tars or parquet files.

The kind of a path is detected from its content. A source returns encoded images by index and decodes nothing.
"""

import difflib
import itertools
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gesso import hub, untrusted
from gesso.data.sources import layout
from gesso.data.sources.archives import TarSource, ZipSource
from gesso.data.sources.base import IMAGE_SUFFIXES, Source, format_names
from gesso.data.sources.custom import CustomSource
from gesso.data.sources.folders import FolderScan, FolderSource, scan_folder
from gesso.data.sources.idx import IdxSource, idx_files
from gesso.data.sources.metadata import METADATA_FILES
from gesso.data.sources.parquet import ParquetSource
from gesso.data.sources.toy import DigitsSource, ShapesSource
from gesso.errors import UsageError

NAMED_SOURCES = {
    "digits": "1,797 scanned digits of scikit-learn",
    "digits-mixed-resolution": "the same; every second image is reduced to 4x4 and enlarged again",
    "shapes": "procedural images of one or two shapes, with captions; shapes:5000 for 5,000 of them",
    "shapes-class": "the same with one shape; its kind is the class",
}
SOURCE_KINDS = (
    "a folder whose sub-folders are the classes, a folder of images with captions (.txt beside each, or "
    "captions.jsonl), EDM2's zip, webdataset tars (a.tar, a folder of them, or a-{000..009}.tar), parquet files, IDX "
    "files (MNIST, Fashion-MNIST)"
)
DEFAULT_NUM_SHAPES = 20_000
PACKED_SUFFIXES = (".tar", ".parquet", ".zip")
"""Suffixes of files that hold images, in the order of choice: img2dataset writes a parquet file next to each tar."""
MIN_IMAGE_SHARE = 0.1
"""Share of the bytes of archives in a folder that its images must have: fewer are strays beside the archives."""
MAX_PATTERN_FILES = 1_000_000
"""Maximum number of files that one {000..009} pattern may name."""


def split_uri(uri: str) -> tuple[str, str | None]:
    """Return the path and the part of PATH#PART, where PART is one of layout.PARTS; None for another text."""
    path, _, part = uri.rpartition("#")
    return (path, part) if path and part in layout.PARTS and not os.path.exists(uri) else (uri, None)


def open_source(uri: str) -> Source:
    """Open a source by its name (NAMED_SOURCES, custom:NAME, hub:OWNER/NAME) or by its path (SOURCE_KINDS).

    PATH#val reads a held-out split, PATH#classes reads sub-folders as classes although images lie beside them.

    Raises:
        UsageError: The source is missing, empty, malformed, or of an unknown kind.
    """
    uri = str(uri)
    path, part = split_uri(uri)
    if (hub_id := hub.parse_hub_id(path)) is not None:
        return _open_hub(path, str(hub.download(hub_id, repo_type="dataset")), part)
    name, _, count = uri.partition(":")
    if name == "custom":
        return CustomSource(uri, count)
    if name in NAMED_SOURCES:
        return _open_named(uri, name, count)
    if not uri.strip() or uri == ".":
        raise UsageError("which images? Write gesso train folder:/path/to/images, or data.source=/path/to/images")
    if os.path.isdir(path):
        return _open_in_folder(uri, path, part)
    if os.path.exists(path):
        return _open_file(uri, path, part)
    if re.search(r"\{\d+\.\.\d+\}", path):
        if part:
            raise UsageError(f"data.source={uri}: only folders and zips have parts; write {path}")
        return _open_pattern(path)
    close = difflib.get_close_matches(name, NAMED_SOURCES, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"data.source={uri}: there is no such folder or file{meant} "
        f"(the named sources are: {', '.join(NAMED_SOURCES)}; any other is the path of {SOURCE_KINDS})"
    )


def _open_hub(uri: str, folder: str, part: str | None) -> Source:
    """Open a downloaded repository; notes and held-out splits name it by its address."""
    source = open_source(f"{folder}#{part}" if part else folder)
    source.notes = [note.replace(folder, uri) for note in source.notes]
    source.held_out = tuple(name.replace(folder, uri) for name in source.held_out)
    return source


def _open_named(uri: str, name: str, count: str) -> Source:
    if name.startswith("digits"):
        if count:
            raise UsageError(f"data.source={uri}: the digits are as many as they are; write {name}")
        return DigitsSource(name)
    if count and not (count.isascii() and count.isdigit() and 0 < int(count) <= 10**8):
        raise UsageError(f"data.source={uri}: {count!r} is no number of pictures; write {name}:5000")
    return ShapesSource(uri, int(count or DEFAULT_NUM_SHAPES), single=name == "shapes-class")


def _open_in_folder(uri: str, path: str, part: str | None) -> Source:
    scan = scan_folder(uri, path)
    sizes = {name: size for name, (size, _) in zip(scan.names, scan.stamps, strict=True)}
    suffixes = (*IMAGE_SUFFIXES, *layout.HEIF_SUFFIXES)
    images = [name for name in scan.names if name.lower().endswith(suffixes) or layout.is_latents(name)]
    top = [name for name in scan.names if "/" not in name]
    if idx_files(top) and not set(top) & set(images):
        return IdxSource(path)
    for suffix in PACKED_SUFFIXES:
        names = _packed_files(scan, suffix)
        if names and not images:
            return _open_packed(uri, path, part, scan, suffix)
        if sum(map(sizes.__getitem__, images)) < MIN_IMAGE_SHARE * sum(map(sizes.__getitem__, names)):
            raise UsageError(
                f"data.source={uri} has {len(names)} {suffix} files ({format_names(names)}) and {len(images)} images "
                f"({format_names(images)}), so it is not clear which are meant: move one kind into a folder of its own"
            )
    return FolderSource(uri, path, scan, part)


def _packed_files(scan: FolderScan, suffix: str) -> list[str]:
    """Return the files that may hold images: those with a suffix, without metadata files."""
    return [
        name for name in scan.names if name.lower().endswith(suffix) and name.rpartition("/")[2] not in METADATA_FILES
    ]


def _open_packed(uri: str, path: str, part: str | None, scan: FolderScan, suffix: str) -> Source:
    """Open the .tar, .parquet or .zip files of a folder: those of the split train, if they are of several splits."""
    names = _packed_files(scan, suffix)
    splits: dict[str, list[str]] = {}
    for name in names:
        split = next(filter(None, map(layout.split_name, name.split("/"))), "")
        splits.setdefault(split, []).append(name)
    has_splits = "train" in splits and len(splits) > 1
    wanted = part if part and part != layout.ALL_CLASSES else "train"
    if part and part != layout.ALL_CLASSES and part not in splits:
        raise UsageError(f"data.source={uri}: {layout.missing_split(part, filter(None, splits))}")
    chosen, notes, held_out = names, list(scan.notes), tuple[str, ...]()
    if has_splits or part in splits:
        chosen = splits[wanted]
        if wanted != part:
            held_out = tuple(f"{path}#{split}" for split in ("val", "test") if split in splits)
            counts = {split: len(splits[split]) for split in splits if split}
            notes.append(layout.split_note(path, counts, held_out, f"{suffix} files"))
        if rest := splits.get(""):
            notes.append(
                f"{len(rest)} {suffix} files in {path} belong to no split and are not read: {format_names(rest)}"
            )
    is_read = set(names)
    notes += layout.unread_notes(path, [name for name in scan.names if name not in is_read])
    paths = [os.path.join(path, *name.split("/")) for name in chosen]
    source = _open_files(uri, path, chosen, paths, suffix, notes)
    source.held_out = held_out
    return source


def _open_files(
    uri: str, path: str, names: Sequence[str], paths: Sequence[str], suffix: str, notes: Sequence[str]
) -> Source:
    if suffix == ".tar":
        return TarSource(uri, paths, notes)
    if suffix == ".zip":
        if len(paths) > 1:
            raise UsageError(f"data.source={uri} has {len(paths)} zips: name one of them ({format_names(paths)})")
        source = ZipSource(uri, paths[0])
        source.notes += notes
        return source
    folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
    configurations = {tuple(p for p in folder.split("/") if not layout.split_name(p)) for folder in folders}
    if len(configurations) > 1:
        known = [os.path.join(path, *folder.split("/")) for folder in folders]
        setting = layout.quoted(f"data.source={known[0]}")
        raise UsageError(
            f"data.source={uri} has parquet files of several data sets; name one: {setting} (or "
            f"{format_names(known[1:])})"
        )
    return ParquetSource(uri, paths, notes)


def _open_file(uri: str, path: str, part: str | None) -> Source:
    try:
        with open(untrusted.open_regular(Path(path)), "rb") as file:
            head = file.read(4)
    except (OSError, ValueError) as error:
        raise UsageError(f"data.source={uri}: cannot be read ({error})") from None
    if zipfile.is_zipfile(path) or head == b"PK\3\4":
        return ZipSource(uri, path, part)
    if part:
        raise UsageError(f"data.source={uri}: only folders and zips have parts; write {path}")
    if head == b"PAR1":
        return ParquetSource(uri, [path])
    if path.endswith(".tar"):
        return TarSource(uri, [path])
    if idx_files([os.path.basename(path)]):
        return IdxSource(path)
    raise UsageError(f"data.source={uri}: no zip, tar, parquet or IDX file; a source is the path of {SOURCE_KINDS}")


def _open_pattern(uri: str) -> Source:
    """Open the files of a pattern such as name-{000..009}.tar."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", uri)
    bounds = list(zip(parts[1::3], parts[2::3], strict=True))
    if any(int(low) > int(high) for low, high in bounds):
        raise UsageError(f"data.source={uri}: a range goes from the smaller number to the larger")
    if math.prod(int(high) - int(low) + 1 for low, high in bounds) > MAX_PATTERN_FILES:
        raise UsageError(f"data.source={uri}: more than {MAX_PATTERN_FILES} files")
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in bounds]
    paths = [
        "".join(itertools.chain(*zip(parts[::3], [*numbers, ""], strict=True)))
        for numbers in itertools.product(*ranges)
    ]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UsageError(
            f"data.source={uri}: {len(missing)} of {len(paths)} files are not there: {format_names(missing)}"
        )
    kinds = {os.path.splitext(path)[1] for path in paths}
    if kinds not in ({".tar"}, {".parquet"}):
        raise UsageError(f"data.source={uri}: a pattern names .tar or .parquet files")
    return (TarSource if kinds == {".tar"} else ParquetSource)(uri, paths)
