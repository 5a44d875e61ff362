"""Unit records: the result of each unit in each stage, published after everything that they list is on disk.

A record is ledger entry and durable copy of the shifts in one. It ends with its own checksum, and it holds each
dependency of the result by name, so that a later run can say what changed.
"""

import contextlib
import os
from typing import NamedTuple, Self

import numpy as np
import pydantic

from stillframe.errors import hopeless
from stillframe.flags import Flag
from stillframe.partition import Plan, Unit
from stillframe.registration.matches import MATCH_DTYPE, Matches, no_match
from stillframe.storage.checksums import Checksum
from stillframe.storage.durable import sync_folder, write_durably
from stillframe.workflow.run_folder import (
    STAGES,
    Document,
    RunDescription,
    RunFolder,
    Stage,
)

_FLAG_VALUES = range(np.iinfo(MATCH_DTYPE["flag"]).max + 1)
_NAMES = MATCH_DTYPE.names or ()

FileIdentities = list[tuple[str, int, int | str]]
"""Name, size, and time of change or checksum of files."""


class UnitRecord(Document):
    """The result of one unit in one stage."""

    stage: Stage
    """Stage."""
    unit: int
    """Number of the unit."""
    start: int
    """First frame."""
    stop: int
    """One past the last frame."""
    fingerprint: str
    """Hash of all dependencies; empty where the unit failed and there is no result."""
    facts: dict[str, str] = pydantic.Field(default_factory=dict)
    """The dependencies by name: values, or hashes of them."""
    inputs: FileIdentities = pydantic.Field(default_factory=list)
    """Input files of the unit, where they are not too many to list."""
    matches: dict[str, list[float]] | None = None
    """Of the register stage: the fields of the kernel's result."""
    files: dict[str, Checksum] = pydantic.Field(default_factory=dict)
    """Of the align stage: files that were written, by name within the run's folder."""
    problems: list[str] = pydantic.Field(default_factory=list)
    """Input that could not be read, or the reason of a failure, in words; the next run tries the unit again."""
    seconds: float = 0.0
    """Time that the unit took."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Self:
        """Refuse records that no unit of frames can have."""
        if not 0 <= self.start < self.stop:
            raise ValueError(f"frames {self.start} to {self.stop} are no unit")
        if self.matches is not None and not self._has_all_fields(self.matches):
            raise ValueError(f"the matches are not those of {self.stop - self.start} frames")
        return self

    def _has_all_fields(self, matches: dict[str, list[float]]) -> bool:
        if matches.keys() != set(_NAMES) or {*map(len, matches.values())} != {self.stop - self.start}:
            return False
        return all(value in _FLAG_VALUES for value in matches["flag"])

    @property
    def failed(self) -> bool:
        """Whether the unit gave no result."""
        return not self.fingerprint

    def to_matches(self) -> Matches:
        """Return the matches as the kernel's structured array; corrupt frames where the unit failed."""
        if self.matches is None:
            return corrupt(self.stop - self.start)
        out = np.empty(self.stop - self.start, MATCH_DTYPE)
        for name in _NAMES:
            out[name] = self.matches[name]
        return out


def fields_of(matches: Matches) -> dict[str, list[float]]:
    """Return the kernel's result as a record holds it, bit for bit."""
    return {name: matches[name].tolist() for name in _NAMES}


def corrupt(frames: int) -> Matches:
    """Return the matches of frames that could not be read."""
    return np.full(frames, np.array(no_match(Flag.CORRUPT), MATCH_DTYPE))


class UnitRecords(NamedTuple):
    """The records of one unit as they are on disk."""

    register: UnitRecord | None = None
    """Record of the registration; None where there is none that is whole."""
    align: UnitRecord | None = None
    """Record of the alignment; None where there is none that is whole."""
    damaged: tuple[Stage, ...] = ()
    """Stages whose record is there but cannot be read."""


class Ledger:
    """The unit records of a run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folders before any worker needs them, and remove partial files of writers that were killed."""
        for stage in STAGES:
            folder = self.folder.records(stage)
            folder.mkdir(parents=True, exist_ok=True)
            for litter in folder.glob(".*.partial"):
                litter.unlink(missing_ok=True)
            sync_folder(folder.parent)
        sync_folder(self.folder.path)

    def publish(self, record: UnitRecord) -> None:
        """Write a record durably; everything that it lists must be on disk already."""
        write_durably(self.folder.record(record.stage, record.unit), record.to_bytes())

    def withdraw(self, stage: Stage, unit: int) -> None:
        """Remove a unit's record before anything that it lists changes."""
        path = self.folder.record(stage, unit)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def withdraw_all(self, stage: Stage) -> None:
        """Remove the records of all units before everything that they list is removed."""
        for number in self._numbers(stage):
            self.folder.record(stage, number).unlink(missing_ok=True)
        sync_folder(self.folder.records(stage))

    def fail(self, stage: Stage, unit: Unit, problem: str) -> None:
        """Publish why a unit gave no result, for ``status`` and for the next run."""
        number, start, stop = unit.number, unit.start, unit.stop
        self.publish(UnitRecord(stage=stage, unit=number, start=start, stop=stop, fingerprint="", problems=[problem]))

    def listing(self) -> dict[Stage, set[int]]:
        """Return the numbers of the units that have a record, by stage."""
        return {stage: self._numbers(stage) for stage in STAGES}

    def _numbers(self, stage: Stage) -> set[int]:
        try:
            names = os.listdir(self.folder.records(stage))
        except FileNotFoundError:
            return set()
        return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}

    def read(self, stage: Stage, unit: int) -> UnitRecord | None:
        """Return a unit's record, or None where there is none that is whole.

        Raises
        ------
        OtherVersion
            Another version of this package wrote it.
        OSError
            It may not be read.
        """
        path = self.folder.record(stage, unit)
        try:
            content = path.read_bytes()
        except OSError as error:
            if hopeless(error):
                raise
            return None
        record = UnitRecord.parse(path, content)
        return record if record and (record.stage, record.unit) == (stage, unit) else None

    def records_of(self, unit: int, listing: dict[Stage, set[int]]) -> UnitRecords:
        """Return both records of a unit; only files that are listed are read, since each read may cross a network."""
        listed = [stage for stage in STAGES if unit in listing[stage]]
        records = {stage: self.read(stage, unit) for stage in listed}
        return UnitRecords(**records, damaged=tuple(stage for stage in listed if records[stage] is None))

    def has_files(self, record: UnitRecord) -> bool:
        """Return True if the files that a record lists are there, with their sizes."""
        return self.folder.has_files(record.files)


def known_plan(folder: RunFolder, description: RunDescription | None = None) -> Plan | None:
    """Return how the run in a folder cut its stack, from the records where ``run.json`` is damaged.

    None where no run has begun.
    """
    description = description or RunDescription.read(folder.description)
    return description.plan if description else _plan_of_records(Ledger(folder))


def _plan_of_records(ledger: Ledger) -> Plan | None:
    """Put a plan together from the first and the last record; the latter's last frame is the least there are."""
    numbers = sorted(ledger.listing()["register"])
    first, last = (
        next((one for number in order if (one := ledger.read("register", number))), None)
        for order in (numbers, reversed(numbers))
    )
    return Plan(last.stop, max(one.stop - one.start for one in (first, last))) if first and last else None


def plan_of(folder: RunFolder) -> Plan:
    """Return how the run in a folder cut its stack.

    Raises
    ------
    ValueError
        No run has begun in this folder.
    """
    plan = known_plan(folder)
    if plan is None:
        raise ValueError(f"{folder.path} holds no run that has begun. Give the folder that 'run --out' names.")
    return plan
