"""Recipes: functions that return a complete Run. `RECIPES` is the list of them."""

from collections.abc import Callable
from pathlib import Path

from gesso import config
from gesso.config import Run
from gesso.errors import UsageError
from gesso.recipes import berrada, digits, edm2, imagenet, shapes
from gesso.recipes.folder import folder

RECIPES: dict[str, Callable[[], Run]] = {
    **digits.RECIPES,
    **berrada.RECIPES,
    **imagenet.RECIPES,
    **shapes.RECIPES,
    "folder": folder,
    **edm2.RECIPES,
}


def listed() -> list[str]:
    """A line for each recipe."""
    lines = [f"{name:21} {(make.__doc__ or '').strip().splitlines()[0]}" for name, make in RECIPES.items()]
    return [*lines, "\ngesso show RECIPE prints one whole; gesso train RECIPE a.b=c changes it"]


def resolve(name: str, arguments: list[str]) -> tuple[Run, list[str]]:
    """The run that `name` stands for, with `arguments` (a.b=c or YAML files) laid over it, and notes.

    `name` is a recipe, `folder:PATH`, a run.yaml, or a run folder. Raises UsageError.
    """
    if name.startswith("folder:"):
        arguments = [f"data.source={name.removeprefix('folder:')}", *arguments]
        name = "folder"
    if name in RECIPES:
        return config.resolve(config.as_tree(RECIPES[name]()), arguments)
    path = Path(name)
    if path.is_dir() and (path / "run.yaml").is_file():
        path = path / "run.yaml"
    if path.suffix in (".yaml", ".yml"):
        return config.resolve(config.as_tree(config.read(path)), arguments)
    hint = config.nearest(name, list(RECIPES))
    if path.is_dir():
        hint = f"to train on the images in that folder, write folder:{name}"
    raise UsageError(f"there is no recipe {name!r}; {hint}")
