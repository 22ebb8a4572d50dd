"""Blur faces before training, as in Berrada et al. Section 3, which does not describe the method.

Faces are detected by OpenCV's frontal-face cascade (Viola and Jones 2001), which its package contains. It misses
profiles, covered and small faces, and has some false positives. Images can be processed with another detector first.

Legend: (x, y, w, h) box of a face in pixels.
"""

import os
import threading
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from gesso.errors import UsageError, install_command

CASCADE_FILE = "haarcascade_frontalface_alt2.xml"
MAX_SEARCH_EDGE = 1024
"""Longer edge in pixels for detection; larger images are reduced."""
MIN_FACE_SIZE = 24
"""Smallest face in pixels; the cascade was trained at 20."""
MIN_NEIGHBOURS = 4
"""Number of overlapping detections that make a face."""
ELLIPSE_WIDTH, ELLIPSE_HEIGHT = 0.6, 0.75
"""Half axes of the blurred ellipse in units of w and h; the ellipse covers the head, a box only the face."""
FADE_RATIO = 1.25
"""Half axes at which the blur ends, in units of those at which it starts to fade."""
BLUR_SIGMA = 0.15
"""Sigma of the Gaussian in units of w; its full width at half maximum is a third of the face."""

_thread_local = threading.local()


def import_opencv() -> Any:
    """Return OpenCV; raise UsageError if it is not installed or has no cascades, as version 5."""
    try:
        import cv2
    except ImportError:
        raise UsageError(f"blurring faces needs OpenCV: {install_command('faces')}") from None
    try:
        has_cascade = cv2.CascadeClassifier is not None and os.path.isfile(cv2.data.haarcascades + CASCADE_FILE)  # type: ignore[attr-defined]
    except AttributeError:
        has_cascade = False
    if not has_cascade:
        raise UsageError(f"OpenCV {cv2.__version__} has no {CASCADE_FILE}: install 4.x with {install_command('faces')}")
    return cv2


def detect_faces(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Return boxes (x, y, w, h) of faces in an image of mode L or RGB, in a fixed order; thread-safe.

    Raises:
        UsageError: As `import_opencv`.
    """
    scale = max(1.0, max(image.size) / MAX_SEARCH_EDGE)
    size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
    if min(size) < MIN_FACE_SIZE:
        return []
    grey = image.convert("L")
    if size != image.size:
        grey = grey.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    boxes = _load_cascade().detectMultiScale(
        np.array(grey), 1.1, MIN_NEIGHBOURS, minSize=(MIN_FACE_SIZE, MIN_FACE_SIZE)
    )
    scaled = ([round(int(edge) * scale) for edge in box] for box in boxes)
    return sorted((x, y, w, h) for x, y, w, h in scaled)


def _load_cascade() -> Any:
    """Return the classifier of this thread; it has state, so threads must not share it."""
    if "cascade" not in _thread_local.__dict__:
        cv2 = import_opencv()
        cv2.setNumThreads(1)  # callers use their own threads, and one thread returns boxes in a fixed order
        _thread_local.cascade = cv2.CascadeClassifier(cv2.data.haarcascades + CASCADE_FILE)
    return _thread_local.cascade


def blur_faces(image: Image.Image) -> tuple[Image.Image, int]:
    """Return an image of mode L or RGB with its faces blurred, and their number; `image` itself without faces.

    All detail within an ellipse around each face is removed; no value outside changes. Equal images give equal bytes in
    any thread.

    Raises:
        UsageError: As `import_opencv`.
    """
    boxes = detect_faces(image)
    if not boxes:
        return image, 0
    blurred = image.copy()
    for box in boxes:
        _blur_face(blurred, *box)
    return blurred, len(boxes)


def _blur_face(image: Image.Image, x: int, y: int, w: int, h: int) -> None:
    """Blur one face in place."""
    a, b = ELLIPSE_WIDTH * w, ELLIPSE_HEIGHT * h
    left, right = _pixel_range(x + w / 2, FADE_RATIO * a, image.width)
    top, bottom = _pixel_range(y + h / 2, FADE_RATIO * b, image.height)
    patch = image.crop((left, top, right, bottom))
    across = (np.arange(left, right) + 0.5 - (x + w / 2)) / a
    down = (np.arange(top, bottom) + 0.5 - (y + h / 2)) / b
    radius = np.sqrt(across[None, :] ** 2 + down[:, None] ** 2)
    mask = np.rint(255 * np.clip((FADE_RATIO - radius) / (FADE_RATIO - 1), 0, 1)).astype(np.uint8)
    image.paste(patch.filter(ImageFilter.GaussianBlur(BLUR_SIGMA * w)), (left, top), Image.fromarray(mask))


def _pixel_range(center: float, radius: float, edge: int) -> tuple[int, int]:
    """Return the first and last + 1 pixel from center - radius to center + radius within the image."""
    return max(0, int(center - radius)), min(edge, int(np.ceil(center + radius)))
