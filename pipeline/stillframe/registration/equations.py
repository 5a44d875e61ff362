"""Solution of the estimating equations (22) of the refinement by Newton's method, and what its covariance needs.

The model Σ T_k R(p + lag) is computed at whole-pixel lags and interpolated between them (23).
"""

from typing import NamedTuple

import numba
import numpy as np

from stillframe.images.arrays import Image
from stillframe.registration.bin_pass import PassSums
from stillframe.registration.prediction import Prediction
from stillframe.registration.template_draft import REACH, SIZE
from stillframe.registration.templates import Support

_NEWTON_STEPS = 25
_CONVERGED = 1e-8
"""Newton's method ends at steps below this, pixels."""
_LEAST_NOISY = 0.01
"""Least fraction of the bins that counts as noisy."""
_LONGEST_STEP, _LARGEST_FRACTION = 0.5, 1.5
"""Bounds of a step along an axis and of the solution, pixels."""
_INVERSE_VANDERMONDE = np.linalg.inv(np.vander(np.arange(-REACH, REACH + 1.0), increasing=True))
"""Matrix from the values at the lags to the coefficients of the polynomial through them."""


class Parameters(NamedTuple):
    """In what a frame differs from the reference."""

    shift: Image
    """The fraction (y, x), pixels."""
    gain: float
    """Intensity relative to the reference."""
    offset: float
    """Intensity where the reference is at its level."""
    variance: float
    """Variance of the frame's noise over that of the reference's, V in (31)."""


class Solution(NamedTuple):
    """A solution of the equations with what its covariance is computed from."""

    parameters: Parameters
    jacobian: Image
    """Derivatives of the equations by shift, gain and offset, (4, 4)."""
    sums: PassSums
    reference_noise: float
    """Fraction of the reference's variance that is in the residuals, β in (30)."""
    used: int
    """Number of bins that were not left out."""


def solve(sums: PassSums, support: Support, start: Parameters, prediction: Prediction, beta: float) -> Solution | None:
    """Solve the equations over a support with the sums of one pass; None without a solution.

    ``prediction``, made from ``start``, was subtracted from the frame's bins and is added to the sums here (27).
    ``beta`` is the fraction of the reference's variance in the residuals (30).
    """
    omitted = sums.omitted
    used = support.count - omitted.number
    fraction = 1 - omitted.number / support.count
    model = support.model + support.shared * (1 - fraction) - omitted.model.reshape(4, SIZE, SIZE)
    totals = support.totals - omitted.totals
    data = sums.residual + (support.linear - omitted.linear) @ prediction.taylor + float(prediction.offset) * totals
    values, jacobian, converged = newton(model, totals, data, np.array([*start.shift, start.gain, start.offset]))
    if not converged:
        return None
    square = sums.squares / max(support.noisy * fraction, _LEAST_NOISY * used)
    variance = max(square - beta * values[2] ** 2, 0.1 * square, 1e-3 * start.variance)
    parameters = Parameters(values[:2], float(values[2]), float(values[3]), float(variance))
    return Solution(parameters, jacobian, sums, beta, used)


@numba.njit(nogil=True, cache=True)
def newton(model: Image, totals: Image, data: Image, values: Image) -> tuple[Image, Image, bool]:
    """Return the solution (4,) of the equations (29), their derivatives (4, 4) there, and whether there is one.

    ``model`` (4, lags, lags) holds Σ T_k R(p + lag), ``totals`` and ``data`` (4,) Σ T_k and Σ T_k f; ``values`` is the
    start: y, x (pixels), gain, offset. A solution outside the range of the lags is returned at its border, from where
    the search goes on.
    """
    jacobian, system = np.zeros((4, 4)), np.zeros((4, 5))
    longest = (_LONGEST_STEP, _LONGEST_STEP, np.inf, np.inf)
    farthest = (_LARGEST_FRACTION, _LARGEST_FRACTION, np.inf, np.inf)
    values = values.copy()
    for _ in range(_NEWTON_STEPS):
        _linearize(model, totals, data, values, jacobian, system)
        if not eliminate(system):
            return values, jacobian, False
        for n in range(4):
            step = min(max(system[n, 4], -longest[n]), longest[n])
            values[n] = min(max(values[n] + step, -farthest[n]), farthest[n])
        if values[2] <= 0:
            return values, jacobian, False
        if max(abs(system[0, 4]), abs(system[1, 4])) < _CONVERGED:
            break
    return values, jacobian, True


@numba.njit(nogil=True, cache=True)
def _linearize(model: Image, totals: Image, data: Image, values: Image, jacobian: Image, system: Image) -> None:
    """Write the derivatives at some values, and beside them the remainders of the equations."""
    expected, along_y, along_x = _interpolate(model, values[0], values[1])
    gain, offset = values[2], values[3]
    for k in range(4):
        jacobian[k, 0], jacobian[k, 1] = gain * along_y[k], gain * along_x[k]
        jacobian[k, 2], jacobian[k, 3] = expected[k], totals[k]
        for n in range(4):
            system[k, n] = jacobian[k, n]
        system[k, 4] = data[k] - gain * expected[k] - offset * totals[k]


@numba.njit(nogil=True, cache=True)
def eliminate(system: Image) -> bool:
    """Solve four linear equations (4, 5) by Gauss's elimination with pivots.

    The last column becomes the solution. Returns whether there is one.
    """
    for n in range(4):
        pivot = _pivot_row(system, n)
        if not 0 < abs(system[pivot, n]) < np.inf:
            return False
        for j in range(5):
            system[n, j], system[pivot, j] = system[pivot, j], system[n, j]
        for k in range(4):
            factor = system[k, n] / system[n, n] if k != n else 0.0
            for j in range(n, 5):
                system[k, j] -= factor * system[n, j]
    solved = True
    for n in range(4):
        system[n, 4] /= system[n, n]
        solved &= abs(system[n, 4]) < np.inf
    return bool(solved)


@numba.njit(nogil=True, cache=True)
def _pivot_row(system: Image, column: int) -> int:
    """Return the row of the largest absolute value of a column, from its diagonal down."""
    row = column
    for k in range(column + 1, 4):
        row = k if abs(system[k, column]) > abs(system[row, column]) else row
    return row


@numba.njit(nogil=True, cache=True)
def _interpolate(model: Image, y: float, x: float) -> tuple[Image, Image, Image]:
    """Return value and slopes of the (4, lags, lags) model between its lags, by the polynomial through all (23)."""
    (weights_y, slopes_y), (weights_x, slopes_x) = _lagrange(y), _lagrange(x)
    value, along_y, along_x = np.zeros(4), np.zeros(4), np.zeros(4)
    for k in range(4):
        for i in range(SIZE):
            row, change = 0.0, 0.0
            for j in range(SIZE):
                row += weights_x[j] * model[k, i, j]
                change += slopes_x[j] * model[k, i, j]
            value[k] += weights_y[i] * row
            along_y[k] += slopes_y[i] * row
            along_x[k] += weights_y[i] * change
    return value, along_y, along_x


@numba.njit(nogil=True, cache=True)
def _lagrange(x: float) -> tuple[Image, Image]:
    """Return the weights of the values at the lags in the polynomial through them, and their derivatives."""
    weights, slopes = np.zeros(SIZE), np.zeros(SIZE)
    power, slope = 1.0, 0.0
    for order in range(SIZE):
        for j in range(SIZE):
            weights[j] += power * _INVERSE_VANDERMONDE[order, j]
            slopes[j] += slope * _INVERSE_VANDERMONDE[order, j]
        power, slope = power * x, (order + 1) * power
    return weights, slopes
