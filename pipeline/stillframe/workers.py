"""Is a worker fit for a run? The same packages as the driver, the same folders, scratch, and a clock that is right.

The driver asks every worker when it connects; one that comes later asks itself before its first unit.
"""

import functools
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from stillframe.errors import WorkerUnfit
from stillframe.leases import SKEW
from stillframe.match import KERNEL_VERSION
from stillframe.units import first_few

_PACKAGES = ("stillframe", "numpy", "scipy", "numba", "zarr", "numcodecs", "dask", "distributed")
"""Whose versions decide the bytes of a result, or whether it arrives."""


@dataclass(frozen=True)
class Demands:
    """What the driver asks of every worker."""

    versions: tuple[tuple[str, str], ...]
    """Of Python, the packages and the kernel."""
    frames: Path
    """The input."""
    private: Path
    """A folder within the output, which the driver made for this session."""


def demands_of(frames: Path, private: Path) -> Demands:
    """Put together what the driver asks for, from what it has itself."""
    return Demands(versions(), frames, private)


def versions() -> tuple[tuple[str, str], ...]:
    """Return the versions of Python, of packages and of the kernel in this process."""
    packages = tuple((name, metadata.version(name)) for name in _PACKAGES)
    return (("Python", platform.python_version()), *packages, ("kernel", str(KERNEL_VERSION)))


def unmet(demands: Demands, scratch: str) -> list[str]:
    """Return in words what this process lacks for the run; nothing where it is fit."""
    return [*_other_versions(demands.versions), *_hidden(demands), *_scratch(scratch)]


@functools.lru_cache(maxsize=4)
def refuse_unfit(demands: Demands, scratch: str) -> None:
    """Raise ``WorkerUnfit`` if this process lacks anything; looks once."""
    if lacks := unmet(demands, scratch):
        raise WorkerUnfit("; ".join(lacks))


def _other_versions(wanted: tuple[tuple[str, str], ...]) -> list[str]:
    here = dict(versions())
    other = [f"{name} {here.get(name)} instead of {version}" for name, version in wanted if here.get(name) != version]
    advice = "install there what the driver has, or start workers from the driver's environment"
    return [f"it has {', '.join(other)}: {advice}"] if other else []


def _hidden(demands: Demands) -> list[str]:
    """Return which folders it does not see, and whether its clock is that of the files.

    Frames that are others there than here are found by their names, sizes and times, unit by unit.
    """
    out = demands.private.parent
    lacks = []
    try:
        next(demands.frames.iterdir(), None)
    except OSError as error:
        lacks.append(f"it cannot read {demands.frames} ({error.strerror}): give a path that all machines share")
    try:
        seen = time.time()
        skew = _written(demands.private) - seen
        if abs(skew) > SKEW:
            lacks.append(f"its clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} that of {out}: set it")
    except OSError as error:
        lacks.append(f"it cannot write into {out} ({error.strerror}): give an --out that all machines share")
    return lacks


def _written(folder: Path) -> float:
    """Return when a file that is written now was written, by the clock of its file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="seen.") as file:
        file.write(b"1")
        file.flush()
        return os.stat(file.name).st_mtime


def _scratch(folder: str) -> list[str]:
    """Look whether dask's own folder on a worker can be written."""
    try:
        _written(Path(folder))
    except OSError as error:
        return [f"its scratch {folder} cannot be written ({error.strerror}): choose another one for the workers"]
    return []


def refuse_unfit_workers(client: Any, demands: Demands, *, some: bool = False) -> None:
    """Ask every worker that is connected.

    Raises
    ------
    WorkerUnfit
        Names the workers that are not fit, and why; if some may be, then only where none is.
    """
    found = unfit_of(client, demands)
    unfit = [f"worker {address}: {lacks}" for address, lacks in found.items() if lacks]
    if unfit and not (some and len(unfit) < len(found)):
        raise WorkerUnfit(f"{len(unfit)} of {len(found)} workers cannot take part. {first_few(unfit)}")


def unfit_of(client: Any, demands: Demands, workers: Sequence[str] | None = None) -> dict[str, str]:
    """Ask workers, by default all, and return for each what it lacks, in words, or nothing; who is gone is left out."""
    began = time.time()
    answers: Mapping[str, Any] = client.run(_answer, demands, workers=workers, on_error="return")
    took = time.time() - began
    there = {address: answer for address, answer in answers.items() if not isinstance(answer, OSError)}
    return {address: "; ".join(_judged(answer, began, took)) for address, answer in there.items()}


def _answer(demands: Demands, dask_worker: Any) -> tuple[list[str], float]:
    return unmet(demands, dask_worker.local_directory), time.time()


def _judged(answer: Any, began: float, took: float) -> list[str]:
    """Return what a worker lacks, by its own answer and by the driver's clock."""
    if isinstance(answer, ModuleNotFoundError | AttributeError):
        return [f"this stillframe is not installed there ({answer}): start workers from the driver's environment"]
    if isinstance(answer, BaseException):
        return [f"it could not answer: {type(answer).__name__}: {answer}"]
    lacks, clock = answer
    skew = clock - began
    if -SKEW <= skew <= took + SKEW:
        return list(lacks)
    return [*lacks, f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the driver's: set it"]
