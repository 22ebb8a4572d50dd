"""Layouts of folders and archives as users have them: splits, metadata, captions, mixed, hidden and odd files."""

import errno
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gesso import atomic_io, hub, untrusted
from gesso.data.sources import decode, open_source
from gesso.errors import RunError, UnreadableImageError, UsageError

RNG = np.random.default_rng(0)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
MIF1 = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(64)


@pytest.fixture(autouse=True)
def temporary_cache_dir(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(format: str = "PNG", size: tuple[int, int] = (6, 5)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def table(path: Path, count: int, label: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [picture() for _ in range(count)], "label": [label] * count}), path)
    return path


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def notes(source) -> str:
    source.captions()
    return " | ".join(source.notes)


@pytest.fixture(params=["folder", "zip", "zip with its folder"])
def make(request, tmp_path):
    """Return a function that writes files as a folder or a zip and returns its path and the prefix of names."""

    def build(files: dict[str, bytes | str]) -> tuple[Path, str]:
        if request.param == "folder":
            return write(tmp_path / "data", files), ""
        prefix = "pack/" if request.param == "zip with its folder" else ""
        return zipped(tmp_path / "data.zip", {prefix + name: data for name, data in files.items()}), prefix

    return build


# Splits.


def split_files(train="train", val="val", test="test") -> dict[str, bytes]:
    files = {f"{train}/{c}/{i}.png": picture() for c in ("cat", "dog", "owl") for i in range(3)}
    return files | {f"{val}/dog/9.png": picture(), f"{test}/cat/8.png": picture(), f"{test}/owl/8.png": picture()}


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("Training", "validation", "testing")])
def test_split_folders_are_no_classes(make, folders):
    path, prefix = make(split_files(*folders))
    source = open_source(path)
    assert source.class_names == ("cat", "dog", "owl") and len(source) == 9
    assert all(name.startswith(f"{prefix}{folders[0]}/") for name in names(source))
    assert source.held_out == (f"{path}#val", f"{path}#test")
    assert f"{path} has splits: train is read (9 images); " in notes(source)
    assert "val (1)" in notes(source) and "test (2)" in notes(source) and "held out" in notes(source)
    assert f"monitor.validation_source={path}#val" in notes(source)


def test_a_held_out_split_has_the_classes_of_training(make):
    path, prefix = make(split_files())
    val, test = (open_source(uri) for uri in open_source(path).held_out)
    assert names(val) == [f"{prefix}val/dog/9.png"] and val.class_names == ("cat", "dog", "owl")
    assert val.labels.tolist() == [1] and test.labels.tolist() == [0, 2] and val.held_out == ()
    assert (
        val.uri == f"{path}#val" and open_source(f"{path}#train").labels.tolist() == open_source(path).labels.tolist()
    )


def test_a_split_that_is_not_there(make):
    path, _ = make({"train/a/0.png": picture(), "val/a/0.png": picture()})
    with pytest.raises(UsageError, match="there is no split test; there are train, val"):
        open_source(f"{path}#test")
    path, _ = make({"a/0.png": picture(), "b/0.png": picture()})
    if path.suffix == ".zip":
        with pytest.raises(UsageError, match="sub-folders and files are no splits"):
            open_source(f"{path}#val")


def test_splits_without_classes_and_only_train(make):
    path, _ = make({"train/0.png": picture(), "train/1.png": picture(), "test/2.png": picture()})
    source = open_source(path)
    assert len(source) == 2 and source.class_names == () and source.held_out == (f"{path}#test",)
    assert len(open_source(f"{path}#test")) == 1


def test_a_zip_of_one_split(tmp_path):
    for split in ("train", "test"):
        path = zipped(tmp_path / f"{split}.zip", {f"{split}/{c}/0.png": picture() for c in ("cat", "dog")})
        assert open_source(path).class_names == ("cat", "dog")


def test_suggested_settings_are_quoted(tmp_path):
    folder = write(tmp_path / "my photos", split_files())
    assert f"'monitor.validation_source={folder}#val'" in notes(open_source(folder))
    folder = write(tmp_path / "more photos", {"0.png": picture(), "a/1.png": picture()})
    assert f"'data.source={folder}#classes'" in notes(open_source(folder))


