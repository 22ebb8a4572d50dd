"""Writing a cache: a source becomes files of pixels or latents, captions and their tokens (shards.py says which).

The bytes depend on the plan and the source alone: not on how often the work was stopped, nor on how many ranks share it.
Range r of the images is written by rank r % world; it is done when its sidecar is there.

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

from gesso import devices, files, torchrun
from gesso.config.cache import FORMAT, Columns, Manifest, Plan, Range, Shard, Started, Sums, command, flattened
from gesso.data import pretrained, shards, views
from gesso.data.images import Progress, refuse_many
from gesso.data.listing import shown
from gesso.data.sources import open_source
from gesso.data.views import Rows, Work
from gesso.errors import RunError, Stopped, Unreadable, UsageError

AHEAD = 4
"""images in work for each thread"""
PATIENCE = datetime.timedelta(days=30)
"""that a rank waits for the others while they live"""

Argument, Result = TypeVar("Argument"), TypeVar("Result")


def write(
    plan: Plan,
    out: Path,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
    caught: Sequence[int] = (),
) -> list[str]:
    """Write the cache that `plan` says to the folder `out`, or go on with it; returns lines on what is there then.

    progress counts the images of rank 0; a signal that turns up in `caught` stops the work. Raises UsageError for a
    plan that does not fit, or an `out` with other things in it; RunError for too many unreadable images, numbers that do
    not fit, or a disk that refuses; Stopped for a signal. Whatever happens, the same call goes on.
    """
    inside = Path(plan.data.source)
    if inside.is_dir() and out.resolve().is_relative_to(inside.resolve()):
        raise UsageError(f"{out} lies within the source {inside}: choose another place")
    if shards.is_cache(inside):
        raise UsageError(f"{inside} is a cache already: train on it with data.source={inside}")
    source = open_source(plan.data.source)
    with _ranks() as (rank, world, together):
        work = views.opened(plan, source, devices.named(device, "--device ", torchrun.place().local))
        vae, text = work.identities()
        started = Started(plan=work.plan, source=source.fingerprint(), images=len(source), vae=vae, text=text)
        for note in source.notes if rank == 0 else ():
            say(f"note: {note}")
        with files.locked(out, "writing") if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                _begin(out, started)
            together()
            if not (out / "manifest.json").is_file():
                _same(out, shards.record(out / "plan.json", Started), started)
                try:
                    _ranges(
                        work, out, started, rank, world, progress if rank == 0 else lambda done, total: None, caught
                    )
                except Stopped as stopped:
                    raise Stopped(f"{stopped}. Go on with\n  {command(plan, out)}", stopped.exit_code - 128) from None
                together()
                if rank == 0:
                    _finish(work, out, started, world)
            together()
            return _summary(shards.opened_manifest(out), out) if rank == 0 else []


def _summary(manifest: Manifest, out: Path) -> list[str]:
    plan, lines = manifest.plan, [f"left out: {name} ({reason})" for name, reason in manifest.unreadable[:10]]
    what = "latents" if plan.latent.vae else "pixels"
    shapes = " ".join(dict.fromkeys("x".join(map(str, shard.shape[2:])) for shard in manifest.files))
    size = sum(shard.bytes for shard in manifest.files)
    extra = [f"{len(manifest.unreadable):,} unreadable left out"] if manifest.unreadable else []
    extra += [f"{manifest.faces:,} faces blurred"] if plan.blur_faces else []
    each = f" of {plan.views} views each" if plan.views > 1 else ""
    told = "; ".join([f"{manifest.num_images:,} images{each}, {what} {shapes}, {size / 1e6:,.1f} MB", *extra])
    return [*lines, f"{out}: {told}", f"next:\n  gesso data {out}\n  gesso train RECIPE data.source={out}"]


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """Which of how many processes of one torchrun this is, and a call that returns when all of them have come to it."""
    rank, world, *_ = torchrun.place()
    if world == 1:
        yield 0, 1, lambda: None
        return
    from torch import distributed

    def together() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise RunError(f"rank {rank}: another rank ended before its time ({pretrained.brief(error)})") from None

    try:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"RANK={rank} WORLD_SIZE={world}, but the ranks do not find each other ({pretrained.brief(error)}): "
            "start them by torchrun -m gesso cache ..."
        ) from None
    try:
        yield rank, world, together
    finally:
        distributed.destroy_process_group()


def _begin(out: Path, started: Started) -> None:
    """Leave `out` with a plan, or with a manifest whose files are all there. Raises UsageError where it holds other things."""
    files.sweep(out)
    files.sweep(out / shards.SHARDS)
    plan, manifest = out / "plan.json", out / "manifest.json"
    strangers = [
        path.name for path in out.iterdir() if path.name not in ("plan.json", "manifest.json", ".lock", "shards")
    ]
    if strangers:
        raise UsageError(f"{out} holds other files ({shown(sorted(strangers))}); choose another place for the cache")
    if manifest.is_file():
        known = shards.record(manifest, Manifest)
        _same(out, known, started)
        if not any(shards.size_problem(out, shard) for shard in (*known.files, known.columns)):
            plan.unlink(missing_ok=True)
            return
        files.write_json(plan, started.model_dump(mode="json"))
        manifest.unlink()
        return
    if plan.is_file():
        _same(out, shards.record(plan, Started), started)
    files.write_json(plan, started.model_dump(mode="json"))


def _same(out: Path, known: Started, started: Started) -> None:
    """Raise UsageError where `out` holds what was planned in another way."""
    there, here = flattened(known), flattened(started)
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differing[:8])
        raise UsageError(
            f"{out} holds a cache of another plan, which cannot be gone on with:\n{lines}\n"
            f"Choose another place. That one was begun by\n  {command(known.plan, out)}"
        )


def _digest(started: Started) -> str:
    return hashlib.sha256(json.dumps(flattened(started), sort_keys=True).encode()).hexdigest()[:16]


def _bounds(started: Started) -> list[tuple[int, int]]:
    """First image of each range, and that after its last."""
    size = started.plan.shard_images
    return [(start, min(start + size, started.images)) for start in range(0, started.images, size)]


def _sidecar(out: Path, r: int) -> Path:
    return out / shards.SHARDS / f"shard-{r:06d}.json"


def _done(out: Path, started: Started, r: int) -> Range | None:
    """The sidecar of range r, if all that it says is there."""
    try:
        found = shards.record(_sidecar(out, r), Range)
    except UsageError:
        return None
    fits = found.plan == _digest(started) and (found.start, found.stop) == _bounds(started)[r]
    return found if fits and not any(shards.size_problem(out, shard) for shard in found.files) else None


def _ranges(
    work: Work, out: Path, started: Started, rank: int, world: int, progress: Progress, caught: Sequence[int]
) -> None:
    """Write the ranges of this rank that are not done."""
    bounds = _bounds(started)
    mine = {r: _done(out, started, r) for r in range(rank, len(bounds), world)}
    total = sum(bounds[r][1] - bounds[r][0] for r in mine)
    done = sum(found.stop - found.start for found in mine.values() if found)
    unreadable = [pair for found in mine.values() if found for pair in found.unreadable]
    todo, smallest = [r for r, found in mine.items() if found is None], views.least(work.plan)

    def arguments() -> Iterator[tuple]:
        for r in todo:
            start, stop = bounds[r]
            for i, u in zip(range(start, stop), views.draws(work.plan, start, stop), strict=True):
                yield work, i, u, smallest

    threads = max((os.cpu_count() or 1) // torchrun.place().per_node, 1)
    pool, writer, writing = ThreadPoolExecutor(threads, "decode"), ThreadPoolExecutor(1, "write"), None
    try:
        stream = _ahead(pool, lambda four: views.made(*four), arguments(), AHEAD * threads)
        for r in todo:
            rows: dict[int, Rows] = {}
            bad: list[tuple[str, str]] = []
            for _ in range(*bounds[r]):
                if caught:
                    name = signal.Signals(caught[0]).name
                    raise Stopped(f"{name}: {done:,} of {total:,} images were looked at", caught[0])
                image = next(stream)
                if isinstance(image, Unreadable):
                    bad.append((image.name, image.reason))
                else:
                    rows.setdefault(image.bucket, Rows(work)).add(image)
                done += 1
                progress(done, total)
            for some in rows.values():
                some.finish()
            if writing:
                writing.result()
            # While a range is written, the next one is decoded.
            writing = writer.submit(_write, work.plan, out, r, bounds[r], _digest(started), rows, bad)
            unreadable += bad
            refuse_many(unreadable, started.images, work.plan.data)
        if writing:
            writing.result()
    finally:
        pool.shutdown(cancel_futures=True)
        writer.shutdown()


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Argument], Result], arguments: Iterable[Argument], depth: int
) -> Iterator[Result]:
    """As map, in order, with at most `depth` results that wait."""
    waiting: deque[Future[Result]] = deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(
    plan: Plan,
    out: Path,
    r: int,
    bounds: tuple[int, int],
    digest: str,
    rows: dict[int, Rows],
    bad: list[tuple[str, str]],
) -> None:
    """The files of range r, and then its sidecar."""
    sizes, written, sums, blurred = plan.sizes(), [], Sums(), 0
    for bucket in sorted(rows):
        tensors, size = rows[bucket].tensors(), sizes[bucket]
        path = out / shards.SHARDS / shards.shard_name(r, size if plan.buckets > 1 else None)
        shape = tuple(tensors["moments" if plan.latent.vae else "pixels"].shape)
        with files.whole(path) as temporary:
            # One entry of metadata: several have no fixed order.
            save_file(tensors, temporary, {"format": FORMAT})
            count, checksum = temporary.stat().st_size, pretrained.digest([temporary])
        written.append(
            Shard(
                name=path.name, rows=shape[0], height=size[0], width=size[1], shape=shape, bytes=count, sha256=checksum
            )
        )
        sums = views.added(sums, rows[bucket].sums)
        blurred += sum(image.faces for image in rows[bucket].made)
    found = Range(plan=digest, start=bounds[0], stop=bounds[1], files=written, unreadable=bad, faces=blurred, sums=sums)
    files.write_json(_sidecar(out, r), found.model_dump(mode="json"))


def _columns(plan: Plan, out: Path, written: Sequence[Shard]) -> Columns:
    with files.whole(out / shards.SHARDS / shards.COLUMNS) as temporary:
        save_file(shards.gathered(out, plan, written), temporary, {"format": FORMAT})
        return Columns(name=shards.COLUMNS, bytes=temporary.stat().st_size, sha256=pretrained.digest([temporary]))


def _finish(work: Work, out: Path, started: Started, world: int) -> None:
    """The manifest, from the sidecars of all ranks."""
    ranges, sums = [], Sums()
    for r in range(len(_bounds(started))):
        found = _done(out, started, r)
        if found is None:
            raise RunError(
                f"{_sidecar(out, r)}, which rank {r % world} was to write, is not there, or not in this file system"
            )
        ranges.append(found)
        sums = views.added(sums, found.sums)
    unreadable = [pair for found in ranges for pair in found.unreadable]
    refuse_many(unreadable, started.images, work.plan.data)
    if len(unreadable) == started.images:
        raise RunError(f"no image of {work.plan.data.source} can be read")
    written = [shard for found in ranges for shard in found.files]
    mean, std = views.moments(sums, work.plan.latent.vae is not None)
    manifest = Manifest(
        **dict(started),
        num_images=started.images - len(unreadable),
        class_names=work.source.class_names,
        mean=mean,
        std=std,
        unreadable=unreadable,
        faces=sum(found.faces for found in ranges),
        files=written,
        columns=_columns(work.plan, out, written),
        fingerprint=shards.fingerprint_of(written),
    )
    files.write_json(out / "manifest.json", manifest.model_dump(mode="json"))
    (out / "plan.json").unlink(missing_ok=True)
