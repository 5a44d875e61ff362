"""What a run is going to take: memory, tasks, bytes, disk and, from a pilot of a few units, time."""

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe.batch import run_once
from stillframe.clusters import executor
from stillframe.errors import RunStopped
from stillframe.executors import Executor, process_memory, unit_budget
from stillframe.frames import FrameSource, open_source
from stillframe.leases import Claim
from stillframe.marks import marker_of
from stillframe.outdated import is_done
from stillframe.prepare import check_folder, prepare_plan, prepare_reference
from stillframe.records import Ledger, UnitRecord
from stillframe.reference import Reference
from stillframe.resample import check_fill, output_dtype
from stillframe.settings import Settings
from stillframe.units import Plan, unit_memory

_MOST = 8
"""Units of a pilot, at most, where no number is given."""
_SPARE = 1.1
"""Disk to have, as a part of what is expected."""


@dataclass(frozen=True)
class Forecast:
    """What a run is going to take, beyond what is finished already."""

    plan: Plan
    """The units."""
    left: int
    """Units that are not finished."""
    workers: int
    """Units that are worked on at a time."""
    memory: int
    """Bytes that each worker takes at most."""
    allowed: int
    """Bytes that each worker has."""
    reading: int
    """Bytes of pixels that are read, decoded."""
    disk: int
    """Bytes that the aligned frames still need: as the pilot's, or at most."""
    free: int
    """Bytes that are free where they go."""
    pilot: int
    """Units that were tried."""
    seconds: float | None
    """Time that it takes, from the pilot."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.disk * _SPARE <= self.free


def forecast(settings: Settings, *, pilot: int | None = None, stop: threading.Event | None = None) -> Forecast:
    """Predict what a run is going to take, without touching its folder.

    Parameters
    ----------
    settings : Settings
        Of the run.
    pilot : int, optional
        Units to try, from the first on, in a folder of their own beside the run's, which is removed at the end;
        0 for none. By default one for each worker, but 2 to 8.
    stop : threading.Event, optional
        Set from elsewhere, it ends this as Ctrl-C does.

    Returns
    -------
    Forecast
        With ``fits`` telling whether the disk has room.

    Raises
    ------
    ValueError
        A unit does not fit the workers' memory, or what :func:`stillframe.run` would refuse.
    RunStopped
        Not one frame of the pilot got a shift.
    """
    check_folder(settings)
    source = open_source(settings.frames, missing_chunks=settings.missing_chunks)
    reference, _ = prepare_reference(settings, source)
    check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
    with executor(settings, None, stop or threading.Event(), _home(settings.out)) as workers:
        plan = prepare_plan(settings, source, unit_budget(workers))
        count = min(max(2, workers.workers), _MOST) if pilot is None else pilot
        tried = _try(settings, source, reference, plan, workers, count) if count else []
        return _sum_up(settings, source, plan, workers, tried, _left(settings, source, reference, plan))


def _try(
    settings: Settings, source: FrameSource, reference: Reference, plan: Plan, workers: Executor, count: int
) -> Sequence[UnitRecord]:
    """Do the first units for real, in a folder of their own on the same file system; return all their records."""
    frames = min(count * plan.unit_frames, plan.frames)
    with tempfile.TemporaryDirectory(prefix=".stillframe-plan-", dir=_home(settings.out)) as folder:
        aside = settings.model_copy(update={"out": Path(folder)})
        part, few = replace(source, limit=frames), replace(plan, frames=frames)
        result = run_once(part, few, aside, reference, None, workers)
        if not result.good:
            raise RunStopped(f"the pilot of {few.frames} frames failed, and so would the run: {result.problems[0]}")
        ledger = Ledger(Path(folder))
        return [*ledger.records("register"), *ledger.records("align")]


def _left(settings: Settings, source: FrameSource, reference: Reference, plan: Plan) -> int:
    """Count the units that are not finished, or not with these settings."""
    marker, ledger = marker_of(settings, source, reference, plan, Claim(settings.out, "")), Ledger(settings.out)
    if not ledger.numbers("align" if settings.align else "register"):
        return len(plan.units)
    return sum(not is_done(ledger, unit, marker, align=settings.align) for unit in plan.units)


def _home(out: Path) -> Path:
    """Return the folder nearest to the run's own that is there already."""
    return next(folder for folder in out.parents if folder.is_dir())


def _sum_up(
    settings: Settings, source: FrameSource, plan: Plan, workers: Executor, tried: Sequence[UnitRecord], left: int
) -> Forecast:
    itemsize = output_dtype(source.dtype, settings.interpolation).itemsize
    frames = min(plan.frames, left * plan.unit_frames)
    most = frames * math.prod(source.shape[1:]) * itemsize * settings.align
    units = len({record.unit for record in tried})
    written = sum(seal.size for record in tried for seal in record.files.values())
    seconds = sum(record.seconds for record in tried)
    return Forecast(
        plan=plan,
        left=left,
        workers=workers.workers,
        memory=process_memory(unit_memory(source.layout, plan.unit_frames, itemsize, settings.max_shift)),
        allowed=workers.memory,
        reading=frames * source.layout.frame_bytes * plan.decodes,
        disk=round(written * left / units) if units else most,
        free=shutil.disk_usage(_home(settings.out)).free,
        pilot=units,
        seconds=seconds / units * left / min(workers.workers, max(left, 1)) if units else None,
    )
