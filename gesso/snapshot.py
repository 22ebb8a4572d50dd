"""Snapshots: EMA weights in safetensors files with their time, length and run."""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso import atomic_io, config, ema, models
from gesso.config import RunConfig
from gesso.diffusion.denoiser import Denoiser, build_denoiser
from gesso.ema import Fit, PerTensorProfile, PowerProfile, Profile, RawProfile, TraditionalProfile
from gesso.ema.safetensors_io import SafetensorsFile, stream_writer
from gesso.errors import RunError, UsageError
from gesso.models import mp

SNAPSHOT_FORMAT = "gesso snapshot 1"
CONTROL_ROWS = "control rows"
"""Beside the weights: what `control_rows` returns."""


@dataclass(frozen=True)
class Snapshot:
    """One stored EMA: its file, images seen and profile."""

    path: Path
    nimg: int
    profile: Profile
    config_dict: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """settings of the run, as plain values; of another trainer {"trainer": a name of its own}, or None"""
    buffers: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """tensors that are no averages but copies, which are never combined"""


TargetProfile = Profile | PerTensorProfile


def write(
    path: Path,
    tensors: dict[str, Tensor],
    nimg: int,
    profile: Profile,
    run: RunConfig | str,
    control_rows: Tensor | None = None,
    buffers: Collection[str] = (),
) -> None:
    """Write named weights with all that is needed to use the file alone.

    Args:
        path: The file.
        tensors: Weights by name.
        nimg: Images seen.
        profile: Profile of the EMA.
        run: Settings of the run, or the name of a run of another trainer.
        control_rows: (M, n) control variables of training samples, which sampling draws from.
        buffers: Names of tensors that are copies at this time, not averages.
    """
    if control_rows is not None:
        tensors = tensors | {CONTROL_ROWS: control_rows}
    metadata = _metadata(nimg, profile, {"trainer": run} if isinstance(run, str) else config.to_dict(run), buffers)
    with atomic_io.atomic_file(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def _metadata(
    nimg: int, target: TargetProfile, run: dict[str, Any] | None, buffers: Collection[str] = ()
) -> dict[str, str]:
    rest = target.default if isinstance(target, PerTensorProfile) else target
    groups = (
        {"tensors": {g: _profile_params(p) for g, p in target.overrides}}
        if isinstance(target, PerTensorProfile)
        else {}
    )
    copied = {"buffers": sorted(buffers)} if buffers else {}
    description = {"format": SNAPSHOT_FORMAT, "nimg": nimg, **_profile_params(rest), **groups, **copied, "run": run}
    # One key: safetensors writes several in no fixed order, and equal runs shall give equal bytes.
    return {"gesso": json.dumps(description)}


def _profile_params(profile: Profile) -> dict[str, float]:
    """Return the profile as sigma_rel or halflife, with rampup if it has one; empty for raw weights."""
    return {name: value for name, value in asdict(profile).items() if value is not None}


def snapshot_path(folder: Path, nimg: int, target: TargetProfile) -> Path:
    """Return the path of a snapshot."""
    rest = target.default if isinstance(target, PerTensorProfile) else target
    name = f"ema{rest.sigma_rel:.4f}" if isinstance(rest, PowerProfile) else rest.key
    if isinstance(target, PerTensorProfile):
        name += f"-tensors-{hashlib.sha256(str(target).encode()).hexdigest()[:8]}"
    return folder / f"nimg{nimg:012d}-{name}.safetensors"


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("gesso", "{}"))
    except FileNotFoundError:
        raise UsageError(f"there is no snapshot {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or no safetensors file ({error}); remove it to do without it") from None
    if description.get("format") != SNAPSHOT_FORMAT:
        raise UsageError(f"{path} was not written by gesso as a snapshot (its metadata lack '{SNAPSHOT_FORMAT}')")
    return description


def _from_header(path: Path, header: dict[str, Any]) -> Snapshot:
    profile: Profile = RawProfile()
    if "sigma_rel" in header:
        profile = PowerProfile(header["sigma_rel"])
    elif "halflife" in header:
        profile = TraditionalProfile(header["halflife"], header.get("rampup"))
    return Snapshot(path, header["nimg"], profile, header["run"], tuple(header.get("buffers", ())))


