"""The highest point of a surface of scores, and what else is high there."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.ncc import Image

_SECOND_PEAK_DISTANCE = 3
"""A second peak lies at least this many pixels from the first, along one axis."""


class Peak(NamedTuple):
    """The highest point of a surface of scores."""

    shift: tuple[int, int]
    score: float
    smooth_score: float
    second_score: float
    pixels: float
    reach: int
    """Half width of the window that was searched, pixels."""

    @property
    def lags(self) -> int:
        """Shifts that were tried."""
        return (2 * self.reach + 1) ** 2

    @property
    def at_edge(self) -> bool:
        """Whether a higher score may lie outside the window."""
        return 0 < self.reach == max(map(abs, self.shift))


def find_peak(ncc: Image, overlap: Image, margin: int, smoothing: float) -> Peak | None:
    """Find the peak of a surface smoothed as the templates are, which noise moves less than the raw one.

    Parameters
    ----------
    ncc, overlap : ndarray, shape (2 · reach + 1, 2 · reach + 1)
        Score and pixels at each lag; NaN where the score is not defined.
    margin : int
        Lags at the border that are there for the smoothing alone.
    smoothing : float
        Standard deviation of the Gaussian, pixels; 0 for none.

    Returns
    -------
    Peak or None
        None where no score is defined.
    """
    wanted = slice(margin, ncc.shape[0] - margin)
    scores, raw = _smoothed(ncc, smoothing)[wanted, wanted], ncc[wanted, wanted]
    if np.isnan(raw).all():
        return None
    radius = len(scores) // 2
    row, column = (int(place) for place in np.unravel_index(np.nanargmax(scores), scores.shape))
    near = raw[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
    return Peak(
        shift=(row - radius, column - radius),
        score=float(np.nanmax(near)),
        smooth_score=float(scores[row, column]),
        second_score=_second_score(scores, row, column),
        pixels=float(overlap[wanted, wanted][row, column]),
        reach=radius,
    )


def _smoothed(ncc: Image, width: float) -> Image:
    """Smooth the surface where it is defined."""
    if not width:
        return ncc
    valid = np.isfinite(ncc)
    total = scipy.ndimage.gaussian_filter(np.where(valid, ncc, 0), width, mode="nearest")
    weight = scipy.ndimage.gaussian_filter(valid.astype(np.float64), width, mode="nearest")
    return np.where(valid, total / np.maximum(weight, 1e-3), np.nan)


def _second_score(scores: Image, row: int, column: int) -> float:
    """Highest local maximum away from the peak; NaN where there is none."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    peaks = known == scipy.ndimage.maximum_filter(known, size=3, mode="constant", cval=-np.inf)
    reach = _SECOND_PEAK_DISTANCE
    peaks[max(0, row - reach + 1) : row + reach, max(0, column - reach + 1) : column + reach] = False
    others = known[peaks & np.isfinite(known)]
    return float(others.max()) if others.size else np.nan
