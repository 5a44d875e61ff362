"""What stays on the detector while the pattern moves is found, and what merely changes is not taken for it."""

import numpy as np
import pytest
import scipy.ndimage

import stillframe as sf
from stillframe.registration.detector_map import DetectorMap, Spread, map_of
from stillframe.registration.detector_sums import DetectorSums
from stillframe.simulation.experiment import evaluate

SHAPE, FRAMES = (128, 120), 16
NOISE_OF_MEAN = 1 / 8
EVERYWHERE = np.ones(SHAPE, bool)


@pytest.fixture(scope="module")
def shifts():
    return np.random.default_rng(1).uniform(-5, 5, (48, 2))


@pytest.fixture(scope="module")
def patterns(shifts):
    """Expected counts of each frame."""
    return np.stack([300 * evaluate("spots", SHAPE, shift) + 15 for shift in shifts])


def sums_of(patterns, see, seed=0):
    """Sums over frames as a detector sees them, each compared with a noisy mean."""
    rng, sums = np.random.default_rng(seed), DetectorSums.empty(SHAPE)
    for number, pattern in enumerate(patterns):
        predicted = pattern + rng.normal(0, np.sqrt(NOISE_OF_MEAN * pattern))
        residual = rng.poisson(see(number, pattern)) - predicted
        sums.add(residual, predicted, (1 + NOISE_OF_MEAN) * pattern, NOISE_OF_MEAN / (1 + NOISE_OF_MEAN), EVERYWHERE)
    return sums


def changing(number, pattern):
    """Spots that are brighter or weaker by a third, each on its own and anew in every frame."""
    y, x = np.indices(SHAPE) // 24
    factors = np.random.default_rng(number).uniform(0.67, 1.33, (8, 8))
    return 15 + (pattern - 15) * factors[y, x]


def offsets_of_lines(means):
    """Equation 62 for means over rows, then columns, of each frame."""
    offsets = []
    for c in np.split(np.asarray(means), [SHAPE[0]], axis=1):
        total, squares, n = c.sum(axis=0), (c**2).sum(axis=0), len(c)
        tau = np.mean(total**2 - squares) / (n**2 - n)
        found = np.sum(total**2 - squares) > 5 * np.sqrt(2 * np.sum(squares**2))
        u = (squares - total**2 / n) / n**2
        offsets.append(total / n * tau / (tau + u) * found)
    return offsets[0][:, None] + offsets[1]


