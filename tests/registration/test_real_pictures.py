"""Known answers on pictures that nobody in this project made."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import xarray as xr
from PIL import Image

from stillframe import Reference, load_mask, make_reference, masked_ncc, match_frames
from stillframe.registration.prepared_reference import prepare
from stillframe.simulation.selftest import selftest
from synthetic import DATA, needs_pictures, peak, store_frames

pytestmark = needs_pictures


@pytest.fixture(scope="module")
def ewald():
    return tifffile.imread(DATA / "ewald_walkoff.tif")


@pytest.fixture(scope="module")
def ewald_mask():
    return load_mask(DATA / "ewald_walkoff_mask.tif")


def rolled(image, mask, shift):
    """The content moves, the block stays."""
    return np.where(mask, np.roll(image, shift, (0, 1)), image)


def found(match):
    return float(match["dy"]), float(match["dx"])


def test_the_chromium_pair():
    reference, frame = (np.load(DATA / f"cr_{name}_260.npy") for name in ("reference", "data"))
    mask = ~np.load(DATA / "cr_invalid_mask_260.npy")
    (match,) = match_frames(frame[None], Reference(reference, mask))
    assert np.rint(found(match)).tolist() == [2, 4]
    assert match["score"] == pytest.approx(0.908, abs=1e-3)
    assert not match["flag"]
    assert peak(masked_ncc(reference, frame, mask, mask))[0] == (2, 4)


@pytest.mark.parametrize("shift", [(3, -5), (11, 7), (-20, 13)])
def test_a_single_crystal_rolled_under_its_block(shift, ewald, ewald_mask):
    (match,) = match_frames(rolled(ewald, ewald_mask, shift)[None], Reference(ewald, ewald_mask))
    assert np.rint(found(match)).tolist() == [-shift[0], -shift[1]]
    assert match["score"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_a_single_crystal_moved_by_fractions(ewald, ewald_mask):
    """What the errors are that users are promised; a resampled frame must be better than they are."""
    reference = Reference(ewald, ewald_mask, max_shift=8)
    report = selftest(reference, prepare(reference).noise, frames=60, reach=4.0)
    assert report.failed == 0
    assert max(report.rms) < 0.003
    np.testing.assert_allclose(report.ratio, 1, atol=0.3)
    np.testing.assert_allclose(report.locking, 0, atol=0.01)
    np.testing.assert_allclose(report.pull, 0, atol=0.001)


@pytest.mark.parametrize(
    ("name", "shift"), [("X75Y75", (75, -75)), ("X-130Y130", (130, 130)), ("X130Y130", (130, -130))]
)
def test_the_pairs_of_padfields_paper(name, shift):
    fixed, moving = (np.asarray(Image.open(DATA / f"{role}{name}.png")) for role in ("Original", "Transformed"))
    assert peak(masked_ncc(fixed, moving, fixed != 0, moving != 0, overlap_ratio=0.1)) == (
        shift,
        pytest.approx(1, abs=1e-3),
    )
    reference = Reference(fixed, fixed != 0, max_shift=150, overlap_ratio=0.1)
    (match,) = match_frames(moving[None], reference, masks=moving != 0)
    assert np.rint(found(match)).tolist() == list(shift)


@pytest.mark.slow
def test_scatter_does_not_hold_a_real_pattern(monkeypatch):
    """It outshines a pattern of 3 counts so far that templates see nothing else; the benchmark's frames and truth."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr("os.environ", dict(os.environ))  # importing the benchmark sets variables for numeric libraries
    hard_cases = importlib.import_module("hard_cases")
    row, (mean, smoothing) = "scatter as bright as the mean", hard_cases.PICTURES["chromium"]
    task = hard_cases.Task("pictures", f"chromium | {row}", 0, 40, 20261127, 32, "spread", 10_000)
    rng, pattern = task.rng(), hard_cases.Picture(*hard_cases.load_picture("chromium"), mean, smoothing)
    detector = hard_cases.detector("chromium", row, mean, pattern.valid, rng)
    stack = hard_cases.record(pattern, detector, rng, task)
    reference = make_reference(stack.frames, detector.mask, use=stack.use, iterations=3, max_shift=16)
    assert reference.against_scatter and "too small" not in reference.history
    matches, truth = match_frames(stack.frames, reference)[stack.measured], stack.truth[stack.measured]
    good = matches["flag"] == 0
    assert good.mean() > 0.5
    error = (np.stack([matches["dy"], matches["dx"]], axis=1) - truth)[good]
    relative = (error - error.mean(axis=0)) / np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)[good]
    assert relative.std() < 1.5


@pytest.mark.parametrize("shift", [(3, -5), (11, 7), (-20, 13)])
def test_hot_spots_are_no_landmarks_when_masked(shift):
    image = tifffile.imread(DATA / "hotspots.tif")
    mask = image < 500
    # The hot pixels stay where they are; what moves is the pattern between them.
    pattern = np.where(mask, image, np.median(image[mask])).astype(image.dtype)
    frame = np.where(mask, np.roll(pattern, shift, (0, 1)), image)
    reference = np.where(mask, pattern, image)
    (match,) = match_frames(frame[None], Reference(reference, mask))
    assert np.rint(found(match)).tolist() == [-shift[0], -shift[1]]
    (blind,) = match_frames(frame[None], Reference(reference, subpixel=False))
    assert blind["flag"] or np.rint(found(blind)).tolist() == [0, 0]


@pytest.mark.slow
def test_a_whole_run_recovers_every_roll(tmp_path, ewald, ewald_mask):
    rng = np.random.default_rng(0)
    rolls = rng.integers(-20, 21, size=(200, 2))
    rolls[0] = 0
    frames = np.stack([rng.poisson(rolled(ewald, ewald_mask, tuple(roll)) / 10) for roll in rolls]).astype(np.uint16)
    store_frames(tmp_path / "frames.zarr", frames)
    command = [sys.executable, "-m", "stillframe", "run", tmp_path / "frames.zarr", "--out", tmp_path / "run"]
    command += ["--mask", DATA / "ewald_walkoff_mask.tif", "--reference", "0"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with xr.open_zarr(tmp_path / "run" / "shifts.zarr", chunks=None) as shifts:
        np.testing.assert_array_equal(np.rint(shifts["shift"].values), -rolls)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["frames"] == 200
