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


class RowMinutes(NamedTuple):
    """Minutes of a row, averaged over seeds; a training that rows share counts for each of them."""

    training: float
    measurement: float


class ClaimResult(NamedTuple):
    """Verdict on a claim, and its effect in the paper's numbers: in their unit, and relative (`Judgement.relative`)."""

    judgement: Judgement
    published: float | None = None
    relative_published: float | None = None


class TableResult(NamedTuple):
    """Result of one table at one scale.

    Attributes:
        table: the table; its texts name what is measured.
        scale: the scale.
        seeds: training seeds.
        settings: overrides that the user applied to every training.
        cells: numbers by (row, column).
        footnotes: footnotes, numbered from 1.
        claims: verdict of each claim.
        checklist: items of a checklist, each with the text and verdict of its claim.
        minutes: minutes by row.
        minutes_per_training: minutes of each training.
        total_minutes: minutes of all trainings and measurements.
        protocols: evaluation protocol by column.
        environments: devices, threads and versions, the most frequent first.
        training_commands: commands of all trainings.
        evaluate_commands: commands that repeat the measurements, by row.
        columns: label of each column.
        runtime: text on how long a row took.
        outdated_note: reason why new runs would give other numbers.
    """

    table: Table
    scale: str
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    cells: Mapping[Cell, CellNumbers]
    footnotes: Sequence[str]
    claims: Sequence[ClaimResult]
    checklist: Sequence[tuple[ChecklistItem, str, str]]
    minutes: Mapping[str, RowMinutes]
    minutes_per_training: Sequence[float]
    total_minutes: float
    protocols: Mapping[str, Mapping[str, Any]]
    environments: Sequence[str]
    training_commands: Sequence[str]
    evaluate_commands: Mapping[str, Sequence[str]]
    columns: Mapping[str, ColumnLabel] = {}
    runtime: str = ""
    outdated_note: str = ""


def collect_result(
    table: Table, scale: str, out: Path, jobs: Sequence[MeasurementJob], settings: Sequence[str] = ()
) -> TableResult:
    """Return the result of all finished jobs. `settings` are overrides that the user applied to every training."""
    records = {job.path: runner.read_record(job.path) for job in jobs if job.path.is_file()}
    table = labels.name_measured(table, labels.measured_values(table, scale))
    values, published = runner.collect_values(jobs), table.published()
    marks, texts = collect_footnotes(table, jobs, records)
    cells: dict[Cell, CellNumbers] = {}
    single_seed = {(job.row, column) for job in jobs if job.single_seed for column in job.group.columns}
    for row in table.rows:
        for column in table.columns:
            cell = (row.name, column.name)
            by_seed = {seed: numbers[cell] for seed, numbers in values.items() if cell in numbers}
            cells[cell] = CellNumbers(by_seed, published.get(cell), marks.get(cell, ()), cell in single_seed)
    training_minutes = minutes_per_training(jobs, records)
    environments = Counter(describe_environment(record) for record in records.values() if "environment" in record)
    return TableResult(
        table=table,
        scale=scale,
        seeds=tuple(values) or (0,),
        settings=tuple(settings),
        cells=cells,
        footnotes=texts,
        claims=judge_claims(table, values, single_seed),
        checklist=judge_checklist(table, scale, out),
        minutes=row_minutes(jobs, records),
        minutes_per_training=training_minutes,
        total_minutes=sum(training_minutes) + sum(r.get("measurement_minutes", 0.0) for r in records.values()),
        protocols=collect_protocols(jobs, records, out),
        environments=[name for name, _ in environments.most_common()],
        training_commands=[relative_text(training.command, out) for training in plan.unique_trainings(jobs)],
        evaluate_commands=evaluate_commands(jobs, out),
        columns=labels.label_columns(table, scale),
    )


