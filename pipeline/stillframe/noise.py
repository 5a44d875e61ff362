"""The noise of a picture: how its variance follows its intensity, stated or measured."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.bins import bin_means, whole_bins
from stillframe.ncc import Image, Mask

_FEWEST = 64
"""Fewer pixels tell nothing of noise."""
_USUAL = 0.6
"""Part of the pixels that nothing has struck, even around a hit."""
_FEW_COUNTS = 3.0
"""With fewer counts per pixel some pixels have none, which shows the pedestal, and no line can be fitted."""
_FLOOR = 0.05
"""Variances below this part of their mean are not believed."""
_WINDOW = 768
"""Side, pixels, of the window by which a large picture is judged."""
_COARSE = 16
"""Structure that is seen in bins of this side tells where that window lies."""
_LEAST_SEEN = 0.25
"""A window with less than this part of its pixels valid is not representative."""
_SAMPLED = 2**20
"""So many pixels suffice for a curve of noise."""


class Noise(NamedTuple):
    """The variance of a picture's pixels: ``gain · (intensity − pedestal)``."""

    gain: float
    """Variance per unit of intensity; 1 for one frame of counts, 1/n for the mean of n."""
    pedestal: float
    """Intensity at which there would be no noise."""


def count_limit(variance: Image, count: float, deviations: float) -> Image:
    """Return the residual that is as rare for noise coming in counts as so many deviations are for normal noise.

    The second term is for the skewness of counts (Cornish and Fisher, 1938).
    """
    return np.asarray(deviations * np.sqrt(variance) + count * (deviations**2 - 1) / 6)


def smooth(image: Image, mask: Mask, width: float) -> Image:
    """Return the Gaussian-weighted mean of the valid pixels around each pixel."""
    total = scipy.ndimage.gaussian_filter(np.where(mask, image, 0.0), width, mode="constant")
    weight = scipy.ndimage.gaussian_filter(mask.astype(np.float64), width, mode="constant")
    return np.asarray(np.divide(total, weight, out=np.zeros_like(total), where=weight > 1e-3))


def excerpt(image: Image, mask: Mask) -> tuple[Image, Mask]:
    """Return the part of a large picture around which its structure lies, or all where that is mostly masked.

    It is enough to judge the structure by, not the noise: its pixels may all be of the same intensity.
    """
    if image.size <= 2 * _WINDOW**2:
        return image, mask
    centre = _centre(np.where(mask, image, 0.0), mask)
    starts = (
        max(0, min(round(middle) - _WINDOW // 2, length - _WINDOW))
        for middle, length in zip(centre, image.shape, strict=True)
    )
    place = tuple(slice(start, start + _WINDOW) for start in starts)
    seen = np.count_nonzero(mask[place]) >= _LEAST_SEEN * _WINDOW**2
    return (image[place], mask[place]) if seen else (image, mask)


def _centre(image: Image, mask: Mask) -> tuple[float, float]:
    """Centre (y, x) of what changes in a picture, pixels; its middle where nothing does."""
    bins, whole = bin_means(image, _COARSE), whole_bins(mask, _COARSE)
    inner = scipy.ndimage.minimum_filter(whole, 3, mode="constant", cval=False)
    change = inner * sum(scipy.ndimage.correlate1d(bins, [-1, 0, 1], axis=axis) ** 2 for axis in (0, 1))
    if not change.any():
        return image.shape[0] / 2, image.shape[1] / 2
    y, x = scipy.ndimage.center_of_mass(change)
    return float(y + 0.5) * _COARSE, float(x + 0.5) * _COARSE


def measure_noise(image: Image, mask: Mask) -> Noise:
    """Measure gain and pedestal from one picture with independent noise: its photon-transfer curve.

    The fourth difference along both axes removes what is smooth and leaves 70² times the noise's variance (after
    J. Immerkær, CVIU 64(2), 300, 1996, doi 10.1006/cviu.1996.0060); against the local intensity it is a line. Of large
    pictures every so many pixels are looked at.
    """
    kernel = np.array([1.0, -4.0, 6.0, -4.0, 1.0])
    residual = scipy.ndimage.correlate1d(np.where(mask, image, 0.0), kernel, axis=0)
    residual = scipy.ndimage.correlate1d(residual, kernel, axis=1)
    inner = np.flatnonzero(scipy.ndimage.minimum_filter(mask, 5, mode="constant", cval=False))
    if len(inner) < _FEWEST:
        return Noise(1.0, 0.0)
    # An odd step goes through all columns: detectors are read by even numbers of them.
    chosen = inner[:: len(inner) // _SAMPLED | 1]
    variance, values = residual.ravel()[chosen] ** 2 / 70**2, image.ravel()[chosen]
    lowest = float(values.min())
    few = _noise_of_few_counts(variance, values - lowest)
    if few is not None:
        return Noise(few, lowest)
    intensity = smooth(image, mask, 2.0).ravel()[chosen]
    order = np.argsort(intensity, kind="stable")
    parts = [(intensity[part].mean(), _trimmed_mean(variance[part])) for part in np.array_split(order, 32)]
    return _line(*np.array(parts).T)


def _noise_of_few_counts(variance: Image, above: Image) -> float | None:
    """Return variance over intensity where many pixels have no count, which shows the pedestal; None elsewhere."""
    counted = above[above > 0]
    if not counted.size:
        return None
    # Ten counts in a pixel that usually has few are no noise.
    kept = variance <= max(1000 * _usual_mean(variance), 30 * float(counted.min()) ** 2)
    mean = float(above[kept].mean())
    gain = float(variance[kept].mean()) / mean if mean > 0 else 0.0
    return gain if 0 < mean < _FEW_COUNTS * gain else None


def _usual_mean(values: Image) -> float:
    """Mean of what nothing has struck, even around a hit."""
    count = max(1, int(_USUAL * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


def _trimmed_mean(values: Image) -> float:
    """Mean without what no noise explains."""
    usual = _usual_mean(values)
    limit = 1000 * usual if usual > 0 else 100 * values.mean()
    return float(values[values <= limit].mean())


def _line(intensity: Image, variance: Image) -> Noise:
    """Fit variance = gain · (intensity − pedestal), each point weighted by its own scatter."""
    weight = 1 / np.maximum(variance, 0.1 * variance.mean() + 1e-300)
    design = np.stack([intensity, np.ones_like(intensity)], axis=1) * weight[:, None]
    (gain, constant), *_ = np.linalg.lstsq(design, variance * weight)
    spread = intensity.max() - intensity.min()
    if gain * spread <= 0.2 * variance.mean():
        return Noise(0.0, float(-variance.mean()))
    return Noise(float(gain), float(min(-constant / gain, intensity.min())))


def variance_of(soft: Image, mask: Mask, noise: Noise) -> Image:
    """Return the variance of each pixel of a picture whose smoothed intensity is given."""
    if noise.gain <= 0:
        return np.full_like(soft, max(-noise.pedestal, 1e-300))
    above = np.maximum(soft - noise.pedestal, 0)
    return noise.gain * np.maximum(above, max(_FLOOR * float(above[mask].mean()), 1e-300))
