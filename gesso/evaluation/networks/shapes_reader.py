"""Reader of drawn shapes: detect the shapes in images of `gesso.data.shapes_dataset`, without learned weights.

The background is fitted by a plane in each channel. Each pixel takes the nearest of the eight colours or the
background, connected pixels of one colour are a shape, and the kind of a shape is that of the most similar template.

Legend: N images, K detected shapes, h w height and width of the working grid, whose shorter edge is GRID_SIZE; T
templates of P pixels. Lengths are in units of the shorter edge, and (0, 0) is the center, as in scenes.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.data.shapes_dataset import COLOURS, KINDS, SIGNED_DISTANCES, Facts, mirror_facts, parse_caption
from gesso.errors import UsageError

GRID_SIZE = 64
MIN_AREA = 0.01
"""Smallest area of a shape, as a share of the centered square; the smallest star has 0.03."""
MIN_OFFSET = 0.085
"""Offset from which a single shape is at a side; scenes have none between 0.04 and 0.13."""
ROTATIONAL_SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "ring": 0, "cross": 4}
"""Order of the rotational symmetry of each kind; 0: symmetric at every angle."""
TEMPLATE_BLURS = (0.04, 0.12, 0.2, 0.28)
"""Standard deviations of the blur of templates, in units of the radius."""
PATCH_SIZE = 24
PATCH_COORDS = ((np.arange(PATCH_SIZE) + 0.5) * (2 / PATCH_SIZE) - 1) * 1.15
"""Coordinates of template pixels along each axis, in units of the root of the area."""


@dataclass(frozen=True)
class DetectedShape:
    """A shape in an image: area in units of the shorter edge squared; a shape that touches the border may be cut."""

    kind: str
    colour: str
    x: float
    y: float
    area: float
    touches_border: bool


def detect_shapes(images: Tensor, chunk_size: int = 256) -> list[list[DetectedShape]]:
    """Return the shapes of each image, the largest first.

    Args:
        images: Images (N, 3, H, W) uint8 of at least 16x16 pixels.
        chunk_size: Number of images that are processed together.

    Raises:
        UsageError: The images have another shape or dtype.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16:
        raise UsageError(
            f"shapes are read from uint8 images (N, 3, H, W) of at least 16x16 pixels; got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    return [shapes for chunk in images.split(chunk_size) if len(chunk) for shapes in _detect_shapes(chunk)]


def _detect_shapes(images: Tensor) -> list[list[DetectedShape]]:
    pixels = _resize_to_grid(images)
    colours = torch.tensor(list(COLOURS.values()), device=images.device) / 255
    background = _fit_background(pixels)
    distances = torch.stack([(pixels - c[:, None, None]).square().sum(1) for c in colours], dim=1)
    to_background = (pixels - background).square().sum(1, keepdim=True)
    nearest = torch.cat([distances, to_background], dim=1).argmin(1)  # (N, h, w), the last index is the background
    components = _connected_components(nearest, len(colours))
    component_ids, counts = components.unique(return_counts=True)
    large = (counts >= MIN_AREA * GRID_SIZE**2) & (component_ids >= 0)
    component_ids, area = component_ids[large], counts[large] / GRID_SIZE**2
    image_index = component_ids // components[0].numel()  # the id of a component is the index of one of its pixels
    colour = nearest.flatten()[component_ids]
    mask = components[image_index] == component_ids[:, None, None]
    foreground = (nearest != len(colours))[image_index]
    weight = _coverage(pixels[image_index], background[image_index], colours[colour], mask, foreground)
    x, y, unit = _moments(weight)
    kinds = _classify_kinds(weight, x, y, unit)
    inner = mask[:, 1:-1, 1:-1].flatten(1).sum(1)
    touches = mask.flatten(1).sum(1) > inner
    shapes: list[list[DetectedShape]] = [[] for _ in range(len(images))]
    columns = (image_index, kinds, colour, x, y, area, touches)
    for i, k, c, *values in zip(*(column.tolist() for column in columns), strict=True):
        shapes[i].append(DetectedShape(KINDS[k], list(COLOURS)[c], *values))
    return [sorted(row, key=lambda shape: -shape.area) for row in shapes]


def _resize_to_grid(images: Tensor) -> Tensor:
    """Return images on the working grid, (N, 3, h, w) float32 in [0, 1], slightly smoothed against noise."""
    factor = GRID_SIZE / min(images.shape[2:])
    size = [round(edge * factor) for edge in images.shape[2:]]
    x = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _pixel_coords(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centers, both (h, w)."""
    h, w = shape
    y, x = ((torch.arange(edge, device=device) + 0.5 - edge / 2) / min(h, w) for edge in (h, w))
    return x.expand(h, w), y[:, None].expand(h, w)


def _fit_background(images: Tensor) -> Tensor:
    """Return the plane through muted pixels, (N, 3, h, w), fitted again without the pixels far from it."""
    x, y = _pixel_coords(images.shape[2:], images.device)
    basis = torch.stack([torch.ones_like(x), x, y]).flatten(1)  # (3, h w)
    values = images.flatten(2)
    lightness, spread = values.mean(1), values.amax(1) - values.amin(1)
    weight = ((lightness - 0.55).abs() < 0.25) & (spread < 0.3)  # (N, h w)
    for _ in range(3):
        weighted = basis * weight[:, None].float()
        # The small ridge keeps an image without background solvable.
        gram = weighted @ basis.T + 1e-2 * torch.eye(3, device=x.device)
        plane = torch.linalg.solve(gram, weighted @ values.transpose(1, 2))  # (N, 3 terms, 3 channels)
        background = (basis.T @ plane).transpose(1, 2)
        weight = (values - background).square().sum(1) < 0.15**2
    return background.unflatten(2, images.shape[2:])


def _connected_components(nearest: Tensor, background_index: int) -> Tensor:
    """Return the id of each pixel's component of one colour, (N, h, w) int64; -1 on the background.

    The id is the largest index among the pixels of the component.
    """
    ids = torch.arange(nearest.numel(), device=nearest.device).view_as(nearest).clone()
    neighbours = [(nearest[:, 1:] == nearest[:, :-1], 1), (nearest[:, :, 1:] == nearest[:, :, :-1], 2)]
    while True:
        before = ids.clone()
        for same, dim in neighbours:
            a, b = ids.narrow(dim, 0, ids.shape[dim] - 1), ids.narrow(dim, 1, ids.shape[dim] - 1)
            higher = torch.maximum(a, b)
            a.copy_(torch.where(same, higher, a))
            b.copy_(torch.where(same, torch.maximum(higher, b), b))
        ids = ids.flatten()[ids]  # the id of a pixel is a pixel of the same component, so that pixel's id is valid too
        if ids.equal(before):
            return ids.where(nearest != background_index, -1)


def _coverage(images: Tensor, background: Tensor, colours: Tensor, mask: Tensor, foreground: Tensor) -> Tensor:
    """Return how much of each pixel a shape covers, (K, h, w): its position from the background (0) to the colour (1).

    Counted are the pixels of the mask (K, h, w) and a margin of 2 pixels outside of other shapes.
    """
    direction = colours[:, :, None, None] - background
    coverage = ((images - background) * direction).sum(1) / direction.square().sum(1)
    margin = F.max_pool2d(mask[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    return coverage.clamp(0, 1) * (margin & (mask | ~foreground))


def _moments(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x and y of the center of mass and the root of the area, (K,) each; independent of the scale of weight."""
    x, y = _pixel_coords(weight.shape[1:], weight.device)
    mass = weight.sum((1, 2))
    area = mass**2 / weight.square().sum((1, 2))
    return (weight * x).sum((1, 2)) / mass, (weight * y).sum((1, 2)) / mass, area.sqrt() / GRID_SIZE


def _classify_kinds(weight: Tensor, x: Tensor, y: Tensor, unit: Tensor) -> Tensor:
    """Return the index in KINDS of the template that correlates most with each shape, (K,).

    Shapes are cropped at unit area around their center, so position, size and contrast have no effect.
    """
    templates, kinds = _templates()
    h, w = weight.shape[1:]
    offsets = unit[:, None] * torch.from_numpy(PATCH_COORDS).to(weight)  # (K, PATCH_SIZE)
    # grid_sample has coordinates from -1 to 1 across each edge.
    columns, rows = (x[:, None] + offsets) * (2 * GRID_SIZE / w), (y[:, None] + offsets) * (2 * GRID_SIZE / h)
    grid = torch.stack(
        [columns[:, None, :].expand(-1, PATCH_SIZE, -1), rows[:, :, None].expand(-1, -1, PATCH_SIZE)], dim=-1
    )
    patches = F.grid_sample(weight[:, None], grid, mode="bilinear", align_corners=False).flatten(1)
    similarity = F.normalize(patches, dim=1) @ templates.to(weight.device).T
    return kinds.to(weight.device)[similarity.argmax(1)]


@functools.cache
def _templates() -> tuple[Tensor, Tensor]:
    """Return templates (T, P) of length 1 and their kinds (T,): every kind at all angles, four blurs and three sizes.

    They are cropped like shapes, at unit area after the blur.
    """
    coords = ((np.arange(160) + 0.5) / 80 - 1) * 2  # across twice the radius
    templates: list[np.ndarray] = []
    kinds: list[int] = []
    for index, (kind, order) in enumerate(ROTATIONAL_SYMMETRY.items()):
        angles = np.arange(0, 2 * math.pi / order, math.pi / 18) if order else np.zeros(1)
        outlines = [_render_outline(kind, angle, coords) for angle in angles]
        for blur, size in itertools.product(TEMPLATE_BLURS, (0.94, 1, 1.06)):
            blurred = _gaussian_weights(coords, coords, blur) @ outlines[0] @ _gaussian_weights(coords, coords, blur).T
            unit = math.sqrt(blurred.sum() ** 2 / (blurred**2).sum()) * (coords[1] - coords[0])
            g = _gaussian_weights(PATCH_COORDS * unit * size, coords, blur)
            templates += [(g @ outline @ g.T).ravel() for outline in outlines]
            kinds += [index] * len(outlines)
    return F.normalize(torch.tensor(np.array(templates), dtype=torch.float32), dim=1), torch.tensor(kinds)


def _render_outline(kind: str, angle: float, coords: np.ndarray) -> np.ndarray:
    """Return 1 inside the outline of radius 1 and 0 outside."""
    c, s, x, y = math.cos(angle), math.sin(angle), coords, coords[:, None]
    return (SIGNED_DISTANCES[kind](x * c + y * s, y * c - x * s) < 0).astype(np.float64)


def _gaussian_weights(output_coords: np.ndarray, input_coords: np.ndarray, std: float) -> np.ndarray:
    """Return weights (outputs, inputs) of a Gaussian average, which blurs and samples in one step."""
    weights = np.exp(-((output_coords[:, None] - input_coords) ** 2) / (2 * std**2))
    return weights / weights.sum(1, keepdims=True)


def describe_position(shapes: Sequence[DetectedShape]) -> str:
    """Return the side of one shape, or the relation of the first of two shapes to the second."""
    if len(shapes) == 1:
        return _describe_direction(shapes[0].x, shapes[0].y, "top", "bottom", MIN_OFFSET)
    first, second = shapes
    return _describe_direction(first.x - second.x, first.y - second.y, "above", "below", 0)


def _describe_direction(x: float, y: float, up: str, down: str, min_offset: float) -> str:
    if max(abs(x), abs(y)) < min_offset:
        return "middle"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return up if y < 0 else down


def match_shapes(facts: Facts, detected: Sequence[DetectedShape]) -> tuple[DetectedShape, ...] | None:
    """Return the detected shapes that best match the facts, in their order; a colour counts more than a kind.

    Returns None if there are too few shapes, if one matches neither colour nor kind, or if two choices match equally.
    """

    def scores(choice: tuple[DetectedShape, ...]) -> list[int]:
        return [
            2 * (shape.colour == colour) + (shape.kind == kind)
            for shape, (kind, colour) in zip(choice, facts.shapes, strict=True)
        ]

    choices = sorted(itertools.permutations(detected, len(facts.shapes)), key=lambda c: -sum(scores(c)))
    if not choices or min(scores(choices[0])) == 0:
        return None
    if len(choices) > 1 and sum(scores(choices[0])) == sum(scores(choices[1])):
        return None
    return choices[0]


def check_caption(caption: str, detected: Sequence[DetectedShape]) -> dict[str, bool | None]:
    """Return checks of an image against its caption; None where the caption makes no such claim.

    colour: every colour of the caption is there. kind: every kind is. pair: every kind is there in its colour. place:
    the shapes are where the caption says. side, relation: place, for captions of one and of two shapes. all: pair and
    place hold, and there are no further shapes. sided: the caption says left or right. flipped: left and right are
    exchanged, for captions that are sided. border: some shape touches the border, and may have been cropped.

    Raises:
        UsageError: The caption does not describe shapes.
    """
    facts = parse_caption(caption)
    applies = {"side": len(facts.shapes) == 1, "relation": len(facts.shapes) == 2}
    applies["flipped"] = facts.place in ("left", "right")
    return {name: value if applies.get(name, True) else None for name, value in _check_facts(facts, detected).items()}


def check_class(label: int, detected: Sequence[DetectedShape]) -> dict[str, bool]:
    """Return checks of an image of one class.

    kind: a shape of the class is there. all: it is the only shape. border: some shape touches the border.
    """
    kind = KINDS[label]
    return {
        "kind": any(f.kind == kind for f in detected),
        "all": [f.kind for f in detected] == [kind],
        "border": any(f.touches_border for f in detected),
    }


def _check_facts(facts: Facts, detected: Sequence[DetectedShape]) -> dict[str, bool]:
    matched = match_shapes(facts, detected)
    position = describe_position(matched) if matched else None
    pairs = [(shape.kind, shape.colour) for shape in detected]
    kinds, colours = ([pair[i] for pair in facts.shapes] for i in (0, 1))
    has_pairs = _contains(pairs, facts.shapes)
    right_place = matched is not None and facts.place in (None, position)
    sided = facts.place in ("left", "right")
    return {
        "colour": _contains([colour for _, colour in pairs], colours),
        "kind": _contains([kind for kind, _ in pairs], kinds),
        "pair": has_pairs,
        "place": right_place,
        "side": right_place,
        "relation": right_place,
        "all": has_pairs and right_place and len(detected) == len(facts.shapes),
        "sided": sided,
        "flipped": sided and position == mirror_facts(facts).place,
        "border": any(shape.touches_border for shape in detected),
    }


def _contains(items: Sequence, required: Sequence) -> bool:
    """Return True if items contain each required item as often as it is required."""
    return not Counter(required) - Counter(items)
