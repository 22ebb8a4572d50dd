"""Contents of a run folder that its page shows."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso import config, untrusted
from gesso.config import RunConfig
from gesso.errors import RunError, UsageError
from gesso.evaluation import ema_sweep, results
from gesso.evaluation.results import Evaluation
from gesso.training.logging import read_log

MAX_POINTS = 300
"""Largest number of points of a curve; longer curves are averaged in groups."""

Points = tuple[list[float], list[float]]
"""Images seen and values of a curve."""


class ToyResults(NamedTuple):
    """The newest evaluations with toy metrics.

    Attributes:
        protocol: Protocol of the samples.
        metrics: Values by row title ("guidance 2", "training images").
        ema_sweep: Evaluations over EMA lengths, sorted by length.
    """

    protocol: Mapping[str, Any] = {}
    metrics: Mapping[str, Mapping[str, float]] = {}
    ema_sweep: Sequence[Evaluation] = ()


class RunData(NamedTuple):
    """Contents of a run folder.

    Attributes:
        path: The folder.
        label: Name of the run on the page.
        run: Settings.
        lines: Lines of log.jsonl.
        toy: Evaluations with toy metrics.
        evaluations: Evaluations of eval.metrics, one for each protocol.
    """

    path: Path
    label: str
    run: RunConfig
    lines: list[dict[str, Any]]
    toy: ToyResults = ToyResults()
    evaluations: Sequence[Evaluation] = ()

    @property
    def images_seen(self) -> int:
        """Number of training images up to the last log line with a loss."""
        return next((line["nimg"] for line in reversed(self.lines) if "loss" in line), 0)

    def curve(self, *keys: str | int) -> Points:
        """Return the values under nested keys over images seen, without the lines that lack them."""
        points = [(line["nimg"], value) for line in self.lines if (value := _nested_get(line, keys)) is not None]
        size = -(-len(points) // MAX_POINTS) or 1
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        return [g[-1][0] for g in groups], [sum(value for _, value in g) / len(g) for g in groups]

    def last(self, *keys: str | int) -> Any:
        """Return the newest value under nested keys; None if no line has one."""
        return next((value for line in reversed(self.lines) if (value := _nested_get(line, keys)) is not None), None)

    def late_mean(self, key: str) -> list[float | None]:
        """Return the element-wise mean of the lists under a key over the last tenth of the lines that have it."""
        values = [line[key] for line in self.lines if key in line]
        late_values = values[-max(1, len(values) // 10) :]
        columns = [[value for value in column if value is not None] for column in zip(*late_values, strict=True)]
        return [sum(column) / len(column) if column else None for column in columns]

    def sample_grids(self) -> list[tuple[int, Path]]:
        """Return the images seen and the PNG file of each grid of samples from the training, in order."""
        grids = [(re.fullmatch(r"nimg(\d{1,18})", path.stem), path) for path in self.path.glob("sheets/nimg*.png")]
        return sorted((int(m[1]), path) for m, path in grids if m and untrusted.is_regular_inside(self.path, path))

    def picture(self, name: str) -> Path | None:
        """Return the path of a picture in sheets/; None if it is missing, or a link or outside the run folder."""
        path = self.path / "sheets" / name
        return path if untrusted.is_regular_inside(self.path, path) else None


def _nested_get(value: Any, keys: Sequence[str | int]) -> Any:
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def load_runs(folders: Sequence[Path]) -> list[RunData]:
    """Load run folders.

    Raises:
        UsageError: A folder has no trained run, or is given twice.
    """
    for folder in folders:
        if not (folder / "run.yaml").is_file() or not (folder / "log.jsonl").is_file():
            raise UsageError(
                f"{folder} has no trained run (run.yaml and log.jsonl): give the --out folder of a gesso train command"
            )
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError(f"a run is given twice: {', '.join(map(str, folders))}")
    names = [path.name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [_load_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _load_run(folder: Path, label: str) -> RunData:
    evaluations = list(results.read_evaluations(folder).values())
    metrics = [evaluation for evaluation in evaluations if "series" not in evaluation.protocol]
    run, lines = config.load_config(folder / "run.yaml"), read_log(folder / "log.jsonl")
    try:
        return RunData(folder, label, run, lines, toy_results(evaluations), metrics)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise RunError(f"{folder / results.FILE_NAME} is damaged ({type(error).__name__}): move it away") from error


def toy_results(evaluations: Sequence[Evaluation]) -> ToyResults:
    """Return the newest evaluations with toy metrics."""
    newest_by_series = {
        evaluation.protocol["series"]: evaluation for evaluation in evaluations if "series" in evaluation.protocol
    }
    samples = [newest_by_series[series] for series in ("guided", "unguided") if series in newest_by_series]
    metrics = {f"guidance {evaluation.protocol['guidance']:g}": evaluation.best() for evaluation in samples}
    if samples:
        metrics["training images"] = samples[0].reference_metrics
    points = [e for e in evaluations if e.protocol.get("series") == "ema_sweep" and "frechet_distance" in e.metrics]
    points = [e for e in points if not e.protocol["repeat"] and "tensors" not in e.protocol]
    if points:
        guidance = points[-1].protocol["guidance"]
        points = [e for e in ema_sweep.sweep_of(points, points[-1]) if e.protocol["guidance"] == guidance]
        points.sort(key=lambda e: e.protocol["sigma_rel"])
    return ToyResults(samples[0].protocol if samples else {}, metrics, points)


def sample_count_text(protocol: Mapping[str, Any]) -> str:
    """Return the number of samples of an evaluation, or of pairs of a validation loss, as text."""
    return f"{protocol['num_samples']:,} samples" if protocol["networks"] else f"{protocol['validation_pairs']:,} pairs"
