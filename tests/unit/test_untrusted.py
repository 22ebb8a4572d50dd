"""Reading of files of other people, and what is opened in a run folder: regular files inside it, no links."""

import io
import json
import os
import re
import threading
from pathlib import Path

import pytest
from helpers.run_factory import write_run
from rich.console import Console

from gesso import atomic_io, untrusted
from gesso.errors import RunError, UsageError
from gesso.report.load import load_runs
from gesso.report.render import png_data_uri
from gesso.training.logging import RunLog, read_log

PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 20


def test_printable_text():
    assert untrusted.printable("a\tb\nc [red]d[/b]\\ é 漢") == "a\tb\nc [red]d[/b]\\ é 漢"
    assert untrusted.printable("\x1b]0;title\x07\x1b[31m") == "\\x1b]0;title\\x07\\x1b[31m"
    assert untrusted.printable("a\r\x9b\u202e\udcff") == "a\\r\\x9b\\u202e\\udcff"


def test_printed_lines_are_short():
    console = Console(file=io.StringIO(), width=80)
    untrusted.print_text(console, "a" * 10**6 + "\n[red]b\x1b[31m")
    first, second = console.file.getvalue().splitlines()
    assert len(first) < 4_100 and "996,000 characters left out" in first and second == "[red]b\\x1b[31m"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested"), (b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested"), (b"{", "Expecting"),
        (b"\xff", "decode"), (b"[" + b"1," * 5_000_000 + b"1]", "items"), (b"[1" + b"0" * 5000 + b"]", "digits"),
    ],
)  # fmt: skip
def test_json_of_other_people(content, message):
    with pytest.raises(ValueError, match=message):
        untrusted.parse_json(content)


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_text("[1]")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    assert untrusted.read_json(tmp_path / "file") == untrusted.read_json(tmp_path / "link") == [1]
    for name in ("pipe", "."):
        with pytest.raises((ValueError, OSError)):
            untrusted.read_bytes(tmp_path / name)
    with pytest.raises((ValueError, OSError)):
        untrusted.read_bytes(untrusted.Path("/dev/zero"))
    for name in ("link", "dangling"):
        with pytest.raises(ValueError, match="symbolic link"):
            untrusted.read_bytes(tmp_path / name, follow_links=False)
    with pytest.raises(ValueError, match="more than"):
        untrusted.read_bytes(tmp_path / "file", max_bytes=2)
    with pytest.raises(ValueError, match="object"):
        untrusted.read_json_object(tmp_path / "file")


def test_temporary_files_do_not_follow_links(tmp_path):
    victim, inside = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    inside.mkdir()
    (inside / f".run.yaml.{os.getpid()}.tmp").symlink_to(victim)
    atomic_io.write_text(inside / "run.yaml", "text")
    (inside / ".state.tmp").symlink_to(tmp_path)
    with atomic_io.atomic_dir(inside / "state") as folder:
        (folder / "a").write_text("b")
    assert (inside / "state" / "a").read_text() == "b"
    (inside / ".old.tmp").symlink_to(tmp_path)
    (inside / ".a.tmp").symlink_to(victim)
    atomic_io.remove_leftovers(inside)
    assert victim.read_text() == "precious" and (inside / "run.yaml").read_text() == "text"
    assert sorted(path.name for path in inside.iterdir()) == ["run.yaml", "state"]


