"""Snapshots: EMA weights in safetensors files with their time, length and run."""

import contextlib
import functools
import hashlib
import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from gesso import config, ema, models
from gesso.config import RunConfig
from gesso.config.base import PositiveCount, SigmaRel
from gesso.diffusion.denoiser import Denoiser, build_denoiser
from gesso.ema import Fit, PerTensorProfile, PowerProfile, Profile, RawProfile, TraditionalProfile
from gesso.errors import RunError, UsageError
from gesso.models import mp
from gesso.safetensors_io import (
    DTYPE_NAMES,
    read_metadata,
    read_tensors,
    stream_writer,
    tensor_checksum,
    write_tensors,
)
from gesso.untrusted import parse_json

SNAPSHOT_FORMAT = "gesso snapshot 1"
CONTROL_ROWS = "control rows"
"""Name of the control variables of training samples in a file."""
_TRADITIONAL_FIELDS: TypeAdapter = TypeAdapter(tuple[PositiveCount, Annotated[float, Field(gt=0, lt=0.69)] | None])
"""Half-life and ramp-up ratio."""


@dataclass(frozen=True)
class Snapshot:
    """One stored EMA: its file, images seen and profile."""

    path: Path
    nimg: int
    profile: Profile
    config_dict: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """Settings of the run as plain values; {"trainer": name} or None for a run of another trainer."""
    buffers: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Names of the tensors that are copies, not averages; they are never combined."""
    checksums: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """CRC-32 of the tensors by name; empty in files of gesso before checksums."""

    def check(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the file. Raises RunError if it has changed since it was written."""
        expected = self.checksums.get(name)
        if expected is not None and tensor_checksum(tensor) != expected:
            raise RunError(
                f"{self.path} is damaged: the checksum of {name} does not match; delete the file, or copy it again"
            )
        return tensor


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
    """Write named weights to a file that can be used without its run folder.

    Args:
        path: The file.
        tensors: Weights by name.
        nimg: Number of images that the weights were trained on.
        profile: Profile of the EMA.
        run: Settings of the run, or the name of a run of another trainer.
        control_rows: (M, n) control variables of training samples, which sampling draws from.
        buffers: Names of tensors that are copies at this time, not averages.
    """
    if control_rows is not None:
        tensors = tensors | {CONTROL_ROWS: control_rows}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: tensor_checksum(tensors[name]) for name in sorted(tensors)}
    config_dict = {"trainer": run} if isinstance(run, str) else config.to_dict(run)
    write_tensors(path, tensors, _metadata(nimg, profile, config_dict, buffers, checksums))


def _metadata(
    nimg: int,
    target: TargetProfile,
    run: dict[str, Any] | None,
    buffers: Collection[str],
    checksums: Mapping[str, str],
) -> dict[str, str]:
    description: dict[str, Any] = {"format": SNAPSHOT_FORMAT, "nimg": nimg, **_profile_params(target.default)}
    if target.overrides:
        description["tensors"] = {glob: _profile_params(profile) for glob, profile in target.overrides}
    if buffers:
        description["buffers"] = sorted(buffers)
    # One key: safetensors writes several in no fixed order, and equal runs must give equal bytes.
    return {"gesso": json.dumps({**description, "run": run, "crc32": checksums})}


def _profile_params(profile: Profile) -> dict[str, float]:
    """Return the profile as sigma_rel or halflife, with rampup if it has one; empty for raw weights."""
    return {name: value for name, value in asdict(profile).items() if value is not None}


def snapshot_path(folder: Path, nimg: int, target: TargetProfile) -> Path:
    """Return the path of a snapshot."""
    profile = target.default
    name = f"ema{profile.sigma_rel:.4f}" if isinstance(profile, PowerProfile) else profile.key
    if target.overrides:
        name += f"-tensors-{hashlib.sha256(str(target).encode()).hexdigest()[:8]}"
    return folder / f"nimg{nimg:012d}-{name}.safetensors"


