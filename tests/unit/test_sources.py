"""The same six pictures from every kind of source; what is refused; lists kept between runs; many threads."""

import io
import json
import os
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from gesso.data import shapes_dataset
from gesso.data.sources import IMAGE_SUFFIXES, NAMED_SOURCES, SOURCE_KINDS, archives, base, open_source
from gesso.data.sources.base import StringArray
from gesso.data.sources.decode import decode_image
from gesso.errors import UnreadableImageError, UsageError

RNG = np.random.default_rng(0)
SIZES = [(5, 7), (8, 8), (6, 4), (3, 9), (8, 5), (4, 4)]
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]
CLASSES = ("a cat", "dög")
LABELS = [0, 0, 0, 1, 1, 1]
TEXTS = ["one", "two words", "", "naïve 猫", "one", "a, \"quoted\"\nline"]  # fmt: skip
NAMES = ["0.png", "1 x.png", "2.png", "0.png", "käse.png", "new\nline.png"]


@pytest.fixture(autouse=True)
def temporary_cache_dir(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "gesso" / "lists"


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURES[i]).save(file, "PNG")
    return file.getvalue()


def path_of(i: int) -> str:
    return f"{CLASSES[LABELS[i]]}/{NAMES[i]}"


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path: Path, files: dict[str, bytes], packed=False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def folder(root, texts=False):
    files = {path_of(i): png(i) for i in range(6)}
    others = {path_of(i)[:-3] + "txt": TEXTS[i].encode() for i in range(6)} if texts else {}
    return write(root / "images", files | others)


def flat(root):
    return write(root / "flat", {f"{i}.png": png(i) for i in range(6)})


def lines(root, file="file", text="text"):
    rows = [json.dumps({file: path_of(i), text: TEXTS[i] or None, "other": i}) for i in range(6)]
    return write(folder(root), {"captions.jsonl" if file == "file" else "metadata.jsonl": "\n".join(rows).encode()})


def rows(root):
    table = pa.table({"file": [path_of(i) for i in range(6)], "text": [text or None for text in TEXTS]})
    pq.write_table(table, folder(root) / "captions.parquet")
    return root / "images"


def edm2(root, packed=False, wrapper=None):
    """With dataset.json, or else with the classes as folders, perhaps in a folder of their own."""
    if wrapper is not None:
        return zipped(root / "a.zip", {wrapper + path_of(i): png(i) for i in range(6)})
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    labels = json.dumps({"labels": [[name, LABELS[i]] for i, name in enumerate(names)][::-1]})
    return zipped(root / "a.zip", {"dataset.json": labels.encode()} | {n: png(i) for i, n in enumerate(names)}, packed)


def sample(i: int, as_json=False) -> list[tuple[str, bytes]]:
    about = ("json", json.dumps({"caption": TEXTS[i] or None, "width": 1, "height": 1, "status": "success"}).encode())
    parts = [("png", png(i)), about if as_json else ("txt", TEXTS[i].encode()), ("cls", str(LABELS[i]).encode())]
    return [(f"{i:09d}.{suffix}", data) for suffix, data in parts]


def tars(root, as_json=False, count=1):
    (root / "tars").mkdir()
    for n, part in enumerate(np.array_split(np.arange(6), count)):
        tarred(root / "tars" / f"w-{n:02d}.tar", [entry for i in part for entry in sample(int(i), as_json)])
    return root / "tars"


def parquet(root, nested=True, files=1, names=CLASSES):
    (root / "tables").mkdir()
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}} if names else {}
    for n, part in enumerate(np.array_split(np.arange(6), files)):
        encoded = [{"bytes": png(i), "path": "x.png"} if nested else png(i) for i in part]
        columns = {"image": encoded, "label": [LABELS[i] for i in part], "caption": [TEXTS[i] or None for i in part]}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, root / "tables" / f"t-{n}.parquet", row_group_size=2)
    return root / "tables"


