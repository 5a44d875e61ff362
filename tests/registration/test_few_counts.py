"""Frames in which most pixels have no count."""

import numpy as np
import pytest

from stillframe import Reference, make_reference, match_frames
from stillframe.images.noise import Noise
from stillframe.registration.template_draft import Draft, Smoothed

SHAPE = (512, 512)
CENTRES = np.random.default_rng(3).uniform(20, 492, (80, 2))


def spots(shift, counts):
    """Expected counts of spots at a shift, with this mean over all pixels."""
    y, x = (np.arange(length)[:, None] + step for length, step in zip(SHAPE, shift, strict=True))
    along_y, along_x = (np.exp(-(((a - CENTRES[:, k]) / 3.5) ** 2) / 2) for k, a in ((0, y), (1, x)))
    image = 0.02 + along_y @ along_x.T
    return counts * image / image.mean()


@pytest.mark.parametrize(("counts", "largest_error"), [(0.03, 0.09), (0.2, 0.04)])
def test_frames_of_few_counts_are_aligned(counts, largest_error):
    """Single counts are neither hits nor hot pixels, and the background stays in the mean.

    Without the background, noise would be misjudged and shifts drawn to whole pixels: errors are twice as large then.
    """
    rng = np.random.default_rng(4)
    shifts = rng.uniform(-6, 6, (44, 2))
    frames = np.stack([rng.poisson(spots(shift, counts)) for shift in shifts]).astype(np.uint16)
    reference = make_reference(frames, use=slice(16), iterations=3, max_shift=12, detector_map=False)
    assert np.count_nonzero(~reference.frame_mask) < 20
    error, sigma, _ = deviations(match_frames(frames[16:], reference), shifts[16:])
    assert np.sqrt(np.mean(error**2)) < largest_error
    assert np.sqrt(np.mean((error / sigma) ** 2)) < 1.3


@pytest.mark.parametrize("hits", [False, True])
def test_single_counts_are_no_outliers(hits):
    """If they were left out as outliers, shifts would be too near to whole pixels, by a fifth of the distance."""
    rng = np.random.default_rng(6)
    image = rng.poisson(16 * spots((0, 0), 0.03)) / 16
    shifts = rng.uniform(-0.5, 0.5, (60, 2))
    frames = np.stack([rng.poisson(spots(shift, 0.03)) for shift in shifts])
    frames += hits * 100 * (rng.random(frames.shape) < 0.003)
    reference = Reference(image, np.ones(SHAPE, bool), max_shift=12, noise=(1 / 16, 0.0))
    error, sigma, shifts = deviations(match_frames(frames.astype(np.uint16), reference), shifts)
    assert np.sqrt(np.mean((error / sigma) ** 2)) < 1.2
    slope = np.sum(error * shifts) / np.sum(shifts**2)
    assert abs(slope) < 0.08  # its standard error is 0.02


def deviations(matches, shifts):
    """Return errors less their mean, sigma and true shifts of the good frames; at most one frame is flagged."""
    good = matches["flag"] == 0
    assert np.count_nonzero(~good) <= 1
    matches, shifts = matches[good], shifts[good]
    error = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts
    return error - error.mean(axis=0), np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1), shifts


@pytest.mark.parametrize(("counts", "shows"), [(0.02, False), (20.0, True)])
def test_templates_of_single_counts_show_no_pattern(counts, shows):
    """Equation (24) does not hold for them, and their noise would count as information."""
    frame = np.random.default_rng(5).poisson(spots((0, 0), counts)).astype(float)
    mask = np.ones(SHAPE, bool)
    variance = Draft.of(Smoothed.of(frame, mask, Noise(1.0, 0.0), 1.0), 1).expected_variance()
    assert np.isfinite(variance) == shows
