"""Making a table: what is not yet there is trained and measured, one job after another; the same command goes on after a stop."""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gesso import files
from gesso.errors import Diverged, UsageError
from gesso.tables import measures
from gesso.tables.plan import Job, Trained
from gesso.tables.table import DIVERGED, Values
from gesso.train.start import start

Say = Callable[[str], None]


def make(todo: Sequence[Job], console: Console, say: Say) -> Iterator[Job]:
    """Train and measure what is not there; yields each job when its numbers are. What a training shows goes to `console`."""
    for i, job in enumerate(todo, 1):
        if not job.path.is_file():
            say(f"{i} of {len(todo)}: {job.row}, {', '.join(job.part.columns)}, seed {job.seed}")
            started = time.monotonic()
            try:
                for one in job.trains:
                    train(one, console, say)
                result = measures.FOUND[job.part.by](job)
            except Diverged as error:
                result = {"diverged": str(error).splitlines()[0]}
            training = [step.command for one in job.trains for step in one.chain()]
            record = {
                "by": job.part.by,
                "row": job.row,
                "seed": job.seed,
                "training": training,
                "evaluation": job.evaluation,
            }
            files.write_json(job.path, {**record, **result, "minutes": round((time.monotonic() - started) / 60, 2)})
        yield job


def train(one: Trained, console: Console, say: Say) -> None:
    """Train it and what it starts from, where that is not done. Raises Diverged where it diverges, or did before."""
    for step in one.chain():
        if finished(step):
            continue
        diverged = step.folder / "diverged.txt"
        if diverged.is_file():
            raise Diverged(diverged.read_text())
        say(step.command)
        try:
            start(step.run, step.folder, True, console, lambda text: None)
        except Diverged as error:
            files.write_text(diverged, str(error))
            raise


def finished(one: Trained) -> bool:
    """Whether a snapshot of the end is there."""
    times = [
        int(match[1])
        for path in one.folder.glob("snapshots/*.safetensors")
        if (match := re.match(r"nimg(\d+)", path.name))
    ]
    return max(times, default=-1) >= one.run.train.total_images


def found(todo: Sequence[Job]) -> dict[int, dict[tuple[str, str], float]]:
    """By seed, the numbers that are there, by (row, column). What needs no training counts for every seed."""
    seeds = sorted({job.seed for job in todo})
    values: dict[int, dict[tuple[str, str], float]] = {seed: {} for seed in seeds}
    for job in todo:
        if not job.path.is_file():
            continue
        record = read(job.path)
        for column, name in job.part.columns.items():
            value = _number(job, record, column, name)
            for seed in (job.seed,) if job.trains else seeds:
                known = values[seed].get((job.row, column))
                values[seed][job.row, column] = value if known is None else _better(job, known, value)
    return values


def _number(job: Job, record: dict[str, Any], column: str, name: str) -> float:
    plain = name.removeprefix("1-")
    if "diverged" in record:
        return DIVERGED
    if plain not in record["found"]:
        raise UsageError(
            f"{job.path} has no {plain!r}, which {column} of {job.row} is; it has {', '.join(record['found'])}"
        )
    value = record["found"][plain]
    if value is None:
        return math.nan
    return value if plain == name else 1 - value


def _better(job: Job, a: float, b: float) -> float:
    """Of two numbers of one cell."""
    assert job.part.best, f"two parts fill {job.row}, {', '.join(job.part.columns)}"
    real = [x for x in (a, b) if not math.isnan(x)]
    return math.nan if not real else min(real) if job.part.best == "least" else max(real)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def complete(values: dict[int, dict[tuple[str, str], float]]) -> list[Values]:
    """Those seeds of which there is anything."""
    return [found for found in values.values() if found]
