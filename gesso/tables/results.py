"""What a table gave: numbers by row, column and seed beside the published ones, marks, verdicts, and how all was made.

NAME-SCALE.json holds it, and the page shows it (page.py).
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso.tables import claims, make, plan
from gesso.tables.claims import Judgement, Verdict
from gesso.tables.index import file_name
from gesso.tables.marks import marked
from gesso.tables.plan import Job
from gesso.tables.table import Cell, Check, Table, Values


class Numbers(NamedTuple):
    """A cell. seeds: its number by seed (inf: diverged, NaN: not finite); once: found without a training, so the same for all."""

    seeds: Mapping[int, float]
    published: float | None = None
    notes: tuple[int, ...] = ()
    once: bool = False

    @property
    def finite(self) -> list[float]:
        return [value for value in self.seeds.values() if math.isfinite(value)]

    @property
    def mean(self) -> float:
        """Over the seeds that did not diverge; inf where all did, NaN where there is none."""
        if self.finite:
            return statistics.mean(self.finite)
        return max(self.seeds.values(), default=math.nan)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.finite) if len(self.finite) > 1 and not self.once else None


class Minutes(NamedTuple):
    """Of a row, the mean over seeds; trainings that rows share count for each of them."""

    training: float
    measuring: float


class Result(NamedTuple):
    """notes: footnotes, counted from 1; verdicts: of each claim, with the effect that the paper's own numbers have; described:
    what each column measures; runtime: how long it took; outdated: why the numbers would differ if made again."""

    table: Table
    scale: str
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    cells: Mapping[Cell, Numbers]
    notes: Sequence[str]
    verdicts: Sequence[tuple[Judgement, float | None]]
    checks: Sequence[tuple[Check, str, str]]
    minutes: Mapping[str, Minutes]
    each_training: Sequence[float]
    protocols: Mapping[str, Mapping[str, Any]]
    machines: Sequence[str]
    trainings: Sequence[str]
    evaluations: Mapping[str, Sequence[str]]
    described: Mapping[str, str] = {}
    runtime: str = ""
    outdated: str = ""


def gathered(table: Table, scale: str, where: Path, todo: Sequence[Job], settings: Sequence[str] = ()) -> Result:
    """Of all jobs that are done. settings: what the user laid over every training."""
    records = {job.path: make.read(job.path) for job in todo if job.path.is_file()}
    values, published = make.found(todo), table.published()
    marks, notes = marked(table, todo, records)
    cells: dict[Cell, Numbers] = {}
    once = {(job.row, column) for job in todo if job.once for column in job.part.columns}
    for row in table.rows:
        for column in table.columns:
            cell = (row.name, column.name)
            seeds = {seed: found[cell] for seed, found in values.items() if cell in found}
            cells[cell] = Numbers(seeds, published.get(cell), marks.get(cell, ()), cell in once)
    machines = Counter(machine(record) for record in records.values() if "made_with" in record)
    return Result(
        table, scale, tuple(values) or (0,), tuple(settings), cells, notes,
        judged(table, values, once),
        [(check, *checked(check, scale, where)) for check in table.checks],
        minutes(todo, records), each_training(todo, records), protocols(todo, records, where), [name for name, _ in machines.most_common()],
        [plain(one.command, where) for one in plan.trainings(todo)], evaluations(todo, where),
    )  # fmt: skip


def restored(table: Table, stored: Mapping[str, Any], where: Path, once: set[Cell]) -> Result:
    """What NAME-SCALE.json holds, with verdicts of today. Rows and columns that the table no longer has are left out."""
    notes: list[str] = []
    cells: dict[Cell, Numbers] = {}
    published, seeds = table.published(), tuple(stored["seeds"])
    values: dict[int, dict[Cell, float]] = {seed: {} for seed in seeds}
    for row in table.rows:
        for column in table.columns:
            cell, entry = (row.name, column.name), stored["rows"].get(row.name, {}).get(column.name, {})
            numbers = {int(seed): _parsed(value) for seed, value in entry.get("ours", {}).items()}
            notes += [note for note in entry.get("notes", ()) if note not in notes]
            marks = tuple(notes.index(note) + 1 for note in entry.get("notes", ()))
            cells[cell] = Numbers(numbers, published.get(cell), marks, cell in once)
            for seed, value in numbers.items():
                values.setdefault(seed, {})[cell] = value
    scale, unmeasured = (
        stored["scale"],
        [c for c in table.columns if not any(cells[r.name, c.name].seeds for r in table.rows)],
    )
    described = dict(stored.get("columns", {}))
    known = {name for names in described for name in names.split("; ")}
    described |= {c.name: "not measured on this page" for c in unmeasured if c.name not in known}
    return Result(
        table, scale, seeds, tuple(stored["settings"]), cells, notes, judged(table, values, once),
        [(check, *checked(check, scale, where)) for check in table.checks],
        {row: Minutes(each["training"], each["measuring"]) for row, each in stored["minutes"].items()}, (),
        stored["protocols"], stored["made_with"], stored["trainings"], stored["evaluations"], described,
        stored.get("runtime", ""), stored.get("outdated", ""),
    )  # fmt: skip


def _parsed(value: float | str) -> float:
    """The inverse of `number`."""
    return {"NaN": math.nan, "diverged": math.inf}[value] if isinstance(value, str) else value


def judged(table: Table, values: Mapping[int, Values], once: set[Cell]) -> list[tuple[Judgement, float | None]]:
    """The verdict on each claim, and the effect that the paper's own numbers have."""
    published = table.published()
    return [(verdict(table, claim, values, once), claims.effect_of(table, claim, published)) for claim in table.claims]


