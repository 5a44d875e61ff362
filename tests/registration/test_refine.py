"""Shifts to a fraction of a pixel: unbiased, at the Cramér–Rao bound, with errors one can believe."""

import numpy as np
import pytest
import scipy.ndimage

from stillframe import Flag, Reference, make_reference, match_frames
from stillframe.images.noise import Noise, measure_noise, smooth
from stillframe.registration.equations import eliminate
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.reference_frames import frames_of_kind
from stillframe.registration.template_draft import Draft, Smoothed
from stillframe.registration.templates import _wander
from stillframe.simulation.experiment import Experiment, evaluate
from synthetic import blocked, windows

SHAPE = (160, 160)


class Draw:
    """Frames of one pattern on one detector, at any shift."""

    def __init__(self, pattern="rings", dose=100.0, seed=0):
        self.pattern, self.dose, self.seed = pattern, dose, seed
        self.detector = Experiment(frames=1, shape=SHAPE, dose=dose, seed=3).detector
        self.mask = self.detector.mask

    def expected(self, shift):
        return self.detector.see(self.dose * evaluate(self.pattern, SHAPE, shift))

    def frames(self, count, reach=4.0, seed=0):
        rng = np.random.default_rng([self.seed, seed])
        shifts = rng.uniform(-reach, reach, (count, 2))
        return np.stack([rng.poisson(self.expected(shift)) for shift in shifts]).astype(np.uint16), shifts

    def bound(self, variance=None):
        mean = self.dose * evaluate(self.pattern, SHAPE, (0, 0))
        variance = mean if variance is None else variance
        information = [[np.sum((a * b / variance)[self.mask]) for a in np.gradient(mean)] for b in np.gradient(mean)]
        return np.sqrt(np.diag(np.linalg.inv(information)))


def errors(matches, shifts):
    assert not matches["flag"].any()
    found = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts
    return found - found.mean(axis=0), np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)


@pytest.mark.parametrize("pattern", ["rings", "spots"])
def test_errors_meet_the_bound_and_sigma_says_so(pattern):
    draw = Draw(pattern)
    frames, shifts = draw.frames(150)
    reference = Reference(draw.expected((0, 0)), draw.mask, max_shift=8, noise=(1e-6, 0))
    error, sigma = errors(match_frames(frames, reference), shifts)
    assert (error.std(axis=0) < 1.2 * draw.bound()).all()
    assert (error / sigma).std() == pytest.approx(1, abs=0.12)
    fraction = shifts - np.rint(shifts)
    slope = [np.polyfit(fraction[:, axis], error[:, axis], 1)[0] for axis in (0, 1)]
    np.testing.assert_allclose(slope, 0, atol=3.5 * error.std() / (0.29 * np.sqrt(150)))


@pytest.mark.parametrize("pattern", ["rings", "spots"])
def test_noise_of_one_variance_is_stated_by_a_gain_of_zero(pattern):
    """All pixels then have the same weight."""
    draw, rng, deviation = Draw(pattern), np.random.default_rng(4), 5.0
    _, shifts = draw.frames(100)
    frames = np.stack([rng.normal(draw.expected(shift), deviation) for shift in shifts])
    reference = Reference(draw.expected((0, 0)), draw.mask, max_shift=8, noise=(0, -1e-6))
    error, sigma = errors(match_frames(frames, reference), shifts)
    assert (error.std(axis=0) < 1.35 * draw.bound(deviation**2)).all()  # (53) costs a tenth in so small an image
    assert (error / sigma).std() == pytest.approx(1, abs=0.12)


def test_a_reference_of_one_noisy_frame_does_not_attenuate():
    """The slope of the error against the fraction would be −0.2 here if its noise were taken for structure."""
    draw = Draw(dose=20.0)
    frames, shifts = draw.frames(200)
    reference = Reference(draw.frames(1, reach=0.0, seed=1)[0][0], draw.mask, max_shift=8)
    error, sigma = errors(match_frames(frames, reference), shifts)
    fraction = shifts - np.rint(shifts)
    slope = np.polyfit(fraction.ravel(), error.ravel(), 1)[0]
    assert abs(slope) < 0.03 + 2.5 * error.std() / (0.29 * np.sqrt(400))
    assert (error.std(axis=0) < 1.3 * np.sqrt(2) * draw.bound()).all()
    assert 0.8 < (error / sigma).std() < 1.2


