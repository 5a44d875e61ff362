"""The image of a reference: one frame, the mean of those that are usable, or the mean of what was laid on it again."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.checks import as_mask, native, real
from stillframe.match import judge, match_frames
from stillframe.ncc import Image, Mask
from stillframe.reference import Reference, saturation_limit
from stillframe.refine import Estimate, Noise, count_limit, refine, smooth, variance_of
from stillframe.resample import resample_frames
from stillframe.search import statistics

Read = Callable[[Sequence[int]], npt.NDArray[Any]]
"""Gives the frames (frame, y, x) of some indices; those that cannot be read may be left out."""

_AT_ONCE = 16
"""Frames that are held at a time."""
_FEWEST_TO_HALVE = 8
"""Fewer frames make no two means worth registering with."""
_SURELY_OUT = 5.0
"""Deviations beyond which a pixel does not enter the mean."""
_MISMATCH = 0.1
"""Part of the intensity by which the model may be wrong."""


def chosen_frames(use: int | slice, count: int) -> range:
    """Return the frames that are asked for.

    Raises
    ------
    ValueError
        There are fewer.

    Examples
    --------
    >>> chosen_frames(slice(2, 6), 10), chosen_frames(-1, 10)
    (range(2, 6), range(9, 10))
    """
    if not isinstance(use, slice):
        index = operator.index(use)
        if not -count <= index < count:
            raise ValueError(f"frame {index} was asked for as reference, but there are {count}. Choose one of them.")
        return range(index % count, index % count + 1)
    chosen = range(count)[use]
    if max(abs(edge) for edge in (use.start or 0, use.stop or 0)) > count or not chosen:
        asked = ":".join("" if edge is None else str(edge) for edge in (use.start, use.stop))
        raise ValueError(
            f"frames {asked} were asked for as reference, but there are {count} frames, which gives {len(chosen)} of "
            "them. Ask for frames that are there."
        )
    return chosen


def frames_of_kind(kind: str | None, kinds: npt.NDArray[Any] | None, count: int) -> Sequence[int]:
    """Return the indices of all frames, or of those whose kind has this name.

    Raises
    ------
    ValueError
        The store does not name kinds, or not this one.
    """
    if kind is None:
        return range(count)
    found = [] if kinds is None else [index for index, name in enumerate(kinds) if str(name) == kind]
    if not found:
        known = "no kinds" if kinds is None else ", ".join(sorted({str(name) for name in kinds}))
        raise ValueError(f"frames of the kind {kind!r} were asked for as reference, but the store names {known}.")
    return found


def build_reference(
    read: Read, indices: Sequence[int], mask: Mask, *, use: int | slice, iterations: int, **options: Any
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
    use : int or slice
        Which of the indices.
    iterations : int
        Rounds of :func:`iterated_reference`.
    **options
        Fields of :class:`~stillframe.Reference`.
    """
    chosen = [indices[place] for place in chosen_frames(use, len(indices))]
    if not isinstance(use, slice):
        image = _one_frame(read, chosen)
    else:
        image = _mean_image(read, chosen, mask, options.get("saturation"))
    first = Reference(image, mask, **options)
    # The mean is laid by fractions of a pixel even where the frames of the run are not.
    made = iterated_reference(read, chosen, replace(first, subpixel=True), iterations)
    return replace(made, subpixel=first.subpixel)


def _one_frame(read: Read, chosen: Sequence[int]) -> npt.NDArray[Any]:
    frames = read(chosen)
    if not len(frames):
        raise ValueError(f"frame {chosen[0]} was asked for as reference but cannot be read. Choose another one.")
    return np.asarray(frames[0])


