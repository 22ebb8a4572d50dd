"""Files that are either whole or absent: written to a temporary name, flushed, renamed."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gesso.errors import RunError, UsageError


def kept(what: str) -> Path:
    """The folder of what is kept between commands: $XDG_CACHE_HOME/gesso/WHAT, or ~/.cache/gesso/WHAT."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gesso" / what


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a file system refuses into a RunError that names the path and the cure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _os_error(str(error))
        reason = os.strerror(code) if code else ""
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"no space left to write {path} ({reason}). What was written before is whole.\n"
                f"Free some space and go on: with --resume in training, else with the same command."
            ) from error
        if code is None:
            raise
        raise RunError(f"cannot write {path} ({reason}); choose another place to write to") from error


def _os_error(text: str) -> int | None:
    """The errno that safetensors' native half names in its message."""
    found = re.search(r"os error (\d+)", text)
    return int(found[1]) if found else None


def fsync(path: Path) -> None:
    """Flush a file or a folder, so that a rename after it never shows an empty name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _readable(file: Path) -> None:
    """The permissions of any new file: safetensors makes its own readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` for a file; rename it to `path` once the body succeeded.

    Raises RunError when the disk is full or the place is not writable; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _readable(temporary)
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def in_progress(path: Path) -> Path:
    """Where `whole_folder` writes what is to become `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`, for a folder of files, one writer at a time. An existing folder of that name is replaced."""
    path = Path(path)
    temporary = in_progress(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                _readable(file)
                fsync(file)
            fsync(temporary)
            if path.exists():
                remove_folder(path)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Rename, then delete: a crash in between leaves no half folder under the old name."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written. Only for a folder that this process has locked."""
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(".tmp??????")):  # the latter are safetensors' own
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Of several processes that read, change and write `path` again: one after the other."""
    with disk_errors(path), open(path.with_name(f".{path.name}.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Of several processes that could make `path`: whether this one may, as none of the others is at it."""
    with _held(path.with_name(f".{path.name}.lock"), path) as mine:
        yield mine


@contextlib.contextmanager
def _held(lock: Path, of: Path) -> Iterator[bool]:
    """Whether this process has the lock. The kernel drops it when the process ends, however it ends."""
    with disk_errors(of):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def locked(folder: Path, doing: str = "training in") -> Iterator[None]:
    """Hold `folder` for this process.

    Raises UsageError when another process holds it; `doing` says what that one does with the folder.
    """
    with _held(folder / ".lock", folder) as mine:
        if not mine:
            raise UsageError(f"another process is {doing} {folder}; wait for it, or choose another place")
        yield


def in_bytes(n: float) -> str:
    """Three digits, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
