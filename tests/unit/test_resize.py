"""Filters of data.resize beside the code that published them, and on every way from a file to pixels."""

import hashlib
import io

import numpy as np
import pytest
import torch
from helpers.images import portrait
from helpers.run_factory import tiny_run
from PIL import Image
from rich.console import Console

from gesso import config, recipes
from gesso.config import DataConfig, EvalConfig
from gesso.data import crops
from gesso.data.cache import write
from gesso.data.cache.plan import CachePlan, parse_cache_args
from gesso.data.cache.read import CachedDataset
from gesso.data.factory import open_dataset
from gesso.data.in_memory import load_in_memory
from gesso.data.on_the_fly import OnTheFlyDataset
from gesso.data.sources import open_source
from gesso.diffusion import process
from gesso.errors import UsageError
from gesso.evaluation import runner
from gesso.evaluation.image_sets import open_image_set
from gesso.recipes import data_requirements
from gesso.training.run_folder import _apply_dataset_settings


def formula(height: int, width: int) -> np.ndarray:
    """A picture of edges, slopes and noise in whole numbers: (height, width, 3) uint8."""
    y, x, c = np.mgrid[:height, :width, :3]
    return np.uint8((3 * abs((x * (3 + c) + 2 * y) % 510 - 255) + (37 * x + 101 * y + 53 * c + 7 * x * y) % 256) // 4)


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


# SHA-256 of (3, H, W) uint8, computed by the published code with Pillow 13: guided-diffusion's center_crop_arr at 64
# (EDM2's center_crop_imagenet and DiT's center_crop_arr give the same), and clean-fid's
# make_resizer("PIL", False, "bicubic", (80, 48)), whose floats are then rounded.
PUBLISHED = {
    (375, 500): ("154af08a5cd0ea76", "18dc4354120b8061"),
    (500, 333): ("f15ce48ff63c9a57", "23f6b276c0ef275f"),
    (64, 64): ("14495d1361d3c60c", "7a82f46c3af521b9"),
    (129, 128): ("6eb7c29b79b3626a", "eb339079af03af9c"),
    (333, 64): ("1270ab2f3584bfd3", "f51d6ab7ed4c4958"),
    (70, 91): ("e904273aede43c69", "2e685bf3c7bbc87a"),
    (1000, 257): ("b79c5976e7687f69", "909b0665db31a69a"),
    (50, 40): ("949237dfc6095e48", "86d923d70f4c1edf"),
    (255, 511): ("75fe5ffc978c7989", "9eed0d245c3fd800"),
    (768, 1023): ("3f770cf428bca522", "f8b3ad08b2b08100"),
}
# The same of ADM's random_crop_arr: shorter edge of the resized picture, first row and column of the crop.
RANDOM = {
    (375, 500): (80, 3, 7, "e95054332a928d16"),
    (500, 333): (72, 30, 5, "36864e1b7e7d8971"),
    (200, 190): (65, 0, 1, "417a20e6d2494bcc"),
    (700, 900): (64, 0, 5, "32b84266cc7ba526"),
}
FULL_CROP = crops.View(0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("size", PUBLISHED)
def test_filters_are_the_published_ones(size):
    picture, (adm, bicubic) = Image.fromarray(formula(*size)), PUBLISHED[size]
    assert digest(crops.crop_resize(picture, crops.center_view(*size), 64, 64, "adm")) == adm
    assert digest(crops.crop_resize(picture, FULL_CROP, 48, 80, "bicubic")) == bicubic


@pytest.mark.parametrize("size", RANDOM)
def test_boxes_under_adm_are_its_random_crops(size):
    """A box of share s of the largest square is cut out of the picture whose shorter edge is 64 / s."""
    edge, top, left, expected = RANDOM[size]
    height, width = (round(n * edge / min(size)) for n in size)
    h, w = (64 / edge * min(size) / n for n in size)
    low, start = top / max(height - 64, 1) * (1 - h), left / max(width - 64, 1) * (1 - w)
    view = crops.View(low, start, low + h, start + w)
    assert digest(crops.crop_resize(Image.fromarray(formula(*size)), view, 64, 64, "adm")) == expected


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.5])
def test_a_box_under_adm_is_met_within_half_a_pixel(aspect):
    """The corners of a crop, read from an image of positions, agree with the box of the control variables."""
    H, W, R = 1021, 901, 32
    height, width = R, round(R * aspect)
    y, x = np.mgrid[:H, :W]
    picture = Image.fromarray(np.stack([y / H * 255, x / W * 255, 0 * x], axis=2).astype(np.uint8))
    data = DataConfig(resolution=R, crop_scale=(0.4, 1.0), flip=True)
    for u in torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).tolist():
        view = crops.random_view(data, H, W, u, width / height)
        pixels = (
            crops.crop_resize(picture, view, height, width, "adm")[:, :, :: -1 if view.flip else 1].astype(float) / 255
        )
        centre = [(view.top + view.bottom) / 2, (view.left + view.right) / 2]
        tolerance = [0.5 * (view.bottom - view.top) / height, 0.5 * (view.right - view.left) / width]
        actual = [float(pixels[0].mean()), float(pixels[1].mean())]
        # 1.5 / 255: pixels are 8 bits, cut down.
        assert all(abs(f - c) <= t + 1.5 / 255 for f, c, t in zip(actual, centre, tolerance, strict=True)), (
            view,
            actual,
        )


