"""Pages of a table: NAME-SCALE.md, .html and .json, and the plots of a figure."""

import importlib.util
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from gesso import atomic_io
from gesso.report.page import document
from gesso.reproduce import labels, plan, plots, render, results
from gesso.reproduce.claims import Verdict
from gesso.reproduce.index import file_name, list_results, write_index
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.render import (
    Block,
    Cell,
    CodeBlock,
    DefinitionList,
    Details,
    Heading,
    Paragraph,
    PlotBlock,
    TableBlock,
    Title,
)
from gesso.reproduce.results import CellNumbers, TableResult
from gesso.reproduce.schema import Column, Table, Tables, get_table

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
"""Text of a cell without a number."""
MAX_OPEN_ROWS = 14
"""Rows of a figure above which its numbers are folded."""
RULE = (
    "Effect: by how much the claim holds, in the unit of what it compares, with the bounds that decide. Reproduced: every part "
    "of the claim is above 0 at 95 % (one-sided Student's t over paired seeds; sign test for positions of optima and where a "
    "training diverged). Contradicted: the opposite holds at 95 %. Each is wrong in at most one case of twenty; otherwise the "
    "claim is undecided. An exact check needs no training. See docs/reproduction.md."
)


def write_page(
    table: Table, scale: str, out: Path, jobs: Sequence[MeasurementJob], settings: Sequence[str] = ()
) -> list[Path]:
    """Write all files of a table from its records, and the list of pages; return the paths to look at.

    settings: overrides that the user applied to every training.

    Raises:
        UsageError: if a record lacks a number that the table shows.
    """
    result = results.collect_result(table, scale, out, jobs, settings)
    result = result._replace(column_descriptions=labels.describe_columns(table, jobs), runtime=runtime_text(result))
    name = file_name(table.name, scale)
    drawn = plots.make_plots(result, jobs) if importlib.util.find_spec("matplotlib") else None
    pictures = [
        PlotBlock(figure, f"{name}{f'-{i}' if i else ''}.png", table.title, caption)
        for i, (figure, caption) in enumerate(drawn or ())
    ]
    for each in pictures:
        with atomic_io.atomic_file(out / each.file) as temporary:
            plots.save_png(each.figure, temporary)
    missing = (
        "" if drawn is not None or not table.x_axis else "No picture: it needs matplotlib (pip install 'gesso[plots]')."
    )
    return [*_write_files(result, out, pictures, missing), write_index(out)]


def _write_files(result: TableResult, out: Path, pictures: Sequence[PlotBlock], missing: str = "") -> list[Path]:
    name = file_name(result.table.name, result.scale)
    markdown, page, numbers = (out / f"{name}.{end}" for end in ("md", "html", "json"))
    shown = page_blocks(result, pictures, missing)
    listed = [{"file": each.file, "caption": each.caption} for each in pictures]
    atomic_io.write_json(numbers, results.to_json(result) | {"pictures": listed})
    atomic_io.write_text(markdown, render.to_markdown(shown))
    atomic_io.write_text(page, document(f"{result.table.title} - gesso", render.to_html(shown)))
    return [markdown, page]


def rejudge(table: Table, scale: str, out: Path) -> list[Path]:
    """Write a page again from NAME-SCALE.json and its plots: the numbers stay, claims and verdicts are new."""
    stored = json.loads((out / f"{file_name(table.name, scale)}.json").read_text(encoding="utf-8"))
    single_seed = plan.cells_without_training(table, scale)
    result = results.load_result(table, stored, out, single_seed)
    pictures = [
        PlotBlock(out / each["file"], each["file"], table.title, each["caption"]) for each in stored.get("pictures", ())
    ]
    return _write_files(result, out, pictures)


def rejudge_all(tables: Tables, out: Path) -> list[Path]:
    """Judge every page of a folder again, checklists last, and write the list of pages."""
    pages = sorted(list_results(out), key=lambda page: bool(page["checks"]))
    known = [(get_table(tables, page["table"]), page["scale"]) for page in pages]
    return [*(rejudge(table, scale, out)[0] for table, scale in known), write_index(out)]


def page_header(result: TableResult) -> str:
    """Return one or two lines on scale, settings and seeds."""
    table, n = result.table, len(result.seeds)
    if table.checklist:
        return f"Verdicts from the tables at --scale {result.scale}."
    about = table.scales[result.scale]
    parts = [f"Scale {result.scale}: {SCALES[result.scale]}. {about.notes}".strip()]
    if not parts[0].endswith("."):
        parts[0] += "."
    if result.settings:
        parts.append(f"Every training with {' '.join(result.settings)}.")
    seeds = f"{n} seeds: mean \u00b1 standard deviation" if n > 1 else "One seed"
    seeds = seeds if result.training_commands else "Nothing is trained, so seeds do not matter"
    parts.append(f"{seeds}; {NONE}: not defined at this scale, or not yet measured.")
    if result.scale != "paper" and result.training_commands:
        parts.append("Only directions compare with the paper, not numbers.")
    return " ".join(parts)


