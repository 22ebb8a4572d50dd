"""Reading a scene of `gesso.data.shapes_dataset` back from its picture, without learned weights.

The ground is fitted by a plane in each channel; pixels take the nearest of the eight colours or the ground;
connected pixels of one colour are a shape; its kind is that of the nearest of many drawn templates.

Legend: N pictures, K shapes found in them, h w rows and columns of the working grid, whose shorter edge is
GRID; T templates of P pixels. Lengths are in units of the shorter edge, (0, 0) the middle, as in scenes.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.data.shapes_dataset import COLOURS, KINDS, SIGNED_DISTANCES, Facts, mirror_facts, parse_caption
from gesso.errors import UsageError

GRID_SIZE = 64
MIN_AREA = 0.01
"""of the centred square; the smallest star has 0.03"""
MIN_OFFSET = 0.085
"""a single shape is at a side from here on; scenes leave out 0.04 to 0.13"""
ROTATIONAL_SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "ring": 0, "cross": 4}
"""how many times a shape looks the same in a turn; 0: at every angle"""
TEMPLATE_BLURS = (0.04, 0.12, 0.2, 0.28)
"""standard deviations of the templates' blur, in units of the radius"""
PATCH_SIZE = 24
PATCH_COORDS = ((np.arange(PATCH_SIZE) + 0.5) * (2 / PATCH_SIZE) - 1) * 1.15
"""where templates are sampled along each axis, in units of the root of the area"""


@dataclass(frozen=True)
class DetectedShape:
    """A shape in a picture. `area` in units of the shorter edge squared; `touches` the border: it may be cut."""

    kind: str
    colour: str
    x: float
    y: float
    area: float
    touches_border: bool


def detect_shapes(images: Tensor, chunk_size: int = 256) -> list[list[DetectedShape]]:
    """The shapes of each picture, the largest first. Images (N, 3, H, W) uint8, any H and W from 16 on.

    Raises UsageError on other images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16:
        raise UsageError(
            f"shapes are read from uint8 pictures (N, 3, H, W) of 16 pixels and more; got {images.dtype} {tuple(images.shape)}"
        )
    return [found for part in images.split(chunk_size) if len(part) for found in _detect_shapes(part)]


def _detect_shapes(images: Tensor) -> list[list[DetectedShape]]:
    n = len(images)
    pictures = _resize_to_grid(images)
    colours = torch.tensor(list(COLOURS.values()), device=images.device) / 255
    ground = _fit_background(pictures)
    distances = torch.stack([(pictures - c[:, None, None]).square().sum(1) for c in colours], dim=1)
    to_ground = (pictures - ground).square().sum(1, keepdim=True)
    nearest = torch.cat([distances, to_ground], dim=1).argmin(1)  # (N, h, w), the last is the ground
    components = _connected_components(nearest, len(colours))
    names, counts = components.unique(return_counts=True)
    shapes = (counts >= MIN_AREA * GRID_SIZE**2) & (names >= 0)
    names, area = names[shapes], counts[shapes] / GRID_SIZE**2
    whose = names // components[0].numel()  # a component's name is the index of one of its pixels
    colour = nearest.flatten()[names]
    mask = components[whose] == names[:, None, None]
    weight = _coverage(pictures[whose], ground[whose], colours[colour], mask, (nearest != len(colours))[whose])
    x, y, unit = _moments(weight)
    kinds = _classify_kinds(weight, x, y, unit)
    inner = mask[:, 1:-1, 1:-1].flatten(1).sum(1)
    touches = mask.flatten(1).sum(1) > inner
    found: list[list[DetectedShape]] = [[] for _ in range(n)]
    columns = (whose, kinds, colour, x, y, area, touches)
    for i, k, c, *rest in zip(*(column.tolist() for column in columns), strict=True):
        found[i].append(DetectedShape(KINDS[k], list(COLOURS)[c], *rest))
    return [sorted(shapes, key=lambda shape: -shape.area) for shapes in found]


def _resize_to_grid(images: Tensor) -> Tensor:
    """(N, 3, h, w) float32 from 0 to 1, smoothed a little against noise."""
    factor = GRID_SIZE / min(images.shape[2:])
    size = [round(edge * factor) for edge in images.shape[2:]]
    x = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _pixel_coords(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, both (h, w)."""
    h, w = shape
    y, x = ((torch.arange(edge, device=device) + 0.5 - edge / 2) / min(h, w) for edge in (h, w))
    return x.expand(h, w), y[:, None].expand(h, w)


def _fit_background(images: Tensor) -> Tensor:
    """The plane through what is muted, (N, 3, h, w), fitted again without what is far from it."""
    x, y = _pixel_coords(images.shape[2:], images.device)
    basis = torch.stack([torch.ones_like(x), x, y]).flatten(1)  # (3, h w)
    values = images.flatten(2)
    lightness, spread = values.mean(1), values.amax(1) - values.amin(1)
    weight = ((lightness - 0.55).abs() < 0.25) & (spread < 0.3)  # (N, h w)
    for _ in range(3):
        weighted = basis * weight[:, None].float()
        # The small ridge keeps a picture without ground solvable.
        gram = weighted @ basis.T + 1e-2 * torch.eye(3, device=x.device)
        plane = torch.linalg.solve(gram, weighted @ values.transpose(1, 2))  # (N, 3 terms, 3 channels)
        ground = (basis.T @ plane).transpose(1, 2)
        weight = (values - ground).square().sum(1) < 0.15**2
    return ground.unflatten(2, images.shape[2:])


