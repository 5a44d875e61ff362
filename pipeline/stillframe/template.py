"""What refinement needs of a reference and no frame changes: templates, and the sums over them.

See :mod:`stillframe.refine` for the equations these belong to.
"""

from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.ncc import Image, Mask
from stillframe.noise import Noise, smooth, variance_of
from stillframe.search import Float32, runs_of

Weights = Literal["counts", "uniform"]
Runs = npt.NDArray[np.int64]

REACH = 3
"""Lags at which the model is known, on either side."""
SIZE = 2 * REACH + 1
APART = 3
"""Pixels so far apart along both axes share no noise, but structure."""
FEWEST = 64
"""Fewer pixels give no shift."""
_SMOOTHINGS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Standard deviations (px) of the Gaussians that are tried for the templates."""
_KEPT_INFORMATION = 0.995
"""Part of the Fisher information that the support keeps."""
_MOST_SKEWED = 1e8
"""A picture that changes along one direction only says nothing of shifts along the other."""
_PARTS = 0.05
"""How many of the frames may be part of the reference."""
_BANDS, _BAND = 4, 128
"""Bands, and rows of each, by which the smoothing for a large picture is chosen."""
_SAMPLED = 100_000
"""Pixels that suffice to begin with."""
_GAP = 64
"""Gaps of up to so many pixels are gone through with the runs around them."""
_SPARSEST = 12
"""At least every so many rows of the support are in the sample."""


@dataclass(frozen=True, eq=False)
class Equations:
    """The estimating equations over some pixels of the reference."""

    runs: Runs
    """Runs (row, first, stop) that hold the pixels; short gaps between these are part of them."""
    fields: Float32
    """Slopes along y and x of the smoothed reference, the latter itself, one over the standard deviation of the
    reference, and, for uniform weights, their product with the standard deviation; (4 or 5, pixels of the runs), 0 in
    gaps."""
    model: Image
    """Σ T_k(p) R(p + lag), noise taken off, (4, lags, lags)."""
    shared: Image
    """What was taken off, (4, lags, lags)."""
    totals: Image
    """Σ T_k, (4,)."""
    linear: Image
    """Σ T_k times the reference and its slopes, (4, 3)."""
    products: Image
    """Σ T_k T_l v of the reference's variance v, (4, 4)."""
    pixels: int
    """How many there are, without gaps."""


@dataclass(frozen=True, eq=False)
class Template:
    """All of a reference that refinement needs and no frame changes."""

    image: Float32
    """The reference (y, x) less its level, 0 where invalid."""
    level: float
    """Mean of the reference."""
    whole: Equations
    """Over the whole support."""
    sample: Equations
    """Over some of its rows, to begin with."""
    wander: Image
    """How the reference's noise changes with the fraction: Σ ∂_i T_k ∂_j T_l v, (2, 2, 2, 2)."""
    grain: float
    """Step of one count in the reference, in its unit of intensity; 0 where noise does not come in counts."""
    smoothing: float
    """Standard deviation of the templates' Gaussian, pixels."""
    common: Image
    """Covariance (2, 2), px², of the offset that the reference's own noise gives to all frames alike."""
    structure: float
    """Mean product of pixels of the support that lie APART along both axes, each less the mean and over its standard
    deviation."""


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
    image, mask = _excerpt(image, mask)
    best, promised = None, np.inf
    for width in _SMOOTHINGS:
        promise = _Draft.of(image, mask, noise, weights, width).promise()
        if promise > promised:
            break
        if np.isfinite(promise):
            best, promised = width, promise
    return best


