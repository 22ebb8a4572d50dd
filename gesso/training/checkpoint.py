"""Checkpoints to resume from: one folder each, with safetensors files of torch.distributed.checkpoint.

state/nimg000000128000/state.json           nimg, sizes and checksums of the files
state/nimg000000128000/*.safetensors        all tensors of the trainer by name; each rank writes its part

A checkpoint can be read with any number of ranks, sharded or not, whatever wrote it.
"""

import contextlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from gesso import atomic_io, untrusted
from gesso.errors import RunError
from gesso.training.ranks import SINGLE_PROCESS, Ranks

FORMAT = "gesso state 1"


class CheckpointWriter:
    """Write checkpoints and other files in a background thread, in the order of the calls.

    Tensors are written with the values that they have at the time of the call. After the first error nothing more is
    written, so that every file in a run folder is there if a later one is; the next call raises the error.
    """

    def __init__(self, ranks: Ranks = SINGLE_PROCESS, timeout_s: float = 600):
        self.ranks, self.executor = ranks, ThreadPoolExecutor(1, "save")
        self.pending: list[Future[None]] = []
        self.failed = False
        self.group = ranks.new_gloo_group(timeout_s)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, folder: Path, nimg: int, tensors: dict[str, Tensor], keep: int, milestone: bool) -> None:
        """Write a checkpoint as `save_checkpoint` does, after waiting for the previous writes."""
        self.wait()
        staged = cast(dict[str, Tensor], self.stager.stage(dict(tensors)))  # a Future only for asynchronous staging
        self.submit(lambda: save_checkpoint(folder, nimg, staged, keep, milestone, self.ranks, self.group))

    def submit(self, write: Callable[[], None]) -> None:
        """Call `write` in the background thread."""
        self.raise_errors()
        self.pending.append(self.executor.submit(self._write, write))

    def _write(self, write: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            write()
        except BaseException:
            self.failed = True
            raise

    def raise_errors(self) -> None:
        """Raise the first error of the background thread."""
        while self.pending and self.pending[0].done():
            self.pending.pop(0).result()

    def wait(self) -> None:
        """Wait until all submitted files are written; raise the first error."""
        while self.pending:
            self.pending.pop(0).result()

    def close(self) -> None:
        """Finish the submitted writes and end the thread."""
        self.executor.shutdown(wait=True)


def save_checkpoint(
    folder: Path,
    nimg: int,
    tensors: dict[str, Tensor],
    keep: int = 2,
    milestone: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint, then delete all but the last `keep` and the milestones. All ranks must call it.

    Args:
        folder: Folder state/ of the run.
        nimg: Images seen.
        tensors: Tensors of the trainer by name.
        keep: Number of checkpoints to keep besides milestones.
        milestone: True for a checkpoint that is never deleted.
        ranks: Ranks of the run.
        group: Process group of the calling thread; None for the default group.
    """
    target = folder / f"nimg{nimg:012d}"
    temporary = atomic_io.temporary_dir(target)
    with atomic_io.atomic_dir(target) if ranks.is_main else atomic_io.disk_errors(target):
        ranks.barrier(group)
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        try:
            with _ignore_single_process_warning():
                dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=ranks.world_size == 1)
        except CheckpointException as error:  # it wraps the errors of the ranks: raise the first of them
            raise next(iter(error.failures.values()))[0] from None
        ranks.barrier(group)
        if not ranks.is_main:
            return
        files = sorted(temporary.iterdir())
        sizes = {f.name: f.stat().st_size for f in files}
        checksums = {f.name: _file_checksum(f) for f in files}
        description = {"format": FORMAT, "nimg": nimg, "milestone": milestone, "files": sizes, "crc32": checksums}
        (temporary / "state.json").write_text(json.dumps(description))
    for old in list_checkpoints(folder)[:-keep]:
        if not _is_milestone(old):
            atomic_io.remove_dir(old)


def _file_checksum(path: Path) -> str:
    """Return the CRC-32 of a regular file as 8 hexadecimal digits."""
    crc = 0
    with open(untrusted.open_regular(path, follow_links=False), "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _is_milestone(path: Path) -> bool:
    try:
        return bool(_read_description(path)["milestone"])
    except (OSError, ValueError):
        return False


def _read_description(path: Path) -> dict[str, Any]:
    """Return the content of state.json, checked. Raises OSError or ValueError."""
    description = untrusted.read_json_object(path / "state.json", follow_links=False)
    if description.get("format") != FORMAT:
        raise ValueError("it was not written by gesso")
    types = {"nimg": int, "milestone": bool, "files": dict}
    if any(type(description.get(name)) is not kind for name, kind in types.items()) or description["nimg"] < 0:
        raise ValueError("a value has another type")
    description.setdefault("crc32", {})  # of gesso before checksums
    if not isinstance(description["crc32"], dict) or any(Path(name).name != name for name in description["files"]):
        raise ValueError("a value has another type")
    return description


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    return sorted(folder.glob("nimg*"))


def load_latest(
    folder: Path, tensors: dict[str, Tensor], warn: Callable[[str], None], ranks: Ranks = SINGLE_PROCESS
) -> int:
    """Read the newest complete checkpoint into `tensors` in place; return its nimg, 0 if there is none.

    A damaged checkpoint is skipped with `warn(text)`: training from an older one leads to the same weights.

    Raises:
        RunError: All checkpoints are damaged, or the checkpoint is of another network (the message lists the names).
    """
    problems = []
    device = next((t.device for t in tensors.values() if t.device.type != "cpu"), torch.device("cpu"))
    for path in reversed(list_checkpoints(folder)):
        problem = _find_damage(path, ranks)
        # Each rank reads a part of the files: all have to agree.
        if float(ranks.all_reduce(torch.tensor(float(problem is not None), device=device))):
            problem = problem or "a file that another rank checked"
            problems.append(f"{path}: {problem}")
            warn(f"{path} is damaged ({problem}); using the checkpoint before it")
            continue
        _load_checkpoint(path, tensors, ranks)
        return _read_description(path)["nimg"]
    if problems:
        raise RunError(
            "all checkpoints are damaged:\n" + "\n".join(problems[:2]) + "\nRemove the run folder and start again."
        )
    return 0


def _find_damage(path: Path, ranks: Ranks) -> str | None:
    """Return a description of the damage to a checkpoint folder, or None; each rank compares some checksums."""
    try:
        description = _read_description(path)
    except (OSError, ValueError) as error:
        return f"state.json: {error}"
    for i, (name, num_bytes) in enumerate(description["files"].items()):
        file, checksum = path / name, description["crc32"].get(name)
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != num_bytes:
                return f"{name} has {file.stat().st_size} bytes, not {num_bytes}"
            mine = i % ranks.world_size == ranks.rank
            if mine and checksum is not None and _file_checksum(file) != checksum:
                return f"the checksum of {name} does not match"
        except (OSError, ValueError) as error:
            return f"{name}: {error}"
    try:
        _stored_shapes(path)
    except Exception as error:  # the storage layer raises various errors for a header that it cannot parse
        return f"{type(error).__name__}: {error}"
    return None


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a checkpoint."""
    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(meta.size) for name, meta in metadata.items() if isinstance(meta, TensorStorageMetadata)}


def _load_checkpoint(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    stored = _stored_shapes(path)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if stored != expected:
        missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        different = [name for name in stored.keys() & expected.keys() if stored[name] != expected[name]]
        raise RunError(
            f"{path} is the checkpoint of another network: missing {missing[:3]}, unknown {unknown[:3]}, different "
            f"shape {different[:3]}"
        )
    with _ignore_single_process_warning():
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=ranks.world_size == 1)


@contextlib.contextmanager
def _ignore_single_process_warning() -> Iterator[None]:
    """Suppress torch's warning about checkpoints of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
