"""Templates that measure elongated features and ignore local changes of intensity (64).

Elongated features add second derivatives of the pattern to a frame. Templates are those of the smoothed reference,
less all that resembles a parabola, the pattern or its slopes, square by square (53).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Image
from stillframe.images.binning import bin_means
from stillframe.images.run_lengths import Runs, inside_of
from stillframe.registration.local_changes import parabola_of, rectangles, remainder_of
from stillframe.registration.template_draft import SMOOTHINGS, Draft

_PIXELS = 500_000
"""About so many pixels of a support are used, in whole rows of bins: large images have counts enough."""
_LEAST_ROWS = 4
"""Rows of a square that are used, at least."""
_LARGEST_SHARED_PART = 0.7
"""Largest fraction of the response to an elongation that is noise shared by templates and reference."""
_SECOND = np.array([1.0, -2.0, 1.0])
_CENTRAL = np.array([-0.5, 0.0, 0.5])
_LARGEST_WEIGHT_OF_ONE = 0.1
"""Nothing is said if one bin has a larger part of all information, as pixels without noise have."""
_HALVES = np.array([0.5, 1.0, 0.5])
"""Factors of the second derivatives by yy, yx and xx in the change of a pattern by second moments."""
_COMBINATIONS = np.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]])
"""From second moments (yy, yx, xx) to yy − xx and 2 yx, of which the elongation is the length, and to yy + xx."""


@dataclass(frozen=True, eq=False)
class ElongationTemplates:
    """Templates that measure the elongation, in some rows of the bins that a reference uses."""

    first: int
    """First row of bins that is used."""
    step: int
    """From one such row to the next."""
    fields: Float32
    """Templates whose sums with residuals are yy − xx, 2 yx and yy + xx of the second moments, px², (3, bin).

    They are 0 in gaps.
    """
    information: float
    """Sum over all bins of the squares of the template of yy + xx over its noise."""
    shared: Image
    """Noise that templates share with the reference, in these sums for a gain of 1, (3,)."""
    size: float
    """Mean square half-width of the reference's features, px²: that of a Gaussian spot is its variance."""


def elongation_templates(draft: Draft, square: int, runs: Runs) -> ElongationTemplates | None:
    """Return the templates of a reference; None with too much noise.

    They ignore local changes of intensity in squares of the side ``square``, pixels.

    ``draft`` has the templates as they are without squares, ``runs`` contain its support. Without squares, the
    image is one. Templates are smoothed more than those of the shift where noise asks for it.
    """
    widths = (draft.smoothed.width, *(width for width in SMOOTHINGS if width > draft.smoothed.width))
    made = (_templates(draft.smoothed_by(width), square, runs) for width in widths)
    return next((templates for templates in made if templates is not None), None)


