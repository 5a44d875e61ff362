"""Settings, masks, metadata and records that nobody meant: an error that names the culprit, or a right answer."""

import json
import shutil
import warnings
from datetime import timedelta

import numpy as np
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faulty import LONG, finish
from faulty import settings as settings_of
from stillframe.partition import Unit
from stillframe.settings import Settings, make_settings, read_toml
from stillframe.storage.coordinates import frame_coordinates
from stillframe.storage.frames import open_source
from stillframe.storage.pictures import load_image, load_mask
from stillframe.storage.reference_store import load_reference
from stillframe.workflow.begin import check_folder
from stillframe.workflow.lease import read_leases
from stillframe.workflow.ledger import Ledger, UnitRecord, known_plan
from stillframe.workflow.run_folder import Manifest, RunDescription, RunFolder
from stillframe.workflow.status import read_status
from stillframe.workflow.verify import verify
from synthetic import store_frames

EXPECTED = (ValueError, TypeError, OSError)


def fuzz(short, long):
    """So many examples, none of which may hang."""

    def decorate(test):
        return settings(
            max_examples=long if LONG else short,
            deadline=timedelta(seconds=20),
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )(test)

    return decorate


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def spoiled(draw, content):
    """A file's bytes, changed in a few places, cut, or something else altogether."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(out) - 1)))
        what = draw(st.sampled_from(["flip", "cut", "insert", "drop", "swap"]))
        if what == "flip" and out:
            out[place] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del out[place:]
        elif what == "insert":
            out[place:place] = draw(st.binary(max_size=6))
        elif what == "drop":
            del out[place : place + draw(st.integers(1, 30))]
        else:
            out[place : place + 4] = draw(st.sampled_from([b"null", b"1e99", b"-1", b"[]", b"{}", b'"a"', b"NaN"]))
    return bytes(out)


@st.composite
def changed_json(draw, content):
    """A JSON object of which one member is another value."""
    out = json.loads(content)
    place = out
    while True:
        keys = list(place.keys() if isinstance(place, dict) else range(len(place)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or draw(st.booleans()):
            place[key] = draw(values)
            break
        place = place[key]
    return json.dumps(out).encode()


def in_words(error, *culprits):
    assert len(str(error).strip()) > 10, repr(error)
    assert not culprits or any(culprit in str(error) for culprit in culprits), repr(error)


@fuzz(1200, 4000)
@given(data=st.dictionaries(st.sampled_from([*Settings.model_fields, "novelty"]), values, max_size=6))
def test_settings(data, tried):
    tried("fuzzed settings")
    try:
        made = make_settings({"frames": "a", "out": "b"} | data)
    except ValueError as error:
        in_words(error, *data)
    else:
        assert make_settings(json.loads(made.model_dump_json())) == made


@fuzz(600, 2000)
@given(data=st.data())
def test_settings_files(data, undisturbed, tmp_path, tried):
    tried("fuzzed settings files")
    file = tmp_path / "settings.toml"
    file.write_bytes(data.draw(spoiled((undisturbed / "settings.toml").read_bytes())))
    try:
        make_settings(read_toml(file))
    except EXPECTED as error:
        in_words(error)


@fuzz(1200, 4000)
@given(data=st.data())
def test_records(data, undisturbed, tmp_path, tried):
    """A damaged record is none."""
    tried("fuzzed records")
    ledger = Ledger(RunFolder(tmp_path))
    ledger.prepare()
    content = (undisturbed / "units" / "register" / "000001.json").read_bytes()
    RunFolder(tmp_path).record("register", 1).write_bytes(data.draw(spoiled(content) | changed_json(content)))
    try:
        read = ledger.read("register", 1)
    except ValueError as error:
        in_words(error, "000001.json")
        return
    if read is not None:
        assert read == UnitRecord.parse(tmp_path, content)
        assert len(read.to_matches()) == read.stop - read.start


KINDS = ("run.json", "manifest.json", "settings.toml", "units/align/000002.json", "lease.json")


@fuzz(1000, 4000)
@given(data=st.data(), name=st.sampled_from(KINDS))
def test_files_of_a_run(data, name, undisturbed, stored, tmp_path, tried):
    """Whatever lies in a run's folder, its status and a new run's first look end in words."""
    tried("fuzzed files of a run")
    out = tmp_path / "run"
    if not out.exists():
        shutil.copytree(undisturbed, out, ignore=shutil.ignore_patterns("c"))
    before = (
        (undisturbed / name).read_bytes()
        if (undisturbed / name).exists()
        else b'{"host":"a","pid":1,"born":2.0,"since":"now"}'
    )
    content = data.draw(spoiled(before) | (changed_json(before) if name.endswith("json") else st.nothing()))
    (out / name).write_bytes(content)
    try:
        folder = RunFolder(out)
        known_plan(folder), read_leases(folder)
        RunDescription.read(folder.description), Manifest.read(folder.manifest)
        read_status(out)
        check_folder(settings_of(stored, out))
    except (*EXPECTED, RuntimeError) as error:
        in_words(error)
    finally:
        (out / name).write_bytes(before) if (undisturbed / name).exists() else (out / name).unlink()


@fuzz(120, 500)
@given(data=st.data(), name=st.sampled_from(KINDS[:-1]))
def test_verify(data, name, undisturbed, tmp_path, tried):
    tried("fuzzed files, verified")
    out = tmp_path / "run"
    if not out.exists():
        shutil.copytree(undisturbed, out)
    before = (undisturbed / name).read_bytes()
    content = data.draw(spoiled(before) | (changed_json(before) if name.endswith("json") else st.nothing()))
    (out / name).write_bytes(content)
    try:
        assert verify(out).findings or content == before or name == "settings.toml"
    except ValueError as error:
        in_words(error)
    (out / name).write_bytes(before)


@fuzz(600, 2000)
@given(data=st.data())
def test_metadata_of_the_frames(data, stored, tmp_path, tried):
    tried("fuzzed metadata of frames")
    store = tmp_path / "frames.zarr"
    if not store.exists():
        store_frames(store, np.ones((6, 20, 16), np.uint16))
    before = (store / "zarr.json").read_bytes()
    (store / "zarr.json").write_bytes(data.draw(changed_json(before) | spoiled(before)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Zarr's
            source = open_source(store)
            assert source.decoding_metadata()
            assert source.layout.frames == source.shape[0]
            assert source.finished in (True, False)
            frame_coordinates(source)
            if source.shape[0] <= 100 and np.prod(source.shape) < 1e7:
                source.read(Unit(0, 0, min(6, source.shape[0])))
    except EXPECTED as error:
        in_words(error)
    finally:
        (store / "zarr.json").write_bytes(before)


@fuzz(600, 2000)
@given(data=st.data(), kind=st.sampled_from(["npy", "png", "tif"]))
def test_mask_files(data, kind, tmp_path, tried):
    tried("fuzzed masks")
    file, whole = tmp_path / f"mask.{kind}", tmp_path / f"whole.{kind}"
    if not whole.exists():
        save(whole, np.arange(240).reshape(15, 16) % 7 > 0)
    file.write_bytes(data.draw(spoiled(whole.read_bytes())))
    for load in (load_mask, load_image):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that read pictures
                assert load(file).ndim == 2
        except EXPECTED as error:
            in_words(error, file.name)


def save(file, mask):
    if file.suffix == ".npy":
        np.save(file, mask)
    elif file.suffix == ".tif":
        import tifffile

        tifffile.imwrite(file, mask.astype(np.uint8))
    else:
        from PIL import Image

        Image.fromarray(mask.astype(np.uint8) * 255).save(file)


@fuzz(300, 1500)
@given(data=st.data(), name=st.sampled_from(["zarr.json", "image/zarr.json", "image/c/0/0", "mask/c/0/0"]))
def test_references(data, name, undisturbed, tmp_path, tried):
    tried("fuzzed references")
    folder = tmp_path / "reference.zarr"
    if not folder.exists():
        shutil.copytree(undisturbed / "reference.zarr", folder)
    before = (folder / name).read_bytes()
    content = data.draw(spoiled(before) | (changed_json(before) if name.endswith("json") else st.nothing()))
    (folder / name).write_bytes(content)
    try:
        load_reference(folder)
    except EXPECTED as error:
        in_words(error)
    finally:
        (folder / name).write_bytes(before)


@fuzz(60, 300)
@given(
    shape=st.lists(st.integers(0, 12), min_size=1, max_size=4)
    | st.tuples(st.integers(1, 9), st.integers(12, 40), st.integers(12, 40)),
    dtype=st.sampled_from(["?", "i1", "u2", ">u2", "i4", "u8", "f2", "f4", "f8", "c8", "M8[ns]"]),
    options=st.fixed_dictionaries(
        {}, optional={"max_shift": st.integers(0, 9), "unit_frames": st.integers(1, 5), "fill": st.floats()}
    ),
)
def test_whole_runs_on_odd_stacks(shape, dtype, options, tmp_path_factory, tried):
    tried("runs on odd stacks")
    folder = tmp_path_factory.mktemp("odd")
    frames = (np.random.default_rng(len(shape)).random(shape) * 100).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.save_array(folder / "frames.zarr", frames)
        try:
            result = finish((folder / "frames.zarr", None), folder / "run", reference="0", **options)
        except EXPECTED as error:
            in_words(error)
            return
    assert result.frames == shape[0]
    assert verify(folder / "run").plan.frames == shape[0]
