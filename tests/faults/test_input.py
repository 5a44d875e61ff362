"""Input that is damaged, missing, changed between runs, or still being written."""

import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import xarray as xr
import zarr

from faulty import Started, chances, finish, records, run_command, settings, stores, wait_for
from stillframe.flags import Flag
from stillframe.simulation.experiment import Experiment
from stillframe.workflow.driver import run
from stillframe.workflow.verify import repair, verify
from synthetic import store_frames

EXPERIMENT = Experiment(frames=24, shape=(96, 80), dose=200.0, max_drift=5.0, dark_every=0, seed=6)


@pytest.fixture(scope="module")
def frames():
    return np.stack([EXPERIMENT.render(index) for index in range(EXPERIMENT.frames)])


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask") / "mask.npy"
    np.save(path, EXPERIMENT.detector.mask)
    return path


def chunk(store, index):
    return store / "c" / str(index) / "0" / "0"


def cut(file, chance):
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def garbage(file, chance):
    file.write_bytes(chance.randbytes(file.stat().st_size))


def remove(file, chance):
    file.unlink()


@pytest.mark.parametrize("harm", [cut, garbage, remove])
def test_damaged_chunks_are_flagged_and_mended_ones_done(harm, frames, mask, tmp_path, many, tried):
    whole = store_frames(tmp_path / "whole.zarr", frames)
    finish((whole, mask), tmp_path / "undisturbed", reference="0")
    chance = chances(harm.__name__)
    for number in range(many(3, 30)):
        here, out = tmp_path / f"{number}.zarr", tmp_path / str(number)
        shutil.copytree(whole, here, copy_function=shutil.copy2)
        lost = sorted(chance.sample(range(1, 24), chance.randrange(1, 6)))
        for index in lost:
            harm(chunk(here, index), chance)
        result = run(settings((here, mask), out, reference="0"))
        assert len(result.problems) == len(lost)
        with xr.open_zarr(out / "shifts.zarr", chunks=None) as shifts:
            assert np.flatnonzero(shifts["flag"].values == Flag.CORRUPT).tolist() == lost
        for index in lost:
            shutil.copy2(chunk(whole, index), chunk(here, index))
        assert not run(settings((here, mask), out, reference="0")).problems
        assert stores(out)["aligned.zarr"] == stores(tmp_path / "undisturbed")["aligned.zarr"]
        tried(f"input chunks: {harm.__name__}", len(lost))


@pytest.mark.parametrize("check", ["times", "contents"])
def test_changed_input_is_named_and_only_its_units_are_done_again(check, frames, mask, tmp_path, capfd, tried):
    store, out = store_frames(tmp_path / "frames.zarr", frames, compressors=None), tmp_path / "run"
    options = {"reference": "0", "input_check": check}
    finish((store, mask), out, **options)
    before = records(out)
    seen = chunk(store, 9).stat()
    zarr.open_array(store, mode="r+")[9] = frames[10]
    if check == "contents":
        os.utime(chunk(store, 9), ns=(seen.st_atime_ns, seen.st_mtime_ns))
        assert chunk(store, 9).stat().st_size == seen.st_size
    capfd.readouterr()
    finish((store, mask), out, **options)
    told = capfd.readouterr().err
    assert "register: 1 unit is done again (frames 8–11): input files (c/9/0/0)" in told
    assert {path.name for path, when in records(out).items() if before[path] != when} == {"000002.json"}
    finish((store, mask), tmp_path / "fresh", **options)
    assert stores(out) == stores(tmp_path / "fresh")
    tried(f"input changed between runs, known by {check}")


def test_touched_input_is_the_same_by_its_contents(frames, mask, tmp_path):
    store, out = store_frames(tmp_path / "frames.zarr", frames), tmp_path / "run"
    options = {"reference": "0", "input_check": "contents"}
    finish((store, mask), out, **options)
    before = records(out)
    for file in store.rglob("0"):
        os.utime(file)
    finish((store, mask), out, **options)
    assert records(out) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_shift": 10}, "max_shift (12 → 10)"),
        ({"mask": None}, "mask"),
        ({"reference": "3"}, "reference"),
        ({"interpolation": "linear"}, "interpolation (nearest → linear)"),
        ({"fill": 3.0}, "fill (0.0 → 3.0)"),
    ],
)
def test_a_change_of_settings_is_told_by_name(change, words, frames, mask, tmp_path, capfd):
    store, out = store_frames(tmp_path / "frames.zarr", frames), tmp_path / "run"
    finish((store, mask), out, reference="0")
    capfd.readouterr()
    finish((store, mask), out, **({"reference": "0"} | change))
    told = capfd.readouterr().err
    stage = "align" if {"interpolation", "fill"} & change.keys() else "register"
    assert f"{stage}: 6 units are done again (frames 0–3, frames 4–7, frames 8–11…): " in told
    assert words in told


