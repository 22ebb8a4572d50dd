"""Damaged sources of images, caches and encoders: a skipped image or a named error, never a traceback."""

import contextlib
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import fuzz
from PIL import Image

from gesso.config import DataConfig, SemanticConfig
from gesso.data.cache import format, write
from gesso.data.cache.plan import CachePlan, ShardFile
from gesso.data.cache.read import CachedDataset
from gesso.data.encoders import text
from gesso.data.encoders.hub import sha256_files
from gesso.data.encoders.vae import VAE
from gesso.data.sources import open_source
from gesso.errors import UnreadableImageError

Readers = dict[str, tuple[bytes, Callable[[Path], None]]]


@pytest.fixture(autouse=True)
def _temporary_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lists"))


def png(size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    return file.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def parquet_bytes(table: dict[str, list[object]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(table), file)
    return file.getvalue()


def idx_bytes(num_dims: int) -> bytes:
    header = bytes([0, 0, 8, num_dims]) + (3).to_bytes(4, "big") * num_dims
    return header + bytes(range(3**num_dims))


def read_source(path: Path) -> None:
    """Read the first images and all captions of a source; damaged images are skipped, as all commands do."""
    source = open_source(str(path))
    source.fingerprint()
    for i in range(min(len(source), 20)):
        with contextlib.suppress(UnreadableImageError):
            item = source.item(i)
            if not source.has_latents:
                item.decode(3)


def replacing(target: Path, read: Callable[[], object]) -> Callable[[Path], None]:
    """Return a function that moves a file to `target`, reads what it belongs to, and restores the old content."""
    good = target.read_bytes()

    def replace_and_read(path: Path) -> None:
        path.replace(target)
        try:
            read()
        finally:
            target.write_bytes(good)

    return replace_and_read


def source_readers(folder: Path) -> Readers:
    """Return a valid file of every kind of source, and its reader, by the name of the file."""
    labels = json.dumps({"labels": [["0/a.png", 0], ["b.png", 1]]}).encode()
    latents = io.BytesIO()
    np.save(latents, np.zeros((8, 2, 2), np.float32))
    sample = {
        "a.png": png(), "a.txt": b"one", "a.cls": b"1", "b.png": png(), "b.json": b'{"caption": "x"}', "b.cls": b"0",
    }  # fmt: skip
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}).encode()}
    table = {"image": [{"bytes": png(), "path": "a"}] * 3, "label": [0, 1, 2], "caption": ["a", None, "c"]}
    named, plain = io.BytesIO(), {name: table[name] for name in ("label", "caption")} | {"png": [png()] * 3}
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), named)
    cases: Readers = {
        "a.zip": (zip_bytes({"0/a.png": png(), "b.png": png(), "dataset.json": labels}), read_source),
        "folders.zip": (zip_bytes({"0/a.png": png(), "1/b.png": png()}), read_source),
        "latents.zip": (zip_bytes({"img-mean-std-0.npy": latents.getvalue()}), read_source),
        "a.tar": (tar_bytes(sample), read_source),
        "a.parquet": (named.getvalue(), read_source),
        "plain.parquet": (parquet_bytes(plain), read_source),
        "a-images-idx3-ubyte": (idx_bytes(3), read_source),
        "a-images-idx3-ubyte.gz": (gzip.compress(idx_bytes(3)), read_source),
    }
    files = {
        "idx/train-labels-idx1-ubyte": idx_bytes(1),
        "lines/captions.jsonl": b'{"file": "a.png", "text": "x"}\n' * 3,
        "rows/captions.parquet": parquet_bytes({"file": ["a.png"] * 3, "text": ["a", None, "c"]}),
        "texts/a.txt": b"caption \xf0\x9f\x90\x88",
        "images/a.png": png(),
    }
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir()
        target.write_bytes(content)
        (target.parent / "a.png").write_bytes(png())
        (folder / "idx" / "train-images-idx3-ubyte").write_bytes(idx_bytes(3))
        read = replacing(target, lambda target=target: read_source(target.parent))
        cases[name.replace("/", "-")] = (content, read)
    return cases


def cache_readers(folder: Path) -> Readers:
    """Return the files of a cache and their readers; checksums are made to fit, so that other checks are reached."""
    images, out = folder / "cached", folder / "cache"
    images.mkdir()
    for i in range(4):
        (images / f"{i}.png").write_bytes(png(8))
        (images / f"{i}.txt").write_text("a cat")
    data, words = DataConfig(source=str(images), resolution=8), SemanticConfig(kind="text", max_tokens=3)
    write.write_cache(CachePlan(data=data, semantic=words), out, "cpu")
    manifest = out / "manifest.json"
    good = manifest.read_bytes()

    def read_cache(*changed: Path) -> None:
        record = json.loads(good) if changed else {}
        for file in (*record.get("files", ()), record.get("columns")) if changed else ():
            path = out / "shards" / file["name"]
            file |= {"bytes": path.stat().st_size or 1, "sha256": sha256_files([path])}
        if changed:
            record["fingerprint"] = format.files_fingerprint([ShardFile(**file) for file in record["files"]])
            manifest.write_text(json.dumps(record))
        try:
            CachedDataset(out).get(torch.arange(4), torch.arange(4))
        finally:
            format.verify_cache(out)
            manifest.write_bytes(good)

    shards = sorted((out / "shards").glob("*.safetensors"))
    cases: Readers = {"manifest.json": (good, replacing(manifest, read_cache))}
    for path in shards:
        cases[path.name] = (path.read_bytes(), replacing(path, lambda path=path: read_cache(path)))
    plan = folder / "plan" / "plan.json"
    plan.parent.mkdir()
    plan.write_bytes(good)
    cases["plan.json"] = (plan.read_bytes(), replacing(plan, lambda: format.open_manifest(plan.parent)))
    return cases


def encoder_readers(folder: Path) -> Readers:
    """Return the files of a small CLIP and a small VAE, and their readers."""
    from helpers.encoders import write_clip, write_vae

    clip, vae = write_clip(folder / "clip"), write_vae(folder / "vae", 4)

    def read_clip() -> None:
        text._load_encoder.cache_clear()
        encoder = text.build_text_encoder(SemanticConfig(kind="text", encoder=str(clip), max_tokens=8))
        encoder(["a cat", "the dog"])

    def read_vae() -> None:
        model = VAE(str(vae))
        model.channel_stats()
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))

    cases: Readers = {}
    for root, read in ((clip, read_clip), (vae, read_vae)):
        for path in sorted(path for path in root.iterdir() if path.is_file()):
            content = path.read_bytes()
            cases[f"{root.name}-{path.name}"] = (content, replacing(path, read))
    return cases


def test_mutants_of_sources(tmp_path):
    assert fuzz.read_mutants(source_readers(tmp_path), tmp_path, 0, 260) > 40


def test_mutants_of_caches(tmp_path):
    assert fuzz.read_mutants(cache_readers(tmp_path), tmp_path, 0, 80) > 40


@pytest.mark.slow
def test_many_mutants_of_sources(tmp_path):
    assert fuzz.read_mutants(source_readers(tmp_path), tmp_path, 1, 5_000) > 500


@pytest.mark.slow
def test_many_mutants_of_caches(tmp_path):
    assert fuzz.read_mutants(cache_readers(tmp_path), tmp_path, 1, 1_000) > 500


@pytest.mark.slow
def test_many_mutants_of_encoders(tmp_path):
    assert fuzz.read_mutants(encoder_readers(tmp_path), tmp_path, 1, 300) > 50
