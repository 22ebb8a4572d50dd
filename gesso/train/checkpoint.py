"""States to resume from: torch.distributed.checkpoint through safetensors, one folder each.

state/nimg000000128000/state.json           nimg, sizes of the files
state/nimg000000128000/*.safetensors        every tensor of the loop, by name
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from gesso import files
from gesso.errors import RunError

FORMAT = "gesso state 1"
KEEP = 2


def save(folder: Path, nimg: int, tensors: dict[str, Tensor]) -> Path:
    """Write a whole state or none, then drop all but the last KEEP."""
    target = folder / f"nimg{nimg:012d}"
    with files.whole_folder(target) as temporary:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        try:
            with _single_process():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        except CheckpointException as error:  # it wraps what each rank raised: raise that
            raise next(iter(error.failures.values()))[0] from None
        sizes = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "nimg": nimg, "files": sizes}))
    for old in stored(folder)[:-KEEP]:
        files.remove_folder(old)
    return target


def stored(folder: Path) -> list[Path]:
    """State folders, oldest first."""
    return sorted(folder.glob("nimg*"))


def load_latest(folder: Path, tensors: dict[str, Tensor], warn: Callable[[str], None]) -> int:
    """Read the newest whole state into `tensors` in place and return its nimg; 0 when there is none.

    A damaged state is passed over with `warn(text)`: an older one leads to the same weights. Raises
    RunError when all are damaged, or when the state is of another network (it lists the names).
    """
    states = stored(folder)
    damage = []
    for state in reversed(states):
        problem = _damage(state)
        if problem is None:
            nimg = json.loads((state / "state.json").read_text())["nimg"]
            _load(state, tensors)
            return nimg
        damage.append(f"{state}: {problem}")
        warn(f"{state} is damaged ({problem}); going back to the state before it")
    if damage:
        raise RunError("no state can be read:\n" + "\n".join(damage[:2]) + "\nremove the run folder and start again")
    return 0


def _damage(state: Path) -> str | None:
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


def _load(state: Path, tensors: dict[str, Tensor]) -> None:
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
    with _single_process():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


@contextlib.contextmanager
def _single_process() -> Iterator[None]:
    """One process saves for itself; torch's remark on that is no news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
