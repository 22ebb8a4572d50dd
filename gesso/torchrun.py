"""Which of how many processes of one torchrun this is, by the environment that torchrun gives; alone, 0 of 1."""

import os
from typing import NamedTuple


class Place(NamedTuple):
    """rank of world; `local` of `per_node` on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    per_node: int = 1


def place() -> Place:
    names = zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), Place(), strict=True)
    return Place(*(int(os.environ.get(name, alone)) for name, alone in names))
