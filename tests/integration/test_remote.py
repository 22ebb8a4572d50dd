"""Shards at an address: a real S3 server on loopback, faulty servers, kills, limits, several processes."""

import contextlib
import hashlib
import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer

from gesso import untrusted
from gesso.config import DataConfig, addresses
from gesso.data.cache import remote
from gesso.data.cache.plan import CacheManifest, CachePlan, ColumnFile, ShardFile
from gesso.data.samplers import ShardWindowShuffle
from gesso.errors import RunError, UsageError

SIZE = 20_000
NAMES = [f"shard-{i:06d}.safetensors" for i in range(6)]


def content(i: int, size: int = SIZE) -> bytes:
    return hashlib.shake_128(bytes([i])).digest(size)


def manifest_tree(size: int = SIZE, names=NAMES) -> dict:
    shape = dict(rows=1, height=8, width=8, shape=(1, 1, 3, 8, 8), bytes=size)
    files = [
        ShardFile(name=name, sha256=hashlib.sha256(content(i, size)).hexdigest(), **shape)
        for i, name in enumerate(names)
    ]
    manifest = CacheManifest(
        plan=CachePlan(data=DataConfig(resolution=8), images_per_shard=1),
        source_fingerprint="0",
        num_source_images=len(files),
        num_images=len(files),
        class_names=(),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        unreadable=(),
        num_faces=0,
        files=files,
        columns=ColumnFile(name="columns.safetensors", bytes=1, sha256="0"),
        fingerprint="0123456789abcdef",
    )
    return manifest.model_dump(mode="json")


def server_files(size: int = SIZE, names=NAMES) -> dict[str, bytes]:
    shards = {f"shards/{name}": content(i, size) for i, name in enumerate(names)}
    return shards | {"manifest.json": json.dumps(manifest_tree(size, names)).encode()}


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(addresses, "ADDRESS_SCHEMES", (*addresses.ADDRESS_SCHEMES, "memory"))
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def memory():
    """memory://NAME/, emptied."""
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    for name, data in server_files().items():
        storage.pipe(f"/cache/{name}", data)
    return storage


def stored_names(local: remote.RemoteShards) -> list[str]:
    return sorted(path.name for path in local.folder.glob("*.safetensors"))


def open_shards(url: str, max_bytes: int | None = None) -> remote.RemoteShards:
    manifest = remote.open_remote_manifest(url)
    return remote.RemoteShards(url, manifest.files, manifest.fingerprint, max_bytes)


def wait_for(condition) -> None:
    """Wait until the condition is true; a test that waits for ever is stopped from outside."""
    while not condition():
        time.sleep(0.01)


def prefetch_now(local: remote.RemoteShards, names: list[str]) -> None:
    """Prefetch in this thread."""
    local._requested = names
    local._downloads.pin(local._in_use.union(names))
    for i, name in enumerate(names):
        local._fetch(name, required=False, higher_priority=names[:i])


# ---- a real S3 server ----


@pytest.fixture(scope="module")
def moto():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    storage = fsspec.filesystem("s3")
    if not storage.exists("a-bucket"):
        storage.mkdir("a-bucket")
        for name, data in server_files().items():
            storage.pipe(f"a-bucket/some/cache/{name}", data)
    return "s3://a-bucket/some/cache"


def test_s3(s3):
    local = open_shards(s3 + "/")
    assert remote.open_remote_manifest(s3).model_dump(mode="json") == manifest_tree()
    for i in (2, 0, 2):
        assert local.path(NAMES[i]).read_bytes() == content(i)
    assert local.path(NAMES[2]).name == NAMES[2] and stored_names(local) == [NAMES[0], NAMES[2]]
    assert not list(local.folder.glob(".*.tmp"))
    local.prefetch(NAMES)
    wait_for(lambda: stored_names(local) == NAMES)
    assert all((local.folder / name).read_bytes() == content(i) for i, name in enumerate(NAMES))
    local.close()


def test_s3_multipart_download(s3, monkeypatch):
    """Above 50 MB s3fs downloads ranges in parallel."""
    size = 60_000_000
    storage = fsspec.filesystem("s3")
    for name, data in server_files(size, NAMES[:1]).items():
        storage.pipe(f"a-bucket/large/{name}", data)
    local = open_shards("s3://a-bucket/large")
    assert local.path(NAMES[0]).read_bytes() == content(0, size)
    local.close()


