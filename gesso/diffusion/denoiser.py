"""The denoiser D(x, s, cond) -> x0_hat and the training loss.

Legend: B batch, C channels, H W height and width, x = alpha(s) x0 + s eps.
"""

import contextlib

import torch
from torch import Tensor, nn

from gesso import devices, extensions, models
from gesso.conditioning import Cond
from gesso.config import EDM2LadderConfig, InputSpec, RunConfig, TrainConfig
from gesso.diffusion import process as processes
from gesso.diffusion.process import NoiseEmbedding, Process
from gesso.errors import UsageError
from gesso.models.edm2_ladder import LadderFeatures, build_linear
from gesso.models.layers import autocast_disabled
from gesso.models.mp import MPFourier


class Denoiser(nn.Module):
    """Denoiser D = c_skip x + c_out F(c_in x, c_noise, progress, cond) built around a network F."""

    def __init__(self, net: nn.Module, process: Process, noise_embedding: NoiseEmbedding):
        super().__init__()
        self.net, self.process, self.noise_embedding = net, process, noise_embedding

    def forward(
        self, x: Tensor, s: Tensor, cond: Cond, keep_ids: Tensor | None = None, return_variance: bool = False
    ) -> Tensor:
        """Return the estimate of x0, (B, C, H, W) in the dtype of x.

        The network computes in the dtype of its parameters, whatever the dtype of x.

        Args:
            x: Noisy images, (B, C, H, W).
            s: Noise levels, (B,), or one level for the batch. The coefficients keep the precision of s.
            cond: Conditions of the batch.
            keep_ids: Ids (B, K) of the tokens that the encoder of MDT's masked pass sees; None runs the plain pass.
            return_variance: Return (B, 2 C, H, W): x0, then the network's learned variance.
        """
        s = s.expand(x.shape[0])
        c_skip, c_out, c_in = (c.to(x)[:, None, None, None] for c in self.process.precondition(s))
        dtype = next((p.dtype for p in self.net.parameters()), x.dtype)
        c_noise = self.process.c_noise(s, self.noise_embedding).to(x.device, dtype)
        progress = self.process.progress(s).to(x.device, dtype)
        inputs = ((c_in * x).to(dtype), c_noise, progress, cond)
        if return_variance:
            F, variance = self.net(*inputs, return_variance=True).to(x.dtype).chunk(2, dim=1)
            return torch.cat([c_skip * x + c_out * F, variance], dim=1)
        if keep_ids is None:
            F = self.net(*inputs)
        else:
            F = self.net.forward_masked(*inputs, keep_ids)  # type: ignore[operator]  # a method of MDT only
        return c_skip * x + c_out * F.to(x.dtype)


class VarianceDenoiser(nn.Module):
    """Denoiser that returns x0 and the learned variance, (B, 2 C, H, W).

    The variance is zero where the network does not learn one.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.learned_variance = getattr(denoiser.net, "learned_variance", False)

    def forward(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Return x0 and the variance, (B, 2 C, H, W); arguments as for `Denoiser.forward`."""
        if self.learned_variance:
            return self.denoiser(x, s, cond, return_variance=True)
        D = self.denoiser(x, s, cond)
        return torch.cat([D, torch.zeros_like(D)], dim=1)


def build_denoiser(run: RunConfig) -> Denoiser:
    """Return the denoiser of a run whose data set was opened; weights come from torch's global generator."""
    process = processes.build_process(run.process)
    net = models.build_network(run.net, network_inputs(run, process))
    return Denoiser(net, process, run.net.noise_embedding)


def network_inputs(run: RunConfig, process: Process) -> InputSpec:
    """Return the inputs of the network of a run whose data set was opened, with the threshold of control as progress.

    The network receives progress, not sigma. Where alpha(s) = 1 - s, s = sigma/(1 + sigma).
    """
    inputs = run.input_spec
    sigma = torch.tensor(inputs.control.step_threshold, dtype=torch.float64)
    s = sigma if float(process.alpha(sigma)) == 1 else sigma / (1 + sigma)
    return inputs._replace(control=inputs.control._replace(step_threshold=float(process.progress(s))))


