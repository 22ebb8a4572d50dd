"""Where images come from, by index: named sources, folders, zips, webdataset tars, parquet files. Nothing is decoded.

What a path holds is told by looking at it. Legend: N images.
"""

import difflib
import itertools
import math
import os
import re
import zipfile
from collections.abc import Sequence

import numpy as np

from gesso.data import shapes_dataset
from gesso.data.sources.archives import TarSource, ZipSource
from gesso.data.sources.base import IMAGE_SUFFIXES, Source, SourceItem, format_names
from gesso.data.sources.folders import CAPTION_FILES, open_captioned_folder, open_folder
from gesso.data.sources.parquet import ParquetSource
from gesso.errors import UsageError

__all__ = ["IMAGE_SUFFIXES", "NAMED_SOURCES", "SOURCE_KINDS", "Source", "SourceItem", "open_source"]

NAMED_SOURCES = {
    "digits": "scikit-learn's scans",
    "digits-mixed-resolution": "every second of them shrunk to 4x4 and back, its size then being 4x4",
    "shapes": "drawn pictures of one or two shapes, with captions; shapes:5000 for as many",
    "shapes-class": "the same with one shape, whose kind is the class",
}
SOURCE_KINDS = (
    "a folder whose sub-folders are the classes, a folder of images with captions (.txt beside each, or captions.jsonl), "
    "EDM2's zip, webdataset tars (a.tar, a folder of them, or a-{000..009}.tar), parquet files"
)
DEFAULT_NUM_SHAPES = 20_000
MAX_PATTERN_FILES = 1_000_000
"""of one pattern"""


def open_source(uri: str) -> Source:
    """The source that `where` names: one of NAMED, or a path to one of KINDS.

    Raises UsageError when it is missing, empty, of no kind that is known, hostile, or contradicts itself.
    """
    uri = str(uri)
    name, _, count = uri.partition(":")
    if name in NAMED_SOURCES:
        return _open_named(uri, name, count)
    if not uri.strip() or uri == ".":
        raise UsageError("which images? Write gesso train folder:/path/to/images, or data.source=/path/to/images")
    if os.path.isdir(uri):
        return _open_in_folder(uri)
    if os.path.exists(uri):
        return _open_file(uri)
    if re.search(r"\{\d+\.\.\d+\}", uri):
        return _open_pattern(uri)
    close = difflib.get_close_matches(name, NAMED_SOURCES, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"data.source={uri}: there is no such folder or file{meant} "
        f"(the named sources are: {', '.join(NAMED_SOURCES)}; any other is the path of {SOURCE_KINDS})"
    )


def _open_named(uri: str, name: str, count: str) -> Source:
    if name.startswith("digits"):
        if count:
            raise UsageError(f"data.source={uri}: the digits are as many as they are; write {name}")
        return DigitsSource(name)
    if count and not (count.isascii() and count.isdigit() and 0 < int(count) <= 10**8):
        raise UsageError(f"data.source={uri}: {count!r} is no number of pictures; write {name}:5000")
    return ShapesSource(uri, int(count or DEFAULT_NUM_SHAPES), single=name == "shapes-class")


def _open_in_folder(uri: str) -> Source:
    try:
        names = sorted(name for name in os.listdir(uri) if not name.startswith("."))
    except OSError as error:
        raise UsageError(f"data.source={uri}: cannot be listed ({error.strerror})") from None
    captions = next((name for name in CAPTION_FILES if name in names), None)
    if captions:
        return open_captioned_folder(uri, captions)
    if not any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        for suffix, kind in (
            (".tar", TarSource),
            (".parquet", ParquetSource),
        ):  # img2dataset puts a table beside each tar
            paths = [os.path.join(uri, name) for name in names if name.endswith(suffix)]
            if paths:
                return kind(uri, paths)
    return open_folder(uri)


