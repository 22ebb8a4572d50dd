"""Result of a table: numbers by row, column and seed, published numbers, footnotes, verdicts, cost and commands.

It is stored as NAME-SCALE.json, from which page.py writes the pages.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso.reproduce import claims, labels, plan, runner
from gesso.reproduce.claims import Judgement, Verdict
from gesso.reproduce.footnotes import collect_footnotes
from gesso.reproduce.index import file_stem
from gesso.reproduce.labels import ColumnLabel
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.schema import Cell, ChecklistItem, Claim, Table, Values


class CellNumbers(NamedTuple):
    """Numbers of a cell.

    Attributes:
        by_seed: number by seed; inf: the training diverged, NaN: not finite.
        published: the paper's number.
        footnotes: numbers of footnotes.
        single_seed: True if one measurement counts for all seeds.
    """

    by_seed: Mapping[int, float]
    published: float | None = None
    footnotes: tuple[int, ...] = ()
    single_seed: bool = False

    @property
    def finite_values(self) -> list[float]:
        """Finite numbers."""
        return [value for value in self.by_seed.values() if math.isfinite(value)]

    @property
    def mean(self) -> float:
        """Mean over the seeds that did not diverge; inf if all did, NaN without a number."""
        if self.finite_values:
            return statistics.mean(self.finite_values)
        return max(self.by_seed.values(), default=math.nan)

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None for a single number."""
        values = self.finite_values
        return statistics.stdev(values) if len(values) > 1 and not self.single_seed else None


class ClaimResult(NamedTuple):
    """Verdict on a claim, and its effect in the paper's numbers: in their unit, and relative (`Judgement.relative`)."""

    judgement: Judgement
    published: float | None = None
    relative_published: float | None = None


class TableResult(NamedTuple):
    """Result of one table at one scale.

    Attributes:
        table: the table; its texts name what is measured.
        record: what `collect_record` returned.
        cells: numbers by (row, column).
        footnotes: footnotes, numbered from 1.
        claims: verdict of each claim.
        checklist: items of a checklist, each with the text and verdict of its claim.
        columns: label of each column.
    """

    table: Table
    record: Mapping[str, Any]
    cells: Mapping[Cell, CellNumbers]
    footnotes: Sequence[str]
    claims: Sequence[ClaimResult]
    checklist: Sequence[tuple[ChecklistItem, str, str]]
    columns: Mapping[str, ColumnLabel]

    @property
    def scale(self) -> str:
        """Scale of the table."""
        return self.record["scale"]

    @property
    def seeds(self) -> list[int]:
        """Training seeds."""
        return self.record["seeds"]


