"""The list of all claims of a folder, by paper: OUT/README.md, with a plot of their effects, OUT/effects-PAPER.svg."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso import atomic_io
from gesso.errors import UsageError
from gesso.report.render import render_template
from gesso.reproduce.claims import Verdict
from gesso.reproduce.markdown import EMPTY, escape, format_effect, format_table_cell, to_markdown_table
from gesso.untrusted import read_json

INDEX_HEADER = "# Reproduction results"
TEMPLATES = Path(__file__).parent / "templates"
PAPER_TITLES = {
    "berrada": "Berrada et al. 2024, On Improved Conditioning Mechanisms and Pre-training Strategies for Diffusion "
    "Models",
    "edm2": "Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models",
    "gesso": "Experiments of this project, in neither paper",
}
VERDICT_COLORS: dict[str, str] = {
    Verdict.REPRODUCED: "#4f7a3a",
    Verdict.EXACT: "#4f7a3a",
    Verdict.CONTRADICTED: "#a33a2a",
    Verdict.FAILED: "#a33a2a",
    Verdict.UNDECIDED: "#a9761a",
    Verdict.TOO_FEW_SEEDS: "#6d7f8c",
    Verdict.NOT_MEASURED: "#a19b8f",
}
VERDICT_COUNTS = {
    Verdict.REPRODUCED: "{} reproduced",
    Verdict.CONTRADICTED: "{} contradicted",
    Verdict.UNDECIDED: "{} undecided",
    Verdict.EXACT: "{} exact checks pass",
    Verdict.FAILED: "{} exact checks fail",
    Verdict.TOO_FEW_SEEDS: "{} without enough seeds",
    Verdict.NOT_MEASURED: "{} not measured",
}
"""Text of the number of claims with a verdict, in the order in which they are shown."""
OPEN_VERDICTS = (Verdict.TOO_FEW_SEEDS, Verdict.NOT_MEASURED)
PLOTTED_VERDICTS = (Verdict.REPRODUCED, Verdict.CONTRADICTED, Verdict.UNDECIDED)
AXIS_LIMITS = (0.1, 0.25, 0.5, 1.0)
"""Limits of the axis of relative effects. Larger effects are drawn at the edge."""


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


def count_verdicts(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdicts of claims or checks as text, such as "3 reproduced, 1 undecided"."""
    counts = Counter(entry["verdict"] for entry in entries)
    texts = (text.format(counts[verdict]) for verdict, text in VERDICT_COUNTS.items() if counts[verdict])
    return ", ".join(texts) or "no claims"


def describe_page(page: Mapping[str, Any]) -> str:
    """Return the verdicts of a page, and whether it has other settings or must be made again, as text."""
    settings = "; with other settings" if page["settings"] else ""
    return count_verdicts(page["claims"] or page["checks"]) + settings + ("; outdated" if page.get("outdated") else "")


def index_path(out: Path) -> Path:
    """Return the path of the list.

    Raises:
        UsageError: The folder has a README.md that gesso did not write.
    """
    path = out / "README.md"
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(INDEX_HEADER):
        raise UsageError(
            f"{path} was not written by gesso reproduce, which would replace it: choose another folder, such as "
            "--out tables"
        )
    return path


