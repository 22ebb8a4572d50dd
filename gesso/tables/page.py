"""The page of a table: NAME-SCALE.md, .html and .json, for a figure its picture."""

import importlib.util
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from gesso import files
from gesso.report.page import document
from gesso.tables import picture, plan, render, results, table_of, words
from gesso.tables.claims import Verdict
from gesso.tables.index import file_name, index, made
from gesso.tables.plan import Job
from gesso.tables.render import Block, Cell, Code, Folded, Grid, Heading, Picture, Terms, Text, Title
from gesso.tables.results import Numbers, Result
from gesso.tables.table import Column, Table

SCALES = {"tiny": "two CPU cores, minutes a row", "small": "one GPU, about an hour a row", "paper": "as published"}
COLOURS = {
    Verdict.REPRODUCED: "#4f7a3a",
    Verdict.EXACT: "#4f7a3a",
    Verdict.CONTRADICTED: "#a33a2a",
    Verdict.FAILED: "#a33a2a",
    Verdict.UNDECIDED: "#a9761a",
    Verdict.TOO_FEW_SEEDS: "#6d7f8c",
    Verdict.NOT_MEASURED: "#a19b8f",
}
NONE = "-"
"""of a cell that is not made at this scale, or not yet"""
LONG = 14
"""rows of a figure that are shown unfolded"""
RULE = (
    "Effect: by how much the claim holds, in the unit of what it compares, with the bounds that decide. Reproduced: all that the "
    "claim says lies above 0 at 95 % (Student's t over paired seeds, one side; the sign test for places of optima and where a "
    "training diverged). Contradicted: the opposite is shown at 95 %. Each is wrong in at most one case of twenty; else the claim "
    "is undecided. An exact check needs no training. See docs/tables.md."
)


def write(table: Table, scale: str, where: Path, todo: Sequence[Job], settings: Sequence[str] = ()) -> list[Path]:
    """Write all files of a table from what is measured, and the list of pages; returns those to look at.

    settings: what the user laid over every training. Raises UsageError where a file of measured/ lacks a number.
    """
    result = results.gathered(table, scale, where, todo, settings)
    result = result._replace(described=words.stands(table, todo), runtime=lasted(result))
    name = file_name(table.name, scale)
    drawn = picture.pictures(result, todo) if importlib.util.find_spec("matplotlib") else None
    pictures = [
        Picture(figure, f"{name}{f'-{i}' if i else ''}.png", table.title, caption)
        for i, (figure, caption) in enumerate(drawn or ())
    ]
    for each in pictures:
        with files.whole(where / each.file) as temporary:
            picture.png(each.figure, temporary)
    missing = (
        "" if drawn is not None or not table.x else "No picture: it needs matplotlib (pip install 'gesso[plots]')."
    )
    return [*_write(result, where, pictures, missing), index(where)]


def _write(result: Result, where: Path, pictures: Sequence[Picture], missing: str = "") -> list[Path]:
    name = file_name(result.table.name, result.scale)
    markdown, page, numbers = (where / f"{name}.{end}" for end in ("md", "html", "json"))
    shown = blocks(result, pictures, missing)
    listed = [{"file": each.file, "caption": each.caption} for each in pictures]
    files.write_json(numbers, results.as_json(result) | {"pictures": listed})
    files.write_text(markdown, render.markdown(shown))
    files.write_text(page, document(f"{result.table.title} - gesso", render.html(shown)))
    return [markdown, page]


def judge_again(table: Table, scale: str, where: Path) -> list[Path]:
    """Write a page again from NAME-SCALE.json and its pictures: the numbers stay, claims and verdicts are those of today."""
    stored = json.loads((where / f"{file_name(table.name, scale)}.json").read_text(encoding="utf-8"))
    once = plan.cells_without_training(table, scale)
    result = results.restored(table, stored, where, once)
    pictures = [
        Picture(where / each["file"], each["file"], table.title, each["caption"]) for each in stored.get("pictures", ())
    ]
    return _write(result, where, pictures)


def judge_all_again(where: Path) -> list[Path]:
    """judge_again for every page of a folder, checklists last, and the list of pages."""
    pages = sorted(made(where), key=lambda page: bool(page["checks"]))
    known = [(table_of(page["table"]), page["scale"]) for page in pages]
    return [*(judge_again(table, scale, where)[0] for table, scale in known), index(where)]


