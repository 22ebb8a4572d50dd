"""Tables of the contents of a source or a cache, for `gesso inspect`.

Legend: N images, n of them inspected; H W height and width of a full image.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from gesso.atomic_io import format_bytes
from gesso.data.cache.plan import identity_settings
from gesso.data.cache.read import CachedDataset
from gesso.data.sources import decode
from gesso.data.sources.base import Source, format_names
from gesso.errors import UnreadableImageError
from gesso.untrusted import printable

DEFAULT_LIMIT = 5_000
ASPECT_EDGES = (1 / 2, 2 / 3, 4 / 5, 0.95, 1.05, 5 / 4, 3 / 2, 2)
"""Edges of the bins of width / height."""
ASPECT_BINS = (
    "below 1:2", "1:2 to 2:3", "2:3 to 4:5", "4:5 to square", "square within 5 %", "square to 5:4", "5:4 to 3:2",
    "3:2 to 2:1", "above 2:1",
)  # fmt: skip
RESOLUTIONS = (64, 256, 512, 1024)
"""Resolutions for which the number of enlarged images is printed."""
MAX_LISTED_CLASSES, NUM_EXTREME_CLASSES = 20, 5
"""Maximum number of classes listed in full, and number of largest and smallest ones otherwise."""
MAX_LISTED = 5
"""Number of captions and unreadable images shown."""
BAR_WIDTH, MAX_NAME_WIDTH = 24, 48
"""Characters of the longest bar and of the longest name."""


class Table(NamedTuple):
    """A table; its header has empty strings for columns without a name."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print tables; markup in cells is not interpreted."""
    for title, header, rows in tables:
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD if any(header) else None, show_header=any(header), show_edge=False, pad_edge=False
        )
        for n, name in enumerate(header):
            table.add_column(
                name, justify="right" if name else "left", overflow="fold", min_width=6 if n == 0 else None
            )
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console.print(Text(printable(title), "bold"), table, "", sep="\n")


class SourceScan(NamedTuple):
    """Contents of a source that are read without decoding pixels.

    Attributes:
        indices: (n,) indices in the source, spread evenly over it.
        original_sizes: (m, 2) H W of the m images with a readable header, as `decode.decode_image` returns them.
        encoded_bytes: Total size of the n encoded images.
        captions: n captions.
        unreadable: (name, reason) of the n - m other images.
    """

    indices: np.ndarray
    original_sizes: np.ndarray
    encoded_bytes: int
    captions: list[str]
    unreadable: list[tuple[str, str]]


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """Return min(count, total) evenly spaced indices in 0 .. total - 1."""
    count = min(count, total)
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


def scan_source(source: Source, limit: int = DEFAULT_LIMIT) -> SourceScan:
    """Read headers and captions of at most `limit` images; damage after a header is not detected."""
    indices = evenly_spaced(len(source), limit)

    def read_size(i: int) -> tuple[int, int] | UnreadableImageError:
        try:
            item = source.item(i)
            return item.original_size or header_size(item.image)
        except UnreadableImageError as error:
            return UnreadableImageError(error.name or format_names([source.name(i)]), error.reason)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(read_size, indices.tolist()))
    sizes = [size for size in results if not isinstance(size, UnreadableImageError)]
    return SourceScan(
        indices=indices,
        original_sizes=np.array(sizes, np.int64).reshape(-1, 2),
        encoded_bytes=sum(max(0, source.encoded_size(i)) for i in indices.tolist()),
        captions=[source.caption(i) for i in indices.tolist()],
        unreadable=[(error.name, error.reason) for error in results if isinstance(error, UnreadableImageError)],
    )


