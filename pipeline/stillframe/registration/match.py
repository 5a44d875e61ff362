"""The kernel: one shift, or one reason why there is none, per frame.

The kernel takes and returns plain NumPy arrays; files, chunks and clusters are the business of its callers.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stillframe.flags import Flag
from stillframe.images.arrays import Mask, Pixels, Shift, as_mask, boolean, native, real, saturation_limit
from stillframe.images.run_lengths import RowRuns, ValidPixels
from stillframe.images.statistics import Survey
from stillframe.registration import acceptance
from stillframe.registration.estimate import Estimate
from stillframe.registration.matches import (
    MATCH_DTYPE,
    Matches,
    Record,
    no_match,
    record_of_whole_pixels,
    record_with_shift,
    record_without_shift,
)
from stillframe.registration.peak import Peak
from stillframe.registration.prepared_reference import PreparedReference, prepare
from stillframe.registration.reference import Reference
from stillframe.registration.refine import refine
from stillframe.registration.rivals import preference, preferred

_BRIGHT = 3.0
"""A frame is clipped only if a pixel exceeds its mean by this many times what the reference's brightest pixel does."""
_BRIGHT_DEVIATIONS = 10
"""The same pixel must exceed it by this many standard deviations of the frame besides."""
_QUANTILES = (0.5, 0.97)
"""Quantiles by which the intensities of frame and reference are compared; hits on a few pixels do not change them."""
_CEILING_FACTOR, _CEILING_OFFSET = 2, 8
"""The ceiling is twice the height expected from the reference, plus eight times the spread of those quantiles."""


def match_frames(array: npt.ArrayLike, reference: Reference, *, masks: npt.ArrayLike | None = None) -> Matches:
    """Find the shift that aligns each frame with the reference, from the pixels valid in both.

    Parameters
    ----------
    array : array_like, shape (frame, y, x)
        Integer or floating frames of any width and byte order, as recorded; never written to. The dark and flat of the
        reference are applied here, to measure shifts.
    reference : Reference
        What to align them with, the static mask and the options of the search.
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
        ``intensity``: mean of the frame's valid pixels, corrected counts.
        ``flag``: bits of :class:`~stillframe.Flag`.

    Raises
    ------
    TypeError
        Complex, object or other unordered pixels.
    ValueError
        Frames or masks of another shape than the reference.

    Notes
    -----
    The highest masked normalized cross-correlation at whole pixels (D. Padfield, doi 10.1109/TIP.2011.2181402) is
    searched in bins first, and pixel by pixel where these leave a doubt. From there weighted estimating equations are
    solved for the fraction of a pixel (:mod:`stillframe.registration.refine`). ``sigma`` is the error that differs from
    frame to frame. The noise of the reference shifts all frames by one common offset, which does not change the motion
    between them; its covariance is ``template.common`` of the prepared reference. Smooth
    backgrounds, and features that change their intensity, do not move it (:mod:`~.local_changes`). Errors from sharp
    edges that stay on the detector are not included. Where the reference holds too little structure for a
    refinement, shifts are whole pixels and sigma is that of rounding, 12^-½ px.

    Pixels far brighter than the reference allows are clipped before the search. Saturated pixels are left out of search
    and refinement, outliers of the refinement. Saturation is judged on recorded counts.

    Examples
    --------
    >>> import numpy as np
    >>> picture = np.random.default_rng(0).poisson(50.0, size=(64, 64))
    >>> matches = match_frames(np.roll(picture, (3, -2), (0, 1))[None], Reference(picture, max_shift=8))
    >>> print(f"{matches['dy'][0]:.1f} {matches['dx'][0]:.1f}")
    -3.0 2.0
    """
    return _matches(array, masks, prepare(reference))


def match_with_guide(array: npt.ArrayLike, guide: Reference, *, masks: npt.ArrayLike | None = None) -> Matches:
    """Find shifts as :func:`match_frames` does, but accept elongated features, and guess among peaks.

    While a reference is made, its guide may be smeared or contain a pattern of the detector. Features of good frames
    then look elongated. It may also be a single frame, too noisy to decide between the peaks of a lattice. Of the peaks
    that may be true the nearest is taken, as most frames drift by less than half a period; others are found when they
    are registered with the mean.
    """
    return _matches(array, masks, prepare(guide).as_guide)


