"""Diffusion processes x = alpha(s) x0 + s eps, and the preconditioning of a denoiser

    D(x, s) = c_skip x + c_out F(c_in x, c_noise).

EDM and VP live in variance-exploding coordinates (alpha = 1), VPv and RF on the straight path (alpha = 1 - s).

Legend: s noise level in the process's own coordinates, sigma = s/alpha(s), sd the standard deviation that
data are scaled to, k the linear ratio of resolutions (`scale`), T the number of VP's indices, u and progress
in (0, 1): 0 clean, 1 noise. Tensors of levels have shape (B,).
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
    k: float
    largest: float
    """the level that sampling starts from, and the highest that a network was trained for"""
    smallest: float
    """the lowest level above 0 that sampling visits"""
    grids: tuple[str, ...]
    """the step grids it can have (schedule.py), its own first"""
    rho: float = 7.0
    """curvature of the karras grid"""
    bounded: bool = True
    """no level lies above the largest: rectified flow ends at s = 1, a table at its last index"""

    @abc.abstractmethod
    def alpha(self, s: Tensor) -> Tensor:
        """Signal scale."""

    @abc.abstractmethod
    def rescaled(self, s: Tensor, factor: float) -> Tensor:
        """The level whose sigma is `factor` times that of s."""

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

    def prior(self, noise: Tensor, s: Tensor) -> Tensor:
        """The first sampling state at the highest level s, from standard normal noise (B, C, H, W).

        Data of standard deviation 1 have this one too, sqrt(alpha^2 + s^2), where the level leaves some signal.
        """
        return math.hypot(float(self.alpha(s)), float(s)) * noise


class EDM(Process):
    """Variance exploding, with EDM's preconditioning (EDM2 Eq. 4-8, 15, 16)."""

    grids = ("karras",)
    bounded = False

    def __init__(self, cfg: config.EDM):
        self.sd, self.rho, self.k = cfg.sigma_data, cfg.rho, cfg.scale
        self.P_mean, self.P_std = cfg.P_mean + math.log(cfg.scale), cfg.P_std
        self.smallest, self.largest = cfg.scale * cfg.sigma_min, cfg.scale * cfg.sigma_max

    def alpha(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def rescaled(self, s: Tensor, factor: float) -> Tensor:
        return factor * s

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s**2 + self.sd**2
        return self.sd**2 / total, s * self.sd / total.sqrt(), 1 / total.sqrt()

    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        return 1000 * self.progress(s) if embedding == "sinusoidal" else (s / self.k).log() / 4  # Eq. 8

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.P_mean + self.P_std * torch.special.ndtri(u))

    def progress(self, s: Tensor) -> Tensor:
        return torch.special.ndtr((s.log() - self.P_mean) / self.P_std)

    def weight(self, s: Tensor) -> Tensor:
        return (s**2 + self.sd**2) / (s * self.sd) ** 2

    def prior(self, noise: Tensor, s: Tensor) -> Tensor:
        return s.to(noise.dtype) * noise  # without the data's share, as published


