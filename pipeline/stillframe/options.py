"""Types of options that settings, storage and numeric code share; nothing is computed here."""

from typing import Literal

import pydantic
from pydantic import Field

Interpolation = Literal["nearest", "linear", "cubic", "lanczos"]
"""How frames are moved: by whole pixels, or by fractions of a pixel with a filter."""
MissingChunks = Literal["report", "fill"]
"""Meaning of an input chunk without a file: a damaged frame, or the fill value of the array."""
InputCheck = Literal["times", "contents"]
"""How changed input files are noticed: by their modification times, or by checksums of their contents."""


class SearchOptions(pydantic.BaseModel):
    """How far and how finely shifts are searched; stored in every reference and in the settings of a run.

    Examples
    --------
    >>> SearchOptions(max_shift=16).overlap_ratio
    0.3
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_shift: int = Field(default=32, ge=0)
    """Largest shift searched along either axis, pixels."""
    overlap_ratio: float = Field(default=0.3, ge=0, le=1)
    """Smallest overlap at a shift, as a fraction of the largest overlap."""
    saturation: float | None = None
    """Pixel value at which the detector saturates; by default the largest value of an integer dtype."""
    subpixel: bool = True
    """Refine shifts to fractions of a pixel, with their errors."""
