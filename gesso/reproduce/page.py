"""Pages of a table: NAME-SCALE.md, .html and .json, and the plots of a figure."""

import importlib.util
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gesso import atomic_io
from gesso.errors import RunError, install_command
from gesso.report.plotting import to_svg
from gesso.report.render import Figure, render_page, render_template
from gesso.reproduce import markdown, plots, results
from gesso.reproduce.index import VERDICT_COLORS, file_stem, list_results, write_index
from gesso.reproduce.markdown import EMPTY, format_effect, format_table_cell, to_markdown_table
from gesso.reproduce.plan import MeasurementJob
from gesso.reproduce.results import CellNumbers, TableResult
from gesso.reproduce.schema import Column, Table, Tables, get_table
from gesso.untrusted import read_json_object

TEMPLATE = Path(__file__).parent / "templates" / "page.md"
SCALE_DESCRIPTIONS = {
    "tiny": "two CPU cores, minutes a row",
    "small": "one GPU, about an hour a row",
    "paper": "as published",
}
MAX_OPEN_ROWS = 14
"""Number of points of a figure above which its numbers are folded."""
VERDICT_RULE = (
    "Effect: the margin by which the claim holds, in the unit of the compared numbers, with its confidence bounds. "
    "Reproduced: every part of the claim is above 0 at 95 % (one-sided Student's t over paired seeds; sign test for "
    "positions of optima and where a training diverged). Contradicted: the opposite holds at 95 %. Each is wrong in at "
    "most one case of twenty; otherwise the claim is undecided. An exact check needs no training. See "
    "docs/reproduction.md."
)
MISSING_FIGURES_NOTE = f"No figure: it needs matplotlib ({install_command('plots')})."


def write_page(
    table: Table, scale: str, out: Path, jobs: Sequence[MeasurementJob], settings: Sequence[str] = ()
) -> list[Path]:
    """Write all files of a table from its records, and the list of pages.

    Args:
        table: The table.
        scale: Its scale.
        out: Folder of the pages.
        jobs: Jobs of all rows and seeds; those without a record are not measured yet.
        settings: Overrides that the user applied to every training.

    Returns:
        The paths of the page in Markdown and HTML, and of the list of pages.

    Raises:
        UsageError: A record lacks a number that the table shows.
    """
    result = results.load_result(table, results.collect_record(table, scale, out, jobs, settings), out)
    can_plot = has_matplotlib()
    figures = save_plots(result, out, plots.make_plots(result, jobs)) if can_plot else {}
    note = MISSING_FIGURES_NOTE if table.x_axis and not can_plot else ""
    return [*_write_files(result, out, figures, note), write_index(out)]


def has_matplotlib() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_plots(result: TableResult, out: Path, drawn: Sequence[plots.Plot]) -> dict[str, Figure]:
    """Write plots as STEM.png, STEM-1.png, ...; return them by file name."""
    figures = {}
    for i, plot in enumerate(drawn):
        file = f"{file_stem(result.table.name, result.scale)}{f'-{i}' if i else ''}.png"
        with atomic_io.atomic_file(out / file) as temporary:
            plots.save_png(plot.figure, temporary)
        figures[file] = Figure(plot.caption, to_svg(plot.figure))
    return figures


def _write_files(
    result: TableResult, out: Path, figures: Mapping[str, Figure], missing_figures_note: str = ""
) -> list[Path]:
    stem = file_stem(result.table.name, result.scale)
    markdown_path, html_path, json_path = (out / f"{stem}.{suffix}" for suffix in ("md", "html", "json"))
    pictures = [{"file": file, "caption": figure.caption} for file, figure in figures.items()]
    atomic_io.write_json(json_path, results.to_json(result) | {"pictures": pictures})
    context = page_context(result) | {"figures": figures, "missing_figures_note": missing_figures_note}
    text = render_template(TEMPLATE, context, {"md": markdown.escape}).rstrip() + "\n"
    atomic_io.write_text(markdown_path, text)
    content = markdown.markdown_to_html(text, figures, VERDICT_COLORS)
    atomic_io.write_text(html_path, render_page("page.html", result.table.title, {"content": content}))
    return [markdown_path, html_path]


