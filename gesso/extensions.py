"""Networks, data sets, losses and control variables of the user, used by name without a change to gesso.

    gesso.extend(networks={"conv": ConvNet}, datasets={"birds": open_birds}, losses={"huber": huber})

Settings name them: net.name=custom net.network=conv, data.source=custom:birds, loss.weighting=custom:huber, and
control.variables=[sharpness]. A run records the files that define them, and never executes a file by itself: whoever
uses the run names the file (`gesso --code my_recipe.py sample RUN`) or calls `extend` in Python.
"""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gesso.config import CONTROL_VARIABLES, ControlVariable
from gesso.errors import UsageError

NETWORKS: dict[str, Callable[..., Any]] = {}
"""Functions (inputs: InputSpec, **net.options) -> nn.Module by the name in net.network."""
DATASETS: dict[str, Callable[[], Any]] = {}
"""Functions without arguments that return a map-style data set, by the name in data.source."""
LOSSES: dict[str, Callable[..., Any]] = {}
"""Functions (denoised, x0, s, process) -> loss (B,) by the name in loss.weighting."""
BUILT_IN_CONTROLS = frozenset(CONTROL_VARIABLES)
_sources: dict[Path, str] = {}
_loaded: list[Path] = []


def extend(
    networks: Mapping[str, Callable[..., Any]] | None = None,
    datasets: Mapping[str, Callable[[], Any]] | None = None,
    losses: Mapping[str, Callable[..., Any]] | None = None,
    controls: Mapping[str, ControlVariable] | None = None,
) -> None:
    """Make the objects available to settings, by name, in this process. A name that is used again is replaced.

    Args:
        networks: Classes or functions called with (inputs: InputSpec, **net.options). They return a module
            F(x, c_noise, progress, cond) as in gesso.models: x (B, C, H, W), c_noise and progress (B,), cond a Cond.
        datasets: Functions without arguments that return a map-style data set: len(d), and d[i] an image, a pair
            (image, label), or a mapping with the keys "image", "label" and "caption". An image is a PIL image, or
            uint8 as (H, W), (H, W, C) in NumPy or (C, H, W) in torch.
        losses: Functions (denoised, x0, s, process) that return the loss of each sample, (B,).
        controls: Control variables. `measure` returns their columns from a SampleBatch.

    Raises:
        UsageError: A name is not usable, or an object is not callable.
    """
    groups = (("networks", networks, NETWORKS), ("datasets", datasets, DATASETS), ("losses", losses, LOSSES))
    for group, objects, known in groups:
        for name, value in (objects or {}).items():
            _check_name(group, name)
            if not callable(value):
                raise UsageError(f"gesso.extend: {group}[{name!r}] is {value!r}: pass a class or a function")
            known[name] = value
            _record_source(value)
    for name, variable in (controls or {}).items():
        _check_name("controls", name)
        if name in BUILT_IN_CONTROLS:
            raise UsageError(f"gesso.extend: the control variable {name} is built in; choose another name")
        if variable.measure is None:
            raise UsageError(f"gesso.extend: controls[{name!r}] has no measure: pass a function of a SampleBatch")
        used = {c for n, v in CONTROL_VARIABLES.items() if n != name for c in v.columns} & set(variable.columns)
        if used:
            raise UsageError(f"gesso.extend: controls[{name!r}] has columns of other variables: {', '.join(used)}")
        CONTROL_VARIABLES[name] = variable
        _record_source(variable.measure)


def _check_name(group: str, name: str) -> None:
    if not (isinstance(name, str) and name.replace("-", "_").isidentifier()):
        raise UsageError(f"gesso.extend: {group} has the name {name!r}; use letters, digits, - and _")


def _record_source(value: object) -> None:
    """Record the file that defines an object; objects of an interactive session have none."""
    try:
        path = Path(inspect.getsourcefile(value) or "")  # type: ignore[arg-type]  # raises for other objects
        _sources[path.resolve()] = _digest(path.read_bytes())
    except (TypeError, OSError):
        pass


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def source_files() -> dict[Path, str]:
    """Return the files that define the objects of `extend`, with the first 12 hex digits of their SHA-256."""
    return dict(_sources)


def loaded_files() -> list[Path]:
    """Return the files of `load_code`, as named."""
    return list(dict.fromkeys(_loaded))


def describe_sources() -> str:
    """Return the names and hashes of `source_files`, for the record of a run; "" without extensions."""
    return ", ".join(sorted(f"{path.name} {digest}" for path, digest in _sources.items()))


def load_code(path: str | Path) -> ModuleType:
    """Execute a Python file of the user, which calls `gesso.extend`, and return its module.

    Raises:
        UsageError: There is no such file, or it fails; the message names its line.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise UsageError(f"{path}: there is no such Python file; name a file that calls gesso.extend")
    content = file.read_bytes()
    spec = importlib.util.spec_from_file_location(f"gesso_code_{file.stem}", file)
    assert spec and spec.loader  # the file exists and ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle and dataclasses look the module up by its name
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else "?")
        raise UsageError(f"{file}, line {line}: {type(error).__name__}: {error}") from error
    _sources[file.resolve()] = _digest(content)
    _loaded.append(file)
    return module


def missing(kind: str, name: str, known: Mapping[str, object]) -> UsageError:
    """Return the error for a custom object that this process does not have."""
    there = f"; this process has: {', '.join(known)}" if known else ""
    return UsageError(
        f"{kind} {name!r} is custom code, which is not loaded{there}\n"
        "name its file with gesso --code FILE.py, or call gesso.extend in Python; environment.code in run.yaml has the "
        "name of the file"
    )
