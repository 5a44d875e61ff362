"""What does not move with the pattern: the gain of each pixel of the detector, and pixels that do not follow at all.

Frames that have drifted show a pattern through different pixels. What a pixel shows, relative to the mean of the
aligned frames, then is the pixel's own doing where it is the same in all frames: its gain, or a stain, an edge or a
bad pixel.
The idea is that of J. R. Kuhn, H. Lin, D. Loranz, PASP 103, 1097 (1991), for flats from displaced images.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Image, Mask, Pixels
from stillframe.images.hot_pixels import NORMAL_MEDIAN

_AROUND = 25
"""Side of the square, pixels, in which gains are judged relative to each other: wider structure is the pattern's."""
_CLOSE = 9
"""Side of the square, pixels, in which weak deviations are summed."""
_LEAST_SIGNAL = 0.02
"""Least signal of a pixel over all frames, as a fraction of the mean."""
_LEAST_VISITS = 3.0
"""Least number of frames, by their signal, in which the pattern passed a pixel."""
_SIGNIFICANT = 5.0
"""A texture is corrected if its variance is so many standard errors above 0."""
_WORTH = 0.005
"""A texture is corrected if it adds more than this fraction to the variance of a frame's pixels."""
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


@dataclass(eq=False)
class DetectorSums:
    """Sums over frames at each pixel of the detector, (y, x), in corrected counts or their squares."""

    residual: Float32
    """Σ r: frame less what the reference, moved to the frame, predicts; over the frame's gain."""
    fine: Float32
    """Σ r′: residual less its mean over the surroundings."""
    squares: Float32
    """Σ r²."""
    fine_squares: Float32
    """Σ r′²."""
    close_squares: Float32
    """Σ (sum of r over the closest surroundings)²."""
    signal: Float32
    """Σ m: the reference, moved to the frame."""
    signal_squares: Float32
    """Σ m²."""
    products: Float32
    """Σ r m."""
    noise: Float32
    """Σ of the residual's variance, as far as counts and reference explain it."""
    of_reference: Float32
    """Σ of the part of that variance that is the reference's."""
    frames: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "DetectorSums":
        """Return sums over no frame."""
        return cls(*np.zeros((10, *shape), np.float32))

    def add(self, residual: Image, signal: Image, variance: Image, of_reference: float, kept: Mask) -> None:
        """Add a frame, (y, x) each; pixels that are not kept do not count.

        ``of_reference`` is the fraction of the variance that is the reference's.
        """
        counted, predicted = np.where(kept, residual, 0), np.where(kept, signal, 0)
        around = _sum_around(counted, _AROUND) / np.maximum(_sum_around(kept, _AROUND), 1)
        fine = np.where(kept, counted - around, 0)
        self.residual += counted
        self.fine += fine
        self.squares += counted**2
        self.fine_squares += fine**2
        self.close_squares += _sum_around(counted, _CLOSE) ** 2
        self.signal += predicted
        self.signal_squares += predicted**2
        self.products += counted * predicted
        of_noise = np.where(kept, variance, 0)
        self.noise += of_noise
        self.of_reference += of_reference * of_noise
        self.frames += 1


def _sum_around(image: Pixels, side: int) -> Image:
    """Return the sum over a square around each pixel."""
    mean = scipy.ndimage.uniform_filter(image, side, mode="constant", output=np.float64)
    return np.asarray(mean * side**2)


class DetectorMap(NamedTuple):
    """The detector's own pattern, as far as frames show it."""

    gain: Float32
    """Response of the pixels (y, x), 1 where nothing is known."""
    following: Mask
    """True = the pixel follows the pattern."""
    texture: float
    """Standard deviation of the gain; 0 where none is significant."""


