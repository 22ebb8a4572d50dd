"""Contact sheet of images and their views, each view with its control variables.

A row is one image: its title, class and caption; the full image with the boxes of its views; the views. If only the
views are known, the full image is assembled from them, grey where no view covers it.

Legend: K views of an image; C channels; R resolution of a view; H W height and width of a full image.
"""

import bisect
import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from gesso.data.base import SampleBatch

VIEW_SIZE, IMAGE_WIDTH, TEXT_WIDTH, GAP = 144, 216, 108, 14
"""Sizes in pixels: edge of a view, width of a full image, width of the text next to a view, gap."""
FRAME_WIDTH = 3
LINE_HEIGHT = 16
MAX_CAPTION_LINES, MAX_CAPTION_CHARS = 3, 1000
TITLE_FONT_SIZE, CAPTION_FONT_SIZE = 12, 13
INK, FAINT, GREY, PAPER = (20, 20, 20), (110, 110, 110), (200, 200, 200), (255, 255, 255)
VIEW_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""Colors of the views, distinguishable by the color-blind (Okabe and Ito)."""


class SheetRow(NamedTuple):
    """One image: title, text, full image if known, and K views; none if it is unreadable.

    x of the views is uint8 (K, C, R, R); with any other dtype it holds latents that could not be decoded.
    """

    title: str
    text: str
    image: Image.Image | None
    views: SampleBatch | None


def draw_contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Return all rows, one below another, as an RGB image."""
    max_views = max((len(row.views.x) for row in rows if row.views), default=1)
    width = GAP + IMAGE_WIDTH + GAP + max_views * (VIEW_SIZE + TEXT_WIDTH + GAP)
    strips = [_draw_row(row, width) for row in rows]
    page = Image.new("RGB", (width, GAP + sum(strip.height for strip in strips)), PAPER)
    y = GAP
    for strip in strips:
        page.paste(strip, (0, y))
        y += strip.height
    return page


def _draw_row(row: SheetRow, width: int) -> Image.Image:
    lines = wrap_text(to_drawable(" ".join(row.text[:MAX_CAPTION_CHARS].split())), width - 2 * GAP, MAX_CAPTION_LINES)
    head = LINE_HEIGHT * (1 + len(lines)) + 4
    strip = Image.new("RGB", (width, head + (VIEW_SIZE if row.views else 0) + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 0), to_drawable(row.title), FAINT, load_font(TITLE_FONT_SIZE))
    for n, line in enumerate(lines, start=1):
        draw.text((GAP, LINE_HEIGHT * n), line, INK, load_font(CAPTION_FONT_SIZE))
    if row.views:
        strip.paste(_draw_image(row), (GAP, head))
        for v in range(len(row.views.x)):
            strip.paste(_draw_view(row.views, v), (GAP + IMAGE_WIDTH + GAP + v * (VIEW_SIZE + TEXT_WIDTH + GAP), head))
    return strip


def _draw_image(row: SheetRow) -> Image.Image:
    """Return the full image, as large as it fits, with the boxes of its views."""
    assert row.views is not None
    H, W = row.views.original_sizes[0].tolist() if row.image is None else (row.image.height, row.image.width)
    scale = min(IMAGE_WIDTH / W, VIEW_SIZE / H)
    w, h = max(1, round(W * scale)), max(1, round(H * scale))
    page, boxes = Image.new("RGB", (IMAGE_WIDTH, VIEW_SIZE), PAPER), row.views.crop_boxes.tolist()
    page.paste(resize(row.image, w, h) if row.image else _assemble_from_views(row.views, w, h), (0, 0))
    draw = ImageDraw.Draw(page)
    for v, (top, left, bottom, right) in enumerate(boxes):
        inset = min(v, (w - 1) // 4, (h - 1) // 4)  # so that equal boxes do not cover each other
        edges = (round(left * w) + inset, round(top * h) + inset)
        ends = (max(edges[0], round(right * w) - 1 - inset), max(edges[1], round(bottom * h) - 1 - inset))
        draw.rectangle((*edges, *ends), outline=VIEW_COLOURS[v % len(VIEW_COLOURS)], width=2 if min(w, h) > 40 else 1)
    return page


def _assemble_from_views(views: SampleBatch, w: int, h: int) -> Image.Image:
    """Return the parts of the full image that the views cover."""
    page = Image.new("RGB", (w, h), GREY)
    for v, (top, left, bottom, right) in enumerate(views.crop_boxes.tolist()):
        edges = (round(left * w), round(top * h))
        size = (max(1, round(right * w) - edges[0]), max(1, round(bottom * h) - edges[1]))
        if views.x.dtype == torch.uint8:
            part = resize(_to_pil(views.x[v]), *size)
            page.paste(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flips[v] else part, edges)
    return page


def _draw_view(views: SampleBatch, v: int) -> Image.Image:
    """Return a view framed in the color of its box, with its control variables."""
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
        draw.text((16, VIEW_SIZE // 2 - 8), "latents, not decoded", INK, load_font(TITLE_FONT_SIZE))
    for n, line in enumerate(control_lines(views, v)):
        draw.text((VIEW_SIZE + 6, LINE_HEIGHT * n), line, INK, load_font(TITLE_FONT_SIZE))
    return page


def control_lines(views: SampleBatch, v: int) -> list[str]:
    """Return the control variables of a view as options of `gesso sample`."""
    values = {name: column[v].item() for name, column in views.control_columns().items()}
    top, left, bottom, right = (f"{values[f'crop_{edge}'] / 1000:.3f}" for edge in ("top", "left", "bottom", "right"))
    lines = [
        f"view {v}",
        f"flip {'yes' if values['flip'] else 'no'}",
        f"crop {top},{left},",
        f"{bottom},{right}",
        f"size {values['height']:.0f}x{values['width']:.0f}",
        f"aspect {values['aspect'] / 1000:.3f}",
    ]
    tone = [f"brightness {values['brightness']:.1f}", f"contrast {values['contrast']:.1f}"]
    return lines + (tone if views.pixel_stats.any() else [])


def _to_pil(x: Tensor) -> Image.Image:
    """Convert (C, R, R) uint8 to an image."""
    array = x.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image; enlarged images show their pixels."""
    larger = width >= picture.width and height >= picture.height
    return picture.convert("RGB").resize(
        (width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    )


@functools.lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's built-in font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # with a size
    return font


@functools.lru_cache(4096)
def _has_glyph(char: str) -> bool:
    """Return True if the font has a character; missing ones are drawn as an empty box, like U+FFFF."""
    mask, missing = (load_font(CAPTION_FONT_SIZE).getmask(c) for c in (char, "\uffff"))
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def to_drawable(text: str) -> str:
    """Return text that the font can draw, without accents, and with other scripts and signs named in brackets."""
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
    return f"[{name.split()[0] if kind[0] in 'LPN' else name}]"  # the first word in the name of a letter is its script


def wrap_text(text: str, width: int, max_lines: int) -> list[str]:
    """Return at most `max_lines` lines of at most `width` pixels; three dots mark omitted text."""
    lines: list[str] = []
    while text and len(lines) < max_lines:
        lengths = [load_font(CAPTION_FONT_SIZE).getlength(text[:n]) for n in range(len(text) + 1)]
        count = max(1, bisect.bisect_right(lengths, width) - 1)
        if count < len(text) and " " in text[:count]:
            count = text.rindex(" ", 0, count + 1)
        lines.append(text[:count])
        text = text[count:].lstrip()
    if text:
        lines[-1] = lines[-1][:-3] + "..."
    return lines
