"""Which frames of a stack enter a reference, and their plain mean."""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Float32, Image, Mask, Pixels, as_mask, native, real, saturation_limit
from stillframe.images.corrections import Corrections
from stillframe.images.hot_pixels import bad_pixels
from stillframe.images.run_lengths import RowRuns, ValidPixels
from stillframe.images.statistics import Statistics, statistics
from stillframe.registration.acceptance import unusable

Read = Callable[[Sequence[int]], Pixels]
"""Returns the frames (frame, y, x) of some indices; frames that cannot be read may be left out."""

BATCH = 16
"""Number of frames that are held in memory at a time."""
DEFAULT_FRAMES = 16
"""Number of frames of a reference by default."""
_ALMOST_EVERY = 0.9
"""A pixel that is saturated in this fraction of the frames is a fault of the detector, and no signal."""
_LEAST_SAMPLE = 4
"""Number of frames that are needed to tell such a pixel."""
_LEAST_MEAN = 8
"""A pixel that stands out of the mean of at least so many frames is bad: a single hit weighs less there."""
_WRAPPED_RANGE = 16
"""Wrapped pixels lie in the highest of so many equal parts of the dtype's range, dim ones in the lowest."""
_WRAPPED_FRACTION = 0.01
"""Least fraction of the pixels that are wrapped around where a dark was subtracted."""
_WRAPPED_BESIDE_DIM = 0.2
"""Least fraction of them with a dim right neighbour."""
_STEP = 0.6180339887498949
"""Fraction of a part of the stack by which the place in it moves on from one part to the next."""


def chosen_frames(use: int | slice | None, count: int) -> Sequence[int]:
    """Return the indices of the frames that ``use`` asks for.

    By default these are 16 frames, spread over the whole stack, or all frames of a shorter stack. ``ValueError`` if the
    stack has fewer frames than are asked for.

    Examples
    --------
    >>> chosen_frames(slice(2, 6), 10), chosen_frames(-1, 10)
    (range(2, 6), range(9, 10))
    """
    if use is None:
        return spread_places(count)
    if not isinstance(use, slice):
        index = operator.index(use)
        if not -count <= index < count:
            raise ValueError(f"frame {index} was asked for as reference, but there are {count}. Choose one of them.")
        return range(index % count, index % count + 1)
    chosen = range(count)[use]
    if max(abs(edge) for edge in (use.start or 0, use.stop or 0)) > count or not chosen:
        asked = ":".join("" if edge is None else str(edge) for edge in (use.start, use.stop))
        raise ValueError(
            f"frames {asked} were asked for as reference, but there are {count} frames, which gives {len(chosen)} of "
            "them. Ask for frames that are there."
        )
    return chosen


