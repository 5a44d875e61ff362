"""The highest point of a surface of scores, and what else is high there."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.ncc import Image

ROUNDING = 1e-5
"""Scores are not known better than this, however little noise there is."""
DECISIVE = 5.5
"""A second peak that is lower by this many standard deviations is out of the question."""
_SECOND_PEAK_DISTANCE = 3
"""A second peak lies at least this many pixels from the first, along one axis."""


class Peak(NamedTuple):
    """The highest point of a surface of scores."""

    shift: tuple[int, int]
    score: float
    second_score: float
    lead: float
    """By how much the peak is higher than the second one after smoothing."""
    pixels: float
    reach: int
    """Half width of the window that was searched, pixels."""
    slack: float = 0.0
    """By how much the shift may be wrong because it was found in bins, pixels; 0 where it was not."""

    @property
    def lags(self) -> int:
        """Shifts that were tried."""
        return (2 * self.reach + 1) ** 2

    def scored(self, score: float, pixels: int) -> "Peak":
        """Return the same peak with the score of single pixels; what was lower in bins is so by the same part."""
        part = score / self.score
        return self._replace(score=score, second_score=self.second_score * part, pixels=float(pixels))

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
    second = _second_peak(scores, row, column)
    return Peak(
        shift=(row - radius, column - radius),
        score=_highest_near(raw, row, column),
        second_score=np.nan if second is None else _highest_near(raw, *second),
        lead=np.inf if second is None else float(scores[row, column] - scores[second]),
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


def _highest_near(scores: Image, row: int, column: int) -> float:
    """Highest score at a lag or beside it."""
    return float(np.nanmax(scores[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]))


def _second_peak(scores: Image, row: int, column: int) -> tuple[int, int] | None:
    """Highest local maximum away from the peak; along a ridge, any point is one."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    peaks = known == scipy.ndimage.maximum_filter(known, size=3, mode="constant", cval=-np.inf)
    peaks |= known > known[row, column] - ROUNDING
    reach = _SECOND_PEAK_DISTANCE
    peaks[max(0, row - reach + 1) : row + reach, max(0, column - reach + 1) : column + reach] = False
    others = np.where(peaks, known, -np.inf)
    place = np.unravel_index(np.argmax(others), others.shape)
    return (int(place[0]), int(place[1])) if np.isfinite(others[place]) else None
