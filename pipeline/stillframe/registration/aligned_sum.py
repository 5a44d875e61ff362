"""The sum of frames that were aligned with a guide. Their mean becomes the image of a reference.

Pixels that the guide cannot explain do not enter; small holes that they leave, and those of the mask, hold what the
guide expects there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stillframe.images.arrays import Image, Mask, Pixels, native, saturation_limit
from stillframe.images.hot_pixels import isolated_pixels, small_holes, with_small_holes_filled
from stillframe.images.noise import measure_noise, residual_limit, smooth, variance_of
from stillframe.images.resample import resample_frames
from stillframe.images.run_lengths import RowRuns
from stillframe.registration.detector_map import DetectorMap
from stillframe.registration.detector_sums import DetectorSums
from stillframe.registration.estimate import Estimate
from stillframe.registration.match import match_with_guide
from stillframe.registration.prepared_reference import PreparedReference, prepare
from stillframe.registration.reference import Reference
from stillframe.registration.reference_frames import BATCH, Read, unsaturated
from stillframe.registration.refine import refine
from stillframe.registration.templates import Template

_OUTLIER = 5.0
"""Residuals beyond this many standard deviations, corrected for the skewness of counts, do not enter the mean."""
_MODEL_ERROR = 0.1
"""Error of the model that is tolerated besides, as a fraction of the intensity."""
_UNKNOWN = 1e8
"""Variance of a model's pixels where it has a hole, in units of the largest other one."""
_LEAST_TRIMMED, _LEAST_KEPT = 4, 0.3
"""In the first round, the highest value of each pixel is left out if at least so many frames observed it, unless less
than this fraction of all counts would be left."""
_HIT = 3.0
"""It is left out then if it exceeds the others by so many standard deviations, corrected for the skewness of counts."""
_LEAST_GAIN = 1e-6
"""Pixels whose sum of gains is a smaller fraction of the largest one are not known."""
_LEAST_VARIANCE = 1e-3
"""A frame whose variance is a smaller fraction of the reference's was aligned with itself."""


