"""Encode images of a source as rows of a shard: views, latents, tokens.

Legend: n images, K views of each, B views per pass through the VAE; C channels of pixels, H W their size; c channels of
latents, h w their size; D and P channels of a token and of pooled text.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso import rng
from gesso.config import DataConfig
from gesso.data import crops
from gesso.data.cache.plan import CachePlan, EncoderIdentity, MomentSums
from gesso.data.encoders import face_blur, text
from gesso.data.encoders.text import TextEncoder
from gesso.data.encoders.vae import VAE
from gesso.data.sources.base import Source, SourceItem, StringArray
from gesso.errors import RunError, UnreadableImageError, UsageError

CAPTION_BATCH_SIZE = 64
"""Number of captions per call of the text encoder."""
MAX_SHARD_BYTES = 2**28
MAX_IMAGES_PER_SHARD = 4096
"""Limits of a shard if the plan does not set images_per_shard."""


class CacheJob(NamedTuple):
    """A complete plan, its source and encoders; `vae` is None for pixels and for sources of latents."""

    plan: CachePlan
    source: Source
    vae: VAE | None
    encoder: TextEncoder | None

    def identities(self) -> tuple[EncoderIdentity | None, EncoderIdentity | None]:
        """Return the identities of the VAE and of the text encoder."""
        vae_identity: EncoderIdentity | None = self.vae.identity() if self.vae else None
        if self.source.has_latents:
            names = ("vae", "convention", "channels", "downsample_factor")
            vae_identity = {name: getattr(self.plan.latent, name) for name in names}
        return vae_identity, self.encoder.identity() if self.encoder else None


class EncodedImage(NamedTuple):
    """One image with K views.

    Attributes:
        position: Index in the source.
        label: Class index.
        caption: Caption.
        original_size: Height and width of the uncropped image.
        crop_boxes: K boxes.
        flips: Whether each view is mirrored.
        pixel_stats: (K, 2) mean and standard deviation of the pixels of each view.
        x: (K, C, H, W) uint8 or (1, 2c, h, w) float32; None after the image is added to a shard.
        bucket: Index in plan.bucket_sizes().
        num_faces: Number of blurred faces.
        pixel_sums: (2, C) int64 sums of pixels and of their squares; None for latents.
    """

    position: int
    label: int
    caption: str
    original_size: tuple[int, int]
    crop_boxes: list[tuple[float, ...]]
    flips: list[bool]
    pixel_stats: np.ndarray
    x: Tensor | None
    bucket: int = 0
    num_faces: int = 0
    pixel_sums: np.ndarray | None = None


def open_job(plan: CachePlan, source: Source, device: torch.device) -> CacheJob:
    """Open VAE and text encoder and complete the plan; raise UsageError for settings that contradict each other."""
    latent, semantic, vae, encoder = plan.latent, plan.semantic, None, None
    if source.has_latents:
        latent = latent.model_copy(update=_stored_latent_settings(plan, source))
    elif latent.vae:
        vae = VAE(latent.vae, device, getattr(torch, latent.dtype), latent.convention)
        latent = latent.model_copy(update=_vae_settings(plan, vae))
    if semantic.kind == "text":
        encoder = text.build_text_encoder(semantic, device)
        if not any(source.captions()):
            raise UsageError(
                f"--text: {plan.data.source} has no captions; write a .txt file for each image, or remove --text"
            )
        semantic = semantic.model_copy(update={"embed_dim": encoder.embed_dim, "pooled_dim": encoder.pooled_dim})
    if plan.blur_faces:
        face_blur.import_opencv()
    dtype = plan.dtype or ("float32" if source.has_latents else "float16")
    plan = plan.model_copy(
        update={"latent": latent, "semantic": semantic, "dtype": dtype if latent.vae or encoder else None}
    )
    if plan.images_per_shard is None:
        limit = max(MAX_SHARD_BYTES // _bytes_per_image(plan), 1)
        plan = plan.model_copy(update={"images_per_shard": min(2 ** int(math.log2(limit)), MAX_IMAGES_PER_SHARD)})
    return CacheJob(plan, source, vae, encoder)


def _vae_settings(plan: CachePlan, vae: VAE) -> dict[str, int]:
    """Return channels and downsampling factor of a VAE; raise UsageError if the plan contradicts them."""
    latent, f = plan.latent, vae.downsample_factor
    settings = {"channels": vae.latent_channels, "downsample_factor": f}
    for name, actual in settings.items():
        value = getattr(latent, name)
        if value not in (actual, getattr(type(latent)(), name)):
            raise UsageError(f"latent.{name}={value}, but --vae {latent.vae} has {actual}: remove the setting")
    for h, w in plan.bucket_sizes():
        if h % f or w % f:
            raise UsageError(
                f"--vae {latent.vae} needs multiples of {f} pixels, not {h}x{w}: "
                "change --resolution" + (", --buckets or bucket_multiple" if plan.buckets > 1 else "")
            )
    return settings


def _stored_latent_settings(plan: CachePlan, source: Source) -> dict[str, int]:
    """Return channels and downsampling factor of stored latents; raise UsageError if the plan contradicts them."""
    data, prefix = plan.data, f"{plan.data.source} contains latents"
    if plan.latent.vae is None or plan.latent.convention != "edm2":
        raise UsageError(
            f"{prefix}: add --convention edm2 and the --vae that encoded them, such as stabilityai/sd-vae-ft-mse "
            "(it is recorded, not loaded)"
        )
    unsupported = {
        "--crop-scale": data.crop_scale,
        "--flip": data.flip,
        "--views": plan.views > 1,
        "--blur-faces": plan.blur_faces,
        "--buckets": plan.buckets > 1,
    }
    for flag, is_set in unsupported.items():
        if is_set:
            raise UsageError(f"{prefix}, which cannot be cropped or changed: remove {flag}")
    for i in range(len(source)):
        try:
            doubled, h, w = np.shape(source.item(i).image)
            break
        except UnreadableImageError:
            continue
    else:
        raise RunError(f"no image of {plan.data.source} can be read")
    if h != w or data.resolution % h:
        raise UsageError(f"{prefix} of {h}x{w}: --resolution {data.resolution} must be a multiple of their size")
    return {"channels": doubled // 2, "downsample_factor": data.resolution // h}


def _bytes_per_image(plan: CachePlan) -> int:
    """Return the bytes of all views of an image."""
    R, K = plan.data.resolution, plan.views
    if plan.latent.vae is None:
        return K * plan.data.channels * R * R
    assert plan.dtype is not None
    side = R // plan.latent.downsample_factor
    return K * 2 * plan.latent.channels * side**2 * getattr(torch, plan.dtype).itemsize


def nearest_bucket(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Return the index of the bucket with the nearest aspect ratio."""
    return min(range(len(sizes)), key=lambda b: abs(math.log(sizes[b][1] * height / (sizes[b][0] * width))))


