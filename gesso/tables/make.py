"""Making a table: what is not yet there is trained and measured, one job after another; the same command goes on after a stop."""

import contextlib
import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gesso import config, files
from gesso.errors import Diverged, Stopped, UsageError
from gesso.tables import measures, plan
from gesso.tables.plan import Job, Trained
from gesso.tables.table import DIVERGED
from gesso.train import log
from gesso.train.start import start

POLL = 2.0
"""seconds between looks for what another process makes"""
Say = Callable[[str], None]


def make(todo: Sequence[Job], console: Console, say: Say, again: str = "the same command") -> Iterator[Job]:
    """Train and measure what is not there; yields each job when its numbers are. What a training shows goes to `console`.

    Processes that make the same tables in one folder share the work: what another one is making is left to it, and waited
    for at the end. Raises Stopped on SIGINT, SIGUSR1 and SIGTERM, which says that `again` goes on.
    """
    left, waiting = list(enumerate(todo, 1)), False
    try:
        while left:
            busy = []
            for i, job in left:
                if job.path.is_file() or made(job, f"{i} of {len(todo)}", console, say):
                    yield job
                else:
                    busy.append((i, job))
            if len(busy) == len(left):
                if not waiting:
                    rest = f" and {len(busy) - 1} more" if len(busy) > 1 else ""
                    say(f"waiting for another process, which makes {busy[0][1].row}, seed {busy[0][1].seed}{rest}")
                waiting = True
                time.sleep(POLL)
            left = busy
    except KeyboardInterrupt:
        raise Stopped(f"interrupted: what is made is kept. Go on with\n  {again}", signal.SIGINT) from None
    except Stopped as error:
        what = str(error).partition(" Go on with")[0]
        raise Stopped(f"{what} Go on with\n  {again}", error.exit_code - 128) from None


def made(job: Job, place: str, console: Console, say: Say) -> bool:
    """Train and measure one; False, with nothing done, where another process is at it. place: of how many it is."""
    steps = plan.trainings([job])
    with contextlib.ExitStack() as held:
        for path in (job.path, *(step.folder for step in steps if not finished(step))):
            if not held.enter_context(files.claimed(path)):
                return False
        if job.path.is_file():
            return True  # written since
        say(f"{place}: {job.row}, {', '.join(job.part.columns)}, seed {job.seed}")
        record: dict[str, Any] = {
            "by": job.part.by,
            "row": job.row,
            "seed": job.seed,
            "training": [step.command for step in steps],
            "evaluation": job.evaluation,
        }
        try:
            for step in steps:
                train(step, console, say)
            started = time.monotonic()
            record |= measures.FOUND[job.part.by](job)
            record["minutes"] = round((time.monotonic() - started) / 60, 4)
        except Diverged as error:
            record["diverged"] = str(error).splitlines()[0]
        record["training_minutes"] = round(sum(minutes(step) for step in steps), 4)
        if job.trained and (job.trained.folder / "run.yaml").is_file():
            record["made_with"] = config.read(job.trained.folder / "run.yaml").made_with
        files.write_json(job.path, record)
    return True


def train(step: Trained, console: Console, say: Say) -> None:
    """Train it where that is not done. Raises Diverged where it diverges, or did before."""
    diverged = step.folder / "diverged.txt"
    if finished(step):
        return
    if diverged.is_file():
        raise Diverged(diverged.read_text())
    say(step.command)
    try:
        start(step.run, step.folder, True, console, lambda text: None)
    except Diverged as error:
        files.write_text(diverged, str(error))
        raise


def minutes(step: Trained) -> float:
    """Of its steps, from its log, whoever trained it and however often it was stopped."""
    path, total, before = step.folder / "log.jsonl", 0.0, 0
    for line in log.read(path) if path.is_file() else ():
        if "images_per_second" in line:
            total += (line["nimg"] - before) / line["images_per_second"]
            before = line["nimg"]
    return total / 60


def finished(one: Trained) -> bool:
    """Whether a snapshot of the end is there."""
    times = [
        int(match[1])
        for path in one.folder.glob("snapshots/*.safetensors")
        if (match := re.match(r"nimg(\d+)", path.name))
    ]
    return max(times, default=-1) >= one.run.train.total_images


def found(todo: Sequence[Job]) -> dict[int, dict[tuple[str, str], float]]:
    """By seed, the numbers that are there, by (row, column). What is found once counts for every seed."""
    seeds = sorted({job.seed for job in todo})
    values: dict[int, dict[tuple[str, str], float]] = {seed: {} for seed in seeds}
    for job in todo:
        if not job.path.is_file():
            continue
        record = read(job.path)
        for column, name in job.part.columns.items():
            value = _number(job, record, column, name)
            for seed in seeds if job.once else (job.seed,):
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
