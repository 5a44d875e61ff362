"""What processes find around them that work for a run: one thread for each pool, memory used again, a quiet dask."""

import math
from typing import Any

_POOLS = ("OMP", "MKL", "OPENBLAS", "NUMBA", "NUMEXPR")
_THREADS = {**{f"{name}_NUM_THREADS": 1 for name in _POOLS}, "BLOSC_NTHREADS": 1, "ZARR_THREADING__MAX_WORKERS": 1}
"""There is a process for each core; zarr alone would start more threads in each than there are cores."""
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_ARENA_MAX": 1}
"""Lets a process use memory again that held a frame. By dask's default each one gets new pages, which the kernel must
clear: half of what decoding it takes."""
_QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
}
"""Dask's looks at itself: by default 50 and 100 a second, 8 % of a core in a driver and 5 % in each worker."""


def variables() -> dict[str, Any]:
    """Return the environment variables of a worker process."""
    quiet = {f"DASK_{name.upper().replace('.', '__').replace('-', '_')}": value for name, value in _QUIET.items()}
    return _THREADS | _MALLOC | quiet


def configuration() -> dict[str, Any]:
    """Return dask's configuration of a process with a scheduler."""
    # Few units are under way for each worker, which suits long ones; that they wait there, and not at the scheduler,
    # saves a journey for each.
    return _QUIET | {"distributed.scheduler.worker-saturation": math.inf}