def read_header(path: Path) -> Snapshot:
    """Return the description of a snapshot without its weights.

    Raises:
        UsageError: The file does not exist or is not a snapshot of gesso.
        RunError: The file is damaged.
    """
    if not path.is_file():
        raise UsageError(f"snapshot {path} does not exist")
    try:
        header = parse_json(read_metadata(path).get("gesso", "{}"))
        if not isinstance(header, dict) or header.get("format") != SNAPSHOT_FORMAT:
            raise UsageError(f"{path} is not a snapshot of gesso: its metadata lack '{SNAPSHOT_FORMAT}'")
        return _parse_header(path, header)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"{path} is damaged: its metadata cannot be read ({reason}); delete it, or replace it") from None


def _parse_header(path: Path, header: dict[str, Any]) -> Snapshot:
    """Return the description in the metadata of a snapshot. Raises ValueError, KeyError or TypeError if it is wrong."""
    profile: Profile = RawProfile()
    if "sigma_rel" in header:
        profile = PowerProfile(TypeAdapter(SigmaRel).validate_python(header["sigma_rel"], strict=True))
    elif "halflife" in header:
        fields = _TRADITIONAL_FIELDS.validate_python((header["halflife"], header.get("rampup")), strict=False)
        profile = TraditionalProfile(*fields)
    nimg, run = header["nimg"], header["run"]
    buffers, checksums = header.get("buffers", []), header.get("crc32", {})
    if type(nimg) is not int or not 0 <= nimg <= 10**15 or not isinstance(run, dict | None):
        raise ValueError("nimg or run has another type")
    if not isinstance(buffers, list) or not isinstance(checksums, dict) or not all(isinstance(b, str) for b in buffers):
        raise ValueError("buffers or crc32 has another type")
    return Snapshot(path, nimg, profile, run, tuple(buffers), checksums)


def list_snapshots(run_folder: Path) -> list[Snapshot]:
    """Return the snapshots of a run folder or a folder of snapshots, by time and name.

    Raises:
        UsageError: The folder has no snapshots.
        RunError: A snapshot is damaged.
    """
    folder = run_folder / "snapshots" if (run_folder / "snapshots").is_dir() else run_folder
    snapshots = [read_header(path) for path in folder.glob("*.safetensors")]
    if not snapshots:
        raise UsageError(f"{run_folder} holds no snapshots yet: train it first, or name another run folder")
    return sorted(snapshots, key=lambda s: (s.nimg, s.path.name))


class ReconstructionPlan(NamedTuple):
    """Files to combine, their coefficients (`fits`, by profile), and the targets at time `nimg`."""

    sources: list[Snapshot]
    nimg: int
    targets: list[TargetProfile]
    fits: dict[Profile, Fit]

    def worst_fit(self, target: TargetProfile) -> Fit:
        """Return the fit with the largest error among the profiles of a target."""
        return max((self.fits[profile] for profile in target.profiles), key=lambda fit: fit.squared_error)

    def coefficients(self, name: str) -> np.ndarray:
        """Return the coefficients (files, targets) of one tensor."""
        return np.stack([self.fits[target.profile_for(name)].coefficients for target in self.targets], axis=1)


