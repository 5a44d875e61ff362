import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.registration._masked_phase_cross_correlation import cross_correlate_masked

from stillframe import masked_ncc
from strategies import masked_image, seeds
from synthetic import DATA, needs_pictures, peak


def brute_force(reference, moving, reference_mask, moving_mask, lag):
    """The definition, pixel by pixel, and how many pixels it was made of."""
    pairs = [
        (reference[y, x], moving[y - lag[0], x - lag[1]])
        for y, x in np.ndindex(reference.shape)
        if 0 <= y - lag[0] < moving.shape[0] and 0 <= x - lag[1] < moving.shape[1]
        if reference_mask[y, x] and moving_mask[y - lag[0], x - lag[1]]
    ]
    if len(pairs) < 2:
        return 0.0, len(pairs)
    a, b = np.array(pairs).T
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return (float((a * b).sum() / spread) if spread > 1e-12 else 0.0), len(pairs)


def test_every_score_is_the_definition():
    rng = np.random.default_rng(1)
    reference, moving = rng.normal(size=(7, 9)), rng.normal(size=(7, 9))
    reference_mask, moving_mask = rng.random((7, 9)) > 0.2, rng.random((7, 9)) > 0.3
    ncc, lags_y, lags_x = masked_ncc(reference, moving, reference_mask, moving_mask, overlap_ratio=0.2)
    assert (lags_y[0], lags_y[-1], lags_x[0], lags_x[-1]) == (-6, 6, -8, 8)
    expected = np.array(
        [[brute_force(reference, moving, reference_mask, moving_mask, (y, x)) for x in lags_x] for y in lags_y]
    )
    enough = expected[..., 1] >= 0.2 * expected[..., 1].max()
    np.testing.assert_array_equal(np.isfinite(ncc), enough)
    np.testing.assert_allclose(ncc[enough], expected[enough, 0], atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(first=masked_image(), second=masked_image(), ratio=st.sampled_from([0.1, 0.3, 0.7]))
def test_scikit_image_gives_the_same_surface(first, second, ratio):
    (a, mask_a), (b, mask_b) = first, second
    oracle = cross_correlate_masked(a, b, mask_a, mask_b, mode="full", axes=(0, 1), overlap_ratio=ratio)
    ncc, _, _ = masked_ncc(a, b, mask_a, mask_b, overlap_ratio=ratio)
    seen = np.isfinite(ncc)
    assert not oracle[~seen].any()
    # Of a single pixel scikit-image gives its own round-off, this package 0.
    seen &= scipy.signal.correlate(mask_a.astype(int), mask_b.astype(int), method="direct") > 1
    np.testing.assert_allclose(ncc[seen], oracle[seen], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(shift=st.tuples(st.integers(-4, 4), st.integers(-4, 4)), seed=seeds)
def test_scikit_image_gives_the_same_peak(shift, seed):
    rng = np.random.default_rng(seed)
    a, mask = rng.normal(size=(20, 17)), rng.random((20, 17)) < 0.9
    b = rng.normal(0, 0.2, a.shape) + np.roll(a, shift, (0, 1))
    oracle = cross_correlate_masked(a, b, mask, mask, mode="full", axes=(0, 1), overlap_ratio=0.5)
    found, _ = peak(masked_ncc(a, b, mask, mask, overlap_ratio=0.5))
    assert found == tuple(np.unravel_index(oracle.argmax(), oracle.shape) - np.array([19, 16]))
    assert found == (-shift[0], -shift[1])


@settings(max_examples=50, deadline=None)
@given(first=masked_image(), second=masked_image(), limit=st.integers(0, 30))
def test_a_bounded_search_is_a_part_of_the_whole(first, second, limit):
    (a, mask_a), (b, mask_b) = first, second
    whole, all_y, all_x = masked_ncc(a, b, mask_a, mask_b, overlap_ratio=0)
    part, lags_y, lags_x = masked_ncc(a, b, mask_a, mask_b, max_shift=limit, overlap_ratio=0)
    assert np.abs(lags_y).max() <= limit
    here = np.ix_(np.isin(all_y, lags_y), np.isin(all_x, lags_x))
    np.testing.assert_allclose(part, whole[here], atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(first=masked_image(), second=masked_image())
def test_scores_are_bounded_and_roles_swap(first, second):
    (a, mask_a), (b, mask_b) = first, second
    forth = masked_ncc(a, b, mask_a, mask_b)
    back = masked_ncc(b, a, mask_b, mask_a)
    assert np.nanmax(np.abs(forth.ncc)) <= 1
    np.testing.assert_allclose(forth.ncc, back.ncc[::-1, ::-1], atol=1e-9)
    np.testing.assert_array_equal(forth.lags_y, -back.lags_y[::-1])


@settings(max_examples=40, deadline=None)
@given(image=masked_image(least=4))
def test_an_image_fits_itself_where_it_is(image):
    picture, mask = image
    shift, score = peak(masked_ncc(picture, picture, mask, mask, overlap_ratio=0.9))
    assert shift == (0, 0)
    assert score == pytest.approx(1)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30, -1e30])
def test_nothing_under_a_mask_is_looked_at(garbage):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 15, 12))
    mask = rng.random((15, 12)) > 0.3
    clean = masked_ncc(np.where(mask, a, 0), b, mask, mask)
    np.testing.assert_array_equal(masked_ncc(np.where(mask, a, garbage), b, mask, mask).ncc, clean.ncc)


