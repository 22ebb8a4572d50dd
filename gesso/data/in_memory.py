"""Dataset that holds all images of a source in memory, each cropped to its centre square.

Legend: N images, B samples, C channels, R resolution; pixels are uint8.
"""

import hashlib
import json
import math
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
"""Function called as progress(done, total)."""


class InMemoryDataset(Dataset):
    """Dataset of pixels in memory.

    Args:
        uri: The setting data.source.
        pixels: (N, C, R, R) uint8.
        labels: (N,) int64 class indices.
        original_sizes: (N, 2) int64 height and width of the uncropped images.
        captions: N captions.
        class_names: Names of the classes.
        flip: Mirror half of the samples; the draw is keyed to (seed, sample index).
        seed: Seed of the flips.
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
        self.uri, self.pixels, self.labels = uri, pixels, labels
        self.original_sizes, self.captions = original_sizes, captions
        self.class_names, self.flip, self.seed = class_names, flip, seed
        self.notes: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.crop_boxes = torch.tensor([crops.center_view(h, w)[:4] for h, w in original_sizes.tolist()])
        self.pixel_stats = crops.compute_pixel_stats(pixels)

    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Return the images `indices` (B,), mirrored by draws keyed to `sample_index` (B,) if flips are on."""
        samples = self.get_unaugmented(indices)
        if not self.flip:
            return samples
        flips = rng.uniform(self.seed, sample_index, "flip")[:, 0] < 0.5
        return samples._replace(x=torch.where(flips[:, None, None, None], samples.x.flip(3), samples.x), flips=flips)

    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        """Return the images `indices` (B,), not mirrored."""
        return SampleBatch(
            x=self.pixels[indices], original_sizes=self.original_sizes[indices], crop_boxes=self.crop_boxes[indices],
            flips=torch.zeros(len(indices), dtype=torch.bool), pixel_stats=self.pixel_stats[indices],
            labels=self.labels[indices], indices=indices,
        )  # fmt: skip

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, (C,) float64, of the pixels in [-1, 1]."""
        return pixel_channel_stats(self.pixels)

    def fingerprint(self) -> str:
        """Return 16 hex digits of pixels, labels, captions and original sizes."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        digest.update(json.dumps([list(self.captions), self.original_sizes.tolist()]).encode())
        return digest.hexdigest()[:16]


def load_in_memory(
    source: Source, data: DataConfig, seed: int = 0, progress: ProgressCallback = lambda done, total: None
) -> InMemoryDataset:
    """Read all images of a source into memory.

    Args:
        source: Source of the images.
        data: Resolution, channels, resize filter, flips, and the allowed share of unreadable images.
        seed: Seed of the flips.
        progress: Called as progress(done, total) after each image.

    Raises:
        RunError: More than the share data.max_unreadable of the images are unreadable.
    """

    def load(i: int) -> tuple[np.ndarray, tuple[int, int]] | UnreadableImageError:
        try:
            item = source.item(i)
            image, full_size = item.decode(data.channels, resize=data.resize)
        except UnreadableImageError as error:
            return UnreadableImageError(error.name, error.reason)  # a new error, without the traceback and its frames
        view = crops.center_view(image.height, image.width)
        pixels = crops.crop_resize(image, view, data.resolution, data.resolution, data.resize)
        return pixels, item.original_size or full_size

    n = len(source)
    indices: list[int] = []
    sizes: list[tuple[int, int]] = []
    unreadable: list[tuple[str, str]] = []
    # Readable images are stored without gaps.
    images = torch.empty(n, data.channels, data.resolution, data.resolution, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, result in enumerate(pool.map(load, range(n))):
            if isinstance(result, UnreadableImageError):
                unreadable.append((result.name, result.reason))
            else:
                images[len(indices)] = torch.from_numpy(result[0])
                sizes.append(result[1])
                indices.append(i)
            progress(i + 1, n)
    check_unreadable(unreadable, n, data)
    captions, labels = source.captions(), torch.from_numpy(source.labels)[indices]
    dataset = InMemoryDataset(
        data.source, images[: len(indices)], labels, torch.tensor(sizes), tuple(captions[i] for i in indices),
        source.class_names, data.flip, seed,
    )  # fmt: skip
    dataset.notes, dataset.unreadable, dataset.held_out = source.notes, unreadable, source.held_out
    return dataset


def check_unreadable(unreadable: Sequence[tuple[str, str]], n: int, data: DataConfig) -> None:
    """Raise RunError if more than the share data.max_unreadable of `n` images are unreadable."""
    if len(unreadable) > data.max_unreadable * n:
        examples = "; ".join(f"{name} ({reason})" for name, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise RunError(
            f"{len(unreadable)} of {n} images in {data.source} are unreadable, over the "
            f"{data.max_unreadable:.1%} of data.max_unreadable:\n{examples}{more}\n"
            f"To train without them, add data.max_unreadable={math.ceil(100 * len(unreadable) / n) / 100:g}"
        )
