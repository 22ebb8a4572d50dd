"""A page as blocks, and as Markdown and HTML."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso.report import figures, page
from gesso.reproduce.markdown import escape, to_markdown_table


class Cell(NamedTuple):
    """A cell of a table.

    marks: numbers of footnotes. kind: "best" of ours in its column, "soft" for the paper's, or the color of a tag.
    """

    text: str
    marks: tuple[int, ...] = ()
    kind: str = ""


class Title(NamedTuple):
    text: str
    below: str


class Heading(NamedTuple):
    text: str


class Paragraph(NamedTuple):
    """A paragraph; mark: number of a footnote."""

    text: str
    mark: int | None = None


class DefinitionList(NamedTuple):
    pairs: dict[str, str]


class TableBlock(NamedTuple):
    """A table; numbers: all columns but the first are numeric."""

    names: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: bool = False


class CodeBlock(NamedTuple):
    lines: Sequence[str]


class PlotBlock(NamedTuple):
    """A figure of matplotlib, or the path of a PNG; file: its path in Markdown."""

    figure: Any
    file: str
    title: str
    caption: str


class Details(NamedTuple):
    title: str
    blocks: Sequence["Block"]


Block = Title | Heading | Paragraph | DefinitionList | TableBlock | CodeBlock | PlotBlock | Details


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Title(text, below):
            return f"# {escape(text)}\n\n{escape(below)}"
        case Heading(text):
            return f"## {escape(text)}"
        case Paragraph(text, mark):
            return (f"<sup>{mark}</sup> " if mark else "") + escape(text)
        case DefinitionList(pairs):
            return "\n".join(f"- {escape(name)}: {escape(text)}" for name, text in pairs.items())
        case TableBlock(names, rows, numbers):
            return to_markdown_table(names, [[_cell(cell) for cell in row] for row in rows], numbers)
        case CodeBlock(lines):
            return "\n".join(["```", *lines, "```"])
        case PlotBlock(_, file, title, caption):
            return f"![{escape(title)}]({file})" + (f"\n\n{escape(caption)}" if caption else "")
        case Details(title, inner):
            return f"<details><summary>{escape(title)}</summary>\n\n{to_markdown(inner)}\n</details>"


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    text = f"**{text}**" if cell.kind and cell.kind != "soft" else text
    return text + "".join(f"<sup>{mark}</sup>" for mark in cell.marks)


def to_html(blocks: Sequence[Block]) -> Iterator[str]:
    """Sections of a page."""
    for block in blocks:
        match block:
            case Title(text, below):
                yield f'<h1>{page.escape(text)}</h1><p class="sub">{page.escape(below)}</p>'
            case Heading(text):
                yield f"<h2>{page.escape(text)}</h2>"
            case Paragraph(text, mark):
                yield f"<p>{f'<sup>{mark}</sup> ' if mark else ''}{page.escape(text)}</p>"
            case DefinitionList(pairs):
                lines = (f"<li>{page.escape(name)}: {page.escape(text)}</li>" for name, text in pairs.items())
                yield f"<ul>{''.join(lines)}</ul>"
            case TableBlock(names, rows, numbers):
                yield page.table(
                    names, [[_html(cell) for cell in row] for row in rows], "paired" if numbers else "words"
                )
            case CodeBlock(lines):
                yield f"<pre>{page.escape(chr(10).join(lines))}</pre>"
            case PlotBlock(figure, _, _, caption):
                stored = isinstance(figure, Path)
                yield page.row([page.image(figure, caption) if stored else page.figure(figures.svg(figure), caption)])
            case Details(title, inner):
                yield page.folded(title, "".join(to_html(inner)))


def _html(cell: Cell) -> page.Raw:
    text = page.escape(cell.text)
    if cell.kind == "best":
        text = f"<b>{text}</b>"
    elif cell.kind == "soft":
        text = f'<span class="soft">{text}</span>'
    elif cell.kind:
        text = f'<span class="tag" style="background:{cell.kind}">{text}</span>'
    return page.Raw(text + "".join(f"<sup>{mark}</sup>" for mark in cell.marks))
