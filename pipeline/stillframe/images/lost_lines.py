"""Lost rows and columns of a frame: all their pixels have the same value, where counts should differ.

The sums over bins of the first pass over a frame show them: a row of bins of which all are equal. That is looked at in
passing, since the first two bins of a row differ as a rule. Only where a row is left, pixels are read again.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Float32, Image, Mask, Pixels

Lines = npt.NDArray[np.bool_]
"""True for some of the rows or of the columns of bins."""

_LEAST_BINS = 4
"""A line of fewer whole bins is not judged."""


class Lost(NamedTuple):
    """Rows and columns of bins whose whole bins have all the same sum."""

    rows: Lines
    columns: Lines

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.rows.any() or self.columns.any())


def equal_lines(bins: Float32, whole: Mask) -> Lost:
    """Return the rows and columns of bins whose whole bins, at least four of them, have all the same sum.

    ``whole`` is True for bins without an invalid pixel.

    Examples
    --------
    >>> bins = np.arange(30, dtype=np.float32).reshape(5, 6)
    >>> bins[2] = 7
    >>> np.flatnonzero(equal_lines(bins, bins >= 0).rows)
    array([2])
    """
    return Lost(_equal_rows(bins, whole), _equal_rows(bins.T, whole.T))


@numba.njit(nogil=True, cache=True)
def _equal_rows(bins: Float32, whole: Mask) -> Lines:
    """Return which rows are equal throughout; most rows end at their second bin."""
    equal = np.zeros(len(bins), np.bool_)
    for row in range(len(bins)):
        count, first, same = 0, np.float32(0), True
        for column in range(bins.shape[1]):
            if whole[row, column]:
                first = bins[row, column] if count == 0 else first
                count += 1
                if bins[row, column] != first:
                    same = False
                    break
        equal[row] = same and count >= _LEAST_BINS
    return equal


def line_variances(image: Image, mask: Mask, side: int) -> tuple[Image, Image]:
    """Return the variance of the valid pixels of an image in each row and in each column of bins; 0 without pixels."""
    rows, columns = image.shape[0] // side * side, image.shape[1] // side * side
    values, valid = np.where(mask, image, 0.0)[:rows, :columns], mask[:rows, :columns]
    return _variances(values, valid, side), _variances(values.T, valid.T, side)


def _variances(values: Image, valid: Mask, side: int) -> Image:
    blocks, counted = values.reshape(len(values) // side, -1), valid.reshape(len(values) // side, -1)
    counts = np.maximum(np.count_nonzero(counted, axis=1), 1)
    means = blocks.sum(axis=1) / counts
    return np.asarray(np.maximum((blocks**2).sum(axis=1) / counts - means**2, 0.0))


def pixels_that_should_differ(
    frame: Pixels, valid: Mask, lost: Lost, usual: tuple[Image, Image], limit: float, side: int
) -> float:
    """Return how many pixels of the lost lines would have another value in a normal frame.

    The expectation comes from the fraction of all pixels that differ from that value. ``usual`` is the variance that is
    expected of rows and of columns of bins, relative to that of the whole frame: in a frame of few counts a line has a
    share of the pixels that differ from 0 as it has a share of the counts. Lines that are not of one value throughout,
    of another value than the first line, or at the detector's limit do not count.
    ``side`` is that of a bin, pixels.
    """
    value = _value_of(frame, valid, lost, side)
    if value is None or value >= limit:
        return 0.0
    differing = float(np.mean(frame[valid] != value))
    expected = 0.0
    for equal, share, image, mask in ((lost.rows, usual[0], frame, valid), (lost.columns, usual[1], frame.T, valid.T)):
        for line in np.flatnonzero(equal):
            block = slice(line * side, line * side + side)
            pixels = image[block][mask[block]]
            if (pixels == value).all():
                expected += differing * len(pixels) * min(1.0, float(share[line]))
    return expected


def _value_of(frame: Pixels, valid: Mask, lost: Lost, side: int) -> float | None:
    """Return the value of the first pixel of the lost lines; None without a valid pixel."""
    inside = np.zeros_like(valid)
    rows, columns = np.repeat(lost.rows, side), np.repeat(lost.columns, side)
    inside[: len(rows)] |= rows[:, None]
    inside[:, : len(columns)] |= columns
    values = frame[inside & valid]
    return float(values[0]) if len(values) else None
