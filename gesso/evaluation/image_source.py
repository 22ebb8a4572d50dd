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
from gesso.data import crops
from gesso.data.encoders import face_blur
from gesso.data.encoders.hub import error_summary
from gesso.data.sources import open_source
from gesso.data.sources.base import Source
from gesso.errors import RunError, UnreadableImageError, UsageError

NUM_WORKERS = 4
"""threads that decode"""


class ImageSet(NamedTuple):
    """N pictures of height and width `size`.

    resized: whether the middle of each is taken and resized, by the filter `resize`, or all are of that size; blur: whether faces
    are blurred first, as `gesso cache --blur-faces` does.
    """

    uri: str
    num_images: int
    size: tuple[int, int]
    crop_and_resize: bool
    source: Source
    fingerprint: str
    resize: Resize = "lanczos"
    blur_faces: bool = False

    @property
    def resize_description(self) -> str:
        """How each picture was resized, for the record."""
        names = {
            "lanczos": "middle square, Lanczos",
            "adm": "middle square, ADM's",
            "bicubic": "middle square, bicubic",
        }
        return names[self.resize] if self.crop_and_resize else "no"

    def batches(self, batch_size: int, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """(n, 3, H, W) uint8 of the pictures first to stop, in order. Raises RunError that names one that cannot be read."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            for start in range(first, self.num_images if stop is None else stop, batch_size):
                some = range(start, min(start + batch_size, self.num_images if stop is None else stop))
                yield torch.from_numpy(np.stack(list(pool.map(self._load_image, some))))

    def captions(self) -> list[str]:
        """Of every picture. Raises UsageError where there are none."""
        captions = [self.source.captions()[i] for i in range(self.num_images)]
        if not any(captions):
            raise UsageError(f"{self.uri} has no captions: put image.txt beside each image, or a captions.jsonl")
        return captions

    def _load_image(self, i: int) -> np.ndarray:
        """(3, H, W) uint8."""
        try:
            item = self.source.item(i)
            image, whole = item.decode(3, resize=self.resize)
        except UnreadableImageError as error:
            raise RunError(f"{self.uri}: {error.name} cannot be read ({error.reason})") from None
        if not self.crop_and_resize and whole != self.size:
            raise UsageError(
                f"{self.uri}: {item.name} is {whole[0]}x{whole[1]}, where the first picture is {self.size[0]}x{self.size[1]}; "
                "--resolution crops and resizes all of them"
            )
        if self.blur_faces:
            image, _ = face_blur.blur_faces(image)
        middle = crops.center_view(image.height, image.width, self.size[1] / self.size[0])
        return crops.crop_resize(image, middle, *self.size, self.resize)


def open_image_set(
    uri: str,
    resolution: int | None = None,
    num_images: int | None = None,
    resize: Resize = "lanczos",
    blur_faces: bool = False,
) -> ImageSet:
    """Open the first `count` pictures of `where`, or all of them.

    resolution: the middle square of each, resized by the filter `resize` as for training; else all must have one size. blur: with
    faces blurred as `gesso cache --blur-faces` does. Raises UsageError when there are none, or fewer than asked for, and for blur
    without OpenCV.
    """
    if blur_faces:
        face_blur.import_opencv()
    source = NpzSource(uri) if uri.endswith(".npz") else open_source(uri)
    if source.has_latents:
        raise UsageError(f"{uri} holds latents, where pictures are scored")
    if not len(source):
        raise UsageError(f"{uri} holds no picture")
    if num_images is not None and num_images > len(source):
        raise UsageError(f"{uri} holds {len(source):,} pictures, where {num_images:,} are asked for")
    try:
        first = source.item(0).decode(3, resize=resize)[1]
    except UnreadableImageError as error:
        raise RunError(f"{uri}: {error.name} cannot be read ({error.reason})") from None
    size = (resolution, resolution) if resolution else first
    fingerprint = f"{source.fingerprint()}-{num_images or len(source)}-{size[0]}x{size[1]}-{bool(resolution)}"
    fingerprint += f"-{resize}" * (resize != "lanczos") + "-blurred" * blur_faces
    return ImageSet(uri, num_images or len(source), size, bool(resolution), source, fingerprint, resize, blur_faces)


class NpzSource(Source):
    """arr_0 (N, H, W, 3) uint8 of a .npz, as ADM, DiT and MDT store samples; where it is not compressed, mapped.

    Raises UsageError when there is none.
    """

    def __init__(self, uri: str):
        try:
            self.array = _open_npz_array(uri)
        except FileNotFoundError:
            raise UsageError(f"there is no file {uri}") from None
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise UsageError(f"{uri}: no .npz that holds pictures as arr_0 ({error_summary(error)})") from None
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise UsageError(f"{uri}: arr_0 is {self.array.dtype} {self.array.shape}, where uint8 (N, H, W, 3) is read")
        super().__init__(uri, np.zeros(len(self.array), np.int64))

    def name(self, i: int) -> str:
        return str(i)

    def encoded_size(self, i: int) -> int:
        return self.array[i].size

    def read(self, i: int) -> np.ndarray:
        return np.array(self.array[i])

    def read_captions(self) -> list[str]:
        return [""] * len(self)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.array.data).hexdigest()[:16]


def _open_npz_array(path: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("arr_0.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["arr_0"]
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # of the local header, whose lengths may be others than the directory's
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if fortran else "C")
