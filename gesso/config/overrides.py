"""Merging of recipes, YAML files and `a.b=c` arguments into a validated run; YAML with help texts."""

import difflib
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from gesso import atomic_io, untrusted
from gesso.config.initialization import RECORDED_FIELDS
from gesso.config.net import NetConfig
from gesso.config.process import LINEAR_ENDS
from gesso.config.run import RunConfig
from gesso.config.yaml_files import load_yaml
from gesso.errors import UsageError

Tree = dict[str, Any]
COMMENT_COLUMN, LINE_WIDTH = 44, 150
"""First column of the comments of annotated YAML, and the width of its lines."""

MAX_LISTED = 60
"""Maximum number of known words in an error message."""


def suggest(word: str, known: list[str]) -> str:
    """Return "did you mean X?" for the closest known word, or the list of known words, at most MAX_LISTED of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    more = f", and {len(known) - MAX_LISTED:,} more" if len(known) > MAX_LISTED else ""
    return f"there are: {', '.join(known[:MAX_LISTED])}{more}"


def variants(path: str) -> dict[str, type[BaseModel]]:
    """Return the models that `name` selects at a top-level path (net, process); empty for other paths."""
    field = RunConfig.model_fields.get(path)
    members = get_args(field.annotation) if field else ()
    return {m.model_fields["name"].default: m for m in members if isinstance(m, type) and issubclass(m, BaseModel)}


def parse_value(text: str) -> Any:
    """Return JSON as its value and numbers with commas (.4,.6 or [.4,1]) as a list; any other text unchanged.

    The schema converts the text further (no, 010, 200k).
    """
    try:
        return untrusted.parse_json(text)
    except ValueError:
        numbers = re.fullmatch(r"\[?([\d.eE+-]+[kKmM]?(?:,\s*[\d.eE+-]+[kKmM]?)+)\]?", text.strip())
        return [part.strip() for part in numbers[1].split(",")] if numbers else text


def _field_annotations(block: str) -> dict[str, list[Any]]:
    """Return the types of the fields of a top-level block, such as train; of all variants for net and process."""
    field = RunConfig.model_fields.get(block)
    models: list[Any] = list(variants(block).values()) or [field.annotation if field else None]
    annotations: dict[str, list[Any]] = {}
    for model in models:
        if isinstance(model, type) and issubclass(model, BaseModel):
            for name, member in model.model_fields.items():
                annotations.setdefault(name, []).append(member.annotation)
    return annotations


BLOCKS = tuple(name for name in RunConfig.model_fields if _field_annotations(name))
"""Names of the groups of settings."""


def settings_named(name: str) -> list[str]:
    """Return the settings of all blocks with this last part: train.seed and eval.seed for seed."""
    return [f"{block}.{name}" for block in BLOCKS if name in _field_annotations(block)]


def _parse_setting(keys: list[str], text: str) -> Any:
    """Return the value of a setting as typed; text stays as it is, so that a path may look like a number or a list."""
    annotations = _field_annotations(keys[0]).get(keys[-1], []) if len(keys) == 2 else []
    is_text = bool(annotations) and all(set(get_args(a) or (a,)) <= {str, NoneType} for a in annotations)
    if not is_text and keys != ["init"]:
        return parse_value(text)
    return parse_value(text) if text == "null" or text.startswith('"') else text


def _check_setting_name(argument: str, tree: Tree) -> None:
    """Raise UsageError for a setting without its block, such as seed=3 or net=dit."""
    name, equals, text = argument.partition("=")
    if not equals or "." in name or name in ("init", "recipe") or isinstance(tree[name], dict):
        return
    if name in BLOCKS:
        fields = _field_annotations(name)
        cure = f"did you mean {name}.name={text}?" if "name" in fields else f"such as {name}.{next(iter(fields))}=..."
        raise UsageError(f"{name}={text}: {name} is a group of settings; {cure}")
    if same := settings_named(name):
        raise UsageError(f"{name}={text}: no such setting; did you mean {' or '.join(f'{s}={text}' for s in same)}?")


def parse_override(argument: str) -> Tree:
    """Return `a.b=c` as {"a": {"b": c}}, or the contents of a YAML file. `init=x` is short for `init.source=x`.

    Raises:
        UsageError: if the argument is neither, or the file cannot be read.
    """
    if "=" not in argument and argument.endswith((".yaml", ".yml")):
        tree = read_yaml(Path(argument))
    else:
        path, equals, text = argument.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            hint = (
                f" (to train on a folder of images: gesso train folder:{argument})" if Path(argument).is_dir() else ""
            )
            raise UsageError(f"{argument!r} is not a setting: write a.b=c, such as train.total_images=200k{hint}")
        tree = _parse_setting(keys, text)
        for key in reversed(keys):
            tree = {key: tree}
    if "init" in tree and not isinstance(tree["init"], dict):
        tree["init"] = {"source": tree["init"]}
    return tree


def read_yaml(path: Path) -> Tree:
    """Return the mapping in a YAML file. Raises UsageError if there is none."""
    try:
        tree = load_yaml(path)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} has no settings: write a mapping such as train: {{seed: 1}}")
    return tree


def deep_merge(base: Tree, override: Tree, path: tuple[str, ...] = ()) -> Tree:
    """Return `base` with the values of `override`, merged recursively.

    Raises:
        UsageError: if `override` has settings inside a value of `base` that is not a mapping.
    """
    result = dict(base)
    for key, value in override.items():
        location = (*path, str(key))
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            result[key] = deep_merge(base[key], value, location)
        elif isinstance(value, dict) and key in base and key != "environment":
            inner = ".".join((*location, str(next(iter(value), "?"))))
            outer = ".".join(location)
            raise UsageError(f"{inner}: {outer} is the single value {base[key]!r}, without settings inside")
        else:
            result[key] = value
    return result


def switch_variant(base: Tree, override: Tree, notes: list[str]) -> Tree:
    """Return `base` without values that a change in `override` makes invalid; append notes on them.

    A new `net.name` or `process.name` keeps only the fields that both variants have. A new `init.source` resets the
    fields recorded from the old one. A new `process.betas` resets the ends of the old schedule.
    """
    base = dict(base)
    for path, block in base.items():
        if not isinstance(block, dict) and isinstance(override.get(path), dict) and path in RunConfig.model_fields:
            raise UsageError(f"{path} = {shorten(block)}: should be a mapping of settings, such as {path}: {{...}}")
    given, old = override.get("init"), base.get("init") or {}
    if isinstance(given, dict) and given.get("source", old.get("source")) != old.get("source"):
        base["init"] = {k: v for k, v in old.items() if k not in RECORDED_FIELDS}
    for path in ("net", "process"):
        given = override.get(path)
        new = given.get("name") if isinstance(given, dict) else None
        block = base.get(path, {})
        old = block.get("name") if isinstance(block, dict) else None
        known = variants(path)
        if isinstance(new, str) and isinstance(old, str) and new in known and old != new:
            common = {k: v for k, v in base[path].items() if k in known[new].model_fields and k != "name"}
            dropped = [k for k in base[path] if k not in common and k != "name"]
            base[path] = {"name": new, **common}
            notes.append(
                f"{path}.name={new}: keeps {', '.join(common) or 'no setting'} of {old}; other settings are "
                f"defaults of {new} (dropped: {', '.join(dropped)})"
            )
            optim = override.get("optim")
            if path == "net" and "lr" in base.get("optim", {}) and "lr" not in (optim or {}):
                notes.append(f"optim.lr={base['optim']['lr']:g} was chosen for net.name={old}: set optim.lr for {new}")
    given, old = override.get("process"), base.get("process", {})
    if isinstance(given, dict) and given.get("betas", old.get("betas")) != old.get("betas"):
        base["process"] = {k: v for k, v in old.items() if k not in LINEAR_ENDS}
    return base


def resolve(base: Tree, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """Merge `arguments` (a.b=c or YAML files) into `base` in order, and validate the result once.

    Returns:
        The run, and notes on settings dropped by a change of net.name or process.name and on the learning rate at
        another batch size.

    Raises:
        UsageError: one line per invalid setting.
    """
    notes: list[str] = []
    override: Tree = {}
    for argument in arguments:
        tree = parse_override(argument)
        _check_setting_name(argument, tree)
        override = deep_merge(override, tree)
    run = validate(deep_merge(switch_variant(base, override, notes), override))
    return run, notes + _lr_notes(run)


def _lr_notes(run: RunConfig) -> list[str]:
    """Return a note on the learning rate if the batch size is not the one that it was tuned for."""
    optim, batch_size = run.optim, run.train.batch_size
    if optim.base_batch_size in (None, batch_size):
        return []
    tuned = f"optim.lr={optim.lr:g} was tuned for batch size {optim.base_batch_size}"
    if optim.lr_scaling != "none":
        peak = f"{optim.peak_lr(batch_size):.3g}"
        return [f"{tuned}; at train.batch_size={batch_size} it is {peak} (optim.lr_scaling={optim.lr_scaling})"]
    rules = " or ".join(
        f"optim.lr_scaling={name} ({optim.peak_lr(batch_size, name):.3g})" for name in ("sqrt", "linear")
    )
    return [f"{tuned}, but train.batch_size={batch_size}; add {rules} to scale it"]


def validate(tree: Tree) -> RunConfig:
    """Return the validated run. Raises UsageError with every invalid setting, its value and what is allowed."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [format_error(e) for e in error.errors()]
    title = "1 setting is wrong" if len(lines) == 1 else f"{len(lines)} settings are wrong"
    raise UsageError("\n  ".join([title + ":", *lines])) from None


