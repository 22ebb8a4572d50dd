"""Read a cache for training: memory-mapped, by image, in any order. format.py describes the files.

Legend: N images, K views of each, B samples; C channels of pixels, H W their size; c channels of latents, h w their
size; T tokens, D and P channels of a token and of pooled text.
"""

import math
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso import rng
from gesso.config import RunConfig
from gesso.data.base import Dataset, SampleBatch
from gesso.data.cache import remote
from gesso.data.cache.format import (
    COLUMNS_FILE,
    SHARD_DIR,
    TEXT_TENSORS,
    check_sample,
    map_columns,
    map_shard,
    open_manifest,
)
from gesso.data.encoders.text import EncodedText
from gesso.data.samplers import BucketSampler, EpochSampler, ShardWindowShuffle
from gesso.data.sources.base import StringArray
from gesso.errors import UsageError


class OpenShard(NamedTuple):
    """A memory-mapped shard: the bytes of its views, and its text tensors by name."""

    x: memoryview
    text: dict[str, np.ndarray]


class CachedDataset(Dataset):
    """Dataset of a cache in a folder or at an address (remote.py); x is pixels uint8, or latents in their stored dtype.

    A sample is one of the K views of its image, keyed to (seed, sample index).

    Args:
        uri: Folder or address.
        seed: Seed of the choice of views.
        window: Number of shards whose images are shuffled together, None for all. Of a cache at an address, at most the
            shards of two windows are on the local disk.

    Raises:
        UsageError: The cache cannot be opened, as `open_manifest`.
    """

    is_cheap = True

    def __init__(self, uri: str | Path, seed: int = 0, window: int | None = None):
        self.uri, self.seed, self.window, self.notes = str(uri), seed, window, []
        at_address = remote.is_remote(uri)
        self.manifest = remote.open_remote_manifest(self.uri) if at_address else open_manifest(uri)
        plan, files = self.manifest.plan, self.manifest.files
        self.plan, self.has_latents = plan, plan.latent.vae is not None
        self.text_config = plan.semantic if plan.semantic.kind == "text" else None
        self.class_names, self.unreadable = self.manifest.class_names, list(self.manifest.unreadable)
        self._dtype = getattr(torch, plan.dtype or "float32") if self.has_latents else torch.uint8
        self._remote_shards = self._open_remote() if at_address else None
        self.is_remote = at_address and window is not None
        self._window_shuffle: ShardWindowShuffle | None = None
        self._open_shards: dict[int, OpenShard] = {}
        self._open_lock = threading.Lock()
        # Small columns are held in memory; views and tokens are read from the disk.
        columns = map_columns(self._path(COLUMNS_FILE), self.manifest)
        self.labels, self.original_sizes = columns["label"].clone(), columns["size"].long()
        view_params = [columns["box"], columns["flip"][:, :, None], columns["tone"]]
        self._view_params = torch.cat(view_params, dim=2).flatten(0, 1).numpy()
        self.captions = StringArray(columns["caption"].numpy(), columns["caption_end"].numpy())
        shard_rows = np.array([shard.rows for shard in files])
        self._ends = np.cumsum(shard_rows)
        self._starts = self._ends - shard_rows
        self.buckets = plan.bucket_sizes()
        self.bucket_of = np.repeat([self.buckets.index((shard.height, shard.width)) for shard in files], shard_rows)
        if not at_address:  # report a damaged file now, not in the middle of training
            for f in range(len(files)):
                self._shard(f)
            check_sample(Path(uri), self.manifest)

    def _open_remote(self) -> remote.RemoteShards:
        """Return the local copies of the files at an address."""
        files, columns, max_bytes = self.manifest.files, self.manifest.columns, None
        if self.window is not None:
            sizes = sorted((shard.bytes for shard in files), reverse=True)
            max_bytes = columns.bytes + sum(sizes[: 2 * self.window])
        shards = remote.RemoteShards(self.uri, (*files, columns), self.manifest.fingerprint, max_bytes)
        if self.window is None:
            shards.prefetch([columns.name, *(shard.name for shard in files)])
        return shards

    def _path(self, name: str) -> Path:
        return self._remote_shards.path(name) if self._remote_shards else Path(self.uri) / SHARD_DIR / name

    def _shard(self, f: int) -> OpenShard:
        with self._open_lock:
            if f not in self._open_shards:
                shard = self.manifest.files[f]
                tensors = map_shard(self._path(shard.name), self.plan, shard)
                x = tensors["moments" if self.has_latents else "pixels"].numpy().reshape(-1).view(np.uint8)
                self._open_shards[f] = OpenShard(
                    x.data, {name: tensors[name].numpy() for name in TEXT_TENSORS if name in tensors}
                )
            return self._open_shards[f]

    def _advance_window(self, sample_index: Tensor) -> None:
        """Release the remote shards of earlier windows and prefetch those of the next."""
        if self._remote_shards is None or self._window_shuffle is None:
            return
        first, stop = int(sample_index.min()), int(sample_index.max()) + 1
        needed, files = set(self._window_shuffle.shards_for(first, stop)), self.manifest.files
        with self._open_lock:
            to_release = [f for f in self._open_shards if f not in needed]
            for f in to_release:
                del self._open_shards[f]
        self._remote_shards.release(files[f].name for f in to_release)
        self._remote_shards.prefetch(
            [files[f].name for f in self._window_shuffle.shards_for(first, stop + self._window_shuffle.max_window_size)]
        )

    def _training_order(self, seed: int, batch_size: int) -> EpochSampler:
        """Return the order of the training images; raise UsageError for a window with buckets, or too small buckets."""
        self._window_shuffle = None
        excluded = self.validation_indices.numpy()
        if len(self.buckets) > 1:
            if self.window:
                raise UsageError(
                    f"{self.uri} has buckets, which cannot be shuffled in windows: set data.shuffle_window_shards=null"
                )
            return BucketSampler(torch.from_numpy(np.delete(self.bucket_of, excluded)), batch_size, seed)
        if self.window is None:
            return super()._training_order(seed, batch_size)
        num_excluded = np.bincount(np.searchsorted(self._ends, excluded, side="right"), minlength=len(self._ends))
        shard_sizes = (self._ends - self._starts - num_excluded).tolist()
        self._window_shuffle = ShardWindowShuffle(shard_sizes, self.window, seed)
        return self._window_shuffle

    def indices_of_size(self, height: int, width: int) -> Tensor:
        """Return the indices of the images of one bucket."""
        buckets = [b for b, size in enumerate(self.buckets) if size == (height, width)]
        return torch.from_numpy(np.flatnonzero(np.isin(self.bucket_of, buckets)))

    def implied_settings(self, run: RunConfig) -> dict[str, dict[str, object]]:
        """Return the settings that the cache determines."""
        data: dict[str, object] = {
            name: getattr(self.plan.data, name) for name in ("resolution", "channels", "flip", "crop_scale", "resize")
        }
        data["buckets"] = tuple(self.buckets) if len(self.buckets) > 1 else None
        names = ("vae", "convention", "channels", "downsample_factor")
        latent: dict[str, object] = {"vae": None}
        if self.has_latents:
            latent = {name: getattr(self.plan.latent, name) for name in names}
        return {"data": data, "latent": latent}

    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Return samples, as `Dataset.get` does."""
        self._advance_window(sample_index)
        if self.plan.views == 1:
            return self.get_views(indices, torch.zeros_like(indices))
        view = (rng.uniform(self.seed, sample_index, "view")[:, 0] * self.plan.views).long()
        return self.get_views(indices, view)

    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        """Return the first view that is not mirrored; if all are, pixels are mirrored back, latents are not."""
        mirrored = self._view_params[:, 4].reshape(-1, self.plan.views)[indices.numpy()]
        samples = self.get_views(indices, torch.from_numpy(mirrored.argmin(axis=1)))
        if self.has_latents or not samples.flips.any():
            return samples
        x = torch.where(samples.flips[:, None, None, None], samples.x.flip(3), samples.x)
        return samples._replace(x=x, flips=torch.zeros_like(samples.flips))

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Return the stored mean and standard deviation per channel."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.manifest.mean, self.manifest.std))
        return mean, std

    def fingerprint(self) -> str:
        """Return the stored fingerprint."""
        return self.manifest.fingerprint

    def get_views(self, indices: Tensor, view: Tensor) -> SampleBatch:
        """Return the views `view` (B,) of the images `indices` (B,), all of one bucket."""
        # In numpy: a call of torch costs as much as copying a row.
        K, i = self.plan.views, indices.numpy()
        row = i * K + view.numpy()
        if len(self.buckets) > 1:
            buckets = set(self.bucket_of[i].tolist())
            assert len(buckets) == 1, f"a batch must be of one bucket, not of {buckets}"
        shard_index = np.searchsorted(self._ends, i, side="right")
        shards, shape = shard_index.tolist(), self.manifest.files[int(shard_index[0])].shape[2:]
        size = math.prod(shape) * self._dtype.itemsize
        # np.empty requests huge pages. Copying row by row is nearly as fast as one gather, and works for many shards.
        x = np.empty(len(shards) * size, np.uint8)
        target, sources = x.data, {f: self._shard(f).x for f in set(shards)}
        starts = (size * (row - K * self._starts[shard_index])).tolist()
        for b, (f, start) in enumerate(zip(shards, starts, strict=True)):
            target[b * size : (b + 1) * size] = sources[f][start : start + size]
        params = torch.from_numpy(self._view_params[row])
        return SampleBatch(
            x=torch.from_numpy(x).view(self._dtype).view(-1, *shape),
            original_sizes=self.original_sizes[indices],
            crop_boxes=params[:, :4],
            flips=params[:, 4] > 0,
            pixel_stats=params[:, 5:],
            labels=self.labels[indices],
            indices=indices,
            encoded_text=self._encoded_text(shards, (i - self._starts[shard_index]).tolist()),
        )

    def _encoded_text(self, shards: list[int], rows: list[int]) -> EncodedText | None:
        """Return the tokens of row `rows[b]` of shard `shards[b]`, None for a cache without text."""
        semantic = self.plan.semantic
        if semantic.kind != "text":
            return None
        assert semantic.embed_dim is not None and semantic.pooled_dim is not None  # of a written cache
        tokens = np.zeros((len(shards), semantic.max_tokens, semantic.embed_dim), np.float32)
        pooled = np.zeros((len(shards), semantic.pooled_dim), np.float32)
        lengths = torch.zeros(len(shards), dtype=torch.int64)
        for b, (f, i) in enumerate(zip(shards, rows, strict=True)):
            text = self._shard(f).text
            ends = text["token_end"]
            start, stop = int(ends[i - 1]) if i else 0, int(ends[i])
            lengths[b] = stop - start
            tokens[b, : stop - start] = text["tokens"][start:stop]
            pooled[b] = text["pooled"][i]
        return EncodedText(torch.from_numpy(tokens), lengths, torch.from_numpy(pooled))
