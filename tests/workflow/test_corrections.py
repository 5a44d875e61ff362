"""Runs with a dark and a flat: what they change, what they leave, and what follows from a change of a file."""

import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

import stillframe as sf
from faulty import Started, finish, records, run_command, settings
from stillframe.partition import unit_memory
from stillframe.simulation.experiment import Experiment
from stillframe.storage.frames import open_source
from stillframe.workflow.begin import cut
from stillframe.workflow.forecast import forecast
from stillframe.workflow.run_reference import prepare_reference
from synthetic import store_frames

SHAPE = (96, 80)


@pytest.fixture(scope="module")
def experiment():
    return Experiment(frames=24, shape=SHAPE, dose=100.0, max_drift=4.0, dark_every=0, jumps=0, seed=3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return {"dark": rng.integers(0, 400, SHAPE).astype(np.uint16), "flat": rng.normal(5.0, 0.5, SHAPE)}


@pytest.fixture(scope="module")
def recorded(experiment, images, tmp_path_factory):
    """Frames and mask as files, and the dark and the flat of their detector, which tests only read."""
    folder = tmp_path_factory.mktemp("recorded")
    response = images["flat"] / images["flat"].mean()
    rng = np.random.default_rng(1)
    frames = np.stack([rng.binomial(experiment.render(n), 0.7 * response) for n in range(24)]) + images["dark"]
    store_frames(folder / "frames.zarr", frames.astype(np.uint16))
    np.save(folder / "mask.npy", experiment.detector.mask)
    for name, image in images.items():
        np.save(folder / f"{name}.npy", image)
    return folder / "frames.zarr", folder / "mask.npy"


@pytest.fixture(scope="module")
def files(recorded):
    return {name: recorded[0].with_name(f"{name}.npy") for name in ("dark", "flat")}


@pytest.fixture
def own_files(files, tmp_path):
    """Copies of the dark and the flat, which a test may change."""
    return {name: shutil.copy(file, tmp_path) for name, file in files.items()}


@pytest.fixture(scope="module")
def corrected(recorded, files, tmp_path_factory):
    """Folder of a finished run with the dark and the flat, which tests only read."""
    out = tmp_path_factory.mktemp("corrected") / "run"
    finish(recorded, out, **files, reference_iterations=3)
    return out


def shifts_in(folder):
    with xr.open_zarr(folder / "shifts.zarr", chunks=None) as shifts:
        return shifts.load()


def rms(folder, experiment):
    error = shifts_in(folder)["shift"].values - experiment.shifts
    return np.sqrt(np.mean((error - error.mean(axis=0)) ** 2))


def test_a_run_corrects_its_frames_and_keeps_them_as_recorded(recorded, corrected, experiment, tmp_path):
    with pytest.raises(ValueError, match="cannot be aligned with one another.*do they need a dark"):
        finish(recorded, tmp_path / "refused", reference_iterations=3)
    finish(recorded, tmp_path / "without", reference_iterations=0)
    assert shifts_in(corrected).attrs["frames_corrected_for"] == "dark, flat"
    assert "frames_corrected_for" not in shifts_in(tmp_path / "without").attrs
    assert rms(corrected, experiment) < 0.03
    assert rms(tmp_path / "without", experiment) > 0.3
    with xr.open_zarr(corrected / "aligned.zarr", chunks=None) as aligned:
        assert aligned["frames"].dtype == np.uint16
        dy, dx = aligned["applied"].values[5].astype(int)
        moved = np.roll(zarr.open_array(recorded[0], mode="r")[5], (dy, dx), (0, 1))
        inner = np.s_[8:-8, 60:-8]
        valid = np.roll(np.load(recorded[1]), (dy, dx), (0, 1))[inner]
        np.testing.assert_array_equal(aligned["frames"].values[5][inner][valid], moved[inner][valid])


def test_the_same_command_does_nothing_and_another_dark_registers_again(recorded, own_files, images, tmp_path, capsys):
    out, files = tmp_path / "run", own_files
    finish(recorded, out, **files)
    before, reference = records(out), sf.load_reference(out / "reference.zarr").digest
    finish(recorded, out, **files)
    assert records(out) == before
    np.save(files["dark"], images["dark"] + np.eye(*SHAPE, dtype=np.uint16))
    capsys.readouterr()
    finish(recorded, out, **files)
    assert not set(records(out).items()) & set(before.items())
    assert sf.load_reference(out / "reference.zarr").digest != reference
    assert "dark" in capsys.readouterr().err


def test_the_flags_are_those_of_the_settings(recorded, files, tmp_path):
    status, said = Started(run_command(recorded, tmp_path / "run", workers=0, **files)).end()
    assert status == 0, said
    reference = sf.load_reference(tmp_path / "run" / "reference.zarr")
    np.testing.assert_array_equal(reference.dark, np.load(files["dark"]))
    np.testing.assert_array_equal(reference.flat, np.load(files["flat"]).astype(np.float32))


def test_a_stored_reference_brings_its_own_unless_others_are_given(recorded, corrected, images, tmp_path, capsys):
    source, other = open_source(recorded[0]), tmp_path / "other.npy"
    np.save(other, images["dark"] + 1)
    path = str(corrected / "reference.zarr")
    kept, _ = prepare_reference(settings(recorded, tmp_path / "second", reference=path), source)
    assert not capsys.readouterr().err
    changed, _ = prepare_reference(settings(recorded, tmp_path / "second", reference=path, dark=other), source)
    assert "made with another dark: its image stays as it is" in capsys.readouterr().err
    np.testing.assert_array_equal(kept.dark, images["dark"])
    np.testing.assert_array_equal(changed.dark, images["dark"] + 1)
    np.testing.assert_array_equal(changed.flat, kept.flat)
    finish(recorded, tmp_path / "second", reference=path)
    np.testing.assert_array_equal(shifts_in(tmp_path / "second")["shift"].values, shifts_in(corrected)["shift"].values)


def test_a_stored_reference_keeps_its_bad_pixels_beside_a_mask(recorded, tmp_path, capsys):
    mask = np.load(recorded[1])
    bad = np.zeros_like(mask)
    bad[70:74, 60] = True
    stored = sf.Reference(np.random.default_rng(2).poisson(50.0, SHAPE), mask & ~bad, max_shift=8)
    sf.save_reference(stored, tmp_path / "stored.zarr")
    path = str(tmp_path / "stored.zarr")
    again, _ = prepare_reference(settings(recorded, tmp_path / "run", reference=path), open_source(recorded[0]))
    np.testing.assert_array_equal(again.frame_mask, mask & ~bad)
    assert "4 of" in (said := capsys.readouterr().err) and "stored.zarr marks them as invalid" in said
    np.save(tmp_path / "dark.npy", np.zeros(SHAPE, np.uint16))
    with_dark = settings(recorded, tmp_path / "run", reference=path, dark=tmp_path / "dark.npy")
    prepare_reference(with_dark, open_source(recorded[0]))
    assert "made without a dark: its image stays as it is" in capsys.readouterr().err


def test_the_same_flat_beside_a_stored_reference_is_no_other_one(recorded, files, images, tmp_path, capsys):
    flat = images["flat"].copy()
    flat[3, 5] = np.nan
    np.save(tmp_path / "flat.npy", flat)
    image = np.random.default_rng(2).poisson(50.0, SHAPE)
    sf.save_reference(sf.Reference(image, np.load(recorded[1]), flat=flat, max_shift=8), tmp_path / "stored.zarr")
    options = {"reference": str(tmp_path / "stored.zarr"), "flat": tmp_path / "flat.npy"}
    prepare_reference(settings(recorded, tmp_path / "run", **options), open_source(recorded[0]))
    assert "made with another" not in capsys.readouterr().err
    prepare_reference(
        settings(recorded, tmp_path / "run", **options | {"flat": files["flat"]}), open_source(recorded[0])
    )
    assert "made with another flat" in capsys.readouterr().err


def test_a_reference_with_both_or_without_is_stored_whole(images, tmp_path):
    image = np.random.default_rng(2).poisson(50.0, SHAPE)
    for number, options in enumerate(
        ({}, images, {"dark": images["dark"]}, {"flat": images["flat"]}, {"against_scatter": True})
    ):
        reference = sf.Reference(image, max_shift=8, **options)
        sf.save_reference(reference, tmp_path / f"{number}.zarr")
        loaded = sf.load_reference(tmp_path / f"{number}.zarr")
        assert loaded.digest == reference.digest
        assert loaded.against_scatter == reference.against_scatter == ("against_scatter" in options)
        assert (tmp_path / f"{number}.zarr" / "dark").exists() == ("dark" in options)


def test_memory_of_the_correction_is_counted(recorded, files, tmp_path):
    source, pixels = open_source(recorded[0]), SHAPE[0] * SHAPE[1]
    plain, corrected = (unit_memory(source.layout, 4, 2, 12, corrected=one) for one in (False, True))
    assert corrected >= plain + 8 * pixels
    assert cut(settings(recorded, tmp_path / "run"), source, plain).unit_frames == 4
    with pytest.raises(ValueError, match="workers, or give them more memory"):
        cut(settings(recorded, tmp_path / "run", **files), source, plain)
    plain_mean = {"reference_iterations": 0}
    with_both = forecast(settings(recorded, tmp_path / "run", **files, **plain_mean), pilot=0)
    assert with_both.memory > forecast(settings(recorded, tmp_path / "run", **plain_mean), pilot=0).memory


def test_pixels_that_are_left_out_are_reported(recorded, own_files, images, tmp_path, capsys):
    flat = images["flat"].copy()
    flat[30:34] = np.nan
    np.save(own_files["flat"], flat)
    finish(recorded, tmp_path / "run", **own_files)
    assert "valid pixels are left out" in capsys.readouterr().err
    assert not shifts_in(tmp_path / "run")["mask"].values[30:34].any()


def test_files_of_another_shape_are_refused(recorded, own_files, tmp_path):
    np.save(own_files["dark"], np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"the dark image has shape \(3, 4\)"):
        finish(recorded, tmp_path / "run", **own_files)
