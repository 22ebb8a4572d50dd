"""Sharded tasks: features of items in parts, one file for each, shared by ranks and kept when a command is stopped.

FOLDER/inception-0-000003.safetensors     features under network `inception` of part 3 of repeat 0, written atomically

Legend: n items, D features.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso import atomic_io
from gesso.config import RunConfig
from gesso.errors import RunError
from gesso.evaluation.feature_stats import FeatureStats, Progress, features_to_stats
from gesso.safetensors_io import read_tensors
from gesso.snapshot import TargetProfile

PART_SIZE = 500
"""Samples in a file."""
POLL_INTERVAL_S = 2.0
"""Seconds between checks for the parts of other ranks."""


class EvalContext(NamedTuple):
    """One evaluation on one of `world_size` ranks.

    Attributes:
        folder: Run folder.
        run: Settings.
        device: Device.
        rank: This rank.
        world_size: Number of ranks that share the work.
        ema_target: EMA of the weights, if it is not that of run.sample; such an evaluation is not recorded.
    """

    folder: Path
    run: RunConfig
    device: torch.device
    rank: int = 0
    world_size: int = 1
    ema_target: TargetProfile | None = None


class ShardedTask(NamedTuple):
    """Computation over items 0 to num_items - 1 (seeds, pairs, images), repeated, in parts.

    Attributes:
        num_repeats: Number of repeats of each output, by name; repeat r has items r * num_items and following.
        num_items: Number of items of a repeat.
        compute: Function of items and names; returns the tensors of each name.
        part_size: Items in a file; None: PART_SIZE.
        work_stealing: The first rank also computes parts of other ranks that none is working on.
    """

    num_repeats: Mapping[str, int]
    num_items: int
    compute: Callable[[range, Sequence[str]], dict[str, dict[str, Tensor]]]
    part_size: int | None = None
    work_stealing: bool = False

    @property
    def total_items(self) -> int:
        """Number of items of all repeats."""
        return self.num_items * max(self.num_repeats.values())

    def split(self, parts_dir: Path) -> list[tuple[range, dict[str, Path]]]:
        """Return the items and the files by name of every part."""
        n, size = self.num_items, self.part_size or PART_SIZE
        return [
            (
                range(repeat * n + first, repeat * n + min(first + size, n)),
                {k: _part_file(parts_dir, k, repeat, part) for k, count in self.num_repeats.items() if repeat < count},
            )
            for repeat in range(max(self.num_repeats.values()))
            for part, first in enumerate(range(0, n, size))
        ]

    def part_files(self, parts_dir: Path, name: str, repeat: int = 0) -> list[Path]:
        """Return the files of one repeat, in order."""
        num_parts = -(-self.num_items // (self.part_size or PART_SIZE))
        return [_part_file(parts_dir, name, repeat, part) for part in range(num_parts)]


def _part_file(parts_dir: Path, name: str, repeat: int, part: int) -> Path:
    return parts_dir / f"{name}-{repeat}-{part:06d}.safetensors"


class Timing(NamedTuple):
    """Time that this rank spent on new samples. power_w: power of the device at the end of each part, if known."""

    num_images: int = 0
    seconds: float = 0.0
    power_w: tuple[float, ...] = ()

    def add(self, other: "Timing") -> "Timing":
        """Return the sum of two timings."""
        return Timing(self.num_images + other.num_images, self.seconds + other.seconds, self.power_w + other.power_w)

    def throughput(self) -> dict[str, float]:
        """Return images per second and milliwatt-hours per image; empty if there were no new samples."""
        if not self.num_images:
            return {}
        result = {"images_per_second": self.num_images / self.seconds}
        if self.power_w:
            mean = sum(self.power_w) / len(self.power_w)
            result["milliwatt_hours"] = 1000 * mean * self.seconds / 3600 / self.num_images
        return result


def power_draw(device: torch.device) -> tuple[float, ...]:
    """Return the power of a GPU in watts; empty if nvidia-ml-py is missing or the device does not report it."""
    try:
        return (torch.cuda.power_draw(device) / 1000,) if device.type == "cuda" else ()
    except (ImportError, RuntimeError):
        return ()


@torch.no_grad()
def run_task(context: EvalContext, task: ShardedTask, parts_dir: Path, progress: Progress) -> Timing:
    """Write the missing parts of this rank; the first rank then waits for those of the others.

    Raises:
        RunError: Another rank has not written its part after eval.rank_timeout_s.
    """
    timing, parts = Timing(), task.split(parts_dir)
    for items, paths in parts[context.rank :: context.world_size]:
        timing = timing.add(_compute_part(context, task, items, paths))
        progress(len(items))
    started, timeout = time.monotonic(), context.run.eval.rank_timeout_s
    for items, paths in parts[::-1] if context.rank == 0 else ():
        while missing := [path for path in paths.values() if not path.is_file()]:
            # With one rank, a missing part was locked by another command, which has ended since.
            steal = task.work_stealing or context.world_size == 1
            new = _compute_part(context, task, items, paths) if steal else Timing()
            timing = timing.add(new)
            if not new.num_images:
                if not task.work_stealing and time.monotonic() - started > timeout:
                    raise RunError(
                        f"{missing[0]} of another rank is missing after {timeout} seconds: run the command again, or "
                        "set eval.rank_timeout_s higher"
                    )
                time.sleep(POLL_INTERVAL_S)
    return timing


def _compute_part(context: EvalContext, task: ShardedTask, items: range, paths: dict[str, Path]) -> Timing:
    """Write the files of a part, unless they exist or another process has locked it."""
    with atomic_io.try_lock(next(iter(paths.values()))) as locked:
        if not locked or all(path.is_file() for path in paths.values()):
            return Timing()
        started = time.perf_counter()
        for name, tensors in task.compute(items, list(paths)).items():
            with atomic_io.atomic_file(paths[name]) as temporary:
                save_file(tensors, temporary)
        return Timing(len(items), time.perf_counter() - started, power_draw(context.device))


def load_features(paths: Sequence[Path]) -> FeatureStats:
    """Return the statistics of the features in files, in order."""
    parts = []
    for path in paths:
        tensors = read_tensors(path)
        if "rows" not in tensors:
            raise RunError(f"{path} is damaged: it has no features; delete it and run again")
        parts.append(tensors["rows"])
    return features_to_stats(parts)
