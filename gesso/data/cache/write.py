"""Write a cache: files of pixels or latents, captions and tokens (format.py describes them).

The bytes depend on the plan and the source alone, not on interruptions or the number of ranks. Range r of the images is
written by rank r % world; it is complete when its record exists.

Legend: N images.
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
from gesso.errors import RunError, StoppedError, UnreadableImageError, UsageError

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
    """Write the cache of a plan to the folder `out`, or continue it; return lines that describe it.

    Args:
        plan: The plan.
        out: The folder.
        device: Device of the encoders.
        progress: Receives the numbers of finished and of all images of rank 0.
        log: Receives lines of information.
        received_signals: Signals; any signal in it stops the work.

    Raises:
        UsageError: The plan is not valid, or `out` contains other files.
        RunError: Too many images are unreadable, values overflow, or the disk is full or not writable.
        StoppedError: A signal arrived. The same call continues after any error.
    """
    inside = Path(plan.data.source)
    if inside.is_dir() and out.resolve().is_relative_to(inside.resolve()):
        raise UsageError(f"{out} lies within the source {inside}: choose another place")
    if format.is_cache(inside):
        raise UsageError(f"{inside} is a cache already: train on it with data.source={inside}")
    source = open_source(plan.data.source)
    with _init_ranks() as (rank, world, together):
        work = encode.open_job(
            plan, source, devices.resolve_device(device, "--device ", devices.rank_from_env().local_rank)
        )
        vae, text = work.identities()
        started = CacheHeader(
            plan=work.plan,
            source_fingerprint=source.fingerprint(),
            num_source_images=len(source),
            vae=vae,
            text_encoder=text,
        )
        for note in source.notes if rank == 0 else ():
            log(f"note: {note}")
        with atomic_io.lock_dir(out, "writing") if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                _prepare_folder(out, started)
            together()
            if not (out / "manifest.json").is_file():
                _check_same_settings(out, format.read_record(out / "plan.json", CacheHeader), started)
                try:
                    _write_missing_ranges(
                        work,
                        out,
                        started,
                        rank,
                        world,
                        progress if rank == 0 else lambda done, total: None,
                        received_signals,
                    )
                except StoppedError as stopped:
                    raise StoppedError(
                        f"{stopped}. Go on with\n  {cache_command(plan, out)}", stopped.exit_code - 128
                    ) from None
                together()
                if rank == 0:
                    _write_manifest(work, out, started, world)
            together()
            return _summary(format.open_manifest(out), out) if rank == 0 else []


def _summary(manifest: CacheManifest, out: Path) -> list[str]:
    plan, lines = manifest.plan, [f"left out: {name} ({reason})" for name, reason in manifest.unreadable[:10]]
    what = "latents" if plan.latent.vae else "pixels"
    shapes = " ".join(dict.fromkeys("x".join(map(str, shard.shape[2:])) for shard in manifest.files))
    size = sum(shard.bytes for shard in manifest.files)
    extra = [f"{len(manifest.unreadable):,} unreadable left out"] if manifest.unreadable else []
    extra += [f"{manifest.num_faces:,} faces blurred"] if plan.blur_faces else []
    each = f" of {plan.views} views each" if plan.views > 1 else ""
    description = "; ".join([f"{manifest.num_images:,} images{each}, {what} {shapes}, {size / 1e6:,.1f} MB", *extra])
    return [*lines, f"{out}: {description}", f"next:\n  gesso inspect {out}\n  gesso train RECIPE data.source={out}"]


@contextlib.contextmanager
def _init_ranks() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """Yield rank and number of processes of this torchrun, and a barrier."""
    rank, world, *_ = devices.rank_from_env()
    if world == 1:
        yield 0, 1, lambda: None
        return
    from torch import distributed

    def together() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise RunError(f"rank {rank}: another rank ended before its time ({hub.error_summary(error)})") from None

    try:
        distributed.init_process_group("gloo", timeout=BARRIER_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"RANK={rank} WORLD_SIZE={world}, but the ranks do not find each other ({hub.error_summary(error)}): "
            "start them by torchrun -m gesso cache ..."
        ) from None
    try:
        yield rank, world, together
    finally:
        distributed.destroy_process_group()


def _prepare_folder(out: Path, header: CacheHeader) -> None:
    """Leave `out` with a plan, or a manifest with all its files. Raises UsageError if it contains other files."""
    atomic_io.remove_leftovers(out)
    atomic_io.remove_leftovers(out / format.SHARD_DIR)
    plan, manifest = out / "plan.json", out / "manifest.json"
    strangers = [
        path.name for path in out.iterdir() if path.name not in ("plan.json", "manifest.json", ".lock", "shards")
    ]
    if strangers:
        raise UsageError(
            f"{out} holds other files ({format_names(sorted(strangers))}); choose another place for the cache"
        )
    if manifest.is_file():
        known = format.read_record(manifest, CacheManifest)
        _check_same_settings(out, known, header)
        shards: tuple[ShardFile | ColumnFile, ...] = (*known.files, known.columns)
        if not any(format.size_problem(out, shard) for shard in shards):
            plan.unlink(missing_ok=True)
            return
        atomic_io.write_json(plan, header.model_dump(mode="json"))
        manifest.unlink()
        return
    if plan.is_file():
        _check_same_settings(out, format.read_record(plan, CacheHeader), header)
    atomic_io.write_json(plan, header.model_dump(mode="json"))


def _check_same_settings(out: Path, stored: CacheHeader, header: CacheHeader) -> None:
    """Raise UsageError if `out` was planned with other settings."""
    there, here = identity_settings(stored), identity_settings(header)
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differing[:8])
        raise UsageError(
            f"{out} holds a cache of another plan, which cannot be gone on with:\n{lines}\n"
            f"Choose another place. That one was begun by\n  {cache_command(stored.plan, out)}"
        )


def _settings_digest(header: CacheHeader) -> str:
    return hashlib.sha256(json.dumps(identity_settings(header), sort_keys=True).encode()).hexdigest()[:16]


def _range_bounds(header: CacheHeader) -> list[tuple[int, int]]:
    """Return the first image of each range, and the end of the last."""
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
    fits = record.plan_digest == _settings_digest(header) and (record.start, record.stop) == _range_bounds(header)[r]
    return record if fits and not any(format.size_problem(out, shard) for shard in record.files) else None


def _write_missing_ranges(
    job: CacheJob,
    out: Path,
    header: CacheHeader,
    rank: int,
    world: int,
    progress: ProgressCallback,
    received_signals: Sequence[int],
) -> None:
    """Write the missing ranges of this rank."""
    bounds = _range_bounds(header)
    mine = {r: _completed_record(out, header, r) for r in range(rank, len(bounds), world)}
    total = sum(bounds[r][1] - bounds[r][0] for r in mine)
    done = sum(record.stop - record.start for record in mine.values() if record)
    unreadable = [pair for record in mine.values() if record for pair in record.unreadable]
    todo, smallest = [r for r, record in mine.items() if record is None], encode.min_decode_edge(job.plan)

    def arguments() -> Iterator[tuple]:
        for r in todo:
            start, stop = bounds[r]
            for i, u in zip(range(start, stop), encode.view_uniforms(job.plan, start, stop), strict=True):
                yield job, i, u, smallest

    threads = max((os.cpu_count() or 1) // devices.rank_from_env().local_world_size, 1)
    pool, writer, writing = ThreadPoolExecutor(threads, "decode"), ThreadPoolExecutor(1, "write"), None
    try:
        stream = _map_ahead(pool, lambda four: encode.encode_image(*four), arguments(), IN_FLIGHT_PER_THREAD * threads)
        for r in todo:
            rows: dict[int, ShardBuilder] = {}
            bad: list[tuple[str, str]] = []
            for _ in range(*bounds[r]):
                if received_signals:
                    name = signal.Signals(received_signals[0]).name
                    raise StoppedError(f"{name}: {done:,} of {total:,} images were looked at", received_signals[0])
                image = next(stream)
                if isinstance(image, UnreadableImageError):
                    bad.append((image.name, image.reason))
                else:
                    rows.setdefault(image.bucket, ShardBuilder(job)).add(image)
                done += 1
                progress(done, total)
            for some in rows.values():
                some.finish()
            if writing:
                writing.result()
            # While a range is written, the next one is decoded.
            writing = writer.submit(_write_range, job.plan, out, r, bounds[r], _settings_digest(header), rows, bad)
            unreadable += bad
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
    waiting: deque[Future[Result]] = deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_range(
    plan: CachePlan,
    out: Path,
    r: int,
    bounds: tuple[int, int],
    digest: str,
    rows: dict[int, ShardBuilder],
    unreadable: list[tuple[str, str]],
) -> None:
    """Write the files of range r, then its record."""
    sizes, written, sums, blurred = plan.bucket_sizes(), [], MomentSums(), 0
    for bucket in sorted(rows):
        tensors, size = rows[bucket].tensors(), sizes[bucket]
        path = out / format.SHARD_DIR / format.shard_name(r, size if plan.buckets > 1 else None)
        shape = tuple(tensors["moments" if plan.latent.vae else "pixels"].shape)
        with atomic_io.atomic_file(path) as temporary:
            # One entry of metadata: several have no fixed order.
            save_file(tensors, temporary, {"format": FORMAT})
            count, checksum = temporary.stat().st_size, hub.sha256_files([temporary])
        written.append(
            ShardFile(
                name=path.name, rows=shape[0], height=size[0], width=size[1], shape=shape, bytes=count, sha256=checksum
            )
        )
        sums = encode.add_sums(sums, rows[bucket].sums)
        blurred += sum(image.num_faces for image in rows[bucket].images)
    record = ShardRecord(
        plan_digest=digest,
        start=bounds[0],
        stop=bounds[1],
        files=written,
        unreadable=unreadable,
        num_faces=blurred,
        sums=sums,
    )
    atomic_io.write_json(_record_path(out, r), record.model_dump(mode="json"))


def _write_columns(plan: CachePlan, out: Path, shards: Sequence[ShardFile]) -> ColumnFile:
    with atomic_io.atomic_file(out / format.SHARD_DIR / format.COLUMNS_FILE) as temporary:
        save_file(format.gather_columns(out, plan, shards), temporary, {"format": FORMAT})
        return ColumnFile(
            name=format.COLUMNS_FILE, bytes=temporary.stat().st_size, sha256=hub.sha256_files([temporary])
        )


def _write_manifest(job: CacheJob, out: Path, header: CacheHeader, world: int) -> None:
    """Write the manifest from the records of all ranks."""
    ranges, sums = [], MomentSums()
    for r in range(len(_range_bounds(header))):
        shard_record = _completed_record(out, header, r)
        if shard_record is None:
            raise RunError(
                f"{_record_path(out, r)}, which rank {r % world} was to write, is not there, or not in this file system"
            )
        ranges.append(shard_record)
        sums = encode.add_sums(sums, shard_record.sums)
    unreadable = [pair for shard_record in ranges for pair in shard_record.unreadable]
    check_unreadable(unreadable, header.num_source_images, job.plan.data)
    if len(unreadable) == header.num_source_images:
        raise RunError(f"no image of {job.plan.data.source} can be read")
    written = [shard for shard_record in ranges for shard in shard_record.files]
    mean, std = encode.channel_stats(sums, job.plan.latent.vae is not None)
    manifest = CacheManifest(
        **dict(header),
        num_images=header.num_source_images - len(unreadable),
        class_names=job.source.class_names,
        mean=mean,
        std=std,
        unreadable=unreadable,
        num_faces=sum(record.num_faces for record in ranges),
        files=written,
        columns=_write_columns(job.plan, out, written),
        fingerprint=format.files_fingerprint(written),
    )
    atomic_io.write_json(out / "manifest.json", manifest.model_dump(mode="json"))
    (out / "plan.json").unlink(missing_ok=True)
