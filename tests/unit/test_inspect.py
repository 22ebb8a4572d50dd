"""Statistics of sources by brute force, contact sheets whose pixels are the views, and output of `gesso inspect`."""

import io
import json
import math
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
import sklearn.datasets
import torch
from helpers.cli import assert_refused as refused
from helpers.encoders import write_vae
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from gesso import rng
from gesso.config import DataConfig
from gesso.data import contact_sheet, crops, inspect, inspect_tables
from gesso.data.base import SampleBatch
from gesso.data.cache.read import CachedDataset
from gesso.data.inspect_tables import ASPECT_BINS, BAR_WIDTH, evenly_spaced, header_size, scan_source, source_tables
from gesso.data.sources import decode, open_source
from gesso.errors import UnreadableImageError, UsageError

RNG = np.random.default_rng(0)
CHINA = f"{sklearn.datasets.__path__[0]}/images/china.jpg"


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def write_captioned_images(folder, images: dict[str, tuple[object, str]]) -> str:
    """Write a folder with captions.jsonl; an image is a PIL image or bytes."""
    folder.mkdir()
    lines = []
    for name, (image, caption) in images.items():
        image.save(folder / name) if isinstance(image, Image.Image) else (folder / name).write_bytes(image)
        lines.append(json.dumps({"file": name, "text": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(autouse=True)
def temporary_cache_dir(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("lists")))


# Looking.


@given(st.integers(1, 10**7), st.integers(1, 300))
def test_places_are_spread_evenly(total, count):
    places = evenly_spaced(total, count)
    assert len(places) == min(total, count) and places[0] >= 0 and places[-1] < total
    gaps, even = np.diff(places), total / len(places)
    assert all(gap in (math.floor(even), math.ceil(even)) for gap in gaps)
    assert abs(places[0] - (total - 1 - places[-1])) <= 1
    if count >= total:
        assert places.tolist() == list(range(total))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_the_header_says_the_size_that_decoding_gives(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(noise(30, 50), kind, **({"exif": exif.tobytes()} if kind in ("JPEG", "PNG", "WEBP") else {}))
    assert header_size(file) == decode.decode_image(file, 3)[1]
    assert header_size(file) == ((50, 30) if orientation >= 5 and kind in ("JPEG", "PNG", "WEBP") else (30, 50))


def test_a_header_is_enough():
    file = encoded(noise(300, 500), "JPEG")[:2000]
    assert header_size(file) == (300, 500)
    with pytest.raises(UnreadableImageError):
        decode.decode_image(file, 3)
    for damaged in (b"", b"nonsense", file[:10], b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(UnreadableImageError):
            header_size(damaged)
    assert header_size(np.zeros((4, 6, 3), np.uint8)) == (4, 6)
    assert header_size(np.zeros((8, 4, 6), np.float32)) == (4, 6)


def test_looking_decodes_nothing_and_counts_what_is_damaged(tmp_path, monkeypatch):
    where = write_captioned_images(
        tmp_path / "a",
        {
            "a.png": (noise(20, 30), "one"),
            "b.png": (b"nonsense", "two"),
            "c.png": (b"", ""),
            "d.jpg": (encoded(noise(40, 40), "JPEG")[:700], "a b c"),
        },
    )
    monkeypatch.setattr(decode, "decode_image", None)
    scan = scan_source(open_source(where))
    assert scan.original_sizes.tolist() == [[20, 30], [40, 40]] and scan.indices.tolist() == [0, 1, 2, 3]
    assert [name for name, _ in scan.unreadable] == ["b.png", "c.png"] and scan.unreadable[1][1] == "the file is empty"
    assert scan.captions == ["one", "two", "", "a b c"]
    assert scan.encoded_bytes == sum(
        path.stat().st_size for path in (tmp_path / "a").iterdir() if path.suffix != ".jsonl"
    )
    few = scan_source(open_source(where), 2)
    assert few.indices.tolist() == [1, 3] and few.captions == ["two", "a b c"] and len(few.unreadable) == 1


# Numbers.


def table(tables, start: str):
    (actual,) = [one for one in tables if one.title.startswith(start)]
    return actual


@example([(200, 100), (300, 200), (400, 300), (100, 100), (300, 400), (200, 300), (100, 200), (80, 100), (100, 80)])
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=40))
def test_sizes(sizes):
    tables = inspect_tables.size_tables(np.array(sizes))
    for n, edges in enumerate(([h for h, _ in sizes], [w for _, w in sizes], [min(s) for s in sizes])):
        middle = sorted(edges)[(len(edges) - 1) // 2]
        assert table(tables, "pixels").rows[n][1:] == tuple(f"{e:,}" for e in (min(edges), middle, max(edges)))

    def image_name(h: int, w: int) -> str:
        for edge, name in zip((1 / 2, 2 / 3, 4 / 5, 0.95, 1.05, 5 / 4, 3 / 2, 2), ASPECT_BINS, strict=False):
            if w / h < edge or (w / h == edge and edge > 1):
                return name
        return ASPECT_BINS[-1]

    counts = Counter(image_name(h, w) for h, w in sizes)
    assert {name: int(count.replace(",", "")) for name, count, _ in table(tables, "width").rows} == counts
    for resolution, share in next((t.rows for t in tables if t.title.startswith("enlarged")), []):
        assert share == f"{100 * sum(min(s) < int(resolution) for s in sizes) / len(sizes):.1f} %"


def test_bars():
    rows = inspect_tables.bar_rows([("a", 1), ("none", 0), ("b", 500), ("c", 1000)])
    assert [(name, count, len(bar)) for name, count, bar in rows] == [
        ("a", "1", 1), ("b", "500", BAR_WIDTH // 2), ("c", "1,000", BAR_WIDTH)
    ]  # fmt: skip


def test_few_classes_are_all_listed():
    (actual,) = inspect_tables.class_tables(np.array([0, 2, 2, 2]), ("cat", "dog", "hen"))
    assert [row[:2] for row in actual.rows] == [("cat", "1"), ("hen", "3")]
    assert actual.title == "3 classes; 1 without images"
    assert inspect_tables.class_tables(np.zeros(4, np.int64), ()) == []


def test_of_many_classes_the_largest_and_the_smallest():
    labels = np.repeat(np.arange(100), np.arange(100) + 1)
    (actual,) = inspect_tables.class_tables(labels, [f"c{i}" for i in range(100)])
    assert [row[0] for row in actual.rows] == [f"c{i}" for i in (99, 98, 97, 96, 95, 4, 3, 2, 1, 0)]
    assert actual.rows[0][1] == "100" and actual.rows[-1][1] == "1" and "of 50 images" in actual.title


def test_captions():
    recorded = ["a dog", "a dog", "a cat sits", "", "  ", "one two three four five six seven"]
    lengths, shared = inspect_tables.caption_tables(recorded)
    assert lengths.rows == [("2", "2", "2", "7", "7")]
    assert shared.rows == [("empty", "33.3 %"), ("shared by several images", "50.0 %"), ('"a dog"', "2")]
    assert inspect_tables.caption_tables(["", " "]) == []
    assert "are class names" in inspect_tables.caption_tables(["cat", "dog", "cat"], ("cat", "dog"))[0].rows[0][1]


def test_names_cannot_steer_the_terminal():
    assert inspect_tables.truncate("a\x1b[31m\n b\u202e") == "a\\x1b[31m b\\u202e"
    assert len(inspect_tables.truncate("x" * 10**6)) == inspect_tables.MAX_NAME_WIDTH


@given(st.floats(0, 1e16))
def test_bytes(count):
    number, unit = inspect_tables.format_bytes(count).replace(",", "").split()
    factor = 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)
    assert math.isclose(float(number) * factor, count, rel_tol=0.05, abs_tol=0.05)


# Views.


def row(source: str = "shapes:12", i: int = 3, K: int = 5, seed: int = 7, **data: object) -> contact_sheet.SheetRow:
    settings = DataConfig(source=source, resolution=32, **data)
    return inspect.source_row(open_source(source), i, settings, K, seed, lambda x: x)


@pytest.mark.parametrize(
    "data", [{}, {"flip": True}, {"crop_scale": (0.4, 0.6)}, {"flip": True, "crop_scale": (0.4, 1)}]
)
def test_views_are_drawn_as_the_settings_say(data):
    actual, picture = row(**data), Image.fromarray(open_source("shapes:12").read(3))
    assert actual.image == picture and actual.views.original_sizes.tolist() == [[picture.height, picture.width]] * 5
    flips = actual.views.flips.tolist()
    for v in range(5):
        u = rng.uniform(7, torch.tensor([3]), f"view {v}", crops.UNIFORMS_PER_VIEW)[0].tolist()
        view = crops.random_view(DataConfig(resolution=32, **data), picture.height, picture.width, u)._replace(
            flip=flips[v]
        )
        assert np.array_equal(actual.views.x[v].numpy(), crops.crop_resize(picture, view, 32, 32))
        assert actual.views.crop_boxes[v].tolist() == pytest.approx(view[:4])
    assert flips == ([v % 2 == (not flips[0]) for v in range(5)] if "flip" in data else [False] * 5)
    assert actual.title == "image 3" and actual.text.startswith("class ")


@pytest.mark.parametrize("flags", [["--flip"], ["--crop-scale", ".4,.6"], ["--crop-scale", ".4,1", "--flip"]])
def test_views_are_those_that_a_cache_would_hold(gesso, flags, tmp_path):
    views = 2 if flags == ["--flip"] else 3
    assert gesso("cache", "shapes:9", tmp_path / "c", "--resolution", 32, "--views", views, *flags)[0] == 0
    scale = inspect.parse_crop_scale(flags[1]) if "--crop-scale" in flags else None
    requested = inspect.InspectArgs(
        num_rows=4, num_views=views, crop_scale=scale, flip="--flip" in flags, resolution=32
    )
    before, _ = inspect.source_rows(open_source("shapes:9"), np.array([[64, 64]]), requested)
    after, notes = inspect.cache_rows(CachedDataset(tmp_path / "c"), requested)
    assert len(before) == len(after) == 4 and notes == []
    for one, other in zip(before, after, strict=True):
        assert (one.title, one.text) == (other.title, other.text) and other.image is None
        for name in ("x", "original_sizes", "crop_boxes", "flips", "labels", "indices"):
            assert getattr(one.views, name).equal(getattr(other.views, name)), name
        torch.testing.assert_close(one.views.pixel_stats, other.views.pixel_stats, atol=1e-3, rtol=0)


def test_control_values_are_the_network_inputs():
    actual = row(flip=True, crop_scale=(0.4, 0.6))
    columns = actual.views.control_columns()
    for v in range(5):
        output = dict(line.split(" ", 1) for line in contact_sheet.control_lines(actual.views, v) if " " in line)
        top_left, (bottom_right,) = (
            output["crop"],
            [x for x in contact_sheet.control_lines(actual.views, v) if " " not in x],
        )
        crop = [float(edge) for edge in (top_left + bottom_right).split(",")]
        names = ("crop_top", "crop_left", "crop_bottom", "crop_right")
        assert crop == pytest.approx([columns[name][v].item() / 1000 for name in names], abs=6e-4)
        assert output["flip"] == ("yes" if columns["flip"][v] else "no") and output["view"] == str(v)
        assert output["size"] == f"{columns['height'][v]:.0f}x{columns['width'][v]:.0f}"
        assert float(output["aspect"]) == pytest.approx(columns["aspect"][v].item() / 1000, abs=6e-4)
        x = actual.views.x[v].double()
        assert float(output["brightness"]) == pytest.approx(x.mean().item(), abs=0.06)
        assert float(output["contrast"]) == pytest.approx(x.std(correction=0).item(), abs=0.06)


def test_the_sheet_shows_the_views_themselves():
    inner = contact_sheet.VIEW_SIZE - 2 * contact_sheet.FRAME_WIDTH
    settings = DataConfig(resolution=inner, flip=True, crop_scale=(0.4, 0.6))
    rows = [inspect.source_row(open_source("shapes:12"), i, settings, 3, 0, lambda x: x) for i in (0, 5)]
    page = np.asarray(contact_sheet.draw_contact_sheet(rows)).astype(int)
    assert (
        page.shape[1]
        == 3 * contact_sheet.GAP
        + contact_sheet.IMAGE_WIDTH
        + 3 * (contact_sheet.VIEW_SIZE + contact_sheet.TEXT_WIDTH)
        + 2 * contact_sheet.GAP
    )
    for one in rows:
        for v in range(3):
            wanted = one.views.x[v].permute(1, 2, 0).numpy()
            left = (
                2 * contact_sheet.GAP
                + contact_sheet.IMAGE_WIDTH
                + v * (contact_sheet.VIEW_SIZE + contact_sheet.TEXT_WIDTH + contact_sheet.GAP)
                + contact_sheet.FRAME_WIDTH
            )
            column = page[:, left : left + inner]
            tops = [y for y in range(len(page) - inner) if np.array_equal(column[y], wanted[0])]
            assert any(np.array_equal(column[y : y + inner], wanted) for y in tops)


def test_boxes_lie_where_the_views_are():
    actual = row(source="shapes:12", i=0, K=1, crop_scale=(0.4, 0.6))
    strip, (H, W) = np.asarray(contact_sheet._draw_image(actual)).astype(int), actual.views.original_sizes[0].tolist()
    scale = min(contact_sheet.IMAGE_WIDTH / W, contact_sheet.VIEW_SIZE / H)
    ys, xs = np.nonzero((strip == contact_sheet.VIEW_COLOURS[0]).all(-1))
    top, left, bottom, right = actual.views.crop_boxes[0].tolist()
    wanted = [top * H * scale, left * W * scale, bottom * H * scale - 1, right * W * scale - 1]
    assert [ys.min(), xs.min(), ys.max(), xs.max()] == pytest.approx(wanted, abs=1.01)


def test_views_alone_are_put_together_at_their_places():
    """Assembled views of a known image equal the image wherever views are."""
    picture = Image.open(CHINA).resize((216, 144))
    data = DataConfig(resolution=100, flip=True, crop_scale=(0.4, 0.6))
    u = [[0.5, 0.0, 0.0, 0.9], [0.5, 1.0, 1.0, 0.1], [0.5, 0.3, 0.6, 0.1]]
    views = [crops.random_view(data, 144, 216, one) for one in u]
    x = torch.from_numpy(np.stack([crops.crop_resize(picture, view, 100, 100) for view in views]))
    batch = SampleBatch.from_views(x, [(144, 216)] * 3, views, torch.zeros(3), torch.zeros(3))
    full = np.asarray(contact_sheet._assemble_from_views(batch, 216, 144)).astype(float)
    seen = (full != contact_sheet.GREY).any(-1)
    assert [view.flip for view in views] == [False, True, True] and 0.3 < seen.mean() < 0.9
    right = np.abs(full - np.asarray(picture))[seen].mean()
    mirrored = np.abs(
        full - np.asarray(contact_sheet._assemble_from_views(batch._replace(flips=~batch.flips), 216, 144))
    )[seen].mean()
    assert right < 8 < 25 < mirrored


@given(st.text(max_size=40))
def test_whatever_is_written_can_be_drawn(text):
    plain = contact_sheet.to_drawable(text)
    assert all(contact_sheet._has_glyph(sign) for sign in plain)


def test_what_the_font_lacks_is_named():
    assert contact_sheet.to_drawable("plain English, 12 %") == "plain English, 12 %"
    assert contact_sheet.to_drawable("déjà vu – straße") == "deja vu - strasse"
    assert contact_sheet.to_drawable("قصر صيني 🌸🌸") == "[arabic] [cherry blossom]"
    assert contact_sheet.to_drawable("中文 and Ж") == "[cjk] and [cyrillic]"


@given(st.text("ab ,xW", max_size=200), st.integers(30, 400), st.integers(1, 4))
def test_lines_fit(text, width, lines):
    actual = contact_sheet.wrap_text(text, width, lines)
    assert len(actual) <= lines
    assert all(contact_sheet.load_font(13).getlength(line) <= width + 12 for line in actual)
    if not any(line.endswith("...") for line in actual):
        assert "".join(actual).replace(" ", "") == text.replace(" ", "")


def test_unreadable_pictures_have_a_row(tmp_path):
    source = write_captioned_images(tmp_path / "a", {"a.png": (noise(20, 30), "one"), "b.png": (b"nonsense", "two")})
    rows, _ = inspect.source_rows(open_source(source), np.array([[20, 30]]), inspect.InspectArgs(num_views=2))
    assert rows[0].views is not None and rows[0].text == '"one"' and rows[0].views.x.shape == (1, 3, 20, 20)
    assert rows[1].views is None and "unreadable: not an image" in rows[1].text and "b.png" in rows[1].title
    assert contact_sheet.draw_contact_sheet(rows).height < 2 * contact_sheet.draw_contact_sheet(rows[:1]).height
    assert contact_sheet.draw_contact_sheet(rows[1:]).size[0] > 100


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 3000)])
def test_the_oddest_pictures(tmp_path, size):
    source = write_captioned_images(tmp_path / "a", {"a.png": (noise(*size), "word " * 5000)})
    rows, _ = inspect.source_rows(
        open_source(source), np.array([size]), inspect.InspectArgs(crop_scale=(0.4, 0.6), flip=True)
    )
    assert contact_sheet.draw_contact_sheet(rows).height < 300


