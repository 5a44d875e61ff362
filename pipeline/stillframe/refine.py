"""Shifts to a fraction of a pixel, at the limit of counting statistics, with their covariance.

The method solves estimating equations: with fixed templates T_k (the score functions of the shift along y and x, of
the gain and of the offset, all from a smoothed reference) the shift s + ε, gain a and offset b of a frame f are where

    Σ_p T_k(p) [f(p − s) − a R(p + ε) − b] = 0,    k = y, x, gain, offset,

over a fixed support of reference pixels p (P. Huber, "The behavior of maximum likelihood estimates under nonstandard
conditions", Proc. 5th Berkeley Symp. 1, 221, 1967, for the estimator and its sandwich covariance). With weights
1/variance the T_k are those of maximum likelihood, so the Cramér–Rao bound is met. The raw frame is never resampled
and the reference R only shifted by whole pixels: its correlation with the smooth T_k is known at lags −3…3 and
interpolated between them, which is exact to well below a thousandth of a pixel. A sample of the rows tells first what
is near and what is noise; one pass over all pixels then gives the result. Noise that templates and reference share
would bend that correlation (and attenuate shifts); its expectation is known from the noise's variance and taken off. A
pixel whose residual no noise explains (a hot pixel, an x-ray hit) is left out, and what it would have contributed to
the model with it.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import scipy.special

from stillframe.bins import Float32, Single, moved_bins
from stillframe.ncc import Image, Mask
from stillframe.runs import Places, RowRuns
from stillframe.solve import newton
from stillframe.template import FEWEST, INVERSE, LAGS, LEVEL, SIZE, Equations, Template, add_model

_OUTLIER = 3.5
"""Residuals beyond so many standard deviations, corrected for the skewness of counts, are no noise."""
_SKEW = (_OUTLIER**2 - 1) / 6
"""The correction, in units of one count (Cornish and Fisher, 1938)."""
_FARTHEST = 0.55
"""Fractions beyond this mean that the whole-pixel start was wrong by one; the solution is started again there."""
_WALK = 1.5
"""A solution farther from the peak than this, in pixels and in widths of the templates, belongs to something else."""
_STARTS = 8
_PASSES = 5
_SETTLED = 0.02
"""Steps below this, in pixels, end the work on the sample."""
_FAR_STEP = 0.25
"""A step over all pixels that is longer than this is followed by another."""
_USUAL, _USUAL_BINS = 0.97, 0.75
"""Part of the pixels that the first guess keeps, and the least part of bins."""
_NEIGHBOURS_EVERY = 4
"""One in so many rows tells what neighbouring pixels share."""
_NEAR_LAGS = 12
"""Distances of up to two bins along both axes, one direction each."""
_ROWS, _MARGIN = 4, 3
"""Rows, and columns beyond both ends of a row, that are held to look for what bins have in common."""
_GUESSED = 2_000
"""Bins that the first guess looks at."""


class Estimate(NamedTuple):
    """A refined shift."""

    shift: npt.NDArray[np.float64]
    """(y, x), pixels, to be applied to the frame."""
    covariance: npt.NDArray[np.float64]
    """(2, 2), px²: of what differs from frame to frame."""
    gain: float
    """Intensity relative to the reference."""
    offset: float
    """Intensity of the frame where the reference is at its level."""
    variance: float
    """The frame's variance over the reference's."""
    significance: float
    """The gain in units of its standard error: how surely the pattern is there at all."""
    outliers: float
    """Part of the valid pixels left out as no noise."""
    mismatch: float
    """Part of the frame's structure, its noise aside, that the reference at this shift does not explain."""
    mismatch_significance: float
    """The unexplained structure in standard errors of what noise alone would show."""
    start: tuple[int, int]
    """Whole-pixel shift that was applied."""
    product: float
    """Σ fixed · (frame − base) there, over the frame's valid pixels."""


class _Parameters(NamedTuple):
    """What a frame differs in from the reference."""

    shift: npt.NDArray[np.float64]
    """The fraction (y, x), pixels."""
    gain: float
    offset: float
    own: float
    """The frame's variance over the reference's."""


