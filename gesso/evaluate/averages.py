"""What `gesso ema` makes: averages of any length as files, from a run, from any trainer's snapshots, from raw weights."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gesso import config, ema, snapshot
from gesso.config.base import halflife_of, parse_count
from gesso.ema import PerTensor, Power, Profile, Raw, Traditional
from gesso.errors import UsageError
from gesso.generate import POOR
from gesso.snapshot import Plan, Snapshot, Target


class Asked(NamedTuple):
    """What a user of `gesso ema` says, as typed."""

    sigma_rels: Sequence[float] = ()
    halflives: Sequence[str] = ()
    tensors: Sequence[str] = ()
    nimg: str | None = None
    files: Sequence[str] = ()
    batch_size: int | None = None
    decay: float | None = None


def average(folder: Path, asked: Asked, out: Path | None, beside: Mapping[str, object]) -> list[str]:
    """Write each length that is asked for; returns what to tell the user. Raises UsageError for what cannot be made.

    beside: what is said and is for --sweep alone.
    """
    if idle := [name for name, value in beside.items() if value]:
        raise UsageError(f"{', '.join(idle)} has no effect without --sweep LOW:HIGH:COUNT")
    targets = _targets(asked, _rampup(folder))
    how = snapshot.plan(_available(folder, asked), targets, count(asked.nimg, "--nimg") if asked.nimg else None)
    paths = snapshot.make(how, out or folder / "ema", "cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"{target} at image {how.nimg:,}: {path}  ({how.fit(target)})"
        for target, path in zip(targets, paths, strict=True)
    ]
    return [*lines, *_poor(how), "next:", _next(folder, targets[-1], paths[-1])]


def _rampup(folder: Path) -> float | None:
    """Return the ramp-up of a run's traditional averages, which those made from it have too."""
    record = folder / "run.yaml"
    return config.read(record).ema.rampup if record.is_file() else None


def _targets(asked: Asked, rampup: float | None = None) -> list[Target]:
    halflives = [count(text, "--halflife", 1, ", such as 50M") for text in asked.halflives]
    rest: list[Profile] = [*map(length, asked.sigma_rels), *(Traditional(halflife, rampup) for halflife in halflives)]
    if not rest:
        raise UsageError("which average? say --sigma-rel or --halflife; or measure many by --sweep")
    groups = []
    for text in asked.tensors:
        glob, equals, value = text.rpartition("=")
        try:
            groups.append((glob, length(float(value))))
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(
                f"--tensors {text}: write GLOB=LENGTH such as 'blocks.0.*=0.05'; a GLOB alone is for --sweep"
            )
    return [PerTensor(profile, tuple(groups)) for profile in rest] if groups else list(rest)


def length(sigma_rel: float) -> Power:
    """The profile of a relative length. Raises UsageError for one that has none."""
    if not 0 < sigma_rel < 12**-0.5:
        raise UsageError(f"--sigma-rel {sigma_rel}: an EMA length lies between 0 and {12**-0.5:.4f}")
    return Power(sigma_rel)


def count(text: str, what: str, least: int = 0, such: str = "") -> int:
    """A number of images, also as 50k. Raises UsageError that names `what`."""
    value = parse_count(text)
    if not isinstance(value, int) or value < least:
        raise UsageError(
            f"{what} {text}: write a number of images{' above 0' if least else ''}{such or ', such as 100k'}"
        )
    return value


def _available(folder: Path, asked: Asked) -> list[Snapshot]:
    if not asked.files:
        if asked.decay or asked.batch_size:
            raise UsageError("--decay and --batch-size say what the files of another trainer are: name them by --files")
        return snapshot.stored(folder)
    profile: Profile = Raw()
    if asked.decay:
        if not (0 < asked.decay < 1 and asked.batch_size):
            raise UsageError(f"--decay {asked.decay:g} lies between 0 and 1 and needs --batch-size, images of a step")
        profile = Traditional(halflife_of(asked.decay, asked.batch_size))
    return foreign(folder, asked.files, asked.batch_size, profile)


