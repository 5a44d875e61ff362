import json
import os

import numpy as np
import pytest
import tifffile
import xarray as xr
import zarr
from PIL import Image

from stillframe import load_mask, open_frames
from stillframe.partition import Unit
from stillframe.storage.coordinates import frame_coordinates
from stillframe.storage.frames import open_source
from synthetic import store_frames


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 1000, size=(10, 12, 14)).astype(np.uint16)


def test_an_array_a_group_and_either_format_open_alike(tmp_path, frames):
    store_frames(tmp_path / "v3.zarr", frames)
    store_frames(tmp_path / "v2.zarr", frames, zarr_format=2)
    store_frames(tmp_path / "group.zarr" / "frames", frames)
    store_frames(tmp_path / "named.zarr" / "images", frames, shards=(5, 12, 14))
    zarr.open_group(tmp_path / "group.zarr", mode="a")
    zarr.open_group(tmp_path / "named.zarr", mode="a")
    for name in ("v3.zarr", "v2.zarr", "group.zarr", "group.zarr/frames", "named.zarr"):
        source = open_source(tmp_path / name)
        np.testing.assert_array_equal(source.read(Unit(0, 2, 7)).frames, frames[2:7])
        np.testing.assert_array_equal(open_frames(tmp_path / name).values, frames)


def test_coordinates_come_along(stored, experiment):
    frames = open_frames(stored[0])
    assert set(frames.coords) == {"time", "scan", "delay", "kind"}
    assert frames["time"].dtype.kind == "M"
    assert frames["kind"].values[:3].tolist() == ["pumped", "pumped", "unpumped"]
    np.testing.assert_array_equal(frames["delay"], experiment.delay)
    assert frames["delay"].attrs["units"] == "ps"


def test_a_bare_array_has_no_coordinates(tmp_path, frames):
    assert not frame_coordinates(open_source(store_frames(tmp_path / "a.zarr", frames)))


def test_a_store_of_xarray_opens(tmp_path, frames):
    stack = xr.Dataset({"images": (("shot", "y", "x"), frames)}, {"power": ("shot", np.arange(10.0))})
    stack.to_zarr(tmp_path / "x.zarr", zarr_format=2)
    opened = open_frames(tmp_path / "x.zarr")
    np.testing.assert_array_equal(opened, frames)
    np.testing.assert_array_equal(opened["power"], np.arange(10))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: None, FileNotFoundError, "does not exist"),
        (lambda p: p.mkdir(), ValueError, "not a Zarr array or group"),
        (lambda p: p.write_bytes(b"x"), ValueError, "not a Zarr array or group"),
        (lambda p: store_frames(p, np.zeros((4, 5)), chunks=(1, 5)), ValueError, r"frames are \(frame, y, x\)"),
        (lambda p: store_frames(p, np.zeros((0, 5, 5)), chunks=(1, 5, 5)), ValueError, "nothing to register"),
        (lambda p: store_frames(p, np.zeros((2, 5, 5), complex)), TypeError, "dtype complex128"),
        (lambda p: zarr.open_group(p, mode="w"), ValueError, "holds no arrays"),
    ],
)
@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
def test_a_path_without_a_stack_raises(tmp_path, make, error, words):
    make(tmp_path / "a.zarr")
    with pytest.raises(error, match=words):
        open_frames(tmp_path / "a.zarr")


def test_chunks_without_a_pixel_raise(tmp_path, frames):
    path = store_frames(tmp_path / "a.zarr", frames, chunks=(1, 12, 14))
    metadata = path / "zarr.json"
    stored = json.loads(metadata.read_text())
    stored["chunk_grid"]["configuration"]["chunk_shape"] = [1, 0, 14]
    metadata.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="metadata are damaged|not a Zarr array"):
        open_frames(path)


def without_names(path):
    """Spoil the attributes of a Zarr node: zarr reads such metadata without an error."""
    metadata = path / "zarr.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"attributes": [1]}))


