"""Rendering of pages: jinja2 templates, and the figures and tables that they show."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso import untrusted
from gesso.errors import RunError

TEMPLATES = Path(__file__).parent / "templates"


class Figure(NamedTuple):
    """A figure of a page: a plot as SVG, or a PNG file."""

    caption: str
    svg: str = ""
    image: Path | None = None


class TableData(NamedTuple):
    """Header and rows of a table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def non_empty(figures: Iterable[Figure]) -> list[Figure]:
    """Return the figures without those that have nothing to plot."""
    return [figure for figure in figures if figure.svg or figure.image]


def png_data_uri(path: Path) -> str:
    """Return a PNG file as a data URI. Raises RunError if it is a link, too large, or no PNG file."""
    try:
        content = untrusted.read_bytes(path, follow_links=False)
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("it is no PNG file")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be shown in a page ({error}): delete it") from None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _printable_text(value: object) -> object:
    """Return text without control characters; other values and text that is marked as safe as they are."""
    return untrusted.printable(value) if type(value) is str else value


def render_template(
    path: Path, context: Mapping[str, Any], filters: Mapping[str, Callable[..., str]] | None = None
) -> str:
    """Render a jinja2 template; those named *.html escape all text that is not marked as safe.

    Args:
        path: The template; it can include and import other templates of its folder.
        context: Variables of the template. A missing one raises jinja2.UndefinedError.
        filters: Additional filters by name.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable_text,
    )
    environment.filters |= {"png_data_uri": png_data_uri} | dict(filters or {})
    return environment.get_template(path.name).render(context) + "\n"


def render_page(template: str, title: str, context: Mapping[str, Any]) -> str:
    """Render one of TEMPLATES as a self-contained HTML page."""
    return render_template(TEMPLATES / template, {"title": title, **context})
