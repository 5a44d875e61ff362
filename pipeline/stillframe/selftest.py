"""Test the registration on a user's own pattern: known sub-pixel shifts under the static mask, fresh noise.

The content of the frames, a lightly smoothed reference, is moved by spline interpolation while the detector's
invalid pixels stay; every frame, and the reference they are laid on, gets noise of its own with the gain and pedestal
measured on the real frames. So the truth is known and no noise is shared that real frames would not share. What it
cannot see: a background that is fixed to the detector (here it moves along), noise that neighbouring pixels share, and
a pattern that changes in the course of the run.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import scipy.ndimage

from stillframe.match import match_frames
from stillframe.ncc import Image
from stillframe.noise import Noise, smooth
from stillframe.reference import Reference

_CONTENT_SMOOTHING = 1.0


class Report(pydantic.BaseModel):
    """What came of the test; along (y, x), in pixels where nothing else is said."""

    model_config = pydantic.ConfigDict(frozen=True)

    version: int = 1
    """Version of this format."""
    frames: int
    """Frames that were made."""
    failed: float
    """Part of them without a shift."""
    bias: tuple[float, float]
    """Mean error: the offset that the reference's noise gives to all frames alike."""
    rms: tuple[float, float]
    """Root mean square of the error less its mean."""
    claimed: tuple[float, float]
    """Root mean square of sigma."""
    ratio: tuple[float, float]
    """Real error over claimed sigma; 1 is right."""
    pull: tuple[float, float]
    """Slope of the error against the true shift; −1 would be a lock to zero, 0 is right."""
    locking: tuple[float, float]
    """Slope of the error against the true fraction of a pixel; −1 would be whole pixels, 0 is right."""
    fractions: list[int]
    """How often the found fraction of a pixel, −½…½, fell into each tenth, both axes together."""


@dataclass(frozen=True, eq=False)
class Content:
    """The pattern of the frames without holes, and their noise."""

    image: Image
    noise: Noise
    reference: Reference

    @classmethod
    def of(cls, reference: Reference, frame_noise: Noise) -> "Content":
        """Take the content of a reference; invalid pixels are filled from around them."""
        image = reference.image.astype(np.float64)
        soft = smooth(image, reference.mask, _CONTENT_SMOOTHING)
        filled = np.where(soft == 0, smooth(image, reference.mask, 12.0), soft)
        return cls(filled, frame_noise, reference)

    def frame(self, shift: npt.ArrayLike, rng: np.random.Generator, noise: Noise) -> Image:
        """Return the content moved so that ``shift`` lays it back, with noise."""
        back = -np.asarray(shift, dtype=np.float64)
        return noisy(scipy.ndimage.shift(self.image, back, order=5, mode="nearest"), noise, rng)


def noisy(expected: Image, noise: Noise, rng: np.random.Generator) -> Image:
    """Draw pixels of this expectation and noise: counts where it has a gain."""
    if noise.gain <= 0:
        return rng.normal(expected, np.sqrt(-noise.pedestal))
    counts = rng.poisson(np.maximum(expected - noise.pedestal, 0) / noise.gain)
    return np.asarray(noise.gain * counts + noise.pedestal)


def selftest(
    reference: Reference, frame_noise: Noise, *, frames: int = 100, reach: float = 8.0, seed: int = 0
) -> Report:
    """Register frames made from a reference's content at known shifts.

    Parameters
    ----------
    reference : Reference
        Of the user's own frames, its noise stated or measured.
    frame_noise : Noise
        Of one frame.
    frames : int
        How many to make.
    reach : float
        Shifts are uniform in ± this, pixels; at most the reference's ``max_shift`` less one.
    seed : int
        Everything random follows from it.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Fewer than ten frames, or none could be registered.

    Examples
    --------
    >>> from stillframe.scene import Experiment
    >>> experiment = Experiment(shape=(128, 128), dose=100.0)
    >>> reference = Reference(experiment.render(0), experiment.detector.mask, max_shift=8)
    >>> report = selftest(reference, reference.known_noise, frames=20, reach=4.0)
    >>> report.failed
    0.0
    """
    if frames < 10:
        raise ValueError(f"{frames} frames tell nothing of errors. Ask for ten or more.")
    rng = np.random.default_rng(seed)
    content = Content.of(reference, frame_noise)
    image = content.frame((0.0, 0.0), rng, reference.known_noise)
    fresh = replace(reference, image=image, noise=reference.known_noise)
    limit = max(min(reach, reference.max_shift - 1.0), 0.0)
    shifts = rng.uniform(-limit, limit, (frames, 2))
    own = (content.frame(shift, rng, frame_noise) for shift in shifts)
    matches = np.concatenate([match_frames(frame[None], fresh) for frame in own])
    return _report(matches, shifts)


def _report(matches: npt.NDArray[Any], shifts: Image) -> Report:
    found = np.stack([matches["dy"], matches["dx"]], axis=1)
    good = np.isfinite(found[:, 0])
    if np.count_nonzero(good) < 3:
        raise ValueError("none of the frames could be registered: the content is too weak for its noise. Average more.")
    found, true = found[good], shifts[good]
    sigma = np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)[good]
    error = found - true
    scatter = error - error.mean(axis=0)
    rms, claimed = np.sqrt((scatter**2).mean(axis=0)), np.sqrt((sigma**2).mean(axis=0))
    part = found - np.rint(found)
    return Report(
        frames=len(shifts),
        failed=float(1 - good.mean()),
        bias=_pair(error.mean(axis=0)),
        rms=_pair(rms),
        claimed=_pair(claimed),
        ratio=_pair(rms / np.maximum(claimed, 1e-300)),
        pull=_pair(_slopes(true, scatter)),
        locking=_pair(_slopes(true - np.rint(true), scatter)),
        fractions=np.histogram(part, bins=10, range=(-0.5, 0.5))[0].tolist(),
    )


def _slopes(against: Image, error: Image) -> Image:
    centred = against - against.mean(axis=0)
    return np.asarray((centred * error).sum(axis=0) / np.maximum((centred**2).sum(axis=0), 1e-300))


def _pair(values: Image) -> tuple[float, float]:
    return float(values[0]), float(values[1])
