"""What a finished run says about frames without a shift, where these are so many that something is wrong."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from stillframe.flags import Flag
from stillframe.wording import first_few, frame_range

_MANY = 0.5
"""Fraction of frames without a shift from which a run is not in order."""
NONE_GOOD = (
    "no frame got a shift without a flag. Look at the flags in shifts.zarr, and check the mask (True where pixels are "
    "valid), the reference and --max-shift."
)


def many_without_shift(shifts: npt.NDArray[np.float64], flags: npt.NDArray[np.uint16], max_shift: int) -> str | None:
    """Return which frames have no shift, why, and what would cure it, where these are half of all frames or more.

    Examples
    --------
    >>> shifts, flags = np.full((4, 2), np.nan), np.array([0, 8, 8, 1])
    >>> shifts[0] = 0
    >>> print(many_without_shift(shifts, flags, 32)[:69])
    3 of 4 frames have no shift: frames 1–3. Reasons: 2 low_score, 1 dark
    """
    lost = np.asarray(np.isnan(shifts).any(axis=1))
    count = int(np.count_nonzero(lost))
    if not count or count < _MANY * len(lost):
        return None
    numbers = {flag: int(np.count_nonzero(flags[lost] & flag.value)) for flag in Flag}
    reasons = sorted((flag for flag in Flag if numbers[flag]), key=lambda flag: -numbers[flag])
    named = ", ".join(f"{numbers[flag]} {str(flag.name).lower()}" for flag in reasons)
    advice = dict.fromkeys(_advice(flag, max_shift) for flag in reasons if numbers[flag] >= count / 4)
    ranges = first_few([frame_range(*one) for one in _ranges(np.flatnonzero(lost))])
    return f"{count} of {len(lost)} frames have no shift: {ranges}. Reasons: {named}. {' '.join(advice)}"


def _ranges(indices: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of neighbours, the longest first."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    for run in sorted(runs, key=lambda one: (-len(one), one[0])):
        yield int(run[0]), int(run[-1]) + 1


def _advice(flag: Flag, max_shift: int) -> str:
    """Return what to do about frames with a flag."""
    if flag in (Flag.LOW_SCORE, Flag.AT_EDGE):
        return (
            f"Where the pattern moved farther than the search reaches, give a larger --max-shift (now {max_shift}); "
            "where it changed, run those frames with a reference of their own (--reference, another --out); and check "
            "that the mask is True where pixels are valid."
        )
    if flag is Flag.DARK:
        return "Frames without beam need no cure; if there was beam, choose other frames with --reference."
    if flag is Flag.AMBIGUOUS_PEAK:
        return (
            "The pattern repeats itself. Shifts up to twice --max-shift compete: if the drift is known to be small, "
            "give a --max-shift below half of the period."
        )
    if flag is Flag.SATURATED:
        return "Mask the saturated pixels if they are always the same, or take shorter exposures."
    return "Frames that are damaged or missing must be brought back; the next run does them."