def _templates(draft: Draft, square: int, runs: Runs) -> ElongationTemplates | None:
    side = square // draft.side if square else max(draft.support.shape)
    pixels = int((runs[:, 2] - runs[:, 1]).sum()) * draft.side**2
    step = max(1, min(-(-pixels // _PIXELS), side // _LEAST_ROWS))
    rows = slice(step // 2, None, step)
    inside = inside_of(runs, draft.support.shape)[rows]
    bends, size, noise = _without_local_changes(draft, rows, (max(1, side // step), side))
    response = _response(draft, bends * draft.weight[rows], rows, noise)
    if response is None or not size > 0:
        return None
    fields = np.tensordot(response, bends, 1)
    weighted = fields[2] ** 2 * draft.weight[rows]
    if not weighted.max() < _LARGEST_WEIGHT_OF_ONE * weighted.sum():
        return None
    return ElongationTemplates(
        first=step // 2,
        step=step,
        fields=fields[:, inside].astype(np.float32),
        shared=response @ noise.with_image(draft),
        information=float(weighted.sum()),
        size=size,
    )


class _SharedNoise(NamedTuple):
    """Noise that the templates and the reference have in common (24), summed over the bins."""

    bins: float
    """Sum of the variance of bins, weighted: their number but for an empty background."""
    of_pattern: Image
    """The same sum of the coefficients of the pattern, which was subtracted from the second derivatives, (3,)."""

    def with_image(self, draft: Draft) -> Image:
        """Return Σ S_kl η/v, (3,)."""
        middle, kernel = draft.kernel
        of_bends = np.array([one[middle, middle] for one in _second_derivatives(kernel)])
        return np.asarray(self.bins * of_bends - self.of_pattern * kernel[middle, middle])

    def with_moments(self, draft: Draft) -> Image:
        """Return Σ S_kl ∂_m ∂_n η/v, the latter halved for yy and xx, (3, 3)."""
        middle, kernel = draft.kernel
        bends = _second_derivatives(kernel)
        of_bends = np.array([[one[middle, middle] for one in _second_derivatives(bend)] for bend in bends])
        of_pattern = np.outer(self.of_pattern, [one[middle, middle] for one in bends])
        return np.asarray((self.bins * of_bends - of_pattern) * _HALVES)


def _without_local_changes(draft: Draft, rows: slice, sides: tuple[int, int]) -> tuple[Image, float, _SharedNoise]:
    """Return the second derivatives of some rows, less local changes in rectangles, and the size of the features.

    Shape (3, row, bin); 0 outside of the support. The last value is the noise that they share with the reference.
    """
    support, weight, soft, slopes = draft.support[rows], draft.weight[rows], draft.soft[rows], draft.slopes[:, rows]
    noise = weight * draft.noise[rows]
    bends = np.stack([bin_means(one, draft.side)[rows] for one in _second_derivatives(draft.smoothed.soft)])
    bends *= support
    heights = steepness = bins = 0.0
    of_pattern, most = np.zeros(3), draft.smoothed.width**-2
    for place in rectangles(support.shape, sides):
        inside = support[place]
        if not inside.any():
            continue
        parabola, heavy = parabola_of(inside), weight[place][inside]
        pattern = remainder_of(soft[place][inside][None], parabola, heavy)
        slope = remainder_of(slopes[:, *place][:, inside], parabola, heavy)
        changes = np.vstack([parabola, pattern, slope])
        height = float((pattern**2 @ heavy).sum())
        noisy = float(noise[place][inside].sum())
        if height > 0:
            # Smoothed noise resembles its second derivatives most: this coefficient is at most 1/w².
            of_pattern += noisy * np.clip((bends[:, *place][:, inside] * heavy @ pattern[0]) / height, -most, most)
        bends[:, *place][:, inside] = remainder_of(bends[:, *place][:, inside], changes, heavy)
        heights, steepness, bins = heights + height, steepness + float((slope**2 @ heavy).sum()), bins + noisy
    return bends, heights / steepness if steepness > 0 else 0.0, _SharedNoise(bins, of_pattern)


def _second_derivatives(image: Image) -> list[Image]:
    """Return the derivatives of an image by yy, yx and xx."""
    along_y = scipy.ndimage.correlate1d(image, _CENTRAL, axis=0)
    return [
        scipy.ndimage.correlate1d(image, _SECOND, axis=0),
        scipy.ndimage.correlate1d(along_y, _CENTRAL, axis=1),
        scipy.ndimage.correlate1d(image, _SECOND, axis=1),
    ]


def _response(draft: Draft, templates: Image, rows: slice, noise: _SharedNoise) -> Image | None:
    """Return the matrix from sums of templates (3, row, bin) with residuals to yy − xx, 2 yx and yy + xx, (3, 3)."""
    middle = draft.at(0, 0)
    yy, xx = (draft.at(y, x) - 2 * middle + draft.at(-y, -x) for y, x in ((1, 0), (0, 1)))
    yx = (draft.at(1, 1) - draft.at(1, -1) - draft.at(-1, 1) + draft.at(-1, -1)) / 4
    images = np.stack([yy, yx, xx])[:, rows]
    found, shared = np.tensordot(templates, images, ((1, 2), (1, 2))) * _HALVES, noise.with_moments(draft)
    if not (np.diag(shared) < _LARGEST_SHARED_PART * np.diag(found)).all():
        return None
    return np.asarray(_COMBINATIONS @ np.linalg.inv(found - shared))
