"""The image of a reference: one frame, a mean of frames, or a mean of frames that were repeatedly aligned.

The story of :func:`iterated_reference`: sort out unusable frames, choose a first guide with which most others can be
registered, then in each round register the frames of either half with the mean of the other half and average them
where the reference is, until the shifts no longer change.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from stillframe.images.arrays import Image, Mask, Pixels
from stillframe.images.noise import texture_of
from stillframe.images.resample import resample_frames
from stillframe.images.run_lengths import ValidPixels
from stillframe.registration.acceptance import unusable
from stillframe.registration.aligned_sum import AlignedSum, sum_aligned
from stillframe.registration.detector_map import DetectorMap, DetectorSums, Spread, map_of, sharp_structure
from stillframe.registration.frame_choice import spread_frames, usable_among
from stillframe.registration.match import match_frames
from stillframe.registration.prepared_reference import contrast_of, prepare
from stillframe.registration.reference import Reference, correction_image, corrections_of
from stillframe.registration.reference_frames import (
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
from stillframe.registration.template_draft import Texture
from stillframe.registration.templates import smoothing_against

_CONVERGED = 0.1
"""Rounds end when shifts change by less than this fraction of their error."""
_ENOUGH = 0.8
"""Fraction of the usable frames that must be registered with a first guide for no other to be tried."""
_RECENTRED = 3
"""How often a guide nearer to the middle of the drift is tried."""
_LEAST_DRIFT = 1.0
"""With a smaller rms drift along some direction, pixels, features stay on the same pixels."""
_FREED = 2.0
"""Frames that a pattern of the detector held drift by so many times more without it."""
LITTLE_DRIFT = "too small to tell the detector's pattern from the sample's"
"""Phrase in the history of a reference whose frames drifted by less than :data:`_LEAST_DRIFT`."""
_MAPS = 6
"""How often what does not move with the pattern is looked for."""
_LARGEST_RATIO = 0.8
"""Largest ratio of a step to the one before, of shifts that approach their limit."""


def build_reference(
    read: Read,
    indices: Sequence[int],
    mask: Mask,
    *,
    use: int | slice | None,
    iterations: int,
    detector_map: bool = True,
    **options: Any,
) -> Reference:
    """Return a reference made of some frames: one of them, their mean, or the mean of the aligned frames.

    ``use`` chooses from the indices, by default 16 usable frames that are spread over all, or without rounds, which
    undo the drift between them, 16 neighbours in the middle. ``iterations`` is the number of rounds of
    :func:`iterated_reference`, ``options`` are arguments of :class:`~stillframe.Reference`. Frames are read as
    recorded; the image is in corrected counts. Pixels that are saturated in almost every frame are invalid, and so
    are hot and dead pixels that show in the plain mean. With ``detector_map``, so are those that do not follow the
    pattern as it moves, and gains and offsets of pixels become part of its flat and dark.
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
    made = iterated_reference(read, chosen, first.replace(subpixel=True), iterations, len(asked), with_map=detector_map)
    bad = np.count_nonzero(on_detector & ~made.frame_mask)
    history = f"{made.history}, without {bad} pixels that do not follow the pattern" if bad else made.history
    return made.replace(subpixel=first.options.subpixel, history=history)