def load_result(table: Table, stored: Mapping[str, Any], out: Path, single_seed: set[Cell]) -> TableResult:
    """Return the result stored in NAME-SCALE.json with new verdicts, without rows and columns that the table lacks."""
    texts: list[str] = []
    cells: dict[Cell, CellNumbers] = {}
    published, seeds = table.published(), tuple(stored["seeds"])
    values: dict[int, dict[Cell, float]] = {seed: {} for seed in seeds}
    for row in table.rows:
        for column in table.columns:
            cell, entry = (row.name, column.name), stored["rows"].get(row.name, {}).get(column.name, {})
            numbers = {int(seed): _parse_number(value) for seed, value in entry.get("by_seed", {}).items()}
            texts += [text for text in entry.get("footnotes", ()) if text not in texts]
            marks = tuple(texts.index(text) + 1 for text in entry.get("footnotes", ()))
            cells[cell] = CellNumbers(numbers, published.get(cell), marks, cell in single_seed)
            for seed, value in numbers.items():
                values.setdefault(seed, {})[cell] = value
    columns = stored["columns"]
    measured = {name: entry["value"] for name, entry in columns.items() if entry["value"]}
    columns = {
        column.name: ColumnLabel(
            **{**columns.get(column.name, {}), "title": labels.rename_metric(table, column.name, measured)}
        )
        for column in table.columns
    }
    table = labels.name_measured(with_scale_notes(table, stored), measured)
    return TableResult(
        table=table,
        scale=stored["scale"],
        seeds=seeds,
        settings=tuple(stored["settings"]),
        cells=cells,
        footnotes=texts,
        claims=judge_claims(table, values, single_seed),
        checklist=judge_checklist(table, stored["scale"], out),
        minutes={row: RowMinutes(entry["training"], entry["measurement"]) for row, entry in stored["minutes"].items()},
        minutes_per_training=(),
        total_minutes=stored["total_minutes"],
        protocols=stored["protocols"],
        environments=stored["environments"],
        training_commands=stored["training_commands"],
        evaluate_commands=stored["evaluate_commands"],
        columns=columns,
        runtime=stored["runtime"],
        outdated_note=stored["outdated"],
    )


def with_scale_notes(table: Table, stored: Mapping[str, Any]) -> Table:
    """Return a table with the notes on its scale under which stored numbers were measured."""
    if stored["scale"] not in table.scales:
        return table
    scale = table.scales[stored["scale"]]._replace(notes=stored["notes"])
    return table._replace(scales={**table.scales, stored["scale"]: scale})


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


def row_minutes(jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]) -> dict[str, RowMinutes]:
    """Return the minutes of each measured row."""
    training: dict[str, dict[tuple[int, str], float]] = {}
    measurement: dict[str, dict[int, float]] = {}
    for job in jobs:
        if record := records.get(job.path):
            by_seed = measurement.setdefault(job.row, {})
            by_seed[job.seed] = by_seed.get(job.seed, 0) + record.get("measurement_minutes", 0)
            key = (job.seed, json.dumps(record.get("training_commands")))
            training.setdefault(job.row, {})[key] = record.get("training_minutes", 0)
    return {
        row: RowMinutes(sum(training[row].values()) / len(by_seed), sum(by_seed.values()) / len(by_seed))
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


def reproduce_command(result: TableResult) -> str:
    """Return the command that makes the table."""
    seeds = f" --num-seeds {len(result.seeds)}" if len(result.seeds) > 1 else ""
    return " ".join(["gesso reproduce", result.table.name, *result.settings, f"--scale {result.scale}{seeds}"])


def to_json(result: TableResult) -> dict[str, Any]:
    """Return the content of NAME-SCALE.json; numbers that are not finite become "diverged" or "NaN"."""
    table = result.table
    return {
        "table": table.name,
        "title": table.title,
        "source": table.source,
        "scale": result.scale,
        "seeds": list(result.seeds),
        "settings": list(result.settings),
        "rows": {
            row.name: {
                column.name: {
                    "by_seed": {str(seed): number_to_json(value) for seed, value in cell.by_seed.items()},
                    "mean": number_to_json(cell.mean) if cell.by_seed else None,
                    "std": cell.std,
                    "published": None if cell.published is None else number_to_json(cell.published),
                    "footnotes": [result.footnotes[i - 1] for i in cell.footnotes],
                }
                for column in table.columns
                if (cell := result.cells[row.name, column.name]).by_seed or cell.published is not None
            }
            for row in table.rows
        },
        "claims": [
            {
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
            for claim in result.claims
            for judgement in (claim.judgement,)
        ],
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
        "minutes": {row: minutes._asdict() for row, minutes in result.minutes.items()},
        "total_minutes": result.total_minutes,
        "environments": list(result.environments),
        "protocols": result.protocols,
        "command": reproduce_command(result),
        "training_commands": list(result.training_commands),
        "evaluate_commands": {row: list(commands) for row, commands in result.evaluate_commands.items()},
        "columns": {name: label._asdict() for name, label in result.columns.items()},
        "notes": table.scales[result.scale].notes if result.scale in table.scales else "",
        "runtime": result.runtime,
        "outdated": result.outdated_note,
    }


def effect_to_json(value: float) -> float | str:
    """Return an effect for JSON; it is infinite if one training diverged and the other did not."""
    return value if math.isfinite(value) else str(value)


def number_to_json(value: float) -> float | str:
    """Return a number for JSON."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "diverged"
