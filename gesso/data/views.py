"""From an image of a source to rows of a file of a cache: views, latents, tokens.

Legend: n images, K views of each, B views of a pass through the VAE; C channels, H W size in pixels; c channels of latents,
h w of theirs; D and P channels of a token and of pooled text.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso import keyed
from gesso.config import Data
from gesso.config.cache import Identity, Plan, Sums
from gesso.data import crops, faces, text
from gesso.data.listing import Item, Source, Texts
from gesso.data.text import TextEncoder
from gesso.data.vae import VAE
from gesso.errors import RunError, Unreadable, UsageError

CAPTIONS = 64
"""that the text encoder is given at a time"""
LARGEST_FILE = 2**28
MOST_IMAGES = 4096
"""of a range, where the plan does not say"""


class Work(NamedTuple):
    """A plan without gaps, and what it needs. vae is None for pixels, and where the source holds latents."""

    plan: Plan
    source: Source
    vae: VAE | None
    encoder: TextEncoder | None

    def identities(self) -> tuple[Identity | None, Identity | None]:
        """Of VAE and text encoder."""
        latent = self.plan.latent
        told: Identity | None = self.vae.identity() if self.vae else None
        if self.source.latents:
            told = {name: getattr(latent, name) for name in ("vae", "convention", "channels", "factor")}
        return told, self.encoder.identity() if self.encoder else None


class Made(NamedTuple):
    """An image: x (K, C, H, W) uint8, or (1, 2c, h, w) float32; size of the whole picture; K boxes, flips, tones.

    bucket: place in plan.sizes(); faces: blurred; sums (2, C) int64 of pixels and their squares, None of latents.
    """

    index: int
    label: int
    caption: str
    size: tuple[int, int]
    boxes: list[tuple[float, ...]]
    flips: list[bool]
    tone: np.ndarray
    x: Tensor | None
    bucket: int = 0
    faces: int = 0
    sums: np.ndarray | None = None


def opened(plan: Plan, source: Source, device: torch.device) -> Work:
    """Open VAE and text encoder and fill the plan's gaps. Raises UsageError for what does not fit together."""
    latent, semantic, vae, encoder, where = plan.latent, plan.semantic, None, None, plan.data.source
    if source.latents:
        latent = latent.model_copy(update=_stored(plan, source))
    elif latent.vae:
        vae = VAE(latent.vae, device, getattr(torch, latent.dtype), latent.convention)
        has, plain = {"channels": vae.channels, "factor": vae.factor}, type(latent)()
        for name, value in has.items():
            if getattr(latent, name) not in (value, getattr(plain, name)):
                raise UsageError(
                    f"latent.{name}={getattr(latent, name)}, but --vae {latent.vae} has {value}: leave it out"
                )
        wrong = [f"{h}x{w}" for h, w in plan.sizes() if h % vae.factor or w % vae.factor]
        if wrong:
            raise UsageError(
                f"--vae {latent.vae} needs multiples of {vae.factor} pixels, not {wrong[0]}: "
                "choose another --resolution" + (", --buckets or bucket_multiple" if plan.buckets > 1 else "")
            )
        latent = latent.model_copy(update=has)
    if semantic.kind == "text":
        encoder = text.build(semantic, device)
        if not any(source.captions()):
            raise UsageError(f"--text: {where} has no captions; put image.txt beside each image, or leave --text out")
        widths = {"width": encoder.width, "pooled_width": encoder.pooled_width}
        semantic = semantic.model_copy(update=widths)
    if plan.blur_faces:
        faces.opencv()
    dtype = plan.dtype or ("float32" if source.latents else "float16")
    plan = plan.model_copy(
        update={"latent": latent, "semantic": semantic, "dtype": dtype if latent.vae or encoder else None}
    )
    if plan.shard_images is None:
        most = max(LARGEST_FILE // _bytes(plan), 1)
        plan = plan.model_copy(update={"shard_images": min(2 ** int(math.log2(most)), MOST_IMAGES)})
    return Work(plan, source, vae, encoder)


def _stored(plan: Plan, source: Source) -> dict[str, int]:
    """channels and factor of the latents that a source holds. Raises UsageError where the plan asks for another thing."""
    data, where = plan.data, f"{plan.data.source} holds latents"
    if plan.latent.vae is None or plan.latent.convention != "edm2":
        raise UsageError(
            f"{where}: say --convention edm2, and by --vae which VAE made them, such as stabilityai/sd-vae-ft-mse "
            "(it is written down, not opened)"
        )
    asked = {
        "--crop-scale": data.crop_scale, "--flip": data.flip, "--views": plan.views > 1, "--blur-faces": plan.blur_faces,
        "--buckets": plan.buckets > 1,
    }  # fmt: skip
    for flag, value in asked.items():
        if value:
            raise UsageError(f"{where}, which can neither be cropped nor changed: leave {flag} out")
    for i in range(len(source)):
        try:
            doubled, h, w = source.item(i).image.shape
            break
        except Unreadable:
            continue
    else:
        raise RunError(f"no image of {plan.data.source} can be read")
    if h != w or data.resolution % h:
        raise UsageError(f"{where} of {h}x{w}, which --resolution {data.resolution} is no multiple of")
    return {"channels": doubled // 2, "factor": data.resolution // h}


def _bytes(plan: Plan) -> int:
    """Of an image's rows."""
    R, K = plan.data.resolution, plan.views
    if plan.latent.vae is None:
        return K * plan.data.channels * R * R
    return K * 2 * plan.latent.channels * (R // plan.latent.factor) ** 2 * getattr(torch, plan.dtype).itemsize


def bucket_for(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Place of the bucket whose aspect is nearest to a picture's, by their ratio."""
    return min(range(len(sizes)), key=lambda b: abs(math.log(sizes[b][1] * height / (sizes[b][0] * width))))


def draws(plan: Plan, start: int, stop: int) -> np.ndarray:
    """(stop - start, K, UNIFORMS) of the images from start on; those of a view do not depend on K."""
    index = torch.arange(start, stop)
    u = [keyed.uniform(plan.seed, index, f"view {v}", crops.UNIFORMS) for v in range(plan.views)]
    return torch.stack(u, dim=1).numpy()


def views(data: Data, height: int, width: int, u: np.ndarray, aspect: float = 1.0) -> list[crops.View]:
    """K views of an image, u (K, UNIFORMS) its draws. Where flips are asked for, every other view is mirrored: the first
    at random."""
    first = crops.drawn(data, height, width, u[0], aspect).flip
    return [
        crops.drawn(data, height, width, one, aspect)._replace(flip=data.flip and first ^ (v % 2 == 1))
        for v, one in enumerate(u)
    ]


def least(plan: Plan) -> int:
    """The shorter edge that any view needs, so that its pixels are not enlarged by the decoder's shortcut."""
    scale = plan.data.crop_scale
    return math.ceil(max(map(max, plan.sizes())) / math.sqrt(scale[0] if scale else 1))


def made(work: Work, i: int, u: np.ndarray, smallest: int) -> Made | Unreadable:
    """Image i of the source, u (K, UNIFORMS) its draws; smallest is `least` of the plan. Any thread may call it."""
    plan, data, source = work.plan, work.plan.data, work.source
    try:
        item = source.item(i)
        if source.latents:
            _check_shape(plan, item)
            return Made(
                i, item.label, item.caption, item.size or (data.resolution,) * 2, [(0.0, 0.0, 1.0, 1.0)], [False],
                np.zeros((1, 2)), torch.from_numpy(item.image)[None],
            )  # fmt: skip
        picture, whole = item.picture(data.channels, smallest, data.resize)
    except Unreadable as error:
        return Unreadable(error.name, error.reason)  # without the frames that the caught one holds
    count = 0
    if plan.blur_faces:
        picture, count = faces.blur(picture)
    sizes = plan.sizes()
    bucket = bucket_for(sizes, *whole)
    H, W = sizes[bucket]
    chosen = views(data, *whole, u, W / H)
    x = np.stack([crops.taken(picture, view, H, W, data.resize) for view in chosen])
    sums = np.stack([x.sum((2, 3), dtype=np.int64), np.square(x, dtype=np.uint16).sum((2, 3), dtype=np.int64)])
    return Made(
        i, item.label, item.caption, item.size or whole, [view[:4] for view in chosen], [view.flip for view in chosen],
        tone(sums, H * W), torch.from_numpy(x), bucket, count, sums.sum(1),
    )  # fmt: skip


def tone(sums: np.ndarray, area: int) -> np.ndarray:
    """(K, 2) mean and standard deviation from (2, K, C) sums of pixels and squares. As crops.tone, but the same to the last
    bit on any number of threads."""
    mean, square = sums.sum(2) / (area * sums.shape[2])
    return np.stack([mean, np.sqrt(np.maximum(square - mean**2, 0))], axis=1)


def _check_shape(plan: Plan, item: Item) -> None:
    edge = plan.data.resolution // plan.latent.factor
    due, shape = (2 * plan.latent.channels, edge, edge), item.image.shape
    if shape != due:
        raise Unreadable(item.name, f"latents of shape {shape}, where the first have {due}")


class Rows:
    """Rows of a file as they come; latents and tokens are made a batch at a time, views and captions in their order."""

    def __init__(self, work: Work):
        self.work, self.dtype = work, getattr(torch, work.plan.dtype or "float32")
        self.made: list[Made] = []
        self.sums = Sums()
        self._x: list[Tensor] = []
        self._waiting: list[Tensor] = []
        self._captions: list[str] = []
        self._texts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, image: Made) -> None:
        plan = self.work.plan
        self.made.append(image._replace(x=None))
        if self.work.vae:
            self._waiting += image.x.unbind()
            while len(self._waiting) >= plan.batch_size:
                self._encode()
        else:
            self._keep(self._stored(image.x, "latents") if image.sums is None else image.x, image.sums)
        if self.work.encoder:
            self._captions.append(image.caption)
            if len(self._captions) == CAPTIONS:
                self._tell()

    def finish(self) -> None:
        """The last latents and tokens."""
        if self._waiting:
            self._encode()
        if self._captions:
            self._tell()

    def tensors(self) -> dict[str, Tensor]:
        """Those of shards.layout."""
        plan, n = self.work.plan, len(self.made)
        captions = Texts.of(image.caption for image in self.made)

        def column(values: Sequence, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.array(values)).to(dtype)

        x = torch.cat(self._x)
        found = {
            "moments" if plan.latent.vae else "pixels": x.unflatten(0, (n, plan.views)),
            "index": column([image.index for image in self.made], torch.int64),
            "label": column([image.label for image in self.made], torch.int64),
            "size": column([image.size for image in self.made], torch.int32),
            "box": column([image.boxes for image in self.made], torch.float32),
            "flip": column([image.flips for image in self.made], torch.uint8),
            "tone": column([image.tone for image in self.made], torch.float32),
            "caption": column(captions.blob, torch.uint8),
            "caption_end": column(captions.ends, torch.int64),
        }
        if self.work.encoder:
            tokens, lengths, pooled = (torch.cat(parts) for parts in zip(*self._texts, strict=True))
            found |= {"tokens": tokens, "token_end": lengths.cumsum(0), "pooled": pooled}
        return found

    def _encode(self) -> None:
        """At most a batch, filled up with zeros: of the shape of a pass the last bits depend."""
        size = self.work.plan.batch_size
        batch, self._waiting = torch.stack(self._waiting[:size]), self._waiting[size:]
        full = torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
        moments = torch.cat(self.work.vae.encode(full), dim=1)[: len(batch)].cpu()
        self._keep(self._stored(moments, "latents"), None)

    def _tell(self) -> None:
        tokens, lengths, pooled = self.work.encoder(self._captions)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        self._texts.append((self._stored(tokens[real], "tokens"), lengths, self._stored(pooled, "tokens")))
        self._captions = []

    def _stored(self, values: Tensor, what: str) -> Tensor:
        stored = values.to(self.dtype).contiguous()
        if not bool(stored.isfinite().all()):
            raise RunError(f"{what} up to {values.abs().max():.3g} do not fit into float16: say --dtype float32")
        return stored

    def _keep(self, x: Tensor, pixel_sums: np.ndarray | None) -> None:
        self._x.append(x)
        self.sums = added(self.sums, _latent_sums(x) if self.work.plan.latent.vae else _pixel_sums(x, pixel_sums))


def added(one: Sums, other: Sums) -> Sums:
    if not one.count:
        return other
    if not other.count:
        return one
    found = {
        name: tuple(a + b for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
        for name in ("first", "second", "variance")
    }
    return Sums(count=one.count + other.count, **found)


def _pixel_sums(x: Tensor, sums: np.ndarray) -> Sums:
    """Whole numbers, of pixels as they are: sums over all files are exact."""
    first, second = sums.tolist()
    return Sums(count=x[:, 0].numel(), first=first, second=second, variance=[0.0] * len(first))


def _latent_sums(x: Tensor) -> Sums:
    """In numpy: torch's sums depend on the number of threads."""
    mean, std = np.split(x.numpy().astype(np.float64), 2, axis=1)
    first, second, variance = (v.sum((0, 2, 3)).tolist() for v in (mean, mean**2, std**2))
    return Sums(count=x[:, 0].numel(), first=first, second=second, variance=variance)


def moments(sums: Sums, latents: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, as samples.latent_moments and pixel_moments."""
    first, second, variance = (np.array(v) / sums.count for v in (sums.first, sums.second, sums.variance))
    mean, std = first, np.sqrt(np.maximum(second - first**2, 0) + variance)
    return (mean.tolist(), std.tolist()) if latents else ((mean / 127.5 - 1).tolist(), (std / 127.5).tolist())