def view_uniforms(seed: int, K: int, start: int, stop: int) -> np.ndarray:
    """Return uniform draws (stop - start, K, UNIFORMS_PER_VIEW) of images; those of a view do not depend on K."""
    index = torch.arange(start, stop)
    u = [rng.uniform(seed, index, f"view {v}", crops.UNIFORMS_PER_VIEW) for v in range(K)]
    return torch.stack(u, dim=1).numpy()


def make_views(
    data: DataConfig, height: int, width: int, uniforms: np.ndarray, aspect: float = 1.0
) -> list[crops.View]:
    """Return K views of an image for draws (K, UNIFORMS_PER_VIEW); with flips, every second view is mirrored."""
    views = [crops.random_view(data, height, width, u, aspect) for u in uniforms]
    return [view._replace(flip=data.flip and views[0].flip ^ (v % 2 == 1)) for v, view in enumerate(views)]


def encode_image(job: CacheJob, i: int, uniforms: np.ndarray, min_edge: int) -> EncodedImage | UnreadableImageError:
    """Encode image i of the source; thread-safe.

    Args:
        job: The job.
        i: Index in the source.
        uniforms: (K, UNIFORMS_PER_VIEW) draws.
        min_edge: As `crops.min_decode_edge` returns it for the largest bucket.

    Returns:
        The image, or the error of an unreadable one.
    """
    plan, data, source = job.plan, job.plan.data, job.source
    try:
        item = source.item(i)
        if source.has_latents:
            _check_latent_shape(plan, item)
            return EncodedImage(
                position=i,
                label=item.label,
                caption=item.caption,
                original_size=item.original_size or (data.resolution,) * 2,
                crop_boxes=[crops.FULL_VIEW[:4]],
                flips=[False],
                pixel_stats=np.zeros((1, 2)),
                x=torch.from_numpy(item.image)[None],
            )
        image, full_size = item.decode(data.channels, min_edge, data.resize)
    except UnreadableImageError as error:
        return UnreadableImageError(error.name, error.reason)  # a new error, without the traceback and its frames
    num_faces = 0
    if plan.blur_faces:
        image, num_faces = face_blur.blur_faces(image)
    sizes = plan.bucket_sizes()
    bucket = nearest_bucket(sizes, *full_size)
    H, W = sizes[bucket]
    views = make_views(data, *full_size, uniforms, W / H)
    x = np.stack([crops.crop_resize(image, view, H, W, data.resize) for view in views])
    sums = np.stack([x.sum((2, 3), dtype=np.int64), np.square(x, dtype=np.uint16).sum((2, 3), dtype=np.int64)])
    return EncodedImage(
        position=i,
        label=item.label,
        caption=item.caption,
        original_size=item.original_size or full_size,
        crop_boxes=[view[:4] for view in views],
        flips=[view.flip for view in views],
        pixel_stats=pixel_stats_from_sums(sums, H * W),
        x=torch.from_numpy(x),
        bucket=bucket,
        num_faces=num_faces,
        pixel_sums=sums.sum(1),
    )