def list_snapshots(run_folder: Path) -> list[Snapshot]:
    """Return the snapshots of a run folder or a folder of snapshots, by time and name. Raises UsageError if empty."""
    inside = run_folder / "snapshots"
    folder = inside if inside.is_dir() else run_folder
    snapshots = [_from_header(path, _read_header(path)) for path in folder.glob("*.safetensors")]
    if not snapshots:
        raise UsageError(f"{run_folder} holds no snapshots yet: train it first, or name another run folder")
    return sorted(snapshots, key=lambda s: (s.nimg, s.path.name))


class ReconstructionPlan(NamedTuple):
    """Files and coefficients that give the targets at one time. fits: by profile."""

    sources: list[Snapshot]
    nimg: int
    targets: list[TargetProfile]
    fits: dict[Profile, Fit]

    def worst_fit(self, target: TargetProfile) -> Fit:
        """Return the fit with the largest error among the profiles of a target."""
        profiles = target.profiles if isinstance(target, PerTensorProfile) else [target]
        return max((self.fits[profile] for profile in profiles), key=lambda fit: fit.squared_error)

    def coefficients(self, name: str) -> np.ndarray:
        """Return the coefficients (files, targets) of one tensor."""
        profiles = [t.profile_for(name) if isinstance(t, PerTensorProfile) else t for t in self.targets]
        return np.stack([self.fits[profile].coefficients for profile in profiles], axis=1)


def plan_reconstruction(
    available: Sequence[Snapshot], targets: Sequence[TargetProfile], nimg: int | None = None
) -> ReconstructionPlan:
    """Plan the reconstruction of EMAs at time nimg (None: the last) from all snapshots up to then.

    Raises:
        UsageError: No snapshot covers the time.
        RunError: The snapshots belong to different runs.
    """
    first, last = available[0], available[-1]
    nimg = last.nimg if nimg is None else nimg
    used = [s for s in available if s.nimg <= nimg]
    if not used:
        raise UsageError(f"no snapshot up to image {nimg:,}; the first is {first.path} at {first.nimg:,}")
    if nimg > last.nimg:
        raise UsageError(f"image {nimg:,} lies after the last snapshot, {last.path} at {last.nimg:,}")
    if nimg == 0:
        raise UsageError("at image 0 there is nothing to average yet")
    _check_same_run(used)
    profiles = [p for t in targets for p in (t.profiles if isinstance(t, PerTensorProfile) else [t])]
    times, kinds = [s.nimg for s in used], [s.profile for s in used]
    return ReconstructionPlan(used, nimg, list(targets), {p: ema.fit_profile(times, kinds, nimg, p) for p in profiles})


IDENTITY_SETTINGS = (
    "data.fingerprint",
    "data.num_validation",
    "latent.",
    "net.",
    "process.",
    "semantic.kind",
    "loss.",
    "optim.",
    "train.seed",
    "train.batch_size",
)
"""settings by which snapshots are told to be of one run"""


def _check_same_run(snapshots: Sequence[Snapshot]) -> None:
    last = snapshots[-1]
    for s in snapshots:
        if s.config_dict == last.config_dict:
            continue
        if not (s.config_dict and last.config_dict and "net" in s.config_dict and "net" in last.config_dict):
            raise RunError(f"{s.path} and {last.path} belong to different runs")
        for what, there, here in config.differences(config.validate(s.config_dict), config.validate(last.config_dict)):
            if what.startswith(IDENTITY_SETTINGS):
                raise RunError(f"{s.path} belongs to another run: {what} is {there} there, {here} in {last.path}")


def _open_files(plan: ReconstructionPlan) -> list[SafetensorsFile]:
    """Open the files. Raises RunError if their tensors do not match, UsageError for a glob without a match."""
    readers = [SafetensorsFile(s.path) for s in plan.sources]
    last = readers[-1]
    wanted = set(last.keys()) - {CONTROL_ROWS}
    for reader in readers:
        names = set(reader.keys()) - {CONTROL_ROWS}
        if names != wanted:
            lacks, more = sorted(wanted - names)[:3], sorted(names - wanted)[:3]
            raise RunError(f"{reader.path} holds other tensors than {last.path}: lacks {lacks}, has {more} beside")
        for name in names:
            there, here = tuple(reader.meta_tensor(name).shape), tuple(last.meta_tensor(name).shape)
            if there != here:
                raise RunError(f"{name} has shape {there} in {reader.path}, {here} in {last.path}")
    for target in plan.targets:
        for glob, _ in target.overrides if isinstance(target, PerTensorProfile) else ():
            if not any(fnmatchcase(name, glob) for name in wanted):
                raise UsageError(f"no tensor is named {glob}; there are: {', '.join(sorted(wanted)[:6])}, ...")
    return readers


