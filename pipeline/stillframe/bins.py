"""Pictures in bins of a few pixels' side: all that slow changes need, at a fraction of the pixels."""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.ncc import Image, Mask
from stillframe.runs import Places, RowRuns

Float32 = npt.NDArray[np.float32]

SHORT = ("i1", "u1", "i2", "u2")
"""Frames that are read as they are."""


@numba.njit(nogil=True, cache=True)
def _add_row(values: npt.NDArray[Any], base: float, sums: Float32) -> None:
    """Add a row to the sums of its columns."""
    lowest = np.float32(base)
    for x in range(len(values)):
        sums[x] += np.float32(values[x]) - lowest


@numba.njit(nogil=True, cache=True)
def _halve(values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Add up neighbours, two by two."""
    for i in range(len(out)):
        out[i] = values[2 * i] + values[2 * i + 1]


@numba.njit(nogil=True, cache=True)
def fold(values: npt.NDArray[Any], room: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Add up neighbours, two by two, as often as there is room."""
    size = len(values)
    for level in range(len(room)):
        size //= 2
        _halve(values, room[level, :size])
        values = room[level, :size]
    return values


@numba.njit(nogil=True, cache=True)
def store(values: npt.NDArray[Any], factor: Any, out: Float32) -> None:
    """Write multiples: assigning arrays takes seconds to compile, for its errors' texts."""
    part = np.float32(factor)
    for i in range(len(out)):
        out[i] = values[i] * part


@numba.njit(nogil=True, cache=True)
def folds(side: int) -> int:
    """Return how often two and two make one of so many."""
    return int(np.rint(np.log2(side)))


@numba.njit(nogil=True, cache=True)
def bin_sums(image: npt.NDArray[Any], valid: RowRuns, base: float, side: int) -> Float32:
    """Return the sum of (image − base) over the valid pixels of each bin, whose side is a power of 2."""
    runs, firsts = valid
    height, width = image.shape[0] // side, image.shape[1] // side
    out, sums = np.empty((height, width), np.float32), np.empty(image.shape[1], np.float32)
    room = np.empty((folds(side), width * side), np.float32)
    for row in range(height):
        sums[:] = 0
        for k in range(firsts[row * side], firsts[row * side + side]):
            y, first, stop = runs[k]
            _add_row(image[y, first:stop], base, sums[first:stop])
        store(fold(sums[: width * side], room), 1.0, out[row])
    return out


class Single(NamedTuple):
    """A frame that single precision holds: its intensity is ``origin + scale · (value − base)``."""

    values: npt.NDArray[Any]
    base: float
    origin: float
    scale: float


def in_single(frame: npt.NDArray[Any], mean: float, deviation: float) -> Single:
    """Return short integers as they are, and others standardized.

    Parameters
    ----------
    frame : ndarray, shape (y, x)
        Native byte order, finite where valid.
    mean, deviation : float
        About those of its valid pixels.
    """
    if frame.dtype.str[1:] in SHORT:
        base = float(np.float32(mean))
        return Single(frame, base, base, 1.0)
    scale = deviation or 1.0
    return Single(_standardized(frame, mean, scale), 0.0, mean, scale)


@numba.njit(nogil=True, cache=True)
def _standardized(frame: npt.NDArray[Any], origin: float, scale: float) -> Float32:
    """Return (frame − origin) / scale."""
    out = np.empty(frame.shape, np.float32)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = np.float32((np.float64(frame[y, x]) - origin) / scale)
    return out


@numba.njit(nogil=True, cache=True)
def _add_moved(
    values: npt.NDArray[Any], fixed: npt.NDArray[Any], base: float, sums: Float32, products: Float32
) -> None:
    """Add some of a row to the sums of their columns, and add up fixed · value."""
    lowest = np.float32(base)
    for x in range(len(values)):
        value = np.float32(values[x]) - lowest
        sums[x] += value
        products[x] += np.float32(fixed[x]) * value


@numba.njit(nogil=True, cache=True)
def _cut(runs: Places, shift: int, side: int, whole: npt.NDArray[np.bool_], width: int) -> None:
    """Take the bins of a row that hold a pixel between its runs, moved along it, off the whole ones."""
    end = 0
    for k in range(len(runs) + 1):
        begin = min(max(runs[k, 1] + shift, 0), width) if k < len(runs) else width
        for n in range(end // side, min(-(-begin // side), len(whole)) if begin > end else 0):
            whole[n] = False
        end = max(end, min(runs[k, 2] + shift, width)) if k < len(runs) else width


@numba.njit(nogil=True, cache=True)
def moved_bins(
    frame: npt.NDArray[Any],
    valid: RowRuns,
    base: float,
    fixed: npt.NDArray[Any],
    shift: tuple[int, int],
    side: int,
    rows: npt.NDArray[np.int64],
) -> tuple[Float32, Mask, float]:
    """Return means over bins of (frame − base) to which a whole-pixel shift was applied, and which of these are whole.

    A bin with an invalid pixel, or one beyond the frame's border, is not, and has no meaning. Its side is a power of
    2. Only some rows of bins are gone through. The third result is the sum over their valid pixels of
    ``fixed · (frame − base)``.
    """
    height, width = frame.shape
    means = np.zeros((-(-height // side), width // side), np.float32)
    whole = np.zeros(means.shape, np.bool_)
    used, part, right = means.shape[1] * side, np.float32(1 / side**2), shift[1]
    sums, products = np.empty(width, np.float32), np.zeros(width, np.float32)
    room = np.empty((folds(side), used), np.float32)
    for row in rows:
        sums[:], whole[row] = 0, True
        for y in range(row * side, min(row * side + side, height)):
            here = _runs_of_row(valid, y - shift[0])
            for k in range(len(here)):
                begin, end = max(here[k, 1], -right), min(here[k, 2], width - right)
                if begin < end:
                    a, b = begin + right, end + right
                    _add_moved(frame[here[k, 0], begin:end], fixed[y, a:b], base, sums[a:b], products[a:b])
            _cut(here, right, side, whole[row], width)
        store(fold(sums[:used], room), part, means[row])
    total = 0.0
    for x in range(width):
        total += np.float64(products[x])
    return means[: height // side], whole[: height // side], total


@numba.njit(nogil=True, cache=True)
def _runs_of_row(valid: RowRuns, row: int) -> Places:
    """Return the runs of a row; none where there is no such row."""
    runs, firsts = valid
    return runs[firsts[row] : firsts[row + 1]] if 0 <= row < len(firsts) - 1 else runs[:0]


def box_means(image: Image, side: int) -> Image:
    """Return the mean of the square of pixels that begins at each pixel; at the far border squares are cut off.

    Examples
    --------
    >>> box_means(np.arange(9.0).reshape(3, 3), 2)[:2, :2]
    array([[2., 3.],
           [5., 6.]])
    """
    return np.asarray(scipy.ndimage.uniform_filter(image, side, mode="constant", origin=-(side // 2)))


def at_bins(image: npt.NDArray[Any], side: int, place: tuple[int, int] = (0, 0)) -> npt.NDArray[Any]:
    """Return what stands at one place of each bin, (y, x) from its first pixel; beyond the border what is nearest."""
    rows, columns = (
        np.clip(np.arange(length // side) * side + offset, 0, length - 1)
        for length, offset in zip(image.shape, place, strict=True)
    )
    return image[np.ix_(rows, columns)]


def along(image: npt.NDArray[Any], side: int, axis: int) -> list[npt.NDArray[Any]]:
    """Return the first pixels of all bins along one axis, the second ones, and so on."""
    cut = image.shape[axis] // side * side
    return [image[part, :] if axis == 0 else image[:, part] for part in (slice(k, cut, side) for k in range(side))]


def bin_means(image: npt.NDArray[Any], side: int) -> Image:
    """Return the mean of each bin (y, x); pixels beyond the last whole bin are dropped."""
    rows = np.add.reduce(along(image.astype(np.float64, copy=False), side, 0))
    return np.asarray(np.add.reduce(along(rows, side, 1)) / side**2)


def whole_bins(mask: Mask, side: int) -> Mask:
    """Mark the bins all pixels of which are valid."""
    rows = np.logical_and.reduce(along(mask, side, 0))
    return np.asarray(np.logical_and.reduce(along(rows, side, 1)))
