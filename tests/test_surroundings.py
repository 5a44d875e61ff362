"""Workers of a local cluster find what suits them around them."""

import os
import threading

import dask
import pytest

from stillframe import Settings
from stillframe.clusters import executor
from stillframe.surroundings import variables


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Ask the one worker there is."""
    folder = tmp_path_factory.mktemp("run")
    with executor(Settings(frames=folder, out=folder, workers=1), None, threading.Event()) as workers:
        yield lambda function, *given: next(iter(workers.client.run(function, *given).values()))


@pytest.mark.parametrize(("name", "value"), variables().items())
def test_local_workers_have_the_variable(asked, name, value):
    assert asked(os.getenv, name) == str(value)


def test_zarr_reads_with_one_thread(asked):
    assert asked(eval, "__import__('zarr').config.get('threading.max_workers')") == 1


def test_dask_does_not_profile(asked):
    assert asked(dask.config.get, "distributed.worker.profile.enabled") is False
