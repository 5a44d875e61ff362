"""What a real worker process of a local run has, after an earlier cluster of this process left other values behind."""

import os
import re
import threading
import time
from pathlib import Path

import psutil
import pytest

from faulty import wait_for
from stillframe import Settings
from stillframe.cluster.connect import executor
from stillframe.cluster.worker_environment import variables

CLUSTER = Path(__file__).parents[2] / "cluster"
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "BLOSC_NTHREADS")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A local run's executor with one worker, where a user's shell asks for other values."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_"):
            patch.setenv(name, "7")
        patch.delenv("BLOSC_NTHREADS", raising=False)
        with executor(Settings(frames=folder, out=folder, workers=1), None, threading.Event()) as workers:
            yield workers
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MALLOC_TRIM_THRESHOLD_"] == "7"
        assert "BLOSC_NTHREADS" not in os.environ


@pytest.fixture(scope="module")
def on_worker(local):
    """Calls a function on the worker."""
    return lambda function, *given: next(iter(local.client.run(function, *given).values()))


def test_every_pool_was_started_with_one_thread(on_worker):
    """What counts is the environment with which the process was started, since libraries read it when they load."""
    started = on_worker(lambda: Path("/proc/self/environ").read_text().split("\0"))
    assert [name for name in POOLS if f"{name}=1" not in started] == []


@pytest.mark.parametrize(
    "threads", ["__import__('zarr').config.get('threading.max_workers')", "__import__('numba').get_num_threads()"]
)
def test_libraries_work_with_one_thread(on_worker, threads):
    assert on_worker(eval, threads) == 1


def test_memory_of_a_frame_is_used_again(on_worker):
    """Else the kernel hands out new pages for each of these 64 frames, 2048 a frame."""

    def pages_of_frames(count):
        import resource

        import numpy as np

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            np.ones((2048, 2048), np.uint16)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert on_worker(pages_of_frames, 64) < 5 * 2048


def test_dask_looks_at_itself_seldom(on_worker):
    """By default a worker wakes 50 times a second for ticks alone, and 100 times for its profiler."""

    def wakes():
        return psutil.Process().num_ctx_switches().voluntary

    before = on_worker(wakes)
    time.sleep(2)
    assert on_worker(wakes) - before < 100


def test_a_worker_holds_six_tasks_and_the_scheduler_queues_the_rest(local):
    """Those that wait at the worker keep it from being idle, and a worker that comes later takes from the queue."""
    tasks = local.client.map(lambda _: time.sleep(0.2), range(12), key=[("sleep", n) for n in range(12)])
    wait_for(lambda: sum(map(len, local.client.processing().values())))
    assert [len(keys) for keys in local.client.processing().values()] == [6]
    local.client.gather(tasks)


@pytest.mark.parametrize(("file", "wanted"), [("README.md", ""), ("array.sbatch", "^(?!DASK_)")])
def test_files_that_users_copy_export_the_same_variables(file, wanted):
    """A part of an array has no dask."""
    lines = re.findall(r"^export (.+)$", (CLUSTER / file).read_text(), re.MULTILINE)
    exported = dict(word.split("=", 1) for line in lines for word in line.split())
    assert exported == {name: str(value) for name, value in variables().items() if re.search(wanted, name)}
