"""What an earlier run in the same folder left: what of it still holds, what does not, and why, in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from stillframe.durable import digest_of
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


@dataclass(frozen=True, eq=False)
class Standing:
    """What earlier runs made of a unit."""

    unit: Unit
    """Which one."""
    matches: Matches | None
    """Its matches, where its registration holds."""
    aligned: bool
    """Whether its aligned frames hold too."""
    outdated: list[Outdated]
    """Its records that no longer hold."""


def standings(ledger: Ledger, units: Sequence[Unit], marker: Marker) -> Iterator[Standing]:
    """Look at each unit's records, once; only at those that are listed, as each look may be a journey."""
    listed = {stage: set(ledger.numbers(stage)) for stage in STAGES}
    for unit in units:
        yield _standing(ledger, unit, marker, [stage for stage in STAGES if unit.number in listed[stage]])


def _standing(ledger: Ledger, unit: Unit, marker: Marker, listed: Sequence[Stage]) -> Standing:
    """Judge a unit's records; an alignment waits for its registration to hold."""
    judged = _judge(ledger, "register", unit, marker.register(unit)) if "register" in listed else None
    registered = judged if isinstance(judged, UnitRecord) else None
    mark = marker.align(unit, moves_of(registered)) if registered and "align" in listed else None
    aligned = _judge(ledger, "align", unit, mark) if "align" in listed else None
    matches = registered.to_matches() if registered else None
    old = [one for one in (judged, aligned) if isinstance(one, Outdated)]
    return Standing(unit, matches, isinstance(aligned, UnitRecord), old)


def _judge(ledger: Ledger, stage: Stage, unit: Unit, mark: Mark | None) -> UnitRecord | Outdated | None:
    """Return the record if it holds, or why it does not; None if that cannot be told yet, for want of a mark."""
    record = ledger.read(stage, unit.number)
    if record is None:
        return Outdated(stage, unit.number, str(unit), "the record is damaged", changed=True)
    if mark is None:
        return None
    if ledger.holds(record, unit, mark):
        return record
    return Outdated(stage, unit.number, str(unit), *_why(record, unit, mark))


def surplus(ledger: Ledger, units: Sequence[Unit]) -> list[Outdated]:
    """Find the records of units that there are no more.

    Raises
    ------
    ValueError
        A newer version of this package wrote one of them.
    """
    known = {unit.number for unit in units}
    beyond = [(stage, number) for stage in STAGES for number in ledger.numbers(stage) if number not in known]
    for stage, number in beyond:
        ledger.read(stage, number)  # refuses what is newer
    return [
        Outdated(stage, number, f"unit {number}", "there are fewer units now", changed=True) for stage, number in beyond
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


def holds_same_shifts(ledger: Ledger, unit: Unit) -> bool:
    """Tell whether a unit's aligned frames are there, made in whatever way, by the shifts that are recorded now."""
    registered, aligned = (ledger.read(stage, unit.number) for stage in STAGES)
    if registered is None or aligned is None or not aligned.files:
        return False
    return ledger.has_files(aligned) and aligned.shifts == digest_of(moves_of(registered))


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
