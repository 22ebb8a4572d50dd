"""`gesso doctor` on simulated machines: absent, working and broken packages, full and read-only disks."""

import errno
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from gesso import doctor
from gesso.doctor import Finding

NMS_TRACEBACK = (
    "Traceback (most recent call last):\n"
    '  File "/home/me/x.py"\n'
    "RuntimeError: operator torchvision::nms does not exist\n"
)


def fake_versions(monkeypatch, **versions):
    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


def fake_call(monkeypatch, returncode=0, stdout="", stderr=""):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def fake_torchvision(monkeypatch, required="2.13.0", present=True):
    fake_versions(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0")
    monkeypatch.setattr(util, "find_spec", lambda name: object() if present else None)
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", f"torch=={required}", "pillow!=8.3.*,>=5.3.0"])


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1
    return findings[0]


def assert_finding(finding: Finding, level: str, fix: str):
    assert finding.level == level
    assert finding.fix is not None and fix in finding.fix


def test_absent_torchvision_is_ok_and_starts_no_process(monkeypatch):
    fake_torchvision(monkeypatch, present=False)
    commands = fake_call(monkeypatch)
    finding = only(doctor.check_torchvision())
    assert (finding.level, finding.fix, commands) == ("ok", None, [])
    assert "absent" in finding.text


def test_healthy_torchvision_is_imported_in_another_process(monkeypatch):
    fake_torchvision(monkeypatch)
    commands = fake_call(monkeypatch)
    assert only(doctor.check_torchvision()).level == "ok"
    assert commands == [[sys.executable, "-c", doctor.TORCHVISION_PROBE]]
    assert "torchvision" not in sys.modules


def test_broken_torchvision_is_a_problem_that_names_affected_packages(monkeypatch):
    fake_torchvision(monkeypatch)
    fake_call(monkeypatch, returncode=1, stderr=NMS_TRACEBACK)
    finding = only(doctor.check_torchvision())
    assert_finding(finding, "problem", "pip uninstall torchvision")
    assert finding.text.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert "AutoencoderKL" in finding.text and "/home" not in finding.text


def test_torchvision_crash_by_signal_is_a_problem(monkeypatch):
    fake_torchvision(monkeypatch)
    fake_call(monkeypatch, returncode=-11)
    finding = only(doctor.check_torchvision())
    assert_finding(finding, "problem", "pip uninstall torchvision")
    assert "-11" in finding.text


def test_hanging_torchvision_is_a_warning(monkeypatch):
    fake_torchvision(monkeypatch)
    monkeypatch.setattr(subprocess, "run", raising(subprocess.TimeoutExpired("python", 1)))
    assert_finding(only(doctor.check_torchvision()), "warning", "pip uninstall torchvision")


def test_torchvision_for_another_torch_is_a_warning(monkeypatch):
    fake_torchvision(monkeypatch, required="2.5.1")
    fake_call(monkeypatch)
    finding = only(doctor.check_torchvision())
    assert_finding(finding, "warning", "pip uninstall torchvision")
    assert "2.5.1" in finding.text and "2.13.0+cpu" in finding.text


def test_probe_detects_a_broken_package(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = only(doctor.check_torchvision())
    assert_finding(finding, "problem", "pip uninstall torchvision")
    assert "nms does not exist" in finding.text


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("2.5.1+cu124", "problem"),
        ("1.13", "problem"),
        ("2.6.0", "ok"),
        ("2.13.0a0+git1", "ok"),
        ("3.0", "ok"),
        ("nightly", "warning"),
    ],
)
def test_oldest_torch(monkeypatch, version, level):
    fake_versions(monkeypatch, gesso="0.1", torch=version, numpy="2", safetensors="1")
    finding = next(finding for finding in doctor.check_versions() if finding.topic == "torch")
    assert finding.level == level and version in finding.text
    assert (finding.fix is None) == (level == "ok")


def test_missing_packages(monkeypatch):
    fake_versions(monkeypatch, torch="2.13.0")
    findings = {finding.topic: finding for finding in doctor.check_versions()}
    assert_finding(findings["gesso-diffusion"], "warning", "pip install -e .")
    assert_finding(findings["numpy"], "problem", "pip install numpy")
    assert findings["diffusers"].level == findings["transformers"].level == "ok"
    assert (
        "gesso-diffusion[vae]" in findings["diffusers"].text
        and "gesso-diffusion[text]" in findings["transformers"].text
    )


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_PYTHON", (99, 0))
    assert_finding(only(doctor.check_python()), "problem", "Python 99.0")


