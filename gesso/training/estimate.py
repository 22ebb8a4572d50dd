"""Estimate memory, speed, duration and disk space of a run from a few real steps. Nothing is written."""

import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gesso import devices, models
from gesso.atomic_io import format_bytes
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.data.base import Dataset
from gesso.data.batching import Batcher
from gesso.data.synthetic import source_exists, with_synthetic_data
from gesso.training import optimizer as optim
from gesso.training.loop import is_due
from gesso.training.ranks import Ranks, init_distributed, local_shard
from gesso.training.run_folder import configure_backends, open_dataset_for_run
from gesso.training.trainer import Trainer

NUM_STEPS, NUM_WARMUP_STEPS, MAX_SECONDS = 20, 2, 60.0
"""Timed steps, warm-up steps, and seconds that all of them together may take."""
LOG_LINE_BYTES = 200
"""Approximate bytes of a log line."""


@dataclass
class StepMeasurements:
    """Measured steps of one batch size, in seconds and bytes; peaks are per rank, by micro-batch size."""

    batch_size: int = 0
    step_seconds: list[float] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def scaled_step_seconds(self, batch_size: int) -> list[float]:
        """Return step times at another batch size: passes scale with the number of images, the update does not."""
        return [
            t - p + p * batch_size / self.batch_size for t, p in zip(self.step_seconds, self.pass_seconds, strict=True)
        ]

    def predict_peak(self, static_bytes: int, micro_batch_size: int) -> int:
        """Return the peak memory in bytes at a micro-batch size: static memory, and activations proportional to it."""
        if micro_batch_size in self.peak_bytes:
            return self.peak_bytes[micro_batch_size]
        (fewer, low), (most, high) = (
            sorted(self.peak_bytes.items())[-2:]
            if len(self.peak_bytes) > 1
            else ((0, static_bytes), *self.peak_bytes.items())
        )
        return max(high, round(low + (high - low) * (micro_batch_size - fewer) / (most - fewer)))


def estimate(run: RunConfig, console: Console, seconds: float = MAX_SECONDS) -> list[str]:
    """Return the estimate as lines. Under torchrun all ranks take part, and the largest memory of a rank counts.

    Raises:
        UsageError: As for training.
        RunError: A single sample does not fit into memory.
    """
    configure_backends(run)
    with init_distributed(run) as (ranks, device):
        devices.check_precision(device, "train.precision", run.train.precision)
        quiet = console if ranks.is_main else Console(quiet=True)
        real = source_exists(run.data.source)
        run, dataset = open_dataset_for_run(run, quiet) if real else with_synthetic_data(run)
        optim.check_optimizer_config(run)
        state, least = static_memory(run), sum(per_rank_memory(run, device, ranks.world_size).values())
        # Half of the host memory: other programs need the rest, and would be killed first.
        room = available_memory(device) / (1 if device.type == "cuda" else 2 * ranks.local_world_size)
        if least > room:
            return [
                f"{run.recipe}: not measured, as {format_bytes(least)} of a rank are more than the "
                f"{format_bytes(room)} that are free here",
                f"  memory   {format_memory(per_rank_memory(run, device, ranks.world_size))}, and activations",
                disk_line(run, state["weights"], sum(state.values()) - state["gradients"]),
            ]
        trial = run_trial_steps(run, dataset, ranks, device, seconds)
    where = (
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, {ranks.world_size} rank"
        + "s" * (ranks.world_size > 1)
    )
    steps = len(trial.measurements.step_seconds)
    head = f"{run.recipe} on {where}: {steps} steps of {trial.measurements.batch_size:,} images"
    if not real:
        head += f", random ones (data.source={run.data.source or '(none)'} is not there)"
    return [
        head,
        *memory_lines(run, trial.memory, trial.peak_bytes, trial.micro_batch_size, trial.measurements, device),
        *time_lines(run, trial.measurements),
        disk_line(run, trial.weights_bytes, trial.state_bytes),
    ]


