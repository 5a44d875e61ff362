"""Masks as runs of pixels, so that a pass over an image reads only the wanted pixels, many at a time."""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Indices, Mask

Runs = npt.NDArray[np.int64]
"""Horizontal runs (row, first, stop), sorted by row, then by column; shape (run, 3)."""


class RowRuns(NamedTuple):
    """The True pixels of a mask as runs, with an index of its rows."""

    runs: Runs
    """(row, first, stop), in order."""
    firsts: Indices
    """Index of the first run of each row, and at the end the number of runs; shape (y + 1,)."""

    @classmethod
    def of(cls, mask: Mask) -> "RowRuns":
        """Return the runs of True in a mask (y, x)."""
        runs = runs_of(mask)
        return cls(runs, np.searchsorted(runs[:, 0], np.arange(len(mask) + 1)))

    @property
    def pixels(self) -> int:
        """Number of pixels in all runs."""
        return int((self.runs[:, 2] - self.runs[:, 1]).sum())


class ValidPixels(NamedTuple):
    """The valid pixels of an image as a mask and as runs, and the runs of invalid pixels between them."""

    mask: Mask
    """True = valid (y, x)."""
    valid: RowRuns
    holes: RowRuns
    """Invalid pixels."""
    pixels: int
    """Number of valid pixels."""

    @classmethod
    def of(cls, mask: Mask) -> "ValidPixels":
        """Describe the valid pixels of a mask (y, x)."""
        return cls(mask, RowRuns.of(mask), RowRuns.of(~mask), int(np.count_nonzero(mask)))


def runs_of(mask: Mask) -> Runs:
    """Return the horizontal runs of True as (row, first, stop), in order.

    Examples
    --------
    >>> runs_of(np.array([[True, True, False, True], [False, False, False, False]]))
    array([[0, 0, 2],
           [0, 3, 4]])
    """
    return np.asarray(_runs(np.array(mask, np.uint8, order="C")))


@numba.njit(nogil=True, cache=True)
def _runs(mask: npt.NDArray[np.uint8]) -> Runs:
    count = 0
    for y in range(mask.shape[0]):
        count += _count_runs(mask[y])
    out, n = np.empty((count, 3), np.int64), 0
    for y in range(mask.shape[0]):
        before = np.uint8(0)
        for x in range(mask.shape[1]):
            if mask[y, x] != before:
                if before:
                    out[n, 2] = x
                    n += 1
                else:
                    out[n, 0], out[n, 1] = y, x
                before = mask[y, x]
        if before:
            out[n, 2] = mask.shape[1]
            n += 1
    return out


@numba.njit(nogil=True, cache=True)
def _count_runs(row: npt.NDArray[np.uint8]) -> int:
    """Return the number of runs in a row."""
    count = np.int64(row[0]) if len(row) else np.int64(0)
    for x in range(1, len(row)):
        count += row[x] > row[x - 1]
    return int(count)


def inside_of(runs: Runs, shape: tuple[int, ...]) -> Mask:
    """Return True for the bins of the runs."""
    steps = np.zeros((shape[0], shape[1] + 1), np.int8)
    steps[runs[:, 0], runs[:, 1]] += 1
    steps[runs[:, 0], runs[:, 2]] -= 1
    return np.cumsum(steps, axis=1, dtype=np.int8)[:, :-1].astype(np.bool_)
