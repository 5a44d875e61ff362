"""Shifts to a fraction of a pixel, at the limit of counting statistics, with their covariance.

The method solves estimating equations: with fixed templates T_k (the score functions of the shift along y and x, of
the gain and of the offset, all from a smoothed reference) the shift s + ε, gain a and offset b of a frame f are where

    Σ_p T_k(p) [f(p − s) − a R(p + ε) − b] = 0,    k = y, x, gain, offset,

over a fixed support of reference pixels p (P. Huber, "The behavior of maximum likelihood estimates under nonstandard
conditions", Proc. 5th Berkeley Symp. 1, 221, 1967, for the estimator and its sandwich covariance). With weights
1/variance the T_k are those of maximum likelihood, so the Cramér–Rao bound is met. The raw frame is never resampled
and the reference R only shifted by whole pixels: its correlation with the smooth T_k is known at lags −3…3 and
interpolated between them, which is exact to well below a thousandth of a pixel. Noise that templates and reference
share would bend that correlation (and attenuate shifts); its expectation is known from the noise's variance and
taken off. A pixel whose residual no noise explains (a hot pixel, an x-ray hit) is left out, and what it would have
contributed to the model with it.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.ncc import Image, Mask
from stillframe.search import runs_of

Weights = Literal["counts", "uniform"]

_SMOOTHINGS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Standard deviations (px) of the Gaussians that are tried for the templates."""
_KEPT_INFORMATION = 0.995
"""Part of the Fisher information that the support keeps."""
_REACH = 3
_LAGS = range(-_REACH, _REACH + 1)
_SIZE = len(_LAGS)
_OUTLIER = 3.5
"""Residuals beyond so many standard deviations, corrected for the skewness of counts, are no noise."""
_FARTHEST = 0.75
"""Fractions beyond this mean that the whole-pixel start was wrong by one; the solution is started again there."""
_WALK = 1.5
"""A solution farther from the peak than this, in pixels and in widths of the templates, belongs to something else."""
_STARTS = 8
_PASSES = 6
_FEWEST = 64
_MOST_SKEWED = 1e8
"""A picture that changes along one direction only says nothing of shifts along the other."""
_SAMPLE = 20_000
_FLOOR = 0.05
"""Variances below this part of their mean are not believed."""


class Noise(NamedTuple):
    """The variance of a picture's pixels: ``gain · (intensity − pedestal)``."""

    gain: float
    """Variance per unit of intensity; 1 for one frame of counts, 1/n for the mean of n."""
    pedestal: float
    """Intensity at which there would be no noise."""


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


def measure_noise(image: Image, mask: Mask) -> Noise:
    """Measure gain and pedestal from one picture with independent noise: its photon-transfer curve.

    The fourth difference along both axes removes what is smooth and leaves 70² times the noise's variance (after
    J. Immerkær, CVIU 64(2), 300, 1996, doi 10.1006/cviu.1996.0060); against the local intensity it is a line.
    """
    kernel = np.array([1.0, -4.0, 6.0, -4.0, 1.0])
    residual = scipy.ndimage.correlate1d(np.where(mask, image, 0.0), kernel, axis=0)
    residual = scipy.ndimage.correlate1d(residual, kernel, axis=1)
    inner = scipy.ndimage.binary_erosion(mask, np.ones((5, 5)))
    if np.count_nonzero(inner) < _FEWEST:
        return Noise(1.0, 0.0)
    variance, intensity = residual[inner] ** 2 / 70**2, smooth(image, mask, 2.0)[inner]
    order = np.argsort(intensity, kind="stable")
    parts = [(intensity[part].mean(), _trimmed_mean(variance[part])) for part in np.array_split(order, 32)]
    return _line(*np.array(parts).T)


def _trimmed_mean(values: Image) -> float:
    """Mean without what no noise explains, be it of few counts."""
    return float(values[values <= 100 * values.mean()].mean())


def _line(intensity: Image, variance: Image) -> Noise:
    """Fit variance = gain · (intensity − pedestal), each point weighted by its own scatter."""
    weight = 1 / np.maximum(variance, 0.1 * variance.mean() + 1e-300)
    design = np.stack([intensity, np.ones_like(intensity)], axis=1) * weight[:, None]
    (gain, constant), *_ = np.linalg.lstsq(design, variance * weight)
    spread = intensity.max() - intensity.min()
    if gain * spread <= 0.2 * variance.mean():
        return Noise(0.0, float(-variance.mean()))
    return Noise(float(gain), float(min(-constant / gain, intensity.min())))


