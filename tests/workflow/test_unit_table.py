"""What the table enters of a task is what it would read of its records; and runs that show where that matters."""

import contextlib
import os
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

from faulty import settings
from stillframe.partition import Plan, Share
from stillframe.registration.matches import MATCH_DTYPE
from stillframe.simulation.experiment import Experiment
from stillframe.storage.aligned_store import draft_unit
from stillframe.storage.checksums import Checksum
from stillframe.workflow.driver import run
from stillframe.workflow.ledger import Ledger, UnitRecord, fields_of
from stillframe.workflow.parts import gather, run_part
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.staleness import Alignment, Dependencies, shifts_of
from stillframe.workflow.unit_table import UnitTable
from stillframe.workflow.verify import verify
from synthetic import store_frames

EXPERIMENT = Experiment(frames=12, shape=(96, 80), dose=200.0, max_drift=5.0, dark_every=0, seed=3)
REFERENCE = {"reference": "0:4"}


class Known:
    """What one unit depends on, without frames."""

    alignment = Alignment("nearest", 0.0, 2)
    now = Dependencies({"mask": "a", "frames": "0–1"})

    def of_unit(self, unit, record=None):
        return self.now, []


MATCHES = np.array([(1.0, 2.0, 0.1, 0.1, 0, 0.9, 0.1, 1, 5, 0)] * 2, MATCH_DTYPE)


def registered(problems):
    dependencies = Known.now
    return UnitRecord(
        stage="register",
        unit=0,
        start=0,
        stop=2,
        fingerprint=dependencies.fingerprint,
        facts=dependencies.facts,
        matches=fields_of(MATCHES),
        problems=problems,
    )


def aligned(problems, files):
    after = Known.now.with_alignment(Known.alignment, shifts_of(MATCHES))
    place = {"stage": "align", "unit": 0, "start": 0, "stop": 2}
    return UnitRecord(**place, fingerprint=after.fingerprint, facts=after.facts, files=files, problems=problems)


@pytest.mark.parametrize("before", [[], ["register"], ["register", "align"]])
@pytest.mark.parametrize("register", [[], ["lost"]])
@pytest.mark.parametrize("align", [None, [], ["lost"], ["rotten"]])
def test_what_is_entered_is_what_would_be_read(before, register, align, tmp_path):
    folder, plan = RunFolder(tmp_path), Plan(2, 2)
    ledger = Ledger(folder)
    ledger.prepare()
    (tmp_path / "shard").write_bytes(b"pixels")
    files = {"shard": Checksum.of(tmp_path / "shard")}
    earlier = {"register": registered(["earlier"]), "align": aligned(["earlier"], files)}
    for stage in before:
        ledger.publish(earlier[stage])
    entered = UnitTable.read(ledger, plan, plan.units, Known())
    for one in entered.redone:
        ledger.withdraw(one.stage, one.unit)
        entered.withdraw(one.stage, plan.units[one.unit])
    records = [registered(register), *([] if align is None else [aligned(align, files)])]
    for record in records:
        ledger.publish(record)
    entered.enter(plan.units[0], records)
    read = UnitTable.read(ledger, plan, plan.units, Known())
    assert [one.state for one in entered.state(plan.units[0])] == [one.state for one in read.state(plan.units[0])]
    assert entered.problems(plan.units) == read.problems(plan.units)
    assert entered.problems(plan.units, align=False) == register
    np.testing.assert_array_equal(entered.matches, read.matches)
    assert bool([*entered.to_align(plan.units)]) == (align is None or (align != [] and align != register))


@pytest.fixture
def frames(tmp_path, stored):
    """Frames in chunks of one, and the mask."""
    stack = np.stack([EXPERIMENT.render(index) for index in range(EXPERIMENT.frames)])
    return store_frames(tmp_path / "frames.zarr", stack), stored[1]


class Rot:
    """Damage of one chunk that neither its size nor its time shows."""

    def __init__(self, frames, index):
        self.path = frames[0] / "c" / str(index) / "0" / "0"
        self.whole, self.time = self.path.read_bytes(), self.path.stat().st_mtime_ns
        self.write(bytes(byte ^ 0x55 for byte in self.whole))

    def write(self, content):
        self.path.write_bytes(content)
        os.utime(self.path, ns=(self.time, self.time))

    def heal(self):
        self.write(self.whole)


def aligned_store(out):
    """Completeness, missing units, and frames without an applied shift."""
    with xr.open_zarr(out / "aligned.zarr", chunks=None, consolidated=False) as store:
        nowhere = np.flatnonzero(np.isnan(store["applied"].values).any(axis=1)).tolist()
        return store.attrs["complete"], store.attrs["missing"], nowhere