def pixel_stats_from_sums(sums: np.ndarray, area: int) -> np.ndarray:
    """Return (K, 2) mean and standard deviation from sums (2, K, C) of pixels and of their squares.

    As `crops.compute_pixel_stats`, but bit-equal with any number of threads.
    """
    mean, mean_square = sums.sum(2) / (area * sums.shape[2])
    return np.stack([mean, np.sqrt(np.maximum(mean_square - mean**2, 0))], axis=1)


def _check_latent_shape(plan: CachePlan, item: SourceItem) -> None:
    edge = plan.data.resolution // plan.latent.downsample_factor
    expected, shape = (2 * plan.latent.channels, edge, edge), np.shape(item.image)
    if shape != expected:
        raise UnreadableImageError(item.name, f"latents of shape {shape} instead of {expected}")


class ShardBuilder:
    """Rows of a shard; latents and tokens are encoded in batches, views and captions in order."""

    def __init__(self, job: CacheJob):
        self.job, self.dtype = job, getattr(torch, job.plan.dtype or "float32")
        self.images: list[EncodedImage] = []
        self.sums = MomentSums()
        self._x: list[Tensor] = []
        self._pending_views: list[Tensor] = []
        self._captions: list[str] = []
        self._encoded_texts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, image: EncodedImage) -> None:
        """Add an image."""
        plan = self.job.plan
        assert image.x is not None
        self.images.append(image._replace(x=None))
        if self.job.vae:
            self._pending_views += image.x.unbind()
            while len(self._pending_views) >= plan.batch_size:
                self._encode_views()
        else:
            x = self._to_stored_dtype(image.x, "latents") if image.pixel_sums is None else image.x
            self._append(x, image.pixel_sums)
        if self.job.encoder:
            self._captions.append(image.caption)
            if len(self._captions) == CAPTION_BATCH_SIZE:
                self._encode_captions()

    def finish(self) -> None:
        """Encode the remaining latents and tokens."""
        if self._pending_views:
            self._encode_views()
        if self._captions:
            self._encode_captions()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of format.shard_layout."""
        plan, n = self.job.plan, len(self.images)
        captions = StringArray.from_strings(image.caption for image in self.images)

        def column(values: Sequence | np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.array(values)).to(dtype)

        x = torch.cat(self._x)
        result = {
            "moments" if plan.latent.vae else "pixels": x.unflatten(0, (n, plan.views)),
            "index": column([image.position for image in self.images], torch.int64),
            "label": column([image.label for image in self.images], torch.int64),
            "size": column([image.original_size for image in self.images], torch.int32),
            "box": column([image.crop_boxes for image in self.images], torch.float32),
            "flip": column([image.flips for image in self.images], torch.uint8),
            "tone": column([image.pixel_stats for image in self.images], torch.float32),
            "caption": column(captions.blob, torch.uint8),
            "caption_end": column(captions.ends, torch.int64),
        }
        if self.job.encoder:
            tokens, lengths, pooled = (torch.cat(parts) for parts in zip(*self._encoded_texts, strict=True))
            result |= {"tokens": tokens, "token_end": lengths.cumsum(0), "pooled": pooled}
        return result

    def _encode_views(self) -> None:
        """Encode at most one batch, padded with zeros, since the last bits depend on the batch size."""
        size = self.job.plan.batch_size
        batch, self._pending_views = torch.stack(self._pending_views[:size]), self._pending_views[size:]
        padded = torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
        assert self.job.vae is not None
        moments = torch.cat(self.job.vae.encode(padded), dim=1)[: len(batch)].cpu()
        self._append(self._to_stored_dtype(moments, "latents"), None)

    def _encode_captions(self) -> None:
        assert self.job.encoder is not None
        tokens, lengths, pooled = self.job.encoder(self._captions)
        tokens = tokens[torch.arange(tokens.shape[1]) < lengths[:, None]]  # without padding
        self._encoded_texts.append(
            (self._to_stored_dtype(tokens, "tokens"), lengths, self._to_stored_dtype(pooled, "tokens"))
        )
        self._captions = []

    def _to_stored_dtype(self, values: Tensor, label: str) -> Tensor:
        stored = values.to(self.dtype).contiguous()
        if not bool(stored.isfinite().all()):
            raise RunError(f"{label} up to {values.abs().max():.3g} exceed the range of float16: add --dtype float32")
        return stored

    def _append(self, x: Tensor, pixel_sums: np.ndarray | None) -> None:
        self._x.append(x)
        if pixel_sums is not None:  # integer sums of pixels are exact over all shards
            values, squares = pixel_sums.tolist()
            variances = [0.0] * len(values)
        else:  # in numpy, since sums of torch depend on the number of threads
            mean, std = np.split(x.numpy().astype(np.float64), 2, axis=1)
            values, squares, variances = (v.sum((0, 2, 3)).tolist() for v in (mean, mean**2, std**2))
        sums = MomentSums(count=x[:, 0].numel(), value_sum=values, square_sum=squares, variance_sum=variances)
        self.sums = add_sums(self.sums, sums)


def add_sums(a: MomentSums, b: MomentSums) -> MomentSums:
    """Return the sums over the views of both."""
    if not a.count or not b.count:
        return a if a.count else b
    totals = {
        name: tuple(x + y for x, y in zip(getattr(a, name), getattr(b, name), strict=True))
        for name in ("value_sum", "square_sum", "variance_sum")
    }
    return MomentSums(count=a.count + b.count, **totals)


def channel_stats(sums: MomentSums, latents: bool) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, as base.latent_channel_stats and base.pixel_channel_stats."""
    mean, mean_square, variance = (
        np.array(v) / sums.count for v in (sums.value_sum, sums.square_sum, sums.variance_sum)
    )
    std = np.sqrt(np.maximum(mean_square - mean**2, 0) + variance)
    return (mean.tolist(), std.tolist()) if latents else ((mean / 127.5 - 1).tolist(), (std / 127.5).tolist())
