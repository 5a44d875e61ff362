import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.images.resample import check_fill, output_dtype, resample_frames, taps
from strategies import seeds
from synthetic import texture

SMOOTH = ("linear", "cubic", "lanczos")


def moved(frame, shift, mask, fill):
    """Whole-pixel motion, pixel by pixel."""
    out = np.full(frame.shape, fill, dtype=np.result_type(frame, type(fill)))
    for y, x in np.ndindex(frame.shape):
        source = y - shift[0], x - shift[1]
        if 0 <= source[0] < frame.shape[0] and 0 <= source[1] < frame.shape[1] and mask[source]:
            out[y, x] = frame[source]
    return out


@settings(max_examples=60, deadline=None)
@given(
    shift=st.tuples(st.integers(-14, 14), st.integers(-14, 14)),
    interpolation=st.sampled_from(["nearest", *SMOOTH]),
    seed=seeds,
)
def test_whole_shifts_copy(shift, interpolation, seed):
    rng = np.random.default_rng(seed)
    frame, mask = rng.poisson(50, size=(11, 13)).astype(np.float64), rng.random((11, 13)) > 0.2
    out = resample_frames(frame[None], [shift], mask, interpolation=interpolation)
    np.testing.assert_array_equal(out[0], moved(frame, shift, mask, np.nan))


def test_nearest_keeps_integers_and_counts():
    frames = np.random.default_rng(0).poisson(50, size=(2, 11, 13)).astype(">u2")
    out = resample_frames(frames, [(2, -3), (1.4, -2.6)], np.ones((11, 13), bool), interpolation="nearest", fill=9)
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(out[0], moved(frames[0], (2, -3), np.ones((11, 13), bool), 9))
    np.testing.assert_array_equal(out[1], moved(frames[1], (1, -3), np.ones((11, 13), bool), 9))


@settings(max_examples=60, deadline=None)
@given(
    shift=st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
    interpolation=st.sampled_from(["nearest", *SMOOTH]),
    seed=seeds,
)
def test_a_masked_pixel_touches_no_valid_one(shift, interpolation, seed):
    """Whatever lies under the mask, the result is the same."""
    rng = np.random.default_rng(seed)
    frame, mask = rng.normal(size=(24, 21)), rng.random((24, 21)) > 0.05
    results = [
        resample_frames(np.where(mask, frame, value)[None], [shift], mask, interpolation=interpolation)
        for value in (0, 1e30, np.nan)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("interpolation", SMOOTH)
def test_only_what_a_masked_pixel_contributes_to_is_lost(interpolation):
    mask = np.ones((24, 24), bool)
    mask[12, 12] = False
    out = resample_frames(np.ones((1, 24, 24)), [(0.5, 0.0)], mask, interpolation=interpolation)[0]
    lost = {"linear": 2, "cubic": 4, "lanczos": 8}[interpolation]
    assert np.count_nonzero(np.isnan(out[8:17])) == lost


@pytest.mark.parametrize("interpolation", SMOOTH)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_weights_sum_to_one_and_shift_a_slope_exactly(interpolation, fraction):
    first, weights = taps(fraction, interpolation)
    assert weights.sum() == pytest.approx(1)
    position = (first + np.arange(len(weights))) @ weights
    assert position == pytest.approx(fraction, abs=1e-12 if interpolation != "lanczos" else 0.02)


@pytest.mark.parametrize(("interpolation", "most"), [("linear", 3.0), ("cubic", 0.6), ("lanczos", 0.15)])
def test_a_band_limited_picture_is_moved_closely(interpolation, most):
    y, x = np.mgrid[:60, :60]

    def wave(y, x):
        return 100 + 20 * np.sin(2 * np.pi * y / 9) + 20 * np.cos(2 * np.pi * x / 11)

    out = resample_frames(wave(y, x)[None], [(0.3, -1.6)], np.ones(y.shape, bool), interpolation=interpolation)[0]
    np.testing.assert_allclose(out[6:-6, 6:-6], wave(y - 0.3, x + 1.6)[6:-6, 6:-6], atol=most)


def test_a_frame_without_shift_is_fill_alone():
    frames = texture((12, 12)).astype(np.float32)[None]
    assert np.isnan(resample_frames(frames, [(np.nan, 0)], np.ones((12, 12), bool))).all()


def test_a_frame_moved_off_the_detector_is_fill_alone():
    out = resample_frames(np.ones((1, 8, 9), np.uint8), [(-30, 2)], np.ones((8, 9), bool), interpolation="nearest")
    assert not out.any()


@pytest.mark.parametrize(
    ("dtype", "interpolation", "expected"),
    [
        ("u2", "nearest", "u2"),
        ("?", "nearest", "u1"),
        (">f2", "nearest", "f4"),
        ("g", "linear", "f8"),
        ("u2", "linear", "f4"),
        ("i4", "cubic", "f8"),
        ("f4", "nearest", "f4"),
        ("f8", "linear", "f8"),
    ],
)
def test_dtype_of_the_result(dtype, interpolation, expected):
    assert output_dtype(np.dtype(dtype), interpolation) == np.dtype(expected)
    out = resample_frames(np.ones((1, 8, 8), dtype), [(0.2, 0)], np.ones((8, 8), bool), interpolation=interpolation)
    assert out.dtype == np.dtype(expected)


def test_fill_that_the_dtype_cannot_hold_is_refused():
    assert check_fill(None, np.dtype("u2")) == 0
    for wrong in (-1, 0.5, 70000, np.nan):
        with pytest.raises(ValueError, match="cannot hold"):
            check_fill(wrong, np.dtype("u2"))


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match="Choose one of nearest, linear"):
        resample_frames(np.ones((1, 8, 8)), [(0, 0)], np.ones((8, 8), bool), interpolation="spline")
    with pytest.raises(ValueError, match="give \\(frame, 2\\)"):
        resample_frames(np.ones((2, 8, 8)), [(0, 0)], np.ones((8, 8), bool))


