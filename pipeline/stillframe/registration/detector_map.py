"""What does not move with the pattern: gain and offset of each pixel, and pixels that do not follow at all.

Frames that have drifted show a pattern through different pixels. What a pixel shows, relative to the mean of the
aligned frames, then is the pixel's own doing where it is the same in all frames: its gain or offset, or a stain, an
edge or a bad pixel.
The idea is that of J. R. Kuhn, H. Lin, D. Loranz, PASP 103, 1097 (1991), for flats from displaced images.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Image, Mask, Pixels
from stillframe.images.hot_pixels import NORMAL_MEDIAN
from stillframe.registration.detector_sums import CLOSE, DetectorSums, high_pass, line_means, sum_around

_LINES_AROUND = 51
"""Number of rows, or columns, over which the mean of lines is taken that the plain mean of frames shows beside them."""
_LEAST_SIGNAL = 0.02
"""Least signal of a pixel over all frames, as a fraction of the mean."""
_LEAST_VISITS = 3.0
"""Least number of frames, by their signal, in which the pattern passed a pixel."""
_SIGNIFICANT = 5.0
"""A texture is corrected if its variance is so many standard errors above 0."""
_WORTH = 0.005
"""A texture is corrected if it adds more than this fraction to the variance of a frame's pixels."""
_LEFT_BY_LINES = 0.3
"""Offsets of lines leave at most this fraction of what stays on the detector."""
_SETTLED = 0.001
"""Gains are not measured while a larger fraction of the pixels is found not to follow: they pull the mean."""
_NOT_FOLLOWING, _NOT_FOLLOWING_BY = 6.0, 0.1
"""A pixel does not follow if it differs by so many standard deviations, and by this fraction of what is expected."""
_LEAST_SLOPE = 0.4
"""A pixel does not follow if it shows less than this fraction of the changes that are expected."""
_LEAST_MISSING = 0.15
"""Expected changes that a pixel does not show must be this fraction of the signal, rms; smooth scatter misses less."""
_KEPT_NOISE = 0.66
"""Fraction of its variance that noise keeps when moved by a fraction of a pixel, cubic, on average."""
_MOST_LEFT_OUT = 0.3
"""More than this fraction of the pixels that do not follow says that the frames are not as the reference."""


class Spread(NamedTuple):
    """How much gains and offsets differ between pixels: standard deviations, 0 where not significant."""

    gain: float
    offset: float
    """Counts before the division by a flat."""
    of_lines: float = 0.0
    """That of the offsets of whole rows and columns."""

    def variance(self, sums: DetectorSums) -> Image:
        """Return the variance of Σ r that gains and offsets of pixels cause."""
        of_gain, of_offset = (one.astype(np.float64) for one in (sums.signal, sums.of_offset))
        return (self.gain * of_gain) ** 2 + (self.offset * of_offset) ** 2


class DetectorMap(NamedTuple):
    """The detector's own pattern, as far as frames show it."""

    gain: Float32
    """Response of the pixels (y, x), 1 where nothing is known."""
    offset: Float32
    """What pixels show in excess, counts before the division by a flat (y, x), 0 where nothing is known."""
    following: Mask
    """True = the pixel follows the pattern."""
    spread: Spread
    settled: bool = True
    """False: pixels that do not follow come first, and gains and offsets were not looked for."""
    guessed: bool = False
    """True: the offsets were not measured from the drift."""

    @classmethod
    def without_pattern(cls, following: Mask) -> "DetectorMap":
        """Return a map without gains and offsets: it only marks the pixels that follow the pattern."""
        zeros = np.zeros(following.shape, np.float32)
        return cls(zeros + 1, zeros, following, Spread(0, 0))

    def extrapolated(self, before: "DetectorMap", by: float) -> "DetectorMap":
        """Return a map that differs from this one by so many times what this one differs from the one before.

        Pixels of which either map says nothing stay as they are here.
        """
        return self._replace(
            gain=_extrapolated(self.gain, before.gain, by, 1.0, self.spread.gain),
            offset=_extrapolated(
                self.offset, before.offset, by, 0.0, np.hypot(self.spread.offset, self.spread.of_lines)
            ),
        )

    def removed_from(self, corrected: Pixels, response: Pixels | float = 1.0) -> Image:
        """Return what the correction by this map took from a frame (y, x) that was divided by a response, too."""
        return np.asarray(corrected * (self.gain - 1) + self.offset / response)