class TrialResult(NamedTuple):
    """Result of the measured steps: memory in bytes by category and its peak, sizes of weights and checkpoint."""

    measurements: StepMeasurements
    memory: dict[str, int]
    peak_bytes: int
    micro_batch_size: int
    weights_bytes: int
    state_bytes: int


def run_trial_steps(
    run: RunConfig, dataset: Dataset, ranks: Ranks, device: torch.device, seconds: float
) -> TrialResult:
    """Run the steps. The trainer is released on return, before the process group ends."""
    before = peak_memory(device)
    trainer = Trainer(run, dataset, ranks, device)
    measured = measure_steps(trainer, seconds)
    parts = memory_by_category(trainer)
    share = -(-run.train.batch_size // ranks.world_size)
    at_once = min(run.train.micro_batch_size or share, share)
    if device.type == "cuda" and run.train.micro_batch_size is None:
        at_once = max(measured.peak_bytes)  # what training itself would find
    # A process that had held more before, as a library's caller may have, shows no peak.
    peak = max(sum(parts.values()), measured.predict_peak(sum(parts.values()) + before, at_once) - before)
    peak = round(max(ranks.all_gather(peak, device)))
    tensors = sum(t.numel() * t.itemsize for t in trainer.state_tensors().values())
    weights = sum(t.numel() * t.itemsize for t in next(iter(trainer.ema.averages.values())).values())
    return TrialResult(measured, parts, peak, at_once, weights, tensors)


def static_memory(run: RunConfig) -> dict[str, int]:
    """Return the bytes of everything a run holds except activations, by category. The data set must be open."""
    itemsize = getattr(torch, run.train.dtype).itemsize
    with torch.device("meta"):
        sizes = [p.numel() for p in models.build_network(run.net, run.input_spec).parameters()]
    n = sum(sizes)
    optimizer = 2 * itemsize * n
    if (
        run.optim.state_dtype == "8bit"
    ):  # two bytes, two factors of 32 bits for every 256; small tensors stay as they are
        optimizer = sum((2 + 8 / 256) * k if k >= 4096 else 8 * k for k in sizes)
    averages = len(run.ema.sigma_rels) + len(run.ema.halflives)
    return {
        "weights": n * itemsize,
        "gradients": n * itemsize,
        "optimizer": round(optimizer),
        "averages": n * itemsize * averages,
    }


def per_rank_memory(run: RunConfig, device: torch.device, world_size: int) -> dict[str, int]:
    """Return the bytes by category on one rank; EMAs in host memory do not count on a GPU."""
    parts = {
        name: size // (1 if run.train.sharding == "ddp" else world_size) for name, size in static_memory(run).items()
    }
    return parts | {"averages": 0} if run.ema.device == "cpu" and device.type != "cpu" else parts


def available_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what the system would give, files that it keeps in memory included
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return physical_memory()


def format_memory(parts: dict[str, int]) -> str:
    """Return memory by category as text, largest first."""
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def measure_steps(trainer: Trainer, seconds: float) -> StepMeasurements:
    """Measure steps of growing batch size, up to the full batch or the limits of time and memory."""
    batch_size, world, cfg = trainer.run.train.batch_size, trainer.ranks.world_size, trainer.run.train
    measurements, until, passes = StepMeasurements(), time.monotonic() + seconds, trainer.forward_backward
    inside: list[float] = []

    def timed(sample_index: Tensor, valid: Tensor, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        started = synchronized_time(trainer.device)
        result = passes(sample_index, valid, x0, cond)
        inside.append(synchronized_time(trainer.device) - started)
        return result

    trainer.forward_backward = timed  # type: ignore[method-assign]
    # A compiler makes each size anew.
    size = min(batch_size, world * (cfg.micro_batch_size or 8)) if cfg.compile else min(batch_size, world)
    while True:
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        set_batch_size(trainer, size)
        started = synchronized_time(trainer.device)
        trainer.step()
        took = trainer.ranks.all_gather(synchronized_time(trainer.device) - started, trainer.device)
        measurements.peak_bytes[min(trainer.micro_batch_size, -(-size // world))] = peak_memory(trainer.device)
        # All ranks must decide alike.
        late = (
            max(took) * 2 * (NUM_STEPS / 4) > seconds
            or trainer.ranks.all_gather(float(time.monotonic() > until - seconds / 2), trainer.device)[0] > 0
        )
        if size == batch_size or cfg.compile or late or exceeds_memory_when_doubled(trainer, measurements):
            break
        size = min(2 * size, batch_size)
    measurements.batch_size = size
    inside.clear()
    for i in range(NUM_WARMUP_STEPS + NUM_STEPS):
        started = synchronized_time(trainer.device)
        trainer.step()
        measurements.step_seconds.append(synchronized_time(trainer.device) - started)
        stop = i >= NUM_WARMUP_STEPS + 2 and time.monotonic() > until
        if trainer.ranks.all_gather(float(stop), trainer.device)[0]:
            break
    measurements.pass_seconds = inside[-len(measurements.step_seconds) :][NUM_WARMUP_STEPS:]
    measurements.step_seconds = measurements.step_seconds[NUM_WARMUP_STEPS:]
    measurements.peak_bytes[min(trainer.micro_batch_size, -(-size // world))] = peak_memory(trainer.device)
    return measurements


def set_batch_size(trainer: Trainer, size: int) -> None:
    """Continue with batches of another number of images."""
    train = trainer.run.train.model_copy(update={"batch_size": size})
    trainer.run = trainer.run.model_copy(update={"train": train})
    trainer.batcher = Batcher(trainer.batcher.dataset, trainer.run, trainer.process.sigma_data, trainer.device)
    trainer._batch_iterator = None
    trainer.micro_batch_size = train.micro_batch_size or -(-size // trainer.ranks.world_size)


def exceeds_memory_when_doubled(trainer: Trainer, measurements: StepMeasurements) -> bool:
    """Return True if doubling the micro-batch may exceed host memory; a GPU raises an error instead."""
    if trainer.device.type == "cuda":
        return False
    at_once = max(measurements.peak_bytes)
    more = (
        measurements.predict_peak(0, 2 * at_once) - measurements.peak_bytes[at_once]
        if trainer.micro_batch_size == at_once
        else 0
    )
    room = 0.5 * available_memory(trainer.device) / trainer.ranks.local_world_size
    return max(trainer.ranks.all_gather(float(more > room), trainer.device)) > 0


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds after all work of the device is finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors since the last reset on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_by_category(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that a rank holds permanently on the device, by category."""

    def size(tensors: Sequence[Tensor]) -> int:
        return sum(local_shard(t).nbytes for t in tensors if local_shard(t).device.type == trainer.device.type)

    parameters = list(trainer.modules.parameters())
    return {
        "weights": size([*parameters, *trainer.modules.buffers()]),
        "gradients": size(parameters),
        "optimizer": size(list(optim.named_optimizer_state(trainer.optimizer, trainer.modules).values())),
        "averages": size([t for average in trainer.ema.averages.values() for t in average.values()]),
    }


def memory_lines(
    run: RunConfig,
    memory: dict[str, int],
    peak_bytes: int,
    micro_batch_size: int,
    measurements: StepMeasurements,
    device: torch.device,
) -> list[str]:
    """Return the lines on memory."""
    rest = max(0, peak_bytes - sum(memory.values()))
    breakdown = format_memory(memory | {"activations and the rest": rest})
    how = "" if micro_batch_size in measurements.peak_bytes else f" (extrapolated from {max(measurements.peak_bytes)})"
    lines = [
        f"  memory   {format_bytes(peak_bytes)} of a rank with {micro_batch_size:,} samples at once{how}: {breakdown}"
    ]
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical_memory()
    if peak_bytes > 0.95 * total:
        each = rest / micro_batch_size
        fits = int((0.9 * total - sum(memory.values())) / each) if each else 0
        cure = (
            f"train.micro_batch_size={fits} would fit"
            if fits > 0
            else "nor does one sample: train.activation_checkpointing=true, ema.device=cpu, optim.state_dtype=8bit or "
            "train.sharding=fsdp"
        )
        lines.append(f"           that is more than the {format_bytes(total)} there are; {cure}")
    return lines


def time_lines(run: RunConfig, measurements: StepMeasurements) -> list[str]:
    """Return the lines on speed and duration."""
    batch = run.train.batch_size
    times = sorted(measurements.scaled_step_seconds(batch))
    middle = statistics.median(times)
    fast, slow = times[round(0.1 * (len(times) - 1))], times[round(0.9 * (len(times) - 1))]
    steps = -(-run.train.total_images // batch)
    share = statistics.median(
        1 - p / t for p, t in zip(measurements.pass_seconds, measurements.step_seconds, strict=True)
    )
    return [
        f"  speed    {batch / middle:,.3g} images/s ({batch / slow:,.3g} to {batch / fast:,.3g} in eight tenths of "
        "the steps); "
        f"optimizer and averages took {100 * share:.0f} % of them",
        f"  time     {format_duration(middle * steps)} for {run.train.total_images:,} images in {steps:,} steps",
    ]


class DiskUsage(NamedTuple):
    """Numbers and sizes in bytes of the files of a run."""

    num_snapshots: int
    snapshot_bytes: int
    num_checkpoints: int
    checkpoint_bytes: int
    log_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the total size in bytes."""
        return self.num_snapshots * self.snapshot_bytes + self.num_checkpoints * self.checkpoint_bytes + self.log_bytes


def estimate_disk(run: RunConfig, weights_bytes: int, state_bytes: int) -> DiskUsage:
    """Return the disk usage of a run, given the bytes of one EMA in memory and of all tensors of a checkpoint."""
    cfg = run.train
    last = -(-cfg.total_images // cfg.batch_size) * cfg.batch_size

    def times(every: int) -> int:
        return last // every + (not is_due(last - cfg.batch_size, last, every))

    averages = len(run.ema.sigma_rels) + len(run.ema.halflives)
    milestones = last // cfg.milestone_every if cfg.milestone_every else 0
    states = min(cfg.keep_checkpoints, times(cfg.checkpoint_every)) + milestones
    weights_bytes //= 2 if run.ema.snapshot_dtype == "float16" else 1
    return DiskUsage(
        times(cfg.snapshot_every) * averages, weights_bytes, states, state_bytes, times(cfg.log_every) * LOG_LINE_BYTES
    )


def disk_line(run: RunConfig, weights_bytes: int, state_bytes: int) -> str:
    """Return the line on disk space."""
    usage = estimate_disk(run, weights_bytes, state_bytes)
    free = shutil.disk_usage(".").free
    more = usage.total_bytes > free
    room = (
        f", more than the {format_bytes(free)} that are free here" if more else f" ({format_bytes(free)} are free here)"
    )
    return (
        f"  disk     {format_bytes(usage.total_bytes)}{room}: {usage.num_snapshots:,} snapshots of "
        f"{format_bytes(usage.snapshot_bytes)}, "
        f"{usage.num_checkpoints} states of {format_bytes(usage.checkpoint_bytes)}, log "
        f"{format_bytes(usage.log_bytes)}; one state more while one is written"
    )


def physical_memory() -> int:
    """Return the physical memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as "3 min" or "2.5 days"."""
    minutes, hours, days = round(seconds / 60), seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{max(minutes, 1)} min"
    return f"{hours:.1f} hours" if hours < 48 else f"{days:,.1f} days"
