"""Quality flags of a frame, one bit each: why it has no shift, or a shift to be used with care.

Source: CF conventions 1.11, section 3.5 (``flag_masks``, ``flag_meanings``).
"""

from enum import IntFlag

import numpy as np


class Flag(IntFlag):
    """Quality flags of a frame; the value 0 marks a good frame.

    Examples
    --------
    >>> Flag(5)
    <Flag.DARK|SATURATED: 5>
    """

    DARK = 1
    """No beam: all valid pixels equal, contrast far below the reference's, or dim and without its pattern."""
    CORRUPT = 2
    """A valid pixel is not finite, rows or columns are lost, or the frame's chunk is missing or cannot be decoded."""
    SATURATED = 4
    """Too many valid pixels stand at the detector's limit."""
    LOW_SCORE = 8
    """The best score is no better than chance would give."""
    AMBIGUOUS_PEAK = 16
    """Another shift scores almost as high."""
    AT_EDGE = 32
    """The best score lies on the border of the searched window: the true shift may be larger."""
    OFF_TRAJECTORY = 64
    """The shift is far from the drift fitted to the shifts of neighbouring frames in time."""
    INTERPOLATED = 128
    """The applied shift comes from the drift, not from this frame."""


FLAG_DTYPE = np.dtype("uint16")


def cf_attributes() -> dict[str, object]:
    """Return the CF attributes of a flag variable: ``flag_masks`` (uint16) and ``flag_meanings`` (one word a bit).

    Examples
    --------
    >>> cf_attributes()["flag_meanings"].split()[:2]
    ['dark', 'corrupt']
    """
    return {
        "flag_masks": np.array([flag.value for flag in Flag], dtype=FLAG_DTYPE),
        "flag_meanings": " ".join(str(flag.name).lower() for flag in Flag),
    }
