"""Base class of all settings, and field types such as counts that may be written 200k."""

import math
import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Settings(BaseModel):
    """Immutable block of settings that rejects unknown names.

    The string literal under a field is its help text; `gesso config` prints it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def parse_count(value: object) -> object:
    """Return 200k, 1.5M and 1e6 as integers; return any other value unchanged, for the schema to check."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e\+?[0-9]+)?)\s*([kKmM]?)\s*", value)
        if match:
            value = float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]
    if isinstance(value, float) and math.isfinite(value) and value == round(value):
        return round(value)
    return value


def source_path(value: str) -> str:
    """Return `folder:PATH`, as the recipe of own images is written, as PATH; return any other source unchanged."""
    return value.removeprefix("folder:") if len(value) > len("folder:") else value


def parse_list(value: object) -> object:
    """Return `a,b` and `[a,b]` as a list of strings; return a value that is not a string unchanged."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(le=10**15)]
"""Integer up to 10^15 that may also be written 200k, 1.5M or 1e6."""
PositiveCount = Annotated[Count, Field(gt=0)]
Seconds = Annotated[Count, Field(gt=0, le=10**7)]
BatchSize = Annotated[Count, Field(gt=0, le=10**6)]
Edge = Annotated[Count, Field(gt=0, le=65_536)]
"""Height or width in pixels."""
Width = Annotated[int, Field(gt=0, le=65_536)]
"""Channels of a layer, heads or groups."""
Depth = Annotated[int, Field(gt=0, le=1_000)]
"""Number of layers."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""Seed of keyed random numbers, which have 64 bits."""
Factor = Annotated[float, Field(gt=1e-6, lt=1e6)]
"""Positive factor that is not absurd."""
Guidance = Annotated[float, Field(ge=-1000, le=1000)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
SigmaRel = Annotated[float, Field(gt=0, lt=12**-0.5)]
"""Relative EMA length (EDM2 Eq. 123). No power profile exists above 12^-1/2 = 0.2886."""


def halflife_of(decay: float, batch_size: int) -> int:
    """Return the half-life in images of a traditional EMA with factor `decay` per step of `batch_size` images."""
    return max(1, round(batch_size * math.log(2) / -math.log(decay)))
