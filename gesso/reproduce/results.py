"""Result of a table: numbers by row, column and seed, published numbers, footnotes, verdicts, cost and commands.

It is stored as NAME-SCALE.json; page.py shows it.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso.reproduce import claims, plan, runner
from gesso.reproduce.claims import Judgement, Verdict
from gesso.reproduce.footnotes import footnotes
from gesso.reproduce.index import file_name
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.schema import Cell, Check, Table, Values


class CellNumbers(NamedTuple):
    """Numbers of a cell.

    seeds: number by seed (inf: the training diverged, NaN: not finite); single_seed: one measurement counts for all seeds.
    """

    seeds: Mapping[int, float]
    published: float | None = None
    notes: tuple[int, ...] = ()
    single_seed: bool = False

    @property
    def finite(self) -> list[float]:
        """Finite numbers."""
        return [value for value in self.seeds.values() if math.isfinite(value)]

    @property
    def mean(self) -> float:
        """Mean over the seeds that did not diverge; inf if all did, NaN without a number."""
        if self.finite:
            return statistics.mean(self.finite)
        return max(self.seeds.values(), default=math.nan)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single number."""
        return statistics.stdev(self.finite) if len(self.finite) > 1 and not self.single_seed else None


class RunMinutes(NamedTuple):
    """Minutes of a row, averaged over seeds; a training that rows share counts for each of them."""

    training: float
    measuring: float


class Result(NamedTuple):
    """Result of one table at one scale.

    notes: footnotes, numbered from 1; verdicts: one per claim, with the effect in the paper's own numbers; described: what
    each column measures; runtime: how long it took; outdated: why new runs would give other numbers.
    """

    table: Table
    scale: str
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    cells: Mapping[Cell, CellNumbers]
    notes: Sequence[str]
    verdicts: Sequence[tuple[Judgement, float | None]]
    checks: Sequence[tuple[Check, str, str]]
    minutes: Mapping[str, RunMinutes]
    each_training: Sequence[float]
    protocols: Mapping[str, Mapping[str, Any]]
    machine_names: Sequence[str]
    trainings: Sequence[str]
    evaluations: Mapping[str, Sequence[str]]
    described: Mapping[str, str] = {}
    runtime: str = ""
    outdated: str = ""


def collect_result(
    table: Table, scale: str, out: Path, jobs: Sequence[MeasurementJob], settings: Sequence[str] = ()
) -> Result:
    """Return the result of all finished jobs. settings: overrides that the user applied to every training."""
    records = {job.path: runner.read_record(job.path) for job in jobs if job.path.is_file()}
    values, published = runner.collect_values(jobs), table.published()
    marks, notes = footnotes(table, jobs, records)
    cells: dict[Cell, CellNumbers] = {}
    single_seed = {(job.row, column) for job in jobs if job.single_seed for column in job.group.columns}
    for row in table.rows:
        for column in table.columns:
            cell = (row.name, column.name)
            seeds = {seed: numbers[cell] for seed, numbers in values.items() if cell in numbers}
            cells[cell] = CellNumbers(seeds, published.get(cell), marks.get(cell, ()), cell in single_seed)
    machines = Counter(describe_machine(record) for record in records.values() if "environment" in record)
    return Result(
        table, scale, tuple(values) or (0,), tuple(settings), cells, notes,
        judge_claims(table, values, single_seed),
        [(check, *judge_check(check, scale, out)) for check in table.checks],
        total_minutes(jobs, records), minutes_per_training(jobs, records), collect_protocols(jobs, records, out),
        [name for name, _ in machines.most_common()],
        [relative_text(training.command, out) for training in plan.unique_trainings(jobs)], evaluations(jobs, out),
    )  # fmt: skip


