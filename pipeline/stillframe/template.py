"""What refinement needs of a reference and no frame changes: templates, and the sums over them.

Templates are smooth, so that they may be the same for all pixels of a small bin: any fixed templates give right shifts,
and the bins are chosen such that these give hardly larger errors. What they are compared with keeps its pixels: bins of
the reference are known at every pixel.

See :mod:`stillframe.refine` for the equations these belong to.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Literal

import numba
import numpy as np
import scipy.ndimage

from stillframe.bins import Float32, at_bins, bin_means, box_means, whole_bins
from stillframe.ncc import Image, Mask
from stillframe.noise import Noise, excerpt, smooth, variance_of
from stillframe.runs import Places, runs_of

Weights = Literal["counts", "uniform"]

REACH = 3
"""Lags at which the model is known, on either side."""
SIZE = 2 * REACH + 1
LAGS = SIZE**2
FEWEST = 64
"""Fewer bins give no shift."""
LEVEL, INVERSE = 3, 9
"""Places of the reference and of one over its standard deviation among the fields."""
_APART = 3
"""Pixels so far apart along both axes share no noise, but structure."""
_SIDES = (4, 2)
"""Pixels of a bin along either axis, where bins pay."""
_LOSS = 0.03
"""Bins may enlarge the variance of shifts by this part."""
_MOST_USEFUL_BINS = 16_384
"""With fewer bins than this in the support, time is no matter and smaller ones stand hits better."""
_MOST_PIXELS = 2**21
"""Larger pictures are binned at least by 2: templates of more pixels would take more memory than all else."""
_SMOOTHINGS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Standard deviations (px) of the Gaussians that are tried for the templates."""
_KEPT_INFORMATION = 0.995
"""Part of the Fisher information that the support keeps."""
_FLAT = 0.02
"""Bins are left out only if their share of the noise in templates and reference is less than this part of all."""
_MOST_SKEWED = 1e8
"""A picture that changes along one direction only says nothing of shifts along the other."""
_PARTS, _FEWEST_PARTS = 0.05, 8
"""How many of the frames may be part of the reference, and of how many it is then the mean at least."""
_SAMPLED = 20_000
"""Bins that suffice to begin with."""
_GAP = 64
"""Gaps of up to so many pixels are gone through with the runs around them."""
_SPARSEST = 24
"""At least every so many rows of the support are in the sample."""


@dataclass(frozen=True, eq=False)
class Equations:
    """The estimating equations over some bins of the reference."""

    runs: Places
    """Runs (row, first, stop) of bins that hold them; short gaps between these are part of them."""
    fields: Float32
    """Means over each bin: slopes along y and x of the smoothed reference and the latter itself; the reference, its
    slopes along y and x and its bends along yy, yx and xx; one over the standard deviation of the mean; and, for
    uniform weights, their product with that deviation. (10 or 11, bins of the runs), 0 in gaps."""
    model: Image
    """Σ T_k(p) R(p + lag), noise taken off, (4, lags, lags)."""
    shared: Image
    """What was taken off, (4, lags, lags)."""
    totals: Image
    """Σ T_k, (4,)."""
    linear: Image
    """Σ T_k times the reference, its slopes and its bends, (4, 6)."""
    products: Image
    """Σ T_k T_l v of the variance v of the reference's bins, (4, 4)."""
    bins: int
    """How many there are, without gaps."""
    rows: Places
    """Rows of bins to read."""


@dataclass(frozen=True, eq=False)
class Template:
    """All of a reference that refinement needs and no frame changes."""

    side: int
    """Pixels of a bin along either axis."""
    image: Float32
    """Mean of the reference less its level over the bin that begins at each pixel (y, x); 0 where invalid."""
    level: float
    """Mean of the reference."""
    whole: Equations
    """Over the whole support."""
    sample: Equations
    """Over some of its rows, to begin with."""
    wander: Image
    """How the reference's noise changes with the fraction: Σ ∂_i T_k ∂_j T_l v, (2, 2, 2, 2)."""
    grain: float
    """Step of one count in the reference, in units of ``scale``; 0 where noise does not come in counts."""
    smoothing: float
    """Standard deviation of the templates' Gaussian, pixels."""
    common: Image
    """Covariance (2, 2), px², of the offset that the reference's own noise gives to all frames alike."""
    apart: int
    """Bins so far apart along both axes share no noise, but structure."""
    scale: float
    """The reference's unit of intensity here: 1, or a power of 2 where single precision would not hold its squares."""
    structure: float
    """Mean product of bins of the support that far apart, each less the mean and over its standard deviation."""


