"""How images are drawn."""

from typing import Literal

from gesso.config.base import Positive, Settings, SigmaRel


class Sample(Settings):
    """How images are drawn."""

    sampler: Literal["euler", "heun"] = "heun"
    """euler is DDIM under VP; heun is EDM's Algorithm 1 without churn"""
    steps: Positive = 32
    """noise levels above 0; heun evaluates 2*steps-1 times"""
    guidance: float = 1.0
    """lambda: weight of the conditional denoiser, 1-lambda of the unconditional; 1 is none"""
    sigma_rel: SigmaRel = 0.10
    """EMA length of the weights"""
    batch_size: Positive = 256
