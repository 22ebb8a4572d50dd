"""The device that a user names."""

import torch

from gesso.errors import UsageError


def named(name: str, said: str, local: int | None = None) -> torch.device:
    """auto is a GPU where there is one; local: which, of several ranks on one machine.

    Raises UsageError when it cannot be used here; `said` is how the user named it, such as "--device ".
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" and local is not None else name)
    except RuntimeError:
        raise UsageError(f"{said}{name}: there are auto, cpu, cuda, cuda:1, mps, ...") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"{said}{name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
