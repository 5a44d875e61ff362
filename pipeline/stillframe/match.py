"""The kernel: frames in, one shift or one reason per frame out.

It knows nothing of files, chunks or clusters; every driver calls :func:`match_frames` on plain NumPy arrays.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.special

from stillframe.checks import as_mask, boolean, native, real
from stillframe.flags import FLAG_DTYPE, Flag
from stillframe.ncc import Image, Mask
from stillframe.reference import Reference, saturation_limit
from stillframe.search import Statistics, statistics

KERNEL_VERSION = 1
"""Raised whenever the same frames and settings would give other numbers."""

MATCH_DTYPE = np.dtype(
    [(name, np.float64) for name in ("dy", "dx", "sigma_y", "sigma_x", "cov_yx")]
    + [(name, np.float64) for name in ("score", "second_score", "overlap", "intensity")]
    + [("flag", FLAG_DTYPE)]
)
"""One record per frame; units and meaning are told in :func:`match_frames`."""

WHOLE_PIXEL_SIGMA = 12**-0.5
"""Standard error of a shift rounded to whole pixels, when every fraction is equally likely."""

_DARK_PART = 0.05
"""A frame with less than this part of the reference's contrast saw no beam."""
_SATURATED_PART = 0.05
"""A frame with more than this part of its valid pixels at the limit has lost its peaks."""
_FALSE_ALARM = 1e-6
"""Chance per frame that pure noise passes as a match."""
_SECOND_PEAK_DISTANCE = 3
"""A second peak lies at least this many pixels from the first, along one axis."""

Matches = npt.NDArray[np.void]


def match_frames(array: npt.ArrayLike, reference: Reference, *, masks: npt.ArrayLike | None = None) -> Matches:
    """Find the shift that lays each frame on the reference, from the pixels valid in both.

    Parameters
    ----------
    array : array_like, shape (frame, y, x)
        Integer or floating frames of any width and byte order; never written to.
    reference : Reference
        What to lay them on, the static mask and the bounds of the search.
    masks : array_like of bool, shape (frame, y, x) or (y, x), optional
        Valid pixels of the frames where they are not those of the reference. Costs three more
        transforms a frame.

    Returns
    -------
    numpy.ndarray, shape (frame,), dtype ``MATCH_DTYPE``
        ``dy, dx``: shift to apply to the frame, pixels; NaN where a flag says why.
        ``sigma_y, sigma_x, cov_yx``: its standard errors (px) and covariance (px²).
        ``score``: masked NCC at the peak, −1…1; ``second_score``: the highest other peak.
        ``overlap``: fraction of the reference's valid pixels that are valid in both there.
        ``intensity``: mean of the frame's valid pixels. ``flag``: bits of :class:`~stillframe.Flag`.

    Raises
    ------
    TypeError
        Complex, object or other unordered pixels.
    ValueError
        Frames or masks of another shape than the reference.

    Notes
    -----
    Shifts are those of the highest masked normalized cross-correlation at whole pixels (D. Padfield,
    doi 10.1109/TIP.2011.2181402); their sigma is that of rounding, 12^-½ px.

    Examples
    --------
    >>> import numpy as np
    >>> picture = np.random.default_rng(0).poisson(50.0, size=(64, 64))
    >>> matches = match_frames(np.roll(picture, (3, -2), (0, 1))[None], Reference(picture, max_shift=8))
    >>> float(matches["dy"][0]), float(matches["dx"][0])
    (-3.0, 2.0)
    """
    frames = real(array, "the stack of frames", 3)
    if frames.shape[1:] != reference.shape:
        raise ValueError(
            f"the frames have shape {frames.shape[1:]} but the reference has {reference.shape}: they must come from "
            "the same detector. Crop or bin both alike."
        )
    valid = _frame_masks(masks, frames.shape)
    matches = np.empty(len(frames), MATCH_DTYPE)
    for index, frame in enumerate(frames):
        own = None if valid is None else valid[index]
        matches[index] = _match(native(frame, "a frame", 2), reference, own)
    return matches