def _excerpt(image: Image, mask: Mask) -> tuple[Image, Mask]:
    """Return bands of rows of a large picture, apart from one another: enough to compare smoothings by."""
    height = len(image)
    if height <= 2 * _BANDS * _BAND:
        return image, mask
    starts = np.linspace(0, height - _BAND, _BANDS).astype(int)
    rows = np.concatenate([np.arange(start, start + _BAND) for start in starts])
    apart = np.arange(len(rows)) % _BAND >= REACH
    return image[rows], mask[rows] & apart[:, None]


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
        """Variance of shifts, px², that frames like the reference would have; infinite where noise prevails.

        Some frames may be part of the reference: their own noise in the slopes draws them to a fraction of a pixel.
        """
        if np.count_nonzero(self.support) < FEWEST:
            return np.inf
        templates = (self.weight * self.slopes)[:, self.support]
        change = [scipy.ndimage.correlate1d(self.image, [-0.5, 0, 0.5], axis=axis)[self.support] for axis in (0, 1)]
        shared = curvature(self.shared_noise(self.support))
        jacobian = templates @ np.stack(change).T - shared
        if not (np.diag(jacobian) > np.abs(np.diag(shared))).all() or np.linalg.cond(jacobian) > _MOST_SKEWED:
            return np.inf
        variance = (templates * self.scatter[self.support]) @ templates.T
        inverse = np.linalg.inv(jacobian)
        drawn = np.abs(np.diag(shared)) / np.diag(jacobian)
        return float(np.trace(inverse @ variance @ inverse.T) + _PARTS * np.sum(drawn**2) / 12)

    def shared_noise(self, pixels: Mask) -> Image:
        """Expectation of Σ T_k(p) η(p + lag) over some pixels, (4, lags, lags).

        T_k holds the smoothed noise η of the same picture.
        """
        reach = int(4 * self.width + 0.5) + 4
        impulse = np.zeros((2 * reach + 1, 2 * reach + 1))
        impulse[reach, reach] = 1
        kernel = scipy.ndimage.gaussian_filter(impulse, self.width, mode="constant")
        kernels = [scipy.ndimage.correlate1d(kernel, [-0.5, 0, 0.5], axis=axis) for axis in (0, 1)]
        lags = np.ix_(*[[reach - lag for lag in range(-REACH, REACH + 1)]] * 2)
        total = float(self.weight[pixels] @ self.scatter[pixels])
        return total * np.stack([kernels[0][lags], kernels[1][lags], kernel[lags], np.zeros((SIZE, SIZE))])


def _template(draft: _Draft, noise: Noise, level: float) -> Template | None:
    """Sum what the estimating equations need over the support."""
    support = draft.support
    image = draft.image.astype(np.float32)
    if np.count_nonzero(support) < FEWEST:
        return None
    whole = _equations(draft, image, support)
    slope = curvature(whole.model)
    if np.linalg.cond(slope) > _MOST_SKEWED:
        return None
    step = int(np.clip(whole.pixels // _SAMPLED, 1, _SPARSEST))
    inverse = np.linalg.inv(slope)
    return Template(
        image=image,
        level=level,
        whole=whole,
        sample=whole if step == 1 else _equations(draft, image, _every(support, step)),
        wander=_wander(draft.weight * draft.slopes, support, draft.scatter),
        grain=noise.gain,
        smoothing=draft.width,
        common=inverse @ whole.products[:2, :2] @ inverse.T,
        structure=_structure(draft.image, draft.scatter, support),
    )


def _every(support: Mask, step: int) -> Mask:
    """Keep one row in so many."""
    rows = np.arange(len(support)) % step == step // 2
    return np.asarray(support & rows[:, None])


def _equations(draft: _Draft, image: Float32, support: Mask) -> Equations:
    """Sum over some pixels."""
    runs = _without_gaps(runs_of(support))
    inside = _inside(runs, support.shape)
    scatter = np.where(support, draft.scatter, 1.0)[inside]
    here = support[inside]
    parts = [draft.slopes[0][inside], draft.slopes[1][inside], draft.soft[inside], 1 / np.sqrt(scatter)]
    if draft.uniform:
        parts.append(draft.uniform * np.sqrt(scatter))
    fields = (np.stack(parts) * here).astype(np.float32)
    # As they are in the fields, to the last bit.
    weight = fields[3].astype(np.float64) * fields[-1]
    templates = np.stack([weight * fields[0], weight * fields[1], weight * fields[2], weight])
    known = np.stack([image[inside], fields[0], fields[1]]).astype(np.float64)
    shared = draft.shared_noise(support)
    return Equations(
        runs=runs,
        fields=fields,
        model=_model_sums(image, runs, fields) - shared,
        shared=shared,
        totals=templates.sum(axis=1),
        linear=templates @ known.T,
        products=(templates * scatter) @ templates.T,
        pixels=int(np.count_nonzero(here)),
    )


def _without_gaps(runs: Runs) -> Runs:
    """Join runs of a row that lie close together: a long one is gone through faster."""
    begins = np.ones(len(runs), np.bool_)
    begins[1:] = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] - runs[:-1, 2] > _GAP)
    last = np.append(np.flatnonzero(begins)[1:] - 1, len(runs) - 1)
    return np.stack([runs[begins, 0], runs[begins, 1], runs[last, 2]], axis=1)