def test_classes_called_like_splits_stay_classes(tmp_path):
    """Vehicles: a train is a class beside others, and so is anything without a training split."""
    folder = write(tmp_path / "a", {f"{c}/0.png": picture() for c in ("boat", "car", "train")})
    assert open_source(folder).class_names == ("boat", "car", "train")
    folder = write(tmp_path / "b", {f"{c}/0.png": picture() for c in ("cat", "test")})
    assert open_source(folder).class_names == ("cat", "test")


def test_splits_below_a_single_folder_and_images_beside_splits(tmp_path):
    folder = write(tmp_path / "a", {f"set/{name}": data for name, data in split_files().items()})
    assert len(open_source(folder)) == 9 and open_source(folder).held_out
    folder = write(tmp_path / "b", split_files() | {"cover.png": picture(), "extra/0.png": picture()})
    source = open_source(folder)
    assert len(source) == 9
    assert "belong to no split are not read: those in extra/, its top folder" in notes(source)


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_splits_by_file_names(suffix, tmp_path):
    """As in data/train-00000-of-00002.parquet of the Hugging Face hub."""
    for k, (name, count) in enumerate([("train-00000-of-00002", 2), ("train-00001-of-00002", 3), ("test-00000", 1)]):
        path = tmp_path / "data" / f"{name}.{suffix}"
        if suffix == "tar":
            tarred(path, {f"{k}{i}.png": picture() for i in range(count)})
        else:
            table(path, count)
    write(tmp_path, {"README.md": "x"})
    source = open_source(tmp_path)
    assert len(source) == 5 and source.held_out == (f"{tmp_path}#test",)
    assert f"train is read (2 .{suffix} files); test (1) is held out" in notes(source)
    assert "1 .md" in notes(source) and "'README.md'" in notes(source)
    assert len(open_source(f"{tmp_path}#test")) == 1
    with pytest.raises(UsageError, match="there is no split val; there are test, train"):
        open_source(f"{tmp_path}#val")


def test_nested_tars_and_parquet_of_a_hub_repository(tmp_path, monkeypatch):
    repository = tmp_path / "snapshot"
    for split, count in (("train", 2), ("validation", 1)):
        for i in range(2):
            tarred(repository / split / f"{i:05d}.tar", {f"{i}{j}.jpg": picture("JPEG") for j in range(count)})
    monkeypatch.setattr(hub, "download", lambda hub_id, repo_type: repository)
    source = open_source("hub:someone/photos")
    assert len(source) == 4 and names(source)[0] == "00000.tar/00.jpg"
    assert source.held_out == ("hub:someone/photos#val",) and str(tmp_path) not in notes(source)
    assert len(open_source("hub:someone/photos#val")) == 2
    other = tmp_path / "other"
    for part in ("a", "b"):
        table(other / part / "train-0.parquet", 1)
    with pytest.raises(UsageError, match=r"several data sets; name one: data.source=.*other/a \(or .*other/b\)"):
        open_source(other)
    assert len(open_source(other / "b")) == 1


# Images beside sub-folders.


def test_images_beside_folders_are_all_read_without_classes(make):
    """One sub-folder once made 311 of 411 photos left out."""
    path, _ = make(
        {"0.png": picture(), "1.png": picture(), "holiday/2.png": picture(), "holiday/deep/3.png": picture()}
    )
    source = open_source(path)
    if str(path).endswith(".zip"):
        assert len(source) == 4
    assert len(source) == 4 and source.class_names == () and set(source.captions()) == {""}
    assert "2 images of" in notes(source) and f"data.source={path}#classes reads" in notes(source)
    classes = open_source(f"{path}#classes")
    assert classes.class_names == ("holiday",) and len(classes) == 2
    assert "2 images beside the class folders" in notes(classes)


def test_an_empty_class_folder_is_a_note(tmp_path):
    folder = write(tmp_path / "a", {"cat/0.png": picture(), "dog/1.png": picture(), "notes/x.md": "text"})
    (folder / "fish").mkdir()
    source = open_source(folder)
    assert source.class_names == ("cat", "dog")
    assert "2 sub-folders of" in notes(source) and "without images are no classes: fish, notes" in notes(source)
    assert "1 .md" in notes(source)


