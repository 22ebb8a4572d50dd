"""What every block of settings shares: frozen, closed, documented; and counts such as 200k."""

import math
import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Settings(BaseModel):
    """A block of settings. A string under a field is its description: `gesso show` prints it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def parse_count(value: object) -> object:
    """Read 200k, 1.5M and 1e6 as whole numbers; leave the rest to the schema."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e\+?[0-9]+)?)\s*([kKmM]?)\s*", value)
        if match:
            value = float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]
    if isinstance(value, float) and value == round(value):
        return round(value)
    return value


def parse_words(value: object) -> object:
    """flip,size as well as [flip, size]."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number; also written 200k, 1.5M or 1e6."""
Positive = Annotated[Count, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
SigmaRel = Annotated[float, Field(gt=0, lt=12**-0.5)]
"""Relative EMA length (EDM2 Eq. 123); above 12^-1/2 = .2886 no power profile exists."""


def halflife_of(decay: float, batch_size: int) -> int:
    """Return the half-life in images of a traditional average that keeps `decay` of itself in every step of a batch."""
    return max(1, round(batch_size * math.log(2) / -math.log(decay)))
