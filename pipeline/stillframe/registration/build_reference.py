"""The image of a reference: one frame, a mean of frames, or a mean of frames that were repeatedly aligned.

The story of :func:`iterated_reference`: sort out unusable frames, choose a first guide with which most others can be
registered (:mod:`~.first_guide`), then in each round register the frames of either half with the mean of the other half
and average them where the reference is, until the shifts no longer change (:mod:`~.rounds`). If smooth scatter draws
the shifts, go on with templates that do not respond to it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stillframe.images.arrays import Image, Mask
from stillframe.images.hot_pixels import NORMAL_MEDIAN
from stillframe.images.noise import texture_of
from stillframe.images.run_lengths import ValidPixels
from stillframe.registration.acceptance import unusable
from stillframe.registration.detector_map import DetectorMap, Spread, sharp_structure
from stillframe.registration.first_guide import ENOUGH, best_guide
from stillframe.registration.frame_choice import spread_frames, usable_among
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
from stillframe.registration.rounds import (
    LEAST_DRIFT,
    Round,
    reference_with_map,
    rounds_until_still,
    with_maps,
    without_scatter,
)
from stillframe.registration.template_draft import Texture
from stillframe.registration.templates import smoothing_against

_FREED = 2.0
"""Frames that a pattern of the detector held must drift by so many times more without it."""
_CERTAIN = 3.0
"""The drift of freed frames must be so many times larger than the error of shifts: noise is no drift."""
_FAR_BRIGHTER, _PASSES = 4.0, 3
"""Pixels may be hot if they exceed their surroundings by this factor. They are looked for so many times, each time
without those that were found before."""
_ABOVE_NOISE = 10.0
"""Hot pixels also exceed the deviation of small features by this factor: noise exceeds a background near 0."""
_FEWEST = 0.9
"""At least this fraction of the pixels must be left: if more stand out, they are the pattern."""
LITTLE_DRIFT = "too small to tell the detector's pattern from the sample's"
"""Phrase in the history of a reference whose frames drifted by less than :data:`~.rounds.LEAST_DRIFT`."""


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
    observed the pixel. ``iterations`` is the largest number of rounds, before more of them undo what scatter or the
    detector's pattern does; they end where shifts change by less than a tenth of their error. ``asked`` is the number
    of frames before unusable ones were left out, for the history. For ``with_map`` see :mod:`~.detector_map`.
    """
    if iterations == 0 or len(indices) < 2:
        return reference
    usable = _usable(read, indices, reference)
    guide, registered = best_guide(read, usable, reference)
    if guide is None or len(registered) < 2:
        raise ValueError(
            f"the {asked} frames of the reference cannot be aligned with one another: each, and their mean, holds too "
            f"little structure along both axes, or they drift by more than max_shift ({reference.max_shift} px). Is "
            "the mask inverted, or do they need a dark and a flat? Average more frames, choose others (use, "
            "--reference), or take their plain mean, smeared by their drift (iterations=0, --reference-iterations 0)."
        )
    aligned = _rounds(read, usable, registered, guide, iterations)
    if aligned is None:
        return guide
    aligned = without_scatter(read, aligned, iterations) or aligned
    if not with_map:
        return aligned.reference(asked)
    found = with_maps(read, aligned, guide)
    used = min(aligned.whole.used, found.whole.used)
    if found.drift < LEAST_DRIFT or used < ENOUGH * len(usable):
        found = _unlocked(read, usable, reference, iterations, found, used) or found
    made = found.reference(asked)
    return made if found.drift >= LEAST_DRIFT else _of_little_drift(made, found.drift, found.whole.used)


def _unlocked(
    read: Read, usable: Sequence[int], reference: Reference, iterations: int, locked: Round, used: int
) -> Round | None:
    """Align frames without what may hold them where they are; None if they do not drift much more then.

    A strong pattern of the detector keeps frames where they are, so that it cannot be told from the sample's. In the
    plain mean it is as in every frame, while a pattern that drifts is smeared. First, bright clusters of pixels are
    left out. If that does not free the frames, small features of the plain mean are subtracted from them, but only
    until the pattern of the detector is found.
    """
    least = LEAST_DRIFT if used < ENOUGH * len(usable) else max(LEAST_DRIFT, _FREED * locked.drift)
    clear = _without_clusters(reference)
    if clear is not None:
        aligned = _guided_rounds(read, usable, clear, iterations)
        found = _freed(read, aligned, clear, least, ENOUGH * len(usable))
        if found is not None:
            return found
    guess, without = _less(reference, sharp_structure(reference.image, reference.frame_mask))
    aligned = _guided_rounds(read, usable, without, iterations, guess)
    return _freed(read, aligned, reference, least, ENOUGH * len(usable))


