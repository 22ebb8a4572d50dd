"""The only way images are made: weights, seeds and conditions in, uint8 images out.

An image depends on its seed, its condition and the sampler's settings, not on the batch it is in.

Legend: N images, C channels, R resolution.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gesso import conditions, config, devices, ema, files, keyed, snapshot
from gesso.cond import Cond
from gesso.config import Run
from gesso.config.base import parse_count
from gesso.data.space import Space
from gesso.diffusion import guidance, process, sampler, schedule
from gesso.diffusion.denoiser import Denoiser, WithVariance
from gesso.errors import UsageError

POOR = 0.3
"""relative error of a profile above which the user is warned"""


def generate(
    denoiser: Denoiser,
    run: Run,
    seeds: Sequence[int],
    cond: Cond,
    guide: Denoiser | None = None,
    space: Space | None = None,
) -> Iterator[Tensor]:
    """Batches of images (n, C, H, W) uint8 on the CPU, in the order of `seeds`, by the settings of run.sample.

    seeds: N of them; cond: the conditions of N samples (conditions.build); guide: the network that
    run.sample.guide names; space: opened before, to open a VAE once. Raises UsageError for levels that the process
    does not have, for a precision that the device does not have, and for a VAE that cannot be opened.
    """
    cfg = run.sample
    device = next(denoiser.parameters()).device
    check_device(run, device)
    dtype = getattr(torch, cfg.state_dtype)
    shape = (run.channels, *(side // run.factor for side in run.canvas))
    space = space or Space(run.data, run.latent, denoiser.process.sd, device, cfg.to_uint8)
    for start in range(0, len(seeds), cfg.batch_size):
        chunk = slice(start, start + cfg.batch_size)
        seed = torch.tensor(seeds[chunk], dtype=torch.int64, device=device)
        denoise = guided(denoiser, run, cond[chunk].to(device), guide)
        first = keyed.normal(0, seed, "first noise", shape, dtype)

        def noise(i: int, seed: Tensor = seed) -> Tensor:
            return keyed.normal(0, seed, f"noise of step {i}", shape, dtype)

        x = sampler.draw(cfg, denoiser.process, denoise, first, noise)
        yield space.pixels(x).cpu()


def opened_space(run: Run) -> Space:
    """The way from x0 to pixels, its VAE opened. Raises UsageError before any work."""
    space = Space(run.data, run.latent, process.build(run.process).sd, device_of(run), run.sample.to_uint8)
    if run.latent.vae:
        _ = space.vae
    return space


def check(run: Run) -> None:
    """Raise UsageError for sampling settings that the run's process does not have, before any work."""
    schedule.asked(process.build(run.process), run.sample)


def check_device(run: Run, device: torch.device | None = None) -> None:
    """Raise UsageError where the device (that of train.device, when None) cannot sample in sample.precision."""
    devices.check_precision(device or device_of(run), "sample.precision", run.sample.precision)


def strength(run: Run) -> float:
    """lambda at the resolution to sample at, by the scale law where the run says what it was tuned at."""
    cfg = run.sample
    k = (cfg.resolution or run.data.resolution) / cfg.tuned_at if cfg.tuned_at else 1
    return guidance.scaled(cfg.guidance, k)


def guided(denoiser: Denoiser, run: Run, cond: Cond, guide: Denoiser | None) -> guidance.Denoise:
    """The denoiser that a sampler sees, by run.sample."""
    cfg, process, full = run.sample, denoiser.process, strength(run)
    channels, networks = cfg.guided_channels, (denoiser, guide)
    if cfg.variance == "learned":
        channels = channels or run.channels  # the variance after them is that of the conditional denoiser
        networks = (WithVariance(denoiser), guide and WithVariance(guide))

    def at(lam: float) -> guidance.Denoise:
        terms = guidance.terms(
            networks[0], cond, lam, cfg.control_guidance,
            keep_control=cfg.keep_control, guide=networks[1], guide_sees=cfg.guide_sees,
        )  # fmt: skip
        return guidance.combine(terms, channels)

    inside, outside = at(full), at(1.0)
    if cfg.guidance_schedule == "power_cosine":
        inside = guidance.varying(
            at, lambda s: guidance.power_cosine(full, float(process.progress(s)), cfg.guidance_power)
        )
    if cfg.clip:  # pixels in [-1, 1] as x0, by channel
        ends = Space(run.data, run.latent, process.sd, "cpu").ends()
        inside, outside = (guidance.clipped(denoise, *ends) for denoise in (inside, outside))
    inside, outside = (in_precision(denoise, cfg.precision) for denoise in (inside, outside))
    return guidance.Within(inside, outside, process.alpha, cfg.interval) if cfg.interval else inside


