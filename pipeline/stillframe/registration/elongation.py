"""The elongation of a frame's features: they are longer along one direction than those of the reference (64).

A frame that shows the pattern twice, a few pixels apart, has elongated features. Pumping makes features broader or
narrower in all directions, which is no elongation.
"""

from typing import NamedTuple

import numba
import numpy as np

from stillframe.images.arrays import Float32, Image, Mask
from stillframe.images.binning import MovedBins
from stillframe.images.run_lengths import Runs
from stillframe.registration.prediction import Prediction
from stillframe.registration.templates import BinFields, Template

_LEAST_FRACTION = 0.5
"""A frame that shows a smaller fraction of the reference is not judged: part of a ring shows one direction only."""


class Elongation(NamedTuple):
    """How much farther features extend along one direction than across it, compared with the reference."""

    amount: float = 0.0
    """Difference of the second moments along both directions, px²; two exposures d apart have d²/4."""
    significance: float = 0.0
    """The amount in its standard errors."""
    length: float = 0.0
    """Second moment that features have along their long direction more than in the reference, px²."""
    size: float = 0.0
    """Second moment of the reference's features along one direction, px²."""


def elongation_of(template: Template, frame: MovedBins, prediction: Prediction, inflation: float) -> Elongation:
    """Return the elongation of a frame at its refined shift.

    ``prediction`` is what the frame is expected to be at that shift.
    ``inflation`` is the factor by which noise that neighbours share enlarges variances.
    """
    templates = template.elongation
    if templates is None:
        return Elongation()
    sums, products = np.zeros(3), np.zeros((2, 2))
    support, fields = template.whole, (templates.first, templates.step, templates.fields)
    information = _add_sums(frame.means, frame.whole, support.runs, support.bins, *fields, prediction, sums, products)
    fraction = information / templates.information
    if fraction < _LEAST_FRACTION or not np.linalg.det(products) > 0:
        return Elongation()
    gain = float(prediction.mean)
    moments = sums / fraction / gain + templates.shared
    covariance = products * inflation / (fraction * gain) ** 2
    amount = float(np.hypot(*moments[:2]))
    significance = float(np.sqrt(moments[:2] @ np.linalg.solve(covariance, moments[:2])))
    return Elongation(amount, significance, (float(moments[2]) + amount) / 2, templates.size)


@numba.njit(nogil=True, cache=True)
def _add_sums(
    means: Float32,
    whole: Mask,
    runs: Runs,
    bins: BinFields,
    first: int,
    step: int,
    fields: Float32,
    prediction: Prediction,
    sums: Image,
    products: Image,
) -> float:
    """Add the sums of templates with residuals (3,), and of the products of the first two, term by term.

    Return the sum of the squares of the third template over its noise.

    Outliers are cut to the limits of the refinement and not left out: two exposures far apart consist of outliers.
    """
    mean, mean_y, mean_x = bins.mean, bins.mean_y, bins.mean_x
    mean_yy, mean_yx, mean_xx, inverse_sigma = bins.mean_yy, bins.mean_yx, bins.mean_xx, bins.inverse_sigma
    gain, along_y, along_x, along_yy, along_yx, along_xx, offset, limit, above, below, error, zero = prediction
    a = n = 0
    information = 0.0
    for k in range(runs.shape[0]):
        row, begin, stop = runs[k]
        if row < first or (row - first) % step:
            a += stop - begin
            continue
        for column in range(begin, stop):
            if whole[row, column]:
                moved = along_y * mean_y[a] + along_x * mean_x[a]
                bent = along_yy * mean_yy[a] + along_yx * mean_yx[a] + along_xx * mean_xx[a]
                expected, inverse = gain * mean[a] + moved + bent, inverse_sigma[a]
                allowed = error * abs(expected - zero)
                value = ((means[row, column] - offset) - expected) * inverse
                value = min(max(value, -limit - (below + allowed) * inverse), limit + (above + allowed) * inverse)
                weighted = inverse * value
                one, other = np.float64(fields[0, n] * weighted), np.float64(fields[1, n] * weighted)
                sums[0] += one
                sums[1] += other
                sums[2] += np.float64(fields[2, n] * weighted)
                information += np.float64(fields[2, n] * inverse) ** 2
                products[0, 0] += one * one
                products[0, 1] += one * other
                products[1, 1] += other * other
            a += 1
            n += 1
    products[1, 0] = products[0, 1]
    return information
