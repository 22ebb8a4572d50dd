"""Results of evaluations: the record RUN/metrics.json and its text form.

metrics.json is {"format": ..., "evaluations": {KEY: {"protocol", "weights", "metrics", "reference_metrics",
"throughput"}}}. KEY is a hash of the protocol and the snapshots, so a repeated evaluation replaces its entry.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError

from gesso import atomic_io
from gesso.config import RunConfig
from gesso.errors import RunError
from gesso.evaluation.metrics import format_value, short_label
from gesso.evaluation.metrics.base import Metric
from gesso.evaluation.networks.base import FeatureNetwork
from gesso.snapshot import ReconstructionPlan, TargetProfile
from gesso.untrusted import read_json_object

FILE_NAME = "metrics.json"
FORMAT = "gesso metrics 1"
SNAPSHOT_DEPENDENT = ("nimg", "sigma_rel", "halflife")
"""Protocol keys that belong to the evaluated weights: progress of the training and EMA length."""


class MetricValues(TypedDict):
    """Values of one number: of each repeat, the best one in the direction of its metric, and the mean."""

    values: list[float]
    best: float
    mean: float


class Evaluation(NamedTuple):
    """Result of one evaluation.

    Attributes:
        protocol: Everything that decides a number besides the training.
        weights: `snapshots`, a hash of the files that the weights were reconstructed from, and the error of the
            reconstruction: `profile_error` (squared) and `initial_weight`.
        metrics: Values by name.
        reference_metrics: Values that real images reach.
        throughput: `images_per_second` and `milliwatt_hours` per image of sampling and feature extraction.
        notes: Notes for the user; not recorded.
    """

    protocol: dict[str, Any]
    weights: dict[str, Any] = {}
    metrics: dict[str, MetricValues] = {}
    reference_metrics: dict[str, float] = {}
    throughput: dict[str, float] = {}
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Key in metrics.json, and name of the folder of unfinished parts."""
        identity = json.dumps([self.protocol, self.weights.get("snapshots")], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def best(self) -> dict[str, float]:
        """Return the best value of each number."""
        return {name: entry["best"] for name, entry in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        return {
            name: value
            for name, value in self._asdict().items()
            if name != "notes" and (value or name in ("protocol", "metrics"))
        }


class _StoredValues(BaseModel):
    """MetricValues in metrics.json."""

    model_config = ConfigDict(extra="forbid")
    values: list[float]
    best: float
    mean: float


class _StoredEvaluation(BaseModel):
    """Entry of metrics.json."""

    model_config = ConfigDict(extra="forbid")
    protocol: dict[str, Any]
    weights: dict[str, Any] = {}
    metrics: dict[str, _StoredValues]
    reference_metrics: dict[str, float] = {}
    throughput: dict[str, float] = {}


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """Return the recorded evaluations of a run by key, the newest last.

    Raises:
        RunError: metrics.json has another format.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    try:
        content = read_json_object(path, follow_links=False)
        if content["format"] != FORMAT:
            raise ValueError("it has another format")
        for entry in content["evaluations"].values():
            _StoredEvaluation.model_validate(entry)
        return {key: Evaluation(**entry) for key, entry in content["evaluations"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "its values have other types" if isinstance(error, ValidationError) else error
        raise RunError(f"{path} was not written by this version of gesso evaluate ({reason}): move it away") from None


def record_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Add an evaluation to metrics.json, as the newest one. Several processes may do so at the same time."""
    path = folder / FILE_NAME
    with atomic_io.lock(path):
        known = read_evaluations(folder)
        known.pop(evaluation.key, None)
        entries = {key: entry.to_json() for key, entry in (known | {evaluation.key: evaluation}).items()}
        atomic_io.write_json(path, {"format": FORMAT, "evaluations": entries})


def base_protocol(run: RunConfig, nimg: int, networks: Mapping[str, FeatureNetwork]) -> dict[str, Any]:
    """Return the part of a protocol that all evaluations of runs have: networks, weights and sampler."""
    names = {name: network.name for name, network in networks.items()}
    sample = run.sample.model_dump(mode="json", exclude={"batch_size"})
    return {"name": run.eval.protocol, "networks": names, "nimg": nimg} | sample


def describe_weights(plan: ReconstructionPlan, target: TargetProfile) -> dict[str, Any]:
    """Return the identity of the snapshots and the error of the reconstruction of a target."""
    stats = [(s.path.name, s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in plan.sources]
    fit = plan.worst_fit(target)
    return {
        "snapshots": hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12],
        "profile_error": fit.squared_error,
        "initial_weight": fit.initial_weight,
    }


def summarize(metric: Metric, values: Mapping[str, Sequence[float]]) -> dict[str, MetricValues]:
    """Return the values of a metric over repeats by name; a spread NAME_std has the best value's repeat as its best."""
    choose = min if metric.lower_is_better else max
    summary: dict[str, MetricValues] = {}
    for name, repeats in values.items():
        ranked = values.get(name.removesuffix("_std"), repeats)
        best = choose(range(len(repeats)), key=lambda repeat: ranked[repeat])
        summary[name] = {"values": list(repeats), "best": repeats[best], "mean": sum(repeats) / len(repeats)}
    return summary


def single_values(values: Mapping[str, float]) -> dict[str, MetricValues]:
    """Return the values of a single repeat."""
    return {name: {"values": [value], "best": value, "mean": value} for name, value in values.items()}


def format_evaluation(evaluation: Evaluation) -> list[str]:
    """Return an evaluation as text: its values, protocol, throughput and notes."""
    protocol, lines = evaluation.protocol, []
    by_noise = []
    for name, entry in evaluation.metrics.items():
        if name.startswith("loss_"):
            by_noise.append(f"{entry['mean']:.3g}")
        elif not name.endswith("_std"):
            spread = evaluation.metrics.get(f"{name}_std")
            each = ", ".join(f"{value:.4f}" for value in entry["values"])
            each += f" +- {spread['best']:.4f}" if spread and len(entry["values"]) == 1 else ""
            best = f"   best of {len(entry['values'])}: {entry['best']:.4f}" if len(entry["values"]) > 1 else ""
            lines.append(f"{name:24}{each}{best}")
    if by_noise:
        lines.append(f"{'  by noise level':24}{' '.join(by_noise)}   (tenths of the training draw, clean to noise)")
        lines.append(
            f"{protocol['validation_pairs']:,} pairs of an image of {protocol['validation']} and a noise level"
        )
    if protocol["networks"]:
        count = f"{protocol['reference_images']:,} images of " if protocol.get("reference_images") else ""
        reference = f", reference {count}{protocol['reference']}" if protocol.get("reference") else ""
        source = f" of {protocol['images']}" if "images" in protocol else ""
        name = f", protocol {protocol['name']}" if protocol.get("name") else ""
        networks = ", ".join(dict.fromkeys(protocol["networks"].values()))
        lines.append(f"{protocol['num_samples']:,} samples{source}{reference}{name}; {networks}")
    if speed := evaluation.throughput:
        energy = f", {speed['milliwatt_hours']:.3g} mWh per sample" if "milliwatt_hours" in speed else ""
        lines.append(f"{speed['images_per_second']:.3g} samples per second{energy}")
    return [*lines, *evaluation.notes]


def format_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return values by row and name as a text table; a spread NAME_std follows its value."""
    names = [name for name in next(iter(rows.values())) if not name.endswith("_std")]
    table = [["", *map(short_label, names)]]
    table += [
        [title, *(format_value(name, row[name], row.get(f"{name}_std")) for name in names)]
        for title, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([first.ljust(widths[0]), *(map(str.rjust, cells, widths[1:]))]) for first, *cells in table]
