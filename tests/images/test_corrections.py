"""Dark and flat: equation (49) against plain NumPy, and which pixels are left out."""

import numpy as np
import pytest

from stillframe.images.corrections import Corrections

SHAPE = (24, 31)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def dark(rng):
    return rng.integers(0, 40, SHAPE).astype(np.uint16)


@pytest.fixture
def flat(rng):
    return rng.uniform(50.0, 150.0, SHAPE)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "u8", "f4", "f8"])
def test_equation_49_for_every_dtype(dtype, rng, dark, flat):
    frame = rng.integers(0, 120, SHAPE).astype(dtype)
    expected = (frame.astype(float) - dark) / (flat / flat.mean())
    found = Corrections.of(dark, flat).corrected(frame)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_counts_below_the_dark_do_not_wrap_around(dark):
    corrected = Corrections.of(dark, None).corrected(np.zeros(SHAPE, np.uint16))
    np.testing.assert_array_equal(corrected, -dark.astype(np.float32))


def test_a_large_pedestal_of_wide_integers_costs_no_precision():
    dark = np.full(SHAPE, 2**24, np.int32)
    np.testing.assert_array_equal(Corrections.of(dark, None).corrected(dark + 1), np.ones(SHAPE))


def test_only_the_one_that_is_given_is_applied(rng, dark, flat):
    frame = rng.integers(0, 120, SHAPE).astype(np.uint16)
    np.testing.assert_array_equal(Corrections.of(dark, None).corrected(frame), frame.astype(float) - dark)
    np.testing.assert_allclose(Corrections.of(None, flat).corrected(frame), frame * flat.mean() / flat, rtol=1e-5)


def test_the_largest_recorded_pixel_comes_with_the_frame(rng, dark):
    frame = rng.integers(0, 120, SHAPE).astype(np.uint16)
    frame[3, 4] = 65535
    assert Corrections.of(dark, None).correct(frame).largest == 65535


def test_the_flat_is_scaled_over_valid_pixels(rng, flat):
    mask = rng.random(SHAPE) < 0.8
    flat[~mask] = 1e6
    gain = Corrections.of(None, flat, mask).gain
    assert gain[mask].mean() == pytest.approx(1)


def test_pixels_that_cannot_be_corrected_are_not_usable(dark, flat):
    flat[2, 3], flat[4, 5], flat[6, 7], flat[8, 9] = np.nan, 0, -3, 0.05 * flat.mean()
    dark[10, 11] = 65535
    found = Corrections.of(dark, flat)
    expected = np.ones(SHAPE, bool)
    expected[[2, 4, 6, 8, 10], [3, 5, 7, 9, 11]] = False
    np.testing.assert_array_equal(found.usable, expected)
    assert np.isfinite(found.corrected(np.ones(SHAPE, np.uint16))).all()
    assert found.gain[expected].mean() == pytest.approx(1)


def test_a_stated_limit_holds_for_the_dark():
    dark = np.zeros(SHAPE)
    dark[1, 2], dark[3, 4] = 4000, np.inf
    assert np.argwhere(~Corrections.of(dark, None, saturation=4000).usable).tolist() == [[1, 2], [3, 4]]


def test_usable_pixels_are_chosen_again(flat):
    """References are made anew from their own mask, and must keep it."""
    flat[:3] *= 0.115
    first = Corrections.of(None, flat)
    again = Corrections.of(None, flat, first.usable)
    assert np.count_nonzero(~first.usable) > 0
    np.testing.assert_array_equal(again.usable, first.usable)
    np.testing.assert_array_equal(again.gain, first.gain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((3, 4)), np.ones((4, 3))), r"the flat image has shape \(4, 3\)"),
        ((np.zeros((3, 4)), None, np.ones((4, 3), bool)), r"the dark image has shape \(3, 4\)"),
        ((np.full((3, 4), 255, np.uint8), None), "can be used at 0 of 12 valid pixels"),
        ((None, np.where(np.arange(12).reshape(3, 4) < 7, -1.0, 1.0)), "can be used at 5 of 12 valid pixels"),
        ((np.zeros((2, 3, 4)), None), r"\(y, x\) is needed"),
    ],
)
def test_images_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Corrections.of(*arguments)
