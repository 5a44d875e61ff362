"""The kernel: frames in, one shift or one reason per frame out.

It knows nothing of files, chunks or clusters; every driver calls :func:`match_frames` on plain NumPy arrays.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.special

from stillframe.bins import Single
from stillframe.checks import as_mask, boolean, native, real
from stillframe.flags import FLAG_DTYPE, Flag
from stillframe.ncc import Image, Mask
from stillframe.peak import DECISIVE, ROUNDING, Peak
from stillframe.reference import Reference, saturation_limit
from stillframe.refine import Estimate, refine
from stillframe.runs import RowRuns
from stillframe.survey import Statistics, Survey

KERNEL_VERSION = 5
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
_ALIKE = 0.8
"""A reference that scores more than this with itself at another shift may hop there."""
_MISMATCHED = 0.3
"""A frame with more than this part of its structure unexplained, beyond any noise, shows something else."""

_BRILLIANT = 3.0
"""A pixel that stands out by so many times more than any of the reference's may be no part of the pattern."""
_QUANTILES = (0.5, 0.97)
"""By these, intensities of a frame are compared with the reference's, whatever strikes a few of its pixels."""
_FARTHEST = 0.5
"""A refined shift may lie so far outside the window, pixels."""

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
        Valid pixels of the frames where they are not those of the reference. Such frames are searched
        pixel by pixel, with three more transforms each.

    Returns
    -------
    numpy.ndarray, shape (frame,), dtype ``MATCH_DTYPE``
        ``dy, dx``: shift to apply to the frame, pixels; NaN where a flag says why.
        ``sigma_y, sigma_x, cov_yx``: its standard errors (px) and covariance (px²).
        ``score``: masked NCC at the whole-pixel shift nearest to it, −1…1; ``second_score``: the highest other peak,
        estimated where the search in bins sufficed.
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
    The highest masked normalized cross-correlation at whole pixels (D. Padfield, doi 10.1109/TIP.2011.2181402),
    looked for in bins first and pixel by pixel where these leave a doubt, is where weighted estimating equations are
    solved for the fraction (:mod:`stillframe.refine`). ``sigma`` is the error that differs from frame to frame; the
    offset that the reference's own noise gives to all frames alike has the covariance ``reference.template.common``
    and moves nothing relative to anything. What a background fixed to the detector or a changing pattern adds is not
    in it. Where the reference holds too little for refinement, shifts are whole pixels and sigma is that of rounding,
    12^-½ px.

    Pixels far brighter than the reference allows are cut before the search, saturated ones and those that no noise
    explains are left out of the refinement.

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
    limit = saturation_limit(frame.dtype, reference.saturation)
    known = reference.survey(frame, mask, limit)
    pixels = reference.frame_pixels if mask is None else int(np.count_nonzero(valid))
    if known.seen.not_finite or not pixels:
        return no_match(Flag.CORRUPT)
    tamed, compared = _tame(frame, known, valid, reference, mask)
    unusable = judge(compared.seen._replace(saturated=known.seen.saturated), pixels, reference.contrast)
    if unusable:
        return no_match(unusable, known.seen.mean)
    fitted = RowRuns.of(valid & (frame < limit)) if known.seen.saturated else known.valid
    return _search_and_refine(_Frame(known.single, fitted, valid, tamed, compared, mask, known.seen), reference)


class _Frame(NamedTuple):
    """One frame on its way to a shift."""

    pixels: Single
    fitted: RowRuns
    """Pixels that may be fitted."""
    valid: Mask
    """Pixels that may be compared."""
    tamed: npt.NDArray[Any]
    """The pixels without hits that would outweigh all others in a correlation."""
    compared: Survey
    """Of the tamed pixels."""
    mask: Mask | None
    """Its own mask, if it has one."""
    seen: Statistics
    """Of the pixels as they are."""

    @property
    def intensity(self) -> float:
        """Mean of the valid pixels."""
        return self.seen.mean

    @property
    def plain(self) -> bool:
        """Whether the pixels that are compared are those that are fitted."""
        return self.compared.single is self.pixels and not self.seen.saturated


def _tame(
    frame: npt.NDArray[Any], known: Survey, valid: Mask, reference: Reference, mask: Mask | None
) -> tuple[npt.NDArray[Any], Survey]:
    """Cut what is far brighter than anything in the reference can be in this frame."""
    seen, top = known.seen, reference.brightest - reference.usual
    if seen.largest - seen.mean <= _BRILLIANT * top + 10 * seen.deviation:
        return frame, known
    low, high = np.quantile(frame[valid], _QUANTILES)
    ceiling = low + (high - low) * (2 * top / max(reference.upper - reference.usual, 1e-300) + 8)
    if not ceiling < seen.largest:
        return frame, known
    tamed = np.minimum(frame, np.asarray(np.ceil(ceiling)).astype(frame.dtype))
    return tamed, reference.survey(tamed, mask)


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


