"""Descriptions of measured values, for column headers, axes and notes."""

from collections.abc import Sequence

from gesso.evaluation.metrics import METRICS, value_labels
from gesso.reproduce import measurements
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.schema import Method, Table

METRIC_LABELS = value_labels() | {
    "params": "millions of parameters",
    "params_with_guide": "billions of parameters of the network and of its guide",
    "gmacs": "billions of multiply-accumulates of an evaluation",
    "gflops": "billions of FLOPs of an evaluation, as Berrada et al. count them",
    "nfe": "network evaluations per sample",
    "training_macs": "10^21 multiply-accumulates of a training",
    "sampling_macs": "10^12 multiply-accumulates of a sample",
    "num_images": "number of images shown below",
    "padding_fraction": "share on padding tokens",
    "entropy": "entropy of the attention to text tokens, relative to uniform attention",
    "copy_similarity": "mean cosine similarity of tokens and their copies",
}
"""Description of a value, by its name in the record."""
SHORT_LABELS = {
    **{name: metric.short_label for name, metric in METRICS.items() if metric.short_label},
    "alpha_bar": "share of the signal",
}
"""Axis label of a value whose name in the record is not a good one."""
SELECTIONS = {"min": "minimum", "max": "maximum"}
"""Description of `ColumnGroup.select`."""


def describe_columns(table: Table, jobs: Sequence[MeasurementJob]) -> dict[str, str]:
    """Return descriptions by column names; columns with the same description share a key, such as "FID; FID, guided"."""
    descriptions: dict[str, dict[str, None]] = {column.name: {} for column in table.columns}
    for job in jobs:
        for column, name in job.group.columns.items():
            description = _method_label(job.group.method, name)
            if job.group.select:
                settings = ", ".join(varying_settings(column, jobs))
                description += f", the {SELECTIONS[job.group.select]} over {settings}"
            descriptions[column][description] = None
    columns_of: dict[str, list[str]] = {}
    for column, texts in descriptions.items():
        columns_of.setdefault(", or ".join(texts) or "not measured at this scale", []).append(column)
    return {"; ".join(columns): text for text, columns in columns_of.items()}


def varying_settings(column: str, jobs: Sequence[MeasurementJob]) -> list[str]:
    """Return the names of the settings that vary between the measurements of one cell of a column."""
    values: dict[tuple[str, str], set[str]] = {}
    for job in jobs:
        if column in job.group.columns:
            for setting in job.group.rows[job.row].settings:
                name, _, value = setting.partition("=")
                values.setdefault((name, job.row), set()).add(value)
    return list(dict.fromkeys(name for (name, _), distinct in values.items() if len(distinct) > 1))


def _method_label(method: Method, name: str) -> str:
    key = name.removeprefix("1-")
    if key in METRIC_LABELS:
        label = METRIC_LABELS[key]
    elif method == "metrics":
        label = key
    else:
        summary = (measurements.MEASUREMENT_METHODS[method].__doc__ or method).strip().splitlines()[0].rstrip(".")
        summary = summary.removeprefix("Return ")
        label = f"{key} ({summary[0].lower()}{summary[1:]})"
    return label if key == name else f"one minus the {label}"
