"""Isolated outliers, detected without a model: hot pixels and x-ray hits that no mask marks.

The optics of an instrument spread every feature of a pattern over several pixels. A hit on the sensor or a hot pixel
stands alone. Outliers from a model of the frame are detected by their residual (:func:`~.noise.residual_limit`).
"""

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.images.arrays import Image, Indices, Mask, Pixels
from stillframe.images.noise import Noise, residual_limit, skewness_allowance, smooth, variance_of

_DEVIATIONS = 8.0
"""An isolated pixel is higher than its surroundings by at least this many standard deviations of the noise."""
_SMOOTHING = 4.0
"""Standard deviation, pixels, of the Gaussian that gives the intensity of the surroundings."""
_COMPARABLE_HEIGHT = 0.1
"""A neighbour of more than this fraction of the height belongs to the same feature."""
_SPOT_PIXELS = 3
"""A feature of at least this many pixels, the highest included, is a spot of the pattern."""
_LARGEST_FRACTION = 0.03
"""More isolated pixels than this fraction of all are a texture of the pattern."""
_HALF_WIDTH = 2
"""Half width of the square of neighbours, pixels."""
_LEAST_NEIGHBOURS = 8
"""At least this many valid pixels besides the pixel itself are needed in that square."""
_LARGEST_BAD_FRACTION = 0.1
"""More hot and dead pixels than this fraction of all are a texture of the pattern or of the detector."""
_BAD_DEVIATIONS = 6.0
"""A bad pixel differs from its surroundings in a mean of frames by at least this many standard deviations."""
_BAD_ROUNDS = 5
"""Rounds in which bad pixels are found: those next to others stand alone once these are left out."""
_LEAST_LINE = 32
"""Valid pixels that a row or column needs to be judged as a whole."""
_MOSTLY_VALID = 15
"""Valid pixels of the 5×5 around a small hole: it is up to two pixels wide."""
_FILLING = 1.0
"""Standard deviation, pixels, of the Gaussian that gives what is around a small hole."""
_GROUP_PIXELS, _MOST_GROUPS = 1000, 64
"""Least number of pixels of about the same intensity whose scatter is measured, and largest number of such groups."""
_SINGLE_COUNTS = 0.5
"""Where most pixels have no count, this quantile of the others is taken for a single count."""
_MANY_COUNTS = 10
"""Each pixel adds at most so many counts to the mean intensity there, since it may be hot."""
NORMAL_MEDIAN = 0.6745
"""Median absolute value of a standard normal distribution."""
_HOLES = 2**13
"""Number of small holes that are filled at a time."""
_BATCH = 2**16
"""Number of pixels whose neighbours are held in memory at a time."""


def isolated_pixels(image: Image, mask: Mask, noise: Noise) -> Mask:
    """Return True for valid pixels that stand alone, far above their surroundings (18).

    Isolated pixels that are too many are a texture of the pattern; none is marked then.

    Examples
    --------
    >>> image = np.random.default_rng(0).poisson(20.0, (32, 32)).astype(float)
    >>> image[5, 7] = 3000
    >>> np.argwhere(isolated_pixels(image, image > -1, Noise(1.0, 0.0)))
    array([[5, 7]])
    """
    soft = smooth(image, mask, _SMOOTHING)
    limit = residual_limit(variance_of(soft, mask, noise), max(noise.gain, 0.0), _DEVIATIONS)
    # A bright hit raises the smoothed image around it; the median bounds that for this first choice of candidates.
    above = image - np.minimum(soft, float(np.median(image[mask])))
    rows, columns = np.nonzero(mask & (above > limit))
    isolated = np.zeros_like(mask)
    isolated[rows, columns] = _stand_alone(image, mask, rows, columns, limit[rows, columns])
    few = np.count_nonzero(isolated) <= _LARGEST_FRACTION * np.count_nonzero(mask)
    return isolated if few else np.zeros_like(mask)


