"""log.jsonl for TensorBoard and Weights & Biases as well: the same values, at the same times, each once.

RUN/tensorboard/     event files; a resumed run tells its reader to forget what lies after the state it resumed from
RUN/wandb/           what Weights & Biases keeps; RUN/wandb.json the id of the run there and the last time passed on
"""

import importlib.util
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from gesso import config, files
from gesso.config import Run
from gesso.errors import UsageError


class Tracker(Protocol):
    def write(self, nimg: int, values: dict[str, float]) -> None:
        """Numbers by name, at one time."""

    def picture(self, nimg: int, image: Image.Image) -> None:
        """A grid of samples."""

    def close(self) -> None: ...


def check(run: Run) -> None:
    """Raise UsageError where the settings name a library that is not installed."""
    wanted = {"tensorboard": run.watch.tensorboard, "wandb": run.watch.wandb != "no"}
    for name, asked in wanted.items():
        if asked and importlib.util.find_spec(name) is None:
            raise UsageError(f"watch.{name} needs {name}: pip install 'gesso[log]'")


def opened(run: Run, out: Path, nimg: int) -> list[Tracker]:
    """What the settings ask for, to go on from image nimg."""
    found: list[Tracker] = []
    if run.watch.tensorboard:
        found.append(TensorBoard(out, nimg))
    if run.watch.wandb != "no":
        found.append(Wandb(run, out))
    return found


def numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a line of the log by path: a/b for what is nested, a/0, a/1, ... for lists; not what is missing."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from numbers({str(i): part for i, part in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)


class TensorBoard:
    """Steps are images seen."""

    def __init__(self, out: Path, nimg: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=nimg + 1)

    def write(self, nimg: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, nimg)
        self.writer.flush()

    def picture(self, nimg: int, image: Image.Image) -> None:
        self.writer.add_image("samples", np.asarray(image.convert("RGB")), nimg, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Steps are images seen. A resumed run repeats what lies after its state to the last bit: it is not passed on twice.

    Raises UsageError where Weights & Biases refuses.
    """

    def __init__(self, run: Run, out: Path):
        import wandb

        self.wandb, self.note = wandb, out / "wandb.json"
        known = json.loads(self.note.read_text()) if self.note.is_file() else {"id": secrets.token_hex(4), "nimg": -1}
        self.id, self.last, self.now = known["id"], known["nimg"], -1
        try:
            self.run = wandb.init(
                project=run.watch.wandb_project, name=out.name, id=self.id, dir=str(out), config=config.as_tree(run),
                mode=run.watch.wandb, resume="allow", settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:
            said = str(error).strip().splitlines()[0]
            raise UsageError(f"watch.wandb={run.watch.wandb}: {said} (Or set watch.wandb=offline.)") from None

    def write(self, nimg: int, values: dict[str, float]) -> None:
        self._log(nimg, values)

    def picture(self, nimg: int, image: Image.Image) -> None:
        self._log(nimg, {"samples": self.wandb.Image(image)})

    def _log(self, nimg: int, values: dict[str, Any]) -> None:
        if nimg > max(self.last, self.now):
            # Noted first: a kill in between loses a point, and doubles none.
            self.now = nimg
            files.write_json(self.note, {"id": self.id, "nimg": nimg})
        if nimg == self.now:
            self.run.log(values, step=nimg)

    def close(self) -> None:
        self.run.finish()