def _matches(array: npt.ArrayLike, masks: npt.ArrayLike | None, prepared: PreparedReference) -> Matches:
    frames = real(array, "the stack of frames", 3)
    if frames.shape[1:] != prepared.image.shape:
        raise ValueError(
            f"the frames have shape {frames.shape[1:]} but the reference has {prepared.image.shape}: they must come "
            "from the same detector. Crop or bin both alike."
        )
    valid = _frame_masks(masks, frames.shape)
    matches = np.empty(len(frames), MATCH_DTYPE)
    for index, frame in enumerate(frames):
        own_mask = None if valid is None else valid[index]
        matches[index] = _match(native(frame, "a frame", 2), prepared, own_mask)
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


class _Frame(NamedTuple):
    """One frame on its way to a shift, in corrected counts."""

    surveyed: Survey
    """The frame as it is."""
    fitted: RowRuns
    """Pixels that may be fitted: valid and not saturated."""
    valid: ValidPixels
    """Pixels that may be compared."""
    own_mask: Mask | None
    """Its own mask if it has one."""
    clipped: Pixels
    """The frame without saturated pixels and hits, which would outweigh all other pixels in a correlation."""
    compared: Survey
    """The clipped frame."""
    reference: PreparedReference

    @property
    def intensity(self) -> float:
        """Mean of the valid pixels."""
        return self.surveyed.statistics.mean


def _match(recorded: Pixels, reference: PreparedReference, own_mask: Mask | None) -> Record:
    """Return the record of one frame."""
    if own_mask is not None and reference.corrections is not None:
        own_mask = own_mask & reference.corrections.usable
    valid = reference.frame_pixels if own_mask is None else ValidPixels.of(own_mask)
    limit = saturation_limit(recorded.dtype, reference.options.saturation)
    frame, surveyed = reference.correct(recorded, valid, limit)
    pixels = surveyed.statistics
    reason = acceptance.unusable(pixels, valid.pixels, 0.0)
    if reason:
        return no_match(reason) if reason == Flag.CORRUPT else no_match(reason, pixels.mean)
    fitted, searched = valid.valid, (frame, surveyed)
    if pixels.saturated:
        unsaturated = valid.mask & (recorded < limit)
        fitted, searched = RowRuns.of(unsaturated), _fill_saturated(frame, unsaturated, valid, reference)
    clipped, compared = _clip_hits(*searched, valid, reference)
    reason = acceptance.unusable(compared.statistics, valid.pixels, reference.contrast)
    if not reason and own_mask is None and reference.has_lost_lines(recorded, surveyed, limit):
        reason = Flag.CORRUPT
    if reason:
        return no_match(reason, pixels.mean)
    return _search_and_refine(_Frame(surveyed, fitted, valid, own_mask, clipped, compared, reference))


def _fill_saturated(
    frame: Pixels, unsaturated: Mask, valid: ValidPixels, reference: PreparedReference
) -> tuple[Pixels, Survey]:
    """Give saturated pixels the mean of the other valid ones, so that they have no weight in a correlation."""
    mean = frame.mean(where=unsaturated, dtype=np.float64)
    filled = np.where(unsaturated | ~valid.mask, frame, _as_pixel(mean, frame.dtype))
    return filled, reference.survey(filled, valid)


def _as_pixel(value: float, dtype: np.dtype[Any]) -> Any:
    """Return a value as a pixel of a dtype, rounded up for integers."""
    return np.asarray(np.ceil(value) if dtype.kind in "iu" else value).astype(dtype)


