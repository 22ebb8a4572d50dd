"""A source of any size, decoded and cropped as training comes to it; each sample has a crop and a flip of its own.

Legend: N images, B samples, C channels, R resolution.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gesso import keyed
from gesso.config import Data
from gesso.data import crops
from gesso.data.images import refuse_many
from gesso.data.listing import Source
from gesso.data.samples import Dataset, Samples, latent_moments, pixel_moments
from gesso.errors import RunError, Unreadable

MEASURED = 4096
"""samples whose moments stand for all"""


class Live(Dataset):
    """Samples of a source, x being pixels, or latents where the source holds them.

    An image that cannot be read is counted once, and the next one of the source takes its place wherever it is due.
    """

    def __init__(self, source: Source, data: Data, seed: int = 0):
        self.source, self.data, self.seed, self.where = source, data, seed, data.source
        self.labels, self.captions = torch.from_numpy(source.labels), source.captions()
        self.class_names, self.notes, self.latents = source.class_names, source.notes, source.latents
        self.unreadable: list[tuple[str, str]] = []
        self._bad: dict[int, tuple[str, str]] = {}
        self._apart: frozenset[int] = frozenset()
        self._noting = threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count(), "decode")

    def hold_out(self, count: int) -> None:
        super().hold_out(count)
        self._apart = frozenset(self.held.tolist())

    def take(self, index: Tensor, counter: Tensor) -> Samples:
        """Raises RunError when too many images turn out to be unreadable."""
        u = keyed.uniform(self.seed, counter, "view", crops.UNIFORMS)
        return self._samples(index, list(self._pool.map(self._view, index.tolist(), u.tolist())))

    def plain(self, index: Tensor) -> Samples:
        plain = self.data.model_copy(update={"flip": False, "crop_scale": None})
        views = self._pool.map(lambda i: self._view(i, [0.0] * crops.UNIFORMS, plain), index.tolist())
        return self._samples(index, list(views))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of the first MEASURED samples."""
        counter = torch.arange(min(len(self), MEASURED))
        x = self.take(self.order(self.seed, 1)(counter), counter).x
        return latent_moments(x) if self.latents else pixel_moments(x)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _view(
        self, i: int, u: list[float], data: Data | None = None
    ) -> tuple[int, Tensor, crops.View, tuple[int, int]]:
        """Number, x, view and size of the first image from i on that can be read; held out where i is, and only then."""
        data = data or self.data
        for j in (*range(i, len(self)), *range(i)):
            if j in self._bad or (j in self._apart) != (i in self._apart):
                continue
            try:
                item = self.source.item(j)
                if self.latents:
                    return (
                        j,
                        torch.from_numpy(item.image),
                        crops.View(0.0, 0.0, 1.0, 1.0),
                        item.size or (data.resolution,) * 2,
                    )
                image, whole = item.picture(data.channels, self._least(), data.resize)
            except Unreadable as error:
                self._note(j, error.name, error.reason)
                continue
            size = item.size or whole
            view = crops.drawn(data, *whole, u)
            x = crops.taken(image, view, data.resolution, data.resolution, data.resize)
            return j, torch.from_numpy(x), view, size
        raise RunError(f"no image of {self.where} can be read")

    def _least(self) -> int:
        """The shorter edge that any crop needs, so that its pixels are not enlarged by the decoder's shortcut."""
        scale = self.data.crop_scale
        return int(np.ceil(self.data.resolution / (scale[0] ** 0.5 if scale else 1)))

    def _note(self, i: int, name: str, reason: str) -> None:
        with self._noting:
            if i not in self._bad:
                self._bad[i] = (name, reason)
                self.unreadable.append(self._bad[i])
        refuse_many(self.unreadable, len(self), self.data)

    def _samples(self, index: Tensor, found: list[tuple[int, Tensor, crops.View, tuple[int, int]]]) -> Samples:
        taken = torch.tensor([i for i, _, _, _ in found], dtype=torch.int64)
        x = torch.stack([view for _, view, _, _ in found])
        return Samples(
            x,
            torch.tensor([size for _, _, _, size in found]),
            torch.tensor([view[:4] for _, _, view, _ in found]),
            torch.tensor([view.flip for _, _, view, _ in found]),
            torch.zeros(len(x), 2) if self.latents else crops.tone(x),
            self.labels[taken],
            taken,
        )
