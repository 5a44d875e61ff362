"""Newton's method on the four estimating equations of the refinement, whose model is known at whole-pixel lags.

See :mod:`stillframe.refine` for the equations.
"""

import numba
import numpy as np

from stillframe.ncc import Image
from stillframe.template import REACH, SIZE

_NEWTON_STEPS = 25
_ARRIVED = 1e-8
"""Steps below this, in pixels, end Newton's method."""
_INVERSE_VANDERMONDE = np.linalg.inv(np.vander(np.arange(-REACH, REACH + 1.0), increasing=True))
"""Takes the values at the lags to the coefficients of the polynomial through them."""


@numba.njit(nogil=True, cache=True)
def newton(model: Image, totals: Image, data: Image, values: Image) -> tuple[Image, Image, bool]:
    """Newton's method on the four estimating equations, from (y, x, gain, offset): the solution and its derivatives.

    A solution farther than the model reaches is left at its border, from where the search goes on.
    """
    jacobian, system = np.zeros((4, 4)), np.zeros((4, 5))
    longest, farthest = (0.5, 0.5, np.inf, np.inf), (1.5, 1.5, np.inf, np.inf)
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
        if max(abs(system[0, 4]), abs(system[1, 4])) < _ARRIVED:
            break
    return values, jacobian, True


@numba.njit(nogil=True, cache=True)
def _linearize(model: Image, totals: Image, data: Image, values: Image, jacobian: Image, system: Image) -> None:
    """Write the derivatives at some values, and beside them what the equations lack."""
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
    """Solve four linear equations by Gauss's elimination: the last column becomes the solution, if there is one."""
    for n in range(4):
        pivot = _largest(system, n)
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
def _largest(system: Image, column: int) -> int:
    """Row of the largest number of a column, from its diagonal down."""
    place = column
    for k in range(column + 1, 4):
        place = k if abs(system[k, column]) > abs(system[place, column]) else place
    return place


@numba.njit(nogil=True, cache=True)
def _interpolate(model: Image, y: float, x: float) -> tuple[Image, Image, Image]:
    """Value and slopes of the (4, lags, lags) model between its lags, by the polynomial through all of them."""
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
    """Weights of the values at the lags in the polynomial through them, and their derivatives."""
    weights, slopes = np.zeros(SIZE), np.zeros(SIZE)
    power, slope = 1.0, 0.0
    for order in range(SIZE):
        for j in range(SIZE):
            weights[j] += power * _INVERSE_VANDERMONDE[order, j]
            slopes[j] += slope * _INVERSE_VANDERMONDE[order, j]
        power, slope = power * x, (order + 1) * power
    return weights, slopes
