"""The pipeline of an exported run. gesso reads this file as text and never imports it.

Legend: N images, C channels, H W height and width of x0, n control variables.
"""
# diffusers loads its classes lazily, so that mypy does not see the methods of DiffusionPipeline.
# mypy: disable-error-code="attr-defined"

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from gesso import devices, rng
from gesso.conditioning import Cond
from gesso.config import EDMConfig, RFConfig, VPConfig
from gesso.data.batching import text_tensors
from gesso.data.encoders.text import ENCODER_CLASSES, EncodedText, LoadedEncoder, WordVectors
from gesso.data.encoders.vae import INPUT_SCALING
from gesso.diffusion import samplers
from gesso.diffusion.process import Process, build_process
from gesso.sampling import guided_denoiser

PROCESS_SETTINGS: dict[str, Any] = {"edm": EDMConfig, "vp": VPConfig, "rf": RFConfig}


class GessoPipeline(DiffusionPipeline):
    """Pipeline that samples as gesso does, with the settings of the run as defaults.

    Args:
        transformer: The denoiser, if its network is a transformer.
        unet: The denoiser, if its network is a U-Net.
        guide: A second denoiser that guides the first one.
        vae: AutoencoderKL of runs on latents.
        text_encoder: CLIP or T5 of runs on text.
        tokenizer: Its tokenizer.
        settings: Settings of the run that sampling needs.
    """

    transformer: Any
    unet: Any
    guide: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    model_cpu_offload_seq = "text_encoder->transformer->unet->guide->vae"
    _optional_components = ["transformer", "unet", "guide", "vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: object = None,
        unet: object = None,
        guide: object = None,
        vae: object = None,
        text_encoder: object = None,
        tokenizer: object = None,
        settings: dict = None,  # type: ignore[assignment]  # noqa: RUF013  # diffusers reads the annotation
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, unet=unet, guide=guide, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(settings=settings)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        control: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images.

        Args:
            class_labels: Class indices or names, one per image; the number of classes is no class.
            prompt: Prompts, one per image.
            control: Control variables (N, n), in the order of settings["control_columns"]. None takes those that
                gesso gives the same seeds, from 0 to 63.
            height: Height in pixels; None takes that of the run.
            width: Width in pixels.
            num_inference_steps: Number of noise levels; None takes sample.steps.
            guidance_scale: Guidance scale; None takes sample.guidance.
            num_images: Number of images, if no other argument says it.
            seeds: Seeds of gesso, one per image: the images are those of `gesso sample`.
            generator: Source of noise without `seeds`.
            latents: Standard normal noise (N, C, H, W) to start from.
            output_type: "pil", "np", "pt" (floats from 0 to 1) or "latent" (x0).
            return_dict: Return an ImagePipelineOutput.

        Returns:
            The images, as ImagePipelineOutput or a tuple.
        """
        run = self._run_settings(height, width, num_inference_steps, guidance_scale)
        labels, prompts = _as_list(class_labels), _as_list(prompt)
        given = [len(values) for values in (labels, prompts, seeds, latents) if values is not None]
        n = max([*given, num_images or 1])
        keys = torch.tensor(list(seeds) if seeds is not None else list(range(n)), dtype=torch.int64)
        cond = self._conditions(run, n, keys, labels, prompts, control)
        shape = (run.x0_channels, *(side // run.downsample_factor for side in run.sample_size))
        device, dtype = self._execution_device, getattr(torch, run.sample.state_dtype)
        if seeds is None:
            draw = functools.partial(randn_tensor, (n, *shape), generator=generator, device=device, dtype=dtype)
            noise: Callable[[int], Tensor] = lambda i: draw()  # noqa: E731
            first = draw() if latents is None else latents.to(device, dtype)
        else:
            noise = lambda i: rng.normal(0, keys.to(device), f"noise of step {i}", shape, dtype)  # noqa: E731
            first = rng.normal(0, keys.to(device), "first noise", shape, dtype)
        guide = None if self.guide is None else self.guide.denoiser
        model = self.transformer if self.unet is None else self.unet
        denoise = guided_denoiser(model.denoiser, run, cond.to(device), guide)
        with self.progress_bar(total=run.sample.steps) as bar, devices.precision_context(device, run.sample.precision):
            x0 = samplers.sample(run.sample, self._process, denoise, first, noise, lambda i, x, D: bar.update())
        images = x0 if output_type == "latent" else self._decode(run, x0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _process(self) -> Process:
        values = (self.transformer if self.unet is None else self.unet).config["process_config"]
        return build_process(PROCESS_SETTINGS[values["name"]](**values))

    def _run_settings(self, height: int | None, width: int | None, steps: int | None, guidance: float | None) -> Any:
        """Return the settings of the run with the changes of a call."""
        settings = {k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in self.config["settings"].items()}
        run = SimpleNamespace(**settings)
        changes = {"steps": steps, "guidance": guidance}
        run.sample.__dict__.update({name: value for name, value in changes.items() if value is not None})
        run.sample_size = height or run.sample_size[0], width or run.sample_size[1]
        return run

    def _conditions(
        self,
        run: Any,
        n: int,
        keys: Tensor,
        labels: list[int | str] | None,
        prompts: list[str] | None,
        control: Tensor | None,
    ) -> Cond:
        """Return the conditions of N images, as gesso builds them."""
        fields: dict[str, Tensor | None] = {}
        is_null = torch.zeros(n, dtype=torch.bool)
        num_classes, names = run.num_classes, list(run.data.class_names or ())
        if num_classes:
            labels = (
                [run.trained_classes[key % len(run.trained_classes)] for key in keys.tolist()]
                if labels is None
                else labels
            )
            labels = labels * n if len(labels) == 1 else labels
            indices = [names.index(label) if isinstance(label, str) else int(label) for label in labels]
            fields["label"] = label = torch.tensor(indices)
            is_null = label == num_classes
        if run.semantic.kind == "text":
            prompts = prompts or [""]
            encoded = self.encode_prompt(prompts * n if len(prompts) == 1 else prompts)
            fields |= text_tensors(run.semantic, encoded, 0, keys)
            is_null = encoded.lengths == 0
        if run.control_columns:
            rows = torch.tensor(run.control_rows)[keys % len(run.control_rows)] if control is None else control
            high = run.num_high_control
            parts = {"control_high": rows[:, :high], "control_low": rows[:, high:]}
            fields |= {name: values for name, values in parts.items() if values.shape[1]}
            if control is None and run.control_needs_semantic:
                fields["has_control"] = ~is_null
        return Cond(**fields)

    def encode_prompt(self, prompts: list[str]) -> EncodedText:
        """Return the tokens, lengths and pooled text of prompts."""
        cfg = SimpleNamespace(**self.config["settings"]["semantic"])
        if cfg.encoder == "words":
            return WordVectors(cfg)(prompts)  # type: ignore[arg-type]
        encoder = ENCODER_CLASSES[self.text_encoder.config.model_type]
        loaded = LoadedEncoder(self.text_encoder, self.tokenizer, {}, Path(), Path())
        return encoder(cfg, loaded)(prompts)  # type: ignore[arg-type]

    def _decode(self, run: Any, x0: Tensor, output_type: str) -> Any:
        """Return images from x0: floats from 0 to 1, or 8-bit images rounded as gesso rounds them."""
        mean, std = (
            torch.tensor(v, dtype=x0.dtype, device=x0.device)[:, None, None] for v in (run.data.mean, run.data.std)
        )
        raw = x0 * (std / self._process.sigma_data) + mean
        truncate = run.sample.to_uint8 == "truncate"
        if self.vae is None:
            values = (raw + 1) * 127.5
        else:
            divisor, offset = INPUT_SCALING[run.latent.convention]
            values = (self.vae.decode(raw.to(self.vae.device, self.vae.dtype)).sample.float() + offset) * divisor
            truncate = run.latent.convention == "edm2"
        values = values.clip(0, 255)
        if output_type != "pil":
            images = values / 255
            return images if output_type == "pt" else images.permute(0, 2, 3, 1).float().cpu().numpy()
        arrays = (values if truncate else values.round()).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]


def _as_list(value: Any) -> list[Any] | None:
    return value if value is None else [value] if isinstance(value, int | str) else list(value)
