"""Diffusion processes x = alpha(s) x0 + s eps, and the preconditioning of a denoiser

    D(x, s) = c_skip x + c_out F(c_in x, c_noise).

Legend: s noise level in the process's own coordinates, sd the standard deviation that data are scaled
to, u and progress in (0, 1): 0 clean, 1 noise. Tensors of levels have shape (B,).
"""

import abc
import math
from typing import Literal

import torch
from torch import Tensor

from gesso import config

Embedding = Literal["sinusoidal", "fourier"]


class Process(abc.ABC):
    """What a network, a loss and a sampler need to know of a process.

    `quantile` and `progress` are inverse to each other: the training draw and its CDF.
    """

    sd: float

    @abc.abstractmethod
    def alpha(self, s: Tensor) -> Tensor:
        """Signal scale."""

    @abc.abstractmethod
    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in."""

    @abc.abstractmethod
    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        """What the network is told of the level; it depends on the kind of its time embedding."""

    @abc.abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The training draw: the level that belongs to u ~ U(0, 1)."""

    @abc.abstractmethod
    def progress(self, s: Tensor) -> Tensor:
        """CDF of the training draw."""

    @abc.abstractmethod
    def weight(self, s: Tensor) -> Tensor:
        """Native weight of |D - x0|^2, under which the loss is the MSE of the network's own target."""

    @abc.abstractmethod
    def levels(self, steps: int) -> Tensor:
        """Sampling levels, (steps + 1,) float64, falling, the last one 0."""

    @abc.abstractmethod
    def prior(self, noise: Tensor, s: Tensor) -> Tensor:
        """The first sampling state, from standard normal noise, at the highest level s."""


class EDM(Process):
    """Variance exploding, with EDM's preconditioning (EDM2 Eq. 4-8, 15, 16)."""

    def __init__(self, cfg: config.EDM):
        self.cfg, self.sd = cfg, cfg.sigma_data

    def alpha(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s**2 + self.sd**2
        return self.sd**2 / total, s * self.sd / total.sqrt(), 1 / total.sqrt()

    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        return 1000 * self.progress(s) if embedding == "sinusoidal" else s.log() / 4  # Eq. 8

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.cfg.P_mean + self.cfg.P_std * torch.special.ndtri(u))

    def progress(self, s: Tensor) -> Tensor:
        return torch.special.ndtr((s.log() - self.cfg.P_mean) / self.cfg.P_std)

    def weight(self, s: Tensor) -> Tensor:
        return (s**2 + self.sd**2) / (s * self.sd) ** 2

    def levels(self, steps: int) -> Tensor:
        """EDM's grid: s^(1/rho) linear from sigma_max to sigma_min."""
        i = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = (x ** (1 / self.cfg.rho) for x in (self.cfg.sigma_max, self.cfg.sigma_min))
        return torch.cat([(high + i * (low - high)) ** self.cfg.rho, i.new_zeros(1)])

    def prior(self, noise: Tensor, s: Tensor) -> Tensor:
        return s.to(noise.dtype) * noise


class VP(Process):
    """DDPM with eps-prediction in variance-exploding coordinates, s = sqrt((1 - abar) / abar).

    Berrada et al., Appendix C, Eq. 5-6 (x there is ours divided by sqrt(1 + s^2)).
    """

    sd = 1.0

    def __init__(self, cfg: config.VP):
        self.cfg = cfg
        T = cfg.timesteps
        betas = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, T, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)
        self.table = ((1 - abar) / abar).sqrt()  # s of each index, rising

    def alpha(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(s), -s, 1 / (1 + s**2).sqrt()

    def index(self, s: Tensor) -> Tensor:
        """Index of a level, linear in ln s between neighbours of the table. Same dtype as s."""
        grid = self.table.log().to(s.device)
        x = s.double().log().clamp(grid[0], grid[-1])
        right = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
        left = right - 1
        return (left + (x - grid[left]) / (grid[right] - grid[left])).to(s.dtype)

    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        return self.index(s) if embedding == "sinusoidal" else s.log() / 4

    def quantile(self, u: Tensor) -> Tensor:
        T = self.cfg.timesteps
        return self.table.to(u.device)[(u * T).long().clamp(max=T - 1)].to(u.dtype)

    def progress(self, s: Tensor) -> Tensor:
        return self.index(s) / self.cfg.timesteps

    def weight(self, s: Tensor) -> Tensor:
        return 1 / s**2

    def levels(self, steps: int) -> Tensor:
        """`steps` indices spread evenly from the last to the first, then 0.

        Raises ValueError when there are more steps than indices.
        """
        T = self.cfg.timesteps
        if steps > T:
            raise ValueError(f"{steps} steps, but the process has {T} levels")
        index = torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long()
        return torch.cat([self.table[index], self.table.new_zeros(1)])

    def prior(self, noise: Tensor, s: Tensor) -> Tensor:
        return math.sqrt(1 + float(s) ** 2) * noise


def build(cfg: config.EDM | config.VP) -> Process:
    return EDM(cfg) if isinstance(cfg, config.EDM) else VP(cfg)