def head(result: Result) -> str:
    """What the numbers are, in a line or two."""
    table, n = result.table, len(result.seeds)
    if table.checks:
        return f"Verdicts from the tables at --scale {result.scale}."
    about = table.scales[result.scale]
    parts = [f"Scale {result.scale}: {SCALES[result.scale]}. {about.notes}".strip()]
    if not parts[0].endswith("."):
        parts[0] += "."
    if result.settings:
        parts.append(f"Every training with {' '.join(result.settings)}.")
    said = f"{n} seeds: mean \u00b1 standard deviation over them" if n > 1 else "One seed"
    said = said if result.trainings else "Nothing is trained, so no seed decides"
    parts.append(f"{said}; {NONE}: not made at this scale, or not yet.")
    if result.scale != "paper" and result.trainings:
        parts.append("With the paper only directions compare, not numbers.")
    return " ".join(parts)


def cells_of(result: Result, column: Column) -> list[Cell]:
    """Ours, of all rows."""
    cells = [result.cells[row.name, column.name] for row in result.table.rows]
    means = [cell.mean for cell in cells if cell.finite]
    best = None
    if column.lower is not None and len(set(means)) > 1:
        best = min(means) if column.lower else max(means)
    digits = digits_of(cells)
    return [
        Cell(shown(cell, digits, len(result.seeds)), cell.notes, "best" if cell.finite and cell.mean == best else "")
        for cell in cells
    ]


def digits_of(cells: Sequence[Numbers]) -> int | None:
    """Decimals of a column: two digits of the spread, else four of the largest number, none of whole numbers; None where they lie
    too far apart."""
    spreads = [cell.spread for cell in cells if cell.spread]
    means = [abs(cell.mean) for cell in cells if cell.finite and cell.mean] or [1.0]
    if not spreads and all(float(cell.mean).is_integer() and cell.mean for cell in cells if cell.finite):
        return 0
    digits = -math.floor(math.log10(statistics.median(spreads) if spreads else max(means))) + (1 if spreads else 3)
    digits = min(max(digits, 0), 5)
    lost = not spreads and min(means) < 10 ** (1 - digits)  # of the smallest not two digits would be left
    return None if lost or max(means) / min(means) > 1e4 else digits


def shown(cell: Numbers, digits: int | None, seeds: int) -> str:
    """1.79 ± 0.11; what is odd about its seeds in brackets."""
    if not cell.seeds:
        return NONE
    text = number(cell.mean, digits)
    if cell.spread is not None:
        text += f"\u00a0\u00b1\u00a0{number(cell.spread, digits)}"  # on one line
    gone = len(cell.seeds) - len(cell.finite)
    if cell.finite and gone:
        kind = "diverged" if any(math.isinf(value) for value in cell.seeds.values()) else "NaN"
        return f"{text} ({gone} of {len(cell.seeds)} {kind})"
    return text if cell.once or len(cell.seeds) == seeds else f"{text} ({len(cell.seeds)} of {seeds} seeds)"


def number(value: float, digits: int | None = None) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "diverged"
    return f"{value:.4g}" if digits is None else f"{value:,.{digits}f}"


def published_of(result: Result, column: Column) -> list[str]:
    """As many decimals as any of them has."""
    values = [row.published.get(column.name) for row in result.table.rows]
    ends = [len(f"{value:g}".partition(".")[2]) for value in values if value is not None and "e" not in f"{value:g}"]
    digits = max(ends, default=0) if all(v is None or math.isinf(v) or abs(v) < 1e6 for v in values) else None
    return [NONE if value is None else number(value, digits) for value in values]


def effect(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:+.3g}" if math.isfinite(value) else "the other diverged" if value > 0 else "it diverged"


