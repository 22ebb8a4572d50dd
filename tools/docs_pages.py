"""Pages of the documentation site that are generated when it is built: settings, commands, and the list of results.

mkdocs.yml names this file as a hook. `python tools/docs_pages.py settings` prints a page as Markdown.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel

from gesso import cli
from gesso.config import RunConfig

ROOT = Path(__file__).parents[1]
PAPERS = {"berrada": "Berrada et al. 2024", "edm2": "EDM2", "gesso": "gesso", "sweep": "Sweeps"}
"""First word of the name of a results page -> section of the navigation."""
CONTRIBUTING_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository's root."""


# Settings.


def variants_of(block: str) -> list[type[BaseModel]]:
    """Return the settings classes of a block of RunConfig: one, or one per value of its `name`."""
    annotation = RunConfig.model_fields[block].annotation
    members = [m for m in (annotation, *get_args(annotation)) if isinstance(m, type) and issubclass(m, BaseModel)]
    return members


def shared_base(models: list[type[BaseModel]]) -> dict[type[BaseModel], list[type[BaseModel]]]:
    """Return each base class with fields that two or more of `models` share, with those models."""
    bases: dict[type[BaseModel], list[type[BaseModel]]] = {}
    for model in models:
        base = model.__bases__[0]
        if getattr(base, "model_fields", None):
            bases.setdefault(base, []).append(model)
    return {base: children for base, children in bases.items() if len(children) > 1}


def type_text(schema: dict[str, Any]) -> str:
    """Return the type of a JSON schema in words: "a, b or null", "integer above 0", "list of numbers"."""
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(type_text(part) for part in schema["anyOf"])
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            items = [type_text(item) for item in schema["prefixItems"]]
            return f"[{', '.join(items)}]"
        return f"list of ({type_text(schema.get('items', {}))})"
    if kind == "object" or "$ref" in schema:
        return "mapping"
    words = {"string": "text", "boolean": "`true`, `false`", "null": "`null`", None: "any"}
    text = words.get(kind, str(kind))
    bounds = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
    limits = [f"{word} {schema[key]:.4g}" for key, word in bounds.items() if key in schema]
    return " ".join([text, *limits])


