"""Text and tables in GitHub's Markdown, and their conversion to HTML."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gesso.report.render import Figure, png_data_uri

if TYPE_CHECKING:
    from markdown_it.token import Token

PAPER_COLUMN = ", paper"
"""End of the header of columns with published numbers."""
EMPTY = "-"
"""Text of a cell without a number."""


def escape(text: str) -> str:
    """Escape a text for GitHub's Markdown."""
    return re.sub(r"([\\`*_<>|\[\]~$])", r"\\\1", text)


def format_table_cell(text: str, *, bold: bool = False, footnotes: Sequence[int] = ()) -> str:
    """Return a plain text with its footnote marks as Markdown."""
    text = escape(text)
    return (f"**{text}**" if bold else text) + "".join(f"<sup>{number}</sup>" for number in footnotes)


def format_effect(
    value: float | None, low: float | None = None, high: float | None = None, *, unit: str = ".3g"
) -> str:
    """Return an effect with its sign and its bounds, such as "+0.6 (+0.2 to +1)".

    Args:
        value: The effect; None or NaN: unknown, infinite: a training diverged.
        low: Lower bound.
        high: Upper bound.
        unit: Format of the numbers.
    """
    if value is None or math.isnan(value):
        return EMPTY
    if math.isinf(value):
        return "the other diverged" if value > 0 else "it diverged"
    bounds = "" if low is None or high is None else f" ({low:+{unit}} to {high:+{unit}})"
    return f"{value:+{unit}}{bounds}"


def to_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = False) -> str:
    """Return a table in Markdown.

    Args:
        header: Titles of the columns as plain text.
        rows: Cells as Markdown.
        numeric: Align all columns but the first to the right.
    """
    alignment = ["---"] + ["--:" if numeric else "---"] * (len(header) - 1)
    lines = ([escape(name) for name in header], alignment, *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown_to_html(text: str, figures: Mapping[str, Figure], tag_colors: Mapping[str, str]) -> str:
    """Convert a page to HTML in the style of the reports.

    Args:
        text: The page in Markdown. HTML in it is passed through, so texts must be escaped (`escape`).
        figures: Figures by file name, which replace images of these names.
        tag_colors: Background colors of bold words that are shown as tags.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(text)
    header: list[str] = []
    column = 0
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            table, header = token, []
            table.attrSet("class", "words")
        elif token.type == "th_open":
            header.append(tokens[i + 1].content)
            if token.attrs:  # aligned to the right
                table.attrSet("class", "numbers")
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            if header[column].endswith(PAPER_COLUMN):
                token.attrSet("class", "paper")
            column += 1
        elif token.type == "inline":
            _style_inline(tokens, i, figures, tag_colors)
    return parser.renderer.render(tokens, parser.options, {})


def _style_inline(
    tokens: Sequence["Token"], index: int, figures: Mapping[str, Figure], tag_colors: Mapping[str, str]
) -> None:
    """Turn a paragraph with only an image into a figure, and bold words of `tag_colors` into tags."""
    children = tokens[index].children or []
    if [child.type for child in children] == ["image"]:
        tokens[index - 1].tag = tokens[index + 1].tag = "figure"
        figure = figures[str(children[0].attrGet("src"))]
        if figure.image:
            children[0].attrSet("src", png_data_uri(figure.image))
        else:
            children[0].type, children[0].content = "html_inline", figure.svg
    for child, following in itertools.pairwise(children):
        if child.type == "strong_open" and following.content in tag_colors:
            child.attrs |= {"class": "tag", "style": f"background:{tag_colors[following.content]}"}