def collect_record(
    table: Table, scale: str, out: Path, jobs: Sequence[MeasurementJob], settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return all that NAME-SCALE.json stores besides verdicts, from the records of finished jobs.

    Args:
        table: the table.
        scale: its scale.
        out: folder of trainings and records, which commands show as the default --out.
        jobs: measurements of all rows and seeds.
        settings: overrides that the user applied to every training.
    """
    records = {job.path: runner.read_record(job.path) for job in jobs if job.path.is_file()}
    values = runner.collect_values(jobs)
    marks, texts = collect_footnotes(table, jobs, records)
    environments = Counter(describe_environment(record) for record in records.values() if "environment" in record)
    training_minutes = minutes_per_training(jobs, records)
    record = {
        "scale": scale,
        "seeds": list(values) or [0],
        "settings": list(settings),
        "rows": {
            row.name: {
                column.name: {
                    "by_seed": {
                        str(seed): number_to_json(numbers[cell]) for seed, numbers in values.items() if cell in numbers
                    },
                    "footnotes": [texts[i - 1] for i in marks.get(cell, ())],
                }
                for column in table.columns
                for cell in ((row.name, column.name),)
            }
            for row in table.rows
        },
        "minutes": row_minutes(jobs, records),
        "total_minutes": sum(training_minutes) + sum(r.get("measurement_minutes", 0.0) for r in records.values()),
        "environments": [name for name, _ in environments.most_common()],
        "protocols": collect_protocols(jobs, records, out),
        "training_commands": [relative_text(training.command, out) for training in plan.unique_trainings(jobs)],
        "evaluate_commands": evaluate_commands(jobs, out),
        "columns": {name: label._asdict() for name, label in labels.label_columns(table, scale).items()},
        "notes": table.scales[scale].notes if scale in table.scales else "",
        "outdated": "",
    }
    return record | {"runtime": describe_runtime(table, record, training_minutes)}


def load_result(table: Table, record: Mapping[str, Any], out: Path) -> TableResult:
    """Return the result of a record with the verdicts of the current claims, for the rows and columns of the table.

    Args:
        table: the table.
        record: what `collect_record` returned, or the content of NAME-SCALE.json.
        out: folder of the pages, which checklists read.
    """
    texts: list[str] = []
    cells: dict[Cell, CellNumbers] = {}
    published, single_seed = table.published(), plan.cells_without_training(table, record["scale"])
    values: dict[int, dict[Cell, float]] = {seed: {} for seed in record["seeds"]}
    for row in table.rows:
        for column in table.columns:
            cell, entry = (row.name, column.name), record["rows"].get(row.name, {}).get(column.name, {})
            numbers = {int(seed): _parse_number(value) for seed, value in entry.get("by_seed", {}).items()}
            texts += [text for text in entry.get("footnotes", ()) if text not in texts]
            marks = tuple(texts.index(text) + 1 for text in entry.get("footnotes", ()))
            cells[cell] = CellNumbers(numbers, published.get(cell), marks, cell in single_seed)
            for seed, value in numbers.items():
                values.setdefault(seed, {})[cell] = value
    stored = record["columns"]
    measured = {name: entry["value"] for name, entry in stored.items() if entry["value"]}
    titles = {column.name: labels.rename_metric(table, column.name, measured) for column in table.columns}
    columns = {name: ColumnLabel(**{**stored.get(name, {}), "title": title}) for name, title in titles.items()}
    table = labels.name_measured(with_scale_notes(table, record), measured)
    return TableResult(
        table=table,
        record=record,
        cells=cells,
        footnotes=texts,
        claims=judge_claims(table, values, single_seed),
        checklist=judge_checklist(table, record["scale"], out),
        columns=columns,
    )


def with_scale_notes(table: Table, record: Mapping[str, Any]) -> Table:
    """Return a table with the notes on its scale under which the numbers of a record were measured."""
    name = record["scale"]
    if name not in table.scales:
        return table
    return table._replace(scales={**table.scales, name: table.scales[name]._replace(notes=record["notes"])})


def _parse_number(value: float | str) -> float:
    """Invert `number_to_json`."""
    return {"NaN": math.nan, "diverged": math.inf}[value] if isinstance(value, str) else value


def judge_claims(table: Table, values: Mapping[int, Values], single_seed: set[Cell]) -> list[ClaimResult]:
    """Return the verdict of each claim and the effect in the paper's numbers."""
    published = table.published()
    return [
        ClaimResult(
            judge_claim(table, claim, values, single_seed),
            claims.compute_effect(table, claim, published),
            claims.compute_relative_effect(table, claim, published),
        )
        for claim in table.claims
    ]


def judge_claim(table: Table, claim: Claim, values: Mapping[int, Values], single_seed: set[Cell]) -> Judgement:
    """Judge a claim over the numbers that are not NaN. A claim that no training decides is an exact check."""
    usable = [{c: v for c, v in numbers.items() if not math.isnan(v)} for numbers in values.values() if numbers]
    exact = [{c: v for c, v in numbers.items() if c in single_seed} for numbers in usable]
    effects = [claims.compute_effect(table, claim, numbers) for numbers in exact]
    known = [effect for effect in effects if effect is not None]
    if known and effects == [claims.compute_effect(table, claim, numbers) for numbers in usable]:
        return claims.judge_exact(claim, known)
    return claims.judge(table, claim, usable)


def judge_checklist(table: Table, scale: str, out: Path) -> list[tuple[ChecklistItem, str, str]]:
    """Return the items of a checklist, each with the text and verdict of its claim."""
    return [(item, *judge_checklist_item(item, scale, out)) for item in table.checklist]


def judge_checklist_item(item: ChecklistItem, scale: str, out: Path) -> tuple[str, str]:
    """Return the text and verdict of the claim of an item, from the stored page of its table at the same scale."""
    path = out / f"{file_stem(item.table, scale)}.json"
    stored = runner.read_record(path)["claims"] if path.is_file() else []
    if item.claim >= len(stored):
        return "", Verdict.NOT_MEASURED
    return stored[item.claim]["text"], stored[item.claim]["verdict"]


def row_minutes(jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return the minutes of training and of measurement of each measured row, averaged over seeds.

    A training that rows share counts for each of them.
    """
    training: dict[str, dict[tuple[int, str], float]] = {}
    measurement: dict[str, dict[int, float]] = {}
    for job in jobs:
        if record := records.get(job.path):
            by_seed = measurement.setdefault(job.row, {})
            by_seed[job.seed] = by_seed.get(job.seed, 0) + record.get("measurement_minutes", 0)
            key = (job.seed, json.dumps(record.get("training_commands")))
            training.setdefault(job.row, {})[key] = record.get("training_minutes", 0)
    return {
        row: {
            "training": sum(training[row].values()) / len(by_seed),
            "measurement": sum(by_seed.values()) / len(by_seed),
        }
        for row, by_seed in measurement.items()
    }


def minutes_per_training(jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]) -> list[float]:
    """Return the minutes of each training that was measured, once."""
    measured = [records[job.path] for job in jobs if job.path in records]
    minutes = {
        json.dumps(r["training_commands"]): r.get("training_minutes", 0.0) for r in measured if r["training_commands"]
    }
    return list(minutes.values())


def collect_protocols(
    jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]], out: Path
) -> dict[str, dict[str, Any]]:
    """Return the protocol of each column: that of its first cell."""
    result: dict[str, dict[str, Any]] = {}
    for job in jobs:
        protocol = records.get(job.path, {}).get("protocol")
        for column in job.group.columns:
            if protocol and column not in result:
                result[column] = json.loads(relative_text(json.dumps(protocol), out))
    return result


def evaluate_commands(jobs: Sequence[MeasurementJob], out: Path) -> dict[str, list[str]]:
    """Return the evaluation commands of each row, each once."""
    result: dict[str, dict[str, None]] = {}
    for job in jobs:
        if job.evaluate_command:
            result.setdefault(job.row, {})[relative_text(job.evaluate_command, out)] = None
    return {row: list(commands) for row, commands in result.items()}


def relative_text(text: str, out: Path) -> str:
    """Replace `out` in the paths of a text by the default --out, so that pages do not depend on it."""
    for name in ("runs", "measurements"):
        text = re.sub(rf"(?<![\w/.-]){re.escape(str(out / name))}/", f"tables/{name}/", text)
    return text


def describe_environment(record: Mapping[str, Any]) -> str:
    """Return the device, threads and torch version of a record."""
    env = record["environment"]
    threads = f", {env['threads']} thread{'s' * (env['threads'] != 1)}" if env["device"] == "cpu" else ""
    return f"{env['device']}{threads}, torch {env['torch']}"


def describe_runtime(table: Table, record: Mapping[str, Any], training_minutes: Sequence[float]) -> str:
    """Return how many minutes a row took, or a training where the rows of a figure are points of one."""
    rows = [minutes["training"] + minutes["measurement"] for minutes in record["minutes"].values()]
    times = sorted(training_minutes if table.x_axis else rows)
    if not times or not record["training_commands"]:
        return ""
    low, middle, high = (f"{value:.2g}" for value in (times[0], statistics.median(times), times[-1]))
    duration = f"{low} to {high} minutes, median {middle}" if low != high else f"{low} minutes"
    on = f" ({'; '.join(record['environments'])})" if record["environments"] else ""
    subject = "A training" if table.x_axis else "A row and seed"
    shared = "" if table.x_axis else " A training that rows share counts for each of them."
    return f"{subject} took {duration}{on}; expected for a row: {table.scales[record['scale']].cost}.{shared}"


def reproduce_command(result: TableResult) -> str:
    """Return the command that makes the table."""
    seeds = f" --num-seeds {len(result.seeds)}" if len(result.seeds) > 1 else ""
    return " ".join(
        ["gesso reproduce", result.table.name, *result.record["settings"], f"--scale {result.scale}{seeds}"]
    )


def to_json(result: TableResult) -> dict[str, Any]:
    """Return the content of NAME-SCALE.json; numbers that are not finite become "diverged" or "NaN"."""
    table = result.table
    return {
        "table": table.name,
        "title": table.title,
        "source": table.source,
        **result.record,
        "rows": {
            row.name: {
                column.name: cell_to_json(cell, result.footnotes)
                for column in table.columns
                if (cell := result.cells[row.name, column.name]).by_seed or cell.published is not None
            }
            for row in table.rows
        },
        "claims": [claim_to_json(claim) for claim in result.claims],
        "checks": [
            {
                "question": item.question,
                "recommendation": item.recommendation,
                "table": item.table,
                "text": text,
                "verdict": verdict,
            }
            for item, text, verdict in result.checklist
        ],
        "command": reproduce_command(result),
        "columns": {name: label._asdict() for name, label in result.columns.items()},
    }


def cell_to_json(cell: CellNumbers, footnotes: Sequence[str]) -> dict[str, Any]:
    """Return a cell for JSON."""
    return {
        "by_seed": {str(seed): number_to_json(value) for seed, value in cell.by_seed.items()},
        "mean": number_to_json(cell.mean) if cell.by_seed else None,
        "std": cell.std,
        "published": None if cell.published is None else number_to_json(cell.published),
        "footnotes": [footnotes[i - 1] for i in cell.footnotes],
    }


def claim_to_json(claim: ClaimResult) -> dict[str, Any]:
    """Return the verdict of a claim for JSON."""
    judgement = claim.judgement
    return {
        "text": judgement.text,
        "verdict": judgement.verdict,
        "effect": effect_to_json(judgement.effect) if judgement.num_seeds else None,
        "bounds": [judgement.low, judgement.high],
        "parts": judgement.num_parts,
        "seeds": judgement.num_seeds,
        "relative": list(judgement.relative),
        "published_effect": None if claim.published is None else effect_to_json(claim.published),
        "relative_published": claim.relative_published,
    }


def effect_to_json(value: float) -> float | str:
    """Return an effect for JSON; it is infinite if one training diverged and the other did not."""
    return value if math.isfinite(value) else str(value)


def number_to_json(value: float) -> float | str:
    """Return a number for JSON."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "diverged"