@dataclass(frozen=True, eq=False)
class Template:
    """All of a reference that refinement needs and no frame changes."""

    image: Image
    """The reference (y, x) less its level, 0 where invalid."""
    level: float
    """Mean of the reference."""
    runs: npt.NDArray[np.int64]
    """Support as runs (row, first, stop)."""
    fields: npt.NDArray[np.float32]
    """Over the support: variance, reference, slopes along y and x of the smoothed reference, and the latter."""
    model: Image
    """Σ T_k(p) R(p + lag), noise taken off, (4, lags, lags)."""
    shared: Image
    """What was taken off, (4, lags, lags)."""
    totals: Image
    """Σ T_k, (4,)."""
    wander: Image
    """How the reference's noise changes with the fraction: Σ ∂_i T_k ∂_j T_l v, (2, 2, 2, 2)."""
    uniform: float
    """The weight of every pixel; 0 where it is the inverse of the variance."""
    products: Image
    """Σ T_k T_l v of the reference's variance v, (4, 4)."""
    grain: float
    """Step of one count in the reference, in its unit of intensity; 0 where noise does not come in counts."""
    smoothing: float
    """Standard deviation of the templates' Gaussian, pixels."""
    common: Image
    """Covariance (2, 2), px², of the offset that the reference's own noise gives to all frames alike."""
    structure: float
    """Mean product of neighbours along x of the support, each less the mean and over its standard deviation."""


def prepare_template(
    image: Image,
    mask: Mask,
    noise: Noise,
    weights: Weights = "counts",
    smoothing: float | None = None,
    *,
    level: float = 0.0,
) -> Template | None:
    """Prepare the templates, with the smoothing that promises the smallest errors unless one is given.

    ``level`` was taken off the image, so that single precision holds it whatever its pedestal.
    Returns None where the picture holds too little structure for its noise, or too few pixels.
    """
    width = smoothing or _best_smoothing(image, mask, noise, weights)
    return None if width is None else _template(_Draft.of(image, mask, noise, weights, width), noise, level)


def _best_smoothing(image: Image, mask: Mask, noise: Noise, weights: Weights) -> float | None:
    """Go from little to much smoothing for as long as the promised errors fall."""
    best, promised = None, np.inf
    for width in _SMOOTHINGS:
        promise = _Draft.of(image, mask, noise, weights, width).promise()
        if promise > promised:
            break
        if np.isfinite(promise):
            best, promised = width, promise
    return best


@dataclass(frozen=True, eq=False)
class _Draft:
    """Templates of one smoothing, before the sums over them."""

    image: Image
    soft: Image
    slopes: Image
    scatter: Image
    weight: Image
    support: Mask
    width: float
    uniform: float

    @classmethod
    def of(cls, image: Image, mask: Mask, noise: Noise, weights: Weights, width: float) -> "_Draft":
        """Smooth the reference, weigh its pixels and choose the support."""
        soft = smooth(image, mask, width)
        slopes = np.stack([scipy.ndimage.correlate1d(soft, [-0.5, 0, 0.5], axis=axis) for axis in (0, 1)])
        scatter = np.where(mask, variance_of(soft, mask, noise), 0)
        uniform = 0.0 if weights == "counts" else float(1 / scatter[mask].mean())
        inverse = np.divide(1, scatter, out=np.zeros_like(scatter), where=mask)
        weight = mask.astype(np.float64) * uniform if uniform else inverse
        return cls(
            image, soft, slopes, scatter, weight, _support(mask, weight * (slopes**2).sum(axis=0)), width, uniform
        )

    def promise(self) -> float:
        """Variance of shifts, px², that frames like the reference would have; infinite where noise prevails."""
        if np.count_nonzero(self.support) < _FEWEST:
            return np.inf
        templates = (self.weight * self.slopes)[:, self.support]
        change = [scipy.ndimage.correlate1d(self.image, [-0.5, 0, 0.5], axis=axis)[self.support] for axis in (0, 1)]
        shared = _curvature(self.shared_noise())
        jacobian = templates @ np.stack(change).T - shared
        if not (np.diag(jacobian) > np.abs(np.diag(shared))).all() or np.linalg.cond(jacobian) > _MOST_SKEWED:
            return np.inf
        variance = (templates * self.scatter[self.support]) @ templates.T
        inverse = np.linalg.inv(jacobian)
        return float(np.trace(inverse @ variance @ inverse.T))

    def shared_noise(self) -> Image:
        """Expectation of Σ T_k(p) η(p + lag), (4, lags, lags): T_k holds the smoothed noise η of the same picture."""
        reach = int(4 * self.width + 0.5) + 4
        impulse = np.zeros((2 * reach + 1, 2 * reach + 1))
        impulse[reach, reach] = 1
        kernel = scipy.ndimage.gaussian_filter(impulse, self.width, mode="constant")
        kernels = [scipy.ndimage.correlate1d(kernel, [-0.5, 0, 0.5], axis=axis) for axis in (0, 1)]
        lags = np.ix_(*[[reach - lag for lag in _LAGS]] * 2)
        total = float(self.weight[self.support] @ self.scatter[self.support])
        return total * np.stack([kernels[0][lags], kernels[1][lags], kernel[lags], np.zeros((_SIZE, _SIZE))])


