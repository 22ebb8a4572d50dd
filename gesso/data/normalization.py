"""Between what data sets hold, pixels or latents, and the x0 of a run.

Legend: B samples; C channels of pixels, c of latents; H W and h w their sizes.
"""

import torch
from torch import Tensor

from gesso import rng
from gesso.config import DataConfig, LatentConfig
from gesso.data.encoders.vae import VAE, posterior_sample
from gesso.errors import UsageError


class Normalizer:
    """x0 = (raw - data.mean) * sd / data.std per channel, raw being pixels in [-1, 1] or raw latents.

    The VAE is opened when it is first needed: to encode pixels, or to show an image. to_uint8: of samples in pixels, round or
    truncate.
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
        """Raises UsageError where there is none, or none that fits."""
        if self._vae is None:
            self._vae = open_vae(self.latent, self.device)
        return self._vae

    def to_x0(self, x: Tensor, seed: int, sample_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Samples.x of the samples `counter` (B,) -> x0. Noise of latents is keyed to the counter."""
        if x.dtype == torch.uint8 and not self.latent.vae:
            raw = x.to(dtype) / 127.5 - 1
        else:
            mean, std = self.vae.encode(x) if x.dtype == torch.uint8 else x.to(dtype).chunk(2, dim=1)
            eps = rng.normal(seed, sample_index.to(x.device), "latent", mean.shape[1:], dtype)
            raw = posterior_sample(mean.to(dtype), std.to(dtype), eps)
        return (raw - self.mean.to(dtype)) * (self.sigma_data / self.std.to(dtype))

    def to_pixels(self, x: Tensor) -> Tensor:
        """Samples.x as pixels (B, C, H, W) uint8, on the CPU; of latents the means."""
        return x if x.dtype == torch.uint8 else self.vae.decode(x.float().chunk(2, dim=1)[0]).cpu()

    def ends(self) -> tuple[Tensor, Tensor]:
        """The x0 of black and of white, (C, 1, 1) float64 each."""
        low, high = ((raw - self.mean) * (self.sigma_data / self.std) for raw in (-1, 1))
        return low, high

    def x0_to_pixels(self, x0: Tensor) -> Tensor:
        """Convert x0 to (B, C, H, W) uint8, clipped."""
        raw = x0 * (self.std.to(x0.dtype) / self.sigma_data) + self.mean.to(x0.dtype)
        if self.latent.vae:
            return self.vae.decode(raw)
        values = (raw + 1) * 127.5
        return (values if self.to_uint8 == "truncate" else values.round()).clip(0, 255).to(torch.uint8)


def open_vae(latent: LatentConfig, device: torch.device | str) -> VAE:
    """The VAE of a run. Raises UsageError when it cannot be opened or is not as the settings say."""
    vae = VAE(latent.vae, device, getattr(torch, latent.dtype), latent.convention)
    for name, has in (("channels", vae.latent_channels), ("downsample_factor", vae.downsample_factor)):
        said = getattr(latent, name)
        if said != has:
            raise UsageError(f"latent.{name}={said}, but latent.vae={latent.vae} has {has}: set latent.{name}={has}")
    return vae