def load_result(table: Table, stored: Mapping[str, Any], out: Path, single_seed: set[Cell]) -> Result:
    """Return the result stored in NAME-SCALE.json with new verdicts. Rows and columns that the table lacks are left out."""
    notes: list[str] = []
    cells: dict[Cell, CellNumbers] = {}
    published, seeds = table.published(), tuple(stored["seeds"])
    values: dict[int, dict[Cell, float]] = {seed: {} for seed in seeds}
    for row in table.rows:
        for column in table.columns:
            cell, entry = (row.name, column.name), stored["rows"].get(row.name, {}).get(column.name, {})
            numbers = {int(seed): _parse_number(value) for seed, value in entry.get("ours", {}).items()}
            notes += [note for note in entry.get("notes", ()) if note not in notes]
            marks = tuple(notes.index(note) + 1 for note in entry.get("notes", ()))
            cells[cell] = CellNumbers(numbers, published.get(cell), marks, cell in single_seed)
            for seed, value in numbers.items():
                values.setdefault(seed, {})[cell] = value
    scale = stored["scale"]
    unmeasured = [c for c in table.columns if not any(cells[r.name, c.name].seeds for r in table.rows)]
    described = dict(stored.get("columns", {}))
    known = {name for names in described for name in names.split("; ")}
    described |= {c.name: "not measured on this page" for c in unmeasured if c.name not in known}
    return Result(
        table, scale, seeds, tuple(stored["settings"]), cells, notes, judge_claims(table, values, single_seed),
        [(check, *judge_check(check, scale, out)) for check in table.checks],
        {row: RunMinutes(entry["training"], entry["measuring"]) for row, entry in stored["minutes"].items()}, (),
        stored["protocols"], stored["environment"], stored["trainings"], stored["evaluations"], described,
        stored.get("runtime", ""), stored.get("outdated", ""),
    )  # fmt: skip


def _parse_number(value: float | str) -> float:
    """Invert `number_to_json`."""
    return {"NaN": math.nan, "diverged": math.inf}[value] if isinstance(value, str) else value


def judge_claims(
    table: Table, values: Mapping[int, Values], single_seed: set[Cell]
) -> list[tuple[Judgement, float | None]]:
    """Return the verdict of each claim and the effect in the paper's own numbers."""
    published = table.published()
    return [
        (judge_claim(table, claim, values, single_seed), claims.effect_of(table, claim, published))
        for claim in table.claims
    ]


def judge_claim(table: Table, claim: claims.Claim, values: Mapping[int, Values], single_seed: set[Cell]) -> Judgement:
    """Judge a claim over the numbers that are not NaN. A claim that no training decides is an exact check."""
    usable = [{c: v for c, v in numbers.items() if not math.isnan(v)} for numbers in values.values() if numbers]
    exact = [{c: v for c, v in numbers.items() if c in single_seed} for numbers in usable]
    effects = [claims.effect_of(table, claim, numbers) for numbers in exact]
    if effects and None not in effects and effects == [claims.effect_of(table, claim, numbers) for numbers in usable]:
        return claims.check(table, claim, exact)
    return claims.judge(table, claim, usable)


def judge_check(check: Check, scale: str, out: Path) -> tuple[str, str]:
    """Return the text and verdict of the claim of a check, from the stored page of its table at the same scale."""
    path = out / f"{file_name(check.table, scale)}.json"
    if not path.is_file():
        return "", Verdict.NOT_MEASURED
    stored = runner.read_record(path)["claims"]
    if check.claim >= len(stored):
        return "", Verdict.NOT_MEASURED
    return stored[check.claim]["text"], stored[check.claim]["verdict"]


def total_minutes(jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]) -> dict[str, RunMinutes]:
    """Return the minutes of each measured row."""
    trained: dict[str, dict[tuple[int, str], float]] = {}
    measured: dict[str, dict[int, float]] = {}
    for job in jobs:
        if record := records.get(job.path):
            by_seed = measured.setdefault(job.row, {})
            by_seed[job.seed] = by_seed.get(job.seed, 0) + record.get("minutes", 0)
            key = (job.seed, json.dumps(record.get("training")))
            trained.setdefault(job.row, {})[key] = record.get("training_minutes", 0)
    return {
        row: RunMinutes(sum(trained[row].values()) / len(by_seed), sum(by_seed.values()) / len(by_seed))
        for row, by_seed in measured.items()
    }