def test_a_linked_log_is_neither_read_nor_written(tmp_path):
    (tmp_path / "victim").write_text('{"nimg": 1}\n')
    (tmp_path / "log.jsonl").symlink_to("victim")
    (tmp_path / "other.jsonl").symlink_to("new")
    with pytest.raises(RunError, match="symbolic link"):
        read_log(tmp_path / "log.jsonl")
    for name in ("log.jsonl", "other.jsonl"):
        with pytest.raises(RunError, match="cannot write"):
            RunLog(tmp_path / name).write(nimg=2)
    assert (tmp_path / "victim").read_text() == '{"nimg": 1}\n' and not (tmp_path / "new").exists()


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    lines = ['{"nimg": 1, "loss": 2}', "[1]", "1", "null", '{"nimg": "x"}', '{"loss": 1}', '{"nimg": true}', "[" * 9999]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b'\n\xff\n{"nimg": 3}\n{"nimg": 4')
    assert [line["nimg"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3]


def test_a_report_shows_no_linked_pictures(tmp_path, gesso):
    run, secret = tmp_path / "run", tmp_path / "secret.png"
    write_run(run)
    (run / "log.jsonl").write_text('{"nimg": 16, "loss": 1.0}\n')
    secret.write_bytes(PNG)
    (run / "sheets").mkdir()
    for name in ("by_class.png", "nearest.png", "nimg000000000016.png"):
        (run / "sheets" / name).symlink_to(secret)
    (run / "sheets" / "nimgx.png").write_bytes(PNG)
    data = load_runs([run])[0]
    assert data.picture("by_class.png") is None and data.sample_grids() == []
    assert gesso("report", run)[0] == 0
    assert "data:image/png" not in (run / "report.html").read_text()
    (run / "sheets" / "by_class.png").unlink()
    (run / "sheets" / "by_class.png").write_bytes(PNG)
    assert gesso("report", run)[0] == 0
    assert "data:image/png" in (run / "report.html").read_text()
    (run / "sheets").rename(tmp_path / "elsewhere")
    (run / "sheets").symlink_to(tmp_path / "elsewhere")
    assert load_runs([run])[0].picture("by_class.png") is None
    with pytest.raises(RunError, match="no PNG"):
        png_data_uri(run / "log.jsonl")


def test_nothing_is_written_through_linked_folders(tmp_path, gesso):
    run, outside = tmp_path / "run", tmp_path / "outside"
    write_run(run)
    outside.mkdir()
    for name in ("sheets", "evaluation", "state"):
        (run / name).symlink_to(outside)
    for arguments in (["sample", run], ["evaluate", run], ["evaluate", run, "eval.metrics=fd_digits"]):
        code, _, err = gesso(*arguments)
        assert code == 2 and "symbolic link out of the run folder" in err, (arguments, err)
    code, _, err = gesso("train", run, "--resume")
    assert code == 2 and "state is a symbolic link" in err
    assert list(outside.iterdir()) == []


# Locks.


@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "pipe"])
def test_a_lock_file_changes_nothing_else(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / ".lock"
    victim.write_text("precious")
    match kind:
        case "link":
            path.symlink_to(victim)
        case "dangling":
            path.symlink_to(tmp_path / "new")
        case "hard":
            path.hardlink_to(victim)
        case "pipe":
            os.mkfifo(path)
    if kind in ("link", "dangling"):
        with pytest.raises(UsageError, match="symbolic link"), atomic_io.lock_dir(tmp_path):
            pass
    else:
        with atomic_io.lock_dir(tmp_path):
            pass
    assert victim.read_text() == "precious" and not (tmp_path / "new").exists()


@pytest.fixture(params=["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL"])
def no_flock(request, monkeypatch):
    """Let flock fail as on file systems without it."""
    import errno
    import fcntl

    def fail(*arguments: object) -> None:
        raise OSError(getattr(errno, request.param), os.strerror(getattr(errno, request.param)))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_locks_without_flock(tmp_path, no_flock):
    with atomic_io.lock_dir(tmp_path):
        message = r"(?s)another process is training in.*delete .*\.lock\.held"
        with pytest.raises(UsageError, match=message), atomic_io.lock_dir(tmp_path):
            pass
        with atomic_io.try_lock(tmp_path / "a") as acquired, atomic_io.try_lock(tmp_path / "a") as again:
            assert acquired and not again
    with atomic_io.lock_dir(tmp_path), atomic_io.lock(tmp_path / "b"):
        pass
    assert not (tmp_path / ".lock.held").exists()


KILLED = """
import errno, fcntl, os, signal, sys
from pathlib import Path
def fail(*arguments): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fail
from gesso import atomic_io
with atomic_io.lock_dir(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stale_lock_without_flock_is_taken_over(tmp_path, no_flock):
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -9
    assert (tmp_path / ".lock.held").exists()
    with atomic_io.lock_dir(tmp_path):
        pass


def test_a_waiting_command_says_what_it_waits_for(tmp_path, caplog):
    path, entered = tmp_path / "metrics.json", threading.Event()

    def wait() -> None:
        with atomic_io.lock(path):
            entered.set()

    with atomic_io.lock(path):
        thread = threading.Thread(target=wait)
        thread.start()
        while not caplog.records:
            assert not entered.wait(0.01)
    thread.join()
    assert entered.is_set()
    assert f"waiting for another process that writes {path}" in caplog.text


def test_json_written_by_gesso_is_read(tmp_path):
    value = {"a": [1, 2.5, None, {"b": "c" * 1000}] * 100}
    atomic_io.write_json(tmp_path / "x.json", value)
    assert untrusted.read_json(tmp_path / "x.json") == json.loads((tmp_path / "x.json").read_text()) == value


def test_every_promise_names_a_test():
    """SECURITY.md names tests as FILE::NAME; a NAME alone is in the file before it, or in that of another promise."""
    root = Path(__file__).parents[1]
    names = re.findall(
        r"`(?:((?:unit|integration)/\w+\.py)(?:::)?)?(test_\w+)?`", (root.parent / "SECURITY.md").read_text()
    )
    file = None
    assert len(names) > 50
    for path, name in names:
        file = path or file
        if file and (path or name):
            assert f"def {name}(" in (root / file).read_text() if name else (root / file).is_file(), (file, name)