def _clip_hits(
    frame: Pixels, surveyed: Survey, valid: ValidPixels, reference: PreparedReference
) -> tuple[Pixels, Survey]:
    """Clip pixels above the ceiling (44): what the reference's brightest pixel could reach in this frame."""
    pixels, levels = surveyed.statistics, reference.levels
    top = levels.brightest - levels.median
    if pixels.largest - pixels.mean <= _BRIGHT * top + _BRIGHT_DEVIATIONS * pixels.deviation:
        return frame, surveyed
    low, high = np.quantile(frame[valid.mask], _QUANTILES)
    relative = top / max(levels.upper - levels.median, 1e-300)
    spread = high - low
    ceiling = low + (spread * (_CEILING_FACTOR * relative + _CEILING_OFFSET) if spread > 0 else 0)
    ceiling = max(ceiling, _least_ceiling(frame, valid, reference))
    if not ceiling < pixels.largest:
        return frame, surveyed
    clipped = np.minimum(frame, _as_pixel(ceiling, frame.dtype))
    return clipped, reference.survey(clipped, valid)


def _least_ceiling(frame: Pixels, valid: ValidPixels, reference: PreparedReference) -> float:
    """Return the intensity of the reference's brightest pixel, scaled to the mean of the frame without hits (44).

    The ceiling is never lower. The quantiles alone say nothing where fewer pixels have counts than lie above them.
    """
    mean, brightest = reference.pixels.mean, reference.levels.brightest
    if mean <= 0:
        return -np.inf
    own_mean = np.minimum(frame[valid.mask], _BRIGHT * brightest).mean(dtype=np.float64)
    return float(min(own_mean / mean, _BRIGHT) * brightest)


def _search_and_refine(frame: _Frame) -> Record:
    """Find the whole-pixel peak and refine it; in doubt, compare the fits at all peaks of a wider window."""
    peak = frame.reference.find_peak(frame.clipped, frame.compared, frame.own_mask)
    if peak is None:
        return no_match(Flag.LOW_SCORE, frame.intensity)
    if frame.reference.template is None:
        return _keep_whole_pixels(frame, peak)
    inside = not acceptance.at_edge(peak) and max(map(abs, peak.shift)) <= frame.reference.options.max_shift
    in_bins, alone = peak.slack > 0, not acceptance.self_similar(frame.reference.self_similarity)
    if inside and (in_bins or alone):
        estimate = _fitting(frame, peak)
        if estimate is not None and not acceptance.beyond_window(estimate, peak):
            return _accept(frame, peak, estimate, Flag(0))
        if not in_bins:
            return _refuse(frame, peak, Flag.AT_EDGE if estimate else _reason_without_pattern(frame))
    if not acceptance.reaches_least_score(peak):
        return _refuse(frame, peak, _reason_without_pattern(frame))
    # A search in bins may have missed the peak, and a pattern that resembles itself has several.
    return _best_candidate(frame)


def _fitting(frame: _Frame, peak: Peak) -> Estimate | None:
    """Return the refined shift at a peak; None if the frame does not show the pattern there."""
    estimate = _refined(frame, peak)
    return estimate if estimate is not None and acceptance.shows_pattern(estimate, peak.lags) else None


def _refined(frame: _Frame, peak: Peak) -> Estimate | None:
    reference = frame.reference
    assert reference.template is not None
    hidden = reference.hidden_bins if frame.fitted is reference.frame_pixels.valid else None
    fixed = reference.template, reference.score_image
    return refine(frame.surveyed.single, frame.fitted, peak.shift, *fixed, slack=peak.slack, hidden=hidden)


class _Candidate(NamedTuple):
    """A peak with its fit."""

    peak: Peak
    estimate: Estimate


