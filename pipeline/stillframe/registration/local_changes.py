"""Templates that smooth backgrounds and local changes of intensity do not move (53).

What stays on the detector while the pattern drifts, and what pumping does to the pattern, is smooth or changes the
intensity of single features. Templates that are orthogonal to both, square by square, do not respond to them. This
takes no time per frame.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from stillframe.images.arrays import Image, Mask
from stillframe.registration.template_draft import Draft

_SIDES = (32, 64, 128, 256, 512)
"""Sides of squares that are tried, pixels."""
_WIDTHS = 8
"""A square is at least this many widths of the templates' Gaussian wide, so that its polynomial follows no feature."""
_ACROSS = 4
"""At least this many squares lie along the shorter axis of the image."""
_LEAST_ACROSS = 3
"""So many squares along the shorter axis are enough where they are asked for at any price."""
_VARIANCE_LOSS = 0.05
"""Squares may enlarge the variance of shifts by this fraction, compared with squares of the next larger side."""
_LARGEST_LOSS = 2.0
"""Squares may enlarge the variance of shifts by this factor compared with none, whose information may be background."""
_LARGEST_SHARED_NOISE = 0.2
"""A larger fraction of shared noise in the gain's equation means that noise hides the features of the reference."""
_SINGULAR = 1e-10
"""Directions with a smaller fraction of the largest singular value are not determined by the bins of a square."""


def choose_square(draft: Draft, *, at_any_price: bool = False) -> tuple[int, Draft]:
    """Return the side of the smallest squares, pixels, that hardly enlarge the expected errors, and templates for them.

    The side is 0 and the templates are as they were if there are no such squares, or if noise hides the features: the
    glow is all that such a reference shows, as a single frame with few counts. With ``at_any_price`` squares
    may enlarge the errors by any factor, and the smallest ones that are possible are taken.
    """
    least = _WIDTHS * draft.smoothed.width
    most = min(draft.smoothed.image.shape) / (_LEAST_ACROSS if at_any_price else _ACROSS)
    limit = np.finfo(np.float64).max if at_any_price else _LARGEST_LOSS * draft.expected_variance()
    square, best = 0, draft
    for side in (side for side in reversed(_SIDES) if least <= side <= most):
        smaller = without_local_changes(draft, side)
        variance = smaller.expected_variance()
        if not variance <= limit < np.inf or not _shows_features(smaller):
            break
        square, best = side, smaller
        if not at_any_price:
            limit = min(limit, (1 + _VARIANCE_LOSS) * variance)
    return square, best


def without_local_changes(draft: Draft, square: int) -> Draft:
    """Return templates that are orthogonal to local changes in squares of this side, pixels.

    The templates of the shift are orthogonal to parabolas and to the pattern itself, that of the gain to parabolas.
    """
    slopes, soft = draft.slopes.copy(), draft.soft.copy()
    for place in rectangles(draft.support.shape, (square // draft.side,) * 2):
        inside = draft.support[place]
        if not inside.any():
            continue
        weight, pattern = draft.weight[place][inside], draft.soft[place][inside]
        parabola = parabola_of(inside)
        slopes[:, *place][:, inside] = remainder_of(
            slopes[:, *place][:, inside], np.vstack([parabola, pattern]), weight
        )
        soft[place][inside] = remainder_of(pattern[None], parabola, weight)[0]
    return replace(draft, slopes=slopes, soft=soft)


def _shows_features(draft: Draft) -> bool:
    """Return whether the gain's equation has more of the pattern than of the noise shared with its template (24)."""
    template, image = (draft.weight * draft.soft)[draft.support], draft.at(0, 0)[draft.support]
    shared = float(draft.shared_noise(draft.support, [(0, 0)])[2, 0])
    return abs(shared) < _LARGEST_SHARED_NOISE * float(template @ image)


def rectangles(shape: tuple[int, ...], sides: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield rectangles that cover an image; ``sides`` are in bins, and the last of each row and column is larger."""
    rows, columns = (_parts(length, side) for length, side in zip(shape, sides, strict=True))
    return ((row, column) for row in rows for column in columns)


def _parts(length: int, side: int) -> list[slice]:
    starts = [side * place for place in range(max(1, length // side))]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]


def parabola_of(inside: Mask) -> Image:
    """Return the terms of a parabola over the bins of a square, (6, bin)."""
    y, x = (2 * places / max(length, 1) - 1 for places, length in zip(np.nonzero(inside), inside.shape, strict=True))
    return np.stack([np.ones_like(y), y, x, y * y, y * x, x * x])


def remainder_of(fields: Image, terms: Image, weight: Image) -> Image:
    """Return fields (k, bin) less the combination of terms (n, bin) that fits them best."""
    root = np.sqrt(weight)
    scale = np.sqrt((terms**2 @ weight)[:, None])
    basis = np.divide(terms * root, scale, out=np.zeros_like(terms), where=scale > 0)
    values, vectors = np.linalg.eigh(basis @ basis.T)
    kept = vectors[:, values > _SINGULAR * values[-1]]
    orthonormal = (kept / np.sqrt(values[values > _SINGULAR * values[-1]])).T @ basis
    scaled = fields * root
    remainder = scaled - (scaled @ orthonormal.T) @ orthonormal
    return np.asarray(np.divide(remainder, root, out=np.zeros_like(remainder), where=root > 0))
