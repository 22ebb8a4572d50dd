"""Pictures and their views on one sheet, each view with what the control variables say of it.

A row is one image: its title, its class and caption; the whole picture with the boxes of its views; the views. Where only
the views are known, the whole is put together from them: what no view shows stays grey.

Legend: K views of an image; C channels; R resolution of a view; H W height and width of a whole picture.
"""

import bisect
import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from gesso.data.base import SampleBatch

VIEW_SIZE, IMAGE_WIDTH, TEXT_WIDTH, GAP = 144, 216, 108, 14
"""pixels: edge of a view; width of a whole picture; of the text beside a view; between them"""
FRAME_WIDTH = 3
LINE_HEIGHT = 16
MAX_CAPTION_LINES = 3
"""of a caption"""
MAX_CAPTION_CHARS = 1000
"""of a caption, at most"""
INK, FAINT, GREY, PAPER = (20, 20, 20), (110, 110, 110), (200, 200, 200), (255, 255, 255)
VIEW_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""of the views; the colour-blind tell them apart (Okabe and Ito)"""


class SheetRow(NamedTuple):
    """An image: `text` is its class and caption; `whole` is not always known; `views` are K samples, none if unreadable.

    x of the views is uint8 (K, C, R, R); of another type it is latents that could not be decoded.
    """

    title: str
    text: str
    image: Image.Image | None
    views: SampleBatch | None


def draw_contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """All rows, one below another, RGB."""
    most = max((len(row.views.x) for row in rows if row.views), default=1)
    width = GAP + IMAGE_WIDTH + GAP + most * (VIEW_SIZE + TEXT_WIDTH + GAP)
    strips = [_draw_row(row, width) for row in rows]
    page = Image.new("RGB", (width, GAP + sum(strip.height for strip in strips)), PAPER)
    for strip, below in zip(
        strips, itertools.accumulate((strip.height for strip in strips), initial=GAP), strict=False
    ):
        page.paste(strip, (0, below))
    return page


def _draw_row(row: SheetRow, width: int) -> Image.Image:
    lines = wrap_text(to_drawable(" ".join(row.text[:MAX_CAPTION_CHARS].split())), width - 2 * GAP, MAX_CAPTION_LINES)
    head = LINE_HEIGHT * (1 + len(lines)) + 4
    strip = Image.new("RGB", (width, head + (VIEW_SIZE if row.views else 0) + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 0), to_drawable(row.title), FAINT, load_font(12))
    for n, line in enumerate(lines, start=1):
        draw.text((GAP, LINE_HEIGHT * n), line, INK, load_font(13))
    if row.views:
        strip.paste(_draw_image(row), (GAP, head))
        for v in range(len(row.views.x)):
            strip.paste(_draw_view(row.views, v), (GAP + IMAGE_WIDTH + GAP + v * (VIEW_SIZE + TEXT_WIDTH + GAP), head))
    return strip


def _draw_image(row: SheetRow) -> Image.Image:
    """(CELL, WHOLE) the whole picture, as large as it fits, with the boxes."""
    H, W = row.views.original_sizes[0].tolist() if row.image is None else (row.image.height, row.image.width)
    scale = min(IMAGE_WIDTH / W, VIEW_SIZE / H)
    w, h = max(1, round(W * scale)), max(1, round(H * scale))
    page, boxes = Image.new("RGB", (IMAGE_WIDTH, VIEW_SIZE), PAPER), row.views.crop_boxes.tolist()
    page.paste(resize(row.image, w, h) if row.image else _assemble_from_views(row.views, w, h), (0, 0))
    draw = ImageDraw.Draw(page)
    for v, (top, left, bottom, right) in enumerate(boxes):
        inset = min(v, (w - 1) // 4, (h - 1) // 4)  # so that equal boxes show side by side
        edges = (round(left * w) + inset, round(top * h) + inset)
        ends = (max(edges[0], round(right * w) - 1 - inset), max(edges[1], round(bottom * h) - 1 - inset))
        draw.rectangle((*edges, *ends), outline=VIEW_COLOURS[v % len(VIEW_COLOURS)], width=2 if min(w, h) > 40 else 1)
    return page


def _assemble_from_views(views: SampleBatch, w: int, h: int) -> Image.Image:
    """What the views show of the whole, at its place."""
    page = Image.new("RGB", (w, h), GREY)
    for v, (top, left, bottom, right) in enumerate(views.crop_boxes.tolist()):
        edges = (round(left * w), round(top * h))
        size = (max(1, round(right * w) - edges[0]), max(1, round(bottom * h) - edges[1]))
        if views.x.dtype == torch.uint8:
            part = resize(_to_pil(views.x[v]), *size)
            page.paste(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flips[v] else part, edges)
    return page


def _draw_view(views: SampleBatch, v: int) -> Image.Image:
    """(CELL, CELL + NOTES) a view in the colour of its box, and its control variables."""
    page, colour = Image.new("RGB", (VIEW_SIZE + TEXT_WIDTH, VIEW_SIZE), PAPER), VIEW_COLOURS[v % len(VIEW_COLOURS)]
    draw = ImageDraw.Draw(page)
    if views.x.dtype == torch.uint8:
        h, w = views.x.shape[-2:]
        scale = (VIEW_SIZE - 2 * FRAME_WIDTH) / max(h, w)
        picture = resize(_to_pil(views.x[v]), max(1, round(w * scale)), max(1, round(h * scale)))
        framed = ImageOps.expand(picture, FRAME_WIDTH, colour)
        page.paste(framed, ((VIEW_SIZE - framed.width) // 2, (VIEW_SIZE - framed.height) // 2))
    else:
        draw.rectangle((0, 0, VIEW_SIZE - 1, VIEW_SIZE - 1), GREY, colour, FRAME_WIDTH)
        draw.text((16, VIEW_SIZE // 2 - 8), "latents, not decoded", INK, load_font(12))
    for n, line in enumerate(control_lines(views, v)):
        draw.text((VIEW_SIZE + 6, LINE_HEIGHT * n), line, INK, load_font(12))
    return page


def control_lines(views: SampleBatch, v: int) -> list[str]:
    """What the network is told of a view, as `gesso sample` takes it: thousandths are shares."""
    said = {name: column[v].item() for name, column in views.control_columns().items()}
    top, left, bottom, right = (f"{said[f'crop_{edge}'] / 1000:.3f}" for edge in ("top", "left", "bottom", "right"))
    lines = [
        f"view {v}",
        f"flip {'yes' if said['flip'] else 'no'}",
        f"crop {top},{left},",
        f"{bottom},{right}",
        f"size {said['height']:.0f}x{said['width']:.0f}",
        f"aspect {said['aspect'] / 1000:.3f}",
    ]
    tone = [f"brightness {said['brightness']:.1f}", f"contrast {said['contrast']:.1f}"]
    return lines + (tone if views.pixel_stats.any() else [])


def _to_pil(x: Tensor) -> Image.Image:
    """(C, R, R) uint8"""
    array = x.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resized; what is enlarged shows its pixels as they are."""
    larger = width >= picture.width and height >= picture.height
    return picture.convert("RGB").resize(
        (width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    )


@functools.lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own."""
    return ImageFont.load_default(size)


@functools.lru_cache(4096)
def _has_glyph(char: str) -> bool:
    """Whether the font has it: what it lacks is drawn as an empty box, as U+FFFF is."""
    mask, lacking = (load_font(13).getmask(one) for one in (char, "\uffff"))
    return (mask.size, bytes(mask)) != (lacking.size, bytes(lacking))


def to_drawable(text: str) -> str:
    """Text for the font, which knows English: accents go, other scripts and signs are named in brackets."""
    return re.sub(r"(\[[^]]+\])(?:\s*\1)+", r"\1", "".join(map(_drawable_char, text)))


def _drawable_char(char: str) -> str:
    if _has_glyph(char):
        return char
    kind = unicodedata.category(char)
    parts = unicodedata.normalize("NFKD", char.casefold() if char == "ß" else "-" if kind == "Pd" else char)
    base = "".join(part for part in parts if unicodedata.category(part) not in ("Mn", "Cf"))
    if all(map(_has_glyph, base)):
        return base
    name = unicodedata.name(char, f"U+{ord(char):04X}").lower()
    return f"[{name.split()[0] if kind[0] in 'LPN' else name}]"  # of a letter its script


def wrap_text(text: str, width: int, max_lines: int) -> list[str]:
    """At most so many lines of at most so many pixels; what is left out shows as three dots."""
    found = []
    while text and len(found) < max_lines:
        fits = bisect.bisect_right(range(len(text) + 1), width, key=lambda n: load_font(13).getlength(text[:n]))
        count = max(1, fits - 1)
        if count < len(text) and " " in text[:count]:
            count = text.rindex(" ", 0, count + 1)
        found.append(text[:count])
        text = text[count:].lstrip()
    if text:
        found[-1] = found[-1][:-3] + "..."
    return found
