"""Settings of sampling."""

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from gesso.config.base import BatchSize, Count, Edge, Factor, Guidance, PositiveCount, Probability, Settings, SigmaRel

MAX_ASPECT = 64
"""Maximum ratio of the longer to the shorter side."""


class SampleConfig(Settings):
    """Settings of sampling and guidance."""

    sampler: Literal["euler", "heun", "dpm++2m"] = "heun"
    """euler (DDIM with process.name=vp), heun (EDM Algorithm 1; Algorithm 2 with sample.S_churn) or dpm++2m
    (DPM-Solver++(2M))"""
    steps: Annotated[Count, Field(gt=0, le=100_000)] = 32
    """number of nonzero noise levels; heun evaluates the network 2*steps-1 times, the other samplers `steps` times"""
    schedule: Literal["karras", "linspace", "respaced", "ddim", "trailing", "leading", "linear", "sd3"] | None = None
    """noise levels. EDM: karras. VP: linspace, respaced (ADM, DiT, MDT), ddim (DDIM in the same projects), trailing,
    leading, karras. RF: linear, sd3, karras. null: the first of the process"""
    shift: Factor = 1.0
    """factor on sigma = s/alpha of every level (SD3's shift with process.name=rf)"""
    to_uint8: Literal["round", "truncate"] = "round"
    """conversion of pixel-space samples to 8 bits (ADM's scripts truncate); latents follow latent.convention"""
    final_level: Literal["zero", "sigma_min"] = "zero"
    """noise level after the last step: zero, or the lowest level of VP (diffusers' set_alpha_to_one=False)"""
    eta: Probability = 0.0
    """euler: fraction of DDPM's noise that is added in every step"""
    variance: Literal["small", "large", "learned"] = "small"
    """variance of that noise for sample.sampler=euler, sample.eta=1, process.name=vp: small is the posterior's, large
    is beta of the step, learned is predicted by a network with net.learned_variance=true (ADM, DiT, MDT)"""
    multistep: Literal["log_snr", "log_s"] = "log_snr"
    """dpm++2m: measure of the step size: log_snr is ln(alpha/s) (Lu et al.), log_s is -ln s (k-diffusion, SD3.5's
    code). They differ for RF and for VP with v-prediction"""
    clip: bool = False
    """clip every guided estimate of x0 to the range of pixels (clip_denoised of DDPM and ADM); not for latents"""
    S_churn: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """heun: amount of noise added before each step whose sigma is between S_min and S_max (EDM Algorithm 2)"""
    S_min: NonNegativeFloat = 0.0
    """lowest sigma with churn"""
    S_max: PositiveFloat | None = None
    """highest sigma with churn; null: no bound, so that the first step goes above the highest level, as in the code of
    EDM and EDM2"""
    S_cap: PositiveFloat | None = None
    """sigma that churn does not exceed; null: no bound for EDM; VP and RF never exceed their first level"""
    S_noise: Annotated[float, Field(gt=0, le=100)] = 1.0
    """factor on the noise that churn adds"""
    state_dtype: Literal["float32", "float64"] = "float32"
    """dtype of the image between steps; independent of the network's dtype"""
    precision: Literal["full", "tf32", "bfloat16", "float16"] = "full"
    """precision of matrix products in the networks: full is the dtype of the weights; tf32 rounds the factors of
    float32 products to 10 bits on GPUs; bfloat16 and float16 use autocast, except in embeddings. EDM2 samples with
    float16 (Table 6). The VAE uses latent.dtype"""
    guidance: Guidance = 1.0
    """guidance scale lambda: weight of the conditional denoiser; the guiding one has 1-lambda; 1 is no guidance
    (Berrada et al. Eq. 2)"""
    control_guidance: Guidance = 1.0
    """control guidance scale beta: weight of the denoiser with control variables; the one without has 1-beta (Berrada
    et al. Eq. 2; the best published value is 1.375)"""
    keep_control: bool = False
    """the guiding denoiser keeps the control variables (SDXL); false: it has no conditions (Berrada et al. Eq. 2)"""
    guidance_interval: tuple[NonNegativeFloat, PositiveFloat] | None = None
    """range of sigma = s/alpha in which guidance is applied; steps that start outside use scale 1. null: all steps"""
    guidance_schedule: Literal["constant", "power_cosine"] = "constant"
    """guidance scale at progress t: constant, or power_cosine 1 + (lambda - 1) (1 - cos(pi (1 - t)^guidance_power)) / 2
    (MDT)"""
    guidance_power: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """exponent of power_cosine; small values guide from the first steps (MDT: 4 in its evaluation, 0.01 for single
    images)"""
    guided_channels: PositiveCount | None = None
    """number of first channels of x0 that are guided; the others use scale 1 (DiT and MDT: 3 of 4). null: all"""
    guidance_base_resolution: Edge | None = None
    """resolution in pixels that the guidance scale was tuned for: at k times it the scale is 1 + k (lambda - 1)
    (Berrada et al. Prop. 2). null: the scale does not depend on the resolution"""
    resolution: Edge | None = None
    """height and width of the samples in pixels; null: data.resolution"""
    aspect: str | None = None
    """aspect ratio width:height of the samples, such as 3:2, at nearly the same number of pixels; a run trained with
    aspect-ratio buckets uses the closest one. null: square"""
    guide_run: str | None = None
    """run folder of the guiding network; self: this run with another EMA length or number of images. null: the same
    weights without conditions (classifier-free guidance)"""
    guide_conditioning: Literal["none", "all"] = "none"
    """conditions of the guiding network: none (a small unconditional network, EDM2 Eq. 152) or all (autoguidance)"""
    guide_sigma_rel: SigmaRel | None = None
    """relative EMA length of the guiding network; null: sample.sigma_rel of its run"""
    guide_nimg: PositiveCount | None = None
    """number of images that the guiding network was trained on; null: its last snapshot"""
    size_conditioning: Literal["train", "fixed", "square", "free"] = "train"
    """original sizes that samples are conditioned on (Berrada et al. Table 2b): train draws them from training images;
    fixed is the low end of sample.size_range; square draws height = width from it; free draws both independently"""
    size_range: tuple[Edge, Edge] = (512, 1024)
    """range of original sizes in pixels for sample.size_conditioning"""
    sigma_rel: SigmaRel = 0.10
    """relative EMA length of the weights"""
    halflife: PositiveCount | None = None
    """half-life in images of a traditional EMA, used in place of sample.sigma_rel; null: the power profile"""
    rampup: Annotated[float, Field(gt=0, lt=0.69)] | None = None
    """ramp-up ratio of that EMA, as ema.rampup"""
    batch_size: BatchSize = 256
    """number of images that are sampled at once"""

    @property
    def aspect_value(self) -> float:
        """Width of the samples divided by their height."""
        width, height = (int(part) for part in (self.aspect or "1:1").split(":"))
        return width / height

    def unused_settings(self) -> dict[str, str]:
        """Return the settings that have no effect, with the setting that is the reason."""
        unused: dict[str, str] = {}
        if self.S_churn == 0:
            unused |= dict.fromkeys(("S_min", "S_max", "S_cap", "S_noise"), "sample.S_churn=0")
        if self.guidance == 1:
            names = ("guidance_interval", "guidance_schedule", "guided_channels", "guidance_base_resolution",
                     "guide_run", "guide_conditioning", "guide_sigma_rel", "guide_nimg")  # fmt: skip
            unused |= dict.fromkeys(names, "sample.guidance=1")
        if self.guidance_schedule == "constant":
            unused["guidance_power"] = "sample.guidance_schedule=constant"
        if self.size_conditioning == "train":
            unused["size_range"] = "sample.size_conditioning=train"
        if self.halflife is None:
            unused["rampup"] = "sample.halflife=null"
        else:
            unused["sigma_rel"] = f"sample.halflife={self.halflife}"
        return unused

    @model_validator(mode="after")
    def _check_noise(self) -> "SampleConfig":
        if self.aspect is not None and not re.fullmatch(r"[1-9][0-9]{0,4}:[1-9][0-9]{0,4}", self.aspect):
            raise ValueError(f"sample.aspect={self.aspect}: write width:height such as 3:2")
        if not 1 / MAX_ASPECT <= self.aspect_value <= MAX_ASPECT:
            raise ValueError(f"sample.aspect={self.aspect}: the longer side has at most {MAX_ASPECT} times the shorter")
        if self.eta > 0 and self.sampler != "euler":
            raise ValueError(
                f"sample.eta={self.eta:g} is euler's noise, which sample.sampler={self.sampler} does not use: "
                "set sample.sampler=euler or sample.eta=0"
            )
        if self.variance != "small" and (self.sampler, self.eta) != ("euler", 1):
            raise ValueError(
                f"sample.variance={self.variance} is for ancestral steps: set sample.sampler=euler sample.eta=1, or "
                "sample.variance=small"
            )
        if self.multistep != "log_snr" and self.sampler != "dpm++2m":
            raise ValueError(
                f"sample.multistep={self.multistep} is for dpm++2m, not for sample.sampler={self.sampler}: set "
                "sample.sampler=dpm++2m or sample.multistep=log_snr"
            )
        if self.S_churn > 0 and self.sampler != "heun":
            raise ValueError(
                f"sample.S_churn={self.S_churn:g} is heun's noise, which sample.sampler={self.sampler} does not use: "
                "set sample.sampler=heun or sample.S_churn=0"
            )
        if self.S_max is not None and self.S_min > self.S_max:
            raise ValueError(f"sample.S_min={self.S_min:g} is above sample.S_max={self.S_max:g}: set it lower")
        return self

    @model_validator(mode="after")
    def _check_guide(self) -> "SampleConfig":
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(
                f"sample.guidance_interval={self.guidance_interval} does not rise: give the lower sigma first"
            )
        if self.size_range[0] > self.size_range[1]:
            raise ValueError(f"sample.size_range={self.size_range} falls: give the smaller size first")
        if self.guide_run is None and (self.guide_sigma_rel or self.guide_nimg or self.guide_conditioning == "all"):
            raise ValueError(
                "sample.guide_* describe another network: select it with sample.guide_run=RUN or sample.guide_run=self"
            )
        return self