class Uncertainty(nn.Module):
    """Log-variance u(s) of the loss at a noise level (EDM2 Eq. 21); trained with the denoiser, unused in sampling.

    The linear layer follows the network's CONFIG of EDM2 (Appendix B.2): a free weight and a bias in B, a free weight
    in C, a weight normalized on every use in D, a weight on the sphere from E on. The Fourier features have
    magnitude 1 from G on (Eq. 75).
    """

    def __init__(self, process: Process, config: str = "G"):
        super().__init__()
        features = LadderFeatures.for_config(config)
        self.process = process
        self.fourier = MPFourier(128)
        self.linear = build_linear(features, 128, 1)
        self.feature_scale = 1.0 if features.mp_fixed_functions else 0.5**0.5  # MPFourier includes Eq. 75's sqrt(2)

    def forward(self, s: Tensor) -> Tensor:
        """Return u(s), (B,), for noise levels s, (B,)."""
        with autocast_disabled(s):
            features = self.fourier(self.process.c_noise(s, "fourier"))
            return self.linear(features if self.feature_scale == 1 else features * self.feature_scale)[:, 0]


def build_uncertainty(run: RunConfig, process: Process) -> Uncertainty | None:
    """Return the uncertainty function that a run trains, or None where its loss has none.

    It follows the network's CONFIG where the network is EDM2's ladder, else CONFIG G.
    """
    if not run.loss.learns_uncertainty:
        return None
    return Uncertainty(process, run.net.config if isinstance(run.net, EDM2LadderConfig) else "G")


def loss(
    denoiser: nn.Module,
    process: Process,
    x0: Tensor,
    s: Tensor,
    eps: Tensor,
    cond: Cond,
    weighting: str = "native",
    uncertainty: Uncertainty | None = None,
    keep_ids: Tensor | None = None,
) -> Tensor:
    """Return the loss of each sample, (B,), averaged over channels and pixels.

    For loss.reduction=sum the training step multiplies it by the number of channels and pixels.

    Args:
        denoiser: D(x, s, cond, keep_ids).
        process: Diffusion process of the denoiser.
        x0: Clean images, (B, C, H, W), of standard deviation sigma_data.
        s: Noise levels, (B,).
        eps: Standard normal noise, (B, C, H, W).
        cond: Conditions of the batch.
        weighting: "native": w |D - x0|^2, the MSE of the network's target. "uniform": |D - x0|^2.
            "min-snr": min(SNR, 5) |D - x0|^2 with SNR = (alpha sigma_data / s)^2 (Hang et al. 2023).
            "uncertainty": w |D - x0|^2 / e^u + u (EDM2 Eq. 21); "uncertainty-uniform": the same without w.
            "custom:NAME": a function of gesso.extend.
        uncertainty: The function u of "uncertainty" and "uncertainty-uniform".
        keep_ids: As for `Denoiser.forward`.
    """
    column = s[:, None, None, None]
    D = denoiser(process.alpha(column) * x0 + column * eps, s, cond, keep_ids)
    if weighting.startswith("custom:"):
        return _custom_loss(weighting.removeprefix("custom:"), D, x0, s, process)
    error = (D - x0).square().mean(dim=(1, 2, 3))
    if weighting == "uniform":
        return error
    if weighting == "min-snr":
        return (process.alpha(s) * process.sigma_data / s).square().clamp(max=5) * error
    if weighting != "uncertainty-uniform":
        error = process.weight(s) * error
    if weighting == "native":
        return error
    if uncertainty is None:
        raise ValueError(f"weighting={weighting} needs an uncertainty function")
    u = uncertainty(s)
    return error / u.exp() + u


def _custom_loss(name: str, denoised: Tensor, x0: Tensor, s: Tensor, process: Process) -> Tensor:
    """Return the losses (B,) of a function of gesso.extend.

    Raises:
        UsageError: It is not loaded, or returns another shape.
    """
    if name not in extensions.LOSSES:
        raise extensions.missing("loss.weighting", name, extensions.LOSSES)
    losses = extensions.LOSSES[name](denoised, x0, s, process)
    if losses.shape != s.shape:
        raise UsageError(f"loss.weighting=custom:{name} returned {tuple(losses.shape)}; return {tuple(s.shape)}")
    return losses


def autocast_context(cfg: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context that computes matrix products in train.precision."""
    return devices.precision_context(device, cfg.precision, cfg.tf32)
