"""Decode an image file to upright 8-bit grey or RGB, or refuse it with a reason.

Colors are the file's numbers: ICC profiles are not applied.
"""

import contextlib
import functools
import importlib
import io
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

from gesso.errors import UnreadableImageError, install_command

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that are decoded, by the first bytes; no other decoder of Pillow reads the file."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
"""Brands of HEIF files with HEVC, the photographs of iPhones (ISO/IEC 23008-12)."""
HEAD_BYTES = 64
"""Number of bytes of a file that tell its format."""
HEIF_CURE = f"a HEIC image: {install_command('heif')}, or convert it to JPEG"
SIGNATURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "JPEG2000", "HEIF")
"""Formats with a signature that no other file begins with."""
MAX_PIXELS = 178_956_970
"""Maximum number of pixels of an image, as in Pillow, and of all images that threads decode at once.

A pixel takes up to 16 bytes meanwhile.
"""

EXIF_ORIENTATION = 0x0112
# EXIF 2.3, tag 274: what makes a stored image upright.
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PixelBudget:
    """Number of pixels that threads may decode at once.

    Args:
        total: Number of pixels; an image with more has it alone.
    """

    def __init__(self, total: int):
        self.total, self.used, self.condition = total, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Wait until `count` pixels are free, and hold them in the body."""
        with self.condition:
            self.condition.wait_for(lambda: not self.used or self.used + count <= self.total)
            self.used += count
        try:
            yield
        finally:
            with self.condition:
                self.used -= count
                self.condition.notify_all()


BUDGET = PixelBudget(MAX_PIXELS)


def decode_image(
    image: bytes | np.ndarray, channels: int, min_edge: int | None = None, upright: bool = True
) -> tuple[Image.Image, tuple[int, int]]:
    """Return the image in mode L (1 channel) or RGB (3), and height and width of the original as it is viewed.

    Args:
        image: An encoded file, or (H, W, 1 or 3) uint8. Of an animation the first frame is used.
        channels: 1 or 3.
        min_edge: The shorter edge that is needed: a JPEG may then be decoded at a half, a quarter or an eighth, never
            below twice that edge.
        upright: Apply EXIF orientation and put transparent parts on white. False returns the pixels of PIL's `convert`,
            as the published loaders of ImageNet do.

    Raises:
        UnreadableImageError: The file is empty, damaged, truncated, of an unknown format, or above MAX_PIXELS; the
        error
            has no name. Incomplete images are never used.
    """
    if isinstance(image, np.ndarray):
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3), (image.dtype, image.shape)
        return _to_grey_or_rgb(
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), channels
        ), image.shape[:2]
    try:
        opened = open_header(image)
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UnreadableImageError("", f"{width} x {height} is over {MAX_PIXELS} pixels: a decompression bomb")
        if min_edge:
            opened.draft(None, (2 * min_edge, 2 * min_edge))
        with BUDGET.reserve(opened.width * opened.height):
            opened.load()
            orientation = exif_orientation(opened) if upright else 1
            picture = _to_grey_or_rgb(opened, channels, white=upright)
    except UnreadableImageError:
        raise
    except Exception as error:  # whatever a decoder raises on a damaged file
        raise UnreadableImageError("", f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if orientation in ORIENTATION_TRANSPOSES:
        picture = picture.transpose(ORIENTATION_TRANSPOSES[orientation])
    return picture, (width, height) if orientation >= 5 else (height, width)


def open_header(data: bytes) -> ImageFile.ImageFile:
    """Read the header and no pixels; unlike Image.open, without warnings on large images."""
    if not data:
        raise UnreadableImageError("", "the file is empty")
    name = image_format(data)
    if name == "HEIF" and not has_heif():
        raise UnreadableImageError("", HEIF_CURE)
    if name is None:
        raise UnreadableImageError("", f"not an image ({', '.join(IMAGE_FORMATS)})")
    return Image.OPEN[name][0](io.BytesIO(data), "")


def image_format(head: bytes) -> str | None:
    """Return the format in IMAGE_FORMATS, or HEIF, of a file that begins with `head`, None for any other file."""
    # Brands: the major one, the version, and the compatible ones. Pillow takes every brand mif1 for AVIF.
    brands = [head[i : i + 4] for i in (8, *range(16, min(len(head), HEAD_BYTES) - 3, 4))]
    if head[4:8] == b"ftyp" and any(brand in HEIF_BRANDS for brand in brands):
        return "HEIF"
    Image.init()
    for name in IMAGE_FORMATS:
        accepts = Image.OPEN[name][1] if name in Image.OPEN else None
        if accepts is not None and accepts(head[:16]) is True:  # a str where Pillow was built without the format
            return name
    return None


@functools.cache
def has_heif() -> bool:
    """Return whether HEIC images can be read, and make Pillow read them."""
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if it is unreadable."""
    try:
        value = int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata of a whole picture
        return 1
    return value if value in ORIENTATION_TRANSPOSES else 1


def _to_grey_or_rgb(image: Image.Image, channels: int, white: bool = True) -> Image.Image:
    """Convert to mode L or RGB; white: put transparent parts on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8bit(image)
    if white and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_8bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (65535 is white) or float (1 is white) to 8 bits; one grey value may be transparent."""
    values = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= white):  # NaN too
        raise UnreadableImageError(
            "", f"grey values from {values.min():g} to {values.max():g}, but black is 0 and white {white:g}"
        )
    if image.mode == "F":
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey
