"""Opening what data.source names for training, and what a run learns from it."""

import torch

from gesso.config import Data, Latent
from gesso.data import remote
from gesso.data.cache import Cache
from gesso.data.images import Progress, load
from gesso.data.listing import Source
from gesso.data.live import Live
from gesso.data.samples import Dataset, latent_moments
from gesso.data.shards import is_cache
from gesso.data.sources import open_source
from gesso.data.space import open_vae
from gesso.data.vae import EDM2_MEAN, EDM2_STD
from gesso.errors import RunError, UsageError

PIXELS = Latent()
IN_MEMORY = 2**31
"""bytes of pixels; a larger source is decoded as training comes to it"""


def open_dataset(
    data: Data, latent: Latent = PIXELS, seed: int = 0, progress: Progress = lambda done, total: None
) -> Dataset:
    """The images that `data` names: a cache, read from its files; else a source, held in memory where every visit shows the same pixels and there are few, else decoded as
    they are needed. `progress(done, total)` is called as images are read into memory.

    Raises UsageError when the source is missing, empty or of another shape; RunError when too many images are
    unreadable.
    """
    dataset = _opened(data, latent, seed, progress)
    dataset.hold_out(data.held_out)
    return dataset


def _opened(data: Data, latent: Latent, seed: int, progress: Progress) -> Dataset:
    if is_cached(data.source):
        return Cache(data.source, seed, data.window)
    source = open_source(data.source)
    if data.source in ("digits", "digits-coarse") and (data.resolution < 8 or data.channels != 1):
        raise UsageError(
            f"data.source={data.source} has grey 8x8 images, but data.resolution={data.resolution}, data.channels={data.channels}; "
            "set them to 8 (or more, enlarged) and 1, or choose another source"
        )
    if source.latents:
        _check_latents(source, data, latent)
    small = len(source) * data.channels * data.resolution**2 <= IN_MEMORY
    if small and not source.latents and not latent.vae and data.crop_scale is None:
        return load(source, data, seed, progress)
    return Live(source, data, seed)


def is_cached(where: str) -> bool:
    """Whether `where` is a cache, in a folder or at an address."""
    return remote.is_remote(where) or is_cache(where)


def _check_latents(source: Source, data: Data, latent: Latent) -> None:
    """Raise UsageError where latents (2c, h, w) are not what the settings say."""
    where = f"data.source={data.source} holds latents"
    if latent.vae is None:
        raise UsageError(
            f"{where}: say which VAE made them, such as latent.vae=stabilityai/sd-vae-ft-mse latent.convention=edm2"
        )
    if data.flip or data.crop_scale:
        raise UsageError(f"{where}, which cannot be mirrored or cropped: set data.flip=false data.crop_scale=null")
    has, due = source.item(0).image.shape, (2 * latent.channels, *2 * (data.resolution // latent.factor,))
    if has != due:
        raise UsageError(
            f"{where} of {has[0] // 2} channels, {has[1]}x{has[2]}, where latent.channels={latent.channels}, "
            f"latent.factor={latent.factor}, data.resolution={data.resolution} make {due[0] // 2}, {due[1]}x{due[2]}"
        )


def described(data: Data, dataset: Dataset, latent: Latent = PIXELS, seed: int = 0) -> Data:
    """`data` with all that opening its source tells: counts, names, fingerprint, mean and std."""
    mean, std = _constants(data, dataset, latent, seed)
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
            examples=tuple(captions)[:16] if any(captions) else (),
            mean=mean,
            std=std,
        )
    )


def _constants(data: Data, dataset: Dataset, latent: Latent, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel: as the settings say, by the VAE's convention, or measured."""
    if data.mean and data.std:
        return data.mean, data.std
    if latent.vae and latent.constants == "vae":
        # Those of edm2 are fixed: latents of that convention train without their VAE.
        mean, std = (EDM2_MEAN, EDM2_STD) if latent.convention == "edm2" else open_vae(latent, "cpu").constants()
    elif latent.vae and not dataset.latents:
        counter = torch.arange(min(len(dataset), 1024))
        vae, order = open_vae(latent, "cpu"), dataset.order(seed, 1)
        parts = [dataset.take(order(some), some).x for some in counter.split(32)]
        found = latent_moments(torch.cat([torch.cat(vae.encode(x), dim=1) for x in parts]))
        mean, std = (tuple(value.tolist()) for value in found)
    else:
        mean, std = (tuple(value.tolist()) for value in dataset.moments())
    return data.mean or mean, data.std or std
