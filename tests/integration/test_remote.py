"""Shards from afar: a real S3 server on loopback, servers that lie, cut and stall, kills, bounds, processes side by side."""

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

from gesso.config import addresses
from gesso.data.cache import bounded_file_cache, remote
from gesso.data.samplers import ShardWindowShuffle
from gesso.errors import RunError, UsageError

SIZE = 20_000
NAMES = [f"shard-{i:06d}.safetensors" for i in range(6)]


def content(i: int, size: int = SIZE) -> bytes:
    return hashlib.shake_128(bytes([i])).digest(size)


def tree(size: int = SIZE, names=NAMES) -> dict:
    files = [
        {"name": name, "bytes": size, "sha256": hashlib.sha256(content(i, size)).hexdigest()}
        for i, name in enumerate(names)
    ]
    return {"format": "gesso cache 1", "files": files, "fingerprint": "0123456789abcdef"}


def written(size: int = SIZE, names=NAMES) -> dict[str, bytes]:
    actual = {f"shards/{name}": content(i, size) for i, name in enumerate(names)}
    return actual | {"manifest.json": json.dumps(tree(size, names)).encode()}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
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
    for name, data in written().items():
        storage.pipe(f"/cache/{name}", data)
    return storage


def holding(local: remote.RemoteShards) -> list[str]:
    return sorted(path.name for path in local.folder.glob("*.safetensors"))


