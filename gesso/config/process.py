"""Diffusion processes: their training draw and the range of their noise levels."""

from typing import Annotated, Literal

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

    @model_validator(mode="after")
    def _range(self) -> "EDM":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} is not below sigma_max={self.sigma_max}")
        return self


class VP(Settings):
    """DDPM's process in variance-exploding coordinates, eps-prediction (Berrada et al. Appendix C)."""

    name: Literal["vp"] = "vp"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    """betas = linspace(sqrt(beta_start), sqrt(beta_end), timesteps)^2"""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    timesteps: Annotated[Count, Field(ge=2)] = 1000


Process = Annotated[EDM | VP, Field(discriminator="name")]