def test_spikes_that_no_mask_names_do_little_harm():
    draw = Draw()
    frames, shifts = draw.frames(100)
    rng = np.random.default_rng(5)
    hit = rng.random(frames.shape) < 0.01
    spoiled = np.where(hit, frames + rng.integers(50, 3000, frames.shape), frames).astype(np.uint16)
    reference = Reference(draw.expected((0, 0)), draw.mask, max_shift=8, noise=(1e-6, 0))
    error, _ = errors(match_frames(spoiled, reference), shifts)
    assert (error.std(axis=0) < 1.35 * draw.bound()).all()


@pytest.mark.parametrize("value", [2000, 65534])
@pytest.mark.parametrize("spoilt", ["reference", "frames", "both"])
def test_a_hit_or_hot_pixel_that_no_mask_names_is_no_landmark(value, spoilt):
    draw = Draw(dose=20.0)
    frames, shifts = draw.frames(30)
    fixed = np.random.default_rng(9).poisson(draw.expected((0, 0))).astype(np.uint16)
    if spoilt != "frames":
        fixed[100, 40:42] = value
    if spoilt != "reference":
        frames[:, 100, 40:42] = value
    error, sigma = errors(match_frames(frames, Reference(fixed, draw.mask, max_shift=8)), shifts)
    assert (error / sigma).std() < 1.35
    assert sigma.max() < 0.05


@pytest.mark.parametrize("width", [0.5, 0.7])
def test_noise_that_neighbours_share_is_no_other_pattern_and_counts_in_sigma(width):
    """Behind a point-spread function sigma would be 2.3 and 2.9 times too small if pixels counted as independent."""
    rng = np.random.default_rng(0)
    shifts = np.concatenate([np.zeros((64, 2)), rng.uniform(-4, 4, (60, 2))])
    counts = np.stack([rng.poisson(evaluate("rings", (256, 256), shift)) for shift in shifts]).astype(float)
    seen = scipy.ndimage.gaussian_filter(counts, (0, width, width))
    error, sigma = errors(match_frames(seen[64:], Reference(seen[:64].mean(axis=0), max_shift=8)), shifts[64:])
    assert 0.75 < (error / sigma).std() < 1.7


def test_saturated_pixels_are_not_fitted():
    draw = Draw()
    frames, shifts = draw.frames(60)
    clipped = np.minimum(frames, 95)
    fixed = np.minimum(np.random.default_rng(9).poisson(draw.expected((0, 0))), 95)
    reference = Reference(fixed, draw.mask, max_shift=8, saturation=95)
    error, sigma = errors(match_frames(clipped, reference), shifts)
    assert (error / sigma).std() < 1.3


def test_masks_of_single_frames_are_refined_alike():
    draw = Draw()
    frames, shifts = draw.frames(40)
    masks = draw.mask & (np.random.default_rng(1).random(frames.shape) > 0.02)
    reference = Reference(draw.expected((0, 0)), draw.mask, max_shift=8, noise=(1e-6, 0))
    error, _ = errors(match_frames(np.where(masks, frames, 60000).astype(np.uint16), reference, masks=masks), shifts)
    assert (error.std(axis=0) < 1.5 * draw.bound()).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64])
def test_gain_and_pedestal_of_the_detector_are_measured(dtype):
    draw = Draw(dose=300.0)
    frame = draw.frames(1)[0][0].astype(dtype)
    gain, pedestal = measure_noise(3.0 * frame + 40, draw.mask)
    assert gain == pytest.approx(3, rel=0.25)
    assert pedestal == pytest.approx(40, abs=10)


@pytest.mark.parametrize("gain", [1.0, 2.5])
@pytest.mark.parametrize("dose", [0.005, 0.1, 0.5, 2.0, 5.0, 20.0])
def test_gain_and_pedestal_are_measured_however_few_counts_there_are(dose, gain):
    counts = np.random.default_rng(0).poisson(dose * evaluate("spots", (512, 512), (0, 0)))
    noise = measure_noise(gain * counts + 100.0, np.ones((512, 512), bool))
    assert noise.gain == pytest.approx(gain, rel=0.05)
    assert noise.pedestal == pytest.approx(100, abs=0.2 * gain)


def test_smoothing_looks_at_valid_pixels_only():
    mask = np.ones((20, 20), bool)
    mask[8:12, 8:12] = False
    np.testing.assert_allclose(smooth(np.where(mask, 5.0, 1e9), mask, 2.0), 5.0)


