"""Which part of a picture a sample shows, and what control variables say of it (Berrada et al. Sections 2.1, 2.2).

A box is four shares of the whole picture: top, left, bottom, right.

What the paper leaves open of its crop scales (.9 to 1 global, .4 to .6 local, .4 to 1 mix), and what they are here:
shares of the area, of the largest box of the output's aspect that fits into the picture. So a crop never distorts,
.9 to 1 is nearly all of an oblong picture too, and .5 halves the area, not the side.

Legend: B samples, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gesso.config import DataConfig, Resize

BOX = ("crop_top", "crop_left", "crop_bottom", "crop_right")
"""columns of control that state the box"""
UNIFORMS_PER_VIEW = 4
"""draws of a view: scale, top, left, flip"""


class View(NamedTuple):
    """A box in shares of the picture, and whether it is mirrored."""

    top: float
    left: float
    bottom: float
    right: float
    flip: bool = False


def center_view(height: int, width: int, aspect: float = 1.0) -> View:
    """The largest box of aspect width / height in the middle."""
    h, w = min(1.0, width / (height * aspect)), min(1.0, height * aspect / width)
    return View((1 - h) / 2, (1 - w) / 2, (1 + h) / 2, (1 + w) / 2)


def largest(data: DataConfig, height: int, width: int, aspect: float = 1.0) -> View:
    """Return the largest centred box that training shows of a picture: `centred`, but of local crops their largest share.

    A network that has only seen crops of .4 to .6 of the area extrapolates to the whole picture: on drawn shapes the
    Frechet distance to whole pictures was 87 with the box (0, 0, 1, 1), 64 with the whole centred box, 54 with this one.
    """
    view, side = center_view(height, width, aspect), math.sqrt(data.crop_scale[1] if data.crop_scale else 1.0)
    h, w = side * (view.bottom - view.top), side * (view.right - view.left)
    return View((1 - h) / 2, (1 - w) / 2, (1 + h) / 2, (1 + w) / 2)


def random_view(data: DataConfig, height: int, width: int, uniforms: Sequence[float], aspect: float = 1.0) -> View:
    """The view that `data` and the UNIFORMS draws u say; width / height of the output is `aspect`."""
    flip = data.flip and uniforms[3] < 0.5
    view = center_view(height, width, aspect)
    if data.crop_scale is None:
        return view._replace(flip=flip)
    low, high = data.crop_scale
    side = math.sqrt(low + (high - low) * uniforms[0])
    h, w = side * (view.bottom - view.top), side * (view.right - view.left)
    top, left = uniforms[1] * (1 - h), uniforms[2] * (1 - w)
    return View(top, left, top + h, left + w, flip)


def crop_resize(image: Image.Image, view: View, height: int, width: int, resize: Resize = "lanczos") -> np.ndarray:
    """Return the view of a picture at the size of the output: (C, height, width) uint8.

    Every filter looks beyond the box where there is picture, so that the edge of a crop is as sharp as its middle.
    """
    image = FILTERS[resize](image, view, height, width)
    pixels = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
    return (pixels[:, :, ::-1] if view.flip else pixels).copy()


def lanczos(image: Image.Image, view: View, height: int, width: int) -> Image.Image:
    """Resize the box with Pillow's Lanczos filter in one step."""
    box = _pixels(image, view)
    if (width, height) == image.size and box == (0, 0, *image.size):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def adm(image: Image.Image, view: View, height: int, width: int) -> Image.Image:
    """Resize and crop as ADM's code (guided-diffusion, image_datasets.py), which EDM2 and DiT use on ImageNet.

    The picture is halved with a box filter while its shorter edge is at least twice too large, then resized to its final size
    with a bicubic filter, then cropped at whole pixels. Too large is measured on the largest box of the output's aspect; a view
    whose box is s times as wide and high needs a picture 1/s times as large, as ADM's own random crops do. In the middle the
    crop begins at (size - output) // 2; elsewhere at the nearest pixel, so that a box is met within half an output pixel.
    """
    side = max(view.bottom - view.top, view.right - view.left)
    while min(image.width / width, image.height / height) >= 2 / side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height) / side
    w, h = round(image.width * scale), round(image.height * scale)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = _start(w - width, view.left, view.right), _start(h - height, view.top, view.bottom)
    return image.crop((left, top, left + width, top + height))


def bicubic(image: Image.Image, view: View, height: int, width: int) -> Image.Image:
    """Resize the box with Pillow's antialiased bicubic filter in float32, clipped to 0..255, rounded once (clean-fid)."""
    size, box = (width, height), _pixels(image, view)
    planes = [
        np.asarray(plane.convert("F").resize(size, Image.Resampling.BICUBIC, box=box)).clip(0, 255)
        for plane in image.split()
    ]
    values = np.rint(np.stack(planes, axis=2)).astype(np.uint8)
    return Image.fromarray(values[:, :, 0] if len(planes) == 1 else values)


FILTERS = {"lanczos": lanczos, "adm": adm, "bicubic": bicubic}
"""by data.resize: (picture, view, height, width) -> picture of that size, not mirrored"""


def _pixels(image: Image.Image, view: View) -> tuple[float, float, float, float]:
    """Return the box of a view in pixels: left, upper, right, lower, within the picture."""
    W, H = image.size
    box = (view.left * W, view.top * H, view.right * W, view.bottom * H)
    return tuple(min(max(edge, 0.0), float(most)) for edge, most in zip(box, (W, H, W, H), strict=True))


def _start(room: int, low: float, high: float) -> int:
    """Return the first pixel of a crop that leaves `room` pixels free, of a box from `low` to `high`; halves round down."""
    free = 1 - (high - low)
    return 0 if room <= 0 or free <= 0 else min(max(math.ceil(room * low / free - 0.5 - 1e-6), 0), room)


def mirrored(boxes: Tensor) -> Tensor:
    """Return boxes (B, 4) as they lie in the picture mirrored left to right."""
    top, left, bottom, right = boxes.unbind(1)
    return torch.stack([top, 1 - right, bottom, 1 - left], dim=1)


def control_columns(
    original_sizes: Tensor, crop_boxes: Tensor, flips: Tensor, pixel_stats: Tensor
) -> Mapping[str, Tensor]:
    """Return the columns of control by name, (B,) float32 each, in the units of config.CONTROLS.

    sizes (B, 2) height and width of the whole picture; boxes (B, 4) in the picture as it is stored; flips (B,) bool;
    tone (B, 2) mean and standard deviation of the pixels of the view. The crop columns state the box in the frame that
    is shown: of a mirrored view in the mirrored picture, left -> 1 - right and right -> 1 - left.
    """
    height, width = original_sizes.float().unbind(1)
    shown = torch.where(flips[:, None], mirrored(crop_boxes), crop_boxes)
    return dict(zip(BOX, (1000 * shown.float()).unbind(1), strict=True)) | {
        "flip": 1000 * flips.float(), "aspect": 1000 * width / height, "height": height, "width": width,
        "brightness": pixel_stats[:, 0].float(), "contrast": pixel_stats[:, 1].float(),
    }  # fmt: skip


def compute_pixel_stats(pixels: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (B, 2) float32, mean and standard deviation of all values of a picture."""
    values = pixels.flatten(1).float()
    return torch.stack([values.mean(1), values.std(1, correction=0)], dim=1)
