"""Samples of a run, drawn a part at a time and read by networks: shared by ranks through files, kept over a stop.

PLACE/inception-0-000003.safetensors     what network `inception` found in part 3 of repeat 0, written whole

Legend: n pictures, D features.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gesso import files
from gesso.config import Run
from gesso.errors import RunError
from gesso.evaluate.metrics import Moments
from gesso.evaluate.statistics import Seen, Statistics
from gesso.snapshot import Target

PART = 500
"""samples of a file"""
POLL = 2.0
"""seconds between looks for the parts of other ranks"""


class Work(NamedTuple):
    """What is measured, on this rank of `world`. average: of the weights, where not that of run.sample; it is not recorded."""

    folder: Path
    run: Run
    device: torch.device
    rank: int = 0
    world: int = 1
    average: Target | None = None


class Step(NamedTuple):
    """What is made of each of `count` numbers, seeds of samples among them, `repeats` times over: by name a file for each
    part of them. spare: the first rank also makes parts of others that none of them is at."""

    names: tuple[str, ...]
    count: int
    made: Callable[[range], dict[str, dict[str, Tensor]]]
    repeats: int = 1
    part: int | None = None
    """of a file, where not PART"""
    spare: bool = False
    first: int = 0
    """repeat that this step begins with, where another step has those before"""

    def cut(self) -> list[tuple[int, int, range]]:
        """(repeat, part, numbers): no number is in two repeats."""
        n, size = self.count, self.part or PART
        return [
            (repeat, part, range(repeat * n + first, repeat * n + min(first + size, n)))
            for repeat in range(self.first, self.repeats)
            for part, first in enumerate(range(0, n, size))
        ]

    def files(self, place: Path, name: str, repeat: int = 0) -> list[Path]:
        """Of one repeat, in order."""
        return [file_of(place, name, each, part) for each, part, _ in self.cut() if each == repeat]


def file_of(place: Path, name: str, repeat: int, part: int) -> Path:
    return place / f"{name}-{repeat}-{part:06d}.safetensors"


class Spent(NamedTuple):
    """On new samples by this rank, with what networks made of them. watts: where the device reports its power, at the end of
    each part."""

    images: int = 0
    seconds: float = 0.0
    watts: tuple[float, ...] = ()

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def speed(self) -> dict[str, float]:
        """Images a second of this rank, and milliwatt-hours an image; nothing where nothing was new."""
        if not self.images:
            return {}
        found = {"images_per_second": self.images / self.seconds}
        if self.watts:
            mean = sum(self.watts) / len(self.watts)
            found["milliwatt_hours"] = 1000 * mean * self.seconds / 3600 / self.images
        return found


def watts(device: torch.device) -> tuple[float, ...]:
    """Of the device, where it says so: a GPU with nvidia-ml-py beside torch."""
    try:
        return (torch.cuda.power_draw(device) / 1000,) if device.type == "cuda" else ()
    except (ImportError, RuntimeError):
        return ()


@torch.no_grad()
def in_parts(work: Work, step: Step, place: Path, seen: Seen) -> Spent:
    """Write the parts of this rank that are not there; the first rank waits for those of the others."""
    spent, parts = Spent(), [(some, _paths(place, step, *at)) for *at, some in step.cut()]
    for some, paths in parts[work.rank :: work.world]:
        spent += _make(work, step, some, paths)
        seen(len(some))
    started = time.monotonic()
    for some, paths in parts[::-1] if work.rank == 0 else ():
        while lacking := [path for path in paths.values() if not path.is_file()]:
            # Alone, what is lacking another command was at, which has ended since.
            mine = _make(work, step, some, paths) if step.spare or work.world == 1 else Spent()
            spent += mine
            if not mine.images:
                if not step.spare and time.monotonic() - started > work.run.eval.patience:
                    raise RunError(f"{lacking[0]} of another rank is not there after {work.run.eval.patience} seconds")
                time.sleep(POLL)
    return spent


def _paths(place: Path, step: Step, repeat: int, part: int) -> dict[str, Path]:
    return {name: file_of(place, name, repeat, part) for name in step.names}


def _make(work: Work, step: Step, some: range, paths: dict[str, Path]) -> Spent:
    """Write the files of a part, unless they are there or another rank is at it."""
    with files.claimed(next(iter(paths.values()))) as mine:
        if not mine or all(path.is_file() for path in paths.values()):
            return Spent()
        since = time.perf_counter()
        for name, tensors in step.made(some).items():
            with files.whole(paths[name]) as temporary:
                save_file(tensors, temporary)
        return Spent(len(some), time.perf_counter() - since, watts(work.device))


def gathered(paths: Sequence[Path]) -> Statistics:
    """Of the rows of all these parts, in order."""
    moments, rows = Moments(), []
    for path in paths:
        with safe_open(path, "pt") as file:
            rows.append(file.get_tensor("rows"))
        moments.update(rows[-1])
    return Statistics(moments, torch.cat(rows))
