import json

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stillframe as sf
from stillframe.images.resample import resample_frames
from stillframe.registration.match import match_frames
from strategies import partition
from synthetic import blocked, contents, store_frames, windows

SHIFTS = [(0, 0), (3, -5), (-6, 6), (7, 2), (0, -1), (1, 1), (-3, -4)]
FRAMES = windows((48, 40), SHIFTS)
MASK = blocked((48, 40))
REFERENCE = sf.Reference(FRAMES[0], MASK, max_shift=9)


def no_scheduler(*_, **__):
    raise AssertionError("something was computed while the graph was built")


@pytest.fixture
def path(tmp_path):
    return store_frames(tmp_path / "frames.zarr", FRAMES)


def same(lazy, matches):
    np.testing.assert_array_equal(lazy["shift"][:, 0], matches["dy"])
    np.testing.assert_array_equal(lazy["shift"][:, 1], matches["dx"])
    np.testing.assert_array_equal(lazy["score"], matches["score"])
    np.testing.assert_array_equal(lazy["flag"], matches["flag"])


def test_building_computes_and_reads_nothing(path):
    for chunk in path.glob("c/*/*/*"):
        chunk.unlink()
    with dask.config.set(scheduler=no_scheduler):
        frames = sf.open_frames(path)
        shifts = sf.register(frames, REFERENCE)
        aligned = sf.align(frames, shifts, interpolation="linear")
        assert repr(frames) and repr(shifts) and repr(aligned)


def test_ten_frames_read_only_their_chunks(tmp_path):
    frames = np.concatenate([FRAMES] * 4)
    path = store_frames(tmp_path / "frames.zarr", frames)
    for number in [*range(10), *range(20, 28)]:
        (path / "c" / str(number) / "0" / "0").unlink()
    opened = sf.open_frames(path, chunk_frames=5)
    shifts = sf.register(opened, REFERENCE)
    some = shifts.isel(frame=slice(10, 20)).compute()
    same(some, match_frames(frames[10:20], REFERENCE))
    aligned = sf.align(opened, shifts)[10:20].compute()
    assert aligned.shape == (10, 48, 40)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=st.tuples(partition(7), partition(48), partition(40)), interpolation=st.sampled_from(["nearest", "cubic"])
)
def test_every_chunking_gives_the_numpy_answer(chunks, interpolation):
    frames = xr.DataArray(FRAMES, dims=("frame", "y", "x")).chunk(dict(zip(("frame", "y", "x"), chunks, strict=True)))
    with dask.config.set(scheduler="sync"):
        shifts = sf.register(frames, REFERENCE)
        aligned = sf.align(frames, shifts, interpolation=interpolation)
        shifts, aligned = dask.compute(shifts, aligned)
    matches = match_frames(FRAMES, REFERENCE)
    same(shifts, matches)
    moves = np.stack([matches["dy"], matches["dx"]], axis=1)
    np.testing.assert_array_equal(aligned, resample_frames(FRAMES, moves, MASK, interpolation=interpolation))


def test_one_compute_runs_the_kernel_once(monkeypatch, path):
    calls = []

    def counting(block, reference):
        calls.append(len(block))
        return match_frames(block, reference)

    monkeypatch.setattr("stillframe.lazy.match_frames", counting)
    sf.register(sf.open_frames(path, chunk_frames=3), REFERENCE).compute(scheduler="sync")
    assert sorted(calls) == [1, 3, 3]


def test_the_dataset_is_complete_by_itself(path, tmp_path):
    frames = sf.open_frames(path)
    shifts = sf.register(frames, REFERENCE).compute()
    np.testing.assert_array_equal(shifts["mask"], MASK)
    np.testing.assert_array_equal(shifts["reference"], REFERENCE.image)
    assert shifts["axis"].values.tolist() == ["y", "x"]
    assert shifts["shift"].attrs["units"] == "pixel"
    assert shifts["flag"].attrs["flag_meanings"].startswith("dark corrupt saturated")
    assert all("long_name" in shifts[name].attrs for name in shifts)
    assert shifts.attrs["reference_sha256"] == REFERENCE.digest


