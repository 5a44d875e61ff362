"""What a unit's results depend on, and :func:`unit_state`, which says whether a unit is done, and if not, why.

A result is valid while the fingerprint of its dependencies (input files, reference, settings of its stage, kernel) is
the one that would be computed now, and its files are as recorded. A change redoes just the stages that depend on it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stillframe.options import Interpolation
from stillframe.partition import Unit
from stillframe.registration.matches import Matches
from stillframe.storage.checksums import digest_of, fingerprint
from stillframe.wording import first_few
from stillframe.workflow.ledger import FileIdentities, UnitRecord, UnitRecords
from stillframe.workflow.run_folder import STAGES, Stage

Shifts = npt.NDArray[np.float64]
"""Shifts (frame, 2) of a unit, pixels."""

INPUT_FILES = "input files"
_SHORT = 24
"""Characters of a dependency whose value is worth showing; longer ones are hashes."""
_RETRIED = "something could not be done then, and is tried again"


def shifts_of(matches: Matches) -> Shifts:
    """Return the shifts of matches, (frame, 2)."""
    return np.stack([matches["dy"], matches["dx"]], axis=1)


@dataclass(frozen=True)
class Alignment:
    """The settings of the align stage."""

    interpolation: Interpolation
    """How frames are moved."""
    fill: float
    """Value where nothing was observed."""
    unit_frames: int
    """Frames of a whole shard."""

    @property
    def facts(self) -> dict[str, str]:
        """These settings by name, as records hold them."""
        fill, size = repr(self.fill), str(self.unit_frames)
        return {"interpolation": self.interpolation, "fill": fill, "unit_frames": size}


@dataclass(frozen=True)
class Dependencies:
    """What one result depends on."""

    facts: dict[str, str]
    """Each dependency by a name that people understand: its value, or a hash of it."""
    inputs: FileIdentities = field(default_factory=list)
    """The input files, where they are not too many to list."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all dependencies."""
        return fingerprint(self.facts)

    def with_alignment(self, alignment: Alignment, shifts: Shifts) -> "Dependencies":
        """Return what aligned frames depend on: everything that their shifts do, these shifts, and more settings."""
        return Dependencies(self.facts | alignment.facts | {"shifts": digest_of(shifts)}, self.inputs)


class State(Enum):
    """How far one stage of one unit is."""

    DONE = "done"
    """The result is there, as it would be made now."""
    PARTIAL = "done, except for frames that could not be read"
    """As done, and tried again by the next run."""
    FAILED = "failed"
    """A run tried, and there is no result."""
    MISSING = "not done yet"
    """There is no record."""
    WAITING = "waiting"
    """The alignment cannot be judged before the registration is done."""
    OUTDATED = "outdated"
    """A dependency changed since."""
    ALTERED = "altered"
    """The record or a file that it lists is not as it was written."""


class StageState(NamedTuple):
    """How far one stage of one unit is, and why."""

    state: State
    reason: str = ""
    """In words, where the result is not valid."""

    @property
    def has_result(self) -> bool:
        """Whether there is a result that holds."""
        return self.state in (State.DONE, State.PARTIAL)

    @property
    def has_record(self) -> bool:
        """Whether there is a record that must be withdrawn before the stage is done again."""
        return self.state not in (State.DONE, State.MISSING, State.WAITING)

    @property
    def changed(self) -> bool:
        """Whether something was changed since, rather than could not be done then."""
        return self.state in (State.OUTDATED, State.ALTERED)


class UnitState(NamedTuple):
    """How far both stages of a unit are."""

    register: StageState
    align: StageState


def unit_state(
    unit: Unit,
    records: UnitRecords,
    has_files: Callable[[UnitRecord], bool],
    dependencies: Dependencies | None = None,
    alignment: Alignment | None = None,
) -> UnitState:
    """Judge from its records whether a unit is done, and if not, why.

    Parameters
    ----------
    unit : Unit
        The unit as it would be cut now.
    records : UnitRecords
        What is on disk.
    has_files : callable
        Whether the files that a record lists are there, with their sizes.
    dependencies, alignment : optional
        What the results would depend on now. Without them, records are only compared with each other, which needs
        neither the frames nor the reference.
    """
    registered = _registered(unit, records, dependencies)
    if not registered.has_result or records.register is None:
        return UnitState(registered, _without_registration(records))
    shifts = shifts_of(records.register.to_matches())
    now = dependencies.with_alignment(alignment, shifts) if dependencies and alignment else None
    return UnitState(registered, _aligned(unit, records, has_files, shifts, now))


