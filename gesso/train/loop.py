"""The training loop. Time is nimg, the number of images seen; the data state is nimg and nothing else."""

import itertools
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from gesso import ema, keyed, snapshot
from gesso.cond import Cond
from gesso.config import MDT, Run
from gesso.data.batches import Batches
from gesso.data.samples import Dataset
from gesso.diffusion import denoiser as diffusion
from gesso.errors import RunError, Stopped
from gesso.generate import device_of
from gesso.nets import mp
from gesso.nets.mdt import keep_ids
from gesso.train import checkpoint, optim
from gesso.train.log import Bar, Log


class Trainer:
    """Network, optimizer and averages of one run, and the step that moves them on.

    nimg: images seen; running: (2,) float64, sum of losses and number of images since the last log line.
    """

    def __init__(self, run: Run, dataset: Dataset):
        self.run, self.device = run, device_of(run)
        dtype = getattr(torch, run.train.dtype)
        torch.manual_seed(keyed.number(run.train.seed, 0, "initial weights"))
        self.denoiser = diffusion.build(run)
        self.process, net = self.denoiser.process, self.denoiser.net
        self.modules = nn.ModuleDict({"net": net})
        self.uncertainty = diffusion.Uncertainty(self.process) if run.loss.weighting == "uncertainty" else None
        if self.uncertainty:
            self.modules["uncertainty"] = self.uncertainty
        self.modules.to(self.device, dtype).train()
        self.sphere = mp.sphere_weights(self.modules)
        mp.put_on_sphere(self.sphere)
        self.optimizer = optim.build(run.optim, self.modules)
        self.ema = ema.Tracker(net.state_dict(), ema.tracked(run.ema))
        self.batches = Batches(dataset, run, self.process.sd, self.device)
        rows = torch.arange(min(4096, run.train.total_images))
        self.rows = self.batches.rows(rows) if run.control.variables else None
        self.nimg = 0
        self._stream: Iterator[tuple[Tensor, Tensor, Cond]] | None = None
        self.running = torch.zeros(2, dtype=torch.float64)
        self.grad_norm = math.nan

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs besides nimg, by name."""
        averages = {f"ema.{p.key}.{name}": t for p, average in self.ema.averages.items() for name, t in average.items()}
        return {
            **{f"modules.{name}": t for name, t in self.modules.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in optim.named_state(self.optimizer, self.modules).items()},
            **averages,
            "running": self.running,
        }

    def step(self) -> float:
        """One batch. Returns its loss. Raises RunError, with nothing changed, when loss or gradient is not finite."""
        run = self.run
        seed, size = run.train.seed, run.train.batch_size
        counter, x0, cond = self._next()
        s = self.process.quantile(keyed.uniform(seed, counter, "noise level")[:, 0]).to(x0)
        eps = keyed.normal(seed, counter.to(self.device), "noise", x0.shape[1:], x0.dtype)
        if run.net.dropout:
            # The one draw that is keyed to the step, not to the sample.
            torch.manual_seed(keyed.number(seed, self.nimg, "dropout of rank 0"))
        losses = diffusion.loss(self.denoiser, self.process, x0, s, eps, cond, run.loss.weighting, self.uncertainty)
        if isinstance(run.net, MDT):
            losses = losses + self._masked(counter, x0, s, cond)
        loss = losses.sum() / size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mp.project_gradients(self.sphere)
        parameters = [p for p in self.modules.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        value, self.grad_norm = float(loss.detach()), float(norm)
        if not (math.isfinite(value) and math.isfinite(self.grad_norm)):
            raise RunError(self._diverged(s, losses.detach()))
        if run.optim.clip:
            nn.utils.clip_grads_with_norm_(parameters, run.optim.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(run.optim, run.train, self.nimg)
        self.optimizer.step()
        mp.put_on_sphere(self.sphere)
        self.ema.update(self.nimg, self.nimg + size)
        self.nimg += size
        self.running += torch.tensor([value * size, size])
        return value

    def _next(self) -> tuple[Tensor, Tensor, Cond]:
        """Counter, x0 and conditions of the batch that begins at nimg."""
        if self._stream is None:
            size = self.run.train.batch_size
            self._stream = self.batches.ahead(torch.arange(k, k + size) for k in itertools.count(self.nimg, size))
        batch = next(self._stream)
        assert int(batch[0][0]) == self.nimg, "nimg was moved after the first step"
        return batch

    def _masked(self, counter: Tensor, x0: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """MDT's second term: the same images and levels, noise of its own, most tokens seen."""
        run, counter = self.run, counter.to(self.device)
        eps = keyed.normal(run.train.seed, counter, "masked noise", x0.shape[1:], x0.dtype)
        tokens = x0.shape[2] * x0.shape[3] // run.net.patch**2
        keep = keep_ids(run.train.seed, counter, self.nimg, tokens, run.net.mask_ratio)
        return diffusion.loss(self.denoiser, self.process, x0, s, eps, cond, run.loss.weighting, self.uncertainty, keep)

    def _diverged(self, s: Tensor, losses: Tensor) -> str:
        bad = ~losses.isfinite()
        levels = s[bad] if bool(bad.any()) else s
        what = "loss" if bool(bad.any()) else "gradient"
        return (
            f"the {what} is not finite at image {self.nimg:,} (step {self.nimg // self.run.train.batch_size:,}), "
            f"noise levels {float(levels.min()):.3g} to {float(levels.max()):.3g}; weights and averages are as before that step.\n"
            f"Try a lower optim.lr (now {self.run.optim.lr:g}), a longer optim.warmup_images, or optim.clip=1."
        )


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the loop to see between steps; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every


