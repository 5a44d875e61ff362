"""Unit records: what became of each unit in each stage, published only after everything they speak of is on disk.

A record is ledger entry and durable copy in one. It ends with its own checksum, so that what is read is what was
written, and it holds what its result depends on, part by part, so that a change can be told by name.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar, get_args

import numpy as np
import pydantic

from stillframe.durable import Seal, fingerprint, sync_folder, with_checksum, without_checksum, write_durably
from stillframe.errors import NewerVersion, hopeless
from stillframe.flags import Flag
from stillframe.match import MATCH_DTYPE, Matches, no_match
from stillframe.units import Unit, first_few

Model = TypeVar("Model", bound=pydantic.BaseModel)
Stage = Literal["register", "align"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RECORD_VERSION: Final = 2
_FLAG_VALUES = range(np.iinfo(MATCH_DTYPE["flag"]).max + 1)
MOST_INPUTS = 256
"""Input files of a unit whose names, sizes and times a record keeps one by one."""

Identity = list[tuple[str, int, int | str]]
"""Name, size, and time of change or checksum of files."""


@dataclass(frozen=True)
class Mark:
    """What a unit's result depends on."""

    facts: dict[str, str]
    """Its parts, in words or hashed, by names that people understand."""
    inputs: Identity = field(default_factory=list)
    """The input files, one by one."""
    older: dict[str, Any] = field(default_factory=dict)
    """What records of format 1 hashed for the same."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all of it."""
        return fingerprint(self.facts)

    def for_task(self) -> "Mark":
        """Return what a task needs: its unit's older records, if there are any, are known not to hold."""
        return replace(self, older={})


class UnitRecord(pydantic.BaseModel):
    """What became of one unit in one stage."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format: Literal[1, 2] = RECORD_VERSION
    """Version of this format; 1 had no checksum, facts and inputs."""
    stage: Stage
    """Which of the two."""
    unit: int
    """Number of the unit."""
    start: int
    """First frame."""
    stop: int
    """One past the last frame."""
    fingerprint: str
    """Hash of all that the result depends on; empty where there is no result."""
    facts: dict[str, str] = {}
    """What that is, part by part."""
    inputs: Identity = []
    """The unit's input files, where they are not too many."""
    matches: dict[str, list[float]] | None = None
    """Of the register stage: the kernel's fields."""
    files: dict[str, Seal] = {}
    """Of the align stage: what was written, relative to the run's folder."""
    shifts: str = ""
    """Of the align stage: digest of the shifts that were applied."""
    problems: list[str] = []
    """What could not be read, in words; such a unit is tried again by the next run."""
    seconds: float = 0.0
    """Time the unit took."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Self:
        """Let only records through that a unit of frames can have."""
        if not 0 <= self.start < self.stop:
            raise ValueError(f"frames {self.start} to {self.stop} are no unit")
        if self.matches is not None and not self._has_all_fields(self.matches):
            raise ValueError(f"the matches are not those of {self.stop - self.start} frames")
        return self

    def _has_all_fields(self, matches: dict[str, list[float]]) -> bool:
        lengths = {len(values) for values in matches.values()}
        if matches.keys() != set(MATCH_DTYPE.names or ()) or lengths != {self.stop - self.start}:
            return False
        return all(value in _FLAG_VALUES for value in matches["flag"])

    def to_matches(self) -> Matches:
        """Return the matches as the kernel's structured array; where the unit failed, corrupt frames."""
        if self.matches is None:
            return np.full(self.stop - self.start, np.array(no_match(Flag.CORRUPT), MATCH_DTYPE))
        out = np.empty(self.stop - self.start, MATCH_DTYPE)
        for name in MATCH_DTYPE.names or ():
            out[name] = self.matches[name]
        return out

    def to_bytes(self) -> bytes:
        """Return the record as it is stored."""
        return with_checksum(self.model_dump_json().encode())

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read what :meth:`to_bytes` gave, or an older format.

        Raises
        ------
        ValueError
            No record, or damaged.
        """
        whole, sealed = without_checksum(content)
        record = cls.model_validate_json(whole)
        if record.format > 1 and not sealed:
            raise ValueError("it has no checksum: the file is damaged")
        return record


def from_matches(matches: Matches) -> dict[str, list[float]]:
    """Return the kernel's result as a record holds it, exactly."""
    return {name: matches[name].tolist() for name in MATCH_DTYPE.names or ()}


