"""SIGKILL, at random moments, of whoever takes part; then the same command again."""

import os
import shutil
import signal

import pytest

from faulty import (
    Cluster,
    Started,
    chances,
    finish,
    kill,
    records,
    run_command,
    stores,
    wait_for_work,
    worker_processes,
)
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate
from stillframe.workflow.ledger import Ledger
from stillframe.workflow.run_folder import RunFolder

EXPERIMENT = Experiment(frames=60, shape=(96, 80), dose=200.0, max_drift=5.0, dark_every=10, seed=4)
UNITS = 30
OPTIONS = {"unit_frames": 2}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return simulate(EXPERIMENT, tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module", params=["nearest", "linear"])
def scenario(request, stored, tmp_path_factory):
    """Register and align from nothing; and align alone, with another interpolation than before.

    Gives the folder to begin from, the options, and the undisturbed stores.
    """
    folder = tmp_path_factory.mktemp("scenario")
    finish(stored, folder / "begin", **OPTIONS)
    options = OPTIONS | {"interpolation": request.param}
    finish(stored, folder / "end", **options)
    begin = folder / "begin" if request.param == "linear" else None
    return begin, options, stores(folder / "end")


def fresh(folder, begin):
    if begin:
        shutil.copytree(begin, folder)
    return folder


def finished(out):
    """Records of units that need not be done again, as they lie on disk."""
    ledger = Ledger(RunFolder(out))
    return {
        path: seen
        for path, seen in records(out).items()
        if (record := ledger.read(path.parent.name, int(path.stem))) and not record.problems
    }


def assert_kept(before, out):
    """Nothing that was finished is done again."""
    after = records(out)
    assert {path for path, seen in before.items() if after.get(path) != seen} == set()


@pytest.mark.parametrize("group", [False, True], ids=["driver", "everything"])
def test_killed_drivers(group, scenario, stored, tmp_path, many, tried):
    """The workers of a driver that was killed alone live on for a while as zombies."""
    begin, options, undisturbed = scenario
    chance, kills, wanted, number = chances(group), 0, many(3, 20), 0
    while kills < wanted:
        number += 1
        out, kept, alive = fresh(tmp_path / str(number), begin), {}, True
        while alive and kills < wanted:
            process = Started(run_command(stored, out, "--workers", 2, **options))
            wait_for_work(process, out, chance, 10)
            alive = process.kill(group=group)
            kills += alive
            assert_kept(kept, out)
            kept = finished(out)
        finish(stored, out, **options)
        assert_kept(kept, out)
        assert stores(out) == undisturbed
    tried(f"SIGKILL of {'everything' if group else 'the driver'}, {options['interpolation']}", kills)


@pytest.mark.parametrize("every", [False, True], ids=["one", "all"])
def test_killed_workers(every, scenario, stored, tmp_path, many, tried):
    """The run itself goes on; if it gives units up, the next one does just those."""
    begin, options, undisturbed = scenario
    chance, kills, wanted, number = chances(every), 0, many(4, 28), 0
    while kills < wanted:
        number += 1
        out, kept = fresh(tmp_path / str(number), begin), {}
        process = Started(run_command(stored, out, "--workers", 2, **options))
        for _ in range(4):
            wait_for_work(process, out, chance, 8)
            found = worker_processes(process.pid)
            if process.poll() is not None or not found:
                break
            assert_kept(kept, out)
            kept = finished(out)
            kill(found if every else [chance.choice(found)])
            kills += 1
        status, words = process.end()
        assert status in (0, 1), words
        assert ("was given up" in words) == (status == 1), words
        finish(stored, out, **options)
        assert_kept(kept, out)
        assert stores(out) == undisturbed
    tried(f"SIGKILL of {'all workers' if every else 'a worker'}, {options['interpolation']}", kills)


def test_killed_schedulers(scenario, stored, tmp_path, many, tried):
    begin, options, undisturbed = scenario
    chance, kills, wanted, number = chances("scheduler"), 0, many(2, 10), 0
    while kills < wanted:
        number += 1
        out, kept, alive = fresh(tmp_path / str(number), begin), {}, True
        while alive and kills < wanted:
            with Cluster(tmp_path) as cluster:
                process = Started(run_command(stored, out, "--scheduler", cluster.file, **options))
                wait_for_work(process, out, chance, 10)
                os.killpg(cluster.scheduler.pid, signal.SIGKILL)
                status, words = process.end()
            alive = status != 0
            kills += alive
            assert not alive or (status == 2 and "the dask scheduler is gone" in words), words
            assert "Traceback" not in words
            assert_kept(kept, out)
            kept = finished(out)
        finish(stored, out, **options)
        assert_kept(kept, out)
        assert stores(out) == undisturbed
    tried(f"SIGKILL of the scheduler, {options['interpolation']}", kills)


def crashing(stored, out, moment, tmp_path):
    """Run with workers that crash at a moment of the unit of frames 10–11, as when a library does."""
    crash = tmp_path / "crash" / "sitecustomize.py"
    crash.parent.mkdir()
    crash.write_text(CRASH + moment)
    environment = os.environ | {"PYTHONPATH": str(crash.parent)}
    status, words = Started(run_command(stored, out, "--workers", 2, **OPTIONS), env=environment).end()
    assert "Traceback" not in words
    return status, words


@pytest.mark.parametrize(
    ("moment", "stage", "done"), [("at_reading", "register", 2 * UNITS - 2), ("at_writing", "align", 2 * UNITS - 1)]
)
def test_a_unit_that_kills_its_worker_does_not_loop_for_ever(moment, stage, done, stored, tmp_path, tried):
    """All others are done, and a later run tries just those."""
    out, reference = tmp_path / "run", tmp_path / "reference"
    finish(stored, reference, **OPTIONS)
    status, words = crashing(stored, out, moment, tmp_path)
    assert status == 1, words
    assert f"frames 10–11: {stage} was given up: each worker that tried it died" in words
    assert words.count("given up") == 1
    before = finished(out)
    assert len(before) == done
    finish(stored, out, **OPTIONS)
    assert_kept(before, out)
    assert stores(out) == stores(reference)
    tried("frames that kill their worker")


def test_a_result_that_was_published_before_its_worker_died_counts(stored, tmp_path, tried):
    """Even if no worker lives long enough to tell the driver."""
    out, reference = tmp_path / "run", tmp_path / "reference"
    finish(stored, reference, **OPTIONS)
    status, words = crashing(stored, out, "once_published", tmp_path)
    assert status == 0, words
    assert len(finished(out)) == 2 * UNITS
    assert stores(out) == stores(reference)
    tried("workers that die before they can tell their result")


CRASH = """
import os
import sys


def crashes(unit):
    if "spawn_main" in " ".join(sys.orig_argv) and unit.start == 10 and unit.stop == 12:
        os.abort()


def at_reading():
    from stillframe.storage.frames import FrameSource

    read = FrameSource.read
    FrameSource.read = lambda source, unit: crashes(unit) or read(source, unit)


def at_writing():
    import stillframe.storage.aligned_store as store

    draft = store.draft_unit
    store.draft_unit = lambda folder, unit, *rest: crashes(unit) or draft(folder, unit, *rest)


def once_published():
    from stillframe.workflow.ledger import Ledger

    publish, has_files = Ledger.publish, Ledger.has_files

    def publishing(ledger, record):
        publish(ledger, record)
        if record.stage == "align":
            crashes(record)

    Ledger.publish = publishing
    Ledger.has_files = lambda ledger, record: crashes(record) or has_files(ledger, record)


class Watch:
    def find_spec(self, name, path, target=None):
        if name == "stillframe.workflow.unit_tasks" and self in sys.meta_path:
            sys.meta_path.remove(self)
            patch()
        return None


sys.meta_path.insert(0, Watch())
patch = """