def in_precision(denoise: guidance.Denoise, precision: str) -> guidance.Denoise:
    """Return `denoise` with its products computed in `precision` (sample.precision)."""

    def rounded(x: Tensor, s: Tensor) -> Tensor:
        with devices.products(x.device, precision):
            return denoise(x, s)

    return rounded


def grid(images: Tensor, columns: int, tile: int = 48) -> Image.Image:
    """One picture of images (N, C, R, R) uint8, row by row; small ones are enlarged to about `tile` pixels."""
    n, channels, height, width = images.shape
    zoom, gap = max(1, round(tile / height)), 2
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
    with files.whole(path) as temporary:
        image.save(temporary, format="png")


def picture(image: Tensor) -> Image.Image:
    """One image (C, R, R) uint8 at its own size."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


class Asked(NamedTuple):
    """What a user of `gesso sample` says, as typed."""

    label: str | None = None
    prompts: Sequence[str] = ()
    control: Mapping[str, str] = {}
    seeds: str = "0-15"
    nimg: str | None = None


def draw(folder: Path, run: Run, asked: Asked, out: Path | None) -> list[str]:
    """Images of a run as PNG files and one picture of all; returns what to tell the user."""
    check(run)
    check_device(run)
    seeds = conditions.numbers(asked.seeds, "--seeds")
    labels = conditions.labels_for(run, asked.label, len(seeds))
    prompts = conditions.prompts_for(run, asked.prompts, len(seeds))
    cond, warnings = conditions.build(run, seeds, snapshot.control_rows(folder), labels, prompts, asked.control)
    guide = guide_of(folder, run)
    space = opened_space(run)
    weights, _, time, fits = snapshot.synthesize(folder, [ema.chosen(run.sample)], _time(asked.nimg))
    denoiser = snapshot.denoiser(weights[0], run, device_of(run))
    made = torch.cat(list(generate(denoiser, run, seeds, cond, guide, space)))
    target = out or folder / "samples" / _name(folder, run, asked)
    for seed, image in zip(seeds, made, strict=True):
        save_png(picture(image), target / f"seed{seed:06d}.png")
    save_png(grid(made, columns=min(len(made), max(4, round(len(made) ** 0.5)))), target / "grid.png")
    wrote = f"wrote {len(made)} images and grid.png to {target}"
    if fits[0].error > POOR**2:
        warnings.append(f"warning: the stored averages hardly make one of {ema.chosen(run.sample)}: {fits[0]}")
    return [*warnings, wrote, f"  {described(run)}, image {time:,} ({fits[0]})"]


def described(run: Run) -> str:
    """One line on how images are drawn."""
    cfg = run.sample
    parts = [cfg.sampler, f"{cfg.steps} steps", f"guidance {strength(run):g}"]
    if strength(run) != cfg.guidance:
        parts[-1] += f" ({cfg.guidance:g} at {cfg.tuned_at} pixels, by the scale law)"
    if cfg.guide:
        parts.append(f"guided by {cfg.guide}, which sees {cfg.guide_sees}")
    if cfg.control_guidance != 1:
        parts.append(f"control guidance {cfg.control_guidance:g}")
    if cfg.guidance_schedule == "power_cosine":
        parts.append(f"power-cosine guidance of power {cfg.guidance_power:g}")
    if cfg.guided_channels:
        parts.append(f"guided in the first {cfg.guided_channels} channels")
    if cfg.variance != "small":
        parts.append(f"{cfg.variance} variance")
    if cfg.interval:
        parts.append("guided from sigma {:g} to {:g}".format(*cfg.interval))
    return ", ".join([*parts, str(ema.chosen(cfg))])


def _name(folder: Path, run: Run, asked: Asked) -> str:
    """A folder name that tells these samples from others: all that was said and is not the run's own."""
    own, said = (config.as_tree(r)["sample"] for r in (config.read(folder / "run.yaml"), run))
    parts = [f"label{asked.label}"] if asked.label else list(asked.prompts)
    parts += [f"{name}{value}" for name, value in asked.control.items()]
    parts += [f"{name}-{value}" for name, value in said.items() if value != own[name]]
    parts += [f"nimg{asked.nimg}"] if asked.nimg else []
    whole = re.sub(r"[^A-Za-z0-9.,:+_]+", "-", "-".join(parts)).strip("-.") or "own"
    # Two long names that begin alike are not the same samples.
    return whole if len(whole) <= 80 else f"{whole[:70]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def guide_of(folder: Path, run: Run) -> Denoiser | None:
    """The guiding network that run.sample names. Raises UsageError when it does not fit the run's images."""
    cfg = run.sample
    if cfg.guide is None or cfg.guidance == 1:
        return None
    place = folder if cfg.guide == "self" else Path(cfg.guide)
    length = ema.Power(cfg.guide_sigma_rel) if cfg.guide_sigma_rel else None
    if cfg.guide == "self" and not cfg.guide_nimg and length in (None, ema.chosen(cfg)):
        raise UsageError(
            "sample.guide=self is the same network: say another sample.guide_sigma_rel or sample.guide_nimg"
        )
    last = snapshot.read(snapshot.stored(place)[-1].path)[1]
    for what in ("data.channels", "data.mean", "data.std", "process.name", "process.sigma_data", "process.prediction"):
        ours, theirs = (config.flat(r).get(what) for r in (run, last))
        if ours != theirs:
            raise UsageError(f"sample.guide={cfg.guide} was trained otherwise: {what} is {theirs} there, {ours} here")
    _check_told(run, last)
    weights, other, _, _ = snapshot.synthesize(place, [length or ema.chosen(last.sample)], cfg.guide_nimg)
    return snapshot.denoiser(weights[0], other, device_of(run))


