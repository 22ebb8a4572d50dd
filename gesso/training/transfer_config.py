"""What a change of data set or resolution settles in a run that starts from given weights (Berrada et al. Section 2.2).

Legend: k ratio of the latent resolutions, here over there; lambda guidance.
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

REPORTED_SETTINGS = ("process.", "semantic.kind", "semantic.encoder", "semantic.max_tokens", "semantic.padding", "control.", "latent.vae",
        "latent.convention", "data.mean", "data.std")  # fmt: skip
"""settings that change what weights are told, or what is made of their outputs"""


def apply_source_settings(run: RunConfig, source: InitSource) -> tuple[RunConfig, list[str]]:
    """The run with positions, noise, guidance and classes as the source has them, and what to say of them."""
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
        kept = getattr(run.init, name)
        if name != "path" and kept not in (None, value):
            if name == "fingerprint":
                kept, value = kept[:12], value[:12]
            raise UsageError(
                f"init.{name} was {str(kept)[:60]} when this run was first trained, and {source.description} has "
                f"{str(value)[:60]}: set init.{name}=null to start from what is there now"
            )
    tree["init"] |= record
    run = config.validate(tree)
    return run, [*lines, *_describe_differences(run, source)]


def _apply_positions(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """net.pos_embed_base and pos_embed_span: the grid that the source counts on, and that which fixes its distance."""
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
    """Return pos_embed_base and pos_embed_span in the units of x, None: those of a run from random weights.

    Raises UsageError where net.pos_embed cannot have positions such as init.pos_embed asks for.
    """
    new, old, how = run.net.pos_embed, source.net_config.pos_embed, run.init.pos_embed
    base, span, there = source.pos_embed_base, source.input_spec.pos_embed_span, source.resolution
    step_1 = old == "extrapolated" or (old != "resampled" and base == there and span is None)
    if k == 1 and new == old:
        return base, span
    if how == "resampled":
        if k != 1 and new == "extrapolated":
            raise UsageError(
                "net.pos_embed=extrapolated has one step per token on every grid, which init.pos_embed=resampled cannot be: "
                "set init.pos_embed=extrapolated or net.pos_embed=resampled"
            )
        if old == "resampled" and span not in (None, there):
            raise UsageError(
                f"{source.description} was itself moved by init.pos_embed=extrapolated, so that its grid ends between the steps "
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
        f"init.pos_embed=extrapolated keeps the step of the source's net.pos_embed={old}, which net.pos_embed={new} cannot: "
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
"""settings of a process that say what a network's inputs and outputs mean; the others say how it is trained and sampled"""


def _apply_source_process(run: RunConfig, source: InitSource, tree: dict[str, Any]) -> list[str]:
    """The process of another project's weights in the place of the run's, by init.process; a run's weights are the user's."""
    if source.run or run.init.process == "run":
        return []
    here, there = tree["process"], source.process.model_dump(mode="json")
    differ = [name for name in PARAMETERIZATION_SETTINGS if name in there and here.get(name) != there[name]]
    if not differ:
        return []
    kept = here if here["name"] == there["name"] else there | {"resolution_scale": here["resolution_scale"]}
    tree["process"] = kept | {name: there[name] for name in PARAMETERIZATION_SETTINGS if name in there}
    settings = " ".join(f"process.{name}={there[name]}" for name in differ)
    return [f"  process      {settings}, as the weights were trained (init.process=run keeps the run's own)"]


