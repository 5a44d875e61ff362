"""Shifts to a fraction of a pixel, at the limit of counting statistics, with their covariance.

From a whole-pixel shift and a guess of gain, offset and noise the equations are solved over a sample of the rows
(:meth:`_Problem.start_on_sample`), then over all bins until the solution no longer moves. Each step is one pass over
the bins (:mod:`~.bin_pass`) and one solution (:mod:`~.equations`). Bins whose residual is an outlier, from a hot pixel
or an x-ray hit, are left out, and with them their contribution to the model (28).
"""

from typing import NamedTuple

import numba
import numpy as np
import scipy.special

from stillframe.images.arrays import Float32, Image, Mask, Pixels, Shift
from stillframe.images.binning import MovedBins, SingleFrame, moved_bins
from stillframe.images.noise import skewness_allowance
from stillframe.images.run_lengths import RowRuns, Runs
from stillframe.registration.bin_pass import HiddenBins, bin_pass, hidden_bins
from stillframe.registration.equations import Parameters, Solution, solve
from stillframe.registration.estimate import Estimate, estimate_of
from stillframe.registration.prediction import Prediction
from stillframe.registration.template_draft import LEAST_BINS
from stillframe.registration.templates import BinFields, Support, Template

_OUTLIER = 3.5
"""Residuals beyond this many standard deviations, corrected for the skewness of counts, are outliers (32)."""
_TOLERANCE = 0.2
"""Error of the expected intensity that is no outlier, as a fraction of it."""
_LARGEST_FRACTION = 0.55
"""From a larger fraction of a pixel the solution goes on from the nearest whole-pixel shift."""
_LARGEST_DISTANCE = 1.5
"""A solution farther from the peak than this, in pixels and in widths of the templates, belongs to another pattern."""
_MAX_STARTS = 8
_MAX_SAMPLE_PASSES = 8
_SAMPLE_CONVERGED = 0.02
"""Steps below this, pixels, end the work on the sample."""
_SETTLED = 1.2
"""The work on the sample goes on while the noise grows by more than this factor: too many bins were outliers."""
_LARGE_STEP = 0.25
"""A longer step over all bins, pixels, is followed by another."""
_GUESS_BINS = 2_000
"""Number of bins from which gain, offset and noise are guessed."""
_GUESS_KEPT_PIXELS, _GUESS_KEPT_BINS = 0.97, 0.75
"""Fraction of the pixels that the guess keeps, and the smallest fraction of bins."""
_LEAST_GAIN, _ALMOST_ALL = 1e-6, 0.999
"""With a smaller fraction of the gain that all pairs give, this fraction of the pairs is kept instead."""
_GUESS_ROUNDS = 3
_MOSTLY_EMPTY = 0.5
"""If a larger fraction of the bins has the lowest value of all, the frame may be one of single counts."""
_SINGLE_COUNT = 0.25
"""Quantile of the other bins, above the lowest value, that is a single count: hits are rarer, spots have more."""
_FAR_MORE = 2.0
"""The first guess is too small if the noise of such counts is so many times larger."""


def refine(
    frame: SingleFrame,
    valid: RowRuns,
    start: Shift,
    template: Template,
    fixed: Pixels,
    *,
    slack: float = 0.0,
    hidden: HiddenBins | None = None,
) -> Estimate | None:
    """Refine a whole-pixel shift (y, x), right to a few pixels; None where there is no solution near it.

    ``Estimate.product`` is taken with the image ``fixed`` (y, x), float32 or int16. ``slack`` is the largest additional
    error of the start, pixels. ``hidden`` keeps the sums over the bins that these valid pixels hide, by shift, for the
    next frame with the same valid pixels.
    """
    reach = _LARGEST_DISTANCE * max(1.0, template.smoothing) + slack
    problem = _Problem(frame, valid, template, fixed, {} if hidden is None else hidden)
    at, parameters = problem.start_on_sample(start)
    tried: set[Shift] = set()
    for _ in range(_MAX_STARTS):
        if parameters is None or np.abs(at + parameters.shift - start).max() > reach:
            return None
        bins = problem.bins_at(at, template.whole)
        solution = problem.step(template.whole, at, bins, parameters)
        if solution is None or np.abs(at + solution.parameters.shift - start).max() > reach:
            return None
        step = np.abs(solution.parameters.shift - parameters.shift).max()
        nearest, parameters = _from_nearest(at, solution.parameters)
        # Two starts can each lead to the other; either solution is right then.
        if nearest in tried or (nearest == at and step <= _LARGE_STEP):
            prediction = _prediction(solution.parameters, solution.reference_noise, template)
            return estimate_of(solution, template, frame, at, bins, prediction)
        if nearest != at:
            tried.add(at)
        at = nearest
    return None


