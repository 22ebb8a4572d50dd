"""A whole source in memory, each picture cropped to its middle square; pixels to x0 and back.

Legend: N images, C channels, R resolution; pixels are uint8.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gesso.config import Data
from gesso.data import crops, pixels
from gesso.data.sources import open_source
from gesso.errors import RunError, Unreadable, UsageError


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
    source = open_source(data.source)
    if data.source in ("digits", "digits-coarse") and (data.resolution, data.channels) != (8, 1):
        raise UsageError(
            f"data.source={data.source} has grey 8x8 images, but data.resolution={data.resolution}, data.channels={data.channels}; "
            "set them to 8 and 1, or choose another source"
        )
    if source.latents:
        raise UsageError(f"data.source={data.source} holds latents; training reads pictures only so far")

    def read(i: int) -> tuple[np.ndarray, tuple[int, int]] | Unreadable:
        name = ""
        try:
            item = source.item(i)
            name = item.name
            image, whole = pixels.decode(item.image, data.channels)
        except Unreadable as error:
            return Unreadable(error.name or name, error.reason)
        view = crops.centred(image.height, image.width)
        return crops.taken(image, view, data.resolution, data.resolution), item.size or whole

    n, kept, sizes, unreadable = len(source), [], [], []
    # Filled from the front: an image that cannot be read takes no place.
    found = torch.empty(n, data.channels, data.resolution, data.resolution, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, result in enumerate(pool.map(read, range(n))):
            if isinstance(result, Unreadable):
                unreadable.append((result.name, result.reason))
            else:
                found[len(kept)] = torch.from_numpy(result[0])
                sizes.append(result[1])
                kept.append(i)
            progress(i + 1, n)
    _refuse_many(unreadable, n, data)
    captions, labels = source.captions(), torch.from_numpy(source.labels)[kept]
    return Images(
        found[: len(kept)], labels, source.class_names, torch.tensor(sizes), tuple(captions[i] for i in kept),
        unreadable, source.notes,
    )  # fmt: skip


def _refuse_many(unreadable: list[tuple[str, str]], n: int, data: Data) -> None:
    """Raise RunError when more than data.max_unreadable of n images are unreadable."""
    if len(unreadable) > data.max_unreadable * n:
        shown = "; ".join(f"{name} ({reason})" for name, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise RunError(
            f"{len(unreadable)} of {n} images in {data.source} are unreadable, over the "
            f"{data.max_unreadable:.1%} of data.max_unreadable:\n{shown}{more}"
        )


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
