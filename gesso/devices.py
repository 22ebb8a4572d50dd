"""Rank and device of this process, and precision of matrix products."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gesso.errors import UsageError


class RankInfo(NamedTuple):
    """Rank of this process among all ranks and among those of its machine; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def rank_from_env() -> RankInfo:
    """Return the rank of this process from the environment variables of torchrun; without them, a single process."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return RankInfo(*(int(os.environ.get(name, default)) for name, default in zip(variables, RankInfo(), strict=True)))


def resolve_device(name: str, option: str, local_rank: int | None = None) -> torch.device:
    """Return the torch device of a setting; "auto" is a GPU if there is one, else the CPU.

    Args:
        name: Device name, such as "auto", "cpu", "cuda:1" or "mps".
        option: Prefix of the name in errors, such as "--device " or "train.device=".
        local_rank: GPU to use for "cuda" where several ranks run on a machine.

    Raises:
        UsageError: The device does not exist or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" and local_rank is not None else name)
    except RuntimeError:
        raise UsageError(f"{option}{name}: no such device; use auto, cpu, cuda, cuda:1, mps, ...") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"{option}{name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def check_precision(device: torch.device, setting: str, precision: str) -> None:
    """Raise UsageError if `device` does not compute products in `precision`.

    float16 is rejected on CPUs, which emulate it about 30 times slower than float32. `setting` is the name of the
    setting in the error, such as "train.precision".
    """
    if precision not in ("float16", "bfloat16"):
        return
    reason = ""
    if device.type == "cpu" and precision == "float16":
        reason = "a CPU emulates float16 products, about 30 times slower than float32"
    else:
        try:
            with torch.autocast(device.type, getattr(torch, precision)):
                factor = torch.ones(8, 8, device=device)
                if (factor @ factor).dtype != getattr(torch, precision):
                    reason = "autocast leaves its products in float32"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if reason:
        others = "" if precision == "bfloat16" else f", or {setting}=bfloat16 if the device has it"
        raise UsageError(f"{setting}={precision} cannot be used on {device}: {reason}; set {setting}=full{others}")


@contextlib.contextmanager
def precision_context(device: torch.device, precision: str, tf32: bool = False) -> Iterator[None]:
    """Compute products of 32-bit factors in a precision: full, tf32 (or tf32=True), bfloat16 or float16.

    Only products are rounded, and those of embeddings are not (`gesso.models.layers.autocast_disabled`). TF32 in
    convolutions, torch's default on GPUs, is off unless selected.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32 or precision == "tf32"
        if precision in ("full", "tf32"):
            yield
        else:
            with torch.autocast(device.type, getattr(torch, precision), cache_enabled=False):
                yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
