"""Write a cache: shards of pixels or latents, captions and tokens (format.py describes them).

The bytes depend on the plan and the source alone, not on interruptions or the number of ranks. Range r of the images is
written by rank r % world_size; it is complete when its record exists.
"""

import contextlib
import datetime
import hashlib
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from safetensors.torch import save_file

from gesso import atomic_io, devices
from gesso.data import crops
from gesso.data.cache import encode, format
from gesso.data.cache.encode import CacheJob, ShardBuilder
from gesso.data.cache.plan import (
    FORMAT,
    CacheHeader,
    CacheManifest,
    CachePlan,
    ColumnFile,
    MomentSums,
    ShardFile,
    ShardRecord,
    cache_command,
    identity_settings,
)
from gesso.data.encoders import hub
from gesso.data.in_memory import ProgressCallback, check_unreadable
from gesso.data.sources import open_source
from gesso.data.sources.base import format_names
from gesso.errors import RunError, StoppedError, UnreadableImageError, UsageError, error_summary

IN_FLIGHT_PER_THREAD = 4
"""Images in progress per thread."""
BARRIER_TIMEOUT = datetime.timedelta(days=30)
"""Timeout of a rank that waits for live ranks."""

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def write_cache(
    plan: CachePlan,
    out: Path,
    device: str = "auto",
    progress: ProgressCallback = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
    received_signals: Sequence[int] = (),
) -> list[str]:
    """Write the cache of a plan to the folder `out`, or continue an incomplete one; return lines that describe it.

    Args:
        plan: The plan.
        out: The folder.
        device: Device of the encoders.
        progress: Called on rank 0 as progress(done, total), with numbers of images of that rank.
        log: Called with lines of information.
        received_signals: Sequence that a signal handler appends to; writing stops when it is not empty.

    Raises:
        UsageError: The plan is not valid, or `out` contains other files.
        RunError: Too many images are unreadable, values overflow, or the disk is full or not writable.
        StoppedError: A signal was received. The same call continues after any error.
    """
    source_path = Path(plan.data.source)
    if source_path.is_dir() and out.resolve().is_relative_to(source_path.resolve()):
        raise UsageError(f"{out} is inside the source {source_path}: choose another folder")
    if format.is_cache(source_path):
        raise UsageError(f"{source_path} is a cache already: train on it with data.source={source_path}")
    source = open_source(plan.data.source)
    with _init_ranks() as (rank, world_size, barrier):
        local_rank = devices.rank_from_env().local_rank
        job = encode.open_job(plan, source, devices.resolve_device(device, "--device ", local_rank))
        vae, text = job.identities()
        header = CacheHeader(
            plan=job.plan,
            source_fingerprint=source.fingerprint(),
            source_content=source.content_hash() or None,
            num_source_images=len(source),
            vae=vae,
            text_encoder=text,
        )
        for note in source.notes if rank == 0 else ():
            log(f"note: {note}")
        with atomic_io.lock_dir(out, "writing") if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                _prepare_folder(out, header)
            barrier()
            if not (out / "manifest.json").is_file():
                _check_same_settings(out, format.read_record(out / "plan.json", CacheHeader), header)
                rank_progress = progress if rank == 0 else lambda done, total: None
                try:
                    _write_missing_ranges(job, out, header, rank, world_size, rank_progress, received_signals)
                except StoppedError as error:
                    raise StoppedError(
                        f"{error}. Continue with\n  {cache_command(plan, out)}", error.exit_code - 128
                    ) from None
                barrier()
                if rank == 0:
                    _write_manifest(job, out, header, world_size)
            barrier()
            return _summary(format.open_manifest(out), out) if rank == 0 else []


def _summary(manifest: CacheManifest, out: Path) -> list[str]:
    plan, lines = manifest.plan, [f"unreadable: {name} ({reason})" for name, reason in manifest.unreadable[:10]]
    shapes = " ".join(dict.fromkeys("x".join(map(str, shard.shape[2:])) for shard in manifest.files))
    size = atomic_io.format_bytes(sum(shard.bytes for shard in manifest.files))
    views = f" of {plan.views} views each" if plan.views > 1 else ""
    parts = [f"{manifest.num_images:,} images{views}, {'latents' if plan.latent.vae else 'pixels'} {shapes}, {size}"]
    parts += [f"{len(manifest.unreadable):,} unreadable images excluded"] if manifest.unreadable else []
    parts += [f"{manifest.num_faces:,} faces blurred"] if plan.blur_faces else []
    return [
        *lines,
        f"{out}: {'; '.join(parts)}",
        f"next:\n  gesso inspect {out}\n  gesso train RECIPE data.source={out}",
    ]


