"""The first guide of a reference: an image with which most of its frames can be registered."""

from collections.abc import Iterator, Sequence

import numpy as np

from stillframe.images.arrays import Image, Pixels
from stillframe.registration.match import match_with_guide
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.reference import Reference
from stillframe.registration.reference_frames import Read, corrected, unsaturated

ENOUGH = 0.8
"""Fraction of the usable frames that must be registered with a first guide for no other to be tried."""
_RECENTRED = 3
"""How often a guide nearer to the middle of the drift is tried."""


def best_guide(read: Read, usable: Sequence[int], reference: Reference) -> tuple[Reference | None, list[int]]:
    """Return the first guide, and the frames that can be registered with it.

    The guide is the frame in the middle of the drift, or the mean of all frames. Single frames come first: they are
    neither smeared by drift, nor does a jump leave a second image in them. Frames beyond the window of one guide may
    lie within that of another, which is nearer to the middle of those that were registered.
    """
    best: Reference | None = None
    shifts: dict[int, Image] = {}
    for guide in _guides(read, usable, reference):
        of_guide = _shifts(read, usable, guide) if prepare(guide).template else {}
        if len(of_guide) > len(shifts):
            best, shifts = guide, of_guide
        if len(of_guide) >= ENOUGH * len(usable):
            break
    if best is None or best is reference:
        return best, list(shifts)
    return _recentred(read, usable, reference, best, shifts)


def _recentred(
    read: Read, usable: Sequence[int], reference: Reference, guide: Reference, shifts: dict[int, Image]
) -> tuple[Reference, list[int]]:
    """Return a guide nearer to the middle of the drift, if as many frames can be registered with it, and these."""
    for _ in range(_RECENTRED):
        middle = _guide_of(read([_middle_of_drift(shifts, reference.max_shift)])[0], reference)
        if len(shifts) == len(usable):
            return middle, list(shifts)
        of_middle = _shifts(read, usable, middle) if prepare(middle).template else {}
        if len(of_middle) < len(shifts):
            break
        more = len(of_middle) > len(shifts)
        guide, shifts = middle, of_middle
        if not more:
            break
    return guide, list(shifts)


def _guide_of(frame: Pixels, reference: Reference) -> Reference:
    """Return a reference with the corrected counts of one recorded frame as image."""
    valid = reference.frame_mask & unsaturated(frame, reference.options.saturation)
    return reference.replace(image=corrected(frame, reference.corrections), mask=valid)


def _guides(read: Read, usable: Sequence[int], reference: Reference) -> Iterator[Reference]:
    """Yield the middle, the first and the last frame, then the mean of the unaligned frames."""
    for index in dict.fromkeys(usable[place * (len(usable) - 1) // 2] for place in (1, 0, 2) if usable):
        yield _guide_of(read([index])[0], reference)
    yield reference


def _shifts(read: Read, usable: Sequence[int], guide: Reference) -> dict[int, Image]:
    """Return the shifts of the frames that can be registered with a guide."""
    matches = {index: match_with_guide(read([index]), guide)[0] for index in usable}
    return {index: np.array([match["dy"], match["dx"]]) for index, match in matches.items() if np.isfinite(match["dy"])}


def _middle_of_drift(shifts: dict[int, Image], max_shift: int) -> int:
    """Return the frame in the middle of the drift.

    It is the one with the most other frames within twice the search window. Of equal ones it is the one with the most
    frames within the search window, and of those the most central one.
    """
    values = np.array(list(shifts.values()))
    apart = np.abs(values[:, None] - values).max(axis=2)
    reached, inside = ((apart <= reach).sum(axis=1) for reach in (2 * max_shift, max_shift))
    return list(shifts)[int(np.lexsort((apart.sum(axis=1), -inside, -reached))[0])]