class TestIteratedReference:
    @pytest.mark.slow
    def test_is_sharp_where_the_plain_mean_is_smeared(self):
        draw = Draw("spots", dose=50.0)
        stack, _ = draw.frames(48, reach=5.0, seed=2)
        frames, shifts = draw.frames(100, seed=3)
        plain = make_reference(stack, draw.mask, use=slice(48), iterations=0, max_shift=12)
        sharp = make_reference(stack, draw.mask, use=slice(48), iterations=5, max_shift=12)
        error, sigma = errors(match_frames(frames, sharp), shifts)
        smeared, _ = errors(match_frames(frames, plain), shifts)
        assert (error.std(axis=0) < 1.25 * draw.bound()).all()
        assert (smeared.std(axis=0) > 1.3 * error.std(axis=0)).all()
        assert 0.85 < (error / sigma).std() < 1.15
        assert sharp.noise.gain == pytest.approx(1 / 48, rel=0.15)

    @pytest.mark.slow
    def test_never_takes_in_what_cannot_be_registered(self):
        draw = Draw()
        stack, _ = draw.frames(16, reach=2.0)
        spoiled = np.concatenate([stack, stack[:4] * 0, np.full_like(stack[:4], 65535)])
        noise = np.random.default_rng(0).poisson(stack.mean(), stack[:4].shape).astype(np.uint16)
        spoiled = np.concatenate([spoiled, noise])
        clean = make_reference(stack, draw.mask, use=slice(16), iterations=2, max_shift=8)
        other = make_reference(spoiled, draw.mask, use=slice(28), iterations=4, max_shift=8)
        both = clean.mask & other.mask
        assert np.corrcoef(clean.image[both], other.image[both])[0, 1] > 0.999

    @pytest.mark.parametrize("count", [3, 16])
    def test_of_frames_that_drifted_far_is_sharp(self, count):
        shifts = np.random.default_rng(3).integers(-20, 21, (24, 2))
        frames, mask = windows((128, 128), shifts, seed=2, counts=0.3), blocked((128, 128))
        reference = make_reference(frames, mask, use=slice(count), iterations=4, max_shift=40)
        assert reference.history.startswith(f"mean of {count} of {count} frames, aligned in ")
        assert (errors(match_frames(frames, reference), shifts)[0].std(axis=0) < 0.02).all()

    def test_begins_with_one_frame_where_the_mean_shows_nothing(self):
        """Drift around a whole ring of shifts leaves nothing of a fine texture in the mean."""
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        shifts = np.rint(20 * np.stack([np.sin(angle), np.cos(angle)], axis=1)).astype(int)
        frames = windows((128, 128), shifts, seed=2, counts=0.02)
        reference = make_reference(frames, use=slice(40), iterations=4, max_shift=44)
        assert reference.history.startswith("mean of 40 of 40 frames, aligned in ")
        assert (errors(match_frames(frames, reference), shifts)[0].std(axis=0) < 0.1).all()

    def test_says_so_where_frames_cannot_be_laid_on_one_another(self):
        noise = np.random.default_rng(0).poisson(5, (16, 64, 64))
        with pytest.raises(ValueError, match="16 frames of the reference cannot be aligned with one another"):
            make_reference(noise, iterations=3, max_shift=8)
        assert make_reference(noise, iterations=0, max_shift=8).history == "mean of 16 of 16 frames, not aligned"

    @pytest.mark.parametrize("jump", [(-11.2, 13.3), (20.0, 5.0)])
    @pytest.mark.parametrize("pattern", ["rings", pytest.param("spots", marks=pytest.mark.slow)])
    def test_a_jump_leaves_no_second_picture(self, jump, pattern):
        draw = Draw(pattern, dose=40.0)
        shifts = np.array([(0.0, 0.0)] * 8 + [jump] * 8)
        frames = np.stack([np.random.default_rng(i).poisson(draw.expected(s)) for i, s in enumerate(shifts)])
        reference = make_reference(frames, draw.mask, iterations=3)
        assert np.abs(errors(match_frames(frames, reference), shifts)[0]).max() < 0.15

    @pytest.mark.parametrize("bad", [0.05, 15.0])
    def test_every_second_frame_may_be_unusable(self, bad):
        draw = Draw(dose=40.0)
        frames, shifts = draw.frames(16, reach=5.0)
        frames[1::2] = np.random.default_rng(0).poisson(bad, frames[1::2].shape)
        reference = make_reference(frames, draw.mask, iterations=4, max_shift=12)
        assert reference.history.startswith("mean of 8 of 16 frames, aligned in ")
        assert np.abs(errors(match_frames(frames[::2], reference), shifts[::2])[0]).max() < 0.1

    @pytest.mark.parametrize("hit", [2000, 65534])
    def test_hits_in_its_frames_spoil_nothing(self, hit):
        draw = Draw(dose=60.0)
        frames, shifts = draw.frames(16)
        clean = frames.copy()
        for index, frame in enumerate(frames):
            frame[20 + 7 * index, 30:32] = hit
        reference = make_reference(frames, draw.mask, iterations=4, max_shift=16)
        assert (errors(match_frames(clean, reference), shifts)[0].std(axis=0) < 0.03).all()
        assert (errors(match_frames(frames, reference), shifts)[0].std(axis=0) < 0.03).all()

    def test_of_two_frames_is_one_of_them(self):
        draw = Draw()
        frames, _ = draw.frames(2)
        assert make_reference(frames, draw.mask, iterations=3).history == "mean of 1 of 2 frames, not aligned"

    def test_is_the_same_every_time(self):
        draw = Draw()
        stack, _ = draw.frames(12)
        made = [make_reference(stack, draw.mask, use=slice(12), iterations=3, max_shift=8) for _ in range(2)]
        assert made[0].digest == made[1].digest

    def test_leaves_spikes_out(self):
        draw = Draw()
        stack, _ = draw.frames(24, reach=2.0)
        rng = np.random.default_rng(6)
        spoiled = np.where(rng.random(stack.shape) < 0.002, 3000, stack).astype(np.uint16)
        plain = make_reference(spoiled, draw.mask, use=slice(24), iterations=0, max_shift=8)
        reference = make_reference(spoiled, draw.mask, use=slice(24), iterations=4, max_shift=8)
        clean = make_reference(stack, draw.mask, use=slice(24), iterations=4, max_shift=8)
        both = reference.mask & clean.mask
        spoiled_by = np.abs(reference.image - clean.image)[both], np.abs(plain.image - clean.image)[both]
        assert np.count_nonzero(spoiled_by[0] > 60) < 0.1 * np.count_nonzero(spoiled_by[1] > 60)
        assert np.count_nonzero(spoiled_by[1] > 60) > 100

    def test_keeps_the_mask_of_the_detector_apart_from_its_own(self):
        draw = Draw()
        stack, _ = draw.frames(24, reach=4.0)
        reference = make_reference(stack, draw.mask, use=slice(24), iterations=3, max_shift=16)
        np.testing.assert_array_equal(reference.frame_mask, draw.mask)
        assert (reference.mask & ~draw.mask).any()  # dead pixels were seen by shifted frames

    def test_takes_one_kind_of_frames(self):
        kinds = np.array(["pumped", "unpumped", "pumped", "unpumped"], dtype=object)
        assert list(frames_of_kind("unpumped", kinds, 4)) == [1, 3]
        with pytest.raises(ValueError, match="the store names pumped, unpumped"):
            frames_of_kind("off", kinds, 4)
        with pytest.raises(ValueError, match="names no kinds"):
            frames_of_kind("off", None, 4)