def plan_reconstruction(
    available: Sequence[Snapshot], targets: Sequence[TargetProfile], nimg: int | None = None
) -> ReconstructionPlan:
    """Plan the reconstruction of EMAs at time nimg (None: that of the last snapshot) from all snapshots up to it.

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
        raise UsageError("at image 0 there are no weights to average; set --nimg to a later image")
    _check_same_run(used)
    times, stored = [s.nimg for s in used], [s.profile for s in used]
    fits = {profile: ema.fit_profile(times, stored, nimg, profile) for t in targets for profile in t.profiles}
    return ReconstructionPlan(used, nimg, list(targets), fits)


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
"""Prefixes of the settings that all snapshots of a run share."""


def _check_same_run(snapshots: Sequence[Snapshot]) -> None:
    last = snapshots[-1]
    for s in snapshots:
        if s.config_dict == last.config_dict:
            continue
        if not (s.config_dict and last.config_dict and "net" in s.config_dict and "net" in last.config_dict):
            raise RunError(f"{s.path} and {last.path} belong to different runs")
        for name, value, expected in config.differences(*map(config.validate, (s.config_dict, last.config_dict))):
            if name.startswith(IDENTITY_SETTINGS):
                raise RunError(f"{s.path} belongs to another run than {last.path}: {name} is {value}, not {expected}")


def _open_files(plan: ReconstructionPlan) -> list[dict[str, Tensor]]:
    """Return the tensors of each file of a plan, mapped into memory.

    Raises:
        RunError: The tensors of two files differ in name or shape.
        UsageError: A glob of a target matches no tensor.
    """
    files = [read_tensors(s.path) for s in plan.sources]
    shapes = [{name: tuple(t.shape) for name, t in file.items() if name != CONTROL_ROWS} for file in files]
    last_path, last_shapes = plan.sources[-1].path, shapes[-1]
    for source, file_shapes in zip(plan.sources, shapes, strict=True):
        missing, unknown = sorted(last_shapes.keys() - file_shapes), sorted(file_shapes.keys() - last_shapes)
        if missing or unknown:
            raise RunError(
                f"{source.path} holds other tensors than {last_path}: missing {missing[:3]}, unknown {unknown[:3]}"
            )
        for name, shape in file_shapes.items():
            if shape != last_shapes[name]:
                raise RunError(f"{name} has shape {shape} in {source.path}, {last_shapes[name]} in {last_path}")
    for target in plan.targets:
        for glob, _ in target.overrides:
            if not any(fnmatchcase(name, glob) for name in last_shapes):
                raise UsageError(f"no tensor is named {glob}; there are: {', '.join(sorted(last_shapes)[:6])}, ...")
    return files


def _reconstruct_tensors(
    plan: ReconstructionPlan, files: Sequence[dict[str, Tensor]], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with its values for all targets (targets, *shape), in one pass over the files.

    Raises:
        RunError: A value is not finite.
    """
    buffers = set(plan.sources[-1].buffers)
    for name in sorted(files[-1].keys() - {CONTROL_ROWS}):
        stored = [file[name] for file in files]
        if name in buffers:
            tensor = plan.sources[-1].check(name, stored[-1])
            values = tensor.expand(len(plan.targets), *tensor.shape).clone()
        else:
            coefficients = plan.coefficients(name)
            used = [bool(row.any()) for row in coefficients]
            for source, tensor, is_used in zip(plan.sources, stored, used, strict=True):
                if is_used:  # a file with the coefficient 0 is not read
                    source.check(name, tensor)
            values = ema.linear_combination(stored, coefficients, device)
        # The sum is finite only if all values are, and takes a quarter of the time of checking each.
        dtype = torch.promote_types(values.dtype, torch.float32)
        if values.is_floating_point() and not values.sum(dtype=dtype).isfinite():
            bad = [s.path for s, tensor in zip(plan.sources, stored, strict=True) if not tensor.isfinite().all()]
            if bad:
                raise RunError(
                    f"{bad[0]} holds NaN or infinity in {name}: move it away and use the others, if training was sound "
                    "after it"
                )
            if not values.isfinite().all():
                targets = ", ".join(map(str, plan.targets))
                raise RunError(f"{name} at {targets} exceeds the range of {values.dtype}, though no file is at fault")
        yield name, values


def reconstruct_to_files(plan: ReconstructionPlan, folder: Path, device: torch.device | str = "cpu") -> list[Path]:
    """Write every target of a plan in one pass over the files, holding one tensor at a time; return the paths."""
    files, last = _open_files(plan), plan.sources[-1]
    paths = [snapshot_path(folder, plan.nimg, target) for target in plan.targets]
    with contextlib.ExitStack() as stack:
        writers = []
        for path, target in zip(paths, plan.targets, strict=True):
            metadata = functools.partial(_metadata, plan.nimg, target, last.config_dict, last.buffers)
            writers.append(stack.enter_context(stream_writer(path, files[-1], metadata)))
        if CONTROL_ROWS in files[-1]:
            for put in writers:
                put(CONTROL_ROWS, last.check(CONTROL_ROWS, files[-1][CONTROL_ROWS]))
        for name, values in _reconstruct_tensors(plan, files, device):
            for put, value in zip(writers, values, strict=True):
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
    """Return the weights of each profile at time nimg (None: that of the last snapshot), the run, nimg and the fits.

    A stored EMA is returned unchanged.

    Raises:
        UsageError: No snapshot covers the time, or another trainer wrote the snapshots.
    """
    plan = plan_reconstruction(list_snapshots(run_folder), profiles, nimg)
    run = config_of(plan.sources[-1])
    return reconstruct(plan), run, plan.nimg, [plan.worst_fit(profile) for profile in profiles]


