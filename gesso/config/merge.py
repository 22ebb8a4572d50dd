"""recipe <- YAML <- a.b=c: merge, validate, and say what is wrong, all of it at once."""

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gesso import files
from gesso.config.init import FOUND
from gesso.config.process import LINEAR_ENDS
from gesso.config.run import Run
from gesso.errors import UsageError

Tree = dict[str, Any]


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean X?' or a list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"


def choices(path: str) -> dict[str, type[BaseModel]]:
    """The models among which `name` decides at a top-level path (net, process); empty elsewhere."""
    field = Run.model_fields.get(path)
    members = get_args(field.annotation) if field else ()
    return {m.model_fields["name"].default: m for m in members if isinstance(m, type) and issubclass(m, BaseModel)}


def parse_value(text: str) -> Any:
    """JSON where it is JSON, numbers with commas between (.4,.6 or [.4,1]) as a list; otherwise the text itself, for the
    schema to convert (no, 010, 200k)."""
    try:
        return json.loads(text)
    except ValueError:
        numbers = re.fullmatch(r"\[?([\d.eE+-]+[kKmM]?(?:,\s*[\d.eE+-]+[kKmM]?)+)\]?", text.strip())
        return [part.strip() for part in numbers[1].split(",")] if numbers else text


def parse_override(argument: str) -> Tree:
    """`a.b=c` as {"a": {"b": c}}; a YAML file as what it holds. `init=x` is short for `init.source=x`."""
    tree = _said(argument)
    if "init" in tree and not isinstance(tree["init"], dict):
        tree["init"] = {"source": tree["init"]}
    return tree


def _said(argument: str) -> Tree:
    if "=" not in argument and argument.endswith((".yaml", ".yml")):
        return read_yaml(Path(argument))
    path, equals, text = argument.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UsageError(f"{argument!r} is not a setting: write a.b=c, such as train.total_images=200k")
    tree: Any = parse_value(text)
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} does not hold settings (a mapping of names to values)")
    return tree


def merged(base: Tree, override: Tree, path: tuple[str, ...] = ()) -> Tree:
    """`override` laid over `base`; a path into a scalar is an error with its name."""
    result = dict(base)
    for key, value in override.items():
        here = (*path, str(key))
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            result[key] = merged(base[key], value, here)
        elif isinstance(value, dict) and key in base and key != "made_with":
            inside = ".".join((*here, next(iter(value), "?")))
            raise UsageError(f"{inside}: {'.'.join(here)} is the single value {base[key]!r}, it has no settings inside")
        else:
            result[key] = value
    return result


def switched(base: Tree, override: Tree, notes: list[str]) -> Tree:
    """Where `net.name` or `process.name` changes, keep of `base` only the fields that both have; where `init.source` does,
    forget what the old one told; where `process.betas` does, forget the ends of the old schedule."""
    base = dict(base)
    given, old = override.get("init"), base.get("init") or {}
    if isinstance(given, dict) and given.get("source", old.get("source")) != old.get("source"):
        base["init"] = {k: v for k, v in old.items() if k not in FOUND}
    for path in ("net", "process"):
        given = override.get(path)
        new = given.get("name") if isinstance(given, dict) else None
        old = base.get(path, {}).get("name")
        known = choices(path)
        if new in known and old != new:
            common = {k: v for k, v in base[path].items() if k in known[new].model_fields and k != "name"}
            dropped = [k for k in base[path] if k not in common and k != "name"]
            base[path] = {"name": new, **common}
            kept = f"kept {', '.join(common)}" if common else "kept nothing"
            notes.append(
                f"{path}.name={new}: {kept} of {old}; the rest are {new}'s defaults (left behind: {', '.join(dropped)})"
            )
    given, old = override.get("process"), base.get("process", {})
    if isinstance(given, dict) and given.get("betas", old.get("betas")) != old.get("betas"):
        base["process"] = {k: v for k, v in old.items() if k not in LINEAR_ENDS}
    return base


def resolve(base: Tree, arguments: list[str]) -> tuple[Run, list[str]]:
    """Lay `arguments` (a.b=c or YAML files) over `base` in order and validate once.

    Returns the run and notes: what a change of net.name or process.name left behind, and the rate at another batch size.
    Raises UsageError with one line per wrong setting.
    """
    notes: list[str] = []
    override: Tree = {}
    for argument in arguments:
        override = merged(override, parse_override(argument))
    run = validate(merged(switched(base, override, notes), override))
    return run, notes + _rate(run)


