"""From a table to jobs: which trainings, in what folders, by what commands; each once, whichever tables share it.

WHERE/trained/RECIPE-KEY/    a run folder for all that train the same
WHERE/measured/KEY.json      what was found, for all that measure the same
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gesso import config, recipes
from gesso.config import Run
from gesso.errors import UsageError
from gesso.recipes import needed
from gesso.tables.table import ONCE, UNTRAINED, Cell, How, Part, Scale, Table, Training

MEASURED = ("sample.", "eval.", "watch.", "recipe", "made_with", "init.source", "train.device", "train.threads", "train.sharding",
            "train.micro_batch", "train.recompute", "train.compile", "train.timeout", "train.keep_states", "ema.device")  # fmt: skip
"""settings that do not change what is trained"""


class Trained(NamedTuple):
    """A training at one seed. run: as it is asked for, before its images are opened; key: of all that decides it."""

    run: Run
    folder: Path
    key: str
    command: str
    after: "Trained | None" = None

    def chain(self) -> Iterator["Trained"]:
        """Those that it starts from, in order, and itself."""
        if self.after:
            yield from self.after.chain()
        yield self


class Job(NamedTuple):
    """The numbers of one row, part and seed, and how they are found."""

    row: str
    part: Part
    seed: int
    trained: Trained | None
    guide: Trained | None
    settings: tuple[str, ...]
    path: Path

    @property
    def trains(self) -> tuple[Trained, ...]:
        """What is to be trained for it."""
        return () if self.part.by in UNTRAINED else tuple(one for one in (self.trained, self.guide) if one)

    @property
    def once(self) -> bool:
        """Whether it counts for every seed."""
        return self.trained is None or self.part.by in ONCE

    @property
    def told(self) -> dict[str, str]:
        """Of its settings what a way of measuring is told besides a run's, which have a block: t=0.5."""
        return {name: value for name, _, value in (said.partition("=") for said in self.settings) if "." not in name}

    @property
    def asked(self) -> list[str]:
        """Of its settings those of a run."""
        return [said for said in self.settings if "." in said.partition("=")[0]]

    @property
    def evaluation(self) -> str:
        """As a user would type it."""
        if self.trained is None or self.part.by != "scores":
            return ""
        protocol = f"--protocol {self.part.protocol}" if self.part.protocol else ""
        return " ".join(
            filter(None, ["gesso evaluate", shlex.quote(str(self.trained.folder)), protocol, shlex.join(self.settings)])
        )


def scale_of(table: Table, name: str) -> Scale:
    """Raises UsageError when the table is not made at that scale."""
    if name not in table.scales:
        raise UsageError(f"{table.name} is made at --scale {' or '.join(table.scales)}, not {name!r}")
    return table.scales[name]


def jobs(
    table: Table, scale: str, seeds: Sequence[int], where: Path, rows: Sequence[str] = (), more: Sequence[str] = ()
) -> list[Job]:
    """What is to be found: all rows (or those named) by seed; what needs no training once. `more` are settings over every training.

    Raises UsageError for a row or scale that there is not, or settings that are wrong.
    """
    parts, known = scale_of(table, scale).parts, [row.name for row in table.rows]
    for name in rows:
        if name not in known:
            raise UsageError(f"{table.name} has no row {name!r}; {config.nearest(name, known)}")
    chosen = [name for name in known if name in (rows or known)]
    return [
        _job(name, part, part.rows[name], seed, where, tuple(more))
        for seed in seeds
        for part in parts
        for name in chosen
        if name in part.rows and (seed == seeds[0] or (part.rows[name].training and part.by not in ONCE))
    ]


def _job(row: str, part: Part, how: How, seed: int, where: Path, more: tuple[str, ...]) -> Job:
    trained = planned(how.training, seed, where, more) if how.training else None
    guide = planned(how.guide, seed, where, more) if how.guide else None
    settings = (*part.measure, *how.measure, *((f"sample.guide={guide.folder}",) if guide else ()))
    decides = [part.by, part.protocol, trained and trained.key, guide and guide.key, *part.measure, *how.measure]
    return Job(row, part, seed, trained, guide, settings, where / "measured" / f"{_key(decides)}.json")


def planned(training: Training, seed: int, where: Path, more: tuple[str, ...] = ()) -> Trained:
    """Where and how it is trained. Raises UsageError for settings that are wrong."""
    after = planned(training.after, seed, where, more) if training.after else None
    said = [*training.settings, *more, f"train.seed={seed}", *((f"init={after.folder}",) if after else ())]
    run, _ = recipes.resolve(training.recipe, said)
    if not run.data.source:
        said.append(f"data.source={needed.cache(run).folder}")
        run, _ = recipes.resolve(training.recipe, said)
    decides = {name: value for name, value in config.flat(run).items() if not name.startswith(MEASURED)}
    key = _key([decides, after and after.key])
    folder = where / "trained" / f"{training.recipe.rpartition(':')[2].replace('/', '-')}-{key}"
    return Trained(
        run, folder, key, f"gesso train {training.recipe} {shlex.join(said)} --out {shlex.quote(str(folder))}", after
    )


def trainings(todo: Sequence[Job]) -> list[Trained]:
    """All that the jobs need, each once, those that others start from first."""
    found: dict[str, Trained] = {}
    for job in todo:
        for one in job.trains:
            for step in one.chain():
                found.setdefault(step.key, step)
    return list(found.values())


def _key(of: object) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:10]


def cells_without_training(table: Table, scale: str) -> set[Cell]:
    """Cells that no training decides, so that one seed is enough for them."""
    parts = table.scales[scale].parts if scale in table.scales else ()
    return {
        (row, column)
        for part in parts
        for row, how in part.rows.items()
        if part.by in ONCE or not how.training
        for column in part.columns
    }
