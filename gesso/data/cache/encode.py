"""Encode images of a source as rows of a cache file: views, latents, tokens.

Legend: n images, K views of each, B views of a pass through the VAE; C channels, H W size in pixels; c channels of
latents, h w of theirs; D and P channels of a token and of pooled text.
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
"""Default number of images of a range."""


class CacheJob(NamedTuple):
    """A complete plan, its source and encoders. vae is None for pixels, and for sources of latents."""

    plan: CachePlan
    source: Source
    vae: VAE | None
    encoder: TextEncoder | None

    def identities(self) -> tuple[EncoderIdentity | None, EncoderIdentity | None]:
        """Identities of VAE and text encoder."""
        latent = self.plan.latent
        vae_identity: EncoderIdentity | None = self.vae.identity() if self.vae else None
        if self.source.has_latents:
            vae_identity = {
                name: getattr(latent, name) for name in ("vae", "convention", "channels", "downsample_factor")
            }
        return vae_identity, self.encoder.identity() if self.encoder else None


class EncodedImage(NamedTuple):
    """One image: x (K, C, H, W) uint8 or (1, 2c, h, w) float32, original size; K boxes, flips and pixel statistics.

    bucket: index in plan.bucket_sizes(). num_faces: number of blurred faces. sums: (2, C) int64 of pixels and their
    squares, None for latents.
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
    """Open VAE and text encoder and complete the plan. Raises UsageError for settings that do not fit together."""
    latent, semantic, vae, encoder, where = plan.latent, plan.semantic, None, None, plan.data.source
    if source.has_latents:
        latent = latent.model_copy(update=_stored_latent_settings(plan, source))
    elif latent.vae:
        vae = VAE(latent.vae, device, getattr(torch, latent.dtype), latent.convention)
        has, plain = {"channels": vae.latent_channels, "downsample_factor": vae.downsample_factor}, type(latent)()
        for name, value in has.items():
            if getattr(latent, name) not in (value, getattr(plain, name)):
                raise UsageError(
                    f"latent.{name}={getattr(latent, name)}, but --vae {latent.vae} has {value}: leave it out"
                )
        wrong = [f"{h}x{w}" for h, w in plan.bucket_sizes() if h % vae.downsample_factor or w % vae.downsample_factor]
        if wrong:
            raise UsageError(
                f"--vae {latent.vae} needs multiples of {vae.downsample_factor} pixels, not {wrong[0]}: "
                "choose another --resolution" + (", --buckets or bucket_multiple" if plan.buckets > 1 else "")
            )
        latent = latent.model_copy(update=has)
    if semantic.kind == "text":
        encoder = text.build_text_encoder(semantic, device)
        if not any(source.captions()):
            raise UsageError(f"--text: {where} has no captions; put image.txt beside each image, or leave --text out")
        widths = {"embed_dim": encoder.embed_dim, "pooled_dim": encoder.pooled_dim}
        semantic = semantic.model_copy(update=widths)
    if plan.blur_faces:
        face_blur.import_opencv()
    dtype = plan.dtype or ("float32" if source.has_latents else "float16")
    plan = plan.model_copy(
        update={"latent": latent, "semantic": semantic, "dtype": dtype if latent.vae or encoder else None}
    )
    if plan.images_per_shard is None:
        most = max(MAX_SHARD_BYTES // _bytes_per_image(plan), 1)
        plan = plan.model_copy(update={"images_per_shard": min(2 ** int(math.log2(most)), MAX_IMAGES_PER_SHARD)})
    return CacheJob(plan, source, vae, encoder)


def _stored_latent_settings(plan: CachePlan, source: Source) -> dict[str, int]:
    """Return channels and downsampling factor of stored latents. Raises UsageError if the plan contradicts them."""
    data, where = plan.data, f"{plan.data.source} holds latents"
    if plan.latent.vae is None or plan.latent.convention != "edm2":
        raise UsageError(
            f"{where}: say --convention edm2, and by --vae which VAE made them, such as stabilityai/sd-vae-ft-mse "
            "(it is written down, not opened)"
        )
    requested = {
        "--crop-scale": data.crop_scale,
        "--flip": data.flip,
        "--views": plan.views > 1,
        "--blur-faces": plan.blur_faces,
        "--buckets": plan.buckets > 1,
    }
    for flag, value in requested.items():
        if value:
            raise UsageError(f"{where}, which can neither be cropped nor changed: leave {flag} out")
    for i in range(len(source)):
        try:
            doubled, h, w = np.shape(source.item(i).image)
            break
        except UnreadableImageError:
            continue
    else:
        raise RunError(f"no image of {plan.data.source} can be read")
    if h != w or data.resolution % h:
        raise UsageError(f"{where} of {h}x{w}, which --resolution {data.resolution} is no multiple of")
    return {"channels": doubled // 2, "downsample_factor": data.resolution // h}


def _bytes_per_image(plan: CachePlan) -> int:
    """Return the bytes of the rows of an image."""
    R, K = plan.data.resolution, plan.views
    if plan.latent.vae is None:
        return K * plan.data.channels * R * R
    assert plan.dtype is not None
    side = R // plan.latent.downsample_factor
    return K * 2 * plan.latent.channels * side**2 * getattr(torch, plan.dtype).itemsize


def nearest_bucket(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Return the index of the bucket with the nearest aspect ratio."""
    return min(range(len(sizes)), key=lambda b: abs(math.log(sizes[b][1] * height / (sizes[b][0] * width))))


def view_uniforms(plan: CachePlan, start: int, stop: int) -> np.ndarray:
    """Return the draws (stop - start, K, UNIFORMS) of images; those of a view do not depend on K."""
    index = torch.arange(start, stop)
    u = [rng.uniform(plan.seed, index, f"view {v}", crops.UNIFORMS_PER_VIEW) for v in range(plan.views)]
    return torch.stack(u, dim=1).numpy()


def make_views(
    data: DataConfig, height: int, width: int, uniforms: np.ndarray, aspect: float = 1.0
) -> list[crops.View]:
    """Return K views of an image for draws (K, UNIFORMS). With flips every other view is mirrored."""
    first = crops.random_view(data, height, width, uniforms[0], aspect).flip
    return [
        crops.random_view(data, height, width, one, aspect)._replace(flip=data.flip and first ^ (v % 2 == 1))
        for v, one in enumerate(uniforms)
    ]


def min_decode_edge(plan: CachePlan) -> int:
    """Return the shorter edge that any view needs, so that reduced decoding never enlarges pixels."""
    scale = plan.data.crop_scale
    return math.ceil(max(map(max, plan.bucket_sizes())) / math.sqrt(scale[0] if scale else 1))


def encode_image(job: CacheJob, i: int, uniforms: np.ndarray, min_edge: int) -> EncodedImage | UnreadableImageError:
    """Encode image i of the source with draws (K, UNIFORMS); min_edge as `min_decode_edge`. Thread-safe."""
    plan, data, source = job.plan, job.plan.data, job.source
    try:
        item = source.item(i)
        if source.has_latents:
            _check_latent_shape(plan, item)
            return EncodedImage(
                i,
                item.label,
                item.caption,
                item.original_size or (data.resolution,) * 2,
                [(0.0, 0.0, 1.0, 1.0)],
                [False],
                np.zeros((1, 2)),
                torch.from_numpy(item.image)[None],
            )
        picture, original_size = item.decode(data.channels, min_edge, data.resize)
    except UnreadableImageError as error:
        return UnreadableImageError(error.name, error.reason)  # without the frames that the caught one holds
    count = 0
    if plan.blur_faces:
        picture, count = face_blur.blur_faces(picture)
    sizes = plan.bucket_sizes()
    bucket = nearest_bucket(sizes, *original_size)
    H, W = sizes[bucket]
    chosen = make_views(data, *original_size, uniforms, W / H)
    x = np.stack([crops.crop_resize(picture, view, H, W, data.resize) for view in chosen])
    sums = np.stack([x.sum((2, 3), dtype=np.int64), np.square(x, dtype=np.uint16).sum((2, 3), dtype=np.int64)])
    return EncodedImage(
        i,
        item.label,
        item.caption,
        item.original_size or original_size,
        [view[:4] for view in chosen],
        [view.flip for view in chosen],
        pixel_stats_from_sums(sums, H * W),
        torch.from_numpy(x),
        bucket,
        count,
        sums.sum(1),
    )


def pixel_stats_from_sums(sums: np.ndarray, area: int) -> np.ndarray:
    """Return (K, 2) mean and standard deviation from (2, K, C) sums of pixels and squares.

    As crops.compute_pixel_stats, but bit-equal on any number of threads.
    """
    mean, square = sums.sum(2) / (area * sums.shape[2])
    return np.stack([mean, np.sqrt(np.maximum(square - mean**2, 0))], axis=1)


def _check_latent_shape(plan: CachePlan, item: SourceItem) -> None:
    edge = plan.data.resolution // plan.latent.downsample_factor
    due, shape = (2 * plan.latent.channels, edge, edge), np.shape(item.image)
    if shape != due:
        raise UnreadableImageError(item.name, f"latents of shape {shape}, where the first have {due}")


class ShardBuilder:
    """Rows of a file; latents and tokens are encoded in batches, views and captions in order."""

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
            self._append(
                self._to_stored_dtype(image.x, "latents") if image.pixel_sums is None else image.x, image.pixel_sums
            )
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
        """Encode at most a batch, padded with zeros: the last bits depend on the shape of a pass."""
        size = self.job.plan.batch_size
        batch, self._pending_views = torch.stack(self._pending_views[:size]), self._pending_views[size:]
        full = torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
        assert self.job.vae is not None
        moments = torch.cat(self.job.vae.encode(full), dim=1)[: len(batch)].cpu()
        self._append(self._to_stored_dtype(moments, "latents"), None)

    def _encode_captions(self) -> None:
        assert self.job.encoder is not None
        tokens, lengths, pooled = self.job.encoder(self._captions)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        self._encoded_texts.append(
            (self._to_stored_dtype(tokens[real], "tokens"), lengths, self._to_stored_dtype(pooled, "tokens"))
        )
        self._captions = []

    def _to_stored_dtype(self, values: Tensor, label: str) -> Tensor:
        stored = values.to(self.dtype).contiguous()
        if not bool(stored.isfinite().all()):
            raise RunError(f"{label} up to {values.abs().max():.3g} do not fit into float16: say --dtype float32")
        return stored

    def _append(self, x: Tensor, pixel_sums: np.ndarray | None) -> None:
        self._x.append(x)
        if self.job.plan.latent.vae:
            sums = _latent_sums(x)
        else:
            assert pixel_sums is not None
            sums = _pixel_sums(x, pixel_sums)
        self.sums = add_sums(self.sums, sums)


def add_sums(one: MomentSums, other: MomentSums) -> MomentSums:
    """Return the sum of two sums."""
    if not one.count:
        return other
    if not other.count:
        return one
    totals = {
        name: tuple(a + b for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
        for name in ("value_sum", "square_sum", "variance_sum")
    }
    return MomentSums(count=one.count + other.count, **totals)


def _pixel_sums(x: Tensor, sums: np.ndarray) -> MomentSums:
    """Return integer sums of pixels, which are exact over all files."""
    first, second = sums.tolist()
    return MomentSums(count=x[:, 0].numel(), value_sum=first, square_sum=second, variance_sum=[0.0] * len(first))


def _latent_sums(x: Tensor) -> MomentSums:
    """Return sums in numpy: torch's depend on the number of threads."""
    mean, std = np.split(x.numpy().astype(np.float64), 2, axis=1)
    first, second, variance = (v.sum((0, 2, 3)).tolist() for v in (mean, mean**2, std**2))
    return MomentSums(count=x[:, 0].numel(), value_sum=first, square_sum=second, variance_sum=variance)


def channel_stats(sums: MomentSums, latents: bool) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, as base.latent_channel_stats and base.pixel_channel_stats."""
    first, second, variance = (np.array(v) / sums.count for v in (sums.value_sum, sums.square_sum, sums.variance_sum))
    mean, std = first, np.sqrt(np.maximum(second - first**2, 0) + variance)
    return (mean.tolist(), std.tolist()) if latents else ((mean / 127.5 - 1).tolist(), (std / 127.5).tolist())
