"""How far a run is, read from its folder alone, from any shell and at any moment."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillframe.flags import Flag
from stillframe.partition import Plan
from stillframe.wording import duration
from stillframe.workflow.lease import Holder, read_leases
from stillframe.workflow.ledger import Ledger, plan_of
from stillframe.workflow.run_folder import STAGES, RunDescription, RunFolder, Stage
from stillframe.workflow.unit_table import UnitTable

_RECENT = 50
"""Units from whose times the rate is computed."""


@dataclass(frozen=True)
class StageStatus:
    """How far one stage is."""

    stage: Stage
    """Name."""
    done: int
    """Frames that are finished."""
    total: int
    """All frames."""
    rate: float | None
    """Frames per second over the last units, if there are enough."""

    @property
    def left(self) -> str:
        """Time left, in words."""
        if self.done == self.total:
            return "finished"
        return f"{duration((self.total - self.done) / self.rate)} left" if self.rate else "unknown"


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    stages: list[StageStatus]
    """Those that the run asks for."""
    flags: Counter[str]
    """Frames with each flag, and good ones, among those registered so far."""
    problems: list[str]
    """What could not be read or done."""
    drivers: list[Holder]
    """Processes that work on it now."""

    @property
    def finished(self) -> bool:
        """Whether all frames are done."""
        return all(stage.done == stage.total for stage in self.stages)


def read_status(folder: Path) -> Status:
    """Return how far a run is.

    Raises
    ------
    ValueError
        The folder holds no run.
    """
    run_folder = RunFolder(folder)
    description = RunDescription.read(run_folder.description)
    plan = plan_of(run_folder)
    table = UnitTable.read(Ledger(run_folder), plan, plan.units)
    stages = STAGES if description is None or description.aligns else STAGES[:1]
    done = [_stage_status(run_folder, stage, table, plan) for stage in stages]
    return Status(done, _flag_counts(table, plan), table.problems(plan.units), read_leases(run_folder))


def _stage_status(folder: RunFolder, stage: Stage, table: UnitTable, plan: Plan) -> StageStatus:
    finished = [unit for unit in plan.units if getattr(table.state(unit), stage).has_result]
    sizes = {unit.number: unit.stop - unit.start for unit in finished}
    return StageStatus(stage, sum(sizes.values()), plan.frames, _recent_rate(folder.records(stage), sizes))


def _recent_rate(records: Path, sizes: dict[int, int]) -> float | None:
    """Return the frames per second over the last units, from the times of their records."""
    try:
        with os.scandir(records) as entries:
            times = [(entry.stat().st_mtime, int(entry.name[:-5])) for entry in entries if entry.name[:-5].isdecimal()]
    except OSError:  # a record may just have been withdrawn
        return None
    last = sorted((time, sizes[number]) for time, number in times if number in sizes)[-_RECENT:]
    if len(last) < 2 or last[-1][0] <= last[0][0]:
        return None
    return sum(frames for _, frames in last[1:]) / (last[-1][0] - last[0][0])


def _flag_counts(table: UnitTable, plan: Plan) -> Counter[str]:
    """Count the frames under each flag among those registered so far."""
    registered = [unit for unit in plan.units if table.state(unit).register.has_result]
    values = np.concatenate(
        [table.matches["flag"][unit.start : unit.stop] for unit in registered] or [np.zeros(0, int)]
    )
    counts = Counter({str(flag.name).lower(): int(np.count_nonzero(values & flag.value)) for flag in Flag})
    return counts + Counter(good=int(np.count_nonzero(values == 0)))