def _extrapolated(now: Float32, before: Float32, by: float, nothing: float, spread: float) -> Float32:
    """Return what lies beyond two values of each pixel, within 4 deviations of ``nothing``."""
    reach = np.maximum(4 * spread, np.abs(now - nothing))
    limit = np.clip(now + np.float32(by) * (now - before), nothing - reach, nothing + reach)
    return np.where((now != nothing) & (before != nothing), limit, now).astype(np.float32)


def map_of(sums: DetectorSums, valid: Mask) -> DetectorMap:
    """Return gains and offsets of pixels, and which of them follow the pattern.

    Parameters
    ----------
    sums : DetectorSums
        Over frames that were registered.
    valid : array of bool, shape (y, x)
        Pixels of the frames that are judged.
    """
    judged = valid & _visited(sums)
    usual = _usual_spread(sums, judged)
    following = _following(sums, valid, usual)
    found = DetectorMap.without_pattern(following)
    if np.count_nonzero(valid & ~following) > _SETTLED * np.count_nonzero(valid):
        return found._replace(settled=False)
    judged &= following
    lines = _line_offsets(sums, judged)
    if lines.any():
        sums = replace(sums, fine=sums.lineless, fine_squares=sums.lineless_squares)
        usual = _usual_spread(sums, judged)
    spread = _spread(sums, judged, usual)._replace(of_lines=float(np.sqrt(np.mean(lines**2))))
    if not any(spread):
        return found
    gain, offset = _gains_and_offsets(sums, judged, spread)
    return found._replace(gain=gain, offset=offset + lines, spread=spread)


def sharp_structure(image: Pixels, mask: Mask) -> Image:
    """Return in what pixels, rows and columns of an image (y, x) differ from their surroundings; 0 where invalid."""
    lines = line_means(np.where(mask, image, 0), mask)
    sharp = high_pass(image - lines[0] - lines[1], mask)
    for axis, one in enumerate(lines):
        sharp = sharp + one - scipy.ndimage.uniform_filter1d(one, _LINES_AROUND, axis=axis)
    return np.where(mask, sharp, 0)


def _lit(sums: DetectorSums) -> Mask:
    """Return True where enough of the pattern passed."""
    signal = sums.signal.astype(np.float64)
    return np.asarray(signal > _LEAST_SIGNAL * max(float(signal.mean()), 0.0))


def _visited(sums: DetectorSums) -> Mask:
    """Return True where several frames count, by the signal where there is one."""
    signal = sums.signal.astype(np.float64)
    offset = sums.of_offset.astype(np.float64)
    by_signal, by_offset = signal**2 / _LEAST_VISITS, offset**2 / (0.99 * _LEAST_VISITS)
    several = np.where(_lit(sums), by_signal >= sums.signal_squares, by_offset >= sums.of_offset_squares)
    return np.asarray(several & (sums.noise > 0))


def _usual_spread(sums: DetectorSums, judged: Mask) -> Spread:
    """Return the spread of gains and offsets, from median deviations: a few odd pixels do not change it.

    It explains those of the dimmer and those of the brighter half of the pixels.
    """
    fine, signal, noise, of_offset = (one[judged] for one in (sums.fine, sums.signal, sums.noise, sums.of_offset))
    if not fine.size:
        return Spread(0, 0)
    level, deviation, own = signal / of_offset, np.abs(fine / of_offset), noise / of_offset**2
    bright = level > np.median(level)
    halves = [half for half in (~bright, bright) if half.any()]
    squares = [(np.median(deviation[half]) / NORMAL_MEDIAN) ** 2 - np.median(own[half]) for half in halves]
    terms = np.array([[np.median(level[half]) ** 2 for half in halves], [1.0] * len(halves)], np.float64)
    return Spread(*map(float, np.sqrt(_non_negative(terms, np.array(squares, np.float64)))))