def _open_file(uri: str) -> Source:
    with open(uri, "rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return ParquetSource(uri, [uri])
    if zipfile.is_zipfile(uri) or head == b"PK\3\4":
        return ZipSource(uri)
    if uri.endswith(".tar"):
        return TarSource(uri, [uri])
    raise UsageError(f"data.source={uri}: no zip, tar or parquet file; a source is the path of {SOURCE_KINDS}")


def _open_pattern(uri: str) -> Source:
    """name-{000..009}.tar"""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", uri)
    bounds = list(zip(parts[1::3], parts[2::3], strict=True))
    if any(int(low) > int(high) for low, high in bounds):
        raise UsageError(f"data.source={uri}: a range goes from the smaller number to the larger")
    if math.prod(int(high) - int(low) + 1 for low, high in bounds) > MAX_PATTERN_FILES:
        raise UsageError(f"data.source={uri}: more than {MAX_PATTERN_FILES} files")
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in bounds]
    paths = [
        "".join(itertools.chain(*zip(parts[::3], [*numbers, ""], strict=True)))
        for numbers in itertools.product(*ranges)
    ]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UsageError(
            f"data.source={uri}: {len(missing)} of {len(paths)} files are not there: {format_names(missing)}"
        )
    kinds = {os.path.splitext(path)[1] for path in paths}
    if kinds not in ({".tar"}, {".parquet"}):
        raise UsageError(f"data.source={uri}: a pattern names .tar or .parquet files")
    return (TarSource if kinds == {".tar"} else ParquetSource)(uri, paths)


class DigitsSource(Source):
    """scikit-learn's 1797 scans, (8, 8, 1)."""

    def __init__(self, uri: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UsageError("the digits come with scikit-learn: pip install 'gesso[demo]'") from None
        digits = load_digits()
        super().__init__(uri, digits.target.astype(np.int64), [str(name) for name in digits.target_names])
        self.pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scans have 17 grey values, 0 to 16
        self.mixed_resolution = uri == "digits-mixed-resolution"
        if self.mixed_resolution:
            self.pixels[1::2] = _reduce_resolution(self.pixels[1::2])

    def name(self, i: int) -> str:
        return str(i)

    def encoded_size(self, i: int) -> int:
        return self.pixels[i].size

    def original_size(self, i: int) -> tuple[int, int] | None:
        return (4, 4) if self.mixed_resolution and i % 2 else None

    def read(self, i: int) -> np.ndarray:
        return self.pixels[i, :, :, None]

    def read_captions(self) -> Sequence[str]:
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        said = ("{}", "the digit {}", "a {} in somebody's handwriting")  # of 1, 3 and 6 words: 's is one
        return [said[i % 3].format(names[label]) for i, label in enumerate(self.labels)]


def _reduce_resolution(pixels: np.ndarray) -> np.ndarray:
    """(N, 8, 8) -> the same, shrunk to 4x4 and back."""
    import torch
    import torch.nn.functional as F

    small = F.avg_pool2d(torch.from_numpy(pixels)[:, None].double(), 2)
    return F.interpolate(small, scale_factor=2, mode="bilinear").round().to(torch.uint8)[:, 0].numpy()


class ShapesSource(Source):
    """N procedural pictures, drawn when they are asked for. The class is the kind of the first shape."""

    def __init__(self, uri: str, num_images: int, single: bool):
        self.single = single
        labels, self.caption_list, self.image_sizes = (
            np.zeros(num_images, np.int64),
            [],
            np.zeros((num_images, 2), np.int64),
        )
        for start in range(0, num_images, 1000):
            for i, scene in enumerate(
                shapes_dataset.sample_scenes(range(start, min(start + 1000, num_images)), single=single), start
            ):
                labels[i], self.image_sizes[i] = shapes_dataset.scene_label(scene), (scene.height, scene.width)
                self.caption_list.append(shapes_dataset.scene_caption(scene))
        super().__init__(uri, labels, shapes_dataset.KINDS)

    def name(self, i: int) -> str:
        return str(i)

    def encoded_size(self, i: int) -> int:
        return 3 * int(self.image_sizes[i].prod())

    def read(self, i: int) -> np.ndarray:
        return shapes_dataset.render_scene(shapes_dataset.sample_scene(int(i), single=self.single))

    def read_captions(self) -> Sequence[str]:
        return self.caption_list
