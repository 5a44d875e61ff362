"""A hit is an isolated pixel; features of the pattern have neighbours."""

import numpy as np
import pytest

from stillframe.images.hot_pixels import isolated_pixels
from stillframe.images.noise import Noise

COUNTS = Noise(1.0, 0.0)


def ground(level=20.0, shape=(96, 96), seed=0):
    return np.random.default_rng(seed).poisson(level, shape).astype(float)


@pytest.mark.parametrize("height", [300, 5000, 65534])
@pytest.mark.parametrize("pixels", [[(40, 50)], [(40, 50), (40, 51)], [(0, 0)], [(95, 3), (40, 50), (10, 90)]])
def test_one_or_two_pixels_alone_are_found(height, pixels):
    image = ground()
    for place in pixels:
        image[place] = height
    isolated = isolated_pixels(image, np.ones(image.shape, bool), COUNTS)
    assert sorted(map(tuple, np.argwhere(isolated).tolist())) == sorted(pixels)


@pytest.mark.parametrize("width", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("height", [300.0, 20000.0])
def test_a_spot_however_sharp_is_none(width, height):
    y, x = np.mgrid[:96, :96]
    spot = height * np.exp(-((y - 40.2) ** 2 + (x - 50.4) ** 2) / (2 * width**2))
    image = np.random.default_rng(1).poisson(20 + spot).astype(float)
    assert not isolated_pixels(image, np.ones(image.shape, bool), COUNTS).any()


@pytest.mark.parametrize("level", [0.001, 0.01, 0.3, 3.0, 300.0])
def test_counts_are_none_however_few(level):
    image = ground(level, (512, 512))
    assert np.count_nonzero(isolated_pixels(image, np.ones(image.shape, bool), COUNTS)) <= 1


def test_invalid_pixels_are_neither_hits_nor_neighbours():
    image, mask = ground(), np.ones((96, 96), bool)
    image[40, 50:53] = 5000
    assert not isolated_pixels(image, mask, COUNTS).any()
    mask[40, 51:53] = False
    assert np.argwhere(isolated_pixels(image, mask, COUNTS)).tolist() == [[40, 50]]


def test_too_many_are_a_texture():
    image = ground()
    image[::4, ::4] = 5000
    assert not isolated_pixels(image, np.ones(image.shape, bool), COUNTS).any()
