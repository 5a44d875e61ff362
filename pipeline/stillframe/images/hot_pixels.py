"""Isolated outliers, detected without a model: hot pixels and x-ray hits that no mask marks.

The optics of an instrument spread every feature of a pattern over several pixels. A hit on the sensor or a hot pixel
stands alone. Outliers from a model of the frame are detected by their residual (:func:`~.noise.residual_limit`).
"""

import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Image, Mask, Pixels
from stillframe.images.noise import Noise, residual_limit, smooth, variance_of

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


def _stand_alone(image: Image, mask: Mask, rows: Pixels, columns: Pixels, limits: Image) -> npt.NDArray[np.bool_]:
    """Return for each candidate whether it exceeds its limit and fewer than three pixels reach a comparable height."""
    offsets = np.arange(-_HALF_WIDTH, _HALF_WIDTH + 1)
    padded = np.pad(np.where(mask, image, np.nan), _HALF_WIDTH, constant_values=np.nan)
    out = np.zeros(len(rows), np.bool_)
    for batch in np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH)) if len(rows) else ():
        y, x = rows[batch, None, None] + _HALF_WIDTH, columns[batch, None, None] + _HALF_WIDTH
        values = padded[y + offsets[:, None], x + offsets].reshape(len(batch), -1)
        ground = np.nanmedian(values, axis=1)
        height = image[rows[batch], columns[batch]] - ground
        comparable = np.count_nonzero(values - ground[:, None] > _COMPARABLE_HEIGHT * height[:, None], axis=1)
        enough = np.count_nonzero(np.isfinite(values), axis=1) > _LEAST_NEIGHBOURS
        out[batch] = enough & (height > limits[batch]) & (comparable < _SPOT_PIXELS)
    return out
