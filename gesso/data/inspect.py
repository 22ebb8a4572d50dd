"""Implementation of `gesso inspect`: tables and a contact sheet of a source or a cache.

Legend: K views of an image; c channels of latents, h w their size; R resolution of a view; H W of a full image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from gesso import atomic_io
from gesso.config import DataConfig, Resize
from gesso.data import crops
from gesso.data.base import SampleBatch
from gesso.data.cache.encode import make_views, view_uniforms
from gesso.data.cache.format import is_cache
from gesso.data.cache.read import CachedDataset
from gesso.data.contact_sheet import SheetRow, draw_contact_sheet
from gesso.data.encoders.vae import VAE
from gesso.data.inspect_tables import (
    MAX_NAME_WIDTH,
    cache_tables,
    evenly_spaced,
    print_tables,
    scan_source,
    source_tables,
    truncate,
)
from gesso.data.sources import open_source
from gesso.data.sources.base import Source
from gesso.errors import UnreadableImageError, UsageError

MAX_RESOLUTION = 256
"""Maximum default resolution of views."""


class InspectArgs(NamedTuple):
    """Options of the contact sheet; `resolution` None is the median shorter edge, at most MAX_RESOLUTION."""

    num_rows: int = 8
    num_views: int = 4
    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    resolution: int | None = None
    seed: int = 0
    vae: str | None = None
    convention: str = "dit"
    resize: Resize = "lanczos"


def parse_crop_scale(text: str) -> tuple[float, float]:
    """Parse a crop scale such as .4,.6; raise UsageError for other text."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 1:
        raise UsageError(f"--crop-scale {text}: must be two shares of the area, the smaller first, such as .4,.6")
    return low, high


def inspect_source(uri: str, limit: int, args: InspectArgs, out: Path, console: Console) -> list[str]:
    """Print the tables of a source, reading at most `limit` headers, or of a cache; write its contact sheet.

    Returns:
        Lines to print.

    Raises:
        UsageError: The source or cache cannot be opened.
        RunError: The sheet cannot be written.
    """
    if is_cache(uri):
        reject_cache_options(args)
        cache = CachedDataset(uri)
        rows, notes = cache_rows(cache, args)
        tables = cache_tables(cache, limit)
    else:
        source = open_source(uri)
        scan = scan_source(source, limit)
        rows, notes = source_rows(source, scan.original_sizes, args)
        tables = source_tables(source, scan)
    with atomic_io.atomic_file(out) as temporary:
        draw_contact_sheet(rows).save(temporary, "PNG")
    print_tables(console, tables)
    return [*(f"note: {note}" for note in notes), f"wrote {out}"]


def reject_cache_options(args: InspectArgs) -> None:
    """Raise UsageError for options that a cache determines."""
    for name in ("crop_scale", "flip", "resolution", "seed", "resize"):
        if getattr(args, name) != InspectArgs._field_defaults[name]:
            raise UsageError(f"--{name.replace('_', '-')} has no effect on a cache, whose views are stored: remove it")


def cache_rows(cache: CachedDataset, args: InspectArgs) -> tuple[list[SheetRow], list[str]]:
    """Return rows of images spread evenly over a cache, with the first of their views, and notes."""
    latent = cache.plan.latent
    to_pixels, notes = _open_decoder(cache.has_latents, args.vae or latent.vae, latent.convention, latent.channels)
    rows = []
    for i in evenly_spaced(len(cache), args.num_rows).tolist():
        view = torch.arange(min(args.num_views, cache.plan.views))
        stored = cache.get_views(torch.full_like(view, i), view)
        text = label_text(cache.captions[i], int(cache.labels[i]), cache.class_names)
        rows.append(SheetRow(f"image {i}", text, None, stored._replace(x=to_pixels(stored.x))))
    return rows, notes


def source_rows(source: Source, sizes: np.ndarray, args: InspectArgs) -> tuple[list[SheetRow], list[str]]:
    """Return rows of images spread evenly over a source, and notes; `sizes` (m, 2) are H W of a sample of images."""
    shorter = int(np.median(sizes.min(axis=1))) if len(sizes) else MAX_RESOLUTION
    data = DataConfig(
        source=source.uri,
        resolution=args.resolution or min(MAX_RESOLUTION, shorter),
        flip=args.flip,
        crop_scale=args.crop_scale,
        resize=args.resize,
    )
    indices = evenly_spaced(len(source), args.num_rows).tolist()
    channels = len(source.item(indices[0]).image) // 2 if source.has_latents else 0
    to_pixels, notes = _open_decoder(source.has_latents, args.vae, args.convention, channels)
    K = args.num_views if data.crop_scale else min(args.num_views, 1 + data.flip)
    return [source_row(source, i, data, K, args.seed, to_pixels) for i in indices], notes


def _open_decoder(
    has_latents: bool, vae_id: str | None, convention: str, channels: int
) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """Return a function of SampleBatch.x to pixels (K, 3, H, W) uint8, the identity without a VAE, and notes."""
    if not has_latents:
        return lambda x: x, []
    if vae_id is None:
        return lambda x: x, ["the latents are not decoded: add --vae and --convention"]
    try:
        vae = VAE(vae_id, convention=convention)
        if vae.latent_channels != channels:
            raise UsageError(f"the VAE {vae_id} has {vae.latent_channels} latent channels instead of {channels}")
    except UsageError as error:
        return lambda x: x, [f"the latents are not decoded: {error}"]
    return lambda x: vae.decode(x.float().chunk(2, dim=1)[0]), []


def source_row(
    source: Source, i: int, data: DataConfig, K: int, seed: int, to_pixels: Callable[[Tensor], Tensor]
) -> SheetRow:
    """Return the row of image i with the views that a cache with this seed has; `to_pixels` decodes latents."""
    caption, label = source.caption(i), int(source.labels[i])
    text = label_text(caption, label, source.class_names)
    try:
        item = source.item(i)
        if source.has_latents:
            x, full_image = to_pixels(torch.from_numpy(item.image)[None]), None
            size, views = item.original_size or (data.resolution,) * 2, [crops.FULL_VIEW]
        else:
            full_image, (H, W) = item.decode(3, resize=data.resize)
            size, R = item.original_size or (H, W), data.resolution
            views = make_views(data, H, W, view_uniforms(seed, K, i, i + 1)[0])
            x = torch.from_numpy(np.stack([crops.crop_resize(full_image, view, R, R, data.resize) for view in views]))
    except UnreadableImageError as error:
        return SheetRow(_title(i, source.name(i)), f"unreadable: {error.reason}", None, None)
    n = len(views)
    batch = SampleBatch.from_views(x, [size] * n, views, torch.full((n,), label), torch.full((n,), i))
    return SheetRow(_title(i, item.name), text, full_image, batch)


def _title(i: int, name: str) -> str:
    return f"image {i}" + ("" if name == str(i) else f": {truncate(name, 2 * MAX_NAME_WIDTH)}")


def label_text(caption: str, label: int, class_names: Sequence[str]) -> str:
    """Return class and caption of an image on one line."""
    name = class_names[label] if class_names else ""
    parts = [f"class {label}" + (f" {name}" if name != str(label) else "")] if class_names else []
    if caption.strip() and caption != name:
        parts.append(f'"{caption}"')
    elif not class_names:
        parts.append("no caption")
    return ": ".join(parts)
