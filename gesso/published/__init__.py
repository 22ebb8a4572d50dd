"""Numbers that papers publish, as TOML files, and their reader. They are read by recipes, `gesso models` and tables."""

import functools
import tomllib
from importlib import resources
from typing import Any, Literal

from gesso.errors import UsageError

Paper = Literal["berrada2024", "edm2"]


@functools.cache
def read_paper(paper: Paper) -> dict[str, Any]:
    """Return the content of the TOML file of a paper."""
    return tomllib.loads((resources.files("gesso.published") / f"{paper}.toml").read_text(encoding="utf-8"))


def read_table(paper: Paper, name: str) -> dict[str, dict[str, float]]:
    """Return the numbers of a table by row and column; cells without a number are left out, inf is a diverged training.

    Raises:
        UsageError: if the file has no such table, or a row has not one entry for each column.
    """
    table = read_paper(paper).get(name)
    if not isinstance(table, dict):
        raise UsageError(f"gesso/published/{paper}.toml has no table [{name}]")
    for row, numbers in table["rows"].items():
        if len(numbers) != len(table["columns"]):
            raise UsageError(
                f"gesso/published/{paper}.toml, [{name}], row {row!r}: {len(numbers)} numbers for "
                f'{len(table["columns"])} columns; write "-" where the paper has no number'
            )
    return {
        row: {column: value for column, value in zip(table["columns"], numbers, strict=True) if value != "-"}
        for row, numbers in table["rows"].items()
    }
