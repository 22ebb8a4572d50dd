"""Atomic files and folders, locks between processes, and errors of the file system.

A file is written under a temporary name, flushed to disk and renamed, so that it is either complete or absent.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from gesso.errors import RunError, UsageError
from gesso.untrusted import CLOSE_ON_EXEC, NO_FOLLOW, check_inside, printable

NO_FLOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock on a file system without it."""
NO_FSYNC_ERRORS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of fsync on a file system without it."""
logger = logging.getLogger(__name__)


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
    """Flush a file or folder to disk, so that a later rename never exposes incomplete data.

    A folder that cannot be flushed is no error: Windows and some network file systems refuse it.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" and not is_folder else os.O_RDONLY)
    except OSError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder or error.errno in NO_FSYNC_ERRORS):
            raise
    finally:
        os.close(descriptor)


def _apply_umask(file: Path) -> None:
    """Give a file the default permissions; safetensors makes its files readable by their owner only.

    A file system without permissions refuses it, which is no error.
    """
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):
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
        temporary.unlink(missing_ok=True)  # a link of this name would be followed
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
        _remove(temporary)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                _apply_umask(file)
                fsync(file)
            fsync(temporary)
            if path.is_symlink():
                path.unlink()
            if path.exists():
                remove_dir(path)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Rename a folder, then delete it: a crash leaves no partial folder under the old name."""
    to_delete = path.with_name(f".{path.name}.old.tmp")
    _remove(to_delete)
    os.replace(path, to_delete)
    _remove(to_delete)


def _remove(path: Path) -> None:
    """Delete a file, a link (not its target), or a folder, if it exists."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


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
        _remove(leftover)


def check_run_folder(run_folder: Path, *parts: str) -> None:
    """Raise UsageError if a link in a run folder would lead writes to one of its parts to another place."""
    for part in parts:
        try:
            check_inside(run_folder, run_folder / part)
        except (OSError, ValueError, RuntimeError):
            raise UsageError(
                f"{run_folder / part} is a symbolic link out of the run folder, to which nothing is written: delete "
                "the link, or replace it by what it leads to"
            ) from None


def append_text(path: Path, text: str) -> None:
    """Append text to a file and flush it to disk; a symbolic link is not followed.

    Raises:
        RunError: The disk is full, or the file is not writable or a link.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW | CLOSE_ON_EXEC
    with disk_errors(path), open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NO_FSYNC_ERRORS:
                raise


def _acquire(lock_path: Path, timeout: float) -> BaseFileLock:
    """Return the lock, acquired or not: flock, or a marker file on a file system without flock.

    The kernel releases flock when the process ends. A marker file of a process of this machine that has ended is taken
    over; one of another machine cannot be checked and stays.
    """
    kernel_lock = FileLock(lock_path, thread_local=False, fallback_to_soft=False)
    try:
        kernel_lock.acquire(timeout=timeout)
        return kernel_lock
    except Timeout:
        return kernel_lock
    except OSError as error:
        if error.errno not in NO_FLOCK_ERRORS:
            raise
    marker = SoftFileLock(lock_path.with_name(f"{lock_path.name}.held"), thread_local=False)
    with contextlib.suppress(Timeout):
        marker.acquire(timeout=timeout)
    return marker


@contextlib.contextmanager
def _file_lock(lock_path: Path, target: Path) -> Iterator[BaseFileLock]:
    """Yield the lock of `target`, acquired if no other process has it."""
    with disk_errors(target):
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        if lock_path.is_symlink():
            raise UsageError(f"{lock_path} is a symbolic link, which gesso never makes: delete it")
        file_lock = _acquire(lock_path, timeout=0)
    try:
        yield file_lock
    finally:
        file_lock.release()


def _marker_hint(file_lock: BaseFileLock) -> str:
    """Return how to remove a marker file whose process may have ended; empty for a lock of the kernel."""
    if not isinstance(file_lock, SoftFileLock):
        return ""
    return f"; if no process of any machine does, delete {printable(file_lock.lock_file)}"


@contextlib.contextmanager
def lock(path: Path, activity: str = "writes") -> Iterator[bool]:
    """Wait for the lock of a file that several processes read, change and write; yield whether it took waiting.

    `activity` says what the other process does with the file, in a message that is logged before waiting.
    """
    with disk_errors(path), _file_lock(path.with_name(f".{path.name}.lock"), path) as file_lock:
        waits = not file_lock.is_locked
        if waits:
            hint = _marker_hint(file_lock)
            logger.warning("waiting for another process that %s %s%s", activity, printable(path), hint)
            file_lock.acquire(timeout=-1)
        yield waits


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Yield True if this process may write `path`, False if another process is writing it."""
    with _file_lock(path.with_name(f".{path.name}.lock"), path) as file_lock:
        yield file_lock.is_locked


@contextlib.contextmanager
def lock_dir(folder: Path, activity: str = "training in") -> Iterator[None]:
    """Lock `folder` for this process; `activity` describes its use in the error of other processes.

    Raises:
        UsageError: Another process has locked the folder.
    """
    with _file_lock(folder / ".lock", folder) as file_lock:
        if not file_lock.is_locked:
            raise UsageError(
                f"another process is {activity} {folder}; wait until it ends, or choose another folder"
                + _marker_hint(file_lock)
            )
        yield


def format_bytes(n: float) -> str:
    """Return a size with three digits in powers of 1000, such as "1.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
