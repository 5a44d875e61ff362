"""Templates of a reference and the sums over them: all that the refinement needs and no frame changes.

Templates are smooth, so that all pixels of a small bin can share one value. The reference itself keeps its pixels: its
means are computed over bins that begin at every pixel.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numba
import numpy as np

from stillframe.images.arrays import Float32, Image, Indices, Mask
from stillframe.images.noise import Noise, excerpt
from stillframe.images.run_lengths import Runs, inside_of, runs_of
from stillframe.registration.elongation_templates import ElongationTemplates, elongation_templates
from stillframe.registration.local_changes import choose_square
from stillframe.registration.template_draft import (
    LEAST_BINS,
    REACH,
    SIZE,
    SMOOTHINGS,
    Draft,
    Smoothed,
    Texture,
    best_binned,
    best_smoothed,
    curvature,
    is_singular,
)

LAGS = SIZE**2
_ALL_LAGS = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
_APART = 3
"""Pixels this far apart along both axes share structure but no noise."""
_FAR, _FAR_WIDTHS = 12, 6
"""Pixels this far apart, or this many widths of the templates' Gaussian, share only what is smooth."""
_LEAST_LOCAL = 0.03
"""At least this fraction of a reference's structure counts as local: a glow's curvature leaves about as much."""
_LARGEST_UNBINNED = 2**21
"""Larger images, in pixels, have bins of at least two pixels' side; else templates would need most of the memory."""
_SAMPLED_BINS = 20_000
"""Number of bins in the sample that the refinement begins with."""
_GAP = 64
"""Runs of a row are joined across gaps of up to this many bins."""
_LARGEST_ROW_STEP = 24
"""The sample contains at least one in this many rows of the support."""


class BinFields(NamedTuple):
    """The reference over the bins of some runs, one after the other; each array is (bin,) and 0 in gaps."""

    soft_y: Float32
    """Slope of the smoothed reference along y."""
    soft_x: Float32
    soft: Float32
    """The smoothed reference."""
    mean: Float32
    """Mean of the reference over the bin."""
    mean_y: Float32
    """Slope of the means along y."""
    mean_x: Float32
    mean_yy: Float32
    """Second derivative of the means along y."""
    mean_yx: Float32
    mean_xx: Float32
    inverse_sigma: Float32
    """One over the standard deviation of the mean."""

    @property
    def taylor(self) -> Image:
        """The terms of the reference's Taylor series, (6, bin)."""
        terms = (self.mean, self.mean_y, self.mean_x, self.mean_yy, self.mean_yx, self.mean_xx)
        return np.stack(terms).astype(np.float64)

    @property
    def templates(self) -> Image:
        """The templates T_k for the shift along y and x, the gain and the offset (20), shape (4, bin)."""
        weight = self.inverse_sigma.astype(np.float64) ** 2
        return np.stack([weight * self.soft_y, weight * self.soft_x, weight * self.soft, weight])


@dataclass(frozen=True, eq=False)
class Support:
    """Bins over which the estimating equations are summed, with all sums that no frame changes."""

    runs: Runs
    """Runs (row, first, stop) that contain the bins, and short gaps between them."""
    bins: BinFields
    model: Image
    """Σ T_k(p) R(p + lag), shared noise subtracted, (4, lags, lags)."""
    shared: Image
    """The shared noise that was subtracted, (4, lags, lags)."""
    totals: Image
    """Σ T_k, (4,)."""
    linear: Image
    """Σ T_k times the terms of the Taylor series, (4, 6)."""
    products: Image
    """Σ T_k T_l v of the variance v of the reference's bins, (4, 4)."""
    count: int
    """Number of bins, without gaps."""
    noisy: float
    """Σ of the bins' variance over the one with the floor: the number of bins, less where the background is empty."""
    rows: Indices
    """Rows of bins that contain them."""


class Distances(NamedTuple):
    """Distances of the pairs of bins whose residuals are multiplied, bins."""

    apart: int
    """Along both axes, of bins that share structure but no noise."""
    far: int
    """Along x, of bins that share only what is smooth; along y they are :attr:`apart`."""


