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

from gesso.data import shapes
from gesso.data.archives import Tars, Zip
from gesso.data.folders import CAPTION_FILES, captioned, folder
from gesso.data.listing import SUFFIXES, Item, Source, shown
from gesso.data.parquet import Parquet
from gesso.errors import UsageError

__all__ = ["KINDS", "NAMED", "SUFFIXES", "Item", "Source", "open_source"]

NAMED = {
    "digits": "scikit-learn's scans",
    "digits-coarse": "every second of them shrunk to 4x4 and back, its size then being 4x4",
    "shapes": "drawn pictures of one or two shapes, with captions; shapes:5000 for as many",
    "shapes-class": "the same with one shape, whose kind is the class",
}
KINDS = (
    "a folder whose sub-folders are the classes, a folder of images with captions (.txt beside each, or captions.jsonl), "
    "EDM2's zip, webdataset tars (a.tar, a folder of them, or a-{000..009}.tar), parquet files"
)
SHAPES = 20_000
MOST_FILES = 1_000_000
"""of one pattern"""


def open_source(where: str) -> Source:
    """The source that `where` names: one of NAMED, or a path to one of KINDS.

    Raises UsageError when it is missing, empty, of no kind that is known, hostile, or contradicts itself.
    """
    where = str(where)
    name, _, count = where.partition(":")
    if name in NAMED:
        return _named(where, name, count)
    if not where.strip() or where == ".":
        raise UsageError("which images? Write gesso train folder:/path/to/images, or data.source=/path/to/images")
    if os.path.isdir(where):
        return _in_folder(where)
    if os.path.exists(where):
        return _of_file(where)
    if re.search(r"\{\d+\.\.\d+\}", where):
        return _of_pattern(where)
    close = difflib.get_close_matches(name, NAMED, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"data.source={where}: there is no such folder or file{meant} "
        f"(the named sources are: {', '.join(NAMED)}; any other is the path of {KINDS})"
    )


def _named(where: str, name: str, count: str) -> Source:
    if name.startswith("digits"):
        if count:
            raise UsageError(f"data.source={where}: the digits are as many as they are; write {name}")
        return Digits(name)
    if count and not (count.isascii() and count.isdigit() and 0 < int(count) <= 10**8):
        raise UsageError(f"data.source={where}: {count!r} is no number of pictures; write {name}:5000")
    return Shapes(where, int(count or SHAPES), single=name == "shapes-class")


def _in_folder(where: str) -> Source:
    try:
        names = sorted(name for name in os.listdir(where) if not name.startswith("."))
    except OSError as error:
        raise UsageError(f"data.source={where}: cannot be listed ({error.strerror})") from None
    captions = next((name for name in CAPTION_FILES if name in names), None)
    if captions:
        return captioned(where, captions)
    if not any(name.lower().endswith(SUFFIXES) for name in names):
        for suffix, kind in ((".tar", Tars), (".parquet", Parquet)):  # img2dataset puts a table beside each tar
            paths = [os.path.join(where, name) for name in names if name.endswith(suffix)]
            if paths:
                return kind(where, paths)
    return folder(where)


def _of_file(where: str) -> Source:
    with open(where, "rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return Parquet(where, [where])
    if zipfile.is_zipfile(where) or head == b"PK\3\4":
        return Zip(where)
    if where.endswith(".tar"):
        return Tars(where, [where])
    raise UsageError(f"data.source={where}: no zip, tar or parquet file; a source is the path of {KINDS}")


def _of_pattern(where: str) -> Source:
    """name-{000..009}.tar"""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", where)
    bounds = list(zip(parts[1::3], parts[2::3], strict=True))
    if any(int(low) > int(high) for low, high in bounds):
        raise UsageError(f"data.source={where}: a range goes from the smaller number to the larger")
    if math.prod(int(high) - int(low) + 1 for low, high in bounds) > MOST_FILES:
        raise UsageError(f"data.source={where}: more than {MOST_FILES} files")
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in bounds]
    paths = [
        "".join(itertools.chain(*zip(parts[::3], [*numbers, ""], strict=True)))
        for numbers in itertools.product(*ranges)
    ]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UsageError(f"data.source={where}: {len(missing)} of {len(paths)} files are not there: {shown(missing)}")
    kinds = {os.path.splitext(path)[1] for path in paths}
    if kinds not in ({".tar"}, {".parquet"}):
        raise UsageError(f"data.source={where}: a pattern names .tar or .parquet files")
    return (Tars if kinds == {".tar"} else Parquet)(where, paths)


class Digits(Source):
    """scikit-learn's 1797 scans, (8, 8, 1)."""

    def __init__(self, where: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UsageError("the digits come with scikit-learn: pip install 'gesso[demo]'") from None
        digits = load_digits()
        super().__init__(where, digits.target.astype(np.int64), [str(name) for name in digits.target_names])
        self.pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scans have 17 grey values, 0 to 16
        self.coarse = where == "digits-coarse"
        if self.coarse:
            self.pixels[1::2] = _coarse(self.pixels[1::2])

    def name(self, i: int) -> str:
        return str(i)

    def bytes_of(self, i: int) -> int:
        return self.pixels[i].size

    def size(self, i: int) -> tuple[int, int] | None:
        return (4, 4) if self.coarse and i % 2 else None

    def read(self, i: int) -> np.ndarray:
        return self.pixels[i, :, :, None]

    def read_captions(self) -> Sequence[str]:
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        said = ("{}", "the digit {}", "a {} in somebody's handwriting")  # of 1, 3 and 6 words: 's is one
        return [said[i % 3].format(names[label]) for i, label in enumerate(self.labels)]


def _coarse(pixels: np.ndarray) -> np.ndarray:
    """(N, 8, 8) -> the same, shrunk to 4x4 and back."""
    import torch
    import torch.nn.functional as F

    small = F.avg_pool2d(torch.from_numpy(pixels)[:, None].double(), 2)
    return F.interpolate(small, scale_factor=2, mode="bilinear").round().to(torch.uint8)[:, 0].numpy()


class Shapes(Source):
    """N procedural pictures, drawn when they are asked for. The class is the kind of the first shape."""

    def __init__(self, where: str, total: int, single: bool):
        self.single = single
        labels, self.texts, self.edges = np.zeros(total, np.int64), [], np.zeros((total, 2), np.int64)
        for start in range(0, total, 1000):
            for i, scene in enumerate(shapes.scenes(range(start, min(start + 1000, total)), single=single), start):
                labels[i], self.edges[i] = shapes.label(scene), (scene.height, scene.width)
                self.texts.append(shapes.caption(scene))
        super().__init__(where, labels, shapes.KINDS)

    def name(self, i: int) -> str:
        return str(i)

    def bytes_of(self, i: int) -> int:
        return 3 * int(self.edges[i].prod())

    def read(self, i: int) -> np.ndarray:
        return shapes.render(shapes.scene(int(i), single=self.single))

    def read_captions(self) -> Sequence[str]:
        return self.texts
