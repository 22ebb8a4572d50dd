"""Downloaded copies of files, in a folder that processes share, limited in total size.

    NAME                 complete or absent; its modification time is that of its last use
    .lock                locked while a process reads or changes the state of the folder
    .fetching/NAME       locked by the process that downloads NAME
    .users/ANY           locked by a process as long as it lives: the names that it uses and downloads

The kernel releases the locks (flock) of a process that ends; its leftovers are removed by the next.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gesso import atomic_io
from gesso.errors import UsageError


class FileCache:
    """Files of known sizes by name, of at most `max_bytes` in total; None: no limit.

    Raises:
        UsageError: The folder is not writable, or its disk is too small.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], max_bytes: int | None):
        self.folder, self.sizes = folder, sizes
        total, largest = sum(sizes.values()), max(sizes.values(), default=0)
        self.max_bytes = total if max_bytes is None else max_bytes
        if self.max_bytes < largest:
            raise UsageError(
                f"{format_gigabytes(self.max_bytes)} of shards are to be kept, where one file has "
                f"{format_gigabytes(largest)}"
            )
        self._pinned: list[str] = []
        self._fetching: set[str] = set()
        try:
            for part in (".users", ".fetching"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            with self._exclusive():
                self._user_fd, path = tempfile.mkstemp(dir=folder / ".users")
                fcntl.flock(self._user_fd, fcntl.LOCK_EX)
                self._write_user()
                free = shutil.disk_usage(folder).free + sum(sizes[name] for name in self._files_by_age())
        except OSError as error:
            raise UsageError(
                f"copies of shards cannot be kept in {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder "
                "that is "
                "writable"
            ) from None
        self.close = weakref.finalize(self, _remove_user, self._user_fd, path)
        self.close.atexit = False  # threads may still be fetching; the kernel drops the lock
        if free < (due := min(self.max_bytes, total)):
            raise self._disk_full_error(due, free)

    def pin(self, names: Iterable[str]) -> None:
        """Declare that this process uses these files and no others; no process removes them."""
        with self._exclusive():
            self._pinned = sorted(names)
            self._write_user()

    def is_missing(self, name: str) -> bool:
        """Return True if a file is neither present nor being downloaded by this process."""
        return name not in self._fetching and not self._is_complete(name)

    @contextlib.contextmanager
    def reserve(self, name: str, required: bool, higher_priority: Iterable[str] = ()) -> Iterator[Path | None]:
        """Yield the path to write the file `name` to; None if it is present, or not required and without room.

        higher_priority: names whose room it does not take. One thread of one process enters at a time for a name;
        others wait.

        Raises:
            UsageError: The file is required and the disk is full.
        """
        with _lock(self.folder / ".fetching" / name):
            with self._exclusive():
                there = self._is_complete(name)
                if there:
                    os.utime(self.folder / name, ns=(time.time_ns(), time.time_ns()))
                elif room := self._make_room(name, required, higher_priority):
                    self._fetching.add(name)
                    self._write_user()
            if there or not room:
                yield None
                return
            try:
                with atomic_io.atomic_file(self.folder / name) as temporary:
                    yield temporary
            finally:
                with self._exclusive():
                    self._fetching.discard(name)
                    self._write_user()

    def _is_complete(self, name: str) -> bool:
        try:
            return (self.folder / name).stat().st_size == self.sizes[name]
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude all other threads and processes. The following methods are called within."""
        with _lock(self.folder / ".lock"):
            yield

    def _write_user(self) -> None:
        """Publish the names that this process uses and downloads."""
        os.ftruncate(self._user_fd, 0)
        os.pwrite(self._user_fd, json.dumps([self._pinned, sorted(self._fetching)]).encode(), 0)

    def _read_users(self) -> tuple[set[str], set[str]]:
        """Return the names that live processes use and download; entries of ended ones are removed."""
        needed: set[str] = set()
        fetching: set[str] = set()
        for path in (self.folder / ".users").iterdir():
            with contextlib.suppress(FileNotFoundError), open(path) as handle:  # it may just have left
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    used_names = json.load(handle)
                    needed.update(used_names[0])
                    fetching.update(used_names[1])
                else:
                    path.unlink()
        return needed, fetching

    def _files_by_age(self) -> list[str]:
        """Return the names of the present files, least recently used first."""
        last_used = {
            entry.name: entry.stat().st_mtime_ns for entry in os.scandir(self.folder) if entry.name in self.sizes
        }
        return sorted(last_used, key=last_used.__getitem__)

    def _make_room(self, name: str, required: bool, higher_priority: Iterable[str]) -> bool:
        """Remove files until `name` fits; return whether it does."""
        needed, fetching = self._read_users()
        begun = 0
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # whole by now
                if path.name[1:].rsplit(".", 2)[0] in fetching:
                    begun += path.stat().st_size
                else:
                    path.unlink()  # of a process that was killed
        there = self._files_by_age()
        coming = sum(self.sizes[other] for other in {name, *fetching, *higher_priority}.difference(there)) - begun
        beyond = sum(self.sizes[other] for other in {name, *fetching, *higher_priority, *there}) - self.max_bytes
        lacking = coming - shutil.disk_usage(self.folder).free
        doomed = []
        for old in there:
            if old not in needed and (beyond > 0 or lacking > 0):
                doomed.append(old)
                beyond, lacking = beyond - self.sizes[old], lacking - self.sizes[old]
        if lacking > 0 and required:
            raise self._disk_full_error(coming, coming - lacking)
        fits = lacking <= 0 and (required or beyond <= 0)
        if fits:
            for old in doomed:
                (self.folder / old).unlink()
        return fits

    def _disk_full_error(self, required: int, free: int) -> UsageError:
        return UsageError(
            f"shards need {format_gigabytes(required)} in {self.folder}, where {format_gigabytes(max(free, 0))} are "
            "free: free some, keep "
            "fewer, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock over all threads and processes."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_user(user: int, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(user)


def format_gigabytes(size: int) -> str:
    """Return a size as text in GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