class Ledger:
    """The unit records of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, stage: Stage, unit: int) -> Path:
        """Where a unit's record lies."""
        return self.folder / "units" / stage / f"{unit:06d}.json"

    def prepare(self) -> None:
        """Make the folders before any worker needs them, and sweep what a killed writer left."""
        for stage in STAGES:
            folder = self.path(stage, 0).parent
            folder.mkdir(parents=True, exist_ok=True)
            for litter in folder.glob(".*.partial"):
                litter.unlink(missing_ok=True)
            sync_folder(folder.parent)
        sync_folder(self.folder)

    def publish(self, record: UnitRecord) -> None:
        """Make a record durable; everything it speaks of must be so already."""
        write_durably(self.path(record.stage, record.unit), record.to_bytes())

    def withdraw(self, stage: Stage, unit: int) -> None:
        """Remove a unit's record before anything it speaks of changes."""
        path = self.path(stage, unit)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def withdraw_all(self, stage: Stage) -> None:
        """Remove the records of all units before all that they speak of is removed."""
        for number in self.numbers(stage):
            self.path(stage, number).unlink(missing_ok=True)
        sync_folder(self.path(stage, 0).parent)

    def read(self, stage: Stage, unit: int) -> UnitRecord | None:
        """Return a unit's record, or None where there is none that is whole.

        Raises
        ------
        ValueError
            It was written by a newer version of this package.
        OSError
            It may not be read.
        """
        path = self.path(stage, unit)
        try:
            content = path.read_bytes()
            record = UnitRecord.from_bytes(content)
        except OSError as error:
            if hopeless(error):
                raise
            return None
        except ValueError:
            refuse_newer(path, content, "format", RECORD_VERSION)
            return None
        return record if (record.stage, record.unit) == (stage, unit) else None

    def finished(self, stage: Stage, unit: Unit, mark: Mark, known: Sequence[str] = ()) -> UnitRecord | None:
        """Return the unit's record if there is one that holds."""
        record = self.read(stage, unit.number)
        return record if record and self.holds(record, unit, mark, known) else None

    def holds(self, record: UnitRecord, unit: Unit, mark: Mark, known: Sequence[str] = ()) -> bool:
        """Tell whether a record holds: same fingerprint, files as recorded, no problem but known ones."""
        return fits(record, unit, mark) and record.problems in ([], list(known)) and self.has_files(record)

    def has_files(self, record: UnitRecord) -> bool:
        """Tell whether the files that a record speaks of are there, by their sizes."""
        return all(_size(self.folder / name) == seal.size for name, seal in record.files.items())

    def failed(self, stage: Stage, unit: Unit, problem: str) -> None:
        """Keep why a unit could not be done, for a look from outside and for the next run."""
        self.publish(
            UnitRecord(
                stage=stage, unit=unit.number, start=unit.start, stop=unit.stop, fingerprint="", problems=[problem]
            )
        )

    def numbers(self, stage: Stage) -> list[int]:
        """Numbers of all records of a stage, in order."""
        names = (path.stem for path in (self.folder / "units" / stage).glob("[0-9]*.json"))
        return sorted(int(name) for name in names if name.isdecimal())

    def records(self, stage: Stage) -> list[UnitRecord]:
        """All records of a stage that are whole, in order."""
        return [record for number in self.numbers(stage) if (record := self.read(stage, number)) is not None]


def fits(record: UnitRecord, unit: Unit, mark: Mark) -> bool:
    """Tell whether a record is of the same frames, made from the same."""
    if (record.start, record.stop) != (unit.start, unit.stop):
        return False
    older = record.format == 1 and bool(mark.older)
    return record.fingerprint == mark.fingerprint or (older and record.fingerprint == fingerprint(mark.older))


def changes(record: UnitRecord, mark: Mark) -> list[str]:
    """Name what a result depended on and is different now, input files one by one.

    Examples
    --------
    >>> before = {"mask": "a" * 64, "fill": "0"}
    >>> record = UnitRecord(stage="align", unit=0, start=0, stop=4, fingerprint="x", facts=before)
    >>> changes(record, Mark({"mask": "b" * 64, "fill": "0"}))
    ['mask']
    """
    if not record.facts:
        return ["an older format" if record.fingerprint else "it failed"]
    before, now = record.facts, mark.facts
    names = [name for name in now | before if before.get(name) != now.get(name)]
    return [f"{name}{_details(name, record, mark)}" for name in names]


def _details(name: str, record: UnitRecord, mark: Mark) -> str:
    if name == INPUT_FILES:
        return _changed_files(record.inputs, mark.inputs)
    before, now = record.facts.get(name, ""), mark.facts.get(name, "")
    return f" ({before or 'none'} → {now or 'none'})" if max(len(before), len(now)) <= _SHORT else ""


INPUT_FILES = "input files"
_SHORT = 24
"""Characters of a fact that is worth showing; longer ones are hashes."""


def _changed_files(before: Identity, now: Identity) -> str:
    """Name up to three files that were changed, came, or vanished."""
    if not before or not now:
        return ""
    old, new = ({name: rest for name, *rest in files} for files in (before, now))
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return f" ({first_few(names)})"


def read_sealed(path: Path, kind: type[Model], newest: int, *, unsealed: int = 0) -> Model | None:
    """Return what a JSON file with a checksum and a version holds; None where there is none that is whole.

    Versions up to ``unsealed`` had no checksum.

    Raises
    ------
    NewerVersion
        Its version is beyond the newest that is known.
    """
    try:
        content = path.read_bytes()
        whole, sealed = without_checksum(content)
        stored = kind.model_validate_json(whole)
    except OSError:
        return None
    except ValueError:
        refuse_newer(path, content, "version", newest)
        return None
    return stored if sealed or getattr(stored, "version", newest) <= unsealed else None


def refuse_newer(path: Path, content: bytes, name: str, known: int) -> None:
    """Raise ``NewerVersion`` if a JSON file tells of a version that this package does not know."""
    try:
        version = json.loads(without_checksum(content)[0])[name]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return
    if isinstance(version, int) and version > known:
        raise NewerVersion(
            f"{path} has {name} {version}, and this stillframe knows up to {known}: a newer one wrote it. "
            "Use that one, or another folder; nothing was changed."
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