class _Sums(NamedTuple):
    """What one pass over the bins gives."""

    residual: Image
    """Σ T_k r, (4,), r from the reference moved to second order."""
    scatter: Image
    """Σ T_k T_l r², (4, 4)."""
    squares: float
    """Σ r² over the reference's variance."""
    apart: float
    """Σ r r' of bins that are apart along both axes, each over the reference's standard deviation."""
    near: float
    """The same of neighbours, of some rows: for all distances of up to two bins, one direction each."""
    pairs: int
    """How many bins of those rows there are."""
    model: Image
    """Σ T_k R(p + lag) of the bins that were left out, (4, lags · lags)."""
    totals: Image
    """Σ T_k of the bins that were left out, (4,)."""
    linear: Image
    """Σ T_k times the reference, its slopes and its bends, of the bins that were left out, (4, 6)."""
    left: int
    """Bins that were left out."""
    outliers: int
    """Those of them that are valid in the frame."""


@numba.njit(nogil=True, cache=True)
def _residuals(
    values: Float32,
    valid: Mask,
    fields: Float32,
    begin: Any,
    parameters: Float32,
    out: Float32,
    kept: npt.NDArray[np.uint8],
) -> None:
    """Residuals of one run over the reference's standard deviation, 0 where they are no noise."""
    end = begin + len(values)
    level, slope_y, slope_x = fields[LEVEL, begin:end], fields[LEVEL + 1, begin:end], fields[LEVEL + 2, begin:end]
    bend_yy, bend_yx = fields[LEVEL + 3, begin:end], fields[LEVEL + 4, begin:end]
    bend_xx, inverse = fields[LEVEL + 5, begin:end], fields[INVERSE, begin:end]
    gain, along_y, along_x, along_yy, along_yx, along_xx, offset, limit, above, below = parameters
    for i in range(len(values)):
        moved = along_y * slope_y[i] + along_x * slope_x[i]
        bent = along_yy * bend_yy[i] + along_yx * bend_yx[i] + along_xx * bend_xx[i]
        value = ((values[i] - offset) - (gain * level[i] + moved + bent)) * inverse[i]
        good = valid[i] & (value < limit + above * inverse[i]) & (value > -limit - below * inverse[i])
        kept[i] = good
        out[i] = value if good else np.float32(0)


@numba.njit(nogil=True, cache=True)
def _add(
    residuals: Float32, slope_y: Float32, slope_x: Float32, soft: Float32, pull: Float32, columns: Float32, first: int
) -> None:
    """Add what one run gives to the sums of its columns: T_k r, the upper triangle of T_k T_l r², r².

    Columns are summed up at the end: each step here stands for itself, so that the compiler may go through many at a
    time and every machine code gives the same bits.
    """
    stop = first + len(residuals)
    s0, s1, s2, s3 = columns[0, first:stop], columns[1, first:stop], columns[2, first:stop], columns[3, first:stop]
    s00, s01, s02, s03 = columns[4, first:stop], columns[5, first:stop], columns[6, first:stop], columns[7, first:stop]
    s11, s12, s13 = columns[8, first:stop], columns[9, first:stop], columns[10, first:stop]
    s22, s23, s33 = columns[11, first:stop], columns[12, first:stop], columns[13, first:stop]
    squares = columns[14, first:stop]
    for i in range(len(residuals)):
        value = residuals[i]
        a3 = pull[i] * value
        a0, a1 = slope_y[i] * a3, slope_x[i] * a3
        s0[i] += a0
        s1[i] += a1
        s3[i] += a3
        s00[i] += a0 * a0
        s01[i] += a0 * a1
        s03[i] += a0 * a3
        s11[i] += a1 * a1
        s13[i] += a1 * a3
        s33[i] += a3 * a3
        squares[i] += value * value
    for i in range(len(residuals)):
        a3 = pull[i] * residuals[i]
        a0, a1, a2 = slope_y[i] * a3, slope_x[i] * a3, soft[i] * a3
        s2[i] += a2
        s02[i] += a0 * a2
        s12[i] += a1 * a2
        s22[i] += a2 * a2
        s23[i] += a2 * a3


@numba.njit(nogil=True, cache=True)
def _add_products(one: Float32, other: Float32, columns: Float32) -> None:
    """Add the products to the sums of their columns."""
    for i in range(len(one)):
        columns[i] += one[i] * other[i]


