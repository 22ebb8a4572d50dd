"""What a reader of other people's weights returns, and what readers share."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.config import Inputs, Net
from gesso.errors import RunError, UsageError

HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16, (1536, 24): 24}
"""Heads by width and depth: S, B, L and XL of the DiT family, SD3 medium."""
PARTS = ("weight", "bias")
STEPS = "resampled: n tokens from 0 to n here, from 0 to n - 1 in theirs"
"""GridPosition against numpy's arange: the known difference of positions that are no parameters."""


class Found(NamedTuple):
    """Settings worked out from names and shapes, tensors under our names, and what a user should know.

    notes: source, process, c_noise convention, what was adapted.
    """

    cfg: Net
    inputs: Inputs
    weights: Mapping[str, Tensor]
    notes: dict[str, str]


class Move:
    """Tensors on their way from their names to ours. What is not there is not moved, and missed by the network."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.rest, self.ours = dict(state), {}

    def tensor(self, theirs: str, ours: str) -> None:
        if theirs in self.rest:
            self.ours[ours] = self.rest.pop(theirs)

    def layers(self, pairs: Mapping[str, str]) -> None:
        """Weight and bias of each."""
        for theirs, ours in pairs.items():
            for part in PARTS:
                self.tensor(f"{theirs}.{part}", f"{ours}.{part}")

    def stack(self, theirs: Iterable[str], ours: str) -> None:
        """Several matrices as one, the rows of each after those of the one before."""
        for part in PARTS:
            names = [f"{name}.{part}" for name in theirs]
            if all(name in self.rest for name in names):
                self.ours[f"{ours}.{part}"] = torch.cat([self.rest.pop(name) for name in names])

    def swapped(self, theirs: str, ours: str) -> None:
        """A layer that gives scale, shift, as ours that gives shift, scale."""
        for part in PARTS:
            if f"{theirs}.{part}" in self.rest:
                scale, shift = self.rest.pop(f"{theirs}.{part}").chunk(2)
                self.ours[f"{ours}.{part}"] = torch.cat([shift, scale])

    def last(self, theirs: str, ours: str, patch: int, channels: int) -> None:
        """The layer that gives patch x patch x channels; of 2 x channels (learned sigma) the first half stays."""
        for part in PARTS:
            self.tensor(f"{theirs}.{part}", f"{ours}.{part}")
            rows = self.ours.get(f"{ours}.{part}")
            if rows is not None and len(rows) == patch**2 * 2 * channels:
                self.ours[f"{ours}.{part}"] = rows.unflatten(0, (patch**2, -1))[:, :channels].flatten(0, 1)

    def drop(self, theirs: str) -> None:
        self.rest.pop(theirs, None)

    def done(self) -> dict[str, Tensor]:
        """Ours, and what has no place in the network under its own name, for `nets.misfit` to list."""
        return self.ours | self.rest


def shape(state: Mapping[str, Tensor], name: str) -> torch.Size:
    """Raises RunError where the tensor is missing: without it the network's size is not known."""
    if name not in state:
        raise RunError(f"{name} is missing, and with it the network's settings")
    return state[name].shape


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many N there are in `prefix.N.`, counted from 0 to the largest."""
    numbers = [int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in state if name.startswith(f"{prefix}.")]
    return 1 + max(numbers, default=-1)


def heads_of(width: int, depth: int, heads: int | None, head_width: int | None = None) -> int:
    """Heads as given, as the width of their norm says (qk-norm), or as a known size has them.

    Raises UsageError that asks for them, or says that those given do not fit.
    """
    found = width // head_width if head_width else HEADS.get((width, depth))
    if heads is None and found is None:
        raise UsageError(
            f"the heads of a network of width {width} and depth {depth} are not in its weights; say heads="
        )
    if heads is None:
        return found
    if width % heads or (head_width and heads != found):
        said = f"the norms of its queries say {found}" if head_width else f"its width is {width}"
        raise UsageError(f"heads={heads} does not fit the network: {said}")
    return heads


def sigma_note(rows: int, patch: int, channels: int) -> dict[str, str]:
    """Of the last layer's rows."""
    return {"adapted": "learned sigma left behind"} if rows == patch**2 * 2 * channels else {}
