"""Frames that show the pattern twice are recognised by their elongated features, whatever pumping does (64)."""

import numpy as np
import pytest

from ringed_and_spotted import PATTERNS, SHAPE, stack, usual
from stillframe import Flag, make_reference, match_frames
from stillframe.registration.match import match_with_guide
from stillframe.registration.prepared_reference import prepare
from synthetic import blocked


def twice(kind, apart, dose=None, number=6, seed=7):
    """Frames that are the sum of two exposures ``apart`` (y, x) pixels from each other."""
    pattern, usual_dose = PATTERNS[kind]
    dose = dose or usual_dose

    def expected(shift, _):
        return dose * (pattern(shift - apart / 2) + pattern(shift + apart / 2)) / 2

    return stack(expected, seed=seed, frames=number)[0]


def elongations(frames, reference, monkeypatch):
    """The elongation of each frame at its shift, whether or not it is accepted."""
    found = []
    monkeypatch.setattr("stillframe.registration.acceptance.elongated", lambda one: bool(found.append(one)))
    match_frames(frames, reference)
    return found


@pytest.mark.parametrize("angle", [0.0, 0.5, np.pi / 2])
@pytest.mark.parametrize("kind", PATTERNS)
def test_the_elongation_of_two_exposures_is_a_quarter_of_their_square_distance(kind, angle, monkeypatch):
    _, dose = PATTERNS[kind]
    frames = twice(kind, 3 * np.array([np.sin(angle), np.cos(angle)]))
    found = elongations(frames, usual(kind, dose), monkeypatch)
    assert np.mean([one.amount for one in found]) == pytest.approx(9 / 4, rel=0.3)
    assert np.mean([one.length for one in found]) == pytest.approx(9 / 4, rel=0.3)
    assert min(one.significance for one in found) > 6


@pytest.mark.parametrize("distance", [4, 8, 12])
@pytest.mark.parametrize("kind", PATTERNS)
def test_double_exposures_are_no_match(kind, distance):
    _, dose = PATTERNS[kind]
    for angle in (0.2, 1.4):
        frames = twice(kind, distance * np.array([np.sin(angle), np.cos(angle)]))
        assert (match_frames(frames, usual(kind, dose))["flag"] == Flag.LOW_SCORE).all()


@pytest.mark.parametrize("kind", PATTERNS)
def test_noise_has_no_significant_elongation(kind, monkeypatch):
    """The squared significance has the mean 2 of a χ² distribution; the noise of the reference adds a little."""
    pattern, dose = PATTERNS[kind]
    frames, _ = stack(lambda shift, _: dose * pattern(shift), seed=11, frames=60)
    found = elongations(frames, usual(kind, dose), monkeypatch)
    assert 1.5 < np.mean([one.significance**2 for one in found]) < 3.2


@pytest.mark.parametrize("kind", PATTERNS)
def test_features_that_are_broader_in_all_directions_are_accepted(kind):
    pattern, dose = PATTERNS[kind]
    crosses = [np.array(step) for step in ((1.2, 0), (-1.2, 0), (0, 1.2), (0, -1.2))]
    frames, _ = stack(lambda shift, _: dose * np.mean([pattern(shift + e) for e in crosses], axis=0), frames=6)
    assert not match_frames(frames, usual(kind, dose))["flag"].any()


@pytest.mark.parametrize("kind", PATTERNS)
def test_frames_narrower_than_a_smeared_reference_are_accepted(kind):
    pattern, dose = PATTERNS[kind]
    smeared = np.random.default_rng(0).poisson(
        16 * dose * np.mean([pattern((y, 0.0)) for y in np.linspace(-5, 5, 11)], axis=0)
    )
    reference = make_reference((smeared / 16)[None], blocked(SHAPE), use=0, max_shift=12)
    frames, _ = stack(lambda shift, _: dose * pattern(shift), frames=6)
    assert not match_frames(frames, reference)["flag"].any()


def test_guides_do_not_judge_elongation():
    frames, reference = twice("spots", np.array([6.0, 0.0])), usual("spots", PATTERNS["spots"][1])
    assert (match_frames(frames, reference)["flag"] == Flag.LOW_SCORE).all()
    assert not match_with_guide(frames, reference)["flag"].any()


def test_templates_are_smoother_where_the_reference_is_noisy():
    pattern, _ = PATTERNS["rings"]
    frames, _ = stack(lambda shift, _: 1.0 * pattern(shift), frames=16)
    template = prepare(make_reference(frames, blocked(SHAPE), max_shift=12)).template
    assert template is not None and template.elongation is not None
