"""Recipes: functions that return a complete run. RECIPES lists them by name."""

from collections.abc import Callable
from pathlib import Path

from gesso import config, extensions
from gesso.config import RunConfig
from gesso.errors import UsageError
from gesso.recipes import berrada, digits, edm2, fashion, imagenet, shapes
from gesso.recipes.folder import folder

RECIPES: dict[str, Callable[[], RunConfig]] = {
    **digits.RECIPES,
    **berrada.RECIPES,
    **imagenet.RECIPES,
    **shapes.RECIPES,
    **fashion.RECIPES,
    "folder": folder,
    **edm2.RECIPES,
}


def list_recipes() -> list[str]:
    """Return one line per recipe: its name and summary."""
    lines = [f"{name:21} {(recipe.__doc__ or '').strip().splitlines()[0]}" for name, recipe in RECIPES.items()]
    return [*lines, "\ngesso config RECIPE prints all settings; gesso train RECIPE a.b=c changes some"]


def resolve(name: str, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """Return the run that `name` selects, changed by `arguments` (a.b=c or YAML files), and notes for the user.

    Args:
        name: a recipe, `folder:PATH`, a Python file with a function recipe(), a run.yaml, or a run folder.
        arguments: settings or YAML files, applied in order.

    Raises:
        UsageError: if there is no such recipe or file, or a setting is invalid.
    """
    if name.startswith("folder:"):
        arguments = [f"data.source={name.removeprefix('folder:')}", *arguments]
        name = "folder"
    if name in RECIPES:
        return config.resolve(config.to_dict(RECIPES[name]()), arguments)
    path = Path(name)
    if path.suffix == ".py":
        return config.resolve(config.to_dict(_load_recipe_file(path)), arguments)
    if path.is_dir() and (path / "run.yaml").is_file():
        path = path / "run.yaml"
    if path.suffix in (".yaml", ".yml"):
        return config.resolve(config.to_dict(config.load_config(path)), arguments)
    hint = config.suggest(name, list(RECIPES))
    if path.is_dir():
        hint = f"to train on the images in that folder, use folder:{name}"
    raise UsageError(f"there is no recipe {name!r}; {hint}")


def _load_recipe_file(path: Path) -> RunConfig:
    """Execute a Python file and return the run of its function recipe(). Raises UsageError if there is none."""
    module = extensions.load_code(path)
    if not callable(getattr(module, "recipe", None)):
        raise UsageError(f"{path} has no function recipe(); define one that returns gesso.recipe(NAME, SETTINGS)")
    run = module.recipe()
    if not isinstance(run, RunConfig):
        raise UsageError(f"recipe() of {path} returned {type(run).__name__}; return gesso.recipe(NAME, SETTINGS)")
    return run if run.recipe not in (*RECIPES, "custom") else run.model_copy(update={"recipe": path.stem})
