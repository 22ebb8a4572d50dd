"""What this machine offers, and what would spoil a run on it. Imports nothing of gesso, so that it works where gesso does not."""

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

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 6)
LOW_DISK = 5e9  # bytes
IMPORT_SECONDS = 120  # a first import from a cold network disk can take a minute

REQUIRED = ("gesso", "torch", "numpy", "safetensors")
OPTIONAL = {"diffusers": "vae", "transformers": "text"}

# Looking an operator up shows that the compiled half is loaded: some versions only warn when it is not.
TORCHVISION_PROBE = "import torch, torchvision.ops, torchvision.transforms; torch.ops.torchvision.nms"
TORCHVISION_VICTIMS = "diffusers' AutoencoderKL, transformers' CLIPTextModel and Dinov2Model"


@dataclass(frozen=True)
class Finding:
    """One line of the report; every warning and problem has a cure."""

    level: Literal["ok", "warning", "problem"]
    topic: str
    text: str
    cure: str | None = None


def examine(folder: Path = Path("runs")) -> list[Finding]:
    """Run every check; `folder` is where runs are to be written and need not exist. Never raises, leaves nothing behind."""
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
    return [finding for topic, check in checks for finding in _guarded(topic, check)]


def render(findings: list[Finding]) -> str:
    """Plain text: one aligned line per finding, its cure indented below."""
    level_width = max((len(finding.level) for finding in findings), default=0)
    topic_width = max((len(finding.topic) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<{level_width}}  {finding.topic:<{topic_width}}  {finding.text}")
        if finding.cure:
            lines.append(f"{'':<{level_width + topic_width + 4}}cure: {finding.cure}")
    return "\n".join(lines)


def check_python() -> list[Finding]:
    text = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return [Finding("ok", "python", text)]
    oldest = _dotted(OLDEST_PYTHON)
    return [
        Finding(
            "problem", "python", f"{text}, older than {oldest}", f"make an environment with Python {oldest} or newer"
        )
    ]


def check_versions() -> list[Finding]:
    required = [_required(package) for package in REQUIRED]
    return required + [_optional(package, extra) for package, extra in OPTIONAL.items()]


def _required(package: str) -> Finding:
    version = _version(package)
    if version is None and package == "gesso":
        return Finding("warning", package, "runs from a source tree, not installed", "pip install -e . in that tree")
    if version is None:
        return Finding("problem", package, "not installed", f"pip install {package}")
    if package == "torch":
        return _torch(version)
    return Finding("ok", package, version)


def _torch(version: str) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", version)
    oldest = _dotted(OLDEST_TORCH)
    if not found:
        return Finding("warning", "torch", f"{version}: not a version number", f"pip install 'torch>={oldest}'")
    if (int(found[1]), int(found[2])) < OLDEST_TORCH:
        return Finding(
            "problem", "torch", f"{version}, older than {oldest}", f"pip install --upgrade 'torch>={oldest}'"
        )
    return Finding("ok", "torch", version)


def _optional(package: str, extra: str) -> Finding:
    return Finding("ok", package, _version(package) or f"not installed; the extra '{extra}' of gesso brings it")


def check_torchvision() -> list[Finding]:
    """Import torchvision in another process: a broken one can raise, abort or leave half-registered operators behind."""
    if util.find_spec("torchvision") is None:
        return [Finding("ok", "torchvision", "absent, which is best: gesso never needs it")]
    name = f"torchvision {_version('torchvision') or 'of unknown version'}"
    cure = "pip uninstall torchvision (gesso never needs it)"
    try:
        result = _call([sys.executable, "-c", TORCHVISION_PROBE])
    except subprocess.TimeoutExpired:
        text = f"{name} does not import within {IMPORT_SECONDS} s; the same would stop {TORCHVISION_VICTIMS}"
        return [Finding("warning", "torchvision", text, cure)]
    if result.returncode != 0:
        text = f"{name} is broken and breaks {TORCHVISION_VICTIMS}: {_last_line(result)}"
        return [Finding("problem", "torchvision", text, cure)]
    wanted, torch_version = _torch_wanted_by_torchvision(), _version("torch")
    # A local part such as +cu126 is not in the requirement.
    if wanted and torch_version and torch_version.split("+")[0] != wanted:
        text = f"{name} imports, but is built for torch {wanted}, not {torch_version}"
        return [Finding("warning", "torchvision", text, cure)]
    return [Finding("ok", "torchvision", f"{name} imports; gesso never needs it")]


def _torch_wanted_by_torchvision() -> str | None:
    try:
        requirements = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.match(r"torch\s*\(?==\s*([\d.]+\d)", requirement) for requirement in requirements)
    return next((match[1] for match in found if match), None)


