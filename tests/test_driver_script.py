"""The driver as a batch job: what its script does with what becomes of it. A real Slurm runs it elsewhere."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cluster" / "driver.sbatch"
DRIVER = """#!/bin/bash
trap 'exit {status}' TERM
touch {folder}/started
for _ in $(seq 600); do sleep 0.05; done
"""


@pytest.fixture
def ended(tmp_path):
    """Start the script with a driver that ends with some status when stopped; return its own, and what it asked."""
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\n')

    def run(status):
        (tmp_path / "stillframe").write_text(DRIVER.format(status=status, folder=tmp_path))
        for name in ("stillframe", "scontrol"):
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "over": "yes"}
        process = subprocess.Popen(["bash", SCRIPT, "frames.zarr"], env=environment)
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        asked = tmp_path / "asked"
        return process.wait(30), asked.read_text().split() if asked.exists() else []

    return run


@pytest.mark.parametrize("status", [130, 143])
def test_a_driver_stopped_before_its_walltime_is_queued_again(ended, status):
    assert ended(status) == (status, ["requeue", "17"])


@pytest.mark.parametrize("status", [0, 1, 2])
def test_one_that_finished_or_cannot_go_on_is_not(ended, status):
    assert ended(status) == (status, [])