@contextlib.contextmanager
def _init_ranks() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """Yield the rank and world size of this torchrun, and a barrier."""
    rank, world_size, *_ = devices.rank_from_env()
    if world_size == 1:
        yield 0, 1, lambda: None
        return
    from torch import distributed

    def barrier() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise RunError(f"rank {rank}: another rank exited ({error_summary(error)})") from None

    try:
        distributed.init_process_group("gloo", timeout=BARRIER_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"RANK={rank} WORLD_SIZE={world_size}, but the ranks cannot connect ({error_summary(error)}): "
            "start them with torchrun -m gesso cache ..."
        ) from None
    try:
        yield rank, world_size, barrier
    finally:
        distributed.destroy_process_group()


def _prepare_folder(out: Path, header: CacheHeader) -> None:
    """Write plan.json, or keep a manifest with all its files; raise UsageError if `out` contains other files."""
    atomic_io.remove_leftovers(out)
    atomic_io.remove_leftovers(out / format.SHARD_DIR)
    plan_path, manifest_path = out / "plan.json", out / "manifest.json"
    expected = ("plan.json", "manifest.json", ".lock", format.SHARD_DIR)
    if unexpected := sorted(path.name for path in out.iterdir() if path.name not in expected):
        raise UsageError(f"{out} contains other files ({format_names(unexpected)}); choose another folder")
    if manifest_path.is_file():
        manifest = format.read_record(manifest_path, CacheManifest)
        _check_same_settings(out, manifest, header)
        if not format.size_problems(out, (*manifest.files, manifest.columns)):
            plan_path.unlink(missing_ok=True)
            return
    elif plan_path.is_file():
        _check_same_settings(out, format.read_record(plan_path, CacheHeader), header)
    atomic_io.write_json(plan_path, header.model_dump(mode="json"))
    manifest_path.unlink(missing_ok=True)


def _check_same_settings(out: Path, stored: CacheHeader, header: CacheHeader) -> None:
    """Raise UsageError if the cache in `out` has other settings."""
    old, new = identity_settings(stored), identity_settings(header)
    if stored.source_content is None:
        del old["source_content"], new["source_content"]
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {old.get(name)!r} stored, {new.get(name)!r} now" for name in differing[:8])
        raise UsageError(
            f"the cache in {out} was made with different settings:\n{lines}\n"
            f"Choose another folder, or use the same settings:\n  {cache_command(stored.plan, out)}"
        )


def _settings_digest(header: CacheHeader) -> str:
    return hashlib.sha256(json.dumps(identity_settings(header), sort_keys=True).encode()).hexdigest()[:16]


def _range_bounds(header: CacheHeader) -> list[tuple[int, int]]:
    """Return the first image of each range and the end of the range."""
    size = header.plan.images_per_shard
    assert size is not None  # of a complete plan
    return [(start, min(start + size, header.num_source_images)) for start in range(0, header.num_source_images, size)]


def _record_path(out: Path, r: int) -> Path:
    return out / format.SHARD_DIR / f"shard-{r:06d}.json"


def _completed_record(out: Path, header: CacheHeader, r: int) -> ShardRecord | None:
    """Return the record of range r if all its files exist, else None."""
    try:
        record = format.read_record(_record_path(out, r), ShardRecord)
    except UsageError:
        return None
    matches = record.plan_digest == _settings_digest(header) and (record.start, record.stop) == _range_bounds(header)[r]
    return record if matches and not format.size_problems(out, record.files) else None


