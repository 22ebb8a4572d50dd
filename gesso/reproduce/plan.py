"""Turn a table into jobs: its trainings and measurements, with their folders and commands. Tables share equal jobs.

OUT/runs/RECIPE-KEY/         run folder of a training, shared by all rows with the same training
OUT/measurements/KEY.json    record of a measurement, shared by all rows with the same measurement
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gesso import config, recipes
from gesso.config import RunConfig
from gesso.config.addresses import confirm_addresses
from gesso.errors import UsageError
from gesso.recipes import data_requirements
from gesso.reproduce.schema import (
    SINGLE_SEED_METHODS,
    UNTRAINED_METHODS,
    Cell,
    ColumnGroup,
    Measurement,
    Scale,
    Table,
    Training,
)

NON_TRAINING_SETTINGS = (
    "sample.",
    "eval.",
    "monitor.",
    "recipe",
    "environment",
    "init.source",
    "train.device",
    "train.num_threads",
    "train.sharding",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.rank_timeout_s",
    "train.keep_checkpoints",
    "ema.device",
)
"""Prefixes of the settings that do not change the trained weights."""


class TrainingJob(NamedTuple):
    """One training at one seed.

    Attributes:
        run: configuration before the data set is opened.
        folder: run folder.
        key: fingerprint of all settings that change the weights.
        command: command that repeats the training.
        parent: the training whose final weights it starts from.
    """

    run: RunConfig
    folder: Path
    key: str
    command: str
    parent: "TrainingJob | None" = None

    def lineage(self) -> Iterator["TrainingJob"]:
        """Yield the trainings that this one starts from, oldest first, and this one last."""
        if self.parent:
            yield from self.parent.lineage()
        yield self


class MeasurementJob(NamedTuple):
    """One measurement: a row and column group at one seed. `path` is its record."""

    row: str
    group: ColumnGroup
    seed: int
    training: TrainingJob | None
    guide: TrainingJob | None
    settings: tuple[str, ...]
    path: Path

    @property
    def trainings(self) -> tuple[TrainingJob, ...]:
        """Trainings that the measurement needs."""
        if self.group.method in UNTRAINED_METHODS:
            return ()
        return tuple(training for training in (self.training, self.guide) if training)

    @property
    def single_seed(self) -> bool:
        """True if one measurement is valid for every seed."""
        return self.training is None or self.group.method in SINGLE_SEED_METHODS

    @property
    def params(self) -> dict[str, str]:
        """Parameters of the measurement method: the settings without a block, such as t=0.5."""
        pairs = (setting.partition("=") for setting in self.settings)
        return {name: value for name, _, value in pairs if "." not in name}

    @property
    def overrides(self) -> list[str]:
        """Run settings of the measurement, such as sample.guidance=2."""
        return [setting for setting in self.settings if "." in setting.partition("=")[0]]

    @property
    def evaluate_command(self) -> str:
        """Command `gesso evaluate` that repeats the measurement; empty if there is none."""
        if self.training is None or self.group.method != "metrics":
            return ""
        protocol = f"--protocol {self.group.protocol}" if self.group.protocol else ""
        parts = ["gesso evaluate", shlex.quote(str(self.training.folder)), protocol, shlex.join(self.settings)]
        return " ".join(filter(None, parts))


def get_scale(table: Table, scale: str) -> Scale:
    """Return one scale of a table. Raises UsageError if the table is not defined at it."""
    if scale not in table.scales:
        raise UsageError(f"{table.name} is not defined at --scale {scale}: use --scale {' or '.join(table.scales)}")
    return table.scales[scale]


def plan_jobs(
    table: Table, scale: str, seeds: Sequence[int], out: Path, rows: Sequence[str] = (), overrides: Sequence[str] = ()
) -> list[MeasurementJob]:
    """Return the measurements of a table; those that do not depend on a training appear once, for the first seed.

    Args:
        table: the table.
        scale: "tiny", "small" or "paper".
        seeds: training seeds.
        out: folder for trainings and records.
        rows: names of the rows to measure; empty for all.
        overrides: settings added to every training.

    Raises:
        UsageError: for an unknown row or scale, or wrong settings.
    """
    groups, names = get_scale(table, scale).groups, [row.name for row in table.rows]
    for name in rows:
        if name not in names:
            raise UsageError(f"{table.name} has no row {name!r}; {config.suggest(name, names)}")
    selected = [name for name in names if name in (rows or names)]
    return [
        _plan_job(name, group, group.rows[name], seed, out, tuple(overrides))
        for seed in seeds
        for group in groups
        for name in selected
        if name in group.rows
        and (seed == seeds[0] or (group.rows[name].training and group.method not in SINGLE_SEED_METHODS))
    ]


def _plan_job(
    row: str, group: ColumnGroup, measurement: Measurement, seed: int, out: Path, overrides: tuple[str, ...]
) -> MeasurementJob:
    training = plan_training(measurement.training, seed, out, overrides) if measurement.training else None
    guide = plan_training(measurement.guide, seed, out, overrides) if measurement.guide else None
    settings = (*group.settings, *measurement.settings, *((f"sample.guide_run={guide.folder}",) if guide else ()))
    identity = [
        group.method,
        group.protocol,
        training and training.key,
        guide and guide.key,
        *group.settings,
        *measurement.settings,
    ]
    path = out / "measurements" / f"{_fingerprint(identity)}.json"
    return MeasurementJob(row, group, seed, training, guide, settings, path)


def plan_training(training: Training, seed: int, out: Path, overrides: tuple[str, ...] = ()) -> TrainingJob:
    """Return the folder, configuration and command of a training. Raises UsageError for wrong settings."""
    parent = plan_training(training.parent, seed, out, overrides) if training.parent else None
    settings = [*training.settings, *overrides, f"train.seed={seed}", *((f"init={parent.folder}",) if parent else ())]
    run, _ = recipes.resolve(training.recipe, settings)
    if not run.data.source:
        settings.append(f"data.source={data_requirements.data_requirement(run).folder}")
        run, _ = recipes.resolve(training.recipe, settings)
    confirm_addresses(run, settings, False)
    identity = {k: value for k, value in config.flatten(run).items() if not k.startswith(NON_TRAINING_SETTINGS)}
    key = _fingerprint([identity, parent and parent.key])
    folder = out / "runs" / f"{training.recipe.rpartition(':')[2].replace('/', '-')}-{key}"
    command = f"gesso train {training.recipe} {shlex.join(settings)} --out {shlex.quote(str(folder))}"
    return TrainingJob(run, folder, key, command, parent)


def unique_trainings(jobs: Sequence[MeasurementJob]) -> list[TrainingJob]:
    """Return the trainings that the jobs need, each once, parents before children."""
    result: dict[str, TrainingJob] = {}
    for job in jobs:
        for training in job.trainings:
            for step in training.lineage():
                result.setdefault(step.key, step)
    return list(result.values())


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def cells_without_training(table: Table, scale: str) -> set[Cell]:
    """Return the cells that do not depend on a training, for which one seed is enough."""
    groups = table.scales[scale].groups if scale in table.scales else ()
    return {
        (row, column)
        for group in groups
        for row, measurement in group.rows.items()
        if group.method in SINGLE_SEED_METHODS or not measurement.training
        for column in group.columns
    }
