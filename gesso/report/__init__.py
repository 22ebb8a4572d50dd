"""Self-contained HTML pages about one run, or about several runs in comparison."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from gesso import atomic_io
from gesso.errors import RunError, UsageError, install_command
from gesso.report import compare, single
from gesso.report.load import load_runs
from gesso.report.render import render_page

__all__ = ["write_report"]


def write_report(folders: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write a page about one run or several runs.

    Args:
        folders: Run folders.
        out: Path of the page; RUN/report.html (one run) or ./report.html (several runs) by default.

    Returns:
        The path of the page.

    Raises:
        UsageError: A folder has no trained run or is given twice, or matplotlib is missing.
        RunError: A file of a run is damaged.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    runs = load_runs(folders)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"reports need matplotlib: {install_command('plots')}")
    try:
        if len(runs) == 1:
            target, title = folders[0] / "report.html", runs[0].label
            text = render_page("single.html", title, single.page_context(runs[0]))
        else:
            target, title = Path("report.html"), compare.page_title(runs)
            text = render_page("compare.html", title, compare.page_context(runs))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"log.jsonl or metrics.json of {', '.join(map(str, folders))} has values that gesso did not write "
            f"({type(error).__name__}: {error}): move it away"
        ) from error
    target = out or target
    atomic_io.write_text(target, text)
    return target
