"""Shapes: a procedural data set with captions and labels. Image `index` is a pure function of (seed, index).

One or two shapes of six kinds in eight colors lie on a gradient with a fine texture. Captions name kind, color and
position; nothing else in an image distinguishes left from right, so that a flip shows in the facts alone. Facts,
positions and captions are bit-equal on every machine, pixels on one build of numpy.

The fine waves have 25 to 28 cycles across the shorter edge, and their harmonics twice as many: an original of 48 pixels
(24 cycles at most) shows neither, one of 64 the waves, one of 128 both.

Legend: lengths are in units of the shorter edge, x to the right, y down, (0, 0) the center of the image; the centered
square is [-1/2, 1/2]^2, and shapes stay within 0.45 of its center. n shorter edge in pixels, d signed distance to an
outline, negative inside. Colors are RGB from 0 to 1 until they are rounded.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gesso import rng
from gesso.errors import UsageError

KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (215, 38, 56),
    "yellow": (250, 205, 45),
    "green": (38, 150, 70),
    "cyan": (50, 200, 225),
    "blue": (38, 72, 210),
    "purple": (165, 50, 195),
    "black": (28, 27, 32),
    "white": (244, 242, 236),
}
SIDES = ("left", "right", "top", "bottom", "middle")
"""Places of a single shape."""
RELATIONS = ("left", "right", "above", "below")
"""Places of the first of two shapes relative to the second."""
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "middle": (0, 0),
    "above": (0, -1),
    "below": (0, 1),
}
ASPECT_RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3))
"""Aspect ratios, width to height."""
MIN_SIZE, MAX_SIZE = 48, 256
"""Bounds of the native height and width, in pixels."""
PATTERNS = ("stripes", "checks", "dots")
"""Numbers of plane waves at equal angles."""
MAX_EXTENT = 0.45
"""Largest extent of a shape from the center along either axis."""
UNIFORMS_PER_SCENE = 60
"""Number of uniform draws per scene, an upper bound."""


@dataclass(frozen=True)
class Texture:
    """Waves of `frequency` cycles per shorter edge and their harmonic, added to all three channels."""

    pattern: str
    frequency: float
    angle: float
    phase: float
    strength: float


@dataclass(frozen=True)
class Shape:
    """One shape; `radius` is that of its circumscribed circle, `rotation` in radians, clockwise from upright."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    rotation: float
    texture: Texture


