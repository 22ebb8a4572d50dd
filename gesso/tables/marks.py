"""Marks of numbers that stand in one column and were not measured alike."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gesso.tables.plan import Job
from gesso.tables.table import Cell, Table

OWN = ("nimg", "sigma_rel", "halflife", "first_seed", "guide_sigma_rel", "average")
"""of a protocol, what belongs to a training: how far it has come, its EMA lengths"""
OF_PAIRS, OF_SAMPLES = ("lpips", "lpips_hr", "told_digits"), ("images", "repeats")
"""scores over eval.diversity_seeds; what they do not depend on"""


def marked(
    table: Table, todo: Sequence[Job], records: Mapping[Path, dict[str, Any]]
) -> tuple[dict[Cell, tuple[int, ...]], list[str]]:
    """Footnotes of the cells that were measured otherwise than the others of their column, but for what their row varies on
    purpose (How.measure, or settings of its training)."""
    marks: dict[Cell, tuple[int, ...]] = {}
    notes: list[str] = []
    for column in table.columns:
        told = [
            (job, facts(records[job.path], job, column.name))
            for job in todo
            if column.name in job.part.columns and "found" in records.get(job.path, {})
        ]
        counts: dict[str, Counter[str]] = {}
        for job, known in told:
            for name in known.keys() - on_purpose(job):
                counts.setdefault(name, Counter())[known[name]] += 1
        for job, known in told:
            for name, value in known.items():
                usual = counts[name].most_common(1)[0][0] if name in counts else value
                if value == usual or name in on_purpose(job):
                    continue
                text = f"{name} {value}, where other rows have {usual}"
                if text not in notes:
                    notes.append(text)
                cell, number = (job.row, column.name), notes.index(text) + 1
                marks[cell] = tuple(sorted({*marks.get(cell, ()), number}))
    return marks, notes


def facts(record: Mapping[str, Any], job: Job, column: str) -> dict[str, str]:
    """What decides a number besides its training, by name."""
    name, protocol = job.part.columns[column], dict(record.get("protocol") or {})
    unlike = OF_SAMPLES if name in OF_PAIRS else ("diversity_seeds",)
    networks, said = protocol.pop("networks", {}), protocol.pop("name", None)
    beside = [protocol.pop(f"reference{end}", None) for end in ("", "_images", "_pictures")]
    told = {k: v for k, v in protocol.items() if k not in (*OWN, *unlike)}
    if beside[0]:
        told["reference"] = f"{beside[1]:,} of {beside[0]} ({str(beside[2])[:6]})"
    told |= {f"network {key}": network for key, network in networks.items()} | {"protocol": said}
    # Columns of an architecture or a growth are named one by one; scores of two names are two measures.
    told |= {"measure": name} if job.part.by in ("scores", "tensors") else {"measure": job.part.by}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()}


def on_purpose(job: Job) -> set[str]:
    """Names of a protocol that a row sets itself, as sample.guidance=2 sets guidance."""
    how = job.part.rows[job.row]
    said = (*how.measure, *(how.training.settings if how.training else ()))
    names = {setting.partition("=")[0] for setting in said}
    varied = {name.partition(".")[2] for name in names if name.startswith(("sample.", "eval."))}
    return varied | ({"guide"} if how.guide else set())
