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

from gesso import rng
from gesso.config import DataConfig
from gesso.data import crops
from gesso.data.base import Dataset, SampleBatch, pixel_channel_stats
from gesso.data.sources.base import Source
from gesso.errors import RunError, UnreadableImageError

ProgressCallback = Callable[[int, int], None]
"""called as progress(done, total)"""


class InMemoryDataset(Dataset):
    """pixels (N, C, R, R) uint8; labels (N,) int64; sizes (N, 2) int64, height and width of the whole picture.

    flip: half of the samples are mirrored, keyed to (seed, sample counter).
    """

    is_cheap = True

    def __init__(
        self,
        uri: str,
        pixels: Tensor,
        labels: Tensor,
        original_sizes: Tensor,
        captions: Sequence[str],
        class_names: tuple[str, ...] = (),
        flip: bool = False,
        seed: int = 0,
    ):
        self.uri, self.pixels, self.labels, self.original_sizes, self.captions = (
            uri,
            pixels,
            labels,
            original_sizes,
            captions,
        )
        self.class_names, self.flip, self.seed = class_names, flip, seed
        self.notes: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.crop_boxes = torch.tensor([crops.center_view(h, w)[:4] for h, w in original_sizes.tolist()])
        self.pixel_stats = crops.compute_pixel_stats(pixels)

    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        samples = self.get_unaugmented(indices)
        if not self.flip:
            return samples
        flips = rng.uniform(self.seed, sample_index, "flip")[:, 0] < 0.5
        return samples._replace(x=torch.where(flips[:, None, None, None], samples.x.flip(3), samples.x), flips=flips)

    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        no = torch.zeros(len(indices), dtype=torch.bool)
        return SampleBatch(
            self.pixels[indices],
            self.original_sizes[indices],
            self.crop_boxes[indices],
            no,
            self.pixel_stats[indices],
            self.labels[indices],
            indices,
        )

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        return pixel_channel_stats(self.pixels)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        digest.update(json.dumps([list(self.captions), self.original_sizes.tolist()]).encode())
        return digest.hexdigest()[:16]


def load_in_memory(
    source: Source, data: DataConfig, seed: int = 0, progress: ProgressCallback = lambda done, total: None
) -> InMemoryDataset:
    """Read all of a source as `data` says. Raises RunError when too many images are unreadable."""

    def read(i: int) -> tuple[np.ndarray, tuple[int, int]] | UnreadableImageError:
        try:
            item = source.item(i)
            image, whole = item.decode(data.channels, resize=data.resize)
        except UnreadableImageError as error:
            return UnreadableImageError(error.name, error.reason)  # without the frames that the caught one holds
        view = crops.center_view(image.height, image.width)
        return crops.crop_resize(
            image, view, data.resolution, data.resolution, data.resize
        ), item.original_size or whole

    n, kept, sizes, unreadable = len(source), [], [], []
    # Filled from the front: an image that cannot be read takes no place.
    found = torch.empty(n, data.channels, data.resolution, data.resolution, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, result in enumerate(pool.map(read, range(n))):
            if isinstance(result, UnreadableImageError):
                unreadable.append((result.name, result.reason))
            else:
                found[len(kept)] = torch.from_numpy(result[0])
                sizes.append(result[1])
                kept.append(i)
            progress(i + 1, n)
    check_unreadable(unreadable, n, data)
    captions, labels = source.captions(), torch.from_numpy(source.labels)[kept]
    images = InMemoryDataset(
        data.source, found[: len(kept)], labels, torch.tensor(sizes), tuple(captions[i] for i in kept),
        source.class_names, data.flip, seed,
    )  # fmt: skip
    images.notes, images.unreadable = source.notes, unreadable
    return images


def check_unreadable(unreadable: Sequence[tuple[str, str]], n: int, data: DataConfig) -> None:
    """Raise RunError when more than data.max_unreadable of n images are unreadable."""
    if len(unreadable) > data.max_unreadable * n:
        shown = "; ".join(f"{name} ({reason})" for name, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise RunError(
            f"{len(unreadable)} of {n} images in {data.source} are unreadable, over the "
            f"{data.max_unreadable:.1%} of data.max_unreadable:\n{shown}{more}"
        )
