"""The training loop: steps, and the logging and snapshots between them."""

import functools
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
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
from gesso.untrusted import print_text


@contextmanager
def capture_signals() -> Iterator[list[int]]:
    """Append received SIGINT, SIGUSR1 and SIGTERM to the yielded list; a second SIGINT interrupts immediately."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    previous_handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def train(
    run: RunConfig,
    dataset: Dataset,
    out: Path,
    console: Console,
    ranks: Ranks = SINGLE_PROCESS,
    device: torch.device | None = None,
    denoiser: Denoiser | None = None,
    more_trackers: Sequence[trackers.Tracker] = (),
    callback: Callable[[int, int], None] | None = None,
) -> None:
    """Train to train.total_images, from the newest checkpoint in the run folder if there is one.

    Writes log.jsonl, state/ and snapshots/.

    Args:
        run: Settings of the run, with those that the data set determines.
        dataset: Training images.
        out: Run folder.
        console: Console of the progress bar.
        ranks: Ranks of the run.
        device: Device of this rank; None for that of train.device.
        denoiser: Denoiser with initial weights; None for random ones.
        more_trackers: Trackers besides those of the settings.
        callback: Called after each step with the number of images seen and train.total_images.

    Raises:
        StoppedError: SIGINT, SIGUSR1 or SIGTERM was received; a checkpoint is written.
        RunError: The loss diverged, the disk is full or not writable, or another rank failed.
    """
    trainer = Trainer(run, dataset, ranks, device, denoiser)
    trainer.nimg = checkpoint.load_latest(
        out / "state", trainer.state_tensors(), lambda text: print_text(console, f"warning: {text}"), ranks
    )
    log = RunLog(out / "log.jsonl") if ranks.is_main else None
    if log:
        log.rewind(trainer.nimg)
        log.trackers = [*trackers.open_trackers(run, out, trainer.nimg), *more_trackers]
    if trainer.nimg:
        print_text(console, f"resumed at image {trainer.nimg:,}")
        if trainer.nimg >= run.train.total_images:
            longer = f"train.total_images={2 * trainer.nimg} or another number trains it longer"
            print_text(console, f"note: the run is finished; {longer}")
    elif log and dataset.unreadable:
        log.write(nimg=0, unreadable=dataset.unreadable)
    writer = checkpoint.CheckpointWriter(ranks, run.train.rank_timeout_s)
    with (
        capture_signals() as received_signals,
        ProgressBar(console, run.train.total_images, trainer.nimg, run.recipe, callback) as progress,
    ):
        try:
            trainer.received_signals = received_signals
            _run_steps(trainer, out, log, progress, writer, Monitor(trainer, dataset, out, log))
        except RunError as error:
            writer.close()
            checkpoints = checkpoint.list_checkpoints(out / "state")
            last = f"last checkpoint: {checkpoints[-1]}" if checkpoints else "no checkpoint was written yet"
            raise type(error)(f"{error}\n{last}") from error
        finally:
            writer.close()
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
    """Train to the end, or until a signal is received; log, measure and save what is due after each step."""
    cfg = trainer.run.train
    find_stragglers = StragglerDetector(trainer)
    announced: set[str] = set()
    while trainer.nimg < cfg.total_images:
        before = trainer.nimg
        loss = trainer.step()
        done = trainer.nimg >= cfg.total_images
        if done or is_due(before, trainer.nimg, cfg.log_every):
            line, stragglers = trainer.pop_log_line(), find_stragglers()
            if stragglers:
                line["slow_ranks"] = stragglers
            if stragglers.keys() - announced:
                print_text(
                    progress.console,
                    "\n".join(f"slow: {name}, {x:g} times the median" for name, x in stragglers.items()),
                )
            announced |= stragglers.keys()
            if log:
                log.write(**line, **monitor.throughput(trainer.nimg, trainer.data_wait_s))
        monitor.on_step_end(before)  # before the checkpoint: a resumed run does not repeat it
        if done or is_due(before, trainer.nimg, cfg.snapshot_every):
            _write_snapshots(trainer, out, writer)
        if done or trainer.stop_signal or is_due(before, trainer.nimg, cfg.checkpoint_every):
            is_milestone = is_due(trainer.nimg - cfg.checkpoint_every, trainer.nimg, cfg.milestone_every)
            writer.save(out / "state", trainer.nimg, trainer.state_tensors(), cfg.keep_checkpoints, is_milestone)
        writer.raise_errors()
        progress.update(trainer.nimg, f"loss {loss:.3f}")
        if trainer.stop_signal and not done:
            break
    writer.wait()
    if trainer.nimg < cfg.total_images:
        raise StoppedError(
            f"{signal.Signals(trainer.stop_signal).name} at image {trainer.nimg:,}: a checkpoint is written. "
            f"Resume with\n  gesso train {shlex.quote(str(out))} --resume",
            trainer.stop_signal,
        )


def _write_snapshots(trainer: Trainer, out: Path, writer: checkpoint.CheckpointWriter) -> None:
    """Write a snapshot of each EMA on the first rank."""
    nimg, run = trainer.nimg, trainer.run
    parameter_names = {name for name, _ in trainer.denoiser.net.named_parameters()}
    for profile, average in trainer.ema.averages.items():
        path = snapshot.snapshot_path(out / "snapshots", nimg, profile)
        tensors = {
            name: _to_cpu(
                ema.full_tensor(tensor).detach(), name, run.ema.snapshot_dtype if name in parameter_names else "same"
            )
            for name, tensor in average.items()
        }
        if trainer.ranks.is_main:
            writer.submit(functools.partial(snapshot.write, path, tensors, nimg, profile, run, trainer.control_rows))


def _to_cpu(tensor: Tensor, name: str, dtype: str) -> Tensor:
    """Return a copy on the CPU, in float16 unless `dtype` is "same". Raises RunError if a value overflows."""
    if dtype == "same":
        return tensor.to("cpu", copy=True)
    half = tensor.to("cpu", torch.float16)
    if not bool(half.isfinite().all()):
        raise RunError(f"{name} has values above 65,504, the maximum of float16: set ema.snapshot_dtype=same")
    return half
