"""Atomic files and folders, locks between processes, and errors of the file system.

A file is written under a temporary name, flushed to disk and renamed, so that it is either complete or absent.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gesso.errors import RunError, UsageError


def cache_dir(name: str) -> Path:
    """Return $XDG_CACHE_HOME/gesso/NAME, or ~/.cache/gesso/NAME: the folder for files shared between commands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gesso" / name


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system in the body into a RunError that names `path` and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _parse_errno(str(error))
        if code is None:
            raise
        reason = os.strerror(code)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"no space left to write {path} ({reason}). Files written before are complete.\n"
                f"Free some space, then continue: with --resume in training, else with the same command."
            ) from error
        raise RunError(f"cannot write {path} ({reason}); choose another path") from error


def _parse_errno(text: str) -> int | None:
    """Return the errno in a message of safetensors' native code, or None."""
    match = re.search(r"os error (\d+)", text)
    return int(match[1]) if match else None


def fsync(path: Path) -> None:
    """Flush a file or folder to disk, so that a later rename never exposes incomplete data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply_umask(file: Path) -> None:
    """Give a file the default permissions; safetensors makes its files readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the body has succeeded.

    Raises:
        RunError: The disk is full or the folder is not writable. No temporary file remains.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _apply_umask(temporary)
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_dir(path: Path) -> Path:
    """Return the temporary folder that `atomic_dir` renames to `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder for files; rename it to `path`, replacing that folder, when the body has succeeded.

    Only one process may write `path` at a time. Errors as for `atomic_file`.
    """
    path = Path(path)
    temporary = temporary_dir(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                _apply_umask(file)
                fsync(file)
            fsync(temporary)
            if path.exists():
                remove_dir(path)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Rename a folder, then delete it: a crash leaves no partial folder under the old name."""
    to_delete = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(to_delete, ignore_errors=True)
    os.replace(path, to_delete)
    shutil.rmtree(to_delete)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a killed process from a folder that this process has locked."""
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(".tmp??????")):  # the second pattern is that of safetensors
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _file_lock(lock_path: Path, target: Path, timeout: float) -> Iterator[bool]:
    """Yield whether the lock was acquired; the kernel releases it when the process ends."""
    file_lock = FileLock(lock_path, timeout=timeout, thread_local=False)
    with disk_errors(target):
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            file_lock.acquire()
    try:
        yield file_lock.is_locked
    finally:
        file_lock.release()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait for the lock of a file that several processes read, change and write."""
    with disk_errors(path), _file_lock(path.with_name(f".{path.name}.lock"), path, timeout=-1):
        yield


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Yield True if this process may write `path`, False if another process is writing it."""
    with _file_lock(path.with_name(f".{path.name}.lock"), path, timeout=0) as acquired:
        yield acquired


@contextlib.contextmanager
def lock_dir(folder: Path, activity: str = "training in") -> Iterator[None]:
    """Lock `folder` for this process; `activity` describes its use in the error of other processes.

    Raises:
        UsageError: Another process has locked the folder.
    """
    with _file_lock(folder / ".lock", folder, timeout=0) as acquired:
        if not acquired:
            raise UsageError(f"another process is {activity} {folder}; wait until it ends, or choose another folder")
        yield


def format_bytes(n: float) -> str:
    """Return a size with three digits in powers of 1000, such as "1.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