def _template(draft: _Draft, noise: Noise, level: float) -> Template | None:
    """Sum what the estimating equations need over the support."""
    if np.count_nonzero(draft.support) < _FEWEST:
        return None
    support = draft.support
    parts = (draft.scatter, draft.image, draft.slopes[0], draft.slopes[1], draft.soft)
    fields = np.stack([part[support] for part in parts]).astype(np.float32)
    runs = runs_of(support)
    shared = draft.shared_noise()
    model = _model_sums(draft.image, runs, fields, draft.uniform) - shared
    weight = draft.weight[support]
    templates = np.stack([weight * fields[2], weight * fields[3], weight * fields[4], weight])
    scatter = draft.scatter[support]
    if np.linalg.cond(_curvature(model)) > _MOST_SKEWED:
        return None
    products = (templates * scatter) @ templates.T
    inverse = np.linalg.inv(_curvature(model))
    return Template(
        image=draft.image,
        level=level,
        runs=runs,
        fields=fields,
        model=model,
        shared=shared,
        totals=templates.sum(axis=1),
        wander=_wander(draft.weight * draft.slopes, support, draft.scatter),
        uniform=draft.uniform,
        products=products,
        grain=noise.gain,
        smoothing=draft.width,
        common=inverse @ products[:2, :2] @ inverse.T,
        structure=_structure(draft.image, draft.scatter, support),
    )


def _structure(image: Image, scatter: Image, support: Mask) -> float:
    """Mean product of neighbours along x, to which noise that is independent from pixel to pixel adds nothing."""
    inverse = 1 / scatter[support]
    level = float(image[support] @ inverse / inverse.sum())
    known = np.where(support, (image - level) / np.sqrt(np.where(support, scatter, 1)), 0)
    pairs = np.count_nonzero(support[:, 1:] & support[:, :-1])
    return float((known[:, 1:] * known[:, :-1]).sum() / max(pairs, 1))


@numba.njit(nogil=True, cache=True)
def _model_sums(image: Image, runs: npt.NDArray[np.int64], fields: npt.NDArray[np.float32], uniform: float) -> Image:
    """Σ T_k(p) R(p + lag) over the support, (4, lags, lags)."""
    model = np.zeros((4, _SIZE, _SIZE))
    i = 0
    for k in range(runs.shape[0]):
        for column in range(runs[k, 1], runs[k, 2]):
            weight = uniform if uniform > 0 else 1 / np.float64(fields[0, i])
            _add_model(model, weight, fields[:, i], image, runs[k, 0], column)
            i += 1
    return model


@numba.njit(nogil=True, cache=True, inline="always")
def _add_model(
    model: Image, weight: float, field: npt.NDArray[np.float32], image: Image, row: int, column: int
) -> None:
    """Add what one pixel of the support gives to the model."""
    for dy in range(_SIZE):
        for dx in range(_SIZE):
            value = weight * image[row + dy - _REACH, column + dx - _REACH]
            model[0, dy, dx] += field[2] * value
            model[1, dy, dx] += field[3] * value
            model[2, dy, dx] += field[4] * value
            model[3, dy, dx] += value