BY_CLASS = [CLASSES[label] for label in LABELS]
# maker, class names, captions, names
SOURCES = {
    "folder": (folder, CLASSES, BY_CLASS, [path_of(i) for i in range(6)]),
    "folder with .txt": (lambda p: folder(p, True), CLASSES, TEXTS, [path_of(i) for i in range(6)]),
    "flat folder": (flat, (), [""] * 6, [f"{i}.png" for i in range(6)]),
    "captions.jsonl": (lines, (), TEXTS, [path_of(i) for i in range(6)]),
    "metadata.jsonl": (lambda p: lines(p, "file_name", "caption"), (), TEXTS, [path_of(i) for i in range(6)]),
    "captions.parquet": (rows, (), TEXTS, [path_of(i) for i in range(6)]),
    "zip": (edm2, ("0", "1"), [""] * 6, [f"00000/img{i:08d}.png" for i in range(6)]),
    "packed zip": (lambda p: edm2(p, True), ("0", "1"), [""] * 6, [f"00000/img{i:08d}.png" for i in range(6)]),
    "zip of a folder": (lambda p: edm2(p, wrapper=""), CLASSES, BY_CLASS, [path_of(i) for i in range(6)]),
    "zip with its folder": (lambda p: edm2(p, wrapper="x/"), CLASSES, BY_CLASS, ["x/" + path_of(i) for i in range(6)]),
    "tar": (lambda p: tars(p) / "w-00.tar", ("0", "1"), TEXTS, [f"{i:09d}.png" for i in range(6)]),
    "tar, json": (lambda p: tars(p, True) / "w-00.tar", ("0", "1"), TEXTS, [f"{i:09d}.png" for i in range(6)]),
    "tars": (lambda p: tars(p, count=3), ("0", "1"), TEXTS, [f"w-{i // 2:02d}.tar/{i:09d}.png" for i in range(6)]),
    "pattern of tars": (
        lambda p: f"{tars(p, count=3)}/w-{{00..02}}.tar", ("0", "1"), TEXTS,
        [f"w-{i // 2:02d}.tar/{i:09d}.png" for i in range(6)],
    ),
    "parquet": (lambda p: parquet(p) / "t-0.parquet", CLASSES, TEXTS, [f"t-0.parquet:{i}" for i in range(6)]),
    "parquets": (lambda p: parquet(p, False, 2), CLASSES, TEXTS, [f"t-{i // 3}.parquet:{i % 3}" for i in range(6)]),
    "parquet, no names": (
        lambda p: parquet(p, names=None), ("0", "1"), TEXTS, [f"t-0.parquet:{i}" for i in range(6)],
    ),
}  # fmt: skip


@pytest.fixture(params=SOURCES)
def kind(request):
    return request.param


def test_every_source_gives_the_same(kind, tmp_path):
    make, classes, captions, names = SOURCES[kind]
    path = str(make(tmp_path))
    source = open_source(path)
    assert (len(source), source.uri, source.class_names, source.has_latents) == (6, path, tuple(classes), False)
    assert source.labels.dtype == np.int64 and source.labels.tolist() == (LABELS if classes else [0] * 6)
    for i in (3, 0, 5, 1, 4, 2):
        item = source.item(i)
        picture, size = decode_image(item.image, 3)
        assert np.array_equal(np.asarray(picture), PICTURES[i]) and size == SIZES[i] and item.original_size is None
        assert (item.name, item.label, item.caption) == (names[i], source.labels[i], captions[i])
    assert list(source.captions()) == captions
    missing = "" in captions and any(captions)
    assert [note for note in source.notes if "caption" in note] == (
        [f"1 of 6 images in {path} have no caption: theirs is empty"] if missing else []
    )
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            source.item(outside)


def test_captions_are_known_before_an_item_is_read(kind, tmp_path):
    make, _, captions, _ = SOURCES[kind]
    assert list(open_source(str(make(tmp_path))).captions()) == captions


def test_fingerprint(kind, tmp_path):
    """Stable, 16 hex digits, and another one after any change of names, labels, captions or sizes."""
    make, _, _, _ = SOURCES[kind]
    path = str(make(tmp_path))
    first = open_source(path).fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0
    source = open_source(path)
    assert source.fingerprint() == first
    changes = {first}
    source.labels = source.labels[::-1].copy()
    changes.add(source.fingerprint())
    source.class_names = (*source.class_names, "another")
    changes.add(source.fingerprint())
    source._captions = ["something else", *list(source.captions())[1:]]
    changes.add(source.fingerprint())
    source.encoded_size = lambda i: 1
    changes.add(source.fingerprint())
    source.name = lambda i: "name"
    changes.add(source.fingerprint())
    assert len(changes) == (6 if any(source.labels) else 5)


def test_many_threads_agree_with_one(kind, tmp_path):
    make, _, _, _ = SOURCES[kind]
    source = open_source(str(make(tmp_path)))
    serial = [open_source(source.uri).item(i) for i in range(6)]
    start = threading.Barrier(8)

    def read(seed: int):
        order = np.random.default_rng(seed).integers(0, 6, 60).tolist()
        start.wait()
        return [(i, source.item(i)) for i in order]

    with ThreadPoolExecutor(8) as pool:
        for i, item in (pair for result in pool.map(read, range(8)) for pair in result):
            assert item == serial[i]


