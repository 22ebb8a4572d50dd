"""Network, optimizer and EMAs of a run, and the training step. Time is nimg, the number of images seen."""

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
"""Number of consecutive steps with a non-finite gradient at which training stops."""
LOSS_SCALE_GROWTH_INTERVAL = 2000
"""Number of finite steps after which a dynamic loss scale is doubled."""
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGTERM") if hasattr(signal, name)
)  # Windows has no SIGUSR1
"""Signals that stop a run after a checkpoint; job schedulers send the last two."""


class Trainer:
    """State of a training run, and its step. The state of the data is nimg alone.

    Attributes:
        nimg: Images seen.
        micro_batch_size: Samples per forward and backward pass of this rank.
        loss_sums: (2,) float64, sum of losses and number of images since the last log line.
        loss_bin_sums: (2 * NUM_BINS,) float64, the same by bin of noise level.
        loss_scale_state: (3,) float64, loss scale, finite steps since it changed, consecutive non-finite steps.
        data_wait_s: Seconds that steps have waited for their batch.
        received_signals: Signals that this process has received.
        stop_signal: A signal of STOP_SIGNALS that any rank has received by the last step; 0 for none.
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
        first_samples = torch.arange(min(4096, run.train.total_images))
        self.control_rows = self.batcher.control_rows(first_samples) if run.control.variables else None
        self.nimg = 0
        self.micro_batch_size = run.train.micro_batch_size or -(-run.train.batch_size // ranks.world_size)
        self._batch_iterator: Iterator[tuple[Tensor, Tensor, Cond]] | None = None
        self.loss_sums = torch.zeros(2, dtype=torch.float64)
        self.loss_bin_sums = torch.zeros(2 * loss_bins.NUM_BINS, dtype=torch.float64)
        self.data_wait_s = 0.0
        dynamic = run.train.loss_scale == "dynamic"
        # 2^16 for a mean over elements, and accordingly less for a sum; powers of two cause no rounding.
        exponent = 16 - round(math.log2(run.elements)) if run.loss.reduction == "sum" else 16
        scale = 2.0**exponent if dynamic else run.train.loss_scale
        self.loss_scale_state = torch.tensor(
            [scale if run.train.precision == "float16" else 1.0, 0, 0], dtype=torch.float64
        )
        self.grad_norm, self.num_nonfinite_steps = math.nan, 0
        self.received_signals: Sequence[int] = ()
        self.stop_signal = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Return by name all tensors that a resumed run needs besides nimg."""
        optimizer_state = optimizer.named_optimizer_state(self.optimizer, self.modules)
        return {
            **{f"modules.{name}": tensor for name, tensor in self.modules.state_dict().items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_state.items()},
            **{
                f"ema.{profile.key}.{name}": tensor
                for profile, average in self.ema.averages.items()
                for name, tensor in average.items()
            },
            "loss_sums": self.loss_sums,
            "loss_bin_sums": self.loss_bin_sums,
            "loss_scale_state": self.loss_scale_state,
        }

    def pop_log_line(self) -> dict[str, Any]:
        """Return the values of a log line since the last call, and reset them."""
        loss_sum, n = self.loss_sums.tolist()
        line = {
            "nimg": self.nimg,
            "loss": loss_sum / n if n else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss_by_noise": loss_bins.bin_means(self.loss_bin_sums),
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
        }
        self.loss_sums.zero_()
        self.loss_bin_sums.zero_()
        if self.num_nonfinite_steps:
            line["nonfinite_steps"] = self.num_nonfinite_steps
        if self.run.train.precision == "float16":
            line["loss_scale"] = float(self.loss_scale_state[0])
        return line

    def step(self) -> float:
        """Train on one batch and return its loss, a mean over elements for any loss.reduction.

        Raises:
            DivergenceError: Loss or gradient is not finite and train.on_nonfinite=stop, or is so for the 20th time in a
                row. Weights and averages are unchanged.
            RunError: The device is out of memory.
        """
        run, batch_size = self.run, self.run.train.batch_size
        valid, sample_index, x0, cond = self.next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        losses, u = self._forward_backward_with_retry(sample_index, valid, x0, cond)
        received = losses.new_tensor([number in self.received_signals for number in STOP_SIGNALS])
        reduced = torch.cat([losses.sum()[None], received, loss_bins.bin_sums(losses, u, valid)])
        loss_sum, received, bin_sums = (
            self.ranks.all_reduce(reduced).double().cpu().split([1, len(STOP_SIGNALS), len(self.loss_bin_sums)])
        )
        loss = float(loss_sum) / batch_size
        self.stop_signal = max((n for n, count in zip(STOP_SIGNALS, received, strict=True) if count), default=0)
        parameters = [p for p in self.modules.parameters() if p.grad is not None]
        gradients = [cast(Tensor, local_shard(p).grad) for p in parameters]
        if self.loss_scale_state[0] != 1:
            torch._foreach_div_(gradients, float(self.loss_scale_state[0]))
        mp.project_gradients([local_shard(w) for w in self.sphere_parameters])  # EDM2 Eq. 59
        norm = _gradient_norm(parameters)
        self.grad_norm = float(norm)
        if self.check_finite_and_update_scale(loss, u, losses, gradients):
            if run.optim.max_grad_norm:
                if not math.isfinite(self.grad_norm):  # non-finite values are set to 0 by now
                    norm = _gradient_norm(parameters)
                nn.utils.clip_grads_with_norm_(parameters, run.optim.max_grad_norm, norm)
            optimizer.set_learning_rate(self.optimizer, optimizer.learning_rate(run.optim, run.train, self.nimg))
            self.optimizer.step()
            mp.normalize_weights_([local_shard(w) for w in self.sphere_parameters])  # EDM2 Eq. 66
        self.ema.update(self.nimg, self.nimg + batch_size)
        self.nimg += batch_size
        if math.isfinite(loss):
            self.loss_sums += torch.tensor([loss * batch_size, batch_size])
            self.loss_bin_sums += bin_sums
        return loss

    def next_batch(self) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """Return this rank's part of the batch at nimg: valid (B,) bool, sample indices (B,), x0 and conditions."""
        batch_size = self.run.train.batch_size
        if self._batch_iterator is None:
            starts = itertools.count(self.nimg, batch_size)
            self._batch_iterator = self.batcher.prefetch(
                self.ranks.shard_batch(start, batch_size)[0] for start in starts
            )
        expected, valid = self.ranks.shard_batch(self.nimg, batch_size)
        started = time.perf_counter()
        sample_index, x0, cond = next(self._batch_iterator)
        self.data_wait_s += time.perf_counter() - started
        assert sample_index.equal(expected), "nimg was changed after the first step"
        return valid, sample_index, x0, cond

    def _forward_backward_with_retry(
        self, sample_index: Tensor, valid: Tensor, x0: Tensor, cond: Cond
    ) -> tuple[Tensor, Tensor]:
        """Call forward_backward, with half the micro-batch size after each torch.OutOfMemoryError.

        The size is halved only for a single rank without train.micro_batch_size: several ranks must make the same
        passes, and another rank may have finished this one.

        Raises:
            RunError: The device is out of memory and the size cannot be halved.
        """
        while True:
            try:
                return self.forward_backward(sample_index, valid, x0, cond)
            except torch.OutOfMemoryError:
                if self.run.train.micro_batch_size or self.micro_batch_size == 1 or self.ranks.world_size > 1:
                    raise RunError(self._out_of_memory_message()) from None
                self.micro_batch_size = -(-self.micro_batch_size // 2)
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    def forward_backward(self, sample_index: Tensor, valid: Tensor, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Compute gradients in micro-batches.

        Args:
            sample_index: Sample indices (B,), the keys of all random draws.
            valid: Samples that count (B,) bool.
            x0: Images or latents (B, C, H, W).
            cond: Conditions of the samples.

        Returns:
            Losses (B,), and quantiles of the noise level (B,) in [0, 1].
        """
        run, seed = self.run, self.run.train.seed
        u = rng.uniform(seed, sample_index, "noise level")[:, 0]
        s = self.process.icdf(u).to(x0)
        # DDP and FSDP average over ranks; the loss is the sum over the batch divided by its size.
        factor = self.ranks.world_size / run.train.batch_size * float(self.loss_scale_state[0])
        if run.loss.reduction == "sum":  # losses are means over the elements of a sample
            factor *= x0[0].numel()
        all_losses, starts = [], range(0, len(sample_index), self.micro_batch_size)
        for j, start in enumerate(starts):
            micro = slice(start, start + self.micro_batch_size)
            k = sample_index[micro].to(self.device)
            eps = rng.normal(seed, k, "noise", x0.shape[1:], x0.dtype)
            if run.net.dropout:
                # The only draw that is keyed to the step, rank and micro-batch instead of the sample.
                purpose = f"dropout of rank {self.ranks.rank}" + (f", part {j}" if j else "")
                torch.manual_seed(rng.derive_seed(seed, self.nimg, purpose))
            # The forward pass must be inside: DDP decides there whether to reduce gradients.
            with parallel.gradient_sync(self.loss_module, is_last=j == len(starts) - 1):
                with diffusion.autocast_context(run.train, self.device):
                    losses = self.loss_module(x0[micro], s[micro], eps, cond[micro], self.mdt_mask(k, x0))
                if not bool(valid[micro].all()):
                    losses = losses * valid[micro].to(losses)
                (losses.sum() * factor).backward()
            all_losses.append(losses.detach())
        return torch.cat(all_losses), u

    def mdt_mask(self, sample_index: Tensor, x0: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return noise and token mask of MDT's second loss term; None for other networks."""
        run = self.run
        if not isinstance(run.net, MDTConfig):
            return None
        eps = rng.normal(run.train.seed, sample_index, "masked noise", x0.shape[1:], x0.dtype)
        num_tokens = x0.shape[2] * x0.shape[3] // run.net.patch_size**2
        return eps, sample_keep_ids(run.train.seed, sample_index, self.nimg, num_tokens, run.net.mask_ratio)

    def check_finite_and_update_scale(self, loss: float, u: Tensor, losses: Tensor, gradients: list[Tensor]) -> bool:
        """Return True if the optimizer may use the gradients; count non-finite steps and adapt the loss scale.

        With train.on_nonfinite=zero, non-finite values in `gradients` are set to 0 in place.

        Raises:
            DivergenceError: As `step`.
        """
        cfg = self.run.train
        dynamic = cfg.precision == "float16" and cfg.loss_scale == "dynamic"
        if math.isfinite(loss) and math.isfinite(self.grad_norm):
            self.loss_scale_state[2] = 0
            self.loss_scale_state[1] += 1
            if dynamic and self.loss_scale_state[1] >= LOSS_SCALE_GROWTH_INTERVAL:
                self.loss_scale_state[:2] = torch.stack([self.loss_scale_state[0] * 2, self.loss_scale_state[1] * 0])
            return True
        self.num_nonfinite_steps += 1
        self.loss_scale_state[2] += 1
        overflow = dynamic and math.isfinite(loss)
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
        nonfinite = ~losses.isfinite().cpu()
        has_nonfinite_loss = bool(nonfinite.any())
        s = self.process.icdf(u[nonfinite] if has_nonfinite_loss else u)
        step, num_failures = self.nimg // self.run.train.batch_size, int(self.loss_scale_state[2])
        max_norm = self.run.elements if self.run.loss.reduction == "sum" else 1
        return (
            f"the {'loss' if has_nonfinite_loss else 'gradient'} is not finite"
            f"{f' for the {num_failures}th time in a row' if num_failures > 1 else ''} at image {self.nimg:,} "
            f"(step {step:,}), noise levels {float(s.min()):.3g} to {float(s.max()):.3g}; weights and averages are as "
            f"before that step.\nTry a lower optim.lr (now {self.run.optim.lr:g}), a longer optim.warmup_images, or "
            f"optim.max_grad_norm={max_norm:g}."
        )

    def _out_of_memory_message(self) -> str:
        per_rank = -(-self.run.train.batch_size // self.ranks.world_size)
        return (
            f"{self.device} is out of memory in a pass over {self.micro_batch_size} samples: set "
            f"train.micro_batch_size below {self.micro_batch_size} (this rank has {per_rank} samples per batch), "
            "train.activation_checkpointing=true, train.precision=bfloat16 or train.sharding=fsdp"
        )


def _gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the L2 norm of all gradients, over all ranks if they are sharded."""
    return ema.full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
