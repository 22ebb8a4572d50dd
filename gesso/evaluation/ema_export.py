"""What `gesso ema` makes: averages of any length as files, from a run, from any trainer's snapshots, from raw weights."""

import re
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
    """What a user of `gesso ema` says, as typed."""

    sigma_rels: Sequence[float] = ()
    halflives: Sequence[str] = ()
    tensors: Sequence[str] = ()
    nimg: str | None = None
    files: Sequence[str] = ()
    batch_size: int | None = None
    decay: float | None = None


def export_ema(folder: Path, args: EmaArgs, out: Path | None, sweep_only: Mapping[str, object]) -> list[str]:
    """Write each length that is asked for; returns what to tell the user. Raises UsageError for what cannot be made.

    beside: what is said and is for --sweep alone.
    """
    if idle := [name for name, value in sweep_only.items() if value]:
        raise UsageError(f"{', '.join(idle)} has no effect without --sweep LOW:HIGH:COUNT")
    targets = _parse_targets(args, _rampup(folder))
    how = snapshot.plan_reconstruction(
        _list_snapshots(folder, args), targets, parse_image_count(args.nimg, "--nimg") if args.nimg else None
    )
    paths = snapshot.reconstruct_to_files(how, out or folder / "ema", "cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"{target} at image {how.nimg:,}: {path}  ({how.worst_fit(target)})"
        for target, path in zip(targets, paths, strict=True)
    ]
    return [*lines, *_accuracy_warnings(how), "next:", _next_command(folder, targets[-1], paths[-1])]


def _rampup(folder: Path) -> float | None:
    """Return the ramp-up of a run's traditional averages, which those made from it have too."""
    record = folder / "run.yaml"
    return config.load_config(record).ema.rampup if record.is_file() else None


def _parse_targets(args: EmaArgs, rampup: float | None = None) -> list[TargetProfile]:
    halflives = [parse_image_count(text, "--halflife", 1, ", such as 50M") for text in args.halflives]
    rest: list[Profile] = [
        *map(parse_sigma_rel, args.sigma_rels),
        *(TraditionalProfile(halflife, rampup) for halflife in halflives),
    ]
    if not rest:
        raise UsageError("which average? say --sigma-rel or --halflife; or measure many by --sweep")
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
    return [PerTensorProfile(profile, tuple(groups)) for profile in rest] if groups else list(rest)


def parse_sigma_rel(sigma_rel: float) -> PowerProfile:
    """The profile of a relative length. Raises UsageError for one that has none."""
    if not 0 < sigma_rel < 12**-0.5:
        raise UsageError(f"--sigma-rel {sigma_rel}: an EMA length lies between 0 and {12**-0.5:.4f}")
    return PowerProfile(sigma_rel)


def parse_image_count(text: str, option: str, minimum: int = 0, example: str = "") -> int:
    """A number of images, also as 50k. Raises UsageError that names `what`."""
    value = parse_count(text)
    if not isinstance(value, int) or value < minimum:
        raise UsageError(
            f"{option} {text}: write a number of images{' above 0' if minimum else ''}{example or ', such as 100k'}"
        )
    return value


def _list_snapshots(folder: Path, args: EmaArgs) -> list[Snapshot]:
    if not args.files:
        if args.decay or args.batch_size:
            raise UsageError("--decay and --batch-size say what the files of another trainer are: name them by --files")
        return snapshot.list_snapshots(folder)
    profile: Profile = RawProfile()
    if args.decay:
        if not (0 < args.decay < 1 and args.batch_size):
            raise UsageError(f"--decay {args.decay:g} lies between 0 and 1 and needs --batch-size, images of a step")
        profile = TraditionalProfile(halflife_of(args.decay, args.batch_size))
    return external_snapshots(folder, args.files, args.batch_size, profile)


def check_sweepable(folder: Path, export_only: Mapping[str, object]) -> None:
    """Raise UsageError for snapshots of which it is not known what they draw, and for what is said and is not for --sweep."""
    if idle := [name for name, value in export_only.items() if value]:
        raise UsageError(f"{', '.join(idle)} has no effect with --sweep")
    if folder.is_dir() and not (folder / "run.yaml").is_file():
        snapshot.list_snapshots(folder)
        raise UsageError(f"{folder} has snapshots and no run.yaml: any length can be made (--sigma-rel), none measured")


