"""What a run will need, from some real steps on the real device: memory, images a second, days, disk. Nothing is written."""

import os
import resource
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gesso import devices, nets
from gesso.config import Run
from gesso.data.batches import Batches
from gesso.data.imagined import imagined, is_there
from gesso.data.samples import Dataset
from gesso.files import in_bytes
from gesso.train import optim
from gesso.train.loop import crossed
from gesso.train.ranks import Ranks, joined, own
from gesso.train.start import exactly, opened
from gesso.train.trainer import Trainer

STEPS, WARM_UP, SECONDS = 20, 2, 60.0
"""timed steps; steps before them; what all of them together may take, but for one"""
LINE = 200
"""bytes of a line of the log, about"""


@dataclass
class Measured:
    """Of steps of `batch` images, all in seconds and bytes; peaks: of a rank, by the samples that went through at once."""

    batch: int = 0
    steps: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    peaks: dict[int, int] = field(default_factory=dict)

    def step_times(self, batch: int) -> list[float]:
        """Of steps of another size: passes take their time for every image, the update takes it once."""
        return [t - p + p * batch / self.batch for t, p in zip(self.steps, self.passes, strict=True)]

    def peak(self, held: int, at_once: int) -> int:
        """With so many samples at once: what is held, and activations, which grow with their number."""
        if at_once in self.peaks:
            return self.peaks[at_once]
        (fewer, low), (most, high) = (
            sorted(self.peaks.items())[-2:] if len(self.peaks) > 1 else ((0, held), *self.peaks.items())
        )
        return max(high, round(low + (high - low) * (at_once - fewer) / (most - fewer)))


def estimate(run: Run, console: Console, seconds: float = SECONDS) -> list[str]:
    """Lines for the user. Under torchrun all ranks take part, and the largest of their memories is said.

    Raises UsageError as training does, RunError where not one sample fits into memory.
    """
    exactly(run)
    with joined(run) as (ranks, device):
        devices.check_precision(device, "train.precision", run.train.precision)
        quiet = console if ranks.main else Console(quiet=True)
        real = is_there(run.data.source)
        run, dataset = opened(run, quiet) if real else imagined(run)
        optim.check(run)
        state, least = arithmetic(run), sum(on_device(run, device, ranks.world).values())
        # Of a processor's memory half, for what lies beside and for other programs, which would be the ones to be killed.
        room = available(device) / (1 if device.type == "cuda" else 2 * ranks.per_node)
        if least > room:
            return [
                f"{run.recipe}: not measured, as {in_bytes(least)} of a rank are more than the {in_bytes(room)} that are free here",
                f"  memory   {said(on_device(run, device, ranks.world))}, and activations",
                disk_line(run, state["weights"], sum(state.values()) - state["gradients"]),
            ]
        found = stepped(run, dataset, ranks, device, seconds)
    where = (
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, {ranks.world} rank"
        + "s" * (ranks.world > 1)
    )
    head = f"{run.recipe} on {where}: {len(found.measured.steps)} steps of {found.measured.batch:,} images"
    if not real:
        head += f", random ones (data.source={run.data.source or '(none)'} is not there)"
    return [
        head,
        *memory_lines(run, found.parts, found.peak, found.at_once, found.measured, device),
        *time_lines(run, found.measured),
        disk_line(run, found.weights, found.tensors),
    ]


class Stepped(NamedTuple):
    """What some real steps showed: memory by part and its peak in bytes, samples at once; bytes of weights and of a state."""

    measured: Measured
    parts: dict[str, int]
    peak: int
    at_once: int
    weights: int
    tensors: int


