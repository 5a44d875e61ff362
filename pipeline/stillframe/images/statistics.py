"""Statistics of a frame's valid pixels, and its sums over bins, from one pass over short integers or three over others.

Short integers are summed in single precision, relative to a base near their mean; other dtypes in double precision.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from stillframe.images.arrays import Float32, Image, Pixels
from stillframe.images.binning import (
    SHORT_INTEGERS,
    SingleFrame,
    add_neighbours,
    bin_sums,
    doublings,
    in_single_precision,
    write_scaled,
)
from stillframe.images.corrections import Corrections
from stillframe.images.run_lengths import RowRuns, Runs

_LARGEST = np.finfo(np.float64).max
"""Pixels of a larger absolute value are not finite."""
_BASE_RUNS = 32
"""Number of runs of pixels from which the base is estimated."""


class Statistics(NamedTuple):
    """Statistics of the valid pixels of an image; mean, deviation and range are those of its finite pixels."""

    mean: float
    deviation: float
    """Standard deviation."""
    smallest: float
    largest: float
    not_finite: int
    """Number of pixels that are NaN or infinite."""
    saturated: int
    """Number of pixels at the detector's limit or above."""


class Survey(NamedTuple):
    """Statistics of a frame, the frame as single precision holds it, and its sums over bins."""

    statistics: Statistics
    single: SingleFrame
    bins: Float32
    """Sum over the valid pixels of each bin, each less the base of ``single``; (y, x) are bins."""
    side: int
    """Side of a bin, pixels."""
    valid: RowRuns
    """The valid pixels."""


def survey(frame: Pixels, valid: RowRuns, limit: float, side: int) -> Survey:
    """Return statistics and bins of a frame (y, x) in native byte order.

    ``limit`` is the pixel value from which the detector is saturated; ``side``, pixels, is a power of 2.
    """
    if frame.dtype.str[1:] in SHORT_INTEGERS and len(valid.runs):
        return _survey_counts(frame, valid, limit, side)
    values = statistics(frame, valid, limit)
    single = in_single_precision(frame, values.mean, values.deviation)
    return Survey(values, single, bin_sums(single.values, valid, single.base, side), side, valid)


def survey_corrected(
    recorded: Pixels, corrections: Corrections, valid: RowRuns, limit: float, side: int
) -> tuple[Float32, Survey]:
    """Return a recorded frame (y, x) in corrected counts, and its survey; ``limit`` is compared with recorded counts.

    Short integers stay within the reach of single precision when they are corrected, so one pass suffices for them.
    """
    counts, largest = corrections.correct(recorded)
    short = recorded.dtype.str[1:] in SHORT_INTEGERS and len(valid.runs) > 0
    surveyed = _survey_counts(counts, valid, np.inf, side) if short else survey(counts, valid, np.inf, side)
    reached = recorded.dtype.kind == "f" or largest >= limit  # a NaN may hide the largest pixel
    saturated = _count_from(recorded, valid.runs, limit) if reached else 0
    return counts, surveyed._replace(statistics=surveyed.statistics._replace(saturated=saturated))


