"""Masks as runs of pixels, so that a pass over a picture reads pixels only, many at a time."""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.ncc import Mask

Places = npt.NDArray[np.int64]
"""Runs (row, first, stop), in order."""


class RowRuns(NamedTuple):
    """The True pixels of a mask."""

    runs: Places
    """(row, first, stop), in order."""
    firsts: npt.NDArray[np.int64]
    """Where the runs of each row begin, and those of the last end."""

    @classmethod
    def of(cls, mask: Mask) -> "RowRuns":
        """Find the runs."""
        runs = runs_of(mask)
        return cls(runs, np.searchsorted(runs[:, 0], np.arange(len(mask) + 1)))

    @property
    def pixels(self) -> int:
        """How many pixels there are."""
        return int((self.runs[:, 2] - self.runs[:, 1]).sum())


def runs_of(mask: Mask) -> Places:
    """Return the horizontal runs of True as (row, first, stop), in order.

    Examples
    --------
    >>> runs_of(np.array([[True, True, False, True], [False, False, False, False]]))
    array([[0, 0, 2],
           [0, 3, 4]])
    """
    return np.asarray(_runs(np.array(mask, np.uint8, order="C")))


@numba.njit(nogil=True, cache=True)
def _runs(mask: npt.NDArray[np.uint8]) -> Places:
    count = 0
    for y in range(mask.shape[0]):
        count += _begun(mask[y])
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
def _begun(row: npt.NDArray[np.uint8]) -> int:
    """Count the runs of a row."""
    count = np.int64(row[0]) if len(row) else np.int64(0)
    for x in range(1, len(row)):
        count += row[x] > row[x - 1]
    return int(count)
