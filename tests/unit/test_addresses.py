"""Addresses: only storage schemes reach fsspec, and those of a recorded run are confirmed before a download."""

import fsspec
import pytest
from helpers.run_factory import small_run

from gesso import config
from gesso.config import addresses
from gesso.data.cache import remote
from gesso.errors import UsageError


@pytest.fixture(autouse=True)
def _no_fsspec(monkeypatch):
    """Fail a test that lets an address reach fsspec."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"fsspec was called with {arguments}")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)


@pytest.mark.parametrize(
    "uri",
    [
        "reference://x", "file:///etc/passwd", "local:///etc", "ssh://host/x", "sftp://a/b", "ftp://a/b", "git://a/b",
        "github://o:r@main/x", "jupyter://a", "memory://a", "zip://a", "FILE:///etc", "abfs://a/b", "dask://a",
        "s3://bucket/x::reference://y", "simplecache::s3://a/b", "https://a.org/x::file:///y", "filecache::https://a/b",
        "reference::https://a.org/x", "blockcache::reference://",
    ],
)  # fmt: skip
def test_other_file_systems_are_refused(uri, gesso):
    assert remote.is_remote(uri)
    with pytest.raises(UsageError, match=r"refused"):
        remote.open_remote_manifest(uri)
    code, _, err = gesso("train", "digits", f"data.source={uri}", "--out", "/nonexistent/x")
    assert code == 2 and "refused" in err and "Traceback" not in err and len(err.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("https://example.org/x", False), ("https://8.8.8.8/x", False), ("s3://bucket/x", False),
        ("http://localhost/x", True), ("https://127.0.0.1:8000/x", True), ("http://10.1.2.3/x", True),
        ("http://192.168.0.4/", True), ("http://169.254.169.254/latest/meta-data", True), ("http://[::1]/x", True),
        ("http://127.1/x", True), ("http://2130706433/", True), ("http://0x7f000001/", True), ("http://box.local/",
        True),
        ("http://metadata.google.internal/x", True), ("http://user@localhost/", True), ("http://[bad/", True),
        ("http://LOCALHOST./", True),
    ],
)  # fmt: skip
def test_hosts_of_this_machine_or_network(uri, local):
    assert addresses.is_local_host(uri) == local


def test_an_address_of_a_recorded_run_is_confirmed(tmp_path, gesso):
    run = small_run(**{"data.source": "https://example.org/cache"})
    (tmp_path / "run").mkdir()
    config.save_config(run, tmp_path / "run" / "run.yaml")
    for arguments in (["train", tmp_path / "run", "--resume"], ["train", tmp_path / "run" / "run.yaml"]):
        code, _, err = gesso(*arguments)
        assert code == 2 and "data.source=https://example.org/cache, an address: nothing was fetched" in err
        assert "--allow-addresses" in err and len(err.strip().splitlines()) == 2
    code, _, err = gesso("train", "digits", tmp_path / "run" / "run.yaml", "--out", tmp_path / "new")
    assert code == 2 and "nothing was fetched" in err  # a file of settings is not typed
    with pytest.raises(UsageError, match="nothing was fetched"):
        addresses.confirm_addresses(run, [], False)
    addresses.confirm_addresses(run, [], True)
    addresses.confirm_addresses(run, ["data.source=https://example.org/cache"], False)


@pytest.mark.parametrize("name", addresses.ADDRESS_SETTINGS)
def test_every_setting_that_names_images_is_confirmed(name):
    run = small_run(**{"data.num_validation": 0, "monitor.validate_every": "null", name: "http://127.0.0.1:1/cache"})
    with pytest.raises(UsageError, match=f"{name}=.*an address of this machine or a private network"):
        addresses.confirm_addresses(run, [], False)


def test_evaluation_and_ema_sweeps_confirm_too(tmp_path, gesso):
    run = small_run(**{"eval.reference": "s3://somebody/cache", "eval.metrics": "fd_digits"})
    config.save_config(run, tmp_path / "run.yaml")
    for arguments in (
        ["evaluate", tmp_path],
        ["ema", tmp_path, "--sweep", "0.05:0.1:2", "--metric", "fd_digits"],
        ["sweep", tmp_path, "--over", "optim.lr=1e-3,2e-3", "--out", tmp_path / "sweeps"],
    ):
        code, _, err = gesso(*arguments)
        assert code == 2 and "eval.reference=s3://somebody/cache" in err, (arguments, err)