def _search_and_refine(frame: _Frame, reference: Reference) -> tuple[float, ...]:
    """Find the whole-pixel shift, in a wider window if it lies at the edge of the first, and refine it."""
    peak = reference.find_peak(frame.tamed, frame.compared, frame.mask)
    if peak is None:
        return no_match(Flag.LOW_SCORE, frame.intensity)
    if not peak.at_edge:
        return _refined(frame, peak, reference)
    if peak.score < least_score(peak.pixels, peak.lags):
        return _given_up(peak, reference, frame.intensity)
    farther = reference.find_farther_peak(frame.tamed, frame.compared.seen, frame.mask)
    if farther is None or farther.at_edge:
        return _given_up(farther or peak, reference, frame.intensity)
    return _refined(frame, farther, reference, int(Flag.AT_EDGE))


def _unmatched(reference: Reference, intensity: float) -> Flag:
    """Say why a frame shows no pattern: there was no beam, or something else."""
    if reference.template is None:
        return Flag.LOW_SCORE
    _, pedestal = reference.known_noise
    above = reference.template.level - pedestal
    return Flag.DARK if intensity - pedestal < _DIM_PART * above else Flag.LOW_SCORE


def _given_up(peak: Peak, reference: Reference, intensity: float) -> tuple[float, ...]:
    flag = _unmatched(reference, intensity) if peak.score < least_score(peak.pixels, peak.lags) else Flag.AT_EDGE
    return _record(peak, reference, intensity, flag)


def _refined(frame: _Frame, peak: Peak, reference: Reference, known: int = 0) -> tuple[float, ...]:
    """Refine a peak, and say what speaks against it."""
    if reference.template is None:
        return _whole(peak, reference, frame.intensity, known)
    fixed = reference.steps
    hidden = reference.hidden if frame.fitted is reference.valid else None
    estimate = refine(frame.pixels, frame.fitted, peak.shift, reference.template, fixed, peak.slack, hidden)
    objection = _objection(estimate, peak, reference, frame.intensity)
    if estimate is None or objection:
        return _record(_scored(frame, peak, peak.shift, reference), reference, frame.intensity, objection)
    nearest = round(float(estimate.shift[0])), round(float(estimate.shift[1]))
    same = nearest == estimate.start and frame.plain
    scored = _scored(frame, peak, nearest, reference, estimate.product if same else None)
    return _record(scored, reference, frame.intensity, Flag(known), *estimate[:2])


def _objection(estimate: Estimate | None, peak: Peak, reference: Reference, intensity: float) -> Flag:
    """Say what speaks against a refined peak, if anything does."""
    if estimate is None or _no_match(estimate, peak.lags):
        return _unmatched(reference, intensity)
    if _ambiguous(peak, reference):
        return Flag.AMBIGUOUS_PEAK
    return Flag.AT_EDGE if np.abs(estimate.shift).max() > peak.reach + _FARTHEST else Flag(0)


def _scored(
    frame: _Frame, peak: Peak, shift: tuple[int, int], reference: Reference, product: float | None = None
) -> Peak:
    """Return the peak with the score of single pixels at a whole-pixel shift."""
    score, pixels = reference.score(shift, frame.compared.single, frame.compared.seen, frame.valid, product)
    return peak.scored(score, pixels) if peak.slack else peak._replace(score=score, pixels=float(pixels))


def _whole(peak: Peak, reference: Reference, intensity: float, known: int) -> tuple[float, ...]:
    """Return the whole-pixel shift of a peak, unless something speaks against it."""
    if peak.score < least_score(peak.pixels, peak.lags):
        return _record(peak, reference, intensity, _unmatched(reference, intensity))
    flag = Flag.AMBIGUOUS_PEAK if _ambiguous(peak, reference) else Flag(known)
    rounding = np.diag([WHOLE_PIXEL_SIGMA**2] * 2)
    return _record(peak, reference, intensity, flag, np.array(peak.shift, dtype=np.float64), rounding)


def _no_match(estimate: Estimate, lags: int) -> bool:
    """Tell whether the pattern is not there, or the frame shows mostly something else there.

    A pattern that resembles itself, as rings do, can lock one ring on another when its true shift lies beyond the
    search; the structure that is then left over tells it.
    """
    least = least_significance(lags)
    other = estimate.mismatch > _MISMATCHED and estimate.mismatch_significance > least
    return estimate.significance < least or other


def _ambiguous(peak: Peak, reference: Reference) -> bool:
    """Tell whether another shift explains the frame as well.

    That can be only where the reference resembles itself at another shift, as a lattice does: any other second peak
    is noise. Then the second peak decides: scores of n pixels scatter by (1 − score²) n^-½.
    """
    scatter = (1 - peak.score**2) / np.sqrt(max(peak.pixels, 1))
    if peak.lead >= max(DECISIVE * np.sqrt(2) * scatter, ROUNDING):
        return False
    alike = reference.self_similarity if peak.reach <= reference.max_shift else reference.wider_self_similarity
    return alike > _ALIKE


def _record(
    peak: Peak,
    reference: Reference,
    intensity: float,
    flag: Flag,
    shift: Image | None = None,
    covariance: Image | None = None,
) -> tuple[float, ...]:
    part = peak.pixels / reference.trusted_pixels
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