class TestFlags:
    def test_a_perfect_lattice_does_not_hop(self):
        """Every lattice vector explains an endless crystal as well as any other."""
        y, x = np.mgrid[:128, :128]
        lattice = 30 * (1 + np.cos(2 * np.pi * y / 16) * np.cos(2 * np.pi * x / 16)) + 1
        rng = np.random.default_rng(0)
        reference = Reference(rng.poisson(lattice), max_shift=20)
        matches = match_frames(rng.poisson(np.broadcast_to(lattice, (5, 128, 128))), reference)
        assert (matches["flag"] == Flag.AMBIGUOUS_PEAK).all()
        assert np.isnan(matches["dy"]).all()
        assert (matches["second_score"] > 0.9 * matches["score"]).all()

    @pytest.mark.parametrize("shift", [(11.3, 4.0), (13, -2), (12.5, 12.5), (3, 2)])
    def test_a_lattice_with_a_period_larger_than_the_search_does_not_hop(self, shift):
        """The true shift may lie a period beyond the search, which no frame of an endless lattice can tell."""
        y, x = np.mgrid[:256, :256]

        def lattice(dy, dx):
            return 40 * (np.cos(np.pi * (y + dy) / 24) * np.cos(np.pi * (x + dx) / 24)) ** 8 + 4

        rng = np.random.default_rng(0)
        reference = Reference(rng.poisson(lattice(0, 0)), max_shift=16)
        matches = match_frames(rng.poisson(np.broadcast_to(lattice(*shift), (5, 256, 256))), reference)
        assert (matches["flag"] == Flag.AMBIGUOUS_PEAK).all()

    def test_a_crystal_that_ends_is_found(self):
        draw = Draw("spots")
        frames, shifts = draw.frames(20, reach=10.0)
        reference = Reference(draw.expected((0, 0)), draw.mask, max_shift=24, noise=(1e-6, 0))
        errors(match_frames(frames, reference), shifts)

    def test_a_frame_without_beam_is_dark_whatever_its_pedestal(self):
        draw = Draw()
        frames, _ = draw.frames(1, reach=0.0)
        reference = Reference(frames[0] + 100, draw.mask, max_shift=8)
        off = np.random.default_rng(0).normal(100, 4, (20, *SHAPE))
        assert (match_frames(off, reference)["flag"] == Flag.DARK).all()

    def test_noise_alone_is_no_match(self):
        draw = Draw()
        reference = Reference(draw.expected((0, 0)), draw.mask, max_shift=8, noise=(1e-6, 0))
        flat = np.random.default_rng(0).poisson(50, (40, *SHAPE)).astype(np.uint16)
        assert (match_frames(flat, reference)["flag"] == Flag.LOW_SCORE).all()

    @pytest.mark.parametrize("reach", [0, 6])
    def test_a_drift_beyond_the_search_locks_no_ring_on_another(self, reach):
        experiment = Experiment(frames=30, shape=(256, 256), dose=60.0, max_drift=12.0)
        frames = np.stack([experiment.render(index) for index in range(30)])
        matches = match_frames(frames, Reference(frames[1], experiment.detector.mask, max_shift=reach))
        truth = experiment.shifts - experiment.shifts[1]
        found = np.isfinite(matches["dy"])
        assert np.count_nonzero(np.abs(truth).max(axis=1) < reach) <= np.count_nonzero(found)
        np.testing.assert_allclose(np.stack([matches["dy"], matches["dx"]], axis=1)[found], truth[found], atol=0.1)
        assert (matches["flag"][~found] & (Flag.DARK | Flag.LOW_SCORE | Flag.AT_EDGE)).all()

    @pytest.mark.parametrize("subpixel", [True, False])
    @pytest.mark.parametrize("wave", [(0, 1), (1, 0), (1, 1)])
    def test_a_picture_that_changes_along_one_direction_has_no_shift(self, wave, subpixel):
        y, x = np.mgrid[:66, :66]
        image = 20 + 10 * np.sin((wave[0] * y + wave[1] * x) / 5)
        (match,) = match_frames(image[None, 2:, 1:65], Reference(image[:64, :64], max_shift=8, subpixel=subpixel))
        assert match["flag"] in (Flag.AMBIGUOUS_PEAK, Flag.AT_EDGE)
        assert np.isnan(match["dy"])


