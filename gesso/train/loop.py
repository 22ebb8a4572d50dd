"""The training loop: steps, and what is logged and stored between them."""

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from gesso import snapshot
from gesso.config import Run
from gesso.data.samples import Dataset
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import RunError, Stopped
from gesso.train import checkpoint, trackers
from gesso.train.log import Bar, Log
from gesso.train.ranks import ALONE, Ranks, whole
from gesso.train.slow import Slow
from gesso.train.trainer import STOPS, Trainer
from gesso.train.watch import Watcher, crossed


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGUSR1 and SIGTERM for the loop to see between steps; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    run: Run,
    dataset: Dataset,
    out: Path,
    console: Console,
    ranks: Ranks = ALONE,
    device: torch.device | None = None,
    denoiser: Denoiser | None = None,
) -> None:
    """Train `run` in the folder `out` from its newest state, or from the beginning (the weights of
    `denoiser`, or random ones), to train.total_images.

    Writes log.jsonl, state/ and snapshots/. Raises Stopped on SIGINT, SIGUSR1 and SIGTERM with the state
    saved, RunError when the loss diverges, the disk refuses or another rank is gone.
    """
    trainer = Trainer(run, dataset, ranks, device, denoiser)
    trainer.nimg = checkpoint.load_latest(
        out / "state", trainer.tensors(), lambda text: console.print(f"warning: {text}"), ranks
    )
    log = Log(out / "log.jsonl") if ranks.main else None
    if log:
        log.rewind(trainer.nimg)
        log.trackers = trackers.opened(run, out, trainer.nimg)
    if trainer.nimg:
        console.print(f"resumed at image {trainer.nimg:,}", highlight=False)
    elif log and dataset.unreadable:
        log.write(nimg=0, unreadable=dataset.unreadable)
    saver = checkpoint.Saver(ranks, run.train.timeout)
    with caught_signals() as caught, Bar(console, run.train.total_images, trainer.nimg, run.recipe) as bar:
        try:
            trainer.caught = caught
            _steps(trainer, out, log, bar, saver, Watcher(trainer, dataset, out, log))
        except RunError as error:
            saver.close()
            last = checkpoint.stored(out / "state")
            where = f"last good state: {last[-1]}" if last else "no state was saved yet"
            raise type(error)(f"{error}\n{where}") from error
        finally:
            saver.close()
            if log:
                log.close()


def _steps(trainer: Trainer, out: Path, log: Log | None, bar: Bar, saver: checkpoint.Saver, watcher: Watcher) -> None:
    cfg = trainer.run.train
    slow, named = Slow(trainer), {}
    while trainer.nimg < cfg.total_images:
        before = trainer.nimg
        loss = trainer.step()
        done = trainer.nimg >= cfg.total_images
        if done or crossed(before, trainer.nimg, cfg.log_images):
            line, held_up = trainer.summary(), slow()
            if held_up:
                line["slow_ranks"] = held_up
            if held_up.keys() - named.keys():
                bar.console.print("\n".join(f"slow: {name}, {x:g} times the median" for name, x in held_up.items()))
            named |= held_up
            if log:
                log.write(**line, **watcher.pace(trainer.nimg, trainer.waited))
        watcher.after(before)  # before the state, so that a resumed run lacks nothing of what it does not repeat
        if done or crossed(before, trainer.nimg, cfg.snapshot_images):
            _snapshots(trainer, out, saver)
        if done or trainer.stopping or crossed(before, trainer.nimg, cfg.state_images):
            milestone = bool(cfg.milestone_images) and crossed(
                trainer.nimg - cfg.state_images, trainer.nimg, cfg.milestone_images
            )
            saver.state(out / "state", trainer.nimg, trainer.tensors(), cfg.keep_states, milestone)
        saver.check()
        bar.update(trainer.nimg, f"loss {loss:.3f}")
        if trainer.stopping and not done:
            break
    saver.wait()
    if trainer.nimg < cfg.total_images:
        raise Stopped(
            f"{signal.Signals(trainer.stopping).name} at image {trainer.nimg:,}: the state is saved. Go on with\n"
            f"  gesso train {out} --resume",
            trainer.stopping,
        )


def _snapshots(trainer: Trainer, out: Path, saver: checkpoint.Saver) -> None:
    """One for each average; the first rank writes it."""
    nimg, run, rows = trainer.nimg, trainer.run, trainer.rows
    learned = {name for name, _ in trainer.denoiser.net.named_parameters()}  # constants stay as they are
    for profile, average in trainer.ema.averages.items():
        path = snapshot.path_for(out / "snapshots", nimg, profile)
        tensors = {
            name: _narrowed(whole(tensor).detach(), name, run.ema.snapshots if name in learned else "same")
            for name, tensor in average.items()
        }
        if trainer.ranks.main:
            saver.soon(functools.partial(snapshot.write, path, tensors, nimg, profile, run, rows))


def _narrowed(tensor: Tensor, name: str, dtype: str) -> Tensor:
    """A copy on the CPU. Raises RunError for numbers that 16 bits do not hold."""
    if dtype == "same":
        return tensor.to("cpu", copy=True)
    small = tensor.to("cpu", torch.float16)
    if not bool(small.isfinite().all()):
        raise RunError(f"{name} has numbers above 65,504, which float16 does not hold: set ema.snapshots=same")
    return small
