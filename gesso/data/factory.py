"""Opening what data.source names for training, and what a run learns from it."""

import torch

from gesso.config import DataConfig, LatentConfig
from gesso.data.base import Dataset, latent_channel_stats
from gesso.data.cache import remote
from gesso.data.cache.format import is_cache
from gesso.data.cache.read import CachedDataset
from gesso.data.encoders.vae import EDM2_MEAN, EDM2_STD
from gesso.data.in_memory import ProgressCallback, load_in_memory
from gesso.data.normalization import open_vae
from gesso.data.on_the_fly import OnTheFlyDataset
from gesso.data.sources import open_source
from gesso.data.sources.base import Source
from gesso.errors import RunError, UsageError

PIXEL_SPACE = LatentConfig()
MAX_IN_MEMORY_BYTES = 2**31
"""bytes of pixels; a larger source is decoded as training comes to it"""


def open_dataset(
    data: DataConfig,
    latent: LatentConfig = PIXEL_SPACE,
    seed: int = 0,
    progress: ProgressCallback = lambda done, total: None,
) -> Dataset:
    """The images that `data` names: a cache, read from its files; else a source, held in memory where every visit shows the same pixels and there are few, else decoded as
    they are needed. `progress(done, total)` is called as images are read into memory.

    Raises UsageError when the source is missing, empty or of another shape; RunError when too many images are
    unreadable.
    """
    dataset = _open(data, latent, seed, progress)
    dataset.hold_out_validation(data.num_validation)
    return dataset


def _open(data: DataConfig, latent: LatentConfig, seed: int, progress: ProgressCallback) -> Dataset:
    if is_cache_uri(data.source):
        return CachedDataset(data.source, seed, data.shuffle_window_shards)
    source = open_source(data.source)
    if data.source in ("digits", "digits-mixed-resolution") and (data.resolution < 8 or data.channels != 1):
        raise UsageError(
            f"data.source={data.source} has grey 8x8 images, but data.resolution={data.resolution}, data.channels={data.channels}; "
            "set them to 8 (or more, enlarged) and 1, or choose another source"
        )
    if source.has_latents:
        _check_latents(source, data, latent)
    small = len(source) * data.channels * data.resolution**2 <= MAX_IN_MEMORY_BYTES
    if small and not source.has_latents and not latent.vae and data.crop_scale is None:
        return load_in_memory(source, data, seed, progress)
    return OnTheFlyDataset(source, data, seed)


def is_cache_uri(uri: str) -> bool:
    """Whether `where` is a cache, in a folder or at an address."""
    return remote.is_remote(uri) or is_cache(uri)


def _check_latents(source: Source, data: DataConfig, latent: LatentConfig) -> None:
    """Raise UsageError where latents (2c, h, w) are not what the settings say."""
    where = f"data.source={data.source} holds latents"
    if latent.vae is None:
        raise UsageError(
            f"{where}: say which VAE made them, such as latent.vae=stabilityai/sd-vae-ft-mse latent.convention=edm2"
        )
    if data.flip or data.crop_scale:
        raise UsageError(f"{where}, which cannot be mirrored or cropped: set data.flip=false data.crop_scale=null")
    has, due = source.item(0).image.shape, (2 * latent.channels, *2 * (data.resolution // latent.downsample_factor,))
    if has != due:
        raise UsageError(
            f"{where} of {has[0] // 2} channels, {has[1]}x{has[2]}, where latent.channels={latent.channels}, "
            f"latent.downsample_factor={latent.downsample_factor}, data.resolution={data.resolution} make {due[0] // 2}, {due[1]}x{due[2]}"
        )


def with_dataset_info(
    data: DataConfig, dataset: Dataset, latent: LatentConfig = PIXEL_SPACE, seed: int = 0
) -> DataConfig:
    """`data` with all that opening its source tells: counts, names, fingerprint, mean and std."""
    mean, std = _channel_stats(data, dataset, latent, seed)
    if not all(value > 0 for value in std):
        raise RunError(
            f"all {len(dataset)} images of {data.source} are one flat colour in some channel: nothing to learn"
        )
    captions = dict.fromkeys(dataset.captions[:1000])
    return data.model_copy(
        update=dict(
            num_images=len(dataset),
            num_classes=len(dataset.class_names),
            class_names=dataset.class_names,
            fingerprint=dataset.fingerprint(),
            example_captions=tuple(captions)[:16] if any(captions) else (),
            mean=mean,
            std=std,
        )
    )


def _channel_stats(
    data: DataConfig, dataset: Dataset, latent: LatentConfig, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel: as the settings say, by the VAE's convention, or measured."""
    if data.mean and data.std:
        return data.mean, data.std
    if latent.vae and latent.normalization == "vae":
        # Those of edm2 are fixed: latents of that convention train without their VAE.
        mean, std = (EDM2_MEAN, EDM2_STD) if latent.convention == "edm2" else open_vae(latent, "cpu").channel_stats()
    elif latent.vae and not dataset.has_latents:
        counter = torch.arange(min(len(dataset), 1024))
        vae, order = open_vae(latent, "cpu"), dataset.sample_order(seed, 1)
        parts = [dataset.get(order(some), some).x for some in counter.split(32)]
        found = latent_channel_stats(torch.cat([torch.cat(vae.encode(x), dim=1) for x in parts]))
        mean, std = (tuple(value.tolist()) for value in found)
    else:
        mean, std = (tuple(value.tolist()) for value in dataset.channel_stats())
    return data.mean or mean, data.std or std
