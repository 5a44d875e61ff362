"""Runs on a real Slurm, disturbed in every way that Slurm disturbs jobs: the bytes are those of one process."""

import re
import shutil
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from faulty import LONG, Started, run_command, stores, wait_for
from slurmed import CLUSTER, UNITS, Growing, Slurm, units_done
from stillframe.partition import Share

JOBS = 2
REPLACED_WITHIN = 120
"""Seconds after which another worker must have come, on a machine that runs two Slurms at once."""


@dataclass
class Disturbed:
    """A run that lasts until its frames have all come, so that there is time to disturb it."""

    batch: Slurm
    growing: Growing
    out: Path
    given: dict
    process: Started = None

    def start(self):
        more = (self.growing.frames, self.growing.mask, self.out, "--follow")
        self.process = self.batch.start(*more, **self.given)

    def at_work(self):
        """Wait until all workers are there and units get done."""
        done = units_done(self.out)
        wait_for(lambda: len(self.jobs) == JOBS and units_done(self.out) > done + 5, self.process)
        assert self.process.poll() is None, self.process.end()[1]

    @property
    def jobs(self):
        return self.batch.jobs()

    def replaced(self, lost):
        """Wait until jobs are gone and others have come, and return how long that took."""
        wait_for(lambda: not set(lost) & set(self.jobs), self.process)
        began = time.monotonic()
        wait_for(lambda: len(self.jobs) == JOBS, self.process)
        return time.monotonic() - began

    def ends_well(self, undisturbed):
        self.growing.end()
        check(self.process, self.out, undisturbed)


@pytest.fixture
def run(batch, stored, tmp_path):
    """Start a run with settings for its jobs."""
    with Growing(stored, tmp_path / "growing") as growing:

        def start(**given):
            disturbed = Disturbed(batch, growing, tmp_path / "run", given)
            disturbed.start()
            disturbed.at_work()
            return disturbed

        yield start


def check(process, out, undisturbed):
    status, words = process.end(patience=400)
    assert status == 0, words
    assert stores(out) == undisturbed
    assert not list(out.glob(".stillframe-*"))


def wait_until(told):
    found = []
    wait_for(lambda: found.append(told()) or found[-1])
    return found[-1]


def modes(*paths):
    return {oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}


def test_a_run_asks_for_its_workers_and_gives_them_back(batch, stored, undisturbed, tmp_path):
    """Each worker has a scratch folder of its own, which no other user can enter and which is gone at the end."""
    (tmp_path / "scratch").mkdir()
    process = batch.start(*stored, tmp_path / "run", scratch=str(tmp_path / "scratch"))
    (private,) = wait_until(lambda: list((tmp_path / "run").glob(".stillframe-*")))
    wait_for(lambda: len(batch.jobs()) == JOBS, process)
    assert modes(private, private / "keys") == {"0o700"}
    assert modes(*(private / "keys").iterdir()) == {"0o600"}
    wait_for(
        lambda: len(list((tmp_path / "scratch").glob("stillframe.*/dask-scratch-space/worker-*"))) == JOBS, process
    )
    assert modes(*(tmp_path / "scratch").iterdir()) == {"0o700"}
    check(process, tmp_path / "run", undisturbed)
    wait_for(lambda: not batch.ask("squeue", "-h"))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_workers_leave_before_their_walltime_and_are_replaced(run, undisturbed):
    disturbed = run(lifetime=20.0)
    assert disturbed.replaced(disturbed.jobs) < REPLACED_WITHIN
    disturbed.ends_well(undisturbed)


def test_a_worker_whose_walltime_is_over_is_replaced(run, undisturbed):
    """Killed by Slurm, which counts in minutes, as it stays too long."""
    disturbed = run(walltime="00:01:00", lifetime=500.0)
    assert disturbed.replaced(disturbed.jobs[:1]) < REPLACED_WITHIN
    disturbed.ends_well(undisturbed)


def test_a_cancelled_worker_is_replaced(run, batch, undisturbed):
    disturbed = run()
    lost = disturbed.jobs[:1]
    batch.ask("scancel", *lost)
    assert disturbed.replaced(lost) < REPLACED_WITHIN
    disturbed.ends_well(undisturbed)


