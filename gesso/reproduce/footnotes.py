"""Footnotes of cells that were measured differently from the others of their column."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.schema import Cell, Table

NON_PROTOCOL_KEYS = ("nimg", "sigma_rel", "halflife", "first_seed", "guide_sigma_rel", "ema_target")
"""Protocol keys of the weights and seeds, which may differ between rows."""
PAIR_METRICS = ("lpips", "lpips_hr", "digits_feature_distance")
"""Metrics over eval.diversity_prompts."""
SAMPLE_KEYS = ("num_samples", "num_repeats")
"""Protocol keys that PAIR_METRICS do not depend on."""


def collect_footnotes(
    table: Table, jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]
) -> tuple[dict[Cell, tuple[int, ...]], list[str]]:
    """Return the footnote numbers of each cell, and the footnotes.

    A cell has a footnote if a key of its protocol differs from the most frequent value of its column, and its row does
    not vary the key on purpose (settings of the measurement or training).

    Args:
        table: The table.
        jobs: All jobs of the table.
        records: Content of the records by path.
    """
    numbers: dict[Cell, tuple[int, ...]] = {}
    texts: list[str] = []
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
                most_frequent = counts[name].most_common(1)[0][0] if name in counts else value
                if value == most_frequent or name in intended_differences(job):
                    continue
                text = f"{name} {value}, where other rows have {most_frequent}"
                if text not in texts:
                    texts.append(text)
                cell = (job.row, column.name)
                numbers[cell] = tuple(sorted({*numbers.get(cell, ()), texts.index(text) + 1}))
    return numbers, texts


def protocol_facts(record: Mapping[str, Any], job: MeasurementJob, column: str) -> dict[str, str]:
    """Return everything besides the training that decides a number, as text by name."""
    metric, protocol = job.group.columns[column], dict(record.get("protocol") or {})
    irrelevant = SAMPLE_KEYS if metric in PAIR_METRICS else ("diversity_prompts",)
    networks, protocol_name = protocol.pop("networks", {}), protocol.pop("name", None)
    reference = [protocol.pop(f"reference{end}", None) for end in ("", "_images", "_fingerprint")]
    facts = {k: v for k, v in protocol.items() if k not in (*NON_PROTOCOL_KEYS, *irrelevant)}
    if reference[0]:
        facts["reference"] = f"{reference[1]:,} of {reference[0]} ({str(reference[2])[:6]})"
    facts |= {f"network {key}": network for key, network in networks.items()} | {"protocol": protocol_name}
    # The values of other methods have one name per column.
    facts["measure"] = metric if job.group.method in ("metrics", "tensors") else job.group.method
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def intended_differences(job: MeasurementJob) -> set[str]:
    """Return the protocol keys that a row sets itself, as sample.guidance=2 sets guidance."""
    measurement = job.group.rows[job.row]
    settings = (*measurement.settings, *(measurement.training.settings if measurement.training else ()))
    names = {setting.partition("=")[0] for setting in settings}
    varied_keys = {name.partition(".")[2] for name in names if name.startswith(("sample.", "eval."))}
    return varied_keys | ({"guide_run"} if measurement.guide else set())
