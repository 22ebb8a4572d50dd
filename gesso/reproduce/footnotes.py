"""Footnotes of cells that were measured differently from the others of their column."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.schema import Cell, Table

NON_PROTOCOL_KEYS = ("nimg", "sigma_rel", "halflife", "first_seed", "guide_sigma_rel", "ema_target")
"""Protocol keys that belong to a training: its progress and EMA lengths."""
PAIR_METRICS, SAMPLE_KEYS = ("lpips", "lpips_hr", "digits_feature_distance"), ("num_samples", "num_repeats")
"""Metrics over eval.diversity_prompts, and the protocol keys that they do not depend on."""


def footnotes(
    table: Table, jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]
) -> tuple[dict[Cell, tuple[int, ...]], list[str]]:
    """Return the footnote numbers of each cell and the footnotes.

    A cell has a footnote if its protocol differs from its column's usual one in something that its row does not vary on
    purpose (settings of the measurement or training).
    """
    marks: dict[Cell, tuple[int, ...]] = {}
    notes: list[str] = []
    for column in table.columns:
        facts_of_jobs = [
            (job, protocol_facts(records[job.path], job, column.name))
            for job in jobs
            if column.name in job.group.columns and "values" in records.get(job.path, {})
        ]
        counts: dict[str, Counter[str]] = {}
        for job, facts in facts_of_jobs:
            for name in facts.keys() - intended_differences(job):
                counts.setdefault(name, Counter())[facts[name]] += 1
        for job, facts in facts_of_jobs:
            for name, value in facts.items():
                usual = counts[name].most_common(1)[0][0] if name in counts else value
                if value == usual or name in intended_differences(job):
                    continue
                text = f"{name} {value}, where other rows have {usual}"
                if text not in notes:
                    notes.append(text)
                cell, number = (job.row, column.name), notes.index(text) + 1
                marks[cell] = tuple(sorted({*marks.get(cell, ()), number}))
    return marks, notes


def protocol_facts(record: Mapping[str, Any], job: MeasurementJob, column: str) -> dict[str, str]:
    """Return everything besides the training that decides a number, by name."""
    name, protocol = job.group.columns[column], dict(record.get("protocol") or {})
    irrelevant = SAMPLE_KEYS if name in PAIR_METRICS else ("diversity_prompts",)
    networks, protocol_name = protocol.pop("networks", {}), protocol.pop("name", None)
    reference = [protocol.pop(f"reference{end}", None) for end in ("", "_images", "_fingerprint")]
    facts = {k: v for k, v in protocol.items() if k not in (*NON_PROTOCOL_KEYS, *irrelevant)}
    if reference[0]:
        facts["reference"] = f"{reference[1]:,} of {reference[0]} ({str(reference[2])[:6]})"
    facts |= {f"network {key}": network for key, network in networks.items()} | {"protocol": protocol_name}
    # Columns of counts or of growth have one name each; two metrics are two measures.
    facts |= {"measure": name} if job.group.method in ("metrics", "tensors") else {"measure": job.group.method}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def intended_differences(job: MeasurementJob) -> set[str]:
    """Return the protocol keys that a row sets itself, as sample.guidance=2 sets guidance."""
    measurement = job.group.rows[job.row]
    settings = (*measurement.settings, *(measurement.training.settings if measurement.training else ()))
    names = {setting.partition("=")[0] for setting in settings}
    varied = {name.partition(".")[2] for name in names if name.startswith(("sample.", "eval."))}
    return varied | ({"guide"} if measurement.guide else set())
