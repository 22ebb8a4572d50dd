"""Files of a cache on object storage, at an address that fsspec opens: s3://bucket/prefix, gs://, https://.

    local = remote.RemoteShards("s3://bucket/imagenet-256", max_bytes=50 * 10**9)
    local.prefetch(names)      start downloading these
    local.path(name)           a file on the local disk; waits until it is complete, and is in use until
    local.release([name])

Copies are in $XDG_CACHE_HOME/gesso/shards/<hash of address and fingerprint>/NAME (bounded_file_cache.py).
"""

import collections
import contextlib
import errno
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from gesso import atomic_io
from gesso.config import addresses
from gesso.data.cache import format
from gesso.data.cache.bounded_file_cache import FileCache
from gesso.data.cache.plan import CacheManifest
from gesso.data.encoders.hub import error_summary, import_names, sha256_files
from gesso.errors import GessoError, RunError, UsageError

RETRY_DELAYS_S = (0.5, 2.0, 8.0)
"""Seconds before each further attempt."""
NUM_FETCH_THREADS = 4
"""Number of files prefetched in parallel."""
STALL_TIMEOUT_S = 60
"""Seconds without a byte after which a connection is closed."""
PROTOCOL_PACKAGES = {"s3": "'gesso[s3]'", "s3a": "'gesso[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
ACCESS_HINTS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
}
Result = TypeVar("Result")


def is_remote(uri: str | Path) -> bool:
    """Return True for an address, False for a path."""
    return addresses.is_address(uri)


def read_manifest(uri: str | Path) -> dict[str, Any]:
    """Return manifest.json of a cache, in a folder or at an address.

    Raises:
        UsageError: It is missing or damaged, or access is refused.
        RunError: The network fails.
    """
    what = f"{str(uri).rstrip('/')}/manifest.json"
    try:
        if is_remote(uri):
            storage, root = _open_storage(str(uri))
            data = _retry(lambda: storage.cat_file(f"{root}/manifest.json"), what)
        else:
            data = (Path(uri) / "manifest.json").read_bytes()
        tree = json.loads(data)
    except FileNotFoundError:
        raise UsageError(f"{what}: there is no such file; gesso cache writes it when a cache is finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{what} cannot be read: {error_summary(error)}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{what} is damaged: it holds no object")
    return tree


def open_remote_manifest(url: str) -> CacheManifest:
    """Return the checked manifest at an address. Raises as `read_manifest`, and UsageError if it is unsafe."""
    what = f"{url.rstrip('/')}/manifest.json"
    return format.check_manifest(format.parse_record(read_manifest(url), what, CacheManifest), what)


