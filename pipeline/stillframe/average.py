"""The first image of a reference: one frame, or the mean of those that are usable."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.checks import as_mask, native, real
from stillframe.match import judge
from stillframe.reference import saturation_limit
from stillframe.search import statistics

Read = Callable[[Sequence[int]], npt.NDArray[Any]]
"""Gives the frames (frame, y, x) of some indices; those that cannot be read may be left out."""

_AT_ONCE = 16
"""Frames that are held at a time."""


def chosen_frames(use: int | slice, count: int) -> range:
    """Return the frames that are asked for.

    Raises
    ------
    ValueError
        There are fewer.

    Examples
    --------
    >>> chosen_frames(slice(2, 6), 10), chosen_frames(-1, 10)
    (range(2, 6), range(9, 10))
    """
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


def reference_image(
    read: Read, count: int, mask: npt.ArrayLike | None, *, use: int | slice, saturation: float | None
) -> npt.NDArray[Any]:
    """Return one frame as it is, or the mean of the usable ones of several.

    Raises
    ------
    ValueError
        Fewer frames than asked for, or none that can be read and used.
    """
    chosen = chosen_frames(use, count)
    if not isinstance(use, slice):
        frames = read(chosen)
        if not len(frames):
            raise ValueError(f"frame {chosen[0]} was asked for as reference but cannot be read. Choose another one.")
        return np.asarray(frames[0])
    total, used = np.zeros(()), 0
    for first in range(0, len(chosen), _AT_ONCE):
        frames = read(chosen[first : first + _AT_ONCE])
        good = frames[usable_frames(frames, mask, saturation=saturation)]
        total, used = total + good.sum(axis=0, dtype=np.float64), used + len(good)
    if not used:
        raise ValueError(
            f"of the {len(chosen)} frames asked for as reference none is usable: all are dark, constant, saturated, "
            "hold NaN or cannot be read. Choose others."
        )
    return np.asarray(total / used, dtype=np.float32)


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