def prepare_template(
    image: Image,
    mask: Mask,
    noise: Noise,
    weights: Weights = "counts",
    smoothing: float | None = None,
    *,
    level: float = 0.0,
    scale: float = 1.0,
) -> Template | None:
    """Prepare the templates, with the smoothing that promises the smallest errors unless one is given.

    ``level`` was taken off the image and ``scale`` divided by, so that single precision holds it.
    Returns None where the picture holds too little structure for its noise, or too few pixels.
    """
    sample = excerpt(image, mask)
    width = smoothing or _best_smoothing(*sample, noise, weights)
    if width is None and sample[0].size < image.size:  # the window may show too little of the pattern
        sample = image, mask
        width = _best_smoothing(*sample, noise, weights)
    if width is None:
        return None
    side = _best_bins(_Smoothed.of(*sample, noise, width), weights, 1 if image.size <= _MOST_PIXELS else 2)
    return _template(_Draft.of(_Smoothed.of(image, mask, noise, width), weights, side), noise, level, scale)


def _best_smoothing(image: Image, mask: Mask, noise: Noise, weights: Weights) -> float | None:
    """Go from little to much smoothing for as long as the promised errors fall."""
    best, promised = None, np.inf
    for width in _SMOOTHINGS:
        promise = _Draft.of(_Smoothed.of(image, mask, noise, width), weights, 1).promise()
        if promise > promised:
            break
        if np.isfinite(promise):
            best, promised = width, promise
    return best


def _best_bins(sample: "_Smoothed", weights: Weights, finest: int) -> int:
    """Choose the largest bins that promise hardly larger errors than the finest."""
    limit = _Draft.of(sample, weights, finest).promise() * (1 + _LOSS)
    for side in (side for side in _SIDES if side > finest):
        draft = _Draft.of(sample, weights, side)
        if np.count_nonzero(draft.support) >= _MOST_USEFUL_BINS and draft.promise() <= limit < np.inf:
            return side
    return finest


@dataclass(frozen=True, eq=False)
class _Smoothed:
    """A reference smoothed for templates, pixel by pixel."""

    image: Image
    mask: Mask
    soft: Image
    scatter: Image
    inner: Mask
    width: float

    @classmethod
    def of(cls, image: Image, mask: Mask, noise: Noise, width: float) -> "_Smoothed":
        """Smooth the reference, and tell its variance and where all surroundings are valid."""
        soft = smooth(image, mask, width)
        scatter = np.where(mask, variance_of(soft, mask, noise), 0)
        inner = scipy.ndimage.minimum_filter(mask, SIZE, mode="constant", cval=False)
        return cls(image, mask, soft, scatter, inner, width)


