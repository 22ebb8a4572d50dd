"""Magnitude-preserving layers (EDM2 Sections 2.2-2.5) and the sphere that their weights live on.

EDM2 normalizes every weight inside `forward`. Here `forward` is a plain convolution or matrix product
with weight * gain / sqrt(fan_in), and the training step keeps each row of a weight at rms 1:
`project_gradients` after backward (Eq. 59), `put_on_sphere` after the optimizer (Eq. 66).

Legend: B batch, C channels, H W height and width, N fan-in (elements of one row of a weight).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SILU_GAIN = 1 / 0.596  # Eq. 81: SiLU of a standard normal has rms .596


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) * SILU_GAIN


def balance(t: float) -> tuple[float, float]:
    """Factors of a and b in an MP-sum: (1 - t, t) / sqrt((1 - t)^2 + t^2) (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    share_a, share_b = balance(t)
    return torch.add(a * share_a, b, alpha=share_b)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate along the channels (dimension 1) with balance t between the two (Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-4) -> Tensor:
    """Divide by eps + the rms over `dim` (Eq. 30; eps added to the rms as in the published code)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (norm / math.sqrt(x.shape[dim]) + eps).to(x.dtype)


class MPFourier(nn.Module):
    """sqrt(2) cos(2 pi (f a + phi)) with constant random f ~ N(0,1), phi ~ U(0,1) (Eq. 75). (B,) -> (B, n)."""

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(n))
        self.register_buffer("phases", 2 * math.pi * torch.rand(n))

    def forward(self, a: Tensor) -> Tensor:
        angle = a.to(self.freqs.dtype)[:, None] * self.freqs + self.phases
        return math.sqrt(2) * angle.cos()


class MPWeight(nn.Module):
    """A weight on the sphere: rows of rms 1, one row per output channel (Eq. 37-47).

    constant, share: factors of the output that never change and cost no pass over activations. constant belongs to the
    input (the gain of a SiLU before the layer); share to what follows (the coefficient of a branch in an MP-sum, Eq. 88),
    and is divided out again where magnitudes of the layer's output are measured (gesso.train.magnitudes).
    """

    def __init__(self, *shape: int, constant: float = 1.0, share: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(normalized(torch.randn(shape)))
        self.share = share
        self.scale = constant * share / math.sqrt(self.weight[0].numel())

    def scaled(self, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        """The effective weight. Scaled before the cast and never on the output, which fp16 would overflow."""
        factor = gain * self.scale
        weight = self.weight if isinstance(factor, float) and factor == 1 else self.weight * factor
        return weight.to(dtype)


class MPLinear(MPWeight):
    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_out, n_in)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.linear(x, self.scaled(gain, x.dtype))


class MPConv(MPWeight):
    """Square kernel, no bias, zero padding that keeps the size."""

    def __init__(self, c_in: int, c_out: int, kernel: int, constant: float = 1.0, share: float = 1.0):
        super().__init__(c_out, c_in, kernel, kernel, constant=constant, share=share)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.conv2d(x, self.scaled(gain, x.dtype), padding=self.weight.shape[-1] // 2)


def sphere_weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module` that live on the sphere."""
    return [m.weight for m in module.modules() if isinstance(m, MPWeight)]


def normalized(weight: Tensor) -> Tensor:
    """Each row at rms 1 (Eq. 66). Accepts a shard without rows."""
    rows = weight.flatten(1)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.promote_types(rows.dtype, torch.float32))
    return (rows * (math.sqrt(rows.shape[1]) / norm).to(rows.dtype)).view_as(weight)


@torch.no_grad()
def project_gradients(weights: list[nn.Parameter]) -> None:
    """Take from each row's gradient its part along the row: [I - w w^T / |w|^2] g (Eq. 59)."""
    for weight in weights:
        if weight.grad is None:
            continue
        w, g = weight.flatten(1), weight.grad.flatten(1)
        along = (w * g).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)
        g.addcmul_(w, along, value=-1)


@torch.no_grad()
def put_on_sphere(weights: list[nn.Parameter]) -> None:
    """Rescale each row to rms 1 in place (Eq. 66)."""
    for weight in weights:
        weight.copy_(normalized(weight))


@torch.no_grad()
def fold(module: nn.Module) -> None:
    """Make a network that is trained no more fast: constant factors go into the weights, kernels into the layout of the
    activations, so that no forward pass does either again."""
    for m in module.modules():
        if isinstance(m, MPWeight):
            m.weight.mul_(m.scale)
            m.scale = 1.0
            m.to(memory_format=torch.channels_last)