def torn(path):
    """Cut the metadata of a Zarr node short."""
    metadata = path / "zarr.json"
    metadata.write_text(metadata.read_text()[:40])


def without_shape(path):
    """Take the shape of an array from its metadata."""
    stored = json.loads((path / "zarr.json").read_text())
    stored.pop("shape", None)
    (path / "zarr.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("node", "spoil"),
    [("", without_names), ("", torn), ("frames", without_names), ("frames", torn), ("frames", without_shape)],
)
def test_damaged_metadata_raise(tmp_path, frames, node, spoil):
    path = tmp_path / "a.zarr"
    zarr.create_group(path).create_array("frames", data=frames)
    spoil(path / node)
    with pytest.raises(ValueError, match="metadata are damaged|not a Zarr array"):
        open_frames(path)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ({"dtype": "int16", "scale_factor": 0.01, "_FillValue": -32768}, "scale_factor = 0.01, _FillValue = -32768"),
        ({"dtype": "int16", "add_offset": 5.0, "_FillValue": 0}, "add_offset = 5.0"),
        ({"dtype": "uint16", "_FillValue": 65535}, "_FillValue = 65535"),
        ({"_FillValue": -999.0}, "_FillValue = -999"),
        ({"dtype": "int16", "_FillValue": 0, "_Unsigned": "true"}, "_Unsigned = true"),
    ],
)
def test_numbers_that_are_no_pixels_raise(tmp_path, frames, encoding, words, zarr_format):
    encoding, attributes = dict(encoding), {}
    if "_Unsigned" in encoding:  # which xarray writes for no array of floats
        attributes["_Unsigned"] = encoding.pop("_Unsigned")
    stack = xr.Dataset({"frames": (("frame", "y", "x"), frames.astype(float).round())})
    stack.to_zarr(tmp_path / "f.zarr", zarr_format=zarr_format, encoding={"frames": encoding}, consolidated=False)
    zarr.open_array(tmp_path / "f.zarr" / "frames").attrs.update(attributes)
    with pytest.raises(ValueError, match=f"stored encoded .*{words}.*Write the decoded frames once"):
        open_source(tmp_path / "f.zarr")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("dtype", "fill"), [("f4", None), ("u2", None), ("u2", 0), ("f8", np.nan)])
def test_fill_values_that_mislead_nobody_are_accepted(tmp_path, frames, dtype, fill, zarr_format):
    stack = xr.Dataset({"frames": (("frame", "y", "x"), frames.astype(dtype))})
    encoding = {} if fill is None else {"frames": {"_FillValue": fill}}
    stack.to_zarr(tmp_path / "f.zarr", zarr_format=zarr_format, encoding=encoding, consolidated=False)
    np.testing.assert_array_equal(open_source(tmp_path / "f.zarr", missing_chunks="fill")[:, :, :], frames)


def test_two_stacks_raise(tmp_path, frames):
    zarr.open_group(tmp_path / "two.zarr", mode="w")
    store_frames(tmp_path / "two.zarr" / "a", frames)
    store_frames(tmp_path / "two.zarr" / "b", frames)
    with pytest.raises(ValueError, match=r"Give the path of the array itself, for example .*two\.zarr/[ab]"):
        open_frames(tmp_path / "two.zarr")


def test_stored_names_of_axes_decide_their_order(tmp_path, frames):
    square = np.zeros((12, 12, 12), np.uint16)
    stack = xr.Dataset({"frames": (("frame", "y", "x"), square)}, {"y": np.arange(12.0), "x": np.arange(12.0)})
    stack["power"] = ("frame", np.arange(12.0))
    stack.to_zarr(tmp_path / "named.zarr", zarr_format=2)
    assert set(open_frames(tmp_path / "named.zarr").coords) == {"power"}
    stack.transpose("y", "x", "frame").to_zarr(tmp_path / "turned.zarr", zarr_format=2)
    with pytest.raises(ValueError, match=r"stored as \(y, x, frame\)"):
        open_frames(tmp_path / "turned.zarr")