@dataclass(frozen=True, eq=False)
class _Draft:
    """Templates of one smoothing and one size of bins, before the sums over them; (y, x) are bins."""

    smoothed: _Smoothed
    side: int
    boxes: Image
    """The reference's means over the bin that begins at each pixel."""
    soft: Image
    slopes: Image
    scatter: Image
    weight: Image
    support: Mask
    uniform: float

    @classmethod
    def of(cls, smoothed: _Smoothed, weights: Weights, side: int) -> "_Draft":
        """Take means over bins, weigh these and choose the support."""
        slopes = np.stack([bin_means(_slope(smoothed.soft, axis), side) for axis in (0, 1)])
        scatter = bin_means(smoothed.scatter, side) / side**2
        inner, seen = (whole_bins(mask, side) for mask in (smoothed.inner, smoothed.mask))
        uniform = 0.0 if weights == "counts" or not seen.any() else float(1 / scatter[seen].mean())
        inverse = np.divide(1, scatter, out=np.zeros_like(scatter), where=seen)
        weight = seen.astype(np.float64) * uniform if uniform else inverse
        support = _support(inner, weight * (slopes**2).sum(axis=0), side)
        boxes = box_means(smoothed.image, side)
        draft = cls(smoothed, side, boxes, bin_means(smoothed.soft, side), slopes, scatter, weight, support, uniform)
        return replace(draft, support=inner) if draft.follows_noise(inner) else draft

    def follows_noise(self, inner: Mask) -> bool:
        """Tell whether the bins that were left out are those where noise happens to be flat.

        The noise that templates and reference share is then more than expected in those that remain.
        """
        jacobian, shared = self._curvatures
        left = int(np.count_nonzero(inner)) / max(1, int(np.count_nonzero(self.support))) - 1
        return bool((np.abs(np.diag(shared)) * left > _FLAT * np.abs(np.diag(jacobian))).any())

    @cached_property
    def _templates(self) -> Image:
        """The first two templates over the support, (2, bins)."""
        return np.stack([(self.weight * slope)[self.support] for slope in self.slopes])

    @cached_property
    def _curvatures(self) -> tuple[Image, Image]:
        """Derivative of the first two equations by the shift (2, 2), and what of it was noise."""
        change = [slope[self.support] for slope in self._changes]
        shared = curvature(self.shared_noise(self.support))
        return self._templates @ np.stack(change).T - shared, shared

    @cached_property
    def _changes(self) -> list[Image]:
        """Slopes of the reference's bins along y and x."""
        after, before = ([self.at(*step) for step in steps] for steps in (((1, 0), (0, 1)), ((-1, 0), (0, -1))))
        return [(one - other) / 2 for one, other in zip(after, before, strict=True)]

    def at(self, y: int, x: int) -> Image:
        """Return the reference's bins, moved by so many pixels."""
        return at_bins(self.boxes, self.side, (y, x))

    @cached_property
    def known(self) -> tuple[Image, ...]:
        """The bins of the reference, their slopes along y and x and their bends along yy, yx and xx."""
        middle = self.at(0, 0)
        bends = [self.at(y, x) - 2 * middle + self.at(-y, -x) for y, x in ((1, 0), (0, 1))]
        twist = (self.at(1, 1) - self.at(1, -1) - self.at(-1, 1) + self.at(-1, -1)) / 4
        return middle, *self._changes, bends[0], twist, bends[1]

    def promise(self) -> float:
        """Variance of shifts, px², that frames with the reference's noise would have; infinite where noise prevails.

        Some frames may be part of the reference: their own noise in the slopes draws them to a fraction of a pixel.
        Their noise is that of the reference times the root of their number.
        """
        if np.count_nonzero(self.support) < FEWEST:
            return np.inf
        jacobian, shared = self._curvatures
        if not (np.diag(jacobian) > np.abs(np.diag(shared))).all() or np.linalg.cond(jacobian) > _MOST_SKEWED:
            return np.inf
        variance = (self._templates * self.scatter[self.support]) @ self._templates.T
        inverse = np.linalg.inv(jacobian)
        drawn = np.abs(np.diag(shared)) / np.diag(jacobian)
        return float(np.trace(inverse @ variance @ inverse.T) + _PARTS / _FEWEST_PARTS * np.sum(drawn**2) / 12)

    def shared_noise(self, bins: Mask) -> Image:
        """Expectation of Σ T_k(p) η(p + lag) over some bins, (4, lags, lags).

        T_k holds the smoothed noise η of the same picture.
        """
        reach = int(4 * self.smoothed.width + 0.5) + 8
        impulse = np.zeros((2 * reach + 1, 2 * reach + 1))
        impulse[reach, reach] = 1
        kernel = scipy.ndimage.gaussian_filter(impulse, self.smoothed.width, mode="constant")
        # Pairs of pixels of a bin, by their distance.
        pairs = 1 - np.abs(np.arange(1 - self.side, self.side)) / self.side
        for axis in (0, 1):
            kernel = scipy.ndimage.correlate1d(kernel, pairs, axis=axis, mode="constant")
        kernels = [_slope(kernel, axis) for axis in (0, 1)]
        lags = np.ix_(*[[reach - lag for lag in range(-REACH, REACH + 1)]] * 2)
        total = float(self.weight[bins] @ self.scatter[bins])
        return total * np.stack([kernels[0][lags], kernels[1][lags], kernel[lags], np.zeros((SIZE, SIZE))])