def column_cells(result: TableResult, column: Column) -> list[Cell]:
    """Return the cells of a column with our numbers, the best marked."""
    cells = [result.cells[row.name, column.name] for row in result.table.rows]
    means = [cell.mean for cell in cells if cell.finite_values]
    best = None
    if column.lower_is_better is not None and len(set(means)) > 1:
        best = min(means) if column.lower_is_better else max(means)
    digits = significant_digits(cells)
    return [
        Cell(
            format_cell(cell, digits, len(result.seeds)),
            cell.footnotes,
            "best" if cell.finite_values and cell.mean == best else "",
        )
        for cell in cells
    ]


def significant_digits(cells: Sequence[CellNumbers]) -> int | None:
    """Return the decimals of a column, or None if its numbers differ too much in size.

    Two digits of the spread, else four digits of the largest number, none for whole numbers.
    """
    spreads = [cell.std for cell in cells if cell.std]
    means = [abs(cell.mean) for cell in cells if cell.finite_values and cell.mean] or [1.0]
    if not spreads and all(float(cell.mean).is_integer() and cell.mean for cell in cells if cell.finite_values):
        return 0
    digits = -math.floor(math.log10(statistics.median(spreads) if spreads else max(means))) + (1 if spreads else 3)
    digits = min(max(digits, 0), 5)
    lost = not spreads and min(means) < 10 ** (1 - digits)  # less than two digits of the smallest would remain
    return None if lost or max(means) / min(means) > 1e4 else digits


def format_cell(cell: CellNumbers, digits: int | None, seeds: int) -> str:
    """Return "1.79 ± 0.11", with diverged or missing seeds in brackets."""
    if not cell.by_seed:
        return NONE
    text = format_number(cell.mean, digits)
    if cell.std is not None:
        text += f"\u00a0\u00b1\u00a0{format_number(cell.std, digits)}"  # non-breaking
    lost = len(cell.by_seed) - len(cell.finite_values)
    if cell.finite_values and lost:
        kind = "diverged" if any(math.isinf(value) for value in cell.by_seed.values()) else "NaN"
        return f"{text} ({lost} of {len(cell.by_seed)} {kind})"
    return text if cell.single_seed or len(cell.by_seed) == seeds else f"{text} ({len(cell.by_seed)} of {seeds} seeds)"


def format_number(value: float, digits: int | None = None) -> str:
    """Return a number with `digits` decimals, or four significant digits."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "diverged"
    return f"{value:.4g}" if digits is None else f"{value:,.{digits}f}"


def published_of(result: TableResult, column: Column) -> list[str]:
    """Return the published numbers of a column, all with the same number of decimals."""
    values = [row.published.get(column.name) for row in result.table.rows]
    ends = [len(f"{value:g}".partition(".")[2]) for value in values if value is not None and "e" not in f"{value:g}"]
    digits = max(ends, default=0) if all(v is None or math.isinf(v) or abs(v) < 1e6 for v in values) else None
    return [NONE if value is None else format_number(value, digits) for value in values]


def format_effect(value: float | None) -> str:
    """Return an effect with its sign."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:+.3g}" if math.isfinite(value) else "the other diverged" if value > 0 else "it diverged"


def claim_rows(result: TableResult) -> Iterator[tuple[str, str, str, str]]:
    """Yield claim, verdict, effect with bounds, and effect in the paper's numbers."""
    for judgement, paper in result.verdicts:
        low, high = judgement.low, judgement.high
        bounds = "" if low is None or high is None else f" ({low:+.3g} to {high:+.3g})"
        parts = f"; {judgement.num_parts} comparisons" if judgement.num_parts > 1 else ""
        ours = format_effect(judgement.effect) + bounds + parts if judgement.num_seeds else NONE
        yield judgement.text, judgement.verdict, ours, format_effect(paper)


def runtime_text(result: TableResult) -> str:
    """Return how many minutes a row took, or a training where the rows of a figure are points of one."""
    rows = {row: minutes.training + minutes.measurement for row, minutes in result.minutes.items()}
    times = sorted(result.minutes_per_training if result.table.x_axis else rows.values())
    if not times or not result.training_commands:
        return ""
    low, middle, high = (f"{value:.2g}" for value in (times[0], statistics.median(times), times[-1]))
    duration = f"{low} to {high} minutes, median {middle}" if low != high else f"{low} minutes"
    on = f" ({'; '.join(result.environments)})" if result.environments else ""
    subject = "A training" if result.table.x_axis else "A row and seed"
    shared = "" if result.table.x_axis else " A training that rows share counts for each of them."
    return f"{subject} took {duration}{on}; expected for a row: {result.table.scales[result.scale].cost}.{shared}"