def _survey_counts(frame: Pixels, valid: RowRuns, limit: float, side: int) -> Survey:
    pixels, (height, width) = valid.pixels, frame.shape
    base = float(np.rint(_estimate_mean(frame, valid.runs)))
    bins, squares, smallest, largest = _sum_counts(frame, valid, base, side)
    above = float(bins.sum(dtype=np.float64)) / pixels
    deviation = float(np.sqrt(max(float(squares.sum()) / pixels - above**2, 0.0)))
    saturated = _count_from(frame, valid.runs, limit) if largest >= limit else 0
    values = Statistics(base + above, deviation, float(smallest), float(largest), 0, saturated)
    single = SingleFrame(frame, base, base, 1.0)
    return Survey(values, single, bins[: height // side, : width // side], side, valid)


@numba.njit(nogil=True, cache=True)
def _estimate_mean(frame: Pixels, runs: Runs) -> float:
    """Return the mean of the pixels of some runs. Sums of pixels less a number near their mean stay small."""
    total, count = np.int64(0), 0
    for k in range(0, len(runs), max(1, len(runs) // _BASE_RUNS)):
        row, first, stop = runs[k]
        for x in range(first, stop):
            total += np.int64(frame[row, x])
        count += stop - first
    return total / count


@numba.njit(nogil=True, cache=True)
def _sum_counts(frame: Pixels, valid: RowRuns, base: float, side: int) -> tuple[Float32, Image, Any, Any]:
    """Return sums of (frame − base) over bins, sums of its squares over columns of bins, smallest and largest pixel.

    Bins that the border cuts off are included. Sums are taken down columns and then pairwise along the row, so that the
    compiler can add many pixels at a time and every instruction set gives identical bits.
    """
    runs, firsts = valid
    height, width = frame.shape
    rows, columns = -(-height // side), -(-width // side)
    bins, total = np.empty((rows, columns), np.float32), np.zeros(columns)
    sums, squares = np.empty(columns * side, np.float32), np.empty(columns * side, np.float32)
    workspace = np.empty((doublings(side), columns * side), np.float32)
    low = high = frame[runs[0, 0], runs[0, 1]]
    for row in range(rows):
        sums[:], squares[:] = 0, 0
        for k in range(firsts[row * side], firsts[min(row * side + side, height)]):
            y, first, stop = runs[k]
            _add_squares(frame[y, first:stop], base, sums[first:stop], squares[first:stop])
            low, high = _range(frame[y, first:stop], low, high)
        write_scaled(add_neighbours(sums, workspace), 1.0, bins[row])
        _add_to(total, add_neighbours(squares, workspace))
    return bins, total, low, high


@numba.njit(nogil=True, cache=True)
def _add_squares(values: Pixels, base: float, sums: Float32, squares: Float32) -> None:
    single_base = np.float32(base)
    for x in range(len(values)):
        value = np.float32(values[x]) - single_base
        sums[x] += value
        squares[x] += value * value


@numba.njit(nogil=True, cache=True)
def _range(values: Pixels, low: Any, high: Any) -> tuple[Any, Any]:
    for x in range(len(values)):
        low, high = min(low, values[x]), max(high, values[x])
    return low, high


@numba.njit(nogil=True, cache=True)
def _add_to(total: Image, values: Float32) -> None:
    for x in range(len(total)):
        total[x] += np.float64(values[x])


@numba.njit(nogil=True, cache=True)
def _count_from(frame: Pixels, runs: Runs, limit: float) -> int:
    """Return how many pixels of the runs are at the limit or above."""
    count = 0
    for k in range(len(runs)):
        row, first, stop = runs[k]
        for x in range(first, stop):
            count += frame[row, x] >= limit
    return count


@numba.njit(nogil=True, cache=True)
def statistics(frame: Pixels, valid: RowRuns, limit: float) -> Statistics:
    """Return the statistics of the valid pixels of an image (y, x) of any real dtype, summed in double precision.

    Pixels are summed less a pivot, the first finite one, so that a pedestal costs no precision.
    """
    runs, firsts = valid
    total, squares, smallest, largest = 0.0, 0.0, np.inf, -np.inf
    count, not_finite, saturated = 0, 0, 0
    pivot = _first_finite(frame, runs)
    for y in range(len(firsts) - 1):
        row_total, row_squares = 0.0, 0.0
        for k in range(firsts[y], firsts[y + 1]):
            for x in range(runs[k, 1], runs[k, 2]):
                value = np.float64(frame[y, x])
                finite = abs(value) <= _LARGEST
                above = value - pivot if finite else 0.0
                row_total += above
                row_squares += above * above
                smallest = min(smallest, value if finite else np.inf)
                largest = max(largest, value if finite else -np.inf)
                count += int(finite)
                not_finite += not finite
                saturated += int(finite & (value >= limit))
        total, squares = total + row_total, squares + row_squares
    mean = total / max(count, 1)
    deviation = np.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
    return Statistics(pivot + mean if count else 0.0, deviation, smallest, largest, not_finite, saturated)


@numba.njit(nogil=True, cache=True)
def _first_finite(frame: Pixels, runs: Runs) -> float:
    """Return the first finite pixel of the runs; NaN without one."""
    for k in range(len(runs)):
        for x in range(runs[k, 1], runs[k, 2]):
            if abs(np.float64(frame[runs[k, 0], x])) <= _LARGEST:
                return np.float64(frame[runs[k, 0], x])
    return np.nan
