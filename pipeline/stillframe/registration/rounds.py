"""Rounds in which frames are aligned and averaged anew, each half of them with the mean of the other half.

First until the shifts no longer change (:func:`rounds_until_still`), then, if smooth scatter draws them, without what
is smooth (:func:`without_scatter`), then with maps of what stays on the detector (:func:`with_maps`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from stillframe.images.arrays import Image
from stillframe.images.resample import resample_frames
from stillframe.registration.aligned_sum import AlignedSum, sum_aligned
from stillframe.registration.detector_map import DetectorMap, Spread, map_of
from stillframe.registration.detector_sums import DetectorSums
from stillframe.registration.first_guide import ENOUGH
from stillframe.registration.match import match_with_guide
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.reference import Reference
from stillframe.registration.reference_frames import Read

_CONVERGED = 0.1
"""Rounds end when shifts change by less than this fraction of their error."""
LEAST_DRIFT = 1.0
"""With a smaller rms drift along some direction, pixels, features stay on the same pixels."""
_MAPS, _MAPS_WITH_OFFSETS = 6, 12
"""How often what does not move with the pattern is looked for; more often where offsets were found."""
_DRAWN, _LEAST_DRAWN = 3.0, 0.001
"""Scatter draws shifts if these are too small by so many standard errors, and by this fraction."""
_MOST_ROUNDS = 12
"""At most so many rounds are made where scatter drew the frames."""
_LARGEST_RATIO = 0.8
"""Largest ratio of a step to the one before, of shifts that approach their limit."""


@dataclass(frozen=True, eq=False)
class Round:
    """What a round gave."""

    frames: Sequence[Sequence[int]]
    """The frames of either half."""
    halves: Sequence[AlignedSum]
    detector: DetectorSums | None
    """Sums over all frames, of a round with a model."""
    corrected_by: DetectorMap | None
    """Map by which frames were corrected."""
    number: int = 1
    """How many rounds there were."""
    step: Image | None = None
    """Changes of the shifts since the round before, if its map was not taken further."""
    to_limit: float = 0.0
    """How many times that step the limit lies beyond these shifts (61); 0: not known."""

    @cached_property
    def whole(self) -> AlignedSum:
        """The sum over the frames of both halves."""
        return self.halves[0].plus(self.halves[1])

    @cached_property
    def mean(self) -> Reference:
        """The mean of the frames of both halves."""
        return self.whole.mean()

    @property
    def shifts(self) -> Image:
        """Shifts (frame, 2) less the mean shift of their half, whose guide lies at a place of its own."""
        return np.concatenate([half.shifts - half.shifts.mean(axis=0) for half in self.halves])

    @property
    def registered(self) -> list[list[int]]:
        """Numbers of the frames of either half that these shifts are of."""
        return [half.numbers for half in self.halves]

    @cached_property
    def drift(self) -> float:
        """Standard deviation of the shifts along the direction of least drift, pixels."""
        # A drift along y alone does not tell offsets of columns from the sample's pattern.
        along = np.linalg.eigvalsh(np.cov(self.shifts.T, bias=True))
        return float(np.sqrt(max(along[0], 0)))

    @property
    def is_guessed(self) -> bool:
        """Whether the frames of this round were corrected by a map that was not measured from the drift."""
        return self.corrected_by is not None and self.corrected_by.guessed

    @property
    def has_offsets(self) -> bool:
        """Whether offsets that the drift showed were corrected in the frames of this round."""
        return self.corrected_by is not None and not self.is_guessed and any(self.corrected_by.spread[1:])

    def next_map(self) -> DetectorMap | None:
        """Return the map with which frames are to be corrected next; None where nothing stays on the detector."""
        if self.detector is None:
            return None
        found = map_of(self.detector, self.mean.frame_mask)
        if not found.settled:  # leave out the pixels that do not follow before gains and offsets are measured
            return (self.corrected_by or found)._replace(following=found.following, settled=False)
        if self.drift < LEAST_DRIFT:  # with so little drift the sample's pattern would be taken for the detector's
            found = DetectorMap.without_pattern(found.following)
        if not any(found.spread):
            return found if self.corrected_by is not None and any(self.corrected_by.spread) else None
        last = self.corrected_by
        if last is None or last.guessed or not last.settled or not self.to_limit:
            return found
        return found.extrapolated(last, self.to_limit)

    def after(self, last: "Round") -> "Round":
        """Return this round as the one after another, with what their shifts say about the limit (61)."""
        number = last.number + 1
        if self.registered != last.registered or last.to_limit:
            return replace(self, number=number)
        step, before = self.shifts - last.shifts, last.step
        if before is None:
            return replace(self, number=number, step=step)
        ratio = float(np.clip((step * before).sum() / max((before**2).sum(), 1e-300), 0, _LARGEST_RATIO))
        return replace(self, number=number, step=step, to_limit=ratio / (1 - ratio))

    def reference(self, asked: int) -> Reference:
        """Return the mean, of so many frames that were to be aligned, with its history."""
        history = f"mean of {self.whole.used} of {asked} frames, aligned in {self.number} rounds"
        spread = self.corrected_by.spread if self.corrected_by else Spread(0, 0)
        found = {
            f"gains of pixels that differ by {spread.gain:.1%}": spread.gain,
            f"offsets of pixels that differ by {spread.offset:.3g} counts": spread.offset,
            f"offsets of rows and columns that differ by {spread.of_lines:.3g} counts": spread.of_lines,
            "templates that smooth scatter does not draw": self.mean.against_scatter,
        }
        return self.mean.replace(history=", with ".join([history, *(words for words, one in found.items() if one)]))


def rounds_until_still(
    read: Read,
    halves: Sequence[Sequence[int]],
    guides: Sequence[Reference],
    iterations: int,
    corrected_by: DetectorMap | None,
) -> Round | None:
    """Repeat rounds until the shifts no longer change, and return the last; None if the first has no two means."""
    last: Round | None = None
    for number in range(1, iterations + 1):
        if last:
            guides = _exchanged([half.mean() for half in last.halves])
        current = _one_round(read, halves, guides, corrected_by, with_model=number > 1)
        if current is None:
            break
        before, last = last, replace(current, number=number)
        if before and _are_still(before, last):
            break
    return last


def without_scatter(read: Read, current: Round, iterations: int) -> Round | None:
    """Repeat rounds with templates that do not respond to smooth scatter.

    Return None if scatter does not draw the shifts, or if too few frames can be registered with such templates.

    Shifts with and without such templates are compared, as by J. A. Hausman, Econometrica 46, 1251 (1978): both are
    right, and those without are more precise, unless scatter draws them (63).
    """
    pulls = [_pull(read, half, frames) for half, frames in zip(current.halves, current.frames, strict=True)]
    product, square, variance = (sum(terms) for terms in zip(*pulls, strict=True))
    if not -product > _DRAWN * np.sqrt(variance) or -product < _LEAST_DRAWN * square:
        return None
    guides = [guide.replace(against_scatter=True) for guide in _exchanged([half.mean() for half in current.halves])]
    most = max(iterations, _MOST_ROUNDS)
    found = rounds_until_still(read, current.frames, guides, most, current.corrected_by)
    if found is None or found.whole.used < ENOUGH * current.whole.used:
        return None
    return found if all(half.template.square for half in found.halves) else None


class _Pull(NamedTuple):
    """Sums over the frames of one half that tell whether scatter draws their shifts s (63); d = s − s′."""

    product: float = 0.0
    """Σ d s, px²; negative if shifts are too small."""
    square: float = 0.0
    """Σ s², px²."""
    variance: float = 0.0
    """Upper bound of the variance of the product, px⁴."""


def _pull(read: Read, half: AlignedSum, frames: Sequence[int]) -> _Pull:
    """Register the frames of one half again, with templates that do not respond to scatter, and compare the shifts."""
    if half.template.square or half.guide.against_scatter:
        return _Pull()
    guide = half.guide.replace(against_scatter=True)
    template = prepare(guide).template
    if template is None or not template.square:
        return _Pull()
    pairs = [
        (shift, match)
        for shift, number in zip(half.shifts, half.numbers, strict=True)
        for frame in read([frames[number - 1]])  # none if it cannot be read
        for match in match_with_guide(frame[None], guide)
        if not match["flag"]
    ]
    if len(pairs) < 2:
        return _Pull()
    precise = np.array([shift for shift, _ in pairs])
    robust = np.array([[match["dy"], match["dx"]] for _, match in pairs], np.float64)
    error = np.array([[match["sigma_y"], match["sigma_x"]] for _, match in pairs], np.float64)
    precise, robust = precise - precise.mean(axis=0), robust - robust.mean(axis=0)
    sums = ((precise - robust) * precise).sum(), (precise**2).sum(), (error**2 * precise**2).sum()
    return _Pull(*map(float, sums))


def _one_round(
    read: Read,
    halves: Sequence[Sequence[int]],
    guides: Sequence[Reference],
    corrected_by: DetectorMap | None,
    *,
    with_model: bool = True,
) -> Round | None:
    """Register and average the frames of both halves; None where one of them has no mean then."""
    if any(prepare(one).template is None for one in guides):
        return None
    detector = DetectorSums.empty(guides[0].shape) if with_model else None
    sums = [sum_aligned(read, half, one, detector, corrected_by) for half, one in zip(halves, guides, strict=True)]
    return Round(halves, sums, detector, corrected_by) if all(half.used for half in sums) else None


def _are_still(before: Round, now: Round) -> bool:
    """Return whether the same frames were registered in both rounds, with almost the same shifts."""
    if before.registered != now.registered:
        return False
    return bool(np.abs(now.shifts - before.shifts).mean() < _CONVERGED * now.halves[0].sigma)


def _exchanged(means: Sequence[Reference]) -> list[Reference]:
    """Return the guide of each half: the mean of the other half, both at one place."""
    (match,) = match_with_guide(means[0].image[None], means[1].uncorrected(), masks=means[0].mask)
    shift = np.array([match["dy"], match["dx"]])
    if np.isnan(shift).any():
        return [means[1], means[0]]
    (moved,) = resample_frames(means[0].image[None], shift[None], means[0].mask, interpolation="cubic")
    observed = np.isfinite(moved)
    return [means[1], means[0].replace(image=np.where(observed, moved, 0), mask=observed)]


def with_maps(read: Read, current: Round, given: Reference) -> Round:
    """Repeat rounds in which frames are corrected by a map of the detector, as long as that changes the shifts.

    The map contains gains and offsets of pixels, and marks those that do not follow the pattern. The dark and flat of
    ``given`` are applied, too.
    """
    for number in range(_MAPS_WITH_OFFSETS):
        if number >= _MAPS and not current.has_offsets:
            break
        found = current.next_map()
        if found is None:
            break
        guides = [
            reference_with_map(half, found, given) for half in _exchanged([half.mean() for half in current.halves])
        ]
        better = _one_round(read, current.frames, guides, found)
        if better is None or better.whole.used < ENOUGH * current.whole.used:
            break
        still = found.settled and _are_still(current, better)
        current = better.after(current)
        if still:
            break
    return current


def reference_with_map(guide: Reference, corrected_by: DetectorMap, given: Reference) -> Reference:
    """Return a guide whose frames are corrected by a map, after the dark and flat that are given."""
    valid = guide.frame_mask & corrected_by.following
    dark = corrected_by.offset if given.dark is None else given.dark + corrected_by.offset
    flat = corrected_by.gain if given.flat is None else given.flat * corrected_by.gain
    return guide.replace(
        dark=dark if corrected_by.spread.offset or corrected_by.spread.of_lines else given.dark,
        flat=flat if corrected_by.spread.gain else given.flat,
        frame_mask=valid,
    )
