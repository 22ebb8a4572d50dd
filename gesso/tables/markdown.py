"""Text and tables in GitHub's Markdown."""

import re
from collections.abc import Sequence


def escaped(text: str) -> str:
    """For GitHub's Markdown."""
    return re.sub(r"([\\`*_<>|\[\]~$])", r"\\\1", text)


def grid(names: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Of cells that are Markdown; names are plain."""
    ends = ["---"] + ["--:" if numbers else "---"] * (len(names) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in ([escaped(name) for name in names], ends, *rows))
