"""Bins against the same sums written out, and the score of single pixels against the surface of all scores."""

from itertools import product as product_of

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe import masked_ncc
from stillframe.images.binning import at_bins, bin_means, bin_sums, box_means, in_single_precision, moved_bins
from stillframe.images.run_lengths import RowRuns, ValidPixels, runs_of
from stillframe.images.statistics import statistics, survey
from stillframe.registration.ncc_at_shift import ScoreAtShift
from strategies import masked_image


@settings(max_examples=50, deadline=None)
@given(masked_image(), st.sampled_from([1, 2, 4, 8]))
def test_bins_hold_the_sum_of_their_valid_pixels(drawn, side):
    image, mask = drawn
    bins = bin_sums(image, RowRuns.of(mask), 0.5, side)
    expected = bin_means(np.where(mask, image - 0.5, 0), side) * side**2
    assert bins.shape == tuple(length // side for length in image.shape)
    np.testing.assert_allclose(bins, expected, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(masked_image(), st.sampled_from([1, 2, 4, 8]), st.tuples(st.integers(-30, 30), st.integers(-30, 30)))
def test_moved_bins_are_those_of_the_moved_frame(drawn, side, shift):
    image, mask = drawn
    fixed = np.random.default_rng(0).normal(size=image.shape).astype(np.float32)
    moved, seen = np.zeros(image.shape), np.zeros(image.shape, bool)
    for y, x in np.ndindex(image.shape):
        row, column = y - shift[0], x - shift[1]
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1] and mask[row, column]:
            moved[y, x], seen[y, x] = image[row, column] - 0.5, True
    rows = np.arange(-(-len(image) // side))
    means, whole, product = moved_bins(image, RowRuns.of(mask), 0.5, fixed, shift, side, rows)
    np.testing.assert_array_equal(whole, bin_means(seen, side) == 1)
    np.testing.assert_allclose(means[whole], bin_means(moved, side)[whole], atol=1e-5)
    assert product == pytest.approx(np.sum(fixed * moved), abs=1e-3)


def test_only_some_rows_of_bins_are_read_on_request():
    frame = np.arange(144, dtype=np.uint16).reshape(12, 12)
    everything = np.ones(frame.shape, bool)
    means, whole, _ = moved_bins(
        frame, RowRuns.of(everything), 0.0, np.zeros((12, 12), np.float32), (0, 0), 4, np.array([1])
    )
    assert whole.all(axis=1).tolist() == [False, True, False]
    np.testing.assert_allclose(means[1], bin_means(frame.astype(float), 4)[1])


@settings(max_examples=50, deadline=None)
@given(masked_image())
def test_runs_hold_the_valid_pixels_of_each_row(drawn):
    _, mask = drawn
    valid = RowRuns.of(mask)
    again = np.zeros(mask.shape, bool)
    for row in range(len(mask)):
        for y, first, stop in valid.runs[valid.firsts[row] : valid.firsts[row + 1]]:
            assert y == row and first < stop and (stop == mask.shape[1] or not mask[row, stop])
            again[row, first:stop] = True
    np.testing.assert_array_equal(again, mask)
    assert valid.pixels == mask.sum()


def test_masks_without_a_valid_pixel_have_no_runs():
    assert len(runs_of(np.zeros((5, 7), bool))) == 0
    assert RowRuns.of(np.zeros((5, 7), bool)).firsts.tolist() == [0] * 6


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("side", [2, 8])
def test_one_pass_over_short_integers_gives_the_statistics_of_several(dtype, side):
    generator = np.random.default_rng(3)
    mask = generator.random((21, 37)) < 0.9
    frame = generator.poisson(60, mask.shape).astype(dtype)
    frame[~mask] = np.iinfo(dtype).max if np.dtype(dtype).kind != "f" else np.nan
    limit = float(frame[mask].max()) - 3
    valid = RowRuns.of(mask)
    surveyed = survey(frame, valid, limit, side)
    np.testing.assert_allclose(surveyed.statistics, statistics(frame, valid, limit), rtol=1e-6)
    pixels = frame[mask].astype(float)
    expected = (pixels.mean(), pixels.std(), pixels.min(), pixels.max(), 0, np.count_nonzero(pixels >= limit))
    np.testing.assert_allclose(surveyed.statistics, expected, rtol=1e-6)
    assert surveyed.statistics.saturated > 0
    single = surveyed.single
    values = single.values.astype(float) - single.base
    expected = bin_means(np.where(mask, values, 0), side) * side**2
    np.testing.assert_allclose(surveyed.bins, expected, atol=1e-4)


def test_a_mean_far_from_most_pixels_costs_no_precision():
    frame = np.full((64, 64), 65000, np.uint16)
    frame[::2, 32:] = 65001
    mask = np.ones(frame.shape, bool)
    pixels = survey(frame, RowRuns.of(mask), np.inf, 8).statistics
    assert pixels.mean == pytest.approx(frame.mean(), rel=1e-9)
    assert pixels.deviation == pytest.approx(frame.std(), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint64, np.float32, np.float64])
def test_single_precision_holds_any_frame(dtype):
    frame = (np.arange(12).reshape(3, 4) + (100 if np.dtype(dtype).itemsize < 4 else 1e6)).astype(dtype)
    single = in_single_precision(frame, float(frame.mean()), float(frame.std()))
    back = single.origin + single.scale * (single.values.astype(np.float64) - single.base)
    np.testing.assert_allclose(back, frame, atol=1e-6)


def test_boxes_begin_at_each_pixel():
    image = np.random.default_rng(0).normal(size=(9, 11))
    np.testing.assert_allclose(at_bins(box_means(image, 4), 4), bin_means(image, 4))
    np.testing.assert_allclose(box_means(image, 2)[3, 5], image[3:5, 5:7].mean())


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(masked_image(shape=(14, 17)), masked_image(shape=(14, 17)))
def test_the_score_at_each_shift_is_that_of_the_surface(one, other):
    (image, mask), (frame, frame_mask) = one, other
    fixed, valid = np.where(mask, image, 0).astype(np.float32), ValidPixels.of(frame_mask)
    ncc, lags_y, lags_x = masked_ncc(fixed, frame, mask, frame_mask, max_shift=13, overlap_ratio=0.3)
    single = in_single_precision(frame, 0.0, 1.0)
    pixels = statistics(frame, valid.valid, np.inf)
    static = ScoreAtShift.of(fixed, ValidPixels.of(mask), valid)
    own_mask = ScoreAtShift.of(fixed, ValidPixels.of(mask), ValidPixels.of(mask))
    for (i, dy), (j, dx) in product_of(enumerate(lags_y), enumerate(lags_x)):
        if np.isfinite(ncc[i, j]) and abs(ncc[i, j]) < 0.999:
            for score in (static, static, own_mask):
                value, count = score((dy, dx), single, pixels, valid)
                assert value == pytest.approx(ncc[i, j], abs=2e-4)
                assert count == overlap(mask, frame_mask, dy, dx)


def overlap(mask, frame_mask, dy, dx):
    """Return the number of pixels valid in both when the frame is moved."""
    places = np.argwhere(frame_mask) + np.array([dy, dx])
    inside = places[((places >= 0) & (places < mask.shape)).all(axis=1)]
    return np.count_nonzero(mask[inside[:, 0], inside[:, 1]])
