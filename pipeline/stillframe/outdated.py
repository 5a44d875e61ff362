"""What an earlier run in the same folder left: what of it still holds, what does not, and why, in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from stillframe.marks import Marker
from stillframe.match import Matches
from stillframe.records import STAGES, Ledger, Mark, Stage, UnitRecord, changes, fits
from stillframe.tasks import moves_of
from stillframe.units import Unit, first_few


@dataclass(frozen=True)
class Outdated:
    """A record that no longer holds."""

    stage: Stage
    """What was made."""
    unit: int
    """Number of the unit."""
    frames: str
    """The unit in words."""
    why: str
    """What is different now."""
    changed: bool
    """Whether something was changed since, and not just could not be done then."""


@dataclass(frozen=True)
class Left:
    """What earlier runs left of a unit."""

    unit: Unit
    """Which one."""
    matches: Matches | None
    """Its matches, where its registration holds."""
    aligned: bool
    """Whether its aligned frames hold too."""
    outdated: list[Outdated]
    """Its records that no longer hold."""


def what_is_left(ledger: Ledger, unit: Unit, marker: Marker) -> Left:
    """Judge what there is of a unit; an alignment waits for its registration to hold."""
    registered, found = _judge(ledger, "register", unit, marker.register(unit))
    mark = marker.align(unit, moves_of(registered)) if registered else None
    aligned, more = _judge(ledger, "align", unit, mark)
    matches = registered.to_matches() if registered else None
    return Left(unit, matches, aligned is not None, [*found, *more])


def _judge(ledger: Ledger, stage: Stage, unit: Unit, mark: Mark | None) -> tuple[UnitRecord | None, list[Outdated]]:
    """Return the record if it holds, or what is wrong with it, if there is one."""
    record = ledger.read(stage, unit.number)
    if record is None and ledger.path(stage, unit.number).exists():
        return None, [Outdated(stage, unit.number, str(unit), "the record is damaged", changed=True)]
    if record is None or mark is None:
        return None, []
    if ledger.holds(record, unit, mark):
        return record, []
    return None, [Outdated(stage, unit.number, str(unit), *_why(record, unit, mark))]


def surplus(ledger: Ledger, units: Sequence[Unit]) -> list[Outdated]:
    """Find the records of units that there are no more."""
    known = {unit.number for unit in units}
    return [
        Outdated(stage, number, f"unit {number}", "there are fewer units now", changed=True)
        for stage in STAGES
        for number in ledger.numbers(stage)
        if number not in known
    ]


def _why(record: UnitRecord, unit: Unit, mark: Mark) -> tuple[str, bool]:
    if not record.fingerprint or (record.problems and fits(record, unit, mark)):
        return "something could not be done then, and is tried again", False
    if fits(record, unit, mark):
        return "the files are not as they were recorded", True
    return ", ".join(changes(record, mark)), True


def holds_aligned(ledger: Ledger, unit: Unit, marker: Marker) -> bool:
    """Tell whether a unit's aligned frames are there, as they would be made now."""
    registered = _as_told(ledger, unit, marker.register(unit))
    if registered is None or registered.matches is None:
        return False
    mark = marker.align(unit, moves_of(registered))
    return ledger.finished("align", unit, mark, registered.problems) is not None


def is_done(ledger: Ledger, unit: Unit, marker: Marker, *, align: bool) -> bool:
    """Tell whether all that is asked for of a unit is there, as it would be made now."""
    if align:
        return holds_aligned(ledger, unit, marker)
    return _as_told(ledger, unit, marker.register(unit)) is not None


def _as_told(ledger: Ledger, unit: Unit, mark: Mark) -> UnitRecord | None:
    """Return the record of a registration if it holds, whatever could not be read."""
    record = ledger.read("register", unit.number)
    return record if record and ledger.holds(record, unit, mark, record.problems) else None


def in_words(found: Sequence[Outdated]) -> Iterator[tuple[str, bool]]:
    """Tell what is out of date and why, one line a reason, and whether it was changed."""

    def reason(one: Outdated) -> tuple[str, str, bool]:
        return one.stage, one.why, one.changed

    for (stage, why, changed), group in groupby(sorted(found, key=reason), reason):
        ranges = [one.frames for one in group]
        units = "1 unit is" if len(ranges) == 1 else f"{len(ranges)} units are"
        yield f"{stage}: {units} done again ({first_few(ranges)}): {why}", changed
