import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import stillframe as sf
from faulty import STORES, command, records, run_command, settings, stores
from stillframe.cluster.executors import _PROCESS_BYTES, _SHARE
from stillframe.errors import LeaseError, RunStopped
from stillframe.flags import Flag
from stillframe.partition import unit_memory
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate
from stillframe.storage.aligned_store import draft_unit
from stillframe.storage.frames import FrameSource, open_source
from stillframe.workflow.driver import run
from stillframe.workflow.lease import lease
from stillframe.workflow.ledger import Ledger
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.run_reference import prepare_reference
from stillframe.workflow.stages import Pass
from stillframe.workflow.status import read_status
from synthetic import contents, store_frames, windows


def test_a_run_finds_the_drift(undisturbed, experiment):
    with xr.open_zarr(undisturbed / "shifts.zarr", chunks=None) as shifts:
        good = shifts["flag"].values == 0
        error = (shifts["shift"].values - experiment.shifts)[good]
        flags = shifts["flag"].values
    assert np.flatnonzero(flags).tolist() == [9, 19]
    assert (flags[[9, 19]] == Flag.DARK).all()
    assert np.abs(error - np.median(error, axis=0)).max() < 1


def test_the_aligned_store_opens_alone_and_holds_the_moved_counts(undisturbed, stored, experiment):
    with xr.open_zarr(undisturbed / "aligned.zarr", chunks=None) as aligned:
        frames, applied = aligned["frames"].values, aligned["applied"].values
        assert {"time", "scan", "delay", "kind"} <= set(aligned.coords)
        assert aligned["frames"].attrs["interpolation"] == "nearest"
    dy, dx = applied[5].astype(int)
    raw = np.where(experiment.detector.mask, experiment.render(5), 0)
    expected = np.zeros_like(raw)
    inside = slice(max(0, dy), 96 + min(0, dy)), slice(max(0, dx), 80 + min(0, dx))
    source = slice(max(0, -dy), 96 + min(0, -dy)), slice(max(0, -dx), 80 + min(0, -dx))
    expected[inside] = raw[source]
    np.testing.assert_array_equal(frames[5], expected)
    assert not frames[9].any()


def test_a_run_folder_holds_what_is_promised(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        *STORES,
        "settings.toml",
        "run.json",
        "manifest.json",
        "units",
        "run.log",
        "shifts.png",
        ".lease.lock",
        ".lease.gate",
    }
    assert (undisturbed / "shifts.png").read_bytes()[:4] == b"\x89PNG"
    assert "24 of 24 frames" in (undisturbed / "run.log").read_text()
    assert len(list((undisturbed / "aligned.zarr" / "frames" / "c").iterdir())) == 6


@pytest.mark.parametrize("workers", [2])
def test_any_number_of_workers_gives_the_same_bytes(workers, stored, undisturbed, tmp_path):
    run(settings(stored, tmp_path / "run", workers=workers))
    assert stores(tmp_path / "run") == stores(undisturbed)


def test_a_given_client_gives_the_same_bytes(client, stored, undisturbed, tmp_path):
    run(settings(stored, tmp_path / "run"), client)
    assert stores(tmp_path / "run") == stores(undisturbed)
    assert client.status == "running"


def test_the_driver_writes_by_itself(client, stored, undisturbed, tmp_path, monkeypatch):
    """Metadata are its own, and a scheduler that dies meanwhile must not matter."""
    monkeypatch.setattr(client, "get", lambda *_, **__: pytest.fail("the cluster was asked"))
    run(settings(stored, tmp_path / "run"), client)
    assert stores(tmp_path / "run") == stores(undisturbed)


def test_a_scheduler_is_found_by_address_and_by_file(client, stored, undisturbed, tmp_path):
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": client.scheduler.address}))
    for number, scheduler in enumerate((client.scheduler.address, str(file))):
        out = tmp_path / str(number)
        run(settings(stored, out, scheduler=scheduler))
        assert stores(out) == stores(undisturbed)


def test_a_scheduler_that_does_not_answer_is_told(stored, tmp_path, monkeypatch):
    with pytest.raises(ConnectionError, match="no dask scheduler answers at nonsense"):
        run(settings(stored, tmp_path / "run", scheduler="nonsense"))


