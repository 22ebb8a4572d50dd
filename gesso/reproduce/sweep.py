"""Command `gesso sweep`: train a recipe at every point of a grid of settings, and compare one metric at equal budget.

OUT/runs/, OUT/measurements/    as those of `gesso reproduce`, which shares equal trainings
OUT/sweep-NAME.md, .json        the page

Its training seeds begin at FIRST_SEED, so that the seeds of a table that uses the chosen settings are fresh.
"""

import itertools
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from gesso import atomic_io
from gesso.config import suggest
from gesso.errors import UsageError
from gesso.reproduce.schema import Column, ColumnGroup, Measurement, Row, Scale, Table, Training

FIRST_SEED = 100
SCALE = "tiny"


class SweepArgs(NamedTuple):
    """Arguments of `gesso sweep`.

    axes: settings with several values, such as "optim.lr=1e-3,2e-3"; values that contain commas are separated by "|".
    settings: settings of every training and its evaluation. metric: one value of `gesso evaluate`, such as loss or fid.
    """

    recipe: str
    axes: tuple[str, ...]
    settings: tuple[str, ...] = ()
    metric: str = "loss"
    num_seeds: int = 1
    out: Path = Path("sweeps")
    name: str | None = None

    def command_line(self) -> str:
        """Return the command line that repeats this."""
        axes = [word for axis in self.axes for word in ("--over", axis)]
        name = ["--name", self.name] if self.name else []
        words = ["gesso", "sweep", self.recipe, *axes, *self.settings, "--metric", self.metric]
        return shlex.join([*words, "--num-seeds", str(self.num_seeds), *name, "--out", str(self.out)])


class SweepPoint(NamedTuple):
    """One point of the grid. values: the metric by seed; math.inf where the training diverged."""

    settings: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.values)


def parse_axis(text: str) -> list[str]:
    """Return the settings of one axis. Raises UsageError unless it is a.b=VALUE,VALUE with distinct values."""
    name, equals, values = text.partition("=")
    options = [value.strip() for value in values.split("|" if "|" in values else ",")]
    if not equals or "." not in name or len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise UsageError(f"--over {text}: write a setting with two or more values, such as --over optim.lr=1e-3,2e-3")
    return [f"{name}={value}" for value in options]


def build_table(args: SweepArgs) -> Table:
    """Return the sweep as a table with a row per point of the grid."""
    from gesso.evaluation.metrics import METRIC_OF_VALUE

    if not args.axes:
        raise UsageError("which settings? For example: gesso sweep digits --over optim.lr=1e-3,2e-3,4e-3")
    if args.num_seeds < 1:
        raise UsageError(f"--num-seeds {args.num_seeds}: must be at least 1")
    training_settings = tuple(s for s in args.settings if not s.startswith(("eval.", "sample.")))
    evaluation_settings = tuple(s for s in args.settings if s.startswith(("eval.", "sample.")))
    points = list(itertools.product(*map(parse_axis, args.axes)))
    rows = {" ".join(p): Measurement(Training(args.recipe, (*training_settings, *p))) for p in points}
    if args.metric not in METRIC_OF_VALUE:
        raise UsageError(f"--metric {args.metric}: no such value; {suggest(args.metric, list(METRIC_OF_VALUE))}")
    metric = METRIC_OF_VALUE[args.metric]
    group = ColumnGroup(
        {args.metric: args.metric}, rows, settings=(f"eval.metrics={metric.name}", *evaluation_settings)
    )
    return Table(
        name=f"sweep/{args.name or args.recipe}",
        title=f"Sweep of {args.recipe}",
        source="gesso",
        columns=(Column(args.metric, metric.lower_is_better),),
        rows=tuple(map(Row, rows)),
        scales={SCALE: Scale((group,), "")},
    )


def sweep(args: SweepArgs, console: Console, log: Callable[[str], None]) -> list[SweepPoint]:
    """Run the sweep, or what is missing of it, and write its page.

    Args:
        args: The command's arguments.
        console: For the progress of trainings.
        log: Receives each line of output.

    Returns:
        The points of the grid, best first.

    Raises:
        UsageError: For a recipe, setting or metric that does not exist.
        StoppedError: On SIGINT, SIGUSR1 and SIGTERM; the same command resumes.
    """
    from gesso.reproduce import plan, runner

    table = build_table(args)
    jobs = plan.plan_jobs(table, SCALE, range(FIRST_SEED, FIRST_SEED + args.num_seeds), args.out)
    for _ in runner.run_jobs(jobs, console, log, args.command_line()):
        pass
    by_seed = runner.collect_values(jobs)
    column = table.columns[0]
    points = [
        SweepPoint(tuple(row.name.split(" ")), tuple(values[row.name, column.name] for values in by_seed.values()))
        for row in table.rows
    ]
    points.sort(key=lambda point: point.mean if column.lower_is_better else -point.mean)
    minutes = sum(runner.training_minutes(step) for step in plan.unique_trainings(jobs))
    name = f"sweep-{(args.name or args.recipe).replace('/', '-')}"
    edge = edge_note(args.axes, points[0])
    with atomic_io.disk_errors(args.out):
        atomic_io.write_json(args.out / f"{name}.json", to_json(args, points, minutes, edge))
        atomic_io.write_text(args.out / f"{name}.md", to_markdown(args, points, minutes, edge))
    log(f"best: {' '.join(points[0].settings)}, {args.metric} {format_value(points[0].mean)}")
    if edge:
        log(edge)
    log(f"wrote {args.out / name}.md")
    return points


def edge_note(axes: Sequence[str], best: SweepPoint) -> str:
    """Return a note if the best value of a numeric axis is its smallest or largest."""
    notes = []
    for axis, setting in zip(axes, best.settings, strict=True):
        options = parse_axis(axis)
        if setting in (options[0], options[-1]) and len(options) > 2:
            notes.append(f"{setting} is at the edge of its range: extend it to be sure of the optimum")
    return "; ".join(notes)


def format_value(value: float) -> str:
    """Return a value with five significant digits, or "diverged"."""
    return f"{value:.5g}" if math.isfinite(value) else "diverged"


def to_json(args: SweepArgs, points: Sequence[SweepPoint], minutes: float, note: str) -> dict[str, Any]:
    """Return the page as data; a diverged training has the value null."""
    return {
        "recipe": args.recipe,
        "command": args.command_line(),
        "metric": args.metric,
        "seeds": list(range(FIRST_SEED, FIRST_SEED + args.num_seeds)),
        "points": [
            {"settings": p.settings, "values": [v if math.isfinite(v) else None for v in p.values]} for p in points
        ],
        "training_minutes": round(minutes, 1),
        "note": note,
    }


def to_markdown(args: SweepArgs, points: Sequence[SweepPoint], minutes: float, note: str) -> str:
    """Return the page as Markdown, best point first."""
    lines = [f"# Sweep of {args.recipe}", "", f"| settings | {args.metric} | seeds |", "|---|---|---|"]
    for point in points:
        each = ", ".join(map(format_value, point.values))
        lines.append(f"| `{' '.join(point.settings)}` | {format_value(point.mean)} | {each} |")
    lines += ["", *([note, ""] if note else [])]
    return "\n".join([*lines, f"{minutes:.1f} minutes of training.", "", "```", args.command_line(), "```", ""])
