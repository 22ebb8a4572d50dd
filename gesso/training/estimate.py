"""Estimate memory, speed, duration and disk space of a run from a few real steps. Nothing is written."""

import importlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
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
from gesso.training import optimizer
from gesso.training.loop import is_due
from gesso.training.ranks import Ranks, init_distributed, local_shard
from gesso.training.run_folder import configure_backends, open_dataset_for_run
from gesso.training.throughput import synchronized_time
from gesso.training.trainer import Trainer

NUM_STEPS, NUM_WARMUP_STEPS, MAX_SECONDS = 20, 2, 60.0
"""Timed steps, warm-up steps, and seconds that all steps together may take."""
LOG_LINE_BYTES = 200
"""Approximate size of a log line."""


@dataclass
class StepMeasurements:
    """Times of steps at one batch size, and peak memory of a rank in bytes by micro-batch size.

    `pass_seconds` is the part of `step_seconds` in forward and backward passes.
    """

    batch_size: int = 0
    step_seconds: list[float] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def scaled_step_seconds(self, batch_size: int) -> list[float]:
        """Return the step times at another batch size, as passes scale with it and the rest of a step does not."""
        return [
            step - passes + passes * batch_size / self.batch_size
            for step, passes in zip(self.step_seconds, self.pass_seconds, strict=True)
        ]

    def predict_peak(self, static_bytes: int, micro_batch_size: int) -> int:
        """Return the peak memory in bytes at a micro-batch size, extrapolated from the two largest measured ones.

        With a single measurement, activations are what exceeds `static_bytes`, and proportional to the size.
        """
        if micro_batch_size in self.peak_bytes:
            return self.peak_bytes[micro_batch_size]
        (size_1, peak_1), (size_2, peak_2) = sorted({0: static_bytes, **self.peak_bytes}.items())[-2:]
        return max(peak_2, round(peak_1 + (peak_2 - peak_1) * (micro_batch_size - size_1) / (size_2 - size_1)))


def estimate(run: RunConfig, console: Console, seconds: float = MAX_SECONDS) -> list[str]:
    """Return the estimate as lines. Under torchrun all ranks call it, and the largest memory of a rank counts.

    Raises:
        UsageError: As for training.
        RunError: A single sample does not fit into memory.
    """
    configure_backends(run)
    with init_distributed(run) as (ranks, device):
        devices.check_precision(device, "train.precision", run.train.precision)
        console = console if ranks.is_main else Console(quiet=True)
        has_source = source_exists(run.data.source)
        run, dataset = open_dataset_for_run(run, console) if has_source else with_synthetic_data(run)
        optimizer.check_optimizer_config(run)
        memory = per_rank_memory(run, device, ranks.world_size)
        # Half of the free host memory: other programs need some, and the system would kill them first.
        free_bytes = available_memory(device) / (1 if device.type == "cuda" else 2 * ranks.local_world_size)
        if sum(memory.values()) > free_bytes:
            total = static_memory(run)
            return [
                f"{run.recipe}: not measured, as a rank needs {format_bytes(sum(memory.values()))}, and "
                f"{format_bytes(free_bytes)} are free",
                f"  memory   {format_memory(memory)}, and activations",
                disk_line(run, total["weights"], sum(total.values()) - total["gradients"]),
            ]
        trial = run_trial_steps(run, dataset, ranks, device, seconds)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    num_ranks = f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)}"
    num_steps, batch_size = len(trial.measurements.step_seconds), trial.measurements.batch_size
    random = "" if has_source else f" of random values, as data.source={run.data.source or 'null'} does not exist"
    return [
        f"{run.recipe} on {device_name}, {num_ranks}: {num_steps} steps of {batch_size:,} images{random}",
        *memory_lines(trial, device),
        *time_lines(run, trial.measurements),
        disk_line(run, trial.weights_bytes, trial.state_bytes),
    ]


