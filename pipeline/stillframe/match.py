"""The kernel: frames in, one shift or one reason per frame out.

It knows nothing of files, chunks or clusters; every driver calls :func:`match_frames` on plain NumPy arrays.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.special

from stillframe.checks import as_mask, boolean, native, real
from stillframe.flags import FLAG_DTYPE, Flag
from stillframe.ncc import Image, Mask
from stillframe.reference import Reference, saturation_limit
from stillframe.refine import refine
from stillframe.search import Statistics, statistics

KERNEL_VERSION = 2
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
_DIM_PART = 0.2
"""A frame without the pattern and with less than this part of the reference's intensity above its pedestal is dark."""
_SATURATED_PART = 0.05
"""A frame with more than this part of its valid pixels at the limit has lost its peaks."""
_FALSE_ALARM = 1e-6
"""Chance per frame that pure noise passes as a match."""
_DECISIVE = 5.5
"""A second peak that is lower by this many standard deviations is out of the question."""
_ALIKE = 0.8
"""A reference that scores more than this with itself at another shift may hop there."""
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
    The highest masked normalized cross-correlation at whole pixels (D. Padfield, doi 10.1109/TIP.2011.2181402) is
    where weighted estimating equations are solved for the fraction (:mod:`stillframe.refine`). ``sigma`` is the
    error that differs from frame to frame; the offset that the reference's own noise gives to all frames alike has
    the covariance ``reference.template.common`` and moves nothing relative to anything. Where the reference holds
    too little for refinement, shifts are whole pixels and sigma is that of rounding, 12^-½ px.

    Examples
    --------
    >>> import numpy as np
    >>> picture = np.random.default_rng(0).poisson(50.0, size=(64, 64))
    >>> matches = match_frames(np.roll(picture, (3, -2), (0, 1))[None], Reference(picture, max_shift=8))
    >>> print(f"{matches['dy'][0]:.1f} {matches['dx'][0]:.1f}")
    -3.0 2.0
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
    valid = reference.frame_mask if mask is None else mask
    seen = statistics(frame, valid, saturation_limit(frame.dtype, reference.saturation))
    unusable = judge(seen, int(np.count_nonzero(valid)), reference.contrast)
    if unusable:
        return no_match(unusable, np.nan if Flag.CORRUPT in unusable else seen.mean)
    return _search_and_refine(frame, seen, reference, mask)


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


def _search_and_refine(
    frame: npt.NDArray[Any], seen: Statistics, reference: Reference, mask: Mask | None
) -> tuple[float, ...]:
    """Find the whole-pixel shift, in a wider window if it lies at the edge of the first, and refine it."""
    ncc, overlap = reference.search.surface(frame, seen, mask)
    around = reference.margin
    if np.isnan(ncc[around : len(ncc) - around, around : len(ncc) - around]).all():
        return no_match(Flag.LOW_SCORE, seen.mean)
    peak = _find_peak(ncc, overlap, reference)
    if not peak.at_edge:
        return _refined(frame, peak, reference, mask, seen.mean)
    if reference.wider is None or peak.score < least_score(peak.pixels, ncc.size):
        return _given_up(peak, reference, seen.mean)
    peak = _find_peak(*reference.wider.search.surface(frame, seen, mask), reference.wider)
    if peak.at_edge:
        return _given_up(peak, reference, seen.mean)
    return _refined(frame, peak, reference, mask, seen.mean, int(Flag.AT_EDGE))


class _Peak(NamedTuple):
    """The highest point of a surface of scores."""

    shift: tuple[int, int]
    score: float
    smooth_score: float
    second_score: float
    pixels: float
    lags: int
    at_edge: bool


