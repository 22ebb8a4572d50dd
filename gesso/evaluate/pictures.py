"""Sets of pictures to be scored, read a batch at a time: any source of images, or ADM's .npz of samples or of statistics.

Legend: N pictures, H W height and width.
"""

import hashlib
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso.config import Resize
from gesso.data import crops, faces
from gesso.data.listing import Source
from gesso.data.pretrained import brief
from gesso.data.sources import open_source
from gesso.errors import RunError, Unreadable, UsageError

WORKERS = 4
"""threads that decode"""


class Pictures(NamedTuple):
    """N pictures of height and width `size`.

    resized: whether the middle of each is taken and resized, by the filter `resize`, or all are of that size; blur: whether faces
    are blurred first, as `gesso cache --blur-faces` does.
    """

    where: str
    count: int
    size: tuple[int, int]
    resized: bool
    source: Source
    fingerprint: str
    resize: Resize = "lanczos"
    blur: bool = False

    @property
    def preparation(self) -> str:
        """How each picture was resized, for the record."""
        names = {
            "lanczos": "middle square, Lanczos",
            "adm": "middle square, ADM's",
            "bicubic": "middle square, bicubic",
        }
        return names[self.resize] if self.resized else "no"

    def batches(self, size: int, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """(n, 3, H, W) uint8 of the pictures first to stop, in order. Raises RunError that names one that cannot be read."""
        with ThreadPoolExecutor(WORKERS) as pool:
            for start in range(first, self.count if stop is None else stop, size):
                some = range(start, min(start + size, self.count if stop is None else stop))
                yield torch.from_numpy(np.stack(list(pool.map(self._picture, some))))

    def captions(self) -> list[str]:
        """Of every picture. Raises UsageError where there are none."""
        captions = [self.source.captions()[i] for i in range(self.count)]
        if not any(captions):
            raise UsageError(f"{self.where} has no captions: put image.txt beside each image, or a captions.jsonl")
        return captions

    def _picture(self, i: int) -> np.ndarray:
        """(3, H, W) uint8."""
        try:
            item = self.source.item(i)
            image, whole = item.picture(3, resize=self.resize)
        except Unreadable as error:
            raise RunError(f"{self.where}: {error.name} cannot be read ({error.reason})") from None
        if not self.resized and whole != self.size:
            raise UsageError(
                f"{self.where}: {item.name} is {whole[0]}x{whole[1]}, where the first picture is {self.size[0]}x{self.size[1]}; "
                "--resolution crops and resizes all of them"
            )
        if self.blur:
            image, _ = faces.blur(image)
        middle = crops.centred(image.height, image.width, self.size[1] / self.size[0])
        return crops.taken(image, middle, *self.size, self.resize)


def open_pictures(
    where: str,
    resolution: int | None = None,
    count: int | None = None,
    resize: Resize = "lanczos",
    blur: bool = False,
) -> Pictures:
    """Open the first `count` pictures of `where`, or all of them.

    resolution: the middle square of each, resized by the filter `resize` as for training; else all must have one size. blur: with
    faces blurred as `gesso cache --blur-faces` does. Raises UsageError when there are none, or fewer than asked for, and for blur
    without OpenCV.
    """
    if blur:
        faces.opencv()
    source = Archive(where) if where.endswith(".npz") else open_source(where)
    if source.latents:
        raise UsageError(f"{where} holds latents, where pictures are scored")
    if not len(source):
        raise UsageError(f"{where} holds no picture")
    if count is not None and count > len(source):
        raise UsageError(f"{where} holds {len(source):,} pictures, where {count:,} are asked for")
    try:
        first = source.item(0).picture(3, resize=resize)[1]
    except Unreadable as error:
        raise RunError(f"{where}: {error.name} cannot be read ({error.reason})") from None
    size = (resolution, resolution) if resolution else first
    fingerprint = f"{source.fingerprint()}-{count or len(source)}-{size[0]}x{size[1]}-{bool(resolution)}"
    fingerprint += f"-{resize}" * (resize != "lanczos") + "-blurred" * blur
    return Pictures(where, count or len(source), size, bool(resolution), source, fingerprint, resize, blur)


class Archive(Source):
    """arr_0 (N, H, W, 3) uint8 of a .npz, as ADM, DiT and MDT store samples; where it is not compressed, mapped.

    Raises UsageError when there is none.
    """

    def __init__(self, where: str):
        try:
            self.array = _mapped(where)
        except FileNotFoundError:
            raise UsageError(f"there is no file {where}") from None
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise UsageError(f"{where}: no .npz that holds pictures as arr_0 ({brief(error)})") from None
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise UsageError(
                f"{where}: arr_0 is {self.array.dtype} {self.array.shape}, where uint8 (N, H, W, 3) is read"
            )
        super().__init__(where, np.zeros(len(self.array), np.int64))

    def name(self, i: int) -> str:
        return str(i)

    def bytes_of(self, i: int) -> int:
        return self.array[i].size

    def read(self, i: int) -> np.ndarray:
        return np.array(self.array[i])

    def read_captions(self) -> list[str]:
        return [""] * len(self)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.array.data).hexdigest()[:16]


def _mapped(where: str) -> np.ndarray:
    with zipfile.ZipFile(where) as archive:
        info = archive.getinfo("arr_0.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(where, allow_pickle=False) as arrays:
            return arrays["arr_0"]
    with open(where, "rb") as file:
        file.seek(info.header_offset + 26)  # of the local header, whose lengths may be others than the directory's
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return np.memmap(where, dtype, "r", file.tell(), shape, order="F" if fortran else "C")