def test_workers_that_others_push_off_the_node_come_back(run, batch, undisturbed):
    disturbed = run()
    before = disturbed.jobs
    urgent = batch.submit("--partition=urgent", "--ntasks=1", "--cpus-per-task=3", "--mem=100", "--wrap", "sleep 5")
    wait_for(lambda: urgent in batch.jobs(name="wrap"), disturbed.process)
    pushed = set(before) - set(disturbed.jobs)
    assert pushed
    wait_for(lambda: urgent not in batch.jobs(name="wrap"), disturbed.process)
    assert disturbed.replaced(pushed) < REPLACED_WITHIN
    disturbed.ends_well(undisturbed)


def test_a_node_that_is_drained_and_comes_back(run, batch, undisturbed):
    disturbed = run()
    node = batch.ask("sinfo", "-h", "-o", "%n")
    batch.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        batch.ask("scancel", *disturbed.jobs)
        wait_for(lambda: batch.jobs(state="PD"), disturbed.process)
        time.sleep(3)
        assert not disturbed.jobs
        assert disturbed.process.poll() is None
    finally:
        batch.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert disturbed.replaced([]) < REPLACED_WITHIN
    disturbed.at_work()
    disturbed.ends_well(undisturbed)


class TestTheDriverAsAJob:
    @pytest.fixture
    def growing(self, stored, tmp_path):
        with Growing(stored, tmp_path / "growing") as growing:
            yield growing

    def submit(self, batch, growing, out, *more):
        words = (growing.frames, growing.mask), out, "--follow", "--cluster", batch.settings()
        command = run_command(*words, unit_frames=1, reference="0:16")
        return batch.submit("--mem=1500", *more, CLUSTER / "driver.sbatch", *command[command.index("run") + 1 :])

    def finished(self, batch, out, undisturbed):
        wait_for(lambda: (out / "manifest.json").exists() and not batch.ask("squeue", "-h"), patience=300)
        assert stores(out) == undisturbed

    def test_goes_on_where_it_was_after_its_own_walltime(self, batch, growing, undisturbed, tmp_path):
        """Slurm counts in minutes: unless there is time, the signal comes from the one who submitted the job."""
        out = tmp_path / "run"
        # Slurm looks twice a minute, and warns half a minute early, so here after 90 to 120 s. A shorter job may be
        # warned while it still starts, each time anew, and never get anywhere on a busy machine.
        job = self.submit(batch, growing, out, *(("--time=3", "--signal=B:USR1@60") if LONG else ()))
        if not LONG:
            wait_for(lambda: units_done(out) > 20)
            batch.ask("scancel", "--batch", "--signal=USR1", job)
        wait_for(lambda: "Restarts=1" in batch.ask("scontrol", "show", "job", job), patience=240)
        growing.end()
        self.finished(batch, out, undisturbed)
        assert "Stopped. What is finished is kept" in (tmp_path / f"slurm-{job}.out").read_text()

    def test_is_cancelled_and_submitted_again(self, batch, growing, undisturbed, tmp_path):
        out = tmp_path / "run"
        job = self.submit(batch, growing, out)
        wait_for(lambda: units_done(out) > 20)
        batch.ask("scancel", job)
        wait_for(lambda: not batch.ask("squeue", "-h"))
        assert 20 < units_done(out) < UNITS
        growing.end()
        self.submit(batch, growing, out)
        self.finished(batch, out, undisturbed)

    def test_is_killed_and_its_workers_end_by_themselves(self, run, batch, undisturbed):
        disturbed = run()
        assert disturbed.process.kill(group=True)
        wait_for(lambda: not batch.ask("squeue", "-h"), patience=150)
        disturbed.growing.end()
        disturbed.start()
        disturbed.ends_well(undisturbed)


