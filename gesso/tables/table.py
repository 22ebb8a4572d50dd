"""What a table or figure of a paper is: rows and columns with the published numbers, how each cell is made at each scale,
and the claims that it is there to support. Data only; no torch here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Settings = tuple[str, ...]
"""a.b=c, as a user types them"""
Cell = tuple[str, str]
"""row, column"""
Values = Mapping[Cell, float]
"""the numbers of one seed"""
DIVERGED = math.inf
"""in the place of a number where a training diverged"""
SCALES = ("tiny", "small", "paper")
"""two CPU cores and minutes a row; one GPU and an hour a row; as published"""

By = Literal["scores", "counts", "growth", "tensors", "gradients", "attention", "noise_levels", "responses", "reconstruction",
             "step_sizes", "pictures"]  # fmt: skip
"""how numbers are found (measures.py): scores of samples, counts of a network, magnitudes that training logged, ..."""
UNTRAINED: tuple[By, ...] = ("counts", "noise_levels", "responses", "reconstruction", "step_sizes")
"""those of which a training's settings are enough, or nothing is needed at all"""
ONCE: tuple[By, ...] = (*UNTRAINED, "pictures")
"""those that one seed is enough for"""


class Column(NamedTuple):
    """lower: smaller numbers are better; None: neither."""

    name: str
    lower: bool | None = True


class Row(NamedTuple):
    """published: the paper's numbers by column, DIVERGED where a training diverged; x: of a point of a curve."""

    name: str
    published: Mapping[str, float] = {}
    x: float | None = None


class Training(NamedTuple):
    """What is trained: a recipe with settings laid over it; from the weights of another training (init=) where it is `after` one."""

    recipe: str
    settings: Settings = ()
    after: "Training | None" = None


class How(NamedTuple):
    """How the numbers of a row are found: on what training, by what settings of sample.* and eval.*; guide: another training
    that guides the samples (sample.guide). Without a training, from `measure` alone."""

    training: Training | None = None
    measure: Settings = ()
    guide: Training | None = None


class Part(NamedTuple):
    """Columns of a table that are measured in one way. columns: by column what stands for it among the numbers found, 1-NAME:
    what is left to 1, of a share that holds. best: where several parts fill a cell, which of their numbers counts."""

    columns: Mapping[str, str]
    rows: Mapping[str, How]
    by: By = "scores"
    measure: Settings = ()
    protocol: str | None = None
    best: Literal["least", "most"] | None = None


class Scale(NamedTuple):
    """How a table is made at one scale. cost: of a row, in words."""

    parts: tuple[Part, ...]
    cost: str
    notes: str = ""


class Claim(NamedTuple):
    """A claim of the paper that the table tests. tests: an expression over the numbers of one seed (claims.py)."""

    text: str
    tests: Callable[[Any], Any]


class Check(NamedTuple):
    """A question of a checklist: what the paper recommends, and by which claim (its place) of which table we judge that."""

    question: str
    recommendation: str
    table: str
    claim: int = 0


class Table(NamedTuple):
    """name as typed: berrada/2a; source: where in the paper; x: the title of the axis of a figure, whose columns are curves
    over the rows' x; of rows without one over the column of that name; checks: of a checklist, which has neither columns nor
    parts."""

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

    def lower(self, column: str) -> bool:
        """Whether smaller is better."""
        return next(c for c in self.columns if c.name == column).lower is not False

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def published(self) -> dict[Cell, float]:
        return {(row.name, column): value for row in self.rows for column, value in row.published.items()}

    def curve(self, values: Values, column: str) -> Iterator[tuple[float, float]]:
        """(x, number) of a column, in the order of the rows."""
        for row in self.rows if column != self.x else ():
            x = values.get((row.name, self.x)) if row.x is None else row.x
            if x is not None and (row.name, column) in values:
                yield x, values[row.name, column]
