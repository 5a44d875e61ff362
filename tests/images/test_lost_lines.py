"""Frames of which rows or columns were lost are flagged; dark borders and few counts are not taken for that."""

import numpy as np
import pytest

from stillframe import Flag, Reference, match_frames
from stillframe.images.lost_lines import equal_lines
from stillframe.simulation.experiment import beam_block, evaluate

SHAPE = (256, 264)
MASK = ~beam_block(SHAPE)
SHIFTS = [(2.3, -1.7), (-3.1, 0.4)]


def frames(dose, background=0.0, pattern="rings"):
    rng = np.random.default_rng(0)
    shown = (evaluate(pattern, SHAPE, shift) for shift in SHIFTS)
    return np.stack([rng.poisson(np.where(MASK, dose * one, 0) + background) for one in shown]).astype(np.uint16)


def reference(image):
    return Reference(image, MASK, max_shift=16)


EXPECTED = 300 * evaluate("rings", SHAPE, (0, 0))


@pytest.mark.parametrize("lines", [np.s_[100:156], np.s_[:, 40:90], np.s_[0:60]])
@pytest.mark.parametrize("value", [0, 7])
@pytest.mark.parametrize("dtype", ["u2", "f4", "i4"])
def test_lost_lines_are_flagged(lines, value, dtype):
    stack = frames(300.0).astype(dtype)
    stack[0][lines] = value
    flags = match_frames(stack, reference(np.random.default_rng(1).poisson(EXPECTED)))["flag"]
    assert flags.tolist() == [Flag.CORRUPT, 0]


@pytest.mark.parametrize("pattern", ["rings", "spots"])
@pytest.mark.parametrize("dose", [0.02, 0.1, 1.0])
def test_few_counts_are_not_lost(pattern, dose):
    clean = dose * evaluate(pattern, SHAPE, (0, 0))
    assert not (match_frames(frames(dose, pattern=pattern), reference(clean))["flag"] & Flag.CORRUPT).any()


def test_lost_lines_are_found_in_frames_of_few_counts():
    stack = frames(1.0)
    stack[0][100:156] = 0
    assert match_frames(stack, reference(EXPECTED / 300))["flag"].tolist() == [Flag.CORRUPT, 0]


def test_borders_that_are_dark_in_the_reference_too_are_not_lost():
    border = np.zeros(SHAPE, bool)
    border[:24] = border[:, -16:] = True
    stack = np.where(border, 3, frames(300.0, background=20.0)).astype(np.uint16)
    image = np.where(border, 3, np.random.default_rng(1).poisson(EXPECTED + 20))
    assert not (match_frames(stack, reference(image))["flag"] & Flag.CORRUPT).any()


def test_saturated_lines_are_judged_as_saturation():
    stack = frames(300.0)
    stack[0][100:112] = 65535
    flags = match_frames(stack, reference(np.random.default_rng(1).poisson(EXPECTED)))["flag"]
    assert not (flags & Flag.CORRUPT).any()


def test_a_line_that_differs_in_one_bin_is_not_equal():
    bins = np.full((6, 8), 2.0, np.float32)
    bins[3, 7] = 3
    whole = np.ones(bins.shape, bool)
    lost = equal_lines(bins, whole)
    assert np.flatnonzero(~lost.rows).tolist() == [3] and np.flatnonzero(~lost.columns).tolist() == [7]
    whole[3, 7] = False
    assert equal_lines(bins, whole).rows.all()


@pytest.mark.parametrize("lines", [np.s_[150:158], np.s_[121:126]])
def test_few_lines_are_flagged_or_change_nothing(lines):
    stack = frames(300.0)
    stack[0][lines] = 0
    (match, _) = match_frames(stack, reference(np.random.default_rng(1).poisson(EXPECTED)))
    error = np.array([match["dy"], match["dx"]]) - SHIFTS[0]
    assert match["flag"] or (np.abs(error) < 4 * np.array([match["sigma_y"], match["sigma_x"]])).all()


@pytest.mark.parametrize("shape", [(47, 256), (63, 200), (256, 39)])
def test_images_of_a_few_bins_are_judged(shape):
    stack = np.random.default_rng(0).poisson(30 * evaluate("rings", SHAPE, (0, 0)))[: shape[0], : shape[1]]
    lost = stack.copy()
    lost[:8] = lost[:, :8] = 0
    flags = match_frames(np.stack([stack, lost]), Reference(stack, max_shift=4))["flag"]
    assert flags[0] == 0