def check_cpu() -> list[Finding]:
    import torch

    usable, threads = _usable_cores(), torch.get_num_threads()
    setting = os.environ.get("OMP_NUM_THREADS")
    text = f"{os.cpu_count()} cores, {usable} usable, {threads} torch threads, OMP_NUM_THREADS {setting or 'not set'}"
    per_process = re.match(r"\s*(\d+)", setting or "")  # "4,2" is one number for each level of nesting
    # torchrun starts one process per GPU, and all of them inherit the variable.
    processes = max(1, torch.cuda.device_count())
    wanted = max(threads, int(per_process[1]) * processes if per_process else 0)
    if wanted <= usable:
        return [Finding("ok", "cpu", text)]
    cure = f"export OMP_NUM_THREADS={max(1, usable // processes)}"
    return [Finding("warning", "cpu", f"{text}: {wanted} threads share {usable} cores and wait for each other", cure)]


def _usable_cores() -> int:
    """Cores that the scheduler lets this process use: fewer than the machine has under taskset, Slurm or a container."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1


def check_cuda() -> list[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda:
        reason = f": {_one_line(str(caught[0].message))}" if caught else ""
        cure = "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES; without a GPU gesso trains on the CPU"
        return [
            Finding("warning", "cuda", f"torch is built for CUDA {torch.version.cuda} but sees no device{reason}", cure)
        ]
    if shutil.which("nvidia-smi"):
        cure = "pip install torch from the CUDA index that pytorch.org names for your driver"
        return [Finding("warning", "cuda", "an NVIDIA driver is here, but this torch cannot use it", cure)]
    return [Finding("ok", "cuda", "no device; gesso trains on the CPU")]


def _gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}"
    # torch also says yes to bf16 where it is emulated, which is slower than float32.
    if properties.major >= 8:
        return Finding("ok", f"cuda:{index}", f"{text}, bf16")
    return Finding(
        "warning", f"cuda:{index}", f"{text}, no native bf16", "train in float32, or on capability 8.0 or newer"
    )


def check_disk(folder: Path) -> list[Finding]:
    free = shutil.disk_usage(_nearest(folder)).free
    text = f"{free / 1e9:.1f} GB free for {folder}"
    if free >= LOW_DISK:
        return [Finding("ok", "disk", text)]
    cure = "free some space, or choose another place with --out"
    return [Finding("warning", "disk", f"{text}, less than {LOW_DISK / 1e9:.0f} GB", cure)]


def check_writing(folder: Path) -> list[Finding]:
    """Create and delete a file, since permission bits say nothing about root, quotas or read-only mounts."""
    try:
        place = _nearest(folder)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".gesso-doctor-") as file:
            file.write(b"gesso")
            file.flush()
    except OSError as error:
        reason = error.strerror or type(error).__name__  # str(error) would show the whole path
        cure = "make it writable (chmod u+w, chown, remount), or choose another place with --out"
        return [Finding("problem", "writing", f"cannot write in {folder}: {reason}", cure)]
    return [Finding("ok", "writing", f"{folder} is writable" if place == folder else f"{folder} can be created")]


def check_git() -> list[Finding]:
    try:
        result = _call(["git", "--version"])
    except FileNotFoundError:
        return [_no_git("not found")]
    if result.returncode != 0:  # macOS has a git that only asks for developer tools
        return [_no_git(f"does not run: {_last_line(result)}")]
    return [Finding("ok", "git", result.stdout.strip().removeprefix("git version "))]


def _no_git(what: str) -> Finding:
    return Finding("warning", "git", f"{what}; reports will not name the commit", "install git (apt, brew, conda)")


def _guarded(topic: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that fails is a finding too: the machine it fails on is the one to be examined."""
    try:
        return check()
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = f"could not be examined: {type(error).__name__}: {_one_line(reason)}"
        cure = (
            "pip install --force-reinstall torch"
            if topic in ("cpu", "cuda")
            else "report this line as an issue of gesso"
        )
        return [Finding("problem", topic, text, cure)]


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=IMPORT_SECONDS, check=False
    )


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The exception, which a traceback ends with; a crash by signal may say nothing."""
    lines = result.stderr.strip().splitlines()
    return _one_line(lines[-1]) if lines else f"exit status {result.returncode}"


def _one_line(text: str) -> str:
    """Whitespace joined and absolute paths cut to their last part: reports get pasted into public issues."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\":,()]*/)*([^\s'\":,()/]+)", r"\1", " ".join(text.split()))


def _nearest(folder: Path) -> Path:
    """The folder, or the closest parent that exists: runs/ is made by the first run."""
    return next((place for place in (folder, *folder.parents) if place.exists()), Path("."))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
