"""Judgements with their thresholds: which frames are unusable, which peaks and which estimated shifts are accepted.

1. Before any comparison, :func:`unusable` sorts out frames that are corrupt, saturated or dark.
2. A peak of the search in bins is :func:`decisive`, or the search goes on in smaller bins and pixel by pixel.
3. A peak :func:`at_edge` of its window is searched again in a wider one.
4. A shift is refused where the frame does not show the pattern (:func:`shows_pattern`, :func:`reaches_least_score`),
   where another shift explains it as well (:func:`contested`), or where it lies :func:`beyond_window`.

Nothing here reads pixels: judgements depend on statistics, peaks and estimates alone.
"""

import numpy as np
import scipy.special

from stillframe.flags import Flag
from stillframe.images.statistics import Statistics
from stillframe.registration.elongation import Elongation
from stillframe.registration.estimate import Estimate
from stillframe.registration.peak import ROUNDING, Peak

_DARK_CONTRAST = 0.05
"""A frame with less than this fraction of the reference's contrast was recorded without beam."""
_DARK_INTENSITY = 0.2
"""A frame without the pattern is dark below this fraction of the reference's intensity above its pedestal."""
_SATURATED_FRACTION = 0.05
"""A frame with more than this fraction of saturated pixels has lost its peaks."""
_FALSE_ALARM = 1e-6
"""Probability per frame that pure noise is accepted."""
_DECISIVE = 5.5
"""A second peak that is lower by this many standard deviations cannot be the true one."""
_DECISIVE_SCORE = 2 * _DECISIVE
"""A score of bins is decisive above this many standard deviations of the scores of pure noise."""
_SELF_SIMILAR = 0.4
"""A reference that scores more than this with itself at another shift may be confused with itself there."""
_PERIODIC = 0.95
"""A reference that scores more than this is almost the same at another shift."""
_SAMPLING_LOSS = 0.05
"""Fraction of a score that sampling at whole pixels may hide."""
_MISMATCH = 0.3
"""A frame shows another pattern if the reference leaves more than this fraction of its structure unexplained."""
_ELONGATION = 0.15
"""Features may be elongated by this fraction of their own second moment."""
_LEAST_ELONGATION = 1.0
"""Features may be elongated by this second moment, px²: that of two exposures 2 px apart."""
_LONGER = 0.5
"""At least this fraction of an elongation must be greater length; the rest may be smaller width."""
OUTSIDE = 0.5
"""A refined shift may lie this far outside the searched window, pixels."""


def unusable(pixels: Statistics, count: int, contrast: float) -> Flag:
    """Return what makes a frame unusable before any comparison; 0 for a usable frame.

    A dark frame is recognised by its contrast, the standard deviation of its pixels relative to that of the reference
    or of other frames, not by its mean: an offset of the detector is no beam.
    """
    if pixels.not_finite or not count:
        return Flag.CORRUPT
    if pixels.saturated > _SATURATED_FRACTION * count:
        return Flag.SATURATED
    return Flag.DARK if is_dark(pixels, contrast) else Flag(0)


def is_dark(pixels: Statistics, contrast: float) -> bool:
    """Return whether a frame is constant, or has hardly any of the contrast of the reference or of other frames."""
    return pixels.smallest == pixels.largest or pixels.deviation < _DARK_CONTRAST * contrast


def without_pattern(above_pedestal: float, usual_above_pedestal: float) -> Flag:
    """Return why a frame does not show the pattern: there was no beam, or the frame shows something else.

    Both arguments are mean intensities above the pedestal: of the frame, and of the reference.
    """
    return Flag.DARK if above_pedestal < _DARK_INTENSITY * usual_above_pedestal else Flag.LOW_SCORE


def least_significance(lags: int) -> float:
    """Return the significance that a frame without the pattern exceeds with a probability of 1e-6 (10).

    Without the pattern the gain over its standard error, which is taken from the frame's own residuals, is standard
    normal; the highest of so many lags is taken.
    """
    return float(-scipy.special.ndtri(_FALSE_ALARM / lags))