def header_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Return H W of an encoded image as it is viewed, or of an array (H, W, C) uint8 or (2c, h, w) float.

    Raises:
        UnreadableImageError: The header is damaged; the error has no name.
    """
    if isinstance(image, np.ndarray):
        return image.shape[:2] if image.dtype == np.uint8 else image.shape[1:]
    try:
        opened = decode.open_header(image)
        is_rotated = decode.exif_orientation(opened) >= 5
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise any error on a damaged header
        raise UnreadableImageError("", f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    width, height = opened.size
    return (width, height) if is_rotated else (height, width)


def source_tables(source: Source, scan: SourceScan) -> list[Table]:
    """Return all tables of a source."""
    n, total = len(scan.indices), len(source)
    subset = "all images" if n == total else f"{n:,} images, spread evenly (--limit {total} for all)"
    image_bytes = scan.encoded_bytes / n
    summary = [
        ("images", f"{total:,}"),
        ("inspected", f"headers and captions of {subset}; no pixels"),
        ("size", f"{format_bytes(image_bytes)} per image, {format_bytes(image_bytes * total)} in total"),
        *(("note", note) for note in source.notes),
    ]
    return [
        Table(format_names([source.uri]), ("", ""), summary),
        *size_tables(scan.original_sizes, "latents" if source.has_latents else "pixels"),
        *class_tables(source.labels, source.class_names),
        *caption_tables(scan.captions, source.class_names),
        *unreadable_tables(scan.unreadable, n),
    ]


def cache_tables(cache: CachedDataset, limit: int = DEFAULT_LIMIT) -> list[Table]:
    """Return all tables of a cache, reading at most `limit` captions."""
    manifest, N = cache.manifest, len(cache)
    size = sum(shard.bytes for shard in manifest.files)
    summary = [
        ("images", f"{N:,} of {manifest.num_source_images:,}, {cache.plan.views} views each"),
        ("size", f"{format_bytes(size / N)} per image, {format_bytes(size)} in {len(manifest.files):,} shards"),
        ("mean", _join(f"{m:.4g}" for m in manifest.mean)),
        ("std", _join(f"{s:.4g}" for s in manifest.std)),
        ("faces", f"{manifest.num_faces:,} blurred" if cache.plan.blur_faces else "not blurred"),
        ("fingerprint", manifest.fingerprint),
    ]
    # num_source_images is listed above; padding of text is a setting of training, not of the cache.
    omitted = ["num_source_images", "source_content", "semantic.padding", "semantic.padding_noise"]
    omitted += [] if cache.has_latents else ["latent."]
    omitted += [] if cache.plan.semantic.kind == "text" else ["semantic."]
    settings = [
        (n, _format_value(value))
        for n, value in identity_settings(manifest).items()
        if not n.startswith(tuple(omitted))
    ]
    buckets = [f"{height}x{width}" for height, width in cache.buckets]
    counts = np.bincount(cache.bucket_of, minlength=len(buckets)).tolist()
    bucket_table = Table("buckets", ("", "images", ""), bar_rows(zip(buckets, counts, strict=True)))
    return [
        Table(format_names([cache.uri]), ("", ""), summary),
        Table("settings", ("", ""), [(name, value) for name, value in settings if value]),
        *([bucket_table] if len(buckets) > 1 else []),
        *size_tables(cache.original_sizes.numpy()),
        *class_tables(cache.labels.numpy(), cache.class_names),
        *caption_tables([cache.captions[i] for i in evenly_spaced(N, limit).tolist()], cache.class_names),
        *unreadable_tables(manifest.unreadable, manifest.num_source_images),
    ]


def _join(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _format_value(value: object) -> str:
    """Return a setting as text; empty for None."""
    if value is None or value == ():
        return ""
    return _join(f"{part:g}" for part in value) if isinstance(value, (list, tuple)) else truncate(str(value))


def size_tables(sizes: np.ndarray, unit: str = "pixels") -> list[Table]:
    """Return tables of sizes (m, 2) H W."""
    if not len(sizes):
        return []
    shorter = sizes.min(axis=1)
    edges = {"height": sizes[:, 0], "width": sizes[:, 1], "shorter edge": shorter}
    quantiles = [(name, *(f"{_quantile(edge, q):,}" for q in (0, 0.5, 1))) for name, edge in edges.items()]
    ratio = sizes[:, 1] / sizes[:, 0]
    # An edge of a bin belongs to the bin that is nearer to the square.
    bins = np.where(
        ratio < 1, np.searchsorted(ASPECT_EDGES, ratio, "right"), np.searchsorted(ASPECT_EDGES, ratio, "left")
    )
    counts = np.bincount(bins, minlength=len(ASPECT_BINS))
    tables = [
        Table(unit, ("", "smallest", "median", "largest"), quantiles),
        Table("width : height", ("", "images", ""), bar_rows(zip(ASPECT_BINS, counts.tolist(), strict=True))),
    ]
    enlarged = [(f"{r}", _percentage(shorter < r)) for r in RESOLUTIONS if shorter.min() < r <= 2 * shorter.max()]
    if enlarged and unit == "pixels":
        tables.append(Table("enlarged, as too small", ("at resolution", "images"), enlarged))
    return tables


def _quantile(values: np.ndarray, q: float) -> int:
    """Return a quantile that is one of the values."""
    return int(np.quantile(values, q, method="inverted_cdf"))


def _percentage(mask: np.ndarray) -> str:
    return f"{100 * mask.mean():.1f} %"


def bar_rows(counts: Iterable[tuple[str, int]]) -> list[tuple[str, str, str]]:
    """Return (name, count, bar) for each count above 0."""
    nonzero = [(name, count) for name, count in counts if count]
    largest = max((count for _, count in nonzero), default=1)
    return [(name, f"{count:,}", "█" * round(BAR_WIDTH * count / largest) or "▏") for name, count in nonzero]


def class_tables(labels: np.ndarray, names: Sequence[str]) -> list[Table]:
    """Return tables of the class frequencies of labels (N,)."""
    if not names:
        return []
    counts = np.bincount(labels, minlength=len(names))
    empty = int((counts == 0).sum())
    order, title = np.arange(len(names)), f"{len(names):,} classes"
    if len(names) - empty > MAX_LISTED_CLASSES:
        falling = np.argsort(-counts, kind="stable")[: len(names) - empty]
        order = np.concatenate([falling[:NUM_EXTREME_CLASSES], falling[-NUM_EXTREME_CLASSES:]])
        n = NUM_EXTREME_CLASSES
        title += f" of {int(np.median(counts)):,} images (median): the {n} largest and the {n} smallest"
    if empty:
        title += f"; {empty:,} without images"
    return [Table(title, ("", "images", ""), bar_rows((truncate(names[i]), int(counts[i])) for i in order.tolist()))]


def truncate(text: str, max_width: int = MAX_NAME_WIDTH) -> str:
    """Return text on one line, at most `max_width` wide, without control characters."""
    line = format_names([" ".join(text[: 4 * max_width].split())])
    return line if len(line) <= max_width else line[: max_width - 3] + "..."


def caption_tables(captions: Sequence[str], class_names: Sequence[str] = ()) -> list[Table]:
    """Return tables of caption lengths in words and of captions that several images share."""
    nonblank = [caption for caption in captions if caption.strip()]
    if not nonblank:
        return []
    if class_names and set(nonblank) <= set(class_names):
        return [Table("captions", ("", ""), [("all", "are class names")])]
    words = np.array([len(caption.split()) for caption in nonblank])
    quantiles = tuple(f"{_quantile(words, q):,}" for q in (0, 0.05, 0.5, 0.95, 1))
    tables = [Table("words in a caption", ("shortest", "5 %", "median", "95 %", "longest"), [quantiles])]
    counts = Counter(nonblank)
    rows = [
        ("empty", _percentage(np.array([not caption.strip() for caption in captions]))),
        ("shared by several images", _percentage(np.array([counts[caption] > 1 for caption in nonblank]))),
    ]
    rows += [(f'"{truncate(text)}"', f"{count:,}") for text, count in counts.most_common(MAX_LISTED) if count > 1]
    tables.append(Table("captions", ("", "images"), rows))
    return tables


def unreadable_tables(unreadable: Sequence[tuple[str, str]], n: int) -> list[Table]:
    """Return a table of the first unreadable images with reasons."""
    if not unreadable:
        return []
    rows = [(truncate(name), truncate(reason)) for name, reason in unreadable[:MAX_LISTED]]
    if len(unreadable) > MAX_LISTED:
        rows.append((f"and {len(unreadable) - MAX_LISTED:,} more", ""))
    return [Table(f"unreadable: {len(unreadable):,} of {n:,}", ("", ""), rows)]