class TestEquations:
    """The numbers of METHOD.md, summed frame by frame."""

    @pytest.fixture
    def drawn(self, patterns):
        rng = np.random.default_rng(9)
        gain = 1 + 0.15 * rng.normal(size=SHAPE)
        signal = patterns[:FRAMES]
        residual = rng.poisson(gain * signal) + rng.normal(0, 3, SHAPE) - signal
        sums = DetectorSums.empty(SHAPE)
        for r, m in zip(residual, signal, strict=True):
            sums.add(r, m, m, 0.0, EVERYWHERE)
        around = np.stack([scipy.ndimage.uniform_filter(r.astype(float), 25, mode="constant") for r in residual])
        share = scipy.ndimage.uniform_filter(np.ones(SHAPE), 25, mode="constant")
        return sums, residual, residual - around / share, signal

    def test_56_and_57_are_the_gains(self, drawn):
        sums, _, fine, signal = drawn
        found = map_of(sums, EVERYWHERE)
        of_each = np.stack([signal, np.ones_like(signal)])  # what a gain and an offset of 1 add to each frame
        total, squares, noise = of_each.sum(axis=1), (of_each**2).sum(axis=1), signal.sum(axis=0)
        assert (total[0] > 0.02 * total[0].mean()).all() and (total[0] ** 2 >= 3 * squares[0]).all()
        assert found.following.all()
        of_others = sum(a * b for i, a in enumerate(fine) for j, b in enumerate(fine) if i != j)
        terms = ((total**2 - squares) / noise).reshape(2, -1)
        square = np.linalg.solve(terms @ terms.T, terms @ (of_others / noise).ravel())
        assert found.spread == pytest.approx((*np.sqrt(square), 0), rel=2e-2)
        expected = np.tensordot(square, total**2, 1)
        q = np.tensordot(square, squares, 1) / expected
        u = np.maximum(noise, ((fine**2).sum(axis=0) - fine.sum(axis=0) ** 2 * q) / (1 - q))
        known = fine.sum(axis=0) / (expected + u)
        np.testing.assert_allclose(found.gain, 1 + found.spread.gain**2 * total[0] * known, atol=2e-3)
        offset = found.spread.offset**2 * total[1] * known
        np.testing.assert_allclose(found.offset, offset, atol=5e-3)

    def test_62_is_the_offset_of_lines(self):
        rng = np.random.default_rng(4)
        rows, columns = rng.normal(0, 0.5, (SHAPE[0], 1)), rng.normal(0, 1, (1, SHAPE[1]))
        residual, sums = rng.normal(0, 5, (FRAMES, *SHAPE)) + rows + columns, DetectorSums.empty(SHAPE)
        for r in residual:
            sums.add(r, np.full(SHAPE, 20.0), np.full(SHAPE, 25.0), 0.0, EVERYWHERE)
        found = map_of(sums, EVERYWHERE)
        means = [residual.mean(axis=axis) - residual.mean(axis=(1, 2))[:, None] for axis in (2, 1)]
        expected = offsets_of_lines(np.concatenate(means, axis=1))
        np.testing.assert_allclose(found.offset, expected, atol=1e-4)
        assert found.spread.of_lines == pytest.approx(np.std(rows + columns), rel=0.05)
        assert np.std(found.offset - rows - columns) < 0.2

    def test_58_is_what_does_not_follow(self, patterns):
        signal = patterns[:FRAMES]
        opaque = np.zeros(SHAPE, bool)
        opaque[40:43, 30:90] = True
        residual = np.where(opaque, 3.0, signal) - signal
        sums = DetectorSums.empty(SHAPE)
        for r, m in zip(residual, signal, strict=True):
            sums.add(r, m, m, 0.1, EVERYWHERE)
        total, noise = residual.sum(axis=0), signal.sum(axis=0)
        error = np.maximum(noise, (residual**2).sum(axis=0) - total**2 / FRAMES)
        differs = (np.abs(total) > 6 * np.sqrt(error)) & (np.abs(total) > 0.1 * signal.sum(axis=0))
        changes = FRAMES * signal.var(axis=0)
        covariance = changes + FRAMES * ((residual * signal).mean(axis=0) - residual.mean(axis=0) * signal.mean(axis=0))
        of_pattern = np.maximum(changes - 0.66 * noise * 0.1, 0)
        stays = (covariance < 0.4 * of_pattern) & (of_pattern - covariance > 6 * np.sqrt(noise / FRAMES * changes))
        stays &= of_pattern - covariance > 0.0225 * (signal**2).sum(axis=0)
        assert (differs | stays)[opaque].mean() > 0.9
        assert not map_of(sums, EVERYWHERE).following[differs | stays].any()


