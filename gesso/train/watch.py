"""What is measured and drawn between steps, with a network of its own: that in training is left alone."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gesso import conditions, ema, generate, keyed
from gesso.cond import Cond
from gesso.config import Run
from gesso.data.batches import Batches
from gesso.data.samples import Dataset
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion.denoiser import Denoiser
from gesso.ema import Profile
from gesso.evaluate import score, validation
from gesso.nets import mp
from gesso.train.log import Log
from gesso.train.magnitudes import Magnitudes
from gesso.train.pace import Pace
from gesso.train.ranks import whole
from gesso.train.trainer import Trainer


def crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return bool(every) and after // every > before // every


def nearest(run: Run) -> Profile:
    """Of the averages that are tracked the one next to that of sample.*."""
    wanted, tracked = ema.chosen(run.sample), ema.tracked(run.ema)
    alike = [profile for profile in tracked if type(profile) is type(wanted)]
    return min(alike, key=lambda p: abs(math.log(_length(p) / _length(wanted)))) if alike else tracked[0]


def _length(profile: Profile) -> float:
    return profile.sigma_rel if isinstance(profile, ema.Power) else float(profile.halflife)


class Twin:
    """A second network of a run, on the CPU while nobody needs it."""

    def __init__(self, run: Run, device: torch.device):
        self.device = device
        self.denoiser = diffusion.build(run).to(getattr(torch, run.train.dtype)).eval().requires_grad_(False)

    @contextlib.contextmanager
    @torch.no_grad()
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[Denoiser]:
        """The denoiser with these weights, put back on the sphere. All ranks take part."""
        net = self.denoiser.to(self.device).net
        for name, tensor in net.state_dict().items():
            tensor.copy_(whole(weights[name]))
        mp.put_on_sphere(mp.sphere_weights(net))
        try:
            yield self.denoiser
        finally:
            self.denoiser.to("cpu")


class Watcher:
    """Writes to the log and to samples/ what run.watch asks for, after each step that comes to its time.

    Draws from no stream of random numbers, and changes nothing of the trainer. Raises UsageError for what cannot be
    measured, at once.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset, out: Path, log: Log | None):
        run = trainer.run
        self.trainer, self.dataset, self.out, self.log = trainer, dataset, out, log
        self.run, self.cfg, self.ranks, self.device = run, run.watch, trainer.ranks, trainer.device
        self.pace = Pace(run, trainer.ranks, trainer.device, trainer.nimg)
        self.average = nearest(run)
        self.held = validation.images(run, dataset) if self.cfg.validate_images else None
        end = run.train.total_images + run.train.batch_size - 1
        if any(crossed(0, end, every) for every in (self.cfg.sample_images, self.cfg.evaluate_images)):
            generate.check(run)
            generate.check_device(run, self.device)
            self.space = generate.opened_space(run)
            # Another time or length of this run is not stored yet.
            alone = run.sample.model_copy(update={"guide": None, "guidance": 1.0, "guide_sees": "nothing",
                                                  "guide_sigma_rel": None, "guide_nimg": None})  # fmt: skip
            self.drawing = run.model_copy(update={"sample": alone}) if run.sample.guide == "self" else run
            self.guide = generate.guide_of(out, self.drawing)

    @functools.cached_property
    def twin(self) -> Twin:
        return Twin(self.run, self.device)

    @functools.cached_property
    def validation(self) -> tuple[validation.Validation, list[validation.Pairs]]:
        """And the pairs of this rank, read once."""
        n = self.cfg.validate_samples
        found = validation.Validation(self.run, *self.held, self.device, n)
        mine = found.passes(torch.arange(n))[self.ranks.rank :: self.ranks.world]
        return found, [found.read(part) for part in mine]

    def after(self, before: int) -> None:
        """What is due since image `before`. All ranks take part."""
        cfg, now = self.cfg, self.trainer.nimg
        jobs = {
            self.validate: cfg.validate_images if self.held else None,
            self.magnitudes: cfg.magnitude_images,
            self.sample: cfg.sample_images,
            self.evaluate: cfg.evaluate_images,
        }
        due = [job for job, every in jobs.items() if crossed(before, now, every)]
        if due:
            # Building a network or a judge of pictures draws initial weights.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for job in due:
                    job()

    def _write(self, **values: object) -> None:
        if self.log:
            self.log.write(nimg=self.trainer.nimg, **values)

    def validate(self) -> None:
        """Of the weights as they are, and of each average."""
        net = self.trainer.denoiser.net
        kinds = {
            "weights": net.state_dict(),
            **{f"ema{p.key}": average for p, average in self.trainer.ema.averages.items()},
        }
        found, (validated, pairs) = {}, self.validation
        for name, weights in kinds.items():
            with self.twin.holding(weights) as denoiser:
                losses = self.ranks.sum(validated.losses(denoiser, pairs).to(self.device))
            found[name] = validated.means(losses.cpu())
        self._write(
            validation={name: mean for name, (mean, _) in found.items()},
            validation_by_noise={name: by_level for name, (_, by_level) in found.items()},
        )

    def magnitudes(self) -> None:
        """Of the samples that come next, at their levels and with their noise; weights before they are put back."""
        run, seed, first = self.run, self.run.train.seed, self.trainer.nimg
        average, stop = self.trainer.ema.averages[self.average], self.trainer.nimg + self.cfg.magnitude_samples
        batches = Batches(self.dataset, run, self.trainer.process.sd, self.device)
        with self.twin.holding(average) as denoiser, Magnitudes(denoiser.net, run.inputs.resolution) as magnitudes:
            for start in range(first, stop, run.train.batch_size):
                counter, counts = self.ranks.share(start, run.train.batch_size)
                x0, cond = batches(counter)
                s = denoiser.process.quantile(keyed.uniform(seed, counter, "noise level")[:, 0]).to(x0)
                for at in torch.arange(len(counter)).split(self.trainer.micro):
                    eps = keyed.normal(seed, counter[at].to(self.device), "noise", x0.shape[1:], x0.dtype)
                    level = s[at][:, None, None, None]
                    magnitudes.counts = (counts[at] & (counter[at] < stop)).to(self.device)
                    with diffusion.products(run.train, self.device):
                        denoiser(denoiser.process.alpha(level) * x0[at] + level * eps, s[at], cond[at])
            activations, main_path = magnitudes.activations(self.ranks), magnitudes.main_path(self.ranks)
            weights = magnitudes.weights({name: whole(tensor) for name, tensor in average.items()})
        self._write(magnitudes={"activations": activations, "main_path": main_path, "weights": weights})

    def drawn(self, denoiser: Denoiser, cond: Cond, n: int) -> Tensor:
        """Images of seeds 0 to n-1, (n, C, H, W) uint8 on the CPU; each rank draws its share."""
        seed, counts = self.ranks.share(0, n)
        made = torch.cat(
            list(generate.generate(denoiser, self.drawing, seed.tolist(), cond[seed], self.guide, self.space))
        )
        images = made.new_zeros(n, *made.shape[1:])
        images[seed[counts]] = made[counts]
        return self.ranks.sum(images.to(self.device)).cpu()

    @functools.cached_property
    def shown(self) -> Cond:
        """What the images of a grid are to show."""
        n = self.cfg.samples
        labels, prompts = conditions.labels_for(self.run, None, n), conditions.prompts_for(self.run, (), n)
        return conditions.build(self.run, range(n), self.trainer.rows, labels, prompts)[0]

    def sample(self) -> None:
        n = self.cfg.samples
        with self.twin.holding(self.trainer.ema.averages[self.average]) as denoiser:
            images = self.drawn(denoiser, self.shown, n)
        if self.log:
            picture = generate.grid(images, columns=max(1, round(n**0.5)))
            generate.save_png(picture, self.out / "samples" / f"nimg{self.trainer.nimg:012d}.png")
            self.log.picture(self.trainer.nimg, picture)

    @functools.cached_property
    def judged(self) -> tuple[Cond, score.Score]:
        """What the images to be scored are to show, and how they are scored."""
        count = score.number(self.run, self.dataset)
        cond, labels = score.conditions_of(self.run, self.dataset, count, self.trainer.rows)
        real = score.real_pictures(self.space, self.dataset, self.run)
        return cond, score.scorer(self.run, self.dataset, real, labels, self.device)

    def evaluate(self) -> None:
        """At the settings of sample.*, as many images as `gesso evaluate` takes."""
        cond, scored = self.judged
        with self.twin.holding(self.trainer.ema.averages[self.average]) as denoiser:
            images = self.drawn(denoiser, cond, score.number(self.run, self.dataset))
        if self.log:
            self._write(metrics={name: float(f"{value:.6g}") for name, value in scored(images).items()})
