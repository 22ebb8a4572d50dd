"""Convert between stored pixels or latents and the normalized x0 of a run.

Legend: B samples; C channels of pixels, H W their size; c channels of latents, h w their size.
"""

import torch
from torch import Tensor

from gesso import rng
from gesso.config import DataConfig, LatentConfig
from gesso.data.encoders.vae import VAE, posterior_sample
from gesso.errors import NonFiniteSamplesError, UsageError


class Normalizer:
    """Conversion x0 = (raw - data.mean) * sigma_data / data.std per channel; raw is pixels in [-1, 1] or raw latents.

    The VAE is loaded at its first use.

    Args:
        data: Settings with `mean` and `std` per channel.
        latent: Settings of the VAE; `latent.vae` is None for runs on pixels.
        sigma_data: Standard deviation of x0.
        device: Device of the VAE and of the statistics.
        to_uint8: "round" or "truncate", the conversion of generated pixels to integers.
    """

    def __init__(
        self,
        data: DataConfig,
        latent: LatentConfig,
        sigma_data: float,
        device: torch.device | str,
        to_uint8: str = "round",
    ):
        self.latent, self.device, self.to_uint8 = latent, torch.device(device), to_uint8
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float64, device=self.device)[:, None, None] for v in (data.mean, data.std)
        )
        self.sigma_data = sigma_data
        self._vae: VAE | None = None

    @property
    def vae(self) -> VAE:
        """Return the VAE of the run; raise UsageError if it cannot be loaded or does not fit the settings."""
        if self._vae is None:
            self._vae = open_vae(self.latent, self.device)
        return self._vae

    def to_x0(self, x: Tensor, seed: int, sample_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convert SampleBatch.x to x0 (B, C, H, W) or (B, c, h, w).

        Args:
            x: Pixels uint8, or means and standard deviations of latents.
            seed: Seed of the posterior noise of latents.
            sample_index: (B,) sample indices, the keys of that noise.
            dtype: Type of the result.
        """
        if x.dtype == torch.uint8 and not self.latent.vae:
            raw = x.to(dtype) / 127.5 - 1
        else:
            mean, std = self.vae.encode(x) if x.dtype == torch.uint8 else x.to(dtype).chunk(2, dim=1)
            eps = rng.normal(seed, sample_index.to(x.device), "latent", mean.shape[1:], dtype)
            raw = posterior_sample(mean.to(dtype), std.to(dtype), eps)
        return (raw - self.mean.to(dtype)) * (self.sigma_data / self.std.to(dtype))

    def to_pixels(self, x: Tensor) -> Tensor:
        """Convert SampleBatch.x to pixels (B, C, H, W) uint8 on the CPU; latents are decoded from their means."""
        return x if x.dtype == torch.uint8 else self.vae.decode(x.float().chunk(2, dim=1)[0]).cpu()

    def x0_range(self) -> tuple[Tensor, Tensor]:
        """Return the x0 of black and of white, (C, 1, 1) float64 each."""
        return x0_ends(self.mean, self.std, self.sigma_data)

    def x0_to_pixels(self, x0: Tensor) -> Tensor:
        """Convert x0 to pixels (B, C, H, W) uint8, clipped to 0..255.

        Raises:
            NonFiniteSamplesError: x0 has NaN or infinity.
            RunError: The VAE gives NaN or infinity.
        """
        if num_bad := len(x0) - int(x0.isfinite().flatten(1).all(dim=1).sum()):
            raise NonFiniteSamplesError(
                f"{num_bad} of {len(x0)} samples have NaN or infinity, so no image is made of them.\n"
                "Set sample.precision=full, sample.state_dtype=float64, sample.guidance lower or sample.steps higher. "
                "If that does not help, the weights are damaged: choose other ones with --nimg or eval.nimg"
            )
        raw = x0 * (self.std.to(x0.dtype) / self.sigma_data) + self.mean.to(x0.dtype)
        if self.latent.vae:
            return self.vae.decode(raw)
        values = (raw + 1) * 127.5
        return (values if self.to_uint8 == "truncate" else values.round()).clip(0, 255).to(torch.uint8)


def x0_ends(mean: Tensor, std: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return the x0 of black and of white for means and standard deviations of pixels in [-1, 1], all (C, 1, 1)."""
    low, high = ((raw - mean) * (sigma_data / std) for raw in (-1, 1))
    return low, high


def open_vae(latent: LatentConfig, device: torch.device | str) -> VAE:
    """Load the VAE of a run; raise UsageError if it cannot be loaded or differs from the settings."""
    assert latent.vae is not None
    vae = VAE(latent.vae, device, getattr(torch, latent.dtype), latent.convention)
    for name, actual in (("channels", vae.latent_channels), ("downsample_factor", vae.downsample_factor)):
        value = getattr(latent, name)
        if value != actual:
            raise UsageError(
                f"latent.{name}={value}, but latent.vae={latent.vae} has {actual}: set latent.{name}={actual}"
            )
    return vae
