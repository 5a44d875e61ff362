"""Noise is measured from one picture: gain and pedestal as they were put in, and pixels' variances from them."""

import numpy as np
import pytest
import scipy.ndimage

from stillframe.images.noise import Noise, measure_noise, smooth, texture_of, variance_of
from stillframe.simulation.experiment import evaluate

WHOLE = np.ones((256, 256), bool)


def slope(shape=(256, 256), low=5.0, high=200.0):
    return np.linspace(low, high, shape[1]) * np.ones(shape)


@pytest.mark.parametrize(("gain", "pedestal"), [(1.0, 0.0), (4.5, 100.0), (0.02, -7.0)])
def test_gain_and_pedestal_are_those_of_the_counts(gain, pedestal):
    counts = np.random.default_rng(0).poisson(slope())
    noise = measure_noise(gain * counts + pedestal, WHOLE)
    assert noise.gain == pytest.approx(gain, rel=0.04)
    assert noise.pedestal == pytest.approx(pedestal, abs=5 * gain)


def test_the_mean_of_frames_has_a_part_of_the_gain():
    counts = np.random.default_rng(1).poisson(slope(), (25, 256, 256)).mean(axis=0)
    assert measure_noise(counts, WHOLE).gain == pytest.approx(1 / 25, rel=0.04)


def test_noise_that_does_not_follow_the_intensity_has_no_gain():
    image = slope() + np.random.default_rng(2).normal(0, 3, (256, 256))
    gain, pedestal = measure_noise(image, WHOLE)
    assert gain == 0
    assert -pedestal == pytest.approx(9, rel=0.04)


def test_what_is_smooth_is_no_noise():
    """The fourth difference of a polynomial of third degree is 0."""
    y, x = np.mgrid[:64, :64] / 8.0
    noise = measure_noise(3 + x + y**3 + x * y**2 - x**3, np.ones((64, 64), bool))
    assert abs(noise.gain) < 1e-20
    assert abs(noise.pedestal) < 1e-18


def test_a_few_hits_and_masked_pixels_change_little():
    rng = np.random.default_rng(3)
    image, mask = rng.poisson(slope()).astype(float), rng.random((256, 256)) > 0.02
    image[rng.random(image.shape) < 1e-4] = 60_000
    image[~mask] = np.nan
    assert measure_noise(image, mask).gain == pytest.approx(1, rel=0.1)


def test_a_picture_of_few_pixels_is_taken_for_counts():
    assert measure_noise(np.eye(10), np.ones((10, 10), bool)) == Noise(1.0, 0.0)


SPOTS = 300 * evaluate("spots", (192, 200), (0, 0)) + 20


@pytest.mark.parametrize(("texture", "dose"), [(0.0, 1.0), (0.03, 1.0), (0.1, 1.0), (0.1, 0.05), (0.0, 0.05)])
def test_59_is_the_texture_of_the_detector(texture, dose):
    rng = np.random.default_rng(3)
    mean = rng.poisson(16 * dose * SPOTS * rng.normal(1, texture, SPOTS.shape)) / 16
    mask = np.ones(SPOTS.shape, bool)
    mask[80:110, :100] = False
    mean[~mask] = 0
    found = texture_of(mean, mask, Noise(1 / 16, 0.0))
    assert found == pytest.approx(texture, rel=0.3)
    assert texture_of(mean, mask, Noise(0.0, -2.0)) == 0


def test_variance_follows_the_smoothed_intensity_down_to_a_floor():
    soft = np.array([[100.0, 50.0, 10.5, 8.0]])
    variance = variance_of(soft, np.ones((1, 4), bool), Noise(2.0, 10.0))
    floor = 0.05 * np.mean([90, 40, 0.5, 0])
    np.testing.assert_allclose(variance, [[180, 80, 2 * floor, 2 * floor]])


def test_variance_is_what_frames_scatter_by():
    frames = 3.0 * np.random.default_rng(4).poisson(slope((64, 64)), (400, 64, 64)) + 20
    whole = np.ones((64, 64), bool)
    stated = variance_of(smooth(frames[0], whole, 2.0), whole, measure_noise(frames[0], whole))
    assert np.median(stated / frames.var(axis=0)) == pytest.approx(1, abs=0.15)


def test_variance_without_gain_is_the_same_everywhere():
    variance = variance_of(np.array([[1.0, 5.0]]), np.ones((1, 2), bool), Noise(0.0, -2.5))
    np.testing.assert_array_equal(variance, [[2.5, 2.5]])


def test_smoothing_is_the_weighted_mean_of_valid_pixels():
    rng = np.random.default_rng(5)
    image, mask = rng.normal(size=(30, 31)), rng.random((30, 31)) > 0.3
    impulse = np.zeros((17, 17))
    impulse[8, 8] = 1
    weights = scipy.ndimage.gaussian_filter(impulse, 1.5, mode="constant")
    around = np.s_[12 - 8 : 12 + 9, 14 - 8 : 14 + 9]
    expected = np.average(image[around], weights=weights * mask[around])
    assert smooth(image, mask, 1.5)[12, 14] == pytest.approx(expected)
