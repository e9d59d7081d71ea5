"""What settings are made of: numbers with bounds, and groups that never change."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _not_bool(value: object) -> object:
    # Python counts True as 1; in a recipe it is a slip.
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "Input should be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[Float, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Pixels = Annotated[Int, Field(ge=8)]


class Frozen(BaseModel):
    """A settings group: unknown keys are refused, values never change after validation.

    A validator's message starts with the field it is about, so that the loader can put the group's name before it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
