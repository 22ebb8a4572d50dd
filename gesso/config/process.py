"""Diffusion processes: their training draw and the range of their noise levels.

`scale` in each is k, the linear ratio of the resolution to the one that the other values were tuned for:
a patch seen in k^2 pixels instead of one takes k times the noise to hide (Berrada et al. Prop. 1).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from gesso.config.base import Count, Settings


class EDM(Settings):
    """Variance exploding: x = x0 + sigma*eps (EDM2 Appendix B.1)."""

    name: Literal["edm"] = "edm"
    sigma_data: PositiveFloat = 0.5
    """sd: the standard deviation that data are scaled to"""
    P_mean: float = -0.4
    """training draw ln sigma ~ N(P_mean, P_std^2) (Eq. 16; the values of CONFIG B)"""
    P_std: PositiveFloat = 1.0
    sigma_min: PositiveFloat = 0.002
    """lowest and highest level of sampling, and the curvature rho of the grid between (EDM Eq. 5)"""
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0
    scale: PositiveFloat = 1.0
    """k: adds ln k to P_mean, multiplies sigma_min and sigma_max; the network is told sigma/k"""

    @model_validator(mode="after")
    def _range(self) -> "EDM":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} is not below sigma_max={self.sigma_max}")
        return self


LINEAR_ENDS = {"beta_start": 1e-4, "beta_end": 0.02}
"""first and last beta of DDPM's linear schedule (Ho et al. 2020)"""


class VP(Settings):
    """DDPM's process (Berrada et al. Appendix C)."""

    name: Literal["vp"] = "vp"
    prediction: Literal["eps", "v"] = "eps"
    """what the network estimates: the noise, or v = sqrt(abar)*eps - sqrt(1-abar)*x0"""
    betas: Literal["scaled_linear", "linear"] = "scaled_linear"
    """scaled_linear: betas = linspace(sqrt(beta_start), sqrt(beta_end), timesteps)^2 (LDM, SDXL, Berrada et al.); linear:
    betas = linspace(beta_start, beta_end, timesteps) (DDPM, ADM, DiT, MDT, PixArt)"""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    """first and last beta; where not given, those published with the schedule: .00085 and .012, or 1e-4 and .02"""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    timesteps: Annotated[Count, Field(ge=2)] = 1000
    zero_terminal_snr: bool = False
    """shift and scale sqrt(abar) so that the last level is pure noise (Lin et al. 2024, Algorithm 1)"""
    scale: PositiveFloat = 1.0
    """k: multiplies sqrt((1-abar)/abar) of every index (Prop. 1); the network is told the same index"""

    @model_validator(mode="before")
    @classmethod
    def _published_ends(cls, data: Any) -> Any:
        """Fill in the ends of the linear schedule where they are not given."""
        if isinstance(data, dict) and data.get("betas") == "linear":
            return LINEAR_ENDS | data
        return data

    @model_validator(mode="after")
    def _signal(self) -> "VP":
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "process.zero_terminal_snr=true leaves no signal at the last level, where the noise alone "
                "says nothing about the image: set process.prediction=v"
            )
        return self


class RF(Settings):
    """Rectified flow: x = (1-s)*x0 + s*eps, v-prediction (SD3, Berrada et al. Appendix C)."""

    name: Literal["rf"] = "rf"
    mean: float = 0.0
    """m: training draw logit(s) ~ N(mean, std^2)"""
    std: PositiveFloat = 1.0
    scale: PositiveFloat = 1.0
    """k: adds ln k to the mean and multiplies the odds s/(1-s) of every sampling level: SD3's shift"""


Process = Annotated[EDM | VP | RF, Field(discriminator="name")]
