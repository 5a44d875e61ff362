"""Frames of a real detector: dark and flat images, saturated pixels, few counts, other units than counts."""

import pickle
from functools import cached_property

import numpy as np
import pytest

from stillframe import Flag, Reference, make_reference, match_frames
from stillframe.simulation.experiment import evaluate
from synthetic import blocked, texture, windows

SHAPE = (256, 256)
DIGEST = "d36679c6876187ab2ef8e2ae9620f663266f8d7bd9b850c11d198be3ca247d00"
"""Hash of a reference, computed before references could have corrections."""


def shifts_of(matches):
    return np.stack([matches["dy"], matches["dx"]], axis=1)


def errors(matches, shifts):
    """Errors of the shifts (frame, 2), after the offset common to all frames was subtracted."""
    assert not matches["flag"].any()
    error = shifts_of(matches) - shifts
    return error - error.mean(axis=0)


def rms(matches, shifts):
    return np.sqrt(np.mean(errors(matches, shifts) ** 2))


class Detector:
    """Frames of spots with known shifts, counted by a detector with a dark and a flat that no mask marks."""

    def __init__(self, frames=60, dose=30.0, texture=0.1, seed=0, shape=SHAPE):
        rng = np.random.default_rng(seed)
        self.shifts = rng.uniform(-6, 6, (frames, 2))
        self.flat = 3.0 * np.maximum(rng.normal(1, texture, shape), 0.2)
        self.dark = rng.integers(0, 60, shape).astype(np.uint16)
        self.mask = blocked(shape)
        light = [dose * evaluate("spots", shape, shift) + 1 for shift in self.shifts]
        self.ideal = np.stack([rng.poisson(one) for one in light]).astype(np.uint16)
        response = self.flat / self.flat.mean()
        self.frames = np.stack([rng.poisson(response * one) + self.dark for one in light]).astype(np.uint16)
        self.corrections = {"dark": self.dark, "flat": self.flat}

    def reference(self, **options):
        return make_reference(self.frames, self.mask, iterations=3, max_shift=16, **options)

    @cached_property
    def corrected_reference(self):
        return self.reference(**self.corrections)

    @cached_property
    def ideal_reference(self):
        return make_reference(self.ideal, self.mask, iterations=3, max_shift=16)


@pytest.fixture(scope="module")
def detector():
    return Detector()


class TestDarkAndFlat:
    def test_give_the_errors_of_an_ideal_detector(self, detector):
        expected = rms(match_frames(detector.ideal, detector.ideal_reference), detector.shifts)
        matches = match_frames(detector.frames, detector.corrected_reference)
        assert rms(matches, detector.shifts) < 1.1 * expected
        claimed = np.sqrt(np.mean([matches["sigma_y"] ** 2, matches["sigma_x"] ** 2]))
        assert rms(matches, detector.shifts) / claimed == pytest.approx(1, abs=0.2)

    @pytest.mark.slow
    def test_are_missed_where_they_are_not_given(self, detector):
        ideal = rms(match_frames(detector.ideal, detector.ideal_reference), detector.shifts)
        matches = match_frames(detector.frames, detector.reference())
        good = matches["flag"] == 0
        assert good.any()
        assert rms(matches[good], detector.shifts[good]) > 3 * ideal

    @pytest.mark.parametrize("dtype", ["i4", "f4", "f8", ">u2"])
    def test_do_the_same_for_every_dtype(self, detector, dtype):
        reference = detector.corrected_reference
        expected = match_frames(detector.frames[:4], reference)
        found = match_frames(detector.frames[:4].astype(dtype), reference)
        np.testing.assert_allclose(shifts_of(found), shifts_of(expected), atol=1e-4)
        np.testing.assert_allclose(found["intensity"], expected["intensity"], rtol=1e-5)

    def test_go_into_the_image_of_every_kind_of_reference(self, detector):
        options = detector.corrections | {"max_shift": 16}
        gain = (detector.flat / detector.flat[detector.mask].mean()).astype(np.float32)
        counts = (detector.frames.astype(float) - detector.dark) / gain
        one = make_reference(detector.frames, detector.mask, use=7, **options)
        mean = make_reference(detector.frames, detector.mask, use=slice(4), iterations=0, **options)
        for reference, expected in ((one, counts[7]), (mean, counts[:4].mean(axis=0))):
            assert reference.image.dtype == np.float32
            np.testing.assert_array_equal(reference.mask, detector.mask)
            np.testing.assert_allclose(reference.image[detector.mask], expected[detector.mask], rtol=1e-4, atol=1e-3)
        again = one.correct(detector.frames[7])
        np.testing.assert_array_equal(again[detector.mask], one.image[detector.mask])
        np.testing.assert_array_equal(one.correct(detector.frames[:2])[1], one.correct(detector.frames[1]))

    def test_take_pixels_out_that_they_spoil(self, detector):
        flat = detector.flat.copy()
        flat[20:24] = np.nan
        reference = make_reference(detector.frames, detector.mask, use=0, flat=flat, max_shift=16)
        assert not reference.frame_mask[20:24].any()
        assert not reference.mask[20:24].any()
        assert not reference.replace(subpixel=False).frame_mask[20:24].any()
        own = match_frames(detector.frames[:2], reference, masks=np.ones(SHAPE, bool))
        assert np.isfinite(own["dy"]).all()

    def test_leave_the_mask_of_a_mean_as_it_is(self, detector):
        """The holes of the frames are elsewhere once frames are aligned."""
        flat = np.where(np.arange(256) < 10, 0.0, 1.0) * np.ones(SHAPE)
        image = texture(SHAPE)
        reference = Reference(image, frame_mask=detector.mask, flat=flat, max_shift=8)
        assert reference.mask.all()
        assert not reference.frame_mask[:, :10].any()


