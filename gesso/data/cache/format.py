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

Legend: n images of a file, K views; C channels of pixels, H W of their size; c channels of latents, h w of theirs; D
and P channels of a token and of pooled text.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
from gesso.errors import UsageError

SHARD_DIR = "shards"
COLUMNS_FILE = "columns.safetensors"
COLUMN_TENSORS = ("label", "size", "box", "flip", "tone", "caption", "caption_end")
TEXT_TENSORS = ("tokens", "token_end", "pooled")
SHARD_NAME_PATTERN = re.compile(r"shard-\d{6,}(-\d+x\d+)?\.safetensors")


def shard_name(r: int, size: tuple[int, int] | None = None) -> str:
    """Return the file name of range r, of one bucket if there are several."""
    return f"shard-{r:06d}.safetensors" if size is None else f"shard-{r:06d}-{size[0]}x{size[1]}.safetensors"


def is_cache(folder: str | Path) -> bool:
    """Return True if the folder is a cache, complete or not."""
    return any((Path(folder) / name).is_file() for name in ("manifest.json", "plan.json"))


Record = TypeVar("Record", CacheManifest, ShardRecord, CacheHeader)


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON file of the cache. Raises UsageError if it is damaged or of another version."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {hub.error_summary(error)}") from None
    return parse_record(tree, path, kind)


def parse_record(tree: object, path: Path | str, kind: type[Record]) -> Record:
    """Validate the contents of a JSON file; `path` names it in errors."""
    version = tree.get("format") if isinstance(tree, dict) else None
    if kind is not ShardRecord and version != FORMAT:
        raise UsageError(f"{path}: written as {str(version)[:40]!r}, where {FORMAT!r} is read: make the cache anew")
    try:
        record = kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    hostile = [shard.name for shard in getattr(record, "files", ()) if not SHARD_NAME_PATTERN.fullmatch(shard.name)]
    if isinstance(record, CacheManifest) and record.columns.name != COLUMNS_FILE:
        hostile.append(record.columns.name)
    if hostile:
        raise UsageError(f"{path}: refused, for it names a file {hostile[0]!r}, which gesso cache never writes")
    return record


def open_manifest(folder: str | Path) -> CacheManifest:
    """Read and check a manifest. Raises UsageError if the cache is missing, incomplete, outdated or damaged."""
    manifest = _read_manifest(Path(folder))
    shards: tuple[ShardFile | ColumnFile, ...] = (*manifest.files, manifest.columns)
    for shard in shards:
        if wrong := size_problem(Path(folder), shard):
            raise UsageError(f"{wrong}; gesso cache --check {folder} says more")
    return manifest


def _read_manifest(folder: Path) -> CacheManifest:
    path = folder / "manifest.json"
    if not path.is_file():
        if not (folder / "plan.json").is_file():
            raise UsageError(
                f"{folder} is no cache: it has no manifest.json; write one with gesso cache SOURCE {folder}"
            )
        begun = read_record(folder / "plan.json", CacheHeader)
        raise UsageError(f"{folder} is a cache that is not finished; go on with\n  {cache_command(begun.plan, folder)}")
    return check_manifest(read_record(path, CacheManifest), path)


def check_manifest(manifest: CacheManifest, path: Path | str) -> CacheManifest:
    """Return the manifest. Raises UsageError if its files are not those that the plan gives for the images."""
    if manifest.num_images != sum(shard.rows for shard in manifest.files):
        raise UsageError(f"{path} is damaged: num_images is not the sum of the rows of its files")
    plan, text = manifest.plan, manifest.plan.semantic
    needed = [plan.images_per_shard, *([text.embed_dim, text.pooled_dim] if text.kind == "text" else [])]
    if None in needed or (plan.dtype is None and (plan.latent.vae or text.kind == "text")):
        raise UsageError(f"{path} is damaged: its plan has gaps")
    sizes = manifest.plan.bucket_sizes()
    for shard in manifest.files:
        if (shard.height, shard.width) not in sizes or shard.shape != image_tensor_shape(
            manifest.plan, shard.rows, shard.height, shard.width
        ):
            raise UsageError(f"{path}: the shape {shard.shape} of {shard.name} is not what the plan of the cache makes")
    return manifest


