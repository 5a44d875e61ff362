"""The compiled pass of the refinement over the bins of the reference: residuals of a frame, and all sums over them.

Sums are taken down the columns of bins and added up at the end. Each step of the inner loops then stands for itself, so
that the compiler can treat many bins at a time and every instruction set gives identical bits.

Indices 0…3 of sums are the estimating equations: shift along y, shift along x, gain, offset.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Float32, Image, Indices, Mask, Shift
from stillframe.images.run_lengths import Runs
from stillframe.registration.prediction import TAYLOR_TERMS, Prediction
from stillframe.registration.templates import LAGS, BinFields, Distances, add_model

Y, X, GAIN, OFFSET = 0, 1, 2, 3
"""Indices of the four equations."""
NEAR_PAIRS = 12
"""Number of neighbours of a bin at distances of up to two bins along both axes, one direction each."""
_NEIGHBOURS_EVERY = 4
"""One in this many rows is compared with its neighbours."""
_ROWS = 4
"""Number of recent rows whose residuals are kept for products with later rows."""


class Omitted(NamedTuple):
    """Contribution of omitted bins to the sums of a support (28): it is subtracted from the sums over all bins."""

    model: Image
    """Σ T_k R(p + lag), (4, lags · lags)."""
    totals: Image
    """Σ T_k, (4,)."""
    linear: Image
    """Σ T_k times the terms of the Taylor series, (4, 6)."""
    number: int
    """Number of bins."""

    def plus(self, other: "Omitted") -> "Omitted":
        """Return the sums over the bins of both."""
        model, totals, linear = self.model + other.model, self.totals + other.totals, self.linear + other.linear
        return Omitted(model, totals, linear, self.number + other.number)


HiddenBins = dict[tuple[Shift, bool], Omitted]
"""Sums over the bins that the static mask hides, by whole-pixel shift and whether the sample's bins are meant."""


class PassSums(NamedTuple):
    """The sums of one pass."""

    residual: Image
    """Σ T_k √v_B r, (4,); r are residuals in standard deviations of the reference's bins."""
    scatter: Image
    """Σ T_k T_l v_B r², (4, 4)."""
    squares: float
    """Σ r² over the reference's variance."""
    apart: float
    """Σ r r' of two bins that share no noise, each over the reference's standard deviation."""
    far: float
    """The same sum of two bins that share only what is smooth."""
    near: float
    """Σ r r' of neighbours at distances of up to two bins, in some rows, each over the reference's deviation."""
    pairs: int
    """Number of bins of those rows."""
    omitted: Omitted
    """Bins that were left out."""


class _ColumnSums(NamedTuple):
    """Sums over rows of bins, one for each column."""

    residual: Float32
    """(4, column)."""
    scatter: Float32
    """(4, 4, column); the upper triangle is used."""
    squares: Float32
    """(column,)."""
    apart: Float32
    far: Float32
    near: Float32


class _RecentRows(NamedTuple):
    """Residuals of the last rows; row n is kept at n modulo their number, after a margin."""

    residuals: Float32
    rows: Indices
    """Which row is kept at each place; −1 for none."""
    margin: int
    """Number of columns before and after, 0: the longest distance of two bins."""


@numba.njit(nogil=True, cache=True)
def bin_pass(
    means: Float32,
    whole: Mask,
    runs: Runs,
    bins: BinFields,
    image: Float32,
    side: int,
    distances: Distances,
    prediction: Prediction,
) -> PassSums:
    """Return the sums over the bins of a support: ``runs``, ``bins`` and other fields of its template.

    ``means`` and ``whole`` (y, x) are the frame in bins, and which of these are whole. Other bins are left out, and so
    are outliers from the prediction, whose contribution to the sums of the support is returned.
    """
    width = means.shape[1]
    columns = _ColumnSums(
        np.zeros((4, width), np.float32),
        np.zeros((4, 4, width), np.float32),
        np.zeros(width, np.float32),
        np.zeros(width, np.float32),
        np.zeros(width, np.float32),
        np.zeros(width, np.float32),
    )
    margin = max(distances.apart, distances.far, 2)
    recent = _RecentRows(np.zeros((_ROWS, width + 2 * margin), np.float32), -np.ones(_ROWS, np.int64), margin)
    omitted = Omitted(np.zeros((4, LAGS)), np.zeros(4), np.zeros((4, TAYLOR_TERMS)), 0)
    kept, patch = np.empty(width, np.uint8), np.empty(LAGS)
    soft_y, soft_x, soft, inverse_sigma = bins.soft_y, bins.soft_x, bins.soft, bins.inverse_sigma
    outliers, a, pairs = 0, np.int64(0), 0
    for k in range(runs.shape[0]):
        row, first, stop = runs[k]
        if recent.rows[row % _ROWS] != row:
            recent.residuals[row % _ROWS] = 0
            recent.rows[row % _ROWS] = row
        residuals = recent.residuals[row % _ROWS, first + margin : stop + margin]
        b = a + stop - first
        _residuals(means[row, first:stop], whole[row, first:stop], bins, a, prediction, residuals, kept)
        _add_shift_terms(residuals, soft_y[a:b], soft_x[a:b], inverse_sigma[a:b], columns, first)
        _add_gain_terms(residuals, soft_y[a:b], soft_x[a:b], soft[a:b], inverse_sigma[a:b], columns, first)
        pairs += _add_pairs(recent, row, first, stop, distances, columns)
        for j in range(stop - first):
            if not kept[j] and whole[row, first + j] and inverse_sigma[a + j] > 0:
                outliers += 1
                _omit(bins, a + j, image, row * side, (first + j) * side, omitted, patch)
        a = b
    return _sum_up(columns, pairs, omitted, outliers)