class TestWhatIsFound:
    def test_nothing_where_nothing_stays(self, patterns):
        found = map_of(sums_of(patterns[:FRAMES], lambda number, pattern: pattern), EVERYWHERE)
        assert not any(found.spread) and found.following.all() and (found.gain == 1).all() and not found.offset.any()

    def test_nothing_where_the_pattern_itself_changes(self, patterns):
        found = map_of(sums_of(patterns[:FRAMES], changing), EVERYWHERE)
        assert not any(found.spread)
        assert np.count_nonzero(~found.following) < 0.005 * found.following.size

    @pytest.mark.parametrize("change", [lambda number, pattern: pattern, changing], ids=["still", "changing"])
    def test_the_gain_of_each_pixel(self, patterns, change):
        gain = 1 + 0.1 * np.random.default_rng(7).normal(size=SHAPE)
        found = map_of(sums_of(patterns[:FRAMES], lambda *frame: gain * change(*frame)), EVERYWHERE)
        assert found.spread.gain == pytest.approx(0.1, rel=0.15)
        seen = found.gain != 1
        assert seen.mean() > 0.4
        assert np.std((found.gain - gain)[seen]) < 0.8 * np.std(gain[seen])
        assert np.corrcoef(found.gain[seen], gain[seen])[0, 1] > 0.7

    @pytest.mark.parametrize(
        "brightness",
        [(1.0,), (1.0, 0.6), (1.0,) * 7 + (0.01,)],
        ids=["steady", "every second dim", "every eighth dim"],
    )
    def test_the_offset_of_each_pixel(self, patterns, brightness):
        """Offsets are in counts and do not grow with the brightness of a frame."""
        offset = np.random.default_rng(7).normal(0, 6, SHAPE)
        rng, sums = np.random.default_rng(2), DetectorSums.empty(SHAPE)
        for number, pattern in enumerate(patterns[:FRAMES]):
            a = brightness[number % len(brightness)]
            frame = rng.poisson(a * pattern) + 100 + offset
            sums.add(frame - 100 - a * pattern, a * pattern, a * pattern, 0.0, EVERYWHERE)
        found = map_of(sums, EVERYWHERE)
        assert found.spread.offset == pytest.approx(6, rel=0.1)
        left = found.offset + (found.gain - 1) * patterns[:FRAMES].mean(axis=0) - offset
        assert np.std(left) < 0.35 * 6

    def test_nothing_where_a_smooth_background_stays(self, patterns, shifts):
        """The mean of aligned frames contains it, smeared, so that the prediction moves it."""
        y, x = np.indices(SHAPE)

        def bump(dy=0.0, dx=0.0):
            return 200 * np.exp(-((y + dy - 64) ** 2 + (x + dx - 60) ** 2) / 2 / 25**2)

        rng, sums = np.random.default_rng(2), DetectorSums.empty(SHAPE)
        for pattern, (dy, dx) in zip(patterns[:FRAMES], shifts, strict=False):
            predicted = pattern + bump(dy, dx)
            residual = rng.poisson(pattern + bump()) - predicted
            sums.add(residual, predicted, 1.1 * predicted, 0.1, EVERYWHERE)
        assert map_of(sums, EVERYWHERE).following.mean() > 0.97

    @pytest.mark.parametrize(("opaque", "missed"), [(1.0, 0.02), (0.6, 0.3)])
    def test_a_shade_that_no_mask_marks(self, patterns, opaque, missed):
        shade = np.zeros(SHAPE, bool)
        shade[:, 50:58] = True
        found = map_of(sums_of(patterns[:FRAMES], lambda number, pattern: pattern * (1 - opaque * shade)), EVERYWHERE)
        assert found.following[~shade].mean() > 0.98
        assert found.following[:, 51:57].mean() < missed

    def test_hot_clusters(self, patterns):
        rng, hot = np.random.default_rng(3), np.zeros(SHAPE)
        for y, x in rng.integers(3, 110, (12, 2)):
            hot[y : y + 3, x : x + 3] = 60
        found = map_of(sums_of(patterns[:FRAMES], lambda number, pattern: pattern + hot), EVERYWHERE)
        assert found.following[hot > 0].mean() < 0.05
        assert found.following[hot == 0].mean() > 0.95

    def test_too_many_pixels_are_not_left_out(self, patterns):
        """The frames then show something else as a whole."""
        found = map_of(sums_of(patterns[:FRAMES], lambda number, pattern: 2 * pattern), EVERYWHERE)
        assert found.following.all()


def test_a_map_goes_no_further_than_what_pixels_usually_have():
    one, other = (
        DetectorMap.without_pattern(EVERYWHERE)._replace(
            gain=np.full(SHAPE, gain, np.float32), offset=np.zeros(SHAPE, np.float32), spread=Spread(0.1, 0)
        )
        for gain in (1.1, 1.15)
    )
    assert other.extrapolated(one, 2).gain == pytest.approx(1.25)
    assert other.extrapolated(one, 9).gain == pytest.approx(1.4)
    assert (other.extrapolated(DetectorMap.without_pattern(EVERYWHERE), 2).gain == other.gain).all()


