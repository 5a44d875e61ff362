"""Templates that respond to elongated features and to no local change (64).

Elongated features add second derivatives of the pattern to a frame. Templates are those of the smoothed reference,
less all that resembles a parabola, the pattern or its slopes, square by square (53).
"""

from dataclasses import dataclass

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Image
from stillframe.images.binning import bin_means
from stillframe.images.run_lengths import Runs, inside_of
from stillframe.registration.local_changes import parabola_of, rectangles, remainder_of
from stillframe.registration.template_draft import SMOOTHINGS, Draft

_BINS = 100_000
"""About so many bins of a support are used, in whole rows."""
_LEAST_ROWS = 4
"""Rows of a square that are used, at least."""
_LARGEST_SHARED_PART = 0.7
"""Largest fraction of the response to an elongation that is noise shared by templates and reference."""
_SECOND = np.array([1.0, -2.0, 1.0])
_CENTRAL = np.array([-0.5, 0.0, 0.5])
_COMBINATIONS = np.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]])
"""From second moments (yy, yx, xx) to yy − xx and 2 yx, of which the elongation is the length, and to yy + xx."""


@dataclass(frozen=True, eq=False)
class ElongationTemplates:
    """Templates of the elongation over some rows of the support of a reference."""

    first: int
    """First row of bins that is used."""
    step: int
    """From one such row to the next."""
    fields: Float32
    """Templates whose sums with residuals are yy − xx, 2 yx and yy + xx of the second moments, px², (3, bin).

    They are 0 in gaps.
    """
    shared: Image
    """Noise that templates share with the reference, in these sums for a gain of 1, (3,)."""
    size: float
    """Mean square half-width of the reference's features, px²: that of a Gaussian spot is its variance."""


def elongation_templates(draft: Draft, square: int, runs: Runs) -> ElongationTemplates | None:
    """Return templates that respond to no local change in squares of this side, pixels; None with too much noise.

    ``draft`` has the templates as they are without squares, ``runs`` contain its support. Without squares, the
    image is one. Templates are smoothed more than those of the shift where noise asks for it.
    """
    widths = (draft.smoothed.width, *(width for width in SMOOTHINGS if width > draft.smoothed.width))
    made = (_templates(draft.smoothed_by(width), square, runs) for width in widths)
    return next((templates for templates in made if templates is not None), None)


def _templates(draft: Draft, square: int, runs: Runs) -> ElongationTemplates | None:
    side = square // draft.side if square else max(draft.support.shape)
    step = max(1, min(int(np.count_nonzero(draft.support)) // _BINS, side // _LEAST_ROWS))
    rows = slice(step // 2, None, step)
    inside = inside_of(runs, draft.support.shape)[rows]
    bends, size = _without_local_changes(draft, rows, (max(1, side // step), side))
    response = _response(draft, bends * draft.weight[rows], rows)
    if response is None or not size > 0:
        return None
    middle, kernel = draft.kernel
    of_bends = np.array([one[middle, middle] for one in _second_derivatives(kernel)])
    return ElongationTemplates(
        first=step // 2,
        step=step,
        fields=np.tensordot(response, bends, 1)[:, inside].astype(np.float32),
        shared=_noise(draft, rows) * response @ of_bends,
        size=size,
    )


def _without_local_changes(draft: Draft, rows: slice, sides: tuple[int, int]) -> tuple[Image, float]:
    """Return the second derivatives of some rows, less local changes in rectangles, and the size of the features.

    Shape (3, row, bin); 0 outside of the support.
    """
    support, weight, soft, slopes = draft.support[rows], draft.weight[rows], draft.soft[rows], draft.slopes[:, rows]
    bends = np.stack([bin_means(one, draft.side)[rows] for one in _second_derivatives(draft.smoothed.soft)])
    bends *= support
    heights = steepness = 0.0
    for place in rectangles(support.shape, sides):
        inside = support[place]
        if not inside.any():
            continue
        parabola, heavy = parabola_of(inside), weight[place][inside]
        pattern = remainder_of(soft[place][inside][None], parabola, heavy)
        slope = remainder_of(slopes[:, *place][:, inside], parabola, heavy)
        changes = np.vstack([parabola, pattern, slope])
        bends[:, *place][:, inside] = remainder_of(bends[:, *place][:, inside], changes, heavy)
        heights += float((pattern**2 @ heavy).sum())
        steepness += float((slope**2 @ heavy).sum())
    return bends, heights / steepness if steepness > 0 else 0.0


def _noise(draft: Draft, rows: slice) -> float:
    """Return the sum over the support of the variance of bins, weighted: their number but for an empty background."""
    return float((draft.weight * draft.noise * draft.support)[rows].sum())


def _second_derivatives(image: Image) -> list[Image]:
    """Return the derivatives of an image by yy, yx and xx."""
    along_y = scipy.ndimage.correlate1d(image, _CENTRAL, axis=0)
    return [
        scipy.ndimage.correlate1d(image, _SECOND, axis=0),
        scipy.ndimage.correlate1d(along_y, _CENTRAL, axis=1),
        scipy.ndimage.correlate1d(image, _SECOND, axis=1),
    ]


def _response(draft: Draft, templates: Image, rows: slice) -> Image | None:
    """Return the matrix from sums of templates (3, row, bin) with residuals to yy − xx, 2 yx and yy + xx, (3, 3)."""
    middle = draft.at(0, 0)
    yy, xx = ((draft.at(y, x) - 2 * middle + draft.at(-y, -x)) / 2 for y, x in ((1, 0), (0, 1)))
    yx = (draft.at(1, 1) - draft.at(1, -1) - draft.at(-1, 1) + draft.at(-1, -1)) / 4
    images = np.stack([yy, yx, xx])[:, rows]
    found = np.tensordot(templates, images, ((1, 2), (1, 2)))
    shared = _noise(draft, rows) * _shared(draft)
    if not (np.diag(shared) < _LARGEST_SHARED_PART * np.diag(found)).all():
        return None
    return np.asarray(_COMBINATIONS @ np.linalg.inv(found - shared))


def _shared(draft: Draft) -> Image:
    """Return the covariance of templates with the images of second moments, over the variance of a bin, (3, 3)."""
    middle, kernel = draft.kernel
    pairs = [_second_derivatives(one) for one in _second_derivatives(kernel)]
    halves = np.array([0.5, 1.0, 0.5])
    return np.asarray([[one[middle, middle] for one in row] for row in pairs] * halves)