def test_coordinates_come_along(stored):
    frames = sf.open_frames(stored[0])
    shifts = sf.register(frames, sf.make_reference(frames, sf.load_mask(stored[1])))
    aligned = sf.align(frames, shifts)
    for lazy in (shifts, aligned):
        assert {"time", "scan", "delay", "kind"} <= set(lazy.coords)


def test_a_stored_dataset_aligns_lazily_and_in_any_order(path, tmp_path):
    frames = sf.open_frames(path)
    shifts = sf.register(frames, REFERENCE).compute()
    expected = sf.align(frames, shifts).compute()
    turned = shifts.transpose("y", "x", "axis", "frame").sel(axis=["x", "y"])
    turned.to_zarr(tmp_path / "s.zarr", zarr_format=2)
    with dask.config.set(scheduler=no_scheduler):
        aligned = sf.align(frames, xr.open_zarr(tmp_path / "s.zarr"))
    np.testing.assert_array_equal(aligned, expected)


def test_applied_is_preferred_to_shift():
    frames = xr.DataArray(FRAMES, dims=("frame", "y", "x"))
    shifts = sf.register(frames, REFERENCE).compute()
    applied = shifts.assign(applied=shifts["shift"] * 0 + 1)
    np.testing.assert_array_equal(sf.align(frames, applied)[:, 1:, 1:], np.where(MASK, FRAMES, 0)[:, :-1, :-1])


def test_the_fill_is_stated():
    frames = xr.DataArray(FRAMES, dims=("frame", "y", "x"))
    shifts = sf.register(frames, REFERENCE).compute()
    assert sf.align(frames, shifts).attrs["fill"] == 0
    assert sf.align(frames, shifts, fill=7).attrs["fill"] == 7
    assert sf.align(frames, shifts, interpolation="cubic").attrs["fill"] == "NaN"


class TestReference:
    STACK = xr.DataArray(FRAMES, dims=("frame", "y", "x"))

    def test_is_one_frame(self):
        reference = sf.make_reference(self.STACK, MASK, use=2, max_shift=9)
        np.testing.assert_array_equal(reference.image, np.where(MASK, FRAMES[2], 0))
        assert reference.image.dtype == np.uint16

    def test_is_a_mean_of_usable_frames(self):
        stack = FRAMES.copy()
        stack[1] = 0
        reference = sf.make_reference(stack, MASK, use=slice(4), iterations=0, max_shift=9)
        mean = stack[[0, 2, 3]].mean(axis=0)
        np.testing.assert_allclose(reference.image, np.where(MASK, mean, 0), rtol=1e-6)

    def test_is_any_slice(self):
        reference = sf.make_reference(self.STACK, use=slice(1, 7, 3), iterations=0, max_shift=9)
        np.testing.assert_allclose(reference.image, FRAMES[[1, 4]].mean(axis=0))

    def test_is_an_external_image(self):
        image = np.eye(48, 40)
        np.testing.assert_array_equal(sf.make_reference(image, max_shift=9).image, image)

    def test_reads_only_its_frames(self, path):
        for number in range(3, 7):
            (path / "c" / str(number) / "0" / "0").unlink()
        assert sf.make_reference(sf.open_frames(path, chunk_frames=1), use=slice(3), max_shift=9).shape == (48, 40)

    @pytest.mark.parametrize(
        ("stack", "use", "words"),
        [
            (FRAMES, slice(8), "there are 7 frames"),
            (FRAMES, 7, "there are 7"),
            (FRAMES * 0, slice(4), "none is usable"),
            (FRAMES, slice(-8, None), "Ask for frames that are there"),
            (FRAMES, slice(5, 2), "gives 0 of them"),
            (FRAMES * 0, 1, "no contrast"),
        ],
    )
    def test_that_cannot_be_made_raises(self, stack, use, words):
        with pytest.raises(ValueError, match=words):
            sf.make_reference(stack, MASK, use=use, max_shift=9)

    def test_stored_comes_back(self, tmp_path):
        file = sf.save_reference(REFERENCE, tmp_path / "reference.zarr")
        assert sf.load_reference(tmp_path / "reference.zarr").digest == REFERENCE.digest
        assert file.load().digest == REFERENCE.digest

    def test_stored_and_changed_is_refused(self, tmp_path):
        file = sf.save_reference(REFERENCE, tmp_path / "reference.zarr")
        sf.save_reference(sf.Reference(FRAMES[1], MASK, max_shift=9), tmp_path / "reference.zarr")
        with pytest.raises(ValueError, match="no longer the reference"):
            file.load()

    def test_that_is_not_stored_raises(self, tmp_path):
        with pytest.raises(ValueError, match="not a stored reference"):
            sf.load_reference(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f, s: sf.register(f[:, :40], REFERENCE), ValueError, "the same detector"),
        (lambda f, s: sf.register(f[0], REFERENCE), ValueError, r"\(frame, y, x\) is needed"),
        (lambda f, s: sf.register(f.astype(complex), REFERENCE), TypeError, "complex128"),
        (lambda f, s: sf.register(f.values, REFERENCE), TypeError, "are a ndarray, but labelled ones are needed"),
        (lambda f, s: sf.align(f.values, s), TypeError, "xarray.DataArray"),
        (lambda f, s: sf.align(f, s[["shift"]]), ValueError, "lack mask"),
        (lambda f, s: sf.align(f[:3], s), ValueError, "Select the same frames"),
        (
            lambda f, s: sf.align(
                f.assign_coords(scan=("frame", range(7))), s.assign_coords(scan=("frame", range(1, 8)))
            ),
            ValueError,
            "coordinate scan",
        ),
        (lambda f, s: sf.align(f, s, interpolation="best"), ValueError, "Choose one of"),
        (lambda f, s: sf.align(f, s, fill=-1), ValueError, "cannot hold"),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    frames = xr.DataArray(FRAMES, dims=("frame", "y", "x"))
    shifts = sf.register(frames, REFERENCE)
    with pytest.raises(error, match=words):
        call(frames, shifts)


