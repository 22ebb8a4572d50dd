"""Diffusion processes x = alpha(s) x0 + s eps and the preconditioning of their denoisers.

A denoiser is D(x, s) = c_skip x + c_out F(c_in x, c_noise). EDM and VP use variance-exploding coordinates
(alpha = 1), VPv and RF the straight path (alpha = 1 - s).

Legend: s noise level in the coordinates of the process, sigma = s/alpha(s), sigma_data standard deviation that data
are scaled to, k linear ratio of resolutions (`resolution_scale`), T number of VP's timesteps, u and progress in
(0, 1): 0 clean, 1 noise. Tensors of levels have shape (B,).
"""

import abc
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gesso import config

NoiseEmbedding = Literal["sinusoidal", "fourier"]


class Process(abc.ABC):
    """Noise levels, signal scale, preconditioning and training distribution of a diffusion process.

    `icdf` and `progress` are inverse to each other: the training distribution of levels and its CDF.
    """

    sigma_data: float
    """Standard deviation that data are scaled to."""
    resolution_scale: float
    """Factor k on sigma for another resolution."""
    max_level: float
    """Level that sampling starts from, and the highest level of training."""
    min_level: float
    """Lowest level above 0 that sampling visits."""
    schedules: tuple[str, ...]
    """Names of its sampling schedules (`gesso.diffusion.schedules`), the default first."""
    rho: float = 7.0
    """Curvature of the karras schedule."""
    has_max_level: bool = True
    """No level above `max_level` exists: rectified flow ends at s = 1, a table at its last entry."""

    @abc.abstractmethod
    def alpha(self, s: Tensor) -> Tensor:
        """Return the signal scale."""

    @abc.abstractmethod
    def scale_sigma(self, s: Tensor, factor: float) -> Tensor:
        """Return the level whose sigma is `factor` times that of s."""

    @abc.abstractmethod
    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in."""

    @abc.abstractmethod
    def c_noise(self, s: Tensor, noise_embedding: NoiseEmbedding) -> Tensor:
        """Return the network's noise input, which depends on its kind of time embedding."""

    @abc.abstractmethod
    def icdf(self, u: Tensor) -> Tensor:
        """Return the level at quantile u of the training distribution; u ~ U(0, 1) draws training levels."""

    @abc.abstractmethod
    def progress(self, s: Tensor) -> Tensor:
        """Return the CDF of the training distribution."""

    @abc.abstractmethod
    def weight(self, s: Tensor) -> Tensor:
        """Return the weight w that makes w |D - x0|^2 the MSE of the network's target."""

    def initial_state(self, noise: Tensor, s: Tensor) -> Tensor:
        """Return the first sampling state at the highest level s from standard normal noise (B, C, H, W).

        Its standard deviation is sqrt(alpha^2 + s^2), that of noisy data whose standard deviation is 1.
        """
        return math.hypot(float(self.alpha(s)), float(s)) * noise