def test_s3_missing_files(s3):
    with pytest.raises(UsageError, match=r"s3://a-bucket/nothing/manifest.json does not exist; gesso cache"):
        open_shards("s3://a-bucket/nothing")
    with pytest.raises(UsageError, match=r"s3://no-such-bucket/x/manifest.json: the bucket does not exist"):
        remote.open_remote_manifest("s3://no-such-bucket/x")
    storage = fsspec.filesystem("s3")
    storage.pipe("a-bucket/lost/manifest.json", json.dumps(manifest_tree()).encode())
    local = open_shards("s3://a-bucket/lost")
    with pytest.raises(RunError, match=rf"s3://a-bucket/lost/shards/{NAMES[3]} is in the manifest but does not exist"):
        local.path(NAMES[3])
    assert stored_names(local) == [] and local._in_use == set()
    local.close()


def test_s3_without_credentials(moto, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    with pytest.raises(UsageError, match=r"manifest.json: access was denied \(Unable to locate cred.*set AWS_PROFILE"):
        remote.open_remote_manifest("s3://a-bucket/some/cache")


def test_s3_public_bucket(s3, monkeypatch):
    """The message about missing credentials says how to read a public bucket."""
    storage = fsspec.filesystem("s3")
    storage.chmod("a-bucket/some/cache/manifest.json", "public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    config = {}
    fsspec.config.set_conf_env(config)  # as fsspec does when it is imported
    monkeypatch.setitem(fsspec.config.conf, "s3", config["s3"])
    assert remote.open_remote_manifest(s3).num_images == len(NAMES)


# ---- faulty servers ----


class Server(http.server.ThreadingHTTPServer):
    """Files over HTTP, also for s3fs. faults: by path, one for each of the first requests."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.release_stalled = files, {}, Counter(), threading.Event()
        self.delay = 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/bucket/cache/")
        full = self.command == "GET"
        self.server.requests[path] += full
        faults = self.server.faults.get(path, []) if full else []
        fault = faults.pop(0) if faults else None
        data = self.server.files.get(path)
        status = fault if isinstance(fault, int) else 404 if data is None else 200
        if status != 200:
            code = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 401: "Unauthorized"}[status]
            data = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
        if fault == "corrupt":
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        if fault == "short":
            data = data[:-7]
        self.send_response(status)
        if fault != "endless":
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "binary/octet-stream")
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if not full:
            return
        with contextlib.suppress(ConnectionError):
            if fault in ("cut", "stall"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault == "stall":
                    self.server.release_stalled.wait()
                self.close_connection = True
                return
            if fault == "endless":
                while True:
                    self.wfile.write(data)
            time.sleep(self.server.delay)
            self.wfile.write(data)


@pytest.fixture
def server():
    server = Server(server_files())
    yield server
    server.release_stalled.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["http", "s3"])
def url(request, server, monkeypatch):
    """The same files over both protocols."""
    if request.param == "http":
        return f"{server.url}/bucket/cache"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return "s3://bucket/cache"


@pytest.mark.parametrize("fault", ["corrupt", "short", "cut", 500])
def test_failed_download_is_retried(server, url, fault):
    local, name = open_shards(url), NAMES[1]
    server.faults[f"shards/{name}"] = [fault, fault]
    assert local.path(name).read_bytes() == content(1)
    assert server.requests[f"shards/{name}"] >= 3
    local.close()


@pytest.mark.parametrize(
    "fault, message",
    [
        ("corrupt", "SHA-256 differs from the manifest"),
        ("short", "19,993 bytes instead of 20,000"),
        ("cut", ""),
        (500, ""),
    ],
)
def test_permanent_failure_is_an_error(server, url, fault, message):
    local, name = open_shards(url), NAMES[1]
    server.faults[f"shards/{name}"] = [fault] * 100
    with pytest.raises(RunError, match=rf"shards/{name} could not be downloaded in 4 attempts: .*{message}") as caught:
        local.path(name)
    assert "\n" not in str(caught.value)
    # No partial file remains, and the next download succeeds.
    assert stored_names(local) == [] and not list(local.folder.glob(".*.tmp"))
    server.faults.clear()
    assert local.path(name).read_bytes() == content(1)
    local.close()


@pytest.mark.parametrize("endless", [False, True])
def test_a_file_larger_than_the_manifest_says_is_not_downloaded(server, url, endless):
    local, name = open_shards(url), NAMES[1]
    if endless:
        server.faults[f"shards/{name}"] = ["endless"] * 9
    else:
        server.files[f"shards/{name}"] = b"x" * (SIZE + 1)
    with pytest.raises(RunError, match=rf"shards/{name} is refused: it has more than 20,000 bytes"):
        local.path(name)
    assert server.requests[f"shards/{name}"] == 1 and stored_names(local) == []
    assert not list(local.folder.glob(".*.tmp"))
    local.close()


@pytest.mark.parametrize("endless", [False, True])
def test_a_manifest_above_its_bound_is_not_downloaded(server, url, endless, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_TEXT_BYTES", 1_000)
    server.faults["manifest.json"] = ["endless"] * 9 if endless else []
    with pytest.raises(UsageError, match=r"manifest\.json is refused: it has more than 1,000 bytes"):
        remote.open_remote_manifest(url)
    assert server.requests["manifest.json"] == 1


def test_a_damaged_local_copy_is_downloaded_again(server):
    url, name = f"{server.url}/bucket/cache", NAMES[1]
    local = open_shards(url)
    path = local.path(name)
    local.close()
    path.write_bytes(b"x" * SIZE)
    local = open_shards(url)
    assert local.path(name).read_bytes() == content(1) and server.requests[f"shards/{name}"] == 2
    path.write_bytes(b"x" * SIZE)
    assert local.path(name).read_bytes() == b"x" * SIZE  # each copy is verified once
    local.close()


@pytest.mark.parametrize("status", [401, 403])
def test_http_access_denied(server, status):
    server.faults["manifest.json"] = [status] * 9
    with pytest.raises(UsageError, match=r"/manifest.json: access was denied \(.*; check its permissions"):
        open_shards(f"{server.url}/bucket/cache")
    assert server.requests["manifest.json"] == 1, "denied access is not retried"


def test_s3_access_denied(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    local = open_shards("s3://bucket/cache")
    server.faults[f"shards/{NAMES[0]}"] = [403] * 9
    with pytest.raises(
        UsageError, match=rf"s3://bucket/cache/shards/{NAMES[0]}: access was denied.*set AWS_PROFILE, or"
    ):
        local.path(NAMES[0])
    local.close()


def test_unreachable_server(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match=r"manifest.json could not be downloaded in 4 attempts: .*Connect"):
        remote.open_remote_manifest(f"{server.url}/bucket/cache")


def test_delay_grows_between_attempts(server, monkeypatch):
    delays = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=delays.append))
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.5, 2.0, 8.0))
    server.faults["manifest.json"] = [500] * 3
    assert remote.open_remote_manifest(f"{server.url}/bucket/cache").fingerprint
    assert delays == [0.5, 2.0, 8.0]


# ---- the manifest ----


def test_missing_or_unreadable_manifest(memory):
    with pytest.raises(UsageError, match=r"no/manifest.json does not exist"):
        remote.open_remote_manifest("memory://no")
    for content, message in ((b"{", "cannot be read"), (b"[1]", "has the format None"), (b"\xff", "cannot be read")):
        memory.pipe("/cache/manifest.json", content)
        with pytest.raises(UsageError, match=rf"memory://cache/manifest.json {message}"):
            remote.open_remote_manifest("memory://cache")


def test_is_remote():
    for url in ("s3://a/b", "gs://a", "https://a/b", "memory://a", "S3://a"):
        assert remote.is_remote(url)
    for url in ("a/b", "/a//b", "digits", "shapes:500", Path("/a"), "a-{000..009}.tar", "C:\\a"):
        assert not remote.is_remote(url)


@pytest.mark.parametrize(
    "name", ["../../.bashrc", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.safetensors\n", "x.py"]
)
def test_unsafe_manifest(memory, name):
    memory.pipe("/cache/manifest.json", json.dumps(manifest_tree(names=[name])).encode())
    with pytest.raises(UsageError, match=r"memory://cache/manifest.json names the file .*, which is unsafe"):
        open_shards("memory://cache")


@pytest.mark.parametrize(
    "broken", [{"files": None}, {"files": [{}]}, {"files": [[]]}, {"fingerprint": "not hex"}, {"files": {"a": 1}}]
)
def test_damaged_manifest(memory, broken):
    memory.pipe("/cache/manifest.json", json.dumps(manifest_tree() | broken).encode())
    with pytest.raises(UsageError, match=r"memory://cache/manifest.json is damaged"):
        open_shards("memory://cache")


def test_missing_packages():
    """fsspec is imported lazily."""
    code = """if True:
        import sys
        from gesso.data.cache import remote
        from gesso.errors import UsageError
        assert not {'fsspec', 's3fs', 'aiohttp'} & {*sys.modules}
        for package in ('fsspec', 's3fs'):
            sys.modules[package] = None
            try:
                remote.open_remote_manifest('s3://a/b')
            except UsageError as error:
                print(error)
            del sys.modules[package]
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.splitlines() == [
        "this needs fsspec: pip install 'gesso-diffusion[s3]'",
        "s3://a/b: reading s3:// needs a package that is not installed: pip install 'gesso-diffusion[s3]'",
    ], process.stderr
    with pytest.raises(UsageError, match="reading gs:// needs a package that is not installed: pip install gcsfs"):
        remote.open_remote_manifest("gs://a/b")
    with pytest.raises(UsageError, match=r"no-such://a/b: no-such:// is refused; write a path, or"):
        remote.open_remote_manifest("no-such://a/b")


# ---- the limit ----


def test_least_recently_used_is_removed(memory):
    local = open_shards("memory://cache", max_bytes=3 * SIZE)
    for i in (0, 1, 2, 0):
        local.path(NAMES[i])
    local.release(NAMES)
    local.path(NAMES[3])
    assert stored_names(local) == [NAMES[0], NAMES[2], NAMES[3]]
    local.release(NAMES)
    local.path(NAMES[4])
    assert stored_names(local) == [NAMES[0], NAMES[3], NAMES[4]]
    # A later reader uses them.
    local.close()
    later = open_shards("memory://cache", max_bytes=3 * SIZE)
    memory.store.clear()
    for i in (0, 3, 4):
        assert later.path(NAMES[i]).read_bytes() == content(i)
    later.close()


def test_pinned_files_are_not_removed(memory):
    """Required files may exceed the limit; requested files are pinned too, but downloaded only within the limit."""
    local = open_shards("memory://cache", max_bytes=2 * SIZE)
    for i in range(3):
        local.path(NAMES[i])
    assert stored_names(local) == NAMES[:3]
    prefetch_now(local, NAMES[3:])
    assert stored_names(local) == NAMES[:3]
    local.release(NAMES[:2])
    prefetch_now(local, NAMES[3:])
    assert stored_names(local) == NAMES[2:4]
    # The oldest file is requested, so it is not removed.
    os.utime(local.folder / NAMES[3], (0, 0))
    local.release(NAMES)
    local.path(NAMES[5])
    assert stored_names(local) == [NAMES[3], NAMES[5]]
    local.close()


def test_requests_are_served_in_order(memory):
    """Several files are downloaded in parallel; no file is removed for one that does not fit."""
    for _ in range(20):
        local = open_shards("memory://cache", max_bytes=3 * SIZE)
        local.path(NAMES[0])
        local.path(NAMES[1])
        local.release([NAMES[0]])
        local.prefetch([NAMES[1], *NAMES[3:]])
        wait_for(lambda: stored_names(local) == [NAMES[1], NAMES[3], NAMES[4]])  # noqa: B023
        local.close()
    local = open_shards("memory://cache", max_bytes=3 * SIZE)
    local.prefetch(NAMES[:3])
    wait_for(lambda: stored_names(local) == NAMES[:3])
    local.prefetch([*NAMES[1:3], NAMES[5]])
    wait_for(lambda: NAMES[5] in stored_names(local))
    assert NAMES[0] not in stored_names(local)
    prefetch_now(local, [NAMES[5], NAMES[1], NAMES[3], NAMES[4]])
    assert stored_names(local) == [NAMES[i] for i in (1, 3, 5)]
    local.close()


def test_two_readers_share_a_folder(memory):
    reader, second_reader = (open_shards("memory://cache", max_bytes=2 * SIZE) for _ in range(2))
    reader.path(NAMES[0])
    for i in (1, 2, 3):
        second_reader.path(NAMES[i])
        second_reader.release(NAMES)
    assert stored_names(reader) == [NAMES[0], NAMES[3]]
    reader.close()
    second_reader.path(NAMES[4])
    second_reader.release(NAMES)
    second_reader.path(NAMES[5])
    assert stored_names(second_reader) == [NAMES[4], NAMES[5]]
    second_reader.close()
    assert not list((second_reader.folder / ".users").iterdir())


def test_new_cache_at_the_same_address_has_a_new_folder(memory):
    first = open_shards("memory://cache")
    first.path(NAMES[0])
    memory.pipe("/cache/manifest.json", json.dumps(manifest_tree() | {"fingerprint": "abcdef"}).encode())
    second = open_shards("memory://cache")
    assert stored_names(first) == [NAMES[0]] and stored_names(second) == []
    for local in (first, second):
        local.close()


def test_file_of_wrong_size_is_downloaded_again(memory):
    local = open_shards("memory://cache")
    local.path(NAMES[0]).write_bytes(b"shorter")
    assert local.path(NAMES[0]).read_bytes() == content(0)
    local.close()


def test_limit_below_one_file(memory):
    with pytest.raises(UsageError, match=r"the limit of 15 kB is too small for a shard of 20 kB"):
        open_shards("memory://cache", max_bytes=15_000)


Usage = namedtuple("Usage", "total used free")


def test_full_disk(memory, monkeypatch):
    free = [int(2.5 * SIZE)]
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: Usage(10**9, 0, free[0]))
    with pytest.raises(
        UsageError, match=r"shards need 120 kB in .*, but only 50 kB are free: free some space, set .*, or set XDG"
    ):
        open_shards("memory://cache")
    local = open_shards("memory://cache", max_bytes=2 * SIZE)
    local.path(NAMES[0])
    free[0] = SIZE // 2  # filled by another program
    prefetch_now(local, NAMES[1:2])
    assert stored_names(local) == [NAMES[0]]
    with pytest.raises(UsageError, match=r"shards need 20 kB in .*, but only 10 kB are free"):
        local.path(NAMES[1])
    # Released files are removed when the disk is full, even within the limit.
    local.release(NAMES)
    local.path(NAMES[1])
    assert stored_names(local) == [NAMES[1]]
    local.close()


def test_unwritable_folder(memory, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        UsageError, match=r"cannot store shards in .* \(Not a directory\): set XDG_CACHE_HOME to a writable"
    ):
        open_shards("memory://cache")


def test_disk_fills_up_during_download(memory, monkeypatch):
    local = open_shards("memory://cache")

    def full_disk(path, target, callback):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local._storage, "get_file", full_disk)
    with pytest.raises(RunError, match="no space left to write"):
        local.path(NAMES[0])
    assert stored_names(local) == [] and not list(local.folder.glob(".*.tmp"))
    local.close()


