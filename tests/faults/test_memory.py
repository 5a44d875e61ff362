"""A worker that has just the memory that was predicted finishes, however many frames there are."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from faulty import LONG, Cluster, Started, command, wait_for
from stillframe.cluster.executors import process_memory
from stillframe.partition import unit_memory
from stillframe.simulation.experiment import Experiment
from stillframe.storage.frames import open_source
from stillframe.storage.zarr_files import codec

SHAPE = (2048, 2048)
UNIT, REACH, DISTINCT = 16, 32, 4
STACKS = (100, 1000, 10000) if LONG else (96, 256)
CONTROLLERS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
_PEAKS: dict[int, int] = {}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A few real chunks, as many times as one likes: a stack of hard links."""
    experiment = Experiment(frames=DISTINCT, shape=SHAPE, dose=20.0, max_drift=12.0, dark_every=0, seed=7)
    folder = tmp_path_factory.mktemp("frames")
    np.save(folder / "mask.npy", experiment.detector.mask)
    few = create(folder / "few.zarr", DISTINCT)
    for index in range(DISTINCT):
        few[index] = experiment.render(index)

    def stack(count):
        create(folder / f"{count}.zarr", count)
        for index in range(count):
            chunk = folder / f"{count}.zarr" / "c" / str(index) / "0"
            chunk.mkdir(parents=True)
            os.link(folder / "few.zarr" / "c" / str(index % DISTINCT) / "0" / "0", chunk / "0")
        return folder / f"{count}.zarr"

    yield folder / "mask.npy", stack
    shutil.rmtree(folder)


def create(path, count):
    return zarr.create_array(path, shape=(count, *SHAPE), chunks=(1, *SHAPE), dtype=np.uint16, compressors=codec())


@contextlib.contextmanager
def limited(size):
    """Give a prefix of a command that gets no more memory than this from the kernel."""
    group = next((folder for folder in CONTROLLERS if (folder / "memory.limit_in_bytes").exists()), None)
    try:
        own = group / "stillframe-test"
        own.mkdir(exist_ok=True)
        (own / "memory.limit_in_bytes").write_text(str(size))
    except (OSError, TypeError):
        # No control group of one's own: what processes ask for is limited instead.
        yield ["sh", "-c", f'ulimit -d {size // 1024}; exec "$@"', "sh"]
        return
    yield ["sh", "-c", f'echo $$ > {own}/cgroup.procs; exec "$@"', "sh"]
    with contextlib.suppress(OSError):
        own.rmdir()


def peak(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


@pytest.mark.parametrize("count", STACKS)
def test_a_worker_with_the_predicted_memory_finishes(count, frames, tmp_path, tried):
    mask, stack = frames
    store = stack(count)
    layout = open_source(store).layout
    predicted = process_memory(unit_memory(layout, UNIT, 2, REACH))
    with limited(predicted) as prefix, Cluster(tmp_path, workers=0) as cluster:
        environment = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": str(2**30),
            "MALLOC_TRIM_THRESHOLD_": str(2**30),
            "MALLOC_ARENA_MAX": "1",
        }
        flags = ["--scheduler-file", cluster.file, "--no-dashboard", "--nthreads", 1, "--no-nanny", "--memory-limit", 0]
        worker = subprocess.Popen(
            [*prefix, sys.executable, "-m", "distributed.cli.dask_worker", *map(str, flags)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        try:
            run = command(
                "run",
                store,
                "--mask",
                mask,
                "--out",
                tmp_path / "run",
                "--unit-frames",
                UNIT,
                "--memory",
                4,
                "--reference",
                0,
            )
            process = Started([*run, "--scheduler", str(cluster.file)])
            status, words = process.end(3600)
            assert status == 0, words
            assert worker.poll() is None
            used = peak(worker.pid)
        finally:
            worker.kill()
            worker.wait()
    wait_for(lambda: worker.poll() is not None)
    shutil.rmtree(tmp_path / "run")
    _PEAKS[count] = used
    assert 0.8 * predicted < used < 1.2 * predicted
    assert used < 1.1 * min(_PEAKS.values())
    sizes = f"{used / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f}"
    tried(f"{count} frames of 2048² within the predicted memory: {sizes}")