@pytest.mark.parametrize("pedestal", [0, 1e3, 1e6])
@pytest.mark.parametrize("gain", [1, 7.5])
def test_gain_and_pedestal_change_nothing(pedestal, gain):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 15, 12))
    np.testing.assert_allclose(masked_ncc(a, gain * b + pedestal).ncc, masked_ncc(a, b).ncc, atol=1e-9)


def test_without_contrast_the_score_is_zero():
    ncc = masked_ncc(np.full((8, 8), 3), np.random.default_rng(0).normal(size=(8, 8))).ncc
    assert not ncc[np.isfinite(ncc)].any()


def test_inputs_are_never_written():
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=(9, 9)), rng.normal(size=(9, 9)), rng.random((9, 9)) > 0.2, rng.random((9, 9)) > 0.2]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    masked_ncc(*arrays)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_the_square_of_itk():
    """The example of ITK's MaskedFFTNormalizedCorrelationImageFilter test."""
    fixed, moving = np.zeros((51, 51)), np.zeros((51, 51))
    fixed[9:16, 4:11] = 255
    moving[15:22, 9:16] = 255
    valid = np.ones((51, 51), bool)
    valid[9:11, 4:6] = False
    assert peak(masked_ncc(fixed, moving, None, valid)) == ((-6, -5), pytest.approx(1))


@pytest.fixture(scope="module")
def camera():
    from PIL import Image

    return np.asarray(Image.open(DATA / "camera.png")).astype(float)


@pytest.fixture(scope="module")
def moved(camera):
    return np.real(np.fft.ifft2(scipy.ndimage.fourier_shift(np.fft.fft2(camera), (-7, 12))))


@needs_pictures
class TestCamera:
    """The facts that scikit-image's own tests of its masked registration state."""

    def test_all_valid(self, camera, moved):
        assert peak(masked_ncc(camera, moved, overlap_ratio=0.1))[0] == (7, -12)

    def test_random_masks(self, camera, moved):
        rng = np.random.default_rng(0)
        masks = rng.choice([False, True], size=(2, *camera.shape), p=[0.25, 0.75])
        assert peak(masked_ncc(camera, moved, *masks, overlap_ratio=0.3))[0] == (7, -12)

    def test_cropped_from_corner_to_corner(self, camera, moved):
        assert peak(masked_ncc(camera, moved[64:-64, 64:-64], overlap_ratio=0.1))[0] == (71, 52)

    def test_with_itself_at_the_centre(self, camera):
        assert peak(masked_ncc(camera, camera)) == ((0, 0), pytest.approx(1))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((np.ones((4, 4), complex), np.ones((4, 4))), TypeError, "the reference has dtype complex128"),
        ((np.ones((4, 4)), np.array([[None]])), TypeError, "the moving image has dtype object"),
        ((np.ones(4), np.ones((4, 4))), ValueError, r"shape \(4,\), but \(y, x\) is needed"),
        ((np.ones((4, 0)), np.ones((4, 4))), ValueError, "no pixel"),
        ((np.ones((4, 4)), np.ones((4, 4)), np.ones((4, 5), bool)), ValueError, r"has shape \(4, 5\) but"),
        ((np.ones((4, 4)), np.ones((4, 4)), None, np.zeros((4, 4), bool)), ValueError, "False everywhere"),
        ((np.ones((4, 4)), np.ones((4, 4)), np.arange(16).reshape(4, 4)), ValueError, "15 different values"),
        ((np.full((4, 4), np.nan), np.ones((4, 4))), ValueError, "16 valid pixels that are NaN"),
    ],
)
def test_bad_input_is_told(arguments, error, words):
    with pytest.raises(error, match=words):
        masked_ncc(*arguments)


@pytest.mark.parametrize(("option", "words"), [({"max_shift": -1}, "negative"), ({"overlap_ratio": 2}, "fraction")])
def test_bad_options_are_told(option, words):
    with pytest.raises(ValueError, match=words):
        masked_ncc(np.eye(4), np.eye(4), **option)
