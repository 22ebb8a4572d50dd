"""A frozen VAE (diffusers' AutoencoderKL): pixels to mean and standard deviation of latents, and latents to pixels.

Latents in this module are raw: unscaled outputs of the VAE. The range of pixels and the scaling to x0 are a convention:

dit   pixels in [-1, 1]; x0 = (z - shift) * scaling, both from the VAE's settings (LDM, SDXL, SD3, DiT). Decoded pixels
      are rounded to 8 bits.
edm2  pixels in [0, 1]; x0 = (z - mean) * sd / std with a fixed mean and std per channel, sd = 0.5. Decoded pixels are
      truncated to 8 bits, as in EDM2's code: half a grey level darker on average.

Latents of the two conventions are not interchangeable.

Legend: B images, C latent channels, H W height and width in pixels, f downsampling factor, h = H/f, w = W/f.
"""

import math

import torch
from torch import Tensor

from gesso.data.encoders import hub
from gesso.errors import RunError, UsageError

WEIGHTS_STEM = "diffusion_pytorch_model"
EDM2_MEAN = (5.81, 3.25, 0.12, -2.15)
EDM2_STD = (4.17, 4.62, 3.71, 3.28)
"""Mean and std of raw latents of ImageNet for pixels in [0, 1] (EDM2's published code)."""
INPUT_SCALING = {"dit": (127.5, 1.0), "edm2": (255.0, 0.0)}
"""(divisor, offset) by convention: the input is pixels / divisor - offset."""


class VAE:
    """A VAE in a folder or at a hub id of an AutoencoderKL, or of a pipeline with one.

    Raises:
        UsageError: It is not an AutoencoderKL of RGB pixels with weights in safetensors, or contradicts the convention.
    """

    def __init__(
        self,
        model_id: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        convention: str = "dit",
    ):
        self.model_id, self.device, self.dtype, self.convention = model_id, torch.device(device), dtype, convention
        label = self.label = f"the VAE {model_id}"
        if convention not in INPUT_SCALING:
            raise UsageError(f"{label}: unknown convention {convention!r}; choose one of: {', '.join(INPUT_SCALING)}")
        hub.import_names("diffusers", "vae", [])
        self.folder = hub.model_folder(model_id, label, ("vae",), hub.model_file_patterns(WEIGHTS_STEM))
        self.config = hub.read_config(self.folder, label)
        kind = self.config.get("_class_name") or self.config.get("model_type")
        if kind != "AutoencoderKL":
            raise UsageError(f"{label}: a model of type {kind} instead of AutoencoderKL")
        hub.weight_files(self.folder, WEIGHTS_STEM, label)
        (model_class,) = hub.import_names("diffusers", "vae", ["AutoencoderKL"])
        model = hub.load_model(model_class, "diffusers", self.folder, label)
        with hub.model_errors(label):
            self.model, self.model_config = model.to(self.device, dtype), model.config
            self.latent_channels = self.model_config.latent_channels
            self.downsample_factor = 2 ** (len(self.model_config.block_out_channels) - 1)
            pixels = (self.model_config.in_channels, self.model_config.out_channels)
        if pixels != (3, 3):
            raise UsageError(f"{label}: it maps {pixels[0]} channels to {pixels[1]}, but RGB has 3")
        if convention == "edm2" and self.latent_channels != len(EDM2_MEAN):
            raise UsageError(
                f"{label}: {self.latent_channels} latent channels, but the convention edm2 has {len(EDM2_MEAN)}: "
                "use dit"
            )

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode uint8 (B, 3, H, W) to mean and standard deviation of the raw latents, each (B, C, h, w) float32.

        Raises:
            UsageError: H or W is not divisible by f.
            RunError: The result is not finite.
        """
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3, (pixels.dtype, pixels.shape)
        H, W = pixels.shape[2:]
        if H % self.downsample_factor or W % self.downsample_factor:
            raise UsageError(
                f"{self.label}: images of {H}x{W} pixels, but their size must be a multiple of {self.downsample_factor}"
            )
        divisor, offset = INPUT_SCALING[self.convention]
        x = pixels.to(self.device).float() / divisor - offset
        with torch.no_grad(), hub.model_errors(self.label):
            latents = self.model.encode(x.to(self.dtype)).latent_dist
            return self._check_finite(latents.mean), self._check_finite(latents.std)

    def decode(self, z: Tensor) -> Tensor:
        """Decode raw latents (B, C, h, w) to uint8 (B, 3, H, W), clipped, rounded or truncated by convention.

        Raises:
            RunError: The result is not finite.
        """
        assert z.shape[1] == self.latent_channels, z.shape
        divisor, offset = INPUT_SCALING[self.convention]
        with torch.no_grad(), hub.model_errors(self.label):
            x = self._check_finite(self.model.decode(z.to(self.device, self.dtype)).sample)
        values = ((x + offset) * divisor).clip(0, 255)
        return (values if self.convention == "edm2" else values.round()).to(
            torch.uint8
        )  # conversion to uint8 truncates

    def _check_finite(self, x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            raise RunError(
                f"{self.label} returns values that are not finite in {str(self.dtype).removeprefix('torch.')}, as that "
                "of SDXL in float16: set latent.dtype to bfloat16 or float32"
            )
        return x.float()

    def channel_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std per channel for data.mean and data.std: x0 = (z - mean) * sd / std.

        dit: shift and 1 / scaling, so that x0 is DiT's if the process has sd = 1.
        """
        if self.convention == "edm2":
            return EDM2_MEAN, EDM2_STD
        C, settings = self.latent_channels, self.model_config
        with hub.model_errors(self.label):
            mean = settings.get("latents_mean") or [settings.get("shift_factor") or 0.0] * C
            std = settings.get("latents_std") or [1.0] * C
            mean, std = tuple(float(m) for m in mean), tuple(s / settings.scaling_factor for s in std)
        if len(mean) != C or len(std) != C or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise RunError(f"{self.label}: latents_mean, latents_std or scaling_factor in its config.json is not valid")
        return mean, std

    def identity(self) -> dict[str, str | int]:
        """Return everything except the pixels that latents depend on, with SHA-256 of settings and weights."""
        return {
            "vae": self.model_id,
            "config": hub.sha256_config(self.config),
            "weights": hub.sha256_files(hub.weight_files(self.folder, WEIGHTS_STEM, self.label)),
            "convention": self.convention,
            "dtype": str(self.dtype).removeprefix("torch."),
            "channels": self.latent_channels,
            "downsample_factor": self.downsample_factor,
        }


def posterior_sample(mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """Return the raw latent mean + std * eps, with standard normal eps."""
    return mean + std * eps
