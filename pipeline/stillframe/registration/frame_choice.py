"""The frames that a reference is made of: spread over the stack by default, and none that shows no pattern.

A frame is judged beside the others, never by the mean of all, which a few spoiled frames can dominate:

1. Frames that are corrupt, constant or saturated are left out.
2. Frames whose contrast, without their brightest pixels, is many times that of the others are left out: stripes.
3. Frames that show far less structure in bins than the others are left out: no beam, or only its background.

By default one frame is taken from each of 16 equal parts of the stack. Where some cannot be used, two more of each part
are read, and the best placed usable ones are taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stillframe.images.arrays import Mask, Pixels, native, saturation_limit
from stillframe.images.binning import bin_means, whole_bins
from stillframe.images.corrections import Corrections
from stillframe.images.run_lengths import RowRuns
from stillframe.images.statistics import Statistics, statistics
from stillframe.registration.acceptance import is_dark, unusable
from stillframe.registration.reference_frames import Read, corrected, part_of, spread_places

_SPARES = 2
"""Frames of each part of the stack that may replace the first choice."""
_BIN = 8
"""Side of the bins in which structure is looked for, pixels."""
_LEAST_BINS = 16
"""With fewer bins nothing is said about structure."""
_SIGNIFICANT = 5.0
"""The variance of the bins exceeds that of noise by this many of its standard errors where there is structure."""
_LEAST_STRUCTURE = 0.04
"""A frame with less than this fraction of the usual variance of bins, a fifth of the contrast, shows no pattern."""
_LARGEST_CONTRAST = 10.0
"""A frame of more than this many times the usual contrast shows something else."""
_STRUCTURED_FRACTION = 1 / 8
"""At least this fraction of the frames must show structure for the others to be judged by it."""
_LEAST_STRUCTURED = 3
"""At least so many frames, too."""
_BRIGHTEST = 0.001
"""Fraction of the pixels, the brightest, that do not enter the contrast: hits and hot pixels."""
_CLIPPED = 20.0
"""Pixels count at most this many times the height of the quantile that begins the brightest ones."""
_SAMPLED_PIXELS = 2**18
"""Number of pixels that suffices for quantiles."""


class _Judged(NamedTuple):
    """What is known of a frame that is neither corrupt nor constant nor saturated."""

    frame: int
    pixels: Statistics
    """Statistics of its valid pixels."""
    contrast: float
    """Standard deviation without the brightest pixels."""
    structure: float
    """Variance of the means of bins, less that of noise."""
    has_structure: bool
    """Whether noise alone would hardly give that."""


def spread_frames(
    read: Read, indices: Sequence[int], mask: Mask, saturation: float | None, corrections: Corrections | None = None
) -> list[int]:
    """Return up to 16 usable frames, spread evenly over those of the indices; none if no frame can be used.

    Two thirds of the candidates are read only if some of the first cannot be used, or if hardly any shows structure.
    """
    places = spread_places(len(indices))
    judged = _judge(read, [indices[place] for place in places], mask, saturation, corrections)
    good = _usable(judged)
    if len(good) == len(places) and sum(one.has_structure for one in judged) >= len(places) / 2:
        return good
    spares = [place for number in range(1, _SPARES + 1) for place in spread_places(len(indices), number)]
    more = [indices[place] for place in dict.fromkeys(spares) if place not in set(places)]
    usable = set(_usable([*judged, *_judge(read, more, mask, saturation, corrections)]))
    first = [indices[place] for place in places]
    wanted = [index for index in [*first, *more] if index in usable]
    return sorted(_one_a_part(wanted, indices)[: len(places)])


def _one_a_part(wanted: Sequence[int], indices: Sequence[int]) -> list[int]:
    """Return the frames in another order: the first of each part of the stack, then the second of each, and so on."""
    place_of = {index: place for place, index in enumerate(indices)}
    seen: dict[int, int] = {}
    rank = []
    for index in wanted:
        part = part_of(place_of[index], len(indices))
        rank.append(seen.get(part, 0))
        seen[part] = rank[-1] + 1
    return [index for _, index in sorted(zip(rank, wanted, strict=True), key=lambda one: one[0])]


def usable_among(
    read: Read, chosen: Sequence[int], mask: Mask, saturation: float | None, corrections: Corrections | None = None
) -> list[int]:
    """Return which of some frames may enter a reference, in the same order."""
    return _usable(_judge(read, chosen, mask, saturation, corrections))


def _judge(
    read: Read, chosen: Sequence[int], mask: Mask, saturation: float | None, corrections: Corrections | None = None
) -> list[_Judged]:
    """Judge frames one by one; those that cannot be read or are corrupt, constant or saturated are left out."""
    whole, valid, count = whole_bins(mask, _BIN), RowRuns.of(mask), int(np.count_nonzero(mask))
    judged = []
    for index in chosen:
        for array in read([index]):  # none if it cannot be read
            frame = native(array, "a frame", 2)
            pixels = statistics(frame, valid, saturation_limit(frame.dtype, saturation))
            if not unusable(pixels, count, 0.0):
                judged.append(_Judged(index, pixels, *_structure(corrected(frame, corrections), mask, whole)))
    return judged


def _structure(frame: Pixels, mask: Mask, whole: Mask) -> tuple[float, float, bool]:
    """Return the contrast without the brightest pixels, the structure in bins, and whether that is significant."""
    values = frame[mask]
    sample = np.sort(values[:: len(values) // _SAMPLED_PIXELS | 1].astype(np.float64))
    kept = sample[: max(1, len(sample) - int(np.ceil(_BRIGHTEST * len(sample))))]
    contrast, middle = float(kept.std()), float(sample[len(sample) // 2])
    if np.count_nonzero(whole) < _LEAST_BINS:
        return contrast, 0.0, False
    image = np.where(mask, frame, 0).astype(np.float64)
    if kept[-1] > middle:
        image = np.minimum(image, middle + _CLIPPED * (kept[-1] - middle))
    means, squares = bin_means(image, _BIN)[whole], bin_means(image**2, _BIN)[whole]
    noise = float(np.mean(squares - means**2)) / (_BIN**2 - 1)
    structure = float(means.var()) - noise
    return contrast, structure, structure > _SIGNIFICANT * noise * float(np.sqrt(2 / len(means)))


def _usable(judged: Sequence[_Judged]) -> list[int]:
    """Return the frames that agree with the usual contrast and structure of all."""
    structured = [one for one in judged if one.has_structure]
    enough = len(structured) >= max(_LEAST_STRUCTURED, _STRUCTURED_FRACTION * len(judged))
    usual = _median([one.contrast for one in (structured if enough else judged)])
    rest = [one for one in judged if not one.contrast > _LARGEST_CONTRAST * usual or not usual]
    if enough:
        least = _LEAST_STRUCTURE * _median([one.structure for one in structured])
        return [one.frame for one in rest if one.structure >= least]
    upper = float(np.percentile([one.pixels.deviation for one in rest], 75)) if rest else 0.0
    return [one.frame for one in rest if not is_dark(one.pixels, upper)]


def _median(values: Sequence[float]) -> float:
    return float(np.median(np.array(values))) if len(values) else 0.0
