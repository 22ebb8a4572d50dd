"""File format of a cache: names, contents and checks. read.py reads the files, write.py writes them.

OUT/manifest.json                  plan.CacheManifest, written last
OUT/plan.json                      plan.CacheHeader, until then
OUT/shards/shard-000000.json       plan.ShardRecord, written after the files of its range of images
OUT/shards/shard-000000.safetensors, or one per bucket, shard-000000-384x640.safetensors (height and width in pixels):
    pixels uint8 (n, K, C, H, W), or moments float16|float32 (n, K, 2c, h, w): means, then standard deviations, raw
    index, label int64 (n,); size int32 (n, 2); box float32 (n, K, 4); flip uint8 (n, K); tone float32 (n, K, 2)
    caption uint8, the bytes of all; caption_end int64 (n,)
    with text: tokens float16|float32 (sum of lengths, D); token_end int64 (n,); pooled (n, P)
OUT/shards/columns.safetensors     label to caption_end of all files, so that a reader can start without opening them

`index` is the index in the source; SampleBatch.indices is the index in the cache.

Legend: n images of a shard, K views; C channels of pixels, H W their size; c channels of latents, h w their size; D
and P channels of a token and of pooled text.
"""

import hashlib
import random
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from gesso import safetensors_io, untrusted
from gesso.data.cache.plan import (
    FORMAT,
    CacheHeader,
    CacheManifest,
    CachePlan,
    ColumnFile,
    ShardFile,
    ShardRecord,
    cache_command,
)
from gesso.data.encoders import hub
from gesso.data.in_memory import ProgressCallback
from gesso.errors import UsageError, error_summary

SHARD_DIR = "shards"
COLUMNS_FILE = "columns.safetensors"
COLUMN_TENSORS = ("label", "size", "box", "flip", "tone", "caption", "caption_end")
TEXT_TENSORS = ("tokens", "token_end", "pooled")
MAX_VERIFIED_BYTES = 256 * 2**20
"""Size of the shards whose checksums are verified when a cache is opened; at least one shard is."""
SHARD_NAME_PATTERN = re.compile(r"shard-(\d{6,})(-\d+x\d+)?\.safetensors")

Layout = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]
"""dtype and shape of each tensor of a file; None is any length."""
CacheFile = ShardFile | ColumnFile


def shard_name(r: int, size: tuple[int, int] | None = None) -> str:
    """Return the file name of the shard of range r; with several buckets, `size` is height and width of its bucket."""
    return f"shard-{r:06d}.safetensors" if size is None else f"shard-{r:06d}-{size[0]}x{size[1]}.safetensors"


def is_cache(folder: str | Path) -> bool:
    """Return True if the folder contains a cache, complete or not."""
    return any((Path(folder) / name).is_file() for name in ("manifest.json", "plan.json"))


