"""Images in square bins of a few pixels' side, which keep all smooth structure in far fewer values."""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.images.arrays import Float32, Image, Indices, Mask, Pixels
from stillframe.images.run_lengths import RowRuns, Runs

SHORT_INTEGERS = ("i1", "u1", "i2", "u2")
"""Dtypes of frames that are computed from without a conversion: single precision holds their values exactly."""


class SingleFrame(NamedTuple):
    """A frame whose values single precision holds: intensity = ``origin + scale · (value − base)``."""

    values: Pixels
    """Pixels (y, x)."""
    base: float
    origin: float
    scale: float


def in_single_precision(frame: Pixels, mean: float, deviation: float) -> SingleFrame:
    """Return short integers as they are, and frames of other dtypes standardized by their approximate statistics."""
    if frame.dtype.str[1:] in SHORT_INTEGERS:
        base = float(np.float32(mean))
        return SingleFrame(frame, base, base, 1.0)
    scale = deviation or 1.0
    return SingleFrame(_standardized(frame, mean, scale), 0.0, mean, scale)


@numba.njit(nogil=True, cache=True)
def _standardized(frame: Pixels, origin: float, scale: float) -> Float32:
    """Return (frame − origin) / scale."""
    out = np.empty(frame.shape, np.float32)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = np.float32((np.float64(frame[y, x]) - origin) / scale)
    return out


@numba.njit(nogil=True, cache=True)
def bin_sums(image: Pixels, valid: RowRuns, base: float, side: int) -> Float32:
    """Return the sum of (image − base) over the valid pixels of each whole bin; its side is a power of 2."""
    runs, firsts = valid
    height, width = image.shape[0] // side, image.shape[1] // side
    out, sums = np.empty((height, width), np.float32), np.empty(image.shape[1], np.float32)
    workspace = np.empty((doublings(side), width * side), np.float32)
    for row in range(height):
        sums[:] = 0
        for k in range(firsts[row * side], firsts[row * side + side]):
            y, first, stop = runs[k]
            _add_row(image[y, first:stop], base, sums[first:stop])
        write_scaled(add_neighbours(sums[: width * side], workspace), 1.0, out[row])
    return out


@numba.njit(nogil=True, cache=True)
def _add_row(values: Pixels, base: float, sums: Float32) -> None:
    """Add (values − base) to the sums of their columns."""
    single_base = np.float32(base)
    for x in range(len(values)):
        sums[x] += np.float32(values[x]) - single_base


@numba.njit(nogil=True, cache=True)
def doublings(side: int) -> int:
    """Return the exponent of a power of 2: how often neighbours are added in pairs to make one bin."""
    return int(np.rint(np.log2(side)))


@numba.njit(nogil=True, cache=True)
def add_neighbours(values: Pixels, workspace: Pixels) -> Pixels:
    """Return sums of neighbours, added in pairs as often as the workspace has rows."""
    size = len(values)
    for level in range(len(workspace)):
        size //= 2
        _add_pairs(values, workspace[level, :size])
        values = workspace[level, :size]
    return values


@numba.njit(nogil=True, cache=True)
def _add_pairs(values: Pixels, out: Pixels) -> None:
    for i in range(len(out)):
        out[i] = values[2 * i] + values[2 * i + 1]


@numba.njit(nogil=True, cache=True)
def write_scaled(values: Pixels, factor: Any, out: Float32) -> None:
    """Write ``factor · values`` to ``out``. A slice assignment would add seconds of compilation."""
    single_factor = np.float32(factor)
    for i in range(len(out)):
        out[i] = values[i] * single_factor


class MovedBins(NamedTuple):
    """A frame, moved by a whole-pixel shift, in bins of the image it is compared with."""

    means: Float32
    """Mean of (frame − base) over each bin; (y, x) are bins."""
    whole: Mask
    """True for bins that consist of valid pixels of the frame alone; other bins have no mean."""
    product: float
    """Σ fixed · (frame − base) over the valid pixels."""