def edm2_zip(path, count: int, channels: int = 4) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            file = io.BytesIO()
            np.save(file, RNG.standard_normal((2 * channels, 4, 4)).astype(np.float32))
            archive.writestr(f"00000/img-mean-std-{i:08d}.npy", file.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    return str(path)


def test_latents(tmp_path):
    where, vae = edm2_zip(tmp_path / "a.zip", 3), write_vae(tmp_path / "vae", 4)
    source = open_source(where)
    looked = scan_source(source)
    assert looked.original_sizes.tolist() == [[4, 4]] * 3 and table(source_tables(source, looked), "latents")
    rows, notes = inspect.source_rows(source, looked.original_sizes, inspect.InspectArgs())
    assert notes == ["the latents are not decoded: add --vae and --convention"] and rows[0].views.x.shape == (
        1,
        8,
        4,
        4,
    )
    assert not any("brightness" in line for line in contact_sheet.control_lines(rows[0].views, 0))
    assert contact_sheet.draw_contact_sheet(rows).size[0] > 400

    rows, notes = inspect.source_rows(
        source, looked.original_sizes, inspect.InspectArgs(vae=str(vae), convention="edm2")
    )
    decoded = inspect.VAE(str(vae), convention="edm2").decode(torch.from_numpy(source.read(0)[:4])[None])
    assert notes == [] and rows[0].views.x.equal(decoded) and contact_sheet.draw_contact_sheet(rows).size[0] > 400

    for wrong in (str(write_vae(tmp_path / "16", 16)), "nobody/nothing"):
        rows, (note,) = inspect.source_rows(source, looked.original_sizes, inspect.InspectArgs(vae=wrong))
        assert "not decoded" in note and wrong in note and rows[0].views.x.dtype == torch.float32


def test_latents_of_a_cache(gesso, tmp_path):
    vae = write_vae(tmp_path / "vae", 4)
    assert gesso("cache", "shapes:5", tmp_path / "c", "--resolution", 32, "--vae", vae)[0] == 0
    cache = CachedDataset(tmp_path / "c")
    rows, notes = inspect.cache_rows(cache, inspect.InspectArgs(num_rows=2))
    means = cache.get_views(torch.tensor([1, 3]), torch.tensor([0, 0])).x.float()[:, :4]
    decoded = inspect.VAE(str(vae)).decode(means)
    assert notes == [] and torch.cat([one.views.x for one in rows]).equal(decoded)
    assert "brightness" in " ".join(contact_sheet.control_lines(rows[0].views, 0))
    shutil.rmtree(vae)
    rows, (note,) = inspect.cache_rows(cache, inspect.InspectArgs(num_rows=2))
    assert note.startswith("the latents are not decoded: the VAE ") and rows[0].views.x.shape == (1, 8, 4, 4)
    assert (
        "brightness" in " ".join(contact_sheet.control_lines(rows[0].views, 0))
        and contact_sheet.draw_contact_sheet(rows).size[0] > 400
    )


def test_inspect_output_for_a_cache(tmp_path, gesso):
    pictures = {f"{i}.png": (noise(40 + 10 * i, 60), f"caption {i % 3}") for i in range(6)}
    where = write_captioned_images(tmp_path / "a", pictures | {"bad.png": (b"nonsense", "")})
    words = ["--resolution", 16, "--views", 2, "--crop-scale", ".5,1", "--buckets", 3, "data.max_unreadable=.5"]
    assert gesso("cache", where, tmp_path / "c", *words)[0] == 0
    tables = inspect_tables.cache_tables(CachedDataset(tmp_path / "c"))
    about = dict(tables[0].rows)
    stored = sum(file.stat().st_size for file in (tmp_path / "c" / "shards").glob("shard-*.safetensors"))
    assert about["images"] == "6 of 7, 2 views each" and inspect_tables.format_bytes(stored) in about["size"]
    assert about["faces"] == "not blurred" and len(about["mean"].split(", ")) == 3
    output = dict(table(tables, "settings").rows)
    assert output["data.crop_scale"] == "0.5, 1" and output["views"] == "2" and "latent.vae" not in output
    assert sum(int(count) for _, count, _ in table(tables, "buckets").rows) == 6
    assert table(tables, "pixels").rows[0] == ("height", "40", "60", "90")
    assert table(tables, "unreadable: 1 of 7").rows[0][0] == "bad.png"
    code, printed, _ = gesso("inspect", tmp_path / "c", "--out", tmp_path / "s.png")
    assert code == 0 and "settings" in printed and (tmp_path / "s.png").is_file()


def test_cache_views_are_fixed(gesso, tmp_path):
    gesso("cache", "shapes:3", tmp_path / "c", "--resolution", 8)
    for flag in (["--flip"], ["--crop-scale", ".4,.6"], ["--resolution", 8], ["--seed", 1]):
        refused(gesso("inspect", tmp_path / "c", "--out", tmp_path / "s.png", *flag), f"{flag[0]} has no effect")
    (tmp_path / "c" / "manifest.json").rename(tmp_path / "c" / "plan.json")
    assert gesso("inspect", tmp_path / "c", "--out", tmp_path / "s.png")[0] == 2
    assert not (tmp_path / "s.png").exists()


# The verb.


def test_data_at_the_terminal(gesso, tmp_path):
    out = tmp_path / "deep" / "sheet.png"
    code, output, _ = gesso("inspect", "digits", "--out", out, "--rows", 3)
    assert code == 0 and f"wrote {out}" in output
    assert "1,797" in output and "10 classes" in output and "the digit three" in output
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 400


def test_eighty_columns_whatever_the_names(gesso, tmp_path, monkeypatch):
    for name in ("[bold]x[/bold]" * 10, "ordinary", "عربي" * 20):
        (tmp_path / "a" / name).mkdir(parents=True)
        noise(9, 16).save(tmp_path / "a" / name / "1.png")
        (tmp_path / "a" / name / "1.txt").write_text(f"{name} [red] caption " * 30)
        (tmp_path / "a" / name / "2.png").write_bytes(b"x")
        (tmp_path / "a" / name / "2.txt").write_text(f"{name} [red] caption " * 30)
    monkeypatch.setattr("conftest.Console", lambda **settings: Console(**settings | {"width": 80}))
    code, output, _ = gesso("inspect", tmp_path / "a", "--out", tmp_path / "s.png", "--flip", "--crop-scale", ".4,.6")
    assert code == 0 and "unreadable: 3 of 6" in output and "[bold]x[/bold]" in output
    assert max(len(line) for line in output.splitlines() if not line.startswith("wrote")) <= 80


@pytest.mark.parametrize("scale", [".6,.4", "0,1", "1", "a,b", ".4,1.1", "nan,1", ".4,.5,.6", ""])
def test_crop_scales_that_are_none(gesso, scale, tmp_path):
    refused(gesso("inspect", "digits", "--out", tmp_path / "s.png", "--crop-scale", scale), "two shares of the area")


def test_sources_that_are_none(gesso, tmp_path):
    refused(gesso("inspect", "digit", "--out", tmp_path / "s.png"), "did you mean digits?")
    assert not (tmp_path / "s.png").exists()
    with pytest.raises(UsageError):
        inspect.inspect_source(str(tmp_path / "nowhere"), 10, inspect.InspectArgs(), tmp_path / "s.png", Console())
