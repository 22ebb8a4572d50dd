"""WHERE/README.md: the list of all pages that are there."""

import json
import re
from pathlib import Path
from typing import Any

from gesso import files
from gesso.errors import UsageError
from gesso.tables.claims import Verdict
from gesso.tables.markdown import escaped, grid

HEAD = "# Tables and figures"


def file_name(table: str, scale: str) -> str:
    """berrada/2a -> berrada-2a-tiny, of the files of a page."""
    return f"{table.replace('/', '-')}-{scale}"


def made(where: Path) -> list[dict[str, Any]]:
    """What NAME-SCALE.json of all pages of a folder hold, in the order of their names."""
    found = []
    for path in where.glob("*.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told, dict) and {"table", "scale", "claims", "checks", "settings"} <= told.keys():
            found.append(told)
    return sorted(found, key=lambda one: natural(f"{one['table']} {one['scale']}"))


def natural(name: str) -> list[tuple[int, int, str]]:
    """fig2 before fig11."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def counted(found: dict[str, Any]) -> str:
    """Verdicts of a page: 3 of 4 claims reproduced, 1 undecided."""
    verdicts = [each["verdict"] for each in found["claims"] or found["checks"]]
    if not verdicts:
        return "no claims"
    exact, failed = (verdicts.count(verdict) for verdict in (Verdict.EXACT, Verdict.FAILED))
    text = [f"{exact} of {exact + failed} exact checks pass"] if exact + failed else []
    tested = len(verdicts) - exact - failed
    if tested:
        label = "claims" if found["claims"] else "checks"
        text.append(f"{verdicts.count(Verdict.REPRODUCED)} of {tested} {label} reproduced")
    others = (Verdict.CONTRADICTED, Verdict.UNDECIDED, Verdict.TOO_FEW_SEEDS, Verdict.NOT_MEASURED)
    text += [f"{verdicts.count(kind)} {kind}" for kind in others if kind in verdicts]
    old = "; to be made again" if found.get("outdated") else ""
    return ", ".join(text) + ("; under other settings" if found["settings"] else "") + old


def place(where: Path) -> Path:
    """Where the list goes. Raises UsageError where another README.md is."""
    path = where / "README.md"
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(HEAD):
        raise UsageError(
            f"{path} is there and not of gesso table, which writes one: choose another --out, such as --out tables"
        )
    return path


def index(where: Path) -> Path:
    """Write WHERE/README.md: a line for every page there. Raises UsageError where another README.md is."""
    rows = []
    for one in made(where):
        name = file_name(one["table"], one["scale"])
        seeds = "-" if one["checks"] else str(len(one["seeds"]))
        rows.append((f"[{one['table']}]({name}.md)", escaped(one["title"]), one["scale"], seeds, counted(one)))
    told = grid(("table", "what it shows", "scale", "seeds", "claims"), rows)
    path = place(where)
    files.write_text(
        path, f"{HEAD}\n\nEach made by `gesso table NAME`; its page says what the numbers are.\n\n{told}\n"
    )
    return path
