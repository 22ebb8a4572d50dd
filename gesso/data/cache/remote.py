"""Shards of a cache at an address that fsspec opens (s3://bucket/prefix, gs://, https://), downloaded to the disk.

    shards = RemoteShards(url, files, fingerprint, max_bytes=50 * 10**9)
    shards.prefetch(names)     start to download these
    shards.path(name)          path of a local copy; waits until it is complete and pins it
    shards.release([name])

Processes share the local copies in $XDG_CACHE_HOME/gesso/shards/<hash of address and fingerprint>:

    NAME                 complete or absent; its modification time is the time of its last use
    .lock                locked while a process reads or changes the state of the folder
    .fetching/NAME       locked by the process that downloads NAME
    .users/ANY           locked while its process lives; holds the names that the process pins and downloads

The kernel releases the locks (flock) of a process that ends; other processes remove its leftovers.
"""

import collections
import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gesso import atomic_io, untrusted
from gesso.config import addresses
from gesso.data.cache import format
from gesso.data.cache.plan import CacheManifest, ColumnFile, ShardFile
from gesso.data.encoders.hub import import_names, sha256_files
from gesso.errors import DISTRIBUTION, GessoError, RunError, UsageError, error_summary

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
"""Locks that end with their process; None on Windows."""
RETRY_DELAYS_S = (0.5, 2.0, 8.0)
"""Seconds before each further attempt."""
NUM_FETCH_THREADS = 4
"""Number of files prefetched in parallel."""
STALL_TIMEOUT_S = 60
"""Seconds without a byte after which a connection is closed."""
PROTOCOL_PACKAGES = {"s3": f"'{DISTRIBUTION}[s3]'", "s3a": f"'{DISTRIBUTION}[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
ACCESS_HINTS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
}
Result = TypeVar("Result")


def is_remote(uri: str | Path) -> bool:
    """Return True for an address, False for a path."""
    return addresses.is_address(uri)


def open_remote_manifest(url: str) -> CacheManifest:
    """Return the checked manifest of the cache at an address.

    Raises:
        UsageError: It is missing, damaged or unsafe, or access is denied.
        RunError: The network fails.
    """
    address = f"{url.rstrip('/')}/manifest.json"
    try:
        storage, root = _open_storage(url)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest.json"
            action = functools.partial(_download, storage, f"{root}/manifest.json", path, untrusted.MAX_TEXT_BYTES)
            _retry(action, address)
            tree = untrusted.read_json(path)
    except _TooLargeError as error:
        raise UsageError(f"{address} is refused: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"{address} does not exist; gesso cache writes it when the cache is complete") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{address} cannot be read: {error_summary(error)}") from None
    return format.check_manifest(format.parse_record(tree, address, CacheManifest), address)


class _TooLargeError(Exception):
    """A file at an address is larger than expected; another attempt would not help."""


def _download(storage: Any, remote_path: str, path: Path, max_bytes: int) -> None:
    """Copy a file of a storage to the disk; stop as soon as it has more than `max_bytes`. Raises _TooLargeError."""
    (callback_class,) = import_names("fsspec.callbacks", "s3", ["Callback"])

    class Bound(callback_class):  # type: ignore[misc, valid-type]  # fsspec is imported lazily
        def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
            if max(self.size or 0, self.value) > max_bytes:
                raise _TooLargeError(f"it has more than {max_bytes:,} bytes")

    storage.get_file(remote_path, str(path), callback=Bound())


