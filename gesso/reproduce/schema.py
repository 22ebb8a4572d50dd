"""Schema of a table or figure: rows, columns, published numbers, how cells are measured at each scale, and claims.

Data only; nothing here imports torch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from gesso.config import suggest
from gesso.errors import UsageError

Settings = tuple[str, ...]
"""Settings such as "optim.lr=1e-3", as a user types them."""
Cell = tuple[str, str]
"""Row and column name."""
Values = Mapping[Cell, float]
"""Numbers of one seed."""
DIVERGED = math.inf
"""Stands for a number if the training diverged."""
SCALES = ("tiny", "small", "paper")
"""Two CPU cores and minutes per row; one GPU and an hour per row; as published."""

Method = Literal["scores", "counts", "growth", "tensors", "gradients", "attention", "noise_levels", "responses", "reconstruction",
             "step_sizes", "pictures"]  # fmt: skip
"""Measurement method (measurements.py): metrics of samples, counts of a network, logged magnitudes, ..."""
UNTRAINED_METHODS: tuple[Method, ...] = ("counts", "noise_levels", "responses", "reconstruction", "step_sizes")
"""Methods that need at most the settings of a training, not its weights."""
SINGLE_SEED_METHODS: tuple[Method, ...] = (*UNTRAINED_METHODS, "pictures")
"""Methods for which one seed is enough."""


class Column(NamedTuple):
    """A column. lower_is_better: None if neither direction is better."""

    name: str
    lower_is_better: bool | None = True


class Row(NamedTuple):
    """A row. published: the paper's numbers by column (DIVERGED if a training diverged); x: position on the axis of a figure."""

    name: str
    published: Mapping[str, float] = {}
    x: float | None = None


class Training(NamedTuple):
    """A recipe with overrides; `parent` is the training whose final weights it starts from (init=)."""

    recipe: str
    settings: Settings = ()
    parent: "Training | None" = None


class Measurement(NamedTuple):
    """Measurement of a row.

    training: the training to measure; None if `settings` are enough. settings: overrides of sample.* and eval.*, and
    parameters of the method. guide: another training that guides the samples (sample.guide_run).
    """

    training: Training | None = None
    settings: Settings = ()
    guide: Training | None = None


class ColumnGroup(NamedTuple):
    """Columns of a table that are measured in one way.

    columns: name of the measured value by column; "1-NAME" is one minus it. best: which number counts if several groups
    fill the same cell.
    """

    columns: Mapping[str, str]
    rows: Mapping[str, Measurement]
    method: Method = "scores"
    settings: Settings = ()
    protocol: str | None = None
    best: Literal["least", "most"] | None = None


class Scale(NamedTuple):
    """Measurements of a table at one scale. cost: cost of a row, in words."""

    groups: tuple[ColumnGroup, ...]
    cost: str
    notes: str = ""


class Claim(NamedTuple):
    """A claim of the paper. tests: an expression over the numbers of one seed (claims.py)."""

    text: str
    tests: Callable[[Any], Any]


class Check(NamedTuple):
    """A question of a checklist: the paper's recommendation and the claim (index) of the table that judges it."""

    question: str
    recommendation: str
    table: str
    claim: int = 0


class Table(NamedTuple):
    """A table or figure.

    name: as typed, such as berrada/2a; source: position in the paper; x: axis title of a figure, whose columns are curves
    over Row.x, or over the column named x for rows without one; checks: of a checklist, which has no columns.
    """

    name: str
    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...] = ()
    notes: str = ""
    x: str = ""
    checks: tuple[Check, ...] = ()

    def is_lower_better(self, column: str) -> bool:
        """Return True if smaller numbers of a column are better."""
        return next(c for c in self.columns if c.name == column).lower_is_better is not False

    def get_row(self, name: str) -> Row:
        """Return a row by name."""
        return next(row for row in self.rows if row.name == name)

    def published(self) -> dict[Cell, float]:
        """Return the published numbers by cell."""
        return {(row.name, column): value for row in self.rows for column, value in row.published.items()}

    def curve(self, values: Values, column: str) -> Iterator[tuple[float, float]]:
        """Yield (x, number) of a column, in the order of the rows."""
        for row in self.rows if column != self.x else ():
            x = values.get((row.name, self.x)) if row.x is None else row.x
            if x is not None and (row.name, column) in values:
                yield x, values[row.name, column]


Tables = Mapping[str, Callable[[], Table]]
"""Functions that build tables, by table name."""


def get_table(tables: Tables, name: str) -> Table:
    """Return a table by name. Raises UsageError, with the nearest names, if there is none."""
    if name not in tables:
        raise UsageError(f"no table {name!r} (gesso reproduce list has them all); {suggest(name, list(tables))}")
    return tables[name]()
