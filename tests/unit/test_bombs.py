"""Small files that declare or unpack to much more are refused by bounds, which are lowered where a file is large."""

import io
import os
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gesso import safetensors_io, untrusted
from gesso.data.cache.format import open_manifest
from gesso.data.cache.plan import CachePlan
from gesso.data.sources import decode, open_source, parquet
from gesso.data.sources.decode import PixelBudget, decode_image
from gesso.errors import RunError, UnreadableImageError, UsageError
from gesso.evaluation.image_sets import open_image_set


@pytest.fixture(autouse=True)
def _temporary_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    return file.getvalue()


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# Zips.


def test_labels_of_a_zip_are_bounded(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": png(), "dataset.json": b" " * (64 * 2**20 + 1)})
    assert path.stat().st_size < 2**17
    with pytest.raises(UsageError, match=r"dataset\.json has more than 64 MiB"):
        open_source(str(path))


def test_deep_labels_of_a_zip_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.json is not"):
        open_source(str(write_zip(tmp_path / "a.zip", {"a.png": png(), "dataset.json": b"[" * 100_000})))


def test_a_member_of_a_zip_is_not_unpacked_beyond_its_bound(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"\0" * 100_000, "b.png": png()})
    monkeypatch.setattr(untrusted, "MAX_ITEM_BYTES", 99_999)
    source = open_source(str(path))
    with pytest.raises(UnreadableImageError, match=r"^a\.png \(it has more than"):
        source.item(0)
    assert source.item(1).image == png()


def test_a_member_of_a_zip_that_unpacks_to_more_than_it_says(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"\0" * 100_000})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 100_000), struct.pack("<I", 100)))
    with pytest.raises(UnreadableImageError, match="its checksum is another"):
        open_source(str(path)).item(0)


def test_the_list_of_a_zip_is_bounded(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {f"{i}.png": b"x" for i in range(100)})
    assert len(open_source(str(path))) == 100
    monkeypatch.setattr(untrusted, "MAX_ZIP_LIST_BYTES", 3_000)
    os.utime(path)  # its stored list is out of date
    with pytest.raises(UsageError, match="the list of its members has more than"):
        open_source(str(path))


# Tars.


def test_members_of_a_tar_are_bounded(tmp_path, monkeypatch):
    long = b"caption " * 200_000
    files = {"a.png": b"\0" * 5_000, "a.txt": long, "b.png": png(), "b.txt": b"short", "c.png": png(), "c.json": long}
    path = write_tar(tmp_path / "a.tar", files)
    monkeypatch.setattr(untrusted, "MAX_ITEM_BYTES", 4_999)
    source = open_source(str(path))
    assert list(source.captions()) == ["", "short", ""]
    assert any("2 captions in" in note and "above 1 MiB" in note for note in source.notes)
    with pytest.raises(UnreadableImageError, match="it has more than"):
        source.item(0)
    assert source.item(1).image == png()


def test_a_class_file_of_a_tar_is_not_read_beyond_a_number(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(), "a.cls": b"1" * 3_000_000})
    with pytest.raises(UsageError, match=r"a\.cls holds '1111"):
        open_source(str(path))


def test_a_chain_of_headers_in_a_tar(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    block = header.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(block * 3_000)
    with pytest.raises(UsageError, match="no tar that can be read"):
        open_source(str(tmp_path / "a.tar"))


# Parquet.


def test_a_repeated_cell_of_a_parquet_file_stays_small(tmp_path):
    """2,000 rows of 1 MB in a file of 50 kB."""
    rows = {"image": [{"bytes": b"x" * 1_000_000, "path": "a"}] * 2000, "caption": ["y" * 100_000] * 2000}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    del rows
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    source = open_source(str(tmp_path / "a.parquet"))
    assert len(source.read(1999)) == 1_000_000 and len(source.caption(1999)) == 100_000
    assert pa.total_allocated_bytes() - before < 20e6


def test_a_column_of_texts_is_bounded(tmp_path, monkeypatch):
    rows = {"image": [b"x"] * 50_000, "caption": ["y" * 1_000] * 50_000}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    monkeypatch.setattr(parquet, "MAX_TEXT_COLUMN_BYTES", 2**20)
    with pytest.raises(UsageError, match="column caption has more than 1 MiB"):
        source.captions()


def test_rows_and_row_groups_are_bounded(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [os.urandom(100) for _ in range(50)]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 1_000)
    with pytest.raises(UnreadableImageError, match="write smaller row groups"):
        source.item(0)
    monkeypatch.setattr(parquet, "MAX_ROWS", 49)
    with pytest.raises(UsageError, match="more than 49 rows"):
        open_source(str(tmp_path / "a.parquet"))


# Folders.


def test_files_of_a_folder_are_bounded(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(png())
    (folder / "a.txt").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(UsageError, match=r"a\.txt cannot be read \(its caption cannot be read: it has more than 1 MiB"):
        open_source(str(folder)).captions()
    (folder / "a.txt").unlink()
    source = open_source(str(folder))
    monkeypatch.setattr(untrusted, "MAX_ITEM_BYTES", 20)
    with pytest.raises(UnreadableImageError, match=r"a\.png \(it has more than"):
        source.item(0)
    (folder / "captions.jsonl").write_text('{"file": "a.png", "text": "x"}\n')
    with pytest.raises(UsageError, match=r"captions\.jsonl has more than"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "a.zip", "a.tar", "a.parquet", "train-images-idx3-ubyte", "files/a.tar", "files/a.parquet",
        "files/train-images-idx3-ubyte",
    ],
)  # fmt: skip
def test_pipes_are_not_waited_for(tmp_path, name):
    (tmp_path / "files").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"no regular file|no images there"):
        open_source(str(tmp_path / name.split("/")[0])).captions()