def _check_told(run: Run, guide: Run) -> None:
    """Raise UsageError when the guiding network cannot be told what run.sample.guide_sees says."""
    cfg, ours, theirs = run.sample, config.flat(run), config.flat(guide)
    shape = ["semantic.kind", "semantic.tokens", "semantic.width", "semantic.pooled_width"]
    same = [*shape, "semantic.encoder", "data.class_names", "control.variables"]
    if cfg.guide_sees == "nothing":
        if not guide.learned_without(semantic=True, control=not cfg.keep_control):
            share = "semantic" if guide.control.variables and cfg.keep_control else "both"
            raise UsageError(f"sample.guide={cfg.guide} never learned to see nothing: dropout.{share} is 0 there")
        # What is withheld still has a shape: that of tokens where it has text, that of rows where both have control.
        same = shape if guide.semantic.kind == "text" else []
        same += ["control.variables"] if guide.control.variables and run.control.variables else []
    for what in same:
        if ours[what] != theirs[what]:
            raise UsageError(
                f"sample.guide={cfg.guide} cannot be told the same: {what} is {theirs[what]} there, {ours[what]} here"
            )


def _time(nimg: str | None) -> int | None:
    value = parse_count(nimg) if nimg else None
    if value is not None and not isinstance(value, int):
        raise UsageError(f"--nimg {nimg!r}: write a number of images such as 100k")
    return value


def device_of(run: Run) -> torch.device:
    """The device that run.train.device names. Raises UsageError when it cannot be used here."""
    return devices.named(run.train.device, "train.device=")