@numba.njit(nogil=True, cache=True)
def _residuals(
    values: Float32,
    valid: Mask,
    bins: BinFields,
    begin: Any,
    prediction: Prediction,
    out: Float32,
    kept: npt.NDArray[np.uint8],
) -> None:
    """Write the residuals of one run over the reference's standard deviation, 0 for bins that are left out."""
    end = begin + len(values)
    mean, mean_y, mean_x = bins.mean[begin:end], bins.mean_y[begin:end], bins.mean_x[begin:end]
    mean_yy, mean_yx, mean_xx = bins.mean_yy[begin:end], bins.mean_yx[begin:end], bins.mean_xx[begin:end]
    inverse_sigma = bins.inverse_sigma[begin:end]
    gain, along_y, along_x, along_yy, along_yx, along_xx, offset, limit, above, below, error, zero = prediction
    for i in range(len(values)):
        moved = along_y * mean_y[i] + along_x * mean_x[i]
        bent = along_yy * mean_yy[i] + along_yx * mean_yx[i] + along_xx * mean_xx[i]
        expected = gain * mean[i] + moved + bent
        value = ((values[i] - offset) - expected) * inverse_sigma[i]
        allowed = error * abs(expected - zero)
        highest = limit + (above + allowed) * inverse_sigma[i]
        lowest = -limit - (below + allowed) * inverse_sigma[i]
        good = valid[i] & (value < highest) & (value > lowest)
        kept[i] = good
        out[i] = value if good else np.float32(0)


@numba.njit(nogil=True, cache=True)
def _add_shift_terms(
    residuals: Float32, soft_y: Float32, soft_x: Float32, inverse_sigma: Float32, columns: _ColumnSums, first: int
) -> None:
    """Add the terms of the shift and of the offset."""
    sums, scatter, stop = columns.residual, columns.scatter, first + len(residuals)
    sum_y, sum_x, sum_offset = sums[Y, first:stop], sums[X, first:stop], sums[OFFSET, first:stop]
    yy, yx, y_offset = scatter[Y, Y, first:stop], scatter[Y, X, first:stop], scatter[Y, OFFSET, first:stop]
    xx, x_offset = scatter[X, X, first:stop], scatter[X, OFFSET, first:stop]
    offset_offset, squares = scatter[OFFSET, OFFSET, first:stop], columns.squares[first:stop]
    for i in range(len(residuals)):
        value = residuals[i]
        of_offset = inverse_sigma[i] * value
        of_y, of_x = soft_y[i] * of_offset, soft_x[i] * of_offset
        sum_y[i] += of_y
        sum_x[i] += of_x
        sum_offset[i] += of_offset
        yy[i] += of_y * of_y
        yx[i] += of_y * of_x
        y_offset[i] += of_y * of_offset
        xx[i] += of_x * of_x
        x_offset[i] += of_x * of_offset
        offset_offset[i] += of_offset * of_offset
        squares[i] += value * value


@numba.njit(nogil=True, cache=True)
def _add_gain_terms(
    residuals: Float32,
    soft_y: Float32,
    soft_x: Float32,
    soft: Float32,
    inverse_sigma: Float32,
    columns: _ColumnSums,
    first: int,
) -> None:
    """Add the terms of the gain; in a loop of their own, so that the registers suffice."""
    scatter, stop = columns.scatter, first + len(residuals)
    sum_gain, y_gain = columns.residual[GAIN, first:stop], scatter[Y, GAIN, first:stop]
    x_gain, gain_gain = scatter[X, GAIN, first:stop], scatter[GAIN, GAIN, first:stop]
    gain_offset = scatter[GAIN, OFFSET, first:stop]
    for i in range(len(residuals)):
        of_offset = inverse_sigma[i] * residuals[i]
        of_y, of_x, of_gain = soft_y[i] * of_offset, soft_x[i] * of_offset, soft[i] * of_offset
        sum_gain[i] += of_gain
        y_gain[i] += of_y * of_gain
        x_gain[i] += of_x * of_gain
        gain_gain[i] += of_gain * of_gain
        gain_offset[i] += of_gain * of_offset


