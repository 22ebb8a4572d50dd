"""Write a run as one of diffusers' own pipelines, where network, process and sampler have an equal there.

The folder has no text encoder: these pipelines pad text and encode the empty prompt otherwise than gesso, so that they
take `prompt_embeds` and, for guidance, `negative_prompt_embeds` of zeros.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gesso import atomic_io, ema, interop, sampling, snapshot
from gesso.config import DiTConfig, MMDiTConfig, PixArtConfig, RunConfig, UNetConfig
from gesso.diffusion.denoiser import network_inputs
from gesso.diffusion.process import VP, VPv, betas, build_process
from gesso.errors import UsageError
from gesso.export.pipeline_folder import WEIGHTS_FILE, check_output, component_name, model_index, remove_local_paths
from gesso.safetensors_io import write_tensors

DIT_MODULE = '''"""DiT of diffusers with the time frequencies of the published DiT."""

from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps


class PublishedDiT(DiTTransformer2DModel):
    """DiTTransformer2DModel with downscale_freq_shift=0."""

    def forward(self, *args, **kwargs):
        for module in self.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0
        return super().forward(*args, **kwargs)
'''


class NativePipeline(NamedTuple):
    """A pipeline class of diffusers, its parts without counterpart in gesso, and the number of its classes."""

    class_name: str
    empty: tuple[str, ...] = ()
    values: Mapping[str, Any] = {}
    num_classes: int | None = None


PIPELINES: dict[type, NativePipeline] = {
    DiTConfig: NativePipeline("DiTPipeline", num_classes=1000),
    PixArtConfig: NativePipeline("PixArtAlphaPipeline", ("tokenizer", "text_encoder")),
    MMDiTConfig: NativePipeline(
        "StableDiffusion3Pipeline",
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    ),
    UNetConfig: NativePipeline(
        "StableDiffusionPipeline",
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        {"requires_safety_checker": False},
    ),
}
"""Pipelines by the settings class of the network."""


def write_native(folder: Path, run: RunConfig, out: Path, nimg: int | None) -> list[str]:
    """Write the folder of one of diffusers' pipelines; return a report as lines.

    Args:
        folder: Run folder.
        run: Settings of the run.
        out: Folder to write; an earlier export in it is replaced.
        nimg: Number of images that the weights were trained on; None is the last snapshot.

    Raises:
        UsageError: diffusers has no equal of a setting; the message names all such settings.
    """
    check_output(out)
    pipeline = PIPELINES.get(type(run.net))
    if pipeline is None:
        names = "dit, mmdit, pixart, unet"
        raise UsageError(
            f"diffusers has no pipeline for net.name={run.net.name}, only for {names}: use --format diffusers"
        )
    reasons = unsupported_settings(run, pipeline)
    scheduler = scheduler_settings(run)
    if scheduler is None:
        reasons.append(describe_schedule(run))
    if reasons:
        raise UsageError(
            f"diffusers' {pipeline.class_name} has no equal of {'; '.join(reasons)}: use --format diffusers"
        )
    assert scheduler is not None
    profile = ema.sampling_profile(run.sample)
    weights, _, nimg, fits = snapshot.reconstruct_from_run(folder, [profile], nimg)
    denoiser = snapshot.denoiser_from_weights(weights[0], run)
    class_name, settings, state = interop.to_diffusers(
        denoiser.net, run.net, network_inputs(run, build_process(run.process))
    )
    vae = sampling.open_decoder(run, torch.device("cpu")).vae.model
    name, index = component_name(run.net), model_index(pipeline.class_name, custom=False)
    index |= {part: [None, None] for part in pipeline.empty} | dict(pipeline.values)
    with atomic_io.atomic_dir(out) as target:
        library = "diffusers"
        if isinstance(run.net, DiTConfig):
            library, class_name = "published_dit", "PublishedDiT"
            atomic_io.write_text(target / name / "published_dit.py", DIT_MODULE)
            index["id2label"] = {str(i): label for i, label in enumerate(run.data.class_names or ())}
        write_tensors(target / name / WEIGHTS_FILE, state, {"format": "pt"})
        atomic_io.write_json(target / name / "config.json", {"_class_name": class_name, **settings})
        atomic_io.write_json(target / "scheduler" / "scheduler_config.json", scheduler)
        vae.save_pretrained(target / "vae", safe_serialization=True)
        remove_local_paths(target)
        index |= {name: [library, class_name], "scheduler": ["diffusers", scheduler["_class_name"]]}
        index["vae"] = ["diffusers", type(vae).__name__]
        atomic_io.write_json(target / "model_index.json", json.loads(json.dumps(index)))
    arguments = "".join(f", {part}=None" for part in pipeline.empty)
    arguments += ", trust_remote_code=True" if library != "diffusers" else ""
    lines = [
        f"wrote {out}: diffusers' {pipeline.class_name}",
        f"  num_inference_steps={run.sample.steps}, guidance_scale={sampling.guidance_scale(run):g}, "
        f"image {nimg:,} ({fits[0]})",
        f'  DiffusionPipeline.from_pretrained("{out}"{arguments})',
    ]
    text = "  pass prompt_embeds, and negative_prompt_embeds of zeros; the folder has no text encoder"
    return [*lines, text] if run.semantic.kind == "text" else lines


def unsupported_settings(run: RunConfig, pipeline: NativePipeline) -> list[str]:
    """Return the settings, as text, that a pipeline of diffusers has no equal of, besides those of the network."""
    sample = run.sample
    reasons = {
        "a run on pixels": not run.latent.vae,
        "latent.convention=edm2": run.latent.vae is not None and run.latent.convention == "edm2",
        f"classes other than {pipeline.num_classes}": pipeline.num_classes not in (None, run.input_spec.num_classes),
        "class conditions": pipeline.num_classes is None and run.input_spec.num_classes > 0,
        "control variables": bool(run.control.variables),
        "sample.guide_run": sample.guide_run is not None,
        "sample.guidance_interval": sample.guidance_interval is not None,
        "sample.guided_channels": sample.guided_channels is not None,
        f"sample.guidance_schedule={sample.guidance_schedule}": sample.guidance_schedule != "constant",
        "sample.clip": sample.clip,
        f"sample.eta={sample.eta:g}": sample.eta > 0,
        f"sample.aspect={sample.aspect}": sample.aspect is not None,
        "semantic.padding=masked": run.semantic.padding == "masked" and not isinstance(run.net, PixArtConfig),
        "data.mean or data.std other than the VAE's": bool(run.latent.vae) and not has_statistics_of_vae(run),
    }
    return [reason for reason, is_set in reasons.items() if is_set]


def has_statistics_of_vae(run: RunConfig) -> bool:
    """Return True if x0 is scaled by the VAE's own factor, as diffusers' pipelines scale latents."""
    normalizer = sampling.open_decoder(run, torch.device("cpu"))
    mean, std = normalizer.vae.channel_stats()
    scale = normalizer.sigma_data
    assert run.data.mean is not None and run.data.std is not None  # recorded when training starts
    actual, expected = ([*run.data.mean, *(s / scale for s in run.data.std)], [*mean, *std])
    return all(abs(a - b) <= 1e-6 * max(abs(b), 1) for a, b in zip(actual, expected, strict=True))


def scheduler_settings(run: RunConfig) -> dict[str, Any] | None:
    """Return the settings of the scheduler of diffusers that equals `sample.*`; None if there is none."""
    sample, process = run.sample, build_process(run.process)
    if sample.sampler != "euler" or sample.variance != "small":
        return None
    if isinstance(process, VP | VPv):
        T = len(process.level_table)
        offsets = {"trailing": 0, "leading": 1, "ddim": 0}
        # DDIMScheduler steps to t - T // steps, whatever the next timestep is.
        if sample.schedule not in offsets or T % sample.steps or sample.shift != 1:
            return None
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": T,
            "trained_betas": betas(process).tolist(),
            "prediction_type": "epsilon" if isinstance(process, VP) else "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": sample.final_level == "zero",
            "steps_offset": offsets[sample.schedule],
            "timestep_spacing": "trailing" if sample.schedule == "trailing" else "leading",
        }
    if run.process.name == "rf" and sample.schedule == "sd3":
        shift = sample.shift * process.resolution_scale
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    return None


def describe_schedule(run: RunConfig) -> str:
    """Return the reason why diffusers has no scheduler for a run, with the settings that have one."""
    has = (
        "sample.schedule=sd3"
        if run.process.name == "rf"
        else "sample.schedule=trailing, leading or ddim where sample.steps divides the timesteps"
    )
    cure = f"; it has sample.sampler=euler with {has}" if run.process.name != "edm" else ""
    schedule = run.sample.schedule or build_process(run.process).schedules[0]
    return f"process.name={run.process.name} with sample.sampler={run.sample.sampler} sample.schedule={schedule}{cure}"