def build_net_config(values: Tree) -> NetConfig:
    """Return the settings of a network from its fields. Raises UsageError that lists the invalid fields."""
    try:
        return TypeAdapter(NetConfig).validate_python(values)
    except ValidationError as error:
        lines = [format_error({**e, "loc": ("net", *e["loc"])}) for e in error.errors()]
    raise UsageError("\n  ".join(["the network is not valid:", *lines])) from None


def shorten(value: object) -> str:
    """Return a value as JSON of at most 60 characters, for messages."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, numbers of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) < 60 else text[:57] + "..."


def format_error(error: Any) -> str:
    """Return one line for an error of pydantic: path = value, what is wrong, and the closest valid name."""
    location = [str(part) for part in error["loc"]]
    model: Any = RunConfig
    if location and (members := variants(location[0])):
        if len(location) > 1 and location[1] in members:
            model = members[location.pop(1)]
    elif len(location) > 1:
        model = RunConfig.model_fields[location[0]].annotation
    path = ".".join(location)
    value = shorten(error["input"])
    match error["type"]:
        case "extra_forbidden":
            prefix = ".".join(location[:-1]) + "." if location[:-1] else ""
            known = [prefix + name for name in model.model_fields]
            if len(location) == 1:
                inner = [f"{block}.{name}" for block in BLOCKS for name in _field_annotations(block)]
                known = difflib.get_close_matches(path, [*known, *inner], n=1, cutoff=0.6) or known
            elif same := settings_named(location[-1]):
                return f"{path} = {value}: no such setting; did you mean {' or '.join(same)}?"
            return f"{path} = {value}: no such setting; {suggest(path, known)}"
        case "union_tag_invalid":
            name = str(error["ctx"]["tag"])
            return f"{path}.name = {name!r}: no such {path}; {suggest(name, list(variants(location[0])))}"
        case "union_tag_not_found":
            return f"{path}.name is missing; there are: {', '.join(variants(location[0]))}"
        case "missing":
            return f"{path} is missing"
        case "literal_error":
            return f"{path} = {value}: allowed are {error['ctx']['expected']}"
        case "value_error":
            message = str(error["ctx"]["error"])
            return message if not location or isinstance(error["input"], dict) else f"{path} = {value}: {message}"
        case "int_parsing":
            return f"{path} = {value}: should be a whole number, such as 128, 200k or 1e6"
        case _:
            return f"{path} = {value}: {error['msg'].replace('Input should', 'should', 1)}"


def to_dict(run: RunConfig) -> Tree:
    """Return a run as nested dicts and lists, for YAML and JSON."""
    return run.model_dump(mode="json")


def to_yaml(run: RunConfig) -> str:
    """Return a run as YAML."""
    return yaml.safe_dump(to_dict(run), sort_keys=False, default_flow_style=None, width=120)


def to_annotated_yaml(run: RunConfig) -> str:
    """Return a run as YAML with the help text of each setting as a comment; `gesso train` reads it."""
    return "\n".join(_annotated_lines(run, "")) + "\n"


def _annotated_lines(model: BaseModel, indent: str) -> Iterator[str]:
    tree = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        value, description = getattr(model, name), field.description or ""
        if isinstance(value, BaseModel):
            yield from _with_comment(f"{indent}{name}:", type(value).__doc__ or "")
            yield from _annotated_lines(value, indent + "  ")
        else:
            dumped = yaml.safe_dump(tree[name], default_flow_style=True, width=10_000, sort_keys=False)
            yield from _with_comment(f"{indent}{name}: {dumped.splitlines()[0]}", description)


def _with_comment(line: str, description: str) -> Iterator[str]:
    """Yield the line with its comment on the right and on the lines below; a long line has all of it below."""
    comment = textwrap.wrap(" ".join(description.split()), LINE_WIDTH - COMMENT_COLUMN - 2)
    if len(line) >= COMMENT_COLUMN or not comment:
        yield line
    else:
        yield f"{line:{COMMENT_COLUMN}}# {comment.pop(0)}"
    yield from (f"{'':{COMMENT_COLUMN}}# {part}" for part in comment)


def save_config(run: RunConfig, path: Path) -> None:
    """Write a run to a YAML file, atomically."""
    atomic_io.write_text(path, to_yaml(run))


def load_config(path: Path) -> RunConfig:
    """Return the run in a YAML file. Raises UsageError if it is missing or invalid."""
    return validate(read_yaml(path))


def load_with_overrides(folder: Path, arguments: list[str] | None, changeable: tuple[str, ...]) -> RunConfig:
    """Return the run of a folder with changed settings whose paths begin with one of `changeable`.

    Raises:
        UsageError: if the folder has no run.yaml, or an argument changes a setting that training fixed.
    """
    if not (folder / "run.yaml").is_file():
        raise UsageError(
            f"{folder} is no run folder (no run.yaml): train one with gesso train RECIPE --out "
            f"{shlex.quote(str(folder))}"
        )
    trained = load_config(folder / "run.yaml")
    if not arguments:
        return trained
    run, _ = resolve(to_dict(trained), arguments)
    for path, _, _ in differences(trained, run):
        if not path.startswith(changeable):
            allowed = ", ".join(prefix + "*" * prefix.endswith(".") for prefix in changeable)
            raise UsageError(f"{path} is fixed by training; this command can change {allowed}")
    new, old = run.sample, trained.sample
    if new.halflife and new.halflife == old.halflife and new.sigma_rel != old.sigma_rel:
        raise UsageError(
            f"sample.sigma_rel={new.sigma_rel:g} has no effect with this run's sample.halflife={new.halflife}: "
            "set sample.halflife=null too"
        )
    return run


def unused_sample_settings(trained: RunConfig, run: RunConfig) -> list[str]:
    """Return a note on each setting sample.* that differs between the runs and has no effect in the second."""
    reasons, new, old = run.sample.unused_settings(), to_dict(run)["sample"], to_dict(trained)["sample"]
    return [
        f"note: sample.{name}={new[name]} has no effect with {reason}"
        for name, reason in reasons.items()
        if new[name] != old[name]
    ]


def flatten(run: RunConfig) -> dict[str, Any]:
    """Return one entry per setting, such as {"train.seed": 0}."""

    def walk(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(run), ""))


def differences(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (path, value in a, value in b) for each setting that differs; None if a run has no such setting."""
    left, right = flatten(a), flatten(b)
    return [(k, left.get(k), right.get(k)) for k in {**left, **right} if left.get(k) != right.get(k)]