def _find_peak(ncc: Image, overlap: Image, reference: Reference) -> _Peak:
    """Find the peak of the surface smoothed as the templates are, which noise moves less than the raw one."""
    radius, around = reference.max_shift, reference.margin
    wanted = slice(around, ncc.shape[0] - around)
    scores = _smoothed(ncc, reference.search_smoothing)[wanted, wanted]
    if np.isnan(scores).all():
        scores = ncc[wanted, wanted]
    row, column = (int(place) for place in np.unravel_index(np.nanargmax(scores), scores.shape))
    at_edge = radius > 0 and max(abs(row - radius), abs(column - radius)) == radius
    near = ncc[wanted, wanted][max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
    return _Peak(
        shift=(row - radius, column - radius),
        score=float(np.nanmax(near)),
        smooth_score=float(scores[row, column]),
        second_score=_second_score(scores, row, column),
        pixels=float(overlap[wanted, wanted][row, column]),
        lags=scores.size,
        at_edge=at_edge,
    )


def _smoothed(ncc: Image, width: float) -> Image:
    """Smooth the surface where it is defined."""
    if not width:
        return ncc
    valid = np.isfinite(ncc)
    total = scipy.ndimage.gaussian_filter(np.where(valid, ncc, 0), width, mode="nearest")
    weight = scipy.ndimage.gaussian_filter(valid.astype(np.float64), width, mode="nearest")
    return np.where(valid, total / np.maximum(weight, 1e-3), np.nan)


def _unmatched(reference: Reference, intensity: float) -> Flag:
    """Say why a frame shows no pattern: there was no beam, or something else."""
    if reference.template is None:
        return Flag.LOW_SCORE
    _, pedestal = reference.known_noise
    above = reference.template.level - pedestal
    return Flag.DARK if intensity - pedestal < _DIM_PART * above else Flag.LOW_SCORE


def _given_up(peak: _Peak, reference: Reference, intensity: float) -> tuple[float, ...]:
    flag = _unmatched(reference, intensity) if peak.score < least_score(peak.pixels, peak.lags) else Flag.AT_EDGE
    return _record(peak, reference, intensity, flag)


def _refined(
    frame: npt.NDArray[Any],
    peak: _Peak,
    reference: Reference,
    mask: Mask | None,
    intensity: float,
    known: int = 0,
) -> tuple[float, ...]:
    """Refine a peak, and say what speaks against it."""
    if reference.template is None:
        weak = peak.score < least_score(peak.pixels, peak.lags)
        flag = _unmatched(reference, intensity) if weak else Flag(known)
        rounding = np.diag([WHOLE_PIXEL_SIGMA**2] * 2)
        return _record(peak, reference, intensity, flag, np.array(peak.shift, dtype=np.float64), rounding)
    valid = reference.frame_mask if mask is None else mask
    estimate = refine(frame, valid, peak.shift, reference.template)
    if estimate is None or estimate.significance < least_significance(peak.lags):
        return _record(peak, reference, intensity, _unmatched(reference, intensity))
    if _ambiguous(peak, reference):
        return _record(peak, reference, intensity, Flag.AMBIGUOUS_PEAK)
    return _record(peak, reference, intensity, Flag(known), estimate.shift, estimate.covariance)


def _ambiguous(peak: _Peak, reference: Reference) -> bool:
    """Tell whether another shift explains the frame as well.

    That can be only where the reference resembles itself at another shift, as a lattice does: any other second peak
    is noise. Then the second peak decides: scores of n pixels scatter by (1 − score²) n^-½.
    """
    if not self_similarity(reference) > _ALIKE:
        return False
    scatter = (1 - peak.score**2) / np.sqrt(max(peak.pixels, 1))
    return bool(peak.smooth_score - peak.second_score < _DECISIVE * np.sqrt(2) * scatter)


def self_similarity(reference: Reference) -> float:
    """Return the highest score of the reference with itself at another shift, its noise discounted; kept with it."""
    kept = reference.__dict__.get("_self_similarity")
    if kept is None:
        kept = _measure_self_similarity(reference)
        reference.__dict__["_self_similarity"] = kept
    return float(kept)


def _measure_self_similarity(reference: Reference) -> float:
    image = np.where(reference.mask, reference.image, 0).astype(np.float64)
    seen = statistics(image, reference.mask, np.inf)
    peak = _find_peak(*reference.search.surface(image, seen, reference.mask), reference)
    gain, pedestal = reference.known_noise
    noise = gain * (seen.mean - pedestal) if gain > 0 else -pedestal
    structure = max(1 - noise / seen.deviation**2, 0.05)
    return float(np.nan_to_num(peak.second_score) / structure)


def _record(
    peak: _Peak,
    reference: Reference,
    intensity: float,
    flag: Flag,
    shift: Image | None = None,
    covariance: Image | None = None,
) -> tuple[float, ...]:
    part = peak.pixels / np.count_nonzero(reference.mask)
    rest = (peak.score, peak.second_score, part, intensity, int(flag))
    if shift is None or covariance is None or flag & ~Flag.AT_EDGE:
        return (*(np.nan,) * 5, *rest)
    sigma = np.sqrt(np.maximum(np.diag(covariance), 0))
    return (float(shift[0]), float(shift[1]), float(sigma[0]), float(sigma[1]), float(covariance[0, 1]), *rest)


def least_significance(lags: int) -> float:
    """Significance that a frame without the pattern reaches at one of so many lags with a chance of one in a million.

    Under that null hypothesis the gain over its standard error, which is taken from the frame's own residuals, is
    normal with standard deviation 1.
    """
    return float(-scipy.special.ndtri(_FALSE_ALARM / lags))


def least_score(pixels: float, lags: int) -> float:
    """Score that white noise exceeds at one of ``lags`` shifts with a chance of one in a million.

    The NCC of ``pixels`` independent values with anything is close to normal with standard deviation
    (pixels − 2)^-½.
    """
    return least_significance(lags) / float(np.sqrt(max(pixels - 2, 1)))


def _second_score(scores: Image, row: int, column: int) -> float:
    """Highest local maximum away from the peak; NaN where there is none."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    peaks = known == scipy.ndimage.maximum_filter(known, size=3, mode="constant", cval=-np.inf)
    reach = _SECOND_PEAK_DISTANCE
    peaks[max(0, row - reach + 1) : row + reach, max(0, column - reach + 1) : column + reach] = False
    others = known[peaks & np.isfinite(known)]
    return float(others.max()) if others.size else np.nan
