"""The files of a cache: their names, what is in them, whether it is so. cache.py reads them, caching.py writes them.

OUT/manifest.json                  config.cache.Manifest, written last
OUT/plan.json                      config.cache.Started, there until then
OUT/shards/shard-000000.json       config.cache.Range, written after the files of its range of images
OUT/shards/shard-000000.safetensors, or one for each bucket, shard-000000-384x640.safetensors (pixels of height and width):
    pixels uint8 (n, K, C, H, W), or moments float16|float32 (n, K, 2c, h, w): means, then standard deviations, raw
    index, label int64 (n,); size int32 (n, 2); box float32 (n, K, 4); flip uint8 (n, K); tone float32 (n, K, 2)
    caption uint8, the bytes of all; caption_end int64 (n,)
    with text: tokens float16|float32 (sum of lengths, D); token_end int64 (n,); pooled (n, P)
OUT/shards/columns.safetensors     label to caption_end of all files, so that a reader need not open them to begin

`index` is the place in the source; what Samples call index is the place in the cache.

Legend: n images of a file, K views; C channels of pixels, H W of their size; c channels of latents, h w of theirs; D and P
channels of a token and of pooled text.
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

from gesso.config.cache import FORMAT, Columns, Manifest, Plan, Range, Shard, Started, command
from gesso.data import pretrained
from gesso.data.images import Progress
from gesso.errors import UsageError

SHARDS = "shards"
COLUMNS = "columns.safetensors"
SMALL = ("label", "size", "box", "flip", "tone", "caption", "caption_end")
TEXT = ("tokens", "token_end", "pooled")
NAME = re.compile(r"shard-\d{6,}(-\d+x\d+)?\.safetensors")


def shard_name(r: int, size: tuple[int, int] | None = None) -> str:
    """Of the file of range r; of a bucket where there are several."""
    return f"shard-{r:06d}.safetensors" if size is None else f"shard-{r:06d}-{size[0]}x{size[1]}.safetensors"


def is_cache(where: str | Path) -> bool:
    """Whether `gesso cache` wrote there, finished or not."""
    return any((Path(where) / name).is_file() for name in ("manifest.json", "plan.json"))


Record = TypeVar("Record", Manifest, Range, Started)


def record(path: Path, kind: type[Record]) -> Record:
    """A JSON file of the cache. Raises UsageError when it is damaged, or of another version."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {pretrained.brief(error)}") from None
    return understood(tree, path, kind)


def understood(tree: object, path: Path | str, kind: type[Record]) -> Record:
    """What a JSON file holds, checked; `path` is how errors name it."""
    version = tree.get("format") if isinstance(tree, dict) else None
    if kind is not Range and version != FORMAT:
        raise UsageError(f"{path}: written as {str(version)[:40]!r}, where {FORMAT!r} is read: make the cache anew")
    try:
        found = kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    hostile = [shard.name for shard in getattr(found, "files", ()) if not NAME.fullmatch(shard.name)]
    hostile += [found.columns.name] if kind is Manifest and found.columns.name != COLUMNS else []
    if hostile:
        raise UsageError(f"{path}: refused, for it names a file {hostile[0]!r}, which gesso cache never writes")
    return found


def opened_manifest(where: str | Path) -> Manifest:
    """Raises UsageError when the cache is missing, unfinished, of another version, damaged, or lacks files."""
    manifest = _manifest(Path(where))
    for shard in (*manifest.files, manifest.columns):
        if wrong := size_problem(Path(where), shard):
            raise UsageError(f"{wrong}; gesso cache --check {where} says more")
    return manifest


def _manifest(where: Path) -> Manifest:
    path = where / "manifest.json"
    if not path.is_file():
        if not (where / "plan.json").is_file():
            raise UsageError(f"{where} is no cache: it has no manifest.json; write one with gesso cache SOURCE {where}")
        begun = record(where / "plan.json", Started)
        raise UsageError(f"{where} is a cache that is not finished; go on with\n  {command(begun.plan, where)}")
    return counted(record(path, Manifest), path)


