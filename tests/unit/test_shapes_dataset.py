"""The procedural data set: what its scenes promise; and the checker: that it reads them, and notices what is wrong."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from helpers.run_factory import QUIET_CONSOLE, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gesso import config, recipes, sample_files
from gesso.config import DataConfig
from gesso.data import crops, shapes_dataset
from gesso.data.factory import open_dataset
from gesso.data.shapes_dataset import (
    COLOURS,
    KINDS,
    RELATIONS,
    SIDES,
    Facts,
    mirror_facts,
    parse_caption,
    render_scene,
    scene_caption,
    scene_facts,
)
from gesso.errors import UsageError
from gesso.evaluation import results
from gesso.evaluation.metrics.per_image import match_rates
from gesso.evaluation.networks import shapes_reader as checker
from gesso.evaluation.networks import toy_networks
from gesso.evaluation.networks.base import SampleConditions
from gesso.evaluation.runner import evaluate_run
from gesso.report import write_report
from gesso.training.run_folder import start_training

INDEX = st.integers(0, 2**63 - 1)


def prepared(scene: shapes_dataset.Scene, resolution: int) -> np.ndarray:
    """As an image of a folder is read: shorter edge resized with Lanczos, centre cropped. (3, R, R) uint8."""
    return crops.crop_resize(
        Image.fromarray(render_scene(scene)), crops.center_view(scene.height, scene.width), resolution, resolution
    )


def pictures(scenes: list[shapes_dataset.Scene], resolution: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([prepared(scene, resolution) for scene in scenes]))


# The scenes


@settings(max_examples=20, deadline=None)
@given(index=INDEX, seed=st.integers(0, 2**64 - 1))
def test_a_scene_is_a_function_of_seed_and_index(index, seed):
    scene = shapes_dataset.sample_scene(index, seed)
    others = shapes_dataset.sample_scenes([3, index, index ^ 1], seed)
    assert (
        others[1] == scene and others[0] != scene != others[2] and shapes_dataset.sample_scene(index, seed ^ 1) != scene
    )
    pixels = render_scene(scene)
    render_scene(others[0])
    assert render_scene(others[1]).tobytes() == pixels.tobytes()


def test_facts_are_the_same_on_every_machine():
    assert [f"{scene_caption(s)}, {s.height}x{s.width}" for s in shapes_dataset.sample_scenes(range(6))] == FIRST


FIRST = [
    "at the bottom, a red star, 145x218",
    "a yellow ring in the middle, 166x249",
    "to the right of a yellow ring there is a white cross, 87x65",
    "there is a green ring on the left of the picture, 222x222",
    "a yellow ring on the left, 66x99",
    "there is a black circle at the bottom of the picture, 143x107",
]


@settings(max_examples=200, deadline=None)
@given(index=INDEX)
def test_ranges(index):
    scene = shapes_dataset.sample_scene(index)
    assert min(scene.height, scene.width) >= 48 and max(scene.height, scene.width) <= 256
    assert (
        min(abs(scene.width * h - scene.height * w) / h for w, h in shapes_dataset.ASPECT_RATIOS) <= 0.5
    )  # a whole pixel, rounded
    for shape in scene.shapes:
        assert max(abs(shape.x), abs(shape.y)) + shape.radius <= 0.45 + 1e-9 and 0.16 <= shape.radius <= 0.24
    x, y = scene.shapes[0].x, scene.shapes[0].y
    if len(scene.shapes) == 2:
        first, second = scene.shapes
        assert (first.kind, first.colour) != (second.kind, second.colour)
        x, y = x - second.x, y - second.y
        assert math.hypot(x, y) > first.radius + second.radius + 0.04
    along, across = sorted((abs(x), abs(y)), reverse=True)
    if scene.place == "middle":
        assert along <= 0.04
    else:
        toward = {"left": -x, "right": x, "top": -y, "above": -y, "bottom": y, "below": y}[scene.place]
        assert toward == along
        assert across <= 0.35 * along + 1e-9 if len(scene.shapes) == 2 else along >= 0.13 and across <= 0.04
    ground = np.array([scene.background.start, scene.background.end])
    assert ground.min() > 0.3 and ground.max() < 0.81 and np.ptp(ground, axis=1).max() < 0.18


@settings(max_examples=200, deadline=None)
@given(index=INDEX)
def test_captions_parse_back(index):
    scene = shapes_dataset.sample_scene(index)
    for wording in range(3):
        output = scene_caption(replace(scene, wording=wording))
        assert parse_caption(output) == scene_facts(scene) and len(output.split()) <= 12
        assert parse_caption(output.upper() + ".") == scene_facts(scene)


@pytest.mark.parametrize(
    "output, pairs, place",
    [
        ("a blue cross", [("cross", "blue")], None),
        ("A photograph of one red circle, on the right", [("circle", "red")], "right"),
        ("black ring and white star", [("ring", "black"), ("star", "white")], None),
        ("black ring left of white star", [("ring", "black"), ("star", "white")], "left"),
        ("above the black ring, a white star", [("star", "white"), ("ring", "black")], "above"),
        ("a black ring and a white star below it", [("star", "white"), ("ring", "black")], "below"),
    ],
)
def test_captions_of_others(output, pairs, place):
    assert parse_caption(output) == Facts(tuple(pairs), place)


@pytest.mark.parametrize(
    "output",
    ["", "a red dog", "an orange circle", "a red circle above", "a red star, a blue star and a red ring",
    "a circle, red",
     "a red circle at the top left", "a red circle and a red ring at the bottom"],
)  # fmt: skip
def test_captions_that_claim_nothing_certain(output):
    with pytest.raises(UsageError, match="it would read like"):
        parse_caption(output)


def test_mirrored():
    pair = (("circle", "red"), ("star", "blue"))
    for place, other in (("left", "right"), ("right", "left"), ("above", "above"), (None, None)):
        assert mirror_facts(Facts(pair, place)) == Facts(pair, other)


def test_single_scenes_for_classes():
    both, single = shapes_dataset.sample_scenes(range(300)), shapes_dataset.sample_scenes(range(300), single=True)
    for a, b in zip(both, single, strict=True):
        assert len(b.shapes) == 1 and b.place in SIDES
        assert shapes_dataset.scene_label(a) == shapes_dataset.scene_label(b) == KINDS.index(b.shapes[0].kind)
        assert a == b if len(a.shapes) == 1 else a.background == b.background


def test_distribution():
    """Counts of 2000 scenes are within 4 standard deviations of the binomial: by chance, 1 in 250 tests of 60 fails."""
    scenes = shapes_dataset.sample_scenes(range(2000))
    pairs = [scene for scene in scenes if len(scene.shapes) == 2]
    alone = [scene for scene in scenes if len(scene.shapes) == 1]

    def near(values, expected: dict):
        values = list(values)
        counts, n = Counter(values), len(values)
        assert counts.keys() == expected.keys()
        for value, p in expected.items():
            assert abs(counts[value] - n * p) < 4 * math.sqrt(n * p * (1 - p)), (value, counts[value], n * p)

    even = lambda choices: dict.fromkeys(choices, 1 / len(choices))  # noqa: E731
    near((len(scene.shapes) for scene in scenes), even((1, 2)))
    for of, number in ((scenes, 0), (pairs, 1)):
        near((scene.shapes[number].kind for scene in of), even(KINDS))
        near((scene.shapes[number].colour for scene in of), even(COLOURS))
    near((scene.shapes[0].colour == scene.shapes[1].colour for scene in pairs), {True: 5 / 47, False: 42 / 47})
    near((scene.place for scene in alone), even(SIDES))
    near((scene.place for scene in pairs), even(RELATIONS))
    near((scene.wording for scene in scenes), even(range(3)))
    ratios = np.array([1, 4 / 3, 3 / 4, 3 / 2, 2 / 3])
    near((ratios[abs(ratios - scene.width / scene.height).argmin()] for scene in scenes), even(ratios.tolist()))
    # Uniform in the logarithm: the median of the squares is near the geometric mean of 48 and 257.
    below = (min(s.height, s.width) < math.sqrt(48 * 257) for s in scenes if s.height == s.width)
    near(below, even((True, False)))


# The pictures


def test_areas_and_reach_of_the_outlines():
    at = (np.arange(1000) + 0.5) / 500 - 1
    areas = {
        "circle": math.pi * 0.88**2,
        "square": 1.4**2,
        "triangle": 0.75 * math.sqrt(3),
        "star": 5 * 0.45 * math.sin(math.pi / 5),
        "ring": math.pi * (0.94**2 - 0.54**2),
        "cross": 2 * 1.84 * 0.6 - 0.6**2,
    }
    for kind, area in areas.items():
        inside = shapes_dataset.SIGNED_DISTANCES[kind](at, at[:, None]) < 0
        assert 4 * inside.mean() == pytest.approx(area, rel=2e-3), kind
        assert not inside[np.hypot(at, at[:, None]) > 1].any()  # `radius` holds it whole
        # the centre of mass is the shape's centre
        assert abs((inside * at).mean()) < 1e-3 and abs((inside * at[:, None]).mean()) < 1e-3, kind


def plain(scene: shapes_dataset.Scene) -> shapes_dataset.Scene:
    return replace(scene, shapes=())


def test_shapes_stay_in_the_centred_square():
    """What a shape and its shadow change is inside, and is there."""
    for scene in shapes_dataset.sample_scenes(range(100)):
        changed = (render_scene(scene) != render_scene(plain(scene))).any(2)
        n, (h, w) = min(scene.height, scene.width), changed.shape
        assert changed.shape == (scene.height, scene.width)
        rows, columns = np.nonzero(changed)
        assert (abs(rows + 0.5 - h / 2) < n / 2).all() and (abs(columns + 0.5 - w / 2) < n / 2).all()
        for shape in scene.shapes:
            near = np.hypot((columns + 0.5 - w / 2) / n - shape.x, (rows + 0.5 - h / 2) / n - shape.y) < shape.radius
            assert near.sum() > 1.2 * shape.radius**2 * n * n


def test_a_mirrored_scene_is_the_mirrored_picture():
    """Nothing else in a picture tells left from right: a flipped scene is as likely as the scene, and looks flipped."""

    def texture(t: shapes_dataset.Texture) -> shapes_dataset.Texture:
        waves = shapes_dataset.PATTERNS.index(t.pattern) + 1
        return replace(t, angle=math.pi - t.angle - (waves - 1) * math.pi / waves)

    for scene in shapes_dataset.sample_scenes(range(30)):
        b = scene.background
        flipped = replace(
            scene,
            shapes=tuple(replace(s, x=-s.x, rotation=-s.rotation, texture=texture(s.texture)) for s in scene.shapes),
            background=replace(
                b, direction=math.pi - b.direction, mottle=tuple(map(texture, b.mottle)), texture=texture(b.texture)
            ),
        )
        difference = render_scene(flipped).astype(int) - render_scene(scene)[:, ::-1]
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # rounding


def high(pixels: np.ndarray) -> float:
    """Energy above 24 cycles per edge of (3, R, R) pixels, mean square."""
    R = pixels.shape[1]
    spectrum = np.fft.fft2(pixels / 255.0) / R**2
    f = np.fft.fftfreq(R, 1 / R)
    return float((abs(spectrum) ** 2)[:, np.hypot(f, f[:, None]) > 24].sum())


def test_small_originals_lack_detail():
    """Of the energy above 24 cycles at 128x128, an original of 48 pixels has less than an eighth of that of 256."""
    for scene in shapes_dataset.sample_scenes(range(40)):
        small, large = (high(prepared(replace(scene, height=n, width=n), 128)) for n in (48, 256))
        assert small < large / 8


@pytest.mark.parametrize("size, waves, harmonics", [(48, False, False), (64, True, False), (128, True, True)])
def test_which_original_shows_which_waves(size, waves, harmonics):
    """The spectrum of the ground at its two frequencies, against the strength that they are drawn with."""
    for scene in shapes_dataset.sample_scenes(range(30)):
        t = replace(scene.background.texture, angle=0.3, phase=0.1, frequency=26.0, pattern="stripes")
        background = replace(scene.background, texture=t, mottle=(), end=scene.background.start)
        pixels = render_scene(plain(replace(scene, height=size, width=size, background=background))) / 255.0
        at = (np.arange(size) + 0.5) / size - 0.5
        window = np.hanning(size + 1)[:-1]
        window = window[:, None] * window / (window[:, None] * window).sum()
        for harmonic, share, shown in ((1, 0.6, waves), (2, 0.4, harmonics)):
            k = 2j * math.pi * 26 * harmonic
            wave = np.exp(k * (math.cos(0.3) * at + math.sin(0.3) * at[:, None]))
            amplitude = 2 * abs((pixels[:, :, 0] * window * wave).sum())
            assert amplitude == pytest.approx(shown * share * t.strength, abs=1e-3 + 0.02 * t.strength)


# The checker


def caption_accuracy(images: torch.Tensor, captions: list[str]) -> dict[str, float]:
    matches = toy_networks.ShapeMatch().extract_features(images, SampleConditions(None, captions))
    return match_rates(matches, toy_networks.CAPTION_CHECKS)


def class_accuracy(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    matches = toy_networks.ShapeMatch().extract_features(images, SampleConditions(labels.tolist()))
    return match_rates(matches, toy_networks.CLASS_CHECKS)


@pytest.fixture(scope="module")
def scenes():
    return shapes_dataset.sample_scenes(range(1000, 1200))


def small_ones(scenes):
    return [replace(scene, height=48, width=(48, 64, 72)[i % 3]) for i, scene in enumerate(scenes)]


def noisy(images: torch.Tensor, std: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + std * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("resolution", [32, 64, 128])
@pytest.mark.parametrize("std", [0, 8])
def test_real_samples_are_read(scenes, resolution, std):
    """Of 4000 scenes none is misread at any of these; 99% is asked for here."""
    captions = [scene_caption(scene) for scene in scenes]
    rates = caption_accuracy(noisy(pictures(scenes, resolution), std), captions)
    assert all(rates[name] >= 0.99 for name in ("colour", "kind", "pair", "place", "all")), rates
    assert rates["flipped"] == rates["border"] == 0 and 0.3 < rates["sided"] < 0.6


def test_originals_of_48_pixels_are_read(scenes):
    some = small_ones(scenes)[:150]
    assert caption_accuracy(pictures(some, 64), [scene_caption(scene) for scene in some])["all"] >= 0.99


def test_blurred_and_pale_pictures_are_read(scenes):
    captions, images = [scene_caption(scene) for scene in scenes], pictures(scenes, 64).float()
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    pale = 128 + 0.75 * (images - 128)
    for changed in (blurred, pale):
        assert caption_accuracy(changed.round().to(torch.uint8), captions)["all"] >= 0.98


def test_detected_shapes_are_where_they_were_drawn(scenes):
    """At native sizes, without a crop; within 0.04 of the shorter edge, the shadow counting for a part of it."""
    for scene in scenes[:60]:
        actual = checker.detect_shapes(torch.from_numpy(render_scene(scene)).permute(2, 0, 1)[None])[0]
        assert len(actual) == len(scene.shapes)
        for shape in scene.shapes:
            near = min(actual, key=lambda f: math.hypot(f.x - shape.x, f.y - shape.y))
            assert math.hypot(near.x - shape.x, near.y - shape.y) < 0.04
            assert (near.kind, near.colour) == (shape.kind, shape.colour) and not near.touches_border
            area = 4 * (shapes_dataset.SIGNED_DISTANCES[shape.kind](AT, AT[:, None]) < 0).mean() * shape.radius**2
            assert near.area == pytest.approx(area, rel=0.3)  # rims darken edges, which moves the half-way line


AT = (np.arange(200) + 0.5) / 100 - 1


def wrong_caption(scene: shapes_dataset.Scene, **change) -> str:
    """The caption of the scene with its first shape changed."""
    return scene_caption(replace(scene, shapes=(replace(scene.shapes[0], **change), *scene.shapes[1:])))


def test_flips_exchange_left_and_right(scenes):
    images = pictures(scenes, 64).flip(3)
    rates = caption_accuracy(images, [scene_caption(scene) for scene in scenes])
    assert rates["flipped"] >= 0.99 and rates["pair"] >= 0.99
    assert rates["place"] == pytest.approx(1 - rates["sided"], abs=0.01)
    others = [scene_caption(replace(scene, place=mirror_facts(scene_facts(scene)).place)) for scene in scenes]
    turned = caption_accuracy(images, others)
    assert turned["all"] >= 0.99 and turned["flipped"] == 0


def test_a_wrong_caption_is_not_agreed_with(scenes):
    images = pictures(scenes, 64)
    unused = lambda used, names: next(name for name in names if name not in used)  # noqa: E731
    wrong = {
        "colour": [wrong_caption(s, colour=unused([x.colour for x in s.shapes], COLOURS)) for s in scenes],
        "kind": [wrong_caption(s, kind=unused([x.kind for x in s.shapes], KINDS)) for s in scenes],
        "place": [scene_caption(replace(s, place=WRONG[len(s.shapes), s.place])) for s in scenes],
    }
    for name, captions in wrong.items():
        rates = caption_accuracy(images, captions)
        assert rates[name] <= 0.01 and rates["all"] <= 0.01, (name, rates)
        for other in {"colour", "kind", "place"} - {name}:
            # A shape of the second's kind, or colour, is mistaken for it, and with it the place.
            assert rates[other] > (0.85 if other == "place" else 0.99), (name, rates)
        ones = sum(len(s.shapes) == 1 for s in scenes) / len(scenes)
        assert rates["place"] == pytest.approx(ones * rates["side"] + (1 - ones) * rates["relation"])
    shifted = caption_accuracy(images, [scene_caption(s) for s in scenes[1:] + scenes[:1]])
    assert shifted["all"] < 0.05


WRONG = {
    (1, "left"): "top", (1, "top"): "right", (1, "right"): "middle", (1, "middle"): "bottom", (1, "bottom"): "left",
    (2, "left"): "above", (2, "above"): "right", (2, "right"): "below", (2, "below"): "left",
}  # fmt: skip


def test_colours_on_the_other_kind_are_no_agreement(scenes):
    """Binding: all colours and kinds are there, but exchanged."""
    two = [s for s in scenes if len(s.shapes) == 2 and len({x.kind for x in s.shapes}) == 2]
    two = [s for s in two if len({x.colour for x in s.shapes}) == 2]
    a, b = (lambda s: s.shapes[0]), (lambda s: s.shapes[1])
    exchanged = [
        scene_caption(replace(s, shapes=(replace(a(s), colour=b(s).colour), replace(b(s), colour=a(s).colour))))
        for s in two
    ]
    rates = caption_accuracy(pictures(two, 64), exchanged)
    assert rates["colour"] >= 0.99 and rates["kind"] >= 0.99 and rates["pair"] == rates["all"] == 0


def test_one_shape_too_many_or_too_few(scenes):
    two = [scene for scene in scenes if len(scene.shapes) == 2]
    images = pictures(two, 64)
    first = [f"a {scene.shapes[0].colour} {scene.shapes[0].kind}" for scene in two]
    rates = caption_accuracy(images, first)
    assert rates["pair"] >= 0.99 and rates["all"] == 0
    one = [replace(scene, shapes=scene.shapes[:1]) for scene in two]
    rates = caption_accuracy(pictures(one, 64), [scene_caption(scene) for scene in two])
    assert rates["pair"] == rates["place"] == rates["all"] == 0


def test_crop_damage_is_seen(scenes):
    """A square cut off through the middle of the shape: it touches the border, whichever that is."""
    alone = [scene for scene in scenes if len(scene.shapes) == 1]
    images = pictures(alone, 128)
    for turn in range(4):
        parts = []
        for scene, image in zip(alone, images, strict=True):
            x, y = scene.shapes[0].x, scene.shapes[0].y
            for _ in range(turn):
                x, y = y, -x
            left, top = round((x + 0.5) * 128), round(min(max(y * 128, -32), 32) + 32)
            # to the right of its centre, 64 wide where there is so much
            part = torch.rot90(image, turn, (1, 2))[:, top : top + 64, max(left, 0) : left + 64]
            parts.append(torch.nn.functional.interpolate(part[None].float(), (64, 64), mode="bilinear")[0])
        cut = checker.detect_shapes(torch.stack(parts).round().to(torch.uint8))
        # the half of a ring is the worst: its two ends lie on the border
        assert sum(any(actual.touches_border for actual in shapes_) for shapes_ in cut) >= 0.97 * len(cut)


def test_components_equal_scipy():
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 3, (6, 20, 31))
    spiral = np.zeros((1, 20, 31), int)
    y, x = np.mgrid[:20, :31]
    spiral[0] = (np.hypot(x - 15, (y - 10) * 1.5) / 3 - np.arctan2(y - 10, x - 15) / (2 * math.pi)) % 1 < 0.5
    for labels in (*coarse, *spiral):
        names = checker._connected_components(torch.from_numpy(labels)[None], background_index=0)[0].numpy()
        assert ((names == -1) == (labels == 0)).all()
        for colour in range(1, labels.max() + 1):
            reference, count = scipy.ndimage.label(labels == colour)
            pairs = set(zip(reference[labels == colour].tolist(), names[labels == colour].tolist(), strict=True))
            assert len(pairs) == count == len({name for _, name in pairs})


def test_the_ground_is_the_plane_under_the_shapes():
    y, x = torch.meshgrid(torch.linspace(-0.5, 0.5, 64), torch.linspace(-0.5, 0.5, 64), indexing="ij")
    plane = torch.stack([0.5 + 0.1 * x, 0.55 - 0.08 * y, 0.5 + 0.03 * x + 0.05 * y])
    picture = plane.clone()
    picture[:, 10:40, 5:30] = torch.tensor([0.85, 0.15, 0.2])[:, None, None]
    assert (checker._fit_background(picture[None])[0] - plane).abs().max() < 1e-4


def test_pictures_without_shapes():
    grey = torch.full((2, 3, 24, 32), 130, dtype=torch.uint8)
    assert checker.detect_shapes(grey) == [[], []] and checker.detect_shapes(grey[:0]) == []
    rates = caption_accuracy(grey, ["a red star on the left", "a red star"])
    assert set(rates.values()) == {0, 0.5} and rates["sided"] == 0.5
    everywhere = torch.tensor(COLOURS["red"], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    assert [(actual.colour, actual.touches_border) for actual in checker.detect_shapes(everywhere)[0]] == [
        ("red", True)
    ]


def test_who_is_spoken_of():
    def actual(kind, colour, x):
        return checker.DetectedShape(kind, colour, x, 0.0, 0.1, False)

    claim = Facts((("circle", "red"), ("star", "red")), "left")
    circle, star = actual("circle", "red", -0.2), actual("star", "red", 0.2)
    assert (
        checker.match_shapes(claim, [star, circle]) == (circle, star)
        and checker.describe_position((circle, star)) == "left"
    )
    assert checker.match_shapes(claim, [circle, actual("circle", "red", 0.2)]) is None  # either could be the star
    assert checker.match_shapes(claim, [circle]) is None
    assert checker.match_shapes(claim, [circle, actual("ring", "blue", 0.2)]) is None
    third = actual("star", "blue", 0.0)
    assert checker.match_shapes(claim, [third, star, circle]) == (circle, star)


def test_what_cannot_be_read():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for wrong in (image.float(), image[0], image[:, :1], image[:, :, :8]):
        with pytest.raises(UsageError, match="uint8 images"):
            checker.detect_shapes(wrong)


# From the recipe to the report.


@pytest.mark.parametrize("recipe", ["shapes", "shapes-class"])
def test_a_run_from_training_to_report(recipe, tmp_path):
    run = small_run(recipe, **{"train.total_images": 32})
    start_training(run, tmp_path, False, QUIET_CONSOLE, print)
    run = config.load_config(tmp_path / "run.yaml")
    assert run.data.num_images == 64 and run.data.class_names == KINDS and run.data.example_captions
    lines = evaluate_run(tmp_path, run, lambda done, total: None)
    assert "all" in lines[0].split() and [line.split()[0] for line in lines[1:4]] == [
        "guidance",
        "guidance",
        "training",
    ]
    guided, unguided = results.read_evaluations(tmp_path).values()
    assert (guided.protocol["series"], unguided.protocol["series"]) == ("guided", "unguided")
    assert guided.protocol["toy_metrics"] == "shapes" and guided.protocol["num_samples"] == 32
    assert guided.reference_metrics["all"] == 1 and guided.metrics.keys() == guided.reference_metrics.keys()
    page = write_report(tmp_path).read_text()
    assert "Scores" in page and "training images" in page and "100.0%" in page
    prompt = "a red star to the left of a blue ring"
    requested = sample_files.SampleArgs(prompts=(prompt,)) if recipe == "shapes" else sample_files.SampleArgs("star")
    assert sample_files.sample_to_folder(tmp_path, run, requested, tmp_path / "made")[-2].startswith("wrote 16 images")


def test_shapes_are_read_at_the_resolution_of_the_run():
    loaded = open_dataset(DataConfig(source="shapes:40", resolution=32))
    assert loaded.pixels.shape == (40, 3, 32, 32) and loaded.original_sizes[:, 0].unique().numel() > 10
    assert caption_accuracy(loaded.pixels, loaded.captions)["all"] == 1
    single = open_dataset(DataConfig(source="shapes-class:40", resolution=32))
    assert class_accuracy(single.pixels, single.labels) == {"kind": 1, "all": 1, "border": 0}
    wrong = class_accuracy(single.pixels, (single.labels + 1) % 6)
    assert wrong["kind"] == wrong["all"] == 0


def test_only_drawings_are_read_back():
    with pytest.raises(
        UsageError, match=r"eval\.toy_metrics=shapes reads the drawings of data\.source=shapes, not digits"
    ):
        recipes.resolve("digits", ["eval.toy_metrics=shapes"])