# Metadata and captions.

ROWS = [("b.png", "two words", "dog"), ("sub/a.png", "naïve 猫", "cat"), ("c.png", "three", "dog")]


def metadata(kind: str, with_label: bool, with_text: bool = True) -> tuple[str, bytes]:
    columns = {"file_name": [f for f, _, _ in ROWS]}
    columns |= {"text": [t for _, t, _ in ROWS]} if with_text else {}
    columns |= {"label": [c for _, _, c in ROWS]} if with_label else {}
    if kind == "csv":
        lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
        return "metadata.csv", "\r\n".join(lines).encode()
    if kind == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        return "metadata.parquet", file.getvalue()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("folder", ["", "train/"])
def test_metadata_of_an_image_folder(make, kind, folder):
    """Captions and class names, in a folder, in a split folder, and in a zip."""
    name, content = metadata(kind, with_label=True)
    files = {folder + file: picture() for file, _, _ in ROWS} | {
        folder + "extra.png": picture(),
        folder + name: content,
    }
    path, prefix = make(files | ({"test/x.png": picture()} if folder else {}))
    source = open_source(path)
    assert names(source) == [f"{prefix}{folder}{file}" for file, _, _ in ROWS]
    assert list(source.captions()) == [text for _, text, _ in ROWS]
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]
    assert "1 images in" in notes(source) and f"{name} does not name them" in notes(source)
    assert bool(source.held_out) == bool(folder)


def test_metadata_with_captions_or_labels_alone(make):
    name, content = metadata("csv", with_label=False)
    path, _ = make({file: picture() for file, _, _ in ROWS} | {name: content})
    assert open_source(path).class_names == () and open_source(path).captions()[0] == "two words"


def test_metadata_labels_without_captions(make):
    name, content = metadata("jsonl", with_label=True, with_text=False)
    path, _ = make({file: picture() for file, _, _ in ROWS} | {name: content})
    source = open_source(path)
    assert source.class_names == ("cat", "dog") and list(source.captions()) == ["dog", "cat", "dog"]


def test_numbers_as_labels_and_missing_labels(tmp_path):
    files = {f"{i}.png": picture() for i in range(3)}
    folder = write(tmp_path / "a", files | {"metadata.csv": "file_name,label\n0.png,10\n1.png,2\n2.png,0\n"})
    assert open_source(folder).labels.tolist() == [10, 2, 0] and len(open_source(folder).class_names) == 11
    folder = write(tmp_path / "b", files | {"metadata.csv": "file_name,label\n0.png,cat\n1.png,\n"})
    source = open_source(folder)
    assert source.class_names == () and "1 of 2 images" in notes(source) and "have no label" in notes(source)
    folder = write(tmp_path / "c", files | {"metadata.csv": "file_name,box\n0.png,5\n"})
    with pytest.raises(UsageError, match=r"1 lines are not like .*line 2"):
        open_source(folder)


def test_metadata_of_sub_folders_and_above_splits(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": f"text {i}"} for i in range(2)]
    content = "\n".join(map(json.dumps, rows))
    folder = write(
        tmp_path / "a", {"images/0.png": picture(), "images/1.png": picture(), "images/metadata.jsonl": content}
    )
    source = open_source(folder)
    assert names(source) == ["images/0.png", "images/1.png"] and list(source.captions()) == ["text 0", "text 1"]
    rows = [{"file_name": f"{split}/0.png", "text": split} for split in ("train", "test")]
    files = {"train/0.png": picture(), "test/0.png": picture(), "metadata.jsonl": "\n".join(map(json.dumps, rows))}
    folder = write(tmp_path / "b", files)
    assert list(open_source(folder).captions()) == ["train"] and list(open_source(f"{folder}#test").captions()) == [
        "test"
    ]


def test_caption_files(make):
    """A .txt, else "caption" of a .json, else the class."""
    files = {f"{c}/{i}.png": picture() for c in "ab" for i in range(2)}
    files |= {"a/0.txt": " one \n", "a/0.json": '{"caption": "no"}', "a/1.json": '{"caption": "from json"}'}
    path, _ = make(files | {"b/0.json": '{"width": 5}', "b/lonely.txt": "x"})
    source = open_source(path)
    assert list(source.captions()) == ["one", "from json", "b", "b"] and source.item(1).caption == "from json"
    assert "1 .txt" in notes(source) and "lonely.txt" in notes(source)


def test_captions_in_a_flat_zip(make):
    path, _ = make({"0.png": picture(), "0.txt": b"na\xefve", "1.png": picture()})
    source = open_source(path)
    assert list(source.captions()) == ["na\ufffdve", ""] and source.class_names == ()
    assert "1 of 2 images" in notes(source) and "not UTF-8" in notes(source)


def test_a_caption_that_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_CAPTION_BYTES", 10)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", picture())
        archive.writestr("0.txt", "x" * 1000)
    assert list(open_source(path).captions()) == ["x" * 10]


