"""Run the jobs of a table one after another. A stopped command can be resumed."""

import contextlib
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gesso import atomic_io, config
from gesso.errors import DivergenceError, RunError, StoppedError, UsageError
from gesso.reproduce import measurements, plan
from gesso.reproduce.plan import MeasurementJob, TrainingJob
from gesso.reproduce.schema import DIVERGED
from gesso.training import logging
from gesso.training.run_folder import start_training
from gesso.untrusted import read_json_object

POLL_INTERVAL_S = 2.0
"""Seconds between checks for results of another process."""
LogCallback = Callable[[str], None]


def run_jobs(
    jobs: Sequence[MeasurementJob], console: Console, log: LogCallback, resume_command: str = "the same command"
) -> Iterator[MeasurementJob]:
    """Run every job without a record; yield each job when its record exists.

    Processes that use the same folder share the work: a job that another process has locked is skipped, and awaited at
    the end.

    Args:
        jobs: measurements, in order.
        console: for the progress of trainings.
        log: receives a line for each job and training.
        resume_command: the command that the message of an interruption names.

    Raises:
        StoppedError: on SIGINT, SIGUSR1 and SIGTERM. Finished work is stored.
    """
    pending, waiting = list(enumerate(jobs, 1)), False
    try:
        while pending:
            busy = []
            for i, job in pending:
                if job.path.is_file() or run_measurement(job, f"{i} of {len(jobs)}", console, log):
                    yield job
                else:
                    busy.append((i, job))
            if len(busy) == len(pending):
                if not waiting:
                    rest = f" and {len(busy) - 1} more" if len(busy) > 1 else ""
                    log(f"waiting for another process, which runs {busy[0][1].row}, seed {busy[0][1].seed}{rest}")
                waiting = True
                time.sleep(POLL_INTERVAL_S)
            pending = busy
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; finished work is stored. Resume with\n  {resume_command}", signal.SIGINT
        ) from None
    except StoppedError as error:
        reason = str(error).partition(" Go on with")[0].partition(" Resume with")[0]
        raise StoppedError(f"{reason} Resume with\n  {resume_command}", error.exit_code - 128) from None


def run_measurement(job: MeasurementJob, position: str, console: Console, log: LogCallback) -> bool:
    """Train and measure one job. Return False, without doing anything, if another process has locked it.

    position: number of the job for the log, such as "2 of 7".
    """
    steps = plan.unique_trainings([job])
    with contextlib.ExitStack() as locks:
        for path in (job.path, *(step.folder for step in steps if not is_finished(step))):
            if not locks.enter_context(atomic_io.try_lock(path)):
                return False
        if job.path.is_file():
            return True  # written by another process since the first check
        log(f"{position}: {job.row}, {', '.join(job.group.columns)}, seed {job.seed}")
        record: dict[str, Any] = {
            "method": job.group.method,
            "row": job.row,
            "seed": job.seed,
            "training_commands": [step.command for step in steps],
            "evaluate_command": job.evaluate_command,
        }
        try:
            for step in steps:
                run_training(step, console, log)
            started = time.monotonic()
            record |= measurements.MEASUREMENT_METHODS[job.group.method](job)
            record["measurement_minutes"] = round((time.monotonic() - started) / 60, 4)
        except DivergenceError as error:
            record["diverged"] = str(error).splitlines()[0]
        record["training_minutes"] = round(sum(training_minutes(step) for step in steps), 4)
        if job.training and (job.training.folder / "run.yaml").is_file():
            record["environment"] = config.load_config(job.training.folder / "run.yaml").environment
        atomic_io.write_json(job.path, record)
    return True


def run_training(job: TrainingJob, console: Console, log: LogCallback) -> None:
    """Train, or resume, unless the training is finished. Raises DivergenceError if it diverges, or did before."""
    diverged = job.folder / "diverged.txt"
    if is_finished(job):
        return
    if diverged.is_file():
        raise DivergenceError(diverged.read_text())
    log(job.command)
    try:
        start_training(job.run, job.folder, True, console, lambda text: None)
    except DivergenceError as error:
        atomic_io.write_text(diverged, str(error))
        raise


def training_minutes(job: TrainingJob) -> float:
    """Return the minutes spent in training steps, from the log, over all resumes."""
    path, total, before = job.folder / "log.jsonl", 0.0, 0
    for line in logging.read_log(path) if path.is_file() else ():
        if "images_per_second" in line:
            total += (line["nimg"] - before) / line["images_per_second"]
            before = line["nimg"]
    return total / 60


def is_finished(job: TrainingJob) -> bool:
    """Return True if the last snapshot exists."""
    times = [
        int(match[1])
        for path in job.folder.glob("snapshots/*.safetensors")
        if (match := re.match(r"nimg(\d+)", path.name))
    ]
    return max(times, default=-1) >= job.run.train.total_images


def collect_values(jobs: Sequence[MeasurementJob]) -> dict[int, dict[tuple[str, str], float]]:
    """Return the stored numbers by seed and (row, column). A single-seed measurement counts for every seed."""
    seeds = sorted({job.seed for job in jobs})
    values: dict[int, dict[tuple[str, str], float]] = {seed: {} for seed in seeds}
    for job in jobs:
        if not job.path.is_file():
            continue
        record = read_record(job.path)
        for column, name in job.group.columns.items():
            value = _cell_value(job, record, column, name)
            for seed in seeds if job.single_seed else (job.seed,):
                previous = values[seed].get((job.row, column))
                values[seed][job.row, column] = value if previous is None else _choose_best(job, previous, value)
    return values


def _cell_value(job: MeasurementJob, record: dict[str, Any], column: str, name: str) -> float:
    key = name.removeprefix("1-")
    if "diverged" in record:
        return DIVERGED
    if key not in record["values"]:
        raise UsageError(
            f"{job.path} has no value {key!r} for column {column} of row {job.row}; its values are "
            f"{', '.join(record['values'])}. Delete the file to measure again"
        )
    value = record["values"][key]
    if value is None:
        return math.nan
    return value if key == name else 1 - value


def _choose_best(job: MeasurementJob, a: float, b: float) -> float:
    """Return the better of two numbers of one cell."""
    assert job.group.select, f"two column groups fill {job.row}, {', '.join(job.group.columns)}"
    valid = [value for value in (a, b) if not math.isnan(value)]
    return math.nan if not valid else min(valid) if job.group.select == "min" else max(valid)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a measurement."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it, and it is measured again") from None