def bad_pixels(image: Image, mask: Mask) -> Mask:
    """Return True for hot and dead pixels, rows and columns of a mean of frames (54).

    Such pixels stand alone, far above or below their surroundings; of a bad row or column most pixels do. The noise is
    the median deviation from the surroundings, since many bad pixels spoil any mean. Too many bad pixels are a texture;
    none is marked then.

    Examples
    --------
    >>> image = np.random.default_rng(0).poisson(200.0, (32, 32)).astype(float)
    >>> image[5, 7], image[20, 3] = 500, 0
    >>> np.argwhere(bad_pixels(image, image > -1))
    array([[ 5,  7],
           [20,  3]])
    """
    bad = np.zeros_like(mask)
    for _ in range(_BAD_ROUNDS if mask.any() else 0):
        ground = _median_around(image, mask & ~bad)
        limit = _limit_around(image, ground, mask & ~bad)
        found = _bad_lines(np.abs(image - ground) > limit, mask & ~bad)
        for sign in (1, -1):
            rows, columns = np.nonzero(mask & ~bad & ~found & (sign * (image - ground) > limit))
            found[rows, columns] |= _stand_alone(sign * image, mask & ~bad, rows, columns, limit[rows, columns], 1)
        if not found.any():
            break
        bad |= found
    few = np.count_nonzero(bad) <= _LARGEST_BAD_FRACTION * np.count_nonzero(mask)
    return bad if few else np.zeros_like(mask)


def small_holes(mask: Mask) -> Mask:
    """Return True for invalid pixels among mostly valid ones, as hot pixels, dead lines and hits leave them (55).

    Examples
    --------
    >>> mask = np.ones((9, 9), bool)
    >>> mask[4, 5] = mask[:, :3] = False
    >>> np.argwhere(small_holes(mask))
    array([[4, 5]])
    """
    side = 2 * _HALF_WIDTH + 1
    valid = scipy.ndimage.uniform_filter(mask.astype(np.float32), side, mode="nearest") * side**2
    return np.asarray(~mask & (valid > _MOSTLY_VALID - 0.5))


def with_small_holes_filled(image: Image, mask: Mask) -> tuple[Image, Mask]:
    """Fill the small holes of an image with the mean of what is around them (55).

    Returns the image, and the mask in which these holes count as valid.
    """
    rows, columns = np.nonzero(small_holes(mask))
    if not len(rows):
        return image, mask
    filled, known = image.copy(), mask.copy()
    filled[rows, columns], known[rows, columns] = _means_around(image, mask, rows, columns), True
    return filled, known


