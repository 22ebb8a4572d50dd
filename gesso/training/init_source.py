"""Open init.source: the weights to start from, with the settings of their network and training."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gesso import config, ema, interop, models, snapshot
from gesso.config import InputSpec, NetConfig, RunConfig
from gesso.config.base import parse_count
from gesso.config.net import TransformerConfig
from gesso.config.process import ProcessConfig
from gesso.errors import RunError, UsageError
from gesso.hub import fetch_run
from gesso.interop.files import read_state
from gesso.interop.mapping import NOTE_ASSUMED_RESOLUTION, ImportedModel
from gesso.safetensors_io import read_metadata
from gesso.sampling import MAX_PROFILE_ERROR

TRANSFERABLE_DIFFERENCES = (
    "pos_embed", "pos_embed_base", "pos_embed_span", "pos_embed_max_size", "dropout", "mask_ratio", "context_dim",
    "text_projection", "pooled_mlp", "learned_variance",
)  # fmt: skip
"""Settings of a network that may differ from those of the source."""


class InitSource(NamedTuple):
    """Weights and the settings of their network and training.

    Attributes:
        description: Origin of the weights, in one line.
        net_config: Settings of the network.
        input_spec: Inputs of the network.
        weights: Tensors by name.
        resolution: Height and width of x in training.
        pos_embed_base: Height and width of the x whose grid the positions refer to.
        process: Process of the training.
        run: Settings of the run; None for weights of another project.
        record: Fields of InitConfig to record.
        notes: Lines for the report.
    """

    description: str
    net_config: NetConfig
    input_spec: InputSpec
    weights: Mapping[str, Tensor]
    resolution: int
    pos_embed_base: int
    process: ProcessConfig
    run: RunConfig | None
    record: dict[str, Any]
    notes: list[str]


def open_init_source(run: RunConfig) -> InitSource:
    """Open the source of run.init; recorded path, EMA length and nimg take precedence over those of init.source.

    Raises:
        UsageError: The source does not exist, has another network than run.net (the message lists the settings), or an
            unknown format.
        RunError: The source is damaged.
    """
    assert run.init.source is not None
    path, sigma_rel, nimg = parse_init_source(run.init.source)
    recorded_path = Path(run.init.path) if run.init.path else path
    path = recorded_path if recorded_path.exists() else path
    for name, value, recorded_value in (("sigma_rel", sigma_rel, run.init.sigma_rel), ("nimg", nimg, run.init.nimg)):
        if value is not None and recorded_value not in (None, value):
            raise UsageError(f"init.source={run.init.source}, but init.{name}={recorded_value}: remove one of them")
    if not path.exists():
        raise UsageError(f"init.source={run.init.source}: no such run folder or file: {path}{_suggest_path(path)}")
    if path.is_dir():
        source = _from_run_folder(path, run, sigma_rel or run.init.sigma_rel, nimg or run.init.nimg)
    else:
        source = _from_file(path, run)
        if sigma_rel or nimg:
            raise UsageError(
                f"init.source={run.init.source}: {path.name} has the weights of one EMA at one time; remove the @"
            )
    _check_source(run, source)
    record = source.record | {"path": str(path.resolve()), "fingerprint": fingerprint(source.weights)}
    return source._replace(record=record | {"resolution": source.resolution * run.downsample_factor})


def parse_init_source(text: str) -> tuple[Path, float | None, int | None]:
    """Return path, EMA length and nimg of PATH[@0.1][@100k], in either order. Raises UsageError for other text.

    PATH may be hub:OWNER/NAME[@REVISION], where the revision is not a number.
    """
    path = text
    sigma_rel: float | None = None
    nimg: int | None = None
    while "@" in path and not Path(path).exists():
        path, _, part = path.rpartition("@")
        value = parse_count(part)
        if not isinstance(value, int | float) or (value >= 1 and not isinstance(value, int)):
            if path.startswith("hub:"):
                path = f"{path}@{part}"
                break
            raise UsageError(
                f"init.source={text}: @{part} is neither an EMA length (0.1) nor a number of images (100k)"
            )
        if (sigma_rel if value < 1 else nimg) is not None:
            raise UsageError(f"init.source={text} has two {'EMA lengths' if value < 1 else 'numbers of images'}")
        if isinstance(value, int) and value >= 1:
            nimg = value
        elif 0 < value < 12**-0.5:
            sigma_rel = value
        else:
            raise UsageError(f"init.source={text}: an EMA length must lie between 0 and {12**-0.5:.4f}")
    return fetch_run(path), sigma_rel, nimg


def _suggest_path(path: Path) -> str:
    siblings = [str(p) for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
    return f"; {config.suggest(str(path), siblings[:20])}" if siblings else ""


def _from_run_folder(path: Path, run: RunConfig, sigma_rel: float | None, nimg: int | None) -> InitSource:
    source_run = snapshot.config_of(snapshot.list_snapshots(path)[-1])
    target = ema.sampling_profile(source_run.sample)
    if sigma_rel:
        target = ema.PowerProfile(sigma_rel)
    elif run.init.halflife:
        target = ema.TraditionalProfile(run.init.halflife, source_run.ema.rampup)
    weights, source_run, nimg, fits = snapshot.reconstruct_from_run(path, [target], nimg)
    is_inaccurate = fits[0].squared_error > MAX_PROFILE_ERROR**2
    notes = [f"the snapshots cannot reconstruct {target} accurately: {fits[0]}"] if is_inaccurate else []
    return _from_run(f"{path} ({target}, image {nimg:,})", source_run, weights[0], target, nimg, run, notes)


def _from_run(
    description: str,
    source_run: RunConfig,
    weights: dict[str, Tensor],
    target: ema.Profile,
    nimg: int,
    run: RunConfig,
    notes: list[str],
) -> InitSource:
    resolution = source_run.data.resolution // source_run.downsample_factor * run.downsample_factor
    if run.init.resolution not in (None, resolution):
        raise UsageError(
            f"init.resolution={run.init.resolution}, but {description} was trained at {source_run.data.resolution}: "
            "remove init.resolution"
        )
    inputs = source_run.input_spec
    record: dict[str, float | None] = {"nimg": nimg, "sigma_rel": None, "halflife": None}
    if isinstance(target, ema.PowerProfile):
        record["sigma_rel"] = target.sigma_rel
    elif isinstance(target, ema.TraditionalProfile):
        record["halflife"] = target.halflife
    return InitSource(
        description=description,
        net_config=source_run.net,
        input_spec=inputs,
        weights=weights,
        resolution=inputs.resolution,
        pos_embed_base=inputs.pos_embed_base or inputs.resolution,
        process=source_run.process,
        run=source_run,
        record=record,
        notes=notes,
    )


def _from_file(path: Path, run: RunConfig) -> InitSource:
    notes: list[str] = []
    if path.suffix == ".safetensors" and "gesso" in read_metadata(path):
        weights, source_run, stored = snapshot.read(path)
        description = f"{path} (image {stored.nimg:,})"
        return _from_run(description, source_run, weights, stored.profile, stored.nimg, run, notes)
    state = read_state(path, f"init.source={path}")
    notes += state.notes.values()
    imported = _detect_format(path, state.tensors, run)
    resolution = imported.inputs.resolution
    if imported.notes.get("resolution") == NOTE_ASSUMED_RESOLUTION:
        if run.init.resolution is None:
            raise UsageError(
                f"init.source={path}: the file does not contain the resolution of its training: set it in pixels, such "
                "as init.resolution=256"
            )
    elif run.init.resolution not in (None, resolution * run.downsample_factor):
        raise UsageError(
            f"init.resolution={run.init.resolution}, but {path} was trained at {resolution * run.downsample_factor} "
            "pixels: remove init.resolution"
        )
    notes += [f"{name}: {text}" for name, text in imported.notes.items() if name not in ("source", "resolution")]
    return InitSource(
        description=f"{path} ({imported.notes['source']})",
        net_config=imported.cfg,
        input_spec=imported.inputs,
        weights=imported.weights,
        resolution=resolution,
        pos_embed_base=resolution,
        process=imported.process,
        run=None,
        record={},
        notes=notes,
    )


def _detect_format(path: Path, state: Mapping[str, Tensor], run: RunConfig) -> ImportedModel:
    num_heads = run.net.num_heads if isinstance(run.net, TransformerConfig) else None
    resolution = run.init.resolution and run.init.resolution // run.downsample_factor
    try:
        try:
            return interop.detect_format(state, None, resolution)
        except UsageError:  # shapes and published sizes may not determine the number of heads: assume that of the run
            if num_heads is None:
                raise
            return interop.detect_format(state, num_heads, resolution)
    except (UsageError, RunError) as error:
        raise type(error)(f"init.source={path}: {error}") from None


def _check_source(run: RunConfig, source: InitSource) -> None:
    """Raise UsageError if the network differs, RunError if its weights are incomplete or not finite."""
    run_fields, source_fields = run.net.model_dump(), source.net_config.model_dump()
    differing = [
        k
        for k in run_fields | source_fields
        if k not in TRANSFERABLE_DIFFERENCES and run_fields.get(k) != source_fields.get(k)
    ]
    if run_fields["name"] != source_fields["name"]:
        differing = ["name"]
    if differing:
        source_settings, run_settings = (
            " ".join(f"net.{k}={_format_value(fields[k])}" for k in differing if k in fields)
            for fields in (source_fields, run_fields)
        )
        raise UsageError(
            f"init.source={run.init.source} is another network: it has {source_settings}, this run {run_settings}"
        )
    with torch.device("meta"):
        net = models.build_network(source.net_config, source.input_spec)
    if mismatch := models.state_dict_mismatch(net, source.weights):
        raise RunError(f"{source.description} is incomplete or damaged: {mismatch}")
    nonfinite = [name for name, tensor in source.weights.items() if not bool(tensor.isfinite().all())]
    if nonfinite:
        raise RunError(f"{source.description} contains NaN or infinity in {', '.join(nonfinite[:3])}")


def _format_value(value: object) -> str:
    """Return a value as typed on the command line."""
    return json.dumps(value).replace(" ", "").strip('"')


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values of weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
