"""A real Slurm of one node, for tests of this folder; they are skipped, with the reason, where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from faulty import finish, stores, wait_for
from slurmed import UNITS, Slurm
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate

HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The environment in which sbatch and the others find it."""
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing or os.geteuid():
        pytest.skip(f"no Slurm can be started here: {', '.join(missing) or 'it takes root'}")
    folder = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    script = str(HERE / "slurm.sh")
    try:
        subprocess.run([script, "start", folder], env=environment, check=True)
        yield environment
    finally:
        subprocess.run([script, "stop", folder], env=environment, check=True)


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """A stack of many small frames, each a unit of its own: a run lasts long enough to be disturbed."""
    folder = tmp_path_factory.mktemp("stored")
    return simulate(Experiment(frames=UNITS, shape=(128, 128), max_drift=4), folder)


@pytest.fixture(scope="session")
def undisturbed(stored, tmp_path_factory):
    """Every byte of what one process makes of it; the frames of the reference are named, since stacks grow here."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert not finish(stored, out, unit_frames=1, reference="0:16").problems
    return stores(out)


@pytest.fixture
def batch(slurm, tmp_path):
    yield (asker := Slurm(slurm, tmp_path))
    subprocess.run(["scancel", "--user=root"], env=slurm, check=False)
    wait_for(lambda: not asker.ask("squeue", "-h"))