def iterated_reference(
    read: Read, indices: Sequence[int], reference: Reference, iterations: int, asked: int, *, with_map: bool
) -> Reference:
    """Register frames, average the aligned frames, and repeat with this mean as the reference until it stops moving.

    No frame is registered with a mean that contains it, since its own noise would keep it where it was: the frames of
    either half are registered with the mean of the other half. ``reference`` is the mean of the unaligned frames,
    smeared by their drift. The result has the noise of the mean, and is valid wherever at least half of the frames
    observed the pixel. ``iterations`` is the largest number of rounds; they end where shifts change by less than a
    tenth of their error. ``asked`` is the number of frames before unusable ones were left out, for the history. For
    ``with_map`` see :mod:`~.detector_map`.
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
    aligned = _rounds(read, usable, registered, guide, iterations)
    if aligned is None:
        return guide
    if not with_map:
        return aligned.reference(asked)
    found = _with_maps(read, aligned, guide)
    used = min(aligned.whole.used, found.whole.used)
    if found.drift < _LEAST_DRIFT or used < _ENOUGH * len(usable):
        found = _unlocked(read, usable, reference, iterations, found, used) or found
    made = found.reference(asked)
    return made if found.drift >= _LEAST_DRIFT else _of_little_drift(made, found.drift, found.whole.used)


def _unlocked(
    read: Read, usable: Sequence[int], reference: Reference, iterations: int, locked: "_Round", used: int
) -> "_Round | None":
    """Align frames less what their plain mean shows in small features; None where they do not drift much more then.

    A strong pattern of the detector keeps frames where they are, so that it cannot be told from the sample's. In the
    plain mean it is as in every frame, while a pattern that drifts is smeared.
    """
    fine = sharp_structure(reference.image, reference.frame_mask)
    given = 1.0 if reference.corrections is None or reference.corrections.gain is None else reference.corrections.gain
    offset = (fine * given).astype(np.float32)
    start = DetectorMap.without_pattern(reference.frame_mask)._replace(offset=offset, spread=Spread(0.0, 1.0))
    without = _with_map(reference, start, reference).replace(image=(reference.image - fine).astype(np.float32))
    guide, registered = _best_guide(read, usable, without)
    if guide is None or len(registered) < 2:
        return None
    aligned = _rounds(read, usable, registered, guide, iterations, start)
    if aligned is None or aligned.drift < _LEAST_DRIFT:
        return None
    found, least = _with_maps(read, aligned, reference), _ENOUGH * len(usable)
    by_a_map = found.fixed is not None and found.fixed.offset is not offset
    freed = found.drift >= max(_LEAST_DRIFT, _FREED * locked.drift) or used < least <= found.whole.used
    return found if by_a_map and freed and found.whole.used >= least else None


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


def _rounds(
    read: Read,
    usable: Sequence[int],
    registered: Sequence[int],
    guide: Reference,
    iterations: int,
    fixed: DetectorMap | None = None,
) -> "_Round | None":
    """Register and average the frames of both halves until the shifts no longer change; None without a mean of both."""
    # Registered frames come first, so that neither half is without them.
    order = [*registered, *(index for index in usable if index not in set(registered))]
    return _rounds_until_still(read, [order[0::2], order[1::2]], [guide, guide], iterations, fixed)


def _with_maps(read: Read, current: "_Round", given: Reference) -> "_Round":
    """Repeat rounds with gains and offsets of pixels, and without pixels that do not follow the pattern.

    They are looked for as long as that changes much. Frames are corrected by what ``given`` corrects, and the map.
    """
    for _ in range(_MAPS):
        found = current.next_map()
        if found is None:
            break
        guides = [_with_map(half, found, given) for half in _exchanged([half.mean() for half in current.halves])]
        better = _one_round(read, current.frames, guides, found)
        if better is None:
            break
        still = found.settled and _are_still(current, better)
        current = better.after(current)
        if still:
            break
    return current


def _of_little_drift(mean: Reference, drift: float, frames: int) -> Reference:
    """Return the mean of frames that have hardly moved, with templates so smooth that a texture hardly pulls."""
    said = mean.replace(history=f"{mean.history}, whose drift along one direction of {drift:.1f} px is {LITTLE_DRIFT}")
    prepared = prepare(mean)
    judged = mean.image.astype(np.float64), prepared.trusted.mask, prepared.noise
    texture = Texture(texture_of(*judged), frames)
    if prepared.template is None or not texture.deviation:
        return said
    width = smoothing_against(texture, *judged)
    if width is None or width <= prepared.template.smoothing:
        return said
    words = f"{said.history}; templates are smoothed by {width:g} px, since pixels differ by {texture.deviation:.1%}"
    return said.replace(smoothing=width, history=words)


def _with_map(guide: Reference, fixed: DetectorMap, given: Reference) -> Reference:
    """Return a guide whose frames are corrected by a map, after the dark and flat that are given."""
    valid = guide.frame_mask & fixed.following
    dark = fixed.offset if given.dark is None else given.dark + fixed.offset
    flat = fixed.gain if given.flat is None else given.flat * fixed.gain
    return guide.replace(
        dark=dark if fixed.spread.offset or fixed.spread.of_lines else given.dark,
        flat=flat if fixed.spread.gain else given.flat,
        frame_mask=valid,
    )


@dataclass(frozen=True, eq=False)
class _Round:
    """What a round gave."""

    frames: Sequence[Sequence[int]]
    """The frames of either half."""
    halves: Sequence[AlignedSum]
    detector: DetectorSums | None
    """Sums over all frames, of a round with a model."""
    fixed: DetectorMap | None
    """Map by which frames were corrected."""
    number: int = 1
    """How many rounds there were."""
    step: Image | None = None
    """Changes of the shifts since the round before, if its map was not taken further."""
    further: float = 0.0
    """How many times that step the limit lies beyond these shifts (61); 0: not known."""

    @cached_property
    def whole(self) -> AlignedSum:
        return self.halves[0].plus(self.halves[1])

    @cached_property
    def mean(self) -> Reference:
        return self.whole.mean()

    @property
    def shifts(self) -> Image:
        """Shifts (frame, 2) less the mean shift of their half, whose guide lies at a place of its own."""
        return np.concatenate([half.shifts - half.shifts.mean(axis=0) for half in self.halves])

    @cached_property
    def drift(self) -> float:
        """Standard deviation of the shifts along the direction of least drift, pixels."""
        # Columns of the detector stay columns while frames move along y.
        along = np.linalg.eigvalsh(np.cov(self.shifts.T, bias=True))
        return float(np.sqrt(max(along[0], 0)))

    @property
    def has_pattern(self) -> bool:
        """Whether gains or offsets of the detector were corrected in the frames of this round."""
        return self.fixed is not None and any(self.fixed.spread)

    def next_map(self) -> DetectorMap | None:
        """Return the map with which frames are to be corrected next; None where nothing stays on the detector."""
        if self.detector is None:
            return None
        found = map_of(self.detector, self.mean.frame_mask)
        if not found.settled:  # leave out the pixels that do not follow before gains and offsets are measured
            return (self.fixed or found)._replace(following=found.following, settled=False)
        if self.drift < _LEAST_DRIFT:  # the pattern itself would be taken for the detector's
            found = DetectorMap.without_pattern(found.following)
        if not any(found.spread):
            return found if self.has_pattern else None
        return found.beyond(self.fixed, self.further) if self.fixed and self.further else found

    def after(self, last: "_Round") -> "_Round":
        """Return this round as the one after another, with what their shifts say about the limit (61)."""
        number = last.number + 1
        if self.shifts.shape != last.shifts.shape or last.further:
            return replace(self, number=number)
        step, before = self.shifts - last.shifts, last.step
        if before is None or before.shape != step.shape:
            return replace(self, number=number, step=step)
        ratio = float(np.clip((step * before).sum() / max((before**2).sum(), 1e-300), 0, _LARGEST_RATIO))
        return replace(self, number=number, step=step, further=ratio / (1 - ratio))

    def reference(self, asked: int) -> Reference:
        """Return the mean, of so many frames that were to be aligned, with its history."""
        history = f"mean of {self.whole.used} of {asked} frames, aligned in {self.number} rounds"
        spread = self.fixed.spread if self.fixed else Spread(0, 0)
        found = {
            f"gains of pixels that differ by {spread.gain:.1%}": spread.gain,
            f"offsets of pixels that differ by {spread.offset:.3g} counts": spread.offset,
            f"offsets of rows and columns that differ by {spread.of_lines:.3g} counts": spread.of_lines,
        }
        return self.mean.replace(history=", with ".join([history, *(words for words, one in found.items() if one)]))


def _rounds_until_still(
    read: Read,
    halves: Sequence[Sequence[int]],
    guides: Sequence[Reference],
    iterations: int,
    fixed: DetectorMap | None,
) -> _Round | None:
    """Repeat rounds until the shifts no longer change; None where not even one gave a mean of both halves."""
    last: _Round | None = None
    for number in range(1, iterations + 1):
        if last:
            guides = _exchanged([half.mean() for half in last.halves])
        current = _one_round(read, halves, guides, fixed, with_model=number > 1)
        if current is None:
            break
        before, last = last, replace(current, number=number)
        if before and _are_still(before, last):
            break
    return last


def _are_still(before: _Round, now: _Round) -> bool:
    """Return whether shifts have hardly changed since the round before."""
    if before.shifts.shape != now.shifts.shape:
        return False
    return bool(np.abs(now.shifts - before.shifts).mean() < _CONVERGED * now.halves[0].sigma)


def _one_round(
    read: Read,
    halves: Sequence[Sequence[int]],
    guides: Sequence[Reference],
    fixed: DetectorMap | None,
    *,
    with_model: bool = True,
) -> _Round | None:
    """Register and average the frames of both halves; None where one of them has no mean then."""
    if any(prepare(one).template is None for one in guides):
        return None
    detector = DetectorSums.empty(guides[0].shape) if with_model else None
    sums = [sum_aligned(read, half, one, detector, fixed) for half, one in zip(halves, guides, strict=True)]
    return _Round(halves, sums, detector, fixed) if all(half.used for half in sums) else None


def _exchanged(means: Sequence[Reference]) -> list[Reference]:
    """Return the guide of each half: the mean of the other half, both at one place."""
    (match,) = match_frames(means[0].image[None], means[1].uncorrected(), masks=means[0].mask)
    shift = np.array([match["dy"], match["dx"]])
    if np.isnan(shift).any():
        return [means[1], means[0]]
    (moved,) = resample_frames(means[0].image[None], shift[None], means[0].mask, interpolation="cubic")
    observed = np.isfinite(moved)
    return [means[1], means[0].replace(image=np.where(observed, moved, 0), mask=observed)]
