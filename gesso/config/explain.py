"""A run as YAML with what every setting is, and which equation, beside it."""

import textwrap
from collections.abc import Iterator

import yaml
from pydantic import BaseModel

from gesso.config.run import Run

COLUMN, WIDTH = 44, 150
"""where comments begin, and where their lines end"""


def explained(run: Run) -> str:
    """YAML that `gesso train` reads back, each setting followed by its description."""
    return "\n".join(_lines(run, "")) + "\n"


def _lines(model: BaseModel, indent: str) -> Iterator[str]:
    tree = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        value, what = getattr(model, name), " ".join((field.description or "").split())
        if isinstance(value, BaseModel):
            what = " ".join((type(value).__doc__ or "").split())
            yield from _commented(f"{indent}{name}:", what)
            yield from _lines(value, indent + "  ")
        else:
            dumped = yaml.safe_dump(tree[name], default_flow_style=True, width=10_000, sort_keys=False)
            yield from _commented(f"{indent}{name}: {dumped.splitlines()[0]}", what)


def _commented(line: str, what: str) -> Iterator[str]:
    """The line with its comment to the right, continued below; under it where the line is long."""
    comment = textwrap.wrap(what, WIDTH - COLUMN - 2)
    if len(line) >= COLUMN or not comment:
        yield line
    else:
        yield f"{line:{COLUMN}}# {comment.pop(0)}"
    yield from (f"{'':{COLUMN}}# {part}" for part in comment)