def _accuracy_warnings(plan: ReconstructionPlan) -> list[str]:
    return [
        f"warning: what is stored hardly makes one of {profile}: {fit}; {_accurate_range(plan)}"
        for profile, fit in plan.fits.items()
        if fit.squared_error > MAX_PROFILE_ERROR**2
    ]


def _accurate_range(plan: ReconstructionPlan) -> str:
    """Which lengths can be made."""
    times, kinds = [s.nimg for s in plan.sources], [s.profile for s in plan.sources]
    grid = [0.001 * 1.1**i for i in range(60) if 0.001 * 1.1**i < 0.288]
    good = [
        s
        for s in grid
        if ema.fit_profile(times, kinds, plan.nimg, PowerProfile(s)).squared_error <= MAX_PROFILE_ERROR**2
    ]
    return f"lengths sigma_rel {good[0]:.2g} to {good[-1]:.2g} can be made" if good else "no length can"


def _next_command(folder: Path, target: TargetProfile, path: Path) -> str:
    if not (folder / "run.yaml").is_file() or isinstance(target, PerTensorProfile):
        return f"  module.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    said = (
        f"halflife={target.halflife}" if isinstance(target, TraditionalProfile) else f"sigma_rel={target.sigma_rel:g}"
    )
    instead = config.load_config(folder / "run.yaml").sample.halflife and isinstance(target, PowerProfile)
    return f"  gesso sample {folder} sample.{said}{' sample.halflife=null' if instead else ''}"


def external_snapshots(
    folder: Path, patterns: Sequence[str], batch_size: int | None = None, profile: Profile | None = None
) -> list[Snapshot]:
    """Weights that another trainer kept as safetensors files, by time; raw unless `profile` says what average they are.

    names: patterns such as step-{step}.safetensors or {nimg}/model.safetensors, relative to `folder`, or FILE=IMAGES.
    {step} times batch_size is the number of images seen, {nimg} is it; both as 50000 or 50k. Raises UsageError when a
    pattern fits nothing or is none, or when two files are of one time.
    """
    times: dict[Path, int] = {}
    for name in patterns:
        times |= _match_files(folder, name, batch_size)
    found = sorted(
        (Snapshot(path, nimg, profile or RawProfile()) for path, nimg in times.items()), key=lambda s: s.nimg
    )
    for a, b in zip(found, found[1:], strict=False):
        if a.nimg == b.nimg:
            raise UsageError(f"{a.path} and {b.path} are both of image {a.nimg:,}: name one of them")
    return found


def _match_files(folder: Path, template: str, batch_size: int | None) -> dict[Path, int]:
    """Files and times of one pattern."""
    file, equals, text = template.rpartition("=")
    kinds = re.findall(r"\{(step|nimg)\}", template)
    if equals and not kinds:
        nimg = parse_count(text)
        if not isinstance(nimg, int) or not (folder / file).is_file():
            raise UsageError(f"--files {template}: write FILE=IMAGES, a file in {folder} and a number such as 50k")
        return {folder / file: nimg}
    if len(kinds) != 1:
        raise UsageError(
            f"--files {template}: say where the time stands, by {{nimg}} or {{step}}: step-{{step}}.safetensors"
        )
    if kinds == ["step"] and not batch_size:
        raise UsageError(f"--files {template}: steps become images by --batch-size")
    before, after = template.split(f"{{{kinds[0]}}}")
    pattern = re.compile(re.escape(before) + r"(\d+[kKmM]?)" + re.escape(after))
    paths = {path: pattern.fullmatch(path.relative_to(folder).as_posix()) for path in folder.rglob("*.safetensors")}
    unit = batch_size if kinds == ["step"] else 1
    found = {path: parse_count(match[1]) * unit for path, match in paths.items() if match}
    if not found:
        there = ", ".join(sorted(p.relative_to(folder).as_posix() for p in paths)[:3]) or "none"
        raise UsageError(f"--files {template} fits no safetensors file in {folder} (there: {there})")
    return found
