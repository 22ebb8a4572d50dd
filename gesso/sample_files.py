"""`gesso sample`: one PNG file per seed, written as it is sampled, and a sheet of the first ones outside their folder.

Each file records what it was sampled with, so that a stopped command continues with the seeds that are missing.
"""

import hashlib
import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.ImageFile import ImageFile
from torch import Tensor

from gesso import atomic_io, conditioning, config, ema, sampling, snapshot
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.config.base import parse_count
from gesso.data.sources import decode
from gesso.errors import RunError, StoppedError, UsageError
from gesso.snapshot import ReconstructionPlan
from gesso.untrusted import parse_json, read_bytes

MAX_SHEET_IMAGES = 64
"""Maximum number of images on a sheet."""


class SampleArgs(NamedTuple):
    """Options of `gesso sample`, as typed."""

    label: str | None = None
    prompts: Sequence[str] = ()
    control: Mapping[str, str] = {}
    seeds: str = "0-15"
    nimg: str | None = None


class Conditions(NamedTuple):
    """Conditions of every seed, built batch by batch. control_rows: control variables of training samples, (M, n)."""

    run: RunConfig
    labels: Sequence[int] | None
    prompts: Sequence[str]
    control: Mapping[str, str]
    control_rows: Tensor | None

    def build(self, seeds: Sequence[int]) -> tuple[Cond, list[str]]:
        """Return the conditions of a batch of seeds, and warnings."""
        labels = conditioning.expand_labels(self.run, self.labels, seeds)
        prompts = conditioning.expand_prompts(self.run, self.prompts, seeds)
        return sampling.build_cond(self.run, seeds, self.control_rows, labels, prompts, self.control)

    def describe(self, seed: int) -> dict[str, Any]:
        """Return the conditions that the user selected for one seed."""
        label = conditioning.expand_labels(self.run, self.labels, [seed])
        prompt = conditioning.expand_prompts(self.run, self.prompts, [seed])
        given = {"label": label and label[0], "prompt": prompt and prompt[0], "control": dict(self.control)}
        return {name: value for name, value in given.items() if value not in (None, {})}