def _open_storage(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it. Raises UsageError for a scheme not allowed."""
    protocol = addresses.check_address(url)
    options = {}
    (url_to_fs,) = import_names("fsspec", "s3", ["url_to_fs"])
    if protocol in ("http", "https"):
        (timeout,) = import_names("aiohttp", "s3", ["ClientTimeout"])
        # The default of aiohttp limits the time of a download to five minutes.
        options = {"timeout": timeout(total=None, sock_connect=STALL_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)}
    try:
        storage, root = url_to_fs(url.rstrip("/"), **options)
    except ImportError as error:
        fix = f"pip install {PROTOCOL_PACKAGES[protocol]}" if protocol in PROTOCOL_PACKAGES else error_summary(error)
        raise UsageError(f"{url}: reading {protocol}:// needs a package that is not installed: {fix}") from None
    except Exception as error:  # constructors of file systems look for credentials and raise any error
        raise UsageError(f"{url} cannot be opened: {error_summary(error)}") from None
    return storage, root.rstrip("/")


def _retry(action: Callable[[], Result], address: str) -> Result:
    """Return the result of `action`, with several attempts if the network fails.

    Raises:
        UsageError: Access is denied.
        RunError: The last attempt failed.
    """
    delays = iter(RETRY_DELAYS_S)
    while True:
        try:
            return action()
        except Exception as error:  # of fsspec, of the client of the storage, or of its HTTP library
            if isinstance(error, _TooLargeError):
                raise
            if isinstance(error, FileNotFoundError):
                if "specified bucket" in str(error):
                    raise UsageError(f"{address}: the bucket does not exist ({error_summary(error)})") from None
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # of the local disk
            if _is_access_error(error):
                hint = ACCESS_HINTS.get(address.partition(":")[0].replace("s3a", "s3"), "check its permissions")
                raise UsageError(f"{address}: access was denied ({error_summary(error)}); {hint}") from None
            if (delay := next(delays, None)) is None:
                attempts = len(RETRY_DELAYS_S) + 1
                raise RunError(
                    f"{address} could not be downloaded in {attempts} attempts: {error_summary(error)}"
                ) from None
        time.sleep(delay)


def _is_access_error(error: Exception) -> bool:
    """Return True if another attempt needs other credentials."""
    status = getattr(error, "status", None)  # of aiohttp's errors
    return isinstance(error, PermissionError) or "Credentials" in type(error).__name__ or status in (401, 403)


class RemoteShards:
    """Files of the cache at `url`, downloaded, checked by size and SHA-256, and stored on the local disk.

    All methods are thread-safe, and processes share the local copies.

    Args:
        url: Address of the cache.
        files: Files of its manifest.
        fingerprint: Fingerprint of the cache; the copies of different caches are separate.
        max_bytes: Limit of the local copies, None for no limit. When a file would exceed it, the least recently used
            files that no process pins are removed. Pinned files are never removed.

    Raises:
        UsageError: The folder of the copies is not writable, or the disk is too small.
    """

    def __init__(
        self, url: str, files: Iterable[ShardFile | ColumnFile], fingerprint: str, max_bytes: int | None = None
    ):
        self.url = url.rstrip("/")
        self._files = {file.name: file for file in files}
        self._storage, self._root = _open_storage(self.url)
        key = hashlib.sha256(json.dumps([self.url, fingerprint]).encode()).hexdigest()[:32]
        self.folder = atomic_io.cache_dir("shards") / key
        self._downloads = DownloadFolder(
            self.folder, {name: file.bytes for name, file in self._files.items()}, max_bytes
        )
        self._in_use: set[str] = set()
        self._verified, self._bytes_to_verify = set[str](), format.MAX_VERIFIED_BYTES
        self._requested: list[str] = []
        self._queue: collections.deque[str] = collections.deque()
        self._condition, self._closed = threading.Condition(), False
        self._threads: list[threading.Thread] = []

    def path(self, name: str) -> Path:
        """Return the path of a file and pin it; wait until it is complete.

        Raises:
            UsageError: The disk is full or access is denied.
            RunError: The download fails.
        """
        with self._condition:
            self._in_use.add(name)
            self._downloads.pin(self._in_use.union(self._requested))
        try:
            self._fetch(name, required=True)
            if not self._is_intact(name):
                self._downloads.discard(name)
                self._fetch(name, required=True)
        except GessoError:
            self.release([name])
            raise
        return self.folder / name

    def _is_intact(self, name: str) -> bool:
        """Return False if a copy of an earlier command has another SHA-256; only the first copies are verified."""
        with self._condition:
            if name in self._verified or self._bytes_to_verify <= 0:
                return True
            self._verified.add(name)
            self._bytes_to_verify -= self._files[name].bytes
        return sha256_files([self.folder / name]) == self._files[name].sha256

    def release(self, names: Iterable[str]) -> None:
        """Unpin files."""
        with self._condition:
            self._in_use.difference_update(names)
            self._downloads.pin(self._in_use.union(self._requested))

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to download files in this order, while they fit; replaces earlier requests."""
        requested = list(names)
        with self._condition:
            if requested != self._requested:
                self._requested = requested
                self._downloads.pin(self._in_use.union(requested))
            self._queue = collections.deque(name for name in requested if self._downloads.is_missing(name))
            # Daemons: a process that ends does not wait for files that it will not read.
            while self._queue and len(self._threads) < NUM_FETCH_THREADS:
                self._threads.append(threading.Thread(target=self._fetch_loop, name="shards", daemon=True))
                self._threads[-1].start()
            self._condition.notify_all()

    def close(self) -> None:
        """Drop all pins and requests; wait for running downloads."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        self._downloads.close()

    def _fetch_loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                name = self._queue.popleft()
                earlier = self._requested[: self._requested.index(name)]
            with contextlib.suppress(GessoError):  # `path` downloads the file again and reports the error
                self._fetch(name, required=False, higher_priority=earlier)

    def _fetch(self, name: str, required: bool, higher_priority: Iterable[str] = ()) -> None:
        """Download a file unless it is present; arguments as in `DownloadFolder.reserve`."""
        with self._downloads.reserve(name, required, higher_priority) as temporary:
            if temporary:
                self._download(name, temporary)

    def _download(self, name: str, temporary: Path) -> None:
        expected, address = self._files[name], f"{self.url}/shards/{name}"

        def attempt() -> None:
            _download(self._storage, f"{self._root}/shards/{name}", temporary, expected.bytes)
            if (size := temporary.stat().st_size) != expected.bytes:
                raise ValueError(f"it has {size:,} bytes instead of {expected.bytes:,}")
            if sha256_files([temporary]) != expected.sha256:
                raise ValueError("its SHA-256 differs from the manifest")

        try:
            _retry(attempt, address)
            with self._condition:
                self._verified.add(name)
        except _TooLargeError as error:
            raise RunError(f"{address} is refused: {error}, the size in the manifest") from None
        except FileNotFoundError:
            raise RunError(f"{address} is in the manifest but does not exist: copy the cache again") from None


class DownloadFolder:
    """Folder of files with known sizes that processes share, of at most `max_bytes` in total; None: no limit.

    Raises:
        UsageError: The folder is not writable, or its disk is too small.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], max_bytes: int | None):
        self.folder, self.sizes = folder, sizes
        total, largest = sum(sizes.values()), max(sizes.values(), default=0)
        self.max_bytes = total if max_bytes is None else max_bytes
        if self.max_bytes < largest:
            raise UsageError(
                f"the limit of {atomic_io.format_bytes(self.max_bytes)} is too small for a shard of "
                f"{atomic_io.format_bytes(largest)}"
            )
        if fcntl is None:
            raise UsageError(
                "caches at an address are shared between processes by file locks, which this system has not: copy the "
                "cache into a local folder"
            )
        self._pinned: list[str] = []
        self._fetching: set[str] = set()
        try:
            for part in (".users", ".fetching"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            with self._lock_state():
                self._user_fd, path = tempfile.mkstemp(dir=folder / ".users")
                fcntl.flock(self._user_fd, fcntl.LOCK_EX)
                self._write_user()
                free = shutil.disk_usage(folder).free + sum(sizes[name] for name in self._names_by_last_use())
        except OSError as error:
            raise UsageError(
                f"cannot store shards in {folder} ({error.strerror}): set XDG_CACHE_HOME to a writable folder"
            ) from None
        self.close = weakref.finalize(self, _remove_user, self._user_fd, path)
        self.close.atexit = False  # threads may still download; the kernel releases the lock
        if free < (required := min(self.max_bytes, total)):
            raise self._disk_full_error(required, free)

    def pin(self, names: Iterable[str]) -> None:
        """Pin these files and no others for this process; no process removes them."""
        with self._lock_state():
            self._pinned = sorted(names)
            self._write_user()

    def is_missing(self, name: str) -> bool:
        """Return True if a file is neither complete nor being downloaded by this process."""
        return name not in self._fetching and not self._is_complete(name)

    def discard(self, name: str) -> None:
        """Remove a damaged file."""
        with self._lock_state():
            (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def reserve(self, name: str, required: bool, higher_priority: Iterable[str] = ()) -> Iterator[Path | None]:
        """Yield the temporary path for the file `name`; None if it is complete, or optional and does not fit.

        Only one thread of one process enters for a name; others wait.

        Args:
            name: Name of the file.
            required: Exceed the limit if necessary.
            higher_priority: Names whose space an optional file must not use.

        Raises:
            UsageError: The file is required and the disk is full.
        """
        with _lock(self.folder / ".fetching" / name):
            with self._lock_state():
                complete, fits = self._is_complete(name), False
                if complete:
                    os.utime(self.folder / name, ns=(time.time_ns(), time.time_ns()))
                elif fits := self._make_room(name, required, higher_priority):
                    self._fetching.add(name)
                    self._write_user()
            if not fits:
                yield None
                return
            try:
                with atomic_io.atomic_file(self.folder / name) as temporary:
                    yield temporary
            finally:
                with self._lock_state():
                    self._fetching.discard(name)
                    self._write_user()

    def _is_complete(self, name: str) -> bool:
        try:
            return (self.folder / name).stat().st_size == self.sizes[name]
        except FileNotFoundError:
            return False

    def _lock_state(self) -> contextlib.AbstractContextManager[None]:
        """Exclude all other threads and processes; required by the methods below."""
        return _lock(self.folder / ".lock")

    def _write_user(self) -> None:
        """Publish the names that this process pins and downloads."""
        os.ftruncate(self._user_fd, 0)
        os.pwrite(self._user_fd, json.dumps([self._pinned, sorted(self._fetching)]).encode(), 0)

    def _read_users(self) -> tuple[set[str], set[str]]:
        """Return the names that live processes pin and download; remove the entries of ended ones."""
        pinned: set[str] = set()
        fetching: set[str] = set()
        for path in (self.folder / ".users").iterdir():
            with contextlib.suppress(FileNotFoundError), open(path) as handle:  # its process may have just ended
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    user_pinned, user_fetching = json.load(handle)
                    pinned.update(user_pinned)
                    fetching.update(user_fetching)
                else:
                    path.unlink()
        return pinned, fetching

    def _names_by_last_use(self) -> list[str]:
        """Return the names of the stored files, least recently used first."""
        last_used = {
            entry.name: entry.stat().st_mtime_ns for entry in os.scandir(self.folder) if entry.name in self.sizes
        }
        return sorted(last_used, key=last_used.__getitem__)

    def _make_room(self, name: str, required: bool, higher_priority: Iterable[str]) -> bool:
        """Remove files until `name` fits; return whether it fits. Arguments as in `reserve`."""
        pinned, fetching = self._read_users()
        partial_bytes = 0
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # the download may have just ended
                if path.name[1:].rsplit(".", 2)[0] in fetching:
                    partial_bytes += path.stat().st_size
                else:
                    path.unlink()  # of a process that was killed
        stored, incoming = self._names_by_last_use(), {name, *fetching, *higher_priority}
        incoming_bytes = sum(self.sizes[n] for n in incoming.difference(stored)) - partial_bytes
        over_limit = sum(self.sizes[n] for n in incoming.union(stored)) - self.max_bytes
        over_disk = incoming_bytes - shutil.disk_usage(self.folder).free
        to_delete = []
        for old in stored:
            if old not in pinned and (over_limit > 0 or over_disk > 0):
                to_delete.append(old)
                over_limit, over_disk = over_limit - self.sizes[old], over_disk - self.sizes[old]
        if over_disk > 0 and required:
            raise self._disk_full_error(incoming_bytes, incoming_bytes - over_disk)
        fits = over_disk <= 0 and (required or over_limit <= 0)
        if fits:
            for old in to_delete:
                (self.folder / old).unlink()
        return fits

    def _disk_full_error(self, required: int, free: int) -> UsageError:
        return UsageError(
            f"shards need {atomic_io.format_bytes(required)} in {self.folder}, but only "
            f"{atomic_io.format_bytes(max(free, 0))} are free: free some space, set data.shuffle_window_shards lower, "
            "or set XDG_CACHE_HOME to a folder on a larger disk"
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that excludes other threads and processes."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_user(descriptor: int, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(descriptor)