@numba.njit(nogil=True, cache=True)
def _add_near_products(recent: Float32, rows: Places, row: int, first: int, stop: int, columns: Float32) -> None:
    """Add the products of a row with itself and the two before it, at distances of up to two bins."""
    here = recent[row % _ROWS, first:stop]
    for dy in range(3):
        if rows[(row - dy) % _ROWS] != row - dy:
            continue
        for dx in range(-2 if dy else 1, 3):
            _add_products(here, recent[(row - dy) % _ROWS, first - dx : stop - dx], columns)


@numba.njit(nogil=True, cache=True)
def _leave_out(
    fields: Float32,
    image: Float32,
    row: int,
    column: int,
    patch: Image,
    model: Image,
    totals: Image,
    linear: Image,
) -> None:
    """Add what one bin that is left out, beginning at a pixel, would have given."""
    weight = np.float64(fields[INVERSE]) * np.float64(fields[-1])
    add_model(model, weight, fields, image, row, column, patch)
    for k in range(4):
        template = weight if k == 3 else weight * np.float64(fields[k])
        totals[k] += template
        for n in range(LEVEL, INVERSE):
            linear[k, n - LEVEL] += template * np.float64(fields[n])


class Hidden(NamedTuple):
    """What the bins would have given that are not whole in the frame; see the same names of the sums of a pass."""

    model: Image
    totals: Image
    linear: Image
    left: int


HiddenBins = dict[tuple[tuple[int, int], bool], Hidden]
"""By start, and whether the sample's bins are meant."""


@numba.njit(nogil=True, cache=True)
def _hidden(whole: Mask, runs: Places, fields: Float32, image: Float32, side: int) -> Hidden:
    totals, linear, model = np.zeros(4), np.zeros((4, INVERSE - LEVEL)), np.zeros((4, LAGS))
    left, i, patch = 0, 0, np.empty(LAGS)
    for k in range(runs.shape[0]):
        row, first, stop = runs[k]
        for column in range(first, stop):
            if not whole[row, column] and fields[INVERSE, i] > 0:
                left += 1
                _leave_out(fields[:, i], image, row * side, column * side, patch, model, totals, linear)
            i += 1
    return Hidden(model, totals, linear, left)


@numba.njit(nogil=True, cache=True)
def _pass(
    means: Float32,
    whole: Mask,
    runs: Places,
    fields: Float32,
    image: Float32,
    side: int,
    apart: int,
    parameters: Float32,
) -> _Sums:
    """Go through the bins once, a run at a time; of what is left out, take only those that are whole in the frame."""
    totals, linear, model = np.zeros(4), np.zeros((4, INVERSE - LEVEL)), np.zeros((4, LAGS))
    width = means.shape[1]
    columns = np.zeros((17, width), np.float32)
    slope_y, slope_x, soft, inverse, pull = fields[0], fields[1], fields[2], fields[INVERSE], fields[-1]
    kept, patch = np.empty(width, np.uint8), np.empty(LAGS)
    # Residuals of this row and those before it, after a margin: row 0 belongs to rows with the remainder 0, and so on.
    recent, rows = np.zeros((_ROWS, width + 2 * _MARGIN), np.float32), -np.ones(_ROWS, np.int64)
    left, a, pairs = 0, np.int64(0), 0
    for k in range(runs.shape[0]):
        row, first, stop = runs[k]
        b = a + stop - first
        place, above = row % _ROWS, (row - apart) % _ROWS
        if rows[place] != row:
            recent[place] = 0
            rows[place] = row
        found = recent[place, first + _MARGIN : stop + _MARGIN]
        _residuals(means[row, first:stop], whole[row, first:stop], fields, a, parameters, found, kept)
        _add(found, slope_y[a:b], slope_x[a:b], soft[a:b], pull[a:b], columns, first)
        if rows[above] == row - apart:
            _add_products(
                found, recent[above, first + _MARGIN - apart : stop + _MARGIN - apart], columns[15, first:stop]
            )
            if row % _NEIGHBOURS_EVERY == 0:
                _add_near_products(recent, rows, row, first + _MARGIN, stop + _MARGIN, columns[16, first:stop])
                pairs += stop - first
        for j in range(stop - first):
            if not kept[j] and whole[row, first + j] and inverse[a + j] > 0:
                left += 1
                _leave_out(fields[:, a + j], image, row * side, (first + j) * side, patch, model, totals, linear)
        a = b
    sums, scatter = _sum_up(columns)
    return _Sums(sums[:4], scatter, sums[14], sums[15], sums[16], pairs, model, totals, linear, left, left)