# ---- threads and processes ----


def test_threads_download_a_file_once(server):
    local = open_shards(f"{server.url}/bucket/cache")
    server.delay = 0.05
    local.prefetch(NAMES)
    threads = [threading.Thread(target=local.path, args=(name,)) for name in NAMES * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored_names(local) == NAMES
    assert all(server.requests[f"shards/{name}"] == 1 for name in NAMES)
    local.close()


def test_new_request_replaces_the_old_one(server):
    local = open_shards(f"{server.url}/bucket/cache")
    for name in NAMES[:4]:
        server.faults[f"shards/{name}"] = ["stall"] * 9
    local.prefetch(NAMES[:5])
    wait_for(lambda: all(server.requests[f"shards/{name}"] for name in NAMES[:4]))
    local.prefetch(NAMES[5:])
    server.faults.clear()
    server.release_stalled.set()
    wait_for(lambda: NAMES[5] in stored_names(local))
    assert server.requests[f"shards/{NAMES[4]}"] == 0
    local.close()


WORKER = """
import json, sys
from gesso.config import addresses
from gesso.data.cache import remote
for url, max_bytes, names in json.loads(sys.argv[1]):
    manifest = remote.open_remote_manifest(url)
    local = remote.RemoteShards(url, manifest.files, manifest.fingerprint, max_bytes)
    for i, name in enumerate(names):
        local.prefetch(names[i + 1 : i + 3])
        assert len(local.path(name).read_bytes()) == 20_000
        local.release([name])
    local.close()
print("done")
"""


def worker(*jobs) -> subprocess.Popen:
    """Start a process that reads files: (url, max_bytes, names) one after another."""
    command = [sys.executable, "-c", WORKER, json.dumps(jobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_downloads(server):
    """Without a limit each file is downloaded once; with a limit some are downloaded again."""
    limited_server = Server(server_files())
    server.delay = limited_server.delay = 0.02
    urls = [f"{s.url}/bucket/cache" for s in (server, limited_server)]
    unlimited, limited = open_shards(urls[0]), open_shards(urls[1], 2 * SIZE)
    orders = [NAMES * 4, NAMES[::-1] * 4]
    running = [worker((urls[0], None, names), (urls[1], 2 * SIZE, names)) for names in orders]
    max_stored = 0
    while any(process.poll() is None for process in running):
        max_stored = max(max_stored, len(stored_names(limited)))
        time.sleep(0.002)
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0 and out == "done\n", error
    assert stored_names(unlimited) == NAMES and all(server.requests[f"shards/{name}"] == 1 for name in NAMES)
    assert len(stored_names(limited)) <= 4 and max_stored <= 4  # files pinned by two processes exceed the limit
    for local in (unlimited, limited):
        assert all((local.folder / name).read_bytes() == content(NAMES.index(name)) for name in stored_names(local))
        assert not list(local.folder.glob(".*.tmp")) and len(list((local.folder / ".users").iterdir())) == 1
        local.close()
    limited_server.shutdown()
    limited_server.server_close()


def test_kill_during_download(server):
    url, name = f"{server.url}/bucket/cache", NAMES[0]
    server.faults[f"shards/{name}"] = ["stall"]
    local = open_shards(url, 2 * SIZE)
    process = worker((url, None, [name]))
    try:
        wait_for(lambda: list(local.folder.glob(".*.tmp")) and server.requests[f"shards/{name}"] == 1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.communicate()
    assert stored_names(local) == [] and len(list(local.folder.glob(".*.tmp"))) == 1
    assert local.path(NAMES[1]).read_bytes() == content(1)  # a download of another file removes the partial one
    assert not list(local.folder.glob(".*.tmp"))
    assert local.path(name).read_bytes() == content(0)
    # The pins of the killed process are dropped.
    local.release(NAMES)
    local.path(NAMES[2])
    assert len(stored_names(local)) == 2 and len(list((local.folder / ".users").iterdir())) == 1
    local.close()


def test_process_exits_during_prefetch(server):
    """A process does not wait for files that it will not read: it ends before the first retry."""
    url = f"{server.url}/bucket/cache"
    for name in NAMES:
        server.faults[f"shards/{name}"] = ["stall"] * 9
    code = (
        "import time; from gesso.data.cache import remote; "
        f"manifest = remote.open_remote_manifest({url!r}); "
        f"remote.RemoteShards({url!r}, manifest.files, manifest.fingerprint).prefetch({NAMES!r}); time.sleep(0.5)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    assert all(server.requests[f"shards/{name}"] <= 1 for name in NAMES)


# ---- with an order ----


def test_windowed_epoch_stays_within_the_limit(memory):
    """As in CachedDataset: the shards of this window are pinned, those of the next are prefetched."""
    windowed, rows = ShardWindowShuffle([10] * 6, window=2, seed=0), 10
    local = open_shards("memory://cache", max_bytes=4 * SIZE)
    in_use, fetched, get_file = [], [], local._storage.get_file
    local._storage.get_file = lambda path, target, callback: (fetched.append(path), get_file(path, target))
    try:
        for start in range(0, 120, 5):
            sample_index = torch.arange(start, start + 5)
            window = windowed.shards_for(start, start + 5)
            local.release([NAMES[s] for s in in_use if s not in window])
            in_use = window
            for i in windowed(sample_index).tolist():
                assert local.path(NAMES[i // rows]).read_bytes() == content(i // rows)
            prefetch_now(local, [NAMES[s] for s in windowed.shards_for(start, start + 5 + windowed.max_window_size)])
            assert len(stored_names(local)) <= 4
    finally:
        local._storage.get_file = get_file
    assert 6 <= len(fetched) <= 12
    local.close()
