"""What a first pass over a frame tells: its statistics, and its bins for a search at a fraction of the pixels."""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.bins import SHORT, Float32, Single, bin_sums, fold, folds, in_single, store
from stillframe.ncc import Mask
from stillframe.runs import Places, RowRuns

_LARGEST = np.finfo(np.float64).max
"""What is larger is not finite."""
_LOOKS = 32
"""So many runs of pixels suffice to tell about what the mean is."""


class Statistics(NamedTuple):
    """What a first pass over a frame's valid pixels tells."""

    mean: float
    deviation: float
    smallest: float
    largest: float
    not_finite: int
    saturated: int


class Survey(NamedTuple):
    """A frame that was gone through once."""

    seen: Statistics
    single: Single
    """The frame for single precision."""
    bins: Float32
    """Sums of the valid pixels of each bin, the base of ``single`` taken off each pixel."""
    side: int
    """Pixels of a bin along either axis."""
    valid: RowRuns
    """The pixels that were gone through."""


def survey(frame: npt.NDArray[Any], mask: Mask, valid: RowRuns, limit: float, side: int) -> Survey:
    """Go through a frame: integers of up to two bytes in a single pass, others in three.

    Parameters
    ----------
    frame : ndarray, shape (y, x)
        Native byte order.
    mask, valid : ndarray of bool, shape (y, x), and RowRuns
        Its valid pixels, twice.
    limit : float
        Pixels that reach it count as saturated.
    side : int
        Pixels of a bin along either axis, a power of 2.
    """
    if frame.dtype.str[1:] not in SHORT:
        seen = statistics(frame, mask, limit)
        single = in_single(frame, seen.mean, seen.deviation)
        return Survey(seen, single, bin_sums(single.values, valid, single.base, side), side, valid)
    pixels, (height, width) = valid.pixels, frame.shape
    if not pixels:
        empty = np.zeros((height // side, width // side), np.float32)
        return Survey(Statistics(0.0, 0.0, np.inf, -np.inf, 0, 0), in_single(frame, 0.0, 1.0), empty, side, valid)
    base = float(np.rint(_about(frame, valid.runs)))
    bins, squares, smallest, largest = _go_through(frame, valid, base, side)
    above = float(bins.sum(dtype=np.float64)) / pixels
    deviation = float(np.sqrt(max(float(squares.sum()) / pixels - above**2, 0.0)))
    saturated = _reaching(frame, valid.runs, limit) if largest >= limit else 0
    seen = Statistics(base + above, deviation, float(smallest), float(largest), 0, saturated)
    return Survey(seen, Single(frame, base, base, 1.0), bins[: height // side, : width // side], side, valid)


@numba.njit(nogil=True, cache=True)
def _about(frame: npt.NDArray[Any], runs: Places) -> float:
    """Mean of the pixels of some runs: no more than a number to take off that keeps sums small."""
    total, count = np.int64(0), 0
    for k in range(0, len(runs), max(1, len(runs) // _LOOKS)):
        row, first, stop = runs[k]
        for x in range(first, stop):
            total += np.int64(frame[row, x])
        count += stop - first
    return total / count


@numba.njit(nogil=True, cache=True)
def _go_through(
    frame: npt.NDArray[Any], valid: RowRuns, base: float, side: int
) -> tuple[Float32, npt.NDArray[np.float64], Any, Any]:
    """Sums of (frame − base) over bins, bins that are cut off at the border too; its squares; and the range.

    Sums over columns and folds of neighbours give every machine code the same bits, many pixels at a time.
    """
    runs, firsts = valid
    height, width = frame.shape
    rows, columns = -(-height // side), -(-width // side)
    bins, total = np.empty((rows, columns), np.float32), np.zeros(columns)
    sums, squares = np.empty(columns * side, np.float32), np.empty(columns * side, np.float32)
    room = np.empty((folds(side), columns * side), np.float32)
    low = high = frame[runs[0, 0], runs[0, 1]]
    for row in range(rows):
        sums[:], squares[:] = 0, 0
        for k in range(firsts[row * side], firsts[min(row * side + side, height)]):
            y, first, stop = runs[k]
            _add_squares(frame[y, first:stop], base, sums[first:stop], squares[first:stop])
            low, high = _range(frame[y, first:stop], low, high)
        store(fold(sums, room), 1.0, bins[row])
        _add_to(total, fold(squares, room))
    return bins, total, low, high


@numba.njit(nogil=True, cache=True)
def _add_squares(values: npt.NDArray[Any], base: float, sums: Float32, squares: Float32) -> None:
    lowest = np.float32(base)
    for x in range(len(values)):
        value = np.float32(values[x]) - lowest
        sums[x] += value
        squares[x] += value * value


@numba.njit(nogil=True, cache=True)
def _range(values: npt.NDArray[Any], low: Any, high: Any) -> tuple[Any, Any]:
    for x in range(len(values)):
        low, high = min(low, values[x]), max(high, values[x])
    return low, high


@numba.njit(nogil=True, cache=True)
def _add_to(total: npt.NDArray[np.float64], values: Float32) -> None:
    for x in range(len(total)):
        total[x] += np.float64(values[x])


@numba.njit(nogil=True, cache=True)
def _reaching(frame: npt.NDArray[Any], runs: Places, limit: float) -> int:
    """Count the pixels at the limit."""
    count = 0
    for k in range(len(runs)):
        row, first, stop = runs[k]
        for x in range(first, stop):
            count += frame[row, x] >= limit
    return count


@numba.njit(nogil=True, cache=True)
def statistics(frame: npt.NDArray[Any], mask: Mask, limit: float) -> Statistics:
    """Mean, standard deviation and range of the valid pixels, how many are not finite or reach the limit."""
    total, squares, smallest, largest = 0.0, 0.0, np.inf, -np.inf
    count, not_finite, saturated = 0, 0, 0
    pivot = _first_valid(frame, mask)
    for y in range(frame.shape[0]):
        a, b, low, high, n, odd, full = _row_statistics(frame[y], mask[y], pivot, limit)
        total, squares, smallest, largest = total + a, squares + b, min(smallest, low), max(largest, high)
        count, not_finite, saturated = count + n, not_finite + odd, saturated + full
    mean = total / max(count, 1)
    deviation = np.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
    return Statistics(pivot + mean, deviation, smallest, largest, not_finite, saturated)


@numba.njit(nogil=True, cache=True)
def _row_statistics(
    values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], pivot: float, limit: float
) -> tuple[float, float, float, float, int, int, int]:
    """Sum and sum of squares less a pivot, range, and how many are valid, not finite, at the limit."""
    total, squares, smallest, largest = 0.0, 0.0, np.inf, -np.inf
    count, not_finite, saturated = 0, 0, 0
    for x in range(len(values)):
        value = np.float64(values[x])
        seen, known = valid[x], abs(value) <= _LARGEST
        good = seen & known
        above = value - pivot if good else 0.0
        total += above
        squares += above * above
        smallest = min(smallest, value if good else np.inf)
        largest = max(largest, value if good else -np.inf)
        count += good
        not_finite += seen & (not known)
        saturated += good & (value >= limit)
    return total, squares, smallest, largest, count, not_finite, saturated


@numba.njit(nogil=True, cache=True)
def _first_valid(frame: npt.NDArray[Any], mask: Mask) -> float:
    """The first valid pixel that is finite; NaN without one."""
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if mask[y, x] and abs(np.float64(frame[y, x])) <= _LARGEST:
                return np.float64(frame[y, x])
    return np.nan
