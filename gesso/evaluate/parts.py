"""Samples of a run, drawn a part at a time and read by networks: shared by ranks through files, kept over a stop.

PLACE/inception-0-000003.safetensors     what network `inception` found in part 3 of repeat 0, written whole

Legend: n pictures, D features.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso import conditions, files, generate, keyed
from gesso.config import Run
from gesso.data.space import Space
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import RunError
from gesso.evaluate import compare
from gesso.evaluate.compare import Statistics, Told
from gesso.evaluate.metrics import Moments
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


class Prompt(NamedTuple):
    """A caption, and the class of the picture that it was written for."""

    caption: str
    label: int


def labels_of(run: Run, seeds: Sequence[int]) -> list[int] | None:
    """Classes of the samples of these seeds, where the run has any."""
    classes = run.inputs.num_classes
    if not classes or run.eval.labels == "turn":
        return [seed % classes for seed in seeds] if classes else None
    u = keyed.uniform(run.eval.seed, torch.tensor(list(seeds)), "label of a sample")[:, 0]
    return (u * classes).long().tolist()


def cut(images: int, repeats: int) -> list[tuple[int, int, range]]:
    """(repeat, part, seeds): no seed is in two repeats."""
    return [
        (repeat, part, range(repeat * images + first, repeat * images + min(first + PART, images)))
        for repeat in range(repeats)
        for part, first in enumerate(range(0, images, PART))
    ]


def file_of(place: Path, network: str, repeat: int, part: int) -> Path:
    return place / f"{network}-{repeat}-{part:06d}.safetensors"


class Drawer(NamedTuple):
    """What samples are drawn with."""

    work: Work
    denoiser: Denoiser
    guide: Denoiser | None
    space: Space
    prompts: Sequence[Prompt] | None
    rows: Tensor | None
    """control variables of training samples"""

    def images(self, seeds: Sequence[int], control: Mapping[str, str] | None = None) -> Iterator[tuple[Tensor, Told]]:
        """Batches of RGB samples (n, 3, H, W) uint8 on the device, and what they were told; control: what all are told."""
        run, labels, captions = self.work.run, labels_of(self.work.run, seeds), None
        if self.prompts is not None:
            prompts = [self.prompts[seed % len(self.prompts)] for seed in seeds]
            captions = [prompt.caption for prompt in prompts]
        cond, _ = conditions.build(run, seeds, self.rows, labels, captions, control)
        if captions is not None:
            labels = [prompt.label for prompt in prompts]
        at = 0
        for images in generate.generate(self.denoiser, run, seeds, cond, self.guide, self.space):
            some = slice(at, at + len(images))
            yield (
                images.expand(-1, 3, -1, -1).to(self.work.device),
                Told(labels and labels[some], captions and captions[some]),
            )
            at += len(images)


def embedded(drawer: Drawer, networks: dict[str, nn.Module], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Features of the samples of these seeds by every network."""
    rows: dict[str, list[Tensor]] = {name: [] for name in networks}
    for images, told in drawer.images(seeds):
        for name, network in networks.items():
            rows[name].append(compare.features_of(network, images, told))
    return {name: torch.cat(parts) for name, parts in rows.items()}


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
def in_parts(
    work: Work,
    names: Sequence[str],
    images: int,
    repeats: int,
    place: Path,
    made: Callable[[Sequence[int]], dict[str, Tensor]],
    seen: compare.Seen,
) -> Spent:
    """Write what is `made` of the seeds of each part that is not there; the first rank waits for those of the others."""
    place.mkdir(parents=True, exist_ok=True)
    parts, spent = cut(images, repeats), Spent()
    for repeat, part, seeds in parts[work.rank :: work.world]:
        paths = {name: file_of(place, name, repeat, part) for name in names}
        if not all(path.is_file() for path in paths.values()):
            since = time.perf_counter()
            for name, rows in made(seeds).items():
                with files.whole(paths[name]) as temporary:
                    save_file({"rows": rows}, temporary)
            spent += Spent(len(seeds), time.perf_counter() - since, watts(work.device))
        seen(len(seeds))
    started = time.monotonic()
    for repeat, part, _ in parts if work.rank == 0 else ():
        for name in names:
            while not (path := file_of(place, name, repeat, part)).is_file():
                if time.monotonic() - started > work.run.eval.patience:
                    raise RunError(f"{path} of another rank is not there after {work.run.eval.patience} seconds")
                time.sleep(POLL)
    return spent


def gathered(place: Path, network: str, images: int, repeat: int) -> Statistics:
    """Of all parts of one repeat, in order."""
    moments, rows = Moments(), []
    for _, part, _ in cut(images, 1):
        with safe_open(file_of(place, network, repeat, part), "pt") as file:
            rows.append(file.get_tensor("rows"))
        moments.update(rows[-1])
    return Statistics(moments, torch.cat(rows))
