"""Dataset that decodes and crops the images of a source during training; each sample has a new crop and flip.

Legend: N images, B samples, C channels, R resolution.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from gesso import rng
from gesso.config import DataConfig
from gesso.data import crops
from gesso.data.base import Dataset, SampleBatch, latent_channel_stats, pixel_channel_stats
from gesso.data.in_memory import check_unreadable
from gesso.data.sources.base import Source
from gesso.errors import RunError, UnreadableImageError

NUM_STATS_SAMPLES = 4096
"""Number of samples from which the channel statistics are estimated."""


class OnTheFlyDataset(Dataset):
    """Dataset of pixels, or of latents if the source stores them.

    An unreadable image is reported once and replaced by the next readable image of the source.

    Args:
        source: Source of the images.
        data: Settings of crops, flips and resolution.
        seed: Seed of crops and flips.
    """

    def __init__(self, source: Source, data: DataConfig, seed: int = 0):
        self.source, self.data, self.seed, self.uri = source, data, seed, data.source
        self.labels, self.captions = torch.from_numpy(source.labels), source.captions()
        self.class_names, self.notes, self.has_latents = source.class_names, source.notes, source.has_latents
        self.held_out = source.held_out
        self.unreadable: list[tuple[str, str]] = []
        self._unreadable_by_index: dict[int, tuple[str, str]] = {}
        self._fingerprint: str | None = None
        self._validation_set: frozenset[int] = frozenset()
        self._unreadable_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count(), "decode")

    def hold_out_validation(self, count: int) -> None:
        """Exclude `count` images from training, as `Dataset.hold_out_validation` does."""
        super().hold_out_validation(count)
        self._validation_set = frozenset(self.validation_indices.tolist())

    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Return augmented samples, as `Dataset.get` does; raise RunError if too many images are unreadable."""
        u = rng.uniform(self.seed, sample_index, "view", crops.UNIFORMS_PER_VIEW)
        return self._to_batch(self._pool.map(self._load_view, indices.tolist(), u.tolist()))

    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        """Return the images `indices` (B,), centre-cropped and not mirrored."""
        data = self.data.model_copy(update={"flip": False, "crop_scale": None})
        return self._to_batch(self._pool.map(lambda i: self._load_view(i, None, data), indices.tolist()))

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, float64, of the first NUM_STATS_SAMPLES samples."""
        sample_index = torch.arange(min(len(self), NUM_STATS_SAMPLES))
        x = self.get(self.sample_order(self.seed, 1)(sample_index), sample_index).x
        return latent_channel_stats(x) if self.has_latents else pixel_channel_stats(x)

    def fingerprint(self) -> str:
        """Return 16 hex digits of names, sizes, labels and captions, and of the bytes of some images.

        Of at most `MAX_HASHED_IMAGES` images every one counts; of more, that many spread evenly.
        """
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
            if content := self.source.content_hash():
                self._fingerprint = hashlib.sha256(f"{self._fingerprint} {content}".encode()).hexdigest()[:16]
        return self._fingerprint

    def _load_view(
        self, i: int, u: Sequence[float] | None, data: DataConfig | None = None
    ) -> tuple[int, Tensor, crops.View, tuple[int, int]]:
        """Return index, x, view and original size of the first readable image from `i` on.

        A validation image is replaced only by validation images, a training image only by training images.
        """
        data, u = data or self.data, u or [0.0] * crops.UNIFORMS_PER_VIEW
        for j in (*range(i, len(self)), *range(i)):
            if j in self._unreadable_by_index or (j in self._validation_set) != (i in self._validation_set):
                continue
            try:
                item = self.source.item(j)
                if self.has_latents:
                    size = item.original_size or (data.resolution, data.resolution)
                    return j, torch.from_numpy(item.image), crops.FULL_VIEW, size
                min_edge = crops.min_decode_edge(self.data, data.resolution)
                image, full_size = item.decode(data.channels, min_edge, data.resize)
            except UnreadableImageError as error:
                self._record_unreadable(j, error.name, error.reason)
                continue
            size = item.original_size or full_size
            view = crops.random_view(data, *full_size, u)
            x = crops.crop_resize(image, view, data.resolution, data.resolution, data.resize)
            return j, torch.from_numpy(x), view, size
        raise RunError(f"no image of {self.uri} is readable")

    def _record_unreadable(self, i: int, name: str, reason: str) -> None:
        with self._unreadable_lock:
            if i not in self._unreadable_by_index:
                self._unreadable_by_index[i] = (name, reason)
                self.unreadable.append(self._unreadable_by_index[i])
        check_unreadable(self.unreadable, len(self), self.data)

    def _to_batch(self, loaded: Iterable[tuple[int, Tensor, crops.View, tuple[int, int]]]) -> SampleBatch:
        indices, x, views, sizes = zip(*loaded, strict=True)
        index = torch.tensor(indices, dtype=torch.int64)
        return SampleBatch.from_views(torch.stack(x), sizes, views, self.labels[index], index)
