"""Validation, samples and metrics during training, on a second network."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gesso import conditioning, ema, rng, sampling
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.data.base import Dataset
from gesso.data.batching import Batcher
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion.denoiser import Denoiser
from gesso.ema import Profile
from gesso.errors import NonFiniteSamplesError
from gesso.evaluation import validation
from gesso.evaluation.metrics import select_metrics
from gesso.evaluation.metrics.validation_loss import mean_losses
from gesso.evaluation.toy_evaluation import ToyEvaluator
from gesso.models import mp
from gesso.training.logging import RunLog
from gesso.training.magnitudes import Magnitudes
from gesso.training.throughput import ThroughputMeter
from gesso.training.trainer import Trainer

logger = logging.getLogger(__name__)


def is_due(before: int, after: int, every: int | None) -> bool:
    """Return True if a multiple of `every` lies in (before, after]."""
    return every is not None and after // every > before // every


def nearest_tracked_profile(run: RunConfig) -> Profile:
    """Return the tracked EMA profile closest to the one that sample.* selects."""
    target, tracked = ema.sampling_profile(run.sample), ema.tracked_profiles(run.ema)
    same_kind = [profile for profile in tracked if type(profile) is type(target)]
    if not same_kind:
        return tracked[0]
    return min(same_kind, key=lambda profile: abs(math.log(_profile_length(profile) / _profile_length(target))))


def _profile_length(profile: Profile) -> float:
    assert not isinstance(profile, ema.RawProfile)  # never tracked
    return profile.sigma_rel if isinstance(profile, ema.PowerProfile) else profile.halflife


class EvalModel:
    """A second network of a run, which is on the CPU while it is not used."""

    def __init__(self, run: RunConfig, device: torch.device):
        self.device = device
        self.denoiser = diffusion.build_denoiser(run).to(getattr(torch, run.train.dtype)).eval().requires_grad_(False)

    @contextlib.contextmanager
    @torch.no_grad()
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[Denoiser]:
        """Yield the denoiser with the given weights, normalized. All ranks must call it."""
        net = self.denoiser.to(self.device).net
        for name, tensor in net.state_dict().items():
            tensor.copy_(ema.full_tensor(weights[name]))
        mp.normalize_weights_(mp.sphere_weights(net))
        try:
            yield self.denoiser
        finally:
            self.denoiser.to("cpu")


class Monitor:
    """Write the measurements that monitor.* selects to the log, and sample grids to sheets/, whenever they are due.

    The monitor does not change the trainer or its random numbers. The constructor raises UsageError for anything that
    cannot be measured.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset, out: Path, log: RunLog | None):
        run = trainer.run
        self.trainer, self.dataset, self.out, self.log = trainer, dataset, out, log
        self.run, self.cfg, self.ranks, self.device = run, run.monitor, trainer.ranks, trainer.device
        self.throughput = ThroughputMeter(run, trainer.ranks, trainer.device, trainer.nimg)
        select_metrics((*run.eval.metrics, *run.eval.repeated))  # raises for unknown names before training
        self.ema_profile = nearest_tracked_profile(run)
        self.validation_set = validation.open_validation_set(run, dataset) if self.cfg.validate_every else None
        end = run.train.total_images + run.train.batch_size - 1
        if any(is_due(0, end, every) for every in (self.cfg.sample_every, self.cfg.evaluate_every)):
            sampling.check_sampling(run, self.device)
            self.normalizer = sampling.open_decoder(run)
            self.sample_run = run
            if run.sample.guide_run == "self":  # a guide from snapshots that do not exist yet: sample without guidance
                update = {"guide_run": None, "guidance": 1.0, "guide_conditioning": "none",
                          "guide_sigma_rel": None, "guide_nimg": None}  # fmt: skip
                self.sample_run = run.model_copy(update={"sample": run.sample.model_copy(update=update)})
            self.guide = sampling.load_guide(out, self.sample_run)

    @functools.cached_property
    def eval_model(self) -> EvalModel:
        """The second network, built when it is first used."""
        return EvalModel(self.run, self.device)

    @functools.cached_property
    def validation_loss(self) -> tuple[validation.ValidationLoss, list[validation.ValidationBatch]]:
        """The validation loss, and the batches of this rank, read once."""
        assert self.validation_set is not None
        n = self.cfg.validation_pairs
        validation_loss = validation.ValidationLoss(self.run, *self.validation_set, self.device, n)
        indices = validation_loss.split(torch.arange(n))[self.ranks.rank :: self.ranks.world_size]
        return validation_loss, [validation_loss.load_batch(batch_indices) for batch_indices in indices]

    def on_step_end(self, before: int) -> None:
        """Run all measurements that became due after image `before`. All ranks must call it."""
        cfg = self.cfg
        intervals = {
            self.log_validation_loss: cfg.validate_every if self.validation_set else None,
            self.log_magnitudes: cfg.magnitude_every,
            self.log_samples: cfg.sample_every,
            self.log_metrics: cfg.evaluate_every,
        }
        due = [measure for measure, every in intervals.items() if is_due(before, self.trainer.nimg, every)]
        if due:
            # The random state is restored: networks of the measurements draw initial weights.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for measure in due:
                    measure()

    def _write(self, **values: object) -> None:
        if self.log:
            self.log.write(nimg=self.trainer.nimg, **values)

    def log_validation_loss(self) -> None:
        """Log the validation loss of the current weights and of each EMA."""
        weights_by_name = {
            "weights": self.trainer.denoiser.net.state_dict(),
            **{f"ema{profile.key}": average for profile, average in self.trainer.ema.averages.items()},
        }
        means, validation_loss, batches = {}, *self.validation_loss
        for name, weights in weights_by_name.items():
            with self.eval_model.with_weights(weights) as denoiser:
                losses = self.ranks.all_reduce(validation_loss.losses(denoiser, batches).to(self.device))
            means[name] = mean_losses(losses.cpu(), validation_loss.positions)
        self._write(
            validation={name: mean for name, (mean, _) in means.items()},
            validation_by_noise={name: bin_means for name, (_, bin_means) in means.items()},
        )

    def log_magnitudes(self) -> None:
        """Log magnitudes over the next training samples with their noise; EMA weights before normalization."""
        run, seed, nimg = self.run, self.run.train.seed, self.trainer.nimg
        average, stop = self.trainer.ema.averages[self.ema_profile], nimg + self.cfg.magnitude_samples
        batches = Batcher(self.dataset, run, self.trainer.process.sigma_data, self.device)
        with (
            self.eval_model.with_weights(average) as denoiser,
            Magnitudes(denoiser.net, run.input_spec.resolution) as magnitudes,
        ):
            for start in range(nimg, stop, run.train.batch_size):
                sample_index, valid = self.ranks.shard_batch(start, run.train.batch_size)
                x0, cond = batches(sample_index)
                s = denoiser.process.icdf(rng.uniform(seed, sample_index, "noise level")[:, 0]).to(x0)
                for micro in torch.arange(len(sample_index)).split(self.trainer.micro_batch_size):
                    eps = rng.normal(seed, sample_index[micro].to(self.device), "noise", x0.shape[1:], x0.dtype)
                    level = s[micro][:, None, None, None]
                    magnitudes.valid = (valid[micro] & (sample_index[micro] < stop)).to(self.device)
                    with diffusion.autocast_context(run.train, self.device):
                        denoiser(denoiser.process.alpha(level) * x0[micro] + level * eps, s[micro], cond[micro])
            activations, main_path = magnitudes.activations(self.ranks), magnitudes.main_path(self.ranks)
            weights = magnitudes.weights({name: ema.full_tensor(tensor) for name, tensor in average.items()})
        self._write(magnitudes={"activations": activations, "main_path": main_path, "weights": weights})

    def generate_images(self, denoiser: Denoiser, cond: Cond, n: int) -> Tensor | None:
        """Return images (n, C, H, W) uint8 of the seeds 0 to n-1 on the CPU; each rank samples a part.

        Returns None, with a warning, if a sample is not finite: training continues.
        """
        seeds, valid = self.ranks.shard_batch(0, n)
        problem, generated = "", torch.empty(0)
        try:
            batches = sampling.generate(
                denoiser, self.sample_run, seeds.tolist(), cond[seeds], self.guide, self.normalizer
            )
            generated = torch.cat(list(batches))
        except NonFiniteSamplesError as error:
            problem = str(error)
        if float(self.ranks.all_reduce(torch.tensor(float(bool(problem)), device=self.device))):
            logger.warning("no samples at image %s: %s", f"{self.trainer.nimg:,}", problem or "another rank has NaN")
            return None
        images = generated.new_zeros(n, *generated.shape[1:])
        images[seeds[valid]] = generated[valid]
        return self.ranks.all_reduce(images.to(self.device)).cpu()

    @functools.cached_property
    def sample_cond(self) -> Cond:
        """The conditions of a sample grid."""
        n = self.cfg.num_samples
        labels = conditioning.expand_labels(self.run, None, range(n))
        prompts = conditioning.expand_prompts(self.run, (), range(n))
        return sampling.build_cond(self.run, range(n), self.trainer.control_rows, labels, prompts)[0]

    def log_samples(self) -> None:
        """Write a sample grid."""
        n = self.cfg.num_samples
        with self.eval_model.with_weights(self.trainer.ema.averages[self.ema_profile]) as denoiser:
            images = self.generate_images(denoiser, self.sample_cond, n)
        if self.log and images is not None:
            grid = sampling.image_grid(images, columns=max(1, round(n**0.5)))
            sampling.save_png(grid, self.out / "sheets" / f"nimg{self.trainer.nimg:012d}.png")
            self.log.log_image(self.trainer.nimg, grid)

    @functools.cached_property
    def toy_evaluator(self) -> ToyEvaluator:
        """The conditions and metrics of eval.toy_metrics."""
        return ToyEvaluator(self.run, self.dataset, self.trainer.control_rows, self.normalizer, self.device)

    def log_metrics(self) -> None:
        """Log eval.toy_metrics at the settings of sample.*, with as many samples as `gesso evaluate`."""
        evaluator = self.toy_evaluator
        with self.eval_model.with_weights(self.trainer.ema.averages[self.ema_profile]) as denoiser:
            images = self.generate_images(denoiser, evaluator.cond, evaluator.num_samples)
        if self.log and images is not None:
            self._write(metrics={name: float(f"{value:.6g}") for name, value in evaluator.values(images).items()})
