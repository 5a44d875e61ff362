"""Test of the registration on a user's own pattern, at known sub-pixel shifts, under the static mask, with fresh noise.

The content of the frames, a lightly smoothed reference, is moved by spline interpolation; invalid and hot pixels stay
where they are on the detector. Every frame gets noise of its own with the gain and pedestal measured on the real
frames. The reference of the test is made as that of a run: a mean of frames is a mean of simulated frames, aligned in
rounds. So the true shifts are known, and frames share no more noise than real ones. The test does not cover a smooth
background that is fixed to the detector (here it moves with the pattern), noise that neighbouring pixels share, and a
pattern that changes during the run.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import scipy.ndimage

from stillframe.images.arrays import Image, Mask, Pixels
from stillframe.images.hot_pixels import isolated_pixels
from stillframe.images.noise import Noise, measure_noise, smooth
from stillframe.registration.build_reference import build_reference
from stillframe.registration.match import match_frames
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.reference import Reference

_CONTENT_SMOOTHING, _HOLE_SMOOTHING = 1.0, 12.0
"""Standard deviations, pixels, of the Gaussians for the content and for the filling of holes."""
_LEAST_MEMBERS, _MOST_MEMBERS = 3, 16
"""A reference of fewer frames is made of one; of more, the mean of these stands for it."""


class Report(pydantic.BaseModel):
    """Result of the test; pairs are along (y, x), lengths in pixels."""

    model_config = pydantic.ConfigDict(frozen=True)

    version: int = 1
    """Version of this format."""
    frames: int
    """Number of simulated frames."""
    failed: float
    """Fraction of them without a shift."""
    bias: tuple[float, float]
    """Mean error: the common offset of all frames, from the noise of the reference."""
    rms: tuple[float, float]
    """Standard deviation of the error."""
    claimed: tuple[float, float]
    """Root mean square of sigma."""
    ratio: tuple[float, float]
    """Standard deviation of the error over root mean square of sigma; ideally 1."""
    pull: tuple[float, float]
    """Slope of the error against the true shift; ideally 0. −1 means that all shifts come out as zero."""
    locking: tuple[float, float]
    """Slope of the error against the true fraction of a pixel; ideally 0. −1 means whole-pixel shifts."""
    fractions: list[int]
    """Histogram of the measured fraction of a pixel in ten equal steps of −½…½, both axes together."""


def _content(reference: Reference) -> Image:
    """Return the smoothed image of a reference; pixels that are invalid or not trusted are filled from around them.

    Hot pixels do not belong to the content: they do not move.
    """
    image, trusted = reference.image.astype(np.float64), prepare(reference).trusted.mask
    soft = smooth(image, trusted, _CONTENT_SMOOTHING)
    return np.where(soft == 0, smooth(image, trusted, _HOLE_SMOOTHING), soft)


def measure_frame(frame: Pixels, mask: Mask) -> tuple[Noise, Image]:
    """Return the noise of a frame (y, x), and how far its hot pixels exceed their surroundings, 0 elsewhere."""
    image = frame.astype(np.float64)
    hot = isolated_pixels(image, mask, measure_noise(image, mask))
    fixed = np.where(hot, np.maximum(image - smooth(image, mask & ~hot, _CONTENT_SMOOTHING), 0), 0)
    return measure_noise(image, mask & ~hot), fixed


@dataclass(frozen=True, eq=False)
class _Scene:
    """What simulated frames show."""

    content: Image
    """What moves (y, x)."""
    fixed: Image
    """What stays on the detector (y, x)."""
    noise: Noise
    """Of one frame."""

    def frame(self, shift: npt.ArrayLike, rng: np.random.Generator, noise: Noise | None = None) -> Image:
        """Return the content, moved by the negative of ``shift``, and what is fixed, with noise."""
        moved = scipy.ndimage.shift(self.content, -np.asarray(shift), order=5, mode="nearest")
        return noisy(moved + self.fixed, noise or self.noise, rng)


def _fresh(reference: Reference, scene: _Scene, limit: float, iterations: int, rng: np.random.Generator) -> Reference:
    """Return a reference like the given one of simulated frames: of one, or the aligned mean of several.

    The frames of a mean lie around one that is not moved, so that this one becomes the first guide.
    """
    noise = prepare(reference).noise
    members = min(_members(scene.noise, noise), _MOST_MEMBERS)
    if members < _LEAST_MEMBERS or not iterations:
        return reference.replace(image=scene.frame((0.0, 0.0), rng, noise), noise=noise)
    half = rng.uniform(-limit, limit, (members // 2, 2))
    shifts = np.concatenate([-half, np.zeros((members % 2 or 1, 2)), half])
    frames = np.stack([scene.frame(shift, rng).astype(np.float32) for shift in shifts])
    options = reference.options.model_dump()
    return build_reference(
        lambda indices: frames[list(indices)],
        range(len(frames)),
        reference.frame_mask,
        use=slice(len(frames)),
        iterations=iterations,
        **options,
    )


def _members(one: Noise, mean: Noise) -> int:
    """Return of how many frames a mean is, from the noise of one frame and of the mean."""
    ratio = one.gain / mean.gain if one.gain > 0 and mean.gain > 0 else one.pedestal / (mean.pedestal or -np.inf)
    return round(ratio) if one.gain > 0 or (one.gain == mean.gain == 0) else 1


def noisy(expected: Image, noise: Noise, rng: np.random.Generator) -> Image:
    """Return random pixels of this expectation and noise: Poisson counts for a gain above 0, else normal."""
    if noise.gain <= 0:
        return rng.normal(expected, np.sqrt(-noise.pedestal))
    counts = rng.poisson(np.maximum(expected - noise.pedestal, 0) / noise.gain)
    return np.asarray(noise.gain * counts + noise.pedestal)


def selftest(
    reference: Reference,
    frame_noise: Noise,
    *,
    fixed: Image | None = None,
    iterations: int = 3,
    frames: int = 100,
    reach: float = 8.0,
    seed: int = 0,
) -> Report:
    """Register frames made from a reference's content at known shifts, and report the errors.

    Shifts are uniform in ±reach, pixels, which is limited to the reference's ``max_shift`` less one. ``frame_noise`` is
    the noise of one frame, and ``fixed`` what stays on the detector (y, x), both as :func:`measure_frame` returns them;
    by default the hot pixels of the reference stay. ``iterations`` are the rounds of a reference that is a mean.

    Examples
    --------
    >>> from stillframe.simulation.experiment import Experiment
    >>> experiment = Experiment(shape=(128, 128), dose=100.0)
    >>> reference = Reference(experiment.render(0), experiment.detector.mask, max_shift=8)
    >>> report = selftest(reference, prepare(reference).noise, frames=20, reach=4.0)
    >>> report.failed
    0.0
    """
    if frames < 10:
        raise ValueError(f"{frames} frames are too few to measure errors. Ask for ten or more.")
    rng = np.random.default_rng(seed)
    reference = reference.uncorrected()  # the simulated frames are in corrected counts, as the reference is
    limit = max(min(reach, reference.max_shift - 1.0), 0.0)
    if fixed is None:
        _, fixed = measure_frame(reference.image, reference.mask)
    scene = _Scene(_content(reference), fixed, frame_noise)
    fresh = _fresh(reference, scene, limit, iterations, rng)
    shifts = rng.uniform(-limit, limit, (frames, 2))
    own = (scene.frame(shift, rng) for shift in shifts)
    matches = np.concatenate([match_frames(frame[None], fresh) for frame in own])
    return _report(matches, shifts)


def _report(matches: npt.NDArray[Any], shifts: Image) -> Report:
    measured = np.stack([matches["dy"], matches["dx"]], axis=1)
    good = np.isfinite(measured[:, 0])
    if np.count_nonzero(good) < 3:
        raise ValueError("none of the frames could be registered: the content is too weak for its noise. Average more.")
    measured, true = measured[good], shifts[good]
    sigma = np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)[good]
    error = measured - true
    scatter = error - error.mean(axis=0)
    rms, claimed = np.sqrt((scatter**2).mean(axis=0)), np.sqrt((sigma**2).mean(axis=0))
    fraction = measured - np.rint(measured)
    return Report(
        frames=len(shifts),
        failed=float(1 - good.mean()),
        bias=_pair(error.mean(axis=0)),
        rms=_pair(rms),
        claimed=_pair(claimed),
        ratio=_pair(rms / np.maximum(claimed, 1e-300)),
        pull=_pair(_slopes(true, scatter)),
        locking=_pair(_slopes(true - np.rint(true), scatter)),
        fractions=np.histogram(fraction, bins=10, range=(-0.5, 0.5))[0].tolist(),
    )


def _slopes(against: Image, error: Image) -> Image:
    centred = against - against.mean(axis=0)
    return np.asarray((centred * error).sum(axis=0) / np.maximum((centred**2).sum(axis=0), 1e-300))


def _pair(values: Image) -> tuple[float, float]:
    return float(values[0]), float(values[1])