def rejudge(table: Table, scale: str, out: Path) -> list[Path]:
    """Write a page again from NAME-SCALE.json, with new verdicts of the current claims and new plots of curves."""
    path = out / f"{file_stem(table.name, scale)}.json"
    try:
        stored = read_json_object(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it, and reproduce the table again") from None
    result = results.load_result(table, stored, out)
    pictures = stored.get("pictures", ())
    figures = {entry["file"]: Figure(entry["caption"], image=out / Path(entry["file"]).name) for entry in pictures}
    if has_matplotlib():
        figures |= save_plots(result, out, plots.curve_plots(result))
    return _write_files(result, out, figures)


def rejudge_all(tables: Tables, out: Path) -> list[Path]:
    """Judge every page of a folder again, checklists last, and write the list of pages; return the paths."""
    pages = sorted(list_results(out), key=lambda page: bool(page["checks"]))
    targets = [(get_table(tables, page["table"]), page["scale"]) for page in pages]
    return [*(rejudge(table, scale, out)[0] for table, scale in targets), write_index(out)]


def page_context(result: TableResult) -> dict[str, Any]:
    """Return the variables of TEMPLATE, without the figures."""
    table = result.table
    num_points, numbers = (0, "") if table.checklist else numbers_table(result)
    return {
        "table": table,
        "header": page_header(result),
        "outdated_note": result.record["outdated"],
        "checklist_table": checklist_table(result),
        "column_descriptions": describe_columns(result),
        "numbers_table": numbers,
        "num_folded_points": num_points if table.x_axis and num_points > MAX_OPEN_ROWS else 0,
        "footnotes": result.footnotes,
        "claims_table": claims_table(result),
        "verdict_rule": VERDICT_RULE,
        "command": results.reproduce_command(result),
        "details": [*command_details(result), *protocol_details(result)],
        "closing": [text for text in (result.record["runtime"], table.notes) if text],
    }


def describe_columns(result: TableResult) -> dict[str, str]:
    """Return what is measured by titles of columns; columns with the same description share a key, such as "A; B"."""
    titles: dict[str, list[str]] = {}
    for label in result.columns.values():
        titles.setdefault(label.description, []).append(label.title)
    return {"; ".join(names): description for description, names in titles.items()}


def page_header(result: TableResult) -> str:
    """Return one or two lines on scale, settings and seeds."""
    table, n = result.table, len(result.seeds)
    if table.checklist:
        return f"Verdicts from the tables at --scale {result.scale}."
    about = table.scales[result.scale]
    parts = [f"Scale {result.scale}: {SCALE_DESCRIPTIONS[result.scale]}. {about.notes}".strip()]
    if not parts[0].endswith("."):
        parts[0] += "."
    if result.record["settings"]:
        parts.append(f"Every training with {' '.join(result.record['settings'])}.")
    seeds = f"{n} seeds: mean \u00b1 standard deviation" if n > 1 else "One seed"
    seeds = seeds if result.record["training_commands"] else "Nothing is trained, so seeds do not matter"
    parts.append(f"{seeds}; {EMPTY}: not defined at this scale, or not yet measured.")
    if result.scale != "paper" and result.record["training_commands"]:
        parts.append("Only directions compare with the paper, not numbers.")
    return " ".join(parts)


def column_cells(result: TableResult, column: Column) -> list[str]:
    """Return our numbers of a column in Markdown, the best one bold."""
    cells = [result.cells[row.name, column.name] for row in result.table.rows]
    means = [cell.mean for cell in cells if cell.finite_values]
    best = None
    if column.lower_is_better is not None and len(set(means)) > 1:
        best = min(means) if column.lower_is_better else max(means)
    decimals = column_decimals(cells)
    return [
        format_table_cell(
            format_cell(cell, decimals, len(result.seeds)),
            bold=bool(cell.finite_values) and cell.mean == best,
            footnotes=cell.footnotes,
        )
        for cell in cells
    ]


def column_decimals(cells: Sequence[CellNumbers]) -> int | None:
    """Return the number of decimals of a column, or None if its numbers differ too much in size.

    Two digits of the standard deviation, else four digits of the largest number, none for integers.
    """
    spreads = [cell.std for cell in cells if cell.std]
    means = [abs(cell.mean) for cell in cells if cell.finite_values and cell.mean] or [1.0]
    if not spreads and all(float(cell.mean).is_integer() and cell.mean for cell in cells if cell.finite_values):
        return 0
    decimals = -math.floor(math.log10(statistics.median(spreads) if spreads else max(means))) + (1 if spreads else 3)
    decimals = min(max(decimals, 0), 5)
    too_coarse = not spreads and min(means) < 10 ** (1 - decimals)  # less than two digits of the smallest number remain
    return None if too_coarse or max(means) / min(means) > 1e4 else decimals


def format_cell(cell: CellNumbers, decimals: int | None, num_seeds: int) -> str:
    """Return "1.79 ± 0.11", with the number of diverged or missing seeds in brackets."""
    if not cell.by_seed:
        return EMPTY
    text = format_number(cell.mean, decimals)
    if cell.std is not None:
        text += f"\u00a0\u00b1\u00a0{format_number(cell.std, decimals)}"  # non-breaking
    n = len(cell.by_seed)
    num_lost = n - len(cell.finite_values)
    if cell.finite_values and num_lost:
        reason = "diverged" if any(math.isinf(value) for value in cell.by_seed.values()) else "NaN"
        return f"{text} ({num_lost} of {n} {reason})"
    return text if cell.single_seed or n == num_seeds else f"{text} ({n} of {num_seeds} seeds)"


def format_number(value: float, decimals: int | None = None) -> str:
    """Return a number with a number of decimals, or with four significant digits."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "diverged"
    return f"{value:.4g}" if decimals is None else f"{value:,.{decimals}f}"


def published_cells(result: TableResult, column: Column) -> list[str]:
    """Return the published numbers of a column as text, all with the same number of decimals."""
    values = [row.published.get(column.name) for row in result.table.rows]
    texts = [f"{value:g}" for value in values if value is not None]
    decimals = max((len(text.partition(".")[2]) for text in texts if "e" not in text), default=0)
    is_large = any(value is not None and math.isfinite(value) and abs(value) >= 1e6 for value in values)
    return [EMPTY if value is None else format_number(value, None if is_large else decimals) for value in values]


def claim_rows(result: TableResult) -> Iterator[tuple[str, str, str, str]]:
    """Yield claim, verdict, effect with bounds, and effect in the paper's numbers."""
    for claim in result.claims:
        judgement = claim.judgement
        parts = f"; {judgement.num_parts} comparisons" if judgement.num_parts > 1 else ""
        effect = format_effect(judgement.effect, judgement.low, judgement.high) + parts
        yield (
            judgement.text,
            judgement.verdict,
            effect if judgement.num_seeds else EMPTY,
            format_effect(claim.published),
        )


def numbers_table(result: TableResult) -> tuple[int, str]:
    """Return the number of rows, and our numbers next to the published ones as a table in Markdown."""
    axis = "" if result.table.x_axis in {column.name for column in result.table.columns} else result.table.x_axis
    header, rows = [axis], [[format_table_cell(row.name)] for row in result.table.rows]
    for column in result.table.columns:
        header.append(
            result.columns[column.name].title + {True: " \u2193", False: " \u2191", None: ""}[column.lower_is_better]
        )
        for row, text in zip(rows, column_cells(result, column), strict=True):
            row.append(text)
        if any(column.name in row.published for row in result.table.rows):
            header.append(column.name + markdown.PAPER_COLUMN)
            for row, text in zip(rows, published_cells(result, column), strict=True):
                row.append(format_table_cell(text))
    if result.table.x_axis:  # drop points of other scales
        rows = [row for row in rows if any(text != EMPTY for text in row[1:])]
    return len(rows), to_markdown_table(header, rows, numeric=True)


def claims_table(result: TableResult) -> str:
    """Return the claims with their verdicts and effects as a table in Markdown; empty without claims."""
    if not result.claims:
        return ""
    rows = [
        (
            format_table_cell(text),
            format_table_cell(verdict, bold=True),
            format_table_cell(effect),
            format_table_cell(paper),
        )
        for text, verdict, effect, paper in claim_rows(result)
    ]
    header = ("claim", "verdict", "effect (bounds)", "effect in the paper")
    width = 4 if any(claim.published is not None for claim in result.claims) else 3
    return to_markdown_table(header[:width], [row[:width] for row in rows])


def checklist_table(result: TableResult) -> str:
    """Return the items of a checklist with their verdicts as a table in Markdown."""
    rows = [
        (
            format_table_cell(item.question),
            format_table_cell(item.recommendation),
            format_table_cell(verdict, bold=True),
            format_table_cell(text or EMPTY),
            format_table_cell(item.table),
        )
        for item, text, verdict in result.checklist
    ]
    return to_markdown_table(("question", "recommendation", "verdict", "claim", "table"), rows)


def command_details(result: TableResult) -> list[tuple[str, Sequence[str]]]:
    """Return the commands of trainings and measurements, each with a title."""
    lines = []
    for row, commands in result.record["evaluate_commands"].items():
        minutes = result.record["minutes"].get(row)
        cost = ", {training:.2g} minutes training, {measurement:.2g} measuring".format(**minutes) if minutes else ""
        lines += [f"# {row}{cost}", *commands]
    details = {"Trainings": result.record["training_commands"], "Measurements": lines}
    return [(title, commands) for title, commands in details.items() if commands]


def protocol_details(result: TableResult) -> list[tuple[str, Sequence[str]]]:
    """Return the protocols as JSON, each with a title that names its columns."""
    columns_of: dict[str, list[str]] = {}
    for column, protocol in result.record["protocols"].items():
        entries = {name: value for name, value in protocol.items() if value is not None}
        columns_of.setdefault(json.dumps(entries, indent=1), []).append(column)
    return [(f"Protocol of {'; '.join(columns)}", [text]) for text, columns in columns_of.items()]
