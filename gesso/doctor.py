"""Check of the Python environment and the machine for problems that would break a run.

Imports nothing of gesso, so that it works if gesso does not.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 6)
MIN_FREE_BYTES = 5e9
IMPORT_TIMEOUT_S = 120  # a first import from a cold network disk can take a minute

DISTRIBUTION = "gesso-diffusion"
"""Name of gesso for pip, as in gesso.errors, which this module does not import."""
REQUIRED_PACKAGES = (DISTRIBUTION, "torch", "numpy", "safetensors")
OPTIONAL_PACKAGES = {"diffusers": "vae", "transformers": "text"}

# Looking up an operator shows that the compiled part is loaded; some versions only warn if it is not.
TORCHVISION_PROBE = "import torch, torchvision.ops, torchvision.transforms; torch.ops.torchvision.nms"
TORCHVISION_DEPENDENTS = "diffusers' AutoencoderKL, transformers' CLIPTextModel and Dinov2Model"


@dataclass(frozen=True)
class Finding:
    """Line of the report; every warning and problem has a fix."""

    level: Literal["ok", "warning", "problem"]
    topic: str
    text: str
    fix: str | None = None


def run_checks(folder: Path = Path("runs")) -> list[Finding]:
    """Run every check. Never raises and leaves no files.

    Args:
        folder: folder that runs will be written to; it need not exist.
    """
    checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("python", check_python),
        ("versions", check_versions),
        ("torchvision", check_torchvision),
        ("cpu", check_cpu),
        ("cuda", check_cuda),
        ("disk", lambda: check_disk(folder)),
        ("writing", lambda: check_writing(folder)),
        ("git", check_git),
    )
    return [finding for topic, check in checks for finding in _run_check(topic, check)]


def render(findings: list[Finding]) -> str:
    """Return findings as text: one aligned line each, with its fix indented below."""
    level_width = max((len(finding.level) for finding in findings), default=0)
    topic_width = max((len(finding.topic) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<{level_width}}  {finding.topic:<{topic_width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':<{level_width + topic_width + 4}}fix: {finding.fix}")
    return "\n".join(lines)


def check_python() -> list[Finding]:
    """Check the version of Python."""
    text = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] >= MIN_PYTHON:
        return [Finding("ok", "python", text)]
    oldest = _format_version(MIN_PYTHON)
    return [
        Finding(
            "problem", "python", f"{text}, older than {oldest}", f"create an environment with Python {oldest} or newer"
        )
    ]


def check_versions() -> list[Finding]:
    """Check the required and optional packages and their versions."""
    required = [_check_required(package) for package in REQUIRED_PACKAGES]
    return required + [_check_optional(package, extra) for package, extra in OPTIONAL_PACKAGES.items()]


def _check_required(package: str) -> Finding:
    version = _package_version(package)
    if version is None and package == DISTRIBUTION:
        return Finding("warning", package, "runs from a source tree, not installed", "pip install -e . in that tree")
    if version is None:
        return Finding("problem", package, "not installed", f"pip install {package}")
    if package == "torch":
        return _check_torch(version)
    return Finding("ok", package, version)


def _check_torch(version: str) -> Finding:
    match = re.match(r"(\d+)\.(\d+)", version)
    oldest = _format_version(MIN_TORCH)
    if not match:
        return Finding("warning", "torch", f"{version}: not a version number", f"pip install 'torch>={oldest}'")
    if (int(match[1]), int(match[2])) < MIN_TORCH:
        return Finding(
            "problem", "torch", f"{version}, older than {oldest}", f"pip install --upgrade 'torch>={oldest}'"
        )
    return Finding("ok", "torch", version)


def _check_optional(package: str, extra: str) -> Finding:
    missing = f"not installed; pip install '{DISTRIBUTION}[{extra}]' adds it"
    return Finding("ok", package, _package_version(package) or missing)


def check_torchvision() -> list[Finding]:
    """Import torchvision in another process, since a broken one can raise, abort or register some of its operators."""
    if util.find_spec("torchvision") is None:
        return [Finding("ok", "torchvision", "absent; gesso never needs it")]
    name = f"torchvision {_package_version('torchvision') or 'of unknown version'}"
    fix = "pip uninstall torchvision (gesso never needs it)"
    try:
        result = _run_command([sys.executable, "-c", TORCHVISION_PROBE])
    except subprocess.TimeoutExpired:
        text = f"{name} does not import within {IMPORT_TIMEOUT_S} s; this also blocks {TORCHVISION_DEPENDENTS}"
        return [Finding("warning", "torchvision", text, fix)]
    if result.returncode != 0:
        text = f"{name} is broken and breaks {TORCHVISION_DEPENDENTS}: {_last_line(result)}"
        return [Finding("problem", "torchvision", text, fix)]
    required, torch_version = _torch_required_by_torchvision(), _package_version("torch")
    # The requirement has no local part such as +cu126.
    if required and torch_version and torch_version.split("+")[0] != required:
        text = f"{name} imports, but is built for torch {required}, not {torch_version}"
        return [Finding("warning", "torchvision", text, fix)]
    return [Finding("ok", "torchvision", f"{name} imports; gesso never needs it")]


def _torch_required_by_torchvision() -> str | None:
    try:
        requirements = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None
    matches = (re.match(r"torch\s*\(?==\s*([\d.]+\d)", requirement) for requirement in requirements)
    return next((match[1] for match in matches if match), None)


def check_cpu() -> list[Finding]:
    """Check that the threads of all processes fit the usable CPU cores."""
    import torch

    usable, threads = _usable_cores(), torch.get_num_threads()
    setting = os.environ.get("OMP_NUM_THREADS")
    text = f"{os.cpu_count()} cores, {usable} usable, {threads} torch threads, OMP_NUM_THREADS {setting or 'not set'}"
    per_process = re.match(r"\s*(\d+)", setting or "")  # "4,2" has one number per level of nesting
    # torchrun starts one process per GPU; each inherits the variable.
    processes = max(1, torch.cuda.device_count())
    total = max(threads, int(per_process[1]) * processes if per_process else 0)
    if total <= usable:
        return [Finding("ok", "cpu", text)]
    fix = f"export OMP_NUM_THREADS={max(1, usable // processes)}"
    return [Finding("warning", "cpu", f"{text}: {total} threads share {usable} cores and slow down", fix)]


def _usable_cores() -> int:
    """Return the number of cores that this process may use; taskset, Slurm and containers limit them."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # available on Linux only
        return os.cpu_count() or 1