def _inside(runs: Runs, shape: tuple[int, ...]) -> Mask:
    """Mark the pixels of the runs."""
    steps = np.zeros((shape[0], shape[1] + 1), np.int8)
    steps[runs[:, 0], runs[:, 1]] += 1
    steps[runs[:, 0], runs[:, 2]] -= 1
    return np.cumsum(steps, axis=1, dtype=np.int8)[:, :-1].astype(np.bool_)


def _structure(image: Image, scatter: Image, support: Mask) -> float:
    """Mean product of pixels a little apart, to which noise adds nothing: not that of pixels, rows or columns."""
    inverse = 1 / scatter[support]
    level = float(image[support] @ inverse / inverse.sum())
    known = np.where(support, (image - level) / np.sqrt(np.where(support, scatter, 1)), 0)
    pairs = np.count_nonzero(support[APART:, APART:] & support[:-APART, :-APART])
    return float((known[APART:, APART:] * known[:-APART, :-APART]).sum() / max(pairs, 1))


@numba.njit(nogil=True, cache=True)
def _model_sums(image: Float32, runs: Runs, fields: Float32) -> Image:
    """Σ T_k(p) R(p + lag) over the pixels, (4, lags, lags)."""
    model = np.zeros((4, SIZE, SIZE))
    i = 0
    for k in range(runs.shape[0]):
        for column in range(runs[k, 1], runs[k, 2]):
            weight = np.float64(fields[3, i]) * np.float64(fields[-1, i])
            if weight > 0:
                add_model(model, REACH, weight, fields[:, i], image, runs[k, 0], column)
            i += 1
    return model


@numba.njit(nogil=True, cache=True, inline="always")
def add_model(model: Image, reach: int, weight: float, field: Float32, image: Float32, row: int, column: int) -> None:
    """Add what one pixel gives to the model at lags up to ±reach."""
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            value = weight * np.float64(image[row + dy - reach, column + dx - reach])
            model[0, dy, dx] += field[0] * value
            model[1, dy, dx] += field[1] * value
            model[2, dy, dx] += field[2] * value
            model[3, dy, dx] += value


def _support(mask: Mask, information: Image) -> Mask:
    """Pixels whose surroundings are valid and that carry all but a little of the information.

    The choice is made on smoothed information, so that it does not follow the noise.
    """
    whole = scipy.ndimage.binary_erosion(mask, np.ones((SIZE, SIZE)))
    density = np.where(whole, scipy.ndimage.gaussian_filter(np.where(whole, information, 0), 4.0, mode="constant"), 0)
    ordered = np.sort(density[whole])[::-1]
    if not ordered.size or ordered[0] <= 0:
        return np.zeros_like(mask)
    filled = np.cumsum(ordered)
    least = ordered[min(np.searchsorted(filled, _KEPT_INFORMATION * filled[-1]), len(ordered) - 1)]
    return np.asarray(whole & (density >= least))


def curvature(model: Image) -> Image:
    """Derivative of the first two models by the shift at 0, (2, 2)."""
    middle, after, before = REACH, REACH + 1, REACH - 1
    along_y = (model[:2, after, middle] - model[:2, before, middle]) / 2
    along_x = (model[:2, middle, after] - model[:2, middle, before]) / 2
    return np.stack([along_y, along_x], axis=1)


def _wander(templates: Image, support: Mask, scatter: Image) -> Image:
    """Scatter of Σ T_k η when the reference's noise η is read between its pixels, per fraction squared."""
    inside = templates * support
    slopes = [scipy.ndimage.correlate1d(one, [-0.5, 0, 0.5], axis=axis)[support] for one in inside for axis in (0, 1)]
    flat = np.stack(slopes)
    return np.asarray(((flat * scatter[support]) @ flat.T).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3))