def claim_rows(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """Claim, verdict, effect with its bounds, effect of the paper's numbers."""
    for each, paper in result.verdicts:
        between = "" if each.low is None or each.high is None else f" ({each.low:+.3g} to {each.high:+.3g})"
        parts = f"; {each.parts} comparisons" if each.parts > 1 else ""
        ours = effect(each.effect) + between + parts if each.seeds else NONE
        yield each.text, each.verdict, ours, effect(paper)


def lasted(result: Result) -> str:
    """Minutes of a row; of a figure, where rows are points of one training, of that."""
    rows = {row: each.training + each.measuring for row, each in result.minutes.items()}
    found = sorted(result.each_training if result.table.x else rows.values())
    if not found or not result.trainings:
        return ""
    low, middle, high = (f"{value:.2g}" for value in (found[0], statistics.median(found), found[-1]))
    many = f"{low} to {high} minutes, {middle} in the middle" if low != high else f"{low} minutes"
    on = f" ({'; '.join(result.machines)})" if result.machines else ""
    what = "A training" if result.table.x else "A row and seed"
    shared = "" if result.table.x else " Trainings that rows share are counted for each."
    return f"{what} took {many}{on}; expected of a row: {result.table.scales[result.scale].cost}.{shared}"


def blocks(result: Result, pictures: Sequence[Picture], missing: str) -> list[Block]:
    """All that the page shows, in order."""
    table = result.table
    shown: list[Block] = [Title(table.title, f"{table.name}: {table.source}"), Text(head(result))]
    if result.outdated:
        shown.append(Text(f"To be made again: {result.outdated}"))
    if table.checks:
        shown += [checklist(result)]
    else:
        shown += [Terms(dict(result.described)), *numbers_of(result)]
    if result.verdicts:
        rows = [
            (Cell(text), tag(verdict), Cell(ours), Cell(paper)) for text, verdict, ours, paper in claim_rows(result)
        ]
        names = ("claim", "verdict", "effect, ours (bounds)", "effect, paper")
        width = 4 if any(paper is not None for _, paper in result.verdicts) else 3
        shown += [Heading("Claims"), Grid(names[:width], [row[:width] for row in rows]), Text(RULE)]
    if pictures or missing:
        shown += [Heading("Picture"), *pictures, *([Text(missing)] if missing else [])]
    shown += [Heading("Commands"), Code([results.command(result)]), *command_blocks(result), *protocol_blocks(result)]
    return shown + [Text(text) for text in (result.runtime, table.notes) if text]


def numbers_of(result: Result) -> list[Block]:
    """Ours beside the paper's; folded where a figure has many points."""
    axis = "" if result.table.x in {column.name for column in result.table.columns} else result.table.x
    names, rows = [axis], [[Cell(row.name)] for row in result.table.rows]
    for column in result.table.columns:
        has = any(column.name in row.published for row in result.table.rows)
        names += [
            column.name + {True: " \u2193", False: " \u2191", None: ""}[column.lower],
            *(["paper"] if has else []),
        ]
        for row, cell in zip(rows, cells_of(result, column), strict=True):
            row.append(cell)
        if has:
            for row, text in zip(rows, published_of(result, column), strict=True):
                row.append(Cell(text, kind="soft"))
    if result.table.x:  # points of other scales
        rows = [row for row in rows if any(cell.text != NONE for cell in row[1:])]
    whole: list[Block] = [Grid(names, rows, numbers=True), *(Text(note, i) for i, note in enumerate(result.notes, 1))]
    return [Folded(f"Numbers of {len(rows)} points", whole)] if result.table.x and len(rows) > LONG else whole


def checklist(result: Result) -> Grid:
    names = ("question", "recommendation", "verdict", "by the claim", "of")
    return Grid(
        names, [(Cell(c.question), Cell(c.recommendation), tag(said), Cell(says or NONE), Cell(c.table)) for c, says, said in result.checks]
    )  # fmt: skip


def tag(verdict: str) -> Cell:
    return Cell(verdict, kind=COLOURS[verdict])


def command_blocks(result: Result) -> list[Block]:
    """What was trained, and measured."""
    lines = []
    for row, commands in result.evaluations.items():
        took = result.minutes.get(row)
        said = f", {took.training:.2g} minutes of training and {took.measuring:.2g} of measuring" if took else ""
        lines += [f"# {row}{said}", *commands]
    found = {"Trainings": result.trainings, "Measurements": lines}
    return [Folded(title, [Code(lines)]) for title, lines in found.items() if lines]


def protocol_blocks(result: Result) -> list[Block]:
    """How numbers were measured: columns that share a protocol together."""
    shared: dict[str, list[str]] = {}
    for column, protocol in result.protocols.items():
        said = {name: value for name, value in protocol.items() if value is not None}
        shared.setdefault(json.dumps(said, indent=1), []).append(column)
    return [Folded(f"Protocol of {'; '.join(columns)}", [Code([said])]) for said, columns in shared.items()]
