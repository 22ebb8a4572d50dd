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

from gesso.data.samples import Samples

CELL, WHOLE, NOTES, GAP = 144, 216, 108, 14
"""pixels: edge of a view; width of a whole picture; of the text beside a view; between them"""
FRAME = 3
LINE = 16
LINES = 3
"""of a caption"""
SIGNS = 1000
"""of a caption, at most"""
INK, FAINT, GREY, PAPER = (20, 20, 20), (110, 110, 110), (200, 200, 200), (255, 255, 255)
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""of the views; the colour-blind tell them apart (Okabe and Ito)"""


class Row(NamedTuple):
    """An image: `text` is its class and caption; `whole` is not always known; `views` are K samples, none if unreadable.

    x of the views is uint8 (K, C, R, R); of another type it is latents that could not be decoded.
    """

    title: str
    text: str
    whole: Image.Image | None
    views: Samples | None


def sheet(rows: Sequence[Row]) -> Image.Image:
    """All rows, one below another, RGB."""
    most = max((len(row.views.x) for row in rows if row.views), default=1)
    width = GAP + WHOLE + GAP + most * (CELL + NOTES + GAP)
    strips = [_strip(row, width) for row in rows]
    page = Image.new("RGB", (width, GAP + sum(strip.height for strip in strips)), PAPER)
    for strip, below in zip(
        strips, itertools.accumulate((strip.height for strip in strips), initial=GAP), strict=False
    ):
        page.paste(strip, (0, below))
    return page


def _strip(row: Row, width: int) -> Image.Image:
    lines = wrapped(readable(" ".join(row.text[:SIGNS].split())), width - 2 * GAP, LINES)
    head = LINE * (1 + len(lines)) + 4
    strip = Image.new("RGB", (width, head + (CELL if row.views else 0) + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 0), readable(row.title), FAINT, font(12))
    for n, line in enumerate(lines, start=1):
        draw.text((GAP, LINE * n), line, INK, font(13))
    if row.views:
        strip.paste(_whole(row), (GAP, head))
        for v in range(len(row.views.x)):
            strip.paste(_view(row.views, v), (GAP + WHOLE + GAP + v * (CELL + NOTES + GAP), head))
    return strip


def _whole(row: Row) -> Image.Image:
    """(CELL, WHOLE) the whole picture, as large as it fits, with the boxes."""
    H, W = row.views.sizes[0].tolist() if row.whole is None else (row.whole.height, row.whole.width)
    scale = min(WHOLE / W, CELL / H)
    w, h = max(1, round(W * scale)), max(1, round(H * scale))
    page, boxes = Image.new("RGB", (WHOLE, CELL), PAPER), row.views.boxes.tolist()
    page.paste(enlarged(row.whole, w, h) if row.whole else _assembled(row.views, w, h), (0, 0))
    draw = ImageDraw.Draw(page)
    for v, (top, left, bottom, right) in enumerate(boxes):
        inset = min(v, (w - 1) // 4, (h - 1) // 4)  # so that equal boxes show side by side
        edges = (round(left * w) + inset, round(top * h) + inset)
        ends = (max(edges[0], round(right * w) - 1 - inset), max(edges[1], round(bottom * h) - 1 - inset))
        draw.rectangle((*edges, *ends), outline=COLOURS[v % len(COLOURS)], width=2 if min(w, h) > 40 else 1)
    return page


def _assembled(views: Samples, w: int, h: int) -> Image.Image:
    """What the views show of the whole, at its place."""
    page = Image.new("RGB", (w, h), GREY)
    for v, (top, left, bottom, right) in enumerate(views.boxes.tolist()):
        edges = (round(left * w), round(top * h))
        size = (max(1, round(right * w) - edges[0]), max(1, round(bottom * h) - edges[1]))
        if views.x.dtype == torch.uint8:
            part = enlarged(_picture(views.x[v]), *size)
            page.paste(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flips[v] else part, edges)
    return page


def _view(views: Samples, v: int) -> Image.Image:
    """(CELL, CELL + NOTES) a view in the colour of its box, and its control variables."""
    page, colour = Image.new("RGB", (CELL + NOTES, CELL), PAPER), COLOURS[v % len(COLOURS)]
    draw = ImageDraw.Draw(page)
    if views.x.dtype == torch.uint8:
        h, w = views.x.shape[-2:]
        scale = (CELL - 2 * FRAME) / max(h, w)
        picture = enlarged(_picture(views.x[v]), max(1, round(w * scale)), max(1, round(h * scale)))
        framed = ImageOps.expand(picture, FRAME, colour)
        page.paste(framed, ((CELL - framed.width) // 2, (CELL - framed.height) // 2))
    else:
        draw.rectangle((0, 0, CELL - 1, CELL - 1), GREY, colour, FRAME)
        draw.text((16, CELL // 2 - 8), "latents, not decoded", INK, font(12))
    for n, line in enumerate(control(views, v)):
        draw.text((CELL + 6, LINE * n), line, INK, font(12))
    return page


def control(views: Samples, v: int) -> list[str]:
    """What the network is told of a view, as `gesso sample` takes it: thousandths are shares."""
    said = {name: column[v].item() for name, column in views.columns().items()}
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
    return lines + (tone if views.tone.any() else [])


def _picture(x: Tensor) -> Image.Image:
    """(C, R, R) uint8"""
    array = x.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")


def enlarged(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resized; what is enlarged shows its pixels as they are."""
    larger = width >= picture.width and height >= picture.height
    return picture.convert("RGB").resize(
        (width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    )


@functools.lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own."""
    return ImageFont.load_default(size)


@functools.lru_cache(4096)
def _drawable(sign: str) -> bool:
    """Whether the font has it: what it lacks is drawn as an empty box, as U+FFFF is."""
    mask, lacking = (font(13).getmask(one) for one in (sign, "\uffff"))
    return (mask.size, bytes(mask)) != (lacking.size, bytes(lacking))


def readable(text: str) -> str:
    """Text for the font, which knows English: accents go, other scripts and signs are named in brackets."""
    return re.sub(r"(\[[^]]+\])(?:\s*\1)+", r"\1", "".join(map(_plain, text)))


def _plain(sign: str) -> str:
    if _drawable(sign):
        return sign
    kind = unicodedata.category(sign)
    parts = unicodedata.normalize("NFKD", sign.casefold() if sign == "ß" else "-" if kind == "Pd" else sign)
    base = "".join(part for part in parts if unicodedata.category(part) not in ("Mn", "Cf"))
    if all(map(_drawable, base)):
        return base
    name = unicodedata.name(sign, f"U+{ord(sign):04X}").lower()
    return f"[{name.split()[0] if kind[0] in 'LPN' else name}]"  # of a letter its script


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """At most so many lines of at most so many pixels; what is left out shows as three dots."""
    found = []
    while text and len(found) < lines:
        fits = bisect.bisect_right(range(len(text) + 1), width, key=lambda n: font(13).getlength(text[:n]))
        count = max(1, fits - 1)
        if count < len(text) and " " in text[:count]:
            count = text.rindex(" ", 0, count + 1)
        found.append(text[:count])
        text = text[count:].lstrip()
    if text:
        found[-1] = found[-1][:-3] + "..."
    return found
