"""The image of a reference: one frame, a mean of frames, or a mean of frames that were repeatedly aligned.

The story of :func:`iterated_reference`: sort out unusable frames, choose a first guide with which most others can be
registered, then in each round register the frames of either half with the mean of the other half and average them
where the reference is, until the shifts no longer change.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stillframe.images.arrays import Image, Mask, Pixels, native, saturation_limit
from stillframe.images.hot_pixels import isolated_pixels, small_holes, with_small_holes_filled
from stillframe.images.noise import measure_noise, residual_limit, smooth, variance_of
from stillframe.images.resample import resample_frames
from stillframe.images.run_lengths import RowRuns, ValidPixels
from stillframe.registration.acceptance import unusable
from stillframe.registration.estimate import Estimate
from stillframe.registration.frame_choice import spread_frames, usable_among
from stillframe.registration.match import match_frames
from stillframe.registration.prepared_reference import PreparedReference, contrast_of, prepare
from stillframe.registration.reference import Reference, correction_image, corrections_of
from stillframe.registration.reference_frames import (
    BATCH,
    Read,
    chosen_frames,
    corrected,
    frame_statistics,
    mean_image,
    middle_places,
    never_saturated,
    one_frame,
    refuse_wrapped,
    sample_frames,
    standing_out,
    unsaturated,
)
from stillframe.registration.refine import refine
from stillframe.registration.templates import Template

_CONVERGED = 0.1
"""Rounds end when shifts change by less than this fraction of their error."""
_ENOUGH = 0.8
"""Fraction of the usable frames that must be registered with a first guide for no other to be tried."""
_RECENTRED = 3
"""How often a guide nearer to the middle of the drift is tried."""
_OUTLIER = 5.0
"""Residuals beyond this many standard deviations, corrected for the skewness of counts, do not enter the mean."""
_MODEL_ERROR = 0.1
"""Error of the model that is tolerated besides, as a fraction of the intensity."""
_LEAST_TRIMMED = 4
"""In the first round, the highest value of each pixel is left out if at least so many frames observed it."""
_LEAST_VARIANCE = 1e-3
"""A frame whose variance is a smaller fraction of the reference's was aligned with itself."""


def build_reference(
    read: Read, indices: Sequence[int], mask: Mask, *, use: int | slice | None, iterations: int, **options: Any
) -> Reference:
    """Return a reference made of some frames: one of them, their mean, or the mean of the aligned frames.

    ``use`` chooses from the indices, by default 16 usable frames that are spread over all, or without rounds, which
    undo the drift between them, 16 neighbours in the middle. ``iterations`` is the number of rounds of
    :func:`iterated_reference`, ``options`` are arguments of :class:`~stillframe.Reference`. Frames are read as
    recorded; the image is in corrected counts. Pixels that are saturated in almost every frame are invalid, and so
    are hot and dead pixels that show in the plain mean.
    """
    if not len(indices):
        raise ValueError("a reference is to be made of frames, but there are none. Give a stack with frames.")
    spread = use is None and iterations > 0
    places = chosen_frames(use, len(indices)) if spread or use is not None else middle_places(len(indices))
    asked = [indices[place] for place in places]
    sample, saturation = sample_frames(read, asked), options.get("saturation")
    refuse_wrapped(sample, mask)
    images = {name: correction_image(options.get(name), f"the {name} image") for name in ("dark", "flat")}
    on_detector = never_saturated(sample, mask, saturation)
    corrections = corrections_of(images["dark"], images["flat"], on_detector, saturation)
    if corrections is not None:
        on_detector = corrections.usable
    options = options | images | {"frame_mask": on_detector}
    if use is not None and not isinstance(use, slice):
        frame = one_frame(read, asked)
        valid = on_detector & unsaturated(frame, saturation)
        return Reference(corrected(frame, corrections), valid, history=f"frame {asked[0]}", **options)
    if spread and len(places) < len(indices):
        usable = spread_frames(read, indices, on_detector, saturation, corrections)
    else:
        usable = usable_among(read, asked, on_detector, saturation, corrections)
    chosen = usable or asked  # of no usable frame the mean says so
    if len(chosen) == 2 and iterations:
        # Two aligned frames share too much of their noise for it to be measured.
        chosen = chosen[:1]
    mean = mean_image(read, chosen, on_detector, saturation, corrections)
    good = on_detector & ~standing_out(mean, on_detector)
    history = f"mean of {mean.used} of {len(asked)} frames, not aligned"
    first = Reference(mean.image, good & mean.observed, history=history, **(options | {"frame_mask": good}))
    # The frames of the mean are moved by fractions of a pixel even if those of the run are not.
    made = iterated_reference(read, chosen, first.replace(subpixel=True), iterations, len(asked))
    bad = np.count_nonzero(on_detector & ~good)
    history = f"{made.history}, without {bad} hot or dead pixels" if bad else made.history
    return made.replace(subpixel=first.options.subpixel, history=history)


