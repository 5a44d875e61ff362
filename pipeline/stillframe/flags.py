"""Why a frame has no shift, or one to be careful with: CF-style bit flags.

Source: CF conventions 1.11, section 3.5 (``flag_masks``, ``flag_meanings``).
"""

from enum import IntFlag

import numpy as np


class Flag(IntFlag):
    """What is wrong with a frame, one bit each; 0 means nothing is.

    Examples
    --------
    >>> Flag(5)
    <Flag.DARK|SATURATED: 5>
    """

    DARK = 1
    """No beam: all valid pixels equal, far below the reference in contrast, or dim and without its pattern."""
    CORRUPT = 2
    """A valid pixel is not finite, or the frame's chunk is missing or cannot be decoded."""
    SATURATED = 4
    """Too many valid pixels stand at the detector's limit."""
    LOW_SCORE = 8
    """The best score is no better than chance would give."""
    AMBIGUOUS_PEAK = 16
    """Another shift scores almost as high."""
    AT_EDGE = 32
    """The best score lies on the border of the searched window: the true shift may be larger."""
    OFF_TRAJECTORY = 64
    """The shift is far from the drift fitted to its neighbours in time."""
    INTERPOLATED = 128
    """The applied shift comes from the drift, not from this frame."""


FLAG_DTYPE = np.dtype("uint16")

UNUSABLE = Flag.DARK | Flag.CORRUPT | Flag.SATURATED | Flag.LOW_SCORE | Flag.AMBIGUOUS_PEAK | Flag.AT_EDGE
"""A frame with one of these has a NaN shift, unless it is at the edge and was found in the wider search."""


def cf_attributes() -> dict[str, object]:
    """Return the CF attributes that let any reader decode a flag variable.

    Returns
    -------
    dict
        ``flag_masks`` (uint16 array) and ``flag_meanings`` (one word a bit).

    Examples
    --------
    >>> cf_attributes()["flag_meanings"].split()[:2]
    ['dark', 'corrupt']
    """
    return {
        "flag_masks": np.array([flag.value for flag in Flag], dtype=FLAG_DTYPE),
        "flag_meanings": " ".join(str(flag.name).lower() for flag in Flag),
    }


def meanings(value: int) -> str:
    """Name the bits that are set in one flag value, for people.

    Examples
    --------
    >>> meanings(5), meanings(0)
    ('dark, saturated', 'good')
    """
    return ", ".join(str(flag.name).lower() for flag in Flag if flag & value) or "good"
