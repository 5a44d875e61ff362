"""The estimate of a shift: the solution of the estimating equations with its covariance and its quality.

The covariance is Huber's sandwich (34): it follows from the scatter of the residuals as they are, whatever the noise.
"""

from typing import NamedTuple

import numpy as np

from stillframe.images.arrays import Image, Shift
from stillframe.images.binning import MovedBins, SingleFrame
from stillframe.registration.bin_pass import NEAR_PAIRS, PassSums
from stillframe.registration.elongation import Elongation, elongation_of
from stillframe.registration.equations import Solution
from stillframe.registration.prediction import Prediction
from stillframe.registration.templates import LocalStructure, Template

_LEAST_OWN_SCATTER = 0.1
"""A frame with a smaller fraction of scatter of its own is part of the reference and shares its noise."""
_SIGNIFICANT_EXCESS = 4.0
"""Neighbours share noise if their products exceed 0 by this many standard deviations."""


class Estimate(NamedTuple):
    """A refined shift."""

    shift: Image
    """(y, x), pixels, to be applied to the frame."""
    covariance: Image
    """(2, 2), px², of the errors that differ from frame to frame."""
    gain: float
    """Intensity relative to the reference."""
    offset: float
    """Intensity of the frame where the reference is at its level."""
    variance: float
    """Variance of the frame's noise over that of the reference's."""
    significance: float
    """The gain in units of its standard error (41): how certain it is that the frame shows the pattern."""
    mismatch: float
    """Fraction of the frame's structure, without its noise, that the reference does not explain at this shift (40)."""
    mismatch_significance: float
    """The unexplained structure in standard errors under pure noise."""
    elongation: Elongation
    """How much farther its features extend along one direction than those of the reference (64)."""
    start: Shift
    """Whole-pixel shift that was applied."""
    product: float
    """Σ fixed · (frame − base) at that shift, over the frame's valid pixels."""


def estimate_of(
    solution: Solution, template: Template, frame: SingleFrame, start: Shift, bins: MovedBins, prediction: Prediction
) -> Estimate | None:
    """Return the estimate of a solution over all bins, in units of the frame; None without a finite covariance.

    ``start`` is the whole-pixel shift that ``bins`` have, and ``prediction`` is made from the solution.
    """
    parameters, gain = solution.parameters, solution.parameters.gain
    covariance = _covariance(solution, template)
    if not np.isfinite(covariance).all():
        return None
    deviation = float(np.sqrt(max(covariance[2, 2], 0)))
    mismatches = [_mismatch(solution, one) for one in template.structures]
    mismatch, mismatch_significance = map(min, zip(*mismatches, strict=True))
    return Estimate(
        shift=np.array(start) + parameters.shift,
        covariance=covariance[:2, :2],
        gain=gain * frame.scale,
        offset=parameters.offset * frame.scale + frame.origin,
        variance=parameters.variance * frame.scale**2,
        significance=gain / deviation if deviation > 0 else np.inf,
        mismatch=mismatch,
        mismatch_significance=mismatch_significance,
        elongation=elongation_of(template, bins, prediction, _inflation(solution.sums, solution.used)),
        start=start,
        product=bins.product,
    )


def _mismatch(solution: Solution, reference: LocalStructure) -> tuple[float, float]:
    """Return the fraction of a frame's structure that is left unexplained, and its significance (40)."""
    sums, used, gain = solution.sums, solution.used, solution.parameters.gain
    square, unexplained = sums.squares / used, max(reference.of(sums.apart, sums.far, used), 0.0)
    structure = unexplained + gain**2 * reference.amount
    deviation_of_noise = square * np.sqrt(sum(1 / share for share in reference.partners if share) / used)
    return (
        unexplained / structure if structure > 0 else 0.0,
        float(unexplained / deviation_of_noise) if square > 0 else 0.0,
    )


def _covariance(solution: Solution, template: Template) -> Image:
    """Return the sandwich covariance of shift, gain and offset (34), (4, 4)."""
    fraction, gain = solution.parameters.shift, solution.parameters.gain
    bread = np.linalg.inv(solution.jacobian)
    fraction_used = solution.used / template.whole.count
    of_reference = gain**2 * solution.reference_noise * fraction_used * template.whole.products
    meat = _own_scatter(solution.sums.scatter, of_reference)
    meat[:2, :2] += gain**2 * np.einsum("klij,i,j->kl", template.wander, fraction, fraction)
    return np.asarray(bread @ meat @ bread.T * _inflation(solution.sums, solution.used))


def _own_scatter(scatter: Image, reference: Image) -> Image:
    """Return the scatter less that of the reference, but all of it if the frame shares the reference's noise (35)."""
    own = scatter - reference
    return own if (np.diag(own) > _LEAST_OWN_SCATTER * np.diag(scatter)).all() else scatter.copy()


def _inflation(sums: PassSums, used: int) -> float:
    """Return the factor by which noise shared by neighbours enlarges variances (38), as behind a point-spread function.

    For templates that change little over the reach of the noise it is the sum of the noise's autocorrelation. Products
    of bins farther apart come from structure and are subtracted.
    """
    square = sums.squares / used
    if not sums.pairs or square <= 0:
        return 1.0
    excess = 2 * (sums.near / sums.pairs - NEAR_PAIRS * max(sums.apart, 0.0) / used) / square
    deviation = 2 * np.sqrt(NEAR_PAIRS / sums.pairs)
    return float(1 + excess) if excess > _SIGNIFICANT_EXCESS * deviation else 1.0