def iterated_reference(
    read: Read, indices: Sequence[int], reference: Reference, iterations: int, asked: int
) -> Reference:
    """Register frames, average the aligned frames, and repeat with this mean as the reference until it stops moving.

    No frame is registered with a mean that contains it, since its own noise would keep it where it was: the frames of
    either half are registered with the mean of the other half. ``reference`` is the mean of the unaligned frames,
    smeared by their drift. The result has the noise of the mean, and is valid wherever at least half of the frames
    observed the pixel. ``iterations`` is the largest number of rounds; they end where shifts change by less than a
    tenth of their error. ``asked`` is the number of frames before unusable ones were left out, for the history.
    """
    if iterations == 0 or len(indices) < 2:
        return reference
    usable = _usable(read, indices, reference)
    guide, registered = _best_guide(read, usable, reference)
    if guide is None or len(registered) < 2:
        warnings.warn(
            f"the {asked} frames of the reference cannot be aligned with one another: each holds too little of "
            "a pattern. Their plain mean is used, smeared by their drift; average more frames, or choose others.",
            stacklevel=2,
        )
        return reference
    # Registered frames come first, so that neither half is without them.
    order = [*registered, *(index for index in usable if index not in set(registered))]
    return _rounds(read, [order[0::2], order[1::2]], guide, iterations, asked)


def _usable(read: Read, indices: Sequence[int], reference: Reference) -> list[int]:
    """Return the frames that are neither corrupt nor saturated nor dark."""
    contrast, valid, usable = contrast_of(reference), ValidPixels.of(reference.frame_mask), []
    for index in indices:
        for frame in read([index]):  # none if it cannot be read
            pixels = frame_statistics(frame, valid, reference.options.saturation, reference.corrections)
            if not unusable(pixels, valid.pixels, contrast):
                usable.append(index)
    return usable


def _guide_of(frame: Pixels, reference: Reference) -> Reference:
    """Return a reference with the corrected counts of one recorded frame as image."""
    valid = reference.frame_mask & unsaturated(frame, reference.options.saturation)
    return reference.replace(image=corrected(frame, reference.corrections), mask=valid)


def _best_guide(read: Read, usable: Sequence[int], reference: Reference) -> tuple[Reference | None, list[int]]:
    """Return the first guide, and the frames that can be registered with it.

    The guide is the frame in the middle of the drift, or the mean of all frames. Single frames come first: they are
    neither smeared by drift, nor does a jump leave a second image in them. Frames beyond the window of one guide may
    lie within that of another, which is nearer to the middle of those that were registered.
    """
    best: Reference | None = None
    shifts: dict[int, Image] = {}
    for guide in _guides(read, usable, reference):
        of_guide = _shifts(read, usable, guide) if prepare(guide).template else {}
        if len(of_guide) > len(shifts):
            best, shifts = guide, of_guide
        if len(of_guide) >= _ENOUGH * len(usable):
            break
    if best is None or best is reference:
        return best, list(shifts)
    for _ in range(_RECENTRED):
        best = _guide_of(read([_middle_of_drift(shifts, reference.max_shift)])[0], reference)
        if len(shifts) == len(usable):
            break
        of_middle = _shifts(read, usable, best) if prepare(best).template else {}
        if len(of_middle) <= len(shifts):
            break
        shifts = of_middle
    return best, list(shifts)


def _middle_of_drift(shifts: dict[int, Image], max_shift: int) -> int:
    """Return the frame from which most frames can be reached, then most within the search, then the central one."""
    values = np.array(list(shifts.values()))
    apart = np.abs(values[:, None] - values).max(axis=2)
    reached, inside = ((apart <= reach).sum(axis=1) for reach in (2 * max_shift, max_shift))
    return list(shifts)[int(np.lexsort((apart.sum(axis=1), -inside, -reached))[0])]


