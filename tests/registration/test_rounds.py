"""The drift that a round reports, and the limit of the shifts that rounds predict."""

from types import SimpleNamespace

import numpy as np
import pytest

from stillframe.registration.rounds import Round

LIMIT = np.random.default_rng(1).normal(0, 2, (8, 2))
START = np.random.default_rng(2).normal(0, 1, (8, 2))


def round_of(shifts):
    halves = [SimpleNamespace(shifts=half, numbers=list(range(len(half)))) for half in np.split(shifts, 2)]
    return Round([range(4), range(4, 8)], halves, None, None)


def approaching(ratio, rounds=3):
    """Rounds in which the distance of the shifts from their limit shrinks by the same factor each time."""
    return [round_of(LIMIT + START * ratio**number) for number in range(rounds)]


def test_drift_is_that_along_the_direction_of_least_drift():
    along = np.outer(np.linspace(-3, 3, 8), (3, 4)) / 5
    aside = np.outer([1, -1, -1, 1, 1, -1, -1, 1], (-4, 3)) / 5 * 0.3
    assert round_of(along + aside + 7).drift == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.75])
def test_61_is_how_far_the_limit_is(ratio):
    first, second, third = approaching(ratio)
    after_one = second.after(first)
    last = third.after(after_one)
    assert (after_one.number, last.number, after_one.to_limit) == (2, 3, 0)
    beyond = last.shifts + last.to_limit * last.step
    np.testing.assert_allclose(beyond, round_of(LIMIT).shifts, atol=1e-9)


@pytest.mark.parametrize(("ratio", "to_limit"), [(0.95, 4), (-0.5, 0)], ids=["slow", "swinging"])
def test_61_has_bounds(ratio, to_limit):
    first, second, third = approaching(ratio)
    assert third.after(second.after(first)).to_limit == pytest.approx(to_limit)


def test_no_limit_is_known_after_a_map_went_further_or_frames_were_lost():
    first, second, third, fourth = approaching(0.5, 4)
    further = third.after(second.after(first))
    assert further.to_limit > 0 and fourth.after(further).to_limit == 0 and fourth.after(further).step is None
    lost = round_of(third.shifts[:6])
    assert lost.after(second.after(first)).to_limit == 0