@dataclass(frozen=True)
class Background:
    """Gradient from color `start` to color `end` along `direction`, with broad, faint waves (`mottle`)."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    direction: float
    mottle: tuple[Texture, ...]
    texture: Texture


@dataclass(frozen=True)
class Scene:
    """One image; `place` is one of SIDES for one shape, one of RELATIONS for two. Height and width in pixels."""

    shapes: tuple[Shape, ...]
    place: str
    height: int
    width: int
    background: Background
    wording: int


@dataclass(frozen=True)
class Facts:
    """Claims of a caption: (kind, color) of each shape, and the place of the first; None: no place."""

    shapes: tuple[tuple[str, str], ...]
    place: str | None


def sample_scene(index: int, seed: int = 0, single: bool = False) -> Scene:
    """Return scene `index` >= 0. single: it has one shape, so that its kind can be the class of the image."""
    return sample_scenes([index], seed, single)[0]


def sample_scenes(indices: Sequence[int], seed: int = 0, single: bool = False) -> list[Scene]:
    """Return the scenes of `indices`, equal to those drawn one by one, but faster."""
    draws = rng.uniform(seed, torch.tensor(indices, dtype=torch.int64), "shapes", UNIFORMS_PER_SCENE)
    return [_build_scene(iter(row), single) for row in draws.tolist()]


def _build_scene(u: Iterator[float], single: bool) -> Scene:
    """Build a scene from uniform draws."""
    height, width = _sample_size(_choose(u, ASPECT_RATIOS), next(u))
    wording, background = int(3 * next(u)), _sample_background(u)
    alone = next(u) < 0.5 or single
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    first = int(len(pairs) * next(u))
    second = (first + 1 + int((len(pairs) - 1) * next(u))) % len(pairs)  # any pair but the first
    place, spots = _place_one(u) if alone else _place_two(u)
    shapes = tuple(
        Shape(*pairs[pair], x, y, radius, _uniform(u, -0.35, 0.35), _sample_texture(u, 0.04, 0.08))
        for pair, (x, y, radius) in zip((first, second), spots, strict=False)
    )
    return Scene(shapes, place, height, width, background, wording)


def _sample_size(aspect: tuple[int, int], u: float) -> tuple[int, int]:
    """Return height and width in pixels; the shorter edge is log-uniform."""
    w, h = aspect
    ratio = max(aspect) / min(aspect)
    n = math.floor(MIN_SIZE * ((MAX_SIZE / ratio + 1) / MIN_SIZE) ** u)
    longer = round(n * ratio)
    return (n, longer) if w > h else (longer, n)


def _place_one(u: Iterator[float]) -> tuple[str, list[tuple[float, float, float]]]:
    """Return the side, and [(x, y, radius)]: 0.13 to 0.21 to that side, at most 0.04 off otherwise."""
    place, radius = _choose(u, SIDES), _uniform(u, 0.17, 0.24)
    dx, dy = DIRECTIONS[place]
    return place, [(0.17 * dx + _uniform(u, -0.04, 0.04), 0.17 * dy + _uniform(u, -0.04, 0.04), radius)]


def _place_two(u: Iterator[float]) -> tuple[str, list[tuple[float, float, float]]]:
    """Return the relation, and [(x, y, radius)] of both; the offset on the other axis is at most 0.35 of it."""
    place = _choose(u, RELATIONS)
    dx, dy = DIRECTIONS[place]
    radii = _uniform(u, 0.16, 0.195), _uniform(u, 0.16, 0.195)
    apart = _uniform(u, 0.44, 0.5)
    slack = MAX_EXTENT - apart / 2 - max(radii)
    along, across = _uniform(u, -slack, slack), _uniform(u, -0.16, 0.16)
    tilt = 0.35 * apart * _uniform(u, -0.5, 0.5)
    spots = []
    for half, radius in zip((0.5, -0.5), radii, strict=True):
        a, b = along + half * apart, across + 2 * half * tilt  # on the axis of the relation, and on the other
        spots.append((dx * a + dy * b, dy * a + dx * b, radius))
    return place, spots


def _sample_background(u: Iterator[float]) -> Background:
    hue, lightness = _uniform(u, 0, 2 * math.pi), _uniform(u, 0.5, 0.62)
    turn, step = _uniform(u, -1.2, 1.2), _uniform(u, -0.09, 0.09)
    return Background(
        _muted_colour(hue, _uniform(u, 0.04, 0.09), lightness - step),
        _muted_colour(hue + turn, _uniform(u, 0.04, 0.09), lightness + step),
        _uniform(u, 0, 2 * math.pi),
        tuple(
            Texture("stripes", _uniform(u, 0.6, 3), _uniform(u, 0, 2 * math.pi), next(u), _uniform(u, 0.005, 0.02))
            for _ in range(3)
        ),
        _sample_texture(u, 0.03, 0.07),
    )


def _muted_colour(hue: float, chroma: float, lightness: float) -> tuple[float, float, float]:
    """Return RGB of a grey with a faint hue."""
    third = 2 * math.pi / 3
    red, green, blue = (lightness + chroma * math.cos(hue - i * third) for i in range(3))
    return red, green, blue


def _sample_texture(u: Iterator[float], low: float, high: float) -> Texture:
    return Texture(
        _choose(u, PATTERNS), _uniform(u, 25, 28), _uniform(u, 0, 2 * math.pi), next(u), _uniform(u, low, high)
    )


def _uniform(u: Iterator[float], low: float, high: float) -> float:
    return low + (high - low) * next(u)


def _choose(u: Iterator[float], choices: Sequence):
    return choices[int(len(choices) * next(u))]


def scene_facts(scene: Scene) -> Facts:
    """Return the facts of a scene."""
    return Facts(tuple((shape.kind, shape.colour) for shape in scene.shapes), scene.place)


def scene_label(scene: Scene) -> int:
    """Return the index in KINDS of the first shape; for class-conditional images draw scenes with `single`.

    A second shape, mostly of another kind, would make the class of an image ambiguous.
    """
    return KINDS.index(scene.shapes[0].kind)


SIDE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
RELATION_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
TRAILING_PHRASES = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}


def scene_caption(scene: Scene) -> str:
    """Return one of three wordings of at most 12 words, all of which claim `scene_facts(scene)`."""
    names = [f"a {shape.colour} {shape.kind}" for shape in scene.shapes]
    if len(names) == 1:
        at = SIDE_PHRASES[scene.place]
        return (f"{names[0]} {at}", f"{at}, {names[0]}", f"there is {names[0]} {at} of the picture")[scene.wording]
    a, b = names
    of, its = RELATION_PHRASES[scene.place], TRAILING_PHRASES[scene.place]
    return (f"{a} {of} {b}", f"{of} {b} there is {a}", f"{b} with {a} {its}")[scene.wording]


def parse_caption(caption: str) -> Facts:
    """Return the facts that a caption claims; those of two shapes begin with the one whose place is given.

    That is the first if the place is between them ("A left of B"), otherwise the second ("left of B, A"; "B with A to
    its left").

    Raises:
        UsageError: The caption has not one or two of "color kind", or not one place.
    """
    text = caption.lower()
    named = list(re.finditer(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(KINDS)})\b", text))
    shapes = [(match[2], match[1]) for match in named]
    places = list(re.finditer(rf"\b({'|'.join(DIRECTIONS)})\b", text))
    allowed = SIDES if len(shapes) == 1 else RELATIONS
    if len(shapes) not in (1, 2) or len(places) > 1 or any(place[0] not in allowed for place in places):
        raise UsageError(
            f"caption {caption!r}: not one or two shapes and one place; it would read like 'a red circle on the "
            "left' or "
            f"'a red circle above a blue star' ({', '.join(COLOURS)}; {', '.join(KINDS)})"
        )
    if not places:
        return Facts(tuple(shapes), None)
    between = named[0].end() <= places[0].start() < named[-1].start()
    return Facts(tuple(shapes if between or len(shapes) == 1 else shapes[::-1]), places[0][0])


def mirror_facts(facts: Facts) -> Facts:
    """Return the facts after left and right are exchanged."""
    mirrored = {"left": "right", "right": "left"}
    return Facts(facts.shapes, mirrored.get(facts.place, facts.place) if facts.place else None)


def _star_distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the distance to a star with five tips at radius 1 and notches at 0.45, folded onto half a tip."""
    angle = np.arctan2(u, -v)
    angle = abs(angle - np.rint(angle * (5 / (2 * math.pi))) * (2 * math.pi / 5))
    along, across = 0.45 * math.cos(math.pi / 5) - 1, 0.45 * math.sin(math.pi / 5)
    radius = np.hypot(u, v)
    return ((radius * np.cos(angle) - 1) * across - radius * np.sin(angle) * along) / math.hypot(along, across)


# d at (u, v), in units of the radius: the distance to the line of the nearest side, exact along the sides.
SIGNED_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.88,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.7,
    "triangle": lambda u, v: np.maximum(v, abs(u) * math.sqrt(0.75) - v / 2) - 0.5,
    "star": _star_distance,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.74) - 0.2,
    "cross": lambda u, v: np.maximum(np.maximum(abs(u), abs(v)) - 0.92, np.minimum(abs(u), abs(v)) - 0.3),
}
RIM_WIDTH, SHADOW_OFFSET = 0.011, 0.02


