"""Descriptions of measured values, for column headers, axes and notes."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gesso.evaluation.metrics import METRICS, value_labels
from gesso.reproduce import measurements
from gesso.reproduce.schema import ColumnGroup, Method, Table

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


PAPER_NAMES = {
    "fid": ("FID",),
    "clip": ("CLIP",),
    "lpips": ("LPIPS",),
    "lpips_hr": ("LPIPS/HR",),
    "fd_dinov2": ("FD of DINOv2", "FD"),
}
"""Names that the tables of the papers use for a value."""
MEASURED_NAMES = {
    "fd_digits": "FD (digits)",
    "fd_shapes": "FD (shapes)",
    "fd_fashion": "FD (clothes)",
    "digits_feature_distance": "feature distance",
    "class_accuracy": "class accuracy",
    "1-class_accuracy": "class error rate",
    "side": "correct side",
    "place": "correct place",
}
"""Names of the values that replace those of the papers at other scales. FD: Frechet distance."""
NOT_MEASURED = "not measured at this scale"


class ColumnLabel(NamedTuple):
    """Label of a column.

    Attributes:
        title: name of the column, with the name of what is measured in place of the paper's metric.
        description: what is measured.
        value: name of the measured value in the record; "" if there is none.
    """

    title: str
    description: str = NOT_MEASURED
    value: str = ""


def label_columns(table: Table, scale: str) -> dict[str, ColumnLabel]:
    """Return the label of every column at a scale."""
    descriptions: dict[str, dict[str, None]] = {column.name: {} for column in table.columns}
    groups = table.scales[scale].groups if scale in table.scales else ()
    for group in groups:
        for column, name in group.columns.items():
            description = _method_label(group.method, name)
            if group.select:
                settings = ", ".join(varying_settings(column, groups))
                description += f", the {SELECTIONS[group.select]} over {settings}"
            descriptions[column][description] = None
    values = measured_values(table, scale)
    return {
        column: ColumnLabel(
            rename_metric(table, column, values), ", or ".join(texts) or NOT_MEASURED, values.get(column, "")
        )
        for column, texts in descriptions.items()
    }


def measured_values(table: Table, scale: str) -> dict[str, str]:
    """Return the name of the measured value of each column at a scale."""
    groups = table.scales[scale].groups if scale in table.scales else ()
    return {column: name for group in groups for column, name in group.columns.items()}


def rename_metric(table: Table, column: str, values: Mapping[str, str]) -> str:
    """Return the name of a column with the metric of the paper replaced by the measured value, where they differ."""
    return replace_names(column, _replacements(table, {column: values[column]} if column in values else {}))


def name_measured(table: Table, values: Mapping[str, str]) -> Table:
    """Return a table whose title, claims and notes of scales name what is measured in place of the paper's metrics.

    Args:
        table: The table.
        values: Name of the measured value by column.
    """
    names = _replacements(table, values)
    return table._replace(
        title=replace_names(table.title, names),
        claims=tuple(claim._replace(text=replace_names(claim.text, names)) for claim in table.claims),
        scales={name: scale._replace(notes=replace_names(scale.notes, names)) for name, scale in table.scales.items()},
    )


def _replacements(table: Table, values: Mapping[str, str]) -> dict[str, str]:
    """Return the names of measured values by the names of the paper's metrics that they stand for."""
    published = measured_values(table, "paper")
    names: dict[str, str] = {}
    for column, value in values.items():
        metric = published.get(column, value)
        if metric == value or metric not in PAPER_NAMES:
            continue
        for name in PAPER_NAMES[metric]:
            measured = MEASURED_NAMES.get(value, value)
            # Columns that are measured in different features share the name of their kind.
            names[name] = measured if names.get(name, measured) == measured else measured.partition(" (")[0]
    return names


def replace_names(text: str, names: Mapping[str, str]) -> str:
    """Replace whole words of a text, the longest first."""
    if not names:
        return text
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w/])({pattern})(?![\w/])", lambda match: names[match[1]], text)


def varying_settings(column: str, groups: Sequence[ColumnGroup]) -> list[str]:
    """Return the names of the settings that vary between the measurements of one cell of a column."""
    values: dict[tuple[str, str], set[str]] = {}
    for group in groups:
        if column in group.columns:
            for row, measurement in group.rows.items():
                for setting in measurement.settings:
                    name, _, value = setting.partition("=")
                    values.setdefault((name, row), set()).add(value)
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
