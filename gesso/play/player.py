"""Images of a run for the settings of the playground, the frames of their denoising, and the equivalent command."""

import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gesso import config, ema, sampling, snapshot
from gesso.api import Progress, Run
from gesso.config import RunConfig
from gesso.config.sample import SampleConfig

MAX_DENOISERS = 4
"""Number of networks of different EMA lengths that stay in memory."""
MAX_IMAGES = 16
"""Maximum number of images at once."""
SAMPLER_SETTINGS = ("eta", "variance", "multistep", "S_churn", "S_min", "S_max", "S_cap", "S_noise")
"""Settings of single samplers, which have their defaults after a change of sample.sampler."""


@dataclass(frozen=True)
class PlaySettings:
    """Settings of the playground; None and empty texts are what the run was recorded with.

    label: name or index of a class; None for all classes in turn.
    prompt: prompt of a run with text; empty for captions of the training images.
    seed: seed of the first image; the others have the seeds that follow.
    num_images: number of images.
    guidance, control_guidance: guidance scales.
    control: control variables by name, as typed on the command line; empty values are left out.
    sigma_rel: relative EMA length.
    steps: number of sampling steps.
    sampler: sampler (sample.sampler).
    """

    label: str | None = None
    prompt: str = ""
    seed: int = 0
    num_images: int = 1
    guidance: float | None = None
    control_guidance: float | None = None
    control: Mapping[str, str] = field(default_factory=dict)
    sigma_rel: float | None = None
    steps: int | None = None
    sampler: str | None = None

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(self.seed, self.seed + min(self.num_images, MAX_IMAGES))

    @property
    def control_values(self) -> dict[str, str]:
        """Control variables that have a value."""
        return {name: text.strip() for name, text in self.control.items() if text.strip()}


class PlayResult(NamedTuple):
    """Images of a run with the command that writes them.

    images: (N, C, H, W) uint8.
    frames: denoised estimates of each step, (N, C, H, W) uint8 each, and the images as the last; empty if they were not
        requested.
    command: `gesso sample` command that writes the same images.
    notes: classes, sampler and EMA length, and warnings.
    """

    images: Tensor
    frames: list[Tensor]
    command: str
    notes: list[str]


def play(
    run: Run,
    settings: PlaySettings,
    with_frames: bool = False,
    program: str = "gesso",
    progress: Progress | None = None,
) -> PlayResult:
    """Sample a run.

    Args:
        run: The run. It keeps as many networks in memory as `run.max_denoisers`.
        settings: Settings of the playground.
        with_frames: True also returns the denoised estimate of each step.
        program: First words of the command, such as "gesso --code my_recipe.py".
        progress: Called with the number of finished and of all images.

    Returns:
        The images, which are equal to those of the command, the frames, the command and notes.

    Raises:
        UsageError: A setting is invalid for this run.
    """
    batches: list[list[Tensor]] = []

    def add_frame(step: int, images: Tensor) -> None:
        if step == 0:
            batches.append([])
        batches[-1].append(images)

    images = run.sample(
        labels=None if settings.label is None else [settings.label],
        prompts=[settings.prompt] if settings.prompt else None,
        seeds=settings.seeds,
        control=settings.control_values,
        settings=sample_settings(run.config, settings),
        progress=progress,
        on_step=add_frame if with_frames else None,
    )
    frames = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    # The last estimate is the image, except after a last step that does not end at zero noise.
    frames[-1:] = [images] if frames else []
    return PlayResult(images, frames, sample_command(run, settings, program), _notes(run, settings))


def sample_settings(run: RunConfig, settings: PlaySettings) -> dict[str, Any]:
    """Return the settings sample.* in which the playground differs from the run.

    An EMA length replaces a half-life. Another sampler has its default settings.
    """
    recorded = run.sample
    values: dict[str, Any] = {
        "guidance": settings.guidance,
        "control_guidance": settings.control_guidance,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "sigma_rel": settings.sigma_rel,
    }
    changes = {name: value for name, value in values.items() if value not in (None, getattr(recorded, name))}
    if settings.sigma_rel is not None and recorded.halflife is not None:
        changes |= {"sigma_rel": settings.sigma_rel, "halflife": None, "rampup": None}
    if "sampler" in changes:
        defaults = {name: SampleConfig.model_fields[name].default for name in SAMPLER_SETTINGS}
        changes |= {name: value for name, value in defaults.items() if value != getattr(recorded, name)}
    return {f"sample.{name}": value for name, value in changes.items()}