def waited(condition, seconds=20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


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
        for name, data in written().items():
            storage.pipe(f"a-bucket/some/cache/{name}", data)
    return "s3://a-bucket/some/cache"


def test_s3(s3):
    local = remote.RemoteShards(s3 + "/")
    assert local.manifest == tree() == remote.read_manifest(s3)
    for i in (2, 0, 2):
        assert local.path(NAMES[i]).read_bytes() == content(i)
    assert local.path(NAMES[2]).name == NAMES[2] and holding(local) == [NAMES[0], NAMES[2]]
    assert not list(local.folder.glob(".*.tmp"))
    local.prefetch(NAMES)
    assert waited(lambda: holding(local) == NAMES)
    assert all((local.folder / name).read_bytes() == content(i) for i, name in enumerate(NAMES))
    local.close()


def test_s3_of_many_parts(s3, monkeypatch):
    """Above 50 MB s3fs fetches ranges side by side."""
    size = 60_000_000
    storage = fsspec.filesystem("s3")
    for name, data in written(size, NAMES[:1]).items():
        storage.pipe(f"a-bucket/large/{name}", data)
    local = remote.RemoteShards("s3://a-bucket/large")
    assert local.path(NAMES[0]).read_bytes() == content(0, size)
    local.close()


def test_s3_what_is_not_there(s3):
    with pytest.raises(UsageError, match=r"s3://a-bucket/nothing/manifest.json: there is no such file; gesso cache"):
        remote.RemoteShards("s3://a-bucket/nothing")
    with pytest.raises(UsageError, match=r"s3://no-such-bucket/x/manifest.json: there is no such bucket"):
        remote.read_manifest("s3://no-such-bucket/x")
    storage = fsspec.filesystem("s3")
    storage.pipe("a-bucket/lost/manifest.json", json.dumps(tree()).encode())
    local = remote.RemoteShards("s3://a-bucket/lost")
    with pytest.raises(RunError, match=rf"s3://a-bucket/lost/shards/{NAMES[3]} is in the manifest and not there"):
        local.path(NAMES[3])
    assert holding(local) == [] and local._in_use == set()
    local.close()


def test_s3_without_credentials(moto, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    with pytest.raises(UsageError, match=r"manifest.json: access was refused \(Unable to locate cred.*set AWS_PROFILE"):
        remote.read_manifest("s3://a-bucket/some/cache")


def test_s3_for_all_to_read(s3, monkeypatch):
    """What the message about credentials says of public buckets."""
    storage = fsspec.filesystem("s3")
    storage.chmod("a-bucket/some/cache/manifest.json", "public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    actual = {}
    fsspec.config.set_conf_env(actual)  # as fsspec does when it is imported
    monkeypatch.setitem(fsspec.config.conf, "s3", actual["s3"])
    assert remote.read_manifest(s3) == tree()


# ---- servers that lie, cut and stall ----


class Server(http.server.ThreadingHTTPServer):
    """Files over HTTP, good enough for s3fs too. faults: of a path, one for each of the first requests."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.going = files, {}, Counter(), threading.Event()
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
                    self.server.going.wait(30)
                self.close_connection = True
                return
            time.sleep(self.server.delay)
            self.wfile.write(data)


@pytest.fixture
def server():
    server = Server(written())
    yield server
    server.going.set()
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
def test_a_bad_download_is_tried_again(server, url, fault):
    local, name = remote.RemoteShards(url), NAMES[1]
    server.faults[f"shards/{name}"] = [fault, fault]
    assert local.path(name).read_bytes() == content(1)
    assert server.requests[f"shards/{name}"] >= 3
    local.close()


@pytest.mark.parametrize(
    "fault, says",
    [("corrupt", "SHA-256 is not the manifest's"), ("short", "19,993 bytes instead of 20,000"), ("cut", ""), (500, "")],
)
def test_bad_downloads_without_end(server, url, fault, says):
    local, name = remote.RemoteShards(url), NAMES[1]
    server.faults[f"shards/{name}"] = [fault] * 100
    with pytest.raises(RunError, match=rf"shards/{name} did not come, in 4 attempts: .*{says}") as caught:
        local.path(name)
    assert "\n" not in str(caught.value)
    # Nothing is left, and the next time it comes.
    assert holding(local) == [] and not list(local.folder.glob(".*.tmp"))
    server.faults.clear()
    assert local.path(name).read_bytes() == content(1)
    local.close()


@pytest.mark.parametrize("status", [401, 403])
def test_access_refused(server, status):
    server.faults["manifest.json"] = [status] * 9
    with pytest.raises(UsageError, match=r"/manifest.json: access was refused \(.*; look at its permissions"):
        remote.RemoteShards(f"{server.url}/bucket/cache")
    assert server.requests["manifest.json"] == 1, "refusals are not tried again"


def test_access_refused_by_s3(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    local = remote.RemoteShards("s3://bucket/cache")
    server.faults[f"shards/{NAMES[0]}"] = [403] * 9
    with pytest.raises(
        UsageError, match=rf"s3://bucket/cache/shards/{NAMES[0]}: access was refused.*set AWS_PROFILE, or"
    ):
        local.path(NAMES[0])
    local.close()


def test_no_server_at_all(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match=r"manifest.json did not come, in 4 attempts: .*Connect"):
        remote.read_manifest(f"{server.url}/bucket/cache")


def test_waits_grow(server, monkeypatch):
    slept = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.5, 2.0, 8.0))
    server.faults["manifest.json"] = [500] * 3
    assert remote.read_manifest(f"{server.url}/bucket/cache")["fingerprint"]
    assert slept == [0.5, 2.0, 8.0]


# ---- the manifest ----


def test_manifest_of_a_folder(tmp_path):
    (tmp_path / "manifest.json").write_text('{"a": 1}')
    assert remote.read_manifest(tmp_path) == remote.read_manifest(str(tmp_path) + "/") == {"a": 1}
    with pytest.raises(UsageError, match=r"no/manifest.json: there is no such file"):
        remote.read_manifest(tmp_path / "no")
    for damaged in ("{", "[1]", "\udcff"):
        (tmp_path / "manifest.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(UsageError, match=r"manifest.json (cannot be read|is damaged)"):
            remote.read_manifest(tmp_path)


def test_is_remote():
    for url in ("s3://a/b", "gs://a", "https://a/b", "memory://a", "S3://a"):
        assert remote.is_remote(url)
    for url in ("a/b", "/a//b", "digits", "shapes:500", Path("/a"), "a-{000..009}.tar", "C:\\a"):
        assert not remote.is_remote(url)


@pytest.mark.parametrize(
    "name", ["../../.bashrc", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.safetensors\n", "x.py"]
)
def test_a_hostile_manifest(memory, name):
    memory.pipe("/cache/manifest.json", json.dumps(tree(names=[name])).encode())
    with pytest.raises(UsageError, match="refused, for it names a file"):
        remote.RemoteShards("memory://cache")


@pytest.mark.parametrize(
    "broken", [{"files": None}, {"files": [{}]}, {"files": [[]]}, {"fingerprint": 3}, {"files": {"a": 1}}]
)
def test_a_damaged_manifest(memory, broken):
    memory.pipe("/cache/manifest.json", json.dumps(tree() | broken).encode())
    with pytest.raises(UsageError, match=r"memory://cache/manifest.json is damaged"):
        remote.RemoteShards("memory://cache")


def test_packages_that_are_missing():
    """And fsspec is loaded only where it is needed."""
    code = """if True:
        import sys
        from gesso.data.cache import remote
        from gesso.errors import UsageError
        assert not {'fsspec', 's3fs', 'aiohttp'} & {*sys.modules}
        for package in ('fsspec', 's3fs'):
            sys.modules[package] = None
            try:
                remote.read_manifest('s3://a/b')
            except UsageError as error:
                print(error)
            del sys.modules[package]
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.splitlines() == [
        "this needs fsspec: pip install 'gesso[s3]'",
        "s3://a/b: s3:// is read with a package that is not installed: pip install 'gesso[s3]'",
    ], process.stderr
    with pytest.raises(UsageError, match="gs:// is read with a package that is not installed: pip install gcsfs"):
        remote.read_manifest("gs://a/b")
    with pytest.raises(UsageError, match=r"no-such://a/b: no-such:// is refused; write a path, or"):
        remote.read_manifest("no-such://a/b")


# ---- the bound ----


def test_what_was_used_longest_ago_goes(memory):
    local = remote.RemoteShards("memory://cache", max_bytes=3 * SIZE)
    for i in (0, 1, 2, 0):
        local.path(NAMES[i])
    local.release(NAMES)
    local.path(NAMES[3])
    assert holding(local) == [NAMES[0], NAMES[2], NAMES[3]]
    local.release(NAMES)
    local.path(NAMES[4])
    assert holding(local) == [NAMES[0], NAMES[3], NAMES[4]]
    # A later process goes on with them.
    local.close()
    later = remote.RemoteShards("memory://cache", max_bytes=3 * SIZE)
    memory.store.clear()
    for i in (0, 3, 4):
        assert later.path(NAMES[i]).read_bytes() == content(i)
    later.close()


def test_what_is_in_use_stays(memory):
    """Even beyond the bound, for training needs it; what is asked for stays too, and is not fetched beyond it."""
    local = remote.RemoteShards("memory://cache", max_bytes=2 * SIZE)
    for i in range(3):
        local.path(NAMES[i])
    assert holding(local) == NAMES[:3]
    local.prefetch(NAMES[3:])
    assert not waited(lambda: len(holding(local)) > 3, 0.3)
    local.release(NAMES[:2])
    local.prefetch(NAMES[3:])
    assert waited(lambda: NAMES[3] in holding(local))
    assert not waited(lambda: len(holding(local)) != 2, 0.2) and holding(local) == NAMES[2:4]
    # Asked for, and not opened yet: it is the oldest, and stays.
    os.utime(local.folder / NAMES[3], (0, 0))
    local.release(NAMES)
    local.path(NAMES[5])
    assert holding(local) == [NAMES[3], NAMES[5]]
    local.close()


def test_first_requested_shard_arrives_first(memory):
    """Though several are fetched at a time; and nothing goes for a file that has no room even so."""
    for _ in range(20):
        local = remote.RemoteShards("memory://cache", max_bytes=3 * SIZE)
        local.path(NAMES[0])
        local.path(NAMES[1])
        local.release([NAMES[0]])
        local.prefetch([NAMES[1], *NAMES[3:]])
        assert waited(lambda: holding(local) == [NAMES[1], NAMES[3], NAMES[4]])  # noqa: B023
        local.close()
    local = remote.RemoteShards("memory://cache", max_bytes=3 * SIZE)
    local.prefetch(NAMES[:3])
    assert waited(lambda: holding(local) == NAMES[:3])
    local.prefetch([*NAMES[1:3], NAMES[5]])
    assert waited(lambda: NAMES[5] in holding(local)) and NAMES[0] not in holding(local)
    local.prefetch([NAMES[5], NAMES[1], NAMES[3], NAMES[4]])
    assert waited(lambda: NAMES[3] in holding(local))
    assert not waited(lambda: NAMES[4] in holding(local), 0.2) and holding(local) == [NAMES[i] for i in (1, 3, 5)]
    local.close()


def test_two_users_of_one_folder(memory):
    one, two = (remote.RemoteShards("memory://cache", max_bytes=2 * SIZE) for _ in range(2))
    one.path(NAMES[0])
    for i in (1, 2, 3):
        two.path(NAMES[i])
        two.release(NAMES)
    assert holding(one) == [NAMES[0], NAMES[3]]
    one.close()
    two.path(NAMES[4])
    two.release(NAMES)
    two.path(NAMES[5])
    assert holding(two) == [NAMES[4], NAMES[5]]
    two.close()
    assert not list((two.folder / ".users").iterdir())


def test_another_cache_at_the_same_address_gets_a_new_folder(memory):
    first = remote.RemoteShards("memory://cache")
    first.path(NAMES[0])
    memory.pipe("/cache/manifest.json", json.dumps(tree() | {"fingerprint": "another"}).encode())
    second = remote.RemoteShards("memory://cache")
    assert holding(first) == [NAMES[0]] and holding(second) == []
    for local in (first, second):
        local.close()


def test_a_file_of_another_length_is_fetched_again(memory):
    local = remote.RemoteShards("memory://cache")
    local.path(NAMES[0]).write_bytes(b"shorter")
    assert local.path(NAMES[0]).read_bytes() == content(0)
    local.close()


@pytest.mark.parametrize("keep, message", [(SIZE - 1, r"0\.0 MB of shards are to be kept, where one file has 0\.0 MB")])
def test_a_bound_below_one_file(memory, keep, message):
    with pytest.raises(UsageError, match=message):
        remote.RemoteShards("memory://cache", max_bytes=keep)


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_too_small(memory, monkeypatch):
    free = [int(2.5 * SIZE)]
    monkeypatch.setattr(bounded_file_cache.shutil, "disk_usage", lambda path: Usage(10**9, 0, free[0]))
    with pytest.raises(
        UsageError, match=r"shards need 0\.1 MB in .*, where 0\.1 MB are free: free some, keep fewer, or set XDG"
    ):
        remote.RemoteShards("memory://cache")
    local = remote.RemoteShards("memory://cache", max_bytes=2 * SIZE)
    local.path(NAMES[0])
    free[0] = SIZE // 2  # someone else filled it
    local.prefetch(NAMES[1:2])
    assert not waited(lambda: len(holding(local)) > 1, 0.2)
    with pytest.raises(UsageError, match=r"shards need 0\.0 MB in .*, where 0\.0 MB are free"):
        local.path(NAMES[1])
    # What is not in use any more makes room on the disk, though the bound would not ask for it.
    local.release(NAMES)
    local.path(NAMES[1])
    assert holding(local) == [NAMES[1]]
    local.close()


def test_a_folder_that_cannot_be_written(memory, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        UsageError, match=r"copies of shards cannot be kept in .* \(Not a directory\): set XDG_CACHE_HOME"
    ):
        remote.RemoteShards("memory://cache")


def test_a_disk_that_fills_up_meanwhile(memory, monkeypatch):
    local = remote.RemoteShards("memory://cache")

    def full(path, to):
        Path(to).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local._storage, "get_file", full)
    with pytest.raises(RunError, match="no space left to write"):
        local.path(NAMES[0])
    assert holding(local) == [] and not list(local.folder.glob(".*.tmp"))
    local.close()


# ---- threads and processes ----


def test_many_threads_fetch_a_file_once(server):
    local = remote.RemoteShards(f"{server.url}/bucket/cache")
    server.delay = 0.05
    local.prefetch(NAMES)
    threads = [threading.Thread(target=local.path, args=(name,)) for name in NAMES * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert holding(local) == NAMES
    assert all(server.requests[f"shards/{name}"] == 1 for name in NAMES)
    local.close()


def test_requested_shards_are_not_fetched_twice(server):
    local = remote.RemoteShards(f"{server.url}/bucket/cache")
    for name in NAMES[:4]:
        server.faults[f"shards/{name}"] = ["stall"] * 9
    local.prefetch(NAMES[:5])
    assert waited(lambda: all(server.requests[f"shards/{name}"] for name in NAMES[:4]))
    local.prefetch(NAMES[5:])
    server.faults.clear()
    server.going.set()
    assert waited(lambda: NAMES[5] in holding(local))
    assert server.requests[f"shards/{NAMES[4]}"] == 0
    local.close()


WORKER = """
import json, sys
from gesso.config import addresses
from gesso.data.cache import remote
for url, keep, names in json.loads(sys.argv[1]):
    local = remote.RemoteShards(url, keep)
    for i, name in enumerate(names):
        local.prefetch(names[i + 1 : i + 3])
        assert len(local.path(name).read_bytes()) == 20_000
        local.release([name])
    local.close()
print("done")
"""


def worker(*jobs) -> subprocess.Popen:
    """A process that reads files: (url, keep, names) one after another."""
    command = [sys.executable, "-c", WORKER, json.dumps(jobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_side_by_side(server):
    """Of one folder without a bound each file is fetched once; of another with a bound some more often."""
    second = Server(written())
    server.delay = second.delay = 0.02
    urls = [f"{each.url}/bucket/cache" for each in (server, second)]
    free, bound = remote.RemoteShards(urls[0]), remote.RemoteShards(urls[1], 2 * SIZE)
    orders = [NAMES * 4, NAMES[::-1] * 4]
    running = [worker((urls[0], None, names), (urls[1], 2 * SIZE, names)) for names in orders]
    most = 0
    while any(process.poll() is None for process in running):
        most = max(most, len(holding(bound)))
        time.sleep(0.002)
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0 and out == "done\n", error
    assert holding(free) == NAMES and all(server.requests[f"shards/{name}"] == 1 for name in NAMES)
    assert len(holding(bound)) <= 4 and most <= 4  # what two processes have in use goes beyond it
    for local in (free, bound):
        assert all((local.folder / name).read_bytes() == content(NAMES.index(name)) for name in holding(local))
        assert not list(local.folder.glob(".*.tmp")) and len(list((local.folder / ".users").iterdir())) == 1
        local.close()
    second.shutdown()
    second.server_close()


def test_killed_in_the_middle_of_a_file(server):
    url, name = f"{server.url}/bucket/cache", NAMES[0]
    server.faults[f"shards/{name}"] = ["stall"]
    local = remote.RemoteShards(url, 2 * SIZE)
    process = worker((url, None, [name]))
    try:
        assert waited(lambda: list(local.folder.glob(".*.tmp")) and server.requests[f"shards/{name}"] == 1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.communicate()
    assert holding(local) == [] and len(list(local.folder.glob(".*.tmp"))) == 1
    assert local.path(NAMES[1]).read_bytes() == content(1)  # sweeps, though it is another file
    assert not list(local.folder.glob(".*.tmp"))
    assert local.path(name).read_bytes() == content(0)
    # What it was using is free to go.
    local.release(NAMES)
    local.path(NAMES[2])
    assert len(holding(local)) == 2 and len(list((local.folder / ".users").iterdir())) == 1
    local.close()


def test_a_process_ends_while_it_fetches_ahead(server):
    """It does not wait for files that it will not read."""
    url = f"{server.url}/bucket/cache"
    for name in NAMES:
        server.faults[f"shards/{name}"] = ["stall"] * 9
    code = f"from gesso.data.cache import remote; remote.RemoteShards({url!r}).prefetch({NAMES!r}); import time; time.sleep(0.5)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stderr == ""


# ---- with an order ----


def test_an_epoch_in_windows_never_exceeds_the_bound(memory):
    """As a reader of the cache goes: the shards of this window in use, those of the next asked for."""
    windowed, rows = ShardWindowShuffle([10] * 6, window=2, seed=0), 10
    local = remote.RemoteShards("memory://cache", max_bytes=4 * SIZE)
    in_use, fetched, get_file = [], [], local._storage.get_file
    local._storage.get_file = lambda path, to: (fetched.append(path), get_file(path, to))
    try:
        for start in range(0, 120, 5):
            counter = torch.arange(start, start + 5)
            now = windowed.shards_for(start, start + 5)
            local.release([NAMES[s] for s in in_use if s not in now])
            in_use = now
            for i in windowed(counter).tolist():
                assert local.path(NAMES[i // rows]).read_bytes() == content(i // rows)
            local.prefetch([NAMES[s] for s in windowed.shards_for(start, start + 5 + windowed.max_window_size)])
            assert len(holding(local)) <= 4
            waited(lambda: len(holding(local)) == 4, 0.2)
    finally:
        local._storage.get_file = get_file
    assert 6 <= len(fetched) <= 12
    local.close()
