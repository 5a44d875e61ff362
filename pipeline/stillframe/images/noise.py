"""Noise of an image: how the variance of its pixels depends on their intensity, and what residual is an outlier."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Image, Indices, Mask
from stillframe.images.binning import bin_means, whole_bins

_LEAST_PIXELS = 64
"""With fewer pixels the noise is not measured; counts without a pedestal are assumed."""
_UNTOUCHED_FRACTION = 0.6
"""Fraction of pixels free of hits, even in the surroundings of a hit."""
_OUTLIER_RATIO = 1000
"""Squared differences of more than this many times the mean of untouched pixels come from hits, not from noise."""
_SPOT = 10.0
"""Variance over local intensity, steps of a count, that a spot reaches; that of a single hit is higher."""
_FEW_COUNTS = 3.0
"""Below this mean number of counts many pixels have no count. They show the pedestal; a line could not be fitted."""
_LEAST_VARIANCE = 0.05
"""Smallest variance of a pixel, as a fraction of the mean variance of the image."""
_WINDOW = 768
"""Side, pixels, of the window that represents a large image."""
_COARSE_BIN = 16
"""Side, pixels, of the bins in which the centre of the structure is computed."""
_LEAST_VALID = 0.25
"""A window with a smaller fraction of valid pixels does not represent the image."""
_SAMPLED_PIXELS = 2**20
"""Number of pixels that suffices for the photon-transfer curve."""
_CURVE_POINTS = 32
"""Number of points of the photon-transfer curve."""
_FOURTH = np.array([1.0, -4.0, 6.0, -4.0, 1.0])
"""Fourth difference."""
_LOCAL = 2.0
"""Standard deviation, pixels, of the Gaussian that gives the intensity around a pixel."""
_LEAST_TEXTURE = 0.015
"""A smaller texture pulls by less than 0.3 % of a shift, and sharp spots may look like one."""
_CERTAIN = 5.0
"""A texture is certain if its variance is so many standard errors above 0."""
_LARGEST_TEXTURE = 0.3
"""What seems larger are narrow spots."""


class Noise(NamedTuple):
    """Variance of an image's pixels (12): ``gain · (intensity − pedestal)``, or ``−pedestal`` where the gain is 0."""

    gain: float
    """Variance per unit of intensity; 1 for one frame of counts, 1/n for the mean of n; 0 for a constant variance."""
    pedestal: float
    """Intensity at which the variance would be 0; the negative of the variance where the gain is 0."""

    def mean_variance(self, mean: float) -> float:
        """Return the mean variance of pixels of this mean intensity."""
        return self.gain * (mean - self.pedestal) if self.gain > 0 else -self.pedestal

    def of_mean(self, ratio: float) -> "Noise":
        """Return the noise of an image whose variance is smaller by a ratio at every intensity."""
        return Noise(self.gain * ratio, self.pedestal) if self.gain > 0 else Noise(0.0, self.pedestal * ratio)

    def relative_to(self, level: float) -> "Noise":
        """Return the noise of the image after a constant level was subtracted."""
        return Noise(self.gain, self.pedestal - level) if self.gain > 0 else self


def residual_limit(variance: Image, count: float, deviations: float) -> Image:
    """Return the residual from a model above which a pixel is an outlier (17).

    Noise that comes in counts of size ``count`` exceeds it as rarely as normal noise exceeds so many standard
    deviations.
    """
    return np.asarray(deviations * np.sqrt(variance) + skewness_allowance(count, deviations))


def skewness_allowance(count: float, deviations: float) -> float:
    """Return how far a limit must be raised so that skewed counts exceed it as rarely as normal noise would (17)."""
    return count * ((deviations**2 - 1) / 6)


