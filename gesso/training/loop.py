"""The training loop: steps, and the logging and snapshots between them."""

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from gesso import ema, snapshot
from gesso.config import RunConfig
from gesso.data.base import Dataset
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import RunError, StoppedError
from gesso.training import checkpoint, trackers
from gesso.training.logging import ProgressBar, RunLog
from gesso.training.monitor import Monitor, is_due
from gesso.training.ranks import SINGLE_PROCESS, Ranks
from gesso.training.stragglers import StragglerDetector
from gesso.training.trainer import STOP_SIGNALS, Trainer


@contextmanager
def capture_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGUSR1 and SIGTERM for the loop to check; a second SIGINT interrupts immediately."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    run: RunConfig,
    dataset: Dataset,
    out: Path,
    console: Console,
    ranks: Ranks = SINGLE_PROCESS,
    device: torch.device | None = None,
    denoiser: Denoiser | None = None,
) -> None:
    """Train `run` in the folder `out` to train.total_images, from its newest checkpoint if there is one.

    Writes log.jsonl, state/ and snapshots/.

    Args:
        run: Settings of the run, with the data set open.
        dataset: The training images.
        out: The run folder.
        console: For the progress bar.
        ranks: The ranks of the run.
        device: Device of this rank; None takes train.device.
        denoiser: Denoiser with the initial weights; None for random ones.

    Raises:
        StoppedError: On SIGINT, SIGUSR1 and SIGTERM, after a checkpoint is written.
        RunError: The loss diverges, the disk is full or not writable, or another rank is gone.
    """
    trainer = Trainer(run, dataset, ranks, device, denoiser)
    trainer.nimg = checkpoint.load_latest(
        out / "state", trainer.state_tensors(), lambda text: console.print(f"warning: {text}"), ranks
    )
    log = RunLog(out / "log.jsonl") if ranks.is_main else None
    if log:
        log.rewind(trainer.nimg)
        log.trackers = trackers.open_trackers(run, out, trainer.nimg)
    if trainer.nimg:
        console.print(f"resumed at image {trainer.nimg:,}", highlight=False)
    elif log and dataset.unreadable:
        log.write(nimg=0, unreadable=dataset.unreadable)
    saver = checkpoint.CheckpointWriter(ranks, run.train.rank_timeout_s)
    with capture_signals() as caught, ProgressBar(console, run.train.total_images, trainer.nimg, run.recipe) as bar:
        try:
            trainer.received_signals = caught
            _run_steps(trainer, out, log, bar, saver, Monitor(trainer, dataset, out, log))
        except RunError as error:
            saver.close()
            last = checkpoint.list_checkpoints(out / "state")
            where = f"last good state: {last[-1]}" if last else "no state was saved yet"
            raise type(error)(f"{error}\n{where}") from error
        finally:
            saver.close()
            if log:
                log.close()


def _run_steps(
    trainer: Trainer,
    out: Path,
    log: RunLog | None,
    progress: ProgressBar,
    writer: checkpoint.CheckpointWriter,
    monitor: Monitor,
) -> None:
    cfg = trainer.run.train
    slow, named = StragglerDetector(trainer), dict[str, float]()
    while trainer.nimg < cfg.total_images:
        before = trainer.nimg
        loss = trainer.step()
        done = trainer.nimg >= cfg.total_images
        if done or is_due(before, trainer.nimg, cfg.log_every):
            line, held_up = trainer.pop_log_line(), slow()
            if held_up:
                line["slow_ranks"] = held_up
            if held_up.keys() - named.keys():
                progress.console.print(
                    "\n".join(f"slow: {name}, {x:g} times the median" for name, x in held_up.items())
                )
            named |= held_up
            if log:
                log.write(**line, **monitor.throughput(trainer.nimg, trainer.data_wait_s))
        monitor.on_step_end(before)  # before the state, so that a resumed run lacks nothing of what it does not repeat
        if done or is_due(before, trainer.nimg, cfg.snapshot_every):
            _write_snapshots(trainer, out, writer)
        if done or trainer.stop_signal or is_due(before, trainer.nimg, cfg.checkpoint_every):
            milestone = bool(cfg.milestone_every) and is_due(
                trainer.nimg - cfg.checkpoint_every, trainer.nimg, cfg.milestone_every
            )
            writer.save(out / "state", trainer.nimg, trainer.state_tensors(), cfg.keep_checkpoints, milestone)
        writer.raise_errors()
        progress.update(trainer.nimg, f"loss {loss:.3f}")
        if trainer.stop_signal and not done:
            break
    writer.wait()
    if trainer.nimg < cfg.total_images:
        raise StoppedError(
            f"{signal.Signals(trainer.stop_signal).name} at image {trainer.nimg:,}: the state is saved. Go on with\n"
            f"  gesso train {out} --resume",
            trainer.stop_signal,
        )


def _write_snapshots(trainer: Trainer, out: Path, writer: checkpoint.CheckpointWriter) -> None:
    """Write a snapshot of each EMA on the first rank."""
    nimg, run, rows = trainer.nimg, trainer.run, trainer.control_rows
    learned = {name for name, _ in trainer.denoiser.net.named_parameters()}  # constants stay as they are
    for profile, average in trainer.ema.averages.items():
        path = snapshot.snapshot_path(out / "snapshots", nimg, profile)
        tensors = {
            name: _to_cpu_dtype(
                ema.full_tensor(tensor).detach(), name, run.ema.snapshot_dtype if name in learned else "same"
            )
            for name, tensor in average.items()
        }
        if trainer.ranks.is_main:
            writer.submit(functools.partial(snapshot.write, path, tensors, nimg, profile, run, rows))


def _to_cpu_dtype(tensor: Tensor, name: str, dtype: str) -> Tensor:
    """Return a copy on the CPU. Raises RunError for values that 16 bits cannot represent."""
    if dtype == "same":
        return tensor.to("cpu", copy=True)
    small = tensor.to("cpu", torch.float16)
    if not bool(small.isfinite().all()):
        raise RunError(f"{name} has numbers above 65,504, which float16 does not hold: set ema.snapshot_dtype=same")
    return small
