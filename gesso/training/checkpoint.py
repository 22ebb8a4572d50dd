"""Checkpoints to resume from: torch.distributed.checkpoint in safetensors files, one folder each.

state/nimg000000128000/state.json           nimg and the sizes of the files
state/nimg000000128000/*.safetensors        all tensors of the loop by name; each rank writes its share

Any number of ranks can read what any number of ranks wrote, sharded or not.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from gesso import atomic_io
from gesso.errors import RunError
from gesso.training.ranks import SINGLE_PROCESS, Ranks

FORMAT = "gesso state 1"


class CheckpointWriter:
    """Write checkpoints and other files in a background thread, in the order of the calls.

    The values of the tensors at the time of the call are written. After a disk error nothing more is written, so that a
    run folder never lacks a file that precedes one it has; the next call raises the error.
    """

    def __init__(self, ranks: Ranks = SINGLE_PROCESS, timeout_s: float = 600):
        self.ranks, self.executor = ranks, ThreadPoolExecutor(1, "save")
        self.pending: list[Future[None]] = []
        self.failed = False
        self.group = ranks.new_gloo_group(timeout_s)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, folder: Path, nimg: int, tensors: dict[str, Tensor], keep: int, milestone: bool) -> None:
        """Write a checkpoint as `save_checkpoint` does; waits for the previous checkpoint."""
        self.wait()
        staged = cast(dict[str, Tensor], self.stager.stage(dict(tensors)))  # a future only if staged asynchronously
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
        """Wait until everything is written."""
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
    """Write a complete checkpoint, then delete all but the last `keep` and the milestones. All ranks take part."""
    target = folder / f"nimg{nimg:012d}"
    temporary = atomic_io.temporary_dir(target)
    with atomic_io.atomic_dir(target) if ranks.is_main else atomic_io.disk_errors(target):
        _barrier(ranks, group)
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        try:
            with _ignore_single_process_warning():
                dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=ranks.world_size == 1)
        except CheckpointException as error:  # it wraps what each rank raised: raise that
            raise next(iter(error.failures.values()))[0] from None
        _barrier(ranks, group)
        if not ranks.is_main:
            return
        sizes = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        description = {"format": FORMAT, "nimg": nimg, "milestone": milestone, "files": sizes}
        (temporary / "state.json").write_text(json.dumps(description))
    for old in list_checkpoints(folder)[:-keep]:
        if not _is_milestone(old):
            atomic_io.remove_dir(old)


def _barrier(ranks: Ranks, group: dist.ProcessGroup | None) -> None:
    if ranks.world_size > 1:
        dist.barrier(group=group)


def _is_milestone(state: Path) -> bool:
    try:
        return bool(json.loads((state / "state.json").read_text()).get("milestone"))
    except (OSError, ValueError):
        return False


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
    states = list_checkpoints(folder)
    damage = []
    for state in reversed(states):
        problem = _find_damage(state)
        if problem is None:
            nimg = json.loads((state / "state.json").read_text())["nimg"]
            _load_checkpoint(state, tensors, ranks)
            return nimg
        damage.append(f"{state}: {problem}")
        warn(f"{state} is damaged ({problem}); going back to the state before it")
    if damage:
        raise RunError("no state can be read:\n" + "\n".join(damage[:2]) + "\nremove the run folder and start again")
    return 0


def _find_damage(state: Path) -> str | None:
    """Return a description of the damage to a checkpoint folder, or None."""
    try:
        description = json.loads((state / "state.json").read_text())
    except (OSError, ValueError) as error:
        return f"state.json: {error}"
    if description.get("format") != FORMAT:
        return "state.json was not written by gesso"
    for name, size in description["files"].items():
        file = state / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def _load_checkpoint(state: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    reader = HuggingFaceStorageReader(str(state))
    try:
        metadata = reader.read_metadata().state_dict_metadata
        stored_shapes = {
            name: tuple(meta.size) for name, meta in metadata.items() if isinstance(meta, TensorStorageMetadata)
        }
    except Exception as error:  # whatever the storage layer raises on a header it cannot parse
        raise RunError(f"{state} cannot be read ({type(error).__name__}: {error})") from None
    wanted = {name: tuple(t.shape) for name, t in tensors.items()}
    if stored_shapes != wanted:
        missing, unknown = sorted(wanted.keys() - stored_shapes.keys()), sorted(stored_shapes.keys() - wanted.keys())
        shapes = [n for n in stored_shapes.keys() & wanted.keys() if stored_shapes[n] != wanted[n]]
        raise RunError(
            f"{state} is the state of another network: missing {missing[:3]}, unknown {unknown[:3]}, other shape "
            f"{shapes[:3]}"
        )
    with _ignore_single_process_warning():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=ranks.world_size == 1)


@contextlib.contextmanager
def _ignore_single_process_warning() -> Iterator[None]:
    """Suppress torch's warning about checkpoints of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