def sample_command(run: Run, settings: PlaySettings, program: str = "gesso") -> str:
    """Return the `gesso sample` command that writes the same images."""
    seeds = settings.seeds
    # --name=value, because a value may begin with a dash.
    options = [("--label", settings.label), ("--prompt", settings.prompt or None)]
    options += [("--control", f"{name}={text}") for name, text in settings.control_values.items()]
    arguments = [f"{name}={value}" for name, value in options if value is not None]
    arguments.append(f"--seeds={seeds[0]}" + (f"-{seeds[-1]}" if len(seeds) > 1 else ""))
    changes = sample_settings(run.config, settings)
    arguments += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]
    return " ".join([program, "sample", *map(shlex.quote, [str(run.folder), *arguments])])


def _notes(run: Run, settings: PlaySettings) -> list[str]:
    """Return a line on the sampler, and a warning if the snapshots do not determine the EMA length."""
    current = run.with_settings(sample_settings(run.config, settings))
    profile = ema.sampling_profile(current.sample)
    fit = snapshot.plan_reconstruction(snapshot.list_snapshots(run.folder), [profile]).worst_fit(profile)
    notes = [f"{sampling.describe_sampling(current)}, image {run.nimg:,}"]
    if fit.squared_error > sampling.MAX_PROFILE_ERROR**2:
        notes.append(f"warning: the stored snapshots cannot reconstruct {profile} accurately: {fit}")
    return notes


class Controls(NamedTuple):
    """Settings that a run has.

    labels: (name shown, value of PlaySettings.label) of each class; empty without classes.
    has_prompt: True for a run with text.
    has_guidance: True if the run was trained without conditions too, or names a guiding network.
    has_control_guidance: True if the run was trained without its control variables too.
    control: input format of each control variable, by name.
    """

    labels: list[tuple[str, str | None]]
    has_prompt: bool
    has_guidance: bool
    has_control_guidance: bool
    control: dict[str, str]


def controls_of(run: RunConfig) -> Controls:
    """Return the settings that a run has."""
    num_classes, names = run.input_spec.num_classes, run.data.class_names or ()
    labels: list[tuple[str, str | None]] = []
    if num_classes:
        labels = [("all classes in turn", None)]
        labels += [(name, name if names.count(name) == 1 else str(i)) for i, name in enumerate(names)]
        labels += [(str(i), str(i)) for i in range(len(names), num_classes)]
        if run.dropout.both + run.dropout.semantic > 0:
            labels.append(("no class", str(num_classes)))
    has_text = run.semantic.kind == "text"
    can_drop = run.learned_without(semantic=True, control=not run.sample.keep_control)
    return Controls(
        labels,
        has_text,
        bool(num_classes or has_text) and (can_drop or run.sample.guide_run is not None),
        bool(run.control.variables) and run.learned_without(control=True),
        {name: config.CONTROL_VARIABLES[name].input_format for name in run.control.variables},
    )


def picture(images: Tensor, min_size: int = 320) -> Image.Image:
    """Return images (N, C, H, W) uint8 as one picture, enlarged to about `min_size` pixels without interpolation."""
    columns = math.ceil(math.sqrt(len(images)))
    return sampling.image_grid(images, columns, max(images.shape[2], min_size // columns))


def encode_gif(sides: Sequence[Sequence[Tensor]], milliseconds: int = 120) -> bytes:
    """Return an animation of several runs next to each other as a GIF that shows the last frame for a second.

    Args:
        sides: For each run its frames, (N, C, H, W) uint8 each. The last frame of a shorter one is repeated.
        milliseconds: Duration of a frame.
    """
    num_frames = max(map(len, sides))
    pictures = [
        _join_pictures([picture(frames[min(i, len(frames) - 1)]) for frames in sides]) for i in range(num_frames)
    ]
    durations = [milliseconds] * (len(pictures) - 1) + [1000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _join_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures next to each other."""
    if len(pictures) == 1:
        return pictures[0]
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    joined = Image.new(mode, (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for part in pictures:
        joined.paste(part, (left, 0))
        left += part.width
    return joined
