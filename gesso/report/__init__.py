"""One self-contained HTML page on a run, or on several beside each other, from the files in their folders."""

from gesso.report.write import write

__all__ = ["write"]
