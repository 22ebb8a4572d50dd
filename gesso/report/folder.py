"""Contents of a run folder, read once for a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso import config
from gesso.config import RunConfig
from gesso.errors import UsageError
from gesso.evaluation import ema_sweep, results
from gesso.evaluation.results import Evaluation
from gesso.training.logging import read_log

MOST = 300
"""points of a curve; more are averaged in groups"""

Points = tuple[list[float], list[float]]
"""images seen, values"""


class Folder(NamedTuple):
    """A run folder.

    Attributes:
        path: The folder.
        label: Name of the run on the page.
        run: Settings.
        lines: Lines of log.jsonl.
        toy: The newest toy evaluations (`toy_results`); empty if there are none.
        evaluations: Evaluations of eval.metrics, one for each protocol.
    """

    path: Path
    label: str
    run: RunConfig
    lines: list[dict[str, Any]]
    toy: dict[str, Any]
    evaluations: Sequence[Evaluation] = ()

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
        """Return the element-wise mean of lists under a key over the last tenth of the lines, without missing values."""
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
    recorded = list(results.read_evaluations(folder).values())
    evaluations = [evaluation for evaluation in recorded if "series" not in evaluation.protocol]
    run, lines = config.load_config(folder / "run.yaml"), read_log(folder / "log.jsonl")
    return Folder(folder, label, run, lines, toy_results(recorded), evaluations)


def toy_results(recorded: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the newest toy evaluations: their protocol, values by row title, and the points of the EMA curve."""
    newest = {evaluation.protocol["series"]: evaluation for evaluation in recorded if "series" in evaluation.protocol}
    titles = {
        f"guidance {newest[series].protocol['guidance']:g}": newest[series].best()
        for series in ("guided", "unguided")
        if series in newest
    }
    result: dict[str, Any] = {}
    if titles:
        first = newest.get("guided") or newest["unguided"]
        result = {"protocol": first.protocol, "rows": titles | {"training images": first.reference_metrics}}
    curves = [e for e in recorded if e.protocol.get("series") == "ema_sweep" and "frechet_distance" in e.metrics]
    curves = [e for e in curves if not e.protocol["repeat"] and "tensors" not in e.protocol]
    if curves:
        guidance = curves[-1].protocol["guidance"]
        points = [e for e in ema_sweep.sweep_of(curves, curves[-1]) if e.protocol["guidance"] == guidance]
        result["ema_sweep"] = sorted(points, key=lambda e: e.protocol["sigma_rel"])
    return result


def amount(protocol: Mapping[str, Any]) -> str:
    """Return the number of samples, or of pairs of a validation loss."""
    return f"{protocol['num_samples']:,} samples" if protocol["networks"] else f"{protocol['validation_pairs']:,} pairs"