class ClaimLine(NamedTuple):
    """A claim on its page, as stored in NAME-SCALE.json."""

    page: Mapping[str, Any]
    claim: Mapping[str, Any]

    @property
    def relative_effect(self) -> float | None:
        """Effect as a fraction of the largest compared number; None where this is not defined."""
        effect = self.claim["relative"][0]
        return None if effect is None or not math.isfinite(effect) else effect

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the claim in the list."""
        claim, n = self.claim, self.claim["seeds"]
        is_exact = claim["verdict"] in (Verdict.EXACT, Verdict.FAILED)
        return (
            escape(claim["text"]),
            format_table_cell(format_relative(claim["effect"], claim["relative"]) if n and not is_exact else EMPTY),
            format_table_cell(
                EMPTY
                if is_exact
                else format_relative(claim["published_effect"], [claim["relative_published"], None, None])
            ),
            format_table_cell(claim["verdict"], bold=True),
            EMPTY if is_exact or not n else str(n),
            EMPTY if is_exact else format_minutes(self.page["total_minutes"]),
            page_link(self.page),
        )


def format_relative(effect: float | str | None, relative: Sequence[float | None]) -> str:
    """Return a relative effect in percent with its bounds; without one, whether a training diverged."""
    if effect is not None and math.isinf(float(effect)):
        return format_effect(float(effect))
    percent = [None if value is None else 100 * value for value in relative]
    text = format_effect(*percent, unit=".2g" if percent[0] and abs(percent[0]) < 10 else ".0f")
    return (
        text
        if text == EMPTY
        else text.replace(" to ", " % to ").replace(" (", " % (").replace(")", " %)") + ("" if "(" in text else " %")
    )


def format_minutes(minutes: float) -> str:
    """Return a duration, such as "12 min" or "3.4 h"."""
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def page_link(page: Mapping[str, Any]) -> str:
    """Return a link to a page in Markdown, with a mark if it must be made again."""
    return f"[{page['table']}]({file_stem(page['table'], page['scale'])}.md)" + (" *" if page["outdated"] else "")


def write_index(out: Path) -> Path:
    """Write the list of claims, one line each, and the plots of their effects; return the path of the list.

    Raises:
        UsageError: The folder has a README.md that gesso did not write.
    """
    path, pages = index_path(out), list_results(out)
    names = dict.fromkeys(page["table"].partition("/")[0] for page in pages)
    papers = [paper_context(out, paper, [p for p in pages if p["table"].startswith(f"{paper}/")]) for paper in names]
    context = {"header": INDEX_HEADER, "papers": papers, "has_plan": (out / "plan.md").is_file()}
    text = render_template(TEMPLATES / "index.md", context, {"md": escape})
    atomic_io.write_text(path, re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")
    return path


def paper_context(out: Path, paper: str, pages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the plot of a paper; return the variables of its section in index.md."""
    lines = [ClaimLine(page, claim) for page in pages for claim in page["claims"]]
    decided = [line for line in lines if line.claim["verdict"] not in OPEN_VERDICTS]
    others = [line for line in lines if line.claim["verdict"] in OPEN_VERDICTS]
    plotted = [
        line for line in decided if line.claim["verdict"] in PLOTTED_VERDICTS and line.relative_effect is not None
    ]
    plot = f"effects-{paper}.svg"
    if plotted:
        atomic_io.write_text(out / plot, effects_svg(plotted))
    return {
        "title": PAPER_TITLES.get(paper, paper),
        "summary": count_verdicts([line.claim for line in lines]),
        "plot": plot if plotted else "",
        "claims_table": claims_table(decided) if decided else "",
        "num_others": len(others),
        "others_table": claims_table(others),
        "other_pages": [
            (page_link(page), page["title"], describe_page(page) if page["checks"] else "")
            for page in pages
            if not page["claims"]
        ],
    }


def claims_table(lines: Sequence[ClaimLine]) -> str:
    """Return claims as a table in Markdown."""
    header = ("claim", "effect", "effect in the paper", "verdict", "seeds", "cost of the page", "page")
    return to_markdown_table(header, [line.cells() for line in lines])


def effects_svg(lines: Sequence[ClaimLine]) -> str:
    """Return a plot of the relative effects of claims with their bounds, and of those in the paper's numbers."""
    largest = max(abs(line.relative_effect or 0.0) for line in lines)
    limit = next((limit for limit in AXIS_LIMITS if limit >= largest), AXIS_LIMITS[-1])

    def position(value: float | None) -> float | None:
        """Return the position on the axis from -1 to 1."""
        return None if value is None or math.isnan(value) else max(-1.0, min(1.0, value / limit))

    rows = []
    for line in lines:
        effect, low, high = map(position, line.claim["relative"])
        rows.append(
            {
                "label": line.claim["text"],
                "table": line.page["table"],
                "color": VERDICT_COLORS[line.claim["verdict"]],
                "effect": effect,
                "bounds": None if low is None or high is None else (low, high),
                "paper": position(line.claim["relative_published"]),
            }
        )
    ticks = [(i / 2, f"{50 * i * limit:+g} %" if i else "0") for i in range(-2, 3)]
    colors = [(str(verdict), VERDICT_COLORS[verdict]) for verdict in PLOTTED_VERDICTS]
    return render_template(TEMPLATES / "effects.svg", {"rows": rows, "ticks": ticks, "colors": colors}) + "\n"
