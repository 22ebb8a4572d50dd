"""OUT/README.md: the list of all pages of a folder."""

import json
import re
from pathlib import Path
from typing import Any

from gesso import atomic_io
from gesso.errors import UsageError
from gesso.reproduce.claims import Verdict
from gesso.reproduce.markdown import escape, to_markdown_table

INDEX_HEADER = "# Tables and figures"


def file_name(table: str, scale: str) -> str:
    """Return the stem of the files of a page: berrada/2a -> berrada-2a-tiny."""
    return f"{table.replace('/', '-')}-{scale}"


def list_results(out: Path) -> list[dict[str, Any]]:
    """Return the content of NAME-SCALE.json of all pages of a folder, in natural order of names."""
    pages = []
    for path in out.glob("*.json"):
        page = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(page, dict) and {"table", "scale", "claims", "checks", "settings"} <= page.keys():
            pages.append(page)
    return sorted(pages, key=lambda page: natural_key(f"{page['table']} {page['scale']}"))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts fig2 before fig11."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def count_verdicts(page: dict[str, Any]) -> str:
    """Return the verdicts of a page in words, such as "3 of 4 claims reproduced, 1 undecided"."""
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
    old = "; to be made again" if page.get("outdated") else ""
    return ", ".join(text) + ("; under other settings" if page["settings"] else "") + old


def index_path(out: Path) -> Path:
    """Return the path of the list. Raises UsageError if another README.md is there."""
    path = out / "README.md"
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(INDEX_HEADER):
        raise UsageError(
            f"{path} exists and was not written by gesso reproduce, which would replace it: choose another --out, such as "
            "--out tables"
        )
    return path


def write_index(out: Path) -> Path:
    """Write OUT/README.md, one line per page. Raises UsageError if another README.md is there."""
    rows = []
    for page in list_results(out):
        name = file_name(page["table"], page["scale"])
        seeds = "-" if page["checks"] else str(len(page["seeds"]))
        rows.append(
            (f"[{page['table']}]({name}.md)", escape(page["title"]), page["scale"], seeds, count_verdicts(page))
        )
    text = to_markdown_table(("table", "what it shows", "scale", "seeds", "claims"), rows)
    path = index_path(out)
    atomic_io.write_text(
        path, f"{INDEX_HEADER}\n\nEach is made by `gesso reproduce NAME`; its page describes the numbers.\n\n{text}\n"
    )
    return path
