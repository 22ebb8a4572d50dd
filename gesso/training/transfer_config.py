"""Settings that follow from initial weights of another data set or resolution (Berrada et al. Section 2.2).

Legend: k ratio of the latent resolutions, new over source; lambda guidance.
"""

from pathlib import Path
from typing import Any

import yaml

from gesso import config
from gesso.config import MDTConfig, MMDiTConfig, RunConfig
from gesso.config.initialization import RECORDED_FIELDS
from gesso.config.net import TransformerConfig
from gesso.errors import UsageError
from gesso.training.init_source import InitSource

REPORTED_SETTINGS = (
    "process.", "semantic.kind", "semantic.encoder", "semantic.max_tokens", "semantic.padding", "control.",
    "latent.vae", "latent.convention", "data.mean", "data.std",
)  # fmt: skip
"""Prefixes of settings that change the inputs of the network or the use of its outputs."""


def apply_source_settings(run: RunConfig, source: InitSource) -> tuple[RunConfig, list[str]]:
    """Return the run with positions, noise, guidance and classes that fit the source, and lines that report them."""
    tree = config.to_dict(run)
    process = _apply_source_process(run, source, tree)
    k = run.input_spec.resolution / source.resolution
    here, there = run.data.resolution, source.resolution * run.downsample_factor
    lines = [
        f"  resolution   {there} -> {here} pixels (k = {k:g})" if k != 1 else f"  resolution   {here} pixels, as there"
    ]
    lines += process
    lines += [
        *_apply_positions(run, source, k, tree),
        *_apply_resolution_scale(run, source, k, tree),
        *_apply_guidance_base(run, source, k, tree),
    ]
    if source.run and source.run.data.crop_scale != run.data.crop_scale:
        crops = " -> ".join(str(r.data.crop_scale or "whole") for r in (source.run, run))
        lines.append(f"  crops        data.crop_scale {crops}")
    record = source.record | {"class_mapping": class_mapping(run, source)}
    for name, value in record.items():
        recorded_value = getattr(run.init, name)
        if name != "path" and recorded_value not in (None, value):
            if name == "fingerprint":
                recorded_value, value = recorded_value[:12], value[:12]
            raise UsageError(
                f"init.{name} was {str(recorded_value)[:60]} when this run was first trained, and "
                f"{source.description} has "
                f"{str(value)[:60]}: set init.{name}=null to start from what is there now"
            )
    tree["init"] |= record
    run = config.validate(tree)
    return run, [*lines, *_describe_differences(run, source)]