class LocalStructure(NamedTuple):
    """How much of a reference varies over short distances, as features do and a glow does not (39)."""

    distances: Distances
    partners: tuple[float, float]
    """Fraction of the bins that have a partner in the support, at either distance; 0 if far bins do not count."""
    amount: float
    """Mean product of two standardized bins apart, less that of bins far apart."""

    def of(self, apart: float, far: float, bins: int) -> float:
        """Return the local structure from the sums of products of so many bins."""
        of_apart, of_far = self.partners
        return apart / (bins * of_apart) - (far / (bins * of_far) if of_far else 0.0)


@dataclass(frozen=True, eq=False)
class Template:
    """All of a reference that the refinement needs and no frame changes."""

    side: int
    """Side of a bin, pixels."""
    image: Float32
    """Mean of the reference less its level over the bin that begins at each pixel (y, x); 0 where invalid."""
    level: float
    """Mean of the reference, subtracted from its pixels."""
    whole: Support
    """All bins that are used."""
    sample: Support
    """Some rows of them, for the first steps."""
    wander: Image
    """Scatter from the reference's noise per fraction squared: Σ ∂_i T_k ∂_j T_l v, (k, l, i, j), each 2."""
    grain: float
    """Size of one count in the reference; 0 where the noise does not come in counts."""
    zero: float
    """The reference less its level where it has no counts."""
    smoothing: float
    """Standard deviation of the templates' Gaussian, pixels."""
    square: int
    """Side of the squares in which templates do not respond to local changes, pixels; 0 for none."""
    common: Image
    """Covariance (2, 2), px², of the common offset of all frames that the reference's noise causes (37)."""
    structures: "tuple[LocalStructure, ...]"
    """What the residuals of a frame are compared with. It shows another pattern only if each comparison says so."""
    elongation: ElongationTemplates | None
    """What shows elongated features, as in a double exposure; None with too much noise."""
    sharpest: float
    """Inverse standard deviation of a bin with twice the least variance; the background of others may be empty."""


def prepare_template(
    image: Image,
    mask: Mask,
    noise: Noise,
    smoothing: float | None = None,
    *,
    level: float = 0.0,
    frame_mask: Mask | None = None,
    against_scatter: bool = False,
) -> Template | None:
    """Return the templates of an image (y, x), less its level and 0 where invalid; None with too little structure.

    The smoothing, a standard deviation in pixels, is chosen for the smallest expected errors if it is not given. Bins
    of which ``frame_mask``, by default the mask, leaves too few whole are not used. For ``against_scatter`` see
    :class:`~stillframe.Reference`.
    """
    if against_scatter:
        smoothing = smoothing or _smoothing_in_squares(*excerpt(image, mask), noise)
    sample, draft = _finest(image, mask, noise, smoothing)
    if draft is None:
        return None
    unbinned = draft if image.size <= _LARGEST_UNBINNED else Draft.of(draft.smoothed, 2)
    draft = best_binned(unbinned, mask if frame_mask is None else frame_mask)
    if sample[0].size < image.size:
        draft = Draft.of(Smoothed.of(image, mask, noise, draft.smoothed.width), draft.side)
    square, chosen = choose_square(draft, at_any_price=against_scatter)
    template = _template(square, chosen, noise, level)
    if template is None:
        return None
    return replace(template, elongation=elongation_templates(draft, square, template.whole.runs))


def _smoothing_in_squares(image: Image, mask: Mask, noise: Noise) -> float | None:
    """Return the smoothing, pixels, that allows the smallest squares; of several, the one with the smallest errors.

    Return None if none allows squares.
    """
    found = [
        choose_square(Draft.of(Smoothed.of(image, mask, noise, width), 1), at_any_price=True) for width in SMOOTHINGS
    ]
    inside = [(square, draft.expected_variance(), draft.smoothed.width) for square, draft in found if square]
    return min(inside)[2] if inside else None


def smoothing_against(texture: Texture, image: Image, mask: Mask, noise: Noise) -> float | None:
    """Return the smoothing, pixels, whose templates have the smallest expected errors with a texture; None for none."""
    _, draft = _finest(image, mask, noise, texture=texture)
    return None if draft is None else draft.smoothed.width


