"""Settings of the diffusion processes: distribution of noise levels in training and their range in sampling.

`resolution_scale` is k, the ratio of the resolution to the one that the other values were tuned for. At k times the
resolution a patch covers k^2 pixels, so hiding it takes k times the noise (Berrada et al. Prop. 1).
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gesso.config.base import Count, Factor, Settings


class EDMConfig(Settings):
    """Variance-exploding process of EDM: x = x0 + sigma*eps (EDM2 Appendix B.1)."""

    name: Literal["edm"] = "edm"
    sigma_data: Factor = 0.5
    """standard deviation that x0 is normalized to"""
    P_mean: Annotated[float, Field(ge=-20, le=20)] = -0.4
    """mean of ln sigma in training: ln sigma ~ N(P_mean, P_std^2) (EDM2 Eq. 16; default of CONFIG B)"""
    P_std: Annotated[float, Field(gt=0, le=20)] = 1.0
    """standard deviation of ln sigma in training (EDM2 Eq. 16)"""
    sigma_min: Factor = 0.002
    """lowest nonzero noise level of sampling (EDM Eq. 5)"""
    sigma_max: Factor = 80.0
    """highest noise level of sampling (EDM Eq. 5)"""
    rho: Annotated[float, Field(ge=0.1, le=100)] = 7.0
    """exponent of the schedule of noise levels; larger values put more steps at low noise (EDM Eq. 5)"""
    resolution_scale: Factor = 1.0
    """k: adds ln k to P_mean and multiplies sigma_min and sigma_max; the network is conditioned on sigma/k"""

    @model_validator(mode="after")
    def _check_range(self) -> "EDMConfig":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"process.sigma_min={self.sigma_min} is not below process.sigma_max={self.sigma_max}")
        return self


MIN_LOG_ABAR = -60.0
"""Lowest logarithm of abar at the last timestep: a noise level sigma of 1e13."""
LINEAR_ENDS = {"beta_start": 1e-4, "beta_end": 0.02}
"""First and last beta of DDPM's linear schedule (Ho et al. 2020)."""


class VPConfig(Settings):
    """Discrete variance-preserving process of DDPM (Berrada et al. Appendix C)."""

    name: Literal["vp"] = "vp"
    prediction: Literal["eps", "v"] = "eps"
    """target of the network: the noise eps, or v = sqrt(abar)*eps - sqrt(1-abar)*x0"""
    betas: Literal["scaled_linear", "linear"] = "scaled_linear"
    """noise schedule. scaled_linear: linspace(sqrt(beta_start), sqrt(beta_end), timesteps)^2 (LDM, SDXL, Berrada et
    al.); linear: linspace(beta_start, beta_end, timesteps) (DDPM, ADM, DiT, MDT, PixArt)"""
    beta_start: Annotated[float, Field(gt=0, le=0.9999)] = 0.00085
    """first beta; default: 0.00085 for scaled_linear, 1e-4 for linear"""
    beta_end: Annotated[float, Field(gt=0, le=0.9999)] = 0.012
    """last beta; default: 0.012 for scaled_linear, 0.02 for linear"""
    timesteps: Annotated[Count, Field(ge=2, le=100_000)] = 1000
    """number of discrete noise levels"""
    zero_terminal_snr: bool = False
    """shift and scale sqrt(abar) so that the last level is pure noise (Lin et al. 2024, Algorithm 1); needs
    prediction=v"""
    resolution_scale: Factor = 1.0
    """k: multiplies sqrt((1-abar)/abar) of every index (Berrada et al. Prop. 1); the network is conditioned on the same
    index"""

    @model_validator(mode="before")
    @classmethod
    def _default_linear_ends(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("betas") == "linear":
            return LINEAR_ENDS | data
        return data

    @model_validator(mode="after")
    def _check_terminal_snr(self) -> "VPConfig":
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "process.zero_terminal_snr=true leaves no signal at the last level, where eps-prediction cannot "
                "recover the image: set process.prediction=v"
            )
        power, n = (2.0 if self.betas == "scaled_linear" else 1.0), self.timesteps - 1
        first, last = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        log_abar = sum(math.log1p(-((first + i / n * (last - first)) ** power)) for i in range(self.timesteps))
        if log_abar < MIN_LOG_ABAR:
            raise ValueError(
                f"process.beta_start={self.beta_start:g}, process.beta_end={self.beta_end:g} leave no signal after "
                f"{self.timesteps} timesteps: set process.beta_end or process.timesteps lower"
            )
        return self


class RFConfig(Settings):
    """Rectified flow with v-prediction: x = (1-s)*x0 + s*eps (SD3, Berrada et al. Appendix C)."""

    name: Literal["rf"] = "rf"
    logit_mean: Annotated[float, Field(ge=-20, le=20)] = 0.0
    """mean of logit(s) in training: logit(s) ~ N(logit_mean, logit_std^2)"""
    logit_std: Annotated[float, Field(gt=0, le=20)] = 1.0
    """standard deviation of logit(s) in training"""
    resolution_scale: Factor = 1.0
    """k: adds ln k to logit_mean and multiplies the odds s/(1-s) of every sampling level (SD3's shift)"""


ProcessConfig = Annotated[EDMConfig | VPConfig | RFConfig, Field(discriminator="name")]
