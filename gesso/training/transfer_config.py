"""Settings that follow from initial weights of another data set or resolution (Berrada et al. Section 2.2).

Legend: k ratio of the latent resolutions, new over source; lambda guidance.
"""

import unicodedata
from pathlib import Path
from typing import Any

from gesso import config
from gesso.config import MDTConfig, MMDiTConfig, RunConfig
from gesso.config.initialization import RECORDED_FIELDS
from gesso.config.net import TransformerConfig
from gesso.config.yaml_files import load_yaml
from gesso.errors import UsageError
from gesso.training.init_source import InitSource

REPORTED_SETTINGS = (
    "process.", "semantic.kind", "semantic.encoder", "semantic.max_tokens", "semantic.padding", "control.",
    "latent.vae", "latent.convention", "data.mean", "data.std",
)  # fmt: skip
"""Prefixes of settings that change the inputs of the network or the use of its outputs."""
PARAMETERIZATION_SETTINGS = (
    "name", "prediction", "betas", "beta_start", "beta_end", "timesteps", "zero_terminal_snr", "sigma_data",
)  # fmt: skip
"""Settings of a process that define the network's inputs and outputs; the others affect training and sampling."""


def apply_source_settings(run: RunConfig, source: InitSource) -> tuple[RunConfig, list[str]]:
    """Return the run with positions, noise, guidance and classes that fit the source, and lines that report them.

    Raises:
        UsageError: A setting contradicts the source, or the source changed since the run was first trained.
    """
    tree = config.to_dict(run)
    process_lines = _apply_source_process(run, source, tree)
    k = run.input_spec.resolution / source.resolution
    resolution, source_resolution = run.data.resolution, source.resolution * run.downsample_factor
    lines = [
        f"  resolution   {source_resolution} -> {resolution} pixels (k = {k:g})"
        if k != 1
        else f"  resolution   {resolution} pixels, as the source",
        *process_lines,
        *_apply_positions(run, source, k, tree),
        *_apply_resolution_scale(run, source, k, tree),
        *_apply_guidance_base(run, source, k, tree),
    ]
    if source.run and source.run.data.crop_scale != run.data.crop_scale:
        crops = " -> ".join(str(r.data.crop_scale or "null") for r in (source.run, run))
        lines.append(f"  crops        data.crop_scale {crops}")
    record = source.record | {"class_mapping": class_mapping(run, source)}
    for name, value in record.items():
        recorded_value = getattr(run.init, name)
        if name != "path" and recorded_value not in (None, value):
            if name == "fingerprint":
                recorded_value, value = recorded_value[:12], value[:12]
            raise UsageError(
                f"init.{name} was {str(recorded_value)[:60]} when this run was first trained, but "
                f"{source.description} has {str(value)[:60]}: set init.{name}=null to use the source as it is now"
            )
    tree["init"] |= record
    run = config.validate(tree)
    return run, [*lines, *_describe_differences(run, source)]