def verdict(table: Table, claim: claims.Claim, values: Mapping[int, Values], once: set[Cell]) -> Judgement:
    """As claims.judge, over numbers that are numbers. A claim that no training decides is an exact check."""
    usable = [{c: v for c, v in numbers.items() if not math.isnan(v)} for numbers in values.values() if numbers]
    exact = [{c: v for c, v in numbers.items() if c in once} for numbers in usable]
    effects = [claims.effect_of(table, claim, numbers) for numbers in exact]
    if effects and None not in effects and effects == [claims.effect_of(table, claim, each) for each in usable]:
        return claims.check(table, claim, exact)
    return claims.judge(table, claim, usable)


def checked(check: Check, scale: str, where: Path) -> tuple[str, str]:
    """What the claim says and its verdict, from the page of its table at the same scale."""
    path = where / f"{file_name(check.table, scale)}.json"
    if not path.is_file():
        return "", Verdict.NOT_MEASURED
    found = make.read(path)["claims"]
    return (
        (found[check.claim]["text"], found[check.claim]["verdict"])
        if check.claim < len(found)
        else ("", Verdict.NOT_MEASURED)
    )


def minutes(todo: Sequence[Job], records: Mapping[Path, dict[str, Any]]) -> dict[str, Minutes]:
    """By row, where it is measured."""
    trained: dict[str, dict[tuple[int, str], float]] = {}
    measured: dict[str, dict[int, float]] = {}
    for job in todo:
        if record := records.get(job.path):
            each = measured.setdefault(job.row, {})
            each[job.seed] = each.get(job.seed, 0) + record.get("minutes", 0)
            key = (job.seed, json.dumps(record.get("training")))
            trained.setdefault(job.row, {})[key] = record.get("training_minutes", 0)
    return {
        row: Minutes(sum(trained[row].values()) / len(each), sum(each.values()) / len(each))
        for row, each in measured.items()
    }


def each_training(todo: Sequence[Job], records: Mapping[Path, dict[str, Any]]) -> list[float]:
    """Minutes of every one that was measured, once."""
    found = [records[job.path] for job in todo if job.path in records]
    return list(
        {json.dumps(one["training"]): one.get("training_minutes", 0.0) for one in found if one["training"]}.values()
    )


def protocols(todo: Sequence[Job], records: Mapping[Path, dict[str, Any]], where: Path) -> dict[str, dict[str, Any]]:
    """How each column was measured: the protocol of its first cell."""
    found: dict[str, dict[str, Any]] = {}
    for job in todo:
        protocol = records.get(job.path, {}).get("protocol")
        for column in job.part.columns:
            if protocol and column not in found:
                found[column] = json.loads(plain(json.dumps(protocol), where))
    return found


def evaluations(todo: Sequence[Job], where: Path) -> dict[str, list[str]]:
    """By row, each command once."""
    found: dict[str, dict[str, None]] = {}
    for job in todo:
        if job.evaluation:
            found.setdefault(job.row, {})[plain(job.evaluation, where)] = None
    return {row: list(commands) for row, commands in found.items()}


def plain(text: str, where: Path) -> str:
    """As under the folder that --out is by default, wherever this one is."""
    for room in ("trained", "measured"):
        text = re.sub(rf"(?<![\w/.-]){re.escape(str(where / room))}/", f"tables/{room}/", text)
    return text


def machine(record: Mapping[str, Any]) -> str:
    made = record["made_with"]
    threads = f", {made['threads']} thread{'s' * (made['threads'] != 1)}" if made["device"] == "cpu" else ""
    return f"{made['device']}{threads}, torch {made['torch']}"


def command(result: Result) -> str:
    """What makes the table."""
    seeds = f" --seeds {len(result.seeds)}" if len(result.seeds) > 1 else ""
    return " ".join(["gesso table", result.table.name, *result.settings, f"--scale {result.scale}{seeds}"])


def as_json(result: Result) -> dict[str, Any]:
    """What NAME-SCALE.json holds: "diverged" and "NaN" in the place of what is no number."""
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
                    "ours": {str(seed): number(value) for seed, value in cell.seeds.items()},
                    "mean": number(cell.mean) if cell.seeds else None,
                    "spread": cell.spread,
                    "published": None if cell.published is None else number(cell.published),
                    "notes": [result.notes[i - 1] for i in cell.notes],
                }
                for column in table.columns
                if (cell := result.cells[row.name, column.name]).seeds or cell.published is not None
            }
            for row in table.rows
        },
        "claims": [
            {
                "text": each.text,
                "verdict": each.verdict,
                "effect": effect(each.effect) if each.seeds else None,
                "bounds": [each.low, each.high],
                "parts": each.parts,
                "seeds": each.seeds,
                "published_effect": None if paper is None else effect(paper),
            }
            for each, paper in result.verdicts
        ],
        "checks": [
            {"question": check.question, "recommendation": check.recommendation, "table": check.table, "text": text, "verdict": verdict}
            for check, text, verdict in result.checks
        ],
        "minutes": {row: {"training": each.training, "measuring": each.measuring} for row, each in result.minutes.items()},
        "made_with": list(result.machines),
        "protocols": result.protocols,
        "command": command(result),
        "trainings": list(result.trainings),
        "evaluations": {row: list(commands) for row, commands in result.evaluations.items()},
        "columns": dict(result.described),
        "runtime": result.runtime,
        "outdated": result.outdated,
    }  # fmt: skip


def effect(value: float) -> float | str:
    """inf where the one diverged and the other did not."""
    return value if math.isfinite(value) else str(value)


def number(value: float) -> float | str:
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "diverged"