def test_a_middle_box_of_any_aspect_begins_where_adm_begins():
    for size, (height, width) in (((300, 500), (32, 64)), ((301, 90), (48, 32)), ((64, 129), (64, 128))):
        image = Image.fromarray(formula(*size))
        scale = max(height / size[0], width / size[1])
        ours = crops.crop_resize(image, crops.center_view(*size, width / height), height, width, "adm")
        while min(image.height / height, image.width / width) >= 2:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(height / image.height, width / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        top, left = (image.height - height) // 2, (image.width - width) // 2
        assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(image)[top : top + height, left : left + width])


def encoded(pixels: np.ndarray, name: str, **settings) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, **settings)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A PNG, a large JPEG that a decoder could reduce, one that EXIF turns, and a transparent PNG."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = np.dstack([formula(90, 120), (formula(90, 120)[:, :, 0] > 100) * 255]).astype(np.uint8)
    for name, content in {
        "0.png": encoded(formula(129, 160), "PNG"),
        "1.jpg": encoded(formula(520, 700), "JPEG", quality=95),
        "2.jpg": encoded(formula(100, 150), "JPEG", exif=exif),
        "3.png": encoded(transparent, "PNG"),
    }.items():
        (tmp_path / "in" / "a" / name).write_bytes(content)
    return tmp_path / "in"


def published(folder) -> torch.Tensor:
    """(n, 3, 32, 32), as the published loaders: decoded by PIL's convert("RGB"), in the order of names."""
    actual = []
    for path in sorted(folder.glob("*/*")):
        image = Image.open(path).convert("RGB")
        actual.append(crops.crop_resize(image, crops.center_view(image.height, image.width), 32, 32, "adm"))
    return torch.from_numpy(np.stack(actual))


def test_every_way_from_a_file_to_pixels_has_the_filter(folder, tmp_path):
    due, index = published(folder), torch.arange(4)
    data = DataConfig(source=str(folder), resolution=32, resize="adm")
    source = open_source(str(folder))
    assert torch.equal(load_in_memory(source, data).pixels, due)
    live = OnTheFlyDataset(source, data)
    assert torch.equal(live.get_unaugmented(index).x, due) and torch.equal(live.get(index, index).x, due)
    write.write_cache(CachePlan(data=data), tmp_path / "out")
    cache = CachedDataset(tmp_path / "out")
    assert torch.equal(cache.get_unaugmented(index).x, due) and cache.manifest.plan.data.resize == "adm"
    assert torch.equal(next(open_image_set(str(folder), 32, resize="adm").batches(4)), due)
    # With a box of its own for each, all of them still agree, and adm decodes a JPEG in full.
    drawn = live.data.model_copy(update={"crop_scale": (0.4, 0.4)})
    x, boxes = (
        OnTheFlyDataset(source, drawn).get(index, index)[0],
        OnTheFlyDataset(source, drawn).get(index, index).crop_boxes,
    )
    jpeg = Image.open(folder / "a" / "1.jpg").convert("RGB")
    assert np.array_equal(x[1].numpy(), crops.crop_resize(jpeg, crops.View(*boxes[1].tolist()), 32, 32, "adm"))
    for other in ("lanczos", "bicubic"):
        assert not torch.equal(load_in_memory(source, data.model_copy(update={"resize": other})).pixels, due)


