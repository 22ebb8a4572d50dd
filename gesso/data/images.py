"""Sources of images: scikit-learn's digits, drawn shapes, or a folder whose sub-folders are the classes.

Legend: N images, C channels, R resolution; pixels are uint8.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from gesso.config import Data
from gesso.data import crops, shapes
from gesso.errors import RunError, UsageError

DIGITS = {
    "digits": "scikit-learn's scans",
    "digits-coarse": "every second of them shrunk to 4x4 and back, its size then being 4x4",
}
SHAPES = {
    "shapes": "drawings of one or two shapes, with captions",
    "shapes-class": "drawings of one shape, whose kind is the class",
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Images:
    """A whole source in memory.

    pixels (N, C, R, R) uint8; labels (N,) int64; class_names empty when there are no labels; sizes (N, 2) int64,
    height and width of the whole image; captions of each; unreadable (file, reason) of images that were left
    out; notes for the user.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    sizes: Tensor
    captions: tuple[str, ...]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        digest.update(json.dumps([self.captions, self.sizes.tolist()]).encode())
        return digest.hexdigest()[:16]


def load(data: Data, progress: Callable[[int, int], None] = lambda done, total: None) -> Images:
    """Read the source that `data` names. `progress(done, total)` is called as images are decoded.

    Raises UsageError when the source is missing, empty or of another shape; RunError when too many
    images are unreadable.
    """
    if data.source in DIGITS:
        return _digits(data)
    if data.source in SHAPES:
        return _shapes(data, progress)
    return _folder(data, progress)


def described(data: Data, images: Images) -> Data:
    """`data` with all that opening its source tells: counts, names, fingerprint, mean and std."""
    values = images.pixels.double().transpose(0, 1).flatten(1)
    std = values.std(dim=1, correction=0) / 127.5
    if not bool((std > 0).all()):
        raise RunError(
            f"all {len(images)} images of {data.source} are one flat colour in some channel: nothing to learn"
        )
    return data.model_copy(
        update=dict(
            num_images=len(images),
            num_classes=len(images.class_names),
            class_names=images.class_names,
            fingerprint=images.fingerprint(),
            examples=tuple(dict.fromkeys(images.captions))[:16] if any(images.captions) else (),
            mean=data.mean or tuple((values.mean(dim=1) / 127.5 - 1).tolist()),
            std=data.std or tuple(std.tolist()),
        )
    )


