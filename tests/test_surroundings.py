"""Workers of a local cluster find what suits them around them."""

import math
import os
import re
import threading
from pathlib import Path

import dask
import pytest

from stillframe import Settings
from stillframe.clusters import executor
from stillframe.surroundings import configuration, variables

CLUSTER = Path(__file__).parents[1] / "cluster"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Ask the one worker there is."""
    folder = tmp_path_factory.mktemp("run")
    settings = Settings(frames=folder, out=folder, workers=1, cluster="local")
    with executor(settings, None, threading.Event()) as workers:
        yield lambda function, *given: next(iter(workers.client.run(function, *given).values()))


@pytest.mark.parametrize(("name", "value"), variables().items())
def test_local_workers_have_the_variable(asked, name, value):
    assert asked(os.getenv, name) == str(value)


def test_zarr_reads_with_one_thread(asked):
    assert asked(eval, "__import__('zarr').config.get('threading.max_workers')") == 1


def test_dask_does_not_profile(asked):
    assert asked(dask.config.get, "distributed.worker.profile.enabled") is False


@pytest.mark.parametrize(("name", "value"), configuration().items())
def test_the_scheduler_has_its_configuration(asked, name, value):
    """The fixture is asked for because it lasts while its scheduler does, in this process."""
    assert dask.config.get(name) == value


def test_long_units_wait_at_their_workers():
    assert configuration()["distributed.scheduler.worker-saturation"] == math.inf


@pytest.mark.parametrize(("file", "wanted"), [("README.md", ""), ("array.sbatch", "^(?!DASK_)")])
def test_what_users_copy_says_the_same(file, wanted):
    """A part of an array has no dask."""
    lines = re.findall(r"^export (.+)$", (CLUSTER / file).read_text(), re.MULTILINE)
    exported = dict(word.split("=", 1) for line in lines for word in line.split())
    assert exported == {name: str(value) for name, value in variables().items() if re.search(wanted, name)}
