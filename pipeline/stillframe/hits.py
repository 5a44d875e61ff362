"""Find single pixels that no pattern explains: hot pixels and x-ray hits that no mask names.

What falls through the optics of an instrument is spread over several pixels; what strikes the sensor is not.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stillframe.ncc import Image, Mask
from stillframe.noise import Noise, count_limit, smooth, variance_of

_SURELY = 8.0
"""Standard deviations above its surroundings."""
_SPREAD = 0.1
"""Of a spot, at least three pixels stand out by this part of the highest."""
_MOST = 0.03
"""More isolated pixels than this are a texture."""
_AROUND = 2
"""Half width of the surroundings, pixels."""


def find_hits(image: Image, mask: Mask, noise: Noise) -> Mask:
    """Mark valid pixels far above their surroundings that fewer than three pixels there come near to.

    Parameters
    ----------
    image : ndarray of float64, shape (y, x)
        Finite where valid.
    mask : ndarray of bool, shape (y, x)
        True = valid.
    noise : Noise
        Of the image.

    Returns
    -------
    ndarray of bool, shape (y, x)
        Nothing where they are too many for accidents.

    Examples
    --------
    >>> image = np.random.default_rng(0).poisson(20.0, (32, 32)).astype(float)
    >>> image[5, 7] = 3000
    >>> np.argwhere(find_hits(image, image > -1, Noise(1.0, 0.0)))
    array([[5, 7]])
    """
    soft = smooth(image, mask, 4.0)
    limit = count_limit(variance_of(soft, mask, noise), max(noise.gain, 0.0), _SURELY)
    # A brilliant hit raises its own surroundings; these are looked at one by one below.
    above = image - np.minimum(soft, float(np.median(image[mask])))
    rows, columns = np.nonzero(mask & (above > limit))
    found = np.zeros_like(mask)
    found[rows, columns] = _isolated(image, mask, rows, columns, limit[rows, columns])
    return found if np.count_nonzero(found) <= _MOST * np.count_nonzero(mask) else np.zeros_like(mask)


@numba.njit(nogil=True, cache=True)
def _isolated(
    image: Image, mask: Mask, rows: npt.NDArray[Any], columns: npt.NDArray[Any], limits: Image
) -> npt.NDArray[np.bool_]:
    """Tell for each of some pixels whether fewer than three valid ones around come near to its height."""
    out = np.zeros(len(rows), np.bool_)
    values = np.empty((2 * _AROUND + 1) ** 2)
    for k in range(len(rows)):
        y, x, n = rows[k], columns[k], 0
        for v in range(max(0, y - _AROUND), min(image.shape[0], y + _AROUND + 1)):
            for u in range(max(0, x - _AROUND), min(image.shape[1], x + _AROUND + 1)):
                if mask[v, u]:
                    values[n] = image[v, u]
                    n += 1
        ground = np.median(values[:n])
        height = image[y, x] - ground
        out[k] = n > 8 and height > limits[k] and np.sum(values[:n] - ground > _SPREAD * height) < 3
    return out
