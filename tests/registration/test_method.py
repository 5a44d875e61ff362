"""The equations of METHOD.md, by their numbers: what the code computes against what they say, written plainly."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from oracle import Oracle, borne, interpolated, lagrange, moved, shared_noise, smoothed
from stillframe import Reference, masked_ncc, match_frames
from stillframe.images.hot_pixels import isolated_pixels, with_small_holes_filled
from stillframe.images.noise import Noise, residual_limit
from stillframe.images.resample import resample_frames, taps
from stillframe.images.run_lengths import RowRuns
from stillframe.images.statistics import statistics
from stillframe.registration.acceptance import least_score, least_significance
from stillframe.registration.coarse_search import _vertex
from stillframe.registration.equations import newton
from stillframe.registration.exact_search import ExactSearch, Tiles
from stillframe.registration.local_changes import without_local_changes
from stillframe.registration.masked_ncc import Correlator, Lags
from stillframe.registration.peak import _Surface, find_peak, find_peaks
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.refine import _central_square, reference_noise_in_residuals, refine
from stillframe.registration.template_draft import Draft, Smoothed
from stillframe.simulation.experiment import Experiment, evaluate
from synthetic import blocked, texture, windows


def test_equation_4_gives_the_shortest_length_without_aliases():
    """Images of 56 pixels and shifts of ±8 fit a transform of 64, and of no less."""
    a, b = np.random.default_rng(0).normal(size=(2, 56, 56))
    whole = scipy.signal.correlate(a, b)[55 - 8 : 55 + 9, 55 - 8 : 55 + 9]
    lags = [Lags.between(56, 56, 8)] * 2
    assert lags[0].fft_length(56, 56) == 64
    correlate = Correlator(a.shape, b.shape, lags)
    np.testing.assert_allclose(correlate(correlate.spectrum(a), correlate.spectrum(b)), whole, atol=1e-10)
    correlate.shape = [63, 63]
    assert np.abs(correlate(correlate.spectrum(a), correlate.spectrum(b)) - whole).max() > 1e-3


def test_equation_5_sums_the_frame_over_the_moved_mask():
    rng = np.random.default_rng(1)
    image, frame, mask = rng.normal(size=(30, 34)), rng.normal(size=(30, 34)), blocked((30, 34), bad=0.05)
    search = ExactSearch(image, mask, mask, 7, 0.3)
    padded, blocks = search._centre_frame(frame, mask, statistics(frame, RowRuns.of(mask), np.inf))
    clean = np.where(mask, (frame - frame[mask].mean()) / frame[mask].std(), 0)
    for power, sums in zip((1, 2), search._window_sums(padded, blocks), strict=True):
        expected = [[np.sum(mask * moved(clean**power, y, x)) for x in range(-7, 8)] for y in range(-7, 8)]
        np.testing.assert_allclose(sums, expected, atol=1e-4)


def test_equation_6_sums_products_over_tiles(monkeypatch):
    monkeypatch.setattr("stillframe.registration.exact_search._TILE", 40)
    image, frame = np.random.default_rng(2).normal(size=(2, 61, 70))
    found = Tiles(image, 5, np.dtype(np.float64)).correlate(np.pad(frame, 5))
    expected = [[np.sum(image * moved(frame, y, x)) for x in range(-5, 6)] for y in range(-5, 6)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_equation_7_smooths_where_scores_are_defined():
    ncc = np.random.default_rng(3).normal(size=(25, 25)) * 0.05
    ncc[12, 12], ncc[5, 18], ncc[:3] = 0.9, 0.6, np.nan
    valid = np.isfinite(ncc)
    total, weight = (
        scipy.ndimage.gaussian_filter(one, 1.5, mode="nearest") for one in (np.where(valid, ncc, 0), valid * 1.0)
    )
    soft = total / weight
    found = find_peak(ncc, np.ones_like(ncc), 0, 1.5)
    assert found.shift == (0, 0)
    assert (found.score, found.second_score) == (0.9, 0.6)
    assert found.lead == pytest.approx(top(soft, 12, 12) - top(soft, 5, 18))
    assert abs(found.lead - (soft[12, 12] - soft[5, 18])) > 1e-4


def top(scores, row, column):
    """The height of a maximum with the vertices of the parabolas along both axes, equation (50)."""
    height = scores[row, column]
    for low, high in ((scores[row - 1, column], scores[row + 1, column]), (scores[row, column - 1 :: 2][:2])):
        height += (low - high) ** 2 / (8 * (2 * scores[row, column] - low - high))
    return height


def test_equation_50_is_exact_for_paraboloids():
    y, x = np.mgrid[-8:9, -8:9]
    surface = 0.8 - 0.01 * (y - 2.3) ** 2 - 0.02 * (x + 4.4) ** 2
    (found,) = find_peaks(surface, np.ones_like(surface), 0, 0.0, 5)
    assert found.shift == (2, -4)
    assert _Surface.of(surface, surface, 0, 0.0).heights.max() == pytest.approx(0.8)


@pytest.mark.parametrize("vertex", [-0.5, -0.2, 0.0, 0.31, 0.5])
def test_equation_8_is_exact_for_parabolas(vertex):
    assert _vertex(1 - 0.3 * (np.array([-1.0, 0.0, 1.0]) - vertex) ** 2) == pytest.approx(vertex)


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.9])
def test_equation_9_is_the_scatter_of_scores(correlation):
    rng = np.random.default_rng(4)
    a, noise = rng.normal(size=(2, 800, 16, 16))
    b = correlation * a + np.sqrt(1 - correlation**2) * noise
    scores = [masked_ncc(one, other, max_shift=0).ncc.item() for one, other in zip(a, b, strict=True)]
    assert np.std(scores) == pytest.approx((1 - correlation**2) / 16, rel=0.1)


@pytest.mark.parametrize("lags", [1, 289, 4225])
@pytest.mark.parametrize("pixels", [2_000, 1_000_000])
def test_equations_10_and_11_keep_the_chance_of_a_false_alarm(lags, pixels):
    """A score of n independent values follows Student's distribution exactly."""
    assert scipy.stats.norm.sf(least_significance(lags)) * lags == pytest.approx(1e-6)
    score = least_score(pixels, lags)
    student = score * np.sqrt((pixels - 2) / (1 - score**2))
    assert 0.7e-6 < scipy.stats.t.sf(student, pixels - 2) * lags < 1.01e-6


