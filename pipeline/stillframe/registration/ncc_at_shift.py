"""The exact masked NCC at one whole-pixel shift, for one pass over the pixels.

Of the sums over the pixels valid in both images only the product needs all of them. The moments of each image alone are
computed once; the pixels that do not meet a valid pixel of the other image (at the border, under the holes of its mask)
are subtracted from them (43).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Mask, Pixels, Shift
from stillframe.images.binning import SingleFrame, moved_bins
from stillframe.images.run_lengths import RowRuns, ValidPixels
from stillframe.images.statistics import Statistics

_ROWS = 8
"""Rows of pixels that are summed at a time where only the product is wanted."""


class Moments(NamedTuple):
    """Number of pixels, their sum and the sum of their squares."""

    pixels: int
    total: float
    squares: float


class Picture(NamedTuple):
    """One of the two images that are compared."""

    values: Pixels
    """Pixels (y, x)."""
    base: float
    """Subtracted from each pixel."""
    valid: ValidPixels
    moments: Moments
    """Moments of the valid pixels less the base."""

    @classmethod
    def of(cls, frame: SingleFrame, valid: ValidPixels, pixels: Statistics) -> "Picture":
        """Return a frame with its moments, from the statistics of its valid pixels."""
        above, deviation = (pixels.mean - frame.origin) / frame.scale, pixels.deviation / frame.scale
        moments = Moments(valid.pixels, valid.pixels * above, valid.pixels * (deviation**2 + above**2))
        return cls(frame.values, frame.base, valid, moments)

    def meeting(self, other: ValidPixels, shift: Shift) -> Moments:
        """Return the moments of the valid pixels that, moved by a shift (y, x), fall on valid pixels of the other."""
        pixels, total, squares = _lost(self.values, self.valid.mask, self.base, other.holes, shift)
        whole = self.moments
        return Moments(whole.pixels - pixels, whole.total - total, whole.squares - squares)


@dataclass(frozen=True, eq=False)
class ScoreAtShift:
    """A reference prepared for scores at single shifts."""

    picture: Picture
    """The reference; the unit of its pixels does not matter."""
    frame_pixels: ValidPixels
    """Valid pixels of frames without a mask of their own."""
    _moments: dict[Shift, Moments] = field(default_factory=dict)
    """Moments of the reference at the shifts met so far: drift is slow, so that few shifts recur again and again."""

    @classmethod
    def of(cls, image: Pixels, valid: ValidPixels, frame_pixels: ValidPixels) -> "ScoreAtShift":
        """Prepare an image (y, x), 0 where invalid."""
        values = image[valid.mask].astype(np.float64)
        moments = Moments(values.size, float(values.sum()), float(values @ values))
        return cls(Picture(image, 0.0, valid, moments), frame_pixels)

    def __call__(
        self, shift: Shift, frame: SingleFrame, pixels: Statistics, valid: ValidPixels, product: float | None = None
    ) -> tuple[float, int]:
        """Return the masked NCC at one whole-pixel shift (y, x), and the number of pixels valid in both images.

        ``product`` is Σ reference · (frame − base) at this shift if it was computed before.
        """
        if product is None:
            rows = np.arange(-(-len(frame.values) // _ROWS))
            image = self.picture.values
            product = moved_bins(frame.values, valid.valid, frame.base, image, shift, _ROWS, rows).product
        moved = Picture.of(frame, valid, pixels).meeting(self.picture.valid, shift)
        return masked_score(product, moved, self._fixed_moments(valid, shift)), moved.pixels

    def _fixed_moments(self, valid: ValidPixels, shift: Shift) -> Moments:
        """Return the moments of the reference where the moved frame is valid."""
        back = (-shift[0], -shift[1])
        if valid is not self.frame_pixels:
            return self.picture.meeting(valid, back)
        if shift not in self._moments:
            self._moments[shift] = self.picture.meeting(valid, back)
        return self._moments[shift]


def masked_score(product: float, moved: Moments, fixed: Moments) -> float:
    """Return the masked NCC from product and moments of the pixels valid in both images; NaN without contrast."""
    count = moved.pixels
    if count < 2:
        return np.nan
    variation = [sums.squares - sums.total**2 / count for sums in (moved, fixed)]
    if min(variation) <= 0:
        return np.nan
    score = (product - moved.total * fixed.total / count) / np.sqrt(variation[0] * variation[1])
    return float(np.clip(score, -1, 1))


@numba.njit(nogil=True, cache=True)
def _sum_row(values: Pixels, valid: npt.NDArray[np.bool_], base: float) -> tuple[int, float, float]:
    """Return the number of valid pixels of a row, and sum and sum of squares of (value − base)."""
    count, total, squares = 0, 0.0, 0.0
    for x in range(len(values)):
        value = np.float64(values[x]) - base if valid[x] else 0.0
        count += valid[x]
        total += value
        squares += value * value
    return count, total, squares


@numba.njit(nogil=True, cache=True)
def _lost(values: Pixels, mask: Mask, base: float, holes: RowRuns, shift: Shift) -> tuple[int, float, float]:
    """Return number, sum and sum of squares of the valid pixels that, moved by a shift, meet no valid pixel.

    They fall on a hole of the other image, or beyond its border.
    """
    runs, firsts = holes
    height, width = values.shape
    first, last = max(0, -shift[1]), min(width, width - shift[1])
    count, total, squares = 0, 0.0, 0.0
    for y in range(height):
        row = y + shift[0]
        inside = 0 <= row < height and first < last
        begin_hole, end_hole = (firsts[row], firsts[row + 1]) if inside else (0, 0)
        # Two more intervals before the holes: left and right of what falls inside.
        for k in range(begin_hole - 2, end_hole):
            if k == begin_hole - 2:
                begin, end = 0, first if inside else width
            elif k == begin_hole - 1:
                begin, end = last if inside else width, width
            else:
                begin, end = max(first, runs[k, 1] - shift[1]), min(last, runs[k, 2] - shift[1])
            if begin < end:
                n, one, two = _sum_row(values[y, begin:end], mask[y, begin:end], base)
                count, total, squares = count + n, total + one, squares + two
    return count, total, squares
