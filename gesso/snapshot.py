"""Snapshots: averaged weights with their time, length and run. The only reader and writer of them."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gesso import config, ema, files, nets
from gesso.config import Run
from gesso.diffusion.denoiser import Denoiser, build
from gesso.ema import Fit, Power, Profile, Traditional
from gesso.errors import RunError, UsageError
from gesso.nets import mp

FORMAT = "gesso snapshot 1"
ROWS = "control rows"
"""Beside the weights: what `control_rows` returns."""


@dataclass(frozen=True)
class Snapshot:
    """One stored average: file, images seen, profile."""

    path: Path
    nimg: int
    profile: Profile


def write(
    path: Path, tensors: dict[str, Tensor], nimg: int, profile: Profile, run: Run, rows: Tensor | None = None
) -> None:
    """Store named weights in safetensors with all that is needed to use them alone.

    rows (M, n): control variables of training samples, from which sampling draws.
    """
    if rows is not None:
        tensors = tensors | {ROWS: rows}
    # asdict: the one key sigma_rel or halflife.
    description = {"format": FORMAT, "nimg": nimg, **asdict(profile), "run": config.as_tree(run)}
    with files.whole(path) as temporary:
        # One key: safetensors writes several in no fixed order, and equal runs shall give equal bytes.
        metadata = {"gesso": json.dumps(description)}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def path_for(folder: Path, nimg: int, profile: Profile) -> Path:
    name = f"ema{profile.sigma_rel:.4f}" if isinstance(profile, Power) else profile.key
    return folder / f"nimg{nimg:012d}-{name}.safetensors"


def _description(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("gesso", "{}"))
    except FileNotFoundError:
        raise UsageError(f"there is no snapshot {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or no safetensors file ({error}); remove it to do without it") from None
    if description.get("format") != FORMAT:
        raise UsageError(f"{path} was not written by gesso as a snapshot (its metadata lack '{FORMAT}')")
    return description


def _snapshot(path: Path, description: dict[str, Any]) -> Snapshot:
    halflife = description.get("halflife")
    return Snapshot(path, description["nimg"], Traditional(halflife) if halflife else Power(description["sigma_rel"]))


def stored(run_folder: Path) -> list[Snapshot]:
    """The snapshots of a run, by time, then name. Raises UsageError when there are none."""
    found = [_snapshot(path, _description(path)) for path in (run_folder / "snapshots").glob("*.safetensors")]
    if not found:
        raise UsageError(f"{run_folder} holds no snapshots yet: train it first, or name another run folder")
    return sorted(found, key=lambda s: (s.nimg, s.path.name))


def synthesize(
    run_folder: Path, profiles: Sequence[Profile], nimg: int | None = None
) -> tuple[list[dict[str, Tensor]], Run, int, list[Fit]]:
    """Weights for each profile at time nimg (the last, when None), from all snapshots up to then.

    Returns (weights per profile, run, nimg, fit per profile: its error, and the weight of the initial weights in
    it). What is stored comes out as stored. One pass over the files. Raises UsageError for a time before the first
    snapshot.
    """
    available = stored(run_folder)
    nimg = available[-1].nimg if nimg is None else nimg
    used = [s for s in available if s.nimg <= nimg]
    if not used:
        raise UsageError(f"no snapshot up to image {nimg:,}; the first of {run_folder} is at {available[0].nimg:,}")
    fits = [ema.solve([s.nimg for s in used], [s.profile for s in used], nimg, profile) for profile in profiles]
    weights: list[dict[str, Tensor]] = [{} for _ in profiles]
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(safe_open(s.path, "pt")) for s in used]
        for s, reader in zip(used, readers, strict=True):
            if set(reader.keys()) != set(readers[0].keys()):
                raise RunError(f"{s.path} holds other tensors than {used[0].path}: it belongs to another run")
        names = sorted(set(readers[0].keys()) - {ROWS})
        for name, values in ema.combine(readers, np.stack([fit.x for fit in fits], axis=1), names):
            for target, value in zip(weights, values, strict=True):
                target[name] = value
    run = config.validate(_description(used[-1].path)["run"])
    return weights, run, nimg, fits


def read(path: Path) -> tuple[dict[str, Tensor], Run, Snapshot]:
    """One file as it is."""
    description = _description(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys()) if name != ROWS}
    run = config.validate(description["run"])
    return tensors, run, _snapshot(path, description)


def control_rows(run_folder: Path) -> Tensor | None:
    """Control variables of training samples (M, n) float32 that the last snapshot carries; None without control."""
    with safe_open(stored(run_folder)[-1].path, "pt") as file:
        return file.get_tensor(ROWS) if ROWS in set(file.keys()) else None


def denoiser(weights: dict[str, Tensor], run: Run, device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser of `run` with these weights, put back on the sphere, for sampling: constants are folded into them.

    Raises RunError that lists what does not fit when the weights are of another network.
    """
    built = build(run)
    if wrong := nets.misfit(built.net, weights):
        raise RunError(f"weights of another network: {wrong}")
    built.net.load_state_dict(weights)
    mp.put_on_sphere(mp.sphere_weights(built.net))
    mp.fold(built.net)
    return built.to(device).eval().requires_grad_(False)