def _write_missing_ranges(
    job: CacheJob,
    out: Path,
    header: CacheHeader,
    rank: int,
    world_size: int,
    progress: ProgressCallback,
    received_signals: Sequence[int],
) -> None:
    """Write the missing ranges of this rank."""
    bounds = _range_bounds(header)
    records = {r: _completed_record(out, header, r) for r in range(rank, len(bounds), world_size)}
    total = sum(bounds[r][1] - bounds[r][0] for r in records)
    done = sum(record.stop - record.start for record in records.values() if record)
    unreadable = [pair for record in records.values() if record for pair in record.unreadable]
    missing = [r for r, record in records.items() if record is None]
    min_edge = crops.min_decode_edge(job.plan.data, max(map(max, job.plan.bucket_sizes())))

    def arguments() -> Iterator[tuple]:
        for r in missing:
            uniforms = encode.view_uniforms(job.plan.seed, job.plan.views, *bounds[r])
            for i, u in zip(range(*bounds[r]), uniforms, strict=True):
                yield job, i, u, min_edge

    threads = max((os.cpu_count() or 1) // devices.rank_from_env().local_world_size, 1)
    pool, writer, writing = ThreadPoolExecutor(threads, "decode"), ThreadPoolExecutor(1, "write"), None
    try:
        images = _map_ahead(pool, lambda args: encode.encode_image(*args), arguments(), IN_FLIGHT_PER_THREAD * threads)
        for r in missing:
            builders: dict[int, ShardBuilder] = {}  # by bucket
            range_unreadable: list[tuple[str, str]] = []
            for _ in range(*bounds[r]):
                if received_signals:
                    name = signal.Signals(received_signals[0]).name
                    raise StoppedError(f"{name}: stopped after {done:,} of {total:,} images", received_signals[0])
                image = next(images)
                if isinstance(image, UnreadableImageError):
                    range_unreadable.append((image.name, image.reason))
                else:
                    builders.setdefault(image.bucket, ShardBuilder(job)).add(image)
                done += 1
                progress(done, total)
            for builder in builders.values():
                builder.finish()
            if writing:
                writing.result()
            # The next range is decoded while this one is written.
            digest = _settings_digest(header)
            writing = writer.submit(_write_range, job.plan, out, r, bounds[r], digest, builders, range_unreadable)
            unreadable += range_unreadable
            check_unreadable(unreadable, header.num_source_images, job.plan.data)
        if writing:
            writing.result()
    finally:
        pool.shutdown(cancel_futures=True)
        writer.shutdown()


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Argument], Result], arguments: Iterable[Argument], depth: int
) -> Iterator[Result]:
    """Yield the results of `function` in order, with at most `depth` pending."""
    pending: deque[Future[Result]] = deque()
    for argument in arguments:
        pending.append(pool.submit(function, argument))
        if len(pending) >= depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _write_range(
    plan: CachePlan,
    out: Path,
    r: int,
    bounds: tuple[int, int],
    digest: str,
    builders: dict[int, ShardBuilder],
    unreadable: list[tuple[str, str]],
) -> None:
    """Write the shards of range r, then its record."""
    sizes, shards, sums, num_faces = plan.bucket_sizes(), [], MomentSums(), 0
    for bucket, builder in sorted(builders.items()):
        tensors, size = builder.tensors(), sizes[bucket]
        path = out / format.SHARD_DIR / format.shard_name(r, size if plan.buckets > 1 else None)
        shape = tuple(tensors["moments" if plan.latent.vae else "pixels"].shape)
        with atomic_io.atomic_file(path) as temporary:
            # Only one entry of metadata, since several have no fixed order.
            save_file(tensors, temporary, {"format": FORMAT})
            num_bytes, sha256 = temporary.stat().st_size, hub.sha256_files([temporary])
        shards.append(
            ShardFile(
                name=path.name,
                rows=shape[0],
                height=size[0],
                width=size[1],
                shape=shape,
                bytes=num_bytes,
                sha256=sha256,
            )
        )
        sums = encode.add_sums(sums, builder.sums)
        num_faces += sum(image.num_faces for image in builder.images)
    record = ShardRecord(
        plan_digest=digest,
        start=bounds[0],
        stop=bounds[1],
        files=shards,
        unreadable=unreadable,
        num_faces=num_faces,
        sums=sums,
    )
    atomic_io.write_json(_record_path(out, r), record.model_dump(mode="json"))


def _write_columns(plan: CachePlan, out: Path, shards: Sequence[ShardFile]) -> ColumnFile:
    with atomic_io.atomic_file(out / format.SHARD_DIR / format.COLUMNS_FILE) as temporary:
        save_file(format.gather_columns(out, plan, shards), temporary, {"format": FORMAT})
        return ColumnFile(
            name=format.COLUMNS_FILE, bytes=temporary.stat().st_size, sha256=hub.sha256_files([temporary])
        )


def _write_manifest(job: CacheJob, out: Path, header: CacheHeader, world_size: int) -> None:
    """Write the manifest from the records of all ranks."""
    records, sums = [], MomentSums()
    for r in range(len(_range_bounds(header))):
        record = _completed_record(out, header, r)
        if record is None:
            raise RunError(
                f"rank {r % world_size} did not write {_record_path(out, r)}: check that all ranks use one file system"
            )
        records.append(record)
        sums = encode.add_sums(sums, record.sums)
    unreadable = [pair for record in records for pair in record.unreadable]
    check_unreadable(unreadable, header.num_source_images, job.plan.data)
    if len(unreadable) == header.num_source_images:
        raise RunError(f"no image of {job.plan.data.source} can be read")
    shards = [shard for record in records for shard in record.files]
    mean, std = encode.channel_stats(sums, job.plan.latent.vae is not None)
    manifest = CacheManifest(
        **dict(header),
        num_images=header.num_source_images - len(unreadable),
        class_names=job.source.class_names,
        mean=mean,
        std=std,
        unreadable=unreadable,
        num_faces=sum(record.num_faces for record in records),
        files=shards,
        columns=_write_columns(job.plan, out, shards),
        fingerprint=format.files_fingerprint(shards),
    )
    atomic_io.write_json(out / "manifest.json", manifest.model_dump(mode="json"))
    (out / "plan.json").unlink(missing_ok=True)
