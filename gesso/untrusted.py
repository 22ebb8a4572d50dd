"""Files and text of other people: bounded reading of regular files, JSON and zips, and text that is safe to print.

Everything here raises OSError or ValueError. The reader of each format turns these into a GessoError that names the
file and the remedy.
"""

import contextlib
import io
import json
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

MAX_TEXT_BYTES = 64 * 2**20
"""Maximum size of a JSON file, a line of a log, or a picture of a report."""
MAX_YAML_BYTES = 4 * 2**20
"""Maximum size of a YAML file; its parser takes about a second per MiB."""
MAX_LINE_LENGTH = 4_000
"""Maximum number of characters of a printed line."""
MAX_ITEM_BYTES = 2**30
"""Maximum size of one encoded image or array, packed or not: a file, a member of an archive, a cell of a table."""
MAX_CAPTION_BYTES = 2**20
"""Maximum size of a caption, and of a file beside an image that describes it."""
MAX_ZIP_LIST_BYTES = 512 * 2**20
"""Maximum size of the list of a zip's members, about 5 million of them; each takes about 0.6 kB of memory."""
ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, lzma.LZMAError, EOFError, ValueError,
    LookupError, struct.error,
)  # fmt: skip
"""Errors of zipfile for damaged files, besides OSError."""
MAX_JSON_ITEMS = 4_000_000
"""Maximum number of commas and brackets in JSON: each item takes up to 100 bytes of memory."""
MAX_JSON_DEPTH = 100
"""Maximum depth of JSON."""
CLOSE_ON_EXEC, NON_BLOCKING, NO_FOLLOW = (getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW"))
"""Flags of os.open; 0 on Windows, which has none of them."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Return text with control characters and marks that reorder it replaced by their codes, such as x1b for escape.

    Newlines and tabs are kept. The text still identifies what it names.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def print_text(console: Console, text: object) -> None:
    """Print text on a console as it is: no markup, no terminal escapes, no breaks of long lines.

    The middle of a line above MAX_LINE_LENGTH characters is left out.
    """
    lines = [_shorten(line) for line in printable(text).split("\n")]
    console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def _shorten(line: str) -> str:
    if len(line) <= MAX_LINE_LENGTH:
        return line
    half = MAX_LINE_LENGTH // 2
    return f"{line[:half]} [{len(line) - 2 * half:,} characters left out] {line[-half:]}"


def open_regular(path: Path, follow_links: bool = True) -> int:
    """Open a regular file for reading; return its descriptor. Pipes and devices are not waited for.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no regular file, or a symbolic link and `follow_links` is False.
    """
    if not follow_links and path.is_symlink():
        raise ValueError("it is a symbolic link, which is not followed")
    flags = os.O_RDONLY | CLOSE_ON_EXEC | NON_BLOCKING | (0 if follow_links else NO_FOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return descriptor


def read_bytes(path: Path, max_bytes: int = MAX_TEXT_BYTES, follow_links: bool = True) -> bytes:
    """Return the content of a regular file of at most `max_bytes`; errors as for `open_regular`, and ValueError."""
    with open(open_regular(path, follow_links), "rb") as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes / 2**20:g} MiB")
    return content


class _BoundedReader(io.BufferedReader):
    """File that refuses to read more than MAX_ZIP_LIST_BYTES at once; zipfile reads the list of members at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes. Raises BadZipFile for too many."""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > MAX_ZIP_LIST_BYTES:
            raise zipfile.BadZipFile(f"the list of its members has more than {MAX_ZIP_LIST_BYTES / 2**20:g} MiB")
        return super().read(max(size, 0))


@contextlib.contextmanager
def open_zip(path: Path | str) -> Iterator[zipfile.ZipFile]:
    """Open a zip for reading.

    Raises:
        OSError: The file cannot be opened.
        Exception: One of ZIP_ERRORS: it is no regular file or no zip, or the list of its members is too large.
    """
    with _BoundedReader(io.FileIO(open_regular(Path(path)))) as file, zipfile.ZipFile(file) as archive:
        yield archive


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """Return the content of a member. Raises one of ZIP_ERRORS if it is damaged or has more than `max_bytes`."""
    with archive.open(name) as member:
        content = member.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{name} has more than {max_bytes / 2**20:g} MiB")
    return content


def is_regular_inside(folder: Path, path: Path) -> bool:
    """Return True if `path` is a regular file, no link, in `folder` after links of its parents are resolved."""
    try:
        check_inside(folder, path.parent)
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
        return False


def check_inside(folder: Path, path: Path) -> None:
    """Raise ValueError if a symbolic link leads from a path below `folder` to another place."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"a symbolic link leads out of {folder}")


def parse_json(content: bytes | str) -> Any:
    """Return the value of JSON in UTF-8. Raises ValueError if it is damaged, too deep, or has too many items."""
    text = content if isinstance(content, str) else content.decode("utf-8")
    if sum(map(text.count, ",[{")) > MAX_JSON_ITEMS:
        raise ValueError(f"it has more than {MAX_JSON_ITEMS:,} items")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value, MAX_JSON_DEPTH)
    return value


def _check_depth(value: object, limit: int) -> None:
    if limit < 0:
        raise ValueError("it is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(child, dict | list):
            _check_depth(child, limit - 1)


def read_json(path: Path, max_bytes: int = MAX_TEXT_BYTES, follow_links: bool = True) -> Any:
    """Return the value of a JSON file; errors as for `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, max_bytes, follow_links))


def read_json_object(path: Path, max_bytes: int = MAX_TEXT_BYTES, follow_links: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file; errors as for `read_json`, and ValueError if it holds another value."""
    value = read_json(path, max_bytes, follow_links)
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value