def _open_storage(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it. Raises UsageError for a scheme not allowed."""
    protocol = addresses.check_address(url)
    options = {}
    (url_to_fs,) = import_names("fsspec", "s3", ["url_to_fs"])
    if protocol in ("http", "https"):
        (timeout,) = import_names("aiohttp", "s3", ["ClientTimeout"])
        # aiohttp's own limit is five minutes for a whole file.
        options = {"timeout": timeout(total=None, sock_connect=STALL_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)}
    try:
        storage, root = url_to_fs(url.rstrip("/"), **options)
    except ImportError as error:
        cure = f"pip install {PROTOCOL_PACKAGES[protocol]}" if protocol in PROTOCOL_PACKAGES else error_summary(error)
        raise UsageError(f"{url}: {protocol}:// is read with a package that is not installed: {cure}") from None
    except Exception as error:  # of any of fsspec's file systems, whose constructors look for credentials
        raise UsageError(f"{url} cannot be opened: {error_summary(error)}") from None
    return storage, root.rstrip("/")


def _retry(action: Callable[[], Result], label: str) -> Result:
    """Return the result of `action`, with several attempts if the network fails.

    Raises:
        UsageError: Access is refused.
        RunError: The last attempt failed.
    """
    waits = iter(RETRY_DELAYS_S)
    while True:
        try:
            return action()
        except Exception as error:  # of fsspec, of the client of the storage, of the HTTP library below it
            if isinstance(error, FileNotFoundError):
                if "specified bucket" in str(error):
                    raise UsageError(f"{label}: there is no such bucket ({error_summary(error)})") from None
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # the local disk
            if _is_access_error(error):
                cure = ACCESS_HINTS.get(label.partition(":")[0].replace("s3a", "s3"), "look at its permissions")
                raise UsageError(f"{label}: access was refused ({error_summary(error)}); {cure}") from None
            if (wait := next(waits, None)) is None:
                raise RunError(
                    f"{label} did not come, in {len(RETRY_DELAYS_S) + 1} attempts: {error_summary(error)}"
                ) from None
        time.sleep(wait)


def _is_access_error(error: Exception) -> bool:
    """Return True if another attempt would need other credentials."""
    status = getattr(error, "status", None)  # of aiohttp's errors
    return isinstance(error, PermissionError) or "Credentials" in type(error).__name__ or status in (401, 403)


class RemoteShards:
    """Files of the cache at `url`, downloaded, checked by size and SHA-256, and stored on the local disk.

    max_bytes: limit of the local copies, None for no limit. When a file would exceed it, the least recently used files
    that no process uses or requests are removed. Files in use are never removed.

    All methods are thread-safe; processes share the folder.

    Raises:
        UsageError: The manifest is missing or damaged, access is refused, or the disk is too small.
    """

    def __init__(self, url: str, max_bytes: int | None = None):
        self.url = url.rstrip("/")
        self.manifest = read_manifest(self.url)
        self._expected = _expected_files(self.url, self.manifest)
        self._storage, self._root = _open_storage(self.url)
        self.folder = _copies_folder(self.url, self.manifest["fingerprint"])
        self._file_cache = FileCache(self.folder, {name: size for name, (size, _) in self._expected.items()}, max_bytes)
        self._in_use: set[str] = set()
        self._requested: list[str] = []
        self._queue: collections.deque[str] = collections.deque()
        self._condition, self._closed = threading.Condition(), False
        self._threads: list[threading.Thread] = []

    def path(self, name: str) -> Path:
        """Return the path of a file, which is in use from now on; wait until it is complete.

        Raises:
            UsageError: The disk is full or access is refused.
            RunError: The download fails.
        """
        with self._condition:
            self._in_use.add(name)
            self._file_cache.pin(self._in_use.union(self._requested))
        try:
            self._fetch(name, required=True)
        except GessoError:
            self.release([name])
            raise
        return self.folder / name

    def release(self, names: Iterable[str]) -> None:
        """Declare that files are no longer in use."""
        with self._condition:
            self._in_use.difference_update(names)
            self._file_cache.pin(self._in_use.union(self._requested))

    def prefetch(self, names: Iterable[str]) -> None:
        """Start downloading files in this order, as far as there is room; earlier requests are dropped."""
        requested = list(names)
        with self._condition:
            if requested != self._requested:
                self._requested = requested
                self._file_cache.pin(self._in_use.union(requested))
            self._queue = collections.deque(name for name in requested if self._file_cache.is_missing(name))
            # Daemons: a process that ends does not wait for files that it will not read.
            while self._queue and len(self._threads) < NUM_FETCH_THREADS:
                self._threads.append(threading.Thread(target=self._fetch_loop, name="shards", daemon=True))
                self._threads[-1].start()
            self._condition.notify_all()

    def close(self) -> None:
        """Release all files and requests; wait for running downloads."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        self._file_cache.close()

    def _fetch_loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                name = self._queue.popleft()
                before = self._requested[: self._requested.index(name)]
            with contextlib.suppress(GessoError):  # whoever needs the file tries again, and says what is wrong
                self._fetch(name, required=False, higher_priority=before)

    def _fetch(self, name: str, required: bool, higher_priority: Iterable[str] = ()) -> None:
        """Download a file. required: even beyond the limit. higher_priority: names requested before it."""
        with self._file_cache.reserve(name, required, higher_priority) as temporary:
            if temporary:
                self._download(name, temporary)

    def _download(self, name: str, temporary: Path) -> None:
        size, sha256 = self._expected[name]
        what = f"{self.url}/shards/{name}"

        def once() -> None:
            self._storage.get_file(f"{self._root}/shards/{name}", str(temporary))
            if (has := temporary.stat().st_size) != size:
                raise ValueError(f"it has {has:,} bytes instead of {size:,}")
            if sha256_files([temporary]) != sha256:
                raise ValueError("its SHA-256 is not the manifest's")

        try:
            _retry(once, what)
        except FileNotFoundError:
            raise RunError(f"{what} is in the manifest and not there: copy the cache there once more") from None


def _expected_files(url: str, tree: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 by file name. Raises UsageError if the manifest is damaged or unsafe."""
    try:
        listed = [*tree["files"], *([tree["columns"]] if "columns" in tree else [])]
        due = {file["name"]: (int(file["bytes"]), str(file["sha256"])) for file in listed}
        sound = isinstance(tree["fingerprint"], str) and all(size > 0 for size, _ in due.values())
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UsageError(f"{url}/manifest.json is damaged: it lists no files with name, bytes and sha256")
    for name in due:
        if not re.fullmatch(r"\w[\w-]*\.safetensors", name):
            raise UsageError(f"{url}/manifest.json: refused, for it names a file {name!r}")
    return due


def _copies_folder(url: str, fingerprint: str) -> Path:
    """Return the folder of the local copies of a cache."""
    return atomic_io.cache_dir("shards") / hashlib.sha256(json.dumps([url, fingerprint]).encode()).hexdigest()[:32]