WITH = {"dark": np.full((64, 64), 3), "flat": np.full((64, 64), 2.0)}


class TestAReference:
    @pytest.fixture
    def image(self):
        return np.arange(64 * 64).reshape(64, 64) % 97

    def test_without_corrections_has_the_hash_it_always_had(self, image):
        reference = Reference(image, max_shift=8)
        assert reference.digest == DIGEST
        assert reference.corrections is None
        assert reference.uncorrected() is reference
        np.testing.assert_array_equal(reference.correct(image), image)

    def test_has_another_hash_with_each_correction(self, image):
        options = [{}, {"dark": WITH["dark"]}, {"dark": WITH["flat"]}, {"flat": WITH["flat"]}, WITH]
        assert len({Reference(image, max_shift=8, **one).digest for one in options}) == 5

    def test_keeps_its_corrections_when_it_is_pickled_or_changed(self, image):
        reference = Reference(image, max_shift=8, **WITH)
        copies = pickle.loads(pickle.dumps(reference)), reference.replace()
        assert {copy.digest for copy in copies} == {reference.digest}
        for copy in copies:
            np.testing.assert_array_equal(copy.correct(image), image - 3.0)
        assert not (reference.dark.flags.writeable or reference.flat.flags.writeable)
        assert reference.uncorrected().digest == Reference(image, max_shift=8).digest

    def test_refuses_frames_of_another_shape(self, image):
        with pytest.raises(ValueError, match="dark and flat belong to one detector"):
            Reference(image, max_shift=8, **WITH).correct(np.zeros((3, 4)))


