"""What a reader of other people's weights returns."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from gesso.config import Inputs, Net


class Found(NamedTuple):
    """Settings worked out from names and shapes, tensors under our names, and what a user should know.

    notes: source, process, c_noise convention, what was adapted.
    """

    cfg: Net
    inputs: Inputs
    weights: Mapping[str, Tensor]
    notes: dict[str, str]
