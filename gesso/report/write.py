"""Write the page on one or several run folders."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from gesso import atomic_io
from gesso.errors import UsageError
from gesso.report import page, several, single
from gesso.report.folder import opened


def write(folders: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write a page on a run, RUN/report.html, or on several, report.html here, and return its path.

    Raises UsageError when a folder holds no run or is named twice, or matplotlib is missing.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    runs = opened(folders)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("reports need matplotlib: pip install 'gesso[plots]'")
    if len(runs) == 1:
        target, title, sections = folders[0] / "report.html", runs[0].label, single.sections(runs[0])
    else:
        target, title, sections = Path("report.html"), several.title_of(runs), several.sections(runs)
    target = out or target
    atomic_io.write_text(target, page.document(f"{title} - gesso", sections))
    return target