def spread_places(count: int, number: int = 0) -> Sequence[int]:
    """Return one place in each of 16 equal parts of a stack, or all places of a shorter stack.

    The place differs from part to part by the golden ratio, so that it does not always meet the same kind of frame
    where kinds alternate. Other places in the parts have the numbers 1 and 2.

    Examples
    --------
    >>> spread_places(5), spread_places(64)[:4], spread_places(64, 1)[:4]
    (range(0, 5), [2, 4, 11, 13], [3, 6, 8, 15])
    """
    if count <= DEFAULT_FRAMES:
        return range(0 if number else count)
    edges = [part * count // DEFAULT_FRAMES for part in range(DEFAULT_FRAMES + 1)]
    parts = enumerate(itertools.pairwise(edges), start=1)
    return [first + int((part * _STEP + number / 3) % 1 * (stop - first)) for part, (first, stop) in parts]


def middle_places(count: int) -> range:
    """Return the 16 places in the middle of a stack, or all places of a shorter stack.

    Examples
    --------
    >>> middle_places(100)
    range(42, 58)
    """
    first = max(0, (count - DEFAULT_FRAMES) // 2)
    return range(first, min(count, first + DEFAULT_FRAMES))


def part_of(place: int, count: int) -> int:
    """Return in which of the 16 parts a place lies, from 0 on."""
    return -(-DEFAULT_FRAMES * (place + 1) // count) - 1


def frames_needed(use: int | slice | None) -> int:
    """Return how many frames a growing stack must have before the reference is made.

    Frames that are named must all be there. By default 16 are enough: those that are there are chosen from, and the
    reference is kept when the stack has grown. A choice that counts frames from the end raises ``ValueError``.

    Examples
    --------
    >>> frames_needed(None), frames_needed(3), frames_needed(slice(0, 8))
    (16, 4, 8)
    """
    if use is None:
        return DEFAULT_FRAMES
    last = use.stop if isinstance(use, slice) else operator.index(use) + 1
    first = use.start or 0 if isinstance(use, slice) else last
    if last is None or min(last, first) < 0 or last < 1:
        raise ValueError(
            "the reference is to be made of frames counted from the end, but the stack still grows. Count them from "
            'the first one, such as "0:16".'
        )
    return int(last)


def frames_of_kind(kind: str | None, kinds: Pixels | None, count: int) -> Sequence[int]:
    """Return the indices of all frames, or of the frames of one kind; ``ValueError`` if there is none of this kind."""
    if kind is None:
        return range(count)
    indices = [] if kinds is None else [index for index, name in enumerate(kinds) if str(name) == kind]
    if not indices:
        present = "no kinds" if kinds is None else ", ".join(sorted({str(name) for name in kinds}))
        raise ValueError(f"frames of the kind {kind!r} were asked for as reference, but the store names {present}.")
    return indices


def one_frame(read: Read, chosen: Sequence[int]) -> Pixels:
    """Return the first of the chosen frames (y, x); ``ValueError`` if it cannot be read."""
    frames = read(chosen)
    if not len(frames):
        raise ValueError(f"frame {chosen[0]} was asked for as reference but cannot be read. Choose another one.")
    return np.asarray(frames[0])


class MeanImage(NamedTuple):
    """Plain mean of the usable frames."""

    image: Float32
    """Mean over the frames in which the pixel is not saturated (y, x), corrected counts."""
    observed: Mask
    """True = not saturated in at least half of the frames."""
    used: int
    """Number of frames."""
    lasting: Image
    """The mean without the two highest values of each pixel: what lasts, and is no hit."""


def mean_image(
    read: Read, chosen: Sequence[int], mask: Mask, saturation: float | None, corrections: Corrections | None = None
) -> MeanImage:
    """Return the mean of the usable frames; ``ValueError`` if no frame is usable."""
    total, counts, used = np.zeros(mask.shape), np.zeros(mask.shape), 0
    highest, second = np.full((2, *mask.shape), -np.inf)
    for first in range(0, len(chosen), BATCH):
        frames = read(chosen[first : first + BATCH])
        for frame in frames[usable_frames(frames, mask, saturation=saturation, corrections=corrections)]:
            below = unsaturated(frame, saturation)
            values = np.where(below, corrected(frame, corrections), 0)
            total += values
            second = np.maximum(second, np.minimum(highest, values))
            highest = np.maximum(highest, values)
            counts, used = counts + below, used + 1
    if not used:
        raise ValueError(
            f"of the {len(chosen)} frames asked for as reference none is usable: all are dark, constant, saturated, "
            "hold NaN or cannot be read. Choose others."
        )
    lasting = (total - highest - second) / np.maximum(counts - 2, 1) if used > 2 else total
    return MeanImage((total / np.maximum(counts, 1)).astype(np.float32), counts >= used / 2, used, lasting)


def corrected(frame: Pixels, corrections: Corrections | None) -> Pixels:
    """Return a recorded frame (y, x) in corrected counts; without corrections it does not change."""
    return frame if corrections is None else corrections.corrected(native(frame, "a frame", 2))


def unsaturated(frame: Pixels, saturation: float | None) -> Mask:
    """Return True for the pixels of a recorded frame that are below the saturation limit. NaN counts as below."""
    return np.asarray(~(frame >= saturation_limit(frame.dtype, saturation)))


def sample_frames(read: Read, chosen: Sequence[int]) -> Pixels:
    """Return at most 16 frames, spread over the chosen ones (frame, y, x)."""
    places = np.unique(np.linspace(0, len(chosen) - 1, BATCH).astype(int))
    return read([chosen[place] for place in places])


def never_saturated(sample: Pixels, mask: Mask, saturation: float | None) -> Mask:
    """Return the valid pixels that are not saturated in almost every frame of a sample, as a block of bad pixels is.

    Few frames do not tell such a block from the brightest spots. A mask of which less than half would remain does not
    change: the frames are saturated as a whole.
    """
    if len(sample) < _LEAST_SAMPLE or not np.isfinite(saturation_limit(sample.dtype, saturation)):
        return mask
    below = np.zeros(mask.shape, np.int64)
    for frame in sample:
        below += unsaturated(frame, saturation)
    kept = mask & (below > (1 - _ALMOST_EVERY) * len(sample))
    return kept if 2 * np.count_nonzero(kept) > np.count_nonzero(mask) else mask


def standing_out(mean: MeanImage, mask: Mask) -> Mask:
    """Return True for hot and dead pixels of a plain mean; of few frames there are none, as hits look alike."""
    if mean.used < _LEAST_MEAN:
        return np.zeros_like(mask)
    return bad_pixels(mean.lasting, mask & mean.observed)


def refuse_wrapped(sample: Pixels, mask: Mask) -> None:
    """Raise ``ValueError`` if most frames of a sample look as if a subtraction of unsigned integers wrapped around."""
    wrapped = [wrapped_around(frame, mask) for frame in sample]
    if wrapped and 2 * sum(wrapped) > len(wrapped):
        raise ValueError(
            "in the frames of the reference many pixels among dim ones are just below "
            f"{np.iinfo(sample.dtype).max}: it looks as if a subtraction of unsigned integers wrapped around below 0. "
            "Subtract the dark in a signed dtype such as int32, or give frames as recorded together with the dark "
            "(--dark)."
        )


def wrapped_around(frame: Pixels, mask: Mask) -> bool:
    """Return whether many pixels just below the largest value of an unsigned dtype stand among dim ones.

    A saturated region has few dim neighbours, and pixels at the largest value itself do not count.
    """
    if frame.dtype.kind != "u" or frame.dtype.itemsize < 2:
        return False
    top = int(np.iinfo(frame.dtype).max)
    high = mask & (frame > top - top // _WRAPPED_RANGE) & (frame < top)
    count = np.count_nonzero(high)
    if count <= _WRAPPED_FRACTION * np.count_nonzero(mask):
        return False
    dim = mask & (frame < top // _WRAPPED_RANGE)
    beside_dim = np.count_nonzero(high[:, :-1] & dim[:, 1:])
    between = np.count_nonzero(mask & ~high & ~dim & (frame < top))
    return bool(beside_dim > _WRAPPED_BESIDE_DIM * count and between < count)


def usable_frames(
    array: npt.ArrayLike,
    mask: npt.ArrayLike | None,
    *,
    saturation: float | None = None,
    corrections: Corrections | None = None,
) -> Mask:
    """Return which frames of a stack may enter an average: neither dark, nor corrupt, nor saturated; (frame,).

    Contrasts are compared with the upper quartile of those of the frames that are neither corrupt nor saturated.
    """
    frames = real(array, "the stack of frames", 3)
    valid = ValidPixels.of(as_mask(mask, (frames.shape[1], frames.shape[2])))
    pixels = [frame_statistics(frame, valid, saturation, corrections) for frame in frames]
    contrasts = [one.deviation for one in pixels if not unusable(one, valid.pixels, 0.0)]
    usual = float(np.percentile(contrasts, 75)) if contrasts else 0.0
    return np.array([not unusable(one, valid.pixels, usual) for one in pixels], dtype=np.bool_)


def frame_statistics(
    frame: Pixels, valid: ValidPixels, saturation: float | None, corrections: Corrections | None
) -> Statistics:
    """Return the statistics of a recorded frame (y, x) in corrected counts, without those of its saturated pixels.

    The number of saturated pixels is that of recorded counts.
    """
    recorded = native(frame, "a frame", 2)
    pixels = statistics(recorded, valid.valid, saturation_limit(recorded.dtype, saturation))
    if not pixels.saturated and corrections is None:
        return pixels
    below = RowRuns.of(valid.mask & unsaturated(recorded, saturation))
    return statistics(corrected(recorded, corrections), below, np.inf)._replace(saturated=pixels.saturated)