class VP(Process):
    """DDPM with eps-prediction in variance-exploding coordinates, s = sqrt((1 - abar) / abar).

    Berrada et al., Appendix C, Eq. 5-6 (x there is ours divided by sqrt(1 + s^2)).
    """

    sd = 1.0
    grids = ("linspace", "respaced", "ddim", "trailing", "leading", "karras")

    def __init__(self, cfg: config.VP):
        signal, noise = _abar_roots(cfg)
        self.k = cfg.scale
        self.table = noise / signal  # s of each index, rising
        self.smallest, self.largest = float(self.table[0]), float(self.table[-1])

    def alpha(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def rescaled(self, s: Tensor, factor: float) -> Tensor:
        return factor * s

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(s), -s, 1 / (1 + s**2).sqrt()

    def index(self, s: Tensor) -> Tensor:
        """Index of a level, linear in ln s between neighbours of the table. Same dtype as s."""
        table = self.table.to(s.device)
        return _place(s.double(), table, torch.log).to(s.dtype)

    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        return self.index(s) if embedding == "sinusoidal" else (s / self.k).log() / 4

    def quantile(self, u: Tensor) -> Tensor:
        return _draw(u, self.table)

    def progress(self, s: Tensor) -> Tensor:
        return self.index(s) / len(self.table)

    def weight(self, s: Tensor) -> Tensor:
        return 1 / s**2


class VPv(Process):
    """DDPM with v-prediction on the straight path, s = sigma / (1 + sigma) with sigma = sqrt((1 - abar) / abar).

    x is that of DDPM, sqrt(abar) x0 + sqrt(1-abar) eps, divided by sqrt(abar) + sqrt(1-abar). These coordinates
    rather than DDPM's own, alpha = sqrt(abar), for two reasons: (x - D)/s stays the derivative, so that one Euler
    and one Heun serve all processes; and s = 1 at zero terminal SNR is finite, which sigma is not. DDIM gives
    the same trajectory in both, since its step is linear in x and does not change when x is multiplied by a
    function of the level.
    """

    sd = 1.0
    grids = ("linspace", "respaced", "ddim", "trailing", "leading", "karras")

    def __init__(self, cfg: config.VP):
        signal, noise = _abar_roots(cfg)
        self.k = cfg.scale
        self.table = noise / (signal + noise)  # s of each index, rising
        self.smallest, self.largest = float(self.table[0]), float(self.table[-1])

    def alpha(self, s: Tensor) -> Tensor:
        return 1 - s

    def rescaled(self, s: Tensor, factor: float) -> Tensor:
        return _times_odds(s, factor)

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = ((1 - s) ** 2 + s**2).sqrt()  # x / n is DDPM's own x, of variance 1
        return (1 - s) / n**2, -s / n, 1 / n

    def index(self, s: Tensor) -> Tensor:
        """Index of a level, linear in ln sigma between neighbours of the table. Same dtype as s."""
        table = self.table.to(s.device)
        return _place(s.double(), table, torch.logit).to(s.dtype)

    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        if embedding == "sinusoidal":
            return self.index(s)
        return ((s.logit() - math.log(self.k)) / 4).clamp(-3, 3)  # sigma is infinite at zero terminal SNR

    def quantile(self, u: Tensor) -> Tensor:
        return _draw(u, self.table)

    def progress(self, s: Tensor) -> Tensor:
        return self.index(s) / len(self.table)

    def weight(self, s: Tensor) -> Tensor:
        return ((1 - s) ** 2 + s**2) / s**2


class RF(Process):
    """Rectified flow with v-prediction, F = eps - x0, and a logit-normal draw (SD3; Berrada et al. Appendix C).

    At another resolution the network is told the level as it is, shifted.
    """

    sd = 1.0
    largest = 1.0
    grids = ("linear", "sd3", "karras")

    def __init__(self, cfg: config.RF):
        self.k, self.mean, self.std = cfg.scale, cfg.mean + math.log(cfg.scale), cfg.std
        # The first of the 1000 levels of SD3's published scheduler.
        self.smallest = float(_times_odds(torch.tensor(1e-3, dtype=torch.float64), cfg.scale))

    def alpha(self, s: Tensor) -> Tensor:
        return 1 - s

    def rescaled(self, s: Tensor, factor: float) -> Tensor:
        return _times_odds(s, factor)

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(s), -s, torch.ones_like(s)

    def c_noise(self, s: Tensor, embedding: Embedding) -> Tensor:
        return 1000 * s if embedding == "sinusoidal" else (s.logit() / 4).clamp(-3, 3)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def progress(self, s: Tensor) -> Tensor:
        return torch.special.ndtr((s.logit() - self.mean) / self.std)

    def weight(self, s: Tensor) -> Tensor:
        return 1 / s**2


def _times_odds(s: Tensor, factor: float) -> Tensor:
    """k s / (1 + (k-1) s), SD3's shift, which multiplies s/(1-s) by k; written so that 1 stays exactly 1."""
    return factor * s / ((1 - s) + factor * s)


def _abar_roots(cfg: config.VP) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and k sqrt(1 - abar) of each index, (T,) float64: their ratio is sigma at this resolution."""
    if cfg.betas == "linear":
        betas = torch.linspace(cfg.beta_start, cfg.beta_end, cfg.timesteps, dtype=torch.float64)
    else:
        betas = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.timesteps, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).sqrt()
    if cfg.zero_terminal_snr:  # Lin et al. 2024, Algorithm 1: the last becomes 0, the first stays
        first, last = signal[0].clone(), signal[-1].clone()
        signal = (signal - last) * (first / (first - last))
    return signal, cfg.scale * (1 - signal**2).sqrt()


def _place(s: Tensor, table: Tensor, ln_sigma) -> Tensor:
    """Where s stands in the rising table, linear in ln_sigma(s) between neighbours.

    The last level of zero terminal SNR has no finite logarithm: towards it, linear in s.
    """
    s = s.clamp(table[0], table[-1])
    right = torch.searchsorted(table, s).clamp(1, len(table) - 1)
    left = right - 1
    x, low, high = ln_sigma(s), ln_sigma(table[left]), ln_sigma(table[right])
    straight = (s - table[left]) / (table[right] - table[left])
    return left + torch.where(high.isinf(), straight, (x - low) / (high - low))


def _draw(u: Tensor, table: Tensor) -> Tensor:
    """A level of the table, all equally likely under u ~ U(0, 1)."""
    T = len(table)
    return table.to(u.device)[(u * T).long().clamp(max=T - 1)].to(u.dtype)


def betas(process: VP | VPv) -> Tensor:
    """(T,) float64: the betas of every index, for another project's scheduler (diffusers' `trained_betas`).

    They hold the rescaling to another resolution and zero terminal SNR, which no beta_start and beta_end can.
    """
    s = process.table
    abar = process.alpha(s) ** 2 / (process.alpha(s) ** 2 + s**2)
    return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])


def build(cfg: config.EDM | config.VP | config.RF) -> Process:
    if isinstance(cfg, config.EDM):
        return EDM(cfg)
    if isinstance(cfg, config.RF):
        return RF(cfg)
    return VP(cfg) if cfg.prediction == "eps" else VPv(cfg)