def _reconstruct_tensors(
    plan: ReconstructionPlan, tensor_files: Sequence[SafetensorsFile], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with its values for all targets (targets, *shape), in one pass over the files.

    Raises:
        RunError: A value is not finite.
    """
    buffers = set(plan.sources[-1].buffers)
    for name in sorted(set(tensor_files[-1].keys()) - {CONTROL_ROWS}):
        if name in buffers:
            value = tensor_files[-1].read(name)
            values = value.expand(len(plan.targets), *value.shape).clone()
        else:
            values = ema.linear_combination(tensor_files, plan.coefficients(name), name, device)
        # A sum is finite only if all are, and is a quarter of the work of asking each.
        if (
            values.is_floating_point()
            and not values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()
        ):
            bad = next((r.path for r in tensor_files if not r.read(name).isfinite().all()), plan.sources[-1].path)
            raise RunError(f"{bad} holds NaN or infinity in {name}; remove it to do without it")
        yield name, values


def reconstruct_to_files(plan: ReconstructionPlan, folder: Path, device: torch.device | str = "cpu") -> list[Path]:
    """Write every target of a plan in one pass over the files, holding one tensor at a time; return the paths."""
    paths, last = [snapshot_path(folder, plan.nimg, target) for target in plan.targets], plan.sources[-1]
    readers = _open_files(plan)
    with contextlib.ExitStack() as stack:
        likes = {name: readers[-1].meta_tensor(name) for name in list(readers[-1].keys())}
        metadata = [_metadata(plan.nimg, target, last.config_dict, last.buffers) for target in plan.targets]
        puts = [stack.enter_context(stream_writer(p, likes, m)) for p, m in zip(paths, metadata, strict=True)]
        if CONTROL_ROWS in likes:
            for put in puts:
                put(CONTROL_ROWS, readers[-1].read(CONTROL_ROWS))
        for name, values in _reconstruct_tensors(plan, readers, device):
            for put, value in zip(puts, values, strict=True):
                put(name, value)
    return paths


def reconstruct(plan: ReconstructionPlan, device: torch.device | str = "cpu") -> list[dict[str, Tensor]]:
    """Return the named weights of each target of a plan."""
    weights: list[dict[str, Tensor]] = [{} for _ in plan.targets]
    for name, values in _reconstruct_tensors(plan, _open_files(plan), device):
        for target, value in zip(weights, values, strict=True):
            target[name] = value
    return weights


def reconstruct_from_run(
    run_folder: Path, profiles: Sequence[TargetProfile], nimg: int | None = None
) -> tuple[list[dict[str, Tensor]], RunConfig, int, list[Fit]]:
    """Return the weights of each profile at time nimg (None: the last), the run, nimg and the fits, in one pass.

    A stored EMA is returned unchanged.

    Raises:
        UsageError: No snapshot covers the time, or the snapshots belong to another trainer.
    """
    how = plan_reconstruction(list_snapshots(run_folder), profiles, nimg)
    run = config_of(how.sources[-1])
    return reconstruct(how), run, how.nimg, [how.worst_fit(profile) for profile in profiles]


def config_of(snapshot: Snapshot) -> RunConfig:
    """Return the run of a snapshot. Raises UsageError if another trainer wrote it."""
    if not snapshot.config_dict or "net" not in snapshot.config_dict:
        raise UsageError(f"{snapshot.path} was kept by another trainer: gesso knows its weights, not its network")
    return config.validate(snapshot.config_dict)


class PostHocEMA:
    """Track EMAs of any PyTorch module in any training loop; reconstruct EMAs of other lengths afterwards.

        ema = PostHocEMA(module)
        ema.update(nimg)                                # after an optimizer step, or every few: images seen so far
        ema.save("runs/mine")                           # now and then; a few dozen times in all
        weights = PostHocEMA.reconstruct("runs/mine", sigma_rel=0.07)
        module.load_state_dict(weights)

    The averages are those of the continuous-time profile with weights that are constant between updates. A sharded
    module (FSDP2) has sharded averages; all processes call `save`, and the first writes.

    Parameters are averaged. Buffers (statistics of a BatchNorm, constants) are copied at each update, as EDM2's classes
    do, and reconstructed weights have those of the last snapshot.

    Args:
        module: The module, whose state dict is tracked.
        sigma_rels: Relative lengths of the tracked EMAs; two of them allow any other length.
        halflives: Half-lives in images of traditional EMAs to track too.
        rampup: Maximum half-life as a share of the images seen.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        halflives: Sequence[int] = (),
        rampup: float | None = None,
    ):
        if not sigma_rels and not halflives:
            raise UsageError("no average to keep: name a length, such as sigma_rels=(0.05, 0.1)")
        self.module, self.nimg, self.run_id = module, 0, secrets.token_hex(8)
        profiles: list[Profile] = [
            *map(PowerProfile, sigma_rels),
            *(TraditionalProfile(halflife, rampup) for halflife in halflives),
        ]
        tensors = module.state_dict()
        learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self.tracker = ema.Tracker(tensors, profiles, copied_names=tensors.keys() - learned)

    def update(self, nimg: int) -> None:
        """Update the averages to nimg images seen. Raises UsageError unless nimg increases."""
        if not nimg > self.nimg:
            raise UsageError(f"averages stand at image {self.nimg:,}: they cannot be moved on to {nimg:,}")
        self.tracker.rebind(self.module.state_dict())  # a module may have been moved since
        self.tracker.update(self.nimg, nimg)
        self.nimg = nimg

    def save(self, folder: str | Path) -> list[Path]:
        """Write a snapshot of each EMA to FOLDER/snapshots; return paths. Raises UsageError before the first update."""
        if not self.nimg:
            raise UsageError("nothing is averaged yet: call update(nimg) before save")
        paths = [snapshot_path(Path(folder) / "snapshots", self.nimg, profile) for profile in self.tracker.averages]
        for path, (profile, average) in zip(paths, self.tracker.averages.items(), strict=True):
            tensors = {name: ema.full_tensor(tensor) for name, tensor in average.items()}
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                write(path, tensors, self.nimg, profile, self.run_id, buffers=self.tracker.copied_names)
        return paths

    @staticmethod
    def reconstruct(folder: str | Path, sigma_rel: float, nimg: int | None = None) -> dict[str, Tensor]:
        """Return named weights of any length, at any time up to the last snapshot (None)."""
        return reconstruct(plan_reconstruction(list_snapshots(Path(folder)), [PowerProfile(sigma_rel)], nimg))[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training needs."""
        averages = {profile.key: dict(average) for profile, average in self.tracker.averages.items()}
        return {"nimg": self.nimg, "name": self.run_id, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state. Raises UsageError if it has other averages or tensors."""
        tracked = {profile.key: average for profile, average in self.tracker.averages.items()}
        stored = state["averages"]
        if {k: set(v) for k, v in tracked.items()} != {k: set(v) for k, v in stored.items()}:
            raise UsageError(
                f"the state holds averages {sorted(stored)} of other tensors or lengths than {sorted(tracked)}"
            )
        for key, average in tracked.items():
            for name, tensor in average.items():
                tensor.copy_(stored[key][name])
        self.nimg, self.run_id = state["nimg"], state["name"]


def read(path: Path) -> tuple[dict[str, Tensor], RunConfig, Snapshot]:
    """Return the weights, run and header of one file."""
    snapshot = _from_header(path, _read_header(path))
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys()) if name != CONTROL_ROWS}
    return tensors, config_of(snapshot), snapshot


def load_control_rows(run_folder: Path) -> Tensor | None:
    """Return the control variables (M, n) float32 of training samples in the last snapshot; None without control."""
    with safe_open(list_snapshots(run_folder)[-1].path, "pt") as file:
        return file.get_tensor(CONTROL_ROWS) if CONTROL_ROWS in set(file.keys()) else None


def denoiser_from_weights(weights: dict[str, Tensor], run: RunConfig, device: torch.device | str = "cpu") -> Denoiser:
    """Return the denoiser of `run` with these weights, normalized, with constant gains folded into them, for sampling.

    Raises:
        RunError: The weights are of another network; the message lists the mismatches.
    """
    built = build_denoiser(run)
    if wrong := models.state_dict_mismatch(built.net, weights):
        raise RunError(f"weights of another network: {wrong}")
    built.net.load_state_dict(weights)
    mp.normalize_weights_(mp.sphere_weights(built.net))
    mp.fold_gains_(built.net)
    return built.to(device).eval().requires_grad_(False)
