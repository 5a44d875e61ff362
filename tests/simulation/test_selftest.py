"""The self-test claims what a run reaches, hot pixels included."""

import numpy as np
import pytest

from stillframe import make_reference, match_frames
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.selftest import measure_frame, selftest


def with_hot_pixels(experiment, count):
    """Frames whose hot pixels stay where they are, at 100 to 2000 counts, and are in no mask."""
    rng = np.random.default_rng(8)
    fixed = np.zeros(experiment.shape)
    fixed.ravel()[rng.choice(fixed.size, count, replace=False)] = rng.uniform(100, 2000, count)
    stack = np.stack([experiment.render(index) for index in range(experiment.frames)])
    return (stack + rng.poisson(fixed, stack.shape)).astype(np.uint16), experiment.detector.mask


@pytest.mark.parametrize(("side", "count"), [(160, 60), pytest.param(256, 200, marks=pytest.mark.slow)])
def test_claims_what_a_run_reaches(side, count):
    experiment = Experiment(frames=32, shape=(side, side), dose=60.0, max_drift=4.0, dark_every=0, decay=0, seed=7)
    stack, mask = with_hot_pixels(experiment, count)
    reference = make_reference(stack, mask, max_shift=12)
    matches = match_frames(stack, reference)
    error = np.stack([matches["dy"], matches["dx"]], axis=1) - experiment.shifts
    reached = np.sqrt(np.nanmean((error - np.nanmean(error, axis=0)) ** 2))
    noise, fixed = measure_frame(stack[30], mask)
    report = selftest(reference, noise, fixed=fixed, frames=24, reach=4.0)
    assert np.count_nonzero(fixed) >= 0.7 * count
    assert report.failed < 0.2
    for claimed in (np.sqrt(np.mean(np.square(report.rms))), np.sqrt(np.mean(np.square(report.claimed)))):
        assert 0.7 * reached < claimed < 1.5 * reached  # the content is smoothed, which costs sharp features
    assert np.abs(report.bias).max() < 0.1
