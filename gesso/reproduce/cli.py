"""Command `gesso reproduce`: list the tables, reproduce one, or print its cost and requirements."""

import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from gesso import atomic_io
from gesso.config import suggest
from gesso.errors import GessoError, UsageError
from gesso.reproduce import index
from gesso.reproduce.schema import SCALES, Table, Tables, get_table


class ReproduceArgs(NamedTuple):
    """Arguments of `gesso reproduce`. `out` is the folder of trainings, measurements and pages."""

    name: str
    settings: tuple[str, ...] = ()
    scale: str = "tiny"
    rows: tuple[str, ...] = ()
    num_seeds: int = 1
    out: Path = Path("tables")
    dry_run: bool = False
    slurm: Path | None = None

    def command_line(self) -> str:
        """Return the command line that repeats this."""
        rows = [word for row in self.rows for word in ("--rows", row)]
        words = ["gesso", "reproduce", self.name, *self.settings, "--scale", self.scale, *rows]
        return shlex.join([*words, "--num-seeds", str(self.num_seeds), "--out", str(self.out)])


def list_tables(tables: Tables, out: Path) -> list[str]:
    """Return a line for every table, by paper, with its results in `out`."""
    results: dict[str, list[str]] = {}
    for page in index.list_results(out):
        seeds = "" if page["checks"] else f", {pluralize(len(page['seeds']), 'seed')}"
        results.setdefault(page["table"], []).append(f"{index.describe_page(page)} ({page['scale']}{seeds})")
    built = [build() for build in tables.values()]
    width = max(len(table.name) for table in built) + 2
    lines = []
    for paper in dict.fromkeys(table.name.partition("/")[0] for table in built):
        lines += ["", index.PAPER_TITLES.get(paper, paper)]
        for table in built:
            if table.name.partition("/")[0] == paper:
                verdicts = "".join(f"\n  {'':{width}}  {text}" for text in results.get(table.name, ()))
                lines.append(f"  {table.name:{width}}{table.title}  ({describe_table(table)}){verdicts}")
    return [*lines[1:], "", "`gesso reproduce NAME` reproduces one; --dry-run prints its requirements and cost"]


def describe_table(table: Table) -> str:
    """Return the scales of a table and its number of claims."""
    if table.checklist:
        return f"{len(table.checklist)} checks of other tables"
    return f"{', '.join(table.scales)}; {pluralize(len(table.claims), 'claim')}"


def pluralize(n: int, noun: str) -> str:
    """Return a count with its noun, such as "1 seed" or "3 seeds"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def reproduce(args: ReproduceArgs, tables: Tables, console: Console, log: Callable[[str], None]) -> None:
    """Run `gesso reproduce`.

    Args:
        args: the command's arguments; the names "list" and "judge" list all tables and judge stored results again.
        tables: every table by name (papers.TABLES).
        console: for progress bars.
        log: receives each line of output.

    Raises:
        UsageError: for a table, scale, row or setting that does not exist, or a folder that cannot be written.
    """
    if args.name == "list":
        for line in list_tables(tables, args.out):
            log(line)
        return
    if args.name == "judge":
        from gesso.reproduce import page

        log(f"wrote {', '.join(str(path) for path in page.rejudge_all(tables, args.out))}")
        return
    table = check_args(args, tables)
    from gesso.reproduce import dry_run, page, plan, runner

    def plan_rows(rows: Sequence[str], num_seeds: int) -> list[plan.MeasurementJob]:
        return (
            []
            if table.checklist
            else plan.plan_jobs(table, args.scale, range(num_seeds), args.out, rows, args.settings)
        )

    jobs, all_jobs = plan_rows(args.rows, args.num_seeds), plan_rows((), max(args.num_seeds, num_stored_seeds(args)))
    if not jobs and not table.checklist:
        raise UsageError(f"{table.name}: no row of {', '.join(args.rows) or 'it'} is defined at --scale {args.scale}")
    if args.dry_run or args.slurm:
        for line in dry_run.dry_run_lines(table, args, jobs):
            log(line)
        return
    check_writable(args.out)
    try:
        for _ in runner.run_jobs(jobs, console, log, args.command_line()):
            pass
    except GessoError:
        if any(job.path.is_file() for job in all_jobs):
            page.write_page(table, args.scale, args.out, all_jobs, args.settings)
        raise
    pages = page.write_page(table, args.scale, args.out, all_jobs, args.settings)
    log(f"wrote {', '.join(str(path) for path in pages)}")


def num_stored_seeds(args: ReproduceArgs) -> int:
    """Return the number of seeds of the stored page, all of which a new page shows."""
    same = [page for page in index.list_results(args.out) if (page["table"], page["scale"]) == (args.name, args.scale)]
    return max((len(page["seeds"]) for page in same if page["settings"] == list(args.settings)), default=0)


def check_args(args: ReproduceArgs, tables: Tables) -> Table:
    """Return the table. Raises UsageError for wrong arguments, before torch is imported."""
    table = get_table(tables, args.name)
    if args.num_seeds < 1:
        raise UsageError(f"--num-seeds {args.num_seeds}: must be at least 1, such as --num-seeds 3")
    if args.scale not in SCALES:
        raise UsageError(f"--scale {args.scale}: {suggest(args.scale, list(SCALES))}")
    if args.slurm and args.slurm.exists() and not args.slurm.is_dir():
        raise UsageError(
            f"--slurm {args.slurm} is a file: name a folder to write train.sh, measure.sh and submit.sh into"
        )
    if table.checklist and (args.rows or args.settings or args.dry_run or args.slurm):
        raise UsageError(
            f"{table.name} only collects the verdicts of other tables; run gesso reproduce {table.name} without rows, "
            "settings, --dry-run or --slurm"
        )
    return table


def check_writable(out: Path) -> None:
    """Raise RunError if pages cannot be written to `out`."""
    with atomic_io.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    index.index_path(out)
