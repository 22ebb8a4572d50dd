"""Sample images: weights, seeds and conditions in, uint8 images out.

An image depends on its seed, its condition and the settings of the sampler, not on its batch.

Legend: N images, C channels, H W height and width.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gesso import atomic_io, build_conditions, config, devices, ema, rng, snapshot
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.config.base import parse_count
from gesso.data.normalization import Normalizer
from gesso.diffusion import guidance, process, samplers, schedules
from gesso.diffusion.denoiser import Denoiser, VarianceDenoiser
from gesso.errors import UsageError

MAX_PROFILE_ERROR = 0.3
"""Relative error of a reconstructed EMA profile above which a warning is printed."""


def generate(
    denoiser: Denoiser,
    run: RunConfig,
    seeds: Sequence[int],
    cond: Cond,
    guide: Denoiser | None = None,
    normalizer: Normalizer | None = None,
) -> Iterator[Tensor]:
    """Yield batches of images (n, C, H, W) uint8 on the CPU, in the order of `seeds`, by the settings `sample.*`.

    Args:
        denoiser: The denoiser; its device is used.
        run: Settings of the run.
        seeds: N seeds.
        cond: Conditions of the N samples (`build_conditions.build_cond`).
        guide: The guiding network that sample.guide_run names.
        normalizer: Result of `open_decoder`, to load a VAE only once; None loads it.

    Raises:
        UsageError: The process does not have the noise levels, the device does not have the precision, or the VAE
            cannot be loaded.
    """
    cfg = run.sample
    device = next(denoiser.parameters()).device
    check_device(run, device)
    dtype = getattr(torch, cfg.state_dtype)
    shape = (run.x0_channels, *(side // run.downsample_factor for side in run.sample_size))
    normalizer = normalizer or Normalizer(run.data, run.latent, denoiser.process.sigma_data, device, cfg.to_uint8)
    for start in range(0, len(seeds), cfg.batch_size):
        chunk = slice(start, start + cfg.batch_size)
        seed = torch.tensor(seeds[chunk], dtype=torch.int64, device=device)
        denoise = guided_denoiser(denoiser, run, cond[chunk].to(device), guide)
        first = rng.normal(0, seed, "first noise", shape, dtype)

        def noise(i: int, seed: Tensor = seed) -> Tensor:
            return rng.normal(0, seed, f"noise of step {i}", shape, dtype)

        x = samplers.sample(cfg, denoiser.process, denoise, first, noise)
        yield normalizer.x0_to_pixels(x).cpu()


def open_decoder(run: RunConfig) -> Normalizer:
    """Return the conversion of x0 to pixels with its VAE loaded; raises UsageError if the VAE cannot be loaded."""
    sigma_data = process.build_process(run.process).sigma_data
    normalizer = Normalizer(run.data, run.latent, sigma_data, run_device(run), run.sample.to_uint8)
    if run.latent.vae:
        _ = normalizer.vae
    return normalizer


def check_sampling(run: RunConfig) -> None:
    """Raise UsageError for sampling settings that the process of the run does not have."""
    schedules.levels_from_config(process.build_process(run.process), run.sample)


def check_device(run: RunConfig, device: torch.device | None = None) -> None:
    """Raise UsageError if the device (default: train.device) cannot compute in sample.precision."""
    devices.check_precision(device or run_device(run), "sample.precision", run.sample.precision)


def guidance_scale(run: RunConfig) -> float:
    """Return the guidance at the sampled resolution, scaled from sample.guidance_base_resolution where it is set."""
    cfg = run.sample
    ratio = (
        (cfg.resolution or run.data.resolution) / cfg.guidance_base_resolution if cfg.guidance_base_resolution else 1
    )
    return guidance.scale_guidance(cfg.guidance, ratio)


def guided_denoiser(denoiser: Denoiser, run: RunConfig, cond: Cond, guide: Denoiser | None) -> guidance.DenoiseFn:
    """Return the denoiser with guidance, clipping and precision by the settings `sample.*`."""
    cfg, process, strength = run.sample, denoiser.process, guidance_scale(run)
    channels = cfg.guided_channels
    net: nn.Module = denoiser
    guide_net: nn.Module | None = guide
    if cfg.variance == "learned":
        channels = channels or run.x0_channels  # the variance channels come from the conditional denoiser
        net, guide_net = VarianceDenoiser(denoiser), guide and VarianceDenoiser(guide)

    def with_guidance(scale: float) -> guidance.DenoiseFn:
        terms = guidance.guidance_terms(
            net, cond, scale, cfg.control_guidance,
            keep_control=cfg.keep_control, guide=guide_net, guide_conditioning=cfg.guide_conditioning,
        )  # fmt: skip
        return guidance.combine_terms(terms, channels)

    inside, outside = with_guidance(strength), with_guidance(1.0)
    if cfg.guidance_schedule == "power_cosine":
        inside = guidance.scheduled_guidance(
            with_guidance, lambda s: guidance.power_cosine(strength, float(process.progress(s)), cfg.guidance_power)
        )
    if cfg.clip:  # x0 of pixels in [-1, 1], by channel
        low, high = Normalizer(run.data, run.latent, process.sigma_data, "cpu").x0_range()
        inside, outside = (guidance.clip_x0(denoise, low, high) for denoise in (inside, outside))
    inside, outside = (with_precision(denoise, cfg.precision) for denoise in (inside, outside))
    if cfg.guidance_interval:
        return guidance.GuidanceInterval(inside, outside, process.alpha, cfg.guidance_interval)
    return inside


def with_precision(denoise: guidance.DenoiseFn, precision: str) -> guidance.DenoiseFn:
    """Return `denoise` with matrix products computed in `precision` (sample.precision)."""

    def rounded(x: Tensor, s: Tensor) -> Tensor:
        with devices.precision_context(x.device, precision):
            return denoise(x, s)

    return rounded


def image_grid(images: Tensor, columns: int, min_tile_size: int = 48) -> Image.Image:
    """Return one picture of images (N, C, H, W) uint8, row by row, small ones enlarged to `min_tile_size`."""
    n, channels, height, width = images.shape
    zoom, gap = max(1, round(min_tile_size / height)), 2
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, channels), 255, np.uint8
    )
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(zoom, 1).repeat(zoom, 2)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height * zoom + gap) + gap, (i % columns) * (width * zoom + gap) + gap
        canvas[top : top + height * zoom, left : left + width * zoom] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with atomic_io.atomic_file(path) as temporary:
        image.save(temporary, format="png")


def to_pil(image: Tensor) -> Image.Image:
    """Return an image (C, H, W) uint8 as a PIL image of the same size."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


