"""The page of a table, Markdown and HTML."""

from collections.abc import Sequence
from pathlib import Path

from gesso.tables.plan import Job
from gesso.tables.table import Table


def write(table: Table, scale: str, where: Path, todo: Sequence[Job]) -> list[Path]:
    return []