def _spread(sums: DetectorSums, judged: Mask, usual: Spread) -> Spread:
    """Return the spread of gains and offsets over the pixels, 0 each where not significant (56).

    Products of different frames at one pixel share both and nothing else: neither noise nor changes of the pattern.
    """
    few = judged & (sums.fine.astype(np.float64) ** 2 < _NOT_FOLLOWING**2 * (usual.variance(sums) + sums.noise))
    fine, squares, noise, sum_of_each, squares_of_each = _at(few, sums)
    products = (fine**2 - squares) / noise
    terms = (sum_of_each**2 - squares_of_each) / noise
    in_a_frame = sum_of_each**2 / (max(sums.frames, 1) * noise)
    significant = terms @ products > _SIGNIFICANT * np.sqrt(terms**2 @ products**2)
    if not significant.any():
        return Spread(0, 0)
    found = _non_negative(terms * significant[:, None], products)
    worth = significant & (found * in_a_frame.mean(axis=1) > _WORTH)
    return Spread(*map(float, np.sqrt(_non_negative(terms * worth[:, None], products))))


def _line_offsets(sums: DetectorSums, judged: Mask) -> Float32:
    """Return the offsets of whole rows and columns, counts before the division by a flat (y, x), or 0 (62).

    They are significant, and explain most of what stays on the detector; of gains of lines they do not.
    """
    none = np.zeros(sums.residual.shape, np.float32)
    weight = sums.noise[judged].astype(np.float64) ** -2
    stays, left = (
        float(weight @ (total[judged].astype(np.float64) ** 2 - squares[judged]))
        for total, squares in ((sums.fine, sums.fine_squares), (sums.lineless, sums.lineless_squares))
    )
    if left > _LEFT_BY_LINES * stays:
        return none
    total, squares, frames = *sums.lines, sums.frames
    products, possible = total**2 - squares, frames**2 - frames
    offsets, height = np.zeros(len(total), np.float32), len(none)
    for lines in (slice(height), slice(height, None)):
        if products[lines].sum() > _SIGNIFICANT * np.sqrt(2 * (squares[lines] ** 2).sum()):
            square = products[lines].mean() / possible
            error = np.maximum(squares - total**2 / frames, 0)[lines] / frames**2
            offsets[lines] = total[lines] / frames * square / (square + error)
    return none + offsets[:height, None] + offsets[height:]


def _at(pixels: Mask, sums: DetectorSums) -> tuple[Image, Image, Image, Image, Image]:
    """Return Σ r′, Σ r′², the variance, and sums and sums of squares (2, pixel) of what gain and offset add to r."""
    fine, squares, noise = (one[pixels].astype(np.float64) for one in (sums.fine, sums.fine_squares, sums.noise))
    of_each = np.stack([sums.signal[pixels], sums.of_offset[pixels]]).astype(np.float64)
    squares_of_each = np.stack([sums.signal_squares[pixels], sums.of_offset_squares[pixels]]).astype(np.float64)
    return fine, squares, noise, of_each, squares_of_each


def _non_negative(terms: Image, values: Image) -> Image:
    """Fit values (n,) by a weighted sum of two terms (2, n), and return the two weights, which are not negative."""
    square, product = terms @ terms.T, terms @ values
    both = np.linalg.lstsq(square, product)[0]
    if (both >= 0).all():
        return np.asarray(both)
    alone = np.divide(product, np.diag(square), out=np.zeros(2), where=np.diag(square) > 0)
    return np.where(np.arange(2) == np.argmax(alone * product * (alone > 0)), np.maximum(alone, 0), 0)