class SampleArgs(NamedTuple):
    """Options of `gesso sample`, as typed."""

    label: str | None = None
    prompts: Sequence[str] = ()
    control: Mapping[str, str] = {}
    seeds: str = "0-15"
    nimg: str | None = None


def sample_to_folder(folder: Path, run: RunConfig, args: SampleArgs, out: Path | None) -> list[str]:
    """Write images of a run as PNG files and grid.png; return warnings and a summary as lines.

    Args:
        folder: Run folder.
        run: Settings of the run.
        args: Options of the command.
        out: Folder for the images; None uses a folder in `folder`/samples that names the settings.

    Raises:
        UsageError: A setting or a condition is invalid for this run.
    """
    check_sampling(run)
    check_device(run)
    seeds = build_conditions.parse_int_ranges(args.seeds, "--seeds")
    labels = build_conditions.expand_labels(run, args.label, len(seeds))
    prompts = build_conditions.expand_prompts(run, args.prompts, len(seeds))
    cond, lines = build_conditions.build_cond(
        run, seeds, snapshot.load_control_rows(folder), labels, prompts, args.control
    )
    guide, normalizer, profile = load_guide(folder, run), open_decoder(run), ema.sampling_profile(run.sample)
    weights, _, nimg, fits = snapshot.reconstruct_from_run(folder, [profile], _parse_nimg(args.nimg))
    denoiser = snapshot.denoiser_from_weights(weights[0], run, run_device(run))
    images = torch.cat(list(generate(denoiser, run, seeds, cond, guide, normalizer)))
    target = out or folder / "samples" / _samples_folder_name(folder, run, args)
    for seed, image in zip(seeds, images, strict=True):
        save_png(to_pil(image), target / f"seed{seed:06d}.png")
    save_png(image_grid(images, columns=min(len(images), max(4, round(len(images) ** 0.5)))), target / "grid.png")
    if fits[0].squared_error > MAX_PROFILE_ERROR**2:
        lines.append(f"warning: the stored snapshots cannot reconstruct {profile} accurately: {fits[0]}")
    lines.append(f"wrote {len(images)} images and grid.png to {target}")
    return [*lines, f"  {describe_sampling(run)}, image {nimg:,} ({fits[0]})"]


def describe_sampling(run: RunConfig) -> str:
    """Return a one-line description of the sampling settings."""
    cfg = run.sample
    parts = [cfg.sampler, f"{cfg.steps} steps", f"guidance {guidance_scale(run):g}"]
    if guidance_scale(run) != cfg.guidance:
        parts[-1] += f" ({cfg.guidance:g} at {cfg.guidance_base_resolution} pixels, by the scale law)"
    if cfg.guide_run:
        parts.append(f"guided by {cfg.guide_run}, which sees {cfg.guide_conditioning}")
    if cfg.control_guidance != 1:
        parts.append(f"control guidance {cfg.control_guidance:g}")
    if cfg.guidance_schedule == "power_cosine":
        parts.append(f"power-cosine guidance of power {cfg.guidance_power:g}")
    if cfg.guided_channels:
        parts.append(f"guided in the first {cfg.guided_channels} channels")
    if cfg.variance != "small":
        parts.append(f"{cfg.variance} variance")
    if cfg.guidance_interval:
        parts.append("guided from sigma {:g} to {:g}".format(*cfg.guidance_interval))
    return ", ".join([*parts, str(ema.sampling_profile(cfg))])


