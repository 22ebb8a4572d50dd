"""Open init.source: weights to start from, with all that is known of their network."""

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
from gesso.interop.mapping import NOTE_ASSUMED_RESOLUTION, ImportedModel
from gesso.safetensors_io import read_metadata, read_tensors
from gesso.sampling import MAX_PROFILE_ERROR

TRANSFERABLE_DIFFERENCES = (
    "pos_embed", "pos_embed_base", "pos_embed_span", "pos_embed_max_size", "dropout", "mask_ratio", "context_dim",
    "text_projection", "pooled_mlp", "learned_variance",
)  # fmt: skip
"""Settings of a network that may differ from those of the source."""
CHECKPOINT_KEYS = ("ema", "state_dict", "model")
"""Keys of the weights in a PyTorch checkpoint, EMA weights first."""


class InitSource(NamedTuple):
    """Weights and their network.

    description: one line on their origin. resolution, pos_embed_base: height and width of x in training, and of the x
    whose grid positions refer to. process: the process they were trained under. run: None for weights of another
    project. record: fields of InitConfig to record.
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
    """Open the source that run.init names; recorded path, EMA length and nimg take precedence.

    Raises:
        UsageError: There is no source, it is another network than run.net (the message lists the settings), or of no
            known project.
        RunError: The source is damaged.
    """
    assert run.init.source is not None
    path, sigma_rel, nimg = parse_init_source(run.init.source)
    recorded = Path(run.init.path) if run.init.path else path
    path = recorded if recorded.exists() else path
    for name, given, recorded_value in (("sigma_rel", sigma_rel, run.init.sigma_rel), ("nimg", nimg, run.init.nimg)):
        if given is not None and recorded_value not in (None, given):
            raise UsageError(f"init.source={run.init.source}, but init.{name}={recorded_value}: say one of them")
    if not path.exists():
        raise UsageError(f"init.source={run.init.source}: there is no run folder or file {path}{_suggest_path(path)}")
    if path.is_dir():
        source = _from_run_folder(path, run, sigma_rel or run.init.sigma_rel, nimg or run.init.nimg)
    else:
        source = _from_file(path, run)
        if sigma_rel or nimg:
            raise UsageError(f"init.source={run.init.source}: {path.name} is one average at one time; leave @ out")
    _check_source(run, source)
    record = source.record | {"path": str(path.resolve()), "fingerprint": fingerprint(source.weights)}
    return source._replace(record=record | {"resolution": source.resolution * run.downsample_factor})


def parse_init_source(text: str) -> tuple[Path, float | None, int | None]:
    """Return path, EMA length and nimg of PATH[@0.1][@100k], in either order. Raises UsageError for other text."""
    path = text
    length: float | None = None
    nimg: int | None = None
    while "@" in path and not Path(path).exists():
        path, _, part = path.rpartition("@")
        value = parse_count(part)
        if not isinstance(value, int | float) or (value >= 1 and not isinstance(value, int)):
            raise UsageError(
                f"init.source={text}: @{part} is neither an EMA length (0.1) nor a number of images (100k)"
            )
        if (length if value < 1 else nimg) is not None:
            raise UsageError(f"init.source={text} says two {'EMA lengths' if value < 1 else 'times'}")
        if isinstance(value, int) and value >= 1:
            nimg = value
        elif 0 < value < 12**-0.5:
            length = value
        else:
            raise UsageError(f"init.source={text}: an EMA length lies between 0 and {12**-0.5:.4f}")
    return Path(path), length, nimg


def _suggest_path(path: Path) -> str:
    siblings = [str(p) for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
    return f"; {config.suggest(str(path), siblings[:20])}" if siblings else ""


def _from_run_folder(path: Path, run: RunConfig, sigma_rel: float | None, nimg: int | None) -> InitSource:
    there = snapshot.config_of(snapshot.list_snapshots(path)[-1])
    target = ema.sampling_profile(there.sample)
    if sigma_rel:
        target = ema.PowerProfile(sigma_rel)
    elif run.init.halflife:
        target = ema.TraditionalProfile(run.init.halflife, there.ema.rampup)
    weights, there, time, fits = snapshot.reconstruct_from_run(path, [target], nimg)
    poor = fits[0].squared_error > MAX_PROFILE_ERROR**2
    notes = [f"the stored averages hardly make one of {target}: {fits[0]}"] if poor else []
    return _from_run(f"{path} ({target}, image {time:,})", there, weights[0], target, time, run, notes)


def _from_run(
    description: str,
    source_run: RunConfig,
    weights: dict[str, Tensor],
    target: ema.Profile,
    nimg: int,
    run: RunConfig,
    notes: list[str],
) -> InitSource:
    if run.init.resolution not in (
        None,
        source_run.data.resolution // source_run.downsample_factor * run.downsample_factor,
    ):
        raise UsageError(
            f"init.resolution={run.init.resolution}, but {description} was trained at {source_run.data.resolution}: "
            "leave it out"
        )
    inputs = source_run.input_spec
    record: dict[str, float | None] = {"nimg": nimg, "sigma_rel": None, "halflife": None}
    if isinstance(target, ema.PowerProfile):
        record["sigma_rel"] = target.sigma_rel
    elif isinstance(target, ema.TraditionalProfile):
        record["halflife"] = target.halflife
    base = inputs.pos_embed_base or inputs.resolution
    return InitSource(
        description,
        source_run.net,
        inputs,
        weights,
        inputs.resolution,
        base,
        source_run.process,
        source_run,
        record,
        notes,
    )


def _from_file(path: Path, run: RunConfig) -> InitSource:
    if path.suffix == ".safetensors":
        if "gesso" in read_metadata(path):
            weights, there, stored = snapshot.read(path)
            return _from_run(f"{path} (image {stored.nimg:,})", there, weights, stored.profile, stored.nimg, run, [])
        state, notes = read_tensors(path), list[str]()
    else:
        state, notes = _load_torch_file(path)
    imported = _detect_format(path, state, run)
    notes_text = [f"{name}: {text}" for name, text in imported.notes.items() if name not in ("source", "resolution")]
    resolution = imported.inputs.resolution
    if imported.notes.get("resolution") == NOTE_ASSUMED_RESOLUTION:
        if run.init.resolution is None:
            raise UsageError(
                f"init.source={path}: its weights do not tell at what resolution they were trained: say it in pixels, "
                "such as "
                "init.resolution=256"
            )
    elif run.init.resolution not in (None, resolution * run.downsample_factor):
        raise UsageError(
            f"init.resolution={run.init.resolution}, but {path} was trained at {resolution * run.downsample_factor} "
            "pixels: leave it out"
        )
    called = f"{path} ({imported.notes['source']})"
    return InitSource(
        called,
        imported.cfg,
        imported.inputs,
        imported.weights,
        resolution,
        resolution,
        imported.process,
        None,
        {},
        [*notes, *notes_text],
    )


def _detect_format(path: Path, state: Mapping[str, Tensor], run: RunConfig) -> ImportedModel:
    heads = run.net.num_heads if isinstance(run.net, TransformerConfig) else None
    resolution = run.init.resolution and run.init.resolution // run.downsample_factor
    try:
        try:
            return interop.detect_format(state, None, resolution)
        except UsageError:  # where neither shapes nor a published size tell the heads, ours are taken
            if heads is None:
                raise
            return interop.detect_format(state, heads, resolution)
    except (UsageError, RunError) as error:
        raise type(error)(f"init.source={path}: {error}") from None


def _load_torch_file(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a PyTorch file that contains only data."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, zip and torch raise at a file that is damaged or carries code
        raise RunError(
            f"init.source={path} is damaged, no weight file, or carries code, which is not run "
            f"({type(error).__name__}); convert it to safetensors where you trust it"
        ) from None
    notes = []
    for name in CHECKPOINT_KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded, notes = loaded[name], [f"of the file's parts {name!r} was taken"]
            break
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise UsageError(f"init.source={path} holds no named weights")
    return tensors, notes


def _check_source(run: RunConfig, source: InitSource) -> None:
    """Raise UsageError if the network differs, RunError if its weights are incomplete or not finite."""
    target_fields, source_fields = (cfg.model_dump() for cfg in (run.net, source.net_config))
    differ = [
        k
        for k in target_fields | source_fields
        if k not in TRANSFERABLE_DIFFERENCES and target_fields.get(k) != source_fields.get(k)
    ]
    if target_fields["name"] != source_fields["name"]:
        differ = ["name"]
    if differ:
        settings, here = (
            " ".join(f"net.{k}={_format_value(v[k])}" for k in differ if k in v) for v in (source_fields, target_fields)
        )
        raise UsageError(f"init.source={run.init.source} is another network: {settings} there, {here} here")
    with torch.device("meta"):
        net = models.build_network(source.net_config, source.input_spec)
    if wrong := models.state_dict_mismatch(net, source.weights):
        raise RunError(f"{source.description} is not whole: {wrong}")
    bad = [k for k, v in source.weights.items() if not bool(v.isfinite().all())]
    if bad:
        raise RunError(f"{source.description} holds NaN or infinity in {', '.join(bad[:3])}")


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