def test_metadata_that_cannot_be_read(tmp_path):
    folder = write(tmp_path, {"0.png": picture(), "metadata.csv": "file_name,text\n0.png,a"})
    (folder / "metadata.csv").unlink()
    (folder / "metadata.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"metadata\.csv names no image"):
        open_source(folder)


def test_dataset_json(make):
    """EDM2's labels, in a plain folder and in a zip under one top folder."""
    labels = [["00000/a.png", 3], ["00000/b.png", 1]]
    path, prefix = make({name: picture() for name, _ in labels} | {"dataset.json": json.dumps({"labels": labels})})
    source = open_source(path)
    assert source.labels.tolist() == [3, 1] and source.class_names == ("0", "1", "2", "3")
    assert names(source) == [f"{prefix}00000/a.png", f"{prefix}00000/b.png"] and "other files" not in notes(source)


def test_another_dataset_json_in_a_folder_is_a_note(tmp_path):
    folder = write(tmp_path, {"a/0.png": picture(), "b/1.png": picture(), "dataset.json": '{"title": "x"}'})
    assert open_source(folder).class_names == ("a", "b") and "'dataset.json'" in notes(open_source(folder))


# Tars.


def test_class_folders_in_tars(tmp_path):
    files = {f"{c}/{i}.png": picture() for c in ("dog", "cat") for i in range(2)}
    source = open_source(tarred(tmp_path / "a.tar", files))
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 1, 0, 0]
    assert list(source.captions()) == ["dog", "dog", "cat", "cat"]
    source = open_source(tarred(tmp_path / "b.tar", {f"./set/{name}": data for name, data in files.items()}))
    assert source.class_names == ("cat", "dog")
    source = open_source(tarred(tmp_path / "c.tar", files | {"x.png": picture()}))
    assert source.class_names == () and len(source) == 5


def test_folders_of_shards_are_no_classes(tmp_path):
    for shard in ("00000", "00001"):
        tarred(tmp_path / "t" / f"{shard}.tar", {f"{shard}/{i}.jpg": picture("JPEG") for i in range(2)})
    assert open_source(tmp_path / "t").class_names == ()
    source = open_source(tarred(tmp_path / "c.tar", {"x/0.png": picture(), "x/0.txt": "a", "y/1.png": picture()}))
    assert source.class_names == ()


def test_dots_in_tar_keys(tmp_path):
    files = {"IMG.2020.01.png": picture(), "IMG.2020.01.txt": "first", "IMG.2021.02.png": picture(), "a.png": picture()}
    source = open_source(tarred(tmp_path / "a.tar", files | {"a.mask.png": picture(), "__MACOSX/._a.png": b"x"}))
    assert names(source) == ["IMG.2020.01.png", "IMG.2021.02.png", "a.png"]
    assert list(source.captions()) == ["first", "", ""]
    assert (
        "1 images in" in notes(source) and "a.mask.png" in notes(source) and "1 hidden or system files" in notes(source)
    )


# Formats.


