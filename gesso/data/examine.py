"""What `gesso data` does: a source or a cache is looked at, printed, and drawn.

Legend: K views of an image; c channels of latents, h w their size; R resolution of a view; H W of a whole picture.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from gesso import files, keyed
from gesso.config import Data, Resize
from gesso.data import crops
from gesso.data.cache import Cache
from gesso.data.listing import Source
from gesso.data.samples import Samples
from gesso.data.shards import is_cache
from gesso.data.sheet import Row, sheet
from gesso.data.sources import open_source
from gesso.data.summary import WIDE, brief, cache_tables, look, show, source_tables, spread
from gesso.data.vae import VAE
from gesso.data.views import views
from gesso.errors import Unreadable, UsageError

MOST = 256
"""resolution of views where none is asked for"""


class Asked(NamedTuple):
    """What the sheet is to show. resolution: of the views; None: the median shorter edge, at most MOST."""

    rows: int = 8
    views: int = 4
    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    resolution: int | None = None
    seed: int = 0
    vae: str | None = None
    convention: str = "dit"
    resize: Resize = "lanczos"


def shares(text: str) -> tuple[float, float]:
    """.4,.6. Raises UsageError when it is no crop scale."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 1:
        raise UsageError(f"--crop-scale {text}: write two shares of the area, the smaller one first, such as .4,.6")
    return low, high


def examine(where: str, limit: int, asked: Asked, out: Path, console: Console) -> list[str]:
    """Print the tables of a source of which at most `limit` headers are read, or of a cache; write its sheet.

    Returns lines for the user. Raises UsageError as open_source and Cache, RunError when the sheet cannot be written.
    """
    if is_cache(where):
        refuse_for_caches(asked)
        cache = Cache(where)
        rows, notes = cache_rows(cache, asked)
        tables = cache_tables(cache, limit)
    else:
        source = open_source(where)
        looked = look(source, limit)
        rows, notes = source_rows(source, looked.sizes, asked)
        tables = source_tables(source, looked)
    with files.whole(out) as temporary:
        sheet(rows).save(temporary, "PNG")
    show(console, tables)
    return [*(f"note: {note}" for note in notes), f"wrote {out}"]


def refuse_for_caches(asked: Asked) -> None:
    """Raise UsageError for what a cache has settled."""
    for name in ("crop_scale", "flip", "resolution", "seed", "resize"):
        if getattr(asked, name) != Asked._field_defaults[name]:
            raise UsageError(f"--{name.replace('_', '-')} has no effect: the views of a cache are those that it holds")


def cache_rows(cache: Cache, asked: Asked) -> tuple[list[Row], list[str]]:
    """Rows of images spread evenly over a cache, with the first of their views, and notes."""
    latent = cache.plan.latent
    shown, notes = lambda x: x, []
    if cache.latents:
        shown, notes = decoder(asked.vae or latent.vae, latent.convention, latent.channels)
    rows = []
    for i in spread(len(cache), asked.rows).tolist():
        view = torch.arange(min(asked.views, cache.plan.views))
        stored = cache.views(torch.full_like(view, i), view)
        text = described(cache.captions[i], int(cache.labels[i]), cache.class_names)
        rows.append(Row(f"image {i}", text, None, stored._replace(x=shown(stored.x))))
    return rows, notes


def source_rows(source: Source, sizes: np.ndarray, asked: Asked) -> tuple[list[Row], list[str]]:
    """Rows of images spread evenly over a source, and notes; sizes (m, 2) H W of some of them."""
    shorter = int(np.median(sizes.min(axis=1))) if len(sizes) else MOST
    data = Data(
        source=source.where,
        resolution=asked.resolution or min(MOST, shorter),
        flip=asked.flip,
        crop_scale=asked.crop_scale,
        resize=asked.resize,
    )
    places = spread(len(source), asked.rows).tolist()
    shown, notes = lambda x: x, []
    if source.latents:
        shown, notes = decoder(asked.vae, asked.convention, len(source.item(places[0]).image) // 2)
    K = asked.views if data.crop_scale else min(asked.views, 1 + data.flip)
    return [source_row(source, i, data, K, asked.seed, shown) for i in places], notes


def decoder(vae: str | None, convention: str, channels: int) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """Latents (K, 2c, h, w), c = channels -> pixels (K, 3, H, W) uint8; where no VAE does that, the latents and a note."""
    if vae is None:
        return lambda x: x, ["the latents are not shown: say --vae and --convention"]
    try:
        opened = VAE(vae, convention=convention)
        if opened.channels != channels:
            raise UsageError(f"the VAE {vae} has {opened.channels} channels, they have {channels}")
    except UsageError as error:
        return lambda x: x, [f"the latents are not shown: {error}"]
    return lambda x: opened.decode(x.float().chunk(2, dim=1)[0]), []


def source_row(source: Source, i: int, data: Data, K: int, seed: int, shown: Callable[[Tensor], Tensor]) -> Row:
    """Image i with views as a cache of that seed has them. `shown` decodes latents (1, 2c, h, w), or returns them."""
    caption, label = source.caption(i), int(source.labels[i])
    text = described(caption, label, source.class_names)
    try:
        item = source.item(i)
        if source.latents:
            x, whole = shown(torch.from_numpy(item.image)[None]), None
            size, drawn = item.size or (data.resolution,) * 2, [crops.View(0.0, 0.0, 1.0, 1.0)]
        else:
            whole, (H, W) = item.picture(3, resize=data.resize)
            size, R = item.size or (H, W), data.resolution
            u = [keyed.uniform(seed, torch.tensor([i]), f"view {v}", crops.UNIFORMS)[0].numpy() for v in range(K)]
            drawn = views(data, H, W, np.stack(u))
            x = torch.from_numpy(np.stack([crops.taken(whole, view, R, R, data.resize) for view in drawn]))
    except Unreadable as error:
        return Row(_title(i, source.name(i)), f"unreadable: {error.reason}", None, None)
    return Row(_title(i, item.name), text, whole, samples(x, size, drawn, label, i))


def _title(i: int, name: str) -> str:
    return f"image {i}" + ("" if name == str(i) else f": {brief(name, 2 * WIDE)}")


def samples(x: Tensor, size: tuple[int, int], drawn: Sequence[crops.View], label: int, i: int) -> Samples:
    """K views of one image."""
    K = len(drawn)
    return Samples(
        x,
        torch.tensor([size] * K),
        torch.tensor([view[:4] for view in drawn], dtype=torch.float32),
        torch.tensor([view.flip for view in drawn]),
        crops.tone(x) if x.dtype == torch.uint8 else torch.zeros(K, 2),
        torch.full((K,), label),
        torch.full((K,), i),
    )


def described(caption: str, label: int, class_names: Sequence[str]) -> str:
    """Class and caption of an image on one line."""
    name = class_names[label] if class_names else ""
    parts = [f"class {label}" + (f" {name}" if name != str(label) else "")] if class_names else []
    if caption.strip() and caption != name:
        parts.append(f'"{caption}"')
    elif not class_names:
        parts.append("no caption")
    return ": ".join(parts)