def errors_over_sigma(frames, shifts, reference, least_good=0.9):
    matches = sf.match_frames(frames, reference)
    good = matches["flag"] == 0
    assert good.mean() > least_good
    errors = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts
    errors -= errors[good].mean(axis=0)
    sigma = np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)
    return errors[good].std(), (errors / sigma)[good].std()


def make(frames, mask=None, **options):
    return sf.make_reference(frames, mask, use=slice(0, FRAMES), max_shift=10, **options)


class TestReferences:
    """Errors of the other frames, by references of the first sixteen."""

    def test_a_block_that_no_mask_marks_pulls_no_more(self, patterns, shifts):
        open_ = np.ones(SHAPE, bool)
        open_[52:76, 40:] = False
        frames = np.random.default_rng(5).poisson(np.where(open_, patterns, 2)).astype(np.uint16)
        without = make(frames, detector_map=False)
        # Without the map, the block makes the features of some frames look elongated, so that these are refused.
        rms_pulled, z_pulled = errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], without, least_good=0.4)
        found = make(frames)
        rms, z = errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)
        rms_masked, _ = errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], make(frames, open_))
        assert z_pulled > 3 and z < 1.4
        assert rms < 1.4 * rms_masked < 0.5 * rms_pulled
        assert "pixels that do not follow the pattern" in found.history

    def test_gains_become_part_of_the_flat(self, patterns, shifts):
        gain = 1 + 0.1 * np.random.default_rng(6).normal(size=SHAPE)
        frames = np.random.default_rng(5).poisson(20 * gain * patterns).astype(np.uint16)
        plain, found, known = make(frames, detector_map=False), make(frames), make(frames, flat=gain)
        assert plain.flat is None and found.flat is not None
        assert "gains of pixels that differ by" in found.history
        (before, _), (after, z), (best, _) = (
            errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], one) for one in (plain, found, known)
        )
        assert best < after < 0.7 * before
        assert z < 1.6
        assert found.digest != plain.digest

    @pytest.mark.parametrize("spread", [9, 15], ids=["pulling", "locking"])
    def test_offsets_become_part_of_the_dark(self, patterns, shifts, spread):
        """Stronger offsets lock all frames to a shift of zero. They are aligned again less their plain mean."""
        offset = 100 + np.random.default_rng(6).normal(0, spread, SHAPE)
        frames = (np.random.default_rng(5).poisson(0.2 * patterns) + offset).round().astype(np.uint16)
        plain, found = make(frames, detector_map=False), make(frames)
        assert plain.dark is None and found.dark is not None
        assert "offsets of pixels that differ by" in found.history and "too small" not in found.history
        # Without the map, offsets make the features of some frames look elongated, so that these are refused.
        before, z_before = errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], plain, least_good=0.4)
        after, z = errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)
        assert z_before > 3 and z < 1.5
        assert after < 0.5 * before

    @pytest.mark.parametrize("spread", [5, 7])
    def test_offsets_that_the_given_dark_and_flat_leave(self, patterns, shifts, spread):
        """They are added to the dark in recorded counts."""
        rng, (y, x) = np.random.default_rng(6), np.indices(SHAPE)
        offset, flat = rng.normal(0, spread, SHAPE), 0.2 + 0.8 * np.exp(-((y - 64) ** 2 + (x - 60) ** 2) / 2 / 45**2)
        frames = (
            (np.random.default_rng(5).poisson(0.2 * flat * (patterns + 60)) + 100 + offset).round().astype(np.uint16)
        )
        found = make(frames, dark=np.full(SHAPE, 100), flat=flat)
        measured = (found.dark - 100)[found.frame_mask]
        assert np.corrcoef(measured, offset[found.frame_mask])[0, 1] > 0.85
        assert measured.std() == pytest.approx(spread, rel=0.2)
        assert errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)[1] < 1.4

    @pytest.mark.parametrize("shape", [(1, SHAPE[1]), SHAPE], ids=["columns", "pixels"])
    def test_gains_are_not_taken_for_offsets_of_lines(self, patterns, shifts, shape):
        gain = 1 + 0.1 * np.random.default_rng(6).normal(size=shape)
        frames = np.random.default_rng(5).poisson(20 * gain * patterns).astype(np.uint16)
        found = make(frames)
        assert "gains of pixels that differ by" in found.history and "rows and columns" not in found.history
        assert errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)[1] < 1.5

    @pytest.mark.slow
    def test_a_clean_detector_with_little_drift_has_no_pattern(self):
        shifts = np.random.default_rng(1).normal(0, 1.3, (48, 2))
        patterns = np.stack([60 * evaluate("spots", SHAPE, shift) + 5 for shift in shifts])
        frames = np.random.default_rng(6).poisson(patterns).astype(np.uint16)
        found = make(frames)
        assert found.dark is None and found.flat is None and "too small" in found.history
        assert errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)[1] < 1.3

    @pytest.mark.slow
    def test_offsets_of_columns_become_part_of_the_dark(self, patterns, shifts):
        """All frames lie on the columns at first."""
        columns = 100 + np.random.default_rng(6).normal(0, 8, (1, SHAPE[1]))
        frames = (np.random.default_rng(5).poisson(0.2 * patterns) + columns).round().astype(np.uint16)
        plain, found = make(frames, detector_map=False), make(frames)
        assert "offsets of rows and columns that differ by" in found.history and "too small" not in found.history
        assert np.nanstd(sf.match_frames(frames, plain)["dx"]) < 0.2 * shifts[:, 1].std()
        rms, z = errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)
        assert rms < 0.06 and z < 2

    def test_pumped_frames_among_others_cost_few_pixels(self, patterns, shifts):
        """Every other frame has weaker spots, over a glow that stays. Some pixels under the glow may be lost."""
        pumped = np.where(np.arange(FRAMES)[:, None, None] % 2, 0.6 * (patterns[:FRAMES] - 15), patterns[:FRAMES] - 15)
        y, x = np.indices(SHAPE)
        glow = 60 * np.exp(-((y - 64) ** 2 + (x - 60) ** 2) / 2 / 40**2)
        frames = np.random.default_rng(5).poisson(15 + glow + pumped).astype(np.uint16)
        found = make(frames)
        assert found.frame_mask.mean() > 0.96
        assert errors_over_sigma(frames, shifts[:FRAMES], found)[1] < 1.3

    @pytest.mark.slow
    def test_a_texture_hardly_pulls_where_the_drift_is_too_little(self):
        shifts = np.random.default_rng(2).uniform(-0.3, 0.3, (48, 2))
        gain = 1 + 0.1 * np.random.default_rng(6).normal(size=SHAPE)
        patterns = np.stack([6000 * evaluate("spots", SHAPE, shift) + 300 for shift in shifts])
        frames = np.random.default_rng(5).poisson(gain * patterns).astype(np.uint16)
        found = make(frames)
        assert "; templates are smoothed by" in found.history
        (before, z_before), (after, z) = (
            errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], one) for one in (found.replace(smoothing=None), found)
        )
        assert z_before > 2.5 and z < 1.3
        assert after < 0.5 * before

    def test_too_little_drift_is_said(self, patterns):
        still = np.random.default_rng(5).poisson(np.repeat(patterns[:1], FRAMES, axis=0)).astype(np.uint16)
        assert "px is too small to tell the detector's pattern from the sample's" in make(still).history
        assert "too small" not in make(still, detector_map=False).history
        along_y = np.stack([300 * evaluate("spots", SHAPE, (y, 0)) + 15 for y in np.linspace(-5, 5, FRAMES)])
        assert "px is too small" in make(np.random.default_rng(5).poisson(along_y).astype(np.uint16)).history
        moving = np.random.default_rng(5).poisson(patterns[:FRAMES]).astype(np.uint16)
        assert "too small" not in make(moving).history

    def test_a_clean_detector_gives_the_same_reference(self, patterns):
        frames = np.random.default_rng(5).poisson(patterns[:FRAMES]).astype(np.uint16)
        assert make(frames).digest == make(frames, detector_map=False).digest

    @pytest.mark.slow
    def test_locked_frames_are_freed_though_the_one_in_the_middle_shows_another_pattern(self, patterns, shifts):
        rng, offset = np.random.default_rng(51), 150 + np.random.default_rng(71).normal(0, 20, SHAPE)
        rings = evaluate("rings", SHAPE, (0, 0))
        counts = rng.poisson(0.2 * patterns)
        counts[FRAMES // 2 - 1] = rng.poisson(10 * rings / rings.mean())
        frames = (counts + offset).round().astype(np.uint16)
        assert errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], make(frames))[1] < 1.5

    def test_bright_clusters_hold_no_frames(self, patterns, shifts):
        clusters = np.zeros(SHAPE)
        for y, x, size in ((20, 30, 9), (70, 90, 7), (100, 20, 5), (50, 55, 4)):
            clusters[y : y + size, x : x + size] = 80 * 15
        frames = np.random.default_rng(5).poisson(0.2 * patterns + clusters).astype(np.uint16)
        found = make(frames)
        assert not found.frame_mask[clusters > 0].any() and "too small" not in found.history
        assert errors_over_sigma(frames[FRAMES:], shifts[FRAMES:], found)[1] < 1.5

    @pytest.mark.slow
    def test_a_background_near_0_is_no_cluster(self):
        """Columns held faint spots on it whose dark was subtracted: most of its noise is far above its surroundings."""
        rng, (y, x) = np.random.default_rng(1), np.indices((128, 128))
        places, shifts = rng.uniform(10, 118, (30, 2)), rng.uniform(-5, 5, (48, 2))
        columns = rng.normal(0, 6, (1, 128))
        moved = [places - shift for shift in shifts]
        spots = [sum(4 * np.exp(-((y - a) ** 2 + (x - b) ** 2) / 8) for a, b in one) for one in moved]
        frames = (rng.poisson(spots) + 100 + columns + rng.normal(0, 1, (48, 128, 128))).round().astype(np.uint16)
        found = sf.make_reference(frames, use=slice(0, 32), max_shift=12, dark=np.full((128, 128), 100, np.uint16))
        assert errors_over_sigma(frames[32:], shifts[32:], found)[1] < 1.5

    def test_bright_spots_that_hardly_move_are_no_clusters(self):
        shifts = np.random.default_rng(2).uniform(-0.3, 0.3, (FRAMES + 16, 2))
        expected = np.stack([600 * evaluate("spots", SHAPE, shift) + 3 for shift in shifts])
        found = make(np.random.default_rng(5).poisson(expected).astype(np.uint16))
        assert found.frame_mask.mean() > 0.99 and "too small" in found.history

    @pytest.mark.slow
    def test_frames_that_were_lost_at_first_may_have_been_locked(self):
        """Maps bring lost frames back, but from where the columns held the others."""
        shape, frames = (256, 240), 24
        rng = np.random.default_rng(1)
        shifts = rng.uniform(-6, 6, (frames + 16, 2))
        rings = np.stack([evaluate("rings", shape, shift) for shift in shifts])
        columns = 200 + np.random.default_rng(7).normal(0, 60, (1, shape[1]))
        counts = np.random.default_rng(5).poisson(60 * rings / rings.mean()) + columns
        stack, mask = np.maximum(counts, 0).round().astype(np.uint16), np.ones(shape, bool)
        mask[103:153, :120] = False
        found = sf.make_reference(stack, mask, use=slice(0, frames), max_shift=16)
        assert "mean of 24 of 24 frames" in found.history
        assert errors_over_sigma(stack[frames:], shifts[frames:], found)[1] < 2.5
