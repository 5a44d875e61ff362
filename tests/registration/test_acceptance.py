"""Each judgement on either side of its threshold."""

import numpy as np
import pytest

from stillframe import Flag
from stillframe.images.statistics import Statistics
from stillframe.registration.acceptance import (
    at_edge,
    beyond_window,
    contested,
    decisive,
    elongated,
    least_significance,
    reaches_least_score,
    self_similar,
    shows_pattern,
    unusable,
    without_pattern,
)
from stillframe.registration.elongation import Elongation
from stillframe.registration.estimate import Estimate
from stillframe.registration.peak import Peak

PIXELS = Statistics(mean=100.0, deviation=20.0, smallest=0.0, largest=500.0, not_finite=0, saturated=0)
PEAK = Peak(shift=(1, 2), score=0.6, second_score=0.3, lead=0.2, pixels=10_000.0, reach=8)
ESTIMATE = Estimate(
    shift=np.array([1.2, 2.1]),
    covariance=np.eye(2),
    gain=1.0,
    offset=0.0,
    variance=1.0,
    significance=50.0,
    mismatch=0.0,
    mismatch_significance=0.0,
    elongation=Elongation(amount=0.0, significance=1.0, length=0.0, size=10.0),
    start=(1, 2),
    product=0.0,
)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({}, Flag(0)),
        ({"not_finite": 1}, Flag.CORRUPT),
        ({"saturated": 500}, Flag(0)),
        ({"saturated": 501}, Flag.SATURATED),
        ({"deviation": 2.01}, Flag(0)),
        ({"deviation": 1.99}, Flag.DARK),
        ({"smallest": 500.0}, Flag.DARK),
    ],
)
def test_frames_are_unusable_for_one_reason(change, flag):
    assert unusable(PIXELS._replace(**change), 10_000, 40.0) == flag


def test_a_frame_without_valid_pixels_is_corrupt():
    assert unusable(PIXELS, 0, 40.0) == Flag.CORRUPT


@pytest.mark.parametrize(("intensity", "flag"), [(19.0, Flag.DARK), (21.0, Flag.LOW_SCORE)])
def test_a_frame_without_pattern_is_dark_where_it_is_dim(intensity, flag):
    assert without_pattern(intensity, 100.0) == flag


@pytest.mark.parametrize(
    ("change", "judgement"),
    [
        ({}, True),
        ({"lead": 0.051}, True),
        ({"lead": 0.049}, False),  # 5.5 · √2 · (1 − 0.6²)/100 = 0.0498
        ({"score": 0.111, "lead": 0.5}, True),
        ({"score": 0.109, "lead": 0.5}, False),  # 11/√9998
    ],
)
def test_equation_9_decides(change, judgement):
    peak = PEAK._replace(**change)
    assert decisive(peak) == judgement
    assert contested(peak) == (peak.lead < 0.0498)


def test_scores_that_round_off_could_swap_are_contested():
    certain = PEAK._replace(score=1.0)
    assert contested(certain._replace(lead=0.9e-5))
    assert not contested(certain._replace(lead=1.1e-5))
    assert contested(certain._replace(lead=np.nan))


def test_equation_11_is_the_least_score():
    least = least_significance(17**2) / np.sqrt(9998)
    assert reaches_least_score(PEAK._replace(score=1.001 * least))
    assert not reaches_least_score(PEAK._replace(score=0.999 * least))


@pytest.mark.parametrize(
    ("change", "judgement"),
    [
        ({}, True),
        ({"significance": 5.75}, False),
        ({"significance": 5.85}, True),
        ({"mismatch": 0.31, "mismatch_significance": 50.0}, False),
        ({"mismatch": 0.29, "mismatch_significance": 50.0}, True),
        ({"mismatch": 0.9, "mismatch_significance": 3.0}, True),
    ],
)
def test_equations_40_and_41_refuse_other_patterns(change, judgement):
    assert 5.75 < least_significance(17**2) < 5.85
    assert shows_pattern(ESTIMATE._replace(**change), 17**2) == judgement


def test_a_peak_at_the_border_or_beyond_is_noticed():
    assert not at_edge(PEAK)
    assert at_edge(PEAK._replace(shift=(-8, 0)))
    assert not at_edge(PEAK._replace(shift=(0, 0), reach=0))
    assert not beyond_window(ESTIMATE._replace(shift=np.array([8.4, 0.0])), PEAK)
    assert beyond_window(ESTIMATE._replace(shift=np.array([0.0, -8.6])), PEAK)


def test_lattices_and_rings_resemble_themselves():
    assert self_similar(0.95)
    assert not self_similar(0.35)


@pytest.mark.parametrize(
    ("change", "is_elongated"),
    [
        ({}, True),
        ({"significance": 5.25}, False),
        ({"significance": 5.26}, True),
        ({"amount": 1.4}, False),
        ({"amount": 0.9, "size": 2.0}, False),
        ({"amount": 1.1, "size": 2.0}, True),
        ({"length": 1.4}, False),
        ({"length": 2.1}, True),
        ({"length": 1.9}, False),
    ],
)
def test_features_are_elongated_if_it_is_certain_and_much_and_the_reference_is_not_smeared(change, is_elongated):
    assert elongated(Elongation(4.0, 9.0, 4.0, 10.0)._replace(**change)) == is_elongated