@pytest.mark.parametrize("name", ["a.txt", "captions.jsonl", "b.png", "dataset.json"])
def test_pipes_beside_images_are_not_read(tmp_path, name):
    (tmp_path / "a.png").write_bytes(png())
    os.mkfifo(tmp_path / name)
    source = open_source(str(tmp_path))
    assert len(source) == 1 and list(source.captions()) == [""]
    assert any(f"1 pipes, sockets or devices in {tmp_path} are not read: {name}" in note for note in source.notes)


# Pictures.


def test_a_picture_that_declares_a_large_area():
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        decode_image(bytes(content), 3)


def test_threads_share_a_budget_of_pixels(monkeypatch):
    """Pictures of 6 pixels with a budget of 10 are decoded one by one, smaller ones together."""
    monkeypatch.setattr(decode, "BUDGET", PixelBudget(10))
    convert, lock, active, peaks = decode._to_grey_or_rgb, threading.Lock(), [0], []
    second = threading.Event()

    def record(*arguments: object, **options: object) -> Image.Image:
        with lock:
            active[0] += 1
            peaks.append(active[0])
            if active[0] > 1:
                second.set()
        second.wait(0.2)
        result = convert(*arguments, **options)
        with lock:
            active[0] -= 1
        return result

    monkeypatch.setattr(decode, "_to_grey_or_rgb", record)
    for size, together in (((3, 2), False), ((2, 2), True)):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "PNG")
        peaks.clear()
        second.clear()
        threads = [threading.Thread(target=decode_image, args=(file.getvalue(), 3)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(peaks) == 4 and max(peaks) <= 2 and (together or max(peaks) == 1)
    assert decode.BUDGET.used == 0


def test_a_picture_above_the_budget_is_decoded_alone(monkeypatch):
    monkeypatch.setattr(decode, "BUDGET", PixelBudget(1))
    assert decode_image(png(), 3)[1] == (4, 4)


# Arrays, weights and caches.


def test_empty_pictures_of_an_array(tmp_path):
    for shape in ((2, 0, 4, 3), (2, 4, 0, 3), (0, 4, 4, 3)):
        np.savez(tmp_path / "a.npz", arr_0=np.zeros(shape, np.uint8))
        with pytest.raises(UsageError):
            open_image_set(str(tmp_path / "a.npz"))


def test_headers_and_tensor_counts_of_weights(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes((64 * 2**20 + 8).to_bytes(8, "little"))
    os.truncate(path, 70 * 2**20)
    with pytest.raises(RunError, match="its header has more than 64 MiB"):
        safetensors_io.read_tensors(path)
    save_file({f"{i}": torch.zeros(1) for i in range(11)}, path)
    monkeypatch.setattr(safetensors_io, "MAX_TENSORS", 10)
    with pytest.raises(RunError, match="more than 10 tensors"):
        safetensors_io.read_tensors(path)


def test_the_number_of_buckets_is_bounded():
    with pytest.raises(ValueError, match="buckets"):
        CachePlan.model_validate({"buckets": 100_001, "bucket_multiple": 1, "data": {"resolution": 4096}})


def test_a_manifest_above_its_bound_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(UsageError, match=r"manifest\.json cannot be read: it has more than 64 MiB"):
        open_manifest(tmp_path)
