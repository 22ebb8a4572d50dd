"""Which part of a picture a sample shows, and what control variables say of it (Berrada et al. Sections 2.1, 2.2).

A box is four shares of the whole picture: top, left, bottom, right. The papers give crop scales (.9 to 1, .4 to .6,
.4 to 1) and do not say of what: here a scale is the area of the box as a share of the largest box of the same aspect
that fits, so that 1 is a whole edge, and `data.crop_aspect` is the aspect of the box, 1 by default: nothing is squeezed.

Legend: N pictures, B samples, C channels, R resolution.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gesso.config import Data

UNIFORMS = 5
"""how many uniform draws decide a view"""


class View(NamedTuple):
    """A box in shares of the picture, and whether it is mirrored."""

    top: float
    left: float
    bottom: float
    right: float
    flip: bool = False


def centred(height: int, width: int, aspect: float = 1.0) -> View:
    """The largest box of aspect width / height in the middle: ADM's crop, where the aspect is 1."""
    h, w = _largest(height, width, aspect)
    return View((1 - h) / 2, (1 - w) / 2, (1 + h) / 2, (1 + w) / 2)


def drawn(data: Data, height: int, width: int, u: Sequence[float]) -> View:
    """The view of a sample, from UNIFORMS draws: scale, aspect (uniform in its logarithm), place, flip."""
    flip = data.flip and u[4] < 0.5
    if data.crop == "center":
        return centred(height, width)._replace(flip=flip)
    low, high = (math.log(a) for a in data.crop_aspect)
    h, w = _largest(height, width, math.exp(low + u[1] * (high - low)))
    scale = data.crop_scale[0] + u[0] * (data.crop_scale[1] - data.crop_scale[0])
    side = math.sqrt(scale) if data.crop_of == "area" else scale
    h, w = h * side, w * side
    top, left = u[2] * (1 - h), u[3] * (1 - w)
    return View(top, left, top + h, left + w, flip)


def _largest(height: int, width: int, aspect: float) -> tuple[float, float]:
    """Height and width, as shares, of the largest box of this aspect."""
    return min(1.0, width / (height * aspect)), min(1.0, height * aspect / width)


def taken(image: Image.Image, view: View, height: int, width: int) -> np.ndarray:
    """The view of a picture, resized with Lanczos's filter in one step: (C, height, width) uint8.

    The filter looks beyond the box where there is picture, so that the edge of a crop is as sharp as its middle.
    """
    W, H = image.size
    box = (view.left * W, view.top * H, view.right * W, view.bottom * H)
    box = tuple(min(max(edge, 0.0), float(most)) for edge, most in zip(box, (W, H, W, H), strict=True))
    if (W, H) != (width, height) or box != (0, 0, W, H):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[:, :, ::-1] if view.flip else pixels)


def columns(sizes: Tensor, boxes: Tensor, flips: Tensor, tone: Tensor) -> Mapping[str, Tensor]:
    """Columns of control by name, (B,) float32 each, in the units of config.CONTROLS.

    sizes (B, 2) height and width of the whole picture; boxes (B, 4); flips (B,) bool; tone (B, 2) mean and standard
    deviation of the pixels of the view. A flipped view has its box in the picture as it was.
    """
    height, width = sizes.float().unbind(1)
    names = ("crop_top", "crop_left", "crop_bottom", "crop_right")
    return dict(zip(names, (1000 * boxes.float()).unbind(1), strict=True)) | {
        "flip": 1000 * flips.float(), "aspect": 1000 * width / height, "height": height, "width": width,
        "brightness": tone[:, 0].float(), "contrast": tone[:, 1].float(),
    }  # fmt: skip


def tone(pixels: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (B, 2) float32, mean and standard deviation of all values of a picture."""
    values = pixels.flatten(1).float()
    return torch.stack([values.mean(1), values.std(1, correction=0)], dim=1)
