"""Checks whether a worker fits a run: versions of packages, folders that all machines share, scratch and clock.

The driver asks connected workers before the run starts, and later ones when it notices them. As their first unit may
come earlier, they also check themselves.
"""

import functools
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from stillframe.cluster.security import replaceable_by
from stillframe.errors import WorkerUnfit
from stillframe.storage.durable import CLOCK_SKEW
from stillframe.versions import KERNEL_VERSION
from stillframe.wording import first_few

_PACKAGES = ("stillframe", "numpy", "scipy", "numba", "zarr", "numcodecs", "dask", "distributed")
"""Packages whose versions decide the bytes of a result, or whether it arrives. Dask's ``Client.get_versions`` compares
neither the kernel's version nor those of workers that connect later."""


@dataclass(frozen=True)
class Requirements:
    """Properties that every worker of a run must have."""

    versions: tuple[tuple[str, str], ...]
    """Versions of Python, of packages and of the kernel."""
    frames: Path
    """The input."""
    private: Path
    """Folder within the output that the driver made for this session."""


def requirements(frames: Path, private: Path) -> Requirements:
    """Return the requirements of a run, with the versions of this process, its driver."""
    return Requirements(versions(), frames, private)


def versions() -> tuple[tuple[str, str], ...]:
    """Return the versions of Python, of packages and of the kernel in this process."""
    packages = tuple((name, metadata.version(name)) for name in _PACKAGES)
    return (("Python", platform.python_version()), *packages, ("kernel", str(KERNEL_VERSION)))


def unmet_by(required: Requirements, scratch: str) -> list[str]:
    """Return in words the requirements that this process, with its scratch folder, does not meet."""
    return [*_other_versions(required.versions), *_folders_and_clock(required), *_scratch_folder(scratch)]


def _other_versions(wanted: tuple[tuple[str, str], ...]) -> list[str]:
    here = dict(versions())
    other = [f"{name} {here.get(name)} instead of {version}" for name, version in wanted if here.get(name) != version]
    advice = "install there what the driver has, or start workers from the driver's environment"
    return [f"it has {', '.join(other)}: {advice}"] if other else []


def _folders_and_clock(required: Requirements) -> list[str]:
    """Check that the input can be read and the output written, and compare the clock with that of the file system.

    Whether the frames are the same files here and there is checked by each unit, by names, sizes and times.
    """
    out = required.private.parent
    unmet = []
    try:
        next(required.frames.iterdir(), None)
    except OSError as error:
        unmet.append(f"it cannot read {required.frames} ({error.strerror}): give a path that all machines share")
    try:
        now = time.time()
        skew = _time_of_writing(required.private) - now
        if abs(skew) > CLOCK_SKEW:
            unmet.append(f"its clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} that of {out}: set it")
    except OSError as error:
        unmet.append(f"it cannot write into {out} ({error.strerror}): give an --out that all machines share")
    return unmet


def _time_of_writing(folder: Path) -> float:
    """Return the modification time of a file written now, by the clock of the folder's file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="clock.") as file:
        file.write(b"1")
        file.flush()
        return os.stat(file.name).st_mtime


def _scratch_folder(folder: str) -> list[str]:
    """Check that dask's own folder on a worker can be written by its owner, and by nobody else."""
    try:
        _time_of_writing(Path(folder))
    except OSError as error:
        return [f"its scratch {folder} cannot be written ({error.strerror}): choose another one for the workers"]
    if others := replaceable_by(Path(folder)):
        return [
            f"its scratch {folder} is on its import path and can be changed by {others}: start workers with "
            '--local-directory "$(mktemp -d)"'
        ]
    return []


@functools.lru_cache(maxsize=4)
def refuse_unfit(required: Requirements, scratch: str) -> None:
    """Raise ``WorkerUnfit`` if this process does not meet the requirements. Only the first call checks."""
    if unmet := unmet_by(required, scratch):
        raise WorkerUnfit("; ".join(unmet))


def refuse_unfit_cluster(client: Any, required: Requirements, *, some: bool = False) -> None:
    """Raise ``WorkerUnfit`` if this process or a connected worker is unfit; if ``some`` may be, only if all are."""
    if problems := _folders_and_clock(required):  # each machine's clock is compared with that of the file system
        raise WorkerUnfit(f"this machine cannot drive the run: {'; '.join(problems)}")
    reasons = unfit_workers(client, required)
    unfit = [f"worker {address}: {reason}" for address, reason in reasons.items() if reason]
    if unfit and not (some and len(unfit) < len(reasons)):
        raise WorkerUnfit(f"{len(unfit)} of {len(reasons)} workers cannot take part. {first_few(unfit)}")


def unfit_workers(client: Any, required: Requirements, workers: list[str] | None = None) -> dict[str, str]:
    """Return for each connected worker why it is unfit; empty if it is fit. All workers are asked by default."""
    answers: Mapping[str, Any] = client.run(_answer, required, workers=workers, on_error="return")
    return {address: _reason(answer) for address, answer in answers.items() if not isinstance(answer, OSError)}


def _answer(required: Requirements, dask_worker: Any) -> list[str]:
    return unmet_by(required, dask_worker.local_directory)


def _reason(answer: Any) -> str:
    """Return why a worker is unfit, from its answer or the exception in its place; empty if it is fit."""
    if isinstance(answer, ModuleNotFoundError | AttributeError):
        return f"this stillframe is not installed there ({answer}): start workers from the driver's environment"
    if isinstance(answer, BaseException):
        return f"it could not answer: {type(answer).__name__}: {answer}"
    return "; ".join(answer)