def minutes_per_training(jobs: Sequence[MeasurementJob], records: Mapping[Path, dict[str, Any]]) -> list[float]:
    """Return the minutes of each training that was measured, once."""
    measured = [records[job.path] for job in jobs if job.path in records]
    minutes = {json.dumps(r["training"]): r.get("training_minutes", 0.0) for r in measured if r["training"]}
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


def evaluations(jobs: Sequence[MeasurementJob], out: Path) -> dict[str, list[str]]:
    """Return the evaluation commands of each row, each once."""
    result: dict[str, dict[str, None]] = {}
    for job in jobs:
        if job.evaluation_args:
            result.setdefault(job.row, {})[relative_text(job.evaluation_args, out)] = None
    return {row: list(commands) for row, commands in result.items()}


def relative_text(text: str, out: Path) -> str:
    """Return a text with paths below `out` written as paths below the default --out, so that pages do not depend on it."""
    for name in ("trained", "measured"):
        text = re.sub(rf"(?<![\w/.-]){re.escape(str(out / name))}/", f"tables/{name}/", text)
    return text


def describe_machine(record: Mapping[str, Any]) -> str:
    """Return the device, threads and torch version of a record."""
    env = record["environment"]
    threads = f", {env['threads']} thread{'s' * (env['threads'] != 1)}" if env["device"] == "cpu" else ""
    return f"{env['device']}{threads}, torch {env['torch']}"


def reproduce_command(result: Result) -> str:
    """Return the command that makes the table."""
    seeds = f" --seeds {len(result.seeds)}" if len(result.seeds) > 1 else ""
    return " ".join(["gesso reproduce", result.table.name, *result.settings, f"--scale {result.scale}{seeds}"])


def to_json(result: Result) -> dict[str, Any]:
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
                    "ours": {str(seed): number_to_json(value) for seed, value in cell.seeds.items()},
                    "mean": number_to_json(cell.mean) if cell.seeds else None,
                    "spread": cell.spread,
                    "published": None if cell.published is None else number_to_json(cell.published),
                    "notes": [result.notes[i - 1] for i in cell.notes],
                }
                for column in table.columns
                if (cell := result.cells[row.name, column.name]).seeds or cell.published is not None
            }
            for row in table.rows
        },
        "claims": [
            {
                "text": judgement.text,
                "verdict": judgement.verdict,
                "effect": effect_to_json(judgement.effect) if judgement.seeds else None,
                "bounds": [judgement.low, judgement.high],
                "parts": judgement.parts,
                "seeds": judgement.seeds,
                "published_effect": None if paper is None else effect_to_json(paper),
            }
            for judgement, paper in result.verdicts
        ],
        "checks": [
            {
                "question": check.question, "recommendation": check.recommendation, "table": check.table, "text": text,
                "verdict": verdict,
            }
            for check, text, verdict in result.checks
        ],
        "minutes": {row: {"training": m.training, "measuring": m.measuring} for row, m in result.minutes.items()},
        "environment": list(result.machine_names),
        "protocols": result.protocols,
        "command": reproduce_command(result),
        "trainings": list(result.trainings),
        "evaluations": {row: list(commands) for row, commands in result.evaluations.items()},
        "columns": dict(result.described),
        "runtime": result.runtime,
        "outdated": result.outdated,
    }  # fmt: skip


def effect_to_json(value: float) -> float | str:
    """Return an effect for JSON; it is infinite if one training diverged and the other did not."""
    return value if math.isfinite(value) else str(value)


def number_to_json(value: float) -> float | str:
    """Return a number for JSON."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "diverged"
