"""The highest peak of a surface of scores, and the second highest away from it."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Image, Shift

ROUNDING = 1e-5
"""Scores are accurate to about this, however little noise there is."""
SECOND_PEAK_DISTANCE = 3
"""A second peak lies at least this many pixels from the first, along one axis."""


class Peak(NamedTuple):
    """The highest peak of a surface of scores."""

    shift: Shift
    """(y, x), pixels, to be applied to the frame."""
    score: float
    second_score: float
    """Score of the second highest peak; NaN without one."""
    lead: float
    """Difference between the peak and the second one after smoothing."""
    pixels: float
    """Number of pixels valid in both images at this shift."""
    reach: int
    """Half width of the window that was searched, pixels."""
    slack: float = 0.0
    """Largest error of the shift because it was searched in bins, pixels; 0 for a search pixel by pixel."""
    beside_undefined: bool = False
    """Whether a neighbouring shift has too little overlap for a score, so that a higher one may be hidden there."""

    @property
    def lags(self) -> int:
        """Number of shifts that were searched."""
        return (2 * self.reach + 1) ** 2

    def with_pixel_score(self, score: float, pixels: int) -> "Peak":
        """Return the peak with the score of single pixels; the second score of bins is scaled by the same factor."""
        factor = score / self.score if self.slack else 1.0
        return self._replace(score=score, second_score=self.second_score * factor, pixels=float(pixels))


def find_peak(ncc: Image, overlap: Image, margin: int, smoothing: float) -> Peak | None:
    """Return the highest peak of the smoothed surface of scores (7); None where no score is defined.

    Noise moves it less than that of the raw surface. ``ncc`` and ``overlap`` are (2 · reach + 1, 2 · reach + 1), and a
    score is NaN where it is not defined. ``margin`` lags at the border serve the smoothing alone. ``smoothing`` is the
    standard deviation of the Gaussian, pixels; 0 for none.
    """
    return next(iter(find_peaks(ncc, overlap, margin, smoothing, 1)), None)


def find_peaks(ncc: Image, overlap: Image, margin: int, smoothing: float, most: int) -> list[Peak]:
    """Return the highest local maxima of the smoothed surface of scores, the highest first; arguments as above.

    Their heights are those between the shifts (50): samples of a narrow peak beside its top can be lower than those of
    another peak at its top.
    """
    surface = _Surface.of(ncc, overlap, margin, smoothing)
    places = np.argwhere(np.isfinite(surface.heights))
    order = np.argsort(-surface.heights[tuple(places.T)], kind="stable")[:most]
    return [surface.peak(int(row), int(column)) for row, column in places[order]]


class _Surface(NamedTuple):
    """Scores of a window of shifts, without the margin that served the smoothing."""

    raw: Image
    """Scores as they are; NaN where not defined."""
    overlap: Image
    scores: Image
    """Smoothed scores; −∞ where not defined."""
    heights: Image
    """Heights of the local maxima of the smoothed scores between whole pixels; −∞ elsewhere."""

    @classmethod
    def of(cls, ncc: Image, overlap: Image, margin: int, smoothing: float) -> "_Surface":
        window = slice(margin, ncc.shape[0] - margin)
        scores = _smoothed(ncc, smoothing)[window, window]
        defined = np.where(np.isnan(scores), -np.inf, scores)
        return cls(ncc[window, window], overlap[window, window], defined, _heights(defined))

    def peak(self, row: int, column: int) -> Peak:
        """Return the peak at a place, with the second highest away from it."""
        reach, second = len(self.scores) // 2, self._second_peak(row, column)
        around = self.raw[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        return Peak(
            shift=(row - reach, column - reach),
            score=_highest_near(self.raw, row, column),
            second_score=np.nan if second is None else _highest_near(self.raw, *second),
            lead=np.inf if second is None else self._lead(row, column, *second),
            pixels=float(self.overlap[row, column]),
            reach=reach,
            beside_undefined=bool(np.isnan(around).any()),
        )

    def _lead(self, row: int, column: int, other_row: int, other_column: int) -> float:
        second = max(self.heights[other_row, other_column], self.scores[other_row, other_column])
        return float(max(self.heights[row, column], self.scores[row, column]) - second)

    def _second_peak(self, row: int, column: int) -> tuple[int, int] | None:
        """Return the highest maximum away from the peak; every point of a ridge as high as the peak counts as one."""
        ridge = self.scores > self.scores[row, column] - ROUNDING
        others = np.where(ridge, np.maximum(self.heights, self.scores), self.heights)
        reach = SECOND_PEAK_DISTANCE
        others[max(0, row - reach + 1) : row + reach, max(0, column - reach + 1) : column + reach] = -np.inf
        place = np.unravel_index(np.argmax(others), others.shape)
        return (int(place[0]), int(place[1])) if np.isfinite(others[place]) else None


def _heights(scores: Image) -> Image:
    """Return the heights of local maxima by a parabola along each axis (50); −∞ elsewhere."""
    maxima = scores == scipy.ndimage.maximum_filter(scores, size=3, mode="constant", cval=-np.inf)
    places = np.argwhere(maxima & np.isfinite(scores))
    heights = np.full(scores.shape, -np.inf)
    framed = np.pad(scores, 1, constant_values=-np.inf)
    for row, column in places + 1:
        lines = framed[row - 1 : row + 2, column], framed[row, column - 1 : column + 2]
        heights[row - 1, column - 1] = framed[row, column] + sum(_rise(line) for line in lines)
    return heights


def _rise(line: Image) -> float:
    """Return how far the vertex of the parabola through three scores lies above the middle one."""
    low, middle, high = (float(score) for score in line)
    bend = low - 2 * middle + high
    return (low - high) ** 2 / (-8 * bend) if -np.inf < bend < 0 else 0.0


def _smoothed(ncc: Image, width: float) -> Image:
    """Return the surface smoothed where it is defined."""
    if not width:
        return ncc
    valid = np.isfinite(ncc)
    total = scipy.ndimage.gaussian_filter(np.where(valid, ncc, 0), width, mode="nearest")
    weight = scipy.ndimage.gaussian_filter(valid.astype(np.float64), width, mode="nearest")
    return np.where(valid, total / np.maximum(weight, 1e-3), np.nan)


def _highest_near(scores: Image, row: int, column: int) -> float:
    """Return the highest score at a lag or at its eight neighbours."""
    return float(np.nanmax(scores[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]))
