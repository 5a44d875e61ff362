"""Pictures in bins of a few pixels' side: all that slow changes need, at a fraction of the pixels."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.ncc import Image, Mask

Float32 = npt.NDArray[np.float32]


@numba.njit(nogil=True, cache=True)
def _add_row(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], origin: float, sums: Float32, counts: Any) -> None:
    """Add a row to the sums and counts of its columns."""
    for x in range(len(sums)):
        sums[x] += np.float32(np.float64(values[x]) - origin) if valid[x] else np.float32(0)
        counts[x] += valid[x]


@numba.njit(nogil=True, cache=True)
def bin_picture(
    image: npt.NDArray[Any], mask: Mask, origin: float, scale: float, side: int
) -> tuple[Float32, npt.NDArray[np.uint8]]:
    """Return (image − origin) / scale averaged over the valid pixels of each bin, and how many those are."""
    height, width = image.shape[0] // side, image.shape[1] // side
    out, pixels = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint8)
    sums, counts = np.empty(width * side, np.float32), np.empty(width * side, np.uint8)
    for y in range(height):
        sums[:], counts[:] = 0, 0
        for v in range(side):
            _add_row(image[y * side + v], mask[y * side + v], origin, sums, counts)
        for x in range(width):
            total, count = 0.0, 0
            for u in range(side):
                total += sums[x * side + u]
                count += counts[x * side + u]
            pixels[y, x] = count
            out[y, x] = total / (scale * count) if count else 0
    return out, pixels


@numba.njit(nogil=True, cache=True)
def _add_valid(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], sums: Float32, whole: Mask) -> None:
    """Add a row to the sums of its columns, and note which columns hold an invalid pixel."""
    for x in range(len(values)):
        sums[x] += np.float32(values[x]) if valid[x] else np.float32(0)
        whole[x] &= valid[x]


@numba.njit(nogil=True, cache=True)
def moved_bins(frame: npt.NDArray[Any], mask: Mask, shift: tuple[int, int], side: int) -> tuple[Float32, Mask]:
    """Return the mean of each bin of a frame to which a whole-pixel shift was applied, and whether it is whole.

    A bin with an invalid pixel, or one beyond the frame's border, is not, and has no meaning.
    """
    height, width = frame.shape
    means, good = (
        np.zeros((height // side, width // side), np.float32),
        np.zeros((height // side, width // side), np.bool_),
    )
    first, last = max(0, -(-shift[1] // side)), min(width // side, (width + shift[1]) // side)
    sums, whole = np.empty(width, np.float32), np.empty(width, np.bool_)
    part, left, size = np.float32(1 / side**2), first * side - shift[1], (last - first) * side
    for row in range(height // side):
        top = row * side - shift[0]
        if top < 0 or top + side > height or size <= 0:
            continue
        sums[:], whole[:] = 0, True
        for y in range(top, top + side):
            _add_valid(frame[y, left : left + size], mask[y, left : left + size], sums[:size], whole[:size])
        for column in range(last - first):
            total, every = np.float32(0), True
            for x in range(column * side, column * side + side):
                total += sums[x]
                every &= whole[x]
            means[row, first + column] = total * part
            good[row, first + column] = every
    return means, good


def box_means(image: Image, side: int) -> Image:
    """Return the mean of the square of pixels that begins at each pixel; at the far border squares are cut off.

    Examples
    --------
    >>> box_means(np.arange(9.0).reshape(3, 3), 2)[:2, :2]
    array([[2., 3.],
           [5., 6.]])
    """
    return np.asarray(scipy.ndimage.uniform_filter(image, side, mode="constant", origin=-(side // 2)))


def at_bins(image: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Return what stands at the first pixel of each bin."""
    height, width = (length // side * side for length in image.shape[-2:])
    return np.asarray(image[..., :height:side, :width:side])


def bin_means(image: npt.NDArray[Any], side: int) -> Image:
    """Return the mean of each bin, (…, y, x); pixels beyond the last whole bin are dropped."""
    height, width = (length // side for length in image.shape[-2:])
    cut = image[..., : height * side, : width * side]
    return np.asarray(cut.reshape(*image.shape[:-2], height, side, width, side).mean(axis=(-3, -1)))
