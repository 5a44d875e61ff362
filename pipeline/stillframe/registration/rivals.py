"""Comparison of two fits of one frame: which of two shifts explains it better, and how certain that is.

A crystal lattice resembles itself when it is moved by a period. The scores of such shifts differ by little, and their
sampling at whole pixels or bins can hide more than that. Here both fits predict each pixel of the frame, so that
nothing depends on where pixels lie.
"""

from typing import NamedTuple

import numba
import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Mask, Pixels
from stillframe.images.binning import SingleFrame
from stillframe.images.noise import Noise, smooth, variance_of
from stillframe.images.run_lengths import RowRuns
from stillframe.registration.estimate import Estimate
from stillframe.registration.templates import Template

_FILTER_WIDTH = 3.0
"""Standard deviation, pixels, of the Gaussian that smooths the difference of two fits."""
_BLOCK = 8
"""Side of the blocks, pixels, whose residuals may be correlated."""
_SAMPLED_PIXELS = 2**18
"""A sample of the rows with this many pixels decides first."""
_DECISIVE = 4.5
"""One fit is certainly better from this many standard deviations; in 300,000 comparisons noise reaches it once."""


class PixelModel(NamedTuple):
    """A reference as it predicts single pixels (y, x)."""

    image: Float32
    """The reference less its level."""
    soft: Float32
    """The smoothed reference less its level."""
    variance: Float32
    """Variance of the reference's pixels, with a floor."""
    noise: Float32
    """Their variance without the floor, times the weight of a pixel in its own smoothed value."""
    inner: Mask
    """True where the pixel and its neighbours are valid."""


def pixel_model(image: Pixels, mask: Mask, noise: Noise, template: Template) -> PixelModel:
    """Return what a reference (y, x) predicts for single pixels; ``mask`` is True for its trusted pixels."""
    width = max(template.smoothing, _FILTER_WIDTH)
    soft = smooth(image.astype(np.float64), mask, width)
    variance = variance_of(soft, mask, noise)
    counted = np.maximum(noise.gain * (soft - noise.pedestal), 0) if noise.gain > 0 else variance
    return PixelModel(
        image=np.where(mask, image - template.level, 0).astype(np.float32),
        soft=np.where(mask, soft - template.level, 0).astype(np.float32),
        variance=np.where(mask, variance, 1).astype(np.float32),
        noise=np.where(mask, counted * _own_weight(width), 0).astype(np.float32),
        inner=scipy.ndimage.minimum_filter(mask, 3, mode="constant", cval=False),
    )