@pytest.mark.parametrize(
    ("setting", "gpus", "level", "fix"),
    [(None, 0, "ok", ""), ("4", 0, "ok", ""), ("64,2", 0, "warning", "=4"), ("4", 2, "warning", "=2")],
)
def test_oversubscription(monkeypatch, setting, gpus, level, fix):
    monkeypatch.setattr(doctor, "_usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    finding = only(doctor.check_cpu())
    assert finding.level == level and (finding.fix or "").endswith(fix)


@pytest.mark.parametrize(("major", "level"), [(9, "ok"), (8, "ok"), (7, "warning")])
def test_gpu(monkeypatch, major, level):
    properties = namedtuple("Properties", "name total_memory major minor")("Fake GPU", 16 * 2**30, major, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    finding = only(doctor.check_cuda())
    assert (finding.level, finding.topic) == (level, "cuda:0")
    assert "16 GiB" in finding.text and (finding.fix is None) == (level == "ok")


@pytest.mark.parametrize(
    ("cuda", "driver", "level"), [("12.6", None, "warning"), (None, "nvidia-smi", "warning"), (None, None, "ok")]
)
def test_no_gpu(monkeypatch, cuda, driver, level):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    finding = only(doctor.check_cuda())
    assert finding.level == level and (finding.fix is None) == (level == "ok")


@pytest.mark.parametrize(("free", "level"), [(4.9e9, "warning"), (5.1e9, "ok")])
def test_low_disk(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))
    finding = only(doctor.check_disk(tmp_path / "runs"))
    assert finding.level == level and (finding.fix is None) == (level == "ok")


def test_writing_leaves_nothing_behind(tmp_path):
    assert only(doctor.check_writing(tmp_path)).level == "ok"
    assert only(doctor.check_writing(tmp_path / "a/b")).text.endswith("can be created")
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder(monkeypatch, tmp_path):
    # Root ignores permission bits, so the error is simulated.
    error = OSError(errno.EROFS, "Read-only file system", "/secret/place")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", raising(error))
    finding = only(doctor.check_writing(tmp_path))
    assert_finding(finding, "problem", "--out")
    assert "Read-only file system" in finding.text and "secret" not in finding.text


def test_file_in_place_of_the_folder_is_a_problem(tmp_path):
    (tmp_path / "runs").write_text("")
    assert_finding(only(doctor.check_writing(tmp_path / "runs")), "problem", "--out")


def test_folder_without_permission_is_a_problem(monkeypatch):
    monkeypatch.setattr(Path, "exists", raising(PermissionError(errno.EACCES, "Permission denied", "/secret")))
    finding = only(doctor.check_writing(Path("runs")))
    assert_finding(finding, "problem", "--out")
    assert finding.text == "cannot write in runs: Permission denied"


def test_git(monkeypatch):
    fake_call(monkeypatch, stdout="git version 2.47.1\n")
    assert only(doctor.check_git()) == Finding("ok", "git", "2.47.1")
    fake_call(monkeypatch, returncode=1, stderr="xcrun: error: no developer tools\n")
    assert_finding(only(doctor.check_git()), "warning", "install git")
    monkeypatch.setattr(subprocess, "run", raising(FileNotFoundError("git")))
    assert_finding(only(doctor.check_git()), "warning", "install git")


def test_failed_check_is_a_problem_without_paths(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", raising(RuntimeError("cannot open\n/home/me/lib/x.so: bad")))
    monkeypatch.setattr(shutil, "disk_usage", raising(PermissionError(errno.EACCES, "Permission denied", "/secret")))
    findings = {finding.topic: finding for finding in doctor.run_checks(tmp_path)}
    assert findings["cpu"].text == "check failed: RuntimeError: cannot open x.so: bad"
    assert findings["disk"].text == "check failed: PermissionError: Permission denied"
    assert findings["cpu"].level == findings["disk"].level == "problem"
    assert findings["cpu"].fix and findings["disk"].fix


def test_every_problem_has_a_fix_and_creates_no_folder(monkeypatch, tmp_path):
    fake_versions(monkeypatch)
    fake_call(monkeypatch, returncode=1, stderr=NMS_TRACEBACK)
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_usable_cores", lambda: 0)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", float("inf"))
    findings = doctor.run_checks(tmp_path / "runs")
    assert {"gesso-diffusion", "torch", "torchvision", "cpu", "disk", "git"} <= {
        f.topic for f in findings if f.level != "ok"
    }
    assert all((finding.fix is None) == (finding.level == "ok") for finding in findings)
    assert list(tmp_path.iterdir()) == []


def test_render_aligns_findings_and_indents_fixes():
    text = doctor.render([Finding("ok", "git", "2.47"), Finding("problem", "torchvision", "broken", "remove it")])
    assert text.splitlines() == [
        "ok       git          2.47",
        "problem  torchvision  broken",
        "                      fix: remove it",
    ]
    assert doctor.render([]) == ""


def test_imports_nothing_heavy_and_nothing_of_gesso():
    code = "import sys, gesso.doctor; print(sorted(m for m in sys.modules if m == 'torch' or m.startswith('gesso.')))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert result.stdout.strip() == "['gesso.doctor']"
