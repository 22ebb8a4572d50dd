"""States to resume from: torch.distributed.checkpoint through safetensors, one folder each.

state/nimg000000128000/state.json           nimg, sizes of the files
state/nimg000000128000/*.safetensors        every tensor of the loop, by name; each rank writes its share

Any number of ranks can read what any number wrote, sharded or not.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from gesso import atomic_io
from gesso.errors import RunError
from gesso.training.ranks import SINGLE_PROCESS, Ranks

FORMAT = "gesso state 1"


class CheckpointWriter:
    """Writes states and whatever else beside the training, one after the other in the order of asking.

    What is written is what the tensors held when it was asked. After an error of the disk nothing more is written, so
    that the run folder never lacks what came before a thing it has; the next call raises it.
    """

    def __init__(self, ranks: Ranks = SINGLE_PROCESS, timeout_s: float = 600):
        self.ranks, self.executor = ranks, ThreadPoolExecutor(1, "save")
        self.pending: list[Future[None]] = []
        self.failed = False
        self.group = ranks.new_gloo_group(timeout_s)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, folder: Path, nimg: int, tensors: dict[str, Tensor], keep: int, milestone: bool) -> None:
        """As `save`. Waits for the state before this one."""
        self.wait()
        staged = self.stager.stage(dict(tensors))
        self.submit(lambda: save_checkpoint(folder, nimg, staged, keep, milestone, self.ranks, self.group))

    def submit(self, write: Callable[[], None]) -> None:
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
        """Raise what went wrong so far."""
        while self.pending and self.pending[0].done():
            self.pending.pop(0).result()

    def wait(self) -> None:
        """Until all is written."""
        while self.pending:
            self.pending.pop(0).result()

    def close(self) -> None:
        """After what was asked is written: it was good when it was asked, whatever went wrong since."""
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
    """Write a whole state or none, then drop all but the last `keep` and the milestones. All ranks take part."""
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
    """State folders, oldest first."""
    return sorted(folder.glob("nimg*"))


def load_latest(
    folder: Path, tensors: dict[str, Tensor], warn: Callable[[str], None], ranks: Ranks = SINGLE_PROCESS
) -> int:
    """Read the newest whole state into `tensors` in place and return its nimg; 0 when there is none.

    A damaged state is passed over with `warn(text)`: an older one leads to the same weights. Raises
    RunError when all are damaged, or when the state is of another network (it lists the names).
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
    """What is wrong with a state folder, if anything."""
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
        found = {name: tuple(meta.size) for name, meta in reader.read_metadata().state_dict_metadata.items()}
    except Exception as error:  # whatever the storage layer raises on a header it cannot parse
        raise RunError(f"{state} cannot be read ({type(error).__name__}: {error})") from None
    wanted = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != wanted:
        missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        shapes = [n for n in found.keys() & wanted.keys() if found[n] != wanted[n]]
        raise RunError(
            f"{state} is the state of another network: missing {missing[:3]}, unknown {unknown[:3]}, other shape {shapes[:3]}"
        )
    with _ignore_single_process_warning():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=ranks.world_size == 1)


@contextlib.contextmanager
def _ignore_single_process_warning() -> Iterator[None]:
    """One process saves for itself; torch's remark on that is no news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