def stepped(run: Run, dataset: Dataset, ranks: Ranks, device: torch.device, seconds: float) -> Stepped:
    """Take the steps. The trainer ends with this function, before the ranks part."""
    before = peak_memory(device)
    trainer = Trainer(run, dataset, ranks, device)
    measured = measure(trainer, seconds)
    parts = held(trainer)
    share = -(-run.train.batch_size // ranks.world)
    at_once = min(run.train.micro_batch or share, share)
    if device.type == "cuda" and run.train.micro_batch is None:
        at_once = max(measured.peaks)  # what training itself would find
    # A process that had held more before, as a library's caller may have, shows no peak.
    peak = max(sum(parts.values()), measured.peak(sum(parts.values()) + before, at_once) - before)
    peak = round(max(ranks.gathered(peak, device)))
    tensors = sum(t.numel() * t.itemsize for t in trainer.tensors().values())
    weights = sum(t.numel() * t.itemsize for t in next(iter(trainer.ema.averages.values())).values())
    return Stepped(measured, parts, peak, at_once, weights, tensors)


def arithmetic(run: Run) -> dict[str, int]:
    """Bytes of all that is held of a run whose data have been opened, by what it is, without activations."""
    itemsize = getattr(torch, run.train.dtype).itemsize
    with torch.device("meta"):
        sizes = [p.numel() for p in nets.build(run.net, run.inputs).parameters()]
    n = sum(sizes)
    optimizer = 2 * itemsize * n
    if run.optim.state == "8bit":  # two bytes, two factors of 32 bits for every 256; small tensors stay as they are
        optimizer = sum((2 + 8 / 256) * k if k >= 4096 else 8 * k for k in sizes)
    averages = len(run.ema.sigma_rels) + len(run.ema.halflives)
    return {
        "weights": n * itemsize,
        "gradients": n * itemsize,
        "optimizer": round(optimizer),
        "averages": n * itemsize * averages,
    }


def on_device(run: Run, device: torch.device, world: int) -> dict[str, int]:
    """Of one rank; averages in the host's memory take none of a GPU's."""
    parts = {name: size // (1 if run.train.sharding == "ddp" else world) for name, size in arithmetic(run).items()}
    return parts | {"averages": 0} if run.ema.device == "cpu" and device.type != "cpu" else parts


def available(device: torch.device) -> int:
    """Bytes that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what the system would give, files that it keeps in memory included
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return physical()


def said(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items())


def measure(trainer: Trainer, seconds: float) -> Measured:
    """Steps of more and more images until a whole batch, or as many as time and memory allow; then some of that size."""
    whole, world, cfg = trainer.run.train.batch_size, trainer.ranks.world, trainer.run.train
    found, until, passes = Measured(), time.monotonic() + seconds, trainer._passes
    inside: list[float] = []

    def timed(*arguments: object) -> object:
        started = now(trainer.device)
        result = passes(*arguments)
        inside.append(now(trainer.device) - started)
        return result

    trainer._passes = timed
    # A compiler makes each size anew.
    size = min(whole, world * (cfg.micro_batch or 8)) if cfg.compile else min(whole, world)
    while True:
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        resized(trainer, size)
        started = now(trainer.device)
        trainer.step()
        took = trainer.ranks.gathered(now(trainer.device) - started, trainer.device)
        found.peaks[min(trainer.micro, -(-size // world))] = peak_memory(trainer.device)
        # All ranks must decide alike.
        late = (
            max(took) * 2 * (STEPS / 4) > seconds
            or trainer.ranks.gathered(float(time.monotonic() > until - seconds / 2), trainer.device)[0] > 0
        )
        if size == whole or cfg.compile or late or too_large(trainer, found):
            break
        size = min(2 * size, whole)
    found.batch = size
    inside.clear()
    for i in range(WARM_UP + STEPS):
        started = now(trainer.device)
        trainer.step()
        found.steps.append(now(trainer.device) - started)
        stop = i >= WARM_UP + 2 and time.monotonic() > until
        if trainer.ranks.gathered(float(stop), trainer.device)[0]:
            break
    found.passes = inside[-len(found.steps) :][WARM_UP:]
    found.steps = found.steps[WARM_UP:]
    found.peaks[min(trainer.micro, -(-size // world))] = peak_memory(trainer.device)
    return found


def resized(trainer: Trainer, size: int) -> None:
    """Go on with batches of that many images."""
    train = trainer.run.train.model_copy(update={"batch_size": size})
    trainer.run = trainer.run.model_copy(update={"train": train})
    trainer.batches = Batches(trainer.batches.dataset, trainer.run, trainer.process.sd, trainer.device)
    trainer._stream = None
    trainer.micro = train.micro_batch or -(-size // trainer.ranks.world)


def too_large(trainer: Trainer, found: Measured) -> bool:
    """Whether twice as many samples at once may exceed a processor's memory; a GPU says so itself."""
    if trainer.device.type == "cuda":
        return False
    at_once = max(found.peaks)
    more = found.peak(0, 2 * at_once) - found.peaks[at_once] if trainer.micro == at_once else 0
    room = 0.5 * available(trainer.device) / trainer.ranks.per_node
    return max(trainer.ranks.gathered(float(more > room), trainer.device)) > 0


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what tensors took at most since the counter was reset, else what this process ever took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes that a rank holds all the time on the device, by what they are."""

    def size(tensors: list[Tensor]) -> int:
        return sum(own(t).nbytes for t in tensors if own(t).device.type == trainer.device.type)

    parameters = list(trainer.modules.parameters())
    return {
        "weights": size([*parameters, *trainer.modules.buffers()]),
        "gradients": size(parameters),
        "optimizer": size(list(optim.named_state(trainer.optimizer, trainer.modules).values())),
        "averages": size([t for average in trainer.ema.averages.values() for t in average.values()]),
    }


def memory_lines(
    run: Run, parts: dict[str, int], peak: int, at_once: int, measured: Measured, device: torch.device
) -> list[str]:
    rest = max(0, peak - sum(parts.values()))
    made_of = said(parts | {"activations and the rest": rest})
    how = "" if at_once in measured.peaks else f" (extrapolated from {max(measured.peaks)})"
    lines = [f"  memory   {in_bytes(peak)} of a rank with {at_once:,} samples at once{how}: {made_of}"]
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical()
    if peak > 0.95 * total:
        each = rest / at_once
        fits = int((0.9 * total - sum(parts.values())) / each) if each else 0
        cure = (
            f"train.micro_batch={fits} would fit"
            if fits > 0
            else "nor does one sample: train.recompute=true, ema.device=cpu, optim.state=8bit or train.sharding=fsdp"
        )
        lines.append(f"           that is more than the {in_bytes(total)} there are; {cure}")
    return lines


def time_lines(run: Run, measured: Measured) -> list[str]:
    batch = run.train.batch_size
    times = sorted(measured.step_times(batch))
    middle = statistics.median(times)
    fast, slow = times[round(0.1 * (len(times) - 1))], times[round(0.9 * (len(times) - 1))]
    steps = -(-run.train.total_images // batch)
    share = statistics.median(1 - p / t for p, t in zip(measured.passes, measured.steps, strict=True))
    return [
        f"  speed    {batch / middle:,.3g} images/s ({batch / slow:,.3g} to {batch / fast:,.3g} in eight tenths of the steps); "
        f"optimizer and averages took {100 * share:.0f} % of them",
        f"  time     {in_days(middle * steps)} for {run.train.total_images:,} images in {steps:,} steps",
    ]


class Disk(NamedTuple):
    """What a run leaves: how many files of how many bytes."""

    snapshots: int
    weights: int
    states: int
    state: int
    log: int

    @property
    def total(self) -> int:
        return self.snapshots * self.weights + self.states * self.state + self.log


def disk(run: Run, weights: int, state: int) -> Disk:
    """weights: bytes of one average in memory; state: of all that a state holds."""
    cfg = run.train
    last = -(-cfg.total_images // cfg.batch_size) * cfg.batch_size

    def times(every: int) -> int:
        return last // every + (not crossed(last - cfg.batch_size, last, every))

    averages = len(run.ema.sigma_rels) + len(run.ema.halflives)
    milestones = last // cfg.milestone_images if cfg.milestone_images else 0
    states = min(cfg.keep_states, times(cfg.state_images)) + milestones
    weights //= 2 if run.ema.snapshots == "float16" else 1
    return Disk(times(cfg.snapshot_images) * averages, weights, states, state, times(cfg.log_images) * LINE)


def disk_line(run: Run, weights: int, state: int) -> str:
    found = disk(run, weights, state)
    free = shutil.disk_usage(".").free
    more = found.total > free
    room = f", more than the {in_bytes(free)} that are free here" if more else f" ({in_bytes(free)} are free here)"
    return (
        f"  disk     {in_bytes(found.total)}{room}: {found.snapshots:,} snapshots of {in_bytes(found.weights)}, "
        f"{found.states} states of {in_bytes(found.state)}, log {in_bytes(found.log)}; one state more while one is written"
    )


def physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_days(seconds: float) -> str:
    minutes, hours, days = round(seconds / 60), seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{max(minutes, 1)} min"
    return f"{hours:.1f} hours" if hours < 48 else f"{days:,.1f} days"
