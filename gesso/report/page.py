"""HTML: the page, and the parts that sections are made of. Text that comes in is escaped here."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #faf8f4; color: #2b2a27; font: 16px/1.55 Georgia, 'Times New Roman', serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 40px; font-weight: 400; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; line-height: 1.2; }
h2 { font-size: 21px; font-weight: 400; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid #ddd6c9; }
p, li { max-width: 68ch; } .sub { color: #6d685d; margin: 6px 0 30px; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; }
.card { background: #fff; border: 1px solid #e6e0d4; border-radius: 6px; padding: 14px 20px; min-width: 150px; }
.card b { display: block; font-size: 28px; font-weight: 400; } .card span { color: #6d685d; font-size: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 30px 26px; }
.few { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); gap: 26px; }
figure { margin: 0; min-width: 0; } figcaption { color: #6d685d; font-size: 14px; line-height: 1.45; margin-top: 8px; }
img, svg { max-width: 100%; height: auto; } figure svg { display: block; width: 100%; }
figure img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 15px; }
td, th { text-align: right; padding: 5px 18px 5px 0; font-weight: 400; vertical-align: top; }
td:first-child, th:first-child { text-align: left; } th { color: #6d685d; border-bottom: 1px solid #ddd6c9; }
.words td, .words th { text-align: left; overflow-wrap: anywhere; min-width: 9ch; }
.wide td:first-child { white-space: nowrap; } .swatch { vertical-align: middle; margin-right: 8px; }
pre { background: #fff; border: 1px solid #e6e0d4; border-radius: 6px; padding: 16px; overflow-x: auto; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; font-size: 15px; margin: 0; }
dt { color: #6d685d; } dd { margin: 0; overflow-wrap: anywhere; } code { font-size: 14px; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #6d685d; } .soft { color: #8a8578; } .paired td { white-space: nowrap; }
sup { line-height: 0; }
.tag { color: #fff; border-radius: 9px; padding: 1px 9px; font-size: 13px; white-space: nowrap; }
@media (max-width: 600px) { main { padding: 28px 16px 60px; } h1 { font-size: 30px; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } }
"""

escape = html.escape


class Raw(str):
    """Text that is HTML already."""


def document(title: str, sections: Iterable[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Nothing where all parts are empty."""
    return f"<h2>{escape(title)}</h2>{''.join(parts)}" if any(parts) else ""


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def card(value: str, what: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


def figure(inner: str, caption: str) -> str:
    return f"<figure>{inner}<figcaption>{escape(caption)}</figcaption></figure>"


def image(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return figure(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">', caption)


def row(figures: Iterable[str], kind: str = "pair") -> str:
    """Two to a row, or with "few" up to four; one on a phone."""
    joined = "".join(figures)
    return f'<div class="{kind}">{joined}</div>' if joined else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of text, or Raw; kind "words" for what is no number."""

    def row(cells: Sequence[str], tag: str) -> str:
        shown = (cell if isinstance(cell, Raw) else escape(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table class="{kind}">{row(head, "th")}{body}</table></div>'


def terms(pairs: Mapping[str, object]) -> str:
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs.items())
    return f"<dl>{inner}</dl>"


def folded(summary: str, inner: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{inner}</details>"
