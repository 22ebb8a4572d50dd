"""Content of the page that compares several runs (templates/compare.html)."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from gesso import config
from gesso.evaluation.metrics import format_value, short_label
from gesso.evaluation.results import SNAPSHOT_DEPENDENT, Evaluation
from gesso.report import plotting
from gesso.report.load import Points, RunData, sample_count_text
from gesso.report.render import Figure, TableData, non_empty

MAX_OPEN_SETTINGS = 30
"""Largest number of different settings that are listed unfolded."""
DASHES = {"-": "", "--": "7 4", "-.": "9 3 2 3", ":": "2 3"}
"""SVG dashes of matplotlib's line styles."""
EMPTY = "\u2013"
"""Text of a cell without a value."""


def page_context(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return the variables of the template."""
    return {
        "runs": [run_row(run_data, i) for i, run_data in enumerate(runs)],
        "scores": scores_table(runs),
        "protocol_mismatch": protocol_mismatch(runs),
        "evaluations": evaluation_tables(runs),
        "samples": samples(runs),
        "training": training(runs),
        "magnitudes": magnitudes(runs),
        "throughput": throughput(runs),
        "setting_differences": setting_differences(runs),
        "max_open_settings": MAX_OPEN_SETTINGS,
    }


def page_title(runs: Sequence[RunData]) -> str:
    """Return the names of the runs as a title."""
    names = [run_data.label for run_data in runs]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) < 5 else f"{names[0]} and {len(names) - 1} others"


def run_row(run_data: RunData, index: int) -> dict[str, Any]:
    """Return the name of a run with the style of its curves, and its main numbers."""
    color, style = plotting.line_style(index)
    validation = run_data.last("validation")
    cells = [
        run_data.run.net.name,
        run_data.run.process.name,
        f"{run_data.images_seen:,}",
        format_number(run_data.last("loss")),
        format_number(list(validation.values())[-1] if validation else None),
        format_number(run_data.last("images_per_second")),
    ]
    return {"color": color, "dashes": DASHES[style], "label": run_data.label, "cells": cells}


def format_number(value: object) -> str:
    """Return a value as text, floats with four significant digits, None as an empty text."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def format_score(name: str, value: float | None, spread: float | None = None) -> str:
    """Return a metric as text."""
    return EMPTY if value is None else format_value(name, value, spread)


def table_of_runs(runs: Sequence[RunData], rows: Sequence[Sequence[str]], title: str = "") -> TableData:
    """Return a table with one column per run."""
    return TableData((title, *(run_data.label for run_data in runs)), rows)


def scores_table(runs: Sequence[RunData]) -> TableData:
    """Return the toy metrics, one row per guidance weight and metric."""
    values = [
        {(title, name): value for title, by_name in run_data.toy.metrics.items() for name, value in by_name.items()}
        for run_data in runs
    ]
    keys = dict.fromkeys(key for by_key in values for key in by_key if not key[1].endswith("_std"))
    rows = [
        (
            f"{short_label(name)}, {title}",
            *(format_score(name, by_key.get((title, name)), by_key.get((title, f"{name}_std"))) for by_key in values),
        )
        for title, name in keys
    ]
    return table_of_runs(runs, rows)


def protocol_mismatch(runs: Sequence[RunData]) -> TableData:
    """Return the protocol keys in which the toy evaluations of the runs differ."""
    protocols = [run_data.toy.protocol for run_data in runs if run_data.toy.protocol]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    rows = [
        (key, *(format_number(run_data.toy.protocol.get(key)) for run_data in runs))
        for key in keys
        if len({json.dumps(protocol.get(key)) for protocol in protocols}) > 1
    ]
    return table_of_runs(runs, rows)


def _protocol_key(evaluation: Evaluation, exclude: Sequence[str] = ()) -> str:
    return json.dumps({k: value for k, value in evaluation.protocol.items() if k not in exclude}, sort_keys=True)


def evaluation_tables(runs: Sequence[RunData]) -> list[tuple[TableData, dict[str, Any]]]:
    """Return a table for each protocol, so that no table mixes numbers of two protocols, with the protocol.

    Protocols are compared without the keys of the snapshot, unless a run has several evaluations that differ only
    in them.
    """
    ambiguous_keys = {
        key
        for run_data in runs
        for key, n in Counter(_protocol_key(e, SNAPSHOT_DEPENDENT) for e in run_data.evaluations).items()
        if n > 1
    }
    values: dict[str, dict[str, dict[str, float]]] = {}
    for run_data in runs:
        for evaluation in run_data.evaluations:
            key = _protocol_key(evaluation, SNAPSHOT_DEPENDENT)
            key = _protocol_key(evaluation) if key in ambiguous_keys else key
            values.setdefault(key, {})[run_data.label] = evaluation.best()
    result = []
    for key, by_run in values.items():
        protocol = {name: value for name, value in json.loads(key).items() if value is not None}
        names = dict.fromkeys(name for metrics in by_run.values() for name in metrics)
        rows = [
            (short_label(name), *(format_score(name, by_run.get(r.label, {}).get(name)) for r in runs))
            for name in names
        ]
        lengths = "".join(f", {name} {protocol[name]}" for name in SNAPSHOT_DEPENDENT if name in protocol)
        title = f"{protocol.get('name', 'scores')}: {sample_count_text(protocol)}{lengths}"
        result.append((table_of_runs(runs, rows, title), protocol))
    return result


def samples(runs: Sequence[RunData]) -> list[Figure]:
    """Return the newest samples of each run."""
    figures = []
    for run_data in runs:
        by_class, grids = run_data.picture("by_class.png"), run_data.sample_grids()
        if by_class:
            nimg = run_data.toy.protocol.get("nimg", run_data.images_seen)
            figures.append(Figure(f"{run_data.label}, image {nimg:,}", image=by_class))
        elif grids:
            nimg, path = grids[-1]
            figures.append(Figure(f"{run_data.label}, image {nimg:,}, during training", image=path))
    return figures


def overlay(
    runs: Sequence[RunData],
    points: Iterable[Points],
    label: str,
    *,
    scale: str = "linear",
    from_zero: bool = False,
) -> str:
    """Plot one curve per run; return SVG, empty if no curve has two points."""
    styles = {run_data.label: plotting.line_style(i) for i, run_data in enumerate(runs)}
    curves = {run_data.label: curve for run_data, curve in zip(runs, points, strict=True)}
    return plotting.plot_curves(curves, label, scale=scale, from_zero=from_zero, styles=styles)


def newest_name(run_data: RunData, key: str) -> str:
    """Return the last name in the newest entry of `validation` or `validation_by_noise`; empty if there is none."""
    return list(run_data.last(key) or [""])[-1]


def training(runs: Sequence[RunData]) -> list[Figure]:
    """Return the curves of losses, gradient norm and metrics."""
    weightings = {run_data.run.loss.weighting for run_data in runs}
    targets = {(r.run.process.name, config.flatten(r.run).get("process.prediction")) for r in runs}
    warning = " Not comparable: the runs weight it differently." if len(weightings | targets) > 2 else ""
    reductions = {run_data.run.loss.reduction for run_data in runs}
    note = " Runs with a summed loss have C*H*W times the norm of runs with a mean." if len(reductions) > 1 else ""
    validation = {r.label: r.last("validation_by_noise", newest_name(r, "validation_by_noise")) for r in runs}
    latest = {run_data.label: run_data.late_mean("loss_by_noise") for run_data in runs}
    figures = [
        Figure(f"Training loss between log lines.{warning}", overlay(runs, [r.curve("loss") for r in runs], "loss")),
        Figure(
            "Loss of validation images, with the last EMA.",
            overlay(runs, [r.curve("validation", newest_name(r, "validation")) for r in runs], "validation loss"),
        ),
        Figure(
            "Newest loss of validation images by noise level.",
            plotting.plot_loss_over_noise(validation, "validation loss"),
        ),
        Figure(
            f"Training loss by noise level, mean over the last tenth of the log.{warning}",
            plotting.plot_loss_over_noise(latest, "loss"),
        ),
        Figure(
            f"Gradient norm.{note}", overlay(runs, [r.curve("grad_norm") for r in runs], "gradient norm", scale="log")
        ),
    ]
    for name in dict.fromkeys(n for r in runs for n in r.last("metrics") or {} if not n.endswith("_std")):
        svg = overlay(runs, [r.curve("metrics", name) for r in runs], short_label(name))
        figures.append(Figure("Measured during training.", svg))
    return non_empty(figures)


def magnitudes(runs: Sequence[RunData]) -> list[Figure]:
    """Return the curves of magnitudes over all blocks."""
    figures = []
    reductions = ("largest", "mean")
    for kind, title in (("activations", "the outputs of layers"), ("main_path", "the outputs of blocks")):
        for i, reduction in enumerate(reductions):
            label = f"{kind.replace('_', ' ')}, {reduction}"
            svg = overlay(runs, [reduce_buckets(r, kind, i) for r in runs], label, from_zero=True)
            caption = f"The {reduction} magnitude of {title}, over all blocks (EDM2 Eq. 3); unit-normal values have 1."
            figures.append(Figure(caption, svg))
    for i, reduction in enumerate(reductions):
        svg = overlay(runs, [growth(r, "weights", i) for r in runs], f"weights, {reduction}, first = 1")
        caption = f"Weights: {reduction} magnitude over all blocks, relative to its first value."
        figures.append(Figure(caption, svg))
    return non_empty(figures)


def reduce_buckets(run_data: RunData, kind: str, index: int) -> Points:
    """Return the largest of the buckets' largest magnitudes (index 0) or the mean of their means (index 1)."""
    lines = [line for line in run_data.lines if kind in line.get("magnitudes", {})]
    values = [[pair[index] for pair in line["magnitudes"][kind].values()] for line in lines]
    return [line["nimg"] for line in lines], [max(v) if index == 0 else sum(v) / len(v) for v in values]


def growth(run_data: RunData, kind: str, index: int) -> Points:
    """Return `reduce_buckets` relative to its first value."""
    x, y = reduce_buckets(run_data, kind, index)
    return x, [value / y[0] for value in y]


def throughput(runs: Sequence[RunData]) -> list[Figure]:
    """Return the curves of speed."""
    rate = overlay(runs, [r.curve("images_per_second") for r in runs], "images/s", from_zero=True)
    utilization = overlay(runs, [r.curve("mfu") for r in runs], "model FLOP utilization", from_zero=True)
    return non_empty([Figure("Images/s between log lines.", rate), Figure("Model FLOP utilization.", utilization)])


def setting_differences(runs: Sequence[RunData]) -> TableData:
    """Return the settings in which the runs differ."""
    paths = dict.fromkeys(path for other in runs[1:] for path, _, _ in config.differences(runs[0].run, other.run))
    settings = [config.flatten(run_data.run) for run_data in runs]
    return table_of_runs(runs, [(path, *(format_setting(by_path.get(path)) for by_path in settings)) for path in paths])


def format_setting(value: object) -> str:
    """Return the value of a setting as text of at most 60 characters."""
    text = EMPTY if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
