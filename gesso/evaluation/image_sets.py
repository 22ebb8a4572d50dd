"""Sets of images to evaluate, read in batches: any source of images, or an .npz file of samples as ADM writes it.

Legend: N images, H W height and width.
"""

import hashlib
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso import untrusted
from gesso.config import Resize
from gesso.config.base import source_path
from gesso.data import crops
from gesso.data.encoders import face_blur
from gesso.data.sources import open_source
from gesso.data.sources.base import WITHOUT_CLASSES, Source, format_names
from gesso.errors import RunError, UnreadableImageError, UsageError, error_summary

MAX_ARRAY_BYTES = 4 * 2**30
"""Maximum size of an array that is read into memory."""
NUM_WORKERS = 4
"""Threads that decode images."""
RESIZE_NAMES = {
    "lanczos": "middle square, Lanczos",
    "adm": "middle square, ADM's",
    "bicubic": "middle square, bicubic",
}


class ImageSet(NamedTuple):
    """Images of one size.

    Attributes:
        uri: Source or .npz file.
        num_images: Number of images N, from the first.
        size: Height and width in pixels.
        crop_and_resize: True if the middle square of each image is resized; False if all images have `size`.
        source: Source of the images.
        fingerprint: Hash of everything that decides their pixels; of more than 1,024 files, those are read.
        resize: Filter that resizes them.
        blur_faces: True if faces are blurred first, as by `gesso cache --blur-faces`.
        max_unreadable: Maximum share of unreadable images, in place of which the next readable ones are used.
        unreadable: Indices, names and reasons of those, as they are met.
    """

    uri: str
    num_images: int
    size: tuple[int, int]
    crop_and_resize: bool
    source: Source
    fingerprint: str
    resize: Resize = "lanczos"
    blur_faces: bool = False
    max_unreadable: float = 0.0
    unreadable: dict[int, tuple[str, str]] = {}

    @property
    def resize_description(self) -> str:
        """Description of the resizing, for the protocol."""
        return RESIZE_NAMES[self.resize] if self.crop_and_resize else "no"

    def batches(self, batch_size: int, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield images first to stop - 1 in order, (n, 3, H, W) uint8. Raises RunError for an unreadable image."""
        stop = self.num_images if stop is None else stop
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            for start in range(first, stop, batch_size):
                indices = range(start, min(start + batch_size, stop))
                yield torch.from_numpy(np.stack(list(pool.map(self._load_image, indices))))

    def notes(self) -> list[str]:
        """Return what was read of the source and what was not; call it after the images are read."""
        lines = [f"note: {note}" for note in self.source.notes if not note.endswith(WITHOUT_CLASSES)]
        if self.unreadable:
            names = [f"{name} ({reason})" for name, reason in self.unreadable.values()]
            count = f"{len(names)} unreadable images of {self.uri}"
            lines.append(f"note: {count} are replaced by the next ones: {format_names(names)}")
        return lines

    def captions(self) -> list[str]:
        """Return the caption of every image. Raises UsageError if there are none."""
        captions = [self.source.captions()[i] for i in range(self.num_images)]
        if not any(captions):
            raise UsageError(f"{self.uri} has no captions: put image.txt next to each image, or a captions.jsonl")
        return captions

    def _load_image(self, i: int) -> np.ndarray:
        """Return image i, (3, H, W) uint8, or the next readable one."""
        for j in (*range(i, len(self.source)), *range(i)):
            try:
                item = self.source.item(j)
                image, original_size = item.decode(3, resize=self.resize)
                break
            except UnreadableImageError as error:
                self.unreadable[j] = error.name, error.reason
                if len(self.unreadable) > self.max_unreadable * len(self.source):
                    raise RunError(f"{self.uri}: {error.name} cannot be read ({error.reason})") from None
        if not self.crop_and_resize and original_size != self.size:
            raise UsageError(
                f"{self.uri}: {item.name} is {original_size[0]}x{original_size[1]}, but the first image is "
                f"{self.size[0]}x{self.size[1]}: set --resolution to crop and resize all images"
            )
        if self.blur_faces:
            image, _ = face_blur.blur_faces(image)
        view = crops.center_view(image.height, image.width, self.size[1] / self.size[0])
        return crops.crop_resize(image, view, *self.size, self.resize)


def open_image_set(
    uri: str,
    resolution: int | None = None,
    num_images: int | None = None,
    resize: Resize = "lanczos",
    blur_faces: bool = False,
    max_unreadable: float = 0.0,
) -> ImageSet:
    """Open a set of images.

    Args:
        uri: Source as in data.source, or an .npz file with `arr_0`.
        resolution: Edge to which the middle square of each image is resized; None: all images must have one size.
        num_images: Number of images, from the first; None: all.
        resize: Filter that resizes them.
        blur_faces: Blur faces first, as `gesso cache --blur-faces` does.
        max_unreadable: Maximum share of unreadable images, which are replaced by the next ones.

    Raises:
        UsageError: There are no images, or fewer than `num_images`; or `blur_faces` is set and OpenCV is missing.
    """
    if blur_faces:
        face_blur.import_opencv()
    uri = source_path(uri)
    source = NpzSource(uri) if uri.endswith(".npz") else open_source(uri)
    if source.has_latents:
        raise UsageError(f"{uri} has latents: only images can be evaluated")
    if not len(source):
        raise UsageError(f"{uri} has no images")
    if num_images is not None and num_images > len(source):
        raise UsageError(
            f"{uri} has {len(source):,} images: set --num-images to that number or less, not {num_images:,}"
        )
    size = (resolution or 0, resolution or 0)
    if not (resolution and max_unreadable):
        try:
            first = source.item(0).decode(3, resize=resize)[1]
        except UnreadableImageError as error:
            raise RunError(f"{uri}: {error.name} cannot be read ({error.reason})") from None
        size = size if resolution else first
    content = source.content_hash()
    fingerprint = f"{source.fingerprint()}{f'-{content}' if content else ''}"
    fingerprint += f"-{num_images or len(source)}-{size[0]}x{size[1]}-{bool(resolution)}"
    fingerprint += f"-{resize}" * (resize != "lanczos") + "-blurred" * blur_faces
    return ImageSet(
        uri, num_images or len(source), size, bool(resolution), source, fingerprint, resize, blur_faces,
        max_unreadable, {},
    )  # fmt: skip


class NpzSource(Source):
    """Samples `arr_0` (N, H, W, 3) uint8 of an .npz file of ADM, DiT or MDT, memory-mapped if it is not compressed.

    Raises:
        UsageError: The file does not exist, or has no such array.
    """

    def __init__(self, uri: str):
        try:
            self.array = _open_npz_array(uri)
        except FileNotFoundError:
            raise UsageError(f"there is no file {uri}") from None
        except Exception as error:  # zipfile, zlib and numpy raise errors of many kinds for damaged files
            raise UsageError(f"{uri} is not an .npz file with images as arr_0 ({error_summary(error)})") from None
        if (
            self.array.dtype != np.uint8
            or self.array.ndim != 4
            or self.array.shape[3] != 3
            or 0 in self.array.shape[1:]
        ):
            raise UsageError(f"{uri}: arr_0 is {self.array.dtype} {self.array.shape}; it must be uint8 (N, H, W, 3)")
        super().__init__(uri, np.zeros(len(self.array), np.int64))

    def name(self, i: int) -> str:
        """Return the name of image i."""
        return str(i)

    def encoded_size(self, i: int) -> int:
        """Return the bytes of image i."""
        return self.array[i].size

    def read(self, i: int) -> np.ndarray:
        """Return the pixels of image i, (H, W, 3)."""
        return np.array(self.array[i])

    def read_captions(self) -> list[str]:
        """Return empty captions."""
        return [""] * len(self)

    def fingerprint(self) -> str:
        """Return a hash of all pixels."""
        return hashlib.sha256(self.array.data).hexdigest()[:16]


def read_npz_arrays(path: str, names: Sequence[str]) -> list[np.ndarray] | None:
    """Return some arrays of an .npz file; None if it lacks one. Raises UsageError if they are damaged or too large."""
    try:
        with untrusted.open_zip(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
        if not all(f"{name}.npy" in sizes for name in names):
            return None
        if max(sizes[f"{name}.npy"] for name in names) > MAX_ARRAY_BYTES:
            raise ValueError(f"an array has more than {MAX_ARRAY_BYTES / 2**30:g} GiB")
        with np.load(path, allow_pickle=False) as arrays:
            return [_load_array(arrays, name) for name in names]
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except Exception as error:  # zipfile, zlib and numpy raise errors of many kinds for damaged files
        raise UsageError(f"{path} is not a readable .npz file ({error_summary(error)})") from None


def _load_array(arrays: Mapping[str, Any], name: str) -> np.ndarray:
    """Return an array of an .npz file. Raises ValueError if the entry is none: NumPy then returns bytes."""
    array = arrays[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array


def _open_npz_array(path: str) -> np.ndarray:
    """Return `arr_0` of an .npz file, memory-mapped if it is not compressed."""
    with untrusted.open_zip(path) as archive:
        info = archive.getinfo("arr_0.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        if info.file_size > MAX_ARRAY_BYTES:
            raise ValueError(
                f"arr_0 is compressed and has more than {MAX_ARRAY_BYTES / 2**30:g} GiB; save it with numpy.savez, so "
                "that it can be mapped into memory"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return _load_array(arrays, "arr_0")
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # lengths in the local header can differ from those in the directory
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, 1)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if fortran else "C")
