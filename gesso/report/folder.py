"""What a page is made of: the files of a run folder, read once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso import config
from gesso.config import RunConfig
from gesso.errors import UsageError
from gesso.training.logging import read_log

MOST = 300
"""points of a curve; more are averaged in groups"""

Points = tuple[list[float], list[float]]
"""images seen, values"""


class Folder(NamedTuple):
    """lines: of log.jsonl; metrics: metrics.json, empty where nothing was evaluated; measured: scores.json, each way of
    measuring with its protocol; label: what a page calls the run."""

    path: Path
    label: str
    run: RunConfig
    lines: list[dict[str, Any]]
    metrics: dict[str, Any]
    measured: Sequence[dict[str, Any]] = ()

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    @property
    def seen(self) -> int:
        return self.steps[-1]["nimg"] if self.steps else 0

    def curve(self, *keys: str | int) -> Points:
        """Values found under the keys, one within the other, over images seen; lines without them are left out."""
        points = [(line["nimg"], value) for line in self.lines if (value := _under(line, keys)) is not None]
        size = -(-len(points) // MOST) or 1
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        return [g[-1][0] for g in groups], [sum(value for _, value in g) / len(g) for g in groups]

    def last(self, *keys: str | int) -> Any:
        """The newest value under the keys; None where there is none."""
        return next((value for line in reversed(self.lines) if (value := _under(line, keys)) is not None), None)

    def late(self, key: str) -> list[float | None]:
        """Of lists under the key the mean of the last tenth, element by element, without what is missing."""
        values = [line[key] for line in self.lines if key in line]
        some = values[-max(1, len(values) // 10) :]
        columns = [[value for value in column if value is not None] for column in zip(*some, strict=True)]
        return [sum(column) / len(column) if column else None for column in columns]

    def grids(self) -> list[tuple[int, Path]]:
        """Pictures of samples drawn on the way, by time."""
        return sorted((int(path.stem.removeprefix("nimg")), path) for path in self.path.glob("samples/nimg*.png"))


def _under(value: Any, keys: Sequence[str | int]) -> Any:
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def opened(folders: Sequence[Path]) -> list[Folder]:
    """Raises UsageError for a folder that holds no run, or is named twice."""
    for folder in folders:
        if not (folder / "run.yaml").is_file() or not (folder / "log.jsonl").is_file():
            raise UsageError(f"{folder} holds no trained run (run.yaml and log.jsonl); train one first")
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise UsageError(f"a run is named twice: {', '.join(map(str, folders))}")
    names = [place.name for place in places]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> Folder:
    metrics, measured = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for name in ("metrics.json", "scores.json")
    )
    for value in (value for one in measured.values() for value in one["scores"].values()):
        value.setdefault("best", value.get("least"))  # as files were written when the least was best of every score
    run, lines = config.load_config(folder / "run.yaml"), read_log(folder / "log.jsonl")
    return Folder(folder, label, run, lines, metrics, list(measured.values()))


def amount(protocol: Mapping[str, Any]) -> str:
    """Of what scores are: samples, or pairs that a loss is taken over."""
    return f"{protocol['images']:,} samples" if protocol["networks"] else f"{protocol['loss_pairs']:,} pairs"