@contextlib.contextmanager
def failing_once(monkeypatch, number):
    """Let the alignment of one unit fail, the first time."""
    failed = []

    def draft(path, unit, *rest):
        if unit.number == number and not failed:
            failed.append(unit)
            raise MemoryError("once")
        return draft_unit(path, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("stillframe.workflow.unit_tasks.draft_unit", draft)
        yield
    assert failed


def test_frames_that_cannot_be_read_while_aligning_are_missing(frames, tmp_path):
    out = tmp_path / "run"
    run(settings(frames, out, align=False, **REFERENCE))
    Rot(frames, 6)
    result = run(settings(frames, out, **REFERENCE))
    assert any("frame 6: cannot be decoded" in problem for problem in result.problems)
    assert aligned_store(out) == (False, ["frames 4–7"], [4, 5, 6, 7])
    assert verify(out).findings


def test_an_alignment_that_fails_once_after_the_frames_were_mended_is_done(frames, tmp_path, monkeypatch):
    out = tmp_path / "run"
    damage = Rot(frames, 6)
    assert run(settings(frames, out, **REFERENCE)).problems
    damage.heal()
    with failing_once(monkeypatch, 1):
        assert run(settings(frames, out, **REFERENCE)).problems == []
    assert aligned_store(out) == (True, [], [])
    assert verify(out).findings == []
    run(settings(frames, tmp_path / "fresh", **REFERENCE))
    with xr.open_zarr(out / "aligned.zarr") as mended, xr.open_zarr(tmp_path / "fresh" / "aligned.zarr") as fresh:
        np.testing.assert_array_equal(mended["frames"], fresh["frames"])


def test_without_alignment_its_problems_are_not_reported(frames, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def failing(path, unit, *rest):
        if unit.number == 1:
            raise ValueError("always")
        return draft_unit(path, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("stillframe.workflow.unit_tasks.draft_unit", failing)
        assert len(run(settings(frames, out, **REFERENCE)).problems) == 1
    assert run(settings(frames, out, align=False, **REFERENCE)).problems == []
    with xr.open_zarr(out / "shifts.zarr") as shifts:
        assert shifts.attrs["problems"] == []


def test_a_damaged_run_json_does_not_cost_the_reference(frames, tmp_path):
    """Not even where a frame of the reference is gone, so that it could not be made again."""
    out = tmp_path / "run"
    run(settings(frames, out, **REFERENCE))
    with xr.open_zarr(out / "shifts.zarr") as shifts:
        before = shifts["shift"].values
    (frames[0] / "c" / "1" / "0" / "0").unlink()
    (out / "run.json").write_bytes(b"{}")
    assert run(settings(frames, out, **REFERENCE)).problems == []
    with xr.open_zarr(out / "shifts.zarr") as shifts:
        np.testing.assert_array_equal(shifts["shift"].values, before)


def test_a_stack_that_became_shorter_leaves_no_complete_store_of_more_frames(frames, tmp_path):
    out = tmp_path / "run"
    run(settings(frames, out, **REFERENCE))
    zarr.open_array(frames[0], mode="r+").resize((8, 96, 80))
    run(settings(frames, out, align=False, **REFERENCE))
    assert not aligned_store(out)[0]
    assert sorted(Ledger(RunFolder(out)).listing()["align"]) == [0, 1]
    assert run(settings(frames, out, **REFERENCE)).problems == []
    assert aligned_store(out) == (True, [], [])
    assert verify(out).findings == []


def test_a_lost_record_of_aligned_frames_is_noticed_at_the_end(frames, tmp_path, monkeypatch):
    out, publish = tmp_path / "run", Ledger.publish

    def forgetful(self, record):
        publish(self, record)
        if (record.stage, record.unit) == ("align", 1):
            self.folder.record("align", 1).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "publish", forgetful)
        result = run(settings(frames, out, **REFERENCE))
    assert result.problems == ["frames 4–7: the aligned frames are gone; run the same command again"]
    assert aligned_store(out)[:2] == (False, ["frames 4–7"])


def test_parts_with_frames_that_cannot_be_read_can_be_gathered(frames, tmp_path):
    """One after the other: each tries its own again, and leaves those of the others."""
    out = tmp_path / "run"
    options = settings(frames, out, reference="8:12")
    for index in (1, 6):
        Rot(frames, index)
    for number in (1, 2):
        run_part(options, Share(number, 2))
    result = gather(out)
    assert [problem.partition(":")[0] for problem in result.problems] == ["frame 1", "frame 6"]
    assert aligned_store(out)[0]
    shutil.rmtree(out)