def least_score(pixels: float, lags: int) -> float:
    """Return the score that white noise exceeds at one of so many lags with a probability of 1e-6 (11).

    The NCC of n independent pixels with anything is nearly normal with the standard deviation (n − 2)^-½.
    """
    return least_significance(lags) * _score_deviation_of_noise(pixels)


def reaches_least_score(peak: Peak) -> bool:
    """Return whether a peak is higher than those of white noise."""
    return peak.score >= least_score(peak.pixels, peak.lags)


def shows_pattern(estimate: Estimate, lags: int) -> bool:
    """Return whether the frame shows mainly the reference's pattern, once, at the refined shift (40, 41, 64).

    A self-similar pattern such as rings can match one ring with another when its true shift lies outside the window.
    Much of the frame's structure is then left unexplained.
    """
    least = least_significance(lags)
    other_pattern = estimate.mismatch > _MISMATCH and estimate.mismatch_significance > least
    return estimate.significance >= least and not other_pattern and not elongated(estimate.elongation)


def elongated(features: Elongation) -> bool:
    """Return whether the features of a frame are certainly longer along one direction, as in a double exposure (64).

    Noise exceeds the significance with a probability of 1e-6 (a χ² distribution with two degrees of freedom). Features
    that are not longer than those of the reference, only narrower, show that the reference is smeared.
    """
    certain = features.significance**2 > -2 * np.log(_FALSE_ALARM)
    least = max(_LEAST_ELONGATION, _ELONGATION * features.size)
    longer = features.length > max(least, _LONGER * features.amount)
    return bool(certain and features.amount > least and longer)


def decisive(peak: Peak) -> bool:
    """Return whether this peak is certainly the highest: neither noise nor another peak can exceed it (9)."""
    high = peak.score > _DECISIVE_SCORE * _score_deviation_of_noise(peak.pixels)
    return bool(peak.lead > _DECISIVE * _deviation_of_lead(peak) and high)


def contested(peak: Peak) -> bool:
    """Return whether the second peak may be the true one, judged by the scores (42).

    It can be only where the reference is :func:`self_similar`: any other second peak is noise.
    """
    return not peak.lead >= max(_DECISIVE * _deviation_of_lead(peak), ROUNDING)


def may_be_highest(peak: Peak, highest: Peak) -> bool:
    """Return whether neither noise nor sampling lets a peak be the true one although another one is higher."""
    allowance = max(_DECISIVE * _deviation_of_lead(highest), _SAMPLING_LOSS * abs(highest.score), ROUNDING)
    return peak.score >= highest.score - allowance


def self_similar(similarity: float) -> bool:
    """Return whether a reference resembles itself at another shift, as a lattice does (42)."""
    return similarity > _SELF_SIMILAR


def periodic(similarity: float) -> bool:
    """Return whether a reference looks almost the same after a shift, as an endless lattice does."""
    return similarity > _PERIODIC


def at_edge(peak: Peak) -> bool:
    """Return whether the peak lies on the border of the shifts that have a score: a higher one may lie beyond."""
    return peak.reach > 0 and (peak.beside_undefined or peak.reach == max(map(abs, peak.shift)))


def beyond_window(estimate: Estimate, peak: Peak) -> bool:
    """Return whether a refined shift left the window of the search."""
    return bool(np.abs(estimate.shift).max() > peak.reach + OUTSIDE)


def _score_deviation_of_noise(pixels: float) -> float:
    """Return the standard deviation of the NCC of n independent pixels with anything: (n − 2)^-½."""
    return float(1 / np.sqrt(max(pixels - 2, 1)))


def _deviation_of_lead(peak: Peak) -> float:
    """Return the standard deviation of the difference of two scores; that of one score is (1 − score²) n^-½ (9)."""
    return float(np.sqrt(2) * (1 - peak.score**2) / np.sqrt(max(peak.pixels, 1)))