def test_damaged_coordinates_are_left_out_and_reserved_names_changed(tmp_path, frames):
    stack = xr.Dataset({"frames": (("frame", "y", "x"), frames)})
    stack["quality"] = ("frame", np.arange(10, dtype="i1"), {"flag_masks": [1, 2], "flag_meanings": "a b"})
    stack["score"] = ("frame", np.arange(10.0))
    stack["power"] = ("frame", np.arange(10.0) + 1)
    stack.to_zarr(tmp_path / "a.zarr", zarr_format=2)
    (tmp_path / "a.zarr" / "power" / "0").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="power is left out: it cannot be read"):
        opened = open_frames(tmp_path / "a.zarr")
    assert set(opened.coords) == {"quality", "stored_score"}


@pytest.mark.parametrize("spoil", [without_names, torn, without_shape])
def test_a_coordinate_with_damaged_metadata_is_left_out(tmp_path, frames, spoil):
    group = zarr.create_group(tmp_path / "a.zarr")
    group.create_array("frames", data=frames)
    for name in ("power", "scan"):
        group.create_array(name, data=np.arange(10.0))
    (tmp_path / "a.zarr" / "notes").mkdir()
    spoil(tmp_path / "a.zarr" / "power")
    with pytest.warns(UserWarning, match="power is left out: it cannot be (opened|read)"):
        assert set(open_frames(tmp_path / "a.zarr").coords) == {"scan"}


def test_a_stack_of_another_name_beside_damaged_metadata_has_to_be_named(tmp_path, frames):
    group = zarr.create_group(tmp_path / "a.zarr")
    for name in ("movie", "flat"):
        group.create_array(name, data=frames)
    torn(tmp_path / "a.zarr" / "flat")
    with pytest.raises(
        ValueError, match=r"flat cannot be opened .* path of the stack itself, for example .*a\.zarr/movie"
    ):
        open_frames(tmp_path / "a.zarr")
    with pytest.warns(UserWarning, match="flat is left out"):
        assert open_frames(tmp_path / "a.zarr" / "movie").shape == frames.shape


def test_coordinates_that_cannot_be_decoded_are_left_out_and_bytes_become_words(tmp_path, frames):
    stack = xr.Dataset({"frames": (("frame", "y", "x"), frames)})
    stack["time"] = ("frame", np.arange(10.0), {"units": "bananas since breakfast"})
    stack["kind"] = ("frame", np.array([b"pumped", b"unpumped"] * 5))
    stack["scan"] = ("frame", np.arange(10))
    stack.to_zarr(tmp_path / "a.zarr", zarr_format=2)
    with pytest.warns(UserWarning, match="time is left out: it cannot be read"):
        opened = open_frames(tmp_path / "a.zarr")
    assert set(opened.coords) == {"kind", "scan"}
    assert opened["kind"].values[:2].tolist() == ["pumped", "unpumped"]


def test_a_misspelt_choice_raises(tmp_path, frames):
    with pytest.raises(ValueError, match="Choose report or fill"):
        open_frames(store_frames(tmp_path / "a.zarr", frames), missing_chunks="ignore")


