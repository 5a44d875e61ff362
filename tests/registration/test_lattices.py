"""Crystals: patterns that resemble themselves, and narrow spots on an empty background."""

import numpy as np
import pytest

from stillframe import Flag, Reference, make_reference, match_frames
from stillframe.images.noise import measure_noise
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.refine import refine
from stillframe.registration.rivals import preference


class Lattice:
    """Gaussian spots on an oblique lattice; the true shift is what lays a frame on the reference."""

    def __init__(self, size, period, spot, heights, *, envelope=np.inf, dose=100.0, background=0.0, seed=0):
        self.rng = np.random.default_rng(seed)
        self.size, self.spot, self.envelope, self.dose, self.background = size, spot, envelope, dose, background
        steps = np.stack(np.meshgrid(*[np.arange(-2 * size // period, 2 * size // period)] * 2), axis=-1).reshape(-1, 2)
        places = period * steps @ np.array([[0.99, 0.14], [-0.2, 1.08]]) + size / 2 + self.rng.uniform(0, period, 2)
        self.places = places[((places > -80) & (places < size + 80)).all(axis=1)]
        self.heights = np.clip(1 + heights * self.rng.normal(size=len(self.places)), 0, None)

    def expected(self, shift=(0.0, 0.0)):
        lines = np.arange(self.size)
        moved = self.places - np.array(shift)
        along = [np.exp(-0.5 * ((lines - place[:, None]) / self.spot) ** 2) for place in moved.T]
        pattern = np.einsum("ny,nx->yx", self.heights[:, None] * along[0], along[1], optimize=True)
        y, x = (np.square(lines - self.size / 2 + s) for s in shift)
        return self.dose * pattern * np.exp(-(y[:, None] + x) / 2 / self.envelope**2) + self.background

    def frame(self, shift=(0.0, 0.0)):
        return self.rng.poisson(self.expected(shift)).astype(np.uint16)

    def frames(self, count, least=0.0, most=28.0):
        size = self.rng.uniform(least, most, (count, 2)) * self.rng.choice([-1, 1], (count, 2))
        return np.stack([self.frame(shift) for shift in size]), size

    def bound(self):
        mean = np.maximum(self.expected(), 1e-9)
        slopes = np.gradient(mean)
        return np.sqrt(np.diag(np.linalg.inv([[np.sum(a * b / mean) for a in slopes] for b in slopes])))


def errors(matches, true):
    return np.stack([matches["dy"], matches["dx"]], axis=1) - true


@pytest.mark.parametrize(
    ("lattice", "spot", "heights", "envelope"),
    [(24, 2.0, 0.3, np.inf), (24, 2.0, 0.1, np.inf), (18, 2.0, 0.3, 250), (40, 1.5, 1.0, np.inf), (20, 2.0, 0.0, 80)],
)
def test_no_lattice_vector_is_added(lattice, spot, heights, envelope):
    scene = Lattice(256, lattice, spot, heights, envelope=envelope, seed=lattice)
    frames, true = scene.frames(5)
    matches = match_frames(frames, Reference(scene.frame(), max_shift=32))
    assert not matches["flag"].any()
    assert np.abs(errors(matches, true)).max() < 0.1


def test_an_exactly_periodic_pattern_is_ambiguous():
    scene = Lattice(192, 18, 2.0, 0.0)
    frames, _ = scene.frames(4)
    for subpixel in (True, False):
        matches = match_frames(frames, Reference(scene.frame(), max_shift=32, subpixel=subpixel))
        assert (matches["flag"] == Flag.AMBIGUOUS_PEAK).all()
        assert np.isnan(matches["dy"]).all()


@pytest.mark.parametrize(("max_shift", "least", "most"), [(32, 36.0, 50.0), (16, 25.0, 31.0)])
def test_a_shift_beyond_the_search_is_not_taken_for_one_a_period_away(max_shift, least, most):
    """Also where the period is longer than twice the search."""
    scene = Lattice(320, 40, 2.0, 0.3, seed=3)
    frames, true = scene.frames(4, least=least, most=most)
    matches = match_frames(frames, Reference(scene.frame(), max_shift=max_shift))
    assert (matches["flag"] == Flag.AT_EDGE).all()
    assert np.abs(errors(matches, true)).max() < 0.1


def test_the_better_fit_is_preferred_by_many_standard_deviations():
    scene = Lattice(256, 24, 2.0, 0.3, seed=5)
    frame, true = scene.frame((3.3, -2.2)), np.array([3.3, -2.2])
    prepared = prepare(Reference(scene.frame(), max_shift=32))
    surveyed = prepared.survey(frame)
    period = 24 * np.array([0.99, 0.14])
    single, valid, template = surveyed.single, surveyed.valid, prepared.template
    right, wrong = (
        refine(single, valid, tuple(int(v) for v in np.rint(place)), template, prepared.score_image)
        for place in (true, true + period)
    )
    np.testing.assert_allclose(right.shift, true, atol=0.1)
    np.testing.assert_allclose(wrong.shift, true + period, atol=0.5)
    better_by = preference(single, valid, prepared.pixel_model, right, wrong)
    assert better_by > 20
    assert preference(single, valid, prepared.pixel_model, wrong, right) == pytest.approx(-better_by)


@pytest.mark.parametrize("seed", range(3))
def test_equal_fits_are_not_preferred(seed):
    """Of an endless lattice, both fits are equally good: the preference is standard normal."""
    scene = Lattice(192, 24, 2.0, 0.0, seed=seed)
    prepared = prepare(Reference(scene.frame(), max_shift=32))
    found = []
    for _ in range(4):
        surveyed = prepared.survey(scene.frame())
        near, far = (
            refine(surveyed.single, surveyed.valid, place, prepared.template, prepared.score_image)
            for place in ((0, 0), (24, 3))
        )
        found.append(preference(surveyed.single, surveyed.valid, prepared.pixel_model, near, far))
    assert np.abs(found).max() < 4


def test_scattered_pixels_leave_the_shift_open():
    """With a quarter of the pixels valid, only the shift 0 has enough overlap; it must not win for that."""
    scene = Lattice(256, 30, 2.0, 0.5, background=5.0)
    frames, _ = scene.frames(4, least=3.0, most=12.0)
    mask = np.random.default_rng(0).random((256, 256)) < 0.2
    matches = match_frames(frames, Reference(scene.frame(), mask, max_shift=16))
    assert (matches["flag"] & (Flag.AT_EDGE | Flag.LOW_SCORE)).all()
    assert np.isnan(matches["dy"]).all()


def test_hot_pixels_do_not_hold_whole_pixel_shifts():
    scene = Lattice(256, 30, 2.0, 0.5, dose=30.0, background=5.0)
    frames, true = scene.frames(6, least=3.0, most=12.0)
    frames[:, [20, 77, 130, 160, 222], [33, 140, 90, 201, 64]] = 3000
    fixed = scene.frame()
    fixed[[20, 77, 130, 160, 222], [33, 140, 90, 201, 64]] = 3000
    matches = match_frames(frames, Reference(fixed, max_shift=16, subpixel=False))
    assert not matches["flag"].any()
    assert np.abs(errors(matches, true)).max() < 0.7


@pytest.mark.parametrize(("spot", "dose", "background"), [(2.0, 100.0, 0.0), (1.5, 30.0, 0.0), (3.0, 20.0, 0.2)])
def test_noise_of_narrow_spots_is_that_of_counts(spot, dose, background):
    scene = Lattice(512, 30, spot, 0.3, dose=dose, background=background)
    image = scene.frame().astype(float)
    noise = measure_noise(image, np.ones(image.shape, bool))
    assert noise.gain == pytest.approx(1.0, abs=0.08)
    assert noise.pedestal == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize(("members", "dose", "background"), [(1, 100.0, 0.0), (16, 100.0, 0.0), (1, 20.0, 0.2)])
def test_narrow_spots_on_an_empty_background_reach_the_bound(members, dose, background):
    scene = Lattice(320, 30, 2.0, 0.5, dose=dose, background=background, seed=1)
    fixed = np.mean([scene.frame() for _ in range(members)], axis=0)
    frames, true = scene.frames(30)
    matches = match_frames(frames, Reference(fixed if members > 1 else fixed.astype(np.uint16), max_shift=32))
    assert not matches["flag"].any()
    error = errors(matches, true)
    error -= error.mean(axis=0)
    sigma = np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)
    # One frame as reference: its own noise acts differently on frames that overlap it differently.
    assert (error.std(axis=0) < (1.5 if members == 1 else 1.25) * scene.bound()).all()
    assert 0.8 < (error / sigma).std() < (1.4 if members == 1 else 1.25)


def test_a_reference_is_made_where_single_frames_do_not_tell_the_period():
    """The frames of the reference get their nearest shifts. Later frames, with a large window, are ambiguous."""
    scene = Lattice(256, 24, 2.0, 0.0, background=2.0, seed=7)
    frames, _ = scene.frames(16, most=3)
    reference = make_reference(frames, max_shift=32, iterations=3)
    frames = np.stack([scene.frame((0.5, 0.5))] * 4)
    assert (match_frames(frames, reference)["flag"] == Flag.AMBIGUOUS_PEAK).all()
    near = match_frames(frames, reference.replace(max_shift=8))
    still = match_frames(scene.frame()[None], reference.replace(max_shift=8))
    assert not near["flag"].any()
    np.testing.assert_allclose(near["dy"] - still["dy"], 0.5, atol=0.05)
    np.testing.assert_allclose(near["dx"] - still["dx"], 0.5, atol=0.05)