@dataclass(eq=False)
class AlignedSum:
    """Sum of frames that were aligned with a guide which has a template."""

    guide: Reference
    prepared: PreparedReference
    template: Template
    model: Image | None
    """Image and variance of the guide, (2, y, x); None in the first round, whose guide may be one noisy frame."""
    detector: DetectorSums | None
    """Sums over the frames where they were recorded, of both halves; None without a model."""
    corrected_by: DetectorMap | None
    """Map with which the guide corrects frames; of those sums, Σ r′, Σ r″ and lines are without it."""
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
    numbers: list[int] = field(default_factory=list)
    """For each estimate, the place of its frame among those that were added, from 1."""
    added: int = 0
    """Number of frames that were added, also those without a shift."""

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

    def plus(self, other: "AlignedSum") -> "AlignedSum":
        """Return the sum of the frames of both."""
        return replace(
            self,
            total=self.total + other.total,
            gains=self.gains + other.gains,
            counts=self.counts + other.counts,
            estimates=self.estimates + other.estimates,
            numbers=[*self.numbers, *(self.added + number for number in other.numbers)],
            added=self.added + other.added,
        )

    def without_hits(self) -> "AlignedSum":
        """Return the sum without the highest value of each pixel: without a model, weak hits show in no other way.

        In frames with very few counts that would remove most of them. Then a highest value is removed only if it is
        much larger than the other frames let expect. With more counts the mean is raised to the one without such values
        alone: a background of few counts would be lost otherwise, and noise would be misjudged.
        """
        several = self.counts >= _LEAST_TRIMMED
        others = self._without_highest(several)
        observed, level = others._is_known, self.template.level
        mean = others._mean_image(observed)
        soft = smooth(mean, observed, self.template.smoothing)
        noise = self.prepared.noise.of_mean(float(np.mean([one.variance for one in self.estimates])))
        limit = residual_limit(variance_of(soft + level, observed, noise), max(noise.gain, 0.0), _HIT)
        above = self.highest - self.gain_of_highest * np.maximum(soft, mean)
        without_large = self._without_highest(several & (above > limit))
        if others._counts_above_pedestal < _LEAST_KEPT * self._counts_above_pedestal:
            return without_large
        lost = float((without_large._mean_image(observed) - mean)[observed].mean())
        return replace(others, total=others.total + np.where(several, lost * others.gains, 0))

    def _mean_image(self, observed: Mask) -> Image:
        """Return the mean (y, x) less the level of the template; 0 where nothing was observed."""
        return np.divide(self.total, self.gains, out=np.zeros_like(self.total), where=observed)

    @property
    def _is_known(self) -> Mask:
        """True where the sum of gains is not negligible (y, x)."""
        return np.asarray(self.gains > _LEAST_GAIN * self.gains.max())

    @property
    def _counts_above_pedestal(self) -> float:
        return float(self.total.sum() + self.gains.sum() * (self.template.level - self.prepared.noise.pedestal))

    def _without_highest(self, places: Mask) -> "AlignedSum":
        total, gains = (
            one - np.where(places, highest, 0)
            for one, highest in ((self.total, self.highest), (self.gains, self.gain_of_highest))
        )
        return replace(self, total=total, gains=gains)

    def add(self, frame: Pixels) -> None:
        """Align a frame and add its pixels that are no outliers; a frame without a shift is left out."""
        self.added += 1
        (match,) = match_with_guide(frame[None], self.guide)
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
        if self.model is None:  # else these stay untouched, and take no memory
            higher = observed & ((above > self.highest) | (self.counts == 0))
            self.highest[higher], self.gain_of_highest[higher] = above[higher], estimate.gain
        self.total += above
        self.gains[observed] += estimate.gain
        self.counts[observed] += 1
        self.estimates.append(estimate)
        self.numbers.append(self.added)

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
        moved, variance = resample_frames(self.model, back, everywhere, interpolation="cubic")
        inside = np.isfinite(moved)  # elsewhere the frame shows what lies beyond the border of the model
        expected = np.where(inside, estimate.gain * (moved - self.template.level), 0) + estimate.offset
        count = self.template.grain * estimate.variance / estimate.gain
        of_reference = estimate.gain**2 / (estimate.variance + estimate.gain**2)
        scatter = (estimate.variance + estimate.gain**2) * np.abs(variance)
        modelled = inside & (np.abs(variance) < self.model[1].max() / _UNKNOWN**0.5)
        explained = residual_limit(scatter, count, _OUTLIER) + _MODEL_ERROR * np.abs(expected)
        limit = np.where(modelled, explained, estimate.gain * np.ptp(self.model[0]))
        residual = frame - expected
        kept = mask & ~(np.abs(residual) > limit)
        small = small_holes(kept) & inside
        hits = mask & ~kept & small
        assert self.detector is not None
        judged = mask & modelled & ~hits
        self.detector.add(residual, expected, scatter, of_reference, judged, *self._removed_from(frame))
        return np.where(small, expected, frame), kept | small

    def _removed_from(self, frame: Pixels) -> tuple[Image, Pixels | float]:
        """Return what the map took from a corrected frame, and the response of pixels that was given besides."""
        corrections, fixed = self.guide.corrections, self.corrected_by
        whole = 1.0 if corrections is None or corrections.gain is None else corrections.gain
        if fixed is None:
            return np.zeros(frame.shape), whole
        response = whole / fixed.gain
        return fixed.removed_from(frame, response), response

    def mean(self, history: str | None = None) -> Reference:
        """Return the mean as a reference, with its noise (45, 46)."""
        observed = (self.counts >= max(1.0, self.used / 2)) & self._is_known
        image = self._mean_image(observed)
        variances = [one.variance for one in self.estimates if one.variance > _LEAST_VARIANCE * one.gain**2] or [1.0]
        ratio = self.used * float(np.mean(variances)) / sum(one.gain for one in self.estimates) ** 2
        return self.guide.replace(
            image=np.where(observed, image + self.template.level, 0).astype(np.float32),
            mask=observed,
            noise=self.prepared.noise.of_mean(ratio),
            history=self.guide.history if history is None else history,
        )


def sum_aligned(
    read: Read,
    indices: Sequence[int],
    guide: Reference,
    detector: DetectorSums | None = None,
    corrected_by: DetectorMap | None = None,
) -> AlignedSum:
    """Align frames with a guide and sum them.

    If ``detector`` is given, the frames are added to it, and pixels that the guide cannot explain are left out.
    ``corrected_by`` is the map with which the guide corrects frames.
    """
    prepared = prepare(guide)
    assert prepared.template is not None
    model = None if detector is None else _model_of(guide, prepared.template)
    total = AlignedSum(guide, prepared, prepared.template, model, detector, corrected_by, *np.zeros((5, *guide.shape)))
    for first in range(0, len(indices), BATCH):
        for frame in read(indices[first : first + BATCH]):
            total.add(frame)
    return total if model is not None or total.used < _LEAST_TRIMMED else total.without_hits()


def _model_of(reference: Reference, template: Template) -> Image:
    """Return a reference's image and variance, (2, y, x); holes hold the smoothed image and a far larger variance."""
    image, mask = reference.image.astype(np.float64), reference.mask
    soft = smooth(image, mask, template.smoothing)
    variance = variance_of(soft, mask, prepare(reference).noise)
    return np.stack([np.where(mask, image, soft), np.where(mask, variance, _UNKNOWN * variance.max())])