def _connected_components(nearest: Tensor, background_index: int) -> Tensor:
    """Connected pixels of one colour: the largest index of their pixels, (N, h, w) int64, and -1 on the ground."""
    own = torch.arange(nearest.numel(), device=nearest.device).view_as(nearest)
    names = own.clone()
    alike = [(nearest[:, 1:] == nearest[:, :-1], 1), (nearest[:, :, 1:] == nearest[:, :, :-1], 2)]
    while True:
        before = names.clone()
        for same, dim in alike:
            a, b = names.narrow(dim, 0, names.shape[dim] - 1), names.narrow(dim, 1, names.shape[dim] - 1)
            higher = torch.maximum(a, b)
            a.copy_(torch.where(same, higher, a))
            b.copy_(torch.where(same, torch.maximum(higher, b), b))
        names = names.flatten()[names]  # a pixel's name is a pixel of the same component: its name serves too
        if names.equal(before):
            return names.where(nearest != background_index, -1)


def _coverage(images: Tensor, background: Tensor, colours: Tensor, mask: Tensor, foreground: Tensor) -> Tensor:
    """How much of each pixel the shape covers, (K, h, w): its place from the ground 0 to the shape's colour 1.

    `mask` (K, h, w) the shape's pixels; its margin of 2 pixels counts too, where no other shape has `taken` it.
    """
    direction = colours[:, :, None, None] - background
    share = ((images - background) * direction).sum(1) / direction.square().sum(1)
    margin = F.max_pool2d(mask[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    return share.clamp(0, 1) * (margin & (mask | ~foreground))


def _moments(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and y of the centre of mass, and the root of the area, (K,) each: the same when `weight` is multiplied."""
    x, y = _pixel_coords(weight.shape[1:], weight.device)
    mass = weight.sum((1, 2))
    area = mass**2 / weight.square().sum((1, 2))
    return (weight * x).sum((1, 2)) / mass, (weight * y).sum((1, 2)) / mass, area.sqrt() / GRID_SIZE


def _classify_kinds(weight: Tensor, x: Tensor, y: Tensor, unit: Tensor) -> Tensor:
    """Index in KINDS of the template that a shape correlates with most, (K,).

    The shape is cut out at unit area, its centre in the middle: position, size and contrast don't matter.
    """
    templates, kinds = _templates()
    h, w = weight.shape[1:]
    reach = unit[:, None] * torch.from_numpy(PATCH_COORDS).to(weight)  # (K, PATCH)
    # grid_sample counts from -1 to 1 across each edge
    columns, rows = (x[:, None] + reach) * (2 * GRID_SIZE / w), (y[:, None] + reach) * (2 * GRID_SIZE / h)
    grid = torch.stack(
        [columns[:, None, :].expand(-1, PATCH_SIZE, -1), rows[:, :, None].expand(-1, -1, PATCH_SIZE)], dim=-1
    )
    patches = F.grid_sample(weight[:, None], grid, mode="bilinear", align_corners=False).flatten(1)
    likeness = F.normalize(patches, dim=1) @ templates.to(weight.device).T
    return kinds.to(weight.device)[likeness.argmax(1)]


@functools.cache
def _templates() -> tuple[Tensor, Tensor]:
    """Templates (T, P) of length 1 and their kinds (T,): every kind at all angles, more or less blurred, in three sizes.

    They are cut out as shapes are: at unit area after the blur.
    """
    fine = ((np.arange(160) + 0.5) / 80 - 1) * 2  # across twice the radius
    templates, kinds = [], []
    for index, (kind, turns) in enumerate(ROTATIONAL_SYMMETRY.items()):
        angles = np.arange(0, 2 * math.pi / turns, math.pi / 18) if turns else [0.0]
        drawn = [_render_outline(kind, angle, fine) for angle in angles]
        for blur, size in itertools.product(TEMPLATE_BLURS, (0.94, 1, 1.06)):
            whole = _gaussian_weights(fine, fine, blur) @ drawn[0] @ _gaussian_weights(fine, fine, blur).T
            unit = math.sqrt(whole.sum() ** 2 / (whole**2).sum()) * (fine[1] - fine[0])
            g = _gaussian_weights(PATCH_COORDS * unit * size, fine, blur)
            templates += [(g @ inside @ g.T).ravel() for inside in drawn]
            kinds += [index] * len(drawn)
    return F.normalize(torch.tensor(np.array(templates), dtype=torch.float32), dim=1), torch.tensor(kinds)


def _render_outline(kind: str, angle: float, coords: np.ndarray) -> np.ndarray:
    """1 inside the outline of radius 1, 0 outside."""
    c, s, x, y = math.cos(angle), math.sin(angle), coords, coords[:, None]
    return (SIGNED_DISTANCES[kind](x * c + y * s, y * c - x * s) < 0).astype(np.float64)


def _gaussian_weights(to: np.ndarray, at: np.ndarray, std: float) -> np.ndarray:
    """Weights (len(to), len(at)) of a Gaussian average: blur and sampling in one."""
    weights = np.exp(-((to[:, None] - at) ** 2) / (2 * std**2))
    return weights / weights.sum(1, keepdims=True)


def describe_place(shapes: Sequence[DetectedShape]) -> str:
    """The side of one shape, or the relation of the first of two to the second."""
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
    """The found shapes that the claim speaks of, in its order: those that agree best, a colour before a kind.

    None when there are too few, when one agrees in neither, or when two choices agree equally well.
    """

    def marks(choice: tuple[DetectedShape, ...]) -> list[int]:
        return [
            2 * (shape.colour == colour) + (shape.kind == kind)
            for shape, (kind, colour) in zip(choice, facts.shapes, strict=True)
        ]

    choices = sorted(itertools.permutations(detected, len(facts.shapes)), key=lambda c: -sum(marks(c)))
    if not choices or min(marks(choices[0])) == 0:
        return None
    if len(choices) > 1 and sum(marks(choices[0])) == sum(marks(choices[1])):
        return None
    return choices[0]


def caption_accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Rates over pictures (N, 3, H, W) uint8 and what their captions claim, N >= 1.

    colour: every colour of the caption is there; kind: every kind is; pair: every kind is there in its colour;
    place: the shapes that it speaks of stand as it says; side and relation: place, among the captions of one shape and
    among those of two; all: pair and place hold, and there are just as many shapes as it names; flipped: left and right
    are exchanged, among the captions that say one of them (`sided` of all); border: some shape touches the border, and
    may have been cropped. A rate among none is 0.

    Raises UsageError when the numbers differ, and as `read` and `parse` do.
    """
    if len(images) != len(captions) or not captions:
        raise UsageError(f"agreement takes a caption for each picture; got {len(images)} and {len(captions)}")
    rows = [check_caption(caption, found) for caption, found in zip(captions, detect_shapes(images), strict=True)]
    return {name: _rate(row[name] for row in rows) for name in rows[0]}


def check_caption(caption: str, detected: Sequence[DetectedShape]) -> dict[str, bool | None]:
    """What `agreement` counts, of one picture; None where the caption claims nothing of the kind."""
    row = _check_facts(parse_caption(caption), detected)
    among = {"side": "single", "relation": "double", "flipped": "sided"}
    told = {name: holds if row[among.get(name, "always")] else None for name, holds in row.items()}
    return {name: holds for name, holds in told.items() if name not in ("single", "double", "always")}


def _rate(holds: Iterable[bool | None]) -> float:
    values = [value for value in holds if value is not None]
    return sum(values) / len(values) if values else 0.0


def class_accuracy(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Rates over pictures (N, 3, H, W) uint8 that are to show one shape of the kind KINDS[labels], N >= 1.

    kind: a shape of that kind is there; all: it is the only one; border: some shape touches the border.
    """
    rows = [check_class(label, found) for label, found in zip(labels.tolist(), detect_shapes(images), strict=True)]
    return {name: _rate(row[name] for row in rows) for name in rows[0]}


def check_class(label: int, detected: Sequence[DetectedShape]) -> dict[str, bool]:
    """What `class_accuracy` counts, of one picture."""
    kind = KINDS[label]
    return {
        "kind": any(f.kind == kind for f in detected),
        "all": [f.kind for f in detected] == [kind],
        "border": any(f.touches_border for f in detected),
    }


def _check_facts(facts: Facts, detected: Sequence[DetectedShape]) -> dict[str, bool]:
    spoken = match_shapes(facts, detected)
    seen = describe_place(spoken) if spoken else None
    there = [(shape.kind, shape.colour) for shape in detected]
    kinds, colours = ([pair[i] for pair in facts.shapes] for i in (0, 1))
    pair = _contains(there, facts.shapes)
    right_place = spoken is not None and facts.place in (None, seen)
    sided = facts.place in ("left", "right")
    return {
        "colour": _contains([colour for _, colour in there], colours),
        "kind": _contains([kind for kind, _ in there], kinds),
        "pair": pair,
        "place": right_place,
        "side": right_place,
        "relation": right_place,
        "all": pair and right_place and len(detected) == len(facts.shapes),
        "sided": sided,
        "flipped": sided and seen == mirror_facts(facts).place,
        "border": any(shape.touches_border for shape in detected),
        "single": len(facts.shapes) == 1,
        "double": len(facts.shapes) == 2,
        "always": True,
    }


def _contains(items: Sequence, required: Sequence) -> bool:
    """Each as often as it is asked for."""
    return not Counter(required) - Counter(items)