def _freed(read: Read, aligned: Round | None, given: Reference, least_drift: float, least_used: float) -> Round | None:
    """Go on with maps of the detector; None if the frames drift too little, or too few of them are registered."""
    if aligned is None or aligned.drift < LEAST_DRIFT:
        return None
    found = with_maps(read, aligned, given)
    if found.is_guessed or found.whole.used < least_used:
        return None
    return found if found.drift >= least_drift and found.drift > _CERTAIN * found.whole.sigma else None


def _without_clusters(reference: Reference) -> Reference | None:
    """Return a plain mean without pixels that are far brighter than their surroundings, as clusters of hot pixels are.

    Spots that drift are smeared. Return None if there are no such pixels, or too many.
    """
    mean, mask, valid = reference.image, reference.frame_mask, reference.frame_mask
    for _ in range(_PASSES):
        sharp = sharp_structure(mean, valid)
        deviation = np.median(np.abs(sharp[valid])) / NORMAL_MEDIAN
        limit = np.maximum(_FAR_BRIGHTER * np.maximum(mean - sharp, 0), _ABOVE_NOISE * deviation)
        valid = valid & ~(sharp > limit)
        if not _FEWEST * np.count_nonzero(mask) <= np.count_nonzero(valid):
            return None
    left = reference.mask & valid
    if (valid == mask).all() or not np.ptp(mean[left]) > 0:
        return None
    return reference.replace(mask=left, frame_mask=valid)


def _less(reference: Reference, structure: Image) -> tuple[DetectorMap, Reference]:
    """Return a map that subtracts some structure of a mean, corrected counts (y, x), and the mean of such frames."""
    given = 1.0 if reference.corrections is None or reference.corrections.gain is None else reference.corrections.gain
    guess = DetectorMap.without_pattern(reference.frame_mask)._replace(
        offset=(structure * given).astype(np.float32), spread=Spread(0.0, 1.0), guessed=True
    )
    image = (reference.image - structure).astype(np.float32)
    return guess, reference_with_map(reference, guess, reference).replace(image=image)


def _guided_rounds(
    read: Read, usable: Sequence[int], reference: Reference, iterations: int, guess: DetectorMap | None = None
) -> Round | None:
    """Find a first guide and align frames; None where they cannot be aligned."""
    guide, registered = best_guide(read, usable, reference)
    if guide is None or len(registered) < 2:
        return None
    aligned = _rounds(read, usable, registered, guide, iterations, guess)
    return aligned and (without_scatter(read, aligned, iterations) or aligned)


def _usable(read: Read, indices: Sequence[int], reference: Reference) -> list[int]:
    """Return the frames that are neither corrupt nor saturated nor dark."""
    contrast, valid, usable = contrast_of(reference), ValidPixels.of(reference.frame_mask), []
    for index in indices:
        for frame in read([index]):  # none if it cannot be read
            pixels = frame_statistics(frame, valid, reference.options.saturation, reference.corrections)
            if not unusable(pixels, valid.pixels, contrast):
                usable.append(index)
    return usable


def _rounds(
    read: Read,
    usable: Sequence[int],
    registered: Sequence[int],
    guide: Reference,
    iterations: int,
    corrected_by: DetectorMap | None = None,
) -> Round | None:
    """Register and average the frames of both halves until the shifts no longer change; None without a mean of both."""
    # Registered frames come first, so that neither half is without them.
    order = [*registered, *(index for index in usable if index not in set(registered))]
    return rounds_until_still(read, [order[0::2], order[1::2]], [guide, guide], iterations, corrected_by)


def _of_little_drift(mean: Reference, drift: float, frames: int) -> Reference:
    """Return the mean of frames that have hardly moved, with templates so smooth that a texture hardly pulls."""
    said = mean.replace(history=f"{mean.history}, whose drift along one direction of {drift:.1f} px is {LITTLE_DRIFT}")
    prepared = prepare(mean)
    judged = mean.image.astype(np.float64), prepared.trusted.mask, prepared.noise
    texture = Texture(texture_of(*judged), frames)
    if prepared.template is None or not texture.deviation or mean.against_scatter:
        return said
    width = smoothing_against(texture, *judged)
    if width is None or width <= prepared.template.smoothing:
        return said
    words = f"{said.history}; templates are smoothed by {width:g} px, since pixels differ by {texture.deviation:.1%}"
    return said.replace(smoothing=width, history=words)