def counted(manifest: Manifest, path: Path | str) -> Manifest:
    """Raises UsageError when the files are not those that the plan makes of the images."""
    if manifest.num_images != sum(shard.rows for shard in manifest.files):
        raise UsageError(f"{path} is damaged: num_images is not the sum of the rows of its files")
    plan, text = manifest.plan, manifest.plan.semantic
    needed = [plan.shard_images, *([text.width, text.pooled_width] if text.kind == "text" else [])]
    if None in needed or (plan.dtype is None and (plan.latent.vae or text.kind == "text")):
        raise UsageError(f"{path} is damaged: its plan has gaps")
    sizes = manifest.plan.sizes()
    for shard in manifest.files:
        if (shard.height, shard.width) not in sizes or shard.shape != x_shape(
            manifest.plan, shard.rows, shard.height, shard.width
        ):
            raise UsageError(f"{path}: the shape {shard.shape} of {shard.name} is not what the plan of the cache makes")
    return manifest


def size_problem(where: Path, shard: Shard | Columns) -> str | None:
    path = where / SHARDS / shard.name
    try:
        has = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if has == shard.bytes else f"{path} has {has:,} bytes instead of {shard.bytes:,}"


def layout(plan: Plan, shard: Shard) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """Type and shape of each tensor of a file; None is any length."""
    n, K, stored = shard.rows, plan.views, getattr(torch, plan.dtype or "float32")
    found: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "moments" if plan.latent.vae else "pixels": (stored if plan.latent.vae else torch.uint8, shard.shape),
        "index": (torch.int64, (n,)), "label": (torch.int64, (n,)), "size": (torch.int32, (n, 2)),
        "box": (torch.float32, (n, K, 4)), "flip": (torch.uint8, (n, K)), "tone": (torch.float32, (n, K, 2)),
        "caption": (torch.uint8, (None,)), "caption_end": (torch.int64, (n,)),
    }  # fmt: skip
    if plan.semantic.kind == "text":
        width, pooled = plan.semantic.width, plan.semantic.pooled_width
        text = {"tokens": (stored, (None, width)), "token_end": (torch.int64, (n,)), "pooled": (stored, (n, pooled))}
        found |= text
    return found