Record = TypeVar("Record", CacheManifest, ShardRecord, CacheHeader)


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON file of a cache; raise UsageError if it is damaged or of another version."""
    try:
        tree = untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error_summary(error)}") from None
    return parse_record(tree, path, kind)


def parse_record(tree: object, path: Path | str, kind: type[Record]) -> Record:
    """Validate the contents of a JSON file, which errors name as `path`."""
    version = tree.get("format") if isinstance(tree, dict) else None
    if kind is not ShardRecord and version != FORMAT:
        raise UsageError(
            f"{path} has the format {str(version)[:40]}, but this version of gesso reads {FORMAT}: "
            "write the cache again"
        )
    try:
        record = kind.model_validate(tree)
    except ValidationError as error:
        detail = error.errors()[0]
        raise UsageError(f"{path} is damaged: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
    unsafe_names = [
        shard.name for shard in getattr(record, "files", ()) if not SHARD_NAME_PATTERN.fullmatch(shard.name)
    ]
    if isinstance(record, CacheManifest) and record.columns.name != COLUMNS_FILE:
        unsafe_names.append(record.columns.name)
    if unsafe_names:
        raise UsageError(f"{path} names the file {unsafe_names[0]!r}, which is unsafe and never written by gesso cache")
    return record


def open_manifest(folder: str | Path) -> CacheManifest:
    """Read and check a manifest; raise UsageError if the cache is missing, incomplete, outdated or damaged."""
    manifest = _read_manifest(Path(folder))
    if problems := size_problems(Path(folder), (*manifest.files, manifest.columns)):
        raise UsageError(f"{problems[0]}; run gesso cache --check {folder} to see how to repair the cache")
    return manifest


def check_sample(folder: Path, manifest: CacheManifest) -> None:
    """Verify the SHA-256 of the columns and of shards chosen at random, as many as MAX_VERIFIED_BYTES allows.

    Raises:
        UsageError: A file has changed since it was written.
    """
    shards = random.SystemRandom().sample(manifest.files, len(manifest.files))
    ends = np.cumsum([shard.bytes for shard in shards])
    count = max(1, int(np.searchsorted(ends, MAX_VERIFIED_BYTES, "right")))
    files: list[CacheFile] = [manifest.columns, *shards[:count]]
    for file in files:
        if problem := _file_problem(folder, file):
            raise UsageError(f"{problem}; run gesso cache --check {folder} to see how to repair the cache")


def _read_manifest(folder: Path) -> CacheManifest:
    path = folder / "manifest.json"
    if not path.is_file():
        if not (folder / "plan.json").is_file():
            raise UsageError(
                f"{folder} is not a cache: it has no manifest.json; write one with gesso cache SOURCE {folder}"
            )
        header = read_record(folder / "plan.json", CacheHeader)
        raise UsageError(f"the cache {folder} is incomplete; continue with\n  {cache_command(header.plan, folder)}")
    return check_manifest(read_record(path, CacheManifest), path)


def check_manifest(manifest: CacheManifest, path: Path | str) -> CacheManifest:
    """Return the manifest; raise UsageError if its plan is incomplete or its files contradict the plan."""
    if manifest.num_images != sum(shard.rows for shard in manifest.files):
        raise UsageError(f"{path} is damaged: num_images differs from the sum of the rows of its files")
    plan, text = manifest.plan, manifest.plan.semantic
    required = [plan.images_per_shard, *([text.embed_dim, text.pooled_dim] if text.kind == "text" else [])]
    if None in required or (plan.dtype is None and (plan.latent.vae or text.kind == "text")):
        raise UsageError(f"{path} is damaged: its plan is incomplete")
    sizes = plan.bucket_sizes()
    for shard in manifest.files:
        shape = image_tensor_shape(plan, shard.rows, shard.height, shard.width)
        if (shard.height, shard.width) not in sizes or shard.shape != shape:
            raise UsageError(f"{path} is damaged: the shape {shard.shape} of {shard.name} contradicts its plan")
    return manifest


def size_problems(folder: Path, files: Iterable[CacheFile]) -> list[str]:
    """Return a description of each file that is missing or has the wrong size."""
    problems = []
    for file in files:
        path = folder / SHARD_DIR / file.name
        try:
            size = path.stat().st_size
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
        else:
            problems += [f"{path} has {size:,} bytes instead of {file.bytes:,}"] if size != file.bytes else []
    return problems


def shard_layout(plan: CachePlan, shard: ShardFile) -> Layout:
    """Return the layout of a shard."""
    n, K, stored = shard.rows, plan.views, getattr(torch, plan.dtype or "float32")
    layout: Layout = {
        "moments" if plan.latent.vae else "pixels": (stored if plan.latent.vae else torch.uint8, shard.shape),
        "index": (torch.int64, (n,)), "label": (torch.int64, (n,)), "size": (torch.int32, (n, 2)),
        "box": (torch.float32, (n, K, 4)), "flip": (torch.uint8, (n, K)), "tone": (torch.float32, (n, K, 2)),
        "caption": (torch.uint8, (None,)), "caption_end": (torch.int64, (n,)),
    }  # fmt: skip
    if plan.semantic.kind == "text":
        width, pooled = plan.semantic.embed_dim, plan.semantic.pooled_dim
        text = {"tokens": (stored, (None, width)), "token_end": (torch.int64, (n,)), "pooled": (stored, (n, pooled))}
        layout |= text
    return layout


def image_tensor_shape(plan: CachePlan, rows: int, height: int, width: int) -> tuple[int, ...]:
    """Return the shape of the pixels or moments of a shard; height and width are those of its views in pixels."""
    if plan.latent.vae:
        f = plan.latent.downsample_factor
        return (rows, plan.views, 2 * plan.latent.channels, height // f, width // f)
    return (rows, plan.views, plan.data.channels, height, width)


def gather_columns(folder: Path, plan: CachePlan, files: Sequence[ShardFile]) -> dict[str, Tensor]:
    """Return the contents of the columns file."""
    parts = [map_shard(folder / SHARD_DIR / shard.name, plan, shard) for shard in files]
    columns = {name: torch.cat([part[name] for part in parts]) for name in COLUMN_TENSORS}
    offsets = torch.tensor([0, *(len(part["caption"]) for part in parts)]).cumsum(0)
    columns["caption_end"] = torch.cat([part["caption_end"] + k for part, k in zip(parts, offsets, strict=False)])
    return columns


def map_columns(path: Path, manifest: CacheManifest) -> dict[str, Tensor]:
    """Return the columns of a cache, memory-mapped; raise UsageError if they contradict the manifest."""
    layout = shard_layout(manifest.plan, manifest.files[0].model_copy(update={"rows": manifest.num_images}))
    columns = _map_file(path, {name: layout[name] for name in COLUMN_TENSORS})
    label, size = columns["label"], columns["size"]
    is_valid = {
        "caption_end": _ends_are_valid(columns["caption_end"], len(columns["caption"])),
        "label": bool((label >= 0).all() and (label < max(len(manifest.class_names), 1)).all()),
        "size": bool((size > 0).all()),
        **{name: bool(columns[name].isfinite().all()) for name in ("box", "tone")},
    }
    if invalid := [name for name, valid in is_valid.items() if not valid]:
        raise UsageError(f"{path} is damaged: invalid values of {', '.join(invalid)}")
    return columns


def _ends_are_valid(ends: Tensor, total: int) -> bool:
    """Return True if end offsets increase, from at least 0 to `total`."""
    values = ends.numpy()
    return bool((np.diff(values, prepend=0) >= 0).all() and values[-1] == total)


def map_shard(path: Path, plan: CachePlan, shard: ShardFile) -> dict[str, Tensor]:
    """Return the tensors of a shard, memory-mapped; raise UsageError if they contradict the plan."""
    tensors = _map_file(path, shard_layout(plan, shard))
    if "tokens" in tensors and not _token_ends_are_valid(plan, tensors):
        raise UsageError(f"{path} is damaged: invalid values of token_end")
    return tensors


def _token_ends_are_valid(plan: CachePlan, tensors: dict[str, Tensor]) -> bool:
    lengths = np.diff(tensors["token_end"].numpy(), prepend=0)
    fits = bool((lengths <= plan.semantic.max_tokens).all())
    return fits and _ends_are_valid(tensors["token_end"], len(tensors["tokens"]))


def _map_file(path: Path, layout: Layout) -> dict[str, Tensor]:
    try:
        with safetensors_io.open_bounded(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors_io.READ_ERRORS as error:
        raise UsageError(f"{path} is damaged: {error_summary(error)}") from None
    for name in {**layout, **tensors}:
        actual = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else None
        expected = layout.get(name)
        if not (actual and expected and actual[0] == expected[0] and _shape_matches(actual[1], expected[1])):
            raise UsageError(f"{path} is damaged: tensor {name} is {actual}, expected is {expected}")
    return tensors


def _shape_matches(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (None, n) for n, e in zip(shape, expected, strict=True))


def files_fingerprint(files: Sequence[ShardFile]) -> str:
    """Return 16 hex digits of the SHA-256 of all shards."""
    return hashlib.sha256("".join(shard.sha256 for shard in files).encode()).hexdigest()[:16]


def verify_cache(folder: str | Path, progress: ProgressCallback = lambda done, total: None) -> list[str]:
    """Check all contents of a cache; return a line per problem and the commands that repair it, or no lines.

    Raises:
        UsageError: There is no manifest.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    damaged: list[Path] = []
    lines: list[str] = []
    indices: list[np.ndarray] = []
    num_checked = 0
    for shard in manifest.files:
        path = folder / SHARD_DIR / shard.name
        problem = _file_problem(folder, shard)
        if problem is None:
            try:
                tensors = map_shard(path, manifest.plan, shard)
                problem = _content_problem(manifest, shard, tensors)
                indices.append(tensors["index"].numpy())
            except UsageError as error:
                problem = str(error)
        if problem:
            damaged.append(path)
            lines.append(problem)
        num_checked += shard.rows
        progress(num_checked, manifest.num_images)
    path = folder / SHARD_DIR / COLUMNS_FILE
    problem = _file_problem(folder, manifest.columns)
    if problem is None and not damaged:
        expected, actual = gather_columns(folder, manifest.plan, manifest.files), map_columns(path, manifest)
        if differing := [name for name in COLUMN_TENSORS if not expected[name].equal(actual[name])]:
            problem = f"{path}: {', '.join(differing)} differ from the shards"
    if problem:
        damaged.append(path)
        lines.append(problem)
    if not damaged and len(np.unique(np.concatenate(indices))) != manifest.num_images:
        lines.append(f"{folder}: an image of the source is stored twice")
    path = folder / "manifest.json"
    if manifest.num_images + len(manifest.unreadable) != manifest.num_source_images:
        lines.append(f"{path}: num_images and unreadable do not add up to the {manifest.num_source_images} images")
    if manifest.fingerprint != files_fingerprint(manifest.files):
        lines.append(f"{path}: its fingerprint differs from that of its files")
    if lines:
        to_delete = shlex.join(map(str, damaged or [path]))
        command = cache_command(manifest.plan, folder)
        lines.append(f"To repair the cache, delete these files and write them again:\n  rm -f {to_delete}\n  {command}")
    return lines


