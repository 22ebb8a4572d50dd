"""Every kind of encoded image against values computed by hand; what is refused; what a reduced decoding changes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops

from gesso.data.sources import decode
from gesso.data.sources.decode import decode_image
from gesso.errors import UnreadableImageError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA[0, :2] = 0, 255


def encoded(image, kind="PNG", **settings) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **settings)
    return file.getvalue()


def png(width, height, depth, colour, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Written from the format's specification: for kinds that Pillow does not write."""
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    stride = len(rows) // height if height else 0
    packed = zlib.compress(b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height)))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in parts
    )


def values(image, channels=3) -> np.ndarray:
    picture, size = decode_image(image, channels)
    assert picture.mode == ("L" if channels == 1 else "RGB") and size == (picture.height, picture.width)
    return np.asarray(picture).astype(int)


def luma(rgb) -> np.ndarray:
    """ITU-R 601, rounded, in 16-bit fixed point."""
    return (rgb.astype(int) @ [19595, 38470, 7471] + 0x8000) >> 16


def on_white(rgb, alpha) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def three(grey) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


SIXTEEN = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
SIXTEEN[0, :4] = 0, 65535, 128, 129  # 128/257 rounds down, 129/257 up
FLOATS = ((np.arange(35).reshape(5, 7) * 7.25 + 0.1) / 255).astype(np.float32)  # none half-way between two greys
BITS = RNG.integers(0, 2, (5, 7)).astype(bool)
INDEX = np.arange(35, dtype=np.uint8).reshape(5, 7)
PALETTE = RNG.integers(0, 256, (35, 3), dtype=np.uint8)


def with_palette(**info) -> Image.Image:
    image = Image.fromarray(INDEX).convert("P")
    image.putdata(INDEX.ravel().tolist())
    image.putpalette(PALETTE.tobytes())
    image.info |= info
    return image


def palette_alpha() -> np.ndarray:
    return np.where(INDEX < 10, INDEX * 20, 255)


