"""Frames in which most pixels have no count."""

import numpy as np
import pytest

from stillframe import make_reference, match_frames
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


def test_frames_of_single_counts_are_aligned():
    """Their highest values are not hits, and pixels with counts are not hot."""
    rng = np.random.default_rng(4)
    shifts = rng.uniform(-6, 6, (28, 2))
    frames = np.stack([rng.poisson(spots(shift, 0.03)) for shift in shifts]).astype(np.uint16)
    reference = make_reference(frames, use=slice(16), iterations=3, max_shift=12, detector_map=False)
    assert np.count_nonzero(~reference.frame_mask) < 20
    matches = match_frames(frames[16:], reference)
    assert not matches["flag"].any()
    error = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts[16:]
    assert matches["sigma_y"].max() < 0.25
    assert error.std(axis=0).max() < 0.3


@pytest.mark.parametrize(("counts", "shows"), [(0.02, False), (20.0, True)])
def test_templates_of_single_counts_show_no_pattern(counts, shows):
    """Equation (24) does not hold for them, and their noise would count as information."""
    frame = np.random.default_rng(5).poisson(spots((0, 0), counts)).astype(float)
    mask = np.ones(SHAPE, bool)
    variance = Draft.of(Smoothed.of(frame, mask, Noise(1.0, 0.0), 1.0), 1).expected_variance()
    assert np.isfinite(variance) == shows