@numba.njit(nogil=True, cache=True)
def _sum_up(columns: Float32) -> tuple[Image, Image]:
    """Sum over the columns; rows 4…13 are the upper triangle of a symmetric matrix, returned besides."""
    sums, scatter, n = np.zeros(len(columns)), np.zeros((4, 4)), 4
    for k in range(len(columns)):
        for x in range(columns.shape[1]):
            sums[k] += np.float64(columns[k, x])
    for i in range(4):
        for j in range(i, 4):
            scatter[i, j] = scatter[j, i] = sums[n]
            n += 1
    return sums, scatter


@numba.njit(nogil=True, cache=True)
def _sampled(means: Float32, whole: Mask, runs: Places, fields: Float32, step: int) -> npt.NDArray[np.float64]:
    """Reference, frame and weight of every so many bins that meet, (3, bins)."""
    out, n, i, next_one = np.empty((3, fields.shape[1] // step + 1)), 0, 0, 0
    for k in range(runs.shape[0]):
        row, first, stop = runs[k]
        while next_one < i + stop - first:
            column = first + next_one - i
            if whole[row, column] and fields[INVERSE, next_one] > 0:
                out[0, n], out[1, n], out[2, n] = (
                    fields[LEVEL, next_one],
                    means[row, column],
                    fields[INVERSE, next_one],
                )
                n += 1
            next_one += step
        i += stop - first
    return out[:, :n]


def _guess(sample: Image, usual: float) -> _Parameters:
    """Gain, offset and scatter from a few bins, the largest residuals left out."""
    known, values, inverse = sample
    most, residual = max(1, int(usual * len(values))), np.zeros_like(values)
    kept = np.arange(len(values))
    for _ in range(3):
        gain, offset = _line(known[kept], values[kept], inverse[kept] ** 2)
        residual = np.abs(values - gain * known - offset) * inverse
        kept = np.argpartition(residual, most - 1)[:most]
    square = float(np.mean(residual[kept] ** 2))
    own = max(square / _square_within(usual) - gain**2, 0.3 * square)
    return _Parameters(np.zeros(2), max(float(gain), 1e-12), float(offset), float(own))


def _line(x: Image, y: Image, weights: Image) -> tuple[float, float]:
    """Slope and offset of the line through points of some weight; no slope where x does not change."""
    total = weights.sum()
    x_mean, y_mean = weights @ x / total, weights @ y / total
    above = weights * (x - x_mean)
    square = above @ (x - x_mean)
    slope = above @ (y - y_mean) / square if square > 0 else 0.0
    return float(slope), float(y_mean - slope * x_mean)


def _square_within(part: float) -> float:
    """Mean square of the smallest values of a normal distribution of variance 1, so large a part of all."""
    limit = float(scipy.special.ndtri((1 + part) / 2))
    return 1 - 2 * limit * float(np.exp(-(limit**2) / 2)) / float(np.sqrt(2 * np.pi)) / part


def refine(
    frame: Single,
    valid: RowRuns,
    start: tuple[int, int],
    template: Template,
    fixed: npt.NDArray[Any],
    slack: float = 0.0,
    hidden: HiddenBins | None = None,
) -> Estimate | None:
    """Refine a whole-pixel shift.

    Parameters
    ----------
    frame : Single
        Of shape (y, x), finite where valid.
    valid : RowRuns
        Valid pixels of the frame.
    start : tuple of int
        Whole-pixel shift to apply, right to a few pixels.
    template : Template
        What the reference was prepared to.
    fixed : ndarray of float32 or int16, shape (y, x)
        What ``Estimate.product`` is to be taken with.
    slack : float
        Pixels by which the start may be wrong besides.
    hidden : dict, optional
        Of what these valid pixels hide at each start: kept for the next frame with the same ones.

    Returns
    -------
    Estimate or None
        None where the equations have no solution near the start.
    """
    reach = _WALK * max(1.0, template.smoothing) + slack
    problem = _Problem(frame, valid, template, fixed, {} if hidden is None else hidden)
    at, known = problem.begin(start)
    tried: set[tuple[int, int]] = set()
    for _ in range(_STARTS):
        if known is None or np.abs(at + known.shift - start).max() > reach:
            return None
        placed = problem.at(at, template.whole)
        solved = problem.step(template.whole, placed, known)
        if solved is None or np.abs(at + solved.parameters.shift - start).max() > reach:
            return None
        step = np.abs(solved.parameters.shift - known.shift).max()
        there, known = _moved(at, solved.parameters)
        # Between two starts that each point to the other, either will do.
        if there in tried or (there == at and step <= _FAR_STEP):
            return _estimate(solved, template, placed, frame)
        if there != at:
            tried.add(at)
        at = there
    return None


def _moved(at: tuple[int, int], known: _Parameters) -> tuple[tuple[int, int], _Parameters]:
    """Go on from the nearest whole-pixel shift, if the present one is too far off."""
    if np.abs(known.shift).max() <= _FARTHEST:
        return at, known
    whole = np.rint(known.shift)
    return (at[0] + int(whole[0]), at[1] + int(whole[1])), known._replace(shift=known.shift - whole)


class _Solved(NamedTuple):
    """A solution and what it comes from."""

    parameters: _Parameters
    jacobian: Image
    sums: _Sums
    borne: float
    """Part of the reference's variance that is in the residuals."""


class _Placed(NamedTuple):
    """A frame in the reference's bins, a whole-pixel shift applied."""

    start: tuple[int, int]
    means: Float32
    whole: Mask
    product: float


class _Problem(NamedTuple):
    """One frame to be laid on one reference."""

    frame: Single
    valid: RowRuns
    template: Template
    fixed: npt.NDArray[Any]
    hidden: HiddenBins

    def at(self, start: tuple[int, int], equations: Equations) -> _Placed:
        """Apply a whole-pixel shift, for the bins of some equations."""
        values, base = self.frame.values, self.frame.base
        bins = moved_bins(values, self.valid, base, self.fixed, start, self.template.side, equations.rows)
        return _Placed(start, *bins)

    def begin(self, start: tuple[int, int]) -> tuple[tuple[int, int], _Parameters | None]:
        """Solve for a sample of the rows, from a guess; None where too few bins meet."""
        sample, at = self.template.sample, start
        placed = self.at(at, sample)
        few = _sampled(placed.means, placed.whole, sample.runs, sample.fields, max(1, sample.bins // _GUESSED))
        if few.shape[1] < min(FEWEST, sample.bins):
            return start, None
        known = guess = _guess(few, max(_USUAL**self.template.side**2, _USUAL_BINS))
        for _ in range(_PASSES):
            solved = self.step(sample, placed, known)
            if solved is None:
                return start, guess
            step_length = np.abs(solved.parameters.shift - known.shift).max()
            at, known = _moved(at, solved.parameters)
            if step_length < _SETTLED:
                break
            placed = placed if at == placed.start else self.at(at, sample)
        return at, known

    def step(self, equations: Equations, placed: _Placed, known: _Parameters) -> _Solved | None:
        """Go through the bins with what is known, and solve with what that gives."""
        template = self.template
        borne = _borne(known.shift, template.side)
        limit = _OUTLIER * np.sqrt(known.own + known.gain**2 * borne)
        skew = template.grain / template.side**2 * _SKEW
        (y, x), skews = known.shift, (skew * known.own / known.gain, skew * known.gain)
        moved = known.gain * np.array([1, y, x, y * y / 2, y * x, x * x / 2])
        rounded = np.array([*moved, known.offset, limit, *skews], np.float32)
        runs, fields, side = equations.runs, equations.fields, template.side
        sums = _pass(placed.means, placed.whole, runs, fields, template.image, side, template.apart, rounded)
        sums = self._with_hidden(sums, equations, placed)
        if equations.bins - sums.left < min(FEWEST, equations.bins // 2 + 1):
            return None
        return _solved(sums, equations, known, rounded.astype(np.float64), borne)

    def _with_hidden(self, sums: _Sums, equations: Equations, placed: _Placed) -> _Sums:
        """Add what is not whole: drifts are slow, so that few starts come again and again."""
        key = placed.start, equations is self.template.sample
        if key not in self.hidden:
            runs, fields, template = equations.runs, equations.fields, self.template
            self.hidden[key] = _hidden(placed.whole, runs, fields, template.image, template.side)
        model, totals, linear, left = self.hidden[key]
        return sums._replace(
            model=sums.model + model, totals=sums.totals + totals, linear=sums.linear + linear, left=sums.left + left
        )


def _borne(fraction: Image, side: int) -> float:
    """Part of its variance that the noise of the reference keeps when moved by a fraction as for the residuals.

    Values between pixels are weighted means, whose noise is less; the larger the bins are, the less so.
    """
    y, x = fraction
    corner = y * x / 4
    stencil = np.array([[corner, (y * y - y) / 2, -corner], [(x * x - x) / 2, 1 - y * y - x * x, (x * x + x) / 2]])
    stencil = np.vstack([stencil, [-corner, (y * y + y) / 2, corner]])
    lags = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    shared = np.maximum(1 - lags / side, 0)
    return float(np.sum(shared @ stencil @ shared * stencil))


def _solved(sums: _Sums, equations: Equations, known: _Parameters, rounded: Image, borne: float) -> _Solved | None:
    """Solve the equations with what one pass gave."""
    part = 1 - sums.left / equations.bins
    model = equations.model + equations.shared * (1 - part) - sums.model.reshape(4, SIZE, SIZE)
    totals = equations.totals - sums.totals
    data = sums.residual + (equations.linear - sums.linear) @ rounded[:6] + rounded[6] * totals
    values, jacobian, good = newton(model, totals, data, np.array([*known.shift, known.gain, known.offset]))
    if not good:
        return None
    square = sums.squares / (equations.bins - sums.left)
    own = max(square - borne * values[2] ** 2, 0.1 * square, 1e-3 * known.own)
    return _Solved(_Parameters(values[:2], float(values[2]), float(values[3]), float(own)), jacobian, sums, borne)


def _estimate(solved: _Solved, template: Template, placed: _Placed, unit: Single) -> Estimate | None:
    """Sandwich covariance of the solution, with what the reference's noise adds differently at each fraction."""
    sums, parameters = solved.sums, solved.parameters
    fraction, gain = parameters.shift, parameters.gain
    bread = np.linalg.inv(solved.jacobian)
    used = template.whole.bins - sums.left
    part = used / template.whole.bins
    meat = _frame_scatter(sums.scatter, gain**2 * solved.borne * part * template.whole.products)
    meat[:2, :2] += gain**2 * np.einsum("klij,i,j->kl", template.wander, fraction, fraction)
    covariance = bread @ meat @ bread.T * _inflation(sums, used)
    if not np.isfinite(covariance).all():
        return None
    deviation = float(np.sqrt(max(covariance[2, 2], 0)))
    scale = unit.scale / template.scale
    unexplained, square = max(sums.apart, 0.0) / used, sums.squares / used
    whole = unexplained + gain**2 * template.structure
    return Estimate(
        shift=np.array(placed.start) + fraction,
        covariance=covariance[:2, :2],
        gain=gain * scale,
        offset=parameters.offset * unit.scale + unit.origin,
        variance=parameters.own * scale**2,
        significance=gain / deviation if deviation > 0 else np.inf,
        outliers=sums.outliers / (used + sums.outliers),
        mismatch=unexplained / whole if whole > 0 else 0.0,
        mismatch_significance=unexplained / square * np.sqrt(used) if square > 0 else 0.0,
        start=placed.start,
        product=placed.product,
    )


def _inflation(sums: _Sums, used: int) -> float:
    """By what the variance is larger because neighbours share noise, as behind a point-spread function.

    For templates that change little over the reach of the noise it is the sum of its autocorrelation. What pixels
    farther apart have in common is structure, not noise.
    """
    square = sums.squares / used
    if not sums.pairs or square <= 0:
        return 1.0
    excess = 2 * (sums.near / sums.pairs - _NEAR_LAGS * max(sums.apart, 0.0) / used) / square
    return float(1 + excess) if excess > 4 * 2 * np.sqrt(_NEAR_LAGS / sums.pairs) else 1.0


def _frame_scatter(scatter: Image, reference: Image) -> Image:
    """Take the reference's part off the scatter, unless the frame shares the reference's noise, being a part of it."""
    own = scatter - reference
    return own if (np.diag(own) > 0.1 * np.diag(scatter)).all() else scatter.copy()
