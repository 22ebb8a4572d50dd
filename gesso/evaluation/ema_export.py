"""`gesso ema`: write EMA weights of any length, from a run, from snapshots of another trainer, or from raw weights."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gesso import config, ema, snapshot
from gesso.config.base import halflife_of, parse_count
from gesso.ema import PerTensorProfile, PowerProfile, Profile, RawProfile, TraditionalProfile
from gesso.errors import UsageError
from gesso.sampling import MAX_PROFILE_ERROR
from gesso.snapshot import ReconstructionPlan, Snapshot, TargetProfile


class EmaArgs(NamedTuple):
    """Arguments of `gesso ema`, as typed."""

    sigma_rels: Sequence[float] = ()
    halflives: Sequence[str] = ()
    tensors: Sequence[str] = ()
    nimg: str | None = None
    files: Sequence[str] = ()
    batch_size: int | None = None
    decay: float | None = None


def export_ema(folder: Path, args: EmaArgs, out: Path | None, sweep_only: Mapping[str, object]) -> list[str]:
    """Write EMA weights of the requested lengths. Returns the lines to print.

    Args:
        folder: Run folder, or a folder with the files of `args.files`.
        args: Arguments.
        out: Folder to write to; None: FOLDER/ema.
        sweep_only: Values of options that are for --sweep only.

    Raises:
        UsageError: An argument is invalid.
    """
    if ignored := [name for name, value in sweep_only.items() if value]:
        raise UsageError(f"{', '.join(ignored)} has no effect without --sweep LOW:HIGH:COUNT")
    targets = _parse_targets(args, _rampup(folder))
    plan = snapshot.plan_reconstruction(
        _list_snapshots(folder, args), targets, parse_image_count(args.nimg, "--nimg") if args.nimg else None
    )
    paths = snapshot.reconstruct_to_files(plan, out or folder / "ema", "cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"{target} at image {plan.nimg:,}: {path}  ({plan.worst_fit(target)})"
        for target, path in zip(targets, paths, strict=True)
    ]
    return [*lines, *accuracy_warnings(plan), "next:", _next_command(folder, targets[-1], paths[-1])]


def _rampup(folder: Path) -> float | None:
    """Return the ramp-up of a run's traditional EMAs, which reconstructed ones have too."""
    record = folder / "run.yaml"
    return config.load_config(record).ema.rampup if record.is_file() else None


def _parse_targets(args: EmaArgs, rampup: float | None = None) -> list[TargetProfile]:
    halflives = [parse_image_count(text, "--halflife", 1, ", such as 50M") for text in args.halflives]
    profiles: list[Profile] = [
        *map(parse_sigma_rel, args.sigma_rels),
        *(TraditionalProfile(halflife, rampup) for halflife in halflives),
    ]
    if not profiles:
        raise UsageError("no EMA length: set --sigma-rel or --halflife, or compare many with --sweep")
    groups = []
    for text in args.tensors:
        glob, equals, value = text.rpartition("=")
        try:
            groups.append((glob, parse_sigma_rel(float(value))))
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(
                f"--tensors {text}: write GLOB=LENGTH such as 'blocks.0.*=0.05'; a GLOB alone is for --sweep"
            )
    return [PerTensorProfile(profile, tuple(groups)) for profile in profiles] if groups else list(profiles)


def parse_sigma_rel(sigma_rel: float) -> PowerProfile:
    """Return the power profile of a relative length. Raises UsageError if it has none."""
    if not 0 < sigma_rel < 12**-0.5:
        raise UsageError(f"--sigma-rel {sigma_rel}: write a length between 0 and {12**-0.5:.4f}")
    return PowerProfile(sigma_rel)


def parse_image_count(text: str, option: str, minimum: int = 0, example: str = "") -> int:
    """Return a number of images, which may be written 50k. Raises UsageError that names the option."""
    value = parse_count(text)
    if not isinstance(value, int) or value < minimum:
        raise UsageError(
            f"{option} {text}: write a number of images{' above 0' if minimum else ''}{example or ', such as 100k'}"
        )
    return value


def _list_snapshots(folder: Path, args: EmaArgs) -> list[Snapshot]:
    if not args.files:
        if args.decay or args.batch_size:
            raise UsageError("--decay and --batch-size describe files of another trainer: name them with --files")
        return snapshot.list_snapshots(folder)
    profile: Profile = RawProfile()
    if args.decay:
        if not (0 < args.decay < 1 and args.batch_size):
            raise UsageError(
                f"--decay {args.decay:g}: write a number between 0 and 1, and set --batch-size, the images per step"
            )
        profile = TraditionalProfile(halflife_of(args.decay, args.batch_size))
    return external_snapshots(folder, args.files, args.batch_size, profile)


def check_sweepable(folder: Path, export_only: Mapping[str, object]) -> None:
    """Raise UsageError for a folder without run.yaml, whose weights cannot sample, or for options without --sweep."""
    if ignored := [name for name, value in export_only.items() if value]:
        raise UsageError(f"{', '.join(ignored)} has no effect with --sweep")
    if folder.is_dir() and not (folder / "run.yaml").is_file():
        snapshot.list_snapshots(folder)
        raise UsageError(
            f"{folder} has snapshots but no run.yaml: EMA weights can be written (--sigma-rel), but not evaluated"
        )


