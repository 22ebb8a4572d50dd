"""Magnitude-preserving layers (EDM2 Sections 2.2-2.5) with weights on the sphere.

EDM2 normalizes weights inside `forward`. Here `forward` is a plain convolution or matrix product with
weight * gain / sqrt(fan_in), and the training step keeps each row of a weight at rms 1: `project_gradients` after
backward (Eq. 59), `normalize_weights_` after the optimizer step (Eq. 66).

Legend: B batch, C channels, H W height and width, N fan-in (elements of one row of a weight).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SILU_GAIN = 1 / 0.596  # Eq. 81: the SiLU of a standard normal has rms 0.596


def mp_silu(x: Tensor) -> Tensor:
    """Return the magnitude-preserving SiLU (Eq. 81)."""
    return F.silu(x) * SILU_GAIN


def mp_sum_weights(t: float) -> tuple[float, float]:
    """Return the factors of a and b in an MP-sum: (1 - t, t) / sqrt((1 - t)^2 + t^2) (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the magnitude-preserving sum of a and b with balance t (Eq. 88)."""
    weight_a, weight_b = mp_sum_weights(t)
    return torch.add(a * weight_a, b, alpha=weight_b)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return a and b concatenated along the channels (dimension 1) with balance t (Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-4) -> Tensor:
    """Return x divided by eps + its rms over `dim` (Eq. 30; eps is added to the rms as in the published code)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (norm / math.sqrt(x.shape[dim]) + eps).to(x.dtype)


class MPFourier(nn.Module):
    """Fourier features sqrt(2) cos(2 pi (f a + phi)) with constant f ~ N(0,1), phi ~ U(0,1) (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(n))
        self.register_buffer("phases", 2 * math.pi * torch.rand(n))

    def forward(self, a: Tensor) -> Tensor:
        """Return features (B, n) of a (B,)."""
        angle = a.to(self.freqs.dtype)[:, None] * self.freqs + self.phases
        return math.sqrt(2) * angle.cos()


class MPWeight(nn.Module):
    """Weight on the sphere: rows of rms 1, one per output channel (Eq. 37-47).

    `input_gain` and `branch_weight` are constant factors of the output, applied to the weight to save a pass over
    activations: the gain of a SiLU before the layer, and the coefficient of a branch in an MP-sum (Eq. 88).
    `gesso.training.magnitudes` divides the latter out.
    """

    def __init__(self, *shape: int, input_gain: float = 1.0, branch_weight: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(unit_rms(torch.randn(shape)))
        self.branch_weight = branch_weight
        self.scale = input_gain * branch_weight / math.sqrt(self.weight[0].numel())

    def effective_weight(self, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Return weight * gain / sqrt(fan-in) in `dtype`; the output is not scaled, as fp16 would overflow."""
        factor = gain * self.scale
        weight = self.weight if isinstance(factor, float) and factor == 1 else self.weight * factor
        return weight.to(dtype)


class MPLinear(MPWeight):
    """Magnitude-preserving linear layer without bias."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_out, n_in)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return (..., n_out) for x (..., n_in)."""
        return F.linear(x, self.effective_weight(gain, x.dtype))


class MPConv(MPWeight):
    """Magnitude-preserving convolution with a square kernel, no bias, and zero padding that keeps the size."""

    def __init__(self, c_in: int, c_out: int, kernel: int, input_gain: float = 1.0, branch_weight: float = 1.0):
        super().__init__(c_out, c_in, kernel, kernel, input_gain=input_gain, branch_weight=branch_weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return (B, c_out, H, W) for x (B, c_in, H, W)."""
        return F.conv2d(x, self.effective_weight(gain, x.dtype), padding=self.weight.shape[-1] // 2)


def sphere_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `module` that are on the sphere."""
    return [m.weight for m in module.modules() if isinstance(m, MPWeight)]


def unit_rms(weight: Tensor) -> Tensor:
    """Return the weight with each row scaled to rms 1 (Eq. 66); a shard may have no rows."""
    rows = weight.flatten(1)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.promote_types(rows.dtype, torch.float32))
    return (rows * (math.sqrt(rows.shape[1]) / norm).to(rows.dtype)).view_as(weight)


@torch.no_grad()
def project_gradients(weights: Sequence[Tensor]) -> None:
    """Remove from each row's gradient the component along the row: [I - w w^T / |w|^2] g (Eq. 59)."""
    for weight in weights:
        if weight.grad is None:
            continue
        w, g = weight.flatten(1), weight.grad.flatten(1)
        along = (w * g).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)
        g.addcmul_(w, along, value=-1)


@torch.no_grad()
def normalize_weights_(weights: Sequence[Tensor]) -> None:
    """Scale each row to rms 1 in place (Eq. 66)."""
    for weight in weights:
        weight.copy_(unit_rms(weight))


@torch.no_grad()
def fold_gains_(module: nn.Module) -> None:
    """Fold constant factors into the weights and use the channels-last layout; makes sampling faster.

    The network cannot be trained afterwards.
    """
    for m in module.modules():
        if isinstance(m, MPWeight):
            m.weight.mul_(m.scale)
            m.scale = 1.0
            if m.weight.ndim == 4:
                m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