@numba.njit(nogil=True, cache=True)
def _add_pairs(recent: _RecentRows, row: Any, first: int, stop: int, distances: Distances, columns: _ColumnSums) -> int:
    """Add products of one run with rows above; return the number of bins that were compared with their neighbours."""
    residuals, rows, margin = recent
    apart, far = distances
    begin, end = first + margin, stop + margin
    here = residuals[row % _ROWS, begin:end]
    if rows[(row - apart) % _ROWS] != row - apart:
        return 0
    above = residuals[(row - apart) % _ROWS, begin - apart : end - apart]
    _add_products(here, above, columns.apart[first:stop])
    distant = residuals[(row - apart) % _ROWS, begin - far : end - far]
    _add_products(here, distant, columns.far[first:stop])
    if row % _NEIGHBOURS_EVERY:
        return 0
    for dy in range(3):
        if rows[(row - dy) % _ROWS] != row - dy:
            continue
        for dx in range(-2 if dy else 1, 3):
            _add_products(here, residuals[(row - dy) % _ROWS, begin - dx : end - dx], columns.near[first:stop])
    return stop - first


@numba.njit(nogil=True, cache=True)
def _add_products(one: Float32, other: Float32, out: Float32) -> None:
    for i in range(len(one)):
        out[i] += one[i] * other[i]


@numba.njit(nogil=True, cache=True)
def _omit(bins: BinFields, i: Any, image: Float32, row: Any, column: Any, omitted: Omitted, patch: Image) -> None:
    """Add the contribution of bin i, which begins at a pixel (row, column); ``patch`` is workspace."""
    add_model(omitted.model, bins, i, image, row, column, patch)
    weight = np.float64(bins.inverse_sigma[i]) * np.float64(bins.inverse_sigma[i])
    template_y, template_x = weight * np.float64(bins.soft_y[i]), weight * np.float64(bins.soft_x[i])
    templates = (template_y, template_x, weight * np.float64(bins.soft[i]), weight)
    taylor = (bins.mean[i], bins.mean_y[i], bins.mean_x[i], bins.mean_yy[i], bins.mean_yx[i], bins.mean_xx[i])
    for k in range(4):
        omitted.totals[k] += templates[k]
        for n in range(TAYLOR_TERMS):
            omitted.linear[k, n] += templates[k] * np.float64(taylor[n])


@numba.njit(nogil=True, cache=True)
def hidden_bins(whole: Mask, runs: Runs, bins: BinFields, image: Float32, side: int) -> Omitted:
    """Return the contribution of the bins of a support that are not whole in a frame."""
    omitted = Omitted(np.zeros((4, LAGS)), np.zeros(4), np.zeros((4, TAYLOR_TERMS)), 0)
    count, i, patch = 0, 0, np.empty(LAGS)
    for k in range(runs.shape[0]):
        row, first, stop = runs[k]
        for column in range(first, stop):
            if not whole[row, column] and bins.inverse_sigma[i] > 0:
                count += 1
                _omit(bins, i, image, row * side, column * side, omitted, patch)
            i += 1
    return Omitted(omitted.model, omitted.totals, omitted.linear, count)


@numba.njit(nogil=True, cache=True)
def _sum_up(columns: _ColumnSums, pairs: int, omitted: Omitted, outliers: int) -> PassSums:
    """Add up the columns in double precision."""
    residual, scatter = np.zeros(4), np.zeros((4, 4))
    for k in range(4):
        residual[k] = _total(columns.residual[k])
        for n in range(k, 4):
            scatter[k, n] = scatter[n, k] = _total(columns.scatter[k, n])
    left_out = Omitted(omitted.model, omitted.totals, omitted.linear, outliers)
    squares, near = _total(columns.squares), _total(columns.near)
    apart, far = _total(columns.apart), _total(columns.far)
    return PassSums(residual, scatter, squares, apart, far, near, pairs, left_out)


@numba.njit(nogil=True, cache=True)
def _total(values: Float32) -> float:
    total = 0.0
    for x in range(len(values)):
        total += np.float64(values[x])
    return total
