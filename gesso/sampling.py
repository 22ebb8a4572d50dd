"""Sample images from a run: build conditions from labels, prompts and control variables, and generate.

An image depends on its seed, its condition and the settings of the sampler, not on its batch.

Legend: N images, C channels, H W height and width, M training samples, n columns of control variables.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from gesso import atomic_io, config, devices, ema, rng, snapshot
from gesso.conditioning import Cond, check_labels
from gesso.config import CONTROL_VARIABLES, RunConfig
from gesso.data import crops
from gesso.data.batching import control_tensors, text_tensors
from gesso.data.encoders.text import build_text_encoder
from gesso.data.normalization import Normalizer, x0_ends
from gesso.diffusion import guidance, process, samplers, schedules
from gesso.diffusion.denoiser import Denoiser, VarianceDenoiser
from gesso.errors import UsageError

StepCallback = Callable[[int, Tensor], None]
"""Callback with the index of a step and its denoised estimates, (n, C, H, W) uint8."""
MAX_PROFILE_ERROR = 0.3
"""Relative error of a reconstructed EMA profile above which a warning is printed."""


def generate(
    denoiser: Denoiser,
    run: RunConfig,
    seeds: Sequence[int],
    cond: Cond,
    guide: Denoiser | None = None,
    normalizer: Normalizer | None = None,
    on_step: StepCallback | None = None,
) -> Iterator[Tensor]:
    """Yield batches of images (n, C, H, W) uint8 on the CPU, in the order of `seeds`, by the settings `sample.*`.

    Args:
        denoiser: The denoiser; its device is used.
        run: Settings of the run.
        seeds: N seeds.
        cond: Conditions of the N samples (`build_cond`).
        guide: The guiding network that sample.guide_run names.
        normalizer: Result of `open_decoder`, to load a VAE only once; None loads it.
        on_step: Called after each step of each batch. It does not change the images.

    Raises:
        UsageError: The process does not have the noise levels, the device does not have the precision, or the VAE
            cannot be loaded.
    """
    cfg = run.sample
    device = next(denoiser.parameters()).device
    devices.check_precision(device, "sample.precision", cfg.precision)
    dtype = getattr(torch, cfg.state_dtype)
    shape = (run.x0_channels, *(side // run.downsample_factor for side in run.sample_size))
    normalizer = normalizer or open_decoder(run, device)
    for start in range(0, len(seeds), cfg.batch_size):
        chunk = slice(start, start + cfg.batch_size)
        seed = torch.tensor(seeds[chunk], dtype=torch.int64, device=device)
        denoise = guided_denoiser(denoiser, run, cond[chunk].to(device), guide)
        first = rng.normal(0, seed, "first noise", shape, dtype)

        def noise(i: int, seed: Tensor = seed) -> Tensor:
            return rng.normal(0, seed, f"noise of step {i}", shape, dtype)

        with devices.precision_context(device, cfg.precision):
            x = samplers.sample(cfg, denoiser.process, denoise, first, noise, _on_step(normalizer, device, on_step))
        yield normalizer.x0_to_pixels(x).cpu()


def _on_step(normalizer: Normalizer, device: torch.device, on_step: StepCallback | None) -> samplers.Callback | None:
    """Return the callback of a sampler that decodes the denoised estimate D for `on_step`."""
    if on_step is None:
        return None

    def decode(i: int, x: Tensor, D: Tensor) -> None:
        with torch.autocast(device.type, enabled=False):  # as the images themselves are decoded
            on_step(i, normalizer.x0_to_pixels(D).cpu())

    return decode


def open_decoder(run: RunConfig, device: torch.device | None = None) -> Normalizer:
    """Return the conversion of x0 to pixels with its VAE loaded on a device (default: train.device).

    Raises:
        UsageError: The VAE cannot be loaded.
    """
    sigma_data = process.build_process(run.process).sigma_data
    normalizer = Normalizer(run.data, run.latent, sigma_data, device or run_device(run), run.sample.to_uint8)
    if run.latent.vae:
        _ = normalizer.vae
    return normalizer


def check_sampling(run: RunConfig, device: torch.device | None = None) -> None:
    """Raise UsageError for settings `sample.*` that the process of the run, or the device, does not support."""
    schedules.levels_from_config(process.build_process(run.process), run.sample)
    if device is not None:
        devices.check_precision(device, "sample.precision", run.sample.precision)


def guidance_scale(run: RunConfig) -> float:
    """Return the guidance at the sampled resolution, scaled from sample.guidance_base_resolution where it is set."""
    cfg = run.sample
    ratio = (
        (cfg.resolution or run.data.resolution) / cfg.guidance_base_resolution if cfg.guidance_base_resolution else 1
    )
    return guidance.scale_guidance(cfg.guidance, ratio)


def guided_denoiser(denoiser: Denoiser, run: RunConfig, cond: Cond, guide: Denoiser | None) -> guidance.DenoiseFn:
    """Return the denoiser with guidance and clipping by the settings `sample.*`."""
    cfg, strength = run.sample, guidance_scale(run)
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
            with_guidance,
            lambda s: guidance.power_cosine(strength, float(denoiser.process.progress(s)), cfg.guidance_power),
        )
    if cfg.clip:  # x0 of pixels in [-1, 1], by channel
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (run.data.mean, run.data.std))
        low, high = x0_ends(mean, std, denoiser.process.sigma_data)
        inside, outside = (guidance.clip_x0(denoise, low, high) for denoise in (inside, outside))
    if cfg.guidance_interval:
        return guidance.GuidanceInterval(inside, outside, denoiser.process.alpha, cfg.guidance_interval)
    return inside


def build_cond(
    run: RunConfig,
    seeds: Sequence[int],
    control_rows: Tensor | None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    control: Mapping[str, str] | None = None,
) -> tuple[Cond, list[str]]:
    """Return the conditions of N samples, on the CPU, and warnings. Each sample depends on its seed only.

    Control variables that the user does not set have their default (no flip) or come together from one training row,
    the best variant of Berrada et al. Table 2b; the crop is the centered box that training shows of an image of the
    sampled size.

    Args:
        run: Settings of the run.
        seeds: N seeds.
        control_rows: Control variables of training samples, (M, n).
        labels: N labels, or None.
        prompts: N prompts, or None.
        control: The user's control variables by name, as text.

    Raises:
        UsageError: A label or a control variable is invalid for this run.
    """
    seed = torch.tensor(list(seeds), dtype=torch.int64)
    fields: dict[str, Tensor | None] = {}
    warnings: list[str] = []
    is_null = torch.zeros(len(seed), dtype=torch.bool)
    if labels is not None:
        check_labels(run, labels)
        fields["label"] = label = torch.tensor(list(labels))
        is_null = label == run.input_spec.num_classes
    if prompts is not None:
        encoder = build_text_encoder(run.semantic)
        warnings = encoder.truncation_notes(prompts)
        encoded = encoder(prompts)
        fields |= text_tensors(run.semantic, encoded, 0, seed)
        is_null = encoded.lengths == 0
    user_values = _parse_control(run, control or {})
    if run.control.variables:
        fields |= control_tensors(run, _choose_control_rows(run, seed, control_rows, user_values))
        if not user_values and not run.learned_without(semantic=True):
            fields["has_control"] = ~is_null  # training never shows control variables without label or text
    return Cond(**fields), [f"warning: {line}" for line in dict.fromkeys(warnings)]


def _parse_control(run: RunConfig, control: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """Return the columns of the control variables that the user sets."""
    values: dict[str, tuple[float, ...]] = {}
    for name, text in control.items():
        if name not in CONTROL_VARIABLES:
            raise UsageError(
                f"{name}={text}: no such control variable; {config.suggest(name, list(CONTROL_VARIABLES))}"
            )
        if name not in run.control.variables:
            has = ", ".join(run.control.variables) or "none"
            raise UsageError(f"{name}={text}: this run was not trained with {name}; its control variables: {has}")
        try:
            values[name] = CONTROL_VARIABLES[name].parse(text)
        except (ValueError, KeyError):
            raise UsageError(f"{name}={text}: write {CONTROL_VARIABLES[name].input_format}") from None
    if "size" in values and "aspect" in run.control.variables and "aspect" not in values:
        height, width = values["size"]
        values["aspect"] = (1000 * width / height,)
    return values


def _choose_control_rows(
    run: RunConfig, seed: Tensor, control_rows: Tensor | None, user_values: Mapping[str, tuple[float, ...]]
) -> Tensor:
    """Return control variables (N, n) that occur together in training, except where the user sets them."""
    if control_rows is None:
        raise UsageError("the snapshot has no control variables of training samples, which sampling needs")
    columns = run.control.column_names("high") + run.control.column_names("low")
    control_rows = _rows_near_aspect(run, control_rows, columns)
    pick = (rng.uniform(0, seed, "control row")[:, 0] * len(control_rows)).long()
    chosen = dict(zip(columns, control_rows[pick].T, strict=True))
    defaults: dict[str, tuple[float, ...]] = {
        name: default for name in run.control.variables if (default := CONTROL_VARIABLES[name].default)
    }
    settings: dict[str, Sequence[Tensor | float]] = {**defaults, **_sample_original_sizes(run, seed), **user_values}
    for name, values in settings.items():
        for column, value in zip(CONTROL_VARIABLES[name].columns, values, strict=True):
            chosen[column] = value if isinstance(value, Tensor) else torch.full_like(chosen[column], float(value))
    if "aspect" in user_values and "height" in chosen and "size" not in user_values:
        # The number of pixels of the row in the aspect that the user sets.
        area, ratio = chosen["height"] * chosen["width"], chosen["aspect"] / 1000
        chosen |= {"height": (area / ratio).sqrt().round(), "width": (area * ratio).sqrt().round()}
    if "crop" in run.control.variables and "crop" not in user_values:
        chosen |= _center_crop_columns(run, chosen)
    return torch.stack([chosen[column] for column in columns], dim=1)


def _center_crop_columns(run: RunConfig, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the crop columns, (N,) each, of the largest centered box that training shows of an image of this size.

    The box has the aspect of the sampled image. Where neither size nor aspect is a control variable, the original
    aspect follows from the crop box of the training row, whose aspect in pixels is that of the training images.
    """
    height, width = run.sample_size
    if "height" in values:
        sizes = torch.stack([values["height"], values["width"]], dim=1)
    elif "aspect" in values:
        sizes = torch.stack([torch.ones_like(values["aspect"]), values["aspect"] / 1000], dim=1)
    else:
        top, left, bottom, right = (values[column] for column in crops.BOX)
        trained = width / height if run.data.buckets else 1.0
        sizes = torch.stack([right - left, trained * (bottom - top)], dim=1)
    boxes = [crops.largest_view(run.data, h, w, width / height)[:4] for h, w in sizes.tolist()]
    return dict(zip(crops.BOX, (1000 * torch.tensor(boxes)).unbind(1), strict=True))