def _means_around(image: Image, mask: Mask, rows: Pixels, columns: Pixels) -> Image:
    """Return the Gaussian-weighted means around few pixels; images as large as the whole would double the memory."""
    reach = int(4 * _FILLING + 0.5)
    offsets, out = np.arange(-reach, reach + 1), np.empty(len(rows))
    along = np.exp(-0.5 * (offsets / _FILLING) ** 2)
    kernel = np.multiply.outer(along, along)
    for batch in np.array_split(np.arange(len(rows)), -(-len(rows) // _HOLES)):
        y, x = rows[batch, None, None] + offsets[:, None], columns[batch, None, None] + offsets
        inside = (y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1])
        y, x = np.clip(y, 0, mask.shape[0] - 1), np.clip(x, 0, mask.shape[1] - 1)
        weight = kernel * (inside & mask[y, x])
        out[batch] = (weight * image[y, x]).sum(axis=(1, 2)) / weight.sum(axis=(1, 2))
    return out


def _bad_lines(outside: Mask, valid: Mask) -> Mask:
    """Return True for the valid pixels of rows and columns most of whose valid pixels are outside of their limits."""
    lines = np.zeros_like(valid)
    for axis in (0, 1):
        counts, out = np.count_nonzero(valid, axis=axis), np.count_nonzero(outside & valid, axis=axis)
        bad = (2 * out > counts) & (counts >= _LEAST_LINE)
        lines |= np.expand_dims(bad, axis)
    return np.asarray(lines & valid)


def _median_around(image: Image, mask: Mask) -> Image:
    """Return the median of the 5×5 pixels around each pixel; invalid ones count as their smoothed surroundings."""
    filled = np.where(mask, image, smooth(image, mask, _SMOOTHING))
    return np.asarray(scipy.ndimage.median_filter(filled, size=2 * _HALF_WIDTH + 1, mode="nearest"))


def _limit_around(image: Image, ground: Image, mask: Mask) -> Image:
    """Return the least deviation of a bad pixel from these medians, measured at pixels of like medians (54)."""
    order = np.argsort(ground[mask], kind="stable")
    groups = np.array_split(order, np.clip(len(order) // _GROUP_PIXELS, 1, _MOST_GROUPS))
    levels, deviations = ground[mask], np.abs(image - ground)[mask]
    middles = [float(np.median(levels[group])) for group in groups]
    limit = np.interp(ground, middles, [_BAD_DEVIATIONS * _spread(deviations[group]) for group in groups])
    sparse = [group for group in groups if not np.median(deviations[group]) > 0]
    if not sparse:
        return limit
    places = np.concatenate(sparse)
    of_counts = _limit_of_counts(np.abs(image - ground), mask, places)
    return np.where(ground <= levels[places].max(), np.maximum(limit, of_counts), limit)


def _spread(deviations: Image) -> float:
    """Return the standard deviation of a normal distribution with this median of absolute deviations."""
    return float(np.median(deviations)) / NORMAL_MEDIAN


def _limit_of_counts(deviations: Image, mask: Mask, sparse: Indices) -> Image:
    """Return the limit where more than half of the pixels have no count, so that medians say nothing (54).

    ``sparse`` are indices of such pixels among the valid ones.
    """
    counted = deviations[mask][sparse]
    counted = counted[counted > 0]
    if not len(counted):
        return np.zeros_like(deviations)
    count = float(np.quantile(counted, _SINGLE_COUNTS))
    usual = smooth(np.minimum(deviations, _MANY_COUNTS * count), mask, _SMOOTHING)
    return _BAD_DEVIATIONS * np.sqrt(count * usual) + skewness_allowance(count, _BAD_DEVIATIONS)


def _stand_alone(
    image: Image, mask: Mask, rows: Pixels, columns: Pixels, limits: Image, reach: int = _HALF_WIDTH
) -> npt.NDArray[np.bool_]:
    """Return for each candidate whether it exceeds its limit and fewer than three pixels reach a comparable height.

    Only pixels within ``reach`` are compared, which is 2 at most; the ground is always the median of 5×5.
    """
    offsets = np.arange(-_HALF_WIDTH, _HALF_WIDTH + 1)
    padded = np.pad(np.where(mask, image, np.nan), _HALF_WIDTH, constant_values=np.nan)
    out, near = np.zeros(len(rows), np.bool_), (np.abs(offsets[:, None]) <= reach) & (np.abs(offsets) <= reach)
    for batch in np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH)) if len(rows) else ():
        y, x = rows[batch, None, None] + _HALF_WIDTH, columns[batch, None, None] + _HALF_WIDTH
        values = padded[y + offsets[:, None], x + offsets].reshape(len(batch), -1)
        ground = np.nanmedian(values, axis=1)
        height = image[rows[batch], columns[batch]] - ground
        compared = values[:, near.ravel()] - ground[:, None]
        comparable = np.count_nonzero(compared > _COMPARABLE_HEIGHT * height[:, None], axis=1)
        enough = np.count_nonzero(np.isfinite(values), axis=1) > _LEAST_NEIGHBOURS
        out[batch] = enough & (height > limits[batch]) & (comparable < _SPOT_PIXELS)
    return out
