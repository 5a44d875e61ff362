"""What of an earlier run in the same folder no longer holds, and why, in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from stillframe.marks import Marker
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


def outdated(ledger: Ledger, units: Sequence[Unit], marker: Marker) -> list[Outdated]:
    """Find every record that no longer holds; an alignment waits for its registration to be judged."""
    known = {unit.number: unit for unit in units}
    return [
        found
        for stage in STAGES
        for number in ledger.numbers(stage)
        if (found := _judge(ledger, stage, number, known.get(number), marker))
    ]


def _judge(ledger: Ledger, stage: Stage, number: int, unit: Unit | None, marker: Marker) -> Outdated | None:
    record = ledger.read(stage, number)
    if unit is None:
        return Outdated(stage, number, f"unit {number}", "there are fewer units now", changed=True)
    if record is None:
        return Outdated(stage, number, str(unit), "the record is damaged", changed=True)
    mark = _mark(ledger, stage, unit, marker)
    if mark is None or ledger.holds(record, unit, mark):
        return None
    return Outdated(stage, number, str(unit), *_why(record, unit, mark))


def _mark(ledger: Ledger, stage: Stage, unit: Unit, marker: Marker) -> Mark | None:
    """Return what a result should depend on; None for an alignment whose shifts are not known yet."""
    mark = marker.register(unit)
    if stage == "register":
        return mark
    registered = ledger.finished("register", unit, mark)
    return marker.align(unit, moves_of(registered)) if registered else None


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
