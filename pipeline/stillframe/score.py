"""The exact masked NCC at one shift, for one pass over the pixels.

Of the sums over the pixels that are valid in both images only the product needs all of them; the others are known for
each image alone, and what does not meet a valid pixel of the other (the border, the holes of its mask) is taken off.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.bins import Single
from stillframe.ncc import Mask
from stillframe.runs import Places, RowRuns
from stillframe.survey import Statistics


class Moments(NamedTuple):
    """How many pixels there are, their sum and that of their squares."""

    pixels: int
    total: float
    squares: float


def holes_of(mask: Mask) -> RowRuns:
    """Find the runs of invalid pixels."""
    return RowRuns.of(~mask)


class Picture(NamedTuple):
    """One of two images to be compared."""

    values: npt.NDArray[Any]
    """Pixels (y, x)."""
    mask: Mask
    base: float
    """To be taken off each pixel."""
    moments: Moments
    """Of the valid pixels, the base taken off."""
    holes: RowRuns

    @classmethod
    def of(cls, frame: Single, mask: Mask, seen: Statistics, pixels: int, holes: RowRuns) -> "Picture":
        """Describe a frame of which the statistics are known."""
        above, deviation = (seen.mean - frame.origin) / frame.scale, seen.deviation / frame.scale
        moments = Moments(pixels, pixels * above, pixels * (deviation**2 + above**2))
        return cls(frame.values, mask, frame.base, moments, holes)


def masked_score(product: float, moved: Moments, fixed: Moments) -> float:
    """Return the masked NCC from sums over the pixels valid in both images; NaN without contrast.

    ``product`` is the sum of both images' pixels multiplied.
    """
    count = moved.pixels
    if count < 2:
        return np.nan
    variation = [sums.squares - sums.total**2 / count for sums in (moved, fixed)]
    if min(variation) <= 0:
        return np.nan
    score = (product - moved.total * fixed.total / count) / np.sqrt(variation[0] * variation[1])
    return float(np.clip(score, -1, 1))


def meeting(picture: Picture, others: RowRuns, shift: tuple[int, int]) -> Moments:
    """Sums over the valid pixels of one image which, moved by a shift (y, x), fall on valid ones of the other."""
    pixels, total, squares = _lost(picture.values, picture.mask, picture.base, *others, shift)
    known = picture.moments
    return Moments(known.pixels - pixels, known.total - total, known.squares - squares)


@numba.njit(nogil=True, cache=True)
def _sum_row(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], base: float) -> tuple[int, float, float]:
    """Sum some valid pixels of a row."""
    count, total, squares = 0, 0.0, 0.0
    for x in range(len(values)):
        value = np.float64(values[x]) - base if valid[x] else 0.0
        count += valid[x]
        total += value
        squares += value * value
    return count, total, squares


@numba.njit(nogil=True, cache=True)
def _lost(
    values: npt.NDArray[Any],
    mask: Mask,
    base: float,
    runs: Places,
    firsts: npt.NDArray[np.int64],
    shift: tuple[int, int],
) -> tuple[int, float, float]:
    """Sum the valid pixels which, moved by a shift, fall on a hole or beyond the border."""
    height, width = values.shape
    first, last = max(0, -shift[1]), min(width, width - shift[1])
    count, total, squares = 0, 0.0, 0.0
    for y in range(height):
        row = y + shift[0]
        meets = 0 <= row < height and first < last
        holes = (firsts[row], firsts[row + 1]) if meets else (0, 0)
        for k in range(holes[0] - 2, holes[1]):
            if k == holes[0] - 2:
                begin, end = 0, first if meets else width
            elif k == holes[0] - 1:
                begin, end = last if meets else width, width
            else:
                begin, end = max(first, runs[k, 1] - shift[1]), min(last, runs[k, 2] - shift[1])
            if begin < end:
                n, one, two = _sum_row(values[y, begin:end], mask[y, begin:end], base)
                count, total, squares = count + n, total + one, squares + two
    return count, total, squares
