"""log.jsonl, and what the terminal shows of a run."""

import json
import os
import time
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gesso import atomic_io
from gesso.training.trackers import Tracker, flatten_numbers

HARDWARE_KEYS = ("images_per_second", "waiting", "utilisation", "product_teraflops", "peak_gigabytes", "slow_ranks")
"""what a line says of the machine: all else is equal to the last bit when a run is repeated"""


class RunLog:
    """One JSON object a line, appended and flushed, and passed on to trackers. Lines with `nimg` belong to that time."""

    def __init__(self, path: Path):
        self.path = path
        self.trackers: list[Tracker] = []

    def rewind(self, nimg: int) -> None:
        """Drop what was logged after nimg images (a resumed run logs it again; all of it from 0), and a torn line."""
        if not self.path.exists():
            return
        kept = [line for line in read_log(self.path) if line["nimg"] <= nimg] if nimg else []
        atomic_io.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        with atomic_io.disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for tracker in self.trackers:
            tracker.write(values["nimg"], dict(flatten_numbers({k: v for k, v in values.items() if k != "nimg"})))

    def log_image(self, nimg: int, image: Image.Image) -> None:
        for tracker in self.trackers:
            tracker.log_image(nimg, image)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a crash cut short."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f} img/s" if rate else "- img/s")


class ProgressBar:
    """Images seen, images/s, loss and time left; plain lines now and then where there is no terminal."""

    def __init__(self, console: Console, total: int, start: int, title: str):
        self.console, self.total, self.title = console, total, title
        self.is_interactive = console.is_terminal
        self.last_print_time = time.monotonic()
        if self.is_interactive:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,}"),
                _RateColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self.task = self.progress.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> "ProgressBar":
        if self.is_interactive:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_interactive:
            self.progress.stop()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """`total` where it is only known on the way."""
        self.total = total or self.total
        if self.is_interactive:
            self.progress.update(self.task, completed=min(done, self.total), total=self.total, note=note)
        elif time.monotonic() - self.last_print_time > 15:
            self.last_print_time = time.monotonic()
            self.console.print(f"{self.title}: {done:,}/{self.total:,}  {note}", highlight=False)
