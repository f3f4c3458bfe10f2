"""What all recipe blocks are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_LONGEST_NAME, _LONGEST_PATH = 255, 4096


def _path_or_name(text: str) -> str:
    # Found here, with the key's name, and not by whichever function first asks the disk for it.
    try:
        names = text.encode("utf-8").split(b"/")
        Path(text).expanduser()
    except UnicodeEncodeError:
        raise ValueError("is no path or name: it holds half of a character") from None
    except RuntimeError:
        raise ValueError("begins with ~ and the name of a user who has no home folder here") from None
    if "\0" in text:
        raise ValueError("is no path or name: it holds a NUL character")
    if len(text) > _LONGEST_PATH or max(map(len, names)) > _LONGEST_NAME:
        raise ValueError(f"is no path or name: it is longer than {_LONGEST_NAME} bytes between two slashes")
    return text


_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))]
)


def file_name(text: str) -> str:
    """`text`, which is to name a folder; `ValueError` if some system has another use for it."""
    if text.split(".")[0].lower() in _RESERVED or text.endswith("."):
        raise ValueError(f"{text!r} cannot name a folder on every system; choose another")
    return text


Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What NumPy's, torch's and Python's generators all take."""
PathText = Annotated[str, AfterValidator(_path_or_name)]
"""A path or a hub name."""
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
