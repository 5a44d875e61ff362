import json

import numpy as np
import pytest
import xarray as xr
import zarr

import stillframe as sf
from stillframe.partition import Plan
from stillframe.storage.aligned_store import AlignedLayout, create_aligned
from stillframe.storage.durable import store_files
from synthetic import windows

FRAMES = windows((48, 40), [(0, 0), (3, -5), (-6, 6), (7, 2), (0, -1)])
UNITS = Plan(5, 2).units


def create(made, path):
    """Create a store; return whether its shards were kept, and what was on disk when their records were withdrawn."""
    forgotten = []

    def forget():
        there = (path / "frames" / "c").exists()
        forgotten.append((there, len(zarr.open_group(path, mode="r").attrs["missing"]) if there else 0))

    return create_aligned(*made, path, UNITS, [], forget), forgotten


@pytest.fixture(scope="module")
def aligned():
    """The dataset of shifts of some frames, and the layout of their aligned frames."""
    shifts = sf.register(xr.DataArray(FRAMES, dims=("frame", "y", "x")), sf.Reference(FRAMES[0], max_shift=9))
    return shifts.compute(), AlignedLayout.of(FRAMES.shape, FRAMES.dtype, 2, "nearest", None)


class TestTheAlignedStore:
    def missing(self, path):
        return zarr.open_group(path, mode="r").attrs["missing"]

    def test_that_is_new_has_all_units_missing(self, aligned, tmp_path):
        assert create(aligned, tmp_path / "aligned.zarr") == (False, [(False, 0)])
        assert self.missing(tmp_path / "aligned.zarr") == [str(unit) for unit in UNITS]

    def test_keeps_shards_of_equal_layout(self, aligned, tmp_path):
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
    def test_marks_all_units_missing_before_shards_of_another_layout_go(self, aligned, tmp_path, harm):
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


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("interpolation", ["nearest", "cubic"])
def test_a_runs_store_has_the_layout_and_words_of_lazily_aligned_frames(size, interpolation, tmp_path):
    frames = xr.DataArray(FRAMES, dims=("frame", "y", "x"), coords={"delay": ("frame", np.arange(5.0))})
    frames = frames.chunk(frame=size)
    shifts = sf.register(frames, sf.Reference(FRAMES[0], max_shift=9)).compute()
    sf.align(frames, shifts, interpolation=interpolation).to_zarr(tmp_path / "lazy.zarr", consolidated=False)
    layout = AlignedLayout.of(FRAMES.shape, FRAMES.dtype, size, interpolation, None)
    create_aligned(shifts, layout, tmp_path / "run.zarr", Plan(5, size).units, [], lambda: None)
    lazy, run = (
        json.loads((tmp_path / name / "frames" / "zarr.json").read_text()) for name in ("lazy.zarr", "run.zarr")
    )
    lazy["attributes"].pop("_FillValue", None)  # which xarray adds to floats
    assert lazy == run
    with xr.open_zarr(tmp_path / "run.zarr") as opened:
        assert opened["frames"].dtype == layout.dtype
        assert "delay" in opened["frames"].coords


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
