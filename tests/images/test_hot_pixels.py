"""A hit is an isolated pixel; features of the pattern have neighbours."""

import numpy as np
import pytest

from stillframe.images.hot_pixels import bad_pixels, isolated_pixels, small_holes, with_small_holes_filled
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


class TestSmallHoles:
    def test_are_lost_pixels_and_lines_and_no_block_or_border(self):
        mask = np.ones((40, 50), bool)
        mask[10, 10] = mask[20, :25] = mask[:, 30:32] = mask[0, 5] = False
        small = ~mask
        mask[30:, :20] = mask[5:9, 40:44] = False
        np.testing.assert_array_equal(small_holes(mask) & small, small)
        assert not small_holes(mask)[32:, :18].any()
        assert not small_holes(mask)[6:8, 41:43].any()

    def test_hold_what_is_around_them(self):
        y, x = np.indices((30, 30))
        slope, mask = 10.0 + y + 2 * x, np.ones((30, 30), bool)
        mask[14, 9] = False
        filled, known = with_small_holes_filled(np.where(mask, slope, 0), mask)
        assert known.all()
        np.testing.assert_allclose(filled, slope)


class TestBadPixels:
    """Hot and dead pixels in a plain mean of frames that have moved."""

    def scene(self, level=60.0, seed=0):
        rng = np.random.default_rng(seed)
        y, x = np.indices((160, 150))
        rings = np.exp(-(((np.hypot(y - 80, x - 70) - 45) / 5) ** 2) / 2)
        return rng, rng.poisson(16 * level * (0.1 + rings)) / 16, np.ones((160, 150), bool)

    @pytest.mark.parametrize("level", [1.0, 60.0])
    def test_are_found_where_three_in_a_hundred_are_hot(self, level):
        rng, image, mask = self.scene(level)
        hot = rng.random(image.shape) < 0.03
        image += hot * level * rng.uniform(3, 40, image.shape)
        found = bad_pixels(image, mask)
        assert (found & hot).sum() > 0.98 * hot.sum()
        assert (found & ~hot).sum() < 0.001 * image.size

    @pytest.mark.parametrize("counts", [0.01, 0.1, 0.5])
    def test_are_no_single_counts(self, counts):
        """Where most pixels of all frames together have no count, a median says nothing about the others."""
        rng, _, mask = self.scene()
        image = rng.poisson(counts * (0.2 + 2 * (np.indices(mask.shape)[0] > 80))) / 16
        assert bad_pixels(image, mask).sum() <= 2
        image[::40, ::40] += 40 / 16
        assert bad_pixels(image, mask)[::40, ::40].all()

    def test_are_dead_ones_too(self):
        _, image, mask = self.scene()
        image[80, 115], image[35, 70] = 0, 0
        assert np.argwhere(bad_pixels(image, mask)).tolist() == [[35, 70], [80, 115]]

    @pytest.mark.parametrize("line", [np.s_[100], np.s_[:, 33]])
    def test_are_those_of_a_row_or_column(self, line):
        _, image, mask = self.scene()
        image[line] += 50
        found = bad_pixels(image, mask)
        assert found[line].all()
        assert found.sum() <= found[line].sum() + 2

    @pytest.mark.parametrize("width", [0.6, 1.0, 2.0])
    def test_are_no_spots_of_a_crystal(self, width):
        rng = np.random.default_rng(1)
        y, x = np.indices((160, 150))
        spots = sum(np.exp(-((y - a) ** 2 + (x - b) ** 2) / 2 / width**2) for a, b in rng.uniform(5, 145, (90, 2)))
        image = rng.poisson(16 * (300 * spots + 2)) / 16
        found = bad_pixels(image, np.ones(image.shape, bool))
        assert not (found & (spots > 0.01)).any()
        assert found.sum() <= 2  # counts of the background

    def test_are_no_texture(self):
        rng, image, mask = self.scene()
        assert not bad_pixels(image * np.maximum(rng.normal(1, 0.1, image.shape), 0.1), mask).any()
        assert not bad_pixels(np.where(rng.random(image.shape) < 0.2, 50 * image, image), mask).any()

    def test_are_none_behind_a_mask(self):
        _, image, mask = self.scene()
        image[80, 115], mask[80, 115] = 5000, False
        assert not bad_pixels(image, mask).any()
