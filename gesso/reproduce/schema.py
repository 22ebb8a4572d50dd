"""Schema of a table or figure: rows, columns, published numbers, measurements of the cells at each scale, and claims.

Data only; this module does not import torch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from gesso.config import suggest
from gesso.errors import UsageError

if TYPE_CHECKING:
    from gesso.reproduce.claims import Statement, TableValues

Settings = tuple[str, ...]
"""Settings such as "optim.lr=1e-3", as a user types them."""
Cell = tuple[str, str]
"""Row and column name."""
Values = Mapping[Cell, float]
"""Numbers of one seed."""
DIVERGED = math.inf
"""Number of a training that diverged."""
SCALES = ("tiny", "small", "paper")
"""Scales of a table: two CPU cores and minutes per row; one GPU and an hour per row; as published."""

Method = Literal[
    "metrics",
    "counts",
    "growth",
    "tensors",
    "gradients",
    "attention",
    "noise_levels",
    "responses",
    "reconstruction",
    "step_sizes",
    "sample_grid",
]
"""Measurement method (measurements.py): metrics of samples, counts of a network, logged magnitudes, ..."""
UNTRAINED_METHODS: tuple[Method, ...] = ("counts", "noise_levels", "responses", "reconstruction", "step_sizes")
"""Methods that need at most the settings of a training, not its weights."""
SINGLE_SEED_METHODS: tuple[Method, ...] = (*UNTRAINED_METHODS, "sample_grid")
"""Methods for which one seed is enough."""


class Column(NamedTuple):
    """Column of a table. lower_is_better is None if neither direction is better."""

    name: str
    lower_is_better: bool | None = True


class Row(NamedTuple):
    """Row of a table.

    Attributes:
        name: name of the row.
        published: the paper's numbers by column; DIVERGED if a training diverged.
        x: position on the x axis of a figure.
    """

    name: str
    published: Mapping[str, float] = {}
    x: float | None = None


class Training(NamedTuple):
    """A recipe with overrides. `parent` is the training whose final weights it starts from (init=)."""

    recipe: str
    settings: Settings = ()
    parent: "Training | None" = None


class Measurement(NamedTuple):
    """Measurement of a row.

    Attributes:
        training: the training to measure; None if `settings` are enough.
        settings: overrides of sample.* and eval.*, and parameters of the method.
        guide: another training that guides the samples (sample.guide_run).
    """

    training: Training | None = None
    settings: Settings = ()
    guide: Training | None = None


class ColumnGroup(NamedTuple):
    """Columns of a table that are measured in one way.

    Attributes:
        columns: name of the measured value by column; "1-NAME" is one minus the value.
        rows: how each row is measured.
        method: the measurement method.
        settings: overrides for all rows.
        protocol: evaluation protocol.
        select: the number that counts if several groups measure the same cell.
    """

    columns: Mapping[str, str]
    rows: Mapping[str, Measurement]
    method: Method = "metrics"
    settings: Settings = ()
    protocol: str | None = None
    select: Literal["min", "max"] | None = None


class Scale(NamedTuple):
    """Measurements of a table at one scale. `cost` is the cost of a row, as text."""

    groups: tuple[ColumnGroup, ...]
    cost: str
    notes: str = ""


class Claim(NamedTuple):
    """A claim of the paper: its text, and an expression over the numbers of a table (claims.py)."""

    text: str
    holds: "Callable[[TableValues], Statement]"


class ChecklistItem(NamedTuple):
    """A question of a checklist, the paper's recommendation, and the table and claim (index) that judge it."""

    question: str
    recommendation: str
    table: str
    claim: int = 0


class Table(NamedTuple):
    """A table or figure.

    Attributes:
        name: name on the command line, such as berrada/2a.
        title: title of the page.
        source: position in the paper.
        columns: columns of the table, or curves of a figure.
        rows: rows of the table, or points of a figure.
        scales: how the table is measured, by scale.
        claims: claims of the paper.
        notes: text below the table.
        x_axis: title of the x axis of a figure, which plots columns over Row.x, or over the column named `x_axis`.
        checklist: items of a checklist, which has no columns.
    """

    name: str
    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...] = ()
    notes: str = ""
    x_axis: str = ""
    checklist: tuple[ChecklistItem, ...] = ()

    def is_lower_better(self, column: str) -> bool:
        """Return True if smaller numbers of a column are better."""
        return next(c for c in self.columns if c.name == column).lower_is_better is not False

    def published(self) -> dict[Cell, float]:
        """Return the published numbers by cell."""
        return {(row.name, column): value for row in self.rows for column, value in row.published.items()}

    def curve(self, values: Values, column: str) -> Iterator[tuple[float, float]]:
        """Yield (x, number) of a column, in the order of the rows."""
        for row in self.rows if column != self.x_axis else ():
            x = values.get((row.name, self.x_axis)) if row.x is None else row.x
            if x is not None and (row.name, column) in values:
                yield x, values[row.name, column]


Tables = Mapping[str, Callable[[], Table]]
"""Functions that build tables, by table name."""


def get_table(tables: Tables, name: str) -> Table:
    """Return a table by name. Raises UsageError, with the nearest names, if there is none."""
    if name not in tables:
        raise UsageError(
            f"there is no table {name!r}; {suggest(name, list(tables))} (gesso reproduce list shows all tables)"
        )
    return tables[name]()