def test_an_array_needs_no_scheduler(batch, stored, undisturbed, tmp_path):
    """One part of four is cancelled: the gathering job names its frames, and a second array does just those."""
    out = tmp_path / "run"
    script = tmp_path / "array.sbatch"
    script.write_text((CLUSTER / "array.sbatch").read_text().replace("parts=16", "parts=4"))
    command = run_command(stored, out, unit_frames=1, reference="0:16")
    words = command[command.index("run") + 1 :]
    array = batch.submit("--array=1-4", "--mem=1500", script, *words)
    third = units_of(3, 4)
    wait_for(lambda: any(record(out, unit).exists() for unit in third))
    batch.ask("scancel", f"{array}_3")
    gathering = ("--mem=1500", "--wrap", f"stillframe gather {out}")
    first = batch.submit(f"--dependency=afterany:{array}", *gathering)
    wait_for(lambda: not batch.ask("squeue", "-h"), patience=200)
    told = (tmp_path / f"slurm-{first}.out").read_text()
    assert re.search(r"frames are missing: frames? \d+(–\d+)?\. Start part 3 of 4 again", told), told
    assert not (out / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*/0*.json")}
    array = batch.submit("--array=3", "--mem=1500", script, *words)
    batch.submit(f"--dependency=afterok:{array}", *gathering)
    wait_for(lambda: not batch.ask("squeue", "-h"), patience=200)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert stores(out) == undisturbed


def units_of(part, parts):
    return Share(part, parts).units(range(UNITS))


def record(out, unit):
    return out / "units" / "align" / f"{unit:06d}.json"


def test_a_job_that_slurm_does_not_take_is_told(batch, stored, tmp_path):
    status, words = batch.start(*stored, tmp_path / "run", queue="nonsense").end()
    assert status == 2
    assert "slurm takes no such job" in words and "invalid partition" in words
    assert not list((tmp_path / "run").glob(".stillframe-*"))


def test_jobs_that_all_end_at_once_are_told(batch, stored, tmp_path):
    status, words = batch.start(*stored, tmp_path / "run", python=shutil.which("false")).end(200)
    assert status == 2
    assert "jobs ended one after the other before their worker connected" in words


def test_a_queue_is_waited_for_until_ctrl_c(batch, stored, tmp_path):
    """Nobody else can drive the same folder meanwhile."""
    process = batch.start(*stored, tmp_path / "run", directives=["--hold"])
    wait_for(lambda: batch.jobs(state="PD"), process)
    second = batch.start(*stored, tmp_path / "run", directives=["--hold"])
    status, words = second.end()
    assert status == 2 and "is being written by process" in words
    process.process.send_signal(signal.SIGINT)
    status, words = process.end()
    assert status == 130 and "Stopped" in words


def test_another_user_reads_no_key(run, batch, stored, undisturbed, tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    disturbed = run()
    (key,) = disturbed.out.glob(".stillframe-*/keys/key.pem")
    told = subprocess.run(["cat", str(key)], user="nobody", capture_output=True, text=True, check=False)
    assert "Permission denied" in told.stderr and not told.stdout
    disturbed.ends_well(undisturbed)


def test_a_job_that_ended_before_its_worker_connected_is_replaced(run, batch, undisturbed):
    """It waits in the queue, since another has its place, and is cancelled there: dask never hears of it."""
    disturbed = run()
    urgent = batch.submit("--partition=urgent", "--cpus-per-task=3", "--mem=100", "--wrap", "sleep 500")
    (waiting,) = wait_until(lambda: batch.jobs(state="PD"))
    batch.ask("scancel", waiting)
    batch.ask("scancel", urgent)
    assert disturbed.replaced([waiting]) < REPLACED_WITHIN
    disturbed.ends_well(undisturbed)


def test_a_batch_system_that_does_not_answer_is_asked_again(run, batch, undisturbed, tmp_path, slurm, monkeypatch):
    known, trouble = shutil.which("sbatch"), tmp_path / "trouble"
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\n[ -e {trouble} ] && echo "Unable to contact slurm controller" >&2 && exit 1\nexec {known} "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setitem(batch.environment, "PATH", f"{fake.parent}:{batch.environment['PATH']}")
    disturbed = run()
    trouble.touch()
    lost = disturbed.jobs[:1]
    batch.ask("scancel", *lost)
    log = disturbed.out / "run.log"
    wait_for(lambda: "a job could not be submitted" in log.read_text(), disturbed.process)
    trouble.unlink()
    assert disturbed.replaced(lost) < REPLACED_WITHIN
    disturbed.ends_well(undisturbed)