def smooth(image: Image, mask: Mask, width: float) -> Image:
    """Return the Gaussian-weighted mean of the valid pixels around each pixel; ``width`` is in pixels."""
    total = scipy.ndimage.gaussian_filter(np.where(mask, image, 0.0), width, mode="constant")
    weight = scipy.ndimage.gaussian_filter(mask.astype(np.float64), width, mode="constant")
    return np.asarray(np.divide(total, weight, out=np.zeros_like(total), where=weight > 1e-3))


def excerpt(image: Image, mask: Mask) -> tuple[Image, Mask]:
    """Return a window of a large image around the centre of its structure, or all where the window is mostly masked.

    The window suffices to judge the structure, but not the noise: its pixels may all have the same intensity.
    """
    if image.size <= 2 * _WINDOW**2:
        return image, mask
    centre = _centre_of_structure(np.where(mask, image, 0.0), mask)
    axes = zip(centre, image.shape, strict=True)
    starts = (max(0, min(round(middle) - _WINDOW // 2, length - _WINDOW)) for middle, length in axes)
    window = tuple(slice(start, start + _WINDOW) for start in starts)
    enough = np.count_nonzero(mask[window]) >= _LEAST_VALID * _WINDOW**2
    return (image[window], mask[window]) if enough else (image, mask)


def _centre_of_structure(image: Image, mask: Mask) -> tuple[float, float]:
    """Return the centre (y, x), pixels, weighted by the squared slope; the middle of an image without slopes."""
    bins, whole = bin_means(image, _COARSE_BIN), whole_bins(mask, _COARSE_BIN)
    inner = scipy.ndimage.minimum_filter(whole, 3, mode="constant", cval=False)
    change = inner * sum(scipy.ndimage.correlate1d(bins, [-1, 0, 1], axis=axis) ** 2 for axis in (0, 1))
    if not change.any():
        return image.shape[0] / 2, image.shape[1] / 2
    y, x = scipy.ndimage.center_of_mass(change)
    return float(y + 0.5) * _COARSE_BIN, float(x + 0.5) * _COARSE_BIN


def measure_noise(image: Image, mask: Mask) -> Noise:
    """Return gain and pedestal measured from one image with independent noise: its photon-transfer curve.

    The fourth difference along both axes removes smooth structure and leaves 70² times the variance of the noise (13).
    Against the local intensity it is a line (14). Of large images only every n-th pixel is used.
    """
    residual, inner = _fourth_difference(image, mask)
    if len(inner) < _LEAST_PIXELS:
        return Noise(1.0, 0.0)
    # Detectors are read out by even numbers of columns. An odd step samples all columns alike.
    chosen = inner[:: len(inner) // _SAMPLED_PIXELS | 1]
    variance, values = residual.ravel()[chosen] ** 2 / 70**2, image.ravel()[chosen]
    lowest = float(values.min())
    # The intensity that belongs to a squared difference: the mean with the squares of its weights.
    weights = _FOURTH**2 / 70
    local = scipy.ndimage.correlate1d(np.where(mask, image, 0.0), weights, axis=0)
    local = scipy.ndimage.correlate1d(local, weights, axis=1).ravel()[chosen]
    gain = _gain_of_few_counts(variance, values - lowest, local - lowest)
    if gain is not None:
        return Noise(gain, lowest)
    intensity = smooth(image, mask, _LOCAL).ravel()[chosen]
    order = np.argsort(intensity, kind="stable")
    groups = np.array_split(order, _CURVE_POINTS)
    return _fit_line(*np.array([_trimmed_means(variance[group], local[group]) for group in groups]).T)


def texture_of(image: Image, mask: Mask, noise: Noise) -> float:
    """Return the standard deviation of the pixels' gains that an image of known noise shows (59).

    It is 0 below 1.5 %, and where the noise does not follow the intensity. Hot pixels, and spots with a standard
    deviation below 1.3 pixels, count as texture, too; 30 % is the most that is returned.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> counts = rng.poisson(1000 * rng.normal(1, 0.1, (64, 64)))
    >>> round(texture_of(counts.astype(float), counts > -1, Noise(1.0, 0.0)), 1)
    0.1
    """
    residual, inner = _fourth_difference(image, mask)
    if noise.gain <= 0 or len(inner) < _LEAST_PIXELS:
        return 0.0
    local = smooth(image, mask, _LOCAL)
    variance, signal = (one.ravel()[inner] for one in (variance_of(local, mask, noise), local - noise.pedestal))
    squares = residual.ravel()[inner] ** 2 / 70**2
    weight = np.where(signal > 0, (signal / variance) ** 2, 0)
    excess, total = weight * (squares - variance), max(float((weight * signal**2).sum()), 1e-300)
    square, error = float(excess.sum()) / total, float(np.sqrt((excess**2).sum())) / total
    seen = square > max(_LEAST_TEXTURE**2, _CERTAIN * error)
    return min(float(np.sqrt(square)), _LARGEST_TEXTURE) if seen else 0.0


def _fourth_difference(image: Image, mask: Mask) -> tuple[Image, Indices]:
    """Return the fourth difference along both axes (13), and the flat places where all its pixels are valid."""
    residual = np.where(mask, image, 0.0)
    for axis in (0, 1):
        residual = scipy.ndimage.correlate1d(residual, _FOURTH, axis=axis)
    return residual, np.flatnonzero(scipy.ndimage.minimum_filter(mask, 5, mode="constant", cval=False))


def _gain_of_few_counts(variance: Image, above: Image, local: Image) -> float | None:
    """Return variance over intensity where many pixels have no count and show the pedestal (15); None elsewhere.

    ``above`` are pixels and ``local`` means of their surroundings, less the pedestal.
    """
    counted = above[above > 0]
    if not counted.size:
        return None
    # The second limit keeps single counts, the third those of a spot. Ten counts in a pixel that mostly has none exceed
    # both.
    step = float(counted.min())
    kept = variance <= np.maximum(max(_OUTLIER_RATIO * _untouched_mean(variance), 30 * step**2), _SPOT * step * local)
    mean = float(local[kept].mean())
    gain = float(variance[kept].mean()) / mean if mean > 0 else 0.0
    return gain if 0 < float(above.mean()) < _FEW_COUNTS * gain else None


def _untouched_mean(values: Image) -> float:
    """Return the mean of the smallest values, those free of hits."""
    count = max(1, int(_UNTOUCHED_FRACTION * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


def _trimmed_means(variance: Image, intensity: Image) -> tuple[float, float]:
    """Return the mean intensity and variance without the outliers that hits cause."""
    untouched = _untouched_mean(variance)
    kept = variance <= (_OUTLIER_RATIO * untouched if untouched > 0 else 100 * variance.mean())
    return float(intensity[kept].mean()), float(variance[kept].mean())


def _fit_line(intensity: Image, variance: Image) -> Noise:
    """Fit variance = gain · (intensity − pedestal), each point weighted by the inverse of its own scatter."""
    weight = 1 / np.maximum(variance, 0.1 * variance.mean() + 1e-300)
    design = np.stack([intensity, np.ones_like(intensity)], axis=1) * weight[:, None]
    (gain, constant), *_ = np.linalg.lstsq(design, variance * weight)
    spread = intensity.max() - intensity.min()
    if gain * spread <= 0.2 * variance.mean():
        return Noise(0.0, float(-variance.mean()))
    return Noise(float(gain), float(min(-constant / gain, intensity.min())))


def variance_of(soft: Image, mask: Mask, noise: Noise) -> Image:
    """Return the variance of each pixel of an image (16), from its smoothed intensity."""
    if noise.gain <= 0:
        return np.full_like(soft, max(-noise.pedestal, 1e-300))
    above = np.maximum(soft - noise.pedestal, 0)
    return noise.gain * np.maximum(above, max(_LEAST_VARIANCE * float(above[mask].mean()), 1e-300))
