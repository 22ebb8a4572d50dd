"""Text and tables in GitHub's Markdown."""

import re
from collections.abc import Sequence


def escape(text: str) -> str:
    """Escape a text for GitHub's Markdown."""
    return re.sub(r"([\\`*_<>|\[\]~$])", r"\\\1", text)


def to_markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return a table; cells are Markdown already, names are plain text."""
    ends = ["---"] + ["--:" if numbers else "---"] * (len(names) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in ([escape(name) for name in names], ends, *rows))