def _best_candidate(frame: _Frame) -> Record:
    """Refine all peaks of the wider window that may be the true one, and keep the one that certainly fits best."""
    peaks = frame.reference.candidates(frame.clipped, frame.compared.statistics, frame.own_mask)
    if not peaks:
        return no_match(Flag.LOW_SCORE, frame.intensity)
    refined = ((peak, _fitting(frame, peak)) for peak in peaks)
    fitting = [_Candidate(peak, estimate) for peak, estimate in refined if estimate is not None]
    if not fitting:
        at_edge = acceptance.at_edge(peaks[0]) and acceptance.reaches_least_score(peaks[0])
        return _refuse(frame, peaks[0], Flag.AT_EDGE if at_edge else _reason_without_pattern(frame))
    undefeated = _undefeated(frame, fitting)
    best = min(undefeated, key=lambda one: float(np.abs(one.estimate.shift).max()))
    if len(undefeated) > 1 and not frame.reference.takes_nearest:
        return _refuse(frame, fitting[0].peak, Flag.AMBIGUOUS_PEAK)
    if acceptance.at_edge(best.peak) or acceptance.beyond_window(best.estimate, best.peak):
        return _refuse(frame, best.peak, Flag.AT_EDGE)
    inside = np.abs(best.estimate.shift).max() <= frame.reference.options.max_shift + acceptance.OUTSIDE
    return _accept(frame, best.peak, best.estimate, Flag(0) if inside else Flag.AT_EDGE)


def _undefeated(frame: _Frame, candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the best candidate first, then all others that may be the true one."""
    single, valid, model = frame.surveyed.single, frame.fitted, frame.reference.pixel_model
    best = candidates[0]
    beaten: list[_Candidate] = []
    for other in candidates[1:]:
        if not _apart(best, other):
            continue
        better_by = preference(single, valid, model, best.estimate, other.estimate)
        if better_by < 0:
            best, beaten, other = other, [], best
        if preferred(abs(better_by)):
            beaten.append(other)
    rivals = (other for other in candidates if _apart(best, other) and not any(other is one for one in beaten))
    return [
        best,
        *(other for other in rivals if not preferred(preference(single, valid, model, best.estimate, other.estimate))),
    ]


def _apart(one: _Candidate, other: _Candidate) -> bool:
    """Return whether two candidates are different solutions."""
    return bool(np.abs(one.estimate.shift - other.estimate.shift).max() >= 1)


def _accept(frame: _Frame, peak: Peak, estimate: Estimate, flag: Flag) -> Record:
    """Return the record of a refined shift."""
    reference = frame.reference
    nearest = round(float(estimate.shift[0])), round(float(estimate.shift[1]))
    unchanged = frame.compared is frame.surveyed and not frame.surveyed.statistics.saturated
    scored = _scored(frame, peak, nearest, estimate.product if nearest == estimate.start and unchanged else None)
    pixels = reference.trusted.pixels
    if not reference.options.subpixel:
        return record_of_whole_pixels(scored._replace(shift=nearest), pixels, frame.intensity, flag)
    return record_with_shift(scored, pixels, frame.intensity, flag, estimate.shift, estimate.covariance)


def _refuse(frame: _Frame, peak: Peak, flag: Flag) -> Record:
    scored = _scored(frame, peak, peak.shift) if peak.slack else peak
    return record_without_shift(scored, frame.reference.trusted.pixels, frame.intensity, flag)


def _reason_without_pattern(frame: _Frame) -> Flag:
    template, pedestal = frame.reference.template, frame.reference.noise.pedestal
    if template is None:
        return Flag.LOW_SCORE
    return acceptance.without_pattern(frame.intensity - pedestal, template.level - pedestal)


def _scored(frame: _Frame, peak: Peak, shift: Shift, product: float | None = None) -> Peak:
    """Return the peak with the score of single pixels at a whole-pixel shift."""
    compared = frame.compared
    score = frame.reference.score(shift, compared.single, compared.statistics, frame.valid, product)
    return peak.with_pixel_score(*score)


def _keep_whole_pixels(frame: _Frame, peak: Peak) -> Record:
    """Return the record of a peak that cannot be refined."""
    reference = frame.reference
    if not acceptance.reaches_least_score(peak):
        return _refuse(frame, peak, _reason_without_pattern(frame))
    if acceptance.at_edge(peak):
        return _refuse(frame, peak, Flag.AT_EDGE)
    if acceptance.contested(peak) and acceptance.self_similar(reference.self_similarity):
        return _refuse(frame, peak, Flag.AMBIGUOUS_PEAK)
    return record_of_whole_pixels(peak, reference.trusted.pixels, frame.intensity, Flag(0))
