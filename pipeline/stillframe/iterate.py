"""The image of a reference: one frame, a mean, or the mean of frames that were laid on one another again and again."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.average import AT_ONCE, Read, chosen_frames, mean_image, one_frame
from stillframe.checks import native
from stillframe.hits import find_hits
from stillframe.match import judge, match_frames
from stillframe.ncc import Image, Mask
from stillframe.noise import Noise, count_limit, measure_noise, smooth, variance_of
from stillframe.reference import Reference, saturation_limit
from stillframe.refine import Estimate, refine
from stillframe.resample import resample_frames
from stillframe.survey import statistics

_STILL = 0.1
"""Shifts that change by less than this part of their error have arrived."""
_ENOUGH = 0.8
"""Part of the usable frames that must lie on a first reference for no other to be tried."""
_SURELY_OUT = 5.0
"""Deviations beyond which a pixel does not enter the mean."""
_MISMATCH = 0.1
"""Part of the intensity by which the model may be wrong."""


def build_reference(
    read: Read, indices: Sequence[int], mask: Mask, *, use: int | slice | None, iterations: int, **options: Any
) -> Reference:
    """Return the reference of some frames: one, a mean, or a mean that was registered again and again.

    Parameters
    ----------
    read : callable
        Gives the frames of some indices.
    indices : sequence of int
        Frames to choose from.
    mask : ndarray of bool, shape (y, x)
        True = valid.
    use : int, slice or None
        Which of the indices; by default the first 16, or as many as there are.
    iterations : int
        Rounds of :func:`iterated_reference`.
    **options
        Fields of :class:`~stillframe.Reference`.
    """
    chosen = [indices[place] for place in chosen_frames(use, len(indices))]
    if use is not None and not isinstance(use, slice):
        return Reference(one_frame(read, chosen), mask, history=f"frame {chosen[0]}", **options)
    if len(chosen) == 2 and iterations:
        # Two frames laid on each other share too much of their noise to tell how much it is.
        chosen = chosen[:1]
    image, used = mean_image(read, chosen, mask, options.get("saturation"))
    first = Reference(image, mask, history=f"mean of {used} of {len(chosen)} frames as they are", **options)
    # The mean is laid by fractions of a pixel even where the frames of the run are not.
    made = iterated_reference(read, chosen, replace(first, subpixel=True), iterations)
    return replace(made, subpixel=first.subpixel)


def iterated_reference(read: Read, indices: Sequence[int], reference: Reference, iterations: int) -> Reference:
    """Register frames, average them where the reference is, and repeat until the reference stops moving.

    No frame is registered with a mean that holds it, since its own noise would keep it where it was: the frames of
    either half are laid on the mean of the other.

    Parameters
    ----------
    read : callable
        Gives the frames of some indices.
    indices : sequence of int
        Frames to use; those without a shift never enter.
    reference : Reference
        To begin with: the mean of the frames as they are, smeared by their drift.
    iterations : int
        At most so many rounds; fewer where the shifts no longer change by a tenth of their error.

    Returns
    -------
    Reference
        With the noise of the mean; valid wherever half of the frames saw something.
    """
    if iterations == 0 or len(indices) < 2:
        return reference
    usable = [index for index in indices if _is_usable(read, index, reference)]
    guide, found = _best_start(read, usable, reference)
    if guide is None or len(found) < 2:
        warnings.warn(
            f"the {len(indices)} frames of the reference cannot be laid on one another: each holds too little of a "
            "pattern. Their plain mean is used, smeared by their drift; average more frames, or choose others.",
            stacklevel=2,
        )
        return reference
    # Frames of either half: those that were found first, so that neither half is empty of them.
    order = [*found, *(index for index in usable if index not in set(found))]
    return _rounds(read, [order[0::2], order[1::2]], guide, iterations, len(indices))


def _is_usable(read: Read, index: int, reference: Reference) -> bool:
    frames = read([index])
    if not len(frames):
        return False
    frame, mask = native(frames[0], "a frame", 2), reference.frame_mask
    seen = statistics(frame, mask, saturation_limit(frame.dtype, reference.saturation))
    return not judge(seen, int(np.count_nonzero(mask)), reference.contrast)


def _best_start(read: Read, usable: Sequence[int], reference: Reference) -> tuple[Reference | None, list[int]]:
    """Return a frame in the midst of those that can be laid on one another, or their mean, and which these are.

    Single frames come first: no drift smears them, and no jump leaves a second picture in them.
    """
    best: tuple[Reference | None, dict[int, Image]] = (None, {})
    for guide in _starts(read, usable, reference):
        found = _found(read, usable, guide) if guide.template else {}
        if len(found) > len(best[1]):
            best = guide, found
        if len(found) >= _ENOUGH * len(usable):
            break
    best_guide, found = best
    if best_guide is None or best_guide is reference:
        return best_guide, list(found)
    return replace(reference, image=read([_midmost(found)])[0]), list(found)


def _found(read: Read, usable: Sequence[int], guide: Reference) -> dict[int, Image]:
    """Return the frames that can be laid on the guide, with their shifts."""
    matches = {index: match_frames(read([index]), guide)[0] for index in usable}
    return {index: np.array([match["dy"], match["dx"]]) for index, match in matches.items() if np.isfinite(match["dy"])}


def _midmost(found: dict[int, Image]) -> int:
    """Return the frame whose shift is nearest to the median of all."""
    shifts = np.array(list(found.values()))
    distance = np.abs(shifts - np.median(shifts, axis=0)).sum(axis=1)
    return list(found)[int(np.argmin(distance))]


def _starts(read: Read, usable: Sequence[int], reference: Reference) -> Iterator[Reference]:
    """Yield a few of the frames, then their mean as they are."""
    for index in dict.fromkeys(usable[place * (len(usable) - 1) // 2] for place in (1, 0, 2) if usable):
        yield replace(reference, image=read([index])[0])
    yield reference


def _rounds(read: Read, halves: Sequence[Sequence[int]], guide: Reference, iterations: int, asked: int) -> Reference:
    """Register and average until nothing moves."""
    guides, made, before = [guide, guide], guide, np.zeros(())
    for number in range(1, iterations + 1):
        if any(one.template is None for one in guides):
            break
        piles = [_pile_up(read, half, one, number > 1) for half, one in zip(halves, guides, strict=True)]
        if any(pile.used == 0 for pile in piles):
            break
        whole = _joined(piles)
        made = replace(
            whole.mean(), history=f"mean of {whole.used} of {asked} frames, laid on one another in {number} rounds"
        )
        guides = _guides([pile.mean() for pile in piles])
        shifts = np.concatenate([pile.shifts - pile.shifts.mean(axis=0) for pile in piles])
        if shifts.shape == before.shape and np.abs(shifts - before).mean() < _STILL * piles[0].sigma:
            break
        before = shifts
    return made


def _guides(means: Sequence[Reference]) -> list[Reference]:
    """Return what each half is laid on: the mean of the other half, both at the same place."""
    (match,) = match_frames(means[0].image[None], means[1], masks=means[0].mask)
    shift = np.array([match["dy"], match["dx"]])
    if np.isnan(shift).any():
        return [means[1], means[0]]
    (moved,) = resample_frames(means[0].image[None], shift[None], means[0].mask, interpolation="cubic")
    seen = np.isfinite(moved)
    return [means[1], replace(means[0], image=np.where(seen, moved, 0), mask=seen)]


def _pile_up(read: Read, indices: Sequence[int], guide: Reference, trusted: bool) -> "_Pile":
    pile = _Pile.on(guide, trusted=trusted)
    for first in range(0, len(indices), AT_ONCE):
        for frame in read(indices[first : first + AT_ONCE]):
            pile.add(frame)
    return pile


def _joined(piles: Sequence["_Pile"]) -> "_Pile":
    """Lay piles upon one another."""
    return replace(
        piles[0],
        total=np.sum([pile.total for pile in piles], axis=0),
        gains=np.sum([pile.gains for pile in piles], axis=0),
        counts=np.sum([pile.counts for pile in piles], axis=0),
        estimates=[estimate for pile in piles for estimate in pile.estimates],
    )


def _model_of(reference: Reference) -> Image | None:
    """Image and variance of a reference, without holes, (2, y, x)."""
    if reference.template is None:
        return None
    image = reference.image.astype(np.float64)
    soft = smooth(image, reference.mask, reference.template.smoothing)
    variance = variance_of(soft, reference.mask, reference.known_noise)
    return np.stack([np.where(reference.mask, image, soft), variance])


@dataclass(eq=False)
class _Pile:
    """Frames laid on a reference, summed."""

    reference: Reference
    model: Image | None
    total: Image
    gains: Image
    counts: Image
    estimates: list[Estimate] = field(default_factory=list)

    @classmethod
    def on(cls, reference: Reference, *, trusted: bool) -> "_Pile":
        """Begin an empty pile; only a trusted reference tells which pixels are no noise."""
        total, gains, counts = (np.zeros(reference.shape) for _ in range(3))
        return cls(reference, _model_of(reference) if trusted else None, total, gains, counts)

    @property
    def used(self) -> int:
        """How many frames lie on it."""
        return len(self.estimates)

    @property
    def shifts(self) -> Image:
        """Their shifts (frame, 2)."""
        return np.array([estimate.shift for estimate in self.estimates])

    @property
    def sigma(self) -> float:
        """Their usual error, pixels."""
        return float(np.median([np.sqrt(np.trace(estimate.covariance) / 2) for estimate in self.estimates]))

    def add(self, frame: npt.NDArray[Any]) -> None:
        """Register a frame and add it, without pixels that no noise explains; one without a shift is left out."""
        (match,) = match_frames(frame[None], self.reference)
        if np.isnan(match["dy"]) or self.reference.template is None:
            return
        start = round(float(match["dy"])), round(float(match["dx"]))
        values = native(frame, "a frame", 2)
        known = self.reference.survey(values)
        estimate = refine(known.single, known.valid, start, self.reference.template, self.reference.steps)
        if estimate is None:
            return
        explained = self._explained(values, estimate)
        (laid,) = resample_frames(values[None], estimate.shift[None], explained, interpolation="cubic")
        seen = np.isfinite(laid)
        self.total[seen] += laid[seen] - estimate.offset
        self.gains[seen] += estimate.gain
        self.counts[seen] += 1
        self.estimates.append(estimate)

    def _explained(self, frame: npt.NDArray[Any], estimate: Estimate) -> Mask:
        """Valid pixels of the frame that the reference, moved to it, can have given."""
        mask = self.reference.frame_mask
        if self.model is None or self.reference.template is None:
            image = frame.astype(np.float64)
            return np.asarray(mask & ~find_hits(image, mask, measure_noise(image, mask)))
        everywhere = np.ones(self.reference.shape, np.bool_)
        back = np.stack([-estimate.shift] * 2)
        expected, variance = resample_frames(self.model, back, everywhere, interpolation="cubic")
        expected = estimate.gain * (expected - self.reference.template.level) + estimate.offset
        count = self.reference.template.grain * self.reference.template.scale * estimate.variance / estimate.gain
        scatter = (estimate.variance + estimate.gain**2) * np.maximum(variance, 0)
        limit = count_limit(scatter, count, _SURELY_OUT) + _MISMATCH * np.abs(expected)
        return np.asarray(mask & ~(np.abs(frame - expected) > limit))

    def mean(self) -> Reference:
        """Return the mean as a reference, with its noise."""
        seen = self.counts >= max(1.0, self.used / 2)
        image = np.divide(self.total, self.gains, out=np.zeros_like(self.total), where=seen & (self.gains > 0))
        # A frame that was laid on itself shows no noise.
        variances = [one.variance for one in self.estimates if one.variance > 1e-3 * one.gain**2] or [1.0]
        part = self.used * float(np.mean(variances)) / sum(one.gain for one in self.estimates) ** 2
        level = self.reference.template.level if self.reference.template else 0.0
        image = np.where(seen, image + level, 0)
        gain, pedestal = self.reference.known_noise
        noise = Noise(gain * part, pedestal) if gain > 0 else Noise(0.0, pedestal * part)
        return replace(self.reference, image=image.astype(np.float32), mask=seen, noise=noise)
