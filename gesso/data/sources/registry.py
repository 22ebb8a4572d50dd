"""Open a source of images: a named toy source, a folder, a zip, webdataset tars or parquet files.

The kind of a path is detected from its content. A source returns encoded images by index and decodes nothing.
"""

import difflib
import itertools
import math
import os
import re
import zipfile
from pathlib import Path

from gesso import hub, untrusted
from gesso.data.sources.archives import TarSource, ZipSource
from gesso.data.sources.base import IMAGE_SUFFIXES, Source, format_names
from gesso.data.sources.custom import CustomSource
from gesso.data.sources.folders import CAPTION_FILES, open_captioned_folder, open_folder
from gesso.data.sources.idx import IdxSource, idx_files
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
MAX_PATTERN_FILES = 1_000_000
"""Maximum number of files that one {000..009} pattern may name."""


def open_source(uri: str) -> Source:
    """Open a source by its name (NAMED_SOURCES, custom:NAME, hub:OWNER/NAME) or by its path (SOURCE_KINDS).

    Raises:
        UsageError: The source is missing, empty, malformed, or of an unknown kind.
    """
    uri = str(uri)
    if (hub_id := hub.parse_hub_id(uri)) is not None:
        return open_source(str(hub.download(hub_id, repo_type="dataset")))
    name, _, count = uri.partition(":")
    if name == "custom":
        return CustomSource(uri, count)
    if name in NAMED_SOURCES:
        return _open_named(uri, name, count)
    if not uri.strip() or uri == ".":
        raise UsageError("which images? Write gesso train folder:/path/to/images, or data.source=/path/to/images")
    if os.path.isdir(uri):
        return _open_in_folder(uri)
    if os.path.exists(uri):
        return _open_file(uri)
    if re.search(r"\{\d+\.\.\d+\}", uri):
        return _open_pattern(uri)
    close = difflib.get_close_matches(name, NAMED_SOURCES, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"data.source={uri}: there is no such folder or file{meant} "
        f"(the named sources are: {', '.join(NAMED_SOURCES)}; any other is the path of {SOURCE_KINDS})"
    )


def _open_named(uri: str, name: str, count: str) -> Source:
    if name.startswith("digits"):
        if count:
            raise UsageError(f"data.source={uri}: the digits are as many as they are; write {name}")
        return DigitsSource(name)
    if count and not (count.isascii() and count.isdigit() and 0 < int(count) <= 10**8):
        raise UsageError(f"data.source={uri}: {count!r} is no number of pictures; write {name}:5000")
    return ShapesSource(uri, int(count or DEFAULT_NUM_SHAPES), single=name == "shapes-class")


def _open_in_folder(uri: str) -> Source:
    try:
        names = sorted(name for name in os.listdir(uri) if not name.startswith("."))
    except OSError as error:
        raise UsageError(f"data.source={uri}: cannot be listed ({error.strerror})") from None
    captions = next((name for name in CAPTION_FILES if name in names), None)
    if captions:
        return open_captioned_folder(uri, captions)
    if not any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        if idx_files(names):
            return IdxSource(uri)
        # Tars first: img2dataset writes a parquet file next to each tar.
        for suffix, kind in ((".tar", TarSource), (".parquet", ParquetSource)):
            paths = [os.path.join(uri, name) for name in names if name.endswith(suffix)]
            if paths:
                return kind(uri, paths)
    return open_folder(uri)


def _open_file(uri: str) -> Source:
    try:
        with open(untrusted.open_regular(Path(uri)), "rb") as file:
            head = file.read(4)
    except (OSError, ValueError) as error:
        raise UsageError(f"data.source={uri}: cannot be read ({error})") from None
    if head == b"PAR1":
        return ParquetSource(uri, [uri])
    if zipfile.is_zipfile(uri) or head == b"PK\3\4":
        return ZipSource(uri)
    if uri.endswith(".tar"):
        return TarSource(uri, [uri])
    if idx_files([os.path.basename(uri)]):
        return IdxSource(uri)
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