def variance_of(soft: Image, mask: Mask, noise: Noise) -> Image:
    """Return the variance of each pixel of a picture whose smoothed intensity is given."""
    if noise.gain <= 0:
        return np.full_like(soft, max(-noise.pedestal, 1e-300))
    above = np.maximum(soft - noise.pedestal, 0)
    return noise.gain * np.maximum(above, max(_FLOOR * float(above[mask].mean()), 1e-300))


def _support(mask: Mask, information: Image) -> Mask:
    """Pixels whose surroundings are valid and that carry all but a little of the information.

    The choice is made on smoothed information, so that it does not follow the noise.
    """
    whole = scipy.ndimage.binary_erosion(mask, np.ones((_SIZE, _SIZE)))
    density = np.where(whole, scipy.ndimage.gaussian_filter(np.where(whole, information, 0), 4.0, mode="constant"), 0)
    ordered = np.sort(density[whole])[::-1]
    if not ordered.size or ordered[0] <= 0:
        return np.zeros_like(mask)
    filled = np.cumsum(ordered)
    least = ordered[min(np.searchsorted(filled, _KEPT_INFORMATION * filled[-1]), len(ordered) - 1)]
    return np.asarray(whole & (density >= least))


def _curvature(model: Image) -> Image:
    """Derivative of the first two models by the shift at 0, (2, 2)."""
    middle, after, before = _REACH, _REACH + 1, _REACH - 1
    along_y = (model[:2, after, middle] - model[:2, before, middle]) / 2
    along_x = (model[:2, middle, after] - model[:2, middle, before]) / 2
    return np.stack([along_y, along_x], axis=1)


def _wander(templates: Image, support: Mask, scatter: Image) -> Image:
    """Scatter of Σ T_k η when the reference's noise η is read between its pixels, per fraction squared."""
    inside = templates * support
    slopes = [scipy.ndimage.correlate1d(one, [-0.5, 0, 0.5], axis=axis)[support] for one in inside for axis in (0, 1)]
    flat = np.stack(slopes)
    return np.asarray(((flat * scatter[support]) @ flat.T).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3))


class _Sums(NamedTuple):
    """What one pass over the support gives."""

    data: Image
    """Σ T_k f, (4,)."""
    model: Image
    """Σ T_k R(p + lag) of the pixels that were left out, (4, lags, lags)."""
    totals: Image
    """Σ T_k of the pixels that were left out, (4,)."""
    scatter: Image
    """Σ T_k T_l r², (4, 4)."""
    squares: float
    """Σ r² over the reference's variance."""
    neighbours: float
    """Σ r r' of neighbours along x, each over the reference's standard deviation."""
    pairs: int
    """Such pairs of pixels."""
    used: int
    """Pixels that were used."""
    outliers: int
    """Valid pixels that were left out."""


@numba.njit(nogil=True, cache=True)
def _pass(
    frame: npt.NDArray[Any],
    mask: Mask,
    start: tuple[int, int],
    runs: npt.NDArray[np.int64],
    fields: npt.NDArray[np.float32],
    image: Image,
    parameters: npt.NDArray[np.float64],
) -> _Sums:
    """Go through the support once.

    Parameters are ε_y, ε_x, gain, offset, the frame's variance over the reference's, the reference's grain, and the
    weight of every pixel if it is uniform.
    """
    ey, ex, gain, offset, own, grain, uniform = parameters
    data, totals, scatter, model = np.zeros(4), np.zeros(4), np.zeros((4, 4)), np.zeros((4, _SIZE, _SIZE))
    template = np.zeros(4)
    squares, used, outliers, neighbours, pairs = 0.0, 0, 0, 0.0, 0
    skew = grain * own / gain * (_OUTLIER**2 - 1) / 6
    skew_reference = grain * gain * (_OUTLIER**2 - 1) / 6
    height, width = frame.shape
    i = 0
    for k in range(runs.shape[0]):
        row, y = runs[k, 0], runs[k, 0] - start[0]
        before, known = 0.0, False
        for column in range(runs[k, 1], runs[k, 2]):
            x = column - start[1]
            spread, level = np.float64(fields[0, i]), np.float64(fields[1, i])
            weight = uniform if uniform > 0 else 1 / spread
            slope_y, slope_x, soft = np.float64(fields[2, i]), np.float64(fields[3, i]), np.float64(fields[4, i])
            i += 1
            template[0], template[1] = weight * slope_y, weight * slope_x
            template[2], template[3] = weight * soft, weight
            good = 0 <= y < height and 0 <= x < width and mask[y, x]
            if good:
                value = np.float64(frame[y, x])
                residual = value - gain * (level + ey * slope_y + ex * slope_x) - offset
                variance = (own + gain * gain) * spread
                limit = _OUTLIER * np.sqrt(variance)
                if residual < limit + skew and residual > -limit - skew_reference:
                    square = residual * residual
                    used += 1
                    squares += square / spread
                    residual /= np.sqrt(spread)
                    if known:
                        neighbours += residual * before
                        pairs += 1
                    before, known = residual, True
                    for a in range(4):
                        data[a] += template[a] * value
                        for b in range(a + 1):
                            scatter[a, b] += template[a] * template[b] * square
                    continue
                outliers += 1
            known = False
            for a in range(4):
                totals[a] += template[a]
            _add_model(model, weight, fields[:, i - 1], image, row, column)
    for a in range(4):
        for b in range(a):
            scatter[b, a] = scatter[a, b]
    return _Sums(data, model, totals, scatter, squares, neighbours, pairs, used, outliers)


