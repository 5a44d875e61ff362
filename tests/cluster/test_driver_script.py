"""The driver as a batch job: what its script does with what becomes of it. A real Slurm runs it elsewhere."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from faulty import wait_for

SCRIPT = Path(__file__).parents[2] / "cluster" / "driver.sbatch"
STOPPED = """#!/bin/bash
trap 'exit {status}' TERM
sleep 30 &
touch {folder}/started
wait
"""
BY_ITSELF = "#!/bin/bash\nexit {status}\n"
SCONTROL = """#!/bin/bash
echo "$@" >>{folder}/asked
[ "$(wc -l <{folder}/asked)" -gt {failures} ]
"""


@pytest.fixture
def end(tmp_path):
    """Let the script run a driver; return what both ended with, and what Slurm was asked."""
    started = []

    def run(driver, status, failures=0, **exported):
        for name, text in (("stillframe", driver), ("scontrol", SCONTROL)):
            (tmp_path / name).write_text(text.format(status=status, folder=tmp_path, failures=failures))
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "over": "yes"} | exported
        process = subprocess.Popen(["bash", SCRIPT, "frames.zarr"], env=environment, start_new_session=True)
        started.append(process)
        if driver == STOPPED:
            wait_for((tmp_path / "started").exists, process)
            process.send_signal(signal.SIGUSR1)
        ended = process.wait(60)
        return ended, (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("exported", [{}, {"POSIXLY_CORRECT": "1"}, {"SHELLOPTS": "errexit"}, {"SHELLOPTS": "nounset"}])
@pytest.mark.parametrize("status", [130, 143])
def test_a_driver_that_its_walltime_stopped_is_queued_again(end, status, exported):
    assert end(STOPPED, status, **exported) == (status, ["requeue 17"])


@pytest.mark.parametrize("status", [0, 1, 2])
def test_one_that_had_finished_or_cannot_go_on_is_not(end, status):
    assert end(STOPPED, status) == (status, [])


@pytest.mark.parametrize("status", [0, 2, 130, 137])
def test_nor_is_one_that_ended_by_itself_or_was_killed(end, status):
    assert end(BY_ITSELF, status) == (status, [])


def test_slurm_is_asked_again_where_it_does_not_answer(end):
    assert end(STOPPED, 130, failures=1) == (130, ["requeue 17"] * 2)