def x_shape(plan: Plan, rows: int, height: int, width: int) -> tuple[int, ...]:
    """Of pixels or moments of a file whose views have that size in pixels."""
    if plan.latent.vae:
        f = plan.latent.factor
        return (rows, plan.views, 2 * plan.latent.channels, height // f, width // f)
    return (rows, plan.views, plan.data.channels, height, width)


def gathered(where: Path, plan: Plan, files: Sequence[Shard]) -> dict[str, Tensor]:
    """What COLUMNS holds."""
    parts = []
    for shard in files:
        found = mapped(where / SHARDS / shard.name, plan, shard)
        parts.append({name: found[name] for name in SMALL})
    columns = {name: torch.cat([part[name] for part in parts]) for name in SMALL}
    before = torch.tensor([0, *(len(part["caption"]) for part in parts)]).cumsum(0)
    columns["caption_end"] = torch.cat([part["caption_end"] + k for part, k in zip(parts, before, strict=False)])
    return columns


def mapped_columns(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Those of a cache, memory-mapped. Raises UsageError when they are not what the manifest says."""
    due = columns_layout(manifest)
    found = _mapped(path, due)
    ends = found["caption_end"].numpy()
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(found["caption"]):
        raise UsageError(f"{path} is damaged: its ends of captions do not rise to their length")
    return found


def columns_layout(manifest: Manifest) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """As `layout`, of COLUMNS."""
    rows = manifest.files[0].model_copy(update={"rows": manifest.num_images})
    return {name: due for name, due in layout(manifest.plan, rows).items() if name in SMALL}


def mapped(path: Path, plan: Plan, shard: Shard) -> dict[str, Tensor]:
    """Tensors of a file, memory-mapped. Raises UsageError when they are not what the plan says."""
    return _mapped(path, layout(plan, shard))


def _mapped(path: Path, due: dict[str, tuple[torch.dtype, tuple[int | None, ...]]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged: {pretrained.brief(error)}") from None
    for name in {**due, **found}:
        has = (found[name].dtype, tuple(found[name].shape)) if name in found else None
        if name not in due or has is None or has[0] != due[name][0] or not _fits(has[1], due[name][1]):
            raise UsageError(f"{path} is damaged: {name} is {has} where {due.get(name)} is due")
    return found


def _fits(has: tuple[int, ...], due: tuple[int | None, ...]) -> bool:
    return len(has) == len(due) and all(d in (None, h) for h, d in zip(has, due, strict=True))


def fingerprint_of(files: Sequence[Shard]) -> str:
    """16 hex digits."""
    return hashlib.sha256("".join(shard.sha256 for shard in files).encode()).hexdigest()[:16]


def check(where: str | Path, progress: Progress = lambda done, total: None) -> list[str]:
    """A line for each file that is wrong, and how it is made again; none where all is well.

    Reads everything. Raises UsageError where there is no manifest to check by.
    """
    where = Path(where)
    manifest = _manifest(where)
    bad, lines, done, places = [], [], 0, []
    for shard in manifest.files:
        wrong = size_problem(where, shard) or _digest_problem(where, shard)
        if wrong is None:
            try:
                found = mapped(where / SHARDS / shard.name, manifest.plan, shard)
                wrong = _content_problem(manifest, shard, found)
                places.append(found["index"].numpy())
            except UsageError as error:
                wrong = str(error)
        if wrong:
            bad.append(where / SHARDS / shard.name)
            lines.append(wrong)
        done += shard.rows
        progress(done, manifest.num_images)
    columns = where / SHARDS / COLUMNS
    if wrong := size_problem(where, manifest.columns) or _digest_problem(where, manifest.columns):
        bad.append(columns)
        lines.append(wrong)
    elif not bad:
        due, has = gathered(where, manifest.plan, manifest.files), mapped_columns(columns, manifest)
        if differing := [name for name in SMALL if not due[name].equal(has[name])]:
            bad.append(columns)
            lines.append(f"{columns}: {', '.join(differing)} are not those of the shards")
    if not bad and len(np.unique(np.concatenate(places))) != manifest.num_images:
        lines.append(f"{where}: an image of the source is there twice")
    if manifest.num_images + len(manifest.unreadable) != manifest.images:
        lines.append(
            f"{where / 'manifest.json'}: images and unreadable ones are not the {manifest.images} of the source"
        )
    if manifest.fingerprint != fingerprint_of(manifest.files):
        lines.append(f"{where / 'manifest.json'}: its fingerprint is not that of its files")
    if lines:
        doomed = shlex.join(map(str, bad or [where / "manifest.json"]))
        lines.append(
            f"What is deleted is made again, and nothing else:\n  rm -f {doomed}\n  {command(manifest.plan, where)}"
        )
    return lines


def _digest_problem(where: Path, shard: Shard | Columns) -> str | None:
    path = where / SHARDS / shard.name
    try:
        return None if pretrained.digest([path]) == shard.sha256 else f"{path} is damaged: its SHA-256 is another"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _content_problem(manifest: Manifest, shard: Shard, found: dict[str, Tensor]) -> str | None:
    """What was wrong already when a file was written."""
    plan, r = manifest.plan, int(shard.name[6:].split("-")[0].split(".")[0])
    start = r * plan.shard_images
    index, label, ends = (found[name].numpy() for name in ("index", "label", "caption_end"))
    problems = {
        "places in the source": (np.diff(index) <= 0).any()
        or not (start <= index[0] and index[-1] < min(start + plan.shard_images, manifest.images)),
        "classes": not ((label >= 0) & (label < max(len(manifest.class_names), 1))).all(),
        "ends of captions": (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(found["caption"]),
        "sizes": not (found["size"] > 0).all(),
    }
    if "tokens" in found:
        lengths = np.diff(found["token_end"].numpy(), prepend=0)
        problems["ends of texts"] = not (
            (lengths >= 0) & (lengths <= plan.semantic.tokens)
        ).all() or lengths.sum() != len(found["tokens"])
    for name in ("moments", "tokens", "pooled", "box", "tone"):
        # In parts, as isfinite of the whole would take as much memory again.
        if name in found and not all(bool(part.isfinite().all()) for part in found[name].split(256)):
            problems[f"numbers in {name}"] = True
    wrong = [name for name, is_wrong in problems.items() if is_wrong]
    return f"{SHARDS}/{shard.name}: wrong {', '.join(wrong)}" if wrong else None
