"""What all recipe blocks are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
TokenBudget = Count | Literal["auto"]
"""Tokens that a forward pass computes at a time; `auto`: as free memory allows."""
Settings = dict[str, Any]
"""Keyword arguments of another library's configuration, checked against that library when used."""


class Block(BaseModel):
    """Base of all recipe blocks."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
