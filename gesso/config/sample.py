"""How images are drawn."""

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from gesso.config.base import Positive, Probability, Settings, SigmaRel


class Sample(Settings):
    """How images are drawn."""

    sampler: Literal["euler", "heun", "dpm++2m"] = "heun"
    """euler is DDIM under VP; heun is EDM's Algorithm 1, with churn its Algorithm 2; dpm++2m is DPM-Solver++(2M)"""
    steps: Positive = 32
    """noise levels above 0; heun evaluates 2*steps-1 times, the others `steps` times"""
    grid: Literal["karras", "linspace", "respaced", "ddim", "trailing", "leading", "linear", "sd3"] | None = None
    """which levels: EDM has karras; VP linspace, respaced (ADM, DiT, MDT), ddim (the same projects' DDIM), trailing, leading,
    karras; RF linear, sd3, karras; the first is what null means"""
    shift: PositiveFloat = 1.0
    """factor on sigma = s/alpha of every level; SD3's shift in RF"""
    to_uint8: Literal["round", "truncate"] = "round"
    """how samples of a network in pixels become 8-bit; ADM's scripts truncate. Latents: as their convention says"""
    last: Literal["zero", "first"] = "zero"
    """where the last step goes; first is VP's lowest level (diffusers' set_alpha_to_one=False)"""
    eta: Probability = 0.0
    """euler: share of DDPM's noise in every step"""
    variance: Literal["small", "large", "learned"] = "small"
    """euler with eta=1 under VP: variance of that noise; small is the posterior's, large the step's beta, learned what a
    network with net.learned_variance puts between them (ADM, DiT, MDT)"""
    multistep: Literal["log_snr", "log_s"] = "log_snr"
    """dpm++2m: what the lengths of its steps are measured in; log_snr is ln(alpha/s) (Lu et al.), log_s is -ln s (k-diffusion,
    SD3.5's code). They differ in RF and in VP with v-prediction"""
    clip: bool = False
    """clip every guided estimate of x0 to the range of pixels (DDPM's and ADM's clip_denoised); not for latents"""
    S_churn: NonNegativeFloat = 0.0
    """heun: noise added before each step whose sigma lies in S_min to S_max, times S_noise (EDM Algorithm 2)"""
    S_min: NonNegativeFloat = 0.0
    S_max: PositiveFloat | None = None
    """null is no bound: the first step is churned too, above the highest sigma of the grid, as in EDM's and EDM2's code"""
    S_cap: PositiveFloat | None = None
    """sigma that churn does not go above; null: none in EDM; VP and RF have no level above their first and stay below it"""
    S_noise: PositiveFloat = 1.0
    state_dtype: Literal["float32", "float64"] = "float32"
    """of the image between steps; the network computes in its own"""
    precision: Literal["full", "tf32", "bfloat16", "float16"] = "full"
    """that the networks compute products in: full is the dtype of the weights; tf32 rounds the factors of float32 products to
    10 bits on GPUs; bfloat16 and float16 by autocast, embeddings excepted. EDM2's samples are of float16 (Table 6). The VAE
    computes in latent.dtype"""
    guidance: float = 1.0
    """lambda: weight of the conditional denoiser, 1-lambda of the guiding one; 1 is none (Berrada et al. Eq. 2)"""
    control_guidance: float = 1.0
    """beta: share of the denoiser that sees the control variables, 1-beta of that without (Eq. 2; best published 1.375)"""
    keep_control: bool = False
    """the guiding denoiser keeps the control variables, as SDXL does; otherwise it sees nothing (Eq. 2)"""
    interval: tuple[NonNegativeFloat, PositiveFloat] | None = None
    """sigma = s/alpha between which steps that start there have lambda; outside it is 1. null: everywhere"""
    guidance_schedule: Literal["constant", "power_cosine"] = "constant"
    """lambda over time; power_cosine: 1 + (lambda - 1) (1 - cos(pi (1 - t)^guidance_power)) / 2, t = progress (MDT)"""
    guidance_power: PositiveFloat = 4.0
    """power_cosine: the power; small values guide from the start (MDT's evaluation has 4, its single pictures .01)"""
    guided_channels: Positive | None = None
    """channels of x0 that lambda applies to, the first so many; in the others it is 1 (DiT and MDT: 3 of 4). null: all"""
    tuned_at: Positive | None = None
    """resolution that guidance was tuned at: at k times it, lambda is 1 + k (lambda - 1) (Prop. 2). null: no such law"""
    resolution: Positive | None = None
    """height and width to sample at; null: those of training"""
    aspect: str | None = None
    """width:height to sample at, such as 3:2, with about as many pixels as the square; of a run trained on buckets the
    nearest one. null: square"""
    guide: str | None = None
    """the guiding network: a run folder, or self (another length or time of this run). null: this network, withheld"""
    guide_sees: Literal["nothing", "all"] = "nothing"
    """of the conditions: nothing, a small unconditional network (EDM2 Eq. 152); all, a weaker one (autoguidance)"""
    guide_sigma_rel: SigmaRel | None = None
    """EMA length of the guiding network; null: its own run's"""
    guide_nimg: Positive | None = None
    """images that the guiding network had seen; null: the last snapshot"""
    size: Literal["train", "fixed", "square", "free"] = "train"
    """original sizes that samples are told (Table 2b): drawn from training rows; the low end of size_range; height =
    width in size_range; both in size_range, independent"""
    size_range: tuple[Positive, Positive] = (512, 1024)
    sigma_rel: SigmaRel = 0.10
    """EMA length of the weights"""
    halflife: Positive | None = None
    """images; the traditional average of this half-life instead of sigma_rel"""
    rampup: Annotated[float, Field(gt=0, lt=0.69)] | None = None
    """that of the traditional average, as ema.rampup"""
    batch_size: Positive = 256

    @property
    def ratio(self) -> float:
        """Width over height."""
        width, height = (int(part) for part in (self.aspect or "1:1").split(":"))
        return width / height

    @model_validator(mode="after")
    def _noise(self) -> "Sample":
        if self.aspect is not None and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.aspect):
            raise ValueError(f"sample.aspect={self.aspect}: write width:height such as 3:2")
        if self.eta > 0 and self.sampler != "euler":
            raise ValueError(
                f"sample.eta={self.eta:g} is euler's noise, not that of sample.sampler={self.sampler}: "
                "set sample.sampler=euler or sample.eta=0"
            )
        if self.variance != "small" and (self.sampler, self.eta) != ("euler", 1):
            raise ValueError(
                f"sample.variance={self.variance} is that of ancestral steps: set sample.sampler=euler sample.eta=1, or "
                "sample.variance=small"
            )
        if self.multistep != "log_snr" and self.sampler != "dpm++2m":
            raise ValueError(
                f"sample.multistep={self.multistep} is dpm++2m's, not that of sample.sampler={self.sampler}: set "
                "sample.sampler=dpm++2m or sample.multistep=log_snr"
            )
        if self.S_churn > 0 and self.sampler != "heun":
            raise ValueError(
                f"sample.S_churn={self.S_churn:g} is heun's noise, not that of sample.sampler={self.sampler}: "
                "set sample.sampler=heun or sample.S_churn=0"
            )
        if self.S_max is not None and self.S_min > self.S_max:
            raise ValueError(f"sample.S_min={self.S_min:g} is above sample.S_max={self.S_max:g}")
        return self

    @model_validator(mode="after")
    def _guide(self) -> "Sample":
        if self.interval and self.interval[0] >= self.interval[1]:
            raise ValueError(f"sample.interval={self.interval} does not rise")
        if self.size_range[0] > self.size_range[1]:
            raise ValueError(f"sample.size_range={self.size_range} falls")
        if self.guide is None and (self.guide_sigma_rel or self.guide_nimg or self.guide_sees == "all"):
            raise ValueError(
                "sample.guide_* describe another network: name it by sample.guide=RUN, or sample.guide=self"
            )
        return self