def default_text(value: Any) -> str:
    """Return a default value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(default_text(item) for item in value)}]"
    return str(value)


def help_markdown(text: str) -> str:
    """Return help text as Markdown: docs/NAME.md as links, settings such as train.seed=1 as code, the rest escaped."""
    blocks = "|".join(RunConfig.model_fields)
    tokens = re.compile(rf"(\bdocs/[\w-]+\.md|(?<![\w/.])(?:{blocks})\.\w+(?:=[\w.@+-]*\w)?)")
    parts = tokens.split(" ".join(text.split()))  # tokens are at odd positions
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*_<>|`\[])", r"\\\1", part)
        elif page := re.fullmatch(r"docs/([\w-]+)\.md", part):
            parts[i] = f"[{page[1]}]({page[1]}.md)"
        else:
            parts[i] = f"`{part}`"
    return "".join(parts)


def setting_lines(path: str, model: type[BaseModel], names: list[str], anchor: str) -> Iterator[str]:
    """Yield a definition list of fields of a model."""
    properties = model.model_json_schema()["properties"]
    for name in names:
        field, schema = model.model_fields[name], properties[name]
        required = field.is_required()
        default = "required" if required else f"default `{default_text(field.default)}`"
        yield f'<span id="{anchor}.{name}">`{path}.{name}`</span> · {type_text(schema)} · {default}'
        yield f":   {help_markdown(field.description or 'selects the settings below')}\n"
        for inner in (a for a in get_args(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)):
            yield from setting_lines(f"{path}.{name}[]", inner, list(inner.model_fields), f"{anchor}.{name}")


def block_lines(block: str) -> Iterator[str]:
    """Yield the section of a block of RunConfig."""
    models = variants_of(block)
    yield f"## {block}\n"
    if len(models) == 1:
        yield f"{help_markdown(models[0].__doc__ or '')}\n"
        yield from setting_lines(block, models[0], list(models[0].model_fields), block)
        return
    names = ", ".join(f"`{m.model_fields['name'].default}`" for m in models)
    yield f"`{block}.name` selects one of {names}. A change of it keeps the settings that both have.\n"
    shared: dict[type[BaseModel], set[str]] = {}
    for base, children in shared_base(models).items():
        names = ", ".join(f"`{m.model_fields['name'].default}`" for m in children)
        yield f"### Settings of {names}\n"
        fields = list(base.model_fields)
        yield from setting_lines(block, base, fields, block)
        shared |= {child: set(fields) for child in children}
    for model in models:
        name = model.model_fields["name"].default
        yield f"### {block}.name={name}\n"
        yield f"{help_markdown(model.__doc__ or '')}\n"
        fields = [field for field in model.model_fields if field not in shared.get(model, set())]
        yield from setting_lines(block, model, fields, f"{block}-{name}")


def settings_page() -> str:
    """Return the reference of all settings as Markdown."""
    blocks = [name for name in RunConfig.model_fields if variants_of(name)]
    rest = [name for name in RunConfig.model_fields if not variants_of(name)]
    lines = [
        "# Settings",
        "",
        "```",
        "gesso config digits                      # all settings of a recipe, with their values",
        "gesso train digits train.seed=1          # a setting is written a.b=c",
        "```",
        "",
        "This page is generated from the schema of `gesso.config.RunConfig`. The defaults are those of the schema;",
        "a recipe sets its own. Numbers of images may be written `200k`, `1.5M` or `1e6`, and lists `.4,.6` or",
        "`[.4,.6]`. A YAML file of settings may stand in place of `a.b=c`. Unknown names and invalid values are errors",
        "that name the closest valid one.",
        "",
    ]
    for block in blocks:
        lines += block_lines(block)
    lines += ["## Other fields of run.yaml\n"]
    for name in rest:
        text = help_markdown(RunConfig.model_fields[name].description or "")
        lines += [f'<span id="{name}">`{name}`</span>', f":   {text}\n"]
    return "\n".join(lines) + "\n"


# Commands.


def command_lines(name: str, command: Any) -> Iterator[str]:
    """Yield the section of a command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["gesso", name, *(argument_text(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    yield f"## gesso {name}\n"
    yield f"```text\n{usage}\n```\n"
    yield f"{help_markdown(command.help or '')}\n"
    for parameter in [*arguments, *options]:
        title = argument_text(parameter) if parameter in arguments else option_text(parameter)
        yield f"`{title}`\n:   {help_markdown(parameter.help or '')}{default_of(parameter)}\n"


def argument_text(parameter: Any) -> str:
    """Return an argument as in a usage line."""
    return (parameter.metavar or parameter.name.upper()).strip("{}")


def option_text(parameter: Any) -> str:
    """Return an option, with a placeholder for its value if it has one."""
    return parameter.opts[-1] + ("" if parameter.is_flag else " VALUE")


def default_of(parameter: Any) -> str:
    """Return " (default X)" for an option with a default that its help text does not state."""
    value = parameter.default
    if (
        getattr(parameter, "is_flag", False)
        or value in (None, [], ())
        or callable(value)
        or "default" in (parameter.help or "")
    ):
        return ""
    return f" (default `{value}`)"


def commands_page() -> str:
    """Return the reference of all commands as Markdown."""
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = [
        "# Commands",
        "",
        "This page is generated from the command line. `gesso COMMAND --help` prints the same. `--debug` after any",
        "command adds the traceback to an error.",
        "",
    ]
    for name, command in commands.items():
        lines += command_lines(name, command)
    return "\n".join(lines) + "\n"


# Hooks of MkDocs.

GENERATED = {"settings.md": settings_page, "commands.md": commands_page}


def results_nav(folder: Path) -> list[dict[str, Any]]:
    """Return the navigation entries of all pages of docs/results, grouped by paper."""
    groups: dict[str, list[dict[str, str]]] = {}
    for path in sorted(folder.glob("*.md")):
        paper, dash, rest = path.stem.partition("-")
        if paper in PAPERS and dash:
            name, _, scale = rest.rpartition("-")
            title = f"{paper}/{name} ({scale})" if scale in ("tiny", "small", "paper") else path.stem
            groups.setdefault(PAPERS[paper], []).append({title: f"results/{path.name}"})
        elif path.name != "README.md":
            groups.setdefault("Plan of experiments", []).append({path.stem: f"results/{path.name}"})
    return [{group: entries} for group, entries in groups.items()]


def on_config(config: Any) -> Any:
    """Add the pages of docs/results to the navigation."""
    for entry in config.nav:
        if "Results" in entry:
            entry["Results"] = [*entry["Results"], *results_nav(Path(config.docs_dir) / "results")]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and those of the repository's root."""
    from mkdocs.structure.files import File

    for name, page in GENERATED.items():
        files.append(File.generated(config, name, content=page()))
    for name, source in CONTRIBUTING_PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links between docs/ and the repository's root."""
    if page.file.src_uri in CONTRIBUTING_PAGES:
        return markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
    for name, source in CONTRIBUTING_PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


if __name__ == "__main__":
    sys.stdout.write(GENERATED[f"{sys.argv[1]}.md"]())