def config_of(snapshot: Snapshot) -> RunConfig:
    """Return the settings of the run of a snapshot. Raises UsageError if another trainer wrote it."""
    if not snapshot.config_dict or "net" not in snapshot.config_dict:
        raise UsageError(
            f"{snapshot.path} was written by another trainer: it has weights, but no settings of a network"
        )
    return config.validate(snapshot.config_dict)


class PostHocEMA:
    """Track EMAs of any PyTorch module in any training loop; reconstruct EMAs of other lengths afterwards.

        ema = PostHocEMA(module)
        ema.update(nimg)  # after each optimizer step, or every few steps, with the number of images seen
        ema.save("runs/mine")  # a few dozen times during training
        weights = PostHocEMA.reconstruct("runs/mine", sigma_rel=0.07)
        module.load_state_dict(weights)

    The weights count as constant between updates. A sharded module (FSDP2) has sharded averages: all processes call
    `save`, and the first writes.

    Parameters are averaged. Buffers (statistics of a BatchNorm, constants) are copied at each update, as EDM2's classes
    do, and reconstructed weights have those of the last snapshot.

    Args:
        module: The module, whose state dict is tracked.
        sigma_rels: Relative lengths of the tracked EMAs; two of them allow any other length.
        halflives: Half-lives, in images, of further EMAs with a traditional profile.
        rampup: Maximum half-life as a share of the images seen.

    Raises:
        UsageError: No length is given; the module is wrapped by torch.compile or DistributedDataParallel, which change
            the names of tensors; or a tensor has a dtype that files cannot hold, such as complex numbers.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        halflives: Sequence[int] = (),
        rampup: float | None = None,
    ):
        if not sigma_rels and not halflives:
            raise UsageError("no EMA to track: pass a length, such as sigma_rels=(0.05, 0.1)")
        self.module, self.nimg, self.run_id = module, 0, secrets.token_hex(8)
        profiles: list[Profile] = [
            *map(PowerProfile, sigma_rels),
            *(TraditionalProfile(halflife, rampup) for halflife in halflives),
        ]
        tensors = module.state_dict()
        _check_trackable(module, tensors)
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self.tracker = ema.Tracker(tensors, profiles, copied_names=tensors.keys() - parameters)

    def update(self, nimg: int) -> None:
        """Update the averages to nimg images seen. Raises UsageError unless nimg increases."""
        if not nimg > self.nimg:
            raise UsageError(f"update({nimg}): the last update was at image {self.nimg:,}; pass a larger number")
        tensors = self.module.state_dict()
        if tensors.keys() != self.tracker.tensors.keys():
            changed = sorted(tensors.keys() ^ self.tracker.tensors.keys())
            raise UsageError(f"the module has other tensors than at construction ({', '.join(changed[:3])})")
        self.tracker.rebind(tensors)  # the module may have been moved to another device
        self.tracker.update(self.nimg, nimg)
        self.nimg = nimg

    def save(self, folder: str | Path) -> list[Path]:
        """Write a snapshot of each EMA to FOLDER/snapshots; return the paths.

        Raises:
            UsageError: There was no update yet, or the folder contains snapshots of another run.
        """
        if not self.nimg:
            raise UsageError("no update yet: call update(nimg) before save")
        for path in (Path(folder) / "snapshots").glob("*.safetensors"):
            if read_header(path).config_dict != {"trainer": self.run_id}:
                raise UsageError(
                    f"{folder} holds snapshots of another run, such as {path.name}: choose another folder, or continue "
                    "that run with load_state_dict(its state_dict)"
                )
            break  # all files of a folder belong to one run
        paths = [snapshot_path(Path(folder) / "snapshots", self.nimg, profile) for profile in self.tracker.averages]
        for path, (profile, average) in zip(paths, self.tracker.averages.items(), strict=True):
            tensors = {name: ema.full_tensor(tensor) for name, tensor in average.items()}
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                write(path, tensors, self.nimg, profile, self.run_id, buffers=self.tracker.copied_names)
        return paths

    @staticmethod
    def reconstruct(folder: str | Path, sigma_rel: float, nimg: int | None = None) -> dict[str, Tensor]:
        """Return the named weights of an EMA of any length at time nimg (None: that of the last snapshot)."""
        return reconstruct(plan_reconstruction(list_snapshots(Path(folder)), [PowerProfile(sigma_rel)], nimg))[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, from which a resumed training continues."""
        averages = {profile.key: dict(average) for profile, average in self.tracker.averages.items()}
        return {"nimg": self.nimg, "name": self.run_id, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state. Raises UsageError if it has other EMAs or tensors."""
        tracked = {profile.key: average for profile, average in self.tracker.averages.items()}
        stored = state["averages"]
        if {k: set(v) for k, v in tracked.items()} != {k: set(v) for k, v in stored.items()}:
            raise UsageError(
                f"the state holds EMAs {sorted(stored)} of other tensors or lengths than {sorted(tracked)}; "
                "construct PostHocEMA with the module and lengths of the state"
            )
        for key, average in tracked.items():
            for name, tensor in average.items():
                tensor.copy_(stored[key][name])
        self.nimg, self.run_id = state["nimg"], state["name"]


def _check_trackable(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise UsageError for a module whose snapshots could not be loaded later."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise UsageError("the module is wrapped by DistributedDataParallel, which prefixes names: pass ddp.module")
    for name, tensor in tensors.items():
        if "_orig_mod." in name:
            raise UsageError(
                f"{name}: the names of a compiled module do not fit the module itself. Pass the module that was "
                "compiled (compiled._orig_mod), or compile in place with module.compile()"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise UsageError(
                f"{name} is {tensor.dtype}, which snapshots cannot hold: register the buffer with persistent=False, or "
                "store it as real numbers (torch.view_as_real)"
            )


def read(path: Path) -> tuple[dict[str, Tensor], RunConfig, Snapshot]:
    """Return the weights, the settings of the run and the description of a snapshot; errors as for `read_header`."""
    snapshot = read_header(path)
    tensors = {name: snapshot.check(name, tensor) for name, tensor in read_tensors(path).items()}
    tensors.pop(CONTROL_ROWS, None)
    return tensors, config_of(snapshot), snapshot


def weights_digest(path: Path, max_bytes: int = 2**20) -> str:
    """Return a hash of the first tensors of a snapshot, by name, which tells trainings apart without reading it all."""
    digest, tensors, num_bytes = hashlib.sha256(), read_tensors(path), 0
    for name in sorted(tensors):
        data = tensors[name].reshape(-1)[:max_bytes].contiguous().view(torch.uint8).numpy()
        digest.update(name.encode())
        digest.update(data.tobytes())
        num_bytes += data.size
        if num_bytes >= max_bytes:
            break
    return digest.hexdigest()[:16]


def load_control_rows(run_folder: Path) -> Tensor | None:
    """Return the control variables (M, n) float32 of training samples in the last snapshot; None without control."""
    last = list_snapshots(run_folder)[-1]
    rows = read_tensors(last.path).get(CONTROL_ROWS)
    return None if rows is None else last.check(CONTROL_ROWS, rows)


def denoiser_from_weights(weights: dict[str, Tensor], run: RunConfig, device: torch.device | str = "cpu") -> Denoiser:
    """Return the denoiser of a run with these weights, for sampling: normalized, with constant gains folded into them.

    Raises:
        RunError: The weights are of another network; the message lists the mismatches.
    """
    built = build_denoiser(run)
    if wrong := models.state_dict_mismatch(built.net, weights):
        raise RunError(f"the weights belong to another network: {wrong}")
    built.net.load_state_dict(weights)
    mp.normalize_weights_(mp.sphere_weights(built.net))
    mp.fold_gains_(built.net)
    return built.to(device).eval().requires_grad_(False)