def _frame_masks(masks: npt.ArrayLike | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    if masks is None:
        return None
    stack = np.asarray(masks)
    if stack.ndim == 2:
        return np.broadcast_to(as_mask(stack, (shape[1], shape[2])), shape)
    if stack.shape != shape:
        raise ValueError(f"the masks have shape {stack.shape} but the frames have {shape}: give one mask per frame.")
    return boolean(stack, "the stack of masks")


def _match(frame: npt.NDArray[Any], reference: Reference, mask: Mask | None) -> tuple[float, ...]:
    valid = reference.mask if mask is None else mask
    seen = statistics(frame, valid, saturation_limit(frame.dtype, reference.saturation))
    unusable = judge(seen, int(np.count_nonzero(valid)), reference.contrast)
    if unusable:
        return no_match(unusable, np.nan if Flag.CORRUPT in unusable else seen.mean)
    ncc, overlap = reference.search.surface(frame, seen, mask)
    if np.isnan(ncc).all():
        return no_match(Flag.LOW_SCORE, seen.mean)
    return _from_surface(ncc, overlap, reference, seen.mean)


def no_match(flag: Flag, intensity: float = np.nan) -> tuple[float, ...]:
    """Return the record of a frame that has no shift, with the reason."""
    return (*[np.nan] * 8, intensity, int(flag))


def judge(seen: Statistics, valid: int, contrast: float) -> Flag:
    """Say what makes a frame unusable before any comparison with others of this contrast.

    Contrast, not the mean, tells a dark frame: an offset says nothing of the beam.
    """
    if seen.not_finite or not valid:
        return Flag.CORRUPT
    if seen.saturated > _SATURATED_PART * valid:
        return Flag.SATURATED
    if seen.smallest == seen.largest or seen.deviation < _DARK_PART * contrast:
        return Flag.DARK
    return Flag(0)


def _from_surface(ncc: Image, overlap: Image, reference: Reference, intensity: float) -> tuple[float, ...]:
    radius = reference.max_shift
    row, column = np.unravel_index(np.nanargmax(ncc), ncc.shape)
    score, pixels = float(ncc[row, column]), float(overlap[row, column])
    flag = Flag(0)
    if score < least_score(pixels, ncc.size):
        flag |= Flag.LOW_SCORE
    elif radius and max(abs(int(row) - radius), abs(int(column) - radius)) == radius:
        flag |= Flag.AT_EDGE
    shift = (np.nan, np.nan) if flag else (float(row - radius), float(column - radius))
    errors = (np.nan,) * 3 if flag else (WHOLE_PIXEL_SIGMA, WHOLE_PIXEL_SIGMA, 0.0)
    part = pixels / np.count_nonzero(reference.mask)
    return (*shift, *errors, score, _second_score(ncc, int(row), int(column)), part, intensity, int(flag))


def least_score(pixels: float, lags: int) -> float:
    """Score that white noise exceeds at one of ``lags`` shifts with a chance of one in a million.

    The NCC of ``pixels`` independent values with anything is close to normal with standard deviation
    (pixels − 2)^-½.
    """
    return float(-scipy.special.ndtri(_FALSE_ALARM / lags) / np.sqrt(max(pixels - 2, 1)))


def _second_score(ncc: Image, row: int, column: int) -> float:
    """Highest local maximum away from the peak; NaN where there is none."""
    scores = np.where(np.isnan(ncc), -np.inf, ncc)
    peaks = scores == scipy.ndimage.maximum_filter(scores, size=3, mode="constant", cval=-np.inf)
    reach = _SECOND_PEAK_DISTANCE
    peaks[max(0, row - reach + 1) : row + reach, max(0, column - reach + 1) : column + reach] = False
    others = scores[peaks & np.isfinite(scores)]
    return float(others.max()) if others.size else np.nan
