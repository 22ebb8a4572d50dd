"""Copies of log.jsonl in TensorBoard and Weights & Biases: the same values at the same times, each once.

RUN/tensorboard/     event files; a resumed run purges the events after its checkpoint
RUN/wandb/           files of Weights & Biases
RUN/wandb.json       id of the run in Weights & Biases, and nimg of the last values sent
"""

import importlib.util
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from gesso import atomic_io, config
from gesso.config import RunConfig
from gesso.errors import RunError, UsageError, install_command
from gesso.untrusted import read_json_object


class Tracker(Protocol):
    """Destination of log values and sample grids besides log.jsonl."""

    def write(self, nimg: int, values: dict[str, float]) -> None:
        """Write numbers by name at nimg images."""

    def log_image(self, nimg: int, image: Image.Image) -> None:
        """Write a sample grid."""

    def close(self) -> None:
        """Write what is pending and finish."""


def check_trackers(run: RunConfig) -> None:
    """Raise UsageError if the library of a selected tracker is not installed."""
    selected = {"tensorboard": run.monitor.tensorboard, "wandb": run.monitor.wandb != "disabled"}
    for name, enabled in selected.items():
        if enabled and importlib.util.find_spec(name) is None:
            raise UsageError(f"monitor.{name} needs {name}: {install_command('log')}")


def open_trackers(run: RunConfig, out: Path, nimg: int) -> list[Tracker]:
    """Return the trackers that the settings select, resumed at image nimg."""
    trackers: list[Tracker] = []
    if run.monitor.tensorboard:
        trackers.append(TensorBoardTracker(out, nimg))
    if run.monitor.wandb != "disabled":
        trackers.append(WandbTracker(run, out))
    return trackers


def flatten_numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a log line by path: a/b for nested values, a/0, a/1, ... for lists."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from flatten_numbers({str(i): part for i, part in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)


class TensorBoardTracker:
    """Write TensorBoard events; steps are images seen."""

    def __init__(self, out: Path, nimg: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=nimg + 1)

    def write(self, nimg: int, values: dict[str, float]) -> None:
        """Write numbers by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, nimg)
        self.writer.flush()

    def log_image(self, nimg: int, image: Image.Image) -> None:
        """Write a sample grid."""
        self.writer.add_image("samples", np.asarray(image.convert("RGB")), nimg, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


def _read_record(path: Path) -> dict[str, Any]:
    """Return the content of wandb.json. Raises RunError if it is damaged."""
    try:
        record = read_json_object(path, follow_links=False)
        if not isinstance(record["id"], str) or not isinstance(record["nimg"], int):
            raise ValueError("a value has another type")
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it, and a new run of Weights & Biases begins") from None
    return record


class WandbTracker:
    """Write to Weights & Biases; steps are images seen.

    A resumed run repeats the values after its checkpoint bit for bit; they are not sent twice. The constructor raises
    UsageError if Weights & Biases rejects the run.
    """

    def __init__(self, run: RunConfig, out: Path):
        import wandb

        self.wandb, self.record_path = wandb, out / "wandb.json"
        record: dict[str, Any] = {"id": secrets.token_hex(4), "nimg": -1}
        if self.record_path.is_file():
            record = _read_record(self.record_path)
        self.id, self.recorded_nimg, self.current_nimg = record["id"], record["nimg"], -1
        try:
            self.run = wandb.init(
                project=run.monitor.wandb_project, name=out.name, id=self.id, dir=str(out), config=config.to_dict(run),
                mode=run.monitor.wandb,
                resume="allow", settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"monitor.wandb={run.monitor.wandb}: {reason} (or set monitor.wandb=offline)") from None

    def write(self, nimg: int, values: dict[str, float]) -> None:
        """Send numbers by name."""
        self._log(nimg, values)

    def log_image(self, nimg: int, image: Image.Image) -> None:
        """Send a sample grid."""
        self._log(nimg, {"samples": self.wandb.Image(image)})

    def _log(self, nimg: int, values: dict[str, Any]) -> None:
        if nimg > max(self.recorded_nimg, self.current_nimg):
            # Recorded before it is sent: a process that is killed in between loses a value, but never sends one twice.
            self.current_nimg = nimg
            atomic_io.write_json(self.record_path, {"id": self.id, "nimg": nimg})
        if nimg == self.current_nimg:
            self.run.log(values, step=nimg)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