class TrialResult(NamedTuple):
    """Result of the measured steps: static memory in bytes by category, its peak, sizes of weights and checkpoint."""

    measurements: StepMeasurements
    memory: dict[str, int]
    peak_bytes: int
    micro_batch_size: int
    weights_bytes: int
    state_bytes: int


def run_trial_steps(
    run: RunConfig, dataset: Dataset, ranks: Ranks, device: torch.device, seconds: float
) -> TrialResult:
    """Measure steps with a new trainer, which is released on return: the process group must outlive it."""
    bytes_before = peak_memory(device)
    trainer = Trainer(run, dataset, ranks, device)
    measurements = measure_steps(trainer, seconds)
    memory = memory_by_category(trainer)
    static_bytes = sum(memory.values())
    per_rank = -(-run.train.batch_size // ranks.world_size)
    micro_batch_size = min(run.train.micro_batch_size or per_rank, per_rank)
    if device.type == "cuda" and run.train.micro_batch_size is None:
        micro_batch_size = max(measurements.peak_bytes)  # the size that training would find, too
    # If the process had a higher peak before, such as in a notebook, the steps show none: take at least static memory.
    peak_bytes = measurements.predict_peak(static_bytes + bytes_before, micro_batch_size) - bytes_before
    peak_bytes = round(max(ranks.all_gather(max(static_bytes, peak_bytes), device)))
    return TrialResult(
        measurements,
        memory,
        peak_bytes,
        micro_batch_size,
        weights_bytes=_num_bytes(next(iter(trainer.ema.averages.values())).values()),
        state_bytes=_num_bytes(trainer.state_tensors().values()),
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def static_memory(run: RunConfig) -> dict[str, int]:
    """Return the bytes of a run by category, except activations, buffers and scalars. The data set must be open."""
    itemsize = getattr(torch, run.train.dtype).itemsize
    with torch.device("meta"):
        sizes = [p.numel() for p in models.build_network(run.net, run.input_spec).parameters()]
    weights_bytes = itemsize * sum(sizes)
    optimizer_bytes = float(2 * weights_bytes)
    if run.optim.state_dtype == "8bit":
        # Two bytes per weight, and two 32-bit factors per 256 weights; small tensors have 32-bit state.
        optimizer_bytes = sum((2 + 8 / 256) * n if n >= 4096 else 8 * n for n in sizes)
    return {
        "weights": weights_bytes,
        "gradients": weights_bytes,
        "optimizer": round(optimizer_bytes),
        "averages": weights_bytes * (len(run.ema.sigma_rels) + len(run.ema.halflives)),
    }


def per_rank_memory(run: RunConfig, device: torch.device, world_size: int) -> dict[str, int]:
    """Return the bytes by category on one rank; EMAs in host memory do not count on a GPU."""
    num_shards = 1 if run.train.sharding == "ddp" else world_size
    memory = {name: size // num_shards for name, size in static_memory(run).items()}
    return memory | {"averages": 0} if run.ema.device == "cpu" and device.type != "cpu" else memory


def available_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # MemAvailable includes cached files
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return physical_memory()


def format_memory(memory: dict[str, int]) -> str:
    """Return memory by category as text."""
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items())


def measure_steps(trainer: Trainer, seconds: float) -> StepMeasurements:
    """Measure steps of growing batch size, up to the full batch or the limits of time and memory, then time steps."""
    ranks, cfg, device = trainer.ranks, trainer.run.train, trainer.device
    measurements, deadline = StepMeasurements(), time.monotonic() + seconds
    pass_seconds = _time_passes(trainer)
    # A compiler compiles for each size again, so the size must not grow.
    size = min(cfg.batch_size, ranks.world_size * ((cfg.micro_batch_size or 8) if cfg.compile else 1))
    while True:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        set_batch_size(trainer, size)
        slowest = max(ranks.all_gather(_timed_step(trainer), device))
        measurements.peak_bytes[min(trainer.micro_batch_size, -(-size // ranks.world_size))] = peak_memory(device)
        # The first rank decides for all, as its clock may differ.
        half_time_over = ranks.all_gather(float(time.monotonic() > deadline - seconds / 2), device)[0] > 0
        out_of_time = half_time_over or slowest * 2 * (NUM_STEPS / 4) > seconds
        if size == cfg.batch_size or cfg.compile or out_of_time or exceeds_memory_when_doubled(trainer, measurements):
            break
        size = min(2 * size, cfg.batch_size)
    measurements.batch_size = size
    pass_seconds.clear()
    for i in range(NUM_WARMUP_STEPS + NUM_STEPS):
        measurements.step_seconds.append(_timed_step(trainer))
        is_last = i >= NUM_WARMUP_STEPS + 2 and time.monotonic() > deadline
        if ranks.all_gather(float(is_last), device)[0]:
            break
    # The last passes: a step that ran out of memory has repeated its pass.
    measurements.pass_seconds = pass_seconds[-len(measurements.step_seconds) :][NUM_WARMUP_STEPS:]
    measurements.step_seconds = measurements.step_seconds[NUM_WARMUP_STEPS:]
    measurements.peak_bytes[min(trainer.micro_batch_size, -(-size // ranks.world_size))] = peak_memory(device)
    return measurements


def _time_passes(trainer: Trainer) -> list[float]:
    """Make the trainer append the seconds of every forward and backward pass to the returned list."""
    pass_seconds: list[float] = []
    forward_backward = trainer.forward_backward

    def timed(sample_index: Tensor, valid: Tensor, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        started = synchronized_time(trainer.device)
        result = forward_backward(sample_index, valid, x0, cond)
        pass_seconds.append(synchronized_time(trainer.device) - started)
        return result

    trainer.forward_backward = timed  # type: ignore[method-assign]
    return pass_seconds


def _timed_step(trainer: Trainer) -> float:
    """Train one step and return its seconds."""
    started = synchronized_time(trainer.device)
    trainer.step()
    return synchronized_time(trainer.device) - started


def set_batch_size(trainer: Trainer, size: int) -> None:
    """Continue with batches of another size."""
    train = trainer.run.train.model_copy(update={"batch_size": size})
    trainer.run = trainer.run.model_copy(update={"train": train})
    trainer.batcher = Batcher(trainer.batcher.dataset, trainer.run, trainer.process.sigma_data, trainer.device)
    trainer._batch_iterator = None
    trainer.micro_batch_size = train.micro_batch_size or -(-size // trainer.ranks.world_size)


def exceeds_memory_when_doubled(trainer: Trainer, measurements: StepMeasurements) -> bool:
    """Return True if doubling the micro-batch may exceed host memory; a GPU raises an error instead."""
    if trainer.device.type == "cuda":
        return False
    size = max(measurements.peak_bytes)
    increase = 0
    if trainer.micro_batch_size == size:
        increase = measurements.predict_peak(0, 2 * size) - measurements.peak_bytes[size]
    limit = 0.5 * available_memory(trainer.device) / trainer.ranks.local_world_size
    return max(trainer.ranks.all_gather(float(increase > limit), trainer.device)) > 0


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors since the last reset on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_by_category(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that a rank holds permanently on the device, by category."""

    def num_bytes(tensors: Iterable[Tensor]) -> int:
        shards = [local_shard(tensor) for tensor in tensors]
        return sum(shard.nbytes for shard in shards if shard.device.type == trainer.device.type)

    parameters = list(trainer.modules.parameters())
    return {
        "weights": num_bytes([*parameters, *trainer.modules.buffers()]),
        "gradients": num_bytes(parameters),
        "optimizer": num_bytes(optimizer.named_optimizer_state(trainer.optimizer, trainer.modules).values()),
        "averages": num_bytes(tensor for average in trainer.ema.averages.values() for tensor in average.values()),
    }


def memory_lines(trial: TrialResult, device: torch.device) -> list[str]:
    """Return the lines on memory."""
    static_bytes, measured = sum(trial.memory.values()), trial.measurements.peak_bytes
    activations = max(0, trial.peak_bytes - static_bytes)
    breakdown = format_memory(trial.memory)
    bound = ""
    if activations:
        breakdown += f", activations and the rest {format_bytes(activations)}"
    else:
        bound = "at least "
        breakdown += f"; activations were too small to measure with {_num_samples(max(measured))} per pass"
    source = ""
    if trial.micro_batch_size not in measured:
        source = f" (extrapolated from {', '.join(map(str, sorted(measured)[-2:]))})"
        if len(measured) == 1:
            bound = "at least "
            breakdown += f"; more samples per pass than {max(measured)} were not measured, as a step takes too long"
    lines = [
        f"  memory   {bound}{format_bytes(trial.peak_bytes)} per rank with {_num_samples(trial.micro_batch_size)} per "
        f"pass{source}: {breakdown}"
    ]
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical_memory()
    if trial.peak_bytes > 0.95 * total:
        per_sample = activations / trial.micro_batch_size
        max_samples = int((0.9 * total - static_bytes) / per_sample) if per_sample else 0
        advice = (
            f"set train.micro_batch_size={max_samples}"
            if max_samples > 0
            else "one sample does not fit either: set train.activation_checkpointing=true, ema.device=cpu, "
            "optim.state_dtype=8bit or train.sharding=fsdp"
        )
        lines.append(f"           more than the {format_bytes(total)} of this device; {advice}")
    return lines


def _num_samples(count: int) -> str:
    return f"{count:,} sample{'s' * (count != 1)}"


def time_lines(run: RunConfig, measurements: StepMeasurements) -> list[str]:
    """Return the lines on speed and duration."""
    batch_size = run.train.batch_size
    times = sorted(measurements.scaled_step_seconds(batch_size))
    median = statistics.median(times)
    fast, slow = times[round(0.1 * (len(times) - 1))], times[round(0.9 * (len(times) - 1))]
    num_steps = -(-run.train.total_images // batch_size)
    update_fraction = statistics.median(
        1 - passes / step for passes, step in zip(measurements.pass_seconds, measurements.step_seconds, strict=True)
    )
    return [
        f"  speed    {batch_size / median:,.3g} images/s ({batch_size / slow:,.3g} to {batch_size / fast:,.3g} in 80 % "
        f"of the steps); optimizer and EMAs take {100 * update_fraction:.0f} % of the time",
        f"  time     {format_duration(median * num_steps)} for {run.train.total_images:,} images, {num_steps:,} steps",
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

    def count(every: int) -> int:
        """Return how often an interval is due; everything is written at the end, too."""
        return last // every + (not is_due(last - cfg.batch_size, last, every))

    num_milestones = last // cfg.milestone_every if cfg.milestone_every else 0
    return DiskUsage(
        num_snapshots=count(cfg.snapshot_every) * (len(run.ema.sigma_rels) + len(run.ema.halflives)),
        snapshot_bytes=weights_bytes // (2 if run.ema.snapshot_dtype == "float16" else 1),
        num_checkpoints=min(cfg.keep_checkpoints, count(cfg.checkpoint_every)) + num_milestones,
        checkpoint_bytes=state_bytes,
        log_bytes=count(cfg.log_every) * LOG_LINE_BYTES,
    )


def disk_line(run: RunConfig, weights_bytes: int, state_bytes: int) -> str:
    """Return the line on disk space."""
    usage = estimate_disk(run, weights_bytes, state_bytes)
    free_bytes = shutil.disk_usage(".").free
    comparison = f", more than the {format_bytes(free_bytes)} that are free"
    if usage.total_bytes <= free_bytes:
        comparison = f" ({format_bytes(free_bytes)} are free)"
    return (
        f"  disk     {format_bytes(usage.total_bytes)}{comparison}: {usage.num_snapshots:,} snapshots of "
        f"{format_bytes(usage.snapshot_bytes)}, {usage.num_checkpoints} checkpoints of "
        f"{format_bytes(usage.checkpoint_bytes)}, log {format_bytes(usage.log_bytes)}; one more checkpoint while "
        "it is written"
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