def _apply_resolution_scale(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """process.resolution_scale: that of the source, times k (Proposition 1)."""
    there = source.process.resolution_scale
    how, scale = run.init.noise_levels, there * (k if run.init.noise_levels == "scale" else 1)
    if run.process.resolution_scale not in (1, scale):
        raise UsageError(
            f"process.resolution_scale={run.process.resolution_scale:g}, but init.noise_levels={how} makes it {scale:g} ({there:g} in the source, "
            f"k = {k:g}): say process.resolution_scale={scale:g}, or leave it out"
        )
    tree["process"]["resolution_scale"] = scale
    return (
        [f"  noise        {how}, process.resolution_scale={scale:g}"]
        if k != 1 or scale != run.process.resolution_scale
        else []
    )


def _apply_guidance_base(run: RunConfig, source: InitSource, k: float, tree: dict[str, Any]) -> list[str]:
    """sample.guidance_base_resolution, by which lambda' = 1 + k (lambda - 1) (Proposition 2): where lambda is the source's own number."""
    cfg, there = run.sample, source.run.sample if source.run else None
    if k == 1 or cfg.guidance == 1:
        return []
    if cfg.guidance_base_resolution is None and there and there.guidance == cfg.guidance:
        tree["sample"]["guidance_base_resolution"] = there.guidance_base_resolution or source.run.data.resolution
        return [
            f"  guidance     {cfg.guidance:g} was the source's: sample.guidance_base_resolution={tree['sample']['guidance_base_resolution']}"
        ]
    return [
        f"  guidance     sample.guidance={cfg.guidance:g}, sample.guidance_base_resolution={cfg.guidance_base_resolution or 'null'} as set"
    ]


def _describe_differences(run: RunConfig, source: InitSource) -> list[str]:
    """What the weights are told otherwise than in the source."""
    here, there = run.net.model_dump(), source.net_config.model_dump()
    found = [
        (f"net.{name}", there[name], here[name]) for name in here if name not in ("pos_embed_base", "pos_embed_span")
    ]
    if source.run:
        told = [
            d
            for d in config.differences(source.run, run)
            if d[0].startswith(REPORTED_SETTINGS) and d[0] != "process.resolution_scale"
        ]
        if source.run.process.name != run.process.name:  # whose settings have no counterparts
            told = [d for d in told if d[0] == "process.name" or not d[0].startswith("process.")]
        found += told
    shown = [(path, _round(old), _round(new)) for path, old, new in found]
    found = [f"{path} {old} -> {new}" for path, old, new in shown if old != new]
    return [f"  changed      {', '.join(found)}"] if found else []


def _round(value: Any) -> Any:
    return [float(f"{v:.3g}") if isinstance(v, float) else v for v in value] if isinstance(value, list) else value


def restore_recorded_settings(run: RunConfig, recorded: RunConfig) -> RunConfig:
    """A run that goes on, with what its source settled when it began."""
    if run.init.source is None or run.init.source != recorded.init.source or run.net.name != recorded.net.name:
        return run
    tree, then = config.to_dict(run), config.to_dict(recorded)
    settled_there = [("init", name) for name in RECORDED_FIELDS] + [
        ("sample", "guidance_base_resolution"),
        ("process", "resolution_scale"),
    ]
    for block, name in [*settled_there, ("net", "pos_embed_base"), ("net", "pos_embed_span")]:
        if name in tree[block] and tree[block][name] in (None, 1):
            tree[block][name] = then[block].get(name)
    foreign = recorded.init.fingerprint and recorded.init.nimg is None
    if foreign and run.init.process == recorded.init.process == "source":
        old, new = tree["process"], then["process"]
        kept = old if old["name"] == new["name"] else new
        tree["process"] = kept | {name: new[name] for name in PARAMETERIZATION_SETTINGS if name in new}
    return config.validate(tree)


def class_mapping(run: RunConfig, source: InitSource) -> tuple[int | None, ...] | None:
    """The source's class of each class, None where it has none; None where either has no classes.

    Raises UsageError for a map that names classes which are not there, or leaves some out.
    """
    how, n, m = run.init.labels, run.input_spec.num_classes, source.input_spec.num_classes
    if not n or not m:
        if how is not None:
            raise UsageError(f"init.labels={how}: there are no classes {'here' if not n else 'in the source'}")
        return None
    names = list(run.data.class_names or ())
    theirs = list(source.run.data.class_names or ()) if source.run else []
    if how is None:
        how = "names" if names and theirs else "index"
    if how == "random":
        return (None,) * n
    if how == "index":
        return tuple(i if i < m else None for i in range(n))
    if how == "names":
        if not (names and theirs):
            raise UsageError(f"init.labels=names: the classes have no names {'here' if not names else 'in the source'}")
        place = {name: i for i, name in enumerate(theirs)}
        return tuple(place.get(name) for name in names)
    if not Path(how).is_file() and len(run.init.class_mapping or ()) == n:
        return run.init.class_mapping  # as they were when the file was there
    return _read_class_mapping(Path(how), names or [str(i) for i in range(n)], theirs or [str(i) for i in range(m)])


def _read_class_mapping(path: Path, target_names: list[str], source_names: list[str]) -> tuple[int | None, ...]:
    said = f"init.labels={path}"
    if not path.is_file():
        raise UsageError(f"{said}: neither names, index, random nor a file")
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{said} is neither JSON nor YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(mapping, dict):
        raise UsageError(f"{said} holds no mapping {{class here: class there}}")
    mapping = {str(k): None if v is None else str(v) for k, v in mapping.items()}
    for where, unknown, known in (
        ("here", [k for k in mapping if k not in target_names], target_names),
        ("in the source", [v for v in mapping.values() if v is not None and v not in source_names], source_names),
    ):
        if unknown:
            raise UsageError(f"{said}: no class {unknown[0]!r} {where}; {config.suggest(unknown[0], known[:50])}")
    if lacking := [name for name in target_names if name not in mapping]:
        raise UsageError(
            f"{said} leaves out {len(lacking)} of {len(target_names)} classes ({', '.join(lacking[:4])}); null is for those without "
            "counterpart"
        )
    return tuple(None if mapping[name] is None else source_names.index(mapping[name]) for name in target_names)
