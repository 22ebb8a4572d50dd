"""Network, optimizer and averages of one run, and the step that moves them on. Time is nimg, the number of images seen."""

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gesso import ema, keyed
from gesso.cond import Cond
from gesso.config import MDT, Run
from gesso.data.batches import Batches
from gesso.data.samples import Dataset
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import levels
from gesso.errors import Diverged, RunError
from gesso.generate import device_of
from gesso.nets import mp
from gesso.nets.mdt import keep_ids
from gesso.train import optim, parallel
from gesso.train.ranks import ALONE, Ranks, own, whole

IN_A_ROW = 20
"""steps whose gradient is not finite"""
STOPS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""signals that stop a run with its state saved; schedulers send the latter two"""


class Trainer:
    """The data state is nimg and nothing else.

    nimg: images seen; running: (2,) float64, sum of losses and number of images since the last log line, levels the same
    by noise level; scaling: (3,) float64, loss scale, good steps since it last changed, and steps in a row whose
    gradient was not finite; waited: seconds that steps waited for their batch. denoiser: with weights to start from;
    None: random ones.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        ranks: Ranks = ALONE,
        device: torch.device | None = None,
        denoiser: diffusion.Denoiser | None = None,
    ):
        self.run, self.ranks, self.device = run, ranks, device or device_of(run)
        dtype = getattr(torch, run.train.dtype)
        torch.manual_seed(keyed.number(run.train.seed, 0, "initial weights"))
        self.denoiser = denoiser or diffusion.build(run)
        self.process, net = self.denoiser.process, self.denoiser.net
        self.modules = nn.ModuleDict({"net": net})
        self.uncertainty = diffusion.build_uncertainty(run, self.process)
        if self.uncertainty:
            self.modules["uncertainty"] = self.uncertainty
        self.modules.to(self.device, dtype).train()
        mp.put_on_sphere(mp.sphere_weights(self.modules))
        self.parallel = parallel.prepare(
            parallel.Objective(self.denoiser, self.uncertainty, run.loss.weighting), run, ranks, self.device
        )
        self.sphere = mp.sphere_weights(self.modules)
        self.optimizer = optim.build(run.optim, self.modules)
        kept = "cpu" if run.ema.device == "cpu" else None
        self.ema = ema.Tracker(net.state_dict(), ema.tracked(run.ema), kept)
        self.batches = Batches(dataset, run, self.process.sd, self.device)
        rows = torch.arange(min(4096, run.train.total_images))
        self.rows = self.batches.rows(rows) if run.control.variables else None
        self.nimg = 0
        self.micro = run.train.micro_batch or -(-run.train.batch_size // ranks.world)
        self._stream: Iterator[tuple[Tensor, Tensor, Cond]] | None = None
        self.running = torch.zeros(2, dtype=torch.float64)
        self.levels = torch.zeros(2 * levels.BINS, dtype=torch.float64)
        self.waited = 0.0
        dynamic = run.train.loss_scale == "dynamic"
        # 2^16 on the mean over elements, whichever reduction is trained with; a power of two rounds nothing.
        power = 16 - round(math.log2(run.elements)) if run.loss.reduction == "sum" else 16
        first = 2.0**power if dynamic else run.train.loss_scale
        self.scaling = torch.tensor([first if run.train.precision == "float16" else 1.0, 0, 0], dtype=torch.float64)
        self.grad_norm, self.nonfinite = math.nan, 0
        self.caught: Sequence[int] = ()
        self.stopping = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs besides nimg, by name."""
        averages = {f"ema.{p.key}.{name}": t for p, average in self.ema.averages.items() for name, t in average.items()}
        return {
            **{f"modules.{name}": t for name, t in self.modules.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in optim.named_state(self.optimizer, self.modules).items()},
            **averages,
            "running": self.running,
            "levels": self.levels,
            "scaling": self.scaling,
        }

    def summary(self) -> dict[str, float | int]:
        """A line of the log: what happened since the last one."""
        total, n = self.running.tolist()
        line = {"nimg": self.nimg, "loss": total / n if n else None, "lr": self.optimizer.param_groups[0]["lr"]}
        line["loss_by_noise"] = levels.means(self.levels)
        self.running.zero_()
        self.levels.zero_()
        line["grad_norm"] = self.grad_norm if math.isfinite(self.grad_norm) else None
        if self.nonfinite:
            line["nonfinite_steps"] = self.nonfinite
        if self.run.train.precision == "float16":
            line["loss_scale"] = float(self.scaling[0])
        return line

    def step(self) -> float:
        """One batch. Returns its loss, a mean over elements whatever loss.reduction says. A signal that any rank has `caught` is `stopping` on all of them.

        Raises RunError, with nothing changed, when loss or gradient is not finite and the settings say stop, or for the
        20th time in a row.
        """
        run, size = self.run, self.run.train.batch_size
        counts, counter, x0, cond = self._next()
        self.optimizer.zero_grad(set_to_none=True)
        losses, u = self._backward(counter, counts, x0, cond)
        stops = losses.new_tensor([number in self.caught for number in STOPS])
        said = torch.cat([losses.sum()[None], stops, levels.sums(losses, u, counts)])
        total, heard, by_level = self.ranks.sum(said).double().cpu().split([1, len(STOPS), len(self.levels)])
        value, self.stopping = float(total) / size, max((n for n, h in zip(STOPS, heard, strict=True) if h), default=0)
        parameters = [p for p in self.modules.parameters() if p.grad is not None]
        gradients = [own(p).grad for p in parameters]
        if self.scaling[0] != 1:
            torch._foreach_div_(gradients, float(self.scaling[0]))
        mp.project_gradients([own(w) for w in self.sphere])
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        self.grad_norm = float(norm)
        if self._usable(value, u, losses, gradients):
            if run.optim.clip:
                if not math.isfinite(self.grad_norm):  # values that were not finite are 0 by now
                    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
                nn.utils.clip_grads_with_norm_(parameters, run.optim.clip, norm)
            optim.set_rate(self.optimizer, optim.learning_rate(run.optim, run.train, self.nimg))
            self.optimizer.step()
            mp.put_on_sphere([own(w) for w in self.sphere])
        self.ema.update(self.nimg, self.nimg + size)
        self.nimg += size
        if math.isfinite(value):
            self.running += torch.tensor([value * size, size])
            self.levels += by_level
        return value

    def _next(self) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """Of this rank's share of the batch that begins at nimg: which samples count, counters, x0 and conditions."""
        size = self.run.train.batch_size
        if self._stream is None:
            firsts = itertools.count(self.nimg, size)
            self._stream = self.batches.ahead(self.ranks.share(first, size)[0] for first in firsts)
        due, counts = self.ranks.share(self.nimg, size)
        asked = time.perf_counter()
        counter, x0, cond = next(self._stream)
        self.waited += time.perf_counter() - asked
        assert counter.equal(due), "nimg was moved after the first step"
        return counts, counter, x0, cond

    def _backward(self, counter: Tensor, counts: Tensor, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's samples, in passes of `micro`; their losses and their places in the training draw.

        On a GPU whose memory they exceed, and where the settings leave it open, passes are halved.
        """
        while True:
            try:
                return self._passes(counter, counts, x0, cond)
            except torch.OutOfMemoryError:
                # The first step alone: later, another rank may be past the same pass.
                if self.run.train.micro_batch or self.micro == 1 or self.ranks.world > 1:
                    raise RunError(self._too_large()) from None
                self.micro = -(-self.micro // 2)
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    def _passes(self, counter: Tensor, counts: Tensor, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        run, seed = self.run, self.run.train.seed
        u = keyed.uniform(seed, counter, "noise level")[:, 0]
        s = self.process.quantile(u).to(x0)
        # DDP and FSDP average over ranks; the loss is the sum over the batch divided by its size.
        factor = self.ranks.world / run.train.batch_size * float(self.scaling[0])
        if run.loss.reduction == "sum":  # losses are means over the elements of a sample
            factor *= x0[0].numel()
        found, starts = [], range(0, len(counter), self.micro)
        for j, start in enumerate(starts):
            at = slice(start, start + self.micro)
            k = counter[at].to(self.device)
            eps = keyed.normal(seed, k, "noise", x0.shape[1:], x0.dtype)
            if run.net.dropout:
                # The one draw that is keyed to the step, not to the sample.
                part = f"dropout of rank {self.ranks.rank}" + (f", part {j}" if j else "")
                torch.manual_seed(keyed.number(seed, self.nimg, part))
            # DDP asks at the forward pass already whether to sum.
            with parallel.summing(self.parallel, last=j == len(starts) - 1):
                with diffusion.products(run.train, self.device):
                    losses = self.parallel(x0[at], s[at], eps, cond[at], self._masked(k, x0))
                if not bool(counts[at].all()):
                    losses = losses * counts[at].to(losses)
                (losses.sum() * factor).backward()
            found.append(losses.detach())
        return torch.cat(found), u

    def _masked(self, counter: Tensor, x0: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of MDT's second term: the same images and levels, noise of its own, most tokens seen."""
        run = self.run
        if not isinstance(run.net, MDT):
            return None
        eps = keyed.normal(run.train.seed, counter, "masked noise", x0.shape[1:], x0.dtype)
        tokens = x0.shape[2] * x0.shape[3] // run.net.patch**2
        return eps, keep_ids(run.train.seed, counter, self.nimg, tokens, run.net.mask_ratio)

    def _usable(self, value: float, u: Tensor, losses: Tensor, gradients: list[Tensor]) -> bool:
        """Whether this step's gradient may move the weights; counts, and adapts the loss scale."""
        cfg = self.run.train
        scaled, dynamic = cfg.precision == "float16", cfg.loss_scale == "dynamic"
        if math.isfinite(value) and math.isfinite(self.grad_norm):
            self.scaling[2] = 0
            self.scaling[1] += 1
            if scaled and dynamic and self.scaling[1] >= 2000:
                self.scaling[:2] = torch.stack([self.scaling[0] * 2, self.scaling[1] * 0])
            return True
        self.nonfinite += 1
        self.scaling[2] += 1
        overflow = scaled and dynamic and math.isfinite(value)
        if (cfg.nonfinite == "stop" and not overflow) or self.scaling[2] >= IN_A_ROW:
            raise Diverged(self._diverged(u, losses))
        if overflow:
            self.scaling[:2] = torch.stack([self.scaling[0] / 2, self.scaling[1] * 0])
        if cfg.nonfinite == "zero" and not overflow:
            for gradient in gradients:
                torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=gradient)
            return True
        return False

    def _diverged(self, u: Tensor, losses: Tensor) -> str:
        bad = ~losses.isfinite().cpu()
        s = self.process.quantile(u[bad] if bool(bad.any()) else u)
        what = "loss" if bool(bad.any()) else "gradient"
        clip = self.run.elements if self.run.loss.reduction == "sum" else 1
        often = f" for the {int(self.scaling[2])}th time in a row" if self.scaling[2] > 1 else ""
        return (
            f"the {what} is not finite{often} at image {self.nimg:,} (step {self.nimg // self.run.train.batch_size:,}), "
            f"noise levels {float(s.min()):.3g} to {float(s.max()):.3g}; weights and averages are as before that step.\n"
            f"Try a lower optim.lr (now {self.run.optim.lr:g}), a longer optim.warmup_images, or optim.clip={clip:g}."
        )

    def _too_large(self) -> str:
        share = -(-self.run.train.batch_size // self.ranks.world)
        return (
            f"{self.micro} samples at once are too many for the memory of {self.device}: set train.micro_batch below {self.micro} "
            f"(of this rank's {share}), train.recompute=true, train.precision=bfloat16 or train.sharding=fsdp"
        )
