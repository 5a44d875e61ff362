"""The table of all units of a run: how far each is, filled once from the records and then from what tasks return.

Run, parts, gather, forecast, status and verify all ask this table, so that no record is read twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stillframe.partition import Plan, Unit
from stillframe.registration.matches import Matches
from stillframe.storage.checksums import Checksum, digest_of
from stillframe.workflow.ledger import Ledger, UnitRecord, UnitRecords, corrupt
from stillframe.workflow.run_folder import STAGES, Stage
from stillframe.workflow.staleness import (
    Dependencies,
    Redone,
    Shifts,
    StageState,
    State,
    UnitState,
    as_aligned,
    as_registered,
    shifts_of,
    to_redo,
    unit_state,
)

if TYPE_CHECKING:  # Imported here: it loads numba and zarr, which `status` does not need.
    from stillframe.workflow.begin import RunDependencies

_AT_ONCE = 8
"""Threads that read records: on a shared file system each read waits for the network."""
_BATCH = 64
"""Units that a thread takes at a time."""


@dataclass(frozen=True)
class UnitRow:
    """One unit in the table."""

    state: UnitState
    """How far both stages are."""
    register_problems: tuple[str, ...] = ()
    """Frames that could not be read, or why its registration failed."""
    align_problems: tuple[str, ...] = ()
    """Those of its alignment."""
    files: dict[str, Checksum] = field(default_factory=dict)
    """Files of its aligned frames as recorded, whether they are valid or not."""
    applied: str = ""
    """Digest of the shifts with which these were made."""
    dependencies: Dependencies | None = None
    """What its registration depends on now."""
    reference: str = ""
    """Hash of the reference with which it was registered."""
    seconds: float = 0.0
    """Time that both stages took."""


@dataclass(eq=False)
class UnitTable:
    """How far each unit of a run is; changed only by what tasks return."""

    plan: Plan
    """How the stack is cut into units."""
    rows: dict[int, UnitRow]
    """By number of the unit; only units that were asked for."""
    matches: Matches
    """Of all frames (frame,); corrupt where nothing valid is recorded."""
    redone: list[Redone] = field(default_factory=list)
    """Records that no longer hold."""
    gone: list[str] = field(default_factory=list)
    """Input files that vanished after what is finished was made of them."""

    @classmethod
    def read(
        cls,
        ledger: Ledger,
        plan: Plan,
        units: Sequence[Unit],
        dependencies: "RunDependencies | None" = None,
        *,
        align: bool = True,
    ) -> "UnitTable":
        """Read each record of some units once, and judge it.

        Parameters
        ----------
        ledger : Ledger
            The records.
        plan : Plan
            How the stack is cut into units now.
        units : sequence of Unit
            Those to read.
        dependencies : RunDependencies, optional
            What results would depend on now. Without it, records are only compared with each other.
        align : bool
            Whether aligned frames must be as they would be made now; else only of the recorded shifts.
        """
        table = cls(plan, {}, corrupt(plan.frames))
        listing = ledger.listing()
        alignment = dependencies.alignment if dependencies and align else None

        def judge(batch: Sequence[Unit]) -> None:
            for unit in batch:
                records = ledger.records_of(unit.number, listing)
                now, gone = dependencies.of_unit(unit, records.register) if dependencies else (None, [])
                state = unit_state(unit, records, ledger.has_files, now, alignment)
                table.gone += gone
                table._enter(unit, records, state, now)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(judge, (units[first : first + _BATCH] for first in range(0, len(units), _BATCH))):
                pass
        table.redone = [one for unit in units for one in to_redo(unit, table.state(unit))]
        return table

    def _enter(self, unit: Unit, records: UnitRecords, state: UnitState, now: Dependencies | None) -> None:
        """Enter a unit as its records are on disk."""
        registered, aligned = records.register, records.align
        if registered and state.register.has_result:
            self.matches[unit.start : unit.stop] = registered.to_matches()
        self.rows[unit.number] = UnitRow(
            state,
            register_problems=tuple(registered.problems) if registered else (),
            align_problems=tuple(aligned.problems) if aligned else (),
            files=aligned.files if aligned else {},
            applied=aligned.facts.get("shifts", "") if aligned else "",
            dependencies=now,
            reference=registered.facts.get("reference", "") if registered else "",
            seconds=sum(record.seconds for record in (registered, aligned) if record),
        )

    def state(self, unit: Unit) -> UnitState:
        """Return how far a unit is."""
        return self.rows[unit.number].state

    def shifts(self, unit: Unit) -> Shifts:
        """Return the shifts of a unit (frame, 2), pixels; NaN where there are none."""
        return shifts_of(self.matches[unit.start : unit.stop])

    def to_register(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Dependencies]]:
        """Yield the units whose registration is to be done."""
        for unit in units:
            row = self.rows[unit.number]
            if row.state.register.state is not State.DONE and row.dependencies:
                yield unit, row.dependencies

    def to_align(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Dependencies, Shifts]]:
        """Yield the registered units whose aligned frames are to be made."""
        for unit in units:
            row = self.rows[unit.number]
            if row.state.register.has_result and not row.state.align.has_result and row.dependencies:
                yield unit, row.dependencies, self.shifts(unit)

    def undone(self, units: Iterable[Unit], *, align: bool, failed: bool = True) -> list[Unit]:
        """Return the units without a result that holds; ``failed`` ones, which a run has tried, only if asked for."""

        def done(state: UnitState) -> bool:
            tried = not failed and State.FAILED in (state.register.state, state.align.state)
            return tried or (state.register.has_result and (state.align.has_result or not align))

        return [unit for unit in units if not done(self.state(unit))]

    def enter(self, unit: Unit, records: Iterable[UnitRecord]) -> None:
        """Enter the records that a task returned of a unit, the registration first."""
        for record in records:
            row, problems = self.rows[unit.number], tuple(record.problems)
            row = replace(row, seconds=row.seconds + record.seconds)
            if record.stage == "register":
                self.matches[unit.start : unit.stop] = record.to_matches()
                state = UnitState(as_registered(record), StageState(State.MISSING))
                row = replace(row, state=state, register_problems=problems, align_problems=())
            else:
                state = row.state._replace(align=as_aligned(record, row.register_problems))
                applied = record.facts.get("shifts", "")
                row = replace(row, state=state, align_problems=problems, files=record.files, applied=applied)
            self.rows[unit.number] = row

    def take(self, other: "UnitTable", unit: Unit) -> None:
        """Copy the row and the matches of a unit from another table of the same plan."""
        self.rows[unit.number] = other.rows[unit.number]
        self.matches[unit.start : unit.stop] = other.matches[unit.start : unit.stop]

    def withdraw(self, stage: Stage, unit: Unit) -> None:
        """Enter that the record of a stage was withdrawn."""
        row, missing = self.rows[unit.number], StageState(State.MISSING)
        if stage == "register":
            self.matches[unit.start : unit.stop] = corrupt(unit.stop - unit.start)
            row = replace(row, state=row.state._replace(register=missing), register_problems=())
        else:
            row = replace(row, state=row.state._replace(align=missing), align_problems=())
        self.rows[unit.number] = row

    def fail(self, stage: Stage, unit: Unit, problem: str) -> None:
        """Enter a unit that failed just now."""
        row, failed = self.rows[unit.number], StageState(State.FAILED, problem)
        if stage == "register":
            self.matches[unit.start : unit.stop] = corrupt(unit.stop - unit.start)
            self.rows[unit.number] = UnitRow(UnitState(failed, StageState(State.MISSING)), register_problems=(problem,))
        else:
            state = row.state._replace(align=failed)
            self.rows[unit.number] = replace(row, state=state, align_problems=(problem,), files={})

    def forget_aligned(self) -> None:
        """Enter that all aligned frames are gone."""
        for number, row in self.rows.items():
            state = row.state._replace(align=StageState(State.MISSING))
            self.rows[number] = replace(row, state=state, files={}, applied="")

    def problems(self, units: Iterable[Unit], *, align: bool = True) -> list[str]:
        """Return the problems of some units, each once; those of the alignment only if asked for."""
        rows = (self.rows[unit.number] for unit in units)
        every = ((*row.register_problems, *(row.align_problems if align else ())) for row in rows)
        return list(dict.fromkeys(problem for problems in every for problem in problems))

    def is_applied(self, unit: Unit) -> bool:
        """Return True if a unit's aligned frames were made with the shifts recorded now, in whatever way."""
        return self.rows[unit.number].applied == digest_of(self.shifts(unit))


def surplus(ledger: Ledger, plan: Plan) -> list[Redone]:
    """Return the records of units that do not exist any more.

    Raises
    ------
    OtherVersion
        Another version of this package wrote one of them.
    """
    count, listing = len(plan.units), ledger.listing()
    beyond = [(stage, number) for stage in STAGES for number in sorted(listing[stage]) if number >= count]
    for stage, number in beyond:
        ledger.read(stage, number)  # refuses another version
    why = StageState(State.OUTDATED, "there are fewer units now")
    return [Redone(stage, number, f"unit {number}", why) for stage, number in beyond]
