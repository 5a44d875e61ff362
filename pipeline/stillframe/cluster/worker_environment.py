"""Environment variables of worker processes and dask's configuration: one thread a pool, memory reused, quiet dask."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_POOLS = ("OMP", "MKL", "OPENBLAS", "NUMBA", "NUMEXPR")
_THREADS = {**{f"{name}_NUM_THREADS": 1 for name in _POOLS}, "BLOSC_NTHREADS": 1, "ZARR_THREADING__MAX_WORKERS": 1}
"""One thread for each pool, since there is one process for each core. Zarr alone would start more threads in each
process than the machine has cores."""
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_ARENA_MAX": 1}
"""Lets a process reuse the memory of a frame. With dask's default it gets new pages each time, which the kernel must
clear: half of the time that decoding takes."""
_QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
}
"""Switches off dask's profiler and slows its self-monitoring. By default they run 100 and 50 times a second and take
8 % of a core in a driver and 5 % in each worker."""


def variables() -> dict[str, Any]:
    """Return the environment variables of a worker process."""
    quiet = {f"DASK_{name.upper().replace('.', '__').replace('-', '_')}": value for name, value in _QUIET.items()}
    return _THREADS | _MALLOC | quiet


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Set the environment variables of worker processes in this process, whose children inherit them; restore later.

    Dask's own setting for them, ``distributed.nanny.pre-spawn-environ``, yields to variables that exist already, even
    to those that an earlier cluster of this process left behind.
    """
    before = {name: os.environ.get(name) for name in variables()}
    os.environ.update({name: str(value) for name, value in variables().items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def configuration() -> dict[str, Any]:
    """Return dask's configuration of a process with a scheduler.

    A worker gets six tasks for each thread: one to run and five that wait there, so that it is never idle while the
    next one travels, and short tasks share messages. All others wait in the scheduler's queue for a free worker.
    """
    return _QUIET | {"distributed.scheduler.worker-saturation": 6.0}
