"""Find single pixels that no pattern explains: hot pixels and x-ray hits that no mask names.

What falls through the optics of an instrument is spread over several pixels; what strikes the sensor is not.
"""

from typing import Any

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
_FEWEST = 8
"""Fewer valid pixels around tell nothing."""
_AT_ONCE = 2**16
"""Pixels whose surroundings are held at a time."""


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


def _isolated(
    image: Image, mask: Mask, rows: npt.NDArray[Any], columns: npt.NDArray[Any], limits: Image
) -> npt.NDArray[np.bool_]:
    """Tell for each of some pixels whether fewer than three valid ones around come near to its height."""
    around = np.arange(-_AROUND, _AROUND + 1)
    spaced = np.pad(np.where(mask, image, np.nan), _AROUND, constant_values=np.nan)
    out = np.zeros(len(rows), np.bool_)
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // _AT_ONCE)) if len(rows) else ():
        y, x = rows[part, None, None] + _AROUND, columns[part, None, None] + _AROUND
        values = spaced[y + around[:, None], x + around].reshape(len(part), -1)
        ground = np.nanmedian(values, axis=1)
        height = image[rows[part], columns[part]] - ground
        near = np.count_nonzero(values - ground[:, None] > _SPREAD * height[:, None], axis=1)
        enough = np.count_nonzero(np.isfinite(values), axis=1) > _FEWEST
        out[part] = enough & (height > limits[part]) & (near < 3)
    return out
