"""Predict what a run is going to take: memory, tasks, bytes, disk and, from a pilot of a few units, time."""

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe.cluster.connect import executor
from stillframe.cluster.executors import Executor, process_memory, unit_budget
from stillframe.errors import RunStopped
from stillframe.images.resample import output_dtype
from stillframe.partition import Plan, unit_memory
from stillframe.settings import Settings
from stillframe.workflow.begin import RunInputs, begin, check_folder, cut
from stillframe.workflow.driver import driving
from stillframe.workflow.ledger import Ledger
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.stages import Pass
from stillframe.workflow.unit_table import UnitRow, UnitTable

_MOST = 8
"""Units of a pilot, at most, where no number is given."""
_SPARE = 1.1
"""Free disk space to have, relative to what is expected."""


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
    """Bytes that the aligned frames still need: estimated from the pilot, or the most they can be."""
    free: int
    """Bytes that are free where they go."""
    pilot: int
    """Units that were tried."""
    seconds: float | None
    """Time that the run takes, estimated from the pilot."""

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
        Its ``fits`` is True if the disk has room.

    Raises
    ------
    ValueError
        A unit does not fit the workers' memory, or what :func:`stillframe.run` would refuse.
    RunStopped
        Not one frame of the pilot got a shift.
    """
    check_folder(settings)
    inputs = begin(settings)
    with executor(settings, None, stop or threading.Event(), _home(settings.out)) as workers:
        plan = cut(settings, inputs.source, unit_budget(workers))
        count = min(max(2, workers.workers), _MOST) if pilot is None else pilot
        tried = _try(inputs, plan, workers, count) if count else []
        return _sum_up(inputs, plan, workers, tried, _left(inputs, plan))


def _try(inputs: RunInputs, plan: Plan, workers: Executor, count: int) -> Sequence[UnitRow]:
    """Process the first units in a temporary folder on the same file system; return their rows of the unit table."""
    frames, out = min(count * plan.unit_frames, plan.frames), inputs.settings.out
    with tempfile.TemporaryDirectory(prefix=".stillframe-plan-", dir=_home(out)) as folder:
        aside = inputs.settings.model_copy(update={"out": Path(folder)})
        few = replace(inputs, settings=aside, source=replace(inputs.source, limit=frames), origin=None)
        with driving(few.folder) as held:
            pilot = Pass(few, replace(plan, frames=frames), workers, held)
            result = pilot.run()
        if not result.good:
            raise RunStopped(f"the pilot of {frames} frames failed, and so would the run: {result.problems[0]}")
        return list(pilot.table.rows.values())


def _left(inputs: RunInputs, plan: Plan) -> int:
    """Count the units that are not finished, or not with these settings."""
    align, ledger = inputs.settings.align, Ledger(RunFolder(inputs.settings.out))
    table = UnitTable.read(ledger, plan, plan.units, inputs.dependencies(plan), align=align)
    return len(table.undone(plan.units, align=align))


def _home(out: Path) -> Path:
    """Return the nearest folder above the run's own that exists."""
    return next(folder for folder in out.parents if folder.is_dir())


def _sum_up(inputs: RunInputs, plan: Plan, workers: Executor, tried: Sequence[UnitRow], left: int) -> Forecast:
    settings, source = inputs.settings, inputs.source
    itemsize = output_dtype(source.dtype, settings.interpolation).itemsize
    frames = min(plan.frames, left * plan.unit_frames)
    most = frames * math.prod(source.shape[1:]) * itemsize * settings.align
    memory = unit_memory(
        source.layout,
        plan.unit_frames,
        itemsize,
        settings.max_shift,
        corrected=inputs.reference.corrections is not None,
    )
    units = len(tried)
    written = sum(one.size for row in tried for one in row.files.values())
    seconds = sum(row.seconds for row in tried)
    return Forecast(
        plan=plan,
        left=left,
        workers=workers.workers,
        memory=process_memory(memory),
        allowed=workers.memory,
        reading=frames * source.layout.frame_bytes * plan.decodes,
        disk=round(written * left / units) if units else most,
        free=shutil.disk_usage(_home(settings.out)).free,
        pilot=units,
        seconds=seconds / units * left / min(workers.workers, max(left, 1)) if units else None,
    )
