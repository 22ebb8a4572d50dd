"""Network, optimizer and EMAs of one run, and the training step. Time is nimg, the number of images seen."""

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gesso import ema, rng
from gesso.conditioning import Cond
from gesso.config import MDTConfig, RunConfig
from gesso.data.base import Dataset
from gesso.data.batching import Batcher
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import loss_bins
from gesso.errors import DivergenceError, RunError
from gesso.models import mp
from gesso.models.mdt import sample_keep_ids
from gesso.sampling import run_device
from gesso.training import optimizer, parallel
from gesso.training.ranks import SINGLE_PROCESS, Ranks, local_shard

MAX_NONFINITE_STEPS = 20
"""Maximum number of consecutive steps with a non-finite gradient."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""Signals that stop a run after a checkpoint; schedulers send the latter two."""


class Trainer:
    """State of a training; the state of the data is nimg alone.

    nimg: images seen. loss_sums: (2,) float64, sum of losses and number of images since the last log line;
    loss_bin_sums the same by noise level. loss_scale_state: (3,) float64, loss scale, good steps since it changed,
    consecutive steps with non-finite gradients. data_wait_s: seconds that steps waited for their batch. denoiser:
    denoiser with initial weights; None for random ones.
    """

    def __init__(
        self,
        run: RunConfig,
        dataset: Dataset,
        ranks: Ranks = SINGLE_PROCESS,
        device: torch.device | None = None,
        denoiser: diffusion.Denoiser | None = None,
    ):
        self.run, self.ranks, self.device = run, ranks, device or run_device(run)
        dtype = getattr(torch, run.train.dtype)
        torch.manual_seed(rng.derive_seed(run.train.seed, 0, "initial weights"))
        self.denoiser = denoiser or diffusion.build_denoiser(run)
        self.process, net = self.denoiser.process, self.denoiser.net
        self.modules = nn.ModuleDict({"net": net})
        self.uncertainty = diffusion.build_uncertainty(run, self.process)
        if self.uncertainty:
            self.modules["uncertainty"] = self.uncertainty
        self.modules.to(self.device, dtype).train()
        mp.normalize_weights_(mp.sphere_weights(self.modules))
        self.loss_module = parallel.parallelize(
            parallel.LossModule(self.denoiser, self.uncertainty, run.loss.weighting), run, ranks, self.device
        )
        self.sphere_parameters = mp.sphere_weights(self.modules)
        self.optimizer = optimizer.build_optimizer(run.optim, self.modules)
        ema_device = "cpu" if run.ema.device == "cpu" else None
        self.ema = ema.Tracker(net.state_dict(), ema.tracked_profiles(run.ema), ema_device)
        self.batcher = Batcher(dataset, run, self.process.sigma_data, self.device)
        rows = torch.arange(min(4096, run.train.total_images))
        self.control_rows = self.batcher.control_rows(rows) if run.control.variables else None
        self.nimg = 0
        self.micro_batch_size = run.train.micro_batch_size or -(-run.train.batch_size // ranks.world_size)
        self._batch_iterator: Iterator[tuple[Tensor, Tensor, Cond]] | None = None
        self.loss_sums = torch.zeros(2, dtype=torch.float64)
        self.loss_bin_sums = torch.zeros(2 * loss_bins.NUM_BINS, dtype=torch.float64)
        self.data_wait_s = 0.0
        dynamic = run.train.loss_scale == "dynamic"
        # 2^16 on the mean over elements, whichever reduction is trained with; a power of two rounds nothing.
        power = 16 - round(math.log2(run.elements)) if run.loss.reduction == "sum" else 16
        first = 2.0**power if dynamic else run.train.loss_scale
        self.loss_scale_state = torch.tensor(
            [first if run.train.precision == "float16" else 1.0, 0, 0], dtype=torch.float64
        )
        self.grad_norm, self.num_nonfinite_steps = math.nan, 0
        self.received_signals: Sequence[int] = ()
        self.stop_signal = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs besides nimg, by name."""
        averages = {f"ema.{p.key}.{name}": t for p, average in self.ema.averages.items() for name, t in average.items()}
        return {
            **{f"modules.{name}": t for name, t in self.modules.state_dict().items()},
            **{
                f"optimizer.{name}": t
                for name, t in optimizer.named_optimizer_state(self.optimizer, self.modules).items()
            },
            **averages,
            "running": self.loss_sums,
            "levels": self.loss_bin_sums,
            "scaling": self.loss_scale_state,
        }

    def pop_log_line(self) -> dict[str, Any]:
        """Return the values of a log line since the last call, and reset them."""
        total, n = self.loss_sums.tolist()
        line = {"nimg": self.nimg, "loss": total / n if n else None, "lr": self.optimizer.param_groups[0]["lr"]}
        line["loss_by_noise"] = loss_bins.bin_means(self.loss_bin_sums)
        self.loss_sums.zero_()
        self.loss_bin_sums.zero_()
        line["grad_norm"] = self.grad_norm if math.isfinite(self.grad_norm) else None
        if self.num_nonfinite_steps:
            line["nonfinite_steps"] = self.num_nonfinite_steps
        if self.run.train.precision == "float16":
            line["loss_scale"] = float(self.loss_scale_state[0])
        return line

    def step(self) -> float:
        """Train on one batch and return its loss, a mean over elements for any loss.reduction.

        A signal that any rank has received is in `stop_signal` of all of them.

        Raises:
            RunError: Loss or gradient is not finite and train.on_nonfinite is stop, or for the 20th time in a row;
            nothing is
                changed then.
        """
        run, size = self.run, self.run.train.batch_size
        counts, sample_index, x0, cond = self.next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        losses, u = self._forward_backward_with_retry(sample_index, counts, x0, cond)
        stops = losses.new_tensor([number in self.received_signals for number in STOP_SIGNALS])
        reduced = torch.cat([losses.sum()[None], stops, loss_bins.bin_sums(losses, u, counts)])
        total, heard, by_level = (
            self.ranks.all_reduce(reduced).double().cpu().split([1, len(STOP_SIGNALS), len(self.loss_bin_sums)])
        )
        value, self.stop_signal = (
            float(total) / size,
            max((n for n, h in zip(STOP_SIGNALS, heard, strict=True) if h), default=0),
        )
        parameters = [p for p in self.modules.parameters() if p.grad is not None]
        gradients = [cast(Tensor, local_shard(p).grad) for p in parameters]
        if self.loss_scale_state[0] != 1:
            torch._foreach_div_(gradients, float(self.loss_scale_state[0]))
        mp.project_gradients([local_shard(w) for w in self.sphere_parameters])
        norm = ema.full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self.grad_norm = float(norm)
        if self.check_finite_and_update_scale(value, u, losses, gradients):
            if run.optim.max_grad_norm:
                if not math.isfinite(self.grad_norm):  # values that were not finite are 0 by now
                    norm = ema.full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
                nn.utils.clip_grads_with_norm_(parameters, run.optim.max_grad_norm, norm)
            optimizer.set_learning_rate(self.optimizer, optimizer.learning_rate(run.optim, run.train, self.nimg))
            self.optimizer.step()
            mp.normalize_weights_([local_shard(w) for w in self.sphere_parameters])
        self.ema.update(self.nimg, self.nimg + size)
        self.nimg += size
        if math.isfinite(value):
            self.loss_sums += torch.tensor([value * size, size])
            self.loss_bin_sums += by_level
        return value

    def next_batch(self) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """Return this rank's share of the batch at nimg: sample indices, which of them count, x0 and conditions."""
        size = self.run.train.batch_size
        if self._batch_iterator is None:
            firsts = itertools.count(self.nimg, size)
            self._batch_iterator = self.batcher.prefetch(self.ranks.shard_batch(first, size)[0] for first in firsts)
        due, counts = self.ranks.shard_batch(self.nimg, size)
        started = time.perf_counter()
        sample_index, x0, cond = next(self._batch_iterator)
        self.data_wait_s += time.perf_counter() - started
        assert sample_index.equal(due), "nimg was moved after the first step"
        return counts, sample_index, x0, cond

    def _forward_backward_with_retry(
        self, sample_index: Tensor, valid: Tensor, x0: Tensor, cond: Cond
    ) -> tuple[Tensor, Tensor]:
        """Compute gradients in micro-batches; return the losses and quantiles of noise level of this rank's samples.

        If a GPU runs out of memory and the settings leave the micro-batch size open, it is halved.
        """
        while True:
            try:
                return self.forward_backward(sample_index, valid, x0, cond)
            except torch.OutOfMemoryError:
                # The first step alone: later, another rank may be past the same pass.
                if self.run.train.micro_batch_size or self.micro_batch_size == 1 or self.ranks.world_size > 1:
                    raise RunError(self._out_of_memory_message()) from None
                self.micro_batch_size = -(-self.micro_batch_size // 2)
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    def forward_backward(self, sample_index: Tensor, valid: Tensor, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Compute gradients in micro-batches; return losses (B,) and quantiles of noise level (B,)."""
        run, seed = self.run, self.run.train.seed
        u = rng.uniform(seed, sample_index, "noise level")[:, 0]
        s = self.process.icdf(u).to(x0)
        # DDP and FSDP average over ranks; the loss is the sum over the batch divided by its size.
        factor = self.ranks.world_size / run.train.batch_size * float(self.loss_scale_state[0])
        if run.loss.reduction == "sum":  # losses are means over the elements of a sample
            factor *= x0[0].numel()
        losses_of_batches, starts = [], range(0, len(sample_index), self.micro_batch_size)
        for j, start in enumerate(starts):
            at = slice(start, start + self.micro_batch_size)
            k = sample_index[at].to(self.device)
            eps = rng.normal(seed, k, "noise", x0.shape[1:], x0.dtype)
            if run.net.dropout:
                # The one draw that is keyed to the step, not to the sample.
                part = f"dropout of rank {self.ranks.rank}" + (f", part {j}" if j else "")
                torch.manual_seed(rng.derive_seed(seed, self.nimg, part))
            # DDP asks at the forward pass already whether to sum.
            with parallel.gradient_sync(self.loss_module, is_last=j == len(starts) - 1):
                with diffusion.autocast_context(run.train, self.device):
                    losses = self.loss_module(x0[at], s[at], eps, cond[at], self.mdt_mask(k, x0))
                if not bool(valid[at].all()):
                    losses = losses * valid[at].to(losses)
                (losses.sum() * factor).backward()
            losses_of_batches.append(losses.detach())
        return torch.cat(losses_of_batches), u

    def mdt_mask(self, sample_index: Tensor, x0: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return noise and token mask of MDT's second term (same images and levels), None for other networks."""
        run = self.run
        if not isinstance(run.net, MDTConfig):
            return None
        eps = rng.normal(run.train.seed, sample_index, "masked noise", x0.shape[1:], x0.dtype)
        tokens = x0.shape[2] * x0.shape[3] // run.net.patch_size**2
        return eps, sample_keep_ids(run.train.seed, sample_index, self.nimg, tokens, run.net.mask_ratio)

    def check_finite_and_update_scale(self, value: float, u: Tensor, losses: Tensor, gradients: list[Tensor]) -> bool:
        """Return True if the gradient of this step may change the weights; count failures and adapt the loss scale."""
        cfg = self.run.train
        scaled, dynamic = cfg.precision == "float16", cfg.loss_scale == "dynamic"
        if math.isfinite(value) and math.isfinite(self.grad_norm):
            self.loss_scale_state[2] = 0
            self.loss_scale_state[1] += 1
            if scaled and dynamic and self.loss_scale_state[1] >= 2000:
                self.loss_scale_state[:2] = torch.stack([self.loss_scale_state[0] * 2, self.loss_scale_state[1] * 0])
            return True
        self.num_nonfinite_steps += 1
        self.loss_scale_state[2] += 1
        overflow = scaled and dynamic and math.isfinite(value)
        if (cfg.on_nonfinite == "stop" and not overflow) or self.loss_scale_state[2] >= MAX_NONFINITE_STEPS:
            raise DivergenceError(self._divergence_message(u, losses))
        if overflow:
            self.loss_scale_state[:2] = torch.stack([self.loss_scale_state[0] / 2, self.loss_scale_state[1] * 0])
        if cfg.on_nonfinite == "zero" and not overflow:
            for gradient in gradients:
                torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=gradient)
            return True
        return False

    def _divergence_message(self, u: Tensor, losses: Tensor) -> str:
        bad = ~losses.isfinite().cpu()
        s = self.process.icdf(u[bad] if bool(bad.any()) else u)
        what = "loss" if bool(bad.any()) else "gradient"
        clip = self.run.elements if self.run.loss.reduction == "sum" else 1
        often = f" for the {int(self.loss_scale_state[2])}th time in a row" if self.loss_scale_state[2] > 1 else ""
        return (
            f"the {what} is not finite{often} at image {self.nimg:,} (step "
            f"{self.nimg // self.run.train.batch_size:,}), "
            f"noise levels {float(s.min()):.3g} to {float(s.max()):.3g}; weights and averages are as before that "
            "step.\n"
            f"Try a lower optim.lr (now {self.run.optim.lr:g}), a longer optim.warmup_images, or "
            f"optim.max_grad_norm={clip:g}."
        )

    def _out_of_memory_message(self) -> str:
        share = -(-self.run.train.batch_size // self.ranks.world_size)
        return (
            f"{self.micro_batch_size} samples at once are too many for the memory of {self.device}: set "
            f"train.micro_batch_size below {self.micro_batch_size} "
            f"(of this rank's {share}), train.activation_checkpointing=true, train.precision=bfloat16 or "
            "train.sharding=fsdp"
        )