def test_stated_noise_is_used():
    assert prepare(Reference(np.eye(32), max_shift=4, noise=(2, 1))).noise == Noise(2.0, 1.0)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e6])
def test_the_unit_of_intensity_does_not_matter(scale):
    """Fractions of a total, or photons in electronvolts."""
    draw = Draw()
    frames, _ = draw.frames(4)
    fixed = draw.frames(1, reach=0.0, seed=1)[0][0].astype(np.float64)
    (plain, scaled) = (
        match_frames(factor * frames.astype(np.float64), Reference(factor * fixed, draw.mask, max_shift=8))
        for factor in (1.0, scale)
    )
    assert not plain["flag"].any() and not scaled["flag"].any()
    for name in ("dy", "dx", "sigma_y", "sigma_x"):
        np.testing.assert_allclose(scaled[name], plain[name], atol=0.1 * plain["sigma_y"].max())


@pytest.fixture
def small_window(monkeypatch):
    """Pictures of 400² are large ones then, of which a window is looked at."""
    monkeypatch.setattr("stillframe.images.noise._WINDOW", 192)


@pytest.mark.parametrize("corners", [[(60, 70)], [(40, 60), (340, 340)]])
def test_a_pattern_anywhere_in_a_large_picture_is_refined(small_window, corners):
    """Noise and smoothing are judged by a window around the structure, or by all where that shows none."""
    y, x = np.mgrid[:400, :400].astype(np.float32)
    spots = [(row + 12 * k, column + 30 * (-1) ** k) for row, column in corners for k in range(3)]
    bright = np.full(y.shape, 5.0)
    for row, column in spots:
        bright += 400 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / 18)
    frames = np.random.default_rng(4).poisson([bright, np.roll(bright, (2, -3), (0, 1))]).astype(np.uint16)
    reference = Reference(frames[0], max_shift=8)
    match = match_frames(frames, reference)[1]
    assert prepare(reference).template is not None and not match["flag"]
    np.testing.assert_allclose([match["dy"], match["dx"]], (-2, 3), atol=0.1)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_the_unit_of_intensity_does_not_matter_to_bins(scale):
    frames = windows((256, 256), [(0, 0), (2, -3)], counts=0.3).astype(np.float64)
    plain, scaled = (
        match_frames(factor * frames, Reference(factor * frames[0], max_shift=8))[1] for factor in (1.0, scale)
    )
    assert not plain["flag"] and not scaled["flag"]
    np.testing.assert_allclose([scaled["dy"], scaled["dx"]], [plain["dy"], plain["dx"]], atol=plain["sigma_y"])


