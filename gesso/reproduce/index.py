"""The list of all pages of a folder, OUT/README.md."""

import re
from pathlib import Path
from typing import Any

from gesso import atomic_io
from gesso.errors import UsageError
from gesso.reproduce.claims import Verdict
from gesso.reproduce.markdown import escape, to_markdown_table
from gesso.untrusted import read_json

INDEX_HEADER = "# Tables and figures"


def file_stem(table: str, scale: str) -> str:
    """Return the stem of the files of a page, such as berrada-2a-tiny of berrada/2a."""
    return f"{table.replace('/', '-')}-{scale}"


def list_results(out: Path) -> list[dict[str, Any]]:
    """Return the content of NAME-SCALE.json of all pages of a folder, in natural order of names."""
    pages = []
    for path in out.glob("*.json"):
        try:
            page = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(page, dict) and {"table", "scale", "claims", "checks", "settings"} <= page.keys():
            pages.append(page)
    return sorted(pages, key=lambda page: natural_key(f"{page['table']} {page['scale']}"))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts fig2 before fig11."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def count_verdicts(page: dict[str, Any]) -> str:
    """Return the verdicts of a page as text, such as "3 of 4 claims reproduced, 1 undecided"."""
    verdicts = [entry["verdict"] for entry in page["claims"] or page["checks"]]
    if not verdicts:
        return "no claims"
    exact, failed = (verdicts.count(verdict) for verdict in (Verdict.EXACT, Verdict.FAILED))
    text = [f"{exact} of {exact + failed} exact checks pass"] if exact + failed else []
    tested = len(verdicts) - exact - failed
    if tested:
        label = "claims" if page["claims"] else "checks"
        text.append(f"{verdicts.count(Verdict.REPRODUCED)} of {tested} {label} reproduced")
    others = (Verdict.CONTRADICTED, Verdict.UNDECIDED, Verdict.TOO_FEW_SEEDS, Verdict.NOT_MEASURED)
    text += [f"{verdicts.count(kind)} {kind}" for kind in others if kind in verdicts]
    settings = "; with other settings" if page["settings"] else ""
    return ", ".join(text) + settings + ("; to be made again" if page.get("outdated") else "")


def index_path(out: Path) -> Path:
    """Return the path of the list.

    Raises:
        UsageError: The folder has a README.md that gesso did not write.
    """
    path = out / "README.md"
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(INDEX_HEADER):
        raise UsageError(
            f"{path} was not written by gesso reproduce, which would replace it: choose another folder, such as --out tables"
        )
    return path


def write_index(out: Path) -> Path:
    """Write the list of pages, one line per page; return its path.

    Raises:
        UsageError: The folder has a README.md that gesso did not write.
    """
    path = index_path(out)
    rows = []
    for page in list_results(out):
        link = f"[{page['table']}]({file_stem(page['table'], page['scale'])}.md)"
        seeds = "-" if page["checks"] else str(len(page["seeds"]))
        rows.append((link, escape(page["title"]), page["scale"], seeds, count_verdicts(page)))
    table = to_markdown_table(("table", "title", "scale", "seeds", "claims"), rows)
    text = f"{INDEX_HEADER}\n\n`gesso reproduce NAME` writes a page; the page describes its numbers.\n\n{table}\n"
    atomic_io.write_text(path, text)
    return path