def render_scene(scene: Scene) -> np.ndarray:
    """Return the image (h, w, 3) uint8 at its native size, antialiased."""
    n = min(scene.height, scene.width)
    x, y = (((np.arange(edge) + 0.5 - edge / 2) / n).astype(np.float32) for edge in (scene.width, scene.height))
    picture = _render_background(scene.background, x, y, n)
    for shape in scene.shapes:
        rows, columns = (
            slice(*np.searchsorted(axis, [middle - shape.radius - 0.05, middle + shape.radius + 0.07]))
            for axis, middle in ((y, shape.y), (x, shape.x))
        )
        _paint_shape(picture[rows, columns], shape, x[columns], y[rows], n)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _render_background(background: Background, x: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """Return the background (h, w, 3)."""
    across, down = math.cos(background.direction), math.sin(background.direction)
    extent = abs(across) * len(x) / n + abs(down) * len(y) / n
    t = 0.5 + np.add.outer(y * (down / extent), x * (across / extent))
    start, end = (np.array(colour, np.float32) for colour in (background.start, background.end))
    light = _render_texture(background.texture, x, y, n)
    for texture in background.mottle:
        light += _render_texture(texture, x, y, n)
    return t[..., None] * (end - start) + (start + light[..., None])


def _paint_shape(picture: np.ndarray, shape: Shape, x: np.ndarray, y: np.ndarray, n: int) -> None:
    """Paint shadow, body and rim of a shape, in place."""
    colour = np.array(COLOURS[shape.colour], np.float32) / 255
    picture *= 1 - 0.3 * (0.5 - _signed_distance(shape, x, y - SHADOW_OFFSET) / 0.04).clip(0, 1)[..., None]
    d = _signed_distance(shape, x, y) * n  # in pixels: what is within half a pixel of the outline is covered in part
    body, rim = (0.5 - d).clip(0, 1), (0.5 + d + RIM_WIDTH * n).clip(0, 1)
    light = _render_texture(shape.texture, x, y, n) - (0.08 / shape.radius) * (y - shape.y)[:, None]
    light += rim * (0.25 if shape.colour == "black" else -0.25)
    picture += body[..., None] * (colour + light[..., None] - picture)


def _signed_distance(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return d at every (y, x)."""
    c, s = math.cos(shape.rotation) / shape.radius, math.sin(shape.rotation) / shape.radius
    x, y = x - np.float32(shape.x), y - np.float32(shape.y)
    return shape.radius * SIGNED_DISTANCES[shape.kind](np.add.outer(y * s, x * c), np.add.outer(y * c, -x * s))


def _render_texture(texture: Texture, x: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """Return plane waves at equal angles and their harmonics, (h, w); frequencies beyond n pixels are left out."""
    count = PATTERNS.index(texture.pattern) + 1
    total = np.zeros((len(y), len(x)), np.float32)
    for harmonic, share in ((1, 0.6), (2, 0.4)):
        frequency = harmonic * texture.frequency
        carried = min(max((n / 2 / frequency - 1) / 0.12, 0), 1)
        if carried == 0:
            continue
        for i in range(count):
            angle = texture.angle + i * math.pi / count
            across = 2 * math.pi * (frequency * math.cos(angle) * x + texture.phase)
            down = 2 * math.pi * frequency * math.sin(angle) * y
            # cos(a + b) = cos a cos b - sin a sin b: two outer products
            wave = np.outer(np.cos(down), np.cos(across)) - np.outer(np.sin(down), np.sin(across))
            total += (texture.strength * share * carried / math.sqrt(count)) * wave
    return total