def test_equation_11_is_the_scatter_of_scores_of_noise():
    rng = np.random.default_rng(5)
    image = texture((40, 40))
    surfaces = np.stack([masked_ncc(image, rng.normal(size=(40, 40)), max_shift=2).ncc for _ in range(300)])
    assert surfaces[:, 2, 2].std() * np.sqrt(1598) == pytest.approx(1, rel=0.12)
    assert surfaces.max() < least_score(36 * 36, 25)


@pytest.mark.parametrize("deviations", [3.5, 5.0, 8.0])
@pytest.mark.parametrize("counts", [0.1, 1.0, 20.0, 1000.0])
def test_equation_17_is_no_more_often_exceeded_by_counts_than_by_normal_noise(deviations, counts):
    limit = 2.5 * counts + residual_limit(np.array(2.5**2 * counts), 2.5, deviations)
    exceeded = scipy.stats.poisson.sf(np.floor(limit / 2.5), counts)
    assert exceeded < 1.2 * scipy.stats.norm.sf(deviations)
    if counts == 1000:
        assert exceeded > 0.8 * scipy.stats.norm.sf(deviations)


def test_equation_18_finds_pixels_alone():
    rng = np.random.default_rng(6)
    image, mask = rng.poisson(20.0, (40, 44)).astype(float), blocked((40, 44), bad=0.05)
    image += 300 * np.exp(-((np.arange(44) - 30) ** 2 + (np.arange(40)[:, None] - 9) ** 2) / 1.5)
    for place in ((3, 3), (12, 40), (12, 41), (30, 9), (31, 9), (31, 10), (38, 20), (0, 43)):
        image[place] = 900
    soft = smoothed(image, mask, 4.0)
    limit = 8 * np.sqrt(np.maximum(soft, 0.05 * soft[mask].mean())) + (64 - 1) / 6
    expected = np.zeros_like(mask)
    for y, x in np.argwhere(mask & (image - np.minimum(soft, np.median(image[mask])) > limit)):
        around = np.s_[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        values = image[around][mask[around]]
        ground = np.median(values)
        height = image[y, x] - ground
        near = np.count_nonzero(values - ground > 0.1 * height)
        expected[y, x] = height > limit[y, x] and near < 3 and len(values) > 8
    assert 4 <= np.count_nonzero(expected) < 10
    np.testing.assert_array_equal(isolated_pixels(image, mask, Noise(1.0, 0.0)), expected)


class Scene:
    """A noisy reference and a frame of the same pattern, with a hit in it, and what the code makes of them."""

    shift = np.array([2.3, -1.4])

    def __init__(self, shape, pattern, dose, side, width=2.0, blur=0.0):
        options = {"pattern": pattern, "dead_pixels": 1e-5, "hot_pixels": 1e-5, "seed": 3}
        detector = Experiment(frames=1, shape=shape, dose=100.0, **options).detector
        rng = np.random.default_rng(5)
        image = rng.poisson(detector.see(dose * evaluate(pattern, shape, (0, 0)))).astype(float)
        frame = rng.poisson(detector.see(100 * evaluate(pattern, shape, self.shift))) + 20.0
        row, column = int(0.42 * shape[0]), int(0.7 * shape[1])
        frame[row : row + 2, column] += 3000
        self.frame = scipy.ndimage.gaussian_filter(frame, blur)
        self.reference = Reference(image, detector.mask, max_shift=6, noise=(1, 0), smoothing=width)
        self.prepared = prepare(self.reference)
        self.template, trusted = self.prepared.template, self.prepared.trusted.mask
        surveyed = self.prepared.survey(self.frame)
        self.estimate = refine(surveyed.single, surveyed.valid, (2, -1), self.template, self.prepared.score_image)
        self.oracle = Oracle(image, trusted, 1.0, 0.0, width, side, self.template.square)
        self.expected = self.oracle.solve(self.frame, detector.mask, (2, -1))
        assert self.template.side == side


@pytest.fixture(
    scope="module",
    params=[
        ((96, 100), "rings", 100.0, 1),
        ((96, 100), "spots", 300.0, 1),
        ((340, 330), "rings", 100.0, 2),
        ((260, 270), "spots", 100.0, 1),
    ],
    ids=str,
)
def scene(request):
    return Scene(*request.param)


def assert_same_covariance(scene, within):
    expected = scene.expected.covariance[:2, :2]
    np.testing.assert_allclose(scene.estimate.covariance, expected, atol=within * expected.max())
    assert scene.estimate.significance == pytest.approx(scene.expected.significance, rel=within)


@pytest.mark.slow
def test_equations_22_to_37_in_bins_of_four():
    scene = Scene((720, 700), "rings", 300.0, 4)
    test_equation_22_is_solved(scene)
    test_equations_34_and_35_are_the_covariance(scene)
    test_equations_36_and_37_are_the_noise_of_the_reference(scene)


def test_equations_20_to_24_are_the_model_at_lags(scene):
    model = scene.oracle.model(scene.oracle.support)
    assert scene.template.whole.count == np.count_nonzero(scene.oracle.support)
    np.testing.assert_allclose(scene.template.whole.model, model, atol=1e-6 * np.abs(model).max())
    np.testing.assert_allclose(scene.template.whole.shared, scene.oracle.shared, rtol=1e-6, atol=1e-3)


def test_equation_55_fills_small_holes(scene):
    trusted = scene.prepared.trusted.mask
    image = np.where(trusted, scene.reference.image - scene.oracle.level, 0)
    found, known = with_small_holes_filled(image, trusted)
    np.testing.assert_array_equal(known, scene.oracle.mask)
    np.testing.assert_allclose(found, scene.oracle.image, atol=1e-9 * np.abs(image).max())


def test_equation_22_is_solved(scene):
    """With (26) to (33): the same outliers, gain, offset and noise, and the shift to a ten-millionth of a pixel."""
    found, expected = scene.estimate, scene.expected
    assert expected.outliers > 0
    np.testing.assert_allclose(found.shift, expected.shift, atol=1e-7)
    assert found.gain == pytest.approx(expected.gain, rel=1e-6)
    assert found.offset == pytest.approx(expected.offset, abs=1e-4)
    assert found.variance == pytest.approx(expected.variance, rel=2e-3)


def test_equations_34_and_35_are_the_covariance(scene):
    assert_same_covariance(scene, within=3e-3)


def test_equations_36_and_37_are_the_noise_of_the_reference(scene):
    wander, common = scene.oracle.wander(), scene.oracle.common()
    np.testing.assert_allclose(scene.template.wander, wander, atol=1e-3 * wander.max())
    np.testing.assert_allclose(scene.template.common, common, atol=1e-5 * common.max())


def test_equation_38_counts_what_neighbours_share():
    scene = Scene((96, 100), "rings", 100.0, 1, blur=0.75)
    assert scene.expected.inflation > 3
    assert_same_covariance(scene, within=0.01)


def test_equations_39_and_40_are_the_mismatch(scene):
    amounts = [one.amount for one in scene.template.structures]
    assert amounts == pytest.approx(list(scene.oracle.structures()), rel=1e-5)
    # The difference of two sums of noise: single precision leaves two or three digits of it.
    assert scene.estimate.mismatch == pytest.approx(scene.expected.mismatch, rel=0.05, abs=1e-4)


def test_equation_25_is_the_variance_that_is_expected(scene):
    oracle = scene.oracle
    smoothed_reference = Smoothed.of(oracle.image, oracle.mask, Noise(1.0, -oracle.level), 2.0)
    draft, square = Draft.of(smoothed_reference, oracle.side), scene.template.square
    draft = without_local_changes(draft, square) if square else draft
    assert draft.expected_variance() == pytest.approx(oracle.expected_variance(), rel=1e-9)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_equation_24_is_the_mean_over_noise(side):
    """Σ T_k(p) η(p + u) of pictures of nothing but noise η, whose templates hold that noise."""
    rng, size, width = np.random.default_rng(7), 64, 1.5
    sums, bins = [], (size // side - 8) ** 2
    inner = np.s_[4:-4, 4:-4]

    def means(image):
        return image.reshape(size // side, side, size // side, side).mean(axis=(1, 3))[inner]

    for _ in range(300):
        noise = rng.normal(size=(size, size))
        soft = scipy.ndimage.gaussian_filter(noise, width)
        templates = means((moved(soft, 1, 0) - moved(soft, -1, 0)) / 2), means(soft)
        lags = [means(moved(noise, y, 0)) for y in (-2, -1, 0, 1, 2)]
        sums.append([[np.sum(template * lag) for lag in lags] for template in templates])
    weight = side**2  # one over the variance of a bin's mean
    expected = shared_noise(width, bins, side)[[0, 2]][:, 1:-1, 3]
    error = weight * np.std(sums, axis=0) / np.sqrt(300)
    assert (np.abs(weight * np.mean(sums, axis=0) - expected) < 4 * error).all()
    assert np.abs(expected).max() > 8 * error.max()


def test_equation_29_recovers_the_parameters_of_a_known_model():
    rng = np.random.default_rng(8)
    model = scipy.ndimage.gaussian_filter(rng.normal(size=(4, 7, 7)), (0, 2, 2))
    model += np.reshape([1, 2, 30, 4], (4, 1, 1))
    slopes = np.arange(-3, 4.0)
    model[0] += 20 * slopes[:, None]
    model[1] += 17 * slopes
    totals, true = np.array([0.3, -0.2, 5.0, 9.0]), np.array([0.37, -0.22, 1.6, 12.0])
    data = true[2] * interpolated(model, *true[:2]) + true[3] * totals
    values, jacobian, good = newton(model, totals, data, np.array([0.0, 0.0, 1.0, 0.0]))
    assert good
    np.testing.assert_allclose(values, true, rtol=1e-9)
    here, step = interpolated(model, *true[:2]), 1e-6
    along = [(interpolated(model, *(true[:2] + move)) - here) / step for move in ((step, 0), (0, step))]
    expected = np.stack([true[2] * along[0], true[2] * along[1], here, totals], axis=1)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-4, atol=1e-4)


def test_equation_23_interpolates_polynomials_exactly():
    powers = np.arange(7)
    model = np.power.outer(np.arange(-3.0, 4), powers).T[:, :, None] * np.ones(7)
    for fraction in (-1.4, -0.3, 0.0, 0.55):
        np.testing.assert_allclose(np.einsum("kij,i,j->k", model, lagrange(fraction), lagrange(0.2)), fraction**powers)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_equation_30_is_the_noise_of_the_moved_reference(side):
    for fraction in ((0, 0), (0.5, 0), (0.3, -0.4), (-0.5, 0.5)):
        assert reference_noise_in_residuals(np.array(fraction, float), side) == pytest.approx(borne(*fraction, side))


@pytest.mark.parametrize("kept", [0.75, 0.91, 0.97])
def test_equation_33_is_the_mean_square_of_what_is_kept(kept):
    values = np.sort(np.abs(np.random.default_rng(9).normal(size=400_000)))[: int(kept * 400_000)]
    assert _central_square(kept) == pytest.approx(np.mean(values**2), rel=0.01)


def test_equation_43_is_the_score_at_the_nearest_whole_pixels():
    frames, mask = windows((96, 80), [(0, 0), (3, -5), (-8, 8), (7, 2)]), blocked((96, 80))
    reference = Reference(frames[0], mask, max_shift=12)
    for frame, match in zip(frames, match_frames(frames, reference), strict=True):
        ncc, lags_y, lags_x = masked_ncc(frames[0], frame, prepare(reference).trusted.mask, mask, max_shift=12)
        row, column = np.searchsorted(lags_y, round(match["dy"])), np.searchsorted(lags_x, round(match["dx"]))
        assert match["score"] == pytest.approx(ncc[row, column], abs=1e-5)


@pytest.mark.parametrize(("dtype", "rounded"), [("u4", np.ceil), ("f8", float)])
def test_equation_44_cuts_what_is_far_too_bright(dtype, rounded):
    frames, mask = windows((96, 80), [(0, 0), (3, -5)]).astype(dtype), blocked((96, 80))
    frames[1, 20, 60] = 1e6
    reference = Reference(frames[0], mask, max_shift=12)
    low, high, top = np.quantile(frames[0][prepare(reference).trusted.mask], (0.5, 0.97, 1.0))
    own_low, own_high = np.quantile(frames[1][mask], (0.5, 0.97))
    ceiling = rounded(own_low + (own_high - own_low) * (2 * (top - low) / (high - low) + 8))
    ncc = masked_ncc(frames[0], np.minimum(frames[1], ceiling), prepare(reference).trusted.mask, mask, max_shift=12).ncc
    assert ceiling < 0.01 * frames.max()
    assert match_frames(frames[1:], reference)["score"][0] == pytest.approx(ncc[15, 7], abs=1e-5)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.83])
def test_equation_47_is_the_filter(fraction):
    """Where the reach of h holds no more than its taps, they are h at the distances of the pixels."""

    def cubic(t):
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2

    first, weights = taps(fraction, "cubic")
    np.testing.assert_allclose(weights, [cubic(abs(first + k - fraction)) for k in range(4)], atol=1e-12)
    first, weights = taps(fraction, "lanczos")
    distances = first + np.arange(8) - fraction
    expected = np.sinc(distances) * np.sinc(distances / 4)
    np.testing.assert_allclose(weights, expected / expected.sum(), atol=1e-12)


def test_equation_48_rounds_without_bias():
    """Frames of 0 and 1 moved by 0.3 px have fractions of 0.3 count between them."""
    frames = np.tile(np.array([0, 1], np.uint16), (1, 300, 150))
    (moved_frame,) = resample_frames(frames, [(0, -0.3)], np.ones((300, 300), bool), interpolation="linear")
    values = moved_frame[:, :-1:2].astype(float)
    np.testing.assert_array_equal(values * 16, np.rint(values * 16))
    assert values.mean() == pytest.approx(0.3, abs=4 / np.sqrt(1024 * values.size))
    assert 0.5 / 1024 < values.var() <= 1.05 / 1024