def coarse(scan: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels, then weights 3/4 and 1/4 of the two nearest along each axis; half to even."""
    up = np.zeros((8, 4))
    for i in range(8):
        near, far = i // 2, min(max(i // 2 + (1 if i % 2 else -1), 0), 3)
        up[i, near] += 0.75
        up[i, far] += 0.25
    return np.rint(up @ scan.reshape(4, 2, 4, 2).mean((1, 3)) @ up.T)


def test_digits():
    scans = load_digits()
    fine, rough = open_source("digits"), open_source("digits-mixed-resolution")
    for source in (fine, rough):
        assert source.class_names == tuple("0123456789") and np.array_equal(source.labels, scans.target)
        captions = [source.item(i).caption for i in range(4)]
        assert captions == ["zero", "the digit one", "a two in somebody's handwriting", "three"]
    for i in range(0, 1797, 7):
        pixels = np.rint(scans.images[i] * 255 / 16)
        assert np.array_equal(fine.item(i).image, pixels[..., None]) and fine.item(i).image.dtype == np.uint8
        assert np.array_equal(rough.item(i).image[..., 0], coarse(pixels) if i % 2 else pixels)
        assert fine.item(i).original_size is None and rough.item(i).original_size == ((4, 4) if i % 2 else None)
    assert fine.fingerprint() != rough.fingerprint()


@pytest.mark.parametrize("name, single", [("shapes", False), ("shapes-class", True)])
def test_shapes(name, single):
    source = open_source(f"{name}:1203")
    assert len(source) == len(source.captions()) == 1203 and source.class_names == shapes_dataset.KINDS
    for i in (0, 7, 999, 1000, 1202):
        scene = shapes_dataset.sample_scene(i, single=single)
        item = source.item(i)
        assert np.array_equal(item.image, shapes_dataset.render_scene(scene))
        assert (item.label, item.caption) == (shapes_dataset.scene_label(scene), shapes_dataset.scene_caption(scene))
        assert source.encoded_size(i) == item.image.nbytes
    assert source.fingerprint() != open_source(f"{name}:1202").fingerprint()


def test_edm2_latents(tmp_path):
    values = RNG.standard_normal((3, 8, 4, 4)).astype(np.float32)
    files = {}
    for i, value in enumerate(values):
        file = io.BytesIO()
        np.save(file, value)
        files[f"00000/img-mean-std-{i:08d}.npy"] = file.getvalue()
    labels = json.dumps({"labels": [[name, 7 - i] for i, name in enumerate(files)]}).encode()
    source = open_source(zipped(tmp_path / "a.zip", files | {"dataset.json": labels}))
    assert source.has_latents and source.labels.tolist() == [7, 6, 5] and len(source.class_names) == 8
    for i, value in enumerate(values):
        assert np.array_equal(source.item(i).image, value) and source.item(i).image.dtype == np.float32
    names = list(files)
    odd = {names[0]: files[names[0]][:-4], names[1]: files[names[1]].replace(b"<f4", b"<i4"), names[2]: b"\x93NUMPY"}
    source = open_source(zipped(tmp_path / "b.zip", odd))
    for i in range(3):
        with pytest.raises(UnreadableImageError, match=r"numpy array|float32"):
            source.item(i)


def test_labels_null_means_no_classes(tmp_path):
    source = open_source(
        zipped(tmp_path / "a.zip", {"0/a.png": png(0), "1/b.png": png(1), "dataset.json": b'{"labels": null}'})
    )
    assert source.class_names == () and source.labels.tolist() == [0, 0] and "without classes" in source.notes[0]


BAD_LABELS = [
    (b"{", "dataset.json is not"), (b"[]", "dataset.json is not"), (b"{}", "dataset.json is not"),
    (b'{"labels": [1]}', "dataset.json is not"), (b'{"labels": [["a.png"]]}', "dataset.json is not"),
    (b'{"labels": [["a.png", 0], ["b.png", 1], ["../c.png", 1]]}', r"labels files that are not there: \.\./c.png"),
    (b'{"labels": [["a.png", 0]]}', "has no label for: b.png"),
    (b'{"labels": [["a.png", 0], ["b.png", -1]]}', "1 of 2 labels are wrong .-1 of b.png.; a label is a whole number"),
    (b'{"labels": [["a.png", 0], ["b.png", 1000000]]}', "1 of 2 labels are wrong .1000000 of b.png.*0 to 999999"),
    (b'{"labels": [["a.png", 0.5], ["b.png", true]]}', "2 of 2 labels are wrong .0.5 of a.png, True of b.png."),
    (b'{"labels": [["a.png", "1"], ["b.png", null]]}', "2 of 2 labels"),
    (b'{"labels": [["a.png", [0, 1]], ["b.png", 9999999999999999999999]]}', "2 of 2 labels"),
    (b'{"labels": [["a.png", 0], ["b.png", 1], ["b.png", 0]]}', "names 1 files twice"),
    (b'{"labels": [[5, 0], ["a.png", 0], ["b.png", 1]]}', "not there: 5"),
]  # fmt: skip


@pytest.mark.parametrize("described, words", BAD_LABELS)
def test_labels_of_a_zip(described, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        open_source(zipped(tmp_path / "a.zip", {"a.png": png(0), "b.png": png(1), "dataset.json": described}))


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:/a.png", "x/..", "\\\\host\\a.png"]
)
def test_names_that_point_outside(name, tmp_path):
    with pytest.raises(UsageError, match="refused, for names in it point outside"):
        open_source(zipped(tmp_path / "a.zip", {"ok.png": png(0), name: png(1)}))


def test_other_zips_that_are_refused(tmp_path):
    def refused(words):
        with pytest.raises(UsageError, match=words):
            open_source(tmp_path / "a.zip")

    zipped(tmp_path / "a.zip", {"a.txt": b"x"})
    refused("no images in the zip")
    zipped(tmp_path / "a.zip", {"a.png": png(0), "img-mean-std-0.npy": b"x"})
    refused("1 images and 1 latents in one zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("a.png", png(1))
    refused("1 names are in it twice")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", png(0))
    refused("not packed by deflate")
    full = zipped(tmp_path / "a.zip", {f"{i}.png": png(0) for i in range(9)}).read_bytes()
    for cut in (4, 30, len(full) // 2, len(full) - 30, len(full) - 1):
        (tmp_path / "a.zip").write_bytes(full[:cut])
        refused("no zip that can be read")
    # The encryption bit of the central directory's entry.
    zipped(tmp_path / "a.zip", {"a.png": png(0)})
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(raw)
    refused("encrypted")


@pytest.mark.parametrize("packed", [False, True])
def test_one_damaged_entry_of_a_zip(packed, tmp_path):
    path = edm2(tmp_path, packed)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("00000/img00000002.png")
    raw[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 255
    path.write_bytes(raw)
    source = open_source(path)
    with pytest.raises(UnreadableImageError, match=r"00000/img00000002.png .damaged in the zip"):
        source.item(2)
    for i in (0, 1, 3, 4, 5):
        source.item(i)


def test_a_zip_that_shrinks_while_open(tmp_path):
    path = edm2(tmp_path)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableImageError, match=r"00000/img00000005.png .its file is shorter"):
        source.item(5)


def test_zip64_and_extra_fields(tmp_path):
    """The local header's own lengths count: its extra field differs from the directory's."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(6):
            with archive.open(zipfile.ZipInfo(path_of(i)), "w", force_zip64=True) as file:
                file.write(png(i))
    source = open_source(tmp_path / "a.zip")
    assert [source.item(i).image for i in range(6)] == [png(i) for i in range(6)]


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_a_tar_cut_short(cut, tmp_path):
    """At every 1/60: what lies before the cut is used, and the note counts it."""
    where = tars(tmp_path, count=2)
    path = where / "w-01.tar"
    end = max(member.offset_data + member.size for member in members(path))
    images = [member for member in members(path) if "png" in member.name]
    path.write_bytes(path.read_bytes()[: end * cut // 60])
    left = sum(member.offset_data + member.size <= end * cut // 60 for member in images)
    try:
        source = open_source(where)
    except UsageError as error:  # an image whose class is lost, or not even one header
        assert "have no .cls" in str(error) or (end * cut // 60 < 512 and "no tar that can be read" in str(error))
        return
    assert len(source) == 3 + left
    assert f"1 of 2 tars end early: w-01.tar after {left} images; what lies before is used" in source.notes
    for i in range(len(source)):
        assert np.array_equal(np.asarray(decode_image(source.item(i).image, 3)[0]), PICTURES[i])


def test_only_an_empty_tar_has_a_note(tmp_path):
    path = tars(tmp_path, count=2)
    assert not any("early" in note for note in open_source(path).notes)
    (path / "w-02.tar").write_bytes(b"")
    source = open_source(path)
    assert len(source) == 6 and any("1 of 3 tars end early: w-02.tar after 0 images" in note for note in source.notes)


def test_a_tar_damaged_inside(tmp_path):
    """A header that is no header: tarfile alone would end there without a word."""
    where = tars(tmp_path)
    path = where / "w-00.tar"
    raw = bytearray(path.read_bytes())
    third = next(member for member in members(path) if member.name.startswith("000000003"))
    raw[third.offset : third.offset + 512] = b"\xff" * 512
    path.write_bytes(raw)
    source = open_source(path)
    assert len(source) == 3 and any("w-00.tar after 3 images" in note for note in source.notes)


def test_a_tar_with_a_hostile_size(tmp_path):
    """Negative: a scan that trusts it goes back and never ends."""
    path = tarred(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1)), ("2.png", png(2))])
    raw = bytearray(path.read_bytes())
    at = members(path)[1].offset
    raw[at + 124 : at + 136] = (-1024).to_bytes(12, "big", signed=True)
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    path.write_bytes(raw)
    source = open_source(path)
    assert len(source) == 1 and "early" in source.notes[0]


def test_keys_of_tars(tmp_path):
    files = [
        ("./x/a.b.png", png(0)),  # key x/a, suffix b.png: no image of it
        ("./x/a.PNG", png(1)), ("./x/a.txt", b"\xef\xbb\xbfcaption \n"), ("x/a.json", b'{"caption": "not this"}'),
        ("y/a.txt", b"lonely"), ("only.json", b"{}"), (".hidden.png", png(2)), ("no-suffix", b"?"),
        ("twice.jpg", png(3)), ("twice.jpg", png(4)), ("twice.txt", b"1"), ("twice.txt", b"2"),
        ("broken.json", b"{"), ("broken.png", png(4)), ("long" * 60 + ".png", png(5)), ("sürrogate.webp", png(5)),
        ("number.json", b'{"caption": 5}'), ("number.png", png(5)),
    ]  # fmt: skip
    source = open_source(tarred(tmp_path / "a.tar", files))
    names = ["x/a.png", "twice.jpg", "broken.png", "long" * 60 + ".png", "sürrogate.webp", "number.png"]
    assert [source.item(i).name for i in range(6)] == names
    assert [source.item(i).image for i in range(6)] == [png(i) for i in (1, 3, 4, 5, 5, 5)]
    assert list(source.captions()) == ["caption", "1", "", "", "", ""]
    assert source.class_names == () and source.labels.tolist() == [0] * 6
    notes = " | ".join(source.notes)
    for words in ("2 keys", "1 keys in", "there twice: the first", "2 captions in", "4 of 6 images"):
        assert words in notes, words


def test_other_tars_that_are_refused(tmp_path):
    path = tmp_path / "a.tar"

    def refused(words):
        with pytest.raises(UsageError, match=words):
            open_source(path)

    path.write_bytes(b"this is no tar" * 100)
    refused("no tar that can be read")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(write(tmp_path / "x", {"a.png": png(0)}))
    refused("a packed one must be unpacked")
    tarred(path, [("a.txt", b"x")])
    refused("no images in")
    path.write_bytes(b"")
    refused("no images in")
    for label in (b"-1", b"x", b"", b"1.5", b"1000000", b"9" * 5000, "²".encode()):
        tarred(path, [("a.png", png(0)), ("a.cls", label)])
        refused("a.cls holds .*; a class is a whole number from 0 to 999999")
    tarred(path, [("a.png", png(0)), ("a.cls", b"1\n"), ("b.png", png(1))])
    refused("1 of 2 samples have no .cls .b.png")


def test_patterns(tmp_path):
    path = tars(tmp_path, count=3)
    assert len(open_source(f"{path}/w-{{00..01}}.tar")) == 4
    for pattern, words in (
        ("w-{00..05}.tar", "3 of 6 files are not there: .*w-03.tar"),
        ("w-{2..1}.tar", "smaller number"),
        ("w-{0..99999999}.tar", "more than 1000000 files"),
        ("w-{0..2}.tar", "3 of 3 files are not there"),
    ):
        with pytest.raises(UsageError, match=words):
            open_source(f"{path}/{pattern}")
    for i in range(2):
        (path / f"x{i}.jpg").write_bytes(png(0))
    with pytest.raises(UsageError, match=r"names .tar or .parquet"):
        open_source(f"{path}/x{{0..1}}.jpg")
    assert len(open_source(f"{parquet(tmp_path, files=2)}/t-{{0..1}}.parquet")) == 6


def test_more_tars_than_open_files(tmp_path, monkeypatch):
    """Handles are closed again, and only when nobody reads from them."""
    monkeypatch.setattr(archives, "MAX_OPEN_FILES", 1)
    source = open_source(tars(tmp_path, count=6))
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda k: source.item(k % 6).image, range(600))) == [png(k % 6) for k in range(600)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


PARQUETS = [
    ({"x": [1, 2]}, "no column holds bytes of images; one named image is expected, there are: x"),
    ({"a": [b"1"], "b": [b"2"]}, "several columns hold bytes"),
    ({"image": [b"1", b"2"], "label": [0, -1]}, r"1 of 2 labels are wrong .-1 of t.parquet:1"),
    ({"image": [b"1", b"2"], "label": [0, None]}, "1 of 2 labels are wrong .None of t.parquet:1"),
    ({"image": pa.array([], pa.binary())}, "no rows"),
]


@pytest.mark.parametrize("columns, words", PARQUETS)
def test_parquets_that_are_refused(columns, words, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=words):
        open_source(tmp_path)


def test_other_parquets(tmp_path):
    where = parquet(tmp_path, names=["only"])
    with pytest.raises(UsageError, match=r"3 of 6 labels are wrong .*from 0 to 0"):
        open_source(where)
    path = where / "t-0.parquet"
    full = path.read_bytes()
    for damaged in (full[:-9], full[:40]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="no parquet file that can be read"):
            open_source(where)
    pq.write_table(pa.table({"image": [png(0), None], "other": [b"", b""], "label": ["a", "b"], "text": [1, 2]}), path)
    source = open_source(where)
    assert source.class_names == () and list(source.captions()) == ["", ""] and len(source.notes) == 2
    assert source.item(0).image == png(0)
    with pytest.raises(UnreadableImageError, match=r"t-0.parquet:1 .its row has no bytes"):
        source.item(1)
    pq.write_table(pa.table({"image": [png(0)]}), where / "t-1.parquet")
    with pytest.raises(UsageError, match=r"t-1.parquet has no column label"):
        pq.write_table(pa.table({"image": [png(0)], "label": [0]}), path)
        open_source(where)


def test_one_damaged_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [RNG.bytes(500) for _ in range(4)], "label": [0, 1, 2, 3]})
    pq.write_table(table, path, row_group_size=2, compression="zstd", write_page_checksum=False)
    about = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    raw[about.data_page_offset : about.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(raw)
    source = open_source(path)
    assert source.item(1).image == table["image"][1].as_py()
    with pytest.raises(UnreadableImageError, match=r"t.parquet:3"):
        source.item(3)


def test_parquet_reads_a_row_group_once(tmp_path, monkeypatch):
    source = open_source(parquet(tmp_path))
    read = []
    group = source._read_row_group
    monkeypatch.setattr(
        source, "_cached_row_group", __import__("functools").lru_cache(4)(lambda g: read.append(g) or group(g))
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(source.item, list(range(6)) * 4))
    assert sorted(read) == [0, 1, 2]


def test_without_pyarrow(tmp_path, monkeypatch):
    where, captions = parquet(tmp_path), rows(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for path in (where, captions):
        with pytest.raises(UsageError, match=r"pip install 'gesso-diffusion\[parquet\]'"):
            open_source(path)


CAPTIONS = [
    ('{"file": "0.png", "text": "a"}\n{"file": "x.png", "text": "b"}\n{"file": "../1.png", "text": ""}',
     r"2 of the 3 images that captions.jsonl names are not there: x.png, \.\./1.png"),
    ("\n".join(f'{{"file": "{i}.jpg", "text": ""}}' for i in range(50)),
    "50 of the 50 .* 0.jpg, 1.jpg, 2.jpg and 47 more"),
    ('{"file": "0.png", "text": "a"}\nnot json\n[1]\n5\n{"text": "b"}\n{"file": "1.png"}\n{"file": 3, "text": "c"}',
     "6 lines are not like .*line 2, line 3, line 4 and 3 more"),
    ('{"file": "0.png", "text": ["a"]}', "1 lines are not like"),
    ("", "names no image"),
    ("\n\n", "names no image"),
]  # fmt: skip


@pytest.mark.parametrize("content, words", CAPTIONS)
def test_captions_files_that_are_refused(content, words, tmp_path):
    write(flat(tmp_path), {"captions.jsonl": content.encode()})
    with pytest.raises(UsageError, match=words):
        open_source(tmp_path / "flat")


def test_captions_files_choose_order_and_repeat(tmp_path):
    """One line, one sample; the same image with another caption is another sample."""
    content = b'\xef\xbb\xbf{"file": "5.png", "text": "a"}\r\n\n{"path": "./1.png", "text": ""}\n'
    content += b'{"file": "5.png", "text": "b \\ud83d"}\n'
    source = open_source(write(flat(tmp_path), {"captions.jsonl": content}))
    assert [source.item(i).name for i in range(3)] == ["5.png", "1.png", "5.png"]
    assert list(source.captions()) == ["a", "", "b \ufffd\ufffd\ufffd"]
    json.dumps(list(source.captions())).encode()
    assert source.notes[0].startswith("1 of 3 images") and "4 images" in source.notes[1]
    assert source.item(2).image == png(5)


def test_captions_parquet_that_is_refused(tmp_path):
    path = flat(tmp_path)
    for columns, words in (
        ({"file": ["0.png"]}, "has no column text or caption; there are: file"),
        ({"text": ["0.png"]}, "has no column file or file_name or path"),
        ({"file": ["0.png", None], "text": ["", ""]}, "must hold texts, with no file missing"),
        ({"file": ["0.png"], "text": [5]}, "must hold texts"),
        ({"file": ["7.png"], "text": ["a"]}, "1 of the 1 images"),
    ):
        pq.write_table(pa.table(columns), path / "captions.parquet")
        with pytest.raises(UsageError, match=words):
            open_source(path)


def test_captions_that_are_not_utf8(tmp_path):
    bad = "naïve".encode("latin-1")
    path = write(tmp_path / "a", {"0.png": png(0), "0.txt": bad, "1.png": png(1), "1.txt": b"fine"})
    source = open_source(path)
    assert source.item(0).caption == "na\ufffdve"
    assert list(source.captions()) == ["na\ufffdve", "fine"]
    assert any("1 of 2 captions" in note and "not UTF-8" in note for note in source.notes)
    tar = open_source(
        tarred(tmp_path / "b.tar", [("0.png", png(0)), ("0.txt", bad), ("1.png", png(1)), ("1.txt", b"x")])
    )
    assert tar.item(0).caption == "na\ufffdve" and any("not UTF-8" in note for note in tar.notes)
    line = b'{"file": "0.png", "text": "' + bad + b'"}'
    source = open_source(write(path, {"captions.jsonl": line}))
    assert source.item(0).caption == "na\ufffdve" and any("1 of 1 captions" in note for note in source.notes)


ODD = [
    b"a b.png",
    "日本.png".encode(),
    b"new\nline.png",
    b"quote'\".png",
    b"\xff\xfe.png",
    b"tab\t.png",
    b"-rf.png",
    b"%s{0}.png",
    b"*.png",
]


def test_odd_names_of_files(tmp_path):
    for i, name in enumerate(ODD):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(png(i % 6))
        with open(os.fsencode(tmp_path) + b"/" + name[:-3] + b"txt", "wb") as file:
            file.write(name[:-4])
    source = open_source(tmp_path)
    assert len(source) == len(ODD)
    for i, name in enumerate(sorted(ODD, key=os.fsdecode)):
        item = source.item(i)
        assert item.image == png(ODD.index(name) % 6) and item.caption == name[:-4].decode(errors="replace").strip()
        assert json.loads(json.dumps(item.name)) == item.name and item.name.encode()
    assert {"new\nline.png", "\\udcff\\udcfe.png"} <= {source.item(i).name for i in range(len(ODD))}
    assert len(source.fingerprint()) == 16
    assert open_source(tmp_path).fingerprint() == source.fingerprint()


def test_odd_names_in_tars(tmp_path):
    source = open_source(tarred(tmp_path / "a.tar", [(os.fsdecode(name), png(0)) for name in ODD]))
    assert {"a b.png", "new\nline.png", "\\udcff\\udcfe.png"} <= {source.item(i).name for i in range(len(ODD))}


def test_messages_are_one_line(tmp_path):
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(UsageError, match=r"no images there .* sub-folders are empty: a\\nb") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_names_say_what_is_near():
    with pytest.raises(UsageError, match=r"there is no such folder or file; did you mean shapes\?") as caught:
        open_source("shaeps:100")
    assert all(name in str(caught.value) for name in NAMED_SOURCES) and SOURCE_KINDS in str(caught.value)
    with pytest.raises(UsageError, match="did you mean digits-mixed-resolution"):
        open_source("digits-mixed_resolution")
    with pytest.raises(UsageError, match="there is no such folder") as caught:
        open_source("/nowhere/at/all")
    assert "did you mean" not in str(caught.value)
    for path in ("", " ", "."):
        with pytest.raises(UsageError, match="which images"):
            open_source(path)
    for path in ("shapes:0", "shapes:x", "shapes:-5", "shapes:²", "shapes:9" + "9" * 20):
        with pytest.raises(UsageError, match="is no number of pictures; write shapes:5000"):
            open_source(path)
    with pytest.raises(UsageError, match="as many as they are"):
        open_source("digits:5")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG", b"\x1f\x8b\x08"])
def test_files_of_no_kind(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError, match="no zip, tar, parquet or IDX file; a source is"):
        open_source(tmp_path / "x")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read(tmp_path):
    write(tmp_path, {"a/0.png": png(0), "b/0.png": png(0)})
    (tmp_path / "b").chmod(0)
    with pytest.raises(UsageError, match=r"b/ cannot be listed .Permission denied"):
        open_source(tmp_path)
    (tmp_path / "b").chmod(0o700)


def test_a_link_to_nothing_and_a_vanished_file(tmp_path):
    write(tmp_path, {"a.png": png(0), "b.png": png(1)})
    (tmp_path / "c.png").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "d.png")  # reading it would wait for ever
    source = open_source(tmp_path)
    (tmp_path / "b.png").unlink()
    assert len(source) == 3
    for i, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(UnreadableImageError, match="No such file") as caught:
            source.item(i)
        assert caught.value.name == name


def test_order_is_that_of_paths(tmp_path):
    """By their parts: "a/z" comes before "a b/c", although "/" comes after " "."""
    names = ["c/a b/x.png", "c/a/x.png", "c/a/b/x.PNG", "c/a.png", "c/B.jpeg", "c/10.png", "c/9.png", "c/.hidden/x.png"]
    write(
        tmp_path,
        {name: png(i % 6) for i, name in enumerate(names)} | {".x/a.png": b"", "c/._9.png": b"", "c/a.doc": b""},
    )
    paths = sorted(
        path.relative_to(tmp_path) for path in (tmp_path / "c").rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    source = open_source(tmp_path)
    shown = [str(p) for p in paths if not any(part.startswith(".") for part in p.parts)]
    assert [source.item(i).name for i in range(len(source))] == shown and len(source) == len(names) - 1
    assert source.class_names == ("c",)
    assert f"2 hidden or system folders in {tmp_path} are not read: .x/, c/.hidden/" in source.notes
    assert f"1 hidden files in {tmp_path} are not read: c/._9.png" in source.notes


def test_links_to_folders(tmp_path):
    """Linked folders are read once; one that leads round in a circle is not followed, and a note says so."""
    path = write(tmp_path / "images", {"a/0.png": png(0)})
    (path / "b").symlink_to(write(tmp_path / "elsewhere", {"1.png": png(1)}))
    (path / "a" / "round").symlink_to(path)
    source = open_source(path)
    assert source.class_names == ("a", "b") and [source.item(i).name for i in range(len(source))] == [
        "a/0.png",
        "b/1.png",
    ]
    assert f"1 linked folders in {path} lead to folders that are read already: a/round" in source.notes
    (path / "a" / "deep").symlink_to(write(tmp_path / "third", {"2.png": png(2)}))
    assert [open_source(path).item(i).name for i in range(3)] == ["a/0.png", "a/deep/2.png", "b/1.png"]


def test_folders_of_both(tmp_path):
    """A table beside tars is img2dataset's. Images beside tars are read unless they are few."""
    path = tars(tmp_path, count=3)
    pq.write_table(pa.table({"url": ["a"]}), path / "w-00.parquet")
    source = open_source(path)
    assert len(source) == 6 and any("1 .parquet" in note and "'w-00.parquet'" in note for note in source.notes)
    (path / "a.png").write_bytes(png(0))
    with pytest.raises(UsageError, match=r"has 3 .tar files .w-00.tar.* and 1 images .a.png.*move one kind"):
        open_source(path)
    for i in range(50):
        (path / f"{i}.png").write_bytes(png(i % 6) + bytes(200))
    source = open_source(path)
    assert len(source) == 51 and any("3 .tar, 1 .parquet" in note for note in source.notes)


def set_old_mtime(*paths, when: float = 1e9) -> None:
    """As if nothing had changed for a while: lists of what changes just now are not kept."""
    for root in paths:
        for path in [Path(root), *Path(root).rglob("*")]:
            os.utime(path, (when, when))


LISTED = {  # what lists, and a change that must be seen
    "zip": (archives, "_list_zip", lambda p: zipped(p, {f"{i}.png": png(0) for i in range(7)})),
    "tar": (archives, "_list_tar", lambda p: tarred(p, [(f"{i}.png", png(0)) for i in range(7)])),
    "tars": (archives, "_list_tar", lambda p: tarred(p / "w-03.tar", sample(0))),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_listings_are_cached(name, tmp_path, monkeypatch, temporary_cache_dir):
    module, function, change = LISTED[name]
    path = SOURCES[name][0](tmp_path)
    real, calls = getattr(module, function), []
    monkeypatch.setattr(module, function, lambda *a: calls.append(a[0]) or real(*a))
    set_old_mtime(path)
    first = open_source(path)
    lists = len(calls)
    again = open_source(path)
    assert lists == (3 if name == "tars" else 1) == len(calls) == len(list(temporary_cache_dir.iterdir()))
    assert [again.item(i) for i in range(6)] == [first.item(i) for i in range(6)]
    assert (again.fingerprint(), again.notes, again.class_names) == (
        first.fingerprint(),
        first.notes,
        first.class_names,
    )
    change(path)
    assert len(open_source(path)) == 7
    assert len(calls) == lists + 1  # of the tars only the new one


def test_a_renamed_folder_and_a_new_caption_are_seen(tmp_path):
    path = folder(tmp_path)
    set_old_mtime(path)
    assert open_source(path).item(0).caption == "a cat"
    write(path, {"a cat/0.txt": b"a caption"})
    assert open_source(path).item(0).caption == "a caption"
    set_old_mtime(path, when=1.1e9)
    open_source(path)
    (path / "a cat" / "0.txt").write_bytes(b"edited in place")  # the folder's own time stays
    os.utime(path / "a cat", (1.1e9, 1.1e9))
    assert open_source(path).captions()[0] == "edited in place"
    (path / "a cat").rename(path / "tiger")
    assert open_source(path).class_names == ("dög", "tiger")


def test_recently_changed_sources_are_not_cached(tmp_path, temporary_cache_dir):
    path = edm2(tmp_path)
    open_source(path)
    assert not temporary_cache_dir.exists()
    set_old_mtime(path)
    open_source(path)
    assert len(list(temporary_cache_dir.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"x" * 100,
        lambda raw: raw[:90] + b"\xff" * 9 + raw[99:],
    ],
)
def test_damaged_listing_is_rebuilt(damage, tmp_path, temporary_cache_dir):
    path = edm2(tmp_path)
    set_old_mtime(path)
    open_source(path)
    (file,) = temporary_cache_dir.iterdir()
    full = file.read_bytes()
    file.write_bytes(damage(full))
    assert open_source(path).item(3).image == png(3)
    assert file.read_bytes() == full


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    path = edm2(tmp_path)
    set_old_mtime(path)
    for place in ("/proc/nothing", "/dev/null"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert len(open_source(path)) == 6
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(open_source(path)) == 6
    assert len(list((tmp_path / "home" / ".cache" / "gesso" / "lists").iterdir())) == 1


def test_relative_paths_are_cached(tmp_path, monkeypatch, temporary_cache_dir):
    set_old_mtime(tars(tmp_path), edm2(tmp_path), flat(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("tars", "flat", "tars/w-00.tar"):
        assert len(open_source(path)) == 6
    monkeypatch.chdir(tmp_path / "flat")
    stored = {file: file.read_bytes() for file in temporary_cache_dir.iterdir()}
    monkeypatch.setattr(archives, "_list_tar", lambda path: pytest.fail(f"lists {path} again"))
    for path in ("../tars", "../flat", "../tars/w-00.tar"):
        assert len(open_source(path)) == 6
    assert stored == {file: file.read_bytes() for file in temporary_cache_dir.iterdir()} and len(stored) == 1


@given(st.lists(st.text(st.characters(exclude_categories=())), max_size=20))
@settings(max_examples=50, deadline=None)
def test_texts_hold_any_strings(strings):
    texts = StringArray.from_strings(strings)
    assert list(texts) == strings == texts[:] and len(texts) == len(strings)
    if strings:
        assert texts[-1] == strings[-1] and texts[np.int64(0)] == strings[0] and texts[::2] == strings[::2]
    with pytest.raises(IndexError):
        texts[len(strings)]


def test_shown():
    assert base.format_names(["a"]) == "a" and base.format_names(list("abcde")) == "a, b, c and 2 more"
    assert base.format_names(["a\nb", "\udcff", "é"]) == r"a\nb, \udcff, é"
