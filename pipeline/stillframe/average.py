"""Which frames of a stack enter a reference, and their plain mean."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.checks import as_mask, native, real
from stillframe.match import judge
from stillframe.ncc import Mask
from stillframe.reference import saturation_limit
from stillframe.survey import statistics

Read = Callable[[Sequence[int]], npt.NDArray[Any]]
"""Gives the frames (frame, y, x) of some indices; those that cannot be read may be left out."""

AT_ONCE = 16
"""Frames that are held at a time."""
_USUAL = 16
"""Frames that make a reference where nothing else is asked for."""


def chosen_frames(use: int | slice | None, count: int) -> range:
    """Return the frames that are asked for; where nothing is, the first 16 or as many as there are.

    Raises
    ------
    ValueError
        There are fewer.

    Examples
    --------
    >>> chosen_frames(slice(2, 6), 10), chosen_frames(-1, 10)
    (range(2, 6), range(9, 10))
    """
    if use is None:
        return range(min(_USUAL, count))
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


def frames_needed(use: int | slice | None) -> int:
    """Return how many frames there must be for a choice that more frames do not change.

    Raises
    ------
    ValueError
        The choice counts from the end.

    Examples
    --------
    >>> frames_needed(None), frames_needed(3), frames_needed(slice(0, 8))
    (16, 4, 8)
    """
    if use is None:
        return _USUAL
    last = use.stop if isinstance(use, slice) else operator.index(use) + 1
    first = use.start or 0 if isinstance(use, slice) else last
    if last is None or min(last, first) < 0 or last < 1:
        raise ValueError(
            "the reference is to be made of frames counted from the end, but the stack still grows. Count them from "
            'the first one, such as "0:16".'
        )
    return int(last)


def frames_of_kind(kind: str | None, kinds: npt.NDArray[Any] | None, count: int) -> Sequence[int]:
    """Return the indices of all frames, or of those whose kind has this name.

    Raises
    ------
    ValueError
        The store does not name kinds, or not this one.
    """
    if kind is None:
        return range(count)
    found = [] if kinds is None else [index for index, name in enumerate(kinds) if str(name) == kind]
    if not found:
        known = "no kinds" if kinds is None else ", ".join(sorted({str(name) for name in kinds}))
        raise ValueError(f"frames of the kind {kind!r} were asked for as reference, but the store names {known}.")
    return found


def one_frame(read: Read, chosen: Sequence[int]) -> npt.NDArray[Any]:
    """Return the only frame that is asked for.

    Raises
    ------
    ValueError
        It cannot be read.
    """
    frames = read(chosen)
    if not len(frames):
        raise ValueError(f"frame {chosen[0]} was asked for as reference but cannot be read. Choose another one.")
    return np.asarray(frames[0])


def mean_image(
    read: Read, chosen: Sequence[int], mask: Mask, saturation: float | None
) -> tuple[npt.NDArray[np.float32], int]:
    """Return the mean of the usable frames, and how many those are.

    Raises
    ------
    ValueError
        None is usable.
    """
    total, used = np.zeros(()), 0
    for first in range(0, len(chosen), AT_ONCE):
        frames = read(chosen[first : first + AT_ONCE])
        good = frames[usable_frames(frames, mask, saturation=saturation)]
        total, used = total + good.sum(axis=0, dtype=np.float64), used + len(good)
    if not used:
        raise ValueError(
            f"of the {len(chosen)} frames asked for as reference none is usable: all are dark, constant, saturated, "
            "hold NaN or cannot be read. Choose others."
        )
    return np.asarray(total / used, dtype=np.float32), used


def usable_frames(
    array: npt.ArrayLike, mask: npt.ArrayLike | None, *, saturation: float | None = None
) -> npt.NDArray[np.bool_]:
    """Return which frames of a stack may enter an average: neither dark, nor corrupt, nor saturated.

    Dark is told against the upper quartile of the contrasts of those that are neither corrupt nor saturated.
    """
    frames = real(array, "the stack of frames", 3)
    valid = as_mask(mask, (frames.shape[1], frames.shape[2]))
    limit = saturation_limit(frames.dtype, saturation)
    seen = [statistics(native(frame, "a frame", 2), valid, limit) for frame in frames]
    count = int(np.count_nonzero(valid))
    contrasts = [one.deviation for one in seen if not judge(one, count, 0.0)]
    usual = float(np.percentile(contrasts, 75)) if contrasts else 0.0
    return np.array([not judge(one, count, usual) for one in seen], dtype=np.bool_)