def check_cuda() -> list[Finding]:
    """Check that torch can use the GPUs of this machine."""
    import torch

    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_check_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda:
        reason = f": {_one_line(str(messages[0].message))}" if messages else ""
        fix = "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES; without a GPU gesso trains on the CPU"
        return [
            Finding("warning", "cuda", f"torch is built for CUDA {torch.version.cuda} but sees no device{reason}", fix)
        ]
    if shutil.which("nvidia-smi"):
        fix = "pip install torch from the CUDA index that pytorch.org names for your driver"
        return [Finding("warning", "cuda", "an NVIDIA driver is installed, but this torch cannot use it", fix)]
    return [Finding("ok", "cuda", "no device; gesso trains on the CPU")]


def _check_gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"
    # torch reports bf16 also for GPUs that emulate it, which is slower than float32.
    if properties.major >= 8:
        return Finding("ok", f"cuda:{index}", f"{text}, bf16")
    return Finding(
        "warning",
        f"cuda:{index}",
        f"{text}, no native bf16",
        "train in float32, or use a GPU of capability 8.0 or newer",
    )


def check_disk(folder: Path) -> list[Finding]:
    """Check the free disk space for runs."""
    free = shutil.disk_usage(_nearest_existing(folder)).free
    text = f"{free / 1e9:.1f} GB free for {folder}"
    if free >= MIN_FREE_BYTES:
        return [Finding("ok", "disk", text)]
    fix = "free some space, or write to another disk with --out"
    return [Finding("warning", "disk", f"{text}, less than {MIN_FREE_BYTES / 1e9:.0f} GB", fix)]


def check_writing(folder: Path) -> list[Finding]:
    """Create and delete a file: permission bits do not show quotas, read-only mounts or root's rights."""
    try:
        parent = _nearest_existing(folder)
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".gesso-doctor-") as file:
            file.write(b"gesso")
            file.flush()
    except OSError as error:
        reason = error.strerror or type(error).__name__  # str(error) contains the full path
        fix = "make it writable (chmod u+w, chown, remount), or write to another folder with --out"
        return [Finding("problem", "writing", f"cannot write in {folder}: {reason}", fix)]
    return [Finding("ok", "writing", f"{folder} is writable" if parent == folder else f"{folder} can be created")]


def check_git() -> list[Finding]:
    """Check that git runs; reports use it to record the commit."""
    try:
        result = _run_command(["git", "--version"])
    except FileNotFoundError:
        return [_git_missing("not found")]
    if result.returncode != 0:  # macOS has a stub that only asks for developer tools
        return [_git_missing(f"does not run: {_last_line(result)}")]
    return [Finding("ok", "git", result.stdout.strip().removeprefix("git version "))]


def _git_missing(reason: str) -> Finding:
    text = f"{reason}; reports will not contain the commit"
    return Finding("warning", "git", text, "install git (apt, brew, conda)")


def _run_check(topic: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of a check, or a problem if the check itself fails."""
    try:
        return check()
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = f"check failed: {type(error).__name__}: {_one_line(reason)}"
        fix = (
            "pip install --force-reinstall torch"
            if topic in ("cpu", "cuda")
            else "report this line as an issue of gesso"
        )
        return [Finding("problem", topic, text, fix)]


def _run_command(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S, check=False
    )


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of stderr (the exception of a traceback), or the exit status if it is empty."""
    lines = result.stderr.strip().splitlines()
    return _one_line(lines[-1]) if lines else f"exit status {result.returncode}"


def _one_line(text: str) -> str:
    """Return text on one line with absolute paths cut to their last part, safe to paste into a public issue."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\":,()]*/)*([^\s'\":,()/]+)", r"\1", " ".join(text.split()))


def _nearest_existing(folder: Path) -> Path:
    """Return the folder or its closest parent that exists; the first run creates runs/."""
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("."))


def _package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _format_version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
