import json

import numpy as np
import pytest
import xarray as xr
import zarr

import stillframe as sf
from stillframe.lazy import empty_aligned
from stillframe.store import create_aligned, store_files
from stillframe.units import Plan
from synthetic import windows

FRAMES = windows((48, 40), [(0, 0), (3, -5), (-6, 6), (7, 2), (0, -1)])
UNITS = Plan(5, 2).units


def create(dataset, path):
    """Create a store; tell whether its frames were kept, and which were there and marked missing when forgotten."""
    forgotten = []

    def forget():
        there = (path / "frames" / "c").exists()
        forgotten.append((there, len(zarr.open_group(path, mode="r").attrs["missing"]) if there else 0))

    return create_aligned(dataset, path, UNITS, forget), forgotten


@pytest.fixture
def aligned():
    shifts = sf.register(xr.DataArray(FRAMES, dims=("frame", "y", "x")), sf.Reference(FRAMES[0], max_shift=9))
    template = empty_aligned(shifts, FRAMES.dtype, 2, interpolation="nearest", fill=None)
    return template.to_dataset().assign_attrs(complete=False, missing=[])


class TestTheAlignedStore:
    def missing(self, path):
        return zarr.open_group(path, mode="r").attrs["missing"]

    def test_that_is_new_keeps_no_frames_and_misses_all(self, aligned, tmp_path):
        assert create(aligned, tmp_path / "aligned.zarr") == (False, [(False, 0)])
        assert self.missing(tmp_path / "aligned.zarr") == [str(unit) for unit in UNITS]

    def test_keeps_its_frames_where_they_mean_the_same(self, aligned, tmp_path):
        path = tmp_path / "aligned.zarr"
        create(aligned, path)
        kept, strange = (path / "frames" / "c" / name / "0" / "0" for name in "13")
        for shard in (kept, strange):
            shard.parent.mkdir(parents=True)
            shard.write_bytes(b"pixels")
        assert create(aligned, path) == (True, [])
        assert kept.exists()
        assert not strange.exists()
        assert self.missing(path) == []

    @pytest.mark.parametrize("harm", ["damaged", "another layout"])
    def test_says_at_once_that_frames_nobody_understands_are_gone(self, aligned, tmp_path, harm):
        path = tmp_path / "aligned.zarr"
        create(aligned, path)
        shard = path / "frames" / "c" / "1" / "0" / "0"
        shard.parent.mkdir(parents=True)
        shard.write_bytes(b"pixels")
        metadata = path / "frames" / "zarr.json"
        other = json.loads(metadata.read_text()) | {"data_type": "float32"}
        metadata.write_text("{" if harm == "damaged" else json.dumps(other))
        assert create(aligned, path) == (False, [(True, len(UNITS))])
        assert not shard.exists()
        assert self.missing(path) == [str(unit) for unit in UNITS]

    def test_is_made_from_something_that_never_passes_for_frames(self, aligned):
        with pytest.raises(RuntimeError, match="holds none"):
            aligned["frames"].compute()


@pytest.mark.parametrize("size", [2, 5, 16])
@pytest.mark.parametrize("interpolation", ["nearest", "cubic"])
def test_what_stands_for_aligned_frames_looks_and_is_stored_as_they_are(size, interpolation):
    frames = xr.DataArray(FRAMES, dims=("frame", "y", "x"), coords={"delay": ("frame", np.arange(5.0))}).chunk(
        frame=size
    )
    shifts = sf.register(frames, sf.Reference(FRAMES[0], max_shift=9))
    real = sf.align(frames, shifts, interpolation=interpolation)
    stands = empty_aligned(shifts, FRAMES.dtype, size, interpolation=interpolation, fill=None)
    for name in ("name", "dims", "shape", "dtype", "attrs", "encoding"):
        assert repr(getattr(stands, name)) == repr(getattr(real, name))  # a fill of NaN is not itself
    assert stands.coords.to_dataset().identical(real.coords.to_dataset())


def test_the_files_of_a_store_are_all_but_the_shards_of_frames(tmp_path):
    for name in (
        "zarr.json",
        "frames/zarr.json",
        "frames/c/0/0/0",
        "frames/c/1/0/0",
        "applied/c/0",
        "applied/zarr.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = [str(file.relative_to(tmp_path)) for file in store_files(tmp_path)]
    assert sorted(found) == ["applied/c/0", "applied/zarr.json", "frames/zarr.json", "zarr.json"]
    assert not list(store_files(tmp_path / "nothing"))