def refine(frame: npt.NDArray[Any], mask: Mask, start: tuple[int, int], template: Template) -> Estimate | None:
    """Refine a whole-pixel shift.

    Parameters
    ----------
    frame : ndarray, shape (y, x)
        Native byte order, finite where valid.
    mask : ndarray of bool, shape (y, x)
        Valid pixels of the frame.
    start : tuple of int
        Whole-pixel shift to apply, right to a few pixels.
    template : Template
        What the reference was prepared to.

    Returns
    -------
    Estimate or None
        None where the equations have no solution near the start.
    """
    at, reach = start, _WALK * max(1.0, template.smoothing)
    for _ in range(_STARTS):
        solved = _solve_near(frame, mask, at, template)
        if solved is None or np.abs(solved.shift - start).max() > reach:
            return None
        fraction = solved.shift - at
        if np.abs(fraction).max() <= _FARTHEST:
            return solved
        at = (at[0] + round(float(fraction[0])), at[1] + round(float(fraction[1])))
    return None


def _solve_near(frame: npt.NDArray[Any], mask: Mask, start: tuple[int, int], template: Template) -> Estimate | None:
    parameters = _first_guess(frame, mask, start, template)
    if parameters is None:
        return None
    seen = -1
    for _ in range(_PASSES):
        sums = _pass(frame, mask, start, template.runs, template.fields, template.image, parameters)
        if sums.used < _FEWEST:
            return None
        solution = _solve(sums, template, parameters[:4])
        if solution is None:
            return None
        values, jacobian = solution
        step = np.abs(values[:2] - parameters[:2]).max()
        square = sums.squares / sums.used
        own = max(square - values[2] ** 2, 0.1 * square, 1e-3 * parameters[4])
        parameters = np.array([*values, own, template.grain, template.uniform])
        if np.abs(values[:2]).max() > _FARTHEST:
            break
        if step < 1e-3 and abs(sums.outliers - seen) <= 1e-5 * sums.used:
            break
        seen = sums.outliers
    return _estimate(sums, template, parameters, jacobian, start)


