"""`gesso table`: the list of tables, a table made and written, or what making it would take."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from gesso.tables import TABLES, table_of


class Asked(NamedTuple):
    """As the user says it. where: folder of trainings, numbers and pages."""

    name: str
    settings: tuple[str, ...] = ()
    scale: str = "tiny"
    rows: tuple[str, ...] = ()
    seeds: int = 1
    where: Path = Path("tables")
    dry_run: bool = False
    slurm: Path | None = None


def listed() -> list[str]:
    """A line for every table."""
    lines = []
    for name, make in TABLES.items():
        table = make()
        lines.append(f"{name:16}{table.title}  ({', '.join(table.scales)})")
    return [*lines, "", "gesso table NAME --scale tiny makes one; --dry-run says what that takes"]


def command(asked: Asked, console: Console, say: Callable[[str], None]) -> None:
    """Raises UsageError for a table, scale, row or setting that there is not."""
    if asked.name == "list":
        for line in listed():
            say(line)
        return
    from gesso.tables import dry, make, page, plan

    table = table_of(asked.name)
    todo = plan.jobs(table, asked.scale, range(asked.seeds), asked.where, asked.rows, asked.settings)
    if asked.dry_run or asked.slurm:
        for line in dry.lines(table, asked, todo):
            say(line)
        return
    for _ in make.make(todo, console, say):
        pass
    for path in page.write(table, asked.scale, asked.where, todo):
        say(f"wrote {path}")
