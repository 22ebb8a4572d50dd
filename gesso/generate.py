"""The only way images are made: weights, seeds and conditions in, uint8 images out.

An image depends on its seed, its condition and the sampler's settings, not on the batch it is in.

Legend: N images, C channels, R resolution.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gesso import config, files, keyed, snapshot
from gesso.cond import Cond
from gesso.config import Run
from gesso.config.base import parse_count
from gesso.data.images import to_uint8
from gesso.diffusion.denoiser import Denoiser
from gesso.diffusion.guidance import cfg_terms, combine
from gesso.diffusion.sampler import SAMPLERS
from gesso.errors import UsageError


def generate(denoiser: Denoiser, run: Run, seeds: Sequence[int], labels: Sequence[int] | None) -> Iterator[Tensor]:
    """Batches of images (n, C, R, R) uint8 on the CPU, in the order of `seeds`, by the settings of run.sample.

    seeds and labels have length N; a label equal to run.data.num_classes means none; labels None: no
    class anywhere. Raises UsageError for a label or a number of steps that the run does not have.
    """
    cfg, data, process = run.sample, run.data, denoiser.process
    if labels is not None:
        check_labels(run, labels)
    try:
        levels = process.levels(cfg.steps)
    except ValueError as error:
        raise UsageError(f"sample.steps={cfg.steps}: {error}") from None
    device = next(denoiser.parameters()).device
    dtype = next(denoiser.parameters()).dtype
    shape = (data.channels, data.resolution, data.resolution)
    for start in range(0, len(seeds), cfg.batch_size):
        chunk = slice(start, start + cfg.batch_size)
        seed = torch.tensor(seeds[chunk], dtype=torch.int64, device=device)
        cond = Cond() if labels is None else Cond(label=torch.tensor(labels[chunk], device=device))
        guidance = cfg.guidance if labels is not None else 1.0
        denoise = combine(cfg_terms(denoiser, cond, guidance))
        x = process.prior(keyed.normal(0, seed, "first noise", shape, dtype), levels[0])
        x = SAMPLERS[cfg.sampler](denoise, x, levels, None)
        yield to_uint8(x, data, process.sd).cpu()


def check_labels(run: Run, labels: Sequence[int]) -> None:
    """Raise UsageError for a label that the run does not have."""
    classes = run.data.num_classes
    if not classes:
        raise UsageError("this run was trained without classes: it takes no label")
    wrong = sorted({label for label in labels if not 0 <= label <= classes})
    if wrong:
        raise UsageError(
            f"label {wrong[0]} is out of range: the run has labels 0 to {classes - 1} (and {classes} for none)"
        )


def spread(run: Run, n: int) -> list[int] | None:
    """n labels that go round all classes; None when the run has no classes."""
    return [i % run.data.num_classes for i in range(n)] if run.data.num_classes else None


def grid(images: Tensor, columns: int, tile: int = 48) -> Image.Image:
    """One picture of images (N, C, R, R) uint8, row by row; small ones are enlarged to about `tile` pixels."""
    n, channels, height, width = images.shape
    zoom, gap = max(1, round(tile / height)), 2
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, channels), 255, np.uint8
    )
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(zoom, 1).repeat(zoom, 2)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height * zoom + gap) + gap, (i % columns) * (width * zoom + gap) + gap
        canvas[top : top + height * zoom, left : left + width * zoom] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def save_png(image: Image.Image, path: Path) -> None:
    with files.whole(path) as temporary:
        image.save(temporary, format="png")


def picture(image: Tensor) -> Image.Image:
    """One image (C, R, R) uint8 at its own size."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def numbers(text: str, what: str) -> list[int]:
    """0-3,7 -> [0, 1, 2, 3, 7]. Raises UsageError that names `what`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"{what} {text!r}: write numbers such as 0-15 or 1,5,9")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def labels_for(run: Run, text: str | None, n: int) -> list[int] | None:
    """n labels that go round those in `text` (numbers, ranges, class names); round all when None."""
    if text is None:
        return spread(run, n)
    names = list(run.data.class_names or ())
    if not names:
        check_labels(run, [])
    chosen: list[int] = []
    for part in text.split(","):
        if part in names:
            chosen.append(names.index(part))
        elif part[:1].isdigit():
            chosen += numbers(part, "--label")
        else:
            raise UsageError(f"--label {part!r}: no such class; {config.nearest(part, names)}")
    check_labels(run, chosen)
    return [chosen[i % len(chosen)] for i in range(n)]


def draw(folder: Path, run: Run, label: str | None, seeds: str, nimg: str | None, out: Path | None) -> list[str]:
    """Images of a run as PNG files and one picture of all; returns what to tell the user."""
    seed_list = numbers(seeds, "--seeds")
    labels = labels_for(run, label, len(seed_list))
    weights, _, time, _ = snapshot.synthesize(folder, [run.sample.sigma_rel], _time(nimg))
    denoiser = snapshot.denoiser(weights[0], run, device_of(run))
    made = torch.cat(list(generate(denoiser, run, seed_list, labels)))
    cfg = run.sample
    name = f"label{label}-" if label else ""
    target = out or folder / "samples" / f"{name}guidance{cfg.guidance:g}-ema{cfg.sigma_rel:g}-{cfg.sampler}{cfg.steps}"
    for seed, image in zip(seed_list, made, strict=True):
        save_png(picture(image), target / f"seed{seed:06d}.png")
    save_png(grid(made, columns=min(len(made), max(4, round(len(made) ** 0.5)))), target / "grid.png")
    how = f"{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, sigma_rel {cfg.sigma_rel:g}, image {time:,}"
    return [f"wrote {len(made)} images and grid.png to {target}", f"  {how}"]


def _time(nimg: str | None) -> int | None:
    value = parse_count(nimg) if nimg else None
    if value is not None and not isinstance(value, int):
        raise UsageError(f"--nimg {nimg!r}: write a number of images such as 100k")
    return value


def device_of(run: Run) -> torch.device:
    """The device that run.train.device names. Raises UsageError when it cannot be used here."""
    name = run.train.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"train.device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
