"""Copies of files, in a folder that processes share, together of no more bytes than a bound.

    NAME                 whole or absent; last changed when it was last asked for
    .lock                held for an instant by whoever looks or changes what is here
    .fetching/NAME       held by who fetches NAME
    .users/ANY           held by a process as long as it lives: the names that it needs, and those that it fetches

The kernel drops the locks (flock) of a process that ends, however it ends; what it left is swept by the next.
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
    """Files of the bytes `sizes` by name. keep: bytes of all, or None for as many as there are.

    Raises UsageError when the folder is not writable, or its disk too small.
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
        """These, and no others, are needed by this process: nobody removes them."""
        with self._exclusive():
            self._pinned = sorted(names)
            self._write_user()

    def is_missing(self, name: str) -> bool:
        """Neither there nor being fetched by this process."""
        return name not in self._fetching and not self._is_complete(name)

    @contextlib.contextmanager
    def reserve(self, name: str, required: bool, higher_priority: Iterable[str] = ()) -> Iterator[Path | None]:
        """Where to write the file `name`; None when it is there, or when it need not be and there is no room for it.

        before: names whose room it does not take. One thread of one process comes here at a time for a name, others wait.
        Raises UsageError when it must be there and the disk is full.
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
        """No other thread and no other process looks at the folder or changes it. What follows is called within."""
        with _lock(self.folder / ".lock"):
            yield

    def _write_user(self) -> None:
        """Others what this process needs and fetches."""
        os.ftruncate(self._user_fd, 0)
        os.pwrite(self._user_fd, json.dumps([self._pinned, sorted(self._fetching)]).encode(), 0)

    def _read_users(self) -> tuple[set[str], set[str]]:
        """What all live processes need and fetch; those that ended are forgotten."""
        needed: set[str] = set()
        fetching: set[str] = set()
        for path in (self.folder / ".users").iterdir():
            with contextlib.suppress(FileNotFoundError), open(path) as handle:  # it may just have left
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    theirs = json.load(handle)
                    needed.update(theirs[0])
                    fetching.update(theirs[1])
                else:
                    path.unlink()
        return needed, fetching

    def _files_by_age(self) -> list[str]:
        """Names of the files that are there, the one used longest ago first."""
        found = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(self.folder) if entry.name in self.sizes}
        return sorted(found, key=found.__getitem__)

    def _make_room(self, name: str, required: bool, higher_priority: Iterable[str]) -> bool:
        """Remove what has to go for the file `name`; whether there is room for it."""
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
    """Hold a lock, once no other thread and no other process does."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_user(user: int, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(user)


def format_gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