def test_bicubic_decodes_in_full_and_upright(folder):
    pixels = load_in_memory(
        open_source(str(folder)), DataConfig(source=str(folder), resolution=32, resize="bicubic")
    ).pixels
    image = Image.open(folder / "a" / "1.jpg").convert("RGB")
    assert np.array_equal(pixels[1].numpy(), crops.crop_resize(image, crops.center_view(520, 700), 32, 32, "bicubic"))
    turned = Image.open(folder / "a" / "2.jpg").convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(pixels[2].numpy(), crops.crop_resize(turned, crops.center_view(150, 100), 32, 32, "bicubic"))


def test_a_cache_is_of_one_filter(folder, tmp_path):
    out, source = tmp_path / "out", str(folder)
    plan = parse_cache_args(source, out, {"--resolution": 32, "--resize": "adm"}, [])
    write.write_cache(plan, out)
    with pytest.raises(UsageError, match=r"data\.resize: 'adm' stored, 'lanczos' now.*(?s:.*)--resize adm"):
        write.write_cache(parse_cache_args(source, out, {"--resolution": 32}, []), out)
    with pytest.raises(UsageError, match="resize"):
        parse_cache_args(source, out, {"--resolution": 32, "--resize": "nearest"}, [])
    console, run = Console(file=io.StringIO()), tiny_run().model_copy(update={"eval": EvalConfig()})
    for resize, fits in (("lanczos", True), ("adm", True), ("bicubic", False)):
        run = run.model_copy(update={"data": DataConfig(source=str(out), resolution=32, resize=resize)})
        if fits:
            assert _apply_dataset_settings(run, open_dataset(run.data), console).data.resize == "adm"
        else:
            with pytest.raises(
                UsageError, match="was written with adm: write it again with gesso cache --resize bicubic"
            ):
                _apply_dataset_settings(run, open_dataset(run.data), console)


def test_recipes_of_edm2_prepare_images_as_it_does():
    """ADM's filter; pixels in [-1, 1] with sigma_data .5, not standardized."""
    for name, make in recipes.RECIPES.items():
        run = make()
        if not name.startswith("edm2-"):
            continue
        assert run.data.resize == "adm" and process.build_process(run.process).sigma_data == 0.5, name
        if run.latent.vae:
            assert (
                "--resize adm" in data_requirements.data_requirement(run).command and run.latent.convention == "edm2"
            ), name
        else:
            assert (run.data.mean, run.data.std) == ((0.0,) * 3, (0.5,) * 3), name
    data = config.resolve(config.to_dict(recipes.RECIPES["edm2-img64-s"]()), ["data.source=digits"])[0].data
    assert (data.mean, data.std) == ((0.0,) * 3, (0.5,) * 3)


def test_the_reference_of_a_cache_is_prepared_as_the_cache(tmp_path, monkeypatch):
    """Same filter, and faces blurred where the cache has them blurred; eval.resize overrides the filter alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    (tmp_path / "in").mkdir()
    portrait(200, 240).save(tmp_path / "in" / "a.png")
    run = tiny_run().model_copy(update={"eval": EvalConfig()})
    actual = {}
    for name, blur in (("blurred", True), ("plain", False)):
        out = tmp_path / name
        data = DataConfig(source=str(tmp_path / "in"), resolution=64, resize="adm")
        write.write_cache(CachePlan(data=data, blur_faces=blur), out)
        cached = CachedDataset(out)
        some = run.model_copy(update={"data": data.model_copy(update={"source": str(out)})})
        reference = runner._open_reference(some)
        assert (
            torch.equal(next(reference.batches(1)), cached.get_unaugmented(torch.arange(1)).x)
            and reference.blur_faces == blur
        )
        actual[name] = reference
    assert actual["blurred"].fingerprint != actual["plain"].fingerprint
    assert not torch.equal(*(next(reference.batches(1)) for reference in actual.values()))
    assert actual["plain"].resize_description == "middle square, ADM's"
    other = runner._open_reference(some.model_copy(update={"eval": EvalConfig(resize="bicubic")}))
    assert other.resize == "bicubic" and other.fingerprint != actual["plain"].fingerprint
