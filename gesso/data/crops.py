"""Crops of images, and the control variables that describe them (Berrada et al. Sections 2.1, 2.2).

A box is top, left, bottom, right as shares of the uncropped image.

The paper does not define its crop scales (.9 to 1 global, .4 to .6 local, .4 to 1 mix). gesso reads them as shares of
the area of the largest box with the aspect ratio of the output that fits into the image. So a crop never distorts,
.9 to 1 covers most of a wide image too, and .5 halves the area, not the side.

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
"""Control variables of the crop box."""
UNIFORMS_PER_VIEW = 4
"""Uniform draws per view: scale, top, left, flip."""


class View(NamedTuple):
    """Crop box in shares of the image, and whether the crop is mirrored left to right."""

    top: float
    left: float
    bottom: float
    right: float
    flip: bool = False


FULL_VIEW = View(0.0, 0.0, 1.0, 1.0)


def center_view(height: int, width: int, aspect: float = 1.0) -> View:
    """Return the largest centred box whose width / height is `aspect`."""
    h, w = min(1.0, width / (height * aspect)), min(1.0, height * aspect / width)
    return View((1 - h) / 2, (1 - w) / 2, (1 + h) / 2, (1 + w) / 2)


def largest_view(data: DataConfig, height: int, width: int, aspect: float = 1.0) -> View:
    """Return the largest centred box of training: `center_view`, scaled by the upper end of data.crop_scale.

    A network that has only seen crops of .4 to .6 of the area extrapolates when it samples full images: on the
    shapes dataset the Frechet distance to full images is 87 with the box (0, 0, 1, 1), 64 with `center_view`, 54 with
    this box.
    """
    view, side = center_view(height, width, aspect), math.sqrt(data.crop_scale[1] if data.crop_scale else 1.0)
    h, w = side * (view.bottom - view.top), side * (view.right - view.left)
    return View((1 - h) / 2, (1 - w) / 2, (1 + h) / 2, (1 + w) / 2)


def random_view(data: DataConfig, height: int, width: int, uniforms: Sequence[float], aspect: float = 1.0) -> View:
    """Return the view that UNIFORMS_PER_VIEW draws in [0, 1) select; `aspect` is width / height of the output."""
    flip = data.flip and uniforms[3] < 0.5
    view = center_view(height, width, aspect)
    if data.crop_scale is None:
        return view._replace(flip=flip)
    low, high = data.crop_scale
    side = math.sqrt(low + (high - low) * uniforms[0])
    h, w = side * (view.bottom - view.top), side * (view.right - view.left)
    top, left = uniforms[1] * (1 - h), uniforms[2] * (1 - w)
    return View(top, left, top + h, left + w, flip)


def min_decode_edge(data: DataConfig, edge: int) -> int:
    """Return the shorter edge that an image must have so that no view needs enlarging; `edge` is that of the output."""
    return math.ceil(edge / math.sqrt(data.crop_scale[0] if data.crop_scale else 1))


def crop_resize(image: Image.Image, view: View, height: int, width: int, resize: Resize = "lanczos") -> np.ndarray:
    """Return the view resized to (C, height, width) uint8.

    Filters read pixels beyond the box, so that the border of a crop is as sharp as its middle.
    """
    image = FILTERS[resize](image, view, height, width)
    pixels = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
    return (pixels[:, :, ::-1] if view.flip else pixels).copy()


def lanczos(image: Image.Image, view: View, height: int, width: int) -> Image.Image:
    """Resize the box with the Lanczos filter of Pillow."""
    box = _box_in_pixels(image, view)
    if (width, height) == image.size and box == (0, 0, *image.size):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def adm(image: Image.Image, view: View, height: int, width: int) -> Image.Image:
    """Resize and crop as ADM's code (guided-diffusion, image_datasets.py), which EDM2 and DiT use on ImageNet.

    The image is halved with a box filter while it is at least twice too large, resized to its final size with a
    bicubic filter, and cropped at integer pixels. A view of side s (share of the largest box of the output's aspect)
    needs an image 1/s times as large, as in ADM's random crops. A centre crop starts at (size - output) // 2; other
    crops start at the nearest pixel, within half an output pixel of the box.
    """
    side = max(view.bottom - view.top, view.right - view.left)
    while min(image.width / width, image.height / height) >= 2 / side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height) / side
    w, h = round(image.width * scale), round(image.height * scale)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = _crop_start(w - width, view.left, view.right), _crop_start(h - height, view.top, view.bottom)
    return image.crop((left, top, left + width, top + height))


def bicubic(image: Image.Image, view: View, height: int, width: int) -> Image.Image:
    """Resize the box with the antialiased bicubic filter of Pillow in float32, rounded once, as clean-fid does."""
    size, box = (width, height), _box_in_pixels(image, view)
    planes = [
        np.asarray(plane.convert("F").resize(size, Image.Resampling.BICUBIC, box=box)).clip(0, 255)
        for plane in image.split()
    ]
    values = np.rint(np.stack(planes, axis=2)).astype(np.uint8)
    return Image.fromarray(values[:, :, 0] if len(planes) == 1 else values)


FILTERS = {"lanczos": lanczos, "adm": adm, "bicubic": bicubic}
"""Resize functions by data.resize: (image, view, height, width) -> image of that size, not mirrored."""


def _box_in_pixels(image: Image.Image, view: View) -> tuple[float, float, float, float]:
    """Return the box of a view in pixels: left, upper, right, lower, clipped to the image."""
    W, H = image.size
    box = (view.left * W, view.top * H, view.right * W, view.bottom * H)
    left, upper, right, lower = (min(max(v, 0.0), float(limit)) for v, limit in zip(box, (W, H, W, H), strict=True))
    return left, upper, right, lower


def _crop_start(room: int, low: float, high: float) -> int:
    """Return the first pixel of a crop with `room` spare pixels, for a box from `low` to `high`; halves round down."""
    free = 1 - (high - low)
    return 0 if room <= 0 or free <= 0 else min(max(math.ceil(room * low / free - 0.5 - 1e-6), 0), room)


def mirror_boxes(boxes: Tensor) -> Tensor:
    """Return the boxes (B, 4) in the coordinates of the image mirrored left to right."""
    top, left, bottom, right = boxes.unbind(1)
    return torch.stack([top, 1 - right, bottom, 1 - left], dim=1)


def control_columns(
    original_sizes: Tensor, crop_boxes: Tensor, flips: Tensor, pixel_stats: Tensor
) -> Mapping[str, Tensor]:
    """Return the control variables by name, (B,) float32 each, in the units of config.CONTROL_VARIABLES.

    The crop of a mirrored sample is given in the mirrored image: left -> 1 - right, right -> 1 - left.

    Args:
        original_sizes: (B, 2) height and width of the uncropped image.
        crop_boxes: (B, 4) boxes in the stored, unmirrored image.
        flips: (B,) bool.
        pixel_stats: (B, 2) mean and standard deviation of the pixels of the sample.
    """
    height, width = original_sizes.float().unbind(1)
    boxes = torch.where(flips[:, None], mirror_boxes(crop_boxes), crop_boxes)
    return dict(zip(BOX, (1000 * boxes.float()).unbind(1), strict=True)) | {
        "flip": 1000 * flips.float(), "aspect": 1000 * width / height, "height": height, "width": width,
        "brightness": pixel_stats[:, 0].float(), "contrast": pixel_stats[:, 1].float(),
    }  # fmt: skip


def compute_pixel_stats(pixels: Tensor) -> Tensor:
    """Return (B, 2) float32, mean and standard deviation over all values of each image of (B, C, H, W) uint8."""
    values = pixels.flatten(1).float()
    return torch.stack([values.mean(1), values.std(1, correction=0)], dim=1)
