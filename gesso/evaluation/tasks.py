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

from gesso import atomic_io
from gesso.config import RunConfig
from gesso.errors import RunError
from gesso.evaluation.feature_stats import FeatureStats, Progress
from gesso.evaluation.metrics.functional import Moments
from gesso.snapshot import TargetProfile

PART_SIZE = 500
"""samples of a file"""
POLL_INTERVAL_S = 2.0
"""seconds between looks for the parts of other ranks"""


class EvalContext(NamedTuple):
    """What is measured, on this rank of `world`. average: of the weights, where not that of run.sample; it is not recorded."""

    folder: Path
    run: RunConfig
    device: torch.device
    rank: int = 0
    world_size: int = 1
    ema_target: TargetProfile | None = None


class ShardedTask(NamedTuple):
    """What is made of each of `count` numbers, seeds of samples among them, `repeats` times over: by name a file for each
    part of them. spare: the first rank also makes parts of others that none of them is at."""

    names: tuple[str, ...]
    count: int
    compute: Callable[[range], dict[str, dict[str, Tensor]]]
    num_repeats: int = 1
    part_size: int | None = None
    """of a file, where not PART"""
    work_stealing: bool = False
    first_repeat: int = 0
    """repeat that this step begins with, where another step has those before"""

    def split(self) -> list[tuple[int, int, range]]:
        """(repeat, part, numbers): no number is in two repeats."""
        n, size = self.count, self.part_size or PART_SIZE
        return [
            (repeat, part, range(repeat * n + first, repeat * n + min(first + size, n)))
            for repeat in range(self.first_repeat, self.num_repeats)
            for part, first in enumerate(range(0, n, size))
        ]

    def part_files(self, parts_dir: Path, name: str, repeat: int = 0) -> list[Path]:
        """Of one repeat, in order."""
        return [part_file(parts_dir, name, each, part) for each, part, _ in self.split() if each == repeat]


def part_file(parts_dir: Path, name: str, repeat: int, part: int) -> Path:
    return parts_dir / f"{name}-{repeat}-{part:06d}.safetensors"


class Timing(NamedTuple):
    """On new samples by this rank, with what networks made of them. watts: where the device reports its power, at the end of
    each part."""

    num_images: int = 0
    seconds: float = 0.0
    power_w: tuple[float, ...] = ()

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def throughput(self) -> dict[str, float]:
        """Images a second of this rank, and milliwatt-hours an image; nothing where nothing was new."""
        if not self.num_images:
            return {}
        found = {"images_per_second": self.num_images / self.seconds}
        if self.power_w:
            mean = sum(self.power_w) / len(self.power_w)
            found["milliwatt_hours"] = 1000 * mean * self.seconds / 3600 / self.num_images
        return found


def power_draw(device: torch.device) -> tuple[float, ...]:
    """Of the device, where it says so: a GPU with nvidia-ml-py beside torch."""
    try:
        return (torch.cuda.power_draw(device) / 1000,) if device.type == "cuda" else ()
    except (ImportError, RuntimeError):
        return ()


@torch.no_grad()
def run_task(context: EvalContext, task: ShardedTask, parts_dir: Path, progress: Progress) -> Timing:
    """Write the parts of this rank that are not there; the first rank waits for those of the others."""
    spent, parts = Timing(), [(some, _part_files(parts_dir, task, *at)) for *at, some in task.split()]
    for some, paths in parts[context.rank :: context.world_size]:
        spent += _compute_part(context, task, some, paths)
        progress(len(some))
    started = time.monotonic()
    for some, paths in parts[::-1] if context.rank == 0 else ():
        while lacking := [path for path in paths.values() if not path.is_file()]:
            # Alone, what is lacking another command was at, which has ended since.
            mine = (
                _compute_part(context, task, some, paths) if task.work_stealing or context.world_size == 1 else Timing()
            )
            spent += mine
            if not mine.num_images:
                if not task.work_stealing and time.monotonic() - started > context.run.eval.rank_timeout_s:
                    raise RunError(
                        f"{lacking[0]} of another rank is not there after {context.run.eval.rank_timeout_s} seconds"
                    )
                time.sleep(POLL_INTERVAL_S)
    return spent


def _part_files(parts_dir: Path, task: ShardedTask, repeat: int, part: int) -> dict[str, Path]:
    return {name: part_file(parts_dir, name, repeat, part) for name in task.names}


def _compute_part(context: EvalContext, task: ShardedTask, indices: range, paths: dict[str, Path]) -> Timing:
    """Write the files of a part, unless they are there or another rank is at it."""
    with atomic_io.try_lock(next(iter(paths.values()))) as mine:
        if not mine or all(path.is_file() for path in paths.values()):
            return Timing()
        since = time.perf_counter()
        for name, tensors in task.compute(indices).items():
            with atomic_io.atomic_file(paths[name]) as temporary:
                save_file(tensors, temporary)
        return Timing(len(indices), time.perf_counter() - since, power_draw(context.device))


def load_features(paths: Sequence[Path]) -> FeatureStats:
    """Of the rows of all these parts, in order."""
    moments, rows = Moments(), []
    for path in paths:
        with safe_open(path, "pt") as file:
            rows.append(file.get_tensor("rows"))
        moments.update(rows[-1])
    return FeatureStats(moments, torch.cat(rows))
