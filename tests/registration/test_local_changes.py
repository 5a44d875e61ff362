"""Backgrounds that stay on the detector and patterns that change: shifts follow the pattern, sigma covers the error."""

from dataclasses import replace

import numpy as np
import pytest

from ringed_and_spotted import PATTERNS, SHAPE, X, Y, errors, rings, spots, stack, usual
from stillframe import Flag, Reference, make_reference, match_frames
from stillframe.images.noise import Noise
from stillframe.registration.local_changes import choose_square, without_local_changes
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.template_draft import Draft, Smoothed
from stillframe.simulation.experiment import evaluate
from synthetic import blocked

SCATTER = np.exp(-((Y[:, None] - 10) ** 2 + (X + 15) ** 2) / 2 / 38**2)


@pytest.mark.parametrize("kind", ["rings", pytest.param("spots", marks=pytest.mark.slow)])
def test_scatter_that_stays_on_the_detector_does_not_pull(kind):
    """The reference holds the scatter as well, smeared by the drift; shifts were drawn by a third towards it."""
    pattern, dose = PATTERNS[kind]
    mean = dose * pattern((0, 0)).mean()
    frames, shifts = stack(lambda shift, _: dose * pattern(shift) + 3 * mean * SCATTER / SCATTER.mean())
    matches = match_frames(frames, make_reference(frames, blocked(SHAPE), iterations=3, max_shift=12))
    good = matches["flag"] == 0
    assert good.mean() > 0.8  # the search, not the refinement, is drawn by the scatter
    error, relative = errors(matches[good], shifts[good])
    assert relative.std() < 1.3
    assert abs(np.polyfit(shifts[good].ravel(), error.ravel(), 1)[0]) < 0.005


def glowing(shift):
    """A glow that moves with weak spots, and tells more of the shift than they do."""
    y, x = Y[:, None] + shift[0], X + shift[1]
    weak = spots(shift) - spots(shift, factor=0)
    return 30 * np.exp(-(y**2 + x**2) / 2 / 14**2) + 0.5 + 1.5 * weak


@pytest.mark.slow
@pytest.mark.parametrize("scatter", [0, 3])
def test_only_scatter_that_draws_shifts_costs_precision(scatter):
    """Squares would cost more than a glow is worth, unless something smooth does not move (63)."""
    mean = glowing((0, 0)).mean()
    frames, shifts = stack(
        lambda shift, _: glowing(shift) + scatter * mean * SCATTER / SCATTER.mean(), seed=4, frames=40
    )
    reference = make_reference(frames, blocked(SHAPE), use=slice(0, 24), iterations=3, max_shift=12)
    assert reference.against_scatter == bool(scatter) == bool(prepare(reference).template.square)
    drawn, followed = (
        errors(match_frames(frames[24:], one), shifts[24:])[1].std()
        for one in (reference.replace(against_scatter=False), reference)
    )
    assert followed < 1.5
    assert drawn > 5 or not scatter


@pytest.mark.parametrize(("kind", "counts"), [("spots", 90), ("rings", 30)])
def test_scatter_in_a_small_image_does_not_pull(kind, counts):
    rng, shape = np.random.default_rng(5), (128, 120)
    y, x = np.indices(shape)
    shifts = rng.uniform(-5, 5, (32, 2))
    scatter = counts * np.exp(-((y - 50) ** 2 + (x - 75) ** 2) / 2 / 25**2)
    expected = np.stack([300 * evaluate(kind, shape, shift) + 15 for shift in shifts]) + scatter
    frames = rng.poisson(expected).astype(np.uint16)
    matches = match_frames(frames, make_reference(frames, use=slice(0, 16), max_shift=10))
    assert not matches["flag"].any()
    assert errors(matches[16:], shifts[16:])[1].std() < 1.5


@pytest.mark.slow
def test_the_same_scatter_pulls_where_templates_see_it(monkeypatch):
    """Without squares: the test above would fail for its reason."""
    monkeypatch.setattr("stillframe.registration.templates.choose_square", lambda draft, **_: (0, draft))
    pattern, dose = PATTERNS["rings"]
    mean = dose * pattern((0, 0)).mean()
    frames, shifts = stack(lambda shift, _: dose * pattern(shift) + 3 * mean * SCATTER / SCATTER.mean(), frames=20)
    _, relative = errors(match_frames(frames, make_reference(frames, blocked(SHAPE), max_shift=12)), shifts)
    assert np.nanstd(relative) > 5