def _gains_and_offsets(sums: DetectorSums, judged: Mask, spread: Spread) -> tuple[Float32, Float32]:
    """Return the gains and offsets of least expected error (57)."""
    gain, offset = np.ones(judged.shape, np.float32), np.zeros(judged.shape, np.float32)
    fine, squares, noise, of_each, squares_of_each = _at(judged, sums)
    prior = np.array([spread.gain, spread.offset])[:, None] ** 2
    expected = np.maximum((prior * of_each**2).sum(axis=0), 1e-300)
    same = (prior * squares_of_each).sum(axis=0) / expected
    changes = (squares - fine**2 * same) / np.maximum(1 - same, 1e-300)
    of_gain, of_offset = prior * of_each * fine / (expected + np.maximum(noise, changes))
    gain[judged] += of_gain
    offset[judged] = of_offset
    return gain, offset


def _variance(total: Pixels, squares: Pixels, noise: Pixels, number: int) -> Image:
    """Return the variance of a sum over frames: as it scatters between them, and at least that of noise."""
    return np.maximum(noise, squares - total**2 / number).astype(np.float64)


def _following(sums: DetectorSums, valid: Mask, usual: Spread) -> Mask:
    """Return True but where pixels show something else than the pattern that moves; True for all if too many (58).

    Single pixels are judged first, then the sums of the others over the closest surroundings, whose noise is less.
    """
    expected = np.maximum(sums.signal, _LEAST_SIGNAL * max(float(sums.signal[valid].mean()), 0.0))
    error = _variance(sums.residual, sums.squares, sums.noise, sums.frames) + usual.variance(sums)
    odd = valid & (_differs(sums.residual, error, expected) | _stays(*_changes(sums)))
    rest = valid & ~odd
    total, of_noise, signal, *changes = (
        sum_around(np.where(rest, one, 0), CLOSE) for one in (sums.residual, error, expected, *_changes(sums))
    )
    scatter = np.maximum(of_noise, sums.close_squares - total**2 / sums.frames)
    odd |= rest & (_differs(total, scatter, signal) | _stays(*changes))
    few = np.count_nonzero(odd) <= _MOST_LEFT_OUT * np.count_nonzero(valid)
    return ~odd if few else np.ones_like(valid)


def _differs(residual: Pixels, error: Image, expected: Pixels) -> Mask:
    """Return True where the frames differ from what is expected: all in the same direction, and by much."""
    apart = np.abs(residual)
    deviation = np.sqrt(np.maximum(error, 0))
    return np.asarray((apart > _NOT_FOLLOWING * deviation) & (apart > _NOT_FOLLOWING_BY * expected))


def _changes(sums: DetectorSums) -> tuple[Image, Image, Image, Pixels]:
    """Return how frame and signal change over the frames: covariance, variance of the signal, error, and Σ m².

    All are sums. The error is the variance of the covariance by noise.

    The noise of the reference moves with the signal, but is not in the frame.
    """
    variance = np.maximum(sums.signal_squares - sums.signal**2 / sums.frames, 0)
    covariance = variance + sums.products - sums.residual * sums.signal / sums.frames
    of_noise = _KEPT_NOISE * sums.of_reference
    return covariance, np.maximum(variance - of_noise, 0), sums.noise / sums.frames * variance, sums.signal_squares


def _stays(covariance: Image, variance: Image, error: Image, squares: Pixels) -> Mask:
    """Return True where frames change by less than they must as the pattern moves."""
    missing, deviation = variance - covariance, np.sqrt(np.maximum(error, 0))
    less = (covariance < _LEAST_SLOPE * variance) & (missing > _NOT_FOLLOWING * deviation)
    return np.asarray(less & (missing > _LEAST_MISSING**2 * squares))