def size_problem(folder: Path, shard: ShardFile | ColumnFile) -> str | None:
    """Return a description if a file is missing or has the wrong size, else None."""
    path = folder / SHARD_DIR / shard.name
    try:
        has = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if has == shard.bytes else f"{path} has {has:,} bytes instead of {shard.bytes:,}"


def shard_layout(plan: CachePlan, shard: ShardFile) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """Return dtype and shape of each tensor of a file; None is any length."""
    n, K, stored = shard.rows, plan.views, getattr(torch, plan.dtype or "float32")
    layout: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
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
    """Return the shape of pixels or moments of a file, for views of a size in pixels."""
    if plan.latent.vae:
        f = plan.latent.downsample_factor
        return (rows, plan.views, 2 * plan.latent.channels, height // f, width // f)
    return (rows, plan.views, plan.data.channels, height, width)


def gather_columns(folder: Path, plan: CachePlan, files: Sequence[ShardFile]) -> dict[str, Tensor]:
    """Return the contents of the columns file."""
    parts = []
    for shard in files:
        tensors = map_shard(folder / SHARD_DIR / shard.name, plan, shard)
        parts.append({name: tensors[name] for name in COLUMN_TENSORS})
    columns = {name: torch.cat([part[name] for part in parts]) for name in COLUMN_TENSORS}
    before = torch.tensor([0, *(len(part["caption"]) for part in parts)]).cumsum(0)
    columns["caption_end"] = torch.cat([part["caption_end"] + k for part, k in zip(parts, before, strict=False)])
    return columns


def map_columns(path: Path, manifest: CacheManifest) -> dict[str, Tensor]:
    """Return the columns of a cache, memory-mapped. Raises UsageError if they contradict the manifest."""
    due = columns_layout(manifest)
    columns = _map_file(path, due)
    ends = columns["caption_end"].numpy()
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(columns["caption"]):
        raise UsageError(f"{path} is damaged: its ends of captions do not rise to their length")
    return columns


def columns_layout(manifest: CacheManifest) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """Return dtype and shape of each tensor of the columns file."""
    rows = manifest.files[0].model_copy(update={"rows": manifest.num_images})
    return {name: due for name, due in shard_layout(manifest.plan, rows).items() if name in COLUMN_TENSORS}


def map_shard(path: Path, plan: CachePlan, shard: ShardFile) -> dict[str, Tensor]:
    """Return the tensors of a file, memory-mapped. Raises UsageError if they contradict the plan."""
    return _map_file(path, shard_layout(plan, shard))


def _map_file(path: Path, expected: dict[str, tuple[torch.dtype, tuple[int | None, ...]]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged: {hub.error_summary(error)}") from None
    for name in {**expected, **tensors}:
        has = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else None
        if (
            name not in expected
            or has is None
            or has[0] != expected[name][0]
            or not _shape_matches(has[1], expected[name][1])
        ):
            raise UsageError(f"{path} is damaged: {name} is {has} where {expected.get(name)} is due")
    return tensors


def _shape_matches(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(d in (None, h) for h, d in zip(shape, expected, strict=True))


def files_fingerprint(files: Sequence[ShardFile]) -> str:
    """Return 16 hex digits of the files."""
    return hashlib.sha256("".join(shard.sha256 for shard in files).encode()).hexdigest()[:16]


def verify_cache(folder: str | Path, progress: ProgressCallback = lambda done, total: None) -> list[str]:
    """Read everything; return a line for each wrong file with the way to rewrite it, none if all is well.

    Raises:
        UsageError: There is no manifest.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    bad, lines, done, places = [], [], 0, []
    for shard in manifest.files:
        wrong = size_problem(folder, shard) or _digest_problem(folder, shard)
        if wrong is None:
            try:
                tensors = map_shard(folder / SHARD_DIR / shard.name, manifest.plan, shard)
                wrong = _content_problem(manifest, shard, tensors)
                places.append(tensors["index"].numpy())
            except UsageError as error:
                wrong = str(error)
        if wrong:
            bad.append(folder / SHARD_DIR / shard.name)
            lines.append(wrong)
        done += shard.rows
        progress(done, manifest.num_images)
    columns = folder / SHARD_DIR / COLUMNS_FILE
    if wrong := size_problem(folder, manifest.columns) or _digest_problem(folder, manifest.columns):
        bad.append(columns)
        lines.append(wrong)
    elif not bad:
        due, has = gather_columns(folder, manifest.plan, manifest.files), map_columns(columns, manifest)
        if differing := [name for name in COLUMN_TENSORS if not due[name].equal(has[name])]:
            bad.append(columns)
            lines.append(f"{columns}: {', '.join(differing)} are not those of the shards")
    if not bad and len(np.unique(np.concatenate(places))) != manifest.num_images:
        lines.append(f"{folder}: an image of the source is there twice")
    if manifest.num_images + len(manifest.unreadable) != manifest.num_source_images:
        lines.append(
            f"{folder / 'manifest.json'}: images and unreadable ones are not the {manifest.num_source_images} of the "
            "source"
        )
    if manifest.fingerprint != files_fingerprint(manifest.files):
        lines.append(f"{folder / 'manifest.json'}: its fingerprint is not that of its files")
    if lines:
        doomed = shlex.join(map(str, bad or [folder / "manifest.json"]))
        lines.append(
            f"What is deleted is made again, and nothing else:\n  rm -f {doomed}\n  "
            f"{cache_command(manifest.plan, folder)}"
        )
    return lines


def _digest_problem(folder: Path, shard: ShardFile | ColumnFile) -> str | None:
    path = folder / SHARD_DIR / shard.name
    try:
        return None if hub.sha256_files([path]) == shard.sha256 else f"{path} is damaged: its SHA-256 is another"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _content_problem(manifest: CacheManifest, shard: ShardFile, tensors: dict[str, Tensor]) -> str | None:
    """Return a description of contents that were wrong when the file was written, else None."""
    plan, r = manifest.plan, int(shard.name[6:].split("-")[0].split(".")[0])
    assert plan.images_per_shard is not None  # of a written cache
    start = r * plan.images_per_shard
    index, label, ends = (tensors[name].numpy() for name in ("index", "label", "caption_end"))
    problems = {
        "places in the source": (np.diff(index) <= 0).any()
        or not (start <= index[0] and index[-1] < min(start + plan.images_per_shard, manifest.num_source_images)),
        "classes": not ((label >= 0) & (label < max(len(manifest.class_names), 1))).all(),
        "ends of captions": (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(tensors["caption"]),
        "sizes": not (tensors["size"] > 0).all(),
    }
    if "tokens" in tensors:
        lengths = np.diff(tensors["token_end"].numpy(), prepend=0)
        problems["ends of texts"] = not (
            (lengths >= 0) & (lengths <= plan.semantic.max_tokens)
        ).all() or lengths.sum() != len(tensors["tokens"])
    for name in ("moments", "tokens", "pooled", "box", "tone"):
        # In parts, as isfinite of the whole would take as much memory again.
        if name in tensors and not all(bool(part.isfinite().all()) for part in tensors[name].split(256)):
            problems[f"numbers in {name}"] = True
    wrong = [name for name, is_wrong in problems.items() if is_wrong]
    return f"{SHARD_DIR}/{shard.name}: wrong {', '.join(wrong)}" if wrong else None