def _guides(read: Read, usable: Sequence[int], reference: Reference) -> Iterator[Reference]:
    """Yield the middle, the first and the last frame, then the mean of the unaligned frames."""
    for index in dict.fromkeys(usable[place * (len(usable) - 1) // 2] for place in (1, 0, 2) if usable):
        yield _guide_of(read([index])[0], reference)
    yield reference


def _shifts(read: Read, usable: Sequence[int], guide: Reference) -> dict[int, Image]:
    """Return the shifts of the frames that can be registered with a guide."""
    matches = {index: match_frames(read([index]), guide)[0] for index in usable}
    return {index: np.array([match["dy"], match["dx"]]) for index, match in matches.items() if np.isfinite(match["dy"])}


def _rounds(read: Read, halves: Sequence[Sequence[int]], guide: Reference, iterations: int, asked: int) -> Reference:
    """Register and average the frames of both halves until the shifts no longer change."""
    guides, made, before = [guide, guide], guide, np.zeros(())
    sums: list[_AlignedSum] = []
    for number in range(1, iterations + 1):
        if sums:
            guides = _exchanged([half.mean() for half in sums])
        if any(prepare(one).template is None for one in guides):
            break
        sums = [_sum_aligned(read, half, one, number > 1) for half, one in zip(halves, guides, strict=True)]
        if any(half.used == 0 for half in sums):
            break
        whole = sums[0].plus(sums[1])
        made = whole.mean(f"mean of {whole.used} of {asked} frames, aligned in {number} rounds")
        shifts = np.concatenate([half.shifts - half.shifts.mean(axis=0) for half in sums])
        if shifts.shape == before.shape and np.abs(shifts - before).mean() < _CONVERGED * sums[0].sigma:
            break
        before = shifts
    return made


def _exchanged(means: Sequence[Reference]) -> list[Reference]:
    """Return the guide of each half: the mean of the other half, both at one place."""
    (match,) = match_frames(means[0].image[None], means[1].uncorrected(), masks=means[0].mask)
    shift = np.array([match["dy"], match["dx"]])
    if np.isnan(shift).any():
        return [means[1], means[0]]
    (moved,) = resample_frames(means[0].image[None], shift[None], means[0].mask, interpolation="cubic")
    observed = np.isfinite(moved)
    return [means[1], means[0].replace(image=np.where(observed, moved, 0), mask=observed)]


def _sum_aligned(read: Read, indices: Sequence[int], guide: Reference, with_model: bool) -> "_AlignedSum":
    """Align frames with a guide and sum them; with a model, outliers from it are left out."""
    prepared = prepare(guide)
    assert prepared.template is not None
    model = _model_of(guide, prepared.template) if with_model else None
    total = _AlignedSum(guide, prepared, prepared.template, model, *np.zeros((5, *guide.shape)))
    for first in range(0, len(indices), BATCH):
        for frame in read(indices[first : first + BATCH]):
            total.add(frame)
    return total if with_model or total.used < _LEAST_TRIMMED else total.without_highest()


def _model_of(reference: Reference, template: Template) -> Image:
    """Return image and variance of a reference, (2, y, x); in holes the smoothed image, which rules nothing out."""
    image, mask = reference.image.astype(np.float64), reference.mask
    soft = smooth(image, mask, template.smoothing)
    variance = variance_of(soft, mask, prepare(reference).noise)
    anything = float(np.square(image).max())
    return np.stack([np.where(mask, image, soft), np.where(mask, variance, anything)])


@dataclass(eq=False)
class _AlignedSum:
    """Sum of frames that were aligned with a guide which has a template."""

    guide: Reference
    prepared: PreparedReference
    template: Template
    model: Image | None
    """Image and variance of the guide, (2, y, x); None in the first round, whose guide may be one noisy frame."""
    total: Image
    """Sum of the aligned frames less their offsets (y, x)."""
    gains: Image
    """Sum of the gains of the frames that observed the pixel."""
    counts: Image
    """Number of frames that observed the pixel."""
    highest: Image
    """Largest of the aligned frames less their offsets."""
    gain_of_highest: Image
    """Gain of the frame that it is of."""
    estimates: list[Estimate] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Number of frames in the sum."""
        return len(self.estimates)

    @property
    def shifts(self) -> Image:
        """Their shifts (frame, 2), pixels."""
        return np.array([estimate.shift for estimate in self.estimates])

    @property
    def sigma(self) -> float:
        """Median of their standard errors, pixels."""
        return float(np.median([np.sqrt(np.trace(estimate.covariance) / 2) for estimate in self.estimates]))

    def plus(self, other: "_AlignedSum") -> "_AlignedSum":
        """Return the sum of the frames of both."""
        total, gains, counts = self.total + other.total, self.gains + other.gains, self.counts + other.counts
        return replace(self, total=total, gains=gains, counts=counts, estimates=self.estimates + other.estimates)

    def without_highest(self) -> "_AlignedSum":
        """Return the sum without the highest value of each pixel: without a model, weak hits show in no other way."""
        several = self.counts >= _LEAST_TRIMMED
        total, gains = (
            one - np.where(several, highest, 0)
            for one, highest in ((self.total, self.highest), (self.gains, self.gain_of_highest))
        )
        return replace(self, total=total, gains=gains)

    def add(self, frame: Pixels) -> None:
        """Align a frame and add its pixels that are no outliers; a frame without a shift is left out."""
        (match,) = match_frames(frame[None], self.guide)
        if np.isnan(match["dy"]):
            return
        start = round(float(match["dy"])), round(float(match["dx"]))
        recorded, saturation = native(frame, "a frame", 2), self.guide.options.saturation
        limit = saturation_limit(recorded.dtype, saturation)
        values, surveyed = self.prepared.correct(recorded, self.prepared.frame_pixels, limit)
        below = unsaturated(recorded, saturation)
        fitted = RowRuns.of(self.guide.frame_mask & below) if surveyed.statistics.saturated else surveyed.valid
        estimate = refine(surveyed.single, fitted, start, self.template, self.prepared.score_image)
        if estimate is None:
            return
        filled, kept = self._without_outliers(values, below, estimate)
        (aligned,) = resample_frames(filled[None], estimate.shift[None], kept, interpolation="cubic")
        observed = np.isfinite(aligned)
        above = np.where(observed, aligned - estimate.offset, 0)
        higher = observed & ((above > self.highest) | (self.counts == 0))
        self.highest[higher], self.gain_of_highest[higher] = above[higher], estimate.gain
        self.total += above
        self.gains[observed] += estimate.gain
        self.counts[observed] += 1
        self.estimates.append(estimate)

    def _without_outliers(self, frame: Pixels, below: Mask, estimate: Estimate) -> tuple[Pixels, Mask]:
        """Return a frame and its valid pixels, those left out that the model, moved to the frame, cannot explain.

        Small holes hold what the model expects, and count as valid: otherwise each pixel would be a hole of 4×4 in the
        aligned frame. Without a model isolated pixels alone are left out, and holes hold what is around them.
        """
        mask = self.guide.frame_mask & below
        if self.model is None:
            image = np.asarray(frame, dtype=np.float64)
            return with_small_holes_filled(image, mask & ~isolated_pixels(image, mask, measure_noise(image, mask)))
        everywhere = np.ones(self.guide.shape, np.bool_)
        back = np.stack([-estimate.shift] * 2)
        expected, variance = resample_frames(self.model, back, everywhere, interpolation="cubic")
        expected = estimate.gain * (expected - self.template.level) + estimate.offset
        count = self.template.grain * estimate.variance / estimate.gain
        scatter = (estimate.variance + estimate.gain**2) * np.maximum(variance, 0)
        limit = residual_limit(scatter, count, _OUTLIER) + _MODEL_ERROR * np.abs(expected)
        kept = mask & ~(np.abs(frame - expected) > limit)
        small = small_holes(kept) & np.isfinite(expected)
        return np.where(small, expected, frame), kept | small

    def mean(self, history: str | None = None) -> Reference:
        """Return the mean as a reference, with its noise (45, 46)."""
        observed = self.counts >= max(1.0, self.used / 2)
        image = np.divide(self.total, self.gains, out=np.zeros_like(self.total), where=observed & (self.gains > 0))
        variances = [one.variance for one in self.estimates if one.variance > _LEAST_VARIANCE * one.gain**2] or [1.0]
        ratio = self.used * float(np.mean(variances)) / sum(one.gain for one in self.estimates) ** 2
        return self.guide.replace(
            image=np.where(observed, image + self.template.level, 0).astype(np.float32),
            mask=observed,
            noise=self.prepared.noise.of_mean(ratio),
            history=self.guide.history if history is None else history,
        )