def accuracy_warnings(plan: ReconstructionPlan) -> list[str]:
    """Return a warning for each profile of a plan whose relative error is above MAX_PROFILE_ERROR."""
    return [
        f"warning: the snapshots cannot reconstruct {profile} accurately: {fit}; {_accurate_range(plan)}"
        for profile, fit in plan.fits.items()
        if fit.squared_error > MAX_PROFILE_ERROR**2
    ]


def sweep_warnings(plan: ReconstructionPlan) -> list[str]:
    """Return one warning on the lengths of a sweep with a relative error above MAX_PROFILE_ERROR, if there are any."""
    poor = [profile for profile, fit in plan.fits.items() if fit.squared_error > MAX_PROFILE_ERROR**2]
    if not poor:
        return []
    return [
        f"warning: the snapshots cannot reconstruct {', '.join(map(str, poor[:6]))}{', ...' * (len(poor) > 6)} "
        f"accurately (relative error above {MAX_PROFILE_ERROR:g}), so the optimum ignores "
        f"{'them' if len(poor) > 1 else 'it'}; {_accurate_range(plan)}"
    ]


def _accurate_range(plan: ReconstructionPlan) -> str:
    """Return the range of lengths that can be reconstructed accurately, as text."""
    times, kinds = [s.nimg for s in plan.sources], [s.profile for s in plan.sources]
    grid = [0.001 * 1.1**i for i in range(60) if 0.001 * 1.1**i < 0.288]
    good = [
        s
        for s in grid
        if ema.fit_profile(times, kinds, plan.nimg, PowerProfile(s)).squared_error <= MAX_PROFILE_ERROR**2
    ]
    return f"accurate are sigma_rel {good[0]:.2g} to {good[-1]:.2g}" if good else "no length is accurate"


def _next_command(folder: Path, target: TargetProfile, path: Path) -> str:
    if not (folder / "run.yaml").is_file() or isinstance(target, PerTensorProfile):
        return f"  module.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    if isinstance(target, TraditionalProfile):
        return f"  gesso sample {shlex.quote(str(folder))} sample.halflife={target.halflife}"
    assert isinstance(target, PowerProfile)  # raw profiles are no targets
    reset = " sample.halflife=null" if config.load_config(folder / "run.yaml").sample.halflife else ""
    return f"  gesso sample {shlex.quote(str(folder))} sample.sigma_rel={target.sigma_rel:g}{reset}"


def external_snapshots(
    folder: Path, patterns: Sequence[str], batch_size: int | None = None, profile: Profile | None = None
) -> list[Snapshot]:
    """Return snapshots that another trainer wrote as safetensors files, by time.

    Args:
        folder: Folder of the files.
        patterns: Patterns relative to the folder, such as step-{step}.safetensors or {nimg}/model.safetensors, where
            {nimg} is the number of images seen and {step} times batch_size is; or FILE=IMAGES. 50k is a number too.
        batch_size: Images per step.
        profile: Profile of the EMA; None: raw weights.

    Raises:
        UsageError: A pattern is invalid or matches no file, or two files have the same time.
    """
    times: dict[Path, int] = {}
    for pattern in patterns:
        times |= _match_files(folder, pattern, batch_size)
    snapshots = sorted(
        (Snapshot(path, nimg, profile or RawProfile()) for path, nimg in times.items()), key=lambda s: s.nimg
    )
    for a, b in zip(snapshots, snapshots[1:], strict=False):
        if a.nimg == b.nimg:
            raise UsageError(f"{a.path} and {b.path} are both at image {a.nimg:,}: name only one of them")
    return snapshots


def _match_files(folder: Path, template: str, batch_size: int | None) -> dict[Path, int]:
    """Return the time of each file that matches one pattern."""
    file, equals, text = template.rpartition("=")
    fields = re.findall(r"\{(step|nimg)\}", template)
    if equals and not fields:
        nimg = parse_count(text)
        if not isinstance(nimg, int) or not (folder / file).is_file():
            raise UsageError(f"--files {template}: write FILE=IMAGES, a file in {folder} and a number such as 50k")
        return {folder / file: nimg}
    if len(fields) != 1:
        raise UsageError(
            f"--files {template}: write {{nimg}} or {{step}} in place of the time, such as step-{{step}}.safetensors"
        )
    if fields == ["step"] and not batch_size:
        raise UsageError(f"--files {template}: set --batch-size, the images per step")
    before, after = template.split(f"{{{fields[0]}}}")
    pattern = re.compile(re.escape(before) + r"(\d+[kKmM]?)" + re.escape(after))
    paths = {path: pattern.fullmatch(path.relative_to(folder).as_posix()) for path in folder.rglob("*.safetensors")}
    unit = batch_size if fields == ["step"] and batch_size else 1
    times = {path: parse_image_count(match[1], "--files") * unit for path, match in paths.items() if match}
    if not times:
        files = ", ".join(sorted(p.relative_to(folder).as_posix() for p in paths)[:3]) or "none"
        raise UsageError(f"--files {template} matches no safetensors file in {folder} (its files: {files})")
    return times