def _apply_positions(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """Set net.pos_embed_base and net.pos_embed_span, the grids that define position and step; return lines."""
    net, method = run.net, run.init.pos_embed
    if not isinstance(net, TransformerConfig):
        return []
    if isinstance(net, MDTConfig) or (isinstance(net, MMDiTConfig) and net.pos_embed_max_size):
        return [f"  positions    {method} table"] if k != 1 else []
    base, span = (side and side * run.downsample_factor for side in _position_grids(run, source, k))
    base = None if base == run.data.resolution or net.pos_embed == "extrapolated" else base
    for name, value in (("pos_embed_base", base), ("pos_embed_span", span)):
        configured = getattr(net, name)
        if configured not in (None, value):
            raise UsageError(
                f"net.{name}={configured}, but init.pos_embed={method} requires {value or 'null'}: remove one of them"
            )
        tree["net"][name] = value
    if k == 1 and base is None and span is None:
        return []
    text = "as the source" if k == 1 else net.pos_embed if method == "resampled" else method
    span_text = f", net.pos_embed_span={span}" if span else ""
    return [f"  positions    {text}, net.pos_embed_base={base or 'null'}{span_text}"]


def _position_grids(run: RunConfig, source: InitSource, k: float) -> tuple[float | None, int | None]:
    """Return pos_embed_base and pos_embed_span in the units of x; None as for random weights.

    Raises:
        UsageError: net.pos_embed cannot represent the positions that init.pos_embed selects.
    """
    assert isinstance(run.net, TransformerConfig) and isinstance(source.net_config, TransformerConfig)
    new, old, method = run.net.pos_embed, source.net_config.pos_embed, run.init.pos_embed
    base, span, source_side = source.pos_embed_base, source.input_spec.pos_embed_span, source.resolution
    has_unit_spacing = old == "extrapolated" or (old != "resampled" and base == source_side and span is None)
    if k == 1 and new == old:
        return base, span
    if method == "resampled":
        if k != 1 and new == "extrapolated":
            raise UsageError(
                "net.pos_embed=extrapolated has the same spacing on every grid, so init.pos_embed=resampled cannot "
                "change it: set init.pos_embed=extrapolated or net.pos_embed=resampled"
            )
        if old == "resampled" and span not in (None, source_side):
            raise UsageError(
                f"{source.description} was itself trained with init.pos_embed=extrapolated, and its positions end "
                "between the positions of its own source: set init.pos_embed=extrapolated net.pos_embed=resampled"
            )
        if new == "interpolated":
            return base, source_side if old == "resampled" else span
        return base, None
    if new == "resampled" and old == "resampled":
        return base, span or source_side
    if new == "proportional" and (old == "proportional" or has_unit_spacing):
        return int(base * k), None
    if new == "extrapolated" or (has_unit_spacing and new == "interpolated"):
        return None, None
    raise UsageError(
        f"init.pos_embed=extrapolated needs the spacing of the source's net.pos_embed={old}, which "
        f"net.pos_embed={new} does not have: set net.pos_embed={'extrapolated' if has_unit_spacing else old} or "
        "init.pos_embed=resampled"
    )


def _apply_source_process(run: RunConfig, source: InitSource, tree: dict[str, Any]) -> list[str]:
    """Set the process to that of another project's weights if init.process=source; return lines."""
    if source.run or run.init.process == "run":
        return []
    new, old = tree["process"], source.process.model_dump(mode="json")
    differing = [name for name in PARAMETERIZATION_SETTINGS if name in old and new.get(name) != old[name]]
    if not differing:
        return []
    base = new if new["name"] == old["name"] else old | {"resolution_scale": new["resolution_scale"]}
    tree["process"] = base | {name: old[name] for name in PARAMETERIZATION_SETTINGS if name in old}
    settings = " ".join(f"process.{name}={old[name]}" for name in differing)
    return [f"  process      {settings}, as the weights were trained (init.process=run uses the run's settings)"]


def _apply_resolution_scale(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """Set process.resolution_scale to k times that of the source (Proposition 1); return lines."""
    method, source_scale, configured = (
        run.init.noise_levels,
        source.process.resolution_scale,
        run.process.resolution_scale,
    )
    scale = source_scale * k if method == "scale" else source_scale
    if configured not in (1, scale):
        raise UsageError(
            f"process.resolution_scale={configured:g}, but init.noise_levels={method} requires {scale:g} "
            f"({source_scale:g} in the source, k = {k:g}): set process.resolution_scale={scale:g}, or remove it"
        )
    tree["process"]["resolution_scale"] = scale
    if k == 1 and scale == configured:
        return []
    return [f"  noise        {method}, process.resolution_scale={scale:g}"]


def _apply_guidance_base(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """Set sample.guidance_base_resolution, which makes lambda' = 1 + k (lambda - 1) (Proposition 2); return lines.

    It is set only if lambda, sample.guidance, is that of the source.
    """
    cfg = run.sample
    if k == 1 or cfg.guidance == 1:
        return []
    if cfg.guidance_base_resolution is None and source.run and source.run.sample.guidance == cfg.guidance:
        base = source.run.sample.guidance_base_resolution or source.run.data.resolution
        tree["sample"]["guidance_base_resolution"] = base
        return [f"  guidance     {cfg.guidance:g} as the source: sample.guidance_base_resolution={base}"]
    return [
        f"  guidance     sample.guidance={cfg.guidance:g}, "
        f"sample.guidance_base_resolution={cfg.guidance_base_resolution or 'null'}, as configured"
    ]


def _describe_differences(run: RunConfig, source: InitSource) -> list[str]:
    """Return a line on the settings of network and conditions that differ from the source."""
    new, old = run.net.model_dump(), source.net_config.model_dump()
    changes = [
        (f"net.{name}", old[name], new[name]) for name in new if name not in ("pos_embed_base", "pos_embed_span")
    ]
    if source.run:
        same_process = source.run.process.name == run.process.name
        changes += [
            (path, old_value, new_value)
            for path, old_value, new_value in config.differences(source.run, run)
            if path.startswith(REPORTED_SETTINGS)
            and path != "process.resolution_scale"
            # The settings of another process have no counterparts.
            and (same_process or path == "process.name" or not path.startswith("process."))
        ]
    rounded = [(path, _round(old_value), _round(new_value)) for path, old_value, new_value in changes]
    texts = [f"{path} {old_value} -> {new_value}" for path, old_value, new_value in rounded if old_value != new_value]
    return [f"  changed      {', '.join(texts)}"] if texts else []


def _round(value: Any) -> Any:
    """Return a list with its floats rounded to 3 digits; other values unchanged."""
    return [float(f"{v:.3g}") if isinstance(v, float) else v for v in value] if isinstance(value, list) else value


def restore_recorded_settings(run: RunConfig, recorded: RunConfig) -> RunConfig:
    """Return a resumed run with the settings that its source determined when the run was started."""
    if run.init.source is None or run.init.source != recorded.init.source or run.net.name != recorded.net.name:
        return run
    tree, recorded_tree = config.to_dict(run), config.to_dict(recorded)
    for section, name in [
        *(("init", name) for name in RECORDED_FIELDS),
        ("sample", "guidance_base_resolution"),
        ("process", "resolution_scale"),
        ("net", "pos_embed_base"),
        ("net", "pos_embed_span"),
    ]:
        if name in tree[section] and tree[section][name] in (None, 1):
            tree[section][name] = recorded_tree[section].get(name)
    is_foreign = recorded.init.fingerprint and recorded.init.nimg is None
    if is_foreign and run.init.process == recorded.init.process == "source":
        process, recorded_process = tree["process"], recorded_tree["process"]
        base = process if process["name"] == recorded_process["name"] else recorded_process
        tree["process"] = base | {n: recorded_process[n] for n in PARAMETERIZATION_SETTINGS if n in recorded_process}
    return config.validate(tree)


def class_mapping(run: RunConfig, source: InitSource) -> tuple[int | None, ...] | None:
    """Return the source class of each class, None without counterpart; None if either has no classes.

    Raises:
        UsageError: init.labels does not fit the classes, or its file names unknown classes or omits some.
    """
    labels, n, num_source = run.init.labels, run.input_spec.num_classes, source.input_spec.num_classes
    if not n or not num_source:
        if labels is not None:
            raise UsageError(f"init.labels={labels}: {'the source' if n else 'this run'} has no classes")
        return None
    names = list(run.data.class_names or ())
    source_names = list(source.run.data.class_names or ()) if source.run else []
    if labels is None:
        labels = "names" if names and source_names else "index"
    if labels == "random":
        return (None,) * n
    if labels == "index":
        return tuple(i if i < num_source else None for i in range(n))
    if labels == "names":
        if not (names and source_names):
            raise UsageError(f"init.labels=names: the classes of {'the source' if names else 'this run'} have no names")
        # Folders of macOS and Linux write one name in different Unicode normalizations.
        source_index = {unicodedata.normalize("NFC", name): i for i, name in enumerate(source_names)}
        return tuple(source_index.get(unicodedata.normalize("NFC", name)) for name in names)
    if not Path(labels).is_file() and len(run.init.class_mapping or ()) == n:
        return run.init.class_mapping  # recorded when the file still existed
    return _read_class_mapping(
        Path(labels), names or [str(i) for i in range(n)], source_names or [str(i) for i in range(num_source)]
    )


def _read_class_mapping(path: Path, names: list[str], source_names: list[str]) -> tuple[int | None, ...]:
    prefix = f"init.labels={path}"
    if not path.is_file():
        raise UsageError(f"{prefix} is neither names, index, random nor an existing file")
    try:
        mapping = load_yaml(path)  # JSON is YAML
    except (OSError, ValueError) as error:
        raise UsageError(f"{prefix} is neither JSON nor YAML: {error}") from None
    if not isinstance(mapping, dict):
        raise UsageError(f"{prefix} contains no mapping {{class: source class}}")
    mapping = {str(k): None if v is None else str(v) for k, v in mapping.items()}
    source_classes = [source_class for source_class in mapping.values() if source_class is not None]
    for owner, used, known in (("this run", list(mapping), names), ("the source", source_classes, source_names)):
        if unknown := [name for name in used if name not in known]:
            raise UsageError(f"{prefix}: {owner} has no class {unknown[0]!r}; {config.suggest(unknown[0], known[:50])}")
    if missing := [name for name in names if name not in mapping]:
        raise UsageError(
            f"{prefix} omits {len(missing)} of {len(names)} classes ({', '.join(missing[:4])}); write null for a "
            "class without counterpart"
        )
    return tuple(None if mapping[name] is None else source_names.index(mapping[name]) for name in names)