def page_blocks(result: TableResult, pictures: Sequence[PlotBlock], missing: str) -> list[Block]:
    """Return everything that the page shows, in order."""
    table = result.table
    shown: list[Block] = [Title(table.title, f"{table.name}: {table.source}"), Paragraph(page_header(result))]
    if result.outdated_note:
        shown.append(Paragraph(f"To be made again: {result.outdated_note}"))
    if table.checklist:
        shown += [checklist(result)]
    else:
        shown += [DefinitionList(dict(result.column_descriptions)), *numbers_grid(result)]
    if result.verdicts:
        rows = [
            (Cell(text), verdict_tag(verdict), Cell(ours), Cell(paper))
            for text, verdict, ours, paper in claim_rows(result)
        ]
        names = ("claim", "verdict", "effect, ours (bounds)", "effect, paper")
        width = 4 if any(paper is not None for _, paper in result.verdicts) else 3
        shown += [Heading("Claims"), TableBlock(names[:width], [row[:width] for row in rows]), Paragraph(RULE)]
    if pictures or missing:
        shown += [Heading("Picture"), *pictures, *([Paragraph(missing)] if missing else [])]
    shown += [
        Heading("Commands"),
        CodeBlock([results.reproduce_command(result)]),
        *command_blocks(result),
        *protocol_blocks(result),
    ]
    return shown + [Paragraph(text) for text in (result.runtime, table.notes) if text]


def numbers_grid(result: TableResult) -> list[Block]:
    """Return the table of our numbers next to the published ones; folded if a figure has many points."""
    axis = "" if result.table.x_axis in {column.name for column in result.table.columns} else result.table.x_axis
    names, rows = [axis], [[Cell(row.name)] for row in result.table.rows]
    for column in result.table.columns:
        has = any(column.name in row.published for row in result.table.rows)
        names += [
            column.name + {True: " \u2193", False: " \u2191", None: ""}[column.lower_is_better],
            *(["paper"] if has else []),
        ]
        for row, cell in zip(rows, column_cells(result, column), strict=True):
            row.append(cell)
        if has:
            for row, text in zip(rows, published_of(result, column), strict=True):
                row.append(Cell(text, kind="soft"))
    if result.table.x_axis:  # drop points of other scales
        rows = [row for row in rows if any(cell.text != NONE for cell in row[1:])]
    blocks: list[Block] = [
        TableBlock(names, rows, numbers=True),
        *(Paragraph(note, i) for i, note in enumerate(result.footnotes, 1)),
    ]
    return (
        [Details(f"Numbers of {len(rows)} points", blocks)]
        if result.table.x_axis and len(rows) > MAX_OPEN_ROWS
        else blocks
    )


def checklist(result: TableResult) -> TableBlock:
    """Return the table of a checklist."""
    names = ("question", "recommendation", "verdict", "by the claim", "of")
    return TableBlock(
        names,
        [
            (
                Cell(item.question),
                Cell(item.recommendation),
                verdict_tag(verdict),
                Cell(text or NONE),
                Cell(item.table),
            )
            for item, text, verdict in result.checklist
        ],
    )


def verdict_tag(verdict: str) -> Cell:
    """Return a verdict as a coloured cell."""
    return Cell(verdict, kind=COLOURS[Verdict(verdict)])


def command_blocks(result: TableResult) -> list[Block]:
    """Return the commands of trainings and measurements, folded."""
    lines = []
    for row, commands in result.evaluate_commands.items():
        minutes = result.minutes.get(row)
        cost = f", {minutes.training:.2g} minutes training, {minutes.measurement:.2g} measuring" if minutes else ""
        lines += [f"# {row}{cost}", *commands]
    sections = {"Trainings": result.training_commands, "Measurements": lines}
    return [Details(title, [CodeBlock(lines)]) for title, lines in sections.items() if lines]


def protocol_blocks(result: TableResult) -> list[Block]:
    """Return the protocols, folded; columns that share one are listed together."""
    shared: dict[str, list[str]] = {}
    for column, protocol in result.protocols.items():
        known = {name: value for name, value in protocol.items() if value is not None}
        shared.setdefault(json.dumps(known, indent=1), []).append(column)
    return [Details(f"Protocol of {'; '.join(columns)}", [CodeBlock([text])]) for text, columns in shared.items()]