@numba.njit(nogil=True, cache=True)
def moved_bins(
    frame: Pixels, valid: RowRuns, base: float, fixed: Pixels, shift: tuple[int, int], side: int, rows: Indices
) -> MovedBins:
    """Apply a whole-pixel shift (y, x) to a frame and return its bins in some rows of bins.

    ``fixed`` is the image (y, x) the product is taken with; the side of a bin is a power of 2.
    """
    height, width = frame.shape
    means = np.zeros((-(-height // side), width // side), np.float32)
    whole = np.zeros(means.shape, np.bool_)
    used, area, right = means.shape[1] * side, np.float32(1 / side**2), shift[1]
    sums, products = np.empty(width, np.float32), np.zeros(width, np.float32)
    workspace = np.empty((doublings(side), used), np.float32)
    for row in rows:
        sums[:], whole[row] = 0, True
        for y in range(row * side, min(row * side + side, height)):
            runs = _runs_of_row(valid, y - shift[0])
            for k in range(len(runs)):
                begin, end = max(runs[k, 1], -right), min(runs[k, 2], width - right)
                if begin < end:
                    a, b = begin + right, end + right
                    _add_products(frame[runs[k, 0], begin:end], fixed[y, a:b], base, sums[a:b], products[a:b])
            _unmark_cut_bins(runs, right, side, whole[row], width)
        write_scaled(add_neighbours(sums[:used], workspace), area, means[row])
    total = 0.0
    for x in range(width):
        total += np.float64(products[x])
    return MovedBins(means[: height // side], whole[: height // side], total)


@numba.njit(nogil=True, cache=True)
def _runs_of_row(valid: RowRuns, row: int) -> Runs:
    """Return the runs of a row; none where the row is outside the image."""
    runs, firsts = valid
    return runs[firsts[row] : firsts[row + 1]] if 0 <= row < len(firsts) - 1 else runs[:0]


@numba.njit(nogil=True, cache=True)
def _add_products(values: Pixels, fixed: Pixels, base: float, sums: Float32, products: Float32) -> None:
    """Add (values − base) to the sums of their columns, and fixed · (values − base) to the products."""
    single_base = np.float32(base)
    for x in range(len(values)):
        value = np.float32(values[x]) - single_base
        sums[x] += value
        products[x] += np.float32(fixed[x]) * value


@numba.njit(nogil=True, cache=True)
def _unmark_cut_bins(runs: Runs, shift: int, side: int, whole: npt.NDArray[np.bool_], width: int) -> None:
    """Set to False the bins of a row that hold a pixel outside its runs, which are moved along the row."""
    end = 0
    for k in range(len(runs) + 1):
        begin = min(max(runs[k, 1] + shift, 0), width) if k < len(runs) else width
        for n in range(end // side, min(-(-begin // side), len(whole)) if begin > end else 0):
            whole[n] = False
        end = max(end, min(runs[k, 2] + shift, width)) if k < len(runs) else width


def box_means(image: Image, side: int) -> Image:
    """Return the mean of the square of pixels that begins at each pixel; squares are cut off at the far border.

    Examples
    --------
    >>> box_means(np.arange(9.0).reshape(3, 3), 2)[:2, :2]
    array([[2., 3.],
           [5., 6.]])
    """
    return np.asarray(scipy.ndimage.uniform_filter(image, side, mode="constant", origin=-(side // 2)))


def at_bins(image: Pixels, side: int, offset: tuple[int, int] = (0, 0)) -> Pixels:
    """Return the pixel at an offset (y, x) from the first pixel of each bin; the nearest one beyond the border."""
    steps = zip(image.shape, offset, strict=True)
    places = (np.clip(np.arange(length // side) * side + step, 0, length - 1) for length, step in steps)
    return image[np.ix_(*places)]


def bin_means(image: Pixels, side: int) -> Image:
    """Return the mean of each whole bin; pixels beyond the last one are dropped."""
    rows = np.add.reduce(_split(image.astype(np.float64, copy=False), side, 0))
    return np.asarray(np.add.reduce(_split(rows, side, 1)) / side**2)


def whole_bins(mask: Mask, side: int) -> Mask:
    """Return True for bins whose pixels are all valid."""
    rows = np.logical_and.reduce(_split(mask, side, 0))
    return np.asarray(np.logical_and.reduce(_split(rows, side, 1)))


def _split(image: Pixels, side: int, axis: int) -> list[Pixels]:
    """Return the first pixels of all bins along an axis, the second ones, and so on."""
    end = image.shape[axis] // side * side
    steps = [slice(k, end, side) for k in range(side)]
    return [image[step, :] if axis == 0 else image[:, step] for step in steps]
