"""Two drivers at once, a driver that wakes up after it was replaced, and a task that runs twice at once."""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

import racers
from faulty import (
    Started,
    chances,
    finish,
    records,
    run_command,
    settings,
    stores,
    wait_for,
    wait_for_work,
)
from stillframe.errors import LeaseError
from stillframe.partition import Unit
from stillframe.storage.checksums import fingerprint
from stillframe.storage.frames import open_source
from stillframe.storage.reference_store import load_reference, save_reference
from stillframe.workflow.lease import Claim, Holder, lease
from stillframe.workflow.ledger import Ledger
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.staleness import INPUT_FILES, Alignment, Dependencies
from stillframe.workflow.unit_tasks import AlignUnit, BothStages, Job, RegisterUnit
from stillframe.workflow.verify import verify

SPARE = 20
"""Further tries, while what depends on a moment chosen by chance has not yet happened."""


def test_drivers_that_start_at_once(stored, undisturbed, tmp_path, many, tried):
    """One works; the others are told its name, or come when it is done and find everything done."""
    refused = 0
    for number in range(many(3, 50) + SPARE):
        if number >= many(3, 50) and refused:
            break
        out = tmp_path / str(number)
        got = racers.spawn(3, racers.drive, settings(stored, out))
        words = [answer for answer in got if isinstance(answer, str)]
        assert [] in got
        assert all("is being written by process" in word for word in words)
        assert all(answer == [] for answer in got if not isinstance(answer, str))
        assert stores(out) == stores(undisturbed)
        assert verify(out).findings == []
        shutil.rmtree(out)
        refused += len(words)
        tried("races of three drivers")
    assert refused


def elsewhere(arguments):
    """The same command on another machine."""
    return [sys.executable, "-c", "import racers; racers.elsewhere()", *arguments[3:]]


def take_over(stored, out):
    """Do a run that another drives, unless that one was paused while it writes, and say so then."""
    try:
        finish(stored, out, max_shift=10, interpolation="linear")
    except LeaseError as error:
        if "still writes into" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("workers", [0, 1])
def test_a_paused_driver_that_wakes_up_after_being_replaced(workers, stored, tmp_path, many, tried, monkeypatch):
    """It is silent for so long that a driver on another machine takes over, with other settings; then it goes on."""
    monkeypatch.setenv("PYTHONPATH", str(Path(racers.__file__).parent))
    monkeypatch.setattr("stillframe.workflow.lease.STALE", 2.0)
    monkeypatch.setattr("stillframe.workflow.lease.PATIENCE", 5.0)
    finish(stored, tmp_path / "fresh", max_shift=10, interpolation="linear")
    chance, taken_over = chances(workers), 0
    for number in range(many(2, 25) + SPARE):
        if number >= many(2, 25) and taken_over:
            break
        out = tmp_path / str(number)
        old = Started(elsewhere(run_command(stored, out, "--workers", workers)))
        wait_for_work(old, out, chance, 8)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(old.pid, signal.SIGSTOP)
        time.sleep(2.5)
        replaced = old.poll() is None and (out / "lease.json").exists() and take_over(stored, out)
        taken_over += replaced
        tried("a driver, paused and replaced, that wakes up", replaced)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(old.pid, signal.SIGCONT)
        status, words = old.end()
        if replaced:
            assert status == 2, words
            assert "another driver took over" in words
            assert "Traceback" not in words
        else:
            assert status == 0, words
            finish(stored, out, max_shift=10, interpolation="linear")
        assert stores(out) == stores(tmp_path / "fresh")
        assert verify(out).findings == []
    assert taken_over