def hump(rng):
    centre, width = rng.uniform(-60, 60, 2), rng.uniform(26, 70)
    return np.exp(-((Y[:, None] - centre[0]) ** 2 + (X - centre[1]) ** 2) / 2 / width**2)


CHANGES = {
    "gradient": lambda kind, rng: {"added": 0.5 + X / 512 + 0 * Y[:, None]},
    "hump": lambda kind, rng: {"added": 6 * hump(rng)},
    "feature": lambda kind, rng: {"heights": (1.0, 0.4, 0.45, 0.3, 0.6, 0.5)} if kind == "rings" else {"factor": 0.5},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", PATTERNS)
def test_what_pumping_changes_does_not_move_the_pattern(kind, change):
    (pattern, dose), rng = PATTERNS[kind], np.random.default_rng(3)

    def expected(shift, number):
        changed = CHANGES[change](kind, rng) if number >= 20 else {}
        added = changed.pop("added", 0.0)
        return dose * pattern(shift, **changed) + added

    frames, shifts = stack(expected, seed=2, frames=50)
    matches = match_frames(frames, usual(kind, dose))
    assert not matches["flag"].any()
    _, relative = errors(matches, shifts)
    assert relative[20:].std() < 1.25


@pytest.mark.parametrize("dose", [3.0, pytest.param(300.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PATTERNS)
def test_another_sample_with_the_same_glow_is_no_match(kind, dose):
    pattern, _ = PATTERNS[kind]
    others = np.random.default_rng(8).uniform(-120, 120, (70, 3)) * (1, 1, 1 / 300) + (0, 0, 0.6)
    other = {"scale": 1.21} if kind == "rings" else {"nodes": others}
    frames, _ = stack(lambda shift, number: dose * pattern(shift, **(other if number >= 16 else {})), 2, 24)
    matches = match_frames(frames, usual(kind, dose))
    assert not matches["flag"][:16].any()
    assert (matches["flag"][16:] & (Flag.LOW_SCORE | Flag.AMBIGUOUS_PEAK | Flag.AT_EDGE)).all()


class TestSquares:
    def draft(self, side=1, width=1.5):
        image = np.random.default_rng(0).poisson(30 * rings((0, 0))).astype(float)
        mask, level = blocked(SHAPE), image.mean()
        centred = np.where(mask, image - level, 0)
        return Draft.of(Smoothed.of(centred, mask, Noise(1.0, -level), width), side)

    @pytest.mark.parametrize("side", [1, 2])
    @pytest.mark.parametrize("square", [32, 64])
    def test_leave_nothing_of_a_parabola_and_of_the_pattern(self, side, square):
        plain = self.draft(side)
        draft = without_local_changes(plain, square)
        rows, columns = np.indices(draft.support.shape)
        place = (rows // (square // side) == 1) & (columns // (square // side) == 2) & draft.support
        weight = draft.weight[place]
        terms = np.stack([rows**2, rows * columns, columns, np.ones_like(rows), draft.soft * 0 + plain.soft])[:, place]
        for number, field in enumerate([*draft.slopes, draft.soft]):
            response = terms[: 5 if number < 2 else 4] @ (weight * field[place])
            scale = np.abs(terms[: len(response)]) @ np.abs(weight * field[place])
            assert (np.abs(response) < 1e-9 * scale).all()

    def test_are_none_in_a_small_image(self):
        image = np.random.default_rng(0).poisson(30 * rings((0, 0)))[90:186, 90:186]
        assert prepare(Reference(image, max_shift=8)).template.square == 0

    def test_are_the_smallest_that_cost_little(self):
        draft = self.draft()
        square, made = choose_square(draft)
        assert square in (32, 64)
        assert made.expected_variance() == without_local_changes(draft, square).expected_variance()
        assert made.expected_variance() < 2 * draft.expected_variance()

    def test_cost_whatever_they_may_if_asked_for(self):
        image = np.random.default_rng(0).poisson(glowing((0, 0)))
        assert prepare(Reference(image, max_shift=8)).template.square == 0
        template = prepare(Reference(image, max_shift=8, against_scatter=True)).template
        assert template.square >= 32

    def test_leave_a_draft_without_support_as_it_is(self):
        empty = replace(self.draft(), support=np.zeros(SHAPE, bool))
        assert choose_square(empty) == (0, empty)
        np.testing.assert_array_equal(without_local_changes(empty, 32).slopes, empty.slopes)
