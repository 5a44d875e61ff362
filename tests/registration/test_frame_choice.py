"""Which frames a reference is made of: spread over the stack, and none that shows no pattern."""

import numpy as np
import pytest
import scipy.ndimage

from stillframe import make_reference, match_frames
from stillframe.registration.frame_choice import spread_frames, usable_among
from stillframe.registration.reference_frames import chosen_frames, part_of, spread_places
from stillframe.simulation.experiment import beam_block, evaluate

SHAPE = (96, 104)
MASK = ~beam_block(SHAPE)


def frames(shifts, dose=40.0, seed=0):
    """Return noisy frames of rings, each moved by the opposite of its shift."""
    rng = np.random.default_rng(seed)
    shown = (evaluate("rings", SHAPE, shift) for shift in shifts)
    return np.stack([rng.poisson(np.where(MASK, dose * one, 0)) for one in shown]).astype(np.uint16)


def drift(count, reach):
    return np.stack([np.linspace(-reach, reach, count), np.linspace(reach, -reach, count) / 2], axis=1)


def reader(stack):
    return lambda indices: stack[list(indices)]


def chosen(stack):
    return spread_frames(reader(stack), range(len(stack)), MASK, None)


@pytest.mark.parametrize("count", [17, 24, 100, 36_000])
def test_the_default_is_one_frame_of_each_part(count):
    places = chosen_frames(None, count)
    assert [part_of(place, count) for place in places] == list(range(16))
    assert chosen_frames(None, count) == places
    every = {place for number in range(3) for place in spread_places(count, number)}
    assert min(every) >= 0 and max(every) < count
    assert len(every) == min(count, 48)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 10])
def test_frames_that_alternate_are_met_alike(period):
    kinds = np.bincount(np.array(chosen_frames(None, 36_000)) % period, minlength=period)
    assert kinds.max() <= np.ceil(16 / period) + 2


def test_a_short_stack_gives_all():
    assert list(chosen_frames(None, 16)) == list(range(16))
    assert len(chosen_frames(None, 3)) == 3


@pytest.mark.parametrize("spoiled", ["empty", "dark", "bright", "saturated", "corrupt"])
@pytest.mark.parametrize("which", [slice(0, 30), slice(None, None, 2), slice(15, 60)])
def test_unusable_frames_are_replaced(spoiled, which):
    stack = frames(drift(60, 5.0)).astype(float)
    rng = np.random.default_rng(1)
    shape = stack[which].shape
    stack[which] = {
        "empty": np.zeros(shape),
        "dark": rng.normal(100, 3, shape),
        "bright": rng.poisson(15, shape),
        "saturated": np.full(shape, 65535.0),
        "corrupt": np.full(shape, np.nan),
    }[spoiled]
    kept = chosen(stack)
    assert len(kept) >= 12 and not set(kept) & set(range(60)[which])


def test_of_stripes_none_is_taken_and_no_other_is_lost():
    stack = frames(drift(16, 5.0))
    stack[[3, 8], 40:44] = 65535
    assert usable_among(reader(stack), range(16), MASK, None) == [i for i in range(16) if i not in (3, 8)]


def test_hits_and_few_counts_cost_no_frame():
    stack = frames(drift(16, 5.0), dose=0.5)
    stack[::3, 70, 80] = 60000
    assert usable_among(reader(stack), range(16), MASK, None) == list(range(16))


def test_a_texture_finer_than_bins_is_kept():
    texture = np.random.default_rng(2).poisson(50.0, (16, *SHAPE))
    assert usable_among(reader(texture), range(16), MASK, None) == list(range(16))


def test_no_usable_frame_says_so():
    with pytest.raises(ValueError, match="none is usable"):
        make_reference(np.zeros((40, *SHAPE)), MASK, max_shift=8)


@pytest.mark.slow
def test_background_of_the_first_frames_does_not_make_the_reference():
    """It stays where it is, so that the frames that show it alone match one another at (0, 0), and nothing else."""
    shifts = drift(60, 5.0)
    y, x = np.indices(SHAPE)
    glow = 30 * np.exp(-((y - 30) ** 2 + (x - 75) ** 2) / 2 / 15**2)
    rng = np.random.default_rng(3)
    stack = frames(shifts) + rng.poisson(0.1 * glow, (60, *SHAPE)).astype(np.uint16)
    stack[:20] = rng.poisson(glow, (20, *SHAPE))
    matches = match_frames(stack, make_reference(stack, MASK, max_shift=16))
    measured = np.stack([matches["dy"], matches["dx"]], axis=1)[20:]
    error = measured - shifts[20:]
    assert (np.abs(error - np.median(error, axis=0)) < 0.2).all()


@pytest.mark.parametrize("max_shift", [8, 16])
def test_a_drift_of_one_and_a_half_windows_is_covered_from_its_middle(max_shift):
    shifts = drift(64, 0.75 * max_shift)
    stack = frames(shifts)
    reference = make_reference(stack, MASK, max_shift=max_shift)
    assert reference.history.startswith("mean of 16 of 16 frames, aligned")
    matches = match_frames(stack, reference)
    error = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts
    assert (matches["flag"] == 0).all()
    assert np.abs(error - error.mean(axis=0)).max() < 0.1
    assert np.abs(error.mean(axis=0)).max() < max_shift / 4


def test_frames_beyond_the_window_of_the_first_guide_are_reached_from_the_middle():
    """Most of the stack stands still; then the pattern drifts so far that twice the window is not enough."""
    still = np.zeros((60, 2))
    moving = np.stack([np.linspace(0, 22, 36), np.zeros(36)], axis=1)
    shifts = np.concatenate([still, moving])
    stack = frames(shifts)
    reference = make_reference(stack, MASK, max_shift=9)
    matches = match_frames(stack, reference)
    assert np.mean(matches["flag"] == 0) > 0.7
    assert np.isfinite(matches["dy"]).all()


@pytest.mark.slow
def test_a_fixed_texture_is_smeared_out_by_the_drift():
    shifts = np.concatenate([np.zeros((16, 2)), drift(48, 4.0)])
    gain, rng = np.random.default_rng(4).normal(1, 0.1, SHAPE), np.random.default_rng(5)
    shown = (evaluate("rings", SHAPE, shift) for shift in shifts)
    stack = np.stack([rng.poisson(np.where(MASK, 300 * np.maximum(gain, 0) * one, 0)) for one in shown])
    shared = []
    for use in (None, slice(16)):
        reference = make_reference(stack, MASK, use=use, max_shift=16)
        image, inside = reference.image, reference.mask & MASK
        fine = image - scipy.ndimage.gaussian_filter(image, 1.5)
        shared.append(np.sum(fine * (gain - 1) * image, where=inside) / np.sum(((gain - 1) * image) ** 2, where=inside))
    assert shared[1] > 0.8
    assert abs(shared[0]) < 0.3


def test_of_two_frames_the_one_with_beam_is_the_reference():
    stack = frames(np.zeros((2, 2)))
    stack[0] = 0
    assert make_reference(stack, MASK, max_shift=8).image.max() > 0


def test_a_reference_of_no_frames_is_refused():
    with pytest.raises(ValueError, match="there are none"):
        make_reference(np.zeros((0, 64, 64), np.uint16))