def map_of(sums: DetectorSums, valid: Mask) -> DetectorMap:
    """Return the gains of pixels, and which of them follow the pattern.

    Parameters
    ----------
    sums : DetectorSums
        Over frames that were registered.
    valid : array of bool, shape (y, x)
        Pixels of the frames that are judged.
    """
    lit = valid & _lit(sums)
    usual = _usual_texture(sums, lit)
    following = _following(sums, valid, usual)
    if np.count_nonzero(valid & ~following) > _SETTLED * np.count_nonzero(valid):
        return DetectorMap(np.ones(valid.shape, np.float32), following, 0.0)
    texture, gain = _texture(sums, lit & following, usual)
    return DetectorMap(gain.astype(np.float32), following, texture)


def _lit(sums: DetectorSums) -> Mask:
    """Return True where enough of the pattern passed, in several frames."""
    signal = sums.signal.astype(np.float64)
    enough = signal > _LEAST_SIGNAL * max(float(signal.mean()), 0.0)
    return np.asarray(enough & (sums.noise > 0) & (signal**2 >= _LEAST_VISITS * sums.signal_squares))


def _usual_texture(sums: DetectorSums, judged: Mask) -> float:
    """Return the standard deviation of the gains, from their median deviation: a few odd pixels do not change it."""
    if not judged.any():
        return 0.0
    signal, noise = sums.signal[judged], sums.noise[judged]
    scatter = float(np.median(np.abs(sums.fine[judged] / signal))) / NORMAL_MEDIAN
    return float(np.sqrt(max(scatter**2 - float(np.median(noise / signal**2)), 0)))


def _texture(sums: DetectorSums, judged: Mask, usual: float) -> tuple[float, Image]:
    """Return the standard deviation of the gain over the pixels, 0 where not significant, and the gain itself (56, 57).

    Products of different frames at one pixel share the gain and nothing else: neither noise nor changes of the pattern.
    """
    ones = np.ones(judged.shape)
    if not judged.any():
        return 0.0, ones
    fine, squares, signal, signal_squares, noise = (
        one[judged].astype(np.float64)
        for one in (sums.fine, sums.fine_squares, sums.signal, sums.signal_squares, sums.noise)
    )
    measured, of_noise, of_others = fine / signal, noise / signal**2, signal**2 - signal_squares
    weight = np.where(measured**2 < _NOT_FOLLOWING**2 * (usual**2 + of_noise), noise**-2, 0)
    products = weight * (fine**2 - squares)
    possible = max(float((weight * of_others).sum()), 1e-300)
    square, error = float(products.sum()) / possible, float(np.sqrt((products**2).sum())) / possible
    of_a_frame = float((weight * noise).sum()) / possible * sums.frames
    if square < _SIGNIFICANT * error or square < _WORTH * of_a_frame:
        return 0.0, ones
    changes = (squares - measured**2 * signal_squares) * signal**2 / of_others
    ones[judged] += measured * square / (square + np.maximum(noise, changes) / signal**2)
    return float(np.sqrt(square)), ones


def _variance(total: Pixels, squares: Pixels, noise: Pixels, number: int) -> Image:
    """Return the variance of a sum over frames: as it scatters between them, and at least that of noise."""
    return np.maximum(noise, squares - total**2 / number).astype(np.float64)


def _following(sums: DetectorSums, valid: Mask, texture: float) -> Mask:
    """Return True but where pixels show something else than the pattern that moves; True for all if too many (58).

    Single pixels are judged first, then the sums of the others over the closest surroundings, whose noise is less.
    """
    expected = np.maximum(sums.signal, _LEAST_SIGNAL * max(float(sums.signal[valid].mean()), 0.0))
    error = _variance(sums.residual, sums.squares, sums.noise, sums.frames) + (texture * expected) ** 2
    odd = valid & (_differs(sums.residual, error, expected) | _stays(*_changes(sums)))
    rest = valid & ~odd
    total, of_noise, signal, *changes = (
        _sum_around(np.where(rest, one, 0), _CLOSE) for one in (sums.residual, error, expected, *_changes(sums))
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