def _apply_positions(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """Set net.pos_embed_base and net.pos_embed_span, the grids that define position and step; return lines."""
    net, how = run.net, run.init.pos_embed
    if not isinstance(net, TransformerConfig):
        return []
    if isinstance(net, MDTConfig) or (isinstance(net, MMDiTConfig) and net.pos_embed_max_size):
        return [f"  positions    {how} table"] if k != 1 else []
    at, span = (side and side * run.downsample_factor for side in _position_grids(run, source, k))
    at = None if at == run.data.resolution or net.pos_embed == "extrapolated" else at
    for name, value in (("pos_embed_base", at), ("pos_embed_span", span)):
        given = getattr(net, name)
        if given not in (None, value):
            raise UsageError(
                f"net.{name}={given}, but init.pos_embed={how} makes it {value or 'null'}: leave one of them out"
            )
        tree["net"][name] = value
    if k == 1 and at is None and span is None:
        return []
    word = "as there" if k == 1 else net.pos_embed if how == "resampled" else how
    spans = f", net.pos_embed_span={span}" if span else ""
    return [f"  positions    {word}, net.pos_embed_base={at or 'null'}{spans}"]


def _position_grids(run: RunConfig, source: InitSource, k: float) -> tuple[float | None, int | None]:
    """Return pos_embed_base and pos_embed_span in the units of x; None as for random weights.

    Raises:
        UsageError: net.pos_embed cannot represent the positions that init.pos_embed selects.
    """
    assert isinstance(run.net, TransformerConfig) and isinstance(source.net_config, TransformerConfig)
    new, old, how = run.net.pos_embed, source.net_config.pos_embed, run.init.pos_embed
    base, span, there = source.pos_embed_base, source.input_spec.pos_embed_span, source.resolution
    step_1 = old == "extrapolated" or (old != "resampled" and base == there and span is None)
    if k == 1 and new == old:
        return base, span
    if how == "resampled":
        if k != 1 and new == "extrapolated":
            raise UsageError(
                "net.pos_embed=extrapolated has one step per token on every grid, which init.pos_embed=resampled "
                "cannot be: "
                "set init.pos_embed=extrapolated or net.pos_embed=resampled"
            )
        if old == "resampled" and span not in (None, there):
            raise UsageError(
                f"{source.description} was itself moved by init.pos_embed=extrapolated, so that its grid ends between "
                "the steps "
                "of the one before: go on with init.pos_embed=extrapolated net.pos_embed=resampled"
            )
        if new == "interpolated":
            return base, there if old == "resampled" else span
        return base, None
    if new == "resampled" and old == "resampled":
        return base, span or there
    if new == "proportional" and (old == "proportional" or step_1):
        return int(base * k), None
    if new == "extrapolated" or (step_1 and new == "interpolated"):
        return None, None
    need = "extrapolated" if step_1 else old
    raise UsageError(
        f"init.pos_embed=extrapolated keeps the step of the source's net.pos_embed={old}, which net.pos_embed={new} "
        "cannot: "
        f"set net.pos_embed={need} or init.pos_embed=resampled"
    )


PARAMETERIZATION_SETTINGS = (
    "name",
    "prediction",
    "betas",
    "beta_start",
    "beta_end",
    "timesteps",
    "zero_terminal_snr",
    "sigma_data",
)
"""Settings of a process that define the network's inputs and outputs; the others affect training and sampling."""


def _apply_source_process(run: RunConfig, source: InitSource, tree: dict[str, Any]) -> list[str]:
    """Set the process to that of another project's weights, by init.process; return lines."""
    if source.run or run.init.process == "run":
        return []
    here, there = tree["process"], source.process.model_dump(mode="json")
    differ = [name for name in PARAMETERIZATION_SETTINGS if name in there and here.get(name) != there[name]]
    if not differ:
        return []
    selected = here if here["name"] == there["name"] else there | {"resolution_scale": here["resolution_scale"]}
    tree["process"] = selected | {name: there[name] for name in PARAMETERIZATION_SETTINGS if name in there}
    settings = " ".join(f"process.{name}={there[name]}" for name in differ)
    return [f"  process      {settings}, as the weights were trained (init.process=run keeps the run's own)"]


def _apply_resolution_scale(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """Set process.resolution_scale to k times that of the source (Proposition 1); return lines."""
    there = source.process.resolution_scale
    how, scale = run.init.noise_levels, there * (k if run.init.noise_levels == "scale" else 1)
    if run.process.resolution_scale not in (1, scale):
        raise UsageError(
            f"process.resolution_scale={run.process.resolution_scale:g}, but init.noise_levels={how} makes it "
            f"{scale:g} ({there:g} in the source, "
            f"k = {k:g}): say process.resolution_scale={scale:g}, or leave it out"
        )
    tree["process"]["resolution_scale"] = scale
    return (
        [f"  noise        {how}, process.resolution_scale={scale:g}"]
        if k != 1 or scale != run.process.resolution_scale
        else []
    )


def _apply_guidance_base(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """Set sample.guidance_base_resolution, by which lambda' = 1 + k (lambda - 1) (Proposition 2); return lines.

    It is set only if lambda is the guidance of the source.
    """
    cfg = run.sample
    if k == 1 or cfg.guidance == 1:
        return []
    if cfg.guidance_base_resolution is None and source.run and source.run.sample.guidance == cfg.guidance:
        base = source.run.sample.guidance_base_resolution or source.run.data.resolution
        tree["sample"]["guidance_base_resolution"] = base
        return [f"  guidance     {cfg.guidance:g} was the source's: sample.guidance_base_resolution={base}"]
    return [
        f"  guidance     sample.guidance={cfg.guidance:g}, "
        f"sample.guidance_base_resolution={cfg.guidance_base_resolution or 'null'} as set"
    ]


def _describe_differences(run: RunConfig, source: InitSource) -> list[str]:
    """Return a line on the settings of network and conditions that differ from the source."""
    here, there = run.net.model_dump(), source.net_config.model_dump()
    changes = [
        (f"net.{name}", there[name], here[name]) for name in here if name not in ("pos_embed_base", "pos_embed_span")
    ]
    if source.run:
        condition_changes = [
            d
            for d in config.differences(source.run, run)
            if d[0].startswith(REPORTED_SETTINGS) and d[0] != "process.resolution_scale"
        ]
        if source.run.process.name != run.process.name:  # the settings of another process have no counterparts
            condition_changes = [
                d for d in condition_changes if d[0] == "process.name" or not d[0].startswith("process.")
            ]
        changes += condition_changes
    shown = [(path, _round(old), _round(new)) for path, old, new in changes]
    texts = [f"{path} {old} -> {new}" for path, old, new in shown if old != new]
    return [f"  changed      {', '.join(texts)}"] if texts else []


def _round(value: Any) -> Any:
    return [float(f"{v:.3g}") if isinstance(v, float) else v for v in value] if isinstance(value, list) else value


def restore_recorded_settings(run: RunConfig, recorded: RunConfig) -> RunConfig:
    """Return a resumed run with the settings that its source determined when it began."""
    if run.init.source is None or run.init.source != recorded.init.source or run.net.name != recorded.net.name:
        return run
    tree, then = config.to_dict(run), config.to_dict(recorded)
    recorded_paths = [("init", name) for name in RECORDED_FIELDS] + [
        ("sample", "guidance_base_resolution"),
        ("process", "resolution_scale"),
    ]
    for block, name in [*recorded_paths, ("net", "pos_embed_base"), ("net", "pos_embed_span")]:
        if name in tree[block] and tree[block][name] in (None, 1):
            tree[block][name] = then[block].get(name)
    foreign = recorded.init.fingerprint and recorded.init.nimg is None
    if foreign and run.init.process == recorded.init.process == "source":
        old, new = tree["process"], then["process"]
        selected = old if old["name"] == new["name"] else new
        tree["process"] = selected | {name: new[name] for name in PARAMETERIZATION_SETTINGS if name in new}
    return config.validate(tree)


def class_mapping(run: RunConfig, source: InitSource) -> tuple[int | None, ...] | None:
    """Return the source class of each class, None without counterpart; None if either has no classes.

    Raises:
        UsageError: A mapping names unknown classes or omits some.
    """
    how, n, m = run.init.labels, run.input_spec.num_classes, source.input_spec.num_classes
    if not n or not m:
        if how is not None:
            raise UsageError(f"init.labels={how}: there are no classes {'here' if not n else 'in the source'}")
        return None
    names = list(run.data.class_names or ())
    source_names = list(source.run.data.class_names or ()) if source.run else []
    if how is None:
        how = "names" if names and source_names else "index"
    if how == "random":
        return (None,) * n
    if how == "index":
        return tuple(i if i < m else None for i in range(n))
    if how == "names":
        if not (names and source_names):
            raise UsageError(f"init.labels=names: the classes have no names {'here' if not names else 'in the source'}")
        place = {name: i for i, name in enumerate(source_names)}
        return tuple(place.get(name) for name in names)
    if not Path(how).is_file() and len(run.init.class_mapping or ()) == n:
        return run.init.class_mapping  # as they were when the file was there
    return _read_class_mapping(
        Path(how), names or [str(i) for i in range(n)], source_names or [str(i) for i in range(m)]
    )


def _read_class_mapping(path: Path, target_names: list[str], source_names: list[str]) -> tuple[int | None, ...]:
    prefix = f"init.labels={path}"
    if not path.is_file():
        raise UsageError(f"{prefix}: neither names, index, random nor a file")
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{prefix} is neither JSON nor YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(mapping, dict):
        raise UsageError(f"{prefix} holds no mapping {{class here: class there}}")
    mapping = {str(k): None if v is None else str(v) for k, v in mapping.items()}
    for where, unknown, known in (
        ("here", [k for k in mapping if k not in target_names], target_names),
        ("in the source", [v for v in mapping.values() if v is not None and v not in source_names], source_names),
    ):
        if unknown:
            raise UsageError(f"{prefix}: no class {unknown[0]!r} {where}; {config.suggest(unknown[0], known[:50])}")
    if lacking := [name for name in target_names if name not in mapping]:
        raise UsageError(
            f"{prefix} leaves out {len(lacking)} of {len(target_names)} classes ({', '.join(lacking[:4])}); null is "
            "for those without "
            "counterpart"
        )
    return tuple(None if mapping[name] is None else source_names.index(mapping[name]) for name in target_names)