def sample_to_folder(
    folder: Path,
    run: RunConfig,
    args: SampleArgs,
    out: Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write images of a run as PNG files, and a sheet next to their folder; return warnings and a summary as lines.

    Images are written batch by batch. Those that the folder contains already are not sampled again.

    Args:
        folder: Run folder.
        run: Settings of the run.
        args: Options of the command.
        out: Folder for the images; None uses a folder in `folder`/samples that names the settings.
        progress: Called with the number of finished and of all images.

    Raises:
        UsageError: A setting or a condition is invalid for this run, or the folder contains other files.
        StoppedError: The command was interrupted; the images so far are kept.
    """
    device = sampling.run_device(run)
    sampling.check_sampling(run, device)
    atomic_io.check_run_folder(folder, "samples", "sheets")
    seeds = list(dict.fromkeys(conditioning.parse_int_ranges(args.seeds, "--seeds")))
    labels = None if args.label is None else conditioning.parse_labels(run, args.label)
    conditions = Conditions(run, labels, args.prompts, args.control, snapshot.load_control_rows(folder))
    first_batch = seeds[: run.sample.batch_size]
    first = conditions.build(first_batch)  # raises before weights are read
    profile = ema.sampling_profile(run.sample)
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(folder), [profile], parse_nimg(args.nimg))
    name = _samples_folder_name(folder, run, args, plan.nimg)
    target, sheet = folder / "samples" / name, folder / "sheets" / f"{name}.png"
    if out is not None:
        target, sheet = out, out.absolute().with_name(f"{out.absolute().name}-sheet.png")
    settings = _settings_digest(folder, run, plan)
    records = {seed: json.dumps({"seed": seed, **conditions.describe(seed), "settings": settings}) for seed in seeds}
    missing = _missing_seeds(target, records, settings)
    if missing:
        guide, normalizer = sampling.load_guide(folder, run), sampling.open_decoder(run)
        denoiser = snapshot.denoiser_from_weights(snapshot.reconstruct(plan)[0], run, device)
    num_done = num_existing = len(seeds) - len(missing)
    lines = list(first[1])
    try:
        for start in range(0, len(missing), run.sample.batch_size):
            batch = missing[start : start + run.sample.batch_size]
            cond, warnings = first if batch == first_batch else conditions.build(batch)
            lines += [line for line in warnings if line not in lines]
            for images in sampling.generate(denoiser, run, batch, cond, guide, normalizer):
                for seed, image in zip(batch, images, strict=True):
                    sampling.save_png(sampling.to_pil(image), _image_path(target, seed), records[seed])
                    num_done += 1
            progress(num_done, len(seeds))
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped: {num_done:,} of {len(seeds):,} images are in {target}; the same command samples the others",
            signal.SIGINT,
        ) from None
    return [*lines, *_summary(run, plan, conditions, seeds, num_existing, target, sheet)]


def _summary(
    run: RunConfig,
    plan: ReconstructionPlan,
    conditions: Conditions,
    seeds: Sequence[int],
    num_existing: int,
    target: Path,
    sheet: Path,
) -> list[str]:
    """Write the sheet; return lines on what was sampled."""
    lines, profile = list[str](), ema.sampling_profile(run.sample)
    fit = plan.worst_fit(profile)
    if fit.squared_error > sampling.MAX_PROFILE_ERROR**2:
        lines.append(f"warning: the stored snapshots cannot reconstruct {profile} accurately: {fit}")
    if labels := conditioning.expand_labels(run, conditions.labels, seeds):
        lines.append(f"class{'es' * (len(set(labels)) > 1)} {conditioning.describe_classes(run, labels)}")
    try:
        _write_sheet([_image_path(target, seed) for seed in seeds[:MAX_SHEET_IMAGES]], sheet)
        shown = f" of the first {MAX_SHEET_IMAGES}" if len(seeds) > MAX_SHEET_IMAGES else ""
        shown = f", and a sheet{shown} to {sheet}"
    except RunError as error:
        lines.append(f"warning: no sheet: {error}")
        shown = ""
    existing = f" ({num_existing:,} were there already)" if num_existing else ""
    lines.append(f"wrote {len(seeds) - num_existing:,} images to {target}{existing}{shown}")
    return [*lines, f"  {sampling.describe_sampling(run)}, image {plan.nimg:,} ({fit})"]


def _image_path(target: Path, seed: int) -> Path:
    return target / f"seed{seed:06d}.png"


def _open_sample(path: Path) -> ImageFile:
    """Return an image of a folder of samples, of which only the header was read; a link is not followed.

    Raises:
        RunError: It is no picture, or too large.
    """
    try:
        image = decode.open_header(read_bytes(path, follow_links=False))
        if image.width * image.height > decode.MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        return image
    except Exception as error:  # whatever Pillow raises on a damaged file
        raise RunError(f"{path} is no sample ({error}): delete it") from None


def _write_sheet(paths: Sequence[Path], sheet: Path) -> None:
    images = []
    for path in paths:
        image = _open_sample(path)
        try:
            pixels = np.array(image).reshape(image.height, image.width, -1)
        except Exception as error:  # whatever Pillow raises on a damaged file
            raise RunError(f"{path} is damaged ({type(error).__name__}): delete it") from None
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
    if len({image.shape for image in images}) > 1:
        raise RunError(f"the images of {paths[0].parent} have several sizes: delete the folder")
    columns = min(len(images), max(4, round(len(images) ** 0.5)))
    sampling.save_png(sampling.image_grid(torch.stack(images), columns), sheet)


def _missing_seeds(target: Path, records: Mapping[int, str], settings: str) -> list[int]:
    """Return the seeds whose images the folder lacks.

    Raises:
        UsageError: The folder contains other files, or samples of other settings or conditions.
    """
    entries = {entry.name for entry in target.iterdir() if not entry.name.startswith(".")} if target.is_dir() else set()
    samples = {name for name in entries if re.fullmatch(r"seed\d+\.png", name)}
    if others := sorted(entries - samples):
        raise UsageError(
            f"{target} contains other files ({', '.join(others[:3])}), and a folder of samples holds nothing else: "
            "choose another --out"
        )
    if samples:
        # One file speaks for all, because files of other settings are never added.
        _check_record(target / min(samples), settings, None)
    missing = []
    for seed, record in records.items():
        path = _image_path(target, seed)
        if path.name in samples:
            _check_record(path, settings, record)
        else:
            missing.append(seed)
    return missing


def _check_record(path: Path, settings: str, record: str | None) -> None:
    """Raise UsageError unless an image has these settings and, if given, this complete record."""
    try:
        stored = _open_sample(path).info.get("gesso")
        same = stored == record if record else parse_json(stored or "{}").get("settings") == settings
    except (RunError, ValueError, TypeError, AttributeError):
        same = False
    if not same:
        raise UsageError(
            f"{path} exists and is not a sample of these weights, settings and conditions: choose another --out, or "
            f"delete {path.parent}"
        )


def _settings_digest(folder: Path, run: RunConfig, plan: ReconstructionPlan) -> str:
    """Return a hash of the weights and the settings that all images of a folder share."""
    sample = {name: value for name, value in config.to_dict(run)["sample"].items() if name != "batch_size"}
    values: dict[str, Any] = {"sample": sample, "nimg": plan.nimg}
    values["weights"] = snapshot.weights_digest(plan.sources[-1].path)
    if run.sample.guide_run is not None and run.sample.guidance != 1:
        guide_folder = folder if run.sample.guide_run == "self" else Path(run.sample.guide_run)
        values["guide"] = snapshot.weights_digest(snapshot.list_snapshots(guide_folder)[-1].path)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _samples_folder_name(folder: Path, run: RunConfig, args: SampleArgs, nimg: int) -> str:
    """Return a folder name made of all options and settings that differ from the run's, and the images seen."""
    recorded, current = (config.to_dict(r)["sample"] for r in (config.load_config(folder / "run.yaml"), run))
    parts = [f"label{args.label}"] if args.label else list(args.prompts)
    parts += [f"{name}{value}" for name, value in args.control.items()]
    parts += [f"{name}-{value}" for name, value in current.items() if value != recorded[name] and name != "batch_size"]
    text = "-".join(parts)
    name = re.sub(r"[^A-Za-z0-9.,:+_]+", "-", text).strip("-.") or "default"
    # The digest keeps long names with the same beginning apart, and names that differ in replaced characters.
    if len(name) > 60 or re.search(r"[^A-Za-z0-9.,:+_ \[\]/'-]", text):
        name = f"{name[:50]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{name}-nimg{nimg}"


def parse_nimg(nimg: str | None) -> int | None:
    """Return --nimg as a number; None is the last snapshot."""
    value = parse_count(nimg) if nimg else None
    if value is not None and not isinstance(value, int):
        raise UsageError(f"--nimg {nimg!r}: write a number of images such as 100k")
    return value
