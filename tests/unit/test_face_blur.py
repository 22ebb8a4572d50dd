"""Faces are gone beyond recognition, and nothing else is."""

import builtins
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sklearn.datasets
from helpers.images import PORTRAIT, portrait
from PIL import Image

from gesso.data.encoders import face_blur
from gesso.data.encoders.face_blur import blur_faces, detect_faces
from gesso.errors import UsageError

CHINA = os.path.join(os.path.dirname(sklearn.datasets.__file__), "images", "china.jpg")


def party(*places: tuple[int, int, int], size: tuple[int, int] = (700, 400)) -> Image.Image:
    """The portrait at each (left, top, width) on noise."""
    noise = np.random.default_rng(0).integers(90, 110, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for left, top, width in places:
        picture.paste(portrait(width, width * 6 // 5), (left, top))
    return picture


def detail(picture: Image.Image, x: int, y: int, w: int, h: int) -> float:
    """Mean square of what a second difference leaves at a 48th of a face: energy of the fine features."""
    face = picture.convert("L").crop((x, y, x + w, y + h)).resize((48, 48), Image.Resampling.BOX)
    values = np.asarray(face).astype(float)
    return float(np.square(values[2:, 2:] - 2 * values[1:-1, 1:-1] + values[:-2, :-2]).mean())


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("width", [70, 128, 333, 900, 2000])
def test_a_face_is_gone_and_the_rest_is_as_it_was(mode, width):
    before = portrait(width, width * 6 // 5 + 1, mode)
    original = np.array(before)
    (x, y, w, h), *others = detect_faces(before)
    assert not others
    after, count = blur_faces(before)
    assert count == 1 and after is not before and after.mode == mode and after.size == before.size
    assert np.array_equal(np.array(before), original), "the picture itself must stay"
    assert detect_faces(after) == []
    assert detail(after, x, y, w, h) < 0.02 * detail(before, x, y, w, h)

    rows, columns = np.indices(original.shape[:2]) + 0.5
    radius = np.hypot(
        (columns - x - w / 2) / (face_blur.ELLIPSE_WIDTH * w * face_blur.FADE_RATIO),
        (rows - y - h / 2) / (face_blur.ELLIPSE_HEIGHT * h * face_blur.FADE_RATIO),
    )
    changed = (np.array(after) != original).reshape(*original.shape[:2], -1).any(2)
    assert not changed[radius > 1].any()
    assert changed[radius < 0.7].mean() > 0.9
    assert radius[changed].max() > 0.85, "the edge fades, it does not end"


def test_blurred_features_are_unrecognizable():
    """Eyes and mouth: what is left within the box varies only at the scale of the whole face."""
    before = portrait()
    x, y, w, h = detect_faces(before)[0]
    small = [
        np.asarray(p.convert("L").crop((x, y, x + w, y + h)).resize((16, 16)), float)
        for p in (before, blur_faces(before)[0])
    ]
    window = np.outer(np.hanning(16), np.hanning(16))  # else the edges of the box count as detail
    rough = [np.abs(np.fft.fft2((s - s.mean()) * window)) for s in small]
    high = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(16) * 16])) > 4  # more than four periods across a face
    assert rough[1][high].max() < 0.1 * rough[0][high].max()


def test_every_face_of_several_at_edges_too():
    picture = party((0, 0, 150), (300, 20, 220), (560, 250, 90), (160, 210, 90))
    after, count = blur_faces(picture)
    assert count == len(detect_faces(picture)) == 4 and detect_faces(after) == []


def test_an_ellipse_that_leaves_the_picture():
    x, y, w, h = detect_faces(portrait())[0]
    for box in ((x, y, x + w, y + h), (x, 0, 256, y + h), (x - 5, y - 4, x + w + 3, 300)):
        tight = portrait().crop(box)
        face_blur._blur_face(tight, x - box[0], y - box[1], w, h)
        assert tight.size == (box[2] - box[0], box[3] - box[1]) and detect_faces(tight) == []


@pytest.mark.parametrize("size", [(1, 1), (23, 400), (400, 1), (24, 24), (5000, 30), (31, 57)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_no_face_leaves_the_picture_itself(size, mode):
    picture = Image.open(CHINA).convert(mode).resize(size)
    assert blur_faces(picture) == (picture, 0) and blur_faces(picture)[0] is picture


def test_a_photograph_without_faces():
    picture = Image.open(CHINA)
    after, count = blur_faces(picture)
    assert after is picture and count == 0


def test_threads_and_processes_agree():
    pictures = [party((20 * i, 7 * i, 110 + 17 * i), (450, 60, 200)) for i in range(6)] + [
        portrait(),
        Image.open(CHINA),
    ]
    sequential = [np.asarray(blur_faces(p)[0]) for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for a, b in zip(sequential, pool.map(lambda p: np.asarray(blur_faces(p)[0]), pictures), strict=True):
                assert np.array_equal(a, b)
    code = (
        "import hashlib, sys; from PIL import Image; from gesso.data.encoders.face_blur import blur_faces;"
        f"print(hashlib.sha256(blur_faces(Image.open({PORTRAIT!r}))[0].tobytes()).hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_opencv_is_needed_and_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(UsageError, match=r"pip install 'gesso-diffusion\[faces\]'"):
            face_blur.import_opencv()
    cv2 = face_blur.import_opencv()
    monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(UsageError, match=r"has no haarcascade.*: install 4\.x"):
        face_blur.import_opencv()


def test_opencv_is_imported_lazily():
    code = "import sys, gesso.data.encoders.face_blur, gesso.data.factory; assert 'cv2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