def _samples_folder_name(folder: Path, run: RunConfig, args: SampleArgs) -> str:
    """Return a folder name made of all options and settings that differ from the run's."""
    recorded, current = (config.to_dict(r)["sample"] for r in (config.load_config(folder / "run.yaml"), run))
    parts = [f"label{args.label}"] if args.label else list(args.prompts)
    parts += [f"{name}{value}" for name, value in args.control.items()]
    parts += [f"{name}-{value}" for name, value in current.items() if value != recorded[name]]
    parts += [f"nimg{args.nimg}"] if args.nimg else []
    name = re.sub(r"[^A-Za-z0-9.,:+_]+", "-", "-".join(parts)).strip("-.") or "default"
    # The digest keeps long names with the same beginning apart.
    return name if len(name) <= 80 else f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def load_guide(folder: Path, run: RunConfig) -> Denoiser | None:
    """Return the guiding network that sample.guide_run names, or None without guidance by another network.

    Raises:
        UsageError: The network does not fit the images or conditions of the run.
    """
    cfg = run.sample
    if cfg.guide_run is None or cfg.guidance == 1:
        return None
    guide_folder = folder if cfg.guide_run == "self" else Path(cfg.guide_run)
    profile = ema.PowerProfile(cfg.guide_sigma_rel) if cfg.guide_sigma_rel else None
    if cfg.guide_run == "self" and not cfg.guide_nimg and profile in (None, ema.sampling_profile(cfg)):
        raise UsageError(
            "sample.guide_run=self is the same network: set another sample.guide_sigma_rel or sample.guide_nimg"
        )
    guide = snapshot.read(snapshot.list_snapshots(guide_folder)[-1].path)[1]
    names = ("data.channels", "data.mean", "data.std", "process.name", "process.sigma_data", "process.prediction")
    _check_equal_settings(run, guide, names)
    _check_guide_conditioning(run, guide)
    weights, guide, _, _ = snapshot.reconstruct_from_run(
        guide_folder, [profile or ema.sampling_profile(guide.sample)], cfg.guide_nimg
    )
    return snapshot.denoiser_from_weights(weights[0], guide, run_device(run))


def _check_equal_settings(run: RunConfig, guide: RunConfig, names: Sequence[str]) -> None:
    """Raise UsageError for the first setting in which the run and the run of its guide differ."""
    for name in names:
        current, other = (config.flatten(r).get(name) for r in (run, guide))
        if current != other:
            raise UsageError(
                f"sample.guide_run={run.sample.guide_run} does not fit: {name} is {other} in it and {current} in this "
                "run; choose another guide_run"
            )


def _check_guide_conditioning(run: RunConfig, guide: RunConfig) -> None:
    """Raise UsageError if the guiding network cannot take the conditions of sample.guide_conditioning."""
    cfg = run.sample
    shape = ["semantic.kind", "semantic.max_tokens", "semantic.embed_dim", "semantic.pooled_dim"]
    names = [*shape, "semantic.encoder", "data.class_names", "control.variables"]
    if cfg.guide_conditioning == "nothing":
        if not guide.learned_without(semantic=True, control=not cfg.keep_control):
            share = "semantic" if guide.control.variables and cfg.keep_control else "both"
            raise UsageError(
                f"sample.guide_run={cfg.guide_run} was not trained without conditions: its dropout.{share} is 0; "
                "set sample.guide_conditioning=all or train it with dropout"
            )
        # Withheld conditions keep their shape: that of tokens for text, that of control rows if both have control.
        names = shape if guide.semantic.kind == "text" else []
        names += ["control.variables"] if guide.control.variables and run.control.variables else []
    _check_equal_settings(run, guide, names)


def _parse_nimg(nimg: str | None) -> int | None:
    """Return --nimg as a number; None is the last snapshot."""
    value = parse_count(nimg) if nimg else None
    if value is not None and not isinstance(value, int):
        raise UsageError(f"--nimg {nimg!r}: write a number of images such as 100k")
    return value


def run_device(run: RunConfig) -> torch.device:
    """Return the device of train.device; raises UsageError if it cannot be used."""
    return devices.resolve_device(run.train.device, "train.device=")