def _rate(run: Run) -> list[str]:
    """What a batch of another size than lr was found for makes of lr."""
    optim, batch = run.optim, run.train.batch_size
    if optim.tuned_at_batch in (None, batch):
        return []
    found = f"optim.lr={optim.lr:g} was found at batches of {optim.tuned_at_batch:,}"
    if optim.scaling != "none":
        return [f"{found}: at train.batch_size={batch} it is {optim.peak(batch):.3g} (optim.scaling={optim.scaling})"]
    offers = " or ".join(f"optim.scaling={rule} ({optim.peak(batch, rule):.3g})" for rule in ("sqrt", "linear"))
    return [f"{found} and stays at train.batch_size={batch}; {offers} would change it"]


def validate(tree: Tree) -> Run:
    """A Run, or a UsageError that names every wrong setting with its value and what is allowed."""
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
    head = "1 setting is wrong" if len(lines) == 1 else f"{len(lines)} settings are wrong"
    raise UsageError("\n  ".join([head + ":", *lines])) from None


def _explain(error: Any) -> str:
    """One line: path = value: what is wrong, and the nearest thing that is right."""
    location = [str(part) for part in error["loc"]]
    model: Any = Run
    if location and (members := choices(location[0])):
        if len(location) > 1 and location[1] in members:
            model = members[location.pop(1)]
    elif len(location) > 1:
        model = Run.model_fields[location[0]].annotation
    path = ".".join(location)
    value = json.dumps(error["input"], default=str)
    value = value if len(value) < 60 else value[:57] + "..."
    match error["type"]:
        case "extra_forbidden":
            prefix = ".".join(location[:-1]) + "." if location[:-1] else ""
            known = [prefix + name for name in model.model_fields]
            return f"{path} = {value}: no such setting; {nearest(path, known)}"
        case "union_tag_invalid":
            tags = list(choices(location[0]))
            name = str(error["ctx"]["tag"])
            return f"{path}.name = {name!r}: no such {path}; {nearest(name, tags)}"
        case "union_tag_not_found":
            return f"{path}.name is missing; there are: {', '.join(choices(location[0]))}"
        case "missing":
            return f"{path} is missing"
        case "literal_error":
            return f"{path} = {value}: allowed are {error['ctx']['expected']}"
        case "value_error":
            said = str(error["ctx"]["error"])
            return said if not location or isinstance(error["input"], dict) else f"{path} = {value}: {said}"
        case "int_parsing":
            return f"{path} = {value}: should be a whole number, such as 128, 200k or 1e6"
        case _:
            return f"{path} = {value}: {error['msg'].replace('Input should', 'should', 1)}"


def as_tree(run: Run) -> Tree:
    """Plain lists and dicts, for YAML and JSON."""
    return run.model_dump(mode="json")


def to_yaml(run: Run) -> str:
    return yaml.safe_dump(as_tree(run), sort_keys=False, default_flow_style=None, width=120)


def write(run: Run, path: Path) -> None:
    files.write_text(path, to_yaml(run))


def read(path: Path) -> Run:
    return validate(read_yaml(path))


def recorded(folder: Path, arguments: list[str] | None, changeable: tuple[str, ...]) -> Run:
    """The run of a folder with settings laid over it that may change after training: those that begin with `changeable`."""
    if not (folder / "run.yaml").is_file():
        raise UsageError(
            f"{folder} is no run folder (it has no run.yaml); train one with gesso train RECIPE --out {folder}"
        )
    settled = read(folder / "run.yaml")
    run, _ = resolve(as_tree(settled), list(arguments or ()))
    for path, _, _ in differences(settled, run):
        if not path.startswith(changeable):
            allowed = ", ".join(f"{c}*" for c in changeable)
            raise UsageError(f"{path} was settled by training; what can change here is {allowed}")
    ours, own = run.sample, settled.sample
    if ours.halflife and ours.halflife == own.halflife and ours.sigma_rel != own.sigma_rel:
        raise UsageError(
            f"sample.sigma_rel={ours.sigma_rel:g} has no effect beside this run's sample.halflife={ours.halflife}: "
            "set sample.halflife=null too"
        )
    return run


def flat(run: Run) -> dict[str, Any]:
    """{"train.seed": 0, ...}: one entry per setting."""

    def walk(tree: Tree, prefix: str):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(as_tree(run), ""))


def differences(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) for each setting that differs; None where one has no such setting."""
    left, right = flat(a), flat(b)
    return [(k, left.get(k), right.get(k)) for k in {**left, **right} if left.get(k) != right.get(k)]