def peaks(shifts, width=2.0, size=48):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.stack([np.exp(-((y + dy) ** 2 + (x + dx) ** 2) / (2 * width**2)) for dy, dx in shifts])


@pytest.mark.parametrize("interpolation", ["nearest", *SMOOTH])
def test_flux_is_conserved(interpolation):
    shifts = np.random.default_rng(0).uniform(-3, 3, (40, 2))
    laid = resample_frames(peaks(shifts), shifts, np.ones((48, 48), bool), interpolation=interpolation)
    flux = laid[:, 12:-12, 12:-12].sum(axis=(1, 2))
    np.testing.assert_allclose(flux, peaks([(0, 0)]).sum(), rtol=2e-3)


@pytest.mark.parametrize(
    ("interpolation", "most"), [("nearest", 0.02), ("linear", 0.03), ("cubic", 0.002), ("lanczos", 0.002)]
)
def test_peaks_of_the_mean_are_widened_as_documented(interpolation, most):
    shifts = np.random.default_rng(0).uniform(-3, 3, (200, 2))
    laid = resample_frames(peaks(shifts), shifts, np.ones((48, 48), bool), interpolation=interpolation)
    x = np.arange(12, 36) - 23.5
    profiles = laid.mean(axis=0)[12:36, 12:36].sum(axis=0), peaks([(0, 0)])[0][12:36, 12:36].sum(axis=0)
    width, true = (np.sqrt((profile * x**2).sum() / profile.sum()) for profile in profiles)
    assert -0.002 < width / true - 1 < most


@pytest.mark.parametrize(
    ("interpolation", "variance"), [("nearest", 1.0), ("linear", 0.44), ("cubic", 0.66), ("lanczos", 0.83)]
)
def test_noise_is_changed_as_documented(interpolation, variance):
    rng = np.random.default_rng(0)
    shifts = rng.uniform(-3, 3, (200, 2))
    laid = resample_frames(rng.normal(size=(200, 48, 48)), shifts, np.ones((48, 48), bool), interpolation=interpolation)
    assert laid[:, 12:-12, 12:-12].var() == pytest.approx(variance, abs=0.06)


@pytest.mark.parametrize("interpolation", SMOOTH)
def test_integers_moved_by_fractions_keep_their_sum_however_few_there_are(interpolation):
    """Rounding each value to the nearest sixteenth would lose a quarter of the lone photons."""
    rng = np.random.default_rng(0)
    frames = rng.poisson(0.01, (4, 512, 512)).astype(np.uint16)
    frames[:, :8], frames[:, -8:], frames[:, :, :8], frames[:, :, -8:] = 0, 0, 0, 0
    moves = [(0.5, 0.5), (0.03, 0.03), (-0.3, 0.0), (2.5, -1.2)]
    out = resample_frames(frames, moves, np.ones((512, 512), bool), interpolation=interpolation, fill=0)
    exact = resample_frames(
        frames.astype(np.float32), moves, np.ones((512, 512), bool), interpolation=interpolation, fill=0
    )
    assert np.array_equal(out * 16, np.rint(out * 16))
    assert np.abs(out - exact).max() < 1 / 16
    np.testing.assert_allclose(out.sum(axis=(1, 2)), frames.sum(axis=(1, 2)), rtol=0.02)
    error = (out - exact)[exact != np.rint(exact)]
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
    np.testing.assert_array_equal(
        out, resample_frames(frames, moves, np.ones((512, 512), bool), interpolation=interpolation, fill=0)
    )


def test_a_shift_that_is_whole_but_for_rounding_loses_no_row_to_it():
    frame = np.arange(30.0).reshape(1, 5, 6)
    out = resample_frames(frame, [(1e-17, 0)], np.ones((5, 6), bool), interpolation="cubic")
    np.testing.assert_array_equal(out, frame)