def _digits(data: Data) -> Images:
    if (data.resolution, data.channels) != (8, 1):
        raise UsageError(
            f"data.source={data.source} has grey 8x8 images, but data.resolution={data.resolution}, data.channels={data.channels}; "
            "set them to 8 and 1, or choose another source"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the digits come with scikit-learn: pip install 'gesso[demo]'") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scans have 17 grey values, 0 to 16
    pixels = torch.from_numpy(pixels)[:, None]
    sizes = torch.full((len(pixels), 2), 8)
    if data.source == "digits-coarse":
        small = F.interpolate(F.avg_pool2d(pixels[1::2].double(), 2), scale_factor=2, mode="bilinear")
        pixels[1::2], sizes[1::2] = small.round().to(torch.uint8), 4
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    said = ("{}", "the digit {}", "a {} in somebody's handwriting")  # of 1, 3 and 6 words: 's is one
    captions = tuple(said[i % 3].format(names[label]) for i, label in enumerate(digits.target))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Images(pixels, labels, tuple(str(name) for name in digits.target_names), sizes, captions)


def _shapes(data: Data, progress: Callable[[int, int], None]) -> Images:
    scenes = shapes.scenes(range(data.size or 20_000), single=data.source == "shapes-class")

    def drawn(scene: shapes.Scene) -> np.ndarray:
        return _prepared(Image.fromarray(shapes.render(scene)), data.resolution, data.channels)[0]

    pixels = torch.empty(len(scenes), data.channels, data.resolution, data.resolution, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, picture in enumerate(pool.map(drawn, scenes)):
            pixels[i] = torch.from_numpy(picture)
            progress(i + 1, len(scenes))
    labels = torch.tensor([shapes.label(scene) for scene in scenes])
    sizes = torch.tensor([(scene.height, scene.width) for scene in scenes])
    return Images(pixels, labels, shapes.KINDS, sizes, tuple(shapes.caption(scene) for scene in scenes))


def _listing(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...], list[str]]:
    """(image, label) in sorted order, class names, notes."""

    def images_in(folder: Path) -> list[Path]:
        found = (Path(base) / name for base, _, names in os.walk(folder) for name in names)
        return sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))

    if not str(root).strip() or str(root) == ".":
        raise UsageError("which images? Write gesso train folder:/path/to/images, or data.source=/path/to/images")
    if not root.is_dir():
        raise UsageError(
            f"data.source={root}: there is no such folder (and the named sources are: {', '.join(DIGITS | SHAPES)})"
        )
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = sorted(p for p in root.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not classes:
        if not loose:
            raise UsageError(f"data.source={root}: no images there ({', '.join(SUFFIXES)}), and no sub-folders")
        return [(p, 0) for p in loose], (), [f"{root} has no sub-folders: training without classes"]
    per_class = [images_in(folder) for folder in classes]
    empty = [folder.name for folder, found in zip(classes, per_class, strict=True) if not found]
    if empty:
        raise UsageError(f"data.source={root}: no image in class folder {', '.join(empty[:5])}; fill it or remove it")
    listed = [(p, label) for label, found in enumerate(per_class) for p in found]
    notes = [f"{len(loose)} images beside the class folders of {root} are left out"] if loose else []
    return listed, tuple(folder.name for folder in classes), notes


def _folder(data: Data, progress: Callable[[int, int], None]) -> Images:
    root = Path(data.source)
    listed, names, notes = _listing(root)

    def read(entry: tuple[Path, int]) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            with Image.open(entry[0]) as image:
                return _prepared(image, data.resolution, data.channels)
        except Exception as error:  # whatever a decoder raises on a damaged file
            return f"{type(error).__name__}: {error}"

    pixels, sizes, kept, unreadable = [], [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, ((path, _), result) in enumerate(zip(listed, pool.map(read, listed), strict=True)):
            if isinstance(result, str):
                unreadable.append((str(path.relative_to(root)), result))
            else:
                pixels.append(torch.from_numpy(result[0]))
                sizes.append(result[1])
                kept.append(listed[i])
            progress(i + 1, len(listed))
    if len(unreadable) > data.max_unreadable * len(listed):
        shown = "; ".join(f"{name} ({reason})" for name, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise RunError(
            f"{len(unreadable)} of {len(listed)} images in {root} are unreadable, over the "
            f"{data.max_unreadable:.1%} of data.max_unreadable:\n{shown}{more}"
        )
    labels = [label for _, label in kept]
    captions = tuple(_caption(path, names[label] if names else "") for path, label in kept)
    return Images(torch.stack(pixels), torch.tensor(labels), names, torch.tensor(sizes), captions, unreadable, notes)


def _caption(path: Path, otherwise: str) -> str:
    """The text file beside the image, or the name of its class."""
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else otherwise


def _prepared(image: Image.Image, resolution: int, channels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Upright, in 8-bit grey or RGB on white, the middle square resized: (C, R, R) uint8.

    With it the height and width of the whole image.
    """
    image = ImageOps.exif_transpose(image)
    whole = (image.height, image.width)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return crops.taken(image, crops.centred(image.height, image.width), resolution, resolution), whole


def measured(images: Images) -> dict[str, Tensor]:
    """Columns of control that belong to an image, by name, (N,) float32; units as in config.CONTROLS."""
    boxes = torch.tensor([crops.centred(h, w)[:4] for h, w in images.sizes.tolist()])
    flips = torch.zeros(len(images), dtype=torch.bool)
    return dict(crops.columns(images.sizes, boxes, flips, crops.tone(images.pixels)))


def to_float(pixels: Tensor, data: Data, sd: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, C, R, R) -> x0 of mean 0 and standard deviation sd, by the mean and std of the data set."""
    mean, std = (torch.tensor(v, dtype=dtype, device=pixels.device)[:, None, None] for v in (data.mean, data.std))
    return (pixels.to(dtype) / 127.5 - 1 - mean) * (sd / std)


def to_uint8(x0: Tensor, data: Data, sd: float) -> Tensor:
    """The inverse of `to_float`, rounded and clipped."""
    mean, std = (torch.tensor(v, dtype=x0.dtype, device=x0.device)[:, None, None] for v in (data.mean, data.std))
    return ((x0 * (std / sd) + mean + 1) * 127.5).round().clip(0, 255).to(torch.uint8)