def _rows_near_aspect(run: RunConfig, control_rows: Tensor, columns: Sequence[str]) -> Tensor:
    """Return the training rows of images of about the sampled aspect, or all rows if there are none.

    For a run with buckets these are the rows of the sampled bucket; for others with sample.aspect set, the rows whose
    aspect is within a factor of 1.2.
    """
    buckets = run.data.buckets
    if (run.sample.aspect is None and not buckets) or not {"aspect", "width"} & set(columns):
        return control_rows
    values = dict(zip(columns, control_rows.unbind(1), strict=True))
    log_aspect = (values["aspect"] / 1000 if "aspect" in values else values["width"] / values["height"]).log()
    if buckets:
        aspects = torch.tensor([w / h for h, w in buckets]).log()
        sampled = math.log(run.sample_size[1] / run.sample_size[0])
        near = (log_aspect[:, None] - aspects).abs().argmin(dim=1) == (aspects - sampled).abs().argmin()
    else:
        near = (log_aspect - math.log(run.sample.aspect_value)).abs() < math.log(1.2)
    return control_rows[near] if bool(near.any()) else control_rows


def _sample_original_sizes(run: RunConfig, seed: Tensor) -> dict[str, tuple[Tensor | float, ...]]:
    """Return original sizes from the samplers of Table 2b; empty for the training distribution."""
    cfg = run.sample
    if cfg.size_conditioning == "train" or "size" not in run.control.variables:
        return {}
    low, high = cfg.size_range
    u = rng.uniform(0, seed, "size", 2)
    sides = (low + u * (high - low + 1)).floor().float()
    height, width = {
        "fixed": (torch.full_like(sides[:, 0], low),) * 2,
        "square": (sides[:, 0], sides[:, 0]),
        "free": (sides[:, 0], sides[:, 1]),
    }[cfg.size_conditioning]
    sizes: dict[str, tuple[Tensor | float, ...]] = {"size": (height, width)}
    if "aspect" in run.control.variables:
        sizes["aspect"] = (1000 * width / height,)
    return sizes


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


def save_png(image: Image.Image, path: Path, record: str | None = None) -> None:
    """Write a PNG file atomically, with `record` as its text chunk "gesso" if given."""
    info = PngInfo()
    if record is not None:
        info.add_text("gesso", record)
    with atomic_io.atomic_file(path) as temporary:
        image.save(temporary, format="png", pnginfo=info)


def to_pil(image: Tensor) -> Image.Image:
    """Return an image (C, H, W) uint8 as a PIL image of the same size."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


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
    if cfg.guide_conditioning == "none":
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


def run_device(run: RunConfig) -> torch.device:
    """Return the device of train.device; raises UsageError if it cannot be used."""
    return devices.resolve_device(run.train.device, "train.device=")
