"""What `gesso cache` wrote, as training reads it: memory-mapped, by image, in any order. shards.py has the files.

Legend: N images, K views of each, B samples; C channels of pixels, H W of their size; c channels of latents, h w of theirs;
T tokens, D and P channels of a token and of pooled text.
"""

import math
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso import keyed
from gesso.config import Run
from gesso.data import remote
from gesso.data.listing import Texts
from gesso.data.order import Grouped, Order, Windowed, Without
from gesso.data.samples import Dataset, Samples
from gesso.data.shards import COLUMNS, SHARDS, TEXT, mapped, mapped_columns, opened_manifest
from gesso.data.text import Encoded
from gesso.errors import UsageError


class Rows(NamedTuple):
    """A file, memory-mapped: the bytes of x, and the tokens of its texts."""

    x: memoryview
    text: dict[str, np.ndarray]


class Cache(Dataset):
    """What `gesso cache` wrote at `where`, a folder or an address (remote.py). x is pixels uint8, or moments in the type
    they are stored in.

    A sample is one of the K views of its image, keyed to (seed, counter). window: files whose images are shuffled together;
    of a cache at an address those of two windows are kept on the local disk, without a window all. buckets: sizes in
    pixels; bucket_of (N,) int64, which of them an image is in: the images of one `take` are in one.

    Raises UsageError as `opened_manifest`.
    """

    immediate = True

    def __init__(self, where: str | Path, seed: int = 0, window: int | None = None):
        self.where, self.seed, self.window, self.notes = str(where), seed, window, []
        far = remote.is_remote(where)
        self.manifest = remote.opened(self.where) if far else opened_manifest(where)
        plan, files = self.manifest.plan, self.manifest.files
        self.plan, self.latents = plan, plan.latent.vae is not None
        self.encoded = plan.semantic if plan.semantic.kind == "text" else None
        self.class_names, self.unreadable = self.manifest.class_names, list(self.manifest.unreadable)
        self._dtype = getattr(torch, plan.dtype or "float32") if self.latents else torch.uint8
        self._local = self._copies() if far else None
        self.far = far and window is not None
        self._order: Windowed | None = None
        self._open: dict[int, Rows] = {}
        self._opening = threading.Lock()
        # What is small is held in memory; x and tokens stay on the disk.
        columns = mapped_columns(self._path(COLUMNS), self.manifest)
        self.labels, self.sizes = columns["label"].clone(), columns["size"].long()
        drawn = [columns["box"], columns["flip"][:, :, None], columns["tone"]]
        self._drawn = torch.cat(drawn, dim=2).flatten(0, 1).numpy()
        self.captions = Texts(columns["caption"].numpy(), columns["caption_end"].numpy())
        counts = np.array([shard.rows for shard in files])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.buckets = plan.sizes()
        self.bucket_of = np.repeat([self.buckets.index((shard.height, shard.width)) for shard in files], counts)
        if not far:  # a damaged file is found now, not in the middle of training
            for f in range(len(files)):
                self._rows(f)

    def _copies(self) -> remote.Local:
        """The local copies of files at an address."""
        files, columns = self.manifest.files, self.manifest.columns
        if self.window is None:
            local = remote.Local(self.where)
            local.ahead([columns.name, *(shard.name for shard in files)])
            return local
        largest = sorted((shard.bytes for shard in files), reverse=True)
        return remote.Local(self.where, columns.bytes + sum(largest[: 2 * self.window]))

    def _path(self, name: str) -> Path:
        return self._local.path(name) if self._local else Path(self.where) / SHARDS / name

    def _rows(self, f: int) -> Rows:
        with self._opening:
            if f not in self._open:
                shard = self.manifest.files[f]
                found = mapped(self._path(shard.name), self.plan, shard)
                x = found["moments" if self.latents else "pixels"].numpy().reshape(-1).view(np.uint8)
                self._open[f] = Rows(memoryview(x), {name: found[name].numpy() for name in TEXT if name in found})
            return self._open[f]

    def _move_on(self, counter: Tensor) -> None:
        """Of a cache at an address: let go of the files of earlier windows, and begin to fetch those of the next."""
        if self._local is None or self._order is None:
            return
        first, stop = int(counter.min()), int(counter.max()) + 1
        needed, files = set(self._order.shards(first, stop)), self.manifest.files
        with self._opening:
            past = [f for f in self._open if f not in needed]
            for f in past:
                del self._open[f]
        self._local.release(files[f].name for f in past)
        self._local.ahead([files[f].name for f in self._order.shards(first, stop + self._order.span)])

    def order(self, seed: int, batch_size: int) -> Order | Windowed | Grouped | Without:
        """Raises UsageError for a window beside buckets, and when no bucket fills a batch."""
        order = self._kept_order(seed, batch_size)
        self._order = order if isinstance(order, Windowed) else None
        return Without(order, self.held) if len(self.held) else order

    def _kept_order(self, seed: int, batch_size: int) -> Order | Windowed | Grouped:
        """Of the images that are not held out, counted without gaps."""
        held = self.held.numpy()
        if len(self.buckets) > 1:
            if self.window:
                raise UsageError("data.window is for caches without buckets: set data.window=null")
            return Grouped(torch.from_numpy(np.delete(self.bucket_of, held)), batch_size, seed)
        if self.window is None:
            return Order(len(self) - len(held), seed)
        gone = np.bincount(np.searchsorted(self._ends, held, side="right"), minlength=len(self._ends))
        return Windowed((self._ends - self._starts - gone).tolist(), self.window, seed)

    def alike(self, height: int, width: int) -> Tensor:
        wanted = [b for b, size in enumerate(self.buckets) if size == (height, width)]
        return torch.from_numpy(np.flatnonzero(np.isin(self.bucket_of, wanted)))

    def settled(self, run: Run) -> dict[str, dict[str, object]]:
        data = {
            name: getattr(self.plan.data, name) for name in ("resolution", "channels", "flip", "crop_scale", "resize")
        }
        data["buckets"] = tuple(self.buckets) if len(self.buckets) > 1 else None
        names = ("vae", "convention", "channels", "factor")
        latent = {name: getattr(self.plan.latent, name) for name in names} if self.latents else {"vae": None}
        return {"data": data, "latent": latent}

    def take(self, index: Tensor, counter: Tensor) -> Samples:
        self._move_on(counter)
        if self.plan.views == 1:
            return self.views(index, torch.zeros_like(index))
        view = (keyed.uniform(self.seed, counter, "view")[:, 0] * self.plan.views).long()
        return self.views(index, view)

    def plain(self, index: Tensor) -> Samples:
        """The first view that is not mirrored. Where all are, pixels are mirrored back, and latents are the first view."""
        mirrored = self._drawn[:, 4].reshape(-1, self.plan.views)[index.numpy()]
        samples = self.views(index, torch.from_numpy(mirrored.argmin(axis=1)))
        if self.latents or not samples.flips.any():
            return samples
        x = torch.where(samples.flips[:, None, None, None], samples.x.flip(3), samples.x)
        return samples._replace(x=x, flips=torch.zeros_like(samples.flips))

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.manifest.mean, self.manifest.std))
        return mean, std

    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def views(self, index: Tensor, view: Tensor) -> Samples:
        """The views (B,) of the images index (B,), of one bucket."""
        # In numpy: a call of torch costs as much as a row.
        K, i = self.plan.views, index.numpy()
        place = i * K + view.numpy()
        if len(self.buckets) > 1:
            buckets = set(self.bucket_of[i].tolist())
            assert len(buckets) == 1, f"images of one bucket are taken at a time, not of {buckets}"
        file = np.searchsorted(self._ends, i, side="right")
        files, shape = file.tolist(), self.manifest.files[int(file[0])].shape[2:]
        size = math.prod(shape) * self._dtype.itemsize
        # Of numpy, which asks for huge pages. Row by row: nearly as fast as one gather, and files may be many.
        x = np.empty(len(files) * size, np.uint8)
        to, parts, here = memoryview(x), {f: self._rows(f).x for f in set(files)}, 0
        for f, start in zip(files, (size * (place - K * self._starts[file])).tolist(), strict=True):
            to[here : here + size] = parts[f][start : start + size]
            here += size
        drawn = torch.from_numpy(self._drawn[place])
        return Samples(
            torch.from_numpy(x).view(self._dtype).view(-1, *shape), self.sizes[index], drawn[:, :4], drawn[:, 4] > 0,
            drawn[:, 5:], self.labels[index], index, self._texts(files, (i - self._starts[file]).tolist()),
        )  # fmt: skip

    def _texts(self, files: list[int], rows: list[int]) -> Encoded | None:
        semantic = self.plan.semantic
        if semantic.kind != "text":
            return None
        tokens = np.zeros((len(files), semantic.tokens, semantic.width), np.float32)
        pooled = np.zeros((len(files), semantic.pooled_width), np.float32)
        lengths = torch.zeros(len(files), dtype=torch.int64)
        for b, (f, i) in enumerate(zip(files, rows, strict=True)):
            text = self._rows(f).text
            ends = text["token_end"]
            start, stop = int(ends[i - 1]) if i else 0, int(ends[i])
            lengths[b] = stop - start
            tokens[b, : stop - start] = text["tokens"][start:stop]
            pooled[b] = text["pooled"][i]
        return Encoded(torch.from_numpy(tokens), lengths, torch.from_numpy(pooled))
