"""Bad pixels that a mask marks, one here and one there: each costs itself, and not its surroundings."""

import numpy as np
import pytest

import stillframe as sf
from stillframe.images.noise import Noise
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.template_draft import Draft, Smoothed, best_binned
from stillframe.simulation.experiment import evaluate

SHAPE = (160, 150)


@pytest.fixture(scope="module")
def lost():
    return np.random.default_rng(4).random(SHAPE) < 0.03


@pytest.fixture(scope="module")
def frames():
    """Sixteen frames of a reference, and sixteen others, all with their shifts."""
    rng = np.random.default_rng(5)
    shifts = rng.uniform(-4, 4, (32, 2))
    return rng.poisson([200 * evaluate("rings", SHAPE, shift) + 5 for shift in shifts]).astype(np.uint16), shifts


def rms_and_sigma(frames, reference):
    stack, shifts = frames
    matches = sf.match_frames(stack[16:], reference)
    assert not matches["flag"].any()
    errors = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts[16:]
    sigma = np.sqrt((matches["sigma_y"] ** 2 + matches["sigma_x"] ** 2).mean() / 2)
    return (errors - errors.mean(axis=0)).std(), sigma


@pytest.mark.parametrize("use", [slice(0, 16), 3], ids=["a mean", "a frame"])
def test_scattered_bad_pixels_hardly_cost_anything(use, lost, frames):
    """Where they left holes of 7×7 pixels, four fifths of the information were lost."""
    whole, holed = (
        sf.make_reference(frames[0], mask, use=use, iterations=3, max_shift=8) for mask in (~np.zeros_like(lost), ~lost)
    )
    (least, _), (rms, sigma) = rms_and_sigma(frames, whole), rms_and_sigma(frames, holed)
    assert rms < 1.2 * least
    assert 0.7 < rms / sigma < 1.4


def test_the_mean_of_aligned_frames_has_no_holes_but_at_its_border(lost, frames):
    reference = sf.make_reference(frames[0][:16], ~lost, use=slice(0, 16), iterations=3, max_shift=8)
    assert not reference.frame_mask[lost].any()
    assert reference.mask[8:-8, 8:-8].all()


def test_a_hit_that_is_left_out_leaves_no_hole(frames):
    stack = frames[0].copy()
    stack[:8, 70:72, 60] = 3000
    reference = sf.make_reference(stack[:16], None, use=slice(0, 16), iterations=3, max_shift=8)
    clean = sf.make_reference(frames[0][:16], None, use=slice(0, 16), iterations=3, max_shift=8)
    assert reference.mask[8:-8, 8:-8].all()
    near = np.s_[62:80, 52:70]
    assert np.abs(reference.image[near] - clean.image[near]).max() < 0.3 * clean.image[near].max()


def test_bins_are_no_larger_than_bad_pixels_of_the_frames_allow():
    """The reference has no holes, but its frames have many. Hardly any bin of 4 px would be whole in them."""
    image = 500 * evaluate("rings", (700, 720), (0, 0))
    mask = np.ones(image.shape, bool)
    finest = Draft.of(Smoothed.of(image, mask, Noise(1.0, 0.0), 3.0), 1)
    sparse = np.random.default_rng(1).random(image.shape) > 0.1
    assert best_binned(finest, mask).side == 4
    assert best_binned(finest, sparse).side == 1


def test_prepared_templates_cover_what_surrounds_a_hole(lost):
    image = np.random.default_rng(2).poisson(200 * evaluate("rings", SHAPE, (0, 0)) + 5).astype(float)
    whole, holed = (prepare(sf.Reference(image, mask, max_shift=8)) for mask in (None, ~lost))
    assert holed.template.whole.count > 0.9 * whole.template.whole.count