def test_an_error_in_a_block_names_its_frames(monkeypatch, path):
    def broken(block, reference):
        raise MemoryError("no memory")

    monkeypatch.setattr("stillframe.lazy.match_frames", broken)
    with pytest.raises(RuntimeError, match=r"frames? \d(–\d)? could not be processed: no memory"):
        sf.register(sf.open_frames(path, chunk_frames=3), REFERENCE).compute(scheduler="sync")


class TestOnACluster:
    """The lazy objects run on a distributed cluster as they are, and write the batch's bytes."""

    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def batch(stored, tmp_path_factory):
        out = tmp_path_factory.mktemp("batch") / "run"
        sf.run(sf.Settings(frames=stored[0], mask=stored[1], out=out, workers=0, unit_frames=8, max_shift=12))
        return out

    @pytest.mark.parametrize("saved", [False, True])
    def test_shifts(self, client, stored, batch, tmp_path, saved):
        frames = sf.open_frames(stored[0], chunk_frames=8)
        reference = sf.load_reference(batch / "reference.zarr")
        chosen = sf.save_reference(reference, tmp_path / "reference.zarr") if saved else reference
        shifts = sf.register(frames, chosen).compute()
        with xr.open_zarr(batch / "shifts.zarr", chunks=None) as expected:
            xr.testing.assert_equal(shifts, expected)

    def test_aligned_frames(self, client, stored, batch, tmp_path):
        frames = sf.open_frames(stored[0], chunk_frames=8)
        shifts = sf.register(frames, sf.load_reference(batch / "reference.zarr"))
        sf.align(frames, shifts).to_zarr(tmp_path / "aligned.zarr", zarr_format=3, consolidated=False)
        mine, theirs = contents(tmp_path / "aligned.zarr"), contents(batch / "aligned.zarr")
        roots = [json.loads(files.pop("zarr.json"))["node_type"] for files in (mine, theirs)]
        assert roots == ["group", "group"]
        assert mine == {name: data for name, data in theirs.items() if name.split("/")[0] not in ("applied", "axis")}
        assert len([name for name in mine if name.startswith("frames/c/")]) == 3