def _from_nearest(at: Shift, parameters: Parameters) -> tuple[Shift, Parameters]:
    """Return the whole-pixel shift to go on from, and the parameters relative to it."""
    if np.abs(parameters.shift).max() <= _LARGEST_FRACTION:
        return at, parameters
    whole = np.rint(parameters.shift)
    return (at[0] + int(whole[0]), at[1] + int(whole[1])), parameters._replace(shift=parameters.shift - whole)


class _Problem(NamedTuple):
    """One frame to be aligned with one reference."""

    frame: SingleFrame
    valid: RowRuns
    template: Template
    fixed: Pixels
    hidden: HiddenBins

    def bins_at(self, start: Shift, support: Support) -> MovedBins:
        """Apply a whole-pixel shift to the frame, for the bins of a support."""
        frame, side = self.frame, self.template.side
        return moved_bins(frame.values, self.valid, frame.base, self.fixed, start, side, support.rows)

    def start_on_sample(self, start: Shift) -> tuple[Shift, Parameters | None]:
        """Solve the equations over the sample; None where too few of its bins are valid in the frame."""
        sample, at = self.template.sample, start
        bins = self.bins_at(at, sample)
        step = max(1, round(min(sample.count, sample.noisy) / _GUESS_BINS))
        pairs = _pairs(bins.means, bins.whole, sample.runs, sample.bins, step)
        if pairs.shape[1] < min(LEAST_BINS, sample.count):
            return start, None
        kept = max(_GUESS_KEPT_PIXELS**self.template.side**2, _GUESS_KEPT_BINS)
        guess = _guess(pairs, kept, self.template.sharpest)
        parameters = guess = _with_few_counts(pairs, guess, self.template)
        for _ in range(_MAX_SAMPLE_PASSES):
            solution = self.step(sample, at, bins, parameters)
            if solution is None:
                return start, guess
            step = np.abs(solution.parameters.shift - parameters.shift).max()
            settled = solution.parameters.variance < _SETTLED * parameters.variance
            nearest, parameters = _from_nearest(at, solution.parameters)
            if step < _SAMPLE_CONVERGED and settled:
                return nearest, parameters
            if nearest != at:
                at, bins = nearest, self.bins_at(nearest, sample)
        return at, parameters

    def step(self, support: Support, start: Shift, bins: MovedBins, parameters: Parameters) -> Solution | None:
        """Make one pass over the bins of a support and solve the equations; None where too few bins are left."""
        template, key = self.template, (start, support is self.template.sample)
        fields = (support.runs, support.bins, template.image, template.side)
        if key not in self.hidden:  # drift is slow, so that few shifts recur
            self.hidden[key] = hidden_bins(bins.whole, *fields)
        beta = reference_noise_in_residuals(parameters.shift, template.side)
        prediction = _prediction(parameters, beta, template)
        sums = bin_pass(bins.means, bins.whole, *fields, template.structures[0].distances, prediction)
        sums = sums._replace(omitted=sums.omitted.plus(self.hidden[key]))
        if support.count - sums.omitted.number < min(LEAST_BINS, support.count // 2 + 1):
            return None
        return solve(sums, support, parameters, prediction, beta)


def _prediction(parameters: Parameters, beta: float, template: Template) -> Prediction:
    """Return what a frame with these parameters is expected to be, and its limits for outliers (26, 32)."""
    (y, x), gain, variance = parameters.shift, parameters.gain, parameters.variance
    allowance = skewness_allowance(template.grain / template.side**2, _OUTLIER)
    taylor = gain * np.array([1, y, x, y * y / 2, y * x, x * x / 2])
    limit = _OUTLIER * np.sqrt(variance + gain**2 * beta)
    limits = (limit, allowance * variance / gain, allowance * gain, _TOLERANCE, gain * template.zero)
    return Prediction(*np.array([*taylor, parameters.offset, *limits], np.float32))


def reference_noise_in_residuals(fraction: Image, side: int) -> float:
    """Return the fraction of its variance that the reference keeps when moved by a fraction (y, x): β in (30).

    Values between pixels are weighted means of several pixels, whose noise is less; in larger bins it changes less.
    """
    y, x = fraction
    corner = y * x / 4
    stencil = np.array(
        [
            [corner, (y * y - y) / 2, -corner],
            [(x * x - x) / 2, 1 - y * y - x * x, (x * x + x) / 2],
            [-corner, (y * y + y) / 2, corner],
        ]
    )
    lags = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    shared = np.maximum(1 - lags / side, 0)
    return float(np.sum(shared @ stencil @ shared * stencil))


@numba.njit(nogil=True, cache=True)
def _pairs(means: Float32, whole: Mask, runs: Runs, bins: BinFields, step: int) -> Image:
    """Return reference, frame and inverse deviation of every n-th bin that is whole in the frame, (3, bin)."""
    out, n, i, chosen = np.empty((3, len(bins.mean) // step + 1)), 0, 0, 0
    for k in range(runs.shape[0]):
        row, first, stop = runs[k]
        while chosen < i + stop - first:
            column = first + chosen - i
            if whole[row, column] and bins.inverse_sigma[chosen] > 0:
                out[0, n], out[1, n], out[2, n] = bins.mean[chosen], means[row, column], bins.inverse_sigma[chosen]
                n += 1
            chosen += step
        i += stop - first
    return out[:, :n]


def _guess(pairs: Image, kept_fraction: float, empty: float) -> Parameters:
    """Fit gain, offset and noise to bins of reference and frame; the largest residuals are left out (33).

    Bins from the inverse deviation ``empty`` on may have less noise than it says, and do not show how much there is.
    """
    fixed, values, inverse = pairs
    plain, _ = _fit_line(fixed, values, inverse**2)
    first = _trimmed_guess(pairs, kept_fraction, empty)
    # Where hardly any bin has counts, those are not the outliers.
    return first if first.gain > _LEAST_GAIN * plain else _trimmed_guess(pairs, _ALMOST_ALL, empty)


def _with_few_counts(pairs: Image, guess: Parameters, template: Template) -> Parameters:
    """Return a better guess if the frame has so few counts that single ones look like outliers; else the same guess.

    The first guess leaves out the largest residuals. Where most bins have no count, only those are left, without noise.
    """
    fixed, values, inverse = pairs
    lowest = values.min()
    empty = values == lowest
    if template.grain <= 0 or empty.mean() <= _MOSTLY_EMPTY or empty.all():
        return guess
    count_size = template.side**2 * float(np.quantile(values[~empty] - lowest, _SINGLE_COUNT))
    of_all = _trimmed_guess(pairs, _ALMOST_ALL, template.sharpest)
    if count_size * of_all.gain < _FAR_MORE * template.grain * guess.variance:
        return guess
    guess = of_all
    for _ in range(_GUESS_ROUNDS):
        guess = guess._replace(variance=count_size * guess.gain / template.grain)
        kept = ~_outliers(pairs, guess, template)
        gain, offset = _fit_line(fixed[kept], values[kept], inverse[kept] ** 2)
        guess = guess._replace(gain=max(gain, 1e-12), offset=offset)
    return guess


def _outliers(pairs: Image, guess: Parameters, template: Template) -> Mask:
    """Return True for the bins that are brighter than a guess allows (32)."""
    fixed, values, inverse = pairs
    expected, prediction = guess.gain * fixed, _prediction(guess, 1.0, template)
    allowed = prediction.skew_above + prediction.tolerance * np.abs(expected - prediction.zero)
    return np.asarray((values - guess.offset - expected - allowed) * inverse > prediction.limit)


def _trimmed_guess(pairs: Image, kept_fraction: float, empty: float) -> Parameters:
    """Fit gain, offset and noise to a fraction of the pairs, those with the smallest residuals."""
    fixed, values, inverse = pairs
    count, residual = max(1, int(kept_fraction * len(values))), np.zeros_like(values)
    kept = np.arange(len(values))
    for _ in range(_GUESS_ROUNDS):
        gain, offset = _fit_line(fixed[kept], values[kept], inverse[kept] ** 2)
        residual = np.abs(values - gain * fixed - offset) * inverse
        kept = np.argpartition(residual, count - 1)[:count]
    noisy = residual[inverse < empty]
    if len(noisy) >= LEAST_BINS:
        count = max(1, int(kept_fraction * len(noisy)))
        square = float(np.mean(np.partition(noisy, count - 1)[:count] ** 2))
    else:
        square = float(np.mean(residual[kept] ** 2))
    variance = max(square / _central_square(kept_fraction) - gain**2, 0.3 * square)
    return Parameters(np.zeros(2), max(float(gain), 1e-12), float(offset), float(variance))


def _fit_line(x: Image, y: Image, weights: Image) -> tuple[float, float]:
    """Return slope and offset of the line through weighted points; the slope is 0 where x does not change."""
    total = weights.sum()
    x_mean, y_mean = weights @ x / total, weights @ y / total
    above = weights * (x - x_mean)
    square = above @ (x - x_mean)
    slope = above @ (y - y_mean) / square if square > 0 else 0.0
    return float(slope), float(y_mean - slope * x_mean)


def _central_square(fraction: float) -> float:
    """Return the mean square of the given fraction of smallest absolute values of a standard normal distribution."""
    limit = float(scipy.special.ndtri((1 + fraction) / 2))
    return 1 - 2 * limit * float(np.exp(-(limit**2) / 2)) / float(np.sqrt(2 * np.pi)) / fraction
