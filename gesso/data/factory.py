"""Open the dataset that data.source names, and complete the settings of a run with its statistics."""

import numpy as np
import torch

from gesso.config import DataConfig, LatentConfig, RunConfig
from gesso.data.base import Dataset, latent_channel_stats
from gesso.data.cache import remote
from gesso.data.cache.format import is_cache
from gesso.data.cache.read import CachedDataset
from gesso.data.encoders.vae import EDM2_MEAN, EDM2_STD
from gesso.data.in_memory import ProgressCallback, load_in_memory
from gesso.data.normalization import open_vae
from gesso.data.on_the_fly import OnTheFlyDataset
from gesso.data.sources import NAMED_SOURCES, open_source
from gesso.data.sources.base import Source
from gesso.errors import RunError, UsageError

PIXEL_SPACE = LatentConfig()
MAX_IN_MEMORY_BYTES = 2**31
"""Maximum bytes of pixels held in memory; a larger source is decoded during training."""


def open_dataset(
    data: DataConfig,
    latent: LatentConfig = PIXEL_SPACE,
    seed: int = 0,
    progress: ProgressCallback = lambda done, total: None,
) -> Dataset:
    """Open the dataset of a run.

    A cache is read from its files. A source is held in memory if it is small and its crops are fixed, and is decoded
    during training otherwise.

    Args:
        data: Settings of the data; `data.source` names a cache or a source.
        latent: Settings of the VAE.
        seed: Seed of crops and flips.
        progress: Called as progress(done, total) while images are read into memory.

    Raises:
        UsageError: The source is missing, is empty, or does not fit the settings.
        RunError: Too many images are unreadable.
    """
    dataset = _open(data, latent, seed, progress)
    if not dataset.held_out:
        dataset.hold_out_validation(data.num_validation)
    return dataset


def _open(data: DataConfig, latent: LatentConfig, seed: int, progress: ProgressCallback) -> Dataset:
    if is_cache_uri(data.source):
        return CachedDataset(data.source, seed, data.shuffle_window_shards)
    source = open_source(data.source)
    if data.source in ("digits", "digits-mixed-resolution") and (data.resolution < 8 or data.channels != 1):
        raise UsageError(
            f"data.source={data.source} has grey 8x8 images, but data.resolution={data.resolution}, "
            f"data.channels={data.channels}; set data.resolution to 8 or more and data.channels=1"
        )
    if source.has_latents:
        _check_latents(source, data, latent)
    fits_in_memory = len(source) * data.channels * data.resolution**2 <= MAX_IN_MEMORY_BYTES
    if fits_in_memory and not source.has_latents and not latent.vae and data.crop_scale is None:
        return load_in_memory(source, data, seed, progress)
    return OnTheFlyDataset(source, data, seed)


def is_cache_uri(uri: str) -> bool:
    """Return whether `uri` is a cache, in a folder or at a remote address."""
    return remote.is_remote(uri) or is_cache(uri)


def is_named_source(uri: str) -> bool:
    """Return whether `uri` is one of NAMED_SOURCES, such as shapes:5000, and not a path."""
    return uri.partition(":")[0] in NAMED_SOURCES


def check_replaced_source(run: RunConfig, recorded: RunConfig) -> None:
    """Raise UsageError if data.source was replaced by other images than the run was trained on."""
    if run.data.source == recorded.data.source:
        return
    if open_dataset(run.data, run.latent, run.train.seed).fingerprint() != recorded.data.fingerprint:
        raise UsageError(
            f"data.source={run.data.source} holds other images than the run was trained on, which were in "
            f"{recorded.data.source}: name a copy of those"
        )


def _check_latents(source: Source, data: DataConfig, latent: LatentConfig) -> None:
    """Raise UsageError if the shape (2c, h, w) of stored latents does not fit the settings."""
    prefix = f"data.source={data.source} contains latents"
    if latent.vae is None:
        raise UsageError(
            f"{prefix}: set the VAE that encoded them, such as latent.vae=stabilityai/sd-vae-ft-mse "
            "latent.convention=edm2"
        )
    if data.flip or data.crop_scale:
        raise UsageError(f"{prefix}, which cannot be mirrored or cropped: set data.flip=false data.crop_scale=null")
    edge = data.resolution // latent.downsample_factor
    shape, expected = np.shape(source.item(0).image), (2 * latent.channels, edge, edge)
    if shape != expected:
        raise UsageError(
            f"{prefix} of {shape[0] // 2} channels, {shape[1]}x{shape[2]}, but latent.channels={latent.channels}, "
            f"latent.downsample_factor={latent.downsample_factor} and data.resolution={data.resolution} mean "
            f"{latent.channels} channels, {edge}x{edge}"
        )


def with_dataset_info(
    data: DataConfig, dataset: Dataset, latent: LatentConfig = PIXEL_SPACE, seed: int = 0
) -> DataConfig:
    """Return `data` completed with the counts, names, fingerprint, mean and standard deviation of the dataset.

    Raises:
        RunError: A channel is constant over all images.
    """
    mean, std = _channel_stats(data, dataset, latent, seed)
    flat = [i for i, value in enumerate(std) if not value > 0]
    if flat:
        raise RunError(
            f"channel {flat[0]} of {len(std)} has one value in all {len(dataset)} images of {data.source}, so that it "
            "cannot be normalized: check the images, or set data.channels=1 for grey ones, or data.mean and data.std"
        )
    captions = dict.fromkeys(dataset.captions[:1000])
    counts = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
    untrained = (counts[: len(dataset.class_names)] == 0).nonzero().flatten().tolist()
    return data.model_copy(
        update=dict(
            num_images=len(dataset),
            num_classes=len(dataset.class_names),
            class_names=dataset.class_names,
            untrained_classes=tuple(untrained) or None,
            fingerprint=dataset.fingerprint(),
            example_captions=tuple(captions)[:16] if any(captions) else (),
            mean=mean,
            std=std,
        )
    )


def _channel_stats(
    data: DataConfig, dataset: Dataset, latent: LatentConfig, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel: from the settings, the VAE's convention, or measured."""
    if data.mean and data.std:
        return data.mean, data.std
    if latent.vae and latent.normalization == "vae":
        # The statistics of edm2 are fixed constants: latents of that convention train without their VAE.
        mean, std = (EDM2_MEAN, EDM2_STD) if latent.convention == "edm2" else open_vae(latent, "cpu").channel_stats()
    elif latent.vae and not dataset.has_latents:
        sample_index = torch.arange(min(len(dataset), 1024))
        vae, order = open_vae(latent, "cpu"), dataset.sample_order(seed, 1)
        batches = [dataset.get(order(k), k).x for k in sample_index.split(32)]
        stats = latent_channel_stats(torch.cat([torch.cat(vae.encode(x), dim=1) for x in batches]))
        mean, std = (tuple(value.tolist()) for value in stats)
    else:
        mean, std = (tuple(value.tolist()) for value in dataset.channel_stats())
    return data.mean or mean, data.std or std
