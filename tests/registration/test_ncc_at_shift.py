"""The score at one shift is that of the whole surface there, whatever the masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe import masked_ncc
from stillframe.images.run_lengths import RowRuns, ValidPixels
from stillframe.images.statistics import survey
from stillframe.registration.ncc_at_shift import Moments, Picture, ScoreAtShift, masked_score
from strategies import seeds
from synthetic import blocked


def of(values, mask):
    """A frame as the search passes it on."""
    found = survey(values, RowRuns.of(mask), np.inf, 8)
    return found.single, found.statistics


@settings(max_examples=40, deadline=None)
@given(shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)), own=st.booleans(), seed=seeds)
def test_the_score_is_that_of_the_surface(shift, own, seed):
    rng = np.random.default_rng(seed)
    image, frame = rng.normal(size=(24, 27)), rng.poisson(50, (24, 27)).astype(np.uint16)
    mask, frame_mask = blocked((24, 27), seed, 0.1), blocked((24, 27), seed + 1, 0.1)
    centred = np.where(mask, image - image[mask].mean(), 0).astype(np.float32)
    valid = ValidPixels.of(frame_mask)
    score = ScoreAtShift.of(centred, ValidPixels.of(mask), valid)
    found, pixels = score(shift, *of(frame, frame_mask), ValidPixels.of(frame_mask) if own else valid)
    ncc, lags_y, lags_x = masked_ncc(image, frame, mask, frame_mask, max_shift=9, overlap_ratio=0)
    assert found == pytest.approx(ncc[shift[0] - lags_y[0], shift[1] - lags_x[0]], abs=1e-5)
    there = np.zeros((44, 47), bool)
    there[10 + shift[0] : 34 + shift[0], 10 + shift[1] : 37 + shift[1]] = frame_mask
    assert pixels == np.count_nonzero(there[10:34, 10:37] & mask)


def test_equation_43_leaves_the_pixels_that_meet():
    rng = np.random.default_rng(0)
    frame, mask, others = rng.poisson(20, (24, 27)), blocked((24, 27), 1, 0.1), blocked((24, 27), 2, 0.1)
    valid = ValidPixels.of(mask)
    single, pixels = of(frame.astype(np.uint16), mask)
    moments = Picture.of(single, valid, pixels).meeting(ValidPixels.of(others), (3, -4))
    there = np.zeros_like(others)
    there[:-3, 4:] = others[3:, :-4]
    values = frame[mask & there] - single.base
    np.testing.assert_allclose(moments, (values.size, values.sum(), (values**2).sum()))


def test_without_contrast_there_is_no_score():
    flat, other = Moments(10, 0.0, 0.0), Moments(10, 0.0, 5.0)
    assert np.isnan(masked_score(0.0, flat, other))
    assert np.isnan(masked_score(0.0, Moments(1, 1.0, 1.0), Moments(1, 1.0, 1.0)))