def test_noise_is_measured_where_the_block_hides_the_midst_of_a_large_picture(small_window):
    y, x = np.mgrid[:400, :400] - 199.5
    radius = np.hypot(y, x)
    counts = np.random.default_rng(5).poisson(20 + 200 * np.exp(-((radius - 160) ** 2) / 200))
    reference = Reference((1000 + 40 * counts).astype(np.uint16), radius > 140, max_shift=8)
    gain, pedestal = prepare(reference).noise
    assert gain == pytest.approx(40, rel=0.1)
    assert pedestal == pytest.approx(1000, abs=200)
    assert prepare(reference).template is not None


def test_what_a_mask_hides_gives_the_same_bytes_in_any_order():
    draw = Draw()
    frames, _ = draw.frames(12, reach=6.0)
    fixed = draw.frames(1, reach=0.0, seed=1)[0][0]
    alone = [match_frames(frame[None], Reference(fixed, draw.mask, max_shift=8)) for frame in frames]
    shared = Reference(fixed, draw.mask, max_shift=8)
    backwards = [match_frames(frame[None], shared) for frame in frames[::-1]][::-1]
    assert len(prepare(shared).hidden_bins) > 5
    assert [one.tobytes() for one in alone] == [one.tobytes() for one in backwards]


def test_elimination_solves_what_can_be_solved():
    generator = np.random.default_rng(0)
    for power in np.linspace(-8, 8, 30):
        matrix, right = generator.normal(size=(4, 4)) * [1, 1, 10**power, 1], generator.normal(size=4)
        matrix[0, 0] = 0
        system = np.column_stack([matrix, right])
        assert eliminate(system)
        np.testing.assert_allclose(system[:, 4], np.linalg.solve(matrix, right), rtol=1e-6)
    assert not eliminate(np.zeros((4, 5)))
    assert not eliminate(np.full((4, 5), np.nan))


@pytest.mark.parametrize("side", [1, 2, 4])
def test_how_noise_changes_with_the_fraction_is_the_sum_over_pixels(side):
    """Templates are the same for all pixels of a bin; between bins they change by half on either side."""
    frame, mask = Draw().expected((0.0, 0.0)), np.ones(SHAPE, bool)
    draft = Draft.of(Smoothed.of(frame, mask, Noise(1.0, 0.0), 2.0), side)
    inside = draft.weight * draft.slopes * draft.support / side**2
    pixels = inside.repeat(side, axis=1).repeat(side, axis=2)
    scatter = (draft.variance * side**2).repeat(side, axis=0).repeat(side, axis=1)
    changes = [[scipy.ndimage.correlate1d(one, [-0.5, 0, 0.5], axis=axis) for axis in (0, 1)] for one in pixels]
    expected = np.einsum("kiyx,ljyx,yx->klij", changes, changes, scatter)
    np.testing.assert_allclose(_wander(draft), expected, rtol=1e-9)