def _slope(image: Image, axis: int) -> Image:
    return np.asarray(scipy.ndimage.correlate1d(image, [-0.5, 0, 0.5], axis=axis))


def _template(draft: _Draft, noise: Noise, level: float, scale: float) -> Template | None:
    """Sum what the estimating equations need over the support."""
    support, side = draft.support, draft.side
    if np.count_nonzero(support) < FEWEST:
        return None
    image = draft.boxes.astype(np.float32)
    whole = _equations(draft, image, support, np.arange(-(-len(image) // side)))
    slope = curvature(whole.model)
    if np.linalg.cond(slope) > _MOST_SKEWED:
        return None
    step = int(np.clip(whole.bins // _SAMPLED, 1, _SPARSEST))
    inverse = np.linalg.inv(slope)
    apart = -(-_APART // side)
    return Template(
        side=side,
        image=image,
        level=level,
        whole=whole,
        sample=whole if step == 1 else _sample(draft, image, step),
        wander=_wander(draft),
        grain=noise.gain,
        smoothing=draft.smoothed.width,
        common=inverse @ whole.products[:2, :2] @ inverse.T,
        apart=apart,
        scale=scale,
        structure=_structure(draft.at(0, 0), draft.scatter, support, apart),
    )


def _sample(draft: _Draft, image: Float32, step: int) -> Equations:
    """Sum over one row of bins in so many."""
    rows = np.arange(step // 2, len(draft.support), step)
    few = np.zeros_like(draft.support)
    few[rows] = draft.support[rows]
    return _equations(draft, image, few, rows)


def _equations(draft: _Draft, image: Float32, support: Mask, rows: Places) -> Equations:
    """Sum over some bins."""
    runs = _without_gaps(runs_of(support))
    inside = _inside(runs, support.shape)
    scatter = np.where(support, draft.scatter, 1.0)[inside]
    here = support[inside]
    parts = chain((one[inside] for one in (*draft.slopes, draft.soft)), (one[inside] for one in draft.known))
    fields = np.zeros((INVERSE + (2 if draft.uniform else 1), len(here)), np.float32)
    for row, part in zip(fields[:INVERSE], parts, strict=True):
        row[:] = part * here
    fields[INVERSE] = here / np.sqrt(scatter)
    if draft.uniform:
        fields[-1] = here * draft.uniform * np.sqrt(scatter)
    # As they are in the fields, to the last bit.
    weight = fields[INVERSE].astype(np.float64) * fields[-1]
    templates = np.stack([weight * fields[0], weight * fields[1], weight * fields[2], weight])
    shared = draft.shared_noise(support)
    return Equations(
        runs=runs,
        fields=fields,
        model=_model_sums(image, draft.side, runs, fields).reshape(shared.shape) - shared,
        shared=shared,
        totals=templates.sum(axis=1),
        linear=templates @ fields[LEVEL:INVERSE].astype(np.float64).T,
        products=(templates * scatter) @ templates.T,
        bins=int(np.count_nonzero(here)),
        rows=rows,
    )


def _without_gaps(runs: Places) -> Places:
    """Join runs of a row that lie close together: a long one is gone through faster."""
    begins = np.ones(len(runs), np.bool_)
    begins[1:] = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] - runs[:-1, 2] > _GAP)
    last = np.append(np.flatnonzero(begins)[1:] - 1, len(runs) - 1)
    return np.stack([runs[begins, 0], runs[begins, 1], runs[last, 2]], axis=1)


def _inside(runs: Places, shape: tuple[int, ...]) -> Mask:
    """Mark the pixels of the runs."""
    steps = np.zeros((shape[0], shape[1] + 1), np.int8)
    steps[runs[:, 0], runs[:, 1]] += 1
    steps[runs[:, 0], runs[:, 2]] -= 1
    return np.cumsum(steps, axis=1, dtype=np.int8)[:, :-1].astype(np.bool_)


def _structure(image: Image, scatter: Image, support: Mask, apart: int) -> float:
    """Mean product of bins a little apart, to which noise adds nothing: not that of bins, rows or columns."""
    inverse = 1 / scatter[support]
    level = float(image[support] @ inverse / inverse.sum())
    known = np.where(support, (image - level) / np.sqrt(np.where(support, scatter, 1)), 0)
    pairs = np.count_nonzero(support[apart:, apart:] & support[:-apart, :-apart])
    return float((known[apart:, apart:] * known[:-apart, :-apart]).sum() / max(pairs, 1))


@numba.njit(nogil=True, cache=True)
def _model_sums(image: Float32, side: int, runs: Places, fields: Float32) -> Image:
    """Σ T_k(p) R(p + lag) over the bins, (4, lags · lags)."""
    model, patch = np.zeros((4, LAGS)), np.empty(LAGS)
    i = 0
    for k in range(runs.shape[0]):
        for column in range(runs[k, 1], runs[k, 2]):
            weight = np.float64(fields[INVERSE, i]) * np.float64(fields[-1, i])
            if weight > 0:
                add_model(model, weight, fields[:, i], image, runs[k, 0] * side, column * side, patch)
            i += 1
    return model


@numba.njit(nogil=True, cache=True)
def add_model(model: Image, weight: float, field: Float32, image: Float32, row: int, column: int, patch: Image) -> None:
    """Add what one bin, which begins at a pixel, gives to the model (4, lags · lags); ``patch`` is room to work in."""
    n = 0
    for y in range(row - REACH, row + REACH + 1):
        for x in range(column - REACH, column + REACH + 1):
            patch[n] = weight * np.float64(image[y, x])
            n += 1
    _add_scaled(np.float64(field[0]), patch, model[0])
    _add_scaled(np.float64(field[1]), patch, model[1])
    _add_scaled(np.float64(field[2]), patch, model[2])
    _add_scaled(1.0, patch, model[3])


@numba.njit(nogil=True, cache=True)
def _add_scaled(factor: float, patch: Image, out: Image) -> None:
    for n in range(len(patch)):
        out[n] += factor * patch[n]


def _support(inner: Mask, information: Image, side: int) -> Mask:
    """Bins whose surroundings are valid and that carry all but a little of the information.

    The choice is made on smoothed information, so that it does not follow the noise.
    """
    known = np.where(inner, information, 0)
    density = np.where(inner, scipy.ndimage.gaussian_filter(known, 4.0 / side, mode="constant"), 0)
    ordered = np.sort(density[inner])[::-1]
    if not ordered.size or ordered[0] <= 0:
        return np.zeros_like(inner)
    filled = np.cumsum(ordered)
    least = ordered[min(np.searchsorted(filled, _KEPT_INFORMATION * filled[-1]), len(ordered) - 1)]
    return np.asarray(inner & (density >= least))


def curvature(model: Image) -> Image:
    """Derivative of the first two models by the shift at 0, (2, 2)."""
    middle, after, before = REACH, REACH + 1, REACH - 1
    along_y = (model[:2, after, middle] - model[:2, before, middle]) / 2
    along_x = (model[:2, middle, after] - model[:2, middle, before]) / 2
    return np.stack([along_y, along_x], axis=1)


def _wander(draft: _Draft) -> Image:
    """Scatter of Σ T_k η when the reference's noise η is read between its pixels, per fraction squared.

    Templates change from bin to bin: at the pixels on either side of a border, by half of the step.
    """
    side, inside = draft.side, draft.weight * draft.slopes * draft.support / draft.side**2
    scatter = draft.scatter * side**2
    out, changes = np.empty((2, 2, 2, 2)), []
    for axis in (0, 1):
        after = np.diff(inside, axis=axis + 1, append=0) / 2
        before = np.diff(inside, axis=axis + 1, prepend=0) / 2
        steps = (before, after) if side > 1 else (before + after,)
        changes.append(before + after)
        out[:, :, axis, axis] = side * sum(_products(step, step, scatter) for step in steps)
    out[:, :, 0, 1] = _products(changes[0], changes[1], scatter)
    out[:, :, 1, 0] = _products(changes[1], changes[0], scatter)
    return out


def _products(one: Image, other: Image, weight: Image) -> Image:
    """Σ one_k other_l weight over the bins, (2, 2)."""
    return np.asarray((one * weight).reshape(2, -1) @ other.reshape(2, -1).T)
