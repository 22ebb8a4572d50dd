"""Train latent diffusion image models from scratch and compare them fairly.

    import gesso

    run = gesso.load_run("runs/digits")
    images = run.sample(labels=[7], seeds=range(4), guidance=2.0)  # uint8 (N, C, H, W)

`import gesso` loads nothing else: each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gesso.api import Run as Run
    from gesso.api import load_run as load_run
    from gesso.api import model as model
    from gesso.api import recipe as recipe
    from gesso.api import train as train
    from gesso.conditioning import Cond as Cond
    from gesso.config import ControlVariable as ControlVariable
    from gesso.config import InputSpec as InputSpec
    from gesso.config import RunConfig as RunConfig
    from gesso.errors import GessoError as GessoError
    from gesso.errors import UsageError as UsageError
    from gesso.extensions import extend as extend
    from gesso.snapshot import PostHocEMA as PostHocEMA

__version__ = "0.1.0"

EXPORTS = {
    "Cond": "gesso.conditioning",
    "ControlVariable": "gesso.config",
    "GessoError": "gesso.errors",
    "InputSpec": "gesso.config",
    "PostHocEMA": "gesso.snapshot",
    "Run": "gesso.api",
    "RunConfig": "gesso.config",
    "UsageError": "gesso.errors",
    "extend": "gesso.extensions",
    "load_run": "gesso.api",
    "model": "gesso.api",
    "recipe": "gesso.api",
    "train": "gesso.api",
}
"""Exported name -> module that defines it."""
__all__ = [*EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'gesso' has no attribute {name!r}")
    value = getattr(importlib.import_module(EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the exported names."""
    return sorted({*globals(), *EXPORTS})