def test_appended_frames_make_new_units_only(frames, mask, tmp_path, capfd, tried):
    store, out = store_frames(tmp_path / "frames.zarr", frames[:16]), tmp_path / "run"
    finish((store, mask), out, reference="0:8")
    before, shards = records(out), {path: path.stat().st_ino for path in out.glob("aligned.zarr/frames/c/*/*/*")}
    array = zarr.open_array(store, mode="r+")
    array.append(frames[16:])
    capfd.readouterr()
    finish((store, mask), out, reference="0:8")
    assert "done again" not in capfd.readouterr().err
    assert before.items() <= records(out).items()
    assert all(path.stat().st_ino == number for path, number in shards.items())
    finish((store_frames(tmp_path / "whole.zarr", frames), mask), tmp_path / "fresh", reference="0:8")
    for name in ("shifts.zarr", "aligned.zarr"):
        with xr.open_zarr(out / name) as mine, xr.open_zarr(tmp_path / "fresh" / name) as fresh:
            xr.testing.assert_identical(mine.drop_attrs(), fresh.drop_attrs())
    tried("frames appended between runs")


def test_a_stack_that_lost_frames_says_so(frames, mask, tmp_path, capfd):
    store, out = store_frames(tmp_path / "frames.zarr", frames), tmp_path / "run"
    finish((store, mask), out, reference="0")
    zarr.open_array(store, mode="r+").resize((16, *frames.shape[1:]))
    capfd.readouterr()
    finish((store, mask), out, reference="0")
    assert "there are fewer units now" in capfd.readouterr().err
    assert verify(out).findings == []
    assert sorted(path.name for path in (out / "aligned.zarr" / "frames" / "c").iterdir()) == ["0", "1", "2", "3"]
    with xr.open_zarr(out / "aligned.zarr") as aligned:
        assert aligned.sizes["frame"] == 16


def test_input_that_changes_while_it_is_read_is_not_taken_for_what_it_was(frames, mask, tmp_path, monkeypatch, tried):
    from stillframe.storage.frames import FrameSource

    store, out, read, done = store_frames(tmp_path / "frames.zarr", frames), tmp_path / "run", FrameSource.read, []

    def changing(source, unit):
        reading = read(source, unit)
        if unit.number == 2 and unit.stop - unit.start > 1 and not done:
            done.append(unit)
            zarr.open_array(store, mode="r+")[9] = frames[10]
        return reading

    monkeypatch.setattr(FrameSource, "read", changing)
    result = run(settings((store, mask), out, reference="0"))
    assert (
        "frames 8–11: register failed with InputChanged: the input files of frames 8–11 changed" in result.problems[0]
    )
    monkeypatch.undo()
    assert not run(settings((store, mask), out, reference="0")).problems
    finish((store, mask), tmp_path / "fresh", reference="0")
    assert stores(out) == stores(tmp_path / "fresh")
    tried("input changed while it was read")


@pytest.mark.parametrize("grows", [True, False], ids=["an array that grows", "chunks that come"])
def test_follow_takes_units_as_they_come(grows, frames, mask, tmp_path, monkeypatch, tried):
    """An experiment that still runs: nothing twice, nothing half, and at the end as if it had been there at once."""
    monkeypatch.setattr("stillframe.workflow.follow.LOOK_EVERY", 0.05)
    store, out = tmp_path / "frames.zarr", tmp_path / "run"
    stored = zarr.create_array(
        store,
        shape=(0 if grows else 24, 96, 80),
        dtype=np.uint16,
        chunks=(1, 96, 80),
        config={"write_empty_chunks": True},
    )

    def write():
        for index, frame in enumerate(frames):
            stored.append(frame[None]) if grows else stored.__setitem__(index, frame)
            time.sleep(0.15)
        stored.attrs["complete"] = True

    if grows:
        stored.append(frames[:1])
        frames = frames[1:]
    writer = threading.Thread(target=write)
    writer.start()
    result = run(settings((store, mask), out, reference="0:6"), follow=True)
    writer.join()
    assert (result.frames, result.problems) == (24, [])
    log = (out / "run.log").read_text()
    assert log.count("align: ") >= 3  # in several rounds
    assert "done again" not in log
    finish((store, mask), tmp_path / "fresh", reference="0:6")
    assert stores(out) == stores(tmp_path / "fresh")
    tried("a growing input followed to its end")