def test_a_scheduler_file_that_is_written_only_now_is_waited_for(client, stored, undisturbed, tmp_path):
    file, out = tmp_path / "scheduler.json", tmp_path / "run"
    late = threading.Timer(1, file.write_text, [json.dumps({"address": client.scheduler.address})])
    late.start()
    run(settings(stored, out, scheduler=str(file)))
    late.join()
    assert stores(out) == stores(undisturbed)


def test_a_scheduler_file_that_never_comes_is_told(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("stillframe.cluster.connect._WAIT_FOR_FILE", 0.1)
    with pytest.raises(ConnectionError, match="no such file appeared within 0.1 s"):
        run(settings(stored, tmp_path / "run", scheduler=str(tmp_path / "scheduler.json")))


def test_a_finished_run_is_not_done_again(stored, finished):
    before = records(finished), stores(finished)
    run(settings(stored, finished))
    assert (records(finished), stores(finished)) == before


def test_another_interpolation_redoes_only_the_alignment(stored, finished, tmp_path):
    before = records(finished)
    run(settings(stored, finished, interpolation="linear"))
    changed = {path.parent.name for path, when in records(finished).items() if before[path] != when}
    assert changed == {"align"}
    run(settings(stored, tmp_path / "fresh", interpolation="linear"))
    assert stores(finished) == stores(tmp_path / "fresh")


@pytest.mark.slow
def test_another_mask_redoes_everything(stored, tmp_path):
    out, other = tmp_path / "run", tmp_path / "mask.npy"
    run(settings(stored, out))
    np.save(other, sf.load_mask(stored[1]) & (np.arange(80) > 3))
    run(settings(stored, out, mask=other))
    run(settings(stored, tmp_path / "fresh", mask=other))
    assert stores(out) == stores(tmp_path / "fresh")


@pytest.mark.slow
def test_less_memory_changes_no_byte(stored, tmp_path):
    """Units follow from the frames alone, and a resumed run keeps those it began with."""
    plenty, little = tmp_path / "plenty", tmp_path / "little"
    run(settings(stored, plenty, unit_frames=None))
    run(settings(stored, little, unit_frames=None, memory=1.0))
    assert stores(plenty) == stores(little)
    before = records(plenty)
    run(settings(stored, plenty, unit_frames=None, memory=1.0))
    assert records(plenty) == before
    layout = open_source(stored[0]).layout
    tight = (unit_memory(layout, 8, 2, 12) + _PROCESS_BYTES + 1000) / _SHARE / 2**30
    with pytest.raises(ValueError, match="units of 24 frames, as this run began with, do not fit"):
        run(settings(stored, plenty, unit_frames=None, memory=tight))
    assert records(plenty) == before


def test_an_interrupted_store_says_that_it_is_incomplete(stored, tmp_path, monkeypatch):
    out, write, written = tmp_path / "run", draft_unit, []

    def interrupted(path, unit, frames, drafts):
        if written:
            raise KeyboardInterrupt
        written.append(unit)
        return write(path, unit, frames, drafts)

    monkeypatch.setattr("stillframe.workflow.unit_tasks.draft_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings(stored, out))
    with xr.open_zarr(out / "aligned.zarr", chunks=None) as aligned:
        assert aligned.attrs["complete"] is False
    monkeypatch.undo()
    run(settings(stored, out))
    with xr.open_zarr(out / "aligned.zarr", chunks=None) as aligned:
        assert aligned.attrs["complete"] is True
        assert aligned.attrs["missing"] == []


def test_a_unit_that_fails_leaves_no_shift_behind(stored, undisturbed, tmp_path, monkeypatch):
    out, write = tmp_path / "run", draft_unit

    def failing(path, unit, frames, drafts):
        if unit.number == 2:
            raise OSError(5, "Input/output error", str(path))
        return write(path, unit, frames, drafts)

    monkeypatch.setattr("stillframe.workflow.unit_tasks.draft_unit", failing)
    result = run(settings(stored, out))
    assert len(result.problems) == 1
    assert "frames 8–11: align failed with OSError" in result.problems[0]
    with xr.open_zarr(out / "aligned.zarr", chunks=None) as aligned:
        assert (aligned.attrs["complete"], aligned.attrs["missing"]) == (False, ["frames 8–11"])
        assert np.isnan(aligned["applied"].values[8:12]).all()
        assert not np.isnan(aligned["applied"].values[:8]).any()
    seen = subprocess.run(command("status", out), capture_output=True, text=True, check=False).stdout
    assert "20/24" in seen
    assert "problem: frames 8–11: align failed" in seen
    monkeypatch.undo()
    assert not run(settings(stored, out)).problems
    assert stores(out) == stores(undisturbed)


def test_each_unit_is_read_once(stored, undisturbed, tmp_path, monkeypatch):
    """Decoding is a fifth of the work; both stages share it."""
    read, seen = FrameSource.read, []

    def counted(source, unit):
        if unit.stop - unit.start > 1:  # what the reference is made of is read frame by frame
            seen.append(unit.number)
        return read(source, unit)

    monkeypatch.setattr(FrameSource, "read", counted)
    run(settings(stored, tmp_path / "run"))
    assert sorted(seen) == list(range(6))
    seen.clear()
    run(settings(stored, tmp_path / "run", interpolation="linear"))
    assert sorted(seen) == list(range(6))
    assert stores(tmp_path / "run")["shifts.zarr"] == stores(undisturbed)["shifts.zarr"]


def test_status_counts_only_what_holds(finished):
    for path in (finished / "units" / "register").iterdir():
        path.unlink()
    seen = subprocess.run(command("status", finished), capture_output=True, text=True, check=True).stdout
    assert seen.count("0/24") == 2


def test_another_unit_size_redoes_everything(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    run(settings(stored, out, unit_frames=24))
    run(settings(stored, out))
    assert stores(out) == stores(undisturbed)


def test_a_lost_shard_is_written_again(stored, undisturbed, finished):
    (finished / "aligned.zarr" / "frames" / "c" / "2" / "0" / "0").unlink()
    run(settings(stored, finished))
    assert stores(finished) == stores(undisturbed)


def test_a_store_that_vanishes_while_it_is_put_together_does_not_pass_for_finished(
    stored, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    looked = Pass._missing

    def vanishes(self):
        found = looked(self)
        shutil.rmtree(out / "aligned.zarr")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Pass, "_missing", vanishes)
        assert len(run(settings(stored, out)).problems) == 6
    assert missing(out) == (False, 6)
    assert [stage.done for stage in read_status(out).stages] == [24, 0]
    assert not run(settings(stored, out, align=False)).problems
    assert missing(out) == (False, 6)
    run(settings(stored, out))
    assert stores(out) == stores(undisturbed)


def missing(out):
    """Whether aligned frames are complete, and how many units are missing."""
    with xr.open_zarr(out / "aligned.zarr", chunks=None) as aligned:
        return aligned.attrs["complete"], len(aligned.attrs["missing"])


def test_a_lost_shard_does_not_pass_for_there_without_alignment(stored, finished):
    (finished / "aligned.zarr" / "frames" / "c" / "2" / "0" / "0").unlink()
    run(settings(stored, finished, align=False))
    assert missing(finished) == (False, 1)


def test_a_store_is_marked_incomplete_before_any_record_of_it_is_withdrawn(stored, finished, monkeypatch):
    (finished / "aligned.zarr" / "frames" / "c" / "2" / "0" / "0").unlink()
    marked, withdraw = [], Ledger.withdraw

    def looked(self, stage, unit):
        marked.append(missing(finished)[0])
        withdraw(self, stage, unit)

    monkeypatch.setattr(Ledger, "withdraw", looked)
    run(settings(stored, finished))
    assert marked[0] is False
    assert missing(finished) == (True, 0)


def test_what_a_killed_driver_left_is_swept(stored, finished):
    left = [finished / "aligned.zarr" / ".zarr.json.12.partial", finished / ".aligned.zarr.partial" / "zarr.json"]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    run(settings(stored, finished, align=False))
    assert not any(file.exists() for file in left)
    assert not (finished / ".aligned.zarr.partial").exists()


@pytest.mark.parametrize("change", [{}, {"interpolation": "linear"}, {"max_shift": 11}, {"align": False}])
def test_each_record_is_read_at_most_once_in_a_run(change, stored, finished, monkeypatch):
    """On a shared file system each read waits for the network."""
    looks, read = Counter(), Ledger.read

    def counted(self, stage, unit):
        looks[stage, unit] += self.folder.record(stage, unit).exists()
        return read(self, stage, unit)

    monkeypatch.setattr(Ledger, "read", counted)
    run(settings(stored, finished, **change))
    assert max(looks.values()) == 1
    assert len(looks) == 12


@pytest.mark.parametrize("chunks", [(1, 96, 80), (5, 96, 80), (24, 96, 80), (3, 40, 33), (24, 10, 80)])
def test_any_input_chunking_gives_the_same_shifts(chunks, stored, undisturbed, experiment, tmp_path, capfd):
    frames = np.stack([experiment.render(i) for i in range(experiment.frames)])
    store_frames(tmp_path / "frames.zarr", frames, chunks=chunks)
    out = tmp_path / "run"
    result = run(settings((tmp_path / "frames.zarr", stored[1]), out, unit_frames=None))
    assert not result.problems
    with xr.open_zarr(out / "shifts.zarr", chunks=None) as mine, xr.open_zarr(undisturbed / "shifts.zarr") as other:
        np.testing.assert_array_equal(mine["shift"], other["shift"])
    told = "each frame is spread over several chunks" in capfd.readouterr().err
    assert told == (chunks[1:] != (96, 80))


def test_frames_split_beyond_memory_are_put_together_in_parts(stored, experiment, tmp_path, capfd):
    frames = np.stack([experiment.render(i) for i in range(experiment.frames)])
    store_frames(tmp_path / "frames.zarr", frames, chunks=(24, 10, 80))
    needed = unit_memory(open_source(tmp_path / "frames.zarr").layout, 12, 2, 12)
    memory = (needed + _PROCESS_BYTES + 1000) / _SHARE / 2**30
    run(settings((tmp_path / "frames.zarr", stored[1]), tmp_path / "run", unit_frames=None, memory=memory))
    told = capfd.readouterr().err
    assert "units of 12 frames" in told
    assert "decoded 2× per pass" in told
    assert "more memory per worker" in told


class TestBadInput:
    def broken(self, stored, tmp_path):
        """A copy of the frames in chunks of one, one of them missing and one torn."""
        frames = np.stack([Experiment.render(self.EXPERIMENT, i) for i in range(12)])
        path = store_frames(tmp_path / "frames.zarr", frames)
        (path / "c" / "2" / "0" / "0").unlink()
        torn = path / "c" / "9" / "0" / "0"
        torn.write_bytes(torn.read_bytes()[:-100])
        return path

    def frames(self):
        return np.stack([self.EXPERIMENT.render(index) for index in range(12)])

    EXPERIMENT = Experiment(frames=12, shape=(96, 80), dose=200.0, max_drift=5.0, dark_every=0, seed=3)

    def test_unreadable_chunks_are_reported_and_the_others_go_on(self, stored, tmp_path):
        path, out = self.broken(stored, tmp_path), tmp_path / "run"
        done = subprocess.run(
            run_command((path, stored[1]), out, "--reference", "0:12", "--workers", 0, reference_iterations=3),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "frame 2: chunk c/2/0/0 is missing" in done.stderr
        assert "frame 9: cannot be decoded" in done.stderr
        with xr.open_zarr(out / "shifts.zarr", chunks=None) as shifts:
            assert np.flatnonzero(shifts["flag"] == Flag.CORRUPT).tolist() == [2, 9]
            assert np.flatnonzero(np.isnan(shifts["shift"][:, 0])).tolist() == [2, 9]
        seen = subprocess.run(command("status", out), capture_output=True, text=True, check=False)
        assert seen.returncode == 1
        assert "problem: frame 2: chunk c/2/0/0 is missing" in seen.stdout

    def test_mended_chunks_are_done_by_the_next_run(self, stored, tmp_path):
        path, out = self.broken(stored, tmp_path), tmp_path / "run"
        assert run(settings((path, stored[1]), out, reference="0")).problems
        untouched = out / "units" / "register" / "000001.json"
        before = untouched.stat().st_mtime_ns
        array = __import__("zarr").open_array(path, mode="r+")
        for index in (2, 9):
            array[index] = self.EXPERIMENT.render(index)
        assert not run(settings((path, stored[1]), out, reference="0")).problems
        assert untouched.stat().st_mtime_ns == before
        whole = store_frames(tmp_path / "whole.zarr", array[:])
        run(settings((whole, stored[1]), tmp_path / "fresh", reference="0"))
        with xr.open_zarr(out / "aligned.zarr") as mended, xr.open_zarr(tmp_path / "fresh" / "aligned.zarr") as fresh:
            np.testing.assert_array_equal(mended["frames"], fresh["frames"])

    def test_the_reference_stays_when_one_of_its_frames_vanishes_and_comes_back(
        self, stored, tmp_path, monkeypatch, capsys
    ):
        path, out = store_frames(tmp_path / "frames.zarr", self.frames()), tmp_path / "run"
        run(settings((path, stored[1]), out))
        before, untouched = stores(out), records(out)
        chunk = path / "c" / "2" / "0" / "0"
        chunk.rename(tmp_path / "chunk")
        # Another kind of processor makes other last bits: nothing may be made again.
        monkeypatch.setattr("stillframe.workflow.run_reference.build_reference", None)
        capsys.readouterr()
        assert not run(settings((path, stored[1]), out)).problems
        assert "input files are gone (c/2/0/0): what was made of them before is kept" in capsys.readouterr().err
        assert (stores(out), records(out)) == (before, untouched)
        (tmp_path / "chunk").rename(chunk)
        assert not run(settings((path, stored[1]), out)).problems
        assert (stores(out), records(out)) == (before, untouched)

    def test_a_reference_made_without_a_lost_frame_says_so_when_it_comes_back(self, stored, tmp_path, capsys):
        path, out = self.broken(stored, tmp_path), tmp_path / "run"
        assert run(settings((path, stored[1]), out)).problems
        before = contents(out / "reference.zarr")
        array = __import__("zarr").open_array(path, mode="r+")
        for index in (2, 9):
            array[index] = self.EXPERIMENT.render(index)
        capsys.readouterr()
        assert not run(settings((path, stored[1]), out)).problems
        assert "without the frames [2, 9], which could not be read then" in capsys.readouterr().err
        assert contents(out / "reference.zarr") == before
        shutil.rmtree(out / "reference.zarr")
        assert not run(settings((path, stored[1]), out)).problems
        assert contents(out / "reference.zarr") != before

    @pytest.mark.parametrize("reference", [None, pytest.param("0:16", marks=pytest.mark.slow)])
    def test_a_reference_stays_when_the_stack_grows(self, stored, tmp_path, monkeypatch, reference):
        """Frames spread over all of it would be others now."""
        frames = np.stack([self.EXPERIMENT.render(index % 12) for index in range(30)])
        path, out = store_frames(tmp_path / "frames.zarr", frames[:20]), tmp_path / "run"
        run(settings((path, stored[1]), out, reference=reference, reference_iterations=3))
        before, untouched = contents(out / "reference.zarr"), records(out)
        array = __import__("zarr").open_array(path, mode="r+")
        array.append(frames[20:])
        with monkeypatch.context() as patched:
            patched.setattr("stillframe.workflow.run_reference.build_reference", None)
            assert not run(settings((path, stored[1]), out, reference=reference, reference_iterations=3)).problems
        assert contents(out / "reference.zarr") == before
        assert {name: when for name, when in records(out).items() if name in untouched} == untouched
        other, tried = "0:16" if reference is None else None, []
        with monkeypatch.context() as patched:
            refuse = "stillframe.workflow.run_reference._refuse_without_fit"
            patched.setattr(refuse, lambda made, source, made_of, **_: tried.append(made_of))
            run(settings((path, stored[1]), out, reference=other, reference_iterations=3))
        assert set(tried[0]) == set(range(16)) if other else max(tried[0]) > 20
        assert contents(out / "reference.zarr") != before

    @pytest.mark.parametrize("spoil", [lambda text: "", lambda text: text.replace('"digest":"', '"digest":"0')])
    def test_a_reference_whose_origin_is_spoiled_is_made_again(self, stored, undisturbed, finished, spoil):
        description = finished / "run.json"
        text = description.read_text()
        description.write_text(spoil(text))
        run(settings(stored, finished))
        assert json.loads(description.read_text())["origin"] == json.loads(text)["origin"]
        assert stores(finished) == stores(undisturbed)

    @pytest.mark.parametrize(
        "changed", [{"reference_kind": "unpumped"}, {"detector_map": False}, {"reference_iterations": 2}], ids=str
    )
    def test_other_settings_of_the_reference_make_it_anew(self, stored, finished, changed):
        source = open_source(stored[0])
        origins = [prepare_reference(settings(stored, finished, **given), source)[1] for given in ({}, {}, changed)]
        assert origins[0].settings == origins[1].settings != origins[2].settings

    def test_changed_frames_of_the_reference_make_it_anew(self, stored, tmp_path):
        path, out = store_frames(tmp_path / "frames.zarr", self.frames()), tmp_path / "run"
        run(settings((path, stored[1]), out))
        before = contents(out / "reference.zarr")
        __import__("zarr").open_array(path, mode="r+")[3] = self.EXPERIMENT.render(4)
        run(settings((path, stored[1]), out))
        assert contents(out / "reference.zarr") != before

    def test_a_run_without_one_good_frame_is_a_problem(self, stored, tmp_path):
        dark = store_frames(tmp_path / "frames.zarr", np.zeros((4, 96, 80), np.uint16))
        np.save(tmp_path / "image.npy", self.EXPERIMENT.render(0))
        result = run(settings((dark, stored[1]), tmp_path / "run", reference=str(tmp_path / "image.npy")))
        assert result.good == 0
        assert "no frame got a shift without a flag" in result.problems[0]

    @pytest.mark.parametrize(("lost", "problems"), [(5, 0), (6, 1)])
    def test_half_of_a_run_without_shifts_is_named_with_its_cure(self, stored, tmp_path, capsys, lost, problems):
        frames = self.frames()
        frames[2 : 2 + lost] = np.random.default_rng(0).poisson(20, frames[:lost].shape)
        path = store_frames(tmp_path / "frames.zarr", frames)
        result = run(settings((path, stored[1]), tmp_path / "run", reference="0"))
        assert len(result.problems) == problems
        words = capsys.readouterr().err
        assert ("6 of 12 frames have no shift: frames 2–7. Reasons: 6 low_score." in words) == bool(problems)
        assert ("give a larger --max-shift (now 12)" in words) == bool(problems)

    def test_half_of_a_run_without_shifts_ends_with_status_1(self, stored, tmp_path):
        frames = self.frames()
        frames[6:] = 0
        path = store_frames(tmp_path / "frames.zarr", frames)
        done = subprocess.run(
            run_command((path, stored[1]), tmp_path / "run", "--workers", 0, "--reference", 0),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "6 of 12 frames have no shift: frames 6–11. Reasons: 6 dark. Frames without beam need no" in done.stderr

    def test_a_reference_that_nothing_fits_stops_the_run(self, stored, tmp_path):
        noise = np.random.default_rng(0).poisson(20, (24, 96, 80)).astype(np.uint16)
        path = store_frames(tmp_path / "frames.zarr", noise)
        with pytest.raises(ValueError, match=r"of 16 frames with beam.*is it inverted.*--max-shift.*--reference"):
            run(settings((path, stored[1]), tmp_path / "run", reference="0"))
        assert not (tmp_path / "run").exists()

    def test_a_reference_of_background_does_not_vouch_for_itself(self, stored, tmp_path):
        """Its own frames all fit, which are half of the stack."""
        rng = np.random.default_rng(0)
        laser = 30 + 200 * np.exp(-np.hypot(*np.indices((96, 80)) - np.array([[[20.0]], [[60.0]]])) / 8)
        frames = [rng.poisson(laser, (12, 96, 80)).astype(np.uint16), self.frames()]
        path = store_frames(tmp_path / "frames.zarr", np.concatenate(frames))
        with pytest.raises(ValueError, match="of 12 frames with beam, spread over the stack, 0 fit the reference"):
            run(settings((path, stored[1]), tmp_path / "run", reference="0:12"))
        assert not (tmp_path / "run").exists()

    def test_a_reference_whose_frames_hardly_moved_is_named(self, stored, tmp_path, capsys):
        still = (
            np.random.default_rng(0).poisson(self.EXPERIMENT.render(0).astype(float), (12, 96, 80)).astype(np.uint16)
        )
        for name, frames, said in (("still", still, True), ("moving", self.frames(), False)):
            path = store_frames(tmp_path / f"{name}.zarr", frames)
            prepare_reference(settings((path, stored[1]), tmp_path / "run"), open_source(path))
            words = capsys.readouterr().err
            assert ("px is too small to tell the detector's pattern" in words) == said
            assert ("If the beam did drift, all frames show something that stays" in words) == said

    def test_a_mask_that_leaves_few_pixels_is_named(self, stored, tmp_path, capsys):
        path, mask = store_frames(tmp_path / "frames.zarr", self.frames()), np.zeros((96, 80), bool)
        mask[40:65, 30:50] = True
        np.save(tmp_path / "mask.npy", mask)
        with contextlib.suppress(ValueError):
            run(settings((path, tmp_path / "mask.npy"), tmp_path / "run", max_shift=6))
        assert "only 6.5% of the pixels are valid by the mask" in capsys.readouterr().err

    def test_an_inverted_mask_is_refused(self, tmp_path):
        frames, mask = simulate(Experiment(frames=4, shape=(256, 256), dark_every=0), tmp_path)
        np.save(mask, ~np.load(mask))
        with pytest.raises(ValueError, match=r"4\.\d% of the pixels are valid.*stand alone.*so invert it"):
            run(settings((frames, mask), tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_empty_chunks_that_were_left_out_are_explained(self, stored, tmp_path):
        frames = self.frames()
        frames[0] = 0
        path = store_frames(tmp_path / "frames.zarr", frames)
        (path / "c" / "0" / "0" / "0").unlink()
        with pytest.raises(ValueError, match="cannot be read.*give --missing-chunks fill"):
            run(settings((path, stored[1]), tmp_path / "run", reference="0"))

    def test_a_folder_of_another_run_is_refused(self, stored, undisturbed, tmp_path):
        before = stores(undisturbed)
        other = simulate(replace(self.EXPERIMENT, frames=4), tmp_path)
        with pytest.raises(ValueError, match="holds the run of .*Choose another --out"):
            run(settings(other, undisturbed))
        assert stores(undisturbed) == before

    def test_a_folder_of_another_kind_is_refused(self, stored, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match=r"holds thesis\.tex, which no run wrote: nothing of it is touched"):
            run(settings(stored, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        with pytest.raises(ValueError, match="is a file, but a run needs a folder"):
            run(settings(stored, tmp_path / "thesis.tex"))

    def test_a_folder_inside_the_frames_is_refused(self, stored):
        with pytest.raises(ValueError, match="lies inside the frames"):
            run(settings(stored, stored[0] / "run"))

    def test_what_a_kill_at_the_start_leaves_is_no_obstacle(self, stored, undisturbed, tmp_path):
        out = tmp_path / "run"
        out.mkdir()
        for name in (".lease.host.7.partial", ".settings.toml.7-8.partial", ".lease.lock", "run.log"):
            (out / name).touch()
        run(settings(stored, out))
        assert stores(out) == stores(undisturbed)

    def test_an_unknown_version_is_refused(self, stored, tmp_path):
        (tmp_path / "settings.toml").write_text("version = 99\n")
        with pytest.raises(ValueError, match="written with settings of version 99"):
            run(settings(stored, tmp_path))

    def test_a_second_driver_is_refused(self, stored, tmp_path):
        (tmp_path / "run").mkdir()
        with lease(RunFolder(tmp_path / "run")), pytest.raises(LeaseError, match=f"process {os.getpid()}"):
            run(settings(stored, tmp_path / "run"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"reference": "0:99"}, "there are 24 frames"),
            ({"reference": "5:2"}, "gives 0 of them"),
            ({"reference": "-25"}, "there are 24"),
            ({"reference": "99"}, "there are 24"),
            ({"reference": "9"}, "no contrast"),
            ({"reference": "nowhere.tif"}, "does not exist"),
            ({"reference": __file__, "reference_kind": "unpumped"}, "only one of them"),
            ({"max_shift": 80}, "Give at most 79"),
            ({"fill": -1}, "cannot hold"),
            ({"mask": "nowhere.npy"}, "does not exist"),
            ({"memory": 0.01}, "give them more memory"),
        ],
    )
    def test_settings_that_cannot_work_are_refused(self, stored, tmp_path, options, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run(settings(stored, tmp_path / "run", **options))
        assert not (tmp_path / "run").exists()

    def test_a_mask_of_another_shape_is_refused_before_anything_is_written(self, stored, tmp_path):
        np.save(tmp_path / "mask.npy", np.ones((80, 96), bool))
        with pytest.raises(ValueError, match=r"the mask has shape \(80, 96\) but the frames have \(96, 80\)"):
            run(settings((stored[0], tmp_path / "mask.npy"), tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_no_space_stops_the_run_and_names_the_path(self, stored, tmp_path, monkeypatch):
        def full(path, unit, frames, drafts):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("stillframe.workflow.unit_tasks.draft_unit", full)
        with pytest.raises(RunStopped, match=r"No space left on device \(.*aligned\.zarr\).*run the same command"):
            run(settings(stored, tmp_path / "run"))
        assert not (tmp_path / "run" / "lease.json").exists()


@pytest.mark.slow
def test_the_reference_comes_from_a_picture_or_another_run(stored, undisturbed, tmp_path):
    reference = sf.load_reference(undisturbed / "reference.zarr")
    np.save(tmp_path / "image.npy", reference.image)
    run(settings(stored, tmp_path / "stored", reference=str(undisturbed / "reference.zarr")))
    assert contents(tmp_path / "stored" / "shifts.zarr") == contents(undisturbed / "shifts.zarr")
    run(settings(stored, tmp_path / "picture", reference=str(tmp_path / "image.npy")))
    with (
        xr.open_zarr(tmp_path / "picture" / "shifts.zarr", chunks=None) as mine,
        xr.open_zarr(undisturbed / "shifts.zarr", chunks=None) as other,
    ):
        np.testing.assert_allclose(mine["shift"], other["shift"], atol=0.2)


def test_without_a_mask_every_pixel_is_valid(tmp_path):
    frames = store_frames(tmp_path / "frames.zarr", windows((64, 64), [(0, 0), (2, -3)]))
    run(sf.Settings(frames=frames, out=tmp_path / "run", reference="0", max_shift=8, workers=0))
    with xr.open_zarr(tmp_path / "run" / "shifts.zarr", chunks=None) as shifts:
        assert np.rint(shifts["shift"].values).tolist() == [[0, 0], [2, -3]]
        assert shifts["mask"].values.all()


@pytest.mark.slow
def test_settings_come_from_a_file_and_flags_go_before_it(stored, undisturbed, tmp_path):
    given = settings(stored, tmp_path / "elsewhere", max_shift=3)
    (tmp_path / "settings.toml").write_text(given.to_toml())
    done = subprocess.run(
        command("run", "--settings", tmp_path / "settings.toml", "--out", tmp_path / "run", "--max-shift", 12),
        check=False,
    )
    assert done.returncode == 0
    assert stores(tmp_path / "run") == stores(undisturbed)
    assert "max_shift = 12" in (tmp_path / "run" / "settings.toml").read_text()


def test_a_terminal_shows_rate_and_time_left(stored, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": "120", "TERM": "xterm"}
        os.execv(sys.executable, run_command(stored, tmp_path / "run", "--workers", 0))
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            break
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert "24/24 frames" in text
    assert re.search(r"[\d.e+]+ frames/s", text)
    assert "left" in text


def test_status_answers_during_and_after_a_run(stored, undisturbed, tmp_path):
    after = subprocess.run(command("status", undisturbed), capture_output=True, text=True, check=True).stdout
    assert after.count("24/24") == 2
    assert "frames: 2 dark, 22 good" in after
    assert "finished; nobody drives it" in after
    with lease(RunFolder(undisturbed)):
        during = subprocess.run(command("status", undisturbed), capture_output=True, text=True, check=True).stdout
    assert f"driven by process {os.getpid()}" in during
    nothing = subprocess.run(command("status", tmp_path), capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert "holds no run that has begun" in nothing.stderr


def test_a_run_does_without_what_could_not_be_compiled_ahead(stored, tmp_path, monkeypatch, undisturbed):
    """Whatever fails there fails in the units too, if it matters, and is told with their frames."""

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("stillframe.cluster.connect.InProcess.workers", 2)
    monkeypatch.setattr("stillframe.workflow.unit_tasks.MakeReady.__call__", fail)
    result = run(settings(stored, tmp_path / "run"))
    assert not result.problems
    assert stores(tmp_path / "run") == stores(undisturbed)
