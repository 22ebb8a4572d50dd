"""The denoiser D(x, s, cond) -> x0_hat, and the one loss line.

Legend: B batch, C H W image, x = alpha(s) x0 + s eps.
"""

import contextlib

import torch
from torch import Tensor, nn

from gesso import devices, nets
from gesso.cond import Cond
from gesso.config import EDM2Ladder, Run, Train
from gesso.diffusion import process as processes
from gesso.diffusion.process import Embedding, Process
from gesso.nets.edm2_ladder import Steps, linear
from gesso.nets.layers import unrounded
from gesso.nets.mp import MPFourier


class Denoiser(nn.Module):
    """D = c_skip x + c_out F(c_in x, c_noise, progress, cond) around a network F."""

    def __init__(self, net: nn.Module, process: Process, embedding: Embedding):
        super().__init__()
        self.net, self.process, self.embedding = net, process, embedding

    def forward(self, x: Tensor, s: Tensor, cond: Cond, keep: Tensor | None = None, variance: bool = False) -> Tensor:
        """x (B, C, H, W), s (B,) or a single level; returns the estimate of x0 in the dtype of x.

        The network computes in the dtype of its own parameters, whatever that of x.

        keep (B, K): ids of the tokens that MDT's masked branch sees; None is every network's plain pass.
        variance: return (B, 2 C, H, W), x0 and then the network's learned variance (net.learned_variance).
        """
        s = s.expand(len(x))  # coefficients in the precision of s, which a sampler gives in float64
        c_skip, c_out, c_in = (c.to(x)[:, None, None, None] for c in self.process.precondition(s))
        own = x.new_empty(0, dtype=next((p.dtype for p in self.net.parameters()), x.dtype))
        c_noise, progress = self.process.c_noise(s, self.embedding).to(own), self.process.progress(s).to(own)
        inputs = ((c_in * x).to(own), c_noise, progress, cond)
        if variance:
            F, v = self.net(*inputs, variance=True).to(x.dtype).chunk(2, dim=1)
            return torch.cat([c_skip * x + c_out * F, v], dim=1)
        F = self.net(*inputs) if keep is None else self.net.masked(*inputs, keep)
        return c_skip * x + c_out * F.to(x.dtype)


class WithVariance(nn.Module):
    """A denoiser that returns the learned variance after x0, (B, 2 C, H, W); zeros where its network estimates none."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.learned = getattr(denoiser.net, "learned_variance", False)

    def forward(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        if self.learned:
            return self.denoiser(x, s, cond, variance=True)
        D = self.denoiser(x, s, cond)
        return torch.cat([D, torch.zeros_like(D)], dim=1)


def build(run: Run) -> Denoiser:
    """The denoiser of a run whose data have been opened, with fresh weights from torch's global generator."""
    process = processes.build(run.process)
    inputs = run.inputs
    # The network knows progress, not sigma; alpha(s) of a straight path is 1-s, so s = sigma/(1+sigma) has this sigma.
    sigma = torch.tensor(inputs.control.edge, dtype=torch.float64)
    s = sigma if float(process.alpha(sigma)) == 1 else sigma / (1 + sigma)
    edge = float(process.progress(s))
    net = nets.build(run.net, inputs._replace(control=inputs.control._replace(edge=edge)))
    return Denoiser(net, process, run.net.embedding)


class Uncertainty(nn.Module):
    """u(s), EDM2's log-variance of the loss at a noise level (Eq. 21); trained alongside, not sampled from.

    step: the CONFIG of EDM2 whose choices its layer follows (Appendix B.2, "initialization, magnitude-preserving scaling, and
    forced weight normalization"): in B a free weight and a bias; in C a free weight; in D a free weight that is normalized on
    every use; from E on a weight on the sphere. The Fourier features have magnitude 1 from G on (Eq. 75), as the network's.
    """

    def __init__(self, process: Process, step: str = "G"):
        super().__init__()
        steps = Steps.up_to(step)
        self.process = process
        self.fourier = MPFourier(128)
        self.linear = linear(steps, 128, 1)
        self.feature_scale = 1.0 if steps.mp_fixed else 0.5**0.5  # MPFourier holds Eq. 75's sqrt(2)

    def forward(self, s: Tensor) -> Tensor:
        """(B,) -> (B,)"""
        with unrounded(s):
            features = self.fourier(self.process.c_noise(s, "fourier"))
            return self.linear(features if self.feature_scale == 1 else features * self.feature_scale)[:, 0]


def build_uncertainty(run: Run, process: Process) -> Uncertainty | None:
    """Return the uncertainty function that a run trains, by its CONFIG where the network is EDM2's ladder, else CONFIG G's;
    None where its loss has none."""
    if not run.loss.uncertain:
        return None
    return Uncertainty(process, run.net.step if isinstance(run.net, EDM2Ladder) else "G")


def loss(
    denoiser: nn.Module,
    process: Process,
    x0: Tensor,
    s: Tensor,
    eps: Tensor,
    cond: Cond,
    weighting: str = "native",
    uncertainty: Uncertainty | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, (B,), averaged over channels and pixels. Where a run's loss.reduction is sum, the training step
    multiplies it by their number before the gradient is taken.

    x0 and eps (B, C, H, W), x0 of standard deviation sd; s (B,). weighting: "native" w |D-x0|^2, the MSE
    of the network's own target; "uniform" |D-x0|^2; "min-snr" min(SNR, 5) |D-x0|^2, SNR = (alpha sd/s)^2
    (Hang et al. 2023); "uncertainty" w |D-x0|^2 / e^u + u (EDM2 Eq. 21), "uncertainty-uniform" the same without w.
    keep: as in Denoiser.
    """
    column = s[:, None, None, None]
    D = denoiser(process.alpha(column) * x0 + column * eps, s, cond, keep)
    error = (D - x0).square().mean(dim=(1, 2, 3))
    if weighting == "uniform":
        return error
    if weighting == "min-snr":
        return (process.alpha(s) * process.sd / s).square().clamp(max=5) * error
    if weighting != "uncertainty-uniform":
        error = process.weight(s) * error
    if weighting == "native":
        return error
    u = uncertainty(s)
    return error / u.exp() + u


def products(cfg: Train, device: torch.device) -> contextlib.AbstractContextManager:
    """Products in the precision of the settings of training."""
    return devices.products(device, cfg.precision, cfg.tf32)