class TestDamage:
    """A missing or torn chunk is named; what can be read is read."""

    @pytest.fixture
    def path(self, tmp_path, frames):
        return store_frames(tmp_path / "a.zarr", frames, chunks=(2, 12, 14))

    def test_missing_chunk(self, path, frames):
        (path / "c" / "1" / "0" / "0").unlink()
        reading = open_source(path).read(Unit(0, 1, 9))
        assert reading.damaged.tolist() == [False, True, True, False, False, False, False, False]
        assert reading.problems == ["frames 2–3: chunk c/1/0/0 is missing"]
        np.testing.assert_array_equal(reading.frames[~reading.damaged], frames[1:9][~reading.damaged])

    def test_missing_chunk_as_fill(self, path):
        (path / "c" / "1" / "0" / "0").unlink()
        reading = open_source(path, missing_chunks="fill").read(Unit(0, 0, 10))
        assert not reading.damaged.any()
        assert not reading.frames[2:4].any()

    def test_torn_chunk(self, path):
        file = path / "c" / "2" / "0" / "0"
        file.write_bytes(file.read_bytes()[:-20])
        reading = open_source(path).read(Unit(0, 0, 10))
        assert np.flatnonzero(reading.damaged).tolist() == [4, 5]
        assert "frames 4–5: cannot be decoded" in reading.problems[0]

    def test_lazy_reading_names_the_frames(self, path):
        (path / "c" / "1" / "0" / "0").unlink()
        frames = open_frames(path, chunk_frames=2)
        frames[:2].compute()
        with pytest.raises(OSError, match=r"frames 2–3 .*chunk c/1/0/0 is missing.*missing_chunks='fill'"):
            frames[2:4].compute(scheduler="sync")
        file = path / "c" / "3" / "0" / "0"
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(OSError, match=r"frames 6–7 .*cannot be decoded"):
            frames[6:8].compute(scheduler="sync")

    def test_identity_changes_with_the_file(self, path):
        source = open_source(path)
        before = source.identity(0, 4)
        assert [name for name, _, _ in before] == ["c/0/0/0", "c/1/0/0"]
        (path / "c" / "1" / "0" / "0").unlink()
        assert source.identity(0, 4)[0] == before[0]
        assert source.identity(0, 4)[1] == ("c/1/0/0", -1, -1)
        assert source.identity(2, 4, contents=True) == [("c/1/0/0", -1, "")]

    def test_identity_by_contents_ignores_times(self, path):
        source, file = open_source(path), path / "c" / "0" / "0" / "0"
        by_time, by_contents = source.identity(0, 2), source.identity(0, 2, contents=True)
        os.utime(file, (1, 1))
        assert source.identity(0, 2) != by_time
        assert source.identity(0, 2, contents=True) == by_contents
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        assert source.identity(0, 2, contents=True) != by_contents


class TestMask:
    MASK = np.array([[True, False, True], [True, True, False]])

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
    @pytest.mark.parametrize("kind", ["npy", "tif", "png", "zarr"])
    def test_is_read_from_every_kind(self, tmp_path, kind, dtype):
        path, values = tmp_path / f"mask.{kind}", self.MASK.astype(dtype)
        if kind == "npy":
            np.save(path, values)
        elif kind == "tif":
            tifffile.imwrite(path, values.astype(np.uint8) * 255)
        elif kind == "png":
            Image.fromarray(values.astype(np.uint8) * 255).save(path)
        else:
            zarr.save_array(path, values)
        loaded = load_mask(path)
        assert loaded.dtype == bool
        np.testing.assert_array_equal(loaded, self.MASK)

    def test_of_a_palette_is_not_inverted(self, tmp_path):
        picture = Image.fromarray(np.where(self.MASK, 0, 1).astype(np.uint8), mode=None).convert("P")
        picture.putpalette([255, 255, 255, 0, 0, 0])
        picture.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png"), self.MASK)

    def test_comes_out_of_a_group(self, tmp_path):
        zarr.save_group(tmp_path / "g.zarr", mask=self.MASK)
        np.testing.assert_array_equal(load_mask(tmp_path / "g.zarr"), self.MASK)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            (np.zeros((3, 3), bool), "False everywhere"),
            (np.arange(9).reshape(3, 3), "8 different values"),
            (np.ones(4, bool), r"one picture \(y, x\) is needed"),
            (np.full((3, 3), "a"), "not booleans"),
        ],
    )
    def test_of_wrong_content_raises(self, tmp_path, values, words):
        np.save(tmp_path / "mask.npy", values)
        with pytest.raises(ValueError, match=words):
            load_mask(tmp_path / "mask.npy")

    def test_that_cannot_be_read_raises(self, tmp_path):
        (tmp_path / "mask.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="cannot be read as an image"):
            load_mask(tmp_path / "mask.png")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_mask(tmp_path / "nowhere.npy")