def _mean_image(read: Read, chosen: Sequence[int], mask: Mask, saturation: float | None) -> npt.NDArray[Any]:
    """Mean of the usable ones."""
    total, used = np.zeros(()), 0
    for first in range(0, len(chosen), _AT_ONCE):
        frames = read(chosen[first : first + _AT_ONCE])
        good = frames[usable_frames(frames, mask, saturation=saturation)]
        total, used = total + good.sum(axis=0, dtype=np.float64), used + len(good)
    if not used:
        raise ValueError(
            f"of the {len(chosen)} frames asked for as reference none is usable: all are dark, constant, saturated, "
            "hold NaN or cannot be read. Choose others."
        )
    return np.asarray(total / used, dtype=np.float32)


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
    halves = [indices[0::2], indices[1::2]]
    if iterations == 0 or len(indices) < _FEWEST_TO_HALVE:
        return reference
    means = (_mean_image(read, half, reference.frame_mask, reference.saturation) for half in halves)
    guides = _guides([replace(reference, image=image) for image in means])
    before: Image | None = None
    for _ in range(iterations):
        if any(guide.template is None for guide in guides):
            return reference
        piles = [_pile_up(read, half, guide, before is not None) for half, guide in zip(halves, guides, strict=True)]
        if any(pile.used == 0 for pile in piles):
            return reference
        reference = _joined(piles).mean()
        guides = _guides([pile.mean() for pile in piles])
        shifts = np.concatenate([pile.shifts - pile.shifts.mean(axis=0) for pile in piles])
        if (
            before is not None
            and shifts.shape == before.shape
            and np.abs(shifts - before).mean() < 0.1 * piles[0].sigma
        ):
            break
        before = shifts
    return reference


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
    for first in range(0, len(indices), _AT_ONCE):
        for frame in read(indices[first : first + _AT_ONCE]):
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
        estimate = refine(values, self.reference.frame_mask, start, self.reference.template)
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
        if self.model is None or self.reference.template is None:
            return self.reference.frame_mask
        everywhere = np.ones(self.reference.shape, np.bool_)
        back = np.stack([-estimate.shift] * 2)
        expected, variance = resample_frames(self.model, back, everywhere, interpolation="cubic")
        expected = estimate.gain * (expected - self.reference.template.level) + estimate.offset
        count = self.reference.template.grain * estimate.variance / estimate.gain
        scatter = (estimate.variance + estimate.gain**2) * np.maximum(variance, 0)
        limit = count_limit(scatter, count, _SURELY_OUT) + _MISMATCH * np.abs(expected)
        return np.asarray(self.reference.frame_mask & ~(np.abs(frame - expected) > limit))

    def mean(self) -> Reference:
        """Return the mean as a reference, with its noise."""
        seen = self.counts >= max(1.0, self.used / 2)
        image = np.divide(self.total, self.gains, out=np.zeros_like(self.total), where=seen & (self.gains > 0))
        part = sum(one.variance for one in self.estimates) / sum(one.gain for one in self.estimates) ** 2
        level = self.reference.template.level if self.reference.template else 0.0
        image = np.where(seen, image + level, 0)
        gain, pedestal = self.reference.known_noise
        noise = Noise(gain * part, pedestal) if gain > 0 else Noise(0.0, pedestal * part)
        return replace(self.reference, image=image.astype(np.float32), mask=seen, noise=noise)


def usable_frames(
    array: npt.ArrayLike, mask: npt.ArrayLike | None, *, saturation: float | None = None
) -> npt.NDArray[np.bool_]:
    """Return which frames of a stack may enter an average: neither dark, nor corrupt, nor saturated.

    Dark is told against the upper quartile of the contrasts of those that are neither corrupt nor saturated.
    """
    frames = real(array, "the stack of frames", 3)
    valid = as_mask(mask, (frames.shape[1], frames.shape[2]))
    limit = saturation_limit(frames.dtype, saturation)
    seen = [statistics(native(frame, "a frame", 2), valid, limit) for frame in frames]
    count = int(np.count_nonzero(valid))
    contrasts = [one.deviation for one in seen if not judge(one, count, 0.0)]
    usual = float(np.percentile(contrasts, 75)) if contrasts else 0.0
    return np.array([not judge(one, count, usual) for one in seen], dtype=np.bool_)
