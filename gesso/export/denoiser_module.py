"""The denoiser of an exported pipeline as a model of diffusers. gesso reads this file as text and never imports it."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gesso import config
from gesso.conditioning import Cond
from gesso.config import ControlSpec, EDMConfig, InputSpec, RFConfig, VPConfig
from gesso.diffusion.denoiser import Denoiser
from gesso.diffusion.process import NoiseEmbedding, build_process
from gesso.models.mp import MPWeight

NETWORK: Any = nn.Module
"""Class of the network; the bundler replaces it."""
NETWORK_SETTINGS: Any = config.DiTConfig
"""Class of the network's settings; the bundler replaces it."""
PROCESS_SETTINGS: dict[str, Any] = {"edm": EDMConfig, "vp": VPConfig, "rf": RFConfig}


class GessoDenoiser(ModelMixin, ConfigMixin):
    """Denoiser D(x, s, cond) -> x0_hat of gesso, with EMA weights in which constant gains are folded.

    Args:
        net_config: Settings of the network.
        input_spec: Channels, resolution and conditions of the network.
        process_config: Settings of the diffusion process.
        time_embedding: Kind of time embedding, "fourier" or "sinusoidal".
    """

    @register_to_config
    def __init__(self, net_config: dict, input_spec: dict, process_config: dict, time_embedding: NoiseEmbedding):
        super().__init__()
        spec = InputSpec(**{**input_spec, "control": ControlSpec(**input_spec["control"])})
        self.net = NETWORK(NETWORK_SETTINGS(**net_config), spec)
        self.process = build_process(PROCESS_SETTINGS[process_config["name"]](**process_config))
        self.noise_embedding = time_embedding
        for module in self.net.modules():
            if isinstance(module, MPWeight):
                module.scale = 1.0  # folded into the weight
        self.requires_grad_(False)

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with guidance's arguments."""
        return Denoiser(self.net, self.process, self.noise_embedding)

    def forward(
        self,
        sample: Tensor,
        noise_level: Tensor,
        class_labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        control_high: Tensor | None = None,
        control_low: Tensor | None = None,
    ) -> Tensor:
        """Return the estimate of the clean image, (B, C, H, W), for noisy images and noise levels (B,)."""
        cond = Cond(class_labels, text, text_mask, pooled, control_high, control_low)
        return self.denoiser(sample, torch.as_tensor(noise_level), cond)
