"""What `gesso cache` wrote, as training reads it: memory-mapped, by image, in any order. shards.py has the files.

Legend: N images, K views of each, B samples; C channels of pixels, H W of their size; c channels of latents, h w of theirs;
T tokens, D and P channels of a token and of pooled text.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gesso import keyed
from gesso.data.listing import Texts
from gesso.data.samples import Dataset, Samples
from gesso.data.shards import TEXT, mapped, opened_manifest
from gesso.data.text import Encoded


class Captions(Sequence[str]):
    """Of all files one after another; decoded when they are asked for."""

    def __init__(self, parts: list[Texts], ends: list[int]):
        self.parts, self.ends = parts, ends

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        f = bisect.bisect_right(self.ends, i)
        return self.parts[f][i - self.ends[f] + len(self.parts[f])]

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            yield from part


class Cache(Dataset):
    """What `gesso cache` wrote at `where`. x is pixels uint8, or moments in the type they are stored in.

    A sample is one of the K views of its image, keyed to (seed, counter). window: shards among which an order may shuffle.
    buckets: sizes in pixels; bucket_of (N,) int64, which of them an image is in: the images of one `take` are in one.

    Raises UsageError as `opened_manifest`.
    """

    immediate = True

    def __init__(self, where: str | Path, seed: int = 0, window: int | None = None):
        self.where, self.seed, self.window, self.notes = str(where), seed, window, []
        self.manifest = opened_manifest(where)
        plan, files = self.manifest.plan, self.manifest.files
        self.plan, self.latents = plan, plan.latent.vae is not None
        self.class_names, self.unreadable = self.manifest.class_names, list(self.manifest.unreadable)
        shards = [mapped(Path(where), plan, shard) for shard in files]

        def whole(name: str) -> Tensor:
            return torch.cat([shard[name] for shard in shards])

        # What is small is held in memory; the rows of x, tokens and captions stay on the disk.
        self.labels, self.sizes = whole("label"), whole("size").long()
        self._drawn = torch.cat([whole("box"), whole("flip")[:, :, None], whole("tone")], dim=2).flatten(0, 1).numpy()
        x = [shard["moments" if self.latents else "pixels"] for shard in shards]
        self._x, self._dtype = [memoryview(part.numpy().reshape(-1).view(np.uint8)) for part in x], x[0].dtype
        self._text = [{name: shard[name].numpy() for name in TEXT if name in shard} for shard in shards]
        counts = np.array([shard.rows for shard in files])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        parts = [Texts(shard["caption"].numpy(), shard["caption_end"].numpy()) for shard in shards]
        self.captions = Captions(parts, self._ends.tolist())
        self.buckets = plan.sizes()
        self.bucket_of = np.repeat([self.buckets.index((shard.height, shard.width)) for shard in files], counts)

    def take(self, index: Tensor, counter: Tensor) -> Samples:
        if self.plan.views == 1:
            return self._views(index, torch.zeros_like(index))
        view = (keyed.uniform(self.seed, counter, "view")[:, 0] * self.plan.views).long()
        return self._views(index, view)

    def pictures(self, index: Tensor) -> Tensor:
        """The first view that is not mirrored. Where all are, pixels are mirrored back, and latents are the first view."""
        mirrored = self._drawn[:, 4].reshape(-1, self.plan.views)[index.numpy()]
        samples = self._views(index, torch.from_numpy(mirrored.argmin(axis=1)))
        back = samples.flips[:, None, None, None] & (not self.latents)
        return torch.where(back, samples.x.flip(3), samples.x)

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.manifest.mean, self.manifest.std))
        return mean, std

    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def _views(self, index: Tensor, view: Tensor) -> Samples:
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
        to, parts, here = memoryview(x), self._x, 0
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
            ends = self._text[f]["token_end"]
            start, stop = int(ends[i - 1]) if i else 0, int(ends[i])
            lengths[b] = stop - start
            tokens[b, : stop - start] = self._text[f]["tokens"][start:stop]
            pooled[b] = self._text[f]["pooled"][i]
        return Encoded(torch.from_numpy(tokens), lengths, torch.from_numpy(pooled))


def facts(cache: Cache) -> dict[str, Any]:
    """What a run takes from a cache: fields of its blocks `data` and `latent`, and `text`, the encoder's identity or None."""
    manifest, plan = cache.manifest, cache.plan
    captions = dict.fromkeys(cache.captions[:1000])
    data = {name: getattr(plan.data, name) for name in ("resolution", "channels", "flip", "crop_scale")} | {
        "num_images": len(cache),
        "num_classes": len(cache.class_names),
        "class_names": cache.class_names,
        "examples": tuple(captions)[:16] if any(captions) else (),
        "fingerprint": manifest.fingerprint,
    }
    latent = {name: getattr(plan.latent, name) for name in ("vae", "convention", "channels", "factor", "dtype")}
    return {"data": data, "latent": latent if plan.latent.vae else {}, "text": manifest.text}