def _file_problem(folder: Path, file: CacheFile) -> str | None:
    """Return a description of a wrong size or SHA-256, else None."""
    if problems := size_problems(folder, [file]):
        return problems[0]
    path = folder / SHARD_DIR / file.name
    try:
        return None if hub.sha256_files([path]) == file.sha256 else f"{path} is damaged: its SHA-256 is wrong"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _content_problem(manifest: CacheManifest, shard: ShardFile, tensors: dict[str, Tensor]) -> str | None:
    """Return a description of values that were wrong when the shard was written, else None."""
    plan, match = manifest.plan, SHARD_NAME_PATTERN.fullmatch(shard.name)
    assert plan.images_per_shard is not None and match  # of a complete cache
    start = int(match[1]) * plan.images_per_shard
    stop = min(start + plan.images_per_shard, manifest.num_source_images)
    index, label = tensors["index"].numpy(), tensors["label"].numpy()
    is_valid = {
        "index": (np.diff(index) > 0).all() and start <= index[0] and index[-1] < stop,
        "label": ((label >= 0) & (label < max(len(manifest.class_names), 1))).all(),
        "caption_end": _ends_are_valid(tensors["caption_end"], len(tensors["caption"])),
        "size": (tensors["size"] > 0).all(),
    }
    for name in ("moments", "tokens", "pooled", "box", "tone"):
        # In parts: isfinite of the full tensor takes as much memory as the tensor.
        if name in tensors:
            is_valid[name] = all(bool(part.isfinite().all()) for part in tensors[name].split(256))
    invalid = [name for name, valid in is_valid.items() if not valid]
    return f"{SHARD_DIR}/{shard.name}: invalid values of {', '.join(invalid)}" if invalid else None
