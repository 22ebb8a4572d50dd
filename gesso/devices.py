"""The device that a user names, and the precision of its products."""

import contextlib
from collections.abc import Iterator

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


def check_precision(device: torch.device, setting: str, precision: str) -> None:
    """Raise UsageError where a device does not compute products in 16 bits, with the setting that cures it.

    setting: the name of the setting that says `precision`, such as "train.precision". A processor counts as a device without
    float16: its products are emulated, some 30 times slower than float32's.
    """
    if precision not in ("float16", "bfloat16"):
        return
    reason = ""
    if device.type == "cpu" and precision == "float16":
        reason = "a processor computes float16 products by emulation, some 30 times slower than float32"
    else:
        try:
            with torch.autocast(device.type, getattr(torch, precision)):
                factor = torch.ones(8, 8, device=device)
                if (factor @ factor).dtype != getattr(torch, precision):
                    reason = "autocast leaves its products in float32"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if reason:
        others = "" if precision == "bfloat16" else f", or {setting}=bfloat16 where the device has it"
        raise UsageError(f"{setting}={precision} cannot be used on {device}: {reason}; set {setting}=full{others}")


@contextlib.contextmanager
def products(device: torch.device, precision: str, tf32: bool = False) -> Iterator[None]:
    """Compute products of 32-bit factors in a precision: full, tf32 (or tf32=True), bfloat16 or float16.

    Neither embeddings nor anything but products is rounded (nets.layers.unrounded, autocast). torch's own default, TF32 in
    convolutions on GPUs, is off unless asked for.
    """
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = tf32 or precision == "tf32"
        if precision in ("full", "tf32"):
            yield
        else:
            with torch.autocast(device.type, getattr(torch, precision), cache_enabled=False):
                yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