class EDM(Process):
    """Variance-exploding process with EDM's preconditioning (EDM2 Eq. 4-8, 15, 16)."""

    schedules = ("karras",)
    has_max_level = False

    def __init__(self, cfg: config.EDMConfig):
        self.sigma_data, self.rho, self.resolution_scale = cfg.sigma_data, cfg.rho, cfg.resolution_scale
        self.P_mean, self.P_std = cfg.P_mean + math.log(cfg.resolution_scale), cfg.P_std
        self.min_level, self.max_level = cfg.resolution_scale * cfg.sigma_min, cfg.resolution_scale * cfg.sigma_max

    def alpha(self, s: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(s)

    def scale_sigma(self, s: Tensor, factor: float) -> Tensor:
        """Return factor * s."""
        return factor * s

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in (EDM2 Eq. 5-7)."""
        total = s**2 + self.sigma_data**2
        return self.sigma_data**2 / total, s * self.sigma_data / total.sqrt(), 1 / total.sqrt()

    def c_noise(self, s: Tensor, noise_embedding: NoiseEmbedding) -> Tensor:
        """Return ln(s / k) / 4 (EDM2 Eq. 8), or 1000 * progress for sinusoidal embeddings."""
        if noise_embedding == "sinusoidal":
            return 1000 * self.progress(s)
        return (s / self.resolution_scale).log() / 4  # Eq. 8

    def icdf(self, u: Tensor) -> Tensor:
        """Return the log-normal quantile exp(P_mean + P_std ndtri(u))."""
        return torch.exp(self.P_mean + self.P_std * torch.special.ndtri(u))

    def progress(self, s: Tensor) -> Tensor:
        """Return the log-normal CDF ndtr((ln s - P_mean) / P_std)."""
        return torch.special.ndtr((s.log() - self.P_mean) / self.P_std)

    def weight(self, s: Tensor) -> Tensor:
        """Return (s^2 + sigma_data^2) / (s sigma_data)^2 (EDM2 Eq. 15)."""
        return (s**2 + self.sigma_data**2) / (s * self.sigma_data) ** 2

    def initial_state(self, noise: Tensor, s: Tensor) -> Tensor:
        """Return s * noise, without a contribution of the data, as published."""
        return s.to(noise.dtype) * noise


class VP(Process):
    """DDPM with eps-prediction in variance-exploding coordinates, s = sqrt((1 - abar) / abar).

    Berrada et al., Appendix C, Eq. 5-6; their x is this x divided by sqrt(1 + s^2).
    """

    sigma_data = 1.0
    schedules = ("linspace", "respaced", "ddim", "trailing", "leading", "karras")

    def __init__(self, cfg: config.VPConfig):
        signal, noise = _abar_roots(cfg)
        self.resolution_scale = cfg.resolution_scale
        self.level_table = noise / signal  # (T,) ascending levels
        self.min_level, self.max_level = float(self.level_table[0]), float(self.level_table[-1])

    def alpha(self, s: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(s)

    def scale_sigma(self, s: Tensor, factor: float) -> Tensor:
        """Return factor * s."""
        return factor * s

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip = 1, c_out = -s, c_in = 1 / sqrt(1 + s^2)."""
        return torch.ones_like(s), -s, 1 / (1 + s**2).sqrt()

    def timestep(self, s: Tensor) -> Tensor:
        """Return the fractional timestep of a level, linear in ln s between table entries, in the dtype of s."""
        return _interp_index(s.double(), self.level_table.to(s.device), torch.log).to(s.dtype)

    def c_noise(self, s: Tensor, noise_embedding: NoiseEmbedding) -> Tensor:
        """Return the timestep, or ln(s / k) / 4 for Fourier embeddings."""
        return self.timestep(s) if noise_embedding == "sinusoidal" else (s / self.resolution_scale).log() / 4

    def icdf(self, u: Tensor) -> Tensor:
        """Return a level of the table, each equally likely."""
        return _table_icdf(u, self.level_table)

    def progress(self, s: Tensor) -> Tensor:
        """Return timestep / T."""
        return self.timestep(s) / len(self.level_table)

    def weight(self, s: Tensor) -> Tensor:
        """Return 1 / s^2."""
        return 1 / s**2


class VPv(Process):
    """DDPM with v-prediction on the straight path, s = sigma / (1 + sigma) with sigma = sqrt((1 - abar) / abar).

    x is DDPM's sqrt(abar) x0 + sqrt(1-abar) eps divided by sqrt(abar) + sqrt(1-abar). These coordinates have two
    advantages over DDPM's: (x - D)/s is the derivative, so that the same Euler and Heun samplers serve all processes,
    and s = 1 at zero terminal SNR is finite. DDIM gives the same trajectory in both, because its step is linear in x.
    """

    sigma_data = 1.0
    schedules = ("linspace", "respaced", "ddim", "trailing", "leading", "karras")

    def __init__(self, cfg: config.VPConfig):
        signal, noise = _abar_roots(cfg)
        self.resolution_scale = cfg.resolution_scale
        self.level_table = noise / (signal + noise)  # (T,) ascending levels
        self.min_level, self.max_level = float(self.level_table[0]), float(self.level_table[-1])

    def alpha(self, s: Tensor) -> Tensor:
        """Return 1 - s."""
        return 1 - s

    def scale_sigma(self, s: Tensor, factor: float) -> Tensor:
        """Return the level with factor times the odds s / (1 - s)."""
        return _shift_odds(s, factor)

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in of v-prediction."""
        n = ((1 - s) ** 2 + s**2).sqrt()  # x / n is DDPM's x, of variance 1
        return (1 - s) / n**2, -s / n, 1 / n

    def timestep(self, s: Tensor) -> Tensor:
        """Return the fractional timestep of a level, linear in ln sigma between table entries, in the dtype of s."""
        return _interp_index(s.double(), self.level_table.to(s.device), torch.logit).to(s.dtype)

    def c_noise(self, s: Tensor, noise_embedding: NoiseEmbedding) -> Tensor:
        """Return the timestep, or ln(sigma / k) / 4 for Fourier embeddings."""
        if noise_embedding == "sinusoidal":
            return self.timestep(s)
        # Clamped because sigma is infinite at zero terminal SNR.
        return ((s.logit() - math.log(self.resolution_scale)) / 4).clamp(-3, 3)

    def icdf(self, u: Tensor) -> Tensor:
        """Return a level of the table, each equally likely."""
        return _table_icdf(u, self.level_table)

    def progress(self, s: Tensor) -> Tensor:
        """Return timestep / T."""
        return self.timestep(s) / len(self.level_table)

    def weight(self, s: Tensor) -> Tensor:
        """Return ((1 - s)^2 + s^2) / s^2."""
        return ((1 - s) ** 2 + s**2) / s**2


class RF(Process):
    """Rectified flow with F = eps - x0 and logit-normal training levels (SD3; Berrada et al. Appendix C).

    At another resolution the network receives the shifted level.
    """

    sigma_data = 1.0
    max_level = 1.0
    schedules = ("linear", "sd3", "karras")

    def __init__(self, cfg: config.RFConfig):
        self.resolution_scale, self.logit_std = cfg.resolution_scale, cfg.logit_std
        self.logit_mean = cfg.logit_mean + math.log(cfg.resolution_scale)
        # The lowest of the 1000 levels of SD3's published scheduler.
        self.min_level = float(_shift_odds(torch.tensor(1e-3, dtype=torch.float64), cfg.resolution_scale))

    def alpha(self, s: Tensor) -> Tensor:
        """Return 1 - s."""
        return 1 - s

    def scale_sigma(self, s: Tensor, factor: float) -> Tensor:
        """Return the level with factor times the odds s / (1 - s)."""
        return _shift_odds(s, factor)

    def precondition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip = 1, c_out = -s, c_in = 1."""
        return torch.ones_like(s), -s, torch.ones_like(s)

    def c_noise(self, s: Tensor, noise_embedding: NoiseEmbedding) -> Tensor:
        """Return 1000 s, or logit(s) / 4 for Fourier embeddings."""
        return 1000 * s if noise_embedding == "sinusoidal" else (s.logit() / 4).clamp(-3, 3)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the logit-normal quantile."""
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))

    def progress(self, s: Tensor) -> Tensor:
        """Return the logit-normal CDF."""
        return torch.special.ndtr((s.logit() - self.logit_mean) / self.logit_std)

    def weight(self, s: Tensor) -> Tensor:
        """Return 1 / s^2."""
        return 1 / s**2


def _shift_odds(s: Tensor, factor: float) -> Tensor:
    """Return k s / (1 + (k-1) s), SD3's shift, which multiplies s/(1-s) by k; s = 1 is exactly preserved."""
    return factor * s / ((1 - s) + factor * s)


def _abar_roots(cfg: config.VPConfig) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar) and k sqrt(1 - abar) of each timestep, (T,) float64; their ratio is sigma."""
    if cfg.betas == "linear":
        betas = torch.linspace(cfg.beta_start, cfg.beta_end, cfg.timesteps, dtype=torch.float64)
    else:
        betas = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.timesteps, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).sqrt()
    if cfg.zero_terminal_snr:  # Lin et al. 2024, Algorithm 1: last to 0, first unchanged
        first, last = signal[0].clone(), signal[-1].clone()
        signal = (signal - last) * (first / (first - last))
    return signal, cfg.resolution_scale * (1 - signal**2).sqrt()


def _interp_index(s: Tensor, table: Tensor, ln_sigma: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the fractional index of s in the ascending table, linear in ln_sigma(s) between entries.

    It is linear in s towards the last entry of zero terminal SNR, whose logarithm is infinite.
    """
    s = s.clamp(table[0], table[-1])
    right = torch.searchsorted(table, s).clamp(1, len(table) - 1)
    left = right - 1
    x, low, high = ln_sigma(s), ln_sigma(table[left]), ln_sigma(table[right])
    straight = (s - table[left]) / (table[right] - table[left])
    return left + torch.where(high.isinf(), straight, (x - low) / (high - low))


def _table_icdf(u: Tensor, table: Tensor) -> Tensor:
    """Return the level of the table at quantile u; all are equally likely."""
    T = len(table)
    return table.to(u.device)[(u * T).long().clamp(max=T - 1)].to(u.dtype)


def betas(process: VP | VPv) -> Tensor:
    """Return the beta of each timestep, (T,) float64, for diffusers' `trained_betas`.

    They include `resolution_scale` and zero terminal SNR, which beta_start and beta_end cannot express.
    """
    s = process.level_table
    abar = process.alpha(s) ** 2 / (process.alpha(s) ** 2 + s**2)
    return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])


def build_process(cfg: config.EDMConfig | config.VPConfig | config.RFConfig) -> Process:
    """Return the diffusion process of the settings `process.*`."""
    if isinstance(cfg, config.EDMConfig):
        return EDM(cfg)
    if isinstance(cfg, config.RFConfig):
        return RF(cfg)
    return VP(cfg) if cfg.prediction == "eps" else VPv(cfg)