@pytest.mark.parametrize(
    "suffix, format", [(".avif", "AVIF"), (".jp2", "JPEG2000"), (".jfif", "JPEG"), (".jpe", "JPEG")]
)
def test_formats_of_other_suffixes(make, suffix, format):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow has no {format}")
    path, _ = make({f"a{suffix}": picture(format), "b.PNG": picture()})
    source = open_source(path)
    assert len(source) == 2 and source.item(0).decode(3)[1] == (6, 5)


def test_formats_by_content(make):
    """A file without a known suffix is an image if it begins like one; a .heic may be a JPEG."""
    files = {
        "a": picture(),
        "b.orig": picture("JPEG"),
        "c.heic": picture("JPEG"),
        "d.bin": b"BM no image",
        "e.dat": b"",
    }
    path, _ = make(files)
    source = open_source(path)
    assert [Path(name).name for name in names(source)] == ["a", "b.orig", "c.heic"]
    assert all(source.item(i).decode(3)[1] == (6, 5) for i in range(3))
    assert "2 other files" in notes(source) and "d.bin" in notes(source)


def test_heic_without_its_extra_is_named(make, monkeypatch):
    monkeypatch.setattr(decode, "has_heif", lambda: False)
    path, prefix = make({"0.png": picture(), "IMG_1.HEIC": HEIC, "IMG_2.heic": MIF1})
    source = open_source(path)
    assert names(source) == [f"{prefix}0.png"]
    assert f"2 HEIC images in {path} are not read: {prefix}IMG_1.HEIC, {prefix}IMG_2.heic" in notes(source)
    assert "pip install 'gesso-diffusion[heif]'" in notes(source)
    with pytest.raises(UnreadableImageError, match=r"a HEIC image: pip install 'gesso-diffusion\[heif\]'"):
        decode.decode_image(HEIC, 3)


def test_only_heic_images(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "has_heif", lambda: False)
    with pytest.raises(UsageError, match=r"no images there .*1 HEIC images.*pip install 'gesso-diffusion\[heif\]'"):
        open_source(write(tmp_path, {"a.heic": HEIC}))