def _registered(unit: Unit, records: UnitRecords, now: Dependencies | None) -> StageState:
    record = records.register
    if "register" in records.damaged:
        return StageState(State.ALTERED, "the record is damaged")
    if record is None:
        return StageState(State.MISSING)
    return _unlike(unit, record, now) or as_registered(record)


def _aligned(
    unit: Unit,
    records: UnitRecords,
    has_files: Callable[[UnitRecord], bool],
    shifts: Shifts,
    now: Dependencies | None,
) -> StageState:
    record, registered = records.align, records.register
    if record is None or registered is None:
        return _without_registration(records) if records.damaged else StageState(State.MISSING)
    if unlike := _unlike(unit, record, now):
        return unlike
    if record.facts.get("shifts") != digest_of(shifts):
        return StageState(State.OUTDATED, "aligned with other shifts than those recorded")
    if not has_files(record):
        return StageState(State.ALTERED, "the files are not as they were recorded")
    return as_aligned(record, registered.problems)


def _without_registration(records: UnitRecords) -> StageState:
    """Judge an alignment whose registration is to be done first."""
    if "align" in records.damaged:
        return StageState(State.ALTERED, "the record is damaged")
    if records.align is None:
        return StageState(State.MISSING)
    return StageState(State.FAILED, _RETRIED) if records.align.failed else StageState(State.WAITING)


def _unlike(unit: Unit, record: UnitRecord, now: Dependencies | None) -> StageState | None:
    """Return why a record is no result of this unit with these dependencies; None if it is."""
    if record.failed:
        return StageState(State.FAILED, _RETRIED)
    if now is not None and record.fingerprint != now.fingerprint:
        return StageState(State.OUTDATED, ", ".join(changes(record, now)))
    if (record.start, record.stop) != (unit.start, unit.stop):
        return StageState(State.OUTDATED, "the units are cut otherwise")
    return None


def as_registered(record: UnitRecord) -> StageState:
    """Return the state of a registration whose record is valid."""
    return StageState(State.PARTIAL, _RETRIED) if record.problems else StageState(State.DONE)


def as_aligned(record: UnitRecord, register_problems: Sequence[str]) -> StageState:
    """Return the state of an alignment whose record is valid: failed, if frames with a shift could not be read."""
    if not record.problems:
        return StageState(State.DONE)
    explained = record.problems == list(register_problems)
    return StageState(State.PARTIAL if explained else State.FAILED, _RETRIED)


def changes(record: UnitRecord, now: Dependencies) -> list[str]:
    """Name the dependencies of a result that are different now, input files one by one.

    Examples
    --------
    >>> before = {"mask": "a" * 64, "fill": "0"}
    >>> record = UnitRecord(stage="align", unit=0, start=0, stop=4, fingerprint="x", facts=before)
    >>> changes(record, Dependencies({"mask": "b" * 64, "fill": "0"}))
    ['mask']
    """
    names = [name for name in now.facts | record.facts if record.facts.get(name) != now.facts.get(name)]
    return [f"{name}{_details(name, record, now)}" for name in names]


def _details(name: str, record: UnitRecord, now: Dependencies) -> str:
    if name == INPUT_FILES:
        return _changed_files(record.inputs, now.inputs)
    before, after = record.facts.get(name, ""), now.facts.get(name, "")
    return f" ({before or 'none'} → {after or 'none'})" if max(len(before), len(after)) <= _SHORT else ""


def _changed_files(before: FileIdentities, now: FileIdentities) -> str:
    """Name the first files that were changed, added, or removed."""
    if not before or not now:
        return ""
    old, new = ({name: rest for name, *rest in files} for files in (before, now))
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return f" ({first_few(names)})"


class Redone(NamedTuple):
    """A record that is withdrawn because its stage is done again."""

    stage: Stage
    unit: int
    """Number of the unit."""
    frames: str
    """Frames of the unit, in words."""
    why: StageState


def to_redo(unit: Unit, state: UnitState) -> Iterator[Redone]:
    """Yield the records of a unit that no longer hold."""
    for stage, one in zip(STAGES, state, strict=True):
        if one.has_record:
            yield Redone(stage, unit.number, str(unit), one)


def explain(redone: Sequence[Redone]) -> Iterator[tuple[str, bool]]:
    """Yield what is done again and why, one line a reason, and whether it was changed since."""

    def reason(one: Redone) -> tuple[str, str, bool]:
        return one.stage, one.why.reason, one.why.changed

    for (stage, why, changed), group in groupby(sorted(redone, key=reason), reason):
        ranges = [one.frames for one in group]
        units = "1 unit is" if len(ranges) == 1 else f"{len(ranges)} units are"
        yield f"{stage}: {units} done again ({first_few(ranges)}): {why}", changed