def _own_weight(width: float) -> float:
    """Return the weight of a pixel in its own smoothed value."""
    impulse = np.zeros(2 * int(4 * width + 0.5) + 1)
    impulse[len(impulse) // 2] = 1
    return float(scipy.ndimage.gaussian_filter1d(impulse, width).max() ** 2)


class _Fit(NamedTuple):
    """A fit: the frame's pixel q shows gain · reference(q + shift) + offset."""

    start_y: int
    start_x: int
    """Nearest whole-pixel shift."""
    y: float
    x: float
    """Fraction of the shift, pixels."""
    gain: float
    offset: float

    @classmethod
    def of(cls, estimate: Estimate) -> "_Fit":
        start = np.rint(estimate.shift)
        fraction = estimate.shift - start
        y, x = float(fraction[0]), float(fraction[1])
        return cls(int(start[0]), int(start[1]), y, x, estimate.gain, estimate.offset)


def preference(frame: SingleFrame, valid: RowRuns, model: PixelModel, one: Estimate, other: Estimate) -> float:
    """Return by how many standard deviations the first fit explains a frame better than the second one (52).

    It is the difference of both sums of squared residuals, over the pixels that both predict. Its standard deviation
    follows from the residuals of the better fit, summed over blocks, so that neither structure that no fit explains nor
    noise that neighbours share makes the answer too certain.
    """
    sampled = max(1, frame.values.size // _SAMPLED_PIXELS)
    found = _deviations(frame, valid, model, one, other, sampled)
    return found if abs(found) > _DECISIVE or sampled == 1 else _deviations(frame, valid, model, one, other, 1)


def preferred(preference: float) -> bool:
    """Return whether a fit is certainly better than another one."""
    return preference > _DECISIVE


def _deviations(
    frame: SingleFrame, valid: RowRuns, model: PixelModel, one: Estimate, other: Estimate, step: int
) -> float:
    difference, squares, squares_other = _compare(frame, valid, model, _Fit.of(one), _Fit.of(other), step)
    deviation = np.sqrt(squares if difference > 0 else squares_other)
    return float(difference / (2 * deviation)) if deviation > 0 else 0.0


@numba.njit(nogil=True, cache=True)
def _compare(
    frame: SingleFrame, valid: RowRuns, model: PixelModel, one: _Fit, other: _Fit, step: int
) -> tuple[float, float, float]:
    """Return the difference of the sums of squares, and for each fit the sum of squared sums over blocks.

    One in ``step`` rows of blocks is used.
    """
    values, base, origin, scale = frame
    runs, firsts = valid
    height, width = values.shape
    sums = np.zeros((2, width // _BLOCK + 1))
    difference, squares_one, squares_other = 0.0, 0.0, 0.0
    for row in range(height):
        if row // _BLOCK % step:
            continue
        for k in range(firsts[row], firsts[row + 1]):
            y, first, stop = runs[k]
            for x in range(first, stop):
                if not (_inside(model, one, y, x) and _inside(model, other, y, x)):
                    continue
                apart = _predict(model.soft, one, y, x) - _predict(model.soft, other, y, x)
                variance = _at(model.variance, one, y, x) + _at(model.variance, other, y, x)
                apart /= variance
                # The smoothed and the plain reference contain the same noise. Its expectation is added to the first
                # product and subtracted from the second.
                shared = one.gain**2 * _at(model.noise, one, y, x) / variance
                shared_other = other.gain**2 * _at(model.noise, other, y, x) / variance
                value = origin + scale * (np.float64(values[y, x]) - base)
                residual = value - _predict(model.image, one, y, x)
                residual_other = value - _predict(model.image, other, y, x)
                one_term, other_term = apart * residual + shared, apart * residual_other - shared_other
                difference += one_term + other_term
                sums[0, x // _BLOCK] += one_term
                sums[1, x // _BLOCK] += other_term
        if row % _BLOCK == _BLOCK - 1 or row == height - 1:
            squares_one += np.sum(sums[0] ** 2)
            squares_other += np.sum(sums[1] ** 2)
            sums[:] = 0
    return difference, squares_one, squares_other


@numba.njit(nogil=True, cache=True)
def _inside(model: PixelModel, fit: _Fit, y: int, x: int) -> bool:
    """Return whether a fit predicts a pixel of the frame."""
    row, column = y + fit.start_y, x + fit.start_x
    height, width = model.inner.shape
    return bool(0 <= row < height and 0 <= column < width and model.inner[row, column])


@numba.njit(nogil=True, cache=True)
def _at(image: Float32, fit: _Fit, y: int, x: int) -> float:
    """Return the value of an image of the reference at the pixel where a fit places a pixel (y, x) of the frame."""
    return np.float64(image[y + fit.start_y, x + fit.start_x])


@numba.njit(nogil=True, cache=True)
def _predict(image: Float32, fit: _Fit, y: int, x: int) -> float:
    """Return the intensity that a fit expects at a pixel of the frame, by the reference's Taylor series (26)."""
    row, column = y + fit.start_y, x + fit.start_x
    middle = np.float64(image[row, column])
    up, down = np.float64(image[row - 1, column]), np.float64(image[row + 1, column])
    left, right = np.float64(image[row, column - 1]), np.float64(image[row, column + 1])
    corners = np.float64(image[row + 1, column + 1]) - np.float64(image[row + 1, column - 1])
    corners += np.float64(image[row - 1, column - 1]) - np.float64(image[row - 1, column + 1])
    moved = middle + fit.y * (down - up) / 2 + fit.x * (right - left) / 2
    moved += fit.y**2 * (down - 2 * middle + up) / 2 + fit.x**2 * (right - 2 * middle + left) / 2
    moved += fit.y * fit.x * corners / 4
    return fit.gain * moved + fit.offset
