"""`gesso table`: the list of tables, a table made and written, or what making it would take."""

import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from gesso import files
from gesso.config import nearest
from gesso.errors import GessoError, UsageError
from gesso.tables import TABLES, index, table_of
from gesso.tables.table import SCALES, Table

PAPERS = {
    "berrada": "Berrada et al. 2024, On Improved Conditioning Mechanisms and Pre-training Strategies for Diffusion Models",
    "edm2": "Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models",
    "own": "In neither paper",
}


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

    def typed(self) -> str:
        """The command, as it would be typed again."""
        rows = [word for row in self.rows for word in ("--rows", row)]
        words = ["gesso", "table", self.name, *self.settings, "--scale", self.scale, *rows, "--seeds", str(self.seeds)]
        return shlex.join([*words, "--out", str(self.where)])


def listed(where: Path) -> list[str]:
    """A line for every table, by paper, with what is made of it in `where`."""
    made: dict[str, list[str]] = {}
    for one in index.made(where):
        seeds = "" if one["checks"] else f", {many(len(one['seeds']), 'seed')}"
        made.setdefault(one["table"], []).append(f"{index.counted(one)} ({one['scale']}{seeds})")
    tables = [make() for make in TABLES.values()]
    width = max(len(table.name) for table in tables) + 2
    lines = []
    for paper in dict.fromkeys(table.name.partition("/")[0] for table in tables):
        lines += ["", PAPERS.get(paper, paper)]
        for table in tables:
            if table.name.partition("/")[0] == paper:
                found = "".join(f"\n  {'':{width}}  {text}" for text in made.get(table.name, ()))
                lines.append(f"  {table.name:{width}}{table.title}  ({about(table)}){found}")
    return [*lines[1:], "", "gesso table NAME --scale tiny makes one; --dry-run says what that takes"]


def about(table: Table) -> str:
    """Scales, and how many claims."""
    if table.checks:
        return f"{len(table.checks)} checks of other tables"
    return f"{', '.join(table.scales)}; {many(len(table.claims), 'claim')}"


def many(n: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{n} {what}{'s' * (n != 1)}"


def command(asked: Asked, console: Console, say: Callable[[str], None]) -> None:
    """Raises UsageError for a table, scale, row, setting or place that there is not."""
    if asked.name == "list":
        for line in listed(asked.where):
            say(line)
        return
    if asked.name == "judge":
        from gesso.tables import page

        say(f"wrote {', '.join(str(path) for path in page.judge_all_again(asked.where))}")
        return
    table = checked(asked)
    from gesso.tables import dry, make, page, plan

    def planned(rows: Sequence[str], seeds: int) -> list[plan.Job]:
        return [] if table.checks else plan.jobs(table, asked.scale, range(seeds), asked.where, rows, asked.settings)

    todo, whole = planned(asked.rows, asked.seeds), planned((), max(asked.seeds, seeds_there(asked)))
    if not todo and not table.checks:
        raise UsageError(f"{table.name}: nothing of {', '.join(asked.rows) or 'it'} is made at --scale {asked.scale}")
    if asked.dry_run or asked.slurm:
        for line in dry.lines(table, asked, todo):
            say(line)
        return
    writable(asked.where)
    try:
        for _ in make.make(todo, console, say, asked.typed()):
            pass
    except GessoError:
        if any(job.path.is_file() for job in whole):
            page.write(table, asked.scale, asked.where, whole, asked.settings)
        raise
    pages = page.write(table, asked.scale, asked.where, whole, asked.settings)
    say(f"wrote {', '.join(str(path) for path in pages)}")


def seeds_there(asked: Asked) -> int:
    """Of the page that is there: one more row or fewer seeds take none away from it."""
    same = [one for one in index.made(asked.where) if (one["table"], one["scale"]) == (asked.name, asked.scale)]
    return max((len(one["seeds"]) for one in same if one["settings"] == list(asked.settings)), default=0)


def checked(asked: Asked) -> Table:
    """The table. Raises UsageError before anything heavy is loaded."""
    table = table_of(asked.name)
    if asked.seeds < 1:
        raise UsageError(f"--seeds {asked.seeds}: one or more, such as --seeds 3")
    if asked.scale not in SCALES:
        raise UsageError(f"--scale {asked.scale}: {nearest(asked.scale, list(SCALES))}")
    if asked.slurm and asked.slurm.exists() and not asked.slurm.is_dir():
        raise UsageError(
            f"--slurm {asked.slurm} is a file: name a folder to write train.sh, measure.sh and submit.sh into"
        )
    if table.checks and (asked.rows or asked.settings or asked.dry_run or asked.slurm):
        raise UsageError(
            f"{table.name} makes nothing: it collects the verdicts of other tables, gesso table {table.name}"
        )
    return table


def writable(where: Path) -> None:
    """Raise before any work where pages cannot be written."""
    with files.disk_errors(where):
        where.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=where).close()
    index.place(where)