def _first_guess(
    frame: npt.NDArray[Any], mask: Mask, start: tuple[int, int], template: Template
) -> npt.NDArray[np.float64] | None:
    """Gain, offset and scatter from a sample of pixels, the largest residuals left out."""
    spread, level, _, _, _ = template.fields
    rows, columns = _places(template.runs)
    step = max(1, len(rows) // _SAMPLE)
    rows, columns = rows[::step] - start[0], columns[::step] - start[1]
    inside = (rows >= 0) & (rows < frame.shape[0]) & (columns >= 0) & (columns < frame.shape[1])
    inside[inside] = mask[rows[inside], columns[inside]]
    if np.count_nonzero(inside) < _FEWEST:
        return None
    values = frame[rows[inside], columns[inside]].astype(np.float64)
    known, root = level[::step][inside].astype(np.float64), 1 / np.sqrt(spread[::step][inside].astype(np.float64))
    kept = np.ones(len(values), np.bool_)
    for _ in range(3):
        design = np.stack([known, np.ones_like(known)], axis=1)[kept] * root[kept, None]
        (gain, offset), *_ = np.linalg.lstsq(design, values[kept] * root[kept])
        residual = np.abs(values - gain * known - offset) * root
        kept = residual <= np.quantile(residual, 0.97)
    scatter = 1.2 * float(np.mean(residual[kept] ** 2))
    own = max(scatter - gain**2, 0.3 * scatter)
    return np.array([0.0, 0.0, max(gain, 1e-12), offset, own, template.grain, template.uniform])


def _places(runs: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of every pixel of the runs, in order."""
    lengths = runs[:, 2] - runs[:, 1]
    first = np.repeat(runs[:, 1] - np.cumsum(lengths) + lengths, lengths)
    return np.repeat(runs[:, 0], lengths), first + np.arange(lengths.sum())


def _solve(
    sums: _Sums, template: Template, guess: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], Image] | None:
    """Newton's method on the four estimating equations; the solution and the Jacobian there.

    A solution farther than the model reaches is left at its border, from where the search goes on.
    """
    part = sums.used / template.fields.shape[1]
    model = template.model + template.shared * (1 - part) - sums.model
    totals = template.totals - sums.totals
    values = guess.copy()
    for _ in range(25):
        expected, along_y, along_x = _interpolate(model, values[:2])
        gain, offset = values[2:]
        jacobian = np.stack([gain * along_y, gain * along_x, expected, totals], axis=1)
        try:
            step = np.linalg.solve(jacobian, sums.data - gain * expected - offset * totals)
        except np.linalg.LinAlgError:
            return None
        values = values + np.array([*np.clip(step[:2], -0.5, 0.5), *step[2:]])
        values[:2] = np.clip(values[:2], -1.5, 1.5)
        if not np.isfinite(values).all() or values[2] <= 0:
            return None
        if np.abs(step[:2]).max() < 1e-8:
            break
    return values, jacobian


def _interpolate(model: Image, at: npt.NDArray[np.float64]) -> tuple[Image, Image, Image]:
    """Value and slopes of the (4, lags, lags) model between its lags, by the polynomial through all of them."""
    weights_y, slopes_y = _lagrange(float(at[0]))
    weights_x, slopes_x = _lagrange(float(at[1]))
    return model @ weights_x @ weights_y, model @ weights_x @ slopes_y, model @ slopes_x @ weights_y


def _lagrange(x: float) -> tuple[Image, Image]:
    """Weights and their derivatives of the values at the lags in the polynomial through them."""
    order = np.arange(_SIZE)
    powers, slopes = x**order, order * x ** np.maximum(order - 1, 0)
    return powers @ _INVERSE_VANDERMONDE, slopes @ _INVERSE_VANDERMONDE


_INVERSE_VANDERMONDE = np.linalg.inv(np.vander(np.array(_LAGS, dtype=np.float64), increasing=True))


def _estimate(
    sums: _Sums, template: Template, parameters: npt.NDArray[np.float64], jacobian: Image, start: tuple[int, int]
) -> Estimate:
    """Sandwich covariance of the solution, with what the reference's noise adds differently at each fraction."""
    fraction, gain = parameters[:2], parameters[2]
    bread = np.linalg.inv(jacobian)
    part = sums.used / template.fields.shape[1]
    meat = _frame_scatter(sums.scatter, gain**2 * part * template.products)
    meat[:2, :2] += gain**2 * np.einsum("klij,i,j->kl", template.wander, fraction, fraction)
    covariance = bread @ meat @ bread.T
    deviations = np.sqrt(np.maximum(np.diag(covariance), 0))
    significance = float(gain / deviations[2]) if deviations[2] > 0 else np.inf
    outliers = sums.outliers / max(sums.used + sums.outliers, 1)
    unexplained, scale = sums.neighbours / max(sums.pairs, 1), sums.squares / sums.used
    explained = gain**2 * template.structure
    return Estimate(
        np.array(start) + fraction,
        covariance[:2, :2],
        float(gain),
        float(parameters[3]),
        float(parameters[4]),
        significance,
        outliers,
        float(unexplained / (unexplained + explained)) if unexplained > 0 else 0.0,
        float(unexplained / scale * np.sqrt(sums.pairs)) if scale > 0 else 0.0,
    )


def _frame_scatter(scatter: Image, reference: Image) -> Image:
    """Take the reference's part off the scatter, unless the frame shares the reference's noise, being a part of it."""
    own = scatter - reference
    return own if (np.diag(own) > 0.1 * np.diag(scatter)).all() else scatter.copy()
