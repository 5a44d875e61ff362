"""The record of a registered frame: its dtype, and how it is built."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stillframe.flags import FLAG_DTYPE, Flag
from stillframe.images.arrays import Image

if TYPE_CHECKING:  # loads SciPy, which a reader of records does without
    from stillframe.registration.peak import Peak

MATCH_DTYPE = np.dtype(
    [(name, np.float64) for name in ("dy", "dx", "sigma_y", "sigma_x", "cov_yx")]
    + [(name, np.float64) for name in ("score", "second_score", "overlap", "intensity")]
    + [("flag", FLAG_DTYPE)]
)
"""One record per frame; :func:`~stillframe.match_frames` gives units and meaning of the fields."""

WHOLE_PIXEL_SIGMA = 12**-0.5
"""Standard error, pixels, of a shift rounded to whole pixels when every fraction is equally likely."""

Matches = npt.NDArray[np.void]
"""Records (frame,) of :data:`MATCH_DTYPE`."""

Record = tuple[Any, ...]
"""One record of :data:`MATCH_DTYPE`."""


def no_match(flag: Flag, intensity: float = np.nan) -> Record:
    """Return the record of a frame that was not compared, with the reason."""
    return (*[np.nan] * 8, intensity, int(flag))


def record_without_shift(peak: "Peak", pixels: int, intensity: float, flag: Flag) -> Record:
    """Return the record of a frame whose highest peak is refused, with the reason.

    ``pixels`` is the number of trusted pixels of the reference, ``intensity`` the mean of the frame's valid pixels.
    """
    return (*[np.nan] * 5, peak.score, peak.second_score, peak.pixels / pixels, intensity, int(flag))


def record_with_shift(
    peak: "Peak", pixels: int, intensity: float, flag: Flag, shift: Image, covariance: Image
) -> Record:
    """Return the record of a frame with a shift (y, x), pixels, and its covariance (2, 2), px²."""
    sigma = np.sqrt(np.maximum(np.diag(covariance), 0))
    numbers = (float(value) for value in (*shift, *sigma, covariance[0, 1]))
    return (*numbers, *record_without_shift(peak, pixels, intensity, flag)[5:])


def record_of_whole_pixels(peak: "Peak", pixels: int, intensity: float, flag: Flag) -> Record:
    """Return the record of a frame whose whole-pixel shift is kept, with the error of rounding."""
    shift, covariance = np.array(peak.shift, dtype=np.float64), np.diag([WHOLE_PIXEL_SIGMA**2] * 2)
    return record_with_shift(peak, pixels, intensity, flag, shift, covariance)