def _finest(
    image: Image, mask: Mask, noise: Noise, smoothing: float | None = None, texture: Texture | None = None
) -> tuple[tuple[Image, Mask], Draft | None]:
    """Return an image with its mask, and templates of its single pixels with the smoothing that is given or the best.

    The image is an excerpt of a large one, unless that contains too little of the pattern. Templates are None where
    there is too much noise.
    """
    sample = excerpt(image, mask)
    if smoothing:
        return sample, Draft.of(Smoothed.of(*sample, noise, smoothing), 1)
    draft = best_smoothed(*sample, noise, texture)
    if draft is None and sample[0].size < image.size:
        sample = image, mask
        draft = best_smoothed(*sample, noise, texture)
    return sample, draft


def _template(square: int, draft: Draft, noise: Noise, level: float) -> Template | None:
    """Return the template of a draft; None with too few bins or structure along one direction only."""
    support, side = draft.support, draft.side
    if np.count_nonzero(support) < LEAST_BINS:
        return None
    image = draft.boxes.astype(np.float32)
    whole = _support(draft, image, support, np.arange(-(-len(image) // side)))
    slope = curvature(whole.model)
    if is_singular(slope):
        return None
    step = int(np.clip(whole.count // _SAMPLED_BINS, 1, _LARGEST_ROW_STEP))
    rows, few = np.arange(step // 2, len(support), step), np.zeros_like(support)
    few[rows] = support[rows]
    inverse = np.linalg.inv(slope)
    return Template(
        side=side,
        image=image,
        level=level,
        whole=whole,
        sample=whole if step == 1 else _support(draft, image, few, rows),
        wander=_wander(draft),
        grain=noise.gain,
        zero=noise.pedestal if noise.gain > 0 else 0.0,
        smoothing=draft.smoothed.width,
        square=square,
        common=inverse @ whole.products[:2, :2] @ inverse.T,
        structures=_structures(draft.at(0, 0), draft),
        elongation=None,
        sharpest=1 / np.sqrt(2 * draft.variance[support].min()) if noise.gain > 0 else np.inf,
    )


def _support(draft: Draft, image: Float32, support: Mask, rows: Indices) -> Support:
    """Return some bins with the sums over them."""
    runs = _join_close_runs(runs_of(support))
    inside = inside_of(runs, support.shape)
    variance, bins = np.where(support, draft.plain_noise, 0.0)[inside], _bin_fields(draft, support, inside)
    templates = bins.templates
    shared = draft.shared_noise(support, _ALL_LAGS).reshape(4, SIZE, SIZE)
    return Support(
        runs=runs,
        bins=bins,
        model=_model_sums(image, draft.side, runs, bins).reshape(shared.shape) - shared,
        shared=shared,
        totals=templates.sum(axis=1),
        linear=templates @ bins.taylor.T,
        products=(templates * variance) @ templates.T,
        count=int(np.count_nonzero(support)),
        noisy=float((draft.weight * draft.noise)[support].sum()),
        rows=rows,
    )


def _bin_fields(draft: Draft, support: Mask, inside: Mask) -> BinFields:
    """Return the reference at the bins inside of runs, 0 where these are not in the support."""
    used, middle = support[inside], draft.at(0, 0)
    bends = [draft.at(y, x) - 2 * middle + draft.at(-y, -x) for y, x in ((1, 0), (0, 1))]
    twist = (draft.at(1, 1) - draft.at(1, -1) - draft.at(-1, 1) + draft.at(-1, -1)) / 4
    inverse_sigma = 1 / np.sqrt(np.where(support, draft.variance, 1.0))
    images = (*draft.slopes, draft.soft, middle, *draft.mean_slopes, bends[0], twist, bends[1], inverse_sigma)
    return BinFields(*((image[inside] * used).astype(np.float32) for image in images))


def _join_close_runs(runs: Runs) -> Runs:
    """Join runs of a row that lie close together: one long run takes less time than two short ones."""
    begins = np.ones(len(runs), np.bool_)
    begins[1:] = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] - runs[:-1, 2] > _GAP)
    last = np.append(np.flatnonzero(begins)[1:] - 1, len(runs) - 1)
    return np.stack([runs[begins, 0], runs[begins, 1], runs[last, 2]], axis=1)


def _structures(image: Image, draft: Draft) -> tuple[LocalStructure, ...]:
    """Return the local structure (39) of an image in bins, to which noise adds nothing.

    Where the image may be smooth itself, a second entry is for all of its structure.
    That holds also for noise of whole rows or columns, as the two bins of a pair differ in both.
    """
    support, variance, side = draft.support, draft.variance, draft.side
    inverse = 1 / variance[support]
    level = float(image[support] @ inverse / inverse.sum())
    standardized = np.where(support, (image - level) / np.sqrt(np.where(support, variance, 1)), 0)
    distances = Distances(-(-_APART // side), -(-round(max(_FAR, _FAR_WIDTHS * draft.smoothed.width)) // side))
    count = int(np.count_nonzero(support))
    apart, far = (_pairs(standardized, distances.apart, step) for step in distances)
    of_apart, of_far = (_pairs(support.astype(np.float64), distances.apart, step) / count for step in distances)
    if not of_apart:
        return (LocalStructure(distances, (1.0, 0.0), 0.0),)
    both, all_structure = ((of_apart, of_far), (of_apart, 0.0))
    found, smooth_too = (LocalStructure(distances, one, 0.0).of(apart, far, count) for one in (both, all_structure))
    least = _LEAST_LOCAL * smooth_too
    local = LocalStructure(distances, both, max(found, least))
    return (local,) if found > least else (local, LocalStructure(distances, all_structure, smooth_too))


def _pairs(image: Image, down: int, across: int) -> float:
    """Return the sum of the products of all pairs of bins at a distance along y and x."""
    return float((image[down:, across:] * image[:-down, :-across]).sum())


@numba.njit(nogil=True, cache=True)
def _model_sums(image: Float32, side: int, runs: Runs, bins: BinFields) -> Image:
    """Return Σ T_k(p) R(p + lag) over the bins, (4, lags · lags)."""
    model, patch = np.zeros((4, LAGS)), np.empty(LAGS)
    i = 0
    for k in range(runs.shape[0]):
        for column in range(runs[k, 1], runs[k, 2]):
            if bins.inverse_sigma[i] > 0:
                add_model(model, bins, i, image, runs[k, 0] * side, column * side, patch)
            i += 1
    return model


@numba.njit(nogil=True, cache=True)
def add_model(model: Image, bins: BinFields, i: int, image: Float32, row: int, column: int, patch: Image) -> None:
    """Add the contribution of bin i, which begins at a pixel (row, column), to the model (4, lags · lags).

    ``patch`` (lags · lags,) is workspace.
    """
    weight, n = np.float64(bins.inverse_sigma[i]) * np.float64(bins.inverse_sigma[i]), 0
    for y in range(row - REACH, row + REACH + 1):
        for x in range(column - REACH, column + REACH + 1):
            patch[n] = weight * np.float64(image[y, x])
            n += 1
    _add_scaled(np.float64(bins.soft_y[i]), patch, model[0])
    _add_scaled(np.float64(bins.soft_x[i]), patch, model[1])
    _add_scaled(np.float64(bins.soft[i]), patch, model[2])
    _add_scaled(1.0, patch, model[3])


@numba.njit(nogil=True, cache=True)
def _add_scaled(factor: float, patch: Image, out: Image) -> None:
    for n in range(len(patch)):
        out[n] += factor * patch[n]


def _wander(draft: Draft) -> Image:
    """Return the scatter per fraction squared that the reference's noise η adds between its pixels (36), (2, 2, 2, 2).

    Templates change from bin to bin: at the pixels on either side of a border, by half of the step.
    """
    side, inside = draft.side, draft.weight * draft.slopes * draft.support / draft.side**2
    variance = draft.variance * side**2
    out, changes = np.empty((2, 2, 2, 2)), []
    for axis in (0, 1):
        after = np.diff(inside, axis=axis + 1, append=0) / 2
        before = np.diff(inside, axis=axis + 1, prepend=0) / 2
        steps = (before, after) if side > 1 else (before + after,)
        changes.append(before + after)
        out[:, :, axis, axis] = side * sum(_products(step, step, variance) for step in steps)
    out[:, :, 0, 1] = _products(changes[0], changes[1], variance)
    out[:, :, 1, 0] = _products(changes[1], changes[0], variance)
    return out


def _products(one: Image, other: Image, weight: Image) -> Image:
    """Return Σ one_k other_l weight over the bins, (2, 2)."""
    return np.asarray((one * weight).reshape(2, -1) @ other.reshape(2, -1).T)