MODES = {
    "RGB": (lambda: encoded(RGB), RGB, 0),
    "RGB bmp": (lambda: encoded(RGB, "BMP"), RGB, 0),
    "RGB webp": (lambda: encoded(RGB, "WEBP", lossless=True), RGB, 0),
    "RGB ppm": (lambda: encoded(RGB, "PPM"), RGB, 0),
    "RGB tiff": (lambda: encoded(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "RGB 16 bits": (lambda: png(7, 5, 16, 2, (RGB.astype(int) * 256 + 77).astype(">u2").tobytes()), RGB, 0),
    "L": (lambda: encoded(GREY), three(GREY), 0),
    "L jpeg": (lambda: encoded(np.full((16, 16), 99, np.uint8), "JPEG"), np.full((16, 16, 3), 99), 0),
    "LA": (lambda: encoded(np.dstack([GREY, ALPHA])), on_white(three(GREY), ALPHA), 1),
    "RGBA": (lambda: encoded(np.dstack([RGB, ALPHA])), on_white(RGB, ALPHA), 1),
    "RGBA webp": (lambda: encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "RGBA tiff": (lambda: encoded(np.dstack([RGB, ALPHA]), "TIFF"), on_white(RGB, ALPHA), 1),
    "L, one value clear": (
        lambda: png(7, 5, 8, 0, GREY.tobytes(), (b"tRNS", struct.pack(">H", GREY[2, 3]))),
        three(np.where(GREY[2, 3] == GREY, 255, GREY)), 0,
    ),
    "RGB, one colour clear": (
        lambda: png(7, 5, 8, 2, RGB.tobytes(), (b"tRNS", struct.pack(">3H", *RGB[2, 3].tolist()))),
        np.where((RGB[2, 3] == RGB).all(-1, keepdims=True), 255, RGB), 0,
    ),
    "I;16": (lambda: encoded(SIXTEEN), three(np.floor(SIXTEEN / 257 + 0.5)), 0),
    "I;16 tiff": (lambda: encoded(SIXTEEN, "TIFF"), three(np.floor(SIXTEEN / 257 + 0.5)), 0),
    "I;16, one value clear": (
        lambda: png(7, 5, 16, 0, SIXTEEN.astype(">u2").tobytes(), (b"tRNS", struct.pack(">H", SIXTEEN[2, 3]))),
        three(np.where(SIXTEEN[2, 3] == SIXTEEN, 255, np.floor(SIXTEEN / 257 + 0.5))), 0,
    ),
    "I (pgm)": (
        lambda: b"P5 7 5 65535\n" + SIXTEEN.astype(">u2").tobytes(), three(np.floor(SIXTEEN / 257 + 0.5)), 0,
    ),
    "F": (lambda: encoded(FLOATS, "TIFF"), three(np.rint(FLOATS.astype(float) * 255)), 0),
    "1": (lambda: encoded(BITS), three(BITS * 255), 0),
    "1 tiff": (lambda: encoded(Image.fromarray(BITS), "TIFF", compression="group4"), three(BITS * 255), 0),
    "P": (lambda: encoded(with_palette()), PALETTE[INDEX], 0),
    "P gif": (lambda: encoded(with_palette(), "GIF"), PALETTE[INDEX], 0),
    "P, one clear": (
        lambda: encoded(with_palette(), transparency=9), np.where(INDEX[..., None] == 9, 255, PALETTE[INDEX]), 0,
    ),
    "P gif, one clear": (
        lambda: encoded(with_palette(), "GIF", transparency=9), np.where(INDEX[..., None] == 9, 255, PALETTE[INDEX]), 0,
    ),
    "P, alpha of each": (
        lambda: encoded(with_palette(), transparency=bytes(i * 20 for i in range(10))),
        on_white(PALETTE[INDEX], palette_alpha()), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    make, expected, slack = MODES[mode]
    image = make()
    got = values(image)
    assert got.shape == expected.shape and abs(got - expected).max() <= slack
    assert abs(values(image, 1) - luma(got)).max() <= 0


def test_modes_are_those_of_the_files():
    """The table covers every mode that these decoders give."""
    seen = {Image.open(io.BytesIO(make())).mode for make, _, _ in MODES.values()}
    assert seen >= {"RGB", "L", "LA", "RGBA", "I;16", "I", "F", "1", "P"}


CMYK = {"red": (0, 255, 255, 0), "blue": (255, 255, 0, 0), "olive": (0, 0, 255, 127), "black": (0, 0, 0, 255),
"white": (0, 0, 0, 0)}  # fmt: skip
SEEN = {"red": (255, 0, 0), "blue": (0, 0, 255), "olive": (128, 128, 0), "black": (0, 0, 0), "white": (255, 255, 255)}


@pytest.mark.parametrize("colour", CMYK)
def test_cmyk(colour):
    """Ink takes light away; Adobe's JPEGs hold 255 - ink, with a marker that says so."""
    ink = Image.new("CMYK", (16, 16), CMYK[colour])
    tiff, jpeg = encoded(ink, "TIFF"), encoded(ink, "JPEG", quality=100)
    assert b"Adobe" in jpeg
    assert abs(values(tiff) - SEEN[colour]).max() == 0
    assert abs(values(jpeg) - SEEN[colour]).max() <= 2
    assert abs(values(tiff, 1) - luma(np.array(SEEN[colour]))).max() == 0


TURNED = {  # EXIF 2.3: where the 0th row and the 0th column of the stored image are seen
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation(orientation, kind):
    exif = Image.Exif()
    exif[decode.EXIF_ORIENTATION] = orientation
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    picture, size = decode_image(encoded(RGB, kind, exif=exif, **settings), 3)
    expected = TURNED[orientation](RGB)
    assert size == expected.shape[:2] == (picture.height, picture.width)
    assert abs(np.asarray(picture).astype(int) - expected).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12" * 40, b"junk"]
)
def test_damaged_exif_leaves_a_picture_as_it_is(exif):
    image = encoded(np.full((8, 8, 3), 128, np.uint8), "JPEG")
    marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert values(image[:2] + marker + image[2:]).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "value", [b"\0\2\0\0\0\2x\0\0\0", b"\0\3\0\0\0\1\0\x63\0\0", b"\0\3\0\0\0\2\0\6\0\6", b"\0\3\0\0\0\1\0\0\0\0"]
)
def test_an_orientation_that_there_is_not(value):
    """A text, 99, two of them, 0: as if none were given."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12" + value + b"\0\0\0\0"
    image = encoded(SMOOTH, "JPEG")
    turned = image[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + image[2:]
    assert decode.EXIF_ORIENTATION in Image.open(io.BytesIO(turned)).getexif()
    picture, size = decode_image(turned, 3)
    assert size == (96, 80) and np.array_equal(picture, decode_image(image, 3)[0])


def test_arrays():
    assert np.array_equal(values(RGB), RGB) and np.array_equal(values(RGB, 1), luma(RGB))
    assert np.array_equal(values(GREY[..., None]), three(GREY)) and np.array_equal(values(GREY[..., None], 1), GREY)


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(RGB), ImageChops.invert(Image.fromarray(RGB))]
    for kind, settings in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        assert np.array_equal(
            values(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)), RGB
        )


SMOOTH = np.stack(np.broadcast_arrays(np.arange(96)[:, None], np.arange(80)[None], 99), -1).astype(np.uint8)
SMOOTH[20:70, 10:60] = RNG.integers(0, 256, (50, 50, 3))
WRITERS = {
    "jpeg": ("JPEG", {}), "progressive jpeg": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}), "gif": ("GIF", {}), "bmp": ("BMP", {}), "ppm": ("PPM", {}),
    "tiff": ("TIFF", {}), "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff jpeg": ("TIFF", {"compression": "jpeg"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_cut_short_is_refused_or_nothing_is_missing(name):
    """At any byte: a picture comes out only if it is the whole one (a cut in what follows the pixels)."""
    kind, settings = WRITERS[name]
    image = encoded(SMOOTH, kind, **settings)
    full, refused = values(image), 0
    cuts = {*np.linspace(0, len(image) - 1, 60).astype(int).tolist(), *range(len(image) - 20, len(image))}
    for cut in cuts:
        try:
            assert np.array_equal(values(image[:cut]), full), f"half a picture from {cut} of {len(image)} bytes"
        except UnreadableImageError as error:
            refused += 1
            assert error.reason and "\n" not in error.reason
    assert refused >= 50


@pytest.mark.parametrize(
    "image, words",
    [
        (b"", "empty"),
        (b"\0" * 100, "not an image"),
        (b"<html>not found</html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "Error"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (encoded(np.full((4, 4), 1.5, np.float32), "TIFF"), "black is 0 and white 1"),
        (encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), "white 1"),
        (encoded(np.full((4, 4), 70000, np.int32), "TIFF"), "white 65535"),
        (encoded(np.full((4, 4), -1, np.int32), "TIFF"), "black is 0"),
    ],
)
def test_refused(image, words):
    with pytest.raises(UnreadableImageError, match=words) as caught:
        decode_image(image, 3)
    assert str(caught.value) == caught.value.reason and caught.value.name == ""


def test_damaged_inside():
    image = bytearray(encoded(SMOOTH))
    image[len(image) // 2] ^= 255
    with pytest.raises(UnreadableImageError):
        decode_image(bytes(image), 3)


def test_a_bomb_is_refused_before_its_pixels():
    """By its header alone: this file has no pixels."""
    with pytest.raises(UnreadableImageError, match="14000 x 13000 is over 178956970 pixels: a decompression bomb"):
        decode_image(png(14000, 13000, 8, 0, b""), 1)


def test_large_is_no_bomb():
    """90 million pixels, of which Pillow itself warns (and warnings are errors here)."""
    with pytest.raises(UnreadableImageError, match="truncated"):  # it went past the header
        decode_image(png(10000, 9000, 1, 0, b""), 1)
    picture, size = decode_image(png(10000, 9000, 1, 0, b"\xff" * (1250 * 9000)), 1)
    assert size == (9000, 10000) and picture.getextrema() == (255, 255)


def photo(size: tuple[int, int]) -> Image.Image:
    """Something with edges and detail at every scale, as photographs have."""
    rng = np.random.default_rng(1)
    total = np.zeros((size[1], size[0], 3))
    for n in (2, 5, 11, 23, 47, 95, 191):
        noise = Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        total += (np.asarray(noise).astype(float) - 128) / n**0.7
    return Image.fromarray((128 + total * (60 / total.std())).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("least, factor", [(None, 1), (100, 1), (99, 2), (50, 2), (49, 4), (24, 8), (5, 8)])
def test_reduced_decoding(least, factor):
    """At most as far as twice the edge remains; the size told is that of the whole."""
    exif = Image.Exif()
    exif[decode.EXIF_ORIENTATION] = 6
    image = encoded(photo((600, 397)), "JPEG", quality=95, exif=exif)
    picture, size = decode_image(image, 3, least)
    assert size == (600, 397)
    assert picture.size == (-(-397 // factor), -(-600 // factor))
    assert least is None or min(picture.size) >= 2 * least


def test_reduced_decoding_shows_the_same():
    image = encoded(photo((640, 480)), "JPEG", quality=95)
    for least in (32, 64, 100):
        small = [
            np.asarray(decode_image(image, 3, n)[0].resize((least, least), Image.Resampling.LANCZOS)).astype(float)
            for n in (None, least)
        ]
        assert small[0].std() > 30 and (small[0] - small[1]).std() < 4


def test_only_jpegs_are_decoded_reduced():
    image = encoded(photo((64, 64)))
    assert decode_image(image, 3, 4)[0].size == (64, 64)