def check_measurable(folder: Path, beside: Mapping[str, object]) -> None:
    """Raise UsageError for snapshots of which it is not known what they draw, and for what is said and is not for --sweep."""
    if idle := [name for name, value in beside.items() if value]:
        raise UsageError(f"{', '.join(idle)} has no effect beside --sweep")
    if folder.is_dir() and not (folder / "run.yaml").is_file():
        snapshot.stored(folder)
        raise UsageError(f"{folder} has snapshots and no run.yaml: any length can be made (--sigma-rel), none measured")


def _poor(how: Plan) -> list[str]:
    return [
        f"warning: what is stored hardly makes one of {profile}: {fit}; {_reach(how)}"
        for profile, fit in how.fits.items()
        if fit.error > POOR**2
    ]


def _reach(how: Plan) -> str:
    """Which lengths can be made."""
    times, kinds = [s.nimg for s in how.used], [s.profile for s in how.used]
    grid = [0.001 * 1.1**i for i in range(60) if 0.001 * 1.1**i < 0.288]
    good = [s for s in grid if ema.solve(times, kinds, how.nimg, Power(s)).error <= POOR**2]
    return f"lengths sigma_rel {good[0]:.2g} to {good[-1]:.2g} can be made" if good else "no length can"


def _next(folder: Path, target: Target, path: Path) -> str:
    if not (folder / "run.yaml").is_file() or isinstance(target, PerTensor):
        return f"  module.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    said = f"halflife={target.halflife}" if isinstance(target, Traditional) else f"sigma_rel={target.sigma_rel:g}"
    instead = config.read(folder / "run.yaml").sample.halflife and isinstance(target, Power)
    return f"  gesso sample {folder} sample.{said}{' sample.halflife=null' if instead else ''}"


def foreign(
    folder: Path, names: Sequence[str], batch_size: int | None = None, profile: Profile | None = None
) -> list[Snapshot]:
    """Weights that another trainer kept as safetensors files, by time; raw unless `profile` says what average they are.

    names: patterns such as step-{step}.safetensors or {nimg}/model.safetensors, relative to `folder`, or FILE=IMAGES.
    {step} times batch_size is the number of images seen, {nimg} is it; both as 50000 or 50k. Raises UsageError when a
    pattern fits nothing or is none, or when two files are of one time.
    """
    times: dict[Path, int] = {}
    for name in names:
        times |= _fitting(folder, name, batch_size)
    found = sorted((Snapshot(path, nimg, profile or Raw()) for path, nimg in times.items()), key=lambda s: s.nimg)
    for a, b in zip(found, found[1:], strict=False):
        if a.nimg == b.nimg:
            raise UsageError(f"{a.path} and {b.path} are both of image {a.nimg:,}: name one of them")
    return found


def _fitting(folder: Path, name: str, batch_size: int | None) -> dict[Path, int]:
    """Files and times of one pattern."""
    file, equals, text = name.rpartition("=")
    kinds = re.findall(r"\{(step|nimg)\}", name)
    if equals and not kinds:
        nimg = parse_count(text)
        if not isinstance(nimg, int) or not (folder / file).is_file():
            raise UsageError(f"--files {name}: write FILE=IMAGES, a file in {folder} and a number such as 50k")
        return {folder / file: nimg}
    if len(kinds) != 1:
        raise UsageError(
            f"--files {name}: say where the time stands, by {{nimg}} or {{step}}: step-{{step}}.safetensors"
        )
    if kinds == ["step"] and not batch_size:
        raise UsageError(f"--files {name}: steps become images by --batch-size")
    before, after = name.split(f"{{{kinds[0]}}}")
    pattern = re.compile(re.escape(before) + r"(\d+[kKmM]?)" + re.escape(after))
    paths = {path: pattern.fullmatch(path.relative_to(folder).as_posix()) for path in folder.rglob("*.safetensors")}
    unit = batch_size if kinds == ["step"] else 1
    found = {path: parse_count(match[1]) * unit for path, match in paths.items() if match}
    if not found:
        there = ", ".join(sorted(p.relative_to(folder).as_posix() for p in paths)[:3]) or "none"
        raise UsageError(f"--files {name} fits no safetensors file in {folder} (there: {there})")
    return found
