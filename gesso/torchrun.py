"""Rank of this process from the environment variables of torchrun; imports no torch."""

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """Rank of this process among all ranks and among those of its machine; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def rank_from_env() -> RankInfo:
    """Return the rank that torchrun gave this process, or that of a single process."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return RankInfo(*(int(os.environ.get(name, default)) for name, default in zip(variables, RankInfo(), strict=True)))