def train(run: Run, dataset: Dataset, out: Path, console: Console) -> None:
    """Train `run` in the folder `out` from its newest state, or from the beginning, to train.total_images.

    Writes log.jsonl, state/ and snapshots/. Raises Stopped on SIGINT and SIGTERM with the state saved,
    RunError when the loss diverges or the disk refuses.
    """
    trainer = Trainer(run, dataset)
    trainer.nimg = checkpoint.load_latest(
        out / "state", trainer.tensors(), lambda text: console.print(f"warning: {text}")
    )
    log = Log(out / "log.jsonl")
    log.rewind(trainer.nimg)
    if trainer.nimg:
        console.print(f"resumed at image {trainer.nimg:,}", highlight=False)
    elif dataset.unreadable:
        log.write(nimg=0, unreadable=dataset.unreadable)
    with caught_signals() as caught, Bar(console, run.train.total_images, trainer.nimg, run.recipe) as bar:
        try:
            _steps(trainer, out, log, bar, caught)
        except RunError as error:
            last = checkpoint.stored(out / "state")
            where = f"last good state: {last[-1]}" if last else "no state was saved yet"
            raise RunError(f"{error}\n{where}") from error


def _steps(trainer: Trainer, out: Path, log: Log, bar: Bar, caught: list[int]) -> None:
    cfg = trainer.run.train
    started, started_at = time.monotonic(), trainer.nimg
    while trainer.nimg < cfg.total_images:
        before = trainer.nimg
        loss = trainer.step()
        done = trainer.nimg >= cfg.total_images
        if done or crossed(before, trainer.nimg, cfg.log_images):
            total, n = trainer.running.tolist()
            trainer.running.zero_()
            log.write(
                nimg=trainer.nimg,
                loss=total / n,
                lr=trainer.optimizer.param_groups[0]["lr"],
                grad_norm=trainer.grad_norm,
                images_per_second=round((trainer.nimg - started_at) / (time.monotonic() - started), 1),
            )
        if done or crossed(before, trainer.nimg, cfg.snapshot_images):
            for profile, average in trainer.ema.averages.items():
                path = snapshot.path_for(out / "snapshots", trainer.nimg, profile)
                snapshot.write(path, average, trainer.nimg, profile, trainer.run, trainer.rows)
        if done or caught or crossed(before, trainer.nimg, cfg.state_images):
            checkpoint.save(out / "state", trainer.nimg, trainer.tensors())
        bar.update(trainer.nimg, f"loss {loss:.3f}")
        if caught and not done:
            name = signal.Signals(caught[0]).name
            raise Stopped(
                f"{name} at image {trainer.nimg:,}: the state is saved. Go on with\n  gesso train {out} --resume",
                caught[0],
            )