def test_follow_is_stopped_and_goes_on(frames, mask, tmp_path):
    """The store says that frames are still to come."""
    store, out = store_frames(tmp_path / "frames.zarr", frames[:20]), tmp_path / "run"
    process = Started(run_command((store, mask), out, "--follow", "--workers", 0, "--reference", "0:6"))
    wait_for(lambda: (out / "manifest.json").exists(), process)
    process.process.terminate()
    status, words = process.end()
    assert status == 130, words
    assert "Stopped. What is finished is kept" in words
    with xr.open_zarr(out / "aligned.zarr") as aligned:
        assert (aligned.sizes["frame"], aligned.attrs["complete"]) == (20, False)
    array = zarr.open_array(store, mode="r+")
    array.append(frames[20:])
    array.attrs["complete"] = True
    before = records(out)
    done = subprocess.run(
        run_command((store, mask), out, "--follow", "--workers", 0, "--reference", "0:6"), check=False
    )
    assert done.returncode == 0
    assert before.items() <= records(out).items()
    with xr.open_zarr(out / "aligned.zarr") as aligned:
        assert (aligned.sizes["frame"], aligned.attrs["complete"]) == (24, True)


def test_follow_refuses_a_reference_that_would_change(frames, mask, tmp_path):
    store = store_frames(tmp_path / "frames.zarr", frames)
    for asked in ("-1", "0:-2", "4:"):
        with pytest.raises(ValueError, match="counted from the end, but the stack still grows"):
            run(settings((store, mask), tmp_path / "run", reference=asked), follow=True)


def test_a_changed_frame_of_the_reference_is_seen_by_its_contents(frames, mask, tmp_path, tried):
    store, out = store_frames(tmp_path / "frames.zarr", frames, compressors=None), tmp_path / "run"
    options = {"reference": "0:4", "input_check": "contents"}
    finish((store, mask), out, **options)
    seen = chunk(store, 2).stat()
    zarr.open_array(store, mode="r+")[2] = frames[20]
    os.utime(chunk(store, 2), ns=(seen.st_atime_ns, seen.st_mtime_ns))
    finish((store, mask), out, **options)
    finish((store, mask), tmp_path / "fresh", **options)
    assert stores(out) == stores(tmp_path / "fresh")
    tried("a frame of the reference changed between runs, known by contents")


def test_a_unit_that_cannot_be_registered_any_more_does_not_pass_for_finished(frames, mask, tmp_path, monkeypatch):
    """Its aligned frames of before are those of other settings."""
    import stillframe.workflow.unit_tasks

    store, out, match = (
        store_frames(tmp_path / "frames.zarr", frames),
        tmp_path / "run",
        stillframe.workflow.unit_tasks.match_frames,
    )
    finish((store, mask), out, reference="0")

    def failing(stack, reference):
        if np.array_equal(stack[0], frames[8]):
            raise MemoryError("none left")
        return match(stack, reference)

    monkeypatch.setattr(stillframe.workflow.unit_tasks, "match_frames", failing)
    assert run(settings((store, mask), out, reference="0", max_shift=10)).problems
    with xr.open_zarr(out / "aligned.zarr") as aligned:
        assert (aligned.attrs["complete"], aligned.attrs["missing"]) == (False, ["frames 8–11"])
    monkeypatch.undo()
    assert not run(settings((store, mask), out, reference="0", max_shift=10)).problems


def test_following_a_stack_that_lost_a_chunk_keeps_what_was_made_of_it(frames, mask, tmp_path, monkeypatch):
    monkeypatch.setattr("stillframe.workflow.follow.LOOK_EVERY", 0.05)
    store, out = store_frames(tmp_path / "frames.zarr", frames[:22]), tmp_path / "run"
    finish((store, mask), out, reference="0:2")
    before, whole = records(out), stores(out)
    chunk(store, 5).rename(tmp_path / "chunk")

    def come_back():
        (tmp_path / "chunk").rename(chunk(store, 5))
        zarr.open_array(store, mode="r+").attrs["complete"] = True

    threading.Timer(2, come_back).start()
    run(settings((store, mask), out, reference="0:2"), follow=True)
    assert records(out) == before
    assert stores(out)["aligned.zarr"].keys() == whole["aligned.zarr"].keys()


def test_a_repair_keeps_what_was_made_of_input_that_is_gone(frames, mask, tmp_path, capfd):
    store, out = store_frames(tmp_path / "frames.zarr", frames), tmp_path / "run"
    finish((store, mask), out, reference="0")
    whole = stores(out)
    shard = out / "aligned.zarr" / "frames" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    chunk(store, 20).unlink()
    repair(verify(out), run)
    assert "input files are gone (c/20/0/0): what was made of them before is kept" in capfd.readouterr().err
    assert stores(out) == whole
