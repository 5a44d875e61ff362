from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from stillframe import load_mask
from stillframe.simulation.experiment import Experiment, evaluate
from stillframe.simulation.write import simulate

SMALL = Experiment(frames=60, shape=(64, 72), seed=5)


@pytest.mark.parametrize("pattern", ["rings", "spots"])
def test_the_pattern_is_evaluated_at_shifted_coordinates(pattern):
    """Half a pixel twice is one pixel once, to machine precision: nothing is interpolated."""
    still, moved = (evaluate(pattern, (40, 50), shift) for shift in ((0.5, -0.25), (3.5, 1.75)))
    np.testing.assert_allclose(moved[:-3, :-2], still[3:, 2:], rtol=1e-9)


def test_counts_are_poisson_around_the_expectation():
    counts = np.stack([replace(SMALL, seed=seed).render(3) for seed in range(40)]).astype(float)
    expected = np.stack([replace(SMALL, seed=seed).expected(3) for seed in range(40)])
    valid = expected > 0
    z = (counts - expected)[valid] / np.sqrt(expected[valid])
    assert abs(z.mean()) < 0.02
    assert z.std() == pytest.approx(1, abs=0.02)


def test_the_drift_walks_and_jumps_within_its_bounds():
    shifts = Experiment(frames=400, max_drift=6, jumps=3).shifts
    steps = np.abs(np.diff(shifts, axis=0)).max(axis=1)
    assert np.abs(shifts).max() == pytest.approx(6)
    assert np.median(steps) < 0.3
    assert np.sort(steps)[-3:].min() > 5 * np.median(steps)


def test_the_block_stays_while_the_pattern_moves():
    detector = SMALL.detector
    under = np.stack([SMALL.expected(i)[detector.block] for i in (0, 30)])
    np.testing.assert_array_equal(under[0], under[1])
    assert not detector.mask[detector.block].any()
    assert not SMALL.render(0)[detector.gain == 0].any()


def test_intensity_decays_and_dark_frames_see_no_beam():
    dark = SMALL.kind == 2
    assert np.flatnonzero(dark).tolist() == [49]
    assert SMALL.intensity[dark] == 0
    assert SMALL.intensity[-5:].mean() < 0.75 * SMALL.intensity[:5].mean()


def test_every_scan_visits_every_delay_once():
    for scan in range(2):
        assert len(set(SMALL.delay[SMALL.scan == scan])) == SMALL.delays


def test_spikes_hit_anywhere_and_are_in_no_mask():
    quiet, hit = SMALL, replace(SMALL, spikes=0.01)
    assert 0.005 < np.mean(quiet.render(0) != hit.render(0)) < 0.02
    np.testing.assert_array_equal(quiet.detector.mask, hit.detector.mask)


def test_the_store_holds_frames_truth_and_coordinates(stored, experiment):
    with xr.open_zarr(stored[0], chunks=None) as store:
        np.testing.assert_array_equal(store["frames"][7], experiment.render(7))
        np.testing.assert_array_equal(store["true_shift"], experiment.shifts)
        assert store["frames"].dtype == np.uint16
        assert {"time", "scan", "delay", "kind"} <= set(store.coords)
    np.testing.assert_array_equal(load_mask(stored[1]), experiment.detector.mask)


def test_frames_that_are_there_are_not_overwritten(tmp_path):
    simulate(replace(SMALL, frames=2), tmp_path)
    with pytest.raises(FileExistsError, match="not overwritten"):
        simulate(replace(SMALL, frames=2), tmp_path)


@pytest.mark.parametrize("change", [{"frames": 0}, {"shape": (8, 64)}, {"dose": 0}, {"pattern": "stripes"}])
def test_what_cannot_be_simulated_is_refused(change):
    with pytest.raises(ValueError, match=r"cannot be simulated|dose is|pattern is"):
        Experiment(**change)