@pytest.mark.parametrize("moment", ["before it registers", "before its shard gets its place"])
def test_a_worker_of_a_replaced_run_cannot_put_its_result_over_a_newer_one(
    moment, stored, undisturbed, tmp_path, monkeypatch, tried
):
    import stillframe.workflow.unit_tasks

    out, draft = tmp_path / "run", stillframe.workflow.unit_tasks.draft_unit
    shutil.copytree(undisturbed, out)
    before, bytes_before = records(out), stores(out)

    def taken_over():
        (out / "lease.json").write_text(Holder.me().model_dump_json())

    def late(*arguments):
        made = draft(*arguments)
        taken_over()
        return made

    with lease(RunFolder(out)) as held:
        held.drafts.mkdir(parents=True)
        work, unit, mark = job_of(stored, out, held.token)
        if moment == "before it registers":
            taken_over()
        else:
            monkeypatch.setattr(stillframe.workflow.unit_tasks, "draft_unit", late)
        with pytest.raises(LeaseError, match="another driver took over"):
            work((unit, mark))
        assert not list(held.drafts.iterdir())
    assert stores(out) == bytes_before
    changed = {path for path, seen in records(out).items() if before[path] != seen}
    assert {path.parent.name for path in changed} <= {"register"}
    assert bool(changed) == (moment != "before it registers")
    tried("zombie workers")


def job_of(stored, out, token):
    """A task of some run into a folder, with settings of its own."""
    source = open_source(stored[0])
    other = load_reference(out / "reference.zarr")
    file = save_reference(other, out.parent / f"{token}.zarr")
    job = Job(source, file, Claim(RunFolder(out), token))
    unit = Unit(1, 4, 8)
    files = source.identity(unit.start, unit.stop)
    facts = {INPUT_FILES: fingerprint({"files": files}), "kernel version": token}
    return BothStages(RegisterUnit(job), AlignUnit(job, Alignment("linear", 0.0, 4))), unit, Dependencies(facts)


def test_a_task_that_runs_twice_at_once(client, stored, undisturbed, tmp_path, many, tried):
    """Two workers at the same unit, as when one was thought to be dead: the same bytes, whoever is first."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shards = {path: path.read_bytes() for path in out.glob("aligned.zarr/frames/c/*/*/*")}
    with lease(RunFolder(out)) as held:
        held.drafts.mkdir(parents=True)
        work, unit, mark = job_of(stored, out, held.token)
        work = BothStages(work.register, AlignUnit(work.align.job, Alignment("nearest", 0.0, 4)))
        for _ in range(many(10, 50)):
            for stage in ("register", "align"):
                Ledger(RunFolder(out)).withdraw(stage, unit.number)
            workers = list(client.nthreads())
            futures = [client.submit(work, (unit, mark), pure=False, workers=[worker]) for worker in workers]
            got = client.gather(futures)
            assert (
                len({tuple(one.model_copy(update={"seconds": 0}).model_dump_json() for one in each) for each in got})
                == 1
            )
            assert {path: path.read_bytes() for path in shards} == shards
            record = Ledger(RunFolder(out)).read("align", unit.number)
            assert record.files["aligned.zarr/frames/c/1/0/0"].size == len(shards[out / "aligned.zarr/frames/c/1/0/0"])
            assert not list(held.drafts.iterdir())
            tried("a task twice at once on two workers")


def test_a_result_that_is_there_is_not_made_again(stored, undisturbed, tmp_path):
    """As when a worker died after its unit was done, and before it could say so."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    with lease(RunFolder(out)) as held:
        held.drafts.mkdir(parents=True)
        work, unit, mark = job_of(stored, out, held.token)
        first = work((unit, mark))
        before = records(out)
        assert work((unit, mark)) == first
        assert records(out) == before


def test_a_second_driver_is_refused_with_the_name_of_the_first(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = Started(run_command(stored, out, "--workers", 1))
    wait_for(lambda: (out / "lease.json").exists(), process)
    second = Started(run_command(stored, out, "--workers", 0))
    status, words = second.end()
    if process.poll() is None:
        assert status == 2, words
        assert f"is being written by process {process.pid} on " in words
        assert "since 20" in words
    assert process.end()[0] == 0
    with xr.open_zarr(out / "shifts.zarr") as shifts:
        assert shifts.sizes["frame"] == 24
    assert stores(out) == stores(undisturbed)
