"""A whole source in memory, each picture cropped to its middle square.

Legend: N images, B samples, C channels, R resolution; pixels are uint8.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gesso import keyed
from gesso.config import Data
from gesso.data import crops
from gesso.data.listing import Source
from gesso.data.samples import Dataset, Samples, pixel_moments
from gesso.errors import RunError, Unreadable

Progress = Callable[[int, int], None]
"""called as progress(done, total)"""


class Images(Dataset):
    """pixels (N, C, R, R) uint8; labels (N,) int64; sizes (N, 2) int64, height and width of the whole picture.

    flip: half of the samples are mirrored, keyed to (seed, sample counter).
    """

    immediate = True

    def __init__(
        self,
        where: str,
        pixels: Tensor,
        labels: Tensor,
        sizes: Tensor,
        captions: Sequence[str],
        class_names: tuple[str, ...] = (),
        flip: bool = False,
        seed: int = 0,
    ):
        self.where, self.pixels, self.labels, self.sizes, self.captions = where, pixels, labels, sizes, captions
        self.class_names, self.flip, self.seed = class_names, flip, seed
        self.notes: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.boxes = torch.tensor([crops.centred(h, w)[:4] for h, w in sizes.tolist()])
        self.tone = crops.tone(pixels)

    def take(self, index: Tensor, counter: Tensor) -> Samples:
        samples = self.plain(index)
        if not self.flip:
            return samples
        flips = keyed.uniform(self.seed, counter, "flip")[:, 0] < 0.5
        return samples._replace(x=torch.where(flips[:, None, None, None], samples.x.flip(3), samples.x), flips=flips)

    def plain(self, index: Tensor) -> Samples:
        no = torch.zeros(len(index), dtype=torch.bool)
        return Samples(
            self.pixels[index], self.sizes[index], self.boxes[index], no, self.tone[index], self.labels[index], index
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        return pixel_moments(self.pixels)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        digest.update(json.dumps([list(self.captions), self.sizes.tolist()]).encode())
        return digest.hexdigest()[:16]


def load(source: Source, data: Data, seed: int = 0, progress: Progress = lambda done, total: None) -> Images:
    """Read all of a source as `data` says. Raises RunError when too many images are unreadable."""

    def read(i: int) -> tuple[np.ndarray, tuple[int, int]] | Unreadable:
        try:
            item = source.item(i)
            image, whole = item.picture(data.channels, resize=data.resize)
        except Unreadable as error:
            return Unreadable(error.name, error.reason)  # without the frames that the caught one holds
        view = crops.centred(image.height, image.width)
        return crops.taken(image, view, data.resolution, data.resolution, data.resize), item.size or whole

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
    refuse_many(unreadable, n, data)
    captions, labels = source.captions(), torch.from_numpy(source.labels)[kept]
    images = Images(
        data.source, found[: len(kept)], labels, torch.tensor(sizes), tuple(captions[i] for i in kept),
        source.class_names, data.flip, seed,
    )  # fmt: skip
    images.notes, images.unreadable = source.notes, unreadable
    return images


def refuse_many(unreadable: Sequence[tuple[str, str]], n: int, data: Data) -> None:
    """Raise RunError when more than data.max_unreadable of n images are unreadable."""
    if len(unreadable) > data.max_unreadable * n:
        shown = "; ".join(f"{name} ({reason})" for name, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise RunError(
            f"{len(unreadable)} of {n} images in {data.source} are unreadable, over the "
            f"{data.max_unreadable:.1%} of data.max_unreadable:\n{shown}{more}"
        )