def test_heic_with_its_extra(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.fromarray(RNG.integers(0, 256, (64, 48, 3), dtype=np.uint8))
    pillow_heif.from_pillow(image).save(tmp_path / "a.heic")
    source = open_source(tmp_path)
    assert len(source) == 1 and source.item(0).decode(3)[1] == (64, 48)


# Hidden, linked and other files.


def test_hidden_and_system_folders_at_every_depth(make):
    files = {"a/0.png": picture(), "a/.ipynb_checkpoints/0.png": picture(), "b/@eaDir/1.png/x.jpg": picture("JPEG")}
    path, prefix = make(files | {"b/1.png": picture(), "__MACOSX/a/._0.png": b"x", "a/Thumbs.db": b"x"})
    source = open_source(path)
    assert names(source) == [f"{prefix}a/0.png", f"{prefix}b/1.png"] and source.class_names == ("a", "b")
    assert "3 hidden or system folders in" in notes(source) and "a/.ipynb_checkpoints/" in notes(source)


def test_linked_folders_are_read_once(tmp_path):
    folder = write(tmp_path / "data", {"a/0.png": picture()})
    elsewhere = write(tmp_path / "elsewhere", {"deep/1.png": picture()})
    (folder / "a" / "more").symlink_to(elsewhere)
    (folder / "b").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    source = open_source(folder)
    assert names(source) == ["a/0.png", "b/deep/1.png"] or names(source) == ["a/0.png", "a/more/deep/1.png"]
    assert "2 linked folders in" in notes(source)


def test_latents_in_a_folder(tmp_path):
    """EDM2's latents are read; other arrays are named with what works."""
    values = RNG.standard_normal((2, 8, 4, 4)).astype(np.float32)
    folder = tmp_path / "latents"
    folder.mkdir()
    for i, value in enumerate(values):
        np.save(folder / f"img-mean-std-{i:08d}.npy", value)
    source = open_source(folder)
    assert source.has_latents and np.array_equal(source.item(1).image, values[1])
    for name in ("x.npy", "x.safetensors"):
        other = write(tmp_path / name, {name: b"x"})
        with pytest.raises(UsageError, match=rf"1 {Path(name).suffix}.*img-mean-std-\*.npy.*gesso cache --vae"):
            open_source(other)
    write(folder, {"a.png": picture()})
    with pytest.raises(UsageError, match="1 images and 2 latents in one folder"):
        open_source(folder)


def test_zips_in_a_folder(tmp_path):
    zipped(tmp_path / "a.zip", {"0.png": picture()})
    assert len(open_source(tmp_path)) == 1
    zipped(tmp_path / "b.zip", {"0.png": picture()})
    with pytest.raises(UsageError, match=r"has 2 zips: name one of them \(.*a.zip"):
        open_source(tmp_path)


def test_the_zip_that_a_folder_was_unpacked_from(tmp_path):
    """An archive of about the size of the images is a note, a metadata table is read."""
    files = {f"{i}.png": picture() for i in range(4)}
    folder = write(tmp_path / "data", files)
    zipped(folder / "data.zip", files)
    source = open_source(folder)
    assert len(source) == 4 and "1 .zip" in notes(source)
    rows = {"file": list(files), "text": [str(i) for i in range(4)]}
    pq.write_table(pa.table(rows), folder / "captions.parquet")
    source = open_source(folder)
    assert list(source.captions()) == ["0", "1", "2", "3"] and "parquet" not in notes(source)


# What changes in place.


def overwrite(path: Path, data: bytes) -> None:
    """Write other bytes of the same size; the folder's own time stays."""
    assert len(data) == path.stat().st_size
    before = path.parent.stat()
    path.write_bytes(data)
    os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_replaced_image_changes_stamp_and_content(tmp_path):
    bmp = [picture("BMP") for _ in range(4)]
    folder = write(tmp_path, {f"{i}.bmp": bmp[i] for i in range(3)})
    os.utime(folder / "1.bmp", (1e9, 1e9))

    def identity() -> tuple[str, str, str]:
        source = open_source(folder)
        return source.fingerprint(), source.content_hash(), source.stamp()

    first = identity()
    assert identity() == first
    overwrite(folder / "1.bmp", bmp[3])
    second = identity()
    assert second[0] == first[0] and second[1] != first[1] and second[2] != first[2]
    os.utime(folder / "0.bmp", ns=(1, 10**18 + 1))
    third = identity()
    assert third[:2] == second[:2] and third[2] != second[2]
    assert open_source("digits").content_hash() == open_source("digits").stamp() == ""


def test_archives_have_a_stamp(tmp_path):
    for path in (
        zipped(tmp_path / "a.zip", {"0.png": picture()}),
        tarred(tmp_path / "a.tar", {"0.png": picture()}),
        table(tmp_path / "a.parquet", 1),
    ):
        before = open_source(path).stamp()
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        assert len(before) == 16 and open_source(path).stamp() != before


# File systems, and systems without some modules.


def test_file_systems_that_refuse_fsync_and_permissions(tmp_path, monkeypatch):
    """Folders and file modes are refused by some network file systems; a file that is not flushed is an error."""
    real = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    def refuse_modes(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    monkeypatch.setattr(Path, "chmod", refuse_modes)
    atomic_io.write_text(tmp_path / "a.txt", "text")
    with atomic_io.atomic_dir(tmp_path / "b") as folder:
        (folder / "c").write_text("text")
    atomic_io.append_text(tmp_path / "d.txt", "line")
    assert [(tmp_path / name).read_text() for name in ("a.txt", "b/c", "d.txt")] == ["text", "text", "line"]

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="cannot write"):
        atomic_io.write_text(tmp_path / "a.txt", "other")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_import_and_train_without_fcntl_and_resource(tmp_path):
    """As on Windows: no fcntl, no resource, no SIGUSR1, no O_CLOEXEC and relatives."""
    code = """
import os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1
for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "pread"):
    delattr(os, name)
import importlib, pkgutil, gesso
for module in pkgutil.walk_packages(gesso.__path__, "gesso."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from gesso.cli import main
sys.argv = ["gesso", "train", "digits", "train.total_images=64", "train.batch_size=32", "--out", sys.argv[1]]
main()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "snapshots").is_dir()
