"""The log file log.jsonl and the progress bar of a run."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gesso import atomic_io, untrusted
from gesso.errors import RunError
from gesso.training.trackers import Tracker, flatten_numbers

HARDWARE_KEYS = ("images_per_second", "data_wait_fraction", "mfu", "matmul_tflops", "peak_memory_gb", "slow_ranks")
"""Keys of log values that depend on the machine; all others are bit-equal when a run is repeated."""
MAX_LOG_BYTES = 2**30
"""Maximum size of a log."""


class RunLog:
    """Append lines, one JSON object each, to the log and pass them to trackers. Every line has the key nimg."""

    def __init__(self, path: Path):
        self.path = path
        self.trackers: list[Tracker] = []

    def rewind(self, nimg: int) -> None:
        """Delete lines after nimg images, which a resumed run logs again, and an incomplete last line."""
        if not self.path.exists():
            return
        lines = [line for line in read_log(self.path) if line["nimg"] <= nimg] if nimg else []
        atomic_io.write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, **values: Any) -> None:
        """Write one line."""
        atomic_io.append_text(self.path, json.dumps(values) + "\n")
        for tracker in self.trackers:
            tracker.write(values["nimg"], dict(flatten_numbers({k: v for k, v in values.items() if k != "nimg"})))

    def log_image(self, nimg: int, image: Image.Image) -> None:
        """Pass a sample grid to the trackers."""
        for tracker in self.trackers:
            tracker.log_image(nimg, image)

    def close(self) -> None:
        """Close the log and the trackers."""
        for tracker in self.trackers:
            tracker.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that are objects with nimg, so without an incomplete last line after a crash.

    Raises:
        RunError: It is no regular file, a symbolic link, or too large.
    """
    lines = []
    try:
        with open(untrusted.open_regular(path, follow_links=False), "rb") as file:
            while content := file.readline(untrusted.MAX_TEXT_BYTES):
                with contextlib.suppress(ValueError):
                    line = untrusted.parse_json(content)
                    if isinstance(line, dict) and type(line.get("nimg")) is int:
                        lines.append(line)
                if file.tell() > MAX_LOG_BYTES:
                    raise ValueError(f"it has more than {MAX_LOG_BYTES / 2**30:g} GiB")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): move it away") from None
    return lines


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return the rate as text."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f} img/s" if rate else "- img/s")


class ProgressBar:
    """Show images seen, images/s, loss and remaining time; without a terminal, print a line every 15 seconds.

    `callback` receives the number of finished and of all items at each update.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        start: int,
        title: str,
        callback: Callable[[int, int], None] | None = None,
    ):
        self.console, self.total, self.title, self.callback = console, total, untrusted.printable(title), callback
        self.is_interactive = console.is_terminal
        self.last_print_time = time.monotonic()
        if self.is_interactive:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,}"),
                _RateColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self.task = self.progress.add_task(self.title, total=total, completed=start, note="")

    def __enter__(self) -> "ProgressBar":
        if self.is_interactive:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_interactive:
            self.progress.stop()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Set the number of finished items; `total` if it becomes known later."""
        self.total = total or self.total
        if self.callback:
            self.callback(min(done, self.total), self.total)
        if self.is_interactive:
            self.progress.update(self.task, completed=min(done, self.total), total=self.total, note=note)
        elif time.monotonic() - self.last_print_time > 15:
            self.last_print_time = time.monotonic()
            untrusted.print_text(self.console, f"{self.title}: {done:,}/{self.total:,}  {note}")