class TestSaturatedPixels:
    def test_are_recognised_in_recorded_counts(self, detector):
        limit = int(np.percentile(detector.frames[0], 96.5))
        reference = detector.corrected_reference.replace(saturation=limit)
        (match,) = match_frames(detector.frames[:1], reference)
        (lower,) = match_frames(detector.frames[:1], reference.replace(saturation=limit - 10))
        assert not match["flag"]
        assert lower["flag"] == Flag.SATURATED

    @pytest.mark.parametrize("corrections", [(), ("dark", "flat")])
    @pytest.mark.parametrize("iterations", [0, pytest.param(3, marks=pytest.mark.slow)])
    def test_of_a_block_in_every_frame_do_not_stay_in_the_reference(self, detector, iterations, corrections):
        frames = (detector.frames if corrections else detector.ideal).copy()
        frames[:, 60:90, 150:180] = 65535
        options = {name: detector.corrections[name] for name in corrections}
        reference = make_reference(frames[:40], detector.mask, iterations=iterations, max_shift=16, **options)
        assert not reference.frame_mask[60:90, 150:180].any()
        assert reference.image[reference.mask].max() < 300
        error = errors(match_frames(frames, reference), detector.shifts)
        assert np.abs(error).max() < (0.3 if iterations else 0.5)

    def test_of_a_block_do_not_pull_the_search(self, detector):
        """This reference does not know the block; in the frames it is 1.4 % of the pixels."""
        frames = detector.ideal.copy()
        frames[1:, 60:90, 150:180] = 65535
        error = errors(match_frames(frames[1:], Reference(frames[0], detector.mask, max_shift=16)), detector.shifts[1:])
        assert np.abs(error).max() < 0.3

    @pytest.mark.parametrize("fraction", [0.01, 0.04])
    def test_of_hits_do_not_hide_the_pattern(self, detector, fraction):
        rng = np.random.default_rng(1)
        frames = np.where(rng.random(detector.ideal.shape) < fraction, 65535, detector.ideal).astype(np.uint16)
        reference = detector.ideal_reference
        assert np.abs(errors(match_frames(frames, reference), detector.shifts)).max() < 0.3

    def test_of_stripes_in_some_frames_do_not_spoil_the_mean(self, detector):
        frames = detector.ideal[:20].copy()
        frames[3, 100:104], frames[8, :, 40:44] = 65535, 65535
        reference = make_reference(frames, detector.mask, iterations=0, max_shift=16)
        assert reference.image.max() < 200
        np.testing.assert_array_equal(reference.mask, detector.mask)
        assert not match_frames(frames, reference)["flag"].any()

    def test_in_all_of_a_frame_flag_it(self, detector):
        (match,) = match_frames(np.full((1, *SHAPE), 65535, np.uint16), detector.ideal_reference)
        assert match["flag"] == Flag.SATURATED

    def test_of_whole_frames_make_no_reference(self, detector):
        with pytest.raises(ValueError, match="none is usable"):
            make_reference(np.full((16, *SHAPE), 65535, np.uint16), max_shift=16)


def test_units_do_not_change_the_shifts():
    """Frames from 0 to 1, with hits far above the pattern, as counts."""
    shifts = [(0, 0), (3, -5), (-8, 8), (7, 2)]
    counts = windows((96, 80), shifts, counts=0.2).astype(float)
    rng = np.random.default_rng(3)
    counts[1:][rng.random(counts[1:].shape) < 0.002] = 60_000
    one, other = (match_frames(scale * counts, Reference(scale * counts[0], max_shift=12)) for scale in (1, 1 / 60_000))
    assert not one["flag"].any()
    np.testing.assert_array_equal(one["flag"], other["flag"])
    np.testing.assert_allclose(shifts_of(one), shifts_of(other), atol=1e-4)
    np.testing.assert_allclose(one["score"], other["score"], atol=1e-4)


@pytest.mark.parametrize("dose", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_frames_with_few_counts_are_not_dark(dose):
    """1 to 2 % of the pixels are counted: neither median nor quantile 0.97 differs from 0, and one hit is far above."""
    shape, rng = (512, 512), np.random.default_rng(4)
    shifts = rng.uniform(-6, 6, (12, 2))
    light = [dose * evaluate("spots", shape, shift) ** 3 for shift in (*np.zeros((16, 2)), *shifts)]
    counts = np.stack([rng.poisson(one) for one in light]).astype(np.uint16)
    assert 0.008 < np.count_nonzero(counts) / counts.size < 0.025
    counts[16:, 100, 200] = 5000
    reference = make_reference(counts, use=slice(16), iterations=0, max_shift=12)
    for subpixel, most in ((True, 0.5), (False, 0.8)):
        matches = match_frames(counts[16:], reference.replace(subpixel=subpixel))
        assert not (matches["flag"] & Flag.DARK).any()
        good = matches["flag"] == 0
        assert good.sum() > 6
        assert np.sqrt(np.mean(errors(matches[good], shifts[good]) ** 2)) < most


class TestWrappedSubtraction:
    def test_is_refused_with_the_cure(self, detector):
        frames = detector.frames - np.random.default_rng(5).permuted(detector.dark)
        assert frames.dtype == np.uint16
        with pytest.raises(ValueError, match=r"wrapped around below 0.*--dark"):
            make_reference(frames, detector.mask, max_shift=16)

    @pytest.mark.parametrize("where", [np.s_[:, 50:120, 40:110], np.s_[:, ::20, ::20]])
    def test_is_not_seen_in_saturated_pixels_less_their_dark(self, detector, where):
        frames = detector.ideal.copy()
        frames[where] = (65535 - detector.dark)[where[1:]]
        make_reference(frames, detector.mask, iterations=0, max_shift=16)
