"""What every section of the configuration is made of: frozen models, and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Upper bounds keep out slips of the keyboard, such as 1e12 samples, which would end in a full memory or never end.
_MAX_NUMBER = 10**9
_MAX_SAMPLES = 10**5
_MAX_PROCESSES = 10**4

PositiveInt = Annotated[int, Field(ge=1, le=_MAX_NUMBER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_NUMBER)]
PositiveFloat = Annotated[float, Field(gt=0, le=_MAX_NUMBER)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_MAX_NUMBER)]
SampleCount = Annotated[int, Field(ge=1, le=_MAX_SAMPLES)]
OptionalSampleCount = Annotated[int, Field(ge=0, le=_MAX_SAMPLES)]
ProcessCount = Annotated[int, Field(ge=1, le=_MAX_PROCESSES)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ByteCount = Annotated[int, Field(ge=1, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and refuses what it does not know. The text below a field is its explanation, for users."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
